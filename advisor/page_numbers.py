"""The numbers of a report, as its page, its picture and its Markdown all show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.page_source import Source
from lora_advisor.advisor.report import duration, gib
from lora_advisor.probes.plan import Candidate, Plan
from lora_advisor.probes.prediction import Interval

#: Points that need more than so many times the limit are told, not drawn.
BEYOND = 1.35


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One figure of the answer.

    Attributes:
        name: What it is.
        value: The figure.
        note: Its interval, or how it is known.
        known: "traced", "probed elsewhere", "probed", "proved", "measured" or "unknown".
    """

    name: str
    value: str
    note: str
    known: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A configuration in the picture of speed against memory.

    Attributes:
        what: The configuration in a few words.
        tokens_per_s: Its speed.
        low: Lower end of a predicted speed; None of a measured one, and where it is not known.
        high: Upper end, likewise.
        process_bytes: What the process holds.
        kind: "chosen", "baseline" or "other".
        measured: Whether it ran.
        runs: Whether it fits, as far as is known.
        verdict: In words.
    """

    what: str
    tokens_per_s: float
    low: float | None = None
    high: float | None = None
    process_bytes: int
    kind: str = "other"
    measured: bool = False
    runs: bool = True
    verdict: str = ""


def limit_of(plan: Plan) -> int:
    """Return the bytes that the process may hold."""
    return plan.spec.vram_bytes - plan.spec.reserve_bytes


def fits_fact(plan: Plan) -> Fact:
    """Say whether the plan fits, and how that is known."""
    chosen, memory = plan.chosen, plan.chosen.prediction.memory
    limit = gib(limit_of(plan))
    if chosen.measured is not None and chosen.evidence == "proved":
        held = chosen.measured.process_bytes
        note = f"it ran within the limit of {limit}"
        if held is not None and held > limit_of(plan):
            note = f"it ran under the allocator's cap; the process is above {limit}"
        return Fact(name="Fits", value="yes", known="proved", note=note)
    words = {"fits": "yes", "does not fit": "no", "uncertain": "uncertain"}
    note = f"at most {gib(memory.process_upper_bytes)} expected, limit {limit}"
    value = words[chosen.prediction.verdict]
    return Fact(name="Fits", value=value, note=note, known=memory.evidence)


def speed_fact(candidate: Candidate) -> Fact:
    """Say how fast a configuration is."""
    expected, ran = candidate.prediction.tokens_per_s, candidate.measured
    if ran is not None and ran.tokens_per_s is not None:
        steps = len(ran.step_times_s)
        note = f"median of {steps} steps" + _spread(ran.step_times_s, ran.tokens_per_step)
        return Fact(name="Tokens/s", value=f"{ran.tokens_per_s:,.0f}", note=note, known="measured")
    if expected is None:
        return Fact(name="Tokens/s", value="unknown", note="no card is named", known="unknown")
    known = candidate.prediction.evidence
    return Fact(name="Tokens/s", value=f"{expected.value:,.0f}", note=range_text(expected),
                known=known)  # fmt: skip


def _spread(seconds: Sequence[float], tokens: int | None) -> str:
    if tokens is None or len(seconds) < 2:
        return ""
    return f", {tokens / max(seconds):,.0f} to {tokens / min(seconds):,.0f}"


def range_text(interval: Interval) -> str:
    """Write an interval without its value."""
    return f"{interval.low:,.0f} to {interval.high:,.0f}"


def memory_fact(candidate: Candidate) -> Fact:
    """Say what the process holds at its peak."""
    memory, ran = candidate.prediction.memory, candidate.measured
    if ran is not None and ran.process_bytes is not None:
        return Fact(name="Peak memory", value=gib(ran.process_bytes), known="measured",
                    note="of the whole process")  # fmt: skip
    return Fact(name="Peak memory", value=gib(memory.process_bytes), known=memory.evidence,
                note=f"at most {gib(memory.process_upper_bytes)}")  # fmt: skip


def baseline_fact(plan: Plan) -> Fact | None:
    """Say how the plan stands beside what the user would have run otherwise; None for nothing."""
    baseline = plan.baseline
    if baseline is None:
        return None
    name = "Against the baseline"
    ran = baseline.measured
    if ran is not None and ran.outcome != "ok":
        return Fact(name=name, value="it does not run", known="measured",
                    note=f"the baseline: {ran.outcome.replace('_', ' ')}")  # fmt: skip
    mine, other = plan.chosen.tokens_per_s, baseline.tokens_per_s
    if mine is None or other is None:
        return None
    both = {plan.chosen.evidence, baseline.evidence}
    known = "measured" if both == {"proved"} else plan.chosen.prediction.evidence
    return Fact(name=name, value=f"{mine / other:.1f} x", known=known,
                note=f"baseline {other:,.0f} tokens/s")  # fmt: skip


def time_fact(plan: Plan) -> Fact | None:
    """Say how long the data takes; None for a plan without data."""
    if plan.data is None or plan.epoch_s is None:
        return None
    epochs, evidence = plan.spec.epochs, plan.chosen.evidence
    name = "pairs" if plan.data.sequences > 1 else "rows"
    note = f"{epochs:g} x {plan.data.rows:,} {name}"
    batching = plan.batching
    if batching is not None and batching.seconds is not None:
        low, high = batching.seconds.low * epochs, batching.seconds.high * epochs
        note += f", {duration(low)} to {duration(high)}"
    return Fact(name="Time for the data", value=duration(plan.epoch_s * epochs), note=note,
                known="probed" if evidence == "proved" else evidence)  # fmt: skip


def scaling_fact(plan: Plan) -> Fact | None:
    """Say how fast several cards are together; None for one card, or where that is not known."""
    scaling, evidence = plan.scaling, plan.chosen.evidence
    if scaling is None or scaling.tokens_per_s is None:
        return None
    speed = scaling.tokens_per_s
    # However one card's speed is known, that of all is predicted.
    known = "probed" if evidence == "proved" else evidence
    return Fact(name=f"Tokens/s of {scaling.gpus} cards", value=f"{speed.value:,.0f}",
                note=range_text(speed), known=known)  # fmt: skip


def plan_facts(plan: Plan) -> list[Fact]:
    """Return the answer of a plan in figures."""
    chosen = plan.chosen
    facts = [fits_fact(plan), speed_fact(chosen), scaling_fact(plan), memory_fact(chosen),
             baseline_fact(plan), time_fact(plan)]  # fmt: skip
    return [fact for fact in facts if fact is not None]


def points_of(source: Source) -> list[Point]:
    """Return the configurations of a plan whose speed and memory are known, each once."""
    plan = source.plan
    if plan is None:
        return []
    found: dict[str, Point] = {}
    tables = [*plan.runners_up, *plan.front, *plan.rejected]
    named = [(plan.chosen, "chosen"), *([(plan.baseline, "baseline")] if plan.baseline else [])]
    for candidate, kind in [*named, *((candidate, "other") for candidate in tables)]:
        point = _point(candidate, kind)
        if point is not None:
            found.setdefault(point.what, point)
    described = {describe(c.config) for c, _ in named} | set(found)
    for probed in source.trail:
        what = describe(probed.config)
        if what in described or probed.layers is not None:
            continue
        if probed.tokens_per_s is not None and probed.process_bytes is not None:
            point = Point(what=what, tokens_per_s=probed.tokens_per_s, measured=True,
                          process_bytes=probed.process_bytes, verdict="it ran")  # fmt: skip
            found.setdefault(what, point)
    for seen in plan.considered:
        if seen.tokens_per_s is not None:
            point = Point(what=seen.what, tokens_per_s=seen.tokens_per_s,
                          process_bytes=seen.process_bytes, runs=seen.verdict == "fits",
                          verdict=seen.verdict)  # fmt: skip
            found.setdefault(seen.what, point)
    return list(found.values())


def _point(candidate: Candidate, kind: str) -> Point | None:
    ran, expected = candidate.measured, candidate.prediction.tokens_per_s
    speed = candidate.tokens_per_s
    if speed is None:
        return None
    measured = ran is not None and ran.tokens_per_s is not None
    failed = ran is not None and ran.outcome != "ok"
    held = candidate.prediction.memory.process_bytes
    if ran is not None and ran.process_bytes is not None and not failed:
        held = ran.process_bytes
    verdict = candidate.prediction.verdict
    if ran is not None:
        verdict = "it ran" if ran.outcome == "ok" else f"ran: {ran.outcome.replace('_', ' ')}"
    return Point(
        what=describe(candidate.config),
        tokens_per_s=speed,
        low=None if measured or expected is None else expected.low,
        high=None if measured or expected is None else expected.high,
        process_bytes=held,
        kind=kind,
        measured=measured,
        runs=measured or (verdict == "fits" and not failed),
        verdict=verdict,
    )


def front_of(points: Sequence[Point], limit_bytes: int) -> list[Point]:
    """Return what no other beats in speed and memory, of what fits; least memory first."""
    best: list[Point] = []
    fitting = (p for p in points if p.runs and p.process_bytes <= limit_bytes)
    for point in sorted(fitting, key=lambda p: (p.process_bytes, -p.tokens_per_s)):
        if not best or point.tokens_per_s > best[-1].tokens_per_s:
            best.append(point)
    return best
