"""Long rows in plans and trainings: treated as asked, counted, on one side of the hold-out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from tiny_training import config_of, run

from lora_advisor.advisor.cuts_text import cuts_text
from lora_advisor.advisor.datafit import summarise
from lora_advisor.advisor.known_rows import Place
from lora_advisor.advisor.likelihood import RowLosses, compare_rows, of_whole_rows
from lora_advisor.advisor.preparing import Data, prepare
from lora_advisor.advisor.report_data import lengths_text
from lora_advisor.advisor.report_training import training_text
from lora_advisor.advisor.run_folder import FLAGGED
from lora_advisor.advisor.schedule import Settings
from lora_advisor.advisor.training import TrainingResult
from lora_advisor.cli import main
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cutting import LONG_ROWS, TokenisedData
from lora_advisor.probes.errors import DataError, UsageError
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.plan import Candidate, DataSummary, Plan, read_plan, write_plan
from lora_advisor.probes.prediction import MemoryPrediction, Prediction
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.tokens import split_holdout

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SEQ = 64
SETTINGS: dict[str, Any] = {
    "epochs": 1.0, "max_steps": None, "learning_rate": 1e-3, "holdout": 0.25, "seed": 0,
    "save_steps": 50, "eval_batch": None,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and rows of which a third are longer than a sequence, one in vain."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_model(folder)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for n in range(24):
            answer = f"{n} " * (60 if n % 3 == 0 else 3)
            question = "why " * (30 if n == 5 else 1)
            file.write(json.dumps({"question": question, "answer": answer}) + "\n\n")
    return folder


def ready(tiny: Path, long_rows: str, **changes: Any) -> Data:
    settings = Settings(**{**SETTINGS, "long_rows": long_rows, **changes})
    config = config_of(tiny, seq_len=SEQ)
    return prepare(config, resolve_architecture(str(tiny)), tiny / "rows.jsonl", settings)


def row_of(tiny: Path, tokens: list[int]) -> int:
    """Return the row of the file whose tokens these are part of: each repeats its number."""
    from transformers import AutoTokenizer

    words = str(AutoTokenizer.from_pretrained(tiny).decode(tokens)).split()
    numbers = Counter(word for word in words if word.isdigit())  # one may be cut at an end
    return int(numbers.most_common(1)[0][0])


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_both_trained_on_and_held_out(tiny: Path, seed: int) -> None:
    data = ready(tiny, "split", seed=seed)
    assert isinstance(data.tokens, TokenisedData) and data.tokens.split == 9
    trained = {place.line for place in data.places}
    lines = [line for line in range(1, 48, 2)]
    held = {lines[source] for source in data.held_sources}

    assert not trained & held and trained | held == set(lines)
    assert len(held) == 6  # a quarter of the rows, however many pieces they make
    assert len(data.train) + len(data.held) == len(data.tokens.rows) > 24
    # The tokens themselves say so too.
    asked = {row_of(tiny, row["input_ids"]) for row in data.train}
    assert not asked & {row_of(tiny, row["input_ids"]) for row in data.held}


def test_a_piece_names_the_line_of_its_row(tiny: Path) -> None:
    data = ready(tiny, "split", holdout=0.0)
    lines = Counter(place.line for place in data.places)
    for place, row in zip(data.places, data.train, strict=True):
        assert Path(place.file).name == "rows.jsonl"
        assert place.line == 1 + 2 * row_of(tiny, row["input_ids"])
        assert (place.piece is None) == (lines[place.line] == 1)
    first = [place.piece for place in data.places if place.line == 1]
    assert first == list(range(1, len(first) + 1)) and len(first) > 1
    assert Place(file="a", line=3).to_json() == {"file": "a", "line": 3}
    assert Place(file="a", line=3, piece=2).to_json() == {"file": "a", "line": 3, "piece": 2}


def test_rows_that_are_left_out_shift_no_place(tiny: Path) -> None:
    data = ready(tiny, "drop", holdout=0.0)
    assert isinstance(data.tokens, TokenisedData)
    assert (data.tokens.long_dropped, data.tokens.split, data.held_sources) == (9, 0, ())
    lines = [place.line for place in data.places]
    assert lines == [1 + 2 * n for n in range(24) if n % 3 and n != 5]
    truncated = ready(tiny, "truncate", holdout=0.0)
    # Nothing of row 5's answer is left, behind its long question.
    assert [place.line for place in truncated.places] == [1 + 2 * n for n in range(24) if n != 5]


def test_where_nothing_is_split_the_hold_out_is_what_it_was(tiny: Path) -> None:
    data = ready(tiny, "truncate")
    rows = list(data.tokens.rows)
    count = round(0.25 * len(rows))
    chosen = set(random.Random(0).sample(range(len(rows)), count))
    assert list(data.held) == [row for index, row in enumerate(rows) if index in chosen]
    assert data.held_sources == ()
    assert split_holdout(rows, 0.25, sources=range(len(rows))) == split_holdout(rows, 0.25)
    with pytest.raises(DataError, match=r"more than 1 usable rows, .* but has 1"):
        split_holdout(rows[:3], 0.1, sources=[7, 7, 7])


def test_the_folder_of_an_older_training_is_still_its_own() -> None:
    assert "long_rows" not in Settings(**SETTINGS).identity()
    assert Settings(**SETTINGS, long_rows="split").identity()["long_rows"] == "split"


def test_pieces_of_a_row_are_no_witnesses_of_their_own() -> None:
    base = RowLosses(nats=(2.0, 4.0, 1.0, 3.0), tokens=(1, 3, 2, 5))
    whole = of_whole_rows(base, (4, 4, 9, 2))
    assert whole == RowLosses(nats=(3.5, 1.0, 3.0), tokens=(4, 2, 5))
    assert compare_rows(whole, whole).rows == 3


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A training on pieces."""
    folder = tmp_path_factory.mktemp("split")
    config = config_of(tiny, seq_len=SEQ)
    return run(
        config, tiny / "rows.jsonl", folder, max_steps=3, holdout=0.25, long_rows="split"
    )  # fmt: skip


