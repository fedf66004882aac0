"""The built-in model and its text: the sources of the Python that runs it, read at run time and never copied.

The model was trained by `benchmarks/train_demo_model.py` on the `train` half of these files. Calibration text comes
from `train`, evaluation text from `heldout`, which the model has never seen.
"""

import hashlib
import platform
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent / "demo_model"
SPARSITIES = ("0.5", "2:4")
NSAMPLES, EVAL_WINDOWS, SEQLEN = 64, 64, 512

# Not text: tables, generated files, and what others installed.
NOT_TEXT = {"__pycache__", "dist-packages", "encodings", "pydoc_data", "site-packages"}
# Left out by some distributions of CPython: read for training, never for calibration or evaluation.
OPTIONAL = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtledemo"}


def stdlib_documents(split: str, optional: bool = False) -> Iterator[str]:
    """Yield the sources of the standard library, file by file in a fixed order.

    Args:
        split: `heldout` (one file in ten, chosen by the SHA-256 of its path) or `train` (the others).
        optional: Read the packages too that not every distribution of CPython has.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = NOT_TEXT if optional else NOT_TEXT | OPTIONAL
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if skip & set(name.split("/")):
            continue
        heldout = hashlib.sha256(name.encode()).digest()[0] < 26
        if heldout == (split == "heldout"):
            yield path.read_text(encoding="utf-8", errors="replace")


def stdlib_windows(split: str) -> Any:
    """Windows of the built-in model's text: drawn for `train`, consecutive for `heldout`. Files in a seeded order."""
    from sparsegpt_lite.calibration import Text, cut, draw, load_tokenizer
    from sparsegpt_lite.checkpoint import Checkpoint

    documents = list(stdlib_documents(split))
    random.Random(0).shuffle(documents)
    text = Text(f"standard library of Python {platform.python_version()}", split, documents)
    tokenizer = load_tokenizer(Checkpoint(MODEL))
    if split == "train":
        return draw(text, tokenizer, NSAMPLES, SEQLEN, seed=0)
    return cut(text, tokenizer, SEQLEN, EVAL_WINDOWS, bos="document")


def run_demo(progress: bool = True) -> dict[str, Any]:
    """Prune the built-in model with every method at 50 % and 2:4, and evaluate what was written each time.

    Returns:
        `dense` and `pruned[method][sparsity]`, perplexities on held-out files, and what they were measured on.
    """
    from sparsegpt_lite.config import METHOD_NAMES, EvalConfig, PruneConfig
    from sparsegpt_lite.eval.perplexity import perplexity
    from sparsegpt_lite.pipeline import prune

    started = time.monotonic()
    calibration, heldout = stdlib_windows("train"), stdlib_windows("heldout")
    measure = EvalConfig(dtype="float32", batch_size=8)
    dense = perplexity(MODEL, measure, windows=heldout)
    pruned: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHOD_NAMES:
            for sparsity in SPARSITIES:
                if progress:
                    print(f"{method} at {sparsity} ...", file=sys.stderr, flush=True)
                out = Path(folder) / f"{method}-{sparsity.replace(':', 'of')}"
                config = PruneConfig(sparsity=sparsity, method=method, dtype="float32")
                prune(MODEL, out, config, calibration=calibration)
                result = perplexity(out, measure, windows=heldout)
                pruned.setdefault(method, {})[sparsity] = result.perplexity
    return {
        "dense": dense.perplexity,
        "pruned": pruned,
        "calibration": calibration.describe(),
        "evaluation": heldout.describe(),
        "device": dense.device,
        "versions": dense.versions,
        "seconds": time.monotonic() - started,
    }


def table(result: dict[str, Any]) -> str:
    """Lay the comparison out for a person."""
    from sparsegpt_lite.report import aligned

    rows = [("perplexity", *("50 %" if s == "0.5" else s for s in SPARSITIES))]
    rows.append(("dense", *[f"{result['dense']:.3f}"] * len(SPARSITIES)))
    rows += [(m, *(f"{by[s]:.3f}" for s in SPARSITIES)) for m, by in result["pruned"].items()]
    calibration, evaluation = result["calibration"], result["evaluation"]
    return (
        f"{aligned(rows)}\n\n"
        f"Built-in model, {evaluation['dataset']}: calibrated on {calibration['windows']} windows of "
        f"{calibration['seqlen']} tokens from its {calibration['split']} files, evaluated on {evaluation['windows']} "
        f"windows of its {evaluation['split']} files (digest {evaluation['digest'][:12]}). {result['seconds']:.0f} s."
    )
