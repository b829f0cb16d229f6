"""Two processes that train together on a CPU: the same weights as one, and none left behind.

Launches are shared: each costs the imports of two processes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from hand_made_plan import save_plan
from launching import TESTS, finish, start
from tiny_training import config_of, run, weights

from lora_advisor.advisor.data_parallel import blank_rows
from lora_advisor.advisor.launched import Launch, launched, shared_config, take_own_card
from lora_advisor.advisor.outcome import TrainingResult
from lora_advisor.advisor.processes import PeerError, Processes, here, is_agreed
from lora_advisor.advisor.run_folder import is_complete
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UnavailableError, UsageError
from lora_advisor.probes.spec import Spec

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

#: How far a weight may be from that of one process, whose largest is 0.16 after these steps: sums
#: in fp32 run in another order.
TOLERANCE = 1e-6

#: The trainings that are killed and their unbroken twin.
LONG: dict[str, Any] = {"max_steps": 18, "save_steps": 3, "holdout": 0.2, "eval_steps": 7}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_model(folder)
    # 17 of 21 are trained on: 9 micro-batches of 2, 5 for one process and 4 for the other, the last
    # of a single row.
    tiny_model.save_rows(folder / "rows.jsonl", 21)
    return folder


def still(tiny: Path, **changes: Any) -> RunConfig:
    """Return a configuration without dropout, whose steps do not depend on who takes which row."""
    shape = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    return config_of(tiny, **{"lora": shape, "trainer": "trl", "loss": "fused", **changes})


Case = dict[str, Any]


@pytest.fixture(scope="module")
def cases(tiny: Path) -> dict[str, Case]:
    uneven = {"max_steps": None, "epochs": 2.0, "holdout": 0.2, "save_steps": 100}
    short = {"max_steps": 2, "holdout": 0.2, "save_steps": 100}
    return {
        "uneven": {"config": still(tiny), "changes": uneven},
        "grouped": {
            "config": still(tiny, trainer="transformers", loss="full", group_by_length=True),
            "changes": uneven,
        },
        "unbroken": {"config": config_of(tiny), "changes": LONG},
        # One cannot take two rows, and all give way before the first step.
        "too small": {"config": still(tiny), "changes": short, "too_small_in": 1, "after": 0},
        # Its memory runs out in the fourth step, after the longest rows and three micro-batches:
        # the last case, for it ends both.
        "too small later": {
            "config": still(tiny), "changes": {**short, "max_steps": 9, "save_steps": 2},
            "too_small_in": 1, "after": 4,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def together(tiny: Path, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two processes have trained every case."""
    folder = tmp_path_factory.mktemp("together")
    listed = [
        {**case, "config": case["config"].to_json(), "data": str(tiny / "rows.jsonl"),
         "output": str(folder / name)}
        for name, case in cases.items()
    ]  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(listed), "utf-8")
    children = start([TESTS / "train_together.py", folder / "cases.json"])
    (folder / "said.json").write_text(json.dumps(finish(children)), "utf-8")
    assert (folder / "too small" / "result.json").exists(), (folder / "said.json").read_text()
    assert [child.returncode for child in children] == [71, 71]
    return folder


def result_in(folder: Path) -> TrainingResult:
    return TrainingResult.from_json(json.loads((folder / "result.json").read_text("utf-8")))


@pytest.mark.parametrize("name", ["uneven", "grouped"])
def test_two_processes_train_what_one_does_with_twice_the_accumulation(
    together: Path,
    cases: dict[str, Case],
    tiny: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr("lora_advisor.advisor.watch.REPORT_S", 0.0)
    two = result_in(together / name)
    one = run(cases[name]["config"], tiny / "rows.jsonl", tmp_path, **cases[name]["changes"])
    files = (two.adapter, one.adapter)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in files)
    far = max(float((a[key] - b[key]).abs().max()) for key in b)
    assert a.keys() == b.keys() and far < TOLERANCE
    assert max(float(value.abs().max()) for value in b.values()) > 0.1
    assert (two.steps, two.rows, two.config.accumulation) == (one.steps, one.rows, 1)
    assert two.eval_loss_before == pytest.approx(one.eval_loss_before, rel=1e-5)
    assert two.eval_loss_after == pytest.approx(one.eval_loss_after, rel=1e-5)
    assert two.losses[-1] == pytest.approx(one.losses[-1], rel=1e-4)
    assert two.likelihood is not None and one.likelihood is not None
    assert two.likelihood.drop_nats == pytest.approx(one.likelihood.drop_nats, rel=1e-3)


