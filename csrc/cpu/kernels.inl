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
// What is slow is memory, so that everything is arranged for the caches. A task takes some heads of
// one image and some of its queries:
//   pack     copies the heads' planes of value: a head's pixels then lie side by side, instead of
//            M * D apart, where they would share a few cache sets;
//   fetch    reads locations and weights (and grad_out), and asks for the rows to come;
// and for each head and tile of queries, whose points stay in L1,
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

// Queries [first, first + count) and heads [head, head + heads) of image b.
struct Part {
  int64_t b, first, count, head, heads;

  // Row (b, q, m) of tensors that begin with [B, Q, M], for query `first` + q and the first head.
  int64_t row(const Problem& n, int64_t q) const {
    return (b * n.queries + first + q) * n.heads + head;
  }
};

template <typename T>
VITADAPTER_HD void prefetch(const T* row, int64_t size) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += line) __builtin_prefetch(row + i);
}

// Rows ahead whose cache lines are asked for: where rows are far apart, the hardware does not.
constexpr int64_t kRowsAhead = 32;

// Calls use(Constant<W>) with the widest vector that rows of `size` numbers fill.
template <int W, typename Use>
VITADAPTER_HD void with_width(int64_t size, const Use& use) {
  if constexpr (W > 1) {
    if (size < W) return with_width<W / 2>(size, use);
  }
  use(Constant<W>{});
}

// Copies a row between storage and accumulators, W <= size at a time; the last vector may overlap
// its predecessor.
template <int W, typename From, typename To>
VITADAPTER_HD void move_row(const From* from, To* to, int64_t size) {
  for (int64_t i = 0; i < size; i += W) {
    const int64_t at = smaller(i, size - W);
    store<W>(to + at, load<W>(from + at));
  }
}

// What a task reads and, backward, writes, head by head.
template <typename acc>
struct Block {
  Buffer<acc> x, y, attention;  // [heads, queries * L * P]: locations and weights, or gradients
  Buffer<acc> grad_out;         // [heads, queries, D]

  Block(const Problem& n, const cpu::Cut& cut, bool backward) {
    const int64_t rows = cut.heads * cut.queries;
    for (auto* v : {&x, &y, &attention}) v->resize(rows * n.levels * n.points + kLanes<acc>);
    if (backward) grad_out.resize(rows * n.channels);
  }
};

// Locations and weights of a part; asks for what lies `ahead` queries further.
template <typename loc_t, typename acc>
void fetch(const Problem& n, const Part& part, const loc_t* locations, const loc_t* weights,
           int64_t ahead, Block<acc>& block) {
  const int64_t each = n.levels * n.points;
  with_width<kLanes<acc>>(each, [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (int64_t q = 0; q < part.count; ++q) {
      const loc_t* location = locations + 2 * part.row(n, q) * each;
      const loc_t* weight = weights + part.row(n, q) * each;
      prefetch(location + 2 * ahead * n.heads * each, 2 * part.heads * each);
      prefetch(weight + ahead * n.heads * each, part.heads * each);
      for (int64_t h = 0; h < part.heads; ++h) {
        const int64_t to = (h * part.count + q) * each;
        for (int64_t i = 0; i < each; i += W) {
          const int64_t at = smaller(i, each - W);
          const Vec<acc, W> low = load<W>(location + 2 * at), high = load<W>(location + 2 * at + W);
          store<W>(&block.x[to + at], even<acc, W>(low, high));
          store<W>(&block.y[to + at], odd<acc, W>(low, high));
        }
        move_row<W>(weight, &block.attention[to], each);
        location += 2 * each;
        weight += each;
      }
    }
  });
}

// The gradients of a part's locations and weights, from where these were.
template <typename loc_t, typename acc>
void write_gradients(const Problem& n, const Part& part, const Block<acc>& block,
                     loc_t* grad_locations, loc_t* grad_weights) {
  const int64_t each = n.levels * n.points;
  with_width<kLanes<acc>>(each, [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (int64_t q = 0; q < part.count; ++q) {
      for (int64_t h = 0; h < part.heads; ++h) {
        const int64_t from = (h * part.count + q) * each, to = (part.row(n, q) + h) * each;
        for (int64_t i = 0; i < each && grad_locations != nullptr; i += W) {
          const int64_t at = smaller(i, each - W);
          const Vec<acc, W> x = load<W>(&block.x[from + at]), y = load<W>(&block.y[from + at]);
          store<W>(grad_locations + 2 * (to + at), interleaved<0, acc, W>(x, y));
          store<W>(grad_locations + 2 * (to + at) + W, interleaved<1, acc, W>(x, y));
        }
        if (grad_weights != nullptr) {
          move_row<W>(&block.attention[from], grad_weights + to, each);
        }
      }
    }
  });
}

