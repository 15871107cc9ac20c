"""What a tokenizer puts around every text: found by trying, refused where it is no such thing."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blindtune.errors import PackageError
from blindtune.models.encoders import load_any
from blindtune.models.margins import Margins, margins_of, shown_tokens
from blindtune.models.tokenizers import TOKENIZER_NAME, tokenizer_files, tokenizer_from_files
from forged_tokenizers import around
from tiny_models import tiny_tokenizer


def with_processor(change):
    files = tokenizer_files(tiny_tokenizer())
    tokenizer = json.loads(files[TOKENIZER_NAME])
    change(tokenizer)
    return tokenizer_from_files(files | {TOKENIZER_NAME: json.dumps(tokenizer).encode()}, rows=128)


def processor(**again):
    """As the second of a sequence, a template gets what the first one put before the text, too."""
    tokenizer = {}
    around([("<s>", 1)], [])(tokenizer)
    tokenizer["post_processor"]["pair"] += again.values()
    return tokenizer["post_processor"]


def test_margins_are_places():
    both = Margins((1,), (2,))
    mask = both.mask(torch.tensor([1, 2, 1, 1, 2]))
    assert mask.tolist() == [True, False, False, False, True]
    assert both.content(torch.tensor([1, 2, 1, 1, 2])).tolist() == [2, 1, 1]
    for piece in ([1, 5, 6], [5, 6, 2], [1], [], [5, 1, 2, 6]):  # as windows of a longer text
        assert not both.mask(torch.tensor(piece, dtype=torch.int64)).any()
    assert both.mask(torch.tensor([1, 2])).all()
    assert Margins().mask(torch.tensor([1, 2])).tolist() == [False, False]
    assert Margins((1, 1)).content(torch.tensor([1, 1, 1])).tolist() == [1]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda _: None, Margins()),
        (around([("<s>", 1)], []), Margins((1,))),
        (around([("<s>", 1)], [("</s>", 2)]), Margins((1,), (2,))),
        (around([("<s>", 1), ("</s>", 2)], [("</s>", 2), ("</s>", 2)]), Margins((1, 2), (2, 2))),
        (around([("a", 70)], [("a", 70)]), Margins((70,), (70,))),  # a word is as good as a mark
        (lambda t: t.update(post_processor={
            "type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1],
        }), Margins((1,), (2,))),
    ],
)  # fmt: skip
def test_margins_are_found(change, found):
    assert margins_of(with_processor(change)) == found


@pytest.mark.parametrize(
    "change",
    [
        around([("<s>", 1)], [("</s>", 2)], texts=2),
        around([("<s>", 1)], [("</s>", 2)], texts=3),
        around([], [], texts=2),
        around([("<s>", 1)], [("</s>", 2)], texts=0),
        lambda t: t.update(post_processor={"type": "Sequence", "processors": [
            processor(), processor(again={"Sequence": {"id": "B", "type_id": 0}}),
        ]}),
    ],
    ids=["twice", "thrice", "twice, nothing around", "never", "twice in a sequence"],
)  # fmt: skip
def test_a_text_that_is_not_sent_once_and_whole_is_refused(change):
    with pytest.raises(PackageError, match=r"expected (it|each text) once"):
        margins_of(with_processor(change))


def test_a_tokenizer_may_know_words_of_its_own_alone():
    words = Tokenizer(models.WordLevel({"\u4e2d": 0, "\u6587": 1, "<s>": 2}, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    with pytest.raises(PackageError):  # it fails at others, as reading finds
        margins_of(PreTrainedTokenizerFast(tokenizer_object=words))
    words.model = models.WordPiece({"\u4e2d": 0, "\u6587": 1, "<s>": 2, "[UNK]": 3})
    assert margins_of(PreTrainedTokenizerFast(tokenizer_object=words)) == Margins((2,))


@pytest.mark.parametrize(
    ("name", "around_a_text", "shown"),
    [("minilm", Margins((101,), (102,)), ("'[CLS]'", "'[SEP]'")), ("smollm2-135m", Margins(), ())],
)
def test_real_tokenizers(name, around_a_text, shown):
    model, tokenizer = load_any(name)
    rows = len(model.get_input_embeddings().weight)
    read = tokenizer_from_files(tokenizer_files(tokenizer), rows=rows)
    for some in (tokenizer, read):
        found = margins_of(some)
        assert found == around_a_text
        assert shown_tokens(some, [*found.before, *found.after]) == shown
        for text in ("a [SEP] b", "\u2603 [UNK]", "<|endoftext|> a", "in 1999, it\n"):
            ids = torch.tensor(some(text)["input_ids"])
            bare = some(text, add_special_tokens=False)["input_ids"]
            assert found.content(ids).tolist() == bare


def test_shown_tokens_do_nothing_to_a_terminal():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\x1b[2J\u202e", "x" * 1000])
    odd, long = len(tokenizer) - 2, len(tokenizer) - 1
    assert shown_tokens(tokenizer, [odd, long, 5000]) == (
        "'\\x1b[2J\\u202e'", f"'{'x' * 40}'", "id 5000",
    )  # fmt: skip
    assert shown_tokens(tokenizer, [1] * 20)[-2:] == ("'<s>'", "and 12 more")
