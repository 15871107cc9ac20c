"""Does depth alone protect? States without noise, by cut, under a kind attack and a trained one.

    python benchmarks/depth.py --data DIR --work DIR [--smoke] [minilm|mpnet ...]

Test sentences of SST-2 go through the bottom without noise. The nearest-neighbour attack looks for
the closest word; the trained inverter has learned on public text of another kind (speeches and
encyclopaedia) behind the same bottom. `mpnet` needs the packages that `mpnet.py` names. Rows are
kept as `rows.py` says.
"""

import json

import torch

from blindtune.attacks.adversary import StatesView
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.fitting import FitConfig
from blindtune.attacks.trained_inversion import InverterConfig, candidates, train_inverter
from blindtune.evaluation.leakage.empirical_privacy import empirical_privacy
from blindtune.models.encoders import load_any
from blindtune.models.margins import margins_of
from blindtune.split.partition import stack_of
from mpnet import mpnet_directory
from rows import parse_options, run_rows

LENGTH, TEXTS = 64, 200
PUBLIC = {"minilm": 1000, "mpnet": 700}  # texts
CUTS = {"minilm": (0, 2, 4, 5, 6), "mpnet": (0, 4, 6, 8, 10, 12)}


class Bench:
    """The model, the private sentences, and the adversary's own text."""

    def __init__(self, options, name):
        source = mpnet_directory(options.work) if name == "mpnet" else name
        model, self.tokenizer = load_any(source)
        self.stack = stack_of(model)
        few = 20 if options.smoke else 1
        rows = (options.data / "sst2_dev.jsonl").read_text().splitlines()
        self.private = self.ids([json.loads(row)["text"] for row in rows[: TEXTS // few]])
        self.public = self.ids(public_sentences(options.data)[: PUBLIC[name] // few])
        self.limit_seconds = 20.0 if options.smoke else 600.0

    def ids(self, texts):
        found = self.tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        return tuple(torch.tensor(ids) for ids in found)

    @torch.no_grad()
    def view(self, cut):
        """What the vendor sees, and its own text."""
        states = []
        for ids in self.private:
            inputs = self.stack.begin(ids[None], torch.ones_like(ids)[None])
            states.append(self.stack.run_layers(inputs.hidden_BLD, inputs.calls, 0, cut)[0])
        return StatesView(
            model=self.stack, cut=cut, states=tuple(states), public=self.public,
            margins=margins_of(self.tokenizer),
        )  # fmt: skip


def public_sentences(data):
    """Lines of WikiText and paragraphs of speeches, cut to at most 40 words, mixed."""
    lines = (data / "wikitext2_valid.txt").read_text().replace("<unk>", "").splitlines()
    lines = [line for line in lines if len(line.split()) > 10]
    rows = (data / "state_union.jsonl").read_text().splitlines()
    speeches = [json.loads(row)["text"] for row in rows]
    pairs = zip(lines, speeches, strict=False)
    return [" ".join(text.split()[:40]) for pair in pairs for text in pair]


def row(bench, cut):
    """EP of both attacks on the same states."""
    view = bench.view(cut)
    config = InverterConfig(fit=FitConfig(limit_seconds=bench.limit_seconds))
    inverter, fitted = train_inverter(view, config)
    guesses = {
        "nearest neighbour": nearest_tokens(view),
        "trained inverter": candidates(inverter, view.states).first(),
    }
    found = {}
    for name, guess in guesses.items():
        leak = empirical_privacy(guess, bench.private, margins=view.margins)
        found[name] = {
            "EP": leak.content.value, "low": leak.content.low, "high": leak.content.high,
            "whole texts read": 1 - leak.whole_texts.value,
        }  # fmt: skip
    return {"attacks": found, "epochs": fitted.epochs, "settled": fitted.settled}


def main():
    options = parse_options(__doc__, tuple(CUTS))
    for name in options.parts:
        bench = Bench(options, name)
        rows = [
            (f"cut-{cut}", lambda _folder, bench=bench, cut=cut: row(bench, cut))
            for cut in CUTS[name]
        ]
        facts = {"private texts": len(bench.private), "public texts": len(bench.public)}
        run_rows(
            "depth", name, rows, work=options.work, facts=facts, only=options.only,
            fresh=options.fresh, smoke=options.smoke,
        )  # fmt: skip


if __name__ == "__main__":
    main()
