"""Shapes by their columns, what each column says, and what a chat template makes of tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import CHAT_TEMPLATE, save_tokenizer

from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.dataset import Example, Examples, Turn, read_examples
from lora_advisor.probes.errors import DataError
from lora_advisor.probes.layout import unseen
from lora_advisor.probes.tokens import load_tokenizer, tokenize

USER, ASSISTANT = Turn(role="user", content="2+2?"), Turn(role="assistant", content="4")
SYSTEM = Turn(role="system", content="Be kind.")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds."}}

#: A template that knows tools, their calls and reasoning, as those of recent models do.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(folder: Path, *rows: object) -> Examples:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_examples(file)


def message(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def only(examples: Examples) -> Example:
    (row,) = examples.rows
    return row


@pytest.mark.parametrize(
    ("shape", "row", "turns"),
    [
        ("HumanEval", {"task_id": 1, "prompt": "2+2?", "canonical_solution": "4", "test": ""}, ()),
        ("prompt/response", {"prompt": "2+2?", "response": "4"}, ()),
        ("input/output", {"input": "2+2?", "output": 4}, ()),
        ("instruction/response", {"instruction": "2+2?", "context": "", "response": "4"}, ()),
        (
            "instruction/response",
            {"instruction": "Add", "context": "2 2", "response": "4"},
            (Turn(role="user", content="Add\n\n2 2"), ASSISTANT),
        ),
        (
            "instruction",
            {"instruction": "", "input": "2+2?", "output": "4", "system": "Be kind."},
            (SYSTEM, USER, ASSISTANT),
        ),
        (
            "instruction",
            {"instruction": "2+2?", "output": "4", "history": [["Hi", "Ho"]]},
            (
                Turn(role="user", content="Hi"),
                Turn(role="assistant", content="Ho"),
                USER,
                ASSISTANT,
            ),
        ),
        (
            "prompt/completion",
            {
                "prompt": [message("user", "2+2?")],
                "completion": [message("assistant", "4")],
            },
            (),
        ),
        ("messages", {"messages": [{"from": "human", "value": "2+2?"}, message("bot", "4")]}, ()),
        (
            "messages",
            {"messages": [message("developer", "Be kind."), message("user", "2+2?"),
                          message("assistant", "4")]},
            (SYSTEM, USER, ASSISTANT),
        ),
        (
            "ShareGPT",
            {"conversations": [message("user", "2+2?"), message("assistant", "4")],
             "system": "Be kind."},
            (SYSTEM, USER, ASSISTANT),
        ),
        ("content", {"content": "two", "path": "a.py"}, (Turn(role="text", content="two"),)),
    ],
)  # fmt: skip
def test_the_columns_say_the_shape(
    tmp_path: Path, shape: str, row: dict[str, Any], turns: tuple[Turn, ...]
) -> None:
    examples = read(tmp_path, row)
    assert examples.shape == shape
    assert only(examples).turns == (turns or (USER, ASSISTANT))


def test_what_decided_the_shape_and_what_is_not_read_is_told(tmp_path: Path) -> None:
    row = {"id": 1, "instruction": "a", "output": "b", "input": "c", "topic": "d"}
    examples = read(tmp_path, row)
    assert examples.columns == ("instruction", "output", "input")
    assert examples.unused == ("id", "topic")


def test_parts_of_a_message_are_text_reasoning_and_calls(tmp_path: Path) -> None:
    said = [
        {"type": "reasoning", "value": "Sum."},
        {"type": "text", "text": "Well: "},
        {"type": "text", "value": "adding"},
        {"type": "tool_call", "value": json.dumps(CALL["function"])},
    ]
    row = {"messages": [message("user", "2+2?"), message("assistant", said)]}
    _, turn = only(read(tmp_path, row)).turns
    more = {"reasoning_content": "Sum.", "tool_calls": [CALL]}
    assert turn == Turn(role="assistant", content="Well: adding", more=more)


def test_calls_of_tools_are_taken_as_openai_and_arrow_write_them(tmp_path: Path) -> None:
    written = {"id": "1", "function": {"name": "add", "arguments": json.dumps({"a": 2, "b": 2})}}
    nulls = {"function": {"name": "add", "arguments": {"a": 2, "b": 2, "c": None}}}
    for call in (written, nulls, CALL["function"]):
        row = {
            "messages": [
                message("user", "2+2?"),
                message("assistant", None, tool_calls=[call]),
                message("tool", "4", tool_call_id="1"),
            ],
            "tools": json.dumps([TOOL]),
        }
        example = only(read(tmp_path, row))
        taken = {"id": "1", **CALL} if call is written else CALL
        assert example.turns[1] == Turn(role="assistant", content="", more={"tool_calls": [taken]})
        assert example.turns[2].more == {"tool_call_id": "1"}
        assert example.tools == [TOOL]


def test_a_call_in_sharegpt_is_a_call_and_no_text(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "4"},
        {"from": "function_call", "value": "add(2, 2)"},
    ]
    _, call, result, text = only(read(tmp_path, {"conversations": turns})).turns
    assert call == Turn(role="assistant", content="", more={"tool_calls": [CALL]})
    assert result == Turn(role="tool", content="4")
    assert text == Turn(role="assistant", content="add(2, 2)")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference .`chosen` and `rejected`"),
        (
            {"conversations": [], "chosen": {}, "rejected": {}},
            "row 1 has the shape preference .*a bad answer are for stage dpo, but stage sft",
        ),
        ({"chosen_messages": [], "rejected_messages": []}, "preference .`chosen_messages`"),
        (
            {"messages": [message("assistant", "b")], "label": False},
            r"has the shape preference \(`label`\): answers called good or bad are for KTO",
        ),
        (
            {"messages": [message("user", "<image>"), message("assistant", "b")], "images": ["x"]},
            "must be text alone, but has `images`",
        ),
        (
            {"messages": [message("user", [{"type": "image_url"}]), message("assistant", "b")]},
            "`content` must be text, but got a list with a part of type 'image_url'",
        ),
        (
            {"messages": [message("assistant", "", tool_calls=[{"id": 1}])]},
            "a call of a tool must have a `name`",
        ),
        (
            {"messages": [message("assistant", "a")], "tools": "add"},
            "`tools` must be a list of tools, but got a text",
        ),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            "`history` must be a list of pairs",
        ),
        ({"messages": ["a"]}, "every turn must have `role` and `content`, or `from` and `value`"),
    ],
)
def test_what_cannot_be_learnt_from_is_said_in_one_sentence(
    tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        read(tmp_path, row)
    assert "\n" not in str(caught.value)


def model(folder: Path, template: str | None) -> Architecture:
    save_tokenizer(folder, chat=False)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return Architecture(name="tiny", hf_config={"vocab_size": 259}, weights=str(folder))


def shown(examples: Examples, architecture: Architecture) -> tuple[str, str]:
    """Return what the model sees of the only row, and what of it is trained."""
    tokenizer = load_tokenizer(architecture)
    (row,) = tokenize(examples, tokenizer, 999).rows
    trained = [label for label in row["labels"] if label != -100]
    return str(tokenizer.decode(row["input_ids"])), str(tokenizer.decode(trained))


TOOLS = {
    "messages": [
        message("user", "2+2?"),
        message("assistant", "", tool_calls=[CALL], reasoning_content="Sum."),
        message("user", "4"),
        message("assistant", "Four."),
    ],
    "tools": [TOOL],
}
WRITTEN = '{"name": "add", "arguments": {"a": 2, "b": 2}}'


def test_a_template_that_knows_tools_is_given_them(tmp_path: Path) -> None:
    architecture = model(tmp_path, TOOL_TEMPLATE)
    examples = read(tmp_path, TOOLS)
    seen, trained = shown(examples, architecture)

    assert seen.startswith(f"<|im_start|>system\n{json.dumps([TOOL])}<|im_end|>\n<|im_start|>user")
    assert trained == f"<think>Sum.</think><call>{WRITTEN}</call><|im_end|>Four.<|im_end|>"
    assert unseen(examples.rows, load_tokenizer(architecture)) == ()


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_calls_are_learnt_as_json_where_no_template_knows_them(
    tmp_path: Path, template: str | None
) -> None:
    architecture = model(tmp_path, template)
    examples = read(tmp_path, TOOLS)
    seen, trained = shown(examples, architecture)

    assert "Adds." not in seen and "Sum." not in seen
    assert trained == f"{WRITTEN}<|im_end|>Four.<|im_end|>"
    assert unseen(examples.rows, load_tokenizer(architecture)) == ("tools", "reasoning_content")


@pytest.mark.parametrize("weight", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}])
def test_an_answer_of_weight_0_is_read_and_not_trained(
    tmp_path: Path, weight: dict[str, Any]
) -> None:
    architecture = model(tmp_path, CHAT_TEMPLATE)
    turns = [message("user", "a"), message("assistant", "b", **weight), message("user", "c"),
             message("assistant", "d", weight=1)]  # fmt: skip
    seen, trained = shown(read(tmp_path, {"messages": turns}), architecture)

    assert "assistant\nb<|im_end|>" in seen
    assert trained == "d<|im_end|>"


#: Like Qwen3's: reasoning stands only in the turns behind the last question.
REASONING_TEMPLATE = (
    "{% set last = namespace(at=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > last.at %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function.name }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_every_answer_is_trained_where_a_template_forgets_the_reasoning(tmp_path: Path) -> None:
    turns = [
        message("user", "a"),
        message("assistant", "b", reasoning_content="r"),
        message("user", "2+2?"),
        message("assistant", "", tool_calls=[CALL], reasoning_content="s"),
        message("tool", "4"),
        message("assistant", "Quite 4.", reasoning_content="t"),
        message("user", "c"),
        message("assistant", "d", reasoning_content="u"),
    ]
    seen, trained = shown(read(tmp_path, {"messages": turns}), model(tmp_path, REASONING_TEMPLATE))

    assert "<think>r" not in seen and "<think>t" not in seen
    assert trained == (
        "b<|im_end|><call>add</call><|im_end|>Quite 4.<|im_end|><think>u</think>d<|im_end|>"
    )


def test_an_end_of_turn_that_is_not_the_end_of_sequence_is_found_too(tmp_path: Path) -> None:
    template = REASONING_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    turns = [
        message("user", "a"),
        message("assistant", "b", reasoning_content="r"),
        message("user", "c"),
        message("assistant", "d", reasoning_content="u"),
    ]
    _, trained = shown(read(tmp_path, {"messages": turns}), model(tmp_path, template))
    assert trained == "b<|endoftext|>\n<think>u</think>d<|endoftext|>\n<|im_end|>"


def test_code_is_gone_on_with_where_there_is_no_template(tmp_path: Path) -> None:
    row = {"prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    assert shown(read(tmp_path, row), model(tmp_path, None)) == (
        "def f():\n    return 1\n<|im_end|>",
        "    return 1\n<|im_end|>",
    )
