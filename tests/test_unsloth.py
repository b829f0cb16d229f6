"""Unsloth as an engine: where it is looked for, what stands for it, and how it takes part in plans.

Its own step runs where LORA_ADVISOR_UNSLOTH leads to it (`make unsloth`); without a GPU that is the
step its packages have for CPUs.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_made_plan import save_plan
from made_up_device import Device, plan_with, speed_of
from traced_once import save_figures, share_traces

from lora_advisor.advisor import planning
from lora_advisor.advisor.configuring import setup_of
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.pricing import prices_of
from lora_advisor.advisor.promise import Costs
from lora_advisor.advisor.scaling import one_card
from lora_advisor.advisor.space import Space, build_space
from lora_advisor.cli import main
from lora_advisor.models.engine import EngineSpeed
from lora_advisor.probes import nvml, unsloth
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import StackError, UnavailableError, UsageError
from lora_advisor.probes.exchange import Request
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, Machine, cpu_machine, detect_stack
from lora_advisor.probes.plan import read_plan, write_plan
from lora_advisor.probes.record import ProbeResult
from lora_advisor.probes.runner import run_probe
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.worker import set_environment

CARD = find_card("h100-80gb")
MACHINE = dataclasses.replace(CARD.machine(), kind="cuda", driver="1.0")
VERSIONS = {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "transformers": "5.17.0"}


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds Unsloth, as far as anybody asks before it is run."""
    folder = tmp_path / "packages"
    for name, version in VERSIONS.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setenv(unsloth.FOLDER, str(folder))
    return folder


def config(model: str = "qwen2.5-0.5b", **changes: Any) -> RunConfig:
    values = {
        "model": model, "method": "lora", "micro_batch": 2, "accumulation": 2, "seq_len": 1024,
        "optimizer": "adamw_torch_fused", "precision": "bf16", **unsloth.AS_IT_IS,
        "lora": LoraShape(r=16, alpha=32, dropout=0.0, targets="all-linear"), **changes,
    }  # fmt: skip
    return RunConfig(**values)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return Spec(
        model=save_figures(tmp_path / "tiny"),
        vram_bytes=4 * GIB,
        seq_len=2048,
        effective_batch=4,
        device="cuda",
        # Layers are not compiled, which takes long to trace.
        fixed={"precision": "bf16", "kernels": "none", "compile": "off", "method": "lora"},
    )


def space_of(spec: Spec, machine: Machine = MACHINE) -> Space:
    return build_space(spec, machine, detect_stack(), CARD)


# Where it is -------------------------------------------------------------------------------------


def test_it_is_where_the_variable_says_with_its_versions(installed: Path) -> None:
    found = unsloth.engine()

    assert found is not None
    assert found.startswith("unsloth 2026.10.9, unsloth_zoo 2026.10.9, transformers 5.17.0, trl ")


@pytest.mark.parametrize("folder", [None, "", "."])
def test_it_is_not_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if folder is not None:
        monkeypatch.setenv(unsloth.FOLDER, folder)

    assert unsloth.engine() is None
    with pytest.raises(UnavailableError, match="LORA_ADVISOR_UNSLOTH"):
        unsloth.environment()


def test_its_processes_find_its_packages_first(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    environment = unsloth.environment()

    assert environment["PYTHONPATH"].split(os.pathsep) == [str(installed), "/somewhere/else"]
    assert not unsloth.is_here()
    monkeypatch.setattr(os, "environ", environment)
    assert unsloth.is_here()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "card"}, "a GPU that is here"),
        ({"device": "cpu"}, "a GPU that is here"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": None}, "None"),
        ({"stage": "dpo"}, "no preference pairs"),
        ({"gpus": 2}, "one card"),
    ],
)
def test_what_it_is_left_out_for_is_said(
    installed: Path, changes: dict[str, Any], said: str
) -> None:
    usual: dict[str, Any] = {"model_type": "qwen2", "device": "cuda", "stage": "sft", "gpus": 1}

    assert unsloth.why_not(**usual) is None
    assert said in (unsloth.why_not(**{**usual, **changes}) or "")


# What it takes, and what stands for it -----------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"kernels": "liger"},
        {"adapter": "fused"},
        {"compile": "layers"},
        {"embedding": "host"},
        {"fp32_upcast": True},
        {"loss": "one_pass"},
        {"attention": "eager"},
        {"checkpointing": "every_2"},
        {"method": "qlora", "quant_type": "fp4"},
        {"method": "full", "lora": None},
    ],
)
def test_what_is_not_its_way_is_refused(changes: dict[str, Any]) -> None:
    named = [knob for knob in changes if knob != "lora"][-1]  # the others go with it
    with pytest.raises(UsageError, match=f"`{named}`"):
        config(**changes)


