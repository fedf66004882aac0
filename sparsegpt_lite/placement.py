"""Where do activations wait for the next block? On the blocks' device, in the host's memory, or in files."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn

from sparsegpt_lite.errors import CheckpointError, one_line

CPU = torch.device("cpu")
WRITTEN = ["past_key_values", "shared_kv_states"]  # blocks write into these, so they must not be copied
SMALL = 2**16  # bytes; a file for less is not worth it


@dataclass(frozen=True)
class Placement:
    """Where activations wait.

    With `host` and `disk` all that is outside of the blocks runs on the CPU, so that nothing else is kept on the
    device either, but for keys and values that later blocks share.

    Attributes:
        where: device, host or disk.
        device: Where the blocks run.
        folder: Where the files lie; the system's folder for temporary files by default.
    """

    where: str
    device: torch.device
    folder: Path | None = None

    @property
    def outer(self) -> torch.device:
        """Device of what is outside of the blocks."""
        return self.device if self.where == "device" else CPU

    def inward(self, tree: Any) -> Any:
        """Move tensors, in whatever they are nested in, to the blocks."""
        return tree if self.outer == self.device else send_to_device(tree, self.device, skip_keys=WRITTEN)

    def outward(self, tree: Any) -> Any:
        """Move tensors to where they wait."""
        if self.where == "disk":
            return recursively_apply(partial(_in_file, folder=self.folder), tree)
        return tree if self.outer == self.device else send_to_device(tree, CPU)

    @contextmanager
    def embedding(self, module: nn.Module | None) -> Iterator[None]:
        """Let what an embedding gives, which a model's forward keeps to its end, wait there too."""
        if self.where != "disk" or module is None:
            yield
            return
        hook = module.register_forward_hook(lambda _module, _args, output: self.outward(output))
        try:
            yield
        finally:
            hook.remove()


def choose(where: str, device: torch.device, need: int, folder: Path | None = None) -> Placement:
    """Resolve `auto`: the device if activations take a third of what is free there, else the host, else the disk.

    Args:
        where: auto, device, host or disk.
        device: Where the blocks run.
        need: Bytes that the activations take.
        folder: Where files go, if it comes to that.

    Raises:
        CheckpointError: The disk is asked for and has too little room.
    """
    if where == "auto":
        if device.type == "cuda" and need <= torch.cuda.mem_get_info(device)[0] // 3:
            where = "device"
        else:
            where = "host" if need <= psutil.virtual_memory().available // 2 else "disk"
    if where == "device" and device.type == "cpu":
        where = "host"
    disk = folder or tempfile.gettempdir()
    if where == "disk" and (free := shutil.disk_usage(disk).free) < need:
        raise CheckpointError(
            f"{disk}: the activations need {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free on that disk; free some, "
            f"use --activations host, or lower --nsamples"
        )
    return Placement(where, device, folder)


def _in_file(tensor: Tensor, folder: Path | None) -> Tensor:
    """A tensor on the CPU whose memory is a file without a name, which goes when the tensor goes."""
    size = tensor.numel() * tensor.element_size()
    if size < SMALL:
        return tensor.to(CPU)
    allocate: Callable[[int, int, int], None] = getattr(os, "posix_fallocate", lambda file, _, n: os.truncate(file, n))
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            allocate(file.fileno(), 0, size)  # now, not when a page of it is written
            memory = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise CheckpointError(
            f"{folder or tempfile.gettempdir()}: cannot hold the activations ({one_line(error)}); make room there, or "
            f"use --activations host"
        ) from error
    return memory.view(tensor.shape).copy_(tensor)
