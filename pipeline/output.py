"""What may be written where: an output is looked at before any work, as the end will need it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import InputError, UsageError
from pipeline.folder_lock import LOCK_FILE
from pipeline.json_file import read_json_object

# By one of these a folder is known as skipcat's; each says so in its provenance.
RECORDS = (
    "recipe.json", "export.json", "manifest.json", "ledger.json", "build.json", "dense.json",
    "training.json", "perception.json", "bundle.json",
)  # fmt: skip
# Beside an output that is not there yet, and inside a folder that is there and empty.
_INSIDE = ".skipcat.partial"
# Of what is moved out of it: which names, until all of them are.
MOVING = ".moving"
_LONGEST_ADDITION = len("..replaced")
_LONGEST_BELOW = 200
# Of a name and of a path on Windows: there a lock's file has the folder's name within its own.
# Where long paths are not enabled, the system itself refuses those of 260.
_LONGEST_ON_WINDOWS = (255 - len(f"{LOCK_FILE}."), 32_767)


def check_output(output: Path, *, overwrite: bool = False, inputs: Iterable[object] = ()) -> None:
    """Refuse a folder that cannot be written at the end of a run, or must not be.

    Args:
        output: folder to write.
        overwrite: replace it if it is one that skipcat wrote.
        inputs: what is read: paths, and names that are none, which are passed over.

    Raises:
        UsageError: it exists and is not empty, with `overwrite` also where it is not skipcat's or
            holds more than itself; or nothing can be made there.
    """
    try:
        real = real_path(output)
        _refuse_place(output, real)
        if not real.is_dir():
            return
        if _is_vacant(real):
            _require_writable(output, real)
            return
        _refuse_inputs_inside(output, real, inputs)
        if not overwrite:
            raise UsageError(
                "The output exists already.",
                where=output,
                change="pass --overwrite to replace it, or choose another --output",
            )
        _refuse_replacing(output, real)
    except OSError as error:
        raise cannot_be_written(output, error.strerror) from error


def check_output_file(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that cannot be written at the end of a run, or must not be.

    Args:
        path: file to write.
        overwrite: replace it if it is JSON, or an SVG where it is called so.

    Raises:
        UsageError: it exists, with `overwrite` also where it is something else; or nothing can be
            made there.
    """
    try:
        real = real_path(path)
        _refuse_place(path, real, is_file=True)
        if not real.exists():
            return
        if not overwrite:
            raise UsageError(
                "The output exists already.",
                where=path,
                change="pass --overwrite to replace it, or choose another --output",
            )
        if not real.is_file() or not _is_result_file(real):
            raise UsageError(
                "The output holds something else than a result, so it is left as it is.",
                where=path,
                change="choose another file, or delete it yourself",
            )
    except OSError as error:
        raise cannot_be_written(path, error.strerror) from error


def cannot_be_written(output: object, reason: object) -> UsageError:
    """The refusal of an output at which nothing can be made."""
    return UsageError(
        "The output cannot be written.",
        where=output,
        observed=reason,
        change="choose another --output",
    )


def real_path(output: Path) -> Path:
    """Where an output really lies: absolute, and no symbolic link."""
    try:
        return Path(output).resolve()
    except RuntimeError as error:  # of symbolic links that lead back to themselves
        raise cannot_be_written(output, error) from error


def partial_path(output: Path) -> Path:
    """Where the unfinished form of an output lies, in the same file system."""
    output = real_path(output)
    if output.is_dir() and _is_vacant(output):
        return output / _INSIDE
    return output.parent / f".{output.name}.partial"


def _is_vacant(folder: Path) -> bool:
    """Whether a folder holds nothing, or nothing but what an unfinished run into it left."""
    names = held_names(folder) - {_INSIDE}
    return not names or names <= set(names_in_motion(folder / _INSIDE))


def held_names(folder: Path) -> set[str]:
    """Names in a folder but for its lock, and what a killed run left aside of its own record."""
    aside = tuple(f".{name}." for name in RECORDS)
    return {
        name
        for name in os.listdir(folder)
        if not name.startswith(LOCK_FILE)
        and not (name.startswith(aside) and name.rpartition(".")[2].isdecimal())
    }


