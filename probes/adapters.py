"""Which layers of a base model get adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.arguments import lora_arguments
from lora_advisor.probes.config import RunConfig

if TYPE_CHECKING:
    import torch


def lora_config(config: RunConfig, model: Any) -> Any:
    """Return peft's LoraConfig for adapters on a base model."""
    assert config.lora is not None
    refused = routers(model) if config.lora.targets == "all-linear" else []
    return make_lora_config(config, exclude=refused)


def make_lora_config(config: RunConfig, *, exclude: Sequence[str]) -> Any:
    """Return peft's LoraConfig; `exclude` as in `lora_arguments`."""
    from peft import LoraConfig

    adapters = LoraConfig(**lora_arguments(config, exclude=exclude))
    if config.adapter == "fused":
        from lora_advisor.probes.fused_adapter import fused_layers

        adapters._register_custom_module(fused_layers(ends_early=config.recompute == "needed"))
    return adapters


def routers(model: Any) -> list[str]:
    """Return the names of linear layers whose output is no tensor.

    Routers of mixtures that return their choice of experts too (modeling_phimoe.py,
    PhimoeTopKRouter): "all-linear" means them as well (peft/tuners/tuners_utils.py,
    `_maybe_include_all_linear_layers`), but an adapter can only be added to a tensor.
    """
    import torch

    refused: dict[type, bool] = {}
    names = []
    for name, module in model.named_modules():
        kind = type(module)
        if (
            not isinstance(module, torch.nn.Linear)
            or kind.forward is torch.nn.Linear.forward
            or kind.__module__.startswith("bitsandbytes")
        ):
            continue
        if kind not in refused:
            refused[kind] = not _returns_a_tensor(module)
        if refused[kind]:
            names.append(name)
    return names


def _returns_a_tensor(layer: torch.nn.Linear) -> bool:
    """Whether a layer, run without values, returns a tensor or cannot be run by itself."""
    import torch

    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in held.items()}
    rows = torch.empty(2, layer.in_features, dtype=layer.weight.dtype, device="meta")
    try:
        with torch.no_grad():
            output = torch.func.functional_call(layer, shapes, (rows,))
    except Exception:  # it takes more than rows, or reads their values: nothing is known of it
        return True
    return isinstance(output, torch.Tensor)
