import pytest
import torch

from blindtune.errors import ModelError
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model
from blindtune.models.surgery import keep_layers, meta_model
from tiny_models import FAMILY_NAMES, tiny_config, tiny_model


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_copy_has_the_same_fingerprint(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert fingerprint(load_model(tmp_path)) == fingerprint(model) == fingerprint(tiny_model(name))


def test_what_computes_nothing_does_not_count():
    model = tiny_model("llama")
    before = fingerprint(model)
    model.train().requires_grad_(False)
    model.config.use_cache = False
    model.config.name_or_path = "elsewhere"
    assert fingerprint(model) == before
    assert len(before) == 64


def test_whatever_computes_counts():
    seen = {fingerprint(tiny_model("llama")), fingerprint(tiny_model("llama", seed=1))}
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[2, 5] += 1e-6
    seen.add(fingerprint(model))
    model = tiny_model("llama")
    first, second = model.model.layers[0], model.model.layers[1]
    first.mlp, second.mlp = second.mlp, first.mlp
    seen.add(fingerprint(model))
    model = tiny_model("llama")
    model.config.rope_parameters["rope_theta"] = 5.0
    seen.add(fingerprint(model))
    model = tiny_model("llama")
    keep_layers(model, range(7))
    seen.add(fingerprint(model))
    seen.add(fingerprint(tiny_model("llama").bfloat16()))
    assert len(seen) == 7


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_the_activation_counts_where_it_has_a_name_of_its_own(name):
    model = tiny_model(name)
    before = fingerprint(model)
    model.config.hidden_activation = "relu"
    assert fingerprint(model) != before


def test_a_model_without_weights_has_none():
    with pytest.raises(ModelError, match="meta"):
        fingerprint(meta_model(tiny_config("llama")))
