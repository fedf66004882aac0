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
FEW_TOKENS = ("all", "magnitude")
ACTIVATIONS = ("auto", "device", "host", "disk")

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
    only: MaybeStr = None
    """Prune no other weights than those whose name matches this regular expression."""
    blocks: MaybeStr = None
    """Prune these blocks only, counted from 0 in the order in which the model calls them: 0-11, or 0,2,5-7."""
    few_tokens: str = "all"
    """What prunes an expert that saw too few tokens: the Hessian of all tokens (all), or magnitude."""
    token_floor: float = 0.25
    """Too few are fewer tokens than this times the inputs of the matrix."""
    hessian_gib: float = 4.0
    """Memory for Hessians that are held together, in GiB; a block with more is run several times."""
    batch_size: int = 8
    """Windows per forward; halved when the device runs out of memory."""
    activations: str = "auto"
    """Where activations wait for the next block: device, host or disk; auto takes the first with room for them."""
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
        _one_of(self, "few_tokens", FEW_TOKENS)
        _one_of(self, "activations", ACTIVATIONS)
        if self.text == "":  # of a variable of the shell that is not set
            raise ConfigError("--text: is empty; give a file, or leave it out")
        if not self.token_floor >= 0:
            raise ConfigError(f"--token-floor {self.token_floor:g}: must be at least 0")
        if not self.hessian_gib > 0:
            raise ConfigError(f"--hessian-gib {self.hessian_gib:g}: must be above 0")
        block_numbers(self.blocks)
        if not 0 <= self.damping < 1e3:
            raise ConfigError(f"--damping {self.damping:g}: must be a fraction of the mean diagonal, such as 0.01")
        for name in ("skip", "only"):
            pattern = getattr(self, name)
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ConfigError(f"--{name} {pattern}: not a regular expression ({error}); correct it") from error


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


def block_numbers(blocks: str | None) -> frozenset[int] | None:
    """Numbers of a `--blocks` option such as 0-11 or 0,2,5-7; None for all.

    Raises:
        ConfigError: Not of that form.
    """
    if blocks is None:
        return None
    numbers: set[int] = set()
    for part in blocks.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"--blocks {blocks}: no numbers of blocks; write them as 0-11 or 0,2,5-7")
        numbers |= set(range(first, last + 1))
    return frozenset(numbers)


def _at_least(config: object, **lowest: int) -> None:
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not low <= value < 2**63:
            limit = f"at least {low}" if value < low else "below 2**63"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {limit}")


def _one_of(config: object, name: str, choices: tuple[str, ...]) -> None:
    if (value := getattr(config, name)) not in choices:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: unknown; choose from {', '.join(choices)}")
