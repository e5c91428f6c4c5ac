"""The command line of a build of a tiny model for the CPU."""

from __future__ import annotations

from pathlib import Path

from tests.support.families import save_family

SIZES = ["--windows", "4", "--window-length", "32", "--eval-windows", "8", "--eval-length", "32"]


def build_arguments(root: Path) -> list[str]:
    """All but the output; the model and its text are written into `root`."""
    model = save_family(root / "tiny", "smollm")
    text = root / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    texts = ["--calibration", str(text), "--eval-text", str(text)]
    flags = ["--target", "cpu", "--max-length", "128", *SIZES, *texts]
    return ["build", "-m", str(model), "--keep-params", "0.7", *flags]
