"""What several cards are expected to come to together, as text for people."""

from __future__ import annotations

from lora_advisor.advisor.report import interval_text
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.prediction import Interval
from lora_advisor.probes.scaling import Scaling

_WAITING = "rows of differing length make the cards wait for each other"


def scaling_text(plan: Plan) -> str | None:
    """Write how several cards share a plan; None for one card."""
    scaling = plan.scaling
    if scaling is None:
        return None
    lines = [
        f"on {scaling.gpus} such cards (what stands above is one card's share of a step):",
        f"  each runs {_share(plan)}",
    ]
    if scaling.tokens_per_s is None or scaling.all_reduce_s is None:
        lines.append(f"  tokens/s unknown: {_why_unknown(scaling)}")
    else:
        lines.append(
            f"  predicted {interval_text(scaling.tokens_per_s)}"
            + ("" if scaling.efficiency is None
               else f", scaling efficiency {_percent(scaling.efficiency)}")
        )  # fmt: skip
        if scaling.step_s is not None:
            time = _time(scaling.all_reduce_s, scaling.step_s)
            lines.append(f"  a step's gradients, {_gradients(scaling)}, take {time}")
        lines.append(f"  {_waits(scaling)}")
        lines.append(f"  {_WAITING}: not counted")
    lines += [
        f"  {_set_aside(scaling)} are left to DDP's buckets and NCCL",
        f"  start: {launcher(scaling.gpus)} train PLAN ...",
    ]
    return "\n".join(lines)


def scaling_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the same as pairs of a name and its words; nothing for one card."""
    scaling = plan.scaling
    if scaling is None:
        return []
    rows = [("each card runs", _share(plan))]
    name = "all cards, padding included"
    if scaling.tokens_per_s is None or scaling.all_reduce_s is None:
        rows.append((name, f"unknown: {_why_unknown(scaling)}"))
    else:
        rows.append((name, interval_text(scaling.tokens_per_s)))
        if scaling.efficiency is not None:
            rows.append(("scaling efficiency", _percent(scaling.efficiency)))
        rows.append(("a step's gradients", _gradients(scaling)))
        if scaling.step_s is not None:
            rows.append(("their time", _time(scaling.all_reduce_s, scaling.step_s)))
        rows += [("waiting", _waits(scaling)), ("not counted", _WAITING)]
    return [
        *rows,
        ("left to DDP and NCCL", _set_aside(scaling)),
        ("start", f"{launcher(scaling.gpus)} train PLAN ..."),
    ]


def launcher(gpus: int) -> str:
    """Return what stands for `lora-advisor` in a command that trains on several cards."""
    return f"accelerate launch --multi_gpu --num_processes {gpus} -m lora_advisor.cli"


def _share(plan: Plan) -> str:
    config = plan.chosen.config
    return (
        f"{config.micro_batch} x {config.accumulation} accumulation: "
        f"{plan.spec.effective_batch} in a step of all"
    )


def _why_unknown(scaling: Scaling) -> str:
    why = "the link between the cards" if scaling.link is None else "the speed of one card"
    return f"{why} is not known"


def _gradients(scaling: Scaling) -> str:
    return f"{scaling.gradient_bytes / 1e6:,.0f} MB of each card over {scaling.link}"


def _time(all_reduce_s: Interval, step_s: Interval) -> str:
    low, value, high = (1e3 * s for s in (all_reduce_s.low, all_reduce_s.value, all_reduce_s.high))
    return f"{value:,.1f} ms ({low:,.1f} to {high:,.1f}) of {1e3 * step_s.value:,.0f} ms"


def _waits(scaling: Scaling) -> str:
    if scaling.waiting_s is None:
        return "how long a step waits for the slowest card is not known: no step was measured"
    high = 1e3 * scaling.waiting_s.high
    return f"a step waits up to {high:,.1f} ms for the slowest card, as one card's steps vary"


def _set_aside(scaling: Scaling) -> str:
    return f"{scaling.set_aside_bytes / GIB:.2f} GiB of each card"


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"
