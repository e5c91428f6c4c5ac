"""The files beside a model that make its inputs: copied by name, and nothing else there is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pipeline.artefact import sha256_of_file
from pipeline.errors import InputError

# What transformers and tokenizers know by name; never by a pattern that anything may match.
_NAMES = re.compile(
    r"tokenizer\.(json|model|tiktoken)|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt|bpe|tiktoken|model)|merges\.txt|spiece\.model"
    r"|sentencepiece(\.bpe)?\.model|chat_template\.(jinja|json)|generation_config\.json"
    r"|preprocessor_config\.json|processor_config\.json"
)
_VOCABULARY = re.compile(r"(tokenizer|vocab|merges|spiece|sentencepiece)(\.bpe)?\.\w+")
# The Hugging Face cache: a file is a link to one that is named by its hash.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LARGEST_TOKENIZER_BYTES = 256 << 20


def copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings, or the image processor's settings.

    A copy has the mode of a new file, whatever the original's.

    Args:
        checkpoint: a model's folder, or an export of one.
        folder: gets the copies.

    Raises:
        InputError: such a file is no file, cannot be read, is larger than 256 MiB, or is a link to
            a file of another name elsewhere, whose content would come to lie in the copy.
    """
    for path in sorted(checkpoint.iterdir()):
        if _NAMES.fullmatch(path.name):
            _require_own_file(path)
            try:
                shutil.copyfile(path, folder / path.name)
            except PermissionError as error:
                raise _refused(path, error.strerror or "it may not be read") from error


def require_small_tokenizer(folder: Path) -> None:
    """Raise InputError for a tokenizer's file of more than 256 MiB; Gemma's have about 35.

    The library makes some times their size of them, in one call that nothing can stop.
    """
    for path in sorted(folder.glob("*")):
        if _NAMES.fullmatch(path.name) and path.is_file():
            _require_small(path)


def vocabulary_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that say which ids a text has, by name: of tokenizer.json alone, if any.

    Raises:
        InputError: a file is larger than 256 MiB.
    """
    require_small_tokenizer(folder)
    names = ["tokenizer.json"] if (folder / "tokenizer.json").is_file() else _vocabularies(folder)
    return {name: sha256_of_file(folder / name) for name in names}


def _vocabularies(folder: Path) -> list[str]:
    found = (path.name for path in folder.iterdir() if path.is_file())
    return sorted(name for name in found if _NAMES.fullmatch(name) and _VOCABULARY.fullmatch(name))


def _require_small(path: Path) -> None:
    size_bytes = path.stat().st_size
    if size_bytes > LARGEST_TOKENIZER_BYTES:
        raise _refused(path, f"{size_bytes >> 20} MiB")


def _require_own_file(path: Path) -> None:
    """Raise InputError unless a name stands for a file that belongs to the model."""
    if not path.is_file():
        raise _refused(path, "a folder, a pipe, or a link to nothing")
    _require_small(path)
    target, root = path.resolve(), path.parent.resolve()
    blob = target.parent.name == "blobs" and _BLOB.fullmatch(target.name)
    if not (target.is_relative_to(root) or target.name == path.name or blob):
        raise _refused(path, f"a link to {target}")


def _refused(path: Path, observed: str) -> InputError:
    return InputError(
        f"{path.name} is not a file of this model.",
        where=path,
        observed=observed,
        expected=f"a file of at most {LARGEST_TOKENIZER_BYTES >> 20} MiB in the folder",
        change="put the file itself there, or remove it",
    )
