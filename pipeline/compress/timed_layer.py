"""One narrow layer of a decoder's form, surveyed and fitted here, every task of it timed."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.calibrate.carried_layer import (
    LayerCode,
    layer_bytes,
    layer_gradients,
    layer_inputs,
    layer_output,
    linear_input,
)
from pipeline.calibrate.seen_rows import (
    mean_drift,
    mean_input_moment,
    mean_output_moment,
    mean_weighted_moment,
    moment_bytes,
)
from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder, widest_group
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.fit_group import fit_group
from pipeline.compress.fit_memory import fit_bytes
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import GroupPlan, Members
from pipeline.compress.plan.stack_costs import CostRequest, cost_bytes, stack_costs
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import compress_
from pipeline.model.structure import Group, Layer, decoder_structure
from pipeline.workers.workers import InProcess, Value

_VOCABULARY = 256


def timed_layer(model: PreTrainedModel, request: CompressRequest) -> TimedLayer:
    """Compress a model of one layer on as much random text as its widest input needs."""
    layers, effort = decoder_structure(model), request.resolved_effort
    length = min(effort.window_length, model.config.get_text_config().max_position_embeddings)
    windows = -(-(widest_input(layers[0]) + 1) // length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, _VOCABULARY, (windows, length), generator=generator)
    batch, timing = TokenBatch(tokens, "random", 0), Timing()
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
        return TimedLayer(layers[0], survey, timing.part(started, tokens.numel()))


def one_layer(config: PretrainedConfig, scale: int) -> PreTrainedModel:
    """A random model of one layer, float32."""
    narrow = _narrowed(config, scale)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(narrow, dtype=torch.float32).eval()
    return model


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
class Task:
    """A task that was computed here.

    Attributes:
        where: it belongs.
        seconds: that it took.
        given_bytes: what it was given.
        returned_bytes: and what it returned.
        needed_bytes_at: memory beside that, of matrices so many times as wide and as high.
        of_text: whether it carries text, or sums over it.
        weight_bytes: of what it was given, what all tasks of the same name are given.
    """

    where: str
    seconds: float
    given_bytes: int
    returned_bytes: int
    needed_bytes_at: Callable[[float], int]
    of_text: bool = False
    weight_bytes: int = 0

    @property
    def own_bytes(self) -> int:
        """What it alone is given and returns."""
        return self.given_bytes - self.weight_bytes + self.returned_bytes

    def process_bytes(self, times: float, text: float) -> int:
        """Memory of it and of what it is given, of a model so many times as wide.

        Args:
            times: as wide and as high.
            text: so many times as much of it.
        """
        if not self.of_text:
            given = self.given_bytes * times**2
        elif self.weight_bytes:
            given = self.weight_bytes * times**2 + (self.given_bytes - self.weight_bytes) * times
        else:
            given = self.given_bytes * times * text
        return int(given) + self.needed_bytes_at(times)


class Timing(InProcess):
    """Computes each task as it is submitted, and takes its time (see `Workers`)."""

    # Others would compute them: layers are run by tasks.
    at_once = 1

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def compute(self, where: str, function: Callable[..., Value], *given: Any) -> Value:
        if function not in _NEEDED:
            # The trials of a price, which are of a whole model.
            return function(*given)
        started = time.perf_counter()
        found = function(*given)
        seconds = time.perf_counter() - started
        told, returned = _bytes_of(given), _bytes_of(found)
        of_text, weight_bytes = function in _OF_TEXT, 0
        if function in _OF_LAYERS:
            weight_bytes = sum(_bytes_of(a) for a in given if isinstance(a, dict))
        self.tasks.append(
            Task(where, seconds, told, returned, _NEEDED[function](*given), of_text, weight_bytes)
        )
        return found

    def part(self, started: float, tokens: int) -> Part:
        """What was done since `started`, with text of so many tokens; begins anew."""
        seconds, done = time.perf_counter() - started, self.tasks
        self.tasks = []
        return Part(done, seconds - sum(task.seconds for task in done), tokens)


def _bytes_of(value: Any) -> int:
    """Of all tensors and arrays in it."""
    if isinstance(value, torch.Tensor) or hasattr(value, "nbytes"):
        return int(value.nbytes)
    if is_dataclass(value):
        return sum(_bytes_of(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def _of_costs(
    stack: Members, wanted: CostRequest, seen: torch.Tensor, _: torch.Tensor, *found: torch.Tensor
) -> Callable[[float], int]:
    """Of `stack_costs`, by its arguments, of which the sizes alone are kept."""
    columns, heights = len(seen), [len(weight) for weight in found[: len(stack)]]
    return lambda times: cost_bytes(
        round(columns * times), [round(height * times) for height in heights], wanted
    )


def _of_fit(
    group: GroupPlan, weights: Sequence[torch.Tensor], inputs: InputMoments, *_: Any
) -> Callable[[float], int]:
    """Of `fit_group`, likewise."""
    heights, itemsize = [len(weight) for weight in weights], weights[0].itemsize
    drifted = inputs.drift is not None

    def needed_bytes_at(times: float) -> int:
        rows, columns, rank = (round(n * times) for n in (group.rows, group.columns, group.rank))
        return fit_bytes(
            replace(group, rows=rows, columns=columns, rank=rank),
            [round(height * times) for height in heights],
            itemsize=itemsize,
            drifted=drifted,
        )

    return needed_bytes_at


def _of_layer(
    code: LayerCode,
    groups: Sequence[Group],
    numbers: Any,
    keywords: Any,
    hidden: torch.Tensor,
    *more: Any,
) -> Callable[[float], int]:
    """Of tasks that run a layer, likewise: a batch is of as many tokens."""
    back, shape = any(isinstance(one, torch.Tensor) for one in more), hidden.shape

    def needed_bytes_at(times: float) -> int:
        wide = [
            replace(
                group,
                in_features=round(group.in_features * times),
                out_features=tuple(round(height * times) for height in group.out_features),
            )
            for group in groups
        ]
        batch = (shape[0], shape[1], round(shape[2] * times))
        return layer_bytes(wide, batch, round(code.heads * times), back=back)

    return needed_bytes_at


def _of_moment(*rows: torch.Tensor) -> Callable[[float], int]:
    """Of the mean moments, likewise."""
    tokens, width = max(map(len, rows)), rows[0].shape[1]
    return lambda times: moment_bytes(round(width * times), tokens)


_OF_LAYERS = (layer_output, layer_inputs, linear_input, layer_gradients)
_OF_SUMS = (mean_input_moment, mean_weighted_moment, mean_output_moment, mean_drift)
_OF_TEXT = (*_OF_LAYERS, *_OF_SUMS)
# What the tasks of a compression declare at another width, by what each is given.
_NEEDED: dict[Callable[..., Any], Callable[..., Callable[[float], int]]] = {
    stack_costs: _of_costs,
    fit_group: _of_fit,
    **dict.fromkeys(_OF_LAYERS, _of_layer),
    **dict.fromkeys(_OF_SUMS, _of_moment),
}


@dataclass(frozen=True)
class Part:
    """The survey, or the walk behind it.

    Attributes:
        tasks: that were computed.
        head_seconds: of all else.
        tokens: that the head carried.
    """

    tasks: list[Task]
    head_seconds: float
    tokens: int

    @property
    def text_seconds(self) -> float:
        """Of tasks that carry text, or sum over it."""
        return sum(task.seconds for task in self.tasks if task.of_text)

    @property
    def task_seconds(self) -> float:
        """Of all other tasks."""
        return sum(task.seconds for task in self.tasks if not task.of_text)

    @property
    def weight_bytes(self) -> int:
        """Of the layers that tasks are given, each counted once."""
        return sum({task.where: task.weight_bytes for task in self.tasks}.values())

    def in_turn_seconds(self, layer: Layer) -> float:
        """Of tasks of which only those with one input may be computed at once."""
        source_of = {m: group.name for group in layer.groups for m in group.members}
        longest: dict[str, float] = {}
        for task in (task for task in self.tasks if not task.of_text):
            source = source_of[task.where.split(", ")[0]]
            longest[source] = max(longest.get(source, 0.0), task.seconds)
        return sum(longest.values())


@dataclass(frozen=True)
class TimedLayer:
    """A narrow layer that was surveyed and compressed."""

    layer: Layer
    survey: Part
    walk: Part


def widest_input(layer: Layer) -> int:
    """Numbers that the widest of its linears reads."""
    return widest_group([layer]).in_features


def linear_parameters(layer: Layer) -> int:
    """Of its linears."""
    return sum(group.in_features * sum(group.out_features) for group in layer.groups)