template <typename value_t, typename acc>
void fetch_grad_out(const Problem& n, const Part& part, const value_t* grad_out,
                    Block<acc>& block) {
  with_width<kLanes<acc>>(n.channels, [&](auto width) {
    for (int64_t q = 0; q < part.count; ++q) {
      const value_t* from = grad_out + part.row(n, q) * n.channels;
      prefetch(from + kRowsAhead * n.heads * n.channels, part.heads * n.channels);
      for (int64_t h = 0; h < part.heads; ++h) {
        move_row<decltype(width)::value>(
            from + h * n.channels, &block.grad_out[(h * part.count + q) * n.channels], n.channels);
      }
    }
  });
}

// The points of a tile, placed.
template <typename acc>
struct Tile {
  Buffer<acc> x, y;             // in pixels
  Buffer<acc> attention;        // 0 for points outside
  Buffer<int32_t> pixel;        // of corner 0; the number of pixels for points outside
  Buffer<int32_t> right, down;  // from corner 0 to corners 1 and 2, in pixels
  Buffer<acc> weight[4];        // of the corners, times attention (except for fp64, see sample)
  Buffer<acc> dot;              // backward: s_0..s_3 of each point

  Tile(const Problem& n, bool backward) {
    const int64_t size = cpu::tile_queries(n) * n.levels * n.points + kLanes<acc>;
    for (auto* v : {&x, &y, &attention, &weight[0], &weight[1], &weight[2], &weight[3]}) {
      v->resize(size);
    }
    for (auto* v : {&pixel, &right, &down}) v->resize(size);
    if (backward) dot.resize(4 * size);
  }
};

// fp64 keeps the order of the definition (sample, then weigh): its output is that of the reference
// to the last bit. Everything else saves a multiplication per channel.
template <typename acc>
constexpr bool kWeighLast = sizeof(acc) == 8;

