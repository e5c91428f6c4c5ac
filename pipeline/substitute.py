"""A substitute: the model in few bytes, by the search of bits and ranks, ready to draft for it.

What a model drafts with has to agree with it in everything but its bytes (SubSpec, 2025). Can be
called: `pipeline.substitute(model, folder, memory="60MB")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.artefact import discard, sha256_of_file, staged_folder
from pipeline.build import require_inputs
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError, UsageError
from pipeline.export.contract import CPU, DEFAULT_MAX_LENGTH, RECORD_FILE
from pipeline.export.export import export_folder, prove_model
from pipeline.export.record import ExportRecord
from pipeline.export.request import ExportRequest
from pipeline.json_file import read_json_object
from pipeline.lazy import make_callable
from pipeline.model.fingerprint import file_hashes, model_hashes
from pipeline.model.source import resolve_source
from pipeline.model.task import refuse_other_tasks, task_of_model
from pipeline.output import check_output
from pipeline.progress import note
from pipeline.quantize.formats import RUNTIMES
from pipeline.runtime.draft_model import can_pay, open_drafted, require_target
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.stages import BUILD_RECORD, Stages
from pipeline.tokenizer_files import vocabulary_hashes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

make_callable(__name__, "pipeline.face:substitute")

_CHECKPOINT, _EXPORT = "checkpoint", "onnx-cpu"


@dataclass(frozen=True)
class _SubstituteRequest:
    """What decides what a substitute is.

    Attributes:
        compress: the model, and its budget of bytes in `memory`.
        target: an export of the profile `cpu` that it will draft for; None where there is none yet.
        max_length: places of the cache, which are the target's; None takes those of `target`, or
            the usual number.
    """

    compress: CompressRequest
    target: str | None = None
    max_length: int | None = None

    def check(self) -> None:
        """Refuse what cannot be meant, before any work is done.

        Raises:
            UsageError: no budget, or a length beside a target, which has one.
        """
        self.compress.check()
        if self.compress.memory is None:
            raise UsageError(
                "A substitute has a budget of bytes.", where="--memory", expected="such as 60MB"
            )
        if self.compress.shrinks_cache:
            raise UsageError(
                "A substitute has the cache of its target.",
                change="leave --cache-bytes, --keep-cache and --context out",
            )
        if self.target is not None and self.max_length is not None:
            raise UsageError(
                "The length of the cache is the target's.", change="leave --max-length out"
            )
        ExportRequest(CPU, max_length=self.max_length or DEFAULT_MAX_LENGTH).check()

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is read, as it was named."""
        return (*self.compress.paths.values(), *filter(None, [self.target]))


