"""A bundle on the device: every file as it was packed, and the answers that it was packed with.

bundle.json     hash of every file, and what the engine is, or how it is to be built
skipcat-device  the program, to be run by python3
engine/         plan, manifest, tokenizer, plugin library; made by `skipcat-device build` of
model/          graphs, weights, tokenizer
plugin/         sources of the plugin library, and the library once it is there, in lib/
selftest.json   prompts, their tokens, and what the model said of them in ONNX Runtime
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artefact import sha256_of_file
from pipeline.errors import InputError, ValidationError
from pipeline.json_file import json_field, read_json_object
from pipeline.runtime.device.session import DeviceSession
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import TextTokenizer, load_tokenizer

BUNDLE_FILE, REFERENCE_FILE = "bundle.json", "selftest.json"
ENGINE_FOLDER, PROGRAM = "engine", "skipcat-device"
MODEL_FOLDER, PLUGIN_FOLDER = "model", "plugin"
# Of the likeliest tokens' logits, centred. Sums of float16 in another order stay above; weights,
# positions or masks that are not the reference's do not.
_LEAST_COSINE = 0.995
# How far below the likeliest token the reference's may be, in standard deviations of the logits:
# two tokens that are as good as equal may change places.
_MOST_BELOW = 0.1
_ASK_AGAIN = "copy the bundle again, or make it again with `skipcat bundle`"


def engine_of(folder: Path) -> Path:
    """The engine folder of a bundle; any other folder is one itself.

    Raises:
        InputError: the bundle's engine is not built yet.
    """
    if not (folder / BUNDLE_FILE).is_file():
        return folder
    if is_to_be_built(folder):
        raise InputError(
            "The engine of this bundle is not built yet.",
            where=folder,
            change=f"python3 {folder / PROGRAM} build {folder}",
        )
    return folder / ENGINE_FOLDER


def is_to_be_built(folder: Path) -> bool:
    """Whether a bundle brings the graphs of an engine that is not there yet."""
    return (folder / MODEL_FOLDER).is_dir() and not (folder / ENGINE_FOLDER).is_dir()


def require_whole(folder: Path) -> None:
    """See that a bundle's files are those that were packed.

    Raises:
        ValidationError: one is missing or has changed.
        InputError: bundle.json is no record of files.
    """
    record = read_json_object(folder / BUNDLE_FILE)
    for name, expected in json_field(record, "files", dict, folder / BUNDLE_FILE).items():
        path = folder / name
        found = sha256_of_file(path) if path.is_file() else "no file"
        if found != expected:
            raise ValidationError(
                "A file of this bundle is not the one that was packed.",
                where=path,
                observed=found,
                expected=f"sha256 {expected}",
                change=_ASK_AGAIN,
            )


def require_reference(folder: Path, session: DeviceSession) -> list[tuple[str, float]]:
    """Hold an engine and its tokenizer to what ONNX Runtime said when the bundle was made.

    Returns:
        Each prompt, and the smallest cosine of its tokens.

    Raises:
        ValidationError: the tokenizer gives other tokens, or the engine says something else.
    """
    path = folder / REFERENCE_FILE
    tokenizer = load_tokenizer(folder / ENGINE_FOLDER)
    outcomes = []
    for entry in json_field(read_json_object(path), "prompts", list, path):
        _require_tokens(tokenizer, entry, path)
        session.reset()
        logits = answer_logits(session, entry["prompt_ids"], entry["answer_ids"])
        outcomes.append((entry["prompt"], _least_cosine(logits, entry, path)))
    session.reset()
    return outcomes


def answer_logits(session: Session, prompt_ids: list[int], answer_ids: list[int]) -> np.ndarray:
    """Logits that every token of an answer is chosen from, float32 [answer, V].

    The prompt is read at once and the answer token by token, as when it is made.
    """
    rows = [session.forward(np.array([prompt_ids], np.int64), last_only=True)]
    rows += [session.forward(np.array([[token]], np.int64)) for token in answer_ids[:-1]]
    return np.concatenate(rows, axis=1)[0]


def _require_tokens(tokenizer: TextTokenizer, entry: dict[str, Any], path: Path) -> None:
    found = tokenizer.encode(entry["prompt"])[: len(entry["prompt_ids"])]  # all, if they fitted
    if found != entry["prompt_ids"]:
        raise ValidationError(
            "The tokenizer is not the one that the bundle was made with.",
            where=path.parent / ENGINE_FOLDER,
            observed=f"{found} for {entry['prompt']!r}",
            expected=entry["prompt_ids"],
            change=_ASK_AGAIN,
        )


def _least_cosine(logits: np.ndarray, entry: dict[str, Any], path: Path) -> float:
    """Smallest cosine of an answer's tokens; raise ValidationError for one that is too small."""
    least = 1.0
    for place, (row, token) in enumerate(zip(logits, entry["answer_ids"], strict=True)):
        ids, values = (np.array(entry[name][place]) for name in ("likeliest", "logits"))
        cosine = _cosine(row[ids], values)
        below = float((row.max() - row[token]) / (row.std() or 1.0))
        least = min(least, cosine)
        if not (cosine >= _LEAST_COSINE and below <= _MOST_BELOW):  # also false for NaN
            raise ValidationError(
                "The engine does not say what the model said in ONNX Runtime.",
                where=path,
                observed=f"token {place} of the answer to {entry['prompt']!r}: cosine "
                f"{cosine:.4f}, {below:.2f} standard deviations below the likeliest",
                expected=f"at least {_LEAST_COSINE}, at most {_MOST_BELOW}",
                change="build the engine again on this device; `skipcat-device selftest "
                "ENGINE` tells whether it agrees with itself",
            )
    return least


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Of two vectors less their means; 0 where one is not finite."""
    if not np.isfinite(found).all():
        return 0.0
    first, second = found - found.mean(), expected - expected.mean()
    return float(first @ second / max(np.linalg.norm(first) * np.linalg.norm(second), 1e-30))
