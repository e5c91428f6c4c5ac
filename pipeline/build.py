"""All stages in order: what `make engine` runs. Finished stages are kept, and resumed from."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.artefact import clear
from pipeline.child_process import Beside
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.engine.target import Target, resolve_target
from pipeline.errors import UsageError, shortage_of
from pipeline.export.contract import CPU, DEFAULT_MAX_LENGTH, DEFAULT_PROFILE, FLOAT16, FLOAT32
from pipeline.export.export import export_folder, prove_model
from pipeline.export.request import ExportRequest
from pipeline.folder_lock import FolderLock
from pipeline.machine import product_threads
from pipeline.model.fingerprint import file_hashes, model_hashes
from pipeline.model.task import refuse_other_tasks, task_of_model
from pipeline.output import check_output, real_path
from pipeline.progress import note
from pipeline.stages import Stages, holds_something, read_build_record
from pipeline.workers.workers import open_workers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from validate.artefacts import Artefacts
    from validate.record import Ledger
    from validate.run import ValidateRequest


@dataclass(frozen=True)
class BuildRequest:
    """Everything that decides what a build produces.

    Attributes:
        compress: model, budget, calibration.
        target: as `skipcat engine --target` takes it.
        max_length: cache length of the exported graphs.
        eval_text: a text file, or `self`.
        eval_windows: windows of the perplexity.
        eval_length: tokens in each.
    """

    compress: CompressRequest
    target: str = "auto"
    max_length: int = DEFAULT_MAX_LENGTH
    eval_text: str = "self"
    eval_windows: int = 16
    eval_length: int = 256

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is read, as it was named."""
        return (*self.compress.paths.values(), self.eval_text)

    def check(self) -> None:
        """Refuse values that cannot be meant, or that a later stage would refuse.

        Raises:
            InputError: the model is no language model.
            UsageError: names the value and its range.
        """
        from validate.artefacts import Artefacts

        self.compress.check()
        refuse_other_tasks(task_of_model(self.compress.model), self.compress.model)
        ExportRequest(max_length=self.max_length).check()
        artefacts = Artefacts(self.compress.model)
        texts: Any = self.validation(artefacts).options
        texts.check(artefacts)
        if texts.longest_input > self.max_length:
            raise UsageError(
                "The cache is too short for the evaluation.",
                where="--max-length",
                observed=self.max_length,
                expected=f"at least {texts.longest_input}",
            )

    def validation(self, artefacts: Artefacts) -> ValidateRequest:
        """What the last stage is asked to do."""
        from validate.run import ValidateRequest

        return ValidateRequest.of(
            artefacts,
            seed=self.compress.seed,
            trust_remote_code=self.compress.trust_remote_code,
            text=self.eval_text,
            windows=self.eval_windows,
            window_length=self.eval_length,
        )


Build = Stages[BuildRequest]


def build(
    request: BuildRequest,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: str | None = None,
) -> tuple[Build, Target, Ledger]:
    """Compress, export, build the engine and validate, into sub-folders of `folder`.

    Args:
        request: what to build.
        folder: gets checkpoint/, onnx/, onnx-fp16/, engine-<target>/ and ledger/; onnx-cpu/, too,
            when weights are in low-bit formats for ONNX Runtime.
        overwrite: start afresh if it exists.
        resume: keep the stages that an earlier run of the same request finished.
        workers: who computes what is independent in `compress`, as its `--workers` says.

    Returns:
        The build's record, its target, and the ledger, whatever its verdict.

    Raises:
        PipelineError: bad input, a missing package, or not enough memory or disk.
    """
    request.check()
    target = resolve_target(request.target)
    note(f"target: {target.flavour}, because {target.reason}")
    _refuse_missing_packages(target)
    _refuse_output(request, folder, overwrite=overwrite, resume=resume)
    config = _refuse_inputs(request)
    exports = _exports_of(request, target)
    _refuse_exports(
        config, [e for path, e in exports.items() if not (resume and (folder / path).exists())]
    )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    pays = layers >= _LAYERS_WORTH_A_PROCESS and product_threads() > 1 and os.name == "posix"
    try:
        with FolderLock(real_path(folder)):
            state = _open(request, folder, resume=resume)
            ledger = _run_stages(state, target, exports, workers, resume=resume, beside=pays)
            return state, target, ledger
    except Exception as error:
        shortage = shortage_of(error, folder)
        if shortage is None:
            raise
        raise shortage from error


