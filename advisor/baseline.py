"""What a user would run without a plan."""

from __future__ import annotations

from lora_advisor.advisor.axes import attention_for
from lora_advisor.advisor.trace_cache import TraceCache
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.spec import Spec


def baseline_config(spec: Spec, precision: str, *, cache: TraceCache | None = None) -> RunConfig:
    """Return what most tutorials run: Trainer, QLoRA after prepare_model_for_kbit_training, 2 rows.

    Preference pairs have TRL's trainer there. It keeps the user's stage, sequence length, effective
    batch and adapter.
    """
    micro_batch = 2 if spec.effective_batch % 2 == 0 else 1
    stage = spec.fixed.get("stage", "sft")
    return RunConfig(
        model=spec.model,
        stage=stage,
        trainer="trl" if stage == "dpo" else "transformers",
        method="qlora",
        micro_batch=micro_batch,
        accumulation=spec.effective_batch // micro_batch,
        seq_len=spec.seq_len,
        optimizer="adamw_torch_fused",
        precision=precision,
        checkpointing="full",
        attention=attention_for(spec, cache, None),
        kernels="none",
        loss="fused" if stage == "dpo" else "full",
        fp32_upcast=True,
        lora=LoraShape(r=spec.rank, alpha=spec.alpha, dropout=spec.dropout, targets=spec.targets),
        compile="off",
        allocator="default",
    )
