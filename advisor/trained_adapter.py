"""An adapter on disk: where it lies, what it was trained on, and what it adds to each weight."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.outcome import TrainingResult
from lora_advisor.advisor.run_folder import ADAPTER, RESULT
from lora_advisor.probes.architectures import Architecture, resolve_architecture
from lora_advisor.probes.errors import DataError, MissingInputError, UsageError

if TYPE_CHECKING:
    import torch

#: What peft puts before a module's name (peft_model.py: PeftModel.base_model.model).
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """An adapter.

    Attributes:
        folder: Its folder.
        run: Folder of the training it came from; None where that is not known.
        result: What came of the training; None where that is not known.
        peft: Content of adapter_config.json.
    """

    folder: Path
    run: Path | None
    result: TrainingResult | None = field(repr=False)
    peft: Mapping[str, Any] = field(repr=False)

    @property
    def quantised(self) -> str | None:
        """Type of the 4-bit base it was trained on; None for 16 bits, or where it is unknown."""
        return None if self.result is None else self.result.config.quant_type


def find_adapter(path: Path) -> TrainedAdapter:
    """Find the adapter in a run's folder, or in a folder of its own.

    Raises:
        MissingInputError: There is none.
        UsageError: There is a full model instead.
        DataError: Its configuration, or the run's result, cannot be read.
    """
    folder = path / ADAPTER if (path / ADAPTER).is_dir() else path
    if not (folder / "adapter_config.json").is_file():
        if (folder / "config.json").is_file():
            raise UsageError(f"`{folder}` is a full model already: there is no adapter to merge.")
        raise MissingInputError(
            f"`{path}` must be the folder of a training or of an adapter, but it holds no "
            "adapter_config.json."
        )
    peft = _read(folder / "adapter_config.json")
    run = folder.absolute().parent
    result = None
    if (run / RESULT).is_file():
        try:
            result = TrainingResult.from_json(_read(run / RESULT))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"`{run / RESULT}` must be the result of a training, but misstates {error}."
            ) from None
        if result.adapter.name != folder.name:
            result = None
    return TrainedAdapter(
        folder=folder, run=None if result is None else run, result=result, peft=peft
    )


def base_of(adapter: TrainedAdapter, base: str | None) -> Architecture:
    """Return the model an adapter belongs to, its weights in a folder here.

    Args:
        adapter: The adapter.
        base: The model; None for the one it names.

    Raises:
        MissingInputError: The model or its weights are not there.
        UsageError: Its weights are stored quantised.
    """
    named = base or adapter.peft.get("base_model_name_or_path")
    if not named:
        raise UsageError(
            "`--base` must be given: adapter_config.json does not name the base model."
        )
    try:
        architecture = resolve_architecture(str(named))
    except MissingInputError as error:
        raise MissingInputError(f"{error} Where the base model has moved, give --base.") from None
    if architecture.weights is None:
        raise MissingInputError(
            f"`{named}` must come with weights, but only its figures are here; give --base."
        )
    if "quantization_config" in architecture.hf_config:
        raise UsageError(
            f"`{named}` must be unquantised to be merged into, but its weights are stored "
            "quantised; give the model it was made from with --base."
        )
    return dataclasses.replace(architecture, weights=str(_here(architecture.weights)))


def _here(weights: str) -> Path:
    """Return the folder of a model's files, fetched from the hub where it is a hub id."""
    folder = Path(weights)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(weights, allow_patterns=["*.safetensors", "*.json", "*.jinja",
                                                               "*.model", "*.txt"]))  # fmt: skip
    except Exception as error:  # the hub's client raises what its transport chose
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingInputError(
            f"`{weights}` must be a model that the hub serves, but it cannot be fetched ({reason})."
        ) from None


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What an adapter adds to a weight: scale * b @ a, or that transposed.

    Attributes:
        a: Of shape (rank, inputs).
        b: Of shape (outputs, rank).
        scale: alpha / rank, or alpha / sqrt(rank).
        transposed: Whether the weight is stored as (inputs, outputs).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def delta(self) -> torch.Tensor:
        """Return what is added, in fp32."""
        product = (self.b.float() @ self.a.float()) * self.scale
        return product.T if self.transposed else product


def low_ranks(adapter: TrainedAdapter) -> dict[str, LowRank] | None:
    """Return what a plain LoRA adapter adds, by the weight's name; None for another adapter."""
    import math

    from peft import LoraConfig, PeftConfig
    from peft.utils import load_peft_weights

    config: Any = PeftConfig.from_pretrained(str(adapter.folder))
    usual = LoraConfig()
    differs = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices",
               "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora", "kasa_config",
               "velora_config", "alora_invocation_tokens", "layer_replication", "arrow_config",
               "corda_config", "bias")  # fmt: skip
    if config.peft_type != "LORA" or any(
        getattr(config, name, None) != getattr(usual, name, None) for name in differs
    ):
        return None
    tensors = load_peft_weights(str(adapter.folder), device="cpu")
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    found = {}
    for name, a in tensors.items():
        module, marker, rest = name.removeprefix(_PREFIX).partition(".lora_A.")
        if marker != ".lora_A." or rest != "weight" or a.dim() != 2:
            if ".lora_B.weight" in name:
                continue
            return None
        b = tensors[f"{_PREFIX}{module}.lora_B.weight"]
        found[f"{module}.weight"] = LowRank(
            a=a, b=b, scale=scale, transposed=bool(config.fan_in_fan_out)
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"`{file}` must be JSON, but {error}.") from None
    if not isinstance(data, dict):
        raise DataError(f"`{file}` must be a JSON object.")
    return data
