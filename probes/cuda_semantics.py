"""Where a CUDA device allocates or computes otherwise than the CPU that fake tensors stand on.

Each entry names the source of the rule. Versions: PyTorch 2.13, bitsandbytes 0.50.2, TRL 1.16.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Work

if TYPE_CHECKING:
    import torch


def traced_config(config: RunConfig) -> RunConfig:
    """Return the configuration whose CPU form allocates what `config` does on CUDA.

    fp16 and bf16 have the same size, and the CPU has no fp16 autocast with loss scaling. Compiled
    code is traced as its eager form, Liger's kernels are put in by `liger_semantics`.
    """
    changes: dict[str, Any] = {"compile": "off"}
    if config.precision == "fp16" and config.trainer != "loop":
        changes["precision"] = "bf16"
    if config.attention == "flash_attention_2":
        changes["attention"] = "sdpa"
    return config.replace(**changes)


@dataclass(frozen=True)
class Cost:
    """What one operation needs beyond its outputs.

    Attributes:
        temporaries: Bytes of each block that lives only while the operation runs.
        work: Given the result, the work of the operation.
    """

    temporaries: tuple[int, ...]
    work: Callable[[Any], Work]


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


def describe(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    """Return what an operation needs on CUDA beyond its outputs."""
    name = func.name() if hasattr(func, "name") else str(func)
    temporaries: tuple[int, ...] = ()
    if name.startswith("bitsandbytes::gemm_4bit"):
        temporaries = _gemm_4bit_temporaries(args, kwargs)
    return Cost(temporaries, lambda result: _work(name, args, result))


def _gemm_4bit_temporaries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """bitsandbytes/backends/cuda/ops.py: above 1536 rows the weight is dequantised for F.linear."""
    a, _, shape = args[:3]
    rows = a.numel() // a.shape[-1]
    if rows <= 1536:
        return ()
    weight = math.prod(shape) * a.element_size()
    nested = kwargs.get("absmax_8bit")
    if nested is None:
        return (weight,)
    return (nested.numel() * 4, nested.numel() * 4, weight)


#: Questions and notes that a dispatch mode sees beside the operations.
_NO_KERNELS = ("prim", "profiler")
_VIEWS = (
    "view", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute",
    "detach", "alias", "as_strided", "split", "unbind", "_unsafe_view", "lift", "empty", "size",
)  # fmt: skip


def _work(name: str, args: tuple[Any, ...], result: Any) -> Work:
    """Count one operation's floating-point operations, or the bytes it moves."""
    space, short = name.split("::")[:2]
    if space in _NO_KERNELS or short == "t" or short.startswith(_VIEWS):
        return Work()
    if short.startswith(("mm", "addmm", "bmm", "baddbmm", "linear")):
        return Work(launches=1, matmul_flops=_matmul_flops(short, args))
    if "gemm_4bit" in short:
        rows = args[0].numel() // args[0].shape[-1]
        weight = math.prod(args[2])
        # Reads half a byte, writes and reads back the dequantised value.
        moved = weight * (0.5 + 2 * args[0].element_size())
        return Work(launches=4, matmul_flops=2.0 * rows * weight, bytes_moved=moved)
    if "dequantize_4bit" in short:
        return Work(launches=1, bytes_moved=_bytes(args) + _bytes(result))
    if "scaled_dot_product" in short:
        return _attention_work(short, args)
    return Work(launches=1, bytes_moved=_bytes(args) + _bytes(result))


def _matmul_flops(short: str, args: tuple[Any, ...]) -> float:
    tensors = [arg for arg in args if hasattr(arg, "shape") and arg.dim() >= 2]
    if short.startswith(("addmm", "baddbmm")):
        tensors = tensors[-2:]
    left, right = tensors[0], tensors[1]
    return float(2 * left.numel() * right.shape[-1])


def _attention_work(short: str, args: tuple[Any, ...]) -> Work:
    """Four products forward (two, causal half) and five backward; FlashAttention-2, section 3.2."""
    backward = "backward" in short
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    batch, heads, length, width = query.shape
    product = 2.0 * batch * heads * length * key.shape[2] * width / 2  # causal: half the scores
    return Work(launches=4 if backward else 1, attention_flops=product * (5 if backward else 2))


def _bytes(value: Any) -> float:
    if hasattr(value, "element_size"):
        return float(value.numel() * value.element_size())
    if isinstance(value, list | tuple):
        return sum(_bytes(part) for part in value)
    return 0.0


