"""Plans and answers as text for people. Bytes become GiB and seconds hours only here."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from lora_advisor.advisor.finding import Finding
from lora_advisor.probes.batching import batching_of
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Candidate, Plan
from lora_advisor.probes.prediction import Interval
from lora_advisor.probes.record import ProbeResult

#: How each kind of evidence is said.
KNOWN = {
    "traced": "traced: a prediction, not measured",
    "probed elsewhere": "predicted from imported runs of such a card in another machine, none of "
    "them measured here",
    "probed": "predicted from probes of neighbouring configurations here",
    "proved": "proved: this configuration ran under the cap",
}


def gib(size: float) -> str:
    """Write a size for people."""
    return f"{size / GIB:.2f} GiB"


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def time_text(seconds: Interval | None) -> str:
    """Write a predicted time; unknown is said."""
    if seconds is None:
        return "unknown"
    return f"{duration(seconds.value)} ({duration(seconds.low)} to {duration(seconds.high)})"


def speed_text(candidate: Candidate) -> str:
    """Write a speed with how it is known."""
    measured = candidate.measured
    if measured is not None and measured.tokens_per_s is not None:
        return f"{measured.tokens_per_s:,.0f} tokens/s measured"
    return interval_text(candidate.prediction.tokens_per_s)


def interval_text(speed: Interval | None) -> str:
    """Write a predicted speed; unknown is said."""
    if speed is None:
        return "unknown"
    return f"{speed.value:,.0f} tokens/s ({speed.low:,.0f} to {speed.high:,.0f})"


def plan_text(plan: Plan) -> str:
    """Write a plan: the answer first, then why, then what it rests on."""
    from lora_advisor.advisor.report_data import data_text
    from lora_advisor.advisor.report_savings import data_lines, savings_text
    from lora_advisor.advisor.report_scaling import scaling_text

    chosen = plan.chosen
    lines = [_headline(plan), ""]
    lines.append(tabulate(config_rows(chosen.config), tablefmt="plain"))
    lines += ["", _figures(plan), "", f"known how: {KNOWN[chosen.evidence]}"]
    shared = scaling_text(plan)
    lines += [] if shared is None else ["", shared]
    lines += data_lines(plan)
    for told in (data_text(plan), savings_text(plan)):
        lines += [] if told is None else ["", told]
    lines += ["", _against_baseline(plan), ""]
    lines.append(_candidates("runners-up", plan.runners_up))
    if len(plan.front) > 1:
        lines += ["", _front(plan)]
    if plan.rejected:
        lines += ["", _candidates("cannot run", plan.rejected)]
    if plan.excluded:
        lines += ["", "left out: " + "; ".join(f"{what} ({why})" for what, why in plan.excluded)]
    lines += ["", _effort(plan)]
    return "\n".join(line for line in lines if line is not None)


def _front(plan: Plan) -> str:
    """Write the configurations of which none is better in everything."""
    from lora_advisor.advisor.arms import describe

    rows = []
    for candidate in plan.front:
        energy = candidate.joules_per_token
        rows.append(
            [
                describe(candidate.config),
                f"{candidate.tokens_per_s or 0:,.0f}",
                "unknown" if energy is None else f"{energy:.3g}",
                f"{candidate.config.seq_len:,}",
                candidate.evidence,
            ]
        )
    header = ["none better in everything", "tokens/s", "J/token", "sequence", "known how"]
    return tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True)


def _headline(plan: Plan) -> str:
    where = plan.machine.name
    if plan.machine.kind == "card":
        where += " (not here: predicted)"
    return f"{plan.architecture.name} on {where}, {gib(plan.spec.vram_bytes)}"


def trainer_text(config: RunConfig) -> str:
    """Return whose trainer runs, with its loss."""
    return f"{config.trainer}, {config.loss.replace('_', '-')} loss"


def config_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Return a configuration knob by knob."""
    quantised = f", {config.quant_type}" + (", double" if config.double_quant else "")
    rows = [
        ("method", config.method + (quantised if config.method == "qlora" else "")),
        (
            "batch",
            f"{config.micro_batch} {'pairs ' if config.stage == 'dpo' else ''}x "
            f"{config.accumulation} accumulation, {config.seq_len} tokens",
        ),
        ("precision", config.precision),
        (
            "checkpointing",
            config.checkpointing
            + (", last products not recomputed" if config.recompute == "needed" else ""),
        ),
        ("optimizer", config.optimizer),
        (
            "kernels",
            config.kernels
            + (f", {config.adapter} adapter" if config.adapter != "peft" else "")
            + (f", compiled {config.compile}" if config.compile != "off" else "")
            + (", CUDA graph" if config.cuda_graph != "off" else ""),
        ),
        *([] if batching_of(config) == "random" else [("rows", batching_of(config))]),
        ("trainer", trainer_text(config)),
        ("allocator", config.allocator),
        *([("embeddings", "in host memory")] if config.embedding == "host" else []),
    ]
    if config.lora is not None:
        targets = (
            config.lora.targets
            if isinstance(config.lora.targets, str)
            else ", ".join(config.lora.targets)
        )
        rows.insert(1, ("adapter", f"r {config.lora.r}, alpha {config.lora.alpha:g}, {targets}"))
    return rows


