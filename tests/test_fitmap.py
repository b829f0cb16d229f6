"""The map of what fits: verdicts as `fit` gives them, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from recorded import configure, tiny
from traced_once import share_traces

from lora_advisor.advisor import sizes as sizing
from lora_advisor.advisor.fitmap import (
    FitMap,
    check_map_file,
    default_seq_lens,
    fit_map,
    sizes_of,
)
from lora_advisor.advisor.map_picture import DPI, SIZE, draw_map
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.report_map import map_text, map_title
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.errors import OutputError, UsageError
from lora_advisor.probes.machine import GIB

#: Its context is measured, so that the bound is near what is expected.
CARD = find_card("h100-80gb")
CONFIG = configure(checkpointing="off", micro_batch=8, seq_len=512)
BATCHES, LENGTHS = (1, 8, 32), (128, 512, 2048)


def start(limit_bytes: int, cache: Path | None = None) -> Predictor:
    return Predictor.start(
        tiny(num_hidden_layers=2), CARD.machine(), CARD, limit_bytes=limit_bytes, cache=cache
    )


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    share_traces(monkeypatch)


@pytest.fixture
def predictor() -> Predictor:
    """A limit between the smallest and the largest size of the grid."""
    middle = CONFIG.replace(micro_batch=16, seq_len=1024)
    return start(start(80 * GIB).predict(middle).memory.process_upper_bytes)


@pytest.fixture
def drawn(predictor: Predictor) -> FitMap:
    return fit_map(CONFIG, predictor, micro_batches=BATCHES, seq_lens=LENGTHS)


def test_the_map_says_of_each_size_what_fit_says(drawn: FitMap, predictor: Predictor) -> None:
    assert [(c.micro_batch, c.seq_len) for c in drawn.cells] == [
        (batch, length) for batch in BATCHES for length in LENGTHS
    ]
    for batch, length in ((1, 128), (8, 512), (32, 2048)):
        alone = predictor.predict(CONFIG.replace(micro_batch=batch, seq_len=length))
        cell = drawn.at(batch, length)
        assert cell.verdict == alone.verdict
        if cell.at_least:
            assert cell.process_bytes <= alone.memory.process_bytes
        else:
            assert cell.process_bytes == alone.memory.process_bytes
    assert drawn.at(1, 128).verdict == "fits"
    assert drawn.at(32, 2048).verdict == "does not fit"


def test_an_asked_size_beside_the_grid_is_answered_too(predictor: Predictor) -> None:
    found = fit_map(CONFIG, predictor, micro_batches=(1, 2), seq_lens=(64, 128))

    assert (found.asked.micro_batch, found.asked.seq_len) == (8, 512)
    assert found.asked.verdict == predictor.predict(CONFIG).verdict
    assert len(found.cells) == 4


def test_a_map_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "traces.sqlite3"
    first = fit_map(CONFIG, start(GIB, cache), micro_batches=(1, 2), seq_lens=(64,))
    monkeypatch.setattr(sizing, "SizeMap", None)

    assert fit_map(CONFIG, start(GIB, cache), micro_batches=(1, 2), seq_lens=(64,)) == first


# As text -----------------------------------------------------------------------------------------


def test_the_table_has_a_sign_a_size_and_marks_what_was_asked(drawn: FitMap) -> None:
    lines = map_text(drawn, CARD.machine()).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:11].strip().isdigit()}

    assert "limit" in lines[1] and "traced, not measured" in lines[1]
    signs = {"fits": "+", "uncertain": "?", "does not fit": "."}
    for batch in BATCHES:
        expected = [signs[drawn.at(batch, length).verdict] for length in LENGTHS]
        if batch == 8:
            expected[1] = f"[{expected[1]}]"
        assert rows[str(batch)] == expected
    assert any("+ fits" in line and ". does not fit" in line for line in lines)


def test_a_wide_table_is_thinned_to_100_characters_and_keeps_what_was_asked(
    predictor: Predictor,
) -> None:
    lengths = range(64, 64 + 40 * 32, 32)
    wide = fit_map(CONFIG, predictor, micro_batches=(8,), seq_lens=tuple(lengths))

    lines = map_text(wide, CARD.machine()).splitlines()

    assert max(map(len, lines)) <= 100
    assert any(" 512" in line for line in lines)
    assert sum(line.count("[") for line in lines) == 2  # the row, the legend


def test_colour_is_only_where_it_is_asked_for(drawn: FitMap) -> None:
    assert "\x1b[" not in map_text(drawn, CARD.machine())
    assert "\x1b[32m+" in map_text(drawn, CARD.machine(), colour=True)


# As a picture ------------------------------------------------------------------------------------


def test_the_picture_is_drawn(drawn: FitMap, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "map.png"

    draw_map(drawn, path, title=map_title(drawn, CARD.machine()))

    pixels = imread(path)
    assert pixels.shape[:2] == (round(SIZE[1] * DPI), round(SIZE[0] * DPI))
    assert len(numpy.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100


def test_a_map_of_one_verdict_or_one_cell_is_drawn(tmp_path: Path) -> None:
    one = fit_map(CONFIG, start(80 * GIB), micro_batches=(1,), seq_lens=(64,))

    draw_map(one, tmp_path / "one.png", title="one")

    assert (tmp_path / "one.png").stat().st_size > 0


def test_a_picture_that_cannot_be_written_is_one_sentence(drawn: FitMap, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can be written"):
        draw_map(drawn, tmp_path, title="")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can be written"):
        check_map_file(tmp_path / "file" / "map.png")
    with pytest.raises(UsageError, match=r"end in \.png"):
        check_map_file(tmp_path / "map.jpg")


# Axes --------------------------------------------------------------------------------------------


def test_axes_are_read_in_order_and_once() -> None:
    assert sizes_of("--micro-batches", "4,1, 2,4", 1) == (1, 2, 4)
    assert sizes_of("--seqs", None, 2) is None


@pytest.mark.parametrize("words", ["", "0", "1,,2", "a", "1.5", "-1", "99999999", "1;2"])
def test_axes_that_are_none_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match="must be whole numbers from 1 to 4096"):
        sizes_of("--micro-batches", words, 1)


def test_columns_end_with_the_longest_sequence_of_the_model() -> None:
    assert default_seq_lens(tiny(max_position_embeddings=1000)) == (256, 512, 768)
    assert default_seq_lens(tiny(max_position_embeddings=100)) == (100,)
    assert len(default_seq_lens(tiny(max_position_embeddings=10**6))) == 25
