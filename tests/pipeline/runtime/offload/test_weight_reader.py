"""Weights are read past the page cache, to the byte, and whatever fails says where and why."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.runtime.offload.weight_reader import (
    ALIGNMENT,
    WeightReader,
    aligned_buffer,
    lay_out,
)

SIZE = 3_000_001


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Random bytes that end in the middle of a block, and are on the disk."""
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
    return path


def tensors(seed: int) -> dict[str, tuple[int, int, int]]:
    random = np.random.default_rng(seed)
    starts = sorted(random.integers(0, SIZE, 8).tolist())
    ends = [*starts[1:], SIZE]
    stops = [int(random.integers(a, b + 1)) for a, b in zip(starts, ends, strict=True)]
    return {f"t{i}": (0, a, b) for i, (a, b) in enumerate(zip(starts, stops, strict=True))}


@pytest.mark.parametrize("seed", range(5))
def test_every_tensor_is_where_the_layout_says(file: Path, seed: int) -> None:
    wanted, content = tensors(seed), file.read_bytes()
    layout, reader = lay_out(wanted), WeightReader([file])
    buffer = aligned_buffer(layout.size)
    reader.read(layout, buffer)
    for name, (_, start, stop) in wanted.items():
        place = layout.places[name]
        assert buffer[place : place + stop - start].tobytes() == content[start:stop]
    assert {s.start % ALIGNMENT for s in layout.stretches} == {0}
    assert reader.read_bytes >= sum(stop - start for _, start, stop in wanted.values())
    reader.close()


def test_neighbours_are_read_at_once_and_files_apart() -> None:
    layout = lay_out({"a": (0, 100, 5000), "b": (0, 5008, 9000), "c": (1, 8, 16)})
    assert [(s.file, s.start, s.size) for s in layout.stretches] == [(0, 0, 12288), (1, 0, 4096)]
    assert layout.places == {"a": 100, "b": 5008, "c": 12288 + 8}


def resident_share(path: Path) -> float:
    """Share of a file's pages that the page cache holds, by mincore."""
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        told = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), told) == 0
        return sum(byte & 1 for byte in told) / pages


def test_nothing_is_left_in_the_page_cache(file: Path) -> None:
    reader = WeightReader([file])
    if not reader.direct:
        pytest.skip("the temporary folder's file system has no O_DIRECT")
    reader.forget_pages()
    before = resident_share(file)
    layout = lay_out({"all": (0, 0, SIZE)})
    reader.read(layout, aligned_buffer(layout.size))
    assert resident_share(file) <= before <= 0.01
    reader.close()


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_file_system_without_o_direct_is_read_otherwise_and_that_is_said(
    file: Path,
    when: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opening, reading = os.open, os.preadv
    direct: set[int] = set()

    def open_(path: Any, flag: int, *rest: Any, **named: Any) -> int:
        if when == "opened" and flag & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        found = opening(path, flag & ~os.O_DIRECT, *rest, **named)
        (direct.add if flag & os.O_DIRECT else direct.discard)(found)
        return found

    def preadv(number: int, *rest: Any) -> int:
        if number in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return reading(number, *rest)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    reader, layout = WeightReader([file, file]), lay_out({"all": (1, 0, SIZE)})
    buffer = aligned_buffer(layout.size)
    reader.read(layout, buffer)
    monkeypatch.undo()
    assert not reader.direct
    assert buffer[:SIZE].tobytes() == file.read_bytes()
    assert capsys.readouterr().err.count("no O_DIRECT") == 1
    reader.close()


def test_a_file_that_was_cut_or_written_to_is_refused(file: Path) -> None:
    layout = lay_out({"all": (0, 0, SIZE)})
    reader, buffer = WeightReader([file]), aligned_buffer(layout.size)
    with file.open("r+b") as opened:
        opened.write(b"other")
    with pytest.raises(InputError, match="was changed"):
        reader.read(layout, buffer)
    os.truncate(file, 1_000_000)
    with pytest.raises(InputError, match="shorter than it was") as caught:
        reader.read(layout, buffer)
    assert caught.value.details["expected"] == f"{SIZE} bytes"
    reader.close()


def test_a_file_that_is_replaced_goes_on_being_read(file: Path, tmp_path: Path) -> None:
    content, layout = file.read_bytes(), lay_out({"all": (0, 0, SIZE)})
    reader, buffer = WeightReader([file]), aligned_buffer(layout.size)
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "other").replace(file)
    reader.read(layout, buffer)
    assert buffer[:SIZE].tobytes() == content
    reader.close()


def test_a_disk_that_fails_is_named_and_the_next_read_works(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = lay_out({"all": (0, 0, SIZE)})
    reader, buffer = WeightReader([file]), aligned_buffer(layout.size)

    def fail(*rest: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(InputError, match="could not be read") as caught:
            reader.read(layout, buffer)
    assert "Input/output error" in caught.value.details["observed"]
    reader.read(layout, buffer)
    reader.close()


def test_a_file_that_is_missing_is_refused_and_nothing_stays_open(
    file: Path, tmp_path: Path
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match="cannot be read"):
        WeightReader([file, tmp_path / "missing"])
    assert len(os.listdir("/proc/self/fd")) == before
