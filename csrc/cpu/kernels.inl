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
// A task takes one head m of one image b, and tiles of its queries. What is slow is memory, so that
// everything is arranged for the caches:
//   pack     copies the head's plane of value: its pixels then lie side by side, instead of M * D
//            apart, where they would share a few cache sets and need a page each;
// and then, for each tile:
//   fetch    locations and weights, the rows to come prefetched;
//   place    footprints and weights of all points, vectorised over points;
//   sample   for each query, its points one after the other, vectorised over channels: what is
//            summed stays in registers, four loads and four multiply-adds per point and vector;
//   finish   (backward) gradients of the points from their four dot products, over points again.

// Here, so that its functions too are compiled for this instruction set.
#include "../bilinear.h"

namespace {

using namespace vitadapter;

#include "simd.inl"

template <typename acc>
constexpr int kLanes = VITADAPTER_VECTOR_BYTES / static_cast<int>(sizeof(acc));

// Vectors of sums that one pass keeps in registers. Four hold 64 fp32 channels on AVX-512, eight on
// AVX2, the widths that models use; more would leave too few registers for the rest.
constexpr int kMaxVectors = VITADAPTER_VECTOR_BYTES == 32 ? 8 : 4;

// Integers of the width of an accumulator: what vectors of them are compared and indexed with.
template <typename acc>
using lane_int = std::conditional_t<sizeof(acc) == 8, int64_t, int32_t>;

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
  while (first < channels) {
    const int64_t rest = channels - first;
    if constexpr (N > 1) {
      if (rest * 2 <= N || channels < N) return tail_span<acc, N / 2>(channels, first, pass);
    }
    const int64_t start = rest >= N ? first : channels - N;
    pass(Constant<N>{}, Constant<1>{}, Span{start, static_cast<int>(first - start)});
    first = start + N;
  }
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
    // On cache lines: a vector that crosses them costs twice.
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    data_ = static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
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

// The level of each of a query's points, repeated for all queries of a tile, so that loops over
// points read it like everything else. Arrays over points end with room for one more vector.
template <typename acc>
struct LevelsOfPoints {
  Buffer<int32_t> height, width, start;
  Buffer<acc> real_height, real_width;

  LevelsOfPoints(const Problem& n, int64_t queries) {
    const int64_t each = n.levels * n.points, size = queries * each + kLanes<acc>;
    for (auto* v : {&height, &width, &start}) v->resize(size);
    for (auto* v : {&real_height, &real_width}) v->resize(size);
    int64_t j = 0;
    while (j < size && each > 0) {
      for (int l = 0; l < n.levels; ++l) {
        for (int64_t i = 0; i < n.points && j < size; ++i, ++j) {
          height[j] = n.level[l].height;
          width[j] = n.level[l].width;
          start[j] = static_cast<int32_t>(n.level[l].start);
          real_height[j] = static_cast<acc>(height[j]);
          real_width[j] = static_cast<acc>(width[j]);
        }
      }
    }
  }
};

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

// Copies `size` numbers, or pairs, from storage into consecutive accumulators, and back.
template <typename T, typename acc>
VITADAPTER_HD void read_row(const T* from, acc* to, int64_t size) {
  constexpr int N = kLanes<acc>;
  int64_t i = 0;
  for (; i + N <= size; i += N) store<N>(to + i, load<N>(from + i));
  for (; i + 4 <= size; i += 4) store<4>(to + i, load<4>(from + i));
  for (; i < size; ++i) to[i] = to_acc(from[i]);
}
template <typename T, typename acc>
VITADAPTER_HD void read_pairs(const T* from, acc* x, acc* y, int64_t size) {
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
template <typename T, typename acc>
VITADAPTER_HD void write_row(const acc* from, T* to, int64_t size) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) store<4>(to + i, load<4>(from + i));
  for (; i < size; ++i) from_acc(from[i], to[i]);
}
template <typename T, typename acc>
VITADAPTER_HD void write_pairs(const acc* x, const acc* y, T* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    from_acc(x[i], to[2 * i]);
    from_acc(y[i], to[2 * i + 1]);
  }
}

template <typename T>
VITADAPTER_HD void prefetch(const T* row, int64_t size) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += line) __builtin_prefetch(row + i);
}

