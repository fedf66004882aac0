"""Experts: each is pruned for the tokens that the router sends to it. And what is chosen, shared, starved or broken."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsegpt_lite import PruneConfig, pipeline, prune, prune_layer, prune_model
from sparsegpt_lite.activations import BlockCall
from sparsegpt_lite.blocks import StreamedModel
from sparsegpt_lite.calibration import Windows
from sparsegpt_lite.cli import main
from sparsegpt_lite.errors import CalibrationError, ConfigError, ModelError
from sparsegpt_lite.report import MatrixReport
from tests import architectures
from tests.test_architectures import batches as text_batches
from tests.test_architectures import check_all_named, loaded, located, logits, on_disk, same_bytes, streamed_logits
from tests.test_hessian import assert_mean_of_squares

HIDDEN = 64  # of every model of `architectures`
TOKENS = torch.randint(1, 256, (8, 24), generator=torch.Generator().manual_seed(0))
N = TOKENS.numel()
SIZE = 3  # windows per forward: batches of 3, 3 and 2
CALLS = math.ceil(len(TOKENS) / SIZE)
UP, DOWN = "up", "down"  # matrices that read the hidden state, and those that give it


@dataclass(frozen=True)
class Kind:
    """A type with experts: how the matrices of an expert are called on disk, with its number or first row, and how
    many layers with experts, experts in each, and matrices of each that read the hidden state there are.
    """

    up: str
    down: str
    layers: int
    experts: int
    ups: int
    sizes: Mapping[str, Any] = field(default_factory=dict)  # besides those of `architectures`


SPLIT = r"\.experts\.(\d+)\.(?:gate|up)_proj\.weight", r"\.experts\.(\d+)\.down_proj\.weight"
FUSED = r"experts\.gate_up_proj\[(\d+)\]", r"experts\.down_proj\[(\d+)\]"
TWO, THREE = {"num_hidden_layers": 2}, {"num_hidden_layers": 3}
KINDS = {
    "mixtral": Kind(r"moe\.experts\.(\d+)\.w[13]\.weight", r"moe\.experts\.(\d+)\.w2\.weight", 3, 4, 2, THREE),
    "qwen3_moe": Kind(*SPLIT, 2, 4, 2, TWO),
    "deepseek_v3": Kind(*SPLIT, 1, 8, 2, TWO),
    "gpt_oss": Kind(*FUSED, 2, 4, 1, TWO),
    "llama4_text": Kind(*FUSED, 1, 4, 1, TWO | {"no_rope_layers": [1, 0]}),
    "dbrx": Kind(r"experts\.mlp\.[vw]1\[(\d+):\d+\]", r"experts\.mlp\.w2\[(\d+):\d+\]", 2, 4, 2, {"n_layers": 2}),
    "inkling2_text": Kind(
        r"experts\.w13_weight\[(\d+), [01]:64:2\]", r"experts\.w2_weight\[(\d+)\]", 2, 4, 2,
        TWO | {"layer_types": ["hybrid_sliding", "hybrid"]},
    ),
    "granitemoe": Kind(r"moe\.input_linear\.weight\[(\d+)\]", r"moe\.output_linear\.weight\[(\d+)\]", 2, 4, 1, TWO),
    "jetmoe": Kind(r"mlp\.input_linear\.weight\[(\d+)\]", r"mlp\.output_linear\.weight\[(\d+)\]", 2, 4, 1, TWO),
}  # fmt: skip
LAYER = r"(?:layers|blocks)\.(\d+)\."


def expert_of(kind: str, name: str) -> tuple[int, str, int] | None:
    """Layer, role and expert of a matrix, by its name on disk."""
    for role, pattern in ((UP, KINDS[kind].up), (DOWN, KINDS[kind].down)):
        if match := re.search(pattern, name):
            return int(re.search(LAYER, name)[1]), role, int(match[1]) // (32 if kind == "dbrx" else 1)
    return None


def outward(W: Tensor, role: str) -> Tensor:
    """A matrix of an expert as [d_out, d_in]: exactly one of its sides is as wide as the hidden state, and which is
    the input follows from what the matrix is for.
    """
    sides = [n == HIDDEN for n in W.shape]
    assert sorted(sides) == [False, True]
    return W if sides[-1] == (role == UP) else W.T


def halves_of_fours(W: Tensor) -> bool:
    """Whether every four consecutive inputs of every output, [d_out, d_in], have two zeros."""
    return bool(((W == 0).unflatten(1, (-1, 4)).sum(2) == 2).all())


def half(W: Tensor) -> int:
    return round(0.5 * W.numel())


def whole(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, its experts multiplied as a run of ours multiplies them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def run_all(model: PreTrainedModel) -> None:
    for batch in TOKENS.split(SIZE):
        model(input_ids=batch, use_cache=False)


@dataclass
class Run:
    """What came of pruning a checkpoint, and what was noted meanwhile.

    Attributes:
        problems: W, H and method of each matrix that was solved, as `prune_layer` got them, in the report's order.
        calls: Block and first argument of each forward of a block.
    """

    source: Path
    out: Path
    problems: list[tuple[Tensor, Tensor, str]] = field(default_factory=list)
    calls: list[tuple[str, Tensor]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def prune(self, tokens: Tensor = TOKENS, **options: Any) -> "Run":
        config = PruneConfig(**{"batch_size": SIZE, "device": "cpu"} | options)
        load, run = StreamedModel.load, BlockCall.run

        def solve(W: Tensor, H: Tensor, sparsity: Any, method: str, *rest: Any) -> Any:
            self.problems.append((W.clone(), H.clone(), method))
            return prune_layer(W, H, sparsity, method, *rest)

        def noting_run(call: BlockCall) -> Any:
            self.calls.append((call.block, next(iter([*call.args, *call.kwargs.values()])).clone()))
            return run(call)

        def noting_load(model: StreamedModel, block: str) -> None:
            self.loads.append(block)
            load(model, block)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "prune_layer", solve)
            patch.setattr(BlockCall, "run", noting_run)
            patch.setattr(StreamedModel, "load", noting_load)
            windows = Windows(tokens, "numbers", "-", "-")
            self.report = prune(self.source, self.out, config, calibration=windows)
        self.before, self.after = on_disk(self.source), on_disk(self.out)
        return self

    def dense(self, name: str) -> Tensor:
        """A matrix of the report, as it was on disk."""
        tensor, index = located(name)
        return self.before[tensor][index]

    def pruned(self, name: str) -> Tensor:
        """The same as it is there now."""
        tensor, index = located(name)
        return self.after[tensor][index]

    def solved(self, kind: str) -> list[tuple[MatrixReport, tuple[int, str, int], tuple[Tensor, Tensor, str]]]:
        """Row, layer with role and expert, and problem of each matrix of an expert."""
        pairs = zip(self.report.matrices, self.problems, strict=True)
        return [(row, place, problem) for row, problem in pairs if (place := expert_of(kind, row.name))]

    def check_rest(self) -> None:
        """What is in no row is as it was, and has a reason."""
        assert [(n, t.shape, t.dtype) for n, t in self.after.items()] == [
            (n, t.shape, t.dtype) for n, t in self.before.items()
        ]
        rest = {name: tensor.clone() for name, tensor in self.before.items()}
        for row in self.report.matrices:
            name, index = located(row.name)
            rest[name][index] = self.after[name][index]
        assert all(same_bytes(self.after[name], tensor) for name, tensor in rest.items())
        check_all_named(self.after, json.loads(self.report.to_json()))

    def check_half(self, rows: Iterable[MatrixReport]) -> None:
        """Exactly half of the weights of these matrices are zero."""
        for row in rows:
            W = self.pruned(row.name)
            assert int((W == 0).sum()) == row.zeros == half(W)


Source = Callable[..., Path]
Runs = Callable[..., Run]
Command = Callable[..., tuple[int, Path]]


def starve(model: PreTrainedModel, expert: int) -> None:
    """Let no router choose an expert: all tokens have something in common, and the routers hold that against it."""
    table = model.get_input_embeddings().weight.data
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
    table[:, 0] = 30.0
    for name, parameter in model.named_parameters():
        if re.search(r"(?:gate|router|router\.layer)\.weight$", name):
            parameter.data[:, 0] = 0
            parameter.data[expert] = 0
            parameter.data[expert, 0] = -1e3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Small models by type, never written to; the router of those that are `starved` never chooses expert 3."""
    made: dict[tuple[str, bool], Path] = {}

    def make(kind: str, starved: bool = False) -> Path:
        if kind not in architectures.TYPES:
            pytest.skip(f"this transformers does not know {kind}")
        if (kind, starved) not in made:
            folder = made[kind, starved] = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                sizes = KINDS[kind].sizes if kind in KINDS else {}
                patch.setitem(architectures.OVERRIDES, kind, architectures.OVERRIDES.get(kind, {}) | sizes)
                architectures.save(kind, folder)
            if starved:
                model = AutoModelForCausalLM.from_pretrained(folder)
                starve(model, 3)
                model.save_pretrained(folder)
        return made[kind, starved]

    return make


