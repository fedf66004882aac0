"""A run that was stopped goes on where it was, one that is out of memory with less; the result is what it would be."""

import errno
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsegpt_lite import pipeline
from sparsegpt_lite.activations import BlockCall, SuspendedForwards
from sparsegpt_lite.calibration import Windows
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.cli import main
from sparsegpt_lite.config import PruneConfig
from sparsegpt_lite.errors import SparseGPTError
from sparsegpt_lite.eval import perplexity as perplexity_module
from sparsegpt_lite.methods import METHODS
from sparsegpt_lite.observation import Observation
from sparsegpt_lite.pipeline import prune, prune_model
from sparsegpt_lite.placement import choose
from sparsegpt_lite.writer import Journal, Writer
from tests.architectures import save

LLAMA = {"num_hidden_layers": 3, "max_shard_size": "40KB"}
EACH = 7  # matrices of a block of llama
IN_BLOCK_1 = EACH + 3
WINDOWS = Windows(torch.arange(256).view(8, 32), "numbers", "-", "none")
DIFFERS = ("command", "target", "seconds", "peak_host_bytes", "peak_device_bytes", "resumed")  # from run to run
Make = Callable[..., Path]


# ---- helpers ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Bytes of all files, the report without what differs between two runs of the same."""
    files: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "sparsity.json" in files:
        report = json.loads(files["sparsity.json"])
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in report["matrices"]]
        files["sparsity.json"] = {k: v for k, v in report.items() if k not in DIFFERS} | {"matrices": rows}
    return files


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sparsity.json").read_text())


def lines(folder: Path, kind: str) -> list[Any]:
    """What the journal of an unfinished run says of blocks, notes and so on."""
    return [record[kind] for record in Journal(folder / ".work" / "journal").records() if kind in record]


