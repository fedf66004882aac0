"""Where are the decoder blocks and what may be pruned in them?

The model is a skeleton on the meta device; one block at a time is filled from the checkpoint by transformers' own
loader and emptied again. Everything private of transformers is called here and nowhere else.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import __version__ as version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from sparsegpt_lite import memory
from sparsegpt_lite.checkpoint import DTYPES, Checkpoint
from sparsegpt_lite.config import PruneConfig
from sparsegpt_lite.errors import CheckpointError, ConfigError, ModelError, one_line
from sparsegpt_lite.matrices import Matrix, Piece, Weight, arrangements, left_out, natural, tensor_of, why_dense

# Fields of a config that loops of transformers run to, and the most that is no mistake.
COUNTS = {re.compile(r"(layers?|blocks|depth)$"): 1_000, re.compile(r"(experts|groups|codebooks|labels)$"): 10_000}
LARGE = 2**30  # bytes; an embedding of this size is not loaded, its rows are read when they are looked up


def candidates(model: "BlockModel", block: str, config: PruneConfig) -> tuple[list[Weight], dict[str, str]]:
    """List what may be pruned in a block, and why its other weights of two or more dimensions stay dense.

    Returns:
        Weights, and a reason by the name of each tensor that stays dense.
    """
    found: list[Weight] = []
    dense: dict[str, str] = {}
    for path, module in model.blocks[block].named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            name = ".".join(filter(None, (block, path, leaf)))
            reason = why_dense(path, module, leaf, parameter)
            weight = Weight(name, module, parameter, model.pieces(name) if reason is None else [])
            kept = weight.kept or model.names(name) or [name]
            if reason is None and not weight.pieces:
                reason = "is stored in another form on disk"
            if reason is None:
                reasons = {left_out((name, tensor_of(one), one), config) for one in weight.parts}
                reason = reasons.pop() if len(reasons) == 1 else None
            if reason is None:
                found.append(weight)
            else:
                dense |= dict.fromkeys(kept, reason)
    return found, dense


def find_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Decoder blocks by name: the outermost gradient-checkpointing layers, else the largest list of modules.

    Which of them the model really calls is seen when it runs.

    Raises:
        ModelError: Neither is there.
    """
    found = dict(_outermost(model, lambda module: isinstance(module, GradientCheckpointingLayer)))
    if not found:
        lists = dict(_outermost(model, lambda module: isinstance(module, nn.ModuleList) and len(module) > 0))
        if not lists:
            raise ModelError(
                f"{model.name_or_path}: {type(model).__name__} has no decoder layers; choose another model"
            )
        name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
        found = {f"{name}.{child}": block for child, block in lists[name].named_children()}
    return found


