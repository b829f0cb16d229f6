"""Where a CUDA device allocates or computes otherwise than the CPU that fake tensors stand on.

Each entry names the source of the rule. Versions: PyTorch 2.13, bitsandbytes 0.50.2, TRL 1.16.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from lora_advisor.probes.attention_semantics import attention_patch
from lora_advisor.probes.autocast_semantics import cuda_autocast
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.cuda_libraries import (
    dropout,
    grouped_product_patches,
    liger_patches,
    optimizer_patches,
    save_on_host,
    softmax_for,
    trl_patches,
)

if TYPE_CHECKING:
    import torch


def traced_config(config: RunConfig) -> RunConfig:
    """Return the configuration whose CPU form allocates what `config` does on CUDA.

    fp16 and bf16 have the same size, and the CPU has no fp16 autocast with loss scaling. A model
    that is compiled as a whole is traced as its eager form; compiled layers are put in by
    `compiled_semantics`, Liger's kernels by `liger_semantics`.
    """
    changes: dict[str, Any] = {"compile": "off"} if config.compile == "model" else {}
    if config.precision == "fp16" and config.trainer != "loop":
        changes["precision"] = "bf16"
    if config.attention == "flash_attention_2":
        changes["attention"] = "sdpa"
    return config.replace(**changes)


def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer the operations whose result depends on values, which fake tensors have not.

    A condition on a value is taken to hold (all labels valid, all tokens attended to, gradients
    finite), as in a batch of full rows.
    """
    import torch

    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default:
        dtype = args[0].dtype
        return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
    if func is aten.is_nonzero.default or func is aten.equal.default:
        return True
    if func is aten.addmm.dtype_out:  # CUDA only: fp32 sums of bf16 products, in place
        return kwargs["out"]
    if func is aten.index.Tensor:
        indices = [index for index in args[1] if index is not None]
        if len(indices) == 1 and indices[0].dtype == torch.bool:
            source, mask = args[0], indices[0]
            shape = (mask.numel(), *source.shape[mask.dim() :])
            return source.new_empty(shape)
    return NotImplemented


#: References to a gradient that nobody but autograd's buffer holds, as a dispatch mode sees it: the
#: buffer's, those of the call on its way here, and the Python object's; of its storage, one more
#: for the Python object that asks.
_SOLE_TENSOR, _SOLE_STORAGE = 4, 2


