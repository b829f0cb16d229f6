"""The factorial: effects that are known come out, and a bench that is stopped goes on.

Most tests ask a card that is not there (fake_card.py); the last ones run the command on the CPU.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_card import METHOD, OPTIMIZER, PAGED_AT_1X512, PRECISION, SIZE, FakeCard, allocated_gib
from recorded import configure
from traced_once import save_figures

from lora_advisor.advisor import bench_command
from lora_advisor.advisor.bench import Bench, assign, given_up, go_on, run_bench
from lora_advisor.advisor.bench_command import _HELD
from lora_advisor.advisor.bench_design import DEFAULTS, FACTORS, Design, levels_of, make_design
from lora_advisor.advisor.bench_files import CSV, JSON, PICTURE, RECORD, REPORT, write_files
from lora_advisor.advisor.bench_study import Study, study_of
from lora_advisor.advisor.cell_means import CellMeans
from lora_advisor.advisor.effects import Effect, Observation, effects_of, mean_ratio
from lora_advisor.advisor.effects_model import fit_model
from lora_advisor.advisor.knobs import KNOBS
from lora_advisor.advisor.paper import RUNS
from lora_advisor.advisor.report_bench import command, report_text
from lora_advisor.cli import main
from lora_advisor.probes.architectures import load_bundled
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError, DataError, StackError, UsageError
from lora_advisor.probes.machine import GIB, detect_stack
from lora_advisor.probes.record import read_records

ARCHITECTURE = load_bundled("qwen2.5-1.5b")
STACK = detect_stack()
SMALL = {
    "method": ("lora", "qlora"),
    "optimizer": ("adamw_torch",),
    "precision": ("fp16", "bf16"),
    "size": ("1x512", "2x512"),
}


def design(factors: dict[str, tuple[str, ...]] | None = None, **changes: Any) -> Design:
    base = configure(trainer="transformers", loss="full")
    made: dict[str, Any] = {"device": "cuda", "repeats": 3, "seed": 0, **changes}
    return make_design(base, factors or dict(DEFAULTS), **made)


def bench(made: Design) -> Bench:
    card = FakeCard(ARCHITECTURE, STACK)
    return Bench(
        design=made,
        architecture=ARCHITECTURE,
        machine=card.machine,
        stack=STACK,
        device="cuda",
        vram_bytes=None,
        cap_bytes=7 * GIB,
    )


def run_all(made: Bench, card: FakeCard, *, budget_s: float = 1e9) -> Bench:
    for so_far in run_bench(made, card, budget_s=budget_s, say=lambda line: None):
        made = so_far
    return made


def card(**changes: Any) -> FakeCard:
    return FakeCard(ARCHITECTURE, STACK, **changes)


@pytest.fixture(scope="module")
def full() -> Study:
    """The default bench on a card that warms up, where LoRA at 2x2048 does not fit."""

    def ends(config: RunConfig) -> str:
        return "out_of_memory" if allocated_gib(config) > 6.9 else "ok"

    return study_of(run_all(bench(design()), card(ends=ends, drift=-0.0005)))


def effect(study: Study, level: str, against: str) -> Effect:
    (found,) = [e for e in study.effects if (e.level, e.against) == (level, against)]
    return found


# Design ------------------------------------------------------------------------------------------


def test_the_default_design_holds_the_papers_rows_for_both_methods() -> None:
    levels = {cell.levels for cell in design().cells if cell.config is not None}

    assert len(levels) == 2 * 3 * 2 * 4
    assert {(method, *run.levels) for method in ("lora", "qlora") for run in RUNS} <= levels


def test_cells_differ_in_their_factors_only() -> None:
    configs = [cell.config for cell in design().cells if cell.config is not None]
    varied = {"method", "optimizer", "precision", "micro_batch", "seq_len"}
    varied |= {"quant_type", "double_quant"}  # follow from the method
    shared = [
        {key: value for key, value in config.to_json().items() if key not in varied}
        for config in configs
    ]

    assert len(set(configs)) == 48
    assert all(item == shared[0] for item in shared)


def test_each_repeat_has_an_order_of_its_own_that_the_seed_gives() -> None:
    one, two, other = design(), design(), design(seed=1)

    assert one.order(1) == two.order(1)
    assert one.order(1) != one.order(2)
    assert one.order(1) != other.order(1)
    assert sorted(c.levels for c in one.order(2)) == sorted(c.levels for c in one.cells)


def test_what_cannot_run_keeps_its_place_and_its_reason() -> None:
    made = design({**SMALL, "precision": ("fp16", "fp32")}, device="cpu")

    reasons = {cell.levels[2]: cell.reason for cell in made.cells}
    assert reasons["fp32"] is None
    assert "needs a GPU" in str(reasons["fp16"])
    device = card()
    done = run_all(bench(made), device)
    assert {config.precision for config in device.probed} == {"fp32"}
    assert done.missing == 0
    assert "not possible" in report_text(study_of(done), picture=None)


@pytest.mark.parametrize(
    ("factor", "text", "said"),
    [
        ("method", "lora,dora", "`--methods` must be words of lora, qlora, full"),
        ("optimizer", "adamw_torch,paged_adamw_8bits", "did you mean paged_adamw_8bit"),
        ("precision", "bf16,", "`--precisions` must be words of bf16, fp16, fp32"),
        ("size", "1x512,banana", "micro-batch x tokens"),
        ("size", "0x512", "micro-batch x tokens"),
        ("size", "1x1", "micro-batch x tokens"),
        ("size", "", "micro-batch x tokens"),
        ("size", "1x512,1x512", "must name each level once"),
    ],
)
def test_an_unknown_level_is_one_sentence(factor: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        levels_of(factor, text, ())


# Running -----------------------------------------------------------------------------------------


def test_every_cell_is_measured_as_often_as_asked_a_repeat_at_a_time() -> None:
    device = card()
    made = bench(design(SMALL))

    done = run_all(made, device)

    assert done.missing == 0 and made.missing == 8 * 3
    assert [run.repeat for run in done.runs] == [1] * 8 + [2] * 8 + [3] * 8
    for start in (0, 8, 16):
        assert len(set(device.probed[start : start + 8])) == 8


def test_what_does_not_fit_is_run_once_and_a_failure_twice() -> None:
    def ends(config: RunConfig) -> str:
        if config.method == "lora" and config.precision == "bf16":
            return "out_of_memory"
        return "failed" if config.method == "lora" else "ok"

    device = card(ends=ends)
    done = run_all(bench(design(SMALL)), device)

    times = {
        ending: sum(run.ending == ending for run in done.runs)
        for ending in ("out_of_memory", "failed", "ok")
    }
    assert times == {"out_of_memory": 2, "failed": 2 * 2, "ok": 4 * 3}
    assert done.missing == 0


def test_a_run_beside_another_process_does_not_count() -> None:
    spoiled: list[RunConfig] = []

    def ends(config: RunConfig) -> str:
        if spoiled:
            return "ok"
        spoiled.append(config)
        return "contended"

    done = run_all(bench(design(SMALL)), card(ends=ends))

    assert [run.ending for run in done.runs[:2]] == ["contended", "ok"]
    assert done.runs[0].cell == done.runs[1].cell
    assert len(done.measured) == 24
    always = run_all(bench(design(SMALL)), card(ends=lambda config: "contended"))
    assert always.missing == 0 and len(always.runs) == 8 * 3
    assert {given_up(always.runs_of(cell)) for cell in always.design.cells} == {"contended"}


def test_the_budget_ends_a_bench_between_two_runs() -> None:
    class Slow(FakeCard):
        def __call__(self, config: RunConfig) -> Any:
            time.sleep(0.05)
            return super().__call__(config)

    device = Slow(ARCHITECTURE, STACK)
    done = run_all(bench(design(SMALL)), device, budget_s=0.2)

    assert 1 <= len(done.runs) <= 4
    assert done.missing == 24 - len(done.runs)
    assert len(run_all(bench(design(SMALL)), card(), budget_s=1e-9).runs) == 1


def test_a_killed_bench_goes_on_with_what_it_lacks(tmp_path: Path) -> None:
    record = tmp_path / RECORD
    made = bench(design(SMALL))
    with pytest.raises(BusyError):
        run_all(made, card(record=record, busy_after=11))
    said: list[str] = []

    again = go_on(made, record, say=said.append)
    device = card(record=record)
    done = run_all(again, device)

    assert said == ["11 earlier runs taken up"]
    assert len(device.probed) == 24 - 11
    assert done.missing == 0
    assert len(read_records(record)) == 24
    assert go_on(made, record, say=said.append).runs == done.runs
    whole = run_all(made, card())
    assert [run.cell for run in done.runs] == [run.cell for run in whole.runs], "the same order"


def test_a_bench_goes_on_with_more_levels_and_leaves_others_apart(tmp_path: Path) -> None:
    record = tmp_path / RECORD
    run_all(bench(design(SMALL)), card(record=record))
    more = {**SMALL, "optimizer": ("adamw_torch", "paged_adamw_8bit"), "size": ("1x512",)}
    said: list[str] = []

    again = go_on(bench(design(more)), record, say=said.append)

    assert len(again.measured) == 12
    assert again.missing == 12
    assert said == ["12 earlier runs taken up; 12 of other settings are left out"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": dataclasses.replace(card().machine, name="other")}, "another machine .name "),
        ({"stack": dataclasses.replace(STACK, peft="0.1")}, "another stack .peft .* there, 0.1"),
        ({"architecture": load_bundled("qwen2.5-0.5b")}, "another model"),
        ({"cap_bytes": 6 * GIB}, "with 7.00 GiB .* here are 6.00"),
        ({"cap_bytes": 8 * GIB, "vram_bytes": 9 * GIB}, "with 7.00 GiB .* here are 8.00"),
    ],
    ids=["machine", "stack", "model", "less memory", "another limit"],
)
def test_runs_of_elsewhere_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    record = tmp_path / RECORD
    made = bench(design(SMALL))
    run_all(made, card(record=record))

    with pytest.raises(StackError, match=said):
        go_on(dataclasses.replace(made, **change), record, say=lambda line: None)


def test_more_memory_than_before_changes_nothing_unless_it_is_asked_for(tmp_path: Path) -> None:
    record = tmp_path / RECORD
    made = bench(design(SMALL))
    run_all(made, card(record=record))

    again = go_on(dataclasses.replace(made, cap_bytes=8 * GIB), record, say=lambda line: None)

    assert again.cap_bytes == 7 * GIB


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    record = tmp_path / RECORD
    record.write_text('{"format": 7}\n', "utf-8")

    with pytest.raises(DataError, match="of format 1"):
        go_on(bench(design(SMALL)), record, say=lambda line: None)


# Effects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "against", "true"),
    [
        ("qlora", "lora", METHOD["qlora"]),
        ("adamw_torch_fused", "adamw_torch", OPTIMIZER["adamw_torch_fused"]),
        ("bf16", "fp16", PRECISION["bf16"]),
        ("2x1024", "2x512", SIZE["2x1024"] - SIZE["2x512"]),
        ("2x2048", "2x1024", SIZE["2x2048"] - SIZE["2x1024"]),
    ],
)
def test_known_effects_come_out_within_a_percent(
    full: Study, level: str, against: str, true: float
) -> None:
    found = effect(full, level, against)

    for ratio in (found.ratios["tokens_per_s"], found.modelled):
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        assert ratio.value == pytest.approx(math.exp(true), rel=0.01)
        assert ratio.low <= math.exp(true) * 1.005 and ratio.high >= math.exp(true) / 1.005
        assert ratio.high / ratio.low < 1.03, "repeats scatter by half a percent"
    assert found.ratios["joules_per_token"].value == pytest.approx(math.exp(-true), rel=0.01)


def test_the_two_ways_to_weigh_conditions_differ_as_they_should(full: Study) -> None:
    found = effect(full, "paged_adamw_8bit", "adamw_torch")
    paged = OPTIMIZER["paged_adamw_8bit"]

    # 14 of 16 conditions ran, 4 of them at 1x512; the model weighs the four sizes alike.
    by_pairs, by_model = paged + PAGED_AT_1X512 * 4 / 14, paged + PAGED_AT_1X512 / 4
    assert (found.conditions, found.of_conditions, found.pairs) == (14, 16, 42)
    assert found.ratios["tokens_per_s"].value == pytest.approx(math.exp(by_pairs), rel=0.004)
    assert found.modelled is not None
    assert found.modelled.value == pytest.approx(math.exp(by_model), rel=0.004)
    assert found.ratios["tokens_per_s"].smallest == pytest.approx(
        math.exp(paged + PAGED_AT_1X512), rel=0.02
    )


def test_an_effect_that_depends_on_another_factor_is_told_and_no_other(full: Study) -> None:
    told = {(d.level, d.against, d.given_factor, d.given): d for d in full.dependences}

    assert {key[:3] for key in told} == {("paged_adamw_8bit", "adamw_torch", "size")}
    for size in SIZE:
        true = OPTIMIZER["paged_adamw_8bit"] + (PAGED_AT_1X512 if size == "1x512" else 0)
        ratio = told["paged_adamw_8bit", "adamw_torch", "size", size].ratio
        assert ratio.value == pytest.approx(math.exp(true), rel=0.01)


def test_noise_is_not_told_as_a_dependence() -> None:
    study = study_of(run_all(bench(design(SMALL)), card(noise=0.05)))
    ratios = effect(study, "qlora", "lora").ratios["tokens_per_s"]

    assert ratios.largest / ratios.smallest > 1.03, "the conditions differ by chance"
    assert study.dependences == ()


def test_the_model_finds_the_interaction_and_no_other(full: Study) -> None:
    assert full.model is not None
    p_values = {term.factors: term.p_value for term in full.model.terms if term.p_value is not None}

    for term in (("method",), ("optimizer",), ("precision",), ("size",), ("optimizer", "size")):
        assert p_values[term] < 1e-3, term
    for term in (("method", "optimizer"), ("optimizer", "precision"), ("precision", "size")):
        assert p_values[term] > 0.01, term
    assert full.model.left_out == (("method x size", "no run of lora with 2x2048"),)
    # Half a percent of noise, and a drift over the 42 runs of a repeat, which is uniform.
    scatter = math.hypot(0.005, 0.0005 * 42 / math.sqrt(12))
    assert full.model.residual == pytest.approx(scatter, rel=0.2)
    assert full.spread == pytest.approx(scatter, rel=0.2)


def test_memory_is_told_as_a_difference(full: Study) -> None:
    assert effect(full, "qlora", "lora").differences["allocated_bytes"].mean == -2 * GIB
    paged = effect(full, "paged_adamw_8bit", "adamw_torch").differences["reserved_bytes"]
    assert (paged.smallest, paged.mean, paged.largest) == (-GIB // 4,) * 3


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 benches with noise only: 95 % of the intervals must hold no effect, give or take 3 %."""
    draw = random.Random(1)
    factors = {"one": ("a", "b"), "two": ("c", "d", "e")}
    hits: dict[str, int] = {"pairs": 0, "model": 0, "cells": 0}
    for _ in range(300):
        seen = [
            Observation(
                levels=(one, two),
                block=block,
                values={"tokens_per_s": math.exp(0.1 * block + draw.gauss(0, 0.02))},
            )
            for one in factors["one"]
            for two in factors["two"]
            for block in (1, 2, 3)
        ]
        model = fit_model(seen, factors)
        assert model is not None
        found = {
            "pairs": effects_of(seen, factors)[0].ratios["tokens_per_s"],
            "model": model.effect("one", "b", "a"),
            "cells": CellMeans.of(seen).ratio(("a", "c"), ("b", "d")),
        }
        for name, ratio in found.items():
            assert ratio is not None and ratio.low is not None and ratio.high is not None
            hits[name] += ratio.low <= 1 <= ratio.high

    assert all(0.92 < n / 300 < 0.98 for n in hits.values()), hits