@pytest.fixture(scope="module")
def run(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs by type and options, each made once."""
    made: dict[str, Run] = {}

    def make(kind: str, starved: bool = False, **options: Any) -> Run:
        key = repr((kind, starved, options))
        if key not in made:
            made[key] = Run(source(kind, starved), tmp_path_factory.mktemp("out") / "out").prune(**options)
        return made[key]

    return make


@pytest.fixture
def command(text_file: Path, tmp_path: Path) -> Command:
    """Run a command line; gives its exit code and its output folder."""

    def call(folder: Path, *options: str) -> tuple[int, Path]:
        size = ["--text", str(text_file), "--nsamples", "4", "--seqlen", "24"]
        return main([str(folder), *size, *options, "--out", str(tmp_path / "out")]), tmp_path / "out"

    return call


# ---- types with experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_loses_exactly_half_of_its_weights(kind: str, run: Runs) -> None:
    one, expected = run(kind, token_floor=0.0), KINDS[kind]
    found = one.solved(kind)
    for role, each in ((UP, expected.ups), (DOWN, 1)):
        assert len([r for _, (_, r, _), _ in found if r == role]) == expected.layers * expected.experts * each
    assert len({place for _, place, _ in found}) == expected.layers * expected.experts * 2
    for row, (_, role, _), _ in found:
        assert outward(one.pruned(row.name), role).shape == row.shape
    one.check_half(one.report.matrices)
    one.check_rest()


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_four_along_the_inputs(kind: str, run: Runs) -> None:
    """On disk, along the input axis; and what is loaded from there is what the run computed with, block by block."""
    one = run(kind, sparsity="2:4")
    for row, (_, role, _), _ in one.solved(kind):
        assert halves_of_fours(outward(one.pruned(row.name), role))
    assert loaded(one.out)[1] == loaded(one.source)[1]
    model, into_last = whole(one.out), []
    last = one.calls[-1][0]
    model.get_submodule(last).register_forward_pre_hook(lambda _, args: into_last.append(args[0]))
    run_all(model)
    assert len(into_last) == CALLS
    streamed = [x for block, x in one.calls if block == last][:CALLS]
    assert all(torch.equal(a, b) for a, b in zip(streamed, into_last, strict=True))
    model = AutoModelForCausalLM.from_pretrained(one.out, dtype="auto").eval()
    for streamed_logit, batch in zip(streamed_logits(one.out), text_batches(), strict=True):
        assert torch.equal(streamed_logit, logits(model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_is_pruned_alike(kind: str, run: Runs) -> None:
    """In 2:4, since gate and up may be one matrix in memory and two on disk, each of which has half of its weights."""
    streamed = run(kind, sparsity="2:4")
    model = AutoModelForCausalLM.from_pretrained(streamed.source, dtype="auto")
    implementation = model.get_experts_implementation()
    report = prune_model(model, TOKENS, PruneConfig(sparsity="2:4", batch_size=SIZE))
    expected = AutoModelForCausalLM.from_pretrained(streamed.out, dtype="auto").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert report.zeros == streamed.report.zeros
    assert model.get_experts_implementation() == implementation


def weight_of_expert_1(kind: str, experts: torch.nn.Module, role: str) -> Tensor:
    if kind == "dbrx":
        return (experts.mlp.w1 if role == UP else experts.mlp.w2)[HIDDEN : 2 * HIDDEN]
    return (experts.gate_up_proj if role == UP else experts.down_proj)[1]


def output_of_expert_1(kind: str, experts: torch.nn.Module, x: Tensor) -> Tensor:
    """What the experts give where all tokens x [n, hidden] go to expert 1 alone: [n, hidden]."""
    if kind == "llama4_text":
        zero = torch.zeros_like(x)
        return experts(torch.cat([zero, x, zero, zero]))[len(x) : 2 * len(x)]
    to, weight = torch.ones(len(x), 1, dtype=torch.long), torch.ones(len(x), 1)
    return experts(x[None] if kind == "dbrx" else x, to, weight).reshape(-1, HIDDEN)


def inputs_are_last(kind: str, experts: torch.nn.Module, role: str) -> bool:
    """Ask for gradients: a weight of an input that is zero has none, nor has one of another output than is asked for.

    So all but one input have one, or but one output, and where they lie is the axis.
    """
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    if role == UP:
        x[:, 0] = 0
    output = output_of_expert_1(kind, experts.requires_grad_(True), x)
    (output if role == UP else output[:, 0]).square().sum().backward()
    for parameter in experts.parameters():
        parameter.data = parameter.grad
    used = weight_of_expert_1(kind, experts.requires_grad_(False), role) != 0
    rows, columns = int(used.any(1).sum()), int(used.any(0).sum())
    few, many = (HIDDEN - 1, HIDDEN) if role == UP else (1, HIDDEN)
    assert sorted((rows, columns)) == [few, many]
    return (columns == few) if role == UP else (rows == few)


SQUARE = [
    ("gpt_oss", {"intermediate_size": 64}, [DOWN]),
    ("gpt_oss", {"intermediate_size": 32}, [UP]),
    ("llama4_text", {"intermediate_size": 64}, [DOWN]),
    ("llama4_text", {"intermediate_size": 32}, [UP]),
    ("qwen3_moe", {"moe_intermediate_size": 64}, [DOWN]),
    ("dbrx", {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}, [UP, DOWN]),
]


@pytest.mark.parametrize(("kind", "sizes", "roles"), SQUARE)
def test_the_inputs_of_a_square_expert(
    kind: str, sizes: dict[str, Any], roles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shape does not tell where they lie."""
    sizes = architectures.OVERRIDES.get(kind, {}) | KINDS[kind].sizes | sizes
    monkeypatch.setitem(architectures.OVERRIDES, kind, sizes)
    one = Run(architectures.save(kind, tmp_path / "model"), tmp_path / "out")
    one.prune(sparsity="2:4", only=r"experts\.")
    pruned = whole(one.out)
    place = next(name for name, _ in pruned.named_modules() if name.endswith(".experts"))
    for role in roles:
        dense, new = (weight_of_expert_1(kind, m.get_submodule(place), role) for m in (whole(one.source), pruned))
        assert new.shape == (HIDDEN, HIDDEN)
        if not inputs_are_last(kind, whole(one.source).get_submodule(place), role):
            dense, new = dense.T, new.T
        assert halves_of_fours(new)
        assert not halves_of_fours(new.T)
        (H,) = (H for W, H, _ in one.problems if torch.equal(W, dense))
        assert torch.equal(new, prune_layer(dense, H, "2:4").W)


# ---- what an expert sees ---------------------------------------------------------------------------------------------


def intermediate(kind: str, experts: torch.nn.Module, e: int, X: Tensor) -> Tensor:
    """What expert e makes of tokens X [n, hidden] before its last product."""
    if kind == "gpt_oss":
        return experts._apply_gate(X @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e])
    if kind == "dbrx":
        tile = slice(32 * e, 32 * e + 32)
        return silu(X @ experts.mlp.w1[tile].T) * (X @ experts.mlp.v1[tile].T)
    if kind in ("llama4_text", "jetmoe"):
        gate_up = X @ experts.gate_up_proj[e] if kind == "llama4_text" else linear(X, experts.input_linear.weight[e])
        gate, up = gate_up.chunk(2, -1)
        return silu(gate) * up
    return experts._apply_gate(linear(X, experts.gate_up_proj[e]))


