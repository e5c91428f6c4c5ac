"""Keys and values in memory that sessions bind and write in place: one, or several at once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np


class KeyValues:
    """Rows of keys and values, one for each sequence, which a session and its draft may share.

    Whoever reads tokens writes what belongs to them, where they stand; how many of a row's places
    count is each session's own affair.

    Args:
        slots: rows to begin with. The system gives memory to zeros only when something is written.
        widths: heads and width of each, by the name of the graph's input.
        length: places of a row.
        dtype: as the graphs hold them.

    Attributes:
        buffers: [slots, heads, length, width] each; another dict once there are more rows.
    """

    def __init__(
        self, slots: int, widths: Mapping[str, tuple[int, int]], length: int, dtype: np.dtype
    ) -> None:
        self._shape = (MappingProxyType(dict(widths)), length, np.dtype(dtype))
        self.buffers = self._empty(slots)

    @property
    def slots(self) -> int:
        """Number of rows."""
        return len(next(iter(self.buffers.values())))

    @property
    def layout(self) -> str:
        """What has to be the same for two graphs to read each other's keys and values."""
        widths, length, dtype = self._shape
        heads = ", ".join(f"{name} {list(found)}" for name, found in sorted(widths.items()))
        return f"{dtype}, {length} places: {heads}"

    def like(self, slots: int) -> KeyValues:
        """Other memory of the same layout, with so many rows."""
        widths, length, dtype = self._shape
        return KeyValues(slots, widths, length, dtype)

    def grow(self, slots: int, used: int) -> None:
        """Have more rows, and keep the first `used` places of the present ones."""
        old, self.buffers = self.buffers, self._empty(slots)
        for name, buffer in old.items():
            self.buffers[name][: len(buffer), :, :used] = buffer[:, :, :used]

    def _empty(self, slots: int) -> dict[str, np.ndarray]:
        widths, length, dtype = self._shape
        return {
            name: np.zeros((slots, heads, length, width), dtype)
            for name, (heads, width) in widths.items()
        }
