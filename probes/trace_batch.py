"""Trace several configurations side by side, in forks of a process that never ran a step.

A process that has run a backward pass cannot be forked any more: the autograd engine's threads do
not come along. A fork of the fork server has run none.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_advisor.probes import libraries
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError, UntraceableError
from lora_advisor.probes.events import Trace

#: Processes that trace side by side; each holds 0.6 GiB.
_WORKERS = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """What shall be traced, on cards of one compute capability.

    Attributes:
        configs: Configurations.
        architecture: The model's figures.
        capability: Compute capability of the card; None for a current one.
        then: What is made of each trace, beside the others' tracing; it must pickle.
    """

    configs: tuple[RunConfig, ...]
    architecture: Architecture
    capability: str | None
    then: tuple[Callable[[Trace], object] | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Made:
    """A trace, and what was made of it."""

    trace: Trace
    then: Any = None


def trace_quietly(config: RunConfig, architecture: Architecture, capability: str | None) -> Trace:
    """Trace, perhaps in another process, whose libraries shall be as quiet as they are here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    libraries.import_all(str(architecture.hf_config.get("model_type", "")).replace("-", "_"))
    from lora_advisor.probes.extend import trace_all_layers

    return trace_all_layers(config, architecture, capability=capability)


def write_batch(path: Path, batch: Batch) -> None:
    """Write what shall be traced."""
    path.write_bytes(pickle.dumps(batch))


def read_traces(path: Path) -> list[Made | AdvisorError]:
    """Read what `answer_batch` wrote, in the batch's order."""
    answers: Sequence[tuple[bytes, Any] | str] = pickle.loads(path.read_bytes())
    return [
        UntraceableError(answer)
        if isinstance(answer, str)
        else Made(Trace.from_bytes(answer[0]), answer[1])
        for answer in answers
    ]


def answer_batch(batch_file: Path, answer_file: Path) -> int:
    """Trace a batch in as many forks of this process as there are cores."""
    import multiprocessing

    batch: Batch = pickle.loads(batch_file.read_bytes())
    workers = min(os.cpu_count() or 1, _WORKERS, len(batch.configs))
    # The longest first, so that none of them is left for the end.
    order = sorted(range(len(batch.configs)), key=lambda place: _layers(batch.configs[place]))
    then = batch.then or (None,) * len(batch.configs)
    jobs = [
        (batch.configs[place], batch.architecture, batch.capability, then[place]) for place in order
    ]
    context: Any = multiprocessing.get_context("fork")
    with context.Pool(workers, initializer=_end_with_parent) as pool:
        made = dict(zip(order, pool.map(_traced, jobs, chunksize=1), strict=True))
    answers = [made[place] for place in range(len(made))]
    draft = answer_file.with_suffix(".tmp")
    draft.write_bytes(pickle.dumps(answers))
    draft.replace(answer_file)
    return 0


def _layers(config: RunConfig) -> tuple[int, bool]:
    """Order by how many layers a trace runs: as many more as are checkpointed together."""
    return -(config.checkpoint_every or 1), config.checkpoint_every is None


def _end_with_parent() -> None:
    import torch

    from lora_advisor.probes.worker import die_with_parent

    die_with_parent(None)
    torch.set_num_threads(1)


def _traced(
    job: tuple[RunConfig, Architecture, str | None, Callable[[Trace], object] | None],
) -> tuple[bytes, object] | str:
    config, architecture, capability, then = job
    try:
        trace = trace_quietly(config, architecture, capability)
    except AdvisorError as error:
        return str(error)
    return trace.to_bytes(), None if then is None else then(trace)
