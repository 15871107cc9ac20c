import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from blindtune.errors import ModelError, UnsupportedModelError
from blindtune.models.encoders import (
    Encoder,
    empty_encoder,
    encoder_family_of,
    is_encoder,
    load_any,
    load_encoder,
    meta_encoder,
)
from tiny_encoders import ENCODER_NAMES, LAYERS, tiny_encoder
from tiny_models import tiny_config, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_embedding_and_layers_compose_to_the_model(name):
    model = tiny_encoder(name)
    encoder = Encoder(model)
    ids = torch.randint(4, 128, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        inputs = encoder.begin(ids, mask)
        ours = encoder.run_layers(inputs.hidden_BLD, inputs.calls, 0, LAYERS)
        assert torch.equal(ours, model(input_ids=ids, attention_mask=mask).last_hidden_state)
    paths = {n for n, m in encoder.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(encoder.family.attention) | set(encoder.family.feed_forward) == paths
    assert encoder.embedding.weight.shape == (128, encoder.hidden_size)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_empty_and_meta_encoders_have_the_same_weights(name):
    model = tiny_encoder(name)
    shapes = {key: t.shape for key, t in model.state_dict().items()}
    for build in (empty_encoder, meta_encoder):
        assert {key: t.shape for key, t in build(model.config).state_dict().items()} == shapes


def test_a_checkpoint_with_heads_loads_without_them(tmp_path):
    config = BertConfig(**tiny_encoder("bert").config.to_diff_dict() | {"num_hidden_layers": 2})
    whole = BertForMaskedLM(config).eval()
    whole.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    ids = torch.randint(4, 128, (1, 5))
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, whole.bert(ids).last_hidden_state)
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not of one model"):
        load_encoder(tmp_path)


def test_what_cannot_be_cut_is_refused():
    assert not is_encoder(tiny_config("llama"))
    with pytest.raises(UnsupportedModelError, match="llama"):
        encoder_family_of(tiny_config("llama"))
    with pytest.raises(UnsupportedModelError, match="convolution"):
        tiny_encoder("deberta", conv_kernel_size=3)
    with pytest.raises(UnsupportedModelError, match="decoder"):
        tiny_encoder("bert", is_decoder=True)
    with pytest.raises(UnsupportedModelError, match="AutoModel"):
        Encoder(BertForMaskedLM(tiny_encoder("bert").config))


@pytest.mark.parametrize(("name", "build"), [("bert", tiny_encoder), ("gpt2", tiny_model)])
def test_any_model_with_its_tokenizer(tmp_path, name, build):
    model = build(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_any(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_any(tmp_path)
    assert type(loaded) is type(model)
    assert tokenizer.pad_token_id is not None
    with pytest.raises(ModelError):
        load_any(tmp_path / "nowhere")
