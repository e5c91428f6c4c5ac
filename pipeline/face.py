"""The stages as functions: what `import pipeline` offers. Each imports its stage when called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.output import check_output

if TYPE_CHECKING:
    from pipeline.compress.request import CompressRequest
    from pipeline.engine.target import Target
    from validate.artefacts import Artefacts
    from validate.record import Ledger


def compress(
    model: str | CompressRequest,
    output: Path | str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compress a model, and write its checkpoint folder.

    Args:
        model: alias, hub id, folder or GGUF file; or a whole request.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: continue an unfinished run of the same request.
        workers: as `skipcat compress --workers` takes it, such as "local:4".
        settings: fields of `pipeline.compress.request.CompressRequest`, such as `keep_params=0.8`.

    Returns:
        report.json's content.

    Raises:
        PipelineError: bad input, or not enough disk.
    """
    from pipeline.compress.request import CompressRequest
    from pipeline.compress.run import compress_to_folder
    from pipeline.workers.workers import open_workers

    if isinstance(model, CompressRequest):
        request = dataclasses.replace(model, **settings)
    else:
        request = CompressRequest(model, **settings)
    # Before the model is loaded.
    check_output(Path(output), overwrite=overwrite, inputs=request.paths.values())
    with open_workers(workers) as own:
        return compress_to_folder(
            request, Path(output), overwrite=overwrite, resume=resume, workers=own
        )


def export(
    checkpoint: Path | str, output: Path | str, *, overwrite: bool = False, **settings: Any
) -> dict[str, Any]:
    """Export a checkpoint to an ONNX folder.

    Args:
        checkpoint: a compressed or a plain Hugging Face folder.
        output: the folder to write.
        overwrite: replace it if it exists.
        settings: fields of `pipeline.export.export.ExportRequest`, such as `profile="cpu"`.

    Returns:
        export.json's content.

    Raises:
        PipelineError: a broken checkpoint, or a model that the exporter cannot handle.
    """
    from pipeline.export.export import ExportRequest, export_folder

    request = ExportRequest(**settings)
    check_output(Path(output), overwrite=overwrite, inputs=(checkpoint,))
    return export_folder(Path(checkpoint), Path(output), request, overwrite=overwrite)


def substitute(
    model: str,
    output: Path | str,
    memory: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Make a model in few bytes that drafts for a model: `LanguageModel.open(..., draft=output)`.

    Args:
        model: alias, hub id, folder or GGUF file.
        output: the ONNX folder to write.
        memory: bytes that its weights may take, such as "60MB".
        overwrite: replace it if it exists.
        resume: continue an unfinished run of the same request.
        settings: `target` or `max_length`, and fields of
            `pipeline.compress.request.CompressRequest`, such as `calibration="valid.txt"`.

    Returns:
        export.json's content.

    Raises:
        PipelineError: a model, target or budget of which none can be made, or not enough disk.
    """
    from pipeline.substitute import build_substitute, for_model

    if settings.get("target") is not None:
        settings["target"] = str(settings["target"])
    request = for_model(model, memory, **settings)
    return build_substitute(request, Path(output), overwrite=overwrite, resume=resume)


def build_engine(
    onnx_folder: Path | str, output: Path | str, target: str | Target = "auto", **settings: Any
) -> dict[str, Any]:
    """Build a TensorRT engine out of an exported ONNX folder.

    Args:
        onnx_folder: an export in float16.
        output: the folder to write.
        target: what to build for, as `skipcat engine --target` takes it.
        settings: fields of `pipeline.engine.plan.EngineRequest`, such as `max_batch=4`.

    Returns:
        manifest.json's content.

    Raises:
        PipelineError: a folder or a target that cannot be built here, or a build that failed.
    """
    from pipeline.engine import build
    from pipeline.engine.plan import EngineRequest
    from pipeline.engine.target import resolve_target

    chosen = resolve_target(target) if isinstance(target, str) else target
    return build.build_engine(Path(onnx_folder), Path(output), EngineRequest(chosen, **settings))


def validate(
    build: Path | str | Artefacts,
    output: Path | str | None = None,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> Ledger:
    """Run the same inputs through every stage of a build, and judge each.

    Args:
        build: a folder that holds checkpoint/, onnx*/ and engine*/, or the artefacts one by one.
        output: folder for ledger.json and ledger.html; None writes nothing.
        overwrite: replace it if it exists.
        settings: as `validate.run.ValidateRequest.of` takes them, such as `text="test.txt"`.

    Returns:
        The ledger, whatever its verdict; `ledger.failures` is empty when all stages passed.

    Raises:
        PipelineError: the artefacts or the text cannot be read.
    """
    from validate.artefacts import Artefacts
    from validate.report import reported
    from validate.run import ValidateRequest
    from validate.run import validate as run

    if output is not None:
        check_output(Path(output), overwrite=overwrite)
    artefacts = Artefacts.find(Path(build)) if isinstance(build, (str, Path)) else build
    return reported(
        lambda: run(ValidateRequest.of(artefacts, **settings)),
        None if output is None else Path(output),
        overwrite=overwrite,
        inputs=artefacts.inputs,
    )
