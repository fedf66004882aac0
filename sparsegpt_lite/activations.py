"""What goes into block k? The model's own forward, suspended at each block.

Each forward runs in a greenlet of its own and pauses inside each block call; whoever drives it may run the block as
often as it likes, then hands the block's output over and the forward goes on to its next block call. Masks, rotary
embeddings, shared keys and whatever else flows past the blocks stay the model's own business.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from sparsegpt_lite.errors import ModelError, SparseGPTError, one_line


@dataclass
class BlockCall:
    """A block call that waits for its output."""

    block: str
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inward: Callable[[Any], Any]

    def run(self) -> Any:
        """Run the block on what it was called with."""
        args, kwargs = self.inward((self.args, self.kwargs))
        with running(self.block):
            return self.forward(*args, **kwargs)


@contextmanager
def running(module: str) -> Iterator[None]:
    """Make one line of ours of what a model raises whose config.json builds it, but does not let it run.

    Raises:
        ModelError: In place of whatever it was; errors of ours and a lack of memory stay what they are.
    """
    try:
        yield
    except (SparseGPTError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if any(words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED")):
            raise
        raise ModelError(
            f"{module}: cannot be run ({type(error).__name__}: {one_line(error)}); compare config.json with that of "
            f"the base model, and if it is the same, update transformers"
        ) from error


def _stay(tree: Any) -> Any:
    return tree


class SuspendedForwards:
    """Several forwards of one model that move from block to block together, without gradients.

    Example:
        with SuspendedForwards(blocks, forwards) as suspended:
            while (block := suspended.block) is not None:
                ...                  # look at suspended.calls, run them as often as needed
                suspended.advance()
            results = suspended.results
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        forwards: Sequence[Callable[[], Any]],
        inward: Callable[[Any], Any] = _stay,
        outward: Callable[[Any], Any] = _stay,
    ) -> None:
        """Prepare the forwards; they start when the context is entered.

        Args:
            blocks: Modules to pause at, by name.
            forwards: Functions that run the model, one per batch.
            inward: Moves what a block is called with to where the block is.
            outward: Moves what it returns to where that waits for the next block.
        """
        self.blocks, self._inward, self._outward = blocks, inward, outward
        self.results: list[Any] = [None] * len(forwards)
        self.visited: list[str] = []
        self._main = getcurrent()
        self._greenlets = [greenlet(forward) for forward in forwards]
        self._waiting: list[BlockCall | None] = [None] * len(forwards)

    def __enter__(self) -> "SuspendedForwards":
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()
        self._own_forward: dict[str, Any] = {name: block.__dict__.get("forward") for name, block in self.blocks.items()}
        for name, block in self.blocks.items():
            block.forward = self._pause(name, block.forward)
        try:
            for i in range(len(self._greenlets)):
                self._switch(i)
            self._agree()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for paused in self._greenlets:
            if paused:  # started and not finished: unwind it
                paused.throw(GreenletExit)
        for name, block in self.blocks.items():
            del block.forward
            if self._own_forward[name] is not None:  # set on the instance by someone before us
                block.forward = self._own_forward[name]
        self._no_grad.__exit__(None, None, None)

    def _pause(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def paused(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() is self._main:  # called by a block that is being run
                return forward(*args, **kwargs)
            return self._main.switch(BlockCall(name, forward, args, kwargs, self._inward))

        return paused

    def _switch(self, i: int, *output: Any) -> None:
        """Let forward i run to its next block call, or to its end."""
        came = self._greenlets[i].switch(*output)
        if self._greenlets[i].dead:
            self.results[i], self._waiting[i] = came, None
        else:
            self._waiting[i] = came

    def _agree(self) -> None:
        names = {call.block if call else None for call in self._waiting}
        if len(names) > 1:
            raise ModelError(f"batches went different ways through the model: {sorted(map(str, names))}")
        self.block: str | None = names.pop() if names else None
        if self.block is not None and self.block not in self.visited:
            self.visited.append(self.block)

    @property
    def calls(self) -> list[BlockCall]:
        """The waiting calls of the current block, one per forward."""
        return [call for call in self._waiting if call is not None]

    def advance(self) -> None:
        """Run the current block for every forward and let each go on to its next block call or its end.

        A model may call a block again later; `visited` has each once.
        """
        for i in range(len(self._waiting)):
            call = self._waiting[i]
            if call is not None:
                output = self._outward(call.run())
                self._waiting[i] = call = None  # frees the block's inputs before the forward goes on
                self._switch(i, output)
        self._agree()
