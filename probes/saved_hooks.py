"""Hooks of what autograd saves for the backward pass, counted: each runs Python for one tensor.

Activation checkpointing (`use_reentrant=False`) is made of them: what a layer saves is put aside by
one hook, saved anew by another, and asked for by a third (torch/utils/checkpoint.py,
`_checkpoint_hook` and `_recomputation_hook`). On a host that the device waits for they take as long
as the kernels' launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def counted_hooks(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` for every tensor that such a hook takes or returns, until this ends."""
    from torch.autograd.graph import saved_tensors_hooks

    original: Callable[..., None] = saved_tensors_hooks.__init__

    def counted(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(value: Any) -> Any:
            note()
            return hook(value)

        return call

    def start(self: Any, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
        original(self, counted(pack), counted(unpack))

    with mock.patch.object(saved_tensors_hooks, "__init__", start):
        yield