def writes_in_place(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the backward pass writes this result into its first argument.

    Autograd sums the gradients of a tensor used twice in place where nobody else holds the first
    (torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`), and fills the gradient of an
    indexed tensor in place (FunctionsManual.cpp, `index_backward`), but never for a subclass of
    Tensor, which a fake tensor is.
    """
    import torch

    if torch.is_grad_enabled():
        return False
    if func is torch.ops.aten.index_put.default:
        return True
    if func is not torch.ops.aten.add.Tensor:
        return False
    held, more = args[0], args[1]
    return (
        isinstance(more, torch.Tensor)
        and held.shape == more.shape
        and held.dtype == more.dtype
        and held._use_count() == _SOLE_TENSOR
        and torch._C._storage_Use_Count(held.untyped_storage()._cdata) == _SOLE_STORAGE
        and held.untyped_storage().nbytes() == held.numel() * held.element_size()
    )


def fake_quantise(layer: Any, values: torch.Tensor) -> None:
    """Give a bitsandbytes layer a 4-bit weight of fake tensors.

    `Params4bit` cannot be made from a fake tensor, so a plain parameter carries the same storages,
    made in the same order: packed weight, scales and, doubly quantised, their second level
    (bitsandbytes/functional.py, quantize_4bit: blocks of 64 weights, second level of 256 scales).
    """
    import torch
    from bitsandbytes.functional import QuantState

    old = layer.weight
    count = values.numel()
    blocks = -(-count // 64)
    absmax = torch.empty(blocks, dtype=torch.float32)
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
    code = torch.empty(16, dtype=torch.float32)
    offset, state2 = None, None
    if old.compress_statistics:
        offset = torch.empty((), dtype=torch.float32)
        shifted = torch.empty_like(absmax)
        second = torch.empty(-(-blocks // 256), dtype=torch.float32)
        quantised = torch.empty(blocks, dtype=torch.uint8)
        dynamic = torch.empty(256, dtype=torch.float32)
        state2 = QuantState(absmax=second, blocksize=256, code=dynamic, dtype=torch.float32)
        del shifted
        absmax = quantised
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_state = QuantState(
        absmax=absmax,
        shape=values.shape,
        dtype=values.dtype,
        blocksize=64,
        code=code,
        quant_type=old.quant_type,
        offset=offset,
        state2=state2,
    )
    for name in ("compress_statistics", "quant_type", "quant_storage", "blocksize"):
        setattr(weight, name, getattr(old, name))
    layer.weight = weight


@contextlib.contextmanager
def cuda_semantics(
    config: RunConfig,
    model: Any,
    *,
    precision: str,
    capability: str | None,
    empty_cache: Callable[[], None],
) -> Iterator[None]:
    """Put CUDA's behaviour in place of the CPU's while a step of `model` is traced.

    Args:
        config: What is traced.
        model: The model it runs.
        precision: What it stands for; `config` has the one that the CPU can run.
        capability: Of the card.
        empty_cache: Called where the step gives the allocator's cache back to the driver.
    """
    import torch
    from accelerate.utils import memory
    from transformers import masking_utils, modeling_utils

    from lora_advisor.probes import varlen_attention

    with contextlib.ExitStack() as stack:
        replace = stack.enter_context
        replace(mock.patch.object(torch.nn.Module, "_apply", _apply))
        # Full rows: a mask of ones only, and documents within a row only where rows are packed;
        # both are decided by values.
        masked = config.packing and config.attention != varlen_attention.NAME
        replace(mock.patch.object(masking_utils, "is_tracing", lambda *_, **__: masked))
        replace(mock.patch.object(varlen_attention, "stands_for_cuda", True))
        if not masked:
            replace(
                mock.patch.object(
                    masking_utils, "find_packed_sequence_indices", lambda position_ids: None
                )
            )
        if config.trainer == "trl":
            for patch in trl_patches():
                replace(patch)
        for patch in optimizer_patches():
            replace(patch)
        replace(cuda_autocast())
        replace(attention_patch(capability, precision))
        # Trainer begins with `free_memory` (accelerate/accelerator.py), which ends in this.
        replace(mock.patch.object(memory, "clear_device_cache", lambda *_, **__: empty_cache()))
        if config.fp32_upcast:
            replace(mock.patch.object(torch.cuda, "is_available", _within_peft))
            replace(mock.patch.object(torch.cuda, "empty_cache", empty_cache))
        if config.checkpointing == "offload":
            replace(mock.patch.object(modeling_utils, "save_on_cpu", save_on_host))
        if config.kernels == "liger":
            for patch in liger_patches(model):
                replace(patch)
        for patch in grouped_product_patches(capability):
            replace(patch)
        # Its loop ends where no value is out of bounds, which fake values never say.
        replace(mock.patch.object(torch.nn.init, "_no_grad_trunc_normal_", _first))
        replace(mock.patch.object(torch.nn.functional, "dropout", dropout))
        replace(mock.patch.object(torch.nn.functional, "softmax", softmax_for(precision)))
        if config.compile == "layers":
            from lora_advisor.probes.compiled_semantics import compiled_layers

            replace(compiled_layers())
        yield


def _first(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _apply(module: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """Module._apply without in-place assignment and swap, which fake parameters do not allow."""
    import torch

    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            changed = fn(parameter)
            if changed is not parameter:
                part._parameters[name] = torch.nn.Parameter(
                    changed.detach(), requires_grad=parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fn(buffer)
    return module


def _within_peft() -> bool:
    """Tell peft's preparation of 4-bit models of a GPU, so that it empties the cache."""
    caller = sys._getframe(2 if sys._getframe(1).f_code.co_name == "__call__" else 1)
    return caller.f_code.co_name == "prepare_model_for_kbit_training"
