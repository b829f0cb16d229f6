"""How an exported script reads the plan's data: the loading, and a mapping where one is needed."""

from __future__ import annotations

from typing import Any

from lora_advisor.advisor.export_words import NO_DATA, Recipe, literal

#: Builders of `datasets` by the end of a file's name.
_BUILDERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
#: Columns that hold a question and its answer, by shape.
PAIRS = {
    "question/answer": ("question", "answer"),
    "instruction": ("instruction", "output"),
    "instruction/response": ("instruction", "response"),
    "prompt/response": ("prompt", "response"),
    "HumanEval": ("prompt", "canonical_solution"),
    "input/output": ("input", "output"),
}
#: A second column that belongs to the question, where a row has it.
_MORE = {"instruction": "input", "instruction/response": "context"}

_AS_PAIR = '''

def as_pair(row, chat):
    """Turn a row into a prompt and its completion, of which the latter is trained."""
    prompt = row[{question}]{more}
    if not chat:
        return {{"prompt": prompt, "completion": row[{answer}]}}
    return {{
        "prompt": [{{"role": "user", "content": prompt}}],
        "completion": [{{"role": "assistant", "content": row[{answer}]}}],
    }}
'''

_AS_MESSAGES = '''

ROLES = {roles}


def as_messages(row):
    """Turn the turns of a ShareGPT row into messages."""
    return {{
        "messages": [
            {{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}}
            for turn in row["conversations"]
        ]
    }}
'''


def loading(recipe: Recipe) -> str:
    """Return the source of the call that loads the data."""
    data = recipe.data or NO_DATA
    if data.startswith("hub:"):
        name, *more = data.removeprefix("hub:").split(":")
        split = more[1] if len(more) > 1 else "train"
        config = f", {literal(more[0])}" if more and more[0] else ""
        return f"load_dataset({literal(name)}{config}, split={literal(split)})"
    end = data.removesuffix(".gz").lower()
    builder = next((kind for suffix, kind in _BUILDERS.items() if end.endswith(suffix)), "json")
    tabs = ', sep="\\t"' if end.endswith(".tsv") else ""
    return f'load_dataset({literal(builder)}, data_files=DATA, split="train"{tabs})'


def mapping(recipe: Recipe) -> tuple[str, str]:
    """Return the source of a function that makes rows TRL knows, and of the call that applies it.

    Both are empty where the rows are known as they are.
    """
    shape = recipe.shape
    if shape in PAIRS:
        question, answer = PAIRS[shape]
        second = _MORE.get(shape)
        more = (
            f' + ("\\n\\n" + row[{literal(second)}] if row.get({literal(second)}) else "")'
            if second
            else ""
        )
        function = _AS_PAIR.format(question=literal(question), answer=literal(answer), more=more)
        call = (
            "rows = rows.map(\n        as_pair,\n        fn_kwargs={'chat': tokenizer.chat_template"
            " is not None},\n        remove_columns=rows.column_names,\n    )"
        )
        return function, call.replace("'chat'", '"chat"')
    if shape == "ShareGPT":
        from lora_advisor.probes.turns import ROLES

        call = "rows = rows.map(as_messages, remove_columns=rows.column_names)"
        return _AS_MESSAGES.format(roles=literal(ROLES)), call
    if shape == "content":
        return "", 'rows = rows.rename_column("content", "text")'
    return "", ""


def shape_of_data(data: str | None, stage: str) -> str | None:
    """Return the shape of a plan's data; None where it cannot be read here, or is of pairs."""
    from lora_advisor.probes.dataset import read_examples
    from lora_advisor.probes.errors import AdvisorError

    if data is None or stage == "dpo" or data.startswith("hub:"):
        return None
    try:
        path: Any = data
        return read_examples(path).shape
    except AdvisorError:
        return None
