"""Emulators by every method side by side: what tuning gives, what making them costs, healing.

    python benchmarks/competitors.py --data DIR --work DIR [--smoke] [PART ...]

Parts: wiki, arc, openbook, cost, pace, healing, healed. Pace times our short study and steps of
distillation in turn, so that both meet the same machine. Healed scores on
every task what the best row of healing made of an emulator, over seeds. Every method makes one
emulator, kept in WORK/emulators with what it cost; rows tune on it. Rows are kept and resumed as in
`offsite.py` (`rows.py`); results go to benchmarks/results/competitors-PART.json. What `offsite.py`
has is not run again: on WikiText-2 and ARC-Easy ZS, FT, the directly tuned adapter, ours, and
uniform LayerDrop. `--smoke` does the same on a twentieth of everything, to see that it runs.
"""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from blindtune.attacks.emulator_misuse import EmulatorView, HealingConfig, heal
from blindtune.evaluation.leakage.misuse import judge_misuse
from blindtune.evaluation.utility.choices import multiple_choice, read_items
from blindtune.evaluation.utility.loss import perplexity
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.competitors.crash import CrashConfig
from blindtune.offsite.competitors.fixed_margin import FixedMarginConfig
from blindtune.offsite.competitors.gradot import GradotConfig
from blindtune.offsite.competitors.layer_drop import LayerDropConfig
from blindtune.offsite.competitors.methods import emulate_by, public_windows
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.emulator import open_emulator
from blindtune.offsite.model_owner.emulation import EmulatorConfig, emulate
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.plugin import plug_in
from blindtune.offsite.model_owner.study import StudyConfig, open_study
from blindtune.offsite.model_owner.studying import study
from blindtune.training.text import DataConfig
from competitor_tables import best_healing, best_stop
from flops import counter
from offsite import (
    ADAPTER_RATE,
    LENGTH,
    MODEL,
    PAPER,
    QUIET,
    SEEDS,
    Bench,
    claimed,
    facts_of,
    tuned_directly,
)
from rows import parse_options, run_parts

PARTS = ("wiki", "arc", "openbook", "cost", "pace", "healing", "healed")
CHOICE_RATE = 2e-4
CHOICE_FT_RATE = 5e-5
OURS = EmulatorConfig()
# The owner trains nothing: harmonizers by regression, layers in greedy order.
TRAINING_FREE = {"steps": 0}
# And with a fifth of the text: the cheapest that still beats distillation.
SHORT = TRAINING_FREE | {"calibration_tokens": 8192, "damage_tokens": 512}
STUDIED = {
    "ours": ("study", {}, OURS),
    "ours, milder": ("study", {}, EmulatorConfig(alpha=0.2, beta=1.0)),  # `offsite.py` tunes it
    # As lossy as the lossiest of the others whose plug-in is worth something.
    "ours, lossier": ("study", {}, EmulatorConfig(alpha=0.6, beta=0.2)),
    "ours, training-free": ("study-free", TRAINING_FREE, OURS),
    "ours, short study": ("study-short", SHORT, OURS),
    "ScaleOT as in the paper": (
        "study-paper",
        PAPER | {"warm_start": "none", "reward": "paper", "steps": 160},
        EmulatorConfig(weighted=False, reading="removed"),
    ),
}
LAMBDA = {"attention_lambda": 0.1, "feed_forward_lambda": 0.1}
OTHERS = {
    "uniform": LayerDropConfig(),
    "uniform, distilled": LayerDropConfig(steps=400),
    "CRaSh": CrashConfig(),
    # Shares and lambda by the emulator's loss before tuning, so that it is as lossy as ours.
    "GradOT": GradotConfig(rank_kept=0.8, channels_kept=0.9, **LAMBDA),
    "GradOT, lossier": GradotConfig(
        rank_kept=0.4, channels_kept=0.75, attention_lambda=1.0, feed_forward_lambda=1.0
    ),
    "fixed margin": FixedMarginConfig(),
}
METHODS = ("ours", "uniform", "GradOT", "CRaSh", "ours, training-free", "uniform, distilled")
METHODS += ("ours, short study", "ScaleOT as in the paper", "fixed margin", "GradOT, lossier")
METHODS += ("ours, lossier",)
IN_OFFSITE = ("ours", "uniform")
HEALED = ("ours", "GradOT", "uniform, distilled", "ScaleOT as in the paper", "uniform", "CRaSh")
HEALED += ("fixed margin", "ours, short study", "ours, training-free", "ours, milder")


