"""Rounding the convolutions of a network to few bits: a request in, a checkpoint folder out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import __version__
from pipeline.artefact import require_free_bytes, staged_folder, write_json, write_text
from pipeline.calibrate.network import OpenedNetwork, open_network
from pipeline.checkpoint.card import rounded_card
from pipeline.checkpoint.folder import save_checkpoint, weights_record
from pipeline.checkpoint.install import install_
from pipeline.compress.methods import METHODS
from pipeline.compress.plan.mixed_precision import ConvChoice, rounded_convs
from pipeline.compress.request import CompressRequest
from pipeline.errors import UsageError
from pipeline.int8.calibrate import activation_grids, observe
from pipeline.int8.convert import (
    WeightRounding,
    as_rounded,
    conv_names,
    folded_kernels,
    int8_entries,
    int8_tensors,
)
from pipeline.int8.grids import ActivationGrid
from pipeline.int8.outputs import output_error
from pipeline.int8.runtimes import Int8Runtime, int8_runtime
from pipeline.int8.sensitivity import conv_sensitivities
from pipeline.int8.structure import ConvStructure
from pipeline.model.fingerprint import model_hashes
from pipeline.progress import note
from pipeline.provenance import provenance, public_name

_SCHEMA = 1
_IMAGES = 64
_FLOAT16_BYTES, _FLOAT32_BYTES = 2, 4


@dataclass(frozen=True)
class _Measured:
    """A network, and what calibration said of it."""

    opened: OpenedNetwork
    structure: ConvStructure
    batches: list[torch.Tensor]
    grids: dict[int, ActivationGrid]
    runtime: Int8Runtime
    rounding: WeightRounding

    def losses(self) -> Callable[[], float]:
        """How far the model, as it is when this is called, is from itself as it is now."""
        model = self.opened.model
        with torch.no_grad():
            targets = [model(batch) for batch in self.batches]

        def measure() -> float:
            with torch.no_grad():
                errors = [
                    float(output_error(model(batch), target))
                    for batch, target in zip(self.batches, targets, strict=True)
                ]
            return sum(errors) / len(errors)

        return measure


def round_to_folder(
    request: CompressRequest, output: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Round the convolutions of a network and write its checkpoint folder.

    Args:
        request: with a method that rounds convolutions.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: begin anew where an earlier run left an unfinished folder.

    Returns:
        report.json's content.

    Raises:
        PipelineError: a request that cannot be meant, a network without convolutions, bad images.
    """
    started = time.monotonic()
    _require_meant(request)
    runtime = int8_runtime(request.runtime)
    with staged_folder(
        output, overwrite=overwrite, resume=resume, inputs=request.paths.values()
    ) as folder:
        opened = open_network(request.model)
        parameters = sum(p.numel() for p in opened.model.parameters())
        require_free_bytes(folder, parameters * _FLOAT32_BYTES)
        batches, calibration = opened.read_batches(
            request.calibration, request.windows or _IMAGES, request.seed
        )
        measured = _measure(request, opened, runtime, batches)
        entries, convolutions, loss = _round_(measured, request)
        save_checkpoint(
            opened.model, opened.processor, entries, folder, torch.float32,
            source=opened.source.folder(),
        )  # fmt: skip
        weights = weights_record(folder)
        report = {
            "schema": _SCHEMA,
            "runtime": runtime.name,
            "bits": {
                "kernels": measured.rounding.bits,
                "activations": max(grid.codes.bits for grid in measured.grids.values()),
            },
            "convolutions": convolutions,
            "left_out": measured.structure.left_out,
            "loss": loss,
            "totals": {
                "total_before": parameters,
                "stored_bytes": sum(file["bytes"] for file in weights.values()),
                "float32_bytes": parameters * _FLOAT32_BYTES,
                "rounded": len(conv_names(entries)),
                "seconds": time.monotonic() - started,
            },
            "weights": weights,
        }
        recipe = _recipe(request, opened, calibration)
        write_json(folder / "recipe.json", recipe)
        write_json(folder / "report.json", report)
        write_text(folder / "README.md", rounded_card(recipe, report))
    return report


