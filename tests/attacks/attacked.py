"""Texts, a customer's bottom, and what its vendor sees, for the tests of attacks."""

import random
import warnings

import torch

from blindtune.attacks.adversary import StatesView
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.partition import Cut, stack_of
from tiny_encoders import ENCODER_NAMES, tiny_encoder
from tiny_models import tiny_model, tiny_tokenizer

NOUNS = ("film", "story", "actor", "ending", "plot", "scene", "music", "joke")
TRAITS = ("good", "bad", "dull", "fine", "slow", "great", "odd", "sad")


def sentences(count, seed):
    """Short sentences of few words: a language that a small attacker can learn."""
    draw = random.Random(seed)
    return [
        f"the {draw.choice(NOUNS)} is {draw.choice(TRAITS)}, the {draw.choice(NOUNS)} "
        f"{draw.choice(TRAITS)}"
        for _ in range(count)
    ]


def open_tiny_bottom(folder, name="bert", cut=0):
    """A bottom package of a tiny model, opened."""
    model = tiny_encoder(name) if name in ENCODER_NAMES else tiny_model(name)
    layers = stack_of(model).layer_count
    write_bottom(model, tiny_tokenizer(), folder / f"{name}-{cut}", Cut(layers=layers, cut=cut))
    return open_bottom(folder / f"{name}-{cut}")


def observe(bottom, mechanism=None, texts=None, public=0, seed=1):
    """The customer privatizes texts; what the vendor sees of them, and the truth."""
    texts = sentences(12, seed=1) if texts is None else texts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private = privatize(bottom, texts, mechanism=mechanism, testing_seed=seed)
    known = privatize(bottom, sentences(public, seed=2), mechanism=None).ids if public else ()
    view = StatesView(
        model=bottom.stack,
        cut=bottom.cut.cut,
        states=private.states,
        mechanism=mechanism,
        margins=bottom.margins,
        public=tuple(known),
    )
    return view, private


def share_right(guess, truth):
    """Share of all tokens that a guess has right."""
    return float((torch.cat(guess) == torch.cat(truth)).float().mean())
