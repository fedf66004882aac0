"""The built-in model: it is there, it has learned, and the demo goes through the real pipeline."""

import json
import math
from pathlib import Path

import pytest

from sparsegpt_lite import demo
from sparsegpt_lite.cli import main
from sparsegpt_lite.config import METHOD_NAMES, EvalConfig
from sparsegpt_lite.eval.perplexity import perplexity

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def test_files_are_split_by_hash() -> None:
    train, heldout = (set(demo.stdlib_documents(split)) for split in ("train", "heldout"))
    assert 0.05 < len(heldout) / len(train | heldout) < 0.15
    assert all(len(document) < 100 for document in train & heldout)  # empty __init__ files and the like


def test_model_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its held-out loss is far below those of the unigram and the bigram model, which the training recorded."""
    recorded = json.loads((RESULTS / "train_demo_model.json").read_text())["heldout_loss_nats_per_token"]
    assert recorded["model_bf16"] < 0.65 * recorded["bigram"] < recorded["bigram"] < recorded["unigram"]
    monkeypatch.setattr(demo, "EVAL_WINDOWS", 16)
    measured = perplexity(demo.MODEL, EvalConfig(dtype="float32"), windows=demo.stdlib_windows("heldout"))
    assert measured.nll < 0.75 * recorded["bigram"]  # sixteen windows of whatever Python runs this


def test_model_is_small() -> None:
    size = sum(path.stat().st_size for path in demo.MODEL.iterdir())
    assert size < 16e6


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(demo, "NSAMPLES", 4)
    monkeypatch.setattr(demo, "EVAL_WINDOWS", 4)
    monkeypatch.setattr(demo, "SEQLEN", 128)
    monkeypatch.setattr(demo, "SPARSITIES", ("2:4",))
    assert main(["demo", "--json", "-q"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    result = json.loads(printed.out)
    assert set(result["pruned"]) == set(METHOD_NAMES)
    assert all(result["dense"] < by["2:4"] < math.inf for by in result["pruned"].values())
    assert result["calibration"]["split"] == "train"
    assert result["evaluation"]["split"] == "heldout"
    assert "sparsegpt" in demo.table(result)