def test_a_training_counts_the_pieces_and_compares_whole_rows(
    made: TrainingResult, tiny: Path
) -> None:
    data = ready(tiny, "split")
    assert isinstance(data.tokens, TokenisedData)
    assert (made.split, made.pieces) == (9, data.tokens.pieces)
    # Row 5's question alone is two pieces long.
    assert (made.truncated, made.long_dropped, made.pieces_dropped) == (0, 0, 2)
    assert made.rows + made.holdout_rows == len(data.tokens.rows)
    assert made.likelihood is not None and made.likelihood.rows == 6 < made.holdout_rows
    assert (
        f"9 rows longer than 64 tokens became {made.pieces}, counted one by one"
        in training_text(made)
    )


def test_the_result_and_the_card_keep_what_became_of_long_rows(made: TrainingResult) -> None:
    written = json.loads((made.adapter.parent / "result.json").read_text("utf-8"))
    assert TrainingResult.from_json(written) == made
    older = {k: v for k, v in written.items() if k not in ("long_dropped", "split", "pieces")}
    assert TrainingResult.from_json(older).split == 0

    card = (made.adapter / "README.md").read_text("utf-8")
    assert "--long-rows split" in card
    assert f"9 rows longer than 64 tokens became {made.pieces}" in card


def test_what_is_known_by_heart_is_listed_with_line_and_piece(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_advisor.advisor import known_rows

    monkeypatch.setattr(known_rows, "THRESHOLD", 1e9)  # everything counts as known
    run(
        config_of(tiny, seq_len=SEQ), tiny / "rows.jsonl", tmp_path, max_steps=1,
        long_rows="split", holdout=0.0, check_rows=100,
    )  # fmt: skip
    listed = [json.loads(line) for line in (tmp_path / FLAGGED).read_text("utf-8").splitlines()]
    pieces = [at["piece"] for at in listed if at["line"] == 1]
    assert pieces == list(range(1, len(pieces) + 1)) and len(pieces) > 1
    assert all("piece" not in at for at in listed if at["line"] == 3)


@pytest.mark.parametrize("long_rows", LONG_ROWS)
def test_the_data_of_a_plan_is_counted_as_the_training_takes_it(tiny: Path, long_rows: str) -> None:
    architecture = resolve_architecture(str(tiny))
    found, seq = summarise(tiny / "rows.jsonl", architecture, SEQ, long_rows=long_rows)
    tokens = ready(tiny, long_rows, holdout=0.0).tokens
    assert isinstance(tokens, TokenisedData)

    assert (found.rows, seq) == (len(tokens.rows), SEQ)
    for name in ("truncated", "dropped", "long_dropped", "split", "pieces", "pieces_dropped"):
        assert getattr(found, name) == getattr(tokens, name)
    assert sum(rows for _, rows in found.length_counts) == found.rows
    words = {
        "truncate": ("8 rows are cut to 64 tokens; 1 row is left out: nothing of an answer",
                     "% of the rows are cut"),
        "split": (f"9 rows longer than 64 tokens became {tokens.pieces}, counted one by one",
                  "38 % of the rows are split"),
        "drop": ("9 rows are longer than 64 tokens and left out",
                 "38 % of the rows are left out, too long"),
    }[long_rows]  # fmt: skip
    assert words[0] in cuts_text(found, SEQ) and words[1] in lengths_text(found)


def test_pairs_are_said_to_be_pairs() -> None:
    pairs = DataSummary(path="a", rows=3, tokens=9, truncated=1, dropped=2, sequences=2)
    assert cuts_text(pairs, 512, "dpo") == (
        "1 pair is cut to 512 tokens; 2 pairs are left out: nothing is left that tells the answers "
        "apart"
    )


def plan_of(tiny: Path, **changes: Any) -> Plan:
    memory = MemoryPrediction(
        allocated_bytes=GIB, reserved_bytes=GIB, process_bytes=GIB, process_upper_bytes=GIB,
        needed_bytes=GIB, instant="loss", components={}, phases={}, evidence="traced",
    )  # fmt: skip
    prediction = Prediction(
        memory=memory, verdict="fits", step_s=None, tokens_per_s=None, evidence="traced"
    )
    config = config_of(tiny, seq_len=SEQ)
    return Plan(
        spec=Spec(model=str(tiny), vram_bytes=8 * GIB, data=str(tiny / "rows.jsonl"), **changes),
        machine=cpu_machine(), stack=detect_stack(), architecture=resolve_architecture(str(tiny)),
        chosen=Candidate(config=config, prediction=prediction), baseline=None, runners_up=(),
        rejected=(), excluded=(), cap_bytes=None, context_bytes=None, probes=0, reused=0,
        probing_s=0.0, wall_s=1.0, trials=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "counts"), [([], (9, 0)), (["--long-rows", "drop"], (0, 9))], ids=["plan's", "given"]
)
def test_a_training_does_what_its_plan_says_unless_told_otherwise(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    given: list[str], counts: tuple[int, int],
) -> None:  # fmt: skip
    write_plan(tmp_path / "plan.json", plan_of(tiny, long_rows="split"))
    command = ["train", str(tmp_path / "plan.json"), "--output", str(tmp_path / "run"), *given]
    command += ["--max-steps", "1", "--check-rows", "0", "--json"]
    assert main(command) == 0

    result = json.loads(capsys.readouterr().out)
    assert (result["split"], result["long_dropped"]) == counts


