"""What the traces of one architecture come to: each made once, kept on disk, several at a time."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.step_work import StepWork
from lora_advisor.advisor.trace_cache import TraceCache, key_of
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.events import Trace, Work
from lora_advisor.probes.forkserver import ForkServer
from lora_advisor.probes.machine import detect_stack
from lora_advisor.probes.trace_batch import Batch, Made, trace_quietly
from lora_advisor.probes.unsloth import stand_in

if TYPE_CHECKING:
    from lora_advisor.probes.interpolate import Size

#: Traces that must be spared for a fork server to be worth its start, which imports for 7 s, in a
#: process that has imported the libraries itself.
_WORTH_A_SERVER = 5
#: From here on a step does the same things whatever the micro-batch: TRL's loss takes tiles of 4096
#: tokens (trl/kernels/chunked_logprob.py), bitsandbytes changes kernels below.
REGULAR_TOKENS = 4096


@dataclass
class TraceStore:
    """Traces of one architecture on cards of one capability.

    Attributes:
        architecture: The model's figures.
        capability: Compute capability of the card.
        cache: Where what traces came to is kept.
        traces: Those made or interpolated in this process.
        memories: What they came to, by configuration and cap of the allocator.
        works: Work of a step, by configuration.
        server: Forks what traces side by side; started when it is worth it.
    """

    architecture: Architecture
    capability: str | None
    cache: TraceCache = field(default_factory=lambda: TraceCache(None))
    traces: dict[RunConfig, Trace] = field(default_factory=dict)
    memories: dict[tuple[RunConfig, int], TracedMemory] = field(default_factory=dict)
    works: dict[RunConfig, StepWork] = field(default_factory=dict)
    server: ForkServer | None = None

    def memory(self, config: RunConfig, cap_bytes: int) -> TracedMemory:
        """Return what a configuration's trace comes to on the card's allocator."""
        kept = _replayed_as(config)
        if (kept, cap_bytes) not in self.memories:
            self._look_up(kept, cap_bytes)
        if (kept, cap_bytes) not in self.memories:
            self._keep_memory(kept, cap_bytes, _replay(kept, cap_bytes)(self.get(kept)))
        return self.memories[kept, cap_bytes]

    def work(self, config: RunConfig) -> StepWork:
        """Return the work of a step; of a model compiled as a whole, that of the eager one."""
        traced = _traced_as(config)
        if traced not in self.works:
            self._look_up(traced, None)
        if traced not in self.works:
            self.works[traced] = StepWork.of(self.get(traced))
        return self.works[traced]

    def get(self, config: RunConfig) -> Trace:
        """Return the trace of a configuration.

        More than two micro-batches in a step repeat the second; the predictor counts them.
        """
        config = _traced_as(config)
        if config not in self.traces:
            self.traces[config] = (
                self._interpolated(config) or self._kept(config) or self._made(config)
            )
        return self.traces[config]

    def prepare(
        self,
        configs: Iterable[RunConfig],
        cap_bytes: int | None = None,
        ahead: Sequence[RunConfig] = (),
    ) -> None:
        """Trace what is missing for these configurations, several at a time where cores allow.

        Args:
            configs: What will be asked for.
            cap_bytes: With it, what is known to the cache for this cap is not traced.
            ahead: What may be asked for next: traced on cores that would be idle.
        """
        missing = self._missing(configs, cap_bytes)
        idle = -len(missing) % (os.cpu_count() or 1)
        if idle and not has_imported():
            more = self._missing(ahead, cap_bytes)
            missing |= {c: more[c] for c in [c for c in more if c not in missing][:idle]}
        self._trace_together(missing, cap_bytes)

    def _missing(
        self, configs: Iterable[RunConfig], cap_bytes: int | None
    ) -> dict[RunConfig, RunConfig]:
        """Return what must be traced, and what is replayed of it; take up what is known."""
        missing: dict[RunConfig, RunConfig] = {}
        for config in configs:
            if cap_bytes is not None:
                self._look_up(_replayed_as(config), cap_bytes)
                if (_replayed_as(config), cap_bytes) in self.memories:
                    continue
            traced = _traced_as(config)
            if traced in self.traces or traced in missing:
                continue
            known = self._interpolated(traced) or self._kept(traced)
            if known is None:
                missing[traced] = _replayed_as(config)
            else:
                self.traces[traced] = known
        return missing

    def _trace_together(
        self, missing: Mapping[RunConfig, RunConfig], cap_bytes: int | None
    ) -> None:
        """Trace in forks, where that is sooner; what cannot be traced is told when asked for.

        Args:
            missing: What to trace, and the configuration to replay for.
            cap_bytes: Replay for this cap, in the forks as well; None to trace only.
        """
        cores = os.cpu_count() or 1
        if not missing or cores < 2:
            return
        imported = has_imported()  # else what is imported there need not be imported here
        if len(missing) < 2 and (imported or self.server is None):
            return
        if self.server is None:
            if imported and len(missing) * (1 - 1 / cores) < _WORTH_A_SERVER:
                return
            self.server = ForkServer.of(self.architecture)
        then = () if cap_bytes is None else tuple(_replay(c, cap_bytes) for c in missing.values())
        batch = Batch(tuple(missing), self.architecture, self.capability, then)
        for (config, replayed), made in zip(
            missing.items(), self.server.trace(batch) or (), strict=False
        ):
            if isinstance(made, Made):
                self._keep(config, made.trace)
                self.traces[config] = made.trace
                if cap_bytes is not None:
                    self._keep_memory(replayed, cap_bytes, made.then)

    def sampled(self, config: RunConfig, sizes: Sequence[Size]) -> dict[Size, Trace]:
        """Return the traces of a configuration at several sizes."""
        configs = {size: resized(config, size) for size in sizes}
        self.prepare(configs.values())
        return {size: self.get(changed) for size, changed in configs.items()}

    def close(self) -> None:
        """End the fork server, where one was started."""
        if self.server is not None:
            self.server.close()
            self.server = None

    @staticmethod
    def release_workers() -> None:
        """End the processes that replayed, so that nothing runs beside a probe."""
        if "joblib" not in sys.modules:
            return
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)

    def _key(self, config: RunConfig) -> str:
        return key_of(
            detect_stack(), self.capability, self.architecture.fingerprint, config.to_json()
        )

    def _look_up(self, kept: RunConfig, cap_bytes: int | None) -> None:
        """Take from the cache what it holds of a configuration."""
        entry = self.cache.get(self._key(kept))
        if entry is None or "work" not in entry:
            return
        work = StepWork(*(Work(**amount) for amount in entry["work"]))
        self.works.setdefault(_traced_as(kept), work)
        memory = entry["memory"].get(str(cap_bytes))
        if memory is not None and cap_bytes is not None:
            self.memories[kept, cap_bytes] = TracedMemory(**memory)

    def _keep_memory(self, kept: RunConfig, cap_bytes: int, memory: TracedMemory) -> None:
        self.memories[kept, cap_bytes] = memory
        key = self._key(kept)
        entry = self.cache.get(key) or {"memory": {}}
        entry["memory"][str(cap_bytes)] = dataclasses.asdict(memory)
        entry["work"] = self.work(kept).amounts()
        self.cache.put(key, entry)

    def _made(self, config: RunConfig) -> Trace:
        trace = trace_quietly(config, self.architecture, self.capability)
        self._keep(config, trace)
        return trace

    def _keep(self, config: RunConfig, trace: Trace) -> None:
        key = self._key(config)
        entry = self.cache.get(key) or {"memory": {}}
        entry["work"] = StepWork.of(trace).amounts()
        self.cache.put(key, entry, trace.to_bytes())

    def _kept(self, config: RunConfig) -> Trace | None:
        events = self.cache.events(self._key(config))
        return None if events is None else Trace.from_bytes(events)

    def _interpolated(self, config: RunConfig) -> Trace | None:
        from lora_advisor.probes.interpolate import between

        if config.tokens < REGULAR_TOKENS:
            return None
        known = sorted(
            (other.micro_batch, other)
            for other in self.traces
            if other.tokens >= REGULAR_TOKENS
            and other.replace(micro_batch=config.micro_batch) == config
        )
        if len(known) < 2:
            return None
        (low, first), (high, last) = known[0], known[-1]
        share = (config.micro_batch - low) / (high - low)
        return between(self.traces[first], self.traces[last], share=share)


def _replay(config: RunConfig, cap_bytes: int) -> Callable[[Trace], TracedMemory]:
    """Return what replays a configuration's trace."""
    from lora_advisor.models.replayed import traced_memory

    expandable = config.allocator == "expandable_segments"
    return functools.partial(traced_memory, expandable=expandable, cap_bytes=cap_bytes)


def has_imported() -> bool:
    """Whether this process has imported what a trace needs, which takes 5 s."""
    return "transformers.trainer" in sys.modules


def resized(config: RunConfig, size: Size) -> RunConfig:
    """Return a configuration with another micro-batch and sequence length."""
    return config.replace(micro_batch=size[0], seq_len=size[1])


def _traced_as(config: RunConfig) -> RunConfig:
    """Return the configuration whose trace stands for this one.

    More than two micro-batches in a step repeat the second; the allocator's setting changes the
    replay, not the events.
    """
    return _replayed_as(config).replace(allocator="default")


def _replayed_as(config: RunConfig) -> RunConfig:
    """Return the configuration whose replay stands for this one.

    A trace is of full rows, whatever their order. Another engine's step cannot be traced.
    """
    config = stand_in(config)
    changes: dict[str, Any] = {
        "accumulation": min(config.accumulation, 2),
        "group_by_length": False,
    }
    if config.compile == "model":
        changes["compile"] = "off"
    return config.replace(**changes)
