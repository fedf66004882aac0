"""The solver against a slow float64 reference, and the properties that every method has."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsegpt_lite.errors import ConfigError, SolverError
from sparsegpt_lite.methods import METHODS, prune_layer
from sparsegpt_lite.solver import Solution, inverse_factor, reconstruction_error, sparsegpt
from sparsegpt_lite.sparsity import NofM, Sparsity, Unstructured, parse

DAMPING = 0.01
checked = settings(max_examples=40, deadline=None, derandomize=True, database=None)
every_method = pytest.mark.parametrize("method", METHODS)

# ---- problems


def layer(d_out: int, d_in: int, seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Weights [d_out, d_in] and moments [d_in, d_in] of correlated inputs, fp32; inputs in `dead` are always zero."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator)
    mix = torch.eye(d_in) + 0.5 * torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    X = torch.randn(4 * d_in, d_in, generator=generator) @ mix  # [tokens, d_in]
    X[:, list(dead)] = 0
    H = X.T @ X / len(X)
    return W, (H + H.T) / 2


def damped(H: Tensor, damping: float = DAMPING) -> Tensor:
    """Add a fraction of the mean diagonal, as the official code does; dead inputs get the mean of the others first.

    The official code gives them a one, which in its scale of H, 2 / nsamples times the sum over all tokens, is small.
    """
    H = H.double()
    mean = H.diagonal()[H.diagonal() != 0].mean()
    return H + torch.diag((H.diagonal() == 0) * mean + damping * mean)


def tolerance(W: Tensor, H: Tensor, dtype: torch.dtype, damping: float = DAMPING) -> float:
    """Bound the rounding of solved weights: n unknowns by Cholesky err by n * eps * cond, relative to their norm."""
    relative = len(H) * torch.finfo(dtype).eps * torch.linalg.cond(damped(H, damping))
    return float(relative * W.double().norm(dim=1).max())


# ---- the reference: SparseGPT as in the paper, one column after another, no Cholesky factor


class Block(NamedTuple):
    """What a rule sees when the first column of a block is reached."""

    scores: Tensor  # [d_out, b]
    end: int  # the column after the block
    pruned: int  # weights pruned before it


Rule = Callable[[Block], Tensor]  # -> bool [d_out, b], True = pruned


def eliminate(inverse: Tensor, j: int) -> None:
    """Take input j out of an inverse Hessian, by Gaussian elimination (eq. 4); the columns up to j stay as they are."""
    inverse[j + 1 :, j + 1 :] -= torch.outer(inverse[j + 1 :, j], inverse[j, j + 1 :]) / inverse[j, j]


def pivots(inverse: Tensor) -> Tensor:
    """Give the value that [H^-1]_cc has once all inputs before c are eliminated, for all c.

    The official code scores by w^2 / U_cc^2, U being the upper Cholesky factor, H^-1 = U^T U. The squared diagonal
    of a Cholesky factor is what Gaussian elimination finds on the diagonal when it gets there, so this is U_cc^2.
    It depends on H alone, and so the elimination can run ahead of the sweep that needs it.
    """
    ahead = inverse.clone()
    for j in range(len(ahead)):
        eliminate(ahead, j)
    return ahead.diagonal()


def reference(W: Tensor, H: Tensor, width: int, rule: Rule, damping: float = DAMPING) -> Solution:
    """SparseGPT in float64 (arXiv 2301.00774, eq. 3 to 5); the mask of `width` columns is chosen at their first."""
    W, inverse = W.double().clone(), torch.linalg.inv(damped(H, damping))
    W[:, H.diagonal() == 0] = 0
    mask, cost = torch.zeros_like(W, dtype=torch.bool), pivots(inverse)
    for j in range(W.shape[1]):
        if j % width == 0:
            block = slice(j, j + width)
            scores = W[:, block].square() / cost[block]
            mask[:, block] = rule(Block(scores, j + scores.shape[1], int(mask.sum())))
        gone = torch.where(mask[:, j], W[:, j], 0.0)  # w - q
        W[:, j] -= gone
        W[:, j + 1 :] -= torch.outer(gone, inverse[j, j + 1 :]) / inverse[j, j]
        eliminate(inverse, j)
    return Solution(W, mask)


def groups(sparsity: NofM) -> Rule:
    """Prune the m - n lowest of each row; of equal ones the first."""

    def rule(block: Block) -> Tensor:
        lowest = block.scores.argsort(dim=1, stable=True)[:, : sparsity.m - sparsity.n]
        return torch.zeros_like(block.scores, dtype=torch.bool).scatter(1, lowest, True)

    return rule


def exactly(sparsity: Unstructured) -> Rule:
    """Prune what is due up to the end of the block, lowest first: this package's rule (where few inputs are dead)."""

    def rule(block: Block) -> Tensor:
        due = sparsity.zeros(len(block.scores), block.end) - block.pruned
        lowest = block.scores.T.flatten().argsort(stable=True)[:due]
        mask = torch.zeros(block.scores.numel(), dtype=torch.bool).index_fill(0, lowest, True)
        return mask.view_as(block.scores.T).T

    return rule