// Rows ahead whose cache lines are asked for: as long as a read from memory takes.
constexpr int64_t kRowsAhead = 8;

// The points of a tile, one array per quantity.
template <typename acc>
struct Tile {
  Buffer<acc> x, y;             // the location: as given, then in pixels
  Buffer<acc> attention;        // as given, then 0 for points outside
  Buffer<int32_t> pixel;        // of corner 0; the number of pixels for points outside
  Buffer<int32_t> right, down;  // from corner 0 to corners 1 and 2, in pixels
  Buffer<acc> weight[4];        // of the corners, times attention (except for fp64, see sample)
  Buffer<acc> dot;              // backward: s_0..s_3 of each point

  Tile(int64_t points, bool backward) {
    const int64_t size = points + kLanes<acc>;
    for (auto* v : {&x, &y, &attention, &weight[0], &weight[1], &weight[2], &weight[3]}) {
      v->resize(size);
    }
    for (auto* v : {&pixel, &right, &down}) v->resize(size);
    if (backward) dot.resize(4 * size);
  }
};

// fp64 keeps the order of the definition (sample, then weigh): its output is that of the reference to
// the last bit. Everything else saves a multiplication per channel.
template <typename acc>
constexpr bool kWeighLast = sizeof(acc) == 8;

template <typename loc_t, typename acc>
void fetch(const Problem& n, const Part& part, const loc_t* locations, const loc_t* weights,
           Tile<acc>& tile) {
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < part.count; ++q) {
    const int64_t ahead = part.row(n, q + part.count) * each;
    prefetch(locations + 2 * ahead, 2 * each);
    prefetch(weights + ahead, each);
    const int64_t from = part.row(n, q) * each, to = q * each;
    read_pairs(locations + 2 * from, &tile.x[to], &tile.y[to], each);
    read_row(weights + from, &tile.attention[to], each);
  }
}