def _outermost(
    module: nn.Module, wanted: Callable[[nn.Module], bool], prefix: str = ""
) -> Iterable[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        name = f"{prefix}.{child_name}" if prefix else child_name
        if wanted(child):
            yield name, child
        else:
            yield from _outermost(child, wanted, name)


@contextmanager
def loading(model: "BlockModel", block: str) -> Iterator[None]:
    """Have a block loaded while in context, and its memory back afterwards."""
    try:
        model.load(block)
        yield
    finally:
        model.drop(block)
        memory.give_back()


def outside(model: "BlockModel", reasons: Mapping[str, str]) -> dict[str, str]:
    """Why the weights of two or more dimensions stay dense that are in no block, or in one of those with a reason."""
    head, dense = model.module.get_output_embeddings(), dict[str, str]()
    for path, module in model.module.named_modules():
        block = next((b for b in model.blocks if path == b or path.startswith(f"{b}.")), None)
        if block is not None and block not in reasons:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            reason = "outside of the decoder blocks" if block is None else reasons[block]
            if block is None and (isinstance(module, nn.Embedding) or module is head):
                reason = "the output layer" if module is head else "an embedding"
            for name in model.names(f"{path}.{leaf}" if path else leaf):
                dense.setdefault(name, reason)
    return dense


class BlockModel(Protocol):
    """A model whose blocks are there between `load` and `drop`."""

    module: PreTrainedModel
    blocks: dict[str, nn.Module]
    device: torch.device

    def load(self, block: str) -> None:
        """Make the weights of a block real."""

    def drop(self, block: str) -> None:
        """Free them again."""

    def pieces(self, parameter: str) -> list[Piece]:
        """Where the parts of a parameter are kept; none where that is not known."""

    def names(self, parameter: str) -> list[str]:
        """Names of the tensors that a parameter is made of."""

    def others(self) -> dict[str, str]:
        """Why the tensors stay dense that are no parameters."""


class LoadedModel:
    """A model that is in memory already; in evaluation mode while in context."""

    def __init__(self, module: PreTrainedModel) -> None:
        """Find the blocks of a model.

        Raises:
            ModelError: It has none.
        """
        self.module = module
        self.blocks = find_blocks(module)
        self.device = module.device
        self._first: dict[int, str] = {}  # a parameter that several modules share has the first of its names
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._first.setdefault(id(parameter), name)

    def __enter__(self) -> "LoadedModel":
        self._training = self.module.training
        self.module.eval()
        return self

    def __exit__(self, *exception: object) -> None:
        self.module.train(self._training)

    def load(self, block: str) -> None:
        """Nothing to do."""

    def drop(self, block: str) -> None:
        """Nothing to do."""

    def pieces(self, parameter: str) -> list[Piece]:
        """All of it is kept in itself."""
        kept = self.module.get_parameter(parameter)
        return [Piece(self._first[id(kept)], kept.dtype)]

    def names(self, parameter: str) -> list[str]:
        """Its own name."""
        return [self._first[id(self.module.get_parameter(parameter))]]

    def others(self) -> dict[str, str]:
        """None."""
        return {}


class StreamedModel:
    """A model that stays on disk: a skeleton whose blocks are filled one at a time.

    Attributes:
        module: The transformers model, on meta but for what is loaded.
        blocks: Candidate blocks by name.
        device: Where loaded weights and buffers go.
        dtype: Of the loaded weights.
        elsewhere: Folder of the tensors on disk that are to be read from another one than the checkpoint's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Build the skeleton and map every name on disk to a parameter.

        Args:
            checkpoint: Where the weights are.
            device: Where a loaded block goes.
            dtype: Of the loaded weights; what most of them have on disk by default.
            trust_remote_code: Run model code that comes with the checkpoint.

        Raises:
            CheckpointError: A parameter has no tensor on disk, or one of another shape.
            ModelError: transformers does not know the model, or it has no blocks.
        """
        self.checkpoint, self.device = checkpoint, device
        self.elsewhere: Mapping[str, Path] = {}
        self.dtype = dtype or disk_dtype(checkpoint)
        self.module = _skeleton(checkpoint, self.dtype, trust_remote_code)
        self.blocks = find_blocks(self.module)
        self._mapping = get_model_conversion_mapping(self.module)
        self._targets = self._map_names()
        self._sources: dict[str, list[str]] = {}
        for name in sorted(self._targets, key=natural):
            self._sources.setdefault(self._targets[name][0], []).append(name)
        self._check_names()
        _compute_buffers(self.module, device)  # now that the sizes are known to be right

    def _map_names(self) -> dict[str, tuple[str, bool]]:
        """On-disk name -> name in the model (the first, where several are fused or split), and if it is converted."""
        renamings = [w for w in self._mapping if isinstance(w, WeightRenaming)]
        converters = [w for w in self._mapping if isinstance(w, WeightConverter)]
        state, prefix = self.module.state_dict(), self.module.base_model_prefix
        targets = {}
        for name in self.checkpoint.entries:
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            targets[name] = (target, pattern is not None)
        return targets

    def _check_names(self) -> None:
        """Compare what the model needs with what is on disk, as far as no conversion stands between them."""
        state = self.module.state_dict()
        tied = self.module.all_tied_weights_keys
        there = {target for target, _ in self._targets.values()}
        converted = any(converts for _, converts in self._targets.values())
        missing = [n for n in state if n not in there and n not in tied and n not in tied.values()]
        if missing and not converted:
            raise CheckpointError(_not_on_disk(self.checkpoint, missing))
        for name, (target, converts) in self._targets.items():
            shape, dtype = self.checkpoint.entries[name].shape, self.checkpoint.entries[name].dtype
            floating = dtype in DTYPES and DTYPES[dtype].is_floating_point
            if target in state and not floating and state[target].is_floating_point():
                raise CheckpointError(f"{self.checkpoint.folder}: {name} is {dtype} on disk; give the dense model")
            if not converts and target in state and tuple(state[target].shape) != shape:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {name} is {list(shape)} on disk, but config.json asks for "
                    f"{list(state[target].shape)}; fetch both again"
                )

    def load_outer(self, head: bool, device: torch.device | None = None) -> None:
        """Load what is in no block: embeddings, final norm, and with `head` the output layer.

        Args:
            head: Whether the output layer is needed.
            device: Where it goes; to the blocks by default.

        Raises:
            CheckpointError: Some of it is not on disk.
        """
        output = self.module.get_output_embeddings()
        names = [f"{n}." for n, m in self.module.named_modules() if m is output and not head]
        inside = tuple(f"{block}." for block in self.blocks)
        tables = self._large_tables(None if output is None or not head else output.weight)
        self._load(lambda target: not target.startswith((*inside, *names, *tables)), device)
        self._load(lambda target: target.startswith(tables), torch.device("cpu"))
        for target, source in self.module.all_tied_weights_keys.items():
            if not target.startswith(inside):
                self._tie(target, source)
        state = self.module.state_dict(keep_vars=True)
        left = [n for n, t in state.items() if t.is_meta and not n.startswith((*inside, *names))]
        if left:
            raise CheckpointError(_not_on_disk(self.checkpoint, left))
        for name in tables:  # lookups come to the CPU
            hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
            add_hook_to_module(self.module.get_submodule(name.removesuffix(".")), hook)
        if device is not None:
            for name, buffer in list(self.module.named_buffers()):
                if not name.startswith((*inside, *tables)):  # what a table multiplies by stays with it
                    _set(self.module, name, buffer.to(device))

    def _large_tables(self, head: Tensor | None) -> tuple[str, ...]:
        """Embeddings outside of the blocks that are to stay in the file; not one that is the output layer too."""
        tables = []
        for name, module in self.module.named_modules():
            outer = isinstance(module, nn.Embedding) and not any(name.startswith(f"{b}.") for b in self.blocks)
            if outer and module.weight is not head and module.weight.nbytes >= LARGE:
                tables.append(f"{name}.")
        return tuple(tables)

    def _tie(self, target: str, source: str) -> None:
        """Let two tied parameters be one, whichever of them is loaded."""
        a, b = self.module.get_parameter(target), self.module.get_parameter(source)
        if a.is_meta and not b.is_meta:
            _set(self.module, target, b)
        elif b.is_meta and not a.is_meta:
            _set(self.module, source, a)

    def load(self, block: str) -> None:
        """Fill a block from the checkpoint, what it shares with other blocks included.

        Raises:
            CheckpointError: Some of its weights are not on disk.
        """
        inside = f"{block}."
        ties = {t: s for t, s in self.module.all_tied_weights_keys.items() if t.startswith(inside)}
        borrowed = {source for source in ties.values() if not source.startswith(inside)}
        self._load(lambda target: target.startswith(inside) or target in borrowed)
        for target, source in ties.items():
            self._tie(target, source)
        for source in borrowed:
            set_module_tensor_to_device(self.module, source, "meta", clear_cache=False)
        left = [n for n, t in self.blocks[block].state_dict(keep_vars=True).items() if t.is_meta]
        if left:
            raise CheckpointError(_not_on_disk(self.checkpoint, [f"{block}.{name}" for name in left]))

    def _load(self, wanted: Callable[[str], bool], device: torch.device | None = None) -> None:
        """Let transformers load the tensors whose target in the model is wanted."""
        names = [name for name, (target, _) in self._targets.items() if wanted(target)]
        config = LoadStateDictConfig(
            device_map={"": str(device or self.device)},
            dtype=self.dtype,
            dtype_plan=self.module._get_dtype_plan(self.dtype),
            weight_mapping=deepcopy(self._mapping),
        )
        with self.checkpoint.slices(names, self.elsewhere) as slices, _without_bars():
            info = convert_and_load_state_dict_in_model(self.module, slices, config, None)[0]
        for name, trace in info.conversion_errors.items():  # transformers keeps them to itself, memory that ran out too
            cause = " ".join(trace.split())[-200:]
            if "memory" in cause:
                raise torch.OutOfMemoryError(f"{name}: out of memory while it was loaded: {cause}")
            raise ModelError(f"{name}: cannot be made of what is on disk ({cause}); update transformers")

    def drop(self, block: str) -> None:
        """Put the parameters of a block back on meta, which frees them."""
        for name, _ in list(self.blocks[block].named_parameters()):
            set_module_tensor_to_device(self.blocks[block], name, "meta", clear_cache=False)

    def others(self) -> dict[str, str]:
        """Why the tensors on disk stay dense that are no parameters of the model; they are copied as they are."""
        parameters, state = dict(self.module.named_parameters()), self.module.state_dict()
        return {
            name: "a buffer" if target in state else "not in the model that config.json describes"
            for name, (target, converts) in self._targets.items()
            if target not in parameters and (not converts or target in state)
        }

    def names(self, parameter: str) -> list[str]:
        """Names on disk of the tensors that a parameter is made of; none where it is a part of another's."""
        own = self.module.all_tied_weights_keys.get(parameter, parameter)
        return self._sources.get(parameter) or self._sources.get(own) or []

    def pieces(self, parameter: str) -> list[Piece]:
        """Where the parts of a parameter lie on disk; what conversions make of them is checked once it is loaded."""
        names, tensor = self.names(parameter), self.module.get_parameter(parameter)
        own = bool(names)
        if own and len(names) == 1 and not self._targets[names[0]][1]:
            return [Piece(names[0], DTYPES[self.checkpoint.entries[names[0]].dtype])]
        if not own:  # what this parameter is a part of goes by the name of another one
            block = next((b for b in self.blocks if parameter.startswith(f"{b}.")), parameter)
            names = [n for n, (t, converts) in self._targets.items() if converts and t.startswith(f"{block}.")]
        kept = {n: (e.shape, DTYPES[e.dtype]) for n in names if (e := self.checkpoint.entries[n]).dtype in DTYPES}
        for pieces in arrangements(tuple(tensor.shape), kept, own):
            if tensor.is_meta or self._holds(tensor, pieces):
                return pieces
        return []

    def _holds(self, tensor: Tensor, pieces: Sequence[Piece]) -> bool:
        """Whether a loaded parameter is made of these pieces: their first and last rows tell."""
        with self.checkpoint.slices([piece.tensor for piece in pieces], self.elsewhere) as slices:
            for piece in pieces:
                part, rows = tensor[piece.part], piece.at[-1] if piece.at else slice(0, None)
                for row in (0, len(part) - 1):
                    there = rows.start + row * (rows.step or 1)
                    index = (*piece.at[:-1], slice(there, there + 1))
                    same = slices[piece.tensor][index].reshape(-1).to(tensor.dtype), part[row].cpu()
                    if not torch.allclose(*same, rtol=0, atol=0, equal_nan=True):
                        return False
        return True

    def on_disk(self, matrices: Iterable[Matrix]) -> Iterator[tuple[str, Tensor]]:
        """Give the tensors on disk that matrices of the loaded block are parts of, one after the other."""
        parts: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            parts.setdefault(matrix.tensor, []).append(matrix)
        for name, some in sorted(parts.items()):
            first = some[0]
            if first.at == ():
                yield name, first.weight.parameter.data[first.part]
                continue
            with self.checkpoint.slices([name], self.elsewhere) as slices:
                tensor = slices[name][...].clone()
            for matrix in some:
                tensor[matrix.at] = matrix.weight.parameter.data[matrix.part]
            yield name, tensor


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let experts multiply one by one, as their Hessians need it, not in one grouped kernel."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def pick_device(name: str) -> torch.device:
    """Device of a `--device` option.

    Raises:
        ConfigError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: unknown; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: no such device for us; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use cpu or another")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def device_name(device: torch.device) -> str:
    """What a report calls a device: the name of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def pick_dtype(name: str) -> torch.dtype | None:
    """Dtype of a `--dtype` option; None for auto."""
    return None if name == "auto" else getattr(torch, name)


