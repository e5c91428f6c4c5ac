"""What a checkpoint's report says that rounding cost, beside what truncation cost.

The factors as they were before rounding are not kept, so no stage can run them; what is known is
the error of every group's output when it was fitted, before and after its numbers became codes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.checkpoint.folder import read_record


@dataclass(frozen=True)
class Rounding:
    """Matrices quantised, and the errors of their outputs.

    Attributes:
        groups: of matrices that share an input, with some quantised.
        all_groups: of the model.
        formats: format -> matrices or factors of those groups that are stored in it.
        tables: embedding or head -> its format.
        truncated: E |W x - W_r x|^2 / E |W x|^2 before rounding, mean over `groups`; None without.
        rounded: the same of what is stored, errors made up for by the refit of B among it.
    """

    groups: int
    all_groups: int
    formats: dict[str, int]
    tables: dict[str, str]
    truncated: float | None
    rounded: float | None

    @classmethod
    def read(cls, checkpoint: Path) -> Rounding | None:
        """What report.json says; None for a checkpoint with nothing quantised.

        Raises:
            InputError: the report is broken.
        """
        report = read_record(checkpoint, "report.json")
        every: list[dict[str, Any]] = report.get("groups", [])
        tables = {name: style for name, style in report.get("tables", {}).items() if style}
        groups = [group for group in every if "rounded_relative_error" in group]
        if not groups and not tables:
            return None
        styles = (group.get(key) for group in groups for key in ("down_style", "up_style"))
        return cls(
            groups=len(groups),
            all_groups=len(every),
            formats=dict(Counter(style for style in styles if style).most_common()),
            tables=tables,
            truncated=fmean(g["relative_error"] for g in groups) if groups else None,
            rounded=fmean(g["rounded_relative_error"] for g in groups) if groups else None,
        )

    @property
    def share(self) -> float | None:
        """Of `rounded`, what rounding added; below zero where the refit won more than it cost."""
        if self.truncated is None or not self.rounded:
            return None
        return 1 - self.truncated / self.rounded
