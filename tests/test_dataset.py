from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tokenizer

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.dataset import Examples, Turn, read_examples
from lora_advisor.probes.errors import DataError, MissingInputError
from lora_advisor.probes.tokens import (
    TokenisedData,
    check_vocabulary,
    length_quantiles,
    load_tokenizer,
    split_holdout,
    tokenize,
)

ASKED = (Turn(role="user", content="2+2?"), Turn(role="assistant", content="4"))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("shape", "row", "turns"),
    [
        ("prompt/completion", {"prompt": "2+2?", "completion": "4"}, ASKED),
        ("question/answer", {"question": "2+2?", "answer": 4, "id": 7}, ASKED),
        ("instruction", {"instruction": "2+2?", "output": "4"}, ASKED),
        ("instruction", {"instruction": "2+2?", "input": "", "output": "4"}, ASKED),
        (
            "instruction",
            {"instruction": "Add", "input": "2 2", "output": "4"},
            (Turn(role="user", content="Add\n\n2 2"), ASKED[1]),
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "2+2?"},
                    {"role": "assistant", "content": "4"},
                ]
            },
            ASKED,
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
                    {"role": "assistant", "content": "4"},
                ]
            },
            ASKED,
        ),
        (
            "ShareGPT",
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            ASKED,
        ),
        ("text", {"text": "two"}, (Turn(role="text", content="two"),)),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_the_columns_say_the_shape(
    tmp_path: Path, shape: str, row: dict[str, Any], turns: tuple[Turn, ...], ending: str
) -> None:
    text = json.dumps([row]) if ending == "json" else f"\n{json.dumps(row)}\n\n"
    examples = read_examples(written(tmp_path / f"rows.{ending}", text))
    assert examples.shape == shape
    assert [example.turns for example in examples.rows] == [turns]


def test_csv_is_read_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.csv", '\ufeffprompt,completion\n"a, ""b""\nc",4\nx,5\n')
    examples = read_examples(file)
    assert [row.turns[0].content for row in examples.rows] == ['a, "b"\nc', "x"]
    assert [row.turns[1].content for row in examples.rows] == ["4", "5"]


def test_a_row_knows_its_line(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.line for row in read_examples(file).rows] == [1, 3]


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", " \n\n", "must hold at least one row, but it is empty"),
        ("a.json", "[]", "must hold at least one row, but it has none"),
        ("a.csv", "prompt,completion\n", "must hold at least one row, but it has none"),
        ("a.jsonl", GOOD + "{'prompt': 1}\n", "line 2 must be one JSON object"),
        ("a.jsonl", GOOD + GOOD[:20], "line 2 must be one JSON object"),
        ("a.json", '[{"text": "a"},', "must be a JSON array, but it cannot be read"),
        ("a.jsonl", GOOD + "[1]\n", "row 2 must be a JSON object, but it is a list"),
        ("a.jsonl", '{"q": 1, "a": 2}\n', "row 1 has the columns q, a, but must have .*messages"),
        ("a.jsonl", GOOD + '{"prompt": "a"}\n', "row 2 must have the column `completion`"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": null}',
            "`completion` must be text, but got null",
        ),
        ("a.jsonl", '{"messages": "hi"}', "row 1 must hold a list of turns, but got a text"),
        ("a.jsonl", '{"messages": []}', "row 1 must hold a list of turns, but got a list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "must have `role` and `content`"),
        ("a.jsonl", '{"messages": [{"role": "x", "content": "a"}]}', "`role` must be one of .*'x'"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "must have a turn of the assistant",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "`content` must be text, but got a list",
        ),
        ("a.csv", "prompt,completion\na\n", "line 2 must have as many cells as the header"),
        ("a.csv", "prompt,completion\na,b,c\n", "line 2 must have as many cells as the header"),
        ("a.csv", 'prompt,completion\n"a,b\n', "must be CSV, but unexpected end of data"),
        ("a.xlsx", "PAR1", "must end in one of .jsonl"),
        ("a.parquet", "PAR1", "must be a parquet file, but .* size is 4 bytes"),
    ],
)
def test_a_bad_file_gives_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        read_examples(written(tmp_path / name, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_binary_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"none\.jsonl` must be a data file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="must be UTF-8 text, but byte 10 is not"):
        read_examples(tmp_path / "a.jsonl")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(folder)
    return Architecture(name="tiny", hf_config={"vocab_size": 259}, weights=str(folder))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder, chat=False)
    return Architecture(name="tiny", hf_config={"vocab_size": 259}, weights=str(folder))


def tokenised(path: Path, model: Architecture, *rows: object, seq_len: int = 999) -> TokenisedData:
    file = written(path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return tokenize(read_examples(file), load_tokenizer(model), seq_len)


def shown(data: TokenisedData, model: Architecture) -> list[tuple[str, str]]:
    """Return (what the model sees, what of it is trained) of every row."""
    tokenizer = load_tokenizer(model)
    pairs = []
    for row in data.rows:
        trained = [label for label in row["labels"] if label != -100]
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (-100, token)
        pairs.append((str(tokenizer.decode(row["input_ids"])), str(tokenizer.decode(trained))))
    return pairs


def test_padding_is_not_the_end_of_sequence(chat_model: Architecture) -> None:
    tokenizer = load_tokenizer(chat_model)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.eos_token == "<|im_end|>"


def test_only_the_completion_and_the_end_are_trained(
    tmp_path: Path, chat_model: Architecture, base_model: Architecture
) -> None:
    row = {"prompt": "2+2?", "completion": "4."}
    assert shown(tokenised(tmp_path, chat_model, row), chat_model) == [
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>", "4.<|im_end|>")
    ]
    assert shown(tokenised(tmp_path, base_model, row), base_model) == [
        ("2+2?4.<|im_end|>", "4.<|im_end|>")
    ]
    row = {"question": "2+2?", "answer": "4."}
    assert shown(tokenised(tmp_path, base_model, row), base_model) == [
        ("### User:\n2+2?\n\n### Assistant:\n4.<|im_end|>", "4.<|im_end|>")
    ]


CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Bye"},
        {"role": "user", "content": "unanswered"},
    ]
}


