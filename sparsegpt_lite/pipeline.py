"""In what order? Blocks from the checkpoint, one at a time: observe, solve, write, and feed the next one."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from sparsegpt_lite import memory
from sparsegpt_lite.activations import BlockCall, SuspendedForwards, running
from sparsegpt_lite.blocks import (
    BlockModel,
    LoadedModel,
    StreamedModel,
    candidates,
    device_name,
    eager_experts,
    loading,
    outside,
    pick_device,
    pick_dtype,
)
from sparsegpt_lite.calibration import Windows, check_vocabulary, draw, load_tokenizer, open_text, window_length
from sparsegpt_lite.checkpoint import REPORT, Checkpoint
from sparsegpt_lite.config import PruneConfig, block_numbers
from sparsegpt_lite.errors import CalibrationError, ConfigError, ModelError, SolverError, SparseGPTError, one_line
from sparsegpt_lite.hessian import finite
from sparsegpt_lite.matrices import Matrix, left_out, put, tensor_of
from sparsegpt_lite.methods import prune_layer
from sparsegpt_lite.observation import Observation, Seen
from sparsegpt_lite.placement import Placement, choose
from sparsegpt_lite.report import MatrixReport, PruneReport
from sparsegpt_lite.solver import reconstruction_error
from sparsegpt_lite.sparsity import parse
from sparsegpt_lite.writer import Writer, check_run, check_target, finished

UNUSED, NOT_CHOSEN = "in a block that is not used on text", "left out by --blocks"


def prune(  # noqa: PLR0913, the public door
    source: str | Path,
    target: str | Path,
    config: PruneConfig | None = None,
    *,
    calibration: Windows | None = None,
    evaluate: Callable[[str], dict[str, Any]] | None = None,
    overwrite: bool = False,
    resume: bool = False,
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
        resume: Go on with the run that did not come to its end in the target, if there is one; it must be this run.
            Goes before `overwrite`, so that the same call can be made again.
        progress: Draw a bar on stderr.

    Returns:
        The report, which is `sparsity.json` in the target too.

    Raises:
        SparseGPTError: One of its kinds, with a message of one line.

    Example:
        >>> report = prune("meta-llama/Llama-3.1-8B", "llama-2of4", PruneConfig(sparsity="2:4"))
    """
    config, target = config or PruneConfig(), Path(target).expanduser()
    checkpoint = Checkpoint(source, config.revision)
    check_target(checkpoint, target, overwrite, resume)
    model = StreamedModel(checkpoint, pick_device(config.device), pick_dtype(config.dtype), config.trust_remote_code)
    check_shapes(model, config)
    calibration = calibration or calibrate(checkpoint, model.module.config, config)
    report = new_report(model, str(source), calibration, config)
    report.checkpoint, report.commit, report.target = checkpoint.digest, checkpoint.commit, str(target)
    if resume and finished(target):
        return evaluated(finished_report(target, report), target, evaluate)
    if evaluate and not resume:
        report.perplexity = [evaluate(str(source))]
    started = time.monotonic()
    with Writer(checkpoint, target, identity(report), overwrite, resume) as writer:
        if evaluate and not noted(writer, "perplexity"):
            report.perplexity = report.perplexity or [evaluate(str(source))]
            writer.note({"perplexity": report.perplexity[0]})
        elif evaluate:
            report.perplexity = noted(writer, "perplexity")
        done = {block: Done.from_json(record) for block, record in writer.done.items()}
        model.elsewhere = writer.written
        report.resumed = len(done)
        size = min([config.batch_size, len(calibration.tokens), *noted(writer, "batch_size")])
        feed = Feed(calibration.tokens, size, place(model, calibration.tokens, config, writer.work))

        def write(block: str, matrices: list[Matrix], result: Done) -> None:
            writer.write(block, model.on_disk(matrices), asdict(result))

        if not writer.complete:
            with memory.PeakMemory(model.device) as peak:
                model.load_outer(head=False, device=feed.placement.outer)
                for attempt in feed.attempts(lambda size: writer.note({"batch_size": size})):
                    with attempt:
                        prune_blocks(model, feed, config, done, write, progress)
            fill(report, model, config, done)
            report.batch_size, report.activations = feed.batch_size, feed.placement.where
            report.peak_host_bytes, report.peak_device_bytes = peak.host, peak.device
            report.seconds = time.monotonic() - started
        writer.finish({REPORT: report.to_json()})
    return evaluated(PruneReport.read(target / REPORT), target, evaluate)


