"""Wheels of a bundle are those that the board's own Python can install."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from pipeline.bundle.jetpack import JETPACKS
from pipeline.bundle.wheels import copy_wheels, download_command
from pipeline.cli.main import main
from pipeline.errors import InputError
from tests.support.tiny_decoder import save_tiny_folder

# As `download_command` gave them on 2026-11-28.
FOR_6_2 = (
    "jinja2-3.1.6-py3-none-any.whl",
    "markupsafe-3.0.4-cp310-cp310-manylinux2014_aarch64.manylinux_2_17_aarch64"
    ".manylinux_2_28_aarch64.whl",
    "numpy-2.2.6-cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
    "tokenizers-0.23.3-cp310-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
)
FOR_7_2 = (
    FOR_6_2[0],
    FOR_6_2[1].replace("cp310", "cp312"),
    "numpy-2.5.5-cp312-cp312-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
    FOR_6_2[3],  # of the stable interface
)


def folder_of(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(("jetpack", "names"), [("6.2", FOR_6_2), ("7.2", FOR_7_2)])
def test_what_pip_downloads_for_a_jetpack_is_taken(
    jetpack: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    wheels = folder_of(tmp_path / "wheels", (*names, "extra-1.0-py2.py3-none-any.whl"))
    copy_wheels(wheels, tmp_path / "packed", JETPACKS[jetpack])
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {
        *names,
        "extra-1.0-py2.py3-none-any.whl",
    }


@pytest.mark.parametrize(
    "name",
    [
        "numpy-2.2.6-cp310-cp310-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "numpy-2.2.6-cp311-cp311-manylinux_2_17_aarch64.whl",
        "numpy-2.2.6-cp310-cp310-manylinux_2_39_aarch64.whl",
        "numpy-2.2.6-cp310-cp310-musllinux_1_2_aarch64.whl",
        "numpy-2.2.6-cp311-abi3-manylinux_2_17_aarch64.whl",
        "numpy-2.2.6-py2-none-any.whl",
        "numpy.whl",
    ],
)
def test_a_wheel_for_another_machine_is_refused_with_the_command(name: str, tmp_path: Path) -> None:
    others = tuple(one for one in FOR_6_2 if not one.startswith("numpy"))
    wheels = folder_of(tmp_path / "wheels", (*others, name))
    with pytest.raises(InputError, match="not for the board's Python") as refused:
        copy_wheels(wheels, tmp_path / "packed", JETPACKS["6.2"])
    assert "--python-version 3.10" in str(refused.value)
    assert not (tmp_path / "packed").exists()


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    wheels = folder_of(tmp_path / "wheels", FOR_7_2[:3])
    with pytest.raises(InputError, match="tokenizers"):
        copy_wheels(wheels, tmp_path / "packed", JETPACKS["7.2"])


def test_the_command_names_python_platform_and_packages() -> None:
    words = shlex.split(download_command(JETPACKS["7.2"]))
    assert words[:2] == ["pip", "download"]
    assert words[words.index("--python-version") + 1] == "3.12"
    assert words[-4:] == ["numpy", "tokenizers", "jinja2", "markupsafe"]


def test_a_bundle_has_its_wheels_and_says_how_to_install_them(tmp_path: Path) -> None:
    wheels = folder_of(tmp_path / "wheels", FOR_6_2)
    source = save_tiny_folder(tmp_path / "model")
    board = ["--device", "orin-nano-8gb", "--jetpack", "6.2", "--max-length", "64"]
    command = ["bundle", str(source), "-o", str(tmp_path / "a"), *board]
    assert main([*command, "--wheels", str(wheels)]) == 0
    record = json.loads((tmp_path / "a/bundle.json").read_text())
    assert {f"wheels/{name}" for name in FOR_6_2} <= {*record["files"]}
    assert "--no-index --no-deps wheels/*.whl" in (tmp_path / "a/README.md").read_text()
