"""Does a run survive every death? Prune commands that are killed by SIGKILL at many moments, resumed and compared.

    python benchmarks/crash.py --out benchmarks/results/crash.json     # some 50 kills, ten minutes on two cores

Random models of three types are pruned by the public command, each run in processes of its own. The parent watches the
output folder and kills at a random moment of each phase: while shards are copied, blocks are solved, a block is
written, files get their final names. Where a kill has landed is judged from what it has left. The next process goes on
with --resume, until one comes to its end. Every other run goes over an earlier output of another layout.

A run passes if all files are byte for byte those of a run without a kill (sparsity.json but for what it says of times,
memory and the command), if no process has done a step again that was in the journal, and if no kill has left a
config.json beside anything but a whole model. Exit code 1 if one does not. Linux only: it looks into /proc.
"""

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, logging

from sparsegpt_lite.checkpoint import CONFIG, REPORT, WORK, Checkpoint
from sparsegpt_lite.demo import stdlib_documents
from sparsegpt_lite.report import aligned, installed_versions
from sparsegpt_lite.writer import JOURNAL, Journal

VOCAB, SEQLEN = 256, 256
PHASES = ("copying", "solving", "writing", "renaming")
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=SEQLEN, **COMMON,
    ),
    "gpt2": GPT2Config(n_embd=256, n_layer=10, n_head=4, n_positions=SEQLEN, **COMMON),
    "mixtral": MixtralConfig(
        hidden_size=192, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=SEQLEN, **COMMON,
    ),
}  # fmt: skip
FREE = ("command", "target", "seconds", "peak_host_bytes", "peak_device_bytes", "resumed")  # of sparsity.json


# ---- models and commands ---------------------------------------------------------------------------------------------


