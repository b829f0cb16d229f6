"""What base and tuned model say to prompts held out, as blocks of a page and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from lora_advisor.advisor.page_html import tag
from lora_advisor.advisor.page_words import Table
from lora_advisor.advisor.samples import NO_BASE, Sample

SAID = "What the model says"
#: Characters of a text on the page and in the table; of a longer one the middle is left out, for
#: a prompt's question may stand at either end.
_BLOCK, _CELL = 900, 160
_EMPTY = "(no text)"


def samples_section(samples: Sequence[Sample] | str) -> list[Element]:
    """Return each prompt with what was answered; nothing where nothing was asked.

    Args:
        samples: What the models say; or why that is unknown.
    """
    if not samples:
        return []
    if isinstance(samples, str):
        return [tag("h2", SAID), tag("p", unknown(samples), class_="missing")]
    words = "Prompts from rows that were held out, answered greedily and cut at a bound of tokens."
    return [tag("h2", SAID), tag("p", words), *(_sample(n, s) for n, s in enumerate(samples, 1))]


def unknown(why: str) -> str:
    """Say why nothing is known of what the models say."""
    return f"What the models say is unknown: {why}."


def samples_table(samples: Sequence[Sample]) -> Table:
    """Return the same in short, a row for each prompt."""

    def cell(text: str | None) -> str:
        return NO_BASE if text is None else "".join(shortened(text, _CELL)) or _EMPTY

    rows = tuple((cell(s.prompt), cell(s.base), cell(s.tuned), cell(s.reference)) for s in samples)
    return Table(headers=("prompt", "base model", "tuned model", "reference answer"), rows=rows)


def _sample(number: int, sample: Sample) -> Element:
    answers = [_block("Base model", sample.base), _block("Tuned model", sample.tuned)]
    if sample.reference:
        answers.append(_block("Reference answer", sample.reference))
    return tag("div", _block(f"Prompt {number}", sample.prompt), tag("div", answers,
               class_="said"), class_="sample")  # fmt: skip


def _block(name: str, text: str | None) -> Element:
    if not text:
        words = NO_BASE if text is None else _EMPTY
        return tag("div", tag("h4", name), tag("p", words, class_="missing"))
    begin, mark, end = shortened(text, _BLOCK)
    cut = tag("span", mark, class_="missing") if mark else None
    return tag("div", tag("h4", name), tag("pre", tag("code", begin, cut, end), class_="command"))


def shortened(text: str, most: int) -> tuple[str, str, str]:
    """Return a text's beginning, a mark that says how much is left out, and its end.

    Args:
        text: The text; one that is short enough is all beginning, without a mark.
        most: Characters that are kept of a long one.
    """
    begin, end = text[: most * 2 // 3], text[-(most // 3) :]
    left_out = len(text) - len(begin) - len(end)
    mark = f"\n[… {left_out:,} characters left out …]\n"
    # A mark that is no shorter than what it stands for saves nothing.
    return (begin, mark, end) if left_out > len(mark) else (text, "", "")
