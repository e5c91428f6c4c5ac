"""The peak of this process and of another."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from pipeline.memory import peak_bytes, peak_of_children_bytes, peak_of_usage

MEBIBYTE = 1 << 20


def test_memory_that_was_given_back_stays_in_the_peak() -> None:
    before = peak_bytes()
    held = np.ones(256 * MEBIBYTE, np.uint8)
    during = peak_bytes()
    del held
    assert during >= 256 * MEBIBYTE
    # The kernel adds up what each core has counted now and then only.
    assert peak_bytes() >= during - 4 * MEBIBYTE >= before - 8 * MEBIBYTE


def test_the_peak_of_another_process_is_its_own() -> None:
    code = f"held = bytearray(200 * {MEBIBYTE}); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        peak = peak_bytes(child.pid)
        child.communicate("\n")
    # What Python itself takes is some tens of megabytes.
    assert 200 * MEBIBYTE <= peak < 300 * MEBIBYTE
    with pytest.raises(OSError, match=str(child.pid)):
        peak_bytes(child.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one count alone")
def test_both_counts_of_the_kernel_are_bytes() -> None:
    counted = peak_of_usage(resource.getrusage(resource.RUSAGE_SELF))
    # The kernel's count of a process goes on from what it was before it ran this program.
    assert counted >= peak_bytes(os.getpid()) * 0.9


def test_the_peak_of_children_is_that_of_the_largest_that_has_ended() -> None:
    subprocess.run([sys.executable, "-c", f"bytearray(400 * {MEBIBYTE})"], check=True)
    assert peak_of_children_bytes() >= 400 * MEBIBYTE
