// SPDX-License-Identifier: Apache-2.0
// The CPU kernels. Included once per instruction set by kernels_<isa>.cpp, which chooses the
// compiler's target and VITADAPTER_VECTOR_BYTES. Everything here has internal linkage, so that no
// instruction set's code can replace another's.
//
// forward:  out[b,q,m,:] = sum_k w[b,q,m,k] * bilinear(value_l[b,:,m,:], at point k of level l)
// backward: with s_k = <grad_out[b,q,m,:], value at corner k>, four dot products per point give the
//           gradients of location and weight (bilinear.h); value receives w * bilinear weight *
//           grad_out at each corner.
//
// What is slow is memory, so that everything is arranged for the caches. A task takes some heads of
// one image and some of its queries:
//   pack     copies the heads' planes of value: a head's pixels then lie side by side, instead of
//            M * D apart, where they would share a few cache sets;
//   fetch    reads locations and weights, or computes them from offsets and logits (and reads
//            grad_out), and asks for the rows to come;
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
    // On cache lines, since a vector that crosses them costs twice; planes on huge pages.
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    const size_t unit = bytes >= cpu::kHugePage ? cpu::kHugePage : 64;
    data_ = static_cast<T*>(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit));
    if (data_ == nullptr) {
      size_ = 0;
      throw cpu::NoMemory{static_cast<int64_t>(bytes)};
    }
    if (unit == cpu::kHugePage) cpu::advise_huge_pages(data_, bytes + unit - 1);
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
    const int64_t each = n.points, size = queries * each + kLanes<acc>;
    for (auto* v : {&height, &width, &start}) v->resize(size);
    for (auto* v : {&real_height, &real_width}) v->resize(size);
    int64_t j = 0;
    while (j < size && each > 0) {
      for (int l = 0; l < n.levels; ++l) {
        for (int32_t i = 0; i < n.level[l].points && j < size; ++i, ++j) {
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

// One query's reference, unrolled over its points: position = base + offset * step (bilinear.h),
// step only for boxes. With room for one more vector.
template <typename acc>
struct References {
  Buffer<acc> base_x, base_y, step_x, step_y;

  explicit References(const Problem& n) {
    for (auto* v : {&base_x, &base_y, &step_x, &step_y}) v->resize(n.points + kLanes<acc>);
  }

  template <typename point_t>
  void turn_to(const Problem& n, const Offsets<point_t>& points, int64_t b, int64_t q) {
    constexpr int N = kLanes<acc>;
    // Whole vectors: what exceeds a level is the next one's to overwrite, or beyond the last point.
    const auto fill = [](acc* to, const acc& number, int32_t count) {
      for (int32_t i = 0; i < count; i += N) store<N>(to + i, broadcast<acc, N>(number));
    };
    for (int l = 0; l < n.levels; ++l) {
      const Level& level = n.level[l];
      const acc* box = points.box(b, q) + l * points.reference_l;
      const acc height = static_cast<acc>(level.height), width = static_cast<acc>(level.width);
      if (points.width == 2) {
        fill(&base_x[level.first], beside_point(box[0], width).base, level.points);
        fill(&base_y[level.first], beside_point(box[1], height).base, level.points);
        continue;
      }
      const acc shared = points.scale_of(level, level.first);
      const Axis<acc> x = beside_box(box[0], box[2], shared, width);
      const Axis<acc> y = beside_box(box[1], box[3], shared, height);
      fill(&base_x[level.first], x.base, level.points);
      fill(&base_y[level.first], y.base, level.points);
      fill(&step_x[level.first], x.step, level.points);
      fill(&step_y[level.first], y.step, level.points);
      for (int32_t i = 0; points.scale != nullptr && i < level.points; ++i) {
        const acc scale = points.scale[level.first + i];
        step_x[level.first + i] = beside_box(box[0], box[2], scale, width).step;
        step_y[level.first + i] = beside_box(box[1], box[3], scale, height).step;
      }
    }
  }
};

// What a task reads and, backward, writes, head by head.
template <typename acc>
struct Block {
  // [heads, queries * K]: positions (as fractions for Located, in pixels for Offsets) and weights;
  // backward, the gradients by them take their place.
  Buffer<acc> x, y, attention;
  Buffer<acc> softmax;        // Offsets, backward: the weights, kept for the gradient of the logits
  Buffer<acc> grad_out;       // [heads, queries, D]
  References<acc> reference;  // Offsets

  Block(const Problem& n, const cpu::Cut& cut, bool backward) : reference(n) {
    const int64_t rows = cut.heads * cut.queries;
    for (auto* v : {&x, &y, &attention}) v->resize(rows * n.points + kLanes<acc>);
    if (backward) grad_out.resize(rows * n.channels);
  }
};

// Locations and weights of a part; asks for what lies `ahead` queries further.
template <typename point_t, typename acc>
void fetch(const Problem& n, const Part& part, const Located<point_t>& points, int64_t ahead,
           bool /*backward*/, Block<acc>& block) {
  const int64_t each = n.points;
  with_width<kLanes<acc>>(each, [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (int64_t q = 0; q < part.count; ++q) {
      const point_t* location = points.locations + 2 * part.row(n, q) * each;
      const point_t* weight = points.weights + part.row(n, q) * each;
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
template <typename point_t, typename acc>
void write_gradients(const Problem& n, const Part& part, const Located<point_t>&,
                     const LocatedGradients<point_t>& grads, const LevelsOfPoints<acc>& levels,
                     Block<acc>& block) {
  const int64_t each = n.points;
  with_width<kLanes<acc>>(each, [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (int64_t q = 0; q < part.count; ++q) {
      for (int64_t h = 0; h < part.heads; ++h) {
        const int64_t from = (h * part.count + q) * each, to = (part.row(n, q) + h) * each;
        for (int64_t i = 0; i < each && grads.locations != nullptr; i += W) {
          const int64_t at = smaller(i, each - W);
          const Vec<acc, W> x = load<W>(&block.x[from + at]) * load<W>(&levels.real_width[at]);
          const Vec<acc, W> y = load<W>(&block.y[from + at]) * load<W>(&levels.real_height[at]);
          store<W>(grads.locations + 2 * (to + at), interleaved<0, acc, W>(x, y));
          store<W>(grads.locations + 2 * (to + at) + W, interleaved<1, acc, W>(x, y));
        }
        if (grads.weights != nullptr) {
          move_row<W>(&block.attention[from], grads.weights + to, each);
        }
      }
    }
  });
}

// A row's last vector overlaps its predecessor: 1 in the lanes that only the last one has, so that
// a sum counts every number once.
template <typename acc, int W>
VITADAPTER_HD Vec<acc, W> unseen(int64_t each) {
  Vec<acc, W> once{};
  for (int lane = static_cast<int>((W - each % W) % W); lane < W; ++lane) once[lane] = 1;
  return once;
}

// The softmax of `rows` rows of `each` logits, in place. Exponentials take the rows as one array:
// with few points a row fills no vector.
template <typename acc>
void softmax(acc* logits, int64_t rows, int64_t each) {
  constexpr int N = kLanes<acc>;
  with_width<N>(each, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int64_t last = each - W;
    const Vec<acc, W> once = unseen<acc, W>(each);
    for (int64_t r = 0; r < rows; ++r) {
      acc* row = logits + r * each;
      Vec<acc, W> most = load<W>(row);
      for (int64_t i = W; i < each; i += W) {
        const Vec<acc, W> next = load<W>(row + smaller(i, last));
        most = next > most ? next : most;
      }
      const Vec<acc, W> tail = load<W>(row + last);
      const auto top = broadcast<acc, W>(largest<acc, W>(most));
      for (int64_t i = 0; i < last; i += W) store<W>(row + i, load<W>(row + i) - top);
      store<W>(row + last, tail - top);
    }
    for (int64_t i = 0; i < rows * each; i += N) {
      store<N>(logits + i, exp_negative<acc, N>(load<N>(logits + i)));
    }
    for (int64_t r = 0; r < rows; ++r) {
      acc* row = logits + r * each;
      const Vec<acc, W> tail = load<W>(row + last);
      Vec<acc, W> total = tail * once;
      for (int64_t i = 0; i < last; i += W) total += load<W>(row + i);
      const auto sum = broadcast<acc, W>(acc(1) / sum_of<acc, W>(total));
      for (int64_t i = 0; i < last; i += W) store<W>(row + i, load<W>(row + i) * sum);
      store<W>(row + last, tail * sum);
    }
  });
}

// Positions in pixels and weights of a part, from offsets and logits.
template <typename point_t, typename acc>
void fetch(const Problem& n, const Part& part, const Offsets<point_t>& points, int64_t ahead,
           bool backward, Block<acc>& block) {
  const int64_t each = n.points;
  if (each == 0) return;
  References<acc>& reference = block.reference;
  with_width<kLanes<acc>>(each, [&](auto width) {
    constexpr int W = decltype(width)::value;
    for (int64_t q = 0; q < part.count; ++q) {
      reference.turn_to(n, points, part.b, part.first + q);
      const point_t* offset = points.offsets + part.b * points.offset.b +
                              (part.first + q) * points.offset.q + 2 * part.head * each;
      const point_t* logit = points.logits + part.b * points.logit.b +
                             (part.first + q) * points.logit.q + part.head * each;
      prefetch(offset + ahead * points.offset.q, 2 * part.heads * each);
      prefetch(logit + ahead * points.logit.q, part.heads * each);
      for (int64_t h = 0; h < part.heads; ++h) {
        const int64_t to = (h * part.count + q) * each;
        for (int64_t i = 0; i < each; i += W) {
          const int64_t at = smaller(i, each - W);
          const Vec<acc, W> low = load<W>(offset + 2 * at), high = load<W>(offset + 2 * at + W);
          Vec<acc, W> x = even<acc, W>(low, high), y = odd<acc, W>(low, high);
          if (points.width == 4) {
            x = x * load<W>(&reference.step_x[at]);
            y = y * load<W>(&reference.step_y[at]);
          }
          store<W>(&block.x[to + at], x + load<W>(&reference.base_x[at]));
          store<W>(&block.y[to + at], y + load<W>(&reference.base_y[at]));
        }
        move_row<W>(logit, &block.attention[to], each);
        offset += 2 * each;
        logit += each;
      }
    }
  });
  const int64_t rows = part.heads * part.count;
  softmax(block.attention.data(), rows, each);
  if (backward) {
    block.softmax.resize(rows * each);
    std::memcpy(block.softmax.data(), block.attention.data(),
                static_cast<size_t>(rows * each) * sizeof(acc));
  }
}

// The gradients of a part's offsets, logits and references, from those of positions and weights.
template <typename point_t, typename acc>
void write_gradients(const Problem& n, const Part& part, const Offsets<point_t>& points,
                     const OffsetsGradients<point_t>& grads, const LevelsOfPoints<acc>& levels,
                     Block<acc>& block) {
  const int64_t each = n.points;
  if (each == 0) return;
  const bool boxes = points.width == 4;
  References<acc>& reference = block.reference;
  with_width<kLanes<acc>>(each, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const Vec<acc, W> once = unseen<acc, W>(each);
    for (int64_t q = 0; q < part.count; ++q) {
      if (boxes) reference.turn_to(n, points, part.b, part.first + q);
      for (int64_t h = 0; h < part.heads; ++h) {
        const int64_t from = (h * part.count + q) * each, row = part.row(n, q) + h;
        for (int64_t i = 0; i < each && grads.offsets != nullptr; i += W) {
          const int64_t at = smaller(i, each - W);
          Vec<acc, W> x = load<W>(&block.x[from + at]), y = load<W>(&block.y[from + at]);
          if (boxes) {
            x = chain<Vec<acc, W>>(x, load<W>(&reference.step_x[at]));
            y = chain<Vec<acc, W>>(y, load<W>(&reference.step_y[at]));
          }
          point_t* to = grads.offsets + 2 * (row * each + at);
          store<W>(to, interleaved<0, acc, W>(x, y));
          store<W>(to + W, interleaved<1, acc, W>(x, y));
        }
        if (grads.logits != nullptr) {
          acc* grad = &block.attention[from];
          const acc* weight = &block.softmax[from];
          if (grads.weights != nullptr) {
            for (int64_t k = 0; k < each; ++k) grad[k] += to_acc(grads.weights[row * each + k]);
          }
          const int64_t last = each - W;
          Vec<acc, W> total = load<W>(weight + last) * load<W>(grad + last) * once;
          for (int64_t i = 0; i < last; i += W) total += load<W>(weight + i) * load<W>(grad + i);
          const auto mean = broadcast<acc, W>(sum_of<acc, W>(total));
          for (int64_t i = 0; i < each; i += W) {
            const int64_t at = smaller(i, last);
            const Vec<acc, W> g = load<W>(weight + at) * (load<W>(grad + at) - mean);
            store<W>(grads.logits + row * each + at, g);
          }
        }
        if (grads.reference != nullptr) {
          acc* grad = grads.reference + row * points.reference_levels * points.width;
          for (int i = 0; i < points.reference_levels * points.width; ++i) grad[i] = 0;
          const point_t* offset = points.offsets + part.b * points.offset.b +
                                  (part.first + q) * points.offset.q + 2 * (part.head + h) * each;
          for (int l = 0; l < n.levels; ++l) {
            for (int64_t i = 0; i < n.level[l].points; ++i) {
              const int64_t k = n.level[l].first + i;
              const acc x = block.x[from + k] * levels.real_width[k];
              const acc y = block.y[from + k] * levels.real_height[k];
              grad[0] += x;
              grad[1] += y;
              if (!boxes) continue;
              const acc scale = points.scale_of(n.level[l], k);
              grad[2] += chain<acc>(x, scale * to_acc(offset[2 * k]));
              grad[3] += chain<acc>(y, scale * to_acc(offset[2 * k + 1]));
            }
            grad += points.reference_l;
          }
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
  Buffer<uint8_t> masked;       // bit k: corner k reads as zero; where a mask has to be asked

  Tile(const Problem& n, bool backward) {
    const int64_t size = cpu::tile_queries(n) * n.points + kLanes<acc>;
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
template <bool kBackward, typename Points, typename acc>
void place(const Problem& n, const Block<acc>& block, int64_t first, int64_t total,
           const LevelsOfPoints<acc>& levels, Tile<acc>& tile) {
  constexpr int N = kLanes<acc>;
  using T = Vec<acc, N>;
  using I = Vec<lane_int<acc>, N>;
  const T one = T{} + acc(1);
  const I none{}, zeros = none + static_cast<lane_int<acc>>(n.pixels);
  for (int64_t j = 0; j < total; j += N) {
    const I height = load_int<I>(&levels.height[j]), width = load_int<I>(&levels.width[j]);
    const T real_height = load<N>(&levels.real_height[j]);
    const T real_width = load<N>(&levels.real_width[j]);
    T x = load<N>(&block.x[first + j]), y = load<N>(&block.y[first + j]);
    if constexpr (std::is_same_v<Points, Located<typename Points::point_t>>) {
      x = located(x, real_width);
      y = located(y, real_height);
    }
    const auto inside = keep_on_map(x, y, real_height, real_width);
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

// Which corners of the tile's points `mask` [S] hides.
template <typename acc>
void mark_masked(const Problem& n, const uint8_t* mask, int64_t total, Tile<acc>& tile) {
  tile.masked.resize(total);
  for (int64_t j = 0; j < total; ++j) {
    int bits = 0;
    if (tile.pixel[j] != n.pixels) {
      const uint8_t* top = mask + tile.pixel[j];
      const uint8_t* bottom = top + tile.down[j];
      const int64_t right = tile.right[j];
      bits = (top[0] != 0) | (top[right] != 0) << 1 | (bottom[0] != 0) << 2 |
             (bottom[right] != 0) << 3;
    }
    tile.masked[j] = static_cast<uint8_t>(bits);
  }
}

// A sum of numbers that is 0 if all are finite, and NaN otherwise.
template <typename acc>
acc non_finite(const acc* numbers, int64_t count) {
  constexpr int N = kLanes<acc>;
  Vec<acc, N> all{};
  int64_t i = 0;
  for (; i + N <= count; i += N) all += load<N>(numbers + i) * acc(0);
  acc rest = 0;
  for (; i < count; ++i) rest += numbers[i] * acc(0);
  return sum_of<acc, N>(all) + rest;
}

// Turns points whose corners are all masked into points outside. For finite numbers the zeros that
// are read in the place of masked pixels do the same.
template <typename acc>
void drop_masked(const Problem& n, const uint8_t* mask, int64_t total, Tile<acc>& tile) {
  mark_masked(n, mask, total, tile);
  for (int64_t j = 0; j < total; ++j) {
    if (tile.masked[j] != 15) continue;
    tile.pixel[j] = static_cast<int32_t>(n.pixels);
    tile.right[j] = tile.down[j] = 0;
    tile.attention[j] = 0;
    for (auto& weight : tile.weight) weight[j] = 0;
  }
}

// One head's pixels, `stride` elements apart, from some channel on. kPadded: the pixel that points
// outside belong to exists, and masked pixels are zero; otherwise such points have to be skipped,
// and masked corners read `zeros`, which is null without a mask.
template <bool padded, typename T>
struct Plane {
  static constexpr bool kPadded = padded;
  const T* first;
  int64_t stride;
  const T* zeros;

  VITADAPTER_HD Plane from(int64_t channel) const { return {first + channel, stride, zeros}; }
};

// The four corners of point j.
template <bool padded, typename T, typename acc>
VITADAPTER_HD void corners(const Plane<padded, T>& plane, const Tile<acc>& tile, int64_t j,
                           const T* corner[4]) {
  corner[0] = plane.first + tile.pixel[j] * plane.stride;
  corner[1] = corner[0] + tile.right[j] * plane.stride;
  corner[2] = corner[0] + tile.down[j] * plane.stride;
  corner[3] = corner[2] + tile.right[j] * plane.stride;
  if constexpr (!padded) {
    if (plane.zeros == nullptr) return;
    for (int k = 0; k < 4; ++k) {
      if (tile.masked[j] >> k & 1) corner[k] = plane.zeros;
    }
  }
}

// A group of heads' planes of value as the samplers read them: where they lie, or copies. A copy
// ends with a pixel of zeros, to which the points outside belong: no branch is needed.
template <typename value_t, typename acc>
class Planes {
 public:
  // `p`: parameters of either direction.
  template <typename Params>
  explicit Planes(const Params& p)
      : n_(p.problem), value_(p.value), stride_(p.stride), masks_(p.mask) {}

  // Turns to a part's heads, of which `queries` will be sampled.
  void turn_to(const Part& part, int64_t queries) {
    lying_ = value_ + stride_.plane(part.b, part.head);
    // Copies pay when pixels are read more often than once, and lie apart.
    packed_ = queries * n_.points >= n_.pixels &&
              !(std::is_same_v<value_t, acc> && stride_.s == n_.channels);
    mask_ = masks_ == nullptr ? nullptr : masks_ + part.b * n_.pixels;
    if (packed_) {
      pack(part);
    } else if (mask_ != nullptr) {
      zeros_.resize(n_.channels);
      std::memset(zeros_.data(), 0, static_cast<size_t>(n_.channels) * sizeof(value_t));
    }
  }

  // The mask [S] that a tile has to ask; null where there is none, or where copies obey it.
  const uint8_t* mask_to_ask() const { return packed_ ? nullptr : mask_; }

  // Calls use(Plane) for head h of the part.
  template <typename Use>
  VITADAPTER_HD void with(int64_t h, const Use& use) const {
    if (packed_) {
      const int64_t plane = (n_.pixels + 1) * n_.channels;
      use(Plane<true, acc>{copy_.data() + h * plane, n_.channels, nullptr});
    } else {
      use(Plane<false, value_t>{lying_ + h * stride_.m, stride_.s,
                                mask_ == nullptr ? nullptr : zeros_.data()});
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
          acc* to = &copy_[h * plane + s * n_.channels];
          if (mask_ != nullptr && mask_[s]) {
            std::memset(to, 0, static_cast<size_t>(n_.channels) * sizeof(acc));
          } else {
            move_row<decltype(width)::value>(from, to, n_.channels);
          }
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
  const uint8_t* masks_;  // [B, S] or null
  const value_t* lying_ = nullptr;
  const uint8_t* mask_ = nullptr;
  bool packed_ = false;
  Buffer<acc> copy_;
  Buffer<value_t> zeros_;
};

// Samples `queries` queries of one head; their rows of output lie `step` apart.
template <int N, int NV, bool padded, typename T, typename value_t, typename acc>
void sample(const Problem& n, int64_t queries, const Plane<padded, T>& plane, const Tile<acc>& tile,
            value_t* out, int64_t step) {
  const int64_t each = n.points;
  for (int64_t q = 0; q < queries; ++q) {
    // Written while sampling: in a pass of its own, the rows would wait for memory.
    value_t* row = out + q * step;
    for (int v = 0; v < NV; ++v) __builtin_prefetch(row + 8 * step + v * N, 1);
    Vec<acc, N> sum[NV] = {};
    for (int64_t j = q * each; j < (q + 1) * each; ++j) {
      if (!padded && tile.pixel[j] == n.pixels) continue;
      const T* corner[4];
      corners(plane, tile, j, corner);
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

// Fetches, places and samples tile by tile: what both directions do with the points of a part.
// Calls use(h, q, first, queries) for tiles as for_each_tile, placed.
template <bool kBackward, typename Params, typename acc, typename Use>
VITADAPTER_HD void for_each_placed_tile(const Params& p, const Part& part, const uint8_t* mask,
                                        const LevelsOfPoints<acc>& levels, int64_t ahead,
                                        Block<acc>& block, Tile<acc>& tile, const Use& use) {
  const Problem& n = p.problem;
  fetch(n, part, p.points, ahead, kBackward, block);
  if constexpr (kBackward) fetch_grad_out(n, part, p.grad_out, block);
  for_each_tile(n, part, [&](int64_t h, int64_t q, int64_t first, int64_t queries) {
    place<kBackward, typename Params::Points>(n, block, first * n.points, queries * n.points,
                                              levels, tile);
    if (mask != nullptr) mark_masked(n, mask, queries * n.points, tile);
    if (p.mask != nullptr) {
      const acc* weights = &block.attention[first * n.points];
      acc bad = non_finite(weights, queries * n.points);
      if constexpr (kBackward) {
        bad += non_finite(&block.grad_out[first * n.channels], queries * n.channels);
      }
      if (bad != 0) drop_masked(n, p.mask + part.b * n.pixels, queries * n.points, tile);
    }
    use(h, q, first, queries);
  });
}

template <typename value_t, typename Points>
void forward(const ForwardParams<value_t, Points>& p, cpu::Cut cut, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const LevelsOfPoints<acc> levels(n, cpu::tile_queries(n));
  Block<acc> block(n, cut, false);
  Tile<acc> tile(n, false);
  Planes<value_t, acc> planes(p);
  for_each_part(n, cut, begin, end, planes, [&](const Part& part) {
    for_each_placed_tile<false>(
        p, part, planes.mask_to_ask(), levels, part.count, block, tile,
        [&](int64_t h, int64_t q, int64_t first, int64_t queries) {
          value_t* out = p.out + (part.row(n, q) + h) * n.channels;
          for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
            planes.with(h, [&](const auto& plane) {
              sample<decltype(lanes)::value, decltype(vectors)::value>(
                  n, queries, plane.from(span.first), tile, out + span.first, n.heads * n.channels);
            });
          });
          for (int64_t i = 0; i < queries && p.weights != nullptr && n.points > 0; ++i) {
            const acc* from = &block.attention[(first + i) * n.points];
            auto* to = p.weights + (part.row(n, q + i) + h) * n.points;
            with_width<kLanes<acc>>(n.points, [&](auto width) {
              move_row<decltype(width)::value>(from, to, n.points);
            });
          }
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

template <Want want, int N, int NV, bool padded, typename T, typename acc>
void sample_backward(const Problem& n, int64_t queries, const Span& span, const acc* grad_out,
                     const Plane<padded, T>& plane, Tile<acc>& tile, const Band<acc>& band) {
  constexpr bool kDots = want != Want::kValue, kValue = want != Want::kDots;
  const int64_t each = n.points;
  for (int64_t q = 0; q < queries; ++q) {
    Vec<acc, N> g[NV];
    for (int v = 0; v < NV; ++v) g[v] = load<N>(grad_out + q * n.channels + span.first + v * N);
    for (int lane = 0; lane < span.seen; ++lane) g[0][lane] = 0;
    for (int64_t j = q * each; j < (q + 1) * each; ++j) {
      if (!padded && tile.pixel[j] == n.pixels) continue;
      if constexpr (kDots) {
        const T* corner[4];
        corners(plane, tile, j, corner);
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
    PointGradient<T> g = point_gradient(f, s, load<N>(&tile.attention[j]));
    g.x = inside ? g.x : T{};
    g.y = inside ? g.y : T{};
    g.weight = inside ? g.weight : T{};
    return g;
  };
  int64_t j = 0;
  for (; j + N <= total; j += N) {
    const PointGradient<T> g = finish_at(j);
    store<N>(&block.x[first + j], g.x);
    store<N>(&block.y[first + j], g.y);
    store<N>(&block.attention[first + j], g.weight);
  }
  if (j < total) {  // the next tile's points follow
    const PointGradient<T> g = finish_at(j);
    for (int lane = 0; j < total; ++lane, ++j) {
      block.x[first + j] = g.x[lane];
      block.y[first + j] = g.y[lane];
      block.attention[first + j] = g.weight[lane];
    }
  }
}

template <typename value_t, typename Points>
void backward_points(const BackwardParams<value_t, Points, value_t>& p, cpu::Cut cut, int64_t begin,
                     int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const LevelsOfPoints<acc> levels(n, cpu::tile_queries(n));
  Block<acc> block(n, cut, true);
  Tile<acc> tile(n, true);
  Planes<value_t, acc> planes(p);
  for_each_part(n, cut, begin, end, planes, [&](const Part& part) {
    for_each_placed_tile<true>(
        p, part, planes.mask_to_ask(), levels, kRowsAhead, block, tile,
        [&](int64_t h, int64_t, int64_t first, int64_t queries) {
          for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
            planes.with(h, [&](const auto& plane) {
              sample_backward<Want::kDots, decltype(lanes)::value, decltype(vectors)::value>(
                  n, queries, span, &block.grad_out[first * n.channels], plane.from(span.first),
                  tile, Band<acc>{});
            });
          });
          finish(n, levels, tile, first * n.points, queries * n.points, block);
        });
    write_gradients(n, part, p.points, p.grads, levels, block);
  });
}

template <typename value_t, typename Points>
void backward_value(const BackwardParams<value_t, Points, value_t>& p, cpu::Cut cut,
                    cpu::Shares shares, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int64_t blocks = cut.blocks(n);
  const LevelsOfPoints<acc> levels(n, cpu::tile_queries(n));
  // Dot products span all channels, so that with several spans they take a pass of their own.
  int spans = 0;
  for_each_span<acc>(n.channels, [&](auto, auto, const Span&) { ++spans; });
  const bool dots = shares.count() == 1 && p.grads.any(), together = dots && spans == 1;
  Block<acc> block(n, cut, true);
  Tile<acc> tile(n, together);
  Planes<value_t, acc> planes(p);
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
        for_each_placed_tile<true>(
            p, part, together ? planes.mask_to_ask() : nullptr, levels, kRowsAhead, block, tile,
            [&](int64_t h, int64_t, int64_t first, int64_t queries) {
              band.sum = &sums[h * size];
              const acc* grad_out = &block.grad_out[first * n.channels];
              if (together) {
                planes.with(h, [&](const auto& plane) {
                  sample_backward<Want::kBoth, N, NV>(n, queries, span, grad_out,
                                                      plane.from(span.first), tile, band);
                });
                finish(n, levels, tile, first * n.points, queries * n.points, block);
              } else {
                sample_backward<Want::kValue, N, NV>(n, queries, span, grad_out, Plane<true, acc>{},
                                                     tile, band);
              }
            });
        if (together) write_gradients(n, part, p.points, p.grads, levels, block);
      }
      value_t* grad =
          p.grad_value + ((all.b * n.pixels + band.first) * n.heads + all.head) * n.channels;
      const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + all.b * n.pixels + band.first;
      const acc zeros[N * NV] = {};
      const int64_t seen = span.seen, width = N * NV - seen;
      with_width<N>(width, [&](auto w) {
        for (int64_t s = 0; s < band.count; ++s) {
          for (int64_t h = 0; h < all.heads; ++h) {
            const acc* sum = mask != nullptr && mask[s] ? zeros : &sums[h * size + s * N * NV];
            move_row<decltype(w)::value>(
                sum + seen, grad + (s * n.heads + h) * n.channels + span.first + seen, width);
          }
        }
      });
    });
    if (dots && !together) backward_points(p, cut, group * blocks, (group + 1) * blocks);
  }
}

template <typename value_t, typename Points>
constexpr cpu::Kernels<value_t, Points> kernels_for() {
  return {&forward<value_t, Points>, &backward_points<value_t, Points>,
          &backward_value<value_t, Points>};
}

template <typename value_t, typename point_t>
constexpr cpu::KernelsOf<value_t, point_t> kernels_of() {
  return {kernels_for<value_t, Located<point_t>>(), kernels_for<value_t, Offsets<point_t>>()};
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
