"""What came of a trainer: the model to keep, and how it compares with the one that it came from."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

from lora_advisor.advisor.attempt import Attempt
from lora_advisor.advisor.evaluated import Evaluation
from lora_advisor.advisor.guards import DivergedError, Stop, divergence_advice
from lora_advisor.advisor.known_rows import THRESHOLD, KnownRows
from lora_advisor.advisor.likelihood import Likelihood, RowLosses, compare_rows, of_whole_rows
from lora_advisor.advisor.preference_loss import PairRewards, Preference, compare_pairs
from lora_advisor.advisor.processes import here
from lora_advisor.advisor.result_files import write_samples
from lora_advisor.advisor.run_folder import (
    ADAPTER,
    FLAGGED,
    HOLDOUT,
    STOPPED,
    make_durable,
    read_json,
    step_of,
    write_json,
)


def outcome(attempt: Attempt) -> dict[str, Any]:
    """Return what came of it, as a `TrainingResult` holds it, and write the adapter.

    Raises:
        DivergedError: It went wrong before there was a checkpoint to keep.
    """
    trainer, run = attempt.trainer, attempt.job.run
    measured = attempt.watch.measured()  # before the evaluation, which may take more memory
    stop, after = _last_good(attempt) if attempt.losses.stop is not None else _last_or_best(attempt)
    history = trainer.state.log_history
    here().first(
        lambda: write_samples(
            trainer.model, attempt.job.ready.tokenizer, attempt.job.ready.held, run.path
        )
    )
    return {
        "measured": measured,
        "steps": trainer.state.global_step,
        "losses": tuple((int(at["step"]), float(at["loss"])) for at in history if "loss" in at),
        "eval_loss_before": run.state["eval_loss_before"],
        "eval_loss_after": None if after is None else after.loss,
        "adapter": here().first(lambda: _save(attempt)),
        "resumed_from_step": run.step or None,
        **_compared(attempt, after),
        "known": _known(attempt),
        "evaluations": tuple(attempt.holdout.evaluations),
        "overfit": attempt.holdout.overfit,
        "stop": stop,
        "recoveries": tuple(attempt.job.recoveries),
    }


def _last_good(attempt: Attempt) -> tuple[Stop, Evaluation | None]:
    """Go back to the last checkpoint from before the loss leapt."""
    job, run = attempt.job, attempt.job.run
    stop = cast(Stop, attempt.losses.stop)
    folder = run.checkpoint_until(stop.good_step)
    stop = stop.replace(
        advice=divergence_advice(job.config, job.settings.learning_rate),
        kept_step=None if folder is None else step_of(folder),
    )
    here().first(lambda: write_json(run.path / STOPPED, dataclasses.asdict(stop)))
    if folder is None:
        text = (
            f"{stop.detail}, before there was a checkpoint to keep; begin anew (--restart) "
            f"with {', or '.join(stop.advice)}."
        )
        job.journal.note("stop", text)
        raise DivergedError(text)
    job.note("stop", f"{stop.detail}: going back to checkpoint {stop.kept_step}")
    attempt.trainer._load_from_checkpoint(str(folder))
    return stop, attempt.evaluate() if attempt.held else None


def _last_or_best(attempt: Attempt) -> tuple[Stop | None, Evaluation | None]:
    """Take the model as it is, or the best one where it has been over-fitted since."""
    if not attempt.held:
        return None, None
    after = None
    if not attempt.guarded:
        after = attempt.evaluate()
        attempt.holdout.note(after.loss)
    overfit, best = attempt.holdout.overfit, attempt.holdout.best()
    if overfit is None:
        return None, after
    attempt.job.note("over-fitting", overfit.detail)
    if best is None or not attempt.job.stop_on_overfit:
        return None, after
    stop = overfit.replace(kept_step=overfit.good_step)
    here().first(lambda: write_json(attempt.job.run.path / STOPPED, dataclasses.asdict(stop)))
    attempt.trainer._load_from_checkpoint(str(best))
    return stop, attempt.evaluate()


def _compared(attempt: Attempt, after: Evaluation | None) -> dict[str, Likelihood | Preference]:
    """Return how base and tuned model compare on the hold-out; nothing where that is lost."""
    before = read_json(attempt.job.run.path / HOLDOUT)
    if after is None or before is None:
        return {}
    if isinstance(after.rows, PairRewards):
        return {"preference": compare_pairs(PairRewards.from_json(before), after.rows)}
    base, tuned, sources = RowLosses.from_json(before), after.rows, attempt.job.ready.held_sources
    if sources:
        base, tuned = of_whole_rows(base, sources), of_whole_rows(tuned, sources)
    return {"likelihood": compare_rows(base, tuned)}


def _known(attempt: Attempt) -> KnownRows | None:
    known = attempt.job.run.state.get("known")
    if not known:
        return None
    return KnownRows(
        checked=known["checked"],
        flagged=len(known["flagged"]),
        share=len(known["flagged"]) / known["checked"],
        threshold=THRESHOLD,
        dropped=len(attempt.job.known_rows),
        file=str(attempt.job.run.path / FLAGGED),
    )


def _save(attempt: Attempt) -> Path:
    """Write the adapter (for method "full": the model) and its tokenizer."""
    path = attempt.job.run.path
    folder, beside = path / ADAPTER, path / f".{ADAPTER}.new"
    for old in (folder, beside):
        shutil.rmtree(old, ignore_errors=True)
    for part in (attempt.trainer.model, attempt.trainer.processing_class):
        cast(Any, part).save_pretrained(str(beside))
    make_durable(beside)
    beside.replace(folder)
    return folder
