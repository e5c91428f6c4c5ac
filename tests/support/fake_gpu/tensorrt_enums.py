"""What the fake TensorRT names by enumerations, as the real one does."""

from __future__ import annotations

import enum

import numpy as np


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class PreviewFeature(enum.Enum):
    ALIASED_PLUGIN_IO_10_03 = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class NetworkDefinitionCreationFlag(enum.Enum):
    STRONGLY_TYPED = 1

    def __int__(self) -> int:
        return self.value


NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
}  # fmt: skip
TYPES = {
    np.float32: DataType.FLOAT, np.float16: DataType.HALF, np.int64: DataType.INT64,
    np.int8: DataType.INT8,
}  # fmt: skip
