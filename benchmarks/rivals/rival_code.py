"""A rival's own public code beside ours: the same model, tokens, ranks and perplexity.

    git clone https://github.com/hiahei/Swift-SVD CLONE
    python -m benchmarks.rivals.rival_code --rival swift-svd --code CLONE --model smollm2-135m \
        --calibration VALID.txt \
        --test TEST.txt

The table of methods (quality.py) holds our version of whitened SVD; this shows that it is a
fair one. Their functions calibrate and factor; ours repeat it with the same form and ranks; both
models then answer the same windows of the test text. Everything in float32 on the CPU. How their
code is called, and what is replaced around it, is in rivals.py. Runs what is in the clone: read it.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.quality.evaluation_texts import hash_of_text, tokens_of
from benchmarks.rivals.rivals import RIVALS, Trial, commit_of, product_of
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.calibrate.text import TokenBatch
from pipeline.checkpoint.folder import DTYPES
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.walk import compress_
from pipeline.errors import InputError, UsageError
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import Layer, decoder_structure
from pipeline.progress import note, result_console
from pipeline.provenance import provenance
from pipeline.runtime.sessions.torch_session import TorchSession
from validate.metrics import log_perplexity_change
from validate.quality import measure_perplexity

_SCHEMA = 1
_RESULT = RESULTS / "rival_code.json"


@dataclass(frozen=True)
class _Settings:
    """All that the numbers depend on."""

    rival: str
    repository: str
    rival_commit: str
    model: str
    keep: float
    test: str
    test_sha256: str
    test_windows: int
    test_window_length: int
    calibration: str
    calibration_sha256: str
    windows: int
    window_length: int
    seed: int


@click.command()
@click.option("--rival", type=click.Choice(sorted(RIVALS)), required=True)
@click.option("--code", type=click.Path(path_type=Path), required=True, help="Clone of its code.")
@click.option("--test", type=click.Path(path_type=Path), required=True, help="Test text, UTF-8.")
@click.option("--calibration", type=click.Path(path_type=Path), required=True, help="Another text.")
@click.option("--model", default="smollm2-135m", show_default=True, help="A Llama.")
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.8,
    show_default=True,
)
@click.option("--windows", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--window-length", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--test-windows", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--test-window-length", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(test: Path, calibration: Path, code: Path, result: Path, **options: Any) -> None:
    """Run a rival's own code beside ours."""
    rival = RIVALS[options["rival"]]
    settings = _Settings(
        repository=rival.repository,
        rival_commit=commit_of(code, rival),
        test=test.name,
        test_sha256=hash_of_text(test),
        calibration=calibration.name,
        calibration_sha256=hash_of_text(calibration),
        **options,
    )
    if settings.test_sha256 == settings.calibration_sha256:
        raise UsageError(
            "Calibration and test are the same text, so the perplexity would mean nothing.",
            observed=settings.calibration,
            change="calibrate on another text, such as the validation split",
        )
    entry = _compare(settings, code.resolve(), test, calibration, result)
    _show(entry)


def _compare(
    settings: _Settings, code: Path, test: Path, calibration: Path, result: Path
) -> dict[str, Any]:
    """Measure dense, theirs and ours; every row is in `result` as soon as it is finished."""
    loaded = load_model(settings.model, dtype=torch.float32)
    layers = decoder_structure(loaded.model)
    _refuse_other_family(loaded, settings)
    count, length = settings.test_windows, settings.test_window_length
    tests = tokens_of(str(test), loaded, count, length, settings.seed, sequential=True)
    calibrations = tokens_of(
        str(calibration), loaded, settings.windows, settings.window_length, settings.seed
    )
    entry: dict[str, Any] = {
        "settings": asdict(settings),
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "provenance": provenance(),
        "texts": {"test": tests.describe(), "calibration": calibrations.describe()},
        "rows": [],
    }
    for row in _measured_rows(settings, code, loaded, layers, tests.tokens, calibrations.tokens):
        entry["rows"].append(row | {"load_average": load_average()})
        _keep_entry(result, settings.rival, entry)
        note(f"{row['by']}, {row['method']}: perplexity {row['perplexity']:.2f}")
        gc.collect()  # a model is a web of cycles, and the next one needs its memory
    return entry


def _refuse_other_family(loaded: LoadedModel, settings: _Settings) -> None:
    """Raise InputError for a model that the rivals' code does not know."""
    family = loaded.model.config.model_type
    if family != "llama":
        raise InputError(
            "The rivals' code is driven for Llama models only.",
            where=settings.model,
            observed=family,
            expected="llama",
        )


