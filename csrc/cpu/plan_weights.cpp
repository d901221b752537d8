#include "plan_weights.h"

#include <algorithm>

#include "plan.h"
#include "plan_file.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")  // a product is rounded before it is added, on every machine
#endif

namespace gatedconv {
namespace {

constexpr int64_t kMostChannels = 1 << 18;  // as decode takes

bool within(int64_t value, int64_t low, int64_t high) {
  return value >= low && value <= high;
}

// G (tile + 2, 3) of F(tile x tile, 3 x 3): see winograd_weights in gatedconv/engine/pack.py.
void make_transform(int tile, double (&g)[6][3]) {
  static constexpr double kPoints[2][5] = {{0, 1, -1}, {0, 0.75, -0.75, 1.5, -1.5}};
  const double* points = kPoints[tile == 4];
  for (int i = 0; i <= tile; ++i) {
    double scale = 1;
    for (int k = 0; k <= tile; ++k) scale *= k != i ? points[i] - points[k] : 1;
    g[i][0] = 1 / scale;
    g[i][1] = points[i] / scale;
    g[i][2] = points[i] * points[i] / scale;
  }
  g[tile + 1][0] = g[tile + 1][1] = 0;
  g[tile + 1][2] = 1;
}

// A panel's 16 channels at once.
template <typename From, typename To>
void dot(const double* g, const From* a, const From* b, const From* c, To* to) {
  for (int i = 0; i < kPanel; ++i)
    to[i] = static_cast<To>((g[0] * double{a[i]} + g[1] * double{b[i]}) + g[2] * double{c[i]});
}

}  // namespace

std::vector<Gap> find_gaps(const std::vector<int64_t>& program, int64_t stored) {
  const auto size = static_cast<int64_t>(program.size());
  std::vector<Gap> gaps;
  // A list that does not look like a program has no gaps; decode reports what is wrong.
  if (size < 4 || !within(program[1], 1, size) || !within(program[2], 1, size)) return gaps;
  const int64_t maps = program[1], steps = program[2];
  if (4 + maps * kMapFields + steps * kStepFields > size) return gaps;
  int64_t total = stored;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t* step = program.data() + 4 + maps * kMapFields + i * kStepFields;
    if (step[kOp] != int64_t(Op::kWinograd2) && step[kOp] != int64_t(Op::kWinograd4)) continue;
    const int tile = step[kOp] == int64_t(Op::kWinograd4) ? 4 : 2;
    const int64_t span = step[kSpan];
    const int64_t channels = within(step[kOut], 0, maps - 1)
                                 ? program[static_cast<size_t>(4 + step[kOut] * kMapFields + kChannels)]
                                 : 0;
    if (!within(span, 1, kMostChannels) || !within(channels, 1, kMostChannels) || step[kWeights] < 0) {
      throw FileError("a Winograd layer is damaged");
    }
    const int64_t panels = (channels + kPanel - 1) / kPanel;
    const int64_t floats = panels * kPanel * span * (tile + 2) * (tile + 2);
    // Every gap has its filters in the file, a quarter of its size.
    if (floats > 4 * stored || (total += floats) > 5 * stored || step[kWeights] > 5 * stored) {
      throw FileError("a weight is out of range");
    }
    gaps.push_back({step[kWeights], step[kWeights] + floats, step[kDirect], panels, span, tile});
  }
  std::sort(gaps.begin(), gaps.end(), [](const Gap& a, const Gap& b) { return a.begin < b.begin; });
  int64_t end = 0;
  for (const Gap& gap : gaps) {
    const int64_t direct = gap.panels * kPanel * gap.span * 9;
    if (gap.begin < end || gap.end > total || !within(gap.direct, 0, total - direct)) {
      throw FileError("a weight is out of range");
    }
    end = gap.end;
  }
  return gaps;
}

void fill_gap(const Gap& gap, float* weights) {
  double g[6][3];
  make_transform(gap.tile, g);
  const int points = gap.tile + 2;
  const int64_t lanes = gap.span * kPanel;  // floats of one tap, and of one point
  for (int64_t panel = 0; panel < gap.panels; ++panel) {
    const float* from = weights + gap.direct + panel * 9 * lanes;
    float* to = weights + gap.begin + panel * points * points * lanes;
    for (int64_t channel = 0; channel < gap.span; ++channel, from += kPanel, to += kPanel) {
      double half[6][3][kPanel];
      for (int i = 0; i < points; ++i) {
        for (int b = 0; b < 3; ++b)
          dot(g[i], from + b * lanes, from + (3 + b) * lanes, from + (6 + b) * lanes, half[i][b]);
      }
      for (int i = 0; i < points; ++i) {
        for (int j = 0; j < points; ++j)
          dot(g[j], half[i][0], half[i][1], half[i][2], to + (i * points + j) * lanes);
      }
    }
  }
}

}  // namespace gatedconv
