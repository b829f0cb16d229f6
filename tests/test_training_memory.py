"""Memory that really runs out: the kernel refuses the allocation, and the training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model

from lora_advisor.advisor.training import TrainingResult

#: What glibc lays by for each thread, and keeps of blocks below 32 MB, would count as taken.
_PLAIN_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}

#: A process that trains, and from step 6 on may take `ROOM` MB more than it holds.
#:
#: Logits of 8 rows take some 8 x 58 x 32,000 x 4 bytes = 59 MB, and a step holds three such tensors
#: at its peak: logits, their log-softmax, and its gradient. Each is so large that the allocator
#: asks the kernel for it, and gives it back when it dies.
SQUEEZED = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_training, torch
import lora_advisor.advisor.watch
from lora_advisor.probes.config import LoraShape
lora_advisor.advisor.watch.REPORT_S = 0.0
torch.set_num_threads(1)
model, output, room = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

def told(progress):
    if progress.step == 6 and room and not (output / "squeezed").exists():
        (output / "squeezed").touch()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + room * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

config = tiny_training.config_of(
    model, micro_batch=8, accumulation=1,
    lora=LoraShape(r=4, alpha=8, dropout=0.0, targets="all-linear"),
)
tiny_training.run(config, model / "rows.jsonl", output, progress=told, check_rows=0)
"""


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that is nearly all vocabulary, its tokenizer and data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wordy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_model.save_tokenizer(folder)
    tiny_model.save_rows(folder / "rows.jsonl", count=80)
    return folder


def trained(model: Path, output: Path, *, room: int) -> TrainingResult:
    ended = subprocess.run(
        [sys.executable, "-c", SQUEEZED, str(Path(__file__).parent), model, output, str(room)],
        env={**os.environ, **_PLAIN_MALLOC, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return TrainingResult.from_json(json.loads((output / "result.json").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_really_runs_out_costs_speed_and_nothing_else(
    tmp_path: Path, wordy: Path
) -> None:
    plain = trained(wordy, tmp_path / "a", room=0)
    result = trained(wordy, tmp_path / "b", room=120)

    assert plain.recoveries == ()
    (recovery,) = result.recoveries
    assert recovery.after_step == 4
    assert (recovery.micro_batch, recovery.new_micro_batch, recovery.new_accumulation) == (8, 4, 2)
    assert result.steps == plain.steps == 12
    # The same rows in each step: the losses differ by the order of a sum.
    assert [step for step, _ in result.losses] == [step for step, _ in plain.losses]
    for (_, squeezed), (_, loss) in zip(result.losses, plain.losses, strict=True):
        assert squeezed == pytest.approx(loss, rel=1e-4)
    assert result.eval_loss_after == pytest.approx(plain.eval_loss_after, rel=1e-4)
