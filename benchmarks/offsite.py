"""Offsite-tuning on SmolLM2-135M: WikiText-2, ARC-Easy, the (alpha, beta) grid, cost, importance.

    python benchmarks/offsite.py --data DIR --work DIR [--smoke] [PART ...]

Every row (one thing tuned and scored) is kept as JSON in WORK/rows as soon as it is done: kill the
command and start it again, or start it several times on one machine, and the rows are shared. What
is there of a part is written to benchmarks/results/offsite-PART.json, and rows found there are not
run again either, unless `--fresh` is given.
`--smoke` does the same on a twentieth of everything, to see that it runs.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from blindtune.evaluation.utility.choices import multiple_choice, read_items
from blindtune.evaluation.utility.loss import perplexity
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.emulator import adapter_indices, adapter_parameters, open_emulator
from blindtune.offsite.model_owner.emulation import EmulatorConfig, emulate
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.plugin import plug_in
from blindtune.offsite.model_owner.study import StudyConfig, open_study
from blindtune.offsite.model_owner.studying import study
from blindtune.training.loop import RunConfig, TrainingConfig, fit
from blindtune.training.text import DataConfig, load_dataset_file
from corpora import public_text
from rows import alive, parse_options, run_parts

MODEL = "smollm2-135m"
LENGTH = 128
DEFAULT = EmulatorConfig()
UNIFORM = EmulatorConfig(choice="uniform", beta=0.0, reading="removed", weighted=False)
ADAPTER_RATE = TrainingConfig().learning_rate
PARTS = ("main", "arc", "frontier", "grid", "ranking", "cost")
FT_RATES = (1e-4, 2e-4, 4e-4)
FT_RATE = 2e-4
# beta in the reading "removed"; the default, 0.8 kept, is 0.2 removed.
GRID = [(alpha, beta) for alpha in (0.125, 0.25, 0.5) for beta in (0.2, 0.5, 0.8)]
SEEDS = (0, 1, 2)
# Triplets at full length: what is bought with layers, what with rank (beta is the share kept).
FRONTIER = [(a, 1.0) for a in (0.125, 0.15, 0.2, 0.25)] + [(a, 0.8) for a in (0.125, 0.2, 0.25)]
# Uniform LayerDrop needs no study; an empty one lets it go through the same code.
DROP = {"stand_in": "identity", "warm_start": "none", "initial_scores": "zero", "steps": 0}
STUDIES = {"study": {}, "study-drop": DROP}


@contextmanager
def claimed(target):
    """True for the process that is to make `target`; the others wait until it is there."""
    claim = target.with_name(target.name + ".claim")
    while claim.exists() and alive(claim):
        time.sleep(5)
    if target.exists():
        yield False
        return
    claim.write_text(str(os.getpid()))
    yield True
    claim.unlink()


class Bench:
    """Where things are, and how much is done of everything."""

    def __init__(self, data, work, smoke):
        self.data, self.work, self.smoke = data, work, smoke

    def amount(self, full):
        return max(2, full // 20) if self.smoke else full

    def study(self, name="study", **changes):
        """The study that everything is made from, or a variant of it."""
        public = self.work / "public.txt"
        if not public.exists():
            public.write_text(public_text(self.data))
        target = self.work / name
        if not target.exists():
            options, dynamic = {}, {}
            if self.smoke:
                options = {"calibration_tokens": 2048, "damage_tokens": 256}
                dynamic = {"steps": 8}
            for key, value in changes.items():
                (options if key in StudyConfig.__annotations__ else dynamic)[key] = value
            with claimed(target) as mine:
                if mine:
                    configs = StudyConfig(**options), DynamicConfig(**dynamic)
                    study(MODEL, public, target, *configs)
        return target

    def test_windows(self, count):
        tokens = load_dataset_file(
            self.data / "wikitext2_test.txt", load_tokenizer(MODEL), DataConfig(max_length=LENGTH)
        )
        kept = self.amount(count)
        step = len(tokens) // kept
        return torch.stack([tokens.input_ids[i * step] for i in range(kept)])

    def training(self, rate, seed, steps=100, batch=4):
        return TrainingConfig(
            max_steps=self.amount(steps),
            learning_rate=rate,
            per_device_train_batch_size=batch,
            seed=seed,
        )


QUIET = RunConfig(silent=True, save_steps=10_000, logging_steps=10)


def tuned(bench, folder, config, source, training, name="study"):
    """Emulate, tune, plug in; returns (emulator untouched, emulator tuned, plug-in, facts)."""
    reading = DataConfig(max_length=LENGTH, validation_split=0.0)
    made = emulate(bench.study(name, **STUDIES[name]), folder / "emulator", config)
    before = open_emulator(folder / "emulator", dtype=torch.float32).model
    done = tune(
        folder / "emulator", source, folder / "adapter", AdapterConfig(), training,
        reading=reading, run=QUIET,
    )  # fmt: skip
    plugged = plug_in(MODEL, folder / "adapter", None).model
    kinds = [layer.__class__.__name__ for layer in made.layers]
    facts = {
        "emulate_seconds": made.seconds,
        "emulator_parameters": made.parameters,
        "emulator_bytes": sum(p.stat().st_size for p in (folder / "emulator").iterdir()),
        "full_parameters": made.full_parameters,
        "layers": kinds,
        "tuning": facts_of(done.training),
    }
    return before, done.emulator.model, plugged, facts


def tuned_directly(bench, folder, source, training, *, everything):
    """The full model tuned on the private data: all weights, or its adapter layers alone."""
    model = load_model(MODEL)
    data = load_dataset_file(
        source, load_tokenizer(MODEL), DataConfig(max_length=LENGTH, validation_split=0.0)
    )
    if not everything:
        model.requires_grad_(False)
        indices = adapter_indices(DEFAULT.adapter_layers, Decoder(model).layer_count)
        for _, parameter in adapter_parameters(model, indices):
            parameter.requires_grad_(True)
    result = fit(model, data, None, training, folder / "fit", run=QUIET)
    return model, {"tuning": facts_of(result)}


def facts_of(result):
    facts = asdict(result)
    return {k: facts[k] for k in ("steps", "tokens", "seconds", "peak_memory_bytes")}


def wiki_row(bench, folder, kind, seed, rate, config=DEFAULT, steps=100, windows=64):
    """Nats a token on the test windows for one way of tuning."""
    source = bench.data / "wikitext2_valid.txt"
    test, training = bench.test_windows(windows), bench.training(rate, seed, steps)

    def score(model):
        return perplexity(model, test).nats_per_token

    if kind == "ZS":
        return {"ZS": score(load_model(MODEL))}
    if kind in ("FT", "Adapter tuned directly"):
        model, facts = tuned_directly(bench, folder, source, training, everything=kind == "FT")
        return {kind: score(model), "facts": facts}
    before, after, plugged, facts = tuned(bench, folder, config, source, training)
    return {
        "Emulator ZS": score(before),
        "Emulator FT": score(after),
        "Plug-in": score(plugged),
        "facts": facts,
    }


def arc_row(bench, folder, kind, seed, rate):
    """Accuracy on ARC-Easy after tuning on its training questions."""
    source = bench.data / "arc_easy_train.jsonl"
    items = read_items(bench.data / "arc_easy_test.jsonl")[: bench.amount(400)]
    training, tokenizer = bench.training(rate, seed, 60, batch=8), load_tokenizer(MODEL)

    def score(model):
        found = multiple_choice(model, tokenizer, items)
        return {"acc": found.accuracy, "acc_norm": found.accuracy_normalised}

    if kind == "ZS":
        return {"ZS": score(load_model(MODEL))}
    if kind in ("FT", "Adapter tuned directly"):
        model, facts = tuned_directly(bench, folder, source, training, everything=kind == "FT")
        return {kind: score(model), "facts": facts}
    config = UNIFORM if kind == "uniform" else DEFAULT
    before, after, plugged, facts = tuned(
        bench, folder, config, source, training, "study-drop" if kind == "uniform" else "study"
    )
    return {
        "Emulator ZS": score(before),
        "Emulator FT": score(after),
        "Plug-in": score(plugged),
        "facts": facts,
    }


def plan(bench, part):
    """The rows of a part, most wanted first: (name, function)."""
    rows = []

    def add(name, function, *args, **options):
        rows.append((name, lambda folder: function(bench, folder, *args, **options)))

    if part == "main":
        add("ZS", wiki_row, "ZS", 0, ADAPTER_RATE)
        for seed in SEEDS:
            add(f"ScaleOT-{seed}", wiki_row, "ScaleOT", seed, ADAPTER_RATE)
            add(f"direct-{seed}", wiki_row, "Adapter tuned directly", seed, ADAPTER_RATE)
            add(f"uniform-{seed}", uniform_row, seed)
            add(f"FT-{FT_RATE}-{seed}", wiki_row, "FT", seed, FT_RATE)
        for rate in FT_RATES:
            if rate != FT_RATE:
                add(f"FT-{rate}-0", wiki_row, "FT", 0, rate)
    elif part == "arc":
        add("ZS", arc_row, "ZS", 0, ADAPTER_RATE)
        for seed in SEEDS:
            add(f"ScaleOT-{seed}", arc_row, "ScaleOT", seed, 2e-4)
            add(f"direct-{seed}", arc_row, "Adapter tuned directly", seed, 2e-4)
            add(f"FT-{seed}", arc_row, "FT", seed, 5e-5)
            add(f"uniform-{seed}", arc_row, "uniform", seed, 2e-4)
    elif part == "grid":
        for alpha, beta in GRID:
            config = replace(DEFAULT, alpha=alpha, beta=beta, reading="removed")
            add(f"{alpha}-{beta}", wiki_row, "ScaleOT", 0, ADAPTER_RATE, config, 25, 16)
    elif part == "frontier":
        for alpha, kept in FRONTIER:
            for seed in SEEDS if (alpha, kept) == (0.2, 1.0) else SEEDS[:1]:
                add(f"{alpha}-{kept}-{seed}", frontier_row, seed, alpha, kept)
    elif part == "ranking":
        for name, changes in RANKINGS.items():
            add(name, ranking_row, name, changes)
    elif part == "cost":
        add("cost", cost_row)
    return rows


def frontier_row(bench, folder, seed, alpha, kept):
    """The protocol for one triplet, as in the main part."""
    config = replace(DEFAULT, alpha=alpha, beta=kept)
    row = wiki_row(bench, folder, "ScaleOT", seed, ADAPTER_RATE, config)
    kinds = row["facts"].pop("layers")
    return row | {"replaced": [i for i, kind in enumerate(kinds) if kind == "HarmonizerLayer"]}


def uniform_row(bench, folder, seed):
    """Uniform LayerDrop of as many layers, nothing compressed."""
    source = bench.data / "wikitext2_valid.txt"
    test = bench.test_windows(64)
    before, after, plugged, facts = tuned(
        bench, folder, UNIFORM, source, bench.training(ADAPTER_RATE, seed), "study-drop"
    )
    scores = [perplexity(m, test).nats_per_token for m in (before, after, plugged)]
    names = ("Uniform ZS", "Uniform FT", "Uniform plug-in")
    return dict(zip(names, scores, strict=True)) | {"facts": facts}


PAPER = {
    "steps": 30,
    "candidates": 3,
    "objective": "lm",
    "practice": "half",
    "initial_scores": "zero",
}
RANKINGS = {
    "regression, no learning": {"steps": 0},
    "regression, greedy, distilled": {},
    "single damage, no learning": {"steps": 0, "initial_scores": "measured"},
    "regression, dynamic, scale-free reward": PAPER,
    "regression, dynamic, paper's reward": PAPER | {"reward": "paper"},
    "no warm start, dynamic, scale-free reward": PAPER | {"warm_start": "none"},
    "LayerDrop, dynamic, scale-free reward": PAPER | {"stand_in": "identity"},
}


def ranking_row(bench, folder, name, changes):
    """How scores rank the layers, and the emulator of the default alpha that they lead to."""
    if bench.smoke and "steps" in changes:
        changes = changes | {"steps": min(changes["steps"], 2)}
    slug = "study" if not changes else "study-" + "".join(c for c in name if c.isalpha())[:40]
    options = {"calibration_tokens": 20_480} if changes and not bench.smoke else {}
    found = open_study(bench.study(slug, **changes, **options))
    reference = open_study(bench.study()).damage_M
    middle = slice(1, -1)  # layers that an emulator with N_a = 2 can replace
    made = emulate(
        found, folder / "emulator",
        EmulatorConfig(beta=0.0, reading="removed", weighted=False),
    )  # fmt: skip
    nats = perplexity(
        open_emulator(folder / "emulator").model, bench.test_windows(32)
    ).nats_per_token
    return {
        "spearman_with_single_damage": spearman(found.scores_M[middle], reference[middle]),
        "emulator_nats": nats,
        "emulator_layers": len(made.layers),
        "study_seconds": found.seconds,
        "study_tokens": found.tokens,
    }


def spearman(a, b):
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def cost_row(bench, folder):
    """Forward, study, emulate and tuning costs side by side; rates as ratios of one run."""
    from blindtune.offsite.model_owner.calibration import calibrate

    facts = {"threads": torch.get_num_threads()}
    model = load_model(MODEL).requires_grad_(False)
    decoder, windows = Decoder(model), bench.test_windows(160)
    seconds = {"forward": [], "regression": []}
    for _ in range(3):
        with torch.no_grad():
            start = time.perf_counter()
            for batch in windows.split(8):
                model(batch)
            seconds["forward"].append(time.perf_counter() - start)
            start = time.perf_counter()
            calibrate(decoder, windows, range(1, decoder.layer_count - 1), rank=64)
            seconds["regression"].append(time.perf_counter() - start)
    ratios = [r / f for r, f in zip(seconds["regression"], seconds["forward"], strict=True)]
    facts |= {"seconds": seconds, "regression_over_forward": sorted(ratios)[1]}
    facts["matmul_gflops"] = matmul_rate()
    forward_flops = 2 * windows.numel() * model.num_parameters()
    floor = forward_flops / facts["matmul_gflops"] / 1e9
    facts["forward_over_floor"] = sorted(seconds["forward"])[1] / floor
    kinds = ("full fine-tuning", "emulator, full adapter", "emulator, LoRA")
    facts["tuning"] = {
        kind: tuning_rate(bench, folder / kind[-4:], kind, 2 if bench.smoke else 8)
        for kind in kinds
    }
    return facts


def tuning_rate(bench, folder, kind, steps):
    """Tokens a second and peak memory of tuning, each in a process of its own."""
    import subprocess

    emulator = bench.work / "cost-emulator"
    if not emulator.exists():
        emulate(bench.study(), emulator, DEFAULT)
    program = [
        sys.executable, __file__, "--data", str(bench.data), "--work", str(bench.work),
        "--rate", kind, str(folder), str(steps),
    ]  # fmt: skip
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_rate(bench, kind, folder, steps):
    source = bench.data / "wikitext2_valid.txt"
    training = TrainingConfig(
        max_steps=int(steps), learning_rate=1e-4, per_device_train_batch_size=4, seed=0
    )
    if kind == "full fine-tuning":
        _, facts = tuned_directly(bench, Path(folder), source, training, everything=True)
        result = facts["tuning"]
    else:
        lora = AdapterConfig(lora_rank=4 if "LoRA" in kind else 0)
        reading = DataConfig(max_length=LENGTH, validation_split=0.0)
        done = tune(
            bench.work / "cost-emulator", source, Path(folder) / "adapter", lora, training,
            reading=reading, run=QUIET,
        )  # fmt: skip
        result = facts_of(done.training)
    print(json.dumps(result | {"tokens_per_second": result["tokens"] / result["seconds"]}))


def matmul_rate():
    """GFLOP/s of a float32 product of the model's own shapes at the current thread count."""
    a, b = torch.randn(1024, 576), torch.randn(576, 1536)
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * 1024 * 576 * 1536 / (time.perf_counter() - start) / 1e9)
    return best


def main():
    options = parse_options(__doc__, PARTS, rate=True)
    bench = Bench(options.data, options.work, options.smoke)
    if options.rate:
        print_rate(bench, *options.rate)
        return
    facts = {
        "default": asdict(DEFAULT),
        "rates": {"adapter": ADAPTER_RATE, "FT": FT_RATE, "FT grid": FT_RATES},
    }
    run_parts("offsite", options, lambda part: plan(bench, part), facts=facts)


if __name__ == "__main__":
    main()
