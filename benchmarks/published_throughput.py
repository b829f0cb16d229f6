"""Compare predicted tokens a second with the table of published measurements, card by card.

    python benchmarks/published_throughput.py CSV [--cache FILE] [--out FILE]

CSV is the table of published measurements. A row is scored when it pins the step: the card, the
model's figures, a fixed length, micro-batch, method, precision, optimizer, checkpointing, attention
and loss, and a step that this project builds. Every other row is counted with the reason. No GPU is
used and no figure of a row is used to predict it. Rows of one configuration are one point, their
median; how far they lie apart is the noise. Rows that the table itself calls incomplete, though all
the above is known or assumed, are scored apart. Writes results/published_throughput.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published_t4 import architecture_of, as_measured
from published_t4 import config_of as fitcheck_config
from scipy.stats import spearmanr

from lora_advisor.advisor.predictor import Predictor
from lora_advisor.probes.architectures import Architecture, from_hf_config, load_bundled
from lora_advisor.probes.cards import find_card
from lora_advisor.probes.config import LoraShape, RunConfig

CARDS = {
    "Tesla T4": "t4",
    "A100-SXM4-80GB": "a100-80gb",
    "A100 80GB": "a100-80gb",
    "A100-40GB": "a100-40gb",
    "H100 80GB": "h100-80gb",
    "RTX Pro 6000 96GB": "rtx-pro-6000-blackwell",
    "2x RTX 3090": "rtx-3090",
    "2x RTX 4090": "rtx-4090",
}
#: Figures of models that are not bundled, from their public config.json.
FIGURES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/meta-llama/Llama-2-13b-hf
    "Llama 2 13B": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    },
    # https://huggingface.co/google/gemma-7b
    "Gemma 7B": {
        "model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
    },
    # https://huggingface.co/google/gemma-2-9b
    "Gemma 2 9B": {
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336,
        "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # https://huggingface.co/Qwen/Qwen-1_8B, Qwen-7B and Qwen-14B; see ASSUMPTIONS.
    "Qwen-1.8B": {
        "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 5504,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    },
    "Qwen-7B": {
        "model_type": "qwen2", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 32768,
    },
    "Qwen-14B": {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13696,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    },
}  # fmt: skip
BUNDLED = {
    "Llama 3.1 8B": "llama-3.1-8b",
    "Phi3-mini 3.8B": "phi-3.5-mini",
    "Llama-2-7b": "llama-2-7b",
}
ASSUMPTIONS = (
    "fitcheck: as in published_t4.py (alpha 64, no dropout; the step runs as scripts/measure.py "
    "runs it); each row is one timed step.",
    "ljm565: a step is one micro-step of 2 x 8192 tokens, as the table of measurements says. LoRA "
    "has all targets of the row. 4-bit weights compute in bf16 (the repository's bnb_4bit.yaml); "
    "what is not quantised is fp32 and there is no autocast. Grouped keys and values are repeated "
    "before the attention (transformers 4.49) and the outputs dropped. Gemma 2 runs eager "
    "attention, transformers 4.49's default for it. The H100 and A100 are the SXM models, the "
    "RTX Pro 6000 the Workstation Edition; the source says neither. Phi-3 mini has the figures of "
    "Phi-3.5 mini.",
    "qwen-readme: Qwen 1 has no class in transformers; it is built as Qwen2, which differs by "
    "separate query, key and value products and adapters. Times are published to 0.1 s.",
    "llamafactory-wiki: the constants are quantised twice (LLaMA-Factory's default), no dropout, "
    "no fp32 upcast; lengths beyond 4096 keep the model's figures.",
    "answerai-fsdp-qlora: the DDP rows are taken as one card each; their times include the start "
    "and the exchange of the adapters' gradients.",
)


@dataclass(frozen=True)
class Case:
    """A row as a configuration."""

    config: RunConfig
    architecture: Architecture
    card: str


class NotPinnedError(Exception):
    """A row does not say all that decides its time; the message is the reason."""


def case_of(row: dict[str, str]) -> Case:
    """Return the configuration that a row pins.

    Raises:
        NotPinnedError: It pins none.
    """
    if row["tier"] == "E":
        raise NotPinnedError("estimated by its source, not measured")
    if not row["tokens_per_s"]:
        raise NotPinnedError(
            "no throughput" if row["kind"] == "measured" else f"no run: {row['kind']}"
        )
    if row["family"] in _NOT_PINNED:
        raise NotPinnedError(_NOT_PINNED[row["family"]])
    if "Unsloth" in row["attention"]:
        raise NotPinnedError("another engine: Unsloth")
    return _FAMILIES[row["family"]](row)


#: Families whose step repeats grouped keys and values before the attention and drops its outputs.
_REPEATS_HEADS = ("fitcheck", "ljm565")
_NOT_PINNED = {
    "torchtune": "another engine: torchtune",
    "tinyforge": "another engine: tinyforge, micro-batch and length not stated",
    "torchao": "micro-batch and length not stated",
    "seed-paper": "LoRA or QLoRA, rank and targets not stated",
    "peft-method-comparison": "rows of differing lengths, padded by batch",
}


def _fitcheck(row: dict[str, str]) -> Case:
    architecture = architecture_of(row["model"])
    if architecture is None:
        raise NotPinnedError("the model's figures are not bundled")
    return Case(fitcheck_config(row), architecture, CARDS[row["gpu"]])


def _ljm565(row: dict[str, str]) -> Case:
    attention = "eager" if row["model"] == "Gemma 2 9B" else "sdpa"
    return _case(row, trainer="loop", attention=attention, fp32_upcast=row["method"] == "qlora")


def _qwen(row: dict[str, str]) -> Case:
    if row["quant"] == "gptq-int4":
        raise NotPinnedError("GPTQ weights, which this project does not train on")
    if "modules_to_save" in row["targets"]:
        raise NotPinnedError(
            "embeddings and head trained beside the adapter, which is no method here"
        )
    if row["method"] == "full":
        raise NotPinnedError("24 bytes a parameter: the states' dtypes are not stated")
    row = {**row, "targets": "all linear"}
    return _case(row, trainer="transformers", attention="flash_attention_2")


def _llamafactory(row: dict[str, str]) -> Case:
    if row["precision"] == "fp16/bf16":
        raise NotPinnedError("rows of differing lengths, precision not stated")
    row = {**row, "double_quant": "True", "dropout": "0", "alpha": "16"}
    return _case(row, trainer="transformers", attention="flash_attention_2")


def _fsdp_qlora(row: dict[str, str]) -> Case:
    if row["framework"] != "fsdp_qlora ddp":
        raise NotPinnedError("weights split over two cards")
    return _case({**row, "double_quant": "True"}, trainer="loop", attention="sdpa")


def _case(row: dict[str, str], *, trainer: str, attention: str, fp32_upcast: bool = False) -> Case:
    model = row["model"]
    if model in BUNDLED:
        architecture = load_bundled(BUNDLED[model])
    else:
        architecture = from_hf_config(model, FIGURES[model], source="benchmarks")
    quantised = row["method"] == "qlora"
    lora = None
    if row["method"] != "full":
        targets: Any = tuple(row["targets"].split("+"))
        lora = LoraShape(
            r=int(row["rank"]),
            alpha=float(row["alpha"]),
            dropout=float(row["dropout"]),
            targets="all-linear" if row["targets"] == "all linear" else targets,
        )
    config = RunConfig(
        model=model,
        trainer=trainer,
        method=row["method"],
        quant_type="nf4" if quantised else None,
        double_quant=row["double_quant"] == "True" if quantised else None,
        micro_batch=int(row["micro_batch"]),
        accumulation=int(row["grad_accum"]),
        seq_len=int(row["seq_len"]),
        optimizer="adamw_torch",
        precision="bf16",
        checkpointing={"1": "full", "0": "off"}[row["grad_ckpt"]],
        attention=attention,
        kernels="none",
        loss="full",
        fp32_upcast=fp32_upcast,
        lora=lora,
        compile="off",
        allocator="default",
    )
    return Case(config, architecture, CARDS[row["gpu"]])


_FAMILIES: dict[str, Callable[[dict[str, str]], Case]] = {
    "fitcheck": _fitcheck,
    "ljm565": _ljm565,
    "qwen-readme": _qwen,
    "llamafactory-wiki": _llamafactory,
    "answerai-fsdp-qlora": _fsdp_qlora,
}


def read(file: Path) -> tuple[list[dict[str, str]], list[tuple[dict[str, str], Case]], dict]:
    """Return all rows, those that pin a step, and how many do not by family and reason."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    cases, reasons = [], collections.Counter()
    for row in rows:
        try:
            cases.append((row, case_of(row)))
        except NotPinnedError as reason:
            reasons[f"{row['family']}: {reason}"] += 1
    return rows, cases, dict(sorted(reasons.items()))


