from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import real_model
import tiny_model

from lora_advisor.advisor.epochs import WorkByLength, data_report
from lora_advisor.advisor.lengths import (
    Epoch,
    epoch_of,
    length_counts,
    lengths_of,
    pack,
    priced_lengths,
)
from lora_advisor.probes.architectures import load_bundled
from lora_advisor.probes.arguments import padding_multiple
from lora_advisor.probes.batching import (
    BATCHINGS,
    Batching,
    batching_of,
    grouped_sampler,
    random_order,
    with_batching,
)
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.events import Work
from lora_advisor.probes.plan import DataSummary
from lora_advisor.probes.prediction import Interval
from lora_advisor.probes.tokens import TokenRow

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

#: GSM8K (MIT), where it lies beside the repository, of which it is no part.
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_model(folder)
    return folder


def config_of(model: str, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": model,
        "trainer": "trl",
        "method": "lora",
        "micro_batch": 4,
        "accumulation": 3,
        "seq_len": 96,
        "optimizer": "adamw_torch_fused",
        "precision": "fp32",
        "checkpointing": "off",
        "attention": "sdpa",
        "kernels": "none",
        "loss": "fused",
        "lora": LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear"),
        "compile": "off",
        "allocator": "default",
    }
    return RunConfig(**{**values, **changes})


def skewed(count: int, *, longest: int, seed: int = 0) -> list[int]:
    """Lengths as chats have them: most are short, some reach the end."""
    draw = random.Random(seed)
    return [min(longest, max(2, int(draw.lognormvariate(3.2, 0.7)))) for _ in range(count)]


def rows_of(lengths: Sequence[int]) -> list[TokenRow]:
    return [{"input_ids": [5] * n, "labels": [-100, *[5] * (n - 1)]} for n in lengths]


def loaded(config: RunConfig, rows: Sequence[TokenRow], folder: Path) -> list[tuple[int, int]]:
    """Return tokens and useful tokens of each micro-batch that the trainer's own loader yields."""
    from lora_advisor.probes.architectures import resolve_architecture
    from lora_advisor.probes.finetune import Schedule, build_trainer
    from lora_advisor.probes.tokens import load_tokenizer
    from lora_advisor.probes.weights import load_model

    architecture = resolve_architecture(config.model)
    trainer = build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=rows,
        tokenizer=load_tokenizer(architecture),
        schedule=Schedule(seed=3, shuffle=True, output_dir=str(folder)),
        device="cpu",
    )
    found = []
    for batch in trainer.get_train_dataloader():
        tokens, mask = batch["input_ids"].numel(), batch.get("attention_mask")
        found.append((tokens, tokens if mask is None else int(mask.sum())))
    return found


def check_against_loader(config: RunConfig, rows: Sequence[TokenRow], folder: Path) -> Epoch:
    found = loaded(config, rows, folder)
    epoch = epoch_of(
        [len(row["input_ids"]) for row in rows],
        batching_of(config),
        seq_len=config.seq_len,
        micro_batch=config.micro_batch,
        accumulation=config.accumulation,
        seed=3,
        multiple=padding_multiple(config) or 1,
    )
    assert epoch.histogram == tuple(sorted(Counter(tokens for tokens, _ in found).items()))
    assert epoch.micro_batches == len(found)
    assert epoch.computed_tokens == sum(tokens for tokens, _ in found)
    assert epoch.useful_tokens == sum(useful for _, useful in found)
    return epoch


@pytest.mark.parametrize(
    ("trainer", "batching"),
    [
        ("trl", "random"),
        ("trl", "grouped"),
        ("trl", "packed"),
        ("transformers", "random"),
        ("transformers", "grouped"),
        ("loop", "grouped"),
    ],
)
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 3), (1, 8), (6, 1)])
def test_the_tokens_are_those_that_the_trainers_loader_yields(
    tmp_path: Path, tiny: Path, trainer: str, batching: str, micro_batch: int, accumulation: int
) -> None:
    config = config_of(
        str(tiny),
        trainer=trainer,
        loss="fused" if trainer == "trl" else "full",
        micro_batch=micro_batch,
        accumulation=accumulation,
    )
    rows = rows_of(skewed(157, longest=96))
    epoch = check_against_loader(with_batching(config, batching), rows, tmp_path)

    assert epoch.useful_tokens == sum(len(row["input_ids"]) for row in rows)
    if batching == "random" and micro_batch > 1:
        assert epoch.padding_share > 0.3
    if batching == "packed":
        assert epoch.padding_share == 0
    elif micro_batch == 1:  # 96 tokens have 48 parts
        assert epoch.computed_tokens == sum(
            n + n % 2 for n in map(len, (r["input_ids"] for r in rows))
        )


