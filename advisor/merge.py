"""Merge an adapter into its base: a full model that needs no peft.

Weights are read one by one and written file by file, so that no more is held than one file of the
result. Adapters other than plain LoRA on stored weights (DoRA, say, or a model whose files name
weights otherwise than its modules) are merged by peft, the model in memory as a whole.

An adapter trained on a 4-bit base is merged into the unquantised one, whose weights are not quite
those it was trained on: how far that moves the logits is measured. What is written is read again
and compared with base and adapter before the result gets its name.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advisor.advisor.merge_check import Difference, difference, logits, prompts_for
from lora_advisor.advisor.merge_plan import BESIDE_BYTES, MergePlan, check_output, check_room, gb
from lora_advisor.advisor.stored_weights import SIZES, torch_type
from lora_advisor.probes.errors import AdvisorError, DataError, OutputError

if TYPE_CHECKING:
    import torch

#: Root mean square of the logits' differences, over their spread, that rounding the weights to a
#: type may make; measured on SmolLM2-135M: 0.03, 0.003 and 0.000004. A merge that goes wrong is off
#: by what the adapter does (there 0.4).
TOLERANCE = {"bf16": 0.1, "fp16": 0.02, "fp32": 0.001}
#: Bytes of a number in 4 bits with its constants, those of double quantisation left out
#: (bitsandbytes' blocks of 64 share 4 bytes).
_QUANTISED_BYTES = 0.5625


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merge that has ended.

    Attributes:
        output: Folder of the full model.
        dtype: Type of its weights.
        changed: Weights the adapter changed; None where peft merged.
        check: The written model against base and adapter.
        effect: The base against base and adapter: what the adapter does.
        quantised: The written model against the adapter on the 4-bit base it was trained on; None
            where it was trained on 16 bits, or that is not known.
        quantised_unknown: Why `quantised` is not known, where it should be.
    """

    output: Path
    dtype: str
    changed: int | None
    check: Difference
    effect: Difference
    quantised: Difference | None
    quantised_unknown: str | None


