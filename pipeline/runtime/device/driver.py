"""CUDA's driver API by ctypes: one GPU, its memory, a stream with copies, and captured graphs.

`libcuda.so.1` comes with the driver and has one name under CUDA 12 and 13, unlike the runtime
library. TensorRT works in the primary context of the GPU, which is made current here. Nothing else
of CUDA is called in this package.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np

from pipeline.errors import InputError, PipelineError, ResourceError

_LIBRARY = "libcuda.so.1"
_ALIGNMENT = 256  # of every address that TensorRT is given
_OUT_OF_MEMORY = 2
_THREAD_LOCAL_CAPTURE = 1
_NON_BLOCKING = 1
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # attributes of a device
_NAME_BYTES = 128
_INTO = ctypes.POINTER
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_INTO(c_int),),
    "cuDeviceGet": (_INTO(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (_INTO(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_INTO(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuGetErrorString": (c_int, _INTO(c_char_p)),
    "cuMemGetInfo_v2": (_INTO(c_size_t), _INTO(c_size_t)),
    "cuMemAlloc_v2": (_INTO(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_INTO(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_INTO(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _INTO(c_void_p)),
    "cuGraphInstantiateWithFlags": (_INTO(c_void_p), c_void_p, c_uint64),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
}


def aligned(size_bytes: int) -> int:
    """The next multiple of the alignment that TensorRT asks of addresses."""
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


class Driver:
    """The driver, and one GPU of it.

    Args:
        library: path or name of the driver's library.
        ordinal: number of the GPU.

    Attributes:
        name: of the GPU.
        capability: (major, minor).
        integrated: whether the GPU shares the memory of the CPU, as on a Jetson.
        cuda: newest CUDA that the driver knows, such as (12, 6).

    Raises:
        InputError: there is no driver or no such GPU, or this process may not use it.
    """

    def __init__(self, library: str = _LIBRARY, ordinal: int = 0) -> None:
        self._functions = _load(library)
        self._start("cuInit", 0)
        device, version, context = c_int(), c_int(), c_void_p()
        self._start("cuDeviceGet", device, ordinal)
        self._start("cuDriverGetVersion", version)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", name, _NAME_BYTES, device)
        self.name = name.value.decode(errors="replace")
        self.cuda = (version.value // 1000, version.value % 1000 // 10)
        self.capability = (self._attribute(_MAJOR, device), self._attribute(_MINOR, device))
        self.integrated = bool(self._attribute(_INTEGRATED, device))
        self._start("cuDevicePrimaryCtxRetain", context, device)
        self._context = context
        self.make_current()

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver; numbers to be filled in are ctypes objects.

        Raises:
            ResourceError: the GPU has no memory left.
            PipelineError: any other failure, in the driver's words.
        """
        status = self._functions[function](*arguments)
        if status == _OUT_OF_MEMORY:
            raise ResourceError(
                "The GPU has no memory left.",
                where=function,
                change="close other programs, or use a smaller model or a shorter --max-length; "
                "on a Jetson the CPU's memory is the same",
            )
        if status:
            raise PipelineError("CUDA fails.", where=function, observed=self._words(status))

    def make_current(self) -> None:
        """Let the calling thread work on the GPU; every thread has to."""
        self.call("cuCtxSetCurrent", self._context)

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the GPU."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", free, total)
        return free.value, total.value

    def _start(self, function: str, *arguments: Any) -> None:
        """A call by which it is seen whether there is a GPU to work with."""
        try:
            self.call(function, *arguments)
        except PipelineError as error:
            if isinstance(error, ResourceError):
                raise
            raise InputError(
                "The GPU of this machine cannot be used.",
                where=function,
                observed=error.details.get("observed"),
                change="see that the driver is loaded and that this user may use it (on a Jetson: "
                "the group 'video'; in a container: --runtime nvidia)",
            ) from error

    def _attribute(self, number: int, device: c_int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", value, number, device)
        return value.value

    def _words(self, status: int) -> str:
        text = c_char_p()
        self._functions["cuGetErrorString"](status, text)
        return f"{(text.value or b'unknown error').decode(errors='replace')} ({status})"


def _load(library: str) -> dict[str, Any]:
    """The functions of the driver's library, with their types.

    Raises:
        InputError: there is no such library, or it lacks one of them.
    """
    try:
        loaded = ctypes.CDLL(library)
        functions = {name: getattr(loaded, name) for name in _SIGNATURES}
    except (OSError, AttributeError) as error:
        raise InputError(
            "There is no usable NVIDIA driver on this machine.",
            where=library,
            observed=error,
            expected="a driver of CUDA 12 or newer",
            change="run it where the GPU is (in a container: --runtime nvidia), or run the ONNX "
            "folder with ONNX Runtime",
        ) from error
    for name, types in _SIGNATURES.items():
        functions[name].argtypes, functions[name].restype = types, c_int
    return functions


def _release_with(owner: object, driver: Driver, function: str, held: Any) -> None:
    """Have the driver take back what an object holds when the object goes; the exit frees all."""
    weakref.finalize(owner, driver.call, function, held).atexit = False


class DeviceMemory:
    """Memory of the GPU, given back when nothing refers to it any more.

    Attributes:
        address: of its first byte, a multiple of 256.
        size_bytes: how much it is.
    """

    def __init__(self, driver: Driver, size_bytes: int) -> None:
        address = c_uint64()
        driver.call("cuMemAlloc_v2", address, max(size_bytes, 1))
        self.address, self.size_bytes = address.value, size_bytes
        _release_with(self, driver, "cuMemFree_v2", address.value)


class HostMemory:
    """Memory of the CPU that the GPU copies from and to by itself.

    Attributes:
        address: of its first byte.
        content: uint8 [size], the memory itself.
    """

    def __init__(self, driver: Driver, size_bytes: int) -> None:
        address = c_void_p()
        driver.call("cuMemHostAlloc", address, max(size_bytes, 1), 0)
        assert address.value is not None
        self.address = address.value
        self.content = np.ctypeslib.as_array((c_ubyte * size_bytes).from_address(self.address))
        _release_with(self, driver, "cuMemFreeHost", self.address)


class Graph:
    """Work that was recorded from a stream, and is launched as one."""

    def __init__(self, driver: Driver, recorded: c_void_p) -> None:
        launchable = c_void_p()
        self._driver = driver
        try:
            driver.call("cuGraphInstantiateWithFlags", launchable, recorded, 0)
        finally:
            driver.call("cuGraphDestroy", recorded)
        self._launchable = launchable
        _release_with(self, driver, "cuGraphExecDestroy", launchable)

    def launch(self, stream: Stream) -> None:
        """Let the stream do the work, behind what it has to do already."""
        self._driver.call("cuGraphLaunch", self._launchable, stream.handle)


class Stream:
    """Work for the GPU in the order that it is given in; nothing has happened before `wait`.

    Attributes:
        handle: as TensorRT takes it.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        stream = c_void_p()
        driver.call("cuStreamCreate", stream, _NON_BLOCKING)
        assert stream.value is not None
        self.handle = stream.value
        _release_with(self, driver, "cuStreamDestroy_v2", self.handle)

    def copy_in(self, target: int, source: int, size_bytes: int) -> None:
        """From the CPU's memory, which is not to be changed before `wait`, to the GPU's."""
        self._driver.call("cuMemcpyHtoDAsync_v2", target, source, size_bytes, self.handle)

    def copy_out(self, target: int, source: int, size_bytes: int) -> None:
        """From the GPU's memory to the CPU's, which is not to be read before `wait`."""
        self._driver.call("cuMemcpyDtoHAsync_v2", target, source, size_bytes, self.handle)

    def copy_within(self, target: int, source: int, size_bytes: int) -> None:
        """From one place of the GPU's memory to another; the two do not overlap."""
        self._driver.call("cuMemcpyDtoDAsync_v2", target, source, size_bytes, self.handle)

    def clear(self, target: int, size_bytes: int) -> None:
        """Zeros into the GPU's memory."""
        self._driver.call("cuMemsetD8Async", target, 0, size_bytes, self.handle)

    def wait(self) -> None:
        """Until all that was given to the stream is done."""
        self._driver.call("cuStreamSynchronize", self.handle)

    def begin_capture(self) -> None:
        """Record, from here on, what is given to the stream, instead of doing it."""
        self._driver.call("cuStreamBeginCapture_v2", self.handle, _THREAD_LOCAL_CAPTURE)

    def end_capture(self) -> Graph:
        """What was recorded.

        Raises:
            PipelineError: something was called meanwhile that cannot be recorded.
        """
        recorded = c_void_p()
        self._driver.call("cuStreamEndCapture", self.handle, recorded)
        return Graph(self._driver, recorded)
