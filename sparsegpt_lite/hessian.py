"""What did this layer see? Mean of x xᵀ over the calibration tokens, one for all layers that share an input."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt_lite.errors import CalibrationError, ModelError

Slot = tuple[str, int]  # the layer that saw an input first within a block call, and for which time it was called


@dataclass
class Moments:
    """Sum of x xᵀ over `tokens` inputs x: fp32 [d_in, d_in]."""

    sum: Tensor
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Add inputs [..., d_in] of any floating dtype."""
        X = x.reshape(-1, x.shape[-1]).float()  # [tokens, d_in]
        self.sum.addmm_(X.T, X)
        self.tokens += len(X)


@dataclass
class Observer:
    """Watches the inputs of layers while it is in context; `start_call` goes before each call of their block.

    Layers that are given the very same tensor, as q, k and v are, share one sum. A layer that is called twice within
    a block call has the sum of both.
    """

    layers: Mapping[str, tuple[nn.Module, int]]  # name -> module, d_in
    _moments: dict[Slot, Moments] = field(default_factory=dict)
    _sharing: dict[Slot, list[str]] = field(default_factory=dict)  # the layers that are given the input of a slot
    _call: dict[Slot, tuple[Tensor, int, list[str]]] = field(default_factory=dict)  # input, its version, its layers

    def __enter__(self) -> "Observer":
        self._hooks = [
            module.register_forward_pre_hook(self._hook(name, d_in), with_kwargs=True)
            for name, (module, d_in) in self.layers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if error is None:
            self._end_call()
        self._call.clear()

    def start_call(self) -> None:
        """Forget the tensors of the previous block call. A layer may rest in a call, as experts do."""
        self._end_call()
        self._call = {}

    def _end_call(self) -> None:
        for slot, (_, _, names) in self._call.items():
            if self._sharing.setdefault(slot, names) != names:
                raise ModelError(f"{slot[0]}: shares its inputs in one batch only; leave it dense with --skip")

    def _hook(self, name: str, d_in: int) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(x, Tensor) or x.shape[-1] != d_in:
                return
            version = 0 if x.is_inference() else x._version  # tells whether x was changed in place
            for seen, seen_version, names in self._call.values():
                if seen is x and seen_version == version:
                    names.append(name)
                    return
            slot = (name, sum(first == name for first, _ in self._call))
            self._call[slot] = (x, version, [name])
            if slot not in self._moments:
                self._moments[slot] = Moments(torch.zeros(d_in, d_in, dtype=torch.float32, device=x.device))
            self._moments[slot].add(x)

        return observe

    def groups(self) -> dict[tuple[Slot, ...], list[str]]:
        """Layers that saw tokens, those that share their inputs together."""
        groups: dict[tuple[Slot, ...], list[str]] = {}
        for name in self.layers:
            slots = tuple(slot for slot, names in self._sharing.items() for n in names if n == name)
            if any(self._moments[slot].tokens for slot in slots):
                groups.setdefault(slots, []).append(name)
        return groups

    def hessian(self, group: tuple[Slot, ...]) -> tuple[Tensor, int]:
        """Mean of x xᵀ of a group, fp32 [d_in, d_in], and the number of tokens behind it.

        Raises:
            CalibrationError: The inputs held NaN or infinity.
        """
        parts = [self._moments[slot] for slot in group]
        tokens = sum(part.tokens for part in parts)
        total = parts[0].sum if len(parts) == 1 else torch.stack([part.sum for part in parts]).sum(0)
        H = total / tokens
        if not bool(H.isfinite().all()):
            raise CalibrationError(
                f"{group[0][0]}: its inputs hold NaN or infinity; try --dtype float32, or look at the model's weights"
            )
        return H, tokens
