"""Packages whose hashes are right and whose content is hostile: refused, cheaply, by name."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from blindtune.errors import OutputError, PackageError, UnsupportedModelError
from blindtune.evaluation.inspection import inspect
from blindtune.evaluation.utility.estimate import shape_of
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.writing import write_package
from blindtune.models import configs
from blindtune.models.configs import check_buffers, config_values
from blindtune.models.loading import load_model
from blindtune.models.surgery import meta_model
from blindtune.models.tokenizers import (
    FILE_NAMES,
    SETTINGS_NAME,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    tokenizer_files,
    tokenizer_from_files,
)
from blindtune.offsite.data_owner.tuning_estimate import estimate_tune
from blindtune.offsite.emulator import open_emulator, package_sketch, read_config, write_emulator
from blindtune.offsite.model_owner.plugin import merge, plug_in
from tiny_models import FAMILY_NAMES, tiny_config, tiny_tokenizer

Q_PROJ = "self_attn.q_proj"


def forged_adapter(world, out, name, tensors):
    """A copy of the adapter package `name`, with some of its tensors replaced."""
    package = open_package(world.path / name, "adapter")
    own = package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})
    assert set(tensors) <= set(own)
    write_package(out, package.manifest, own | tensors, {})
    return open_package(out, "adapter")


def huge_factors(world, value=1e30):
    package = open_package(world.path / "lora", "adapter")
    return {
        n: torch.full(f.shape, value)
        for n, f in package.header.items()
        if n.startswith(f"layers.7.{Q_PROJ}")
    }


def huge_weight(value=1e38):
    return {f"layers.7.{Q_PROJ}.weight": torch.full((32, 32), value)}


def test_factors_with_an_infinite_product_leave_the_model_unchanged(world, tmp_path):
    package = forged_adapter(world, tmp_path / "odd", "lora", huge_factors(world))
    model = load_model(world.path / "model")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PackageError, match=rf"float32.* layer 7, {Q_PROJ}.weight"):
        merge(model, package)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(PackageError, match="layer 7"):
        plug_in(world.path / "model", tmp_path / "odd", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_weights_too_large_for_the_written_dtype_are_refused(world, tmp_path, dry):
    forged_adapter(world, tmp_path / "odd", "adapter", huge_weight())
    out = None if dry else tmp_path / "tuned"
    with pytest.raises(PackageError, match=rf"float16.* layer 7, {Q_PROJ}.weight"):
        plug_in(world.path / "model", tmp_path / "odd", out, dtype="float16")
    assert not (tmp_path / "tuned").exists()


def test_large_finite_weights_change_by_a_finite_amount(world, tmp_path):
    forged_adapter(world, tmp_path / "odd", "adapter", huge_weight())
    change = plug_in(
        world.path / "model", tmp_path / "odd", None, accept_large_change=True
    ).relative_change
    assert 1e30 < change[7] < float("inf")


def altered(world, tmp_path, config=None, replaced=None, layers=None, tokenizer=True):
    """The world's emulator with other values in its config or other files; the hashes are right."""
    package = open_package(world.path / "emulator", "emulator")
    tensors = package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})
    files = {name: package.read_file(name) for name in FILE_NAMES if name in package.manifest.files}
    config = package.manifest.config | (config or {})
    entries = package.manifest.layers
    if layers is not None:
        more = [entries[len(entries) // 2]] * (layers - len(entries))
        entries = [*entries[:-1], *more, entries[-1]]
    facts = msgspec.structs.replace(package.manifest.full_model, layers=len(entries))
    manifest = msgspec.structs.replace(
        package.manifest, config=config, layers=entries, full_model=facts
    )
    files = files | (replaced or {}) if tokenizer else {}
    write_package(tmp_path / "odd", manifest, tensors, files)
    return tmp_path / "odd"


def test_buffers_that_only_the_config_asks_for_are_bounded():
    """Such a config is 3 kB; the buffers would be 6 GB."""
    config = tiny_config("phi")
    config.rope_parameters["partial_rotary_factor"] = 1e8
    with pytest.raises(PackageError, match=r"buffers.*6,400,000,000"):
        check_buffers(meta_model(config))
    for name in FAMILY_NAMES:
        check_buffers(meta_model(tiny_config(name)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"partial_rotary_factor": 1e8}}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "finite buffers"),
        ({"num_hidden_layers": 10**11}, "num_hidden_layers"),
        ({"num_hidden_layers": 4}, "lists 8"),
        ({"pad_token_id": 10**6}, "pad_token_id"),
        ({"eos_token_id": [2, 128]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"return_dict": False}, "return_dict"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"use_cache": False}, "use_cache"),
        ({"chunk_size_feed_forward": 1}, "chunk_size_feed_forward"),
        ({"problem_type": "regression"}, "problem_type"),
        ({"id2label": {"0": "x"}}, "id2label"),
        ({"label2id": {"x": 0}}, "label2id"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"quantization_config": {}}, "unknown keys quantization_config"),
        ({"_attn_implementation": "x/y"}, "unknown keys _attn_implementation"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"hidden_act": "no such"}, "no model can be built"),
        ({"num_key_value_heads": 0}, "no model can be built|expected a plain config"),
    ],
)
def test_hostile_configs_are_refused(world, tmp_path, config, words):
    package = altered(world, tmp_path, config)
    with pytest.raises(PackageError, match=words):
        open_emulator(package)


