"""`autoconfigure`: the objects that an existing training script needs, from a plan.

    setup = autoconfigure("qwen2.5-1.5b", vram=8)
    model = AutoModelForCausalLM.from_pretrained(setup.model_name, **setup.model_arguments)
    trainer = SFTTrainer(model=setup.prepare(model), args=setup.training_arguments,
                         peft_config=setup.lora, callbacks=[setup.callback()], ...)

It plans like the command line, with its words and defaults, or takes a plan. Heavy libraries are
imported when objects are made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.probes import unsloth
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from lora_advisor.advisor.beside import Beside
    from lora_advisor.probes.plan import Plan

#: Words of `lora-advisor plan` that are no options of several commands; a test holds the two alike.
_PLAN_WORDS: Mapping[str, Any] = {
    "data": None, "seq": None, "batch": None, "epochs": 1.0, "budget": "120s",
    "objective": "tokens_per_s", "front": False, "trials": 5, "study": None, "record": None,
    "prices": None, "fresh": False, "seed": 0, "long_rows": "truncate", "gpus": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a script needs to train as planned.

    Attributes:
        plan: What the objects are made of.
        config: The configuration they stand for.
        model_name: What `from_pretrained` takes first.
        model_arguments: Its keyword arguments, the quantisation among them.
        training_arguments: TRL's SFTConfig or DPOConfig, or transformers' TrainingArguments.
        lora: peft's LoraConfig; None for full fine-tuning.
        quantization: transformers' BitsAndBytesConfig; None without 4-bit weights.
        notes: What the objects cannot carry, one sentence each.
    """

    plan: Plan
    config: RunConfig
    model_name: str
    model_arguments: dict[str, Any]
    training_arguments: Any
    lora: Any
    quantization: Any
    notes: tuple[str, ...]

    def prepare(self, model: Any) -> Any:
        """Do to a loaded model what arguments cannot say; return what the trainer is to take.

        Layers are compiled, and norms cast up, where that is planned. For transformers' Trainer the
        model comes back with its adapter; TRL's trainers take `lora` and put it on themselves.
        """
        from lora_advisor.probes.finetune import prepare_model, with_adapter
        from lora_advisor.probes.padding_mask import leave_out_padding_mask
        from lora_advisor.probes.weights import keep_trainable

        keep_trainable(model)
        prepare_model(self.config, model)
        if self.config.trainer == "trl":  # its collators pad on the right, as the mask's use asks
            leave_out_padding_mask(model)
        return with_adapter(self.config, model) if self.config.trainer == "transformers" else model

    def callback(self, *, after: int = 10, say: Callable[[str], object] = print) -> Beside:
        """Return a TrainerCallback that tells what is measured beside what was predicted.

        Args:
            after: Steps until the first telling; the second is at the end.
            say: Takes each line.
        """
        from lora_advisor.advisor.beside import Beside

        return Beside(self.plan, after=after, say=say)


def autoconfigure(
    model: str | None = None,
    *,
    plan: Plan | Path | str | None = None,
    output_dir: str = "outputs",
    ignore_stack: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **words: Any,
) -> Setup:
    """Return the objects for a model, data and card.

    Args:
        model: As `--model` takes it; left out, the command line's default, or that of `plan`.
        plan: A plan, or the file of one; None to plan now.
        output_dir: Where the trainer writes.
        ignore_stack: Whether a plan of other versions or another machine is used all the same.
        say: Takes a line of progress while planning.
        words: What `lora-advisor plan` takes, such as vram=8, data="chat.jsonl", seq=2048,
            device="cpu" or trainer="transformers", with its defaults.

    Raises:
        AdvisorError: Of the kind that says what the caller must mend.
    """
    if plan is None:
        if unsloth.engine() is not None:  # whose objects would be its own
            words.setdefault("trainer", "trl")
        made = _make_plan(dict(words) if model is None else {"model": model, **words}, say)
    else:
        if model is not None or words:
            given = ", ".join(sorted([*words, *(["model"] if model else [])]))
            raise UsageError(f"`plan` says what is run, so {given} must be left out.")
        made = _read_plan(plan, ignore_stack=ignore_stack)
    return setup_of(made, output_dir=output_dir)


def setup_of(plan: Plan, *, output_dir: str = "outputs") -> Setup:
    """Return the objects of a plan.

    Raises:
        UsageError: The plan is to train with another engine.
        UnavailableError: The libraries refuse the plan's precision or device here.
    """
    trainer = plan.chosen.config.trainer
    if not plan.chosen.config.is_buildable:
        raise UsageError(
            f"the plan trains with {trainer}, whose objects are its own: `lora-advisor train` runs "
            f"it, `lora-advisor export --to {trainer}` writes a script; or plan with "
            'trainer="trl".'
        )
    from lora_advisor.advisor.export import recipe_of
    from lora_advisor.advisor.user_arguments import training_of
    from lora_advisor.probes.adapters import make_lora_config
    from lora_advisor.probes.arguments import loading_arguments, trl_arguments
    from lora_advisor.probes.weights import quantization_config, weights_dtype

    config, recipe = plan.chosen.config, recipe_of(plan)
    loading = loading_arguments(config, device=recipe.device)
    loading["dtype"] = weights_dtype(config)
    quantization = quantization_config(config) if config.method == "qlora" else None
    if quantization is not None:
        loading["quantization_config"] = quantization
    if recipe.trust_remote_code:
        loading["trust_remote_code"] = True
    arguments = training_of(config, recipe, output_dir=output_dir)
    if config.trainer == "trl":
        arguments.update(trl_arguments(config))
    lora = None
    if config.method != "full":
        lora = make_lora_config(config, exclude=recipe.excluded)
    return Setup(
        plan=plan,
        config=config,
        model_name=recipe.model,
        model_arguments=loading,
        training_arguments=_arguments(config, arguments, plan),
        lora=lora,
        quantization=quantization,
        notes=_notes(config, recipe.device),
    )


