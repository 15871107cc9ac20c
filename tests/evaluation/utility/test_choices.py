import copy
import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from blindtune.errors import DataError
from blindtune.evaluation.utility.choices import Item, log_likelihoods, multiple_choice, read_items

ITEMS = [
    Item(question="What falls?", choices=("a stone", "light", "a very long thought"), label=0),
    Item(question="What rises?", choices=("smoke", "lead"), label=0),
    Item(question="Which one?", choices=("this", "that", "both", "neither"), label=3),
    Item(question="What falls?", choices=("rain", "a bird"), label=1),
    Item(question="Why does a river find the sea?", choices=("x", "y"), label=1),
]


def oracle(model, tokenizer, question, choice):
    """The choice alone behind its prompt, one forward pass, token by token."""
    prompt = tokenizer.encode(f"Question: {question}\nAnswer:")
    ids = tokenizer.encode(f"Question: {question}\nAnswer: {choice}")
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))


def test_matches_the_oracle_in_every_family(any_model, tokenizer):
    result = multiple_choice(any_model, tokenizer, ITEMS, batch_size=2)
    right = normalised = 0
    for item, answer in zip(ITEMS, result.answers, strict=True):
        scores = [oracle(any_model, tokenizer, item.question, c) for c in item.choices]
        assert answer.log_likelihoods == pytest.approx(scores, rel=1e-4)
        right += scores.index(max(scores)) == item.label
        per_character = [s / len(c) for s, c in zip(scores, item.choices, strict=True)]
        normalised += per_character.index(max(per_character)) == item.label
    assert (result.accuracy, result.accuracy_normalised) == (right / 5, normalised / 5)
    p = right / 5
    assert result.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 4))


def test_batch_size_changes_nothing(llama, tokenizer):
    one = multiple_choice(llama, tokenizer, ITEMS, batch_size=1)
    many = multiple_choice(llama, tokenizer, ITEMS, batch_size=50)
    for a, b in zip(one.answers, many.answers, strict=True):
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, rel=1e-5)


def test_the_prompt_runs_once(llama, tokenizer):
    tokens = []
    llama.model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: tokens.append(inputs[0].numel())
    )
    multiple_choice(llama, tokenizer, ITEMS[:1])
    assert tokens[0] == len("Question: What falls?\nAnswer:")
    assert tokens[1:] == [3 * (len(" a very long thought") - 1)]


def test_single_token_continuations(llama):
    pairs = [((1, 2, 3), (4,)), ((9, 8), (7,)), ((1, 2, 3), (5,))]
    with torch.no_grad():
        expected = [
            float(llama(input_ids=torch.tensor([p])).logits[0, -1].log_softmax(-1)[c[0]])
            for p, c in pairs
        ]
    assert log_likelihoods(llama, pairs) == pytest.approx(expected, rel=1e-5)


def test_long_prompts_lose_their_beginning(llama, tokenizer):
    item = Item(question="w" * 200, choices=("ab", "a longer one"), label=0)
    answer = multiple_choice(llama, tokenizer, [item]).answers[0]
    for choice, score in zip(item.choices, answer.log_likelihoods, strict=True):
        ids = tokenizer.encode(f"Question: {item.question}\nAnswer: {choice}")[-129:]
        with torch.no_grad():
            log_probs = llama(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        length = len(choice) + 1
        expected = sum(float(log_probs[t - 1, ids[t]]) for t in range(129 - length, 129))
        assert score == pytest.approx(expected, rel=1e-4)
    too_long = Item(question="?", choices=("c" * 200, "d"), label=0)
    with pytest.raises(DataError, match="choice of 1 to 127 tokens"):
        multiple_choice(llama, tokenizer, [too_long])


def test_an_end_token_of_the_tokenizers_own_is_not_scored(llama, tokenizer):
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ending.eos_token_id)]
    )
    assert ending.encode("a") == [*tokenizer.encode("a"), ending.eos_token_id]
    wanted = multiple_choice(llama, tokenizer, ITEMS).answers
    assert multiple_choice(llama, ending, ITEMS).answers == wanted


def test_no_items(llama, tokenizer):
    with pytest.raises(DataError, match="at least one"):
        multiple_choice(llama, tokenizer, [])


def test_read_items_in_every_shape(tmp_path):
    path = tmp_path / "items.jsonl"
    listed = {"question": "q", "choices": ["a", "b\u2028c"], "label": 1}
    lettered = {"question": "q", "choices": ["a", "b"], "label": "B"}
    hub = {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    lines = [json.dumps(listed, ensure_ascii=False), "", json.dumps(lettered), json.dumps(hub)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = read_items(path)
    assert [item.label for item in items] == [1, 1, 1]
    assert items[0].choices == ("a", "b\u2028c")
    assert items[2] == Item(question="q", choices=("a", "b"), label=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "jsonl:2: expected JSON"),
        ("[1]", "jsonl:2: .*object, got list"),
        ('{"question": "\\udc00", "choices": ["a", "b"], "label": 0}', "jsonl:2: .*surrogate"),
        ('{"choices": ["a", "b"], "label": 0}', "jsonl:2: .*'question'"),
        ('{"question": "q", "choices": ["a"], "label": 0}', "jsonl:2: .*two or more"),
        ('{"question": "q", "choices": ["a", ""], "label": 0}', "jsonl:2: .*not empty"),
        ('{"question": "q", "choices": ["a", 3], "label": 0}', "jsonl:2: .*not empty"),
        ('{"question": "q", "choices": ["a", "b"], "label": 2}', "jsonl:2: .*from 0 to 1"),
        ('{"question": "q", "choices": ["a", "b"], "label": true}', "jsonl:2: .*got bool"),
        (
            '{"question": "q", "choices": ["a", "b"], "label": "C"}',
            "jsonl:2: .*got a string of 1",
        ),
        ('{"question": "q", "choices": ["a", "b"]}', "jsonl:2: .*got nothing"),
        (
            '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "label": "A"}',
            "jsonl:2: .*as many",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "q", "choices": ["a", "b"], "label": 0}\n' + line)
    with pytest.raises(DataError, match=message):
        read_items(path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        read_items(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        read_items(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_items(tmp_path / "binary.jsonl")
    for hostile in ("[" * 200_000, '{"question": ' + "9" * 10_000 + "}"):
        (tmp_path / "hostile.jsonl").write_text(hostile)
        with pytest.raises(DataError, match="jsonl:1: expected JSON"):
            read_items(tmp_path / "hostile.jsonl")
