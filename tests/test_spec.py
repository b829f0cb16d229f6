from __future__ import annotations

import json
from typing import Any

import pytest

from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.spec import KNOBS, Spec

GIB = 2**30


def test_the_least_is_a_model_and_a_memory() -> None:
    spec = Spec(model="qwen2.5-1.5b", vram_bytes=8 * GIB)

    assert spec.effective_batch == 16
    assert spec.objective == "tokens_per_s"
    assert spec.trust_remote_code is False


def test_json_goes_round() -> None:
    spec = Spec(
        model="qwen2.5-1.5b",
        vram_bytes=8 * GIB,
        data="chat.jsonl",
        reserve_bytes=GIB,
        fixed={"method": "qlora", "micro_batch": 2},
        targets=("q_proj", "v_proj"),
    )

    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_fields_of_newer_versions_are_dropped() -> None:
    spec = Spec(model="qwen2.5-1.5b", vram_bytes=8 * GIB)

    assert Spec.from_json({**spec.to_json(), "invented_later": 1}) == spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vram_bytes": 0}, "`--vram` must be above 0 GiB, but got 0"),
        ({"vram_bytes": -GIB}, "`--vram` must be above 0 GiB, but got -1"),
        ({"reserve_bytes": 8 * GIB}, "`--reserve` .* but got 8 GiB"),
        ({"reserve_bytes": -1}, "`--reserve`"),
        ({"seq_len": 1}, "`--seq` must be at least 2 tokens, but got 1"),
        ({"effective_batch": 0}, "`--batch` must be at least 1 sequence, but got 0"),
        ({"epochs": 0}, "`--epochs` must be above 0, but got 0"),
        ({"epochs": float("nan")}, "`--epochs` must be above 0, but got nan"),
        ({"probe_budget_s": 0}, "`--budget` must be above 0 seconds, but got 0"),
        ({"objective": "fastest"}, "`--objective` must be one of tokens_per_s"),
        ({"fixed": {"seq_len": 512}}, "`seq_len` cannot be fixed; the knobs are"),
    ],
)
def test_what_no_plan_can_meet_is_refused_in_one_sentence(
    changes: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"model": "qwen2.5-1.5b", "vram_bytes": 8 * GIB, **changes}

    with pytest.raises(UsageError, match=words) as caught:
        Spec(**arguments)

    assert "\n" not in str(caught.value)


def test_the_knobs_are_fields_of_a_configuration() -> None:
    assert set(KNOBS) < set(RunConfig.__dataclass_fields__)
    assert {"method", "micro_batch", "checkpointing", "kernels"} <= set(KNOBS)
