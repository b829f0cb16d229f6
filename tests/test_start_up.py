"""What a command imports before it needs it, what it costs to ask for help, and completion."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest
from traced_once import save_figures

from lora_advisor.advisor.knobs import LONG_ROWS
from lora_advisor.cli import group, main
from lora_advisor.probes import cutting

HEAVY = (
    "accelerate", "bitsandbytes", "datasets", "joblib", "matplotlib", "numpy", "optuna", "pandas",
    "peft", "psutil", "pynvml", "rich", "scipy", "sklearn", "sqlite3", "tabulate", "torch",
    "transformers", "trl", "yaml",
)  # fmt: skip
#: Modules of our own that `--help` may import: the words of the commands.
LIGHT = {"knobs", "options", "errors"}

CHILD = """
import json, sys
from lora_advisor.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def imported(*words: str) -> set[str]:
    """Return the modules that a command has imported when it ends."""
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, *words], check=True, capture_output=True, text=True
    )
    code, modules = json.loads(ran.stderr.splitlines()[-1])
    assert code == 0
    return set(modules)


def paths() -> list[tuple[str, ...]]:
    """Return the words of every command, groups and their commands too."""
    found: list[tuple[str, ...]] = []
    for name, command in sorted(group.commands.items()):
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in sorted(command.commands)]
    return found


def command_at(words: tuple[str, ...]) -> click.Command:
    command: click.Command = group
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return command


def test_help_imports_nothing_heavy_and_of_ours_only_the_words() -> None:
    modules = imported("--help")

    assert sorted(modules & set(HEAVY)) == []
    ours = {name.rsplit(".", 1)[1] for name in modules if name.startswith("lora_advisor.")}
    layers = {"advisor", "probes", "models", "cli"}
    assert {name for name in ours - layers - LIGHT if not name.endswith("_command")} == set()


def test_help_of_a_command_imports_nothing_heavy() -> None:
    # Options are made when the module is imported: one command stands for all.
    assert sorted(imported("plan", "--help") & set(HEAVY)) == []


def test_the_guard_sees_what_is_heavy() -> None:
    assert "tabulate" in imported("doctor", "--cards")


def test_a_plan_whose_traces_are_kept_imports_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_ADVISOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = save_figures(tmp_path / "tiny")
    words = ["plan", "--gpu", "rtx-4060", "--model", model, "--seq", "64", "--batch", "1",
             "--method", "lora", "--checkpointing", "full", "--optimizer", "adamw_torch_fused",
             "--trials", "0"]  # fmt: skip

    cold, warm = imported(*words), imported(*words)

    assert "lora_advisor.models.replayed" in cold - warm  # the first had to replay, the second not
    if (os.cpu_count() or 1) > 1:  # a server of its own traces, and tells the attention
        assert "torch" not in cold
    assert warm & {"torch", "transformers", "scipy", "pandas", "sklearn", "joblib"} == set()


@pytest.mark.parametrize("words", paths(), ids=" ".join)
def test_every_command_shows_how_it_is_called(words: tuple[str, ...]) -> None:
    text = command_at(words).help or ""

    assert f"lora-advisor {' '.join(words)}" in text.split("Example", 1)[1]


def test_the_words_of_long_rows_are_those_of_the_data() -> None:
    assert LONG_ROWS == cutting.LONG_ROWS


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_what_click_prints(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0

    script = capsys.readouterr().out
    assert f"_LORA_ADVISOR_COMPLETE={shell}_complete" in script
    assert "lora-advisor" in script


def test_a_shell_is_told_the_commands_and_options() -> None:
    command = str(Path(sys.executable).with_name("lora-advisor"))

    def told(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        environment = {**os.environ, **words, "_LORA_ADVISOR_COMPLETE": "bash_complete"}
        ran = subprocess.run([command], env=environment, capture_output=True, text=True, check=True)
        return [line.split(",")[1] for line in ran.stdout.splitlines()]

    assert told("lora-advisor rec") == ["records"]
    assert "--vram" in told("lora-advisor plan --v")


@pytest.mark.parametrize(
    ("changes", "terminal", "coloured"),
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({}, False, False),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "pipe"],
)
def test_colours_are_for_terminals_that_want_them(
    changes: dict[str, str], terminal: bool, coloured: bool
) -> None:
    left_out = ("NO_COLOR", "FORCE_COLOR", "COLORTERM")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment |= {"TERM": "xterm-256color", **changes}
    code = "import sys; from lora_advisor.advisor.colours import has_colours; "
    code += "sys.stderr.write(str(has_colours()))"
    ours, theirs = pty.openpty()
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, text=True,
            stdout=theirs if terminal else subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        os.close(ours)
        os.close(theirs)

    assert ran.stderr == str(coloured)