def test_one_repeat_has_an_interval_of_its_conditions_or_none() -> None:
    several = mean_ratio([[0.1], [0.2], [0.3]])
    single = mean_ratio([[0.1]])

    assert (several.basis, single.basis) == ("conditions", "none")
    assert single.low is None and single.high is None
    # t of 2 degrees of freedom: 4.303; the mean's error: 0.1 / sqrt(3).
    assert several.high == pytest.approx(math.exp(0.2 + 4.3027 * 0.1 / math.sqrt(3)), rel=1e-4)


def test_a_level_that_never_ran_is_left_out_and_the_rest_stands() -> None:
    done = run_all(
        bench(design(SMALL)),
        card(ends=lambda config: "failed" if config.precision == "bf16" else "ok"),
    )
    study = study_of(done)

    assert {e.factor for e in study.effects} == {"method", "size"}
    assert effect(study, "qlora", "lora").modelled is not None
    assert study.model is not None
    assert ("precision",) not in {term.factors for term in study.model.terms}
    assert "failed" in report_text(study, picture=None)


def test_a_bench_in_which_nothing_ran_still_reports() -> None:
    study = study_of(run_all(bench(design(SMALL)), card(ends=lambda config: "out_of_memory")))

    assert (study.effects, study.model, study.spread, study.ways) == ((), None, None, ())
    assert "out of memory" in report_text(study, picture=None)


