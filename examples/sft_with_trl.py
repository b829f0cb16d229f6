"""A training script with TRL that takes its configuration from a plan.

    lora-advisor plan --model ./my-model --data chat.jsonl --vram 8 --out plan.json
    python examples/sft_with_trl.py plan.json chat.jsonl

Without a plan at hand, `autoconfigure("./my-model", data="chat.jsonl", vram=8)` makes one first.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from lora_advisor.advisor import autoconfigure


def main(plan: str, data: str) -> None:
    """Train the plan's model on rows that TRL knows (`messages`, `text`, `prompt` and more)."""
    setup = autoconfigure(plan=plan)
    for note in setup.notes:
        print("note:", note)
    model = AutoModelForCausalLM.from_pretrained(setup.model_name, **setup.model_arguments)
    trainer = SFTTrainer(
        model=setup.prepare(model),
        args=setup.training_arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(setup.model_name),
        peft_config=setup.lora,
        callbacks=[setup.callback()],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
