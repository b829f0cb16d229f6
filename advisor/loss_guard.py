"""The guards at work in a trainer: the loss of every step, and the hold-out from time to time."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from lora_advisor.advisor.evaluated import Evaluation
from lora_advisor.advisor.guards import (
    HeldOut,
    Stop,
    find_divergence,
    find_overfit,
    not_finite_gradient,
)
from lora_advisor.advisor.processes import here
from lora_advisor.advisor.run_folder import make_durable
from lora_advisor.advisor.stopping import Stopper
from lora_advisor.advisor.watch import Watch

#: Names of what is kept in the trainer's history, and with it in every checkpoint.
_STEP_LOSSES, _HELD_OUT = "step_losses", {"sft": "holdout_nll", "dpo": "holdout_dpo_loss"}


class LossGuard(TrainerCallback):
    """Ends a training whose loss leaps or is no number, before a checkpoint is written of it.

    The losses stay on the device until a report or a checkpoint is due, so that no step waits for
    them. Trainer's own mean over the steps between two reports would hide a single one.
    """

    def __init__(self, trainer: Trainer, *, stage: str = "sft") -> None:
        """Watch a trainer; add this to its callbacks too."""
        self._start = math.log(2) if stage == "dpo" else None
        self.stop: Stop | None = None
        self.losses: list[float] = []
        self._scaled = trainer.accelerator.scaler is not None
        self._micro: list[Any] = []
        self._steps: list[int] = []
        self._noted = 0
        plain = trainer.training_step

        def heard(*args: Any, **kwargs: Any) -> Any:
            loss = plain(*args, **kwargs)
            self._micro.append(loss)
            return loss

        vars(trainer)["training_step"] = heard  # over the method of the class

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up the losses of the process that wrote the checkpoint."""
        self.recall(state)

    def recall(self, state: TrainerState) -> None:
        """Take up the losses that a checkpoint holds."""
        history: list[Any] = state.log_history
        self.losses = [loss for entry in history for loss in entry.get(_STEP_LOSSES, ())]
        self._noted = len(self.losses)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the step's losses end; look at them where a report or checkpoint is due."""
        self._steps.append(len(self._micro))
        if control.should_log or control.should_save or state.global_step >= state.max_steps:
            self.look(state, control)
        if control.should_save:
            entry: Any = {"step": state.global_step, _STEP_LOSSES: self.losses[self._noted :]}
            state.log_history.append(entry)
            self._noted = len(self.losses)

    def look(self, state: TrainerState, control: TrainerControl) -> None:
        """Fetch the losses of the last steps and judge them."""
        if not self._steps:
            return
        import torch

        micro, start, losses = torch.stack(self._micro).tolist(), 0, []
        for end in self._steps:
            losses.append(sum(micro[start:end]))
            start = end
        self.losses += here().mean_lists(losses)
        new = len(self._steps)
        self._micro, self._steps = [], []
        stop = find_divergence(self.losses, new, scaled=self._scaled, start=self._start)
        self._end(stop, control)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradient norm, which Trainer has read for its report."""
        norm = kwargs["logs"].get("grad_norm")
        if norm is not None and not math.isfinite(norm) and not self._scaled:
            self._end(not_finite_gradient(state.global_step, norm), control)

    def _end(self, stop: Stop | None, control: TrainerControl) -> None:
        self.stop = self.stop or stop
        if self.stop is not None:
            control.should_training_stop = True
            control.should_save = False


class StopAtStep(TrainerCallback):
    """Ends the training with a checkpoint at the end of the step in which a signal came."""

    def __init__(self, stopper: Stopper) -> None:
        """Take what hears the signals."""
        self._stopper = stopper

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on a signal waits for the end of a step."""
        self._stopper.in_steps = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """End with this step if a signal came, to any of the processes."""
        heard = max(int(number) for (number,) in here().numbers(self._stopper.number or 0))
        if heard:
            self._stopper.number = heard
            control.should_save = control.should_training_stop = True


class HoldoutGuard(TrainerCallback):
    """Evaluates the hold-out while training, keeps the best model, and sees over-fitting.

    The best is written to `best-STEP`. Older ones stay until a checkpoint is there that knows of
    it, so that a training that goes on from an earlier one still finds them.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        *,
        evaluate: Callable[[], Evaluation],
        watch: Watch,
        losses: LossGuard,
        every: int | None,
        stops: bool,
        stage: str = "sft",
    ) -> None:
        """Take what it needs; `every` are steps, None for an epoch; `stops` on over-fitting."""
        self._name = _HELD_OUT[stage]
        self._trainer, self._folder, self._evaluate = trainer, folder, evaluate
        self._watch, self._losses, self._every, self._stops = watch, losses, every, stops

    @property
    def evaluations(self) -> list[HeldOut]:
        """What was seen so far, by processes that were interrupted too."""
        history: list[Any] = self._trainer.state.log_history
        return [
            HeldOut(step=at["step"], loss=at[self._name], train_loss=at["train_loss"])
            for at in history
            if self._name in at
        ]

    @property
    def overfit(self) -> Stop | None:
        """The first sign of over-fitting, if there is one."""
        seen = self.evaluations
        signs = (find_overfit(seen[: count + 1]) for count in range(len(seen)))
        return next((sign for sign in signs if sign is not None), None)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate where it is time; at the last step the end of the training does it."""
        step = state.global_step
        due = float(state.epoch or 0.5).is_integer() if self._every is None else (
            step % self._every == 0
        )  # fmt: skip
        if not due or step >= state.max_steps or control.should_training_stop:
            return
        self._losses.look(state, control)
        if control.should_training_stop:
            return
        with self._watch.paused():
            self.note(self._evaluate().loss)
        if self.overfit is not None and self._stops:
            control.should_training_stop = True

    def note(self, loss: float) -> None:
        """Take an evaluation of the model as it is now."""
        state = self._trainer.state
        before = self.evaluations
        since = self._losses.losses[before[-1].step if before else 0 : state.global_step]
        entry: Any = {
            "step": state.global_step,
            self._name: loss,
            "train_loss": statistics.fmean(since) if since else None,
        }
        state.log_history.append(entry)
        if all(loss < held.loss for held in before):
            here().first(lambda: self._keep(state.global_step))

    def best(self) -> Path | None:
        """Return the folder of the best model so far, if it is there."""
        seen = self.evaluations
        if not seen:
            return None
        folder = self._folder / f"best-{min(seen, key=lambda held: held.loss).step}"
        return folder if folder.is_dir() else None

    def _keep(self, step: int) -> None:
        folder = self._folder / f"best-{step}"
        beside = self._folder / f".best-{step}.new"
        for old in (folder, beside):
            shutil.rmtree(old, ignore_errors=True)
        self._trainer.save_model(str(beside), _internal_call=True)
        make_durable(beside)
        beside.replace(folder)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove what no checkpoint will ask for."""
        best = self.best()
        for folder in self._folder.glob("best-*"):
            if best is not None and folder != best and here().is_first:
                shutil.rmtree(folder, ignore_errors=True)
