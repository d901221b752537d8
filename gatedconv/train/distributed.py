"""Several processes that train one network: started by torchrun, joined by DistributedDataParallel."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatedconv.gating.collectives import synchronized_norm
from gatedconv.gating.gates import LearnedGate


@dataclass(frozen=True)
class Ranks:
    """This process: ``rank`` of ``world``, ``local`` its rank on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the main process, which writes files and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, a new tensor; a collective where there are several."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def agree(self, value: Any) -> Any:
        """The value of the main process, any object; a collective."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks; a collective."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def any(self, value: bool) -> bool:
        """Whether the value is true on any process; a collective."""
        return any(self.gather(value))

    def average_buffers(self, model: nn.Module, weight: float = 1.0) -> None:
        """Replace running statistics by their mean over all processes, so that all have the same network.

        Args:
            model: the network.
            weight: of this rank's images, 1 on average over the ranks.
        """
        floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.world == 1 or not floats:
            return
        joined = self.sum(torch.cat([buffer.flatten().float() for buffer in floats]) * (weight / self.world))
        for buffer, mean in zip(floats, joined.split([buffer.numel() for buffer in floats]), strict=True):
            buffer.copy_(mean.view_as(buffer))


SINGLE = Ranks()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started; a single process without torchrun.

    NCCL between GPUs, gloo between CPUs. Each process selects the GPU of its local rank.

    Args:
        device: option `device`: "auto", "cpu" or "cuda"; a numbered one cannot be shared.

    Raises:
        ValueError: a numbered device, or fewer GPUs than processes on this machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield current()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device != "cpu" and (device != "auto" or torch.cuda.is_available())
    if on_gpu:
        _select_gpu(device, local)
    _init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def _init_process_group(backend: str) -> None:
    """`dist.init_process_group`, under a prefix of torchrun's store that each restart has for itself.

    torchrun keeps its store through restarts. PyTorch 2.14.1 adds no prefix: the new processes read the addresses of
    the dead ones there, and hang or fail to connect (`--max-restarts`, static and c10d rendezvous). The restart count
    is that of one machine; across machines, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and
    `--rdzv-backend c10d`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def current() -> Ranks:
    """The processes that have joined."""
    if not dist.is_available() or not dist.is_initialized():
        return SINGLE
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def launched() -> tuple[int, int]:
    """Rank and number of processes as torchrun set them; 0 and 1 without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def by_torchrun() -> bool:
    """Whether torchrun launched this process: the same on all ranks, unlike the restart count."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The network in DistributedDataParallel; each process keeps its own running statistics."""
    if ranks.world == 1:
        return model
    engine = nn.parallel.DistributedDataParallel
    known = inspect.signature(engine).parameters
    names = [name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known]
    own: dict[str, Any] = {names[0]: False}  # later releases have another name for it
    return engine(model, gradient_as_bucket_view=True, **own)


def _select_gpu(device: str, local: int) -> None:
    if ":" in device:
        raise ValueError(f"device: expected auto, cpu or cuda with several processes, got {device!r}")
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each process on this machine, found {torch.cuda.device_count()} for "
            f"local rank {local}"
        )
    torch.cuda.set_device(local)


@contextmanager
def synchronized_norms(model: nn.Module, which: str) -> Iterator[None]:
    """Context in which the norms of the gates ("gates") or all norms ("all") use statistics of the global batch.

    They are replaced by modules that share their parameters and buffers: evaluated and saved are the plain ones.

    Args:
        model: the network.
        which: "off", "gates" or "all"; "all" uses PyTorch's SyncBatchNorm, which requires GPUs.

    Raises:
        ValueError: "all" on a CPU.
    """
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()) if which != "off" else []:
        for name, child in parent.named_children():
            replacement = _replacement(parent, child, which)
            if replacement is not None:
                swapped.append((parent, name, child))
                parent._modules[name] = replacement
    try:
        yield
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def _replacement(parent: nn.Module, child: nn.Module, which: str) -> nn.Module | None:
    if isinstance(parent, LearnedGate) and isinstance(child, nn.BatchNorm1d):
        return synchronized_norm(child)
    if which != "all" or not isinstance(child, nn.modules.batchnorm._BatchNorm):
        return None
    if child.weight is not None and not child.weight.is_cuda:
        raise ValueError("sync_norm: expected off or gates on CPUs, PyTorch's SyncBatchNorm needs GPUs; got 'all'")
    return nn.SyncBatchNorm.convert_sync_batchnorm(child)  # of the same tensors
