"""Given W and H, which weights go and what do the rest become? SparseGPT, arXiv 2301.00774.

W  [d_out, d_in]  weights of one layer
H  [d_in, d_in]   mean of x xᵀ over the calibration tokens; the scale does not matter
U  [d_in, d_in]   upper Cholesky factor of the damped inverse, H⁻¹ = Uᵀ U
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsegpt_lite import masks
from sparsegpt_lite.errors import SolverError
from sparsegpt_lite.sparsity import NofM, Sparsity


@dataclass(frozen=True)
class Solution:
    """A pruned layer: `W` fp32 [d_out, d_in] with +0.0 where `mask` (bool, True = pruned) says so.

    `damping` is the fraction of the mean diagonal that was added to H, or None where H was not inverted.
    """

    W: Tensor
    mask: Tensor
    damping: float | None = None


def reconstruction_error(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """Mean squared error of the layer's output per token: tr((W - Ŵ) H (W - Ŵ)ᵀ), eq. 1 with H = mean x xᵀ."""
    D = W - W_hat
    return float(((D @ H) * D).sum())


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Factor the inverse of the damped Hessian, H⁻¹ = Uᵀ U with U upper triangular (section 3.3).

    Row j of U, over its diagonal element, is what all later columns owe to column j when it is changed. An input
    that was always zero gets the mean diagonal of the others, so that it is alone; the official code gives it a one,
    which would make the damping depend on the scale of H.

    Args:
        H: [d_in, d_in], symmetric, fp32 or fp64.
        damping: Fraction of the mean diagonal, that of inputs which were not always zero, to add. Where H is not
            positive definite then, ten times and at last a hundred times as much (of 0.01 at least) is tried.

    Returns:
        U and the damping that was used.

    Raises:
        SolverError: Not positive definite at the largest damping either.
    """
    live = H.diagonal() != 0
    scale = H.diagonal()[live].mean() if bool(live.any()) else H.new_ones(())
    diagonal = torch.where(live, H.diagonal(), scale)
    for used in (damping, 10 * max(damping, 0.01), 100 * max(damping, 0.01)):
        factor = H.clone()
        factor.diagonal().copy_(diagonal + used * scale)
        factor, failed = torch.linalg.cholesky_ex(factor)
        if int(failed):
            continue
        factor = torch.cholesky_inverse(factor)
        factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
        if not int(failed):
            return factor, used
    raise SolverError(
        f"the Hessian of {H.shape[0]} inputs is not positive definite (column {int(failed) - 1}) even with a damping "
        f"of {used:g}: give more calibration text, or a larger --damping"
    )


def sparsegpt(W: Tensor, H: Tensor, sparsity: Sparsity, damping: float, block_size: int) -> Solution:
    """Prune one layer column by column and repair the columns to the right (algorithm 1).

    Masks are chosen for `block_size` columns at a time by w² / U_jj² (eq. 5), or for one N:M group when its first
    column is reached. Unlike the official code, an unstructured matrix has exactly `sparsity.zeros` zeros: each
    block of columns prunes up to what is due so far. Weights that are zero already count, and those of inputs that
    were always zero go next, all of them as far as the exact number allows; N:M zeroes them besides.

    Args:
        W: fp32 [d_out, d_in]; not changed.
        H: fp32 [d_in, d_in]; not changed.
        sparsity: Pattern.
        damping: Fraction of the mean diagonal of H to add to it.
        block_size: Columns per block, lowered to a multiple of M so that no group straddles two blocks.

    Raises:
        SolverError: H cannot be inverted.
    """
    d_out, d_in = W.shape
    U, used = inverse_factor(H, damping)
    dead = H.diagonal() == 0  # [d_in]
    step = max(sparsity.m, block_size // sparsity.m * sparsity.m) if isinstance(sparsity, NofM) else block_size
    W = W.T.clone(memory_format=torch.contiguous_format)  # [d_in, d_out], so that a column is a row in memory
    if isinstance(sparsity, NofM):
        W[dead] = 0
    mask = torch.zeros_like(W, dtype=torch.bool)  # [d_in, d_out]
    pruned = 0
    for start in range(0, d_in, step):
        end = min(start + step, d_in)
        if not isinstance(sparsity, NofM):
            even, left = (sparsity.zeros(d_out, column) - pruned for column in (end, d_in))
            due = _due(even, left, W[start:], dead[start:], end - start)
            mask[start:end] = _choose(W[start:end], U.diagonal()[start:end], dead[start:end], due)
            pruned += due
        errors = _sweep(W[start:end], U[start:end, start:end], mask[start:end], sparsity)  # [b, d_out]
        W[end:] -= U[start:end, end:].T @ errors
    mask = mask.T.contiguous()
    return Solution(torch.where(mask, 0.0, W.T), mask, used)


def _due(even: int, left: int, W: Tensor, dead: Tensor, b: int) -> int:
    """Weights to prune in the next b columns, so that in the end there are `left` more and no zero goes uncounted.

    Args:
        even: What an even spread over the columns asks for.
        left: What is left to prune in the matrix.
        W: The columns that are left, one a row: [columns, d_out].
        dead: bool [columns], those whose input was always zero.
        b: Columns in the block.
    """
    zero = W == 0
    free = zero | dead[:, None]
    zeros, more_zeros, costless, more_costless = (int(t.sum()) for t in (zero[:b], zero[b:], free[:b], free[b:]))
    most = max(left - more_costless, min(costless, left - more_zeros), min(zeros, left))
    return min(max(even, costless), most, b * W.shape[1])


def _choose(W: Tensor, diagonal: Tensor, dead: Tensor, k: int) -> Tensor:
    """Mark the k cheapest weights of one block of columns: zeros, then those of dead inputs. [b, d_out] -> bool."""
    scores = W.square() / diagonal.square()[:, None]
    scores[dead] = -1.0
    scores.masked_fill_(W == 0, -2.0)
    return masks.smallest(scores.reshape(1, -1), k).view_as(scores)


def _sweep(W: Tensor, U: Tensor, mask: Tensor, sparsity: Sparsity) -> Tensor:
    """Prune the columns of one block in turn, each repaired by those after it (algorithm 1, inner loop).

    Args:
        W: [b, d_out], one column of the layer per row; changed in place.
        U: [b, b].
        mask: bool [b, d_out]; filled in place for N:M, group by group.
        sparsity: Pattern.

    Returns:
        Errors (w - ŵ) / U_jj that the columns after this block must make up for: [b, d_out].
    """
    errors = torch.empty_like(W)
    for j in range(len(W)):
        if isinstance(sparsity, NofM) and j % sparsity.m == 0:
            group = slice(j, j + sparsity.m)
            scores = W[group].square() / U.diagonal()[group, None].square()
            mask[group] = masks.smallest_in_groups(scores.T, sparsity.n, sparsity.m).T
        errors[j] = torch.where(mask[j], W[j], 0.0) / U[j, j]
        W[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return errors
