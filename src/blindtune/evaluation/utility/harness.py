"""lm-evaluation-harness on a model that is already built: its tasks by name, or a YAML file.

A task's YAML may name Python functions (``!function``), which are run: use your own files only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.utility.loss import scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What the harness measured on one task or group."""

    task: str
    metrics: dict[str, float]
    """Such as ``acc``, ``acc_norm``, ``perplexity``, as the harness computes them; a filter other
    than ``none`` stands behind a comma."""
    standard_errors: dict[str, float]
    """Of the metrics that have one."""
    items: int | None
    """Documents scored; None for a group."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
) -> list[TaskResult]:
    """Run tasks of lm-evaluation-harness on a model in this process.

    Args:
        model: any decoder with a language-model head.
        tokenizer: the model's own.
        tasks: names (``arc_easy``; the index of names takes some seconds) or paths of YAML files.
            Paths inside a YAML file count from the working directory.
        batch_size: requests per forward pass.
        limit: use only the first so many documents of every task.

    Raises:
        ConfigError: the extra is not installed, or a task is unknown.
        DataError: a task's YAML or its data could not be had.
    """
    local = [task for task in tasks if Path(task).suffix in {".yaml", ".yml"}]
    for task in local:
        if not Path(task).is_file():
            raise DataError(f"expected a task's YAML file at {task}, found none")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "evaluation by task needs lm-evaluation-harness: pip install 'blindtune[lm-eval]'"
        ) from error
    manager = TaskManager(include_defaults=len(local) < len(tasks))
    for task in tasks:
        if task not in local:
            _require_known(task, manager.all_tasks)
    with scoring(model), _translated(tasks):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
        )
    counts = results.get("n-samples", {})
    return [
        _result(task, values, counts.get(task, {}).get("effective"))
        for task, values in results["results"].items()
    ]


def _require_known(task: str, known: Sequence[str]) -> None:
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "give a name or a YAML file"
        raise ConfigError(f"lm-evaluation-harness has no task {task!r}; {hint}")


@contextmanager
def _translated(tasks: Sequence[str]) -> Iterator[None]:
    """Turn what happens when a task's definition or data is missing into a DataError."""
    import yaml
    from datasets.exceptions import DatasetsError

    def first_line(error: Exception) -> str:
        return (str(error).strip() or type(error).__name__).splitlines()[0]

    names = ", ".join(tasks)
    try:
        yield
    except (OSError, DatasetsError) as error:
        raise DataError(
            f"{names}: its data could not be had: {first_line(error)}; check the task's files, "
            "or run once with network access"
        ) from error
    except (yaml.YAMLError, KeyError, ValueError) as error:
        raise DataError(
            f"{names}: lm-evaluation-harness could not run it: {first_line(error)}; check the "
            "task's YAML and the fields of its data"
        ) from error


def _result(task: str, values: dict[str, Any], items: int | None) -> TaskResult:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        name, _, variant = key.partition(",")
        if not variant or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        label = name.removesuffix("_stderr") + ("" if variant == "none" else f",{variant}")
        (errors if name.endswith("_stderr") else metrics)[label] = float(value)
    return TaskResult(task=task, metrics=metrics, standard_errors=errors, items=items)
