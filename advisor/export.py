"""Write a plan for another trainer, and say what that trainer cannot express."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from lora_advisor.advisor.arms import describe
from lora_advisor.advisor.export_data import shape_of_data
from lora_advisor.advisor.export_words import (
    Lost,
    Recipe,
    Target,
    comment,
    mark,
    quoted,
    settle,
)
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError

if TYPE_CHECKING:
    from lora_advisor.advisor.export_cost import Prices
    from lora_advisor.probes.plan import Plan

#: As `--to` takes them.
TARGETS = ("trl", "transformers", "axolotl", "llamafactory", "unsloth", "accelerate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file for another trainer.

    Attributes:
        target: For whom.
        text: What is in it.
        config: What that trainer will run, in our words.
        lost: What it cannot express.
        notes: What else is to be known.
    """

    target: Target
    text: str
    config: RunConfig
    lost: tuple[Lost, ...]
    notes: tuple[str, ...]


def find_target(name: str) -> Target:
    """Return a target by its name, or by name==version.

    Raises:
        UsageError: There is none, or none of that version.
    """
    from lora_advisor.advisor.export_accelerate import ACCELERATE
    from lora_advisor.advisor.export_axolotl import AXOLOTL
    from lora_advisor.advisor.export_llamafactory import LLAMAFACTORY
    from lora_advisor.advisor.export_trl import TRANSFORMERS, TRL
    from lora_advisor.advisor.export_unsloth import UNSLOTH

    every = (TRL, TRANSFORMERS, AXOLOTL, LLAMAFACTORY, UNSLOTH, ACCELERATE)
    wanted, _, version = name.partition("==")
    found = next((target for target in every if target.name == wanted), None)
    if found is None:
        raise UsageError(f"`--to` must be one of {', '.join(TARGETS)}, but got {name!r}.")
    if version and version != found.versions[wanted]:
        raise UsageError(
            f"`--to` {wanted} is written for version {found.versions[wanted]} alone, but got "
            f"{version!r}; leave the version out."
        )
    return found


def recipe_of(plan: Plan) -> Recipe:
    """Return what an export needs of a plan beside its configuration."""
    from lora_advisor.probes.architectures import hub_id_of

    architecture, config = plan.architecture, plan.chosen.config
    return Recipe(
        model=architecture.weights or hub_id_of(config.model) or config.model,
        data=plan.spec.data,
        shape=shape_of_data(plan.spec.data, config.stage),
        rows=None if plan.data is None else plan.data.rows,
        epochs=plan.spec.epochs,
        device="cpu" if plan.machine.kind == "cpu" else "cuda",
        stack=plan.stack,
        trust_remote_code=plan.spec.trust_remote_code,
        excluded=_excluded(plan),
        gpus=plan.spec.gpus,
    )


def _excluded(plan: Plan) -> tuple[str, ...]:
    """Return the modules that "all-linear" means but which carry no adapter: a mixture's routers.

    They are looked for in models that name experts alone, for that takes the model's skeleton.
    """
    config, figures = plan.chosen.config, plan.architecture.hf_config
    experts = any("expert" in name for name in figures)
    if config.lora is None or config.lora.targets != "all-linear" or not experts:
        return ()
    from lora_advisor.probes.adapters import routers
    from lora_advisor.probes.weights import skeleton

    return tuple(routers(skeleton(config.replace(method="lora"), plan.architecture, "cpu")))


def export_config(
    config: RunConfig, recipe: Recipe, target: Target, *, prices: Prices | None = None
) -> Exported:
    """Write a configuration for a target.

    Args:
        config: What is to be run.
        recipe: With what.
        target: For whom.
        prices: Says what a loss costs; None to say it in words alone.

    Raises:
        UsageError: Nothing can be written for it.
    """
    why = target.refuses(config)
    if why is not None:
        raise UsageError(f"`--to` {target.name} does not go with this plan: {why}.")
    run, lost = settle(config, target.rules(recipe))
    if prices is not None:
        lost = _priced(config, lost, prices)
    notes = (*target.notes(config, recipe), *_stacks(target), *_places(recipe, target))
    head = _header(config, recipe, target, lost, notes)
    text = head + target.write(run, recipe, config)
    return Exported(target=target, text=text, config=run, lost=lost, notes=notes)


def export_plan(plan: Plan, target: Target, *, prices: Prices | None = None) -> Exported:
    """Write what a plan has chosen for a target; as `export_config`."""
    return export_config(plan.chosen.config, recipe_of(plan), target, prices=prices)


def _stacks(target: Target) -> Sequence[str]:
    """Return what is to be said of a trainer that brings other versions of its own."""
    if target.name not in ("axolotl", "llamafactory"):
        return ()
    return (
        f"The plan's figures belong to its own stack: on {_versions(target.versions)} nothing was "
        "measured.",
    )


def _places(recipe: Recipe, target: Target) -> Sequence[str]:
    """Return what is to be said of a plan for several cards."""
    if recipe.gpus == 1 or target.name == "accelerate":
        return ()
    return (
        f"The plan is for {recipe.gpus} cards that share every step: start {recipe.gpus} "
        f"processes, as `accelerate launch --num_processes {recipe.gpus}` does.",
    )


def _priced(config: RunConfig, lost: Sequence[Lost], prices: Prices) -> tuple[Lost, ...]:
    priced = []
    for item in lost:
        priced.append(dataclasses.replace(item, cost=prices.between(config, item.config)))
        config = item.config
    return tuple(priced)


def _header(
    config: RunConfig, recipe: Recipe, target: Target, lost: Sequence[Lost], notes: Sequence[str]
) -> str:
    carried = {
        "target": target.name,
        "model": config.model,
        "written": recipe.model,
        "targets": None if config.lora is None else config.lora.to_json()["targets"],
        "allocator": config.allocator,
    }
    lines = [
        f"Written by lora-advisor {metadata.version('lora-advisor')} for "
        f"{_versions(target.versions)}.",
        f"The plan's stack: {_versions(_stack(recipe))}.",
        f"The plan: {describe(config)}; model {quoted(config.model)}.",
        f"Run it with: {launch(config, recipe, target)}",
    ]
    if lost:
        lines += ["", f"What {target.name} cannot express:"]
        lines += [f"* {sentence(item)}" for item in lost]
    if notes:
        lines += ["", *(f"Note: {note}" for note in notes)]
    return mark(carried) + comment("\n".join(lines)) + "\n"


def sentence(lost: Lost) -> str:
    """Return what is lost, and its cost where there is one to tell."""
    return lost.why if lost.cost is None else f"{lost.why} {lost.cost}"


def launch(config: RunConfig, recipe: Recipe, target: Target, file: str = "FILE") -> str:
    """Return the command that runs an export, the allocator's setting in front where it needs it.

    A script of ours sets it itself; Axolotl sets it to expandable segments unless told otherwise.
    """
    setting = ""
    expandable = config.allocator == "expandable_segments"
    if recipe.device == "cuda":
        own = target.name in ("trl", "transformers", "axolotl")
        if expandable and not own:
            setting = "PYTORCH_ALLOC_CONF=expandable_segments:True "
        if not expandable and target.name == "axolotl":
            setting = "PYTORCH_ALLOC_CONF=expandable_segments:False "
    return setting + target.run.format(file=file)


def _versions(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _stack(recipe: Recipe) -> dict[str, str | None]:
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "liger_kernel")
    return {name: getattr(recipe.stack, name) for name in names}