// Places `total` points, from index `first` of the block on.
template <bool kBackward, typename acc>
void place(const Problem& n, const Block<acc>& block, int64_t first, int64_t total,
           const LevelsOfPoints<acc>& levels, Tile<acc>& tile) {
  constexpr int N = kLanes<acc>;
  using T = Vec<acc, N>;
  using I = Vec<lane_int<acc>, N>;
  const T one = T{} + acc(1);
  const I none{}, zeros = none + static_cast<lane_int<acc>>(n.pixels);
  for (int64_t j = 0; j < total; j += N) {
    const I height = load_int<I>(&levels.height[j]), width = load_int<I>(&levels.width[j]);
    T x, y;
    const auto inside =
        to_pixels(load<N>(&block.x[first + j]), load<N>(&block.y[first + j]),
                  load<N>(&levels.real_height[j]), load<N>(&levels.real_width[j]), x, y);
    const Footprint<T, I> f = footprint(x, y, height, width);
    const I pixel = load_int<I>(&levels.start[j]) + f.row[0] * width + f.column[0];
    store_int(&tile.pixel[j], inside ? pixel : zeros);
    store_int(&tile.right[j], inside ? f.column[1] - f.column[0] : none);
    store_int(&tile.down[j], inside & (f.row[1] != f.row[0]) ? width : none);
    const T attention = inside ? load<N>(&block.attention[first + j]) : T{};
    const T a = kWeighLast<acc> ? one : attention;
    const T top = inside ? a * f.wy[0] : T{}, bottom = inside ? a * f.wy[1] : T{};
    if constexpr (kBackward) {
      store<N>(&tile.x[j], x);
      store<N>(&tile.y[j], y);
    }
    if constexpr (kBackward || kWeighLast<acc>) store<N>(&tile.attention[j], attention);
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

// A group of heads' planes of value as the samplers read them: where they lie, or copies. A copy
// ends with a pixel of zeros, to which the points outside belong: no branch is needed.
template <typename value_t, typename acc>
class Planes {
 public:
  Planes(const Problem& n, const value_t* value, const ValueStrides& stride)
      : n_(n), value_(value), stride_(stride) {}

  // Turns to a part's heads, of which `queries` will be sampled.
  void turn_to(const Part& part, int64_t queries) {
    lying_ = value_ + stride_.plane(part.b, part.head);
    // Copies pay when pixels are read more often than once, and lie apart.
    packed_ = queries * n_.levels * n_.points >= n_.pixels &&
              !(std::is_same_v<value_t, acc> && stride_.s == n_.channels);
    if (packed_) pack(part);
  }

  // Calls use(Constant<padded>, first pixel, elements from pixel to pixel) for head h of the part.
  template <typename Use>
  VITADAPTER_HD void with(int64_t h, const Use& use) const {
    if (packed_) {
      use(Constant<1>{}, &copy_[h * (n_.pixels + 1) * n_.channels], n_.channels);
    } else {
      use(Constant<0>{}, lying_ + h * stride_.m, stride_.s);
    }
  }

 private:
  void pack(const Part& part) {
    const int64_t plane = (n_.pixels + 1) * n_.channels;
    copy_.resize(part.heads * plane);
    with_width<kLanes<acc>>(n_.channels, [&](auto width) {
      for (int64_t s = 0; s < n_.pixels; ++s) {
        for (int64_t h = 0; h < part.heads; ++h) {
          const value_t* from = lying_ + s * stride_.s + h * stride_.m;
          prefetch(from + kRowsAhead * stride_.s, n_.channels);
          move_row<decltype(width)::value>(from, &copy_[h * plane + s * n_.channels], n_.channels);
        }
      }
    });
    for (int64_t h = 0; h < part.heads; ++h) {
      std::memset(&copy_[(h + 1) * plane - n_.channels], 0,
                  static_cast<size_t>(n_.channels) * sizeof(acc));
    }
  }

  const Problem& n_;
  const value_t* value_;
  ValueStrides stride_;
  const value_t* lying_ = nullptr;
  bool packed_ = false;
  Buffer<acc> copy_;
};

// Samples `queries` queries of one head; their rows of output lie `step` apart.
template <bool kPadded, int N, int NV, typename T, typename value_t, typename acc>
void sample(const Problem& n, int64_t queries, const T* plane, int64_t stride,
            const Tile<acc>& tile, value_t* out, int64_t step) {
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < queries; ++q) {
    // Written while sampling: in a pass of its own, the rows would wait for memory.
    value_t* row = out + q * step;
    for (int v = 0; v < NV; ++v) __builtin_prefetch(row + 8 * step + v * N, 1);
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
    for (int v = 0; v < NV; ++v) store<N>(row + v * N, sum[v]);
  }
}

// The part that is task (b, group of heads, block of queries).
Part part_of(const Problem& n, const cpu::Cut& cut, int64_t task) {
  const int64_t blocks = cut.blocks(n), groups = cut.groups(n), group = task / blocks;
  const int64_t first = task % blocks * cut.queries, head = group % groups * cut.heads;
  return Part{group / groups, first, smaller(cut.queries, n.queries - first), head,
              smaller(cut.heads, n.heads - head)};
}

// Calls handle(part) for tasks (b, group, block), with `planes` turned to their heads.
template <typename value_t, typename acc, typename Handle>
VITADAPTER_HD void for_each_part(const Problem& n, const cpu::Cut& cut, int64_t begin, int64_t end,
                                 Planes<value_t, acc>& planes, const Handle& handle) {
  const int64_t blocks = cut.blocks(n);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(n, cut, task);
    if (task == begin || task % blocks == 0) {
      planes.turn_to(part, smaller(end - task, blocks - task % blocks) * cut.queries);
    }
    handle(part);
  }
}

// Calls use(h, q, first, queries) for the tiles of a part: head h, queries from q on, whose first
// row in the block is `first`.
template <typename Use>
VITADAPTER_HD void for_each_tile(const Problem& n, const Part& part, const Use& use) {
  const int64_t queries = cpu::tile_queries(n);
  for (int64_t h = 0; h < part.heads; ++h) {
    for (int64_t q = 0; q < part.count; q += queries) {
      use(h, q, h * part.count + q, smaller(queries, part.count - q));
    }
  }
}

