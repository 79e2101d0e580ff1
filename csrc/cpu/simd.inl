// SPDX-License-Identifier: Apache-2.0
// The little SIMD that the kernels need, on the compiler's own vector types: loads that widen,
// stores that round, and sums over lanes. Included by kernels.inl, once per instruction set.

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
  // mutant: vectors that must be aligned
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

// a * b + c: in fp32 rounded once where the processor can, in fp64 always twice, so that its
// results are those of the definition. The compiler is told to fuse nothing by itself.
template <typename T, int N>
VITADAPTER_HD Vec<T, N> multiply_add(const Vec<T, N>& a, const Vec<T, N>& b, const Vec<T, N>& c) {
#if defined(VITADAPTER_AVX512)
  if constexpr (std::is_same_v<T, float> && N == 16) {
    return reinterpret_cast<Vec<T, N>>(_mm512_fmadd_ps(
        reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
  }
#endif
#if defined(VITADAPTER_AVX2)
  if constexpr (std::is_same_v<T, float> && N == 8) {
    return reinterpret_cast<Vec<T, N>>(_mm256_fmadd_ps(
        reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
  }
#endif
#if defined(__aarch64__)
  if constexpr (std::is_same_v<T, float> && N == 4) {
    return reinterpret_cast<Vec<T, N>>(vfmaq_f32(reinterpret_cast<float32x4_t>(c),
                                                 reinterpret_cast<float32x4_t>(a),
                                                 reinterpret_cast<float32x4_t>(b)));
  }
#endif
  return a * b + c;
}

// The lower half of a plus its upper half.
template <typename T, int N>
VITADAPTER_HD Vec<T, N / 2> fold(const Vec<T, N>& a) {
  Vec<T, N / 2> half[2];
  std::memcpy(half, &a, sizeof(a));
  return half[0] + half[1];
}

// Vectors of integers, kept as 32 bits in memory.
template <typename I>
VITADAPTER_HD I load_int(const int32_t* p) {
  constexpr int N = sizeof(I) / sizeof(I{}[0]);
  return __builtin_convertvector((load_bits<int32_t, N>(p)), I);
}
template <typename I>
VITADAPTER_HD void store_int(int32_t* p, const I& v) {
  constexpr int N = sizeof(I) / sizeof(I{}[0]);
  const auto narrow = __builtin_convertvector(v, Vec<int32_t, N>);
  std::memcpy(p, &narrow, sizeof(narrow));
}

// The even, or the odd, lanes of a and then of b.
template <int first, typename T, int N, int... lane>
VITADAPTER_HD Vec<T, N> every_second(const Vec<T, N>& a, const Vec<T, N>& b,
                                     std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (2 * lane + first)...);
#else
  using Index = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, N>;
  return __builtin_shuffle(a, b, Index{(2 * lane + first)...});
#endif
}
template <typename T, int N = 4>
VITADAPTER_HD Vec<T, N> even(const Vec<T, N>& a, const Vec<T, N>& b) {
  return every_second<0, T, N>(a, b, std::make_integer_sequence<int, N>());
}
template <typename T, int N = 4>
VITADAPTER_HD Vec<T, N> odd(const Vec<T, N>& a, const Vec<T, N>& b) {
  return every_second<1, T, N>(a, b, std::make_integer_sequence<int, N>());
}

// The first (0) or second (1) half of a_0, b_0, a_1, b_1, ...
template <int half, typename T, int N, int... lane>
VITADAPTER_HD Vec<T, N> alternate(const Vec<T, N>& a, const Vec<T, N>& b,
                                  std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, ((lane + half * N) / 2 + (lane + half * N) % 2 * N)...);
#else
  using Index = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, N>;
  return __builtin_shuffle(a, b, Index{((lane + half * N) / 2 + (lane + half * N) % 2 * N)...});
#endif
}
template <int half, typename T, int N>
VITADAPTER_HD Vec<T, N> interleaved(const Vec<T, N>& a, const Vec<T, N>& b) {
  return alternate<half, T, N>(a, b, std::make_integer_sequence<int, N>());
}

// N groups of four numbers, as four vectors of N.
template <typename T, int N>
VITADAPTER_HD void transposed(const T* from, Vec<T, N> to[4]) {
  const Vec<T, N> a = load<N>(from), b = load<N>(from + N);
  const Vec<T, N> c = load<N>(from + 2 * N), d = load<N>(from + 3 * N);
  const Vec<T, N> ab02 = even<T, N>(a, b), cd02 = even<T, N>(c, d);
  const Vec<T, N> ab13 = odd<T, N>(a, b), cd13 = odd<T, N>(c, d);
  to[0] = even<T, N>(ab02, cd02);
  to[1] = even<T, N>(ab13, cd13);
  to[2] = odd<T, N>(ab02, cd02);
  to[3] = odd<T, N>(ab13, cd13);
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

// The largest, or the sum, of all lanes; a NaN in any lane gives a NaN sum.
template <typename T, int N>
VITADAPTER_HD T largest(const Vec<T, N>& a) {
  if constexpr (N == 1) {
    return a[0];
  } else {
    Vec<T, N / 2> half[2];
    std::memcpy(half, &a, sizeof(a));
    return largest<T, N / 2>(half[0] > half[1] ? half[0] : half[1]);
  }
}
template <typename T, int N>
VITADAPTER_HD T sum_of(const Vec<T, N>& a) {
  if constexpr (N == 1) {
    return a[0];
  } else {
    return sum_of<T, N / 2>(fold<T, N>(a));
  }
}

// exp(x) for x <= 0, as softmax needs it; 0 below the smallest normal result, NaN for NaN.
// x = k ln 2 + r with |r| <= ln(2) / 2; the Taylor series of exp(r) ends where the next term is
// below a quarter of the last bit.
template <typename T, int N>
VITADAPTER_HD Vec<T, N> exp_negative(const Vec<T, N>& x) {
  constexpr bool wide = sizeof(T) == 8;
  using Int = std::conditional_t<wide, int64_t, int32_t>;
  constexpr int mantissa = wide ? 52 : 23, bias = wide ? 1023 : 127, terms = wide ? 14 : 8;
  constexpr T lowest = wide ? T(-708.0) : T(-87.0);
  constexpr T log2e = T(1.4426950408889634), ln2_high = wide ? T(0x1.62e42feep-1) : T(0x1.62e4p-1);
  constexpr T ln2_low = wide ? T(0x1.a39ef35793c76p-33) : T(0x1.7f7d1cp-20);
  const auto finite = x >= lowest;
  const Vec<T, N> bounded = finite ? x : Vec<T, N>{};
  // Adding 1.5 * 2^mantissa leaves the nearest integer in the low bits.
  constexpr T shifter = wide ? T(0x1.8p52) : T(0x1.8p23);
  const Vec<T, N> shifted =
      multiply_add<T, N>(bounded, broadcast<T, N>(log2e), broadcast<T, N>(shifter));
  const Vec<T, N> k = shifted - shifter;
  Vec<T, N> r = multiply_add<T, N>(k, broadcast<T, N>(-ln2_high), bounded);
  r = multiply_add<T, N>(k, broadcast<T, N>(-ln2_low), r);
  constexpr T inverse_factorials[14] = {T(1),
                                        T(1),
                                        T(1) / 2,
                                        T(1) / 6,
                                        T(1) / 24,
                                        T(1) / 120,
                                        T(1) / 720,
                                        T(1) / 5040,
                                        T(1) / 40320,
                                        T(1) / 362880,
                                        T(1) / 3628800,
                                        T(1) / 39916800,
                                        T(1) / 479001600,
                                        T(1) / T(6227020800)};
  Vec<T, N> series = broadcast<T, N>(inverse_factorials[terms - 1]);
#pragma GCC unroll 14
  for (int i = terms - 2; i >= 0; --i) {
    series = multiply_add<T, N>(series, r, broadcast<T, N>(inverse_factorials[i]));
  }
  Vec<Int, N> power = __builtin_convertvector(k, Vec<Int, N>) + bias;
  power = power << mantissa;
  const Vec<T, N> result = series * reinterpret_cast<Vec<T, N>>(power);
  return finite ? result : (x < lowest ? Vec<T, N>{} : x);
}
