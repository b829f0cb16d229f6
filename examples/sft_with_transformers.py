"""A training script with transformers' Trainer that takes its configuration from a plan.

    lora-advisor plan --trainer transformers --model ./my-model --vram 8 --out plan.json
    python examples/sft_with_transformers.py plan.json rows.jsonl

Rows have a column `text`. The adapter is put on by `setup.prepare`.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
)

from lora_advisor.advisor import autoconfigure


def main(plan: str, data: str) -> None:
    """Train the plan's model on rows of text."""
    setup = autoconfigure(plan=plan)
    tokenizer = AutoTokenizer.from_pretrained(setup.model_name)
    rows = load_dataset("json", data_files=data, split="train").map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=setup.config.seq_len),
        remove_columns=["text"],
    )
    model = AutoModelForCausalLM.from_pretrained(setup.model_name, **setup.model_arguments)
    trainer = Trainer(
        model=setup.prepare(model),
        args=setup.training_arguments,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[setup.callback()],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
