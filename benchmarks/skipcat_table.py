"""The table of compression methods: dense, whitened SVD, Cat, Skip and Cat+Skip at one budget.

    python benchmarks/skipcat_table.py --test ../shared/data/wikitext2_test.txt \
        --calibration ../shared/data/wikitext2_valid_tokenised.txt

Perplexity on the first windows of the test text, each on an empty cache, with no special tokens;
every window predicts its own tokens after the first. Model and factors in float32. Each row is an
ordinary run of `pipeline.compress.compress.compress_` on a copy of the model, calibration included,
so that its seconds are those of `skipcat compress` without loading and saving. The JSON is written
after every row, and `--resume` goes on from it.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import describe_machine, load_average
from rich.table import Table

from pipeline.artefact import sha256_of_file, write_json
from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.cli.main import explain
from pipeline.cli.options import result_console
from pipeline.compress.compress import compress_
from pipeline.compress.plan import uniform_plan
from pipeline.compress.recipe import DTYPES, parameter_count
from pipeline.errors import InputError, UsageError
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import decoder_structure
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.runtime.torch_session import TorchSession
from validate.metrics import log_perplexity_change, perplexity_with_error
from validate.quality import Quality, measure_quality

SCHEMA = 1
RESULT = Path(__file__).parent / "results" / "skipcat_table.json"
DENSE = "dense"
# Row -> (cat, skip).
METHODS = {
    "whitened SVD": (False, False),
    "Cat": (True, False),
    "Skip": (False, True),
    "Cat+Skip (SkipCat)": (True, True),
}


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on."""

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
@click.option("--test", type=click.Path(path_type=Path), required=True, help="Test text, UTF-8.")
@click.option("--calibration", required=True, help="Calibration text, or 'self'.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--keep", type=click.FloatRange(0, 1, min_open=True), default=0.8, show_default=True)
@click.option("--windows", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--window-length", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--test-windows", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--test-window-length", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULT)
@click.option("--resume", is_flag=True, help="Keep the rows that the JSON has already.")
def command(
    test: Path,
    calibration: str,
    model: str,
    keep: float,
    windows: int,
    window_length: int,
    test_windows: int,
    test_window_length: int,
    seed: int,
    result: Path,
    resume: bool,
) -> None:
    """Measure the table of compression methods."""
    settings = Settings(
        model=model,
        keep=keep,
        test=test.name,
        test_sha256=hash_of_text(test),
        test_windows=test_windows,
        test_window_length=test_window_length,
        calibration=Path(calibration).name,
        calibration_sha256="" if calibration == "self" else hash_of_text(Path(calibration)),
        windows=windows,
        window_length=window_length,
        seed=seed,
    )
    refuse_test_text(settings)
    table = open_table(settings, result, resume=resume)
    measure_table(settings, test, calibration, table, result)
    show(table)


def hash_of_text(path: Path) -> str:
    """SHA-256 of a text file.

    Raises:
        InputError: there is none; says what to pass.
    """
    if not path.is_file():
        raise InputError(
            "The text is not there.",
            where=path,
            expected="--test: the raw WikiText-2 test split; --calibration: its validation split",
            change="pass the two files; neither comes with the project",
        )
    return sha256_of_file(path)


def refuse_test_text(settings: Settings) -> None:
    """Raise UsageError when the model would be calibrated on the text it is tested on."""
    if settings.test_sha256 == settings.calibration_sha256:
        raise UsageError(
            "Calibration and test are the same text, so the perplexity would mean nothing.",
            observed=settings.calibration,
            change="calibrate on the validation split, or pass --calibration self",
        )


def open_table(settings: Settings, result: Path, *, resume: bool) -> dict[str, Any]:
    """A new table, or the unfinished one of an earlier run with the same settings.

    Raises:
        UsageError: the earlier run had other settings.
    """
    fresh = {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "provenance": provenance(),
        "rows": [],
    }
    if not resume or not result.is_file():
        return fresh
    earlier: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if earlier["settings"] != fresh["settings"]:
        changed = [k for k, v in asdict(settings).items() if earlier["settings"].get(k) != v]
        raise UsageError(
            "The rows there were measured with other settings.",
            where=result,
            observed=f"differs in {', '.join(changed)}",
            change="repeat those settings, pass another --json, or leave out --resume",
        )
    return earlier


def measure_table(
    settings: Settings, test: Path, calibration: str, table: dict[str, Any], result: Path
) -> None:
    """Measure every row that `table` lacks, and write it to `result` as it is finished."""
    finished = {row["method"] for row in table["rows"]}
    missing = [name for name in (DENSE, *METHODS) if name not in finished]
    if not missing:
        return
    note(f"loading {settings.model}")
    loaded = load_model(settings.model, dtype=torch.float32)
    count, length = settings.test_windows, settings.test_window_length
    tests = tokens_of(str(test), loaded, count, length, settings.seed, sequential=True)
    calibrations = tokens_of(
        calibration, loaded, settings.windows, settings.window_length, settings.seed
    )
    table["texts"] = {"test": tests.describe(), "calibration": calibrations.describe()}
    for name in missing:
        note(f"{name} ...")
        loads = [load_average()]
        if name == DENSE:
            row = dense_row(loaded, tests.tokens.numpy())
        else:
            row = compressed_row(name, settings, loaded, tests, calibrations, table["rows"][0])
        row["load_average"] = [*loads, load_average()]
        table["rows"].append(row)
        result.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, table)
        note(f"{name}: perplexity {row['perplexity']:.2f}")
        gc.collect()  # a model is a web of cycles, and the next row needs its memory


