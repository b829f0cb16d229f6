"""A tiny model with random weights and a tokenizer, for tests that train for a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: A template like ChatML's, without markers around what the assistant says.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """Save a byte-level tokenizer of 259 tokens whose padding token is its end of sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=special[:2],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def save_model(folder: Path) -> None:
    """Save a Llama of two layers with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_pairs(file: Path, count: int = 40) -> None:
    """Save sums with a right answer and a wrong one, each now and then the longer."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} and {n * n}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n + n * n}, a sum."}],
            "rejected": [{"role": "assistant", "content": "No idea" + "!" * (n % 17)}],
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_rows(file: Path, count: int = 40) -> None:
    """Save sums: rows with questions and answers of differing lengths."""
    rows = [
        {"question": f"What is {n} and {n * n}?", "answer": f"It is {n + n * n}, a sum."}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
