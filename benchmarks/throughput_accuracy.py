"""Compare the roofline's step times with measured ones and write results/throughput_accuracy.json.

    python benchmarks/throughput_accuracy.py RECORDS.jsonl [--gpu h100-80gb]

RECORDS as for trace_accuracy.py. Nothing is fitted to the rows here; the roofline's shares were
chosen on rows of the H100, which its error on that card therefore flatters.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from scipy.stats import spearmanr

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/throughput_accuracy.json")
    )
    arguments = parser.parse_args()
    card = find_card(arguments.gpu)
    rows = []
    for number, line in enumerate(arguments.records.read_text("utf-8").splitlines()):
        data = json.loads(line)
        config = RunConfig.from_json(data["config"])
        measured = data.get("measured", {}).get("step_s")
        if not config.is_buildable or not measured:
            continue
        architecture = from_hf_config("row", data["hf_config"])
        predictor = Predictor.start(
            architecture,
            card.machine(),
            card,
            limit_bytes=card.memory_bytes,
            precision=config.precision,
        )
        step = predictor.predict(config).step_s
        assert step is not None
        times = {"predicted_s": step.value, "low_s": step.low, "high_s": step.high}
        rows.append({"row": number, "measured_s": measured, "compile": config.compile, **times})
        print(rows[-1], flush=True)
    speeds = [row["measured_s"] for row in rows]
    summary = {
        "card": card.key,
        "steps": len(rows),
        "spearman_step_time": round(
            float(spearmanr(speeds, [r["predicted_s"] for r in rows]).statistic), 3
        ),
        "median_abs_log_error": round(
            statistics.median(abs(math.log(r["predicted_s"] / r["measured_s"])) for r in rows), 3
        ),
        "share_within_interval": round(
            sum(r["low_s"] <= r["measured_s"] <= r["high_s"] for r in rows) / len(rows), 3
        ),
    }
    arguments.out.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
