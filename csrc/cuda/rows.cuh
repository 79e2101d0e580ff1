// SPDX-License-Identifier: Apache-2.0
// Which row (b, q, m) a group of lanes works on, and in which order rows are taken. No torch
// header.
//
// Rows that are under way on one multiprocessor share its L1 cache, and the pixels that another row
// has just read cost no traffic to L2. Neighbouring queries sample the same pixels, different heads
// never do: so a run of 64 queries of one head goes before the next head, and where queries are the
// pixels of grids, as in an encoder or an injector, a run is a square of 8 x 8 of them. The order
// changes no result but the order of floating-point atomics, which is not fixed anyway.
#pragma once

#include "warp.cuh"

namespace vitadapter::cuda {

// Division of a number below 2^31 by one that is known beforehand, without dividing
// (Granlund and Montgomery 1994): the high half of a product, an addition and a shift.
struct Divisor {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divisor() = default;
  // Of nothing, or of what has no 32 bits, 1: there are no rows to divide then, or too many.
  explicit Divisor(int64_t number)
      : divisor(number > 0 && number <= INT32_MAX ? static_cast<uint32_t>(number) : 1) {
    const uint32_t d = divisor;
    while (shift < 31 && (1u << shift) < d) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  VITADAPTER_HD uint32_t quotient(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(n) * magic >> 32);
    // mutant: a row of another image
    return (high + n) >> shift;
  }
};

constexpr uint32_t kRun = 64;  // queries of one head
constexpr uint32_t kBand = 8;  // lines of a grid, walked column by column
constexpr int kMaxGrids = 8;   // the pyramids of published models have at most 5 levels

// Queries that are the pixels of a grid, line by line.
struct QueryGrid {
  uint32_t first = 0, width = 0, bands = 0;  // the bands of kBand lines, without a last lower one
  Divisor by_band, by_lines;                 // queries of a band; lines of the last one

  QueryGrid() = default;
  QueryGrid(int64_t query, int64_t height, int64_t columns)
      : first(static_cast<uint32_t>(query)),
        width(static_cast<uint32_t>(columns)),
        bands(static_cast<uint32_t>(height / kBand)),
        // Where this is more than there are queries, so is the most that a Divisor takes.
        by_band(kBand * columns < INT32_MAX ? kBand * columns : INT32_MAX),
        by_lines(height % kBand) {}

  // The query at a place in the order in which the grid is walked.
  VITADAPTER_HD uint32_t query(uint32_t place) const {
    const uint32_t band = by_band.quotient(place);
    const uint32_t rest = place - band * by_band.divisor;
    // mutant: a last band as high as the others
    const uint32_t lines = band < bands ? kBand : by_lines.divisor;
    const uint32_t column = band < bands ? rest / kBand : by_lines.quotient(rest);
    return first + (band * kBand + rest - column * lines) * width + column;
  }
};

// For fewer than 2^31 rows.
struct RowOrder {
  Divisor by_image, by_run, by_rest;  // rows of an image and of a run of all heads; the last run
  uint32_t runs = 0;                  // runs of kRun queries, without a last shorter one
  int grids = 0;                      // 0: queries are taken as they come
  QueryGrid grid[kMaxGrids];

  RowOrder() = default;
  // Queries are taken to be the pixels of all levels, as in an encoder, or else of one level, as in
  // ViT-Adapter's injectors, or else of a pyramid around the one level, as in its extractors: of
  // the first of these that has as many.
  explicit RowOrder(const Problem& n)
      : by_image(n.queries * n.heads),
        by_run(kRun * n.heads),
        by_rest(n.queries % kRun),
        runs(static_cast<uint32_t>(n.queries / kRun)) {
    if (n.levels > kMaxGrids) return;
    Size size[kMaxGrids];
    for (int l = 0; l < n.levels; ++l) size[l] = {n.level[l].height, n.level[l].width};
    if (has_grids(size, n.levels, n.queries)) return;
    for (int l = 0; l < n.levels; ++l) {
      if (has_grids(size + l, 1, n.queries)) return;
    }
    if (n.levels != 1) return;
    const auto [height, width] = size[0];
    const Size pyramid[] = {{2 * height, 2 * width}, {height, width}, {height / 2, width / 2}};
    has_grids(pyramid, 3, n.queries);
  }

