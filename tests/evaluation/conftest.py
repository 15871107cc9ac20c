"""Tiny random decoders and a tiny tokenizer, made on the spot."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 257
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FEED_FORWARD = {**SIZE, "intermediate_size": 48}
GROUPED = {**FEED_FORWARD, "num_key_value_heads": 2}
SLIDING = {**GROUPED, "head_dim": 8, "sliding_window": 16}
CONFIGS = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 16},
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**SLIDING, "final_logit_softcapping": 2.0},
    "gemma3_text": SLIDING,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": FEED_FORWARD,
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "phi": FEED_FORWARD,
}


def build_tiny(family, *, seed=0):
    """A random decoder whose logits are far from uniform."""
    special = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    config = CONFIG_MAPPING[family](
        vocab_size=VOCABULARY, max_position_embeddings=128, **special, **CONFIGS[family]
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request):
    return build_tiny(request.param)


@pytest.fixture
def llama():
    return build_tiny("llama")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )
