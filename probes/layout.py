"""A row as the model sees it: its tokens, and which of them it is taught to say.

Trained are the assistant's turns with the end-of-sequence token behind them, or all of a plain
text. Where the tokenizer has a chat template, every conversation goes through it, with its tools;
otherwise `plain_layout` is used. Calls of tools that a template does not know stand as JSON behind
the turn's text; reasoning and tools that it does not know are left out (`unseen`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.dataset import Example
from lora_advisor.probes.errors import DataError
from lora_advisor.probes.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What the loss ignores (torch.nn.CrossEntropyLoss, `ignore_index`).
IGNORED = -100

#: Shapes whose prompt stands as given where there is no chat template, to be gone on with.
_CONTINUED = ("prompt/completion", "HumanEval")

#: From where to where the assistant speaks; an end of None is the end of the row.
_Span = tuple[int, int | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A row of tokens, not cut yet.

    Attributes:
        ids: Its tokens.
        labels: The same where they are trained, else `IGNORED`.
        ends: Where turns of the assistant end: before these tokens a row may be parted best.
    """

    ids: list[int]
    labels: list[int]
    ends: tuple[int, ...] = ()


def lay_out(example: Example, shape: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return a row's tokens and labels.

    Raises:
        DataError: The chat template refuses the row.
    """
    ids: list[int]
    spans: list[_Span]
    if example.turns[0].role == "text":
        ids, spans = _encode(tokenizer, example.turns[0].content, special=True), [(0, None)]
    elif tokenizer.chat_template is not None:
        ids, spans = _templated(example, tokenizer)
    else:
        ids, spans = _plain(example, shape, tokenizer)
    eos = _eos(tokenizer)
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        said = ids[start:end]
        if eos in said:  # a template may write a line's end behind it, which nobody needs to learn
            said = said[: len(said) - said[::-1].index(eos)]
        labels[start : start + len(said)] = said
        if end is None and said:
            ids, labels = ids[: start + len(said)], labels[: start + len(said)]
            if said[-1] != eos:
                ids, labels = [*ids, eos], [*labels, eos]
    # The first token is predicted from nothing: models shift the labels by one.
    ends = tuple(end for _, end in spans if end is not None)
    return Encoded(ids=ids, labels=[IGNORED, *labels[1:]], ends=ends)


def plain_layout(turns: Sequence[Turn], shape: str) -> str:
    """Return what comes before an answer, as text, where there is no chat template.

    A prompt stands as given, and its completion right behind it. Other turns stand under a line
    "### User:" (or the turn's role) with an empty line between them; "### Assistant:" comes last.
    """
    if shape in _CONTINUED and len(turns) == 1:
        return turns[0].content
    said = (f"### {turn.role.capitalize()}:\n{_said(turn)}\n\n" for turn in turns)
    return "".join(said) + "### Assistant:\n"


def unseen(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return which parts of the rows the tokenizer's chat template leaves out."""
    template = str(tokenizer.chat_template or "")
    has = {
        "tools": any(example.tools for example in examples),
        "reasoning_content": any(
            turn.more is not None and "reasoning_content" in turn.more
            for example in examples
            for turn in example.turns
        ),
    }
    return tuple(name for name, there in has.items() if there and name not in template)


def _templated(
    example: Example, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[_Span]]:
    """Find the assistant's turns by what the template adds for each of them.

    Most templates have no markers around what the assistant says, so the tokens of the conversation
    up to a turn are compared with those of the whole.
    """
    template = str(tokenizer.chat_template)
    messages = [_message(turn, template) for turn in example.turns]
    tools = list(example.tools) if example.tools and "tools" in template else None

    def tokens(messages: list[dict[str, Any]], *, prompt: bool = False) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise what jinja and their authors chose
            raise DataError(
                f"`{example.file}`, row {example.line} must suit the model's chat template, but "
                f"that says: {error}."
            ) from None
        return _encode(tokenizer, str(text), special=False)

    last = max(i for i, turn in enumerate(example.turns) if turn.role == "assistant") + 1
    messages = messages[:last]
    whole = tokens(messages)
    spans: list[_Span] = []
    for index, turn in enumerate(example.turns[:last]):
        if index == 0 or not _is_answer(turn):
            continue
        start = _start(whole, messages, index, tokens)
        end = None if index + 1 == last else _end(whole, messages, index, tokens, start)
        spans.append((start, end))
    return whole, spans


def _start(
    whole: list[int], messages: list[dict[str, Any]], index: int, tokens: Callable[..., list[int]]
) -> int:
    """Return where the answer of a turn begins.

    Templates of models that reason leave the reasoning out of earlier turns, so that what comes
    before an answer is not what it is in the whole. Then the answer is changed, and what is the
    same up to there comes before it.
    """
    asked = tokens(messages[:index], prompt=True)
    start = _common(whole, asked)
    if start == len(asked):
        return start
    before = tokens(messages[:index])
    if _common(whole, before) == len(before):  # only the invitation to speak is another one
        return start
    changed = {
        name: f"{_other(value)}\n{value}"
        for name, value in messages[index].items()
        if name in ("content", "reasoning_content")
    }
    return _common(
        whole, tokens([*messages[:index], messages[index] | changed, *messages[index + 1 :]])
    )


def _other(text: str) -> str:
    """Return a letter that a text does not begin with."""
    return "Q" if not text.lstrip().startswith("Q") else "Z"


def _end(
    whole: list[int],
    messages: list[dict[str, Any]],
    index: int,
    tokens: Callable[..., list[int]],
    start: int,
) -> int:
    """Return where the answer of a turn ends, the template's end of a turn included.

    Where the turn is not the same in the conversation that ends with it, the first end of a turn
    behind its start is taken.
    """
    so_far = tokens(messages[: index + 1])
    end = _common(whole, so_far)
    if end == len(so_far):
        return end
    one, other = (
        tokens([*messages[:-1], {"role": "assistant", "content": text}]) for text in ("Q", "Z")
    )
    close = one[len(one) - _common(one[::-1], other[::-1]) :]
    for at in range(start, len(whole) - len(close)):
        if close and whole[at : at + len(close)] == close:
            return at + len(close)
    return max(start, end)


def _message(turn: Turn, template: str) -> dict[str, Any]:
    """Return a turn as the template takes it."""
    if turn.more is None:
        return {"role": turn.role, "content": turn.content}
    if "tool_calls" in turn.more and "tool_calls" not in template:
        return {"role": turn.role, "content": _said(turn)}
    return {"role": turn.role, "content": turn.content, **turn.more}


def _plain(
    example: Example, shape: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[_Span]]:
    ids: list[int] = []
    spans: list[_Span] = []
    eos = _eos(tokenizer)
    said = 0
    for index, turn in enumerate(example.turns):
        if turn.role != "assistant" or index == 0:
            continue
        asked = plain_layout(example.turns[said:index], shape)
        ids += _encode(tokenizer, asked, special=said == 0)
        start = len(ids)
        ids += [*_encode(tokenizer, _said(turn), special=False), eos]
        said = index + 1
        if _is_answer(turn):
            spans.append((start, None if said == len(example.turns) else len(ids)))
    return ids, spans


def _is_answer(turn: Turn) -> bool:
    """Return whether there is something to learn in a turn."""
    return turn.role == "assistant" and turn.trained and bool(_said(turn).strip())


def _said(turn: Turn) -> str:
    """Return what a turn says, its calls of tools written as JSON."""
    calls = () if turn.more is None else turn.more.get("tool_calls", ())
    written = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
    return "\n".join(text for text in (turn.content, *written) if text)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers close every text themselves
    return ids


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two rows share from the start on."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
