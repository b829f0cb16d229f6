"""Make the example reports of the documentation, each a page and a picture.

    python benchmarks/report_example.py

docs/report-example is of a plan, the one that an H100 held to 8 GiB left in
tests/recordings/regret; it knows what was expected of each of its probes. docs/report-example-run
is of a training on such a card (`train_on_card.py`), from what its folder held, weights, tokenizer
and data left out. The pages' maps are traced: minutes where they are not cached.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_advisor.cli import main as lora_advisor

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    "report-example": ROOT / "tests/recordings/regret/plan-qwen2.5-1.5b-1024.json",
    "report-example-run": ROOT / "benchmarks/results/run-smollm2-gsm8k-h100-2026-11-27",
}
DOCS = ROOT / "docs"


def main() -> int:
    ends = []
    for name, source in EXAMPLES.items():
        page, picture = DOCS / f"{name}.html", DOCS / f"{name}.png"
        words = ["report", str(source), "--out", str(page), "--png", str(picture)]
        ends.append(lora_advisor(words))
    return max(ends)


if __name__ == "__main__":
    sys.exit(main())
