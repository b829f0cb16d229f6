"""Train with a configuration to the end: the probes' step, on the user's data.

What is covered: a hold-out evaluated before, while and after, guards of the loss, checkpoints,
going on exactly after a kill, going on with a smaller micro-batch where memory runs out, prediction
beside measurement. Pairs (stage "dpo") are held out, guarded and gone on with like rows; what is
told of the hold-out is then the DPO loss. Several processes train together (`processes.py`,
`data_parallel.py`): each calls `train` with what it runs itself, the first writes and tells. What
is not covered: a model that is spread over cards. On a CPU the cap is not enforced, only the peak
measured.

The caller sets what PyTorch reads when it is imported (PYTORCH_ALLOC_CONF for allocator
"expandable_segments"); the command line does so before it calls `train`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_advisor.advisor.attempt import Attempt
from lora_advisor.advisor.ending import outcome
from lora_advisor.advisor.job import Job
from lora_advisor.advisor.journal import Journal, NoJournal
from lora_advisor.advisor.outcome import Measured, Predicted, Progress, TrainingResult
from lora_advisor.advisor.preparing import data_figures, identity, prepare, require
from lora_advisor.advisor.processes import (
    GoneError,
    PeerError,
    here,
    is_agreed,
    is_gone,
    known_to_all,
)
from lora_advisor.advisor.recovery import Recovery, is_recoverable, let_go, release, smaller
from lora_advisor.advisor.result_files import write_card
from lora_advisor.advisor.run_folder import (
    PLAN,
    RESULT,
    STATE,
    open_run_folder,
    step_of,
    write_json,
)
from lora_advisor.advisor.schedule import LEARNING_RATES, Settings
from lora_advisor.advisor.stopping import Stopper
from lora_advisor.advisor.time_ahead import with_train_seconds
from lora_advisor.probes import unsloth
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError, OutputError, UnavailableError
from lora_advisor.probes.machine import detect_stack
from lora_advisor.probes.meter import open_meter

__all__ = ["Measured", "Predicted", "Progress", "TrainingResult", "train"]

#: What PyTorch says of a file that cannot be written (caffe2/serialize/inline_container.cc).
_WRITING_WORDS = ("failed writing file", "unexpected pos")


def train(
    config: RunConfig,
    architecture: Architecture,
    data: Path,
    output: Path,
    *,
    device: str,
    cap_bytes: int | None,
    epochs: float,
    max_steps: int | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    holdout: float = 0.1,
    eval_batch: int | None = None,
    eval_steps: int | None = None,
    stop_on_overfit: bool = True,
    check_rows: int | None = None,
    drop_known: bool = False,
    long_rows: str = "truncate",
    save_steps: int = 50,
    seed: int = 0,
    resume: bool = True,
    tensorboard: bool = False,
    predicted: Predicted | None = None,
    plan: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> TrainingResult:
    """Train, and leave the adapter and result.json in the output folder.

    Args:
        config: What to train with; of several processes, what each runs.
        architecture: The model; its weights and its tokenizer must be there.
        data: What `read_examples` reads; of stage "dpo" what `read_pairs` reads.
        output: Folder for checkpoints and results. A training that was interrupted there goes on
            from its last complete checkpoint; one that has ended there is only reported.
        device: "cuda" or "cpu".
        cap_bytes: Bytes that PyTorch's allocator may hold on the GPU; None for all.
        epochs: Passes over the data.
        max_steps: Optimizer steps instead of `epochs`.
        learning_rate: Peak of the learning rate, which then falls to 0 linearly; None for the
            stage's own (`LEARNING_RATES`).
        warmup_steps: Steps in which it rises; None for one in twenty, at most ten.
        holdout: Share of the rows to evaluate on and never train on; 0 for none.
        eval_batch: Rows in one evaluation batch; None for the micro-batch.
        eval_steps: Optimizer steps between two evaluations; None for an epoch.
        stop_on_overfit: Whether over-fitting ends the training, with the best model so far.
        check_rows: Training rows to look at for those that the base model knows by heart; None for
            512, or all where they are dropped; 0 for none. Pairs are never looked at.
        drop_known: Whether not to train on those.
        long_rows: What becomes of rows that are longer than a sequence: one of
            `cutting.LONG_ROWS`. Pieces of one row are trained on or held out together.
        save_steps: Optimizer steps between two checkpoints.
        seed: Of hold-out, order of the data, adapter and dropout.
        resume: Whether to go on with a training in `output`; else it is removed.
        tensorboard: Whether to write for TensorBoard too.
        predicted: What the plan promised, to stand beside what came.
        plan: The JSON form of the plan, to be kept in the folder; None without one.
        progress: Told how it goes, about once a second.
        say: Told what has happened, in one sentence.

    Raises:
        AdvisorError: Of the kind that says what the caller must mend.
        Interrupted: A signal asked to stop; a checkpoint is there.
        DivergedError: The loss leapt, or was no number, before there was a checkpoint to keep.
    """
    settings = Settings(
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=LEARNING_RATES[config.stage] if learning_rate is None else learning_rate,
        warmup_steps=warmup_steps,
        holdout=holdout,
        seed=seed,
        save_steps=save_steps,
        eval_batch=eval_batch,
        eval_steps=eval_steps,
        check_rows=check_rows,
        drop_known=drop_known,
        long_rows=long_rows,
    )
    processes = here()
    processes.together(lambda: require(config, device, tensorboard=tensorboard))
    ready = processes.together(lambda: prepare(config, architecture, data, settings))
    stack = detect_stack()
    several = {} if processes.size == 1 else {"processes": processes.size}
    run = processes.first(
        lambda: open_run_folder(
            output,
            identity={**identity(config, architecture, ready, settings), **several},
            stack={
                "device": device,
                **stack.to_json(),
                **({} if config.is_buildable else {"engine": unsloth.engine()}),
            },
            resume=resume,
        )
    )
    if not processes.is_first:
        progress, say = _silent, _silent
    if run.result is not None:
        return TrainingResult.from_json(run.result)
    stopper = Stopper(say)
    with stopper.listening():
        job = Job(
            config=config,
            architecture=architecture,
            ready=ready,
            settings=settings,
            run=run,
            device=device,
            meter=open_meter(device, cap_bytes),
            journal=Journal(run.path) if processes.is_first else NoJournal(),
            stopper=stopper,
            progress=progress,
            say=say,
            stop_on_overfit=stop_on_overfit,
            tensorboard=tensorboard,
        )
        try:
            if plan is not None and processes.is_first:
                write_json(run.path / PLAN, plan)
            figures = _train(job, data)
            result = TrainingResult(
                config=config,
                model=architecture.name,
                stack=stack,
                device=device,
                predicted=with_train_seconds(predicted, job, steps=figures["steps"]),
                **figures,
            )
            processes.first(lambda: _write(result, job))
        except Exception as error:
            ours = _as_ours(error, job)
            if ours is None:
                raise
            raise (known_to_all(ours) if is_agreed(error) else ours) from error
    return result


def _silent(_: Any) -> None:
    """Tell nobody."""


def _write(result: TrainingResult, job: Job) -> None:
    write_card(result, job.run.path, settings=job.settings.identity())
    write_json(job.run.path / RESULT, result.to_json())


def _train(job: Job, data: Path) -> dict[str, Any]:
    """Build trainers until one comes to the end."""
    while True:
        figures = _attempt(job, data)
        if figures is not None:
            return figures
        release(job.device)
        job.run.look_again()


def _attempt(job: Job, data: Path) -> dict[str, Any] | None:
    """Return what came of a trainer; None to build another, once nothing names this one."""
    attempt: Attempt | None = None
    try:
        attempt = Attempt(job)
        if attempt.look_before():
            return None
        attempt.train()
        return {**data_figures(job.ready, data, rows=len(attempt.rows)), **outcome(attempt)}
    except Exception as error:
        config = job.config_now
        less = smaller(config)
        # A model that does not fit as it is built is not helped by a smaller micro-batch.
        if attempt is None or less is None or not is_recoverable(error):
            raise
        if here().size > 1 and not is_agreed(error):
            raise _left_alone(job, less) from error
        job.run.look_again()
        job.recovered(_recovery(job, less, job.run.step))
        let_go(error)
    return None


def _recovery(job: Job, less: RunConfig, step: int) -> Recovery:
    return Recovery(
        what="training",
        after_step=step,
        micro_batch=job.config_now.micro_batch,
        new_micro_batch=less.micro_batch,
        new_accumulation=less.accumulation,
    )


def _left_alone(job: Job, less: RunConfig) -> PeerError:
    """Note that memory ran out in a step that the other processes are still in.

    They cannot be told, so the training ends; what begins next takes less.
    """
    checkpoint = job.run.checkpoint_until(sys.maxsize)
    recovery = _recovery(job, less, 0 if checkpoint is None else step_of(checkpoint))
    job.run.state["recoveries"] = [at.to_json() for at in (*job.recoveries, recovery)]
    with contextlib.suppress(FileNotFoundError):  # another one writes the same
        write_json(job.run.path / STATE, job.run.state)
    return PeerError(
        f"memory ran out in process {here().rank} of {here().size} with micro-batch "
        f"{recovery.micro_batch}, in a step that the others are in; the same command goes on from "
        f"{recovery.start} with micro-batch {recovery.new_micro_batch}."
    )


def _as_ours(error: Exception, job: Job) -> AdvisorError | None:
    """Return what a failure means to the caller: a full disk, a full device; None for a defect."""
    from safetensors import SafetensorError

    from lora_advisor.probes.worker import is_out_of_memory

    config, path = job.config_now, job.run.path
    if here().size > 1 and is_gone(error):
        last = job.run.checkpoint_until(sys.maxsize)
        left = "the start" if last is None else f"checkpoint {step_of(last)}"
        return GoneError(
            f"another process of this training has ended; the same command goes on from {left}."
        )
    if isinstance(error, AdvisorError):
        return None
    if is_out_of_memory(error):
        return UnavailableError(
            f"the device must have memory for micro_batch {config.micro_batch} of {config.seq_len} "
            f"tokens, but it ran out; checkpoints are in `{path}`; plan again with less --vram."
        )
    torn = isinstance(error, RuntimeError) and any(word in str(error) for word in _WRITING_WORDS)
    if torn or isinstance(error, OSError | SafetensorError):
        if here().is_first:
            job.run.checkpoint = job.run.remove_torn()  # which makes room
        kept = f"checkpoint {job.run.step} is whole" if job.run.step else "there is no checkpoint"
        reason = (
            "a file could not be written to its end, as on a full disk"
            if torn
            else str(error).splitlines()[0].rstrip(".")
        )
        return OutputError(
            f"`{path}` must take checkpoints and results, but {reason}; {kept}: make room, and the "
            "same command goes on."
        )
    return None
