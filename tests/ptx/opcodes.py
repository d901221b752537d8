"""What each PTX instruction does to the 32 lanes of a warp, after the PTX ISA manual (version 9.0).

`translate` turns every instruction into a function of (warp, mask): registers are arrays (32,) of the unsigned type of
their width, or of bool; a function never writes into an array, so that registers may share one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.memory import ALL, LANES, NONE, Fault
from tests.ptx.parser import Instruction, Kernel, elements

if TYPE_CHECKING:
    from tests.ptx.machine import Warp

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
KIND = {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}
# What an undefined register holds: NaN in every format, and no address.
GARBAGE = {1: ALL} | {bits: np.full(32, 0x7FFD7FFD7FFD7FFD % (1 << bits), UNSIGNED[bits]) for bits in (8, 16, 32, 64)}
Read = Callable[["Warp"], np.ndarray]
Write = Callable[["Warp", np.ndarray, np.ndarray], None]
Act = Callable[["Warp", np.ndarray], None]

TOGETHER = ("mma", "ldmatrix", "stmatrix", "shfl", "vote", "redux", "activemask")
BUILDERS: dict[str, Callable[..., Act]] = {}


@dataclass
class Program:
    """A kernel as functions: (kind, guard, what to do or the target of a branch) for each instruction."""

    kernel: Kernel
    widths: list[int]
    code: list[tuple[int, tuple[int, bool] | None, Any]]


def translate(kernel: Kernel, kinds: dict[str, int]) -> Program:
    """Translate all instructions; NotImplementedError names one that is not known."""
    operands = Operands(kernel)
    code = []
    for one in kernel.instructions:
        kind, act = _kind(one, kernel)
        if act is None:
            builder = BUILDERS.get(one.parts[0])
            if builder is None:
                raise NotImplementedError(one.text)
            act = builder(one.parts, one.operands, operands)
        guard = (operands.register(one.guard[0]), one.guard[1]) if one.guard else None
        code.append((kinds[kind], guard, act))
    return Program(kernel, [kernel.width(name) for name in operands.numbers], code)


def _kind(one: Instruction, kernel: Kernel) -> tuple[str, Any]:
    """How control continues, and what is done where that is no function."""
    name = one.opcode
    if one.parts[0] == "bra":
        return "branch", kernel.labels[one.operands[0]]
    if one.parts[0] in ("ret", "exit"):
        return "exit", name
    if name in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.cta.sync"):
        if one.guard is not None or one.operands not in (("0",), ("0x0",)):
            raise NotImplementedError(one.text)
        return "barrier", name
    if name.startswith("barrier.cluster.arrive"):
        return "cluster arrive", name
    if name.startswith("barrier.cluster.wait"):
        return "cluster wait", name
    return ("together" if one.parts[0] in TOGETHER else "plain"), None


def op(*names: str) -> Callable[[Callable[..., Act]], Callable[..., Act]]:
    """Register what builds the function of these opcodes: (parts, operands, Operands) -> function."""

    def register(builder: Callable[..., Act]) -> Callable[..., Act]:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def dtype(kind: str) -> Any:
    """Return numpy's type of "s32", "f16", "b64", "pred"."""
    return np.bool_ if kind == "pred" else KIND[kind[0]][int(kind[1:])]


