"""Masks against loops in plain Python: exact counts, ties, groups, quotas."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsegpt_lite import masks
from sparsegpt_lite.sparsity import NofM, Unstructured

checked = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def tied_scores(draw: st.DrawFn, group: int = 1) -> Tensor:
    """[rows, cols] of few different values, cols a multiple of `group`."""
    rows, cols = draw(st.integers(1, 4)), group * draw(st.integers(1, 5))
    value = st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")])
    row = st.lists(value, min_size=cols, max_size=cols)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))


def lowest(scores: list[float], k: int) -> list[bool]:
    """Mark the k lowest; of equal ones the first."""
    chosen = sorted(range(len(scores)), key=lambda column: (scores[column], column))[:k]
    return [column in chosen for column in range(len(scores))]


@checked
@given(scores=tied_scores(), data=st.data())
def test_smallest_is_exact_under_ties(scores: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, scores.shape[1]))
    assert masks.smallest(scores, k).tolist() == [lowest(row, k) for row in scores.tolist()]


@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_smallest_takes_the_lower_columns_of_equal_scores(k: int) -> None:
    assert masks.smallest(torch.ones(2, 7), k).tolist() == [[True] * k + [False] * (7 - k)] * 2


def test_smallest_leaves_its_input_alone() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    masks.smallest(scores, 2)
    assert scores.tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)])
@checked
@given(data=st.data())
def test_groups_equal_a_loop(n: int, m: int, data: st.DataObject) -> None:
    scores = data.draw(tied_scores(group=m))
    expected = [
        [mark for start in range(0, len(row), m) for mark in lowest(row[start : start + m], m - n)]
        for row in scores.tolist()
    ]
    assert masks.smallest_in_groups(scores, n, m).tolist() == expected


@pytest.mark.parametrize("m", [255, 256, 300])
def test_groups_may_be_wider_than_a_byte(m: int) -> None:
    scores = torch.arange(2.0 * m, 0, -1).reshape(1, -1)  # falling: the last m - 1 of each group go
    assert masks.smallest_in_groups(scores, 1, m).tolist() == [([False] + [True] * (m - 1)) * 2]


@checked
@given(scores=tied_scores(), level=st.floats(0, 1, exclude_max=True))
def test_a_matrix_loses_its_lowest_weights(scores: Tensor, level: float) -> None:
    mask = masks.per_matrix(scores, Unstructured(level))
    assert mask.flatten().tolist() == lowest(scores.flatten().tolist(), round(level * scores.numel()))


@checked
@given(scores=tied_scores(), level=st.floats(0, 1, exclude_max=True))
def test_rows_lose_their_lowest_weights_evenly(scores: Tensor, level: float) -> None:
    scores = scores - scores.min()  # below zero are only weights that are zero already
    mask = masks.per_row(scores, Unstructured(level))
    counts = mask.sum(1).tolist()
    assert sum(counts) == round(level * scores.numel())
    assert max(counts) - min(counts) <= 1
    assert mask.tolist() == [lowest(row, k) for row, k in zip(scores.tolist(), counts, strict=True)]


def test_a_row_of_zeros_takes_from_the_others() -> None:
    W = torch.arange(1.0, 25.0).view(4, 6)
    W[1] = 0
    mask = masks.per_row(masks.zeros_first(W, W), Unstructured(0.5))
    assert mask.sum(1).tolist() == [2, 6, 2, 2]


@pytest.mark.parametrize(
    ("shape", "level", "quota"), [((3, 5), 0.5, [2, 3, 3]), ((5, 3), 0.2, [0, 1, 0, 1, 1]), ((1, 7), 0.5, [4])]
)
def test_row_quotas_of_odd_sizes(shape: tuple[int, int], level: float, quota: list[int]) -> None:
    assert masks.per_row(torch.rand(shape), Unstructured(level)).sum(1).tolist() == quota


@pytest.mark.parametrize("choose", [masks.per_matrix, masks.per_row])
def test_groups_do_not_depend_on_the_scope(choose: Callable[..., Tensor]) -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert choose(scores, NofM(2, 4)).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_existing_zeros_come_first() -> None:
    W = torch.tensor([[0.0, -0.0, 2.0]])
    assert masks.zeros_first(torch.tensor([[9.0, 0.0, 0.0]]), W).tolist() == [[-1.0, -1.0, 0.0]]


@pytest.mark.parametrize(
    ("row", "sparsity", "obeyed"),
    [
        ([1, 0, 0, 1], NofM(2, 4), True),
        ([1, 0, -0.0, 0], NofM(2, 4), True),
        ([1, 0, 1, 1], NofM(2, 4), False),
        ([0, 0, 0, 0, 1, 1, 1, 1], NofM(2, 4), False),  # half of it zero, and yet the second group is not 2:4
        ([0, 0, 0, 0, 1, 1, 1, 1], NofM(4, 8), True),
        ([0, 0, 0, 0, 0, 0], NofM(2, 4), False),  # no multiple of 4
        ([1, 0, 0, 1], Unstructured(0.5), True),
        ([1, 0, 1, 1], Unstructured(0.5), False),
        ([0, 0, 0, 1], Unstructured(0.5), True),
        ([1, 1, 1, 1], Unstructured(0), True),
    ],
)
def test_obeys(row: list[float], sparsity: NofM | Unstructured, obeyed: bool) -> None:
    assert masks.obeys(torch.tensor([row], dtype=torch.float32), sparsity) is obeyed
