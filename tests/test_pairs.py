"""Preference pairs in the forms of TRL and LLaMA-Factory; what is none is refused in a sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes.errors import DataError
from lora_advisor.probes.pairs import Pair, Pairs, read_pairs
from lora_advisor.probes.turns import Turn

ASK = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
TOOL = {"type": "function", "function": {"name": "add"}}


def turn(message: dict[str, str]) -> Turn:
    return Turn(role=message["role"], content=message["content"])


def read(folder: Path, *rows: dict[str, Any]) -> Pairs:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return read_pairs(file)


def only(pairs: Pairs) -> Pair:
    (pair,) = pairs.rows
    return pair


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": 4, "rejected": 5},
        {"question": "2+2?", "chosen": "4", "rejected": "5", "id": 7},
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": "4", "rejected": "5"},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "2+2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
        {"chosen_messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]},
    ],
)
def test_every_form_of_a_pair_gives_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    pair = only(read(tmp_path, row))
    assert pair.prompt == (turn(ASK),)
    assert (pair.chosen, pair.rejected) == ((turn(GOOD),), (turn(BAD),))
    assert (pair.line, Path(pair.file).name) == (1, "pairs.jsonl")


def test_texts_without_a_prompt_are_parted_as_trl_does(tmp_path: Path) -> None:
    from trl import extract_prompt

    row = {
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: It is 4.",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: It is 5.",
    }
    pair = only(read(tmp_path, row))
    parted = {
        name: [(part.role, part.content) for part in getattr(pair, name)]
        for name in ("prompt", "chosen", "rejected")
    }
    assert parted == {name: [("text", said)] for name, said in extract_prompt(row).items()}
    assert parted["chosen"] == [("text", " 4.")]


def test_what_both_conversations_have_alike_is_the_prompt(tmp_path: Path) -> None:
    more = {"role": "user", "content": "Sure?"}
    row = {"chosen": [ASK, GOOD, more, GOOD], "rejected": [ASK, GOOD, more, BAD]}
    pair = only(read(tmp_path, row))
    assert pair.prompt == (turn(ASK), turn(GOOD), turn(more))
    pair = only(read(tmp_path, {"chosen": [ASK, GOOD, more, GOOD], "rejected": [ASK, BAD]}))
    assert pair.prompt == (turn(ASK),)
    assert pair.chosen == (turn(GOOD), turn(more), turn(GOOD))
    same = only(read(tmp_path, {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}))
    assert (same.prompt, same.chosen) == ((turn(ASK),), (turn(GOOD),))


def test_system_input_and_tools_belong_to_the_prompt(tmp_path: Path) -> None:
    row = {"system": "Be kind.", "question": "2+2?", "chosen": "4", "rejected": "5"}
    assert only(read(tmp_path, row)).prompt == (
        Turn(role="system", content="Be kind."),
        turn(ASK),
    )
    row = {"instruction": "Add", "input": "2 2", "chosen": "4", "rejected": "5"}
    assert only(read(tmp_path, row)).prompt == (Turn(role="user", content="Add\n\n2 2"),)
    pair = only(read(tmp_path, {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD],
                                "tools": json.dumps([TOOL])}))  # fmt: skip
    assert pair.tools == [TOOL]


def test_an_answer_that_is_json_stays_a_text(tmp_path: Path) -> None:
    pair = only(read(tmp_path, {"prompt": "As JSON", "chosen": '{"a": 1}', "rejected": "[]"}))
    assert [pair.chosen[0].content, pair.rejected[0].content] == ['{"a": 1}', "[]"]


def test_pairs_are_read_from_csv_and_their_columns_told(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}]
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert only(pairs).chosen == (turn(GOOD),)
    assert pairs.columns == ("chosen", "rejected", "prompt")
    assert len(pairs.sha256) == 64


WHOLE = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 2 must have `chosen` and `rejected` for stage dpo"),
        ({"prompt": "a", "completion": "b"}, "prompt/completion is for stage sft"),
        (
            {"messages": [ASK, GOOD], "label": True},
            "single answers with a `label` are for KTO, which is not trained here",
        ),
        ({**WHOLE, "chosen": None}, "row 2: `chosen` must hold an answer, but is empty"),
        ({**WHOLE, "rejected": ""}, "row 2: `rejected` must hold an answer, but is empty"),
        ({**WHOLE, "chosen": {"a": 1}}, "`chosen` must be text or turns, but got an object"),
        ({**WHOLE, "chosen": ["4", "5"]}, "`chosen` must be text or turns, but got a list"),
        ({**WHOLE, "prompt": ["a"]}, "every turn must have `role` and `content`"),
        ({**WHOLE, "prompt": [ASK], "chosen": [ASK]}, "must have a turn of the assistant"),
        (
            {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "3+3?"}, BAD]},
            "must have one prompt for both answers, but `chosen` and `rejected` begin differently",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "must have one prompt for both answers"),
        ({"chosen": "yes", "rejected": "no"}, "must have a `prompt`, or two texts that begin"),
        ({"chosen": "a b", "rejected": "a b"}, "must have a `prompt`, or two texts that begin"),
        (
            {"instruction": "a", "input": "b", "chosen": [GOOD], "rejected": [BAD]},
            "answers that are text beside `instruction` and `input`, but they are turns",
        ),
    ],
)
def test_what_is_no_pair_gives_one_sentence(
    tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        read(tmp_path, WHOLE, row)
    assert "row 2" in str(caught.value) and "\n" not in str(caught.value)
