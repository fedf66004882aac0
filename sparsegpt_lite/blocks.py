"""Where are the decoder blocks and their prunable matrices?

The model is a skeleton on the meta device; one block at a time is filled from the checkpoint by transformers' own
loader and emptied again. Everything private of transformers is called here and nowhere else.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import init_empty_weights
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
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from sparsegpt_lite.checkpoint import DTYPES, Checkpoint
from sparsegpt_lite.errors import CheckpointError, ConfigError, ModelError, one_line

# Layers that choose instead of computing: a wrong choice costs more than their few weights save.
LEFT_OUT = "left out by --skip"
CHOOSERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate|modality_router|indexer)(\.|$)")


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear layer, seen as W [d_out, d_in] whatever its layout.

    Attributes:
        name: Name of the parameter in the model, `model.layers.0.mlp.up_proj.weight`.
        module: The layer.
        d_out: Outputs.
        d_in: Inputs.
        stored: Dtype that the weight has where the model is kept.
    """

    name: str
    module: nn.Module
    d_out: int
    d_in: int
    stored: torch.dtype

    def read(self) -> Tensor:
        """W [d_out, d_in] in the dtype of the model; may share memory with the layer."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        return weight.T if isinstance(self.module, Conv1D) else weight

    def replace(self, W: Tensor) -> None:
        """Put W [d_out, d_in] in the place of the weight, with the values that it has in the dtype on disk.

        Zeros are +0.0. A kept weight that would vanish in one of the dtypes becomes the smallest number that does not.
        """
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        W = W.T if isinstance(self.module, Conv1D) else W
        new = W.to(weight.dtype).to(self.stored)
        smallest = max(torch.finfo(t).smallest_normal * torch.finfo(t).eps for t in (weight.dtype, self.stored))
        vanished = (new == 0) & (W != 0)
        new = torch.where(vanished, torch.copysign(torch.tensor(smallest, device=W.device), W).to(self.stored), new)
        weight.data = torch.where(new == 0, 0, new).to(weight.dtype).contiguous()


def matrices(model: "BlockModel", block: str, skip: str | None) -> tuple[list[Matrix], dict[str, str]]:
    """List what can be pruned in a block, and why its other weights of two or more dimensions stay dense."""
    found: list[Matrix] = []
    dense: dict[str, str] = {}
    for path, module in model.blocks[block].named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = ".".join(filter(None, (block, path, leaf)))
            if parameter.ndim < 2:
                continue
            stored = model.stored(name)
            if leaf != "weight" or not isinstance(module, (nn.Linear, Conv1D)):
                dense[name] = f"not a linear layer ({type(module).__name__} {list(parameter.shape)})"
            elif CHOOSERS.search(path):
                dense[name] = "chooses between experts or tokens"
            elif stored is None:
                dense[name] = "is stored in parts or fused on disk"
            elif skip and (re.search(skip, name) or re.search(skip, stored[0])):
                dense[name] = LEFT_OUT
            else:
                d_out, d_in = parameter.shape[::-1] if isinstance(module, Conv1D) else parameter.shape
                found.append(Matrix(name, module, d_out, d_in, stored[1]))
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


class BlockModel(Protocol):
    """A model whose blocks are there between `load` and `drop`."""

    module: PreTrainedModel
    blocks: dict[str, nn.Module]
    device: torch.device

    def load(self, block: str) -> None:
        """Make the weights of a block real."""

    def drop(self, block: str) -> None:
        """Free them again."""

    def stored(self, parameter: str) -> tuple[str, torch.dtype] | None:
        """Name and dtype of a parameter where it is kept; None where it is no tensor of its own there."""


class LoadedModel:
    """A model that is in memory already; in evaluation mode while in context."""

    def __init__(self, module: PreTrainedModel) -> None:
        """Find the blocks of a model.

        Raises:
            ModelError: It has none, or two of them share a weight.
        """
        self.module = module
        self.blocks = find_blocks(module)
        self.device = module.device
        owner: dict[int, str] = {}
        for name, block in self.blocks.items():
            for parameter in block.parameters():
                if owner.setdefault(id(parameter), name) != name:
                    raise ModelError(_shared(name, owner[id(parameter)]))

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

    def stored(self, parameter: str) -> tuple[str, torch.dtype] | None:
        """Its own name and dtype."""
        return parameter, self.module.get_parameter(parameter).dtype


class StreamedModel:
    """A model that stays on disk: a skeleton whose blocks are filled one at a time.

    Attributes:
        module: The transformers model, on meta but for what is loaded.
        blocks: Candidate blocks by name.
        device: Where loaded weights and buffers go.
        dtype: Of the loaded weights.
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
            ModelError: transformers does not know the model, it has no blocks, or two of them share a weight.
        """
        self.checkpoint, self.device = checkpoint, device
        self.dtype = dtype or disk_dtype(checkpoint)
        self.module = _skeleton(checkpoint, self.dtype, device, trust_remote_code)
        self.blocks = find_blocks(self.module)
        self._mapping = get_model_conversion_mapping(self.module)
        self._targets = self._map_names()
        self._disk = {target: name for name, (target, converts) in self._targets.items() if not converts}
        self._check_names()

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
        for target, source in tied.items():
            a, b = (next((n for n in self.blocks if name.startswith(f"{n}.")), None) for name in (target, source))
            if a and b and a != b:
                raise ModelError(_shared(a, b))
        there = {target for target, _ in self._targets.values()}
        converted = any(converts for _, converts in self._targets.values())
        missing = [n for n in state if n not in there and n not in tied and n not in tied.values()]
        if missing and not converted:
            raise CheckpointError(_not_on_disk(self.checkpoint, missing))
        for name, (target, converts) in self._targets.items():
            shape, dtype = self.checkpoint.entries[name].shape, self.checkpoint.entries[name].dtype
            if target in state and dtype not in DTYPES:
                raise CheckpointError(f"{self.checkpoint.folder}: {name} is {dtype} on disk; give the dense model")
            if not converts and target in state and tuple(state[target].shape) != shape:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {name} is {list(shape)} on disk, but config.json asks for "
                    f"{list(state[target].shape)}; fetch both again"
                )

    def load_outer(self, head: bool) -> None:
        """Load what is in no block: embeddings, final norm, and with `head` the output layer.

        Raises:
            CheckpointError: Some of it is not on disk.
        """
        output = self.module.get_output_embeddings()
        names = [f"{n}." for n, m in self.module.named_modules() if m is output and not head]
        inside = tuple(f"{block}." for block in self.blocks)
        self._load(lambda target: not target.startswith((*inside, *names)))
        for target, source in self.module.all_tied_weights_keys.items():
            if not target.startswith(inside):
                self._tie(target, source)
        state = self.module.state_dict(keep_vars=True)
        left = [n for n, t in state.items() if t.is_meta and not n.startswith((*inside, *names))]
        if left:
            raise CheckpointError(_not_on_disk(self.checkpoint, left))

    def _tie(self, target: str, source: str) -> None:
        """Let two tied parameters be one, whichever of them is loaded."""
        a, b = self.module.get_parameter(target), self.module.get_parameter(source)
        if a.is_meta and not b.is_meta:
            _set(self.module, target, b)
        elif b.is_meta and not a.is_meta:
            _set(self.module, source, a)

    def load(self, block: str) -> None:
        """Fill a block from the checkpoint.

        Raises:
            CheckpointError: Some of its weights are not on disk.
        """
        self._load(lambda target: target.startswith(f"{block}."))
        left = [n for n, t in self.blocks[block].state_dict(keep_vars=True).items() if t.is_meta]
        if left:
            raise CheckpointError(_not_on_disk(self.checkpoint, [f"{block}.{name}" for name in left]))

    def _load(self, wanted: Callable[[str], bool]) -> None:
        """Let transformers load the tensors whose target in the model is wanted."""
        names = [name for name, (target, _) in self._targets.items() if wanted(target)]
        config = LoadStateDictConfig(
            device_map={"": str(self.device)},
            dtype=self.dtype,
            dtype_plan=self.module._get_dtype_plan(self.dtype),
            weight_mapping=deepcopy(self._mapping),
        )
        with self.checkpoint.slices(names) as slices, _without_bars():
            convert_and_load_state_dict_in_model(self.module, slices, config, None)

    def drop(self, block: str) -> None:
        """Put the parameters of a block back on meta, which frees them."""
        for name, _ in list(self.blocks[block].named_parameters()):
            set_module_tensor_to_device(self.blocks[block], name, "meta", clear_cache=False)

    def surplus(self) -> list[str]:
        """Tensors on disk that the model which config.json describes does not have; they are copied as they are."""
        state = self.module.state_dict()
        return [n for n, (target, converts) in self._targets.items() if not converts and target not in state]

    def stored(self, parameter: str) -> tuple[str, torch.dtype] | None:
        """Name and dtype of a parameter on disk; None where it is not there as one tensor."""
        name = self._disk.get(parameter)
        return (name, DTYPES[self.checkpoint.entries[name].dtype]) if name else None

    def disk_name(self, parameter: str) -> str:
        """Name of a parameter in the checkpoint; its name in the model where it has none there."""
        return self._disk.get(parameter, parameter)

    def on_disk(self, changed: set[str]) -> dict[str, Tensor]:
        """Give changed parameters of the loaded block by their names in the checkpoint."""
        return {self._disk[name]: self.module.get_parameter(name).data for name in changed}


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


def _shared(a: str, b: str) -> str:
    return f"{a}: shares weights with {b}, which is not supported; choose another model"


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


def _skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """Build the model on meta, its computed buffers real and exactly those that from_pretrained makes."""
    if checkpoint.config.get("auto_map") and not trust_remote_code:
        raise ModelError(
            f"{checkpoint.name}: brings its own model code; read it, and allow it with --trust-remote-code"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        for extra in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if getattr(config, extra, False):
                setattr(config, extra, False)
        with init_empty_weights(include_buffers=True):
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
    for name, buffer in list(model.named_non_persistent_buffers()):
        _set(model, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # outside the dtype context, as from_pretrained does it
    return model.eval().requires_grad_(False)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer in the place of another."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]


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
