"""Score one model, on whatever backend: harness tasks, perplexity, closeness to another, answers.

Everything goes through the Session interface, so that the numbers of two backends compare.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.errors import InputError, MissingPackageError, UsageError
from pipeline.provenance import provenance, public_name
from pipeline.runtime.generate import answer
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.tokenizer import chat_prompt_ids
from pipeline.workers.workers import IN_PROCESS, Workers
from validate.metrics import log_perplexity_change, perplexity_with_error, standard_error
from validate.quality import Quality
from validate.subject import ModelPlace, Subject

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

_SCHEMA = 1
_Tell = Callable[[str], None]


@dataclass(frozen=True)
class EvaluateRequest:
    """What to measure, and of what.

    Attributes:
        model: folder of an ONNX export or a checkpoint, or any name that `compress` takes.
        backend: `auto`, `torch` or `onnx`.
        tasks: names of harness tasks, or paths of JSONL files.
        limit: first questions of each task only.
        num_fewshot: solved examples before each question; None is each task's own number.
        max_rows: rows of a task in one call of the session.
        text: UTF-8 file for perplexity and closeness.
        windows: how many, from its beginning.
        window_length: tokens in each.
        reference: the model to be close to; needs `text`.
        prompts: to be answered greedily.
        raw: prompts go in as they are, without a chat template.
        max_new_tokens: longest answer to a prompt.
        threads: of ONNX Runtime.
        trust_remote_code: let the models' own Python code run.
    """

    model: str
    backend: str = "auto"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    max_rows: int = 4
    text: Path | None = None
    windows: int = 10
    window_length: int = 2048
    reference: str | None = None
    prompts: tuple[str, ...] = ()
    raw: bool = False
    max_new_tokens: int = 64
    threads: int | None = None
    trust_remote_code: bool = False


def evaluate(
    request: EvaluateRequest, tell: _Tell, workers: Workers = IN_PROCESS
) -> dict[str, Any]:
    """Measure all that is asked for.

    The tasks and the text are looked at before the weights are read.

    Args:
        request: what to measure.
        tell: is given lines of progress.
        workers: who measures the windows of the text; each opens the models for itself.

    Returns:
        The record, fit for JSON; the keys `tasks`, `perplexity`, `reference` and `answers` are
        None or empty where nothing was asked.

    Raises:
        UsageError: nothing to measure, or flags that contradict each other.
        InputError: a model, task or text that cannot be used.
        MissingPackageError: tasks without lm-eval, or an export without ONNX Runtime.
    """
    _require_sensible(request)
    tasks = _load_tasks(request.tasks) if request.tasks else []
    tell(f"loading {request.model}")
    subject = _open_as(request, request.model, request.backend, workers)
    record: dict[str, Any] = {
        "schema": _SCHEMA,
        "model": public_name(request.model),
        "backend": subject.facts.name,
        "settings": {key: _jsonable(key, value) for key, value in asdict(request).items()},
        "provenance": provenance(),
        "perplexity": None,
        "reference": None,
        "tasks": None,
        "answers": [],
    }
    if request.text is not None:
        record |= _measure_text(request, subject, workers, tell)
    if tasks:
        record["tasks"] = _measure_tasks(request, subject, tasks, tell)
    for prompt in request.prompts:
        record["answers"].append(_measure_answer(request, subject, prompt))
    return record | {"computed_by": workers.describe()}


def _require_sensible(request: EvaluateRequest) -> None:
    """Raise UsageError for a request without anything to do, or with half of something.

    Raises:
        InputError: the text is not there.
    """
    if not (request.tasks or request.prompts or request.text):
        raise UsageError("There is nothing to measure.", change="pass --tasks, --text or --prompt")
    if request.reference is not None and request.text is None:
        raise UsageError(
            "--reference compares two models on a text.", change="pass --text, or leave it out"
        )
    if request.text is not None and not request.text.is_file():
        raise InputError(
            "The text cannot be read.",
            where=request.text,
            observed="no such file",
            expected="a UTF-8 text file that neither model was calibrated on",
        )


def _load_tasks(specs: tuple[str, ...]) -> list[Task | Group]:
    """The harness's task objects.

    Raises:
        MissingPackageError: lm-eval is not installed.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise MissingPackageError("lm-eval", "eval", "score tasks") from error
    from validate import harness_tasks

    return harness_tasks.load_tasks(specs)


def _jsonable(name: str, value: Any) -> Any:
    """A setting as JSON has it: a path by its last name alone."""
    if name == "tasks":
        return [public_name(spec) for spec in value]
    read = ("model", "text", "reference")
    return public_name(value) if name in read and value is not None else value


