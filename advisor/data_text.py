"""What is in a data set, as text for people."""

from __future__ import annotations

from collections.abc import Sequence

import click
from tabulate import tabulate

from lora_advisor.advisor.data_cuttings import ACCUMULATION, MICRO_BATCH, Cutting
from lora_advisor.advisor.data_inspect import DataReport, Sample
from lora_advisor.advisor.report_data import percent

#: Characters of a part of a sample that are shown at most; the middle is left out.
_SHOWN = 600
#: Share of the tokens that may be lost before another way is named.
_MUCH = 0.05
#: Files of a folder that are named at most.
_FILES = 3


def inspect_text(report: DataReport, *, colours: bool) -> str:
    """Write a report.

    Args:
        report: What was found.
        colours: Whether the reader's terminal shows them: masked text is dim, else in brackets.
    """
    facts = tabulate(_facts(report), tablefmt="plain", disable_numparse=True)
    parts = [facts, _table(report)]
    if report.samples:
        parts.append(_legend(report, colours=colours))
        parts += [sample_text(sample, colours=colours) for sample in report.samples]
    return "\n\n".join(part for part in parts if part)


def _facts(report: DataReport) -> list[tuple[str, str]]:
    examples = report.examples
    by = ", ".join(f"`{name}`" for name in examples.columns)
    unused = ", ".join(f"`{name}`" for name in examples.unused)
    rows = [
        ("data", f"{_files(report)}: {examples.kind}, {len(examples.rows):,} rows"),
        ("shape", f"{examples.shape}, by {by}" + (f"; not read: {unused}" if unused else "")),
        ("model", _model(report)),
        (report.unit, _lengths(report)),
    ]
    if report.unit == "characters":
        rows.append(("tokens", "unknown: give --model as a folder or a hub id with a tokenizer"))
    found = report.repeats
    rows += [
        ("duplicates", _found(found.rows, "repeats an earlier one", "repeat earlier ones",
                              found.row_places)),
        ("differing", _found(found.prompts, "has several answers", "have several answers",
                             found.prompt_places, what="prompt")),
        ("empty", _found(found.empty, "has an empty answer", "have empty answers",
                         found.empty_places)),
    ]  # fmt: skip
    chosen = [cutting for cutting in report.cuttings if cutting.seq_len == report.seq_len]
    rows += [("long rows", _cut(cutting, report.long_rows)) for cutting in chosen]
    return rows


def _files(report: DataReport) -> str:
    files = report.examples.files
    if len(files) == 1:
        return files[0]
    named = ", ".join(file.replace("\\", "/").rsplit("/", 1)[-1] for file in files[:_FILES])
    more = f" and {len(files) - _FILES} more" if len(files) > _FILES else ""
    return f"{report.examples.path}: {named}{more}"


def _model(report: DataReport) -> str:
    if report.chat_template is None:
        return f"{report.model}: only figures, no tokenizer"
    text = f"{report.model}, with{'' if report.chat_template else 'out'} a chat template"
    if not report.unseen:
        return text
    left_out = " and ".join(f"`{name}`" for name in report.unseen)
    return f"{text}; {left_out} of the rows it does not show to the model"


def _lengths(report: DataReport) -> str:
    total = sum(report.lengths)
    shares = ", ".join(f"{100 * q:g} % {n:,}" for q, n in report.quantiles.items() if q != 0.5)
    told = (
        f"{total:,}; of a row: shortest {min(report.lengths):,}, median "
        f"{report.quantiles[0.5]:,}, {shares}, longest {max(report.lengths):,}"
    )
    if report.trained_tokens is None or not total:
        return told
    return f"{told}; {100 * report.trained_tokens / total:.0f} % of them trained"


def _found(count: int, one: str, many: str, places: Sequence[str], *, what: str = "row") -> str:
    if not count:
        return f"no {what} {one}"
    more = " and more" if count > len(places) else ""
    number = f"1 {what} {one}" if count == 1 else f"{count:,} {what}s {many}"
    return f"{number} ({', '.join(places)}{more})"


