"""A stranger's tokenizer writes no word twice, blows nothing up, and draws nothing."""

import base64
import json
import struct

import pytest

from blindtune.errors import PackageError
from blindtune.models.encoders import load_any
from blindtune.models.tokenizer_pipeline import MOST_STEPS, check_pipeline
from blindtune.models.tokenizers import TOKENIZER_NAME, tokenizer_files, tokenizer_from_files
from tiny_models import tiny_tokenizer


def changed(**parts):
    """The tiny tokenizer with other parts."""
    files = tokenizer_files(tiny_tokenizer())
    described = json.loads(files[TOKENIZER_NAME])
    described["model"] |= parts.pop("model", {})
    described |= parts
    return files | {TOKENIZER_NAME: json.dumps(described).encode()}


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def table(letter, content):
    """A SentencePiece table of letters with one entry: a double-array trie, then what it writes."""
    units = [0] * 512
    units[0] = 0x100 << 10
    units[0x100 ^ ord(letter)] = ord(letter) << 10 | 1 << 8 | ord(letter)
    blob = struct.pack("<I512I", 4 * len(units), *units) + content.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}


METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "always",
    "split": True,
}
TEXTS = [{"Sequence": {"id": "A", "type_id": 0}}]


def template(single):
    return {"type": "TemplateProcessing", "single": single, "pair": TEXTS, "special_tokens": {}}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": replacing({"String": "good"}, "good good")}, "a Replace of 9 letters"),
        ({"normalizer": replacing({"Regex": "g(?=ood)"}, "good g")}, "a Replace of 6 letters"),
        ({"normalizer": sequence(sequence(replacing({"String": "a"}, "aa")))}, "a Replace of 2"),
        ({"normalizer": {"type": "Prepend", "prepend": "the "}}, "a Prepend of 4 letters"),
        ({"normalizer": sequence(*[{"type": "NFC"}] * (MOST_STEPS + 1))}, "17 steps"),
        ({"normalizer": table("g", "ggg")}, r"a table that makes U\+0067 longer than 1"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 2}}, "bytes"),
        ({"pre_tokenizer": METASPACE | {"replacement": "\u2581\u2581"}}, "Metaspace of 2 letters"),
        ({"pre_tokenizer": {"type": "Repeat"}}, "a pre_tokenizer that is a Repeat"),
        ({"decoder": replacing({"String": "a"}, "a" * 9)}, "a Replace of 9 letters"),
        ({"post_processor": template(TEXTS * 2)}, "2 of them texts"),
        ({"post_processor": template(TEXTS + [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 99)},
         "a template of 100 pieces"),
        ({"model": {"dropout": 0.005}}, "drops merges by chance"),
    ],
)  # fmt: skip
def test_what_would_repeat_blow_up_or_draw_is_refused(parts, said):
    with pytest.raises(PackageError, match=said):
        tokenizer_from_files(changed(**parts), rows=128)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence({"type": "Prepend", "prepend": "\u2581"},
                                replacing({"String": " "}, "\u2581"))},  # Llama 2
        {"normalizer": sequence(table("g", "h"), replacing({"Regex": " {2,}"}, " "))},  # T5, XLM-R
        {"normalizer": sequence({"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"})},
        {"pre_tokenizer": METASPACE, "decoder": METASPACE},
        {"model": {"dropout": 0.0}},
    ],
    ids=["spaces", "table", "accents", "metaspace", "no dropout"],
)  # fmt: skip
def test_what_models_in_use_have_is_read(parts):
    tokenizer = tokenizer_from_files(changed(**parts), rows=128)
    assert tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize("name", ["minilm", "smollm2-135m"])
def test_real_tokenizers_pass(name):
    check_pipeline(json.loads(load_any(name)[1].backend_tokenizer.to_str()))