def test_a_step_of_ours_stands_for_its_own() -> None:
    other = unsloth.stand_in(config(method="qlora", quant_type="nf4", double_quant=True))

    assert other.is_buildable
    assert (other.trainer, other.adapter, other.checkpointing) == ("trl", "fused", "offload")
    assert (other.method, other.quant_type, other.double_quant) == ("qlora", "nf4", True)
    assert unsloth.stand_in(other) is other
    dropped = config(lora=LoraShape(r=8, alpha=8, dropout=0.1, targets="all-linear"))
    assert unsloth.stand_in(dropped).adapter == "peft"
    assert unsloth.stand_in(config(checkpointing="off")).checkpointing == "off"


def predictor_of(model: str) -> Predictor:
    return Predictor.start(
        resolve_architecture(model), MACHINE, CARD, limit_bytes=8 * GIB, context_bytes=GIB
    )


def ran(predictor: Predictor, asked: RunConfig, step_s: float) -> ProbeResult:
    architecture = predictor.store.architecture
    return ProbeResult(
        config=asked, architecture=architecture.fingerprint, hf_config=architecture.hf_config,
        machine=MACHINE, stack=detect_stack(), outcome="ok", step_times_s=(step_s,) * 3,
        tokens_per_step=asked.tokens_per_step,
    )  # fmt: skip


def test_its_memory_is_its_stand_ins_and_a_little_more(spec: Spec) -> None:
    predictor = predictor_of(spec.model)
    own, other = (
        predictor.predict(c).memory
        for c in (config(spec.model), unsloth.stand_in(config(spec.model)))
    )

    assert own.allocated_bytes == pytest.approx(1.03 * other.allocated_bytes, rel=1e-6)
    assert own.needed_bytes - other.needed_bytes == own.allocated_bytes - other.allocated_bytes


def test_its_speed_is_an_assumption_until_it_has_run(spec: Spec) -> None:
    predictor = predictor_of(spec.model)
    small, large = config(spec.model), config(spec.model, micro_batch=4)
    before = predictor.predict(large)
    assert before.step_s is not None and before.evidence == "traced"
    first = predictor.predict(small).step_s
    assert first is not None

    # Twice as fast as was assumed, so the other size is as well, nearly, and surer.
    taught = predictor.learn([ran(predictor, small, first.value / 2)])

    after = taught.predict(large)
    assert after.step_s is not None
    assert after.step_s.value == pytest.approx(before.step_s.value / 2, rel=0.12)
    assert after.step_s.high / after.step_s.low < before.step_s.high / before.step_s.low
    assert taught.throughput is predictor.throughput, "ours learns nothing from another's step"
    assert taught.engine.probes == 1


def test_many_runs_tell_how_fast_it_is() -> None:
    speed = EngineSpeed.fit([(1.6, 1.0)] * 20)

    assert speed.mean == pytest.approx(math.log(1.6), abs=0.01)
    assert speed.deviation < 0.02 < EngineSpeed.fit([]).deviation


# In plans ----------------------------------------------------------------------------------------


def test_a_plan_may_take_it_where_it_is_installed(spec: Spec, installed: Path) -> None:
    space = space_of(spec)

    assert space.engine == "unsloth"
    assert "trainer unsloth" not in dict(space.excluded)
    assert {c.trainer for c in space.configs()} == {"trl"}, "it is searched by itself"


def test_its_space_is_small(spec: Spec, installed: Path) -> None:
    fixed = {"trainer": "unsloth", "method": "qlora"}
    configs = list(space_of(dataclasses.replace(spec, fixed=fixed)).configs())

    assert {c.trainer for c in configs} == {"unsloth"}
    assert {c.micro_batch for c in configs} == {1, 2, 4}, "and nothing else differs"
    assert len(configs) == 3


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"compile": "layers"}, "`--compile layers` is not its way"),
        ({"checkpointing": "every_2"}, "`--checkpointing every_2` is not its way"),
        ({"method": "full"}, "adapters are trained"),
    ],
)
def test_a_fixed_knob_that_is_not_its_way_leaves_it_out(
    spec: Spec, installed: Path, fixed: dict[str, Any], said: str
) -> None:
    space = space_of(dataclasses.replace(spec, fixed=fixed))

    assert space.engine is None
    assert said in dict(space.excluded)["trainer unsloth"]


