"""Whether a training step draws random numbers, which a recomputed layer would have to repeat."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_advisor.probes.config import RunConfig

#: Fields of models' configurations that make a forward pass draw: attention_dropout, resid_pdrop,
#: router_jitter_noise, layerdrop and their like.
_DRAWING_FIELDS = re.compile("drop|jitter|noise")


def draws_numbers(config: RunConfig, model: Any) -> bool:
    """Whether a forward pass in training may draw random numbers.

    Args:
        config: Its adapter's dropout counts.
        model: The base model; its dropout modules and its configuration count.
    """
    from torch.nn.modules.dropout import _DropoutNd

    if config.lora is not None and config.lora.dropout > 0:
        return True
    modules = (module for module in model.modules() if isinstance(module, _DropoutNd))
    return any(module.p > 0 for module in modules) or may_draw(
        model.config.get_text_config().to_dict()
    )


def may_draw(figures: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration, such as its config.json, may draw numbers."""
    figures = figures.get("text_config") or figures
    fields = (value for name, value in figures.items() if _DRAWING_FIELDS.search(name))
    return any(isinstance(value, int | float) and value > 0 for value in fields)
