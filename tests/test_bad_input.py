"""Whatever is wrong with the input: one line that says where, what and what to do, exit code 1, and nothing written."""

import errno
import json
import logging
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsegpt_lite import methods
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.cli import COMMANDS, main
from sparsegpt_lite.config import EvalConfig, PruneConfig
from sparsegpt_lite.eval import perplexity
from sparsegpt_lite.writer import Writer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARDED = {"max_shard_size": "40KB"}
UP = "model.layers.1.mlp.up_proj.weight"
# An instruction behind a mark of punctuation, "...; choose another --out", or a rule that a value breaks.
REMEDY = re.compile(
    r"(?:[;:,(.] |\bor |\band )(?:add|allow|ask|check|choose|convert|copy|correct|delete|download|drop|escape|fetch|"
    r"free|give|install|keep|leave|look|lower|make|move|name|prune|put|raise|remove|repair|replace|run|save|set|take|"
    r"try|update|upgrade|use|write)\b|\bmust be\b"
)


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show the libraries' loggers, which keep the stderr of their import, the stderr that is captured."""
    stderr = SimpleNamespace(write=lambda text: sys.stderr.write(text), flush=lambda: None)
    for library in (datasets.__name__, "transformers", "huggingface_hub"):
        for handler in logging.getLogger(library).handlers:
            if type(handler) is logging.StreamHandler:  # pytest has kinds of its own there
                monkeypatch.setattr(handler, "stream", stderr)
                monkeypatch.setattr(handler, "flush", stderr.flush)


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A good model that a test may damage."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def options(text_file: Path, out: Path) -> list[str]:
    """Options of `prune` that would do well, into `out`."""
    return ["--text", str(text_file), "--nsamples", "4", "--seqlen", "32", "--out", str(out), "-q"]


@pytest.fixture
def eval_options(text_file: Path) -> list[str]:
    return ["--dataset", str(text_file), "-q"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """Run a command line that must fail in one line of stderr, which holds `words` and says what can be done."""

    def run(*argv: object, words: tuple[str, ...]) -> None:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 1
        stdout, line = capsys.readouterr()
        assert stdout == ""
        assert re.fullmatch(r"sparsegpt-lite: [^\r\n]+\n", line), line
        assert line[:-1].isprintable()
        assert len(line.replace(str(tmp_path), "")) < 700
        lacks = [word for word in words if word not in line]
        if not REMEDY.search(line.replace(str(tmp_path), "")):
            lacks.append("(what to do)")
        assert not lacks, f"{lacks} not in {line!r}"
        assert set(re.findall(r"(?<![\w/-])--[a-z][a-z-]*", line)) <= flags(str(argv[0])), line

    return run


def flags(command: str) -> set[str]:
    """What can be typed after a command, or after a model."""
    config = {"eval": fields(EvalConfig), "inspect": ()}.get(command, fields(PruneConfig))
    names = [f.name for f in (*fields(COMMANDS.get(command, COMMANDS["prune"])), *config)]
    return {f"--{name.replace('_', '-')}" for name in names}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- models ----------------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_index(folder: Path, shard: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][UP] = shard
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def overwrite(path: Path, start: int, data: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:start] + data + old[start + len(data) :])


def header(body: bytes) -> Callable[[Path], object]:
    """A file of this header and nothing else."""
    return lambda m: (m / SINGLE).write_bytes(struct.pack("<Q", len(body)) + body)


def entry(**fields: object) -> Callable[[Path], object]:
    """Change what the header says of one tensor."""

    def edit(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries: dict[str, Any] = json.loads(raw[8 : 8 + length])
        entries[UP] |= fields
        body = json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(body)) + body + raw[8 + length :])

    return edit


def poison(name: str, index: object, value: float = float("nan")) -> Callable[[Path], object]:
    return lambda m: edit_tensors(m / SINGLE, lambda tensors: tensors[name].__setitem__(index, value))


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def elsewhere(path: Path) -> Path:
    """Move a file out of the model, and leave a link to it."""
    place = path.parent.parent / "elsewhere"
    path.rename(place)
    path.symlink_to(place)
    return place


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def smaller_vocabulary(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda t: t.update({k: v[:70].clone() for k, v in t.items() if len(v) == 257}))
    edit_config(folder, vocab_size=70, bos_token_id=1, eos_token_id=1)


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


def empty_tensor(*shape: int) -> Callable[[Path], object]:
    """Add a tensor without data to the header."""

    def add(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        place = [len(raw) - 8 - length] * 2
        entries = json.loads(raw[8 : 8 + length]) | {"x": {"dtype": "F32", "shape": shape, "data_offsets": place}}
        body = json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(body)) + body + raw[8 + length :])

    return add


def tokenizer_field(**fields: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def tensor_twice(folder: Path) -> None:
    name, tensor = next(iter(load_file(shard(folder, 1)).items()))
    edit_tensors(shard(folder, 2), lambda tensors: tensors.update({name: tensor}))


@dataclass(frozen=True)
class Damage:
    """What is done to a good model, and words of the message."""

    apply: Callable[[Path], object]
    words: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)  # of the good model


