// The body of the resident driver, run by every warp. A `Warp` defines how: on a GPU all at once
// (cuda/experimental/resident_device.cuh), in the tests as threads of the host, lane by lane
// (tests/native/host_resident.h).
//
// Warp: shared(); index(); image(); rank() among ranks(), one unless kCluster; each_lane(f) calls f(lane);
// Lanes<S> keeps an S for every lane, its each(f) calls f(lane, state); sync() the barrier of the block;
// barrier() that of the cluster; copy16(to, from) some time before the next wait; commit() ends a group of
// copies, wait(n) returns once all but n groups have landed; store_there(rank, to, unit) stores in another
// block's shared memory; multiply(lanes, table, weights) multiplies one step.
#pragma once

#include "cuda/experimental/resident.h"
#include "shared/conv_body.h"

namespace gatedconv {

template <int MT, int NT>
struct ResidentLane {
  int32_t row[MT];  // of the pixel that it names to ldmatrix
  float sum[MT][NT][4];
};

// The stream, read piece by piece.
template <class Warp>
class Ring {
 public:
  GATEDCONV_HOST_DEVICE Ring(Warp& warp, const ResidentArgs& args) : warp_(warp), args_(args) {
    for (int32_t piece = 0; piece < args.ring_pieces - 1; ++piece) issue(piece);
  }

  // Steps of `bytes` that may be taken at once, at least one.
  GATEDCONV_HOST_DEVICE int32_t steps(int32_t bytes) {
    at_ = (at_ + bytes - 1) / bytes * bytes;
    return (kPieceBytes - at_ % kPieceBytes) / bytes;
  }

  // The next `bytes`, a power of two or steps of one, and their place in shared memory until the next
  // call; all warps make the same calls.
  GATEDCONV_HOST_DEVICE int32_t take(int32_t bytes, int32_t steps = 1) {
    at_ = (at_ + bytes - 1) / bytes * bytes;
    const int32_t from = args_.ring_at + at_ % (args_.ring_pieces * kPieceBytes);
    at_ += steps * bytes;
    while (landed_ * kPieceBytes < at_) {
      warp_.wait(args_.ring_pieces - 2);
      warp_.sync();  // no warp reads the previous piece any more: its place is free
      issue(landed_ + args_.ring_pieces - 1);
      ++landed_;
    }
    return from;
  }

 private:
  GATEDCONV_HOST_DEVICE void issue(int32_t piece) {
    if (piece < args_.pieces) {
      const uint8_t* from = args_.stream + int64_t{piece} * kPieceBytes;
      uint8_t* to = warp_.shared() + args_.ring_at + piece % args_.ring_pieces * kPieceBytes;
      warp_.each_lane([&](int lane) {
        for (int32_t at = (warp_.index() * 32 + lane) * 16; at < kPieceBytes; at += kResidentThreads * 16) {
          warp_.copy16(to + at, from + at);
        }
      });
    }
    warp_.commit();  // an empty group where the stream has ended, so that groups count pieces
  }

