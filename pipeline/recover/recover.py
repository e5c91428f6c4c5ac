"""From a compressed checkpoint to a fine-tuned one of the same ranks and size, on disk."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from pipeline import __version__
from pipeline.artefact import (
    discard,
    require_free_bytes,
    require_same_run,
    sha256_of_file,
    staged_folder,
    write_json,
    write_text,
)
from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.checkpoint.card import model_card
from pipeline.checkpoint.folder import load_checkpoint, save_checkpoint, weights_record
from pipeline.checkpoint.modeling_quantized import QuantizedWeight
from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.errors import InputError, PipelineError, UsageError
from pipeline.kept_tensors import keep_tensors, kept_tensors
from pipeline.model.fingerprint import model_hashes
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.source import Source
from pipeline.model.weight_files import weight_files
from pipeline.provenance import provenance, public_name
from pipeline.recover.convolutions import rounded_entries, train_to_folder
from pipeline.recover.request import Recoverable, RecoverRequest, held_out
from pipeline.recover.train import Progress, fine_tune
from pipeline.workers.workers import IN_PROCESS, Workers

_SCHEMA = 1
_WORK = "training"


def recover_to_folder(
    request: RecoverRequest,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: Workers = IN_PROCESS,
) -> dict[str, Any]:
    """Fine-tune the factors of a checkpoint and write the result as another.

    The unfinished folder is kept when the run is interrupted or fails, and `resume` continues it.

    Args:
        request: what to do.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: continue an unfinished run of the same request; the learning rate may differ.
        workers: who measures the held-out windows, to the same bits.

    Returns:
        The `recovery` section of recipe.json.

    Raises:
        PipelineError: bad input, training that diverged, or not enough disk.
    """
    request.check()
    if rounded_entries(request.checkpoint):
        _require_no_workers(request, workers)
        return train_to_folder(request, output, overwrite=overwrite, resume=resume)
    if request.data is not None:
        raise UsageError(
            "Labelled images are for rounded convolutions.",
            where="--data",
            observed=request.checkpoint,
            change="pass --text",
        )
    started = time.monotonic()
    subject = Recoverable.read(request)
    stored_bytes = sum(path.stat().st_size for path in weight_files(request.checkpoint))
    with staged_folder(
        output, overwrite=overwrite, keep=True, resume=resume, inputs=request.inputs_of(output)
    ) as folder:
        student, teacher = _load(request, subject)
        require_free_bytes(folder, 2 * stored_bytes)
        work = folder / _WORK
        work.mkdir(exist_ok=True)
        text = _recovery_windows(request, student, teacher, work / "tokens.safetensors")
        identity = _identity(request, text)
        _require_same_run(identity, work / "run.json")
        model, measured, progress = fine_tune(
            request, subject, student, teacher, text, work, workers
        )
        recovery = _section(identity, subject, text, measured, progress)
        recovery["seconds"] = time.monotonic() - started
        _write(folder, request, subject, model, recovery)
        write_json(folder / "recovery.json", {"schema": _SCHEMA, "losses": progress.losses})
        discard(work)
    return recovery


def _require_no_workers(request: RecoverRequest, workers: Workers) -> None:
    """Refuse workers for rounded convolutions, which are measured on a few images."""
    if workers is not IN_PROCESS:
        raise UsageError(
            "Rounded convolutions are trained and measured by this process alone.",
            where="--workers",
            observed=request.checkpoint,
            change="leave --workers out",
        )


def _load(request: RecoverRequest, subject: Recoverable) -> tuple[LoadedModel, LoadedModel | None]:
    """Student and teacher, in float32."""
    teacher = None
    if request.teacher is not None:
        teacher = load_model(
            request.teacher,
            trust_remote_code=request.trust_remote_code,
            window_length=request.window_length,
        )
        _require_same_vocabulary(request.teacher, subject, teacher)
        teacher.model.requires_grad_(False)
    model = load_checkpoint(
        request.checkpoint, dtype=torch.float32, trust_remote_code=request.trust_remote_code
    )
    _refuse_quantized(request, model)
    # With it, save_pretrained would ignore the state that it is given.
    del model.hf_quantizer
    model.is_quantized = False
    name = str(request.checkpoint)
    return LoadedModel(model, subject.tokenizer, Source(name, "folder", name)), teacher


def _refuse_quantized(request: RecoverRequest, model: PreTrainedModel) -> None:
    """Codes have no gradient, and adapters merged into them would have to be rounded again."""
    name = next((n for n, m in model.named_modules() if isinstance(m, QuantizedWeight)), None)
    if name is not None:
        raise InputError(
            "Quantised matrices are not fine-tuned.",
            where=request.checkpoint,
            observed=f"{name.removesuffix('.stored')} is quantised",
            change="recover a checkpoint of the same ranks without --memory or --weights",
        )


def _require_same_vocabulary(name: str, subject: Recoverable, teacher: LoadedModel) -> None:
    """Refuse a teacher whose logits are about other tokens than the student's."""
    sizes = teacher.model.config.get_text_config().vocab_size, subject.vocabulary_size
    if sizes[0] == sizes[1] and teacher.tokenizer.get_vocab() == subject.tokenizer.get_vocab():
        return
    raise InputError(
        "The teacher has another vocabulary than the checkpoint.",
        where=name,
        observed=f"{len(teacher.tokenizer)} tokens, {sizes[0]} logits",
        expected=f"the tokens of the checkpoint: {len(subject.tokenizer)}, {sizes[1]} logits",
        change="pass the model that the checkpoint was made from",
    )