def merge(plan: MergePlan, output: Path, *, say: Callable[[str], None] = lambda _: None) -> Merged:
    """Write the full model, read it again, compare it, and give it its name.

    Args:
        plan: What to merge.
        output: Folder of the result, new or empty.
        say: Told what is being done.

    Raises:
        AdvisorError: There is no room, or what was written is not what base and adapter say.
    """
    check_output(output)
    check_room(plan, output)
    beside = output.absolute().with_name(f".{output.absolute().name}.merging")
    shutil.rmtree(beside, ignore_errors=True)  # of a merge that was interrupted
    try:
        beside.mkdir()
        if plan.low_ranks is None:
            say("merging in memory: this adapter is no plain LoRA on stored weights")
            _merge_whole(plan, beside)
        else:
            say(f"merging {len(plan.low_ranks)} of {len(plan.weights.tensors)} weights, one by one")
            _merge_stored(plan, beside)
        _save_beside_weights(plan, beside)
        say("comparing what was written with base and adapter")
        merged = _compare(plan, beside, output, say)
        if output.exists():
            output.rmdir()  # it is empty
        beside.replace(output)
    except OSError as error:
        raise OutputError(f"`{output}` must take the model, but {error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return merged


def _merge_stored(plan: MergePlan, folder: Path) -> None:
    """Write the weights file by file, those of the adapter's modules changed."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    weights = plan.weights
    sizes = {
        name: torch.empty(tensor.shape, dtype=_result_type(plan, name), device="meta")
        for name, tensor in weights.tensors.items()
    }
    split = split_torch_state_dict_into_shards(
        sizes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=plan.shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: _merged(plan, name) for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _result_type(plan: MergePlan, name: str) -> torch.dtype:
    """Return the type of a weight of the result; of one that is no float, as torch reads it."""
    kind = plan.weights.type_of(name, plan.dtype)
    return torch_type(kind) if kind in SIZES else plan.weights.read(name).dtype


def _merged(plan: MergePlan, name: str) -> torch.Tensor:
    """Return a weight of the result, rounded once."""
    assert plan.low_ranks is not None
    kind, weight = _result_type(plan, name), plan.weights.read(name)
    if name in plan.low_ranks:
        weight = weight.float() + plan.low_ranks[name].delta()
    made = weight.to(kind).contiguous()
    if name in plan.low_ranks and not made.isfinite().all():
        raise DataError(
            f"the merged weights must be finite, but {name} in {plan.dtype} is not; give --dtype "
            "bf16 or fp32, or train anew."
        )
    return made


def _merge_whole(plan: MergePlan, folder: Path) -> None:
    """Let peft merge the model in memory, for adapters and files of other forms."""
    model = _with_adapter(plan, plan.dtype)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(folder), max_shard_size=plan.shard_bytes)


def _with_adapter(plan: MergePlan, dtype: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_base(plan, dtype), str(plan.adapter.folder))


def _base(plan: MergePlan, dtype: str) -> Any:
    """Return the base model; in the type its files have it is mapped from them, and takes little.

    Raises:
        DataError: transformers cannot read it.
    """
    assert plan.base.weights is not None
    return _load(Path(plan.base.weights), dtype)


def _load(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch_type(dtype), use_safetensors=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"`{folder}` must be a model that transformers loads, but {reason}"
        ) from None


def _save_beside_weights(plan: MergePlan, folder: Path) -> None:
    """Write configuration, tokenizer and chat template."""
    from transformers import AutoConfig, AutoTokenizer

    assert plan.base.weights is not None
    source = Path(plan.base.weights)
    if plan.low_ranks is not None:
        config = AutoConfig.from_pretrained(str(source))
        config.dtype = torch_type(plan.dtype)
        config.save_pretrained(str(folder))
        generation = source / "generation_config.json"
        if generation.is_file():
            shutil.copy(generation, folder)
    own = (plan.adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(plan.adapter.folder if own else source))
    tokenizer.save_pretrained(str(folder))


def _compare(plan: MergePlan, folder: Path, output: Path, say: Callable[[str], None]) -> Merged:
    """Compare the written model with base and adapter.

    Raises:
        AdvisorError: They do not say the same.
    """
    from transformers import AutoTokenizer

    prompts = prompts_for(AutoTokenizer.from_pretrained(str(folder)), plan.adapter.run)
    model = _with_adapter(plan, plan.weights.dtype)
    tuned = logits(model, prompts)
    with model.disable_adapter():
        base = logits(model, prompts)
    del model
    gc.collect()
    written = logits(_load(folder, plan.dtype), prompts)
    check = difference(tuned, written)
    allowed = TOLERANCE[plan.dtype]
    if not check.relative <= allowed:
        raise AdvisorError(
            f"the merged model must say what base and adapter say, but its logits are off by "
            f"{check.relative:.3f} of their spread, more than the {allowed} of rounding; nothing "
            "was kept."
        )
    quantised, unknown = _quantised(plan, prompts, written, say)
    return Merged(
        output=output,
        dtype=plan.dtype,
        changed=None if plan.low_ranks is None else len(plan.low_ranks),
        check=check,
        effect=difference(tuned, base),
        quantised=quantised,
        quantised_unknown=unknown,
    )


def _quantised(
    plan: MergePlan,
    prompts: list[list[int]],
    written: list[torch.Tensor],
    say: Callable[[str], None],
) -> tuple[Difference | None, str | None]:
    """Compare the written model with the adapter on the 4-bit base it was trained on."""
    from importlib.util import find_spec

    import psutil
    from peft import PeftModel

    from lora_advisor.probes.weights import load_model

    if plan.adapter.quantised is None or plan.adapter.result is None:
        return None, None
    if find_spec("bitsandbytes") is None:
        return None, "bitsandbytes is not installed"
    needed, free = _quantised_bytes(plan), int(psutil.virtual_memory().available)
    if needed > free:
        return None, f"it needs {gb(needed)} of memory, and {gb(free)} are free"
    say(f"comparing it with the adapter on the {plan.adapter.quantised} base it was trained on")
    config = plan.adapter.result.config
    if config.attention == "flash_attention_2":  # has no form for CPUs
        config = config.replace(attention="sdpa")
    model: Any = load_model(config, plan.base, "cpu")
    trained = PeftModel.from_pretrained(model, str(plan.adapter.folder))
    return difference(logits(trained, prompts), written), None


def _quantised_bytes(plan: MergePlan) -> int:
    """Return about what the model takes in 4 bits: its embeddings and head stay as they are."""
    counts = [tensor.count for tensor in plan.weights.tensors.values()]
    return BESIDE_BYTES + int(sum(counts) * _QUANTISED_BYTES) + 4 * max(counts)
