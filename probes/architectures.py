"""`Architecture`: a model's figures without weights, from a bundled name, a file, or a hub id."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lora_advisor.probes.errors import AdvisorError, DataError, MissingInputError, UsageError
from lora_advisor.probes.figures import check_hf_config, count_layers, cut_layers


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The figures a model is built from.

    Attributes:
        name: What the user called it.
        hf_config: The content of its config.json.
        weights: Folder or hub id that holds the weights; None when there are only figures.
        source: Where the figures come from.
        trust_remote_code: Whether code that comes with the model may run.
    """

    name: str
    hf_config: Mapping[str, Any]
    weights: str | None = None
    source: str = ""
    trust_remote_code: bool = False

    @property
    def fingerprint(self) -> str:
        """Identity of the figures that decide memory and time; names and weights do not count."""
        ignored = {"_name_or_path", "architectures", "torch_dtype", "dtype", "transformers_version"}
        figures = {key: value for key, value in self.hf_config.items() if key not in ignored}
        text = json.dumps(figures, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def num_layers(self) -> int | None:
        """Number of decoder layers; None where the figures do not say it."""
        return count_layers(self.hf_config)


@cache
def bundled_names() -> tuple[str, ...]:
    """Names of the architectures that ship with the package."""
    folder = resources.files(__package__) / "bundled"
    return tuple(
        sorted(
            file.name[: -len(".json")] for file in folder.iterdir() if file.name.endswith(".json")
        )
    )


@cache
def hub_id_of(name: str) -> str | None:
    """Return the hub id of a bundled architecture, where its weights are; None for other names."""
    if name.lower() not in bundled_names():
        return None
    text = (resources.files(__package__) / "bundled" / f"{name.lower()}.json").read_text("utf-8")
    hub_id = json.loads(text).get("hub_id")
    return None if hub_id is None else str(hub_id)


def load_bundled(name: str) -> Architecture:
    """Read one architecture that ships with the package."""
    text = (resources.files(__package__) / "bundled" / f"{name}.json").read_text("utf-8")
    data = json.loads(text)
    return Architecture(name=name, hf_config=data["config"], source=data["source"])


def from_hf_config(name: str, hf_config: object, *, source: str = "given inline") -> Architecture:
    """Take the content of a config.json as it is.

    Raises:
        DataError: It is no JSON object, or a figure is impossible.
    """
    check_hf_config(hf_config, where=source)
    assert isinstance(hf_config, Mapping)
    return Architecture(name=name, hf_config=hf_config, source=source)


def resolve_architecture(model: str, *, trust_remote_code: bool = False) -> Architecture:
    """Find a model's figures.

    Args:
        model: Bundled name, folder, path of a config.json, or hub id.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        UsageError: No such bundled name, and neither a path nor a hub id.
        MissingInputError: The folder, file or hub id cannot be read.
        DataError: The config.json is malformed or impossible.
    """
    if model.lower() in bundled_names():
        return load_bundled(model.lower())
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, trust_remote_code)
    if path.is_file():
        return _from_file(path)
    if (
        model.count("/") == 1
        and not model.startswith((".", "/", "~"))
        and not model.endswith(".json")
    ):
        return _from_hub(model, trust_remote_code)
    if "/" in model or model.endswith(".json"):
        raise MissingInputError(
            f"`{model}` must be a folder or a config.json, but nothing is there."
        )
    close = difflib.get_close_matches(model.lower(), bundled_names(), n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"names: {', '.join(bundled_names())}."
    )
    raise UsageError(f"`{model}` is no bundled model, no folder and no hub id (owner/name); {hint}")


def _from_folder(folder: Path, trust_remote_code: bool) -> Architecture:
    file = folder / "config.json"
    if not file.is_file():
        raise MissingInputError(f"`{folder}` must hold a config.json, but it has none.")
    hf_config = _read_config(file)
    has_weights = any(folder.glob("*.safetensors"))
    if not has_weights and (any(folder.glob("*.bin")) or any(folder.glob("*.pt"))):
        raise DataError(
            f"`{folder}` must hold safetensors weights, but has only pickled ones, which can run "
            "code when read; convert them with save_pretrained first."
        )
    return Architecture(
        name=folder.name,
        hf_config=hf_config,
        weights=str(folder.resolve()) if has_weights else None,
        source=str(file),
        trust_remote_code=trust_remote_code,
    )


