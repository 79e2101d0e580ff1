// SPDX-License-Identifier: Apache-2.0
// Sums the pixels of a tile's points, vectorised over channels. Pixels are read where they lie, or
// from copies of a group of heads' planes (pack).

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
