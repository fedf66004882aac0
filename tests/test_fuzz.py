"""Whatever a model's files hold: exit code 0 or 1, one line, nothing written elsewhere, bounded in time and memory.

The first CASES seeds are a test. `python -m tests.test_fuzz 1000` runs so many and prints a summary, with `--first
SEED` from another one; `--keep FOLDER` leaves the model of each case that broke a rule there.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sparsegpt_lite import pipeline
from sparsegpt_lite.checkpoint import Checkpoint, Entry
from sparsegpt_lite.cli import main
from tests.conftest import save_checkpoint

if sys.platform == "linux":
    import resource
else:
    pytest.skip("needs limits and a /proc as Linux has them", allow_module_level=True)

CASES = 150
SECONDS = 20.0  # for one command
ADDRESS_SPACE = 4 << 30  # bytes that one command may map beside what is mapped already
GROWTH = 1 << 28  # bytes by which a command may raise the peak of memory
LONGEST = 600  # characters of a message, without the paths of the test
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # what a terminal obeys
# What Rust says of a panic of tokenizers is on stderr before anyone can catch it.
PANIC = re.compile(r"\A\s*thread '[^\n]*panicked at .*?(?=^sparsegpt-lite: )", re.DOTALL | re.MULTILINE)
INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
SHARDED: dict[str, Any] = {"max_shard_size": "40KB"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama in shards": SHARDED,
    "qwen3 in shards": SHARDED,  # its head is tied to its embeddings
    "gpt2": {},  # its layers lie transposed, its positions are learned
    "opt in shards": SHARDED,
    "mixtral in shards": SHARDED,  # its experts are fused when they are loaded
}
DEEP = "@deep@"  # stands for brackets in brackets in JSON
HUGE = "@huge@"  # for a number of many digits


# ---- what may stand where something else belongs ---------------------------------------------------------------------


def number(rng: random.Random) -> int | float:
    """A number that is no good size of anything."""
    exact = [0, 1, -1, 2, 3, 7, 10**3, 10**6, 10**9, 10**12, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**25]
    return rng.choice([*exact, -(2**31), -(2**63), -(10**12), 0.5, 1e9, 1e300, -1e-300, float("nan"), float("inf")])


def word(rng: random.Random) -> str:
    """A string with something about it."""
    return rng.choice([
        "", " ", ".", "..", "/", "null", "true", "0", "-1", "1e9", "auto", "x" * 300, "y" * 20_000, "weight",
        "__class__", "../../etc/passwd", "/etc/passwd", "a\nb", "tab\t\r\n", "nul\0", "\x1b[31mred", "\u202etfel",
        "ünïcödé", "模型", "\U0001f600", "e\u0301", "\ud800", "%s%n{0}", "$(touch x)", "; touch x", "--overwrite", "(",
        "[a-", "a.b.c",
    ])  # fmt: skip


def junk(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: number(rng),
        lambda: number(rng),
        lambda: word(rng),
        lambda: word(rng),
        lambda: rng.choice([DEEP, HUGE]),
        lambda: [junk(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 50]))] if depth < 2 else [],
        lambda: {word(rng)[:300]: junk(rng, depth + 1) for _ in range(rng.randrange(4))} if depth < 2 else {},
    ]
    return rng.choice(kinds)()


def dumped(value: object, pairs: bool = False) -> bytes:
    """JSON of a value, or of an object given as a list of names and values, which may have a name twice."""
    if pairs:
        assert isinstance(value, list)
        text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(inner)}" for name, inner in value) + "}"
    else:
        text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).replace(f'"{HUGE}"', "9" * 6_000)
    return text.encode("utf-8", "surrogatepass")


class DoesNotApplyError(Exception):
    """A mutation of what the model does not have."""


# ---- mutations of a folder; each says what it did --------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if not found:
        raise DoesNotApplyError
    return found


def split(path: Path) -> tuple[bytes, bytes]:
    """JSON of the header, and the data behind it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    return raw[8 : 8 + length], raw[8 + length :]


def entries(path: Path) -> list[list[Any]]:
    """Names and values of a header; those of an earlier mutation may be none."""
    try:
        value = json.loads(split(path)[0])
        return [[name, entry] for name, entry in value.items()]
    except (ValueError, AttributeError, RecursionError) as error:
        raise DoesNotApplyError from error


def put_header(path: Path, body: bytes) -> None:
    data = split(path)[1]
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)


def tensors(found: list[list[Any]]) -> list[list[Any]]:
    chosen = [pair for pair in found if isinstance(pair[1], dict) and {"dtype", "shape", "data_offsets"} <= {*pair[1]}]
    if len(chosen) < 2:
        raise DoesNotApplyError
    return chosen


