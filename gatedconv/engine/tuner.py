"""Chooses the fastest candidate for a convolution on this machine, and keeps the choice for later processes."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedconv import _native
from gatedconv._io import first_line, require_schema, write_atomic

FORMAT = 2
# max|a - b| / max|b| that a candidate may have against the first one: rounding of two orders of summation, no more.
CANDIDATE_ERROR = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 5e-3}

Timer = Callable[[Callable[[], Tensor]], float]


class Tuner:
    """Measures candidates for the same result and keeps the choices in a file.

    The file is JSON: {"format", the header's keys, "choices": {key: {"candidate", "ms": {name: time}, "out": {name:
    reason}}}}. The header has what the times depend on: on a GPU device, torch, cuDNN, its flags and the sources, on a
    CPU its name, instruction set, threads and the sources. A file of another format or header is not read, and
    overwritten. A file that cannot be read or written costs the measurement again, nothing else.

    Args:
        path: The file, None to keep nothing.
        header: What must agree for its choices to hold: device, versions, flags.
        timer: Milliseconds of a call.
        rounds: Rounds in which each candidate is timed; the least time counts.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], timer: Timer, rounds: int = 1) -> None:
        self.path, self.timer, self.rounds = path, timer, rounds
        self.header = {"format": FORMAT, **header}
        self.choices: dict[str, dict[str, Any]] = self._read()
        self._lock = threading.Lock()

    def choose(self, key: str, candidates: Mapping[str, Callable[[], Callable[[], Tensor]]], prefer: str = "") -> str:
        """Return the name of the fastest candidate whose result agrees with the first one's.

        Args:
            key: What is computed: equal keys get equal choices.
            candidates: name -> builds a call; the first is trusted. One that raises RuntimeError is left out.
                Where the first one's result is not finite, the choice is made but not kept.
            prefer: Of those that are left, the candidates whose names begin so go before the others.
        """
        with self._lock:
            known = self.choices.get(key)
            if known is not None and set(known["ms"]) | set(known["out"]) == set(candidates):
                return str(known["candidate"])
            if len(candidates) == 1:
                return next(iter(candidates))
            times, out, sound = self._measure(candidates)
            candidate = min(times, key=lambda name: (not name.startswith(prefer), times[name]))
            if sound:
                self.choices[key] = {"candidate": candidate, "ms": times, "out": out}
                self._write()
            return candidate

    def _measure(
        self, candidates: Mapping[str, Callable[[], Callable[[], Tensor]]]
    ) -> tuple[dict[str, float], dict[str, str], bool]:
        """Return each candidate's time, what is wrong with the others, and whether the first one's result is finite."""
        trusted: Tensor | None = None
        result: Tensor | None = None
        times: dict[str, float] = {}
        out: dict[str, str] = {}
        errors: list[RuntimeError] = []
        for name, build in candidates.items():
            try:
                call = build()
                result = None
                if trusted is not None:
                    poison(trusted)
                result = call()
                if trusted is None:
                    trusted = result.clone()
                    if trusted.numel() and not trusted.isfinite().any():
                        return {name: 0.0}, {}, False  # nothing that another candidate could be compared with
                elif not agrees(result, trusted):
                    out[name] = "wrong result"
                    first = next(iter(candidates))
                    warnings.warn(f"gatedconv: {name} differs from {first}; it is not used", stacklevel=2)
                    continue
                times[name] = self.timer(call)
            except RuntimeError as error:
                if trusted is None:
                    raise
                wait_for_device()  # raises where the error was the device's: every later candidate would get it too
                errors.append(error)
                out[name] = first_line(error)[:200]
        if not times:
            raise errors[0]
        for _ in range(self.rounds - 1):
            times = {name: min(ms, self.timer(candidates[name]())) for name, ms in times.items()}
        return times, out, trusted is not None and bool(trusted.isfinite().all())

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            body = json.loads(self.path.read_text()) if self.path is not None else {}
            choices = body.pop("choices", {})
            for key, choice in choices.items():
                require_schema(choice, {"candidate": str, "ms": dict, "out": dict}, key)
            sound = all(choice["candidate"] in choice["ms"] for choice in choices.values())
        except (OSError, ValueError, AttributeError, TypeError):
            return {}
        return choices if body == self.header and sound else {}

    def _write(self) -> None:
        if self.path is None:
            return
        try:
            # Another process may have measured other layers in the meantime.
            self.choices = {**self._read(), **self.choices}
            write_atomic(self.path, json.dumps({**self.header, "choices": self.choices}, indent=1).encode())
        except OSError as error:
            warnings.warn(f"gatedconv: measured choices are not kept: {error}", stacklevel=2)
            self.path = None


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next `torch.empty` of this size gets.

    A caching allocator hands out blocks that were freed before. Without this a candidate that writes nothing may be
    given the block of an earlier candidate's right result, agree with it, and be the fastest.
    """
    held = [torch.full_like(like, float("nan")) for _ in range(4)]  # at once: as many blocks as results were freed
    del held


def agrees(result: Tensor, trusted: Tensor) -> bool:
    """Whether two results differ by no more than rounding, and have their non-finite values at the same places.

    Not `gatedconv.convert.verify.distance`, for which NaN in place of an infinity is a difference: each algorithm
    overflows in an order of its own.
    """
    if result.shape != trusted.shape or result.dtype != trusted.dtype:
        return False
    finite = trusted.isfinite()
    if not torch.equal(result.isfinite(), finite):
        return False
    mine, theirs = (torch.where(finite, t, 0).float() for t in (result, trusted))
    if not theirs.numel():
        return True
    return bool((mine - theirs).abs().max() <= CANDIDATE_ERROR[result.dtype] * theirs.abs().max() + 1e-6)


def wait_for_device() -> None:
    """Wait until the GPU, if this process uses one, has done everything; RuntimeError where something of it failed."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cache_path(header: Mapping[str, Any]) -> Path:
    """Return the file for a header: one for each device and version, in the folder of GATEDCONV_CACHE."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode()).hexdigest()[:12]
    return _native.cache_folder() / f"tuned-{digest}.json"
