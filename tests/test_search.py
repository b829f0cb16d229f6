from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from traced_once import save_figures, share_traces

from lora_advisor.advisor.baseline import baseline_config
from lora_advisor.advisor.planning import NothingFitsError, make_plan
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.search import SearchResult, search
from lora_advisor.advisor.space import Space, build_space
from lora_advisor.models.memory import TRACED_NEEDED_UPPER, graph_bytes
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import GIB, Machine, Stack, detect_stack
from lora_advisor.probes.spec import Spec

CARD = find_card("rtx-4060")
CPU = Machine(kind="cpu", name="a CPU", memory_bytes=16 * GIB)


@pytest.fixture(autouse=True)
def _shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return Spec(
        model=save_figures(tmp_path / "tiny"),
        vram_bytes=GIB,
        seq_len=2048,
        effective_batch=4,
        fixed={"method": "qlora", "optimizer": "adamw_torch_fused", "kernels": "none"},
    )


def a_stack(**changes: Any) -> Stack:
    return dataclasses.replace(detect_stack(), **changes)


def space_of(spec: Spec, *, stack: Stack | None = None) -> Space:
    return build_space(spec, CARD.machine(), stack or a_stack(), CARD)


def search_within(spec: Spec, limit_bytes: int) -> SearchResult:
    predictor = Predictor.start(
        resolve_architecture(spec.model),
        CARD.machine(),
        CARD,
        limit_bytes=limit_bytes,
        context_bytes=GIB // 4,
    )
    return search(space_of(spec), predictor, objective="tokens_per_s", seed=0)


def test_the_best_that_fits_comes_first(spec: Spec) -> None:
    found = search_within(spec, GIB)

    speeds = [candidate.tokens_per_s or 0.0 for candidate in found.feasible]
    assert found.feasible[0].prediction.verdict == "fits"
    # Ties within 0.2 % go to the plainer.
    assert speeds[0] >= 0.998 * max(speeds)
    assert found.feasible[0].config.checkpointing == "off"
    assert found.feasible[0].config.micro_batch == 4


def test_with_less_memory_something_slower_is_chosen(spec: Spec) -> None:
    limit = int(0.5 * GIB)

    found = search_within(spec, limit)

    chosen = next(c for c in found.feasible if c.prediction.verdict == "fits")
    memory = chosen.prediction.memory
    assert memory.process_bytes <= limit
    assert memory.needed_bytes * (1 + TRACED_NEEDED_UPPER) + GIB // 4 <= limit
    ample = search_within(spec, GIB).feasible[0]
    assert (chosen.tokens_per_s or 0) < (ample.tokens_per_s or 0)


def test_what_does_not_fit_is_apart(spec: Spec) -> None:
    found = search_within(spec, int(0.5 * GIB))

    assert found.infeasible
    assert all(c.prediction.verdict == "does not fit" for c in found.infeasible)
    assert all(c.prediction.verdict != "does not fit" for c in found.feasible)
    for candidate in found.infeasible:
        beside = GIB // 4 + graph_bytes(candidate.config)
        assert candidate.prediction.memory.needed_bytes + beside > int(0.5 * GIB)


def test_the_search_gives_the_same_answer_twice(spec: Spec) -> None:
    first, second = search_within(spec, GIB), search_within(spec, GIB)

    assert [c.config for c in first.feasible] == [c.config for c in second.feasible]


def test_the_effective_batch_is_held_by_every_configuration(spec: Spec) -> None:
    six = dataclasses.replace(spec, effective_batch=6)

    configs = list(space_of(six).configs())

    assert {c.micro_batch for c in configs} == {1, 2, 3, 6}
    assert all(c.micro_batch * c.accumulation == 6 for c in configs)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("method", "qlora"),
        ("checkpointing", "offload"),
        ("optimizer", "paged_adamw_32bit"),
        ("micro_batch", 2),
        ("precision", "fp16"),
        ("allocator", "expandable_segments"),
        ("attention", "eager"),
    ],
)
def test_a_fixed_knob_stays(spec: Spec, knob: str, value: object) -> None:
    fixed = dataclasses.replace(spec, fixed={knob: value})

    configs = list(space_of(fixed).configs())

    assert configs
    assert {getattr(config, knob) for config in configs} == {value}


def test_a_fixed_knob_stays_through_the_search(spec: Spec) -> None:
    fixed = dataclasses.replace(
        spec, fixed={**spec.fixed, "checkpointing": "full", "micro_batch": 2}
    )

    found = search_within(fixed, GIB)

    assert {(c.config.checkpointing, c.config.micro_batch) for c in found.feasible} == {("full", 2)}


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused(spec: Spec) -> None:
    odd = dataclasses.replace(spec, fixed={"micro_batch": 3})

    with pytest.raises(UsageError, match=r"3 does not divide 4; give --batch 6"):
        space_of(odd)


