"""`data inspect`: what it counts is right, what it shows is what the model sees."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from real_model import smollm2_folder
from tiny_model import save_model, save_tokenizer

from lora_advisor.advisor.data_inspect import DataReport, inspect
from lora_advisor.advisor.data_text import inspect_text, sample_text
from lora_advisor.advisor.datafit import summarise
from lora_advisor.advisor.report_data import percent
from lora_advisor.cli import main
from lora_advisor.probes.architectures import Architecture, load_bundled
from lora_advisor.probes.dataset import read_examples
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.tokens import load_tokenizer, tokenize

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """Return a tokenizer of bytes without a chat template: a character is a token."""
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder, chat=False)
    return Architecture(name="tiny", hf_config={"vocab_size": 259}, weights=str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a whole model with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


def pairs(folder: Path, *rows: tuple[str, str]) -> Path:
    file = folder / "pairs.jsonl"
    text = (json.dumps({"prompt": asked, "completion": said}) for asked, said in rows)
    file.write_text("\n".join(text), "utf-8")
    return file


def texts(folder: Path, *lengths: int) -> Path:
    """Save texts that come to so many tokens with the end of sequence."""
    file = folder / "texts.txt"
    file.write_text("\n".join("x" * (length - 1) for length in lengths), "utf-8")
    return file


def shown(report: DataReport) -> str:
    return inspect_text(report, colours=False)


def test_lengths_and_what_each_sequence_length_cuts_are_counted(
    tmp_path: Path, base: Architecture
) -> None:
    report = inspect(texts(tmp_path, *[100] * 98, 400, 700), base)
    assert (report.planned, report.seq_len) == (448, 448)
    assert report.quantiles == {0.5: 100, 0.9: 100, 0.99: 400}
    cut = {c.seq_len: (c.long_rows, c.truncated, c.lost_tokens) for c in report.cuttings}
    assert cut == {
        256: (2, 2, 144 + 444),
        448: (1, 1, 252),
        512: (1, 1, 188),
        1024: (0, 0, 0),
    }
    text = shown(report)
    assert "10,900; of a row: shortest 100, median 100, 90 % 100, 99 % 400, longest 700" in text
    assert "at 448 tokens 1 truncated, 252 (2.3 %) tokens lost; 100 rows to train on" in text
    (line,) = [line for line in text.splitlines() if "<- what `plan --data` takes" in line]
    assert line.split()[:6] == ["448", "1", "(1", "%)", "252", "(2.3"]
    assert "(1.00x)" in line


def test_padding_is_that_of_the_micro_batches(tmp_path: Path, base: Architecture) -> None:
    report = inspect(texts(tmp_path, *[100, 300] * 240), base, seq_len=512)
    cutting = next(c for c in report.cuttings if c.seq_len == 512)
    assert cutting.padding["packed"] == 0
    # transformers sorts 120 of 480 rows at a time (LengthGroupedSampler: 5 steps of 24), so that at
    # most 4 micro-batches hold both lengths, with at most 3 short rows each.
    assert cutting.padding["grouped"] <= 4 * 3 * 200 / 96_000
    # In random order a micro-batch is of 300 tokens unless all four rows are short.
    assert 0.2 < cutting.padding["random"] < 1 / 3
    assert cutting.computed_tokens == pytest.approx(96_000 / (1 - cutting.padding["random"]))
    assert "<- --seq" in shown(report)


def test_the_marked_length_is_that_of_a_plan(tmp_path: Path, base: Architecture) -> None:
    for lengths in ([100] * 99 + [900], [3000] * 5, [7]):
        file = texts(tmp_path, *lengths)
        assert inspect(file, base).planned == summarise(file, base, None)[1]


@pytest.mark.parametrize(
    ("long_rows", "counted"),
    [
        ("truncate", "1 truncated, 600 (67 %) tokens lost (--long-rows split keeps more of them)"),
        ("split", "1 split into 4 rows, 0 tokens lost"),
        ("drop", "1 dropped, 800 (89 %) tokens lost (--long-rows split keeps more of them)"),
    ],
)
def test_long_rows_are_counted_as_they_are_treated(
    tmp_path: Path, base: Architecture, long_rows: str, counted: str
) -> None:
    file = texts(tmp_path, 800, 100)
    report = inspect(file, base, seq_len=200, long_rows=long_rows)
    assert f"at 200 tokens {counted}" in shown(report)
    chosen = next(c for c in report.cuttings if c.seq_len == 200)
    data = tokenize(read_examples(file), load_tokenizer(base), 200, long_rows=long_rows)
    assert (chosen.rows, chosen.tokens) == (
        len(data.rows),
        sum(len(row["input_ids"]) for row in data.rows),
    )


def test_a_length_that_leaves_no_row_is_told(tmp_path: Path, base: Architecture) -> None:
    report = inspect(pairs(tmp_path, ("x" * 300, "y")), base, seq_len=100)
    text = shown(report)
    assert "at 100 tokens 0 truncated, 302 (100 %) tokens lost" in text
    assert "1 left out: nothing of an answer is in them; 0 rows to train on" in text
    assert text.count("no row left") == 6  # 100 and 256 tokens
    assert "pairs.jsonl:1, 302 tokens, left out: nothing in it is trained" in text


def test_repeats_contradictions_and_empty_answers_are_named(
    tmp_path: Path, base: Architecture
) -> None:
    rows = [("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("c", " "), ("a", "1"), ("d", "4")]
    report = inspect(pairs(tmp_path, *rows), base)
    found = report.repeats
    assert (found.rows, found.prompts, found.empty) == (2, 1, 1)
    text = shown(report)
    assert (
        "2 rows repeat earlier ones (pairs.jsonl:3 like pairs.jsonl:1, pairs.jsonl:6 like "
        "pairs.jsonl:1)" in text
    )
    assert "1 prompt has several answers (pairs.jsonl:1)" in text
    assert "1 row has an empty answer (pairs.jsonl:5)" in text
    clean = shown(inspect(pairs(tmp_path, ("a", "1")), base))
    assert "no row repeats an earlier one" in clean and "no row has an empty answer" in clean


def test_rows_that_offer_other_tools_are_no_repeats(tmp_path: Path, base: Architecture) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "tools.jsonl"
    rows = [{"messages": turns, "tools": [{"name": name}]} for name in ("x", "y", "x")]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert inspect(file, base).repeats.row_places == ("tools.jsonl:3 like tools.jsonl:1",)


def test_a_sample_is_what_the_model_sees_with_the_masked_part_marked(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pairs(tmp_path, ("2+2?", "4."), ("3+3?", "6."))
    assert main(["data", "inspect", str(file), "--model", str(folder), "--samples", "1"]) == 0
    text = capsys.readouterr().out

    assert text.endswith(
        "--- pairs.jsonl:1, 26 tokens\n"
        "[[<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n]]4.<|im_end|>\n"
    )
    assert "pairs.jsonl:2" not in text
    assert "shape       prompt/completion, by `prompt`, `completion`" in text
    assert "with a chat template" in text


def test_samples_are_spread_over_the_rows(tmp_path: Path, base: Architecture) -> None:
    file = texts(tmp_path, *range(10, 20))
    for count, places in ((0, []), (2, [1, 6]), (3, [1, 4, 7]), (99, list(range(1, 11)))):
        report = inspect(file, base, samples=count)
        assert [sample.place for sample in report.samples] == [f"texts.txt:{n}" for n in places]


def test_a_sample_moves_no_cursor_and_shows_the_ends_of_what_is_long(
    tmp_path: Path, base: Architecture
) -> None:
    file = pairs(tmp_path, ("a" * 5000 + "END", "\x1b[31mred\x07"))
    (sample,) = inspect(file, base, seq_len=8192).samples
    text = sample_text(sample, colours=False)
    assert "\x1b" not in text and "\\x1b[31mred\\x07<|im_end|>" in text
    assert "...(4,403 characters)..." in text and "END]]" in text
    assert "\x1b[2m" in sample_text(sample, colours=True)


def test_without_a_tokenizer_characters_are_told_and_tokens_are_unknown(tmp_path: Path) -> None:
    report = inspect(pairs(tmp_path, ("2+2?", "4."), ("3", "3")), load_bundled("qwen2.5-1.5b"))
    text = shown(report)
    assert "characters  8; of a row: shortest 2, median 2" in text
    assert "tokens      unknown: give --model as a folder" in text
    assert "[user]\n2+2?\n[assistant]\n4." in text
    assert "plan --data" not in text
    assert (report.planned, report.cuttings) == (None, ())


def test_json_says_the_same(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = texts(tmp_path, 40, 400)
    words = ["data", "inspect", str(file), "--model", str(folder), "--json", "--seq", "128"]
    assert main([*words, "--long-rows", "split"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert told["data"]["kind"] == "text" and told["data"]["columns"] == ["text"]
    assert told["lengths"]["max"] == 400 and told["rows"] == 2
    cutting = next(c for c in told["cuttings"] if c["seq_len"] == 128)
    assert (cutting["split"], cutting["pieces"], cutting["rows"]) == (1, 4, 5)
    assert [trained for _, trained in told["samples"][0]["parts"]] == [False, True]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["none.jsonl"], 66, "must be a data file"),
        (["bad.jsonl"], 65, "line 1 must be one JSON object"),
        (["good.jsonl", "--seq", "1"], 64, "`--seq` must be at least 2 tokens, but got 1"),
        (["good.jsonl", "--samples", "-1"], 64, "`--samples` must be at least 0, but got -1"),
        (["good.jsonl", "--long-rows", "fold"], 64, "'fold' is not one of"),
        (["good.jsonl", "--model", "no-such"], 64, "no-such"),
        (["hub:owner/none"], 66, "must be on the Hugging Face hub or in its cache"),
    ],
)
def test_bad_input_gives_one_sentence_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{", "utf-8")
    (tmp_path / "good.jsonl").write_text('{"text": "a"}', "utf-8")
    assert main(["data", "inspect", *words]) == code
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert sentence in said.err


def test_a_word_that_says_nothing_of_long_rows_is_refused(
    tmp_path: Path, base: Architecture
) -> None:
    with pytest.raises(UsageError, match="`long_rows` must be truncate, split, drop"):
        inspect(texts(tmp_path, 10), base, long_rows="fold")


@pytest.mark.parametrize(
    ("settings", "marked"),
    [({}, "\x1b[2m"), ({"NO_COLOR": "1"}, "[[x]]"), ({"TERM": "dumb"}, "[[x]]")],
)
def test_masked_text_is_dim_on_a_terminal_that_shows_colours(
    tmp_path: Path, folder: Path, settings: dict[str, str], marked: str
) -> None:
    file = texts(tmp_path, 10)
    words = ["-m", "lora_advisor.cli", "data", "inspect", str(file), "--model", str(folder)]
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    done = subprocess.run(
        [sys.executable, *words], stdout=theirs, check=False, cwd=tmp_path,
        env={**env, "TERM": "xterm", **settings},
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while chunk := _read(ours):
        text += chunk
    os.close(ours)
    assert done.returncode == 0
    assert marked in text.decode()
    assert ("\x1b" in text.decode()) == (marked == "\x1b[2m")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


@pytest.mark.parametrize(
    ("share", "text"), [(0.0009, "0.09 %"), (0.0152, "1.5 %"), (0.236, "24 %"), (1.0, "100 %")]
)
def test_shares_have_two_digits(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not beside the project")
def test_gsm8k_is_told_as_it_is() -> None:
    folder = smollm2_folder()
    real = Architecture(name="smollm2", hf_config={"vocab_size": 49152}, weights=str(folder))
    report = inspect(GSM8K, real, samples=1)

    # Counted apart from the code under test: the answers' lines in the file, and no repeats.
    rows = [json.loads(line) for line in GSM8K.read_text("utf-8").splitlines()]
    assert len({json.dumps(row) for row in rows}) == len(rows) - report.repeats.rows
    assert len({row["question"] for row in rows}) == len(rows) - report.repeats.prompts
    assert report.planned == 448
    (sample,) = report.samples
    assert sample.parts[-1] == (rows[0]["answer"] + "<|im_end|>", True)
    masked, trained = sample.parts[0]
    assert trained is False and rows[0]["question"] in masked
    assert re.search(r"58 % of them trained", shown(report))