def routing_of(kind: str, model: PreTrainedModel, layer: int) -> tuple[torch.nn.Module, list[Any]]:
    """The experts of a layer, and tokens, experts and weights of its routing at each forward."""
    routing: list[Any] = []
    modules = {n: m for n, m in model.named_modules() if (found := re.search(LAYER, n)) and int(found[1]) == layer}
    experts = next(m for n, m in modules.items() if n.endswith(".mlp" if kind == "jetmoe" else ".experts"))
    if kind in ("llama4_text", "jetmoe"):  # the experts are not told the choice: it is made of the router's logits

        def note(module: torch.nn.Module, args: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
            values, index = output[-1].topk(module.top_k)
            routing.append((args[0], index, values))

        router = ".feed_forward.router" if kind == "llama4_text" else ".mlp.router"
        next(m for n, m in modules.items() if n.endswith(router)).register_forward_hook(note)
    else:
        experts.register_forward_pre_hook(
            lambda _, args, kwargs: routing.append([*args, *kwargs.values()]), with_kwargs=True
        )
    run_all(model)
    return experts, routing


@torch.no_grad()
def inputs_of_experts(kind: str, source: Path, before: Path, layer: int) -> dict[tuple[str, int], list[Tensor]]:
    """What each matrix of a layer's experts is given by transformers, by role and expert, one tensor a batch.

    This layer is dense, those before it are from another checkpoint.
    """
    model, other = whole(source), whole(before).state_dict()
    for name, tensor in model.state_dict().items():
        if (number := re.search(LAYER, name)) and int(number[1]) < layer:
            tensor.copy_(other[name])
    experts, routing = routing_of(kind, model, layer)
    inputs: dict[tuple[str, int], list[Tensor]] = {}
    for hidden, index, weights in routing:
        for e in range(KINDS[kind].experts):
            place, token = (e == index.T).nonzero(as_tuple=True)
            X = hidden.reshape(-1, HIDDEN)[token]
            if kind == "llama4_text":  # weighs what goes into an expert, not what comes out
                X = X * weights[token, place, None].sigmoid()
            inputs.setdefault((UP, e), []).append(X)
            inputs.setdefault((DOWN, e), []).append(intermediate(kind, experts, e, X))
    return inputs


@pytest.mark.parametrize("kind", KINDS)
def test_the_hessian_of_an_expert_is_that_of_its_tokens(kind: str, run: Runs) -> None:
    """And it is the one that the matrix of this name on disk was solved with."""
    one = run(kind, token_floor=0.0)
    found = one.solved(kind)
    layers = sorted({layer for _, (layer, _, _), _ in found})
    for layer in {layers[0], layers[-1]}:
        inputs = inputs_of_experts(kind, one.source, one.out, layer)
        for row, (_, role, expert), (W, H, method) in [each for each in found if each[1][0] == layer]:
            assert row.tokens == sum(map(len, inputs[role, expert])) > 0
            assert row.note is None
            assert_mean_of_squares(H, inputs[role, expert])
            assert torch.equal(outward(one.dense(row.name), role), W)
            assert method == "sparsegpt"
            assert torch.equal(outward(one.pruned(row.name), role), prune_layer(W, H, "0.5").W)


# ---- Hessians that do not fit together -------------------------------------------------------------------------------


def test_a_pass_for_each_hessian(run: Runs) -> None:
    """One pass over a block for all, or one for each, which gives the same; a last one is for the next block."""
    large, small = (run("mixtral", token_floor=0.0, **gib) for gib in ({}, {"hessian_gib": 1e-12}))
    for one, passes in ((large, 1), (small, 2 + 2 * 4)):  # q with k and v, o, and two for each expert
        counts = [len([b for b, _ in one.calls if b == f"model.layers.{i}"]) for i in range(2)]
        assert counts == [CALLS * (passes + 1)] * 2
    assert large.after.keys() == small.after.keys()
    assert all(same_bytes(tensor, small.after[name]) for name, tensor in large.after.items())


@pytest.mark.parametrize("kind", ["dbrx", "llama4_text"])
def test_bounded_memory_for_hessians_gives_the_same_bytes(kind: str, run: Runs) -> None:
    """Where some experts have too few tokens, too: enough memory, that of five Hessians, and of none."""
    some = 5 * 4 * HIDDEN**2 / 2**30
    runs = [run(kind, token_floor=1.5, **gib) for gib in ({}, {"hessian_gib": some}, {"hessian_gib": 1e-12})]
    files = [(one.out / "model.safetensors").read_bytes() for one in runs]
    assert files[0] == files[1] == files[2]
    rows = [[(m.name, m.zeros, m.error, m.tokens, m.damping, m.note) for m in one.report.matrices] for one in runs]
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[2])
    assert len(runs[0].calls) < len(runs[1].calls) < len(runs[2].calls)
    words = "pruned by magnitude" if kind == "llama4_text" else "used the Hessian of all"
    assert 0 < sum(words in (note or "") for *_, note in rows[0]) < len(runs[0].solved(kind))


