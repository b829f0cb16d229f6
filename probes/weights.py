"""Build the model of a configuration: random or stored weights, quantised as it says.

Random weights cost the same memory and time as trained ones, so a probe needs no download. The
model is laid out on the meta device and filled one module after the other, so that a 4-bit model
never stands in 16 bits as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_advisor.probes import nvml, unsloth
from lora_advisor.probes.architectures import (
    Architecture,
    attention_of,
    build_hf_config,
    causal_model_of,
)
from lora_advisor.probes.arguments import (
    dtype_name,
    loaded_attention,
    loading_arguments,
    quantization_arguments,
)
from lora_advisor.probes.attention_semantics import why_no_bounds
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import MissingInputError, UnavailableError, UsageError
from lora_advisor.probes.packed_models import NOT_TOLD, attentions_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Quantises one bitsandbytes layer in place, given the values its weight shall have.
Quantise = Callable[[Any, "torch.Tensor"], None]


def weights_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype the base weights (those not in 4 bits) are held in."""
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name(config))
    return dtype


def quantization_config(config: RunConfig) -> Any:
    """Return the BitsAndBytesConfig of a "qlora" configuration, nothing left to defaults."""
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig  # transformers leaves it untyped
    return make(**quantization_arguments(config))


def load_model(config: RunConfig, architecture: Architecture, device: str) -> PreTrainedModel:
    """Return the base model on `device`, with its stored weights or, lacking them, random ones.

    Raises:
        MissingInputError: The stored weights cannot be read.
    """
    if not config.is_buildable:
        from lora_advisor.probes import unsloth_step

        return unsloth_step.load_model(config, architecture, device)
    if architecture.weights is None:
        return random_model(config, architecture, device, quantise=quantise_layer)
    from transformers import AutoModelForCausalLM

    _require_buildable(config, architecture)
    extra = {"quantization_config": quantization_config(config)} if config.method == "qlora" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            architecture.weights,
            **loading_arguments(config, device=device),
            trust_remote_code=architecture.trust_remote_code,
            **extra,
        )
    except OSError as error:
        raise MissingInputError(
            f"the weights of `{architecture.name}` must be readable, but "
            f"{str(error).splitlines()[0]}"
        ) from None
    keep_trainable(model)
    return model


def random_model(
    config: RunConfig, architecture: Architecture, device: str, *, quantise: Quantise
) -> PreTrainedModel:
    """Return the model with random weights on `device`."""
    model = skeleton(config, architecture, device)
    fill(model, weights_dtype(config), device, quantise, on_gpu=device == "cuda")
    return model


