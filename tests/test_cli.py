"""The command line: exit codes, one sentence for what is wrong, one JSON document on stdout.

Commands run in this process, so that imports are paid once; the kill of a plan needs processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil
import pytest
from recorded import TINY, configure
from tiny_model import save_model, save_rows
from traced_once import save_figures, share_traces

from lora_advisor.cli import group, main
from lora_advisor.probes.machine import GIB, cpu_machine
from lora_advisor.probes.plan import read_plan
from lora_advisor.probes.record import read_records

#: A plan's search in a second or two: one method, one kind of checkpointing, two micro-batches.
QUICK = ["--gpu", "rtx-4060", "--seq", "64", "--batch", "2", "--method", "lora",
         "--checkpointing", "full"]  # fmt: skip
#: A configuration with much to save: no checkpointing, a large micro-batch.
LARGE = ["--gpu", "rtx-4060", "--reserve", "0", "--seq", "512", "--method", "lora",
         "--checkpointing", "off", "--micro-batch", "64"]  # fmt: skip


class Ran(NamedTuple):
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    share_traces(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LORA_ADVISOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_figures(tmp_path_factory.mktemp("figures") / "tiny")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, a tokenizer and rows."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_model(folder)
    save_rows(folder / "rows.jsonl", 12)
    return folder


@pytest.fixture
def plan_file(whole: Path, tmp_path: Path, run: Run) -> Path:
    """A plan that says to be for this CPU: made for a card, for no probe has to run for it."""
    path = tmp_path / "plan.json"
    assert run("plan", "--model", whole, *QUICK, "--precision", "fp32", "--out", path).code == 0
    change(path, lambda plan: plan.update(machine=cpu_machine().to_json(), cap_bytes=None))
    return path


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text("utf-8"))
    how(data)
    path.write_text(json.dumps(data), "utf-8")


def refused(ran: Ran, code: int, *words: str) -> None:
    """Check that a command ended with one sentence and nothing else."""
    lines = ran.err.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert ran.code == code, ran
    assert lines and errors == lines[-1:], "one error, and it is the last word"
    assert ran.out == ""
    assert "Traceback" not in ran.err and "lora-advisor itself" not in ran.err
    for word in words:
        assert word in errors[0]


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "{tmp}/none.json", "--output", "{tmp}/o"], 66, "it is not there"),
        (["predict", "{tmp}/none.jsonl", "--gpu", "rtx-4060"], 66, "it is not there"),
        (["fit", "--config", "{tmp}/none.json"], 66, "it is not there"),
        (["fit", "--config", "{tmp}"], 65, "must be a RunConfig"),
        (["fit", "--model", "{tmp}/none/"], 66, "nothing is there"),
        (["fit", "--model", "{tmp}"], 66, "must hold a config.json"),
        (["fit", "--model", "qwen2.5-1.5"], 64, "did you mean qwen2.5-1.5b"),
        (["plan", "--model", "quen3-4b"], 64, "did you mean qwen3-4b"),
        (["fit", "--gpu", "rtx-4061"], 64, "did you mean rtx-4060"),
        (["plan", "--gpu", "rtx-4061"], 64, "did you mean rtx-4060"),
        (["predict", "{tmp}/none.jsonl", "--gpu", "xyz"], 64, "doctor --cards"),
        (["plan", "--vram", "0"], 64, "`--vram` must be above 0 GiB"),
        (["plan", "--vram", "-8"], 64, "`--vram` must be above 0 GiB"),
        (["fit", "--vram", "0"], 64, "`--vram` must be above 0 GiB"),
        (["fit", "--vram", "-8"], 64, "`--vram` must be above 0 GiB"),
        (["fit", "--vram", "nan"], 64, "`--vram` must be above 0 GiB"),
        (["fit", "--packing", "--group-by-length"], 64, "`group_by_length` must be false with"),
        (["fit", "--vram", "much"], 64, "--vram"),
        (["plan", "--vram", "2", "--reserve", "3"], 64, "`--reserve`"),
        (["plan", "--reserve", "-1"], 64, "`--reserve`"),
        (["fit", "--vram", "2", "--reserve", "3"], 64, "--reserve"),
        (["plan", "--budget", "abc"], 64, "must be a time such as 120s"),
        (["plan", "--budget", "0"], 64, "`--budget` must be above 0"),
        (["plan", "--batch", "0"], 64, "`--batch` must be at least 1"),
        (["plan", "--seq", "0"], 64, "`--seq` must be at least 2"),
        (["fit", "--seq", "0"], 64, "`seq_len` must be a whole number"),
        (["plan", "--micro-batch", "0"], 64, "`--micro-batch` must be at least 1"),
        (["plan", "--micro-batch", "7"], 64, "give --batch 28"),
        (["plan", "--objective", "fun"], 64, "`--objective` must be one of"),
        (["plan", "--device", "tpu"], 64, "`--device` must be"),
        (["fit", "--rank", "0"], 64, "`lora.r`"),
        (["fit", "--map", "--micro-batches", "0,1"], 64, "`--micro-batches` must be whole numbers"),
        (["fit", "--map", "--seqs", "256;512"], 64, "`--seqs` must be whole numbers"),
        (["fit", "--map-file", "{tmp}/file/map.png"], 73, "must be a place that can be written"),
        (["fit", "--map-file", "{tmp}/map.jpg"], 64, "`--map-file` must end in .png"),
        (["compare", "--micro-batch", "0"], 64, "`micro_batch` must be a whole number"),
        (["compare", "--method", "lora"], 64, "No such option"),
        (["compare", "--model", "llama-2-70b"], 64, "did you mean llama-2-7b"),
        (["fit", "--precision", "fp32", "--attention", "flash_attention_2"], 64, "no fp32 form"),
        (["plan", "--precision", "fp32", "--attention", "flash_attention_2"], 64, "no fp32 form"),
        (["plan", "--optimizer", "magic"], 64, "`optimizer` must be one of"),
        (["fit", "--checkpointing", "every_1"], 64, "`checkpointing` must be"),
        (["plan", "--data", "{tmp}/none.jsonl"], 64, "needs the model's tokenizer"),
        (["plan", "--nope"], 64, "No such option"),
        (["nope"], 64, "No such command"),
        (["train", "plan.json"], 64, "--output"),
        (["plan", "--out", "{tmp}/file/plan.json"], 73, "must be a place that can be written"),
        (["plan", "--device", "cpu", "--record", "{tmp}/file/r"], 73, "that can be written"),
        (["plan", "--device", "cpu", "--record", "{tmp}"], 73, "that can be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_one_sentence(
    run: Run, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")

    refused(run(*(word.format(tmp=tmp_path) for word in words)), code, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be JSON"),
        ('{"model_type": "qwen2", ', "must be JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "`model_type`"),
        (json.dumps({**TINY, "num_hidden_layers": 0}), "`num_hidden_layers`"),
        (json.dumps({**TINY, "hidden_size": "64"}), "`hidden_size`"),
        (json.dumps({**TINY, "hidden_size": 66}), "4 does not divide 66"),
        (json.dumps({**TINY, "num_key_value_heads": 3}), "3 does not divide 4"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "plan"])
def test_a_config_json_no_model_can_have_is_one_sentence(
    run: Run, tmp_path: Path, command: str, text: str, said: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, "utf-8")

    for model in (file, tmp_path):
        refused(run(command, "--model", model, "--gpu", "rtx-4060"), 65, said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"colour": "red"}, "`colour` is not a field of RunConfig"),
        ({"precision": None}, "`precision` must be one of"),
        ({"lora": {"r": 8}}, "`lora.alpha` must be given"),
        ({"trainer": "unsloth"}, "another engine"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_sentence(
    run: Run, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**configure().to_json(), "model": "qwen2.5-0.5b", **fields}))

    refused(run("fit", "--config", file, "--gpu", "rtx-4060"), 64, said)


@pytest.mark.parametrize(
    ("vram", "said"), [("0.25", "nothing fits 0.25 GiB"), ("0.3", "nothing is sure to fit 0.3 GiB")]
)
def test_a_budget_that_nothing_fits_in_is_exit_code_1(
    run: Run, tiny: str, vram: str, said: str
) -> None:
    ran = run("plan", "--model", tiny, *QUICK, "--vram", vram, "--reserve", "0", "--json")

    refused(ran, 1, said, "take a smaller model, a shorter --seq, or more --vram")


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("none.jsonl", None, 66, "there is none"),
        ("empty.jsonl", "", 65, "it is empty"),
        ("blank.jsonl", "\n\n", 65, "it is empty"),
        ("empty.json", "[]", 65, "it has none"),
        ("damaged.jsonl", '{"text": "a"}\n{"text": \n', 65, "line 2 must be one JSON object"),
        ("list.jsonl", "[1]\n", 65, "must be a JSON object"),
        ("shape.jsonl", '{"colour": "red"}\n', 65, "a known shape"),
        ("mixed.jsonl", '{"text": "a"}\n{"colour": "red"}\n', 65, "must have the column `text`"),
        ("rows.xlsx", "PAR1", 65, "must end in one of"),
        ("rows.parquet", "PAR1", 65, "must be a parquet file"),
    ],
)
def test_data_that_cannot_be_used_is_one_sentence(
    run: Run,
    whole: Path,
    tmp_path: Path,
    name: str,
    text: str | None,
    code: int,
    said: str,
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, "utf-8")

    refused(run("plan", "--model", whole, *QUICK, "--data", tmp_path / name), code, said)


def test_a_plan_for_data_tells_its_lengths_and_keeps_the_order_of_rows(
    run: Run, whole: Path, tmp_path: Path
) -> None:
    words = ["--data", whole / "rows.jsonl", "--group-by-length", "--out", tmp_path / "plan.json"]
    ran = run("plan", "--model", whole, *QUICK, *words)
    made = read_plan(tmp_path / "plan.json")

    assert ran.code == 0
    assert "tokens of a row (quantiles): 5 %" in ran.out
    assert made.chosen.config.group_by_length
    assert made.data is not None
    assert sum(rows for _, rows in made.data.length_counts) == made.data.rows == 12
    assert sum(length * rows for length, rows in made.data.length_counts) == made.data.tokens


def test_train_refuses_what_it_cannot_use(
    run: Run, plan_file: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "shape.jsonl").write_text('{"colour": "red"}\n', "utf-8")
    (tmp_path / "file").touch()
    words = ["train", plan_file, "--output"]

    refused(run(*words, tmp_path / "o"), 64, "`--data` must be given")
    for name, code in (("none", 66), ("empty", 65), ("shape", 65)):
        data = tmp_path / f"{name}.jsonl"
        refused(run(*words, tmp_path / "o", "--data", data), code, str(data))
    data = whole / "rows.jsonl"
    refused(run(*words, tmp_path / "file" / "o", "--data", data), 73, "can be written")


def test_a_plan_of_another_stack_or_machine_is_refused(
    run: Run, plan_file: Path, whole: Path, tmp_path: Path
) -> None:
    words = ["train", plan_file, "--output", tmp_path / "o", "--data", whole / "rows.jsonl"]
    here = read_plan(plan_file).stack

    change(plan_file, lambda plan: plan["stack"].update(peft="0.1", liger_kernel="9.9"))
    ran = run(*words)
    refused(ran, 78, f"peft 0.1 there, {here.peft} here", "liger_kernel 9.9 there, ")
    assert "torch" not in ran.err

    change(plan_file, lambda plan: plan.update(stack=here.to_json()))
    change(plan_file, lambda plan: plan["machine"].update(name="another CPU"))
    refused(run(*words), 78, "made on another machine (another CPU)")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda plan: plan.update(format=7), "it is of format 7; plan again"),
        (lambda plan: plan.pop("chosen"), "has no field `chosen`"),
        (lambda plan: plan.pop("machine"), "lacks a field"),
        (lambda plan: plan["chosen"]["config"].update(precision="fp7"), "`precision`"),
        (lambda plan: plan["spec"].update(vram_bytes=-1), "`--vram`"),
    ],
    ids=["format", "no chosen", "no machine", "precision", "vram"],
)
def test_a_damaged_plan_is_one_sentence(
    run: Run, plan_file: Path, tmp_path: Path, how: Callable[[dict[str, Any]], object], said: str
) -> None:
    change(plan_file, how)

    refused(run("train", plan_file, "--output", tmp_path / "o"), 65, said)


def test_a_torn_plan_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": 1, "chosen": {', "utf-8")

    refused(run("train", tmp_path / "plan.json", "--output", tmp_path), 65, "cannot be read")


@pytest.mark.parametrize("text", ["hello\n", '{"format": 7}\n', '{"format": 1}\n', "\udcff"])
def test_a_record_that_is_none_is_one_sentence(
    run: Run, tiny: str, tmp_path: Path, text: str
) -> None:
    record = tmp_path / "record.jsonl"
    record.write_bytes(text.encode("utf-8", "surrogateescape"))

    refused(run("plan", "--model", tiny, "--device", "cpu", "--record", record), 65, str(record))


# fit ---------------------------------------------------------------------------------------------


def test_fit_answers_with_its_exit_code_and_what_would_help(run: Run, tiny: str) -> None:
    words = ["fit", "--model", tiny, *LARGE, "--json", "--vram"]

    fits = run(*words, 8)

    answer = json.loads(fits.out)  # one document, or this fails
    memory = answer["prediction"]["memory"]
    context = memory["process_bytes"] - memory["reserved_bytes"]
    upper, least = memory["process_upper_bytes"], memory["needed_bytes"] + context
    assert fits.code == answer["exit_code"] == 0
    assert answer["prediction"]["verdict"] == "fits"
    assert answer["changes"] == []

    unsure = run(*words, (least + upper) / 2 / GIB)
    answer = json.loads(unsure.out)
    assert unsure.code == answer["exit_code"] == 2
    assert answer["prediction"]["verdict"] == "uncertain"

    limit = least / GIB - 0.03
    no = run(*words, limit)
    answer = json.loads(no.out)
    assert no.code == answer["exit_code"] == 1
    assert answer["prediction"]["verdict"] == "does not fit"
    assert no.err == ""
    changes = answer["changes"]
    assert len(changes) >= 2
    assert all(change["prediction"]["verdict"] == "fits" for change in changes)
    costs = [change["slower"] for change in changes]
    assert costs == sorted(costs)

    said = run(*[word for word in words if word != "--json"], limit)
    assert said.code == 1
    assert said.out.startswith("no: ")
    assert f"peak at: {answer['prediction']['memory']['instant']}" in said.out
    table = said.out.split("what would make it fit")[1]
    places = [table.index(change["name"]) for change in changes]
    assert places == sorted(places)


def test_fit_takes_a_file(run: Run, tiny: str, tmp_path: Path) -> None:
    config = configure(model=tiny)
    (tmp_path / "run.json").write_text(json.dumps(config.to_json()))

    ran = run("fit", "--config", tmp_path / "run.json", "--gpu", "rtx-4060", "--json")

    assert ran.code == 0
    assert json.loads(ran.out)["config"] == config.to_json()


def test_fit_names_the_largest_sizes_unless_told_not_to(run: Run, tiny: str) -> None:
    words = ["fit", "--model", tiny, "--gpu", "rtx-4060", "--vram", 1.5, "--method", "lora",
             "--checkpointing", "off", "--micro-batch", 2, "--seq", 512]  # fmt: skip

    found = json.loads(run(*words, "--json").out)["largest"]

    assert found["seq_len"] % 64 == 0 and found["micro_batch"] >= 2
    assert run(*words[:-1], found["seq_len"], "--no-largest").code == 0
    said = run(*words).out
    assert "if free to, the process would hold" in said.splitlines()[1]
    assert f"largest micro-batch that fits at 512 tokens: {found['micro_batch']}" in said
    assert json.loads(run(*words, "--json", "--no-largest").out)["largest"] is None


def test_fit_draws_a_map(run: Run, tiny: str, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "map.png"
    words = ["fit", "--model", tiny, "--gpu", "rtx-4060", "--map-file", picture,
             "--micro-batches", "1,2", "--seqs", "64,128", "--seq", 128]  # fmt: skip

    data = run(*words, "--json")

    answer = json.loads(data.out)
    assert data.code == answer["exit_code"] == 0
    assert [(c["micro_batch"], c["seq_len"]) for c in answer["cells"]] == [
        (1, 64), (1, 128), (2, 64), (2, 128)
    ]  # fmt: skip
    assert set(answer["cells"][0]) == {
        "micro_batch", "seq_len", "process_bytes", "at_least", "verdict"
    }  # fmt: skip
    assert answer["limit_bytes"] == int(7.75 * GIB)
    assert picture.stat().st_size > 10_000
    said = run(*words)
    assert "[+]" in said.out and f"picture in {picture}" in said.out
    assert "\x1b" not in said.out


# compare -----------------------------------------------------------------------------------------


def test_compare_is_the_plain_trainer_unless_told_otherwise(run: Run, tiny: str) -> None:
    words = ["compare", "--model", tiny, "--gpu", "rtx-4060"]

    data = json.loads(run(*words, "--json").out)

    assert [method["method"] for method in data["methods"]] == ["full", "lora", "qlora"]
    for method in data["methods"]:
        config = method["config"]
        assert (config["trainer"], config["loss"]) == ("transformers", "full")
        assert (config["checkpointing"], config["precision"]) == ("off", "bf16")
        assert (config["micro_batch"], config["seq_len"]) == (4, 512)
        assert method["prediction"]["tokens_per_s"]["low"] > 0
    changed = json.loads(run(*words, "--trainer", "trl", "--seq", 64, "--json").out)
    assert {method["config"]["loss"] for method in changed["methods"]} == {"fused"}
    assert {method["config"]["seq_len"] for method in changed["methods"]} == {64}
    said = run(*words).out
    assert "full fine-tuning" in said and "optimizer step" in said


# predict -----------------------------------------------------------------------------------------


def test_predict_answers_every_line(run: Run, tmp_path: Path) -> None:
    legal = configure().to_json()
    small = {**TINY, "num_hidden_layers": 2}
    lines = [
        json.dumps({**legal, "hf_config": small}),
        json.dumps({**legal, "model": "smollm2-135m", "micro_batch": 8, "seq_len": 1024}),
        json.dumps({**legal, "hf_config": small, "colour": "red"}),
        '{"model": "tiny", ',
        json.dumps({**legal, "hf_config": small, "trainer": "unsloth"}),
    ]
    cases = tmp_path / "cases.jsonl"
    cases.write_text("\n".join(lines) + "\n", "utf-8")

    ran = run("predict", cases, "--gpu", "rtx-4060")

    answers = [json.loads(line) for line in ran.out.splitlines()]
    assert (ran.code, ran.err) == (0, "")
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4, 5]
    for answer in answers[:2]:
        assert set(answer["memory"]) == {
            "allocated_bytes", "reserved_bytes", "process_bytes", "process_upper_bytes"
        }  # fmt: skip
        assert set(answer["throughput"]) == {"tokens_per_s", "low", "high"}
        assert answer["throughput"]["low"] <= answer["throughput"]["tokens_per_s"]
        assert (answer["verdict"], answer["evidence"]) == ("fits", "traced")
        assert answer["stack"]["torch"]
    for answer, field in zip(answers[2:], ("`colour`", "JSON object", "`trainer`"), strict=True):
        assert field in answer["error"]
        assert "memory" not in answer

    cases.write_text(lines[1] + "\n" + lines[3] + "\n", "utf-8")
    tight = run("predict", cases, "--gpu", "rtx-4060", "--vram", 0.3).out.splitlines()
    assert json.loads(tight[0])["verdict"] == "does not fit"
    fast = json.loads(run("predict", cases, "--gpu", "rtx-4090", "--json").out)["predictions"]
    assert fast[0]["throughput"]["tokens_per_s"] > answers[1]["throughput"]["tokens_per_s"]
    assert "error" in fast[1]


# plan --------------------------------------------------------------------------------------------


def test_a_plan_for_a_card_that_is_not_here(run: Run, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.json"
    words = ["plan", "--model", tiny, *QUICK, "--vram", "8"]

    ran = run(*words, "--json", "--out", out)

    plan = json.loads(ran.out)
    assert ran.code == 0
    assert "searching" in ran.err and "plan written" in ran.err
    assert plan == json.loads(out.read_text("utf-8"))
    assert plan["chosen"]["prediction"]["evidence"] == "traced"
    assert plan["chosen"]["measured"] is None
    assert plan["probes"] == 0
    assert plan["spec"]["vram_bytes"] == 8 * GIB

    ran = run(*words)
    assert (ran.code, "(not here: predicted)" in ran.out) == (0, True), ran.err
    assert "a prediction, not measured" in ran.out


# A kill in the middle of a probe -----------------------------------------------------------------


@contextlib.contextmanager
def planning(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_advisor.cli", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            yield process
        finally:
            for child in _family(process.pid):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.kill()
            process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _probing(family: list[psutil.Process]) -> bool:
    for child in family:
        with contextlib.suppress(psutil.Error):
            if "lora_advisor.probes.worker" in child.cmdline():
                return True
    return False


def _alive(child: psutil.Process) -> bool:
    try:
        return child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_a_plan_killed_in_the_middle_of_a_probe_goes_on(tiny: str, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    words = ["plan", "--model", tiny, "--device", "cpu", "--batch", "2", "--seq", "32",
             "--method", "lora", "--budget", "40s", "--record", str(record), "--json"]  # fmt: skip
    with planning(words, tmp_path / "first.txt") as process:
        deadline = time.monotonic() + 90
        family: list[psutil.Process] = []
        while not (record.exists() and record.read_bytes() and _probing(family)):
            assert process.poll() is None, (tmp_path / "first.txt").read_text("utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.05)
            family = _family(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 20
        while any(_alive(child) for child in family):
            assert time.monotonic() < deadline, "a child survived its parent"
            time.sleep(0.1)

    before = record.read_bytes()
    kept = read_records(record)
    assert len(kept) == 1 and kept[0].outcome == "ok"

    log = tmp_path / "second.txt"
    with planning(words, log) as process:
        assert process.wait(120) == 0, log.read_text("utf-8")

    assert record.read_bytes().startswith(before)
    plan = json.loads(log.read_text("utf-8").splitlines()[-1])
    results = read_records(record)
    assert plan["reused"] == sum(not one.doubts for one in kept)
    # A fresh plan probes these too: what was kept did not run again. A doubtful time, as on a busy
    # machine, is measured twice and counts as one probe.
    new = results[len(kept) :]
    doubtful = sum(bool(result.doubts) for result in new)
    assert max(1, len(new) - doubtful) <= plan["probes"] <= len(new)
    if not kept[0].doubts:
        assert all(result.config != kept[0].config for result in results[1:])
    assert plan["chosen"]["measured"]["outcome"] == "ok"


# Help, doctor, version ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *sorted(group.commands)])
def test_every_option_has_a_help_text(run: Run, name: str | None) -> None:
    command = group if name is None else group.commands[name]

    ran = run(*([] if name is None else [name]), "--help")

    assert (ran.code, ran.err) == (0, "")
    assert command.help and command.help.splitlines()[0] in " ".join(ran.out.split())
    with click.Context(command) as context:
        for option in command.get_params(context):
            if isinstance(option, click.Option):
                assert option.help, option.name
                assert option.opts[0] in ran.out


def test_doctor_is_one_document(run: Run) -> None:
    ran = run("doctor", "--json")

    assert ran.code == 0
    assert json.loads(ran.out)
    assert "rtx-4060" in json.loads(run("doctor", "--cards", "--json").out)
    assert "rtx-4060" in run("doctor", "--cards").out


def test_the_version(run: Run) -> None:
    from importlib import metadata

    ran = run("--version")

    assert ran.code == 0
    assert metadata.version("lora-advisor") in ran.out


def test_figures_that_name_their_layers_otherwise_are_traced_and_offload_has_no_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {
        "model": "gpt2", "method": "lora", "micro_batch": 1, "seq_len": 64,
        "optimizer": "adamw_torch_fused", "precision": "bf16", "checkpointing": "offload",
        "attention": "sdpa", "kernels": "none", "loss": "fused", "compile": "off",
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"},
        "allocator": "default",
        "hf_config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2,
                      "vocab_size": 100, "n_positions": 64},
    }  # fmt: skip
    (tmp_path / "cases.jsonl").write_text(json.dumps(case))

    assert main(["predict", str(tmp_path / "cases.jsonl"), "--gpu", "rtx-4060"]) == 0

    answer = json.loads(capsys.readouterr().out)
    assert answer["memory"]["allocated_bytes"] > 0
    assert answer["throughput"] is None