def emulator(bench, name):
    """The emulator of a method, made once; (directory, what it cost)."""
    slug = "".join(c for c in name.lower() if c.isalnum())
    target = bench.work / "emulators" / slug
    facts = target.with_suffix(".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    with claimed(facts) as mine:
        if mine:
            shutil.rmtree(target, ignore_errors=True)
            facts.write_text(json.dumps(make(bench, name, target), indent=1))
    return target, json.loads(facts.read_text())


def make(bench, name, target):
    """Make an emulator from nothing but the model and public text, counting."""
    public, tokens = bench.public(), None
    start = time.perf_counter()
    if name in STUDIED:
        studied, changes, config = STUDIED[name]
        with counter() as count:
            made = emulate(bench.study(studied, **fewer(bench, changes)), target, config)
        tokens = sum(open_study(bench.work / studied).tokens.values())
        seconds, flops = time.perf_counter() - start, count.get_total_flops()
    else:
        config = OTHERS[name]
        if bench.smoke and getattr(config, "steps", 0):
            config = replace(config, steps=4)
        made = emulate_by(MODEL, public, target, config, max_length=LENGTH)
        tokens, seconds = made.tokens, time.perf_counter() - start
        flops = flops_of(bench, config)
    return {
        "seconds": seconds,
        "flops": flops,
        "tokens": tokens,
        "parameters": made.parameters,
        "full_parameters": made.full_parameters,
        "bytes": sum(p.stat().st_size for p in target.iterdir()),
        "layers": [layer.__class__.__name__ for layer in made.layers],
        "config": asdict(made.config),
    }


def flops_of(bench, config):
    """Of making an emulator by another method, made again to count; of many alike steps, two."""

    def counted(some):
        with TemporaryDirectory(dir=bench.work) as folder, counter() as count:
            emulate_by(MODEL, bench.public(), Path(folder) / "e", some, max_length=LENGTH)
        return count.get_total_flops()

    steps = getattr(config, "steps", 0)
    if steps <= 2:
        return counted(config)
    one, two = (counted(replace(config, steps=some)) for some in (1, 2))
    return one + (steps - 1) * (two - one)


def before(bench, part, name, score):
    """The score of a method's emulator before tuning, the same for every seed: made once."""
    slug = "".join(c for c in f"{part}{name}".lower() if c.isalnum())
    kept = bench.work / "emulators" / f"{slug}-untuned.json"
    with claimed(kept) as mine:
        if mine:
            model = open_emulator(emulator(bench, name)[0], dtype=torch.float32).model
            kept.write_text(json.dumps(score(model)))
    return json.loads(kept.read_text())


def fewer(bench, changes):
    return changes | {"steps": min(changes["steps"], 4)} if bench.smoke and changes else changes


class Competitors(Bench):
    """The bench of `offsite.py`, and the public text by itself."""

    def public(self):
        from corpora import public_text

        path = self.work / "public.txt"
        if not path.exists():
            path.write_text(public_text(self.data))
        return path


def wiki_task(bench, seed):
    """(private text, how it is tuned on, how a model is scored)."""
    test = bench.test_windows(64)
    training = bench.training(ADAPTER_RATE, seed)
    return (
        bench.data / "wikitext2_valid.txt",
        training,
        lambda m: perplexity(m, test).nats_per_token,
    )


def choice_task(name):
    def task(bench, seed, rate=CHOICE_RATE):
        items = read_items(bench.data / f"{name}_test.jsonl")[: bench.amount(400)]
        tokenizer = load_tokenizer(MODEL)

        def score(model):
            found = multiple_choice(model, tokenizer, items)
            return {"acc": found.accuracy, "acc_norm": found.accuracy_normalised}

        return bench.data / f"{name}_train.jsonl", bench.training(rate, seed, 60, batch=8), score

    return task


TASKS = {"wiki": wiki_task, "arc": choice_task("arc_easy"), "openbook": choice_task("openbookqa")}


def tuned_row(bench, folder, part, name, seed):
    """Tune the emulator of a method on a task and plug the adapter in."""
    package, cost = emulator(bench, name)
    source, training, score = TASKS[part](bench, seed)
    untuned = before(bench, part, name, score)
    done = tune(
        package, source, folder / "adapter", AdapterConfig(), training,
        reading=DataConfig(max_length=LENGTH, validation_split=0.0), run=QUIET,
    )  # fmt: skip
    return {
        "Emulator ZS": untuned,
        "Emulator FT": score(done.emulator.model),
        "Plug-in": score(plug_in(MODEL, folder / "adapter", None).model),
        "facts": {"tuning": facts_of(done.training), "emulator_parameters": cost["parameters"]},
    }


def reference_row(bench, folder, part, kind, seed):
    """The full model: untouched, tuned whole, or its adapter layers alone."""
    if kind == "ZS":
        return {"ZS": TASKS[part](bench, seed)[2](load_model(MODEL))}
    rate = CHOICE_FT_RATE if kind == "FT" else CHOICE_RATE
    source, training, score = TASKS[part](bench, seed, rate)
    model, facts = tuned_directly(bench, folder, source, training, everything=kind == "FT")
    return {kind: score(model), "facts": facts}


def cost_row(bench, _folder, name):
    return emulator(bench, name)[1]


def pace_row(bench, folder):
    """Seconds of the short study with its emulator, and of 400 steps of distillation, in turn.

    Distillation is timed with few and with more steps: what those add, for each step that is left.
    """

    def timed(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def short():
        configs = {k: v for k, v in SHORT.items() if k != "steps"}
        study(
            MODEL, bench.public(), folder / "study", StudyConfig(**configs), DynamicConfig(steps=0)
        )
        emulate(folder / "study", folder / "short", OURS)

    def distilled(steps):
        config = LayerDropConfig(steps=steps)
        emulate_by(MODEL, bench.public(), folder / f"{steps}", config, max_length=LENGTH)

    few, more = (1, 2) if bench.smoke else (2, 12)
    ours = timed(short)
    first, second = (timed(lambda steps=steps: distilled(steps)) for steps in (few, more))
    every = first + (400 - few) * (second - first) / (more - few)
    return {"short study": ours, "distilled": every, "ratio": every / ours}


def healing_row(bench, _folder, name, regrow, rate=2e-4, warmup=10):
    """The emulator healed on public text; scored on WikiText-2, beside an equally deep model."""
    config = HealingConfig(
        regrow=regrow, steps=4 if bench.smoke else 64, points=4, learning_rate=rate,
        control_learning_rate=rate, warmup_steps=warmup,
    )  # fmt: skip
    public = public_windows(MODEL, bench.public(), LENGTH)
    found = judge_misuse(
        emulator(bench, name)[0], MODEL, public, bench.test_windows(64), [config],
        on_stop=lambda *stop: print("  ", *stop, flush=True),
    )  # fmt: skip
    return asdict(found) | {"healed_share": found.healed_share, "config": asdict(config)}


def healed_row(bench, _folder, name, seed):
    """An emulator healed as its best row of `healing` was at its best, scored on every task."""
    found = best_healing(name)
    spent, _ = best_stop(found)
    steps = max(1, spent // (found["config"]["batch_size"] * LENGTH))
    steps = min(steps, 4) if bench.smoke else steps
    config = HealingConfig(**found["config"] | {"steps": steps, "seed": seed})
    model = open_emulator(emulator(bench, name)[0], dtype=torch.float32).model
    public = public_windows(MODEL, bench.public(), LENGTH)
    for stop in heal(EmulatorView(model=model, public_NL=public), config):
        print("  ", stop, flush=True)
    scores = {part: task(bench, seed)[2](model) for part, task in TASKS.items()}
    return scores | {"config": asdict(config), "tokens": stop.tokens}


def plan(bench, part):
    """The rows of a part, most wanted first: (name, function)."""
    rows = []

    def add(name, function, *args):
        rows.append((name, lambda folder: function(bench, folder, *args)))

    if part == "cost":
        for name in METHODS:
            add(name, cost_row, name)
    elif part == "pace":
        for turn in range(3):
            add(f"turn-{turn}", pace_row)
    elif part == "healing":
        for name in HEALED:
            add(f"{name}-beside", healing_row, name, "beside")
            add(f"{name}-gentle", healing_row, name, "beside", 5e-5, 4)
        add("ours-neighbour", healing_row, "ours", "neighbour")
        add("ours-none", healing_row, "ours", "none")
    elif part == "healed":
        for seed in SEEDS:
            for name in HEALED:
                add(f"{name}-{seed}", healed_row, name, seed)
    else:
        for seed in SEEDS:
            for name in METHODS:
                if part == "openbook" or name not in IN_OFFSITE:
                    add(f"{name}-{seed}", tuned_row, part, name, seed)
            if part == "openbook":
                for kind in ("ZS", "FT", "Adapter tuned directly")[bool(seed) :]:
                    add(f"{kind}-{seed}", reference_row, part, kind, seed)
    return rows


def main():
    options = parse_options(__doc__, PARTS)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Competitors(options.data, options.work, options.smoke)
    rates = {"adapter": ADAPTER_RATE, "choices": CHOICE_RATE, "choices FT": CHOICE_FT_RATE}
    run_parts("competitors", options, lambda part: plan(bench, part), facts={"rates": rates})


if __name__ == "__main__":
    main()
