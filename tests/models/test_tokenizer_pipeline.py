"""A stranger's tokenizer writes no word twice, blows nothing up, and draws nothing."""

import json
import random
import unicodedata

import pytest
from tokenizers import Tokenizer

from blindtune.errors import PackageError
from blindtune.models.encoders import load_any
from blindtune.models.tokenizer_pipeline import MOST_STEPS, check_pipeline
from blindtune.models.tokenizers import TOKENIZER_NAME, tokenizer_files, tokenizer_from_files
from forged_tables import table_step
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


METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "always",
    "split": True,
}
BERT = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
TABLE = table_step({"\ufb03": "ffi", "\x07": "", "A": "a", "e\u0301": "\u00e9"})
MARK = {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEXTS = [{"Sequence": {"id": "A", "type_id": 0}}]


def template(single, ids=()):
    special = {"<s>": {"id": "<s>", "ids": list(ids), "tokens": ["<s>"] * len(ids)}}
    kind = {"type": "TemplateProcessing", "single": single, "pair": TEXTS}
    return kind | {"special_tokens": special}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": replacing({"String": "good"}, "good good")}, "a Replace of 9 letters"),
        ({"normalizer": replacing({"Regex": "g(?=ood)"}, "good g")}, "a Replace of 6 letters"),
        ({"normalizer": sequence(sequence(replacing({"String": "a"}, "aa")))}, "a Replace of 2"),
        ({"normalizer": replacing({"Regex": "(?=.)"}, "x")}, "beside every letter"),
        ({"normalizer": replacing({"Regex": "(?=good)"}, "x")}, "beside every letter"),
        ({"normalizer": replacing({"Regex": " {2,}|(?=.)"}, " ")}, "beside every letter"),
        ({"normalizer": replacing({"Regex": ""}, "x")}, "beside every letter"),
        ({"normalizer": replacing({"String": ""}, "x")}, "beside every letter"),
        ({"decoder": replacing({"String": ""}, "x")}, "beside every letter"),
        ({"normalizer": sequence(replacing({"String": "good"}, "\ufdfa"), {"type": "NFKC"})},
         "a Replace that writes"),
        ({"normalizer": replacing({"String": "good"}, "\u4e2d")}, "a Replace that writes"),
        ({"normalizer": replacing({"String": "good"}, "\U0001d400")}, "a Replace that writes"),
        ({"normalizer": sequence(BERT, replacing({"String": " "}, "x"))},
         "a Replace beside a BertNormalizer"),
        ({"normalizer": sequence(BERT, table_step({" ": "x"}))}, "a Precompiled beside a Bert"),
        ({"normalizer": sequence(BERT, BERT)}, "2 steps BertNormalizer"),
        ({"normalizer": sequence(TABLE, TABLE)}, "2 steps Precompiled"),
        ({"normalizer": sequence(PREPEND, sequence(PREPEND))}, "2 steps Prepend"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [METASPACE] * 2}},
         "2 steps Metaspace"),
        ({"pre_tokenizer": METASPACE | {"replacement": "\u4e2d"}}, "a Metaspace that writes"),
        ({"normalizer": {"type": "Prepend", "prepend": "the "}}, "a Prepend of 4 letters"),
        ({"normalizer": sequence(*[{"type": "NFC"}] * (MOST_STEPS + 1))}, "17 steps"),
        ({"normalizer": table_step({"g": "ggg"})}, "a table that makes 'ggg' of 'g'"),
        ({"normalizer": table_step({"\U0001d400": " a a a "})}, "a table that makes ' a a a '"),
        ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 2)}, "2 steps ByteLevel"),
        ({"pre_tokenizer": METASPACE | {"replacement": "\u2581\u2581"}}, "Metaspace of 2 letters"),
        ({"pre_tokenizer": {"type": "Repeat"}}, "a pre_tokenizer that is a Repeat"),
        ({"decoder": replacing({"String": "a"}, "a" * 9)}, "a Replace of 9 letters"),
        ({"post_processor": template(TEXTS * 2)}, "2 of them texts"),
        ({"post_processor": template(TEXTS + [MARK] * 99, [1])}, "a template of 100 pieces"),
        ({"post_processor": template([*TEXTS, MARK], [1] * 99)}, "a template of 100 pieces"),
        ({"model": {"dropout": 0.005}}, "drops merges by chance"),
        ({"model": {"byte_fallback": True, "continuing_subword_prefix": "#" * 9}}, "byte_fallback"),
        ({"normalizer": BERT, "pre_tokenizer": METASPACE | {"replacement": "x"}},
         "a Metaspace beside a BertNormalizer"),
        # The library takes the steps for what else fits them.
        ({"post_processor": {"type": "ByteLevel", "single": [*TEXTS, MARK] * 99, "pair": TEXTS,
                             "special_tokens": template(TEXTS, [1])["special_tokens"]}},
         "a template of"),
    ],
)  # fmt: skip
def test_what_would_repeat_blow_up_or_draw_is_refused(parts, said):
    with pytest.raises(PackageError, match=said):
        tokenizer_from_files(changed(**parts), rows=128)