def _recovery_windows(
    request: RecoverRequest, student: LoadedModel, teacher: LoadedModel | None, kept: Path
) -> TokenBatch:
    """Take windows from a text, or sample them and keep them for a run that is taken up again.

    Args:
        request: names the text, and how many windows of it.
        student: gives the tokenizer of a text.
        teacher: what `self` is sampled from.
        kept: file of sampled windows; read if it exists, and written if not.

    Raises:
        InputError: no such text, or too little.
    """
    sampled = request.text == "self"
    source = teacher if teacher and sampled else student
    details = {"text": f"sampled from {public_name(source.source.name)}, temperature 1"}
    earlier = kept_tensors(kept) if sampled else None
    if earlier is not None:
        return TokenBatch(earlier[0]["tokens"], request.text, request.seed, details)
    text = load_tokens(
        request.text,
        source.tokenizer,
        source.model,
        count=request.window_count,
        length=request.window_length,
        seed=request.seed,
    )
    if not sampled:
        return text
    keep_tensors(kept, {"tokens": text.tokens})
    return replace(text, details=details)


def _identity(request: RecoverRequest, text: TokenBatch) -> dict[str, Any]:
    """All that the result depends on, as JSON holds it."""
    weights = {path.name: sha256_of_file(path) for path in weight_files(request.checkpoint)}
    settings = asdict(request) | {"checkpoint": str(request.checkpoint)}
    return settings | {
        "weights_sha256": weights,
        "teacher_sha256": model_hashes(request.teacher) if request.teacher else None,
        "text_sha256": text.describe()["sha256"],
        "version": __version__,
    }


def _require_same_run(identity: dict[str, Any], record: Path) -> None:
    """As `require_same_run`; a run that diverged may go on with a smaller learning rate."""
    settings = {name: value for name, value in identity.items() if name != "learning_rate"}
    require_same_run(json.loads(json.dumps(settings)), record)