def make_model(folder: Path, kind: str, shard: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=shard)
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def command(source: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "sparsegpt_lite", str(source), "--text", str(text), "--out", str(out), "-q",
        "--nsamples", "16", "--seqlen", str(SEQLEN), "--device", "cpu", *more,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, Any]:
    """Bytes of the files that have their names, the report without what differs between two runs."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if REPORT in files:
        report = json.loads(files[REPORT])
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in report["matrices"]]
        files[REPORT] = {k: v for k, v in report.items() if k not in FREE} | {"matrices": rows}
    return files


# ---- what is seen of a run from outside ------------------------------------------------------------------------------


class Folder:
    """An output folder, looked at from outside of the process that writes it."""

    def __init__(self, source: Checkpoint, target: Path) -> None:
        self.source, self.target, self.work, self.journal = source, target, target / WORK, target / WORK / JOURNAL
        self._size, self._records = -1, list[dict[str, Any]]()

    def records(self) -> list[dict[str, Any]]:
        """Lines of the journal."""
        try:
            size = self.journal.stat().st_size
            if size != self._size:
                self._records = Journal(self.journal).records()
                self._size = size
        except FileNotFoundError:
            self._size, self._records = -1, []
        return self._records

    def complete(self) -> bool:
        """Whether nothing is left to do but to name the files; as fast as can be, since that takes milliseconds."""
        try:
            return b' {"complete": ' in self.journal.read_bytes()
        except FileNotFoundError:
            return False

    def count(self, kind: str) -> int:
        return sum(kind in record for record in self.records())

    def waiting(self) -> int:
        """Files in the work folder."""
        try:
            return len(os.listdir(self.work))
        except FileNotFoundError:
            return 0

    def named(self) -> int:
        """Files of a complete output that have their final names."""
        names = next((record["complete"] for record in self.records() if "complete" in record), [])
        return sum(not (self.work / name).exists() for name in names)

    def copied(self) -> bool:
        return self.count("copied") == len(self.source.shards)

    def touched(self) -> int:
        """Time of the last write to a file but the journal."""
        try:
            return max((file.stat().st_mtime_ns for file in os.scandir(self.work) if file.name != JOURNAL), default=0)
        except FileNotFoundError:  # the folder is not there, or has just lost a file
            return 0

    def opened_by(self, process: int) -> bool:
        """Whether a process has the journal open, so has begun its work."""
        try:
            files = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process}/fd")]
        except OSError:  # the process is gone, or has just closed a file
            return False
        return str(self.journal) in files

    def phase(self) -> str:
        """What a run that is dead was doing, as far as the folder tells."""
        if not self.records():
            return "starting"
        if self.complete():
            return "renaming"
        if not self.copied():
            return "copying"
        return "writing" if self._unaccounted() else "solving"

    def _unaccounted(self) -> bool:
        """Whether there is more in the work folder than the journal says."""
        if {path.name for path in self.work.iterdir()} - {JOURNAL, *self.source.shards}:
            return True  # files of the end
        known = {name for record in self.records() for name in record.get("crc32", ())}
        for shard in self.source.shards:
            old, new = (self.source.folder / shard).read_bytes(), (self.work / shard).read_bytes()
            entries = [(name, e) for name, e in self.source.entries.items() if e.shard == shard and name not in known]
            if any(old[e.start : e.stop] != new[e.start : e.stop] for _, e in entries):
                return True
        return False


# ---- killing ---------------------------------------------------------------------------------------------------------


def wait(process: subprocess.Popen[bytes], until: Callable[[], bool], pause: float = 0.0002) -> None:
    """Wait for something that a process does, or for its end."""
    while process.poll() is None and not until():
        time.sleep(pause)


def durations(folder: Folder, argv: list[str]) -> dict[str, float]:
    """Run a command to its end and see how many seconds its phases take; `writing` is that of the first block."""
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:

        def when(until: Callable[[], bool]) -> float:
            wait(process, until)
            return time.monotonic()

        began, copied = when(lambda: folder.opened_by(process.pid)), when(folder.copied)
        touched = folder.touched()
        touch, block = when(lambda: folder.touched() > touched), when(lambda: folder.count("block") > 0)
        complete = when(folder.complete)
        gone = when(lambda: not folder.journal.exists())
    if process.returncode != 0:
        sys.exit(f"failed without a kill: {argv}")
    return {
        "copying": copied - began,
        "solving": complete - copied,
        "writing": block - touch,
        "renaming": gone - complete,
    }


@dataclass
class Kill:
    """A kill: which phase it was for and which it hit, seconds from the start of the process, what was done then."""

    type: str
    run: int
    aimed: str
    phase: str
    seconds: float
    shards_copied: int
    blocks_finished: int
    files_named: int


def moment(aimed: str, folder: Folder, process: subprocess.Popen[bytes], known: dict[str, float], blocks: int) -> None:
    """Wait for a random step of a phase of a run that may have been resumed, and a random part of that step."""
    shards = len(folder.source.shards)
    wait(process, lambda: folder.opened_by(process.pid))
    if aimed == "copying":
        step = random.randrange(min(folder.count("copied"), shards - 1), shards)
        wait(process, lambda: folder.count("copied") >= step)
        length = known["copying"] / shards
    elif aimed == "renaming":
        wait(process, folder.complete)
        waiting = folder.waiting() * random.random()
        wait(process, lambda: folder.waiting() <= waiting, pause=0)
        length = 0
    else:
        step = random.randrange(min(folder.count("block"), blocks - 1), blocks)
        wait(process, lambda: folder.copied() and folder.count("block") >= step)
        length = known["solving"] / blocks
        if aimed == "writing":
            touched, length = folder.touched(), known["writing"] / 2
            wait(process, lambda: folder.touched() > touched)
    end = time.monotonic() + random.uniform(0, length)
    wait(process, lambda: time.monotonic() >= end)


@dataclass
class Run:
    """What became of a run: its kills, what it left, and all that was wrong with it."""

    type: str
    number: int
    over_earlier: bool
    kills: list[Kill] = field(default_factory=list)
    resumed: int = 0  # processes that went on with --resume
    taken_over: int = 0  # blocks that were finished when they did
    wrong: list[str] = field(default_factory=list)


class Killer:
    """Runs of one type of model that are killed and resumed, and the run without a kill to compare them with."""

    def __init__(self, place: Path, kind: str, text: Path, shard: str) -> None:
        self.place, self.kind, self.text = place, kind, text
        self.source = Checkpoint(make_model(place / "model", kind, shard))
        make_model(place / "single", kind, "10GB")
        subprocess.run(command(place / "single", text, place / "earlier", "--method", "magnitude"), check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        self.known = durations(Folder(self.source, place / "whole"), self.argv(place / "whole"))
        self.whole = contents(place / "whole")
        self.blocks = CONFIGS[kind].num_hidden_layers

    def argv(self, target: Path, *more: str) -> list[str]:
        return command(self.source.folder, self.text, target, *more)

    def run(self, number: int, over_earlier: bool) -> Run:
        """Kill a run once in every phase, at the end twice, then let it come to its end; say what was wrong."""
        result, target = Run(self.kind, number, over_earlier), self.place / str(number)
        if over_earlier:
            shutil.copytree(self.place / "earlier", target)
        folder, allowed = Folder(self.source, target), [contents(target) if over_earlier else {}, self.whole]
        more, expected = (["--overwrite"] if over_earlier else []), 0
        for aimed in (*PHASES, "renaming", None):
            kept, done = list(folder.records()), folder.count("block")
            if not folder.complete():
                expected = done
            started = time.monotonic()
            argv = self.argv(target, *more)
            with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
                if aimed:
                    moment(aimed, folder, process, self.known, self.blocks)
                    process.kill()
                _, said = process.communicate()
            if "--resume" in more:
                result.resumed, result.taken_over = result.resumed + 1, result.taken_over + done
            if process.returncode not in (0, -signal.SIGKILL):
                result.wrong.append(f"exit code {process.returncode}: {said.decode().strip()}")
            if process.returncode != -signal.SIGKILL or not folder.journal.exists():
                break  # it came to its end
            seconds = round(time.monotonic() - started, 3)
            counts = folder.count("copied"), folder.count("block"), folder.named()
            kill = Kill(self.kind, number, aimed or "-", folder.phase(), seconds, *counts)
            result.kills.append(kill)
            if folder.records()[: len(kept)] != kept:
                result.wrong.append(f"what was done before was not kept at {kill}")
            if (target / CONFIG).exists() and contents(target) not in allowed:
                result.wrong.append(f"half a model with a {CONFIG} at {kill}")
            more = ["--resume"]
        self.compare(target, expected, result)
        return result

    def compare(self, target: Path, expected: int, result: Run) -> None:
        """Say where a finished run differs from the one without a kill."""
        found = contents(target)
        differing = sorted(n for n in {*found, *self.whole} if found.get(n) != self.whole.get(n))
        if differing:
            result.wrong.append(f"differing files: {', '.join(differing)}")
        if left := [str(path) for path in target.rglob("*") if path.is_file() and path.parent != target]:
            result.wrong.append(f"files are left: {', '.join(left)}")
        resumed = json.loads((target / REPORT).read_bytes())["resumed"] if REPORT in found else None
        if resumed != expected:
            result.wrong.append(f"{expected} blocks were finished, the report says {resumed}")
        shutil.rmtree(target)


# ---- the whole -------------------------------------------------------------------------------------------------------


def table(runs: list[Run]) -> str:
    others = sorted({kill.phase for run in runs for kill in run.kills} - {*PHASES})
    phases = [*PHASES, *others]
    rows = [("type", "runs", "kills", *phases, "resumed", "blocks taken over", "identical")]
    kinds = dict.fromkeys(run.type for run in runs)
    for kind in [*kinds, "all"]:
        own = [run for run in runs if kind in (run.type, "all")]
        kills = Counter(kill.phase for run in own for kill in run.kills)
        numbers = [len(own), kills.total(), *(kills[phase] for phase in phases), sum(run.resumed for run in own),
                   sum(run.taken_over for run in own), sum(not run.wrong for run in own)]  # fmt: skip
        rows.append((kind, *map(str, numbers)))
    return aligned(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--runs", type=int, default=4, help="of each type, with up to five kills each")
    parser.add_argument("--shard", default="300KB", help="size of a shard at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a record in JSON there")
    args = parser.parse_args()
    random.seed(args.seed)
    logging.disable_progress_bar()
    runs, about, began = list[Run](), {}, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.txt"
        documents = itertools.islice(stdlib_documents("train"), 40)
        text.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
        for kind in args.types:
            killer = Killer(Path(temporary) / kind, kind, text, args.shard)
            about[kind] = {
                "bytes": killer.source.nbytes,
                "blocks": killer.blocks,
                "shards": len(killer.source.shards),
                "seconds_without_a_kill": killer.known,
            }
            print(kind, about[kind], flush=True)
            for number in range(args.runs):
                runs.append(killer.run(number, over_earlier=bool(number % 2)))
                for wrong in runs[-1].wrong:
                    print(f"{kind}, run {number}: {wrong}", flush=True)
            shutil.rmtree(killer.place)
    identical = sum(not run.wrong for run in runs)
    print(table(runs), "", f"{identical} of {len(runs)} runs end with identical files", sep="\n")
    if args.out:
        record = {
            "settings": {"types": args.types, "runs": args.runs, "shard": args.shard, "seed": args.seed},
            "device": "cpu",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "date": time.strftime("%Y-%m-%d"),
            "versions": installed_versions(),
            "seconds": round(time.monotonic() - began),
            "models": about,
            "kills": sum(len(run.kills) for run in runs),
            "identical": f"{identical} of {len(runs)} runs",
            "runs": [asdict(run) for run in runs],
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if identical == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
