"""An execution context that is told only what has changed since it was last told."""

from __future__ import annotations

from pipeline.errors import InputError, PipelineError
from pipeline.runtime.device.engine import OpenEngine


class BoundContext:
    """One profile of an engine, with the shapes and addresses of its next call.

    Args:
        opened: the engine.
        profile: index of the profile; it is never changed, which would forget all addresses.
    """

    def __init__(self, opened: OpenEngine, profile: int) -> None:
        self._context = opened.make_context(profile)
        self._opened, self._shapes = opened, dict[str, tuple[int, ...]]()
        self._addresses: dict[str, int] = {}

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise InputError for a shape that the profile does not admit."""
        if self._shapes.get(name) == shape:
            return
        if not self._context.set_input_shape(name, shape):
            raise InputError(f"The engine refuses the shape of '{name}'.", observed=shape)
        self._shapes[name] = shape

    def set_address(self, name: str, address: int) -> None:
        """Raise InputError for a tensor that the engine does not have."""
        if self._addresses.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            raise InputError(f"The engine refuses the address of '{name}'.")
        self._addresses[name] = address

    def enqueue(self) -> None:
        """Give the call to the stream; raise PipelineError when TensorRT cannot."""
        if not self._context.execute_async_v3(self._opened.stream.handle):
            raise PipelineError("TensorRT could not run the engine; it said why above.")
