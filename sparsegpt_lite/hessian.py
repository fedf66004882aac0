"""What did this matrix see? Mean of x xᵀ over the calibration tokens, one for all matrices that share an input."""

import itertools
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from sparsegpt_lite.errors import CalibrationError, ModelError

# Products x · w, and where w stands among their arguments; x stands before it. linear takes w as [d_out, d_in], the
# others as [d_in, d_out].
PRODUCTS: dict[Callable[..., Any], int] = {
    linear: 1,
    torch.matmul: 1,
    torch.Tensor.matmul: 1,
    torch.Tensor.__matmul__: 1,
    torch.mm: 1,
    torch.Tensor.mm: 1,
    torch.bmm: 1,
    torch.Tensor.bmm: 1,
    torch.addmm: 2,
    torch.Tensor.addmm: 2,
}


USES = 64  # of a matrix within a block call, each with moments of its own


@dataclass(frozen=True)
class Tile:
    """One of `count` equal parts of a weight in memory order, each [rows, columns]; the whole where `count` is 1.

    Its inputs run along the columns, or where it is `transposed` along the rows.
    """

    weight: str
    index: int = 0
    count: int = 1
    transposed: bool = False


Slot = tuple[Tile, int]  # the tile that saw an input first within a block call, and for which time it was used


@dataclass
class Moments:
    """Sum of x xᵀ over `tokens` inputs x: fp32 [d_in, d_in]."""

    sum: Tensor
    tokens: int = 0

    def add(self, X: Tensor) -> None:
        """Add inputs [tokens, d_in] of any floating dtype."""
        X = X.float()
        self.sum.addmm_(X.T, X)
        self.tokens += len(X)


@dataclass
class _Input:
    """An input of the current block call: which tensor it is, its version, and the tiles that were given it."""

    tensor: weakref.ref[Tensor]
    version: int
    tiles: list[Tile]

    def is_(self, x: Tensor) -> bool:
        """Whether it is this very tensor, unchanged."""
        return self.tensor() is x and self.version == _version(x)


