"""The decoder families that we know, as a table of names: one entry a family.

A family says where a Hugging Face causal language model keeps its embedding, its list of layers,
its final norm and its head, and what the linear maps inside a layer are called. Everything else in
the project reads these names and never asks for a class. docs/families.md shows how to add a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blindtune.errors import UnsupportedModelError


@dataclass(frozen=True)
class Linear:
    """One linear module of a layer."""

    path: str
    """Dotted path inside the layer."""
    parts: tuple[str, ...]
    """What its output rows are: one name, or several when the module is fused."""
    interleaved: bool = False
    """False: the parts' rows are stacked one after the other. True: they alternate head by head
    (head 0 of every part, then head 1 of every part, ...)."""


def _split_attention(module: str, q: str, k: str, v: str, o: str) -> tuple[Linear, ...]:
    named = {"query": q, "key": k, "value": v, "output": o}
    return tuple(Linear(f"{module}.{name}", (part,)) for part, name in named.items())


def _fused_attention(module: str, qkv: str, o: str, *, interleaved: bool) -> tuple[Linear, ...]:
    fused = Linear(f"{module}.{qkv}", ("query", "key", "value"), interleaved)
    return fused, Linear(f"{module}.{o}", ("output",))


def _feed_forward(**paths: str) -> tuple[Linear, ...]:
    return tuple(Linear(path, (part,)) for part, path in paths.items())


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names of one decoder family. Paths start at the causal language model unless noted."""

    name: str
    """What messages call it."""
    model_types: tuple[str, ...]
    """The values of `config.model_type` that mean this family."""
    layers: str = "model.layers"
    """The `ModuleList` of decoder layers."""
    embedding: str = "model.embed_tokens"
    """The token embedding."""
    final_norm: str = "model.norm"
    """The norm after the last layer; may be None in the model (OPT-350M)."""
    after_norm: str | None = None
    """A projection between the final norm and the head (OPT's `project_out`); may be None in the
    model."""
    head: str = "lm_head"
    """The output projection onto the vocabulary."""
    attention: tuple[Linear, ...] = _split_attention(
        "self_attn", "q_proj", "k_proj", "v_proj", "o_proj"
    )
    """The attention's linear maps, by path inside a layer."""
    feed_forward: tuple[Linear, ...] = _feed_forward(
        gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"
    )
    """The feed-forward network's linear maps, by path inside a layer."""
    per_layer: tuple[str, ...] = ()
    """Config keys that hold one value a layer."""
    returns_tuple: bool = False
    """True when a layer returns (hidden states, attention weights) and the backbone takes [0]."""


FAMILIES: tuple[Family, ...] = (
    Family(name="Llama", model_types=("llama", "mistral")),
    Family(name="Qwen", model_types=("qwen2", "qwen3"), per_layer=("layer_types",)),
    Family(name="Gemma", model_types=("gemma",)),
    Family(name="Gemma 2/3", model_types=("gemma2", "gemma3_text"), per_layer=("layer_types",)),
    Family(
        name="GPT-2",
        model_types=("gpt2",),
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention=_fused_attention("attn", "c_attn", "c_proj", interleaved=False),
        feed_forward=_feed_forward(up="mlp.c_fc", down="mlp.c_proj"),
    ),
    Family(
        name="OPT",
        model_types=("opt",),
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        after_norm="model.decoder.project_out",
        attention=_split_attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        feed_forward=_feed_forward(up="fc1", down="fc2"),
    ),
    Family(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention=_fused_attention("attention", "query_key_value", "dense", interleaved=True),
        feed_forward=_feed_forward(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    ),
    Family(
        name="BLOOM",
        model_types=("bloom",),
        layers="transformer.h",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        attention=_fused_attention("self_attention", "query_key_value", "dense", interleaved=True),
        feed_forward=_feed_forward(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
        returns_tuple=True,
    ),
    Family(
        name="Phi",
        model_types=("phi",),
        final_norm="model.final_layernorm",
        attention=_split_attention("self_attn", "q_proj", "k_proj", "v_proj", "dense"),
        feed_forward=_feed_forward(up="mlp.fc1", down="mlp.fc2"),
    ),
    Family(
        name="Phi-3",
        model_types=("phi3",),
        attention=_fused_attention("self_attn", "qkv_proj", "o_proj", interleaved=False),
        feed_forward=(
            Linear("mlp.gate_up_proj", ("gate", "up")),
            Linear("mlp.down_proj", ("down",)),
        ),
    ),
)

_BY_MODEL_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}

# What a config may say that makes the model something else than embedding, layers, norm, head.
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("is_encoder_decoder", bool, "an encoder-decoder has no single list of layers"),
    ("add_cross_attention", bool, "layers with cross-attention need an encoder"),
    ("use_bidirectional_attention", bool, "a bidirectional model is not a causal decoder"),
    ("is_causal", lambda causal: causal is False, "a bidirectional model is not a causal decoder"),
    ("layerdrop", lambda rate: bool(rate), "layers skipped at random while training; set it to 0"),
    ("slow_but_exact", bool, "tensor-parallel emulation reads weights past their module"),
    ("is_heterogeneous", bool, "layers of different shapes cannot be exchanged"),
    ("quantization_config", lambda c: c is not None, "quantized weights; load them dequantized"),
)


_ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "deberta-v2")
"""Known to `models.encoders`, for split tuning."""


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` that the table covers, sorted."""
    return tuple(sorted(_BY_MODEL_TYPE))


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        UnsupportedModelError: the model type is not in the table, or the config asks for something
            that breaks the picture of a plain stack of decoder layers.
    """
    model_type = getattr(config, "model_type", None)
    family = _BY_MODEL_TYPE.get(str(model_type))
    if family is None:
        hint = " (give its text part alone, gemma3_text)" if model_type == "gemma3" else ""
        if model_type in _ENCODERS:
            hint = ", an encoder: for split tuning alone"
        raise UnsupportedModelError(
            f"expected a model of type {', '.join(known_model_types())}, got {model_type!r}{hint}; "
            "if it is an embedding, a ModuleList of layers, a final norm and a head, add one entry "
            "to FAMILIES naming layers, embedding, final_norm, head, attention, feed_forward "
            "(docs/families.md)"
        )
    for key, breaks, reason in _REFUSED:
        value = getattr(config, key, None)
        if breaks(value):
            raise UnsupportedModelError(
                f"expected a plain causal {family.name} decoder, got a config with "
                f"{key}={value!r}: {reason}"
            )
    return family
