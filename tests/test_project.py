"""The project itself: who may import whom, what a wheel holds, what `kernels` in the root must not break."""

import ast
import os
import shutil
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsegpt_lite
from sparsegpt_lite import PruneConfig, prune_model, solver

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    ["errors", "memory"],
    ["sparsity", "checkpoint"],
    ["config", "masks", "hessian", "writer"],
    ["matrices"],
    ["blocks"],
    ["kernels.packing", "solver", "calibration", "activations", "placement", "report"],
    ["methods", "inspection", "observation"],
    ["pipeline"],
    ["eval.perplexity"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
FOLDERS = {"sparsegpt_lite": "", "kernels": "kernels.", "eval": "eval."}
SOURCES = {
    prefix + path.stem: path for folder, prefix in FOLDERS.items() for path in sorted((ROOT / folder).glob("*.py"))
}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {name.removeprefix("sparsegpt_lite.") for name in names if name.startswith("sparsegpt_lite.")}
    return ours & set(SOURCES)


def test_imports_go_down() -> None:
    row = {module: i for i, modules in enumerate(ROWS) for module in modules}
    assert set(row) == set(SOURCES) - {"__init__"}
    upward = [(m, i) for m, path in SOURCES.items() if m != "__init__" for i in imports(path) if row[i] >= row[m]]
    assert not upward


def test_nothing_private_of_transformers_outside_blocks() -> None:
    private = ("core_model_loading", "conversion_mapping", "modeling_utils", "modeling_layers")
    users = {m for m, path in SOURCES.items() if any(name in path.read_text() for name in private)}
    assert users == {"blocks"}


def test_kernels_and_eval_are_no_packages_of_the_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "eval" / "__init__.py").exists()


def stand_in_kernels(folder: Path) -> Path:
    """A distribution named `kernels`, as Hugging Face's, that transformers will look for."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(
        "class Anything:\n"
        "    def __init__(self, *args, **kwargs): ...\n"
        "    def __call__(self, *args, **kwargs): return args[0] if args else self  # as a decorator\n"
        "def __getattr__(name): return Anything\n"
    )
    info = folder / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return folder


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import transformers; from transformers import LlamaConfig; LlamaConfig()"],
        ["-m", "sparsegpt_lite", "--help"],
        ["-c", "import sparsegpt_lite.eval.perplexity, sparsegpt_lite.kernels.packing"],
    ],
)
def test_from_the_root(command: list[str], with_kernels: bool, tmp_path: Path) -> None:
    path = [str(stand_in_kernels(tmp_path / "site"))] if with_kernels else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    kept = ["sparsegpt_lite", "kernels", "eval", "pyproject.toml", "README.md", "LICENSE"]
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--quiet", "-w", "dist"]
    done = subprocess.run(pip, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "dist").glob("*.whl"))


def test_wheel_holds_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sparsegpt_lite"}
    wanted = {"eval/perplexity.py", "kernels/packing.py", "demo_model/model.safetensors", "py.typed"}
    assert {f"sparsegpt_lite/{name}" for name in wanted} <= set(names)


def test_wheel_runs_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sparsegpt_lite.eval.perplexity as e, sparsegpt_lite.kernels.packing as k; print(e.__file__, k.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.count(str(tmp_path / "site")) == 2, done.stdout + done.stderr


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from sparsegpt_lite.cli import main\n"
        "for argv in (['--help'], ['prune', '--help'], ['eval', '--help']):\n"
        "    try: main(argv)\n"
        "    except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_distance_from_the_users_call_to_the_update(checkpoint: Callable[..., Path], monkeypatch) -> None:
    """prune_model or prune -> prune_blocks -> prune_layer -> sparsegpt -> the sweep over one block of columns."""
    stacks: list[list[traceback.FrameSummary]] = []
    sweep = solver._sweep
    monkeypatch.setattr(solver, "_sweep", lambda *a: stacks.append(traceback.extract_stack()[:-1]) or sweep(*a))
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    prune_model(model, torch.arange(32).view(1, 32), PruneConfig())
    ours = [frame for frame in stacks[0] if Path(frame.filename).parent == ROOT / "sparsegpt_lite"]
    assert [frame.name for frame in ours] == ["prune_model", "prune_blocks", "prune_layer", "sparsegpt"]
    assert len({frame.filename for frame in ours}) == 3


def test_size_of_the_code() -> None:
    lines = {module: path.read_text().splitlines() for module, path in SOURCES.items()}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{module}.{node.name}")
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    assert sum(map(len, lines.values())) < 5000
    assert max(functions)[0] <= 75, max(functions)  # docstring and signature included


def test_public_names() -> None:
    for name in sparsegpt_lite.__all__:
        assert getattr(sparsegpt_lite, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparsegpt_lite.nothing


def test_readme_and_changelog_name_this_version() -> None:
    assert f"## {sparsegpt_lite.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
