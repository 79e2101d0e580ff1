// SPDX-License-Identifier: Apache-2.0
// The CPU kernels. Included once per instruction set by kernels_<isa>.cpp, which chooses the
// compiler's target and VITADAPTER_VECTOR_BYTES. Everything here has internal linkage, so that no
// instruction set's code can replace another's.
//
// forward:  out[b,q,m,:] = sum_{l,p} w[b,q,m,l,p] * bilinear(value_l[b,:,m,:], loc[b,q,m,l,p])
// backward: with s_k = <grad_out[b,q,m,:], value at corner k>, four dot products per point give the
//           gradients of location and weight (bilinear.h); value receives w * bilinear weight *
//           grad_out at each corner.
//
// A task takes one head m of one image b, and tiles of its queries. For each tile, in this order:
//   place    footprints and weights of all its points, vectorised over points;
//   sample   for each query, its points one after the other, vectorised over channels: what is
//            summed stays in registers, four loads and four multiply-adds per point and vector;
//   finish   (backward) gradients of the points from their four dot products, over points again.

namespace {

using namespace vitadapter;

#include "simd.inl"

template <typename acc>
constexpr int kLanes = VITADAPTER_VECTOR_BYTES / static_cast<int>(sizeof(acc));

// Vectors of sums that one pass keeps in registers. Four hold 64 fp32 channels on AVX-512, eight on
// AVX2, the widths that models use; more would leave too few registers for the rest.
constexpr int kMaxVectors = VITADAPTER_VECTOR_BYTES == 32 ? 8 : 4;

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Channels that one pass over the points takes: NV vectors of N lanes from channel `first` on.
// Widths that are no multiple of a vector end with a narrower vector that overlaps its predecessor;
// of its lanes, the first `seen` were in an earlier pass.
struct Span {
  int64_t first;
  int seen;
};

// Calls pass(Constant<N>, Constant<NV>, Span) for consecutive spans that cover all channels.
template <typename acc, int N, typename Pass>
VITADAPTER_HD void tail_span(int64_t channels, int64_t first, const Pass& pass) {
  const int64_t rest = channels - first;
  if constexpr (N > 1) {
    if (rest * 2 <= N || channels < N) {
      tail_span<acc, N / 2>(channels, first, pass);
      return;
    }
  }
  const int64_t start = rest >= N ? first : channels - N;
  pass(Constant<N>{}, Constant<1>{}, Span{start, static_cast<int>(first - start)});
  if (start + N < channels) tail_span<acc, N>(channels, start + N, pass);
}

template <typename acc, typename Pass>
VITADAPTER_HD void for_each_span(int64_t channels, const Pass& pass) {
  constexpr int N = kLanes<acc>, NV = kMaxVectors;
  int64_t first = 0;
  for (; channels - first >= NV * N; first += NV * N) {
    pass(Constant<N>{}, Constant<NV>{}, Span{first, 0});
  }
  if constexpr (NV > 4) {
    if (channels - first >= 4 * N) {
      pass(Constant<N>{}, Constant<4>{}, Span{first, 0});
      first += 4 * N;
    }
  }
  if (channels - first >= 2 * N) {
    pass(Constant<N>{}, Constant<2>{}, Span{first, 0});
    first += 2 * N;
  }
  if (channels > first) tail_span<acc, N>(channels, first, pass);
}

// The standard library's templates would be compiled for this instruction set under a name that
// other files share; what is needed of them is written here, where names are private.
VITADAPTER_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // Leaves the content undefined.
  void resize(int64_t size) {
    if (size <= size_) return;
    std::free(data_);
    data_ = static_cast<T*>(std::malloc(static_cast<size_t>(size) * sizeof(T)));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = size;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// What does not change from tile to tile: the level of each of a query's points, repeated for all
// queries of a tile, so that loops over points read it like everything else.
struct LevelsOfPoints {
  Buffer<int32_t> height, width, start;

  LevelsOfPoints(const Problem& n, int64_t queries) {
    const int64_t each = n.levels * n.points;
    for (auto* v : {&height, &width, &start}) v->resize(queries * each);
    int64_t j = 0;
    for (int64_t q = 0; q < queries; ++q) {
      for (int l = 0; l < n.levels; ++l) {
        for (int64_t i = 0; i < n.points; ++i, ++j) {
          height[j] = n.level[l].height;
          width[j] = n.level[l].width;
          start[j] = static_cast<int32_t>(n.level[l].start);
        }
      }
    }
  }
};

// The points of a tile, one array per quantity.
template <typename acc>
struct Tile {
  Buffer<acc> x, y;  // the location: as given, then in pixels
  Buffer<acc> attention;
  Buffer<int32_t> inside;       // 0: contributes nothing
  Buffer<int32_t> pixel;        // of corner 0
  Buffer<int32_t> right, down;  // from corner 0 to corners 1 and 2, in pixels
  Buffer<acc> weight[4];        // of the corners, times attention (except for fp64, see sample)
  Buffer<acc> dot;              // backward: s_0..s_3 of each point

  Tile(int64_t points, bool backward) {
    for (auto* v : {&x, &y, &attention, &weight[0], &weight[1], &weight[2], &weight[3]}) {
      v->resize(points);
    }
    for (auto* v : {&inside, &pixel, &right, &down}) v->resize(points);
    if (backward) dot.resize(4 * points);
  }
};

// fp64 keeps the order of the definition (sample, then weigh) for users who compare with it to the
// last bits; everything else saves a multiplication per channel.
template <typename acc>
constexpr bool kWeighLast = sizeof(acc) == 8;

// One head's share of a problem: queries [first, first + count) of image b, head m.
struct Part {
  int64_t b, m, first, count;

  // Row (b, q, m) of tensors that begin with [B, Q, M], for query `first` + q.
  int64_t row(const Problem& n, int64_t q) const {
    return (b * n.queries + first + q) * n.heads + m;
  }
};

// The part that is task (b, m, tile).
Part part_of(const Problem& n, int64_t task) {
  const int64_t tiles = cpu::tiles_per_plane(n), queries = cpu::tile_queries(n);
  const int64_t first = task % tiles * queries, plane = task / tiles;
  return Part{plane / n.heads, plane % n.heads, first, smaller(queries, n.queries - first)};
}

// Copies `size` numbers, or pairs, from storage into consecutive accumulators.
template <typename loc_t, typename acc>
VITADAPTER_HD void copy_row(const loc_t* from, acc* to, int64_t size) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) store<4>(to + i, load<4>(from + i));
  for (; i < size; ++i) to[i] = to_acc(from[i]);
}

