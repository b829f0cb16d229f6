"""Input embeddings in host memory: the same training, a card with so much more room."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import plan_of, recipe
from recorded import TINY, configure
from recorded import tiny as figures
from test_zoo import KINDS
from tiny_training import config_of, run, weights
from transformers import AutoModelForCausalLM

from lora_advisor.advisor.configuring import _notes
from lora_advisor.advisor.export_trl import TRL
from lora_advisor.advisor.fit import _mutations
from lora_advisor.advisor.predictor import Predictor
from lora_advisor.advisor.space import build_space
from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes.architectures import (
    Architecture,
    embedding_bytes,
    has_own_head,
    resolve_architecture,
)
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.errors import UsageError
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.host_embedding import keep_on_host
from lora_advisor.probes.machine import GIB, Machine, cpu_machine, detect_stack
from lora_advisor.probes.spec import Spec
from lora_advisor.probes.weights import skeleton

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CARD = find_card("rtx-4060")


def _kind(kind: str) -> tuple[RunConfig, Architecture]:
    return KINDS[kind].config, KINDS[kind].architecture


def built(kind: str) -> Any:
    """Return a model of a kind with random weights and a head of its own."""
    torch.manual_seed(0)
    config, architecture = _kind(kind)
    figures_of = {**architecture.hf_config, "tie_word_embeddings": False}
    architecture = dataclasses.replace(architecture, hf_config=figures_of)
    model: Any = skeleton(config, architecture, "cpu", dtype=torch.float32)
    model.to_empty(device="cpu")
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.05)
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_and_what_is_left_is_smaller_by_the_table(kind: str) -> None:
    model = built(kind)
    embeddings = model.get_input_embeddings()
    if model.get_output_embeddings().weight is embeddings.weight:
        pytest.skip("ties its head whatever it is told")
    ids = torch.randint(3, 900, (2, 17))
    before, count = model(ids).logits, sum(p.numel() for p in model.parameters())

    keep_on_host(model)

    assert torch.equal(model(ids).logits, before)
    left = sum(p.numel() for p in model.parameters())
    assert count - left == embeddings.weight.numel()
    assert model.get_input_embeddings().weight is embeddings.weight


def test_it_stays_where_it_is_when_the_model_goes_elsewhere() -> None:
    model = built("qwen3: queries and keys normed")
    keep_on_host(model)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.get_input_embeddings().weight.device.type == "cpu"


def test_a_head_of_the_same_weight_is_refused() -> None:
    config, architecture = _kind("qwen3: queries and keys normed")
    figures_of = {**architecture.hf_config, "tie_word_embeddings": True}
    tied = dataclasses.replace(architecture, hf_config=figures_of)
    with pytest.raises(UsageError, match='must be "device" for a model whose head'):
        keep_on_host(skeleton(config, tied, "cpu", dtype=torch.float32))


def test_full_fine_tuning_is_refused() -> None:
    with pytest.raises(UsageError, match="which trains the embeddings"):
        configure(method="full", lora=None, embedding="host", trainer="transformers", loss="full")


@pytest.fixture
def untied(tmp_path: Path, tiny: Path) -> Path:
    """Return a stored tiny model with a head of its own, and its rows."""
    folder = tmp_path / "untied"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, tie_word_embeddings=False)
    model.save_pretrained(folder)
    for file in tiny.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_trainings_come_to_the_same_weights(
    tmp_path: Path, untied: Path, trainer: str, checkpointing: str
) -> None:
    lora = LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    loss = "fused" if trainer == "trl" else "full"
    config = config_of(untied, trainer=trainer, loss=loss, lora=lora, checkpointing=checkpointing)
    data = untied / "rows.jsonl"
    one = run(config, data, tmp_path / "device", max_steps=6)
    other = run(config.replace(embedding="host"), data, tmp_path / "host", max_steps=6)
    assert weights(one.adapter) == weights(other.adapter)
    assert one.eval_loss_after == other.eval_loss_after


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_a_trace_holds_so_much_less_once_it_is_loaded(method: str, checkpointing: str) -> None:
    architecture = figures(tie_word_embeddings=False, vocab_size=8000)
    config = configure(method=method, checkpointing=checkpointing, micro_batch=4, seq_len=256)
    traces = [
        trace_all_layers(config.replace(embedding=place), architecture, capability="8.9")
        for place in ("device", "host")
    ]
    device, host = (traced_memory(trace, expandable=False) for trace in traces)
    table = embedding_bytes(architecture)
    assert table == 2 * 8000 * 64
    for phase in ("forward", "backward", "optimizer"):
        assert device.phases[phase] - host.phases[phase] == table
    assert device.phases["load"] - table <= host.phases["load"] < device.phases["load"]
    assert device.components["weights"] - host.components["weights"] == table


def space_of(model: str, machine: Machine, **fixed: Any) -> tuple[Any, ...]:
    spec = Spec(model=model, vram_bytes=8 * GIB, fixed=fixed)
    return build_space(spec, machine, detect_stack(), None).axes["embedding"]


def test_it_is_searched_where_it_can_matter() -> None:
    card = CARD.machine()
    assert space_of("qwen2.5-7b", card) == ("host", "device")
    assert space_of("llama-3.1-8b", card) == ("host", "device")
    assert space_of("mistral-7b", card) == ("device",)  # 250 MiB
    assert space_of("qwen2.5-1.5b", card) == ("device",)  # the head's weight as well
    assert space_of("qwen2.5-7b", card, embedding="device") == ("device",)
    assert space_of("qwen2.5-7b", cpu_machine()) == ("device",)


def test_fit_offers_it_to_a_model_with_a_head_of_its_own(tmp_path: Path) -> None:
    found: dict[bool, RunConfig | None] = {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**TINY, "tie_word_embeddings": tied}))
        architecture = resolve_architecture(str(folder))
        assert has_own_head(architecture) is not tied
        predictor = Predictor.start(architecture, CARD.machine(), CARD, limit_bytes=GIB)
        changes = dict(_mutations(configure(model=str(folder)), predictor))
        found[tied] = changes.get("input embeddings held in host memory")
    offered = found[False]
    assert found[True] is None
    assert offered is not None and offered.embedding == "host"


def test_a_script_of_ones_own_is_told_to_prepare_the_model() -> None:
    told = [_notes(configure(embedding=place), "cpu") for place in ("device", "host")]
    assert told[0] == ()
    assert len(told[1]) == 1 and "setup.prepare(model)" in told[1][0]


def test_a_script_says_so_and_is_read_back(tmp_path: Path) -> None:
    config = configure(embedding="host", micro_batch=4)
    script = TRL.write(config, recipe(), config)
    assert "    keep_on_host(model)\n" in script
    compile(script, "script.py", "exec")
    assert RunConfig.from_json(config.to_json()) == config
    assert "embedding" not in config.replace(embedding="device").to_json()
    assert plan_of(config).chosen.config.embedding == "host"


def test_tokens_that_were_told_are_those_of_one_call_and_forgotten_after_a_failure() -> None:
    model = built(next(kind for kind in KINDS if kind.startswith("phi3")))
    keep_on_host(model)
    embeddings = model.get_input_embeddings()
    ids, others = torch.randint(3, 900, (2, 2, 17))
    expected, of_others = embeddings(ids), embeddings(others)
    assert not torch.equal(expected, of_others)

    with embeddings.told(ids):  # what the device holds is not looked at, once
        assert torch.equal(embeddings(others), expected)
        assert torch.equal(embeddings(others), of_others)
    with pytest.raises(MemoryError), embeddings.told(ids):
        raise MemoryError
    assert torch.equal(embeddings(others), of_others)