def interrupt() -> None:
    raise KeyboardInterrupt


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Solves:
    """Counts the matrices that are solved, and does something before the n-th."""

    def __init__(self) -> None:
        self.at(0)

    def at(self, n: int, act: Callable[[], object] = interrupt) -> None:
        """Count from one again; 0 does nothing."""
        self.count, self._n, self._act = 0, n, act

    def one(self) -> None:
        self.count += 1
        if self.count == self._n:
            self._act()


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> Solves:
    solves = Solves()

    def counted(solve: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: solves.one() or solve(*args)

    for name in METHODS:
        monkeypatch.setitem(METHODS, name, counted(METHODS[name]))
    return solves


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The one line that a command wrote to stderr, and nothing to stdout."""

    def read() -> str:
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        match = re.fullmatch(r"sparsegpt-lite: ([^\n]+)\n", stderr)
        assert match, stderr
        return match[1]

    return read


def parts(line: str) -> tuple[str, list[str]]:
    """What happened, and the arguments of the command that goes on."""
    text, _, command = line.partition("; what is finished is kept, go on with: ")
    program, *argv = shlex.split(command)
    assert program == "sparsegpt-lite"
    return text, argv


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    """Also where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def source(checkpoint: Make) -> Path:
    """Three blocks of llama in shards; never written to."""
    return checkpoint("llama", **LLAMA)


@pytest.fixture(scope="module")
def options(text_file: Path) -> list[str]:
    return ["--text", str(text_file), "--nsamples", "8", "--seqlen", "32", "-q"]


@pytest.fixture(scope="module")
def whole(source: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([str(source), *options, "--out", str(out)]) == 0
    return contents(out)


@pytest.fixture
def stopped(
    source: Path, options: list[str], solves: Solves, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Path:
    """The output folder of a run that was interrupted in block 1."""
    solves.at(IN_BLOCK_1)
    assert main([str(source), *options, "--out", str(tmp_path / "out")]) == 130
    capsys.readouterr()
    solves.at(0)
    return tmp_path / "out"


# ---- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["prune"]], ids=["MODEL", "prune MODEL"])
def test_interrupted_run_goes_on_by_the_command_that_it_names(
    command, source, options, whole, solves, said, capsys, tmp_path
):
    argv = [*command, str(source), *options, "--out", str(tmp_path / "it's an out")]
    solves.at(IN_BLOCK_1)
    assert main(argv) == 130
    text, again = parts(said())
    assert text == "interrupted"
    assert again == [*argv, "--resume"]
    assert lines(tmp_path / "it's an out", "block") == ["model.layers.0"]
    solves.at(0)
    assert main(again) == 0
    assert capsys.readouterr().err == ""
    assert solves.count == 2 * EACH
    assert contents(tmp_path / "it's an out") == whole
    assert report_of(tmp_path / "it's an out")["resumed"] == 1


@pytest.mark.parametrize("n", [1, EACH, 3 * EACH])
def test_interrupted_in_other_blocks(n, source, options, whole, solves, said, tmp_path):
    """At the first matrix of the first block, the last one there, and the last of all."""
    argv = [str(source), *options, "--out", str(tmp_path / "out")]
    solves.at(n)
    assert main(argv) == 130
    assert len(lines(tmp_path / "out", "block")) == (n - 1) // EACH
    solves.at(0)
    assert main(parts(said())[1]) == 0
    assert solves.count == 3 * EACH - (n - 1) // EACH * EACH
    assert contents(tmp_path / "out") == whole


def test_interrupted_again_and_again(source, options, whole, stopped, solves):
    argv = [str(source), *options, "--out", str(stopped), "--resume"]
    for n in (2, EACH + 2, 5):  # in block 1, 2 and 2
        solves.at(n)
        assert main(argv) == 130
    solves.at(0)
    assert main(argv) == 0
    assert solves.count == EACH
    assert contents(stopped) == whole
    assert report_of(stopped)["resumed"] == 2


def test_interrupted_over_an_earlier_output(source, checkpoint, options, whole, solves, said, capsys, tmp_path):
    """The earlier one, of another layout, stays until the new one is whole."""
    out = tmp_path / "out"
    assert main([str(checkpoint("llama")), *options, "--out", str(out), "--method", "magnitude"]) == 0
    capsys.readouterr()
    before = contents(out)
    solves.at(IN_BLOCK_1)
    argv = ["--overwrite", str(source), *options, "--out", str(out)]
    assert main(argv) == 130
    again = parts(said())[1]
    assert again == [*argv[1:], "--resume"]
    assert {name: data for name, data in contents(out).items() if not name.startswith(".work")} == before
    assert main(again) == 0
    assert contents(out) == whole


@pytest.mark.parametrize("n", [1, 5, 0])
def test_interrupted_while_files_get_their_names(n, source, options, whole, solves, said, tmp_path, monkeypatch):
    """At the first, a later one, and the last, which is config.json."""
    rename, left = Path.replace, [n or len(whole)]

    def replace(path: Path, target: Path) -> Path:
        left[0] -= 1
        return interrupt() if left[0] == 0 else rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert main([str(source), *options, "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out" / "config.json").exists()
    solves.at(0)
    assert main(parts(said())[1]) == 0
    assert solves.count == 0
    assert contents(tmp_path / "out") == whole


@pytest.fixture(scope="module")
def deep(checkpoint: Make, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model that takes a second or two, and what an uninterrupted run makes of it."""
    source, out = checkpoint("llama", num_hidden_layers=16), tmp_path_factory.mktemp("deep") / "out"
    assert main([str(source), *options, "--out", str(out)]) == 0
    return source, contents(out)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes that are started in the background of a shell ignore SIGINT, and so do their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signal_to_a_process(number, code, word, deep, options, interruptible, solves, tmp_path):
    argv = [str(deep[0]), *options, "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "sparsegpt_lite", *argv]
    as_here = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # rounding depends on them
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | as_here, **pipes) as process:
        end = time.monotonic() + 60
        while not ((tmp_path / "out" / ".work" / "journal").exists() and lines(tmp_path / "out", "block")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == ""
    assert stderr.count("\n") == 1
    text, again = parts(stderr.removeprefix("sparsegpt-lite: ").rstrip("\n"))
    assert (text, again) == (word, [*argv, "--resume"])
    done = lines(tmp_path / "out", "block")
    assert 0 < len(done) < 16
    solves.at(0)
    assert main(again) == 0
    assert solves.count == (16 - len(done)) * EACH
    assert contents(tmp_path / "out") == deep[1]


# ---- whose run it is -------------------------------------------------------------------------------------------------


def with_other_weights(source: Path, folder: Path) -> Path:
    """A model of the same shapes."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        save_file({n: t.flip(0) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def with_other_text(text_file: Path, path: Path) -> Path:
    path.write_text(text_file.read_text().replace("a", "b"))
    return path


OTHERS = {
    "sparsity": (["--sparsity", "2:4"], "config.sparsity '0.5', now '2:4'"),
    "method": (["--method", "wanda"], "config.method 'sparsegpt', now 'wanda'"),
    "dtype": (["--dtype", "bfloat16"], "had dtype 'float32', now 'bfloat16'"),
    "batch size": (["--batch-size", "4"], "config.batch_size 8, now 4"),
    "seed": (["--seed", "1"], "calibration '"),
    "text": (["--text", "other.txt"], "calibration '"),
    "weights": (["other model"], "checkpoint '"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_resume_of_another_run_is_refused(name, source, text_file, options, stopped, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_other_text(text_file, tmp_path / "other.txt")
    with_other_weights(source, tmp_path / "other model")
    before, (change, words) = contents(stopped), OTHERS[name]
    model = change if name == "weights" else [str(source)]
    more = [] if name == "weights" else change
    assert main([*model, *options, *more, "--out", "out", "--resume"]) == 1
    line = said()
    assert line.startswith("out: the unfinished run there had ")
    assert words in line
    assert "; give the same options, begin anew with --overwrite and not --resume, or choose another --out" in line
    assert contents(stopped) == before


@pytest.mark.parametrize("name", ["sparsity", "text", "weights"])
def test_resume_of_another_run_that_is_finished_is_refused(name, source, text_file, options, said, tmp_path, solves):
    other = str(with_other_text(text_file, tmp_path / "other.txt"))
    model = str(with_other_weights(source, tmp_path / "other model")) if name == "weights" else str(source)
    change, words = OTHERS[name]
    more = [] if name == "weights" else [other if part == "other.txt" else part for part in change]
    prune(source, tmp_path / "out", PruneConfig(text=options[1], nsamples=8, seqlen=32))
    before, solves.count = contents(tmp_path / "out"), 0
    assert main([model, *options, *more, "--out", str(tmp_path / "out"), "--resume"]) == 1
    assert words in said()
    assert solves.count == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("change", [["--sparsity", "2:4"], ["--text", "absent.txt"], ["--device", "cuda:99"]], ids=str)
def test_refusal_does_not_offer_the_command_that_was_refused(change, source, options, stopped, said):
    assert main([str(source), *options, *change, "--out", str(stopped), "--resume"]) == 1
    assert "go on with" not in said()


def test_run_of_another_process_is_not_offered(source, options, stopped, said):
    with Writer(Checkpoint(source), stopped, lines(stopped, "run")[0], resume=True):
        assert main([str(source), *options, "--out", str(stopped), "--resume"]) == 1
    assert re.fullmatch(r"[^;]*another process is at work there; wait for it, or choose another --out", said())


@pytest.mark.parametrize(
    "change", [["--activations", "disk"], ["--hessian-gib", "1e-6"], ["--text", "copy.txt"]], ids=lambda c: c[0]
)
def test_options_that_do_not_matter_may_differ(
    change, source, text_file, options, whole, stopped, solves, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(text_file, "copy.txt")
    assert main([str(source), *options, *change, "--out", str(stopped), "--resume"]) == 0
    assert solves.count >= 2 * EACH
    assert weights(stopped) == {name: data for name, data in whole.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("token_floor", [0.0, 2.0])
def test_memory_for_hessians_does_not_matter_to_experts(token_floor, checkpoint, tmp_path):
    """Neither to those that saw enough tokens, nor to those that did not."""
    source, found = checkpoint("mixtral", num_local_experts=6), []
    for gib in (4.0, 1e-5, 5e-6):
        config = PruneConfig(hessian_gib=gib, token_floor=token_floor)
        report = prune(source, tmp_path / str(gib), config, calibration=WINDOWS)
        found.append((weights(tmp_path / str(gib)), {row.name: row.note for row in report.matrices}))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("state", ["absent", "empty"])
def test_resume_where_there_is_nothing_begins_anew(state, source, options, whole, tmp_path):
    if state == "empty":
        (tmp_path / "out").mkdir()
    assert main([str(source), *options, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert contents(tmp_path / "out") == whole
    assert report_of(tmp_path / "out")["resumed"] == 0


def test_resume_of_a_finished_run_returns_at_once(source, options, solves, capsys, tmp_path):
    argv = [str(source), *options, "--out", str(tmp_path / "out")]
    assert main([*argv, "--json"]) == 0
    first, solves.count = capsys.readouterr(), 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    assert main([*argv, "--json", "--resume"]) == 0
    assert capsys.readouterr() == first
    assert solves.count == 0
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}


def test_source_that_was_repaired_since_is_taken_as_it_is_now(source, options, whole, said, tmp_path):
    """A norm of block 1 was damaged: what was copied of it must not stay."""
    model = shutil.copytree(source, tmp_path / "model")
    name = "model.layers.1.input_layernorm.weight"
    path = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    good, tensors = path.read_bytes(), load_file(path)
    tensors[name][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    argv = [str(model), *options, "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    assert "NaN" in said()
    path.write_bytes(good)
    if main([*argv, "--resume"]) == 0:
        assert weights(tmp_path / "out") == {n: data for n, data in whole.items() if n.endswith(".safetensors")}


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Evaluations:
    """The models that are evaluated; the n-th evaluation is interrupted."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.models, self.stop = real, list[str](), 0

    def __call__(self, model: str, *args: Any, **options: Any) -> Any:
        self.models.append(model)
        if len(self.models) == self.stop:
            interrupt()
        return self.real(model, *args, **options)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    evaluations = Evaluations(perplexity_module.perplexity)
    monkeypatch.setattr(perplexity_module, "perplexity", evaluations)
    return evaluations


@pytest.fixture
def eval_argv(checkpoint: Make, text_file: Path, options: list[str], tmp_path: Path) -> list[str]:
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(text_file.read_text()[:2000])
    return [str(checkpoint("llama")), *options, "--out", str(tmp_path / "out"), "--eval", str(heldout)]


def perplexities(out: Path) -> list[tuple[str, str]]:
    return [(found["model"], found["digest"]) for found in report_of(out)["perplexity"]]


@pytest.mark.parametrize(("n", "kept"), [(1, None), (2, "the output"), (0, "the run")])
def test_interrupted_evaluation(n, kept, eval_argv, evaluations, solves, said, capsys, tmp_path):
    """Of the dense model, of the pruned one, and not at all, but in block 1: what was evaluated is not again."""
    model, out = eval_argv[0], str(tmp_path / "out")
    evaluations.stop = n
    solves.at(IN_BLOCK_1 if n == 0 else 0)
    assert main(eval_argv) == 130
    assert said().startswith("interrupted")
    assert {None: not Path(out).exists(), "the output": Path(out, "config.json").exists(),
            "the run": Path(out, ".work").exists()}[kept]  # fmt: skip
    evaluations.models.clear()
    evaluations.stop = 0
    solves.at(0)
    assert main([*eval_argv, "--resume"]) == 0
    assert evaluations.models == ([model] if n == 1 else []) + [out]
    assert solves.count == {1: 2 * EACH, 2: 0, 0: EACH}[n]
    assert [name for name, _ in perplexities(Path(out))] == [model, out]
    assert len({digest for _, digest in perplexities(Path(out))}) == 1
    capsys.readouterr()
    evaluations.models.clear()
    assert main([*eval_argv, "--resume"]) == 0
    assert evaluations.models == []


@pytest.mark.parametrize("when", ["in block 1", "when it is finished"])
def test_evaluation_that_is_asked_for_later(when, eval_argv, evaluations, solves, tmp_path):
    solves.at(IN_BLOCK_1 if when == "in block 1" else 0)
    assert main(eval_argv[:-2]) == (130 if when == "in block 1" else 0)
    assert main([*eval_argv, "--resume"]) == 0
    assert sorted(evaluations.models) == sorted([eval_argv[0], str(tmp_path / "out")])
    assert len(perplexities(tmp_path / "out")) == 2


def test_evaluations_of_one_report_are_on_one_text(eval_argv, evaluations, text_file, tmp_path):
    evaluations.stop = 2
    assert main(eval_argv) == 130
    with_other_text(text_file, tmp_path / "other.txt")
    if main([*eval_argv[:-1], str(tmp_path / "other.txt"), "--resume"]) == 0:
        assert len({digest for _, digest in perplexities(tmp_path / "out")}) == 1


def test_output_that_was_moved_is_evaluated_where_it_is(eval_argv, evaluations, capsys, tmp_path):
    evaluations.stop = 2
    assert main(eval_argv) == 130
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    argv = [str(moved) if part == str(tmp_path / "out") else part for part in eval_argv]
    evaluations.models.clear()
    assert main([*argv, "--resume"]) == 0
    assert evaluations.models == [str(moved)]
    assert len(perplexities(moved)) == 2
    assert capsys.readouterr().out == f"{moved}\n"


# ---- blocks of all kinds ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_kind(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Experts; weights shared by blocks; blocks that are called several times; transposed weights."""
    made = {
        "mixtral": lambda: checkpoint("mixtral", num_hidden_layers=3),
        "gpt2": lambda: checkpoint("gpt2", n_layer=3),
    }
    return lambda kind: made[kind]() if kind in made else save(kind, tmp_path_factory.mktemp(kind) / "model")


@pytest.mark.parametrize(
    ("kind", "blocks"), [("mixtral", None), ("zamba2", None), ("hrm_text", None), ("gpt2", None), ("gpt2", "0,2")]
)
def test_interrupted_in_every_block_in_turn(kind, blocks, of_kind, solves, tmp_path):
    source, config = of_kind(kind), PruneConfig(batch_size=4, blocks=blocks)
    report = prune(source, tmp_path / "whole", config, calibration=WINDOWS)
    counts = Counter(row.block for row in report.matrices)
    assert len(counts) >= (2 if blocks else 3)
    before, done = 0, []
    for block, count in counts.items():
        solves.at(before + (count + 1) // 2)  # the block before this one is done again first
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", config, calibration=WINDOWS, resume=True)
        assert [name for name in lines(tmp_path / "out", "block") if name in counts] == done
        before = count
        done.append(block)
    solves.at(0)
    prune(source, tmp_path / "out", config, calibration=WINDOWS, resume=True)
    assert solves.count == before
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- out of memory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let there be memory for so many windows in a block, when it is looked at or when it is passed; what is run."""

    def arrange(windows: int, block: int, where: str = "observed", held: list[Any] | None = None) -> list[int]:
        owner, name = {"observed": (Observation, "_run"), "passed": (SuspendedForwards, "advance")}[where]
        real, run, sizes = getattr(owner, name), BlockCall.run, list[int]()

        def limited(self: Any, *args: object) -> object:
            if held is not None:
                held.extend(weakref.ref(c.args[0]) for c in self.calls)
            if any(c.block == f"model.layers.{block}" and len(c.args[0]) > windows for c in self.calls):
                out_of_memory()
            return real(self, *args)

        monkeypatch.setattr(owner, name, limited)
        monkeypatch.setattr(BlockCall, "run", lambda call: sizes.append(len(call.args[0])) or run(call))
        return sizes

    return arrange


def test_out_of_memory_in_the_first_block(source, memory_for, solves, tmp_path):
    smaller = prune(source, tmp_path / "smaller", PruneConfig(batch_size=2), calibration=WINDOWS)
    solves.at(0)
    sizes = memory_for(2, 0)
    report = prune(source, tmp_path / "out", PruneConfig(batch_size=8), calibration=WINDOWS)
    assert (report.batch_size, smaller.batch_size) == (2, 2)
    assert report.config["batch_size"] == 8
    assert solves.count == 3 * EACH
    assert {*sizes} == {2}
    assert weights(tmp_path / "out") == weights(tmp_path / "smaller")
    sentence = "Out of memory on the device: went on with batches of 2."
    assert sentence in report.table().splitlines()
    assert sentence not in smaller.table()


@pytest.mark.parametrize("where", ["observed", "passed"])
def test_out_of_memory_in_a_later_block(where, source, memory_for, solves, tmp_path):
    """Finished blocks stay as they are, and a run that is stopped after it goes on with the smaller batches."""
    config = PruneConfig(batch_size=8)
    sizes = memory_for(2, 1, where)
    report = prune(source, tmp_path / "whole", config, calibration=WINDOWS)
    assert report.batch_size == 2
    assert solves.count == 3 * EACH
    assert max(sizes) == 8
    solves.at(2 * EACH + 2)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", config, calibration=WINDOWS)
    assert lines(tmp_path / "out", "note") == [{"batch_size": 4}, {"batch_size": 2}]
    assert lines(tmp_path / "out", "block") == ["model.layers.0", "model.layers.1"]
    solves.at(0)
    sizes.clear()
    report = prune(source, tmp_path / "out", config, calibration=WINDOWS, resume=True)
    assert (report.batch_size, report.resumed) == (2, 2)
    assert solves.count == EACH
    assert {*sizes} == {2}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_out_of_memory_with_one_window(source, options, memory_for, said, solves, tmp_path, monkeypatch):
    argv = [str(source), *options, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(monkeypatch, "setattr", patch.setattr)
        memory_for(0, 1)
        assert main(argv) == 1
        text, again = parts(said())
        assert text.startswith("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)")
        assert "; lower --hessian-gib or --seqlen, or use --activations disk" in text
        assert again == [*argv, "--resume"]
        assert [note["batch_size"] for note in lines(tmp_path / "out", "note")] == [4, 2, 1]
        assert lines(tmp_path / "out", "block") == ["model.layers.0"]
    solves.at(0)
    assert main([*again, "--activations", "disk"]) == 0
    assert solves.count == 2 * EACH
    assert report_of(tmp_path / "out")["batch_size"] == 1


def test_out_of_memory_with_one_window_in_the_first_block(source, options, memory_for, said, tmp_path):
    memory_for(0, 0)
    assert main([str(source), *options, "--out", str(tmp_path / "out")]) == 1
    assert re.fullmatch(r"out of memory \(.*\); lower --hessian-gib or --seqlen, or use --activations disk", said())
    assert not (tmp_path / "out").exists()


def test_out_of_memory_in_the_solver(source, options, memory_for, solves, said, tmp_path):
    sizes = memory_for(99, 0)
    solves.at(IN_BLOCK_1, out_of_memory)
    assert main([str(source), *options, "--out", str(tmp_path / "out")]) == 1
    text, _ = parts(said())
    assert re.match(r"model\.layers\.1\.self_attn\.\w_proj\.weight: out of memory while it was solved \(CUDA", text)
    assert re.search(r"; lower --hessian-gib, or use --activations host$", text)
    assert solves.count == IN_BLOCK_1
    assert {*sizes} == {8}
    assert lines(tmp_path / "out", "note") == []


@pytest.mark.parametrize("where", ["observed", "passed"])
def test_out_of_memory_of_a_model_in_memory(where, source, memory_for, solves, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    memory_for(2, 1, where)
    report = prune_model(model, WINDOWS.tokens, PruneConfig(batch_size=8))
    assert report.batch_size == 2
    assert solves.count == 3 * EACH
    prune(source, tmp_path / "out", PruneConfig(batch_size=8), calibration=WINDOWS)
    streamed = {name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, streamed[name])] == []


def test_out_of_memory_while_weights_are_put_into_a_model(checkpoint, solves, monkeypatch):
    """Those of gpt2 are made contiguous for it; the next attempt must begin with the dense weights."""
    expected, model = (AutoModelForCausalLM.from_pretrained(checkpoint("gpt2")) for _ in range(2))
    prune_model(expected, WINDOWS.tokens, PruneConfig(batch_size=4))
    left, contiguous, put = [0], Tensor.contiguous, pipeline.put

    def limited(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        left[0] -= 1
        return out_of_memory() if left[0] == 0 else contiguous(tensor, *args, **options)

    def put_limited(solved: Any) -> None:
        if solves.count == 4:  # block 0, for the first time
            left[0] = 3
        put(solved)

    solves.at(0)
    monkeypatch.setattr(pipeline, "put", put_limited)
    monkeypatch.setattr(Tensor, "contiguous", limited)
    report = prune_model(model, WINDOWS.tokens, PruneConfig(batch_size=8))
    assert report.batch_size == 4
    state = expected.state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])] == []


@pytest.mark.parametrize("where", ["observed", "passed"])
def test_what_an_attempt_held_is_free_for_the_next_one(where, source, memory_for, tmp_path, monkeypatch):
    """Without the garbage collector, which may come too late."""
    held, enter = [], SuspendedForwards.__enter__
    memory_for(2, 1, where, held)

    def begin(self: SuspendedForwards) -> SuspendedForwards:
        assert not [tensor for tensor in held if tensor() is not None]
        return enter(self)

    monkeypatch.setattr(SuspendedForwards, "__enter__", begin)
    gc.disable()
    try:
        prune(source, tmp_path / "out", PruneConfig(batch_size=8), calibration=WINDOWS)
    finally:
        gc.enable()
    assert held


# ---- activations -----------------------------------------------------------------------------------------------------

LONG = Windows(torch.arange(1024).view(16, 64) % 256, "numbers", "-", "none")
BYTES = 8 * 64 * 32 * 4  # hidden states of eight windows


@pytest.fixture(scope="module")
def on_host(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("host") / "out"
    assert prune(source, out, PruneConfig(activations="host"), calibration=LONG).activations == "host"
    return out


@pytest.mark.parametrize(("where", "told"), [("disk", "disk"), ("device", "host"), ("auto", "host")])
def test_activations_wait_anywhere(where, told, source, on_host, tmp_path):
    report = prune(source, tmp_path / "out", PruneConfig(activations=where), calibration=LONG)
    assert report.activations == report_of(tmp_path / "out")["activations"] == told
    assert report.table().splitlines()[-2].endswith(f"; activations on the {told}.")
    assert weights(tmp_path / "out") == weights(on_host)
    assert contents(tmp_path / "out").keys() == contents(on_host).keys()


def test_activations_on_the_disk_are_in_files_without_names(source, solves, tmp_path, monkeypatch):
    work, sizes, found, real = tmp_path / "out" / ".work", [], [], torch.from_file

    def mapped(*args: object, **options: Any) -> torch.Tensor:
        tensor = real(*args, **options)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "from_file", mapped)

    def look() -> None:
        found.append({path.name for path in work.iterdir()})
        if Path("/proc/self/maps").exists():
            maps = Path("/proc/self/maps").read_text().splitlines()
            held = [line for line in maps if f"{work}/" in line and line.endswith(" (deleted)")]
            found.append(len(held))

    solves.at(IN_BLOCK_1, look)
    prune(source, tmp_path / "out", PruneConfig(activations="disk"), calibration=LONG)
    assert sizes == [BYTES] * 2 * 3  # two batches: embeddings, and what all blocks but the last give
    assert found[0] == {"journal", *(path.name for path in source.glob("*.safetensors"))}
    assert found[1:] in ([], [4])  # embeddings and what block 0 gave
    assert not work.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room on a disk cannot be had beforehand here")
def test_disk_that_is_full_of_activations(source, text_file, said, solves, tmp_path, monkeypatch):
    allocate = os.posix_fallocate

    def full(file: int, start: int, size: int) -> None:
        if solves.count > EACH:  # what block 1 gives
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    argv = [str(source), "--text", str(text_file), "--nsamples", "16", "--seqlen", "64", "-q"]
    argv += ["--activations", "disk", "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    text, again = parts(said())
    assert re.match(r".*/out/\.work: cannot hold the activations \(.*No space left on device\); make room there", text)
    assert {path.name for path in (tmp_path / "out" / ".work").iterdir()} == {
        "journal", *(path.name for path in source.glob("*.safetensors"))
    }  # fmt: skip
    assert lines(tmp_path / "out", "block") == ["model.layers.0", "model.layers.1"]
    assert main([*again, "--activations", "host"]) == 0
    assert report_of(tmp_path / "out")["activations"] == "host"


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("where", "device", "need", "chosen", "outer"),
    [
        ("auto", GPU, 100, "device", GPU),  # a third of what is free on the device
        ("auto", GPU, 101, "host", CPU),
        ("auto", GPU, 500, "host", CPU),  # half of what is free on the host
        ("auto", GPU, 501, "disk", CPU),
        ("auto", CPU, 500, "host", CPU),
        ("auto", CPU, 501, "disk", CPU),
        ("device", GPU, 10**9, "device", GPU),
        ("device", CPU, 1, "host", CPU),
        ("host", GPU, 1, "host", CPU),
        ("disk", GPU, 1, "disk", CPU),
    ],
)
def test_where_activations_are_to_wait(where, device, need, chosen, outer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 10**6))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    placement = choose(where, device, need, tmp_path)
    assert (placement.where, placement.outer, placement.folder) == (chosen, outer, tmp_path)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_failure_in_block_1_keeps_what_was_done(source, options, whole, said, solves, tmp_path):
    model, name = shutil.copytree(source, tmp_path / "model"), "model.layers.1.mlp.up_proj.weight"
    path = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    argv = [str(model), *options, "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    text, again = parts(said())
    assert text == f"{name}: the weights hold NaN or infinity; fetch the checkpoint again"
    assert lines(tmp_path / "out", "block") == ["model.layers.0"]
    solves.at(0)
    assert main(again) == 1  # as it will ever be, but soon
    assert parts(said()) == (text, again)
    assert solves.count == 0
    assert main([str(source), *argv[1:], "--overwrite"]) == 0
    assert solves.count == 3 * EACH
    assert contents(tmp_path / "out").keys() == whole.keys()
    assert weights(tmp_path / "out") == {n: data for n, data in whole.items() if n.endswith(".safetensors")}


def test_resume_by_the_api_takes_no_other_run(source, stopped, options):
    config = PruneConfig(text=options[1], nsamples=8, seqlen=32, sparsity="0.6")
    with pytest.raises(SparseGPTError, match=r"config\.sparsity '0\.5', now '0\.6'"):
        prune(source, stopped, config, resume=True)