#: Fixed knobs, the rule that they break, and the change that is offered.
CLASHES: dict[str, tuple[dict[str, Any], str, str]] = {
    "either of two": (
        {"trainer": "trl", "loss": "full"},
        '`loss` must be "fused"',
        "`--trainer transformers` would do.",
    ),
    "one that others share": (
        {"method": "lora", "quant_type": "nf4", "double_quant": True},
        "`quant_type` must be null",
        "`--method qlora` would do.",
    ),
    "a flag": (
        {"packing": True, "trainer": "transformers"},
        "`packing` must be false",
        "Without `--packing` it would do.",
    ),
    "two at once": (
        {"method": "lora", "quant_type": "nf4", "trainer": "trl", "loss": "full"},
        "`quant_type` must be null",
        "`--method qlora` and `--trainer transformers` would do.",
    ),
}


@pytest.mark.parametrize("clash", CLASHES)
def test_knobs_that_exclude_each_other_get_the_smallest_change(spec: Spec, clash: str) -> None:
    fixed, why, change = CLASHES[clash]

    with pytest.raises(UsageError) as caught:
        space_of(dataclasses.replace(spec, fixed=fixed))

    said = str(caught.value)
    assert said.startswith(f"the fixed knobs leave no legal configuration: {why}")
    assert said.endswith(change)


def test_what_is_left_out_is_named_with_its_reason(spec: Spec) -> None:
    free = dataclasses.replace(spec, fixed={})

    excluded = dict(space_of(free, stack=a_stack(liger_kernel=None)).excluded)

    assert "not installed" in excluded["kernels liger"]
    assert "measured" in excluded["compile layers"]
    assert all(excluded.values())


def test_a_cpu_leaves_out_what_needs_a_gpu(spec: Spec) -> None:
    free = dataclasses.replace(spec, fixed={})

    space = build_space(free, CPU, a_stack(liger_kernel="0.8.5"), None)

    assert space.axes["precision"] == ("fp32",)
    assert space.axes["kernels"] == ("none",)
    assert space.axes["optimizer"] == ("adamw_torch_fused", "adamw_8bit")
    assert {what for what, _ in space.excluded} == {
        "kernels liger",
        "compile layers",
        "optimizer paged_adamw_8bit",
        "optimizer paged_adamw_32bit",
        "allocator expandable_segments",
        "trainer unsloth",
        "cuda_graph micro_batch",
    }


def test_a_model_without_sdpa_is_searched_with_eager_attention(spec: Spec) -> None:
    gemma = dataclasses.replace(spec, model="gemma-2-2b")

    assert {c.attention for c in space_of(gemma).configs()} == {"eager"}
    assert baseline_config(gemma, "bf16").attention == "eager"


def test_the_baseline_keeps_the_users_batch_length_and_adapter(spec: Spec) -> None:
    odd = dataclasses.replace(spec, effective_batch=5, rank=8)

    baseline = baseline_config(odd, "bf16")

    assert baseline.micro_batch * baseline.accumulation == 5
    assert (baseline.seq_len, baseline.lora and baseline.lora.r) == (2048, 8)
    assert (baseline.method, baseline.fp32_upcast, baseline.loss) == ("qlora", True, "full")


def test_where_nothing_fits_the_smallest_need_is_named(spec: Spec, tmp_path: Path) -> None:
    small = dataclasses.replace(spec, vram_bytes=int(0.3 * GIB), gpu="rtx-4060")

    with pytest.raises(NothingFitsError) as caught:
        make_plan(small, record=tmp_path / "record.jsonl")

    assert str(caught.value).startswith("nothing fits 0.3 GiB: the smallest configuration (")
    assert "take a smaller model, a shorter --seq, or more --vram" in str(caught.value)
    assert caught.value.exit_code == 1


def test_where_only_a_run_can_tell_nothing_is_said_not_to_fit(spec: Spec, tmp_path: Path) -> None:
    compiled = {"method": "qlora", "compile": "layers"}  # never bounded by a trace
    only = dataclasses.replace(spec, gpu="rtx-4060", fixed={**spec.fixed, **compiled})

    with pytest.raises(NothingFitsError) as caught:
        make_plan(only, record=tmp_path / "record.jsonl")

    assert str(caught.value).startswith("nothing is sure to fit 1 GiB: the smallest configuration")
    assert "only a run on the card can tell" in str(caught.value)
    assert "take a smaller model, a shorter --seq, or more --vram" in str(caught.value)


def test_a_plan_for_a_card_that_is_not_here_says_that_it_is_traced(
    spec: Spec, tmp_path: Path
) -> None:
    plan = make_plan(dataclasses.replace(spec, gpu="rtx-4060"), record=tmp_path / "record.jsonl")

    assert plan.chosen.prediction.verdict == "fits"
    assert plan.chosen.prediction.memory.process_bytes <= spec.vram_bytes
    assert plan.chosen.evidence == "traced"
    assert (plan.probes, plan.reused, plan.cap_bytes) == (0, 0, None)
    assert plan.machine.name == CARD.name
    assert not (tmp_path / "record.jsonl").exists()
    for other in plan.runners_up + plan.rejected:
        assert other.reason
        assert other.config.tokens_per_step == plan.chosen.config.tokens_per_step
