from __future__ import annotations

import dataclasses
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from recorded import configure, h100_runs, tiny, trace_of

from lora_advisor.models.replayed import traced_memory
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes import trace as tracing
from lora_advisor.probes.architectures import attention_of, bundled_names, resolve_architecture
from lora_advisor.probes.config import LoraShape
from lora_advisor.probes.errors import AdvisorError, DataError, UntraceableError, UsageError
from lora_advisor.probes.events import Trace, Work
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.interpolate import between
from lora_advisor.probes.trace import trace_step

#: Rows of the recording by what they show.
ROWS = {
    5: "transformers, LoRA, no checkpointing",
    6: "transformers, QLoRA after the fp32 upcast, the stock loss",
    22: "a paged 8-bit optimizer",
    24: "fp16",
    28: "eager attention",
    31: "Liger's kernels with its fused loss, no checkpointing",
    34: "dropout 0.05",
    38: "full fine-tuning",
    61: "TRL, QLoRA",
    66: "TRL, LoRA",
    73: "TRL, QLoRA, Liger's kernels",
}


def memory_of(trace: Trace) -> TracedMemory:
    return traced_memory(trace, expandable=False, cap_bytes=1 << 60)


@pytest.mark.parametrize("number", ROWS, ids=ROWS.values())
def test_the_trace_holds_what_an_h100_held(number: int) -> None:
    row = h100_runs()[number]

    traced = memory_of(trace_of(number))

    assert traced.allocated_bytes == pytest.approx(row["measured"]["allocated_bytes"], rel=0.005)


def test_the_trace_trains_the_parameters_the_h100_trained() -> None:
    row = h100_runs()[6]  # skips where the records are not
    assert trace_of(6).trainable == row["trainable"]


SLIDING = {
    "model_type": "gemma2",
    "head_dim": 16,
    "num_hidden_layers": 12,
    "sliding_window": 32,
    "query_pre_attn_scalar": 16,
}

EXTENDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({}, {}),
    "QLoRA without checkpointing": ({}, {"method": "qlora", "checkpointing": "off"}),
    "every second layer checkpointed": (
        {"num_hidden_layers": 12},
        {"method": "qlora", "checkpointing": "every_2"},
    ),
    "alternating attention": (SLIDING, {"attention": "eager", "optimizer": "adamw_8bit"}),
}


def in_layers(trace: Trace) -> Counter[tuple[str, int]]:
    """Return how often each size is allocated or released within the layers, by phase."""
    return Counter((event.phase, event.size) for event in trace.events if event.layer >= 0)


def alive_at_the_end(trace: Trace) -> int:
    return sum(event.size for event in trace.events)


@pytest.mark.parametrize("case", EXTENDED)
def test_few_layers_extended_are_the_trace_of_all(case: str) -> None:
    figures, knobs = EXTENDED[case]
    architecture, config = tiny(**figures), configure(**knobs)
    with mock.patch.object(tracing, "_trace", side_effect=tracing._trace) as traced:
        extended = trace_all_layers(config, architecture)
    layers_looked_at = [call.args[2] for call in traced.call_args_list]
    assert layers_looked_at == [5 if figures == {} else 10]

    whole = trace_step(config, architecture)

    assert in_layers(extended) == in_layers(whole)
    assert alive_at_the_end(extended) == alive_at_the_end(whole)
    assert memory_of(extended).allocated_bytes == pytest.approx(
        memory_of(whole).allocated_bytes, rel=0.001
    )
    assert extended.trainable == whole.trainable
    for name, expected in dataclasses.asdict(whole.total_work()).items():
        # The optimizer's few launches for all parameters at once are taken to grow with these.
        within = 0.01 if name.endswith("launches") else 0.001
        assert getattr(extended.total_work(), name) == pytest.approx(expected, rel=within), name


