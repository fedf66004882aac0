"""Which matrices does a block have? Linear layers, Conv1D and fused experts, each seen as W [d_out, d_in].

A weight is a parameter of the model. It holds one matrix, or equal tiles of one expert each; which of these, and along
which axis its inputs run, is what the model does with it (`hessian.Observer` sees that). A piece says where a part of
the parameter is kept: what is a tensor of its own on disk is a matrix of its own here.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsegpt_lite.config import PruneConfig
from sparsegpt_lite.hessian import Tile

LEFT_OUT, NOT_ONLY = "left out by --skip", "not asked for by --only"
# Layers that choose instead of computing: a wrong choice costs more than their few weights save.
CHOOSERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate|modality_router|indexer)(\.|$)")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Index = tuple[Any, ...]  # integers and slices


@dataclass(frozen=True)
class Piece:
    """A part of a parameter and where it is kept: `tensor[at]` there is `parameter[part]` here, row for row."""

    tensor: str
    dtype: torch.dtype
    at: Index = ()
    part: Index = ()


def arrangements(
    shape: tuple[int, ...], kept: Mapping[str, tuple[tuple[int, ...], torch.dtype]], own: bool
) -> Iterator[list[Piece]]:
    """Ways in which transformers' conversions may make a parameter of tensors on disk; the data tell which it is.

    Args:
        shape: Of the parameter.
        kept: Shape and dtype of the tensors, in natural order of their names.
        own: They make up this parameter; otherwise the parameter may be a part of one of them.
    """
    if not own or len(shape) == 2:
        yield from _slices(shape, kept)
    elif len(shape) == 3 and all(len(there) == 2 for there, _ in kept.values()):
        yield from _stacks(shape, kept)
    elif len(shape) == 3 and [there for there, _ in kept.values()] == [shape]:
        ((name, (_, dtype)),) = kept.items()
        half = shape[1] // 2
        parts = [(e, n) for e in range(shape[0]) for n in range(2)]
        halves = [(e, slice(n * half, n * half + half)) for e, n in parts]
        turns = [(e, slice(n, 2 * half, 2)) for e, n in parts]  # rows of gate and up, in turn
        yield [Piece(name, dtype, *pair) for pair in zip(turns, halves, strict=True)]
        yield [Piece(name, dtype, *pair) for pair in zip(halves, turns, strict=True)]


def _stacks(shape: tuple[int, ...], kept: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Iterator[list[Piece]]:
    """Tensors of the experts, stacked; of each expert several, such as gate and up, one below the other."""
    kinds: dict[str, list[str]] = {}
    for name in kept:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    for order in itertools.permutations(kinds.values()):
        pieces = []
        for expert, names in enumerate(zip(*order, strict=False)):
            start = 0
            for name in names:
                (rows, _), dtype = kept[name]
                pieces.append(Piece(name, dtype, (), (expert, slice(start, start + rows))))
                start += rows
        if all(p.part[0] < shape[0] and p.part[1].stop <= shape[1] for p in pieces):
            yield pieces


def _slices(shape: tuple[int, ...], kept: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Iterator[list[Piece]]:
    """Some rows of a tensor."""
    for name, (there, dtype) in kept.items():
        if len(shape) == len(there) == 2 and shape[1] == there[1]:
            for start in range(0, there[0] - shape[0] + 1, shape[0]):
                yield [Piece(name, dtype, (slice(start, start + shape[0]),))]


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts names with numbers by their numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Weight:
    """A parameter that can be pruned if the model uses it as the right factor of a matrix product."""

    name: str
    module: nn.Module
    parameter: nn.Parameter = field(repr=False)
    pieces: Sequence[Piece]

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of inputs that its matrices may have, as far as its module tells."""
        rows, columns = self.parameter.shape[-2:]
        transposed = True if isinstance(self.module, Conv1D) else getattr(self.module, "is_transposed", None)
        if isinstance(self.module, nn.Linear) or transposed is False:
            return (columns,)
        return (rows,) if transposed else (columns, rows)

    @property
    def tensors(self) -> list[str]:
        """Tensors that it is made of."""
        return sorted({piece.tensor for piece in self.pieces}, key=natural)

    @property
    def kept(self) -> list[str]:
        """The tensors that it is made of, or the part of one."""
        partial = [piece for piece in self.pieces if piece.at != () and piece.part == ()]
        return [part_name(piece.tensor, piece.at) for piece in partial] or self.tensors

    @property
    def names(self) -> list[str]:
        """All that it and its matrices may be called: here, and as tensors or parts of tensors on disk."""
        return [self.name, *self.tensors, *self.parts]

    @property
    def parts(self) -> list[str]:
        """Names of its matrices, as far as they are known before it is used: those of tiles of rows are a guess."""
        found = []
        for piece in self.pieces:
            indices: list[Index] = [piece.at]
            if piece.part == () and self.parameter.ndim == 3:
                indices = [(i,) for i in range(len(self.parameter))]
            elif piece.at == () and self.bare:
                n = next((n for key, n in vars(self.module).items() if key.endswith("num_experts")), 1)
                step = -(-len(self.parameter) // n)
                indices = [(slice(start, start + step),) for start in range(0, len(self.parameter), step)]
            found += [part_name(piece.tensor, index) for index in indices]
        return found

    @property
    def bare(self) -> bool:
        """Whether it is two-dimensional and of no linear layer; then it counts only if it is used in tiles."""
        return self.parameter.ndim == 2 and not isinstance(self.module, (nn.Linear, Conv1D))

    def matrices(self, tile: Tile) -> list["Matrix"]:
        """The matrices of a tile, one for each tensor on disk that has a part in it."""
        if self.parameter.ndim == 3:
            if tile.count != len(self.parameter):
                return []
            index: Index = (tile.index,)
        elif tile.count == 1:
            index = ()
        else:
            rows = self.parameter.shape[0] // tile.count
            index = (slice(tile.index * rows, (tile.index + 1) * rows),)
        found = []
        for piece in self.pieces:
            if piece.at and index and piece.part == ():
                return []  # a tile of a part of a tensor
            if piece.part == ():
                found.append(Matrix(self, piece.tensor, piece.dtype, piece.at or index, index, tile.transposed))
            elif piece.part[0] == tile.index:
                found.append(Matrix(self, piece.tensor, piece.dtype, piece.at, piece.part, tile.transposed))
        return found


@dataclass(frozen=True)
class Matrix:
    """W [d_out, d_in], a part of a weight.

    Attributes:
        weight: The parameter that it lies in.
        tensor: Tensor that it is kept in.
        dtype: Of that tensor.
        at: Where in the tensor.
        part: Where in the parameter.
        transposed: The parameter has the inputs along its rows.
    """

    weight: Weight
    tensor: str
    dtype: torch.dtype
    at: Index
    part: Index
    transposed: bool

    @property
    def name(self) -> str:
        """Name of the tensor, and the part of it where it is not the whole: `experts.down_proj[3]`, `w13[0, 0:64]`."""
        return part_name(self.tensor, self.at)

    @property
    def names(self) -> list[str]:
        """All that it may be called in options: as its parameter, its tensor, and itself."""
        return [self.weight.name, self.tensor, self.name]

    def read(self) -> Tensor:
        """W [d_out, d_in] in the dtype of the model; shares memory with the parameter."""
        part = self.weight.parameter.data[self.part]
        return part.T if self.transposed else part

    def rounded(self, W: Tensor) -> Tensor:
        """W [d_out, d_in] in the dtype of the model, with the values that it has in the dtype on disk.

        Zeros are +0.0. A kept weight that would vanish in one of the dtypes becomes the smallest number that does not.
        """
        dtypes = (self.weight.parameter.dtype, self.dtype)
        new = W.to(dtypes[0]).to(dtypes[1])
        smallest = max(torch.finfo(t).smallest_normal * torch.finfo(t).eps for t in dtypes)
        vanished = (new == 0) & (W != 0)
        new = torch.where(vanished, torch.copysign(torch.tensor(smallest, device=W.device), W).to(dtypes[1]), new)
        return torch.where(new == 0, 0, new).to(dtypes[0])


def part_name(tensor: str, at: Index) -> str:
    """Name of a part of a tensor, that of the tensor where it is the whole."""
    return tensor + (f"[{', '.join(map(_written, at))}]" if at else "")


def _written(index: Any) -> str:
    if isinstance(index, slice):
        start, stop, step = index.start or 0, "" if index.stop is None else index.stop, index.step
        return f"{start}:{stop}" + (f":{step}" if step else "")
    return str(index)


def tensor_of(name: str) -> str:
    """Tensor that a matrix of this name is kept in."""
    return re.sub(r"\[[\d:, ]+\]$", "", name)


def put(solved: list[tuple[Matrix, Tensor]]) -> None:
    """Put rounded matrices W [d_out, d_in] in their places in the model."""
    fresh: dict[str, tuple[Any, Tensor]] = {}  # all of it is made first: a lack of memory leaves the model as it was
    while solved:  # each W is let go of as soon as it is in its place
        matrix, W = solved.pop()
        weight, new = matrix.weight, W.T if matrix.transposed else W
        if matrix.part == ():
            fresh[weight.name] = weight.parameter, new.contiguous()
        else:  # what is loaded may be a view of the file
            if weight.name not in fresh:
                fresh[weight.name] = weight.parameter, weight.parameter.data.clone()
            fresh[weight.name][1][matrix.part] = new
    for parameter, new in fresh.values():
        parameter.data = new


def why_dense(path: str, module: nn.Module, leaf: str, parameter: Tensor) -> str | None:
    """Why a parameter of two or more dimensions is not to be pruned; None where that depends on its use."""
    if CHOOSERS.search(path):
        return "chooses between experts or tokens"
    for kind, holds in (
        ("a convolution", isinstance(module, CONVOLUTIONS)),
        ("an embedding", isinstance(module, nn.Embedding)),
        ("a bias", "bias" in leaf),
    ):
        if holds:
            return f"{kind} {list(parameter.shape)}"
    return _no_linear(module, parameter) if parameter.ndim > 3 or not parameter.is_floating_point() else None


def unused(weight: Weight) -> str:
    """Why a weight that was in no product that counts stays dense."""
    if isinstance(weight.module, (nn.Linear, Conv1D)):
        return "not used on text"
    return _no_linear(weight.module, weight.parameter)


def _no_linear(module: nn.Module, parameter: Tensor) -> str:
    return f"not a linear layer ({type(module).__name__} {list(parameter.shape)})"


def left_out(names: Sequence[str], config: PruneConfig) -> str | None:
    """Why the options leave what has these names dense; None where they do not."""
    if config.skip and any(re.search(config.skip, name) for name in names):
        return LEFT_OUT
    if config.only and not any(re.search(config.only, name) for name in names):
        return NOT_ONLY
    return None
