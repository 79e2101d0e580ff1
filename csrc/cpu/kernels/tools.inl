// SPDX-License-Identifier: Apache-2.0
// What all stages use: how channels are divided into vectors, memory of a thread's own, the part of
// a problem that a task has, and how rows of numbers are moved.

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
