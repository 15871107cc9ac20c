import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blindtune.errors import ModelError, UnsupportedModelError
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import (
    empty_model,
    keep_layers,
    meta_model,
    replace_layer,
    tied_names,
)
from tiny_models import EOS, FAMILY_NAMES, LAYERS, PAD, VOCAB, WINDOW, tiny_config, tiny_model

PROMPT = 3 * WINDOW


def replace(model, *slots):
    decoder = Decoder(model)
    for slot in slots:
        torch.manual_seed(slot)
        harmonizer = Harmonizer(decoder.hidden_size, 4, returns_tuple=decoder.family.returns_tuple)
        torch.nn.init.normal_(harmonizer.up.weight, std=0.3)
        replace_layer(model, slot, harmonizer)


CUTS = {
    "replace some": lambda model: replace(model, 1, 2, 5),
    "replace all between": lambda model: replace(model, *range(1, LAYERS - 1)),
    "drop": lambda model: keep_layers(model, [2, 4, 6, 7]),
    "repeat": lambda model: keep_layers(model, [0, 1, 3, 3, 3, 6]),
    "replace, then drop": lambda model: (
        replace(model, 2, 4),
        keep_layers(model, [1, 2, 4, 5, 7]),
    ),
    "drop, then replace": lambda model: (keep_layers(model, [0, 2, 5, 7]), replace(model, 2)),
}


def prompt():
    ids = torch.randint(3, VOCAB, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, use_cache):
    return model.generate(
        **prompt(), use_cache=use_cache, do_sample=False, max_new_tokens=8, min_new_tokens=8
    )


@torch.no_grad()
def last_logits(model, chunk):
    """Logits of the last 6 prompt tokens: in one pass (chunk 0), or fed in chunks by the cache.

    Chunks of several tokens need a causal mask of the right length, so they see mask errors that
    single tokens, which may attend to everything, do not.
    """
    ids, mask = prompt().values()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if not chunk:
        return model(ids, attention_mask=mask, use_cache=False, **at(model, positions)).logits[
            :, -6:
        ]
    start, rows, cache = 0, [], None
    for stop in range(PROMPT - 6, PROMPT + 1, chunk):
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            **at(model, positions[:, start:stop]),
        )
        start, cache = stop, out.past_key_values
        rows.append(out.logits)
    return torch.cat(rows, dim=1)[:, -6:]


