"""The commands `export` and `import`: to the files of other trainers and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_advisor.probes.errors import DataError, OutputError, UsageError

if TYPE_CHECKING:
    from lora_advisor.advisor.export import Exported
    from lora_advisor.advisor.foreign import Imported
    from lora_advisor.probes.config import RunConfig
    from lora_advisor.probes.plan import Plan


@click.command("export")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True,
              help="trl, transformers, axolotl, llamafactory, unsloth or accelerate.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="Write it to this file (default: to stdout).")  # fmt: skip
@click.option("--no-cost", is_flag=True,
              help="Do not trace what it costs that the target lacks something.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def export(plan_file: Path, target: str, **options: Any) -> int:
    """Write a plan as the script or configuration file of another trainer.

    trl, transformers and unsloth become a Python script, axolotl, llamafactory and accelerate a
    YAML file. What the target cannot express is said in the file and on stderr, with its cost.

    \b
    Examples:
      lora-advisor export plan.json --to trl --out train.py
      lora-advisor export plan.json --to axolotl --out axolotl.yaml
    """
    from lora_advisor.advisor.export import export_plan, find_target, launch, recipe_of

    found = find_target(target)
    plan = _plan(plan_file)
    if options["out"] is not None:
        _check_place(options["out"])
    made = export_plan(plan, found, prices=None if options["no_cost"] else _prices(plan))
    name = f"FILE{found.suffix}" if options["out"] is None else str(options["out"])
    run = launch(plan.chosen.config, recipe_of(plan), found, name)
    if options["out"] is not None:
        _write(options["out"], made.text)
    if options["as_json"]:
        click.echo(json.dumps(_document(made, run, options["out"])))
        return 0
    _tell(made, run)
    if options["out"] is None:
        click.echo(made.text, nl=False)
    return 0


@click.command("import")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--from", "source", default=None,
              help="Whose it is: axolotl, llamafactory, accelerate, or trl, transformers, unsloth "
              "for our own exports (default: told by its keys).")  # fmt: skip
@click.option("--onto", type=click.Path(path_type=Path), default=None,
              help="A plan or RunConfig for what the file does not say (accelerate).")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="Write the RunConfig to this file (default: to stdout).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True,
              help="One JSON document on stdout, with what was said of the keys.")  # fmt: skip
def import_(file: Path, source: str | None, **options: Any) -> int:
    """Read the file of another trainer as a RunConfig, JSON on stdout.

    Keys that cannot be honoured are named on stderr. `lora-advisor fit --config` takes the file
    itself: will it fit?

    \b
    Examples:
      lora-advisor import axolotl.yaml --out config.json
      lora-advisor fit --config axolotl.yaml --vram 8
    """
    from lora_advisor.advisor.foreign import import_file

    onto = None if options["onto"] is None else _onto(options["onto"])
    got = import_file(file, source, onto)
    data = got.config.to_json()
    if options["as_json"]:
        document = {"from": got.source, "config": data, "notes": list(got.notes),
                    "ignored": list(got.ignored)}  # fmt: skip
        click.echo(json.dumps(document))
    else:
        say_imported(got)
    if options["out"] is not None:
        _write(options["out"], json.dumps(data, indent=2) + "\n", kind="a RunConfig")
        _say(f"RunConfig written to {options['out']}")
    elif not options["as_json"]:
        click.echo(json.dumps(data, indent=2))
    return 0


def imported_config(path: Path) -> RunConfig:
    """Return the configuration of another trainer's file, and say what could not be taken over."""
    from lora_advisor.advisor.foreign import import_file

    got = import_file(path)
    say_imported(got)
    return got.config


def say_imported(got: Imported) -> None:
    """Say on stderr what came of a file's keys."""
    from lora_advisor.advisor.arms import describe

    _say(f"read as {got.source}: {describe(got.config)}")
    for note in got.notes:
        _say(note)
    if got.ignored:
        _say(f"{len(got.ignored)} other keys decide neither memory nor speed")


def _plan(path: Path) -> Plan:
    from lora_advisor.probes.plan import read_plan

    try:
        return read_plan(path)
    except DataError as error:  # here a file that is no plan is a wrong word, not damaged data
        raise UsageError(str(error)) from None


def _prices(plan: Plan) -> Any:
    from lora_advisor.advisor.asking import trace_cache
    from lora_advisor.advisor.export_cost import open_prices

    return open_prices(plan, trace_cache())


def _onto(path: Path) -> RunConfig:
    from lora_advisor.probes.config import RunConfig
    from lora_advisor.probes.errors import MissingInputError

    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MissingInputError(
            f"`{path}` must be a plan or RunConfig, but it is not there."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"`{path}` must be a plan or RunConfig as JSON, but {error}.") from None
    if isinstance(data, dict) and "chosen" in data:
        return _plan(path).chosen.config
    return RunConfig.from_json(data)


def _document(made: Exported, run: str, out: Path | None) -> dict[str, Any]:
    return {
        "target": made.target.name,
        "versions": dict(made.target.versions),
        "file": None if out is None else str(out),
        "text": made.text,
        "run": run,
        "config": made.config.to_json(),
        "lost": [{"why": item.why, "cost": item.cost} for item in made.lost],
        "notes": list(made.notes),
    }


def _tell(made: Exported, run: str) -> None:
    from lora_advisor.advisor.export import sentence

    if made.lost:
        _say(f"what {made.target.name} cannot express:")
    for item in made.lost:
        _say(f"* {sentence(item)}")
    for note in made.notes:
        _say(f"note: {note}")
    _say(f"run it with: {run}")


def _check_place(path: Path) -> None:
    """Refuse to write over a file that is no export of ours: it may hold a user's work."""
    from lora_advisor.advisor.export_words import MARK

    if not path.exists():
        return
    try:
        ours = any(line.startswith(MARK) for line in path.read_text("utf-8").splitlines()[:3])
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise OutputError(
            f"`{path}` must be a new file or an earlier export, but is something else; give "
            "another --out."
        )


def _write(path: Path, text: str, *, kind: str = "an export") -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"`{path}` must be a place that {kind} can be written to, but {error.strerror}."
        ) from None


def _say(line: str) -> None:
    click.echo(line, err=True)
