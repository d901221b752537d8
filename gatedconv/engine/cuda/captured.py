"""CUDA graphs of one function, one for each input shape; the least recently used is dropped first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gatedconv._cuda_graph import capture, on_stream

LIMIT = 8  # graphs kept: each holds its own memory for the maps of its batch


class GraphCache:
    """Runs a function of one tensor through captured graphs; any number of threads and streams may call.

    Captures of a device wait for each other (`gatedconv._cuda_graph`). A thread that calls
    `torch.cuda.synchronize()` while another one's first call captures invalidates that capture; it is repeated once.

    Args:
        function: Of one input; it must neither synchronize nor depend on values.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self._kept: OrderedDict[tuple[Any, ...], CapturedGraph] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """Return function(x). A graph is touched under the lock alone, so calls are serialized on the host."""
        key = (tuple(x.shape), x.dtype, x.device)
        with self._lock:
            graph = self._kept.get(key)
            if graph is None:
                if len(self._kept) >= LIMIT:
                    # Wait for its last call, on whichever stream it is: its memory is about to be reused.
                    self._kept.popitem(last=False)[1].done.synchronize()
                # An inference tensor, which this call may be allowed to make, could not be written outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    graph = self._kept[key] = CapturedGraph(self.function, x)
            self._kept.move_to_end(key)
            with torch.no_grad():
                return graph(x)


class CapturedGraph:
    """One graph with its input and output. A replay waits for the one before it, on whichever stream that ran."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.input = x.detach().clone()
        stream = torch.cuda.Stream(x.device)
        with on_stream(stream):
            function(self.input)  # cuDNN chooses its algorithms, libraries load
        self.graph, self.output = capture(lambda: function(self.input), x.device, stream)
        self.done = torch.cuda.Event()
        self.done.record(torch.cuda.current_stream(x.device))

    def __call__(self, x: Tensor) -> Tensor:
        """Replay on the current stream; the result is the caller's."""
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self.done)
        self.input.copy_(x)
        self.graph.replay()
        result = self.output.clone()
        self.done.record(stream)
        return result
