"""CUDA graphs and short recomputation in plans: where they go, what they cost, what gives way."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exported import recipe
from made_up_device import Device, plan_with, speed_of
from recorded import configure
from traced_once import save_figures, share_traces

from lora_advisor.advisor import planning
from lora_advisor.advisor.export_axolotl import AXOLOTL
from lora_advisor.advisor.export_trl import TRANSFORMERS, TRL
from lora_advisor.advisor.export_unsloth import UNSLOTH
from lora_advisor.advisor.export_words import settle
from lora_advisor.advisor.foreign import Reading
from lora_advisor.advisor.foreign_accelerate import read_accelerate
from lora_advisor.advisor.foreign_script import read_script
from lora_advisor.advisor.launched import shared_config
from lora_advisor.advisor.planning import make_plan
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.renting import _fitted
from lora_advisor.advisor.scaling import one_card
from lora_advisor.advisor.search import search
from lora_advisor.advisor.space import Space, build_space
from lora_advisor.cli import main
from lora_advisor.models.memory import context_of, graph_bytes
from lora_advisor.models.replayed import traced_memory
from lora_advisor.models.throughput import host_terms
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes import nvml
from lora_advisor.probes.architectures import from_hf_config, resolve_architecture
from lora_advisor.probes.arguments import checkpointing_arguments, padding_multiple
from lora_advisor.probes.batching import with_batching
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.compiled_layers import compile_layers
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UNRECORDABLE, UsageError
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import GIB, STEP, detect_stack
from lora_advisor.probes.record import ProbeResult, read_records
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.trace import trace_step

CARD = find_card("rtx-4060")
RECORDINGS = Path(__file__).parent / "recordings"
RECORDS = read_records(RECORDINGS / "h100-graphs-2026-11-27.jsonl")
#: Those of the step there is now: compiled layers of the step before held 1 % more.
OF_NOW = [n for n, r in enumerate(RECORDS) if r.config.compile == "off" or r.stack.step == STEP]
COMPILED = [
    result
    for result in read_records(RECORDINGS / "regret/probes-llama-3.2-1b-1024-graphs.jsonl")
    if result.config.compile == "layers"
]
#: Of 2048 tokens, nothing recomputed, Liger's kernels: what room there is is nearly all taken.
AT_2048 = read_records(RECORDINGS / "h100-graphs-2048-2026-11-28.jsonl")[5]
RECORDS_7B = read_records(RECORDINGS / "h100-graphs-7b-2026-11-28.jsonl")
#: Of Liger's kernels: out of memory in usual segments, two that ran in them or in expanding ones,
#: and without those kernels four rows.
OF_7B = (2, 5, 6, 7)


def _config(**changes: Any) -> RunConfig:
    values = {
        "trainer": "trl",
        "loss": "one_pass",
        "adapter": "fused",
        "precision": "bf16",
        "cuda_graph": "micro_batch",
        **changes,
    }
    return configure(**values)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    share_traces(monkeypatch)
    return Spec(
        model=save_figures(tmp_path / "tiny"),
        vram_bytes=GIB,
        seq_len=2048,
        effective_batch=4,
        dropout=0.0,
        device="cuda",
        fixed={"method": "qlora", "optimizer": "adamw_torch_fused", "kernels": "none"},
    )


def _space(spec: Spec) -> Space:
    return build_space(spec, CARD.machine(), detect_stack(), CARD)


def test_every_configuration_that_can_be_recorded_is_and_also_runs_as_it_is(spec: Spec) -> None:
    found = set(_space(spec).configs())
    recorded = {c for c in found if c.cuda_graph == "micro_batch"}
    plain = {c for c in found if c.cuda_graph == "off"}
    assert {c.replace(cuda_graph="off") for c in recorded} == {
        c for c in plain if c.precision != "fp16"
    }
    assert recorded
    for c in found:
        assert c.recompute == (
            "needed" if c.checkpointing != "off" and c.compile == "off" else "layer"
        )


def test_a_search_looks_at_graphs_first_and_around_the_best_without(spec: Spec) -> None:
    predictor = Predictor.start(
        resolve_architecture(spec.model), CARD.machine(), CARD, limit_bytes=GIB,
        context_bytes=GIB // 4,
    )  # fmt: skip
    found = search(_space(spec), predictor, objective="tokens_per_s", seed=0, free_trials=0)
    best = found.feasible[0].config
    assert best.cuda_graph == "micro_batch"
    seen = {c.config for c in (*found.feasible, *found.infeasible)}
    assert 0 < sum(c.cuda_graph == "off" for c in seen) < 0.5 * len(seen)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_segments_expand_first_but_on_windows(
    platform: str, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    here = dataclasses.replace(CARD.machine(), kind="cuda")
    space = build_space(spec, here, detect_stack(), CARD)
    first, *others = space.axes["allocator"]
    on_windows = dict(space.excluded).get("allocator expandable_segments")
    if platform == "win32":
        assert first == "default" and not others
        assert on_windows == "PyTorch's allocator has none on Windows"
    else:
        assert first == "expandable_segments" and others == ["default"] and on_windows is None


def test_an_adapter_with_dropout_is_not_recorded(spec: Spec) -> None:
    space = _space(dataclasses.replace(spec, dropout=0.1))
    assert {c.cuda_graph for c in space.configs()} == {"off"}
    assert "dropout draws" in dict(space.excluded)["cuda_graph micro_batch"]
    assert _config(lora=LoraShape(r=4, alpha=8, dropout=0.1, targets="all-linear"), adapter="peft",
                   cuda_graph="off")  # fmt: skip
    with pytest.raises(UsageError, match=r"with `lora.dropout` 0\.1: a checkpointed layer reads"):
        _config(lora=LoraShape(r=4, alpha=8, dropout=0.1, targets="all-linear"), adapter="peft")


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_steps_within_the_backward_pass_is_not_recorded(optimizer: str) -> None:
    with pytest.raises(UsageError, match="it steps within the backward pass"):
        _config(optimizer=optimizer)


def test_a_model_that_draws_numbers_is_not_recorded(spec: Spec) -> None:
    figures = Path(spec.model) / "config.json"
    drawing = {**json.loads(figures.read_text("utf-8")), "attention_dropout": 0.1}
    figures.write_text(json.dumps(drawing), "utf-8")
    space = _space(spec)
    assert {c.cuda_graph for c in space.configs()} == {"off"}
    assert "random numbers" in dict(space.excluded)["cuda_graph micro_batch"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cuda-graph", "micro_batch", "--gpus", "2"], "must be off with --gpus 2"),
        (["--cuda-graph", "on"], "must be one of off, micro_batch"),
        (["--cuda-graph", "micro_batch", "--device", "cpu"], "it is the GPU that replays it"),
        (["--recompute", "needed", "--adapter", "peft"], "the fused adapter that ends early"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in words else ["--device", "none"]
    assert main(["plan", "--vram", "8", *device, *words]) == 64
    assert said in capsys.readouterr().err


def test_a_knob_fixed_by_the_user_stays(spec: Spec) -> None:
    fixed = {**spec.fixed, "cuda_graph": "off", "recompute": "layer"}
    found = list(_space(dataclasses.replace(spec, fixed=fixed)).configs())
    assert {(c.cuda_graph, c.recompute) for c in found} == {("off", "layer")}
    with pytest.raises(UsageError, match="`cuda_graph` must be \"off\" with precision 'fp16'"):
        _space(
            dataclasses.replace(
                spec, fixed={**spec.fixed, "cuda_graph": "micro_batch", "precision": "fp16"}
            )
        )


def test_what_has_nothing_to_leave_out_has_no_second_name() -> None:
    plain = configure(adapter="fused", checkpointing="off")
    assert plain.replace(recompute="needed") == plain
    compiled = configure(adapter="fused", checkpointing="full", compile="layers")
    assert compiled.replace(recompute="needed") == compiled
    with pytest.raises(UsageError, match="it is the fused adapter that ends early"):
        configure(adapter="peft", recompute="needed")


def test_older_programs_read_what_uses_neither() -> None:
    assert not {"cuda_graph", "recompute"} & configure().to_json().keys()
    config = _config(recompute="needed", checkpointing="full")
    assert RunConfig.from_json(config.to_json()) == config


def test_recomputation_ends_before_a_layers_last_product() -> None:
    architecture = resolve_architecture("qwen2.5-0.5b")
    products = {}
    for recompute in ("layer", "needed"):
        config = _config(
            model="qwen2.5-0.5b", checkpointing="full", recompute=recompute, cuda_graph="off"
        )
        work = trace_step(config, architecture, layers=2, capability="9.0").total_work()
        products[recompute] = work.matmul_flops
    figures = architecture.hf_config
    down = 2.0 * config.tokens * figures["hidden_size"] * figures["intermediate_size"]
    assert products["layer"] - products["needed"] == pytest.approx(2 * down, rel=1e-6)


def test_the_host_starts_a_graph_as_a_whole() -> None:
    architecture = resolve_architecture("qwen2.5-0.5b")
    work = {
        how: trace_step(
            _config(model="qwen2.5-0.5b", checkpointing="full", cuda_graph=how),
            architecture,
            layers=2,
            capability="9.0",
        ).total_work()
        for how in ("off", "micro_batch")
    }
    assert work["micro_batch"].kernels == pytest.approx(work["off"].kernels, rel=0.1)
    assert work["micro_batch"].matmul_flops == work["off"].matmul_flops
    assert work["micro_batch"].hooks == 0 < work["off"].hooks
    terms = [sum(host_terms(_config(), amount)[1:]) for amount in work.values()]
    assert terms[1] < 0.5 * terms[0]


def _traced(result: ProbeResult, *, cap_bytes: int | None) -> TracedMemory:
    trace = trace_all_layers(
        result.config,
        from_hf_config("recorded", dict(result.hf_config)),
        capability=result.machine.capability,
    )
    expandable = result.config.allocator == "expandable_segments"
    return traced_memory(trace, expandable=expandable, cap_bytes=cap_bytes)


@pytest.mark.parametrize("number", OF_NOW)
def test_recorded_runs_hold_what_their_traces_say(number: int) -> None:
    result = RECORDS[number]
    traced = _traced(result, cap_bytes=1 << 60)
    assert traced.allocated_bytes == pytest.approx(result.allocated_bytes, rel=0.01)
    assert traced.reserved_bytes == pytest.approx(result.reserved_bytes, rel=0.02)
    assert result.context_bytes is not None
    beside = context_of("9.0").value_bytes + graph_bytes(result.config)
    assert beside == pytest.approx(result.context_bytes, rel=0.005)


def test_a_step_of_2048_tokens_holds_what_its_trace_says() -> None:
    assert AT_2048.config.seq_len == 2048 and AT_2048.config.checkpointing == "off"
    traced = _traced(AT_2048, cap_bytes=1 << 60)
    assert traced.allocated_bytes == pytest.approx(AT_2048.allocated_bytes, rel=0.01)
    assert traced.reserved_bytes == pytest.approx(AT_2048.reserved_bytes, rel=0.01)


@pytest.mark.parametrize("number", range(2), ids=[r.config.method for r in COMPILED[:2]])
def test_compiled_layers_in_graphs_hold_what_their_traces_say(number: int) -> None:
    result = COMPILED[number]
    traced = _traced(result, cap_bytes=1 << 60)
    assert traced.allocated_bytes == pytest.approx(result.allocated_bytes, rel=0.01)
    assert traced.reserved_bytes == pytest.approx(result.reserved_bytes, rel=0.01)


@pytest.mark.parametrize("number", OF_7B, ids=[RECORDS_7B[n].outcome for n in OF_7B])
def test_a_4_bit_7b_needs_segments_that_expand_as_its_trace_says(number: int) -> None:
    """Weights of 4 bits leave over 1 GiB free in segments that a graph cannot take."""
    result = RECORDS_7B[number]
    traced = _traced(result, cap_bytes=None)
    assert result.cap_bytes is not None
    if result.outcome == "out_of_memory":
        assert traced.needed_bytes > result.cap_bytes > traced.allocated_bytes
    else:
        assert traced.allocated_bytes == pytest.approx(result.allocated_bytes, rel=0.003)
        assert traced.reserved_bytes == pytest.approx(result.reserved_bytes, rel=0.012)


def test_several_processes_and_packed_rows_record_nothing(spec: Spec) -> None:
    config = _config(accumulation=4)
    assert shared_config(config, planned_for=1, processes=1).cuda_graph == "micro_batch"
    assert shared_config(config, planned_for=1, processes=2).cuda_graph == "off"
    assert with_batching(config, "packed").cuda_graph == "off"
    assert with_batching(config, "grouped").cuda_graph == "micro_batch"
    assert one_card(dataclasses.replace(spec, gpus=2)).fixed["cuda_graph"] == "off"
    asked = dataclasses.replace(spec, gpus=2, fixed={"cuda_graph": "micro_batch"})
    with pytest.raises(UsageError, match="`--cuda-graph` must be off with --gpus 2"):
        one_card(asked)


def test_a_plan_for_several_cards_says_so(tmp_path: Path, spec: Spec) -> None:
    several = dataclasses.replace(
        spec, device="none", gpu="rtx-3090", vram_bytes=8 * GIB, gpus=2, effective_batch=8,
        free_trials=0,
    )  # fmt: skip
    plan = make_plan(several, record=tmp_path / "record.jsonl")
    assert plan.chosen.config.cuda_graph == "off"
    assert "no part of it" in dict(plan.excluded)["cuda_graph micro_batch"]


def test_a_card_that_is_rented_may_multiply_in_another_precision(
    spec: Spec, tmp_path: Path
) -> None:
    fixed = {**spec.fixed, "method": "lora"}
    hired = dataclasses.replace(
        spec, device="none", gpu="rtx-4060", vram_bytes=2 * GIB, free_trials=0, fixed=fixed
    )
    plan = make_plan(hired, record=tmp_path / "record.jsonl")
    assert plan.chosen.config.cuda_graph == "micro_batch"
    card = find_card("v100-16gb")
    predictor = Predictor.start(
        plan.architecture, card.machine(), card, limit_bytes=card.memory_bytes
    )
    session: Any = SimpleNamespace(stack=detect_stack())
    config = _fitted(predictor, plan, card, session)
    assert config is not None
    assert (config.precision, config.cuda_graph) == ("fp16", "off")


def test_what_accelerate_asks_for_goes_with_a_graph(tmp_path: Path) -> None:
    asked = Reading("accelerate.yaml", {"mixed_precision": "fp16"})
    imported = read_accelerate(asked, {}, _config())
    assert (imported.config.precision, imported.config.cuda_graph) == ("fp16", "off")
    assert any("cuda_graph" in str(note) for note in imported.notes)


def test_what_records_reads_no_generator_and_no_mask() -> None:
    config = _config(checkpointing="full")
    assert checkpointing_arguments(config) == {"use_reentrant": False, "preserve_rng_state": False}
    text = TRL.write(config, recipe(), config)
    assert "preserve_rng_state" in text
    assert "without_mask" not in text
    assert "without_mask" in TRL.write(config.replace(cuda_graph="off"), recipe(), config)


def test_compiled_layers_ask_again_whether_something_is_drawn() -> None:
    from torch._functorch import partitioners

    compile_layers(_config(compile="layers"), [], draws=True)
    asked = partitioners.has_recomputable_rng_ops
    for draws in (False, False, True):
        compile_layers(_config(compile="layers"), [], draws=draws)
        assert (partitioners.has_recomputable_rng_ops is asked) == draws


def test_recorded_micro_batches_have_few_lengths() -> None:
    multiples = [padding_multiple(_config(seq_len=1024, cuda_graph=how)) for how in (
        "off", "micro_batch")]  # fmt: skip
    assert multiples == [16, 128]


@pytest.mark.parametrize("target", [UNSLOTH, AXOLOTL, TRANSFORMERS], ids=lambda t: t.name)
def test_others_run_micro_batches_as_they_are(target: Any) -> None:
    config = _config(recompute="needed", checkpointing="full")
    settled, lost = settle(config, target.rules(recipe()))
    assert settled.cuda_graph == "off"
    assert any("CUDA graphs" in loss.why for loss in lost)


def test_a_script_for_trl_is_ours_and_is_read_back() -> None:
    config = _config(model="Qwen/Qwen2.5-1.5B", recompute="needed", checkpointing="full")
    settled, lost = settle(config, TRL.rules(recipe()))
    assert settled == config and not lost
    text = TRL.write(config, recipe(), config)
    compile(text, "script.py", "exec")
    assert "trainer = GraphTrainer(" in text
    assert any("recorded" in note for note in TRL.notes(config, recipe()))
    found = read_script(text, "script.py", "trl", {"target": "trl"}).config
    for knob in ("loss", "cuda_graph", "recompute", "adapter"):
        assert getattr(found, knob) == getattr(config, knob)


def test_a_plan_goes_on_without_graphs_where_they_cannot_be(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = dataclasses.replace(CARD.machine(), kind="cuda", driver="1.0")
    monkeypatch.setattr(planning, "detect_machine", lambda _: machine)
    monkeypatch.setattr(planning, "context_bytes_of", lambda *_: GIB // 4)
    monkeypatch.setattr(ForkServer, "of", lambda _: None)
    monkeypatch.setattr(nvml, "device_count", lambda: 1)
    made = Device(spec, speed=lambda config: 20 * speed_of(config))
    made.machine = machine
    plain = made.answer

    def answer(config: RunConfig, *rest: Any) -> ProbeResult:
        result = plain(config, *rest)
        if config.cuda_graph == "off":
            return result
        return dataclasses.replace(result, outcome="failed", detail=f"{UNRECORDABLE} (why)")

    vars(made)["answer"] = answer
    plan = plan_with(made, tmp_path)
    assert plan.chosen.config.cuda_graph == "off"
    assert plan.chosen.evidence == "proved"
    recorded = [config for config in made.probed if config.cuda_graph != "off"]
    assert len({config.compile for config in recorded}) == len(recorded)  # each code once