class Observer(TorchFunctionMode):
    """Watches the products that weights are in while it is in context; `start_call` goes before each block call.

    A weight is recognised by its memory, so that it does not matter which module uses it and how: as a whole, one
    expert's tile at a time, or all tiles in one batched product. Tiles that are given the very same tensor, as q, k
    and v are, share one sum. A tile that is used twice within a block call has the sum of both.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], budget: float = float("inf"), only: Set[Tile] | None = None
    ) -> None:
        """Watch weights.

        Args:
            weights: Parameters of two or three dimensions, contiguous, by name.
            budget: Bytes that the sums may take together; what does not fit is `deferred`, all but the first tile.
            only: Tiles to watch; all by default.
        """
        super().__init__()
        self.budget, self.only = budget, only
        self.deferred: set[Tile] = set()
        self._counted: set[Tile] = set()
        self._weights = sorted(
            ((w.data_ptr(), name, w) for name, w in weights.items() if w.is_contiguous() and w.numel()),
            key=lambda entry: entry[0],
        )
        self._starts = [start for start, _, _ in self._weights]
        self._moments: dict[Slot, Moments] = {}
        self._sharing: dict[Slot, list[Tile]] = {}  # the tiles that are given the input of a slot
        self._call: dict[Slot, _Input] = {}
        self._inputs: dict[int, _Input] = {}  # the same by id of the tensor
        self._bytes = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None:
            self._end_call()
        self._call.clear()
        self._inputs.clear()

    def start_call(self) -> None:
        """Forget the tensors of the previous block call. A tile may rest in a call, as experts do."""
        self._end_call()
        self._call.clear()
        self._inputs.clear()

    def _end_call(self) -> None:
        for slot, seen in self._call.items():
            if self._sharing.setdefault(slot, seen.tiles) != seen.tiles:
                raise ModelError(f"{slot[0].weight}: shares its inputs in one batch only; leave it dense with --skip")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        at = PRODUCTS.get(func)
        if at is not None and len(args) > at and all(isinstance(a, Tensor) for a in args[at - 1 : at + 1]):
            self._product(args[at - 1], args[at], inputs_last=func is linear)
        return func(*args, **(kwargs or {}))

    def _product(self, x: Tensor, w: Tensor, inputs_last: bool) -> None:
        """Note the inputs of the tiles that w is made of, if it lies in a watched weight."""
        found = self._locate(w)
        if found is None:
            return
        tile, flipped = found
        tile = Tile(tile.weight, tile.index, tile.count, transposed=inputs_last == flipped)
        d_in = w.shape[-1 if inputs_last else -2]
        if x.shape[-1] != d_in:
            return
        if w.ndim == 2:
            self._add(tile, x, x.reshape(-1, d_in))
        elif x.ndim == 3 and len(x) == len(w) == tile.count:  # one input per tile; a token of zeros is not meant for it
            for i, rows in enumerate(x.unbind()):
                self._add(Tile(tile.weight, i, tile.count, tile.transposed), rows, rows[(rows != 0).any(1)])

    def _locate(self, w: Tensor) -> tuple[Tile, bool] | None:
        """The tile of a watched weight that w is, or the first where w is all of them, and whether w is transposed."""
        if w.ndim not in (2, 3) or not w.numel():
            return None
        address = w.data_ptr()
        i = bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        start, name, weight = self._weights[i]
        columns, offset = weight.shape[-1], (address - start) // weight.element_size()
        flipped = not (w.stride(-1) == 1 and w.shape[-1] == columns)
        rows, width = (w.shape[-1], w.shape[-2]) if flipped else (w.shape[-2], w.shape[-1])
        size = rows * width
        whole_rows = width == columns and (w.stride(-2) == 1 if flipped else True)
        step = w.stride(-1 if flipped else -2)
        if not whole_rows or (rows > 1 and step != columns) or offset % size or weight.numel() % size:
            return None
        if offset >= weight.numel() or (w.ndim == 3 and (w.numel() != weight.numel() or w.stride(0) != size)):
            return None
        return Tile(name, offset // size, weight.numel() // size), flipped

    def _add(self, tile: Tile, x: Tensor, X: Tensor) -> None:
        """Add inputs X [tokens, d_in], which came as the tensor x, unless they are counted already."""
        if tile in self.deferred or (self.only is not None and tile not in self.only):
            return
        if (seen := self._inputs.get(id(x))) and seen.is_(x):
            seen.tiles.append(tile)
            self._counted.add(tile)
            return
        slot = next((tile, n) for n in itertools.count() if (tile, n) not in self._call)
        if slot[1] >= USES:
            raise ModelError(
                f"{tile.weight}: is used more than {USES} times in a block call; leave it dense with --skip"
            )
        if slot not in self._moments:
            size = 4 * X.shape[1] ** 2
            if self._moments and self._bytes + size > self.budget and tile not in self._counted:
                self.deferred.add(tile)
                return
            self._moments[slot] = Moments(torch.zeros(X.shape[1], X.shape[1], dtype=torch.float32, device=X.device))
            self._bytes += size
        self._counted.add(tile)
        self._call[slot] = self._inputs[id(x)] = _Input(weakref.ref(x), _version(x), [tile])
        self._moments[slot].add(X)

    def groups(self) -> list[tuple[tuple[Slot, ...], list[Tile]]]:
        """Tiles that saw tokens, those that share their inputs together."""
        slots: dict[Tile, list[Slot]] = {}
        for slot, tiles in self._sharing.items():
            for tile in tiles:
                slots.setdefault(tile, []).append(slot)
        groups: dict[tuple[Slot, ...], list[Tile]] = {}
        for tile, some in slots.items():
            if any(self._moments[slot].tokens for slot in some):
                groups.setdefault(tuple(some), []).append(tile)
        return list(groups.items())

    def hessians(self) -> Iterator[tuple[list[Tile], Tensor, int]]:
        """Tiles, mean of x xᵀ over what they saw, fp32 [d_in, d_in], and the number of tokens; each is given once.

        Raises:
            CalibrationError: The inputs held NaN or infinity.
        """
        groups = self.groups()
        while groups:
            group, tiles = groups.pop(0)
            parts = [self._moments[slot] for slot in group]
            shared = any(slot in other for other, _ in groups for slot in group)
            tokens = sum(part.tokens for part in parts)
            if len(parts) > 1:
                total = torch.stack([part.sum for part in parts]).sum(0)
            else:
                total = parts[0].sum.clone() if shared else parts[0].sum
            if not shared:
                for slot in group:
                    del self._moments[slot]
            parts.clear()
            H = total.div_(tokens)
            if not finite(H):
                part = f"[{tiles[0].index}]" if tiles[0].count > 1 else ""
                raise CalibrationError(
                    f"{tiles[0].weight}{part}: its inputs hold NaN or infinity; try --dtype float32, or look at "
                    f"the model's weights"
                )
            yield tiles, H, tokens


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN or infinity; makes no copy of it."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _version(x: Tensor) -> int:
    """Tells whether x was changed in place."""
    return 0 if x.is_inference() else x._version