# The paper ---------------------------------------------------------------------------------------


def test_the_papers_changes_are_walked_one_at_a_time(full: Study) -> None:
    first, second = full.ways

    assert [step.changed for step in first.steps] == [
        "optimizer adamw_torch to paged_adamw_8bit",
        "micro-batch 1 to 2",
        "length 512 to 2048",
    ]
    assert [step.changed for step in second.steps] == [
        "precision fp16 to bf16",
        "length 2048 to 1024",
    ]
    assert first.paper_ratio == pytest.approx(628.1 / 500.3)
    for way in full.ways:
        ratios = [step.ratio["qlora"] for step in way.steps]
        whole = way.ratio["qlora"]
        assert whole is not None and None not in ratios
        product = math.prod(ratio.value for ratio in ratios if ratio is not None)
        assert product == pytest.approx(whole.value), "the changes multiply to the total"
    optimizer = first.steps[0].ratio["qlora"]
    assert optimizer is not None
    true = OPTIMIZER["paged_adamw_8bit"] + PAGED_AT_1X512
    assert optimizer.value == pytest.approx(math.exp(true), rel=0.015)
    assert first.ratio["lora"] is None, "LoRA at 2x2048 ran out of memory"


def test_the_command_of_a_bench_says_what_is_not_as_usual() -> None:
    usual = bench(design())
    base = usual.design.base.replace(embedding="host")
    other = dataclasses.replace(usual, design=dataclasses.replace(usual.design, base=base))

    assert "--embedding" not in command(usual) and "--adapter" not in command(usual)
    assert "--embedding host" in command(other)
    factors = {"method", "optimizer", "precision"}
    assert set(KNOBS) - factors == set(_HELD), "every other knob has a value that is held"


