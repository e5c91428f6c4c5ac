"""Tasks in other processes, through Ray: the same values, and failures that are named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.compress.factorize.factors import rtn
from pipeline.errors import InputError, PipelineError, ResourceError, UsageError
from pipeline.quantize.formats import Format
from pipeline.workers.ray_workers import _connected
from pipeline.workers.workers import Workers, open_workers
from tests.support import worker_tasks
from tests.support.tiny_decoder import save_tiny_folder
from validate.subject import ModelPlace, Subject

pytest.importorskip("ray", reason="needs ray (make setup EXTRAS=distributed)")
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with open_workers("local:2") as found:
        yield found


def test_tasks_are_computed_in_other_processes(workers: Workers) -> None:
    results = [workers.submit(f"task {i}", worker_tasks.own_process, i) for i in range(4)]
    assert os.getpid() not in {result.get() for result in results}
    assert workers.describe()["workers"] == 2


def test_every_process_computes_with_the_same_threads(workers: Workers) -> None:
    found, variable = workers.submit("threads", worker_tasks.threads).get()
    assert found == workers.describe()["threads"] == torch.get_num_threads()
    assert variable == str(found)


def test_tensors_of_every_type_arrive_as_they_were(workers: Workers) -> None:
    random = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    given = {str(t): random.to(t) for t in (torch.float64, torch.float32, torch.float16)}
    given |= {"bfloat16": random.bfloat16(), "transposed": random.T, "empty": random[:0]}
    given |= {"int64": torch.arange(4), "bool": random > 0, "scalar": torch.tensor(2.5)}
    given["parameter"] = torch.nn.Parameter(random)
    found = workers.submit("types", worker_tasks.name_types, given).get()
    for name, tensor in given.items():
        kind, back = found[name]
        assert kind == str(tensor.dtype)
        assert torch.equal(back, tensor)


def test_what_is_shared_arrives_in_every_task_that_is_given_it(workers: Workers) -> None:
    given = {"only": torch.arange(6, dtype=torch.bfloat16)}
    shared = workers.share(given)
    results = [workers.submit("shared", worker_tasks.name_types, shared) for _ in range(3)]
    assert all(torch.equal(result.get()["only"][1], given["only"]) for result in results)


def test_codes_of_a_matrix_come_back_as_they_were(workers: Workers) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    format = Format.parse("int4-b16-asym")
    own, found = rtn(weight, format), workers.submit("codes", rtn, weight, format).get()
    assert np.array_equal(found.codes, own.codes)
    assert np.array_equal(found.scales, own.scales)


@pytest.mark.parametrize("kind", [InputError, ValueError, KeyError])
def test_what_a_task_raises_is_raised_here(workers: Workers, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        workers.submit("a group", worker_tasks.fail, kind).get()
    assert type(caught.value) is kind
    if isinstance(caught.value, InputError):
        assert caught.value.details["where"] == "layer 3"


def test_a_lost_worker_s_task_is_done_again(workers: Workers, tmp_path: Path) -> None:
    mark = str(tmp_path / "began")
    assert workers.submit("a group", worker_tasks.die_once, mark).get() != os.getpid()


def test_a_task_whose_worker_is_lost_twice_is_named(workers: Workers) -> None:
    with pytest.raises(PipelineError, match="lost twice") as caught:
        workers.submit("layer 3, q and k", worker_tasks.die).get()
    assert caught.value.details["where"] == "layer 3, q and k"
    assert caught.value.exit_status == 1
    assert workers.submit("the next", worker_tasks.own_process).get() != os.getpid()


def test_a_task_that_takes_far_more_memory_than_it_declared_is_ended(workers: Workers) -> None:
    declared = 256 * MEGABYTE
    enough = workers.submit("layer 3", worker_tasks.fill, declared, needed_bytes=declared)
    assert enough.get() == declared // 8
    with pytest.raises(ResourceError, match="more memory than it may have") as caught:
        workers.submit("layer 3", worker_tasks.fill, 6 * declared, needed_bytes=declared).get()
    assert caught.value.details["where"] == "layer 3"
    assert "0.27 GB" in caught.value.details["expected"]
    # The next one is free of it.
    size = 6 * declared
    assert workers.submit("layer 4", worker_tasks.fill, size).get() == size // 8


def test_a_task_that_no_machine_has_the_memory_for_is_refused_at_once(workers: Workers) -> None:
    with pytest.raises(ResourceError, match="No worker has the memory") as caught:
        workers.submit("layer 3", worker_tasks.fill, 8, needed_bytes=1 << 50)
    assert caught.value.details["where"] == "layer 3"


def test_windows_of_a_text_are_measured_elsewhere_as_here(workers: Workers, tmp_path: Path) -> None:
    place = ModelPlace(str(save_tiny_folder(tmp_path / "model")))
    windows = np.random.default_rng(0).integers(0, 250, (4, 30))
    # Which has as many threads here: see above.
    here = Subject.open(place).quality(None, windows, lambda line: None)
    there = Subject.open(place, workers).quality(None, windows, lambda line: None)
    assert there.window_nlls == here.window_nlls


class Client:
    """Ray's client, whose cluster begins no process for so many tries."""

    def __init__(self, refused: int, message: str, kind: type[Exception] = ConnectionError) -> None:
        self.refused, self.message, self.kind, self.asked = refused, message, kind, 0

    def init(self, **_: object) -> str:
        self.asked += 1
        if self.asked <= self.refused:
            raise self.kind(self.message)
        return "connected"

    def shutdown(self) -> None:
        """Nothing to end."""


@pytest.mark.parametrize(
    ("kind", "message", "shown"),
    [
        (
            ConnectionError,
            "Initialization failure from server:\nTraceback\nTimeoutError: of 30 s",
            "TimeoutError: of 30 s",
        ),
        (Exception, "The current node timed out during startup. This could", "timed out"),
    ],
)
def test_a_cluster_that_was_too_busy_is_asked_once_more(
    kind: type[Exception], message: str, shown: str
) -> None:
    assert _connected(Client(1, message, kind), "ray://host:1", {}) == "connected"
    client = Client(9, message, kind)
    with pytest.raises(UsageError, match="No Ray cluster answers") as caught:
        _connected(client, "ray://host:1", {})
    assert client.asked == 2
    assert shown in caught.value.details["observed"]
    assert "less busy" in caught.value.details["change"]


def test_a_cluster_that_is_not_there_is_asked_once() -> None:
    client = Client(9, "ray client connection timeout")
    with pytest.raises(UsageError, match="No Ray cluster answers"):
        _connected(client, "ray://host:1", {})
    assert client.asked == 1