template <typename loc_t, typename acc>
VITADAPTER_HD void copy_pairs(const loc_t* from, acc* x, acc* y, int64_t size) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    const Vec<acc, 4> low = load<4>(from + 2 * i), high = load<4>(from + 2 * i + 4);
    store<4>(x + i, even<acc>(low, high));
    store<4>(y + i, odd<acc>(low, high));
  }
  for (; i < size; ++i) {
    x[i] = to_acc(from[2 * i]);
    y[i] = to_acc(from[2 * i + 1]);
  }
}

template <typename loc_t, typename acc>
void place(const Problem& n, const Part& part, const loc_t* locations, const loc_t* weights,
           const LevelsOfPoints& levels, Tile<acc>& tile) {
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < part.count; ++q) {
    const int64_t i = part.row(n, q) * each;
    copy_pairs(locations + 2 * i, tile.x.data() + q * each, tile.y.data() + q * each, each);
    copy_row(weights + i, tile.attention.data() + q * each, each);
  }
  const int32_t* __restrict__ height = levels.height.data();
  const int32_t* __restrict__ width = levels.width.data();
  const int32_t* __restrict__ start = levels.start.data();
  acc* __restrict__ x = tile.x.data();
  acc* __restrict__ y = tile.y.data();
  const acc* __restrict__ attention = tile.attention.data();
  int32_t* __restrict__ inside = tile.inside.data();
  int32_t* __restrict__ pixel = tile.pixel.data();
  int32_t* __restrict__ right = tile.right.data();
  int32_t* __restrict__ down = tile.down.data();
  acc* __restrict__ w0 = tile.weight[0].data();
  acc* __restrict__ w1 = tile.weight[1].data();
  acc* __restrict__ w2 = tile.weight[2].data();
  acc* __restrict__ w3 = tile.weight[3].data();
  const int64_t total = part.count * each;
  // Two loops: in one, the compiler would follow the case "outside" through all that comes after,
  // as branches, and vectorise nothing.
  VITADAPTER_INDEPENDENT
  for (int64_t j = 0; j < total; ++j) {
    inside[j] = to_pixels(x[j], y[j], height[j], width[j], x[j], y[j]);
  }
  VITADAPTER_INDEPENDENT
  for (int64_t j = 0; j < total; ++j) {
    const Footprint<acc> f = footprint(x[j], y[j], height[j], width[j]);
    pixel[j] = start[j] + f.row[0] * width[j] + f.column[0];
    right[j] = f.column[1] - f.column[0];
    down[j] = (f.row[1] - f.row[0]) * width[j];
    const acc a = kWeighLast<acc> ? acc(1) : attention[j];
    const acc top = a * f.wy[0], bottom = a * f.wy[1];
    w0[j] = top * f.wx[0];
    w1[j] = top * f.wx[1];
    w2[j] = bottom * f.wx[0];
    w3[j] = bottom * f.wx[1];
  }
}

