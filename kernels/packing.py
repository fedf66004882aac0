"""Packed 2:4 weights in plain torch: the form on disk, and the truth that kernels are tested against.

W       [d_out, d_in]       at most two of every four consecutive inputs are not zero
values  [d_out, d_in / 2]   the two kept weights of each group, in the order of their columns, dtype of W
meta    [d_out, d_in / 16]  int16, four groups a word, the first in the lowest bits; a group has four bits: the column
                            of its first value within the group (0 to 2), then of its second (1 to 3), two bits each

The columns of a group ascend, as `mma.sp::ordered_metadata` wants them. A 16-bit W takes 0.5625 of its dense bytes.
"""

import torch
from torch import Tensor

from sparsegpt_lite.errors import ConfigError


def pack_2of4(W: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 matrix, exactly but for the sign of its zeros.

    Args:
        W: [d_out, d_in] of any dtype, d_in a multiple of 16.

    Returns:
        values [d_out, d_in / 2] and meta int16 [d_out, d_in / 16]. Groups with fewer than two weights are filled up
        with zeros, of the lowest free columns.

    Raises:
        ConfigError: W is not 2:4, or d_in no multiple of 16.
    """
    d_out, d_in = W.shape
    if d_in % 16:
        raise ConfigError(f"2:4 packing needs a multiple of 16 inputs, found {d_in}")
    groups = W.view(d_out, d_in // 4, 4)
    kept = groups != 0
    if int(kept.sum(2).max()) > 2:
        row, group = (kept.sum(2) > 2).nonzero()[0].tolist()
        raise ConfigError(f"not 2:4: row {row} has more than two weights in columns {4 * group} to {4 * group + 3}")
    columns = torch.arange(4, device=W.device)
    first_kept = torch.where(kept, columns, columns + 4).sort(2).values[..., :2] % 4  # kept columns before free ones
    chosen = first_kept.sort(2).values  # [d_out, d_in / 4, 2]
    values = groups.gather(2, chosen)
    values = torch.where(values == 0, 0, values).view(d_out, d_in // 2)  # no -0.0
    nibbles = (chosen[..., 0] | chosen[..., 1] << 2).view(d_out, d_in // 16, 4)
    words = (nibbles << torch.tensor([0, 4, 8, 12], device=W.device)).sum(2)
    return values, torch.where(words < 2**15, words, words - 2**16).to(torch.int16)


def unpack_2of4(values: Tensor, meta: Tensor) -> Tensor:
    """Undo `pack_2of4`.

    Args:
        values: [d_out, d_in / 2].
        meta: int16 [d_out, d_in / 16].

    Returns:
        W [d_out, d_in] with +0.0 where nothing was kept.
    """
    d_out = values.shape[0]
    nibbles = meta.to(torch.int64)[..., None] >> torch.tensor([0, 4, 8, 12], device=meta.device) & 15
    columns = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).view(d_out, -1, 2)  # [d_out, d_in / 4, 2]
    groups = torch.zeros(*columns.shape[:2], 4, dtype=values.dtype, device=values.device)
    return groups.scatter_(2, columns, values.view(columns.shape)).view(d_out, -1)
