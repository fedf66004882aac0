"""What is written is the source but for the pruned matrices, and it is there as a whole or not at all."""

import errno
import itertools
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsegpt_lite import writer as writer_module
from sparsegpt_lite.calibration import Windows
from sparsegpt_lite.checkpoint import DTYPES, Checkpoint, read_header
from sparsegpt_lite.config import PruneConfig
from sparsegpt_lite.errors import CheckpointError
from sparsegpt_lite.methods import METHODS
from sparsegpt_lite.pipeline import prune
from sparsegpt_lite.report import PruneReport
from sparsegpt_lite.writer import Journal, Writer, check_run, check_target, finished, unfinished

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARDED = {"max_shard_size": "40KB"}
CONFIG = PruneConfig(method="magnitude", batch_size=2)
WINDOWS = Windows(torch.arange(64).view(2, 32) + 40, "numbers", "-", "none")
KINDS = {
    "llama": {},
    "llama in shards": SHARDED,
    "llama in bfloat16": {"dtype": torch.bfloat16},
    "qwen3 in shards": SHARDED,  # its head is tied to its embeddings
    "gpt2": {},  # its layers lie transposed
    "opt in shards": SHARDED,
    "bloom": {},
    "mixtral in shards": SHARDED,  # its experts are fused when they are loaded
}


