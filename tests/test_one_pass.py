"""The loss in one pass: TRL's loss, metrics and training, without its third product and waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from exported import recipe
from tiny_model import save_model
from tiny_training import config_of, run
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import ChunkedLogProbFunction, chunked_logprob

from lora_advisor.advisor.configuring import _notes
from lora_advisor.advisor.export_axolotl import AXOLOTL
from lora_advisor.advisor.export_trl import TRL
from lora_advisor.advisor.export_unsloth import UNSLOTH
from lora_advisor.advisor.export_words import settle
from lora_advisor.advisor.space import build_space
from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes import one_pass_head
from lora_advisor.probes.architectures import attention_of, resolve_architecture
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
from lora_advisor.probes.interpolate import Family
from lora_advisor.probes.machine import GIB, cpu_machine, detect_stack
from lora_advisor.probes.one_pass_head import OnePassLogProb, take_one_pass
from lora_advisor.probes.one_pass_trainer import ON_HOST, SCORED, CountingCollator, Later
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.trace import trace_step
from lora_advisor.probes.weights import load_model

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ASKED = ("log_probs", "entropy", "is_top1")
ROWS, WIDTH, VOCABULARY, COLUMNS = 300, 32, 1000, 256


class Head:
    """States, a head and targets; the first fifty rows are sure of theirs."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(ROWS, WIDTH, dtype=dtype)
        self.weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype)
        self.bias = torch.randn(VOCABULARY, dtype=dtype) if bias else None
        self.targets = torch.randint(0, VOCABULARY, (ROWS,))
        self.targets[:50] = (self.hidden @ self.weight.t())[:50].argmax(-1)
        self.incoming = torch.randn(ROWS)

    def run(self, function: Any, *how: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return a function's log-probabilities, entropy and hits, and the states' gradient."""
        states = self.hidden.clone().requires_grad_()
        temperature, softcap, scale = how
        outputs = function.apply(
            states,
            self.weight,
            self.bias,
            self.targets,
            temperature,
            COLUMNS,
            softcap,
            scale,
            ASKED,
        )
        total: Any = (outputs[0] * self.incoming).sum()
        total.backward()
        assert states.grad is not None
        return [outputs[0].detach(), outputs[1], outputs[4]], states.grad

    def exact(self, temperature: float, softcap: float | None, scale: float) -> torch.Tensor:
        """Return the gradient in 64 bits, all logits at once."""
        states = self.hidden.double().requires_grad_()
        logits = states @ self.weight.double().t()
        logits = (logits if self.bias is None else logits + self.bias.double()) * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        known = (logits / temperature).log_softmax(-1).gather(-1, self.targets[:, None])[:, 0]
        total: Any = (known * self.incoming).sum()
        total.backward()
        assert states.grad is not None
        return states.grad


HOW = {"plain": (1.0, None, 1.0), "bent": (0.7, 20.0, 0.5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", HOW)
def test_head_returns_what_trls_does_and_as_good_a_gradient(
    how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 128)  # three tiles of rows
    head = Head(dtype, bias=how == "bent")
    theirs, their_gradient = head.run(ChunkedLogProbFunction, *HOW[how])
    ours, our_gradient = head.run(OnePassLogProb, *HOW[how])

    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[2], theirs[2])
    exact = head.exact(*HOW[how])
    for rows in (slice(0, 50), slice(50, None)):  # sure of their target, and not
        size = exact[rows].norm()
        error = (our_gradient[rows] - exact[rows]).norm() / size
        their_error = (their_gradient[rows] - exact[rows]).norm() / size
        assert error <= 1.15 * their_error + 1e-6


def test_a_trained_head_and_other_outputs_are_left_to_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked(*_: Any) -> Any:
        raise AssertionError("ran")

    monkeypatch.setattr(OnePassLogProb, "apply", unasked)
    head = Head(torch.float32, bias=False)
    states = head.hidden.requires_grad_()
    rest = (head.targets, 1.0, COLUMNS, None, 1.0)
    marked = torch.nn.Parameter(head.weight, requires_grad=False)
    marked.one_pass = True  # type: ignore[attr-defined]
    choose = one_pass_head._Choice.apply

    with pytest.raises(AssertionError, match="ran"):
        choose(states, marked, None, *rest, ASKED)
    choose(states, marked, None, *rest, (*ASKED, "mean_logits"))
    choose(states, head.weight, None, *rest, ASKED)  # not marked
    with torch.no_grad():
        choose(states, marked, None, *rest, ASKED)
    marked.requires_grad_()
    assert choose(states, marked, None, *rest, ASKED)[0].requires_grad


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_model(path)
    return path


def _config(loss: str, model: Path | str = "tiny", **changes: Any) -> RunConfig:
    words = {"trainer": "trl", "micro_batch": 3, "seq_len": 24, "loss": loss}
    words["lora"] = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    return config_of(Path(model), **{**words, **changes})


def _model(config: RunConfig) -> Any:
    return load_model(config, resolve_architecture(config.model), "cpu")


def _rows() -> list[dict[str, list[int]]]:
    """Return rows of several lengths, the first half of each without a loss, one without any."""
    torch.manual_seed(0)
    rows = []
    for length in (24, 9, 17, 24, 12, 5):
        ids = torch.randint(3, 250, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    rows[1]["labels"] = [-100] * 9
    return rows


def _trainer(config: RunConfig, folder: Path) -> Any:
    torch.manual_seed(1)
    model = _model(config)
    schedule = Schedule(max_steps=3, output_dir=str(folder), logging_steps=1, learning_rate=1e-2)
    return build_trainer(
        config, model, rows=_rows(), tokenizer=padding_tokenizer(259), schedule=schedule,
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_training_and_its_log_are_those_of_trl(packing: bool, folder: Path, tmp_path: Path) -> None:
    logs, trained = [], []
    for loss in ("fused", "one_pass"):
        trainer = _trainer(_config(loss, folder, packing=packing), tmp_path / loss)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        trained.append({n: p for n, p in trainer.model.named_parameters() if p.requires_grad})

    for theirs, ours in zip(*logs, strict=True):
        assert theirs.keys() == ours.keys() and len(ours) > 5
        assert ours["num_tokens"] == theirs["num_tokens"] > 0
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5, abs=1e-7), key
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-4)


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Counts what makes the host wait for a device: values read, and sizes that depend on them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.name())
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("embedding", ["device", "host"])
def test_a_micro_batch_reads_nothing_back(embedding: str, folder: Path, tmp_path: Path) -> None:
    read = {}
    for loss in ("fused", "one_pass"):
        trainer = _trainer(_config(loss, folder, embedding=embedding), tmp_path / loss)
        trainer.create_optimizer_and_scheduler(1)
        batch = trainer.data_collator(_rows()[:3])
        trainer.model.train()
        vars(trainer)["current_gradient_accumulation_steps"] = 1
        items = torch.tensor(20)
        embeddings = trainer.model.get_base_model().get_input_embeddings()
        tell = mock.Mock(side_effect=getattr(embeddings, "told", None))
        if embedding == "host":
            vars(embeddings)["told"] = tell
        with Reads() as reads:
            trainer.training_step(trainer.model, batch, items)
        read[loss] = reads.names
        wanted = loss == "one_pass" and embedding == "host"
        assert [call.args[0] is batch["input_ids"] for call in tell.mock_calls] == [True] * wanted
    assert len(read["fused"]) >= 3
    assert read["one_pass"] == []


def test_collator_counts_what_is_trained_and_is_else_its_own() -> None:
    class Inner:
        pad = 7

        def __call__(self, rows: Any) -> dict[str, Any]:
            labels = torch.tensor([[5, 6, -100], [7, -100, 8]])
            return {"input_ids": labels.abs(), "labels": labels}

    collator = CountingCollator(Inner())
    batch = collator([])
    assert batch[SCORED] == 2  # the first of a row is nobody's target
    assert batch[ON_HOST].ids is batch["input_ids"]
    assert collator.pad == 7


def test_a_later_number_is_read_when_asked_for() -> None:
    number = Later(torch.tensor([2.0, 4.0]))
    assert float(number.sum()) == 6 and float(number.mean()) == 3
    assert float(1 + number.sum() / Later(torch.tensor(4))) == 2.5
    assert float(number.sum().item() // 4) == 1
    assert number > 0
    assert float(number.sum() / Later(torch.tensor(0))) == 0


def test_marking_a_head_changes_no_other_models_loss(folder: Path) -> None:
    config = _config("one_pass", folder)
    model, other = _model(config), _model(config)
    take_one_pass(model)
    assert model.get_output_embeddings().weight.one_pass
    assert not hasattr(other.get_output_embeddings().weight, "one_pass")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainer": "transformers"}, "with trainer 'transformers'"),
        ({"method": "full", "lora": None}, "with method 'full'"),
        ({"stage": "dpo"}, "with stage 'dpo'"),
    ],
)
def test_where_it_cannot_be_is_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _config("one_pass", **changes)


def test_a_trace_has_one_product_with_the_head_less_and_no_more_memory() -> None:
    architecture = resolve_architecture("qwen2.5-0.5b")
    traces = {}
    for loss in ("fused", "one_pass"):
        config = _config(
            loss, "qwen2.5-0.5b", precision="bf16", micro_batch=2, seq_len=512, accumulation=1
        )
        traces[loss] = trace_step(config, architecture, layers=2, capability="9.0")

    figures = architecture.hf_config
    product = 2 * 2 * 511 * figures["hidden_size"] * figures["vocab_size"]
    saved = traces["fused"].total_work().matmul_flops - traces["one_pass"].total_work().matmul_flops
    assert saved == pytest.approx(product, rel=1e-3)
    peaks = {loss: traced_memory(trace, expandable=True) for loss, trace in traces.items()}
    assert peaks["one_pass"].allocated_bytes <= peaks["fused"].allocated_bytes * 1.01


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "gemma-2-2b"])
def test_a_trace_of_more_rows_does_the_same_things(model: str) -> None:
    architecture = resolve_architecture(model)
    # 4080 rows of a head are one part of at most 4096; 8160 are two, 12,240 three.
    traces = {}
    for rows in (16, 32, 40, 48):
        config = _config(
            "one_pass", model, precision="bf16", micro_batch=rows, seq_len=256, accumulation=1,
            attention=attention_of(architecture),
        )  # fmt: skip
        traces[rows, 256] = trace_step(config, architecture, layers=2, capability="9.0")
    own = traces.pop((40, 256))

    known = Family({size: trace for size, trace in traces.items() if size[0] != 16})
    assert known.alike(own, traces[16, 256])
    assert known.agrees((40, 256), own, within=1024)


def test_a_plan_takes_it_where_it_goes() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "one_pass"),
        ({"method": "full"}, "fused"),
        ({"stage": "dpo"}, "fused"),
        ({"trainer": "transformers"}, "full"),
    ]
    for fixed, loss in cases:
        spec = Spec(model="qwen2.5-0.5b", vram_bytes=8 * GIB, seq_len=512, fixed=fixed)
        space = build_space(spec, cpu_machine(), detect_stack(), find_card("rtx-4060"))
        assert {config.loss for config in space.configs() if config.kernels == "none"} == {loss}


def test_an_export_says_what_is_given_up_and_a_script_for_trl_carries_it() -> None:
    config = _config("one_pass", "qwen2.5-0.5b", precision="bf16")
    kept, lost = settle(config, TRL.rules(recipe()))
    assert kept.loss == "one_pass" and not lost
    script = TRL.write(kept, recipe(), config)
    compile(script, "script", "exec")
    assert "import OnePassTrainer" in script and "SFTTrainer" not in script
    for target in (UNSLOTH, AXOLOTL):
        kept, lost = settle(config, target.rules(recipe()))
        assert kept.loss == "fused"
        assert any("one-pass loss" in one.why for one in lost)


def test_a_script_of_ones_own_is_told_whose_trainer_has_it() -> None:
    told = [" ".join(_notes(_config(loss), "cpu")) for loss in ("fused", "one_pass")]
    assert "OnePassTrainer" not in told[0]
    assert "OnePassTrainer" in told[1]


@pytest.mark.parametrize("settings", [{"epochs": 2.0, "max_steps": None}, {"eval_steps": 4}])
def test_a_run_evaluates_keeps_checkpoints_and_loses_the_same(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    lines = [{"text": f"{n} and {n + 1} are {2 * n + 1}, as everybody knows"} for n in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    after = []
    for loss in ("fused", "one_pass"):
        config = _config(loss, folder, seq_len=64)
        how = {"holdout": 0.2, "save_steps": 5, **settings}
        after.append(run(config, data, tmp_path / loss, **how).eval_loss_after)
    assert after[1] == pytest.approx(after[0], rel=1e-3)


def test_a_later_number_keeps_no_graph() -> None:
    states = torch.ones(3, requires_grad=True)
    assert not Later((states * 2).sum())._value.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", HOW)
def test_the_kernel_computes_what_plain_operations_do(how: str, dtype: torch.dtype) -> None:
    head = Head(dtype, bias=how == "bent")
    on_host, gradient = head.run(OnePassLogProb, *HOW[how])
    for name in ("hidden", "weight", "bias", "targets", "incoming"):
        value = getattr(head, name)
        setattr(head, name, None if value is None else value.cuda())
    on_card, of_card = head.run(OnePassLogProb, *HOW[how])
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    for mine, other in zip(on_card[:2], on_host[:2], strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=tolerance, atol=tolerance)
    assert (of_card.cpu() - gradient).norm() <= tolerance * gradient.norm()