FILE = f"/model/{SINGLE}"
DAMAGES = {
    "no weights": Damage(lambda m: (m / SINGLE).unlink(), ("/model", SINGLE, "found none")),
    "pickle only": Damage(
        lambda m: (m / SINGLE).rename(m / "pytorch_model.bin"),
        ("/model", "pytorch_model.bin", "convert", "save_pretrained"),
    ),
    "no config": Damage(lambda m: (m / "config.json").unlink(), ("/model", "no config.json")),
    "no folder": Damage(shutil.rmtree, ("/model", "no such folder")),
    "config no JSON": Damage(lambda m: (m / "config.json").write_text("{"), ("config.json", "not valid JSON")),
    "config of brackets": Damage(
        lambda m: (m / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        ("config.json", "not valid JSON"),
    ),
    "config a list": Damage(lambda m: (m / "config.json").write_text("[]"), ("config.json", "list")),
    "quantized": Damage(
        lambda m: edit_config(m, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("config.json", "quantized", "gptq", "unquantized"),
    ),
    "quantized by a method of many words": Damage(
        lambda m: edit_config(m, quantization_config={"quant_method": ["gptq\n"] * 500}),
        ("config.json", "quantized", "unquantized"),
    ),
    "quantized, as its bytes say": Damage(
        lambda m: edit_tensors(m / SINGLE, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        ("/model", UP, "F8_E4M3", "dense"),
    ),
    "one weight of integers": Damage(
        lambda m: edit_tensors(m / SINGLE, lambda t: t.update({UP: t[UP].to(torch.int32)})),
        ("/model", UP, "I32", "dense"),
    ),
    "adapter": Damage(adapter, ("/model", "an adapter", "merge it", "base model")),
    "own code": Damage(
        lambda m: edit_config(m, auto_map={"AutoModelForCausalLM": "modeling.Model"}),
        ("/model", "own model code", "--trust-remote-code"),
    ),
    "unknown model type": Damage(lambda m: edit_config(m, model_type="frob"), ("/model", "frob", "transformers")),
    "no model type": Damage(
        lambda m: (m / "config.json").write_text((m / "config.json").read_text().replace('"model_type"', '"kind"')),
        ("/model", "no model_type in config.json", "transformers"),
    ),
    "no language model": Damage(lambda m: edit_config(m, model_type="t5"), ("/model", "t5", "transformers")),
    "encoder and decoder": Damage(
        lambda m: edit_config(m, is_encoder_decoder=True), ("/model", "encoder", "give a decoder-only model")
    ),
    "encoder": Damage(
        lambda m: edit_config(m, architectures=["BertForMaskedLM"]), ("/model", "BertForMaskedLM", "decoder-only model")
    ),
    "more layers": Damage(
        lambda m: edit_config(m, num_hidden_layers=3), ("/model", "9 weights", "model.layers.2.", "config.json")
    ),
    "far more layers": Damage(  # test_fuzz.py has larger numbers, with limits
        lambda m: edit_config(m, num_hidden_layers=20_000), ("/model", "num_hidden_layers 20000", "21 tensors")
    ),
    "far larger heads": Damage(
        lambda m: edit_config(m, head_dim=2**27), ("/model", "k_proj.weight", "[16, 32] on disk", "config.json")
    ),
    "far larger vocabulary": Damage(
        lambda m: edit_config(m, vocab_size=10**12), ("/model", "[257, 32] on disk", "[1000000000000, 32]")
    ),
    "vocabulary without its special tokens": Damage(
        lambda m: edit_config(m, vocab_size=64), ("/model", "[257, 32] on disk", "config.json", "[64, 32]")
    ),
    "other hidden size": Damage(
        lambda m: edit_config(m, hidden_size=48), ("/model", "[257, 32] on disk", "config.json", "[257, 48]")
    ),
    "no layers": Damage(lambda m: edit_config(m, num_hidden_layers=0), ("/model", "layers")),
    "heads that do not divide": Damage(lambda m: edit_config(m, num_attention_heads=5), ("/model", "heads")),
    "size that is no number": Damage(lambda m: edit_config(m, hidden_size="big"), ("/model", "hidden_size")),
    "size that is negative": Damage(lambda m: edit_config(m, hidden_size=-32), ("/model", "-32")),
    "tensor missing": Damage(
        lambda m: edit_tensors(m / SINGLE, lambda tensors: tensors.pop(UP)), ("/model", "1 weight", UP)
    ),
    "integer weights": Damage(
        lambda m: edit_tensors(m / SINGLE, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
        ("/model", "no floating-point weights"),
    ),
    "no tokenizer": Damage(without_tokenizer, ("/model", "no tokenizer", "tokenizer.json")),
    "tokenizer no JSON": Damage(lambda m: (m / "tokenizer.json").write_text("{"), ("/model", "tokenizer")),
    "tokenizer that cannot be called": Damage(tokenizer_field(model_max_length="long"), ("/model", "tokenizer")),
    "tokenizer too large": Damage(smaller_vocabulary, ("text.txt", "token ", "vocabulary of 70", "tokenizer")),
    "truncated": Damage(lambda m: os.truncate(m / SINGLE, 60_000), (FILE, "60,000 bytes", "fetch it again")),
    "truncated in the header": Damage(lambda m: os.truncate(m / SINGLE, 100), (FILE, "header")),
    "truncated in the length": Damage(lambda m: os.truncate(m / SINGLE, 4), (FILE, "header")),
    "empty file": Damage(lambda m: os.truncate(m / SINGLE, 0), (FILE, "header")),
    "longer than its header": Damage(
        lambda m: (m / SINGLE).write_bytes((m / SINGLE).read_bytes() + b"more"), (FILE, "not fully covered")
    ),
    **{
        f"header length {length:#x}": Damage(
            lambda m, n=length: overwrite(m / SINGLE, 0, struct.pack("<Q", n)), (FILE, "header")
        )
        for length in (0, 10, 2**40, 2**64 - 1)
    },
    **{
        f"header {body[:12]!r}": Damage(header(body), (FILE, "header"))
        for body in (b"{nope", b"[]", b'"text"', b'{"a": 3}', b"\xff\xfe{}\xff", b'{"a": ' + b"[" * 100_000)
    },
    "dtype unknown": Damage(entry(dtype="Q4"), (FILE, "Q4")),
    "dtype no string": Damage(entry(dtype=["F32"]), (FILE,)),
    "shape of strings": Damage(entry(shape=["96", "32"]), (FILE,)),
    "shape of fractions": Damage(entry(shape=[96.0, 32.0]), (FILE,)),
    "shape negative": Damage(entry(shape=[-96, -32]), (FILE, "-96")),
    "shape beyond all bounds": Damage(empty_tensor(2**63, 0), (FILE, "9223372036854775808")),
    "shape too small": Damage(entry(shape=[96, 31]), (FILE, "invalid shape")),
    "offsets of strings": Damage(entry(data_offsets=["0", "1"]), (FILE,)),
    "offsets of fractions": Damage(entry(data_offsets=[0.0, 12288.0]), (FILE,)),
    "offsets that overlap": Damage(entry(data_offsets=[0, 12288]), (FILE,)),
    "offsets negative": Damage(entry(data_offsets=[-12288, 0]), (FILE,)),
    "shard missing": Damage(lambda m: shard(m, 2).unlink(), (INDEX, "model-00002-of-", "missing"), SHARDED),
    "shard truncated": Damage(lambda m: os.truncate(shard(m, 2), 1000), ("model-00002-of-", "1,000 bytes"), SHARDED),
    "tensor in two shards": Damage(
        tensor_twice, ("/model", "embed_tokens.weight", "model-00001-of-", "model-00002-of-"), SHARDED
    ),
    "index no JSON": Damage(lambda m: (m / INDEX).write_text("{"), (INDEX, "not valid JSON"), SHARDED),
    "index without a map": Damage(lambda m: (m / INDEX).write_text("{}"), (INDEX, "weight_map"), SHARDED),
    **{
        f"index names {name!r}": Damage(lambda m, s=name: edit_index(m, s), (INDEX, repr(name)), SHARDED)
        for name in ("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "config.json", "", 3, None, ["x"])
    },
    "index names a line": Damage(
        lambda m: edit_index(m, "a\nb.safetensors"), (INDEX, r"a\nb.safetensors", "missing"), SHARDED
    ),
    "index names a colour": Damage(
        lambda m: edit_index(m, "\x1b[31mred.safetensors"), (INDEX, r"\x1b[31mred.safetensors", "missing"), SHARDED
    ),
    "index names a shard of 9000 letters": Damage(
        lambda m: edit_index(m, "x" * 9000 + ".safetensors"), (INDEX, "xxx", "missing", "fetch"), SHARDED
    ),
    "index names a link out of the folder": Damage(
        lambda m: (
            (m / "x.safetensors").symlink_to(shutil.copyfile(shard(m, 2), m.parent / "elsewhere")),
            edit_index(m, "x.safetensors"),
        ),
        ("/model/x.safetensors", "link to a file outside of the folder", "copy"),
        SHARDED,
    ),
    "weights a link out of the folder": Damage(
        lambda m: elsewhere(m / SINGLE), (FILE, "link to a file outside of the folder", "copy")
    ),
    "weights a link to nothing": Damage(
        lambda m: elsewhere(m / SINGLE).unlink(), (FILE, "link to a file that is missing", "fetch")
    ),
    "weights a link to itself": Damage(
        lambda m: (elsewhere(m / SINGLE), (m / SINGLE).unlink(), (m / SINGLE).symlink_to(m / SINGLE)),
        (FILE, "link to a file that is missing", "fetch"),
    ),
    "shard a link out of the folder": Damage(
        lambda m: elsewhere(shard(m, 2)), ("/model/model-00002-of-", "link to a file outside of the folder"), SHARDED
    ),
    "shard a link to nothing": Damage(
        lambda m: elsewhere(shard(m, 2)).unlink(), (INDEX, "model-00002-of-", "missing"), SHARDED
    ),
    "index a link out of the folder": Damage(
        lambda m: elsewhere(m / INDEX), (f"/model/{INDEX}", "link to a file outside of the folder"), SHARDED
    ),
    "config a link out of the folder": Damage(
        lambda m: elsewhere(m / "config.json"), ("/model/config.json", "link to a file outside of the folder")
    ),
    "index names an absent shard": Damage(
        lambda m: edit_index(m, "model-9.safetensors"), (INDEX, "model-9.safetensors", "missing"), SHARDED
    ),
}
# Seen when their block is reached, not before.
NOT_FINITE = {
    "NaN in a weight": Damage(poison(UP, (0, 0)), (UP, "NaN")),
    "infinity in a weight": Damage(poison(UP, (3, 5), float("inf")), (UP, "infinity")),
    "NaN in the embedding of some letters": Damage(
        poison("model.embed_tokens.weight", slice(65, 75)), ("model.layers.0.self_attn.q_proj.weight", "NaN")
    ),
    "NaN in a norm": Damage(
        poison("model.layers.1.post_attention_layernorm.weight", 0),
        ("model.layers.1.post_attention_layernorm.weight", "NaN"),
    ),
}


@pytest.fixture
def damaged(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[Damage], Path]:
    """Damage a copy of a good model, `tmp_path / "model"`."""

    def make(damage: Damage) -> Path:
        folder = shutil.copytree(checkpoint("llama", **damage.options), tmp_path / "model")
        damage.apply(folder)
        return folder

    return make


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model(name, damaged, refused, options, out):
    folder = damaged(DAMAGES[name])
    before = contents(folder)
    refused(folder, *options, words=DAMAGES[name].words)
    assert not out.exists()
    assert contents(folder) == before


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_model_that_is_not_finite(name, method, damaged, refused, options, out):
    folder = damaged(NOT_FINITE[name])
    before = contents(folder)
    refused(folder, *options, "--method", method, words=NOT_FINITE[name].words)
    assert {path.name for path in out.rglob("*") if path.parent == out} <= {".work"}  # kept after the first block
    assert contents(folder) == before


@pytest.mark.parametrize("name", DAMAGES)
def test_eval_of_a_damaged_model(name, damaged, refused, eval_options):
    refused("eval", damaged(DAMAGES[name]), *eval_options, words=DAMAGES[name].words)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_eval_of_a_model_that_is_not_finite(name, damaged, refused, eval_options):
    refused("eval", damaged(NOT_FINITE[name]), *eval_options, "--windows", "4", words=("/model", "NaN or infinite"))


@pytest.mark.parametrize(
    "name",
    ["truncated", "shard missing", "offsets that overlap", "dtype unknown", "quantized", "shape beyond all bounds",
     "config of brackets", "index names a line", "index names a shard of 9000 letters", "adapter"],
)  # fmt: skip
def test_inspect_of_a_damaged_model(name, damaged, refused):
    refused("inspect", damaged(DAMAGES[name]), words=DAMAGES[name].words)


def test_damaged_bytes_in_a_header_never_end_in_a_traceback(model, capsys):
    path, rng, raised = model / SINGLE, random.Random(0), {}
    good = path.read_bytes()
    for _ in range(150):
        at, value = rng.randrange(8 + struct.unpack("<Q", good[:8])[0]), rng.randrange(256)
        path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
        try:
            assert main(["inspect", str(model)]) in (0, 1)
        except Exception as error:  # noqa: BLE001, they are collected
            raised[f"byte {at} = {value:#x}, {good[max(0, at - 12) : at + 12]!r}"] = repr(error)
        assert len(capsys.readouterr().err.splitlines()) <= 1
    assert not raised, "\n".join(f"{where}: {error}" for where, error in raised.items())


def test_names_that_move_the_cursor_are_shown_as_they_are_written(model, capsys):
    edit_tensors(model / SINGLE, lambda tensors: tensors.update({"\x1b[2J\nfoo.weight": torch.ones(2, 2)}))
    assert main(["inspect", str(model)]) == 0
    assert r"\x1b[2J\nfoo.weight  " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", '{"config": true}', '{"config": {"sparsity": [2, 4]}}', "[" * 100_000])
def test_inspect_beside_a_report_of_others(text, model, capsys):
    (model / "sparsity.json").write_text(text)
    assert main(["inspect", str(model)]) == 0
    assert capsys.readouterr().err == ""


def test_more_layers_on_disk_than_in_the_config(model, options, out, capsys):
    """As with the layers that some models bring for predicting several tokens: they are copied, and it is said."""
    edit_config(model, num_hidden_layers=1)
    before = contents(model)
    assert main([str(model), *options[:-1]]) == 0
    assert "9 not in the model that config.json describes" in capsys.readouterr().out
    old, new = load_file(model / SINGLE), load_file(out / SINGLE)
    changed = {name.split(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"0"}
    assert contents(model) == before


def test_shards_of_different_dtypes(checkpoint, options, out, tmp_path, capsys):
    """Each tensor keeps its own; the model is loaded in that of most weights."""
    model = shutil.copytree(checkpoint("llama", **SHARDED), tmp_path / "model")
    first, second, *_ = sorted(model.glob("model-*.safetensors"))[1:]
    edit_tensors(first, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    edit_tensors(second, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    before = contents(model)
    assert main([str(model), *options, "--sparsity", "2:4"]) == 0
    assert capsys.readouterr().err == ""
    dtypes, report = {}, json.loads((out / "sparsity.json").read_text())
    for path in sorted(model.glob("model-*.safetensors")):
        old, new = load_file(path), load_file(out / path.name)
        assert {name: (t.dtype, t.shape) for name, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
        dtypes |= {name: t.dtype for name, t in new.items()}
        for matrix in report["matrices"]:
            if matrix["name"] in new:
                zeros = new[matrix["name"]].unflatten(1, (-1, 4)) == 0
                assert (zeros.sum(2) == 2).all()
                assert matrix["zeros"] == zeros.sum()
    assert {dtypes[matrix["name"]] for matrix in report["matrices"]} == {torch.float32, torch.float16, torch.bfloat16}
    assert report["dtype"] == "float32"
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for tensor in json.loads(capsys.readouterr().out):
        assert tensor["dtype"] == names[dtypes[tensor["name"]]]
        assert (tensor["pattern"] == "2:4") == (tensor["name"] in {matrix["name"] for matrix in report["matrices"]})
    assert contents(model) == before


def test_index_beside_the_weights_in_one_file(model, options, out):
    """As transformers does, and a stale index does not come along."""
    (model / INDEX).write_text('{"weight_map": {"a": "nowhere.safetensors"}}')
    assert main([str(model), *options]) == 0
    assert {path.name for path in out.iterdir()} & {SINGLE, INDEX} == {SINGLE}


def test_work_folder_in_the_source_is_none_of_ours(model, options, out):
    (model / ".work").mkdir()
    (model / ".work" / "journal").write_text("of another")
    before = contents(model)
    assert main([str(model), *options]) == 0
    assert contents(model) == before
    assert not (out / ".work").exists()


@pytest.mark.parametrize(
    "name", ["nowhere", "org/nowhere", "my--model", "model.git", ".model", "m" * 97, "a/b/c", "~nobody/model"]
)
def test_model_that_is_not_there(name, refused, options, out):
    refused(name, *options, words=(name, "no such folder"))
    assert not out.exists()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be someone for whom permissions count."""
    users = os.getresuid()
    if users[1] == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(*users)


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that everyone can get into, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no users here as Linux has them")
@pytest.mark.parametrize("name", [".", "config.json", SINGLE])
@pytest.mark.parametrize("command", ["prune", "inspect"])
def test_model_that_may_not_be_read(command, name, checkpoint, refused, options, out, open_folder):
    folder = shutil.copytree(checkpoint("llama"), open_folder / "model")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path == folder else 0o644)
    (folder / name).chmod(0)
    with unprivileged():
        refused(
            command, folder, *(options if command == "prune" else ()), words=(str(folder / name), "ermission denied")
        )
    (folder / name).chmod(0o755)
    assert not out.exists()


@pytest.mark.parametrize("command", ["prune", "eval", "inspect"])
def test_model_of_too_long_a_name(command, refused):
    refused(command, "x" * 300, words=("too long",))


@pytest.mark.parametrize("family", ["opt", "gpt2"])
@pytest.mark.parametrize("command", ["prune", "eval"])
def test_more_tokens_than_learned_positions(family, command, checkpoint, refused, options, eval_options, out):
    arguments = options if command == "prune" else eval_options
    refused(command, checkpoint(family), *arguments, "--seqlen", "100", words=("--seqlen", "100", "64"))
    assert not out.exists()


# ---- patterns that do not fit ----------------------------------------------------------------------------------------

HIDDEN_30 = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3}
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("config", "pattern", "words"),
    [
        ({"intermediate_size": 94}, "2:4", (DOWN, "94 inputs", "multiple of 4", "2 of 14")),
        ({"intermediate_size": 92}, "4:8", (DOWN, "92 inputs", "multiple of 8", "2 of 14")),
        (HIDDEN_30, "2:4", ("model.layers.0.self_attn.q_proj.weight", "30 inputs", "multiple of 4", "12 of 14")),
    ],
)
def test_pattern_that_does_not_fit(config, pattern, words, checkpoint, refused, options, out):
    refused(checkpoint("llama", **config), *options, "--sparsity", pattern, words=(*words, pattern, "--skip"))
    assert not out.exists()


def test_pattern_fits_without_the_layer_that_does_not(checkpoint, options, capsys):
    folder = str(checkpoint("llama", intermediate_size=94))
    assert main([folder, *options, "--sparsity", "2:4", "--skip", "down_proj"]) == 0
    assert capsys.readouterr().err == ""


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS = {
    "--sparsity 3/4": ("'3/4'", "0.5", "2:4"),
    "--sparsity abc": ("'abc'", "0.5", "2:4"),
    "--sparsity 2:4:8": ("'2:4:8'", "0.5", "2:4"),
    "--sparsity -2:4": ("'-2:4'", "0.5", "2:4"),
    "--sparsity 1.0": ("sparsity 1 ", "[0, 1)"),
    "--sparsity 1.5": ("sparsity 1.5 ", "[0, 1)"),
    "--sparsity 100%": ("sparsity 1 ", "[0, 1)"),
    "--sparsity -0.1": ("sparsity -0.1 ", "[0, 1)"),
    "--sparsity=-0.1": ("sparsity -0.1 ", "[0, 1)"),
    "--sparsity nan": ("nan", "[0, 1)"),
    "--sparsity 4:4": ("4:4", "from 1 to M - 1"),
    "--sparsity 5:4": ("5:4", "from 1 to M - 1"),
    "--sparsity 0:4": ("0:4", "from 1 to M - 1"),
    "--sparsity 0:0": ("0:0", "from 1 to M - 1"),
    "--method frob": ("--method frob", "magnitude", "wanda", "sparsegpt"),
    "--dtype int4": ("--dtype int4", "float32", "bfloat16"),
    "--device frob": ("--device frob", "cpu", "cuda"),
    "--device meta": ("--device meta", "cpu", "cuda"),
    "--skip (": ("--skip (", "regular expression"),
    "--skip .*": ("leave nothing to prune", "--skip"),
    "--skip frob": ("--skip frob", "matches no weight"),
    "--only (": ("--only (", "regular expression"),
    "--only frob": ("--only frob", "matches no weight"),
    "--only embed": ("--only embed", "matches no weight"),
    "--only mlp --skip mlp|attn": ("--skip mlp|attn --only mlp", "leave nothing to prune"),
    "--blocks 3-1": ("--blocks 3-1", "0-11"),
    "--blocks a": ("--blocks a", "0-11"),
    "--blocks=": ("--blocks", "0-11"),
    "--blocks -1": ("--blocks -1", "0-11"),
    "--blocks 1,": ("--blocks 1,", "0-11"),
    "--blocks 0-99": ("--blocks 0-99", "2 blocks"),
    "--blocks 2": ("--blocks 2", "2 blocks"),
    "--few-tokens x": ("--few-tokens x", "all", "magnitude"),
    "--activations x": ("--activations x", "auto", "device", "host", "disk"),
    "--token-floor -1": ("--token-floor -1", "at least 0"),
    "--token-floor nan": ("--token-floor nan", "at least 0"),
    "--hessian-gib 0": ("--hessian-gib 0", "above 0"),
    "--hessian-gib -1": ("--hessian-gib -1", "above 0"),
    "--hessian-gib nan": ("--hessian-gib nan", "above 0"),
    f"--sparsity 1:{'9' * 5000}": ("1:999", "0.5", "2:4"),
    f"--seed {10**20}": (f"--seed {10**20}", "below 2**63"),
    f"--batch-size {10**20}": (f"--batch-size {10**20}", "below 2**63"),
    "--text=": ("--text", "is empty"),
    f"--text {'x' * 300}": ("too long",),
    f"--eval {'x' * 300}": ("too long",),
    f"--out {'x' * 300}": ("too long",),
    "--nsamples 0": ("--nsamples 0", "at least 1"),
    "--batch-size 0": ("--batch-size 0", "at least 1"),
    "--block-size 0": ("--block-size 0", "at least 1"),
    "--seqlen 1": ("--seqlen 1", "at least 2"),
    "--seed -1": ("--seed -1", "at least 0"),
    "--damping -1": ("--damping -1", "0.01"),
    "--damping nan": ("--damping nan", "0.01"),
    "--text nowhere.txt": ("nowhere.txt", "no such file"),
    "--text nowhere": ("nowhere",),
    "--nsamples 9999": ("text.txt", "12,0", "9999 windows", "--nsamples"),
    "--seqlen 9999": ("64 positions", "--seqlen 9999"),
}
EVAL_OPTIONS = {
    "--windows 0": ("--windows 0", "at least 1"),
    f"--batch-size {10**20}": (f"--batch-size {10**20}", "below 2**63"),
    "--seqlen 1": ("--seqlen 1", "at least 2"),
    "--seqlen 99999": ("64 positions", "--seqlen 99999"),
    "--bos frob": ("--bos frob", "text", "document", "window"),
    "--dtype int4": ("--dtype int4", "float32"),
    "--device frob": ("--device frob", "cpu", "cuda"),
    "--dataset nowhere.txt": ("nowhere.txt", "no such file"),
    "--dataset org/nowhere": ("org/nowhere", "text"),
    "--baseline no/such/model": ("no/such/model", "no such folder"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, checkpoint, refused, options, out):
    before = contents(checkpoint("llama"))
    refused(checkpoint("llama"), *options, *option.split(), words=OPTIONS[option])
    assert not out.exists()
    assert contents(checkpoint("llama")) == before


@pytest.mark.parametrize("option", EVAL_OPTIONS)
def test_eval_option(option, checkpoint, refused, eval_options):
    refused("eval", checkpoint("llama"), *eval_options, *option.split(), words=EVAL_OPTIONS[option])


def test_opening_token_that_the_tokenizer_lacks(model, refused, eval_options):
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    refused("eval", model, *eval_options, "--bos", "window", words=("--bos window", "no opening token"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("command", ["prune", "eval"])
def test_cuda_where_there_is_none(command, device, checkpoint, refused, options, eval_options):
    arguments = options if command == "prune" else eval_options
    refused(command, checkpoint("llama"), *arguments, "--device", device, words=(f"--device {device}", "CUDA"))


# ---- text ------------------------------------------------------------------------------------------------------------

TEXTS = {
    "empty.txt": (b"", ("tokens",)),
    "blank.txt": (b"\n \n\n", ("tokens",)),
    "short.txt": (b"hello", ("6 tokens",)),
    "latin1.txt": ("é ".encode("latin-1") * 9000, ("utf-8",)),
    "broken.txt.gz": (b"no gzip file" * 900, ("gzip",)),
    "broken.json": (b"{nope", ("JSON",)),
    "broken.jsonl": (b'{"text": "a"}\n{nope\n', ("JSON",)),
    "broken.jsonl.gz": (b"no gzip file" * 900, ("gzip",)),
    "broken.parquet": (b"PAR1 nope", ("arquet",)),
    "empty.json": (b"", ()),
    "none.json": (b"[]", ("tokens",)),
    "column.json": (b'[{"body": "a"}, {"body": "b"}]', ("'text'", "body", "--text-column")),
    "column.jsonl": (b'{"body": "a"}\n{"body": "b"}\n', ("'text'", "body", "--text-column")),
    "numbers.jsonl": (b'{"text": 1}\n' * 999, ("'text'",)),
    "lists.jsonl": (b'{"text": ["a b c", "d e f g"]}\n' * 999, ("'text'",)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name, checkpoint, refused, options, out, tmp_path):
    data, words = TEXTS[name]
    (tmp_path / name).write_bytes(data)
    refused(checkpoint("llama"), *options, "--text", tmp_path / name, words=(name, *words))
    assert not out.exists()


@pytest.mark.parametrize("name", TEXTS)
def test_eval_text(name, checkpoint, refused, tmp_path):
    data, words = TEXTS[name]
    (tmp_path / name).write_bytes(data)
    refused("eval", checkpoint("llama"), "--dataset", tmp_path / name, "-q", words=(name, *words))


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_rows_without_text_are_left_out(command, checkpoint, options, tmp_path):
    path, row = tmp_path / "rows.jsonl", json.dumps({"text": "abc def " * 100})
    path.write_text("\n".join([row, '{"text": null}', row, '{"text": ""}', row]))
    arguments = [*options, "--text", str(path)] if command == "prune" else ["--dataset", str(path), "-q"]
    assert main([command, str(checkpoint("llama")), *arguments]) == 0


# ---- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_foreign_output_folder(flag, checkpoint, refused, options, out):
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    refused(checkpoint("llama"), *options, *flag, words=("/out", "not an output of ours", "--out"))
    assert contents(out) == {"thesis.tex": b"mine"}


def test_earlier_output(checkpoint, refused, options, out):
    folder = str(checkpoint("llama"))
    assert main([folder, *options]) == 0
    first = contents(out)
    refused(folder, *options, "--sparsity", "2:4", words=("/out", "earlier run", "--overwrite"))
    assert contents(out) == first
    assert main([folder, *options, "--sparsity", "2:4", "--overwrite"]) == 0
    assert json.loads((out / "sparsity.json").read_text())["config"]["sparsity"] == "2:4"
    assert contents(out)[SINGLE] != first[SINGLE]


def test_run_that_failed_at_once_does_not_stand_in_the_way(model, checkpoint, options, out):
    poison(DOWN, (0, 0))(model)
    assert main([str(model), *options]) == 1
    assert main([str(checkpoint("llama")), *options]) == 0
    assert (out / SINGLE).is_file()


def test_run_that_failed_later_is_not_thrown_away_unasked(model, checkpoint, refused, options, out):
    poison(UP, (0, 0))(model)
    assert main([str(model), *options]) == 1
    refused(checkpoint("llama"), *options, words=("/out", "unfinished run", "--resume", "--overwrite", "--out"))
    assert main([str(checkpoint("llama")), *options, "--overwrite"]) == 0
    assert not (out / ".work").exists()


def test_output_of_a_killed_run(checkpoint, refused, options, out):
    (out / ".work").mkdir(parents=True)
    (out / ".work" / "journal").touch()
    refused(checkpoint("llama"), *options, words=("/out", "unfinished run", "--resume", "--overwrite", "--out"))
    assert main([str(checkpoint("llama")), *options, "--overwrite"]) == 0
    assert (out / SINGLE).is_file()
    assert not (out / ".work").exists()


def test_output_of_a_run_that_is_at_work(checkpoint, refused, options, out):
    with Writer(Checkpoint(checkpoint("llama")), out, {}):
        refused(checkpoint("llama"), *options, "--overwrite", words=("/out", "another process is at work", "--out"))


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
@pytest.mark.parametrize("way", ["the folder", "a link", "a detour"])
def test_output_is_the_source(way, flag, model, refused, options, tmp_path):
    (tmp_path / "link").symlink_to(model)
    target = {"the folder": model, "a link": tmp_path / "link", "a detour": model / ".." / "model"}[way]
    before = contents(model)
    refused(model, *options, "--out", target, *flag, words=(str(target), "the model itself", "--out"))
    assert contents(model) == before


@pytest.mark.parametrize("target", ["file", "file/below/it"])
def test_output_is_a_file(target, checkpoint, refused, options, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(checkpoint("llama"), *options, "--out", tmp_path / target, words=(f"/{target}", "--out"))
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk(checkpoint, refused, options, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=0))
    refused(checkpoint("llama"), *options, words=("/out", "0 GB are free"))
    assert not out.exists()


def test_disk_that_fills_up_on_the_way(checkpoint, refused, options, out, monkeypatch):
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    refused(checkpoint("llama"), *options, words=("/out", "No space left on device"))
    assert not out.exists()


def test_file_that_may_not_grow_so_large(checkpoint, refused, options, out):
    """The system's own error, as a disk gives it that is full: the limit is less than the weights."""
    resource = pytest.importorskip("resource")
    before, (soft, hard) = contents(checkpoint("llama")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(checkpoint("llama"), *options, words=("/out", "cannot be written", "File too large", "make room"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    assert contents(checkpoint("llama")) == before


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody may write to, root neither."""
    place = tmp_path / "read-only"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("below", ["", "out", "a/b/out"])
def test_read_only_file_system(below, checkpoint, refused, options, read_only):
    refused(checkpoint("llama"), *options, "--out", read_only / below, words=("/read-only", "no folder to write to"))
    assert not any(read_only.iterdir())


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no users here as Linux has them")
@pytest.mark.parametrize("below", [".", "out", "a/b/out"])
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_folder_that_may_not_be_written_to(mode, below, checkpoint, refused, options, open_folder):
    model = shutil.copytree(checkpoint("llama"), open_folder / "model")
    for path in (model, *model.iterdir()):
        path.chmod(0o755 if path == model else 0o644)
    locked = open_folder / "locked"
    locked.mkdir(mode)
    with unprivileged():
        refused(model, *options, "--out", locked / below, words=(str(locked),))
    locked.chmod(0o755)
    assert not any(locked.iterdir())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory here")
def test_output_on_another_file_system(checkpoint, options, out):
    assert main([str(checkpoint("llama")), *options]) == 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if Path(folder).stat().st_dev == out.stat().st_dev:
            pytest.skip("/dev/shm is the file system of the other tests")
        assert main([str(checkpoint("llama")), *options, "--out", f"{folder}/out"]) == 0
        assert contents(Path(folder) / "out")[SINGLE] == contents(out)[SINGLE]


@pytest.mark.parametrize("target", ["model/../out", "a/../b/c", "./out/", "model/out", "../{here}/out"])
def test_output_folder_that_is_written_oddly(target, model, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, target = contents(model), target.format(here=tmp_path.name)
    assert main(["model/", *options, "--out", target]) == 0
    place = Path(os.path.normpath(tmp_path / target))
    assert {path.name for path in place.iterdir()} == {*before, "sparsity.json"}
    assert {name: data for name, data in contents(model).items() if not name.startswith("out/")} == before


def test_model_inside_of_the_output_folder(model, refused, options, tmp_path):
    before = contents(tmp_path)
    refused(model, *options, "--out", tmp_path, "--overwrite", words=("not an output of ours", "--out"))
    assert contents(tmp_path) == before


def test_resume_and_overwrite(checkpoint, refused, options, out, monkeypatch):
    """The same command and --resume goes on, also with the run that was to replace another; it throws nothing away."""
    folder, other = checkpoint("llama"), [*options, "--sparsity", "2:4", "--overwrite"]
    assert main([str(folder), *options]) == 0
    first, calls = contents(out), []
    refused(folder, *other, "--resume", words=("/out", "the run there had", "sparsity", "'2:4'", "not --resume"))
    assert contents(out) == first
    solve = methods.METHODS["sparsegpt"]

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return solve(*args)

    with monkeypatch.context() as patch:
        patch.setitem(methods.METHODS, "sparsegpt", interrupted)
        assert main([str(folder), *other]) == 130
    assert main([str(folder), *other, "--resume"]) == 0
    report = json.loads((out / "sparsity.json").read_text())
    assert (report["config"]["sparsity"], report["resumed"]) == ("2:4", 1)


def test_output_is_checked_before_the_dense_model_is_evaluated(checkpoint, refused, options, out, monkeypatch):
    monkeypatch.setattr(perplexity, "window_losses", lambda *args: pytest.fail("evaluated the dense model first"))
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    refused(checkpoint("llama"), *options, "--eval", options[1], words=("not an output of ours",))


def test_output_of_a_model_called_dot(model, options, monkeypatch):
    monkeypatch.chdir(model)
    at = options.index("--out")
    assert main([".", *options[:at], *options[at + 2 :]]) == 0
    assert [path.name for path in model.iterdir() if path.is_dir()] == ["model-sparsegpt-0.5"]


# ---- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["prune"], ["eval"]])
@pytest.mark.parametrize("argv", [["--frob"], ["--seqlen", "many"], ["--seqlen"], ["another"]])
def test_usage_error(argv, command, checkpoint, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*command, str(checkpoint("llama")), *argv])
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert argv[0] in stderr


@pytest.mark.parametrize("command", ["prune", "eval", "inspect"])
def test_no_model(command, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main([command])
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "MODEL" in stderr


def test_no_arguments(capsys):
    assert main([]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""  # results go to stdout, and this is none
    assert "usage: " in stderr


def test_interrupt(checkpoint, options, capsys, out, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(methods.METHODS, "sparsegpt", interrupted)
    assert main([str(checkpoint("llama")), *options]) == 130
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert re.fullmatch(r"sparsegpt-lite: interrupted[^\n]*\n", stderr)
    assert [path.name for path in out.iterdir()] == [".work"]  # to go on from


def test_the_message_stands_below_the_progress_bar(model, options, capsys):
    poison(UP, (0, 0))(model)
    assert main([str(model), *(option for option in options if option != "-q")]) == 1
    *bar, message = capsys.readouterr().err.rstrip("\n").split("\n")
    assert "pruning" in bar[0]
    assert message.startswith(f"sparsegpt-lite: {UP}")