template <typename value_t, typename loc_t>
void forward(const ForwardParams<value_t, loc_t>& p, cpu::Cut cut, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t each = n.levels * n.points;
  const LevelsOfPoints<acc> levels(n, cpu::tile_queries(n));
  Block<acc> block(n, cut, false);
  Tile<acc> tile(n, false);
  Planes<value_t, acc> planes(n, p.value, p.stride);
  for_each_part(n, cut, begin, end, planes, [&](const Part& part) {
    fetch(n, part, p.locations, p.weights, part.count, block);
    for_each_tile(n, part, [&](int64_t h, int64_t q, int64_t first, int64_t queries) {
      place<false>(n, block, first * each, queries * each, levels, tile);
      value_t* out = p.out + (part.row(n, q) + h) * n.channels;
      for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
        planes.with(h, [&](auto padded, const auto* plane, int64_t stride) {
          sample<decltype(padded)::value != 0, decltype(lanes)::value, decltype(vectors)::value>(
              n, queries, plane + span.first, stride, tile, out + span.first, n.heads * n.channels);
        });
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
  acc* sum;  // [count, channels of the span]
};

template <Want want, bool kPadded, int N, int NV, typename T, typename acc>
void sample_backward(const Problem& n, int64_t queries, const Span& span, const acc* grad_out,
                     const T* plane, int64_t stride, Tile<acc>& tile, const Band<acc>& band) {
  constexpr bool kDots = want != Want::kValue, kValue = want != Want::kDots;
  const int64_t each = n.levels * n.points;
  for (int64_t q = 0; q < queries; ++q) {
    Vec<acc, N> g[NV];
    for (int v = 0; v < NV; ++v) g[v] = load<N>(grad_out + q * n.channels + span.first + v * N);
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
          const int64_t local = pixel[k] - band.first;
          if (!band.whole && (local < 0 || local >= band.count)) continue;
          acc* sum = band.sum + local * (N * NV);
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
template <typename acc>
void finish(const Problem& n, const LevelsOfPoints<acc>& levels, const Tile<acc>& tile,
            int64_t first, int64_t total, Block<acc>& block) {
  constexpr int N = kLanes<acc>;
  using T = Vec<acc, N>;
  using I = Vec<lane_int<acc>, N>;
  const auto finish_at = [&](int64_t j) {
    const auto inside = load_int<I>(&tile.pixel[j]) != static_cast<lane_int<acc>>(n.pixels);
    const I height = load_int<I>(&levels.height[j]), width = load_int<I>(&levels.width[j]);
    const Footprint<T, I> f = footprint(load<N>(&tile.x[j]), load<N>(&tile.y[j]), height, width);
    T s[4];
    transposed<acc, N>(&tile.dot[4 * j], s);
    PointGradient<T> g =
        point_gradient(f, s, load<N>(&tile.attention[j]), load<N>(&levels.real_height[j]),
                       load<N>(&levels.real_width[j]));
    g.loc_x = inside ? g.loc_x : T{};
    g.loc_y = inside ? g.loc_y : T{};
    g.weight = inside ? g.weight : T{};
    return g;
  };
  int64_t j = 0;
  for (; j + N <= total; j += N) {
    const PointGradient<T> g = finish_at(j);
    store<N>(&block.x[first + j], g.loc_x);
    store<N>(&block.y[first + j], g.loc_y);
    store<N>(&block.attention[first + j], g.weight);
  }
  if (j < total) {  // the next tile's points follow
    const PointGradient<T> g = finish_at(j);
    for (int lane = 0; j < total; ++lane, ++j) {
      block.x[first + j] = g.loc_x[lane];
      block.y[first + j] = g.loc_y[lane];
      block.attention[first + j] = g.weight[lane];
    }
  }
}

template <typename value_t, typename loc_t>
void backward_points(const BackwardParams<value_t, loc_t, value_t>& p, cpu::Cut cut, int64_t begin,
                     int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t each = n.levels * n.points;
  const LevelsOfPoints<acc> levels(n, cpu::tile_queries(n));
  Block<acc> block(n, cut, true);
  Tile<acc> tile(n, true);
  Planes<value_t, acc> planes(n, p.value, p.stride);
  for_each_part(n, cut, begin, end, planes, [&](const Part& part) {
    fetch(n, part, p.locations, p.weights, kRowsAhead, block);
    fetch_grad_out(n, part, p.grad_out, block);
    for_each_tile(n, part, [&](int64_t h, int64_t, int64_t first, int64_t queries) {
      place<true>(n, block, first * each, queries * each, levels, tile);
      for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
        planes.with(h, [&](auto padded, const auto* plane, int64_t stride) {
          sample_backward<Want::kDots, decltype(padded)::value != 0, decltype(lanes)::value,
                          decltype(vectors)::value>(n, queries, span,
                                                    &block.grad_out[first * n.channels],
                                                    plane + span.first, stride, tile, Band<acc>{});
        });
      });
      finish(n, levels, tile, first * each, queries * each, block);
    });
    write_gradients(n, part, block, p.grad_locations, p.grad_weights);
  });
}

template <typename value_t, typename loc_t>
void backward_value(const BackwardParams<value_t, loc_t, value_t>& p, cpu::Cut cut,
                    cpu::Shares shares, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t each = n.levels * n.points;
  const int64_t blocks = cut.blocks(n);
  const LevelsOfPoints<acc> levels(n, cpu::tile_queries(n));
  // Dot products span all channels, so that with several spans they take a pass of their own.
  int spans = 0;
  for_each_span<acc>(n.channels, [&](auto, auto, const Span&) { ++spans; });
  const bool dots = shares.count() == 1 && p.wants_points(), together = dots && spans == 1;
  Block<acc> block(n, cut, true);
  Tile<acc> tile(n, together);
  Planes<value_t, acc> planes(n, p.value, p.stride);
  Buffer<acc> sums;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / shares.count(), bands = shares.bands;
    const int64_t index = task % bands, slice = task % shares.count() / bands;
    Band<acc> band{n.pixels * index / bands, 0, bands == 1, nullptr};
    band.count = n.pixels * (index + 1) / bands - band.first;
    // Slices begin with whole vectors; the last one has the channels that fill none.
    const int64_t slice_units = n.channels / cpu::kSliceChannels;
    const int64_t from = slice_units * slice / shares.slices * cpu::kSliceChannels;
    const int64_t to = slice + 1 == shares.slices
                           ? n.channels
                           : slice_units * (slice + 1) / shares.slices * cpu::kSliceChannels;
    if (band.count == 0) continue;  // more bands than pixels
    const Part all = part_of(n, cut, group * blocks);
    if (together) planes.turn_to(all, n.queries);
    // Blocks inside spans: a span's sums are one block of memory, and are written out once.
    for_each_span<acc>(to - from, [&](auto lanes, auto vectors, const Span& in_slice) {
      constexpr int N = decltype(lanes)::value, NV = decltype(vectors)::value;
      const Span span{from + in_slice.first, in_slice.seen};
      const int64_t size = (band.count + 1) * N * NV;
      sums.resize(all.heads * size);
      std::memset(sums.data(), 0, static_cast<size_t>(all.heads * size) * sizeof(acc));
      for (int64_t i = 0; i < blocks; ++i) {
        const Part part = part_of(n, cut, group * blocks + i);
        fetch(n, part, p.locations, p.weights, kRowsAhead, block);
        fetch_grad_out(n, part, p.grad_out, block);
        for_each_tile(n, part, [&](int64_t h, int64_t, int64_t first, int64_t queries) {
          place<true>(n, block, first * each, queries * each, levels, tile);
          band.sum = &sums[h * size];
          const acc* grad_out = &block.grad_out[first * n.channels];
          if (together) {
            planes.with(h, [&](auto padded, const auto* plane, int64_t stride) {
              sample_backward<Want::kBoth, decltype(padded)::value != 0, N, NV>(
                  n, queries, span, grad_out, plane + span.first, stride, tile, band);
            });
            finish(n, levels, tile, first * each, queries * each, block);
          } else {
            sample_backward<Want::kValue, true, N, NV>(
                n, queries, span, grad_out, static_cast<const acc*>(nullptr), 0, tile, band);
          }
        });
        if (together) {
          write_gradients(n, part, block, p.grad_locations, p.grad_weights);
        }
      }
      value_t* grad =
          p.grad_value + ((all.b * n.pixels + band.first) * n.heads + all.head) * n.channels;
      const int64_t seen = span.seen, width = N * NV - seen;
      with_width<N>(width, [&](auto w) {
        for (int64_t s = 0; s < band.count; ++s) {
          for (int64_t h = 0; h < all.heads; ++h) {
            move_row<decltype(w)::value>(&sums[h * size + s * N * NV + seen],
                                         grad + (s * n.heads + h) * n.channels + span.first + seen,
                                         width);
          }
        }
      });
    });
    if (dots && !together) backward_points(p, cut, group * blocks, (group + 1) * blocks);
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
