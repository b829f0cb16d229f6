"""The command `train`: its options, and from a plan to an adapter."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_advisor.advisor.options import long_rows_option
from lora_advisor.probes.errors import UsageError

if TYPE_CHECKING:
    from lora_advisor.advisor.launched import Launch
    from lora_advisor.advisor.outcome import Progress, TrainingResult
    from lora_advisor.probes.config import RunConfig
    from lora_advisor.probes.plan import Plan

#: Exit code where a guard has stopped the training and an older checkpoint is what is offered.
_GUARDED = 3

#: What the options say of the plan's own words goes to `training.train` under the same names.
_PASSED = (
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "holdout",
    "eval_batch",
    "eval_steps",
    "check_rows",
    "drop_known",
    "save_steps",
    "seed",
    "tensorboard",
)


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=None,
    help="Training data (default: the plan's).",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for checkpoints, the adapter and result.json.",
)
@click.option(
    "--epochs", type=float, default=None, help="Passes over the data (default: the plan's)."
)
@click.option("--max-steps", type=int, default=None, help="Optimizer steps instead of epochs.")
@click.option("--learning-rate", type=float, default=None, help="Its peak (default: 2e-4; of stage "
              "dpo 5e-6).")  # fmt: skip
@click.option("--warmup-steps", type=int, default=None, help="Steps in which the learning rate "
              "rises (default: one in twenty, at most ten).")  # fmt: skip
@click.option(
    "--holdout",
    type=float,
    default=0.1,
    show_default=True,
    help="Share of the rows to evaluate on and never train on.",
)
@long_rows_option("the plan's", default=None)
@click.option("--eval-batch", type=int, default=None, help="Rows in one evaluation batch "
              "(default: the micro-batch).")  # fmt: skip
@click.option("--eval-steps", type=int, default=None, help="Steps between two evaluations of the "
              "hold-out (default: an epoch).")  # fmt: skip
@click.option("--no-stop-on-overfit", is_flag=True, help="Go on where the hold-out gets worse "
              "while the training loss falls; else the best model so far is offered.")  # fmt: skip
@click.option("--check-rows", type=int, default=None, help="Training rows to look at, for what "
              "the base model knows by heart (default: a sample of 512; 0: none).")  # fmt: skip
@click.option("--drop-known", is_flag=True, help="Do not train on those; all rows are looked at, "
              "unless --check-rows says how many.")  # fmt: skip
@click.option(
    "--save-steps", type=int, default=50, show_default=True, help="Steps between checkpoints."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of hold-out, order and adapter."
)
@click.option("--tensorboard", is_flag=True, help="Write for TensorBoard too, into the output "
              "folder; needs the package tensorboard.")  # fmt: skip
@click.option("--restart", is_flag=True, help="Begin anew where an interrupted run would go on.")
@click.option(
    "--ignore-stack",
    is_flag=True,
    help="Use a plan that was made with other versions or elsewhere.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def train(plan_file: Path, **options: Any) -> int:  # fmt: skip
    """Train with a plan to the end; an interrupted run goes on where it was.

    Ctrl-C or SIGTERM ends it with a checkpoint at the end of the running step, a second one at
    once. Where memory runs out it goes on with a smaller micro-batch and as many rows in a step.
    A loss that leaps or is no number stops it at the last good checkpoint (exit code 3).

    \b
    Examples:
      lora-advisor train plan.json --data chat.jsonl --output runs/first
      lora-advisor train plan.json --output runs/first --eval-steps 100 --drop-known
      lora-advisor train plan.json --output runs/first --long-rows split
    """
    from lora_advisor.advisor.as_one_of import as_one_of

    return as_one_of(lambda launch: _train(plan_file, options, launch))


def _train(plan_file: Path, options: dict[str, Any], launch: Launch) -> int:
    """Train as one of the processes that a launcher has started, mostly the only one."""
    from lora_advisor.advisor.launched import forget_precision, shared_config, take_own_card
    from lora_advisor.advisor.same_place import training_device
    from lora_advisor.probes import unsloth
    from lora_advisor.probes.plan import read_plan

    made = read_plan(plan_file)
    gpus = made.spec.gpus
    config = shared_config(made.chosen.config, planned_for=gpus, processes=launch.size)
    device = training_device(made, ignore=options["ignore_stack"])
    if not config.is_buildable and not unsloth.is_here():
        _check_alone(config, launch)
        _check_engine(made, ignore=options["ignore_stack"])
        _begin_with_its_packages()
    data = options["data"] or (None if made.spec.data is None else Path(made.spec.data))
    if data is None:
        raise UsageError("`--data` must be given: the plan names no data.")
    if made.chosen.config.allocator == "expandable_segments" and device == "cuda":
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    elif not config.is_buildable and device == "cuda":  # as its probes: else they would expand
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if device == "cuda":
        take_own_card(launch)
    forget_precision()
    if launch.size != gpus and launch.rank == 0:
        _say(
            f"the plan is for {_several(gpus, 'card')}, and {_several(launch.size, 'process')} "
            f"will train: as many rows in a step, {config.accumulation} accumulation"
        )
    from lora_advisor.advisor.processes import joined
    from lora_advisor.advisor.report_training import training_text
    from lora_advisor.advisor.stopping import Interrupted

    try:
        with _at_home(config), joined(launch, device):
            result = _run(made, config, data, device, options)
    except Interrupted as stopped:
        if launch.rank == 0:
            _say(str(stopped))
        return stopped.exit_code
    if launch.rank == 0:
        click.echo(json.dumps(result.to_json()) if options["as_json"] else training_text(result))
    guarded = result.stop is not None and result.stop.reason != "over-fitting"
    return _GUARDED if guarded else 0


def _check_alone(config: RunConfig, launch: Launch) -> None:
    if launch.size > 1:
        raise UsageError(
            f"one process must train with trainer {config.trainer!r}, but {launch.size} were "
            "started; start it without a launcher, or plan with --trainer trl."
        )


def _check_engine(made: Plan, *, ignore: bool) -> None:
    from lora_advisor.probes import unsloth
    from lora_advisor.probes.errors import StackError

    measured, here = made.chosen.measured, unsloth.engine()
    if here is None or measured is None or ignore or measured.engine in (None, here):
        return
    raise StackError(
        f"the plan was proved with {measured.engine}, and here is {here}: plan again, or give "
        "--ignore-stack."
    )


@contextlib.contextmanager
def _at_home(config: RunConfig) -> Iterator[None]:
    """Import another engine before what it changes, and leave stdout to the result."""
    if config.is_buildable:
        yield
        return
    from lora_advisor.probes.unsloth_step import begin

    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        begin()
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _begin_with_its_packages() -> None:
    """Go on as a process whose packages are the other engine's: the same command, the same number.

    Raises:
        UnavailableError: It is not installed.
    """
    from lora_advisor.probes import unsloth

    environment = unsloth.environment()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-P", *sys.argv], environment)


def _run(
    made: Plan, config: RunConfig, data: Path, device: str, options: dict[str, Any]
) -> TrainingResult:
    from lora_advisor.advisor.processes import here
    from lora_advisor.advisor.time_ahead import promised
    from lora_advisor.advisor.training import train as run_training

    return run_training(
        config,
        made.architecture,
        data,
        options["output"],
        device=device,
        cap_bytes=made.cap_bytes if device == "cuda" else None,
        epochs=options["epochs"] if options["epochs"] is not None else made.spec.epochs,
        long_rows=options["long_rows"] or made.spec.long_rows,
        stop_on_overfit=not options["no_stop_on_overfit"],
        resume=not options["restart"],
        predicted=None if here().size != made.spec.gpus else promised(made),
        plan=made.to_json(),
        progress=_progress,
        say=_say,
        **{name: options[name] for name in _PASSED},
    )


def _several(count: int, what: str) -> str:
    return f"one {what}" if count == 1 else f"{count} {what}{'es' if what.endswith('s') else 's'}"


def _say(line: str) -> None:
    click.echo(line, err=True)


def _progress(state: Progress) -> None:
    from lora_advisor.advisor.report_training import progress_text

    _say(progress_text(state))
