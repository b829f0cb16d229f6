"""Make the example report of the documentation: docs/report-example.html and its picture.

    python benchmarks/report_example.py

The plan is the one that an H100 held to 8 GiB left in tests/recordings/regret; it knows what was
expected of each of its probes. The page's map is traced: minutes where it is not cached.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_advisor.cli import main as lora_advisor

ROOT = Path(__file__).resolve().parent.parent
PLAN = ROOT / "tests/recordings/regret/plan-qwen2.5-1.5b-1024.json"
DOCS = ROOT / "docs"


def main() -> int:
    page, picture = DOCS / "report-example.html", DOCS / "report-example.png"
    return lora_advisor(["report", str(PLAN), "--out", str(page), "--png", str(picture)])


if __name__ == "__main__":
    sys.exit(main())
