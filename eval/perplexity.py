"""How surprised is a model by text it has not seen? The papers' perplexity, streamed block by block.

Protocol of GPTQ, SparseGPT and Wanda: the test text is one text, its documents joined by blank lines (C4's by a space),
tokenized once with the tokenizer's own opening token, cut into windows of seqlen that do not overlap; the incomplete
last one is left out. Each window predicts seqlen - 1 tokens; perplexity is exp of the mean over all of them.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from sparsegpt_lite.activations import SuspendedForwards
from sparsegpt_lite.blocks import (
    BlockModel,
    LoadedModel,
    StreamedModel,
    device_name,
    loading,
    pick_device,
    pick_dtype,
)
from sparsegpt_lite.calibration import Windows, check_vocabulary, cut, load_tokenizer, open_text, window_length
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.config import EvalConfig
from sparsegpt_lite.errors import CalibrationError
from sparsegpt_lite.report import aligned, installed_versions

PASS = 256  # windows
SPLITS = {"c4": "validation", "allenai/c4": "validation"}


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and everything that it depends on.

    `nll` is the mean negative log-likelihood in nats per predicted token, `tokens` their number; `data` describes the
    windows, with their digest.
    """

    model: str
    perplexity: float
    nll: float
    tokens: int
    data: dict[str, Any]
    dtype: str
    device: str
    seconds: float
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the data's fields beside the others."""
        fields = asdict(self)
        data = fields.pop("data")
        return {**{k: v for k, v in data.items() if k != "tokens"}, **fields}


def perplexity(
    model: str | Path | PreTrainedModel,
    config: EvalConfig | None = None,
    *,
    windows: Windows | None = None,
    progress: bool = False,
) -> Perplexity:
    """Measure the perplexity of a checkpoint, one block in memory at a time, or of a loaded model.

    Args:
        model: Folder, Hub id, or a model of transformers.
        config: What to evaluate on.
        windows: Windows to evaluate in place of the config's text; needed for a loaded model.
        progress: Draw a bar on stderr.

    Raises:
        SparseGPTError: The model or the text cannot be loaded, or the result is not a number.
    """
    config = config or EvalConfig()
    started = time.monotonic()
    if isinstance(model, PreTrainedModel):
        if windows is None:
            raise CalibrationError("a model in memory has no tokenizer beside it: give the windows")
        loaded: BlockModel = LoadedModel(model)
        name = model.name_or_path or type(model).__name__
    else:
        checkpoint = Checkpoint(model, config.revision)
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        streamed = StreamedModel(checkpoint, device, dtype, config.trust_remote_code)
        windows = windows or evaluation_windows(checkpoint, streamed.module.config, config)
        streamed.load_outer(head=True)
        loaded, name = streamed, str(model)
    check_vocabulary(windows, loaded.module.config)
    with loaded if isinstance(loaded, LoadedModel) else nullcontext():
        losses = window_losses(loaded, windows.tokens, config.batch_size, progress)  # [windows]
    predicted = windows.tokens.shape[0] * (windows.tokens.shape[1] - 1)
    nll = float(losses.sum()) / predicted
    if not math.isfinite(nll):
        broken = int((~losses.isfinite()).sum())
        raise CalibrationError(f"{name}: the loss of {broken} windows is NaN or infinite; try --dtype float32")
    return Perplexity(
        model=name,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=predicted,
        data=windows.describe(),
        dtype=str(loaded.module.dtype).removeprefix("torch."),
        device=device_name(loaded.device),
        seconds=time.monotonic() - started,
        versions=installed_versions(),
    )


def comparison(results: list[Perplexity]) -> str:
    """Lay results on the same windows out as a table, the first one the baseline of the others."""
    rows = [("model", "perplexity", "nll", "ln ratio to the first")]
    for result in results:
        gap = "" if result is results[0] else f"{result.nll - results[0].nll:+.4f}"
        rows.append((result.model, f"{result.perplexity:.4f}", f"{result.nll:.5f}", gap))
    text = results[0].data
    return (
        f"{aligned(rows)}\n\n{text['windows']} windows of {text['seqlen']} tokens from {text['dataset']} "
        f"({text['split']}), {results[0].tokens:,} predicted; opening token once per {text['bos']}; "
        f"{results[0].dtype} on {results[0].device}; digest {text['digest'][:12]}"
    )


def evaluation_windows(checkpoint: Checkpoint, model_config: Any, config: EvalConfig) -> Windows:
    """Windows that a config asks for, by the tokenizer of a checkpoint."""
    tokenizer = load_tokenizer(checkpoint, config.trust_remote_code)
    split = config.split or SPLITS.get(config.dataset.partition(":")[0], "test")
    text = open_text(config.dataset, split, config.text_column)
    return cut(text, tokenizer, window_length(config.seqlen, model_config), config.windows, config.bos)


def window_losses(model: BlockModel, tokens: Tensor, batch_size: int, progress: bool) -> Tensor:
    """Summed negative log-likelihood of each window in nats: int64 [windows, seqlen] -> fp64 [windows], on the CPU.

    At most PASS windows are under way together, which bounds the memory; for more, the model is read again.
    """
    losses, passes = [], tokens.split(PASS)
    bar = tqdm(
        total=len(passes) * len(model.blocks), desc="evaluating", unit="block", disable=not progress, file=sys.stderr
    )
    with bar:
        for some in passes:
            forwards = [partial(_forward, model, batch) for batch in some.split(batch_size)]
            with SuspendedForwards(model.blocks, forwards) as suspended:
                while (block := suspended.block) is not None:
                    with loading(model, block):
                        suspended.advance()
                    bar.update()
            losses += suspended.results
    return torch.cat(losses)


def _forward(model: BlockModel, batch: Tensor) -> Tensor:
    ids = batch.to(model.device)
    logits = model.module(input_ids=ids, use_cache=False).logits  # [batch, seqlen, vocab]
    pairs = zip(logits, ids, strict=True)  # one window at a time: logits in fp32 are the largest tensor of all
    return torch.stack([cross_entropy(row[:-1].float(), w[1:], reduction="sum") for row, w in pairs]).double().cpu()
