"""What `fit` and `compare` answer: from the command line's words to an exit code and a text."""

from __future__ import annotations

import json
from typing import Any

from lora_advisor.advisor.asking import (
    architecture_of,
    cache_dir,
    config_of,
    gib_bytes,
    machine_of,
    trace_cache,
    vram_bytes,
)
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import plain_json

Answer = tuple[int, str]


def answer_fit(options: dict[str, Any]) -> Answer:
    """Answer whether one configuration fits."""
    from lora_advisor.advisor.fit import will_it_fit
    from lora_advisor.advisor.proof import card_probe
    from lora_advisor.advisor.report_fit import fit_text

    config = config_of(options)
    predictor = _predictor(options, config)
    machine, probe = predictor.machine, None
    if machine.kind == "cuda" and not options["no_probe"]:
        probe = card_probe(
            predictor.store.architecture,
            machine,
            vram_bytes=vram_bytes(options, machine),
            reserve_bytes=gib_bytes("--reserve", options["reserve"]),
            record=cache_dir() / "probes.jsonl",
        )
    answer = will_it_fit(config, predictor, probe=probe, sizes=not options["no_largest"])
    if options["as_json"]:
        return answer.exit_code, json.dumps({"exit_code": answer.exit_code, **plain_json(answer)})
    return answer.exit_code, fit_text(answer, machine=machine)


def answer_map(options: dict[str, Any]) -> Answer:
    """Answer which sizes of a grid fit; the exit code is that of the asked size."""
    from lora_advisor.advisor.colours import has_colours
    from lora_advisor.advisor.fit import EXIT_CODES
    from lora_advisor.advisor.fitmap import (
        MICRO_BATCHES,
        check_map_file,
        default_seq_lens,
        fit_map,
        sizes_of,
    )
    from lora_advisor.advisor.report_map import map_text, map_title

    batches = sizes_of("--micro-batches", options["micro_batches"], 1) or MICRO_BATCHES
    lengths = sizes_of("--seqs", options["seqs"], 2)
    path = options["map_file"]
    if path is not None:
        check_map_file(path)  # before the work, whose result it is to hold
    config = config_of(options)
    predictor = _predictor(options, config)
    lengths = lengths or default_seq_lens(predictor.store.architecture)
    found = fit_map(config, predictor, micro_batches=batches, seq_lens=lengths)
    if path is not None:
        from lora_advisor.advisor.map_picture import draw_map

        draw_map(found, path, title=map_title(found, predictor.machine))
    code = EXIT_CODES[found.asked.verdict]
    if options["as_json"]:
        machine = plain_json(predictor.machine)
        return code, json.dumps({"exit_code": code, "machine": machine, **plain_json(found)})
    text = map_text(found, predictor.machine, colour=has_colours())
    return code, text if path is None else f"{text}\npicture in {path}"


#: What `compare` takes where nothing else is said: the plain trainer.
_PLAIN = {"trainer": "transformers", "checkpointing": "off"}


def answer_compare(options: dict[str, Any]) -> Answer:
    """Answer what the methods need, side by side."""
    from lora_advisor.advisor.compare import ORDER, compare
    from lora_advisor.advisor.report_compare import compare_json, compare_text

    given = {name: value for name, value in options.items() if value is not None}
    words = {**options, "config_file": None, **_PLAIN, **given}
    configs = [config_of({**words, "method": method}) for method in ORDER]
    comparison = compare(configs, _predictor(options, configs[0]))
    if options["as_json"]:
        return 0, json.dumps(compare_json(comparison))
    return 0, compare_text(comparison)


def _predictor(options: dict[str, Any], config: RunConfig) -> Predictor:
    """Return what is known of the asked model on the asked card."""
    machine, card = machine_of(options)
    limit = vram_bytes(options, machine) - gib_bytes("--reserve", options["reserve"])
    if limit <= 0:
        raise UsageError(f"`--vram` less `--reserve` must be above 0 GiB, but is {limit / GIB:g}.")
    return Predictor.start(
        architecture_of(config.model, options),
        machine,
        card,
        limit_bytes=limit,
        cache=trace_cache(),
    )
