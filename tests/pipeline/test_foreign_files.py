"""Whatever a file holds that somebody else wrote, its reader refuses it in our words or goes on."""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from pipeline.artefact import sha256_of_file, write_json
from pipeline.calibrate.images import load_images
from pipeline.cli.main import main
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.plan.plan import RankPlan
from pipeline.engine.manifest import check_manifest
from pipeline.errors import explain
from pipeline.memory import peak_bytes
from pipeline.model.load import load_model
from pipeline.model.structure import decoder_structure
from tests.support.classifiers import processor, tiny_classifier
from tests.support.families import tiny_model
from tests.support.gguf_files import write_llama_gguf
from tests.support.mutations import mutated

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_before"
RIGHT = {0, 2, 3, 4}
LIMIT_S = 20
WHOLE_LIMIT_S = 900
MOST_BYTES = 1 << 30
SETTINGS = {"seed": 0}


@dataclass(frozen=True)
class Case:
    """A file, the folder that it lies in, and what reads it.

    Attributes:
        source: folder that is copied.
        file: that is damaged, in it.
        read: given the copy; returns an exit status.
        tries: how many damages are tried in `make test`; slow tests try more.
        header_bytes: at its beginning, which half of the damage is done to.
    """

    source: Path
    file: str
    read: Callable[[Path], int]
    tries: int = 12
    header_bytes: int = 64


def verb(*arguments: str) -> Callable[[Path], int]:
    """The command line, with FOLDER for the copy."""
    return lambda folder: main([a.replace("FOLDER", str(folder)) for a in arguments])


def call(read: Callable[[Path], object]) -> Callable[[Path], int]:
    """A reader that has no command of its own, and the status that its failure would give."""

    def run(folder: Path) -> int:
        try:
            read(folder)
        except Exception as error:
            failure = explain(error)
            assert failure is not None
            print(f"error: {failure}", file=sys.stderr)
            return failure.exit_status
        return 0

    return run


RUN = verb("run", "FOLDER", "-p", "hi", "--max-new-tokens", "2")
INSPECT = verb("inspect", "FOLDER")


def with_its_hash(folder: Path) -> int:
    """Run a graph whose hash the record has, so that the graph itself is looked at."""
    path = folder / "export.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, record | {"onnx_sha256": sha256_of_file(folder / "model.onnx")})
    return RUN(folder)


def read_plan(folder: Path) -> object:
    return RankPlan.load(folder / "plan.json", decoder_structure(tiny_model("llama")))


def read_layers(folder: Path) -> object:
    finished = FinishedLayers(folder, SETTINGS)
    return [finished.load(name) for name in finished.records if name in finished]


@cache
def classifier() -> PreTrainedModel:
    return tiny_classifier("vit")


def read_images(name: str) -> Callable[[Path], object]:
    """Arrays in a file, or the images of a folder, its labels being the names of sub-folders."""
    below = "" if name.endswith(".png") else name
    return lambda folder: load_images(str(folder / below), classifier(), processor(16))


