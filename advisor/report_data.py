"""What the user's data comes to, as text for people: lengths of its rows, and batchings."""

from __future__ import annotations

from tabulate import tabulate

from lora_advisor.advisor.report import interval_text, time_text
from lora_advisor.probes.batching import Batching, batching_of
from lora_advisor.probes.plan import DataSummary, Plan

#: Shares of the rows whose length is told.
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
#: Bars of the chart, and characters of the longest.
_BARS, _WIDTH = 8, 40
#: What the user gives for each batching.
_OPTIONS = {"random": "", "grouped": " (--group-by-length)", "packed": " (--packing)"}


def percent(share: float) -> str:
    """Write a share with two digits, or as a whole number from 10 % on."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def lengths_text(data: DataSummary) -> str:
    """Write how long the rows are: quantiles, what is cut, and a chart."""
    told = ", ".join(
        f"{100 * share:g} % {length:,}"
        for share, length in zip(_SHARES, _quantiles(data), strict=True)
    )
    name = "pair" if data.sequences > 1 else "row"
    cut = _cut(data, name)
    chart = tabulate(
        _bars(data),
        headers=["tokens", f"{name}s", ""],
        tablefmt="plain",
        colalign=("right", "right", "left"),
        disable_numparse=True,
    )
    longest = data.length_counts[-1][0]
    of = "the longer sequence of a pair" if data.sequences > 1 else "a row"
    return f"tokens of {of} (quantiles): {told}, longest {longest:,}; {cut}\n{chart}"


def _cut(data: DataSummary, name: str) -> str:
    """Write which share of the rows was too long, and what became of them."""
    whole = data.rows - data.pieces + data.split + data.long_dropped
    for count, what in (
        (data.truncated, "are cut"),
        (data.split, "are split"),
        (data.long_dropped, "are left out, too long"),
    ):
        if count:
            return f"{percent(count / whole)} of the {name}s {what}"
    return f"no {name} is cut"


def _quantiles(data: DataSummary) -> list[int]:
    """Return the smallest length that covers each of the shares."""
    found: list[int] = []
    seen = 0
    for length, rows in data.length_counts:
        seen += rows
        while len(found) < len(_SHARES) and seen >= _SHARES[len(found)] * data.rows:
            found.append(length)
    return found


def _bars(data: DataSummary) -> list[tuple[str, str, str]]:
    """Return a line of the chart for each range of lengths."""
    width = -(-data.length_counts[-1][0] // _BARS)
    rows = [0] * -(-data.length_counts[-1][0] // width)
    for length, count in data.length_counts:
        rows[(length - 1) // width] += count
    return [
        (
            f"{index * width + 1:,} to {(index + 1) * width:,}",
            f"{count:,}",
            "#" * -(-_WIDTH * count // max(rows)),  # whatever there is shows
        )
        for index, count in enumerate(rows)
    ]


def data_text(plan: Plan) -> str | None:
    """Write what the data comes to under the plan; None for a plan without lengths."""
    if plan.data is None or not plan.data.length_counts:
        return None
    parts = [lengths_text(plan.data)]
    if plan.batchings:
        headers = ["batches", "tokens/s without padding", "padding", "steps", "one epoch"]
        parts.append(tabulate(batching_rows(plan), headers=headers, disable_numparse=True))
        if plan.batchings[-1].name == "packed":
            parts.append(_packed_text(plan))
    return "\n\n".join(parts)


def _packed_text(plan: Plan) -> str:
    """Say what packing does to a step, and what effective batch would keep it as it is."""
    rows, packed = plan.batchings[0].rows, plan.batchings[-1].rows
    if rows is None or packed is None:
        return "a packed sequence holds several rows, so its steps are fewer and larger"
    text = f"a packed sequence holds {rows / packed:.1f} rows on average: fewer, larger steps"
    batch = max(1, round(plan.spec.effective_batch * packed / rows))
    if plan.chosen.config.packing or batch == plan.spec.effective_batch:
        return text
    return f"{text}; with --packing --batch {batch} a step has about as many rows as it has now"


def batching_rows(plan: Plan) -> list[list[str]]:
    """Return a row of words for each way to make micro-batches."""
    chosen = batching_of(plan.chosen.config)
    return [_row(batching, chosen) for batching in plan.batchings]


def _row(batching: Batching, chosen: str) -> list[str]:
    planned = " (planned)" if batching.name == chosen else _OPTIONS[batching.name]
    return [
        batching.name + planned,
        interval_text(batching.tokens_per_s),
        f"{100 * batching.padding_share:.1f} %",
        f"{batching.optimizer_steps:,}",
        time_text(batching.seconds),
    ]
