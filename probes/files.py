"""Rows of one data file, by its kind: the bytes are looked at before a reader stumbles over them.

What is covered: JSON lines, JSON, CSV, TSV, parquet, plain text and Markdown; all but parquet also
gzip-compressed. What is not: images and sound, other compressions, files larger than the memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_advisor.probes.errors import DataError, MissingInputError
from lora_advisor.probes.json_rows import json_rows, line_rows
from lora_advisor.probes.rows import Row

#: What the end of a file's name says of its content.
KINDS: Mapping[str, str] = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "Markdown",
}

#: How files of other kinds begin, and what to do with one.
_SIGNS: Mapping[bytes, str] = {
    b"PK\x03\x04": "it is a zip archive; unpack it first",
    b"\x1f\x8b": "it is compressed with gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; unpack it first",
    b"PAR1": "it is a parquet file; let its name end in .parquet",
    b"ARROW1": "it is an Arrow file; save it as parquet",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch the file with `git lfs pull`",
}


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its name; None for one that cannot be read."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if packed and kind == "parquet" else kind


def read_content(path: Path) -> bytes:
    """Return what a file holds, unpacked.

    Raises:
        MissingInputError: It cannot be opened.
        DataError: It is empty, or not the gzip file that its name says.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingInputError(f"`{path}` must be readable, but {error.strerror}.") from None
    if path.name.lower().endswith(".gz") and raw:
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"`{path}` must be a whole gzip file, but {error}.") from None
    if not raw.strip():
        raise DataError(f"`{path}` must hold at least one row, but it is empty.")
    return raw


def read_rows(path: Path, kind: str, raw: bytes) -> list[Row]:
    """Return the rows that a file of a kind holds.

    Raises:
        DataError: It is not of that kind, or has no row; the sentence names the line.
    """
    file = str(path)
    if kind == "parquet":
        rows = _parquet_rows(file, raw)
    else:
        text = _text(file, kind, raw)
        match kind:
            case "CSV" | "TSV":
                rows = _table_rows(file, text, "\t" if kind == "TSV" else ",")
            case "JSON":
                rows = json_rows(file, text)
            case "JSON lines":
                rows = line_rows(file, text)
            case "text":  # one row a line, as datasets' loader "text" takes it
                lines = enumerate(text.split("\n"), start=1)
                rows = [Row(file, n, {"text": line.rstrip("\r")}) for n, line in lines]
                rows = [row for row in rows if row.values["text"].strip()]
            case _:  # a line of Markdown is no document
                rows = [Row(file, 1, {"text": text})]
    if not rows:
        raise DataError(f"`{file}` must hold at least one row, but it has none.")
    return rows


def _text(file: str, kind: str, raw: bytes) -> str:
    for sign, advice in _SIGNS.items():
        if raw.startswith(sign):
            raise DataError(f"`{file}` must be {kind}, but {advice}.")
    if b"\0" in raw[:4]:
        raise DataError(f"`{file}` must be {kind}, but it is UTF-16; save it as UTF-8.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"`{file}` must be UTF-8 text, but byte {error.start} is not (line {line}); save it as "
            "UTF-8."
        ) from None
    begins = text.lstrip()[:14].lower()
    if not begins:
        raise DataError(f"`{file}` must hold at least one row, but it is empty.")
    if kind != "Markdown" and begins.startswith(("<!doctype html", "<html")):
        raise DataError(
            f"`{file}` must be {kind}, but it is a web page; download the file itself, not the "
            "page that shows it."
        )
    return text


def _table_rows(file: str, text: str, delimiter: str) -> list[Row]:
    before = csv.field_size_limit(sys.maxsize)  # 131,072 characters else
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return _cells(file, reader, delimiter)
    finally:
        csv.field_size_limit(before)


def _cells(file: str, reader: Any, delimiter: str) -> list[Row]:
    rows: list[Row] = []
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(file, cells, delimiter)
            elif len(cells) != len(header):
                raise DataError(
                    f"`{file}`, line {start} must have as many cells as the header "
                    f"({len(header)}), but has {len(cells)}."
                )
            else:
                rows.append(Row(file, start, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"`{file}`, line {line} must be {'TSV' if delimiter != ',' else 'CSV'}, but {error}; "
            "is a quotation mark missing there?"
        ) from None
    return rows


def _header(file: str, cells: list[str], delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1:
        for other, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
            if other != delimiter and other in names[0]:
                raise DataError(
                    f"`{file}` must part its cells by {'tabs' if delimiter != ',' else 'commas'}, "
                    f"but its header has {word}; save it with the others, or as .tsv for tabs."
                )
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise DataError(
            f"`{file}` must name every column once, but its header has `{double[0]}` twice."
        )
    return names


def _parquet_rows(file: str, raw: bytes) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(raw))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(f"`{file}` must be a parquet file, but {reason}.") from None
    return table_rows(file, table)


def table_rows(file: str, table: Any) -> list[Row]:
    """Return the rows of an Arrow table."""
    return [Row(file, number, row) for number, row in enumerate(table.to_pylist(), start=1)]
