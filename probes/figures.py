"""Figures of a config.json: which are impossible, and those of a model with fewer layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_advisor.probes.errors import DataError

#: What most model types call the number of their decoder layers.
_LAYERS = "num_hidden_layers"

#: Figures that a model may have for each of its layers.
_PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")

#: Figures that must be whole and at least 1 where a config.json gives them.
_COUNTS = ("hidden_size", _LAYERS, *_PER_LAYER, "vocab_size", "max_position_embeddings")

#: Above these a config.json is taken for damaged: ten times the largest published models.
_CEILINGS = {"hidden_size": 300_000, _LAYERS: 2_000, "vocab_size": 3_000_000}


def count_layers(figures: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers; None where the figures do not say it."""
    if figures.get("is_encoder_decoder"):
        return None  # theirs is the number of encoder layers (attribute_map of BartConfig)
    layers = _language_part(figures).get(_layers_key(figures))
    return None if layers is None else int(layers)


def cut_layers(figures: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the figures of the model with only its first `layers` decoder layers."""
    part, key = _language_part(figures), _layers_key(figures)
    before = part.get(key)
    shorter = {**part, key: layers}
    for name, value in part.items():
        if isinstance(value, list) and len(value) == before:  # one entry for each layer
            shorter[name] = value[:layers]
    return shorter if part is figures else {**figures, "text_config": shorter}


def check_hf_config(data: object, *, where: str) -> None:
    """Refuse figures no model can have.

    Raises:
        DataError: With the figure, what came, and what must hold.
    """
    if not isinstance(data, Mapping):
        raise DataError(
            f"{where}: a config.json must hold a JSON object, but got {type(data).__name__}."
        )
    if not isinstance(data.get("model_type"), str):
        raise DataError(
            f"{where}: `model_type` must name the architecture, but got {data.get('model_type')!r}."
        )
    for name in _COUNTS:
        _check_count(data, name, where)
    _check_heads(data, where)
    _check_layers(data, where)


def _check_count(figures: Mapping[str, Any], name: str, where: str, ceiling: int = 10**9) -> None:
    value = figures.get(name)
    if value is None:
        return
    ceiling = _CEILINGS.get(name, ceiling)
    for one in value if isinstance(value, list) and value and name in _PER_LAYER else [value]:
        if isinstance(one, bool) or not isinstance(one, int) or one < 1:
            raise DataError(
                f"{where}: `{name}` must be a whole number of at least 1, but got {value!r}."
            )
        if one > ceiling:
            raise DataError(f"{where}: `{name}` must be at most {ceiling}, but got {value}.")


def _check_heads(figures: Mapping[str, Any], where: str) -> None:
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    # A list has one number for each layer, which transformers checks.
    hidden, heads, kv_heads = (v if isinstance(v := figures.get(n), int) else None for n in names)
    if hidden and heads and figures.get("head_dim") is None and hidden % heads:
        raise DataError(
            f"{where}: `num_attention_heads` must divide `hidden_size`, but {heads} does not "
            f"divide {hidden}."
        )
    if heads and kv_heads and heads % kv_heads:
        raise DataError(
            f"{where}: `num_key_value_heads` must divide `num_attention_heads`, but {kv_heads} "
            f"does not divide {heads}."
        )


def _check_layers(figures: Mapping[str, Any], where: str) -> None:
    part, key = _language_part(figures), _layers_key(figures)
    if part is not figures:
        where = f"{where}: `text_config`"
    _check_count(part, key, where, _CEILINGS[_LAYERS])
    if part.get(key) is not None or part is not figures:
        return
    kind = _config_class(figures)
    # A type that transformers does not know is refused when it is built; some count their layers
    # from another figure (LongcatFlashConfig.num_hidden_layers).
    if kind is not None and not isinstance(getattr(kind, _LAYERS, None), property):
        raise DataError(f"{where}: `{key}` must be given.")


def _language_part(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of the language model within those of a model of several kinds."""
    part = figures.get("text_config")
    return part if isinstance(part, Mapping) else figures


def _layers_key(figures: Mapping[str, Any]) -> str:
    """Return what the language part calls the number of its layers.

    transformers, which knows the other names, is not imported where the common one is there.
    """
    if _language_part(figures).get(_LAYERS) is not None:
        return _LAYERS
    names = getattr(_config_class(figures), "attribute_map", {})
    return str(names.get(_LAYERS, _LAYERS))


def _config_class(figures: Mapping[str, Any]) -> Any:
    """Return transformers' class for the language part; None for a type it does not know."""
    from transformers import CONFIG_MAPPING

    part = _language_part(figures)
    kinds: Any = CONFIG_MAPPING
    for model_type in (part.get("model_type"), figures.get("model_type")):
        if model_type in kinds:
            kind = kinds[model_type]
            inner = part is not figures and model_type == figures.get("model_type")
            return kind.sub_configs.get("text_config") if inner else kind
    return None