def tokens_of(
    spec: str, loaded: LoadedModel, count: int, length: int, seed: int, *, sequential: bool = False
) -> TokenBatch:
    """Windows of a text, as `skipcat compress` and `skipcat validate` take them."""
    return load_tokens(
        spec,
        loaded.tokenizer,
        loaded.model,
        count=count,
        length=length,
        seed=seed,
        sequential=sequential,
    )


def dense_row(loaded: LoadedModel, windows: np.ndarray) -> dict[str, Any]:
    """The row of the model as it is."""
    layers = decoder_structure(loaded.model)
    linear = sum(sum(g.out_features) * g.in_features for layer in layers for g in layer.groups)
    session = TorchSession(loaded.model, DENSE)
    quality = measure_quality(session, None, windows, note)
    return {
        "method": DENSE,
        "kept_fraction": 1.0,
        "decoder_linear_parameters": linear,
        "parameters": parameter_count(loaded.model),
        **quality_fields(quality, None),
        "compress_seconds": None,
        "largest_interpolation": None,
    }


def compressed_row(
    name: str,
    settings: Settings,
    loaded: LoadedModel,
    tests: TokenBatch,
    calibrations: TokenBatch,
    dense: dict[str, Any],
) -> dict[str, Any]:
    """The row of one method: compress a copy, then test it beside the dense model."""
    cat, skip = METHODS[name]
    model = copy.deepcopy(loaded.model)
    layers = decoder_structure(model)
    plan = uniform_plan(layers, settings.keep, cat=cat, skip=skip)
    started = time.perf_counter()
    done = compress_(model, layers, plan, calibrations.tokens, dtype=DTYPES["float32"])
    seconds = time.perf_counter() - started
    note(f"{name}: compressed in {seconds:.0f} s, now measuring")
    sessions = TorchSession(done.model, name), TorchSession(loaded.model, DENSE)
    quality = measure_quality(*sessions, tests.tokens.numpy(), note)
    interpolations = [group.get("largest_interpolation") for group in done.groups]
    return {
        "method": name,
        "kept_fraction": plan.kept_fraction,
        "decoder_linear_parameters": sum(group.kept_parameters for group in plan.groups),
        "parameters": parameter_count(done.model),
        **quality_fields(quality, np.array(dense["window_nlls"])),
        "compress_seconds": round(seconds, 1),
        "largest_interpolation": max((x for x in interpolations if x is not None), default=None),
    }


def quality_fields(quality: Quality, dense_nlls: np.ndarray | None) -> dict[str, Any]:
    """What the row says of a model's quality."""
    nlls = np.array(quality.window_nlls)
    perplexity, error = perplexity_with_error(nlls)
    change, change_error = log_perplexity_change(nlls if dense_nlls is None else dense_nlls, nlls)
    return {
        "perplexity": perplexity,
        "perplexity_standard_error": error,
        "log_perplexity_change": change,
        "log_perplexity_change_standard_error": change_error,
        "kl_to_dense": 0.0 if quality.kl is None else quality.kl,
        "top1_to_dense": 1.0 if quality.top1 is None else quality.top1,
        "window_nlls": quality.window_nlls,
        "measure_seconds": quality.seconds,
    }


def show(table: dict[str, Any]) -> None:
    """The table on stdout."""
    settings = table["settings"]
    view = Table(
        title=f"{settings['model']}, {settings['keep']:.0%} of the decoder's linear parameters; "
        f"{settings['test']}, {settings['test_windows']} x {settings['test_window_length']} tokens"
        f"; calibrated on {settings['windows']} x {settings['window_length']} of "
        f"{settings['calibration']}"
    )
    headings = ("kept", "perplexity", "x dense", "KL to dense", "top-1", "compress s", "|A'|")
    view.add_column("method")
    for heading in headings:
        view.add_column(heading, justify="right")
    for row in table["rows"]:
        view.add_row(*cells(row))
    result_console().print(view)


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    seconds, largest = row["compress_seconds"], row["largest_interpolation"]
    error = row["perplexity_standard_error"]
    return [
        row["method"],
        f"{row['kept_fraction']:.1%}",
        f"{row['perplexity']:.2f}" + ("" if error is None else f" ± {error:.2f}"),
        f"{np.exp(row['log_perplexity_change']):.3f}",
        f"{row['kl_to_dense']:.3f}",
        f"{row['top1_to_dense']:.1%}",
        "-" if seconds is None else f"{seconds:.0f}",
        "-" if largest is None else f"{largest:.3f}",
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
