"""A plan for several cards: planned as one card's share of a step, predicted for all of them.

Each card runs the same micro-batch, and accumulates as many times less as there are cards. So the
plan's search, probes and proof are those of one card with its share of the effective batch, in the
memory that is left beside DDP's buckets and NCCL. What the cards do together is predicted.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

from lora_advisor.advisor.baseline import baseline_config
from lora_advisor.advisor.pricing import off_by
from lora_advisor.advisor.session import Session
from lora_advisor.models.all_reduce import NCCL_BYTES, all_reduce_s, waiting_s
from lora_advisor.probes import unsloth
from lora_advisor.probes.batching import Batching
from lora_advisor.probes.cards import links
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.plan import Candidate, Plan
from lora_advisor.probes.prediction import Interval
from lora_advisor.probes.scaling import Scaling
from lora_advisor.probes.spec import Spec

#: Why several cards have no CUDA graphs.
NOT_RECORDED = "what the cards say to each other is no part of it"


def one_card(spec: Spec) -> Spec:
    """Return what one card of a spec is asked for: its share of a step.

    Raises:
        UsageError: Another engine is to train, with which one card does; or micro-batches are to
            be recorded.
    """
    if spec.fixed.get("trainer") == unsloth.NAME:
        raise UsageError(
            f"`--gpus` must be 1 with --trainer {unsloth.NAME}, with which one card trains here, "
            f"but got {spec.gpus}."
        )
    if spec.fixed.get("cuda_graph", "off") != "off":
        raise UsageError(
            f"`--cuda-graph` must be off with --gpus {spec.gpus}: {NOT_RECORDED}; leave it out."
        )
    fixed = {**spec.fixed, "cuda_graph": "off"}
    rows = spec.effective_batch // spec.gpus
    return dataclasses.replace(spec, effective_batch=rows, gpus=1, fixed=fixed)


def gradient_bytes(config: RunConfig, trainable: int) -> int:
    """Return the bytes of a configuration's gradients.

    peft keeps adapters in fp32 (`autocast_adapter_dtype`); TRL casts those of a quantised model to
    bf16 (trl/trainer/sft_trainer.py), which `build_trainer` undoes for fp16.
    """
    if config.method == "full":
        halved = config.precision == "bf16"
    else:
        quantised = config.method == "qlora" and config.trainer == "trl"
        halved = quantised and config.precision == "bf16"
    return trainable * (2 if halved else 4)


def set_aside(session: Session) -> int:
    """Leave memory of the card to what DDP and NCCL hold; return how much.

    The gradients are taken as fp32 ones of the baseline's adapter, which has every shape that is
    searched; for method "full" as those of all weights.
    """
    spec = session.spec
    config = baseline_config(
        spec, session.space.axes["precision"][0], cache=session.predictor.store.cache
    )
    if spec.fixed.get("method") == "full":
        config = config.replace(method="full", lora=None, fp32_upcast=False)
    buckets = gradient_bytes(
        config.replace(precision="fp32"), session.predictor.store.get(config).trainable
    )
    aside = buckets + (NCCL_BYTES if session.machine.kind != "cpu" else 0)
    predictor = session.predictor
    session.predictor = dataclasses.replace(predictor, limit_bytes=predictor.limit_bytes - aside)
    if session.cap_bytes is not None:
        session.cap_bytes -= aside
    return aside


def for_all_cards(session: Session, plan: Plan, spec: Spec, aside: int) -> Plan:
    """Return one card's plan as that of all cards of a spec.

    Args:
        session: That made the plan.
        plan: One card's.
        spec: What the user wants.
        aside: What `set_aside` has set aside.
    """
    scaling = _scaling(session, plan.chosen, spec.gpus, aside)
    cap = plan.cap_bytes
    return dataclasses.replace(
        plan,
        spec=spec,
        scaling=scaling,
        excluded=(*plan.excluded, ("cuda_graph micro_batch", NOT_RECORDED)),
        # The buckets are of PyTorch's allocator.
        cap_bytes=None if cap is None else cap + scaling.gradient_bytes,
        batchings=tuple(_shared(batching, scaling) for batching in plan.batchings),
        # These compare one card with one card.
        savings=(),
        rentals=(),
        proposed_batch=None,
    )


def _scaling(session: Session, chosen: Candidate, gpus: int, aside: int) -> Scaling:
    config, card = chosen.config, session.card
    size = gradient_bytes(config, session.predictor.store.get(config).trainable)
    link = None if card is None or card.link is None else links()[card.link]
    step, whole = _step(chosen), session.predictor.time(
        config.replace(accumulation=config.accumulation * gpus)
    )  # fmt: skip
    alone = None if whole is None else whole.value * off_by(session, config)
    extra = None if link is None else all_reduce_s(size, gpus, link.gb_s)
    waiting = None if chosen.measured is None else waiting_s(chosen.measured.step_times_s, gpus)
    together = speed = efficiency = None
    if extra is not None and step is not None:
        beside = extra if waiting is None else _sum(extra, waiting)
        together = _sum(step, beside)
        speed = together.reciprocal(config.tokens_per_step * gpus)
        if alone is not None:
            ends = (step.value + at for at in (beside.value, beside.high, beside.low))
            value, low, high = (min(1.0, alone / gpus / seconds) for seconds in ends)
            efficiency = Interval(value=value, low=low, high=high)
    return Scaling(
        gpus=gpus,
        link=None if link is None else link.name,
        gradient_bytes=size,
        all_reduce_s=extra,
        waiting_s=waiting,
        step_s=together,
        tokens_per_s=speed,
        efficiency=efficiency,
        set_aside_bytes=aside,
    )


def _step(chosen: Candidate) -> Interval | None:
    """Return one card's seconds of a step: as measured where it ran, else as predicted."""
    ran = chosen.measured
    if ran is None or not ran.step_times_s:
        return chosen.prediction.step_s
    times = ran.step_times_s
    return Interval(value=statistics.median(times), low=min(times), high=max(times))


def _sum(one: Interval, other: Interval) -> Interval:
    return Interval(
        value=one.value + other.value, low=one.low + other.low, high=one.high + other.high
    )


def _shared(batching: Batching, scaling: Scaling) -> Batching:
    """Return what a pass costs when cards share it; unknown where it is not known how well."""
    steps = math.ceil(batching.optimizer_steps / scaling.gpus)
    seconds, efficiency = batching.seconds, scaling.efficiency
    if seconds is None or efficiency is None:
        return dataclasses.replace(batching, optimizer_steps=steps, seconds=None, tokens_per_s=None)
    gpus = scaling.gpus
    shared = Interval(
        value=seconds.value / gpus / efficiency.value,
        low=seconds.low / gpus / efficiency.high,
        high=seconds.high / gpus / efficiency.low,
    )
    return dataclasses.replace(
        batching,
        optimizer_steps=steps,
        seconds=shared,
        tokens_per_s=shared.reciprocal(batching.useful_tokens),
    )
