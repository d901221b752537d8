"""Latency of a network in our engine and in every other runtime: outputs checked first, times interleaved."""

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

from gatedconv._io import silenced
from gatedconv.bench.exported import Run
from gatedconv.bench.runtimes import OURS, SETTINGS, Setting, fingerprint
from gatedconv.convert.verify import distance
from gatedconv.measure.latency import Interleaved
from gatedconv.report.tables import text_table

CandidateName = tuple[str, str]
"""Provider and setting."""

# max|a - b| / max|b| against eager PyTorch: beyond it the output is wrong, and is not timed.
WRONG_ABOVE = 1e-4
DISTURBED = 1.3  # median over minimum: beyond it, something else used the machine
PROBES = 32  # images on which the error of reduced precision is found
_NONSENSE = 10.0  # a larger error is not due to the precision


@dataclass(frozen=True)
class Row:
    """One measurement, of one setting of one provider on one case.

    Attributes:
        benchmark: the family of cases, such as "network" or "layer".
        case: the network or layer.
        batch: images per call.
        dtype: that it computes in.
        provider: "gatedconv", or a peer by name.
        setting: how the provider was set up.
        ms_median: of the rounds, ms per call; None where nothing was measured, with a ``note``.
        ms_min: the fastest single call, ms.
        ms_iqr: 75th minus 25th percentile of the rounds, ms.
        rounds: their number.
        ratio: this over the time of our best setting, pair by pair, median of the rounds; None without ours.
        ratio_low: its 25th percentile.
        ratio_high: its 75th percentile.
        error: max|a - b| / max|b| of the output against a reference; of reduced precision on images of its own.
        agreement: share of those images that have the same largest output; None in full precision.
        launches: kernel launches per call; None where they were not counted.
        bytes_peak: memory of a call beyond what was allocated before it; None where it was not measured.
        note: what is missing, and why; begins with "failed" where it should not be missing.
    """

    benchmark: str
    case: str
    batch: int
    dtype: str
    provider: str
    setting: str = ""
    ms_median: float | None = None
    ms_min: float | None = None
    ms_iqr: float | None = None
    rounds: int | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: float | None = None
    agreement: float | None = None
    launches: int | None = None
    bytes_peak: int | None = None
    note: str | None = None

    @property
    def failed(self) -> bool:
        """Whether something is missing that should not be."""
        return (self.note or "").startswith("failed")

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)


