"""Videos by PyAV: frames in, frames out."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.errors import InputError, MissingPackageError
from pipeline.model.loading import explaining

_RATE = Fraction(25)  # of a video that does not say


def _require_av() -> ModuleType:
    """The library.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingPackageError("av", "video", "read and write videos") from error
    return av  # type: ignore[no-any-return]


def frames_of(path: Path) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Frames, uint8 [H, W, 3] each, and how many there are in a second.

    Raises:
        InputError: no video, none without end, or one whose frames change their size.
        MissingPackageError: PyAV is not installed.
    """
    av = _require_av()
    with explaining("The video cannot be read.", path), av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError("The file holds no video.", where=path)
        stream = container.streams.video[0]
        rate = Fraction(stream.average_rate or _RATE)
        size = None
        for frame in container.decode(stream):
            pixels = frame.to_ndarray(format="rgb24")
            if size not in (None, pixels.shape):
                raise InputError(
                    "The frames of the video change their size.",
                    where=path,
                    observed=f"{pixels.shape[1]} x {pixels.shape[0]}",
                )
            size = pixels.shape
            yield pixels, rate
        if size is None:
            raise InputError("The video has no frame.", where=path)


class VideoWriter:
    """An MP4 file, as frames come; a side of odd length loses its last pixel, as codecs ask.

    Args:
        path: to write.
        rate: frames in a second.
        size: height and width.

    Raises:
        MissingPackageError: PyAV is not installed.
    """

    def __init__(self, path: Path, rate: Fraction, size: tuple[int, int]) -> None:
        self._av: Any = _require_av()
        self._size = (max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2))
        self._container = self._av.open(str(path), "w")
        self._stream = self._container.add_stream("mpeg4", rate=rate.limit_denominator(1001))
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt, self._stream.bit_rate = "yuv420p", 8_000_000

    def add(self, pixels: np.ndarray) -> None:
        """Append a frame, uint8 [H, W, 3]."""
        height, width = self._size
        own = np.ascontiguousarray(pixels[:height, :width])
        frame = self._av.VideoFrame.from_ndarray(own, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is still held, and the end of the file."""
        self._container.mux(self._stream.encode())
        self._container.close()
