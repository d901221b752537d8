"""Single instructions of the interpreter against the PTX ISA manual (9.0), and what its checks find."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tests.ptx.machine import KINDS, Machine
from tests.ptx.memory import Fault, GlobalMemory
from tests.ptx.opcodes import translate
from tests.ptx.parser import parse

LANES = np.arange(32)
HEADER = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
 .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<20>;
 .shared .align 16 .b8 room[4096];
 ld.param.u64 %rd1, [kernel_param_0];
 ld.param.u64 %rd2, [kernel_param_1];
 mov.u32 %r1, %tid.x;
 mul.wide.u32 %rd3, %r1, 4;
 add.s64 %rd1, %rd1, %rd3;
"""


def machine_of(body, values=(), threads=32, grid=(1,), ranks=1, seed=0):
    """Run a kernel: %r1 thread, %rd1 the thread's word of the input, %rd2 the output. Returns output words, machine."""
    (kernel,) = parse(HEADER + body + "\n ret;\n}\n").values()
    memory = GlobalMemory()
    source = memory.place(np.asarray(values if len(values) else np.zeros(threads), np.uint32))
    target = memory.place(np.zeros(4 * threads * len(range(*grid)), np.uint32))
    machine = Machine(memory, seed)
    machine.launch(kernel, grid, threads, [struct.pack("<Q", source), struct.pack("<Q", target)], 4096, ranks)
    return memory.read_back(target, np.zeros(4 * threads, np.uint32)), machine


def apply(instruction, values, result="%r9", width=32):
    """What an instruction makes of a word per lane in %r2 (%f2: the same bits), as words."""
    store = {"%p1": "selp.u32 %r9, 1, 0, %p1; ", "%rd9": ""}.get(result, "")
    if result == "%f9":
        store = "mov.b32 %r9, %f9; "
    if result == "%h1":
        store = "cvt.u32.u16 %r9, %h1; "
    end = "st.global.u64 [%rd4], %rd9;" if result == "%rd9" else "st.global.u32 [%rd4], %r9;"
    step = 8 if result == "%rd9" else 4
    body = f"""
 ld.global.u32 %r2, [%rd1]; mov.b32 %f2, %r2; cvt.u16.u32 %h2, %r2;
 {instruction}; {store}
 mul.wide.u32 %rd3, %r1, {step}; add.s64 %rd4, %rd2, %rd3; {end}"""
    words, machine = machine_of(body, np.resize(np.asarray(values), 32).astype(np.uint32))
    assert not machine.notes
    return words[:64].view(np.uint64)[: len(values)] if step == 8 else words[: len(values)]


def bits(*numbers):
    return np.array(numbers, np.float32).view(np.uint32)


def signed(words):
    return words.view(np.int32).tolist()


