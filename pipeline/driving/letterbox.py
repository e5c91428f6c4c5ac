"""An image laid into the network's input without distortion, and everything laid back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

PAD = 114  # the grey that borders are filled with


@dataclass(frozen=True)
class Letterbox:
    """Where an image lies in a larger one. Borders are whole pixels, so that back is exact.

    Attributes:
        source: height and width of the image.
        target: height and width that it is laid into.
        size: height and width that it has there.
        offset: rows above and columns left of it.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    size: tuple[int, int]
    offset: tuple[int, int]

    @classmethod
    def of(cls, source: tuple[int, int], target: tuple[int, int]) -> Letterbox:
        """The largest of the image's shape that fits, in the middle."""
        scale = min(target[0] / source[0], target[1] / source[1])
        h, w = (max(1, min(t, round(s * scale))) for s, t in zip(source, target, strict=True))
        return cls(source, target, (h, w), ((target[0] - h) // 2, (target[1] - w) // 2))

    @property
    def _inside(self) -> tuple[slice, slice]:
        (top, left), (h, w) = self.offset, self.size
        return slice(top, top + h), slice(left, left + w)

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [target, 3] of uint8 [source, 3]."""
        laid = np.full((*self.target, 3), PAD, np.uint8)
        h, w = self.size
        small = Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)
        laid[self._inside] = np.asarray(small)
        return laid

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Bool [target] of bool [source]: pixels of which at least half is covered.

        Nearest neighbours would break thin lines, and any coverage would widen them.
        """
        laid = np.zeros(self.target, bool)
        h, w = self.size
        cover = Image.fromarray(mask.astype(np.uint8) * 255)
        laid[self._inside] = np.asarray(cover.resize((w, h), Image.Resampling.BOX)) >= 128
        return laid

    def mask_back(self, mask: np.ndarray) -> np.ndarray:
        """Bool [source] of bool [target], by the nearest pixel."""
        inside = mask[self._inside]
        rows, columns = (
            (np.arange(s) * 2 + 1) * n // (2 * s)
            for s, n in zip(self.source, self.size, strict=True)
        )
        return inside[rows[:, None], columns[None, :]]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """float32 [N, 4] in pixels of the target, of those in pixels of the source."""
        scale, shift = self._scale_and_shift()
        return (boxes * scale + shift).astype(np.float32)

    def boxes_back(self, boxes: np.ndarray) -> np.ndarray:
        """The inverse of `boxes`, cut off at the image's edges."""
        scale, shift = self._scale_and_shift()
        h, w = self.source
        back = (boxes.astype(np.float64) - shift) / scale
        return np.clip(back, 0, [w, h, w, h]).astype(np.float32)

    def _scale_and_shift(self) -> tuple[np.ndarray, np.ndarray]:
        y, x = (n / s for n, s in zip(self.size, self.source, strict=True))
        top, left = self.offset
        return np.array([x, y, x, y]), np.array([left, top, left, top], np.float64)
