"""One-shot pruning of Hugging Face decoder-only models, streamed block by block."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsegpt_lite.config import PruneConfig
    from sparsegpt_lite.methods import prune_layer
    from sparsegpt_lite.pipeline import prune, prune_model
    from sparsegpt_lite.report import PruneReport

__all__ = ["PruneConfig", "PruneReport", "prune", "prune_layer", "prune_model"]
__version__ = "0.1.0"

# In a source checkout `kernels/` and `eval/` lie beside this folder; an installed wheel has them inside it.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").exists() and (_here.parent / "kernels" / "packing.py").is_file():
    __path__.append(str(_here.parent))

_HOMES = {
    "PruneConfig": "config",
    "PruneReport": "report",
    "prune": "pipeline",
    "prune_layer": "methods",
    "prune_model": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `--help` needs neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