def points(cases: Sequence[tuple[dict[str, str], Case]]) -> list[tuple[list[dict], Case]]:
    """Return each configuration on each card once, with all rows that measured it."""
    grouped: dict[str, tuple[list[dict], Case]] = {}
    for row, case in cases:
        key = json.dumps(
            [row["family"], case.card, case.architecture.fingerprint, case.config.to_json()]
        )
        grouped.setdefault(key, ([], case))[0].append(row)
    return list(grouped.values())


class Predictors:
    """One predictor for each architecture, card and way of running the step.

    Attributes:
        cache: File that keeps traces. Steps run as a source ran them have a file of their own: an
            entry's key says nothing of that.
    """

    def __init__(self, cache: Path | None) -> None:
        """Start without any predictor."""
        self.cache = cache
        self.known: dict[tuple[str, str, bool], Predictor] = {}

    def of(self, case: Case, *, as_source: bool) -> Predictor:
        """Return the predictor of a case."""
        key = (case.architecture.fingerprint, case.card, as_source)
        if key not in self.known:
            card = find_card(case.card)
            cache = self.cache
            if cache is not None and as_source:
                cache = cache.with_name(f"as_source_{cache.name}")
            self.known[key] = Predictor.start(
                case.architecture,
                card.machine(),
                card,
                limit_bytes=card.memory_bytes,
                cache=cache,
            )
        return self.known[key]


