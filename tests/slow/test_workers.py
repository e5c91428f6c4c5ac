"""Whole compressions by other processes: the same bytes, whatever is lost on the way."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.artefact import sha256_of_file
from pipeline.child_process import environment
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.machine import limited_threads
from pipeline.workers.workers import Workers, open_workers
from tests.support.families import save_family

pytest.importorskip("ray", reason="needs ray (make setup EXTRAS=distributed)")
pytestmark = pytest.mark.slow

_SETTINGS = "--calibration self --windows 8 --window-length 32 --threads 1 --keep-bytes 0.4"
_EFFORTS = ("fast", "default")
_RAY = ("raylet", "gcs_server", "ray::")


def command(model: Path, output: Path, effort: str, *more: str) -> list[str]:
    arguments = ["compress", "-m", str(model), "-o", str(output), *_SETTINGS.split()]
    program = [sys.executable, "-m", "pipeline.cli.main", *arguments]
    return [*program, "--runtime", "any", "--effort", effort, *more]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=900)


def bytes_of(folder: Path) -> dict[str, str]:
    """What has to be the same: weights, plan and configuration."""
    files = [*folder.glob("*.safetensors"), folder / "plan.json", folder / "config.json"]
    return {path.name: sha256_of_file(path) for path in files}


def children_of_ray() -> set[int]:
    """Processes of Ray that run now."""
    found = set()
    for process in psutil.process_iter(["pid", "name", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(n in line for n in _RAY):
            found.add(process.info["pid"])
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Effort -> bytes of a compression by one process."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for effort in _EFFORTS:
        done = run(command(model, folder / effort, effort))
        assert done.returncode == 0, done.stderr
        found[effort] = bytes_of(folder / effort)
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Afterwards no process of Ray runs that did not run before."""
    before = children_of_ray()
    yield
    deadline = time.monotonic() + 60
    while children_of_ray() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not children_of_ray() - before


@pytest.mark.parametrize("effort", _EFFORTS)
@pytest.mark.usefixtures("nothing_left")
def test_two_local_workers_give_the_bytes_of_one_process(
    effort: str, model: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    done = run(command(model, tmp_path / "two", effort, "--workers", "local:2"))
    assert done.returncode == 0, done.stderr
    assert "workers: 2 on 1 machine, 1 thread each" in done.stderr
    assert bytes_of(tmp_path / "two") == alone[effort]


@pytest.mark.parametrize("place", ["auto", "ray://127.0.0.1:1"])
def test_where_no_cluster_answers_nothing_is_begun(place: str, model: Path, tmp_path: Path) -> None:
    done = run(command(model, tmp_path / "two", "fast", "--workers", place))
    assert done.returncode == 2, done.stderr
    assert "No Ray cluster answers there." in done.stderr
    assert f"--workers {place}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes, each with one core."""
    from ray.cluster_utils import Cluster

    (port,) = free_ports(1)
    arguments = {"num_cpus": 1, "ray_client_server_port": port, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield f"ray://127.0.0.1:{port}"
    cluster.shutdown()


@pytest.mark.parametrize("effort", _EFFORTS)
def test_a_cluster_of_two_nodes_gives_the_bytes_of_one_process(
    effort: str, cluster: str, model: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    done = run(command(model, tmp_path / "two", effort, "--workers", cluster))
    assert done.returncode == 0, done.stderr
    assert "workers: 2 on 2 machines, 1 thread each" in done.stderr
    assert bytes_of(tmp_path / "two") == alone[effort]


def began(arguments: list[str]) -> subprocess.Popen[str]:
    """A run that has its workers."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("workers:"):
            break
    return process


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two of this process's own."""
    with open_workers("local:2") as found:
        yield found


def kill_one(after_s: float) -> None:
    """Kill a process that computes tasks of this one, a while later."""
    time.sleep(after_s)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::_compute" in " ".join(child.cmdline()):
                child.kill()
                return


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_that_is_killed_at_random_changes_no_byte(
    seed: int, model: Path, workers: Workers, tmp_path: Path
) -> None:
    request = CompressRequest(
        str(model), keep_bytes=0.4, runtime="any", windows=8, window_length=32
    )
    with limited_threads(1):
        started = time.monotonic()
        compress_to_folder(request, tmp_path / "alone", workers=workers)
        seconds = time.monotonic() - started
        killer = threading.Thread(target=kill_one, args=(random.Random(seed).uniform(0, seconds),))
        killer.start()
        compress_to_folder(request, tmp_path / "killed", workers=workers)
        killer.join()
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "alone")


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_is_killed_at_random_goes_on_to_the_same_bytes(
    seed: int, cluster: str, model: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    effort = _EFFORTS[seed % 2]
    arguments = command(model, tmp_path / "two", effort, "--workers", cluster)
    process = began(arguments)
    time.sleep(random.Random(100 + seed).uniform(0, 8))
    process.kill()
    process.communicate()
    if not (tmp_path / "two").exists():
        done = run([*arguments, "--resume"])
        assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "two") == alone[effort]


@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_leaves_nothing_running_and_says_how_to_go_on(
    model: Path, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    arguments = command(model, tmp_path / "two", "fast", "--workers", "local:2")
    process = began(arguments)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in stderr
    done = run([*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "two") == alone["fast"]