@pytest.fixture
def the_process() -> Iterator[None]:
    """Compare what a trace replaces for a while, before and after the test."""
    from accelerate.state import AcceleratorState, PartialState
    from bitsandbytes.optim import optimizer as bnb
    from transformers import masking_utils, trainer
    from transformers.models.qwen2 import modeling_qwen2
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    places: list[tuple[Any, str]] = [
        (torch, "is_autocast_enabled"),
        (torch, "get_autocast_gpu_dtype"),
        (torch.nn.Module, "_apply"),
        (torch.nn.functional, "dropout"),
        (masking_utils, "is_tracing"),
        (masking_utils, "find_packed_sequence_indices"),
        (trainer, "apply_liger_kernel"),
        (modeling_qwen2, "apply_rotary_pos_emb"),
        (utils, "_use_triton"),
        (chunked_logprob, "_forward_tile"),
        (bnb.Optimizer8bit, "get_state_buffer"),
        (bnb.Optimizer2State, "update_step"),
    ]
    before = [getattr(*place) for place in places]
    states = [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    seeds = (random.getstate(), torch.get_rng_state().tolist())
    yield
    assert all(
        getattr(*place) is old for place, old in zip(places, before, strict=True)
    )  # the very objects
    assert states == [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    assert seeds == (random.getstate(), torch.get_rng_state().tolist())
    assert type(torch.empty(1)) is torch.Tensor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("the_process")
def test_a_trace_leaves_the_process_as_it_was() -> None:
    trace_step(configure(), tiny(), layers=2)
    trace_step(configure(trainer="transformers", kernels="liger", method="qlora"), tiny(), layers=2)


@pytest.mark.parametrize(("trainer", "loss"), [("trl", "fused"), ("transformers", "full")])
def test_a_trace_leaves_nothing_where_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, loss: str
) -> None:
    monkeypatch.chdir(tmp_path)

    trace_step(configure(trainer=trainer, loss=loss), tiny(), layers=2)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("the_process")
def test_a_trace_that_fails_leaves_the_process_as_it_was() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    with mock.patch.object(tracing, "_mark_layers", fail), pytest.raises(UntraceableError):
        trace_step(configure(kernels="liger"), tiny(), layers=2)


#: What a library raises, the kind of error it becomes, and words of its sentence.
FAILURES: list[tuple[Exception, type[AdvisorError], str]] = [
    (ValueError("no\nand more"), UsageError, "`tiny` cannot be trained like this: ValueError: no"),
    (KeyError("x"), UsageError, "`tiny` cannot be trained like this: KeyError: 'x'"),
    (RuntimeError("shapes"), UntraceableError, "(RuntimeError: shapes); probe it on a card."),
    (DataError("as it is"), DataError, "as it is"),
]


def failing(error: Exception) -> Any:
    return mock.patch.object(tracing, "_trace", side_effect=error)


@pytest.mark.parametrize(("error", "kind", "words"), FAILURES)
def test_what_a_library_raises_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[AdvisorError], words: str
) -> None:
    monkeypatch.delenv("LORA_ADVISOR_DEBUG", raising=False)
    with failing(error), pytest.raises(kind) as caught:
        trace_step(configure(), tiny())

    assert type(caught.value) is kind
    assert str(caught.value).endswith(words)
    assert "\n" not in str(caught.value)


def test_what_a_library_raises_is_shown_as_it_is_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORA_ADVISOR_DEBUG", "1")
    with failing(ValueError("no")), pytest.raises(ValueError, match="no"):
        trace_step(configure(), tiny())


#: One of each model type.
ARCHITECTURES = (
    "gemma-2-2b", "gemma-3-1b", "llama-3.2-1b", "mistral-7b", "phi-3.5-mini", "qwen2.5-0.5b",
    "qwen3-0.6b",
)  # fmt: skip


def test_the_architectures_traced_here_are_of_every_bundled_type() -> None:
    def kinds(names: tuple[str, ...]) -> set[str]:
        return {resolve_architecture(name).hf_config["model_type"] for name in names}

    assert kinds(ARCHITECTURES) == kinds(bundled_names())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_bundled_architecture_is_traced(name: str) -> None:
    architecture = resolve_architecture(name)
    config = configure(
        model=name,
        method="qlora",
        micro_batch=1,
        seq_len=256,
        attention=attention_of(architecture),
    )

    if name == "gemma-3-1b":  # its pattern of six layers leaves nothing to extend
        layers, trace = 6, trace_step(config, architecture, layers=6)
    else:
        assert architecture.num_layers is not None
        layers, trace = architecture.num_layers, trace_all_layers(config, architecture)

    # At least: every linear weight in 4 bits, the embedding in 16.
    figures = architecture.hf_config
    embedding = 2 * figures["vocab_size"] * figures["hidden_size"]
    mlp = 3 * figures["hidden_size"] * figures["intermediate_size"] * layers
    assert memory_of(trace).allocated_bytes > embedding + mlp // 2


def test_attention_that_a_model_lacks_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError, match=r'`attention` must be "eager" for `gemma-2-2b`'):
        trace_step(configure(model="gemma-2-2b"), resolve_architecture("gemma-2-2b"))


def test_another_engine_is_refused_in_one_sentence() -> None:
    config = configure(trainer="unsloth", checkpointing="unsloth")

    with pytest.raises(UsageError, match="`trainer` 'unsloth' is another engine"):
        trace_step(config, tiny())


