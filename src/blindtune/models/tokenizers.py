"""A tokenizer as three small files that hold data only, and back.

`AutoTokenizer` on another party's directory would let its files choose classes and code. Here the
files are a fast tokenizer's JSON, a short list of known settings, and a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blindtune.errors import ModelError, PackageError
from blindtune.models.tokenizer_pipeline import check_pipeline

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
FILE_NAMES = (TOKENIZER_NAME, SETTINGS_NAME, TEMPLATE_NAME)

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_SIDES = ("padding_side", "truncation_side")
_INPUTS = ["input_ids", "attention_mask"]
# Encoded once when a tokenizer is read: one that cannot do this cannot do anything.
_PROBE = "a b\u00e9\u2603"


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of a fast tokenizer, by name.

    Raises:
        ModelError: the tokenizer is a slow (Python) one, or has chat templates of which none is the
            default.
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
        files[TEMPLATE_NAME] = _default_template(tokenizer).encode()
    return files


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, or of several by name the one called `default`."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            "expected a tokenizer with one chat template, or one named default among several, got "
            f"{', '.join(sorted(tokenizer.chat_template))}: name one of them default"
        ) from error
    return template


def told(tokenizer: PreTrainedTokenizerBase) -> str:
    """The kind of a fast tokenizer and its number of tokens, for people."""
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009
    return f"{type(backend.model).__name__}, {backend.get_vocab_size():,} tokens"


def read_tokenizer(
    names: Container[str], read_file: Callable[[str], bytes], *, rows: int
) -> PreTrainedTokenizerBase:
    """The tokenizer among a package's files: the one way to read another party's.

    Args:
        names: of the files that there are.
        read_file: the content of one of them.
        rows: of the model's word embedding.

    Raises:
        PackageError: as `tokenizer_from_files`.
    """
    return tokenizer_from_files({n: read_file(n) for n in FILE_NAMES if n in names}, rows=rows)


def tokenizer_from_files(files: Mapping[str, bytes], *, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer that another party's files describe. Its chat template is not rendered.

    Args:
        files: by name, as from `tokenizer_files`.
        rows: of the word embedding: an id from there on would have no embedding.

    Raises:
        PackageError: a file is malformed or missing, a setting is unknown or of a wrong kind, or
            the tokenizer can return an id that has no row.
    """
    with refuse_malformed():
        missing = [name for name in (TOKENIZER_NAME, SETTINGS_NAME) if name not in files]
        if missing:
            raise ValueError(f"no {' and no '.join(missing)}")
        settings = _settings(files[SETTINGS_NAME])
        backend = read_backend(files[TOKENIZER_NAME])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, model_input_names=_INPUTS, **settings
        )
        if TEMPLATE_NAME in files:
            tokenizer.chat_template = files[TEMPLATE_NAME].decode()
        _check_ids(tokenizer, rows)
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def read_backend(content: bytes) -> Tokenizer:
    """A tokenizer.json, without its padding and truncation: the caller's to set.

    It may raise anything: call it within `refuse_malformed`.
    """
    text = content.decode()
    check_pipeline(json.loads(text, object_pairs_hook=_only_once))
    backend = Tokenizer.from_str(text)
    # And as the library has read it: of a step whose type does not fit it takes the rest for one.
    check_pipeline(json.loads(backend.to_str()))
    backend.no_padding()
    backend.no_truncation()
    backend.encode(_PROBE)
    return backend


def _only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, unless it has a key twice: readers differ in which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{TOKENIZER_NAME} has a key twice")
    return found


@contextmanager
def refuse_malformed() -> Iterator[None]:
    """Turn whatever reading a stranger's tokenizer raises into a PackageError.

    The tokenizers library raises bare Exception, and a panic in its Rust code is no Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise PackageError(
            f"expected a readable {TOKENIZER_NAME} and {SETTINGS_NAME} that fit the model, got: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}: ask for the package "
            "again"
        ) from error


def _settings(content: bytes) -> dict[str, str]:
    settings: dict[str, str] = json.loads(content)
    known = isinstance(settings, dict) and set(settings) <= {*_TOKENS, *_SIDES}
    if not known or not all(isinstance(value, str) for value in settings.values()):
        raise ValueError(f"expected only {', '.join((*_TOKENS, *_SIDES))}, each a string")
    if any(settings.get(side, "right") not in ("left", "right") for side in _SIDES):
        raise ValueError("expected a side to be left or right")
    return settings


def _check_ids(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Ids come from the vocabulary, added tokens, and the template that puts tokens around text."""
    template = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    ids = [*tokenizer.get_vocab().values(), *_integers(template)]
    highest = max(ids, default=0)
    if highest >= rows or len(tokenizer) > rows:
        raise ValueError(
            f"{len(tokenizer)} tokens with ids up to {highest}, the embedding has {rows} rows"
        )


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _integers(item)
    elif type(value) is int:
        yield value