def test_changes_whose_middle_never_ran_are_made_together() -> None:
    factors = {**DEFAULTS, "size": ("1x512", "2x1024", "2x2048")}
    study = study_of(run_all(bench(design(factors)), card()))

    assert study.ways[0].steps[-1].changed == "micro-batch 1 to 2 and length 512 to 2048"
    assert study.ways[0].steps[-1].ratio["lora"] is not None


def test_the_report_compares_ratios_and_says_what_cannot_be_compared(full: Study) -> None:
    text = report_text(full, picture="effects.png")

    row = next(line for line in text.splitlines() if "precision fp16 to bf16" in line)
    assert "x1.0" in row and "not told" in row
    assert "94 to 95 W, one power for all" in text
    assert "| out of memory" in text
    assert "(NVIDIA Example here)" in text
    assert "![Effects of each factor](effects.png)" in text


def test_where_none_of_the_papers_rows_ran_nothing_is_compared() -> None:
    factors = {**SMALL, "precision": ("fp32",)}
    text = report_text(study_of(run_all(bench(design(factors)), card())), picture=None)

    assert "nothing is compared" in text
    assert "One change at a time" not in text


# Files -------------------------------------------------------------------------------------------


def test_the_files_hold_every_run_and_agree(full: Study, tmp_path: Path) -> None:
    write_files(full, tmp_path)

    with (tmp_path / CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    document = json.loads((tmp_path / JSON).read_text("utf-8"))
    assert len(rows) == len(full.bench.runs) == 42 * 3 + 6
    assert {row["device_name"] for row in rows} == {"NVIDIA Example"}
    assert {row["torch"] for row in rows} == {STACK.torch}
    cell = document["cells"][0]
    mine = [
        float(row["tokens_per_s"])
        for row in rows
        if all(row[name] == cell[name] for name in FACTORS[:3])
        and f"{row['micro_batch']}x{row['seq_len']}" == cell["size"]
    ]
    assert mine == cell["tokens_per_s"] and len(mine) == 3
    assert float(rows[0]["s_per_10k_tokens"]) == pytest.approx(1e4 / float(rows[0]["tokens_per_s"]))
    assert document["seed"] == 0 and document["machine"]["name"] == "NVIDIA Example"
    assert len(document["effects"]) == 11
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / REPORT).read_text("utf-8").startswith("# LoRA and QLoRA on NVIDIA Example")


