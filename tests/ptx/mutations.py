"""Mistakes to make in the kernels' sources, one at a time: each must be noticed without a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """A change of one place.

    Attributes:
        name: What is wrong then.
        file: Below csrc/; or, for a Triton kernel, the function's name.
        before: What is there, once in the file.
        after: What takes its place.
        run: "conv" with a format, "resident" with a number of blocks, or "triton" with a set of cases.
        which: That format, number or set.
    """

    name: str
    file: str
    before: str
    after: str
    run: str = "conv"
    which: str = "f16"


BODY, TILE, DEVICE = "shared/conv_body.h", "shared/conv_tile.h", "cuda/device_cta.cuh"
DRIVER, FORMAT = "cuda/experimental/resident_body.h", "cuda/experimental/resident.h"
WARP = "cuda/experimental/resident_device.cuh"

CONV = [
    Mutation(
        "vectors past the last input are read",
        BODY,
        "const bool valid = source >= 0 && slot < inputs.count;",
        "const bool valid = source >= 0;",
    ),
    Mutation(
        "gathered inputs past the last are read",
        BODY,
        "const bool valid = source >= 0 && slot + i < inputs.count;",
        "const bool valid = source >= 0;",
    ),
    Mutation(
        "padding is read",
        BODY,
        "const bool valid = source >= 0 && slot + i < inputs.count;",
        "const bool valid = slot + i < inputs.count;",
    ),
    Mutation(
        "an index list is ignored",
        BODY,
        "!valid ? 0 : inputs.index == nullptr ? slot + i : inputs.index[slot + i]",
        "!valid ? 0 : slot + i",
    ),
    Mutation("outputs past the last are written", BODY, "smaller(8 * t.nt, a.out_channels - first)", "8 * t.nt"),
    Mutation(
        "later slots take closed outputs for open",
        BODY,
        "smaller(count, larger(open - first, 0))",
        "smaller(count, open)",
    ),
    Mutation(
        "a sample reads the first sample's mask",
        BODY,
        "const int32_t mask = a.masks > 1 ? at.sample : 0,",
        "const int32_t mask = 0,",
    ),
    Mutation(
        "a sample reads the first sample's inputs",
        BODY,
        "const int32_t mask = a.in_masks > 1 ? at.sample : 0;",
        "const int32_t mask = 0;",
    ),
    Mutation("no empty group after the last copy", BODY, "    else\n      cta.commit();\n", "    else {}\n"),
    Mutation("one group too many is left in flight", DEVICE, "cp.async.wait_group 1;", "cp.async.wait_group 2;"),
    Mutation("patches are not double-buffered", BODY, "patches + group % 2 * t.patch_bytes, tid", "patches, tid"),
    Mutation("weights are not double-buffered", BODY, "weights + round % 2 * t.weight_bytes, tid", "weights, tid"),
    Mutation("no barrier after a round", BODY, "    });\n    cta.sync();\n  }\n}\n", "    });\n  }\n}\n"),
    Mutation(
        "no barrier before sums are read",
        BODY,
        "    });\n    cta.sync();\n  }\n  cta.each_thread",
        "    });\n  }\n  cta.each_thread",
    ),
    Mutation(
        "the last inputs are left out",
        BODY,
        "steps = ceil_div(inputs.count, kStep<Math>), rounds",
        "steps = inputs.count / kStep<Math>, rounds",
    ),
    Mutation("taps past the last are loaded", BODY, "smaller(t.group_taps, taps - tap)", "t.group_taps"),
    Mutation("rows of sums overlap", BODY, "sums[m * (8 * NT + 4) + j * 8", "sums[m * (8 * NT) + j * 8"),
    Mutation(
        "closed outputs are written in place",
        BODY,
        "if (!p.inside || (!open && a.skip_closed)) continue;",
        "if (!p.inside) continue;",
    ),
    Mutation("biases by slot, not by channel", BODY, "a.bias[channel + i]", "a.bias[slot + i]"),
    Mutation("no bias for the second of a vector", BODY, "a.bias[channel + i]", "a.bias[channel]"),
    Mutation("the residual is left out", BODY, "if (residual != nullptr) value += Math::load(group.value[i]);", ""),
    Mutation("the row above is read as padding's", TILE, "h < 0 || h >= a.height", "h >= a.height"),
    Mutation("the row below the last is read", TILE, "h >= a.height", "h > a.height"),
    Mutation("the column right of the last is read", TILE, "w >= a.width", "w > a.width"),
    Mutation("samples past the last are read", TILE, "if (sample >= a.batch || ", "if ("),
    Mutation("rows past the last are written", TILE, " && p.row < a.out_h", ""),
    Mutation("rows past the tile are written", TILE, "m < t.samples * per_sample && ", ""),
    Mutation(
        "halves of a fragment's rows are swapped", TILE, "(lane >> 2) + (r >> 1) * 8", "(lane >> 2) + (r & 1) * 8"
    ),
    Mutation("accumulators one column apart", TILE, "(lane & 3) * 2 + (r & 1)", "(lane & 3) + (r & 1)"),
    Mutation("ldmatrix of half a row", TILE, "return (lane >> 4) * 16;", "return (lane >> 4) * 8;"),
    Mutation("columns of weights in another order", TILE, "return ((lane >> 3) & 1) * 16;", "return (lane & 1) * 16;"),
    Mutation("dilation ignored along rows", TILE, "tap % a.kernel_w * t.tap_w", "tap % a.kernel_w"),
    Mutation("what is invalid is copied", DEVICE, "const int bytes = valid ? 16 : 0;", "const int bytes = 16;"),
    Mutation("blocks of columns one row apart", DEVICE, "column + j * 8 * pitch)", "column + j * pitch)"),
    Mutation(
        "tf32 operands are truncated",
        DEVICE,
        'asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(__uint_as_float(bits)));',
        "",
        which="tf32",
    ),
    Mutation(
        "one product of four is wrong", DEVICE, "fmaf(x.w, right.w, sum)", "fmaf(x.w, right.z, sum)", which="fp32"
    ),
]

RESIDENT = [
    Mutation(
        "a piece overtakes the ring",
        DRIVER,
        "issue(landed_ + args_.ring_pieces - 1);",
        "issue(landed_ + args_.ring_pieces);",
        "resident",
        "1",
    ),
    Mutation(
        "a piece too many is left in flight", WARP, "cp.async.wait_group 6;", "cp.async.wait_group 7;", "resident", "1"
    ),
    Mutation(
        "the border is not cleared", DRIVER, "if (r.clear) clear_halo<Math>(warp, r.target);", "", "resident", "1"
    ),
    Mutation(
        "a pixel past the last is written",
        DRIVER,
        "if (m >= pixels) continue;",
        "if (m > pixels) continue;",
        "resident",
        "1",
    ),
    Mutation("half of the offsets are kept", DRIVER, "unit < 2 * r.steps;", "unit < r.steps;", "resident", "1"),
    Mutation(
        "the mean of one row",
        DRIVER,
        "static_cast<float>(m.height * m.width)",
        "static_cast<float>(m.height)",
        "resident",
        "1",
    ),
    Mutation("half of the zeros", DRIVER, "lane < 4) reinterpret_cast", "lane < 2) reinterpret_cast", "resident", "1"),
    Mutation(
        "rows that others read are not handed over",
        DRIVER,
        "const Band wanted = needed(r, rank);",
        "const Band wanted = band(m.height, rank, warp.ranks());",
        "resident",
        "4",
    ),
    Mutation(
        "the last pass is not handed over", DRIVER, "some_units ? r.channel / kVector<Math> : 0", "0", "resident", "4"
    ),
    Mutation(
        "blocks do not wait for each other", DRIVER, "    warp.barrier();\n", "    warp.sync();\n", "resident", "4"
    ),
]

# Not listed: `gate_tail` without the barrier before it reads its logits back. In every layout that Triton chooses today
# a thread reads what it wrote itself, so nothing changes.
TRITON = [
    Mutation(
        "positions past the map are read",
        "channel_means",
        "(c < C)[:, None] & (s < HW)[None, :]",
        "(c < C)[:, None] & (s >= 0)[None, :]",
        "triton",
        "gate",
    ),
    Mutation(
        "channels past the last are pooled", "gate_pool_dense", "pooled, mask=c < C)", "pooled)", "triton", "gate"
    ),
    Mutation(
        "units past the last are written", "gate_pool_dense", "product, mask=m < M)", "product)", "triton", "gate"
    ),
    Mutation("one slice is left out", "sum_of_slices", "range(0, S)", "range(1, S)", "triton", "gate"),
    Mutation(
        "a running buffer moves twice as fast",
        "move_running",
        "momentum * (value - old)",
        "2 * momentum * (value - old)",
        "triton",
        "gate",
    ),
    Mutation(
        "a running buffer is written before all have read it",
        "move_running",
        "tl.debug_barrier()  # warps hold copies of one element: all have read it before one of them overwrites it",
        "pass",
        "triton",
        "gate",
    ),
    Mutation(
        "samples past the last have a gradient",
        "weights_of_gates",
        "tl.where(mask, dz - center[None, :], 0.0)",
        "dz - center[None, :]",
        "triton",
        "batch mean",
    ),
    Mutation(
        "the last tile of sums is left out",
        "sum_of_tiles",
        "range(0, T, BLOCK_T)",
        "range(BLOCK_T, T, BLOCK_T)",
        "triton",
        "gate",
    ),
    Mutation(
        "biased variance", "finish_statistics", "squares / (count - 1.0)", "squares / count", "triton", "residual"
    ),
    Mutation(
        "a mean of rows past the last",
        "residual_forward",
        "tl.where(mask, relu(",
        "tl.where(mask | True, relu(",
        "triton",
        "residual",
    ),
    Mutation(
        "the ReLU lets gradients of zeros pass", "sum_gradient", "value <= 0.0", "value < 0.0", "triton", "residual"
    ),
    Mutation(
        "the gate's gradient takes its last pixel alone",
        "gated_scale_backward",
        "total += tl.sum",
        "total = tl.sum",
        "triton",
        "scale",
    ),
]