def test_grouping_and_packing_save_what_padding_costs_on_gsm8k(tmp_path: Path, tiny: Path) -> None:
    from lora_advisor.probes.architectures import resolve_architecture
    from lora_advisor.probes.dataset import read_examples
    from lora_advisor.probes.tokens import load_tokenizer, tokenize

    if not GSM8K.exists():
        pytest.skip("needs gsm8k_train.jsonl beside the repository")
    some = tmp_path / "some.jsonl"
    some.write_text("".join(GSM8K.read_text("utf-8").splitlines(keepends=True)[:1500]), "utf-8")
    tokenizer = load_tokenizer(resolve_architecture(str(real_model.smollm2_folder())))
    rows = tokenize(read_examples(some), tokenizer, 512).rows
    config = config_of(str(tiny), seq_len=512, micro_batch=8, accumulation=2)
    random_, grouped, packed = (
        check_against_loader(with_batching(config, name), rows, tmp_path) for name in BATCHINGS
    )

    assert random_.useful_tokens / (len(rows) * 512) == pytest.approx(0.418, abs=0.001)
    assert random_.padding_share == pytest.approx(0.345, abs=0.02)
    assert grouped.padding_share == pytest.approx(0.038, abs=0.01)
    assert packed.padding_share == 0
    assert packed.computed_tokens / (packed.micro_batches * 8 * 512) > 0.95
    assert (random_.optimizer_steps, grouped.optimizer_steps, packed.optimizer_steps) == (
        94,
        94,
        41,
    )


def test_the_longest_row_comes_first_in_a_grouped_order() -> None:
    lengths = skewed(500, longest=400)
    order = list(grouped_sampler(lengths, 8, seed=0))

    assert sorted(order) == list(range(500))
    assert lengths[order[0]] == max(lengths)


def test_every_epoch_has_an_order_of_its_own_that_comes_again() -> None:
    lengths = skewed(100, longest=400)
    sampler: Any = grouped_sampler(lengths, 8, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)

    assert first != second
    assert list(grouped_sampler(lengths, 8, seed=0)) == first
    assert list(grouped_sampler(lengths, 8, seed=1)) == second
    assert random_order(100, seed=0) != random_order(100, seed=0, epoch=1)


@pytest.mark.parametrize("count", [1, 7, 2500])
def test_rows_are_packed_as_trl_packs_them(count: int) -> None:
    from datasets import Dataset
    from trl import pack_dataset

    lengths = skewed(count, longest=128)
    dataset = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    theirs = pack_dataset(dataset, 128, strategy="bfd")["seq_lengths"]

    assert pack(lengths, 128) == list(theirs)


def test_rows_longer_than_the_sequence_are_cut() -> None:
    epoch = epoch_of([5, 300, 7], "random", seq_len=64, micro_batch=3)

    assert (epoch.useful_tokens, epoch.computed_tokens) == (5 + 64 + 7, 3 * 64)


def test_a_pass_is_priced_with_few_questions() -> None:
    asked: list[tuple[int, int]] = []

    def linear(micro_batch: int, length: int) -> float:
        asked.append((micro_batch, length))
        return 0.01 + 0.001 * micro_batch * length

    epoch = epoch_of(skewed(2000, longest=2048), "random", seq_len=2048, micro_batch=4)
    expected = 0.01 * epoch.micro_batches + 0.001 * epoch.computed_tokens

    assert epoch.epoch_s(linear) == pytest.approx(expected, rel=1e-9)
    assert len(asked) <= 12
    assert {micro_batch for micro_batch, _ in asked} == {4}


@pytest.mark.parametrize("micro_batch", [1, 4, 16])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_between_the_priced_lengths_little_is_lost(micro_batch: int, batching: str) -> None:
    def seconds(rows: int, length: float) -> float:  # a host's floor, and attention's square
        return max(0.05, 1e-5 * rows * length * (1 + length / 4000))

    epoch = epoch_of(
        skewed(3000, longest=2048), batching, seq_len=2048, micro_batch=micro_batch, accumulation=2
    )
    exact = sum(
        count * seconds(micro_batch, length)
        for length, (_, count) in zip(epoch.lengths, epoch.histogram, strict=True)
    )

    assert epoch.epoch_s(seconds) == pytest.approx(exact, rel=0.01)


