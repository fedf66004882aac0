"""Which tokens: documents from every kind of file, windows that are drawn once each, and the papers' three cuts."""

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from sparsegpt_lite.calibration import Text, Windows, cut, draw, load_tokenizer, open_text, window_length
from sparsegpt_lite.checkpoint import Checkpoint
from sparsegpt_lite.errors import CalibrationError, CheckpointError

BOS = 256
DOCUMENTS = ["first document,\nof two lines", "second: ünï", "third\n\nwith a blank line", "fourth"]


class Numbers:
    """A tokenizer whose tokens are the numbers that a text is written in, so that each tells where it stood."""

    bos_token_id = -1

    def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [-1] * add_special_tokens + [int(word) for word in text.split()]}


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


def of(*documents: str, **fields: Any) -> Text:
    return Text("text", "file", documents, **fields)


@pytest.fixture
def tokenizer(checkpoint: Callable[..., Path]) -> Any:
    """One token a byte, behind <bos>."""
    return load_tokenizer(Checkpoint(checkpoint("llama")))


# ---- open_text -------------------------------------------------------------------------------------------------------


def write_txt(path: Path) -> None:
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS) + "\n", encoding="utf-8")


def write_txt_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("\n<|endoftext|>\n".join(DOCUMENTS).encode()))


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": document, "n": i} for i, document in enumerate(DOCUMENTS)]))


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))


def write_jsonl_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS).encode()))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": DOCUMENTS, "n": list(range(len(DOCUMENTS)))}), path)


FILES = {
    "a.txt": write_txt,
    "a.md": write_txt,
    "no_suffix": write_txt,
    "a.txt.gz": write_txt_gz,
    "a.json": write_json,
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_jsonl_gz,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_documents_of_a_file(name, tmp_path):
    FILES[name](tmp_path / name)
    text = open_text(str(tmp_path / name), "train")
    assert list(text.documents) == DOCUMENTS
    assert (text.name, text.split, text.limit) == (name, "file", None)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_order_of_documents_follows_the_seed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s a shuffled Parquet
    FILES[name](tmp_path / name)
    orders = {seed: list(open_text(str(tmp_path / name), "train", seed=seed).documents) for seed in range(8)}
    assert all(sorted(order) == sorted(DOCUMENTS) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 1
    assert list(open_text(str(tmp_path / name), "train", seed=3).documents) == orders[3]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one text\nof two lines\n", ["one text\nof two lines"]),
        ("a\n\nb\n\n\nc", ["a\n\nb\n\n\nc"]),
        ("<|endoftext|>\na\n<|endoftext|>\n", ["a"]),
        ("a\n<|endoftext|>\n<|endoftext|>\n \n<|endoftext|>\nb\n", ["a", "b"]),
        ("a <|endoftext|> b\n<|endoftext|> c\n", ["a <|endoftext|> b\n<|endoftext|> c"]),  # no line of its own
        ("a\r\n<|endoftext|>\r\nb\r\n", ["a", "b"]),
        ("  indented\n<|endoftext|>\n\tb  \n", ["  indented", "\tb  "]),
        ("", []),
        ("\n<|endoftext|>\n\n", []),
    ],
)
def test_separators_of_a_text_file(content, documents, tmp_path):
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert list(open_text(str(tmp_path / "a.txt"), "train").documents) == documents


def test_large_text_file_is_one_document(tmp_path):
    content = "\n".join(f"line {i} of the text" for i in range(200_000))  # more than datasets reads at once
    (tmp_path / "a.txt").write_text(content)
    assert list(open_text(str(tmp_path / "a.txt"), "train").documents) == [content]


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}\n')
    assert list(open_text(str(tmp_path / "a.jsonl"), "train", column="body").documents) == ["x"]


def test_column_that_is_not_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "title": "y"}\n')
    with pytest.raises(CalibrationError, match="no column 'text', only body, title; name one with --text-column"):
        list(open_text(str(tmp_path / "a.jsonl"), "train").documents)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_txt(tmp_path / "a.txt")
    assert list(open_text("~/a.txt", "train").documents) == DOCUMENTS


@pytest.mark.parametrize(
    "name", ["nowhere.txt", "nowhere.json", "nowhere.jsonl", "nowhere.parquet", "nowhere.jsonl.gz"]
)
def test_file_that_is_not_there(name):
    with pytest.raises(CalibrationError, match=rf"{name}: no such file"):
        open_text(name, "train")


