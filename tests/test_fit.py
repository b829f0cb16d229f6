"""Will it fit, what else would, and what a run on the card settles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from recorded import configure, tiny
from traced_once import share_traces

from lora_advisor.advisor import largest as searching
from lora_advisor.advisor.fit import will_it_fit
from lora_advisor.advisor.largest import largest, longest_sequence
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.report_fit import fit_text, memory_bars
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import BusyError, UntraceableError
from lora_advisor.probes.machine import GIB, detect_stack
from lora_advisor.probes.record import ProbeResult

#: Its context is measured, so that the bound is near what is expected.
CARD = find_card("h100-80gb")
#: A step whose memory grows with its size.
CONFIG = configure(checkpointing="off", micro_batch=16, seq_len=512)


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)


def start(limit_bytes: int, cache: Path | None = None, **changes: Any) -> Predictor:
    figures = tiny(**{"num_hidden_layers": 2, "max_position_embeddings": 2048, **changes})
    return Predictor.start(figures, CARD.machine(), CARD, limit_bytes=limit_bytes, cache=cache)


def process_bytes(config: RunConfig) -> int:
    return start(80 * GIB).predict(config).memory.process_bytes


def ended(outcome: str, config: RunConfig = CONFIG, **measured: Any) -> ProbeResult:
    return ProbeResult(
        config=config,
        architecture="",
        hf_config={},
        machine=CARD.machine(),
        stack=detect_stack(),
        outcome=outcome,
        cap_bytes=7 * GIB,
        **measured,
    )


def unsure() -> Predictor:
    """A predictor whose limit lies between the least and the bound."""
    free = start(80 * GIB)
    memory = free.predict(CONFIG).memory
    return start(memory.needed_bytes + memory.process_bytes - memory.reserved_bytes)


# Largest sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_the_largest_sizes_fit_and_the_next_ones_do_not(checkpointing: str) -> None:
    config = CONFIG.replace(checkpointing=checkpointing)
    predictor = start(round(1.02 * process_bytes(config)), max_position_embeddings=8192)

    found = largest(config, predictor)

    assert found.seq_len is not None and found.micro_batch is not None
    assert found.seq_len < 8192 and found.micro_batch < 512
    for size in ({"seq_len": found.seq_len}, {"micro_batch": found.micro_batch}):
        assert predictor.predict(config.replace(**size)).verdict == "fits"
    longer = config.replace(seq_len=found.seq_len - found.seq_len % 64 + 64)
    assert predictor.predict(longer).verdict != "fits"
    assert predictor.predict(config.replace(micro_batch=found.micro_batch + 1)).verdict != "fits"


def test_few_traces_find_the_largest_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = start(2 * process_bytes(CONFIG))

    largest(CONFIG, predictor)

    assert len(predictor.store.traces) <= 9


def test_where_nothing_fits_there_is_no_largest_size() -> None:
    found = largest(CONFIG, start(process_bytes(CONFIG.replace(micro_batch=1, seq_len=64)) // 2))

    assert (found.seq_len, found.micro_batch) == (None, None)


def test_the_search_ends_with_the_longest_sequence_the_model_is_made_for() -> None:
    small = CONFIG.replace(micro_batch=1, seq_len=64)

    found = largest(small, start(80 * GIB, max_position_embeddings=200))

    assert (found.seq_len, found.seq_len_searched_to) == (192, 192)


def test_a_model_names_its_longest_sequence_in_one_of_several_ways() -> None:
    assert longest_sequence(tiny(max_position_embeddings=77)) == 77
    figures = dict(tiny().hf_config)
    figures.pop("max_position_embeddings")
    assert longest_sequence(dataclasses.replace(tiny(), hf_config=figures)) is None
    nested = {**figures, "text_config": {"n_positions": 99}}
    assert longest_sequence(dataclasses.replace(tiny(), hf_config=nested)) == 99


def test_the_largest_sizes_are_kept_on_disk(tmp_path: Path) -> None:
    limit, cache = process_bytes(CONFIG), tmp_path / "traces.sqlite3"
    first = largest(CONFIG, start(limit, cache))

    with mock.patch.object(searching, "_last_that_fits", side_effect=AssertionError):
        assert largest(CONFIG, start(limit, cache)) == first
        with pytest.raises(AssertionError):
            largest(CONFIG, start(limit + 1, cache))


def test_the_text_says_none_and_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    small = CONFIG.replace(micro_batch=1, seq_len=64)
    monkeypatch.setattr(searching, "MOST_SEQUENCES", 4)

    text = fit_text(
        will_it_fit(small, start(80 * GIB, max_position_embeddings=128), sizes=True),
        machine=CARD.machine(),
    )

    assert "longest sequence that fits at micro-batch 1: at least 128 tokens" in text
    assert "largest micro-batch that fits at 64 tokens: at least 4" in text
    assert "fits at 64 tokens: none" in fit_text(
        will_it_fit(small, start(GIB // 4), sizes=True), machine=CARD.machine()
    )


# The answer --------------------------------------------------------------------------------------


def test_the_bars_sum_to_the_process() -> None:
    memory = start(8 * GIB).predict(CONFIG).memory

    lines = memory_bars(memory).splitlines()[1:]
    sizes = {line[:25].strip(): float(line[25:].split()[0]) for line in lines}

    whole = sizes.pop("process")
    assert whole == pytest.approx(memory.process_bytes / GIB, abs=0.01)
    assert sum(sizes.values()) == pytest.approx(whole, abs=0.05)
    assert {"stored activations", "cache and fragmentation", "CUDA context"} <= set(sizes)


def test_a_run_that_must_give_back_its_cache_is_said_to_be_slower() -> None:
    predictor = start(8 * GIB)
    memory = predictor.predict(CONFIG).memory
    answer = will_it_fit(CONFIG, predictor)
    tight = dataclasses.replace(answer, limit_bytes=memory.process_bytes - 1)

    assert "give cached memory back" not in fit_text(answer, machine=CARD.machine())
    assert "give cached memory back" in fit_text(tight, machine=CARD.machine())


# What a run settles ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "verdict", "code"), [("ok", "fits", 0), ("out_of_memory", "does not fit", 1)]
)
def test_an_uncertain_answer_is_settled_by_a_run(outcome: str, verdict: str, code: int) -> None:
    ran: list[RunConfig] = []

    def probe(config: RunConfig) -> ProbeResult:
        ran.append(config)
        return ended(outcome, process_bytes=6 * GIB)

    answer = will_it_fit(CONFIG, unsure(), probe=probe)

    assert ran == [CONFIG]
    assert (answer.prediction.verdict, answer.exit_code) == (verdict, code)
    assert answer.prediction.evidence == "proved"
    text = fit_text(answer, machine=CARD.machine())
    assert "under a cap of 7.00 GiB" in text
    assert ("ran out of memory" in text) == (outcome == "out_of_memory")


def test_an_uncertain_answer_stays_so_without_a_run_or_with_one_that_tells_nothing() -> None:
    def busy(config: RunConfig) -> ProbeResult:
        raise BusyError("The GPU must be free.")

    assert will_it_fit(CONFIG, unsure()).exit_code == 2
    for probe, said in (
        (busy, "The GPU must be free"),
        (lambda config: ended("timed_out"), "did not end in time"),
        (lambda config: ended("failed", detail="no driver."), "failed (no driver)"),
    ):
        answer = will_it_fit(CONFIG, unsure(), probe=probe)
        assert answer.exit_code == 2
        assert answer.note is not None and said in answer.note
        assert answer.prediction.evidence == "traced"


def test_a_certain_answer_is_not_run() -> None:
    def never(config: RunConfig) -> ProbeResult:
        raise AssertionError

    assert will_it_fit(CONFIG, start(8 * GIB), probe=never).exit_code == 0
    assert will_it_fit(CONFIG, start(GIB // 4), probe=never).exit_code == 1


@pytest.fixture
def untraceable() -> Iterator[None]:
    failing = mock.Mock(side_effect=UntraceableError("the step cannot be traced."))
    with mock.patch.object(Predictor, "predict", failing):
        yield


def test_what_cannot_be_traced_is_run_in_its_short_form(untraceable: None) -> None:
    config = CONFIG.replace(accumulation=8)
    ran: list[RunConfig] = []

    def probe(config: RunConfig) -> ProbeResult:
        ran.append(config)
        return ended(
            "ok", allocated_bytes=3 * GIB, reserved_bytes=4 * GIB, context_bytes=GIB // 2,
            process_bytes=4 * GIB + GIB // 2,
            step_times_s=(2.0, 2.0, 2.0), tokens_per_step=4096,
        )  # fmt: skip

    answer = will_it_fit(config, start(8 * GIB), probe=probe, sizes=True)

    assert ran == [config.replace(accumulation=2)]
    assert (answer.exit_code, answer.prediction.evidence) == (0, "probed")
    assert answer.prediction.memory.process_bytes == 4 * GIB + GIB // 2
    assert answer.prediction.tokens_per_s is not None
    assert answer.prediction.tokens_per_s.value == 2048
    assert answer.largest is None
    text = fit_text(answer, machine=CARD.machine())
    assert text.startswith("yes: ")
    assert "cannot be traced" in text and "process held 4.50 GiB" in text


def test_what_cannot_be_traced_and_runs_out_of_memory_does_not_fit(untraceable: None) -> None:
    answer = will_it_fit(CONFIG, start(8 * GIB), probe=lambda config: ended("out_of_memory"))

    assert (answer.exit_code, answer.prediction.evidence) == (1, "proved")
    assert "ran out of memory" in fit_text(answer, machine=CARD.machine())


def test_what_can_neither_be_traced_nor_run_is_refused(untraceable: None) -> None:
    with pytest.raises(UntraceableError, match=r"^the step cannot be traced\.$"):
        will_it_fit(CONFIG, start(8 * GIB))
    with pytest.raises(UntraceableError, match=r"traced\. A run on the card failed \(bad\)\."):
        will_it_fit(CONFIG, start(8 * GIB), probe=lambda config: ended("failed", detail="bad"))