def _measured_rows(
    settings: _Settings,
    code: Path,
    loaded: LoadedModel,
    layers: list[Layer],
    tests: torch.Tensor,
    tokens: torch.Tensor,
) -> Iterator[dict[str, Any]]:
    """Rows in the order of the table: dense, then theirs and ours in turn."""
    dense = _quality_of(loaded.model, tests)
    yield {"by": "-", "method": "dense", "kept_fraction": 1.0, "seconds": None} | dense
    for trial in RIVALS[settings.rival].run(code, loaded.model, layers, tokens, settings.keep):
        note(f"{trial.name}: compressed in {trial.seconds:.0f} s, now measuring")
        theirs = {
            "by": settings.rival,
            "method": trial.name,
            "kept_fraction": trial.plan.kept_fraction,
            "seconds": round(trial.seconds, 1),
        } | _quality_of(trial.model, tests)
        yield theirs
        if trial.ours:
            yield _our_row(trial, loaded, layers, tests, tokens, theirs)


def _our_row(
    trial: Trial,
    loaded: LoadedModel,
    layers: list[Layer],
    tests: torch.Tensor,
    tokens: torch.Tensor,
    theirs: dict[str, Any],
) -> dict[str, Any]:
    """Ours at the form and ranks of a trial, and how far it is from theirs."""
    started = time.perf_counter()
    ready = CalibratedDecoder.at_hand(
        copy.deepcopy(loaded.model), layers, TokenBatch(tokens, "theirs", 0)
    )
    done = compress_(ready, trial.plan, dtype=DTYPES["float32"])
    seconds = time.perf_counter() - started
    quality = _quality_of(done.model, tests)
    change, error = log_perplexity_change(
        np.array(theirs["window_nlls"]), np.array(quality["window_nlls"])
    )
    return {
        "by": "ours",
        "method": trial.ours,
        "kept_fraction": trial.plan.kept_fraction,
        "seconds": round(seconds, 1),
        **quality,
        "log_perplexity_change_from_theirs": change,
        "log_perplexity_change_standard_error": error,
        "matrix_differences": _matrix_differences(trial, done.model, trial.plan),
    }


def _quality_of(model: Any, tests: torch.Tensor) -> dict[str, Any]:
    """Perplexity by the protocol of quality.py."""
    measured = measure_perplexity(TorchSession(model), tests.numpy())
    return {
        "perplexity": measured.value,
        "perplexity_standard_error": measured.standard_error,
        "window_nlls": measured.window_nlls,
    }


def _matrix_differences(trial: Trial, ours: Any, plan: RankPlan) -> dict[str, float]:
    """|W_theirs - W_ours|_F / |W_ours|_F over the compressed matrices."""
    differences = []
    for group in plan.groups:
        name, columns = group.members[0], group.columns
        other, own = (product_of(m.get_submodule(name), columns) for m in (trial.model, ours))
        differences.append(float((other - own).norm() / own.norm()))
    return {"median": statistics.median(differences), "largest": max(differences)}


def _keep_entry(result: Path, rival: str, entry: dict[str, Any]) -> None:
    """Write one rival's entry and leave those of the others as they are."""
    table: dict[str, Any] = {"schema": _SCHEMA, "rivals": {}}
    if result.is_file():
        table = json.loads(result.read_text(encoding="utf-8"))
    table["rivals"][rival] = entry
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, table)


def _show(entry: dict[str, Any]) -> None:
    """The table of one rival on stdout."""
    settings = entry["settings"]
    view = Table(
        title=f"{settings['model']}; {settings['test']}, {settings['test_windows']} x "
        f"{settings['test_window_length']} tokens; calibrated on {settings['windows']} x "
        f"{settings['window_length']} of {settings['calibration']}",
        caption=f"{settings['repository']} at {settings['rival_commit'][:12]}",
    )
    for heading in ("code", "method"):
        view.add_column(heading)
    for heading in ("kept", "perplexity", "ours / theirs", "|dW| / |W|", "seconds"):
        view.add_column(heading, justify="right")
    for row in entry["rows"]:
        view.add_row(*_cells(row))
    result_console().print(view)


def _cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    change = row.get("log_perplexity_change_from_theirs")
    error = row.get("log_perplexity_change_standard_error")
    spread = "" if error is None else f" ± {error:.4f}"
    differences = row.get("matrix_differences")
    return [
        row["by"],
        row["method"],
        f"{row['kept_fraction']:.2%}",
        f"{row['perplexity']:.3f}",
        "-" if change is None else f"{np.exp(change):.4f}{spread}",
        "-" if differences is None else f"{differences['median']:.1e}",
        "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(run(command))
