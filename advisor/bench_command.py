"""The command `bench`: its options, and from them to the folder of results."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_advisor.advisor.knobs import KNOBS
from lora_advisor.advisor.options import accumulation_option, model_options
from lora_advisor.probes.errors import BusyError, UnavailableError, UsageError

if TYPE_CHECKING:
    from lora_advisor.advisor.bench import Bench
    from lora_advisor.advisor.bench_design import Design
    from lora_advisor.advisor.bench_study import Study
    from lora_advisor.probes.architectures import Architecture
    from lora_advisor.probes.machine import Machine

#: Knobs that are the same in all runs, and what they are where nothing is said: a plain Trainer
#: with checkpointing, as in the paper.
_HELD = {"stage": "sft", "trainer": "transformers", "checkpointing": "full", "attention": None,
         "kernels": "none", "adapter": "peft", "compile": "off",
         "cuda_graph": "off", "recompute": "layer", "allocator": "default",
         "embedding": "device"}  # fmt: skip


def _held_options(command: Any) -> Any:
    for name, value in reversed(_HELD.items()):
        words = f"Hold it at: {KNOBS[name]}"
        default = value if value is not None else "what the model runs with"
        command = click.option(
            f"--{name.replace('_', '-')}", default=value, help=f"{words} (default: {default})."
        )(command)
    return command


@click.command()
@model_options()
@click.option("--methods", default=None, help="Levels, with commas: lora, qlora, full "
              "(default: lora,qlora).")  # fmt: skip
@click.option("--optimizers", default=None, help="Levels: names of transformers' OptimizerNames "
              "(default: adamw_torch,adamw_torch_fused,paged_adamw_8bit). paged_adamw_32bit "
              "parts what paging does from what 8 bits do.")  # fmt: skip
@click.option("--precisions", default=None, help="Levels: fp16, bf16, fp32 (default: fp16,bf16; on "
              "a CPU fp32).")  # fmt: skip
@click.option("--sizes", default=None, help="Levels: micro-batch x tokens (default: "
              "1x512,2x512,2x1024,2x2048).")  # fmt: skip
@_held_options
@accumulation_option
@click.option("--repeats", type=int, default=3, show_default=True, help="Runs of each combination.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random order.")
@click.option("--steps", type=int, default=10, show_default=True, help="Steps measured in a run.")
@click.option("--budget", default="30m", show_default=True, help="Time for this call, such as 30m "
              "or 2h; the same with --out FOLDER goes on where it stopped.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder of the results "
              "(default: bench-CARD-DATE); one that holds runs goes on.")  # fmt: skip
def bench(**options: Any) -> int:
    """Measure what method, optimizer, precision and size each do on this card.

    A full factorial in random order, several repeats, effects with intervals, beside the table of
    the paper that changed three of them at once. Writes runs.csv, bench.json, report.md and
    effects.png, for you and for others to put together with their cards.

    \b
    Examples:
      lora-advisor bench --vram 8
      lora-advisor bench --optimizers adamw_torch,paged_adamw_32bit,paged_adamw_8bit --budget 2h
      lora-advisor bench --device cpu --model smollm2-135m --sizes 1x64,2x64 --repeats 2
    """
    from lora_advisor.advisor.asking import seconds_of
    from lora_advisor.advisor.bench import go_on
    from lora_advisor.advisor.bench_files import RECORD
    from lora_advisor.probes.record import check_writable

    if options["steps"] < 3:
        raise UsageError(f"`--steps` must be at least 3, but got {options['steps']}.")
    budget_s = seconds_of(options["budget"])
    if not 0 < budget_s < 1e9:
        raise UsageError(f"`--budget` must be above 0 seconds, but got {options['budget']!r}.")
    made = _open(options)
    folder = options["out"] or Path(f"bench-{card_slug(made.machine)}-{date.today().isoformat()}")
    record = folder / RECORD
    check_writable(record)
    made = go_on(made, record, say=_say)
    _say(f"{made.missing} runs to do, {options['repeats']} of each configuration; in {folder}")
    study = _measure(made, folder, budget_s=budget_s, steps=options["steps"])
    return _tell(study, folder, as_json=options["as_json"])


def _open(options: dict[str, Any]) -> Bench:
    """Return the bench that is asked for, nothing run yet; what is wrong is said before a run."""
    from lora_advisor.advisor.asking import architecture_of, gib_bytes, vram_bytes
    from lora_advisor.advisor.bench import Bench, cap_of
    from lora_advisor.probes.machine import detect_machine, detect_stack

    device = _device(options)
    factors = _factors(options, device)
    architecture = architecture_of(options["model"], options)
    machine = detect_machine(device)
    design = _design(options, factors, architecture, device)
    return Bench(
        design=design,
        architecture=architecture,
        machine=machine,
        stack=detect_stack(),
        device=device,
        vram_bytes=None if options["vram"] is None else gib_bytes("--vram", options["vram"]),
        cap_bytes=cap_of(
            machine,
            vram_bytes=vram_bytes(options, machine),
            reserve_bytes=gib_bytes("--reserve", options["reserve"]),
        ),
    )


def _device(options: dict[str, Any]) -> str:
    """Return the device to measure on: there must be one."""
    from lora_advisor.advisor.asking import check_device

    if options["gpu"] is not None:
        raise UsageError(
            "`--gpu` names a card to predict for, but `bench` measures: leave it out on a machine "
            "that has the card, or use `plan --gpu`."
        )
    device = check_device(options["device"])
    if device != "none":
        return device
    if options["device"] == "none":
        raise UsageError("`--device` must be auto, cuda or cpu: `bench` measures.")
    raise UnavailableError(
        "`bench` measures, but there is no NVIDIA GPU here: give --device cpu and a small --model."
    )


def _factors(options: dict[str, Any], device: str) -> dict[str, tuple[str, ...]]:
    from lora_advisor.advisor.bench_design import (
        CPU_PRECISIONS,
        DEFAULTS,
        FACTORS,
        OPTIONS,
        levels_of,
    )

    defaults = {**DEFAULTS, **({"precision": CPU_PRECISIONS} if device == "cpu" else {})}
    return {
        name: levels_of(name, options[OPTIONS[name].removeprefix("--")], defaults[name])
        for name in FACTORS
    }


def _design(
    options: dict[str, Any],
    factors: dict[str, tuple[str, ...]],
    architecture: Architecture,
    device: str,
) -> Design:
    """Return the factorial around the knobs that are held."""
    from lora_advisor.advisor.asking import config_of
    from lora_advisor.advisor.bench_design import make_design
    from lora_advisor.probes.architectures import attention_of

    # One configuration that gives what is shared; its levels are replaced.
    first = {"method": "lora", "optimizer": "adamw_torch", "precision": "bf16", "micro_batch": 1}
    unused = {"packing": None, "group_by_length": None, "config_file": None, "seq": 512}
    base = config_of(
        {
            **options,
            **unused,
            **first,
            "attention": options["attention"] or attention_of(architecture),
        }
    )
    return make_design(
        base, factors, device=device, repeats=options["repeats"], seed=options["seed"]
    )


def card_slug(machine: Machine) -> str:
    """Return a device's name as a part of a folder's name."""
    from lora_advisor.probes.cards import card_of

    if machine.kind == "cpu":
        return "cpu"
    card = card_of(machine)
    return card.key if card is not None else re.sub(r"[^a-z0-9]+", "-", machine.name.lower())


def _measure(made: Bench, folder: Path, *, budget_s: float, steps: int) -> Study:
    """Run what is left; however it ends, what was measured is written to the folder."""
    from lora_advisor.advisor.bench import prober, run_bench
    from lora_advisor.advisor.bench_files import RECORD, write_files
    from lora_advisor.advisor.bench_study import study_of
    from lora_advisor.probes.forkserver import ForkServer

    try:
        if made.missing:
            with ForkServer.of(made.architecture) as server:
                probe = prober(made, folder / RECORD, steps=steps, server=server)
                for so_far in run_bench(made, probe, budget_s=budget_s, say=_say):
                    made = so_far
    except (BusyError, KeyboardInterrupt):
        write_files(study_of(made), folder)
        raise
    study = study_of(made)
    write_files(study, folder)
    return study


def _tell(study: Study, folder: Path, *, as_json: bool) -> int:
    """Print the answer: 0 with figures, 1 where nothing ran."""
    from lora_advisor.advisor.bench_files import FILES, document
    from lora_advisor.advisor.report_bench import answer_text

    if study.bench.missing:
        _say(f"{study.bench.missing} runs are missing: the same with --out {folder} goes on")
    _say(f"{', '.join(FILES)} in {folder}")
    click.echo(json.dumps(document(study)) if as_json else answer_text(study))
    return 0 if study.observations else 1


def _say(line: str) -> None:
    click.echo(line, err=True)
