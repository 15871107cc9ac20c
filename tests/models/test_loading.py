import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from blindtune.errors import ModelError, UnsupportedModelError
from blindtune.models.loading import load_model, load_tokenizer
from tiny_models import FAMILY_NAMES, tiny_model, tiny_tokenizer


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "model"
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_saved_model_loads_as_it_was(name, tmp_path):
    model = tiny_model(name)
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert not again.training
    assert again.config.use_cache is False
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_type_of_the_weights_is_the_one_asked_for(saved):
    assert load_model(str(saved)).dtype == torch.float32
    assert load_model(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_missing_weights_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    for name in list(weights):
        if ".5." in name:
            del weights[name]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"without 9 of them.*layers\.5\."):
        load_model(saved)


def test_weights_that_the_config_does_not_know_are_refused(saved):
    config = json.loads((saved / "config.json").read_text()) | {"num_hidden_layers": 7}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"9 more.*layers\.7\."):
        load_model(saved)


@pytest.fixture
def chatty():
    """The library's own warnings, whatever a command of an earlier test has made of them."""
    root = logging.getLogger("transformers")
    before = (root.level, root.propagate)
    root.setLevel(logging.WARNING)
    root.propagate = True
    yield
    root.setLevel(before[0])
    root.propagate = before[1]


def test_a_surplus_of_keys_is_judged_here_and_not_printed(saved, caplog, chatty):
    weights = load_file(saved / "model.safetensors")
    weights["pooler.scale"] = torch.ones(8)
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(saved)
    assert "LOAD REPORT" in caplog.text
    caplog.clear()
    load_model(saved)
    assert "REPORT" not in caplog.text


def test_buffers_of_old_checkpoints_are_ignored(saved):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    load_model(saved)


def test_weights_of_another_shape_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="fit the config"):
        load_model(saved)


def test_a_truncated_file_is_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="complete"):
        load_model(saved)


def test_pickled_weights_are_not_read(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_model(saved)


def test_code_beside_the_weights_is_not_run(saved, tmp_path):
    proof = tmp_path / "ran"
    (saved / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load_model(saved)
    assert not proof.exists()


def test_another_family_is_refused_before_its_weights_are_read(saved):
    config = json.loads((saved / "config.json").read_text()) | {"model_type": "mamba"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="mamba"):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 7}', "{}"])
def test_a_broken_config_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ModelError):
        load_model(saved)


def test_what_is_not_a_model_directory_is_refused(saved, tmp_path):
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="PEFT"):
        load_model(saved)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"without config\.json"):
        load_model(empty)
    for name in (str(tmp_path / "none"), "./none", "a/b/c", saved / "config.json"):
        with pytest.raises(ModelError, match="is not a directory"):
            load_model(name)


def test_a_name_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("someone/no-such-model", "not a name!"):
        for load in (load_model, load_tokenizer):
            with pytest.raises(ModelError) as caught:
                load(name)
            assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="without a network give a local directory"):
        load_model("someone/no-such-model")


def test_a_tokenizer_has_an_end_and_a_padding_token(saved):
    assert load_tokenizer(saved).pad_token == "<pad>"
    file = saved / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    assert load_tokenizer(saved).pad_token == "</s>"
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="end-of-text"):
        load_tokenizer(saved)


def test_a_missing_tokenizer_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
