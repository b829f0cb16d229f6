"""What the writers of exports share: the recipe, what is lost, and words that cannot break out.

Names and paths come from users. In Python they are written as literals, in YAML by PyYAML, in
comments as JSON on one line, so that a quote, a newline or markup stays what it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import Stack

#: Begins the line of an export that `import` reads: what the target's own format has no place for.
MARK = "# lora-advisor: "
#: Stands where the plan names no data.
NO_DATA = "your-data.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is exported, beside the configuration.

    Attributes:
        model: What `from_pretrained` takes: a folder or a hub id.
        data: Path of the training data; None where the plan names none.
        shape: Shape of its rows, one of `turns.SHAPES`; None where it could not be read.
        rows: Rows that are trained on; None where that is not known.
        epochs: Passes over them.
        device: "cuda" or "cpu".
        stack: What the plan was made with.
        trust_remote_code: Whether code that comes with the model may run.
        excluded: Modules that "all-linear" would mean, but which carry no adapter.
        gpus: Cards that share every step, each with the configuration's micro-batch.
    """

    model: str
    data: str | None
    shape: str | None
    rows: int | None
    epochs: float
    device: str
    stack: Stack
    trust_remote_code: bool = False
    excluded: tuple[str, ...] = ()
    gpus: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """Something that a target cannot express.

    Attributes:
        why: One sentence: what is asked for and what is written instead.
        config: The configuration after the change.
        cost: What that costs; None until it is priced, or where nothing can be said.
    """

    why: str
    config: RunConfig
    cost: str | None = None


class Rule(NamedTuple):
    """When a target cannot express a configuration, and what it runs instead."""

    applies: Callable[[RunConfig], bool]
    changes: Callable[[RunConfig], Mapping[str, Any]]
    why: str


#: Only lora-advisor's own code records micro-batches.
NO_GRAPH = Rule(
    lambda c: c.cuda_graph != "off",
    lambda c: {"cuda_graph": "off"},
    "Micro-batches are not recorded as CUDA graphs, which is lora-advisor's own: a busy host slows "
    "them down.",
)
#: What calls PyTorch's kernel for packed rows is lora-advisor's own: what takes its place.
VARLEN = (
    Rule(
        lambda c: c.attention == "varlen" and c.precision != "fp32",
        lambda c: {"attention": "flash_attention_2"},
        "What keeps packed rows apart without a mask is lora-advisor's own: FlashAttention "
        "computes the same, and needs the package flash-attn.",
    ),
    Rule(
        lambda c: c.attention == "varlen",
        lambda c: {"attention": "sdpa"},
        "What keeps packed rows apart without a mask is lora-advisor's own: a mask is made, which "
        "grows with the square of a micro-batch's tokens.",
    ),
)
#: Only lora-advisor's own code can take the loss in one pass.
ONE_PASS = Rule(
    lambda c: c.loss == "one_pass",
    lambda c: {"loss": "fused"},
    "The one-pass loss is lora-advisor's own: a fused loss multiplies with the head once more.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A trainer to write for.

    Attributes:
        name: As `--to` takes it.
        versions: What the export is written for, by package.
        suffix: Of the file.
        run: The command that runs it; `{file}` is its name.
        rules: What it cannot express, in the order in which it is given up.
        write: Writes the body, given what the target will run, the recipe and what was asked.
        notes: What is to be said of a configuration without being a loss.
        refuses: Why nothing at all can be written for a configuration; None for no reason.
    """

    name: str
    versions: Mapping[str, str]
    suffix: str
    run: str
    rules: Callable[[Recipe], Sequence[Rule]]
    write: Callable[[RunConfig, Recipe, RunConfig], str]
    notes: Callable[[RunConfig, Recipe], Sequence[str]] = field(default=lambda config, recipe: ())
    refuses: Callable[[RunConfig], str | None] = field(default=lambda config: None)


def settle(config: RunConfig, rules: Iterable[Rule]) -> tuple[RunConfig, tuple[Lost, ...]]:
    """Return what a target runs of a configuration, and what is lost on the way."""
    lost = []
    for rule in rules:
        if rule.applies(config):
            config = config.replace(**rule.changes(config))
            lost.append(Lost(why=rule.why, config=config))
    return config, tuple(lost)


def comment(text: str) -> str:
    """Return a text as lines of a comment, of Python and of YAML alike."""
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def quoted(text: str) -> str:
    """Return a name as one line that shows what it is: JSON, in ASCII."""
    return json.dumps(text)


def mark(values: Mapping[str, Any]) -> str:
    """Return the line that `import` reads."""
    return f"{MARK}{json.dumps(values)}\n"


def read_mark(text: str) -> dict[str, Any] | None:
    """Return what stands in an export's own line; None where there is none."""
    for line in text.splitlines():
        if line.startswith(MARK):
            try:
                values = json.loads(line.removeprefix(MARK))
            except json.JSONDecodeError:
                return None
            return values if isinstance(values, dict) else None
    return None


def literal(value: Any) -> str:
    """Return a value as Python source; plain texts in double quotes."""
    if isinstance(value, str):
        plain = value.isascii() and value.isprintable() and not set(value) & set("'\"\\")
        return f'"{value}"' if plain else ascii(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return repr(value)


def call(name: str, arguments: Mapping[str, Any], *, depth: int = 1) -> str:
    """Return the Python source of a call with literal arguments, one a line."""
    inner, outer = "    " * (depth + 1), "    " * depth
    lines = "".join(f"{inner}{key}={literal(value)},\n" for key, value in arguments.items())
    return f"{name}(\n{lines}{outer})"


def whole(value: float) -> float | int:
    """Return a number as an integer where it is one: some schemas take nothing else."""
    return int(value) if float(value).is_integer() else value


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, in its order."""
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=False, width=1000)
    return text
