"""Tasks of the lm-evaluation-harness: its own by name, and multiple choice from a JSONL file.

Importing this file imports the harness.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from pipeline.artefact import sha256_of_file
from pipeline.errors import InputError, UsageError
from pipeline.json_file import parse_json

_LOCAL_SUFFIX = ".jsonl"
_FIELDS = ("question", "choices", "answer")
# What the harness's own arc_easy.yaml says, for documents with `question`, `choices`, `answer`.
_LOCAL_CONFIG: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 1.0},
}


@dataclass(frozen=True)
class _Score:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: `acc`, `acc_norm`, ...; with the harness's filter behind it unless that is `none`.
        value: the metric.
        standard_error: the harness's own; None where it has none.
        samples: questions it is over; None for a group of tasks.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int | None


def load_tasks(specs: Sequence[str]) -> list[Task | Group]:
    """Build tasks, their data included.

    Args:
        specs: paths of JSONL files (`.jsonl`), or names that the harness knows.

    Raises:
        InputError: a file is missing or broken, a name is unknown, or a task's data is out of
            reach.
        UsageError: two tasks would have the same name.
    """
    named = [spec for spec in specs if not spec.endswith(_LOCAL_SUFFIX)]
    local = [_local_task(Path(spec)) for spec in specs if spec.endswith(_LOCAL_SUFFIX)]
    with _quiet_harness():
        tasks = local + [task for name in named for task in _named_tasks(name)]
    _refuse_duplicates(tasks)
    _refuse_special(tasks)
    return tasks


def _local_task(path: Path) -> ConfigurableTask:
    """The task, called after the file, that asks its questions as arc_easy asks its own.

    Raises:
        InputError: as `_read_questions`.
    """
    _read_questions(path)
    config = _LOCAL_CONFIG | {
        "task": path.stem,
        "custom_dataset": _questions_dataset,
        "dataset_kwargs": {"path": str(path)},
    }
    with _quiet_harness():
        return ConfigurableTask(config=config)


def file_hashes(specs: Sequence[str]) -> dict[str, str]:
    """Hex SHA-256 of each question file among the tasks."""
    files = (Path(spec) for spec in specs if spec.endswith(_LOCAL_SUFFIX))
    return {file.name: sha256_of_file(file) for file in files}


def _questions_dataset(path: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The questions of a JSONL file as the harness wants a dataset."""
    return {"test": datasets.Dataset.from_list(_read_questions(Path(path)))}


def _read_questions(path: Path) -> list[dict[str, Any]]:
    """Read a file of multiple-choice questions, one JSON object a line.

    Returns:
        Dicts of `question` (text), `choices` (two texts or more) and `answer` (index from 0).

    Raises:
        InputError: no such file, not UTF-8, empty, or a line that is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "The questions cannot be read.",
            where=path,
            observed=error,
            expected="a UTF-8 file of JSON lines, or a task name without .jsonl",
        ) from error
    questions = [
        _parse_question(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not questions:
        raise InputError("The file holds no question.", where=path, observed="no lines")
    return questions


def _parse_question(line: str, where: str) -> dict[str, Any]:
    """One line of a question file, checked.

    Raises:
        InputError: not JSON, a field missing or of another type, or an answer out of range.
    """
    value = parse_json(line, where)
    fields = {key: value.get(key) for key in _FIELDS} if isinstance(value, dict) else {}
    if not _is_question(*(fields.get(key) for key in _FIELDS)):
        raise InputError(
            "This line is not a multiple-choice question.",
            where=where,
            observed=", ".join(f"{key} {fields[key]!r:.60}" for key in fields) or f"{value!r:.60}",
            expected="question: text, choices: at least two texts, answer: index of the right "
            "choice, the first being 0",
        )
    return fields


def _is_question(question: object, choices: object, answer: object) -> bool:
    """Whether the three fields are what they must be."""
    return (
        isinstance(question, str)
        and isinstance(choices, list)
        and len(choices) >= 2
        and all(isinstance(choice, str) and choice for choice in choices)
        and type(answer) is int  # True is an int, too
        and 0 <= answer < len(choices)
    )


@functools.cache
def _known_tasks() -> TaskManager:
    """The index of the harness's own tasks; it reads 15 000 files, which takes some seconds."""
    return TaskManager()


