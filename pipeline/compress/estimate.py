"""What compressing a decoder would take: hours, memory, bytes moved, disk; of what is timed here.

One layer of the same form, narrower where the model is wide, is surveyed and fitted by what
`skipcat compress` runs, and every task is timed. From there on it is arithmetic: with k times the
width a task takes k^3 of the time and k^2 of the bytes, and the head, which carries the text
through the layers, k^2 of the time for each token.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import (
    CalibratedDecoder,
    disk_bytes,
    wanted_costs,
    widest_group,
)
from pipeline.compress.layer_prices import WINDOWS as PRICED_WINDOWS
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import compress_
from pipeline.errors import InputError, UsageError
from pipeline.machine import limited_threads
from pipeline.model.loading import empty_model
from pipeline.model.structure import Group, Layer, decoder_structure
from pipeline.model.task import TASKS, TEXT
from pipeline.workers.workers import IN_PROCESS, Result, Value

# The widest input of the layer that is timed: seconds of one thread.
_WIDEST = 3072
_VOCABULARY = 256
# Narrows any model to its smallest.
_LEAST = 1 << 20
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a process of Python and torch holds before it computes anything.
LIBRARIES_BYTES = 350_000_000
# Of a task's declared memory so much does not grow with its matrices.
_CONSTANT_BYTES = 1 << 26
# What the output layer's matrix takes of the survey, over what a layer's do: forward and back, but
# neither once more nor moments.
_OF_OUTPUT = 0.5


@dataclass(frozen=True)
class Estimate:
    """What a compression would take.

    Attributes:
        workers: that compute tasks beside the head, which carries the text.
        threads: of each, and of the head.
        timed_width: widest input of the layer that was timed.
        widest: of the model.
        tasks: how many.
        head_hours: of the head alone.
        task_hours: of all tasks, one after another.
        hours: of both, as they run beside one another.
        worker_bytes: largest process of a worker.
        moved_bytes: what tasks are given and return.
        disk_bytes: that the output's folder takes while the run goes on.
    """

    workers: int
    threads: int
    timed_width: int
    widest: int
    tasks: int
    head_hours: float
    task_hours: float
    hours: float
    worker_bytes: int
    moved_bytes: int
    disk_bytes: int

    @property
    def is_scaled(self) -> bool:
        """Whether a narrower layer than the model's was timed."""
        return self.timed_width < self.widest


def estimated(
    config: PretrainedConfig, request: CompressRequest, workers: int, threads: int
) -> Estimate:
    """Time a layer of a decoder, and say what compressing all of it would take.

    Args:
        config: of the model.
        request: how it would be compressed; its model is not looked at.
        workers: that would compute tasks; 0 for the head alone.
        threads: of each.

    Raises:
        UsageError: a method that computes no such tasks.
        InputError: an architecture that cannot be compressed.
    """
    if not request.resolved_method.needs_costs:
        raise UsageError(
            "Only methods that survey the model are estimated.", where=f"--method {request.method}"
        )
    _require_sizes(config.get_text_config())
    whole, scale = _Whole.of(config), 1
    while whole.widest / scale > _WIDEST:
        scale *= 2
    small = whole.timed_as(request)
    with limited_threads(threads):
        # What libraries do once is not of the tasks. So small a model meets no budget of bytes.
        _timed(_one_layer(config, _LEAST), replace(small, keep_bytes=None))
        timed = _timed(_one_layer(config, scale), small)
    return _scaled(timed, whole, request, workers, threads)


def _one_layer(config: PretrainedConfig, scale: int) -> PreTrainedModel:
    """A random model of one layer, float32."""
    narrow = _narrowed(config, scale)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(narrow, dtype=torch.float32).eval()
    return model


def _require_sizes(text: PretrainedConfig) -> None:
    """Raise InputError for a config whose sizes have other names: no narrower one can be made."""
    missing = [name for name in _SIZES if not isinstance(getattr(text, name, None), int)]
    if missing:
        raise InputError(
            "This kind of config cannot be made narrower.",
            where=text.model_type,
            observed=f"no {', '.join(missing)}",
            expected="sizes by the names that Llama's config has",
        )