def test_a_second_micro_batch_adds_the_adapters_gradients() -> None:
    # Wide adapters under short rows, so that their gradients outweigh all else.
    wide = configure().lora
    assert wide is not None
    shape = type(wide)(r=64, alpha=64, dropout=0.0, targets="all-linear")
    one = configure(micro_batch=1, seq_len=16, lora=shape, checkpointing="off")
    architecture = tiny(hidden_size=256, intermediate_size=1024, num_hidden_layers=3)

    alone = trace_step(one, architecture)
    both = trace_step(one.replace(accumulation=2), architecture)

    def forward_peak(trace: Trace) -> int:
        return memory_of(trace).phases["forward"]

    gradients = 4 * alone.trainable  # fp32
    assert forward_peak(both) - forward_peak(alone) == pytest.approx(gradients, rel=0.05)


def test_offloaded_checkpoints_are_not_on_the_device() -> None:
    long = configure(micro_batch=8, seq_len=512)

    kept = memory_of(trace_step(long, tiny(), layers=4))
    offloaded = memory_of(trace_step(long.replace(checkpointing="offload"), tiny(), layers=4))

    saved = 4 * 8 * 512 * 64 * 2  # the input of each layer in bf16
    less = kept.allocated_bytes - offloaded.allocated_bytes
    assert 0.5 * saved < less < 1.5 * saved


def test_a_micro_batch_between_two_traced_ones_is_exact() -> None:
    low, wanted, high = (
        trace_step(configure(method="qlora", seq_len=2048, micro_batch=n), tiny(), layers=2)
        for n in (2, 3, 6)
    )

    made = between(low, high, share=1 / 4)

    assert made is not None
    exact = memory_of(wanted)
    assert memory_of(made).allocated_bytes == pytest.approx(exact.allocated_bytes, rel=1e-4)
    assert made.total_work().matmul_flops == pytest.approx(wanted.total_work().matmul_flops)
    assert made.total_work().bytes_moved == pytest.approx(wanted.total_work().bytes_moved, rel=1e-3)