def test_documents_of_a_file_can_be_read_in_part(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": numbers(0, 50)}) + "\n" for _ in range(1000)))
    text = open_text(str(tmp_path / "a.jsonl"), "train", seed=0)
    assert draw(text, Numbers(), 2, 10, seed=0).tokens.shape == (2, 10)


# ---- draw ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 101, 109, 110, 150, 399, 400, 401, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_windows_are_pieces_of_the_text_that_do_not_overlap(length, seed):
    windows = draw(of(numbers(0, length - 1)), Numbers(), 10, 10, seed).tokens
    assert (windows.shape, windows.dtype) == ((10, 10), torch.int64)
    starts = windows[:, 0]
    assert torch.equal(windows, starts[:, None] + torch.arange(10))
    assert len(starts.unique()) == 10
    assert starts.sort().values.diff().ge(10).all()
    assert len((starts % 10).unique()) == 1
    assert windows.min() >= -1
    assert windows.max() < length - 1


def test_windows_reach_across_documents_each_behind_its_opening_token():
    windows = draw(of(numbers(0, 7), "", numbers(7, 14), numbers(14, 20)), Numbers(), 1, 23, seed=0)
    expected = [-1, *range(7), -1, *range(7, 14), -1, *range(14, 20)]
    assert windows.tokens.tolist() == [expected]
    assert (windows.bos, windows.dataset, windows.split) == ("document", "text", "file")


def test_opening_token_stands_before_each_document(tokenizer):
    windows = draw(of("abc", "de", "fghi"), tokenizer, 1, 12, seed=0).tokens
    assert [tokenizer.decode(part) for part in tokens_between(windows[0], BOS)] == ["abc", "de", "fghi"]
    assert windows[0, 0] == BOS


def tokens_between(tokens: Tensor, mark: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for token in tokens.tolist():
        if token == mark:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_as_many_windows_as_the_text_has(spare):
    windows = draw(of(numbers(0, 49 + spare)), Numbers(), 5, 10, seed=1).tokens
    assert len(windows.unique(dim=0)) == 5


@pytest.mark.parametrize("length", [0, 1, 49])
def test_too_little_text_to_draw_from(length):
    documents = [numbers(0, length - 1)] if length > 1 else [""] * length
    tokens = length if length > 1 else 0
    with pytest.raises(CalibrationError) as error:
        draw(of(*documents), Numbers(), 5, 10, seed=0)
    assert str(error.value).startswith(f"text: {tokens} tokens, but 5 windows of 10 need 50; give more text")


def test_documents_are_read_until_there_are_four_times_as_many_tokens():
    read = []
    documents = (read.append(i) or numbers(0, 9) for i in range(1000))
    draw(Text("text", "file", documents), Numbers(), 5, 10, seed=0)
    assert len(read) == 20


def test_same_seed_same_digest(text_file, tokenizer):
    first, again, other = (
        draw(open_text(str(text_file), "train", seed=seed), tokenizer, 16, 32, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert first.describe() == again.describe()


def test_single_long_document_gives_every_seed_other_windows():
    text = of(numbers(0, 5000))
    starts = {seed: set(draw(text, Numbers(), 8, 10, seed).tokens[:, 0].tolist()) for seed in range(6)}
    assert len({frozenset(s) for s in starts.values()}) == 6
    assert len({min(s) % 10 for s in starts.values()}) > 1  # they begin elsewhere too
    assert max(max(s) for s in starts.values()) > 4000  # and lie anywhere in the text


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw(of(numbers(0, 200)), Numbers(), 5, 10, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


# ---- Windows ---------------------------------------------------------------------------------------------------------


def test_digest_is_of_shape_and_little_endian_tokens():
    tokens = torch.arange(6).view(2, 3)
    windows = Windows(tokens, "data", "test", "text")
    packed = b"".join(int(token).to_bytes(8, "little") for token in range(6))
    assert windows.digest == hashlib.sha256(b"[2, 3]" + packed).hexdigest()
    assert windows.digest != Windows(tokens.view(3, 2), "data", "test", "text").digest
    assert windows.digest == Windows(tokens.int().T.contiguous().T, "other", "train", "window").digest
    origin = {"dataset": "data", "split": "test", "bos": "text", "digest": windows.digest}
    assert windows.describe() == origin | {"windows": 2, "seqlen": 3, "tokens": 6}


# ---- cut -------------------------------------------------------------------------------------------------------------


def test_opening_token_before_the_text():
    windows = cut(of(numbers(0, 5), numbers(5, 12)), Numbers(), 4)
    assert windows.tokens.tolist() == [[-1, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert (windows.bos, windows.dataset, windows.split) == ("text", "text", "file")


def test_opening_token_before_each_document():
    windows = cut(of(numbers(0, 5), "", numbers(5, 12)), Numbers(), 4, bos="document")
    assert windows.tokens.tolist() == [[-1, 0, 1, 2], [3, 4, -1, 5], [6, 7, 8, 9]]
    assert windows.bos == "document"


def test_opening_token_before_each_window():
    windows = cut(of(numbers(0, 5), numbers(5, 13)), Numbers(), 4, bos="window")
    assert windows.tokens.tolist() == [[-1, 0, 1, 2], [-1, 3, 4, 5], [-1, 6, 7, 8], [-1, 9, 10, 11]]
    assert windows.bos == "window"


def test_opening_token_before_each_window_of_a_tokenizer_without_one():
    tokenizer = Numbers()
    tokenizer.bos_token_id = None
    with pytest.raises(CalibrationError, match="no opening token; use --bos text"):
        cut(of(numbers(0, 50)), tokenizer, 4, bos="window")


@pytest.mark.parametrize("bos", ["text", "document", "window"])
def test_rules_by_a_tokenizer_of_transformers(bos, tokenizer):
    tokens = cut(of("abcde", "fghij"), tokenizer, 4, bos=bos).tokens
    opening = {
        "text": [[True, False, False, False]] + [[False] * 4] * 2,
        "document": [[True, False, False, False], [False, False, True, False], [False] * 4],
        "window": [[True, False, False, False]] * 4,
    }
    assert (tokens == BOS).tolist() == opening[bos]


def test_documents_are_joined_by_blank_lines(tokenizer):
    tokens = cut(of("ab", "cd", "ef"), tokenizer, 11).tokens
    assert tokenizer.decode(tokens[0, 1:]) == "ab\n\ncd\n\nef"
    tokens = cut(of("ab", "cd", "ef", joiner=" "), tokenizer, 9).tokens
    assert tokenizer.decode(tokens[0, 1:]) == "ab cd ef"


def test_documents_are_not_joined_where_each_has_its_opening_token(tokenizer):
    tokens = cut(of("ab", "cd", "ef"), tokenizer, 9, bos="document").tokens
    assert [tokenizer.decode(part) for part in tokens_between(tokens[0], BOS)] == ["ab", "cd", "ef"]


@pytest.mark.parametrize("bos", ["text", "document", "window"])
@pytest.mark.parametrize("length", [30, 31, 32, 35, 39, 40])
def test_rest_that_fills_no_window_is_left_out(length, bos):
    content = length - (bos != "window")  # numbers in the text
    step = 10 - (bos == "window")
    windows = cut(of(numbers(0, content)), Numbers(), 10, bos=bos).tokens
    assert windows.shape == (length // step, 10)
    flat = windows[windows >= 0]
    assert flat.tolist() == list(range(len(flat)))
    assert len(flat) + step > content - 1


@pytest.mark.parametrize("bos", ["text", "document", "window"])
@pytest.mark.parametrize(
    ("own", "asked", "count"), [(None, 3, 3), (2, None, 2), (2, 4, 4), (99, None, 5), (None, 99, 5)]
)
def test_limit(own, asked, count, bos):
    text = of(numbers(0, 50 - (bos != "window") - 5 * (bos == "window")), limit=own)
    limited = cut(text, Numbers(), 10, asked, bos).tokens
    assert len(limited) == count
    assert torch.equal(limited, cut(of(*text.documents), Numbers(), 10, None, bos).tokens[:count])


def test_limit_ends_the_reading_of_documents():
    documents = (numbers(i, i + 9) if i < 90 else pytest.fail("read on") for i in range(0, 900, 9))
    assert cut(Text("text", "file", documents), Numbers(), 10, 4, "document").tokens.shape == (4, 10)


@pytest.mark.parametrize("bos", ["text", "document", "window"])
@pytest.mark.parametrize("documents", [[], [""], [numbers(0, 8)]])
def test_too_little_text_to_cut(documents, bos):
    with pytest.raises(CalibrationError, match=r"text: .*one window of 10"):
        cut(of(*documents), Numbers(), 10, bos=bos)


@pytest.mark.parametrize("bos", ["text", "document", "window"])
def test_rows_without_text_are_left_out(bos):
    with_none, without = [numbers(0, 20), None, numbers(20, 40)], [numbers(0, 20), numbers(20, 40)]
    first, second = cut(of(*with_none), Numbers(), 10, bos=bos), cut(of(*without), Numbers(), 10, bos=bos)
    assert torch.equal(first.tokens, second.tokens)


# ---- window_length, load_tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "seqlen"),
    [
        ("llama", {}, 64),
        ("llama", {"max_position_embeddings": 2048}, 2048),
        ("llama", {"max_position_embeddings": 131072}, 2048),
        ("gpt2", {}, 64),  # calls it n_positions
        ("opt", {}, 64),
        ("bloom", {}, 2048),  # has no such limit
    ],
)
def test_default_seqlen(family, options, seqlen, checkpoint):
    assert window_length(None, AutoConfig.from_pretrained(checkpoint(family, **options))) == seqlen


@pytest.mark.parametrize("longest", [None, 0, -1, "long"])
def test_default_seqlen_of_an_odd_config(longest):
    config = SimpleNamespace(max_position_embeddings=longest)
    config.get_text_config = lambda: config
    assert window_length(None, config) == 2048


def test_default_seqlen_looks_at_the_text_model():
    config = SimpleNamespace(
        max_position_embeddings=7, get_text_config=lambda: SimpleNamespace(max_position_embeddings=99)
    )
    assert window_length(None, config) == 99


def test_folder_without_a_tokenizer(checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint("llama") / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"no tokenizer \(none of tokenizer.json, .*; copy it there"):
        load_tokenizer(Checkpoint(tmp_path))