@dataclass(frozen=True)
class _Whole:
    """The model that nobody need have.

    Attributes:
        layers: how many.
        layer: the groups of the first.
        parameters: of all.
        output: numbers of the matrix that gives logits.
    """

    layers: int
    layer: Layer
    parameters: int
    output: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Whole:
        text = config.get_text_config()
        meta = empty_model(TASKS[TEXT].auto_class, config, trust_remote_code=False)
        (structure,) = decoder_structure(_one_layer(config, _LEAST))
        sizes = {
            member: meta.get_submodule(member).weight.shape
            for group in structure.groups
            for member in group.members
        }
        groups = tuple(
            Group(
                group.members,
                sizes[group.members[0]][1],
                tuple(sizes[member][0] for member in group.members),
            )
            for group in structure.groups
        )
        parameters = sum(parameter.numel() for parameter in meta.parameters())
        output = text.vocab_size * text.hidden_size
        return cls(text.num_hidden_layers, Layer(structure.name, groups), parameters, output)

    @property
    def widest(self) -> int:
        return _widest(self.layer)

    @property
    def numbers(self) -> int:
        """Of a layer's linears."""
        return _numbers(self.layer)

    def timed_as(self, request: CompressRequest) -> CompressRequest:
        """The request of any model: a share of its bytes for a number, no plan, a whole cache."""
        own: dict[str, Any] = {
            "plan": None, "context": None, "cache_bytes": None, "keep_cache": None,
        }  # fmt: skip
        if request.memory is not None:
            float16_bytes = 2 * self.parameters
            share = request.budget_bytes(float16_bytes) / float16_bytes
            own |= {"memory": None, "keep_bytes": min(1.0, share)}
        return replace(request, **own)


