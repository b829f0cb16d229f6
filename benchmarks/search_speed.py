"""Time the search alone over cached models and write results/search_speed.json.

    python benchmarks/search_speed.py [--trials 1000] [--cache FILE]

The first search fills the cache (its time is given too); the second one, with the same seed, starts
from nothing but the file. Nothing is probed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.search import SearchResult, search
from lora_advisor.advisor.space import build_space
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.machine import GIB, detect_stack
from lora_advisor.probes.spec import Spec


def run(spec: Spec, cache: Path, free_trials: int) -> tuple[SearchResult, float]:
    """Search with new models over a cache; return the result and its seconds."""
    card = find_card(spec.gpu or "rtx-4060")
    space = build_space(spec, card.machine(), detect_stack(), card)
    predictor = Predictor.start(
        resolve_architecture(spec.model), card.machine(), card,
        limit_bytes=spec.vram_bytes - spec.reserve_bytes, cache=cache,
    )  # fmt: skip
    began = time.monotonic()
    found = search(
        space, predictor, objective="tokens_per_s", seed=spec.seed, free_trials=free_trials
    )
    seconds = time.monotonic() - began
    predictor.store.close()
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--fix", default="", help="knob=value, with commas: less to fill")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search_speed.json"))
    arguments = parser.parse_args()
    spec = Spec(
        model="qwen2.5-1.5b", vram_bytes=8 * GIB, reserve_bytes=GIB // 4, effective_batch=24,
        gpu="rtx-4060", fixed=dict(part.split("=") for part in arguments.fix.split(",") if part),
    )  # fmt: skip
    with TemporaryDirectory() as name:
        cache = arguments.cache or Path(name) / "traces.sqlite3"
        planned, _ = run(spec, cache, 0)
        free = max(0, arguments.trials - planned.trials)
        _, first_s = run(spec, cache, free)
        found, seconds = run(spec, cache, free)
    summary = {
        "trials": found.trials,
        "seconds": round(seconds, 2),
        "filling_the_cache_s": round(first_s, 1),
        "predicted": len(found.feasible) + len(found.infeasible),
        "cores": os.cpu_count(),
        "fixed": dict(spec.fixed),
    }
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