def _measure_text(
    request: EvaluateRequest, subject: Subject, workers: Workers, tell: _Tell
) -> dict[str, Any]:
    """Perplexity over the text and, given a reference, closeness to it."""
    batch = _tokens_of(request, subject)
    reference = None
    if request.reference is not None:
        tell(f"loading {request.reference}")
        reference = _open_as(request, request.reference, "auto", workers)
        _require_same_tokens(subject, reference, batch, _tokens_of(request, reference))
    quality = subject.quality(reference, batch.tokens.numpy(), tell)
    return {
        "perplexity": _perplexity_record(quality.window_nlls)
        | {"text": batch.describe(), "seconds": quality.seconds},
        "reference": None if reference is None else _closeness_record(request, quality),
    }


def _open_as(request: EvaluateRequest, name: str, backend: str, workers: Workers) -> Subject:
    """Open a model with the request's settings."""
    place = ModelPlace.of(
        name,
        backend=backend,
        threads=request.threads,
        trust_remote_code=request.trust_remote_code,
    )
    return Subject.open(place, workers)


def _tokens_of(request: EvaluateRequest, subject: Subject) -> TokenBatch:
    """The first windows of the text, as the model's tokenizer sees it.

    Raises:
        UsageError: the windows are longer than the model's context.
        InputError: the text is too short.
    """
    if request.window_length > subject.facts.max_length:
        raise UsageError(
            "The windows are longer than the context of this model.",
            where=f"--window-length, {subject.facts.name}",
            observed=f"{request.window_length} tokens",
            expected=f"at most {subject.facts.max_length}",
        )
    return load_tokens(
        str(Path(str(request.text)).resolve()),  # absolute: a file may be called `self`
        subject.tokenizer,
        None,
        count=request.windows,
        length=request.window_length,
        seed=0,
        sequential=True,
    )


def _require_same_tokens(
    subject: Subject, reference: Subject, own: TokenBatch, others: TokenBatch
) -> None:
    """Raise InputError when two models do not share their tokens, so that logits do not compare."""
    sizes = subject.facts.vocab_size, reference.facts.vocab_size
    if sizes[0] == sizes[1] and own.tokens.equal(others.tokens):
        return
    raise InputError(
        "The model and the reference have different vocabularies.",
        where=f"{subject.facts.name} and {reference.facts.name}",
        observed=f"{sizes[0]} and {sizes[1]} tokens"
        if sizes[0] != sizes[1]
        else "other ids for the same text",
        change="pass as --reference the model that this one was made from",
    )


def _perplexity_record(window_nlls: list[float]) -> dict[str, Any]:
    """Perplexity, its standard error and what both come from."""
    value, error = perplexity_with_error(np.array(window_nlls))
    return {"value": value, "standard_error": error, "window_nlls": window_nlls}


def _closeness_record(request: EvaluateRequest, quality: Quality) -> dict[str, Any]:
    """KL, top-1 agreement and change of log-perplexity, each with its error over windows."""
    change, change_error = log_perplexity_change(
        np.array(quality.reference_nlls), np.array(quality.window_nlls)
    )
    return {
        "model": public_name(request.reference),
        "perplexity": _perplexity_record(quality.reference_nlls),
        "kl": {"value": quality.kl, "standard_error": _error_of(quality.window_kls)},
        "top1": {"value": quality.top1, "standard_error": _error_of(quality.window_agreements)},
        "log_perplexity_change": {"value": change, "standard_error": change_error},
    }


def _error_of(values: list[float]) -> float | None:
    """Standard error of the mean of windows; None for a single one."""
    return standard_error(np.array(values)) if len(values) > 1 else None


def _measure_tasks(
    request: EvaluateRequest, subject: Subject, tasks: list[Task | Group], tell: _Tell
) -> dict[str, Any]:
    """Scores by the harness, under its own keys, and as a plain list."""
    from validate.harness import SessionLM
    from validate.harness_tasks import file_hashes, score_tasks, scores_of, values_per_question

    model = SessionLM(subject.session, subject.tokenizer, subject.stop_ids, request.max_rows)
    started = time.perf_counter()
    results = score_tasks(model, tasks, limit=request.limit, num_fewshot=request.num_fewshot)
    if model.truncated:
        tell(
            f"{model.truncated} requests were longer than {model.max_length} tokens and lost the "
            "beginning of their context, as they do in the harness's own HFLM"
        )
    keys = ("results", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")
    return {
        "scores": [asdict(score) for score in scores_of(results)],
        "files": file_hashes(request.tasks),
        "truncated": model.truncated,
        "harness": {key: results.get(key) for key in keys},
        "per_question": values_per_question(results),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _measure_answer(request: EvaluateRequest, subject: Subject, prompt: str) -> dict[str, Any]:
    """The greedy answer to a prompt."""
    messages = [{"role": "user", "content": prompt}]
    ids = chat_prompt_ids(subject.tokenizer, messages, request.raw)
    decoding = Decoding(request.max_new_tokens, stop_ids=subject.stop_ids)
    result = answer(subject.session, subject.tokenizer, ids, decoding)
    return {"prompt": prompt, "raw": request.raw, **result.to_json()}
