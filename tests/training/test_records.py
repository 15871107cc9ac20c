"""The tokens of a completion are those that a model is asked for behind the prompt."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blindtune.evaluation.utility.choices import _encode
from blindtune.training.records import Item, encode_completion, token_ids

WORDS = [
    "▁",
    "▁Question",
    ":",
    "▁Which",
    "?",
    "\n",
    "Answer",
    "▁ice",
    "ice",
    "▁stone",
    "stone",
    "▁house",
    "house",
    "Haus",
    "▁Haus",
]
FIRST = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
ALWAYS = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def spaced(way):
    """Like the tokenizer of Llama 2: before a string it puts the space that words begin with."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *WORDS])
    scores = [(piece, -float(len(piece) < 2) - 1.0) for piece in pieces]
    backend = Tokenizer(models.Unigram(scores, 0, False))
    if way == "first":
        backend.pre_tokenizer = FIRST
    else:
        backend.normalizer = ALWAYS
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def trained(example, tokenizer):
    chosen = zip(example.input_ids, example.trained, strict=True)
    return tokenizer.convert_ids_to_tokens([i for i, wanted in chosen if wanted])


@pytest.mark.parametrize("way", ["first", "always"])
def test_a_completion_gets_no_space_of_its_own(way):
    tokenizer = spaced(way)
    item = Item(question="Which?", choices=("ice", "stone"), label=1)
    right = item.continuations[1]
    example = encode_completion(item.prompt, right, tokenizer, 100)
    assert trained(example, tokenizer) == ["▁stone", "</s>"]
    before, after = _encode(tokenizer, item.prompt, right, 100)
    assert example.input_ids == [*before, *after, tokenizer.eos_token_id]
    for prompt, completion in (("Haus:", "house"), ("Haus: ", "house"), ("Haus:\n", "house")):
        example = encode_completion(prompt, completion, tokenizer, 100)
        assert trained(example, tokenizer) == ["house", "</s>"]
        assert example.input_ids[:-2] == token_ids(prompt, tokenizer)


texts = st.text(alphabet="the cat\n '\té1", max_size=8)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(prompt=texts, completion=texts)
def test_bytes_stay_where_they_are(tokenizer, prompt, completion):
    """A byte-level tokenizer: the prompt's tokens, then those of the completion's bytes."""
    example = encode_completion(prompt, completion, tokenizer, 100)
    before = token_ids(prompt, tokenizer)
    assert example.input_ids[: len(before)] == before
    assert tokenizer.decode(example.input_ids[len(before) :]) == completion + "<|end|>"
    assert example.trained == [i >= len(before) for i in range(len(example.input_ids))]
