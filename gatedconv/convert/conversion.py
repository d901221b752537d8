"""The report of a conversion: its gates, and the layers without one and why; and the choice of layers by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

Choice = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass
class Conversion:
    """The record that ``gate_model`` leaves on its result as ``conversion``.

    Attributes:
        gated: gate path -> what it gates (a residual branch or a layer).
        skipped: layer or block -> why it has no gate.
        reachable_macs: 0 to 1, the share of the model's MACs that at least one gate scales.
        estimated: module -> by how much, where ``expected_macs`` is an estimate: it was off in a trial at random masks.
            Empty: at masks of 0 and 1 it is what ``count_macs`` finds in the compact network.
        note: what could not be checked or counted; empty otherwise.
        traced_by: "run": the layers were found in one recorded run of the model's own code.
    """

    gated: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    reachable_macs: float = 0.0
    estimated: dict[str, str] = field(default_factory=dict)
    note: str = ""
    traced_by: str = "run"  # its one value: kept, since scripts outside this project print it

    def __str__(self) -> str:
        lines = [f"{len(self.gated)} gates reach {self.reachable_macs:.1%} of the MACs (traced by {self.traced_by})"]
        lines += [self.note] if self.note else []
        lines += [f"  {gate}: {what}" for gate, what in self.gated.items()]
        lines += [f"  not gated, {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  MACs estimated, {name}: {why}" for name, why in self.estimated.items()]
        return "\n".join(lines)


class Selection:
    """``include`` and ``exclude`` of ``gate_model``."""

    def __init__(self, include: Choice, exclude: Choice) -> None:
        self.include = _checked(include, "include")
        self.exclude = _checked(exclude, "exclude")
        self.names: list[str] = []
        self.unused = {p for choice in (self.include, self.exclude) if isinstance(choice, list) for p in choice}

    def reason(self, name: str, module: nn.Module) -> str:
        """Why the layer or block is not to be gated; empty if it is."""
        self.names.append(name)
        included = self.include is None or self._matches(self.include, name, module)
        excluded = self.exclude is not None and self._matches(self.exclude, name, module)
        return "in exclude" if excluded else "" if included else "not in include"

    def names_exactly(self, name: str) -> bool:
        """Whether ``include`` has this very name, and no pattern or block that covers it."""
        return isinstance(self.include, list) and name in self.include

    def require_used(self) -> None:
        """Raise for names and patterns that no layer and no block has.

        Raises:
            ValueError: naming them and, where there are some, similar names.
        """
        if not self.unused:
            return
        alike = sorted({n for p in self.unused for n in difflib.get_close_matches(p, self.names, 3)})
        hint = f"; did you mean {', '.join(map(repr, alike))}?" if alike else ""
        raise ValueError(
            f"gate_model: include or exclude names match nothing: {sorted(self.unused)}; expected names or patterns of "
            f"convolutions and residual blocks, or of modules that hold some{hint}"
        )

    def _matches(self, choice: list[str] | Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
        if callable(choice):
            return bool(choice(name, module))
        hits = {p for p in choice if fnmatch.fnmatchcase(name, p) or name.startswith(f"{p}.")}
        self.unused -= hits
        return bool(hits)


def _checked(choice: Choice, argument: str) -> list[str] | Callable[[str, nn.Module], bool] | None:
    if choice is None or callable(choice):
        return choice
    patterns = [choice] if isinstance(choice, str) else list(choice) if isinstance(choice, Iterable) else [choice]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"gate_model: {argument} must be a name, a pattern, a list of them or a callable, got {choice!r}"
        )
    return patterns
