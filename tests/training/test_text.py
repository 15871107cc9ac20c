import copy
import json
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blindtune.errors import ConfigError, DataError, ModelError
from blindtune.evaluation.utility.choices import read_items
from blindtune.training.dataset import IGNORED_LABEL
from blindtune.training.records import encoding, token_ids
from blindtune.training.text import DataConfig, TokenDataset, load_dataset_file, show_sample
from blindtune.training.windows import full_windows

WORDS = "the cat sat on the mat and the dog sat on the cat. " * 20


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def trained_text(data, tokenizer, index=0):
    example = data[index]
    return tokenizer.decode(example["input_ids"][example["labels"] != -100])


def test_plain_text_is_cut_into_windows_without_a_gap(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(WORDS)
    data = load_dataset_file(path, tokenizer, DataConfig(max_length=16))
    ids = tokenizer(WORDS)["input_ids"]
    assert torch.cat(data.input_ids).tolist() == ids[: len(ids) // 16 * 16]
    assert {len(row) for row in data.input_ids} == {16}
    assert data.trained_share == 1.0
    assert data.tokens == data.trained_tokens == len(data) * 16


def test_texts_are_joined_by_the_end_of_text(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"text": "the cat"}, {"text": " "}, {"text": "the dog"})
    joined = tokenizer("the cat<|end|>the dog")["input_ids"]
    data = load_dataset_file(path, tokenizer, DataConfig(max_length=len(joined)))
    assert data.input_ids[0].tolist() == joined
    apart = load_dataset_file(path, tokenizer, DataConfig(max_length=9, pack=False))
    assert tokenizer.batch_decode(apart.input_ids) == ["the cat<|end|>", "the dog<|end|>"]


def test_completion_alone_is_trained(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "the cat", "completion": " sat"})
    data = load_dataset_file(path, tokenizer, DataConfig())
    assert tokenizer.decode(data.input_ids[0]) == "the cat sat<|end|>"
    assert trained_text(data, tokenizer) == " sat<|end|>"


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_end(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": WORDS + " the dog", "completion": " sat"},
        {"prompt": "the dog", "completion": WORDS},
    )
    data = load_dataset_file(path, tokenizer, DataConfig(max_length=8))
    assert trained_text(data, tokenizer) == " sat<|end|>"
    assert tokenizer.decode(data.input_ids[0]).endswith(" the dog sat<|end|>")
    assert int((data.labels[1] != -100).sum()) == 7
    assert {len(row) for row in data.input_ids} == {8}


def test_multiple_choice_trains_the_right_choice(tmp_path, tokenizer):
    record = {"question": "who sat?", "choices": ["the dog", "the cat"], "label": 1}
    data = load_dataset_file(write(tmp_path / "a.jsonl", record), tokenizer, DataConfig())
    assert tokenizer.decode(data.input_ids[0]) == "Question: who sat?\nAnswer: the cat<|end|>"
    assert trained_text(data, tokenizer) == " the cat<|end|>"


HUB = {"text": ["the dog", "the cat"], "label": ["1", "2"]}
SAID = [
    {"question": "who sat?", "choices": HUB["text"], "label": 1},
    {"question": "who sat?", "choices": HUB["text"], "label": "B"},
    {"question": "who sat?", "choices": HUB["text"], "answerKey": "B"},
    {"question": "who sat?", "choices": HUB, "answerKey": "2"},
]


@pytest.mark.parametrize("record", SAID)
def test_tuning_and_scoring_read_multiple_choice_alike(tmp_path, tokenizer, record):
    path = write(tmp_path / "a.jsonl", record)
    data = load_dataset_file(path, tokenizer, DataConfig())
    (item,) = read_items(path)
    right = item.prompt + item.continuations[item.label]
    assert tokenizer.decode(data.input_ids[0]) == right + "<|end|>"
    assert right == "Question: who sat?\nAnswer: the cat"


