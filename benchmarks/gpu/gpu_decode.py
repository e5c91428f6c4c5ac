"""Decode on a GPU: compressed against dense, and against the same factors without Skip.

python -m benchmarks.gpu.gpu_decode                  # on a GPU: two shapes; most of it is compiling
python -m benchmarks.gpu.gpu_decode --dry-run        # anywhere: bytes and bounds
python -m benchmarks.gpu.gpu_decode --device cpu --shapes tiny --kept 0.6 --context 32 --tokens 4

Batch 1, float16, after `--context` tokens, random weights of real shapes. Every way decodes the
same tokens, given on the device, its logits left there; one model in memory at a time; a figure is
the median of its rounds.

    eager        dense, transformers as it is, growing cache
    dense        torch.compile with CUDA graphs, static cache
    dense-graph  `skipcat run --device cuda`: static cache, one captured graph a step, not compiled
    low-rank     factors B A of the same ranks, so of the same quality; compiled as dense is
    skip         the same in block-skip form, by our kernels; compiled as dense is
    skip-graph   the same as `skipcat run --device cuda` decodes it

Asked: skip at least 0.9 x (dense bytes / kept bytes) times as fast as dense, and faster than
low-rank. Bytes are those of all weights that a step reads. A run in which torch.compile leaves CUDA
graphs out is refused: it would make dense slow.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine
from pipeline.bench.shapes import Shape, fill_randomly_, find_shape
from pipeline.checkpoint.install import group_entries
from pipeline.checkpoint.modeling_skipcat import stored_layer
from pipeline.compress.plan.plan import RankPlan
from pipeline.kernels.install import use_operator_
from pipeline.runtime.sessions.static_session import StaticSession
from pipeline.runtime.sessions.torch_session import TorchSession

_RESULT = RESULTS / "gpu_decode.json"
# Aligned rows are read 16 bytes at a time.
_RANK_MULTIPLE = 8
_LEAST_OF_BYTES = 0.9
_FORMS = {"low-rank": "low_rank", "skip": "skip", "skip-graph": "skip"}
_COMPILED = ("dense", "low-rank", "skip")
_TINY = Shape("llama", 64, 128, 2, 4, 2, 16, 272, True, 512)
_H200_BYTES_PER_S = 4.3e12  # a device copy, read and written bytes


@dataclass(frozen=True)
class _Figure:
    """One way to decode one shape.

    Attributes:
        way: see the docstring of the module.
        kept: fraction of the parameters of the linears.
        read_bytes: weights that a step reads.
        ms: a token, median of the rounds; None when not timed.
        spread_ms: fastest and slowest round.
    """

    way: str
    kept: float
    read_bytes: int
    ms: float | None = None
    spread_ms: tuple[float, float] | None = None


class _CompiledSession(StaticSession):
    """`StaticSession` whose step is torch.compile's graph instead of one captured by hand."""

    def __init__(self, model: Any, name: str, max_length: int) -> None:
        super().__init__(model, name, max_length)
        self._compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        self._token.copy_(ids)
        logits: torch.Tensor = self._compiled(
            input_ids=self._token, past_key_values=self._cache, use_cache=True
        ).logits
        return logits.clone()


def _shape_of(name: str) -> Shape:
    """A published shape, or `tiny`."""
    return _TINY if name == "tiny" else find_shape(name)


def _plan_of(shape: Shape, kept: float) -> RankPlan:
    """The uniform plan, ranks in whole vectors."""
    return shape.plan(kept, _RANK_MULTIPLE)


def _make_model(shape: Shape, kept: float, form: str, device: str) -> Any:
    """The model on its device; `form` is "dense", "low_rank" or "skip"."""
    model = shape.empty_model()
    if form != "dense":
        for group in _plan_of(shape, kept).groups:
            entries = group_entries(group.members, form, group.rank)
            for name, entry in entries.items() if group.form != "dense" else ():
                model.set_submodule(name, stored_layer(model, name, entry, device="meta"))
    fill_randomly_(model, torch.float16 if device == "cuda" else torch.float32)
    if form == "skip":
        use_operator_(model)
    return model.to(device)


def _read_bytes(shape: Shape, kept: float, form: str) -> int:
    """Weights that a step reads, in half precision: no embedding, unless it is the head."""
    model = shape.empty_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    if not shape.tied:
        total -= shape.vocab * shape.hidden
    for group in _plan_of(shape, kept).groups if form != "dense" else ():
        if group.form != "dense":
            width = group.columns - group.rank if form == "skip" else group.columns
            total += group.rank * (group.rows + width) - group.rows * group.columns
    return 2 * total


def _make_session(
    way: str, shape: Shape, kept: float, device: str, length: int
) -> TorchSession | StaticSession:
    """The way's model behind a session."""
    model = _make_model(shape, kept, _FORMS.get(way, "dense"), device)
    if way == "eager":
        return TorchSession(model, way, length)
    if way in _COMPILED:
        return _CompiledSession(model, way, length)
    return StaticSession(model, way, length)