template <typename acc>
void place(const Problem& n, const Part& part, const LevelsOfPoints<acc>& levels, Tile<acc>& tile) {
  constexpr int N = kLanes<acc>;
  using T = Vec<acc, N>;
  using I = Vec<lane_int<acc>, N>;
  const T one = T{} + acc(1);
  const I none{}, zeros = none + static_cast<lane_int<acc>>(n.pixels);
  const int64_t total = part.count * n.levels * n.points;
  for (int64_t j = 0; j < total; j += N) {
    const I height = load_int<I>(&levels.height[j]), width = load_int<I>(&levels.width[j]);
    T x, y;
    const auto inside =
        to_pixels(load<N>(&tile.x[j]), load<N>(&tile.y[j]), load<N>(&levels.real_height[j]),
                  load<N>(&levels.real_width[j]), x, y);
    const Footprint<T, I> f = footprint(x, y, height, width);
    const I pixel = load_int<I>(&levels.start[j]) + f.row[0] * width + f.column[0];
    store_int(&tile.pixel[j], inside ? pixel : zeros);
    store_int(&tile.right[j], inside ? f.column[1] - f.column[0] : none);
    store_int(&tile.down[j], inside & (f.row[1] != f.row[0]) ? width : none);
    const T attention = inside ? load<N>(&tile.attention[j]) : T{};
    const T a = kWeighLast<acc> ? one : attention;
    const T top = inside ? a * f.wy[0] : T{}, bottom = inside ? a * f.wy[1] : T{};
    store<N>(&tile.x[j], x);
    store<N>(&tile.y[j], y);
    store<N>(&tile.attention[j], attention);
    store<N>(&tile.weight[0][j], top * f.wx[0]);
    store<N>(&tile.weight[1][j], top * f.wx[1]);
    store<N>(&tile.weight[2][j], bottom * f.wx[0]);
    store<N>(&tile.weight[3][j], bottom * f.wx[1]);
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

// One head's plane of value as the samplers read it: where it lies, or a copy. A copy ends with a
// pixel of zeros, to which the points outside belong: no branch is needed.
template <typename value_t, typename acc>
class Plane {
 public:
  Plane(const Problem& n, const value_t* value, const ValueStrides& stride)
      : n_(n), value_(value), stride_(stride) {}

  // Turns to head m of image b, of which `queries` will be sampled.
  void turn_to(int64_t b, int64_t m, int64_t queries) {
    lying_ = value_ + stride_.plane(b, m);
    // A copy pays when pixels are read more often than once, and lie apart.
    packed_ = queries * n_.levels * n_.points >= n_.pixels &&
              !(std::is_same_v<value_t, acc> && stride_.s == n_.channels);
    if (packed_) pack();
  }

  // Calls use(Constant<padded>, first pixel, elements from pixel to pixel).
  template <typename Use>
  VITADAPTER_HD void with(const Use& use) const {
    if (packed_) {
      use(Constant<1>{}, copy_.data(), n_.channels);
    } else {
      use(Constant<0>{}, lying_, stride_.s);
    }
  }

 private:
  void pack() {
    copy_.resize((n_.pixels + 1) * n_.channels);
    for (int64_t s = 0; s < n_.pixels; ++s) {
      prefetch(lying_ + (s + 4 * kRowsAhead) * stride_.s, n_.channels);
      read_row(lying_ + s * stride_.s, &copy_[s * n_.channels], n_.channels);
    }
    std::memset(&copy_[n_.pixels * n_.channels], 0, static_cast<size_t>(n_.channels) * sizeof(acc));
  }

  const Problem& n_;
  const value_t* value_;
  ValueStrides stride_;
  const value_t* lying_ = nullptr;
  bool packed_ = false;
  Buffer<acc> copy_;
};

template <bool kPadded, int N, int NV, typename T, typename value_t, typename acc>
void sample(const Problem& n, const Part& part, const T* plane, int64_t stride,
            const Tile<acc>& tile, value_t* out) {
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < part.count; ++q) {
    const value_t* ahead = out + part.row(n, q + kRowsAhead) * n.channels;
    for (int v = 0; v < NV; ++v) __builtin_prefetch(ahead + v * N, 1);
    Vec<acc, N> sum[NV] = {};
    for (int64_t j = q * each; j < (q + 1) * each; ++j) {
      if (!kPadded && tile.pixel[j] == n.pixels) continue;
      const T* corner[4];
      corners(plane, stride, tile, j, corner);
      const auto w0 = broadcast<acc, N>(tile.weight[0][j]);
      const auto w1 = broadcast<acc, N>(tile.weight[1][j]);
      const auto w2 = broadcast<acc, N>(tile.weight[2][j]);
      const auto w3 = broadcast<acc, N>(tile.weight[3][j]);
      for (int v = 0; v < NV; ++v) {
        if constexpr (kWeighLast<acc>) {
          Vec<acc, N> s = load<N>(corner[0] + v * N) * w0;
          s += load<N>(corner[1] + v * N) * w1;
          s += load<N>(corner[2] + v * N) * w2;
          s += load<N>(corner[3] + v * N) * w3;
          sum[v] += s * tile.attention[j];
        } else {
          sum[v] = multiply_add<acc, N>(load<N>(corner[0] + v * N), w0, sum[v]);
          sum[v] = multiply_add<acc, N>(load<N>(corner[1] + v * N), w1, sum[v]);
          sum[v] = multiply_add<acc, N>(load<N>(corner[2] + v * N), w2, sum[v]);
          sum[v] = multiply_add<acc, N>(load<N>(corner[3] + v * N), w3, sum[v]);
        }
      }
    }
    value_t* row = out + part.row(n, q) * n.channels;
    for (int v = 0; v < NV; ++v) store<N>(row + v * N, sum[v]);
  }
}

// Calls handle(part) for the tasks (b, m, tile), with `plane` turned to their heads.
template <typename value_t, typename acc, typename Handle>
VITADAPTER_HD void for_each_part(const Problem& n, int64_t begin, int64_t end,
                                 Plane<value_t, acc>& plane, const Handle& handle) {
  const int64_t tiles = cpu::tiles_per_plane(n), queries = cpu::tile_queries(n);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(n, task);
    if (task == begin || task % tiles == 0) {
      plane.turn_to(part.b, part.m, smaller(end - task, tiles) * queries);
    }
    handle(part);
  }
}

