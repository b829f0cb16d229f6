"""Search the space with Optuna over the models; nothing is run here."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.seen import PLAIN, Seen
from lora_advisor.advisor.space import Space
from lora_advisor.advisor.traces import REGULAR_TOKENS
from lora_advisor.advisor.variations import EVERYWHERE, legal, varied_choices
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.plan import Candidate

if TYPE_CHECKING:
    import optuna

#: Of two configurations whose predicted speed differs by less, the plainer one is taken.
_TIE = 0.002
#: Excess of what may fit by its size and yet is not said to.
_NOT_SAID_TO_FIT = 1e-3
#: From this many cores on, what may be asked for is traced before it is: compiled layers take long
#: to trace, and a round lasts as long as the longest.
_MANY_CORES = 8
#: Of how many arms the smallest size is looked at beside the largest, where speeds are measured.
_ARMS_AT_THEIR_SMALLEST = 6

#: Configurations that differ in their size alone, ascending, and the choice that makes each.
Arm = dict[RunConfig, dict[str, Any]]


@dataclass(frozen=True)
class SearchResult:
    """What the search looked at.

    Attributes:
        feasible: Candidates that fit or may fit, best first.
        infeasible: Candidates that do not fit, least memory first.
        study: Optuna's study, a trial for each choice that was looked at.
    """

    feasible: tuple[Candidate, ...]
    infeasible: tuple[Candidate, ...]
    study: optuna.Study

    @property
    def trials(self) -> int:
        """Number of trials."""
        return len(self.study.trials)


def search(
    space: Space,
    predictor: Predictor,
    *,
    objective: str,
    seed: int,
    free_trials: int = 3,
    beside: Sequence[RunConfig] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> SearchResult:
    """Look for the best configurations under the memory bound.

    The study is Optuna's, with the bound as a constraint. It starts with every arm in its plain
    form, looks in each for the largest micro-batch that fits, goes on with the other knobs of the
    best arms (where none fits, of those that need least), and ends with trials of TPE's own choice.

    Args:
        space: Where to look.
        predictor: The models.
        objective: One of `spec.OBJECTIVES`.
        seed: Of Optuna's sampler.
        free_trials: Trials of TPE's own choice.
        beside: What is asked of later; traced with the first ones, side by side.
        progress: Called with the number of trials so far.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    size = _size_knob(space)
    seen = Seen(size, predictor.cap_bytes)
    free = False
    smallest: dict[RunConfig, dict[str, Any]] = {}

    def run(trial: optuna.Trial) -> float:
        # A knob of one value is none to a sampler, nor to who looks at the study.
        choice = {
            k: v[0] if len(v) == 1 else trial.suggest_categorical(k, list(v))
            for k, v in space.axes.items()
        }
        progress(trial.number + 1)
        config = legal(space, choice)
        if config is None or (config not in smallest and seen.settles(config)):
            raise optuna.TrialPruned
        if free and predictor.is_roofline and seen.has_better(config):
            raise optuna.TrialPruned
        candidate = seen.candidates.get(config)
        if candidate is None:
            predictor.prepare([config])
            candidate = predictor.candidate(config)
            seen.add(candidate)
        trial.set_constraint("memory", _excess(candidate, predictor))
        _note(trial, candidate)
        return score(candidate, objective)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))

    def look_at(choices: Sequence[dict[str, Any]]) -> None:
        for choice in choices:
            study.enqueue_trial(choice)
        study.optimize(run, n_trials=len(choices))

    arms = _plain_arms(space)
    if (os.cpu_count() or 1) >= _MANY_CORES:
        predictor.prepare(_telling(arms))
    while asked := [(arm, c) for arm in arms if (c := seen.next_of(list(arm))) is not None]:
        predictor.prepare([*(config for _, config in asked), *beside], _next_ones(asked, seen))
        look_at([arm[config] for arm, config in asked])
    best = rank(seen.that("fits"), objective)
    closest = sorted(seen.that("does not fit"), key=lambda one: one.prediction.memory.needed_bytes)
    varied = varied_choices(space, best or closest, seen, predictor)
    predictor.prepare(c for c in _legal_ones(space, varied) if not seen.settles(c))
    look_at(sorted(varied, key=lambda choice: choice[size], reverse=True))
    if size == "micro_batch" and not predictor.is_roofline:
        smallest = _smallest(arms, rank(seen.that("fits"), objective))
        predictor.prepare(smallest)
        look_at(list(smallest.values()))
    free = True
    study.optimize(run, n_trials=free_trials)
    predictor.store.release_workers()
    return SearchResult(
        tuple(rank(seen.that("fits", "uncertain"), objective)),
        tuple(seen.that("does not fit")),
        study,
    )


