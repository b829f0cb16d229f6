"""What would make a training shorter: priced by the models on real rows, told, and never done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from traced_once import share_traces

from lora_advisor.advisor import planning
from lora_advisor.advisor.conclusion import conclude
from lora_advisor.advisor.datafit import shortened, summarise
from lora_advisor.advisor.report import plan_text
from lora_advisor.advisor.report_savings import savings_text
from lora_advisor.advisor.savings import LONG_PASS_S, LONG_TRAINING_S, is_long, with_savings
from lora_advisor.advisor.session import Session
from lora_advisor.cli import main
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.cards import cards
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.machine import GIB
from lora_advisor.probes.plan import DataSummary, Plan, read_plan, write_plan
from lora_advisor.probes.prices import Price, read_prices
from lora_advisor.probes.spec import Spec

SEQ = 96
HALF = 48


def price(card: str, usd: float) -> Price:
    return Price(card=card, usd_per_hour=usd, date="2026-11-01", source="a test")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and 40 rows of 31 to 76 tokens, half of them short."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_model(folder)
    rows = ({"question": f"{n}?", "answer": "word " * (n % 10 + 1)} for n in range(40))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _shared_traces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_traces(monkeypatch)
        yield


def spec_of(tiny: Path, **changes: Any) -> Spec:
    values: dict[str, Any] = {
        "model": str(tiny),
        "data": str(tiny / "rows.jsonl"),
        "vram_bytes": 8 * GIB,
        "seq_len": SEQ,
        "effective_batch": 8,
        "rank": 8,
        "device": "none",
        "gpu": "rtx-4060",
        **changes,
    }
    return Spec(**values)


def concluded(spec: Spec, **changes: Any) -> tuple[Session, Plan, list[str]]:
    """Return a session without a card, and its plan of one configuration that the models price."""
    said: list[str] = []
    session = planning._open(spec, resolve_architecture(spec.model), said.append, None, None)
    config = RunConfig(
        model=spec.model,
        trainer="transformers",
        method="lora",
        micro_batch=2,
        accumulation=spec.effective_batch // 2,
        seq_len=spec.seq_len,
        optimizer="adamw_torch_fused",
        precision="bf16",
        checkpointing="full",
        attention="sdpa",
        kernels="none",
        loss="full",
        lora=LoraShape(r=spec.rank, alpha=16, dropout=0.0, targets="all-linear"),
        compile="off",
        allocator="default",
    ).replace(**changes)
    data, _ = summarise(
        Path(str(spec.data)), session.architecture, spec.seq_len, long_rows=spec.long_rows
    )
    plan = conclude(session, session.predictor.candidate(config), None, [config], [], data)
    return session, plan, said


@pytest.fixture(scope="module")
def long(tiny: Path) -> Plan:
    """A plan of so many passes that it takes days, with two cards for rent."""
    session, plan, _ = concluded(spec_of(tiny, epochs=2e6))
    session.prices = (price("rtx-4090", 0.5), price("a100-80gb", 2.0), price("rtx-3060-12gb", 0.2))
    return with_savings(session, plan)


def whole(plan: Plan) -> float:
    assert plan.batching is not None and plan.batching.seconds is not None
    return plan.batching.seconds.value * plan.spec.epochs


def test_a_short_training_is_left_alone(tiny: Path) -> None:
    session, plan, said = concluded(spec_of(tiny, epochs=3))
    made = with_savings(session, plan)

    assert not is_long(made)
    assert (made.savings, made.rentals, made.proposed_batch, said) == ((), (), None, [])
    assert savings_text(made) is None


@pytest.mark.parametrize(("epochs", "of_a_pass"), [(1.0, LONG_PASS_S), (3.0, LONG_TRAINING_S / 3)])
def test_long_is_more_than_six_hours_a_pass_or_twelve_in_all(
    tiny: Path, epochs: float, of_a_pass: float
) -> None:
    _, plan, _ = concluded(spec_of(tiny, epochs=epochs))
    assert plan.batching is not None and plan.batching.seconds is not None
    factor = of_a_pass / plan.batching.seconds.value

    def scaled(by: float) -> Plan:
        batchings = tuple(
            dataclasses.replace(b, seconds=None if b.seconds is None else b.seconds.scaled(by))
            for b in plan.batchings
        )
        return dataclasses.replace(plan, batchings=batchings)

    assert is_long(scaled(1.001 * factor))
    assert not is_long(scaled(0.999 * factor))


def test_a_long_training_is_told_what_would_cut_it(long: Plan, tiny: Path) -> None:
    epochs, grouped, rank, seq = long.savings
    now = whole(long)

    passes = int(epochs.option.removeprefix("--epochs "))
    assert epochs.seconds.value == pytest.approx(now * passes / 2e6)
    assert epochs.seconds.value <= LONG_TRAINING_S < now * (passes + 1) / 2e6
    assert (rank.option, seq.option) == ("--rank 4", f"--seq {HALF}")
    assert 0.5 * now < rank.seconds.value <= now
    assert 0.4 * now < seq.seconds.value < now
    priced = {batching.name: batching.seconds for batching in long.batchings}
    assert grouped.option == "--group-by-length" and priced["grouped"] is not None
    assert grouped.seconds.value == pytest.approx(2e6 * priced["grouped"].value)
    assert grouped.seconds.value < now
    for saving in long.savings:
        assert 0 < saving.seconds.low < saving.seconds.value < saving.seconds.high


def test_a_shorter_sequence_names_what_it_costs(long: Plan, tiny: Path) -> None:
    (seq,) = (saving for saving in long.savings if saving.option.startswith("--seq"))
    cut, _ = summarise(tiny / "rows.jsonl", long.architecture, HALF)

    assert long.data is not None and long.data.truncated == 0
    longer = sum(rows for length, rows in long.data.length_counts if length > HALF)
    lost = sum((length - HALF) * n for length, n in long.data.length_counts if length > HALF)
    assert 0 < longer < 40
    assert (seq.truncated, seq.left_out, seq.lost_tokens) == (longer, 0, lost)
    assert (cut.truncated, long.data.tokens - cut.tokens) == (longer, lost)


def test_a_lower_rank_is_priced_by_its_own_trace(tiny: Path) -> None:
    spec = spec_of(tiny, epochs=2e6)
    session, plan, _ = concluded(spec)
    session.prices = ()
    (rank,) = (s for s in with_savings(session, plan).savings if s.option == "--rank 4")
    _, lower, _ = concluded(spec_of(tiny, epochs=2e6, rank=4))

    assert rank.seconds.value == pytest.approx(whole(lower), rel=1e-6)


def test_a_rank_of_four_is_not_halved(tiny: Path) -> None:
    session, plan, _ = concluded(spec_of(tiny, epochs=2e6, rank=4))
    session.prices = ()
    assert not [s for s in with_savings(session, plan).savings if "rank" in s.option]


def test_rows_are_split_or_dropped_in_what_is_told_as_the_user_wants(tiny: Path) -> None:
    told = {}
    for long_rows in ("split", "drop"):
        session, plan, _ = concluded(spec_of(tiny, epochs=2e6, long_rows=long_rows, rank=4))
        session.prices = ()
        made = with_savings(session, plan)
        told[long_rows] = next(s for s in made.savings if s.option == f"--seq {HALF}")
    split, drop = told["split"], told["drop"]

    assert split.split == drop.left_out > 0
    assert split.truncated == drop.truncated == drop.split == 0
    assert split.lost_tokens < drop.lost_tokens
    assert split.seconds.value > drop.seconds.value


def test_a_plan_survives_data_that_has_gone(tiny: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    gone.write_text((tiny / "rows.jsonl").read_text("utf-8"), "utf-8")
    session, plan, said = concluded(spec_of(tiny, epochs=2e6, data=str(gone), rank=4))
    session.prices = ()
    gone.unlink()
    made = with_savings(session, plan)

    assert [s.option.split()[0] for s in made.savings] == ["--epochs", "--group-by-length"]
    assert any("shorter sequences are not priced" in line for line in said)


def test_cards_for_rent_are_predicted_and_priced(long: Plan) -> None:
    # An RTX 3060 is larger, but slower by its figures.
    assert {rental.card for rental in long.rentals} == {"rtx-4090", "a100-80gb"}
    assert [r.usd.value for r in long.rentals] == sorted(r.usd.value for r in long.rentals)
    for rental in long.rentals:
        assert rental.seconds.value < whole(long)
        assert 0 < rental.seconds.low < rental.seconds.value < rental.seconds.high
        for end in ("low", "value", "high"):
            hours = getattr(rental.seconds, end) / 3600
            assert getattr(rental.usd, end) == pytest.approx(hours * rental.usd_per_hour)
        # The user's wish stays: effective batch, method, adapter, length.
        config, planned = rental.config, long.chosen.config
        assert config.micro_batch * config.accumulation == 8
        assert (config.method, config.lora, config.seq_len) == ("lora", planned.lora, SEQ)


def test_a_card_takes_as_much_at_once_as_it_holds(long: Plan) -> None:
    assert long.chosen.config.micro_batch == 2
    assert {rental.config.micro_batch for rental in long.rentals} == {8}
    assert {rental.config.checkpointing for rental in long.rentals} == {"off"}


def test_what_the_user_fixed_stays_fixed_on_a_rented_card(tiny: Path) -> None:
    fixed = {"micro_batch": 2, "checkpointing": "full", "precision": "bf16"}
    session, plan, _ = concluded(spec_of(tiny, fixed=fixed))
    session.prices = (price("a100-80gb", 2.0),)
    (rental,) = with_savings(session, plan).rentals
    assert {knob: getattr(rental.config, knob) for knob in fixed} == fixed


def test_prices_that_were_brought_are_used_however_short_the_training_is(tiny: Path) -> None:
    session, plan, _ = concluded(spec_of(tiny))
    session.prices = (price("a100-80gb", 2.0),)
    made = with_savings(session, plan)
    assert made.savings == ()
    assert [rental.card for rental in made.rentals] == ["a100-80gb"]


def test_the_text_says_what_it_costs_and_how_that_is_known(long: Plan) -> None:
    text = plan_text(long)
    told = savings_text(long)

    assert told is not None and told in text
    assert "all epochs take more than 12.0 h; what would make it shorter:" in told
    assert "predicted from a trace of the step there, not measured" in told
    assert "rtx-4090 as of 2026-11-01: a test" in told and "rows of like length share" in told
    assert "--prices FILE" in told and "% of the tokens lost" in told
    (line,) = (line for line in text.splitlines() if line.startswith("your data:"))
    assert "one epoch" in line and "2e+06 epochs" in line and " to " in line


def test_a_plan_with_savings_survives_its_file(long: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", long)
    assert read_plan(tmp_path / "plan.json") == long

    kept = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert kept["rentals"][0]["usd_per_hour"] in (0.5, 2.0)
    for name in ("savings", "rentals", "proposed_batch"):
        del kept[name]
    (tmp_path / "plan.json").write_text(json.dumps(kept), "utf-8")
    older = read_plan(tmp_path / "plan.json")
    assert (older.savings, older.rentals, older.proposed_batch) == ((), (), None)


@pytest.mark.parametrize(
    ("epochs", "batch", "proposed"),
    [(1.0, 24, 4), (10.0, 24, 4), (20.0, 24, 8), (30.0, 24, 12), (40.0, 24, 12), (60.0, 24, None),
     (1.0, 4, None)],
)  # fmt: skip
def test_a_batch_is_proposed_where_few_steps_are_left_and_never_taken(
    tiny: Path, epochs: float, batch: int, proposed: int | None
) -> None:
    spec = spec_of(tiny, epochs=epochs, effective_batch=batch, batch_named=False)
    session, plan, _ = concluded(spec)
    made = with_savings(session, plan)

    assert made.proposed_batch == proposed
    assert made.chosen == plan.chosen and made.spec == spec
    text = plan_text(made)
    assert (f"--batch {proposed} would make" in text) == (proposed is not None)
    named = dataclasses.replace(plan, spec=dataclasses.replace(spec, batch_named=True))
    assert with_savings(session, named).proposed_batch is None


def test_the_bundled_prices_are_of_known_cards_each_dated_with_its_source() -> None:
    bundled = read_prices()
    known = cards()
    assert {p.card for p in bundled} <= set(known) and len(bundled) >= 10
    for one in bundled:
        assert 0.05 < one.usd_per_hour < 10
        assert one.date.startswith("2026-") and one.source
    # A larger card of the same kind does not cost less.
    usd = {p.card: p.usd_per_hour for p in bundled}
    assert usd["a100-40gb"] < usd["a100-80gb"] < usd["h100-80gb"] < usd["h200"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it is no JSON"),
        ("[]", "no object `cards`"),
        ('{"cards": {}}', "no object `cards`"),
        ('{"cards": {"rtx-9999": {}}}', "`rtx-9999` is no card of"),
        ('{"cards": {"t4": 3}}', "`t4` has 3"),
        ('{"cards": {"t4": {"usd_per_hour": "1"}}}', "`usd_per_hour` of `t4` is '1'"),
        ('{"cards": {"t4": {"usd_per_hour": true}}}', "`usd_per_hour` of `t4` is True"),
        ('{"cards": {"t4": {"usd_per_hour": 0}}}', "`usd_per_hour` of `t4` is 0"),
        ('{"cards": {"t4": {"usd_per_hour": NaN}}}', "`usd_per_hour` of `t4` is nan"),
        ('{"cards": {"t4": {"usd_per_hour": 1, "date": "today"}}}', "`date` of `t4` is 'today'"),
        ('{"cards": {"t4": {"usd_per_hour": 1, "date": "2026-11-01"}}}', "`source` of `t4`"),
    ],
)
def test_a_bad_list_of_prices_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    file = tmp_path / "prices.json"
    file.write_text(text, "utf-8")
    code = main(["plan", "--data", "rows.jsonl", "--prices", str(file)])

    error = capsys.readouterr().err
    assert code == 64 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prices", "nowhere.json", "--data", "rows.jsonl"], 66, "is not there"),
        (["--prices", "nowhere.json"], 64, "`--prices` needs `--data`"),
        (["--epochs", "0"], 64, "`--epochs` must be above 0, but got 0"),
        (["--epochs", "-1"], 64, "`--epochs` must be above 0, but got -1"),
        (["--epochs", "inf"], 64, "`--epochs` must be a finite number"),
        (["--epochs", "nan"], 64, "`--epochs` must be above 0, but got nan"),
        (["--epochs", "many"], 64, "'many' is not a valid float"),
    ],
)
def test_bad_wishes_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["plan", "--gpu", "rtx-4060", *arguments]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_shortened_data_is_what_shorter_sequences_would_train_on(tiny: Path) -> None:
    architecture = resolve_architecture(str(tiny))
    cut = shortened(tiny / "rows.jsonl", architecture, [8, 36, 66], long_rows="truncate")
    assert set(cut) == {36, 66}  # no answer begins within 8 tokens
    for length, found in cut.items():
        expected: DataSummary = summarise(tiny / "rows.jsonl", architecture, length)[0]
        assert found == expected
