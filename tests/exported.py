"""Plans, recipes and configurations for the tests of exports, made up but whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from foretold import candidate, prediction
from recorded import configure, tiny

from lora_advisor.advisor.export_words import Recipe
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import GIB, Machine, detect_stack
from lora_advisor.probes.plan import Candidate, Plan
from lora_advisor.probes.spec import Spec

#: Names that break out of a quote, a comment, a format string or markup where they can.
AWKWARD = 'it\'s "my" [bold]model[/bold]\n# {x}: & <b> \\ é'


def recipe(**changes: Any) -> Recipe:
    """Return a recipe for a card."""
    values: dict[str, Any] = {
        "model": "Qwen/Qwen2.5-1.5B", "data": None, "shape": None, "rows": None, "epochs": 1.0,
        "device": "cuda", "stack": detect_stack(), **changes,
    }  # fmt: skip
    return Recipe(**values)


def plan_of(
    config: RunConfig,
    *,
    data: Path | None = None,
    machine: Machine | None = None,
    architecture: Architecture | None = None,
    **changes: Any,
) -> Plan:
    """Return a plan that has chosen a configuration."""
    spec = Spec(
        model=config.model, vram_bytes=8 * GIB, seq_len=config.seq_len, gpu="rtx-4060",
        data=None if data is None else str(data), effective_batch=config.micro_batch,
    )  # fmt: skip
    values: dict[str, Any] = {
        "spec": spec, "machine": machine or find_card("rtx-4060").machine(),
        "stack": detect_stack(), "architecture": architecture or tiny(),
        "chosen": Candidate(config=config, prediction=prediction(tokens_per_s=1000.0)),
        "baseline": None, "runners_up": (), "rejected": (), "excluded": (), "cap_bytes": None,
        "context_bytes": None, "probes": 0, "reused": 0, "probing_s": 0.0, "wall_s": 0.0,
        "trials": 1, **changes,
    }  # fmt: skip
    return Plan(**values)


def drawn(count: int, seed: int) -> list[RunConfig]:
    """Draw legal configurations from the whole space."""
    pick = random.Random(seed)
    found: list[RunConfig] = []
    while len(found) < count:
        shape = LoraShape(
            r=pick.choice((1, 8, 64)),
            alpha=pick.choice((16, 32, 12.5)),
            dropout=pick.choice((0.0, 0.05)),
            targets=pick.choice(("all-linear", ("q_proj", "v_proj"), ("up_proj",))),
        )
        method = pick.choice(("lora", "qlora", "full"))
        try:
            config = configure(
                stage=pick.choice(("sft", "sft", "sft", "dpo")),
                trainer=pick.choice(("trl", "transformers", "loop")),
                method=method,
                lora=None if method == "full" else shape,
                micro_batch=pick.choice((1, 2, 6)),
                accumulation=pick.choice((1, 4)),
                seq_len=pick.choice((128, 1024)),
                optimizer=pick.choice(("adamw_torch_fused", "paged_adamw_8bit", "adafactor")),
                precision=pick.choice(("bf16", "fp16", "fp32")),
                checkpointing=pick.choice(("off", "full", "every_2", "every_5", "offload")),
                attention=pick.choice(("sdpa", "eager", "flash_attention_2", "varlen")),
                kernels=pick.choice(("none", "liger")),
                loss=pick.choice(("full", "fused")),
                fp32_upcast=pick.random() < 0.2,
                adapter=pick.choice(("peft", "peft", "fused")),
                compile=pick.choice(("off", "layers", "model")),
                allocator=pick.choice(("default", "expandable_segments")),
                embedding=pick.choice(("device", "device", "host")),
                packing=pick.random() < 0.2,
                group_by_length=pick.random() < 0.2,
                **(
                    {"quant_type": pick.choice(("nf4", "fp4")),
                     "double_quant": pick.random() < 0.5}
                    if method == "qlora"
                    else {}
                ),
            )  # fmt: skip
        except UsageError:
            continue
        found.append(config)
    return found


__all__ = ["AWKWARD", "candidate", "drawn", "plan_of", "recipe"]