def test_a_runtime_key_with_its_default_is_harmless_and_never_written(world, tmp_path):
    written = open_package(world.path / "emulator", "emulator").manifest.config
    assert not {"return_dict", "use_cache", "id2label", "output_attentions"} & set(written)
    defaults = {"return_dict": True, "use_cache": True, "output_attentions": False}
    open_emulator(altered(world, tmp_path, defaults))


def test_config_classes_outside_of_the_table_are_never_looked_up(world, monkeypatch):
    package = open_package(world.path / "emulator", "emulator")
    looked_up = []
    monkeypatch.setattr(configs.AutoConfig, "for_model", looked_up.append)
    manifest = msgspec.structs.replace(
        package.manifest, model_type="mamba", config={"model_type": "mamba"}
    )
    with pytest.raises(UnsupportedModelError, match="mamba"):
        read_config(manifest)
    assert not looked_up


def test_fewer_tensors_than_layers_are_refused_before_a_model_is_built(world):
    package = open_package(world.path / "emulator", "emulator")
    few = dict(list(package.header.items())[:7])
    with pytest.raises(PackageError, match="7 tensors"):
        package_sketch(dataclasses.replace(package, header=few))


def test_one_hostile_value_anywhere_in_a_config_costs_nothing(tmp_path):
    """Under a limit of memory and of time; nothing escapes but a refusal."""
    program = Path(__file__).with_name("hostile_configs.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "phi,qwen3,bloom", "2"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[:-2] == []
    assert int(done.stdout) > 200


def write_again(opened, out):
    write_emulator(
        opened.model,
        opened.tokenizer,
        opened.manifest.layers,
        out,
        model_fingerprint=opened.manifest.model,
        adapter_layers=1,
        full_model=opened.manifest.full_model,
    )


def test_what_no_reader_accepts_is_not_written(world, tmp_path):
    opened = open_emulator(world.path / "emulator")
    opened.model.config.attention_dropout = 1.0
    with pytest.raises(OutputError, match="attention_dropout"):
        write_again(opened, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_token_ids_outside_of_the_vocabulary_are_written_as_none():
    config = tiny_config("llama")
    config.pad_token_id, config.eos_token_id = -1, [2, 5]
    values = config_values(config)
    assert (values["pad_token_id"], values["bos_token_id"]) == (None, 1)
    assert values["eos_token_id"] == [2, 5]


def template(token):
    """A post-processor that puts a token of this id before every text."""
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [token], "tokens": ["<s>"]}},
    }


