"""What a trace puts in place of kernels it cannot run, so that their launches are counted.

Triton's kernels need a GPU. Where one would be launched, an operation that does nothing is called
with the tensors it reads and writes: a dispatch mode sees it and counts a launch and its bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: Names of the two operations, as a dispatch mode sees them.
FUSED, TRITON = "lora_advisor::fused_kernel", "lora_advisor::triton_kernel"


def _run(arguments: list[torch.Tensor]) -> None:
    """Do nothing: what a kernel writes is allocated before it is called."""


def _operation(name: str) -> Any:
    operation: Any = torch.library.custom_op(
        name, _run, mutates_args=(), schema="(Tensor[] arguments) -> ()"
    )
    operation.register_fake(_run)
    return operation


_fused, _triton = _operation(FUSED), _operation(TRITON)


def fused_kernel(*arguments: Any) -> None:
    """Stand for a kernel that Inductor wrote and its program launches."""
    _fused(_tensors(arguments))


def triton_kernel(*arguments: Any) -> None:
    """Stand for a Triton kernel that Python code launches."""
    _triton(_tensors(arguments))


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    return [value for value in arguments if isinstance(value, torch.Tensor)]


_running = False


@contextlib.contextmanager
def compiled_program() -> Iterator[None]:
    """Mark what runs until this ends as issued by a compiled program."""
    global _running
    before, _running = _running, True
    try:
        yield
    finally:
        _running = before


def in_compiled_program() -> bool:
    """Whether a compiled program runs."""
    return _running
