"""Parts of the scripts that `export` writes, as they stand there."""

from __future__ import annotations

UPCAST = """
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing={checkpointed},
        gradient_checkpointing_kwargs={{"use_reentrant": False}},
    )
"""
COMPILE = """
    # Compiled code is for one shape, which is why every batch is padded to the full length.
    for layer in model.get_decoder().modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=False)
"""
WITHOUT_MASK = '''

def without_mask(decoder, inputs, words):
    """Leave out the padding mask in training, with which attention is slower.

    Rows are padded on the right, where causal attention does not look.
    """
    return inputs, {**words, "attention_mask": None} if decoder.training else words
'''
USE_NO_MASK = """
    model.get_decoder().register_forward_pre_hook(without_mask, with_kwargs=True)
"""
PADDING = """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
"""
FULL_PRECISION = """
    # TRL casts the adapters of a 4-bit model to bf16, which fp16's loss scaling cannot unscale.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
"""
TOKENS = '''

def tokens_of(row, tokenizer):
    """Turn a row into tokens; no loss is taken on a prompt."""
    prompt, whole = row.get("prompt") or "", row.get("text") or ""
    if isinstance(prompt, list) or "messages" in row:
        turns = row.get("messages") or [*prompt, *row["completion"]]
        template = tokenizer.apply_chat_template
        whole = template(turns, tokenize=False)
        prompt = template(prompt, tokenize=False, add_generation_prompt=True) if prompt else ""
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        asked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else 0
    else:
        whole = whole or prompt + row["completion"] + tokenizer.eos_token
        ids = tokenizer(whole)["input_ids"]
        asked = len(tokenizer(prompt)["input_ids"]) if prompt else 0
    labels = [-100] * asked + ids[asked:]
    return {"input_ids": ids[:MAX_LENGTH], "labels": labels[:MAX_LENGTH]}
'''
