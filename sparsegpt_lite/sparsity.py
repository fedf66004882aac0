"""What is a pattern? How many weights of a matrix become zero, and where they may be.

N:M means N **kept** of M, as in NVIDIA's 2:4; SparseGPT's own code counts the pruned ones.
"""

import re
from dataclasses import dataclass

from sparsegpt_lite.errors import ConfigError


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere in a matrix: exactly `round(level * n)` of its n weights."""

    level: float

    def __post_init__(self) -> None:
        if not 0 <= self.level < 1:
            raise ConfigError(f"sparsity {self.level:g} is outside [0, 1): give a level such as 0.5")

    def __str__(self) -> str:
        return f"{self.level:g}"

    def zeros(self, d_out: int, d_in: int) -> int:
        """Number of zeros of a pruned [d_out, d_in] matrix."""
        return round(self.level * d_out * d_in)

    def misfit(self, d_in: int) -> str | None:
        """Say why rows of d_in weights cannot have this pattern; None where they can."""
        return None

    @property
    def sentence(self) -> str:
        """The pattern in words."""
        return f"{100 * self.level:g} % of the weights of every pruned matrix are zero, anywhere in it"


@dataclass(frozen=True)
class NofM:
    """In every group of `m` consecutive inputs of an output, at most `n` weights are not zero."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ConfigError(
                f"pattern {self.n}:{self.m} keeps {self.n} of {self.m} weights: N must be from 1 to M - 1"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def zeros(self, d_out: int, d_in: int) -> int:
        """Number of zeros of a pruned [d_out, d_in] matrix."""
        return d_out * (d_in // self.m) * (self.m - self.n)

    def misfit(self, d_in: int) -> str | None:
        """Say why rows of d_in weights cannot have this pattern; None where they can."""
        return f"{d_in} inputs are no multiple of {self.m}" if d_in % self.m else None

    @property
    def sentence(self) -> str:
        """The pattern in words."""
        return (
            f"{self.n} of every {self.m} consecutive inputs are kept, "
            f"{100 * (1 - self.n / self.m):g} % of the weights of every pruned matrix are zero"
        )


Sparsity = Unstructured | NofM


def parse(text: str | float | Sparsity) -> Sparsity:
    """Read a sparsity as the user writes it: `0.5`, `50%`, `2:4`.

    Raises:
        ConfigError: Anything else.
    """
    if isinstance(text, (Unstructured, NofM)):
        return text
    written = str(text).strip()
    if group := re.fullmatch(r"(\d{1,9}):(\d{1,9})", written):
        return NofM(int(group[1]), int(group[2]))
    try:
        return Unstructured(float(written[:-1]) / 100 if written.endswith("%") else float(written))
    except ValueError:
        raise ConfigError(
            f"unknown sparsity {written!r}: give a level such as 0.5 or a pattern such as 2:4 (2 kept of 4)"
        ) from None