# ---- few tokens ------------------------------------------------------------------------------------------------------


def of_expert_3(kind: str, one: Run) -> list[tuple[MatrixReport, tuple[int, str, int], tuple[Tensor, Tensor, str]]]:
    found = [each for each in one.solved(kind) if each[1][2] == 3]
    assert len(found) == KINDS[kind].layers * (KINDS[kind].ups + 1)
    return found


@pytest.mark.parametrize(
    ("kind", "options"), [("mixtral", {}), ("mixtral", {"token_floor": 0.0}), ("gpt_oss", {}), ("dbrx", {})]
)
def test_an_expert_without_tokens_has_the_hessian_of_all(kind: str, options: dict[str, float], run: Runs) -> None:
    """With a floor of 0 too: it is pruned as the others are, never zeroed for having seen nothing."""
    one = run(kind, starved=True, **options)
    with torch.no_grad():
        experts, routing = routing_of(kind, whole(one.source), 0)
        X = torch.cat([hidden.reshape(-1, HIDDEN) for hidden, *_ in routing])
        inputs = {UP: [X], DOWN: [intermediate(kind, experts, 3, X)]}
    found = of_expert_3(kind, one)
    one.check_half([row for row, _, _ in found])
    for row, (layer, role, _), (W, H, method) in found:
        assert row.tokens == 0
        assert row.note == f"0 tokens for {row.shape[1]} inputs: used the Hessian of all {N}"
        assert row.error > 0
        assert method == "sparsegpt"
        if layer == 0:
            assert_mean_of_squares(H, inputs[role])
        assert torch.equal(outward(one.dense(row.name), role), W)
        assert torch.equal(outward(one.pruned(row.name), role), prune_layer(W, H, "0.5").W)


