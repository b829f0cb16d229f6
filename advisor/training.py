"""Train with a configuration to the end: the probes' step, on the user's data.

What is covered: a hold-out evaluated before and after, progress, checkpoints, going on exactly
after a kill, prediction beside measurement. What is not: several devices, another stage than SFT,
recovery from a lack of memory. On a CPU the cap is not enforced, only the peak measured.

The caller sets what PyTorch reads when it is imported (PYTORCH_ALLOC_CONF for allocator
"expandable_segments"); the command line does so before it calls `train`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_advisor.advisor.evaluation import evaluate
from lora_advisor.advisor.outcome import Measured, Predicted, Progress, TrainingResult
from lora_advisor.advisor.run_folder import ADAPTER, RESULT, RunFolder, open_run_folder, write_json
from lora_advisor.advisor.schedule import Settings
from lora_advisor.probes.architectures import Architecture
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.dataset import Examples, read_examples
from lora_advisor.probes.errors import AdvisorError, OutputError, UnavailableError, UsageError
from lora_advisor.probes.finetune import Schedule, build_trainer
from lora_advisor.probes.machine import detect_stack
from lora_advisor.probes.meter import Meter, open_meter
from lora_advisor.probes.tokens import (
    TokenisedData,
    TokenRow,
    check_vocabulary,
    length_quantiles,
    load_tokenizer,
    split_holdout,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from lora_advisor.advisor.watch import Watch

__all__ = ["Measured", "Predicted", "Progress", "TrainingResult", "train"]


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The user's data, ready."""

    examples: Examples
    tokens: TokenisedData
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[TokenRow]
    held: Sequence[TokenRow]


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
    learning_rate: float = 2e-4,
    holdout: float = 0.1,
    eval_batch: int | None = None,
    save_steps: int = 50,
    seed: int = 0,
    resume: bool = True,
    predicted: Predicted | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> TrainingResult:
    """Train, and leave the adapter and result.json in the output folder.

    Args:
        config: What to train with.
        architecture: The model; its weights and its tokenizer must be there.
        data: A file that `read_examples` reads.
        output: Folder for checkpoints and results. A training that was interrupted there goes on
            from its last complete checkpoint; one that has ended there is only reported.
        device: "cuda" or "cpu".
        cap_bytes: Bytes that PyTorch's allocator may hold on the GPU; None for all.
        epochs: Passes over the data.
        max_steps: Optimizer steps instead of `epochs`.
        learning_rate: Peak of the learning rate, which then falls to 0 linearly.
        holdout: Share of the rows to evaluate on and never train on; 0 for none.
        eval_batch: Rows in one evaluation batch; None for the micro-batch.
        save_steps: Optimizer steps between two checkpoints.
        seed: Of hold-out, order of the data, adapter and dropout.
        resume: Whether to go on with a training in `output`; else it is removed.
        predicted: What the plan promised, to stand beside what came.
        progress: Told how it goes, about once a second.

    Raises:
        AdvisorError: Of the kind that says what the caller must mend.
    """
    settings = Settings(
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        holdout=holdout,
        seed=seed,
        save_steps=save_steps,
        eval_batch=eval_batch,
    )
    _require(config, device)
    ready = _prepare(config, architecture, data, settings)
    stack = detect_stack()
    run = open_run_folder(
        output,
        identity=_identity(config, architecture, ready, settings),
        stack={"device": device, **stack.to_json()},
        resume=resume,
    )
    if run.result is not None:
        return TrainingResult.from_json(run.result)
    schedule = settings.schedule(config, rows=len(ready.train), held=ready.held, output=run.path)
    try:
        meter = open_meter(device, cap_bytes)
        trainer = _build(config, architecture, ready, schedule, device)
        watch = _watch(trainer, run, meter, progress)
        _train(trainer, run, has_holdout=bool(ready.held))
        result = TrainingResult(
            config=config,
            model=architecture.name,
            stack=stack,
            device=device,
            predicted=predicted,
            measured=watch.measured(),  # before the evaluation, which may take more memory
            **_data_figures(ready, data),
            **_outcome(trainer, run, has_holdout=bool(ready.held)),
        )
        write_json(run.path / RESULT, result.to_json())
    except Exception as error:
        ours = _as_ours(error, config, run)
        if ours is None:
            raise
        raise ours from error
    return result