def at(model, positions):
    """Positions as `generate` passes them; BLOOM computes its own from the mask."""
    return {} if model.config.model_type == "bloom" else {"position_ids": positions}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_cache_stays_right(name, cut):
    model = tiny_model(name)
    CUTS[cut](model)
    expected = last_logits(model, 0)
    for chunk in (1, 3):
        torch.testing.assert_close(last_logits(model, chunk), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(generated(model, True), generated(model, False))


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "qwen3"])
def test_the_cache_test_sees_a_slot_of_the_wrong_type(name):
    """Without the rule on types the first slot of a type has no cache and masks are wrong."""
    model = tiny_model(name)
    types = list(model.config.layer_types)
    slot = next(i for i, kind in enumerate(types) if kind != types[0])
    replace(model, slot)
    model.config.layer_types = types
    try:
        wrong = last_logits(model, 3)
    except RuntimeError:
        return
    assert (wrong - last_logits(model, 0)).abs().max() > 1e-2


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_composed_forward_equals_the_model_after_surgery(name, cut):
    model = tiny_model(name)
    CUTS[cut](model)
    decoder = Decoder(model)
    with torch.no_grad():
        inputs = decoder.begin(*prompt().values())
        hidden = decoder.run_layers(inputs.hidden_BLD, inputs.calls, 0, decoder.layer_count)
        expected = model(**prompt()).logits
        torch.testing.assert_close(decoder.logits(hidden), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_raw_layers_keep_their_own_mask_and_positions(name):
    """Slow oracle: run the original model layer by layer, skipping what was replaced."""
    original, cut = tiny_model(name), tiny_model(name)
    replace(cut, 1, 2, 5)
    ids = prompt()["input_ids"]
    decoder = Decoder(original)
    with torch.no_grad():
        inputs = decoder.begin(ids)
        hidden = inputs.hidden_BLD
        for i, call in enumerate(inputs.calls):
            replaced = Decoder(cut).layers[i] if i in (1, 2, 5) else None
            hidden = decoder.run_layer(i, hidden, call, replaced)
        torch.testing.assert_close(decoder.logits(hidden), cut(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_shortened_model_is_an_ordinary_checkpoint(name, tmp_path):
    model = tiny_model(name)
    kept = [1, 2, 4, 7]
    keep_layers(model, kept)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == len(Decoder(again).layers) == 4
    with torch.no_grad():
        torch.testing.assert_close(again(**prompt()).logits, model(**prompt()).logits)
    if "layer_types" in Decoder(again).family.per_layer:
        original = tiny_config(name).layer_types
        assert again.config.layer_types == [original[i] for i in kept]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    def gradients(checkpointing):
        model = tiny_model(name).train()
        replace(model, 2, 3, 5)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model(**prompt(), labels=prompt()["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_an_empty_model_becomes_the_model_whose_weights_it_loads(name):
    model = tiny_model(name)
    replace(model, 1, 4)
    config = AutoConfig.for_model(**json.loads(json.dumps(model.config.to_dict())))
    shell = empty_model(config)
    replace(shell, 1, 4)
    assert not shell.training
    assert tied_names(shell) == tied_names(model)
    shell.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(shell(**prompt()).logits, model(**prompt()).logits)
    assert torch.equal(generated(shell, True), generated(model, False))


def test_an_empty_model_touches_no_memory():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    config = AutoConfig.for_model(
        "llama", vocab_size=60_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2
    )
    before = resident()
    model = empty_model(config)
    grown = resident() - before
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 500e6
    assert grown < 30e6
    assert empty_model(config, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_meta_model_has_the_names_and_shapes(name):
    meta, model = meta_model(tiny_config(name)), tiny_model(name)
    assert all(p.is_meta for p in meta.parameters())
    assert {k: v.shape for k, v in meta.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_building_leaves_the_given_config_alone():
    config = tiny_config("gemma3")
    before = config.to_dict()
    empty_model(config, dtype=torch.bfloat16)
    meta_model(config, dtype=torch.bfloat16)
    assert config.to_dict() == before


def test_impossible_numbers_are_a_model_error():
    config = tiny_config("gpt2")
    config.n_head = 3
    with pytest.raises(ModelError, match="GPT-2"):
        empty_model(config)
    with pytest.raises(UnsupportedModelError):
        meta_model(AutoConfig.for_model("mamba"))


def test_layer_zero_stays():
    model = tiny_model("llama")
    before = Decoder(model).layers[0]
    with pytest.raises(ModelError, match="layer 0"):
        replace_layer(model, 0, Harmonizer(32, 4))
    assert Decoder(model).layers[0] is before
    replace(model, 2)
    with pytest.raises(ModelError, match="first kept layer"):
        keep_layers(model, [2, 3])


@pytest.mark.parametrize("kept", [[], [8], [-1, 2]])
def test_indices_out_of_range_are_refused(kept):
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="0 to 7"):
        keep_layers(model, kept)
    with pytest.raises(ModelError, match="0 to 7"):
        replace_layer(model, 8, Harmonizer(32, 4))
    assert len(Decoder(model).layers) == model.config.num_hidden_layers == LAYERS


def test_layers_scaled_by_their_index_are_not_moved():
    config = tiny_config("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        keep_layers(model, [0, 2])
    keep_layers(model, [0, 1])
    assert len(Decoder(model).layers) == 2


def test_a_repeated_layer_has_its_own_weights():
    model = tiny_model("llama")
    keep_layers(model, [0, 1, 1])
    layers = Decoder(model).layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    assert layers[1].mlp.up_proj.weight is not layers[2].mlp.up_proj.weight
    assert torch.equal(layers[1].mlp.up_proj.weight, layers[2].mlp.up_proj.weight)


def test_tied_weights_are_named():
    assert tied_names(tiny_model("llama")) == {}
    assert tied_names(tiny_model("smollm2")) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_generation_stops_at_the_end_token():
    model = tiny_model("llama")
    replace(model, 2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 1.0
        model.model.norm.weight.fill_(1.0)
    out = model.generate(**prompt(), do_sample=False, max_new_tokens=8)
    assert out.shape[1] <= PROMPT + 8
