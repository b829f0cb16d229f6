"""Make the example reports of the documentation: docs/report-example.html and its picture.

    python benchmarks/report_example.py [--run FOLDER]

The plan and its probes are those that an H100 held to 8 GiB left in tests/recordings/regret; what
was expected of each probe is computed again. With `--run` the folder of a training becomes
docs/report-training-example.html. The one there is of SmolLM2-135M-Instruct on GSM8K, on one thread
of a CPU that was busier while it trained than while it was planned for, which its speeds show:

    lora-advisor plan --device cpu --vram 6 --model ./SmolLM2-135M-Instruct \\
        --data gsm8k-240.jsonl --seq 160 --batch 4 --method lora --precision fp32 --out plan.json
    lora-advisor train plan.json --output first --learning-rate 1e-3 --max-steps 12 \\
        --holdout 0.04 --eval-steps 6 --check-rows 0

The first page's map is traced: minutes where it is not cached.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_advisor.cli import main as lora_advisor

ROOT = Path(__file__).resolve().parent.parent
RECORDINGS, DOCS = ROOT / "tests" / "recordings" / "regret", ROOT / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="Folder of a training.")
    arguments = parser.parse_args()
    name = "qwen2.5-1.5b-1024-peft.json"
    words = [
        "report", RECORDINGS / f"plan-{name}", "--record", RECORDINGS / f"probes-{name}l",
        "--out", DOCS / "report-example.html", "--png", DOCS / "report-example.png",
    ]  # fmt: skip
    code = lora_advisor([str(word) for word in words])
    if code or arguments.run is None:
        return code
    words = ["report", arguments.run, "--no-map", "--out", DOCS / "report-training-example.html"]
    return lora_advisor([str(word) for word in words])


if __name__ == "__main__":
    sys.exit(main())
