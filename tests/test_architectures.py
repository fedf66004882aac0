"""Every causal language model that transformers knows: streamed as the whole model computes, pruned and loaded again.

The ordinary suite takes some types that stand for the others; `make test-architectures` takes them all.
"""

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsegpt_lite.activations import SuspendedForwards
from sparsegpt_lite.blocks import StreamedModel
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.cli import main
from tests.architectures import REPRESENTATIVE, TYPES, UNBUILDABLE, save

PRUNED = [
    pytest.param(kind, marks=[] if kind in REPRESENTATIVE else pytest.mark.architectures)
    for kind in TYPES
    if kind not in UNBUILDABLE
]


@pytest.fixture(scope="module", params=PRUNED)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("architecture")
    yield save(request.param, folder / "model")
    shutil.rmtree(folder)


def batches() -> list[dict[str, Tensor]]:
    """Two sequences, a single one, and three of several lengths with padding to the left."""
    generator = torch.Generator().manual_seed(0)
    two, one, ragged = (torch.randint(1, 256, shape, generator=generator) for shape in ((2, 12), (1, 7), (3, 9)))
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [1]])).long()
    return [{"input_ids": two}, {"input_ids": one}, {"input_ids": ragged * mask, "attention_mask": mask}]


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def streamed_logits(folder: Path) -> list[Tensor]:
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"))
    model.load_outer(head=True)
    forwards = [partial(logits, model.module, batch) for batch in batches()]
    with SuspendedForwards(model.blocks, forwards) as suspended:
        while (block := suspended.block) is not None:
            model.load(block)
            suspended.advance()
            model.drop(block)
    return suspended.results


def test_streamed_logits_equal_the_whole_models(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    for streamed, batch in zip(streamed_logits(source), batches(), strict=True):
        whole = logits(model, batch)
        assert whole.isfinite().all()
        assert torch.equal(streamed, whole)


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def located(name: str) -> tuple[str, Any]:
    """Tensor on disk and index into it: `w` is all of w, `w[3]` its fourth slice, `w[0,8:16]` rows of its first."""
    tensor, brackets = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", name).groups()
    if not brackets:
        return tensor, ...
    parts = [[int(number) if number.strip() else None for number in part.split(":")] for part in brackets.split(",")]
    return tensor, tuple(slice(*part) if len(part) > 1 else part[0] for part in parts)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check_weights(before: dict[str, Tensor], after: dict[str, Tensor], report: dict[str, Any]) -> None:
    """The report tells the truth of the weights on disk, and nothing else has changed."""
    assert [(n, t.shape, t.dtype) for n, t in after.items()] == [(n, t.shape, t.dtype) for n, t in before.items()]
    expected = {name: tensor.clone() for name, tensor in before.items()}
    for row in report["matrices"]:
        name, index = located(row["name"])
        W = after[name][index]
        assert W.numel() == row["shape"][0] * row["shape"][1], row["name"]
        assert int((W == 0).sum()) == row["zeros"] == round(0.5 * W.numel()), row["name"]
        assert not W[W == 0].signbit().any(), row["name"]
        expected[name][index] = W
    changed = [name for name in after if not same_bytes(after[name], expected[name])]
    assert not changed


def check_all_named(tensors: dict[str, Tensor], report: dict[str, Any]) -> None:
    """Each weight of a tensor of two or more dimensions is reported once: pruned, or dense with a reason."""
    times = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in tensors.items()}
    names = [row["name"] for row in report["matrices"]] + list(report["dense"])
    unknown = [name for name in names if located(name)[0] not in tensors]
    assert not unknown
    for tensor, index in map(located, names):
        times[tensor][index] += 1
    unnamed = [name for name, n in times.items() if n.ndim >= 2 and (n == 0).any()]
    assert not unnamed
    twice = [name for name, n in times.items() if (n > 1).any()]
    assert not twice
    assert all(report["dense"].values())


def loaded(folder: Path) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval(), {kind: set(info[kind]) for kind in ("missing_keys", "unexpected_keys")}


def test_pruned_and_reloaded(source: Path, text_file: Path, capsys: pytest.CaptureFixture) -> None:
    out = source.parent / "out"
    size = ["--nsamples", "4", "--seqlen", "16", "--batch-size", "2"]
    code = main(["prune", str(source), "--sparsity", "0.5", "--text", str(text_file), *size, "--out", str(out), "-q"])
    assert code == 0, capsys.readouterr().err
    before, after, report = on_disk(source), on_disk(out), json.loads((out / "sparsity.json").read_text())
    check_weights(before, after, report)
    check_all_named(after, report)
    model, keys = loaded(out)
    assert keys == loaded(source)[1]
    assert all(logits(model, batch).isfinite().all() for batch in batches())


@pytest.mark.architectures
@pytest.mark.parametrize("kind", UNBUILDABLE)
def test_transformers_itself_cannot(kind: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, AttributeError, ImportError, ValueError)):
        run_by_transformers(kind, tmp_path)
    pytest.skip(UNBUILDABLE[kind])


def run_by_transformers(kind: str, folder: Path) -> None:
    model, keys = loaded(save(kind, folder))
    assert not keys["missing_keys"]
    logits(model, batches()[0])