def test_there_is_nothing_between_two_different_steps() -> None:
    low = trace_step(configure(), tiny(), layers=2)
    high = trace_step(configure(checkpointing="off", micro_batch=4), tiny(), layers=2)

    assert between(low, high, share=0.5) is None


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_a_mixture_of_experts_holds_all_its_experts(model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    from lora_advisor.probes.architectures import build_hf_config

    architecture = tiny(model_type=model_type, num_hidden_layers=2, **EXPERTS[model_type])
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(build_hf_config(architecture))
    held = 2 * sum(parameter.numel() for parameter in model.parameters())

    memory = memory_of(trace_step(configure(), architecture))

    assert memory.components["weights"] == pytest.approx(held, rel=0.02)


# Work --------------------------------------------------------------------------------------------

#: Wide enough for the weights' products not to wait for memory.
WIDE = tiny(hidden_size=512, intermediate_size=1024, num_key_value_heads=4, num_hidden_layers=2)
PLAIN = configure(seq_len=512, checkpointing="off", loss="full", trainer="transformers")


@cache
def work_of(**changes: Any) -> Work:
    capability = changes.pop("capability", "9.0")
    return trace_step(PLAIN.replace(**changes), WIDE, capability=capability).total_work()


def test_work_counts_products_by_hand() -> None:
    hidden, inner, vocabulary = 512, 1024, WIDE.hf_config["vocab_size"]
    shapes = 4 * [(hidden, hidden)] + 2 * [(hidden, inner)] + [(inner, hidden)]
    tokens = 2 * 512
    base = 2 * sum(a * b for a, b in shapes) + hidden * vocabulary
    # Forward, and backward to the input, which three products of the first layer do without. The
    # adapters' products are too thin to be computed: they are read.
    least = 2 * tokens * (2 * base - 3 * hidden * hidden)

    assert work_of().matmul_flops == least
    assert work_of().fp32_matmul_flops == 0


def test_work_counts_attention_by_hand() -> None:
    rows, heads, length, width, layers = 2, 4, 512, 128, 2
    scores = 2 * rows * heads * length * length * width / 2  # a causal half

    # Two products forward, five backward; run again where a layer is checkpointed.
    assert work_of().attention_flops == layers * 7 * scores
    assert work_of(checkpointing="full").attention_flops == layers * 9 * scores


def test_attention_of_a_card_that_lacks_bf16() -> None:
    turing = {"capability": "7.5"}
    half, brain = work_of(precision="fp16", **turing), work_of(precision="bf16", **turing)

    # fp16 is traced in bf16, which finds no fused kernel there; fp16 itself does.
    assert half.efficient_attention_flops == work_of().attention_flops
    assert (half.attention_flops, brain.attention_flops) == (0, 0)
    assert brain.efficient_attention_flops == 0
    assert brain.bytes_moved > half.bytes_moved  # of all scores


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_work_in_32_bits_is_apart(precision: str) -> None:
    work, half = work_of(precision=precision), work_of()

    amounts = (work.matmul_flops, work.attention_flops)
    wide = (work.fp32_matmul_flops, work.fp32_attention_flops)
    expected = (half.matmul_flops, half.attention_flops)
    assert (amounts, wide) == ((expected, (0, 0)) if precision == "bf16" else ((0, 0), expected))


def test_a_thin_factor_waits_for_memory() -> None:
    def adapters(rank: int) -> Work:
        shape = LoraShape(r=rank, alpha=16, dropout=0.0, targets="all-linear")
        return work_of(lora=shape)

    assert adapters(16).matmul_flops == adapters(8).matmul_flops
    assert adapters(16).bytes_moved > adapters(8).bytes_moved
    assert adapters(256).matmul_flops > adapters(8).matmul_flops


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_bitsandbytes_updates_each_tensor_with_a_launch_of_its_own(optimizer: str) -> None:
    layers, products, factors = WIDE.num_layers or 0, 7, 2

    assert work_of(optimizer=optimizer).custom_launches == layers * products * factors
    assert work_of(optimizer="adamw_torch_fused").custom_launches == 0


def test_launches_are_put_down_to_who_issues_them() -> None:
    plain, checkpointed = work_of(), work_of(checkpointing="full")
    packed, compiled = work_of(method="qlora"), work_of(compile="layers")
    liger = work_of(kernels="liger", loss="fused")

    assert plain.launches > 0 and plain.engine_launches > 0
    assert (plain.custom_launches, plain.compiled_launches) == (0, 0)
    # The forward pass that runs again is Python's, though it is part of the backward pass.
    again = checkpointed.launches - plain.launches
    assert again > 5 * (checkpointed.engine_launches - plain.engine_launches) > 0
    assert packed.custom_launches > 0 == packed.compiled_launches
    assert liger.custom_launches > 0 == liger.compiled_launches
    assert liger.launches < plain.launches
    assert compiled.compiled_launches > 0 == compiled.custom_launches
    assert compiled.launches < plain.launches / 2
    assert compiled.bytes_moved < plain.bytes_moved


def test_a_functions_own_backward_is_python() -> None:
    peft, fused = work_of(), work_of(adapter="fused")
    adapted = 7 * (WIDE.num_layers or 0)

    # peft's casts, sums and products are ten launches of the engine or more, each.
    assert peft.engine_launches - fused.engine_launches >= 10 * adapted
    assert fused.launches + fused.engine_launches < peft.launches + peft.engine_launches


def test_a_compiled_program_calls_what_it_cannot_compile() -> None:
    layers, products = WIDE.num_layers or 0, 7
    work = work_of(method="qlora", compile="layers", adapter="fused")

    # Dequantised forward and backward, the scales, then the weight, and multiplied with it and its
    # adapter. The first layer's input needs no gradient, so three products spare all that there.
    assert work.custom_launches == 0
    assert work.compiled_custom_launches == 3 * (2 * layers * products - 3)
    fused, peft = (
        work_of(method="lora", compile="layers", adapter=adapter).compiled_custom_launches
        for adapter in ("fused", "peft")
    )
    assert fused == 2 * layers * products - 3
    assert peft == 0


def test_checkpointing_costs_hooks() -> None:
    full, every_2 = work_of(checkpointing="full").hooks, work_of(checkpointing="every_2").hooks

    assert work_of().hooks == 0
    assert full > every_2 > 0
    assert full % WIDE.num_layers == 0  # type: ignore[operator] # the same in each layer


def test_sums_in_32_bits_of_16_bit_products_are_16_bit_products() -> None:
    full, fused = work_of(), work_of(trainer="trl", loss="fused")
    row = 2.0 * 512 * WIDE.hf_config["vocab_size"]

    # The fused loss multiplies by the head once more, for it does not keep the logits; and it
    # leaves out the last token of each row, which has nothing to predict.
    assert fused.matmul_flops == full.matmul_flops + row * 2 * (3 * 511 - 2 * 512)
    assert fused.fp32_matmul_flops == 0
