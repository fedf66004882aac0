"""How do bytes become tensors? Checkpoints of Hugging Face, opened for reading one tensor at a time."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsegpt_lite.errors import CheckpointError, one_line

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REPORT = "sparsity.json"
WORK = ".work"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Files beside the weights that belong to the model: configs, tokenizer, licence. Not README.md: it is about the base.
COMPANIONS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*"]
UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its shard, dtype and shape, and its bytes [start, stop) from the start of the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class Checkpoint:
    """A model folder with safetensors weights, opened for reading one tensor at a time.

    Attributes:
        folder: Where it lies; a snapshot in the cache for a Hub id.
        name: What the user called it.
        entries: Every tensor by its name on disk.
        config: The parsed `config.json`.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        """Open a local folder or download a Hub repository.

        Raises:
            CheckpointError: No such folder or repository, no safetensors in it, quantized weights, a broken file.
        """
        self.name = str(source)
        self.folder = _folder(self.name, revision)
        self.config = self._config()
        self.shards = self._shards()
        self.entries: dict[str, Entry] = {}
        for shard in self.shards:
            for key, entry in read_header(self.folder / shard).items():
                if key in self.entries:
                    raise CheckpointError(
                        f"{self.folder}: tensor {key} is in {self.entries[key].shard} and in {shard}; keep one of them"
                    )
                self.entries[key] = entry

    def _config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        self._check_link(path)
        if not path.is_file() and (self.folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{self.folder}: an adapter; merge it into its base model, and give what comes of it")
        if not path.is_file():
            raise CheckpointError(f"{self.folder}: no config.json; give the folder or Hub id of a transformers model")
        config = read_json(path)
        if method := config.get("quantization_config"):
            kind = method.get("quant_method", "?") if isinstance(method, dict) else "?"
            raise CheckpointError(
                f"{path}: the weights are quantized already ({kind}); prune the unquantized model, quantize afterwards"
            )
        return config

    def _shards(self) -> list[str]:
        index = self.folder / INDEX
        for path in (self.folder / SINGLE, index):
            self._check_link(path)
        if (self.folder / SINGLE).is_file():  # goes before an index for transformers too
            return [SINGLE]
        if not index.is_file():
            pickles = sorted(p.name for pattern in UNSAFE for p in self.folder.glob(pattern))
            found = f"only {pickles[0]}, which runs code when opened" if pickles else "none"
            raise CheckpointError(
                f"{self.folder}: needs {SINGLE} or {INDEX}, found {found}; convert the model with "
                f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map in it; fetch the model again")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: names the shard {shard!r}, which is no file of this folder; fetch the model again"
                )
        shards = sorted(set(weight_map.values()))
        there = {path.name for path in self.folder.iterdir() if path.is_file()}
        for shard in shards:
            if shard not in there:
                raise CheckpointError(f"{index}: names {shard}, which is missing; fetch the model again")
            self._check_link(self.folder / shard)
        return shards

    def _within(self, path: Path) -> bool:
        """Whether a file lies in the folder, or for a snapshot anywhere in the cache of its repository."""
        folder = self.folder.resolve()
        return path.resolve().is_relative_to(folder.parent.parent if self.commit else folder)

    def _check_link(self, path: Path) -> None:
        """Refuse a link that leads out of the folder: such a model may not be what its folder's name says."""
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link to a file that is missing; fetch the model again")
        if path.is_symlink() and not self._within(path):
            raise CheckpointError(
                f"{path}: is a link to a file outside of the folder; copy the file there in place of the link"
            )

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @property
    def commit(self) -> str | None:
        """Commit of a Hub repository; None for a folder that is no snapshot."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of config.json, of every tensor's name and place, and of 64 bytes from the middle of its data."""
        by_shard: dict[str, list[tuple[str, Entry]]] = {}
        for name, entry in self.entries.items():
            by_shard.setdefault(entry.shard, []).append((name, entry))
        samples = {}
        for shard, tensors in by_shard.items():
            with (self.folder / shard).open("rb") as file:
                for name, entry in tensors:
                    file.seek(max(entry.start, (entry.start + entry.stop) // 2 - 32))
                    samples[name] = file.read(min(64, entry.stop - entry.start))
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for name, entry in sorted(self.entries.items()):
            place = [name, entry.shard, entry.dtype, entry.shape, entry.start, entry.stop]
            digest.update(json.dumps(place).encode() + samples[name])
        return digest.hexdigest()

    def companions(self) -> list[Path]:
        """Files that come along unchanged: configs, tokenizer, licence, the index of the shards where it is in use.

        Links that lead out of the folder stay behind.
        """
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        found = {path for path in found if path.name != REPORT and not path.name.endswith(".index.json")}
        found = {path for path in found if self._within(path)}
        return sorted(found | ({self.folder / INDEX} if self.shards != [SINGLE] else set()))

    @contextmanager
    def slices(self, names: Sequence[str], elsewhere: Mapping[str, Path] | None = None) -> Iterator[dict[str, Any]]:
        """Open the named tensors lazily, those of `elsewhere` from the shard of that name in the folder given there.

        Each call opens the shards anew: what a handle has once mapped shows later writes to that memory.
        """
        folders = elsewhere or {}
        paths = {name: folders.get(name, self.folder) / self.entries[name].shard for name in names}
        with ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(paths.values())}
            yield {name: files[path].get_slice(name) for name, path in paths.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the shape and dtype of the disk."""
        with self.slices([name]) as slices:
            tensor: Tensor = slices[name][...]
        return tensor


def _folder(source: str, revision: str | None) -> Path:
    """Folder of a local model, or of a snapshot of a Hub repository in the cache."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise CheckpointError(f"{source}: no such folder, and no Hub id of the form organisation/name; check it")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # not what lies in folders, nor a second copy of the weights as Mistral's models have it
        patterns = {"allow_patterns": ["*.safetensors", *COMPANIONS], "ignore_patterns": ["*/*", "consolidated*"]}
        return Path(snapshot_download(source, revision=revision, **patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{source}: a gated model; ask for access at its page on the Hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such folder here, and no such model on the Hub (private models need `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{source}: has no revision {revision!r} on the Hub; give a branch, tag or commit"
        ) from error
    except (OSError, ValueError) as error:  # errors of the network and of the Hub, offline mode, an impossible id
        raise CheckpointError(
            f"{source}: no such folder here, and it cannot be had from the Hub ({one_line(error)}); "
            f"check the name and the network"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: Not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({one_line(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__} where an object belongs; fetch the file again")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """Read where the tensors of a safetensors file lie.

    Raises:
        CheckpointError: The file is cut off or damaged.
    """
    try:
        # safetensors checks dtypes, shapes, offsets and the length of the file
        with path.open("rb") as file, safe_open(path, framework="pt"):
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)}); check its permissions") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {path.stat().st_size:,} bytes, no whole safetensors file ({one_line(error)}); fetch it again"
        ) from error
    header.pop("__metadata__", None)
    for name, e in header.items():
        if math.prod(size for size in e["shape"] if size) >= 2**63:  # of an empty tensor; torch has no such shapes
            raise CheckpointError(f"{path}: {name} has the shape {e['shape']}; fetch it again")
    return {
        name: Entry(path.name, e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    }