def skeleton(
    config: RunConfig,
    architecture: Architecture,
    device: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the model on the meta device, its linear layers replaced by 4-bit ones for "qlora".

    Args:
        config: What decides dtype, attention and quantisation.
        architecture: The figures.
        device: Where the weights shall live in the end.
        layers: Build only this many decoder layers; None for all.
        dtype: Of the weights; None for what the configuration says.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.quantizers.auto import AutoHfQuantizer

    _require_buildable(config, architecture)
    hf_config = build_hf_config(architecture, layers=layers)
    build: Any = AutoModelForCausalLM.from_config  # transformers leaves it untyped
    with torch.device("meta"), no_init_weights():
        model = build(
            hf_config,
            dtype=dtype or weights_dtype(config),
            attn_implementation=loaded_attention(config),
            trust_remote_code=architecture.trust_remote_code,
        )
    model.tie_weights()  # skipped above together with the initial values
    if config.method == "qlora":
        quantizer = AutoHfQuantizer.from_config(quantization_config(config), pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": device})
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    return model  # type: ignore[no-any-return]


def _require_buildable(config: RunConfig, architecture: Architecture) -> None:
    """Refuse an architecture or an attention that transformers does not have.

    Raises:
        UsageError: Naming what is missing, or the attention it has.
    """
    brings_code = architecture.trust_remote_code and "auto_map" in architecture.hf_config
    if causal_model_of(architecture) is None and not brings_code:
        raise UsageError(
            f"`{architecture.name}` is of model type {architecture.hf_config['model_type']!r}, for "
            "which transformers has no causal language model; give the figures of its language "
            "model alone, where it has one."
        )
    if config.attention == "varlen" and attentions_of(architecture)[-1] != "varlen":
        raise UsageError(
            f'`attention` must be "{attention_of(architecture)}" for `{architecture.name}`, not '
            f'"varlen": {NOT_TOLD}.'
        )
    if config.attention == "sdpa" and attention_of(architecture) != "sdpa":
        raise UsageError(
            f'`attention` must be "eager" for `{architecture.name}`, which transformers builds '
            'without "sdpa".'
        )


def fill(
    model: Any, dtype: torch.dtype, device: str, quantise: Quantise, *, on_gpu: bool = False
) -> None:
    """Give every parameter and buffer of a meta model storage on `device` and values.

    The allocations are those of `from_pretrained` (transformers/core_model_loading.py): one block
    of the size of all weights first, where they go to a GPU, which is free again before the first
    (modeling_utils.py, `caching_allocator_warmup`); then the weights in the order of their names.

    Args:
        model: The model.
        dtype: Of the values that are quantised, and of their biases.
        device: Where the storages are made.
        quantise: Quantises a layer.
        on_gpu: Whether `device` is a GPU, or stands for one.
    """
    import torch
    from transformers.core_model_loading import dot_natural_key

    quantised = quantised_layers(model)
    if on_gpu:
        torch.empty(loaded_bytes(model, model) // 2, dtype=torch.float16, device=device)
    made: dict[int, torch.nn.Parameter] = {}  # tied parameters are one object under two names
    # A tied head is not stored, so the embeddings' name is the one that counts.
    order = {id(p): dot_natural_key(name) for name, p in model.named_parameters()}
    places = [
        (order[id(old)], module, name, old)
        for module in model.modules()
        for name, old in module._parameters.items()
        if old is not None and old.device.type == "meta"
    ]
    for _, module, name, old in sorted(places, key=lambda place: place[0]):
        if module in quantised and name == "weight":
            values = torch.empty(
                module.out_features, module.in_features, dtype=dtype, device=device
            )
            quantise(module, values.normal_(0.0, 0.02))
            # Some parents initialise their children's weights (modeling_gpt2.py, `_init_weights`).
            module.weight._is_hf_initialized = True
            del values
            continue
        if id(old) not in made:
            kind = dtype if module in quantised else old.dtype
            made[id(old)] = torch.nn.Parameter(
                torch.empty(old.shape, dtype=kind, device=device), requires_grad=old.requires_grad
            )
        module._parameters[name] = made[id(old)]
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = module in quantised
        if module in quantised and module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    model.initialize_weights()
    keep_trainable(model)


def loaded_bytes(model: Any, part: Any) -> int:
    """Return the bytes that transformers reserves for a part's weights before it loads them.

    The sum of modeling_utils.py, `get_total_byte_count`: a 4-bit weight counts half a byte.
    """
    packed = {id(layer.weight) for layer in quantised_layers(model)}
    return sum(
        p.numel() // 2 if id(p) in packed else p.numel() * p.element_size()
        for p in part.parameters()
    )


def quantised_layers(model: Any) -> set[Any]:
    """Return the 4-bit layers of a model; empty without bitsandbytes' layers."""
    import sys

    if "bitsandbytes" not in sys.modules:
        return set()
    import bitsandbytes as bnb

    return {module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)}


def quantise_layer(layer: Any, values: torch.Tensor) -> None:
    """Quantise real values into a bitsandbytes layer, the way transformers does when it loads."""
    import bitsandbytes as bnb

    old = layer.weight
    layer.weight = bnb.nn.Params4bit(
        values,
        requires_grad=False,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to(values.device)


def keep_trainable(model: Any) -> None:
    """Keep 4-bit layers from repacking their weights for inference.

    On a CPU with AVX512-BF16 the first forward pass without gradient repacks a layer's weight for a
    kernel that has no backward pass, and training goes on with wrong gradients and no word
    (bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward).
    """
    for layer in quantised_layers(model):
        layer.support_avx512bf16_for_cpu = False


def require_packages(config: RunConfig, device: str) -> None:
    """Refuse a configuration whose packages or device are not here.

    Raises:
        UnavailableError: Naming what is missing.
    """
    from importlib.util import find_spec

    if not config.is_buildable:
        unsloth.require()
    if config.kernels == "liger":
        if device != "cuda":
            raise UnavailableError(
                '`kernels` "liger" needs a GPU: its kernels are written in Triton.'
            )
        if find_spec("liger_kernel") is None:
            raise UnavailableError(
                '`kernels` "liger" needs the package liger-kernel; install lora-advisor[gpu].'
            )
    if config.attention == "varlen" and device == "cuda":
        why_not = why_no_bounds(nvml.capability(), config.precision)
        if why_not is not None:
            raise UnavailableError(
                f'`attention` must be "sdpa" on this GPU, not "varlen": {why_not}.'
            )
    if config.attention == "flash_attention_2":
        if device != "cuda":
            raise UnavailableError('`attention` "flash_attention_2" needs a GPU.')
        if find_spec("flash_attn") is None:
            raise UnavailableError('`attention` "flash_attention_2" needs the package flash-attn.')
    if config.precision == "fp16" and device != "cuda" and config.trainer != "loop":
        raise UnavailableError('`precision` "fp16" needs a GPU: its loss scaling has no CPU form.')