template <typename value_t, typename loc_t>
void forward(const ForwardParams<value_t, loc_t>& p, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t queries = cpu::tile_queries(n);
  const LevelsOfPoints<acc> levels(n, queries);
  Tile<acc> tile(queries * n.levels * n.points, false);
  Plane<value_t, acc> plane(n, p.value, p.stride);
  for_each_part(n, begin, end, plane, [&](const Part& part) {
    fetch(n, part, p.locations, p.weights, tile);
    place(n, part, levels, tile);
    for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
      plane.with([&](auto padded, const auto* pixels, int64_t stride) {
        sample<decltype(padded)::value != 0, decltype(lanes)::value, decltype(vectors)::value>(
            n, part, pixels + span.first, stride, tile, p.out + span.first);
      });
    });
  });
}

// What sample_backward does: dot products, sums into the gradient of value, or both.
enum class Want { kDots, kValue, kBoth };

// The pixels [first, first + count) of one plane's gradient, as fp32 or fp64 sums. A band of its
// own per task is what lets several threads share one plane; `whole` spares the test, and has one
// pixel more for the points outside.
template <typename acc>
struct Band {
  int64_t first, count;
  bool whole;
  Buffer<acc> sum;  // [count, channels of the span]
};

template <Want want, bool kPadded, int N, int NV, typename T, typename value_t, typename acc>
void sample_backward(const Problem& n, const Part& part, const Span& span, const value_t* grad_out,
                     const T* plane, int64_t stride, Tile<acc>& tile, Band<acc>* band) {
  constexpr bool kDots = want != Want::kValue, kValue = want != Want::kDots;
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < part.count; ++q) {
    Vec<acc, N> g[NV];
    const value_t* row = grad_out + part.row(n, q) * n.channels + span.first;
    const value_t* ahead = row + (part.row(n, kRowsAhead) - part.row(n, 0)) * n.channels;
    for (int v = 0; v < NV; ++v) __builtin_prefetch(ahead + v * N);
    for (int v = 0; v < NV; ++v) g[v] = load<N>(row + v * N);
    for (int lane = 0; lane < span.seen; ++lane) g[0][lane] = 0;
    for (int64_t j = q * each; j < (q + 1) * each; ++j) {
      if (!kPadded && tile.pixel[j] == n.pixels) continue;
      if constexpr (kDots) {
        const T* corner[4];
        corners(plane, stride, tile, j, corner);
        Vec<acc, N> s[4] = {};
        for (int v = 0; v < NV; ++v) {
          for (int k = 0; k < 4; ++k) {
            s[k] = multiply_add<acc, N>(load<N>(corner[k] + v * N), g[v], s[k]);
          }
        }
        Vec<acc, 4> dot = sums<acc, N>(s[0], s[1], s[2], s[3]);
        acc* total = &tile.dot[4 * j];
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
          const auto w = broadcast<acc, N>(a * tile.weight[k][j]);
          for (int v = 0; v < NV; ++v) {
            store<N>(sum + v * N, multiply_add<acc, N>(g[v], w, load<N>(sum + v * N)));
          }
        }
      }
    }
  }
}

// Gradients of a tile's locations and weights from its dot products.
template <typename value_t, typename loc_t>
void finish(const BackwardParams<value_t, loc_t, value_t>& p, const Part& part,
            const LevelsOfPoints<acc_t<value_t>>& levels, Tile<acc_t<value_t>>& tile) {
  using acc = acc_t<value_t>;
  constexpr int N = kLanes<acc>;
  using T = Vec<acc, N>;
  using I = Vec<lane_int<acc>, N>;
  const Problem& n = p.problem;
  const int64_t each = n.levels * n.points;
  for (int64_t j = 0; j < part.count * each; j += N) {
    const auto inside = load_int<I>(&tile.pixel[j]) != static_cast<lane_int<acc>>(n.pixels);
    const I height = load_int<I>(&levels.height[j]), width = load_int<I>(&levels.width[j]);
    const Footprint<T, I> f = footprint(load<N>(&tile.x[j]), load<N>(&tile.y[j]), height, width);
    T s[4];
    transposed<acc, N>(&tile.dot[4 * j], s);
    const PointGradient<T> g =
        point_gradient(f, s, load<N>(&tile.attention[j]), load<N>(&levels.real_height[j]),
                       load<N>(&levels.real_width[j]));
    // The tile is done with: its arrays take the gradients.
    store<N>(&tile.x[j], inside ? g.loc_x : T{});
    store<N>(&tile.y[j], inside ? g.loc_y : T{});
    store<N>(&tile.attention[j], inside ? g.weight : T{});
  }
  for (int64_t q = 0; q < part.count; ++q) {
    const int64_t to = part.row(n, q) * each, from = q * each;
    if (p.grad_locations != nullptr) {
      write_pairs(&tile.x[from], &tile.y[from], p.grad_locations + 2 * to, each);
    }
    if (p.grad_weights != nullptr) write_row(&tile.attention[from], p.grad_weights + to, each);
  }
}

