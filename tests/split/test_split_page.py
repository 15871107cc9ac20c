"""The Python examples of docs/split.md run."""

import re
from pathlib import Path

import torch
from split_world import LABELS, TEXTS

from blindtune.exchange.wire.messages import unpack
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.remote import RemoteTrunk
from blindtune.split.customer.requests import new_token, open_job
from blindtune.split.partition import Cut, run_top, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor
from tiny_models import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "split.md").read_text()
WHOLE, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("smollm2").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    names = {"texts": TEXTS, "labels": LABELS, "new_texts": ["a new film"]}
    names["connect"] = lambda: InProcessTransport(names["vendor"].session("anna").__enter__())
    assert "smollm2-135m" in WHOLE
    exec(WHOLE.replace("smollm2-135m", "model"), names)
    assert len(names["losses"]) == 3
    assert names["logits"].shape == (1, 2)

    cut = Cut(partition="u-shape", layers=8, cut=6)
    model = tiny_model("smollm2")
    identity = write_bottom(model, tiny_tokenizer(), "u", cut)
    vendor = Vendor(stack_of(model), cut, identity, "u-state")
    bottom = open_bottom("u")
    job = open_job(
        lambda: InProcessTransport(vendor.session("anna").__enter__()), bottom, new_token(),
        TuningConfig(), task="hidden",
    )  # fmt: skip
    hidden, mask = unpack(torch.randn(5, 32), (3, 2))
    calls = bottom.stack.begin(torch.ones(2, 3, dtype=torch.int64), mask).calls
    trunk = RemoteTrunk(job)
    exec(
        LOOP,
        {
            "RemoteTrunk": lambda _job: trunk, "job": job, "run_top": run_top, "bottom": bottom,
            "hidden_BLD": hidden, "mask_BL": mask, "calls": calls,
            "loss_of": lambda features: features.square().mean(),
        },
    )  # fmt: skip
    assert trunk.applied == 3
    job.close()
