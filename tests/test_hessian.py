"""The observer: what matrices see, who shares it, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsegpt_lite.errors import CalibrationError, ModelError
from sparsegpt_lite.hessian import Observer, Tile


class Block(nn.Module):
    """Layers that share an input (q, k, v), one called twice, one by keyword, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.twice, self.unused = (nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: Tensor, *, copies: bool = False) -> Tensor:
        h = self.q(x) * self.k(x.clone() if copies else x) + self.v(x)
        h = self.o(input=h)
        return self.twice(self.twice(h).tanh())


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def batches(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, 6, generator=generator) for shape in shapes]


@torch.no_grad()
def watch(
    module: nn.Module, inputs: list[Tensor], call: Callable[[Tensor], object] | None = None, **options: object
) -> Observer:
    weights = {name.removesuffix(".weight"): p.data for name, p in module.named_parameters() if p.ndim > 1}
    with Observer(weights, **options) as observer:
        for x in inputs:
            observer.start_call()
            (call or module)(x)
    return observer


def groups(observer: Observer) -> list[list[str]]:
    return [[tile.weight for tile in tiles] for _, tiles in observer.groups()]


def seen(observer: Observer) -> dict[Tile, tuple[Tensor, int]]:
    return {tile: (H, tokens) for tiles, H, tokens in observer.hessians() for tile in tiles}


def seen_by(observer: Observer, *members: str) -> tuple[Tensor, int]:
    ((H, tokens),) = ((H, n) for tiles, H, n in observer.hessians() if [t.weight for t in tiles] == list(members))
    return H, tokens


def assert_mean_of_squares(H: Tensor, inputs: list[Tensor]) -> None:
    """Compare with X^T X / tokens; n products, added in fp32, err by n * eps * sum |x_i x_j| at most."""
    X = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).detach().double()  # [tokens, d_in]
    expected = X.T @ X / len(X)
    slack = len(X) * torch.finfo(torch.float32).eps * expected.diagonal().max()  # Cauchy-Schwarz
    assert H.dtype == torch.float32
    assert float((H - expected).abs().max()) <= slack


def test_layers_that_share_an_input_are_one_group(block: Block) -> None:
    assert groups(watch(block, batches((2, 5)))) == [["q", "k", "v"], ["o"], ["twice"]]


def test_moments_are_the_mean_over_all_tokens(block: Block) -> None:
    inputs = batches((2, 5), (3, 4), (1, 1))
    H, tokens = seen_by(watch(block, inputs), "q", "k", "v")
    assert tokens == 2 * 5 + 3 * 4 + 1
    assert_mean_of_squares(H, inputs)


def test_inputs_may_come_by_keyword(block: Block) -> None:
    inputs = batches((2, 5), (1, 3))
    H, tokens = seen_by(watch(block, inputs), "o")
    assert tokens == 13
    assert_mean_of_squares(H, [block.q(x) * block.k(x) + block.v(x) for x in inputs])


def test_a_layer_called_twice_sees_both_inputs(block: Block) -> None:
    inputs = batches((2, 5), (1, 3))
    H, tokens = seen_by(watch(block, inputs), "twice")
    first = [block.o(block.q(x) * block.k(x) + block.v(x)) for x in inputs]
    assert tokens == 2 * 13
    assert_mean_of_squares(H, first + [block.twice(x).tanh() for x in first])


