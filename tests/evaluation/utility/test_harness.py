import json
import sys

import pytest

from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.utility.choices import Item, multiple_choice
from blindtune.evaluation.utility.harness import run_tasks

WORDS = ("stone", "rain", "a river", "light and air", "smoke", "iron", "the sea", "dust")
ITEMS = [
    Item(
        question=f"Which of these is number {n}, {WORDS[n % 8]}?",
        choices=tuple(WORDS[(n * k) % 8] + "s" * (k % 3) for k in range(1, 3 + n % 3)),
        label=n % 2,
    )
    for n in range(1, 25)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_harness_and_multiple_choice_agree(llama, tokenizer, tmp_path, offline):
    data = tmp_path / "items.jsonl"
    rows = ({"question": i.question, "choices": i.choices, "label": i.label} for i in ITEMS)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "ours.yaml"
    task.write_text(TASK.format(name="ours", data=data))
    (result,) = run_tasks(llama, tokenizer, [str(task)])
    own = multiple_choice(llama, tokenizer, ITEMS)
    assert (result.task, result.items) == ("ours", 24)
    assert result.metrics["acc"] == pytest.approx(own.accuracy)
    assert result.metrics["acc_norm"] == pytest.approx(own.accuracy_normalised)
    assert result.standard_errors["acc"] == pytest.approx(own.standard_error)
    assert 0 < own.accuracy < 1
    assert own.accuracy != own.accuracy_normalised


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_data_that_cannot_be_had(llama, tokenizer, tmp_path, offline):
    task = tmp_path / "absent.yaml"
    task.write_text(TASK.format(name="absent", data=tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"absent\.yaml: its data could not be had: .*absent"):
        run_tasks(llama, tokenizer, [str(task)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_hub_data_that_cannot_be_had(llama, tokenizer, tmp_path, offline):
    task = tmp_path / "hub.yaml"
    text = TASK.format(name="hub", data="x").replace("path: json", "path: nobody/nothing")
    task.write_text(text)
    with pytest.raises(DataError, match="its data could not be had"):
        run_tasks(llama, tokenizer, [str(task)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_broken_yaml(llama, tokenizer, tmp_path, offline):
    task = tmp_path / "broken.yaml"
    task.write_text("task: [")
    with pytest.raises(DataError, match=r"broken\.yaml: lm-evaluation-harness could not run it"):
        run_tasks(llama, tokenizer, [str(task)])


def test_missing_yaml(llama, tokenizer, tmp_path):
    with pytest.raises(DataError, match="expected a task's YAML"):
        run_tasks(llama, tokenizer, [str(tmp_path / "none.yaml")])


def test_missing_extra(llama, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'blindtune\[lm-eval\]'"):
        run_tasks(llama, tokenizer, ["arc_easy"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_unknown_names_are_refused(llama, tokenizer, monkeypatch):
    class Index:
        all_tasks = ("arc_easy", "piqa")

        def __init__(self, **options):
            assert options["include_defaults"]

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    with pytest.raises(ConfigError, match="no task 'arc_esy'; did you mean arc_easy"):
        run_tasks(llama, tokenizer, ["arc_esy"])
