"""Linear layers that call the operators: one call for all factored layers that share a latent.

Matrices of a format that the kernels read stay codes, in the order of the kernels; the others are
written out as numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint.modeling_cache import hook_cache_maps
from pipeline.checkpoint.modeling_quantized import QuantizedEmbedding, QuantizedLinear
from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.kernels.op import block_skip_linear
from pipeline.kernels.quantized_op import block_skip_linear_quantized, columns_of
from pipeline.progress import note
from pipeline.quantize.formats import Format, held_by_kernels
from pipeline.quantize.groupwise import Blocks
from pipeline.quantize.kernel_codes import kernel_bits, kernel_block, kernel_codes, kernel_rests

_Matrices = Sequence[nn.Linear | QuantizedLinear]


def _kernel_format(layers: _Matrices) -> Format | None:
    """The one format of some matrices, if the kernels read it; None where they must be numbers."""
    names = [m.matrix.format_name if isinstance(m, QuantizedLinear) else None for m in layers]
    if names[0] is None or len({*names}) > 1:
        return None
    format_ = Format.parse(names[0])
    return format_ if held_by_kernels(format_) else None


class _Numbers(nn.Module):
    """y = block_skip_linear(x), of factors that are numbers.

    Args:
        owner: of the latent.
        ups: B of each member, one below the other.
        dtype: of the numbers.
    """

    a: torch.Tensor
    b: torch.Tensor
    index: torch.Tensor

    def __init__(self, owner: FactoredLinear, ups: _Matrices, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("a", _turned([owner.down], dtype))
        self.register_buffer("b", _turned(ups, dtype))
        self.register_buffer("index", owner.permutation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] to [..., m]."""
        return block_skip_linear(x, self.a, self.b, self.index)


@torch.no_grad()
def _turned(layers: _Matrices, dtype: torch.dtype) -> torch.Tensor:
    """W^T of a stack, [n, m] as the kernels read it."""
    return torch.cat([layer.weight for layer in layers]).T.to(dtype).contiguous()


