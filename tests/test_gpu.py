"""The same job on a CUDA device; skipped without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsegpt_lite import PruneConfig, prune, prune_layer
from sparsegpt_lite.blocks import StreamedModel
from sparsegpt_lite.calibration import draw, open_text
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.config import METHOD_NAMES
from sparsegpt_lite.eval.perplexity import window_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_layer_equals_the_cpu(method: str, sparsity: str) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2048, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    W, H = torch.randn(96, 256, generator=generator), X.T @ X / len(X)
    cpu, cuda = prune_layer(W, H, sparsity, method), prune_layer(W.cuda(), H.cuda(), sparsity, method)
    same = cpu.mask == cuda.mask.cpu()
    assert int(cuda.mask.sum()) == int(cpu.mask.sum())
    assert float(same.float().mean()) > 0.999  # scores that are equal to the last bits of fp32 may change places


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom"])
def test_streamed_losses_equal_the_whole_models(family: str, checkpoint: Callable[..., Path], text_file: Path) -> None:
    source = checkpoint(family)
    windows = draw(open_text(str(text_file), "-"), AutoTokenizer.from_pretrained(source), 4, 24, 0)
    streamed = StreamedModel(Checkpoint(source), torch.device("cuda:0"))
    streamed.load_outer(head=True)
    losses = window_losses(streamed, windows.tokens, 1, progress=False)
    model = AutoModelForCausalLM.from_pretrained(source).cuda().eval()
    with torch.no_grad():
        expected = [model(input_ids=w[None].cuda(), labels=w[None].cuda()).loss * (len(w) - 1) for w in windows.tokens]
    assert losses.tolist() == pytest.approx([float(e) for e in expected], rel=1e-5)


def test_pruned_checkpoint(checkpoint: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    config = PruneConfig(text=str(text_file), nsamples=8, seqlen=32, device="cuda")
    report = prune(checkpoint("llama"), tmp_path / "out", config)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(int((after[row.name] == 0).sum()) == after[row.name].numel() // 2 for row in report.matrices)
    assert report.peak_device_bytes