def test_priced_lengths_enclose_what_they_price() -> None:
    assert priced_lengths([64.0]) == (64,)
    assert priced_lengths([90.5, 128.0]) == (90, 107, 128)
    wide = priced_lengths([3.0, 2048.0])
    assert (wide[0], wide[-1], len(wide)) == (128, 2048, 12)


def summary_of(lengths: Sequence[int]) -> DataSummary:
    return DataSummary(
        path="rows.jsonl",
        rows=len(lengths),
        tokens=sum(lengths),
        truncated=0,
        dropped=0,
        length_counts=length_counts(lengths),
    )


def test_lengths_are_kept_as_counts_and_come_back_in_random_order() -> None:
    lengths = skewed(200, longest=96)
    back = lengths_of(length_counts(lengths))

    assert sorted(back) == sorted(lengths)
    assert back != sorted(back)


def test_a_report_prices_each_batching_with_its_own_configuration() -> None:
    asked: list[RunConfig] = []

    def micro_seconds(config: RunConfig) -> Interval:
        asked.append(config)
        value = 1e-4 * config.tokens
        return Interval(value=value, low=0.8 * value, high=1.25 * value)

    lengths = skewed(400, longest=96)
    config = config_of("tiny", group_by_length=True)
    report = data_report(summary_of(lengths), config, micro_seconds)

    assert [batching.name for batching in report] == list(BATCHINGS)
    for batching in report:
        assert batching.useful_tokens == sum(lengths)
        assert batching.seconds is not None and batching.tokens_per_s is not None
        assert batching.seconds.value == pytest.approx(1e-4 * batching.computed_tokens, rel=0.01)
        assert batching.seconds.low == pytest.approx(0.8 * batching.seconds.value)
        assert batching.tokens_per_s.value == pytest.approx(
            (1 - batching.padding_share) / 1e-4, rel=0.01
        )
        assert batching.tokens_per_s.low == pytest.approx(0.8 * batching.tokens_per_s.value)
    random_, grouped, packed = report
    assert random_.padding_share > 0.3 > 0.1 > grouped.padding_share > packed.padding_share == 0
    assert packed.optimizer_steps < grouped.optimizer_steps == random_.optimizer_steps == 34
    # The order of rows is not the price's concern: two batchings share their prices.
    assert not any(config.group_by_length for config in asked)
    assert len(asked) == len(set(asked)) <= 24


def asked_of(config: RunConfig, lengths: Sequence[int]) -> tuple[set[RunConfig], list[Batching]]:
    """Return what a report had priced, and the report, where a micro-batch takes a second."""
    asked: set[RunConfig] = set()

    def micro_seconds(config: RunConfig) -> Interval:
        asked.add(config)
        return Interval(value=1.0, low=1.0, high=1.0)

    return asked, list(data_report(summary_of(lengths), config, micro_seconds))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_the_loader_pads_rows_of_compiled_layers_likewise(
    tmp_path: Path, tiny: Path, trainer: str
) -> None:
    loss = "fused" if trainer == "trl" else "full"
    config = config_of(str(tiny), trainer=trainer, loss=loss, compile="layers", micro_batch=6)
    rows = rows_of(skewed(50, longest=80))
    random_, grouped = (
        check_against_loader(with_batching(config, name), rows, tmp_path)
        for name in ("random", "grouped")
    )
    assert random_.computed_tokens == 50 * 96
    assert grouped.computed_tokens < random_.computed_tokens
    assert {tokens % (6 * 24) for tokens, count in grouped.histogram if count > 1} == {0}


@pytest.mark.parametrize(
    ("changes", "multiple"),
    [
        ({"seq_len": 1024}, 16),
        ({"seq_len": 448}, 8),
        ({"seq_len": 2048, "group_by_length": True}, 32),
        ({"seq_len": 1000}, 20),
        ({"seq_len": 1021}, None),  # a prime
        ({"seq_len": 1024, "packing": True}, None),
        ({"seq_len": 1024, "compile": "layers"}, 1024),
        ({"seq_len": 1021, "compile": "layers"}, 1021),
        ({"seq_len": 1024, "compile": "model", "group_by_length": True}, 1024),
        ({"seq_len": 1024, "compile": "layers", "group_by_length": True}, 256),
        ({"seq_len": 1023, "compile": "layers", "group_by_length": True}, 341),
        ({"seq_len": 1024, "compile": "layers", "packing": True}, None),
    ],
)
def test_batches_have_few_lengths_none_longer_than_a_sequence(
    changes: dict[str, Any], multiple: int | None
) -> None:
    assert padding_multiple(config_of("tiny", **changes)) == multiple