def _named_tasks(name: str) -> list[Task | Group]:
    """What the harness has under a name: a task, a group, or the tasks of a tag.

    Raises:
        InputError: nothing, or its data is out of reach.
    """
    manager = _known_tasks()
    if name not in manager.all_tasks and not Path(name).is_file():
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise InputError(
            "The harness knows no such task.",
            observed=name,
            expected=f"perhaps {', '.join(near)}" if near else "a name that `lm-eval ls` lists",
            change="correct the name, or pass a .jsonl file of question, choices, answer",
        )
    try:
        loaded = manager.load([name])
    except Exception as error:  # datasets, the hub and each task's own code raise what they like
        text = str(error).strip().splitlines()
        raise InputError(
            "The task could not be loaded.",
            where=f"task {name}",
            observed=f"{type(error).__name__}: {text[0] if text else ''}",
            expected="its data in the local cache of `datasets`, or the Hugging Face hub in reach",
            change="check the network, or pass the questions as a .jsonl file",
        ) from error
    inside = {child for group in loaded["groups"].values() for child in group.child_names}
    return [
        item
        for kind in ("groups", "tasks")
        for key, item in loaded[kind].items()
        if key not in inside
    ]


def _refuse_duplicates(tasks: Sequence[Task | Group]) -> None:
    """Raise UsageError when two tasks have one name, since the harness would drop one."""
    names = [task.name if isinstance(task, Group) else task.task_name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            "Two tasks have the same name.",
            where="--tasks",
            observed=", ".join(twice),
            change="name each task once; a file's task is called after the file",
        )


def _refuse_special(tasks: Sequence[Task | Group]) -> None:
    """Raise InputError for tasks that run code which the model wrote, or that show it images."""
    leaves = [
        leaf
        for task in tasks
        for leaf in (task.get_all_tasks() if isinstance(task, Group) else [task])
    ]
    for leaf in leaves:
        for flag, what in (("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "shows images or sound")):
            if getattr(leaf, flag, False):
                raise InputError(
                    f"This task {what}, which skipcat does not do.",
                    where=f"task {leaf.task_name}",
                    change="leave it out",
                )


def score_tasks(
    model: LM, tasks: Sequence[Task | Group], *, limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    """Run the harness.

    Args:
        model: what is tested.
        tasks: of `load_tasks`.
        limit: first questions of each task only; None asks all.
        num_fewshot: solved examples before each question; None is the task's own number.

    Returns:
        What the harness's `simple_evaluate` returns.
    """
    with _quiet_harness():
        return simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            num_fewshot=num_fewshot,
        )


def scores_of(results: dict[str, Any]) -> list[_Score]:
    """The metrics in what the harness returned, in its order."""
    counts = results["n-samples"]
    return [
        _Score(
            task=task,
            metric=key.removesuffix(",none"),
            value=float(value),
            standard_error=_number_or_none(entries.get(_stderr_key(key))),
            samples=counts[task]["effective"] if task in counts else None,
        )
        for task, entries in results["results"].items()
        for key, value in entries.items()
        if "," in key and "_stderr," not in key and _number_or_none(value) is not None
    ]


def _stderr_key(key: str) -> str:
    """`acc,none` -> `acc_stderr,none`."""
    metric, filter_name = key.split(",", 1)
    return f"{metric}_stderr,{filter_name}"


def _number_or_none(value: object) -> float | None:
    """A number as float; None for the text `N/A`, which the harness puts where there is none."""
    return float(value) if isinstance(value, (int, float)) else None


def values_per_question(results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Task -> metric -> value of each question in order; two models can be compared by pairs."""
    found: dict[str, dict[str, list[float]]] = {}
    for task, samples in results["samples"].items():
        columns = found.setdefault(task, {})
        for sample in samples:
            for metric in sample["metrics"]:
                if _number_or_none(sample[metric]) is not None:
                    key = f"{metric},{sample['filter']}".removesuffix(",none")
                    columns.setdefault(key, []).append(float(sample[metric]))
    return found


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the harness's advice on its own flags off stderr, unless details were asked for."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    if logging.getLogger().level > logging.INFO:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