@pytest.mark.parametrize(
    ("instruction", "values", "expected"),
    [
        ("add.s32 %r9, %r2, -3", [2, 3], [-1, 0]),
        ("sub.s32 %r9, %r2, 5", [2, 0x80000000], [-3, 0x7FFFFFFB]),
        ("mul.lo.s32 %r9, %r2, %r2", [65537, 0xFFFFFFFF], [131073, 1]),
        ("mul.hi.u32 %r9, %r2, %r2", [65536, 0xFFFFFFFF], [1, -2]),
        ("mul.hi.s32 %r9, %r2, %r2", [65536, 0xFFFFFFFF], [1, 0]),
        ("mad.lo.s32 %r9, %r2, 3, %r2", [5, 0xFFFFFFFF], [20, -4]),
        ("div.s32 %r9, %r2, 4", [7, 0xFFFFFFF9], [1, -1]),
        ("rem.s32 %r9, %r2, 4", [7, 0xFFFFFFF9], [3, -3]),
        ("div.u32 %r9, %r2, 4", [7, 0xFFFFFFF9], [1, 0x3FFFFFFE]),
        ("min.s32 %r9, %r2, 1", [7, 0xFFFFFFF9], [1, -7]),
        ("max.u32 %r9, %r2, 1", [0, 0xFFFFFFF9], [1, -7]),
        ("shl.b32 %r9, 1, %r2", [0, 31, 32, 40], [1, -(1 << 31), 0, 0]),
        ("shr.u32 %r9, -8, %r2", [1, 32], [0x7FFFFFFC, 0]),
        ("shr.s32 %r9, -8, %r2", [1, 32, 99], [-4, -1, -1]),
        ("shf.l.wrap.b32 %r9, 0x80000001, %r2, 4", [1], [0x18]),
        ("shf.r.clamp.b32 %r9, 0x80000001, %r2, 40", [5], [5]),
        ("bfi.b32 %r9, %r2, -1, 4, 8", [0x1AB], [-1 & ~0xFF0 | 0xAB0]),
        ("bfe.u32 %r9, %r2, 4, 8", [0xABCD], [0xBC]),
        ("bfe.s32 %r9, %r2, 4, 8", [0xABCD, 0x7CD], [-0x44, 0x7C]),
        ("bfe.s32 %r9, %r2, 28, 8", [0x80000000, 0x40000000], [-8, 4]),
        ("prmt.b32 %r9, %r2, 0x44332211, 0x5140", [0xDDCCBBAA], [0x22BB11AA]),
        ("prmt.b32 %r9, %r2, 0, 0x9998", [0x80FF], [-1]),
        ("lop3.b32 %r9, %r2, 0xFF00FF00, 0xF0F0F0F0, 0x96", [0xFFFF0000], [0xFFFF0000 ^ 0xFF00FF00 ^ 0xF0F0F0F0]),
        ("popc.b32 %r9, %r2", [0, 0xF00F], [0, 8]),
        ("neg.s32 %r9, %r2", [1, 0x80000000], [-1, -(1 << 31)]),
        ("not.b32 %r9, %r2", [0], [-1]),
        ("mov.b32 {%h3, %h4}, %r2; mov.b32 %r9, {%h4, %h3}", [0x11223344], [0x33441122]),
        ("selp.s32 %r9, 1, 2, %p0; setp.gt.s32 %p1, %r2, 0; selp.s32 %r9, 1, 2, %p1", [1, 0xFFFFFFFF], [1, 2]),
    ],
    ids=str,
)
def test_integers(instruction, values, expected):
    if "%p0" in instruction:
        instruction = "setp.eq.s32 %p0, %r2, 0; " + instruction
    assert signed(apply(instruction, values)) == [n - (1 << 32) if n >= 1 << 31 else n for n in expected]


def test_wide_results():
    assert apply("mul.wide.s32 %rd9, %r2, -2", [3, 0xFFFFFFFF], "%rd9").view(np.int64).tolist() == [-6, 2]
    assert apply("mul.wide.u32 %rd9, %r2, 2", [0xFFFFFFFF], "%rd9").tolist() == [0x1FFFFFFFE]
    assert apply("cvt.s64.s32 %rd9, %r2", [0xFFFFFFFF], "%rd9").view(np.int64).tolist() == [-1]
    assert apply("cvt.u64.u32 %rd9, %r2", [0xFFFFFFFF], "%rd9").tolist() == [0xFFFFFFFF]
    assert apply("mov.b64 %rd9, {%r2, 7}", [5], "%rd9").tolist() == [7 << 32 | 5]


