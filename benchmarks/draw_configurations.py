"""Draw configurations that may fit, spread over the space of a plan, to be measured exhaustively.

    python benchmarks/draw_configurations.py --model NAME --seq TOKENS --count 60 --seed SEED
        --out CASES.jsonl [--cache FILE] [--context BYTES]

Every arm (method, kernels, compilation, CUDA graph, checkpointing) is drawn from in turn, without
replacement; micro-batch, optimizer, precision and allocator are drawn within it, among the sizes
that the trace does not exclude. No speed, predicted or measured, decides what is drawn.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from lora_advisor.advisor.arms import short_form
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.space import Space, build_space
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB, detect_stack
from lora_advisor.probes.spec import Spec

#: Where the trace is asked, the knobs that move memory little stand at these.
PLAIN = {"optimizer": "adamw_torch_fused", "precision": "bf16", "allocator": "default"}
CHECKPOINTING = ("full", "every_2", "off")


def by_arm(space: Space, predictor: Predictor) -> dict[tuple, list[RunConfig]]:
    """Return what may fit, by arm; beyond a micro-batch that does not fit no larger one does."""
    arms: dict[tuple, list[RunConfig]] = {}
    too_large: dict[tuple, int] = {}
    for config in sorted(space.configs(), key=lambda config: config.micro_batch):
        arm = (
            config.method, config.kernels, config.compile, config.cuda_graph, config.checkpointing,
        )  # fmt: skip
        if config.checkpointing not in CHECKPOINTING or arm in too_large:
            continue
        if predictor.predict(config.replace(**PLAIN)).verdict == "does not fit":
            too_large[arm] = config.micro_batch
        else:
            arms.setdefault(arm, []).append(config)
    return arms


def draw(arms: dict[tuple, list[RunConfig]], count: int, seed: int) -> list[RunConfig]:
    """Return `count` configurations, one of each arm in turn."""
    generator = random.Random(seed)
    waiting = {arm: generator.sample(configs, len(configs)) for arm, configs in arms.items()}
    drawn: list[RunConfig] = []
    while len(drawn) < count and any(waiting.values()):
        for configs in waiting.values():
            if configs and len(drawn) < count:
                drawn.append(configs.pop())
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--vram", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--context", type=int, default=None, help="bytes of the CUDA context")
    parser.add_argument("--cache", type=Path, default=None, help="file that keeps traces")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    card = find_card(arguments.gpu)
    spec = Spec(
        model=arguments.model, vram_bytes=int(arguments.vram * GIB), reserve_bytes=GIB // 4,
        seq_len=arguments.seq, effective_batch=arguments.batch, device="cuda",
    )  # fmt: skip
    machine = card.machine()
    space = build_space(spec, _here(machine), detect_stack(), card)
    predictor = Predictor.start(
        resolve_architecture(spec.model), machine, card,
        limit_bytes=spec.vram_bytes - spec.reserve_bytes, context_bytes=arguments.context,
        cache=arguments.cache,
    )  # fmt: skip
    arms = by_arm(space, predictor)
    drawn = draw(arms, arguments.count, arguments.seed)
    with arguments.out.open("w", encoding="utf-8") as out:
        for config in drawn:
            out.write(json.dumps(short_form(config).to_json()) + "\n")
    print(len(drawn), "of", sum(map(len, arms.values())), "in", len(arms), "arms")


def _here(machine):
    """Return the machine as if it were here: compiled layers are drawn too."""
    import dataclasses

    return dataclasses.replace(machine, kind="cuda")


if __name__ == "__main__":
    main()
