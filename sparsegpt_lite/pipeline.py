"""In what order? Blocks from the checkpoint, one at a time: observe, solve, write, and feed the next one."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sparsegpt_lite import memory
from sparsegpt_lite.activations import BlockCall, SuspendedForwards
from sparsegpt_lite.blocks import (
    LEFT_OUT,
    BlockModel,
    LoadedModel,
    Matrix,
    StreamedModel,
    device_name,
    matrices,
    pick_device,
    pick_dtype,
)
from sparsegpt_lite.calibration import Windows, check_vocabulary, draw, load_tokenizer, open_text, window_length
from sparsegpt_lite.checkpoint import REPORT, Checkpoint, Writer, check_target
from sparsegpt_lite.config import PruneConfig
from sparsegpt_lite.errors import CalibrationError, ConfigError, ModelError, SparseGPTError
from sparsegpt_lite.hessian import Observer
from sparsegpt_lite.methods import prune_layer
from sparsegpt_lite.report import MatrixReport, PruneReport
from sparsegpt_lite.solver import reconstruction_error
from sparsegpt_lite.sparsity import parse


def prune(  # noqa: PLR0913, the public door
    source: str | Path,
    target: str | Path,
    config: PruneConfig | None = None,
    *,
    calibration: Windows | None = None,
    evaluate: Callable[[str], dict[str, Any]] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> PruneReport:
    """Prune a checkpoint into another, holding one decoder block in memory at a time.

    Args:
        source: Folder or Hub id of a decoder-only model of transformers, with safetensors weights.
        target: Output folder, absent or empty; it gets its files when all of them are complete.
        config: What to do.
        calibration: Windows to calibrate on in place of `config.dataset` and `config.text`.
        evaluate: Called with the source once all else is checked, and with the target at the end; what it returns goes
            into the report.
        overwrite: Replace an earlier output of ours.
        progress: Draw a bar on stderr.

    Returns:
        The report, which is `sparsity.json` in the target too.

    Raises:
        SparseGPTError: One of its kinds, with a message of one line.

    Example:
        >>> report = prune("meta-llama/Llama-3.1-8B", "llama-2of4", PruneConfig(sparsity="2:4"))
    """
    config, target = config or PruneConfig(), Path(target).expanduser()
    device = pick_device(config.device)
    checkpoint = Checkpoint(source, config.revision)
    check_target(checkpoint, target, overwrite)
    model = StreamedModel(checkpoint, device, pick_dtype(config.dtype), config.trust_remote_code)
    check_shapes(model, config)
    calibration = calibration or calibrate(checkpoint, model.module.config, config)
    report = new_report(model, str(source), calibration, config)
    report.commit = checkpoint.commit
    report.perplexity = [evaluate(str(source))] if evaluate else []
    started = time.monotonic()
    run = {"source": str(checkpoint.folder), "config": report.config, "calibration": calibration.digest}
    with Writer(checkpoint, target, run, overwrite) as writer:

        def write(block: str, rows: list[MatrixReport]) -> None:
            writer.write(block, model.on_disk({row.name for row in rows}), {"matrices": [*map(asdict, rows)]})

        with memory.PeakMemory(device) as peak:
            model.load_outer(head=False)
            prune_blocks(model, calibration.tokens, config, report, write, progress)
        for row in report.matrices:
            row.name = model.disk_name(row.name)
        report.dense = {model.disk_name(name): reason for name, reason in report.dense.items()}
        report.dense |= dict.fromkeys(model.surplus(), "not in the model that config.json describes")
        report.peak_host_bytes, report.peak_device_bytes = peak.host, peak.device
        report.target, report.seconds = str(target), time.monotonic() - started
        writer.finish({REPORT: report.to_json()})
    if evaluate:
        report.perplexity.append(evaluate(str(target)))
        (target / REPORT).write_text(report.to_json(), encoding="utf-8")
    return report


def prune_model(
    model: PreTrainedModel, tokens: Tensor, config: PruneConfig | None = None, *, progress: bool = False
) -> PruneReport:
    """Prune a model that is in memory, in place.

    Args:
        model: A decoder-only model of transformers.
        tokens: Calibration windows, int64 [nsamples, seqlen].
        config: What to do; its fields about text, device and dtype are not used.
        progress: Draw a bar on stderr.

    Returns:
        The report.

    Raises:
        SparseGPTError: Tokens that the model does not know, a pattern that does not fit, a layer that cannot be solved.
    """
    config, loaded = config or PruneConfig(), LoadedModel(model)
    calibration = Windows(tokens, "given tokens", "-", "as given")
    check_vocabulary(calibration, model.config)
    check_shapes(loaded, config)
    report = new_report(loaded, model.name_or_path or type(model).__name__, calibration, config)
    started = time.monotonic()
    with loaded, memory.PeakMemory(loaded.device) as peak:
        prune_blocks(loaded, tokens, config, report, lambda block, rows: None, progress)
    report.seconds = time.monotonic() - started
    report.peak_host_bytes, report.peak_device_bytes = peak.host, peak.device
    return report


def prune_blocks(
    model: BlockModel,
    tokens: Tensor,
    config: PruneConfig,
    report: PruneReport,
    write: Callable[[str, list[MatrixReport]], None],
    progress: bool,
) -> None:
    """The loop: every block sees what the pruned blocks before it give, is solved from that, written, and passed on.

    Args:
        model: Blocks that can be loaded and dropped.
        tokens: int64 [nsamples, seqlen].
        config: What to do.
        report: Gets a row for each matrix.
        write: Called with a block and its rows while the pruned block is still loaded.
        progress: Draw a bar on stderr.
    """
    forwards = [partial(calibration_forward, model, batch) for batch in tokens.split(config.batch_size)]
    with (
        full_fp32(),
        SuspendedForwards(model.blocks, forwards) as suspended,
        tqdm(total=len(model.blocks), desc="pruning", unit="block", disable=not progress, file=sys.stderr) as bar,
    ):
        while (block := suspended.block) is not None:
            model.load(block)
            found, dense = matrices(model, block, config.skip)
            rows = []
            for seen in observed(found, suspended.calls):
                started = time.monotonic()
                W = seen.matrix.read().float()  # [d_out, d_in]
                with naming(seen.matrix.name):
                    solution = prune_layer(W, seen.H, config.sparsity, config.method, config.damping, config.block_size)
                seen.matrix.replace(solution.W)
                rows.append(row(seen, block, W, solution.damping, config, time.monotonic() - started))
                del seen, W, solution  # before the next block comes
            pruned = {row.name for row in rows}
            report.matrices += rows
            report.dense |= dense | {m.name: "not used on text" for m in found if m.name not in pruned}
            write(block, rows)
            suspended.advance()
            model.drop(block)
            memory.give_back()
            bar.update()
    report.dense |= dict.fromkeys(model.blocks.keys() - suspended.visited, "a block that is not used on text")
    if not report.matrices:
        reason = next(iter(report.dense.values()), "it has none")
        raise ModelError(f"{report.source}: no matrix can be pruned ({reason}); choose another model")


class Seen(NamedTuple):
    """A matrix and the moments of its inputs: H fp32 [d_in, d_in], the mean of x xᵀ over `tokens` inputs."""

    matrix: Matrix
    H: Tensor
    tokens: int


def observed(found: list[Matrix], calls: list[BlockCall]) -> Iterator[Seen]:
    """Run the waiting calls of a dense block; give every matrix that was used, with what it saw."""
    for matrix in found:
        if not bool(matrix.read().isfinite().all()):
            raise ModelError(f"{matrix.name}: the weights hold NaN or infinity; fetch the checkpoint again")
    with Observer({matrix.name: (matrix.module, matrix.d_in) for matrix in found}) as observer:
        for call in calls:
            observer.start_call()
            call.run()
    by_name = {matrix.name: matrix for matrix in found}
    for group, members in observer.groups().items():
        H, tokens = observer.hessian(group)
        for member in members:
            yield Seen(by_name[member], H, tokens)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Keep fp32 products in fp32 on CUDA, whatever the environment says of TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def naming(matrix: str) -> Iterator[None]:
    """Put the name of a matrix before an error."""
    try:
        yield
    except SparseGPTError as error:
        raise type(error)(f"{matrix}: {error}") from error


def row(seen: Seen, block: str, W: Tensor, damping: float | None, config: PruneConfig, seconds: float) -> MatrixReport:
    """Describe a matrix whose dense weights were W; the error is that of the new ones as they are stored."""
    matrix, H = seen.matrix, seen.H
    W_hat = matrix.read().float()
    error, energy = reconstruction_error(W, W_hat, H), reconstruction_error(W, torch.zeros_like(W), H)
    return MatrixReport(
        name=matrix.name,
        block=block,
        shape=(matrix.d_out, matrix.d_in),
        pattern=str(parse(config.sparsity)),
        zeros=int((W_hat == 0).sum()),
        error=error,
        relative_error=error / energy if energy > 0 else 0.0,
        tokens=seen.tokens,
        damping=damping,
        seconds=seconds,
    )


class _BeforeHeadError(Exception):
    """Ends a calibration forward where only the output layer is left to run."""


def calibration_forward(model: BlockModel, batch: Tensor) -> None:
    """Run the model up to its output layer, which calibration does not need and the skeleton has not loaded."""

    def stop(*_: Any) -> None:
        raise _BeforeHeadError

    head = model.module.get_output_embeddings()
    hook = head.register_forward_pre_hook(stop) if head is not None else None
    try:
        model.module(input_ids=batch.to(model.device), use_cache=False)
    except _BeforeHeadError:
        pass
    finally:
        if hook is not None:
            hook.remove()


def check_shapes(model: BlockModel, config: PruneConfig) -> None:
    """Refuse a pattern that some matrix cannot have, before anything is read.

    Raises:
        ConfigError: Naming the first such matrix; or `skip` leaves nothing to prune, or matches nothing.
    """
    pattern = parse(config.sparsity)
    listed = [matrices(model, block, config.skip) for block in model.blocks]
    found = [matrix for some, _ in listed for matrix in some]
    if config.skip and not found:
        raise ConfigError(f"--skip {config.skip}: leaves nothing to prune; make it narrower")
    if config.skip and not any(reason == LEFT_OUT for _, dense in listed for reason in dense.values()):
        raise ConfigError(f"--skip {config.skip}: matches no weight; correct it, or leave it out")
    misfits = [(m, reason) for m in found if (reason := pattern.misfit(m.d_in))]
    if misfits:
        matrix, reason = misfits[0]
        raise ConfigError(
            f"pattern {pattern} does not fit {len(misfits)} of {len(found)} matrices, {matrix.name} first ({reason}); "
            f"leave them dense with --skip, or choose another pattern"
        )


def calibrate(checkpoint: Checkpoint, model_config: Any, config: PruneConfig) -> Windows:
    """Draw the calibration windows that a config asks for.

    Raises:
        CalibrationError: Too little text, or tokens that the model does not know.
    """
    tokenizer = load_tokenizer(checkpoint, config.trust_remote_code)
    seqlen = window_length(config.seqlen, model_config)
    text = open_text(config.text or config.dataset, "train", config.text_column, config.seed)
    windows = draw(text, tokenizer, config.nsamples, seqlen, config.seed)
    check_vocabulary(windows, model_config)
    if config.digest and not windows.digest.startswith(config.digest):
        raise CalibrationError(
            f"{windows.dataset}: the tokens have the digest {windows.digest[:12]}, not {config.digest[:12]}; "
            f"use the text and the tokenizer of that run, or leave out --digest"
        )
    return windows


def new_report(model: BlockModel, source: str, calibration: Windows, config: PruneConfig) -> PruneReport:
    """A report with everything that is known before the first block."""
    return PruneReport(
        source=source,
        command=shlex.join(["python", "-m", "sparsegpt_lite", *sys.argv[1:]]) if _is_ours(sys.argv[0]) else "API call",
        config=asdict(config),
        calibration=calibration.describe(),
        device=device_name(model.device),
        dtype=str(model.module.dtype).removeprefix("torch."),
        parameters=model.module.num_parameters(),
    )


def _is_ours(program: str) -> bool:
    return bool(re.search(r"sparsegpt[-_]lite([\\/]__main__\.py|\.exe)?$", program))
