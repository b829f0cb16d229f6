"""The folder of a training: what was begun there, its checkpoints, and what it came to.

    state.json          what is trained, the hold-out's loss before; written before the first step
    holdout.json        the hold-out's losses under the base model, row by row
    flagged-rows.jsonl  rows that the base model knows by heart
    progress.jsonl      what was reported
    plan.json           the plan it was begun with, where there is one
    checkpoint-N/       the trainer's own; at least the last two that are complete
    best-N/             the model that was best on the hold-out
    stopped.json        why a guard ended the training
    adapter/            the result
    result.json         written last: where it stands, the training has ended

A process may be killed at any time, while a checkpoint is written too. A file is replaced as a
whole, and a checkpoint counts only if every file that an exact continuation needs can be read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_advisor.advisor.journal import JOURNAL
from lora_advisor.advisor.processes import here
from lora_advisor.probes.errors import OutputError, StackError, UsageError

STATE, RESULT, ADAPTER, PLAN = "state.json", "result.json", "adapter", "plan.json"
HOLDOUT, FLAGGED, STOPPED = "holdout.json", "flagged-rows.jsonl", "stopped.json"

#: What transformers' Trainer writes beside the weights; all of it decides how training goes on.
_ARCHIVES = ("optimizer.pt", "scheduler.pt")

#: And with a GradScaler, which there is for fp16 on a GPU (transformers/trainer.py, SCALER_NAME).
_SCALER = "scaler.pt"


@dataclass(kw_only=True)
class RunFolder:
    """The folder of one training, opened.

    Attributes:
        path: The folder.
        state: Content of state.json.
        checkpoint: Last complete checkpoint; None to begin at the first step.
        result: Content of result.json where the training has ended; else None.
    """

    path: Path
    state: dict[str, Any] = field(repr=False)
    checkpoint: Path | None
    result: Mapping[str, Any] | None

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def has_scaler(self) -> bool:
        """Whether a GradScaler is part of the training's state."""
        return _has_scaler(self.state["identity"], self.state["stack"])

    def look_again(self) -> None:
        """Find the last complete checkpoint, and remove torn ones; the first process does."""
        self.checkpoint = here().first(self.remove_torn)

    def remove_torn(self) -> Path | None:
        """Remove torn checkpoints, and return the last complete one."""
        return last_complete_checkpoint(self.path, scaler=self.has_scaler, processes=self.processes)

    @property
    def processes(self) -> int:
        """How many processes train."""
        return int(self.state["identity"].get("processes", 1))

    def checkpoint_until(self, step: int) -> Path | None:
        """Return the last complete checkpoint of at most so many steps."""
        found = sorted(self.path.glob("checkpoint-*"), key=step_of, reverse=True)
        scaler, processes = self.has_scaler, self.processes
        complete = (f for f in found if step_of(f) <= step and is_complete(f, scaler, processes))
        return next(complete, None)

    def keep(self, **values: Any) -> None:
        """Add to state.json; of several processes the first writes, and all remember."""
        self.state.update(values)
        if here().is_first:
            write_json(self.path / STATE, self.state)