def fake_quantise(layer: Any, values: torch.Tensor) -> None:
    """Give a bitsandbytes layer a 4-bit weight of fake tensors.

    `Params4bit` cannot be made from a fake tensor, so a plain parameter carries the same storages:
    packed weight, absmax and, doubly quantised, its second level (bitsandbytes/functional.py,
    quantize_4bit: blocks of 64 weights, second level of 256 constants).
    """
    import torch
    from bitsandbytes.functional import QuantState

    old = layer.weight
    count = values.numel()
    blocks = -(-count // 64)
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
    code = torch.empty(16, dtype=torch.float32)
    offset, state2 = None, None
    absmax = torch.empty(blocks, dtype=torch.uint8 if old.compress_statistics else torch.float32)
    if old.compress_statistics:
        offset = torch.empty((), dtype=torch.float32)
        state2 = QuantState(
            absmax=torch.empty(-(-blocks // 256), dtype=torch.float32),
            blocksize=256,
            code=torch.empty(256, dtype=torch.float32),
            dtype=torch.float32,
        )
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
def cuda_semantics(config: RunConfig, model: Any) -> Iterator[None]:
    """Put CUDA's behaviour in place of the CPU's while a step of `model` is traced."""
    import torch
    from transformers import masking_utils, modeling_utils

    with contextlib.ExitStack() as stack:
        replace = stack.enter_context
        replace(mock.patch.object(torch.nn.Module, "_apply", _apply))
        # Full rows: no packed documents, and a mask of ones only; both are decided by values.
        replace(mock.patch.object(masking_utils, "is_tracing", lambda *_, **__: False))
        if not config.packing:
            replace(
                mock.patch.object(
                    masking_utils, "find_packed_sequence_indices", lambda position_ids: None
                )
            )
        if config.trainer == "trl":
            for patch in _trl_patches():
                replace(patch)
        for patch in _optimizer_patches() + _autocast_patches():
            replace(patch)
        if config.checkpointing == "offload":
            replace(mock.patch.object(modeling_utils, "save_on_cpu", _save_on_host))
        if config.kernels == "liger":
            for patch in _liger_patches(model):
                replace(patch)
        replace(mock.patch.object(torch.nn.functional, "dropout", _cuda_dropout))
        yield


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


def _save_on_host(pin_memory: bool = False, device_type: str = "cuda") -> Any:
    """Offloaded checkpoints: what is saved leaves the device and comes back when asked for."""
    import torch

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta")

    def unpack(held: torch.Tensor) -> torch.Tensor:
        return torch.empty(held.shape, dtype=held.dtype, device="cpu")

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _autocast_patches() -> list[Any]:
    """Questions about autocast that name no device mean CUDA (peft asks so before it casts)."""
    import torch

    is_enabled = torch.is_autocast_enabled

    def enabled(device_type: str = "cpu") -> bool:
        return bool(is_enabled(device_type))

    return [
        mock.patch.object(torch, "is_autocast_enabled", enabled),
        mock.patch.object(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu")),
    ]


def _liger_patches(model: Any) -> list[Any]:
    """Liger's kernels as stand-ins, whether or not the package is here."""
    from transformers import trainer

    from lora_advisor.probes import liger_semantics

    patches: list[Any] = [
        mock.patch.object(trainer, "apply_liger_kernel", liger_semantics.apply_liger),
    ]
    module = liger_semantics.rope_module(model)
    if module is not None:
        patches.append(mock.patch.object(module, "apply_rotary_pos_emb", liger_semantics.rotary))
    return patches


def _trl_patches() -> list[Any]:
    """TRL's fused loss as its Triton kernels run it: valid positions only, tiles in place."""
    import torch
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    def fold(*_: Any, **__: Any) -> None:
        return None

    def addmm_fp32(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)

    return [
        mock.patch.object(utils, "_use_triton", lambda device: True),
        mock.patch.object(chunked_logprob, "_forward_tile", fold),
        mock.patch.object(chunked_logprob, "_backward_tile", fold),
        mock.patch.object(chunked_logprob, "_addmm_fp32", addmm_fp32),
    ]


def _optimizer_patches() -> list[Any]:
    """Optimizers as they run on CUDA.

    Unless told otherwise torch's take all parameters of a list at once there (foreach:
    torch/optim/optimizer.py, `_default_to_fused_or_foreach`); bitsandbytes' update in place, and
    hold the paged states of tensors from 1e5 elements on outside the allocator (managed memory:
    bitsandbytes/optim/optimizer.py, `get_state_buffer`).
    """
    import torch
    from bitsandbytes.optim import optimizer as bnb

    def state_buffer(
        self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        paged = self.is_paged and p.numel() >= 1e5
        return torch.zeros_like(p, dtype=dtype, device="meta" if paged else p.device)

    def update_step(self: Any, group: Any, p: torch.Tensor, gindex: int, pindex: int) -> None:
        # The kernels read a contiguous gradient and write the parameter and its states in place.
        p.data = p.data.contiguous()
        p.grad = p.grad.contiguous()  # type: ignore[union-attr]

    patches = [
        mock.patch.object(bnb.Optimizer8bit, "get_state_buffer", state_buffer),
        mock.patch.object(bnb.Optimizer8bit, "prefetch_state", lambda self, p: None),
        mock.patch.object(bnb.Optimizer2State, "update_step", update_step),
        mock.patch.object(bnb.Optimizer1State, "update_step", update_step),
        mock.patch.object(bnb, "sync_gpu", lambda tensor: None),
    ]
    for name in ("adam", "adamw", "sgd", "rmsprop", "adagrad"):
        module = importlib.import_module(f"torch.optim.{name}")
        if hasattr(module, "_default_to_fused_or_foreach"):
            patches.append(
                mock.patch.object(
                    module, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)
                )
            )
    return patches


def _cuda_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """Dropout that keeps one byte an element, as CUDA's fused kernel does (native_dropout)."""
    import torch

    if p == 0 or not training:
        return input
    return torch.native_dropout(input, p, training)[0]
