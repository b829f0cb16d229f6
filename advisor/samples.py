"""What the model says before and after: a few held-out prompts, answered by base and tuned model.

Greedy and bounded, so that the same model gives the same texts. The base is the tuned model with
its adapter switched off; for method "full" it is no longer there, and its answer unknown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from lora_advisor.probes.tokens import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Prompts, tokens of an answer, and tokens of a prompt at most: seconds of work on any card.
COUNT, ANSWER_TOKENS, PROMPT_TOKENS = 3, 64, 512
#: What is said in place of the base's answer where it is None.
NO_BASE = "unknown: the base is no longer there after full fine-tuning"
#: Tokens of a text without a question that are taken as its beginning.
_BEGINNING = 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and its answers; None is "unknown".

    Attributes:
        prompt: What the model was given, special tokens left out.
        reference: The answer in the data, as many tokens of it as a model may say.
        base: What the model says without the adapter.
        tuned: What it says with it.
    """

    prompt: str
    reference: str
    base: str | None
    tuned: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        return cls(**{name: data[name] for name in ("prompt", "reference", "base", "tuned")})


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, list[int]]],
    *,
    count: int = COUNT,
    answer_tokens: int = ANSWER_TOKENS,
) -> tuple[Sample, ...]:
    """Let the model answer the first of some rows, with and without its adapter.

    Args:
        model: The trained model, left as it was: a peft model, or one without an adapter.
        tokenizer: As the rows were made with.
        rows: Tokenised rows that were not trained on, of stage "sft" or "dpo".
        count: Rows to take at most.
        answer_tokens: Tokens of an answer at most.
    """
    parted = [_parted(row) for row in rows[:count]]
    has_adapter = hasattr(model, "disable_adapter")
    with _ready_to_generate(model, tokenizer):
        tuned = [_answer(model, tokenizer, prompt, answer_tokens) for prompt, _ in parted]
        base: list[str | None] = [None] * len(parted)
        if has_adapter:
            with model.disable_adapter():
                base = [_answer(model, tokenizer, prompt, answer_tokens) for prompt, _ in parted]
    return tuple(
        Sample(
            prompt=_text(tokenizer, prompt),
            reference=_text(tokenizer, reference[:answer_tokens]),
            base=without,
            tuned=with_adapter,
        )
        for (prompt, reference), without, with_adapter in zip(parted, base, tuned, strict=True)
    )


def _parted(row: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """Return a row's first prompt, its end where it is long, and the answer to it."""
    if "prompt_ids" in row:
        return row["prompt_ids"][-PROMPT_TOKENS:], row["chosen_ids"]
    ids, labels = row["input_ids"], row["labels"]
    start = next(place for place, label in enumerate(labels) if label != IGNORED)
    if start < 2:  # a text: all of it is trained, but for the token that nothing predicts
        start = max(1, min(_BEGINNING, len(ids) // 2))
    end = next((p for p in range(start, len(ids)) if labels[p] == IGNORED), len(ids))
    return ids[:start][-PROMPT_TOKENS:], ids[start:end]


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer_tokens: int
) -> str:
    import torch

    ids = torch.tensor([list(prompt)], device=model.device)
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=answer_tokens,
        do_sample=False,
        use_cache=True,
    )
    return _text(tokenizer, said[0, len(prompt) :].tolist())


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


@contextlib.contextmanager
def _ready_to_generate(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Put a model that was being trained into the state to generate, and back.

    Checkpointing ends with the mode (transformers, `GradientCheckpointingLayer`). Compiled layers
    run as they are: every token more would be another shape to compile. Weights in 4 bits stay
    trainable (`weights.keep_trainable`).
    """
    import torch

    training = [(module, module.training) for module in model.modules()]
    # peft hands its own on to the model beneath (peft_model.py, `generate`).
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    given = [holder.generation_config for holder in holders]
    model.generation_config = _plain_greedy(given[0], tokenizer)
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for holder, config in zip(holders, given, strict=True):
            holder.generation_config = config
        for module, was in training:
            module.training = was


def _plain_greedy(given: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return what ends a text, and none of the settings that change what a model says."""
    ends = given.eos_token_id if isinstance(given.eos_token_id, list) else [given.eos_token_id]
    eos = sorted({end for end in [tokenizer.eos_token_id, *ends] if end is not None})
    return type(given)(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
