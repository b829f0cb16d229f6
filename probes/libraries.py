"""The libraries of a step: imported at once, and what they made left alone by the collector.

They make some million objects. The collector would look at them again and again, which takes a
quarter of the time of their import and of a trace.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator

from lora_advisor.probes import nvml


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector from running, if it would, while libraries are imported."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def freeze() -> None:
    """Have the collector leave alone what the libraries made when they were imported.

    Garbage among it stays as well; to look for it takes 0.4 s.
    """
    gc.freeze()


@functools.cache
def freeze_what_came() -> None:
    """Leave alone what the first trace imported and keeps, too."""
    gc.freeze()


@functools.cache
@uncollected()
def import_all(family: str) -> None:
    """Import what a probe of a family of models imports, without creating a CUDA context.

    A package that is missing or broken is the business of the probe that needs it.
    """
    import torch

    asked = torch.cuda.get_device_capability
    known = nvml.capability()
    if known is not None:
        major, minor = (int(part) for part in known.split("."))
        # bitsandbytes asks for it when it is imported.
        torch.cuda.get_device_capability = lambda *_: (major, minor)
    try:
        for name in (
            "bitsandbytes", "datasets", "accelerate", "peft.tuners.lora", "torch._dynamo",
            "torch._inductor.compile_fx", "trl.trainer.sft_trainer", "transformers.modeling_utils",
            "transformers.models.auto.modeling_auto", "transformers.trainer", "torch.profiler",
            "lora_advisor.probes.weights", "lora_advisor.probes.finetune",
            "lora_advisor.probes.dataset", "lora_advisor.probes.extend",
            "lora_advisor.probes.cuda_semantics", "lora_advisor.probes.compiled_semantics",
            "lora_advisor.probes.kernel_costs", "lora_advisor.probes.fused_adapter",
            "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion",
            "transformers.integrations.bitsandbytes",
            "torch.profiler._cupti_monitor", "torch._subclasses.schema_check_mode",
            f"transformers.models.{family}.modeling_{family}",
        ):  # fmt: skip
            with contextlib.suppress(Exception):
                __import__(name)
    finally:
        torch.cuda.get_device_capability = asked
