"""Wheels that a board without a network installs: the user downloads them, here they are checked.

`pip download` takes what fits the machine that it is told of, and says nothing of a folder that was
filled for another one.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pipeline.bundle.jetpack import JetPack
from pipeline.errors import InputError

# What the program imports; none of them imports anything else for what it does here.
_NEEDED = ("numpy", "tokenizers", "jinja2", "markupsafe")
_WHEEL = re.compile(
    r"(?P<name>[^-]+)-(?P<version>[^-]+)(-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-"
    r"(?P<platform>[^-]+)\.whl"
)
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_aarch64")
_OLD_NAME, _ITS_GLIBC = "manylinux2014_aarch64", (2, 17)
_DOWNLOADED = "manylinux_2_28_aarch64"


def download_command(jetpack: JetPack, folder: str = "wheels") -> str:
    """The command that downloads them, on any machine that has pip and a network."""
    version = "{}.{}".format(*jetpack.python)
    return (
        "pip download --no-deps --only-binary=:all: "
        f"--platform {_DOWNLOADED} --platform {_OLD_NAME} "
        f"--python-version {version} -d {folder} {' '.join(_NEEDED)}"
    )


def copy_wheels(wheels: Path, folder: Path, jetpack: JetPack) -> None:
    """Copy wheels that the system's Python of a JetPack can install.

    Args:
        wheels: holds all that the program needs, and perhaps others.
        folder: to write.
        jetpack: of the board.

    Raises:
        InputError: one is missing, is for another machine, or is no wheel.
    """
    files = sorted(path for path in wheels.iterdir() if path.suffix == ".whl")
    found = {_checked_name(path, jetpack) for path in files}
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise InputError(
            "Wheels that the program needs are missing.",
            where=wheels,
            observed=", ".join(sorted(found)) or "no wheel",
            expected=", ".join(_NEEDED),
            change=download_command(jetpack, str(wheels)),
        )
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _checked_name(path: Path, jetpack: JetPack) -> str:
    """Whose wheel a file is; raise InputError for one that the board cannot install."""
    parts = _WHEEL.fullmatch(path.name)
    fits = parts is not None and (
        any(_python_fits(tag, parts["abi"], jetpack) for tag in parts["python"].split("."))
        and any(_platform_fits(tag, jetpack) for tag in parts["platform"].split("."))
    )
    if parts is None or not fits:
        raise InputError(
            "This wheel is not for the board's Python.",
            where=path,
            expected="Python {}.{}, aarch64, glibc {}.{} or older".format(
                *jetpack.python, *jetpack.glibc
            ),
            change=download_command(jetpack, str(path.parent)),
        )
    return parts["name"].lower().replace("_", "-")


def _python_fits(tag: str, abis: str, jetpack: JetPack) -> bool:
    """Whether a Python of the board runs code with a tag, such as cp310, and one of some ABIs."""
    major, minor = jetpack.python
    own = f"cp{major}{minor}"
    known = abis.split(".")
    if tag == f"py{major}":
        return "none" in known
    older = re.fullmatch(rf"cp{major}(\d+)", tag)
    if "abi3" in known and older:
        return int(older[1]) <= minor
    return tag == own and bool({own, "none"} & {*known})


def _platform_fits(tag: str, jetpack: JetPack) -> bool:
    """Whether the board's system runs code with a tag, such as manylinux_2_17_aarch64."""
    if tag == "any":
        return True
    named = _MANYLINUX.fullmatch(tag)
    needed = (int(named[1]), int(named[2])) if named else _ITS_GLIBC if tag == _OLD_NAME else None
    return needed is not None and needed <= jetpack.glibc
