"""The command line against a Hub on 127.0.0.1: models and data sets by their ids, as a user types them."""

import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsegpt_lite

HERE = Path(__file__).resolve().parent
PACKAGE = Path(sparsegpt_lite.__file__).resolve().parents[1]
C4_TRAIN, C4_VALIDATION = "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"
SMALL = ("--nsamples", 8, "--seqlen", 32)
SETTINGS = {
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "NO_PROXY": "127.0.0.1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
}


def documents(seed: int, count: int = 40) -> list[str]:
    """Made-up text, some 300 bytes a document."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    return [" ".join(rng.choices(words, k=60)) + "." for _ in range(count)]


def wiki_lines(seed: int) -> list[str]:
    """Rows as those of wikitext: a line of the text each, the empty ones among them."""
    return [row for text in documents(seed) for row in ("", f" = {text[:12]} = \n", "", f" {text} \n")]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def card(configs: dict[str, dict[str, str]]) -> str:
    """README.md of a data set that says which files are which split of which configuration."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    return "\n".join([*lines, "---", "# A data set", ""])


def write_c4(folder: Path) -> None:
    for seed, path in enumerate([C4_TRAIN, C4_VALIDATION], start=1):
        extra = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com"}
        write_jsonl(folder / path, [{"text": text, **extra} for text in documents(seed)])
    splits = {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}
    (folder / "README.md").write_text(card({"en": splits}), encoding="utf-8")


def write_wikitext(folder: Path) -> None:
    configs = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    splits = ("test", "train", "validation")
    for seed, (config, split) in enumerate(((c, s) for c in configs for s in splits), start=10):
        (folder / config).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": wiki_lines(seed)}), folder / config / f"{split}-00000-of-00001.parquet")
    readme = card({config: {split: f"{config}/{split}-*" for split in splits} for config in configs})
    (folder / "README.md").write_text(readme, encoding="utf-8")


@dataclass(frozen=True)
class Hub:
    """A running Hub.

    `root` holds its repositories, `home` is the cache of those who use it.
    """

    root: Path
    home: Path
    url: str

    def run(self, cwd: Path, *arguments: object, **variables: str | None) -> subprocess.CompletedProcess[str]:
        """Run our command line; `variables` are set in its environment beside the usual ones, None removes one."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        paths = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "PYTHONPATH": str(PACKAGE)}
        environment = {k: v for k, v in {**inherited, **SETTINGS, **paths, **variables}.items() if v is not None}
        command = [sys.executable, "-m", "sparsegpt_lite", *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def run_json(self, cwd: Path, *arguments: object) -> Any:
        """Run a command line that must succeed and parse what it prints."""
        done = self.run(cwd, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def requests(self) -> list[str]:
        """What was asked for so far."""
        return (self.root / "requests.log").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    models, data = root / "models" / "org", root / "datasets"
    branches = {"tiny": checkpoint(), "tiny@deep": checkpoint(num_hidden_layers=3), "gated": checkpoint()}
    for name, source in branches.items():
        shutil.copytree(source, models / name)
    (models / "tiny" / "pytorch_model.bin").write_bytes(b"not to be fetched")
    (models / "gated" / ".gated").touch()
    write_c4(data / "allenai" / "c4")
    write_wikitext(data / "Salesforce" / "wikitext")
    rows = [{"id": i, "content": text} for i, text in enumerate(documents(5))]
    write_jsonl(data / "org" / "corpus" / "train.jsonl.gz", rows)
    (data / "org" / "script").mkdir()
    (data / "org" / "script" / "script.py").write_text("raise SystemExit\n", encoding="utf-8")
    command = [sys.executable, str(HERE / "hub_server.py"), str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield Hub(root, tmp_path_factory.mktemp("home"), server.stdout.readline().strip())


@pytest.fixture(scope="module")
def pruned(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's command makes of org/tiny, in a folder OUT."""
    work = tmp_path_factory.mktemp("work")
    options = ("--sparsity", 0.5, "--dataset", "allenai/c4", *SMALL, "--out", "OUT", "--eval", "wikitext2")
    done = hub.run(work, "org/tiny", *options)
    assert done.returncode == 0, done.stderr
    assert "Perplexity on Salesforce/wikitext:wikitext-2-raw-v1: OUT" in done.stdout
    return work / "OUT"


