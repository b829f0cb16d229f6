"""What all tests share: no network, no CUDA tests where torch has no CUDA device, a tiny model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

# Before anything imports transformers; probes and other children inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Where Unsloth really is, for the tests that run it; all others are as if there were none.
_folder = os.environ.pop("LORA_ADVISOR_UNSLOTH", None)
if _folder:
    os.environ["LORA_ADVISOR_TEST_UNSLOTH"] = _folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where they cannot run; without any, torch stays unimported."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked or _has_cuda():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


def _has_cuda() -> bool:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver too old for torch is a reason, not a failure
        return torch.cuda.is_available()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in fp32, its tokenizer and data; some files have one of their own."""
    import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_model(folder)
    tiny_model.save_rows(folder / "rows.jsonl")
    return folder
