"""The driver by ctypes: on the fake board, and on a real GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError, ResourceError
from pipeline.runtime.device.driver import DeviceMemory, Driver, HostMemory, Stream
from tests.support.fake_gpu.board import Board


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Driver:
    if request.param == "real":
        return Driver()
    board: Board = request.getfixturevalue("board")
    return board.driver()


def test_a_graph_copies_what_stands_there_when_it_is_launched(driver: Driver) -> None:
    stream, size = Stream(driver), 1000
    there, back = HostMemory(driver, size), HostMemory(driver, size)
    first, second = DeviceMemory(driver, size), DeviceMemory(driver, size)
    assert first.address % 256 == second.address % 256 == 0
    stream.begin_capture()
    stream.copy_in(first.address, there.address, size)
    stream.copy_within(second.address, first.address, size)
    stream.copy_out(back.address, second.address, size)
    graph = stream.end_capture()
    for number in (7, 9):
        there.content[:] = number
        graph.launch(stream)
        stream.wait()
        assert (back.content == number).all()
    stream.clear(second.address, size // 2)
    stream.copy_out(back.address, second.address, size)
    stream.wait()
    assert (back.content[: size // 2] == 0).all()
    assert (back.content[size // 2 :] == 9).all()


def test_the_gpu_says_what_it_is_and_what_memory_is_free(driver: Driver) -> None:
    free, total = driver.memory_bytes()
    assert 0 < free <= total
    assert driver.name
    assert driver.capability >= (5, 0)
    assert driver.cuda >= (12, 0)
    memory = DeviceMemory(driver, 64 << 20)
    assert driver.memory_bytes()[0] < free
    del memory
    with pytest.raises(ResourceError, match="no memory left"):
        DeviceMemory(driver, 2 * total)


def test_a_gpu_that_is_not_there_is_refused(board: Board, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        Driver(str(board.library), ordinal=1)
    with pytest.raises(InputError, match="no usable NVIDIA driver"):
        Driver(str(tmp_path / "libcuda.so.1"))


def test_numbers_of_both_sides_stay_apart(board: Board) -> None:
    driver = board.driver()
    host, device = HostMemory(driver, 256), DeviceMemory(driver, 256)
    numbers = np.arange(32, dtype=np.int64)
    host.content.view(np.int64)[:] = numbers
    stream = Stream(driver)
    stream.copy_in(device.address, host.address, 256)
    stream.wait()
    host.content[:] = 0
    stream.copy_out(host.address, device.address, 256)
    stream.wait()
    assert (host.content.view(np.int64) == numbers).all()
