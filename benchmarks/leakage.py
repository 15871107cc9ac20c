"""What an adapter tells of its records, with and without differential privacy, on SmolLM2-135M.

    python benchmarks/leakage.py --data DIR --work DIR [--smoke] [PART ...]

Part arc: the adapter of the default emulator is tuned on 900 ARC-Easy questions with their
answers, one record each, with canaries planted among them. Scored are the loss on test texts
(emulator and plug-in), membership inference against 300 questions that were left out, on the
emulator (the data owner's audit) and on the full model (its owner's own attack), and the exposure
of the canaries. A seed draws the questions that are trained on and those that are left out, the
canaries, and the order of training. Rows are kept and resumed as in `offsite.py` (`rows.py`);
results go to benchmarks/results/leakage-PART.json. `--smoke` does the same on little of everything.
"""

import json
import random
from dataclasses import asdict, replace

import torch

from blindtune.attacks.membership import AdapterView, loss_drops, tuned_losses
from blindtune.evaluation.audits.canaries import canary_leakage
from blindtune.evaluation.leakage.membership import membership_leakage
from blindtune.evaluation.utility.choices import read_items
from blindtune.evaluation.utility.evaluating import open_any
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.emulator import open_emulator
from blindtune.offsite.model_owner.emulation import emulate
from blindtune.offsite.model_owner.plugin import plug_in
from blindtune.training.canaries import CanaryConfig, plant, read_canaries
from blindtune.training.config import TrainingConfig
from blindtune.training.dp_plan import DpConfig
from blindtune.training.text import DataConfig, load_dataset_file
from offsite import ADAPTER_RATE, DEFAULT, MODEL, QUIET, SEEDS, Bench, claimed, facts_of
from rows import parse_options, run_parts

PARTS = ("arc",)
READING = DataConfig(max_length=48, pack=False, validation_split=0.0)
CANARIES = CanaryConfig(each=3, candidates=128)
MEMBERS, OTHERS, TEST = 900, 300, 150
RANK = 8
BATCH, DP_BATCH = 8, 64
# name -> (LoRA rank or 0 for all weights, epsilon or None, passes over the data, learning rate)
TUNED = {
    "full": (0, None, 3, ADAPTER_RATE),
    "LoRA, epsilon 8": (RANK, 8.0, 3, 1e-3),
    "LoRA": (RANK, None, 3, 1e-3),
    "LoRA, epsilon 1": (RANK, 1.0, 3, 1e-3),
    "full, one pass": (0, None, 1, ADAPTER_RATE),
    "full, epsilon 8": (0, 8.0, 3, 1e-4),
}


class Leakage(Bench):
    """The bench of `offsite.py`, and texts that were trained on, left out, or are scored."""

    def emulator(self):
        """The default emulator, made once."""
        target = self.work / "emulators" / "ours"
        target.parent.mkdir(parents=True, exist_ok=True)
        with claimed(target) as mine:
            if mine:
                emulate(self.study(), target, DEFAULT)
        return target

    def texts(self, folder, seed=0):
        """Files of the planted members, the canaries, and datasets of others and test texts."""
        texts = questions(self.data / "arc_easy_train.jsonl")
        random.Random(seed).shuffle(texts)
        members = self.amount(MEMBERS)
        kinds = {
            "members": texts[:members],
            "others": texts[members : members + self.amount(OTHERS)],
            "test": questions(self.data / "arc_easy_test.jsonl")[: self.amount(TEST)],
        }
        for name, kept in kinds.items():
            lines = (json.dumps({"text": text}) + "\n" for text in kept)
            (folder / f"{name}.jsonl").write_text("".join(lines))
        config = CanaryConfig(repeats=(0, 1), each=1, candidates=8) if self.smoke else CANARIES
        config = replace(config, seed=seed)
        planted = plant(folder / "members.jsonl", folder / "planted", config)
        tokenizer = load_tokenizer(MODEL)
        read = {name: load_dataset_file(folder / f"{name}.jsonl", tokenizer, READING)
                for name in kinds}  # fmt: skip
        return planted, read


