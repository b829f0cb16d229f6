"""Whether a plan is for the machine and the stack that are here."""

from __future__ import annotations

from lora_advisor.advisor.asking import check_device
from lora_advisor.probes import unsloth
from lora_advisor.probes.errors import StackError
from lora_advisor.probes.machine import detect_machine, detect_stack
from lora_advisor.probes.plan import Plan


def training_device(made: Plan, *, ignore: bool) -> str:
    """Return the device a plan is for, here; refuse a plan of another machine or stack."""

    stack = detect_stack()
    # A process with another engine's packages goes on for one that has compared.
    if made.stack != stack and not ignore and not unsloth.is_here():
        changed = [
            f"{name} {old or 'missing'} there, {getattr(stack, name) or 'missing'} here"
            for name, old in made.stack.to_json().items()
            if old != getattr(stack, name)
        ]
        raise StackError(
            f"the plan was made with another stack ({'; '.join(changed)}): plan again, or give "
            "--ignore-stack."
        )
    if made.machine.kind == "card":
        device = check_device("auto")
        if device == "none":
            raise StackError(
                f"the plan is for an {made.machine.name}, but no GPU is here; plan with --device "
                "cpu."
            )
        return device
    device = check_device(made.machine.kind)
    if detect_machine(device) != made.machine and not ignore:
        raise StackError(
            f"the plan was made on another machine ({made.machine.name}): plan again, or give "
            "--ignore-stack."
        )
    return device