def flip_header(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    raw, length = bytearray(path.read_bytes()), 8 + len(split(path)[0])
    ats = [rng.randrange(min(length, len(raw)) or 1) for _ in range(rng.choice([1, 1, 2, 8]))]
    for at in ats:
        if at < len(raw):
            raw[at] = rng.choice([rng.randrange(256), *b'{}[]",:0123456789-e\\'])
    path.write_bytes(raw)
    return f"{path.name}: other bytes at {ats}"


def header_length(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    raw, length = path.read_bytes(), len(split(path)[0])
    value = rng.choice([0, 1, length - 1, length + 1, length + 8, len(raw), 2**31, 2**40, 2**63, 2**64 - 1, 10**8])
    path.write_bytes(struct.pack("<Q", max(0, value)) + raw[8:])
    return f"{path.name}: a header of {value} bytes"


def header_field(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    found = entries(path)
    pair, key = rng.choice(tensors(found)), rng.choice(["dtype", "shape", "data_offsets"])
    old = pair[1][key]
    values = [junk(rng), [number(rng), number(rng)], [number(rng)] * 3, [0, 0], [0, 2**64], str(old), [old], ABSENT]
    if isinstance(old, list) and old:
        at = rng.randrange(len(old))
        values += [[*old[:at], new, *old[at + 1 :]] for new in (junk(rng), number(rng), str(old[at]), float(old[at]))]
    values += [rng.choice(["F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "f32", "FP32"])]
    value = rng.choice(values)
    if value is ABSENT:
        del pair[1][key]
    else:
        pair[1][key] = value
    put_header(path, dumped(found, pairs=True))
    return f"{path.name}: {key} of {pair[0][:80]} is {shown(value)}"


def header_places(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    found = entries(path)
    a, b = rng.sample(tensors(found), 2)
    how = rng.choice(["swapped", "the same", "shifted", "backwards", "one inside the other"])
    first, second = a[1]["data_offsets"], b[1]["data_offsets"]
    if not all(isinstance(x, int) for x in (*first, *second)) or len(first) != 2 or len(second) != 2:
        raise DoesNotApplyError
    places = {
        "swapped": (second, first),
        "the same": (first, first),
        "shifted": ([x + 4 for x in first], second),
        "backwards": (first[::-1], second),
        "one inside the other": ([min(first[0], second[0]), max(first[1], second[1])], second),
    }
    a[1]["data_offsets"], b[1]["data_offsets"] = places[how]
    put_header(path, dumped(found, pairs=True))
    return f"{path.name}: places of {a[0][:80]} and {b[0][:80]} {how}"


def header_name(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    found = entries(path)
    pair = rng.choice(tensors(found))
    old, others = pair[0], [other[0] for p in shards(folder) for other in entries(p) if other is not pair]
    new = rng.choice([word(rng), word(rng), rng.choice(others), old + ".weight", old.replace("layers", "layer"),
                      old.replace(".0.", ".00."), old.replace(".1.", ".9999999."), f"model.{old}", old.upper(),
                      "model." * 5_000 + old, "__metadata__"])  # fmt: skip
    pair[0] = new
    put_header(path, dumped(found, pairs=True))
    return f"{path.name}: {old[:80]} is called {shown(new)}"


def header_twice(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    found = entries(path)
    pair = rng.choice(tensors(found))
    again = [pair[0], rng.choice([pair[1], pair[1] | {"dtype": "I32"}, rng.choice(tensors(found))[1], junk(rng)])]
    found.insert(rng.randrange(len(found) + 1), again)
    put_header(path, dumped(found, pairs=True))
    return f"{path.name}: {pair[0][:80]} twice"


def header_without(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    found = entries(path)
    pair = rng.choice(tensors(found))
    found.remove(pair)
    put_header(path, dumped(found, pairs=True))
    return f"{path.name}: no {pair[0][:80]}"


def header_metadata(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    values = [junk(rng), {"format": rng.choice(["tf", "flax", "np", "", 3])}, {word(rng)[:300]: word(rng)}, {}]
    value = rng.choice(values)
    put_header(path, dumped([["__metadata__", value], *(e for e in entries(path) if e[0] != "__metadata__")], True))
    return f"{path.name}: metadata {shown(value)}"


def header_extra(folder: Path, rng: random.Random) -> str:
    """A tensor more without data, or of one dimension more; safetensors takes many of them."""
    path = rng.choice(shards(folder))
    found, data = entries(path), split(path)[1]
    shape = rng.choice([[0], [0, 0], [0, 2**40], [2**40, 0], [0, 2**63], [2**63, 0], [2**62, 4, 0], [0] * 100,
                        [1] * 64 + [0], [0, 2**64], [10**18, 10**18, 0], [3, 0, 4]])  # fmt: skip
    dtype = rng.choice(["F32", "BF16", "I64", "BOOL", "F8_E5M2", "U64", "C64", "F4", "F64"])
    name = rng.choice(["extra", "extra.weight", "model.layers.0.extra.weight", "model.layers.7.mlp.up_proj.weight",
                       "lm_head.weight", "model.layers.0.mlp.up_proj.weight", word(rng)])  # fmt: skip
    found.append([name, {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data)]}])
    put_header(path, dumped(found, pairs=True))
    return f"{path.name}: {shown(name)} more, {dtype} of shape {shown(shape)}"


def header_reshaped(folder: Path, rng: random.Random) -> str:
    """Another shape or dtype of as many bytes."""
    path = rng.choice(shards(folder))
    found = entries(path)
    pair = rng.choice(tensors(found))
    entry = pair[1]
    if not isinstance(entry["shape"], list):
        raise DoesNotApplyError
    shape = [x for x in entry["shape"] if isinstance(x, int)]
    many = [1] * rng.choice([1, 2, 60, 63, 64, 65, 100, 2000])
    kinds: list[dict[str, Any]] = [
        {"shape": shape[::-1]},
        {"shape": [*many, *shape]},
        {"shape": [*shape, *many]},
        {"dtype": "I32"},
        {"dtype": "U32"},
        {"dtype": "F16", "shape": [*shape[:-1], *(2 * x for x in shape[-1:])]},
        {"dtype": "BF16", "shape": [*shape, 2]},
        {"dtype": "I8", "shape": [*shape, 4]},
        {"dtype": "F8_E4M3", "shape": [4, *shape]},
        {"dtype": "BOOL", "shape": [4, *shape]},
        {"dtype": "F64", "shape": [x // 2 if i == 0 else x for i, x in enumerate(shape)]},
    ]
    new = rng.choice(kinds)
    pair[1] = entry | new
    put_header(path, dumped(found, pairs=True))
    return f"{path.name}: {pair[0][:80]} is {shown(new)}"


def header_body(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    good = split(path)[0]
    body = rng.choice([b"", b"{}", b"[]", b"null", b"3", b'"x"', b"{", b"\xff\xfe", b" " * 100, dumped(DEEP),
                       dumped(HUGE), good + b" " * 64, b" " + good, good + b"x", good + b"\0" * 8,
                       b"\xef\xbb\xbf" + good, good.decode("utf-8", "replace").encode("utf-16"), dumped(junk(rng)),
                       dumped([[word(rng), junk(rng)]], pairs=True)])  # fmt: skip
    put_header(path, body)
    return f"{path.name}: the header {shown(body[:40])}"


def flip_data(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    raw, start = bytearray(path.read_bytes()), 8 + len(split(path)[0])
    if start >= len(raw):
        raise DoesNotApplyError
    n = rng.choice([1, 4, 100])
    for _ in range(n):
        raw[rng.randrange(start, len(raw))] = rng.choice([rng.randrange(256), 0x7F, 0xFF])
    path.write_bytes(raw)
    return f"{path.name}: {n} other bytes in the data"


# ---- the index -------------------------------------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe or a device
        raise DoesNotApplyError
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DoesNotApplyError from error
    if not isinstance(value, dict):
        raise DoesNotApplyError
    return value


def index_entry(folder: Path, rng: random.Random) -> str:
    index = read_object(folder / INDEX)
    if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise DoesNotApplyError
    name = rng.choice([*index["weight_map"]])
    first = shards(folder)[0].name
    outside = str(folder.parent / "outside.safetensors")
    value = rng.choice([outside, "../outside.safetensors", f"./{first}", f"sub/{first}", str(folder / first), "", ".",
                        "..", ".safetensors", "/.safetensors", "nowhere.safetensors", CONFIG, "folder.safetensors",
                        word(rng), "x" * 240 + ".safetensors", "x" * 300 + ".safetensors", "x" * 9000 + ".safetensors",
                        "nul\0.safetensors", "a\nb.safetensors", "\ud800.safetensors", "\x1b[2J.safetensors",
                        "link.safetensors", "loop.safetensors", "inside.safetensors", "..\\outside.safetensors",
                        first.upper(), junk(rng), [first], {first: first}])  # fmt: skip
    if value == "folder.safetensors":
        (folder / value).mkdir(exist_ok=True)
    target = {"link.safetensors": outside, "loop.safetensors": "loop.safetensors", "inside.safetensors": first}
    if isinstance(value, str) and value in target and not (folder / value).is_symlink():
        (folder / value).symlink_to(target[value])
    names = [name] if rng.random() < 0.7 else [*index["weight_map"]]
    index["weight_map"] |= dict.fromkeys(names, value)
    (folder / INDEX).write_bytes(dumped(index))
    return f"index: {len(names)} weights in {shown(value)}"


def index_whole(folder: Path, rng: random.Random) -> str:
    index = read_object(folder / INDEX)
    first = shards(folder)[0].name
    weights = index.get("weight_map") if isinstance(index.get("weight_map"), dict) else {}
    value = rng.choice([{}, {"weight_map": junk(rng)}, {"weight_map": {}}, junk(rng), index | {"metadata": junk(rng)},
                        {"weight_map": {f"w{i}": first for i in range(100_000)}}, {"weight_map": {"": first}},
                        {"weight_map": {**dict([*weights.items()][::-1])}}, {"weight_map": [*weights]},
                        {"weight_map": {**weights, word(rng): first}}, {"weight_map": dict.fromkeys(weights, first)},
                        {"weight_map": dict([*weights.items()][: len(weights) // 2])}])  # fmt: skip
    (folder / INDEX).write_bytes(dumped(value))
    return f"index: {shown(value)}"


def index_beside(folder: Path, rng: random.Random) -> str:
    """An index and model.safetensors in one folder."""
    if (folder / SINGLE).exists():
        value = rng.choice([{"weight_map": {"a": "nowhere.safetensors"}}, {"weight_map": {"a": SINGLE}}, junk(rng)])
        (folder / INDEX).write_bytes(dumped(value))
        return f"an index beside {SINGLE}: {shown(value)}"
    shutil.copyfile(rng.choice(shards(folder)), folder / SINGLE)
    return f"one shard as {SINGLE} beside the index"


# ---- config.json and other JSON --------------------------------------------------------------------------------------

ABSENT = object()
SIZES = ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads", "head_dim",
         "num_key_value_heads", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "n_inner",
         "ffn_dim", "num_local_experts", "num_experts_per_tok", "word_embed_proj_dim", "sliding_window"]  # fmt: skip
FIELDS = ["model_type", "architectures", "quantization_config", "auto_map", "dtype", "torch_dtype", "hidden_act",
          "activation_function", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "layer_types",
          "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "attention_bias",
          "attention_dropout", "mlp_bias", "use_cache", "is_encoder_decoder", "is_decoder", "text_config", "id2label",
          "vision_config", "num_labels", "pruned_heads", "return_dict", "torchscript", "output_hidden_states",
          "output_attentions", "_attn_implementation", "attn_implementation", "_experts_implementation", "sub_configs",
          "transformers_version", "_name_or_path", "problem_type", "tokenizer_class", "add_cross_attention",
          "chunk_size_feed_forward", "base_model_tp_plan", "do_layer_norm_before", "layer_norm_epsilon", "attn_pdrop",
          "resid_pdrop", "dropout", "pretraining_tp", "router_aux_loss_coef", "per_layer_config", "compression_config",
          "scale_attn_weights", "reorder_and_upcast_attn", "use_sliding_window", "partial_rotary_factor"]  # fmt: skip

KINDS = ["albert", "bamba", "bart", "bert", "blip-2", "bloom", "clip", "cohere2", "deepseek_v3", "falcon_mamba", "fuyu",
         "gemma2", "gemma3", "git", "gpt2", "gpt_neox", "gpt_oss", "gptj", "granitemoehybrid", "jamba", "llama",
         "llama4", "llava", "mamba2", "mistral", "mixtral", "mpt", "opt", "owlvit", "phi3", "qwen2_moe", "qwen2_vl",
         "qwen3", "qwen3_next", "recurrent_gemma", "rwkv", "t5", "trocr", "vit", "whisper", "xlnet"]  # fmt: skip


def config_size(folder: Path, rng: random.Random) -> str:
    config = read_object(folder / CONFIG)
    here = [name for name in SIZES if name in config]
    name, value = rng.choice(here or SIZES), rng.choice([number(rng), number(rng), 10**5, 4096, 5, 16, 31, 64])
    (folder / CONFIG).write_bytes(dumped(config | {name: value}))
    return f"config: {name} is {shown(value)}"


def config_sizes(folder: Path, rng: random.Random) -> str:
    """All of them at once."""
    config = read_object(folder / CONFIG)
    factor = rng.choice([2, 10**3, 10**6, 10**9])
    new = {n: config[n] * factor for n in SIZES if isinstance(config.get(n), int) and rng.random() < 0.7}
    (folder / CONFIG).write_bytes(dumped(config | new))
    return f"config: {', '.join(new)} times {factor}"


def config_field(folder: Path, rng: random.Random) -> str:
    config = read_object(folder / CONFIG)
    name = rng.choice([rng.choice(FIELDS), rng.choice([*config] or FIELDS)])
    values = [junk(rng), junk(rng), [junk(rng)], {"a": junk(rng)}, str(config.get(name)), [config.get(name)], ABSENT]
    value = rng.choice(values)
    if value is ABSENT:
        config.pop(name, None)
    (folder / CONFIG).write_bytes(dumped(config if value is ABSENT else config | {name: value}))
    return f"config: {name} is {shown(value)}"


def config_known(folder: Path, rng: random.Random) -> str:
    """Values that mean something to transformers."""
    name, value = rng.choice([
        ("quantization_config", rng.choice([{"quant_method": word(rng)}, {"quant_method": "gptq", "bits": 4}, {}, [],
                                            {"quant_method": ["a"] * 500}, {"load_in_8bit": True}, "gptq", 4, True])),
        ("auto_map", rng.choice([{"AutoConfig": "x--y.Z"}, {"AutoModelForCausalLM": "m.M"}, "m.M", [1], {}, True])),
        ("architectures", rng.choice([["LlamaForSequenceClassification"], ["T5Model"], [], [3], "Llama", [word(rng)]])),
        ("_attn_implementation", rng.choice(["flash_attention_2", "eager", "flex_attention", "org/kernel", "paged|x"])),
        ("attn_implementation", rng.choice(["flash_attention_2", "eager", "org/kernel@main:x", {"": "eager"}])),
        ("_experts_implementation", rng.choice(["grouped_mm", "batched_mm", "org/kernel", "eager"])),
        ("dtype", rng.choice(["float16", "float64", "int8", "float8_e4m3fn", "bool", "torch.float16", "auto"])),
        ("hidden_act", rng.choice(["gelu", "relu", "quick_gelu", "", "SiLU", "silu\n", ["silu"]])),
        ("rope_parameters", rng.choice([{"rope_type": t, "factor": number(rng), "rope_theta": number(rng)} for t in
                                        ("linear", "dynamic", "yarn", "longrope", "llama3", "default", "frob")])),
        ("rope_scaling", {"type": rng.choice(["linear", "yarn", "su", "mrope"]), "factor": junk(rng)}),
        ("layer_types", rng.choice([["full_attention"] * n for n in (0, 1, 2, 3, 1000)] + [["frob"] * 2, [2, 2]])),
        ("text_config", rng.choice([{"model_type": "llama"}, {"model_type": "gpt2", "n_layer": 2}, {"a": {}}])),
        ("tie_word_embeddings", rng.random() < 0.5),
        ("pad_token_id", rng.choice([-1, 256, 257, 10**9, [1], "1"])),
        ("return_dict", False), ("torchscript", True), ("output_hidden_states", True), ("output_attentions", True),
        ("is_encoder_decoder", True), ("is_decoder", False), ("add_cross_attention", True), ("use_cache", False),
        ("chunk_size_feed_forward", 3), ("pruned_heads", {"0": [0, 1]}), ("num_labels", 10**6), ("num_labels", -1),
        ("pretraining_tp", 2), ("attention_bias", True), ("mlp_bias", True), ("sliding_window", 4),
        ("initializer_range", rng.choice([-1.0, 0.0, 1e300, 5])), ("attention_dropout", rng.choice([0.5, 2.0, -1.0])),
        ("rms_norm_eps", rng.choice([0.0, -1.0, 1e300, 5])), ("do_layer_norm_before", False),
    ])  # fmt: skip
    (folder / CONFIG).write_bytes(dumped(read_object(folder / CONFIG) | {name: value}))
    return f"config: {name} is {shown(value)}"


def config_type(folder: Path, rng: random.Random) -> str:
    kind = rng.choice(KINDS)
    config = {"model_type": kind} if rng.random() < 0.3 else read_object(folder / CONFIG) | {"model_type": kind}
    (folder / CONFIG).write_bytes(dumped(config))
    return f"config: model_type is {kind}{', and nothing else' if len(config) == 1 else ''}"


def config_whole(folder: Path, rng: random.Random) -> str:
    value = rng.choice(
        [junk(rng), junk(rng), {}, [], DEEP, {"a": DEEP}, {"model_type": "llama"}, {"text_config": DEEP}]
    )
    (folder / CONFIG).write_bytes(dumped(value))
    return f"config: {shown(value)}"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of everything in a JSON value."""
    for key in [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def json_edit(folder: Path, rng: random.Random) -> str:
    """Any place in any JSON file, mostly of the tokenizer."""
    names = [path.name for path in sorted(folder.glob("*.json")) if path.is_file()]
    path = folder / rng.choice([*[n for n in names if n.startswith("tokenizer")] * 3, *names, "sparsity.json"])
    if path.name == "sparsity.json" and not path.exists():
        config = rng.choice([{"sparsity": rng.choice(["2:4", "0.5", "1:" + "9" * 5000, junk(rng)])}, junk(rng)])
        path.write_bytes(dumped(rng.choice([{"config": config}, {"config": config}, junk(rng)])))
        return f"a report {shown(path.read_bytes()[:60])}"
    value = read_object(path)
    found = [(holder, key) for holder, key in places(value)]
    short = [(holder, key) for holder, key in found if len(holder) < 50]  # not only the vocabulary
    holder, key = rng.choice(rng.choice([found, short or found]) or [(value, "a")])
    new = rng.choice([junk(rng), junk(rng), ABSENT])
    if new is not ABSENT:
        holder[key] = new
    elif isinstance(holder, list) or key in holder:
        del holder[key]
    path.write_bytes(dumped(value))
    return f"{path.name}: {shown(key)} is {shown(new)}"


# ---- whole files -----------------------------------------------------------------------------------------------------


def any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()])


def truncate(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    size = path.stat().st_size
    new = rng.choice([0, 1, 7, 8, 9, rng.randrange(size + 1), max(0, size - 1), size // 2, size + 1])
    os.truncate(path, new)
    return f"{path.name}: {new} bytes"


def flip(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    raw = bytearray(path.read_bytes()) or bytearray(b"x")
    n = rng.choice([1, 1, 3, 30])
    for _ in range(n):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    path.write_bytes(raw)
    return f"{path.name}: {n} other bytes"


def replace(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    how = rng.choice(["gone", "a folder", "a link to nothing", "a link to itself", "a link out", "a link inside",
                      "a pipe", "of zeros", "of noise", "of text", "of another file", "doubled",
                      "a link to a device"])  # fmt: skip
    raw = path.read_bytes()
    if how != "doubled":
        path.unlink()
    if how == "a link out":
        (folder.parent / f"outside.{path.name}").write_bytes(raw)
    if how == "a link inside":
        (folder / "blob").write_bytes(raw)
    acts: dict[str, Callable[[], object]] = {
        "gone": lambda: None,
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link out": lambda: path.symlink_to(f"../outside.{path.name}"),
        "a link inside": lambda: path.symlink_to("blob"),
        "a link to a device": lambda: path.symlink_to("/dev/zero"),
        "a pipe": lambda: os.mkfifo(path),
        "of zeros": lambda: path.write_bytes(bytes(len(raw))),
        "of noise": lambda: path.write_bytes(rng.randbytes(max(1, len(raw) % 5000))),
        "of text": lambda: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "of another file": lambda: shutil.copyfile(any_file(folder, rng), path),
        "doubled": lambda: path.write_bytes(raw + raw),
    }
    acts[how]()
    return f"{path.name}: {how}"


def additional(folder: Path, rng: random.Random) -> str:
    """Files that have no business there."""
    name = rng.choice(["a.json", "b.txt", "sparsity.json", "adapter_config.json", "model-00009-of-00009.safetensors",
                       "added_tokens.json", "special_tokens_map.json", "merges.txt", "vocab.json", "tokenizer.model",
                       "chat_template.jinja", "generation_config.json", "modeling_x.py", "consolidated.safetensors",
                       ".work", "params.json", "preprocessor_config.json", "x.tiktoken", "tekken.json"])  # fmt: skip
    if name == ".work":
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "journal").write_bytes(rng.randbytes(50))
        return "a work folder"
    data = rng.choice([b"", rng.randbytes(200), dumped(junk(rng)), b"{% for x in y %}", b"import os; os.abort()"])
    (folder / name).write_bytes(data)
    return f"{name} there: {shown(data[:40])}"


MUTATIONS: dict[Callable[[Path, random.Random], str], int] = {
    flip_header: 3, header_length: 1, header_field: 5, header_places: 2, header_name: 5, header_twice: 2,
    header_without: 1, header_metadata: 3, header_extra: 5, header_reshaped: 6, header_body: 2, flip_data: 3,
    index_entry: 8, index_whole: 6, index_beside: 2, config_size: 12, config_sizes: 2, config_field: 16,
    config_known: 20, config_type: 5, config_whole: 2, json_edit: 14, truncate: 4, flip: 4, replace: 8, additional: 5,
}  # fmt: skip


def mutate(folder: Path, rng: random.Random) -> list[str]:
    """Do one thing to a model, or two; say what."""
    wanted, done = rng.choice([1, 1, 1, 1, 2, 2]), list[str]()
    while len(done) < wanted:
        act = rng.choices([*MUTATIONS], [*MUTATIONS.values()])[0]
        with suppress(DoesNotApplyError):
            done.append(act(folder, rng))
    return done


def shown(value: object) -> str:
    text = "absent" if value is ABSENT else ascii(value)
    return text if len(text) <= 100 else f"{text[:90]} ... ({len(text)} characters)"


# ---- a case ----------------------------------------------------------------------------------------------------------


class TooSlowError(BaseException):
    """No Exception, which the package may take for a fault of the model."""


@dataclass
class Case:
    """What was done to which model, what the commands said of it, and which rules that breaks."""

    seed: int
    model: str
    mutations: list[str] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)  # by command: accepted, or the line
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0
    began: bool = False  # the work, after all that is checked before it

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.model}: {'; '.join(self.mutations)}", *self.broken]
        return "\n  ".join([*lines, *(f"{name}: {verdict[:300]}" for name, verdict in self.verdicts.items())])


@contextmanager
def limits() -> Iterator[list[str]]:
    """Limit what runs in it to some seconds and some memory; gets what it goes beyond of both."""
    found: list[str] = []

    def stop(_number: int, frame: FrameType | None) -> None:
        found.append("took too long in " + "".join(traceback.format_stack(frame)[-3:]))
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = mapped + ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(mapped + ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    if grown > GROWTH:
        found.append(f"took {grown / 1e9:.2g} GB")


@contextmanager
def captured(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Have what goes to stdout and stderr in two files, that of libraries in other languages too."""
    paths = folder / "stdout", folder / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    kept, before = [os.dup(1), os.dup(2)], (sys.stdout, sys.stderr)
    names = ("transformers", "huggingface_hub", "datasets", "torch", "accelerate", "")
    handlers = [h for name in names for h in logging.getLogger(name).handlers if type(h) is logging.StreamHandler]
    streams = [handler.stream for handler in handlers]
    with paths[0].open("wb") as out, paths[1].open("wb") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        for handler in handlers:
            handler.stream = sys.stderr
        try:
            yield paths
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.stream = stream
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def run(case: Case, argv: list[str], folder: Path) -> None:
    """Run a command on the mutated model and see what it says."""
    command = " ".join(argv[:1] + argv[2:3])
    with captured(folder) as (stdout, stderr), limits() as beyond, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (UserWarning, RuntimeWarning, FutureWarning):  # what Python shows by default
            warnings.simplefilter("always", category)
        try:
            code: object = main(argv)
        except TooSlowError:
            code = "too slow"
        except SystemExit as error:
            code = f"SystemExit({error.code})"
        except BaseException as error:  # noqa: BLE001, whatever it is, it is the finding
            stack = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.name}" for f in stack if "sparsegpt_lite" in f.filename]
            code = f"{type(error).__module__}.{type(error).__name__} in {ours[-1:]}: {str(error)[:300]!r}"
    said = PANIC.sub("", stderr.read_bytes().decode("utf-8", "replace").replace(str(folder), ""))
    case.broken += [f"{command}: {what}" for what in beyond]
    case.verdicts[command] = "accepted" if code == 0 else said.rstrip("\n") if code == 1 else str(code)
    if code not in (0, 1):
        case.broken.append(f"{command}: {code}")
    elif code == 1:
        case.broken += [f"{command}: {what}" for what in faults(said)]
    printed = stdout.read_bytes().decode("utf-8", "replace")
    if odd := CONTROL.search(printed):
        case.broken.append(f"{command}: control characters on stdout: {printed[max(0, odd.start() - 50) :][:100]!r}")
    if code == 1 and printed:
        case.broken.append(f"{command}: on stdout, though it failed: {printed[:100]!r}")


def faults(said: str) -> list[str]:
    """What is wrong with what a command that failed says."""
    found = []
    if not re.fullmatch(r"sparsegpt-lite: [^\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\n", said):
        found.append(f"not one line: {said[:1000]!r}")
    if "Traceback" in said:
        found.append("a traceback")
    if len(said) > LONGEST:
        found.append(f"{len(said)} characters")
    if CONTROL.search(said):
        found.append(f"control characters: {said[:300]!r}")
    if "out of memory" in said:
        found.append(f"asked for too much memory: {said[:300]!r}")
    return found


def snapshot(folder: Path) -> dict[str, object]:
    """Everything in a folder."""

    def content(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else path.stat().st_mode

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def tensor_bytes(folder: Path, entry: Entry) -> bytes:
    with (folder / entry.shard).open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.stop - entry.start)


def check_output(case: Case, folder: Path, before: dict[str, object]) -> None:
    """Nothing is changed or new but for the output, and that looks whole only if it is."""
    model, out, whole = folder / "model", folder / "out", case.verdicts["prune --text"] == "accepted"
    after = snapshot(folder)
    changed = [n for n in before | after if before.get(n) != after.get(n) and n.split("/")[0] != "out"]
    case.broken += [f"changed: {changed[:5]}"] if changed else []
    if (out / CONFIG).exists() != whole:
        case.broken.append(f"config.json in the output: {not whole}")
    if out.exists() and [path.name for path in out.iterdir()] != [".work"] and not whole:
        case.broken.append(f"left there: {[path.name for path in out.iterdir()]}")
    if links := [path.name for path in out.rglob("*") if path.is_symlink()]:
        case.broken.append(f"links in the output: {links}")
    if whole:
        source, target, report = Checkpoint(model), Checkpoint(out), json.loads((out / "sparsity.json").read_bytes())
        pruned = {matrix["name"].partition("[")[0] for matrix in report["matrices"]}
        kept = [e for name, e in source.entries.items() if name not in pruned]
        same = all(tensor_bytes(model, e) == tensor_bytes(out, e) for e in kept)
        if not same or source.entries != target.entries:
            case.broken.append("the output has other tensors than the source, not only pruned ones")
        if any("secret" in str(data) for name, data in after.items() if name.startswith("out/")):
            case.broken.append("the output has what lies outside of the model")


def fuzz(seed: int, model: str, source: Path, text: Path, folder: Path) -> Case:
    """Mutate a model, inspect and prune it."""
    rng, case = random.Random(seed), Case(seed, model)
    shutil.copytree(source, folder / "model")
    shutil.copyfile(sorted(source.glob("*.safetensors"))[0], folder / "outside.safetensors")
    with (folder / "outside.safetensors").open("ab") as file:
        file.write(b"secret")
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    case.mutations = mutate(folder / "model", rng)
    before, started = snapshot(folder), time.monotonic()
    options = ["--nsamples", "3", "--seqlen", "16", "--sparsity", rng.choice(["0.5", "2:4"]), "-q", "--device", "cpu",
               "--method", rng.choice(["magnitude", "wanda", "sparsegpt"]), "--out", str(folder / "out")]  # fmt: skip
    run(case, ["inspect", str(folder / "model")], folder)
    run(case, ["inspect", str(folder / "model"), "--json"], folder)
    real = pipeline.Writer

    def writer(*args: Any) -> Any:
        case.began = True
        return real(*args)

    pipeline.Writer = writer  # type: ignore[misc, assignment]
    try:
        run(case, ["prune", str(folder / "model"), "--text", str(text), *options], folder)
    finally:
        pipeline.Writer = real  # type: ignore[misc]
    case.seconds = time.monotonic() - started
    for name in ("stdout", "stderr"):
        before[name] = (folder / name).read_bytes()
    check_output(case, folder, before)
    return case


def model_of(seed: int) -> str:
    return [*MODELS][seed % len(MODELS)]


# ---- as a test -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(CASES))
def test_mutated_model(seed, checkpoint, text_file, tmp_path):
    name = model_of(seed)
    case = fuzz(seed, name, checkpoint(name.split()[0], **MODELS[name]), text_file, tmp_path)
    assert not case.broken, str(case)


@pytest.mark.parametrize("model", MODELS)
def test_model_that_is_not_mutated(model, checkpoint, text_file, tmp_path, monkeypatch):
    """All the rules hold without a mutation, and nothing is refused."""
    monkeypatch.setattr(sys.modules[__name__], "mutate", lambda *_: [])
    case = fuzz(0, model, checkpoint(model.split()[0], **MODELS[model]), text_file, tmp_path)
    assert not case.broken, str(case)
    assert {*case.verdicts.values()} == {"accepted"}


# ---- as a program ----------------------------------------------------------------------------------------------------


def kind(line: str) -> str:
    """A message without what is of one model in it."""
    line = re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)", "(...)", line.removeprefix("sparsegpt-lite: "))
    line = re.sub(r"/\S*?(?=[:,; ]|$)", "PATH", line)
    line = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "X", line)
    line = re.sub(r"\S*(model|lm_head|transformer)\.\S+", "TENSOR", line)
    return re.sub(r"[\d,]*\d", "N", line)[:110]


def summary(cases: list[Case]) -> str:
    accepted = sum({*case.verdicts.values()} == {"accepted"} for case in cases)
    preflight = sum(not case.began for case in cases)
    later = sum(case.began and case.verdicts["prune --text"] != "accepted" for case in cases)
    lines = [
        f"{len(cases)} models, {sum(len(case.verdicts) for case in cases)} commands: {accepted} accepted by all; "
        f"by prune {preflight} refused before work began, {later} on the way; "
        f"{sum(bool(case.broken) for case in cases)} broke a rule",
        "\nrefused by prune:",
    ]
    said = Counter(kind(v) for case in cases if (v := case.verdicts["prune --text"]) != "accepted")
    lines += [f"{count:5}  {message}" for message, count in said.most_common()]
    lines.append("\nslowest:")
    lines += [f"{case.seconds:5.1f} s  seed {case.seed}: {'; '.join(case.mutations)[:150]}"
              for case in sorted(cases, key=lambda case: -case.seconds)[:8]]  # fmt: skip
    return "\n".join(lines)


def program() -> int:
    """Run so many cases and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.test_fuzz")
    parser.add_argument("cases", type=int)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    options, cases = parser.parse_args(), list[Case]()
    with tempfile.TemporaryDirectory() as scratch:
        sources = {n: save_checkpoint(Path(scratch) / n, n.split()[0], **MODELS[n]) for n in MODELS}
        text = Path(scratch) / "text.txt"
        text.write_text("\n<|endoftext|>\n".join(f"{i} is the square root of {i * i}." for i in range(400)))
        for seed in range(options.first, options.first + options.cases):
            folder = Path(scratch) / f"case {seed}"
            folder.mkdir()
            cases.append(fuzz(seed, model_of(seed), sources[model_of(seed)], text, folder))
            if cases[-1].broken:
                print(cases[-1], flush=True)
            if cases[-1].broken and options.keep:
                shutil.copytree(folder / "model", options.keep / str(seed), symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder)
    print(summary(cases))
    return int(any(case.broken for case in cases))


if __name__ == "__main__":
    sys.exit(program())