def test_rows_of_compiled_layers_are_padded_to_the_full_length_or_to_four() -> None:
    config = config_of("tiny", trainer="transformers", loss="full", compile="layers")
    asked, (random_, grouped) = asked_of(config, range(2, 81))
    assert {c.compile for c in asked} == {"layers"}
    assert {c.seq_len for c in asked} >= {24, 96}
    assert random_.computed_tokens == 79 * config.seq_len
    assert grouped.computed_tokens < 0.75 * random_.computed_tokens
    assert grouped.computed_tokens % 24 == 0
    for batching in (random_, grouped):
        assert batching.useful_tokens == sum(range(2, 81))
        assert batching.seconds is not None
        assert batching.seconds.value == batching.micro_batches


def test_layers_compiled_for_too_many_packed_lengths_are_priced_as_they_run() -> None:
    config = config_of("tiny", compile="layers")
    asked, _ = asked_of(config, [48, 48] * 8)
    assert {c.compile for c in asked if c.packing} == {"layers"}
    asked, _ = asked_of(config, [*range(2, 96), *range(50, 96)])
    assert {c.compile for c in asked if c.packing} == {"off"}
    assert {c.compile for c in asked if not c.packing} == {"layers"}


def test_a_report_says_what_it_can_without_prices() -> None:
    summary = summary_of(skewed(100, longest=96))
    plain = config_of("tiny", trainer="transformers", loss="full")

    assert data_report(DataSummary(path="a", rows=1, tokens=2, truncated=0, dropped=0), plain) == ()
    for report in (data_report(summary, plain), data_report(summary, plain, lambda config: None)):
        assert [batching.name for batching in report] == ["random", "grouped"]  # only TRL packs
        assert {batching.seconds for batching in report} == {None}
        assert report[0].padding_share > report[1].padding_share > 0


def test_work_at_any_length_follows_from_three_traces() -> None:
    asked: list[int] = []

    def work_of(config: RunConfig) -> Work:
        asked.append(config.seq_len)
        s = config.seq_len
        return Work(launches=100.0, matmul_flops=3.0 * s, attention_flops=2.0 * s * s + s)

    works = WorkByLength(work_of, 512)
    for length in (40, 200, 511):
        exact = work_of(config_of("tiny", seq_len=length))
        found = works(config_of("tiny", seq_len=length))
        assert found.amounts() == pytest.approx(exact.amounts(), rel=1e-9)
    assert sorted(set(asked) - {40, 200, 511}) == [128, 256, 512]
    assert len(asked) == 6

    short = WorkByLength(work_of, 2)
    assert short(config_of("tiny", seq_len=2)).launches == pytest.approx(100.0)


def test_work_that_follows_is_that_of_a_trace() -> None:
    from lora_advisor.advisor.traces import TraceStore

    store = TraceStore(load_bundled("smollm2-135m"), "8.9")
    config = config_of("smollm2-135m", precision="bf16", seq_len=512)

    def work_of(config: RunConfig) -> Work:
        return store.work(config).step(config.accumulation)

    found = WorkByLength(work_of, 512)(config.replace(seq_len=300))
    exact = work_of(config.replace(seq_len=300))
    assert found.amounts() == pytest.approx(exact.amounts(), rel=0.01)


def test_grouping_changes_no_trace() -> None:
    from lora_advisor.advisor.traces import _replayed_as, _traced_as

    config = config_of("tiny")
    grouped = config.replace(group_by_length=True)
    assert _traced_as(grouped) == _traced_as(config)
    assert _replayed_as(grouped) == _replayed_as(config)


def test_a_batching_goes_round_as_json() -> None:
    (batching, *_) = data_report(
        summary_of([9, 5, 7]),
        config_of("tiny"),
        lambda config: Interval(value=2.0, low=1.0, high=3.0),
    )
    from lora_advisor.probes.plan import plain_json

    assert Batching.from_json(plain_json(batching)) == batching