def test_a_key_that_stands_twice_is_refused():
    """Python takes the last of them, and the library reads the step as another."""
    files = changed(normalizer=replacing({"String": "good"}, "good good"))
    twice = files[TOKENIZER_NAME].replace(
        b'{"type": "Replace"', b'{"type": "Strip", "type": "Strip"'
    )
    assert twice != files[TOKENIZER_NAME]
    with pytest.raises(PackageError, match="a key twice"):
        tokenizer_from_files(files | {TOKENIZER_NAME: twice}, rows=128)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence(PREPEND, replacing({"String": " "}, "\u2581"))},  # Llama 2
        {"normalizer": sequence(TABLE, replacing({"Regex": " {2,}"}, " "))},  # T5, XLM-R
        {"normalizer": sequence(TABLE, replacing({"Regex": " {2,}"}, "\u2581"))},
        {"normalizer": sequence(TABLE, {"type": "Strip", "strip_left": False, "strip_right": True},
                                replacing({"Regex": r"\s{2,}|[\n\r\t]"}, " "),
                                {"type": "NFC"})},  # DeBERTa v3, BARThez
        {"normalizer": sequence({"type": "NFC"}, replacing({"Regex": r"\s+"}, " "),
                                {"type": "Lowercase"})},  # CLIP
        {"normalizer": sequence(replacing({"String": "``"}, '"'), replacing({"String": "''"}, '"'),
                                {"type": "NFKD"}, {"type": "StripAccents"}, TABLE,
                                replacing({"Regex": " {2,}"}, " "))},  # ALBERT, XLNet
        {"normalizer": sequence(replacing({"Regex": r"[\n\r\t]"}, " "), TABLE,
                                replacing({"Regex": " +\u2581"}, "\u2581"),
                                replacing({"Regex": "^\u2581+$"}, ""))},  # SeamlessM4T
        {"normalizer": replacing({"Regex": r"\n"}, " ")},  # Pegasus
        {"normalizer": BERT, "pre_tokenizer": {"type": "BertPreTokenizer"}},
        {"decoder": {"type": "Sequence", "decoders": [replacing({"String": "\u2581"}, " ")]}},
        {"post_processor": template([MARK, *TEXTS, MARK], [1])},
        {"normalizer": sequence({"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"})},
        {"pre_tokenizer": METASPACE, "decoder": METASPACE},
        {"model": {"dropout": 0.0}},
    ],
    ids=["spaces", "table", "table to blank", "deberta", "clip", "albert", "seamless", "pegasus",
         "bert", "decoder", "template", "accents", "metaspace", "no dropout"],
)  # fmt: skip
def test_what_models_in_use_have_is_read(parts):
    tokenizer = tokenizer_from_files(changed(**parts), rows=128)
    assert tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize("name", ["minilm", "smollm2-135m"])
def test_real_tokenizers_pass(name):
    check_pipeline(json.loads(load_any(name)[1].backend_tokenizer.to_str()))


STEPS = [
    BERT, BERT | {"handle_chinese_chars": False}, PREPEND, TABLE,
    *[{"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase",
                                  "StripAccents")],
    *[replacing({"String": found}, written)
      for found in ("a", "good", " ", "\u4e2d", "\u2581", "")
      for written in ("", "a", " ", "\u2581", "\u4e2d", "\ufdfa", "aa")],
    *[replacing({"Regex": found}, "a") for found in ("(?=.)", " {2,}", r"\s+", "a*")],
    *[table_step({found: written}) for found in ("a", " ", "\ufdfa", "\U0001d400")
      for written in ("", "a", " ", " a a a ", "\u4e2d", "\U0001d400")],
]  # fmt: skip


def longest(letter):
    """What a letter may become: Unicode's forms, and BERT's spaces around a Chinese letter."""
    forms = [unicodedata.normalize("NFKD", letter.casefold()), letter]
    return max(3 if letter == "\u4e2d" else 1, *map(len, forms))


def test_no_chain_of_steps_that_passes_makes_a_text_longer_than_unicode_does():
    """Whatever is drawn: chains of honest and forged steps, run wherever they are not refused."""
    drawn, read = random.Random(0), 0
    described = json.loads(tokenizer_files(tiny_tokenizer())[TOKENIZER_NAME])
    for _ in range(4000):
        described["normalizer"] = sequence(*drawn.choices(STEPS, k=drawn.randint(1, 5)))
        try:
            check_pipeline(described)
        except ValueError:
            continue
        normalizer = Tokenizer.from_str(json.dumps(described)).normalizer
        read += 1
        for text in (
            "a",
            "good",
            "a good",
            "  a  ",
            "\u4e2d",
            "a\u4e2da",
            "\u00e9\ufdfa\ufb03\u0130",
        ):
            bound = 1 + sum(map(longest, text))
            assert len(normalizer.normalize_str(text)) <= bound, described["normalizer"]
    assert read > 400