def run(source: Path, target: Path, **options: bool) -> PruneReport:
    return prune(source, target, CONFIG, calibration=WINDOWS, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finals(folder: Path) -> dict[str, bytes]:
    """Files that have their final names."""
    return {name: data for name, data in contents(folder).items() if Path(name).parts[0] != ".work"}


def first_line(folder: Path) -> dict[str, object]:
    """Of whom the run in a folder is."""
    return Journal(folder / ".work" / "journal").records()[0]["run"]


def hub_cache(source: Path, cache: Path) -> Path:
    """Move a model into the layout of the Hub's cache; the snapshot of links there."""
    blobs, snapshot = cache / "models--x" / "blobs", cache / "models--x" / "snapshots" / "abc123"
    blobs.parent.mkdir(parents=True)
    source.rename(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def header(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + struct.unpack("<Q", raw[:8])[0]]


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    entries = Checkpoint(folder).entries
    return {name: (folder / e.shard).read_bytes()[e.start : e.stop] for name, e in entries.items()}


@dataclass(frozen=True)
class Pruned:
    source: Path
    target: Path
    report: PruneReport


@pytest.fixture(scope="module")
def pruned(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pruned]:
    """Factory of pruned checkpoints of one of the kinds; never written to by a test."""
    made: dict[str, Pruned] = {}

    def make(kind: str) -> Pruned:
        if kind not in made:
            source, target = checkpoint(kind.split()[0], **KINDS[kind]), tmp_path_factory.mktemp("pruned") / "out"
            made[kind] = Pruned(source, target, run(source, target))
        return made[kind]

    return make


@pytest.fixture
def source(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded checkpoint that a test may change."""
    return shutil.copytree(checkpoint("llama", **SHARDED), tmp_path / "source")


@pytest.fixture
def at_matrix(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Call a function when the n-th matrix is about to be solved; llama has seven a block."""

    def arrange(n: int, act: Callable[[], object]) -> None:
        solve, numbers = METHODS["magnitude"], itertools.count(1)

        def method(*args: object) -> object:
            if next(numbers) == n:
                act()
            return solve(*args)

        monkeypatch.setitem(METHODS, "magnitude", method)

    return arrange


def fail() -> None:
    raise RuntimeError("struck by lightning")


def fail_to_copy() -> None:
    raise OSError("unreadable")


def interrupt() -> None:
    raise KeyboardInterrupt


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layout_is_that_of_the_source(kind, pruned):
    source, target = pruned(kind).source, pruned(kind).target
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert shards == sorted(path.name for path in target.glob("*.safetensors"))
    assert ("shards" in kind) == (len(shards) > 1)
    assert [header(source / name) for name in shards] == [header(target / name) for name in shards]
    assert [(source / name).stat().st_size for name in shards] == [(target / name).stat().st_size for name in shards]
    assert (source / INDEX).exists() == (target / INDEX).exists()
    if (source / INDEX).exists():
        assert (source / INDEX).read_bytes() == (target / INDEX).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_pruned_matrices_change(kind, pruned):
    before, after = tensor_bytes(pruned(kind).source), tensor_bytes(pruned(kind).target)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {matrix.name for matrix in pruned(kind).report.matrices}
    assert not [
        name for name in changed if any(part in name for part in ("embed", "norm", "ln_", "lm_head", "bias", "wte"))
    ]


def test_source_stays_as_it_is(source, tmp_path):
    before = contents(source)
    run(source, tmp_path / "out")
    assert contents(source) == before


def test_two_runs_write_the_same_bytes(pruned, tmp_path):
    first = pruned("llama in shards")
    run(first.source, tmp_path / "again")
    first_files, second_files = contents(first.target), contents(tmp_path / "again")
    assert first_files.keys() == second_files.keys()
    assert [name for name in first_files if first_files[name] != second_files[name]] == ["sparsity.json"]  # has times


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["one file", "shards"])
def test_tensors_that_the_model_does_not_know_survive(options, checkpoint, tmp_path):
    source, target = shutil.copytree(checkpoint("llama", **options), tmp_path / "source"), tmp_path / "out"
    extra = {"extra.float": torch.randn(3, 5), "extra.int": torch.arange(7), "extra.flag": torch.tensor([True, False])}
    extra |= {"model.layers.0.extra.half": torch.randn(4, 4).half(), "extra.scalar": torch.tensor(1.5)}
    path = sorted(source.glob("*.safetensors"))[0]
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    if (source / INDEX).exists():
        index = json.loads((source / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(extra, path.name)
        (source / INDEX).write_text(json.dumps(index))
    run(source, target)
    before, after = tensor_bytes(source), tensor_bytes(target)
    assert before.keys() == after.keys()
    assert [before[name] for name in extra] == [after[name] for name in extra]


def test_companions(source, tmp_path):
    along = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt",
             "tokenizer.model", "modeling_x.py", "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md"]  # fmt: skip
    behind = [
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.gguf",
        ".gitattributes",
        "nested/a.json",
    ]
    (source / "nested").mkdir()
    for name in along + behind:
        if not (source / name).exists():
            (source / name).write_text(f"{name} of the source")
    run(source, tmp_path / "out")
    files = contents(tmp_path / "out")
    shards = [path.name for path in source.glob("model-*.safetensors")]
    assert sorted(files) == sorted([*along, *shards, "config.json", INDEX, "sparsity.json"])
    assert [name for name in [*along, "config.json"] if files[name] != (source / name).read_bytes()] == []


def test_report_is_written_and_the_work_folder_gone(source, tmp_path):
    (source / "sparsity.json").write_text("of an earlier pruning of the source")
    report = run(source, tmp_path / "out")
    assert (tmp_path / "out" / "sparsity.json").read_text(encoding="utf-8") == report.to_json()
    assert json.loads(report.to_json())["calibration"]["digest"] == WINDOWS.digest
    assert not (tmp_path / "out" / ".work").exists()


def test_file_modes(source, tmp_path):
    for path in source.iterdir():
        path.chmod(0o444)  # as in the cache of the Hub
    old = os.umask(0o022)
    try:
        run(source, tmp_path / "out")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_source_in_the_cache_of_the_hub(source, tmp_path):
    snapshot = hub_cache(source, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    run(snapshot, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    assert sorted(contents(tmp_path / "out")) == sorted([*contents(snapshot), "sparsity.json"])
    assert contents(tmp_path / "cache") == before


def test_all_is_on_the_disk_before_it_has_its_name(source, tmp_path, monkeypatch):
    synced = set()
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda file, real=real: (synced.add(os.fstat(file).st_ino), real(file)))
    run(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.stat().st_ino not in synced] == []


# ---- failures and overwriting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_failure_in_the_first_block_leaves_nothing(n, source, tmp_path, at_matrix):
    before = contents(source)
    at_matrix(n, fail)
    with pytest.raises(RuntimeError, match="lightning"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert contents(source) == before


@pytest.mark.parametrize(("n", "act"), [(8, fail), (14, fail), (1, interrupt), (8, interrupt)])
def test_what_is_worth_it_is_kept_to_go_on(n, act, source, tmp_path, at_matrix):
    """After the first block, and whenever the user interrupts; nothing of it has a final name."""
    before = contents(source)
    at_matrix(n, act)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        run(source, tmp_path / "out")
    assert {Path(name).parts[0] for name in contents(tmp_path / "out")} == {".work"}
    assert unfinished(tmp_path / "out")
    assert contents(source) == before


@pytest.mark.parametrize("n", [1, 8])
def test_failure_on_the_way_leaves_an_earlier_output(n, source, tmp_path, at_matrix):
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    at_matrix(n, fail)
    with pytest.raises(RuntimeError, match="lightning"):
        run(source, tmp_path / "out", overwrite=True)
    assert finals(tmp_path / "out") == before
    assert unfinished(tmp_path / "out") == (n == 8)


@pytest.fixture
def failing_rename(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the n-th file from now on not get its final name; with 0 all do."""

    rename = Path.replace

    def arrange(n: int) -> None:
        numbers = itertools.count(1)

        def replace(path: Path, target: Path) -> Path:
            if next(numbers) == n:
                raise OSError("stale file handle")
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", replace)

    return arrange


@pytest.mark.parametrize("n", [1, 2, 7])
def test_failure_of_a_rename_leaves_what_can_be_finished(n, source, tmp_path, failing_rename):
    run(source, tmp_path / "whole")
    failing_rename(n)
    with pytest.raises(CheckpointError, match=r"out: .*stale file handle.*--resume"):
        run(source, tmp_path / "out")
    failing_rename(0)
    assert not (tmp_path / "out" / "config.json").exists()
    with Writer(Checkpoint(source), tmp_path / "out", first_line(tmp_path / "out"), resume=True) as writer:
        assert writer.complete
        writer.finish({})
    whole, out = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert {name for name in whole | out if whole.get(name) != out.get(name)} == {"sparsity.json"}  # has times


def test_failure_of_a_rename_never_leaves_half_of_two_models(source, tmp_path, failing_rename):
    run(source, tmp_path / "out")
    failing_rename(2)
    with pytest.raises(CheckpointError, match="--resume"):
        prune(source, tmp_path / "out", PruneConfig("0.9", "magnitude"), calibration=WINDOWS, overwrite=True)
    assert "config.json" not in contents(tmp_path / "out")


@pytest.mark.parametrize(("first", "second"), [({}, SHARDED), (SHARDED, {}), (SHARDED, {"max_shard_size": "60KB"})])
def test_overwriting_an_output_of_another_layout(first, second, checkpoint, tmp_path):
    run(checkpoint("llama", **first), tmp_path / "out")
    run(checkpoint("llama", **second), tmp_path / "out", overwrite=True)
    run(checkpoint("llama", **second), tmp_path / "fresh")
    assert sorted(contents(tmp_path / "out")) == sorted(contents(tmp_path / "fresh"))
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "fresh")


def test_overwriting_leaves_files_that_are_not_ours(source, tmp_path):
    run(source, tmp_path / "out")
    for name in ("notes.txt", "adapter_model.safetensors"):
        (tmp_path / "out" / name).write_text("mine")
    run(source, tmp_path / "out", overwrite=True)
    for name in ("notes.txt", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_text() == "mine"


# ---- journal ---------------------------------------------------------------------------------------------------------


def test_journal_of_a_run_that_is_killed_in_its_second_block(source, tmp_path, at_matrix):
    target, work = tmp_path / "out", tmp_path / "work"
    at_matrix(9, lambda: shutil.copytree(target / ".work", work) and fail())
    with pytest.raises(RuntimeError, match="lightning"):
        run(source, target)
    entries, shards = Checkpoint(source).entries, Checkpoint(source).shards
    first, *copied, block = Journal(work / "journal").records()
    assert first["run"]["checkpoint"] == Checkpoint(source).digest
    assert first["run"]["config"]["method"] == "magnitude"
    assert [line["copied"] for line in copied] == shards
    assert [line["sum"] for line in copied] == [f"{zlib.crc32((source / shard).read_bytes()):08x}" for shard in shards]
    assert block["block"] == "model.layers.0"
    names = [n for n in entries if n.startswith("model.layers.0.") and n.endswith("_proj.weight")]
    assert sorted(block["crc32"]) == sorted(names)
    assert sorted(row["name"] for row in block["record"]["rows"]) == sorted(names)
    for name, entry in entries.items():
        ours = (work / entry.shard).read_bytes()[entry.start : entry.stop]
        theirs = (source / entry.shard).read_bytes()[entry.start : entry.stop]
        assert (ours != theirs) == (name in names)
        assert block["crc32"].get(name, f"{zlib.crc32(ours):08x}") == f"{zlib.crc32(ours):08x}"


def test_bytes_are_on_the_disk_before_the_journal_says_so(source, tmp_path, monkeypatch):
    checkpoint, events = Checkpoint(source), []
    writer = Writer(checkpoint, tmp_path / "out", {})
    sync, append = os.fsync, Journal.append
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_ino), sync(file)))
    monkeypatch.setattr(Journal, "append", lambda self, record: (events.append("journal"), append(self, record)))
    name = "model.layers.0.mlp.up_proj.weight"
    writer.write("block", {name: checkpoint.read(name)}.items(), {})
    shard, journal = tmp_path / "out" / ".work" / checkpoint.entries[name].shard, writer.journal.path
    assert events == [shard.stat().st_ino, "journal", journal.stat().st_ino]


RECORDS = [{"run": {"seed": 0}}, {"copied": "a\nb ü"}, {"block": "x", "crc32": {"w": "00"}, "record": []}, {}]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal")
    for record in RECORDS:
        journal.append(record)
    return journal


def test_journal_gives_back_what_was_appended(journal):
    assert journal.records() == RECORDS
    assert journal.path.read_bytes().count(b"\n") == len(RECORDS)


def test_journal_is_cut_where_its_tail_is_torn(journal):
    data = journal.path.read_bytes()
    for length in range(len(data)):
        journal.path.write_bytes(data[:length])
        assert journal.records() == RECORDS[: data[:length].count(b"\n")]


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_journal_is_cut_where_a_byte_is_damaged(journal, flip):
    data = journal.path.read_bytes()
    for at in range(len(data)):
        journal.path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        assert journal.records() == RECORDS[: data[:at].count(b"\n")]


@pytest.mark.parametrize("tail", [b"\n", b"\0" * 64, b"00000000 \n", b'00000000 {"block": "x"}\n', b"\xff\xfe\n"])
def test_journal_is_cut_before_what_is_no_line(journal, tail):
    journal.path.write_bytes(journal.path.read_bytes() + tail)
    assert journal.records() == RECORDS


# ---- Writer ----------------------------------------------------------------------------------------------------------


def test_writer_casts_to_the_dtype_of_the_disk(checkpoint, tmp_path):
    source = Checkpoint(checkpoint("llama", dtype=torch.bfloat16))
    writer = Writer(source, tmp_path / "out", {})
    name = "model.layers.1.mlp.up_proj.weight"
    W = torch.randn(source.entries[name].shape, dtype=torch.float64).T.contiguous().T  # not contiguous
    writer.write("block", {name: W}.items(), {})
    writer.finish({"sparsity.json": "{}"})
    assert torch.equal(Checkpoint(tmp_path / "out").read(name), W.bfloat16())


def test_writer_refuses_another_shape(checkpoint, tmp_path):
    writer = Writer(Checkpoint(checkpoint("llama")), tmp_path / "out", {})
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name}: \[96, 32\] on disk, but \[32, 96\] would be written"):
        writer.write("block", {name: torch.zeros(32, 96)}.items(), {})


def test_files_that_are_given_stand_before_those_of_the_source(source, tmp_path):
    writer = Writer(Checkpoint(source), tmp_path / "out", {})
    writer.finish({"generation_config.json": "{}", "README.md": "a card, ü"})
    assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "a card, ü"


def test_config_gets_its_name_last(source, tmp_path, monkeypatch):
    names, rename = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: names.append(path.name) or rename(path, target))
    run(source, tmp_path / "out")
    assert sorted(names) == sorted(contents(tmp_path / "out"))
    assert names[-1] == "config.json"


def test_tensors_are_written_one_at_a_time(source, tmp_path):
    opened = Checkpoint(source)
    writer, names, seen = Writer(opened, tmp_path / "out", {}), sorted(opened.entries), []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in reversed(names):
            seen.append(not seen or not there(names[names.index(name) + 1]).any())
            yield name, torch.zeros(opened.entries[name].shape)

    def there(name: str) -> Tensor:
        with opened.slices([name], dict.fromkeys(names, tmp_path / "out" / ".work")) as slices:
            return slices[name][...]

    writer.write("all", tensors(), {})
    assert seen == [True] * len(names)
    assert writer.written == dict.fromkeys(names, tmp_path / "out" / ".work")
    assert not there(names[0]).any()


# ---- resume ----------------------------------------------------------------------------------------------------------

RUN = {"source": "here", "config": {"sparsity": "0.5", "seed": 0, "skip": None}, "version": [1, 2]}
BLOCKS = {"l0": ["l0.w", "l0.v"], "l1": ["l1.w", "l1.v"]}


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    """A source of three shards, one of them in both blocks."""
    folder, generator = tmp_path / "three", torch.Generator().manual_seed(0)
    layout = {"a": ["embed", "l0.w"], "b": ["l0.v", "l1.w"], "c": ["l1.v", "norm"]}
    folder.mkdir()
    for shard, names in layout.items():
        tensors = {name: torch.randn(6, 5, generator=generator).bfloat16() for name in names}
        save_file(tensors, folder / f"{shard}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{shard}.safetensors" for shard, names in layout.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text(f'{{"name": "{name}"}}')
    return folder


def one_shard(folder: Path) -> Path:
    """An earlier output of another layout, with a file of the user beside it."""
    folder.mkdir()
    save_file({"old": torch.ones(3)}, folder / SINGLE)
    for name in ("config.json", "sparsity.json", "tokenizer.json"):
        (folder / name).write_text('{"of": "the earlier output"}')
    (folder / "notes.txt").write_text("mine")
    return folder


def drive(source: Path, target: Path, **options: bool) -> list[str]:
    """Do with a writer what prune does; the blocks that were written."""
    opened = Checkpoint(source)
    with Writer(opened, target, RUN, **options) as writer:
        blocks = sorted(BLOCKS.keys() - writer.done.keys())
        for block in blocks:
            writer.note({"before": block})
            writer.write(block, ((name, opened.read(name) * 2) for name in BLOCKS[block]), {"name": block})
        writer.finish({"sparsity.json": '{"whole": true}'})
    return blocks


class Deaths:
    """What is on the disk at every moment of a run: copies of its folder, one before and after each step.

    With `power`, files have the bytes of their last fsync, as where the machine dies, not the process alone.
    """

    def __init__(self, target: Path, copies: Path, patch: pytest.MonkeyPatch, power: bool) -> None:
        self.target, self.copies, self.power = target, copies, power
        self.found: list[Path] = []
        self.synced = {path.stat().st_ino: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        fsync, copyfile = os.fsync, shutil.copyfile

        def sync(descriptor: int) -> None:
            self.take()
            fsync(descriptor)
            for path in self.target.rglob("*"):
                if path.is_file() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                    self.synced[path.stat().st_ino] = path.read_bytes()
            self.take()

        def copy(source: Path, target: Path) -> None:
            data = source.read_bytes()
            target.write_bytes(data[: len(data) // 2])
            self.take()
            copyfile(source, target)
            self.take()

        def step(real: Callable[..., object]) -> Callable[..., object]:
            def act(*args: object, **options: object) -> object:
                self.take()
                result = real(*args, **options)
                self.take()
                return result

            return act

        patch.setattr(os, "fsync", sync)
        patch.setattr(shutil, "copyfile", copy)
        for name in ("replace", "unlink", "rmdir", "mkdir", "touch", "write_text"):
            patch.setattr(Path, name, step(getattr(Path, name)))

    def take(self) -> None:
        if not self.target.exists():
            return
        copy = self.copies / str(len(self.found))
        shutil.copytree(self.target, copy, copy_function=self.copy)
        self.found.append(copy)

    def copy(self, source: str, target: str) -> None:
        with open(source, "rb") as old, open(target, "wb") as new:
            new.write(self.synced.get(os.fstat(old.fileno()).st_ino, b"") if self.power else old.read())


@pytest.mark.parametrize("power", [False, True], ids=["killed", "without power"])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an earlier output"])
def test_run_that_dies_at_any_moment_goes_on(earlier, power, three_shards, tmp_path, monkeypatch):
    target = one_shard(tmp_path / "out") if earlier else tmp_path / "out"
    before = contents(target)
    with monkeypatch.context() as patch:
        deaths = Deaths(target, tmp_path / "deaths", patch, power)
        drive(three_shards, target, overwrite=earlier)
    whole = contents(target)
    shards = ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert sorted(finals(target)) == sorted(
        [*shards, "config.json", INDEX, "sparsity.json", "tokenizer.json", *(["notes.txt"] if earlier else [])]
    )
    assert whole["b.safetensors"] != (three_shards / "b.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # saves time
    assert len(deaths.found) > 80
    seen = set()
    for folder in deaths.found:
        journal = Journal(folder / ".work" / "journal")
        records = journal.records() if journal.path.exists() else []
        assert "config.json" not in finals(folder) or finals(folder) in (before, whole)  # never a mixture
        if finished(folder) and finals(folder) != before:
            assert finals(folder) == whole
            continue
        redone = drive(three_shards, folder, resume=True, overwrite=earlier)
        assert contents(folder) == whole
        assert not (folder / ".work").exists()
        assert redone == sorted(BLOCKS.keys() - {record.get("block") for record in records})
        seen.add((len(redone), "complete" in str(records), "cleared" in str(records)))
    assert seen == {(2, False, False), (1, False, False), (0, False, False), (0, True, False), (0, True, True)}


def test_death_while_a_failed_run_is_removed(three_shards, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        deaths = Deaths(tmp_path / "out", tmp_path / "deaths", patch, power=False)
        copy = shutil.copyfile
        patch.setattr(shutil, "copyfile", lambda old, new: fail_to_copy() if old.name[0] == "c" else copy(old, new))
        with pytest.raises(CheckpointError, match="unreadable"):
            drive(three_shards, tmp_path / "out")
    for folder in deaths.found:
        drive(three_shards, folder, resume=True)
        assert contents(folder) == whole


@pytest.fixture
def stopped(three_shards: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Factory of the output folder of a run that was killed after so many blocks."""

    def make(blocks: int) -> Path:
        opened = Checkpoint(three_shards)
        with suppress(KeyboardInterrupt), Writer(opened, tmp_path / "stopped", RUN) as writer:
            for block, names in [*BLOCKS.items()][:blocks]:
                writer.note({"before": block})
                writer.write(block, [(name, opened.read(name) * 2) for name in names], {"name": block})
            raise KeyboardInterrupt
        return tmp_path / "stopped"

    return make


@pytest.fixture
def whole(three_shards: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run leaves."""
    drive(three_shards, tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("line", range(9))
def test_line_of_the_journal_that_is_torn_at_any_byte(line, three_shards, tmp_path, monkeypatch, whole):
    """Of: the run, three copies, a note, a block, a note, a block, the end."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        append, numbers = Journal.append, itertools.count()

        def die(self: Journal, record: dict[str, object]) -> None:
            append(self, record)
            if next(numbers) == line:
                raise KeyboardInterrupt

        patch.setattr(Journal, "append", die)
        drive(three_shards, tmp_path / "killed")
    lines = (tmp_path / "killed" / ".work" / "journal").read_bytes().splitlines(keepends=True)
    assert len(lines) == line + 1
    length = sum(map(len, lines))
    for torn in range(len(lines[-1]) + 1):
        folder = shutil.copytree(tmp_path / "killed", tmp_path / "copy")
        os.truncate(folder / ".work" / "journal", length - torn)
        redone = drive(three_shards, folder, resume=True)
        assert redone == [["l0", "l1"], ["l1"], []][(line - (torn > 0) >= 5) + (line - (torn > 0) >= 7)]
        assert contents(folder) == whole
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "done"), [("l0.v", []), ("l1.w", ["l0"]), ("l1.v", ["l0"])])
def test_block_whose_bytes_were_damaged_is_done_again(name, done, three_shards, stopped, whole):
    folder, entry = stopped(2), Checkpoint(three_shards).entries[name]
    with (folder / ".work" / entry.shard).open("r+b") as file:
        file.seek(entry.stop - 1)
        last = file.read(1)
        file.seek(entry.stop - 1)
        file.write(bytes([last[0] ^ 0x10]))
    with Writer(Checkpoint(three_shards), folder, RUN, resume=True) as writer:
        assert [*writer.done] == done
        assert writer.written == dict.fromkeys(itertools.chain(*(BLOCKS[b] for b in done)), folder / ".work")
        kept = writer.journal.records()
    assert [record["block"] for record in kept if "block" in record] == done
    assert drive(three_shards, folder, resume=True) == sorted(BLOCKS.keys() - done)
    assert contents(folder) == whole


@pytest.mark.parametrize("size", [0, 100, None])
@pytest.mark.parametrize("shard", ["a", "b", "c"])
def test_shard_that_is_not_whole_is_copied_again(shard, size, three_shards, stopped, whole):
    folder = stopped(2)
    path = folder / ".work" / f"{shard}.safetensors"
    path.unlink() if size is None else os.truncate(path, size)
    assert drive(three_shards, folder, resume=True) == ["l0", "l1"]
    assert contents(folder) == whole


def test_what_was_done_comes_back(three_shards, stopped, whole):
    folder = stopped(1)
    with Writer(Checkpoint(three_shards), folder, RUN, resume=True) as writer:
        assert (writer.done, writer.notes, writer.complete) == ({"l0": {"name": "l0"}}, [{"before": "l0"}], False)
        writer.note({"batch_size": 4})
    with Writer(Checkpoint(three_shards), folder, RUN, resume=True) as writer:
        assert writer.notes == [{"before": "l0"}, {"batch_size": 4}]
        with Checkpoint(three_shards).slices(BLOCKS["l0"], writer.written) as slices:
            assert all(torch.equal(slices[n][...], Checkpoint(three_shards).read(n) * 2) for n in BLOCKS["l0"])
    drive(three_shards, folder, resume=True)
    assert contents(folder) == whole


def test_new_run_knows_nothing_of_the_unfinished_one(three_shards, stopped):
    with Writer(Checkpoint(three_shards), stopped(2), RUN, overwrite=True) as writer:
        assert (writer.done, writer.notes, writer.written, writer.complete) == ({}, [], {}, False)
        assert len(writer.journal.records()) == 4
        path = writer.work / "b.safetensors"
        assert path.read_bytes() == (three_shards / "b.safetensors").read_bytes()


@pytest.mark.parametrize("state", ["absent", "empty", "an empty work folder", "an empty journal"])
def test_resume_where_nothing_was_done(state, three_shards, tmp_path, whole):
    target = tmp_path / "out"
    if state != "absent":
        (target / ".work" if "work" in state or "journal" in state else target).mkdir(parents=True)
    if "journal" in state:
        (target / ".work" / "journal").touch()
    check_target(Checkpoint(three_shards), target, False, resume=True)
    assert drive(three_shards, target, resume=True) == ["l0", "l1"]
    assert contents(target) == whole


def test_empty_work_folder_in_a_finished_output(three_shards, tmp_path, whole):
    drive(three_shards, tmp_path / "out")
    (tmp_path / "out" / ".work").mkdir()
    assert finished(tmp_path / "out")
    drive(three_shards, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == whole


def test_finished_and_unfinished(three_shards, tmp_path, stopped):
    assert not finished(tmp_path / "nowhere")
    assert not unfinished(tmp_path / "nowhere")
    drive(three_shards, tmp_path / "out")
    assert finished(tmp_path / "out")
    assert not unfinished(tmp_path / "out")
    assert unfinished(stopped(1))
    assert not finished(tmp_path / "stopped")
    assert not finished(three_shards)  # no report there


def test_finished_output_is_not_overwritten_by_resume(three_shards, tmp_path):
    drive(three_shards, tmp_path / "out")
    before = contents(tmp_path / "out")
    check_target(Checkpoint(three_shards), tmp_path / "out", False, resume=True)  # its caller deals with it
    with pytest.raises(CheckpointError, match=r"holds an earlier run; .*--overwrite"):
        drive(three_shards, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == before


def test_unfinished_run_is_not_overwritten_unasked(three_shards, stopped):
    folder = stopped(1)
    before = contents(folder)
    words = "stopped: holds an unfinished run; go on with --resume, begin anew with --overwrite, or choose another --"
    with pytest.raises(CheckpointError, match=words):
        drive(three_shards, folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"config": {**RUN["config"], "sparsity": "2:4"}}, ["had config.sparsity '0.5', now '2:4'; give the same"]),
        ({"config": {"seed": 0, "skip": "a\nb"}}, ["config.skip None, now 'a\\nb'", "sparsity '0.5', now (absent)"]),
        ({"version": [1, 3]}, ["had version [1, 2], now [1, 3]; give"]),
        ({"config": {}, "new": True}, ["config (absent), now {}", "config.seed 0, now (absent)", "; and 2 more; give"]),
        ({"source": "x" * 500}, ["had source 'here', now 'xxxxx", "xxx ...; give"]),
        ({"config": {**RUN["config"], "seed": False}}, ["had config.seed 0, now False; give"]),
    ],
)
def test_run_of_other_options_is_refused(now, words, three_shards, stopped):
    folder = stopped(1)
    before = contents(folder)
    with pytest.raises(CheckpointError) as caught:
        Writer(Checkpoint(three_shards), folder, RUN | now, resume=True)
    message = str(caught.value)
    assert message.startswith(f"{folder}: the unfinished run there had ")
    assert message.endswith(
        "; give the same options, begin anew with --overwrite and not --resume, or choose another --out"
    )
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 400
    assert contents(folder) == before
    drive(three_shards, folder, resume=True)  # the refused one does not hold the lock


def test_finished_run_of_other_options(three_shards, tmp_path):
    drive(three_shards, tmp_path / "out")
    check_run(tmp_path / "out", RUN, RUN)
    with pytest.raises(CheckpointError, match="out: the run there had source 'here', now 'there'; give the same"):
        check_run(tmp_path / "out", RUN, RUN | {"source": "there"})


def test_run_of_tuples_is_the_same(three_shards, stopped):
    with Writer(Checkpoint(three_shards), stopped(1), RUN | {"version": (1, 2)}, resume=True) as writer:
        assert [*writer.done] == ["l0"]


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=str)
def test_two_at_work_in_one_folder(options, blocks, three_shards, tmp_path, whole):
    opened, target = Checkpoint(three_shards), tmp_path / "out"
    with Writer(opened, target, RUN) as writer:
        for block in [*BLOCKS][:blocks]:
            writer.write(block, [(name, opened.read(name) * 2) for name in BLOCKS[block]], {})
        before = contents(target)
        with pytest.raises(CheckpointError, match="out: another process is at work there; wait for it, or choose"):
            Writer(opened, target, RUN, **options)
        assert contents(target) == before
    drive(three_shards, target, **options)  # when the first has left
    assert contents(target) == whole


def test_resumed_run_has_its_folder_for_itself(three_shards, stopped):
    folder = stopped(1)
    with Writer(Checkpoint(three_shards), folder, RUN, resume=True), pytest.raises(CheckpointError, match="at work"):
        Writer(Checkpoint(three_shards), folder, RUN, resume=True)


def test_run_that_ends_while_it_is_looked_at_is_not_begun_anew(three_shards, stopped, monkeypatch):
    folder = stopped(2)

    def end(*_: object) -> None:
        with Writer(Checkpoint(three_shards), folder, RUN, resume=True) as writer:
            writer.finish({"sparsity.json": "{}"})

    check = writer_module.check_target
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "check_target", lambda *a: patch.undo() or end() or check(*a[:2], True))
        with pytest.raises(CheckpointError, match="stopped: another process is at work there"):
            Writer(Checkpoint(three_shards), folder, RUN, resume=True)
    assert finished(folder)


def test_file_system_without_locks(three_shards, tmp_path, monkeypatch, whole):
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writer_module.fcntl, "flock", unknown)
    drive(three_shards, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["b.safetensors", "tokenizer.json"])
def test_complete_output_that_lost_a_file(name, three_shards, tmp_path, failing_rename, whole):
    failing_rename(1)
    with pytest.raises(CheckpointError, match="stale"):
        drive(three_shards, tmp_path / "out")
    failing_rename(0)
    (tmp_path / "out" / ".work" / name).unlink()
    left = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"out: {name} of the run there is gone; begin anew with --overwrite"):
        drive(three_shards, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == left
    drive(three_shards, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == whole


# ---- what an error leaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kept"), [(KeyboardInterrupt(), True), (SystemExit(1), True), (OSError("cut off"), False)]
)
def test_end_while_shards_are_copied(error, kept, three_shards, tmp_path, monkeypatch, whole):
    copy = shutil.copyfile

    def die(source: Path, target: Path) -> None:
        copy(source, target)
        if source.name == "b.safetensors":
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", die)
        with pytest.raises(type(error) if kept else CheckpointError):
            drive(three_shards, tmp_path / "out")
    assert unfinished(tmp_path / "out") == kept
    assert (tmp_path / "out").exists() == kept
    drive(three_shards, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("blocks", [0, 1])
def test_error_of_the_disk_in_a_block(blocks, three_shards, stopped, monkeypatch, whole):
    """Nothing is lost of the blocks before it, in this process or in an earlier one."""
    folder, append = stopped(blocks), Journal.append

    def full(self: Journal, record: dict[str, object]) -> None:
        if record.get("block") == f"l{blocks}":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(CheckpointError) as caught:
            drive(three_shards, folder, resume=True)
    assert re.search("No space left.*; make room there, ", str(caught.value))
    assert ("then go on with --resume" in str(caught.value)) == (blocks > 0)
    assert folder.exists() == (blocks > 0)
    assert drive(three_shards, folder, resume=True) == [*BLOCKS][blocks:]
    assert contents(folder) == whole


def test_error_while_reading_an_unfinished_run_removes_nothing(three_shards, stopped, monkeypatch, whole):
    folder = stopped(1)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_checksum", lambda *_: (_ for _ in ()).throw(OSError("bad sector")))
        with pytest.raises(CheckpointError, match="bad sector"):
            drive(three_shards, folder, resume=True)
    assert drive(three_shards, folder, resume=True) == ["l1"]
    assert contents(folder) == whole


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=str)
def test_room_that_the_unfinished_run_has_counts(options, three_shards, stopped, monkeypatch):
    folder, opened = stopped(1), Checkpoint(three_shards)
    usage = shutil.disk_usage(folder)
    needed = opened.nbytes // 50  # beside what is there already
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    check_target(opened, folder, **{"overwrite": False, **options})
    (folder / ".work" / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"are needed, .* are free on that disk; free some"):
        check_target(opened, folder, **{"overwrite": False, **options})


def test_complete_output_needs_no_room(three_shards, tmp_path, failing_rename, monkeypatch):
    failing_rename(3)
    with pytest.raises(CheckpointError, match="stale"):
        drive(three_shards, tmp_path / "out")
    failing_rename(0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert drive(three_shards, tmp_path / "out", resume=True) == []
    assert finished(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Factory of a file system of so many bytes."""
    place = tmp_path / "disk"

    def mount(size: int) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a file system of some size cannot be mounted here: {error}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if others had filled the disk only after it was looked at."""
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_disk_that_is_too_small(source, small_disk):
    disk, before = small_disk(100_000), contents(source)
    with pytest.raises(CheckpointError, match=r"GB are needed, .* GB are free on that disk; free some"):
        run(source, disk / "out")
    assert not any(disk.iterdir())
    assert contents(source) == before


def test_disk_that_is_full_when_shards_are_copied(source, small_disk, monkeypatch):
    disk, before = small_disk(100_000), contents(source)
    roomy(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        run(source, disk / "out")
    assert re.fullmatch(
        r"[^\n]*/out: cannot be written \([^\n]*No space left on device[^\n]*\); make room there[^\n]*",
        str(caught.value),
    )
    assert not any(disk.iterdir())
    assert contents(source) == before


def test_disk_that_is_full_when_the_output_is_finished(source, small_disk, monkeypatch, at_matrix, tmp_path):
    disk, before = small_disk(1_000_000), contents(source)
    roomy(monkeypatch)
    at_matrix(14, lambda: fill(disk))
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(.*No space left.*then go on with --resume$"):
        run(source, disk / "out")
    assert not finals(disk / "out")
    assert contents(source) == before
    (disk / "filler").unlink()
    run(source, tmp_path / "whole")
    with Writer(Checkpoint(source), disk / "out", first_line(disk / "out"), resume=True) as writer:
        assert "model.layers.0" in writer.done
        if "model.layers.1" not in writer.done:  # no room for its line in the journal
            names = [name for name in Checkpoint(source).entries if re.search(r"layers\.1.*_proj", name)]
            writer.write("model.layers.1", [(n, Checkpoint(tmp_path / "whole").read(n)) for n in names], {})
        writer.finish({"sparsity.json": "{}"})
    assert tensor_bytes(disk / "out") == tensor_bytes(tmp_path / "whole")


def test_output_on_another_disk(source, small_disk, pruned):
    disk = small_disk(10_000_000)
    assert disk.stat().st_dev != source.stat().st_dev
    run(source, disk / "out")
    assert tensor_bytes(disk / "out") == tensor_bytes(pruned("llama in shards").target)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory here")
def test_output_in_memory(source, pruned):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if Path(folder).stat().st_dev == source.stat().st_dev:
            pytest.skip("/dev/shm is the file system of the other tests")
        run(source, Path(folder) / "out")
        assert tensor_bytes(Path(folder) / "out") == tensor_bytes(pruned("llama in shards").target)


# ---- Checkpoint and header -------------------------------------------------------------------------------------------


@pytest.fixture
def every_dtype(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors = {name: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "one": torch.ones(1),
        "4-D": torch.ones(1, 2, 3, 4),
    }
    tensors["F8_E4M3"] = torch.ones(2, 3).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt", "note": "kept"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path, tensors


def test_header_is_read_as_safetensors_reads_it(every_dtype):
    folder, tensors = every_dtype
    entries, raw = read_header(folder / SINGLE), (folder / SINGLE).read_bytes()
    with safe_open(folder / SINGLE, "pt") as file:
        assert sorted(entries) == sorted(file.keys())
        for name, entry in entries.items():
            assert list(entry.shape) == file.get_slice(name).get_shape()
            assert entry.dtype == file.get_slice(name).get_dtype()
            assert entry.numel == file.get_tensor(name).numel()
            assert raw[entry.start : entry.stop] == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())
            assert entry.shard == SINGLE


def test_checkpoint_reads_every_tensor(every_dtype):
    folder, tensors = every_dtype
    checkpoint = Checkpoint(folder)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.to(torch.float64), tensor.to(torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_has_the_tensors_of_all_its_shards(kind, checkpoint):
    folder = checkpoint(kind.split()[0], **KINDS[kind])
    opened, loaded = Checkpoint(folder), {}
    for path in folder.glob("*.safetensors"):
        loaded |= load_file(path)
    assert opened.entries.keys() == loaded.keys()
    assert opened.shards == sorted(path.name for path in folder.glob("*.safetensors"))
    assert opened.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert opened.config == json.loads((folder / "config.json").read_text())
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in loaded.items())


def test_slices_of_another_folder(source, tmp_path):
    checkpoint = Checkpoint(source)
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    copy = shutil.copytree(source, tmp_path / "copy")
    for path in copy.glob("*.safetensors"):
        save_file({n: torch.zeros_like(t) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    with checkpoint.slices([one, other], {one: copy, "model.norm.weight": copy}) as slices:
        assert not slices[one][...].any()
        assert slices[other][...].all()
    assert checkpoint.read(one).all()


def test_digest(every_dtype, tmp_path):
    folder, _ = every_dtype
    good, seen = Checkpoint(folder).digest, {}
    assert Checkpoint(shutil.copytree(folder, tmp_path / "copy")).digest == good
    assert len(good) == 64
    raw, entries = (folder / SINGLE).read_bytes(), Checkpoint(folder).entries
    for name, entry in entries.items():
        if entry.stop > entry.start:
            at = (entry.start + entry.stop) // 2
            (folder / SINGLE).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            seen[name] = Checkpoint(folder).digest
    (folder / SINGLE).write_bytes(raw.replace(b'"scalar"', b'"scale_"'))
    seen["another name"] = Checkpoint(folder).digest
    (folder / SINGLE).write_bytes(raw)
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    seen["another config"] = Checkpoint(folder).digest
    assert len({good, *seen.values()}) == 1 + len(seen)


def test_digest_reads_little(source, monkeypatch):
    """One open file for each shard, whatever it holds."""
    checkpoint, opened, real = Checkpoint(source), [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kw: opened.append(path.name) or real(path, *args, **kw))
    assert checkpoint.digest
    assert {*opened} - {"config.json"} == {*checkpoint.shards}
    assert len(opened) <= len(checkpoint.shards) + 1


def moved(path: Path, place: Path) -> None:
    """Leave a link where a file was."""
    path.rename(place)
    path.symlink_to(place)


@pytest.mark.parametrize("name", ["config.json", INDEX, SINGLE, "a shard"])
def test_link_out_of_the_folder_is_refused(name, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("llama", **({} if name == SINGLE else SHARDED)), tmp_path / "source")
    path = sorted(source.glob("model-*"))[1] if name == "a shard" else source / name
    moved(path, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{path.name}: is a link to a file outside of the folder; copy"):
        Checkpoint(source)
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}.* missing; fetch"):
        Checkpoint(source)


def test_link_out_of_the_cache_of_the_repository_is_refused(source, tmp_path):
    snapshot = hub_cache(source, tmp_path / "cache")
    other = tmp_path / "cache" / "models--y"
    other.mkdir()
    assert Checkpoint(snapshot).commit == "abc123"
    path = sorted(snapshot.glob("model-*.safetensors"))[0]
    path.resolve().rename(other / "blob")
    path.unlink()
    path.symlink_to(other / "blob")
    with pytest.raises(CheckpointError, match="outside of the folder"):
        Checkpoint(snapshot)


def test_links_within_the_folder_are_followed(source, tmp_path):
    (source / "nested").mkdir()
    for number, path in enumerate(sorted(source.glob("model-*.safetensors"))):
        moved(path, source / "nested" / f"{number}.bin")
    run(source, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").shards == Checkpoint(source).shards


def test_companions_that_are_links_out_of_the_folder_stay_behind(source, tmp_path):
    (tmp_path / "secret").write_text("private")
    (source / "secret.txt").symlink_to(tmp_path / "secret")
    (source / "LICENSE").write_text("free")
    (source / "NOTICE").symlink_to("LICENSE")
    companions = [path.name for path in Checkpoint(source).companions()]
    assert "secret.txt" not in companions
    assert {"LICENSE", "NOTICE", "config.json", INDEX} <= {*companions}


def opens(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


@pytest.mark.parametrize("byte", [b"\0", b"{", b"9", b'"', b"\xff"])
def test_header_that_safetensors_refuses_is_refused(byte, tmp_path):
    """Every byte of the header in turn; the refusal comes when the checkpoint is opened, before any work is done."""
    path, accepted = tmp_path / SINGLE, []
    save_file({"a.weight": torch.ones(2, 3), "b": torch.arange(4), "c": torch.ones(2).half()}, path)
    (tmp_path / "config.json").write_text("{}")
    good = path.read_bytes()
    for at in range(len(header(path))):
        path.write_bytes(good[:at] + byte + good[at + 1 :])
        if not opens(path):
            with suppress(CheckpointError):
                Checkpoint(tmp_path)
                accepted.append(good[max(8, at - 20) : at] + b" -> " + byte + b" <- " + good[at + 1 : at + 20])
    assert accepted == []