def _require(config: RunConfig, device: str) -> None:
    from lora_advisor.probes.weights import require_packages

    if not config.is_buildable:
        raise UsageError(f"`trainer` {config.trainer!r} is another engine; train with it there.")
    require_packages(config, device)
    if config.allocator == "expandable_segments" and device == "cuda":
        setting = os.environ.get(
            "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        )
        if "expandable_segments:True" not in setting:
            raise UsageError(
                '`allocator` "expandable_segments" must be set before PyTorch is imported; start '
                "with PYTORCH_ALLOC_CONF=expandable_segments:True."
            )


def _prepare(
    config: RunConfig, architecture: Architecture, data: Path, settings: Settings
) -> _Data:
    examples = read_examples(data)
    tokenizer = load_tokenizer(architecture)
    tokens = tokenize(examples, tokenizer, config.seq_len)
    check_vocabulary(tokens.rows, architecture)
    train_rows, held = split_holdout(tokens.rows, settings.holdout, seed=settings.seed)
    return _Data(examples=examples, tokens=tokens, tokenizer=tokenizer, train=train_rows, held=held)


def _identity(
    config: RunConfig, architecture: Architecture, ready: _Data, settings: Settings
) -> dict[str, Any]:
    """Return all that decides the weights that come out, as JSON gives it back."""
    return {
        "data": ready.examples.sha256,
        "architecture": architecture.fingerprint,
        **settings.identity(),
        **config.to_json(),
    }


def _build(
    config: RunConfig, architecture: Architecture, ready: _Data, schedule: Schedule, device: str
) -> Trainer:
    from transformers import PrinterCallback, set_seed

    from lora_advisor.probes.weights import load_model

    set_seed(schedule.seed)  # the adapter's start is drawn before the trainer sets its seed
    trainer = build_trainer(
        config,
        load_model(config, architecture, device),
        rows=ready.train,
        tokenizer=ready.tokenizer,
        schedule=schedule,
        device=device,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _watch(
    trainer: Trainer, run: RunFolder, meter: Meter, progress: Callable[[Progress], None]
) -> Watch:
    from lora_advisor.advisor.watch import Watch

    def saved(step: int, seconds: float) -> None:
        run.keep(seconds_at={**run.state["seconds_at"], str(step): seconds})

    watch = Watch(
        meter,
        progress=progress,
        saved=saved,
        seconds_before=run.state["seconds_at"].get(str(run.step), 0.0),
    )
    watch.attach(trainer)
    trainer.add_callback(watch)
    return watch


def _train(trainer: Trainer, run: RunFolder, *, has_holdout: bool) -> None:
    """Evaluate, unless an earlier process has, and train the steps that are left."""
    from transformers import TrainerState, set_seed

    if "eval_loss_before" not in run.state:
        run.keep(eval_loss_before=evaluate(trainer) if has_holdout else None)
    if run.checkpoint is None:
        set_seed(trainer.args.seed)  # the evaluation has drawn numbers, if this process made one
        trainer.train()
        return
    state = TrainerState.load_from_json(str(run.checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(run.checkpoint))
    else:  # Trainer would take one more step before it sees that there is none left
        trainer._load_from_checkpoint(str(run.checkpoint))
        trainer.state = state


def _data_figures(ready: _Data, data: Path) -> dict[str, Any]:
    return {
        "data": Path(data),
        "data_sha256": ready.examples.sha256,
        "shape": ready.examples.shape,
        "rows": len(ready.train),
        "holdout_rows": len(ready.held),
        "truncated": ready.tokens.truncated,
        "dropped": ready.tokens.dropped,
        "length_quantiles": length_quantiles(ready.tokens.lengths),
    }


def _outcome(trainer: Trainer, run: RunFolder, *, has_holdout: bool) -> dict[str, Any]:
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "losses": tuple((int(log["step"]), float(log["loss"])) for log in history if "loss" in log),
        "eval_loss_before": run.state["eval_loss_before"],
        "eval_loss_after": evaluate(trainer) if has_holdout else None,
        "adapter": _save(trainer, run),
        "resumed_from_step": run.step or None,
    }


def _save(trainer: Trainer, run: RunFolder) -> Path:
    """Write the adapter (for method "full": the model) and its tokenizer."""
    folder, beside = run.path / ADAPTER, run.path / f".{ADAPTER}.new"
    for old in (folder, beside):
        shutil.rmtree(old, ignore_errors=True)
    for part in (trainer.model, trainer.processing_class):
        cast(Any, part).save_pretrained(str(beside))
    beside.replace(folder)
    return folder


def _as_ours(error: Exception, config: RunConfig, run: RunFolder) -> AdvisorError | None:
    """Return what a failure means to the caller: a full disk, a full device; None for a defect."""
    from safetensors import SafetensorError

    from lora_advisor.probes.worker import is_out_of_memory

    if isinstance(error, AdvisorError):
        return None
    if is_out_of_memory(error):
        return UnavailableError(
            f"the device must have memory for micro_batch {config.micro_batch} of {config.seq_len} "
            f"tokens, but it ran out; checkpoints are in `{run.path}`; plan again with less --vram."
        )
    if isinstance(error, OSError | SafetensorError):
        return OutputError(f"`{run.path}` must take checkpoints and results, but {error}.")
    return None
