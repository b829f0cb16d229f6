"""Words of the options, apart from what they lead to: `--help` imports nothing else of ours."""

from __future__ import annotations

#: Sequences in one optimizer step where the user names no number: an even division into most
#: micro-batches.
DEFAULT_BATCH = 24
#: Knobs of RunConfig that an option of the same name fixes, with the words it takes.
KNOBS = {
    "stage": "sft, or dpo on preference pairs",
    "trainer": "trl, transformers, loop or unsloth",
    "method": "lora, qlora or full",
    "precision": "bf16, fp16 or fp32",
    "optimizer": "a name of transformers' OptimizerNames",
    "checkpointing": "off, full, every_N, offload or unsloth",
    "attention": "sdpa, eager, flash_attention_2, or varlen: packed rows by their bounds",
    "kernels": "none or liger",
    "adapter": "peft, or fused: one function for a product and its adapter",
    "compile": "off, layers or model",
    "cuda_graph": "off, or micro_batch: its kernels are recorded once and replayed",
    "recompute": "layer, or needed: not an eager layer's last product",
    "allocator": "default or expandable_segments",
    "embedding": "device, or host: input embeddings are looked up in host memory",
}
#: `probes.cutting.LONG_ROWS`, copied because that imports what reads data; a test compares them.
LONG_ROWS = ("truncate", "split", "drop")