@pytest.mark.parametrize(
    ("instruction", "values", "expected"),
    [
        ("add.f32 %f9, %f2, 0f3F800000", [1.0, -1.0], [2.0, 0.0]),
        ("fma.rn.f32 %f9, %f2, %f2, 0fBF800000", [1 + 2.0**-12], [2.0**-11 + 2.0**-24]),
        ("mul.f32 %f9, %f2, %f2", [1 + 2.0**-12], [np.float32(1 + 2.0**-12) * np.float32(1 + 2.0**-12)]),
        ("min.f32 %f9, %f2, 0f00000000", [np.nan, -1.0], [0.0, -1.0]),
        ("max.NaN.f32 %f9, %f2, 0f00000000", [np.nan, -1.0], [np.nan, 0.0]),
        ("abs.f32 %f9, %f2", [-2.0], [2.0]),
        ("rsqrt.approx.f32 %f9, %f2", [4.0], [0.5]),
        ("ex2.approx.f32 %f9, %f2", [3.0], [8.0]),
        ("lg2.approx.f32 %f9, %f2", [8.0], [3.0]),
        ("div.rn.f32 %f9, %f2, 0f40400000", [1.0], [np.float32(1) / np.float32(3)]),
        ("copysign.f32 %f9, %f2, 0f40400000", [-1.0], [-3.0]),
        (
            "cvt.rn.bf16.f32 %h1, %f2; mov.b32 %r9, {0, %h1}; mov.b32 %f9, %r9",
            [1 + 2.0**-8, 1 + 3 * 2.0**-8],
            [1.0, 1 + 2.0**-6],
        ),
        ("cvt.rna.tf32.f32 %r9, %f2; mov.b32 %f9, %r9", [1 + 2.0**-11, -1 - 2.0**-11], [1 + 2.0**-10, -1 - 2.0**-10]),
        ("cvt.rn.f16.f32 %h1, %f2; cvt.f32.f16 %f9, %h1", [1 + 2.0**-11, 65520.0], [1.0, np.inf]),
    ],
    ids=str,
)
def test_floats(instruction, values, expected):
    found = apply(instruction, bits(*values), "%f9").view(np.float32)
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_conversions_to_integers_saturate():
    found = apply("cvt.rzi.s32.f32 %r9, %f2", bits(2.9, -2.9, 3e9, -3e9, np.nan))
    assert signed(found) == [2, -2, 2**31 - 1, -(2**31), 0]
    assert signed(apply("cvt.rni.s32.f32 %r9, %f2", bits(0.5, 1.5, 2.5))) == [0, 2, 2]
    assert signed(apply("cvt.s32.s16 %r9, %h2", [0xFFFF, 0x17FFF])) == [-1, 0x7FFF]


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        ("lt.f32", [1, 0, 0]),
        ("ltu.f32", [1, 0, 1]),
        ("ne.f32", [1, 1, 0]),
        ("neu.f32", [1, 1, 1]),
        ("num.f32", [1, 1, 0]),
        ("nan.f32", [0, 0, 1]),
        ("ge.f32", [0, 1, 0]),
    ],
)
def test_comparisons_of_floats(comparison, expected):
    assert apply(f"setp.{comparison} %p1, %f2, 0f00000000", bits(-1.0, 1.0, np.nan), "%p1").tolist() == expected


def test_comparisons_of_signed_and_unsigned_numbers():
    assert apply("setp.lt.s32 %p1, %r2, 1", [0xFFFFFFFF, 1], "%p1").tolist() == [1, 0]
    assert apply("setp.lo.u32 %p1, %r2, 1", [0xFFFFFFFF, 0], "%p1").tolist() == [0, 1]
    assert apply("setp.eq.u32 %p2, %r2, 0; setp.lt.and.s32 %p1, %r2, 9, !%p2", [0, 5], "%p1").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("mode", "clamp", "source"),
    [
        ("bfly.b32 %r9, %r1, 3", 31, LANES ^ 3),
        ("up.b32 %r9, %r1, 2", 0, np.where(LANES < 2, LANES, LANES - 2)),
        ("down.b32 %r9, %r1, 2", 31, np.where(LANES > 29, LANES, LANES + 2)),
        ("idx.b32 %r9, %r1, 7", 31, LANES * 0 + 7),
        ("idx.b32 %r9, %r1, 1", 24 << 8 | 31, (LANES & 24) + 1),
        ("down.b32 %r9, %r1, 1", 24 << 8 | 31, np.where(LANES % 8 == 7, LANES, LANES + 1)),
    ],
)
def test_shuffles(mode, clamp, source):
    assert apply(f"shfl.sync.{mode}, {clamp}, -1", np.zeros(32)).tolist() == source.tolist()