def _narrowed(config: PretrainedConfig, scale: int) -> PretrainedConfig:
    """One layer of the model, its width divided by `scale` as far as whole heads allow."""
    narrow = copy.deepcopy(config)
    text = narrow.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.num_key_value_heads = max(1, kv_heads // scale)
    each = heads // kv_heads
    text.num_attention_heads = text.num_key_value_heads * max(
        1, min(each, heads // scale // text.num_key_value_heads)
    )
    # Some families want whole heads of the residual stream, however wide their heads are.
    narrow_heads = text.num_attention_heads
    text.hidden_size = narrow_heads * max(8, text.hidden_size // scale // narrow_heads)
    text.intermediate_size = max(8, text.intermediate_size // scale)
    text.num_hidden_layers, text.vocab_size = 1, _VOCABULARY
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    return narrow


@dataclass(frozen=True)
class _Task:
    """A task that was computed here."""

    where: str
    seconds: float
    given_bytes: int
    returned_bytes: int
    needed_bytes: int


class _Timing:
    """Computes each task as it is submitted, and takes its time (see `Workers`)."""

    at_once = 0

    def __init__(self) -> None:
        self.tasks: list[_Task] = []

    def submit(
        self, where: str, function: Callable[..., Value], *arguments: Any, needed_bytes: int = 0
    ) -> Result[Value]:
        started = time.perf_counter()
        result = IN_PROCESS.submit(where, function, *arguments)
        seconds = time.perf_counter() - started
        given, returned = (sum(map(_bytes_of, a)) for a in (arguments, [result.get()]))
        self.tasks.append(_Task(where, seconds, given, returned, needed_bytes))
        return result

    def part(self, started: float, tokens: int) -> _Part:
        """What was done since `started`, with text of so many tokens; begins anew."""
        seconds, done = time.perf_counter() - started, self.tasks
        self.tasks = []
        return _Part(done, seconds - sum(task.seconds for task in done), tokens)

    def share(self, value: Value) -> Value:
        return value

    def describe(self) -> dict[str, Any]:
        return {}


def _bytes_of(value: Any) -> int:
    """Of all tensors and arrays in it."""
    if isinstance(value, torch.Tensor) or hasattr(value, "nbytes"):
        return int(value.nbytes)
    if is_dataclass(value):
        return sum(_bytes_of(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 0


@dataclass(frozen=True)
class _Part:
    """The survey, or the walk behind it.

    Attributes:
        tasks: that were computed.
        head_seconds: of all else.
        tokens: that the head carried.
    """

    tasks: list[_Task]
    head_seconds: float
    tokens: int

    @property
    def task_seconds(self) -> float:
        return sum(task.seconds for task in self.tasks)

    def in_turn_seconds(self, layer: Layer) -> float:
        """Of tasks of which only those with one input may be computed at once."""
        source_of = {m: group.name for group in layer.groups for m in group.members}
        longest: dict[str, float] = {}
        for task in self.tasks:
            source = source_of[task.where.split(", ")[0]]
            longest[source] = max(longest.get(source, 0.0), task.seconds)
        return sum(longest.values())


@dataclass(frozen=True)
class _Timed:
    """A narrow layer that was surveyed and compressed."""

    layer: Layer
    survey: _Part
    walk: _Part


def _timed(model: PreTrainedModel, request: CompressRequest) -> _Timed:
    """Compress a model of one layer on as much random text as its widest input needs."""
    layers, effort = decoder_structure(model), request.resolved_effort
    length = min(effort.window_length, model.config.get_text_config().max_position_embeddings)
    windows = -(-(_widest(layers[0]) + 1) // length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, _VOCABULARY, (windows, length), generator=generator)
    batch, timing = TokenBatch(tokens, "random", 0), _Timing()
    with tempfile.TemporaryDirectory() as folder:
        costs, started = LayerCosts(Path(folder), {}), time.perf_counter()
        costs.measure(model, layers, tokens, CostRequest.of(request), timing)
        survey = timing.part(started, tokens.numel())
        # Nothing of the inputs was kept: the walk reads all text, too.
        ready = CalibratedDecoder.at_hand(
            model, layers, batch, costs, workers=timing, surveyed=windows
        )
        plan = make_plan(request, ready)
        timing.tasks, started = [], time.perf_counter()
        compress_(ready, plan, dtype=torch.float16, fit=request.resolved_method.fit)
        return _Timed(layers[0], survey, timing.part(started, tokens.numel()))


def _widest(layer: Layer) -> int:
    return widest_group([layer]).in_features


def _numbers(layer: Layer) -> int:
    """Of its linears."""
    return sum(group.in_features * sum(group.out_features) for group in layer.groups)


class _Stage(NamedTuple):
    """A part of the run, of the whole model, in seconds.

    Attributes:
        head: of the head.
        tasks: of its tasks, one after another.
        at_once: of its tasks, as the workers compute them.
        overlaps: whether the head goes on while tasks are computed.
    """

    head: float
    tasks: float
    at_once: float
    overlaps: bool

    @property
    def beside(self) -> float:
        """Of head and workers."""
        return max(self.head, self.at_once) if self.overlaps else self.head + self.at_once


def _stages(timed: _Timed, whole: _Whole, request: CompressRequest, workers: int) -> list[_Stage]:
    """The survey, the prices where the effort measures them, and the walk."""
    effort, width = request.resolved_effort, whole.numbers / _numbers(timed.layer)
    of_tasks, count = width**1.5 * whole.layers, max(1, workers)
    windows = effort.windows_for(whole.widest)
    surveyed = effort.survey_windows * effort.window_length
    kept = wanted_costs(request, [whole.layer], surveyed).inputs
    read = windows * effort.window_length - (surveyed if kept else 0)
    of_survey = whole.layers + _OF_OUTPUT * whole.output / whole.numbers

    def head(part: _Part, tokens: float, layers: float) -> float:
        return part.head_seconds * width * layers * tokens / part.tokens

    costs, fits = (of_tasks * part.task_seconds for part in (timed.survey, timed.walk))
    stages = [_Stage(head(timed.survey, surveyed, of_survey), costs, costs / count, overlaps=True)]
    if effort.prices:
        # Each layer is tried with all behind it.
        text = surveyed + PRICED_WINDOWS * effort.window_length * whole.layers / 2
        own = head(timed.walk, text, whole.layers)
        stages.append(_Stage(own, fits, fits / count, overlaps=False))
    one_shot = effort.mix is None
    in_turn = 0.0 if one_shot else of_tasks * timed.walk.in_turn_seconds(timed.layer)
    walk = head(timed.walk, read, whole.layers)
    return [*stages, _Stage(walk, fits, max(in_turn, fits / count), overlaps=one_shot)]


def _scaled(
    timed: _Timed, whole: _Whole, request: CompressRequest, workers: int, threads: int
) -> Estimate:
    """From one narrow layer to all of them."""
    width = whole.numbers / _numbers(timed.layer)
    stages = _stages(timed, whole, request, workers)
    tasks = timed.survey.tasks + timed.walk.tasks
    moved = sum(task.given_bytes + task.returned_bytes for task in tasks)
    own, others = sum(stage.head for stage in stages), sum(stage.tasks for stage in stages)
    layers = [whole.layer] * whole.layers
    return Estimate(
        workers=workers,
        threads=threads,
        timed_width=_widest(timed.layer),
        widest=whole.widest,
        tasks=len(tasks) * whole.layers,
        head_hours=own / 3600,
        task_hours=others / 3600,
        hours=(sum(stage.beside for stage in stages) if workers else own + others) / 3600,
        worker_bytes=max(_process_bytes(task, width) for task in tasks),
        moved_bytes=int(moved * width * whole.layers) if workers else 0,
        disk_bytes=disk_bytes(request, layers, whole.parameters, torch.float16),
    )


def _process_bytes(task: _Task, width: float) -> int:
    """Of a worker that computes a task of the whole model, with what it is given."""
    growing = task.given_bytes + max(0, task.needed_bytes - _CONSTANT_BYTES)
    return int(growing * width) + _CONSTANT_BYTES + LIBRARIES_BYTES
