// The body of the GPU convolution, written once. A `Cta` defines how its threads run: on a GPU all at once
// (cuda/device_cta.cuh), in the tests one after another (tests/native/host_cta.h), lane by lane.
//
// Cta: shared() the shared memory; each_thread(f) calls f(tid); each_warp(f) calls f(warp); sync() the
// barrier; copy16(to, from, valid) copies 16 bytes (zeros where not valid) some time before the next wait;
// commit() ends a group of copies; wait() returns once all groups but the latest have landed. Warp: index();
// each_lane(f) calls f(lane, state); step(a, b, pitch, blocks) multiplies one fragment step.
#pragma once

#include "shared/conv_tile.h"

namespace gatedconv {

// The state that a lane keeps through a tile.
template <class Math, int MT, int NT>
struct LaneState {
  static constexpr int kRows =
      Math::kTensorCores ? 1 : 2;  // rows of shared memory that it reads of a fragment
  int32_t row[MT][kRows];
  float sum[MT][NT][4];
};

// The row of a tile that a lane reads: the one that it names to ldmatrix, or the two whose sums it holds.
template <class Math>
GATEDCONV_HOST_DEVICE int lane_row(int lane, int which) {
  return Math::kTensorCores ? fragment_row(lane) : accumulator_row(lane, 2 * which);
}

template <class Math>
struct alignas(16) Vector16 {
  typename Math::Storage value[kVector<Math>];
};

// The slots of one block: slot s is output out_index[s], open if s < open.
struct Slots {
  const int32_t* index;
  int32_t first, count, open;
  GATEDCONV_HOST_DEVICE int32_t channel(int s) const {
    return index == nullptr ? first + s : index[first + s];
  }
};

GATEDCONV_HOST_DEVICE inline Slots block_slots(const ConvArgs& a, const ConvTile& t, const TileStart& at,
                                               int32_t block) {
  const int32_t mask = a.masks > 1 ? at.sample : 0, first = block * 8 * t.nt;
  const int32_t open = a.out_index == nullptr ? a.out_channels : a.out_count[mask];
  const int32_t count = smaller(8 * t.nt, a.out_channels - first);
  const int32_t* index = a.out_index == nullptr ? nullptr : a.out_index + int64_t{mask} * a.out_channels;
  return {index, first, count, smaller(count, larger(open - first, 0))};
}

// The open inputs of one block: slot s is input index[s], or s.
struct Inputs {
  const int32_t* index;
  int32_t count;
  bool loose;  // the weights are in the order of all inputs, not of the slots
};

GATEDCONV_HOST_DEVICE inline Inputs block_inputs(const ConvArgs& a, const TileStart& at) {
  const int32_t mask = a.in_masks > 1 ? at.sample : 0;
  const int32_t* index = a.in_index == nullptr ? nullptr : a.in_index + int64_t{mask} * a.in_channels;
  return {index, a.in_count == nullptr ? a.in_channels : a.in_count[mask], a.in_masks > 1};
}

// One thread's share of a patch: `chunks` fragment steps of channels from `chunk` on.
template <class Math, class Cta>
GATEDCONV_HOST_DEVICE void load_patch(Cta& cta, const ConvArgs& a, const ConvTile& t, const TileStart& at,
                                      const Inputs& inputs, int32_t chunk, uint8_t* to, int tid) {
  using T = typename Math::Storage;
  const T* input = static_cast<const T*>(a.input);
  const int32_t pixels = t.samples * t.patch_h * t.patch_w, vectors = 2 * t.chunks;
  for (int32_t item = tid; item < pixels * vectors; item += kThreads) {
    // Neighboring threads take neighboring elements in memory.
    const int32_t pixel = a.in_planar ? item % pixels : item / vectors;
    const int32_t vector = a.in_planar ? item / pixels : item % vectors;
    const int64_t source = patch_source(a, t, at, pixel);
    const int32_t slot = chunk * kStep<Math> + vector * kVector<Math>;
    uint8_t* target = to + pixel * t.pitch + vector * 16;
    if (a.in_vector) {
      const bool valid = source >= 0 && slot < inputs.count;
      cta.copy16(target, input + (valid ? source + slot : 0), valid);
      continue;
    }
    Vector16<Math> gathered;
#pragma unroll
    for (int i = 0; i < kVector<Math>; ++i) {
      const bool valid = source >= 0 && slot + i < inputs.count;
      const int64_t channel = !valid ? 0 : inputs.index == nullptr ? slot + i : inputs.index[slot + i];
      gathered.value[i] = valid ? input[source + channel * a.in.c] : Math::store(0.0f);
    }
    *reinterpret_cast<Vector16<Math>*>(target) = gathered;
  }
}

// The weights of one vector of input slots from `slot` on, picked one by one from the order of all inputs.
template <class Math>
GATEDCONV_HOST_DEVICE Vector16<Math> loose_weights(const ConvArgs& a, const Inputs& inputs, int32_t slot,
                                                   int32_t tap, int32_t output) {
  using T = typename Math::Storage;
  Vector16<Math> gathered;
#pragma unroll
  for (int i = 0; i < kVector<Math>; ++i) {
    const bool open = slot + i < inputs.count;
    const int32_t channel = open ? inputs.index[slot + i] : 0;
    const int64_t row = int64_t{channel / kStep<Math>} * a.kernel_h * a.kernel_w + tap;
    const T* from = static_cast<const T*>(a.weights) + (row * a.out_channels + output) * kStep<Math>;
    gathered.value[i] = open ? from[channel % kStep<Math>] : Math::store(0.0f);
  }
  return gathered;
}

// One thread's share of the weights of `taps` taps from `tap` on; slots that are not open get zeros.
template <class Math, class Cta>
GATEDCONV_HOST_DEVICE void load_weights(Cta& cta, const ConvArgs& a, const ConvTile& t, const Slots& slots,
                                        const Inputs& inputs, int32_t chunk, int32_t steps, int32_t tap,
                                        int32_t taps, uint8_t* to, int tid) {
  const uint8_t* weights = static_cast<const uint8_t*>(a.weights);
  const int32_t columns = 8 * t.nt, vectors = 2 * steps;
  for (int32_t item = tid; item < taps * columns * vectors; item += kThreads) {
    const int32_t vector = item % vectors, column = item / vectors % columns, of = item / (vectors * columns);
    const bool valid = column < slots.open;
    uint8_t* target = to + (of * columns + column) * t.pitch + vector * 16;
    if (inputs.loose && valid) {
      const int32_t slot = chunk * kStep<Math> + vector * kVector<Math>;
      *reinterpret_cast<Vector16<Math>*>(target) =
          loose_weights<Math>(a, inputs, slot, tap + of, slots.channel(column));
      continue;
    }
    const int64_t row = int64_t{chunk + vector / 2} * a.kernel_h * a.kernel_w + tap + of;
    const int64_t from = (row * a.out_channels + (valid ? slots.channel(column) : 0)) * kStepBytes;
    cta.copy16(target, weights + from + vector % 2 * 16, valid);
  }
}

GATEDCONV_HOST_DEVICE inline float activate(float value, ConvAct act) {
  if (act == ConvAct::kNone) return value;
  value = relu_keeping_nan(value);
  return act == ConvAct::kRelu6 && value > 6.0f ? 6.0f : value;
}

// One thread's share of the outputs, `Wide` neighboring channels at a time: one, or a whole vector. `sums`
// holds the tile in rows of 8 * nt + 4 floats.
template <class Math, int Wide>
GATEDCONV_HOST_DEVICE void write_tile(const ConvArgs& a, const ConvTile& t, const TileStart& at,
                                      const Slots& slots, const float* sums, int tid) {
  using T = typename Math::Storage;
  struct alignas(Wide * sizeof(T)) Group {
    T value[Wide];
  };
  const T* residual = static_cast<const T*>(a.residual);
  const int32_t pixels = 64 * t.mt, pitch = 8 * t.nt + 4, items = ceil_div(slots.count, Wide);
  for (int32_t item = tid; item < pixels * items; item += kThreads) {
    const int32_t m = a.out_planar ? item % pixels : item / items;
    const int32_t slot = (a.out_planar ? item / pixels : item % items) * Wide;
    const Pixel p = tile_pixel(a, t, at, m);
    const bool open = slot < slots.open;
    if (!p.inside || (!open && a.skip_closed)) continue;
    const int32_t channel = slots.channel(slot);
    Group group{};
    if (residual != nullptr) {
      const int64_t from = p.sample * a.res.n + channel * a.res.c + p.row * a.res.h + p.col * a.res.w;
      group = *reinterpret_cast<const Group*>(residual + from);
    }
    // Four floats at a time: lanes that read one would be a vector apart, with bank conflicts.
    struct alignas(Wide < 4 ? 4 : 16) Sums {
      float value[Wide];
    };
    const Sums row = open ? *reinterpret_cast<const Sums*>(sums + m * pitch + slot) : Sums{};
#pragma unroll
    for (int i = 0; i < Wide; ++i) {
      float value = 0.0f;
      if (open) value = row.value[i] + (a.bias == nullptr ? 0.0f : a.bias[channel + i]);
      if (residual != nullptr) value += Math::load(group.value[i]);
      group.value[i] = Math::store(activate(value, a.act));
    }
    const int64_t to = p.sample * a.out.n + channel * a.out.c + p.row * a.out.h + p.col * a.out.w;
    *reinterpret_cast<Group*>(static_cast<T*>(a.output) + to) = group;
  }
}

// A round is `chunks` fragment steps of channels by `group_taps` taps; its weights, and the patch where the
// taps begin anew, are copied while the round before is multiplied.
template <class Math, int MT, int NT, class Cta>
GATEDCONV_HOST_DEVICE void multiply_rounds(Cta& cta, const ConvArgs& a, const ConvTile& t,
                                           const TileStart& at, const Slots& slots, const Inputs& inputs) {
  const int32_t taps = a.kernel_h * a.kernel_w, groups = ceil_div(taps, t.group_taps);
  const int32_t steps = ceil_div(inputs.count, kStep<Math>), rounds = ceil_div(steps, t.chunks) * groups;
  uint8_t* patches = cta.shared();
  uint8_t* weights = patches + 2 * t.patch_bytes;
  const auto load = [&](int32_t round) {
    const int32_t group = round / groups, chunk = group * t.chunks, tap = round % groups * t.group_taps;
    cta.each_thread([&](int tid) {
      if (tap == 0) load_patch<Math>(cta, a, t, at, inputs, chunk, patches + group % 2 * t.patch_bytes, tid);
      load_weights<Math>(cta, a, t, slots, inputs, chunk, smaller(t.chunks, steps - chunk), tap,
                         smaller(t.group_taps, taps - tap), weights + round % 2 * t.weight_bytes, tid);
    });
    cta.commit();
  };
  load(0);
  const int32_t blocks = ceil_div(slots.open, 8);
  for (int32_t round = 0; round < rounds; ++round) {
    if (round + 1 < rounds)
      load(round + 1);
    else
      cta.commit();
    cta.wait();
    cta.sync();
    const int32_t group = round / groups, tap0 = round % groups * t.group_taps;
    const int32_t ends = smaller(tap0 + t.group_taps, taps),
                  depth = smaller(t.chunks, steps - group * t.chunks);
    cta.each_warp([&](auto& warp) {
      for (int32_t tap = tap0; tap < ends; ++tap) {
        const int32_t patch = group % 2 * t.patch_bytes + patch_tap(a, t, tap);
        const int32_t column =
            2 * t.patch_bytes + round % 2 * t.weight_bytes + (tap - tap0) * 8 * NT * t.pitch;
        for (int32_t step = 0; step < depth; ++step) {
          warp.step(patch + step * kStepBytes, column + step * kStepBytes, t.pitch, blocks);
        }
      }
    });
    cta.sync();
  }
}

template <class Math, int MT, int NT, class Cta>
GATEDCONV_HOST_DEVICE void conv_tile(Cta& cta, const ConvArgs& a, const ConvTile& t, int64_t block_x,
                                     int32_t block_y) {
  const TileStart at = tile_start(t, block_x);
  const Slots slots = block_slots(a, t, at, block_y);
  if (slots.open == 0 && a.skip_closed) return;
  if (slots.open > 0) {
    const Inputs inputs = block_inputs(a, at);
    cta.each_warp([&](auto& warp) {
      warp.each_lane([&](int lane, LaneState<Math, MT, NT>& state) {
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
          for (int which = 0; which < LaneState<Math, MT, NT>::kRows; ++which) {
            const int m = (warp.index() * MT + i) * 16 + lane_row<Math>(lane, which);
            state.row[i][which] = patch_row(t, m) + (Math::kTensorCores ? fragment_byte(lane) : 0);
          }
#pragma unroll
          for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) state.sum[i][j][r] = 0.0f;
          }
        }
      });
    });
    if (inputs.count > 0) multiply_rounds<Math, MT, NT>(cta, a, t, at, slots, inputs);
    float* sums = reinterpret_cast<float*>(cta.shared());
    cta.each_warp([&](auto& warp) {
      warp.each_lane([&](int lane, LaneState<Math, MT, NT>& state) {
#pragma unroll
        for (int i = 0; i < MT; ++i) {
#pragma unroll
          for (int j = 0; j < NT; ++j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const int m = (warp.index() * MT + i) * 16 + accumulator_row(lane, r);
              sums[m * (8 * NT + 4) + j * 8 + accumulator_column(lane, r)] = state.sum[i][j][r];
            }
          }
        }
      });
    });
    cta.sync();
  }
  cta.each_thread([&](int tid) {
    const float* sums = reinterpret_cast<const float*>(cta.shared());
    if (a.out_vector)
      write_tile<Math, kVector<Math>>(a, t, at, slots, sums, tid);
    else
      write_tile<Math, 1>(a, t, at, slots, sums, tid);
  });
}

}  // namespace gatedconv
