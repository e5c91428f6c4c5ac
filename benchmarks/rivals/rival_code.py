"""A rival's own public code beside ours: the same model, tokens, ranks and perplexity.

    git clone https://github.com/hiahei/Swift-SVD CLONE
    python benchmarks/rivals/rival_code.py --rival swift-svd --code CLONE --model smollm2-135m \
        --calibration ../shared/data/wikitext2_valid_tokenised.txt \
        --test ../shared/data/wikitext2_test.txt

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
from rivals import RIVALS, Trial, commit_of, product_of
from texts import hash_of_text, tokens_of

from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.cli.main import explain
from pipeline.cli.options import result_console
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.run import DTYPES
from pipeline.compress.walk import compress_
from pipeline.errors import InputError, UsageError
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import Layer, decoder_structure
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.runtime.sessions.torch_session import TorchSession
from validate.metrics import log_perplexity_change
from validate.quality import measure_perplexity

SCHEMA = 1
RESULT = Path(__file__).parent / "results" / "rival_code.json"


@dataclass(frozen=True)
class Settings:
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
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULT)
def command(test: Path, calibration: Path, code: Path, result: Path, **options: Any) -> None:
    """Run a rival's own code beside ours."""
    rival = RIVALS[options["rival"]]
    settings = Settings(
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
    entry = compare(settings, code.resolve(), test, calibration, result)
    show(entry)


def compare(
    settings: Settings, code: Path, test: Path, calibration: Path, result: Path
) -> dict[str, Any]:
    """Measure dense, theirs and ours; every row is in `result` as soon as it is finished."""
    loaded = load_model(settings.model, dtype=torch.float32)
    layers = decoder_structure(loaded.model)
    refuse_other_family(loaded, settings)
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
    for row in measured_rows(settings, code, loaded, layers, tests.tokens, calibrations.tokens):
        entry["rows"].append(row | {"load_average": load_average()})
        keep_entry(result, settings.rival, entry)
        note(f"{row['by']}, {row['method']}: perplexity {row['perplexity']:.2f}")
        gc.collect()  # a model is a web of cycles, and the next one needs its memory
    return entry


def refuse_other_family(loaded: LoadedModel, settings: Settings) -> None:
    """Raise InputError for a model that the rivals' code does not know."""
    family = loaded.model.config.model_type
    if family != "llama":
        raise InputError(
            "The rivals' code is driven for Llama models only.",
            where=settings.model,
            observed=family,
            expected="llama",
        )


def measured_rows(
    settings: Settings,
    code: Path,
    loaded: LoadedModel,
    layers: list[Layer],
    tests: torch.Tensor,
    tokens: torch.Tensor,
) -> Iterator[dict[str, Any]]:
    """Rows in the order of the table: dense, then theirs and ours in turn."""
    dense = quality_of(loaded.model, tests)
    yield {"by": "-", "method": "dense", "kept_fraction": 1.0, "seconds": None} | dense
    for trial in RIVALS[settings.rival].run(code, loaded.model, layers, tokens, settings.keep):
        note(f"{trial.name}: compressed in {trial.seconds:.0f} s, now measuring")
        theirs = {
            "by": settings.rival,
            "method": trial.name,
            "kept_fraction": trial.plan.kept_fraction,
            "seconds": round(trial.seconds, 1),
        } | quality_of(trial.model, tests)
        yield theirs
        if trial.ours:
            yield our_row(trial, loaded, layers, tests, tokens, theirs)


def our_row(
    trial: Trial,
    loaded: LoadedModel,
    layers: list[Layer],
    tests: torch.Tensor,
    tokens: torch.Tensor,
    theirs: dict[str, Any],
) -> dict[str, Any]:
    """Ours at the form and ranks of a trial, and how far it is from theirs."""
    started = time.perf_counter()
    done = compress_(
        copy.deepcopy(loaded.model), layers, trial.plan, tokens, dtype=DTYPES["float32"]
    )
    seconds = time.perf_counter() - started
    quality = quality_of(done.model, tests)
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
        "matrix_differences": matrix_differences(trial, done.model, trial.plan),
    }


def quality_of(model: Any, tests: torch.Tensor) -> dict[str, Any]:
    """Perplexity by the protocol of quality.py."""
    measured = measure_perplexity(TorchSession(model), tests.numpy())
    return {
        "perplexity": measured.value,
        "perplexity_standard_error": measured.standard_error,
        "window_nlls": measured.window_nlls,
    }


def matrix_differences(trial: Trial, ours: Any, plan: RankPlan) -> dict[str, float]:
    """|W_theirs - W_ours|_F / |W_ours|_F over the compressed matrices."""
    differences = []
    for group in plan.groups:
        name, columns = group.members[0], group.columns
        other, own = (product_of(m.get_submodule(name), columns) for m in (trial.model, ours))
        differences.append(float((other - own).norm() / own.norm()))
    return {"median": statistics.median(differences), "largest": max(differences)}


def keep_entry(result: Path, rival: str, entry: dict[str, Any]) -> None:
    """Write one rival's entry and leave those of the others as they are."""
    table: dict[str, Any] = {"schema": SCHEMA, "rivals": {}}
    if result.is_file():
        table = json.loads(result.read_text(encoding="utf-8"))
    table["rivals"][rival] = entry
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, table)


def show(entry: dict[str, Any]) -> None:
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
        view.add_row(*cells(row))
    result_console().print(view)


def cells(row: dict[str, Any]) -> list[str]:
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


def main() -> int:
    """Run; failures become the messages and exit status of `skipcat`."""
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except Exception as error:
        failure = explain(error)
        if failure is None or failure.exit_status == 1:
            raise
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
