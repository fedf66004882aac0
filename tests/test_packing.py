"""The packed 2:4 form: exact both ways, every pattern of a group, and the bits written down by hand."""

import itertools

import pytest
import torch

from sparsegpt_lite.errors import ConfigError
from sparsegpt_lite.kernels.packing import pack_2of4, unpack_2of4
from sparsegpt_lite.masks import smallest_in_groups


def random_2of4(d_out: int, d_in: int, dtype: torch.dtype) -> torch.Tensor:
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    return W.masked_fill(smallest_in_groups(W.abs(), 2, 4), 0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (7, 1008)])
def test_round_trip(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = random_2of4(*shape, dtype)
    values, meta = pack_2of4(W)
    assert values.shape == (shape[0], shape[1] // 2)
    assert meta.shape == (shape[0], shape[1] // 16)
    assert torch.equal(unpack_2of4(values, meta), W)


def test_every_pattern_of_a_group() -> None:
    patterns = [p for p in itertools.product([0, 1], repeat=4) if sum(p) <= 2]
    rows = [[4 * i + j + 1 if bit else 0 for i in range(4) for j, bit in enumerate(p)] for p in patterns]
    W = torch.tensor(rows, dtype=torch.float32)
    assert torch.equal(unpack_2of4(*pack_2of4(W)), W)


def test_bits_by_hand() -> None:
    W = torch.zeros(1, 16)
    W[0, [0, 3, 5, 6, 10, 12]] = torch.arange(1.0, 7.0)  # groups: (0, 3), (1, 2), (2), (0)
    values, meta = pack_2of4(W)
    assert values.tolist() == [[1, 2, 3, 4, 0, 5, 6, 0]]
    words = [0 | 3 << 2, 1 | 2 << 2, 0 | 2 << 2, 0 | 1 << 2]
    assert int(meta[0, 0]) & 0xFFFF == sum(word << 4 * i for i, word in enumerate(words))


def test_columns_of_a_group_ascend() -> None:
    _, meta = pack_2of4(random_2of4(64, 256, torch.float32))
    nibbles = meta.to(torch.int64)[..., None] >> torch.tensor([0, 4, 8, 12]) & 15
    assert bool(((nibbles & 3) < (nibbles >> 2)).all())


def test_negative_zeros_become_positive() -> None:
    W = torch.full((2, 16), -0.0)
    values, meta = pack_2of4(W)
    assert not values.signbit().any()
    assert not unpack_2of4(values, meta).signbit().any()


def test_size() -> None:
    W = random_2of4(64, 256, torch.bfloat16)
    assert sum(t.nbytes for t in pack_2of4(W)) == 0.5625 * W.nbytes


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="row 1 has more than two weights in columns 4 to 7"):
        pack_2of4(torch.eye(16)[[0, 5]] + torch.eye(16)[[0, 6]] + torch.eye(16)[[0, 7]])
    with pytest.raises(ConfigError, match="multiple of 16 inputs, found 24"):
        pack_2of4(torch.zeros(2, 24))