def test_experts_with_few_tokens_have_the_hessian_of_all(run: Runs) -> None:
    """Here all four of a model that sends a token to two; what came to each by itself is reported."""
    plenty = {row.name: row.tokens for row in run("mixtral", token_floor=0.0).report.matrices}
    few = run("mixtral", token_floor=100.0, blocks="0")
    assert len(few.report.matrices) == 16
    for row in few.report.matrices:
        assert row.tokens == plenty[row.name] > 0
        note = f"{row.tokens} tokens for {row.shape[1]} inputs"
        assert row.note == (f"{note}: used the Hessian of all {N}" if "experts" in row.name else note)
    few.check_half(few.report.matrices)


def by_magnitude(W: Tensor) -> Tensor:
    return torch.where(W.abs() <= W.abs().flatten().kthvalue(half(W)).values, 0.0, W)


@pytest.mark.parametrize(
    ("kind", "options"), [("mixtral", {"few_tokens": "magnitude"}), ("llama4_text", {}), ("jetmoe", {})]
)
def test_experts_with_few_tokens_by_magnitude(kind: str, options: dict[str, str], run: Runs) -> None:
    """Where it is asked for, and where the experts are not given a routing that could be changed."""
    one = run(kind, starved=True, **options)
    for row, _, _ in of_expert_3(kind, one):
        assert row.tokens == 0
        assert row.note == f"0 tokens for {row.shape[1]} inputs: pruned by magnitude"
        assert row.error is row.relative_error is row.damping is None
        assert torch.equal(one.pruned(row.name), by_magnitude(one.dense(row.name)))
    for row in one.report.matrices:
        assert (row.error is None) == ("pruned by magnitude" in (row.note or ""))
    one.check_rest()