class Operands:
    """Turns operands into functions that read or write them."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.numbers: dict[str, int] = {}

    def register(self, name: str) -> int:
        """The number of a register."""
        return self.numbers.setdefault(name, len(self.numbers))

    def read(self, operand: str, type: Any) -> Read:
        """What reads an operand as (32,) of a type; a wider register is truncated, a narrower one zero-extended."""
        if operand.startswith("!"):
            read = self.read(operand[1:], type)
            return lambda warp: ~read(warp)
        width = self.kernel.width(operand)
        if width is None:
            return self._read_other(operand, type)
        at, bits = self.register(operand), np.dtype(type).itemsize * 8
        if width == 1 or (width == bits and type is UNSIGNED[bits]):
            return lambda warp: known(warp, at)
        if width == bits:
            return lambda warp: known(warp, at).view(type)
        unsigned = UNSIGNED[bits]
        return lambda warp: known(warp, at).astype(unsigned).view(type)

    def number(self, operand: str, kind: str) -> Read:
        """What reads an operand of a kind, "s32" or "f32"; of "bf16" as float32."""
        if kind != "bf16":
            return self.read(operand, dtype(kind))
        bits = self.read(operand, np.uint16)
        return lambda warp: from_bf16(bits(warp))

    def _read_other(self, operand: str, type: Any) -> Read:
        special = re.fullmatch(r"%(tid|ctaid|nctaid|ntid)\.([xyz])|%(laneid|clusterid\.x|cluster_ctarank)", operand)
        if special:
            return _special(operand, type)
        symbols = {**{name: at for name, (at, _) in self.kernel.parameters.items()}, **self.kernel.shared}
        value = _constant(symbols.get(operand, operand), np.dtype(type))
        return lambda warp: value

    def write(self, operand: str) -> Write:
        """What writes the lanes of a mask to a register."""
        if operand == "_":
            return lambda warp, mask, value: None
        at, width = self.register(operand), self.kernel.width(operand)
        type = UNSIGNED[width]

        def put(warp: Warp, mask: np.ndarray, value: np.ndarray) -> None:
            if value.dtype != type and width > 1:
                value = (
                    value.astype(SIGNED[width] if value.dtype.kind == "i" else type).view(type)
                    if value.dtype.itemsize * 8 != width
                    else value.view(type)
                )
            before = warp.undefined.pop(at, NONE)
            undefined = warp.doubt
            if mask is not ALL:
                old = warp.registers[at]
                value = np.where(mask, value, GARBAGE[width] if old is None else old)
                undefined = np.where(mask, undefined, before)
            if undefined is not NONE and undefined.any():
                warp.undefined[at] = undefined
            warp.registers[at] = value

        return put

    def address(self, operand: str) -> Read:
        """What reads the address [base + offset], int64."""
        base, offset = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        add, width = int(offset or "0", 0), self.kernel.width(base)
        read = self.read(base, UNSIGNED[width or 64])
        return lambda warp: read(warp).astype(np.int64) + add


def known(warp: Warp, at: int) -> np.ndarray:
    """Read a register (32,)."""
    if at in warp.undefined:
        warp.doubt = warp.doubt | warp.undefined[at]
        if warp.registers[at] is None:
            return GARBAGE[warp.block.machine.program.widths[at]]
    return warp.registers[at]


def _special(operand: str, type: Any) -> Read:
    axis = "xyz".index(operand[-1]) if operand[-2] == "." else 0
    spread = lambda value: np.full(32, value, np.uint32)  # noqa: E731
    values: dict[str, Read] = {
        "%tid": lambda warp: (LANES + 32 * warp.index).astype(np.uint32) if axis == 0 else spread(0),
        "%ntid": lambda warp: spread(warp.block.machine.threads if axis == 0 else 1),
        "%ctaid": lambda warp: spread(warp.block.id[axis]),
        "%nctaid": lambda warp: spread(warp.block.machine.grid[axis]),
        "%laneid": lambda warp: LANES.astype(np.uint32),
        "%cluster_ctarank": lambda warp: spread(warp.block.cluster.index(warp.block)),
    }
    read, unsigned = values[operand.split(".")[0]], UNSIGNED[np.dtype(type).itemsize * 8]
    return lambda warp: read(warp).astype(unsigned).view(type)


def _constant(value: int | str, type: np.dtype) -> np.ndarray:
    """(32,) of a literal: a number, or the bits of a float as 0f3F800000 or 0d..."""
    bits = type.itemsize * 8
    if isinstance(value, str) and re.fullmatch(r"0[fFdD][0-9a-fA-F]+", value):
        source = {8: np.uint32, 16: np.uint64}[len(value) - 2]
        number = np.array(int(value[2:], 16), source).view(np.float32 if source is np.uint32 else np.float64)
        return np.full(32, number).astype(type) if type.kind == "f" else np.full(32, number).view(type)
    number = value if isinstance(value, int) else int(value.rstrip("U"), 0)
    if type.kind == "b":
        return np.full(32, bool(number))
    return np.full(32, number & ((1 << bits) - 1), UNSIGNED[bits]).view(type)


# ---- arithmetic


def elementwise(parts: list[str], args: tuple[str, ...], operands: Operands, function: Callable[..., Any]) -> Act:
    """An instruction that computes each lane by itself from operands of one type."""
    put, reads = operands.write(args[0]), [operands.number(arg, parts[-1]) for arg in args[1:]]
    if parts[-1] == "bf16":
        return lambda warp, mask: put(warp, mask, to_bf16(function(*(read(warp) for read in reads))))
    if len(reads) == 2:
        x, y = reads
        return lambda warp, mask: put(warp, mask, function(x(warp), y(warp)))
    return lambda warp, mask: put(warp, mask, function(*(read(warp) for read in reads)))


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Rounded once: a product of two floats is exact in double, the sum's second rounding is all but never seen."""
    if x.dtype.kind != "f":
        return x * y + z
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype)


