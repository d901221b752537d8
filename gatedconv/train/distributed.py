"""Several processes training one network: torchrun starts them, PyTorch's own engine joins them."""

from __future__ import annotations

import inspect
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_RUN_ID = "TORCHELASTIC_RUN_ID"
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
Store = Any  # torch.distributed's own, whose types do not name it
_MEETING = timedelta(minutes=10)  # for all processes to be there


@dataclass(frozen=True)
class Ranks:
    """Who this process is: ``rank`` of ``world``, ``local`` its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, a new tensor; a collective where there are several."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def agree(self, value: Any) -> Any:
        """The value that the main process has; any object, a collective."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, on each of them; a collective."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def any(self, value: bool) -> bool:
        """Whether it is true of any process; a collective."""
        return any(self.gather(value))

    def average_buffers(self, model: nn.Module, weight: float = 1.0) -> None:
        """Give every process the mean of all running statistics, so that all hold the same network.

        Args:
            model: the network.
            weight: of this process's images among its fellows', 1 on average.
        """
        floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.world == 1 or not floats:
            return
        joined = self.sum(torch.cat([buffer.flatten().float() for buffer in floats]) * (weight / self.world))
        for buffer, mean in zip(floats, joined.split([buffer.numel() for buffer in floats]), strict=True):
            buffer.copy_(mean.view_as(buffer))


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started; alone where it started none or one.

    NCCL between GPUs, gloo between CPUs. Each process takes the GPU of its local rank.

    Args:
        device: of the settings: "auto", "cpu" or "cuda"; a numbered one cannot be shared.

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
        _take_gpu(device, local)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if os.environ.get(_AGENT_STORE) == "True":
        rank = int(os.environ["RANK"])
        dist.init_process_group(backend, store=_fresh_store(rank, world), rank=rank, world_size=world)
    else:
        dist.init_process_group(backend)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()


def _fresh_store(rank: int, world: int) -> Store:
    """A corner of torchrun's store that no process of an earlier start has written to.

    torchrun keeps one store through all its restarts, and a process group of a new start would find the addresses of
    the old one's processes there: it hangs, or its connections are refused. Neither the count of restarts nor anything
    else that torchrun tells is sure to be the same on all machines. So the first process makes up a name, and tells it
    to those that have shown, by words never used before, that they are alive.

    Raises:
        DistStoreError: some process did not come within ten minutes.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size=world, is_master=False, timeout=_MEETING)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"gatedconv/{_agreed_name(store, rank, world, _MEETING)}", store)  # type: ignore[attr-defined]


def _agreed_name(store: Store, rank: int, world: int, patience: timedelta) -> str:
    """A name that all live processes, and no others, know: the first one's; each of them calls this."""
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"gatedconv/here/{rank}", mine)
        name: str = store.get(f"gatedconv/told/{mine}").decode()  # waits
        store.set(f"gatedconv/heard/{name}/{rank}", "1")
        return name
    others = [f"gatedconv/here/{number}" for number in range(1, world)]
    heard = [f"gatedconv/heard/{mine}/{number}" for number in range(1, world)]
    deadline = time.monotonic() + patience.total_seconds()
    while not store.check(heard):
        if time.monotonic() > deadline:
            missing = [number for number, key in enumerate(heard, start=1) if not store.check([key])]
            raise dist.DistStoreError(f"processes {missing} of {world} did not come within {patience}")
        for key in others:  # also those that only an earlier process has written: nobody listens there
            if store.check([key]):
                store.set(f"gatedconv/told/{store.get(key).decode()}", mine)
        time.sleep(0.02)
    return mine


def current() -> Ranks:
    """The processes that have joined already."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def launched() -> tuple[int, int]:
    """Number of this process and of all, as torchrun started them; 0 and 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def by_torchrun() -> bool:
    """Whether torchrun started this process: the same on all of them, which its count of restarts is not."""
    return _RUN_ID in os.environ


def parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The network as its processes train it: DistributedDataParallel, each with running statistics of its own."""
    if ranks.world == 1:
        return model
    engine = nn.parallel.DistributedDataParallel
    known = inspect.signature(engine).parameters
    names = [name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known]
    own: dict[str, Any] = {names[0]: False}  # later releases have another name for it
    return engine(model, gradient_as_bucket_view=True, **own)


def _take_gpu(device: str, local: int) -> None:
    if ":" in device:
        raise ValueError(f"device: expected auto, cpu or cuda with several processes, got {device!r}")
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each process on this machine, found {torch.cuda.device_count()} for "
            f"local rank {local}"
        )
    torch.cuda.set_device(local)