CONVERSATION = [
    {"role": "user", "content": "who sat?"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "the cat"},
]


def test_assistant_turns_alone_are_trained(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    data = load_dataset_file(path, tokenizer, DataConfig())
    assert trained_text(data, tokenizer) == "the cat<|end|>the cat<|end|>"
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(data.input_ids[0]) == rendered


@pytest.mark.parametrize("template", [None, "marked"])
def test_a_long_conversation_keeps_an_assistant_turn(tmp_path, tokenizer, template):
    template = template and MARKED
    path = write(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    whole = load_dataset_file(path, tokenizer, DataConfig(chat_template=template))
    ids = whole.input_ids[0].tolist()
    trained = (whole.labels[0] != -100).tolist()
    first = trained.index(True)
    last = trained.index(False, first)
    for length in range(2, len(ids) + 1):
        config = DataConfig(max_length=length, chat_template=template)
        data = load_dataset_file(path, tokenizer, config)
        end = max(length, min(last, first + length - 1))
        assert data.input_ids[0].tolist() == ids[end - length : end]
        assert (data.labels[0] != -100).tolist() == trained[end - length : end]
        if length > last - first:
            assert trained_text(data, tokenizer).startswith("the cat<|end|>")
        assert data.truncated == (length < len(ids))


def test_what_was_left_out_and_cut_is_told(tmp_path, tokenizer):
    nobody = {"messages": CONVERSATION[:1]}
    long = {"messages": [{"role": "user", "content": WORDS}, CONVERSATION[1]]}
    path = write(tmp_path / "a.jsonl", nobody, *[{"messages": CONVERSATION}] * 3, long)
    data = load_dataset_file(path, tokenizer, DataConfig(max_length=64))
    assert (len(data), data.dropped, data.truncated) == (4, 1, 1)
    told = "in 3 examples; left out, with none: 1; cut at max_length: 1"
    train, _ = data.split(0.25, seed=0)
    assert show_sample(train, tokenizer).endswith(told)
    path = write(tmp_path / "b.jsonl", {"messages": CONVERSATION}, nobody, nobody)
    with pytest.raises(
        DataError, match=r"b.jsonl: .* 2 of 3 examples have none.*larger max_length"
    ):
        load_dataset_file(path, tokenizer, DataConfig())


def test_cut_examples_are_counted(tmp_path, tokenizer):
    short, long = {"prompt": "the", "completion": " cat"}, {"prompt": "the", "completion": WORDS}
    path = write(tmp_path / "a.jsonl", short, long, {"prompt": WORDS, "completion": " sat"})
    assert load_dataset_file(path, tokenizer, DataConfig(max_length=16)).truncated == 2
    exact = load_dataset_file(path, tokenizer, DataConfig(max_samples=1)).tokens
    data = load_dataset_file(path, tokenizer, DataConfig(max_samples=1, max_length=exact))
    assert data.truncated == 0
    path = write(tmp_path / "b.jsonl", {"text": "the cat"}, {"text": WORDS})
    data = load_dataset_file(path, tokenizer, DataConfig(max_length=16, pack=False))
    assert data.truncated == 1


MARKED = (
    "{% for m in messages %}{{ m['role'] }}:\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


def test_the_templates_own_marks_are_used(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    data = load_dataset_file(path, tokenizer, DataConfig(chat_template=MARKED))
    assert trained_text(data, tokenizer) == "the cat<|end|>the cat<|end|>"


def test_of_several_chat_templates_the_default_is_taken(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": MARKED, "tool_use": "{{ 1 / 0 }}"}
    data = load_dataset_file(path, several, DataConfig())
    wanted = load_dataset_file(path, tokenizer, DataConfig(chat_template=MARKED))
    assert data.fingerprint() == wanted.fingerprint()
    several.chat_template = {"tool_use": MARKED, "rag": MARKED}
    for nameless, found in ((several, "rag, tool_use"), (copy.deepcopy(tokenizer), "none")):
        if nameless is not several:
            nameless.chat_template = None
        with pytest.raises(DataError, match=rf"a.jsonl:1: .*got {found}: set chat_template"):
            load_dataset_file(path, nameless, DataConfig())


contents = st.text(alphabet="the cat\n <|>é", min_size=1, max_size=12)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(contents, min_size=2, max_size=6))
def test_any_conversation_trains_just_what_the_assistant_says(tmp_path, tokenizer, turns):
    """Bytes of the trained tokens against the conversation itself."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    data = load_dataset_file(path, tokenizer, DataConfig(max_length=10_000))
    said = "".join(text + "<|end|>" for text in turns[1::2])
    trained = trained_text(data, tokenizer)
    # A token that begins in the prompt's last line break is not the assistant's.
    assert trained.replace("\n", "") == said.replace("\n", "")


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    with pytest.raises(DataError, match=r"a.jsonl:1: .*turn 2 differently"):
        load_dataset_file(path, tokenizer, DataConfig(chat_template=template))


def test_what_a_template_refuses_is_a_data_error(tmp_path, tokenizer):
    template = "{{ raise_exception('no system role') }}"
    path = write(tmp_path / "a.jsonl", {"messages": CONVERSATION})
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template refuses.*no system role"):
        load_dataset_file(path, tokenizer, DataConfig(chat_template=template))


def test_csv_parquet_and_json_read_the_same(tmp_path, tokenizer):
    import datasets

    records = [{"prompt": f"the {n}", "completion": f" cat {n}"} for n in ("one", "two")]
    table = datasets.Dataset.from_list(records)
    datasets.disable_progress_bars()
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    datasets.enable_progress_bars()
    (tmp_path / "a.json").write_text(json.dumps(records))
    write(tmp_path / "a.jsonl", *records)
    wanted = {
        load_dataset_file(tmp_path / f"a.{kind}", tokenizer, DataConfig()).fingerprint()
        for kind in ("csv", "parquet", "json", "jsonl")
    }
    assert len(wanted) == 1


def test_a_hub_name_goes_to_the_library(monkeypatch, tokenizer):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return [{"text": WORDS}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("owner/name", "squad_v1.1"):
        load_dataset_file(name, tokenizer, DataConfig(max_length=8, split="test"))
        assert asked.pop() == ((name,), {"name": None, "split": "test"})


@pytest.mark.parametrize(
    "name",
    [
        "train.tsv",
        "patients/merger",
        "patients/merger.xlsx",
        "a.CSV",
        "train.jsnol",
        "a.jsonl.xz",
        "C:\\me\\patients",
    ],
)
def test_a_mistyped_file_stays_at_home(tmp_path, monkeypatch, tokenizer, name):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patients").mkdir()
    with pytest.raises(DataError, match="expected a data file, there is none"):
        load_dataset_file(name, tokenizer, DataConfig())


BAD = {
    "missing.jsonl": (None, "missing.jsonl: expected a data file, there is none"),
    "dir/missing.xyz/a": (None, "expected a data file, there is none"),
    "a.pdf": (b"x", "ending in .txt.*got .pdf"),
    "empty.jsonl": (b"", "empty.jsonl: expected data, the file is empty"),
    "blank.jsonl": (b"\n\n", "blank.jsonl: expected records, the file is empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken.jsonl:2: expected JSON, got"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', r"list.jsonl:2: expected an object, got list"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: expected JSON"),
    "half.jsonl": (
        b'{"text": "a"}\n{"text": "b \\ud83d"}\n',
        r"half.jsonl:2: .*half of a surrogate pair \(\\ud83d\)",
    ),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl:2: expected UTF-8.*byte 11"),
    "latin.txt": (b"caf\xe9", "latin.txt: expected UTF-8 text, byte 4"),
    "columns.jsonl": (b'{"body": "a", "id": 1}\n', "columns.jsonl:1: .*'text'.*found 'body', 'id'"),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl:1: expected a string in 'text', got int"),
    "other.jsonl": (
        b'{"prompt": "a", "completion": "b"}\n{"text": "a"}\n',
        "other.jsonl:2: .*columns of the first",
    ),
    "label.jsonl": (
        b'{"question": "a", "choices": ["b", "c"], "label": 2}\n',
        "label.jsonl:1: expected `label` to be an index from 0 to 1 or the name of .*, got int",
    ),
    "choices.jsonl": (
        b'{"question": "a", "choices": "b", "label": 0}\n',
        "list of two or more strings",
    ),
    "messages.jsonl": (b'{"messages": [{"role": "user"}]}\n', "messages.jsonl:1: .*role, content"),
    "nobody.jsonl": (
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        "nobody.jsonl: expected tokens to train on, but 1 of 1 examples have none",
    ),
    "short.txt": (b"the cat", r"short.txt: one window needs 128 tokens, the text has \d"),
    "records.json": (b'[{"text": "a"}, 3]', "records.json, record 2: expected an object, got int"),
    "broken.parquet": (b"PAR1 no", "broken.parquet: expected a data file"),
    "rows.csv": (b"text,id\nthe cat,1\n,2\n", "rows.csv, row 2: expected a string in 'text'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, tokenizer, name):
    content, message = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset_file(path, tokenizer, DataConfig())
    assert "\n" not in str(caught.value)


def test_whole_surrogate_pairs_are_characters(tmp_path, tokenizer):
    path = tmp_path / "whole.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00 a cat"}\n')
    assert len(load_dataset_file(path, tokenizer, DataConfig(max_length=4, pack=False))) == 1


def test_a_tokenizer_that_fails_at_some_text_is_to_blame():
    backend = Tokenizer(models.WordLevel({"cat": 0, "<e>": 1}, unk_token="<missing>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    assert token_ids("cat cat", tokenizer) == [0, 0]
    with pytest.raises(ModelError, match=r"this one fails at some .*UNK"):
        token_ids("cat dog", tokenizer)
    with pytest.raises(KeyboardInterrupt), encoding():
        raise KeyboardInterrupt


def test_a_directory_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="got a directory"):
        load_dataset_file(tmp_path, tokenizer, DataConfig())


def test_limits(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *[{"prompt": "the", "completion": " cat"}] * 9)
    assert len(load_dataset_file(path, tokenizer, DataConfig(max_samples=4))) == 4
    assert load_dataset_file(path, tokenizer, DataConfig(max_tokens=7)).tokens <= 7
    text = tmp_path / "a.txt"
    text.write_text(WORDS)
    assert load_dataset_file(text, tokenizer, DataConfig(max_length=8, max_tokens=20)).tokens == 16


@pytest.mark.parametrize("wrong", [{"max_length": 1}, {"validation_split": 1.0}, {"max_tokens": 0}])
def test_config_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DataConfig(**wrong)


def rows(*lengths):
    ids = [torch.arange(n) for n in lengths]
    return TokenDataset(ids, ids)


def test_split_is_seeded_and_complete():
    data = rows(*range(2, 22))
    train, validation = data.split(0.25, seed=1)
    assert len(validation) == 5
    lengths = sorted(len(row) for part in (train, validation) for row in part.input_ids)
    assert lengths == list(range(2, 22))
    assert data.split(0.25, seed=1)[0].fingerprint() == train.fingerprint()
    assert data.split(0.25, seed=2)[0].fingerprint() != train.fingerprint()
    assert [len(part) for part in rows(2, 3).split(0.01, seed=0)] == [1, 1]
    with pytest.raises(DataError, match=r"needs 2 examples, got 1: .*validation_split 0"):
        rows(3).split(0.5, seed=0)


def test_copies_of_an_example_stay_together():
    data, times = rows(*[2] * 3, *range(3, 13)), set()
    for seed in range(20):
        train, validation = data.split(0.3, seed=seed)
        assert len(train) + len(validation) == 13
        assert 2 <= len(validation) <= 4
        assert len(validation.without(train)) == len(validation)
        times.add(train.count(data.input_ids[0]))
    assert times == {0, 3}
    train, validation = rows(2, 2, 2, 2).split(0.25, seed=0)  # nothing else is there
    assert (len(train), len(validation)) == (3, 1)
    assert validation.without(train) is None


def test_examples_are_told_apart_by_a_few_bytes_each():
    ids, other = torch.arange(500), torch.arange(500)
    other[:9] = IGNORED_LABEL
    data = TokenDataset([ids, ids.clone(), ids], [ids, ids.clone(), other])
    first, copy, context = data._marks()
    assert first == copy != context
    assert {len(first), len(context)} == {16}


def slow_split(data, fraction, seed):
    """Which examples are set aside, as the docstring of `split` says it."""
    count = min(max(1, round(fraction * len(data))), len(data) - 1)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [ids.tolist() for ids in data.input_ids]
    aside = []
    for i in order:
        copies = [j for j, row in enumerate(rows) if row == rows[i]]
        if i not in aside and len(aside) + len(copies) <= count:
            aside += copies
    return sorted(aside or order[:count])


@given(
    counts=st.lists(st.integers(1, 5), min_size=2, max_size=8),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_a_split_is_what_its_description_says(counts, fraction, seed):
    data = rows(*[length for length, count in enumerate(counts, 2) for _ in range(count)])
    _, validation = data.split(fraction, seed)
    wanted = [len(data.input_ids[i]) for i in slow_split(data, fraction, seed)]
    assert [len(ids) for ids in validation.input_ids] == wanted


def test_many_copies_are_split_in_time():
    """Each example is asked for once, not once for each of its copies."""
    data = rows(*[2] * 30_000, *range(3, 20))
    start = time.process_time()
    train, validation = data.split(0.1, seed=0)
    assert time.process_time() - start < 5
    assert len(train) + len(validation) == len(data)


def test_examples_without_a_target_are_left_out():
    labels = [torch.tensor([5, -100]), torch.tensor([-100, 6])]
    data = TokenDataset([torch.tensor([5, 6])] * 2, labels)
    assert len(data) == 1


def test_the_sample_marks_the_trained_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "the [cat]", "completion": " sat é"})
    data = load_dataset_file(path, tokenizer, DataConfig())
    sample = show_sample(data, tokenizer)
    assert sample.splitlines()[0] == "the [cat]« sat é<|end|>»"
    share = f"{data.trained_tokens} of {data.tokens} ({data.trained_share:.1%}) in 1 examples"
    assert sample.splitlines()[1] == f"trained tokens: {share}"
    colours = show_sample(data, tokenizer, markup=True)
    assert "the \\[cat][bold green] sat é<|end|>[/bold green]" in colours
    long = write(tmp_path / "b.jsonl", {"prompt": WORDS, "completion": WORDS})
    read = load_dataset_file(long, tokenizer, DataConfig(max_length=512))
    cut = show_sample(read, tokenizer, max_tokens=20)
    assert cut.startswith("… ")
    assert "«" in cut
    assert len(cut) < 300


def test_records_are_joined_where_windows_are_wanted(tmp_path, tokenizer):
    rows = [{"prompt": "the cat", "completion": f" sat {i}"} for i in range(40)]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = DataConfig(max_length=32)
    examples = load_dataset_file(path, tokenizer, reading)
    assert max(len(ids) for ids in examples.input_ids) < 32
    windows_NL = full_windows(path, tokenizer, reading)
    joined = torch.cat(examples.input_ids)[: windows_NL.numel()]
    assert torch.equal(windows_NL.flatten(), joined)
    assert len(windows_NL) == examples.tokens // 32
    with pytest.raises(DataError, match=f"got {examples.tokens}: give more text"):
        full_windows(path, tokenizer, reading, least=len(windows_NL) + 1)
