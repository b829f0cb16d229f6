"""Compare predicted tokens a second with an H100's timings; write results/throughput_accuracy.json.

    python benchmarks/throughput_accuracy.py RECORDS.jsonl [--gpu h100-80gb] [--cache FILE]

RECORDS as for memory_accuracy.py. Nothing is fitted to the rows here; some of the roofline's shares
were chosen on rows of the H100, which its error on that card therefore flatters. A timing is clean
when its steps agree: their middle half, without the first two, lies within 10 % of the median.
Configurations measured more than once are one point, their median, if the medians agree as well.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig

#: Steps at the start that do not count: kernels are loaded and compiled in them.
WARM_UP = 2
#: Largest share of the median that the middle half of a clean row's steps spans.
AGREE = 0.10


def timings(file: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return one point a configuration, and how many rows are left out by reason."""
    left_out: collections.Counter[str] = collections.Counter()
    points: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines()):
        data = json.loads(line)
        measured = data.get("measured", {})
        config = RunConfig.from_json(data["config"])
        if not measured.get("step_s"):
            ran = measured.get("status") == "ok"
            left_out["not timed" if ran else "did not run"] += 1
            continue
        if not config.is_buildable:
            left_out[f"another engine: {config.trainer}"] += 1
            continue
        key = json.dumps([data["config"], data["hf_config"], data.get("cap_gib")], sort_keys=True)
        point = points.setdefault(key, {"config": config, "hf_config": data["hf_config"]})
        point.setdefault("rows", []).append(number)
        point.setdefault("steps", []).append(measured["step_s"])
        point.setdefault("jitter", []).append(jitter(measured.get("step_times_s") or []))
    for point in points.values():
        middle = statistics.median(point["steps"])
        apart = (max(point["steps"]) - min(point["steps"])) / middle
        point["measured_s"] = middle
        point["clean"] = apart <= AGREE and max(point["jitter"]) <= AGREE
    return list(points.values()), dict(left_out)


def jitter(steps: Sequence[float]) -> float:
    """Return the span of the middle half of a row's steps over their median."""
    counted = steps[WARM_UP:]
    if len(counted) < 4:
        return math.inf
    low, middle, high = statistics.quantiles(counted, n=4)
    return (high - low) / middle


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return rank correlation and errors of some points."""
    ratios = [row["ratio"] for row in rows]
    rank = spearmanr([row["measured"] for row in rows], [row["predicted"] for row in rows])
    return {
        "points": len(rows),
        "spearman": round(float(rank.statistic), 3),
        "median_ratio": round(statistics.median(ratios), 3),
        "median_abs_log_error": round(statistics.median(abs(math.log(r)) for r in ratios), 3),
        "worst_ratio": max(ratios, key=lambda ratio: abs(math.log(ratio))),
        "share_within_interval": round(
            sum(row["low"] <= row["measured"] <= row["high"] for row in rows) / len(rows), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--cache", type=Path, help="file that keeps traces between runs")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/throughput_accuracy.json")
    )
    arguments = parser.parse_args()
    card = find_card(arguments.gpu)
    points, left_out = timings(arguments.records)
    rows = []
    predictors: dict[str, Predictor] = {}
    for point in points:
        config = point["config"]
        architecture = from_hf_config("row", point["hf_config"])
        key = architecture.fingerprint
        if key not in predictors:
            predictors[key] = Predictor.start(
                architecture,
                card.machine(),
                card,
                limit_bytes=card.memory_bytes,
                cache=arguments.cache,
            )
        speed = predictors[key].predict(config).tokens_per_s
        assert speed is not None
        measured = config.tokens_per_step / point["measured_s"]
        rows.append(
            {
                "rows": point["rows"],
                "clean": point["clean"],
                "jitter": round(max(point["jitter"]), 3),
                "trainer": config.trainer,
                "method": config.method,
                "kernels": config.kernels,
                "compile": config.compile,
                "measured": round(measured, 1),
                "predicted": round(speed.value, 1),
                "low": round(speed.low, 1),
                "high": round(speed.high, 1),
                "ratio": round(speed.value / measured, 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "card": card.key,
        "rows_left_out": left_out,
        "summary": {
            "clean": summary([row for row in rows if row["clean"]]),
            "all": summary(rows),
        },
        "points": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "points"}, indent=1))


if __name__ == "__main__":
    main()
