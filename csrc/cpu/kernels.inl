// SPDX-License-Identifier: Apache-2.0
// The CPU kernels. Included once per instruction set by kernels_<isa>.cpp, which chooses the
// compiler's target and the namespace; plain loops over channels are what gets vectorised.
// Everything here has internal linkage, so no instruction set's code can replace another's.
//
// forward:  out[b,q,m,:] = sum_{l,p} w[b,q,m,l,p] * bilinear(value_l[b,:,m,:], loc[b,q,m,l,p])
// backward: with s_k = <grad_out[b,q,m,:], value at corner k>, four dot products per point give the
//           gradients of location and weight (bilinear.h); value receives w * bilinear weight *
//           grad_out at each corner.

namespace {

using namespace vitadapter;

// Channels accumulated at a time: 64 fp32 sums are four AVX-512 registers, and published models
// have at most 128 channels per head.
constexpr int64_t kChunk = 64;

template <typename value_t>
struct Point {
  const value_t* corner[4];  // first channel of the corner's pixel; a row of zeros outside the map
  acc_t<value_t> weight[4];
  acc_t<value_t> attention;
};

// Stands in for pixels outside the map, so that the channel loops need no branches and an Inf or
// NaN stored in the map cannot leak through a zero weight.
template <typename value_t>
const value_t* zero_row() {
  static const value_t zeros[kChunk] = {};
  return zeros;
}

// The points of one row that touch their map, in level-major order. Returns how many.
template <typename value_t, typename loc_t>
int64_t gather_points(const ForwardParams<value_t, loc_t>& p, int64_t row, Point<value_t>* points) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t m = row % n.heads, b = row / (n.heads * n.queries);
  const value_t* plane = p.value + b * p.stride.b + m * p.stride.m;
  const int64_t first = row * n.levels * n.points;
  int64_t count = 0;
  for (int l = 0; l < n.levels; ++l) {
    const Level& level = n.level[l];
    for (int64_t i = first + l * n.points; i < first + (l + 1) * n.points; ++i) {
      Footprint<acc> f;
      const acc x = to_acc(p.locations[2 * i]), y = to_acc(p.locations[2 * i + 1]);
      if (!locate(x, y, level.height, level.width, f)) continue;
      Point<value_t>& point = points[count++];
      point.attention = to_acc(p.weights[i]);
      for (int k = 0; k < 4; ++k) {
        point.corner[k] = f.valid[k] ? plane + (level.start + f.pixel[k]) * p.stride.s : nullptr;
        // fp64 keeps the order of the definition (sample, then weigh) for users who compare with
        // it to the last bits; everything else saves a multiplication per channel.
        point.weight[k] =
            std::is_same<acc, double>::value ? f.weight[k] : f.weight[k] * point.attention;
      }
    }
  }
  return count;
}

template <typename value_t, typename loc_t>
void forward_rows(const ForwardParams<value_t, loc_t>& p, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  std::vector<Point<value_t>> points(static_cast<size_t>(n.levels * n.points));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t count = gather_points(p, row, points.data());
    for (int64_t c0 = 0; c0 < n.channels; c0 += kChunk) {
      const int64_t width = std::min(kChunk, n.channels - c0);
      acc sum[kChunk] = {};
      for (int64_t i = 0; i < count; ++i) {
        const Point<value_t>& point = points[i];
        const value_t* v[4];
        for (int k = 0; k < 4; ++k) {
          v[k] = point.corner[k] ? point.corner[k] + c0 : zero_row<value_t>();
        }
        const acc w0 = point.weight[0], w1 = point.weight[1];
        const acc w2 = point.weight[2], w3 = point.weight[3];
        for (int64_t c = 0; c < width; ++c) {
          const acc sample = w0 * to_acc(v[0][c]) + w1 * to_acc(v[1][c]) + w2 * to_acc(v[2][c]) +
                             w3 * to_acc(v[3][c]);
          sum[c] += std::is_same<acc, double>::value ? point.attention * sample : sample;
        }
      }
      value_t* out = p.out + row * n.channels + c0;
      for (int64_t c = 0; c < width; ++c) from_acc(sum[c], out[c]);
    }
  }
}

template <typename value_t, typename loc_t>
void backward_row(const BackwardParams<value_t, loc_t, acc_t<value_t>>& p, int64_t row) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t m = row % n.heads, b = row / (n.heads * n.queries);
  const value_t* plane = p.value + b * p.stride.b + m * p.stride.m;
  const value_t* grad_out = p.grad_out + row * n.channels;
  const bool need_dots = p.grad_locations != nullptr || p.grad_weights != nullptr;
  for (int l = 0; l < n.levels; ++l) {
    const Level& level = n.level[l];
    for (int64_t j = 0; j < n.points; ++j) {
      const int64_t i = (row * n.levels + l) * n.points + j;
      const acc attention = to_acc(p.weights[i]);
      Footprint<acc> f;
      PointGradient<acc> g{0, 0, 0};
      const acc x = to_acc(p.locations[2 * i]), y = to_acc(p.locations[2 * i + 1]);
      if (locate(x, y, level.height, level.width, f)) {
        acc s[4] = {};
        for (int k = 0; k < 4; ++k) {
          if (!f.valid[k]) continue;
          const int64_t pixel = level.start + f.pixel[k];
          if (need_dots) {
            const value_t* v = plane + pixel * p.stride.s;
            acc dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < n.channels; ++c) dot += to_acc(grad_out[c]) * to_acc(v[c]);
            s[k] = dot;
          }
          if (p.grad_value != nullptr) {
            acc* gv = p.grad_value + ((b * n.pixels + pixel) * n.heads + m) * n.channels;
            const acc w = attention * f.weight[k];
            for (int64_t c = 0; c < n.channels; ++c) gv[c] += w * to_acc(grad_out[c]);
          }
        }
        g = point_gradient(f, s, attention, level.height, level.width);
      }
      if (p.grad_locations != nullptr) {
        from_acc(g.loc_x, p.grad_locations[2 * i]);
        from_acc(g.loc_y, p.grad_locations[2 * i + 1]);
      }
      if (p.grad_weights != nullptr) from_acc(g.weight, p.grad_weights[i]);
    }
  }
}

template <typename value_t, typename loc_t>
void backward_rows(const BackwardParams<value_t, loc_t, acc_t<value_t>>& p, int64_t begin,
                   int64_t end) {
  for (int64_t row = begin; row < end; ++row) backward_row(p, row);
}

template <typename value_t, typename loc_t>
void backward_planes(const BackwardParams<value_t, loc_t, acc_t<value_t>>& p, int64_t begin,
                     int64_t end) {
  const Problem& n = p.problem;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t b = plane / n.heads, m = plane % n.heads;
    for (int64_t q = 0; q < n.queries; ++q) {
      backward_row(p, (b * n.queries + q) * n.heads + m);
    }
  }
}

template <typename value_t, typename loc_t>
constexpr vitadapter::cpu::Kernels<value_t, loc_t> kernels_of() {
  return {&forward_rows<value_t, loc_t>, &backward_rows<value_t, loc_t>,
          &backward_planes<value_t, loc_t>};
}

vitadapter::cpu::KernelTable kernel_table(const char* isa) {
  return {isa,
          kernels_of<double, double>(),
          kernels_of<float, float>(),
          kernels_of<float16, float16>(),
          kernels_of<bfloat16, bfloat16>(),
          kernels_of<float16, float>(),
          kernels_of<bfloat16, float>()};
}

}  // namespace