class _Stored(nn.Module):
    """One matrix W^T of a product, numbers or codes.

    Args:
        layers: stacked.
        dtype: of numbers, scales and rests.

    Attributes:
        stored: numbers, or codes as the operator takes them.
        scale: of the blocks of codes, [groups, m].
        rests: what each number of a block has beyond its code times its scale, likewise; None
            where codes are counted from the middle.
        bits: of codes, 4 or 8; 0 of numbers.
        block: rows that share a scale; 0 of numbers.
    """

    stored: torch.Tensor
    scale: torch.Tensor | None
    rests: torch.Tensor | None

    def __init__(self, layers: _Matrices, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.block = 0, 0
        made: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
        format_ = _kernel_format(layers)
        if format_ is None:
            made = (_turned(layers, dtype), None, None)
        else:
            self.bits = kernel_bits(format_.bits)
            self.block = kernel_block(format_, layers[0].in_features)
            made = _turned_codes(layers, format_, dtype)
        for name, tensor in zip(("stored", "scale", "rests"), made, strict=True):
            self.register_buffer(name, tensor)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """X W^T, [..., n] to [..., m]."""
        if self.scale is None:
            return x @ self.stored
        bits, blocks = [0, self.bits], [0, self.block]
        y = block_skip_linear_quantized(x, None, None, self.stored, self.scale, None, bits, blocks)
        if self.rests is None:
            return y
        # A block's rest is the same for all its inputs: it meets their sum.
        whole = nn.functional.pad(x, (0, len(self.rests) * self.block - x.shape[-1]))
        return y + whole.unflatten(-1, (-1, self.block)).sum(-1) @ self.rests


class _Codes(nn.Module):
    """y = block_skip_linear_quantized(x), of factors of which one at least is codes.

    With zero points or offsets the two products are two calls, for z is needed between them.

    Args:
        owner: of the latent; None for a dense layer.
        ups: B of each member, or the one dense matrix.
        dtype: of scales and numbers.
    """

    index: torch.Tensor | None

    def __init__(self, owner: FactoredLinear | None, ups: _Matrices, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = None if owner is None else _Stored([owner.down], dtype)
        self.up = _Stored(ups, dtype)
        self.register_buffer("index", None if owner is None else owner.permutation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] to [..., m]."""
        down, up = self.down, self.up
        if down is None:
            return up.times(x)
        if down.rests is None and up.rests is None:
            bits, blocks = [down.bits, up.bits], [down.block, up.block]
            return block_skip_linear_quantized(
                x, down.stored, down.scale, up.stored, up.scale, self.index, bits, blocks
            )
        ordered = x if self.index is None else x.index_select(-1, self.index)
        rank = len(up.stored)
        return up.times(ordered[..., :rank] + down.times(ordered[..., rank:]))


def _turned_codes(
    layers: _Matrices, format_: Format, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of W^T of a stack, their scales and their rests, as the kernels read them."""
    stored = [layer.matrix for layer in layers if isinstance(layer, QuantizedLinear)]
    joined = {
        name: torch.cat([getattr(matrix, name) for matrix in stored]).cpu()
        for name in stored[0].state_dict()
    }
    blocks = Blocks.from_stored(joined, format_, layers[0].in_features)
    device = stored[0].codes.device
    made = (kernel_codes(blocks), blocks.scales.T, kernel_rests(blocks))
    codes, scales, rests = (
        None if m is None else torch.from_numpy(np.ascontiguousarray(m)).to(device) for m in made
    )
    assert codes is not None
    assert scales is not None
    return codes, scales.to(dtype), None if rests is None else rests.to(dtype)


class _Group(nn.Module):
    """Linear layers of one latent: y = product(x), split among its members.

    Members are called one after the other with the same tensor; the first call computes for all.

    Args:
        product: of all of them, stacked.
        widths: of each of them.
    """

    def __init__(self, product: _Numbers | _Codes, widths: list[int]) -> None:
        super().__init__()
        self.product, self.widths = product, widths
        self._given: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """What member `place` answers, [..., n] to [..., m of that member]."""
        if self._given is not x or place not in self._parts:
            y = self.product(x)
            self._parts = dict(enumerate(y.split(self.widths, dim=-1)))
            self._given = x
        part = self._parts.pop(place)
        if not self._parts:
            self._given = None
        return part


class _Member(nn.Module):
    """One layer of a group, in place of the layer it was."""

    def __init__(self, group: _Group, place: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        # The first member registers the group with the model; the others only refer to it.
        self.group = group if place == 0 else None
        self._group = [group]
        self.place = place
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, [..., n] to [..., m]."""
        y = self._group[0].part(self.place, x)
        return y if self.bias is None else y + self.bias


class _SharedTable(nn.Module):
    """An embedding whose rows are columns of the head's codes, which are held once.

    Args:
        head: the product of the head.
    """

    def __init__(self, head: _Codes) -> None:
        super().__init__()
        self._head = [head]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, int64 [...] to [..., columns]."""
        table = self._head[0].up
        assert table.scale is not None
        rows = columns_of(
            table.stored, table.scale, table.bits, table.block, ids.flatten(), table.rests
        )
        return rows.view(*ids.shape, -1)


def use_operator_(model: nn.Module) -> int:
    """Let every factored layer in skip form, and every linear of codes, call the operators.

    Matrices are stored transposed, as the kernels read them, and the old ones are let go. Of
    formats that the kernels do not read it is said that they are numbers now.

    Args:
        model: changed in place; only for inference.

    Returns:
        How many layers were replaced.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    replaced = _replace_factored(model, dtype) + _replace_dense(model, dtype)
    hook_cache_maps(model)
    return replaced


def _replace_factored(model: nn.Module, dtype: torch.dtype) -> int:
    """The layers that share a latent, group by group."""
    groups: dict[FactoredLinear, list[tuple[str, FactoredLinear]]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear) and module.form == "skip":
            groups[module.owner].append((name, module))
    widened: Counter[str] = Counter()
    for owner, members in groups.items():
        ups = [layer.up for _, layer in members]
        for part in ([owner.down], ups):
            widened.update(_unread(part))
        coded = any(_kernel_format(part) for part in ([owner.down], ups))
        product = (_Codes if coded else _Numbers)(owner, ups, dtype)
        group = _Group(product, [layer.out_features for _, layer in members])
        for place, (name, layer) in enumerate(members):
            model.set_submodule(name, _Member(group, place, layer.up.bias))
    _say_widened(widened)
    return sum(map(len, groups.values()))


def _replace_dense(model: nn.Module, dtype: torch.dtype) -> int:
    """Linear layers of codes, and the embedding that shares them with the head."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    tables = {m: n for n, m in model.named_modules() if isinstance(m, QuantizedEmbedding)}
    taken = [(name, layer) for name, layer in layers if _kernel_format([layer])]
    for name, layer in taken:
        product = _Codes(None, [layer], dtype)
        group = _Group(product, [layer.out_features])
        model.set_submodule(name, _Member(group, 0, layer.bias))
        for table in layer.table_reference:
            model.set_submodule(tables[table], _SharedTable(product))
    _say_widened(Counter(name for _, layer in layers for name in _unread([layer])))
    return len(taken)


def _unread(layers: _Matrices) -> list[str]:
    """Formats of matrices that the kernels do not read."""
    coded = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    return [] if _kernel_format(layers) else [layer.matrix.format_name for layer in coded]


def _say_widened(formats: Counter[str]) -> None:
    if formats:
        named = ", ".join(f"{count} of {name}" for name, count in formats.items())
        note(
            f"quantised matrices that the kernels do not read are held as numbers: {named}; "
            "they read those of 2 to 8 bits, in blocks that are multiples of 16"
        )