def test_without_it_a_plan_says_what_is_missing(spec: Spec) -> None:
    assert "not installed" in dict(space_of(spec).excluded)["trainer unsloth"]
    with pytest.raises(UsageError, match="`--trainer unsloth` cannot be planned for: it is not in"):
        space_of(dataclasses.replace(spec, fixed={"trainer": "unsloth"}))


@pytest.fixture
def device(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """A GPU that is not there."""
    monkeypatch.setattr(planning, "detect_machine", lambda _: MACHINE)
    monkeypatch.setattr(planning, "context_bytes_of", lambda *_: GIB // 4)
    monkeypatch.setattr(ForkServer, "of", lambda _: None)
    monkeypatch.setattr(nvml, "device_count", lambda: 1)

    def make(*, unsloth_times: float, **options: Any) -> Device:
        def speed(asked: RunConfig) -> float:
            if asked.is_buildable:
                return 20 * speed_of(asked)
            return 20 * unsloth_times * speed_of(asked.replace(trainer="trl", checkpointing="off"))

        made = Device(spec, speed=speed, **options)
        made.machine = MACHINE
        return made

    return make


def test_it_is_the_plan_where_it_is_fastest(
    device: Callable[..., Device], installed: Path, tmp_path: Path
) -> None:
    plan = plan_with(device(unsloth_times=3.0), tmp_path)

    assert plan.chosen.config.trainer == "unsloth"
    assert plan.chosen.evidence == "proved"


def test_where_it_is_slower_it_is_tried_and_left(
    device: Callable[..., Device], installed: Path, tmp_path: Path
) -> None:
    made = device(unsloth_times=0.9)
    plan = plan_with(made, tmp_path)

    assert plan.chosen.config.trainer == "trl"
    assert any(not probed.is_buildable for probed in made.probed)


def test_where_it_fails_the_plan_goes_on(
    device: Callable[..., Device], installed: Path, tmp_path: Path
) -> None:
    made = device(unsloth_times=3.0, too_large=lambda asked: not asked.is_buildable)
    plan = plan_with(made, tmp_path)

    assert plan.chosen.config.trainer == "trl"
    assert any(not probed.is_buildable for probed in made.probed)


def test_a_budget_that_cannot_pay_for_it_leaves_it_out_and_says_so(
    device: Callable[..., Device], installed: Path, tmp_path: Path
) -> None:
    made = device(unsloth_times=3.0)
    plan = plan_with(made, tmp_path, probe_budget_s=120.0)

    assert all(probed.is_buildable for probed in made.probed)
    assert "its proof take 150 s" in dict(plan.excluded)["trainer unsloth"]


def test_an_installation_that_does_not_work_is_tried_once(
    device: Callable[..., Device], installed: Path, tmp_path: Path
) -> None:
    made = device(unsloth_times=3.0)
    plain = made.answer

    def answer(*asked: Any) -> ProbeResult:
        result = plain(*asked)
        if result.config.is_buildable:
            return result
        return dataclasses.replace(result, outcome="failed", detail="ImportError: torchao")

    vars(made)["answer"] = answer
    plan = plan_with(made, tmp_path)
    assert plan.chosen.config.trainer == "trl"
    assert len([c for c in made.probed if not c.is_buildable]) == 1

    made.asked.clear()
    fixed = {**made.spec.fixed, "trainer": "unsloth"}
    with pytest.raises(planning.NothingFitsError, match="not for memory: ImportError: torchao"):
        plan_with(made, tmp_path, fixed=fixed)
    assert len([c for c in made.probed if not c.is_buildable]) == 1


def test_runs_of_another_version_are_not_taken_up(
    device: Callable[..., Device], installed: Path, tmp_path: Path
) -> None:
    made = device(unsloth_times=3.0, record=tmp_path / "record.jsonl")
    plain = made.answer

    def answer(*asked: Any) -> ProbeResult:
        result = plain(*asked)
        engine = None if result.config.is_buildable else "unsloth 2025.1.1"
        return dataclasses.replace(result, engine=engine)

    vars(made)["answer"] = answer
    plan_with(made, tmp_path)
    tried = [c for c in made.probed if not c.is_buildable]
    assert tried

    again = device(unsloth_times=3.0)
    plan = plan_with(again, tmp_path)

    assert set(tried) <= set(again.probed)
    assert plan.reused == len(made.probed) - len(tried)


def test_its_start_is_counted_by_itself(spec: Spec) -> None:
    predictor, costs = predictor_of(spec.model), Costs()
    ours, its = (
        config(spec.model, **{"trainer": "trl", "checkpointing": "full"}),
        config(spec.model),
    )

    assert costs.expected_s(its, 1.0, 5) > 60 > costs.expected_s(ours, 1.0, 5)
    costs.note(ran(predictor, its, 1.0), 45.0)

    assert costs.expected_s(its, 1.0, 5) == pytest.approx(45.0)
    assert costs.expected_s(ours, 1.0, 5) == Costs().expected_s(ours, 1.0, 5)


def test_several_cards_do_not_train_with_it(spec: Spec) -> None:
    fixed = {"trainer": "unsloth"}
    with pytest.raises(UsageError, match="`--gpus` must be 1 with --trainer unsloth"):
        one_card(dataclasses.replace(spec, fixed=fixed, gpus=2))


def test_its_passes_are_priced_as_its_steps_are(spec: Spec) -> None:
    predictor, asked = predictor_of(spec.model), config(spec.model)
    step = predictor.predict(asked).step_s
    price = prices_of(predictor, asked)(asked)

    assert step is not None and price is not None
    assert price.value == pytest.approx(step.value / asked.accumulation, rel=0.01)


def test_its_plan_as_a_script_is_what_was_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(config(), tmp_path / "plan.json")
    script = tmp_path / "train.py"
    words = ["export", tmp_path / "plan.json", "--to", "unsloth", "--out", script]

    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    assert "cannot express" not in said.out + said.err
    assert 'use_gradient_checkpointing="unsloth"' in script.read_text("utf-8")


def test_its_plan_gives_no_objects_for_our_trainers(tmp_path: Path) -> None:
    save_plan(config(), tmp_path / "plan.json")

    with pytest.raises(UsageError, match="trains with unsloth, whose objects are its own"):
        setup_of(read_plan(tmp_path / "plan.json"))


# Its step ----------------------------------------------------------------------------------------


def test_a_probe_without_it_says_what_is_missing(spec: Spec) -> None:
    with pytest.raises(UnavailableError, match=r"requirements-unsloth\.txt"):
        run_probe(
            config(spec.model), resolve_architecture(spec.model), cpu_machine(), detect_stack(),
            cap_bytes=None, record=None, device="cpu",
        )  # fmt: skip


def test_its_segments_expand_only_where_asked(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    for allocator, expected in (("default", "False"), ("expandable_segments", "True")):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
        asked = config(spec.model, allocator=allocator)
        set_environment(
            Request(config=asked, architecture=resolve_architecture(spec.model), device="cuda")
        )
        assert os.environ["PYTORCH_ALLOC_CONF"] == f"expandable_segments:{expected}"


def test_a_training_without_it_says_what_is_missing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(config(str(tiny), precision="fp32", seq_len=96), tmp_path / "plan.json")
    words = ["train", tmp_path / "plan.json", "--data", tiny / "rows.jsonl", "--output", tmp_path]

    assert main([str(word) for word in words]) == UnavailableError.exit_code
    assert "`trainer` 'unsloth' needs Unsloth" in capsys.readouterr().err


def test_a_plan_proved_with_another_version_is_not_trained(
    tiny: Path, tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked, file = config(str(tiny), precision="fp32", seq_len=96), tmp_path / "plan.json"
    save_plan(asked, file)
    plan = read_plan(file)
    proved = dataclasses.replace(
        ran(predictor_of(str(tiny)), asked, 1.0), engine="unsloth 2025.1.1"
    )
    write_plan(
        file, dataclasses.replace(plan, chosen=dataclasses.replace(plan.chosen, measured=proved))
    )
    words = ["train", str(file), "--data", str(tiny / "rows.jsonl"), "--output", str(tmp_path)]
    begun: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, __: begun.append(command))

    assert main(words) == StackError.exit_code
    assert "proved with unsloth 2025.1.1" in capsys.readouterr().err
    assert not begun
    # What begins then is the same command; that it goes on here is for want of a real execve.
    assert main([*words, "--ignore-stack"]) == UnavailableError.exit_code
    assert len(begun) == 1


@pytest.mark.skipif(
    "LORA_ADVISOR_TEST_UNSLOTH" not in os.environ, reason="Unsloth is not installed (make unsloth)"
)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_its_own_step_runs(spec: Spec, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv(unsloth.FOLDER, os.environ["LORA_ADVISOR_TEST_UNSLOTH"])
    asked = config(spec.model, method=method, seq_len=64, precision="fp32")

    result = run_probe(
        asked, resolve_architecture(spec.model), cpu_machine(), detect_stack(), cap_bytes=None,
        record=None, device="cpu", warmup_steps=2, measured_steps=2,
    )  # fmt: skip

    assert (result.outcome, result.detail) == ("ok", None)
    assert result.tokens_per_step == asked.tokens_per_step
    assert result.engine is not None and result.engine.startswith("unsloth ")