def _energy(candidate: Candidate) -> str:
    """Write a predicted energy with how it is known."""
    energy = candidate.prediction.joules_per_token
    if energy is None:
        return "unknown"
    text = f"{energy.value:.3g} ({energy.low:.2g} to {energy.high:.2g})"
    limit = candidate.prediction.energy_source == "board power"
    return text + (", board power: its limit times the time" if limit else "")


def _joules(ran: ProbeResult | None) -> str:
    if ran is None:
        return "not measured"
    if ran.joules_per_token is None:
        return "unknown"
    source = "" if ran.energy_source == "counter" else f" ({ran.energy_source})"
    return f"{ran.joules_per_token:.3g}{source}"


def _figures(plan: Plan) -> str:
    chosen, memory = plan.chosen, plan.chosen.prediction.memory
    header = ["", "predicted", "measured"]
    ran = chosen.measured
    rows = [
        [
            "tokens/s",
            interval_text(chosen.prediction.tokens_per_s),
            _number(ran.tokens_per_s if ran else None),
        ],
        ["live tensors", gib(memory.allocated_bytes), _size(ran.allocated_bytes if ran else None)],
        ["allocator", gib(memory.reserved_bytes), _size(ran.reserved_bytes if ran else None)],
        [
            "process",
            f"{gib(memory.process_bytes)}, at most {gib(memory.process_upper_bytes)}",
            _size(ran.process_bytes if ran else None),
        ],
    ]
    rows.append(["joules/token", _energy(chosen), _joules(ran)])
    return tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f}"


def _size(value: int | None) -> str:
    return "not measured" if value is None else gib(value)


def _against_baseline(plan: Plan) -> str:
    baseline = plan.baseline
    if baseline is None:
        return "baseline: none"
    trainer = "TRL's DPOTrainer" if baseline.config.stage == "dpo" else "transformers.Trainer"
    text = (
        f"baseline ({trainer}, QLoRA after prepare_model_for_kbit_training, micro-batch "
        f"{baseline.config.micro_batch}): "
    )
    if baseline.measured is not None and baseline.measured.outcome != "ok":
        return text + baseline.measured.outcome.replace("_", " ")
    mine, other = plan.chosen.tokens_per_s, baseline.tokens_per_s
    if mine is None or other is None:
        return text + "unknown"
    kind = "measured" if baseline.evidence == "proved" else baseline.evidence
    return text + f"{other:,.0f} tokens/s ({kind}); the plan is {mine / other:.1f} times as fast"


def _candidates(title: str, candidates: Sequence[Candidate]) -> str:
    from lora_advisor.advisor.arms import describe

    rows = [
        [
            describe(c.config),
            "-" if c.tokens_per_s is None else f"{c.tokens_per_s:,.0f}",
            f"{c.prediction.memory.process_bytes / GIB:.2f}",
            c.reason,
        ]
        for c in candidates
    ]
    return tabulate(rows, headers=[title, "tokens/s", "GiB", "why not"], disable_numparse=True)


def _effort(plan: Plan) -> str:
    text = f"{plan.trials} configurations looked at in {duration(plan.wall_s)}"
    if plan.machine.kind == "card":
        text += "; no probe was run: there is no such card here"
        if plan.imported_from is None:
            return text
        from lora_advisor.advisor.elsewhere import where

        return f"{text}; {plan.imported} imported runs of an {where(plan.imported_from)} reused"
    text += f"; {plan.probes} probes in {duration(plan.probing_s)}"
    return text + (f", {plan.reused} earlier ones reused" if plan.reused else "")


def doctor_text(findings: Sequence[Finding]) -> str:
    """Write what the doctor found, what is wrong first."""
    order = {"error": 0, "warning": 1, "unknown": 2, "ok": 3}
    rows = [
        [finding.status, finding.name, finding.value, finding.advice or ""]
        for finding in sorted(findings, key=lambda f: order[f.status])
    ]
    return tabulate(
        rows,
        headers=["", "what", "found", "what to do"],
        tablefmt="simple",
        maxcolwidths=[None, None, 40, 50],
    )


def cards_text(table: Sequence[Card]) -> str:
    """Write the card table."""
    rows = [
        [
            c.key,
            f"{c.memory_gib:g}",
            f"{c.memory_bandwidth_gb_s:g}",
            c.bf16_tflops or "none",
            c.fp32_tflops,
        ]
        for c in table
    ]
    return tabulate(rows, headers=["--gpu", "GiB", "GB/s", "bf16 TFLOP/s", "fp32 TFLOP/s"])
