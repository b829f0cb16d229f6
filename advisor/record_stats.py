"""What a user's records hold, by machine, stack and model, and how far the models are off."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_advisor.advisor.portable import name_of, portable
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.record_store import once
from lora_advisor.probes.architectures import from_hf_config
from lora_advisor.probes.cards import card_of
from lora_advisor.probes.errors import AdvisorError
from lora_advisor.probes.machine import Machine, Stack, detect_stack
from lora_advisor.probes.prediction import Prediction
from lora_advisor.probes.record import ProbeResult

#: Below so many timed runs no half of them teaches a model anything worth a figure.
_LEAST_TAUGHT = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Off:
    """How far predictions are from what was measured.

    Attributes:
        runs: Runs behind the figure.
        median: Median of the absolute error, as a share of what was measured.
    """

    runs: int
    median: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The runs of one architecture on one machine with one stack. None is "unknown".

    Attributes:
        machine: Where they ran.
        stack: With what.
        model: Name of the architecture, or its fingerprint.
        architecture: Its fingerprint.
        runs: How many, each once.
        imported: Of these, imported ones.
        outcomes: How many ended how, the most frequent first.
        doubtful: Runs whose time cannot be trusted.
        allocator: Error of the traced peak of the allocator, nothing measured.
        process: Likewise of the process; of a CPU, its resident size.
        speed: Error of the traced tokens/s, nothing measured; None where the card is not in the
            table.
        taught_speed: The same where the models knew every other run of the group.
        not_predicted: Runs that ended well and cannot be predicted, or would take long to.
        same_stack: Whether the stack is the one here, with which predictions are made.
    """

    machine: Machine
    stack: Stack
    model: str
    architecture: str
    runs: int
    imported: int
    outcomes: tuple[tuple[str, int], ...]
    doubtful: int
    allocator: Off | None = None
    process: Off | None = None
    speed: Off | None = None
    taught_speed: Off | None = None
    not_predicted: int = 0
    same_stack: bool = True


def groups_of(
    own: Sequence[ProbeResult],
    imported: Sequence[ProbeResult],
    *,
    errors: bool,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Group, ...]:
    """Return the groups, the largest first.

    Args:
        own: Runs of this user.
        imported: Runs of others.
        errors: Whether to predict each run, which traces what is not in the cache.
        cache: File that keeps traces.
        say: Called with a line of progress.
    """
    mine = {portable(result).hash for result in own}
    parts: dict[tuple[Machine, Stack, str], list[ProbeResult]] = defaultdict(list)
    foreign: Counter[tuple[Machine, Stack, str]] = Counter()
    for line in once([*own, *imported]):
        key = (line.result.machine, line.result.stack, line.result.architecture)
        parts[key].append(line.result)
        foreign[key] += line.hash not in mine
    found = []
    for key, results in sorted(parts.items(), key=lambda item: -len(item[1])):
        found.append(_group(key, results, foreign[key], errors=errors, cache=cache, say=say))
    return tuple(found)


def _group(
    key: tuple[Machine, Stack, str],
    results: Sequence[ProbeResult],
    imported: int,
    *,
    errors: bool,
    cache: Path | None,
    say: Callable[[str], None],
) -> Group:
    machine, stack, fingerprint = key
    model = name_of(results[0].hf_config, fingerprint)
    off: dict[str, Off | None] = {}
    left = 0
    if errors:
        say(f"predicting {len(results)} runs of {model} on {machine.name}")
        off, left = _errors(results, machine, model, cache)
    return Group(
        machine=machine,
        stack=stack,
        model=model,
        architecture=fingerprint,
        runs=len(results),
        imported=imported,
        outcomes=tuple(Counter(result.outcome for result in results).most_common()),
        doubtful=sum(bool(result.doubts) for result in results),
        not_predicted=left,
        same_stack=stack == detect_stack(),
        **off,
    )


def _errors(
    results: Sequence[ProbeResult], machine: Machine, model: str, cache: Path | None
) -> tuple[dict[str, Off | None], int]:
    """Predict the runs that ended well, and say how far that is off, and how many could not be."""
    predictor = Predictor.start(
        from_hf_config(model, results[0].hf_config),
        machine,
        card_of(machine) if machine.kind == "cuda" else None,
        limit_bytes=machine.memory_bytes,
        cache=cache,
    )
    ended = [result for result in results if result.outcome == "ok"]
    # What is compiled, or another engine's, is not traced here: minutes each, or not at all.
    tried = [r for r in ended if r.config.is_buildable and r.config.compile == "off"]
    try:
        predictor.prepare([result.config for result in tried])
        pairs = _predicted(predictor, tried)
        runs = [result for result, _ in pairs]
        off = {
            "allocator": _off([(p.memory.reserved_bytes, r.reserved_bytes) for r, p in pairs]),
            "process": _off([(p.memory.process_bytes, r.process_bytes) for r, p in pairs]),
            "speed": _speed(pairs),
            "taught_speed": _speed(_taught(predictor, runs)),
        }
    finally:
        predictor.store.close()
    return off, len(ended) - len(pairs)


Pairs = list[tuple[ProbeResult, Prediction]]


def _predicted(predictor: Predictor, results: Sequence[ProbeResult]) -> Pairs:
    pairs = []
    for result in results:
        try:
            pairs.append((result, predictor.predict(result.config)))
        except AdvisorError:  # a step that cannot be traced, a package that is not here
            continue
    return pairs


def _taught(predictor: Predictor, results: Sequence[ProbeResult]) -> Pairs:
    """Predict each half of the runs after learning from the other."""
    timed = [result for result in results if result.step_s and not result.doubts]
    if len(timed) < _LEAST_TAUGHT:
        return []
    halves = timed[::2], timed[1::2]
    return [
        pair
        for known, asked in (halves, halves[::-1])
        for pair in _predicted(predictor.learn(known), asked)
    ]


def _speed(pairs: Pairs) -> Off | None:
    return _off(
        [
            (None if p.tokens_per_s is None else p.tokens_per_s.value, r.tokens_per_s)
            for r, p in pairs
            if not r.doubts
        ]
    )


def _off(pairs: Sequence[tuple[float | None, float | None]]) -> Off | None:
    shares = [abs(said / was - 1) for said, was in pairs if said is not None and was]
    return Off(runs=len(shares), median=statistics.median(shares)) if shares else None
