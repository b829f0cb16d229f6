"""From the command line's words to the objects the library takes; `options` is what click parsed.

Nothing here imports torch: `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lora_advisor.advisor.knobs import DEFAULT_BATCH, KNOBS
from lora_advisor.probes.architectures import Architecture, resolve_architecture
from lora_advisor.probes.cards import Card, card_of, find_card
from lora_advisor.probes.config import FOREIGN_TRAINERS, LoraShape, RunConfig
from lora_advisor.probes.cutting import check_long_rows
from lora_advisor.probes.errors import (
    DataError,
    MissingInputError,
    UnavailableError,
    UsageError,
)
from lora_advisor.probes.machine import (
    GIB,
    Machine,
    Stack,
    detect_machine,
    gpu_present,
)
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.prices import Price, read_prices
from lora_advisor.probes.spec import Spec


def cache_dir() -> Path:
    """Return the folder of this user's records."""
    base = os.environ.get("LORA_ADVISOR_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-advisor"


def trace_cache() -> Path:
    """Return the file that keeps what traces came to."""
    return cache_dir() / "traces.sqlite3"


def study_file(machine: Machine, stack: Stack) -> Path:
    """Return the file of this user's studies on a machine with a stack."""
    place = json.dumps([machine.to_json(), stack.to_json()], sort_keys=True)
    digest = hashlib.sha256(place.encode()).hexdigest()[:8]
    return cache_dir() / f"studies-{digest}.sqlite3"


def check_device(device: str) -> str:
    """Turn "auto" into the device there is: "cuda", or "none" for predictions only."""
    if device == "auto":
        return "cuda" if gpu_present() else "none"
    if device == "cuda" and not gpu_present():
        raise UnavailableError(
            "`--device cuda` needs an NVIDIA GPU, but there is none; leave it out to predict."
        )
    if device not in ("cuda", "cpu", "none"):
        raise UsageError(f"`--device` must be auto, cuda, cpu or none, but got {device!r}.")
    return device


def gib_bytes(name: str, value: float) -> int:
    """Turn GiB into bytes; `name` is the option they came with."""
    if not 0 <= value < 1e6:
        raise UsageError(f"`{name}` must be a number of GiB of at least 0, but got {value:g}.")
    return int(value * GIB)


def vram_bytes(options: dict[str, Any], machine: Machine) -> int:
    """Return the memory to plan for: what was given, else what the device has.

    Of a card that is here it is never more than is free before anything is loaded: a desktop and
    its browser hold some of it.
    """
    given = options["vram"]
    free = free_bytes() if machine.kind == "cuda" else None
    if given is None:
        return free or int(machine.memory_bytes * (0.8 if machine.kind == "cpu" else 1.0))
    if not given > 0:
        raise UsageError(
            f"`--vram` must be above 0 GiB, but got {given:g}; give the card's memory."
        )
    size = gib_bytes("--vram", given)
    if free is None or size <= free:
        return size
    import click

    click.echo(
        f"of {size / GIB:.2f} GiB only {free / GIB:.2f} are free now; planning for those", err=True
    )
    return free


def free_bytes() -> int | None:
    """Return what is free on the first GPU now; None where the driver does not tell."""
    from lora_advisor.probes import nvml

    memory = nvml.memory()
    return None if memory is None else memory.free_bytes


def machine_of(options: dict[str, Any]) -> tuple[Machine, Card | None]:
    """Return the device that is meant, and its row in the card table."""

    if options["gpu"] is not None:
        card = find_card(options["gpu"])
        return card.machine(), card
    device = check_device(options["device"])
    if device == "none":
        card = find_card("rtx-4060")
        return card.machine(), card
    machine = detect_machine(device)
    return machine, card_of(machine) if device == "cuda" else None


def architecture_of(model: str, options: dict[str, Any]) -> Architecture:
    """Return the figures of a model."""

    return resolve_architecture(model, trust_remote_code=options["trust_remote_code"])


def _targets(options: dict[str, Any]) -> str | tuple[str, ...]:
    given = options["targets"]
    return given if given == "all-linear" else tuple(part.strip() for part in given.split(","))


def _fixed(options: dict[str, Any]) -> dict[str, Any]:
    names = (*KNOBS, "micro_batch", "packing", "group_by_length")
    return {name: options[name] for name in names if options[name] is not None}


def spec_of(options: dict[str, Any]) -> tuple[Spec, DataSummary | None]:
    """Return what `plan` is asked for, and what its data holds."""
    from lora_advisor.advisor.datafit import summarise, summarise_pairs

    device = "none" if options["gpu"] is not None else check_device(options["device"])
    machine, card = machine_of({**options, "device": device})
    check_long_rows(options["long_rows"], options["stage"] or "sft")  # before the data is read
    data, seq = None, 1024 if options["seq"] is None else options["seq"]
    if options["data"] is not None:
        architecture = architecture_of(options["model"], options)
        if options["stage"] == "dpo":
            data, seq = summarise_pairs(options["data"], architecture, options["seq"])
        else:
            data, seq = summarise(
                options["data"], architecture, options["seq"], long_rows=options["long_rows"]
            )
    spec = Spec(
        model=options["model"],
        data=None if options["data"] is None else str(options["data"]),
        vram_bytes=vram_bytes(options, machine),
        reserve_bytes=gib_bytes("--reserve", options["reserve"]),
        seq_len=seq,
        effective_batch=DEFAULT_BATCH if options["batch"] is None else options["batch"],
        batch_named=options["batch"] is not None,
        long_rows=options["long_rows"],
        gpus=options.get("gpus", 1),
        epochs=options["epochs"],
        fixed=_fixed(options),
        rank=options["rank"],
        alpha=options["alpha"] if options["alpha"] is not None else 2 * options["rank"],
        dropout=options["dropout"],
        targets=_targets(options),
        probe_budget_s=seconds_of(options["budget"]),
        objective=options["objective"],
        device=device,
        gpu=None if device != "none" or card is None else card.key,
        trust_remote_code=options["trust_remote_code"],
        seed=options["seed"],
        free_trials=options["trials"],
        longer=options["front"],
    )
    return spec, data


def prices_asked(options: dict[str, Any]) -> tuple[Price, ...] | None:
    """Return the prices that the user has brought; None for those of the package."""
    if options["prices"] is None:
        return None
    if options["data"] is None:
        raise UsageError("`--prices` needs `--data`: without rows there is no time to pay for.")
    return read_prices(options["prices"])


def seconds_of(text: str) -> float:
    """Turn a time such as 120s, 5m or 2h into seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        raise UsageError(
            f"`--budget` must be a time such as 120s or 5m, but got {text!r}."
        ) from None


def config_of(options: dict[str, Any]) -> RunConfig:
    """Return the configuration that `fit` is asked about.

    Raises:
        UsageError: It is another engine's.
    """
    if options["config_file"] is None:
        _refuse_engine(options["trainer"])  # before its other knobs are found not to go with it
    config = _asked(options)
    _refuse_engine(config.trainer)
    return _with_attention(config, options) if config.packing else config


def _with_attention(config: RunConfig, options: dict[str, Any]) -> RunConfig:
    """Return the configuration with the attention that `plan` would give its packed rows.

    Raises:
        UsageError: It names one that cannot be.
    """
    from lora_advisor.advisor.attention import packed_attention, why_not_varlen

    architecture, (machine, _) = architecture_of(config.model, options), machine_of(options)
    if config.attention == "varlen":
        why_not = why_not_varlen(architecture, None, machine, config.precision)
        if why_not is not None:
            raise UsageError(f'`attention` must be "sdpa" here, not "varlen": {why_not}.')
    elif options["config_file"] is None and options["attention"] is None:
        attention = packed_attention(architecture, None, machine, config.precision)
        return config.replace(attention=attention)
    return config


def _refuse_engine(trainer: str | None) -> None:
    if trainer in FOREIGN_TRAINERS:
        raise UsageError(
            "`--trainer` must be trl, transformers or loop here, for another engine's step cannot "
            f"be traced, but got {trainer!r}; `plan` measures it on a GPU, where it is installed."
        )


def _asked(options: dict[str, Any]) -> RunConfig:
    if options["config_file"] is not None:
        if options["config_file"].suffix in (".yaml", ".yml", ".py"):
            from lora_advisor.advisor.export_command import imported_config

            return imported_config(options["config_file"])
        try:
            return RunConfig.from_json(json.loads(options["config_file"].read_text("utf-8")))
        except FileNotFoundError:
            raise MissingInputError(
                f"`{options['config_file']}` must be a RunConfig, but it is not there."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(
                f"`{options['config_file']}` must be a RunConfig as JSON, but {error}."
            ) from None
    values = {
        "trainer": "trl", "method": "qlora", "precision": "bf16", "optimizer": "adamw_torch_fused",
        "checkpointing": "full", "attention": "sdpa", "kernels": "none", "compile": "off",
        "allocator": "default", "micro_batch": 1, **_fixed(options),
    }  # fmt: skip
    fused = values["trainer"] == "trl" or values["kernels"] == "liger"
    rank, alpha = options["rank"], options["alpha"]
    shape = LoraShape(
        r=rank,
        alpha=2 * rank if alpha is None else alpha,
        dropout=options["dropout"],
        targets=_targets(options),
    )
    return RunConfig(
        model=options["model"],
        seq_len=options["seq"],
        accumulation=options["accumulation"],
        loss="fused" if fused else "full",
        lora=None if values["method"] == "full" else shape,
        **values,
    )
