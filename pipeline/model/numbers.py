"""Whether stored numbers are numbers, and stay what they are in another type."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.errors import InputError

# bfloat16 rounds by up to this much, and models are published in it.
_LARGEST_ERROR = 2.0**-8
_AT_ONCE = 1 << 20


def require_finite(name: str, tensor: torch.Tensor, where: object = None) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Args:
        name: of the tensor.
        tensor: of any shape and type.
        where: the file or folder it is from.

    Raises:
        InputError: it does; names tensor and row.
    """
    # One pass: NaN and infinity survive a sum, which overflows only near them. By parts, since
    # torch widens all that it sums.
    if not tensor.is_floating_point() or all(
        torch.isfinite(part.sum(dtype=torch.float64)) for part in _by_rows(tensor)
    ):
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise InputError(
            "A weight is not finite.",
            where=where,
            observed=f"{_first(name, tensor, ~finite)} of {name}",
            expected="finite numbers",
            change="download the weights again, or repair that row",
        )


def _by_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A tensor in parts of some rows, of which none is copied."""
    if tensor.ndim == 0 or tensor.numel() <= _AT_ONCE:
        return (tensor,)
    return tensor.split(max(1, _AT_ONCE * len(tensor) // tensor.numel()))


def require_finite_model(model: nn.Module, where: object) -> None:
    """Refuse a model any of whose stored tensors holds NaN or infinity.

    Raises:
        InputError: as `require_finite`.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta" and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            require_finite(name, tensor, where)


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype, where: object = None) -> torch.Tensor:
    """A tensor in another type, if its values stay finite and near there; integers as they are.

    Args:
        name: of the tensor.
        tensor: of any shape and type.
        dtype: a floating type.
        where: the file or folder it is from.

    Raises:
        InputError: a value is not finite, beyond the type's range, or too small for it.
    """
    if not tensor.is_floating_point():
        return tensor
    require_finite(name, tensor, where)
    result = tensor.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max or not tensor.numel():
        return result
    lost = None
    if not torch.isfinite(result.sum(dtype=torch.float64)) and not torch.isfinite(result).all():
        lost = _first(name, tensor, ~torch.isfinite(result))
    elif (error := _relative_error(tensor, result)) > _LARGEST_ERROR:
        lost = f"values as small as {_largest(tensor):.2g}, changed by {error:.0%}"
    if lost is None:
        return result
    kind = str(dtype).removeprefix("torch.")
    raise InputError(
        f"A weight does not fit {kind}.",
        where=where,
        observed=f"{lost} of {name}",
        expected=f"values between {torch.finfo(dtype).tiny:.2g} and {torch.finfo(dtype).max:.6g}",
        change="pass --dtype float32 (compress takes --dtype bfloat16, too)",
    )


def require_fitting(model: nn.Module, dtype: torch.dtype, where: object) -> None:
    """Refuse to store a model in a type that its parameters do not fit.

    Raises:
        InputError: as `cast`.
    """
    for name, parameter in model.named_parameters():
        if torch.finfo(dtype).max < torch.finfo(parameter.dtype).max:
            cast(name, parameter.detach(), dtype, where)


def _relative_error(tensor: torch.Tensor, result: torch.Tensor) -> float:
    """|x - y| / |x|, of whole tensors, some rows at a time; 0 where x is 0."""
    scale = _largest(tensor)
    if not scale:
        return 0.0
    whole = difference = 0.0
    flat = zip(tensor.flatten().split(_AT_ONCE), result.flatten().split(_AT_ONCE), strict=True)
    for before, after in flat:
        whole += float((before.float() / scale).norm()) ** 2
        difference += float(((before.float() - after.float()) / scale).norm()) ** 2
    return math.sqrt(difference / whole)


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude."""
    low, high = tensor.aminmax()
    return max(-float(low), float(high))


def _first(name: str, tensor: torch.Tensor, found: torch.Tensor) -> str:
    """The first value that a mask marks, with its row."""
    place = tuple(int(i) for i in found.nonzero()[0])
    rows = int(found.reshape(len(found), -1).any(dim=-1).sum()) if found.ndim else 1
    row = place[0] if place else 0
    return f"{float(tensor[place]):g} in row {row} ({rows} rows in all)"
