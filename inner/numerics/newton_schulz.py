"""Polar factors and inverse square roots by matrix products alone.

What comes out is a polynomial in the matrix, so it has every derivative, at zero and at rank
deficient matrices too, where those of a singular value decomposition do not exist. Nothing is
computed in less than float32: the bfloat16 of the usual implementations leaves noise in the values
that slopes multiply. All functions take batches of matrices.

Higham 2008, Functions of Matrices, chapters 6 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .elementwise import at_least_float32, root

# a, b, c of the step x -> (a + b x x' + c (x x')^2) x.
Quintic = tuple[float, float, float]

# Jordan et al. 2024, kellerjordan.github.io/posts/muon, for every step: steep at zero, and it never
# converges. Five take singular values in [0.01, 1] to [0.68, 1.14].
JORDAN: tuple[Quintic, ...] = ((3.4445, -4.7750, 2.0315),)
# A row for each step, from the public records of modded-nanogpt. Five take [0.01, 1] to
# [0.978, 1.032].
QUINTIC: tuple[Quintic, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Amsel et al. 2025, arXiv:2505.16932: at each step the best for what those before leave of
# [1e-3, 1]; with their margin of 1% for rounding, and the Pade step of order 5 in the end.
_MINIMAX: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS: tuple[Quintic, ...] = (
    *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _MINIMAX),
    (1.875, -1.25, 0.375),
)


def first(rows: Sequence[Quintic], steps: int) -> tuple[Quintic, ...]:
    """So many of the rows; past the last of them it is repeated."""
    return (*rows[:steps], *[rows[-1]] * (steps - len(rows)))


def polar(
    x: Tensor,
    rows: Sequence[Quintic],
    start: Literal["frobenius", "aol"] = "frobenius",
    eps: float | Tensor = 1e-7,
) -> Tensor:
    """About U V' of x = U S V': every singular value s becomes what the rows make of it.

    Args:
        x: matrices in the last two dimensions.
        rows: the coefficients of each step, a s + b s^3 + c s^5.
        start: how singular values are brought into [0, 1] before. "frobenius": x / (|x| + eps),
            which leaves all but a few small. "aol", almost orthogonal layers, Prach & Lampert 2022,
            arXiv:2208.03160: each row of the wide matrix over the root of its row's sum in abs(x
            x'), but not of less than 1e-7, so that rows below 3e-4 stay small; it changes singular
            vectors a little.
        eps: added to the norm.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.to(at_least_float32(x.dtype))
    y = y.mT if tall else y
    if start == "frobenius":
        y = y / (root((y * y).sum((-2, -1), keepdim=True)) + eps)
        gram = y @ y.mT
    else:
        gram = y @ y.mT
        scale = gram.abs().sum(-1, keepdim=True).clamp(min=1e-7).rsqrt()
        y, gram = scale * y, scale * gram * scale.mT
    for i, (a, b, c) in enumerate(rows):
        gram = y @ y.mT if i else gram
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


def inverse_root(x: Tensor, steps: int = 10) -> Tensor:
    """x^(-1/2) of symmetric positive semidefinite matrices, in x's dtype or float32.

    By the coupled iteration with the rows of Polar Express, on x / (1.01 |x + 1e-10|). Ten times
    the rounding of the dtype is added to the eigenvalues of that, because the iteration explodes at
    those that rounding made negative. In ten steps eigenvalues of 1e-8 |x| are right to 1%, larger
    ones better, in float32 those of 1e-4 |x|; from smaller ones, 0 too, comes at most 22,400, in
    float32 920, over |x|^(1/2). There slopes in float32 are right to some 1e-3 only.
    """
    x = x.to(at_least_float32(x.dtype))
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    near = x + 1e-10 * one
    norm = 1.01 * (near * near).sum((-2, -1), keepdim=True).sqrt()
    y, z = x / norm + 10 * torch.finfo(x.dtype).eps * one, one
    for a, b, c in first(POLAR_EXPRESS, steps):
        zy = z @ y
        change = b * zy + c * zy @ zy
        y, z = a * y + y @ change, a * z + change @ z
    return z / norm.sqrt()


__all__ = ["JORDAN", "POLAR_EXPRESS", "QUINTIC", "Quintic", "first", "inverse_root", "polar"]
