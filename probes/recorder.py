"""Note what a step allocates, releases and does, operation by operation."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import TYPE_CHECKING, Any

from lora_advisor.probes.cuda_semantics import answer, writes_in_place
from lora_advisor.probes.events import Event, Trace, Work
from lora_advisor.probes.finetune import decoder_layers
from lora_advisor.probes.kernel_costs import (
    FUSED_WORKSPACE,
    NO_KERNELS,
    Cost,
    describe,
    issued,
    product_workspace,
)

if TYPE_CHECKING:
    import torch


def _dispatch_mode() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


@functools.cache
def _device_of() -> Any:
    """Return the operation that asks a tensor of a class of its own for its device."""
    import torch

    return torch.ops.prim.device.default


class Recorder(_dispatch_mode()):  # type: ignore[misc]
    """Notes each storage when it first appears and when it dies, and the work of each operation."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let dynamo compile under this mode (`compiled_semantics`)."""
        return True

    def __init__(self, capability: str | None, *, as_graph: bool = False) -> None:
        """Start in the loading phase with nothing recorded.

        Args:
            capability: Of the card; None for a current one.
            as_graph: Whether forward and backward are replayed from a CUDA graph.
        """
        super().__init__()
        self.capability = capability
        self.as_graph = as_graph
        self.events: list[Event] = []
        self.work: dict[tuple[str, int], Work] = {}
        self.phase = "load"
        self.layer = -1
        self.closed = False
        self._known: dict[int, int] = {}  # storage's address -> block
        self._count = 0
        self._gone: set[int] = set()  # blocks that went to the host
        self._multiplied: set[tuple[str, int]] = set()  # which workspaces each thread has
        self._workspaces: list[int] = []
        #: Layers of an optimizer's parameters, by their number: foreach optimizers take lists.
        self.listed: dict[int, list[int]] = {}
        self._layer_of: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and note what it allocates."""
        kwargs = kwargs or {}
        if func is _device_of() and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # asked 10,000 times a trace; the long way takes a tenth
        if getattr(func, "namespace", None) in NO_KERNELS:
            return func(*args, **kwargs)
        cost = describe(func, args, kwargs, self.capability)
        result = answer(func, args, kwargs)
        if self.phase == "backward" and writes_in_place(func, args):
            result = args[0]
        if result is NotImplemented:
            temporaries = [self.allocate(size) for size in cost.temporaries]
            self._take_workspaces(cost)
            result = func(*args, **kwargs)
            self._note(result)
            for block in temporaries:
                self.release(block)
        done = self.work.setdefault((self.phase, self.layer), Work())
        work = cost.work(result)
        if work.launches:
            self.work[self.phase, self.layer] = done + self._issued(func, work)
        self._note(result)
        return result

    def _issued(self, func: Any, work: Work) -> Work:
        """Put launches down to who issues them.

        In the backward pass that is the engine, unless a checkpointed layer runs anew (its Python
        code has gradients enabled, the engine has not) or a function's own `backward` runs.
        """
        import torch

        if self._is_replayed:
            return dataclasses.replace(work, launches=0.0, recorded_launches=work.launches)
        node = torch._C._current_autograd_node()
        written_in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
        by_engine = (
            self.phase == "backward" and not torch.is_grad_enabled() and not written_in_python
        )
        name = func.name() if hasattr(func, "name") else str(func)
        return issued(work, name, by_engine=by_engine)

    @property
    def _is_replayed(self) -> bool:
        return self.as_graph and self.phase in ("forward", "backward")

    def note_hook(self) -> None:
        """Note that a hook of what is saved for the backward pass runs for a tensor."""
        if self._is_replayed:
            return
        done = self.work.setdefault((self.phase, self.layer), Work())
        self.work[self.phase, self.layer] = done + Work(hooks=1)

    def allocate(self, size: int) -> tuple[int, int]:
        """Note an allocation that has no tensor and return its handle."""
        self._count += 1
        self.events.append(Event(self._count, size, self.phase, self.layer))
        return self._count, size

    def release(self, block: tuple[int, int]) -> None:
        """Note the release of an allocation."""
        if not self.closed:
            self.events.append(Event(block[0], -block[1], self.phase, self.layer))

    def leaves_device(self, tensor: Any) -> None:
        """Note that a tensor's memory is the host's from now on."""
        storage = tensor.untyped_storage()
        block = self._known.get(storage._cdata)
        if block is not None and block not in self._gone:
            self._gone.add(block)
            self.release((block, storage.nbytes()))

    def empty_cache(self) -> None:
        """Note that the allocator's free segments go back to the driver."""
        self.events.append(Event(0, 0, self.phase, self.layer))

    def _take_workspaces(self, cost: Cost) -> None:
        """Note the workspaces of the thread that runs this phase, where they are first needed."""
        if self.phase not in ("forward", "backward"):
            return
        for needed, size in (
            (cost.multiplies, product_workspace(self.capability)),
            (cost.fuses, FUSED_WORKSPACE),
        ):
            if needed and (self.phase, size) not in self._multiplied:
                self._multiplied.add((self.phase, size))
                self._workspaces.append(self.allocate(size)[0])

    def _note(self, result: Any) -> None:
        import torch

        if isinstance(result, torch.Tensor):
            if result.device.type == "meta" or result.layout != torch.strided:
                return
            storage = result.untyped_storage()
            key = storage._cdata
            if key in self._known or storage.nbytes() == 0:
                return
            block = self.allocate(storage.nbytes())
            self._known[key] = block[0]
            weakref.finalize(storage, self._died, key, block)
        elif isinstance(result, list | tuple):
            for index, part in enumerate(result):
                self._note(part)
                if self.phase == "optimizer" and len(result) in self.listed:
                    self._place(part, self.listed[len(result)][index])

    def _place(self, tensor: Any, layer: int) -> None:
        """Note that a tensor in a list of all parameters belongs to one's decoder layer."""
        block = self._known.get(tensor.untyped_storage()._cdata)
        if block is not None and layer >= 0:
            self._layer_of[block] = layer

    def _died(self, key: int, block: tuple[int, int]) -> None:
        self._known.pop(key, None)
        if block[0] not in self._gone:
            self.release(block)

    def result(self, trainer: Any, loaded: tuple[int, ...]) -> Trace:
        """Return what was recorded, with the owners of the blocks that the trainer still holds.

        Args:
            trainer: After its training.
            loaded: Bytes reserved for each decoder layer before it was loaded.
        """
        owners: dict[int, str] = dict.fromkeys(self._workspaces, "workspace")
        layer_of = dict(self._layer_of)
        layers = decoder_layers(trainer.model)
        place = places_of(trainer.model)

        def claim(tensor: Any, owner: str, parameter: Any = None) -> None:
            block = self._known.get(tensor.untyped_storage()._cdata)
            if block is not None:
                owners.setdefault(block, owner)
                if id(parameter) in place:
                    layer_of[block] = place[id(parameter)]

        for parameter in trainer.model.parameters():
            claim(parameter, "adapter" if parameter.requires_grad else "weights", parameter)
            for tensor in _quant_tensors(getattr(parameter, "quant_state", None)):
                claim(tensor, "weights", parameter)
        for buffer in trainer.model.buffers():
            claim(buffer, "weights")
        for parameter, state in trainer.optimizer.state.items():
            for value in state.values():
                if hasattr(value, "untyped_storage") and value.device.type != "meta":
                    claim(value, "optimizer", parameter)
        return Trace.of(
            self.events,
            owners=owners,
            layer_of=layer_of,
            work=dict(self.work),
            trainable=_trainable(trainer.model),
            layer_trainable=tuple(_trainable(layer) for layer in layers),
            layer_loaded=loaded,
        )


def places_of(model: Any) -> dict[int, int]:
    """Return the decoder layer of each parameter that belongs to one, by the parameter's id."""
    layers = decoder_layers(model)
    return {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}


def _trainable(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _quant_tensors(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [state.absmax, state.code, state.offset]
    nested = _quant_tensors(state.state2)
    return [tensor for tensor in own if tensor is not None] + nested