def test_a_layer_may_share_one_of_its_two_inputs(block: Block) -> None:
    x, y = batches((2, 5), (1, 3))
    observer = watch(block, [x], lambda x: (block.q(x), block.q(y), block.k(y)))
    by_tile = seen(observer)
    for name, inputs in (("q", [x, y]), ("k", [y])):
        H, tokens = by_tile[Tile(name)]
        assert tokens == sum(i.numel() // 6 for i in inputs)
        assert_mean_of_squares(H, inputs)


def test_half_precision_is_summed_in_fp32(block: Block) -> None:
    inputs = [x.bfloat16() for x in batches((2, 500))]
    H, _ = seen_by(watch(block.bfloat16(), inputs), "q", "k", "v")
    assert_mean_of_squares(H, inputs)


def test_a_layer_that_is_never_called_is_in_no_group(block: Block) -> None:
    assert not any("unused" in names for names in groups(watch(block, batches((2, 5)))))


def test_no_call_no_groups(block: Block) -> None:
    assert groups(watch(block, [])) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_the_layer(block: Block, value: float) -> None:
    x = torch.zeros(1, 2, 6)
    x[0, 1, 3] = value
    with pytest.raises(CalibrationError, match=r"^q: .*NaN or infinity"):
        seen_by(watch(block, [x]), "q", "k", "v")


@pytest.mark.parametrize("order", [[False, True], [True, False], [False, True, False]])
def test_sharing_must_not_change_between_calls(block: Block, order: list[bool]) -> None:
    copies = iter(order)
    with pytest.raises(ModelError, match=r"^q: shares its inputs in one batch only"):
        watch(block, batches(*[(1, 2)] * len(order)), lambda x: block(x, copies=next(copies)))


def test_a_layer_may_rest_in_one_call(block: Block) -> None:
    x, y = batches((2, 5), (1, 3))
    calls = iter([lambda x: (block.q(x), block.o(x.clone())), block.q])
    observer = watch(block, [x, y], lambda x: next(calls)(x))
    by_tile = seen(observer)
    for name, inputs in (("q", [x, y]), ("o", [x])):
        H, tokens = by_tile[Tile(name)]
        assert tokens == sum(i.numel() // 6 for i in inputs)
        assert_mean_of_squares(H, inputs)


@pytest.mark.parametrize("first", [True, False])
def test_sharing_in_one_call_and_resting_in_the_other_is_refused(block: Block, first: bool) -> None:
    """Else k would be solved for inputs that only q saw."""
    calls = iter([lambda x: (block.q(x), block.k(x)), block.q][:: 1 if first else -1])
    with pytest.raises(ModelError, match="shares its inputs in one batch only"):
        watch(block, batches((2, 5), (1, 3)), lambda x: next(calls)(x))


def test_a_layer_that_saw_no_token_is_in_no_group(block: Block) -> None:
    assert groups(watch(block, batches((2, 5)), lambda x: (block.q(x), block.k(x[:, :0])))) == [["q"]]


def test_calls_outside_the_context_do_not_count(block: Block) -> None:
    inputs = batches((2, 5), (1, 3))
    observer = watch(block, inputs[:1])
    block(inputs[1])
    assert seen_by(observer, "q", "k", "v")[1] == 10


def test_watching_ends_when_the_model_fails(block: Block) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        watch(block, [torch.zeros(1, 2, 5)])
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_input_changed_in_place_is_another_input() -> None:
    layers = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    observer = watch(layers, [torch.ones(1, 4)], lambda x: (layers["q"](x), layers["k"](x.mul_(3))))
    assert {tile.weight: H[0, 0].item() for tile, (H, _) in seen(observer).items()} == {"q": 1.0, "k": 9.0}


# ---- weights that hold several matrices ------------------------------------------------------------------------------


class Experts(nn.Module):
    """Three experts in one parameter [3, a, b], used in one of the ways that models have."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        shape = {"tiles of rows": (12, 6), "x @ W": (3, 6, 4), "bmm": (3, 6, 4)}.get(use, (3, 4, 6))
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    def forward(self, inputs: list[Tensor]) -> None:
        w, linear = self.weight, nn.functional.linear
        if self.use == "bmm":
            torch.bmm(torch.stack(inputs), w)
            return
        for e, x in enumerate(inputs):
            if self.use == "tiles of rows":
                x @ w.view(3, 4, 6)[e].T
            elif self.use == "x @ W":
                x @ w[torch.tensor(e)]
            elif self.use == "x @ W.T":
                torch.matmul(x, w[e].transpose(0, 1))
            else:
                linear(x, w[e])


@pytest.mark.parametrize("use", ["linear", "x @ W", "x @ W.T", "tiles of rows", "bmm"])
def test_every_expert_sees_its_own_inputs(use: str) -> None:
    """Told by the memory that is multiplied, whichever way; a square matrix needs no flag to tell its inputs' axis."""
    experts, first, second = Experts(use), batches(*[(5,)] * 3), batches(*[(7,)] * 3)
    observer = watch(experts, [first, second])
    by_tile = seen(observer)
    assert list(by_tile) == [Tile("weight", e, 3, transposed=use in ("x @ W", "bmm")) for e in range(3)]
    for tile, (H, tokens) in by_tile.items():
        assert tokens == 12
        assert_mean_of_squares(H, [first[tile.index], second[tile.index]])


def test_the_axis_of_the_inputs_of_a_square_matrix() -> None:
    weight = torch.randn(6, 6)
    uses = {False: [lambda x: nn.functional.linear(x, weight), lambda x: x @ weight.T],
            True: [lambda x: x @ weight, lambda x: torch.addmm(x[0], x, weight)]}  # fmt: skip
    for transposed, calls in uses.items():
        for call in calls:
            with Observer({"w": weight}) as observer:
                observer.start_call()
                call(batches((5,))[0])
            assert list(seen(observer)) == [Tile("w", transposed=transposed)]


def test_tokens_of_zeros_in_a_batched_product_are_not_counted() -> None:
    """Models that give every expert all tokens zero those that are not meant for it."""
    x = batches((5,), (5,), (5,))
    x[1][2:] = 0
    by_tile = seen(watch(Experts("bmm"), [x]))
    assert [tokens for _, tokens in by_tile.values()] == [5, 2, 5]
    assert_mean_of_squares(by_tile[Tile("weight", 1, 3, transposed=True)][0], [x[1][:2]])


def test_products_that_are_none_of_a_whole_tile_do_not_count() -> None:
    weight, x = torch.randn(6, 6), batches((5,))[0]
    with Observer({"w": weight}) as observer:
        observer.start_call()
        weight @ x.T  # from the left
        x @ weight[:, :3]  # some columns
        x @ weight[1:3].T  # rows that are no multiple of their number from the start
        x @ (weight * 2)  # not its memory
        x[:, :4] @ weight[:4]  # a part that does not divide the whole
    assert observer.groups() == []


# ---- what does not fit in memory -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_deferred_and_comes_out_the_same(block: Block) -> None:
    inputs, whole = batches((2, 5), (3, 4)), {}
    whole = seen(watch(block, inputs))
    parts, only, passes = {}, None, 0
    while only is None or only:
        observer = watch(block, inputs, budget=4 * 6 * 6, only=only)  # one Hessian
        parts |= seen(observer)
        only, passes = observer.deferred, passes + 1
    assert passes == 3  # q with k and v, o, and the two calls of `twice`, which must not be parted
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[tile][0], whole[tile][0]) and parts[tile][1] == whole[tile][1] for tile in whole)
