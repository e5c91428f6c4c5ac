"""A checkpoint's model without its matrices, and where in the files they lie, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_cache import cache_maps
from pipeline.checkpoint.skeleton import QuantizedMatrix, Skeleton, StoredMatrix
from pipeline.errors import InputError
from pipeline.model.numbers import require_finite
from pipeline.model.structure import layer_list
from pipeline.model.weight_files import read_header, stored_places
from pipeline.runtime.offload.steady_attention import STEADY_ATTENTION
from pipeline.runtime.offload.weight_reader import Layout, WeightReader, aligned_buffer, lay_out

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FREQUENCIES_BY_LENGTH = ("dynamic", "longrope")


class StoredModel:
    """A causal language model whose matrices are read when they are asked for.

    Args:
        folder: a checkpoint whose matrices are plain numbers.

    Attributes:
        folder: the checkpoint.
        model: in float32, without gradients; what stands for a matrix has strides of 0.
        layers: matrices of each layer, by their names.
        tables: those of no layer, such as embedding and head.
        layouts: how each layer is read.
        reader: of the files.

    Raises:
        InputError: the checkpoint is broken, or of a kind that cannot be offloaded.
    """

    def __init__(self, folder: Path) -> None:
        skeleton = Skeleton.load(folder, torch.float32)
        self.folder, self.model = folder, _prepared(skeleton, folder)
        path, modules = layer_list(self.model)
        self.layers, self.tables = _sorted_matrices(skeleton, path, len(modules))
        self._files = sorted({matrix.file for matrix in skeleton.matrices.values()})
        self._types = {file: read_header(file) for file in self._files}
        self._offsets = {file: stored_places(file) for file in self._files}
        self.layouts = [self._layout(own) for own in self.layers]
        self._table_layout = self._layout(self.tables)
        self.reader = WeightReader(self._files)

    @property
    def table_bytes(self) -> int:
        """Of embedding, head and what else belongs to no layer, as published."""
        return self._table_layout.size

    @property
    def vector_bytes(self) -> int:
        """Of all that is no matrix."""
        held = self.model.state_dict().values()
        return sum(p.numel() * p.element_size() for p in held if 0 not in p.stride())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds what is published of all layers."""
        found = {self._dtype(matrix) for own in self.layers for matrix in own.values()}
        return reduce(torch.promote_types, found)

    def read_layer(self, number: int, buffer: np.ndarray | None = None) -> np.ndarray:
        """Read a layer into a buffer that is large enough, or into one of its own."""
        layout = self.layouts[number]
        found = aligned_buffer(layout.size) if buffer is None else buffer
        self.reader.read(layout, found)
        return found

    def tensors(self, number: int, buffer: np.ndarray) -> dict[str, torch.Tensor]:
        """Matrices of a layer as published, where they lie in a buffer that was read."""
        return self._tensors(self.layers[number], self.layouts[number], buffer)

    def read_tables(self) -> dict[str, torch.Tensor]:
        """Embedding, head and what else belongs to no layer, as published.

        Raises:
            InputError: they cannot be read, or hold what is no number.
        """
        buffer = aligned_buffer(self._table_layout.size)
        self.reader.read(self._table_layout, buffer)
        found = self._tensors(self.tables, self._table_layout, buffer)
        for name, tensor in found.items():
            require_finite(name, tensor, self.tables[name].file)
        return found

    def _tensors(
        self, matrices: Mapping[str, StoredMatrix], layout: Layout, buffer: np.ndarray
    ) -> dict[str, torch.Tensor]:
        return {
            name: torch.frombuffer(
                buffer,
                dtype=self._dtype(matrix),
                count=math.prod(matrix.shape),
                offset=layout.places[name],
            ).view(matrix.shape)
            for name, matrix in matrices.items()
        }

    def _dtype(self, matrix: StoredMatrix) -> torch.dtype:
        return _DTYPES[self._types[matrix.file][matrix.name][0]]

    def _layout(self, matrices: Mapping[str, StoredMatrix]) -> Layout:
        return lay_out(
            {
                name: (self._files.index(m.file), *self._offsets[m.file][m.name])
                for name, m in matrices.items()
            }
        )


def set_matrix(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Let a parameter be this memory."""
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._parameters[last] = nn.Parameter(tensor, requires_grad=False)


def _prepared(skeleton: Skeleton, folder: Path) -> PreTrainedModel:
    """The model with steady attention; raise InputError for what cannot be offloaded."""
    model = skeleton.model
    few = [name for name, m in skeleton.matrices.items() if isinstance(m, QuantizedMatrix)]
    odd = "attention of the class's own" if not model._can_set_attn_implementation() else ""
    odd = "a cache of latents" if cache_maps(model) else odd
    odd = f"{few[0]} in few bits" if few else odd
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in _FREQUENCIES_BY_LENGTH:
        odd = f"rotary frequencies that change with the length ({rope['rope_type']})"
    if odd:
        raise InputError(
            "A model of this kind cannot be offloaded.",
            where=folder,
            observed=odd,
            expected="a decoder with matrices of plain numbers",
            change="leave --memory and --vram out, or give the model that it was made from",
        )
    model.set_attn_implementation(STEADY_ATTENTION)
    return model


def _sorted_matrices(
    skeleton: Skeleton, path: str, count: int
) -> tuple[list[dict[str, StoredMatrix]], dict[str, StoredMatrix]]:
    """The matrices of each layer, and those of none."""
    layers: list[dict[str, StoredMatrix]] = [{} for _ in range(count)]
    rest: dict[str, StoredMatrix] = {}
    for name, matrix in sorted(skeleton.matrices.items()):
        inside = name.removeprefix(f"{path}.")
        if inside != name:
            layers[int(inside.partition(".")[0])][name] = matrix
        else:
            rest[name] = matrix
    return layers, rest
