"""Whether two models say the same: their logits on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Prompts and their tokens at most: a forward pass each, and logits that take little.
PROMPTS, TOKENS = 3, 32
#: What is asked where the training's own prompts are not known.
_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Explain in one sentence why the sky is blue.",
    "def add(a, b):\n    return a + b\n",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a model's logits are from another's.

    Attributes:
        largest: The largest difference of a logit.
        relative: Root mean square of the differences, over that of the other's logits around their
            mean.
        divergence: Mean Kullback-Leibler divergence of what comes next, in nats.
        agreement: Share of the places at which both find the same token likeliest.
    """

    largest: float
    relative: float
    divergence: float
    agreement: float


def difference(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Compare logits, of shape (tokens, vocabulary) for each prompt."""
    largest = spread = apart = divergence = 0.0
    places = same = 0
    for left, right in zip(reference, other, strict=True):
        wrong = left - right
        largest = max(largest, float(wrong.abs().max()))
        apart += float(wrong.square().sum())
        spread += float((left - left.mean(-1, keepdim=True)).square().sum())
        p, q = left.log_softmax(-1), right.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        same += int((left.argmax(-1) == right.argmax(-1)).sum())
        places += len(left)
    return Difference(
        largest=largest,
        relative=(apart / spread) ** 0.5,
        divergence=max(0.0, divergence / places),
        agreement=same / places,
    )


def logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return a model's logits for each prompt, computed in fp32.

    In 16 bits the rounding of activations would hide what is looked for. Each module's weights are
    widened while it runs, so that the model never stands in fp32 as a whole.
    """
    import torch

    model.eval()
    for module in model.modules():
        narrow = {
            name: parameter.data
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16)
        }
        if narrow:
            module.register_forward_pre_hook(_widen(narrow))
            module.register_forward_hook(_narrow(narrow))
    with torch.no_grad():
        return [model(torch.tensor([list(ids)])).logits[0].float() for ids in prompts]


def _widen(narrow: Mapping[str, torch.Tensor]) -> Callable[..., None]:
    def hook(module: Any, _: Any) -> None:
        for name, data in narrow.items():
            module._parameters[name].data = data.float()

    return hook


def _narrow(narrow: Mapping[str, torch.Tensor]) -> Callable[..., None]:
    def hook(module: Any, *_: Any) -> None:
        for name, data in narrow.items():
            module._parameters[name].data = data

    return hook


def prompts_for(tokenizer: PreTrainedTokenizerBase, run: Path | None) -> list[list[int]]:
    """Return prompts as tokens: those a training has held out and answered, else a few of our own.

    Args:
        tokenizer: The adapter's.
        run: Folder of the training; None where it is not known.
    """
    texts: Sequence[str] = _PROMPTS
    try:
        if run is not None:
            samples = json.loads((run / "samples.json").read_text("utf-8"))["samples"]
            texts = [f"{one['prompt']}\n{one['reference']}" for one in samples] or _PROMPTS
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there are our own
    return [tokenizer(text)["input_ids"][:TOKENS] for text in texts[:PROMPTS]]
