"""Tasks are computed where `--workers` says, and taken in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.workers.workers import IN_PROCESS, InOrder, InProcess, Result, open_workers


class Later(InProcess):
    """Workers that compute a task only when it is waited for, and write down when."""

    at_once = 2

    def __init__(self) -> None:
        self.computed: list[str] = []

    def submit(
        self, where: str, function: Callable[..., Any], *arguments: Any, needed_bytes: int = 0
    ) -> Result[Any]:
        outer = self

        class Waiting:
            def get(self) -> Any:
                outer.computed.append(where)
                return function(*arguments)

        return Waiting()


def test_without_workers_a_task_is_computed_as_it_is_submitted() -> None:
    with open_workers(None) as workers:
        assert workers is IN_PROCESS
        seen: list[int] = []
        result = workers.submit("here", seen.append, 3)
        assert seen == [3]
        assert result.get() is None
        assert workers.share(seen).get() is seen
        assert workers.describe() == {}


def test_a_task_is_given_what_another_returned_and_may_return_several_values() -> None:
    parts = IN_PROCESS.submit_parts("parts", divmod, 2, IN_PROCESS.share(17), 5)
    assert [part.get() for part in parts] == [3, 2]
    assert IN_PROCESS.submit("sum", sum, IN_PROCESS.submit("list", list, (1, 2))).get() == 3


def test_without_workers_nothing_of_ray_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from pipeline.workers.workers import open_workers\n"
        "import pipeline.compress.walk\n"
        "with open_workers(None): pass\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_are_taken_in_the_order_of_their_tasks_and_no_more_wait_than_are_wanted() -> None:
    workers, taken = Later(), []
    waiting: InOrder[str, int] = InOrder(workers, lambda key, values: taken.append((key, values)))
    waiting.add("a", [workers.submit("a", int, 1)])
    waiting.add("b", [workers.submit("b", int, 2)])
    assert workers.computed == []
    waiting.add("c", [workers.submit(f"c{i}", int, i) for i in range(2)])
    assert taken == [("a", [1]), ("b", [2])]
    waiting.finish()
    assert taken[2] == ("c", [0, 1])
    assert workers.computed == ["a", "b", "c0", "c1"]


def test_what_needs_no_task_waits_its_turn() -> None:
    workers, taken = Later(), []
    waiting: InOrder[str, int] = InOrder(workers, lambda key, values: taken.append(key))
    waiting.add("a", [workers.submit("a", int, 1)])
    waiting.add("b", [])
    assert taken == []
    waiting.finish()
    assert taken == ["a", "b"]


@pytest.mark.parametrize(
    "place", ["", "local:0", "local:", "local:-1", "remote", "ray://", "ray://host", "LOCAL", "2"]
)
def test_another_place_is_refused(place: str) -> None:
    with pytest.raises(UsageError, match="no such workers") as caught, open_workers(place):
        pass
    assert "local:4" in caught.value.details["expected"]