def test_one_folder_is_written_by_one_process(together: Path, cases: dict[str, Case]) -> None:
    lines = (together / "uneven" / "progress.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"progress"' in line]
    assert steps == sorted(set(steps)) and steps[-1] == 10
    ranks = [json.loads((together / "uneven" / f"rank-{r}").read_text("utf-8")) for r in (0, 1)]
    assert ranks[0]["reports"] == len(steps) and ranks[1]["reports"] == 0
    state = json.loads((together / "uneven" / "state.json").read_text("utf-8"))
    assert state["identity"]["processes"] == 2


def test_tokens_are_those_of_all_processes(together: Path) -> None:
    # Every step has 4 rows of 67 to 75 tokens, of which one process sees two.
    measured = result_in(together / "unbroken").measured
    assert measured.step_s is not None and measured.padded_tokens_per_s is not None
    assert 3 * 60 < measured.padded_tokens_per_s * measured.step_s < 5 * 80
    assert all(report["padded_tokens_per_s"] > 0 for report in _reports(together / "unbroken"))


def _reports(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "progress.jsonl").read_text("utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == "progress"]


def test_memory_that_runs_out_in_one_process_is_given_way_to_by_all(together: Path) -> None:
    result = result_in(together / "too small")
    (recovery,) = result.recoveries
    assert (recovery.micro_batch, recovery.new_micro_batch, recovery.after_step) == (2, 1, 0)
    assert result.steps == 2
    said = json.loads((together / "too small" / "rank-0").read_text("utf-8"))["said"]
    assert said == [
        "memory ran out with micro-batch 2; going on from the start with micro-batch 1 and 2 "
        "accumulation: as many rows in a step as before"
    ]


def test_memory_that_runs_out_in_a_step_of_one_ends_all_and_is_remembered(together: Path) -> None:
    first, second = json.loads((together / "said.json").read_text("utf-8"))
    assert (
        "Error: memory ran out in process 1 of 2 with micro-batch 2, in a step that the others are "
        "in; the same command goes on from checkpoint 2 with micro-batch 1." in second
    )
    assert (
        "Error: another process of this training has ended; the same command goes on from "
        "checkpoint 2." in first
    )
    state = json.loads((together / "too small later" / "state.json").read_text("utf-8"))
    (recovery,) = state["recoveries"]
    assert (recovery["new_micro_batch"], recovery["new_accumulation"]) == (1, 2)
    assert not (together / "too small later" / "result.json").exists()


def test_signals_and_kills_end_all_and_the_same_command_goes_on_exactly(
    together: Path, tiny: Path, tmp_path: Path
) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "run"
    save_plan(config_of(tiny), plan)
    words: list[object] = [
        "-m", "lora_advisor.cli", "train", plan, "--data", tiny / "rows.jsonl", "--output", output,
        "--max-steps", LONG["max_steps"], "--save-steps", LONG["save_steps"], "--eval-steps",
        LONG["eval_steps"], "--holdout", LONG["holdout"], "--learning-rate", 5e-3,
        "--ignore-stack",
    ]  # fmt: skip

    # SIGTERM to a launcher, which passes it on.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    child = subprocess.Popen(
        [*launcher, "--standalone", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _wait(lambda: (output / "checkpoint-3" / "trainer_state.json").exists(), [child])
    child.send_signal(signal.SIGTERM)
    (said,) = finish([child])
    assert child.returncode != 0 and not (output / "result.json").exists()
    assert said.count("stopped by SIGTERM; the checkpoint of step") == 1, said
    stopped = max(int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*"))
    assert f"the checkpoint of step {stopped} holds" in said
    assert is_complete(output / f"checkpoint-{stopped}", processes=2)
    assert not is_complete(output / f"checkpoint-{stopped}", processes=3)

    # SIGKILL to the one that does not write.
    children = start(words)
    later = stopped + LONG["save_steps"]
    _wait(lambda: any((output / f"checkpoint-{n}").exists() for n in range(stopped + 1, later + 1)),
          children)  # fmt: skip
    children[1].kill()
    said_by = finish(children, timeout=60)
    assert [child.returncode for child in children] == [71, -signal.SIGKILL], said_by
    assert "another process of this training has ended; the same command goes on" in said_by[0]

    children = start(words)
    said_by = finish(children)
    assert [child.returncode for child in children] == [0, 0], said_by
    assert f"step {LONG['max_steps']}/{LONG['max_steps']}: loss" in said_by[0]
    assert "step" not in said_by[1] and "adapter in" not in said_by[1]
    result, unbroken = result_in(output), result_in(together / "unbroken")
    assert result.resumed_from_step is not None and result.resumed_from_step >= stopped
    assert weights(result.adapter) == weights(unbroken.adapter)
    assert result.eval_loss_after == unbroken.eval_loss_after

    # Another number of processes is another training.
    with pytest.raises(UsageError, match="with processes 2, but this one has 1"):
        run(config_of(tiny), tiny / "rows.jsonl", output, **LONG)


def _wait(until: Callable[[], bool], children: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 400
    while not until():
        if any(child.poll() is not None for child in children) or time.monotonic() > end:
            raise AssertionError(finish(children, timeout=1))
        time.sleep(0.02)


# How it was started ------------------------------------------------------------------------------


def test_a_launcher_says_who_this_is() -> None:
    assert launched({}) == Launch(rank=0, size=1)
    assert launched({"RANK": "1", "WORLD_SIZE": "4"}) == Launch(rank=1, size=4)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP; start with"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "asks for INDUCTOR"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "2 of 4 are on this one"),
    ],
)
def test_other_ways_to_train_together_are_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        launched(environment)


def test_what_accelerate_sets_for_plain_data_parallelism_is_taken() -> None:
    assert launched({
        "ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO", "WORLD_SIZE": "2", "RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
    }) == Launch(rank=0, size=2)  # fmt: skip


def test_each_process_sees_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-12ab")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UnavailableError, match="3 processes and 2 cards; start 2 of them"):
        take_own_card(Launch(rank=1, size=3))
    take_own_card(Launch(rank=1, size=2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-12ab"
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, "0"), ("4,GPU-12ab", "4"), (" GPU-12ab, 0", "GPU-12ab"), ("", "")]
)
def test_a_process_alone_sees_one_card(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: str
) -> None:
    import os

    for name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "set, so that it is set back")
        monkeypatch.delenv(name)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    take_own_card(Launch())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # as NVML counts


def test_a_step_is_shared_alike_or_not_at_all() -> None:
    config = config_of(Path("m"), micro_batch=3, accumulation=8)
    shared = shared_config(config, planned_for=1, processes=4)
    assert (shared.micro_batch, shared.accumulation) == (3, 2)
    assert shared_config(shared, planned_for=4, processes=1) == config
    with pytest.raises(UsageError) as raised:
        shared_config(config, planned_for=1, processes=3)
    assert str(raised.value) == (
        "the processes must share the plan's step alike, but its 8 micro-batches of 3 cannot be "
        "shared by 3; start 1, 2, 4 or 8, or plan again with --gpus 3."
    )
    with pytest.raises(UsageError, match="and a --batch that 5 divides"):
        shared_config(config, planned_for=1, processes=5)


def test_a_batch_that_cards_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match="divisible by --gpus 5, but got 24; give 20 or 25"):
        Spec(model="m", vram_bytes=1, effective_batch=24, gpus=5)
    with pytest.raises(UsageError, match="`--gpus` must be at least 1"):
        Spec(model="m", vram_bytes=1, gpus=0)


