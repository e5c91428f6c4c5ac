"""What the tasks of a compression take of memory, against what they declare; and those of a 70B.

    python -m benchmarks.stages.task_memory

Each task runs in a process of its own, on random matrices and moments: the costs of a group's
stack, with formats and without, and its fit: as factors, on inputs that have drifted, as rounded
factors, and rounded whole; and a batch of text, forward through a layer and back, and the sum over
it. Behind them stands what is declared for the layers of a 70B model, whose
weights are bfloat16, with what a task is given and what the libraries take.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine
from pipeline.calibrate.carried_layer import LayerCode, layer_bytes, layer_gradients, layer_output
from pipeline.calibrate.carried_module import numbers_of
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.seen_rows import mean_weighted_moment, moment_bytes
from pipeline.compress.estimate import LIBRARIES_BYTES
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.fit_group import fit_group
from pipeline.compress.fit_memory import fit_bytes
from pipeline.compress.methods import Fit
from pipeline.compress.plan.plan import Form, GroupPlan
from pipeline.compress.plan.stack_costs import (
    CostRequest,
    OutputStatistics,
    cost_bytes,
    stack_costs,
)
from pipeline.memory import forget_peak, peak_bytes
from pipeline.model.structure import Layer, decoder_structure
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.quantize.formats import Format

_RESULT = RESULTS / "task_memory.json"
_FORMAT = "int4-b32-asym"
_RANK = 0.45


@dataclass(frozen=True)
class _Stack:
    """Matrices with one input.

    Attributes:
        columns: n.
        heights: m_i.
        rank_share: of the full rank, of its factors.
    """

    columns: int
    heights: tuple[int, ...]
    rank_share: float = _RANK

    @property
    def rows(self) -> int:
        return sum(self.heights)

    def group(self, form: Form, formats: tuple[str | None, str | None]) -> GroupPlan:
        members = tuple(map(str, range(len(self.heights))))
        full = min(self.rows, self.columns)
        rank = full if form == "dense" else int(self.rank_share * full)
        return GroupPlan(members, self.rows, self.columns, form, rank, None, None, *formats)


class _Fit(NamedTuple):
    """A way to fit a group."""

    form: Form
    formats: tuple[str | None, str | None] = (None, None)
    drifted: bool = False


_STACKS = [
    _Stack(1024, (3584, 3584)), _Stack(3584, (1024,)), _Stack(2048, (2048,)),
    _Stack(1536, (5376, 5376)), _Stack(5376, (1536,)),
]  # fmt: skip
# Of Llama-3.1-70B, at 0.8 of its parameters.
_WIDEST = {
    "q, k and v": _Stack(8192, (8192, 1024, 1024), 0.44),
    "o": _Stack(8192, (8192,), 0.44),
    "gate and up": _Stack(8192, (28672, 28672), 0.78),
    "down": _Stack(28672, (8192,), 0.78),
}
# Layers as wide as the input, and as high as the stack, and tasks that a batch of text is given to.
_LAYERS = [_Stack(1024, (2816, 2816)), _Stack(2048, (5632, 5632))]
_TEXT = ("forward", "back", "sum")
_SEQUENCES, _LENGTH, _HEAD = 2, 512, 64
_COSTS: dict[str, tuple[str, ...]] = {"costs": (), "costs, with formats": (_FORMAT, "int8-b32-sym")}
_FITS = {
    "fit": _Fit("skip"),
    "fit, drifted": _Fit("skip", drifted=True),
    "fit, factored and rounded": _Fit("skip", (_FORMAT, _FORMAT)),
    "fit, rounded": _Fit("dense", (None, _FORMAT)),
}


def _wanted(task: str) -> CostRequest:
    return CostRequest(formats=tuple(map(Format.parse, _COSTS[task])))


def _declared_bytes(stack: _Stack, task: str, itemsize: int) -> int:
    if task in _COSTS:
        return cost_bytes(stack.columns, stack.heights, _wanted(task))
    form, formats, drifted = _FITS[task]
    group = stack.group(form, formats)
    return fit_bytes(group, stack.heights, itemsize=itemsize, drifted=drifted)


def _given_bytes(stack: _Stack, task: str, itemsize: int) -> int:
    """Weights, bfloat16 sensitivities, and float32 moments: of a fit, of what has drifted, too."""
    moments = 8 if task in _COSTS else 8 + 4 * _FITS[task].drifted
    weights = itemsize * stack.rows * stack.columns
    return weights + 2 * sum(h * h for h in stack.heights) + moments * stack.columns**2


def _moment(size: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(size // 4, size, generator=generator)
    found = drawn.T @ drawn / len(drawn)
    found.diagonal().add_(0.1)
    return found


def _task(stack: _Stack, task: str) -> Callable[[], Any]:
    """The task, with what it is given."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(h, stack.columns, generator=generator) / 50 for h in stack.heights]
    outputs = tuple(_moment(height, generator).bfloat16() for height in stack.heights)
    seen, weighted = (_moment(stack.columns, generator) for _ in range(2))
    if task in _COSTS:
        names, wanted = ("matrix",) * len(weights), _wanted(task)
        return lambda: stack_costs(names, wanted, seen, weighted, *weights, *outputs)
    form, formats, drifted = _FITS[task]
    drift = _moment(stack.columns, generator) / 100 if drifted else None
    statistics = OutputStatistics(weighted, outputs)
    inputs, fit = InputMoments(seen, drift), Fit(mix=0.5 if drifted else None)
    group = stack.group(form, formats)
    return lambda: fit_group(group, weights, inputs, statistics, fit, torch.float16)