template <typename value_t, typename loc_t>
void backward_points(const BackwardParams<value_t, loc_t, value_t>& p, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t queries = cpu::tile_queries(n);
  const LevelsOfPoints<acc> levels(n, queries);
  Tile<acc> tile(queries * n.levels * n.points, true);
  Plane<value_t, acc> plane(n, p.value, p.stride);
  for_each_part(n, begin, end, plane, [&](const Part& part) {
    fetch(n, part, p.locations, p.weights, tile);
    place(n, part, levels, tile);
    for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
      plane.with([&](auto padded, const auto* pixels, int64_t stride) {
        sample_backward<Want::kDots, decltype(padded)::value != 0, decltype(lanes)::value,
                        decltype(vectors)::value>(n, part, span, p.grad_out, pixels + span.first,
                                                  stride, tile, static_cast<Band<acc>*>(nullptr));
      });
    });
    finish(p, part, levels, tile);
  });
}

template <typename value_t, typename loc_t>
void backward_value(const BackwardParams<value_t, loc_t, value_t>& p, int64_t bands, int64_t begin,
                    int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t queries = cpu::tile_queries(n);
  const LevelsOfPoints<acc> levels(n, queries);
  // Dot products span all channels, so that with several spans they take a pass of their own.
  int spans = 0;
  for_each_span<acc>(n.channels, [&](auto, auto, const Span&) { ++spans; });
  const bool dots = bands == 1 && p.wants_points(), together = dots && spans == 1;
  Tile<acc> tile(queries * n.levels * n.points, together);
  Plane<value_t, acc> plane(n, p.value, p.stride);
  Band<acc> band;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % bands, head = task / bands;
    Part part{head / n.heads, head % n.heads, 0, 0};
    if (together) plane.turn_to(part.b, part.m, n.queries);
    band.first = n.pixels * index / bands;
    band.count = n.pixels * (index + 1) / bands - band.first;
    band.whole = bands == 1;
    if (band.count == 0) continue;  // more bands than pixels
    const int64_t offset = ((part.b * n.pixels + band.first) * n.heads + part.m) * n.channels;
    // Tiles inside spans: a span's sums are one block of memory, and are written out once.
    for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
      constexpr int N = decltype(lanes)::value, NV = decltype(vectors)::value;
      const int64_t size = (band.count + 1) * N * NV;
      band.sum.resize(size);
      std::memset(band.sum.data(), 0, static_cast<size_t>(size) * sizeof(acc));
      for (part.first = 0; part.first < n.queries; part.first += queries) {
        part.count = smaller(queries, n.queries - part.first);
        fetch(n, part, p.locations, p.weights, tile);
        place(n, part, levels, tile);
        if (together) {
          plane.with([&](auto padded, const auto* pixels, int64_t stride) {
            sample_backward<Want::kBoth, decltype(padded)::value != 0, N, NV>(
                n, part, span, p.grad_out, pixels + span.first, stride, tile, &band);
          });
          finish(p, part, levels, tile);
        } else {
          sample_backward<Want::kValue, true, N, NV>(
              n, part, span, p.grad_out, static_cast<const value_t*>(nullptr), 0, tile, &band);
        }
      }
      value_t* grad = p.grad_value + offset + span.first;
      for (int64_t s = 0; s < band.count; ++s) {
        const acc* sum = &band.sum[s * (N * NV)];
        value_t* row = grad + s * n.heads * n.channels;
        if (span.seen == 0) {
          for (int v = 0; v < NV; ++v) store<N>(row + v * N, load<N>(sum + v * N));
        } else {
          for (int c = span.seen; c < N * NV; ++c) from_acc(sum[c], row[c]);
        }
      }
    });
    if (dots && !together) {
      const int64_t tiles = cpu::tiles_per_plane(n);
      backward_points(p, head * tiles, (head + 1) * tiles);
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