def questions(path):
    """Every question with its right answer."""
    return [f"{item.question} {item.choices[item.label]}" for item in read_items(path)]


def view(tuned, untuned, texts):
    records = tuple(texts[i] for i in range(len(texts)))
    return AdapterView(tuned=tuned, untuned=untuned, records=records, batch_size=16)


def loss(model, texts):
    """Mean over the texts of nats a token."""
    return -float(tuned_losses(view(model, model, texts)).mean())


def membership(tuned, untuned, read):
    """The calibrated attack on as many members as there are others."""
    others = read["others"]
    members = [read["members"][i] for i in range(min(len(others), len(read["members"])))]
    scores = (loss_drops(view(tuned, untuned, texts)) for texts in (members, others))
    return asdict(membership_leakage(*scores))


def untuned_row(bench, folder):
    """The loss before any tuning."""
    _, read = bench.texts(folder)
    emulator = open_emulator(bench.emulator(), dtype=torch.float32).model
    return {
        "Emulator": loss(emulator, read["test"]),
        "Plug-in": loss(load_model(MODEL), read["test"]),
    }


def tuned_row(bench, folder, name, seed):
    """One tuning, its utility, and what it leaks."""
    rank, epsilon, passes, rate = TUNED[name]
    planted, read = bench.texts(folder, seed)
    private = epsilon is not None
    training = TrainingConfig(
        num_train_epochs=passes,
        max_steps=2 if bench.smoke else None,
        learning_rate=rate,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1 if bench.smoke or not private else DP_BATCH // BATCH,
        seed=seed,
    )
    done = tune(
        bench.emulator(), planted.data, folder / "adapter", AdapterConfig(lora_rank=rank),
        training, DpConfig(epsilon=epsilon), reading=READING,
        run=replace(QUIET, logging_steps=1),  # a private run takes no other
    )  # fmt: skip
    plugged = plug_in(MODEL, folder / "adapter", None).model
    untuned = open_emulator(bench.emulator(), dtype=torch.float32).model
    tuned = open_any(bench.emulator(), folder / "adapter")[0]
    codes = canary_leakage(
        tuned, untuned, load_tokenizer(MODEL), read_canaries(planted.canaries), READING
    )
    return {
        "Emulator": loss(tuned, read["test"]),
        "Plug-in": loss(plugged, read["test"]),
        "membership, emulator": membership(tuned, untuned, read),
        "membership, full model": membership(plugged, load_model(MODEL), read),
        "canaries": {
            leak.repeats: {"bits": leak.bits, "most_bits": leak.most_bits,
                           "p_value": leak.p_value, "ranks": [e.rank for e in leak.exposures]}
            for leak in codes
        },
        "privacy": None if done.privacy is None else asdict(done.privacy),
        "tuning": facts_of(done.training) | {"rate": rate, "trained": done.trained_parameters},
    }  # fmt: skip


def plan(bench, part):
    """The rows of a part, most wanted first: (name, function)."""
    assert part == "arc", part
    return [
        ("untuned", lambda folder: untuned_row(bench, folder)),
        *(
            (f"{name}-{seed}", lambda folder, row=(name, seed): tuned_row(bench, folder, *row))
            for seed in SEEDS
            for name in TUNED
        ),
    ]


def main():
    options = parse_options(__doc__, PARTS)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Leakage(options.data, options.work, options.smoke)
    facts = {
        "members": MEMBERS,
        "others": OTHERS,
        "test": TEST,
        "batch": BATCH,
        "expected_batch": DP_BATCH,
        "canaries": asdict(CANARIES),
    }
    run_parts("leakage", options, lambda part: plan(bench, part), facts=facts)


if __name__ == "__main__":
    main()