def prune_model(
    model: PreTrainedModel, tokens: Tensor, config: PruneConfig | None = None, *, progress: bool = False
) -> PruneReport:
    """Prune a model that is in memory, in place.

    Args:
        model: A decoder-only model of transformers.
        tokens: Calibration windows, int64 [nsamples, seqlen].
        config: What to do; its fields about text, device, dtype and where activations wait are not used.
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
    started, done = time.monotonic(), dict[str, Done]()
    feed = Feed(tokens, min(config.batch_size, len(tokens)), Placement("device", loaded.device))
    with loaded, memory.PeakMemory(loaded.device) as peak:
        for attempt in feed.attempts(lambda size: None):
            with attempt:
                prune_blocks(loaded, feed, config, done, lambda *_: None, progress)
    fill(report, loaded, config, done)
    report.batch_size, report.activations = feed.batch_size, feed.placement.where
    report.seconds = time.monotonic() - started
    report.peak_host_bytes, report.peak_device_bytes = peak.host, peak.device
    return report


@dataclass(frozen=True)
class Done:
    """What came of a block: a row for each matrix that was pruned, and why the others stay dense."""

    rows: list[MatrixReport]
    dense: dict[str, str]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Done":
        """From a record of the journal."""
        rows = [MatrixReport(**(row | {"shape": tuple(row["shape"])})) for row in record["rows"]]
        return cls(rows, record["dense"])

    @property
    def tensors(self) -> set[str]:
        """Tensors on disk that were written."""
        return {tensor_of(row.name) for row in self.rows}


@dataclass
class Feed:
    """Calibration tokens int64 [nsamples, seqlen], the windows of a forward, and where activations wait meanwhile."""

    tokens: Tensor
    batch_size: int
    placement: Placement

    def attempts(self, note: Callable[[int], None]) -> Iterator[AbstractContextManager[None]]:
        """Contexts for a run: when the device is out of memory in one, the next comes with half the windows."""
        while True:
            failed: list[int] = []
            yield self._attempt(failed)
            if not failed:
                return
            self.batch_size //= 2
            note(self.batch_size)
            memory.give_back()
            torch.cuda.empty_cache()

    @contextmanager
    def _attempt(self, failed: list[int]) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            failed.append(self.batch_size)


def prune_blocks(
    model: BlockModel,
    feed: Feed,
    config: PruneConfig,
    done: dict[str, Done],
    write: Callable[[str, list[Matrix], Done], None],
    progress: bool,
) -> None:
    """The loop: every block sees what the pruned blocks before it give, is solved from that, written, and passed on.

    Args:
        model: Blocks that can be loaded and dropped.
        feed: What is run through them.
        config: What to do.
        done: Blocks that were finished before, which are only run; gets each block that is finished here.
        write: Called with a block, its pruned matrices and its result while it is still loaded.
        progress: Draw a bar on stderr.
    """
    place, chosen, pattern = feed.placement, block_numbers(config.blocks), str(parse(config.sparsity))
    wanted = len(model.blocks if chosen is None else chosen)
    batches = [batch.to(place.outer) for batch in feed.tokens.split(feed.batch_size)]
    forwards = [partial(calibration_forward, model.module, batch) for batch in batches]
    with (
        full_fp32(),
        eager_experts(model.module),
        place.embedding(model.module.get_input_embeddings()),
        SuspendedForwards(model.blocks, forwards, place.inward, place.outward) as suspended,
        tqdm(total=len(model.blocks), desc="pruning", unit="block", disable=not progress, file=sys.stderr) as bar,
    ):
        while (block := suspended.block) is not None and len(done) < wanted:
            with loading(model, block):
                if block not in done and (chosen is None or suspended.visited.index(block) in chosen):
                    solved, result = [], Done([], {})
                    for matrix, seen in observed(model, block, suspended.calls, config, done, result.dense):
                        started = time.monotonic()
                        with naming(matrix.name):
                            W = matrix.read().float()  # [d_out, d_in]
                            H, method = (
                                (seen.H, config.method) if seen.H is not None else (nothing_seen(W), "magnitude")
                            )
                            solution = prune_layer(W, H, config.sparsity, method, config.damping, config.block_size)
                            solved.append((matrix, matrix.rounded(solution.W)))
                            known = {"block": block, "pattern": pattern, "damping": solution.damping}
                            result.rows.append(row(*solved[-1], seen, known | {"seconds": time.monotonic() - started}))
                    if solved:
                        del matrix, seen, W, H, solution  # before the next block comes
                    pruned = [matrix for matrix, _ in solved]
                    put(solved)
                    write(block, pruned, result)
                    done[block] = result
                    del pruned
                if len(done) < wanted:
                    suspended.advance()
            bar.update()


def observed(
    model: BlockModel,
    block: str,
    calls: list[BlockCall],
    config: PruneConfig,
    done: Mapping[str, Done],
    dense: dict[str, str],
) -> Iterator[tuple[Matrix, Seen]]:
    """Run the waiting calls of a dense block; give every matrix that is to be pruned, with what it saw.

    What other blocks share with this one and have pruned before is left as it is. `dense` gets a reason for each
    tensor that stays dense.
    """
    for name, parameter in model.blocks[block].named_parameters():
        if not finite(parameter):
            raise ModelError(f"{block}.{name}: the weights hold NaN or infinity; fetch the checkpoint again")
    weights, reasons = candidates(model, block, config)
    before = {tensor for result in done.values() for tensor in result.tensors}
    dense |= reasons
    fresh = {weight.name: weight for weight in weights if not before.issuperset(weight.tensors)}
    for seen in Observation(model.blocks[block], fresh, calls, config, dense).seen():
        for matrix in seen.matrices:
            if reason := left_out(matrix.names, config):
                dense[matrix.name] = reason
            elif matrix.tensor not in before:
                yield matrix, seen


def nothing_seen(W: Tensor) -> Tensor:
    """Moments of zero for W [d_out, d_in], without their memory."""
    return torch.zeros((), device=W.device).expand(W.shape[1], W.shape[1])


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
    except torch.OutOfMemoryError as error:  # fewer windows per forward would not help
        raise SolverError(
            f"{matrix}: out of memory while it was solved ({one_line(error)}); lower --hessian-gib, or use "
            f"--activations host"
        ) from error


def row(matrix: Matrix, W_hat: Tensor, seen: Seen, known: dict[str, Any]) -> MatrixReport:
    """Describe a matrix that is still dense in the model; the error is that of W_hat, the new one as it is stored."""
    W, W_hat, error, energy = matrix.read().float(), W_hat.float(), None, None
    if seen.H is not None:
        error = reconstruction_error(W, W_hat, seen.H)
        energy = reconstruction_error(W, torch.zeros_like(W), seen.H)
    return MatrixReport(
        name=matrix.name,
        shape=(W.shape[0], W.shape[1]),
        zeros=int((W_hat == 0).sum()),
        error=error,
        relative_error=None if energy is None or error is None else error / energy if energy > 0 else 0.0,
        tokens=seen.tokens,
        note=seen.note,
        **known,
    )


class _BeforeHeadError(Exception):
    """Ends a calibration forward where only the output layer is left to run."""


def calibration_forward(model: PreTrainedModel, batch: Tensor) -> None:
    """Run the model up to its output layer, which calibration does not need and the skeleton has not loaded."""

    def stop(*_: Any) -> None:
        raise _BeforeHeadError

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(stop) if head is not None else None
    try:
        with running(model.name_or_path or type(model).__name__), suppress(_BeforeHeadError):
            model(input_ids=batch, use_cache=False)
    finally:
        if hook is not None:
            hook.remove()


def check_shapes(model: BlockModel, config: PruneConfig) -> None:
    """Refuse a choice of weights that chooses none, or a pattern that one of them cannot have, before anything is read.

    Raises:
        ConfigError: Naming the option, or the first such matrix.
    """
    everything = [
        w for block in model.blocks for w in candidates(model, block, replace(config, skip=None, only=None))[0]
    ]
    found = [w for block in model.blocks for w in candidates(model, block, config)[0]]
    for option in ("skip", "only"):
        pattern = getattr(config, option)
        if pattern and not any(re.search(pattern, name) for weight in everything for name in weight.names):
            raise ConfigError(
                f"--{option} {pattern}: matches no weight that could be pruned; correct it, or leave it out"
            )
    if everything and not found:
        options = " ".join(f"--{name} {getattr(config, name)}" for name in ("skip", "only") if getattr(config, name))
        raise ConfigError(f"{options}: leave nothing to prune; change them")
    if max(block_numbers(config.blocks) or {0}) >= len(model.blocks):
        raise ConfigError(
            f"--blocks {config.blocks}: the model has {len(model.blocks)} blocks; give numbers below that"
        )
    pattern = parse(config.sparsity)
    misfits = [(w, r) for w in found if len(w.widths) == 1 and not w.bare and (r := pattern.misfit(w.widths[0]))]
    if misfits:
        weight, reason = misfits[0]
        raise ConfigError(
            f"pattern {pattern} does not fit {len(misfits)} of {len(found)} weights, {weight.name} first ({reason}); "
            f"leave them dense with --skip, or choose another pattern"
        )


def place(model: BlockModel, tokens: Tensor, config: PruneConfig, folder: Path) -> Placement:
    """Where the activations of a run wait: twice the hidden states, since a forward keeps its embeddings to its end."""
    embedding = model.module.get_input_embeddings()
    width = embedding.weight.shape[-1] if embedding is not None else 0
    return choose(config.activations, model.device, 2 * tokens.numel() * width * model.module.dtype.itemsize, folder)


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


# What may differ between a run and its resumption: it does not change the result, or shows elsewhere in the identity.
FREE = {"activations", "device", "dtype", "hessian_gib", "trust_remote_code", "revision"}
FREE |= {"dataset", "text", "text_column", "digest"}


def identity(report: PruneReport) -> dict[str, Any]:
    """What makes two runs the same: they write the same bytes."""
    return {
        "checkpoint": report.checkpoint,
        "config": {name: value for name, value in report.config.items() if name not in FREE},
        "calibration": report.calibration["digest"],
        "device": report.device,
        "dtype": report.dtype,
        "versions": {name: report.versions[name] for name in ("sparsegpt_lite", "torch", "transformers")},
    }


def noted(writer: Writer, name: str) -> list[Any]:
    """What an earlier process has noted under a name."""
    return [note[name] for note in writer.notes if name in note]


def fill(report: PruneReport, model: BlockModel, config: PruneConfig, done: Mapping[str, Done]) -> None:
    """Put into the report what became of every weight.

    Raises:
        ModelError: No matrix could be pruned.
    """
    for result in done.values():
        report.matrices += result.rows
        report.dense |= result.dense
    reason = UNUSED if config.blocks is None else NOT_CHOSEN
    others = outside(model, {block: reason for block in model.blocks if block not in done})
    report.dense = model.others() | report.dense | others
    for name in {tensor_of(row.name) for row in report.matrices}:
        report.dense.pop(name, None)  # stayed dense in one of the blocks that share it
    if not report.matrices:
        reason = next(iter(report.dense.values()), "it has none")
        raise ModelError(f"{report.source}: no matrix can be pruned ({reason}); choose another model")


def finished_report(target: Path, report: PruneReport) -> PruneReport:
    """The report of a run that is complete, if it is the one that `report` begins.

    Raises:
        CheckpointError: It is another one; says what differs.
    """
    earlier = PruneReport.read(target / REPORT)
    check_run(target, identity(earlier), identity(report))
    earlier.target = report.target  # it may have been moved
    return earlier


def evaluated(report: PruneReport, target: Path, evaluate: Callable[[str], dict[str, Any]] | None) -> PruneReport:
    """Add what perplexities are not yet in a report, here and beside the weights: the dense and the pruned model's."""
    missing = [report.source, str(target)][len(report.perplexity) :]
    if evaluate and missing:
        report.perplexity += map(evaluate, missing)
        dense, pruned = report.perplexity
        if dense.get("digest") != pruned.get("digest"):
            raise CalibrationError(
                f"{target}: the dense model was evaluated on another text ({dense['dataset']}); give the same --eval"
            )
        path = target / REPORT
        path.with_suffix(".new").write_text(report.to_json(), encoding="utf-8")
        path.with_suffix(".new").replace(path)
    return report


def _is_ours(program: str) -> bool:
    return bool(re.search(r"sparsegpt[-_]lite([\\/]__main__\.py|\.exe)?$", program))
