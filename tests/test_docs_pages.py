"""The short pages: every command is one that runs, every figure comes from a file or the source."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from lora_advisor.advisor.export import find_target
from lora_advisor.advisor.knobs import KNOBS
from lora_advisor.advisor.promise import WORTH
from lora_advisor.cli import group
from lora_advisor.probes import config
from lora_advisor.probes.architectures import bundled_names
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.prediction import EVIDENCE

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text("utf-8")
         for name in ("quick-start", "will-it-fit", "how-it-knows", "faq")}  # fmt: skip
#: Files that the pages' reader has, or that an earlier command of the page writes.
FILES = {"chat.jsonl", "cases.jsonl", "plan.json", "axolotl.yaml", "our-cards.jsonl", "./my-model",
         "runs/first", "first.html", "merged", "map.png"}  # fmt: skip
WORDS = {
    "method": config.METHODS, "checkpointing": ("off", "full", "offload", "every_2", "every_4"),
    "trainer": config.TRAINERS,
}  # fmt: skip


def commands(text: str) -> list[str]:
    """Return the commands of the blocks and those within the text."""
    blocks = re.findall(r"^ {4}(?:\.venv/bin/)?(lora-advisor .*)$", text, flags=re.MULTILINE)
    inline = re.findall(r"`(?:\.venv/bin/)?(lora-advisor [^`]*)`", text)
    return [line.split(" #")[0].split(" >")[0].strip() for line in blocks + inline]


ALL = [(name, line) for name, text in PAGES.items() for line in commands(text)]


def parse(line: str) -> tuple[click.Command, dict[str, object]]:
    """Parse a command as click would run it; a wrong word or option raises."""
    words = shlex.split(line)[1:]
    command: click.Command = group
    while isinstance(command, click.Group):
        name = words.pop(0)
        assert name in command.commands, line
        command = command.commands[name]
    with command.make_context("lora-advisor", words) as context:
        return command, context.params


@pytest.mark.parametrize(("page", "line"), ALL, ids=[line for _, line in ALL])
def test_every_command_is_one_that_is_understood(page: str, line: str) -> None:
    _, params = parse(line)

    for name, value in params.items():
        if isinstance(value, Path):
            assert str(value) in {str(Path(file)) for file in FILES}, value
        if name == "model" and value is not None:
            assert value in FILES or value in bundled_names()
        if name == "gpu" and value is not None:
            assert find_card(str(value)).key == value
        if name == "target":
            assert find_target(str(value))
        if name in WORDS and value is not None:
            assert value in WORDS[name]
        if name in KNOBS and isinstance(value, str):
            assert name in WORDS, "a knob whose words are not checked here yet"


def test_the_check_sees_a_command_that_is_wrong() -> None:
    for line in (
        "lora-advisor fit --vram much",
        "lora-advisor fit --no-such",
        "lora-advisor train",
    ):
        with pytest.raises(click.UsageError):
            parse(line)
    with pytest.raises(AssertionError):
        parse("lora-advisor guess")


def test_each_page_has_commands_and_none_is_long() -> None:
    for name, text in PAGES.items():
        assert len(commands(text)) >= 3, name
        assert len(text.splitlines()) <= 90, name


def test_what_is_written_with_a_unit_comes_from_the_results() -> None:
    file = DOCS.parent / "benchmarks/results/memory_accuracy.json"
    frozen = json.loads(file.read_text("utf-8"))["drawn-20261125"]
    reserved, verdicts = frozen["traced"]["reserved"], frozen["verdicts, traced"]
    backed = {
        f"{reserved['median_abs_percent']:.2f} %",
        f"{reserved['worst_percent']:+.1f} %",
        f"{100 * (WORTH - 1):.0f} %",
    }
    text = " ".join(PAGES["how-it-knows"].split())
    assert f"of {verdicts['asked']} verdicts none" in text
    assert f"and {verdicts['uncertain']} were" in text
    assert verdicts["false fits"] == verdicts["false does-not-fit"] == 0

    unit = r"[-+]?\d[\d.,]*\s?(?:%|GiB|GB|tokens/s|times|s\b|min\b)"
    found = {name: set(re.findall(unit, text)) for name, text in PAGES.items()}
    assert found.pop("how-it-knows") <= backed
    assert set().union(*found.values()) == set()


def test_the_ladder_of_evidence_is_the_programs() -> None:
    rows = re.findall(r"^\| (\w+(?: \w+)?) \|", PAGES["how-it-knows"], flags=re.MULTILINE)

    assert tuple(rows[1:]) == EVIDENCE
