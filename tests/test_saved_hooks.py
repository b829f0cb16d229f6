from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lora_advisor.probes.saved_hooks import counted_hooks


def layer(x: torch.Tensor) -> torch.Tensor:
    """Save five tensors: both sines' input twice, the product's factors, the exponential."""
    return (x.sin() * x.cos()).exp()


def test_each_tensor_counts_when_saved_saved_anew_and_asked_for() -> None:
    noted: list[str] = []
    x = torch.ones(3, requires_grad=True)

    with counted_hooks(lambda: noted.append("")):
        output = checkpoint(layer, x, use_reentrant=False)
        saved = len(noted)
        output.sum().backward()
    again = checkpoint(layer, x, use_reentrant=False)
    again.sum().backward()

    assert (saved, len(noted)) == (5, 15)  # nothing is counted after the end


def test_without_hooks_nothing_is_counted() -> None:
    noted: list[str] = []
    x = torch.ones(3, requires_grad=True)

    with counted_hooks(lambda: noted.append("")):
        total: Any = layer(x).sum()
        total.backward()

    assert noted == []
