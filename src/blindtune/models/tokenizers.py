"""A tokenizer as three small files that hold data only, and back.

`AutoTokenizer` on another party's directory would let its files choose classes and code. Here the
files are a fast tokenizer's JSON, a short list of known settings, and a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blindtune.errors import ModelError, PackageError

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
FILE_NAMES = (TOKENIZER_NAME, SETTINGS_NAME, TEMPLATE_NAME)

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_SIDES = ("padding_side", "truncation_side")
_INPUTS = ["input_ids", "attention_mask"]


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of a fast tokenizer, by name.

    Raises:
        ModelError: the tokenizer is a slow (Python) one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"expected a fast tokenizer, got {type(tokenizer).__name__}: convert it to a "
            "tokenizer.json first"
        )
    settings: dict[str, Any] = {name: getattr(tokenizer, name) for name in _TOKENS}
    settings = {name: str(token) for name, token in settings.items() if token is not None}
    settings |= {side: getattr(tokenizer, side) for side in _SIDES}
    files = {
        TOKENIZER_NAME: backend.to_str().encode(),
        SETTINGS_NAME: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode(),
    }
    if tokenizer.chat_template:
        files[TEMPLATE_NAME] = str(tokenizer.chat_template).encode()
    return files


def tokenizer_from_files(files: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    """The tokenizer that another party's files describe.

    Raises:
        PackageError: a file is malformed, or a setting is unknown or of a wrong kind.
    """
    try:
        settings = json.loads(files[SETTINGS_NAME])
        known = isinstance(settings, dict) and set(settings) <= {*_TOKENS, *_SIDES}
        if not known or not all(isinstance(value, str) for value in settings.values()):
            raise ValueError(f"expected only {', '.join((*_TOKENS, *_SIDES))}, each a string")
        if any(settings.get(side, "right") not in ("left", "right") for side in _SIDES):
            raise ValueError("expected a side to be left or right")
        backend = Tokenizer.from_str(files[TOKENIZER_NAME].decode())
        template = files[TEMPLATE_NAME].decode() if TEMPLATE_NAME in files else None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise PackageError(
            f"expected a readable {TOKENIZER_NAME} and {SETTINGS_NAME}, got: "
            f"{str(error)[:200]}: ask for the package again"
        ) from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=_INPUTS, **settings
    )
    tokenizer.chat_template = template
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded
