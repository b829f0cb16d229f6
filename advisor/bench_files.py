"""The files of a bench: a CSV with one row a run, one JSON document, the report, the picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from lora_advisor.advisor import paper
from lora_advisor.advisor.bench import Bench
from lora_advisor.advisor.bench_design import FACTORS, Cell
from lora_advisor.advisor.bench_study import Study
from lora_advisor.advisor.report_bench import fixed_of, report_text
from lora_advisor.probes.errors import OutputError
from lora_advisor.probes.plan import plain_json

#: Raised when the meaning of a field of the JSON document or of a column changes.
FORMAT = 1

RECORD, CSV, JSON, REPORT, PICTURE = (
    "runs.jsonl", "runs.csv", "bench.json", "report.md", "effects.png",
)  # fmt: skip
FILES = (RECORD, CSV, JSON, REPORT, PICTURE)
_PICTURE_NOTE = "everything else equal: mean, 95 % interval (line), range of the conditions (band)"

_MEASURED = (
    "tokens_per_s", "joules_per_token", "allocated_bytes", "reserved_bytes", "process_bytes",
    "context_bytes", "model_bytes", "step_s", "power_w", "energy_source", "sm_clock_mhz",
    "sm_clock_max_mhz", "temperature_c", "throttled", "unstable", "trainable", "alloc_retries",
    "attention_backend", "contended", "started_at",
)  # fmt: skip
_MACHINE = ("name", "memory_bytes", "driver", "capability", "host")


def write_files(study: Study, folder: Path) -> None:
    """Write all files of a bench but its record, which is there.

    Raises:
        OutputError: A file cannot be written.
    """
    picture = _draw(study, folder / PICTURE)
    texts = {
        CSV: csv_text(study.bench),
        JSON: json.dumps(document(study), indent=2) + "\n",
        REPORT: report_text(study, picture=picture),
    }
    for name, text in texts.items():
        try:
            (folder / name).write_text(text, "utf-8", newline="")
        except OSError as error:
            raise OutputError(
                f"`{folder / name}` must be a place that can be written, but {error.strerror}."
            ) from None


def _draw(study: Study, path: Path) -> str | None:
    """Draw the effects and return the picture's name; None where there is none to draw."""
    if not study.effects:
        return None
    from lora_advisor.advisor.bench_picture import draw_effects

    where = f"{study.bench.architecture.name} on {study.bench.machine.name}"
    draw_effects(study.effects, path, title=f"{where}\n{_PICTURE_NOTE}")
    return path.name


def csv_text(bench: Bench) -> str:
    """Return one row a run, in their order, and one for each cell that cannot run.

    Every row names the card and the versions, so that files of several cards can be put together.
    """
    rows = []
    for number, run in enumerate(bench.runs, start=1):
        measured = {name: _plain(getattr(run.result, name)) for name in _MEASURED}
        speed = run.result.tokens_per_s
        rows.append(
            {
                **_cell_columns(bench, run.cell),
                "order": number,
                "repeat": run.repeat,
                "outcome": run.ending,
                "detail": run.result.detail,
                "s_per_10k_tokens": 1e4 / speed if speed else None,
                **measured,
            }
        )
    rows += [
        {**_cell_columns(bench, cell), "outcome": "not_possible", "detail": cell.reason}
        for cell in bench.design.cells
        if cell.config is None
    ]
    shared = _shared(bench)
    columns = [*_cell_columns(bench, bench.design.cells[0]), "order", "repeat", "outcome",
               "tokens_per_s", "s_per_10k_tokens", *_MEASURED[1:], "detail", *shared]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **shared} for row in rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return " and ".join(value) if isinstance(value, tuple) else value


def _cell_columns(bench: Bench, cell: Cell) -> dict[str, Any]:
    columns: dict[str, Any] = {"model": bench.architecture.name}
    columns.update(zip(FACTORS, cell.levels, strict=True))
    size = columns.pop("size")
    columns["micro_batch"], columns["seq_len"] = size.split("x")
    return columns


def _shared(bench: Bench) -> dict[str, Any]:
    """Return what all runs share: the fixed knobs, the card, the versions."""
    base = bench.design.base
    shared: dict[str, Any] = {name: getattr(base, name) for name in fixed_of(base)}
    if base.lora is not None:
        lora = base.lora.to_json()
        targets = lora.pop("targets")
        shared.update({"rank": lora["r"], "alpha": lora["alpha"], "dropout": lora["dropout"]})
        shared["targets"] = targets if isinstance(targets, str) else "+".join(targets)
    shared["cap_bytes"] = bench.cap_bytes
    machine = bench.machine.to_json()
    shared.update({f"device_{name}": machine[name] for name in _MACHINE})
    return {**shared, **bench.stack.to_json()}


def document(study: Study) -> dict[str, Any]:
    """Return the whole bench as one JSON document."""
    bench, model = study.bench, study.model
    dates = sorted(run.result.started_at for run in bench.runs if run.result.started_at)
    return {
        "format": FORMAT,
        "kind": "lora-advisor bench",
        "model": bench.architecture.name,
        "hf_config": dict(bench.architecture.hf_config),
        "machine": bench.machine.to_json(),
        "stack": bench.stack.to_json(),
        "first_run": dates[0] if dates else None,
        "last_run": dates[-1] if dates else None,
        "seed": bench.design.seed,
        "repeats": bench.design.repeats,
        "missing": bench.missing,
        "factors": {name: list(levels) for name, levels in bench.design.factors.items()},
        "fixed": _shared(bench),
        "cells": [_cell_json(bench, cell) for cell in bench.design.cells],
        "effects": plain_json(study.effects),
        "spread_of_repeats": study.spread,
        "model_of_factors": None
        if model is None
        else {
            "terms": plain_json(model.terms),
            "left_out": plain_json(model.left_out),
            "freedom": model.freedom,
            "residual": model.residual,
        },
        "dependences": plain_json(study.dependences),
        "paper": {
            "source": paper.SOURCE,
            "rows": plain_json(paper.RUNS),
            "ways": plain_json(study.ways),
        },
    }


def _cell_json(bench: Bench, cell: Cell) -> dict[str, Any]:
    names = ("tokens_per_s", "joules_per_token", "allocated_bytes", "reserved_bytes",
             "process_bytes", "context_bytes")  # fmt: skip
    runs = [run.result for run in bench.runs_of(cell) if run.repeat is not None]
    return {
        **dict(zip(FACTORS, cell.levels, strict=True)),
        "state": bench.state_of(cell),
        "reason": cell.reason,
        "runs": len(runs),
        **{name: [getattr(result, name) for result in runs] for name in names},
    }
