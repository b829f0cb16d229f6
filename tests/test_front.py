"""The front leaves out what another configuration beats in everything."""

from __future__ import annotations

from foretold import candidate

from lora_advisor.advisor.front import front


def test_what_is_beaten_in_everything_is_left_out() -> None:
    fast, frugal = candidate(1000, 2.0, seq_len=1024), candidate(800, 1.0, seq_len=1024)
    long = candidate(500, 3.0, seq_len=4096)
    slower = candidate(900, 2.5, seq_len=1024)
    shorter = candidate(500, 3.0, seq_len=2048)

    assert front([slower, long, frugal, shorter, fast]) == (fast, frugal, long)


def test_where_an_energy_is_unknown_speed_and_length_decide() -> None:
    fast, frugal = candidate(1000, 2.0, seq_len=1024), candidate(800, 1.0, seq_len=1024)
    long = candidate(500, None, seq_len=4096)

    assert front([frugal, fast, long]) == (fast, long)


def test_what_has_no_speed_is_left_out() -> None:
    known = candidate(500, 1.0, seq_len=1024)

    assert front([candidate(None, None, seq_len=4096), known]) == (known,)
    assert front([]) == ()
