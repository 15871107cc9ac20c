"""The bottom package: what is in it, what is not, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from blindtune.errors import (
    ConfigError,
    MismatchError,
    OutputError,
    PackageError,
    UnsupportedModelError,
)
from blindtune.evaluation.inspection import inspect
from blindtune.exchange.packages.package import open_package
from blindtune.models.fingerprint import fingerprint
from blindtune.split import bottom as bottom_module
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.inspected_bottom import InspectedBottom
from blindtune.split.partition import Cut, lm_logits, run_bottom, run_top, run_vendor, stack_of
from forged_tokenizers import around, forge_tokenizer
from tiny_encoders import ENCODER_NAMES, tiny_encoder
from tiny_models import FAMILY_NAMES, tiny_config, tiny_model, tiny_tokenizer


def build(name):
    return tiny_encoder(name) if name in ENCODER_NAMES else tiny_model(name)


def two_part(stack, cut):
    return Cut(layers=stack.layer_count, cut=cut)


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *ENCODER_NAMES])
def test_the_customers_part_computes_the_whole_models_numbers(name, tmp_path):
    model = build(name)
    stack = stack_of(model)
    count = stack.layer_count
    ids = torch.randint(4, 128, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    for i, cut in enumerate(
        [
            Cut(layers=count, cut=0),
            Cut(layers=count, cut=2),
            Cut(partition="u-shape", layers=count, cut=0),
            Cut(partition="u-shape", layers=count, cut=1, last=1),
        ]
    ):
        identity = write_bottom(model, tiny_tokenizer(), tmp_path / str(i), cut)
        bottom = open_bottom(tmp_path / str(i))
        assert (bottom.id, bottom.cut) == (identity, cut)
        with torch.no_grad():
            mine, whole = bottom.stack.begin(ids, mask), stack.begin(ids, mask)
            sent = run_bottom(bottom.stack, cut, mine)
            assert torch.equal(sent, run_bottom(stack, cut, whole))
            if cut.partition == "u-shape":
                trunk = run_vendor(stack, cut, sent, mask)
                features = run_top(bottom.stack, cut, trunk, mine.calls)
                assert torch.equal(features, run_top(stack, cut, trunk, whole.calls))
                if name in FAMILY_NAMES:
                    expected = model(input_ids=ids, attention_mask=mask).logits
                    kept = mask.bool()
                    ours = lm_logits(bottom.stack, features)
                    torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-4, atol=1e-4)


def test_a_two_part_package_holds_nothing_of_the_vendors(tmp_path):
    model = tiny_model("llama")
    write_bottom(model, tiny_tokenizer(), tmp_path / "b", two_part(stack_of(model), 2))
    names = set(open_package(tmp_path / "b", "bottom").header)
    assert {n.split(".")[2] for n in names if "layers" in n} == {"0", "1"}
    assert {n for n in names if "layers" not in n} == {"model.embed_tokens.weight"}
    assert not any(p.requires_grad for p in open_bottom(tmp_path / "b").stack.model.parameters())
    assert open_bottom(tmp_path / "b").tokenizer("ab")["input_ids"]


def test_a_package_in_half_precision_is_built_in_what_it_is_opened_in(tmp_path):
    model = build("gemma3")
    cut = Cut(partition="two-part", layers=stack_of(model).layer_count, cut=1)
    write_bottom(model, tiny_tokenizer(), tmp_path / "b", cut, dtype="bfloat16")
    opened = open_bottom(tmp_path / "b", dtype=torch.float32).stack.model
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    theirs = dict(model.named_buffers())
    scales = {n: b for n, b in opened.named_buffers() if n.endswith("embed_scale")}
    assert scales
    for name, scale in scales.items():
        torch.testing.assert_close(scale, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("shape", [("two-part", 0, 0), ("two-part", 2, 0), ("u-shape", 1, 1)])
def test_what_inspecting_tells(tmp_path, name, shape):
    model = build(name)
    partition, cut, last = shape
    count = stack_of(model).layer_count
    split = Cut(partition=partition, layers=count, cut=cut, last=last)
    identity = write_bottom(model, tiny_tokenizer(), tmp_path / "b", split, max_length=64)
    found = inspect(tmp_path / "b")
    assert isinstance(found, InspectedBottom)
    assert (found.id, found.model) == (f"sha256:{identity}", fingerprint(model))
    assert (found.partition, found.cut, found.last, found.layers) == (*shape, count)
    opened = open_bottom(tmp_path / "b").stack.model
    assert found.parameters == sum(p.numel() for p in opened.parameters())
    assert (found.max_length, found.signature) == (64, None)
    told = " ".join(found.reveals)
    where = "between" if last else "above"
    assert f"nothing of the {count - cut - last} layers {where}" in told
    assert ("the first 2 layers" in told) == (cut == 2)
    assert ("the last 1 layers" in told) == bool(last)


def test_inspecting_refuses_what_cannot_be_opened(package):
    def wider(plain):
        plain["config"]["hidden_size"] = 64

    edit(package, wider)
    with pytest.raises(MismatchError):
        inspect(package)


@pytest.fixture
def package(tmp_path):
    model = tiny_model("qwen2")
    write_bottom(model, tiny_tokenizer(), tmp_path / "b", two_part(stack_of(model), 2))
    return tmp_path / "b"


def edit(package, change):
    """Forge a manifest: hashes agree."""
    plain = json.loads((package / "manifest.json").read_bytes())
    change(plain)
    data = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    (package / "manifest.json").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (package / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda p: p["config"].update(trust_me=1), PackageError),
        (lambda p: p["config"].update(auto_map={}), PackageError),
        (lambda p: p["config"].update(num_hidden_layers=200_000), PackageError),
        (lambda p: p["config"].update(hidden_size=1 << 40), PackageError),
        (lambda p: p["config"].update(intermediate_size=96), MismatchError),
        (lambda p: p["config"].update(max_position_embeddings=-5), PackageError),
        (lambda p: p["config"].update(output_hidden_states=True), PackageError),
        (lambda p: p["config"].update(pad_token_id=1 << 20), PackageError),
        (lambda p: p["config"].update(dtype="float16"), PackageError),
        (lambda p: p["config"].update(vocab_size=1 << 30), MismatchError),
        (lambda p: p.update(model_type="starling"), UnsupportedModelError),
        (lambda p: p.update(cut=1), PackageError),
        (lambda p: p.update(cut=8), PackageError),
        (lambda p: p.update(last=1), PackageError),
        (lambda p: p.update(partition="u-shape"), MismatchError),
        (lambda p: p.update(partition="three"), PackageError),
        (lambda p: p.update(version=2), PackageError),
        (lambda p: p.update(format="blindtune-emulator"), PackageError),
        (lambda p: p.update(secret=1), PackageError),
        (lambda p: p.pop("last"), PackageError),
    ],
)  # fmt: skip
def test_forged_packages_are_refused(package, change, error):
    edit(package, change)
    with pytest.raises(error):
        open_bottom(package)


def test_many_layers_without_weights_are_refused_before_they_are_built(package, monkeypatch):
    edit(package, lambda p: (p.update(cut=4000, layers=4095), p["config"].update(
        num_hidden_layers=4095, layer_types=["full_attention"] * 4095)))  # fmt: skip
    monkeypatch.setattr(bottom_module, "_built", None)
    with pytest.raises(PackageError, match="expected weights in each of 4000 layers"):
        open_bottom(package)


def test_positions_that_are_counted_from_no_padding_are_refused(tmp_path):
    model = tiny_encoder("roberta")
    write_bottom(model, tiny_tokenizer(), tmp_path / "b", two_part(stack_of(model), 1))
    edit(tmp_path / "b", lambda p: p["config"].update(pad_token_id=None))
    with pytest.raises(PackageError, match="no pad_token_id"):
        open_bottom(tmp_path / "b")


def test_altered_weights_and_other_kinds_are_refused(package):
    with pytest.raises(MismatchError, match="expected an emulator"):
        open_package(package, "emulator")
    weights = package / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PackageError, match="altered"):
        open_bottom(package)


def test_the_released_bottom_opens_as_a_model():
    bottom = open_bottom(Path(__file__).parent.parent / "exchange/released/v1-bottom")
    assert bottom.cut == Cut(partition="u-shape", layers=5, cut=1, last=1)
    assert (bottom.stack.layer_count, bottom.hidden_size, bottom.max_length) == (2, 8, 16)


def test_a_cut_of_another_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="8 layers"):
        write_bottom(tiny_model("llama"), tiny_tokenizer(), tmp_path / "b", Cut(layers=9, cut=2))


def test_layers_that_know_their_index_stay_where_they_are(tmp_path):
    config = tiny_config("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match="last=0"):
        write_bottom(
            model, tiny_tokenizer(), tmp_path / "b",
            Cut(partition="u-shape", layers=8, cut=1, last=1),
        )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [lambda t: t["model"]["vocab"].update(q=128), around([("<s>", 128)], [])],
    ids=["word", "around a text"],
)
def test_ids_without_a_row_of_the_embedding_are_refused(package, tmp_path, change):
    forged = forge_tokenizer(package, tmp_path / "forged", change)
    for look in (open_bottom, inspect):
        with pytest.raises(PackageError, match="ids up to 128, the embedding has 128 rows"):
            look(forged)


def test_a_tokenizer_without_rows_for_its_ids_is_not_written(tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    tokenizer.add_tokens([f"<{i}>" for i in range(29)])
    with pytest.raises(OutputError, match="129 tokens"):
        write_bottom(model, tokenizer, tmp_path / "b", two_part(stack_of(model), 2))
    assert not (tmp_path / "b").exists()
