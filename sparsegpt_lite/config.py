"""What did the user ask? One dataclass per job is the source of flags, help, Python API and report."""

import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from sparsegpt_lite import sparsity
from sparsegpt_lite.errors import ConfigError

METHOD_NAMES = ("magnitude", "wanda", "sparsegpt")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
BOS_RULES = ("text", "document", "window")

MaybeStr = Annotated[str | None, tyro.conf.arg(metavar="STR")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclass(frozen=True)
class PruneConfig:
    """How to prune a model."""

    sparsity: str = "0.5"
    """Level (0.5, 50%) or pattern N:M with N kept of M (2:4, 4:8)."""
    method: str = "sparsegpt"
    """magnitude, wanda or sparsegpt."""
    dataset: str = "allenai/c4"
    """Calibration text from the Hub: a data set id, or org/name:config."""
    text: MaybeStr = None
    """Calibration text from a file instead: .txt (lines of <|endoftext|> part documents), .json, .jsonl, .parquet."""
    text_column: str = "text"
    """Column that holds the text."""
    nsamples: int = 128
    """Calibration windows."""
    seqlen: MaybeInt = None
    """Tokens per window; min(2048, the model's maximum) by default."""
    seed: int = 0
    """Chooses the calibration windows."""
    digest: MaybeStr = None
    """Refuse to calibrate on other tokens than those of this digest, as a report has it."""
    damping: float = 0.01
    """Fraction of the mean diagonal of the Hessian that is added to it."""
    block_size: int = 128
    """Columns whose mask is chosen together by sparsegpt."""
    skip: MaybeStr = None
    """Leave weights dense whose name matches this regular expression."""
    batch_size: int = 8
    """Windows per forward."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes CUDA where there is one."""
    dtype: str = "auto"
    """Of the model while it is pruned: float32, bfloat16, float16; auto takes that of the weights on disk."""
    revision: MaybeStr = None
    """Branch, tag or commit of the model on the Hub."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        sparsity.parse(self.sparsity)
        _one_of(self, "method", METHOD_NAMES)
        _at_least(self, nsamples=1, block_size=1, batch_size=1, seqlen=2, seed=0)
        _one_of(self, "dtype", DTYPE_NAMES)
        if not 0 <= self.damping < 1e3:
            raise ConfigError(f"--damping {self.damping:g}: must be a fraction of the mean diagonal, such as 0.01")
        if self.skip is not None:
            try:
                re.compile(self.skip)
            except re.error as error:
                raise ConfigError(f"--skip {self.skip}: not a regular expression ({error}); correct it") from error


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate on."""

    dataset: str = "wikitext2"
    """wikitext2, c4, another data set of the Hub (org/name or org/name:config), or a text file."""
    split: MaybeStr = None
    """Split of a data set of the Hub; the papers' by default: test, for C4 validation."""
    text_column: str = "text"
    """Column that holds the text."""
    seqlen: MaybeInt = None
    """Tokens per window; min(2048, the model's maximum) by default."""
    windows: MaybeInt = None
    """Evaluate so many windows at most, from the start."""
    bos: str = "text"
    """The tokenizer's opening token stands once before the whole text (text, the papers' rule), before each document
    (document) or before each window (window)."""
    batch_size: int = 1
    """Windows per forward."""
    device: str = "auto"
    """cuda, cuda:1 or cpu; auto takes CUDA where there is one."""
    dtype: str = "auto"
    """float32, bfloat16, float16; auto takes that of the weights on disk."""
    revision: MaybeStr = None
    """Branch, tag or commit of the model on the Hub."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        _at_least(self, seqlen=2, windows=1, batch_size=1)
        _one_of(self, "dtype", DTYPE_NAMES)
        _one_of(self, "bos", BOS_RULES)


def _at_least(config: object, **lowest: int) -> None:
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {low}")


def _one_of(config: object, name: str, choices: tuple[str, ...]) -> None:
    if (value := getattr(config, name)) not in choices:
        raise ConfigError(f"--{name} {value}: unknown; choose from {', '.join(choices)}")
