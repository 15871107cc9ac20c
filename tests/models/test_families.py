import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from blindtune.errors import UnsupportedModelError
from blindtune.models.families import FAMILIES, family_of, known_model_types
from tiny_models import FAMILY_NAMES, tiny_config

DOCS = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_tiny_model_has_a_family(name):
    config = tiny_config(name)
    assert config.model_type in family_of(config).model_types


def test_every_model_type_of_the_table_is_tested():
    assert {tiny_config(name).model_type for name in FAMILY_NAMES} == set(known_model_types())


def test_no_model_type_is_claimed_twice():
    claimed = [kind for family in FAMILIES for kind in family.model_types]
    assert len(claimed) == len(set(claimed))


def test_an_unknown_family_is_refused_with_what_to_do():
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(AutoConfig.for_model("mamba"))
    message = str(caught.value)
    assert "'mamba'" in message
    assert "docs/families.md" in message
    for name in ("layers", "embedding", "final_norm", "head", "attention", "feed_forward"):
        assert name in message


def test_a_multimodal_gemma_is_pointed_to_its_text_part():
    with pytest.raises(UnsupportedModelError, match="gemma3_text"):
        family_of(AutoConfig.for_model("gemma3"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "is_encoder_decoder", True),
        ("llama", "is_causal", False),
        ("gemma3", "use_bidirectional_attention", True),
        ("opt", "layerdrop", 0.1),
        ("bloom", "slow_but_exact", True),
        ("llama", "quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_a_config_that_is_no_plain_decoder_is_refused(name, key, value):
    config = tiny_config(name)
    setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=key):
        family_of(config)


def test_the_documentation_lists_every_model_type():
    listed = set(re.findall(r"`(\w+)`", DOCS.read_text().split("## How to add")[0]))
    assert set(known_model_types()) <= listed
