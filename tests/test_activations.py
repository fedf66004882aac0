"""Suspended forwards on toy models: order, guards, and that nothing is left behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsegpt_lite.activations import SuspendedForwards
from sparsegpt_lite.errors import ModelError


class Toy(nn.Module):
    """Blocks that double their input, called in the order that it is given."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(n))
        for layer in self.layers:
            layer.weight.data = 2 * torch.eye(2)

    def forward(self, x: Tensor, order: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        for i in order:
            x = self.layers[i](x) + 1
        return x

    @property
    def blocks(self) -> dict[str, nn.Module]:
        return {str(i): layer for i, layer in enumerate(self.layers)}


def forward_of(model: Toy, value: float, order: tuple[int, ...] = (0, 1, 2)) -> Callable[[], Tensor]:
    return lambda: model(torch.full((1, 2), value), order)


def run_all(model: Toy, forwards: list[Callable[[], Tensor]]) -> None:
    with SuspendedForwards(model.blocks, forwards) as suspended:
        while suspended.block is not None:
            suspended.advance()


def test_forwards_go_from_block_to_block_together() -> None:
    model = Toy()
    expected = [model(torch.full((1, 2), v)) for v in (1.0, 5.0)]
    with SuspendedForwards(model.blocks, [forward_of(model, 1.0), forward_of(model, 5.0)]) as suspended:
        while (block := suspended.block) is not None:
            inputs = [call.args[0] for call in suspended.calls]
            assert torch.equal(suspended.calls[1].run(), 2 * inputs[1]), block
            assert not torch.is_grad_enabled()
            suspended.advance()
    assert suspended.visited == ["0", "1", "2"]
    assert all(torch.equal(got, want) for got, want in zip(suspended.results, expected, strict=True))


def test_a_block_may_be_called_again() -> None:
    model, blocks = Toy(), []
    expected = model(torch.full((1, 2), 1.0), (0, 1, 0, 1))
    with SuspendedForwards(model.blocks, [forward_of(model, 1.0, (0, 1, 0, 1))]) as suspended:
        while (block := suspended.block) is not None:
            blocks.append(block)
            suspended.advance()
    assert blocks == ["0", "1", "0", "1"]
    assert suspended.visited == ["0", "1"]
    assert torch.equal(suspended.results[0], expected)


def test_inputs_and_outputs_are_moved_on_their_ways() -> None:
    model, inward, outward = Toy(), [], []
    expected = model(torch.full((1, 2), 1.0))
    moves = [lambda tree: inward.append(tree) or tree, lambda tree: outward.append(tree) or tree]
    with SuspendedForwards(model.blocks, [forward_of(model, 1.0)], *moves) as suspended:
        while suspended.block is not None:
            suspended.calls[0].run()  # looks only
            suspended.advance()
    assert (len(inward), len(outward)) == (6, 3)
    assert torch.equal(suspended.results[0], expected)


def test_batches_that_part_are_refused() -> None:
    model = Toy()
    with pytest.raises(ModelError, match="different ways"):
        run_all(model, [forward_of(model, 1.0), forward_of(model, 1.0, (0, 2))])


def test_an_error_before_the_first_block_leaves_nothing_behind() -> None:
    model, unwound = Toy(), []

    def first() -> None:
        try:
            model(torch.ones(1, 2))
        finally:
            unwound.append(True)

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), SuspendedForwards(model.blocks, [first, fails]):
        pass
    assert unwound == [True]
    assert torch.is_grad_enabled()
    assert all("forward" not in layer.__dict__ for layer in model.layers)


def test_a_forward_set_on_the_instance_comes_back() -> None:
    model = Toy()
    mine = model.layers[1].forward = lambda x: x
    with SuspendedForwards(model.blocks, [forward_of(model, 1.0)]) as suspended:
        suspended.advance()
        assert suspended.calls[0].forward is mine
    assert model.layers[1].forward is mine


def test_a_model_without_blocks_on_its_way_just_runs() -> None:
    model = Toy()
    with SuspendedForwards(model.blocks, [forward_of(model, 3.0, ())]) as suspended:
        assert suspended.block is None
    assert suspended.results[0].tolist() == [[3.0, 3.0]]
