"""Weights as they lie in safetensors files: their names, types and sizes, read one by one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.errors import DataError

if TYPE_CHECKING:
    import torch

#: Names of types in the headers of safetensors files (safetensors/torch.py, `_TYPES`), those that
#: models are trained in.
_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
#: Bytes of a number, by the words of this program.
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a model.

    Attributes:
        file: Where it lies.
        dtype: "bf16", "fp16" or "fp32"; what the file calls it where it is none of these.
        shape: Its sizes.
        bytes: What it takes there.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        """Numbers in it."""
        return self.bytes // SIZES[self.dtype] if self.dtype in SIZES else 0

    def bytes_as(self, dtype: str) -> int:
        """Bytes of it in another type."""
        return self.count * SIZES[dtype] if self.count else self.bytes


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """The tensors of a model, by name, in the order of its files.

    Attributes:
        tensors: The tensors.
        dtype: The type that most of its numbers have.
    """

    tensors: Mapping[str, StoredTensor]
    dtype: str

    @property
    def bytes(self) -> int:
        """What all take."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, mapped from its file: memory is taken only by what is written to."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def type_of(self, name: str, dtype: str) -> str:
        """Return the type a tensor gets where the model's becomes `dtype`.

        What a model stores in another precision than the rest, it computes in it: that stays.
        """
        own = self.tensors[name].dtype
        return dtype if own == self.dtype else own


def stored_weights(folder: Path) -> StoredWeights:
    """Read the headers of a model's safetensors files.

    Raises:
        DataError: A file cannot be read, or none holds numbers of a known type.
    """
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(named)]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(_header(file))
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in SIZES:
            counts[tensor.dtype] += tensor.count
    if not counts:
        raise DataError(
            f"`{folder}` must hold weights in bf16, fp16 or fp32, but holds none; give the model "
            "as its authors published it."
        )
    return StoredWeights(tensors=tensors, dtype=counts.most_common(1)[0][0])


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(
                stream.read(int.from_bytes(stream.read(8), "little"))
            )
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(f"`{file}` must be a safetensors file, but {error}.") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file=file,
            dtype=_FLOATS.get(entry["dtype"], entry["dtype"]),
            shape=tuple(entry["shape"]),
            bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def torch_type(dtype: str) -> torch.dtype:
    """Return torch's name of a type."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