def _note(trial: optuna.Trial, candidate: Candidate) -> None:
    """Keep with a trial what a person would look for beside its value."""
    prediction = candidate.prediction
    trial.set_user_attr("verdict", prediction.verdict)
    trial.set_user_attr("process_gib", round(prediction.memory.process_bytes / 2**30, 3))
    for name in ("tokens_per_s", "joules_per_token"):
        interval = getattr(prediction, name)
        if interval is not None:
            trial.set_user_attr(name, interval.value)
    trial.set_user_attr("config", candidate.config.to_json())


def _telling(arms: Iterable[Arm]) -> list[RunConfig]:
    """Return the configurations from whose traces those of all sizes follow.

    They are all small ones, in which the step does things of its own, and two of the others.
    """
    configs = [config for arm in arms for config in arm]
    sizes = sorted({(c.tokens, c.micro_batch, c.seq_len) for c in configs})
    regular = [size for size in sizes if size[0] >= REGULAR_TOKENS]
    asked = {*(size for size in sizes if size not in regular), *regular[:2]}
    return [c for c in configs if (c.tokens, c.micro_batch, c.seq_len) in asked]


def _size_knob(space: Space) -> str:
    """Return what is made as large as fits: the sequence length where it is searched."""
    return "seq_len" if "seq_len" in space.axes else "micro_batch"


def _legal_ones(space: Space, choices: Sequence[dict[str, Any]]) -> list[RunConfig]:
    configs = (legal(space, choice) for choice in choices)
    return [config for config in configs if config is not None]


def _plain_arms(space: Space) -> list[Arm]:
    """Return every arm with the first values of the knobs that move little."""
    axes = {knob: values[: EVERYWHERE.get(knob)] for knob, values in space.axes.items()}
    size = _size_knob(space)
    sizes = sorted(axes.pop(size))
    arms = []
    for values in itertools.product(*axes.values()):
        plain = dict(zip(axes, values, strict=True))
        choices = [{**plain, size: value} for value in sizes]
        arms.append({c: choice for choice in choices if (c := legal(space, choice)) is not None})
    return [arm for arm in arms if arm]


def _smallest(arms: Sequence[Arm], best: Sequence[Candidate]) -> Arm:
    """Return the smallest size of the best arms: a device may be faster there than it should be."""
    of = {config: arm for arm in arms for config in arm}
    firsts = dict(next(iter(of[c.config].items())) for c in best if c.config in of)
    return dict(itertools.islice(firsts.items(), _ARMS_AT_THEIR_SMALLEST))


def _next_ones(asked: Sequence[tuple[Arm, RunConfig]], seen: Seen) -> list[RunConfig]:
    """Return what may be asked for after these, the likeliest first: what is close to the cap."""
    following = [list(arm)[list(arm).index(config) + 1 :][:1] for arm, config in asked]
    unsettled = [above for sizes in following for above in sizes if not seen.settles(above)]
    return sorted(unsettled, key=lambda config: getattr(config, seen.size) / seen.room(config))


def _excess(candidate: Candidate, predictor: Predictor) -> float:
    """How far what must be free is above the limit, as a share of it; 0 or less where it fits."""
    most = predictor.memory.most_bytes(candidate.config, candidate.prediction.memory)
    share = most / predictor.limit_bytes - 1
    return share if candidate.prediction.verdict == "fits" else max(share, _NOT_SAID_TO_FIT)


def score(candidate: Candidate, objective: str) -> float:
    """Return what is maximised.

    Where nothing is known of the device's speed, more tokens in one micro-batch stand for more
    speed, which holds until the device is busy.
    """
    speed = candidate.tokens_per_s
    if speed is None:
        speed = float(candidate.config.tokens)
    plainness: int = sum(getattr(candidate.config, knob) == value for knob, value in PLAIN.items())
    tie = 1 + _TIE * plainness / len(PLAIN)
    if objective == "joules_per_token":
        energy = candidate.joules_per_token
        # Of what nothing is known ranks below what was measured or predicted, the faster first.
        return tie / energy if energy else -1 / speed
    if objective == "seq_len":
        # The longest first; of two as long the faster.
        return candidate.config.seq_len + tie * speed / (1e9 + speed)
    return speed * tie


def rank(candidates: Sequence[Candidate], objective: str) -> list[Candidate]:
    """Return candidates best first."""
    return sorted(candidates, key=lambda c: score(c, objective), reverse=True)
