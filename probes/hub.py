"""Rows of a data set on the Hugging Face hub, through datasets."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lora_advisor.probes.errors import AdvisorError, DataError, MissingInputError, UsageError
from lora_advisor.probes.files import table_rows
from lora_advisor.probes.rows import Row

#: How a data set on the hub is named: `hub:owner/name`, `hub:owner/name:config`,
#: `hub:owner/name:config:split`, `hub:owner/name::split`; the split is "train" where none is given.
PREFIX = "hub:"


def read_hub(given: str) -> tuple[list[Row], str]:
    """Return the rows of a data set, and the sha256 of what they hold.

    Args:
        given: Its name, as `PREFIX` says.

    Raises:
        UsageError: It is no such name.
        MissingInputError: The hub cannot be reached and it is not in the cache, or it is not there.
        DataError: It has no such configuration or split.
    """
    name, config, split = (*given.removeprefix(PREFIX).split(":", 2), "", "")[:3]
    if not name or name.count("/") > 1:
        raise UsageError(
            f"`{given}` must name a data set as hub:owner/name, hub:owner/name:config or "
            "hub:owner/name:config:split."
        )
    import datasets

    split = split or "train"
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets raises what its many readers chose
        raise _as_ours(given, split, error) from None
    rows = table_rows(given, loaded.with_format("arrow")[:])
    if not rows:
        raise DataError(f"`{given}` must hold at least one row, but it has none.")
    return rows, _digest(rows)


def _as_ours(given: str, split: str, error: Exception) -> AdvisorError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if isinstance(error, ConnectionError | OSError) and not isinstance(error, FileNotFoundError):
        return MissingInputError(
            f"`{given}` must be on the Hugging Face hub or in its cache, but the hub cannot be "
            f"reached ({reason}); give a file, or load it once where there is a network."
        )
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f"`{given}` must be a data set that you may read, but {reason}.")
    return DataError(f"`{given}` (split {split!r}) must be loadable, but {reason}.")


def _digest(rows: list[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=repr).encode())
    return digest.hexdigest()
