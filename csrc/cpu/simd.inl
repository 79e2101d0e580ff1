// SPDX-License-Identifier: Apache-2.0
// The little SIMD that the kernels need, on the compiler's own vector types: loads that widen,
// stores that round, and sums over lanes. Included by kernels.inl, once per instruction set.

// The iterations of the loop that follows are independent, whatever its pointers may seem to be.
#if defined(__clang__)
#define VITADAPTER_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define VITADAPTER_INDEPENDENT _Pragma("GCC ivdep")
#endif

// N consecutive T in registers; + - * and comparisons work lane by lane. N is a power of two.
template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vec = typename VectorOf<T, N>::type;

template <typename T, int N>
VITADAPTER_HD Vec<T, N> load_bits(const void* p) {
  Vec<T, N> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// A vector of the accumulation type from N values in storage.
template <int N>
VITADAPTER_HD Vec<float, N> load(const float* p) {
  return load_bits<float, N>(p);
}
template <int N>
VITADAPTER_HD Vec<double, N> load(const double* p) {
  return load_bits<double, N>(p);
}
// 16-bit integers widened to 32 bits. GCC would widen a full vector in two halves.
template <int N>
VITADAPTER_HD Vec<uint32_t, N> load_wide(const void* p) {
#if defined(VITADAPTER_AVX512)
  if constexpr (N == 16) {
    return reinterpret_cast<Vec<uint32_t, N>>(
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(load_bits<uint16_t, N>(p))));
  }
#endif
#if defined(VITADAPTER_AVX2)
  if constexpr (N == 8) {
    return reinterpret_cast<Vec<uint32_t, N>>(
        _mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(load_bits<uint16_t, N>(p))));
  }
#endif
  return __builtin_convertvector((load_bits<uint16_t, N>(p)), Vec<uint32_t, N>);
}
template <int N>
VITADAPTER_HD Vec<float, N> load(const bfloat16* p) {
  return reinterpret_cast<Vec<float, N>>(load_wide<N>(p) << 16);
}
template <int N>
VITADAPTER_HD Vec<float, N> load(const float16* p) {
#if defined(VITADAPTER_AVX512)
  if constexpr (N == 16) {
    return reinterpret_cast<Vec<float, N>>(
        _mm512_cvtph_ps(reinterpret_cast<__m256i>(load_bits<uint16_t, N>(p))));
  }
#endif
#if defined(VITADAPTER_AVX2)
  if constexpr (N == 8) {
    return reinterpret_cast<Vec<float, N>>(
        _mm256_cvtph_ps(reinterpret_cast<__m128i>(load_bits<uint16_t, N>(p))));
  }
#endif
  // As to_acc(float16), lane by lane.
  const Vec<uint32_t, N> wide = load_wide<N>(p);
  const Vec<uint32_t, N> magnitude = (wide & 0x7fffu) << 13;
  const Vec<float, N> scaled =
      reinterpret_cast<Vec<float, N>>(magnitude) * bits_float(0x77800000u);  // 2^112
  const Vec<uint32_t, N> special =
      reinterpret_cast<Vec<uint32_t, N>>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<Vec<float, N>>(reinterpret_cast<Vec<uint32_t, N>>(scaled) | special |
                                         ((wide & 0x8000u) << 16));
}

// N values to storage, rounded to nearest even.
template <int N>
VITADAPTER_HD void store(float* p, const Vec<float, N>& v) {
  std::memcpy(p, &v, sizeof(v));
}
template <int N>
VITADAPTER_HD void store(double* p, const Vec<double, N>& v) {
  std::memcpy(p, &v, sizeof(v));
}
template <int N>
VITADAPTER_HD void store(bfloat16* p, const Vec<float, N>& v) {
  const auto u = reinterpret_cast<Vec<uint32_t, N>>(v);
  const auto nan = reinterpret_cast<Vec<uint32_t, N>>((u & 0x7fffffffu) > 0x7f800000u);
  const Vec<uint32_t, N> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const auto bits = __builtin_convertvector(((nan & 0x7fc0u) | (~nan & rounded)), Vec<uint16_t, N>);
  std::memcpy(p, &bits, sizeof(bits));
}
template <int N>
VITADAPTER_HD void store(float16* p, const Vec<float, N>& v) {
#if defined(VITADAPTER_AVX512)
  if constexpr (N == 16) {
    const __m256i bits = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &bits, sizeof(bits));
    return;
  }
#endif
#if defined(VITADAPTER_AVX2)
  if constexpr (N == 8) {
    const __m128i bits = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &bits, sizeof(bits));
    return;
  }
#endif
  for (int lane = 0; lane < N; ++lane) from_acc(v[lane], p[lane]);
}

template <typename T, int N>
VITADAPTER_HD Vec<T, N> broadcast(T value) {
  return Vec<T, N>{} + value;
}

// The lower half of a plus its upper half.
template <typename T, int N>
VITADAPTER_HD Vec<T, N / 2> fold(const Vec<T, N>& a) {
  Vec<T, N / 2> half[2];
  std::memcpy(half, &a, sizeof(a));
  return half[0] + half[1];
}

// The lanes 0 and 2, or 1 and 3, of a and then of b.
template <typename T>
VITADAPTER_HD Vec<T, 4> even(const Vec<T, 4>& a, const Vec<T, 4>& b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#else
  using Index = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, 4>;
  return __builtin_shuffle(a, b, Index{0, 2, 4, 6});
#endif
}
template <typename T>
VITADAPTER_HD Vec<T, 4> odd(const Vec<T, 4>& a, const Vec<T, 4>& b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#else
  using Index = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, 4>;
  return __builtin_shuffle(a, b, Index{1, 3, 5, 7});
#endif
}

// {sum of a, sum of b, sum of c, sum of d}, always in the same order.
template <typename T, int N>
VITADAPTER_HD Vec<T, 4> sums(const Vec<T, N>& a, const Vec<T, N>& b, const Vec<T, N>& c,
                             const Vec<T, N>& d) {
  if constexpr (N > 4) {
    return sums<T, N / 2>(fold<T, N>(a), fold<T, N>(b), fold<T, N>(c), fold<T, N>(d));
  } else if constexpr (N == 4) {
    // A 4 x 4 transposition whose columns are added on the way.
    const Vec<T, 4> ab = even<T>(a, b) + odd<T>(a, b), cd = even<T>(c, d) + odd<T>(c, d);
    return even<T>(ab, cd) + odd<T>(ab, cd);
  } else if constexpr (N == 2) {
    return Vec<T, 4>{a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
  } else {
    return Vec<T, 4>{a[0], b[0], c[0], d[0]};
  }
}