  Warp& warp_;
  const ResidentArgs& args_;
  int32_t at_ = 0, landed_ = 0;
};

template <class Math>
GATEDCONV_HOST_DEVICE Vector16<Math>& unit_at(uint8_t* shared, const ResidentMap& m, int32_t unit,
                                              int32_t pixel) {
  return *reinterpret_cast<Vector16<Math>*>(shared + m.at + unit * m.plane + pixel);
}

template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void clear_halo(Warp& warp, const ResidentMap& m) {
  const int32_t each = halo_units(m);
  warp.each_lane([&](int lane) {
    for (int32_t i = warp.index() * 32 + lane; i < each * m.units; i += kResidentThreads) {
      unit_at<Math>(warp.shared(), m, i / each, halo_byte(m, i % each)) = Vector16<Math>{};
    }
  });
}

// Copies what this instruction has made, in the rows of the target that this block owns, to the blocks that
// read them. A pass of a convolution makes some pixels and, unless it scatters, some units of them.
template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void hand_over(Warp& warp, const ResidentRecord& r) {
  if constexpr (Warp::kCluster) {
    warp.sync();
    const ResidentMap& m = r.target;
    const Band own = band(m.height, warp.rank(), warp.ranks());
    const bool conv = r.op == ResidentOp::kConv, some_units = conv && !r.scatters;
    const int32_t first_unit = some_units ? r.channel / kVector<Math> : 0;
    const int32_t units = some_units ? smaller(kPassOutputs / kVector<Math>, m.units - first_unit) : m.units;
    const int32_t made = conv ? r.fragment * 16 : 0;
    const int32_t made_end =
        conv ? made + kResidentWarps / r.groups * r.mt * 16 : (own.end - own.first) * m.width;
    for (int32_t rank = 0; rank < warp.ranks(); ++rank) {
      if (rank == warp.rank()) continue;
      const Band wanted = needed(r, rank);
      const int32_t first = larger((larger(own.first, wanted.first) - own.first) * m.width, made);
      const int32_t end = smaller((smaller(own.end, wanted.end) - own.first) * m.width, made_end);
      const int32_t pixels = larger(end - first, 0);
      warp.each_lane([&](int lane) {
        for (int32_t item = warp.index() * 32 + lane; item < pixels * units; item += kResidentThreads) {
          const int32_t unit = first_unit + item / pixels, pixel = first + item % pixels;
          const int32_t at = pixel_byte(m, own.first + pixel / m.width, pixel % m.width);
          warp.store_there(rank, m.at + unit * m.plane + at, unit_at<Math>(warp.shared(), m, unit, at));
        }
      });
    }
  }
}

template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void resident_load(Warp& warp, const ResidentArgs& args, const ResidentRecord& r) {
  using T = typename Math::Storage;
  const ResidentMap& m = r.target;
  const Band rows = needed(r, warp.rank());
  const T* input = static_cast<const T*>(args.input) + warp.image() * args.in.n;
  warp.each_lane([&](int lane) {
    const int32_t items = (rows.end - rows.first) * m.width * m.units;
    for (int32_t item = warp.index() * 32 + lane; item < items; item += kResidentThreads) {
      const int32_t unit = item % m.units, pixel = item / m.units;
      const int32_t row = rows.first + pixel / m.width, col = pixel % m.width;
      const T* from = input + row * args.in.h + col * args.in.w + unit * kVector<Math>;
      unit_at<Math>(warp.shared(), m, unit, pixel_byte(m, row, col)) =
          *reinterpret_cast<const Vector16<Math>*>(from);
    }
  });
}

template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void resident_save(Warp& warp, const ResidentArgs& args, const ResidentRecord& r) {
  using T = typename Math::Storage;
  const ResidentMap& m = r.source;
  const Band rows = band(m.height, warp.rank(), warp.ranks());
  T* output = static_cast<T*>(args.output) + warp.image() * args.out.n;
  warp.each_lane([&](int lane) {
    const int32_t items = (rows.end - rows.first) * m.width * m.units;
    for (int32_t item = warp.index() * 32 + lane; item < items; item += kResidentThreads) {
      const int32_t unit = item % m.units, pixel = item / m.units;
      const int32_t row = rows.first + pixel / m.width, col = pixel % m.width;
      T* to = output + row * args.out.h + col * args.out.w + unit * kVector<Math>;
      *reinterpret_cast<Vector16<Math>*>(to) = unit_at<Math>(warp.shared(), m, unit, pixel_byte(m, row, col));
    }
  });
}

// The mean over all rows and columns, of which the target has one.
template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void resident_mean(Warp& warp, const ResidentRecord& r) {
  using T = typename Math::Storage;
  const Band rows = band(1, warp.rank(), warp.ranks());
  if (rows.first == rows.end) return;
  const ResidentMap& m = r.source;
  warp.each_lane([&](int lane) {
    for (int32_t c = warp.index() * 32 + lane; c < m.units * kVector<Math>; c += kResidentThreads) {
      const uint8_t* plane = warp.shared() + channel_byte<Math>(m, 0, c);
      float sum = 0.0f;
      for (int32_t row = 0; row < m.height; ++row) {
        for (int32_t col = 0; col < m.width; ++col) {
          sum += Math::load(*reinterpret_cast<const T*>(plane + pixel_byte(m, row, col)));
        }
      }
      const T mean = Math::store(sum / static_cast<float>(m.height * m.width));
      const int32_t to = channel_byte<Math>(r.target, pixel_byte(r.target, 0, 0), c);
      *reinterpret_cast<T*>(warp.shared() + to) = mean;
    }
  });
}

// target[c] = act(source[list[c]] + residual[c]) at every stride-th pixel; of -1 zero, of -2 what it was.
template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void resident_move(Warp& warp, Ring<Warp>& ring, const ResidentRecord& r) {
  using T = typename Math::Storage;
  constexpr int kUnits = kPassOutputs / kVector<Math>;  // of one item of the list
  const Band rows = band(r.target.height, warp.rank(), warp.ranks());
  const int32_t pixels = (rows.end - rows.first) * r.target.width;
  for (int32_t first = 0; first < r.target.units; first += kUnits) {
    uint8_t* shared = warp.shared();
    const int32_t* list = reinterpret_cast<const int32_t*>(shared + ring.take(kItemBytes));
    const int32_t items = smaller(kUnits, r.target.units - first) * pixels;
    warp.each_lane([&](int lane) {
      for (int32_t item = warp.index() * 32 + lane; item < items; item += kResidentThreads) {
        const int32_t unit = item / pixels, pixel = item % pixels;
        const int32_t row = rows.first + pixel / r.target.width, col = pixel % r.target.width;
        const int32_t from = pixel_byte(r.source, row * r.stride_h, col * r.stride_w);
        const int32_t to = pixel_byte(r.target, row, col);
        Vector16<Math> made{}, added{};
        bool keeps = false;  // the target's own values, which are there only where a channel is -2
#pragma unroll
        for (int i = 0; i < kVector<Math>; ++i) keeps |= list[unit * kVector<Math> + i] == -2;
        if (keeps) made = unit_at<Math>(shared, r.target, first + unit, to);
        if (r.residual.units > 0) {
          added = unit_at<Math>(shared, r.residual, first + unit, pixel_byte(r.residual, row, col));
        }
#pragma unroll
        for (int i = 0; i < kVector<Math>; ++i) {
          const int32_t channel = list[unit * kVector<Math> + i];
          if (channel == -2) continue;
          float value = Math::load(added.value[i]);
          if (channel >= 0) {
            value +=
                Math::load(*reinterpret_cast<const T*>(shared + channel_byte<Math>(r.source, from, channel)));
          }
          made.value[i] = Math::store(activate(value, r.act));
        }
        unit_at<Math>(shared, r.target, first + unit, to) = made;
      }
    });
  }
}

// Writes a warp's sums: bias, residual, activation, and where the outputs go.
template <class Math, int MT, int NT, class Warp, class Lanes>
GATEDCONV_HOST_DEVICE void resident_write(Warp& warp, Lanes& lanes, const ResidentRecord& r, int32_t fragment,
                                          int32_t column, int32_t values) {
  using T = typename Math::Storage;
  struct alignas(2 * sizeof(T)) Pair {
    T value[2];
  };
  const float* bias = reinterpret_cast<const float*>(warp.shared() + values) + column;
  const int32_t* list = reinterpret_cast<const int32_t*>(warp.shared() + values + kItemBytes) + column;
  // Copies, which stay in registers: the record could change with every store.
  const ResidentMap target = r.target, residual = r.residual;
  const ConvAct act = r.act;
  const bool adds = residual.units > 0, scatters = r.scatters != 0;
  const Band rows = band(target.height, warp.rank(), warp.ranks());
  const int32_t width = target.width, first_channel = r.channel + column,
                pixels = (rows.end - rows.first) * width;
  const int32_t channels = target.units * kVector<Math>;
  lanes.each([&](int lane, ResidentLane<MT, NT>& state) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t m = (fragment + i) * 16 + accumulator_row(lane, 2 * half);
        if (m >= pixels) continue;
        const int32_t row = rows.first + m / width, col = m % width;
        const int32_t to = pixel_byte(target, row, col), with = pixel_byte(residual, row, col);
        const auto finished = [&](float value, int32_t from_residual) {
          if (adds) {
            value += Math::load(*reinterpret_cast<const T*>(warp.shared() + from_residual));
          }
          return Math::store(activate(value, act));
        };
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const int32_t n = j * 8 + accumulator_column(lane, 0);
          const float first = state.sum[i][j][2 * half] + bias[n];
          const float second = state.sum[i][j][2 * half + 1] + bias[n + 1];
          if (scatters) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const int32_t channel = list[n + k];
              if (channel < 0) continue;
              const T made = finished(k ? second : first, channel_byte<Math>(residual, with, channel));
              *reinterpret_cast<T*>(warp.shared() + channel_byte<Math>(target, to, channel)) = made;
            }
          } else if (const int32_t channel = first_channel + n; channel < channels) {
            const int32_t at = channel_byte<Math>(residual, with, channel);
            const Pair made{{finished(first, at), finished(second, at + static_cast<int32_t>(sizeof(T)))}};
            *reinterpret_cast<Pair*>(warp.shared() + channel_byte<Math>(target, to, channel)) = made;
          }
        }
      }
    }
  });
}

