"""The texts of a benchmark, checked before any work is done."""

from __future__ import annotations

from pathlib import Path

from pipeline.artefact import sha256_of_file
from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.errors import InputError, UsageError
from pipeline.model.load import LoadedModel


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


def require_another_text(calibration: str, test: str) -> None:
    """Refuse to calibrate on the text that is measured on.

    Raises:
        InputError: one of the two is not there.
        UsageError: they are the same.
    """
    if hash_of_text(Path(calibration)) == hash_of_text(Path(test)):
        raise UsageError("The test text must not be calibrated on.", where="--calibration")


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