def _section(
    identity: dict[str, Any],
    subject: Recoverable,
    text: TokenBatch,
    measured: dict[str, dict[str, float]],
    progress: Progress,
) -> dict[str, Any]:
    """The `recovery` section of recipe.json; `earlier` holds that of a recovery before this one."""
    section = {
        "method": "LoRA on every factor, merged",
        "objective": list(measured)[-1],
        "settings": {name: _public(value) for name, value in identity.items()},
        "learning_rates": progress.learning_rates,
        "text": text.describe(),
        "held_out_windows": held_out(len(text.tokens)),
        "loss": measured,
        "peft": importlib.metadata.version("peft"),
        "provenance": provenance(),
    }
    earlier = subject.recipe.get("recovery")
    return section | ({"earlier": earlier} if earlier else {})


def _write(
    folder: Path,
    request: RecoverRequest,
    subject: Recoverable,
    model: PreTrainedModel,
    recovery: dict[str, Any],
) -> None:
    """The checkpoint and its records; the plan is that of the compression."""
    save_checkpoint(
        model,
        subject.tokenizer,
        subject.modules,
        folder,
        subject.dtype,
        source=request.checkpoint,
    )
    _require_same_tensors(request.checkpoint, folder)
    recipe = subject.recipe | {"recovery": recovery}
    report = _largest_interpolations(subject.report, model) | {"weights": weights_record(folder)}
    for name in ("plan.json", "plan.svg"):
        if (request.checkpoint / name).exists():
            shutil.copyfile(request.checkpoint / name, folder / name)
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", model_card(recipe, report, _fine_tuning(recovery)))


def _largest_interpolations(report: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """report.json with the largest |A'| of each skip-form group as it is in a model now.

    The errors of the groups stay those of the compression.

    Args:
        report: of the compression; not changed.
        model: holds the merged factors.
    """
    groups = []
    for group in report["groups"]:
        if group["form"] == "skip":
            owner = model.get_submodule(group["members"][0])
            assert isinstance(owner, FactoredLinear)
            sizes = owner.owner.down.weight.detach().abs()
            group = group | {"largest_interpolation": float(sizes.max()) if sizes.numel() else 0.0}
        groups.append(group)
    largest = max((group.get("largest_interpolation", 0.0) for group in groups), default=0.0)
    return report | {"totals": report["totals"] | {"largest": largest}, "groups": groups}


def _public(value: Any) -> Any:
    return public_name(value) if isinstance(value, str) else value


def _fine_tuning(recovery: dict[str, Any]) -> str:
    """What the model card says of the training after the compression.

    Args:
        recovery: the `recovery` section of recipe.json.
    """
    settings, text, objective = recovery["settings"], recovery["text"], recovery["objective"]
    loss = recovery["loss"][objective]
    source = text["source"] if text["source"] != "self" else f"{settings['teacher']} itself"
    aims = {
        "next_token": "next-token cross entropy",
        "distillation": f"KL divergence from {settings['teacher']}",
    }
    earlier = "These were not the first: `recipe.json` has the earlier ones. "
    return (
        f"The factors were then fine-tuned with adapters of rank {settings['lora_rank']},\n"
        f"merged into them: {settings['steps']} steps of {settings['batch_size']} windows of "
        f"{text['window_length']} tokens from {source}, seed {text['seed']}.\n"
        f"{earlier if 'earlier' in recovery else ''}"
        f"On the {recovery['held_out_windows']} windows held out, the {aims[objective]},\n"
        f"in nats per token, was {loss['before']:.4f} before and {loss['after']:.4f} after."
    )


def _require_same_tensors(before: Path, after: Path) -> None:
    """Raise PipelineError unless two folders hold tensors of the same names, types and shapes.

    The same modules are factored, at the same ranks, and the weights take the same bytes.
    """
    first, second = _tensors(before), _tensors(after)
    if first != second:
        odd = sorted({name for name, _ in first.items() ^ second.items()})
        raise PipelineError(
            "Recovery changed the tensors of the checkpoint.", where=", ".join(odd[:4])
        )


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                entry = file.get_slice(name)
                found[name] = (entry.get_dtype(), tuple(entry.get_shape()))
    return found