def test_every_turn_of_the_assistant_is_trained_and_no_other(
    tmp_path: Path, chat_model: Architecture, base_model: Architecture
) -> None:
    assert shown(tokenised(tmp_path, chat_model, CHAT), chat_model) == [
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
            "<|im_start|>assistant\nBye<|im_end|>",
            "Ho<|im_end|>Bye<|im_end|>",
        )
    ]
    assert shown(tokenised(tmp_path, base_model, CHAT), base_model) == [
        (
            "### System:\nBe kind.\n\n### User:\nHi\n\n### Assistant:\nHo<|im_end|>"
            "### User:\nAnd?\n\n### Assistant:\nBye<|im_end|>",
            "Ho<|im_end|>Bye<|im_end|>",
        )
    ]


def test_plain_text_is_trained_whole(tmp_path: Path, base_model: Architecture) -> None:
    data = tokenised(tmp_path, base_model, {"text": "abc"})
    # Nothing predicts the first token.
    assert shown(data, base_model) == [("abc<|im_end|>", "bc<|im_end|>")]


def test_long_rows_are_cut_and_rows_without_an_answer_dropped(
    tmp_path: Path, base_model: Architecture
) -> None:
    rows = [
        {"prompt": "aaaa", "completion": "b"},  # 6 tokens with the end
        {"prompt": "aaaa", "completion": "bbbb"},  # 9: cut to "aaaabb"
        {"prompt": "aaaaaa", "completion": "b"},  # 8: no answer left
        {"prompt": "aaaa", "completion": " "},  # 6: no answer to begin with
    ]
    data = tokenised(tmp_path, base_model, *rows, seq_len=6)
    assert shown(data, base_model) == [("aaaab<|im_end|>", "b<|im_end|>"), ("aaaabb", "bb")]
    assert (data.truncated, data.dropped, data.lengths) == (1, 2, (6, 9, 8, 6))
    with pytest.raises(DataError, match="answers that begin within 4 tokens, but none of its 4"):
        tokenised(tmp_path, base_model, *rows, seq_len=4)


def test_what_the_template_refuses_is_said_with_its_row(
    tmp_path: Path, chat_model: Architecture
) -> None:
    rows = [{"messages": [{"role": "tool", "content": "x"}, *CHAT["messages"]]}]
    with pytest.raises(DataError, match=r"row 1 must suit the model's chat template.*no role tool"):
        tokenised(tmp_path, chat_model, *rows)


def test_a_model_without_weights_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="only its figures are here"):
        load_tokenizer(Architecture(name="tiny", hf_config={}))
    with pytest.raises(MissingInputError, match="tokenizer of `tiny` must lie with its weights"):
        load_tokenizer(Architecture(name="tiny", hf_config={}, weights=str(tmp_path)))


def test_the_tokenizer_of_another_model_is_refused() -> None:
    small = Architecture(name="tiny", hf_config={"vocab_size": 10})
    with pytest.raises(DataError, match="below the model's 10 tokens, but gives token 10"):
        check_vocabulary([{"input_ids": [1, 10], "labels": [-100, 10]}], small)


def test_the_holdout_is_the_same_for_the_same_seed_and_never_trained_on() -> None:
    rows = [{"input_ids": [n], "labels": [n]} for n in range(50)]
    train, held = split_holdout(rows, 0.1, seed=3)
    assert (train, held) == split_holdout(rows, 0.1, seed=3)
    assert held != split_holdout(rows, 0.1, seed=4)[1]
    assert len(held) == 5
    assert sorted(row["input_ids"][0] for row in train + held) == list(range(50))
    assert split_holdout(rows, 0.0) == (rows, [])
    with pytest.raises(DataError, match="must have more than 1 usable rows"):
        split_holdout(rows[:1], 0.1)


def test_quantiles_are_lengths_that_cover_the_share() -> None:
    lengths = list(range(100, 0, -1))
    assert length_quantiles(lengths) == {0.5: 50, 0.9: 90, 0.95: 95, 0.99: 99, 1.0: 100}
    assert length_quantiles([7]) == {0.5: 7, 0.9: 7, 0.95: 7, 0.99: 7, 1.0: 7}
    assert length_quantiles([]) == {}


def test_the_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    def read(text: str) -> Examples:
        return read_examples(written(tmp_path / "rows.jsonl", text))

    assert len(read('{"text": "a"}\n').sha256) == 64
    assert read('{"text": "a"}\n').sha256 != read('{"text": "b"}\n').sha256
