"""A checkpoint goes in, a pruned one comes out: the main job through its public doors, for three layouts and more."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsegpt_lite import PruneConfig, prune, prune_model
from sparsegpt_lite.blocks import StreamedModel, candidates, find_blocks
from sparsegpt_lite.calibration import Windows, draw, open_text
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.cli import main
from sparsegpt_lite.config import METHOD_NAMES, EvalConfig
from sparsegpt_lite.errors import CalibrationError, ModelError
from sparsegpt_lite.eval.perplexity import perplexity, window_losses
from sparsegpt_lite.inspection import inspect
from sparsegpt_lite.matrices import Piece
from sparsegpt_lite.memory import anonymous_bytes
from sparsegpt_lite.methods import METHODS
from tests.conftest import save_checkpoint

VOCAB = 257
FAMILIES = ["llama", "qwen3", "gemma2", "opt", "gpt2", "bloom", "mixtral", "openai-gpt"]
MATRICES = {"llama": 14, "qwen3": 14, "gemma2": 14, "opt": 12, "gpt2": 8, "bloom": 8, "mixtral": 32, "openai-gpt": 8}
SMALL = {"nsamples": 8, "seqlen": 32, "batch_size": 3, "device": "cpu"}

Make = Callable[..., Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def plain_losses(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers gives for the same windows: fp64 [windows]."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = [model(input_ids=w[None], use_cache=False).logits[0] for w in tokens]
    pairs = zip(logits, tokens, strict=True)
    return torch.stack([cross_entropy(x[:-1], w[1:], reduction="sum") for x, w in pairs]).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_checkpoint(family: str, checkpoint: Make, text_file: Path, tmp_path: Path) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    report = prune(source, out, PruneConfig(sparsity="0.5", text=str(text_file), **SMALL))
    before, after = tensors(source), tensors(out)
    pruned = {row.name for row in report.matrices}
    assert len(pruned) == MATRICES[family]
    assert list(before) == list(after)
    for name, W in after.items():
        if name in pruned:
            assert int((W == 0).sum()) == round(0.5 * W.numel())
            assert not W[W == 0].signbit().any()
        else:
            assert torch.equal(W, before[name])
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_losses_equal_the_whole_models(family: str, checkpoint: Make, text_file: Path) -> None:
    source = checkpoint(family)
    windows = draw(open_text(str(text_file), "-"), AutoTokenizer.from_pretrained(source), 5, 24, 0)
    model = StreamedModel(Checkpoint(source), torch.device("cpu"))
    model.load_outer(head=True)
    assert torch.equal(window_losses(model, windows.tokens, 1, progress=False), plain_losses(source, windows.tokens))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_on_disk_is_kept(
    family: str, dtype: torch.dtype, checkpoint: Make, text_file: Path, tmp_path: Path
) -> None:
    source = checkpoint(family, dtype=dtype)
    report = prune(source, tmp_path / "out", PruneConfig(text=str(text_file), dtype="float32", **SMALL))
    assert all(t.dtype == dtype for t in tensors(tmp_path / "out").values())
    assert report.zeros == sum(round(0.5 * row.shape[0] * row.shape[1]) for row in report.matrices)


def test_two_of_four_by_inspect(
    checkpoint: Make, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for family, pattern in (("llama", "2:4"), ("gpt2", "2:4 transposed")):
        out = tmp_path / family
        prune(checkpoint(family), out, PruneConfig(sparsity="2:4", text=str(text_file), **SMALL))
        found = [t["pattern"] for t in inspect(Checkpoint(out)) if t["zeros"]]
        assert found == [pattern] * MATRICES[family]
    assert main(["inspect", str(tmp_path / "llama")]) == 0
    assert "14 obey 2:4" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_same_command_twice_gives_the_same_bytes(
    method: str, checkpoint: Make, text_file: Path, tmp_path: Path
) -> None:
    config = PruneConfig(sparsity="0.6", method=method, text=str(text_file), **SMALL)
    files = []
    for name in ("a", "b"):
        prune(checkpoint("llama"), tmp_path / name, config)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_model_in_memory_is_pruned_alike(checkpoint: Make, text_file: Path, tmp_path: Path) -> None:
    source = checkpoint("llama")
    config = PruneConfig(text=str(text_file), **SMALL)
    report = prune(source, tmp_path / "out", config)
    windows = draw(open_text(str(text_file), "-", seed=0), AutoTokenizer.from_pretrained(source), 8, 32, 0)
    assert report.calibration["digest"] == windows.digest
    model = AutoModelForCausalLM.from_pretrained(source)
    in_memory = prune_model(model, windows.tokens, config)
    assert [row.zeros for row in in_memory.matrices] == [row.zeros for row in report.matrices]
    state = model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in tensors(tmp_path / "out").items())


def test_hessians_come_from_the_dense_block_and_inputs_from_the_pruned_ones(checkpoint: Make) -> None:
    """The official order: within a block all Hessians are dense, the next block sees the pruned one's output."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    dense = {name: W.clone() for name, W in model.state_dict().items()}
    tokens = torch.randint(256, (6, 32), generator=torch.Generator().manual_seed(0))
    config = PruneConfig(method="magnitude", **SMALL)
    report = prune_model(model, tokens, config)
    pruned = {name: W.clone() for name, W in model.state_dict().items()}
    for layer in (0, 1):  # dense from this layer on, pruned before
        mixed = {n: (pruned if n.startswith("model.layers.0") and layer else dense)[n] for n in dense}
        model.load_state_dict(mixed)
        inputs: list[torch.Tensor] = []
        module = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
        hook = module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].reshape(-1, 96)))
        with torch.no_grad():
            model(tokens)
        hook.remove()
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        error = (inputs[0] @ (dense[name] - pruned[name]).T).square().sum(1).mean()
        row = next(row for row in report.matrices if row.name == name)
        assert row.error == pytest.approx(float(error), rel=1e-4)
        assert row.tokens == 6 * 32


