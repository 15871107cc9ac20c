"""Offsite-tuning, the whole protocol in one process: study, emulate, tune, plug in, compare.

The model owner has a model and public text; the data owner has private text. Here both are played
by one program, so that it can also do what neither could: score every model on the same held-out
text, and fine-tune the full model on the private data for comparison.

    python recipes/offsite.py --out demo
    python recipes/offsite.py --model DIR --public public.txt --private mine.txt --test held-out.txt
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

import blindtune
from blindtune.cli.printing import stages
from blindtune.evaluation.pages import report, tables
from blindtune.evaluation.pages.offsite import offsite_page
from blindtune.evaluation.utility.scoreboard import (
    EMULATOR_FT,
    EMULATOR_ZS,
    FT,
    PLUG_IN,
    ZS,
    Cost,
    Scoreboard,
    save,
)
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.training import checkpoint
from blindtune.training.loop import fit
from blindtune.training.text import load_dataset_file
from sample_text import write_samples


def main() -> None:
    """Run the protocol and leave scores.json and report.html in the output directory."""
    options, begin = parse_options(), time.perf_counter()
    out, model, say = options.out, options.model, Console().print
    out.mkdir(parents=True, exist_ok=True)
    samples = write_samples(out)
    public = options.public or samples[0]
    private = options.private or samples[1]
    test = options.test or samples[2]
    reading = blindtune.DataConfig(max_length=128, max_tokens=40_000)
    run = blindtune.RunConfig(
        resume="never", save_steps=options.steps, eval_steps=max(1, options.steps // 4)
    )
    training = blindtune.TrainingConfig(
        max_steps=options.steps, per_device_train_batch_size=4, seed=options.seed
    )

    say("\n[bold]Model owner[/] studies the model on public text; the result stays private.")
    dynamic = blindtune.DynamicConfig(steps=options.study_steps)
    how = blindtune.StudyConfig(
        seed=options.seed, calibration_tokens=20_480, damage_tokens=options.damage_tokens
    )
    with stages() as on_stage:
        study = blindtune.study(
            model, public, out / "study", how, dynamic, overwrite=True, on_stage=on_stage
        )

    say("[bold]Model owner[/] makes an emulator from the study, without training.")
    emulation = blindtune.emulate(out / "study", out / "emulator", overwrite=True)

    say("[bold]Data owner[/] tunes the emulator's adapter on private text. One sample, «trained»:")
    look = partial(say, markup=False, style="dim")
    tuning = blindtune.tune(
        out / "emulator", private, out / "adapter", None, training,
        reading=reading, run=run, overwrite=True, on_sample=lambda text: look(text[-400:]),
    )  # fmt: skip
    say("[bold]Model owner[/] plugs the returned adapter into the full model.")
    blindtune.plug_in(model, out / "adapter", out / "tuned", overwrite=True)

    say("[bold]For comparison only[/]: the full model, fine-tuned on the private text itself.")
    ft_training = replace(training, learning_rate=options.ft_learning_rate)
    ft_seconds = fine_tune(model, private, out / "ft", reading, ft_training, run)

    say("Scoring all five on held-out text.")
    scoring = blindtune.EvaluationConfig(max_length=128, max_tokens=options.test_tokens)
    candidates = (
        (ZS, model, None),
        (EMULATOR_ZS, out / "emulator", None),
        (EMULATOR_FT, out / "emulator", out / "adapter"),
        (PLUG_IN, out / "tuned", None),
        (FT, out / "ft", None),
    )
    scores = {}
    with stages() as show:
        for name, candidate, adapter in candidates:
            found = blindtune.evaluate(
                candidate, adapter=adapter, data=test, config=scoring,
                on_progress=partial(show, name),
            )  # fmt: skip
            scores[name] = found.perplexity
    bytes_sent = sum(path.stat().st_size for path in (out / "emulator").iterdir())
    studied, steps = sum(study.tokens.values()), tuning.training
    board = Scoreboard(
        measure="nats",
        data=f"{scores[ZS].tokens:,} held-out tokens",
        rows={name: (score.nats_per_token,) for name, score in scores.items()},
        costs=(
            Cost(name="full model", parameters=emulation.full_parameters),
            Cost(name="emulator", parameters=emulation.parameters, bytes=bytes_sent),
            Cost(name="study", tokens=studied, seconds=sum(study.seconds.values())),
            Cost(name="emulate", seconds=emulation.seconds),
            Cost(name="tune", tokens=steps.tokens, seconds=steps.seconds),
            Cost(name="FT", tokens=steps.tokens, seconds=ft_seconds),
        ),
    )
    save(board, out / "scores.json")
    report.write(offsite_page(board, study, emulation, tuning), out / "report.html")
    say(tables.score_table(board), tables.cost_table(board))
    say(f"{time.perf_counter() - begin:,.0f} s in all. The report: {out / 'report.html'}")


def fine_tune(model, private, out, reading, training, run) -> float:
    """Full fine-tuning on the same examples for as many steps; returns its seconds."""
    full, tokenizer = load_model(model), load_tokenizer(model)
    train, held_out = load_dataset_file(private, tokenizer, reading).split(0.1, reading.seed)
    result = fit(full, train, held_out, training, out.with_suffix(".work"), run=run)
    checkpoint.clear(out.with_suffix(".work"))
    full.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return result.seconds


def parse_options() -> argparse.Namespace:
    """Options whose defaults take a few minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="directory or hub name")
    parser.add_argument("--public", type=Path, help="public text for the study")
    parser.add_argument("--private", type=Path, help="the data owner's text")
    parser.add_argument("--test", type=Path, help="held-out text of the private kind")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--steps", type=int, default=30, help="of tuning, 4 x 128 tokens each")
    parser.add_argument("--study-steps", type=int, default=16, help="of Dynamic LayerReplace")
    parser.add_argument("--damage-tokens", type=int, default=1024, help="that order the layers")
    parser.add_argument("--test-tokens", type=int, default=4096)
    parser.add_argument("--ft-learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
