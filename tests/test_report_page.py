"""`report`: what the page, its picture and its Markdown say, of a plan and of a training."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from made_up_device import Device, plan_with
from parsed_page import Parsed
from tiny_training import config_of, run
from traced_once import save_figures, share_traces

from lora_advisor.advisor import page_predictor
from lora_advisor.advisor.outcome import Predicted
from lora_advisor.advisor.page import page, title_of
from lora_advisor.advisor.page_html import document, tag
from lora_advisor.advisor.page_map import largest_table
from lora_advisor.advisor.page_markdown import report_markdown
from lora_advisor.advisor.page_memory import parts_of
from lora_advisor.advisor.page_numbers import Point, front_of, limit_of, points_of
from lora_advisor.advisor.page_predictor import map_of, predictor_of, trail_from_record
from lora_advisor.advisor.page_source import read_source
from lora_advisor.cli import main
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan, read_plan, write_plan
from lora_advisor.probes.record import read_records
from lora_advisor.probes.spec import Spec

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

REGRET = Path(__file__).parent / "recordings" / "regret"
H100 = REGRET / "plan-qwen2.5-1.5b-1024-peft.json"
HOSTILE = """<script>alert("x")</script> & 'a' | <b>`bold`</b> \x1b[31m"""

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    share_traces(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LORA_ADVISOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def say(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return say


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of a made-up device, with all its probes."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        patch.setenv("OMP_NUM_THREADS", "1")
        spec = Spec(
            model=save_figures(folder / "tiny"), vram_bytes=4 * GIB, seq_len=512,
            effective_batch=4, device="cpu", 
            fixed={"precision": "bf16", "method": "lora", "optimizer": "adamw_torch_fused"},
        )  # fmt: skip
        return plan_with(Device(spec), folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a training of a second, with a plan beside it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    tiny_model.save_model(folder / "model")
    tiny_model.save_rows(folder / "rows.jsonl")
    plan = json.loads(H100.read_text())
    promised = Predicted(padded_tokens_per_s=1234.5, peak_bytes=GIB)
    run(config_of(folder / "model"), folder / "rows.jsonl", folder / "first",
        eval_steps=4, predicted=promised, plan=plan)  # fmt: skip
    torch.set_num_threads(threads)
    yield folder / "first"


def unfinished(trained: Path, folder: Path) -> Path:
    """Return a copy of a training as a kill leaves it: no result, a last line that is torn."""
    copy = folder / "killed"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoint-*", "best-*"))
    (copy / "result.json").unlink()
    journal = copy / "progress.jsonl"
    lines = [line for line in journal.read_text().splitlines() if '"step"' in line]
    journal.write_text(lines[0] + '\n{"event": "progress", "st')
    return copy


def test_the_answer_comes_first_and_agrees_with_the_plan() -> None:
    source = read_source(H100)
    plan = read_plan(H100)

    parsed = Parsed(page(source, None))

    chosen = plan.chosen.measured
    assert chosen is not None and chosen.tokens_per_s is not None
    answer, rest = parsed.text.split("Memory\n")[0], parsed.text
    for figure in (f"{chosen.tokens_per_s:,.0f}", f"{(chosen.process_bytes or 0) / GIB:.2f} GiB"):
        assert figure in answer
        assert rest.index(figure) < rest.index("part of the process")
    assert "proved" in answer and "11.5 x" in answer
    for candidate in (*plan.runners_up, *plan.rejected):
        assert candidate.reason is not None and candidate.reason in parsed.text
    assert plan.stack.torch in parsed.text and str(plan.machine.driver) in parsed.text


def test_the_page_loads_nothing_and_is_small() -> None:
    html = page(read_source(H100), None)

    parsed = Parsed(html)
    assert len(html.encode()) < 500_000
    loading = {"src", "href", "xlink:href", "srcset", "data", "action"}
    assert [a for _, a in parsed.tags if loading & a.keys()] == []
    assert "url(" not in html and "@import" not in html
    policy = next(a for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_the_parts_of_the_bar_are_the_process() -> None:
    plan = read_plan(H100)

    parts = parts_of(plan)

    held = plan.chosen.prediction.memory.process_bytes
    assert abs(sum(size for _, size in parts) - held) < 2**21
    bars = Parsed(page(read_source(H100), None)).of_class("bar")
    assert len([b for b in bars if "share" not in b]) >= 2 * len(parts)  # at both widths


def test_names_of_others_stay_text(tmp_path: Path) -> None:
    plan = read_plan(H100)
    bad = dataclasses.replace(
        plan,
        architecture=dataclasses.replace(plan.architecture, name=HOSTILE),
        machine=dataclasses.replace(plan.machine, name=HOSTILE),
        excluded=((HOSTILE, HOSTILE),),
    )
    file = tmp_path / """a "quoted" & <i>odd</i> 'name'.json"""
    write_plan(file, bad)
    source = read_source(file)

    parsed = Parsed(page(source, None))

    clean = Parsed(page(read_source(H100), None))
    assert {name for name, _ in parsed.tags} == {name for name, _ in clean.tags}
    assert [n for n, _ in parsed.tags].count("script") == 1
    assert """<script>alert("x")</script> & 'a' |""" in parsed.text
    assert file.name in parsed.text
    assert "\x1b" not in parsed.text
    words = report_markdown(source, None)
    assert "<script>" not in words.replace("\\<script\\>", "") and "\x1b" not in words
    assert all(line.count("|") - line.count("\\|") in (0, *range(3, 9))
               for line in words.splitlines())  # fmt: skip


@pytest.mark.parametrize(
    ("content", "code"),
    [("hello\n", 64), ("[1, 2]", 64), ('{"a": 1}', 64), ('{"chosen": 1}', 65), (b"\xff\xfe", 64)],
)
def test_what_is_no_plan_is_refused_in_a_sentence(
    say: Say, tmp_path: Path, content: str | bytes, code: int
) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    ended, out, err = say("report", file)

    assert (ended, out) == (code, "")
    assert err.startswith("Error: `") and err.count("\n") == 1 and "must be a plan" in err
    assert not file.with_suffix(".html").exists()


def test_a_folder_without_a_training_is_refused(say: Say, tmp_path: Path) -> None:
    ended, _, err = say("report", tmp_path)

    assert ended == 64 and "must be the folder of a training" in err
    assert say("report", tmp_path / "nowhere")[0] == 66
    assert say("report", H100, "--png", tmp_path / "a.jpg")[0] == 64
    assert say("report", H100, "--out", tmp_path / "a.html", "--record", tmp_path / "no")[0] == 66
    (tmp_path / "file").write_text("")
    assert say("report", H100, "--out", tmp_path / "file" / "a.html")[0] == 73


def test_a_damaged_training_is_told_from_none(say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"identity": {"method": "lora"}}))

    ended, _, err = say("report", folder)

    assert ended == 65 and "is damaged" in err


def test_all_three_files_are_written(say: Say, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a.html", "a.png", "a.md")]

    ended, out, _ = say("report", H100, "--no-map", "--json", "--out", places[0],
                        "--png", places[1], "--markdown", places[2])  # fmt: skip

    assert ended == 0
    assert [Path(path) for path in json.loads(out)["files"].values()] == places
    assert places[0].read_text("utf-8").startswith("<!doctype html>")
    width, height = struct.unpack(">II", places[1].read_bytes()[16:24])
    assert (width, height > 700) == (1650, True)
    words = places[2].read_text("utf-8")
    assert "36,503" in words and "| weights" in words
    assert not list(tmp_path.glob("*.part"))


def test_the_page_lies_beside_the_plan_unless_told_otherwise(say: Say, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    shutil.copy(H100, file)

    assert say("report", file, "--no-map")[0] == 0

    assert (tmp_path / "mine.html").exists()


def test_a_plan_keeps_what_was_expected_of_each_probe(made: Plan, tmp_path: Path) -> None:
    assert len(made.trail) >= made.probes > 1
    assert made.trail[0].why == "baseline" and made.trail[-1].why == "proof"
    assert made.trail[-1].config == made.chosen.config
    first = made.trail[0]
    # Of a device without published figures nothing is known before the first probe.
    assert first.expected_tokens_per_s is None and first.expected_process_bytes is not None
    later = made.trail[-1]
    assert later.expected_tokens_per_s is not None and later.expected_evidence == "probed"
    assert later.tokens_per_s == made.chosen.tokens_per_s
    assert {c.verdict for c in made.considered} <= {"fits", "uncertain", "does not fit"}
    assert len(made.considered) > len(made.runners_up)

    write_plan(tmp_path / "plan.json", made)
    read = read_plan(tmp_path / "plan.json")

    assert read.trail == made.trail and read.considered == made.considered


def test_a_plan_of_an_older_program_is_shown_with_what_it_holds() -> None:
    source = read_source(H100)

    text = Parsed(page(source, None)).text

    assert source.plan is not None and not source.plan.trail
    times = [probed.started_at or "" for probed in source.trail]
    assert times == sorted(times) and source.trail[0].why == "baseline"
    assert "does not hold what was predicted before each probe" in text


def test_expectations_follow_again_from_the_record(made: Plan) -> None:
    plan = dataclasses.replace(made, trail=())
    results = [r for c in (made.baseline, *made.runners_up, made.chosen)
               if c is not None and (r := c.measured) is not None]  # fmt: skip
    predictor = predictor_of(plan, None)

    trail = trail_from_record(plan, results, predictor)

    assert [probed.tokens_per_s for probed in trail] == [r.tokens_per_s for r in results]
    assert trail[-1].why == "proof" and trail[0].why == "baseline"
    assert trail[-1].expected_evidence == "probed"
    fresh = predictor.predict(results[-1].config)
    assert fresh.evidence == "traced"  # what came later taught only what was asked later
    other = read_records(REGRET / "probes-qwen2.5-1.5b-1024-peft.jsonl")
    assert trail_from_record(plan, other, predictor) == ()


def test_nothing_on_the_page_beats_the_front(made: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", made)
    points = points_of(read_source(tmp_path / "plan.json"))
    limit = limit_of(made)

    best = front_of(points, limit)

    fits = [p for p in points if p.runs and p.process_bytes <= limit]
    assert len(points) > 3 and best
    for point in best:
        assert not any(
            p.tokens_per_s >= point.tokens_per_s and p.process_bytes < point.process_bytes
            for p in fits
        )
    for point in fits:
        assert any(p.tokens_per_s >= point.tokens_per_s and p.process_bytes <= point.process_bytes
                   for p in best)  # fmt: skip


def test_what_is_over_the_limit_is_not_on_the_front() -> None:
    def at(speed: float, size: int, **changes: Any) -> Point:
        return Point(what=f"{speed}", tokens_per_s=speed, process_bytes=size, **changes)

    points = [at(9, 9, measured=True), at(5, 3), at(4, 2), at(4, 3), at(8, 4, runs=False)]

    assert [p.tokens_per_s for p in front_of(points, 5)] == [4, 5]


def test_the_map_shows_every_size_with_its_verdict(
    made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_predictor, "_MICRO_BATCHES", (1, 64))
    monkeypatch.setattr(page_predictor, "_TIMES", 1)
    write_plan(tmp_path / "plan.json", made)
    drawn, why = map_of(made, predictor_of(made, None))

    assert drawn is not None and why is None
    assert (drawn.asked.micro_batch, drawn.asked.seq_len) == (made.chosen.config.micro_batch, 512)
    parsed = Parsed(page(read_source(tmp_path / "plan.json"), drawn))
    for verdict, kind in (("uncertain", "u"), ("does not fit", "n")):
        cells = [c for c in parsed.of_class(kind) if "data-tip" in c]
        assert len(cells) == 2 * sum(cell.verdict == verdict for cell in drawn.cells)
    largest = {row[0]: row[1] for row in largest_table(drawn).rows}
    for length in drawn.seq_lens:
        fits = [b for b in drawn.micro_batches if drawn.at(b, length).verdict == "fits"]
        assert largest[f"{length:,}"] == (f"{max(fits)}" if fits else "none")


def test_a_training_shows_its_curves_and_what_was_promised(say: Say, trained: Path) -> None:
    source = read_source(trained)

    parsed = Parsed(page(source, None, no_map="none here"))

    assert source.run is not None and source.run.result is not None
    result = source.run.result
    assert "The training went through: 12 steps" in parsed.text
    assert f"{result.eval_loss_before:.3f} → {result.eval_loss_after:.3f}" in parsed.text
    assert "1,234" in parsed.text  # promised
    marks = parsed.of_class("held")
    assert len([m for m in marks if "data-tip" in m]) == 2 * (1 + len(result.evaluations))
    curves = parsed.of_class("curve")
    assert curves and all("nan" not in (c["d"] or "") for c in curves)
    assert "none here" in parsed.text  # the plan's part is there too
    assert say("report", trained, "--no-map", "--markdown", trained.parent / "a.md")[0] == 0
    assert (trained / "report.html").exists()
    assert "Predicted beside measured" in (trained.parent / "a.md").read_text("utf-8")


def test_a_training_that_has_not_ended_says_so(say: Say, trained: Path, tmp_path: Path) -> None:
    killed = unfinished(trained, tmp_path)

    ended, _, _ = say("report", killed, "--no-map", "--png", tmp_path / "a.png",
                      "--markdown", tmp_path / "a.md")  # fmt: skip

    assert ended == 0
    text = Parsed((killed / "report.html").read_text("utf-8")).text
    assert "had not ended when this report was made" in text and "of 12" in text
    assert "had not ended" in (tmp_path / "a.md").read_text("utf-8")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_training_that_has_reported_nothing_is_shown(trained: Path, tmp_path: Path) -> None:
    killed = unfinished(trained, tmp_path)
    (killed / "progress.jsonl").unlink()
    (killed / "plan.json").unlink()
    source = read_source(killed)

    text = Parsed(page(source, None)).text

    assert source.plan is None
    assert "has reported nothing yet" in text and "Nothing was reported yet." in text


def test_of_two_reports_of_a_step_the_later_counts(trained: Path, tmp_path: Path) -> None:
    killed = unfinished(trained, tmp_path)
    first = {"event": "progress", "time": 1.0, "step": 1, "steps": 9, "loss": 3.0,
             "tokens_per_s": 10.0, "padded_tokens_per_s": 12.0, "peak_bytes": None,
             "seconds_left": 5.0}  # fmt: skip
    lines = [first, {**first, "step": 4}, {**first, "step": 6, "loss": None},
             {"event": "recovery", "text": "memory ran out", "time": 2.0},
             {**first, "step": 5, "loss": 2.0}]  # fmt: skip
    journal = "".join(json.dumps(line) + "\n" for line in lines)
    (killed / "progress.jsonl").write_text(journal + '{"event": "pro')

    run_ = read_source(killed).run

    assert run_ is not None
    assert [(p.step, p.loss) for p in run_.points] == [(1, 3.0), (4, 3.0), (5, 2.0)]
    assert run_.events == ((6, "recovery", "memory ran out"),)
    (killed / "progress.jsonl").write_text(json.dumps(lines[2]) + "\n")
    source = read_source(killed)
    assert source.run is not None and math.isnan(source.run.points[0].loss)
    assert "no number" in page(source, None)


def test_a_plan_of_a_card_that_is_not_there_says_so(say: Say, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    model = save_figures(tmp_path / "tiny")
    code, _, err = say("plan", "--model", model, "--gpu", "rtx-4060", "--seq", "64", "--batch", "2",
                       "--method", "lora", "--checkpointing", "full", "--out", plan)  # fmt: skip
    assert code == 0, err
    source = read_source(plan)

    text = Parsed(page(source, None)).text

    assert "(not there: predicted)" in title_of(source)
    assert "traced: a prediction, not measured" in text
    assert "No probe was run: every figure is a prediction." in text
    # No figure of the answer is called measured.
    assert "measured" not in text.split("What to run")[1].split("Memory")[0].replace(
        "not measured", "").replace("It was not measured", "")  # fmt: skip


def test_text_and_attributes_are_escaped() -> None:
    html = document('<&">', [tag("p", "<b>", tag("i", "x"), "&amp;", data_tip='"><script>')])

    parsed = Parsed(html)
    assert [name for name, _ in parsed.tags if name in ("b", "script")] == ["script"]
    assert "<b>x&amp;" in parsed.text
    assert ("p", {"data-tip": '"><script>'}) in parsed.tags
