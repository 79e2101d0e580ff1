// SPDX-License-Identifier: Apache-2.0
// The backward kernels: sample_backward takes the dot products of a tile's points with their pixels
// and adds to the gradient of value, finish makes gradients of the points from the dot products,
// and write_gradients stores these.

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