def official(level: float) -> Rule:
    """Prune as sparsegpt.py of IST-DASLab does: all up to a threshold, itself included, in each block alone."""

    def rule(block: Block) -> Tensor:
        threshold = block.scores.flatten().sort().values[int(block.scores.numel() * level)]
        return block.scores <= threshold

    return rule


def expected(W: Tensor, H: Tensor, sparsity: Sparsity, block_size: int = 128) -> Solution:
    if isinstance(sparsity, NofM):
        return reference(W, H, sparsity.m, groups(sparsity))
    return reference(W, H, block_size, exactly(sparsity))


def assert_equal_solutions(found: Solution, wanted: Solution, atol: float) -> None:
    assert torch.equal(found.mask, wanted.mask)
    assert float((found.W.double() - wanted.W).abs().max()) <= atol


def test_the_pivots_are_the_squared_cholesky_diagonal() -> None:
    """The comment in `pivots`, checked; and that the solver's own factor is the one that is meant."""
    H = layer(1, 24)[1].double()
    inverse = torch.linalg.inv(damped(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    slack = 24 * torch.finfo(H.dtype).eps * torch.linalg.cond(inverse)
    assert torch.allclose(pivots(inverse), U.diagonal().square(), rtol=float(slack), atol=0)
    assert torch.allclose(inverse_factor(H, DAMPING)[0], U, rtol=0, atol=float(slack * U.abs().max()))


# ---- parity. Where two scores are closer than rounding moves them, a mask can flip, and all that follows from it. With
# these seeds the closest pair that decides a mask differs by 7e-5 of its size (measured), which is 30 times what fp32
# moves it (1e-6 to 2e-6 measured, cond * eps = 4e-6), so masks must be equal.

SHAPES = [(1, 8), (5, 16), (16, 64), (33, 40), (8, 136)]
PATTERNS = ["2:4", "4:8", "1:4", "0.5", "0.3", "0.75"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_sparsegpt_equals_the_reference_in_float64(shape: tuple[int, int], pattern: str, seed: int) -> None:
    W, H = (tensor.double() for tensor in layer(*shape, seed))
    found = sparsegpt(W, H, parse(pattern), DAMPING, 128)
    assert_equal_solutions(found, expected(W, H, parse(pattern)), tolerance(W, H, W.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_prune_layer_equals_the_reference_in_fp32(shape: tuple[int, int], pattern: str) -> None:
    W, H = layer(*shape, seed=2)
    assert_equal_solutions(prune_layer(W, H, pattern), expected(W, H, parse(pattern)), tolerance(W, H, W.dtype))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
@pytest.mark.parametrize("block_size", [1, 2, 4, 10, 24, 37, 64])
def test_any_block_size_equals_the_reference(pattern: str, block_size: int) -> None:
    """Sizes that are no multiple of M, do not divide d_in = 40, or exceed it."""
    W, H = (tensor.double() for tensor in layer(7, 40, seed=3))
    found = sparsegpt(W, H, parse(pattern), DAMPING, block_size)
    assert_equal_solutions(found, expected(W, H, parse(pattern), block_size), tolerance(W, H, W.dtype))


def test_dead_inputs_do_not_make_the_damping_depend_on_the_scale() -> None:
    W, H = layer(6, 32, seed=4, dead=(0, 1, 2, 9, 31))
    small, large = (prune_layer(W, scale * H, "0.5") for scale in (2.0**-20, 2.0**20))
    assert torch.equal(small.mask, large.mask)
    assert torch.allclose(small.W, large.W, rtol=0, atol=tolerance(W, H, torch.float32))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
def test_dead_inputs_equal_the_reference(pattern: str) -> None:
    W, H = (tensor.double() for tensor in layer(6, 32, seed=4, dead=(0, 1, 2, 9, 31)))
    found = sparsegpt(W, H, parse(pattern), DAMPING, 16)
    assert_equal_solutions(found, expected(W, H, parse(pattern), 16), tolerance(W, H, W.dtype))


@pytest.mark.parametrize("damping", [0.0, 0.1, 1.0])
def test_any_damping_equals_the_reference(damping: float) -> None:
    W, H = (tensor.double() for tensor in layer(6, 32, seed=5))
    found = prune_layer(W, H.float(), "2:4", damping=damping)
    assert found.damping == damping
    wanted = reference(W, H, 4, groups(NofM(2, 4)), damping)
    assert_equal_solutions(found, wanted, tolerance(W, H, torch.float32, damping))


@pytest.mark.parametrize("level", [0.5, 0.25, 0.75])
def test_only_the_exact_count_differs_from_the_official_threshold(level: float) -> None:
    """At the same scores, the official threshold takes one weight more in each block of 128 columns."""
    W, H = (tensor.double() for tensor in layer(8, 256, seed=6))
    theirs = reference(W, H, 128, official(level)).mask
    ours = sparsegpt(W, H, Unstructured(level), DAMPING, 128).mask
    assert not (ours & ~theirs)[:, :128].any()  # a subset
    assert int((theirs & ~ours)[:, :128].sum()) == 1
    assert int(ours.sum()) == round(level * 8 * 256) == int(theirs.sum()) - 2


# ---- properties of all methods


class Problem(NamedTuple):
    """A layer to prune, drawn by hypothesis."""

    sparsity: Sparsity
    d_out: int
    d_in: int
    seed: int
    block_size: int
    tied: bool  # |w| is 1, 2 or 3

    @property
    def layer(self) -> tuple[Tensor, Tensor]:
        W, H = layer(self.d_out, self.d_in, self.seed)
        return (W.sign() * W.abs().ceil().clamp(1, 3) if self.tied else W), H

    def solve(self, method: str) -> Solution:
        return prune_layer(*self.layer, self.sparsity, method, block_size=self.block_size)


levels = st.floats(0, 1, exclude_max=True).map(Unstructured)
n_of_m = st.sampled_from([NofM(1, 2), NofM(2, 4), NofM(1, 4), NofM(3, 4), NofM(4, 8), NofM(2, 5)])


@st.composite
def problems(draw: st.DrawFn, sparsities: st.SearchStrategy[Sparsity] = levels | n_of_m) -> Problem:
    sparsity = draw(sparsities)
    d_in = draw(st.integers(1, 4)) * sparsity.m if isinstance(sparsity, NofM) else draw(st.integers(1, 24))
    sizes = draw(st.integers(1, 6)), d_in, draw(st.integers(0, 999)), draw(st.integers(1, 32))
    return Problem(sparsity, *sizes, draw(st.booleans()))


@every_method
@checked
@given(problem=problems())
def test_the_number_of_zeros_is_exact(method: str, problem: Problem) -> None:
    zeros = problem.solve(method).W == 0
    if isinstance(problem.sparsity, NofM):
        per_group = zeros.unflatten(1, (-1, problem.sparsity.m)).sum(2)
        assert bool((per_group == problem.sparsity.m - problem.sparsity.n).all())
    else:
        assert int(zeros.sum()) == round(problem.sparsity.level * zeros.numel())


@every_method
@checked
@given(problem=problems())
def test_the_mask_says_where_the_zeros_are_and_they_are_positive(method: str, problem: Problem) -> None:
    solution = problem.solve(method)
    assert solution.W.dtype == torch.float32
    assert solution.mask.dtype == torch.bool
    assert torch.equal(solution.W == 0, solution.mask)
    assert not bool(solution.W[solution.mask].signbit().any())
    assert bool(solution.W.isfinite().all())


@every_method
@checked
@given(problem=problems())
def test_inputs_are_not_modified(method: str, problem: Problem) -> None:
    (W, H), (W_before, H_before) = problem.layer, problem.layer
    prune_layer(W, H, problem.sparsity, method, block_size=problem.block_size)
    assert torch.equal(W, W_before)
    assert torch.equal(H, H_before)


@every_method
@checked
@given(problem=problems(), power=st.integers(-10, 10))
def test_the_scale_of_the_moments_does_not_matter(method: str, problem: Problem, power: int) -> None:
    """By powers of four, whose square root is exact as well, and so every bit is the same."""
    W, H = problem.layer
    scaled = prune_layer(W, 4.0**power * H, problem.sparsity, method, block_size=problem.block_size)
    solution = problem.solve(method)
    assert torch.equal(scaled.W, solution.W)
    assert torch.equal(scaled.mask, solution.mask)


@every_method
@checked
@given(problem=problems(n_of_m), data=st.data())
def test_outputs_are_solved_apart(method: str, problem: Problem, data: st.DataObject) -> None:
    """N:M only, as unstructured masks compare outputs. Float64, where no two scores are as close as rounding."""
    W, H = (tensor.double() for tensor in problem.layer)
    order = data.draw(st.permutations(range(problem.d_out)))
    rest = (H, problem.sparsity, DAMPING, problem.block_size)
    permuted, solution = METHODS[method](W[order], *rest), METHODS[method](W, *rest)
    assert torch.equal(permuted.mask, solution.mask[order])
    assert float((permuted.W - solution.W[order]).abs().max()) <= tolerance(W, H, W.dtype)


@every_method
@checked
@given(problem=problems(n_of_m))
def test_pruning_again_changes_nothing(method: str, problem: Problem) -> None:
    first = problem.solve(method)
    again = prune_layer(first.W, problem.layer[1], problem.sparsity, method, block_size=problem.block_size)
    assert torch.equal(again.W, first.W)
    assert torch.equal(again.mask, first.mask)


@every_method
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_existing_zeros_count(method: str, pattern: str) -> None:
    W, H = layer(6, 16)
    W[:, ::4] = 0
    solution = prune_layer(W, H, pattern, method)
    assert bool(solution.mask[:, ::4].all())
    assert int((solution.W == 0).sum()) == 6 * 16 // 2


@pytest.mark.parametrize("columns", [slice(0, 8), slice(8, 16), slice(24, 32)], ids=str)
@every_method
def test_zeros_crowded_in_one_block_count(method: str, columns: slice) -> None:
    W, H = layer(6, 32)
    W[:, columns] = 0
    solution = prune_layer(W, H, "0.5", method, block_size=8)
    assert int((solution.W == 0).sum()) == 96


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_existing_zeros_go_before_dead_inputs(method: str) -> None:
    W, H = layer(6, 16, dead=(0,))
    W[:, 9] = 0
    assert torch.equal(prune_layer(W, H, 1 / 16, method).W, W)


@every_method
def test_more_zeros_than_asked_for_stay(method: str) -> None:
    W, H = layer(6, 16)
    W = prune_layer(W, H, "1:4", method).W
    assert torch.equal(prune_layer(W, H, 0.5, method).W, W)


@every_method
@pytest.mark.parametrize("dead", [(), (1, 6)], ids=str)
def test_level_zero_changes_nothing(method: str, dead: tuple[int, ...]) -> None:
    W, H = layer(6, 16, dead=dead)
    solution = prune_layer(W, H, 0, method)
    assert torch.equal(solution.W, W)
    assert not solution.mask.any()


@every_method
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_half_precision_is_solved_in_fp32(method: str, pattern: str) -> None:
    W, H = layer(6, 16)
    from_half = prune_layer(W.bfloat16(), H, pattern, method)
    assert torch.equal(from_half.W, prune_layer(W.bfloat16().float(), H, pattern, method).W)
    assert from_half.W.dtype == torch.float32


# ---- what single methods promise


@checked
@given(problem=problems(levels))
def test_wanda_prunes_every_output_alike(problem: Problem) -> None:
    counts = problem.solve("wanda").mask.sum(1)
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@checked
@given(problem=problems())
def test_weights_that_are_kept_stay_as_they_are(method: str, problem: Problem) -> None:
    solution = problem.solve(method)
    assert torch.equal(solution.W[~solution.mask], problem.layer[0][~solution.mask])


def test_magnitude_prunes_the_smallest_of_the_matrix() -> None:
    W, H = layer(5, 16)
    mask = prune_layer(W, H, 0.3, "magnitude").mask
    assert float(W[mask].abs().max()) < float(W[~mask].abs().min())


def test_wanda_prunes_the_smallest_products_of_each_output() -> None:
    W, H = layer(5, 16)
    H *= torch.outer(torch.arange(1.0, 17), torch.arange(1.0, 17))  # inputs of very different size
    mask = prune_layer(W, H, 0.5, "wanda").mask
    for scores, gone in zip(W.abs() * H.diagonal().sqrt(), mask, strict=True):
        assert float(scores[gone].max()) < float(scores[~gone].min())


def least_error(W: Tensor, H: Tensor, mask: Tensor) -> float:
    """Error of the best weights for a mask: sum over outputs of w_P^T ([H^-1]_PP)^-1 w_P, P being what is pruned."""
    inverse = torch.linalg.inv(H)
    rows = zip(W, mask, strict=True)
    return sum(float(w[P] @ torch.linalg.solve(inverse[P][:, P], w[P])) for w, P in rows)


@pytest.mark.parametrize("pattern", ["0.5", "0.25", "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(4))
def test_the_update_helps_and_is_no_better_than_the_optimum(pattern: str, seed: int) -> None:
    W, H = (tensor.double() for tensor in layer(8, 32, seed))
    solution, Hd = sparsegpt(W, H, parse(pattern), DAMPING, 16), damped(H)
    error = reconstruction_error(W, solution.W, Hd)
    assert error < reconstruction_error(W, torch.where(solution.mask, 0.0, W), Hd)
    slack = 32 * torch.finfo(W.dtype).eps * float(torch.linalg.cond(Hd))
    assert error >= least_error(W, Hd, solution.mask) * (1 - slack)


def test_the_first_column_is_repaired_at_best() -> None:
    """Where only the first weight of each output goes, all others are free to repair it: eq. 3 is the optimum."""
    W, H = (tensor.double() for tensor in layer(8, 16))
    W[:, 0], W[:, 1:] = 0.1, W[:, 1:] + 2 * W[:, 1:].sign()
    solution, Hd = sparsegpt(W, H, Unstructured(1 / 16), DAMPING, 16), damped(H)
    assert bool(solution.mask[:, 0].all())
    slack = 16 * torch.finfo(W.dtype).eps * float(torch.linalg.cond(Hd))
    best = least_error(W, Hd, solution.mask)
    assert reconstruction_error(W, solution.W, Hd) == pytest.approx(best, rel=slack, abs=0)


def test_reconstruction_error_is_the_squared_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    W, W_hat = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    X = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    per_token = (X @ (W - W_hat).T).square().sum(1)
    assert reconstruction_error(W, W_hat, X.T @ X / 20) == pytest.approx(float(per_token.mean()), rel=1e-12)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_groups_do_not_depend_on_the_block_size(pattern: str) -> None:
    W, H = layer(16, 96, seed=7)
    solutions = [prune_layer(W, H, pattern, block_size=size) for size in (8, 20, 32, 96, 128)]
    for one, other in itertools.pairwise(solutions):
        assert_equal_solutions(one, other, tolerance(W, H, W.dtype))


# ---- dead inputs


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("block_size", [4, 128])
def test_weights_of_dead_inputs_end_as_zero(method: str, pattern: str, block_size: int) -> None:
    W, H = layer(6, 32, dead=(0, 5, 6, 31))
    solution = prune_layer(W, H, pattern, method, block_size=block_size)
    assert not solution.W[:, [0, 5, 6, 31]].any()
    assert int(solution.mask.sum()) == 6 * 32 // 2


@pytest.mark.parametrize("dead", [range(0, 6), range(5, 11), range(10, 16)], ids=str)
def test_dead_inputs_go_first_wherever_they_are(dead: range) -> None:
    """Six of 16 inputs are fewer than the half that is pruned, though they may be more than half of their block."""
    W, H = layer(6, 16, dead=tuple(dead))
    solution = prune_layer(W, H, 0.5, block_size=8)
    assert bool(solution.mask[:, list(dead)].all())
    assert int(solution.mask.sum()) == 6 * 8


def test_a_group_of_dead_inputs_is_zero_altogether() -> None:
    W, H = layer(6, 16, dead=(4, 5, 6, 7, 8, 9, 10))
    solution = prune_layer(W, H, "2:4")
    assert not solution.W[:, 4:11].any()
    assert not solution.W[:, 4:11].signbit().any()
    assert bool((solution.mask.unflatten(1, (-1, 4)).sum(2) == 2).all())


@every_method
@pytest.mark.parametrize("block_size", [1, 4, 7, 128])
@pytest.mark.parametrize("level", [0.25, 0.5])
@pytest.mark.parametrize("dead", [range(12), range(4, 16), range(0, 16)], ids=str)
def test_more_dead_inputs_than_the_quota(method: str, block_size: int, level: float, dead: range) -> None:
    W, H = layer(5, 16, dead=tuple(dead))
    solution = prune_layer(W, H, level, method, block_size=block_size)
    assert int(solution.mask.sum()) == int((solution.W == 0).sum()) == round(level * 5 * 16)


# ---- errors


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(method: str, value: float) -> None:
    W, H = layer(4, 8)
    W[2, 3] = value
    with pytest.raises(SolverError, match="weights hold NaN or infinity"):
        prune_layer(W, H, "2:4", method)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_moments_that_are_not_finite_are_refused(method: str, value: float) -> None:
    W, H = layer(4, 8)
    H[2, 3] = value
    with pytest.raises(SolverError, match="moments of the inputs hold NaN or infinity"):
        prune_layer(W, H, "2:4", method)


@every_method
@pytest.mark.parametrize("shape", [(7, 7), (8, 7), (4, 4), (8,)], ids=str)
def test_moments_of_another_shape_are_refused(method: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SolverError, match=r"\[8, 8\], found"):
        prune_layer(layer(4, 8)[0], torch.ones(shape), "2:4", method)


@pytest.mark.parametrize("column", [1, 5, 7])
def test_an_indefinite_hessian_is_refused_by_column(column: int) -> None:
    W, H = layer(4, 8)[0], torch.eye(8)
    H[0, column] = H[column, 0] = 5  # eigenvalue 1 - 5; the ladder ends at a damping of 1
    with pytest.raises(SolverError, match=rf"not positive definite \(column {column}\) even with a damping of 1"):
        prune_layer(W, H, "2:4")


@pytest.mark.parametrize(
    ("damping", "lacking", "used"),
    [(0.0, 0.05, 0.1), (0.0, 0.5, 1.0), (0.02, 0.01, 0.02), (0.02, 0.1, 0.2), (0.02, 0.5, 2.0), (0.001, 0.05, 0.1)],
)
def test_damping_is_raised_by_the_ladder(damping: float, lacking: float, used: float) -> None:
    """The lowest eigenvalue is -lacking, and the mean diagonal 1."""
    W, H = layer(4, 8)[0], torch.eye(8)
    H[0, 1] = H[1, 0] = 1 + lacking
    assert prune_layer(W, H, "2:4", damping=damping).damping == pytest.approx(used)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_a_singular_hessian_is_solved_with_more_damping(tokens: int, pattern: str) -> None:
    X = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0))
    W, H = layer(4, 16)[0], X.T @ X / tokens
    solution = prune_layer(W, H, pattern, damping=0.0)
    assert solution.damping == pytest.approx(0.1)
    assert_equal_solutions(solution, prune_layer(W, H, pattern, damping=solution.damping), 0.0)
    assert reconstruction_error(W, solution.W, H) < reconstruction_error(W, torch.where(solution.mask, 0.0, W), H)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'obs': choose from magnitude, wanda, sparsegpt"):
        prune_layer(*layer(4, 8), "2:4", "obs")


@every_method
@pytest.mark.parametrize(("pattern", "d_in"), [("2:4", 10), ("4:8", 12), ("2:4", 3)])
def test_a_pattern_that_does_not_fit_is_refused(method: str, pattern: str, d_in: int) -> None:
    with pytest.raises(ConfigError, match=f"pattern {pattern} does not fit: {d_in} inputs"):
        prune_layer(*layer(4, d_in), pattern, method)