# What they say to each other ---------------------------------------------------------------------


def test_alone_everything_is_the_plain_thing() -> None:
    assert here() == Processes()
    assert here().each(5) == [5] and here().numbers(1, 2.5) == [[1, 2.5]]
    assert here().first(lambda: 7) == 7 and here().mean_lists([1.0, 2.0]) == [1.0, 2.0]
    with pytest.raises(UsageError) as raised:
        here().together(_refuse)
    assert not is_agreed(raised.value)
    assert blank_rows(config_of(Path("m"), micro_batch=2), 3, token=0) == []


def _refuse() -> None:
    raise UsageError("no")


class _Told(Processes):
    """Two processes, the other of which says what a test lets it."""

    def each(self, value: Any) -> list[Any]:
        said = getattr(self, "other")  # noqa: B009 # set by the test
        return [value, said(value)]


def test_what_fails_in_one_fails_in_all() -> None:
    failing, well = _Told(rank=0, size=2), _Told(rank=0, size=2)
    failing.__dict__["other"] = lambda value: None
    with pytest.raises(UsageError, match="no") as raised:
        failing.together(_refuse)
    assert is_agreed(raised.value)

    failures: list[Any] = []
    failing.__dict__["other"] = failures.append
    with pytest.raises(UsageError):
        failing.together(_refuse)
    well.__dict__["other"] = lambda value: failures[0]
    with pytest.raises(PeerError, match="no") as told:
        well.together(lambda: 1)
    assert told.value.exit_code == 64 and is_agreed(told.value)
