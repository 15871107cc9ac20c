"""What `evaluate` refuses, and what it hands on."""

import json

import pytest
from rich.console import Console

from blindtune.cli.evaluate import show
from blindtune.errors import ConfigError
from blindtune.evaluation.utility import evaluating
from blindtune.evaluation.utility.evaluating import EvaluationConfig, evaluate
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models with learned positions and with none (BLOOM), and text."""
    place = tmp_path_factory.mktemp("evaluating")
    for name in ("gpt2", "opt", "bloom"):
        tiny_model(name).save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    (place / "text.txt").write_text("the cat sat on the mat. " * 40)
    return place


@pytest.mark.parametrize("name", ["max_tokens", "max_items", "max_length", "batch_size"])
def test_nothing_of_something_is_refused(name):
    with pytest.raises(ConfigError, match=rf"expected {name} >= \d, got 0"):
        EvaluationConfig(**{name: 0})


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_windows_longer_than_the_model_reads_are_refused(place, name):
    with pytest.raises(ConfigError, match=r"max_length up to 128, .* got 129: .*--max-length 128"):
        evaluate(place / name, data=place / "text.txt", config=EvaluationConfig(max_length=129))
    longest = EvaluationConfig(max_length=128)
    assert evaluate(place / name, data=place / "text.txt", config=longest).perplexity is not None


def test_a_model_without_a_limit_reads_any_length(place):
    config = EvaluationConfig(max_length=300)
    found = evaluate(place / "bloom", data=place / "text.txt", config=config).perplexity
    assert found.tokens == 3 * 299


def test_records_that_were_cut_or_left_out_are_told(place, capsys):
    records = [("the cat", " sat"), ("the cat " * 20, " sat"), ("", ""), ("the dog", " sat")]
    (place / "records.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in records)
    )
    config = EvaluationConfig(max_length=32)
    found = evaluate(place / "gpt2", data=place / "records.jsonl", config=config)
    assert (found.facts()["truncated"], found.facts()["dropped"]) == (1, 1)
    show(found.facts(), Console(width=200))
    told = capsys.readouterr().out
    assert "1 cut at max_length (--max-length)" in told
    assert "1 left out, with nothing to score" in told
    whole = evaluate(place / "gpt2", data=place / "text.txt", config=config)
    assert (whole.truncated, whole.dropped) == (0, 0)
    show(whole.facts(), Console(width=200))
    told = capsys.readouterr().out
    assert "cut at" not in told
    assert "left out" not in told


def test_tasks_run_in_batches_of_the_asked_size(place, monkeypatch):
    asked = []

    def run_tasks(model, tokenizer, tasks, **options):
        asked.append((tasks, options))
        return []

    monkeypatch.setattr(evaluating, "run_tasks", run_tasks)
    config = EvaluationConfig(tasks=("a", "b"), batch_size=3, max_items=5)
    evaluate(place / "gpt2", config=config)
    assert asked == [(("a", "b"), {"batch_size": 3, "limit": 5})]