def _upper(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide = {"i": np.int64, "u": np.uint64}[x.dtype.kind]
    return ((x.astype(wide) * y.astype(wide)) >> wide(32)).astype(x.dtype)


SIMPLE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "fma": _fma,
    "mad": _fma,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    "rcp": lambda x: x.dtype.type(1) / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "copysign": lambda x, y: np.copysign(y, x),
}


@op(*SIMPLE)
def simple(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    if "wide" in parts:
        narrow = dtype(parts[-1])
        wide = KIND[parts[-1][0]][2 * int(parts[-1][1:])]
        put, x, y = operands.write(args[0]), operands.read(args[1], narrow), operands.read(args[2], narrow)
        z = operands.read(args[3], wide) if len(args) > 3 else lambda warp: wide(0)
        return lambda warp, mask: put(warp, mask, x(warp).astype(wide) * y(warp).astype(wide) + z(warp))
    if "hi" in parts:
        assert parts[-1] in ("s32", "u32") and parts[0] == "mul"
        return elementwise(parts, args, operands, _upper)
    if parts[-1] in ("bf16x2", "f16x2"):
        raise NotImplementedError(".".join(parts))
    return elementwise(parts, args, operands, SIMPLE[parts[0]])


@op("min", "max")
def extreme(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """Of a NaN and a number the number, unless `.NaN`."""
    number = parts[-1].startswith(("f", "bf")) and "NaN" not in parts
    function = {("min", True): np.fmin, ("max", True): np.fmax, ("min", False): np.minimum, ("max", False): np.maximum}
    return elementwise(parts, args, operands, function[parts[0], number])


@op("div", "rem")
def divide(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    if parts[-1].startswith("f"):
        return elementwise(parts, args, operands, np.divide)
    type = dtype(parts[-1])
    put, x, y = operands.write(args[0]), operands.read(args[1], type), operands.read(args[2], type)

    def run(warp: Warp, mask: np.ndarray) -> None:
        numerator, denominator = x(warp), y(warp)
        if ((denominator == 0) & mask).any():
            raise Fault(f"division by zero: {warp.where()}")
        denominator = np.where(denominator == 0, type(1), denominator)
        remainder = np.fmod(numerator, denominator)  # the sign of the numerator, as division rounds to zero
        put(warp, mask, remainder if parts[0] == "rem" else (numerator - remainder) // denominator)

    return run


@op("shl", "shr")
def shift(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """Amounts of the width or more shift everything out; `shr.s` fills with the sign."""
    type = dtype(parts[-1])
    put, x, amount = operands.write(args[0]), operands.read(args[1], type), operands.read(args[2], np.uint32)
    most = np.dtype(type).itemsize * 8 - 1

    def run(warp: Warp, mask: np.ndarray) -> None:
        value, by = x(warp), amount(warp)
        inside = np.minimum(by, most).astype(value.dtype)
        shifted = value << inside if parts[0] == "shl" else value >> inside
        keeps_sign = parts[0] == "shr" and np.dtype(type).kind == "i"
        put(warp, mask, shifted if keeps_sign else np.where(by > most, type(0), shifted))

    return run


@op("shf")
def funnel_shift(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    put = operands.write(args[0])
    low, high, amount = (operands.read(arg, np.uint32) for arg in args[1:4])

    def run(warp: Warp, mask: np.ndarray) -> None:
        by = amount(warp) & np.uint32(31) if "wrap" in parts else np.minimum(amount(warp), 32)
        both = high(warp).astype(np.uint64) << np.uint64(32) | low(warp)
        by = by.astype(np.uint64)
        put(warp, mask, (both << by >> np.uint64(32) if parts[1] == "l" else both >> by).astype(np.uint32))

    return run


@op("bfi")
def insert_field(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    put = operands.write(args[0])
    field, base, start, length = (operands.read(arg, np.uint32) for arg in args[1:5])

    def run(warp: Warp, mask: np.ndarray) -> None:
        at = start(warp).astype(np.uint64)
        bits = ((np.uint64(1) << length(warp).astype(np.uint64)) - np.uint64(1)) << at
        put(warp, mask, (base(warp) & ~bits | field(warp).astype(np.uint64) << at & bits).astype(np.uint32))

    return run


@op("bfe")
def extract_field(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """Bits past the field, or past the register, are copies of the field's sign; 0 in `bfe.u32`."""
    put, x = operands.write(args[0]), operands.read(args[1], np.uint32)
    start, length = operands.read(args[2], np.uint32), operands.read(args[3], np.uint32)

    def run(warp: Warp, mask: np.ndarray) -> None:
        value, first, count = (read(warp).astype(np.uint64) for read in (x, start, length))
        bits = (np.uint64(1) << np.minimum(count, 32)) - np.uint64(1)
        field = value >> np.minimum(first, 63) & bits
        if parts[1] == "s32":
            sign = value >> np.minimum(first + count - np.uint64(1), 31) & np.uint64(1) & (count > 0)
            inside = (np.uint64(1) << np.minimum(count, np.uint64(32) - np.minimum(first, 32))) - np.uint64(1)
            field = field & inside | np.where(sign == 1, ~inside, np.uint64(0))
        put(warp, mask, field.astype(np.uint32))

    return run


@op("prmt")
def permute_bytes(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    put = operands.write(args[0])
    low, high, selector = (operands.read(arg, np.uint32) for arg in args[1:4])

    def run(warp: Warp, mask: np.ndarray) -> None:
        both = np.stack([low(warp), high(warp)], 1).view(np.uint8)
        select, out = selector(warp), np.zeros((32, 4), np.uint8)
        for byte in range(4):
            nibble = select >> np.uint32(4 * byte) & np.uint32(15)
            value = both[LANES, nibble & 7]
            out[:, byte] = np.where(nibble & 8, np.where(value & 0x80, 0xFF, 0), value)
        put(warp, mask, out.view(np.uint32)[:, 0])

    return run


@op("lop3")
def logic3(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    put, table = operands.write(args[0]), int(args[4], 0)
    reads = [operands.read(arg, np.uint32) for arg in args[1:4]]

    def run(warp: Warp, mask: np.ndarray) -> None:
        values, out = [read(warp) for read in reads], np.zeros(32, np.uint32)
        for row in range(8):
            if table >> row & 1:
                x, y, z = (v if row & bit else ~v for v, bit in zip(values, (4, 2, 1), strict=True))
                out |= x & y & z
        put(warp, mask, out)

    return run


@op("popc")
def count_ones(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    put, x = operands.write(args[0]), operands.read(args[1], np.uint32)
    return lambda warp, mask: put(
        warp, mask, np.unpackbits(x(warp).view(np.uint8)).reshape(32, 32).sum(1, dtype=np.uint32)
    )


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@op("setp")
def compare(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """With a NaN: false, unless the comparison ends in u; `num` and `nan` ask for it."""
    x, y = operands.number(args[1], parts[-1]), operands.number(args[2], parts[-1])
    puts = [operands.write(target) for target in args[0].split("|")]
    combine = COMBINE.get(parts[2])
    other = operands.read(args[3], np.bool_) if combine else None

    def run(warp: Warp, mask: np.ndarray) -> None:
        left, right = x(warp), y(warp)
        if left.dtype.kind == "f":
            nan = np.isnan(left) | np.isnan(right)
            if parts[1] in ("num", "nan"):
                result = nan if parts[1] == "nan" else ~nan
            elif parts[1] in COMPARE:
                result = COMPARE[parts[1]](left, right) & ~nan
            else:
                result = COMPARE[parts[1][:-1]](left, right) | nan
        else:
            result = COMPARE[parts[1]](left, right)
        second = ~result
        if combine is not None:
            result, second = combine(result, other(warp)), combine(second, other(warp))
        for put, value in zip(puts, (result, second), strict=False):
            put(warp, mask, value)

    return run


@op("selp")
def select(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    type = dtype(parts[-1])
    put, x, y = operands.write(args[0]), operands.read(args[1], type), operands.read(args[2], type)
    condition = operands.read(args[3], np.bool_)

    def run(warp: Warp, mask: np.ndarray) -> None:
        """What is not selected may be undefined."""
        chosen, doubt = condition(warp), warp.doubt
        warp.doubt = NONE
        left, doubt_left = x(warp), warp.doubt
        warp.doubt = NONE
        right, doubt_right = y(warp), warp.doubt
        warp.doubt = doubt | np.where(chosen, doubt_left, doubt_right)
        put(warp, mask, np.where(chosen, left, right))

    return run


@op("mov")
def move(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """A copy; {a, b} packs or unpacks, the first element lowest."""
    type, sources, targets = dtype(parts[-1]), elements(args[1]), elements(args[0])
    if len(sources) == len(targets) == 1:
        put, x = operands.write(args[0]), operands.read(args[1], type)
        return lambda warp, mask: put(warp, mask, x(warp))
    whole = UNSIGNED[np.dtype(type).itemsize * 8]
    part = UNSIGNED[np.dtype(type).itemsize * 8 // max(len(sources), len(targets))]
    if len(sources) > 1:
        put, reads = operands.write(args[0]), [operands.read(source, part) for source in sources]
        return lambda warp, mask: put(warp, mask, np.stack([read(warp) for read in reads], 1).view(whole)[:, 0])
    puts, x = [operands.write(target) for target in targets], operands.read(args[1], whole)

    def unpack(warp: Warp, mask: np.ndarray) -> None:
        columns = np.ascontiguousarray(x(warp)).view(part).reshape(32, -1)
        for put, column in zip(puts, columns.T, strict=True):
            put(warp, mask, column.copy())

    return unpack


@op("cvta")
def to_space(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """Only between generic and global addresses, which are the same here."""
    if "shared" in parts:
        raise NotImplementedError(".".join(parts))
    put, x = operands.write(args[0]), operands.read(args[1], np.uint64)
    return lambda warp, mask: put(warp, mask, x(warp))


# ---- conversions


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; the bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The float32 of a bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(bits: np.ndarray) -> np.ndarray:
    """`cvt.rna`: 10 bits of mantissa, ties away from zero; what is not finite stays."""
    finite = bits & np.uint32(0x7F800000) != np.uint32(0x7F800000)
    return np.where(finite, bits + np.uint32(0x1000) & np.uint32(0xFFFFE000), bits)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@op("cvt")
def convert(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    to, source = parts[-2:]
    put = operands.write(args[0])
    if "sat" in parts or "relu" in parts:
        raise NotImplementedError(".".join(parts))
    if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
        upper, lower = operands.read(args[1], np.float32), operands.read(args[2], np.float32)
        half = to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        return lambda warp, mask: put(
            warp, mask, half(lower(warp)).astype(np.uint32) | half(upper(warp)).astype(np.uint32) << np.uint32(16)
        )
    if to == "tf32":
        if "rna" not in parts:
            raise NotImplementedError(".".join(parts))
        x = operands.read(args[1], np.uint32)
        return lambda warp, mask: put(warp, mask, to_tf32(x(warp)))
    number = operands.number(args[1], source)
    if to == "bf16":
        return lambda warp, mask: put(warp, mask, to_bf16(number(warp)))
    target, rounding = dtype(to), next((ROUND[part] for part in parts if part in ROUND), None)

    def run(warp: Warp, mask: np.ndarray) -> None:
        value = number(warp)
        if value.dtype.kind == "f" and np.dtype(target).kind != "f":
            # Out of range: the nearest value of the target, and 0 for NaN.
            limits = np.iinfo(target)
            value = np.clip(np.nan_to_num(rounding(value.astype(np.float64)), nan=0.0), limits.min, limits.max)
        put(warp, mask, value.astype(target))

    return run


# ---- memory


def space_of(parts: list[str]) -> str:
    """The state space that an access names."""
    for name in ("param", "global", "shared::cluster", "shared"):
        if name in ".".join(parts):
            return "cluster" if name == "shared::cluster" else name
    raise NotImplementedError("generic addresses: " + ".".join(parts))


@op("ld")
def load(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    type, space, address = dtype(parts[-1]), space_of(parts), operands.address(args[1])
    puts = [operands.write(target) for target in elements(args[0])]
    size = np.dtype(type).itemsize * len(puts)

    def run(warp: Warp, mask: np.ndarray) -> None:
        values = warp.load(space, address(warp), size, mask).view(type)
        for i, put in enumerate(puts):
            put(warp, mask, values[:, i].copy())

    return run


@op("st")
def store(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    type, space, address = dtype(parts[-1]), space_of(parts), operands.address(args[0])
    reads = [operands.read(source, type) for source in elements(args[1])]
    return lambda warp, mask: warp.store(
        space, address(warp), np.stack([read(warp) for read in reads], 1).view(np.uint8), mask
    )


@op("cp")
def copy_async(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    name = ".".join(parts)
    if name == "cp.async.commit_group":
        return lambda warp, mask: warp.commit_copies()
    if name == "cp.async.wait_group":
        groups = int(args[0], 0)
        return lambda warp, mask: warp.wait_copies(groups)
    if name == "cp.async.wait_all":
        return lambda warp, mask: (warp.commit_copies(), warp.wait_copies(0))[0]
    to, source, size = operands.address(args[0]), operands.address(args[1]), int(args[2], 0)
    used = operands.read(args[3] if len(args) > 3 else str(size), np.uint32)
    return lambda warp, mask: warp.copy_async(to(warp), source(warp), size, used(warp), mask)


@op("ldmatrix")
def load_matrices(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """Lane 8 i + r names row r of matrix i; lane l gets the words l % 4 of row l / 4."""
    if "trans" in parts:
        raise NotImplementedError(".".join(parts))
    puts, address = [operands.write(target) for target in elements(args[0])], operands.address(args[1])
    named = LANES < 8 * len(puts)

    def run(warp: Warp, mask: np.ndarray) -> None:
        rows = warp.load("shared", address(warp), 16, named).view(np.uint32)
        for i, put in enumerate(puts):
            put(warp, mask, rows[8 * i + LANES // 4, LANES % 4])

    return run


@op("stmatrix")
def store_matrices(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    if "trans" in parts:
        raise NotImplementedError(".".join(parts))
    address, reads = operands.address(args[0]), [operands.read(source, np.uint32) for source in elements(args[1])]

    def run(warp: Warp, mask: np.ndarray) -> None:
        rows = np.zeros((32, 4), np.uint32)
        for i, read in enumerate(reads):
            rows[8 * i : 8 * i + 8] = read(warp).reshape(8, 4)
        warp.require_defined(mask)
        warp.store("shared", address(warp), rows.view(np.uint8), LANES < 8 * len(reads))

    return run


@op("mapa")
def map_address(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    put, x, rank = operands.write(args[0]), operands.read(args[1], np.uint32), operands.read(args[2], np.uint32)
    return lambda warp, mask: put(warp, mask, x(warp) | rank(warp) + np.uint32(1) << np.uint32(24))


@op("fence", "membar", "griddepcontrol", "prefetch", "nop")
def nothing(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    return lambda warp, mask: None


@op("trap")
def trap(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    def run(warp: Warp, mask: np.ndarray) -> None:
        raise Fault(f"trap: {warp.where()}")

    return run


# ---- all lanes of a warp together


@op("mma")
def multiply_matrices(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """D (16 x 8) = A (16 x K) B (K x 8) + C in fragments; products and their sum in double, rounded once."""
    depth, form = int(re.search(r"m16n8k(\d+)", parts[3])[1]), parts[-2]
    targets, left, right, sums = (elements(arg) for arg in args)
    puts, c = [operands.write(target) for target in targets], [operands.read(arg, np.float32) for arg in sums]
    a, b = ([operands.read(arg, np.uint32) for arg in each] for each in (left, right))
    row, column = LANES // 4, LANES % 4
    words = 1 if form == "tf32" else 2  # elements of a register

    def values(warp: Warp, bits: np.ndarray) -> np.ndarray:
        if form == "tf32":
            if (bits & np.uint32(0x1FFF)).any() and np.isfinite(bits.view(np.float32)).all():
                warp.note("mma: a tf32 operand that was not rounded")
            return bits.view(np.float32)[:, None].astype(np.float64)
        halves = bits.view(np.uint16).reshape(32, 2)
        return (halves.view(np.float16) if form == "f16" else from_bf16(halves)).astype(np.float64)

    def run(warp: Warp, mask: np.ndarray) -> None:
        x, y = np.zeros((16, depth)), np.zeros((depth, 8))
        for i, read in enumerate(a):
            found = values(warp, read(warp))
            for k in range(words):
                x[row + 8 * (i & 1), words * (column + 4 * (i >> 1)) + k] = found[:, k]
        for i, read in enumerate(b):
            found = values(warp, read(warp))
            for k in range(words):
                y[words * (column + 4 * i) + k, row] = found[:, k]
        warp.require_defined(mask)
        product = x @ y
        for i, put in enumerate(puts):
            sum_ = product[row + 8 * (i >> 1), 2 * column + (i & 1)] + c[i](warp)
            put(warp, mask, sum_.astype(np.float32))

    return run


@op("shfl")
def shuffle(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    """Lane l gets the value of another lane of its segment, or its own where there is none."""
    targets = [operands.write(target) for target in args[0].split("|")]
    x, b, c = (operands.read(arg, np.uint32) for arg in args[1:4])
    mode = parts[2]

    def run(warp: Warp, mask: np.ndarray) -> None:
        value, by, clamp = x(warp), b(warp).astype(int), c(warp).astype(int)
        segment = clamp >> 8 & 31
        most, least = LANES & segment | clamp & 31 & ~segment, LANES & segment
        if mode == "idx":
            source = least | by & ~segment & 31
        else:
            source = {"up": LANES - by, "down": LANES + by, "bfly": LANES ^ by}[mode]
        valid = source >= most if mode == "up" else source <= most
        source = np.where(valid, source, LANES) & 31
        if not mask[source][mask].all():
            warp.note("shfl reads a lane that takes no part")
        warp.doubt = warp.doubt[source]
        for put, result in zip(targets, (value[source], valid), strict=False):
            put(warp, mask, result)

    return run


@op("vote")
def vote(parts: list[str], args: tuple[str, ...], operands: Operands) -> Act:
    put, x = operands.write(args[0]), operands.read(args[1], np.bool_)

    def run(warp: Warp, mask: np.ndarray) -> None:
        yes = x(warp) & mask
        warp.require_defined(mask)
        if parts[2] == "ballot":
            bits = np.packbits(yes, bitorder="little").view(np.uint32)[0]
            put(warp, mask, np.full(32, bits, np.uint32))
        else:
            put(warp, mask, np.full(32, yes.any() if parts[2] == "any" else (yes | ~mask).all()))

    return run
