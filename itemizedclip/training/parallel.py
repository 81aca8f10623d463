"""How a model is shared out among the processes of a run: a whole copy on each (DDP), or shards of it (FSDP2).

The engine asks a `Layout` for everything that depends on it: the module to call, the gradient norm, the state to save
and to load, the model that evaluators see. A sharded state is saved as whole tensors under the same names, so that
every checkpoint goes on under either layout and on any number of ranks.

Sharded, parameters of 0 dimensions (logit scale and bias) stay whole on each rank, as `fully_shard` takes none.

Axes: W ranks.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime.collectives import all_reduce_sum
from itemizedclip.runtime.precision import Precision
from itemizedclip.runtime.processes import Ranks, SetupError
from itemizedclip.training.options import ParallelSettings
from itemizedclip.training.task import ItemizedTask


class Layout:
    """One process, or a whole copy on each: nothing is shared out but the gradients.

    Args:
        task: frozen, cast and compiled as it is to be.
        ranks: of the run.
        settings: how gradients travel.

    Attributes:
        module: what a step calls.
    """

    def __init__(self, task: ItemizedTask, ranks: Ranks, settings: ParallelSettings) -> None:
        self.task = task
        self.ranks = ranks
        self.module: nn.Module = task if ranks.world_size == 1 else _copied(task, ranks, settings)

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradient down to `limit` when it is longer; its norm before."""
        return torch.nn.utils.clip_grad_norm_(self.task.parameters(), limit)

    def whole(self, state: Any) -> Any:
        """A state with every tensor whole; on the main rank. The others, who must call it too, get no tensors."""
        return state

    def load_model(self, state: Mapping[str, Tensor]) -> None:
        """Take over whole tensors.

        Raises:
            RuntimeError: they do not fit.
        """
        self.task.model.load_state_dict(state)

    def shared_out(self, optimizer_state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """A whole optimizer state as `optimizer.load_state_dict` wants it here."""
        return dict(optimizer_state)

    @contextmanager
    def evaluated(self) -> Iterator[DualEncoder]:
        """The model for evaluators, which call it as often as they like, each rank for itself."""
        yield self.task.model


def lay_out(task: ItemizedTask, ranks: Ranks, settings: ParallelSettings, precision: Precision) -> Layout:
    """Wrap a task as --parallel asks.

    Raises:
        SetupError: a precision that does not go with it.
    """
    if settings.parallel == "ddp" or ranks.world_size == 1:
        return Layout(task, ranks, settings)
    if precision.name not in ("amp_bf16", "fp32"):
        raise SetupError(
            f"--parallel fsdp2 with --precision {precision.name}: shards hold float32 and know no loss scale; use "
            "--precision amp_bf16 or fp32"
        )
    return ShardedLayout(task, ranks, settings)


# --- whole copies ----------------------------------------------------------------------------------------------------


def _copied(task: ItemizedTask, ranks: Ranks, settings: ParallelSettings) -> DistributedDataParallel:
    # Buffers are constants here; PyTorch renamed the switch that stops their broadcast before every forward pass.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    chosen: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True, "static_graph": settings.static_graph}
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    module = DistributedDataParallel(task, device_ids=device_ids, **chosen)
    if settings.compress_gradients:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        module.register_comm_hook(None, bf16_compress_hook)
    return module


# --- shards ----------------------------------------------------------------------------------------------------------


def units_of(model: DualEncoder) -> list[nn.Module]:
    """What is gathered and freed at once: the outermost repeated blocks of both towers.

    All else (head, embeddings, norms) is one unit, gathered for the whole step.
    """
    units: list[nn.Module] = []
    for part in [*model.image_tower(), *model.text_tower()]:
        if isinstance(part, nn.Module):
            _collect_blocks(part, units)
    return units


def _collect_blocks(module: nn.Module, units: list[nn.Module]) -> None:
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    is_row = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in children}) == 1
    if is_row and len(children) > 1:
        units += [child for child in children if child not in units]
        return
    for child in children:
        _collect_blocks(child, units)