def _arguments(config: RunConfig, arguments: dict[str, Any], plan: Plan) -> Any:
    import transformers
    import trl

    from lora_advisor.probes.finetune import quiet_deprecations

    kind: Any = transformers.TrainingArguments
    if config.trainer == "trl":
        kind = trl.DPOConfig if config.stage == "dpo" else trl.SFTConfig
    try:
        with quiet_deprecations():
            return kind(**arguments)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise UnavailableError(
            f"the objects for {plan.machine.name} cannot be made on this machine ({first}); plan "
            "for what is here, or write a script for there with `lora-advisor export`."
        ) from None


def _notes(config: RunConfig, device: str) -> tuple[str, ...]:
    notes = []
    if (
        config.compile == "layers"
        or config.fp32_upcast
        or config.embedding == "host"
        or config.attention == "varlen"
        or config.trainer == "transformers"
    ):
        notes.append("pass the loaded model through `setup.prepare(model)` before the trainer.")
    if config.allocator == "expandable_segments" and device == "cuda":
        setting = "expandable_segments:True"
        if "torch" in sys.modules:
            notes.append(
                f"set PYTORCH_ALLOC_CONF={setting} in the environment: PyTorch reads it when it is "
                "imported."
            )
        else:
            os.environ["PYTORCH_ALLOC_CONF"] = setting
    if config.cuda_graph != "off":
        notes.append(
            "micro-batches are recorded by `lora_advisor.probes.graph_trainer.GraphTrainer`, which "
            "takes the loss in one pass: use it in place of SFTTrainer."
        )
    elif config.loss == "one_pass":
        notes.append(
            "the loss in one pass is that of `lora_advisor.probes.one_pass_trainer.OnePassTrainer`:"
            " use it in place of SFTTrainer, whose loss multiplies with the head once more."
        )
    if config.attention == "varlen":
        from lora_advisor.probes.arguments import padding_multiple

        notes.append(
            "packed rows are kept apart by their bounds: pass the trainer through "
            "`lora_advisor.probes.packed_rows.fill_up(trainer, "
            f"{config.seq_len}, {padding_multiple(config)})`."
        )
    if config.kernels == "liger":
        notes.append("Liger's kernels need the package liger-kernel where the script runs.")
    if config.precision == "fp16" and config.trainer == "trl":
        notes.append(
            "the callback of `setup.callback()` casts adapters to fp32, without which fp16's loss "
            "scaling fails on 4-bit models."
        )
    return tuple(notes)


def _make_plan(words: dict[str, Any], say: Callable[[str], None]) -> Plan:
    from lora_advisor.advisor.asking import (
        cache_dir,
        machine_of,
        prices_asked,
        spec_of,
        study_file,
        trace_cache,
    )
    from lora_advisor.advisor.planning import make_plan
    from lora_advisor.probes.machine import detect_stack

    options = plan_words(words)
    spec, data = spec_of(options)
    machine, _ = machine_of({**options, "device": spec.device})
    return make_plan(
        spec,
        record=options["record"] or cache_dir() / "probes.jsonl",
        data=data,
        say=say,
        fresh=options["fresh"],
        cache=trace_cache(),
        study_file=options["study"] or study_file(machine, detect_stack()),
        own_record=options["record"] is not None,
        prices=prices_asked(options),
    )


def plan_words(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of `lora-advisor plan`, those that are not given at their defaults.

    Raises:
        UsageError: One is no such word.
    """
    import click

    from lora_advisor.advisor.options import knob_options, model_options

    @click.command()
    @model_options()
    @knob_options()
    def shared(**_: Any) -> None:
        """Hold the options that several commands share."""

    options = {**shared.make_context("plan", []).params, **_PLAN_WORDS}
    options.pop("as_json", None)
    unknown = sorted(set(given) - set(options))
    if unknown:
        raise UsageError(
            f"`autoconfigure` takes the words of `lora-advisor plan`, but got {unknown[0]!r}; they "
            f"are {', '.join(sorted(options))}."
        )
    options.update(given)
    for name in ("data", "study", "record", "prices"):
        options[name] = None if options[name] is None else Path(options[name])
    if not isinstance(options["targets"], str):
        options["targets"] = ",".join(options["targets"])
    options["budget"] = str(options["budget"])
    return options


def _read_plan(plan: Plan | Path | str, *, ignore_stack: bool) -> Plan:
    from lora_advisor.advisor.same_place import training_device
    from lora_advisor.probes.plan import read_plan

    made = read_plan(Path(plan)) if isinstance(plan, Path | str) else plan
    training_device(made, ignore=ignore_stack)
    return made
