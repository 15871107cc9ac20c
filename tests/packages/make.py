"""Make the tiny packages of a format version that every later release must open.

    python tests/packages/make.py v1      # into tests/packages/v1, which must not exist

A package that was released is never made again: the directory of an old version stays as it is. The
private key that signed the packages is thrown away; `signer.key` is the public one. `reader.key`, a
private key locked by `PASSPHRASE`, opens `adapter.sealed`; nothing else was ever sealed for it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers import AutoModelForCausalLM, PreTrainedModel

from blindtune.exchange.packages.keys import new_private_key
from blindtune.exchange.packages.sealing import seal
from blindtune.exchange.packages.signing import Signer
from blindtune.offsite.adapter import AdapterConfig, tuned_emulator
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.emulator import open_emulator
from blindtune.offsite.model_owner.emulation import emulate
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.studying import study
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.partition import Cut, run_bottom
from blindtune.training.config import TrainingConfig
from offsite_world import READING, SILENT, STUDY, TRIPLET, save_text
from tiny_models import tiny_config, tiny_tokenizer

PLACE = Path(__file__).parent
PASSPHRASE = "a word for a test"
IDS = torch.tensor([[5, 40, 77, 30, 9, 61, 12, 99, 3, 50]])


def smallest_model() -> PreTrainedModel:
    """Five layers of width 8."""
    config = tiny_config("llama")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 5, 8, 12
    config.head_dim, config.max_position_embeddings = 4, 64
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@torch.no_grad()
def figures(place: Path) -> dict[str, float]:
    """What the packages compute: losses on fixed tokens, and the size of a bottom's output."""

    def loss(model: PreTrainedModel) -> float:
        return float(model(input_ids=IDS, labels=IDS).loss)

    found = {"emulator": loss(open_emulator(place / "emulator").model)}
    for name in ("adapter", "lora"):
        emulator = tuned_emulator(open_emulator(place / "emulator"), place / name)
        found[name] = loss(emulator.model)
    bottom = open_bottom(place / "bottom")
    inputs = bottom.stack.begin(IDS, torch.ones_like(IDS))
    found["bottom"] = float(run_bottom(bottom.stack, bottom.cut, inputs).norm())
    return found


def seal_for_reader(out: Path) -> None:
    """An adapter that only a reader with a passphrase opens, and that reader's key."""
    reader = new_private_key()
    (out / "reader.key").write_bytes(reader.encode(PASSPHRASE))
    seal(out / "adapter", out / "adapter.sealed", [reader.public])


def main(version: str) -> None:
    """Play both parties on the smallest model, and keep what crossed."""
    out = PLACE / version
    out.mkdir()
    signer = Signer(key=new_private_key())
    (out / "signer.key").write_bytes(signer.key.public.encode())
    model = smallest_model()
    write_bottom(
        model,
        tiny_tokenizer(),
        out / "bottom",
        Cut(partition="two-part", layers=5, cut=1),
        max_length=32,
        signer=signer,
    )
    with tempfile.TemporaryDirectory() as folder:
        private = Path(folder)
        model.save_pretrained(private / "model")
        tiny_tokenizer().save_pretrained(private / "model")
        save_text(private)
        few = replace(STUDY, harmonizer_rank=2)
        dynamic = DynamicConfig(steps=1, batch_size=2)
        made = study(private / "model", private / "public.txt", private / "study", few, dynamic)
        emulate(made, out / "emulator", TRIPLET, signer=signer)
        for name, rank in (("adapter", 0), ("lora", 2)):
            tune(
                out / "emulator",
                private / "private.txt",
                out / name,
                AdapterConfig(lora_rank=rank),
                TrainingConfig(max_steps=2, learning_rate=1e-2),
                reading=READING,
                run=SILENT,
                signer=signer,
            )
    seal_for_reader(out)
    (out / "figures.json").write_text(json.dumps(figures(out), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
