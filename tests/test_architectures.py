from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_advisor.probes import architectures
from lora_advisor.probes.architectures import (
    build_hf_config,
    bundled_names,
    from_hf_config,
    load_bundled,
    resolve_architecture,
)
from lora_advisor.probes.errors import AdvisorError, DataError, MissingInputError, UsageError

PROBES = Path(architectures.__file__).parent

#: What the project promises to know.
PROMISED = [
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.1-8b",
    "mistral-7b",
    "gemma-2-2b",
    "gemma-3-1b",
    "phi-3.5-mini",
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
    "tinyllama-1.1b",
    "llama-2-7b",
]

FIGURES: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}


def bundled_file(name: str) -> Any:
    """Return the content of a bundled model's file."""
    (file,) = PROBES.glob(f"*/{name}.json")
    return json.loads(file.read_text("utf-8"))


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a folder with a config.json and return it."""
    folder.mkdir(exist_ok=True)
    figures = {key: value for key, value in {**FIGURES, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(figures), "utf-8")
    return folder


def refusal(model: object, kind: type[AdvisorError]) -> str:
    """Return the sentence with which a model is refused, and check its kind."""
    with pytest.raises(AdvisorError) as caught:
        resolve_architecture(str(model))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_promised_model_is_bundled() -> None:
    assert set(PROMISED) <= set(bundled_names())


@pytest.mark.parametrize("name", bundled_names())
def test_a_bundled_file_says_where_its_figures_come_from(name: str) -> None:
    data = bundled_file(name)

    assert data["name"] == name
    assert data["source"].startswith("https://huggingface.co/")
    assert load_bundled(name).source == data["source"]


@pytest.mark.parametrize("name", bundled_names())
def test_a_bundled_model_has_the_published_number_of_parameters(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    published = bundled_file(name)["parameters"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call, unused-ignore]
            build_hf_config(load_bundled(name))
        )

    # `parameters()` yields a tied tensor once.
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_a_name_is_found_in_any_case() -> None:
    assert resolve_architecture("Qwen2.5-1.5B").name == "qwen2.5-1.5b"


def test_the_hub_id_of_a_bundled_model_needs_no_network() -> None:
    architecture = resolve_architecture("Qwen/Qwen2.5-1.5B")

    assert architecture.hf_config == load_bundled("qwen2.5-1.5b").hf_config
    assert architecture.weights == "Qwen/Qwen2.5-1.5B"


def test_fewer_layers_can_be_asked_for() -> None:
    assert build_hf_config(load_bundled("gemma-3-1b"), layers=2).num_hidden_layers == 2


COMMON: dict[str, Any] = {"vocab_size": 256, "num_attention_heads": 4}
TEXT = {**COMMON, "hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 128}

#: Figures of six layers, under the names that the published config.json of each type has.
SIX_LAYERS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 256, "n_embd": 64, "n_head": 4, "n_layer": 6},
    "mpt": {"vocab_size": 256, "d_model": 64, "n_heads": 4, "n_layers": 6},
    "gemma3": {"text_config": {**TEXT, "model_type": "gemma3_text", "head_dim": 16}},
    "gemma3, its language model's type left out": {"text_config": {**TEXT, "head_dim": 16}},
    "gemma3n_text": {
        **TEXT,
        "head_dim": 16,
        "num_kv_shared_layers": 0,
        "intermediate_size": [128] * 3 + [256] * 3,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 3,
    },
}


@pytest.mark.parametrize("name", SIX_LAYERS)
def test_layers_are_counted_and_cut_under_any_name(name: str) -> None:
    figures = {"model_type": name.split(",")[0], **SIX_LAYERS[name]}
    architecture = from_hf_config("six", figures)

    assert architecture.num_layers == 6
    assert build_hf_config(architecture).get_text_config().num_hidden_layers == 6
    cut = build_hf_config(architecture, layers=4).get_text_config()
    assert cut.num_hidden_layers == 4
    if "intermediate_size" in figures:
        assert cut.intermediate_size == [128, 128, 128, 256]
        assert cut.activation_sparsity_pattern == [0.95, 0.95, 0.95, 0.0]
        assert len(cut.layer_types) == 4


def test_decoder_layers_beside_an_encoder_are_not_counted() -> None:
    figures = {"is_encoder_decoder": True, "num_hidden_layers": 2, "decoder_layers": 3}

    assert from_hf_config("two", {"model_type": "bart", **figures}).num_layers is None


def test_figures_under_the_common_name_are_read_without_transformers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine")
    code = (
        "import sys; from lora_advisor.probes.architectures import resolve_architecture; "
        f"print(resolve_architecture({str(folder)!r}).num_layers, 'transformers' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert child.stdout.split() == ["2", "False"]


def test_a_folder_with_safetensors_brings_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine")
    assert resolve_architecture(str(folder)).weights is None

    (folder / "model.safetensors").write_bytes(b"")
    assert resolve_architecture(str(folder)).weights == str(folder)


def test_a_config_file_is_taken_by_its_path(tmp_path: Path) -> None:
    file = write_model(tmp_path / "mine") / "config.json"

    architecture = resolve_architecture(str(file))

    assert architecture.name == "mine"
    assert architecture.num_layers == 2


def test_the_fingerprint_ignores_names_but_no_figure(tmp_path: Path) -> None:
    one = resolve_architecture(str(write_model(tmp_path / "one", architectures=["A"])))
    same = resolve_architecture(str(write_model(tmp_path / "same", _name_or_path="B")))
    other = resolve_architecture(str(write_model(tmp_path / "other", vocab_size=257)))

    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint


def test_an_unknown_name_suggests_the_nearest() -> None:
    message = refusal("qwen2.5-1.5", UsageError)

    assert message.startswith("`qwen2.5-1.5`")
    assert "did you mean qwen2.5-1.5b" in message


def test_a_name_like_no_other_lists_them_all() -> None:
    assert "names: " in refusal("zzzzzz", UsageError)


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing/config.json", "missing.json"])
def test_a_path_to_nothing_is_missing_input(path: str) -> None:
    assert path in refusal(path, MissingInputError)


def test_a_hub_id_that_cannot_be_fetched_is_missing_input() -> None:
    assert "nobody/nothing" in refusal("nobody/nothing", MissingInputError)


def test_a_folder_without_a_config_is_missing_input(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path, MissingInputError)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[1, 2]", b'"text"'])
def test_a_config_that_is_no_json_object_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)

    refusal(tmp_path, DataError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "`model_type` must name the architecture"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be a whole number of at least 1"),
        ({"num_hidden_layers": None}, "`num_hidden_layers` must be given"),
        ({"num_hidden_layers": 10**6}, "`num_hidden_layers` must be at most"),
        ({"hidden_size": -64}, "`hidden_size` must be a whole number"),
        ({"hidden_size": "64"}, "`hidden_size` must be a whole number"),
        ({"hidden_size": 64.5}, "`hidden_size` must be a whole number"),
        ({"vocab_size": 10**9}, "`vocab_size` must be at most"),
        ({"num_attention_heads": 5}, "`num_attention_heads` must divide `hidden_size`"),
        ({"intermediate_size": [128, 0]}, "`intermediate_size` must be a whole number"),
        ({"intermediate_size": []}, "`intermediate_size` must be a whole number"),
        ({"hidden_size": [64, 64]}, "`hidden_size` must be a whole number"),
        ({"model_type": "gpt2", "num_hidden_layers": None}, "`n_layer` must be given"),
        (
            {"model_type": "gpt2", "num_hidden_layers": None, "n_layer": "6"},
            "`n_layer` must be a whole number",
        ),
        (
            {"model_type": "mpt", "num_hidden_layers": None, "n_layers": 10**6},
            "`n_layers` must be at most 2000",
        ),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 0}},
            "`text_config`: `num_hidden_layers` must be a whole number",
        ),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide `num_attention_heads`"),
    ],
)
def test_impossible_figures_are_a_data_error_that_names_them(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(write_model(tmp_path / "odd", **changes), DataError)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "old")
    (folder / "pytorch_model.bin").write_bytes(b"")

    assert "safetensors" in refusal(folder, DataError)


def test_a_model_type_that_transformers_does_not_know_is_a_usage_error(tmp_path: Path) -> None:
    architecture = resolve_architecture(
        str(write_model(tmp_path / "new", model_type="not-invented-yet"))
    )

    with pytest.raises(UsageError, match=re.escape("'not-invented-yet'")):
        build_hf_config(architecture)


def test_remote_code_is_never_on_by_itself(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "custom", auto_map={"AutoConfig": "evil.Config"})

    architecture = resolve_architecture(str(folder))

    assert architecture.trust_remote_code is False
    assert not hasattr(build_hf_config(architecture), "auto_map")
