"""Runs given away and taken: nothing private goes out, nothing damaged comes in or is own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import TINY, configure
from traced_once import save_figures, share_traces

from lora_advisor.advisor.portable import digest, portable
from lora_advisor.advisor.record_stats import groups_of
from lora_advisor.cli import main
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.machine import GIB, Machine, detect_stack
from lora_advisor.probes.plan import read_plan
from lora_advisor.probes.record import ProbeResult, append_record, read_records

RECORDS = sorted((Path(__file__).parent / "recordings").rglob("*.jsonl"))
CARD = Machine(
    kind="cuda", name="NVIDIA GeForce RTX 4060", memory_bytes=8 * GIB, driver="580.65.06",
    capability="8.9", host="a CPU of the lab",
)  # fmt: skip
SECRET = "/home/ann/secret-project/model"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    share_traces(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LORA_ADVISOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


Said = tuple[int, str, str]
Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def measured(seq_len: int = 64, step_s: float = 0.2, **changes: Any) -> ProbeResult:
    """Return a run of the tiny model on a card of the lab."""
    figures = {**TINY, "num_hidden_layers": 2, "_name_or_path": SECRET}
    config = configure(method="lora", seq_len=seq_len, micro_batch=1)
    return dataclasses.replace(
        ProbeResult(
            config=dataclasses.replace(config, model=SECRET),
            architecture=from_hf_config("tiny", figures).fingerprint,
            hf_config=figures,
            machine=CARD,
            stack=detect_stack(),
            outcome="ok",
            detail=f"{SECRET}/config.json was read",
            allocated_bytes=GIB,
            reserved_bytes=GIB,
            process_bytes=2 * GIB,
            context_bytes=200 * 2**20,
            step_times_s=(step_s,) * 3,
            tokens_per_step=config.tokens_per_step,
            started_at="2026-11-25T10:00:00Z",
        ),
        **changes,
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def shared(cache: Path, tmp_path: Path, run: Run) -> Path:
    """A file as a lab would share it: three runs, one of them twice in the record."""
    for result in (*(measured(n) for n in (64, 128, 256)), measured(64)):
        append_record(cache / "probes.jsonl", result)
    out = tmp_path / "ours.jsonl"
    assert run("records", "export", out)[0] == 0
    (cache / "probes.jsonl").unlink()  # from here on it is somebody else's cache
    return out


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_recorded_runs_go_out_and_come_in_as_they_were(
    path: Path, tmp_path: Path, cache: Path, run: Run
) -> None:
    results = read_records(path)
    out = tmp_path / "out.jsonl"

    assert run("records", "export", out, "--record", path)[0] == 0
    assert run("records", "import", out)[:2] == (0, f"{len(results)} runs taken, 0 known before\n")
    taken = read_records(cache / "imported.jsonl")

    for there, here in zip(results, taken, strict=True):
        known = dataclasses.replace(there, config=here.config, hf_config=here.hf_config)
        assert dataclasses.replace(known, detail=None) == here
        assert portable(here) == portable(there)


def test_nothing_private_goes_out_and_repeats_go_once(shared: Path) -> None:
    text = shared.read_text("utf-8")
    lines = lines_of(shared)

    assert not any(word in text for word in ("ann", "secret", "detail", "_name_or_path"))
    assert len(lines) == 3
    assert {line["config"]["model"] for line in lines} == {
        f"architecture-{lines[0]['architecture']}"
    }
    assert [line["hash"] for line in lines] == [digest(line) for line in lines]
    assert lines[0]["machine"]["name"] == CARD.name
    assert lines[0]["step_times_s"] == [0.2, 0.2, 0.2]


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-1.5B", "qwen2.5-1.5b", "acme/unreleased"])
def test_only_names_that_anyone_knows_are_kept(model: str) -> None:
    result = measured()
    result = dataclasses.replace(result, config=dataclasses.replace(result.config, model=model))

    kept = portable(result).result.config.model

    assert kept == (model if "wen" in model else f"architecture-{result.architecture}")


def test_a_path_anywhere_in_the_figures_goes_and_the_fingerprint_follows() -> None:
    figures = {**TINY, "quantization_config": {"bits": 4, "cache": "C:\\models\\mine"}}

    line = portable(measured(hf_config=figures))

    assert line.result.hf_config["quantization_config"] == {"bits": 4}
    assert line.result.architecture == from_hf_config("", line.result.hf_config).fingerprint


def test_export_takes_given_records_and_says_what_is_not_there(tmp_path: Path, run: Run) -> None:
    code, out, err = run("records", "export", tmp_path / "x.jsonl")

    assert (code, out) == (66, "")
    assert "probes.jsonl` must be a record of runs, but it is not there" in err
    assert not (tmp_path / "x.jsonl").exists()


def test_import_twice_takes_once(shared: Path, cache: Path, run: Run) -> None:
    assert run("records", "import", shared)[:2] == (0, "3 runs taken, 0 known before\n")
    assert run("records", "import", shared)[:2] == (0, "0 runs taken, 3 known before\n")
    assert len(read_records(cache / "imported.jsonl")) == 3


def test_what_was_measured_here_is_not_imported_again(shared: Path, cache: Path, run: Run) -> None:
    append_record(cache / "probes.jsonl", measured(128))

    assert run("records", "import", shared)[1] == "2 runs taken, 1 known before\n"


def damage(line: dict[str, Any], what: str) -> str:
    if what == "cut":
        return json.dumps(line)[:40]
    if what == "figure":
        return json.dumps({**line, "step_times_s": [0.001]})
    changed = {
        "no hash": {key: value for key, value in line.items() if key != "hash"},
        "format": {**line, "format": 99},
        "nonsense": {**line, "process_bytes": "much"},
        "card": {**line, "machine": {**line["machine"], "kind": "card"}},
        "negative": {**line, "step_times_s": [-1.0]},
        "other model": {**line, "architecture": "0" * 16},
    }[what]
    if what != "no hash":
        changed["hash"] = digest(changed)  # whoever lies can hash too
    return json.dumps(changed)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut", "damaged"),
        ("figure", "its hash is not that of its content"),
        ("no hash", "it has no `hash`"),
        ("format", "it must be of format 1, but is of 99"),
        ("nonsense", "`process_bytes` must be int | None, but is 'much'"),
        ("card", "`machine.kind` must be"),
        ("negative", "`step_times_s` must be"),
        ("other model", "`architecture` is not the fingerprint"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_taken(
    shared: Path, cache: Path, run: Run, what: str, words: str
) -> None:
    lines = lines_of(shared)
    texts = [json.dumps(lines[0]), damage(lines[1], what), "", json.dumps(lines[2])]
    shared.write_text("\n".join(texts), "utf-8")

    code, out, err = run("records", "import", shared)

    assert (code, out) == (65, "")
    assert f"line 2: {words}" in err or (words in err and "line 2: " in err)
    assert "1 are not such (2); of the others 2 runs taken, 0 known before" in err
    assert len(read_records(cache / "imported.jsonl")) == 2


def test_the_json_of_an_import_names_the_bad_lines(shared: Path, run: Run) -> None:
    shared.write_text(shared.read_text("utf-8") + "{}\n", "utf-8")

    code, out, _ = run("records", "import", shared, "--json")

    assert code == 65
    assert json.loads(out) == {
        "taken": 3, "known": 0,
        "bad": [{"line": 4, "reason": "it must be of format 1, but is of None"}],
    }  # fmt: skip


def test_stats_count_by_machine_and_say_the_errors(shared: Path, cache: Path, run: Run) -> None:
    run("records", "import", shared)
    append_record(cache / "probes.jsonl", measured(64, outcome="out_of_memory", step_times_s=()))
    other = dataclasses.replace(CARD, name="NVIDIA X", host=None)
    append_record(cache / "probes.jsonl", measured(64, machine=other))

    code, out, _ = run("records", "stats", "--json")
    groups = json.loads(out)["groups"]

    assert code == 0
    assert [(g["machine"]["name"], g["runs"], g["imported"]) for g in groups] == [
        (CARD.name, 4, 3), ("NVIDIA X", 1, 0),
    ]  # fmt: skip
    assert dict(groups[0]["outcomes"]) == {"ok": 3, "out_of_memory": 1}
    assert groups[0]["allocator"]["runs"] == 3
    # A tiny model in 1 GiB: what is predicted is nearly nothing.
    assert groups[0]["allocator"]["median"] > 0.9
    assert groups[1]["speed"] is None  # no such card in the table
    table = run("records", "stats", "--quick")[1]
    assert "4 (3 imported)" in table
    assert "3 ok, 1 out of memory" in table


def test_runs_that_taught_are_predicted_better_than_before() -> None:
    # A machine whose time is that of its rows: half of the runs tell the other half.
    runs = [measured(64 * n, step_s=0.02 * n, reserved_bytes=None) for n in range(1, 7)]

    (group,) = groups_of([], runs, errors=True)

    assert group.taught_speed is not None and group.speed is not None
    assert group.taught_speed.runs == 6
    assert group.taught_speed.median < group.speed.median


# A plan for a card that is not here ---------------------------------------------------------------

QUICK = ["--gpu", "rtx-4060", "--seq", "64", "--batch", "2", "--method", "lora",
         "--checkpointing", "full", "--trials", "0"]  # fmt: skip


def plan(run: Run, tmp_path: Path, *words: object) -> tuple[Any, str, str]:
    model = save_figures(tmp_path / "tiny")
    out = tmp_path / f"plan-{time.monotonic_ns()}.json"
    code, text, err = run("plan", "--model", model, *QUICK, "--out", out, *words)
    assert code == 0, err
    return read_plan(out), text, err


def test_a_plan_for_a_card_learns_from_imported_runs_of_it_and_says_so(
    shared: Path, tmp_path: Path, run: Run
) -> None:
    before, _, _ = plan(run, tmp_path)
    run("records", "import", shared)

    after, text, err = plan(run, tmp_path)

    assert before.chosen.evidence == "traced" and before.imported_from is None
    assert after.chosen.evidence == "probed elsewhere"
    assert after.chosen.prediction.memory.evidence == "probed elsewhere"
    assert (after.imported, after.imported_from, after.probes, after.reused) == (3, CARD, 0, 0)
    # The configuration that ran there has not run here.
    every = [after.chosen, after.baseline, *after.runners_up, *after.rejected]
    assert all(candidate is None or candidate.measured is None for candidate in every)
    assert after.trail == ()
    assert "none of them measured here" in text
    assert f"3 imported runs of an {CARD.name} in a machine with {CARD.host} reused" in text
    assert "not measured here" in err
    # What they measured, some 320 tokens/s, is far below the card's figures.
    assert after.chosen.tokens_per_s < before.chosen.tokens_per_s / 3


@pytest.mark.parametrize("case", ["another card", "another stack", "doubtful", "fresh"])
def test_runs_that_are_not_of_this_card_and_stack_teach_nothing(
    shared: Path, tmp_path: Path, run: Run, case: str
) -> None:
    results = read_records(shared)
    card = find_card("rtx-3090")
    cases: dict[str, dict[str, Any]] = {
        "another card": {
            "machine": dataclasses.replace(
                CARD, name="NVIDIA GeForce RTX 3090", memory_bytes=card.memory_bytes
            )
        },
        "another stack": {"stack": dataclasses.replace(detect_stack(), torch="2.0.0")},
        "doubtful": {"contended": True},
        "fresh": {},
    }
    changes = cases[case]
    shared.write_text(
        "".join(portable(dataclasses.replace(r, **changes)).text + "\n" for r in results)
    )
    assert run("records", "import", shared)[0] == 0

    made, _, err = plan(run, tmp_path, *(["--fresh"] if case == "fresh" else []))

    assert made.chosen.evidence == "traced"
    assert made.imported == 0
    assert ("other versions (torch 2.0.0 there" in err) == (case == "another stack")