def _synchronise(device: str) -> None:
    """Wait for all that was put on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _require_graphs() -> None:
    """Raise ClickException when torch.compile left CUDA graphs out of anything it compiled."""
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    if skips:
        raise click.ClickException(
            f"torch.compile left CUDA graphs out {skips} times; TORCH_LOGS=perf_hints says why"
        )


def _decode_ms(
    session: TorchSession | StaticSession, context: torch.Tensor, tokens: torch.Tensor
) -> float:
    """Milliseconds a token over `tokens`, fed one by one after `context`, both on the device."""
    session.reset()
    session.logits(context, last_only=True)
    session.logits(tokens[:, :1])
    device = tokens.device.type
    _synchronise(device)
    started = time.perf_counter()
    for place in range(1, tokens.shape[1]):
        session.logits(tokens[:, place : place + 1])
    _synchronise(device)
    return 1e3 * (time.perf_counter() - started) / (tokens.shape[1] - 1)


def _measure(
    ways: list[tuple[str, float]], shape: Shape, device: str, context: int, tokens: int, rounds: int
) -> list[_Figure]:
    """Time all ways, one after the other: the largest two would not fit side by side."""
    random = np.random.default_rng(0)
    ids = random.integers(0, shape.vocab, (1, context + tokens + 1))
    prompt, answer = torch.from_numpy(ids).to(device).split([context, tokens + 1], dim=1)
    figures = []
    for way, kept in ways:
        session = _make_session(way, shape, kept, device, context + tokens + 1)
        _decode_ms(session, prompt, answer)  # compiles and captures
        times = [_decode_ms(session, prompt, answer) for _ in range(rounds)]
        if device == "cuda":
            _require_graphs()
        read = _read_bytes(shape, kept, _FORMS.get(way, "dense"))
        spread = (min(times), max(times))
        figures.append(_Figure(way, kept, read, statistics.median(times), spread))
        del session
        torch.compiler.reset()  # the graphs of this model hold its memory
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return figures


def _judge(figures: list[_Figure]) -> list[dict[str, Any]]:
    """Each figure with its ratios, and for `skip` the verdicts."""
    dense = next(figure for figure in figures if figure.way == "dense")
    rows = []
    for figure in figures:
        row: dict[str, Any] = asdict(figure)
        row["bytes_ratio"] = dense.read_bytes / figure.read_bytes
        if figure.ms and dense.ms:
            row["gb_per_s"] = figure.read_bytes / figure.ms / 1e6
            row["speed_up"] = dense.ms / figure.ms
        if _FORMS.get(figure.way) == "skip" and "speed_up" in row:
            row["of_bytes"] = row["speed_up"] / row["bytes_ratio"]
        if figure.way == "skip" and "speed_up" in row:
            plain = next(f for f in figures if (f.way, f.kept) == ("low-rank", figure.kept))
            row["over_low_rank"] = (plain.ms or 0) / (figure.ms or 1)
            passed = row["of_bytes"] >= _LEAST_OF_BYTES and row["over_low_rank"] > 1
            row["verdict"] = "pass" if passed else "missed"
        rows.append(row)
    return rows


def _show(name: str, rows: list[dict[str, Any]]) -> None:
    """A line for each way."""
    click.echo(f"\n{name}: batch 1")
    click.echo("way         kept   GB read   ms/token       GB/s    x dense   of bytes x low-rank")
    for row in rows:
        columns = {"ms": 3, "gb_per_s": 0, "speed_up": 2, "of_bytes": 2, "over_low_rank": 2}
        numbers = [
            f"{row[name]:10.{digits}f}" if row.get(name) is not None else f"{'-':>10}"
            for name, digits in columns.items()
        ]
        start = f"{row['way']:<11} {row['kept']:<5} {row['read_bytes'] / 1e9:8.3f}"
        line = f"{start} {' '.join(numbers)}"
        click.echo(f"{line}  {row.get('verdict', '')}")


@click.command()
@click.option("--shapes", default="llama-3.2-1b,qwen3-8b", show_default=True)
@click.option("--kept", default="0.8,0.6,0.4", show_default=True)
@click.option("--context", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--dry-run", is_flag=True, help="Bytes and bounds; nothing is timed.")
@click.option("--json", "result", type=click.Path(path_type=Path), help=f"By default {_RESULT}.")
def command(
    shapes: str,
    kept: str,
    context: int,
    tokens: int,
    rounds: int,
    device: str,
    dry_run: bool,
    result: Path | None,
) -> None:
    """Time every way to decode every shape, print the table, and write the JSON."""
    fractions = [float(part) for part in kept.split(",")]
    ways = [("eager", 1.0), ("dense", 1.0), ("dense-graph", 1.0)]
    ways += [(way, fraction) for fraction in fractions for way in _FORMS]
    if device == "cuda" and not dry_run and not torch.cuda.is_available():
        raise click.ClickException("PyTorch sees no GPU; --dry-run and --device cpu need none")
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "shapes": {},
        "torch": torch.__version__,
    }
    if device == "cuda" and not dry_run:
        record["gpu"] = torch.cuda.get_device_name()
    record |= {"context": context, "tokens": tokens, "rounds": rounds, "device": device}
    for name in shapes.split(","):
        shape = _shape_of(name)
        if dry_run:
            figures = [
                _Figure(way, fraction, _read_bytes(shape, fraction, _FORMS.get(way, "dense")))
                for way, fraction in ways
            ]
        else:
            figures = _measure(ways, shape, device, context, tokens, rounds)
        record["shapes"][name] = _judge(figures)
        _show(name, record["shapes"][name])
        if dry_run:
            bound = figures[-1].read_bytes / _H200_BYTES_PER_S * 1e3
            click.echo(
                f"at least {bound:.3f} ms a token on an H200 at the last line. Nothing was timed."
            )
        if result or (device == "cuda" and not dry_run):
            write_json(result or _RESULT, record)


if __name__ == "__main__":
    sys.exit(run(command))
