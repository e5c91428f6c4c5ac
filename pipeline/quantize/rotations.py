"""Orthogonal matrices drawn by a seed, and matrices multiplied by them in place.

A weight matrix whose inputs or outputs are turned has numbers of nearly equal size, none of them an
outlier, which a few bits hold better (QuIP: Chee et al. 2023; QuaRot: Ashkboos et al. 2024). Of all
orthogonal matrices those of Hadamard spread best: every entry has the same size.
"""

from __future__ import annotations

import torch

_ROWS_AT_ONCE = 4096


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix, float64 [size, size]: Haar distributed, the same for a seed.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"no rotation has size {size}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(drawn)
    return orthogonal * upper.diagonal().sign()


def flat_rotation(size: int, seed: int) -> torch.Tensor:
    """A randomised Hadamard matrix H D / sqrt(n), float64 [size, size], D of random signs.

    Where no Hadamard matrix of that size is built here, one of `random_rotation`.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1 or not (hadamard := _hadamard(size)).numel():
        return random_rotation(size, seed)
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (size,), generator=generator) - 1
    return hadamard * signs / size**0.5


def _hadamard(size: int) -> torch.Tensor:
    """H with entries of +-1 and H H^T = n, float64 [n, n]; empty where none is built.

    Sylvester's doubling of 1, of 2, or of Paley's first construction, I + S of order q + 1 for a
    prime q = 3 mod 4: 576 = 8 * 72, 896 = 4 * 224, 960 = 2 * 480.
    """
    small, doublings = size, 0
    while small > 1 and not _is_paley(small):
        if small % 2:
            return torch.empty(0, dtype=torch.float64)
        small, doublings = small // 2, doublings + 1
    matrix = _paley(small) if small > 1 else torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        matrix = torch.kron(pair, matrix)
    return matrix


def _is_paley(order: int) -> bool:
    """Whether order - 1 is a prime that leaves 3 when divided by 4."""
    prime = order - 1
    odd = range(3, int(prime**0.5) + 1, 2)
    return prime % 4 == 3 and all(prime % divisor for divisor in odd)


def _paley(order: int) -> torch.Tensor:
    """I + S, S skew: S[i, j] tells whether i - j is a square modulo q; bordered by ones."""
    prime = order - 1
    character = -torch.ones(prime, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1
    character[0] = 0
    place = torch.arange(prime)
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[1:, 1:] = character[(place[:, None] - place[None]) % prime]
    skew[0, 1:], skew[1:, 0] = 1, -1
    return skew + torch.eye(order, dtype=torch.float64)


def multiply_rows_(matrix: torch.Tensor, right: torch.Tensor) -> None:
    """Replace M by M R in place, some rows at a time, summed in float64.

    Args:
        matrix: M, float [m, n]; may be a view, such as the transpose of what is to be changed.
        right: R, float64 [n, n].
    """
    for rows in matrix.split(_ROWS_AT_ONCE):
        rows.copy_(rows.double() @ right)
