"""Whatever is wrong with the input: one line that says where, what and what to do, exit code 1, and nothing written."""

import errno
import json
import logging
import os
import random
import re
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
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
    "config a list": Damage(lambda m: (m / "config.json").write_text("[]"), ("config.json", "list")),
    "quantized": Damage(
        lambda m: edit_config(m, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("config.json", "quantized", "gptq", "unquantized"),
    ),
    "own code": Damage(
        lambda m: edit_config(m, auto_map={"AutoModelForCausalLM": "modeling.Model"}),
        ("/model", "own model code", "--trust-remote-code"),
    ),
    "unknown model type": Damage(lambda m: edit_config(m, model_type="frob"), ("/model", "frob", "transformers")),
    "no language model": Damage(lambda m: edit_config(m, model_type="t5"), ("/model", "t5", "transformers")),
    "more layers": Damage(
        lambda m: edit_config(m, num_hidden_layers=3), ("/model", "9 weights", "model.layers.2.", "config.json")
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


@pytest.mark.parametrize("name", ["truncated", "shard missing", "offsets that overlap", "dtype unknown", "quantized"])
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


@pytest.mark.parametrize(
    "name", ["nowhere", "org/nowhere", "my--model", "model.git", ".model", "m" * 97, "a/b/c", "~nobody/model"]
)
def test_model_that_is_not_there(name, refused, options, out):
    refused(name, *options, words=(name, "no such folder"))
    assert not out.exists()


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
