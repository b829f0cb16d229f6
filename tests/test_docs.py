"""The documents say what is so: links lead somewhere, commands exist, figures come from files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from lora_advisor.cli import group

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8"))
    missing = [
        link
        for link in links
        if not link.startswith("http") and not (document.parent / link).exists()
    ]

    assert missing == []


def test_the_readme_names_every_command_and_no_other() -> None:
    named = set(re.findall(r"^\| `lora-advisor (\w+)", README, flags=re.MULTILINE))

    assert named == set(group.commands)


@pytest.mark.parametrize("name", sorted(group.commands))
def test_every_command_and_option_has_help(name: str) -> None:
    command = group.commands[name]

    assert command.help
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_readme_quotes_the_accuracy_of_the_results_files() -> None:
    memory = json.loads((ROOT / "benchmarks/results/memory_accuracy.json").read_text("utf-8"))
    for name in ("drawn-20261125", "drawn-20261124", "shared"):
        for kind in ("allocated", "reserved"):
            figures = memory[name]["traced"][kind]
            assert (
                f"{figures['median_abs_percent']:.2f} %, {figures['worst_percent']:+.1f} %"
                in README
            )
        verdicts = memory[name]["verdicts, traced"]
        assert f"| {verdicts['asked']} | {verdicts['uncertain']} |" in README
    published = json.loads((ROOT / "benchmarks/results/published_t4.json").read_text("utf-8"))
    every = published["summary"]["all"]
    for kind in ("allocated", "process"):
        figures = every[kind]
        expected = f"{figures['median_abs_percent']:.2f} %, {figures['worst_percent']:+.1f} %"
        assert expected in README


def test_the_readme_quotes_the_recorded_plan() -> None:
    file = ROOT / "benchmarks/results/plan_on_card_h100_2026-11-23.json"
    figures = json.loads(file.read_text())

    assert f"{figures['tokens_per_s']:,.0f} tokens/s" in README
    assert f"{figures['times_the_baseline']:.1f} times" in README


def test_the_readme_documents_the_exit_code_of_every_error() -> None:
    from lora_advisor.probes import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.AdvisorError)
    }
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}

    assert codes <= documented


def test_the_readme_quotes_the_accuracy_of_speeds() -> None:
    results = ROOT / "benchmarks/results"
    records = json.loads((results / "throughput_accuracy.json").read_text())["summary"]
    published = json.loads((results / "published_throughput.json").read_text())["summary"]
    cards = ("t4", "a100-80gb", "h100-80gb", "rtx-pro-6000-blackwell")
    for summary in (*records.values(), *(published[card] for card in cards)):
        row = f"| {summary['points']} | {summary['spearman']:.2f} | {summary['median_ratio']:.2f} |"
        assert row in README


def test_the_readme_quotes_the_regret_of_the_recorded_plans() -> None:
    cases = json.loads((ROOT / "benchmarks/results/regret.json").read_text())

    for case in cases.values():
        models = case["models"]
        probed, best = (
            f"{100 * models[name]['median_abs_error']:.1f} %, {models[name]['spearman']:.2f} |"
            for name in ("probed", "at_best")
        )
        within = f" {100 * models['probed']['share_within_interval']:.0f} % | "
        regret = f"| {case['feasible']} | {100 * case['regret']:.1f} % | "
        probes = f"| {case['probes']}, {case['probing_s']:.0f} s | {case['choice_tokens_per_s']:,} "
        assert f"{probes}{regret}{models['held_out']}: {probed}{within}{best}" in README