template <class Math, int MT, int NT, class Warp>
GATEDCONV_HOST_DEVICE void resident_conv(Warp& warp, Ring<Warp>& ring, const ResidentArgs& args,
                                         const ResidentRecord& r) {
  using State = ResidentLane<MT, NT>;
  typename Warp::template Lanes<State> lanes;
  const Band rows = band(r.target.height, warp.rank(), warp.ranks());
  const int32_t width = r.target.width, pixels = (rows.end - rows.first) * width;
  const int32_t fragment = r.fragment + warp.index() / r.groups * MT, group = warp.index() % r.groups;
  const bool works = warp.index() / r.groups < kResidentWarps / r.groups && fragment * 16 < pixels;
  lanes.each([&](int lane, State& state) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int32_t m = (fragment + i) * 16 + fragment_row(lane), of = m < pixels ? m : 0;
      const int32_t row = (rows.first + of / width) * r.stride_h - r.pad_top;
      state.row[i] = r.source.at + pixel_byte(r.source, row, of % width * r.stride_w - r.pad_left);
#pragma unroll
      for (int j = 0; j < NT; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) state.sum[i][j][k] = 0.0f;
      }
    }
  });
  const int32_t bytes = r.blocks * kItemBytes;
  for (int32_t step = 0; step < r.steps;) {
    const int32_t count = smaller(r.steps - step, ring.steps(bytes));
    const int32_t from = ring.take(bytes, count);
    if (works) {
      for (int32_t i = 0; i < count; ++i) {
        warp.template multiply<Math>(lanes, args.table_at + (step + i) * 8,
                                     from + i * bytes + group * NT * kItemBytes);
      }
    }
    step += count;
  }
  const int32_t values = ring.take(r.scatters ? 2 * kItemBytes : kItemBytes);
  if (works) resident_write<Math, MT, NT>(warp, lanes, r, fragment, group * NT * 8, values);
}

