"""What makes a training step draw random numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded import configure

from lora_advisor.probes.config import LoraShape
from lora_advisor.probes.randomness import draws_numbers


def model_with(module: torch.nn.Module | None = None, **fields: Any) -> Any:
    """Return a model of one module whose configuration has some fields."""
    model: Any = torch.nn.Sequential(*([] if module is None else [module]))
    text = SimpleNamespace(to_dict=lambda: fields)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    return model


@pytest.mark.parametrize(
    ("model", "draws"),
    [
        (model_with(attention_dropout=0.0, hidden_size=64, router_jitter_noise=None), False),
        (model_with(torch.nn.Dropout(0.0)), False),
        (model_with(torch.nn.Dropout(0.1)), True),
        (model_with(attention_dropout=0.1), True),
        (model_with(router_jitter_noise=0.01), True),
    ],
)
def test_dropout_and_noise_of_a_model_draw(model: Any, draws: bool) -> None:
    assert draws_numbers(configure(), model) is draws


def test_dropout_of_an_adapter_draws() -> None:
    shape = LoraShape(r=8, alpha=16, dropout=0.05, targets="all-linear")

    assert draws_numbers(configure(lora=shape), model_with())
