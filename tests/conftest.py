"""Tiny random checkpoints, a byte tokenizer and made-up text: all that the tests need, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    logging,
)

torch.set_num_threads(1)
logging.disable_progress_bar()

VOCAB = 257
CONFIGS = {
    "llama": lambda **kw: LlamaConfig(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256,
           "eos_token_id": 256, "tie_word_embeddings": False} | kw),
    "qwen3": lambda **kw: Qwen3Config(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
           "tie_word_embeddings": True} | kw),
    "gemma2": lambda **kw: Gemma2Config(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 8,
           "pad_token_id": 0} | kw),
    "opt": lambda **kw: OPTConfig(
        **{"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 256,
           "eos_token_id": 256, "do_layer_norm_before": True} | kw),
    "gpt2": lambda **kw: GPT2Config(
        **{"vocab_size": VOCAB, "n_embd": 32, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 64,
           "bos_token_id": 256, "eos_token_id": 256} | kw),
    "bloom": lambda **kw: BloomConfig(
        **{"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 256,
           "eos_token_id": 256, "pad_token_id": 0} | kw),
    "openai-gpt": lambda **kw: OpenAIGPTConfig(
        **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | kw),
    "mixtral": lambda **kw: MixtralConfig(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4,
           "num_experts_per_tok": 2} | kw),
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <bos> before every text."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<bos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>")


def save_checkpoint(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **config: object,
) -> Path:
    """Save a tiny random model and its tokenizer; weights are wide enough that layers matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**config), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "wpe" not in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of tiny checkpoints, `checkpoint("opt", num_hidden_layers=3)`; never written to by a test."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **options: object) -> Path:
        key = repr((family, sorted(options.items(), key=str)))
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of made-up words, some 12,000 bytes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    documents = [" ".join(rng.choices(words, k=60)) + "." for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    return path
