"""Micro-batches that are recorded once as a CUDA graph and replayed.

A step is thousands of kernels, each launched by Python code; a fast card, or one in a busy host,
waits for them. A CUDA graph launches all kernels of a micro-batch, forward and backward, with one
call (docs.pytorch.org, "CUDA Graphs", whole-network capture). A replay repeats the same kernels on
the same addresses, so

* what differs between micro-batches is copied into tensors that stay: tokens, labels, the number of
  trained tokens in a step, embeddings that the host has looked up;
* gradients stay where they are and are set to zero instead of being dropped;
* a shape runs as it is until an optimizer step is made, in which libraries load and choose kernels
  and layers are compiled; then it is recorded, in memory of the graphs' own;
* trained tokens are counted in a few sizes (`one_pass_trainer.CountingCollator`), a graph for each;
  what Python decides within a step must be the same for all that share a graph;
* graphs and their memory go before anything else needs it: a new shape, an evaluation, the end.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from lora_advisor.probes.errors import UNRECORDABLE, UnrecordableError
from lora_advisor.probes.one_pass_trainer import (
    ON_HOST,
    SCORED,
    HostTokens,
    Later,
    OnePassTrainer,
)
from lora_advisor.probes.padding_mask import leave_out_padding_mask
from lora_advisor.probes.worker import is_out_of_memory

#: Graphs that are kept at most: each takes memory of the card, beside what all of them share. Each
#: length that rows are padded to has its share of them, one for each size of its trained tokens.
_MOST = 16


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A micro-batch that can be replayed.

    Attributes:
        graph: Its kernels.
        inputs: The tensors that it reads, by name.
        items: Trained tokens of the optimizer step, that it divides by.
        rows: Looked-up embeddings, where the host holds them.
        loss: What it writes.
        metrics: What TRL wants to know, that it writes too.
        tokens: Its tokens that are no padding.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    items: torch.Tensor
    rows: torch.Tensor | None
    loss: torch.Tensor
    metrics: dict[str, list[Later]]
    tokens: Later


class GraphTrainer(OnePassTrainer):
    """The one-pass trainer with recorded micro-batches; on a CPU they run as they are.

    Attributes:
        replays: Micro-batches that were replayed so far.
    """

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        """Take what SFTTrainer takes, of a model whose rows are padded on the right."""
        lengths = -(-args.max_length // (args.pad_to_multiple_of or args.max_length))
        if args.packing:  # how full they are differs by an eighth or so (probes/packed_rows.py)
            lengths = 2
        self.sizes = max(1, _MOST // lengths)
        leave_out_padding_mask(model)  # a recording would take another path through the masks
        super().__init__(model, args, **kwargs)
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._run_in_step: dict[tuple[int, ...], int] = {}
        self._pool: Any = None
        self.replays = 0
        _keep_gradients(self.model)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Return the loss of a micro-batch, its gradients added to those there are."""
        alone = self.args.device.type == "cuda" and self.accelerator.num_processes == 1
        if not alone or num_items_in_batch is None:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        shape = tuple(inputs["input_ids"].shape)
        step = self.state.global_step
        if self._run_in_step.setdefault(shape, step) == step:
            self.let_go()
            return super().training_step(model, inputs, num_items_in_batch)
        # The auxiliary loss of a mixture of experts is divided by the step's micro-batches.
        parts = self.current_gradient_accumulation_steps if self.aux_loss_enabled else 0
        documents = inputs["cu_seq_lens_q"].numel() if "cu_seq_lens_q" in inputs else 0
        key = (*shape, inputs[SCORED], parts, documents)
        recorded = self._recorded.pop(key, None)
        if recorded is None:
            recorded = self._make_room_and_record(model, inputs, num_items_in_batch)
        self._recorded[key] = recorded  # the last one used comes last
        return self._replay(recorded, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with the memory that the graphs held."""
        self.let_go()
        return super().evaluate(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave no graph behind."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Give back the graphs and their memory."""
        if self._pool is not None:
            torch.cuda.synchronize()
            self._recorded.clear()
            self._pool = None
            torch.cuda.empty_cache()

    def _make_room_and_record(self, model: Any, inputs: dict[str, Any], items: Any) -> _Recorded:
        """Record a micro-batch, without the other graphs where their memory is needed."""
        if len(self._recorded) == _MOST:
            self._recorded.pop(next(iter(self._recorded)))
        model.train()  # an evaluation may be what came last
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        try:
            return self._record(model, inputs, items)
        except RuntimeError as error:
            if not self._recorded or not is_out_of_memory(error):
                raise
        self.let_go()
        return self._record(model, inputs, items)

    def _record(self, model: Any, inputs: dict[str, Any], items: Any) -> _Recorded:
        """Record a micro-batch; nothing of it is computed yet.

        Raises:
            UnrecordableError: It does something that cannot be recorded.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        held = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
        divisor = torch.as_tensor(items, device=self.args.device).clone()
        rows = self._looked_up(inputs)
        given = {} if rows is None else {ON_HOST: HostTokens(rows)}
        graph = torch.cuda.CUDAGraph()
        metrics, total = self._metrics["train"], vars(self)["_total_train_tokens"]
        self._metrics["train"], self._total_train_tokens = defaultdict(list), 0
        # The libraries' workspaces are the graph's own while it is recorded, or they would stay in
        # its memory for good (torch/_inductor/cudagraph_trees.py, `clear_cublas_manager`).
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads pin memory meanwhile, and kernels may be loaded.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
                loss = super().training_step(model, {**inputs, **held, **given}, divisor)
            found, tokens = self._metrics["train"], vars(self)["_total_train_tokens"]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UnrecordableError(
                f"{UNRECORDABLE} ({str(error).splitlines()[0]}); plan with --cuda-graph off."
            ) from error
        finally:
            self._metrics["train"], self._total_train_tokens = metrics, total
            torch._C._cuda_clearCublasWorkspaces()
        found.pop("num_tokens", None)
        return _Recorded(graph, held, divisor, rows, loss, dict(found), tokens)

    def _replay(self, recorded: _Recorded, inputs: dict[str, Any], items: Any) -> torch.Tensor:
        for name, tensor in recorded.inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)
        recorded.items.copy_(torch.as_tensor(items), non_blocking=True)
        rows = self._looked_up(inputs)
        if recorded.rows is not None and rows is not None:
            recorded.rows.copy_(rows, non_blocking=True)
        recorded.graph.replay()
        self.replays += 1
        kept = self._metrics["train"]
        for name, values in recorded.metrics.items():
            kept[name] += [value.copy() for value in values]
        total = vars(self)["_total_train_tokens"] + recorded.tokens.copy()
        self._total_train_tokens, kept["num_tokens"] = total, [total]
        return recorded.loss.clone()

    def _looked_up(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return the embeddings of a micro-batch where the host looks them up."""
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        look_up = getattr(base.get_input_embeddings(), "look_up", None)
        return None if look_up is None else look_up(inputs[ON_HOST].ids, self.args.device)


def _keep_gradients(model: Any) -> None:
    """Have the gradients of a model be set to zero where they are, instead of being dropped."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_zero_([parameter.grad for parameter in trained])

    model.zero_grad = zero_grad
