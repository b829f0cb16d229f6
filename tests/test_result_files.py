from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_training import config_of, run

from lora_advisor.advisor.loss_picture import draw_loss
from lora_advisor.advisor.markdown import fenced, plain, table
from lora_advisor.advisor.model_card import loading, model_card
from lora_advisor.advisor.outcome import Predicted, TrainingResult
from lora_advisor.advisor.result_files import write_card, write_samples
from lora_advisor.advisor.samples import Sample, sample
from lora_advisor.probes.architectures import resolve_architecture
from lora_advisor.probes.config import LoraShape, RunConfig
from lora_advisor.probes.dataset import read_examples
from lora_advisor.probes.finetune import Schedule, build_trainer
from lora_advisor.probes.tokens import load_tokenizer, split_holdout, tokenize
from lora_advisor.probes.weights import load_model

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that transformers calls deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SETTINGS = {"epochs": 1.0, "max_steps": 12, "learning_rate": 5e-3, "holdout": 0.1, "seed": 0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A training, and what it leaves."""
    folder = tmp_path_factory.mktemp("run")
    promised = Predicted(padded_tokens_per_s=1000.0, peak_bytes=2**30, train_seconds=None)
    made = run(config_of(tiny), tiny / "rows.jsonl", folder, predicted=promised)
    model, tokenizer = (
        with_adapter(tiny, made.adapter),
        load_tokenizer(resolve_architecture(str(tiny))),
    )
    write_samples(model, tokenizer, held_rows(tiny), folder)
    write_card(made, folder, settings=SETTINGS)
    return made


def with_adapter(base: Path, adapter: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter))


def held_rows(tiny: Path) -> Sequence[Mapping[str, list[int]]]:
    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    rows = tokenize(read_examples(tiny / "rows.jsonl"), tokenizer, 96).rows
    return split_holdout(rows, 0.1, seed=0)[1]


def trainer_of(config: RunConfig, folder: Path, rows: Sequence[Mapping[str, list[int]]]) -> Any:
    from transformers import set_seed

    architecture = resolve_architecture(config.model)
    set_seed(0)
    return build_trainer(
        config,
        load_model(config, architecture, "cpu"),
        rows=rows,
        tokenizer=load_tokenizer(architecture),
        schedule=Schedule(max_steps=2, learning_rate=5e-3, output_dir=str(folder)),
        device="cpu",
    )


def card_of(result: TrainingResult) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard.load(result.adapter / "README.md")


def test_the_card_replaces_that_of_peft_and_has_valid_front_matter(result: TrainingResult) -> None:
    card = card_of(result)
    data: dict[str, Any] = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert data["tags"] == ["lora", "lora-advisor", "sft"]
    assert "base_model" not in data  # a folder is no model of the hub
    assert "More Information Needed" not in card.text
    assert (result.adapter / "adapter_config.json").is_file()


def test_the_card_records_configuration_data_stack_and_command(result: TrainingResult) -> None:
    text = card_of(result).text
    written = json.loads(re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)[0])
    assert RunConfig.from_json(written) == result.config.replace(
        model=Path(result.config.model).name
    )
    assert result.data_sha256 in text and "rows.jsonl" in text
    assert result.stack.transformers in text and result.stack.peft in text
    assert (
        "lora-advisor train plan.json --data rows.jsonl --output run --epochs 1.0 --max-steps 12 "
        "--learning-rate 0.005 --holdout 0.1 --seed 0"
    ) in text
    assert f"{result.eval_loss_before:.4f}" in text and f"{result.eval_loss_after:.4f}" in text
    first, last = result.losses[0], result.losses[-1]
    for step, loss in (first, last):
        assert re.search(rf"\| {step} +\| {loss:.4f} ", text)


def test_the_card_names_no_path_of_the_machine(result: TrainingResult, tiny: Path) -> None:
    text = (result.adapter / "README.md").read_text("utf-8")
    for folder in (tiny.parent, result.adapter.parent, Path.home()):
        assert str(folder) not in text


def test_what_was_predicted_stands_beside_what_came_with_the_error(result: TrainingResult) -> None:
    text = card_of(result).text
    speed = result.measured.padded_tokens_per_s
    assert speed is not None
    row = next(line for line in text.splitlines() if line.startswith("| tokens/s"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["1,000", f"{speed:,.0f}", f"{(speed - 1000) / 1000:+.1%}"]
    seconds = next(line for line in text.splitlines() if line.startswith("| time of the steps"))
    assert seconds.count("unknown") == 2  # what was not promised has no error


def test_the_card_says_how_to_load_it_and_that_works(
    result: TrainingResult, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    code = re.findall(r"```python\n(.*?)\n```", card_of(result).text, re.DOTALL)[0]
    assert code == loading(result)
    lines = [line for line in code.splitlines() if "from_pretrained" in line]
    assert len(lines) == 3  # base and adapter, and the tokenizer
    (tmp_path / tiny.name).symlink_to(tiny)  # a local base stands there by its folder's name
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(result.adapter)), names)
    ids = names["tokenizer"]("What is 5?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loaded = names["model"](ids).logits
        expected = with_adapter(tiny, result.adapter)(ids).logits
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_a_quantised_base_is_loaded_as_it_was_trained_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import PeftModel

    made = run(config_of(tiny, method="qlora"), tiny / "rows.jsonl", tmp_path / "run", max_steps=2)
    (tmp_path / tiny.name).symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(loading(made, folder="run/adapter"), names)
    base: Any = load_model(made.config, resolve_architecture(str(tiny)), "cpu")
    trained = PeftModel.from_pretrained(base, str(made.adapter))
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = trained.eval()(ids).logits
        # On some CPUs bitsandbytes computes inference otherwise (weights.keep_trainable).
        torch.testing.assert_close(names["model"].eval()(ids).logits, expected, rtol=0, atol=0.02)
        wide = with_adapter(tiny, made.adapter)(ids).logits
    assert (wide - expected).abs().max() > 0.04


def test_a_hub_model_is_named_as_its_base(result: TrainingResult) -> None:
    from huggingface_hub import ModelCard

    config = result.config.replace(model="Qwen/Qwen2.5-1.5B", trainer="trl", loss="fused")
    changed = dataclasses.replace(result, config=config, data=Path("hub:owner/rows"))
    card: Any = ModelCard(model_card(changed, (), picture=None).content)
    data = card.data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("Qwen/Qwen2.5-1.5B", ["owner/rows"])
    assert "base_model:adapter:Qwen/Qwen2.5-1.5B" in data["tags"] and "trl" in data["tags"]


NASTY = "a|b `c` <script>alert(1)</script> ```` [x](http://y) $z$ \x1b[31m\n---\n# no heading"


def test_text_of_users_is_never_markup(result: TrainingResult) -> None:
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    said = Sample(prompt=NASTY, reference="x", base=None, tuned="y\ud800")
    changed = dataclasses.replace(result, data=Path("/home/someone") / NASTY.replace("/", "_"))
    content = model_card(changed, (said,), picture="loss.png").content
    assert "/home/someone" not in content
    content.encode()  # halves of characters are written out
    card: Any = ModelCard(content)
    assert "datasets" not in card.data.to_dict()
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    kinds = {token.type for token in tokens} | {
        child.type for token in tokens for child in token.children or ()
    }
    assert not kinds & {"html_block", "html_inline", "link_open", "hr"}
    assert NASTY.replace("\x1b", "\\x1b") + "\n" in [t.content for t in tokens if t.type == "fence"]
    headings = [t.content for before, t in itertools.pairwise(tokens)
                if before.type == "heading_open"]  # fmt: skip
    assert not any("no heading" in heading for heading in headings)
    cells = [token.children for before, token in itertools.pairwise(tokens)
             if before.type == "td_open" and "script" in token.content]  # fmt: skip
    read = "".join(child.content for child in cells[0] or ())
    assert read == " ".join(NASTY.replace("/", "_").replace("\x1b", "\\x1b").split())


def test_markdown_helpers_keep_short_text_as_it_is() -> None:
    assert plain("rows 1.jsonl") == "rows 1.jsonl"
    assert fenced("a ``` b").splitlines()[0] == "````text"
    assert table([["x|y", 1]], ["", ""]).splitlines()[-1].count(r"\|") == 1


def test_samples_are_the_greedy_answers_of_base_and_tuned_model(
    result: TrainingResult, tiny: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    held = held_rows(tiny)
    written = json.loads((result.adapter.parent / "samples.json").read_text())["samples"]
    assert len(written) == 3
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    def greedy(model: Any, ids: list[int]) -> str:
        said: list[int] = []
        for _ in range(64):  # without a cache, a whole pass for each token
            with torch.no_grad():
                token = int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax())
            said.append(token)
            if token == tokenizer.eos_token_id:
                break
        return str(tokenizer.decode(said, skip_special_tokens=True)).strip()

    for row, one in zip(held, written, strict=False):
        start = next(place for place, label in enumerate(row["labels"]) if label != -100)
        question, answer = row["input_ids"][:start], row["input_ids"][start:]
        assert one["base"] == greedy(base, question)
        assert "What is" in one["prompt"] and "<|im_start|>" not in one["prompt"]
        assert one["reference"] == str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    tuned = with_adapter(tiny, result.adapter)
    start = next(place for place, label in enumerate(held[0]["labels"]) if label != -100)
    assert written[0]["tuned"] == greedy(tuned, held[0]["input_ids"][:start])
    assert written[0]["tuned"] != written[0]["base"]
    assert "Tuned:" in (result.adapter.parent / "samples.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": "trl", "loss": "fused", "precision": "bf16", "checkpointing": "full"},
        {"method": "qlora", "checkpointing": "full"},
        {"method": "full", "lora": None},
    ],
    ids=["trl", "qlora", "full"],
)
def test_a_model_is_left_as_it_was_by_its_samples(
    tmp_path: Path, tiny: Path, changes: dict[str, Any]
) -> None:
    import torch
    from transformers import set_seed

    trained, flags = [], []
    rows = held_rows(tiny)
    for sampled in (False, True):
        trainer = trainer_of(config_of(tiny, **changes), tmp_path, rows)
        model = trainer.model
        model.train()
        if sampled:
            made = sample(model, trainer.processing_class, rows, count=2, answer_tokens=4)
            assert [one.base is None for one in made] == [changes.get("method") == "full"] * 2
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        flags.append(
            (
                [module.training for module in model.modules()],
                [parameter.requires_grad for parameter in model.parameters()],
                base.config.use_cache,
                base.generation_config.to_dict(),
                model.generation_config.to_dict(),
            )
        )
        set_seed(0)
        trainer.train()
        trained.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert flags[0] == flags[1]
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=0)


# torch's compiler, when it is imported, warns of torch's own torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_compiled_layers_are_not_compiled_anew_for_every_token(tmp_path: Path, tiny: Path) -> None:
    from torch._dynamo.utils import counters

    config = config_of(
        tiny, compile="layers", lora=LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear")
    )
    trainer = trainer_of(config, tmp_path, held_rows(tiny))
    counters.clear()
    made = sample(trainer.model, trainer.processing_class, held_rows(tiny), answer_tokens=8)
    assert len(made) == 3
    assert not counters["frames"]


def test_texts_and_pairs_are_sampled_too(result: TrainingResult, tiny: Path) -> None:
    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    ids = tokenizer("It is a long text that goes on and on for some time.")["input_ids"]
    text = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    pair = {"prompt_ids": ids[:5], "chosen_ids": ids[5:9], "rejected_ids": ids[9:]}
    model = with_adapter(tiny, result.adapter)
    beginning, chosen = sample(model, tokenizer, [text, pair], answer_tokens=3)
    assert beginning.prompt == "It is a long text that goe"
    assert beginning.reference == "s o"
    assert (chosen.prompt, chosen.reference) == ("It is", "a")


def test_a_model_that_cannot_answer_loses_nothing(
    result: TrainingResult, tiny: Path, tmp_path: Path
) -> None:
    import torch

    class Broken(torch.nn.Module):
        """A model that has no generate."""

    shutil.copytree(result.adapter, tmp_path / "adapter")
    shutil.copy(result.adapter.parent / "samples.md", tmp_path)  # of an earlier training
    moved = dataclasses.replace(result, adapter=tmp_path / "adapter")
    tokenizer = load_tokenizer(resolve_architecture(str(tiny)))
    write_samples(Broken(), tokenizer, held_rows(tiny), tmp_path)
    write_card(moved, tmp_path)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "Unknown: AttributeError" in text
    assert "Learning rate, passes and seed are unknown" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "samples.json"]
    (tmp_path / "samples.json").unlink()
    write_card(moved, tmp_path)
    assert "Unknown: none were made" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_picture_shows_the_losses(result: TrainingResult, tmp_path: Path) -> None:
    import matplotlib.image

    drawn = matplotlib.image.imread(result.adapter / "loss.png")
    assert drawn.shape == (600, 1050, 4)
    draw_loss(dataclasses.replace(result, losses=()), tmp_path / "empty.png")
    assert (drawn != matplotlib.image.imread(tmp_path / "empty.png")).any()
    without = dataclasses.replace(result, losses=(), eval_loss_before=None, eval_loss_after=None)
    text = model_card(without, (), picture=None).content
    assert "No loss was logged." in text and "None: no rows were held out." in text
    assert re.search(r"\| hold-out after +\| unknown", text)