def _run_stages(
    state: Build,
    target: Target,
    exports: dict[str, ExportRequest],
    workers: str | None,
    *,
    resume: bool,
    beside: bool,
) -> Ledger:
    """Each stage in its folder, unless it is finished; some in processes beside this one."""
    from validate.artefacts import Artefacts
    from validate.report import reported
    from validate.run import validate

    request, folder = state.request, state.folder

    def compress_stage(path: Path) -> dict[str, Any]:
        with open_workers(workers) as own:
            return compress_to_folder(request.compress, path, resume=resume, workers=own)

    state.run("compress", "checkpoint", compress_stage)
    with Beside() as processes:
        if beside and len(exports) > 1:
            _begin_beside(state, processes, exports, target)
        for path, wanted in exports.items():
            _export(state, path, wanted)
        if target.flavour != "cpu" and not state.has_begun(_ENGINE):
            _engine(state, target)

        def finish_engine() -> None:
            if state.has_begun(_ENGINE):
                _engine(state, target)

        ledgers: list[Ledger] = []

        def ledger_stage(path: Path) -> None:
            coming = [folder / _engine_folder(target)] if state.has_begun(_ENGINE) else []
            wanted = request.validation(Artefacts.find(folder, coming))
            ledgers.append(reported(lambda: validate(wanted, note, finish_engine), path))

        _forget_failed_ledger(folder / "ledger")
        state.run("validate", "ledger", ledger_stage)
        finish_engine()
    return ledgers[0] if ledgers else _read_ledger(folder / "ledger")


_ENGINE = "engine"
# What a process beside takes to start, tracing takes for ten layers.
_LAYERS_WORTH_A_PROCESS = 10


def _begin_beside(
    state: Build, processes: Beside, exports: dict[str, ExportRequest], target: Target
) -> None:
    """Let the last export, and the engine of it, be made beside the first.

    Tracing is one thread's work, and what follows it does not need it before the ledger. An engine
    whose kernels are timed on a GPU is built with nothing beside it.
    """
    checkpoint, (*_, last) = state.folder / "checkpoint", exports
    wanted = exports[last]
    flags = ["--profile", wanted.profile, "--dtype", wanted.dtype]
    flags += ["--max-length", str(wanted.max_length)]
    flags += ["--trust-remote-code"] if wanted.trust_remote_code else []
    state.begin(_export_name(wanted), last, processes, "export", str(checkpoint), *flags)
    if target.flavour == "rtx":
        command = ("engine", str(state.folder / last), "--target", state.request.target)
        state.begin(_ENGINE, _engine_folder(target), processes, *command)


def _forget_failed_ledger(folder: Path) -> None:
    """A verdict that failed is measured again when a build is resumed, not repeated."""
    if (folder / "ledger.json").exists() and _read_ledger(folder).failures:
        shutil.rmtree(folder)


def _refuse_missing_packages(target: Target) -> None:
    """Say what is missing before minutes of work, not after."""
    if target.flavour != "cpu":
        target.require_package()


def _exports_of(request: BuildRequest, target: Target) -> dict[str, ExportRequest]:
    """The graphs that a build makes, by the folder of each."""
    wanted = {"onnx": (DEFAULT_PROFILE, FLOAT32)}
    if request.compress.is_quantized and request.compress.runtime == "cpu":
        wanted["onnx-cpu"] = (CPU, FLOAT32)
    if target.flavour != "cpu":
        wanted["onnx-fp16"] = (_engine_profile(target), FLOAT16)
    code = request.compress.trust_remote_code
    return {
        path: ExportRequest(profile, dtype, request.max_length, trust_remote_code=code)
        for path, (profile, dtype) in wanted.items()
    }


def _engine_profile(target: Target) -> str:
    """Which graph the engine is built from: what the installed TensorRT knows, asked at once.

    Raises:
        InputError: it knows none.
    """
    if target.flavour != "tensorrt":
        return DEFAULT_PROFILE
    from pipeline.engine.standard import newest_profile

    profile = newest_profile()
    if profile != DEFAULT_PROFILE:
        note(f"this TensorRT does not know {DEFAULT_PROFILE}: the engine's graph is {profile}")
    return profile


def _export_name(wanted: ExportRequest) -> str:
    return f"export {wanted.dtype if wanted.profile == DEFAULT_PROFILE else wanted.profile}"


