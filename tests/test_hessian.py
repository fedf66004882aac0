"""The observer: what layers see, who shares it, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsegpt_lite.errors import CalibrationError, ModelError
from sparsegpt_lite.hessian import Observer


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
def watch(block: Block, inputs: list[Tensor], call: Callable[[Tensor], object] | None = None) -> Observer:
    layers = {name: (module, module.in_features) for name, module in block.named_children()}
    with Observer(layers) as observer:
        for x in inputs:
            observer.start_call()
            (call or block)(x)
    return observer


def seen_by(observer: Observer, *members: str) -> tuple[Tensor, int]:
    (group,) = (group for group, names in observer.groups().items() if names == list(members))
    return observer.hessian(group)


def assert_mean_of_squares(H: Tensor, inputs: list[Tensor]) -> None:
    """Compare with X^T X / tokens; n products, added in fp32, err by n * eps * sum |x_i x_j| at most."""
    X = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).detach().double()  # [tokens, d_in]
    expected = X.T @ X / len(X)
    slack = len(X) * torch.finfo(torch.float32).eps * expected.diagonal().max()  # Cauchy-Schwarz
    assert H.dtype == torch.float32
    assert float((H - expected).abs().max()) <= slack


def test_layers_that_share_an_input_are_one_group(block: Block) -> None:
    groups = watch(block, batches((2, 5))).groups()
    assert list(groups.values()) == [["q", "k", "v"], ["o"], ["twice"]]


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
    for name, inputs in (("q", [x, y]), ("k", [y])):
        H, tokens = seen_by(observer, name)
        assert tokens == sum(i.numel() // 6 for i in inputs)
        assert_mean_of_squares(H, inputs)


def test_half_precision_is_summed_in_fp32(block: Block) -> None:
    inputs = [x.bfloat16() for x in batches((2, 500))]
    H, _ = seen_by(watch(block.bfloat16(), inputs), "q", "k", "v")
    assert_mean_of_squares(H, inputs)


def test_a_layer_that_is_never_called_is_in_no_group(block: Block) -> None:
    groups = watch(block, batches((2, 5))).groups()
    assert "unused" not in {name for names in groups.values() for name in names}


def test_no_call_no_groups(block: Block) -> None:
    assert watch(block, []).groups() == {}


def test_inputs_of_another_width_are_not_counted() -> None:
    layer = nn.Identity()
    with Observer({"a": (layer, 6)}) as observer:
        observer.start_call()
        layer(torch.zeros(2, 5))
    assert observer.groups() == {}


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
    for name, inputs in (("q", [x, y]), ("o", [x])):
        H, tokens = seen_by(observer, name)
        assert tokens == sum(i.numel() // 6 for i in inputs)
        assert_mean_of_squares(H, inputs)


@pytest.mark.parametrize("first", [True, False])
def test_sharing_in_one_call_and_resting_in_the_other_is_refused(block: Block, first: bool) -> None:
    """Else k would be solved for inputs that only q saw."""
    calls = iter([lambda x: (block.q(x), block.k(x)), block.q][:: 1 if first else -1])
    with pytest.raises(ModelError, match="shares its inputs in one batch only"):
        watch(block, batches((2, 5), (1, 3)), lambda x: next(calls)(x))


def test_a_layer_that_saw_no_token_is_in_no_group(block: Block) -> None:
    groups = watch(block, batches((2, 5)), lambda x: (block.q(x), block.k(x[:, :0]))).groups()
    assert list(groups.values()) == [["q"]]


def test_calls_outside_the_context_do_not_count(block: Block) -> None:
    inputs = batches((2, 5), (1, 3))
    observer = watch(block, inputs[:1])
    block(inputs[1])
    assert seen_by(observer, "q", "k", "v")[1] == 10
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_hooks_go_when_the_model_fails(block: Block) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        watch(block, [torch.zeros(1, 2, 5)])
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_an_input_changed_in_place_is_another_input() -> None:
    q, k = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad(), Observer({"q": (q, 4), "k": (k, 4)}) as observer:
        observer.start_call()
        x = torch.ones(1, 4)
        q(x)
        k(x.mul_(3))
    by_layer = {
        name: observer.hessian(group)[0][0, 0].item() for group, names in observer.groups().items() for name in names
    }
    assert by_layer == {"q": 1.0, "k": 9.0}