class ShardedLayout(Layout):
    """A shard of every parameter, gradient and moment on each rank (FSDP2).

    An evaluation gathers the whole model on each rank for as long as it lasts: ranks have different numbers of images,
    and must not wait for each other between them.
    """

    def __init__(self, task: ItemizedTask, ranks: Ranks, settings: ParallelSettings) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.task = task
        self.ranks = ranks
        # Its parameters are dropped at once; evaluations fill them.
        self._plain = copy.deepcopy(task.model).to("meta")
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        scalars = [(module, name, p) for module in task.modules() for name, p in module._parameters.items()
                   if p is not None and p.ndim == 0]  # fmt: skip
        self._whole = [p for _, _, p in scalars]
        for module, name, _ in scalars:
            del module._parameters[name]
        for unit in units_of(task.model):
            fully_shard(unit, mesh=mesh)
        fully_shard(task, mesh=mesh)
        for module, name, parameter in scalars:
            module._parameters[name] = parameter
        self.module = task

    def clip_gradients(self, limit: float) -> Tensor:
        """Also averages the gradients of the parameters that are whole."""
        own = [p.grad for p in self._whole if p.grad is not None]
        if own:
            mean = all_reduce_sum(torch.stack(own)) / self.ranks.world_size
            for grad, value in zip(own, mean.unbind()):
                grad.copy_(value)
        grads: list[Any] = [p.grad for p in self.task.parameters() if _is_shard(p.grad)]
        shards = [grad.to_local() for grad in grads]
        norm = torch.sqrt(all_reduce_sum(_squares(shards, self.ranks.device)) + _squares(own, self.ranks.device))
        if math.isfinite(limit):
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*shards, *own], factor)
        return norm

    def whole(self, state: Any) -> Any:
        """See `Layout.whole`."""
        if _is_shard(state):
            full = state.full_tensor()
            return full.cpu() if self.ranks.is_main else None
        if isinstance(state, Mapping):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return [self.whole(value) for value in state]
        return state

    def load_model(self, state: Mapping[str, Tensor]) -> None:
        """See `Layout.load_model`."""
        self._plain.load_state_dict(state, assign=True)  # says what does not fit
        self._plain.to("meta")
        with torch.no_grad():
            for name, own in self.task.model.state_dict(keep_vars=True).items():
                if _is_shard(own):
                    own.to_local().copy_(_shard_of(state[name]))
                else:
                    own.copy_(state[name])

    def shared_out(self, optimizer_state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See `Layout.shared_out`.

        Raises:
            ValueError: the state is one of other parameters.
        """
        saved = [index for group in optimizer_state["param_groups"] for index in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if len(saved) != len(parameters):
            raise ValueError(f"{len(saved)} parameters there, {len(parameters)} here")
        by_index = dict(zip(saved, parameters))
        states = {
            index: {name: _placed_like(value, by_index[index], name) for name, value in state.items()}
            for index, state in optimizer_state["state"].items()
        }
        return {**optimizer_state, "state": states}

    @contextmanager
    def evaluated(self) -> Iterator[DualEncoder]:
        """See `Layout.evaluated`."""
        live = self.task.model
        full = {name: value.full_tensor() if _is_shard(value) else value for name, value in live.state_dict().items()}
        self._plain.load_state_dict(full, assign=True)
        del full
        buffers = dict(live.named_buffers(remove_duplicate=False))
        for prefix, module in self._plain.named_modules():
            for name in module._buffers:
                module._buffers[name] = buffers.get(f"{prefix}.{name}" if prefix else name)
        self._plain.train(live.training)
        try:
            yield self._plain
        finally:
            self._plain.to("meta")


def _squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for tensor in tensors:
        total = total + tensor.float().square().sum()
    return total


def _is_shard(value: Any) -> bool:
    """Whether a value is a DTensor, whose import takes two seconds that runs without shards need not wait."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def _shard_of(whole: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, as `fully_shard` cuts them."""
    rank, count = dist.get_rank(), dist.get_world_size()
    parts = whole.chunk(count, dim=0)
    return parts[rank] if rank < len(parts) else whole.new_empty(0, *whole.shape[1:])


def _placed_like(value: Any, parameter: Any, name: str) -> Any:
    """A whole tensor of the optimizer beside its parameter; numbers and counters as they are."""
    if not isinstance(value, Tensor) or value.ndim == 0 or not _is_shard(parameter):
        return value
    if value.shape != parameter.shape:
        raise ValueError(f"{name} is {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")
    from torch.distributed.tensor import DTensor

    local = _shard_of(value).to(parameter.device, parameter.dtype).clone()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
