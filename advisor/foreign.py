"""Read the files of other trainers back into a RunConfig, and say what could not be taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_advisor.advisor.export_words import read_mark
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import MissingInputError, UsageError

#: As `--from` takes them.
SOURCES = ("trl", "transformers", "axolotl", "llamafactory", "unsloth", "accelerate")
#: Keys that tell whose a YAML file is, the surest first.
_TELLING = {
    "axolotl": ("base_model", "micro_batch_size", "sequence_len"),
    "llamafactory": ("finetuning_type", "cutoff_len", "dataset_dir", "template"),
    "accelerate": ("compute_environment", "distributed_type"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What came of a file.

    Attributes:
        source: Whose file it is.
        config: The configuration.
        notes: Keys that could not be honoured, one sentence each.
        ignored: Keys that decide neither memory nor speed.
    """

    source: str
    config: RunConfig
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass
class Reading:
    """A file while it is read: its values, and what has been said of them.

    Attributes:
        where: The file, for messages.
        values: By key.
        notes: As in `Imported`.
        seen: Keys that have been used.
    """

    where: str
    values: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """Return a value, and remember that it was used; an empty one is the default."""
        self.seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number.

        Raises:
            UsageError: It is none, or it is not there and there is no default.
        """
        value = self.take(key, default)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number", value)
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number.

        Raises:
            UsageError: It is none.
        """
        value = self.take(key, default)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise self.wrong(key, "a number", value) from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number", value)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value.

        Raises:
            UsageError: It is none.
        """
        value = self.take(key, default)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def words(self, key: str, default: str | None = None) -> str:
        """Return a text.

        Raises:
            UsageError: It is none, or it is not there and there is no default.
        """
        value = self.take(key, default)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "a text", value)
        return value

    def wrong(self, key: str, kind: str, value: Any) -> UsageError:
        """Return the error for a value that is of another kind."""
        came = "it is not there" if value is None else f"got {value!r}"
        return UsageError(f"`{self.where}`: `{key}` must be {kind}, but {came}.")

    def note(self, key: str, why: str) -> None:
        """Say of a key that it cannot be honoured."""
        self.seen.add(key)
        self.notes.append(f"`{key}`: {why}")

    def note_all(self, reasons: Mapping[str, str]) -> None:
        """Say of each key that is set, and not used so far, why it cannot be honoured."""
        for key, why in reasons.items():
            if key not in self.seen and self.take(key):
                self.note(key, why)


def import_file(path: Path, source: str | None = None, onto: RunConfig | None = None) -> Imported:
    """Read a file of another trainer.

    Args:
        path: The file.
        source: Whose it is, one of SOURCES; None to find out.
        onto: What a file that carries a part alone (accelerate) is laid over.

    Raises:
        MissingInputError: It is not there.
        UsageError: It cannot be read, or holds what no configuration can be made of.
    """
    if source is not None and source not in SOURCES:
        raise UsageError(f"`--from` must be one of {', '.join(SOURCES)}, but got {source!r}.")
    text = _text(path)
    marked = read_mark(text) or {}
    found = source or marked.get("target") or _guess(path, text)
    if found in ("trl", "transformers", "unsloth"):
        from lora_advisor.advisor.foreign_script import read_script

        return read_script(text, str(path), found, marked)
    values = read_yaml(text, str(path))
    reading = Reading(str(path), values)
    return _reader(found)(reading, marked, onto)


def _reader(
    source: Any,
) -> Callable[[Reading, Mapping[str, Any], RunConfig | None], Imported]:
    from lora_advisor.advisor.foreign_accelerate import read_accelerate
    from lora_advisor.advisor.foreign_axolotl import read_axolotl
    from lora_advisor.advisor.foreign_llamafactory import read_llamafactory

    readers = {
        "axolotl": read_axolotl,
        "llamafactory": read_llamafactory,
        "accelerate": read_accelerate,
    }
    if source not in readers:
        raise UsageError(f"the export is of an unknown target {source!r}; give --from.")
    return readers[source]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise MissingInputError(
            f"`{path}` must be a file of another trainer, but it is not there."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"`{path}` must be a file of another trainer, but cannot be read: {error}."
        ) from None


def read_yaml(text: str, where: str) -> Mapping[str, Any]:
    """Return the keys of a YAML file.

    Raises:
        UsageError: It is no YAML, or no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        line = "" if place is None else f" (line {place.line + 1})"
        problem = getattr(error, "problem", None) or type(error).__name__
        raise UsageError(f"`{where}` must be YAML, but cannot be read{line}: {problem}.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"`{where}` must hold keys with values, but holds something else.")
    return values


def _guess(path: Path, text: str) -> str:
    if path.suffix == ".py":
        raise UsageError(
            f"`{path}` must be a script that lora-advisor exported: of other scripts nothing is "
            "known; give an Axolotl or LLaMA-Factory YAML, or export again."
        )
    values = read_yaml(text, str(path))
    for source, keys in _TELLING.items():
        if any(key in values for key in keys):
            return source
    raise UsageError(
        f"`{path}` must be a file of {', '.join(SOURCES)}, but none of their keys is in it; say "
        "with --from whose it is."
    )


def model_of(written: str, marked: Mapping[str, Any]) -> str:
    """Return what the user called a model: an export of a bundled name holds its hub id."""
    name = marked.get("model")
    return name if isinstance(name, str) and marked.get("written") == written else written


def skip_adapter(reading: Reading) -> None:
    """Leave out what is said of an adapter where there is none."""
    reading.seen |= {key for key in reading.values if key.startswith(("lora_", "peft_"))}


def leftover(
    reading: Reading,
    known: Sequence[str],
    irrelevant: Callable[[str], bool],
    trainer: str,
) -> tuple[str, ...]:
    """Say what was not used of a file; return the keys that decide neither memory nor speed."""
    ignored = []
    for key, value in reading.values.items():
        if key in reading.seen:
            continue
        if key not in known:
            reading.note(key, f"{trainer} has no such key; it is left out.")
        elif irrelevant(key):
            ignored.append(key)
        elif value not in (None, False, 0, "", [], {}):
            reading.note(key, "not modelled; the answer is for a training without it.")
    return tuple(ignored)