class Comparison:
    """Settings that compute the same result, for interleaved timing.

    Args:
        benchmark: family of cases, for the rows.
        case: name of the computation, for the rows.
        batch: images per call, for the rows.
        prepare: candidate -> function that prepares it and returns the call to time.
        expected: candidate -> the right output.
        reduced: candidate -> dtype of those that compute in fewer bits than the expected output: their error is
            reported, and does not disqualify them.
        timing: options of `Interleaved`.

    Attributes:
        errors: candidate -> max|a - b| / max|b| of its output.
        agreement: candidate -> share of images with the same largest output, where that was found.
        failures: candidate -> why it is not timed.
        timing: the samples of the candidates in ``errors``.

    Raises:
        ValueError: no candidate runs.
    """

    def __init__(
        self,
        benchmark: str,
        case: str,
        batch: int,
        prepare: Mapping[CandidateName, Callable[[], Run]],
        expected: Mapping[CandidateName, Tensor],
        reduced: Mapping[CandidateName, str] | None = None,
        **timing: Any,
    ) -> None:
        self.benchmark, self.case, self.batch = benchmark, case, batch
        self.dtype = str(next(iter(expected.values())).dtype).removeprefix("torch.")
        self.reduced = dict(reduced or {})
        self.errors: dict[CandidateName, float] = {}
        self.agreement: dict[CandidateName, float] = {}
        self.failures: dict[CandidateName, str] = {}
        runs: dict[CandidateName, Run] = {}
        for candidate, build in prepare.items():
            try:
                run = build()
                with torch.inference_mode():
                    error = distance(run(), expected[candidate])
            except Exception as problem:  # a peer may raise anything; it is reported, and the others continue
                self.failures[candidate] = _one_line(problem)
                continue
            limit = _NONSENSE if candidate in self.reduced else WRONG_ABOVE
            if not error <= limit:
                self.failures[candidate] = f"wrong output: relative error {error:.1e}, at most {limit:.0e} allowed"
                continue
            self.errors[candidate], runs[candidate] = error, run
        if not runs:
            raise ValueError(f"{case}: nothing could be run; {'; '.join(self.failures.values())}")
        with torch.inference_mode():
            self.timing = Interleaved(runs, **timing)

    def rounds(self, count: int) -> None:
        """Take ``count`` more rounds."""
        with torch.inference_mode():
            for _ in range(count):
                self.timing.round()

    @property
    def ours(self) -> CandidateName | None:
        """Our fastest setting in full precision, None if ours does not run."""
        own = [candidate for candidate in self.errors if candidate[0] == OURS and candidate not in self.reduced]
        return min(own, key=lambda candidate: self.timing.spread(candidate).median, default=None)

    def rows(self) -> list[Row]:
        """One row per setting that ran, in the order of preparation."""
        ours, rows = self.ours, []
        for candidate, error in self.errors.items():
            time = self.timing.spread(candidate)
            own = candidate[0] == OURS and candidate not in self.reduced
            ratio = None if ours is None or own else self.timing.ratio(candidate, ours)
            rows.append(
                Row(
                    benchmark=self.benchmark,
                    case=self.case,
                    batch=self.batch,
                    dtype=self.reduced.get(candidate, self.dtype),
                    provider=candidate[0],
                    setting=candidate[1],
                    ms_median=round(time.median, 5),
                    ms_min=round(time.least, 5),
                    ms_iqr=round(time.iqr, 5),
                    rounds=len(self.timing.samples[candidate]),
                    ratio=None if ratio is None else round(ratio.median, 4),
                    ratio_low=None if ratio is None else round(ratio.lower, 4),
                    ratio_high=None if ratio is None else round(ratio.upper, 4),
                    error=float(f"{error:.2e}"),
                    agreement=self.agreement.get(candidate),
                )
            )
        return rows

    def failure_rows(self) -> list[dict[str, Any]]:
        """The settings that are not timed, with the reason, as JSON types."""
        where = {"benchmark": self.benchmark, "case": self.case, "batch": self.batch}
        return [{**where, "provider": p, "setting": s, "reason": why} for (p, s), why in self.failures.items()]


def compare_runtimes(
    case: str,
    network: nn.Module,
    x: Tensor,
    *,
    settings: Iterable[Setting] = SETTINGS,
    folder: Path | None = None,
    threads: int | None = None,
    **timing: Any,
) -> Comparison:
    """Prepare a network in every setting that can run it.

    Args:
        case: name of the network, for the rows.
        network: in eval mode, on the CPU; it is not changed.
        x: (N, C, H, W), the batch.
        settings: those to try.
        folder: keeps prepared files, by the network's fingerprint; None keeps nothing.
        threads: CPU threads for each; None for PyTorch's.
        timing: options of `Interleaved`.

    Raises:
        TypeError: the network returns something else than a tensor.
        ValueError: the network does not accept the input.
    """
    threads = threads or torch.get_num_threads()
    settings = [s for s in settings if not (s.split and (len(x) < 2 or len(x) % 2 or threads < 2))]
    torch.compiler.reset()  # compiled networks of earlier cases would slow down every look-up
    with tempfile.TemporaryDirectory() as passing, warnings.catch_warnings(), silenced():
        warnings.simplefilter("ignore")
        place = Path(passing) if folder is None else folder / fingerprint(network, x)
        place.mkdir(parents=True, exist_ok=True)
        expected = _eager_output(case, network, x)
        prepare = {(s.provider, s.label): _prepared(s, network, x, place, threads) for s in settings}
        reduced = {(s.provider, s.label): s for s in settings if s.dtype != "float32"}
        kinds = {candidate: setting.dtype for candidate, setting in reduced.items()}
        found = Comparison("network", case, len(x), prepare, dict.fromkeys(prepare, expected), kinds, **timing)
        for candidate in reduced.keys() & found.errors.keys():
            try:
                quality = _quality(reduced[candidate], network, x, place, threads)
            except Exception as problem:  # of a batch of another size: a speed without its error is no result
                del found.errors[candidate]
                found.failures[candidate] = _one_line(problem)
                continue
            found.errors[candidate], found.agreement[candidate] = quality
        return found


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


