"""PTX text -> kernels: parameters, registers, labels and a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: With all its modifiers: "ld.global.v4.u32".
        operands: In order; a vector in braces or an address in brackets is one operand.
        guard: Predicate register and whether it is negated; None: always executed.
        text: As it is written, for messages.
    """

    opcode: str
    operands: tuple[str, ...] = ()
    guard: tuple[str, bool] | None = None
    text: str = ""

    @property
    def parts(self) -> list[str]:
        """The opcode's parts: ["ld", "global", "v4", "u32"]."""
        return self.opcode.split(".")


@dataclass
class Kernel:
    """One `.entry`.

    Attributes:
        parameters: name -> (offset in the parameter space, bytes).
        registers: name, or prefix before a number, -> bits, 1 for predicates.
        labels: name -> index of the instruction that follows.
        shared: symbol -> offset in shared memory; a dynamic one follows the static ones.
        shared_bytes: Of the static ones.
        program: What `opcodes.translate` made of it, once it has run.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    registers: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    program: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameter space."""
        return max((at + size for at, size in self.parameters.values()), default=0)

    def width(self, register: str) -> int | None:
        """Bits of a register, None if there is no such register."""
        if register in self.registers:
            return self.registers[register]
        return self.registers.get(register.rstrip("0123456789") + "<>")

    def without(self, *indices: int) -> Kernel:
        """A copy in which instructions do nothing: what a missing barrier does, say."""
        changed = [Instruction("nop") if at in indices else one for at, one in enumerate(self.instructions)]
        return replace(self, instructions=changed)


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a module by name."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    text = re.sub(r"^\s*\.section\b.*?^\s*\}", "", text, flags=re.M | re.S)
    text = re.sub(r"^\s*\.(file|section|loc)\b[^\n]*$", "", text, flags=re.M)
    dynamic = re.findall(r"\.extern\s+\.shared[^;]*?\.b8\s+([\w$]+)\s*\[", text)
    kernels = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{(.*?)\n\}", text, re.S):
        kernel = Kernel(match[1], _parameters(match[2]))
        for statement in match[4].split(";"):
            _add_statement(kernel, statement)
        kernel.shared.update((symbol, -(-kernel.shared_bytes // 16) * 16) for symbol in dynamic)
        kernels[kernel.name] = kernel
    return kernels


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    at = 0
    for line in text.split(","):
        match = re.search(r"\.param\s+(.*?)([\w$]+)\s*(?:\[(\d+)\])?\s*$", line.strip(), re.S)
        if match is None:
            continue
        words, name, count = match[1], match[2], match[3]
        element = int(re.search(r"\.[busf](\d+)", words)[1]) // 8
        named = re.search(r"\.align\s+(\d+)", words)
        # After `.ptr` an alignment is that of the memory pointed to.
        align = int(named[1]) if named and ".ptr" not in words else element
        at = -(-at // align) * align
        found[name] = (at, element * int(count or 1))
        at += found[name][1]
    return found


def _add_statement(kernel: Kernel, statement: str) -> None:
    statement = statement.strip()
    # Scopes of inline assembly, and labels, precede what a statement says.
    while match := re.match(r"(?:[{}]|[\w$]+:(?!:))\s*", statement):
        if match[0].strip() not in "{}":
            kernel.labels[match[0].strip()[:-1]] = len(kernel.instructions)
        statement = statement[match.end() :]
    if not statement or statement.startswith(".pragma"):
        return
    if statement.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        bits = 1 if kind == "pred" else int(kind[1:])
        for name in names.split(","):
            kernel.registers[re.sub(r"<\d+>", "<>", name.strip())] = bits
    elif statement.startswith(".shared"):
        align, name, count = re.search(r"(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d+)\]", statement).groups()
        at = -(-kernel.shared_bytes // int(align or 1)) * int(align or 1)
        kernel.shared[name], kernel.shared_bytes = at, at + int(count)
    else:
        kernel.instructions.append(_instruction(statement))


def _instruction(text: str) -> Instruction:
    guard, rest = None, text
    if match := re.match(r"@(!?)(%?[\w$]+)\s+", text):
        guard, rest = (match[2], match[1] == "!"), text[match.end() :]
    opcode, _, operands = rest.partition(" ") if " " in rest else rest.partition("\t")
    if "\t" in opcode:
        opcode, _, first = opcode.partition("\t")
        operands = first + " " + operands
    return Instruction(opcode.strip(), tuple(split(operands)), guard, " ".join(text.split()))


def split(operands: str) -> list[str]:
    """Split at the commas that are in no braces or brackets."""
    parts = re.split(r",(?![^{\[]*[}\]])", operands)
    return [part.strip() for part in parts if part.strip()]


def elements(operand: str) -> list[str]:
    """The registers of a vector operand; of any other, itself."""
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else [operand]
