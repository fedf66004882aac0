"""How does an output grow and survive a death? A checkpoint of the layout of its source, written block by block.

The output has the names, dtypes, shapes and shards of its source: each shard starts as a copy, pruned tensors are
written over their own bytes, and a file gets its final name when all of it is on the disk. A run that dies at any
moment, by a kill or with its machine, leaves a journal from which the next one goes on.
"""

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegpt_lite.checkpoint import CONFIG, DTYPES, INDEX, REPORT, SINGLE, WORK, Checkpoint, read_json
from sparsegpt_lite.errors import CheckpointError, one_line

if sys.platform != "win32":
    import fcntl

JOURNAL = "journal"
PIECE = 1 << 24  # bytes of a file that are read at once


class Writer:
    """Writes a checkpoint of the layout of `source` into `target`, block by block.

    Everything grows in `target/.work`; `finish` gives the files their names, config.json last. The journal there has
    a line with a checksum for each step that is safely on the disk, after a first line that says whose run it is.

    Leaving the context by an error removes what was not finished, but keeps it where it is worth something: once a
    block is done, and always when the run is interrupted.

    Attributes:
        done: Blocks that were done when the writer was opened, with their records, in order.
        written: Tensors of blocks that are done by now, and the folder where they lie.
        notes: Notes that were in the journal then.
        complete: Whether nothing is left to do but `finish`.
    """

    def __init__(
        self, source: Checkpoint, target: Path, run: Mapping[str, Any], overwrite: bool = False, resume: bool = False
    ) -> None:
        """Claim the output folder and copy the shards of the source there, or go on where an earlier run stopped.

        Args:
            source: What is pruned.
            target: Output folder: absent, empty, or with `overwrite` one that an earlier run of ours made.
            run: What identifies the run; the first line of the journal.
            overwrite: Replace an earlier output of ours, finished or not.
            resume: Go on with an unfinished run in that folder; begin anew where there is none.

        Raises:
            CheckpointError: The folder holds something else or the run of other options, another process is at work
                there, it cannot be written, or the disk is too full.
        """
        resume = resume and unfinished(target)
        check_target(source, target, overwrite, resume)
        self.source, self.target, self.work = source, target, target / WORK
        self.journal = Journal(self.work / JOURNAL)
        self.done: dict[str, dict[str, Any]] = {}
        self.written: dict[str, Path] = {}
        self.notes: list[dict[str, Any]] = []
        self.complete = False
        self._cleared = False  # of an earlier output
        self._names: list[str] = []  # of the complete output, config.json last
        self._keep = True  # what is there, when an error ends all
        with self._explained():
            self._lock = lock(self.journal.path, new=not resume)
        try:
            with self._explained():
                first, _ = next(self.journal.lines(), (None, 0)) if resume else (None, 0)
                if first is not None:
                    check_run(target, first.get("run"), run)
                self._copy(self._begin(run) if first is None else self._recall())
        except BaseException as error:
            self._leave(error)
            if isinstance(error, KeyboardInterrupt) and unfinished(target):
                error.resumable = True  # type: ignore[attr-defined]
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._leave(error)
        if error is not None and unfinished(self.target):
            error.resumable = True  # type: ignore[attr-defined]

    def _leave(self, error: BaseException | None) -> None:
        """Remove what was not finished and is worth nothing; let others work in the folder."""
        if isinstance(error, Exception) and not self._keep:
            with suppress(OSError):
                self._remove()
                self.target.rmdir()  # unless it holds an earlier output
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Make one line of ours of what the system says of a disk."""
        try:
            yield
        except OSError as error:
            remedy = ", then go on with --resume" if self._keep else ", or choose another --out"
            raise CheckpointError(
                f"{self.target}: cannot be written ({one_line(error)}); make room there{remedy}"
            ) from error

    # ---- where it stands ---------------------------------------------------------------------------------------------

    def _begin(self, run: Mapping[str, Any]) -> set[str]:
        """Empty the work folder, but for the journal's first line; no shard is there."""
        self._keep = False
        self.journal.cut(0)
        self._remove_files()
        self.journal.append({"run": run})
        _sync(self.work)
        _sync(self.target)
        return set()

    def _recall(self) -> set[str]:
        """Read the journal, cut it before the first line that the files do not bear out; return the shards there."""
        lines = list(self.journal.lines())
        self._names = next((record["complete"] for record, _ in lines if "complete" in record), [])
        self._cleared = any("cleared" in record for record, _ in lines)
        self.complete = bool(self._names)
        stop, copied = 0, set()
        for record, end in lines:
            if not self.complete and not self._holds(record):
                break
            stop = end
            if "copied" in record:
                copied.add(record["copied"])
            elif "block" in record:
                self.done[record["block"]] = record["record"]
                self.written |= dict.fromkeys(record["crc32"], self.work)
            elif "note" in record:
                self.notes.append(record["note"])
        self.journal.cut(stop)
        self._keep = self.complete or bool(self.done)
        if self.complete:
            self._check_complete()
        return copied

    def _holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the files are as a line of the journal says."""
        if "copied" in record:
            shard = record["copied"]
            path = self.work / shard
            return (
                shard in self.source.shards
                and path.is_file()
                and path.stat().st_size == (self.source.folder / shard).stat().st_size
                and self._unchanged(record)
            )
        sums = record.get("crc32", {})
        return all(name in self.source.entries and self._checksum(name) == sums[name] for name in sums)

    def _unchanged(self, record: Mapping[str, Any]) -> bool:
        """Whether a shard of the source is still the one that was copied; it may have been fetched again since.

        Raises:
            CheckpointError: It holds something else now.
        """
        path = self.source.folder / record["copied"]
        if path.stat().st_mtime_ns != record["modified"] and _checksum(path, 0, path.stat().st_size) != record["sum"]:
            raise CheckpointError(
                f"{path}: has changed since the run in {self.target} began; begin anew with --overwrite, or choose "
                f"another --out"
            )
        return True

    def _checksum(self, name: str) -> str:
        """CRC of a tensor as it was written."""
        entry = self.source.entries[name]
        return _checksum(self.work / entry.shard, entry.start, entry.stop)

    def _check_complete(self) -> None:
        """Refuse to go on where a file is neither waiting for its name nor has it."""
        for name in self._names:
            if not (self.work / name).is_file() and not (self._cleared and (self.target / name).is_file()):
                raise CheckpointError(
                    f"{self.target}: {name} of the run there is gone; begin anew with --overwrite, or choose another "
                    f"--out"
                )

    def _copy(self, copied: set[str]) -> None:
        """Copy the shards that are not there yet."""
        if self.complete:
            return
        for shard in self.source.shards:
            if shard not in copied:
                path, modified = self.source.folder / shard, (self.source.folder / shard).stat().st_mtime_ns
                shutil.copyfile(path, self.work / shard)
                _sync(self.work / shard)
                total = _checksum(path, 0, path.stat().st_size)
                self.journal.append({"copied": shard, "modified": modified, "sum": total})
        _sync(self.work)

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def write(self, block: str, tensors: Iterable[tuple[str, Tensor]], record: Mapping[str, Any]) -> None:
        """Put the pruned tensors of a block in their places and note in the journal that the block is done.

        Args:
            block: Its name.
            tensors: On-disk names and tensors of the on-disk shape, cast to the on-disk dtype; taken one at a time.
            record: What the report needs to know of the block.
        """
        sums, touched = {}, set()
        with self._explained():
            for name, tensor in tensors:
                data, entry = self._bytes(name, tensor), self.source.entries[name]
                with (self.work / entry.shard).open("r+b") as file:
                    file.seek(entry.start)
                    file.write(data)
                sums[name] = f"{zlib.crc32(data):08x}"
                touched.add(entry.shard)
            for shard in sorted(touched):
                _sync(self.work / shard)
            self.journal.append({"block": block, "crc32": sums, "record": record})
        self.written |= dict.fromkeys(sums, self.work)
        self._keep = True

    def _bytes(self, name: str, tensor: Tensor) -> memoryview:
        entry = self.source.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(f"{name}: {list(entry.shape)} on disk, but {list(tensor.shape)} would be written")
        data = tensor.detach().to("cpu", DTYPES[entry.dtype]).contiguous()
        return memoryview(data.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def note(self, record: Mapping[str, Any]) -> None:
        """Put a line into the journal that a resumed run finds in `notes`."""
        with self._explained():
            self.journal.append({"note": record})

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, files: Mapping[str, str]) -> None:
        """Give everything its final name: shards, tokenizer and configs, `files` (name -> text), config.json last.

        An earlier output goes first, its config.json before all else, so that no mixture of two can be loaded. What
        dies in here is done by calling it again; `files` are there already where the writer is `complete`.
        """
        with self._explained():
            if not self.complete:
                self._prepare(files)
            if not self._cleared:
                for path in earlier(self.target):
                    path.unlink(missing_ok=True)
                _sync(self.target)
                self.journal.append({"cleared": True})
                self._cleared = True
            for name in self._names:
                if name == CONFIG:
                    _sync(self.target)  # it makes a model of the others
                if (self.work / name).exists():
                    (self.work / name).replace(self.target / name)
            _sync(self.target)
            self._remove()

    def _prepare(self, files: Mapping[str, str]) -> None:
        """Have every file of the output on the disk in the work folder."""
        companions = self.source.companions()
        for path in companions:
            shutil.copyfile(path, self.work / path.name)
        for name, text in files.items():
            (self.work / name).write_text(text, encoding="utf-8")
        names = sorted({*self.source.shards, *(path.name for path in companions), *files})
        names.sort(key=lambda name: (name == CONFIG, not name.endswith(".safetensors")))
        for name in names:
            _sync(self.work / name)
        _sync(self.work)
        self.journal.append({"complete": names})
        self.complete, self._names, self._keep = True, names, True

    def _remove_files(self) -> None:
        """Empty the work folder but for the journal, and what a folder of a network keeps while it is open."""
        for path in self.work.iterdir():
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path != self.journal.path:
                    path.unlink()

    def _remove(self) -> None:
        """Remove the work folder, its journal last."""
        self._remove_files()
        self.journal.path.unlink()
        self._unlock()
        with suppress(OSError):  # the next run is there already
            self.work.rmdir()


def _checksum(path: Path, start: int, stop: int) -> str:
    """CRC-32 of some bytes of a file."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(start)
        for at in range(start, stop, PIECE):
            checksum = zlib.crc32(file.read(min(PIECE, stop - at)), checksum)
    return f"{checksum:08x}"


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, new: bool) -> int | None:
    """Take a file for this process alone while the descriptor is open; None where the system has no such locks.

    Args:
        path: The file.
        new: It may have to be made first.

    Raises:
        CheckpointError: Another process has it.
    """
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if sys.platform == "win32":
        return None
    busy = f"{path.parent.parent}: another process is at work there; wait for it, or choose another --out"
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # its owner has just removed it
        raise CheckpointError(busy) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(descriptor).st_nlink > 0  # it is not removed
    except BlockingIOError:
        free = False
    except OSError:  # a file system without locks
        free = True
    if not free:
        os.close(descriptor)
        raise CheckpointError(busy)
    return descriptor


