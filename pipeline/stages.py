"""Stages of one command, each in a folder of its own, in order or beside: what is there is kept."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.artefact import folder_bytes, write_json
from pipeline.child_process import Beside, EndBeside
from pipeline.errors import InputError, UsageError
from pipeline.folder_lock import FolderLock
from pipeline.json_file import json_field, read_json_object
from pipeline.memory import peak_bytes, peak_of_children_bytes
from pipeline.output import held_names
from pipeline.progress import note
from pipeline.provenance import provenance

_SCHEMA = 1
BUILD_RECORD = "build.json"
# A dataclass.
_Request = TypeVar("_Request")


@dataclass
class Stages(Generic[_Request]):
    """A chain of stages under way: its folder, its request, what is finished, what was read."""

    folder: Path
    request: _Request
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    _begun: dict[str, Future[EndBeside]] = field(default_factory=dict)

    @classmethod
    def take_up(cls, folder: Path, request: _Request, inputs: dict[str, Any]) -> Stages[_Request]:
        """Go on with what an earlier run of the same request left, or start in an empty folder.

        Raises:
            InputError: what is there has no record.
            UsageError: it had other settings, or read something else.
        """
        state = cls(folder, request, _earlier_stages(request, inputs, folder), inputs)
        state.save()
        return state

    def begin(self, name: str, folder: str, beside: Beside, *command: str) -> None:
        """Let a command of skipcat do a stage while this process goes on; `run` waits for it.

        Args:
            name: of the stage.
            folder: that it writes; nothing is begun where it is there already.
            beside: runs the command.
            command: its arguments, but for the folder.
        """
        path = self.folder / folder
        if not path.exists():
            note(f"{name}, in a process beside this one ...")
            self._begun[name] = beside.add(*command, "-o", str(path))

    def has_begun(self, name: str) -> bool:
        """Whether a stage is being done beside, and `run` has not waited for it yet."""
        return name in self._begun

    def run(self, name: str, folder: str, work: Callable[[Path], Any]) -> None:
        """Do one stage unless its folder is there already, and record time and memory.

        A stage that was begun beside is waited for. If that failed it is done here, where its
        error is raised.
        """
        path = self.folder / folder
        begun = self._begun.pop(name, None)
        if begun is not None:
            end = begun.result()
            if end.status == 0:
                for line in end.said.splitlines():
                    note(line)
                self._record(name, folder, end.seconds)
                return
            note(f"{name} failed in a process of its own (status {end.status}); again in this one")
        elif path.exists():
            with FolderLock(path):  # that of a run which was killed at its very end goes with it
                note(f"{name}: finished earlier, kept")
            return
        note(f"{name} ...")
        started = time.monotonic()
        work(path)
        gc.collect()
        self._record(name, folder, time.monotonic() - started)

    def _record(self, name: str, folder: str, seconds: float) -> None:
        """Write down that a stage is finished."""
        self.stages[name] = {
            "folder": folder,
            "seconds": round(seconds, 1),
            "bytes": folder_bytes(self.folder / folder),
            "peak_bytes": max(peak_bytes(), peak_of_children_bytes()),
        }
        self.save()
        note(f"{name}: {self.stages[name]['seconds']:.0f} s")

    def save(self) -> None:
        """Write build.json."""
        write_json(
            self.folder / BUILD_RECORD,
            {
                "schema": _SCHEMA,
                "request": _as_json(self.request),
                "inputs": self.inputs,
                "stages": self.stages,
                "provenance": provenance(),
            },
        )


def _earlier_stages(
    request: Any, inputs: dict[str, Any], folder: Path
) -> dict[str, dict[str, Any]]:
    """The stages that are kept of an earlier run; raise UsageError where it was another one."""
    if not holds_something(folder):
        return {}
    earlier = read_build_record(folder)
    for name, now in (("request", _as_json(request)), ("inputs", inputs)):
        before = earlier[name]
        if before is None:
            note(f"{folder / BUILD_RECORD} is of an older skipcat and does not say what was read")
        elif before != now:
            changed = ", ".join(key for key in now if before.get(key) != now[key])
            raise UsageError(
                "The unfinished build was started with other settings or inputs.",
                where=folder / BUILD_RECORD,
                observed=f"differs in {changed or 'its settings'}",
                change="repeat the earlier ones, or start afresh: --overwrite, or without --resume",
            )
    stages: dict[str, dict[str, Any]] = earlier["stages"]
    return stages


def holds_something(folder: Path) -> bool:
    """Whether a folder is there and has more in it than a killed run's remains."""
    return folder.is_dir() and bool(held_names(folder))


def read_build_record(folder: Path) -> dict[str, Any]:
    """build.json; raise InputError without one, since the folder is then not ours to change."""
    try:
        record = read_json_object(folder / BUILD_RECORD)
        where = folder / BUILD_RECORD
        earlier = {name: json_field(record, name, dict, where) for name in ("request", "stages")}
        return earlier | {"inputs": json_field(record, "inputs", dict, where, default=None)}
    except InputError as error:
        raise InputError(
            "The output was not written by skipcat build, so it is left as it is.",
            where=folder,
            expected=f"a folder with the {BUILD_RECORD} of a build",
            change="choose another --output, or delete it yourself",
        ) from error


def _as_json(request: Any) -> Any:
    return json.loads(json.dumps(asdict(request)))
