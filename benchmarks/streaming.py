"""Peak memory and time of pruning against depth and calibration windows: random Llamas, pruned by the public command.

    MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/streaming.py          # CPU, a quarter of an hour
    python benchmarks/streaming.py --hidden 4096 --ffn 14336 --heads 32 --kv-heads 8 --dtype bfloat16 \\
        --nsamples 16 32 128 --seqlen 2048 --device cuda --activations device host disk   # blocks of Llama-3.1-8B

Correctness comes first: the streamed losses of the shallowest model must equal the whole model's, else nothing is
measured. Every depth runs with the fewest windows, the least depth with all, each with every place where activations
may wait, each in a process of its own. Host memory is anonymous: what no file backs. On a CPU the peak within a block
varies by a hundred MiB with the holes in glibc's heap; with the variable above it does not, for a fifth more time.
Writes results/streaming_<device>.json.
It has run on a CPU only; the second command is ready for a GPU and has not run on one.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sparsegpt_lite.blocks import StreamedModel, device_name
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.demo import stdlib_documents
from sparsegpt_lite.eval.perplexity import window_losses
from sparsegpt_lite.report import aligned, installed_versions

VOCAB = 256


def make_checkpoint(folder: Path, depth: int, args: argparse.Namespace) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=depth,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=args.seqlen,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.save_pretrained(folder, max_shard_size="2GB")
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def check(folder: Path, args: argparse.Namespace) -> None:
    """Stop unless streaming gives what the whole model gives."""
    device = torch.device(args.device)
    tokens = torch.randint(VOCAB, (2, min(args.seqlen, 128)), generator=torch.Generator().manual_seed(0))
    streamed = StreamedModel(Checkpoint(folder), device)
    streamed.load_outer(head=True)
    losses = window_losses(streamed, tokens, 1, progress=False)
    whole = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    with torch.no_grad():
        logits = [whole(input_ids=w[None].to(device), use_cache=False).logits[0].float() for w in tokens]
    pairs = zip(logits, tokens.to(device), strict=True)
    expected = torch.stack([torch.nn.functional.cross_entropy(x[:-1], w[1:], reduction="sum") for x, w in pairs])
    if not torch.equal(losses, expected.double().cpu()):
        sys.exit(f"streamed losses {losses.tolist()} differ from the whole model's {expected.tolist()}: not measured")


def measure(folder: Path, text: Path, args: argparse.Namespace, nsamples: int, where: str) -> dict[str, object]:
    command = [
        sys.executable, "-m", "sparsegpt_lite", str(folder / "model"), "--out", str(folder / "out"), "--json", "-q",
        "--text", str(text), "--nsamples", str(nsamples), "--seqlen", str(args.seqlen), "--activations", where,
        "--method", args.method, "--sparsity", args.sparsity, "--device", args.device, "--overwrite",
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["activations"] == where, report["activations"]
    return {
        "blocks": len({row["block"] for row in report["matrices"]}),
        "nsamples": nsamples,
        "activations": where,
        "hidden_states_MiB": nsamples * args.seqlen * args.hidden * getattr(torch, args.dtype).itemsize / 2**20,
        "parameters": report["parameters"],
        "seconds": report["seconds"],
        "peak_host_MiB": report["peak_host_bytes"] / 2**20,
        "peak_device_MiB": (report["peak_device_bytes"] or 0) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 24, 48])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nsamples", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--activations", nargs="+", default=["host", "disk"], choices=["device", "host", "disk"])
    args = parser.parse_args()
    header = ("blocks", "windows", "hidden states MiB", "activations", "seconds", "host MiB", "device MiB")
    rows: list[tuple[str, ...]] = [header]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.txt"
        text.write_text("\n<|endoftext|>\n".join(stdlib_documents("train")), encoding="utf-8")
        for depth in args.depths:
            folder = Path(temporary) / str(depth)
            make_checkpoint(folder / "model", depth, args)
            if depth == min(args.depths):
                check(folder / "model", args)
            for nsamples in args.nsamples if depth == min(args.depths) else [min(args.nsamples)]:
                for where in args.activations:
                    results.append(found := measure(folder, text, args, nsamples, where))
                    numbers = [found[name] for name in ("seconds", "peak_host_MiB", "peak_device_MiB")]
                    rows.append((str(depth), str(nsamples), f"{found['hidden_states_MiB']:.0f}", where,
                                 *(f"{number:.1f}" for number in numbers)))  # fmt: skip
                    print(aligned(rows, left=(3,)).splitlines()[-1], flush=True)
            shutil.rmtree(folder)
    print(aligned(rows, left=(3,)))
    device = device_name(torch.device(args.device))
    record = {
        "settings": vars(args),
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "device": device,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
        "versions": installed_versions(),
        "runs": results,
    }
    name = "cpu" if device == "cpu" else device.lower().replace(" ", "-")
    path = Path(__file__).parent / "results" / f"streaming_{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
