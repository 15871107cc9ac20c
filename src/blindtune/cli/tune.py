"""`blindtune tune`: the data owner's act."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import duration, print_pairs, size
from blindtune.cli.trusting import (
    OPENING,
    WRITING,
    signed_by,
    signer_of,
    signing_as,
    trust_of,
)
from blindtune.cli.verb import Settings, Verb, process_rank

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Tune an emulator's adapter on private data.

Run by the data owner; needs neither the full model nor the study, and no network. Only the adapter
layers are trained, all their weights or LoRA inside them. The best step is chosen by the
emulator's own loss on validation data, because the full model is out of sight. The data stays
here; the adapter goes back to the model owner. With --dp-epsilon it is tuned by DP-SGD: what the
adapter tells of any one record is bounded, whatever the attack; the last step is taken then.

\b
Needs:   EMULATOR, a package from the model owner; private data: .txt,
         .jsonl (`text`; `prompt` and `completion`; `messages`), .csv,
         .parquet or a hub data set.
Writes:  the adapter package; beside it NAME.options.yaml and, while it
         works, NAME.work with checkpoints, from which the same command goes
         on (TensorBoard logs stay there, if asked for).

\b
Example:
  blindtune tune emulator/ --data private.jsonl --out adapter/
On two GPUs (or two processes on CPUs, with the same flag):
  accelerate launch --multi_gpu --num_processes 2 $(which blindtune) \\
    tune emulator/ --data private.jsonl --out adapter/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from dataclasses import asdict, replace

    from blindtune.offsite.adapter import AdapterConfig
    from blindtune.offsite.data_owner.tuning import tune
    from blindtune.training.config import RunConfig, TrainingConfig
    from blindtune.training.dp_plan import DpConfig
    from blindtune.training.text import DataConfig

    def on_sample(sample: str) -> None:
        if process_rank() == 0:
            click.echo(f"One example, «trained tokens» marked:\n{sample}\n", err=True)

    signer = signer_of(settings)
    tuned = tune(
        settings["emulator"],
        settings["data"],
        settings["out"],
        settings.of(AdapterConfig),
        settings.of(TrainingConfig),
        settings.of(DpConfig),
        reading=settings.of(DataConfig),
        run=replace(settings.of(RunConfig), resume=settings["resume"]),
        validation=settings["validation"],
        overwrite=settings.overwrite,
        on_sample=on_sample,
        trust=trust_of(settings),
        signer=signer,
    )
    return {
        "path": str(tuned.path),
        "id": tuned.adapter_id,
        "signed_by": signing_as(signer),
        "emulator": tuned.emulator.id,
        "emulator_signed_by": signed_by(tuned.emulator.signature),
        "trained_parameters": tuned.trained_parameters,
        "privacy": None if tuned.privacy is None else asdict(tuned.privacy),
        **asdict(tuned.training),
    }


def show(facts: Facts, console: Console) -> None:
    """Print how the tuning went."""
    pairs = [
        ("trained", f"{facts['trained_parameters']:,} parameters"),
        ("steps", f"{facts['steps']:,}"),
        ("tokens", f"{facts['tokens']:,} ({facts['tokens_per_second']:,.0f} a second)"),
        ("time", duration(facts["seconds"])),
        ("peak memory", size(facts["peak_memory_bytes"])),
    ]
    if facts["resumed_from"] is not None:
        pairs.insert(1, ("resumed from step", f"{facts['resumed_from']:,}"))
    if facts["train_loss"]:
        pairs.append(("training loss", _ends(facts["train_loss"])))
    if facts["validation_loss"]:
        best = min(loss for _, loss in facts["validation_loss"])
        ends = _ends(facts["validation_loss"])
        pairs.append(("validation loss", f"{ends}, best {best:.4f} at step {facts['best_step']:,}"))
    if facts["privacy"] is not None:
        pairs.append(("differential privacy", _spent(facts["privacy"])))
    pairs += [
        ("emulator signed by", facts["emulator_signed_by"]),
        ("signed by", facts["signed_by"]),
        ("package id", facts["id"]),
        ("adapter", facts["path"]),
        ("options", facts["options"]),
    ]
    print_pairs(console, "Adapter written", pairs)


def _spent(plan: Facts) -> str:
    return (
        f"epsilon {plan['epsilon']:.2f}, delta {plan['delta']:.1e} a {plan['unit']}; noise "
        f"{plan['noise_multiplier']:.2f} x {plan['max_grad_norm']:g}, {plan['steps']:,} steps of "
        f"{plan['expected_batch']:g} records on average"
    )


def _ends(points: list[tuple[int, float]]) -> str:
    return f"{points[0][1]:.4f} -> {points[-1][1]:.4f} nats/token"


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.offsite.adapter import AdapterConfig
    from blindtune.offsite.data_owner.tuning_estimate import estimate_tune
    from blindtune.training.config import RunConfig, TrainingConfig
    from blindtune.training.dp_plan import DpConfig
    from blindtune.training.text import DataConfig

    return estimate_tune(
        settings["emulator"],
        settings["data"],
        settings.of(AdapterConfig),
        settings.of(TrainingConfig),
        settings.of(DpConfig),
        reading=settings.of(DataConfig),
        run=settings.of(RunConfig),
        validation=settings["validation"],
        trust=trust_of(settings, remember=False),
    )


VERB = Verb(
    name="tune",
    help=HELP,
    parameters=(
        click.Argument(["emulator"], metavar="EMULATOR"),
        click.Option(
            ["--data"], required=True, metavar="FILE", help="Private data, a file or a hub name."
        ),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the adapter."),
        click.Option(
            ["--validation"],
            metavar="FILE",
            help="Validation data; without it, a share of the data is set aside.",
        ),
        *OPENING,
        *WRITING,
    ),
    groups=(
        Group(heading="Adapter", module="blindtune.offsite.adapter", name="AdapterConfig"),
        Group(heading="Training", module="blindtune.training.config", name="TrainingConfig"),
        Group(
            heading="Differential privacy",
            module="blindtune.training.dp_plan",
            name="DpConfig",
            prefix="dp_",
        ),
        Group(
            heading="Reading the data",
            module="blindtune.training.text",
            name="DataConfig",
            renamed={"seed": "split_seed"},
        ),
        Group(
            heading="Speed and bookkeeping",
            module="blindtune.training.config",
            name="RunConfig",
            left_out=frozenset({"resume", "threads", "silent"}),
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    mark="manifest.json",
    keeps_progress=True,
    less_memory="lower --per-device-train-batch-size (and raise --gradient-accumulation-steps) or "
    "--max-length, or add --gradient-checkpointing",
    interrupted="the same command goes on from the last checkpoint",
)