def test_votes():
    odd = "and.b32 %r3, %r1, 1; setp.eq.s32 %p2, %r3, 1; "
    assert set(apply(odd + "vote.sync.ballot.b32 %r9, %p2, -1", np.zeros(32)).tolist()) == {0xAAAAAAAA}
    assert set(apply(odd + "vote.sync.any.pred %p1, %p2, -1", np.zeros(32), "%p1").tolist()) == {1}
    assert set(apply(odd + "vote.sync.all.pred %p1, %p2, -1", np.zeros(32), "%p1").tolist()) == {0}


def test_matrices_are_loaded_row_by_row():
    """Row r of matrix i is at the address that lane 8 i + r names; lane l holds the words l % 4 of row l / 4."""
    body = """
 mov.u32 %r3, room; mul.lo.s32 %r4, %r1, 16; add.s32 %r5, %r3, %r4;
 mul.lo.s32 %r6, %r1, 4; add.s32 %r7, %r6, 1; add.s32 %r8, %r6, 2; add.s32 %r9, %r6, 3;
 st.shared.v4.u32 [%r5], {%r6, %r7, %r8, %r9};
 bar.sync 0;
 ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];
 mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd2, %rd3;
 st.global.v4.u32 [%rd4], {%r10, %r11, %r12, %r13};"""
    words, machine = machine_of(body)
    # Word w of row r of matrix i is 4 (8 i + r) + w, so lane l holds 32 i + l.
    assert words.reshape(32, 4).tolist() == [[32 * i + lane for i in range(4)] for lane in range(32)]
    assert not machine.notes


