// SPDX-License-Identifier: Apache-2.0
// Places the points of a tile, vectorised over points: where their four corners are and what each
// weighs, from their positions (bilinear.h); and which corners a mask hides.

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
  // mutant: points off the map behind the pixel of zeros
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
