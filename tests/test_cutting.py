"""Rows longer than a sequence: truncated, split or dropped, and nothing lost uncounted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tiny_model import save_tokenizer

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cutting import LONG_ROWS, cut_rows
from lora_advisor.probes.dataset import read_examples
from lora_advisor.probes.errors import DataError, UsageError
from lora_advisor.probes.layout import IGNORED, Encoded
from lora_advisor.probes.tokens import TokenisedData, encode, load_tokenizer, tokenize


def row(shown: str) -> Encoded:
    """Return a row of a token for each letter: capitals are trained, `|` marks the answers' ends.

    The first token is never trained.
    """
    letters = shown.replace("|", "")
    ends = [shown[:at].replace("|", "") for at, letter in enumerate(shown) if letter == "|"]
    labels = [ord(letter) if letter.isupper() else IGNORED for letter in letters]
    ids = [ord(letter) for letter in letters]
    return Encoded(ids=ids, labels=[IGNORED, *labels[1:]], ends=tuple(map(len, ends)))


def pieces(data: TokenisedData) -> list[str]:
    for piece in data.rows:
        assert piece["labels"][0] == IGNORED
        assert all(
            label in (token, IGNORED)
            for token, label in zip(piece["input_ids"], piece["labels"], strict=True)
        )
    return ["".join(map(chr, piece["input_ids"])) for piece in data.rows]


def test_a_text_goes_on_in_further_rows() -> None:
    data = cut_rows([row("ABCDEFGH"), row("ABC")], 3, "split")
    assert pieces(data) == ["ABC", "DEF", "GH", "ABC"]
    assert (data.split, data.pieces, data.truncated, data.dropped) == (1, 3, 0, 0)
    # Each piece's first token is predicted from nothing.
    trained = [token for piece in data.rows for token in piece["labels"] if token != IGNORED]
    assert "".join(map(chr, trained)) == "BCEFHBC"


def test_the_last_token_alone_teaches_nothing() -> None:
    data = cut_rows([row("ABCD")], 3, "split")
    assert (pieces(data), data.pieces, data.pieces_dropped) == (["ABC"], 1, 1)


def test_a_conversation_is_parted_behind_an_answer() -> None:
    data = cut_rows([row("xxAA|yyBB|zzCC")], 9, "split")
    assert pieces(data) == ["xxAAyyBB", "zzCC"]
    assert (data.split, data.pieces, data.pieces_dropped) == (1, 2, 0)


def test_an_answer_that_just_fits_is_kept_whole() -> None:
    assert pieces(cut_rows([row("xxAA|yyBB|zzCC")], 8, "split")) == ["xxAAyyBB", "zzCC"]


def test_a_conversation_without_such_a_place_is_parted_at_the_length() -> None:
    data = cut_rows([row("xxxxxxxxxA|yyBBBBBB")], 4, "split")
    # Two pieces of the long question teach nothing.
    assert pieces(data) == ["xA", "yyBB", "BBBB"]
    assert (data.split, data.pieces, data.pieces_dropped, data.dropped) == (1, 3, 2, 0)


def test_long_rows_are_dropped_or_truncated_where_that_is_asked_for() -> None:
    rows = [row("xA"), row("xxxxA"), row("xAAAA"), row("xx")]
    dropped = cut_rows(rows, 3, "drop")
    assert pieces(dropped) == ["xA"]
    assert (dropped.long_dropped, dropped.dropped, dropped.truncated) == (2, 1, 0)
    truncated = cut_rows(rows, 3, "truncate")
    assert pieces(truncated) == ["xA", "xAA"]
    assert (truncated.long_dropped, truncated.dropped, truncated.truncated) == (0, 2, 1)
    split = cut_rows(rows, 3, "split")
    assert pieces(split) == ["xA", "xA", "xAA", "AA"]
    assert (split.split, split.pieces, split.pieces_dropped, split.dropped) == (2, 3, 1, 1)


@pytest.mark.parametrize("long_rows", LONG_ROWS)
def test_every_row_is_counted_once(long_rows: str) -> None:
    draw = random.Random(0)
    rows = [
        row("".join(draw.choice("xxAA|") for _ in range(draw.randint(2, 40))) or "x")
        for _ in range(200)
    ]
    for seq_len in (2, 7, 16, 64):
        data = cut_rows(rows, seq_len, long_rows)
        untouched = len(data.rows) - data.pieces - data.truncated
        kept = untouched + data.split + data.truncated
        assert kept + data.dropped + data.long_dropped == len(rows)
        assert max(len(piece["input_ids"]) for piece in data.rows) <= seq_len
        if long_rows == "split":  # what is not lost is there in order
            whole = "".join("".join(map(chr, r.ids)) for r in rows)
            at = 0
            for piece in pieces(data):
                at = whole.index(piece, at) + len(piece)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(folder)
    return Architecture(name="tiny", hf_config={"vocab_size": 259}, weights=str(folder))


def test_the_pieces_of_a_chat_begin_with_a_question(
    tmp_path: Path, architecture: Architecture
) -> None:
    turns = [
        {"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")
    ]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": turns}), "utf-8")
    tokenizer, examples = load_tokenizer(architecture), read_examples(file)
    (whole,) = encode(examples, tokenizer)
    data = tokenize(examples, tokenizer, len(whole.ids) // 2 + 2, long_rows="split")

    first, second = (str(tokenizer.decode(piece["input_ids"])) for piece in data.rows)
    assert first.endswith("assistant 1<|im_end|>\n")
    assert second.startswith("<|im_start|>user\nuser 2<|im_end|>")
    assert second.endswith("assistant 3<|im_end|>")
    assert first + second == tokenizer.decode(whole.ids)


def test_what_leaves_nothing_is_refused(tmp_path: Path, architecture: Architecture) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "aaaa", "completion": "b"}', "utf-8")
    tokenizer, examples = load_tokenizer(architecture), read_examples(file)
    with pytest.raises(DataError, match="rows of at most 8 tokens with an answer, but none of its"):
        tokenize(examples, tokenizer, 8, long_rows="drop")
    with pytest.raises(UsageError, match="`long_rows` must be truncate, split, drop, but got 'x'"):
        tokenize(examples, tokenizer, 8, long_rows="x")
