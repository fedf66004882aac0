"""Which tokens? A data set of the Hub or a file of one's own -> windows of tokens, seeded, with a digest."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.errors import CalibrationError, CheckpointError, one_line

ALIASES = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext", "wikitext": "Salesforce/wikitext"}
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
SEPARATOR = "<|endoftext|>"  # a line of its own between two documents of a text file
SHUFFLE_BUFFER = 10_000  # documents
SURPLUS = 4  # tokens that are read for every token that is drawn
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Text:
    """Documents and where they come from."""

    name: str
    split: str
    documents: Iterable[str]
    joiner: str = "\n\n"  # between documents where a protocol makes one text of them
    limit: int | None = None  # windows that the protocol evaluates at most


@dataclass(frozen=True)
class Windows:
    """Tokens to run: int64 [windows, seqlen], and what they are.

    Attributes:
        tokens: The windows.
        dataset: Data set or file.
        split: Its split.
        bos: Where the tokenizer's opening token stands: `text`, `document` or `window`.
        digest: SHA-256 of shape and tokens.
    """

    tokens: Tensor
    dataset: str
    split: str
    bos: str

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the little-endian int64 tokens."""
        data = self.tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8")
        return hashlib.sha256(str(list(self.tokens.shape)).encode() + data.tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report says of the windows."""
        count, seqlen = self.tokens.shape
        return {
            "dataset": self.dataset,
            "split": self.split,
            "bos": self.bos,
            "windows": count,
            "seqlen": seqlen,
            "tokens": count * seqlen,
            "digest": self.digest,
        }


def open_text(source: str, split: str, column: str = "text", seed: int | None = None) -> Text:
    """Open a data set or a file as a stream of documents.

    Args:
        source: A file (.txt or any other text, .json, .jsonl, .parquet, each also .gz), or a data set of the Hub as
            `org/name` or `org/name:config`; `c4` and `wikitext2` are short for the papers' two.
        split: Split of a data set of the Hub; a file has none.
        column: Column with the text.
        seed: Shuffle the documents; in their own order by default.

    Raises:
        CalibrationError: No such file, data set or column.
    """
    if Path(source).expanduser().is_file():
        return _open_file(Path(source).expanduser(), column, seed)
    if Path(source).suffix in (".txt", ".json", ".jsonl", ".parquet", ".gz"):
        raise CalibrationError(f"{source}: no such file; check the path")
    identifier, _, config = source.partition(":")
    identifier = ALIASES.get(identifier, identifier)
    if identifier == "Salesforce/wikitext":
        config = config or "wikitext-2-raw-v1"
        lines = _rows(identifier, config, {"split": split}, "text", None)
        # its rows are the lines of one text, the empty ones among them
        return Text(f"{identifier}:{config}", split, ("\n\n".join(part) for part in [lines]))
    options: dict[str, Any] = {"split": split}
    if identifier == "allenai/c4" and not config and split in C4_FILES:
        options["data_files"] = {split: C4_FILES[split]}
        if split == "validation":  # as the official code of GPTQ, SparseGPT and Wanda evaluates C4
            documents = itertools.islice(_rows(identifier, None, options, column, seed), 1100)
            return Text(identifier, split, documents, joiner=" ", limit=256)
    name = f"{identifier}:{config}" if config else identifier
    return Text(name, split, _rows(identifier, config or None, options, column, seed))


def _open_file(path: Path, column: str, seed: int | None) -> Text:
    """Documents of a file: rows of JSON or Parquet, or parts of a text."""
    suffixes = set(path.suffixes)
    if not {".json", ".jsonl", ".parquet"} & suffixes:
        return Text(path.name, "file", _file_documents(path, seed))
    kind = "parquet" if ".parquet" in suffixes else "json"
    options = {"split": "train", "data_files": str(path)}
    return Text(path.name, "file", _rows(kind, None, options, column, seed, shown=str(path)))


def _file_documents(path: Path, seed: int | None) -> Iterator[str]:
    """Documents of a text file, in a seeded order."""
    import datasets

    with _explained(str(path)):
        rows = datasets.load_dataset("text", data_files=str(path), split="train", sample_by="document", streaming=True)
        text = "\n".join(row["text"] for row in rows)
    parts = re.split(rf"^{re.escape(SEPARATOR)}[ \t]*$", text, flags=re.MULTILINE)
    documents = [part.strip("\n") for part in parts if part.strip()]
    if seed is not None:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        documents = [documents[i] for i in order]
    yield from documents


def _rows(
    identifier: str,
    config: str | None,
    options: dict[str, Any],
    column: str,
    seed: int | None,
    shown: str | None = None,
) -> Iterator[str]:
    """Rows of a data set, streamed; in a seeded order where asked for. `shown` names it in errors."""
    import datasets

    shown = shown or identifier
    with _explained(shown):
        rows = datasets.load_dataset(identifier, config, streaming=True, **options)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for row in rows:
            if column not in row:
                raise CalibrationError(
                    f"{shown}: has no column {column!r}, only {', '.join(row)}; name one with --text-column"
                )
            if not isinstance(row[column], str | None):
                kind = type(row[column]).__name__
                raise CalibrationError(
                    f"{shown}: the column {column!r} holds {kind} where text belongs; name another with --text-column"
                )
            yield row[column] or ""


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what datasets and the Hub raise into one line of ours, and keep datasets from telling it besides."""
    from datasets import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{source}: the text cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            f"check the name, config and split of the data set, or give a text file"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that comes with a checkpoint.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    from sparsegpt_lite.blocks import quiet

    if not any(next(checkpoint.folder.glob(pattern), None) for pattern in VOCABULARIES):
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer (none of {', '.join(VOCABULARIES)}); copy it there from the base model"
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        tokenizer("a", verbose=False)["input_ids"]  # some faults show only then
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a broken file makes of the many tokenizer classes; Rust's panic is one
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer cannot be read ({one_line(error)}); copy it anew from the base model"
        ) from error


