from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes import config
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.errors import UsageError

CARDS: dict[str, dict[str, Any]] = json.loads(
    Path(config.__file__).with_name("cards.json").read_text("utf-8")
)["cards"]

KNOWN = ("memory_gib", "memory_bandwidth_gb_s", "fp32_tflops", "tdp_w")

#: Compute capability from which on tensor cores take a type (CUDA C++ Programming Guide).
TENSOR_CORES_SINCE = {"fp16_tflops": 7, "bf16_tflops": 8}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_positive_figures_and_their_source(name: str) -> None:
    card = CARDS[name]

    assert all(card[figure] > 0 for figure in KNOWN)
    assert card["name"]
    assert "https://" in card["source"]


@pytest.mark.parametrize("figure", TENSOR_CORES_SINCE)
@pytest.mark.parametrize("name", CARDS)
def test_what_tensor_cores_do_not_take_is_unknown(name: str, figure: str) -> None:
    card = CARDS[name]
    major = int(card["compute_capability"].split(".")[0])

    if major < TENSOR_CORES_SINCE[figure]:
        assert card[figure] is None
    else:
        assert card[figure] > card["fp32_tflops"]


def test_no_two_cards_share_a_name() -> None:
    names = [card["name"] for card in CARDS.values()]

    assert len(names) == len(set(names))


def test_the_card_that_plans_fall_back_to_is_there() -> None:
    assert CARDS["rtx-4060"]["memory_gib"] == 8


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("RTX 4060", "rtx-4060"),
        ("h100", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("Tesla T4", "t4"),
        ("rtx-3060", "rtx-3060-12gb"),
    ],
)
def test_a_card_is_found_by_the_names_people_and_drivers_use(name: str, key: str) -> None:
    assert find_card(name).key == key


@pytest.mark.parametrize("name", ["rtx-9999", "4060", ""])
def test_a_name_that_no_card_has_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="must name a card of the table"):
        find_card(name)
