"""Latency of a network in our engine and in every other runtime: measured in turns, outputs checked first."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv.measure.turns import Turns
from gatedconv.report.peers import OURS, SETTINGS, Run, Setting, fingerprint, quiet
from gatedconv.report.tables import text_table

Entrant = tuple[str, str]
"""Provider and setting."""

TOLERANCE = 1e-4  # max|a - b| / max|b| against eager PyTorch: more is another network, and is not timed


@dataclass(frozen=True)
class Row:
    """What one setting of one provider took for one case.

    Attributes:
        benchmark: the family of cases, "network" or "layer".
        case: the network or layer.
        batch: images per call.
        dtype: of input and weights.
        provider: the runtime.
        setting: how it was set up.
        ms_median: of the rounds, ms per call.
        ms_min: the fastest single call, ms.
        ms_iqr: 75th minus 25th percentile of the rounds, ms.
        rounds: how many there were.
        ratio: this over the time of our best setting, pair by pair, median of the rounds; None without ours.
        ratio_low: its 25th percentile.
        ratio_high: its 75th percentile.
        error: max|a - b| / max|b| of the output against eager PyTorch.
        launches: kernel launches per call; None where there are none to count.
        bytes_peak: memory, bytes; None where it was not measured.
    """

    benchmark: str
    case: str
    batch: int
    dtype: str
    provider: str
    setting: str
    ms_median: float
    ms_min: float
    ms_iqr: float
    rounds: int
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    error: float
    launches: int | None = None
    bytes_peak: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)


class Contest:
    """Settings that compute the same thing, to be timed in turns.

    Args:
        benchmark: family of cases, for the rows.
        case: name of what is computed, for the rows.
        batch: images per call, for the rows.
        prepare: (provider, setting) -> function that prepares it and returns what is to be timed.
        expected: (provider, setting) -> the right output.
        turns: options of `Turns`.

    Attributes:
        errors: (provider, setting) -> max|a - b| / max|b| of its output.
        failures: (provider, setting) -> why it is not timed.
        turns: the samples; its entrants are the (provider, setting) that are timed.
    """

    def __init__(
        self,
        benchmark: str,
        case: str,
        batch: int,
        prepare: Mapping[Entrant, Callable[[], Run]],
        expected: Mapping[Entrant, Tensor],
        **turns: Any,
    ) -> None:
        self.benchmark, self.case, self.batch = benchmark, case, batch
        self.dtype = str(next(iter(expected.values())).dtype).removeprefix("torch.")
        self.errors: dict[Entrant, float] = {}
        self.failures: dict[Entrant, str] = {}
        runs: dict[Entrant, Run] = {}
        for entrant, build in prepare.items():
            try:
                run = build()
                with torch.inference_mode():
                    error = relative_error(run(), expected[entrant])
            except Exception as problem:  # a peer may raise anything; it is told, and the others go on
                self.failures[entrant] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
                continue
            if not error <= TOLERANCE:
                self.failures[entrant] = (
                    f"wrong output: relative error {error:.1e}, at most {TOLERANCE:.0e} allowed"
                )
                continue
            self.errors[entrant], runs[entrant] = error, run
        if not runs:
            raise ValueError(f"{case}: nothing could be run; {'; '.join(self.failures.values())}")
        with torch.inference_mode():
            self.turns = Turns(runs, **turns)

    def rounds(self, count: int) -> None:
        """Take ``count`` more rounds."""
        with torch.inference_mode():
            for _ in range(count):
                self.turns.round()

    @property
    def ours(self) -> Entrant | None:
        """Our fastest setting, None if ours does not run."""
        own = [entrant for entrant in self.errors if entrant[0] == OURS]
        return min(own, key=lambda entrant: self.turns.spread(entrant).median, default=None)

    def rows(self) -> list[Row]:
        """One row per setting that ran, in the order of preparation."""
        ours, rows = self.ours, []
        for entrant, error in self.errors.items():
            time = self.turns.spread(entrant)
            ratio = None if ours is None or entrant[0] == OURS else self.turns.ratio(entrant, ours)
            rows.append(
                Row(
                    benchmark=self.benchmark,
                    case=self.case,
                    batch=self.batch,
                    dtype=self.dtype,
                    provider=entrant[0],
                    setting=entrant[1],
                    ms_median=round(time.median, 5),
                    ms_min=round(time.least, 5),
                    ms_iqr=round(time.iqr, 5),
                    rounds=len(self.turns.samples[entrant]),
                    ratio=None if ratio is None else round(ratio.median, 4),
                    ratio_low=None if ratio is None else round(ratio.lower, 4),
                    ratio_high=None if ratio is None else round(ratio.upper, 4),
                    error=float(f"{error:.2e}"),
                )
            )
        return rows


def network_contest(
    case: str,
    network: nn.Module,
    x: Tensor,
    *,
    settings: Iterable[Setting] = SETTINGS,
    folder: Path | None = None,
    threads: int | None = None,
    **turns: Any,
) -> Contest:
    """Prepare a network in every setting that can run it.

    Args:
        case: name of the network, for the rows.
        network: in eval mode, on the CPU; it is not changed.
        x: (N, C, H, W), the batch.
        settings: which to try.
        folder: where prepared files are kept, by the network's fingerprint; default: nowhere.
        threads: CPU threads for each; default: PyTorch's.
        turns: options of `Turns`.

    Raises:
        TypeError: the network returns something else than a tensor.
        ValueError: the network does not accept the input.
    """
    threads = threads or torch.get_num_threads()
    settings = [s for s in settings if not (s.split and (len(x) < 2 or len(x) % 2 or threads < 2))]
    torch.compiler.reset()  # compiled networks of earlier cases would lengthen every look-up
    with tempfile.TemporaryDirectory() as passing, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        place = Path(passing) if folder is None else folder / fingerprint(network, x)
        place.mkdir(parents=True, exist_ok=True)
        expected = _eager_output(case, network, x)
        prepare = {(s.provider, s.label): _prepared(s, network, x, place, threads) for s in settings}
        return Contest("network", case, len(x), prepare, dict.fromkeys(prepare, expected), **turns)


@torch.inference_mode()
def _eager_output(case: str, network: nn.Module, x: Tensor) -> Tensor:
    try:
        output = network(x)
    except Exception as error:  # the network's own code, which may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{case}: the network does not accept {tuple(x.shape)}: {reason}") from error
    if not isinstance(output, Tensor):
        raise TypeError(f"{case}: expected a network that returns one tensor, got {type(output).__name__}")
    return output.clone()


def _prepared(
    setting: Setting, network: nn.Module, x: Tensor, folder: Path, threads: int
) -> Callable[[], Run]:
    def build() -> Run:
        if setting.missing:
            raise ImportError(setting.missing)
        with torch.no_grad():
            return setting.prepare(network, x, folder, threads)

    return build


def relative_error(output: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|; NaN counts as infinitely wrong."""
    if output.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item() or 1.0
    error = (output - expected).abs().max().item() / scale
    return math.inf if math.isnan(error) else error


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """The fastest setting of each provider for each case and batch, in the order of the rows."""
    best: dict[tuple[str, str, int, str], Row] = {}
    for row in rows:
        key = (row.benchmark, row.case, row.batch, row.provider)
        if key not in best or row.ms_median < best[key].ms_median:
            best[key] = row
    return list(best.values())


def bench_table(rows: Sequence[Row]) -> str:
    """Rows as text: ms, spread, and how many times faster ours is (pair by pair, with its quartiles)."""
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
        times = [f"{ms:.3f}" for ms in (row.ms_median, row.ms_min, row.ms_iqr)]
        lines.append([row.case, str(row.batch), row.provider, row.setting, *times, ratio])
    header = [
        "network",
        "batch",
        "provider",
        "setting",
        "median (ms)",
        "least (ms)",
        "IQR (ms)",
        "ours is faster",
    ]
    return text_table(header, lines)
