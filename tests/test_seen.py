"""What a search concludes of sizes it has not looked at: never more than is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import configure
from traced_once import save_figures, share_traces

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.seen import Seen
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import Candidate
from lora_advisor.probes.prediction import MemoryPrediction, Prediction

CARD = find_card("rtx-4060")
BATCH = 24
SIZES = [size for size in range(1, BATCH + 1) if BATCH % size == 0]


def sized(size: int, **changes: object) -> RunConfig:
    return configure(micro_batch=size, accumulation=BATCH // size, seq_len=1024, **changes)


def needing(config: RunConfig, gib: float, *, stays: float, cap: float) -> Candidate:
    """Return a candidate that needs so much, of which some stays whatever its size."""
    needed = round(gib * GIB)
    memory = MemoryPrediction(
        allocated_bytes=needed, reserved_bytes=needed, process_bytes=needed,
        process_upper_bytes=needed, needed_bytes=needed, instant="backward",
        components={"weights": round(stays * GIB), "activations": needed - round(stays * GIB)},
        phases={}, evidence="traced",
    )  # fmt: skip
    verdict = "fits" if gib * 1.03 <= cap else "does not fit" if gib * 0.98 > cap else "uncertain"
    prediction = Prediction(
        memory=memory, verdict=verdict, step_s=None, tokens_per_s=None, evidence="traced"
    )
    return Candidate(config=config, prediction=prediction)


@pytest.mark.parametrize(
    ("stays", "a_row", "asked"),
    [
        (3.0, 2.7, [6, 1]),  # as 1 fits, 2 would need 8.4 GiB by what 6 needs
        (3.0, 0.26, [6, 12]),  # by 6 and 12, 24 would need 9.2
        (1.2, 0.24, [6, 24]),  # the largest fits
        (3.0, 1.45, [6, 2, 3]),  # 3 is too close to the cap for a line to say
        (8.0, 1.0, [6]),  # nothing can fit
        (1.0, 1.6, [6, 3, 4]),  # 4 may fit: a run would have to tell
    ],
)
def test_an_arm_is_asked_for_where_it_should_just_fit(
    stays: float, a_row: float, asked: list[int]
) -> None:
    cap, seen = 7.5, Seen("micro_batch", round(7.5 * GIB))
    arm = [sized(size) for size in SIZES]
    order = []
    while (config := seen.next_of(arm)) is not None:
        order.append(config.micro_batch)
        needs = stays + a_row * config.micro_batch
        seen.add(needing(config, needs, stays=stays, cap=cap))
    assert order == asked
    fitting = [size for size in SIZES if (stays + a_row * size) * 1.03 <= cap]
    assert max(order, key=lambda n: (n in fitting, n)) == (fitting[-1] if fitting else order[0])


def test_another_allocator_of_what_is_far_too_large_is_settled_and_of_what_is_close_not() -> None:
    seen = Seen("micro_batch", round(7.5 * GIB))
    seen.add(needing(sized(6), 7.7, stays=3.0, cap=7.5))
    seen.add(needing(sized(12), 12.4, stays=3.0, cap=7.5))

    assert not seen.settles(sized(6, allocator="expandable_segments"))
    assert seen.settles(sized(12, allocator="expandable_segments"))


def test_nothing_is_concluded_of_another_arm() -> None:
    seen = Seen("micro_batch", GIB)
    seen.add(needing(sized(6), 9.0, stays=3.0, cap=1.0))

    assert seen.settles(sized(4))
    assert seen.least_bytes(sized(4, method="qlora")) is None
    assert not seen.settles(sized(4, method="qlora"))
    assert not seen.settles(sized(4, checkpointing="off"))


@pytest.mark.parametrize("size", ["micro_batch", "seq_len"])
@pytest.mark.parametrize(
    "arm",
    [
        {"method": "lora", "checkpointing": "full"},
        {"method": "qlora", "checkpointing": "off"},
        {"method": "qlora", "checkpointing": "every_2", "attention": "eager"},
        {"method": "lora", "trainer": "transformers", "loss": "full"},
    ],
)
def test_what_a_size_needs_at_least_is_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, arm: dict[str, str]
) -> None:
    share_traces(monkeypatch)
    model = save_figures(tmp_path / "tiny")
    predictor = Predictor.start(
        resolve_architecture(model), CARD.machine(), CARD, limit_bytes=8 * GIB
    )
    base = configure(model=model, micro_batch=2, accumulation=12, seq_len=512, **arm)
    if size == "micro_batch":
        sizes = [base.replace(micro_batch=n, accumulation=BATCH // n) for n in (1, 2, 4, 8, 24)]
    else:
        sizes = [base.replace(seq_len=n) for n in (128, 256, 512, 1024, 2048)]
    candidates = [predictor.candidate(config) for config in sizes]
    for known in range(len(sizes)):
        seen = Seen(size, GIB)
        seen.add(candidates[known])
        if known:
            seen.add(candidates[known - 1])
        for candidate in candidates:
            least = seen.least_bytes(candidate.config)
            needed = candidate.prediction.memory.needed_bytes
            assert least is None or least <= needed, (candidates[known].config, candidate.config)