def broken(kind):
    """A tokenizer.json on which the tokenizers library panics or raises."""
    model = {
        "bpe": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]],
                "continuing_subword_prefix": "######"},
        "word piece": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "zz",
                       "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    }  # fmt: skip
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    return {"model": model[kind]} if kind in model else {"normalizer": charsmap}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["model"]["vocab"].update(q=128), "ids up to 128"),
        (lambda t: t.update(post_processor=template(128)), "ids up to 128"),
        (lambda t: t.update(broken("bpe")), "Panic|BPE|Exception"),
        (lambda t: t.update(broken("word piece")), "UNK"),
        (lambda t: t.update(broken("normalizer")), "Precompiled"),
    ],
)
def test_hostile_tokenizers_are_refused(world, tmp_path, change, words):
    tokenizer = json.loads(tokenizer_files(tiny_tokenizer())[TOKENIZER_NAME])
    change(tokenizer)
    package = altered(world, tmp_path, replaced={TOKENIZER_NAME: json.dumps(tokenizer).encode()})
    with pytest.raises(PackageError, match=words):
        open_emulator(package)


def test_settings_may_not_add_a_token_without_a_row(world, tmp_path):
    files = tokenizer_files(tiny_tokenizer())
    settings = json.dumps({"pad_token": "a new one"}).encode()
    assert len(tokenizer_from_files(files | {SETTINGS_NAME: settings}, rows=101)) == 101
    with pytest.raises(PackageError, match="ids up to 100, the embedding has 100 rows"):
        tokenizer_from_files(files | {SETTINGS_NAME: settings}, rows=100)


def test_padding_and_truncation_of_a_stranger_are_dropped():
    files = tokenizer_files(tiny_tokenizer())
    tokenizer = json.loads(files[TOKENIZER_NAME])
    tokenizer["padding"] = {
        "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 10**6, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    tokenizer["truncation"] = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5,
    }  # fmt: skip
    odd = files | {TOKENIZER_NAME: json.dumps(tokenizer).encode()}
    plain, read = tokenizer_from_files(files, rows=128), tokenizer_from_files(odd, rows=128)
    assert read("abc").input_ids == plain("abc").input_ids
    assert read.backend_tokenizer.encode("abc").ids == plain("abc").input_ids


def test_opening_does_not_render_the_chat_template(world, tmp_path):
    """It would take minutes, or fail."""
    hostile = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    package = altered(world, tmp_path, replaced={TEMPLATE_NAME: (hostile + "{{ 1 / 0 }}").encode()})
    start = time.perf_counter()
    opened = open_emulator(package)
    inspect(package)
    assert opened.tokenizer.chat_template.startswith(hostile)
    assert time.perf_counter() - start < 10


def test_a_tokenizer_without_rows_for_its_ids_is_not_written(world, tmp_path):
    opened = open_emulator(world.path / "emulator")
    opened.tokenizer.add_tokens([f"<{i}>" for i in range(29)])
    with pytest.raises(OutputError, match="129 tokens"):
        write_again(opened, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_inspecting_and_estimating_refuse_what_opening_refuses(world, tmp_path):
    files = tokenizer_files(tiny_tokenizer())
    tokenizer = json.loads(files[TOKENIZER_NAME]) | {"post_processor": template(128)}
    package = altered(world, tmp_path, replaced={TOKENIZER_NAME: json.dumps(tokenizer).encode()})
    with pytest.raises(PackageError, match="ids up to 128"):
        inspect(package)
    with pytest.raises(PackageError, match="ids up to 128"):
        estimate_tune(package, tmp_path / "never read")
    with pytest.raises(PackageError, match="ids up to 128"):
        shape_of(package)
    shutil.rmtree(package)
    with pytest.raises(PackageError, match="pad_token_id"):
        inspect(altered(world, tmp_path, {"pad_token_id": 10**6}))


def test_estimates_build_no_model_of_more_layers_than_the_package_has_weights(world, tmp_path):
    package = altered(world, tmp_path, {"num_hidden_layers": 2000}, layers=2000)
    for estimate in (lambda: shape_of(package), lambda: estimate_tune(package, tmp_path / "none")):
        with pytest.raises(PackageError, match="weights in each of 2000 layers"):
            estimate()


def test_a_package_without_a_tokenizer_is_refused_by_name(world, tmp_path):
    package = altered(world, tmp_path, tokenizer=False)
    for read in (open_emulator, shape_of):
        with pytest.raises(PackageError, match=r"no tokenizer\.json"):
            read(package)