template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void resident_conv(Warp& warp, Ring<Warp>& ring, const ResidentArgs& args,
                                         const ResidentRecord& r) {
  switch (r.mt * 16 + r.nt) {
    case 0x11:
      return resident_conv<Math, 1, 1>(warp, ring, args, r);
    case 0x12:
      return resident_conv<Math, 1, 2>(warp, ring, args, r);
    case 0x14:
      return resident_conv<Math, 1, 4>(warp, ring, args, r);
    case 0x21:
      return resident_conv<Math, 2, 1>(warp, ring, args, r);
    case 0x22:
      return resident_conv<Math, 2, 2>(warp, ring, args, r);
    case 0x24:
      return resident_conv<Math, 2, 4>(warp, ring, args, r);
    case 0x41:
      return resident_conv<Math, 4, 1>(warp, ring, args, r);
    case 0x42:
      return resident_conv<Math, 4, 2>(warp, ring, args, r);
    case 0x81:
      return resident_conv<Math, 8, 1>(warp, ring, args, r);
    default:
      return resident_conv<Math, 8, 2>(warp, ring, args, r);
  }
}

// Copies the record to where the ring does not overwrite it, and the offsets of a convolution's steps.
template <class Warp>
GATEDCONV_HOST_DEVICE void keep_record(Warp& warp, const ResidentArgs& args, const ResidentRecord& r) {
  warp.each_lane([&](int lane) {
    const int32_t thread = warp.index() * 32 + lane;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&r);
    uint32_t* to = reinterpret_cast<uint32_t*>(warp.shared() + args.record_at);
    if (thread < kItemBytes / 4) to[thread] = from[thread];
    int32_t* table = reinterpret_cast<int32_t*>(warp.shared() + args.table_at);
    for (int32_t unit = thread; unit < 2 * r.steps; unit += kResidentThreads)
      table[unit] = unit_offset(r, unit);
  });
  warp.sync();
}

template <class Math, class Warp>
GATEDCONV_HOST_DEVICE void run_resident(Warp& warp, const ResidentArgs& args) {
  Ring<Warp> ring(warp, args);
  uint8_t* shared = warp.shared();
  const ResidentRecord& r = *reinterpret_cast<const ResidentRecord*>(shared + args.record_at);
  warp.each_lane([&](int lane) {
    if (warp.index() == 0 && lane < 4) reinterpret_cast<uint32_t*>(shared)[lane] = 0u;
  });
  while (true) {
    keep_record(warp, args, *reinterpret_cast<const ResidentRecord*>(shared + ring.take(kItemBytes)));
    if (r.op == ResidentOp::kEnd) break;
    if (r.clear) clear_halo<Math>(warp, r.target);
    switch (r.op) {
      case ResidentOp::kLoad:
        resident_load<Math>(warp, args, r);
        break;
      case ResidentOp::kConv:
        resident_conv<Math>(warp, ring, args, r);
        break;
      case ResidentOp::kMove:
        resident_move<Math>(warp, ring, r);
        break;
      case ResidentOp::kMean:
        resident_mean<Math>(warp, r);
        break;
      default:
        resident_save<Math>(warp, args, r);
    }
    if (r.op != ResidentOp::kLoad && r.op != ResidentOp::kSave) hand_over<Math>(warp, r);
    warp.barrier();
  }
}

}  // namespace gatedconv
