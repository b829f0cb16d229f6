"""Read which keys the trainers of others take out of their released packages.

    mkdir wheels && cd wheels
    pip download --no-deps --python-version 3.12 --only-binary=:all: axolotl==0.21.0 \\
        llamafactory==0.9.5 unsloth==2026.10.9
    pip download --no-deps transformers==5.6.0
    pip download --no-deps transformers==5.17.0
    pip download --no-deps trl==1.15.0
    cd .. && python benchmarks/foreign_keys.py wheels > advisor/foreign_keys.json

transformers 5.6.0 is the newest that LLaMA-Factory 0.9.5 takes; transformers 5.17.0 and trl 1.15.0
are those of Unsloth 2026.10.9. Nothing of the packages is run: their source is read, names of
fields and of arguments are kept, no code.
"""

from __future__ import annotations

import argparse
import ast
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Classes = dict[str, ast.ClassDef]


def wheel_of(folder: Path, name: str, version: str | None = None) -> tuple[zipfile.ZipFile, str]:
    found = sorted(folder.glob(f"{name}-{version or '*'}-*.whl"))
    if len(found) != 1:
        raise SystemExit(f"{folder} must hold one wheel of {name} {version or ''}, not {found}")
    return zipfile.ZipFile(found[0]), found[0].name.split("-")[1]


def modules(wheel: zipfile.ZipFile, *starts: str) -> Iterator[ast.Module]:
    for name in sorted(wheel.namelist()):
        if name.endswith(".py") and name.startswith(starts):
            yield ast.parse(wheel.read(name))


def classes_in(wheel: zipfile.ZipFile, *starts: str) -> Classes:
    return {
        node.name: node
        for module in modules(wheel, *starts)
        for node in module.body
        if isinstance(node, ast.ClassDef)
    }


def fields_of(name: str, classes: Classes) -> set[str]:
    """Return the annotated fields of a class and of its bases, as far as they are known."""
    node = classes.get(name)
    if node is None:
        return set()
    found: set[str] = set()
    for base in node.bases:
        if isinstance(base, ast.Name):
            found |= fields_of(base.id, classes)
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found |= {part.target.id, *aliases(part)}
    return {field for field in found if not field.startswith("_") and field != "model_config"}


def aliases(part: ast.AnnAssign) -> set[str]:
    """Return other names under which pydantic takes a field."""
    if not isinstance(part.value, ast.Call):
        return set()
    return {
        word.value.value
        for word in part.value.keywords
        if word.arg in ("alias", "validation_alias")
        and isinstance(word.value, ast.Constant)
        and isinstance(word.value.value, str)
    }


def arguments_of(classes: Classes, name: str, method: str) -> set[str]:
    for part in classes[name].body:
        if isinstance(part, ast.FunctionDef) and part.name == method:
            words = [*part.args.args, *part.args.kwonlyargs]
            return {word.arg for word in words} - {"self", "cls", "model"}
    raise SystemExit(f"{name} has no {method}")


def axolotl(folder: Path) -> dict[str, Any]:
    wheel, version = wheel_of(folder, "axolotl")
    keys = fields_of("AxolotlInputConfig", classes_in(wheel, "axolotl/utils/schemas/"))
    for name in sorted(wheel.namelist()):
        if name.startswith("axolotl/integrations/") and name.endswith("/args.py"):
            plugin = classes_in(wheel, name)
            keys |= {
                key for kind in plugin if kind.endswith("Args") for key in fields_of(kind, plugin)
            }
    return {"version": version, "with": pins(wheel, "transformers", "trl"), "keys": sorted(keys)}


def llamafactory(folder: Path) -> dict[str, Any]:
    wheel, version = wheel_of(folder, "llamafactory")
    hf, hf_version = wheel_of(folder, "transformers", "5.6.0")
    names = ("transformers/training_args.py", "transformers/training_args_seq2seq.py")
    own = classes_in(wheel, "llamafactory/hparams/")
    own["Training_Arguments"] = own.pop("TrainingArguments")  # transformers has one of that name
    known = {**own, **classes_in(hf, *names)}
    known["BaseTrainingArguments"] = known["Seq2SeqTrainingArguments"]
    kinds = ("Model", "Data", "Finetuning", "Generating", "Training_")
    keys = set().union(*(fields_of(f"{kind}Arguments", known) for kind in kinds))
    return {"version": version, "with": {"transformers": hf_version}, "keys": sorted(keys)}


def unsloth(folder: Path) -> dict[str, Any]:
    wheel, version = wheel_of(folder, "unsloth")
    hf, hf_version = wheel_of(folder, "transformers", "5.17.0")
    trl, trl_version = wheel_of(folder, "trl", "1.15.0")
    known = {
        **classes_in(hf, "transformers/training_args.py"),
        **classes_in(trl, "trl/trainer/base_config.py", "trl/trainer/sft_config.py"),
    }
    loader = classes_in(wheel, "unsloth/models/loader.py")
    llama = classes_in(wheel, "unsloth/models/llama.py")
    return {
        "version": version,
        "with": {"transformers": hf_version, "trl": trl_version},
        "from_pretrained": sorted(arguments_of(loader, "FastLanguageModel", "from_pretrained")),
        "get_peft_model": sorted(arguments_of(llama, "FastLlamaModel", "get_peft_model")),
        "SFTConfig": sorted(fields_of("SFTConfig", known)),
    }


def pins(wheel: zipfile.ZipFile, *names: str) -> dict[str, str]:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    found = {}
    for line in lines:
        for name in names:
            start = f"Requires-Dist: {name}=="
            if line.startswith(start):
                found[name] = line.removeprefix(start).split(";")[0].strip()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path)
    folder = parser.parse_args().wheels
    every = {kind.__name__: kind(folder) for kind in (axolotl, llamafactory, unsloth)}
    lines = [f"{json.dumps(name)}: {json.dumps(keys)}" for name, keys in every.items()]
    print("{" + ",\n".join(lines) + "}")


if __name__ == "__main__":
    main()