def _layer(stack: _Stack) -> tuple[LlamaForCausalLM, Layer]:
    """A random layer as wide as a stack's input and as high as its highest member."""
    width, height = stack.columns, max(stack.heights)
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=height, num_hidden_layers=1,
        num_attention_heads=width // _HEAD, max_position_embeddings=_LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return model, decoder_structure(model)[0]


def _text_task(stack: _Stack, task: str) -> tuple[Callable[[], Any], int]:
    """A task that text is given to, with what it is given, and what it declares."""
    tokens = _SEQUENCES * _LENGTH
    if task == "sum":
        rows, weights = torch.randn(tokens, stack.columns), torch.rand(tokens)
        return lambda: mean_weighted_moment(rows, weights), moment_bytes(stack.columns, tokens)
    model, layer = _layer(stack)
    shape = (_SEQUENCES, _LENGTH, stack.columns)
    stream = LayerStream(model, [layer], torch.zeros(shape[:2], dtype=torch.int64), _SEQUENCES)
    code, numbers = LayerCode.of(model, layer.name), numbers_of(model.get_submodule(layer.name))
    assert code is not None, "a Llama's layer can be carried"
    given = (code, layer.groups, numbers, stream.keywords[_SEQUENCES][0], torch.randn(shape))
    back, gradient = task == "back", torch.randn(shape)
    declared = layer_bytes(layer.groups, shape, code.heads, back=back)
    if back:
        return lambda: layer_gradients(*given, gradient), declared
    return lambda: layer_output(*given), declared


def _taken_and_declared(stack: _Stack, task: str) -> tuple[int, int]:
    """What a task takes beside what it is given, in this process, which does nothing else."""
    torch.set_num_threads(1)
    if task in _TEXT:
        ready, declared = _text_task(stack, task)
    else:
        ready, declared = _task(stack, task), _declared_bytes(stack, task, itemsize=4)
    forget_peak()
    before = peak_bytes()
    ready()
    return peak_bytes() - before, declared


def _measured(stack: _Stack, task: str) -> dict[str, Any]:
    # A new process for each: a heap remembers what ran before.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        taken, declared = pool.apply(_taken_and_declared, (stack, task))
    note(f"{stack.columns} -> {stack.heights}, {task}: {taken / declared:.2f} of what is declared")
    return asdict(stack) | {
        "task": task,
        "taken_bytes": taken,
        "declared_bytes": declared,
        "taken_over_declared": round(taken / declared, 3),
    }


def _widest(name: str, stack: _Stack) -> dict[str, Any]:
    tasks = {
        task: _declared_bytes(stack, task, 2) + _given_bytes(stack, task, 2) + LIBRARIES_BYTES
        for task in (*_COSTS, *_FITS)
    }
    return asdict(stack) | {"name": name, "process_bytes": tasks}


@click.command()
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(result: Path) -> None:
    """Measure tasks at widths that run here, and compute those of a 70B."""
    rows = [_measured(stack, task) for stack in _STACKS for task in (*_COSTS, *_FITS)]
    rows += [_measured(stack, task) for stack in _LAYERS for task in _TEXT]
    widest = [_widest(name, stack) for name, stack in _WIDEST.items()]
    found = {"rows": rows, "widest": widest, "machine": describe_machine()} | provenance()
    write_json(result, found)


if __name__ == "__main__":
    sys.exit(run(command))
