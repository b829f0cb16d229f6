"""Where rows come from: a file, a folder of files of one kind, or a data set on the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from lora_advisor.probes.errors import DataError, MissingInputError
from lora_advisor.probes.files import KINDS, kind_of, read_content, read_rows
from lora_advisor.probes.hub import PREFIX, read_hub
from lora_advisor.probes.rows import Row

#: Files of a folder that tell about the data and are none.
_ABOUT = ("readme", "license", "licence", "changelog", "dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was read.

    Attributes:
        kind: One of the values of `KINDS`, or "hub".
        files: The files, in the order in which they were read; for the hub its name.
        sha256: Of the content: the bytes of a file, unpacked; of all files of a folder in order.
        rows: In that order, at least one.
    """

    kind: str
    files: tuple[str, ...]
    sha256: str
    rows: list[Row] = field(repr=False)


def read_source(path: Path) -> Source:
    """Read a file, a folder or a data set on the hub.

    Raises:
        UsageError: A name on the hub is none.
        MissingInputError: There is no such thing.
        DataError: It cannot be read or has no row.
    """
    if str(path).startswith(PREFIX):
        rows, sha256 = read_hub(str(path))
        return Source(kind="hub", files=(str(path),), sha256=sha256, rows=rows)
    if path.is_dir():
        return _folder(path)
    known = ", ".join(KINDS)
    if not path.is_file():
        raise MissingInputError(
            f"`{path}` must be a data file ({known}), a folder of them, or hub:owner/name, but "
            "there is none."
        )
    kind = kind_of(path)
    if kind is None:
        raise DataError(
            f"`{path}` must end in one of {known} (or .gz behind it), but ends in {path.suffix!r}."
        )
    raw = read_content(path)
    digest = hashlib.sha256(raw).hexdigest()
    return Source(kind=kind, files=(str(path),), sha256=digest, rows=read_rows(path, kind, raw))


def _folder(folder: Path) -> Source:
    kind, files = _files_of(folder)
    digest = hashlib.sha256()
    rows: list[Row] = []
    for file in files:
        raw = read_content(file)
        digest.update(hashlib.sha256(raw).digest())
        rows += read_rows(file, kind, raw)
    return Source(kind=kind, files=tuple(map(str, files)), sha256=digest.hexdigest(), rows=rows)


def _files_of(folder: Path) -> tuple[str, list[Path]]:
    """Return the kind of a folder's data files and the files, by name."""
    names = sorted(file for file in folder.iterdir() if file.is_file())
    if any(file.name in ("dataset_dict.json", "state.json") for file in names):
        raise DataError(
            f"`{folder}` must hold data files, but was written by datasets' save_to_disk; write it "
            "with to_parquet or to_json instead."
        )
    found: dict[str, list[Path]] = {}
    for file in names:
        kind = kind_of(file)
        if kind is not None and not file.name.lower().startswith((".", *_ABOUT)):
            found.setdefault(kind, []).append(file)
    if not found:
        raise MissingInputError(
            f"`{folder}` must hold data files ({', '.join(KINDS)}), but has none; folders within "
            "it are not searched."
        )
    if len(found) > 1:
        told = ", ".join(f"{kind} ({files[0].name})" for kind, files in found.items())
        raise DataError(
            f"`{folder}` must hold data files of one kind, but has {told}; give one file, or part "
            "them."
        )
    ((kind, files),) = found.items()
    return kind, files
