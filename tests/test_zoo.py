"""Models that are built differently, each small: few layers traced stand for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from recorded import configure

from lora_advisor.models.replayed import traced_memory
from lora_advisor.probes import trace as tracing
from lora_advisor.probes.adapters import lora_config
from lora_advisor.probes.architectures import Architecture, attention_of, from_hf_config
from lora_advisor.probes.config import RunConfig
from lora_advisor.probes.errors import UntraceableError, UsageError
from lora_advisor.probes.events import Trace
from lora_advisor.probes.extend import trace_all_layers
from lora_advisor.probes.finetune import decoder_layers
from lora_advisor.probes.trace import trace_step
from lora_advisor.probes.weights import skeleton

#: Width, inner width, tokens known, positions; heads, those of keys and values, and their width.
H, F, V, P = 64, 128, 1000, 256
Q, KV, D = 4, 2, 16
GROUPED = H * Q * D + 2 * H * KV * D + Q * D * H  # query; key and value; output
GATED = 3 * H * F  # gate, up and down
EXPERTS, INNER = 8, 32  # of the mixtures, and the inner width of a small expert

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": F,
    "num_attention_heads": Q,
    "num_key_value_heads": KV,
    "max_position_embeddings": P,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPENAI_LIKE = {"vocab_size": V, "n_embd": H, "n_head": Q, "n_positions": P} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """A model type with the parameters of one layer and of all that is outside the layers."""

    figures: dict[str, Any]
    layer: int
    outside: int
    layers: int = 6
    first: int = 0  # what the first layer has more
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        count = "n_layer" if "n_embd" in self.figures else "num_hidden_layers"
        return from_hf_config("small", {**self.figures, count: self.layers})

    @property
    def config(self) -> RunConfig:
        knobs: dict[str, Any] = {"attention": attention_of(self.architecture)}
        return configure(**knobs, **self.knobs)

    @property
    def parameters(self) -> int:
        return self.first + self.layers * self.layer + self.outside


STOCK = {"trainer": "transformers", "loss": "full", "checkpointing": "off"}

KINDS = {
    "gpt2: learnt positions, tied, its own name for the layers": Kind(
        {"model_type": "gpt2", **OPENAI_LIKE},
        layer=(H * 3 * H + 3 * H) + (H * H + H) + (H * 4 * H + 4 * H) + (4 * H * H + H) + 4 * H,
        outside=V * H + P * H + 2 * H,
        knobs=STOCK,
    ),
    "gpt_neox: attention beside the inner layer, biases": Kind(
        {"model_type": "gpt_neox", **LLAMA_LIKE, "num_key_value_heads": Q},
        layer=(H * 3 * H + 3 * H) + (H * H + H) + (H * F + F) + (F * H + H) + 4 * H,
        outside=2 * V * H + 2 * H,
        knobs=STOCK,
    ),
    "falcon: one key and value for all heads, linear layers of its own": Kind(
        {"model_type": "falcon", **LLAMA_LIKE, "num_key_value_heads": 1, "multi_query": True},
        layer=H * (H + 2 * D) + H * H + 2 * H * 4 * H + 2 * H,
        outside=V * H + 2 * H,
        knobs=STOCK,
    ),
    "phi3: fused projections, sliding windows": Kind(
        {"model_type": "phi3", **LLAMA_LIKE, "sliding_window": 32},
        layer=GROUPED + GATED + 2 * H,
        outside=2 * V * H + H,
        knobs=STOCK,
    ),
    "qwen3: queries and keys normed": Kind(
        {"model_type": "qwen3", **LLAMA_LIKE, "head_dim": D},
        layer=GROUPED + 2 * D + GATED + 2 * H,
        outside=2 * V * H + H,
        knobs=STOCK,
    ),
    "cohere: tied and scaled logits": Kind(
        {"model_type": "cohere", **LLAMA_LIKE},
        layer=GROUPED + GATED + H,
        outside=V * H + H,
    ),
    "gemma2: windows in every second layer, capped logits": Kind(
        {"model_type": "gemma2", **LLAMA_LIKE, "head_dim": D, "sliding_window": 32},
        layer=GROUPED + GATED + 4 * H,
        outside=V * H + H,
        layers=12,
        knobs=STOCK,
    ),
    "mixtral: a mixture of experts with a loss of its own": Kind(
        {
            "model_type": "mixtral",
            **LLAMA_LIKE,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
        },
        layer=GROUPED + EXPERTS * H + EXPERTS * GATED + 2 * H,
        outside=2 * V * H + H,
    ),
    "deepseek_v2: latent attention, a dense layer before the mixtures": Kind(
        {
            "model_type": "deepseek_v2",
            **LLAMA_LIKE,
            "num_key_value_heads": Q,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": D,
            "qk_rope_head_dim": 8,
            "v_head_dim": D,
            "first_k_dense_replace": 1,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": INNER,
            "n_group": 1,
            "topk_group": 1,
        },
        layer=(H * 24 + 24 + 24 * Q * (D + 8))  # query
        + (H * (20 + 8) + 20 + 20 * Q * (D + D))  # key and value
        + Q * D * H
        + (EXPERTS * H + (EXPERTS + 1) * 3 * H * INNER)
        + 2 * H,
        outside=2 * V * H + H,
        first=GATED - (EXPERTS * H + (EXPERTS + 1) * 3 * H * INNER),
        layers=7,
        knobs=STOCK,
    ),
}


def weights_of(trace: Trace) -> int:
    return sum(
        e.size for e in trace.events if e.size > 0 and trace.owners.get(e.block) == "weights"
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=[name.split(":")[0] for name in KINDS])
def test_few_layers_of_any_kind_of_model_stand_for_all(kind: Kind) -> None:
    with mock.patch.object(tracing, "_trace", side_effect=tracing._trace) as traced:
        extended = trace_all_layers(kind.config, kind.architecture)
    assert [(call.args[2] or kind.layers) < kind.layers for call in traced.call_args_list] == [True]
    whole = trace_step(kind.config, kind.architecture)

    one = traced_memory(extended, expandable=False, cap_bytes=1 << 60)
    other = traced_memory(whole, expandable=False, cap_bytes=1 << 60)
    assert one.allocated_bytes == pytest.approx(other.allocated_bytes, rel=0.001)
    assert one.reserved_bytes == other.reserved_bytes
    assert extended.trainable == whole.trainable
    # Of two bytes each; positions and the like are kept in buffers beside them.
    buffers = sum(b.nbytes for b in skeleton(kind.config, kind.architecture, "cpu").buffers())
    assert weights_of(whole) - buffers == 2 * kind.parameters
    assert weights_of(extended) - buffers == 2 * kind.parameters


def test_layers_whose_parent_initialises_them_are_quantised() -> None:
    architecture = from_hf_config("small", {"model_type": "gpt2", **OPENAI_LIKE, "n_layer": 2})

    trace = trace_step(configure(method="qlora"), architecture)

    # Two bytes a parameter, half a byte where there are matrices: attention's and the inner ones.
    outside, matrices = V * H + P * H, 2 * (4 + 8) * H * H
    assert weights_of(trace) == pytest.approx(2 * outside + matrices / 2, rel=0.1)


def adapters(*shapes: tuple[int, int]) -> int:
    """Return the parameters of adapters of rank 8."""
    return sum(8 * (inner + outer) for inner, outer in shapes)


SMALL = {**LLAMA_LIKE, "num_hidden_layers": 2}
GROUPED_SHAPES = ((H, Q * D), (H, KV * D), (H, KV * D), (Q * D, H))
MIXTURE = {**SMALL, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
BYSTANDER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

#: Model types that TRL, peft or PyTorch need a word about, with their adapters' parameters.
SPECIAL: dict[str, tuple[dict[str, Any], int]] = {
    "phimoe: experts counted under another name, routers that are linear but give two tensors": (
        {"model_type": "phimoe", **MIXTURE},
        2 * adapters(*GROUPED_SHAPES),
    ),
    "modernbert-decoder: starts from truncated normal values": (
        {"model_type": "modernbert-decoder", **SMALL},
        # Keys and values of all heads, gate and up in one, and a layer before the head.
        2 * adapters(*4 * ((H, H),), (H, 2 * F), (F, H)) + adapters((H, H)),
    ),
}


@pytest.mark.parametrize("name", SPECIAL, ids=[name.split(":")[0] for name in SPECIAL])
def test_adapters_are_on_every_layer_that_can_have_one(name: str) -> None:
    figures, trainable = SPECIAL[name]

    trace = trace_step(configure(), from_hf_config("small", figures))

    assert trace.trainable == trainable


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_the_layers_of_an_image_encoder_are_not_the_decoders() -> None:
    from peft import get_peft_model

    text = {**SMALL, "model_type": "gemma3_text", "head_dim": D, "sliding_window": 32}
    figures = {"model_type": "gemma3", "text_config": text, "vision_config": BYSTANDER}

    model: Any = skeleton(configure(), from_hf_config("both", figures), "cpu")
    adapted: Any = get_peft_model(model, lora_config(configure(), model))

    for part in (model, adapted):
        kinds = [type(layer).__name__ for layer in decoder_layers(part)]
        assert kinds == ["Gemma3DecoderLayer"] * 2


@pytest.mark.parametrize(("capability", "grouped"), [("7.5", False), ("8.0", True)])
def test_experts_are_multiplied_together_where_the_card_can(capability: str, grouped: bool) -> None:
    import torch

    together = torch.nn.functional.grouped_mm
    config, architecture = configure(), from_hf_config("m", {"model_type": "mixtral", **MIXTURE})
    with mock.patch.object(torch.nn.functional, "grouped_mm", side_effect=together) as product:
        trace_step(config, architecture, layers=1, capability=capability)

    assert product.called is grouped


def test_a_model_type_without_a_causal_language_model_is_refused_in_one_sentence() -> None:
    text = {"model_type": "mistral", **SMALL}
    figures = {"model_type": "mistral3", "text_config": text, "vision_config": BYSTANDER}

    with pytest.raises(UsageError, match="'mistral3', for which transformers has no causal"):
        trace_all_layers(configure(), from_hf_config("both", figures))


def test_rows_picked_by_their_values_cannot_be_traced() -> None:
    figures = {
        "model_type": "dbrx",
        "vocab_size": V,
        "d_model": H,
        "n_heads": Q,
        "n_layers": 2,
        "max_seq_len": P,
        "attn_config": {"kv_n_heads": KV, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": H, "moe_num_experts": 4, "moe_top_k": 2},
    }

    with pytest.raises(UntraceableError, match=r"`rows` picks rows by their values \(aten.nonzero"):
        trace_all_layers(configure(), from_hf_config("rows", figures))
