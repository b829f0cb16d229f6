"""What a training would take and cost on larger cards that can be rented: predicted from traces.

The configuration stays the planned one but for its micro-batch, and for checkpointing where it fits
without and is faster so; layers are not compiled, for what that gains is not known without the
card. A plan for the card itself (`--gpu`) may find a faster one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_advisor.advisor.epochs import traced_lengths
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.pricing import pass_seconds, prices_of
from lora_advisor.advisor.session import Session
from lora_advisor.advisor.space import build_space
from lora_advisor.probes.cards import Card, cards
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UntraceableError, UsageError
from lora_advisor.probes.plan import DataSummary, Plan
from lora_advisor.probes.prices import Price, read_prices
from lora_advisor.probes.saving import Rental
from lora_advisor.probes.spec import Spec

#: Cards that are priced: each takes some traces of its own.
_MOST = 3
#: Micro-batches beyond this many tokens gain nothing more on any card of the table.
_ENOUGH_TOKENS = 65_536


def rentals(session: Session, plan: Plan, data: DataSummary) -> tuple[Rental, ...]:
    """Return what larger cards would take and cost, the cheapest training first.

    Only those that are expected to be faster than the planned card.
    """
    prices = session.prices if session.prices is not None else read_prices()
    assert plan.batching is not None and plan.batching.seconds is not None
    here_s = plan.batching.seconds.value * plan.spec.epochs
    found = (_rental(session, plan, data, price) for price in _worth_a_look(prices, session))
    faster = [one for one in found if one is not None and one.seconds.value < here_s]
    return tuple(sorted(faster, key=lambda one: one.usd.value))


def _worth_a_look(prices: Sequence[Price], session: Session) -> list[Price]:
    """Return a few prices of larger cards: the fastest, and those that compute most for a dollar.

    Speed is here the maker's figure; what is told later is traced.
    """
    limit, own = session.spec.vram_bytes, 0.0 if session.card is None else _rate(session.card)
    known = cards()
    larger = [
        price
        for price in prices
        if known[price.card].memory_bytes > limit and _rate(known[price.card]) > own
    ]
    if len(larger) <= _MOST:
        return larger
    fastest = max(larger, key=lambda price: (_rate(known[price.card]), -price.usd_per_hour))
    cheap = sorted(larger, key=lambda price: price.usd_per_hour / _rate(known[price.card]))
    return [fastest, *[price for price in cheap if price != fastest][: _MOST - 1]]


def _rate(card: Card) -> float:
    return card.bf16_tflops or card.fp16_tflops or card.fp32_tflops


def _rental(session: Session, plan: Plan, data: DataSummary, price: Price) -> Rental | None:
    """Return what a card would take; None where nothing is known to fit there."""
    card, shared = cards()[price.card], session.predictor.store
    predictor = Predictor.start(
        plan.architecture,
        card.machine(),
        card,
        limit_bytes=card.memory_bytes - plan.spec.reserve_bytes,
    )
    predictor.store.cache = shared.cache
    predictor.store.server = shared.server
    try:
        config = _fitted(predictor, plan, card, session)
        if config is None:
            return None
        lengths = traced_lengths(config.seq_len)
        predictor.store.prepare(config.replace(seq_len=length) for length in lengths)
        seconds = pass_seconds(data, config, prices_of(predictor, config), seed=plan.spec.seed)
    except UntraceableError:
        return None
    finally:
        shared.server = predictor.store.server  # ended with the plan
    if seconds is None:
        return None
    seconds = seconds.scaled(plan.spec.epochs)
    return Rental(
        card=card.key,
        name=card.name,
        config=config,
        seconds=seconds,
        usd=seconds.scaled(price.usd_per_hour / 3600),
        usd_per_hour=price.usd_per_hour,
        date=price.date,
        source=price.source,
    )


def _fitted(predictor: Predictor, plan: Plan, card: Card, session: Session) -> RunConfig | None:
    """Return the planned configuration as the card would run it; None where nothing fits."""
    spec, chosen = plan.spec, plan.chosen.config
    precision = _precision(spec, card, session)
    best: tuple[float, RunConfig] | None = None
    for checkpointing in dict.fromkeys(
        (_fixed(spec, "checkpointing", "off"), chosen.checkpointing)
    ):
        for size in _sizes(spec, chosen):
            try:
                config = chosen.replace(
                    # The scaler of fp16 is no part of a CUDA graph.
                    cuda_graph="off" if precision == "fp16" else chosen.cuda_graph,
                    precision=precision,
                    checkpointing=checkpointing,
                    compile="off",
                    micro_batch=size,
                    accumulation=spec.effective_batch // size,
                )
            except UsageError:
                break
            told = predictor.predict(config)
            if told.verdict != "fits":
                continue
            speed = 0.0 if told.tokens_per_s is None else told.tokens_per_s.value
            best = max(best or (speed, config), (speed, config), key=lambda one: one[0])
            break
    return None if best is None else best[1]


def _fixed(spec: Spec, knob: str, otherwise: str) -> str:
    return str(spec.fixed.get(knob, otherwise))


def _precision(spec: Spec, card: Card, session: Session) -> str:
    """Return what the card multiplies in best, unless the user fixed it."""
    there = dataclasses.replace(spec, device="none", gpu=card.key, fixed={})
    best = build_space(there, card.machine(), session.stack, card).axes["precision"][0]
    return _fixed(spec, "precision", best)


def _sizes(spec: Spec, chosen: RunConfig) -> list[int]:
    """Return the micro-batches that make the effective batch, the largest first."""
    if "micro_batch" in spec.fixed:
        return [chosen.micro_batch]
    most = max(chosen.micro_batch, _ENOUGH_TOKENS // chosen.seq_len)
    sizes = range(min(spec.effective_batch, most), 0, -1)
    return [size for size in sizes if spec.effective_batch % size == 0]
