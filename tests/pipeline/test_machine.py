"""What is read from /proc."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import machine


def test_an_absent_file_means_unknown_not_failure(tmp_path: Path) -> None:
    assert machine.cpu_flags(tmp_path / "absent") == ()


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx2 zz", "Features\t: fp asimd"])
def test_cpu_flags_of_both_architectures(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\n{line}\n")
    assert machine.cpu_flags(path) in {("avx2",), ("asimd",)}


def test_a_container_with_less_time_than_cores_is_given_fewer_threads(tmp_path: Path) -> None:
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    inner = groups / "user.slice" / "job.scope"
    inner.mkdir(parents=True)
    own.write_text("1:cpu:/old\n0::/user.slice/job.scope\n")
    assert machine._granted_cores(groups, own) == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert machine._granted_cores(groups, own) == 3
    (inner / "cpu.max").write_text("50000 100000\n")
    assert machine._granted_cores(groups, own) == 1
    assert machine._granted_cores(groups, tmp_path / "absent") == math.inf


def test_products_take_one_thread_of_each_physical_core(tmp_path: Path) -> None:
    cores = machine._cores()
    assert machine.product_threads(tmp_path) == machine.usable_cores()
    for core in cores:
        topology = tmp_path / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-63\n")
    assert machine.product_threads(tmp_path) == 1


@pytest.mark.parametrize(
    ("chosen", "says"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_commands_spin_briefly_unless_the_user_chose(chosen: dict[str, str], says: str) -> None:
    lines = "import os; from pipeline.cli.main import main; main(['--version']); "
    lines += "print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    answer = subprocess.run(
        [sys.executable, "-c", lines], env=kept | chosen, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[-1] == says


def test_the_processors_maker_is_asked_of_its_own_line(tmp_path: Path) -> None:
    for name, line, expected in (
        ("amd", "vendor_id\t: AuthenticAMD", True),
        ("intel", "vendor_id\t: GenuineIntel\nmodel name\t: not AuthenticAMD", False),
    ):
        (tmp_path / name).write_text(f"processor\t: 0\n{line}\n")
        assert machine.is_of_amd(tmp_path / name) is expected
    assert not machine.is_of_amd(tmp_path / "absent")