def draw(text: Text, tokenizer: Any, nsamples: int, seqlen: int, seed: int) -> Windows:
    """Draw calibration windows: documents, each with the tokenizer's own opening token, end to end, cut, chosen.

    Args:
        text: Shuffled documents; read until there are four times as many tokens as are drawn, or to their end.
        tokenizer: A tokenizer of transformers.
        nsamples: Windows.
        seqlen: Tokens per window.
        seed: Chooses which of the windows that do not overlap are taken, and where the first of them begins.

    Raises:
        CalibrationError: Too little text.
    """
    needed = nsamples * seqlen
    tokens: list[int] = []
    for document in filter(None, text.documents):
        tokens += tokenizer(document, verbose=False)["input_ids"]
        if len(tokens) >= SURPLUS * needed:
            break
    if len(tokens) < needed:
        raise CalibrationError(
            f"{text.name}: {len(tokens):,} tokens, but {nsamples} windows of {seqlen} need {needed:,}; "
            f"give more text, or lower --nsamples or --seqlen"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(len(tokens) % seqlen + 1, (1,), generator=generator))
    windows = torch.tensor(tokens[offset:])[: (len(tokens) - offset) // seqlen * seqlen].view(-1, seqlen)
    chosen = torch.randperm(len(windows), generator=generator)[:nsamples]
    return Windows(windows[chosen].contiguous(), text.name, text.split, "document")


def cut(text: Text, tokenizer: Any, seqlen: int, limit: int | None = None, bos: str = "text") -> Windows:
    """Cut a text into consecutive windows that do not overlap, as the papers do; the rest that fills none is left out.

    Args:
        text: Documents in their own order.
        tokenizer: A tokenizer of transformers.
        seqlen: Tokens per window.
        limit: At most so many windows, from the start; what the text's protocol says by default.
        bos: Where the tokenizer's opening token stands: `text`, once before the joined documents (the papers' rule),
            `document`, before each of them, or `window`, before each window.

    Raises:
        CalibrationError: Too little text for one window, or `window` for a tokenizer without an opening token.
    """
    limit = limit or text.limit
    if bos == "document":
        encoded = (tokenizer(document, verbose=False)["input_ids"] for document in filter(None, text.documents))
        enough = None if limit is None else limit * seqlen
        tokens = list(itertools.islice(itertools.chain.from_iterable(encoded), enough))
    else:
        joined = text.joiner.join(filter(None, text.documents))
        tokens = tokenizer(joined, verbose=False, add_special_tokens=bos == "text")["input_ids"]
    length = seqlen
    if bos == "window":
        if tokenizer.bos_token_id is None:
            raise CalibrationError("--bos window: this tokenizer has no opening token; use --bos text")
        length -= 1
    windows = torch.tensor(tokens)[: len(tokens) // length * length].view(-1, length)[:limit]
    if len(windows) == 0:
        raise CalibrationError(
            f"{text.name}: {len(tokens):,} tokens do not fill one window of {seqlen}; give more text, or lower --seqlen"
        )
    if bos == "window":
        windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows], dim=1)
    return Windows(windows.contiguous(), text.name, text.split, bos)


def window_length(asked: int | None, model_config: Any) -> int:
    """Tokens per window: what was asked for, else min(2048, longest context of the model). The config is transformers'.

    Raises:
        CalibrationError: The model has fewer positions than were asked for.
    """
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return asked or 2048
    if asked and asked > longest:
        raise CalibrationError(f"--seqlen {asked}: the model has {longest} positions; lower --seqlen")
    return asked or min(2048, longest)


def check_vocabulary(windows: Windows, model_config: Any) -> None:
    """Refuse what the model cannot read: tokens outside its vocabulary, or another shape than [windows, seqlen].

    Raises:
        CalibrationError: Saying which.
    """
    shape = list(windows.tokens.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise CalibrationError(f"{windows.dataset}: windows of shape {shape}; give [windows, seqlen], seqlen from 2")
    size, largest = model_config.get_text_config().vocab_size, int(windows.tokens.max())
    if largest >= size:
        raise CalibrationError(
            f"{windows.dataset}: token {largest} is outside the model's vocabulary of {size}; "
            f"use the tokenizer that came with the model"
        )