def test_the_command_line_says_what_had_few_tokens(
    source: Source, command: Command, capsys: pytest.CaptureFixture
) -> None:
    options = ["--few-tokens", "magnitude", "--token-floor", "0.05", "--only", r"experts\.3\.", "--hessian-gib", "1e-9"]
    code, out = command(source("mixtral", starved=True), *options)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "Few tokens for 9 matrices, model.layers.0.block_sparse_moe.experts.3.w1.weight first" in printed.out
    report = json.loads((out / "sparsity.json").read_text())
    assert [row["error"] for row in report["matrices"]] == [None] * 9


@pytest.mark.parametrize("few_tokens", ["all", "magnitude"])
def test_layers_that_are_no_experts_keep_their_own_hessian(few_tokens: str, source: Source, tmp_path: Path) -> None:
    """What came to them is all that there is."""
    one = Run(source("mixtral"), tmp_path / "out")
    one.prune(TOKENS[:1, :10], only=r"layers\.0\.self_attn", few_tokens=few_tokens)
    inputs: list[Tensor] = []
    model = whole(one.source)
    for name in ("q_proj", "o_proj"):
        layer = model.model.layers[0].self_attn.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(TOKENS[:1, :10])
    names = [row.name.split(".")[-2] for row in one.report.matrices]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj"]
    for row, (_, H, method), x in zip(one.report.matrices, one.problems, inputs[:1] * 3 + inputs[1:], strict=True):
        assert row.tokens == 10
        assert row.note == "10 tokens for 64 inputs"
        assert row.error > 0
        assert method == "sparsegpt"
        assert_mean_of_squares(H, [x])


# ---- choices ---------------------------------------------------------------------------------------------------------

CHOICES = [
    ("mixtral", r"experts\.1\."),
    ("gpt_oss", r"experts\.down_proj\[3\]"),
    ("gpt_oss", r"q_proj|experts\.\w+\[3\]"),
    ("dbrx", r"mlp\.w1\[32:64\]"),
    ("granitemoe", r"input_linear\.weight$"),
    ("inkling2_text", r"w13_weight\[1, "),
]


@pytest.mark.parametrize(("kind", "pattern"), CHOICES)
@pytest.mark.parametrize("option", ["only", "skip"])
def test_only_and_skip_choose_by_the_names_of_the_report(option: str, kind: str, pattern: str, run: Runs) -> None:
    full, one = run(kind, token_floor=0.0), run(kind, token_floor=0.0, **{option: pattern})
    names = [row.name for row in full.report.matrices]
    matching = [name for name in names if any(re.search(pattern, n) for n in (name, located(name)[0]))]
    chosen = matching if option == "only" else [name for name in names if name not in matching]
    assert 0 < len(chosen) < len(names)
    assert sorted(row.name for row in one.report.matrices) == sorted(chosen)
    one.check_half(one.report.matrices)
    one.check_rest()
    first = [row for row in one.report.matrices if row.block.endswith(".0")]
    assert first
    assert all(torch.equal(one.pruned(row.name), full.pruned(row.name)) for row in first)  # same inputs, same result
    reasons = {why for name, why in one.report.dense.items() if name not in full.report.dense}
    assert reasons == {"not asked for by --only" if option == "only" else "left out by --skip"}


def test_only_in_memory(source: Source) -> None:
    """There, what experts are called is what the parameters are called."""
    model = AutoModelForCausalLM.from_pretrained(source("mixtral"))
    report = prune_model(model, TOKENS, PruneConfig(only=r"experts\.\w+\[1\]", blocks="0-1"))
    weights = ("gate_up_proj", "down_proj")
    assert [row.name for row in report.matrices] == [
        f"model.layers.{i}.mlp.experts.{weight}[1]" for i in range(2) for weight in weights
    ]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            pruned = re.search(r"layers\.[01]\.", name) is not None
            assert [int((tile == 0).sum()) for tile in parameter] == [0, half(parameter[1]) * pruned, 0, 0]


@pytest.mark.parametrize(("blocks", "chosen"), [("0-0", [0]), ("1", [1]), (" 1-2,1", [1, 2])])
def test_blocks(blocks: str, chosen: list[int], run: Runs) -> None:
    """The others are as they were, and none that comes after the last one is loaded."""
    one, places = run("mixtral", blocks=blocks), [f"model.layers.{i}" for i in range(3)]
    assert list(dict.fromkeys(row.block for row in one.report.matrices)) == [places[i] for i in chosen]
    assert len(one.report.matrices) == 16 * len(chosen)
    assert one.loads == places[: max(chosen) + 1]
    assert {block for block, _ in one.calls} == set(one.loads)
    for i, place in enumerate(places):
        for name in [name for name in one.before if name.startswith(f"{place}.")]:
            matrix = one.before[name].ndim > 1
            assert same_bytes(one.before[name], one.after[name]) == (i not in chosen or not matrix or "gate" in name)
            assert i in chosen or not matrix or one.report.dense[name] == "left out by --blocks"
    one.check_rest()


