"""The fused adapter trains what peft's layers train, moves less and needs no more memory."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import configure, tiny
from tiny_model import save_model

from lora_advisor.models.replayed import traced_memory
from lora_advisor.models.traced import TracedMemory
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.dataset import random_rows
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.events import Work
from lora_advisor.probes.finetune import Schedule, build_trainer, padding_tokenizer
from lora_advisor.probes.fused_adapter import FusedLinear
from lora_advisor.probes.trace import trace_step
from lora_advisor.probes.weights import load_model

METHODS = ("lora", "qlora")
#: What the libraries say of each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_model(path)
    return str(path)


def trainer_of(folder: str, config: RunConfig, *, steps: int = 1, out: Path | None = None) -> Any:
    """Return the trainer of a configuration on the same random rows, adapters alike."""
    from transformers import PrinterCallback

    torch.manual_seed(3)
    trainer = build_trainer(
        config,
        load_model(config, resolve_architecture(folder), "cpu"),
        rows=random_rows(config.micro_batch * config.accumulation * 4, config.seq_len, 259),
        tokenizer=padding_tokenizer(259),
        schedule=Schedule(
            max_steps=steps,
            learning_rate=2e-3,
            logging_steps=1,
            shuffle=True,
            output_dir=None if out is None else str(out),
        ),
        device="cpu",
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def config_of(folder: str, **changes: Any) -> RunConfig:
    values = {"model": folder, "precision": "fp32", "micro_batch": 2, "seq_len": 32, **changes}
    return configure(**values)


def gradients(trainer: Any, precision: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one micro-batch whose adapters are past their start of zero."""
    model = trainer.model
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = parameter.data.float()  # TRL leaves those of 4-bit weights in bf16
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(drawn)
    ids = torch.randint(2, 259, (2, 32), generator=generator)
    casts = precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16) if casts else contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {
        name: parameter.grad.float().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return how far two sets of gradients are apart, as a share of their size."""
    assert one.keys() == other.keys() and one
    difference = sum(float((one[name] - other[name]).norm() ** 2) for name in one)
    return float((difference / sum(float(g.norm() ** 2) for g in one.values())) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_peft(folder: str, method: str) -> None:
    config = config_of(folder, method=method)
    plain = trainer_of(folder, config)
    fused = trainer_of(folder, config.replace(adapter="fused"))
    kinds = {type(m).__name__ for m in fused.model.modules() if hasattr(m, "lora_A")}
    assert kinds == {"FusedLinear" if method == "lora" else "FusedLinear4bit"}

    expected, of_peft = gradients(plain, "fp32")
    loss, found = gradients(fused, "fp32")

    assert loss == pytest.approx(expected, rel=1e-5)
    assert len(found) == 2 * 7 * 2  # both factors of seven products in two layers, nothing else
    assert apart(of_peft, found) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_in_16_bits_it_is_as_near_to_the_truth_as_peft(folder: str, method: str) -> None:
    config = config_of(folder, method=method)
    _, truth = gradients(trainer_of(folder, config), "fp32")
    halved = config.replace(precision="bf16")

    _, of_peft = gradients(trainer_of(folder, halved), "bf16")
    _, found = gradients(trainer_of(folder, halved.replace(adapter="fused")), "bf16")

    assert apart(truth, found) < max(1.1 * apart(truth, of_peft), 1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora", "precision": "fp32"},
        {"method": "qlora", "precision": "bf16"},
        {"method": "lora", "precision": "bf16", "checkpointing": "off", "trainer": "transformers",
         "loss": "full"},
    ],
    ids=["lora", "qlora in bf16", "transformers in bf16"],
)  # fmt: skip
def test_fifty_steps_learn_the_same(folder: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(folder, **changes)

    assert_the_same_is_learnt(config, config.replace(adapter="fused"), tmp_path)


@pytest.mark.parametrize("changes", [{}, {"method": "qlora", "precision": "bf16"}])
def test_fifty_steps_of_compiled_layers_learn_the_same(
    folder: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(layer: Any, **_: Any) -> None:  # all but Inductor, which needs a C++ compiler
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    torch._dynamo.reset()
    config = config_of(folder, **changes)

    assert_the_same_is_learnt(config, config.replace(adapter="fused", compile="layers"), tmp_path)

    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0  # the layers were compiled, and whole


def assert_the_same_is_learnt(one: RunConfig, other: RunConfig, folder: Path) -> None:
    """Train fifty steps each and compare their losses."""
    curves = []
    for config in (one, other):
        trainer = trainer_of(config.model, config, steps=50, out=folder / config.adapter)
        trainer.train()
        curves.append([log["loss"] for log in trainer.state.log_history if "loss" in log])

    plain, fused = curves
    assert len(plain) == len(fused) == 50
    assert plain[-1] < plain[0] - 0.05  # it learns at all
    tolerance = 1e-3 if one.precision == "fp32" else 1e-2
    assert max(abs(a - b) for a, b in zip(plain, fused, strict=True)) < tolerance


def test_without_its_adapter_the_base_speaks_and_files_are_pefts(
    folder: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = trainer_of(folder, config_of(folder, method="lora", adapter="fused")).model.eval()
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    base.eval()
    ids = torch.arange(3, 19)[None]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)

    with torch.no_grad():
        with model.disable_adapter():
            assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-5)
        adapted = model(ids).logits
        assert not torch.allclose(adapted, base(ids).logits, atol=1e-3)
        model.save_pretrained(tmp_path)
        loaded: Any = PeftModel.from_pretrained(base, str(tmp_path))
        loaded.eval()
        assert not any(isinstance(m, FusedLinear) for m in loaded.modules())
        assert torch.allclose(loaded(ids).logits, adapted, atol=1e-5)


def test_what_is_more_than_a_product_is_left_to_peft(folder: str) -> None:
    """Dropout, a second adapter and a forward pass of somebody else's are not computed away."""
    model = trainer_of(folder, config_of(folder, method="lora", adapter="fused")).model
    layer: Any = next(m for m in model.modules() if isinstance(m, FusedLinear))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 5, layer.in_features)
    base = layer.base_layer
    update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    assert torch.allclose(layer(x), base(x) + update, atol=1e-5)

    base.forward = lambda rows: 2 * torch.nn.functional.linear(rows, base.weight)
    assert torch.allclose(layer(x), base(x) + update, atol=1e-5)

    layer.lora_dropout["default"] = torch.nn.Dropout(1.0)
    assert torch.allclose(layer(x), base(x), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": LoraShape(r=8, alpha=16, dropout=0.1, targets="all-linear")}, "dropout"),
        ({"trainer": "loop", "loss": "full"}, "autocast"),
        ({"method": "full", "lora": None}, "trains none"),
        ({"adapter": "quick"}, "one of peft, fused"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        configure(**{"adapter": "fused", **changes})


def test_older_programs_can_read_a_configuration_without_it() -> None:
    assert "adapter" not in configure().to_json()
    fused = configure(adapter="fused")
    assert RunConfig.from_json(fused.to_json()) == fused


WIDE = tiny(hidden_size=512, intermediate_size=1024, num_hidden_layers=2)


@cache
def traced(**changes: Any) -> tuple[Work, TracedMemory]:
    config = configure(**{"seq_len": 1024, "micro_batch": 4, **changes})
    trace = trace_step(config, WIDE, capability="9.0")
    # Only the layers' work: embeddings, head and loss are the same with either adapter.
    work = sum((work for (_, layer), work in trace.work.items() if layer >= 0), Work())
    return work, traced_memory(trace, expandable=False, cap_bytes=1 << 60)


@pytest.mark.parametrize("compiled", ["off", "layers"])
@pytest.mark.parametrize("method", METHODS)
def test_it_moves_fewer_bytes_and_needs_no_more_memory(method: str, compiled: str) -> None:
    plain, held = traced(method=method, compile=compiled)
    fused, less = traced(method=method, compile=compiled, adapter="fused")

    assert fused.bytes_moved < 0.95 * plain.bytes_moved
    assert fused.matmul_flops == plain.matmul_flops
    slack = 64 * 1024  # the factors in 16 bits, of one product
    assert less.allocated_bytes <= held.allocated_bytes + slack
    if compiled == "off" and method == "lora":  # of 4 bits several kernels of peft's count as one
        assert fused.kernels < 0.9 * plain.kernels
