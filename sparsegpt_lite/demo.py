"""The built-in model and its text: the sources of the Python that runs it, read at run time and never copied.

The model was trained by `benchmarks/train_demo_model.py` on the `train` half of these files. Calibration text comes
from `train`, evaluation text from `heldout`, which the model has never seen.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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