def build_substitute(
    request: _SubstituteRequest, output: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Compress a model for the CPU and export it, so that it can draft for the model itself.

    The unfinished folder is kept when the run is interrupted or fails, and `resume` continues it.

    Args:
        request: what to make.
        output: an export of the profile `cpu`, for `--draft`.
        overwrite: replace it if it exists.
        resume: continue an unfinished run of the same request.

    Returns:
        export.json's content.

    Raises:
        PipelineError: a model, target or budget of which none can be made, or not enough disk.
    """
    request.check()
    check_output(output, overwrite=overwrite, inputs=request.inputs)
    wanted = request.compress
    refuse_other_tasks(task_of_model(wanted.model), wanted.model)
    record = None if request.target is None else require_target(Path(request.target))
    config = require_inputs(wanted)
    budget_bytes = _require_budget(wanted, config)
    max_length = request.max_length or DEFAULT_MAX_LENGTH
    if record is not None:
        _require_same_model(request, record, config)
        can_pay(Path(str(request.target)), budget_bytes)
        max_length = record.max_length
    how = ExportRequest(CPU, max_length=max_length, trust_remote_code=wanted.trust_remote_code)
    note("proving the graph on a small twin of the model ...")
    prove_model(config, how)
    with staged_folder(
        output, overwrite=overwrite, keep=True, resume=resume, inputs=request.inputs
    ) as folder:
        _run_stages(folder, request, how, resume=resume)
    return read_json_object(output / RECORD_FILE)


def _run_stages(
    folder: Path, request: _SubstituteRequest, how: ExportRequest, *, resume: bool
) -> None:
    """Compress and export, each unless it is finished; leave the export alone in the folder."""
    state = Stages.take_up(folder, request, _inputs_of(request))
    checkpoint, export = folder / _CHECKPOINT, folder / _EXPORT
    state.run(
        "compress",
        _CHECKPOINT,
        lambda path: compress_to_folder(request.compress, path, resume=resume),
    )
    state.run("export", _EXPORT, lambda path: export_folder(checkpoint, path, how))
    for path in sorted(export.iterdir()):  # a run that was killed here moves the others
        path.rename(folder / path.name)
    _require_use(folder, request.target)
    for rest in (export, checkpoint, folder / BUILD_RECORD):
        discard(rest)


def _inputs_of(request: _SubstituteRequest) -> dict[str, Any]:
    """What the result depends on besides the request: what is read, and by which skipcat."""
    wanted = request.compress
    target = None if request.target is None else Path(request.target) / RECORD_FILE
    return {
        "model": model_hashes(wanted.model),
        "files": file_hashes(wanted.calibration, wanted.plan),
        "target": None if target is None else sha256_of_file(target),
        "version": __version__,
    }


def _require_budget(wanted: CompressRequest, config: PretrainedConfig) -> int:
    """The budget in bytes; raise UsageError where not even the embedding fits into it."""
    runtime, text = RUNTIMES[wanted.runtime], config.get_text_config()
    rows, columns = text.vocab_size, text.hidden_size
    table = min(format.stored_bytes(rows, columns, runtime.scale_bytes) for format in runtime.table)
    budget_bytes = wanted.budget_bytes(0)
    if budget_bytes <= table:
        raise UsageError(
            "The budget is too small: the embedding alone does not fit.",
            where="--memory",
            observed=f"{budget_bytes / 1e6:.2f} MB",
            expected=f"more than {table / 1e6:.2f} MB, {rows:,} x {columns:,} numbers in "
            f"{min(format.bits for format in runtime.table)} bits",
        )
    return budget_bytes


def _require_same_model(
    request: _SubstituteRequest, record: ExportRecord, config: PretrainedConfig
) -> None:
    """Raise InputError where the target is seen to be of another model, before it is compressed."""
    text, target = config.get_text_config(), Path(str(request.target))
    for name, found, expected in (
        ("vocab_size", text.vocab_size, record.vocab_size),
        ("num_layers", text.num_hidden_layers, record.num_layers),
    ):
        if found != expected:
            raise InputError(
                "The target is of another model.",
                where=request.compress.model,
                observed=f"{name} {found}",
                expected=f"{name} {expected}, as {target} has",
                change="give the model that the target was exported from",
            )
    folder = resolve_source(request.compress.model).folder()
    if folder is None or not (folder / "tokenizer.json").is_file():
        return
    if vocabulary_hashes(folder) != vocabulary_hashes(target):
        raise InputError(
            "The target is of another model: its tokenizer is another one.",
            where=request.compress.model,
            expected=f"the tokenizer files of {target}",
            change="give the model that the target was exported from",
        )


def _require_use(export: Path, target: str | None) -> None:
    """Raise InputError where an export does not run, or cannot draft for the target."""
    if target is None:
        CpuSession(export)
    else:
        open_drafted(Path(target), export, length=1)


def for_model(model: str, memory: str, **settings: Any) -> _SubstituteRequest:
    """The request for a model under a budget; `settings` as of both requests.

    Raises:
        TypeError: a setting that neither has.
    """
    own = {name: settings.pop(name) for name in ("target", "max_length") if name in settings}
    return _SubstituteRequest(CompressRequest(model, memory=memory, **settings), **own)
