"""What is written is the source but for the pruned matrices, and it is there as a whole or not at all."""

import itertools
import json
import os
import shutil
import stat
import struct
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

from sparsegpt_lite.calibration import Windows
from sparsegpt_lite.checkpoint import DTYPES, Checkpoint, Journal, Writer, read_header
from sparsegpt_lite.config import PruneConfig
from sparsegpt_lite.errors import CheckpointError
from sparsegpt_lite.methods import METHODS
from sparsegpt_lite.pipeline import prune
from sparsegpt_lite.report import PruneReport

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


def test_source_of_links_as_in_the_cache_of_the_hub(source, tmp_path):
    blobs = source.rename(tmp_path / "blobs")
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    before = contents(blobs)
    run(source, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    assert contents(blobs) == before


def test_all_is_on_the_disk_before_it_has_its_name(source, tmp_path, monkeypatch):
    synced = set()
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda file, real=real: (synced.add(os.fstat(file).st_ino), real(file)))
    run(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.stat().st_ino not in synced] == []


# ---- failures and overwriting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [fail, interrupt])
@pytest.mark.parametrize("n", [1, 3, 8, 14])
def test_failure_on_the_way_leaves_nothing(n, act, source, tmp_path, at_matrix):
    before = contents(source)
    at_matrix(n, act)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert contents(source) == before


def test_failure_on_the_way_leaves_an_earlier_output(source, tmp_path, at_matrix):
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    at_matrix(8, fail)
    with pytest.raises(RuntimeError, match="lightning"):
        run(source, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.fixture
def failing_rename(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the n-th file not get its final name."""

    def arrange(n: int) -> None:
        rename, numbers = Path.replace, itertools.count(1)

        def replace(path: Path, target: Path) -> Path:
            if next(numbers) == n:
                raise OSError("stale file handle")
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", replace)

    return arrange


@pytest.mark.parametrize("n", [1, 2, 7])
def test_failure_of_a_rename_leaves_nothing(n, source, tmp_path, failing_rename):
    failing_rename(n)
    with pytest.raises(CheckpointError, match=r"out: .*stale file handle"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_failure_of_a_rename_never_leaves_half_of_two_models(source, tmp_path, failing_rename):
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    failing_rename(2)
    with suppress(CheckpointError):
        prune(source, tmp_path / "out", PruneConfig("0.9", "magnitude"), calibration=WINDOWS, overwrite=True)
    after = contents(tmp_path / "out")
    assert "config.json" not in after or after == before


@pytest.mark.parametrize(("first", "second"), [({}, SHARDED), (SHARDED, {}), (SHARDED, {"max_shard_size": "60KB"})])
def test_overwriting_an_output_of_another_layout(first, second, checkpoint, tmp_path):
    run(checkpoint("llama", **first), tmp_path / "out")
    run(checkpoint("llama", **second), tmp_path / "out", overwrite=True)
    run(checkpoint("llama", **second), tmp_path / "fresh")
    assert sorted(contents(tmp_path / "out")) == sorted(contents(tmp_path / "fresh"))
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "fresh")


def test_overwriting_leaves_files_that_are_not_ours(source, tmp_path):
    run(source, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


# ---- journal ---------------------------------------------------------------------------------------------------------


def test_journal_of_a_run_that_is_killed_in_its_second_block(source, tmp_path, at_matrix):
    target, work = tmp_path / "out", tmp_path / "work"
    at_matrix(9, lambda: shutil.copytree(target / ".work", work) and fail())
    with pytest.raises(RuntimeError, match="lightning"):
        run(source, target)
    entries, shards = Checkpoint(source).entries, Checkpoint(source).shards
    first, *copied, block = Journal(work / "journal").records()
    assert first["run"]["source"] == str(source)
    assert first["run"]["config"]["method"] == "magnitude"
    assert copied == [{"copied": shard} for shard in shards]
    assert block["block"] == "model.layers.0"
    names = [n for n in entries if n.startswith("model.layers.0.") and n.endswith("_proj.weight")]
    assert sorted(block["crc32"]) == sorted(names)
    assert sorted(matrix["name"] for matrix in block["record"]["matrices"]) == sorted(names)
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
    writer.write("block", {name: checkpoint.read(name)}, {})
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
    writer.write("block", {name: W}, {})
    writer.finish({"sparsity.json": "{}"})
    assert torch.equal(Checkpoint(tmp_path / "out").read(name), W.bfloat16())


def test_writer_refuses_another_shape(checkpoint, tmp_path):
    writer = Writer(Checkpoint(checkpoint("llama")), tmp_path / "out", {})
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name}: \[96, 32\] on disk, but \[32, 96\] would be written"):
        writer.write("block", {name: torch.zeros(32, 96)}, {})


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
    checkpoint, name = Checkpoint(source), "model.layers.0.mlp.up_proj.weight"
    copy = shutil.copytree(source, tmp_path / "copy")
    shard = copy / checkpoint.entries[name].shard
    save_file({n: torch.zeros_like(t) for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    with checkpoint.slices([name], copy) as slices:
        assert not slices[name][...].any()
    assert checkpoint.read(name).all()


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
