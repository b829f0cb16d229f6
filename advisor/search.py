"""Search the space with Optuna over the models; nothing is run here."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.space import Space
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.plan import Candidate

#: Of two configurations whose predicted speed differs by less, the plainer one is taken.
_TIE = 0.002
_PLAIN = {
    "allocator": "default",
    "optimizer": "adamw_torch_fused",
    "kernels": "none",
    "compile": "off",
}


@dataclass(frozen=True)
class SearchResult:
    """What the search looked at.

    Attributes:
        feasible: Candidates that fit or may fit, best first.
        infeasible: Candidates that do not fit, least memory first.
        trials: Number of trials.
    """

    feasible: tuple[Candidate, ...]
    infeasible: tuple[Candidate, ...]
    trials: int


#: Knobs that move memory a little and speed hardly at all with an adapter; they are varied only
#: around the best arms.
_SECONDARY = ("optimizer", "allocator")
_ARMS_VARIED = 2
#: From this many cores on, this many sizes of the bisection are traced ahead.
_MANY_CORES = 8
_AHEAD = 4


def search(
    space: Space,
    predictor: Predictor,
    *,
    objective: str,
    seed: int,
    free_trials: int = 3,
    progress: Callable[[int], None] = lambda done: None,
) -> SearchResult:
    """Look for the best configurations under the memory bound.

    The study is Optuna's, with the bound as a constraint. It starts with every arm in its plain
    form, its micro-batches in the order of a bisection (what is smaller than one that fits is not
    faster, what is larger than one that does not fit does not fit either; both are pruned), goes on
    with the secondary knobs of the best arms, and ends with trials of TPE's own choice.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seen: dict[RunConfig, Candidate] = {}

    def run(trial: optuna.Trial) -> float:
        choice = {k: trial.suggest_categorical(k, list(v)) for k, v in space.axes.items()}
        progress(trial.number + 1)
        if space.is_pointless(choice):
            raise optuna.TrialPruned
        try:
            config = space.config(choice)
        except UsageError:
            raise optuna.TrialPruned from None
        if _settled(config, seen):
            raise optuna.TrialPruned
        candidate = seen.setdefault(config, predictor.candidate(config))
        trial.set_constraint("memory", _excess(candidate, predictor.limit_bytes))
        return score(candidate, objective)

    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def look_at(choices: Sequence[dict[str, Any]]) -> None:
        """Run trials on these choices, those of one micro-batch after the other."""
        for micro_batch in dict.fromkeys(choice["micro_batch"] for choice in choices):
            level = [choice for choice in choices if choice["micro_batch"] == micro_batch]
            configs = [c for c in _legal(space, level) if not _settled(c, seen)]
            predictor.prepare(configs)
            for choice in level:
                study.enqueue_trial(choice)
            study.optimize(run, n_trials=len(level))

    plain = _plain_choices(space)
    if (os.cpu_count() or 1) >= _MANY_CORES:
        # Cores are idle, so what the bisection may ask for is traced before it asks.
        sizes = list(dict.fromkeys(choice["micro_batch"] for choice in plain))[:_AHEAD]
        ahead = [choice for choice in plain if choice["micro_batch"] in sizes]
        predictor.prepare(_legal(space, ahead))
    look_at(plain)
    look_at(_varied_choices(space, rank(_fitting(seen), objective)))
    study.optimize(run, n_trials=free_trials)
    predictor.store.release_workers()
    return SearchResult(
        tuple(
            rank([c for c in seen.values() if c.prediction.verdict != "does not fit"], objective)
        ),
        tuple(c for c in seen.values() if c.prediction.verdict == "does not fit"),
        len(study.trials),
    )


def _legal(space: Space, choices: Sequence[dict[str, Any]]) -> list[RunConfig]:
    """Return the configurations of those choices that are legal."""
    configs = []
    for choice in choices:
        with contextlib.suppress(UsageError):
            configs.append(space.config(choice))
    return configs


def _plain_choices(space: Space) -> list[dict[str, Any]]:
    """Return every arm with the first value of each secondary knob."""
    axes = {
        knob: values[:1] if knob in _SECONDARY else values for knob, values in space.axes.items()
    }
    axes["micro_batch"] = tuple(_bisection(sorted(axes.pop("micro_batch"))))
    choices = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [choice for choice in choices if not space.is_pointless(choice)]


def _varied_choices(space: Space, best: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return the secondary knobs' values around the best arms, larger micro-batches included."""
    choices = []
    arms: list[RunConfig] = []
    for candidate in best:
        arm = candidate.config.replace(micro_batch=1, accumulation=1)
        if arm in arms or len(arms) == _ARMS_VARIED:
            continue
        arms.append(arm)
        larger = [n for n in space.axes["micro_batch"] if n >= candidate.config.micro_batch]
        for values in itertools.product(*(space.axes[knob] for knob in _SECONDARY)):
            for micro_batch in _bisection(sorted(larger)):
                known = {knob: getattr(candidate.config, knob) for knob in space.axes}
                varied = dict(zip(_SECONDARY, values, strict=True))
                choices.append({**known, **varied, "micro_batch": micro_batch})
    return choices


def _bisection(values: Sequence[int]) -> list[int]:
    """Return values in the order in which a bisection may ask for them: the middle first."""
    order, parts = [], [list(values)]
    while parts:
        part = parts.pop(0)
        if part:
            middle = len(part) // 2
            order.append(part[middle])
            parts += [part[middle + 1 :], part[:middle]]
    return order


def _settled(config: RunConfig, seen: dict[RunConfig, Candidate]) -> bool:
    """Whether another micro-batch of the same configuration settles this one."""
    for other, candidate in seen.items():
        verdict = candidate.prediction.verdict
        if (verdict == "fits" and other.micro_batch > config.micro_batch) or (
            verdict == "does not fit" and other.micro_batch < config.micro_batch
        ):
            size = {"micro_batch": config.micro_batch, "accumulation": config.accumulation}
            if other.replace(**size) == config:
                return True
    return False


def _fitting(seen: dict[RunConfig, Candidate]) -> list[Candidate]:
    return [c for c in seen.values() if c.prediction.verdict == "fits"]


def _excess(candidate: Candidate, limit_bytes: int) -> float:
    """How far the bound of the process is above the limit, as a share of it; negative within."""
    return candidate.prediction.memory.process_upper_bytes / limit_bytes - 1


def score(candidate: Candidate, objective: str) -> float:
    """Return what is maximised.

    Where nothing is known of the device's speed, more tokens in one micro-batch stand for more
    speed, which holds until the device is busy.
    """
    speed = candidate.tokens_per_s
    plainness: int = sum(getattr(candidate.config, knob) == value for knob, value in _PLAIN.items())
    tie = 1 + _TIE * plainness / len(_PLAIN)
    if objective == "joules_per_token":
        measured = None if candidate.measured is None else candidate.measured.joules_per_token
        # What was not measured ranks below what was, the faster first.
        return tie / measured if measured else -1 / (speed or candidate.config.tokens)
    return (speed if speed is not None else candidate.config.tokens) * tie


def rank(candidates: Sequence[Candidate], objective: str) -> list[Candidate]:
    """Return candidates best first."""
    return sorted(candidates, key=lambda c: score(c, objective), reverse=True)
