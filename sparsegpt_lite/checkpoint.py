"""How do bytes become tensors and back? Checkpoints of Hugging Face, read and written tensor by tensor.

The output has the names, dtypes, shapes and shards of its source: each shard starts as a copy, pruned tensors are
written over their own bytes, and a file gets its final name when all of it is on the disk.
"""

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsegpt_lite.errors import CheckpointError, one_line

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
        path = self.folder / "config.json"
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
        if (self.folder / SINGLE).is_file():  # goes before an index for transformers too
            return [SINGLE]
        index = self.folder / INDEX
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
            if not (self.folder / shard).is_file():
                raise CheckpointError(f"{index}: names {shard}, which is missing; fetch the model again")
        return sorted(set(weight_map.values()))

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @property
    def commit(self) -> str | None:
        """Commit of a Hub repository; None for a folder that is no snapshot."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def companions(self) -> list[Path]:
        """Files that come along unchanged: configs, tokenizer, licence, the index of the shards where it is in use."""
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        found = {path for path in found if path.name != REPORT and not path.name.endswith(".index.json")}
        return sorted(found | ({self.folder / INDEX} if self.shards != [SINGLE] else set()))

    @contextmanager
    def slices(self, names: Sequence[str], folder: Path | None = None) -> Iterator[dict[str, Any]]:
        """Open the named tensors lazily, from `folder` instead of the source where given.

        Each call opens the shards anew: what a handle has once mapped shows later writes to that memory.
        """
        with ExitStack() as stack:
            shards = {self.entries[name].shard for name in names}
            files = {s: stack.enter_context(safe_open((folder or self.folder) / s, framework="pt")) for s in shards}
            yield {name: files[self.entries[name].shard].get_slice(name) for name in names}

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
    except ValueError as error:
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
        with safe_open(path, framework="pt"):  # checks dtypes, shapes, offsets and the length of the file
            pass
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {path.stat().st_size:,} bytes, no whole safetensors file ({one_line(error)}); fetch it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Entry(path.name, e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    }


class Writer:
    """Writes a checkpoint of the layout of `source` into `target`, block by block.

    Everything grows in `target/.work`; `finish` gives the files their names, config.json last. The journal there has
    a line with a checksum for each block that is safely on the disk, after a first line that says whose run it is.
    Leaving the context by an error removes what was not finished.
    """

    def __init__(self, source: Checkpoint, target: Path, run: Mapping[str, Any], overwrite: bool = False) -> None:
        """Claim the output folder and copy the shards of the source there.

        Args:
            source: What is pruned.
            target: Output folder: absent, empty, or with `overwrite` one that an earlier run of ours made.
            run: What identifies the run; the first line of the journal.
            overwrite: Replace an earlier output of ours.

        Raises:
            CheckpointError: The folder holds something else, cannot be written, or the disk is too full.
        """
        self.source, self.target, self.work = source, target, target / WORK
        check_target(source, target, overwrite)
        self.journal = Journal(self.work / "journal")
        try:
            with self._explained():
                shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir(parents=True)
                self.journal.append({"run": run})
                for shard in source.shards:
                    shutil.copyfile(source.folder / shard, self.work / shard)
                    _sync(self.work / shard)
                    self.journal.append({"copied": shard})
                _sync(self.work)
        except BaseException:
            self._clear()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._clear()

    def _clear(self) -> None:
        """Remove what was not finished."""
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):  # holds an earlier output
            self.target.rmdir()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Make one line of ours of what the system says of a disk."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.target}: cannot be written ({one_line(error)}); make room there, or choose another --out"
            ) from error

    def write(self, block: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put the pruned tensors of a block in their places and note in the journal that the block is done.

        Args:
            block: Its name.
            tensors: On-disk name -> tensor of the on-disk shape; cast to the on-disk dtype.
            record: What the report needs to know of the block.
        """
        sums = {}
        files: dict[str, list[str]] = {}
        for name in sorted(tensors):
            files.setdefault(self.source.entries[name].shard, []).append(name)
        with self._explained():
            for shard, names in files.items():
                with (self.work / shard).open("r+b") as file:
                    for name in names:
                        data = self._bytes(name, tensors[name])
                        file.seek(self.source.entries[name].start)
                        file.write(data)
                        sums[name] = f"{zlib.crc32(data):08x}"
                    file.flush()
                    os.fsync(file.fileno())
            self.journal.append({"block": block, "crc32": sums, "record": record})

    def _bytes(self, name: str, tensor: Tensor) -> memoryview:
        entry = self.source.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(f"{name}: {list(entry.shape)} on disk, but {list(tensor.shape)} would be written")
        data = tensor.detach().to("cpu", DTYPES[entry.dtype]).contiguous()
        return memoryview(data.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def finish(self, files: Mapping[str, str]) -> None:
        """Give everything its final name: shards, tokenizer and configs, `files` (name -> text), config.json last.

        An earlier output goes first, its config.json before all else, so that no mixture of two can be loaded.
        """
        with self._explained():
            for path in self.source.companions():
                shutil.copyfile(path, self.work / path.name)
            for name, text in files.items():
                (self.work / name).write_text(text, encoding="utf-8")
            self.journal.append({"complete": True})
            names = sorted(path.name for path in self.work.iterdir() if path != self.journal.path)
            names.sort(key=lambda name: (name == "config.json", not name.endswith(".safetensors")))
            for name in names:
                _sync(self.work / name)
            for old in (self.target / "config.json", *self.target.glob("*.safetensors"), self.target / INDEX):
                old.unlink(missing_ok=True)
            try:
                for name in names:
                    (self.work / name).replace(self.target / name)
            except OSError:
                for name in names:
                    (self.target / name).unlink(missing_ok=True)
                raise
            _sync(self.target)
            shutil.rmtree(self.work)


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(source: Checkpoint, target: Path, overwrite: bool) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        CheckpointError: It is the source or something that we did not make, or the disk has too little room.
    """
    if target.resolve() == source.folder:
        raise CheckpointError(f"{target}: is the model itself; choose another --out")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; choose another --out")
    if target.is_dir() and any(target.iterdir()):
        ours = (target / REPORT).is_file() or (target / WORK / "journal").is_file()
        if not ours:
            raise CheckpointError(f"{target}: exists and is not an output of ours; choose another --out")
        if not overwrite:
            raise CheckpointError(f"{target}: holds an earlier run; choose another --out or add --overwrite")
    parent = next(p for p in (target.resolve(), *target.resolve().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{target}: {parent} is no folder to write to; choose another --out")
    free = shutil.disk_usage(parent).free
    if free < source.nbytes * 1.01:
        raise CheckpointError(
            f"{target}: {source.nbytes / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on that disk; "
            f"free some, or choose another --out"
        )


class Journal:
    """An append-only file of JSON lines, each behind its checksum, each on the disk before the next step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line and wait until it is on the disk."""
        body = json.dumps(record, sort_keys=True).encode()
        with self.path.open("ab") as file:
            file.write(b"%08x %b\n" % (zlib.crc32(body), body))
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Every whole line, up to the first that is torn or damaged."""
        records = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or not body or checksum != b"%08x" % zlib.crc32(body):
                break
            records.append(json.loads(body))
        return records
