r"""A ViT trained here on scikit-learn's digits: held-out accuracy and KL against what is kept.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.vision

1437 images train the model and calibrate every method; the 360 that none of them saw are measured.
No hub and no other download; a minute or two.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.digits import Digits, make_digits
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import UsageError
from pipeline.progress import note
from pipeline.provenance import provenance
from validate.artefacts import Artefacts
from validate.classifier import ImageOptions
from validate.run import ValidateRequest, validate
from validate.stages import ORIGINAL, SKIP_FORM

_RESULT = RESULTS / "vision.json"
_METHODS = ("skipcat-kl", "skipcat", "svd-llm")
_KEPT = (0.6, 0.4, 0.3, 0.2, 0.15, 0.1)
# Of the float16 bytes; ranks and bits are searched together. The first four are what the plain
# quantisers below take.
_KEPT_BYTES = (0.5755, 0.3693, 0.3095, 0.2487, 0.2, 0.15)
# Plain quantisers of the same matrices: everything is kept, in low bits.
_FORMATS = ("int8-b64-sym", "int4-b32-asym", "int3-b32-asym", "int2-b32-asym")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=_RESULT, show_default=True)
def command(output: Path) -> None:
    """Train, compress and measure; print a row each and write the JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        digits = make_digits(Path(folder))
        rows = []
        for place, changes in enumerate(_cases()):
            rows.append(_measure(digits, changes, Path(folder) / str(place)))
            note(str(rows[-1]))
        write_json(
            output,
            {
                "schema": 1,
                "rows": rows,
                "machine": describe_machine(),
                "load_average": load_average(),
                "provenance": provenance(),
            },
        )


def _cases() -> list[dict[str, Any]]:
    """What is changed in the request, case by case."""
    found: list[dict[str, Any]] = [
        {"method": method, "keep_params": kept} for method in _METHODS for kept in _KEPT
    ]
    found += [{"keep_bytes": kept, "runtime": "any"} for kept in _KEPT_BYTES]
    for style in _FORMATS:
        for method in ("rtn", "gptq"):
            found.append({"method": method, "weights": style, "keep_params": 1.0, "runtime": "any"})
    return found


def _measure(digits: Digits, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case: sizes, and accuracy, KL and top-1 on the held-out images."""
    request = CompressRequest(
        str(digits.model), calibration=str(digits.train), dtype="float16", **changes
    )
    try:
        report = compress_to_folder(request, folder)
    except UsageError as error:  # a budget below the smallest plan
        return changes | {"refused": str(error)}
    artefacts = Artefacts(str(digits.model), folder)
    ledger = validate(ValidateRequest(artefacts, ImageOptions(str(digits.test))))
    rows = {row.name: row for row in ledger.rows}
    original, skip = rows[ORIGINAL].accuracy, rows[SKIP_FORM]
    assert original is not None
    assert skip.accuracy is not None
    assert skip.to_original is not None
    totals = report["totals"]
    return changes | {
        "kept_fraction": totals["kept_fraction"],
        "stored_bytes": totals["stored_bytes"],
        "float16_bytes": 2 * totals["total_before"],
        "accuracy": asdict(skip.accuracy),
        "original_accuracy": original.value,
        "kl_nats_per_image": skip.to_original.metrics.kl_mean,
        "top1_agreement": skip.to_original.metrics.top1_agreement,
    }


if __name__ == "__main__":
    sys.exit(run(command))