def _from_file(file: Path) -> Architecture:
    return Architecture(
        name=file.parent.name or file.stem, hf_config=_read_config(file), source=str(file)
    )


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"`{file}` must be JSON, but it cannot be read: {error}.") from None
    check_hf_config(data, where=str(file))
    assert isinstance(data, Mapping)
    return data


def _from_hub(hub_id: str, trust_remote_code: bool) -> Architecture:
    for name in bundled_names():
        text = (resources.files(__package__) / "bundled" / f"{name}.json").read_text("utf-8")
        data = json.loads(text)
        if str(data.get("hub_id", "")).lower() == hub_id.lower():
            return Architecture(
                name=hub_id,
                hf_config=data["config"],
                weights=hub_id,
                source=data["source"],
                trust_remote_code=trust_remote_code,
            )
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingInputError(
            f"`{hub_id}` must be a model that the hub serves, but its config.json cannot be "
            f"fetched ({reason}); check the name and the network, or give a folder."
        ) from None
    return Architecture(
        name=hub_id,
        hf_config=_read_config(file),
        weights=hub_id,
        source=f"https://huggingface.co/{hub_id}",
        trust_remote_code=trust_remote_code,
    )


def has_own_head(architecture: Architecture) -> bool:
    """Whether the head's weight is surely another than that of the input embeddings."""
    return architecture.hf_config.get("tie_word_embeddings") is False


def embedding_bytes(architecture: Architecture) -> int:
    """Return the bytes of the input embeddings in 16 bits; 0 where their size is not told."""
    figures = architecture.hf_config
    rows, width = figures.get("vocab_size"), figures.get("hidden_size")
    return 2 * rows * width if isinstance(rows, int) and isinstance(width, int) else 0


def build_hf_config(architecture: Architecture, *, layers: int | None = None) -> Any:
    """Return the transformers configuration object.

    Args:
        architecture: The figures.
        layers: Build with only this many decoder layers; None for all.

    Raises:
        UsageError: transformers does not know the architecture.
        DataError: transformers refuses the figures.
    """
    from transformers import AutoConfig

    figures = dict(architecture.hf_config)
    if layers is not None:
        figures = cut_layers(figures, layers)
    model_type = figures.pop("model_type")
    if "auto_map" in figures and not architecture.trust_remote_code:
        figures.pop("auto_map")
    try:
        config = AutoConfig.for_model(model_type, **figures)
    except ValueError as error:
        if "Unrecognized model identifier" in str(error) or "model_type" in str(error):
            raise UsageError(
                f"`{architecture.name}` is of model type {model_type!r}, which this version of "
                "transformers does not know; only architectures it can build are supported."
            ) from None
        raise DataError(f"`{architecture.name}` cannot be built: {_first_line(error)}") from None
    except AdvisorError:
        raise
    except Exception as error:  # transformers validates figures with many exception types
        raise DataError(f"`{architecture.name}` cannot be built: {_first_line(error)}") from None
    return config


def with_layers(architecture: Architecture, layers: int) -> Architecture:
    """Return the architecture cut to its first decoder layers, without weights."""
    return dataclasses.replace(
        architecture, hf_config=cut_layers(dict(architecture.hf_config), layers), weights=None
    )


def attention_of(architecture: Architecture) -> str:
    """Return "sdpa", or "eager" for a model that transformers builds without it (Gemma 2)."""
    return "sdpa" if getattr(causal_model_of(architecture), "_supports_sdpa", True) else "eager"


def causal_model_of(architecture: Architecture) -> Any:
    """Return transformers' class of the causal language model; None where it has none."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    return mapping.get(type(build_hf_config(architecture)), None)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
