"""What zeros does a checkpoint hold? Read from its bytes alone: no model code, one tensor in memory at a time."""

import re
from contextlib import suppress
from typing import Any

from torch import Tensor

from sparsegpt_lite.checkpoint import DTYPES, REPORT, Checkpoint, read_json
from sparsegpt_lite.errors import SparseGPTError, printable
from sparsegpt_lite.masks import obeys
from sparsegpt_lite.report import aligned
from sparsegpt_lite.sparsity import NofM, parse

PATTERNS = (NofM(1, 4), NofM(2, 8), NofM(1, 2), NofM(2, 4), NofM(4, 8))  # the stricter ones first


def inspect(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Describe every floating-point tensor of two or more dimensions.

    Returns:
        One dict a tensor: name, shape, dtype, zeros, negative_zeros, sparsity, and `pattern`: the N:M pattern it obeys,
        along its last dimension or, as GPT-2's layers lie, `transposed`; null where it obeys none.
    """
    found = []
    patterns = _patterns(checkpoint)
    for name, entry in sorted(checkpoint.entries.items()):
        if len(entry.shape) < 2 or entry.dtype not in DTYPES or not DTYPES[entry.dtype].is_floating_point:
            continue
        W = checkpoint.read(name)
        zero = W == 0
        zeros = int(zero.sum())
        found.append({
            "name": name,
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "zeros": zeros,
            "negative_zeros": int((zero & W.signbit()).sum()) if zeros else 0,
            "sparsity": zeros / entry.numel if entry.numel else 0.0,
            "pattern": _pattern(W, zeros / entry.numel, patterns) if zeros else None,
        })  # fmt: skip
    return found


def _patterns(checkpoint: Checkpoint) -> list[NofM]:
    """Patterns to look for: the one that our report names, if there is one, and the usual ones."""
    report, named = checkpoint.folder / REPORT, None
    with suppress(SparseGPTError, LookupError, TypeError):  # it is none of ours
        named = parse(read_json(report)["config"]["sparsity"]) if report.is_file() else None
    return [*([named] if isinstance(named, NofM) else []), *PATTERNS]


def _pattern(W: Tensor, sparsity: float, patterns: list[NofM]) -> str | None:
    """First N:M pattern that all rows obey, or all columns."""
    for pattern in patterns:
        if sparsity < 1 - pattern.n / pattern.m - 1e-9:
            continue
        if obeys(W.flatten(0, -2), pattern):
            return str(pattern)
        if obeys(W.mT.flatten(0, -2), pattern):
            return f"{pattern} transposed"
    return None


def table(found: list[dict[str, Any]], every: bool = False) -> str:
    """Lay tensors out as a table, one line for each kind, or for each tensor."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for tensor in found:
        kind = tensor["name"] if every else re.sub(r"(^|\.)\d+\.", r"\1*.", tensor["name"])
        groups.setdefault((kind, tuple(tensor["shape"]), tensor["dtype"], tensor["pattern"]), []).append(tensor)
    rows = [("tensor", "count", "shape", "dtype", "zeros: mean", "min", "max", "pattern")]
    for (kind, shape, dtype, pattern), group in groups.items():
        levels = [t["sparsity"] for t in group]
        rows.append((printable(kind), str(len(group)), " x ".join(map(str, shape)), dtype,
                     f"{sum(levels) / len(levels):.2%}", f"{min(levels):.2%}", f"{max(levels):.2%}",
                     pattern or "-"))  # fmt: skip
    zeros, weights = sum(t["zeros"] for t in found), sum(_numel(t) for t in found)
    sparse = [t for t in found if t["pattern"] or t["sparsity"] >= 0.1]
    lines = [aligned(rows, left=(0, 7)), ""]
    lines.append(
        f"{len(sparse)} of {len(found)} matrices are sparse; {zeros:,} of {weights:,} weights in matrices are zero "
        f"({zeros / max(1, weights):.2%})."
    )
    for pattern in sorted({t["pattern"] for t in found if t["pattern"]}):
        count = sum(t["pattern"] == pattern for t in found)
        n, m = map(int, pattern.split()[0].split(":"))
        lines.append(f"{count} obey {pattern}: at least {m - n} of every {m} consecutive inputs are zero.")
    if negative := sum(t["negative_zeros"] for t in found):
        lines.append(f"{negative:,} zeros are -0.0, which some kernels take for weights.")
    return "\n".join(lines)


def _numel(tensor: dict[str, Any]) -> int:
    count = 1
    for size in tensor["shape"]:
        count *= size
    return count
