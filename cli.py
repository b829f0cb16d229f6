"""The command line: parse, call the library, print. Heavy imports stand inside the commands.

Exit codes: 0 done, or `fit`: fits; 1 nothing fits, or `fit`: does not fit; 2 `fit`: uncertain; 3
`train`: a guard stopped it, for the loss leapt or was no number; 64 a word, number or combination
that is not legal; 65 a file that does not hold what it must; 66 a file or model that is not there;
69 a package or device this machine lacks; 70 an error of our own; 71 `train`: another process of
the same training has ended it, or memory ran out in one of several; 73 a place that cannot be
written; 75 the GPU is in use; 78 a plan of another machine or stack; 130 interrupted; 143 `train`:
asked to stop by SIGTERM.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lora_advisor.advisor.bench_command import bench
from lora_advisor.advisor.data_command import data_group
from lora_advisor.advisor.export_command import export, import_
from lora_advisor.advisor.knobs import DEFAULT_BATCH
from lora_advisor.advisor.merge_command import merge
from lora_advisor.advisor.options import (
    accumulation_option,
    knob_options,
    long_rows_option,
    map_options,
    model_options,
)
from lora_advisor.advisor.records_command import records_group
from lora_advisor.advisor.report_command import report
from lora_advisor.advisor.train_command import train
from lora_advisor.probes.errors import AdvisorError, UsageError

#: The command's name, and the variable through which a shell asks what could come next.
PROGRAM, COMPLETE = "lora-advisor", "_LORA_ADVISOR_COMPLETE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; never show a traceback to a user."""
    _quiet_libraries()
    try:
        result = group.main(
            args=argv, prog_name=PROGRAM, complete_var=COMPLETE, standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what was measured is kept", err=True)
        return 130
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        return UsageError.exit_code
    except AdvisorError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except Exception as error:
        if os.environ.get("LORA_ADVISOR_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        click.echo(
            f"Error: an error of lora-advisor itself: {type(error).__name__}: {first} "
            "(LORA_ADVISOR_DEBUG=1 shows where)",
            err=True,
        )
        return AdvisorError.exit_code


def _quiet_libraries() -> None:
    """Keep the libraries' notices off the answer; errors stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers", "torch", "accelerate", "datasets", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="lora-advisor")
def group() -> None:
    """Find the LoRA or QLoRA configuration that fits a GPU and trains fastest, then train with it.

    \b
    Examples:
      lora-advisor plan --vram 8
      lora-advisor plan --model ./my-model --data chat.jsonl --vram 8 --out plan.json
      lora-advisor fit --model qwen2.5-7b --seq 2048 --vram 8
      lora-advisor compare --model llama-2-7b --gpu a100-80gb
      lora-advisor data inspect chat.jsonl --model ./my-model
      lora-advisor train plan.json --data chat.jsonl --output runs/first
      lora-advisor report runs/first --out first.html
      lora-advisor bench --vram 8
    """


group.add_command(bench)
group.add_command(train)
group.add_command(merge)
group.add_command(report)
group.add_command(data_group)
group.add_command(records_group)
group.add_command(export)
group.add_command(import_)


@group.command()
@model_options()
@knob_options()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=None,
    help="Training data, as `data inspect` reads it: gives the time it takes, and --seq.",
)
@click.option(
    "--seq",
    type=int,
    default=None,
    help="Tokens in a sequence (default: what covers 99 % of the data's rows, else 1024).",
)
@click.option(
    "--batch",
    type=int,
    default=None,
    help=f"Effective batch: sequences in one optimizer step, never changed "
    f"(default: {DEFAULT_BATCH}).",
)
@click.option("--gpus", type=int, default=1, show_default=True, help="Cards of this kind in one "
              "host that share every step: predicted, for probes run on one.")  # fmt: skip
@click.option("--epochs", type=float, default=1.0, show_default=True, help="Passes over the data.")
@long_rows_option("truncate", default="truncate")
@click.option(
    "--budget",
    default="120s",
    show_default=True,
    help="Time the probes may take, such as 90s or 5m.",
)
@click.option(
    "--objective",
    default="tokens_per_s",
    show_default=True,
    help="tokens_per_s, joules_per_token, or seq_len: the longest sequence, from --seq up.",
)
@click.option("--front", is_flag=True, help="Show longer sequences too, against speed and energy.")
@click.option(
    "--trials",
    type=int,
    default=5,
    show_default=True,
    help="Trials of the search that are its sampler's own choice, after those planned.",
)
@click.option(
    "--study",
    type=click.Path(path_type=Path),
    default=None,
    help="SQLite file for the search's study, for optuna-dashboard (default: in the cache).",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Write the plan to this file."
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    default=None,
    help="File of probe results, read and appended to (default: in the user's cache).",
)
@click.option(
    "--prices",
    type=click.Path(path_type=Path),
    default=None,
    help="JSON of what cards cost to rent, instead of the bundled list; with it the time and cost "
    "on larger cards is told however short the training is.",
)
@click.option("--fresh", is_flag=True, help="Do not use earlier probe results, nor imported runs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
def plan(**options: Any) -> int:  # fmt: skip
    """Find out what to run: the fastest configuration that fits, proved here or predicted.

    \b
    Examples:
      lora-advisor plan --vram 8                        # the card found here, else an RTX 4060
      lora-advisor plan --gpu rtx-3060-12gb --seq 2048
      lora-advisor plan --seq 2048 --precision fp16 --optimizer paged_adamw_8bit --budget 90s
      lora-advisor plan --model ./my-model --data chat.jsonl --vram 8 --out plan.json
    """
    from lora_advisor.advisor.asking import (
        cache_dir,
        machine_of,
        prices_asked,
        spec_of,
        study_file,
        trace_cache,
    )
    from lora_advisor.advisor.planning import make_plan
    from lora_advisor.advisor.record_store import imported_runs
    from lora_advisor.advisor.report import plan_text
    from lora_advisor.probes.machine import detect_stack
    from lora_advisor.probes.plan import plain_json, write_plan
    from lora_advisor.probes.record import check_writable

    if options["out"] is not None:
        check_writable(options["out"])  # before the probes, whose result it is to hold
    prices = prices_asked(options)
    spec, data = spec_of(options)
    record = options["record"] or cache_dir() / "probes.jsonl"
    machine, _ = machine_of({**options, "device": spec.device})
    study = options["study"] or study_file(machine, detect_stack())
    made = make_plan(
        spec,
        record=record,
        data=data,
        say=_say,
        fresh=options["fresh"],
        cache=trace_cache(),
        study_file=study,
        own_record=options["record"] is not None,
        prices=prices,
        imported=[] if options["fresh"] else imported_runs(cache_dir()),
    )
    if options["out"] is not None:
        write_plan(options["out"], made)
        _say(f"plan written to {options['out']}")
    click.echo(json.dumps(plain_json(made.to_json())) if options["as_json"] else plan_text(made))
    return 0


@group.command()
@model_options()
@knob_options()
@click.option("--seq", type=int, default=1024, show_default=True, help="Tokens in a sequence.")
@accumulation_option
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=None,
    help="A RunConfig as JSON, or an Axolotl or LLaMA-Factory YAML, instead of the knobs.",
)
@click.option(
    "--no-largest", is_flag=True, help="Do not look for the largest sizes that fit: seconds less."
)
@click.option(
    "--no-probe", is_flag=True, help="Never run anything on the card: an uncertain answer stays so."
)
@map_options
def fit(**options: Any) -> int:  # fmt: skip
    """Say whether a configuration fits: exit code 0 fits, 1 does not, 2 uncertain.

    Knobs that are not given are those that need least: QLoRA, micro-batch 1, full checkpointing,
    TRL's fused loss. With --map the answer is for a whole grid of sizes; the exit code is still
    that of the asked one.

    \b
    Examples:
      lora-advisor fit --model qwen2.5-7b --seq 2048 --vram 8
      lora-advisor fit --model qwen2.5-1.5b --gpu rtx-4060 --map --map-file map.png
      lora-advisor fit --config axolotl.yaml --gpu rtx-4060
    """
    from lora_advisor.advisor.answers import answer_fit, answer_map

    mapped = options["map_"] or options["map_file"] is not None
    code, text = (answer_map if mapped else answer_fit)(options)
    click.echo(text)
    return code


@group.command()
@model_options(model="llama-2-7b")
@knob_options("method", micro_batch=4)
@click.option("--seq", type=int, default=512, show_default=True, help="Tokens in a sequence.")
@accumulation_option
def compare(**options: Any) -> int:
    """Show full fine-tuning, LoRA and QLoRA side by side, stage by stage of a training step.

    Knobs that are not given are those of a plain transformers.Trainer: bf16, no checkpointing, the
    loss of all logits at once, fused AdamW.

    \b
    Examples:
      lora-advisor compare --gpu a100-80gb
      lora-advisor compare --model qwen2.5-1.5b --seq 1024 --vram 24 --checkpointing full
    """
    from lora_advisor.advisor.answers import answer_compare

    code, text = answer_compare(options)
    click.echo(text)
    return code


@group.command()
@click.argument("cases", metavar="CASES.jsonl", type=click.Path(path_type=Path))
@click.option("--gpu", default=None, help="The card (default: the one here, else rtx-4060).")
@click.option(
    "--vram", type=float, default=None, help="Memory for the verdict in GiB (default: the card's)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of one a line.")
def predict(cases: Path, **options: Any) -> int:  # fmt: skip
    """Predict a file of configurations: one RunConfig a line in, one answer a line out.

    A line may carry `hf_config`, the content of a config.json, beside the RunConfig's fields.

    \b
    Example:
      lora-advisor predict cases.jsonl --gpu rtx-4060
    """
    from lora_advisor.advisor.asking import machine_of, trace_cache, vram_bytes
    from lora_advisor.advisor.cases import predict_cases
    from lora_advisor.probes.machine import detect_stack

    machine, card = machine_of({**options, "device": "auto"})
    limit = vram_bytes(options, machine)
    answers = predict_cases(
        cases,
        machine=machine,
        card=card,
        limit_bytes=limit,
        stack=detect_stack(),
        cache=trace_cache(),
    )
    if options["as_json"]:
        click.echo(json.dumps({"predictions": list(answers)}))
        return 0
    for answer in answers:
        click.echo(json.dumps(answer))
    return 0


@group.command()
@click.option("--cards", "show_cards", is_flag=True, help="List the cards of --gpu instead.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def doctor(show_cards: bool, as_json: bool) -> int:
    """Say what of this machine would spoil a plan or a training, and how to mend it.

    \b
    Examples:
      lora-advisor doctor
      lora-advisor doctor --cards
    """
    if show_cards:
        from lora_advisor.advisor.report import cards_text
        from lora_advisor.probes.cards import cards
        from lora_advisor.probes.plan import plain_json

        click.echo(
            json.dumps(plain_json(cards())) if as_json else cards_text(list(cards().values()))
        )
        return 0
    from lora_advisor.advisor.doctor import examine, to_json
    from lora_advisor.advisor.report import doctor_text

    findings = examine()
    click.echo(json.dumps(to_json(findings)) if as_json else doctor_text(findings))
    return 0


@group.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print what makes a shell complete commands and options with the tab key.

    \b
    Examples:
      lora-advisor completion bash > ~/.lora-advisor.bash    # then: source it in ~/.bashrc
      lora-advisor completion fish > ~/.config/fish/completions/lora-advisor.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(group, {}, PROGRAM, COMPLETE)
    # Its `source()` asks which bash there is; what is printed is the same for all.
    click.echo(made.source_template % made.source_vars())
    return 0


def _say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    sys.exit(main())
