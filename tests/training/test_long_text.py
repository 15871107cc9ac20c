"""Long text in pieces has the ids of the whole, or is not cut."""

import sysconfig
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from blindtune.models.loading import load_tokenizer
from blindtune.training.long_text import PIECE, ids_in_pieces
from blindtune.training.records import token_ids
from blindtune.training.text import DataConfig, load_dataset_file

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "ab ab. ab\n ab  ab\n\nab 12 ab1 a's b.\n b ab.\n\n  ab\t ab ba <e> ab <e>",
    "abé é. aé é",
] * 9


def made(splitter, *, normalizer=None, around=None, added=(), model=None):
    """A tokenizer that has learned all it can of the corpus; <s> is 0 and <e> is 1."""
    inner = Tokenizer(model or models.BPE(unk_token="<u>"))
    inner.pre_tokenizer = splitter
    if normalizer is not None:
        inner.normalizer = normalizer
    options = {"special_tokens": ["<s>", "<e>", "<u>"], "show_progress": False}
    if "ByteLevel" in repr(splitter):
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    kind = trainers.BpeTrainer if model is None else trainers.UnigramTrainer
    if model is not None:
        options["unk_token"] = "<u>"
    inner.train_from_iterator(CORPUS, kind(vocab_size=420, **options))
    if around:
        tokens = [("<s>", 0), ("<e>", 1)]
        inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=tokens)
    inner.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<u>", eos_token="<e>")


def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def gpt2(prefix=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix)


CUT = {
    "GPT-2": made(gpt2()),
    "OPT": made(gpt2(prefix=True), around="<s> $A"),
    "SmolLM2": made(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2()])),
    "Llama 3": made(split(LLAMA3), around="<s> $A"),
    "Qwen": made(split(LLAMA3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "Metaspace": made(pre_tokenizers.Metaspace()),
    "Metaspace, first": made(pre_tokenizers.Metaspace(prepend_scheme="first"), around="$A <e>"),
    "Metaspace, Unigram": made(pre_tokenizers.Metaspace(), model=models.Unigram()),
    "both ends": made(gpt2(), around="<s> $A <e>"),
    "spaces as tokens": made(gpt2(), added=["  ", "\n", AddedToken("ab", lstrip=True)]),
}
WHOLE = {
    "Llama 2": made(
        pre_tokenizers.Metaspace(split=False),
        normalizer=normalizers.Sequence([normalizers.Prepend("x")]),
    ),
    "Metaspace without words": made(pre_tokenizers.Metaspace(split=False)),
    "stripped": made(gpt2(), normalizer=normalizers.Strip()),
    "another pattern": made(split(r"[a-z]+ |.|\s")),
    "bytes, then words": made(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            ]
        )
    ),
    "twice": made(gpt2(), around="$A $A"),
    "a token with a space": made(gpt2(), added=["b a"]),
    "a token that takes spaces": made(gpt2(), added=[AddedToken("ab", rstrip=True)]),
}
letters = st.text(alphabet="ab 1\n\t.'<e>é\u0301\u00a0\u2581\u3000你²", max_size=60)
texts = st.lists(st.sampled_from(["ab", " ", "  ", "\n", ".\n", "<e>", "1", " a", "'s"]) | letters)


@pytest.mark.parametrize("name", CUT)
@settings(deadline=None, max_examples=150)
@given(parts=texts, size=st.integers(1, 9))
def test_pieces_join_to_the_ids_of_the_whole(name, parts, size):
    text, tokenizer = "".join(parts), CUT[name]
    joined = [i for ids in ids_in_pieces(text, tokenizer, size) for i in ids]
    assert joined == token_ids(text, tokenizer)


@pytest.mark.parametrize("name", CUT | WHOLE)
def test_a_text_is_cut_where_it_may_be(name):
    text, tokenizer = "ab ab. ab\nba ab <e> ab b a" * 9, (CUT | WHOLE)[name]
    pieces = list(ids_in_pieces(text, tokenizer, 10))
    assert (len(pieces) > 10) == (name in CUT)
    assert list(chain(*pieces)) == token_ids(text, tokenizer)


def test_the_packaged_tokenizer_has_the_same_ids():
    tokenizer = load_tokenizer("smollm2-135m")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(errors="replace") for path in sources)[: 2 * PIECE]
    for size in (PIECE, 500):
        pieces = list(ids_in_pieces(text, tokenizer, size))
        assert len(pieces) > 0.9 * len(text) / size
        assert list(chain(*pieces)) == token_ids(text, tokenizer)


def test_reading_stops_at_the_budget(tmp_path, monkeypatch):
    tokenizer = CUT["Llama 3"]
    text = "".join(f"ab {i} ab.\n" for i in range(60_000))
    (tmp_path / "a.txt").write_text(text)
    whole = load_dataset_file(tmp_path / "a.txt", tokenizer, DataConfig(max_length=16))
    ids = token_ids(text, tokenizer)
    assert [i for row in whole.input_ids for i in row.tolist()] == ids[: len(ids) // 16 * 16]
    seen = []

    def counted(text, *rest, **options):
        seen.append(len(text))
        return token_ids(text, *rest, **options)

    monkeypatch.setattr("blindtune.training.long_text.token_ids", counted)
    reading = DataConfig(max_length=16, max_tokens=1000)
    head = load_dataset_file(tmp_path / "a.txt", tokenizer, reading)
    assert [row.tolist() for row in head.input_ids] == [
        row.tolist() for row in whole.input_ids[: 1000 // 16]
    ]
    assert sum(seen) < 1.01 * PIECE < len(text) / 2
    apart = DataConfig(max_length=16, pack=False)
    (cut,) = load_dataset_file(tmp_path / "a.txt", tokenizer, apart).input_ids
    assert cut.tolist() == ids[:16]
    assert sum(seen) < 2.02 * PIECE


def test_records_behind_the_budget_are_not_encoded(tmp_path):
    rows = '{"prompt": "ab", "completion": " ab"}\n' * 5 + '{"prompt": 3, "completion": ""}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    reading = DataConfig(max_tokens=7)
    found = load_dataset_file(tmp_path / "a.jsonl", CUT["GPT-2"], reading)
    assert (len(found), found.tokens) == (2, 6)