def test_assign_counts_repeats_in_the_order_of_the_record() -> None:
    made = design(SMALL)
    device = card()
    config = made.cells[0].config
    assert config is not None
    results = [device.answer(config) for _ in range(3)]
    results.insert(1, dataclasses.replace(results[0], outcome="interrupted"))
    results.insert(1, dataclasses.replace(results[0], outcome="timed_out"))

    runs = assign(made, results)

    assert [run.repeat for run in runs] == [1, None, 2, 3]
    assert given_up(runs) == "timed_out"


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_figures(tmp_path_factory.mktemp("figures") / "tiny")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--methods", "dora"], 64, "`--methods` must be words of"),
        (["--optimizers", "adamw"], 64, "`--optimizers` must be words of"),
        (["--sizes", "1024"], 64, "micro-batch x tokens"),
        (["--repeats", "0"], 64, "`--repeats` must be at least 1"),
        (["--steps", "1"], 64, "`--steps` must be at least 3"),
        (["--budget", "soon"], 64, "must be a time such as"),
        (["--budget", "-1m"], 64, "`--budget` must be above 0"),
        (["--checkpointing", "half"], 64, "`checkpointing` must be"),
        (["--trainer", "unsloth"], 64, "`--trainer`"),
        (["--gpu", "rtx-4060"], 64, "`--gpu` names a card to predict for"),
        (["--device", "none"], 64, "`--device` must be auto, cuda or cpu"),
        (["--vram", "0"], 64, "`--vram` must be above 0"),
        (["--model", "qwen2.5-1.5"], 64, "did you mean"),
        (["--out", "{tmp}/file/bench"], 73, "must be a place that can be written"),
        (["--out", "{tmp}/damaged"], 65, "must be a record of format 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tiny: str,
    tmp_path: Path,
    words: list[str],
    code: int,
    said: str,
) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / RECORD).write_text('{"format": 7}\n', "utf-8")
    start = ["bench", "--device", "cpu", "--model", tiny, "--out", str(tmp_path / "o")]

    ended = main([*start, *(word.format(tmp=tmp_path) for word in words)])

    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if line.startswith("Error: ")]
    assert ended == code and len(errors) == 1 and said in errors[0], told
    assert told.out == ""
    assert not (tmp_path / "o").exists() or not any((tmp_path / "o").iterdir())