def names_in_motion(staging: Path) -> list[str]:
    """What an earlier run was moving out of its working folder when it ended."""
    try:
        names = json.loads((staging / MOVING).read_text(encoding="utf-8"))
        return [name for name in names if isinstance(name, str) and os.sep not in name]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a record that skipcat wrote."""
    return any(_is_record(folder / name) for name in RECORDS)


def _is_record(path: Path) -> bool:
    try:
        made_by = read_json_object(path).get("provenance")
    except InputError:
        return False
    return isinstance(made_by, dict) and made_by.get("tool") == "skipcat"


def _is_result_file(path: Path) -> bool:
    """Whether a file is empty, or what a result file of this name would be."""
    if path.stat().st_size == 0:
        return True
    if path.suffix == ".svg":
        with path.open("rb") as file:
            return b"<svg" in file.read(1000)
    return _is_record(path)


def _refuse_place(output: Path, real: Path, *, is_file: bool = False) -> None:
    """Refuse what is no place for a folder, or for a file."""
    if output.is_symlink() and not real.exists():
        raise cannot_be_written(output, "a symbolic link to nothing")
    above = next(path for path in (real, *real.parents) if os.path.lexists(path))
    if above != real and not above.is_dir():
        raise cannot_be_written(output, f"{above} is a file")
    if above == real and real.is_dir() is is_file:
        raise cannot_be_written(output, "a folder" if is_file else "a file, not a folder")
    _refuse_long_names(output, real, above)
    if above != real:
        _require_writable(output, above)


def _refuse_long_names(output: Path, real: Path, above: Path) -> None:
    """Refuse names longer than the file system takes, those of working folders included."""
    below = real.relative_to(above).parts
    longest, longest_path = _longest_names(above if above.is_dir() else above.parent)
    names = [len(os.fsencode(name)) for name in below]
    if names:
        names[-1] += _LONGEST_ADDITION
    if max(names, default=0) > longest:
        raise cannot_be_written(output, f"a name of more than {longest - _LONGEST_ADDITION} bytes")
    whole = longest_path - _LONGEST_BELOW
    if len(os.fsencode(real)) > whole:
        raise cannot_be_written(output, f"a path of more than {whole} bytes")


def _longest_names(folder: Path) -> tuple[int, int]:
    """Most bytes of a name in a folder, and of a path."""
    if not hasattr(os, "pathconf"):
        return _LONGEST_ON_WINDOWS
    return os.pathconf(folder, "PC_NAME_MAX"), os.pathconf("/", "PC_PATH_MAX")


def _require_writable(output: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_be_written(output, f"no permission to write into {folder}")


def _refuse_inputs_inside(output: Path, real: Path, inputs: Iterable[object]) -> None:
    """Refuse to write over what is read."""
    for path in _existing(inputs):
        if path == real or real in path.parents:
            raise UsageError(
                "The output holds an input, which would be lost.",
                where=output,
                observed=path,
                change="choose another --output",
            )


def _existing(inputs: Iterable[object]) -> Iterator[Path]:
    """The inputs that are paths, and parts of a text joined by `+` that are."""
    for given in inputs:
        for part in {str(given), *str(given).split("+")}:
            try:
                path = Path(part).expanduser()
                if part and path.exists():
                    yield path.resolve()
            except (OSError, RuntimeError, ValueError):  # the name of something else
                continue


def _refuse_replacing(output: Path, real: Path) -> None:
    """Refuse to replace a folder that is more than a result of skipcat's."""
    reason = _standing_in_the_way(real)
    if reason is not None:
        raise UsageError(
            "This folder is not replaced, with --overwrite neither.",
            where=output,
            observed=reason,
            change="choose another --output",
        )
    if not is_ours(real):
        raise UsageError(
            "The output was not written by skipcat, so it is left as it is.",
            where=output,
            expected=f"a folder with one of skipcat's records: {', '.join(RECORDS)}",
            change="choose another --output, or delete it yourself",
        )
    _require_writable(output, real.parent)
    _require_writable(output, real)


def _standing_in_the_way(real: Path) -> str | None:
    """What a folder is or holds besides a result; None for nothing."""
    for place, name in ((_home(), "the home folder"), (Path.cwd(), "the working directory")):
        if place is not None and (real == place or real in place.parents):
            return name if real == place else f"it holds {name}"
    inside = (Path(above, name) for above, names, _ in os.walk(real) for name in names)
    if any(os.path.ismount(folder) for folder in (real, *inside)):
        return "it is or holds a mount point"
    return None


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None