# ---- what is in a folder ---------------------------------------------------------------------------------------------


def unfinished(target: Path) -> bool:
    """Whether a folder holds a run of ours that did not come to its end."""
    return (target / WORK / JOURNAL).is_file()


def finished(target: Path) -> bool:
    """Whether a folder holds a whole output of ours."""
    return (target / REPORT).is_file() and (target / CONFIG).is_file() and not unfinished(target)


def earlier(target: Path) -> list[Path]:
    """Files of an earlier output that must go before another takes their place, in the order of their going.

    The index goes last: a removal that dies finds by it what is left.
    """
    shards = {path.name for path in target.glob("model-?????-of-?????.safetensors")}
    with suppress(CheckpointError, OSError):
        named = read_json(target / INDEX).get("weight_map")
        found = named.values() if isinstance(named, dict) else ()
        shards |= {n for n in found if isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors")}
    return [target / name for name in (CONFIG, SINGLE, *sorted(shards), INDEX)]


def check_target(source: Checkpoint, target: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        CheckpointError: It is the source or something that we did not make, or the disk has too little room.
    """
    if target.resolve() == source.folder.resolve():
        raise CheckpointError(f"{target}: is the model itself; choose another --out")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; choose another --out")
    if target.is_dir():
        _check_contents(target, overwrite or resume)
    parent = next(p for p in (target.resolve(), *target.resolve().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{target}: {parent} is no folder to write to; choose another --out")
    if resume and unfinished(target) and any("complete" in r for r in Journal(target / WORK / JOURNAL).records()):
        return  # all that needs room is there
    there = sum(path.stat().st_size for path in (target / WORK).glob("*.safetensors"))
    free = shutil.disk_usage(parent).free + there
    if free < source.nbytes * 1.01:
        raise CheckpointError(
            f"{target}: {source.nbytes / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on that disk; "
            f"free some, or choose another --out"
        )


def _check_contents(target: Path, allowed: bool) -> None:
    """Refuse a folder of others, and one of ours where it is not allowed."""
    work = target / WORK
    others = [path for path in target.iterdir() if path != work or not path.is_dir() or any(path.iterdir())]
    if not others:
        return
    if not (target / REPORT).is_file() and not unfinished(target):
        raise CheckpointError(f"{target}: exists and is not an output of ours; choose another --out")
    if unfinished(target) and not allowed:
        raise CheckpointError(
            f"{target}: holds an unfinished run; go on with --resume, begin anew with --overwrite, or choose another "
            f"--out"
        )
    if not allowed:
        raise CheckpointError(f"{target}: holds an earlier run; choose another --out or add --overwrite")


# ---- whose run it is -------------------------------------------------------------------------------------------------


def check_run(target: Path, then: Any, now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other options, unfinished or not.

    Raises:
        CheckpointError: Naming what differs.
    """
    old, new = _flat("", then), _flat("", json.loads(json.dumps(now, sort_keys=True)))
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if not differing:
        return
    named = [f"{key} {_short(old.get(key))}, now {_short(new.get(key))}" for key in differing[:3]]
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    kind = "unfinished run" if unfinished(target) else "run"
    raise CheckpointError(
        f"{target}: the {kind} there had {'; '.join(named)}{more}; give the same options, begin anew with "
        f"--overwrite and not --resume, or choose another --out"
    )


def _flat(path: str, value: Any) -> dict[str, str]:
    """What lies at the dotted paths of nested objects."""
    if not isinstance(value, dict) or not value:
        return {path: repr(value)}
    return {k: v for name, inner in value.items() for k, v in _flat(f"{path}.{name}".lstrip("."), inner).items()}


def _short(text: str | None) -> str:
    if text is None:
        return "(absent)"
    return text if len(text) <= 60 else f"{text[:56]} ..."


# ---- journal ---------------------------------------------------------------------------------------------------------


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

    def lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Every whole line and where it ends, up to the first that is torn or damaged."""
        stop = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or not body or checksum != b"%08x" % zlib.crc32(body):
                break
            stop += len(line)
            yield json.loads(body), stop

    def records(self) -> list[dict[str, Any]]:
        """What the whole lines say."""
        return [record for record, _ in self.lines()]

    def cut(self, stop: int) -> None:
        """Drop everything from there on."""
        with self.path.open("r+b") as file:
            file.truncate(stop)
            os.fsync(file.fileno())
