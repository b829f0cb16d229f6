"""Effects as text: ratios with intervals, differences in GiB, one table of all comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from lora_advisor.advisor.bench_study import Study
from lora_advisor.advisor.effects import Difference, Effect, Estimate
from lora_advisor.probes.machine import GIB

READING = """\
x1.02 (0.99 to 1.05): 1.02 times as much, with its 95 % interval. "everything else equal" compares \
pairs of runs that differ in nothing else, in the conditions in which both ran; "from ... to" is \
their range, wide where the effect depends on the rest. "by the model" takes all runs at once and \
weighs all levels of the other factors alike. GiB: mean difference, with its range where it has \
one."""


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    markdown: bool,
    left: int = 1,
) -> str:
    """Write a table for a report or for a terminal; numbers stand right, words left.

    Args:
        headers: Names of the columns.
        rows: Their texts.
        markdown: Whether it is for a report.
        left: How many columns hold words; the others hold numbers.
    """
    form = "github" if markdown else "simple"
    aligned = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True, colalign=aligned)


def ratio_text(ratio: Estimate | None) -> str:
    """Write a ratio with its interval."""
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"x{ratio.value:.2f}"
    places = 3 if ratio.high - ratio.low < 0.02 * ratio.value else 2
    return f"x{ratio.value:.{places}f} ({ratio.low:.{places}f} to {ratio.high:.{places}f})"


def effect_name(effect: Effect) -> str:
    """Write what is compared with what."""
    return f"{effect.level} against {effect.against}"


def _difference_text(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    low, high = difference.smallest / GIB, difference.largest / GIB
    text = f"{difference.mean / GIB:+.2f}"
    return text if high - low < 0.01 else f"{text} ({low:+.2f} to {high:+.2f})"


def effects_table(study: Study, *, markdown: bool) -> str:
    """Write what each level does against each before it."""
    energy = any("joules_per_token" in effect.ratios for effect in study.effects)
    kinds = [k for k in ("allocated", "reserved", "process")
             if any(f"{k}_bytes" in effect.differences for effect in study.effects)]  # fmt: skip
    headers = ["everything else equal", "tokens/s", "from ... to", "by the model"]
    headers += [f"{kind} GiB" for kind in kinds] + ["joules/token"] * energy + ["conditions"]
    rows = []
    for effect in study.effects:
        speed = effect.ratios["tokens_per_s"]
        row = [effect_name(effect), ratio_text(speed)]
        row.append(f"x{speed.smallest:.2f} to x{speed.largest:.2f}")
        row.append(ratio_text(effect.modelled))
        row += [_difference_text(effect.differences.get(f"{kind}_bytes")) for kind in kinds]
        if energy:
            row.append(ratio_text(effect.ratios.get("joules_per_token")))
        row.append(f"{effect.conditions} of {effect.of_conditions}")
        rows.append(row)
    return table(headers, rows, markdown=markdown)


def order_text(effects: Sequence[Effect]) -> str:
    """Write how far each factor moves the speed, the strongest first."""
    moves: dict[str, float] = {}
    for effect in effects:
        ratio = effect.ratios["tokens_per_s"].value
        moves[effect.factor] = max(moves.get(effect.factor, 1.0), ratio, 1 / ratio)
    ordered = sorted(moves.items(), key=lambda item: -item[1])
    return "Between two levels tokens/s differ most by: " + ", ".join(
        f"{factor} x{move:.2f}" for factor, move in ordered
    )
