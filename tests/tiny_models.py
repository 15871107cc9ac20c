"""Tiny random models of every family and a tiny tokenizer, for the tests of every room."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 128
LAYERS = 8
WINDOW = 4
PAD, BOS, EOS = 0, 1, 2

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
}
_MHA = {**_LLAMA, "num_key_value_heads": 2}
_QWEN = {**_LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
_GEMMA = {**_LLAMA, "head_dim": 16}
_GPT2 = {
    **_TOKENS,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 128,
    "initializer_range": 0.25,
}
_OPT = {
    **_TOKENS,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "init_std": 0.25,
}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA, "tie_word_embeddings": False}),
    "smollm2": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", _QWEN),
    "qwen3": ("qwen3", {**_QWEN, "head_dim": 16}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", {**_GEMMA, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": [
                "full_attention" if i % 3 == 2 else "sliding_attention" for i in range(8)
            ],
        },
    ),
    "gpt2": ("gpt2", _GPT2),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", {**_MHA, "rotary_pct": 0.5}),
    "bloom": (
        "bloom",
        {**_TOKENS, "hidden_size": 32, "n_layer": LAYERS, "n_head": 2, "initializer_range": 0.25},
    ),
    "phi": ("phi", _MHA),
    "phi3": ("phi3", {**_LLAMA, "sliding_window": WINDOW}),
}

FAMILY_NAMES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_config(name: str) -> Any:
    """The config of a tiny model, by a name of FAMILY_NAMES."""
    model_type, values = _CONFIGS[name]
    return AutoConfig.for_model(model_type, **copy.deepcopy(values))


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model in eval mode: 8 layers, hidden 32, 2 heads, vocabulary 128, window 4.

    Biases and norms are random too, so that a mixed-up one shows. `changes` are of its config.
    """
    config = tiny_config(name)
    config.update(changes)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer over printable ASCII with <pad>, <s>, </s>, <unk>.

    It has a chat template; every id is below 128, the vocabulary of the tiny models.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '</s>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return fast
