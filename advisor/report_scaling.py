"""What several cards are expected to come to together, as text for people."""

from __future__ import annotations

from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Plan
from lora_advisor.probes.prediction import Interval


def scaling_text(plan: Plan) -> str | None:
    """Write how several cards share a plan; None for one card."""
    scaling = plan.scaling
    if scaling is None:
        return None
    config, gpus = plan.chosen.config, scaling.gpus
    lines = [
        f"on {gpus} such cards (what stands above is one card's share of a step):",
        f"  each runs {config.micro_batch} x {config.accumulation} accumulation: "
        f"{plan.spec.effective_batch} in a step of all",
    ]
    speed, efficiency, extra = scaling.tokens_per_s, scaling.efficiency, scaling.all_reduce_s
    if speed is None or extra is None:
        why = "the link between the cards" if scaling.link is None else "the speed of one card"
        lines.append(f"  tokens/s unknown: {why} is not known")
    else:
        lines.append(
            f"  predicted {speed.value:,.0f} tokens/s ({speed.low:,.0f} to {speed.high:,.0f})"
            + ("" if efficiency is None else f", scaling efficiency {_percent(efficiency)}")
        )
        lines.append(
            f"  a step's gradients, {scaling.gradient_bytes / 1e6:,.0f} MB of each card over "
            f"{scaling.link}, take {extra.value * 1e3:,.1f} ms ({extra.low * 1e3:,.1f} to "
            f"{extra.high * 1e3:,.1f}) of {1e3 * scaling.step_s.value:,.0f} ms"
            if scaling.step_s is not None
            else ""
        )
        lines.append("  rows of differing length make the cards wait for each other: not counted")
    lines += [
        f"  {scaling.set_aside_bytes / GIB:.2f} GiB of each card are left to DDP's buckets and "
        "NCCL",
        f"  start: accelerate launch --multi_gpu --num_processes {gpus} -m lora_advisor.cli train "
        "PLAN ...",
    ]
    return "\n".join(line for line in lines if line)


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"