def _one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


@torch.inference_mode()
def _quality(setting: Setting, network: nn.Module, x: Tensor, folder: Path, threads: int) -> tuple[float, float]:
    """Error and agreement of a setting in reduced precision, on images that it was not calibrated on."""
    images = torch.randn((PROBES, *x.shape[1:]), generator=torch.Generator().manual_seed(3))
    expected, found = network(images), setting.prepare(network, images, folder, threads)()
    same = found.flatten(1).argmax(1) == expected.flatten(1).argmax(1)
    return distance(found, expected), float(same.float().mean())


def _prepared(setting: Setting, network: nn.Module, x: Tensor, folder: Path, threads: int) -> Callable[[], Run]:
    def build() -> Run:
        if setting.missing:
            raise ImportError(setting.missing)
        with torch.no_grad():
            return setting.prepare(network, x, folder, threads)

    return build


def best_rows(rows: Iterable[Row], by: str = "ms_median") -> list[Row]:
    """The fastest setting of each provider and dtype for each case and batch, in the order of the rows."""
    best: dict[tuple[str, str, int, str, str], Row] = {}
    for row in rows:
        key = (row.benchmark, row.case, row.batch, row.provider, row.dtype)
        if key not in best or _ms(row, by) < _ms(best[key], by):
            best[key] = row
    return list(best.values())


def bench_table(rows: Sequence[Row]) -> str:
    """Rows as text, with how many times faster ours is: the ratio of the fastest calls.

    A line follows where something else disturbed the measurement; its medians, unlike the minima, are not to be used.
    """
    full = [row for row in rows if row.provider == OURS and row.agreement is None]
    ours = {(row.case, row.batch): _ms(row, "ms_min") for row in best_rows(full, "ms_min")}
    with_error = any(row.agreement is not None for row in rows)
    lines = []
    for row in rows:
        own = None if row in full else ours.get((row.case, row.batch))
        times = [f"{_ms(row, name):.3f}" for name in ("ms_min", "ms_median", "ms_iqr")]
        ratio = "" if own is None else f"{_ms(row, 'ms_min') / own:.2f}x"
        quality = [
            row.dtype,
            f"{row.error or 0:.1e}",
            "" if row.agreement is None else f"{row.agreement:.0%}",
        ] * with_error
        lines.append([row.case, str(row.batch), row.provider, row.setting, *times, ratio, *quality])
    what = rows[0].benchmark if rows else "network"
    header = [what, "batch", "provider", "setting", "least (ms)", "median (ms)", "IQR (ms)", "ours is faster"] + [
        "dtype",
        "error",
        "same top-1",
    ] * with_error
    return "\n".join([text_table(header, lines), *_disturbed(rows)])


def _disturbed(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if _ms(row, "ms_median") > DISTURBED * _ms(row, "ms_min")]
    if not found:
        return []
    worst = max(found, key=lambda row: _ms(row, "ms_median") / _ms(row, "ms_min"))
    return [
        f"disturbed: the median is more than {DISTURBED:g} times the minimum in {len(found)} of {len(rows)} rows, most "
        f"in {worst.case}, batch {worst.batch}, {worst.provider} "
        f"({_ms(worst, 'ms_median') / _ms(worst, 'ms_min'):.1f} times); repeat it on an idle machine"
    ]


def _ms(row: Row, name: str) -> float:
    value = getattr(row, name)
    return math.inf if value is None else float(value)
