"""The privacy-utility frontier of a model: many settings on the same data, scored alike.

The model owner tries settings (N_a, alpha, beta) on data of the data owner's kind before shipping
anything. What the settings share is made once: one study, the full model untouched (ZS) and tuned
whole (FT), and for every N_a its adapter layers tuned on the full model (direct). A setting is then
emulated, tuned and plugged in as the two parties would, from the package that would be shipped.

Recovery is (ZS - plug-in) / (ZS - FT) in nats: the share of full fine-tuning's gain that the owner
gets. The gap is emulator FT - plug-in in nats a token: how much worse is what the data owner keeps.
Every finished row is kept in OUT/rows, under a digest of all that decides it.

`split_frontier` sweeps the knobs of split tuning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from transformers import PreTrainedModel

from blindtune.errors import ConfigError
from blindtune.evaluation.scoreboard import LEAST_GAIN
from blindtune.evaluation.sweeps import KeptRows, digest_of, unbeaten
from blindtune.evaluation.utility import loss_on_targets
from blindtune.models.costs import decoder_cost
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.offsite.adapter import AdapterConfig, write_adapter
from blindtune.offsite.emulation import EmulatorConfig, emulate, replaced_layers
from blindtune.offsite.emulator import Emulator, adapter_indices, adapter_parameters, open_emulator
from blindtune.offsite.importance import DynamicConfig
from blindtune.offsite.plugin import plug_in
from blindtune.offsite.study import FACTS_NAME, Study, StudyConfig, open_study
from blindtune.offsite.studying import OnStage, study
from blindtune.training.loop import RunConfig, TrainingConfig, fit
from blindtune.training.text import DataConfig, load_dataset_file

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Which settings are tried, and how each is tuned and scored."""

    adapter_layers: tuple[int, ...] = (2,)
    """Values of N_a."""
    alpha: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Values of alpha, the share of middle layers replaced."""
    beta: tuple[float, ...] = (1.0, 0.8, 0.5, 0.2)
    """Values of beta, the share of the attention's rank kept."""
    max_length: int = 128
    """Tokens of a window of plain text, and the most of any example."""
    test_share: float = 0.2
    """Share of the data that is scored on and not tuned on, where there is no test file."""
    steps: int = 100
    """Optimizer steps of every tuning."""
    batch_size: int = 4
    """Examples a step."""
    learning_rate: float = 6e-4
    """Of adapters."""
    ft_learning_rate: float = 2e-4
    """Of full fine-tuning."""
    seed: int = 0
    """Of the order of examples and of the test share."""

    def __post_init__(self) -> None:
        """Refuse empty sweeps and values out of range; each setting is checked when it is made."""
        if not (self.adapter_layers and self.alpha and self.beta):
            raise ConfigError("expected at least one value of adapter_layers, alpha and beta")
        if not 0 < self.test_share < 1 or min(self.ft_learning_rate, self.learning_rate) <= 0:
            raise ConfigError(
                "expected test_share between 0 and 1 and learning rates above 0, got "
                f"{self.test_share}, {self.learning_rate}, {self.ft_learning_rate}"
            )
        if self.max_length < 2 or self.steps < 1 or self.batch_size < 1:
            raise ConfigError(
                "expected max_length >= 2, steps >= 1 and batch_size >= 1, got "
                f"{self.max_length}, {self.steps}, {self.batch_size}"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """Every N_a once."""
        return tuple(sorted(set(self.adapter_layers)))

    @property
    def triplets(self) -> tuple[EmulatorConfig, ...]:
        """Every setting, mildest first."""
        sweep = product(self.ends, sorted(set(self.alpha)), sorted(set(self.beta))[::-1])
        return tuple(EmulatorConfig(adapter_layers=n, alpha=a, beta=b) for n, a, b in sweep)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting's scores, in nats a token of test text, and what it costs the data owner."""

    adapter_layers: int
    alpha: float
    beta: float
    emulator_zs: float
    emulator_ft: float
    plug_in: float
    parameters: int
    """Of the emulator."""
    bytes: int
    """Of the package."""
    flops_per_token: float
    """Of one step of tuning."""

    @property
    def gap(self) -> float:
        """How much worse the tuned emulator is than the plug-in, nats a token."""
        return self.emulator_ft - self.plug_in

    @property
    def name(self) -> str:
        """The triplet in short."""
        return f"{self.adapter_layers}, {self.alpha:g}, {self.beta:g}"


@final
@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All that was measured."""

    zs: float
    ft: float
    direct: Mapping[int, float]
    """By N_a: the adapter layers tuned on the full model, which neither party could do."""
    settings: tuple[Setting, ...]
    test_tokens: int
    study_text: str
    """What the study read."""

    def recovery(self, nats: float) -> float | None:
        """Share of full fine-tuning's gain; None where it gains nothing."""
        gain = self.zs - self.ft
        return (self.zs - nats) / gain if gain >= LEAST_GAIN else None

    def efficient(self) -> tuple[Setting, ...]:
        """Settings that no other one beats in plug-in and gap at once, best plug-in first."""
        return unbeaten(self.settings, lambda s: (-s.plug_in, s.gap))

    def cheapest(self, recovery: float | None, gap: float | None) -> Setting | None:
        """The setting that tunes with the fewest FLOPs and reaches both; None if none does."""
        fit_for = [
            setting
            for setting in self.settings
            if (gap is None or setting.gap >= gap)
            and (recovery is None or self._recovers(setting, recovery))
        ]
        return min(fit_for, key=lambda s: (s.flops_per_token, s.plug_in), default=None)

    def _recovers(self, setting: Setting, wanted: float) -> bool:
        found = self.recovery(setting.plug_in)
        return found is not None and found >= wanted

    def facts(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        efficient = self.efficient()
        rows = [
            asdict(s)
            | {
                "gap": s.gap,
                "recovery": self.recovery(s.plug_in),
                "efficient": s in efficient,
            }
            for s in self.settings
        ]
        plain = {name: getattr(self, name) for name in ("zs", "ft", "test_tokens", "study_text")}
        direct = {str(n): nats for n, nats in self.direct.items()}
        return plain | {"direct": direct, "settings": rows}


def frontier(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: FrontierConfig | None = None,
    *,
    public: str | Path | None = None,
    made_study: str | Path | None = None,
    test: str | Path | None = None,
    how: StudyConfig | None = None,
    dynamic: DynamicConfig | None = None,
    on_stage: OnStage | None = None,
) -> Frontier:
    """Sweep settings; rows that are there under the same digest are not run again.

    Args:
        model: a local directory, a hub name, or an embedded model.
        data: data of the data owner's kind: tuned on, and its test share scored on.
        out: directory of rows, study and work.
        config: the sweep.
        public: text that the study reads; None: `data`, which flatters every emulator.
        made_study: a study that is there; then none is made.
        test: scored on instead of a share of `data`.
        how, dynamic: of the study that is made.
        on_stage: progress.

    Raises:
        ModelError, DataError, ConfigError, OutputError: see errors.py.
    """
    config, out = config or FrontierConfig(), Path(out)
    sweep = _Sweep(model, data, test, out, config)
    with sweep.rows.alone():
        text = str(public or data) if made_study is None else f"what {made_study} was made from"
        if made_study is None:
            how = how or StudyConfig(max_length=config.max_length)
            how = replace(how, min_adapter_layers=min(config.adapter_layers))
            made_study = out / sweep.study_name(text, how, dynamic or DynamicConfig())
            if not (made_study / FACTS_NAME).is_file():
                study(model, text, made_study, how, dynamic, on_stage=on_stage)
        found = open_study(made_study)
        if found.fingerprint != sweep.fingerprint:
            raise ConfigError(
                f"{made_study}: expected a study of {model}, got one of another model"
            )
        for triplet in config.triplets:
            replaced_layers(found, triplet)  # refuses what cannot be made before anything is tuned
        mark = hashlib.sha256((Path(made_study) / FACTS_NAME).read_bytes()).hexdigest()
        report = partial(_report, on_stage, len(config.triplets) + len(config.ends) + 2)
        zs, ft = report(0, sweep.untouched()), report(1, sweep.on_full_model(None))
        direct = {n: report(2 + k, sweep.on_full_model(n)) for k, n in enumerate(config.ends)}
        first = 2 + len(direct)
        settings = [
            report(first + k, sweep.setting(found, mark, triplet))
            for k, triplet in enumerate(config.triplets)
        ]
    return Frontier(
        zs=zs, ft=ft, direct=direct, settings=tuple(settings),
        test_tokens=sweep.test.trained_tokens, study_text=text,
    )  # fmt: skip


def _report(on_stage: OnStage | None, total: int, index: int, result: T) -> T:
    if on_stage is not None:
        on_stage("rows", index + 1, total)
    return result


@final
class _Sweep:
    """The rows of one sweep: the data, read once, and where rows are kept."""

    def __init__(
        self,
        model: str | Path,
        data: str | Path,
        test: str | Path | None,
        out: Path,
        config: FrontierConfig,
    ) -> None:
        self.model, self.rows, self.config = model, KeptRows(out), config
        tokenizer, reading = load_tokenizer(model), DataConfig(max_length=config.max_length)
        everything = load_dataset_file(data, tokenizer, reading)
        if test is None:
            self.train, self.test = everything.split(config.test_share, config.seed)
        else:
            self.train, self.test = everything, load_dataset_file(test, tokenizer, reading)
        full = load_model(model)
        check_context(config.max_length, context_limit(full.config))
        self.fingerprint = fingerprint(full)

    def study_name(self, text: str, how: StudyConfig, dynamic: DynamicConfig) -> str:
        """Where a study of this text lies, so that one of another text is not taken for it."""
        reading = DataConfig(max_length=how.max_length)
        read = load_dataset_file(text, load_tokenizer(self.model), reading).fingerprint()
        return f"study-{digest_of([self.fingerprint, read, asdict(how), asdict(dynamic)])}"

    def untouched(self) -> float:
        """The full model as it is, nats a token."""
        made = self._row("zs", {}, lambda: {"nats": self._nats(load_model(self.model))})
        return float(made["nats"])

    def on_full_model(self, adapter_layers: int | None) -> float:
        """The full model tuned, all of its weights or its adapter layers alone; nats a token."""
        c = self.config
        rate = c.ft_learning_rate if adapter_layers is None else c.learning_rate

        def make() -> dict[str, Any]:
            full = load_model(self.model)
            if adapter_layers is not None:
                full.requires_grad_(False)
                indices = adapter_indices(adapter_layers, Decoder(full).layer_count)
                for _, parameter in adapter_parameters(full, indices):
                    parameter.requires_grad_(True)
            self._fit(full, rate)
            return {"nats": self._nats(full)}

        name = "ft" if adapter_layers is None else f"direct-{adapter_layers}"
        made = self._row(name, {**self._tuning(rate), "layers": adapter_layers}, make)
        return float(made["nats"])

    def setting(self, made_study: Study, mark: str, triplet: EmulatorConfig) -> Setting:
        """Emulate, tune, plug in, score; `mark` tells the study from others."""
        work = self.rows.work

        def make() -> dict[str, Any]:
            emulate(made_study, work / "emulator", triplet, model=self.model)
            opened = open_emulator(work / "emulator", dtype=torch.float32)
            before = self._nats(opened.model)
            self._fit(opened.model, self.config.learning_rate)
            write_adapter(opened, AdapterConfig(), work / "adapter")
            # The owner's own adapter: a setting that changes much is a row, no reason to stop.
            plugged = plug_in(self.model, work / "adapter", None, accept_large_change=True).model
            return {
                "emulator_zs": before,
                "emulator_ft": self._nats(opened.model),
                "plug_in": self._nats(plugged),
                "parameters": opened.model.num_parameters(),
                "bytes": sum(p.stat().st_size for p in (work / "emulator").iterdir()),
                "flops_per_token": tuning_flops(opened, self.config.max_length),
            }

        t = triplet
        own = {**self._tuning(self.config.learning_rate), "triplet": asdict(t), "study": mark}
        made = self._row(f"{t.adapter_layers}-{t.alpha:g}-{t.beta:g}", own, make)
        return Setting(adapter_layers=t.adapter_layers, alpha=t.alpha, beta=t.beta, **made)

    def _tuning(self, rate: float) -> dict[str, Any]:
        c = self.config
        return {"train": self.train.fingerprint(), "tuning": [c.steps, c.batch_size, rate, c.seed]}

    def _row(
        self, name: str, own: Mapping[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The row of this name, from OUT/rows or made now."""
        decides = {"model": self.fingerprint, "test": self.test.fingerprint(), **own}
        return self.rows.row(name, decides, make)

    def _fit(self, model: PreTrainedModel, rate: float) -> None:
        c = self.config
        training = TrainingConfig(
            learning_rate=rate,
            max_steps=c.steps,
            per_device_train_batch_size=c.batch_size,
            seed=c.seed,
        )
        run = RunConfig(silent=True, resume="never", save_steps=c.steps)
        fit(model, self.train, None, training, self.rows.work / "fit", run=run)

    def _nats(self, model: PreTrainedModel) -> float:
        return loss_on_targets(model, [self.test[i] for i in range(len(self.test))]).nats_per_token


def tuning_flops(emulator: Emulator, length: int) -> float:
    """FLOPs a token of tuning all weights of an emulator's adapter layers."""
    cost = decoder_cost(Decoder(emulator.model), length)
    stack = cost.stack()
    weights = sum(cost.layers[i].weights for i in emulator.adapter_indices)
    return stack.forward + stack.backward + cost.head.forward + cost.head.backward + weights
