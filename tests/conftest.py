"""Settings of every test: no hub, and a printed reason where a GPU or TensorRT is missing."""

from __future__ import annotations

import os
import sys

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from pipeline.gpu import find_gpus

# Names the folder of what is made once for all tests (tests/support/tiny_decoder.py).
SHARED_FOLDER = "SKIPCAT_TESTS_SHARED"
# Below tests/, what takes longest: begun first, so that no worker ends long after the others.
_FIRST = (
    "pipeline/export", "pipeline/test_build", "pipeline/compress/cache", "pipeline/cli",
    "trt_plugins", "test_how_to_add", "validate", "pipeline/compress", "pipeline/runtime",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the workers; torch of the fast tests gets one thread anywhere.

    Their models are so small that waking a second thread takes longer than the work.
    """
    quick = config.getoption("markexpr") == "not slow"
    workers = getattr(config.option, "numprocesses", None) or 1
    if quick or workers > 1:
        threads = 1 if quick else max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        if "torch" in sys.modules:  # by a conftest of a folder that was named on the command line
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not hasattr(config, "workerinput"):  # the workers are given the environment of this one
        shared = os.environ[SHARED_FOLDER] = tempfile.mkdtemp(prefix="skipcat-tests-")
        # Proofs and hashes are made once for all workers, and the user's own are left alone.
        os.environ["SKIPCAT_CACHE"] = os.path.join(shared, "cache")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what all tests share, once the last one has run."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(SHARED_FOLDER), ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def no_plugin_of_this_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines of tests take no plugin that `make plugin` left: the fake TensorRT loads none."""
    from pipeline.engine import plan

    with pytest.MonkeyPatch.context() as patch:
        nowhere = tmp_path_factory.getbasetemp() / "no" / plan.BUILT_PLUGIN.name
        patch.setattr(plan, "BUILT_PLUGIN", nowhere)
        yield


def missing_hardware() -> dict[str, str]:
    """For each marker whose requirement is not met here, the reason to skip."""
    reasons = {}
    gpus, why = find_gpus()
    if not gpus:
        reasons["gpu"] = f"needs an NVIDIA GPU: {why}"
    if importlib.util.find_spec("tensorrt") is None:
        reasons["trt"] = "needs TensorRT: no module named tensorrt"
    return reasons


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, and skip tests that this machine cannot run, saying why."""
    items.sort(key=_place)
    for marker, reason in missing_hardware().items():
        for item in items:
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def _place(item: pytest.Item) -> int:
    file = item.nodeid.removeprefix("tests/")
    return next((n for n, start in enumerate(_FIRST) if file.startswith(start)), len(_FIRST))
