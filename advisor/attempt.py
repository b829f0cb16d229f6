"""One trainer's life: built, evaluated, trained, and asked what came of it.

There are several in a training where memory runs out or rows are dropped: each is built anew and
goes on from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.data_parallel import arrange, blank_rows
from lora_advisor.advisor.evaluated import Evaluation
from lora_advisor.advisor.evaluation import evaluate
from lora_advisor.advisor.guards import SEEN_AFTER_STEPS
from lora_advisor.advisor.job import Job
from lora_advisor.advisor.known_rows import (
    NO_KNOWN_PAIRS,
    THRESHOLD,
    check_some_left,
    flagged,
    rows_to_check,
    write_flagged,
)
from lora_advisor.advisor.likelihood import RowLosses
from lora_advisor.advisor.outcome import Progress
from lora_advisor.advisor.processes import here
from lora_advisor.advisor.recovery import Recovery
from lora_advisor.advisor.run_folder import (
    FLAGGED,
    HOLDOUT,
    make_durable,
    write_json,
)
from lora_advisor.probes import nvml
from lora_advisor.probes.finetune import Row, build_trainer
from lora_advisor.probes.preference import row_length

if TYPE_CHECKING:
    from transformers import Trainer


class Attempt:
    """A trainer for what is left of a training."""

    def __init__(self, job: Job) -> None:
        """Build it."""
        from lora_advisor.advisor.loss_guard import LossGuard

        self.job = job
        self.held = bool(job.ready.held)
        dropped = job.known_rows
        self.rows = [row for at, row in enumerate(job.ready.train) if at not in dropped]
        self.trainer = self._build()
        self.watch = self._make_watch()
        self.losses = LossGuard(self.trainer, stage=job.config.stage)
        self.holdout = self._make_holdout_guard()
        self._add_callbacks()

    def _build(self) -> Trainer:
        from transformers import PrinterCallback, set_seed

        from lora_advisor.probes.weights import load_model

        job, config = self.job, self.job.config_now
        settings = dataclasses.replace(job.settings, eval_batch=job.eval_batch_now)
        whole = config.replace(accumulation=config.accumulation * here().size)
        schedule = settings.schedule(
            whole, rows=len(self.rows), held=job.ready.held, output=job.run.path
        )
        set_seed(schedule.seed)  # the adapter's start is drawn before the trainer sets its seed
        model = here().together(lambda: load_model(config, job.architecture, job.device))
        token = int(job.ready.tokenizer.pad_token_id or 0)
        trainer = build_trainer(
            config,
            model,
            rows=[*self.rows, *blank_rows(config, len(self.rows), token=token)],
            tokenizer=job.ready.tokenizer,
            schedule=schedule,
            device=job.device,
        )
        arrange(trainer, config, [row_length(row) for row in self.rows], seed=schedule.seed)
        trainer.remove_callback(PrinterCallback)
        # Where a spike is seen, the checkpoint from before it must still be there.
        kept = 1 + math.ceil(SEEN_AFTER_STEPS / settings.save_steps)
        trainer.args.save_total_limit = max(2, kept)
        return trainer

    def _make_watch(self) -> Any:
        from lora_advisor.advisor.watch import Watch

        job, run = self.job, self.job.run

        def saved(step: int, seconds: float) -> None:
            here().numbers(step)  # each process has written its part
            here().first(lambda: make_durable(run.path / f"checkpoint-{step}"))
            run.keep(seconds_at={**run.state["seconds_at"], str(step): seconds})

        def told(state: Progress) -> None:
            job.journal.report(state)
            job.progress(state)

        watch = Watch(
            job.meter,
            progress=told,
            saved=saved,
            seconds_before=run.state["seconds_at"].get(str(run.step), 0.0),
            power_w=nvml.power_w if job.device == "cuda" else lambda: None,
        )
        watch.attach(self.trainer)
        return watch

    def _make_holdout_guard(self) -> Any:
        from lora_advisor.advisor.loss_guard import HoldoutGuard

        return HoldoutGuard(
            self.trainer,
            self.job.run.path,
            evaluate=self.evaluate,
            watch=self.watch,
            losses=self.losses,
            every=self.job.settings.eval_steps,
            stops=self.job.stop_on_overfit,
            stage=self.job.config.stage,
        )

    def _add_callbacks(self) -> None:
        from lora_advisor.advisor.loss_guard import StopAtStep
        from lora_advisor.advisor.worst_first import WorstFirst

        job = self.job
        callbacks = [WorstFirst(self.trainer, self.evaluate), StopAtStep(job.stopper)]
        callbacks += [self.watch, self.losses]  # the losses are read where a report is due
        if self.held:
            callbacks.append(self.holdout)
        if job.tensorboard:
            from transformers.integrations.integration_utils import TensorBoardCallback

            os.environ["TENSORBOARD_LOGGING_DIR"] = str(job.run.path / "tensorboard")
            callbacks.append(TensorBoardCallback())  # type: ignore[no-untyped-call]
        for callback in callbacks:
            self.trainer.add_callback(callback)

    def evaluate(self, rows: Sequence[Row] | None = None) -> Evaluation:
        """Evaluate rows, or the hold-out, and remember where the batch had to be smaller."""

        def lowered(old: int, new: int) -> None:
            step = self.trainer.state.global_step
            self.job.recovered(
                Recovery(what="evaluation", after_step=step, micro_batch=old, new_micro_batch=new)
            )

        return evaluate(self.trainer, rows, lowered=lowered)

    def look_before(self) -> bool:
        """Look at the data with the model as it came, unless that is done already.

        Returns:
            Whether there are fewer rows to train on now, so that all must be built anew.
        """
        run = self.job.run
        if "eval_loss_before" not in run.state:
            loss = None
            if self.held:
                before = self.evaluate()
                here().first(lambda: write_json(run.path / HOLDOUT, before.rows.to_json()))
                loss = before.loss
            run.keep(eval_loss_before=loss)
        if "known" not in run.state:
            run.keep(known=self._look_for_known())
            return bool(self.job.known_rows)
        return False

    def _look_for_known(self) -> dict[str, Any] | None:
        job, settings = self.job, self.job.settings
        if job.config.stage == "dpo":
            self._note_on_pairs()
            return None
        wanted = rows_to_check(
            len(self.rows), settings.check_rows, all_of_them=settings.drop_known, seed=settings.seed
        )
        if not wanted:
            return None
        seen = self.evaluate([self.rows[row] for row in wanted]).rows
        assert isinstance(seen, RowLosses)  # of stage "sft"
        found = flagged(wanted, seen)
        if settings.drop_known:
            check_some_left(len(self.rows), len(found))
        here().first(lambda: write_flagged(job.run.path / FLAGGED, found, job.ready.places))
        if found:
            job.note(
                "known rows",
                f"{len(found)} of {len(wanted)} rows looked at have a perplexity below "
                f"{THRESHOLD:g} under the base model: it knows them by heart; they are listed in "
                f"{job.run.path / FLAGGED} and "
                + ("left out" if settings.drop_known else "trained on all the same"),
            )
        return {"checked": len(wanted), "flagged": list(found)}

    def _note_on_pairs(self) -> None:
        """Say what of the user's wishes does not go with pairs."""
        job, lora = self.job, self.job.config.lora
        if job.settings.check_rows is None:
            job.note("known rows", f"no pair is looked at beforehand: {NO_KNOWN_PAIRS}")
        if lora is not None and lora.dropout:
            job.note(
                "dropout",
                f"the adapter's dropout of {lora.dropout:g} is not applied: TRL's DPOTrainer turns "
                "dropout off",
            )

    def train(self) -> None:
        """Train the steps that are left.

        Raises:
            Interrupted: A signal asked for it; the step is saved.
        """
        from transformers import TrainerState, set_seed

        trainer, run, stopper = self.trainer, self.job.run, self.job.stopper
        try:
            if run.checkpoint is None:
                # The evaluation may have drawn numbers, and each process draws its own dropout.
                set_seed(trainer.args.seed + here().rank)
                trainer.train()
            else:
                state = TrainerState.load_from_json(str(run.checkpoint / "trainer_state.json"))
                if state.global_step < state.max_steps:
                    trainer.train(resume_from_checkpoint=str(run.checkpoint))
                else:  # Trainer would take one more step before it sees that there is none left
                    trainer._load_from_checkpoint(str(run.checkpoint))
                    trainer.state = state
                    self.losses.recall(state)
        finally:
            stopper.in_steps = False
        if stopper.number is not None and not self.guarded:
            raise stopper.interrupted(trainer.state.global_step)

    @property
    def guarded(self) -> bool:
        """Whether a guard has ended it."""
        overfit = self.holdout.overfit is not None and self.job.stop_on_overfit
        return self.losses.stop is not None or overfit
