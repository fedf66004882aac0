"""Which weights go? Masks are bool tensors in which True means pruned."""

import torch
from torch import Tensor

from sparsegpt_lite.sparsity import NofM, Sparsity, Unstructured


def smallest(scores: Tensor, k: int) -> Tensor:
    """Mark the k smallest scores of every row, exactly k, ties broken by the lower column.

    Args:
        scores: [rows, cols], no NaN.
        k: How many, from 0 to cols.

    Returns:
        bool [rows, cols].
    """
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(k, dim=1, keepdim=True).values  # [rows, 1]
    below = scores < threshold
    ties = scores == threshold
    wanted = k - below.sum(1, keepdim=True)
    return below | (ties & (ties.cumsum(1, dtype=torch.int32) <= wanted))


def smallest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Mark the m - n smallest of every m consecutive scores of a row, ties broken by the lower column.

    Args:
        scores: [rows, cols], cols a multiple of m.
        n: Kept per group.
        m: Group size.

    Returns:
        bool [rows, cols] with exactly m - n marks per group.
    """
    groups = scores.unflatten(1, (-1, m))  # [rows, cols / m, m]
    rank = torch.zeros_like(groups, dtype=torch.uint8 if m < 256 else torch.int32)
    for j in range(m):
        rank += groups[..., j : j + 1] < groups
        rank[..., j + 1 :] += groups[..., j : j + 1] == groups[..., j + 1 :]
    return (rank < m - n).flatten(1)


def per_matrix(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Mask of a whole matrix: exactly `sparsity.zeros` marks, or N:M groups. [d_out, d_in] -> bool."""
    if isinstance(sparsity, NofM):
        return smallest_in_groups(scores, sparsity.n, sparsity.m)
    return smallest(scores.reshape(1, -1), sparsity.zeros(*scores.shape)).view_as(scores)


def per_row(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Mask that compares weights within an output row only. [d_out, d_in] -> bool.

    Rows differ by at most one mark, spread evenly, so that the matrix has exactly `sparsity.zeros` of them. A row that
    has more zeros already (scores below 0) keeps them, and the others are given less.
    """
    if isinstance(sparsity, NofM):
        return smallest_in_groups(scores, sparsity.n, sparsity.m)
    quota = _quotas((scores < 0).sum(1), sparsity.zeros(*scores.shape))
    mask = torch.empty_like(scores, dtype=torch.bool)
    for k in quota.unique().tolist():
        mask[quota == k] = smallest(scores[quota == k], k)
    return mask


def _quotas(zeros: Tensor, total: int) -> Tensor:
    """Share `total` marks out among rows, evenly but for rows that have more zeros already: int64 [rows] -> [rows]."""
    quota = zeros.clone()
    rows = torch.ones_like(zeros, dtype=torch.bool)  # those that are not full of zeros
    while bool(rows.any()):
        n, share = int(rows.sum()), max(total - int(zeros[~rows].sum()), 0)
        quota[rows] = (torch.arange(n + 1, device=zeros.device) * share // n).diff()
        full = rows & (zeros > quota)
        if not bool(full.any()):
            break
        quota[full] = zeros[full]
        rows &= ~full
    return quota


def zeros_first(scores: Tensor, W: Tensor) -> Tensor:
    """Let weights that are zero already count: their score becomes -1, below every other. [d_out, d_in]."""
    return scores.masked_fill(W == 0, -1.0)


def obeys(W: Tensor, sparsity: Sparsity) -> bool:
    """Say whether a [d_out, d_in] matrix has at least the zeros of a pattern."""
    zero = W == 0
    if isinstance(sparsity, Unstructured):
        return int(zero.sum()) >= sparsity.zeros(*W.shape)
    if sparsity.misfit(W.shape[1]):
        return False
    return bool((zero.unflatten(1, (-1, sparsity.m)).sum(2) >= sparsity.m - sparsity.n).all())
