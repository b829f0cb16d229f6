"""How a plan came about: what ran, in order, with what was expected of it before, and the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.prediction import Interval, Prediction
from lora_advisor.probes.record import ProbeResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """One probe of a plan. None is "unknown".

    Attributes:
        why: "baseline", "most promising", "proof", or "earlier" for one of an earlier plan.
        config: What ran.
        outcome: As in `ProbeResult`.
        detail: The error's first line, or what is noteworthy.
        layers: Decoder layers that ran; None for all.
        doubts: Why its time is not to be trusted.
        started_at: UTC, ISO 8601.
        expected_tokens_per_s: What the models said before it ran; None where nothing was known, or
            only part of the layers ran.
        expected_process_bytes: Likewise of the process.
        expected_evidence: How that was known.
        tokens_per_s: Measured, padding included.
        process_bytes: Measured peak of the process.
    """

    why: str
    config: RunConfig
    outcome: str
    detail: str | None = None
    layers: int | None = None
    doubts: tuple[str, ...] = ()
    started_at: str | None = None
    expected_tokens_per_s: Interval | None = None
    expected_process_bytes: int | None = None
    expected_evidence: str | None = None
    tokens_per_s: float | None = None
    process_bytes: int | None = None

    @classmethod
    def of(
        cls,
        result: ProbeResult,
        why: str,
        expected: Prediction | None = None,
        layers: int | None = None,
    ) -> Self:
        """Return what is kept of a probe.

        Args:
            result: How it ended.
            why: Why it ran.
            expected: What the models said before; None where they were not asked.
            layers: Decoder layers that ran; None for all, of which alone `expected` speaks.
        """
        if layers is not None:
            expected = None
        return cls(
            why=why,
            config=result.config,
            outcome=result.outcome,
            detail=result.detail,
            layers=layers,
            doubts=result.doubts,
            started_at=result.started_at,
            expected_tokens_per_s=None if expected is None else expected.tokens_per_s,
            expected_process_bytes=None if expected is None else expected.memory.process_bytes,
            expected_evidence=None if expected is None else expected.evidence,
            tokens_per_s=result.tokens_per_s,
            process_bytes=result.process_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        speed = self.expected_tokens_per_s
        return {
            **data,
            "config": self.config.to_json(),
            "doubts": list(self.doubts),
            "expected_tokens_per_s": None if speed is None else dataclasses.asdict(speed),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form; fields of newer versions are dropped."""
        values = _known(cls, data)
        speed = data.get("expected_tokens_per_s")
        return cls(
            **{
                **values,
                "config": RunConfig.from_json(data["config"]),
                "doubts": tuple(data.get("doubts") or ()),
                "expected_tokens_per_s": None if speed is None else Interval(**speed),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Considered:
    """A configuration the search looked at, in short.

    Attributes:
        what: The configuration in a few words.
        tokens_per_s: What is known of its speed; None for nothing.
        process_bytes: What the process is expected to hold.
        verdict: As in `Prediction`.
    """

    what: str
    tokens_per_s: float | None
    process_bytes: int
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form; fields of newer versions are dropped."""
        return cls(**_known(cls, data))


def _known(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {key: value for key, value in data.items() if key in names}