CPU, CK = WRITTEN / "onnx-cpu", WRITTEN / "checkpoint"
CASES = {
    **{
        f"onnx-cpu/{name}": Case(CPU, name, RUN, tries)
        for name, tries in {
            "export.json": 30, "config.json": 20, "tokenizer.json": 20, "chat_template.jinja": 10,
            "tokenizer_config.json": 25, "generation_config.json": 25, "model.onnx.data": 5,
        }.items()
    },
    "onnx-cpu/model.onnx": Case(CPU, "model.onnx", with_its_hash, 30),
    "onnx-opset24/export.json": Case(WRITTEN / "onnx-opset24", "export.json", RUN, 10),
    "checkpoint/config.json": Case(CK, "config.json", RUN, 20),
    "checkpoint/model.safetensors": Case(CK, "model.safetensors", RUN, 15),
    "checkpoint-bits/config.json": Case(WRITTEN / "checkpoint-bits", "config.json", RUN, 15),
    "checkpoint/recipe.json": Case(CK, "recipe.json", INSPECT, 15),
    "checkpoint/report.json": Case(CK, "report.json", INSPECT, 15),
    "engine/manifest.json": Case(WRITTEN / "engine", "manifest.json", call(check_manifest), 30),
    "engine/manifest.json, shown": Case(WRITTEN / "engine", "manifest.json", INSPECT, 10),
    "decoder/config.json": Case(WRITTEN / "decoder", "config.json", INSPECT, 12),
    "checkpoint/config.json, exported": Case(
        CK, "config.json", verb("export", "FOLDER", "-o", "FOLDER/out", "--overwrite"), 1
    ),
    "plan.json": Case(Path("plan"), "plan.json", call(read_plan), 30),
    "progress.json": Case(Path("layers"), "progress.json", call(read_layers), 30),
    "model.gguf": Case(Path("gguf"), "model.gguf", call(lambda f: load_model(str(f))), 25, 1200),
    **{
        f"images/{name}": Case(Path("images"), name, call(read_images(name)), 12, 200)
        for name in ("a.npz", "a.npy", "a.safetensors", "0/a.png")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that no fixture holds."""
    import torch

    from pipeline.compress.plan.plan import uniform_plan

    root = tmp_path_factory.mktemp("made")
    folders = {name: root / name for name in ("plan", "layers", "gguf", "images")}
    for name in ("plan", "gguf", "images"):
        folders[name].mkdir()
    write_llama_gguf(folders["gguf"] / "model.gguf", tiny_model("llama", head_dim=16))
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.savez_compressed(folders["images"] / "a.npz", images=pictures, labels=np.arange(4))
    np.save(folders["images"] / "a.npy", pictures)
    save_file({"images": pictures}, folders["images"] / "a.safetensors")
    (folders["images"] / "0").mkdir()
    Image.fromarray(pictures[0]).save(folders["images"] / "0" / "a.png")
    uniform_plan(decoder_structure(tiny_model("llama")), 0.7).save(folders["plan"] / "plan.json")
    layers = FinishedLayers(folders["layers"], SETTINGS)
    layers.add("layer.0", {"a": torch.zeros(3)}, [{"members": ["a"], "form": "skip"}])
    layers.add("layer.1", {}, [])
    return folders


@pytest.fixture
def watchdog() -> Iterator[None]:
    """A reader that goes on and on is stopped, in pure Python at least."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    # A library that holds the interpreter hears no signal: then the whole process ends.
    faulthandler.dump_traceback_later(WHOLE_LIMIT_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damage(case: Case, source: Path, folder: Path, seed: int, tries: int) -> Iterator[int]:
    """Damage a file again and again; yields after each, with its seed, once it lies there."""
    shutil.copytree(source, folder)
    whole = (source / case.file).read_bytes()
    for number in range(seed, seed + tries):
        for path in source.iterdir():
            if path.suffix in (".json", ".onnx", ".data", ".safetensors"):
                shutil.copyfile(path, folder / path.name)
        is_json = case.file.endswith(".json")
        changed = mutated(whole, random.Random(number), is_json, case.header_bytes)
        (folder / case.file).write_bytes(changed)
        yield number


def hold(
    name: str,
    seed: int,
    tries: int,
    made: dict[str, Path],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[name]
    source = made.get(str(case.source), case.source)
    for number in damage(case, source, folder / "copy", seed, tries):
        before_bytes = peak_bytes()
        signal.alarm(LIMIT_S)
        try:
            status = case.read(folder / "copy")
        finally:
            signal.alarm(0)
        said = capsys.readouterr().err
        assert status in RIGHT, f"{name}, seed {number}: status {status}\n{said}"
        assert "Traceback" not in said, f"{name}, seed {number}"
        assert "Internal error" not in said, f"{name}, seed {number}"
        taken = peak_bytes() - before_bytes
        assert taken < MOST_BYTES, f"{name}, seed {number}: {taken} bytes"


@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_refused_or_read_and_never_an_internal_error(
    name: str, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(name, 0, CASES[name].tries, made, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize("name", CASES)
def test_a_file_damaged_in_thousands_of_ways_is_no_internal_error(
    name: str, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(name, 1000, 25 * CASES[name].tries, made, tmp_path, capsys)
