"""How well did it go? Per matrix and in all, as JSON and as a table for a person."""

import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparsegpt_lite.errors import CheckpointError, one_line
from sparsegpt_lite.sparsity import parse

FORMAT = 1
PACKAGES = ("sparsegpt_lite", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


@dataclass
class MatrixReport:
    """One pruned matrix.

    `error` is the mean squared error of the layer's output per token on the calibration inputs, summed over outputs,
    with the weights as written; `relative_error` is its ratio to the energy of the dense output; both are null for an
    expert that saw no token. `damping` is the fraction of the mean diagonal that the solver added to the Hessian, null
    where the method has none. `note` says what was done for a matrix that saw too few tokens.
    """

    name: str
    block: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    error: float | None
    relative_error: float | None
    tokens: int
    damping: float | None
    seconds: float
    note: str | None = None


@dataclass
class PruneReport:
    """What a run did; `sparsity.json` beside the pruned weights.

    `seconds` covers copying, forwards, solving and writing, of the last process where a run was resumed; the peaks are
    bytes, on the host those that no file backs. `checkpoint` is a digest of the source's layout and of samples of its
    weights, `batch_size` what the windows of a forward came down to, `resumed` the blocks that an earlier process had
    finished.
    """

    source: str
    command: str
    config: dict[str, Any]
    calibration: dict[str, Any]
    device: str
    dtype: str
    parameters: int
    checkpoint: str | None = None
    commit: str | None = None
    target: str | None = None
    matrices: list[MatrixReport] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    batch_size: int = 0
    activations: str = "host"
    resumed: int = 0
    seconds: float = 0.0
    peak_host_bytes: int = 0
    peak_device_bytes: int | None = None
    perplexity: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    format: int = FORMAT

    @property
    def pruned(self) -> int:
        """Weights in pruned matrices."""
        return sum(m.shape[0] * m.shape[1] for m in self.matrices)

    @property
    def zeros(self) -> int:
        """Zeros in pruned matrices."""
        return sum(m.zeros for m in self.matrices)

    def to_json(self) -> str:
        """The report as JSON text."""
        totals = {
            "pruned_weights": self.pruned,
            "zeros": self.zeros,
            "sparsity_of_pruned": self.zeros / self.pruned if self.pruned else 0.0,
            "sparsity_of_model": self.zeros / self.parameters,
        }
        return json.dumps({**asdict(self), "totals": totals}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> "PruneReport":
        """Read a report that `to_json` wrote.

        Raises:
            CheckpointError: It is none.
        """
        try:
            data = json.loads(path.read_bytes())
            data.pop("totals")
            rows = [MatrixReport(**(row | {"shape": tuple(row["shape"])})) for row in data.pop("matrices")]
            return cls(**data, matrices=rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: no report of ours ({one_line(error)}); choose another folder") from error

    def table(self) -> str:
        """A table with a line for each kind of matrix, and what the whole run came to."""
        kinds: dict[tuple[str, tuple[int, int]], list[MatrixReport]] = {}
        for matrix in self.matrices:
            kind = re.sub(r"(?<=[.\[ :])\d+(?=[].,:])", "*", matrix.name.removesuffix(".weight"))
            kinds.setdefault((kind, matrix.shape), []).append(matrix)
        rows = [("matrix", "count", "shape", "zeros", "error / energy: mean", "worst", "in")]
        for (kind, shape), group in kinds.items():
            zeros = sum(m.zeros for m in group) / (shape[0] * shape[1] * len(group))
            errors = [(m.relative_error, m.block) for m in group if m.relative_error is not None]
            worst = max(errors, default=(float("nan"), "-"))
            mean = sum(error for error, _ in errors) / len(errors) if errors else float("nan")
            rows.append((kind, str(len(group)), f"{shape[0]} x {shape[1]}", f"{zeros:.2%}", f"{mean:.4f}",
                         f"{worst[0]:.4f}", worst[1]))  # fmt: skip
        lines = [aligned(rows, left=(0, 6)), "", f"{parse(self.config['sparsity']).sentence}.", *self._summary()]
        lines += [f"Perplexity on {p['dataset']}: {p['model']} {p['perplexity']:.4f}." for p in self.perplexity]
        if self.target:
            lines.append(f"Written to {self.target}")
        return "\n".join(lines)

    def _summary(self) -> list[str]:
        """What was pruned from what, what was out of the ordinary, and what it cost."""
        share, whole, text = self.zeros / max(1, self.pruned), self.zeros / self.parameters, self.calibration
        lines = [
            f"{len(self.matrices)} matrices pruned with {self.config['method']}: {self.zeros:,} of {self.pruned:,} "
            f"weights are zero ({share:.2%}), {whole:.2%} of the model.",
            f"Calibrated on {text['windows']} windows of {text['seqlen']} tokens from {text['dataset']} "
            f"({text['split']}, digest {text['digest'][:12]}).",
        ]
        raised = [m for m in self.matrices if m.damping is not None and m.damping > self.config["damping"]]
        if raised:
            lines.append(f"Damping raised for {len(raised)} matrices, {raised[0].name} first ({raised[0].damping:g}).")
        noted = [m for m in self.matrices if m.note]
        if noted:
            lines.append(f"Few tokens for {len(noted)} matrices, {noted[0].name} first ({noted[0].note}).")
        if self.dense:
            reasons = Counter(re.sub(r" \(.*|\[.*", "", reason) for reason in self.dense.values())
            counted = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
            lines.append(f"Left dense: {len(self.dense)} other weights ({counted}).")
        if self.batch_size < min(self.config["batch_size"], text["windows"]):
            lines.append(f"Out of memory on the device: went on with batches of {self.batch_size}.")
        if self.resumed:
            lines.append(f"Finished by an earlier process: {self.resumed} of the blocks.")
        memory = f"{self.peak_host_bytes / 2**20:,.0f} MiB of memory"
        if self.peak_device_bytes is not None:
            memory += f", {self.peak_device_bytes / 2**20:,.0f} MiB on {self.device}"
        lines.append(f"{self.seconds:.1f} s, peak {memory}; activations on the {self.activations}.")
        return lines


def aligned(rows: Sequence[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> str:
    """Lay rows out in columns, numbers to the right, a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the result."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