def score(rows: Sequence[dict[str, str]], case: Case, predictors: Predictors) -> dict[str, Any]:
    """Predict a configuration and set it beside the median of what was measured."""
    family = rows[0]["family"]
    as_source = family in _REPEATS_HEADS
    with as_measured() if as_source else contextlib.nullcontext():
        prediction = predictors.of(case, as_source=as_source).predict(case.config)
    speed = prediction.tokens_per_s
    assert speed is not None
    measured = [float(row["tokens_per_s"]) for row in rows]
    config = case.config
    return {
        "rows": [row["row_id"] for row in rows],
        "family": family,
        "card": case.card,
        "complete": all(row["complete"] == "1" for row in rows),
        "model": config.model.split("/")[-1],
        "method": config.method,
        "attention": config.attention,
        "tokens": f"{config.micro_batch} x {config.seq_len}",
        "measured": round(statistics.median(measured), 1),
        "spread": round(max(measured) / min(measured), 3),
        "predicted": round(speed.value, 1),
        "low": round(speed.low, 1),
        "high": round(speed.high, 1),
        "ratio": round(speed.value / statistics.median(measured), 3),
    }


def summary(scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return rank correlation and errors of some points."""
    ratios = [row["ratio"] for row in scored]
    errors = sorted(ratios, key=lambda ratio: abs(math.log(ratio)))
    result: dict[str, Any] = {
        "points": len(scored),
        "rows": sum(len(row["rows"]) for row in scored),
        "median_ratio": round(statistics.median(ratios), 3),
        "median_abs_log_error": round(statistics.median(abs(math.log(r)) for r in ratios), 3),
        "worst_ratio": errors[-1],
        "share_within_interval": round(
            sum(row["low"] <= row["measured"] <= row["high"] for row in scored) / len(scored), 3
        ),
    }
    if len(scored) > 2:
        rank = spearmanr([r["measured"] for r in scored], [r["predicted"] for r in scored])
        result["spearman"] = round(float(rank.statistic), 3)
    return result


def summaries(scored: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the summary of each card, of each family on it, and of each method in that."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in scored:
        names = [f"{row['card']}, incomplete rows"]
        if row["complete"]:
            family = f"{row['card']}, {row['family']}"
            names = [row["card"], family, f"{family}, {row['method']}"]
        for name in names:
            groups.setdefault(name, []).append(row)
    return {name: summary(groups[name]) for name in sorted(groups)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--cache", type=Path, help="file that keeps traces between runs")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/published_throughput.json")
    )
    arguments = parser.parse_args()
    rows, cases, reasons = read(arguments.csv)
    predictors = Predictors(arguments.cache)
    scored = []
    for measured, case in points(cases):
        scored.append(score(measured, case, predictors))
        print(json.dumps(scored[-1]), flush=True)
    result = {
        "assumptions": ASSUMPTIONS,
        "rows": len(rows),
        "rows_pinned": _count(cases),
        "rows_left_out": reasons,
        "summary": summaries(scored),
        "points": scored,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "points"}, indent=1))


def _count(cases: Sequence[tuple[dict[str, str], Case]]) -> dict[str, int]:
    names = (f"{case.card}, {row['family']}, tier {row['tier']}" for row, case in cases)
    return dict(sorted(collections.Counter(names).items()))


if __name__ == "__main__":
    main()
