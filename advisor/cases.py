"""Predict a file of configurations, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.architectures import Architecture, from_hf_config, resolve_architecture
from lora_advisor.probes.cards import Card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import AdvisorError, DataError, MissingInputError, UsageError
from lora_advisor.probes.machine import Machine, Stack
from lora_advisor.probes.plan import plain_json


def predict_cases(
    path: Path,
    *,
    machine: Machine,
    card: Card | None,
    limit_bytes: int,
    stack: Stack,
    cache: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one answer a line of the file.

    A line is a RunConfig; `hf_config` beside its fields gives the architecture inline. What is
    wrong with a line is said in its answer's `error`; the other lines are answered all the same.

    Raises:
        MissingInputError: There is no such file.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise MissingInputError(
            f"`{path}` must be a file of configurations, but it is not there."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` must be a text file of configurations, but {error}.") from None
    predictors: dict[str, Predictor] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        answer: dict[str, Any] = {"line": number}
        try:
            config, architecture = _case(line)
            key = architecture.fingerprint
            if key not in predictors:
                predictors[key] = Predictor.start(
                    architecture,
                    machine,
                    card,
                    limit_bytes=limit_bytes,
                    cache=cache,
                )
            answer.update(_answer(predictors[key], config, stack))
        except AdvisorError as error:
            answer["error"] = str(error)
        except Exception as error:  # an architecture the trace cannot run: said, not raised
            reason = (str(error).strip().splitlines() or [""])[0]
            answer["error"] = f"the step cannot be traced: {type(error).__name__}: {reason}"
        yield answer


def _case(line: str) -> tuple[RunConfig, Architecture]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"a case must be a JSON object, but it cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise DataError(f"a case must be a JSON object, but got {type(data).__name__}.")
    hf_config = data.pop("hf_config", None)
    config = RunConfig.from_json(data)
    if not config.is_buildable:
        raise UsageError(
            f"`trainer` {config.trainer!r} is another engine, whose step cannot be built here."
        )
    if hf_config is not None:
        return config, from_hf_config(config.model, hf_config, source="hf_config")
    return config, resolve_architecture(config.model)


def _answer(predictor: Predictor, config: RunConfig, stack: Stack) -> dict[str, Any]:
    prediction = predictor.predict(config)
    memory, speed = prediction.memory, prediction.tokens_per_s
    return {
        "memory": {
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "process_bytes": memory.process_bytes,
            "process_upper_bytes": memory.process_upper_bytes,
        },
        "throughput": None
        if speed is None
        else {"tokens_per_s": speed.value, "low": speed.low, "high": speed.high},
        "verdict": prediction.verdict,
        "evidence": prediction.evidence,
        "machine": predictor.machine.name,
        "instant": memory.instant,
        "components": memory.components,
        "stack": plain_json(stack),
    }
