"""An emulator of the embedded model writes the same text with a KV cache and without."""

import pytest
import torch

from blindtune.models.blocks import Harmonizer, LowRankLinear
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.models.surgery import replace_layer
from blindtune.offsite.model_owner.compression import compress_layer

NEW_TOKENS = 12


@pytest.mark.real
def test_a_cache_changes_no_token():
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    decoder = Decoder(model)
    torch.manual_seed(0)
    for slot in (9, 20):
        harmonizer = Harmonizer(decoder.hidden_size, 32)
        torch.nn.init.normal_(harmonizer.up.weight, std=0.02)
        replace_layer(model, slot, harmonizer)
    assert compress_layer(decoder, 14, 0.25, reading="kept")
    assert isinstance(decoder.layers[14].self_attn.q_proj, LowRankLinear)
    start = tokenizer("The old river runs through the town and", return_tensors="pt")
    read = []
    decoder.embedding.register_forward_hook(lambda module, inputs, out: read.append(out.shape[1]))

    def write(use_cache):
        read.clear()
        return model.generate(
            **start,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=use_cache,
        )[0]

    cached = write(True)
    prompt = start.input_ids.shape[1]
    assert read == [prompt, *[1] * (NEW_TOKENS - 1)]
    assert torch.equal(cached, write(False))
    assert read == [prompt + i for i in range(NEW_TOKENS)]
    assert len(cached) == prompt + NEW_TOKENS
    assert len(set(cached[prompt:].tolist())) > 3  # text, not one token over and over
