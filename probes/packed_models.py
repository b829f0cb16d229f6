"""Which models' packed rows can be kept apart by where each document begins, without a mask."""

from __future__ import annotations

from typing import Any

from lora_advisor.probes.architectures import (
    Architecture,
    attention_of,
    build_hf_config,
    causal_model_of,
)

#: Why a model is not among them.
NOT_TOLD = "its layers have windows or masks of their own, or cannot be told where documents begin"


def attentions_of(architecture: Architecture) -> tuple[str, ...]:
    """Return what a model's rows may be attended with, and last what suits packed rows best."""
    plain = attention_of(architecture)
    return (plain, "varlen") if plain == "sdpa" and takes_bounds(architecture) else (plain,)


def takes_bounds(architecture: Architecture) -> bool:
    """Whether a model's attention can be told where each document of a packed row begins.

    Its layers must hand on to their attention what they are not asked for themselves (transformers'
    `_supports_attention_backend`), be causal, and add no mask of their own. The kernel takes heads
    of at most 256 numbers, a multiple of 8, with keys as wide as values. Windows and chunks are
    left to masks. A configuration that does not say, or says it layer by layer, is not taken.
    """
    from transformers import AutoModelForMaskedLM

    config = build_hf_config(architecture)
    text: Any = config.get_text_config()
    figures = text.to_dict()
    hidden, heads, longest = (
        figures.get(text.attribute_map.get(name, name)) or 0
        for name in ("hidden_size", "num_attention_heads", "max_position_embeddings")
    )
    width = figures.get("head_dim") or (hidden // heads if heads else None)
    if not longest or not isinstance(width, int) or width > 256 or width % 8:
        return False
    window = figures.get("sliding_window") if figures.get("use_sliding_window", True) else None
    masked: Any = AutoModelForMaskedLM._model_mapping  # encoders, which see both ways
    kinds = {"full_attention", *(["sliding_attention"] if window and window >= longest else [])}
    return (
        getattr(causal_model_of(architecture), "_supports_attention_backend", False)
        and figures["model_type"] not in _NOT_TOLD
        and type(config) not in masked
        and not config.is_encoder_decoder
        and "v_head_dim" not in figures
        and not figures.get("attention_chunk_size")
        and not (window and window < longest)
        and set(figures.get("layer_types") or ()) <= kinds
    )


#: Model types whose layers mask every row themselves (modeling_doge.py), or see both ways.
_NOT_TOLD = ("doge", "bert-generation")