def open_run_folder(
    path: Path, *, identity: Mapping[str, Any], stack: Mapping[str, Any], resume: bool
) -> RunFolder:
    """Open the folder of a training, to begin it or to go on with it.

    Args:
        path: The folder; made if it is not there.
        identity: What decides the weights: configuration, data, schedule, seed.
        stack: What must be the same to go on exactly: versions and device.
        resume: Go on with what is there; else what an earlier training left there is removed.

    Raises:
        OutputError: The folder cannot be written.
        UsageError: Another training, or something else, is there.
        StackError: The training there ran on another stack or device.
    """
    _make_writable(path)
    state = read_json(path / STATE)
    found = sorted(path.glob("checkpoint-*"))
    if state is None and found:
        raise UsageError(
            f"`{path}` must be empty or hold a training of this program, but holds {found[0].name} "
            "of another; give another folder."
        )
    if state is not None and resume:
        _check_same(path, state["identity"], identity)
        run = RunFolder(path=path, state=state, checkpoint=None, result=read_json(path / RESULT))
        run.checkpoint = run.remove_torn()
        if run.checkpoint is not None:
            _check_stack(path, state["stack"], stack)
        return run
    for name in (RESULT, HOLDOUT, FLAGGED, STOPPED, JOURNAL, PLAN, STATE):
        if name == STATE:  # it goes last: it says that the rest is ours
            for folder in [*found, *path.glob("best-*"), path / ADAPTER]:
                shutil.rmtree(folder, ignore_errors=True)
        (path / name).unlink(missing_ok=True)
    run = RunFolder(path=path, state={}, checkpoint=None, result=None)
    run.keep(identity=dict(identity), stack=dict(stack), seconds_at={})
    return run


def _has_scaler(identity: Mapping[str, Any], stack: Mapping[str, Any]) -> bool:
    fp16 = identity.get("precision") == "fp16" and identity.get("trainer") != "loop"
    return fp16 and stack.get("device") == "cuda"


def last_complete_checkpoint(
    path: Path, *, scaler: bool = False, processes: int = 1
) -> Path | None:
    """Return the latest checkpoint that can be gone on from, and remove torn ones."""
    complete = None
    for folder in sorted(path.glob("checkpoint-*"), key=step_of):
        if is_complete(folder, scaler, processes):
            complete = folder
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return complete


def is_complete(checkpoint: Path, scaler: bool = False, processes: int = 1) -> bool:
    """Whether every file that an exact continuation needs is there and can be read to its end.

    Args:
        checkpoint: The folder.
        scaler: Whether the state of a GradScaler is one of them.
        processes: How many trained: each has written its random numbers.
    """
    state = read_json(checkpoint / "trainer_state.json")
    if state is None or state.get("global_step") != step_of(checkpoint):
        return False
    archives = [*_ARCHIVES, *([_SCALER] if scaler else [])]
    archives += (
        ["rng_state.pth"]
        if processes == 1
        else [f"rng_state_{rank}.pth" for rank in range(processes)]
    )
    if not all(_is_archive(checkpoint / name) for name in archives):
        return False
    index = read_json(checkpoint / "model.safetensors.index.json")
    shards = (
        set() if index is None else {checkpoint / name for name in index["weight_map"].values()}
    )
    weights = shards | set(checkpoint.glob("*.safetensors"))
    return bool(weights) and all(_is_safetensors(file) for file in weights)


def _is_archive(file: Path) -> bool:
    """Whether a file of torch.save is whole, by the checksums of the zip archive that it is."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _is_safetensors(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # compares the header with the file's size
            return True
    except (OSError, SafetensorError):
        return False


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Replace a file as a whole, so that no reader ever meets half of it."""
    beside = file.with_name(f".{file.name}.new")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def make_durable(folder: Path) -> None:
    """Have a folder's files on the disk, so that a power loss cannot take them any more."""
    for path in [*(file for file in folder.rglob("*") if file.is_file()), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the object a file holds; None where there is none that can be read."""
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"`{path}` must be a folder that can be written, but {error}.") from None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps of a checkpoint by its name; -1 for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    old, new = ({"processes": 1, **named} for named in (old, new))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise UsageError(
                f"`{path}` holds a training with {name} {old.get(name)!r}, but this one has "
                f"{new.get(name)!r}; give another folder, or start anew without resuming."
            )


def _check_stack(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old.get("step") != new.get("step"):
        raise StackError(
            f"`{path}` holds a training begun by a version of this program whose training step is "
            "another one, so it cannot go on exactly; install that version again, or start anew "
            "without resuming."
        )
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise StackError(
                f"`{path}` holds a training begun with {name} {old.get(name)}, which cannot go on "
                f"exactly with {new.get(name)}; go back to {old.get(name)}, or start anew without "
                "resuming."
            )