// The four corners of point j, in a plane whose pixels are `stride` elements apart.
template <typename T, typename acc>
VITADAPTER_HD void corners(T* plane, int64_t stride, const Tile<acc>& tile, int64_t j,
                           T* corner[4]) {
  corner[0] = plane + tile.pixel[j] * stride;
  corner[1] = corner[0] + tile.right[j] * stride;
  corner[2] = corner[0] + tile.down[j] * stride;
  corner[3] = corner[2] + tile.right[j] * stride;
}

template <int N, int NV, typename value_t, typename acc>
void sample(const Problem& n, const Part& part, const value_t* plane, int64_t stride,
            const Tile<acc>& tile, value_t* out) {
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < part.count; ++q) {
    Vec<acc, N> sum[NV] = {};
    for (int64_t j = q * each; j < (q + 1) * each; ++j) {
      if (!tile.inside[j]) continue;
      const value_t* corner[4];
      corners(plane, stride, tile, j, corner);
      const acc w0 = tile.weight[0][j], w1 = tile.weight[1][j];
      const acc w2 = tile.weight[2][j], w3 = tile.weight[3][j];
      for (int v = 0; v < NV; ++v) {
        if constexpr (kWeighLast<acc>) {
          Vec<acc, N> s = load<N>(corner[0] + v * N) * w0;
          s += load<N>(corner[1] + v * N) * w1;
          s += load<N>(corner[2] + v * N) * w2;
          s += load<N>(corner[3] + v * N) * w3;
          sum[v] += s * tile.attention[j];
        } else {
          sum[v] += load<N>(corner[0] + v * N) * w0;
          sum[v] += load<N>(corner[1] + v * N) * w1;
          sum[v] += load<N>(corner[2] + v * N) * w2;
          sum[v] += load<N>(corner[3] + v * N) * w3;
        }
      }
    }
    value_t* row = out + part.row(n, q) * n.channels;
    for (int v = 0; v < NV; ++v) store<N>(row + v * N, sum[v]);
  }
}

template <typename value_t, typename loc_t>
void forward(const ForwardParams<value_t, loc_t>& p, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t queries = cpu::tile_queries(n);
  const LevelsOfPoints levels(n, queries);
  Tile<acc> tile(queries * n.levels * n.points, false);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(n, task);
    place(n, part, p.locations, p.weights, levels, tile);
    const value_t* base = p.value + p.stride.plane(part.b, part.m);
    for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
      sample<decltype(lanes)::value, decltype(vectors)::value>(
          n, part, base + span.first, p.stride.s, tile, p.out + span.first);
    });
  }
}

// What sample_backward does: dot products, sums into the gradient of value, or both.
enum class Want { kDots, kValue, kBoth };

// The pixels [first, first + count) of one plane's gradient, as fp32 or fp64 sums. A band of its
// own per task is what lets several threads share one plane; `whole` spares the test.
template <typename acc>
struct Band {
  int64_t first, count;
  bool whole;
  Buffer<acc> sum;  // [count, channels of the span]
};

template <Want want, int N, int NV, typename value_t, typename acc>
void sample_backward(const Problem& n, const Part& part, const Span& span, const value_t* grad_out,
                     const value_t* plane, int64_t stride, Tile<acc>& tile, Band<acc>* band) {
  constexpr bool kDots = want != Want::kValue, kValue = want != Want::kDots;
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < part.count; ++q) {
    Vec<acc, N> g[NV];
    const value_t* row = grad_out + part.row(n, q) * n.channels + span.first;
    for (int v = 0; v < NV; ++v) g[v] = load<N>(row + v * N);
    for (int lane = 0; lane < span.seen; ++lane) g[0][lane] = 0;
    for (int64_t j = q * each; j < (q + 1) * each; ++j) {
      if (!tile.inside[j]) continue;
      if constexpr (kDots) {
        const value_t* corner[4];
        corners(plane, stride, tile, j, corner);
        Vec<acc, N> s[4] = {};
        for (int v = 0; v < NV; ++v) {
          for (int k = 0; k < 4; ++k) s[k] += load<N>(corner[k] + v * N) * g[v];
        }
        Vec<acc, 4> dot = sums<acc, N>(s[0], s[1], s[2], s[3]);
        acc* total = tile.dot.data() + 4 * j;
        // The first span finds what the previous tile left.
        if (span.first > 0) dot += load<4>(total);
        store<4>(total, dot);
      }
      if constexpr (kValue) {
        const acc a = kWeighLast<acc> ? tile.attention[j] : acc(1);
        const int64_t pixel[4] = {tile.pixel[j], tile.pixel[j] + tile.right[j],
                                  tile.pixel[j] + tile.down[j],
                                  tile.pixel[j] + tile.down[j] + tile.right[j]};
        for (int k = 0; k < 4; ++k) {
          const int64_t local = pixel[k] - band->first;
          if (!band->whole && (local < 0 || local >= band->count)) continue;
          acc* sum = band->sum.data() + local * (N * NV);
          const acc w = a * tile.weight[k][j];
          for (int v = 0; v < NV; ++v) store<N>(sum + v * N, load<N>(sum + v * N) + g[v] * w);
        }
      }
    }
  }
}

