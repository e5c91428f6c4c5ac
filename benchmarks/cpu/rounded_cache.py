"""What a cache of 8 bits costs and gives on a CPU: two exports that differ in their cache alone.

    skipcat export MODEL -o cpu --profile cpu --max-length 4224
    skipcat export MODEL -o cpu8 --profile cpu --max-length 4224 --cache int8
    python -m benchmarks.cpu.rounded_cache cpu cpu8 --test TEST.txt

Perplexity and KL are of whole windows, in the last quarter of them too. Decoding is timed turn by
turn, a few tokens of one and a few of the other, so that what else the machine does meets both.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table
from scipy.special import log_softmax

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import sha256_of_file, write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.bench.targets import traffic_of_folder
from pipeline.export.record import read_export_record
from pipeline.progress import note, result_console
from pipeline.provenance import provenance
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.tokenizer import load_tokenizer

_RESULT = RESULTS / "rounded_cache.json"
_WINDOW, _PART, _KL_STEP = 2048, 512, 8
_CONTEXTS = (128, 4096)
_TURNS, _TOKENS = 7, 8


@click.command()
@click.argument("floats", type=click.Path(path_type=Path, exists=True))
@click.argument("codes", type=click.Path(path_type=Path, exists=True))
@click.option("--test", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--windows", type=int, default=2, show_default=True, help="Of 2,048 tokens.")
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    floats: Path, codes: Path, test: Path, windows: int, threads: int, result: Path
) -> None:
    """Measure both folders beside one another, and write the JSON."""
    loads = [load_average()]
    folders = {"float": floats, "int8": codes}
    ids = np.array(load_tokenizer(codes).encode(test.read_text(encoding="utf-8")), np.int64)
    sessions = {name: CpuSession(folder, threads) for name, folder in folders.items()}
    quality = _quality(sessions, ids[: windows * _WINDOW].reshape(windows, _WINDOW))
    record = {
        "schema": 1,
        "machine": describe_machine() | {"threads": threads},
        "provenance": provenance(),
        "test_sha256": sha256_of_file(test),
        "settings": {"windows": windows, "window_length": _WINDOW, "turns": _TURNS},
        "weights": read_export_record(codes).weights,
        "cache_bytes": {n: traffic_of_folder(f).cache_bytes(_WINDOW) for n, f in folders.items()},
        "quality": quality,
        "decode": {str(context): _decode(sessions, ids, context) for context in _CONTEXTS},
        "load_average": [*loads, load_average()],
    }
    write_json(result, record)
    _show(record)


def _quality(sessions: dict[str, CpuSession], windows: np.ndarray) -> dict[str, Any]:
    """Perplexity of both, and the KL of the second to the first, of all and of the last quarter."""
    losses: dict[str, list[float]] = {name: [] for name in sessions}
    kl: list[np.ndarray] = []
    for window in windows:
        seen = {}
        for name, session in sessions.items():
            own, seen[name] = _read(session, window)
            losses[name].append(own)
        before, after = seen.values()
        kl.append((np.exp(before) * (before - after)).sum(-1))
        note(f"{losses}")
    quarter = -len(kl[0]) // 4
    found = {name: float(np.exp(np.mean(own))) for name, own in losses.items()}
    return {
        "perplexity": found,
        "ratio": found["int8"] / found["float"],
        "kl": float(np.mean(kl)),
        "kl_last_quarter": float(np.mean([one[quarter:] for one in kl])),
    }


def _read(session: CpuSession, window: np.ndarray) -> tuple[float, np.ndarray]:
    """Nats a token of a window, and the log-probabilities [L / 8, V] of every eighth token."""
    session.reset()
    nats, kept = 0.0, []
    for start in range(0, len(window), _PART):
        chances = log_softmax(session.forward(window[None, start : start + _PART])[0], axis=-1)
        after = window[start + 1 : start + _PART + 1]
        nats -= float(chances[np.arange(len(after)), after].sum())
        kept.append(chances[::_KL_STEP].copy())
    return nats / (len(window) - 1), np.concatenate(kept)


def _decode(sessions: dict[str, CpuSession], ids: np.ndarray, context: int) -> dict[str, Any]:
    """Milliseconds a token behind so many, medians of turns, and the ratio within a turn."""
    for session in sessions.values():
        session.reset()
        session.forward(ids[None, :context], last_only=True)
        session.forward(ids[None, :1])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(_TURNS):
        for name, session in sessions.items():
            session.rewind(context)
            started = time.perf_counter()
            for token in ids[context : context + _TOKENS]:
                session.forward(token[None, None])
            times[name].append((time.perf_counter() - started) / _TOKENS * 1e3)
    ratios = [a / b for a, b in zip(times["float"], times["int8"], strict=True)]
    medians = {f"{name}_ms": statistics.median(own) for name, own in times.items()}
    return medians | {"faster": statistics.median(ratios), "turns": times}


def _show(record: dict[str, Any]) -> None:
    quality, cache = record["quality"], record["cache_bytes"]
    table = Table(
        "cache", "perplexity", "MB at 2,048 tokens", *(f"ms after {c}" for c in _CONTEXTS)
    )
    for name in cache:
        times = [f"{record['decode'][str(c)][f'{name}_ms']:.1f}" for c in _CONTEXTS]
        row = (f"{quality['perplexity'][name]:.3f}", f"{cache[name] / 1e6:.1f}")
        table.add_row(name, *row, *times)
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
