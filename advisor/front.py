"""Configurations of which none is better in everything: speed, energy and sequence length."""

from __future__ import annotations

from collections.abc import Sequence

from lora_advisor.probes.plan import Candidate


def front(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the Pareto front, fastest first; without energies, that of speed and length.

    Candidates of whose speed nothing is known are left out.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = [c for c in candidates if c.tokens_per_s is not None]
    with_energy = all(c.joules_per_token is not None for c in known)
    up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
    directions = [up, up] + ([down] if with_energy else [])
    study = optuna.create_study(directions=directions)
    seen = set()
    for number, candidate in enumerate(known):
        values = [float(candidate.tokens_per_s or 0.0), float(candidate.config.seq_len)]
        if with_energy:
            values.append(float(candidate.joules_per_token or 0.0))
        if tuple(values) in seen:  # another name for the same, a knob that changes nothing
            continue
        seen.add(tuple(values))
        trial = optuna.trial.create_trial(values=values, user_attrs={"number": number})
        study.add_trial(trial)
    best = [known[trial.user_attrs["number"]] for trial in study.best_trials]
    return tuple(sorted(best, key=lambda c: c.tokens_per_s or 0.0, reverse=True))