def _not_on_disk(checkpoint: Checkpoint, missing: list[str]) -> str:
    return (
        f"{checkpoint.folder}: {len(missing)} weights that config.json asks for are not there, {missing[0]} first; "
        f"config and weights belong to different models: fetch both again"
    )


def disk_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Floating dtype that most weights of a checkpoint have on disk."""
    counts: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        dtype = DTYPES.get(entry.dtype)
        if dtype is not None and dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + entry.numel
    if not counts:
        raise CheckpointError(f"{checkpoint.folder}: holds no floating-point weights; give the unquantized model")
    return max(counts, key=lambda dtype: counts[dtype])


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model on meta."""
    if checkpoint.config.get("auto_map") and not trust_remote_code:
        raise ModelError(
            f"{checkpoint.name}: brings its own model code; read it, and allow it with --trust-remote-code"
        )
    kinds = checkpoint.config.get("architectures") or "no architectures"
    if checkpoint.config.get("is_encoder_decoder") is True or "ForMaskedLM" in str(kinds):
        raise ModelError(f"{checkpoint.name}: has an encoder ({kinds}); give a decoder-only model")
    _check_counts(checkpoint, checkpoint.config)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        for extra in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if getattr(config, extra, False):
                setattr(config, extra, False)
        config.return_dict = True
        config._attn_implementation = None  # of here, not of the machine that saved it, nor code from the Hub
        with quiet(), init_empty_weights(include_buffers=True):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a broken or unknown config makes of the many config and model classes
        kind = checkpoint.config.get("model_type", "no model_type in config.json")
        raise ModelError(
            f"{checkpoint.name}: transformers {version} cannot build this model ({kind}: {one_line(error)}); "
            f"give a decoder-only model, or update transformers"
        ) from error
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # comes from the checkpoint
    return model.eval().requires_grad_(False)


def _check_counts(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse a config that asks for far more layers than there are tensors: building them would never end."""
    there = len(checkpoint.entries)
    for name, value in config.items():
        most = next((most for field, most in COUNTS.items() if field.search(name)), None)
        if isinstance(value, dict):
            _check_counts(checkpoint, value)
        elif most and isinstance(value, int | float) and value > max(most, there):
            raise CheckpointError(
                f"{checkpoint.folder}: config.json asks for {name} {value}, but there are {there} tensors; "
                f"fetch both again"
            )


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Make the buffers real that are computed, exactly those that from_pretrained makes."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        _set(model, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # outside the dtype context, as from_pretrained does it


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer in the place of another."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from telling on stderr what it thinks of a config; what it refuses is raised besides."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for every block."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
