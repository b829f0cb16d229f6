"""What the page of `report` says of long trainings, rented and several cards, and of samples."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model
from parsed_page import Parsed
from tiny_training import config_of, run
from traced_once import share_traces

from lora_advisor.advisor.markdown import plain, printable
from lora_advisor.advisor.page import page
from lora_advisor.advisor.page_markdown import report_markdown
from lora_advisor.advisor.page_samples import shortened
from lora_advisor.advisor.page_source import Source, read_source
from lora_advisor.advisor.page_training import with_unit
from lora_advisor.advisor.report_savings import savings_text
from lora_advisor.advisor.report_scaling import scaling_text
from lora_advisor.advisor.samples import Sample
from lora_advisor.cli import main
from lora_advisor.probes.errors import DataError
from lora_advisor.probes.plan import Plan, read_plan

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

H100 = Path(__file__).parent / "recordings" / "regret" / "plan-qwen2.5-1.5b-1024-peft.json"
HOSTILE = """</code></pre><script>alert("x")</script> & 'a' | <b>`bold`</b> [l](x) \x1b[31m"""
HOSTILE_SOURCE = "<i>a list</i> | of `prices`"
PRICES = {"rtx-4090": 0.5, "a100-80gb": 2.0}


@pytest.fixture(scope="module", autouse=True)
def _shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("LORA_ADVISOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and 40 rows, some of them short."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_model(folder)
    rows = ({"question": f"{n}?", "answer": "word " * (n % 10 + 1)} for n in range(40))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def planned(tiny: Path, name: str, *options: object) -> Plan:
    file = tiny / name
    words = ["plan", "--model", tiny, "--data", tiny / "rows.jsonl", "--seq", 96, "--batch", 8,
             "--method", "lora", "--checkpointing", "full", "--adapter", "peft", "--allocator",
             "default", "--optimizer", "adamw_torch_fused", "--out", file, *options]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return read_plan(file)


@pytest.fixture(scope="module")
def long(tiny: Path) -> Plan:
    """A plan of so many passes that it takes days, with two cards for rent."""
    cards = {
        card: {"usd_per_hour": usd, "date": "2026-11-01", "source": HOSTILE_SOURCE}
        for card, usd in PRICES.items()
    }
    (tiny / "prices.json").write_text(json.dumps({"cards": cards}), "utf-8")
    return planned(tiny, "long.json", "--gpu", "rtx-4060", "--epochs", 2e6,
                   "--prices", tiny / "prices.json")  # fmt: skip


@pytest.fixture(scope="module")
def two(tiny: Path) -> Plan:
    """A plan for two cards."""
    return planned(tiny, "two.json", "--gpu", "rtx-3090", "--gpus", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    tiny_model.save_model(folder / "model")
    tiny_model.save_rows(folder / "rows.jsonl")
    run(config_of(folder / "model"), folder / "rows.jsonl", folder / "first", max_steps=3)
    torch.set_num_threads(threads)
    return folder / "first"


def source_of(plan: Plan) -> Source:
    return Source(name="plan.json", plan=plan, run=None)


def with_samples(trained: Path, *samples: Sample) -> Source:
    source = read_source(trained)
    assert source.run is not None
    return dataclasses.replace(source, run=dataclasses.replace(source.run, samples=samples))


def cells(words: str) -> list[str]:
    """Return the cells of all tables of Markdown, as they read without escapes."""
    lines = [line.replace("\\|", "\0") for line in words.splitlines() if line.startswith("|")]
    found = [cell.strip() for line in lines for cell in line.strip("|").split("|")]
    return [cell.replace("\0", "|").replace("\\", "") for cell in found]


def test_a_long_training_shows_what_would_shorten_it_as_the_text_does(long: Plan) -> None:
    parsed = Parsed(page(source_of(long), None))
    words, text = report_markdown(source_of(long), None), savings_text(long)

    assert long.savings and text is not None
    assert "What would make the training shorter" in parsed.text
    assert "All epochs take more than 12.0 h" in parsed.text
    for saving in long.savings:
        assert saving.option in parsed.text and saving.option in cells(words)
    rows = [line for line in text.splitlines() if line.startswith("--") and line.strip("- ")]
    assert len(rows) == len(long.savings)
    for cell in (cell.strip() for row in rows for cell in row.split("  ") if cell.strip()):
        assert cell in parsed.text and cell in cells(words)


def test_rented_cards_are_told_with_cost_and_dated_prices(long: Plan) -> None:
    parsed = Parsed(page(source_of(long), None))
    words = report_markdown(source_of(long), None)

    assert {rental.card for rental in long.rentals} == set(PRICES)
    assert "On a rented card" in parsed.text and "### On a rented card" in words
    assert "Predicted from a trace of the step there, not measured" in parsed.text
    for rental in long.rentals:
        usd = rental.usd
        cost = f"${usd.value:,.2f} (${usd.low:,.2f} to ${usd.high:,.2f})"
        told = (rental.card, cost, f"${PRICES[rental.card]:.2f}", "2026-11-01", HOSTILE_SOURCE)
        assert all(cell in parsed.text and cell in cells(words) for cell in told)
    assert "i" not in {name for name, _ in parsed.tags}


def test_without_a_larger_card_that_is_said(long: Plan) -> None:
    plan = dataclasses.replace(long, rentals=())

    text = Parsed(page(source_of(plan), None)).text

    sentence = "No card of the price list is larger than this one and expected to be faster."
    assert sentence in text and sentence in report_markdown(source_of(plan), None)
    assert "On a rented card" not in text and "Where the prices are from" not in text
    plan = dataclasses.replace(long, savings=())
    text = Parsed(page(source_of(plan), None)).text
    assert "On a rented card" in text and "All epochs take more than" not in text


def test_several_cards_are_told_as_the_text_tells_them(two: Plan) -> None:
    scaling, config = two.scaling, two.chosen.config
    parsed = Parsed(page(source_of(two), None))
    words, text = report_markdown(source_of(two), None), scaling_text(two)

    assert scaling is not None and scaling.tokens_per_s is not None and text is not None
    speed, efficiency = scaling.tokens_per_s, scaling.efficiency
    assert efficiency is not None and scaling.all_reduce_s is not None
    for told in (
        f"{config.micro_batch} x {config.accumulation} accumulation: 8 in a step of all",
        f"{speed.value:,.0f} tokens/s ({speed.low:,.0f} to {speed.high:,.0f})",
        f"{100 * efficiency.value:.0f} % ({100 * efficiency.low:.0f} to "
        f"{100 * efficiency.high:.0f})",
        f"{1e3 * scaling.all_reduce_s.value:,.1f} ms",
        "accelerate launch --multi_gpu --num_processes 2 -m lora_advisor.cli train",
    ):
        assert told in text and told in parsed.text
        assert told in " ".join(cells(words))
    assert "On 2 such cards" in parsed.text and "Tokens/s of 2 cards" in parsed.text
    # The command to copy starts both cards too.
    assert "-m lora_advisor.cli train plan.json --data" not in parsed.text  # the plan knows them
    assert "-m lora_advisor.cli train plan.json --output runs/first" in parsed.text


def test_a_link_that_is_not_known_is_said(two: Plan) -> None:
    assert two.scaling is not None
    unknown = dataclasses.replace(two.scaling, link=None, all_reduce_s=None, step_s=None,
                                  tokens_per_s=None, efficiency=None)  # fmt: skip
    plan = dataclasses.replace(two, scaling=unknown)

    parsed = Parsed(page(source_of(plan), None))

    assert "unknown: the link between the cards is not known" in parsed.text
    assert "Tokens/s of 2 cards" not in parsed.text and "scaling efficiency" not in parsed.text


def test_a_training_shows_what_both_models_say(trained: Path) -> None:
    source = read_source(trained)

    parsed = Parsed(page(source, None))

    kept = json.loads((trained / "samples.json").read_text("utf-8"))["samples"]
    assert len(kept) == 3 and len(parsed.of_class("sample")) == 3
    for number, one in enumerate(kept, start=1):
        assert f"Prompt {number}" in parsed.text
        for name in ("prompt", "base", "tuned", "reference"):
            assert printable(one[name]) in parsed.text
    words = report_markdown(source, None)
    assert "<details><summary>What the model says</summary>" in words
    assert f"| {plain(kept[0]['prompt'])[:20]}" in words


def test_what_a_model_says_never_becomes_markup(trained: Path) -> None:
    hostile = Sample(prompt=HOSTILE, reference=HOSTILE, base=HOSTILE, tuned=f"{HOSTILE}\n\ud800")
    calm = Sample(prompt="a", reference="a", base="a", tuned="a")

    parsed = Parsed(page(with_samples(trained, hostile), None))

    clean = Parsed(page(with_samples(trained, calm), None))
    assert [name for name, _ in parsed.tags] == [name for name, _ in clean.tags]
    assert parsed.text.count("""</code></pre><script>alert("x")</script> & 'a' |""") == 4
    assert "\x1b" not in parsed.text and "\\x1b[31m" in parsed.text and "\\ud800" in parsed.text
    words = report_markdown(with_samples(trained, hostile), None)
    (line,) = (line for line in words.splitlines() if "alert" in line)
    assert line.count("|") - line.count("\\|") == 5  # four cells, whatever is in them
    assert "<b>" not in line and "\\<b\\>" in line and "\\[l\\]" in line
    words.encode("utf-8")


def test_a_long_text_is_cut_where_it_can_be_seen(trained: Path) -> None:
    long = "first " + "x" * 5000 + " last"
    one = Sample(prompt=long, reference="", base=None, tuned="")

    text = Parsed(page(with_samples(trained, one), None)).text

    assert "first x" in text and "x last" in text and "[… 4,111 characters left out …]" in text
    assert "unknown: the base is no longer there after full fine-tuning" in text
    assert "(no text)" in text and "Reference answer" not in text
    assert "characters left out" in report_markdown(with_samples(trained, one), None)
    assert shortened("x" * 900, 900) == ("x" * 900, "", "")
    assert shortened("x" * 930, 900) == ("x" * 930, "", "")  # the mark would be as long
    begin, mark, end = shortened("012345" + "-" * 80 + "789", 9)
    assert (begin, mark.strip(), end) == ("012345", "[… 80 characters left out …]", "789")


def test_nothing_is_shown_where_there_is_nothing(trained: Path, tmp_path: Path) -> None:
    without = read_source(H100)
    both = Parsed(page(without, None)).text + report_markdown(without, None)
    for title in ("What would make", "On a rented card", "such cards", "What the model says"):
        assert title not in both
    assert "lora-advisor train" in both

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "samples.json").unlink()
    old = read_source(copy)
    assert "What the model says" not in page(old, None) + report_markdown(old, None)


def test_why_there_are_no_samples_is_said(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    file = copy / "samples.json"
    file.write_text(json.dumps({"samples": [], "unknown": "out of <memory>"}), "utf-8")
    source = read_source(copy)

    assert "says is unknown: out of <memory>." in Parsed(page(source, None)).text.replace(
        "models say", "model says")  # fmt: skip
    assert "out of \\<memory\\>" in report_markdown(source, None)

    file.write_text('{"samples": [{"prompt": "a"}]}', "utf-8")
    with pytest.raises(DataError, match="is damaged"):
        read_source(copy)


def test_samples_of_an_earlier_training_are_not_shown(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "result.json").unlink()

    source = read_source(copy)

    assert source.run is not None and source.run.samples == ()


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (56958.87, "tokens/s", "56,959 tokens/s"),
        (97.26, "tokens/s", "97.26 tokens/s"),
        (7.2128, "GiB", "7.21 GiB"),
    ],
)
def test_what_was_predicted_is_written_as_people_write_it(
    value: float, unit: str, said: str
) -> None:
    assert with_unit(value, unit) == said
