"""What compressing a decoder would take: hours, memory, bytes moved, disk; of what is timed here.

One layer of the same form, narrower where the model is wide, is surveyed and fitted by what
`skipcat compress` runs, and every task is timed. From there on it is arithmetic: with k times the
width a task takes k^3 of the time and k^2 of the bytes; one that carries text through a layer, or
sums over it, k^2 of the time for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from pipeline.compress.decoder import disk_bytes, wanted_costs
from pipeline.compress.layer_prices import WINDOWS as PRICED_WINDOWS
from pipeline.compress.layer_trials import SHARED_BYTES
from pipeline.compress.request import CompressRequest
from pipeline.compress.timed_layer import (
    Part,
    TimedLayer,
    linear_parameters,
    one_layer,
    timed_layer,
    widest_input,
)
from pipeline.errors import InputError, UsageError
from pipeline.machine import limited_threads
from pipeline.model.loading import empty_model
from pipeline.model.structure import Group, Layer, decoder_structure
from pipeline.model.task import TASKS, TEXT

# The widest input of the layer that is timed: seconds of one thread.
_WIDEST = 3072
# Narrows any model to its smallest.
_LEAST = 1 << 20
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FLOAT32_BYTES = 4
# What a process of Python and torch holds before it computes anything.
LIBRARIES_BYTES = 350_000_000
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
        head_hours: of what the head computes itself.
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
        timed_layer(one_layer(config, _LEAST), replace(small, keep_bytes=None))
        timed = timed_layer(one_layer(config, scale), small)
    return _scaled(timed, whole, request, workers, threads)


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
        (structure,) = decoder_structure(one_layer(config, _LEAST))
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
        return widest_input(self.layer)

    @property
    def numbers(self) -> int:
        """Of a layer's linears."""
        return linear_parameters(self.layer)

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


class _Stage(NamedTuple):
    """A part of the run, of the whole model, in seconds.

    Attributes:
        head: of the head.
        tasks: of its tasks, one after another.
        at_once: of its tasks, as the workers compute them.
    """

    head: float
    tasks: float
    at_once: float


def _stages(
    timed: TimedLayer, whole: _Whole, request: CompressRequest, workers: int
) -> list[_Stage]:
    """The survey, the prices where the effort measures them, and the walk."""
    effort, width = request.resolved_effort, whole.numbers / linear_parameters(timed.layer)
    of_tasks, count = width**1.5 * whole.layers, max(1, workers)
    windows, surveyed = effort.windows_for(whole.widest), _text_of(whole, request)
    kept = wanted_costs(request, [whole.layer], surveyed).inputs
    read = windows * effort.window_length - (surveyed if kept else 0)

    def of_text(seconds: float, part: Part, tokens: float) -> float:
        return seconds * width * whole.layers * tokens / part.tokens

    costs, fits = (of_tasks * part.task_seconds for part in (timed.survey, timed.walk))
    survey, walk = timed.survey, timed.walk
    costs += of_text(survey.text_seconds, survey, surveyed)
    # The head has the LM head, which is worth so many layers.
    output = _OF_OUTPUT * whole.output / whole.numbers / whole.layers
    own = of_text(survey.head_seconds + output * survey.text_seconds, survey, surveyed)
    stages = [_Stage(own, costs, costs / count)]
    if effort.prices:
        # Each layer is fitted to the text of the survey, and tried with all behind it.
        carried = fits + of_text(walk.text_seconds, walk, surveyed)
        tried = PRICED_WINDOWS * effort.window_length * whole.layers / 2
        own = of_text(walk.head_seconds, walk, surveyed)
        trials = of_text(walk.head_seconds + walk.text_seconds, walk, tried)
        if _FLOAT32_BYTES * whole.parameters <= SHARED_BYTES:
            carried += trials
        else:
            own += trials
        stages.append(_Stage(own, carried, carried / count))
    text = of_text(walk.text_seconds, walk, read)
    in_turn = 0.0 if effort.mix is None else of_tasks * walk.in_turn_seconds(timed.layer)
    at_once = text / count + max(in_turn, fits / count)
    return [*stages, _Stage(of_text(walk.head_seconds, walk, read), fits + text, at_once)]


def _scaled(
    timed: TimedLayer, whole: _Whole, request: CompressRequest, workers: int, threads: int
) -> Estimate:
    """From one narrow layer to all of them."""
    width = whole.numbers / linear_parameters(timed.layer)
    stages = _stages(timed, whole, request, workers)
    tasks = timed.survey.tasks + timed.walk.tasks
    text = _text_of(whole, request) / timed.survey.tokens
    moved = width * sum(task.own_bytes for task in tasks if not task.of_text)
    moved += width**0.5 * text * sum(task.own_bytes for task in tasks if task.of_text)
    moved += width * timed.survey.weight_bytes
    own, others = sum(stage.head for stage in stages), sum(stage.tasks for stage in stages)
    layers = [whole.layer] * whole.layers
    return Estimate(
        workers=workers,
        threads=threads,
        timed_width=widest_input(timed.layer),
        widest=whole.widest,
        tasks=round(sum(text if t.weight_bytes else 1 for t in tasks)) * whole.layers,
        head_hours=own / 3600,
        task_hours=others / 3600,
        hours=(own + (sum(stage.at_once for stage in stages) if workers else others)) / 3600,
        worker_bytes=max(t.process_bytes(width**0.5, text) for t in tasks) + LIBRARIES_BYTES,
        moved_bytes=int(moved * whole.layers) if workers else 0,
        disk_bytes=disk_bytes(request, layers, whole.parameters, torch.float16),
    )


def _text_of(whole: _Whole, request: CompressRequest) -> int:
    """Tokens that the survey reads."""
    effort = request.resolved_effort
    windows = min(effort.survey_windows, effort.windows_for(whole.widest))
    return windows * effort.window_length
