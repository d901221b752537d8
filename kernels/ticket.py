"""Counters by which the last program of a launch knows that it is the last; a kernel leaves its own at 0.

Launches of one stream come one after the other and share a counter. A captured graph may be replayed on any stream,
so each captured launch gets a counter of its own for good: a graph does not run at the same time as itself. Counters
are made outside of captures, for memory made in one belongs to the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLOTS = 4096  # counters made at a time, for captured launches: a ResNet-110 needs 54
_SPACING = 4  # int32: counters lie 16 bytes apart, for a pointer's alignment is part of what is compiled

_of_streams: dict[tuple[int | None, int], Tensor] = {}
_free: dict[int | None, list[Tensor]] = {}
_made: list[Tensor] = []  # what free counters are views of: graphs point into it when the last view is gone


def ticket(x: Tensor) -> Tensor | None:
    """A counter for a launch on x's device and its current stream; None where a capture finds none left."""
    device = x.device.index
    if not x.is_cuda:
        return _of_stream(x, 0)
    free = _free.setdefault(device, [])
    if torch.cuda.is_current_stream_capturing():
        return free.pop() if free else None
    if len(free) < SLOTS // 2:
        _made.append(torch.zeros(SLOTS, _SPACING, device=x.device, dtype=torch.int32))
        free += list(_made[-1].unbind())
    return _of_stream(x, torch.cuda.current_stream(x.device).cuda_stream)


def _of_stream(x: Tensor, stream: int) -> Tensor:
    key = (x.device.index, stream)
    if key not in _of_streams:
        _of_streams[key] = torch.zeros(_SPACING, device=x.device, dtype=torch.int32)
    return _of_streams[key]