def test_eval_equals_transformers(checkpoint: Make, text_file: Path, capsys: pytest.CaptureFixture) -> None:
    source = checkpoint("opt")
    assert main(["eval", str(source), "--dataset", str(text_file), "--seqlen", "48", "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(source)
    documents = text_file.read_text().strip("\n").split("\n<|endoftext|>\n")
    ids = torch.tensor(tokenizer("\n\n".join(documents))["input_ids"])
    windows = ids[: len(ids) // 48 * 48].view(-1, 48)
    expected = float(plain_losses(source, windows).sum()) / (len(windows) * 47)
    assert result["nll"] == pytest.approx(expected, rel=1e-5)
    assert result["windows"] == len(windows)
    assert result["tokens"] == len(windows) * 47
    assert len(result["digest"]) == 64


def test_eval_is_the_same_for_any_batch_size_and_in_memory(checkpoint: Make, text_file: Path) -> None:
    source = checkpoint("llama")
    windows = draw(open_text(str(text_file), "-"), AutoTokenizer.from_pretrained(source), 6, 32, 0)
    results = [perplexity(source, EvalConfig(batch_size=size), windows=windows).nll for size in (1, 4)]
    model = AutoModelForCausalLM.from_pretrained(source)
    results.append(perplexity(model, windows=windows).nll)
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_report_says_what_happened(checkpoint: Make, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(checkpoint("mixtral"), out, PruneConfig(text=str(text_file), **SMALL))
    report = json.loads((out / "sparsity.json").read_text())
    row = report["matrices"][0]
    assert row["name"] == "model.layers.0.self_attn.q_proj.weight"
    assert row["tokens"] == 8 * 32
    assert row["damping"] == 0.01
    assert 0 < row["relative_error"] < 1
    assert report["calibration"]["windows"] == 8
    assert report["config"]["sparsity"] == "0.5"
    assert report["totals"]["sparsity_of_pruned"] == 0.5
    assert report["peak_host_bytes"] > 0
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["matrices"]) == 2 * (4 + 4 * 3)
    assert report["dense"] == {
        "model.embed_tokens.weight": "an embedding",
        "lm_head.weight": "the output layer",
        **{f"model.layers.{i}.block_sparse_moe.gate.weight": "chooses between experts or tokens" for i in range(2)},
    }


def test_shared_inputs_share_a_hessian(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegpt_lite.hessian import Observer

    groups: list[list[str]] = []
    original = Observer.groups

    def noting(self: Observer) -> list:
        found = original(self)
        groups.extend([tile.weight for tile in tiles] for _, tiles in found)
        return found

    monkeypatch.setattr(Observer, "groups", noting)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama", num_hidden_layers=1))
    prune_model(model, torch.arange(64).view(2, 32), PruneConfig(**SMALL))
    leaves = [[name.split(".")[-2] for name in group] for group in groups[: len(groups) // 2]]  # it is asked twice
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_only_one_block_is_ever_loaded(checkpoint: Make, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    loaded: list[int] = []
    drop = StreamedModel.drop

    def counting(self: StreamedModel, block: str) -> None:
        loaded.append(sum(not next(b.parameters()).is_meta for b in self.blocks.values()))
        drop(self, block)

    monkeypatch.setattr(StreamedModel, "drop", counting)
    source = checkpoint("llama", num_hidden_layers=4)
    prune(source, tmp_path / "out", PruneConfig(text=str(text_file), **SMALL))
    assert loaded == [1, 1, 1, 1]


def test_skip_leaves_weights_dense_and_says_so(checkpoint: Make, text_file: Path, tmp_path: Path) -> None:
    config = PruneConfig(text=str(text_file), skip="down_proj|layers.1", **SMALL)
    report = prune(checkpoint("llama"), tmp_path / "out", config)
    assert len(report.matrices) == 6
    assert report.dense["model.layers.0.mlp.down_proj.weight"] == "left out by --skip"


def test_command_line_prunes_evaluates_and_reports(
    checkpoint: Make, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = [str(checkpoint("llama")), "--sparsity", "4:8", "--text", str(text_file), "--nsamples", "8"]
    assert main([*command, "--seqlen", "32", "--eval", str(text_file), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "14 matrices pruned with sparsegpt: 12,288 of 24,576 weights are zero (50.00%)" in printed.out
    assert "pruning" in printed.err
    dense, pruned = json.loads((out / "sparsity.json").read_text())["perplexity"]
    assert dense["model"] != pruned["model"]
    assert dense["digest"] == pruned["digest"]


def test_a_report_repeats_its_run(checkpoint: Make, text_file: Path, tmp_path: Path) -> None:
    first = [
        "--method",
        "wanda",
        "--sparsity",
        "0.3",
        "--text",
        str(text_file),
        "--nsamples",
        "8",
        "--seqlen",
        "32",
        "-q",
    ]
    assert main([str(checkpoint("llama")), *first, "--out", str(tmp_path / "a")]) == 0
    assert main(["--from", str(tmp_path / "a" / "sparsity.json"), "--out", str(tmp_path / "b"), "-q"]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    again = [f"--from={tmp_path / 'a' / 'sparsity.json'}", "--sparsity", "2:4", "--out", str(tmp_path / "c"), "-q"]
    assert main(again) == 0
    config = json.loads((tmp_path / "c" / "sparsity.json").read_text())["config"]
    assert (config["sparsity"], config["method"]) == ("2:4", "wanda")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"source": "x", "config": {"unknown": 1}}'])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "report.json").write_text(text)
    assert main(["--from", str(tmp_path / "report.json")]) == 1
    assert "no report of ours" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["prune"], ["eval"], ["--sparsity", "0.5"], ["x", "--unknown"]])
def test_usage_errors_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert capsys.readouterr().out == ""


def test_forwards_are_left_as_they_were(checkpoint: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight: the weights hold NaN"):
        prune_model(model, torch.arange(32).view(1, 32), PruneConfig(**SMALL))
    assert all("forward" not in block.__dict__ for block in find_blocks(model).values())
    assert torch.is_grad_enabled()


class Stored:
    """The part of a BlockModel that `candidates` looks at."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.blocks = {"b": block}

    def names(self, parameter: str) -> list[str]:
        return [parameter.replace("b.", "disk.")]

    def pieces(self, parameter: str) -> list[Piece]:
        return [] if "fused" in parameter else [Piece(*self.names(parameter), torch.float32)]


def test_why_weights_stay_dense() -> None:
    layers = {name: torch.nn.Linear(4, 4) for name in ("up", "gate", "indexer", "fused", "left", "gate_proj", "other")}
    others = {"table": torch.nn.Embedding(3, 4), "norm": torch.nn.LayerNorm(4), "conv": torch.nn.Conv1d(2, 3, 4)}
    block = torch.nn.ModuleDict(layers | others)
    config = PruneConfig(skip=r"^disk\.left", only="up|gate|indexer|fused|left|table|conv")
    found, dense = candidates(Stored(block), "b", config)
    assert [weight.name for weight in found] == ["b.up.weight", "b.gate_proj.weight"]
    assert dense == {
        "disk.gate.weight": "chooses between experts or tokens",
        "disk.indexer.weight": "chooses between experts or tokens",
        "disk.fused.weight": "is stored in another form on disk",
        "disk.left.weight": "left out by --skip",
        "disk.other.weight": "not asked for by --only",
        "disk.table.weight": "an embedding [3, 4]",
        "disk.conv.weight": "a convolution [3, 2, 4]",
    }


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_kept_weights_do_not_vanish_in_the_dtype_on_disk(
    dtype: str, checkpoint: Make, text_file: Path, tmp_path: Path
) -> None:
    """fp16 has nothing below 6e-8: weights as small as that stay, so the zeros are exact, and the report is true."""
    source = shutil.copytree(checkpoint("llama", dtype=torch.float16), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name].float() * 1e-6).half()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    report = prune(source, tmp_path / "out", PruneConfig(text=str(text_file), dtype=dtype, **SMALL))
    after = tensors(tmp_path / "out")
    for row in report.matrices:
        assert row.zeros == int((after[row.name] == 0).sum()) == after[row.name].numel() // 2
        assert not after[row.name][after[row.name] == 0].signbit().any()


def test_weights_shared_by_blocks_are_pruned_once(checkpoint: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    report = prune_model(model, torch.arange(32).view(1, 32), PruneConfig(**SMALL))
    assert len(report.matrices) == 13
    assert [m.block for m in report.matrices if "up_proj" in m.name] == ["model.layers.0"]
    assert int((model.model.layers[1].mlp.up_proj.weight == 0).sum()) == 96 * 32 // 2


def test_a_training_model_is_evaluated_without_dropout_and_goes_on_training(checkpoint: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("gpt2"))
    windows = Windows(torch.arange(96).view(3, 32), "numbers", "-", "-")
    expected = perplexity(model, windows=windows).nll
    model.train()
    assert perplexity(model, windows=windows).nll == expected
    assert model.training


@pytest.mark.parametrize("tokens", [torch.arange(32), torch.arange(32).view(32, 1), torch.full((1, 8), VOCAB)])
def test_tokens_that_the_model_cannot_read_are_refused(tokens: torch.Tensor, checkpoint: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    with pytest.raises(CalibrationError):
        prune_model(model, tokens, PruneConfig(**SMALL))
    with pytest.raises(CalibrationError):
        perplexity(model, windows=Windows(tokens, "numbers", "-", "-"))


def test_more_windows_than_a_pass_holds(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(torch.arange(160).view(10, 16), "numbers", "-", "-")
    whole = perplexity(checkpoint("llama"), windows=windows).nll
    monkeypatch.setattr("sparsegpt_lite.eval.perplexity.PASS", 4)
    assert perplexity(checkpoint("llama"), windows=windows).nll == whole


def test_baseline_on_other_windows_is_refused(checkpoint: Make, text_file: Path, capsys: pytest.CaptureFixture) -> None:
    longer = str(checkpoint("llama", max_position_embeddings=96))
    options = ["--baseline", str(checkpoint("llama")), "--dataset", str(text_file), "-q"]
    assert main(["eval", longer, *options]) == 1
    assert "read the text as other windows (of 64 and 96 tokens): give --seqlen" in capsys.readouterr().err
    assert main(["eval", longer, *options, "--seqlen", "64"]) == 0
    assert len(capsys.readouterr().out.split()) == 2


def test_another_text_than_the_report_says_is_refused(
    checkpoint: Make, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    first = [str(checkpoint("llama")), "--text", str(text), "--nsamples", "8", "--seqlen", "32", "-q"]
    assert main([*first, "--out", str(tmp_path / "a")]) == 0
    text.write_text(text.read_text().replace("a", "b"))
    again = ["--from", str(tmp_path / "a" / "sparsity.json"), "-q", "--out"]
    assert main([*again, str(tmp_path / "b")]) == 1
    assert "the tokens have the digest" in capsys.readouterr().err
    assert main([*again, str(tmp_path / "c"), "--seed", "1"]) == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["cuda", "host"])
def test_out_of_memory_is_one_line(
    error: Exception, checkpoint: Make, text_file: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setitem(METHODS, "sparsegpt", fail)
    options = ["--text", str(text_file), "--nsamples", "8", "--seqlen", "32", "-q", "--out", str(tmp_path / "out")]
    assert main([str(checkpoint("llama")), *options]) == 1
    line = capsys.readouterr().err
    assert "out of memory" in line
    assert "use --activations" in line
    assert line.count("\n") == 1


def test_skip_that_matches_nothing_is_refused(
    checkpoint: Make, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--text", str(text_file), "--skip", "dwon_proj", "--out", str(tmp_path / "out")]
    assert main([str(checkpoint("llama")), *options]) == 1
    assert "--skip dwon_proj: matches no weight that could be pruned" in capsys.readouterr().err


def test_a_large_embedding_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """51 MB of rows stay in the file, and their lookups give what the whole model gives."""
    monkeypatch.setattr("sparsegpt_lite.blocks.LARGE", 10_000_000)
    source = save_checkpoint(tmp_path / "model", vocab_size=400_000)
    streamed = StreamedModel(Checkpoint(source), torch.device("cpu"))
    before = anonymous_bytes()
    streamed.load_outer(head=False)
    assert anonymous_bytes() - before < 10_000_000
    tokens = torch.tensor([[399_999, 0, 5, 7]])
    windows = Windows(tokens, "numbers", "-", "-")
    model = AutoModelForCausalLM.from_pretrained(source)
    assert perplexity(source, windows=windows).nll == perplexity(model, windows=windows).nll