def _export(state: Build, folder: str, wanted: ExportRequest) -> None:
    checkpoint = state.folder / "checkpoint"
    state.run(_export_name(wanted), folder, lambda path: export_folder(checkpoint, path, wanted))


def _engine_folder(target: Target) -> str:
    return f"engine-{target}".replace(" ", "-").replace("/", "-").replace(":", "-").lower()


def _engine(state: Build, target: Target) -> None:
    from pipeline.engine.build import build_engine
    from pipeline.engine.plan import EngineRequest

    onnx_folder, wanted = state.folder / "onnx-fp16", EngineRequest(target)
    state.run(_ENGINE, _engine_folder(target), lambda path: build_engine(onnx_folder, path, wanted))


def _read_ledger(folder: Path) -> Ledger:
    from validate.record import Ledger

    return Ledger.read(folder / "ledger.json")


def _refuse_inputs(request: BuildRequest) -> PretrainedConfig:
    """Find out what is wrong with model and texts before minutes of work, not after.

    Returns:
        The model's config.

    Raises:
        InputError, UsageError: as `require_inputs`.
    """
    own = ("--eval-length", request.eval_text, request.eval_windows, request.eval_length)
    return require_inputs(request.compress, own)


def require_inputs(wanted: CompressRequest, *texts: tuple[str, str, int, int]) -> PretrainedConfig:
    """Refuse a language model or a text that a compression could not read, in seconds.

    Args:
        wanted: names the model and the calibration.
        texts: further ones: flag of the length, text, windows, tokens in each.

    Returns:
        The model's config.

    Raises:
        InputError: the model is not supported, or a text is missing or too short.
        UsageError: windows beyond the model's context.
    """
    from pipeline.calibrate.text import require_text
    from pipeline.model.load import preview_model, refuse_long_windows

    effort = wanted.resolved_effort
    preview = preview_model(wanted.model, trust_remote_code=wanted.trust_remote_code)
    windows = effort.windows_for(_widest_input(preview.config))
    own = ("--window-length", wanted.calibration, windows, effort.window_length)
    for flag, spec, count, length in (own, *texts):
        refuse_long_windows(flag, length, preview.config)
        require_text(spec, preview.tokenizer, count=count, length=length)
    return preview.config


def _widest_input(config: PretrainedConfig) -> int:
    """The widest input of a decoder's linear layers, as far as its config says; else no bound."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("hidden_size", "intermediate_size")]
    heads = (getattr(text, "num_attention_heads", None) or 0) * (
        getattr(text, "head_dim", None) or 0
    )
    known = [size for size in sizes if isinstance(size, int)]
    return max(*known, heads) if len(known) == len(sizes) else sys.maxsize


def _refuse_exports(config: PretrainedConfig, exports: list[ExportRequest]) -> None:
    """Find out in seconds which graphs cannot be made of the model, before it is compressed.

    Raises:
        InputError: as `prove_model`.
    """
    if exports:
        note("proving the graphs on a small twin of the model ...")
        for wanted in exports:
            prove_model(config, wanted)


def _refuse_output(request: BuildRequest, folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that cannot be built in, or must not be.

    Raises:
        InputError: the folder is not a build's, so it is neither replaced nor added to.
        UsageError: there is a build and neither flag was given; or see `check_output`.
    """
    if not holds_something(folder):
        check_output(folder)
        return
    if not (overwrite or resume):
        raise UsageError(
            "The output exists already.",
            where=folder,
            change="RESUME=1 (--resume) continues it, OVERWRITE=1 (--overwrite) replaces it",
        )
    read_build_record(folder)
    if not resume:
        check_output(folder, overwrite=True, inputs=request.inputs)


def _inputs_of(request: BuildRequest) -> dict[str, Any]:
    """What the artefacts depend on besides the request: what is read, and by which skipcat."""
    wanted = request.compress
    texts = file_hashes(wanted.calibration, wanted.plan, request.eval_text)
    return {"model": model_hashes(wanted.model), "files": texts, "version": __version__}


def _open(request: BuildRequest, folder: Path, *, resume: bool) -> Build:
    """Take up the earlier build, or start afresh in an empty folder."""
    inputs = _inputs_of(request)
    if not resume:
        clear(real_path(folder))
    return Build.take_up(folder, request, inputs)