def test_an_older_plan_truncates(tiny: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan_of(tiny, long_rows="split"))
    assert read_plan(tmp_path / "plan.json").spec.long_rows == "split"
    kept = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    del kept["spec"]["long_rows"], kept["spec"]["batch_named"]
    (tmp_path / "plan.json").write_text(json.dumps(kept), "utf-8")
    older = read_plan(tmp_path / "plan.json").spec
    assert (older.long_rows, older.batch_named) == ("truncate", True)


def test_data_of_an_older_plan_is_read() -> None:
    old = {"path": "a", "rows": 3, "tokens": 9, "truncated": 1, "dropped": 0}
    assert DataSummary.from_json(old).split == 0


@pytest.mark.parametrize("long_rows", ["split", "drop"])
def test_pairs_are_only_ever_truncated(tiny: Path, long_rows: str) -> None:
    with pytest.raises(UsageError, match="`--long-rows` must be truncate with `--stage dpo`"):
        Spec(model="m", vram_bytes=GIB, fixed={"stage": "dpo"}, long_rows=long_rows)
    settings = Settings(**SETTINGS, long_rows=long_rows)
    config = config_of(tiny, stage="dpo", trainer="trl", loss="fused")
    with pytest.raises(UsageError, match="`--long-rows` must be truncate with `--stage dpo`"):
        prepare(config, resolve_architecture(str(tiny)), tiny / "rows.jsonl", settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--long-rows", "halve"], "'halve' is not one of 'truncate', 'split', 'drop'"),
        (["--stage", "dpo", "--long-rows", "split", "--data", "x.jsonl"], "must be truncate with"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["plan", "--gpu", "rtx-4060", *arguments]) == 64
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