// Gradients of a tile's locations and weights from its dot products.
template <typename value_t, typename loc_t>
void finish(const BackwardParams<value_t, loc_t, value_t>& p, const Part& part,
            const LevelsOfPoints& levels, const Tile<acc_t<value_t>>& tile) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < part.count; ++q) {
    const int64_t row = part.row(n, q) * each;
    for (int64_t i = 0; i < each; ++i) {
      const int64_t j = q * each + i;
      const int32_t height = levels.height[j], width = levels.width[j];
      PointGradient<acc> g{0, 0, 0};
      if (tile.inside[j]) {
        const Footprint<acc> f = footprint(tile.x[j], tile.y[j], height, width);
        g = point_gradient(f, tile.dot.data() + 4 * j, tile.attention[j], height, width);
      }
      if (p.grad_locations != nullptr) {
        from_acc(g.loc_x, p.grad_locations[2 * (row + i)]);
        from_acc(g.loc_y, p.grad_locations[2 * (row + i) + 1]);
      }
      if (p.grad_weights != nullptr) from_acc(g.weight, p.grad_weights[row + i]);
    }
  }
}

template <typename value_t, typename loc_t>
void backward_points(const BackwardParams<value_t, loc_t, value_t>& p, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t queries = cpu::tile_queries(n);
  const LevelsOfPoints levels(n, queries);
  Tile<acc> tile(queries * n.levels * n.points, true);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(n, task);
    place(n, part, p.locations, p.weights, levels, tile);
    const value_t* base = p.value + p.stride.plane(part.b, part.m);
    for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
      sample_backward<Want::kDots, decltype(lanes)::value, decltype(vectors)::value>(
          n, part, span, p.grad_out, base + span.first, p.stride.s, tile,
          static_cast<Band<acc>*>(nullptr));
    });
    finish(p, part, levels, tile);
  }
}

template <typename value_t, typename loc_t>
void backward_value(const BackwardParams<value_t, loc_t, value_t>& p, int64_t bands, int64_t begin,
                    int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t queries = cpu::tile_queries(n);
  const LevelsOfPoints levels(n, queries);
  const bool both = bands == 1 && p.wants_points();
  Tile<acc> tile(queries * n.levels * n.points, both);
  Band<acc> band;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % bands, plane = task / bands;
    Part part{plane / n.heads, plane % n.heads, 0, 0};
    band.first = n.pixels * index / bands;
    band.count = n.pixels * (index + 1) / bands - band.first;
    band.whole = bands == 1;
    const value_t* base = p.value + p.stride.plane(part.b, part.m);
    const int64_t offset = ((part.b * n.pixels + band.first) * n.heads + part.m) * n.channels;
    // Tiles inside spans: a span's sums are one block of memory, and are written out once. Dot
    // products span all channels, so that with several spans they take a pass of their own.
    int spans = 0;
    for_each_span<acc>(n.channels, [&](auto, auto, const Span&) { ++spans; });
    const bool one_span = spans == 1;
    for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
      constexpr int N = decltype(lanes)::value, NV = decltype(vectors)::value;
      band.sum.resize(band.count * N * NV);
      std::memset(band.sum.data(), 0, static_cast<size_t>(band.count * N * NV) * sizeof(acc));
      for (part.first = 0; part.first < n.queries; part.first += queries) {
        part.count = smaller(queries, n.queries - part.first);
        place(n, part, p.locations, p.weights, levels, tile);
        if (both && one_span) {
          sample_backward<Want::kBoth, N, NV>(n, part, span, p.grad_out, base + span.first,
                                              p.stride.s, tile, &band);
          finish(p, part, levels, tile);
        } else {
          sample_backward<Want::kValue, N, NV>(n, part, span, p.grad_out, base + span.first,
                                               p.stride.s, tile, &band);
        }
      }
      value_t* grad = p.grad_value + offset + span.first;
      for (int64_t s = 0; s < band.count; ++s) {
        const acc* sum = band.sum.data() + s * (N * NV);
        for (int c = span.seen; c < N * NV; ++c)
          from_acc(sum[c], grad[s * n.heads * n.channels + c]);
      }
    });
    if (both && !one_span) {
      const int64_t tiles = cpu::tiles_per_plane(n);
      backward_points(p, plane * tiles, (plane + 1) * tiles);
    }
  }
}

template <typename value_t, typename loc_t>
constexpr vitadapter::cpu::Kernels<value_t, loc_t> kernels_of() {
  return {&forward<value_t, loc_t>, &backward_points<value_t, loc_t>,
          &backward_value<value_t, loc_t>};
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
