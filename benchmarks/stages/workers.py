"""What distribution costs and gives: layers of a real width, by one process and by workers.

    python -m benchmarks.stages.workers                       # two layers as wide as Llama-2-7B's
    python -m benchmarks.stages.workers --shape 2048x5504 --layers 2 --turns 3

A random Llama is surveyed and compressed (ranks, one shot) by one process with as many threads as
the workers have together, and by the workers, in turns. Each row has the wall clock of both, the
seconds that the workers' tasks took, and what the linear model says: those and the head's own,
over as many cores as there are workers; and what `skipcat compress --estimate` said of one process
before it.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder, wanted_costs
from pipeline.compress.estimate import estimated
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import compress_
from pipeline.errors import UsageError
from pipeline.machine import limited_threads
from pipeline.model.structure import decoder_structure
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.workers.workers import IN_PROCESS, Workers, open_workers

_RESULT = RESULTS / "workers.json"
_LENGTH, _HEAD = 256, 128
_KEPT = 0.7


@dataclass(frozen=True)
class _Shape:
    """A layer of a Llama with as many key heads as query heads.

    Attributes:
        hidden: numbers of the residual stream.
        intermediate: numbers between up and down.
    """

    hidden: int
    intermediate: int

    @classmethod
    def parse(cls, text: str) -> _Shape:
        """`4096x11008`.

        Raises:
            UsageError: another text.
        """
        parts = text.split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
            raise UsageError("This is no shape.", observed=text, expected="such as 4096x11008")
        return cls(int(parts[0]), int(parts[1]))

    def config(self, layers: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=max(1, self.hidden // _HEAD),
            max_position_embeddings=_LENGTH,
        )


def _request(windows: int) -> CompressRequest:
    """Ranks, one shot, on so many windows."""
    return CompressRequest(
        "random", keep_params=_KEPT, effort="fast", calibration="random.txt", windows=windows,
        window_length=_LENGTH,
    )  # fmt: skip


def _measured(model: PreTrainedModel, tokens: torch.Tensor, workers: Workers) -> dict[str, Any]:
    """Seconds of the survey and of the walk, by these workers."""
    model = copy.deepcopy(model)
    layers, batch = decoder_structure(model), TokenBatch(tokens, "random", 0)
    with tempfile.TemporaryDirectory() as folder:
        costs, started = LayerCosts(Path(folder), {}), time.monotonic()
        used = time.process_time()
        request = _request(len(tokens))
        wanted = wanted_costs(request, layers, tokens.numel())
        costs.measure(model, layers, tokens, wanted, workers)
        surveyed = time.monotonic()
        ready = CalibratedDecoder.at_hand(
            model, layers, batch, costs, workers=workers, surveyed=len(tokens)
        )
        plan = make_plan(request, ready)
        walked = time.monotonic()
        compress_(ready, plan, dtype=torch.float32, fit=request.resolved_method.fit)
        ended, used = time.monotonic(), time.process_time() - used
    return {
        "own_cpu_seconds": round(used, 2),
        "survey_seconds": round(surveyed - started, 2),
        "walk_seconds": round(ended - walked, 2),
        "seconds": round(surveyed - started + ended - walked, 2),
    }


@click.command()
@click.option("--shape", default="4096x11008", show_default=True, help="HIDDENxINTERMEDIATE.")
@click.option("--layers", default=2, show_default=True)
@click.option("--workers", "count", default=2, show_default=True)
@click.option("--turns", default=1, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    shape: str,
    layers: int,
    count: int,
    turns: int,
    result: Path,
) -> None:
    """Time both ways, in turns."""
    wanted = _Shape.parse(shape)
    torch.manual_seed(0)
    model = LlamaForCausalLM(wanted.config(layers)).eval()
    windows = math.ceil((wanted.intermediate + 1) / _LENGTH)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (windows, _LENGTH), generator=generator)
    rows: list[dict[str, Any]] = []
    for turn in range(turns):
        rows.append({"shape": shape, "layers": layers, "turn": turn, "load": load_average()})
        said = estimated(wanted.config(layers), _request(windows), 0, count)
        with limited_threads(count):
            rows[-1]["alone"] = _measured(model, tokens, IN_PROCESS)
        error = 3600 * said.hours / rows[-1]["alone"]["seconds"] - 1
        rows[-1] |= {"estimate": asdict(said), "estimate_error": round(error, 3)}
        rows[-1] |= _by_workers(model, tokens, count)
        rows[-1]["speed"] = round(rows[-1]["alone"]["seconds"] / rows[-1]["workers"]["seconds"], 3)
        note(f"turn {turn}: {rows[-1]['speed']} x the speed of one process of {count} threads")
        record = {"schema": 1, "machine": describe_machine(), "provenance": provenance()}
        write_json(result, record | {"rows": rows})
    click.echo(json.dumps(rows, indent=2))


def _by_workers(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> dict[str, Any]:
    """The same by workers of one thread, and what the linear model makes of their tasks."""
    with ExitStack() as stack:
        stack.enter_context(limited_threads(1))
        workers = stack.enter_context(open_workers(f"local:{count}"))
        # The first task of a worker imports torch.
        for started in [workers.submit("start", sum, [i]) for i in range(2 * count)]:
            started.get()
        found, told = _measured(model, tokens, workers), workers.describe()
    # The head has no core of its own here: it and the workers share as many as there are workers.
    model_seconds = (told["task_seconds"] + found["own_cpu_seconds"]) / count
    return {
        "workers": found,
        "tasks": told,
        "linear_seconds": round(model_seconds, 2),
        "linear_error": round(model_seconds / found["seconds"] - 1, 3),
    }


if __name__ == "__main__":
    sys.exit(run(command))