def test_a_chosen_block_sees_those_before_it_as_they_are(run: Runs) -> None:
    """Blocks 1 and 2 of three: block 2 sees block 0 dense and block 1 pruned."""
    one = run("mixtral", blocks=" 1-2,1")
    inputs = inputs_of_experts("mixtral", one.source, one.out, 2)
    found = [(row, place, H) for row, place, (_, H, _) in one.solved("mixtral") if place[0] == 2 and not row.note]
    assert found
    for row, (_, role, expert), H in found:
        assert row.tokens == sum(map(len, inputs[role, expert]))
        assert_mean_of_squares(H, inputs[role, expert])


def test_choices_are_typed(source: Source, command: Command) -> None:
    code, out = command(source("mixtral"), "--only", r"experts\.1\.", "--skip", "w2", "--blocks", "0,2-2", "-q")
    assert code == 0
    report = json.loads((out / "sparsity.json").read_text())
    places = [f"model.layers.{i}.block_sparse_moe.experts.1" for i in (0, 2)]
    assert [row["name"] for row in report["matrices"]] == [f"{p}.w{n}.weight" for p in places for n in (1, 3)]
    assert report["dense"]["model.layers.0.block_sparse_moe.experts.1.w2.weight"] == "left out by --skip"
    assert report["dense"]["model.layers.2.block_sparse_moe.experts.0.w1.weight"] == "not asked for by --only"
    assert report["dense"]["model.layers.1.self_attn.q_proj.weight"] == "left out by --blocks"
    check_all_named(on_disk(out), report)


REFUSED = {
    "--blocks 3": "--blocks 3: the model has 3 blocks",
    "--blocks 0-99": "--blocks 0-99: the model has 3 blocks",
    "--blocks 3-1": "--blocks 3-1: no numbers of blocks",
    "--blocks one": "--blocks one: no numbers of blocks",
    "--blocks 1-": "--blocks 1-: no numbers of blocks",
    "--blocks=-1": "--blocks -1: no numbers of blocks",
    "--blocks 0,,1": "--blocks 0,,1: no numbers of blocks",
    "--blocks 0x1": "--blocks 0x1: no numbers of blocks",
    "--only eksperts": "--only eksperts: matches no weight that could be pruned",
    "--only block_sparse_moe.gate": "--only block_sparse_moe.gate: matches no weight that could be pruned",
    "--only w1 --skip experts": "--skip experts --only w1: leave nothing to prune",
    "--few-tokens none": "--few-tokens none: unknown; choose from all, magnitude",
    "--token-floor=-1": "--token-floor -1: must be at least 0",
    "--token-floor nan": "--token-floor nan: must be at least 0",
    "--hessian-gib 0": "--hessian-gib 0: must be above 0",
    "--hessian-gib nan": "--hessian-gib nan: must be above 0",
}


@pytest.mark.parametrize("options", REFUSED)
def test_choices_that_cannot_be_met_are_refused(
    options: str, source: Source, command: Command, capsys: pytest.CaptureFixture
) -> None:
    code, out = command(source("mixtral"), *options.split())
    assert code == 1
    line = capsys.readouterr().err
    assert REFUSED[options] in line
    assert line.count("\n") == 1
    assert not out.exists()


def test_a_choice_that_the_chosen_blocks_do_not_have_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ModelError), match="--only"):
        Run(source("mixtral"), tmp_path / "out").prune(only=r"layers\.0\.", blocks="1")


# ---- blocks that share weights, and blocks that are called again -----------------------------------------------------


def test_weights_that_blocks_share_are_pruned_once(run: Runs) -> None:
    """Layer 5 of this model has the weights of layer 1 and an adapter of its own; it runs with the former pruned."""
    one = run("zamba2")
    blocks = {row.name: row.block for row in one.report.matrices}
    assert len(blocks) == len(one.report.matrices)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert blocks[f"model.layers.1.shared_transformer.self_attn.{name}.weight"] == "model.layers.1"
    assert {b for n, b in blocks.items() if "layers.1" in n and "adapter_list.2" in n} == {"model.layers.5"}
    one.check_half(one.report.matrices)
    one.check_rest()
    model, inputs = whole(one.out), []
    for name, parameter in model.named_parameters():
        if blocks.get(name) == "model.layers.5":
            parameter.data = one.before[name]
    layer = "model.layers.5.linear"  # is given what the shared weights make
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    run_all(model)
    ((_, H, _),) = (p for r, p in zip(one.report.matrices, one.problems, strict=True) if r.name == f"{layer}.weight")
    assert_mean_of_squares(H, inputs)


