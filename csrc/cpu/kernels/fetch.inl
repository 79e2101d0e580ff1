// SPDX-License-Identifier: Apache-2.0
// Reads a part of the points: locations and weights as they lie in memory, or computed from offsets
// and logits, and backward the gradient of the output. All of it becomes accumulators in a Block,
// head by head, and what comes next is asked for meanwhile.

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