def _require_meant(request: CompressRequest) -> None:
    """Refuse options that are for linear layers."""
    for flag, given in (
        ("--weights", request.weights is not None),
        ("--table", request.table is not None),
        ("--plan", request.plan is not None),
        ("--cache-bytes, --keep-cache, --context", request.shrinks_cache),
        ("--balance", request.balance > 0),
        ("--rotate", request.rotates),
        ("--learn-rounding", request.learn_rounding),
        ("--stream-weights", request.stream_weights),
        ("--window-length", request.window_length is not None),
    ):
        if given:
            raise UsageError(
                "This option is for linear layers.", where=f"{flag} with --method {request.method}"
            )
    if request.dtype not in ("auto", "float32"):
        raise UsageError(
            "What is not rounded stays in float32, in which its sums are exact.",
            where="--dtype",
            observed=request.dtype,
        )


def _measure(
    request: CompressRequest,
    opened: OpenedNetwork,
    runtime: Int8Runtime,
    batches: list[torch.Tensor],
) -> _Measured:
    structure = ConvStructure.of(opened.model, batches[0])
    method = METHODS[request.method].convolutions
    assert method is not None
    seen = observe(opened.model, structure, batches)
    for observer in seen.values():
        if observer.low == observer.high:
            note(f"{observer.name} is 0 in all of calibration: it will be 0 for every image")
    grids = activation_grids(seen, runtime, method.observer, method.activation_bits)
    rounding = WeightRounding(method.bits, method.per_channel, method.squares)
    for name, reason in structure.left_out.items():
        note(f"stays as it is: {name}: {reason}")
    return _Measured(opened, structure, batches, grids, runtime, rounding)


def _round_(
    measured: _Measured, request: CompressRequest
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], float]:
    """Round all convolutions, or as many as a budget of bytes asks, in place.

    Returns:
        Entries, what report.json says of each convolution, and the loss of all of it.
    """
    model, structure = measured.opened.model, measured.structure
    measure = measured.losses()
    chosen = list(structure.convs)
    losses: dict[str, float] = {}
    if request.searches_bits or request.keep_macs is not None:
        chosen, losses = _chosen(measured, request, measure)
    entries = int8_entries(structure, measured.grids, measured.runtime, measured.rounding, chosen)
    kernels = folded_kernels(model, entries)
    tensors = int8_tensors(entries, measured.grids, kernels, measured.rounding)
    with as_rounded(model, entries, tensors):
        loss = measure()
    install_(model, entries, tensors)
    convolutions = {
        name: {"rounded": name in entries, "macs": site.macs}
        | ({"loss": losses[name]} if name in losses else {})
        for name, site in structure.convs.items()
    }
    return entries, convolutions, loss


def _chosen(
    measured: _Measured, request: CompressRequest, measure: Callable[[], float]
) -> tuple[list[str], dict[str, float]]:
    """The convolutions that a budget of bytes or products has rounded; what each alone loses."""
    model = measured.opened.model
    losses = conv_sensitivities(
        model, measured.structure, measured.grids, measured.runtime, measured.rounding, measure
    )
    kernels = {name: model.get_parameter(f"{name}.weight") for name in losses}
    if request.keep_macs is not None:
        macs = {name: site.macs for name, site in measured.structure.convs.items()}
        free = {name: ConvChoice.of_float_macs(macs[name], losses[name]) for name in losses}
        return rounded_convs(free, int(request.keep_macs * sum(macs.values()))), losses
    choices = {
        name: ConvChoice.of_bytes(kernel.numel(), len(kernel), losses[name], measured.rounding.bits)
        for name, kernel in kernels.items()
    }
    parameters = sum(p.numel() for p in model.parameters())
    rest = parameters - sum(kernel.numel() for kernel in kernels.values())
    budget = request.budget_bytes(parameters * _FLOAT16_BYTES) - rest * _FLOAT32_BYTES
    return rounded_convs(choices, budget), losses


def _recipe(
    request: CompressRequest, opened: OpenedNetwork, calibration: dict[str, Any]
) -> dict[str, Any]:
    """recipe.json: all that is needed to make the checkpoint again, and nothing of this machine."""
    named = {name: public_name(value) for name, value in request.paths.items()}
    return {
        "schema": _SCHEMA,
        "task": opened.task,
        "model": named["model"],
        "model_is_local": Path(request.model).expanduser().exists(),
        "model_files": model_hashes(request.model),
        "label": opened.source.label,
        "dtype": "float32",
        "settings": asdict(request) | named,
        "method": METHODS[request.method].describe(),
        "calibration": calibration,
        "version": __version__,
        "provenance": provenance(),
    }