def _cut(cutting: Cutting, long_rows: str) -> str:
    """Write what becomes of long rows at the sequence length of the training."""
    done = {
        "truncate": f"{cutting.truncated:,} truncated",
        "split": f"{cutting.split:,} split into {cutting.pieces:,} rows",
        "drop": f"{cutting.long_dropped:,} dropped",
    }[long_rows]
    whole = cutting.tokens + cutting.lost_tokens
    text = f"at {cutting.seq_len:,} tokens {done}, {_share(cutting.lost_tokens, whole)} tokens lost"
    if long_rows != "split" and cutting.lost_tokens > _MUCH * whole:
        text += " (--long-rows split keeps more of them)"
    if cutting.untrained:
        text += f"; {cutting.untrained:,} left out: nothing of an answer is in them"
    if cutting.untrained_pieces:
        text += f"; {cutting.untrained_pieces:,} pieces left out: nothing in them is trained"
    return f"{text}; {cutting.rows:,} rows to train on"


def _table(report: DataReport) -> str:
    """Write what sequence lengths cut and cost, one a line."""
    if not report.cuttings:
        return ""
    chosen = next(c for c in report.cuttings if c.seq_len == report.seq_len)
    table = tabulate(
        [_line(cutting, chosen, report) for cutting in report.cuttings],
        headers=["tokens in a row", "longer rows", "tokens lost", "padding: random", "grouped",
                 "packed", "an epoch computes", ""],
        colalign=("right",) * 7 + ("left",),
        disable_numparse=True,
    )  # fmt: skip
    return (
        f"{table}\npadding of micro-batches of {MICRO_BATCH}, {ACCUMULATION} in a step; an epoch "
        "in random order, padding included"
    )


def _line(cutting: Cutting, chosen: Cutting, report: DataReport) -> list[str]:
    marks = []
    if cutting.seq_len == report.planned:
        marks.append("what `plan --data` takes")
    if cutting.seq_len == report.seq_len != report.planned:
        marks.append("--seq")
    whole = cutting.tokens + cutting.lost_tokens
    padding = [
        f"{100 * cutting.padding[name]:.1f} %" if name in cutting.padding else "no row left"
        for name in ("random", "grouped", "packed")
    ]
    return [
        f"{cutting.seq_len:,}",
        _share(cutting.long_rows, len(report.lengths)),
        _share(cutting.lost_tokens, whole),
        *padding,
        _cost(cutting.computed_tokens, chosen.computed_tokens),
        f"<- {', '.join(marks)}" if marks else "",
    ]


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part / whole)})" if part and whole else "0"


def _cost(tokens: int | None, chosen: int | None) -> str:
    if tokens is None:
        return "nothing"
    return f"{tokens:,}" + (f" ({tokens / chosen:.2f}x)" if chosen else "")


def _legend(report: DataReport, *, colours: bool) -> str:
    if report.unit == "characters":
        return "samples, as they are read; how the model would see them needs its tokenizer"
    how = "dim" if colours else "in [[ ]]"
    return (
        f"samples, as the model sees them; what stands {how} is masked: read, but not learnt to be "
        "said"
    )


def sample_text(sample: Sample, *, colours: bool) -> str:
    """Write a sample, its masked parts dim, or in brackets where there are no colours."""
    tokens = "" if sample.tokens is None else f", {sample.tokens:,} tokens"
    head = f"--- {sample.place}{tokens}{f', {sample.cut}' if sample.cut else ''}"
    body = []
    for text, trained in sample.parts:
        shown = _shortened(_visible(text))
        if trained is False:
            shown = click.style(shown, dim=True) if colours else f"[[{shown}]]"
        body.append(shown)
    return f"{head}\n{''.join(body).rstrip()}"


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} ...({len(text) - 2 * half:,} characters)... {text[-half:]}"


def _visible(text: str) -> str:
    """Write out what would move the cursor or set the terminal's colours."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )
