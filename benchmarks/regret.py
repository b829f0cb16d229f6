"""Set a plan's choice beside an exhaustive measurement, and its models beside what they never saw.

    python benchmarks/regret.py FOLDER NAME... [--cache FILE] [--out FILE]

FOLDER holds what regret_on_card.sh wrote for each NAME (model-tokens): the plan, its probes, and
the measurement of its choice and of the drawn configurations in one run. A configuration that was
measured several times counts with the median of its speeds. Regret is what the choice lacks of the
best one measured. The models are fitted to the plan's own probes and asked for every configuration
that is not among them. How well they could do at best on that host is told by models fitted to five
sixths of the measurements, which are asked for the sixth. Writes results/regret.json, where cases
of other names stay as they are: the traces are those of the present step (`Stack.step`), so a case
is best judged by the program that measured it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from lora_advisor.advisor.arms import describe, short_form
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.models.throughput import Observation, ThroughputModel
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import Card, find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.plan import Plan, read_plan
from lora_advisor.probes.record import ProbeResult, read_records

#: Parts of the measurements, each asked of models that learnt from the others.
_PARTS = 6


def speeds(results: Sequence[ProbeResult]) -> dict[RunConfig, list[float]]:
    """Return all speeds measured of each configuration that ran."""
    found: dict[RunConfig, list[float]] = {}
    for result in results:
        if result.outcome == "ok" and result.tokens_per_s is not None:
            found.setdefault(result.config, []).append(result.tokens_per_s)
    return found


def regret(plan: Plan, results: Sequence[ProbeResult]) -> dict[str, Any]:
    """Return how the plan's choice stands among what was measured."""
    measured = {config: statistics.median(all_) for config, all_ in speeds(results).items()}
    choice = short_form(plan.chosen.config)
    best = max(measured, key=lambda config: measured[config])
    again = [all_ for all_ in speeds(results).values() if len(all_) > 1]
    tried = {result.config for result in results}
    return {
        "choice": describe(plan.chosen.config),
        "choice_tokens_per_s": round(measured[choice]),
        "best": describe(best),
        "best_tokens_per_s": round(measured[best]),
        "regret": round(1 - measured[choice] / measured[best], 4),
        "configurations": len(tried),
        "feasible": len(measured),
        "out_of_memory": sum(r.outcome == "out_of_memory" for r in results),
        "choice_out_of_memory": any(
            r.outcome == "out_of_memory" for r in results if r.config == choice
        ),
        "median_spread_of_repeats": round(
            statistics.median(max(all_) / min(all_) - 1 for all_ in again), 4
        )
        if again
        else None,
        "doubtful": sum(bool(r.doubts) for r in results),
        "probes": plan.probes,
        "probing_s": round(plan.probing_s, 1),
        "plan_wall_s": round(plan.wall_s, 1),
        "baseline_tokens_per_s": round(plan.baseline.tokens_per_s)
        if plan.baseline is not None and plan.baseline.tokens_per_s
        else None,
        "plan_tokens_per_s": round(plan.chosen.tokens_per_s or 0),
    }


def accuracy(
    plan: Plan, probes: Sequence[ProbeResult], results: Sequence[ProbeResult], cache: Path | None
) -> dict[str, Any]:
    """Return the error of the models after the plan's probes on what they never saw."""
    card = find_card("h100-80gb")
    predictor = Predictor.start(
        resolve_architecture(plan.spec.model), plan.machine, card,
        limit_bytes=plan.spec.vram_bytes - plan.spec.reserve_bytes,
        context_bytes=plan.context_bytes, cache=cache,
    )  # fmt: skip
    before = predictor
    predictor = predictor.learn(list(probes))
    at_best = _cross_validated(before, speeds(results), card)
    seen = {short_form(result.config) for result in probes}
    rows = []
    for config, all_ in speeds(results).items():
        if config in seen:
            continue
        row: dict[str, Any] = {"config": describe(config), "measured": statistics.median(all_)}
        for name, model in (("probed", predictor), ("traced", before)):
            time = model.time(config)
            assert time is not None
            interval = time.interval
            row[name] = config.tokens_per_step / interval.value
            row[f"{name}_low"] = config.tokens_per_step / interval.high
            row[f"{name}_high"] = config.tokens_per_step / interval.low
        row["at_best"] = at_best[config]
        rows.append(row)
    return {
        "held_out": len(rows),
        **{name: _errors(rows, name) for name in ("probed", "traced", "at_best")},
    } | {
        "rows": [{k: v if isinstance(v, str) else round(v, 1) for k, v in r.items()} for r in rows]
    }


def _cross_validated(
    predictor: Predictor, measured: Mapping[RunConfig, Sequence[float]], card: Card
) -> dict[RunConfig, float]:
    """Return tokens/s of each configuration as models say that learnt from most of the others."""
    seen = [
        Observation(
            config=config,
            work=predictor.work(config),
            step_s=config.tokens_per_step / statistics.median(all_),
        )
        for config, all_ in measured.items()
    ]
    random.Random(0).shuffle(seen)
    said = {}
    for part in range(_PARTS):
        rest = [o for place, o in enumerate(seen) if place % _PARTS != part]
        model = ThroughputModel.fit(card, rest)
        for o in seen[part::_PARTS]:
            said[o.config] = o.config.tokens_per_step / model.time(o.config, o.work).value
    return said


def _errors(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    errors = [row[name] / row["measured"] - 1 for row in rows]
    rank = spearmanr([row[name] for row in rows], [row["measured"] for row in rows]).statistic
    figures = {
        "median_abs_error": round(statistics.median(map(abs, errors)), 4),
        "median_error": round(statistics.median(errors), 4),
        "worst_error": round(max(errors, key=lambda e: abs(math.log(1 + e))), 4),
        "spearman": round(float(rank), 4),
    }
    if f"{name}_low" in rows[0]:
        within = [r[f"{name}_low"] <= r["measured"] <= r[f"{name}_high"] for r in rows]
        figures["share_within_interval"] = round(sum(within) / len(rows), 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--cache", type=Path, default=None, help="file that keeps traces")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/regret.json"))
    arguments = parser.parse_args()
    cases = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {}
    for name in arguments.names:
        plan = read_plan(arguments.folder / f"plan-{name}.json")
        probes = read_records(arguments.folder / f"probes-{name}.jsonl")
        results = read_records(arguments.folder / f"all-{name}.jsonl")
        cases[name] = {
            **regret(plan, results),
            "machine": plan.machine.name,
            "host": plan.machine.host,
            "torch": plan.stack.torch,
            "step": plan.stack.step,
            "date": results[0].started_at,
            "models": accuracy(plan, probes, results, arguments.cache),
        }
        shown = {**cases[name], "models": {**cases[name]["models"], "rows": "..."}}
        print(name, json.dumps(shown, indent=1))
    arguments.out.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