@pytest.fixture(scope="module")
def branch_run(hub: Hub, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> subprocess.CompletedProcess[str]:
    """A quiet run on a branch, with the progress bars of the Hub's client as they are by default."""
    out = tmp_path_factory.mktemp("branch") / "OUT"
    text = ("--dataset", "org/corpus", "--text-column", "content", *SMALL, "--eval", text_file)
    options = ("--revision", "deep", *text, "--out", out, "-q")
    done = hub.run(out.parent, "org/tiny", *options, HF_HUB_DISABLE_PROGRESS_BARS=None)
    assert done.returncode == 0, done.stderr
    return done


def read_report(out: Path) -> Any:
    return json.loads((out / "sparsity.json").read_text(encoding="utf-8"))


def plain_perplexity(folder: Path, text: str, seqlen: int, limit: int | None = None) -> float:
    """The protocol of the papers, with the whole model in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids
    losses = []
    for window in ids[0, : ids.shape[1] // seqlen * seqlen].view(-1, seqlen)[:limit]:
        with torch.no_grad():
            logits = model(window[None]).logits[0]
        losses.append(cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def wikitext_test() -> str:
    """wikitext-2's test split as one text: its rows were made fourth, see `write_wikitext`."""
    return "\n\n".join(wiki_lines(seed=13))


def test_everything_by_hub_id(pruned: Path, checkpoint: Callable[..., Path]) -> None:
    report = read_report(pruned)
    assert report["source"] == "org/tiny"
    assert report["calibration"]["dataset"] == "allenai/c4"
    assert report["calibration"]["split"] == "train"
    assert (report["calibration"]["windows"], report["calibration"]["seqlen"]) == (8, 32)
    assert len(bytes.fromhex(report["calibration"]["digest"])) == 32
    dense, sparse = report["perplexity"]
    assert (dense["model"], sparse["model"]) == ("org/tiny", "OUT")
    assert dense["dataset"] == sparse["dataset"] == "Salesforce/wikitext:wikitext-2-raw-v1"
    assert dense["digest"] == sparse["digest"]
    assert dense["perplexity"] == pytest.approx(plain_perplexity(checkpoint(), wikitext_test(), 32), rel=1e-5)
    assert sparse["perplexity"] == pytest.approx(plain_perplexity(pruned, wikitext_test(), 32), rel=1e-5)


def test_output_is_an_ordinary_model(pruned: Path, checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    matrix = model.model.layers[0].mlp.up_proj.weight
    assert int((matrix == 0).sum()) == matrix.numel() // 2
    assert {p.name for p in pruned.iterdir()} == {p.name for p in checkpoint().iterdir()} | {"sparsity.json"}


@pytest.mark.usefixtures("pruned")
def test_only_what_is_needed_is_fetched_and_once(hub: Hub) -> None:
    fetched = [line for line in hub.requests() if " GET " in line and "/resolve/" in line]
    model = [line for line in fetched if "/org/tiny/resolve/" in line]
    assert any("model.safetensors" in line for line in model)
    assert len(model) == len(set(model))
    assert not [line for line in fetched if "pytorch_model.bin" in line or "wikitext-103" in line]


def test_offline_run_from_the_cache_gives_the_same_bytes(hub: Hub, pruned: Path, tmp_path: Path) -> None:
    """The model comes from the cache; text that was streamed is in none, so the same shard is given as a file."""
    shard, before = hub.root / "datasets" / "allenai" / "c4" / C4_TRAIN, hub.requests()
    options = ("--sparsity", 0.5, "--text", shard, *SMALL, "--out", "OUT")
    done = hub.run(tmp_path, "org/tiny", *options, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.requests() == before
    assert (tmp_path / "OUT" / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_eval_on_c4_takes_256_windows_of_validation(hub: Hub, tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    result = hub.run_json(tmp_path, "eval", "org/tiny", "--dataset", "c4", "--seqlen", 32)
    assert (result["dataset"], result["split"], result["windows"]) == ("allenai/c4", "validation", 256)
    expected = plain_perplexity(checkpoint(), " ".join(documents(seed=2)), seqlen=32, limit=256)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_eval_on_wikitext2_follows_the_papers(hub: Hub, tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    result = hub.run_json(tmp_path, "eval", "org/tiny", "--dataset", "wikitext2")
    tokens = len(wikitext_test().encode()) + 1  # a token each byte, and the opening one
    assert (result["split"], result["seqlen"], result["windows"]) == ("test", 64, tokens // 64)
    assert result["perplexity"] == pytest.approx(plain_perplexity(checkpoint(), wikitext_test(), seqlen=64), rel=1e-5)


def test_text_in_another_column(branch_run: subprocess.CompletedProcess[str]) -> None:
    calibration = read_report(Path(branch_run.stdout.strip()))["calibration"]
    assert (calibration["dataset"], calibration["split"], calibration["windows"]) == ("org/corpus", "train", 8)


def test_revision_is_that_of_the_dense_model(
    branch_run: subprocess.CompletedProcess[str], checkpoint: Callable[..., Path], text_file: Path
) -> None:
    report = read_report(Path(branch_run.stdout.strip()))
    assert {matrix["block"] for matrix in report["matrices"]} == {f"model.layers.{i}" for i in range(3)}
    text = "\n\n".join(text_file.read_text(encoding="utf-8").strip("\n").split("\n<|endoftext|>\n"))
    expected = plain_perplexity(checkpoint(num_hidden_layers=3), text, seqlen=32)
    assert report["perplexity"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_quiet_says_nothing_but_the_folder(branch_run: subprocess.CompletedProcess[str]) -> None:
    assert Path(branch_run.stdout.strip(), "model.safetensors").is_file()
    assert branch_run.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["org/tiny", "--dataset", "org/corpus"], ["org/corpus", "id, content", "--text-column"]),
        (["org/tiny", "--dataset", "org/absent"], ["org/absent", "doesn't exist on the Hub", "check the name"]),
        (["org/tiny", "--dataset", "org/script"], ["org/script", "are no longer supported", "give a text file"]),
        (["inspect", "org/absent"], ["org/absent", "no such model on the Hub", "`hf auth login`"]),
        (["inspect", "org/gated"], ["org/gated", "ask for access", "`hf auth login`"]),
        (["inspect", "org/tiny", "--revision", "absent"], ["org/tiny", "revision", "absent"]),
    ],
    ids=["column", "dataset", "script", "model", "gated", "revision"],
)
def test_errors_are_one_line_that_says_what_to_do(
    hub: Hub, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    done = hub.run(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("sparsegpt-lite: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [part for part in said if part not in done.stderr] == [], done.stderr
    assert list(tmp_path.iterdir()) == []