def test_weights_that_blocks_share_are_pruned_once_in_memory(run: Runs) -> None:
    streamed = run("zamba2")
    model = AutoModelForCausalLM.from_pretrained(streamed.source)
    report = prune_model(model, TOKENS, PruneConfig(batch_size=SIZE))
    for one in (report, streamed.report):
        assert [(r.name, r.block) for r in one.matrices] == [(r.name, r.block) for r in report.matrices]
    expected = AutoModelForCausalLM.from_pretrained(streamed.out).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_blocks_that_are_called_again_are_pruned_at_the_first_call(run: Runs) -> None:
    """The L blocks of this model are called three times before the first H block, and all of them again."""
    one = run("hrm_text")
    blocks = [f"model.{part}_module.layers.{i}" for part in "LH" for i in range(4)]
    assert list(dict.fromkeys(row.block for row in one.report.matrices)) == blocks
    assert len({row.name for row in one.report.matrices}) == len(one.report.matrices) == 8 * len(blocks)
    assert {row.tokens for row in one.report.matrices} == {N}
    one.check_half(one.report.matrices)
    one.check_rest()
    model, pruned = whole(one.source), whole(one.out).state_dict()
    for name, tensor in model.state_dict().items():
        if "L_module" in name:
            tensor.copy_(pruned[name])
    inputs: list[Tensor] = []
    first = model.model.H_module.layers[0].self_attn.q_proj
    first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    run_all(model)
    pairs = zip(one.report.matrices, one.problems, strict=True)
    seen = [H for row, (_, H, _) in pairs if "H_module.layers.0.attn.gqkv" in row.name]
    assert len(seen) == 4
    for H in seen:
        assert_mean_of_squares(H, inputs[:: len(inputs) // CALLS])  # of each forward the first


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hrm_text", {"blocks": "3"}),
        ("hrm_text", {"skip": r"q_proj"}),
        ("hrm_text", {"only": r"down_proj"}),
        ("zamba2", {"blocks": "3"}),
        ("zamba2", {"skip": r"q_proj"}),
    ],
)
def test_choices_where_tensors_and_parameters_differ(kind: str, options: dict[str, str], run: Runs) -> None:
    """Of these models one has parameters that are parts of tensors, the other has some in several places."""
    one = run(kind, **options)
    one.check_half(one.report.matrices)
    one.check_rest()


def test_a_run_ends_with_the_last_chosen_block(run: Runs) -> None:
    """Though the model would call it, and those before it, again."""
    one = run("hrm_text", blocks="3")
    assert one.loads == [f"model.L_module.layers.{i}" for i in range(4)]


# ---- numbers that are not there, or not finite -----------------------------------------------------------------------


def edited(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_an_expert_that_is_not_finite_is_named(source: Source, tmp_path: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = float("nan")

    folder = edited(source("qwen3_moe"), tmp_path / "model", spoil)
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.experts\.\S+: the weights hold NaN or infinity"):
        Run(folder, tmp_path / "out").prune()


def test_an_expert_whose_activations_are_not_finite_is_named(source: Source, tmp_path: Path) -> None:
    def blow_up(weights: dict[str, Tensor]) -> None:
        for part in ("gate", "up"):
            weights[f"model.layers.1.mlp.experts.2.{part}_proj.weight"].mul_(1e30)

    folder = edited(source("qwen3_moe"), tmp_path / "model", blow_up)
    with pytest.raises(
        CalibrationError, match=r"^model\.layers\.1\.mlp\.experts\.\S*down_proj\S*: its inputs hold NaN"
    ):
        Run(folder, tmp_path / "out").prune()


def test_inputs_of_experts_that_are_always_zero(source: Source, tmp_path: Path) -> None:
    """Their weights are the first to go, in every expert, and the number of zeros stays exact."""

    def close(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.post_attention_layernorm.weight"][5] = 0.0

    one = Run(edited(source("mixtral"), tmp_path / "model", close), tmp_path / "out").prune(blocks="0")
    ups = [row for row, (_, role, _), _ in one.solved("mixtral") if role == UP]
    assert len(ups) == 8
    for row in ups:
        assert one.dense(row.name)[:, 5].ne(0).all()
        assert one.pruned(row.name)[:, 5].eq(0).all()
    one.check_half(one.report.matrices)


def test_fewer_tokens_than_inputs_without_damping(source: Source, tmp_path: Path) -> None:
    """H is singular: the damping that was used is reported, and said in the summary."""
    one = Run(source("mixtral"), tmp_path / "out")
    one.prune(TOKENS[:1, :12], damping=0.0, token_floor=0.0, blocks="0")
    assert len(one.report.matrices) == 16
    for row in one.report.matrices:
        assert row.tokens <= 12
        assert row.damping in (0.1, 1.0)
    one.check_half(one.report.matrices)
    assert "Damping raised for 16 matrices, model.layers.0.self_attn.q_proj.weight first (0.1)." in one.report.table()
