"""Imported runs of the card a plan is for, in another machine: they teach, and are no probes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from lora_advisor.advisor.session import Session
from lora_advisor.probes.cards import card_of
from lora_advisor.probes.machine import Machine
from lora_advisor.probes.record import ProbeResult, difference


def teach(session: Session, imported: Iterable[ProbeResult]) -> None:
    """Let the models of a card that is not here learn from one machine's runs on such a card.

    Only runs of the same stack and model count, and only those of the machine that has most: hosts
    and drivers differ. A card that is here is measured, and takes nothing from others.

    Args:
        session: The planning run, before its search.
        imported: All imported runs.
    """
    if session.spec.device != "none" or session.card is None:
        return
    machines: dict[Machine, list[ProbeResult]] = defaultdict(list)
    of_card = [result for result in imported if _is_of_card(session, result)]
    for result in of_card:
        if result.stack == session.stack:
            config = dataclasses.replace(result.config, model=session.spec.model)
            machines[result.machine].append(dataclasses.replace(result, config=config))
    if of_card and not machines:
        there = difference(of_card[0], of_card[0].machine, session.stack)
        session.say(f"{len(of_card)} imported runs of this card left out: other versions ({there})")
    if not machines:
        return
    machine, runs = max(machines.items(), key=lambda item: len(item[1]))
    session.predictor = session.predictor.learn_elsewhere(runs, machine)
    session.imported = len(runs)
    session.say(f"{len(runs)} imported runs of an {where(machine)} taken up: not measured here")


def _is_of_card(session: Session, result: ProbeResult) -> bool:
    return (
        result.outcome == "ok"
        and not result.doubts
        and result.config.is_buildable
        and result.step_s is not None
        and result.machine.kind == "cuda"
        and result.architecture == session.architecture.fingerprint
        and card_of(result.machine) == session.card
    )


def where(machine: Machine) -> str:
    """Say which machine that is."""
    host = "" if machine.host is None else f" in a machine with {machine.host}"
    return machine.name + host