def test_without_a_gpu_the_command_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_advisor.advisor.asking.gpu_present", lambda: False)

    assert main(["bench"]) == 69
    assert "give --device cpu and a small --model" in capsys.readouterr().err


def test_a_gpu_that_is_taken_ends_with_everything_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: str
) -> None:
    def prober(made: Bench, record: Path, **options: Any) -> FakeCard:
        return FakeCard(
            made.architecture, made.stack, machine=made.machine, record=record, busy_after=4
        )

    monkeypatch.setattr("lora_advisor.advisor.bench.prober", prober)
    words = ["bench", "--device", "cpu", "--model", tiny, "--out", str(tmp_path / "b")]

    assert main([*words, "--sizes", "1x512,2x512", "--repeats", "1"]) == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: The GPU must be free")
    assert len(read_records(tmp_path / "b" / RECORD)) == 4
    assert json.loads((tmp_path / "b" / JSON).read_text("utf-8"))["missing"] == 12 - 4


CPU = ["--device", "cpu", "--methods", "lora", "--optimizers", "adamw_torch",
       "--sizes", "1x16,4x64", "--steps", "3"]  # fmt: skip


@pytest.fixture
def killed(tiny: str, tmp_path: Path) -> Iterator[Path]:
    """The folder of a real bench that was killed after its first run."""
    folder = tmp_path / "bench"
    script = Path(sys.executable).with_name("lora-advisor")
    words = [str(script), "bench", "--model", tiny, *CPU, "--repeats", "50", "--out", str(folder)]
    child = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / RECORD).exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    yield folder


def test_a_real_bench_is_killed_and_goes_on(
    killed: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(read_records(killed / RECORD))
    assert before >= 1
    repeats = str(before // 2 + 2)

    code = main(["bench", "--model", tiny, *CPU, "--repeats", repeats, "--out", str(killed),
                 "--json"])  # fmt: skip

    told = capsys.readouterr()
    document = json.loads(told.out)
    assert code == 0 and document["missing"] == 0
    assert f"{before} earlier runs taken up" in told.err
    results = read_records(killed / RECORD)
    assert len(results) == 2 * int(repeats)
    assert [cell["runs"] for cell in document["cells"]] == [int(repeats)] * 2
    (found,) = document["effects"]
    assert found["ratios"]["tokens_per_s"]["value"] > 2, "16 times the tokens in a step"
    assert found["differences"]["process_bytes"]["mean"] > 0
    assert all((killed / name).exists() for name in (CSV, JSON, REPORT, PICTURE))
    for name in (CSV, JSON, REPORT):
        assert str(Path(tiny).parent) not in (killed / name).read_text("utf-8"), "a machine's path"


def test_the_folder_is_named_after_card_and_date() -> None:
    assert bench_command.card_slug(card().machine) == "nvidia-example"
    h100 = dataclasses.replace(
        card().machine, name="NVIDIA H100 80GB HBM3", memory_bytes=85520809984
    )
    assert bench_command.card_slug(h100).startswith("h100")