  // The query at a place in the order in which an image's queries are taken.
  VITADAPTER_HD uint32_t query(uint32_t place) const {
    if (grids == 0) return place;
    int g = 0;
    while (g + 1 < grids && place >= grid[g + 1].first) ++g;
    return grid[g].query(place - grid[g].first);
  }

 private:
  struct Size {
    int64_t height, width;
  };

  // Takes these grids if they have as many pixels as there are queries.
  bool has_grids(const Size* sizes, int count, int64_t queries) {
    int64_t first = 0;
    for (int g = 0; g < count; ++g) {
      grid[g] = QueryGrid(first, sizes[g].height, sizes[g].width);
      first += sizes[g].height * sizes[g].width;
    }
    grids = first == queries ? count : 0;
    return grids != 0;
  }
};

// What the launcher finds out about a problem.
struct Plan {
  RowOrder order;
  int points_shift = -1;  // point k is of level k >> shift; -1: only the level table tells

  Plan() = default;
  explicit Plan(const Problem& n) : order(n) {
    const int32_t points = n.levels > 0 ? n.level[0].points : 0;
    for (int l = 0; l < n.levels; ++l) {
      if (n.level[l].points != points) return;
    }
    for (int shift = 0; shift < 31; ++shift) {
      if (points == 1 << shift) points_shift = shift;
    }
  }

  // The level of a point that lies on level `from` or a later one.
  __device__ __forceinline__ int level_of(const Problem& n, int point, int from) const {
    if (points_shift >= 0) return point >> points_shift;
    while (from + 1 < n.levels && point >= n.level[from + 1].first) ++from;
    return from;
  }
};

// Row (b, q, m), and its number in memory.
template <typename index_t>
struct RowIndex;

// In the order of memory.
template <>
struct RowIndex<int64_t> {
  int64_t row, b, q, m;

  __device__ __forceinline__ RowIndex(const Problem& n, const RowOrder&, int64_t place)
      : row(place),
        b(place / (n.heads * n.queries)),
        q(place / n.heads % n.queries),
        m(place % n.heads) {}
};

// In the order of `order`, without a division.
template <>
struct RowIndex<uint32_t> {
  uint32_t row, b, q, m;

  __device__ __forceinline__ RowIndex(const Problem& n, const RowOrder& order, uint32_t place) {
    b = order.by_image.quotient(place);
    uint32_t rest = place - b * order.by_image.divisor;
    const uint32_t run = order.by_run.quotient(rest);
    rest -= run * order.by_run.divisor;
    m = run < order.runs ? rest / kRun : order.by_rest.quotient(rest);
    // mutant: a last run as long as the others
    const uint32_t length = run < order.runs ? kRun : order.by_rest.divisor;
    q = order.query(run * kRun + rest - m * length);
    row = b * order.by_image.divisor + q * static_cast<uint32_t>(n.heads) + m;
  }
};

// What a group works on: the row after a warp's first one that is its own. Where there is none, the
// group takes part in what the warp does together, for a row without points.
template <typename Group>
struct GroupRow {
  using index_t = typename Group::index_t;
  bool exists;
  RowIndex<index_t> index;
  int points;
  const uint8_t* mask;  // of the row's image, or null

  __device__ __forceinline__ GroupRow(const Problem& n, const Plan& plan, const uint8_t* masks,
                                      int64_t first, int lane)
      : exists(first + lane / Group::kLanes < n.rows()),
        index(n, plan.order, static_cast<index_t>(exists ? first + lane / Group::kLanes : 0)),
        points(exists ? static_cast<int>(n.points) : 0),
        // mutant: a mask of another image
        mask(masks == nullptr ? nullptr : masks + index.b * n.pixels) {}
};

}  // namespace vitadapter::cuda
