"""What did the matrices of this block see? Passes of the calibration data through the dense block, as many as it needs.

One pass is enough unless the Hessians of a block's experts do not fit in memory together, or experts saw too few
tokens: then passes follow in which the router sends every token to these.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsegpt_lite.activations import BlockCall
from sparsegpt_lite.config import PruneConfig
from sparsegpt_lite.hessian import Observer, Tile
from sparsegpt_lite.matrices import Matrix, Weight, unused


class Seen(NamedTuple):
    """Matrices of one input: H fp32 [d_in, d_in], the mean of x xᵀ, and the tokens that came to them by themselves.

    Without H, there was nothing to see; `note` says what is to be done for lack of tokens.
    """

    matrices: list[Matrix]
    H: Tensor | None
    tokens: int
    note: str | None = None


@dataclass
class Observation:
    """The weights of a loaded block and what is found out about them while it runs."""

    block: nn.Module
    weights: Mapping[str, Weight]
    calls: list[BlockCall]
    config: PruneConfig
    dense: dict[str, str]  # gets a reason for each tensor that turns out to stay dense
    _starved: dict[Tile, int] = field(default_factory=dict)  # tokens of tiles that saw too few

    def seen(self) -> Iterator[Seen]:
        """Run the block on its calls; give each of its matrices once, with what it saw."""
        used: set[Tile] = set()
        watched = {name: weight.parameter.data for name, weight in self.weights.items()}
        only: set[Tile] | None = None
        while only is None or only:
            observer = self._run(watched, only)
            tiles = {tile for _, tiles in observer.groups() for tile in tiles} | observer.deferred
            watched = {name: w for name, w in watched.items() if self._usable(name, tiles)}
            used |= {tile for tile in tiles if tile.weight in watched}
            for some, H, tokens in observer.hessians():
                yield from self._enough([tile for tile in some if tile.weight in watched], H, tokens)
            only = {tile for tile in observer.deferred if tile.weight in watched}
        self._find_idle(used)
        yield from self._with_all_tokens()
        for tile, tokens in self._starved.items():
            note = f"{tokens} tokens for {self._width(tile)} inputs: pruned by magnitude"
            yield Seen(self._matrices(tile), None, tokens, note)

    def _run(self, watched: Mapping[str, Tensor], only: set[Tile] | None) -> Observer:
        observer = Observer(watched, self.config.hessian_gib * 2**30, only)
        with observer:
            for call in self.calls:
                observer.start_call()
                call.run()
        return observer

    def _usable(self, name: str, tiles: set[Tile]) -> bool:
        """Whether a weight is used as one matrix, or as one per tile; otherwise it stays dense."""
        weight, own = self.weights[name], [tile for tile in tiles if tile.weight == name]
        if len({(tile.count, tile.transposed) for tile in own}) > 1:
            self.dense |= dict.fromkeys(weight.kept, "is used in more than one way")
        elif own and ((weight.bare and own[0].count == 1) or not any(map(weight.matrices, own))):
            self.dense |= dict.fromkeys(weight.kept, unused(weight))
        else:
            return True
        return False

    def _matrices(self, tile: Tile) -> list[Matrix]:
        return self.weights[tile.weight].matrices(tile)

    def _width(self, tile: Tile) -> int:
        return self._matrices(tile)[0].read().shape[1]

    def _enough(self, tiles: list[Tile], H: Tensor, tokens: int) -> Iterator[Seen]:
        """Pass on what saw enough tokens, and keep in mind what did not."""
        if tokens >= self.config.token_floor * len(H):
            yield Seen([matrix for tile in tiles for matrix in self._matrices(tile)], H, tokens)
            return
        for tile in tiles:
            if tile.count == 1:  # these are all that there are
                yield Seen(self._matrices(tile), H, tokens, f"{tokens} tokens for {len(H)} inputs")
            else:
                self._starved[tile] = tokens

    def _find_idle(self, used: set[Tile]) -> None:
        """Weights that were never used stay dense; idle experts of those that were are starved."""
        for name, weight in self.weights.items():
            own = [tile for tile in used if tile.weight == name]
            if own:
                one = own[0]
                every = [Tile(name, i, one.count, one.transposed) for i in range(one.count)]
                self._starved |= {tile: 0 for tile in every if tile not in used and weight.matrices(tile)}
            elif not any(tensor in self.dense for tensor in weight.kept):
                self.dense |= dict.fromkeys(weight.kept, unused(weight))

    def _with_all_tokens(self) -> Iterator[Seen]:
        """Send every token to the starved experts, some at a time, where their module is given its routing."""
        if self.config.few_tokens != "all" or self.config.method == "magnitude":
            return
        owners = {name.rpartition(".")[0] for name in {tile.weight for tile in self._starved}}
        for owner in sorted(owners):
            while waiting := {t for t in self._starved if t.weight.rpartition(".")[0] == owner}:
                first = sorted({tile.index for tile in waiting})  # then others, so that none gets a token twice
                rest = [e for e in range(next(iter(waiting)).count) if e not in first]
                with rerouted(self._modules(owner), first + rest) as calls:
                    observer = self._run({t.weight: self.weights[t.weight].parameter.data for t in waiting}, waiting)
                found = [(tile, H, n) for tiles, H, n in observer.hessians() for tile in tiles]
                if not calls or not found:
                    break
                for tile, H, n in found:
                    tokens = self._starved.pop(tile)
                    note = f"{tokens} tokens for {len(H)} inputs: used the Hessian of all {n}"
                    yield Seen(self._matrices(tile), H, tokens, note)

    def _modules(self, owner: str) -> list[nn.Module]:
        """The module of a weight and the one around it, either of which may be given the routing."""
        weight = next(w for w in self.weights.values() if w.name.rpartition(".")[0] == owner)
        around = [m for m in self.block.modules() if any(child is weight.module for child in m.children())]
        return [weight.module, *(m for m in around if m is not self.block)]


@contextmanager
def rerouted(modules: list[nn.Module], experts: list[int]) -> Iterator[list[str]]:
    """Let calls of modules that take a routing [tokens, k] send every token to the first k of some experts.

    Gives a list that grows with each call that was changed.
    """
    changed: list[str] = []

    def send(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = [*args, *kwargs.values()]
        tokens = {v.numel() // v.shape[-1] for v in values if isinstance(v, Tensor) and v.is_floating_point()}
        routes = [v for v in values if _is_route(v) and len(v) in tokens]
        if len(routes) != 1:
            return args, kwargs
        changed.append(type(module).__name__)
        to = torch.tensor([experts[i % len(experts)] for i in range(routes[0].shape[1])]).to(routes[0])
        to = to.expand_as(routes[0]).clone()
        return (
            tuple(to if value is routes[0] else value for value in args),
            {name: to if value is routes[0] else value for name, value in kwargs.items()},
        )

    hooks = [module.register_forward_pre_hook(send, with_kwargs=True) for module in modules]
    try:
        yield changed
    finally:
        for hook in hooks:
            hook.remove()


def _is_route(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int32, torch.int64)
