"""Traces of one architecture, each made once, several at a time, and interpolated where exact."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_advisor.models.memory import TracedMemory, traced_memory
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Trace
from lora_advisor.probes.extend import between, trace_all_layers

#: Processes that trace side by side; each holds 0.6 GiB.
_WORKERS = 16
#: From here on a step does the same things whatever the micro-batch: TRL's loss takes tiles of 4096
#: tokens (trl/kernels/chunked_logprob.py), bitsandbytes changes kernels at 1536.
_REGULAR_TOKENS = 4096


@dataclass
class TraceStore:
    """Traces of one architecture, each made once; micro-batches are interpolated where exact."""

    architecture: Architecture
    traces: dict[RunConfig, Trace] = field(default_factory=dict)
    memories: dict[tuple[RunConfig, str | None, int], TracedMemory] = field(default_factory=dict)

    def memory(self, config: RunConfig, capability: str | None, limit_bytes: int) -> TracedMemory:
        """Return what a configuration's trace comes to on a card's allocator."""
        kept = config.replace(accumulation=min(config.accumulation, 2), compile="off")
        key = (kept, capability, limit_bytes)
        if key not in self.memories:
            self.memories[key] = traced_memory(
                self.get(config),
                capability,
                expandable=config.allocator == "expandable_segments",
                # A run that reserves less than 70 % of the limit fits whatever the bound.
                ample_bytes=int(0.7 * limit_bytes),
                limit_bytes=limit_bytes,
            )
        return self.memories[key]

    def get(self, config: RunConfig) -> Trace:
        """Return the trace of a configuration.

        More than two micro-batches in a step repeat the second; the predictor counts them.
        """
        config = _traced_as(config)
        if config not in self.traces:
            self.traces[config] = self._interpolated(config) or trace_all_layers(
                config, self.architecture
            )
        return self.traces[config]

    def prepare(self, configs: Iterable[RunConfig]) -> None:
        """Trace what is missing for these configurations, several at a time where cores allow."""
        missing = []
        for config in dict.fromkeys(_traced_as(config) for config in configs):
            if config in self.traces:
                continue
            between_others = self._interpolated(config)
            if between_others is None:
                missing.append(config)
            else:
                self.traces[config] = between_others
        workers = min(os.cpu_count() or 1, _WORKERS, len(missing))
        if workers < 2:
            return
        from joblib import Parallel, delayed

        made = Parallel(n_jobs=workers)(
            delayed(_trace_in_worker)(config, self.architecture) for config in missing
        )
        self.traces.update(zip(missing, made, strict=True))

    @staticmethod
    def release_workers() -> None:
        """End the processes that traced, so that nothing runs beside a probe."""
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)

    def _interpolated(self, config: RunConfig) -> Trace | None:
        known = (
            sorted(
                (other.micro_batch, other)
                for other in self.traces
                if other.tokens >= _REGULAR_TOKENS
                and other.replace(micro_batch=config.micro_batch) == config
            )
            if config.tokens >= _REGULAR_TOKENS
            else []
        )
        if len(known) < 2:
            return None
        (low, first), (high, last) = known[0], known[-1]
        share = (config.micro_batch - low) / (high - low)
        return between(self.traces[first], self.traces[last], share=share)


def _trace_in_worker(config: RunConfig, architecture: Architecture) -> Trace:
    """Trace in another process, whose libraries shall be as quiet as they are here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return trace_all_layers(config, architecture)


def _traced_as(config: RunConfig) -> RunConfig:
    """Return the configuration whose trace stands for this one.

    More than two micro-batches in a step repeat the second; the allocator's setting changes the
    replay, not the events; compiled code is traced in its eager form.
    """
    return config.replace(
        accumulation=min(config.accumulation, 2), allocator="default", compile="off"
    )