@pytest.mark.parametrize(("form", "depth"), [("f16", 16), ("f16", 8), ("bf16", 16), ("tf32", 8)])
def test_products_of_fragments(form, depth):
    """D = A B + C, with the layouts of the manual's figures for m16n8k8 and m16n8k16, written out here again."""
    draw = np.random.default_rng(0)
    a, b = draw.integers(-8, 8, (16, depth)).astype(np.float32), draw.integers(-8, 8, (depth, 8)).astype(np.float32)
    words = 1 if form == "tf32" else 2
    pack = {
        "f16": lambda v: v.astype(np.float16).view(np.uint16),
        "tf32": lambda v: v.view(np.uint32),
        "bf16": lambda v: (v.view(np.uint32) >> 16).astype(np.uint16),
    }[form]

    def register(matrix, rows, columns):
        """A register of every lane: `words` elements at (rows, columns .. columns + words - 1)."""
        elements = [matrix[r, c : c + words].copy() for r, c in zip(rows, columns, strict=True)]
        return np.array([pack(one).view(np.uint32)[0] for one in elements])

    group, thread = LANES // 4, LANES % 4
    count, half = depth // 2 // words, depth // 4 // words
    left = [register(a, group + 8 * (i % 2), words * (thread + 4 * (i // 2))) for i in range(count)]
    right = [register(b.T, group, words * (thread + 4 * i)) for i in range(half)]
    values = np.stack([*left, *right])
    body = "".join(f" ld.global.u32 %r{10 + i}, [%rd1+{128 * i}];" for i in range(count + half))
    names = [f"%r{10 + i}" for i in range(count + half)]
    body += f"""
 mov.f32 %f1, 0f3F800000;
 mma.sync.aligned.m16n8k{depth}.row.col.f32.{form}.{form}.f32 {{%f4, %f5, %f6, %f7}}, {{{", ".join(names[:count])}}},
   {{{", ".join(names[count:])}}}, {{%f1, %f1, %f1, %f1}};
 mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd2, %rd3; st.global.v4.f32 [%rd4], {{%f4, %f5, %f6, %f7}};"""
    out, machine = machine_of(body, values.reshape(-1))
    expected = a @ b + 1
    for i in range(4):
        found = out.view(np.float32).reshape(32, 4)[:, i]
        np.testing.assert_array_equal(found, expected[group + 8 * (i // 2), 2 * thread + i % 2])
    assert not machine.notes


def test_lanes_that_part_meet_again():
    body = """
 and.b32 %r2, %r1, 1; setp.eq.s32 %p1, %r2, 0; mov.u32 %r9, 10;
 @%p1 bra even;
 add.s32 %r9, %r9, %r1; bra.uni end;
even:
 sub.s32 %r9, %r9, %r1;
end:
 shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
 mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %r9;"""
    words, machine = machine_of(body)
    other = LANES ^ 1
    assert signed(words[:32]) == np.where(other % 2, 10 + other, 10 - other).tolist() and not machine.notes


SHARE = """
 mov.u32 %r3, room; mul.lo.s32 %r4, %r1, 4; add.s32 %r5, %r3, %r4; st.shared.u32 [%r5], %r1;
 {barrier}
 xor.b32 %r6, %r4, 128; add.s32 %r7, %r3, %r6; ld.shared.u32 %r9, [%r7];
 mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %r9;"""


def test_a_barrier_orders_warps_and_without_it_a_race_is_seen():
    words, machine = machine_of(SHARE.format(barrier="bar.sync 0;"), threads=64)
    assert words[:64].tolist() == (np.arange(64) ^ 32).tolist() and not machine.notes
    for seed in range(3):
        _, machine = machine_of(SHARE.format(barrier=""), threads=64, seed=seed)
        assert any("race" in note or "nobody wrote" in note for note in machine.notes)


COPY = """
 mov.u32 %r3, room; mul.lo.s32 %r4, %r1, 16; add.s32 %r5, %r3, %r4;
 ld.param.u64 %rd5, [kernel_param_0]; mul.wide.u32 %rd3, %r1, 16; add.s64 %rd6, %rd5, %rd3;
 cp.async.cg.shared.global [%r5], [%rd6], 16, %r{size}; cp.async.commit_group; {wait}
 ld.shared.u32 %r9, [%r5]; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %r9;"""


def test_a_copy_lands_at_its_wait_and_not_before():
    values, full = np.arange(128) + 7, "mov.u32 %r20, 16; mov.u32 %r21, 0;"
    words, machine = machine_of(full + COPY.format(wait="cp.async.wait_group 0;", size=20), values)
    assert words[:32].tolist() == values[::4].tolist() and not machine.notes
    words, machine = machine_of(full + COPY.format(wait="cp.async.wait_group 0;", size=21), values)
    assert not words[:32].any() and not machine.notes  # nothing is copied: zeros
    words, machine = machine_of(full + COPY.format(wait="cp.async.wait_group 1;", size=20), values)
    assert any("still copying" in note for note in machine.notes)


CLUSTER = """
 mov.u32 %r3, room; mul.lo.s32 %r4, %r1, 4; add.s32 %r5, %r3, %r4;
 mov.u32 %r6, %ctaid.x; xor.b32 %r7, %r6, 1; mapa.shared::cluster.u32 %r8, %r5, %r7;
 {begin}
 add.s32 %r9, %r6, 100; st.shared::cluster.u32 [%r8], %r9;
 {end}
 ld.shared.u32 %r10, [%r5];
 mad.lo.s32 %r11, %r6, 32, %r1; mul.wide.u32 %rd3, %r11, 4; add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %r10;"""
BARRIER = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"


def test_blocks_of_a_cluster_write_to_each_other():
    words, machine = machine_of(CLUSTER.format(begin=BARRIER, end=BARRIER), grid=(2,), ranks=2)
    assert set(words[:32]) == {101} and set(words[32:64]) == {100} and not machine.notes
    for seed in range(6):
        try:
            _, machine = machine_of(CLUSTER.format(begin=BARRIER, end=""), grid=(2,), ranks=2, seed=seed)
        except Fault:
            continue  # a block had ended already
        assert machine.notes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r9, [%rd1+-4];", "out of bounds"),
        ("ld.global.u32 %r9, [%rd1+2];", "misaligned"),
        ("mov.u32 %r3, room; ld.shared.u32 %r9, [%r3+4096];", "out of bounds"),
        ("div.u32 %r9, %r1, %r1;", "division by zero"),
        ("trap;", "trap"),
        (
            "setp.lt.u32 %p1, %r1, 16; @%p1 bra skip; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1; ret; "
            "skip: vote.sync.any.pred %p2, %p1, -1;",
            "wait at different instructions",
        ),
    ],
    ids=str,
)
def test_what_a_gpu_would_stop_at_is_a_fault(body, message):
    with pytest.raises(Fault, match=message):
        machine_of(body)


FOUR = "setp.lt.u32 %p1, %r1, 4; @%p1 mov.u32 %r30, 7; "  # %r30 is defined in four lanes


@pytest.mark.parametrize(
    "body",
    [
        "st.global.u32 [%rd1], %r30;",
        "ld.global.u32 %r9, [%rd15];",
        "mov.u32 %r3, room; add.s32 %r3, %r3, %r30; st.shared.u32 [%r3], 1;",
        "max.f32 %f9, %f30, 0f00000000; st.global.f32 [%rd1], %f9;",
        "setp.lt.u32 %p2, %r30, 5; @%p2 bra end; end: ret;",
        "@%p2 mov.u32 %r9, 1;",
        "vote.sync.any.pred %p3, %p2, -1;",
        FOUR + "st.global.u32 [%rd1], %r30;",
        FOUR + "shfl.sync.bfly.b32 %r9, %r30, 4, 31, -1; @%p1 st.global.u32 [%rd1], %r9;",
        FOUR + "selp.u32 %r9, 1, %r30, %p1; st.global.u32 [%rd1], %r9;",
        FOUR + "mov.u32 %r30, %r31; @%p1 st.global.u32 [%rd1], %r30;",
    ],
    ids=str,
)
def test_what_depends_on_a_register_that_was_never_written_is_a_fault(body):
    with pytest.raises(Fault, match="never written"):
        machine_of(body)


@pytest.mark.parametrize(
    "body",
    [
        "add.s32 %r9, %r30, 1;",
        FOUR + "@%p1 st.global.u32 [%rd1], %r30;",
        FOUR + "shfl.sync.bfly.b32 %r9, %r30, 2, 31, -1; @%p1 st.global.u32 [%rd1], %r9;",
        FOUR + "selp.u32 %r9, %r30, 1, %p1; st.global.u32 [%rd1], %r9;",
        FOUR + "mov.u32 %r30, 3; st.global.u32 [%rd1], %r30;",
    ],
    ids=str,
)
def test_what_no_result_uses_may_be_undefined(body):
    _, machine = machine_of(body)
    assert not machine.notes


def test_warps_that_skip_a_barrier_are_found():
    with pytest.raises(Fault, match="others wait at a barrier"):
        machine_of("setp.lt.u32 %p1, %r1, 32; @%p1 bra skip; bar.sync 0; skip: mov.u32 %r2, 0;", threads=64)


def test_uninitialized_shared_memory_is_reported():
    _, machine = machine_of("mov.u32 %r3, room; ld.shared.u32 %r9, [%r3];")
    assert any("nobody wrote" in note for note in machine.notes)


def test_lanes_that_disagree_on_one_address_are_noted():
    _, machine = machine_of("mov.u32 %r3, room; st.shared.u32 [%r3], %r1;")
    assert any("different values to one address" in note for note in machine.notes)
    _, machine = machine_of("mov.u32 %r3, room; st.shared.u32 [%r3], 5;")
    assert not machine.notes


def test_blocks_that_write_one_word_of_global_memory_are_noted():
    _, machine = machine_of("mov.u32 %r4, %ctaid.x; st.global.u32 [%rd2], %r4;", grid=(2,))
    assert any("race: global write" in note for note in machine.notes)


def test_an_unknown_instruction_is_named():
    kernel = parse(HEADER + " frobnicate.b32 %r1, %r1;\n ret;\n}\n")["kernel"]
    with pytest.raises(NotImplementedError, match="frobnicate"):
        translate(kernel, KINDS)
