"""What keeps a trace from being noticed: no messages, and nothing of the process changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Put back what a Trainer sets for the whole process: the seeds and accelerate's state."""
    import random

    import numpy
    import torch
    from accelerate.state import (  # accelerate ships no types
        AcceleratorState,
        GradientState,
        PartialState,
    )

    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    python_seed, numpy_seed = random.getstate(), numpy.random.get_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call] # torch leaves it untyped
    devices = range(torch.cuda.device_count()) if on_gpu else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_seed)
        numpy.random.set_state(numpy_seed)
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' messages and progress bars from being shown."""
    import logging as levels
    import warnings

    import datasets
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # of packing the rows of a trace
    # Logs the stack of what it raises, which `_refusal` says in one sentence.
    fake_tensor = levels.getLogger("torch._subclasses.fake_tensor")
    disabled, fake_tensor.disabled = fake_tensor.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fake_tensor.disabled = disabled
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
