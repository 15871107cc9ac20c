"""Tiny random encoders of every family that split tuning cuts."""

import torch
from transformers import AutoConfig, AutoModel

from blindtune.models.encoders import encoder_family_of
from tiny_models import VOCAB

LAYERS = 3
_SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
_CONFIGS = {
    "bert": ("bert", _SIZES),
    "roberta": ("roberta", {**_SIZES, "pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": VOCAB, "pad_token_id": 0, "dim": 32, "hidden_dim": 48, "n_layers": LAYERS,
            "n_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.25,
        },
    ),
    "mpnet": ("mpnet", {**_SIZES, "pad_token_id": 1, "relative_attention_num_buckets": 32}),
    "deberta": (
        "deberta-v2",
        {
            **_SIZES, "relative_attention": True, "position_buckets": 8,
            "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        },
    ),
}  # fmt: skip
ENCODER_NAMES = tuple(_CONFIGS)


def tiny_encoder(name, seed=0, **changes):
    """A tiny random encoder in eval mode, biases and norms random too."""
    model_type, values = _CONFIGS[name]
    config = AutoConfig.for_model(model_type, **{**values, **changes})
    kwargs = {"add_pooling_layer": False} if encoder_family_of(config).pooler else {}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, **kwargs)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()
