"""A tokenizer as files and back."""

import pytest

from blindtune.errors import ModelError
from blindtune.models.tokenizers import TEMPLATE_NAME, tokenizer_files, tokenizer_from_files
from tiny_models import tiny_tokenizer


def test_of_several_chat_templates_the_default_is_written():
    tokenizer = tiny_tokenizer()
    only = tokenizer.chat_template
    files = tokenizer_files(tokenizer)
    tokenizer.chat_template = {"default": only, "tool_use": "{{ tools }}"}
    assert tokenizer_files(tokenizer) == files
    assert tokenizer_from_files(files, rows=128).chat_template == only
    tokenizer.chat_template = {"tool_use": only, "rag": only}
    with pytest.raises(ModelError, match="default among several, got rag, tool_use"):
        tokenizer_files(tokenizer)
    tokenizer.chat_template = None
    assert TEMPLATE_NAME not in tokenizer_files(tokenizer)
