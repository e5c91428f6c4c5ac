"""Any Session as a Polygraphy runner."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER

from pipeline.export.contract import INPUT_IDS, LOGITS, PIXEL_VALUES
from pipeline.runtime.sessions.image_sessions import ImageSession
from pipeline.runtime.sessions.session import Session


class SessionRunner(BaseRunner):
    """Runs each batch of tokens on an empty cache.

    Polygraphy's own PytRunner and TrtRunner bind a backend's tensors; this one binds the interface
    that all our backends share, so that the same tokens go in and `logits` come out everywhere.

    Args:
        name: of the stage.
        open_session: loads the session; called on activation.
    """

    def __init__(self, name: str, open_session: Callable[[], Session]) -> None:
        super().__init__(name=name)
        self._open_session = open_session

    def activate_impl(self) -> None:
        """Load the session."""
        self.session = self._open_session()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """`input_ids`: int64 [B, S], both free."""
        return TensorMetadata().add(INPUT_IDS, dtype=np.int64, shape=(None, None))

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """`logits`, float32 [B, S, V], of `input_ids`, int64 [B, S]."""
        self.session.reset()
        start = time.perf_counter()
        logits = self.session.forward(feed_dict[INPUT_IDS])
        self.inference_time = time.perf_counter() - start
        return OrderedDict({LOGITS: logits})

    def deactivate_impl(self) -> None:
        """Let go of the session."""
        del self.session


class ImageRunner(BaseRunner):
    """Runs each batch of images.

    Args:
        name: of the stage.
        session: an image classifier.
    """

    def __init__(self, name: str, session: ImageSession) -> None:
        super().__init__(name=name)
        self._session = session

    def activate_impl(self) -> None:
        """Nothing: the session is open."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """`pixel_values`: float32 [B, C, H, W], all free."""
        return TensorMetadata().add(PIXEL_VALUES, dtype=np.float32, shape=(None,) * 4)

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """`logits`, float32 [B, classes]."""
        start = time.perf_counter()
        logits = self._session.classify(feed_dict[PIXEL_VALUES])
        self.inference_time = time.perf_counter() - start
        return OrderedDict({LOGITS: logits})

    def deactivate_impl(self) -> None:
        """Nothing: the session belongs to the caller."""


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy's messages off stdout, which belongs to the result; errors still raise."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield
