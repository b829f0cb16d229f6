"""Every kind of file is read as it is found in the world; a broken one gives one sentence."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes.dataset import Examples, read_examples
from lora_advisor.probes.errors import AdvisorError, DataError, MissingInputError, UsageError

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"

ROWS = [{"prompt": "2+2?", "completion": "4"}, {"prompt": "3+3?\nNow!", "completion": "six, say"}]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"messages": [{"role": "user", "content": "Bye", "name": "x"}, {"role": "assistant",
                                                                     "content": "Ciao"}]},
]  # fmt: skip


def said(examples: Examples) -> list[tuple[str, ...]]:
    return [tuple(turn.content for turn in row.turns) for row in examples.rows]


def lines(rows: Sequence[object], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def save_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", lines(ROWS), "JSON lines"),
        ("a.JSONL", lines(ROWS, "\r\n"), "JSON lines"),
        ("a.ndjson", "\ufeff" + lines(ROWS) + "\n\n", "JSON lines"),
        ("a.json", json.dumps(ROWS, indent=2), "JSON"),
        ("a.json", lines(ROWS), "JSON"),
        ("a.json", json.dumps({"version": 1, "tags": ["x"], "data": ROWS}), "JSON"),
        ("a.csv", 'prompt,completion\n2+2?,4\n"3+3?\nNow!","six, say"\n', "CSV"),
        ("a.csv", '\ufeffprompt,completion\r\n2+2?,4\r\n\r\n"3+3?\nNow!","six, say"\r\n', "CSV"),
        ("a.tsv", 'prompt\tcompletion\n2+2?\t4\n"3+3?\nNow!"\tsix, say\n', "TSV"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_rows_come_out_of_every_kind(
    tmp_path: Path, name: str, content: str, kind: str, packed: bool
) -> None:
    raw = content.encode()
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(raw) if packed else raw)
    examples = read_examples(file)

    assert said(examples) == [("2+2?", "4"), ("3+3?\nNow!", "six, say")]
    assert (examples.kind, examples.files) == (kind, (str(file),))
    assert examples.sha256 == hashlib.sha256(raw).hexdigest()


def test_parquet_is_read_with_nested_turns(tmp_path: Path) -> None:
    save_parquet(tmp_path / "a.parquet", ROWS)
    assert said(read_examples(tmp_path / "a.parquet")) == [
        ("2+2?", "4"),
        ("3+3?\nNow!", "six, say"),
    ]
    save_parquet(tmp_path / "b.parquet", CHATS)
    examples = read_examples(tmp_path / "b.parquet")
    assert said(examples) == [("Hi", "Ho"), ("Bye", "Ciao")]
    assert [turn.more for row in examples.rows for turn in row.turns] == [
        None,
        None,
        {"name": "x"},
        None,
    ]


def test_a_line_of_text_is_a_row_and_a_markdown_file_is_one(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md"):
        (tmp_path / name).write_bytes(b"One.\r\n\r\nTwo: <html>\n")

    text, markdown = read_examples(tmp_path / "a.txt"), read_examples(tmp_path / "a.md")
    assert (said(text), [row.line for row in text.rows]) == ([("One.",), ("Two: <html>",)], [1, 3])
    assert said(markdown) == [("One.\r\n\r\nTwo: <html>\n",)]


def test_cells_of_a_table_hold_conversations_and_long_texts(tmp_path: Path) -> None:
    turns = json.dumps(CHATS[0]["messages"]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,id\n"{turns}",1\n', "utf-8")
    assert said(read_examples(tmp_path / "a.csv")) == [("Hi", "Ho")]

    long = "word " * 100_000  # above the reader's own limit; U+2028 ends no line
    (tmp_path / "b.csv").write_text(f"text\n{long}\u2028end\n", "utf-8")
    assert said(read_examples(tmp_path / "b.csv")) == [(f"{long}\u2028end",)]


def test_a_row_of_a_table_stands_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"a\nb\nc"\n\nd\n"e\nf"\n', "utf-8")
    assert [row.line for row in read_examples(tmp_path / "a.csv").rows] == [2, 6, 7]


def test_one_object_in_a_json_file_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CHATS[0], indent=1), "utf-8")
    assert said(read_examples(tmp_path / "a.json")) == [("Hi", "Ho")]


def test_a_folder_is_read_file_by_file_and_its_rows_know_theirs(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(lines(ROWS[:1]), "utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" + lines(ROWS[1:]).encode()))
    (tmp_path / "README.md").write_text("What this is.", "utf-8")
    (tmp_path / "code.py").write_text("pass", "utf-8")
    (tmp_path / ".hidden.csv").write_text("x", "utf-8")
    (tmp_path / "within").mkdir()
    examples = read_examples(tmp_path)

    assert said(examples) == [("3+3?\nNow!", "six, say"), ("2+2?", "4")]
    assert [(Path(row.file).name, row.line) for row in examples.rows] == [
        ("a.jsonl.gz", 2),
        ("b.jsonl", 1),
    ]
    assert [Path(file).name for file in examples.files] == ["a.jsonl.gz", "b.jsonl"]

    (tmp_path / "b.jsonl").write_text(lines(ROWS[1:]), "utf-8")
    assert read_examples(tmp_path).sha256 != examples.sha256
    (tmp_path / "b.jsonl").write_text(lines(ROWS[:1]) + "{\n", "utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl`, line 2 must be one JSON object"):
        read_examples(tmp_path)


def test_folders_that_hold_no_data_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"must hold data files .* but has none"):
        read_examples(tmp_path)
    (tmp_path / "a.jsonl").write_text(lines(ROWS), "utf-8")
    (tmp_path / "b.csv").write_text("text\nx\n", "utf-8")
    with pytest.raises(DataError, match=r"JSON lines \(a.jsonl\), CSV \(b.csv\); give one file"):
        read_examples(tmp_path)
    (tmp_path / "state.json").write_text("{}", "utf-8")
    with pytest.raises(DataError, match="was written by datasets' save_to_disk"):
        read_examples(tmp_path)


def zip_of(content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", content)
    return buffer.getvalue()


ONE = lines(ROWS[:1])
LINK = "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", ONE + '{"prompt": "a", "compl', "line 2 .* it ends too early"),
        ("a.jsonl", ONE + '{"prompt": "a", "completion": "b"', "line 2 .* it ends too early"),
        ("a.jsonl", ONE + '{"prompt": "a", "completion": "b",}', "line 2 .* a comma too many"),
        ("a.json", '[{"text": "a"},\n {"text": "b"},\n]', "line 3: there is a comma too many"),
        ("a.json", '[{"text": "a"},\n {"text": "b"', "line 2: it ends too early"),
        ("a.jsonl", ONE + "{'prompt': 'a'}", "line 2 .* JSON needs double quotes"),
        ("a.json", "[{'text': 'a'}]", "line 1: .* JSON needs double quotes"),
        ("a.jsonl", ONE + ONE.strip() + ONE, "line 2 .* Extra data at character 38"),
        ("a.jsonl", "[\n" + ONE + "]", "line 1 .* several lines; let the file's name end in .json"),
        ("a.jsonl", ONE.encode("utf-16"), "must be JSON lines, but it is UTF-16; save it as UTF-8"),
        ("a.csv", "text\nx".encode("utf-16-le"), "must be CSV, but it is UTF-16"),
        ("a.csv", "text\na\ncaf\u00e9\n".encode("latin-1"), r"but byte 10 is not \(line 3\)"),
        ("a.txt", "caf\u00e9".encode("latin-1"), r"must be UTF-8 text, but byte 3 .* \(line 1\)"),
        (
            "a.csv",
            'prompt,completion\n"a\nb",c\nd\n',
            "line 4 must have as many cells .* but has 1",
        ),
        ("a.csv", 'prompt,completion\na,b\n"a,b\nc,d\n', "line 3 must be CSV, but unexpected end"),
        (
            "a.csv",
            "prompt;completion\na;b\n",
            "part its cells by commas, but its header has semico",
        ),
        ("a.tsv", "prompt,completion\na,b\n", "part its cells by tabs, but its header has commas"),
        ("a.csv", "text,text\na,b\n", "its header has `text` twice"),
        ("a.jsonl", b"", "must hold at least one row, but it is empty"),
        ("a.parquet", b"", "must hold at least one row, but it is empty"),
        ("a.txt", b"\xef\xbb\xbf\n", "must hold at least one row, but it is empty"),
        ("a.csv", "prompt,completion\n", "must hold at least one row, but it has none"),
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "has `train`, `test`"),
        ("a.json", "[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
        ("a.jsonl", '{"a":' * 100_000, "line 1 .* cannot be read: maximum recursion depth"),
        ("a.json", '"text"', "must be a JSON array, but it is a text"),
        ("a.jsonl", ONE + '{"prompt": "a"}', "row 2 must have the column `completion`"),
        (
            "a.jsonl",
            ONE + '{"question": "a", "answer": "b"}',
            "row 2 .* like the rows before it .* has the shape question/answer: put rows of one",
        ),
        ("a.jsonl", ONE + '{"prompt": "a", "completion": null}', "row 2: .* but got null"),
        ("a.jsonl", '{"text": "\\ud83d"}', "`text` must be Unicode text, but holds half a"),
        (
            "a.jsonl",
            '{"messages": [{"role": "robot", "content": "a"}]}',
            "row 1: `role` must be one of .*, but got 'robot'",
        ),
        ("a.parquet", b"x" * 100, "must be a parquet file, but"),
        ("a.parquet", ONE.encode(), "must be a parquet file, but"),
        ("a.jsonl", b"PAR1" + b"x" * 20, "it is a parquet file; let its name end in .parquet"),
        ("a.json", "<!DOCTYPE html>\n<html></html>", "must be JSON, but it is a web page"),
        ("a.csv", "\n<html><body>404</body></html>", "must be CSV, but it is a web page"),
        ("a.jsonl", LINK, "a pointer of Git LFS; fetch the file with `git lfs pull`"),
        ("a.jsonl", zip_of(ONE), "it is a zip archive; unpack it first"),
        ("a.jsonl", gzip.compress(b"x"), "it is compressed with gzip; let its name end in .gz"),
        ("a.jsonl.gz", ONE, "must be a whole gzip file, but Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(ONE.encode())[:-9], "must be a whole gzip file, but Compress"),
        ("a.parquet.gz", gzip.compress(b"x"), "must end in one of .*, but ends in '.gz'"),
    ],
)
def test_a_malformed_file_gives_one_sentence_that_names_the_place(
    tmp_path: Path, name: str, content: str | bytes, sentence: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=sentence) as caught:
        read_examples(file)

    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cached_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a data set of two splits into the cache of datasets, as a load from the hub leaves it."""
    import datasets.config
    from datasets.packaged_modules.json.json import Json

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    files = {}
    for split, row in (("train", ROWS[0]), ("test", ROWS[1])):
        (tmp_path / f"{split}.jsonl").write_text(lines([row]), "utf-8")
        files[split] = [str(tmp_path / f"{split}.jsonl")]
    make: Any = Json
    builder = make(
        cache_dir=str(tmp_path / "made"), dataset_name="sums", config_name="main",
        data_files=files, hash="0" * 16,
    )  # fmt: skip
    builder.download_and_prepare()
    made = Path(builder.cache_dir)
    place = tmp_path / "owner___sums" / "main" / made.parts[-2]
    place.mkdir(parents=True)
    made.rename(place / made.name)


@pytest.mark.usefixtures("cached_sums")
def test_a_data_set_of_the_hub_is_read_offline_once_it_is_in_the_cache() -> None:
    train, test = read_examples(Path("hub:owner/sums")), read_examples(Path("hub:owner/sums::test"))

    assert (train.kind, train.files, said(train)) == ("hub", ("hub:owner/sums",), [("2+2?", "4")])
    assert said(test) == [("3+3?\nNow!", "six, say")]
    assert read_examples(Path("hub:owner/sums:main:train[:1]")).sha256 == train.sha256
    assert train.sha256 != test.sha256


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ("hub:owner/none", MissingInputError, "must be on the Hugging Face hub or in its cache"),
        ("hub:owner/sums:other", DataError, r"for config 'other' Available .*\['main'\]"),
        ("hub:owner/sums:main:dev", DataError, r"\(split 'dev'\) must be loadable, but Unknown"),
        ("hub:", UsageError, "must name a data set as hub:owner/name"),
        ("hub:a/b/c", UsageError, "must name a data set as hub:owner/name"),
    ],
)
@pytest.mark.usefixtures("cached_sums")
def test_what_is_not_on_the_hub_gives_one_sentence(
    given: str, kind: type[AdvisorError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        read_examples(Path(given))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not beside the project")
def test_gsm8k_is_the_same_in_every_kind(tmp_path: Path) -> None:
    examples = read_examples(GSM8K)
    assert (examples.shape, len(examples.rows)) == ("question/answer", 7473)
    assert examples.rows[-1].line == 7473

    rows = [json.loads(line) for line in GSM8K.read_text("utf-8").splitlines()]
    save_parquet(tmp_path / "a.parquet", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    for name in ("a.parquet", "a.json"):
        assert said(read_examples(tmp_path / name)) == said(examples)
