"""The README is true: its commands and its Python run, on tiny models, and its table is what the demo gave."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsegpt_lite.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMAND_LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line]


@pytest.fixture
def workplace(checkpoint: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch) -> Path:
    """A folder with what the README speaks of: ./model, corpus.txt, heldout.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoint("llama"))
    (tmp_path / "corpus.txt").write_text(text_file.read_text())
    (tmp_path / "heldout.txt").write_text(text_file.read_text())
    return tmp_path


def test_commands_run(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    local = [line for line in COMMAND_LINES if line.startswith("sparsegpt-lite ./") or " ./model" in line]
    assert len(local) == 3
    for line in local:
        small = ["--nsamples", "8", "--seqlen", "32"] if "--text" in line else []
        assert main(shlex.split(line)[1:] + small) == 0, capsys.readouterr().err
    assert "14 obey 2:4" in capsys.readouterr().out


def test_other_commands_are_known() -> None:
    for line in COMMAND_LINES:
        program, *rest = shlex.split(line, comments=True)
        if program == "make":
            assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text()
        else:
            assert program in ("sparsegpt-lite", "pip")


def test_python_runs(workplace: Path) -> None:
    code = next(block for kind, block in BLOCKS if kind == "python")
    X = torch.randn(100, 64)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(workplace / "model"),
        "tokens": torch.arange(64).view(2, 32),
        "W": torch.randn(8, 64),
        "H": X.T @ X / 100,
    }
    code = code.replace('text="corpus.txt"', 'text="corpus.txt", nsamples=8, seqlen=32')
    exec(compile(code, "README.md", "exec"), names)
    assert int((names["solution"].W != 0).sum()) == 8 * 32


def test_table_is_what_the_demo_gave() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    readme = (ROOT / "README.md").read_text()
    rows = {"dense": {"0.5": result["dense"], "2:4": result["dense"]}, **result["pruned"]}
    for method, by in rows.items():
        assert f"| {method} | {by['0.5']:.2f} | {by['2:4']:.2f} |" in readme
    for by in ("0.5", "2:4"):
        order = [rows[m][by] for m in ("dense", "sparsegpt", "wanda", "magnitude")]
        assert order == sorted(order)


def test_usage_names_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage or f"or {name} " in usage for name in COMMANDS)
