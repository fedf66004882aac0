"""Pruning methods: functions of one signature, `(W, H, sparsity, damping, block_size) -> Solution`, in one dict.

To add one, write the function and its entry; the property tests run over the dict.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsegpt_lite import masks
from sparsegpt_lite.errors import ConfigError, SolverError
from sparsegpt_lite.hessian import finite
from sparsegpt_lite.solver import Solution, sparsegpt
from sparsegpt_lite.sparsity import Sparsity, parse

Method = Callable[[Tensor, Tensor, Sparsity, float, int], Solution]


def magnitude(W: Tensor, H: Tensor, sparsity: Sparsity, damping: float, block_size: int) -> Solution:
    """Remove the smallest |w| of the matrix; the rest stay as they are."""
    mask = masks.per_matrix(masks.zeros_first(W.abs(), W), sparsity)
    return Solution(torch.where(mask, 0.0, W), mask)


def wanda(W: Tensor, H: Tensor, sparsity: Sparsity, damping: float, block_size: int) -> Solution:
    """Remove the smallest |w| · ‖x‖ of every output row (Wanda, arXiv 2306.11695, eq. 1)."""
    mask = masks.per_row(masks.zeros_first(W.abs() * H.diagonal().sqrt(), W), sparsity)
    return Solution(torch.where(mask, 0.0, W), mask)


METHODS: dict[str, Method] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}


def prune_layer(
    W: Tensor,
    H: Tensor,
    sparsity: Sparsity | str | float,
    method: str = "sparsegpt",
    damping: float = 0.01,
    block_size: int = 128,
) -> Solution:
    """Prune one linear layer, y = W x: the paper as a function.

    Args:
        W: Weights [d_out, d_in] of any floating dtype; not changed.
        H: Second moments of the inputs, mean of x xᵀ over tokens, [d_in, d_in] fp32; not changed.
        sparsity: `0.5`, `"2:4"`, or a parsed pattern.
        method: A name in `METHODS`.
        damping: Fraction of the mean diagonal of H that is added to it before it is inverted.
        block_size: Columns whose mask is chosen together.

    Returns:
        The new weights in fp32, zeros included, the mask, and the damping that was used.

    Raises:
        ConfigError: Unknown method, a pattern that d_in cannot have, or an impossible block size or damping.
        SolverError: W or H is not finite, shapes do not fit, or H cannot be inverted.

    Example:
        >>> X = torch.randn(1000, 64)
        >>> solution = prune_layer(torch.randn(32, 64), X.T @ X / 1000, "2:4")
    """
    sparsity = parse(sparsity)
    if block_size < 1 or damping < 0:
        raise ConfigError(f"block size {block_size} and damping {damping:g}: must be at least 1 and at least 0")
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if H.shape != (W.shape[1], W.shape[1]):
        raise SolverError(f"weights {list(W.shape)} need moments {[W.shape[1]] * 2}, found {list(H.shape)}")
    if misfit := sparsity.misfit(W.shape[1]):
        raise ConfigError(f"pattern {sparsity} does not fit: {misfit}")
    for what, tensor in (("weights", W), ("moments of the inputs", H)):
        if not finite(tensor):
            raise SolverError(f"the {what} hold NaN or infinity")
    solution = METHODS[method](W.float(), H.float(), sparsity, damping, block_size)
    if not finite(solution.W):
        raise SolverError(f"the solved weights hold NaN or infinity (damping {solution.damping}): raise --damping")
    return solution
