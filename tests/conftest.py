"""What all tests share: no network, and no CUDA tests where torch has no CUDA device."""

from __future__ import annotations

import os
import warnings

import pytest

# Before anything imports transformers; probes and other children inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


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
