"""Train the built-in model: a small Llama on the sources of the standard library, with its own tokenizer.

    python benchmarks/train_demo_model.py --minutes 90 --out sparsegpt_lite/demo_model

Writes a Hugging Face folder in bf16 and, beside the results of other benchmarks, a JSON file with the held-out loss
(nats per token) next to those of a unigram and a bigram model that were counted on the same training tokens.
"""

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsegpt_lite.demo import stdlib_documents

SEQLEN = 512
VOCAB = 2048


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, which opens every document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<bos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(stdlib_documents("train", optional=True), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<bos>", model_max_length=SEQLEN)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> torch.Tensor:
    """All documents, one after another, each opened by <bos>: int64 [tokens]."""
    encoded = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(encoded)))


def ngram_losses(train: torch.Tensor, heldout: torch.Tensor) -> dict[str, float]:
    """Held-out nats per token of a unigram and a bigram model, counted on the training tokens."""
    unigram = (torch.bincount(train, minlength=VOCAB) + 1.0).double()
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * VOCAB + train[1:], minlength=VOCAB**2).double().view(VOCAB, VOCAB)
    # Witten-Bell interpolation: each context trusts its counts by how few different successors it had.
    kinds = (pairs > 0).sum(1, keepdim=True)
    bigram = (pairs + kinds * unigram) / (pairs.sum(1, keepdim=True) + kinds).clamp(min=1)
    return {
        "unigram": -unigram[heldout[1:]].log().mean().item(),
        "bigram": -bigram[heldout[:-1], heldout[1:]].log().mean().item(),
    }


def windows_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean nats per predicted token over non-overlapping windows of SEQLEN, fp32."""
    windows = tokens[: len(tokens) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(16)]
    return sum(losses) / len(windows)


def train(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    train_tokens = token_stream(tokenizer, stdlib_documents("train", optional=True))
    heldout = token_stream(tokenizer, stdlib_documents("heldout"))
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=SEQLEN, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tokens):,} training tokens, "
          f"{len(heldout):,} held-out tokens; {ngram_losses(train_tokens, heldout)}", flush=True)  # fmt: skip

    start, step, smooth = time.monotonic(), 0, None
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        lr = args.lr * min(1.0, (step + 1) / 200) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        at = torch.randint(len(train_tokens) - SEQLEN, (args.batch,))
        batch = torch.stack([train_tokens[i : i + SEQLEN] for i in at])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        step += 1
        if step % 250 == 0:
            part = windows_loss(model.eval(), heldout[: 64 * SEQLEN])
            model.train()
            print(f"step {step} {done:5.1%} lr {lr:.1e} train {smooth:.4f} held-out {part:.4f}", flush=True)
            model.save_pretrained(args.out / "last")

    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "batch": args.batch,
        "seqlen": SEQLEN,
        "minutes": args.minutes,
        "seed": args.seed,
        "lr": args.lr,
        "train_tokens": len(train_tokens),
        "heldout_tokens": len(heldout),
        "heldout_loss_nats_per_token": {
            **ngram_losses(train_tokens, heldout),
            "model_bf16": windows_loss(model.float().eval(), heldout),
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = train(args)
    path = Path(__file__).parent / "results" / "train_demo_model.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
