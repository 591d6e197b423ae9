// Vectors of this machine's width, for all of our C: L floats and what is computed with them.
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__)
#define L 16  // floats of a vector
#elif defined(__AVX2__) && defined(__F16C__)
#define L 8
#else
#define L 4
#endif
#if L > 4
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#define VECTOR(name, type)                                                                        \
  typedef type name __attribute__((vector_size(L * sizeof(type)), aligned(1), may_alias))
VECTOR(floats, float);
typedef float quad __attribute__((vector_size(16)));
VECTOR(words, uint32_t);
VECTOR(halves, uint16_t);

void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

// Keeps x in a register, where the compiler would read it again for each use.
#if defined(__x86_64__)
#define HOLD(x) __asm__("" : "+v"(x))
#elif defined(__aarch64__)
#define HOLD(x) __asm__("" : "+w"(x))
#else
#define HOLD(x)
#endif

INLINE float total(floats sums) {
  quad q[L / 4];  // added half to half; lane by lane would take longer than a row's products
  memcpy(q, &sums, sizeof q);
  for (int half = L / 8; half; half /= 2)
    EACH(i, half) q[i] += q[i + half];
  return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// e^x for x from -80 to 0: a power of 2 times a polynomial of what is left.
INLINE floats power(floats x) {
  const floats magic = (floats){0} + 12582912.f;  // adding it rounds to an integer
  const floats n = x * 1.44269504f + magic, whole = n - magic;
  const floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  floats p = (floats){0} + 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return p * (floats)(((words)n + 127u) << 23);
}

static const uint32_t LANES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE floats shuffled(floats a, floats b, words from) {
#ifdef __clang__
  floats y;
  EACH(i, L) y[i] = from[i] < L ? a[from[i]] : b[from[i] - L];
  return y;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Add the halves of each part of 2 `half` lanes; two vectors become one.
INLINE void fold(floats *sums, int n, uint32_t half) {
  const words lanes = *(const words *)LANES, low = (lanes & -half) * 2 + (lanes & (half - 1));
  EACH(i, (n + 1) / 2) {
    const floats a = sums[2 * i], b = n > 1 ? sums[2 * i + 1] : a;
    sums[i] = shuffled(a, b, low) + shuffled(a, b, low + half);
  }
}

// The totals of n vectors, in place: n floats in their order. Each is added as by `total`, but all of
// them by a quarter of the instructions.
INLINE void totals(floats *sums, int n) {
  if (L > 8) fold(sums, n, 8);
  if (L > 4) fold(sums, (n * 8 + L - 1) / L, 4);
  fold(sums, (n * 4 + L - 1) / L, 2);
  fold(sums, (n * 2 + L - 1) / L, 1);
}

// Exchange the late lanes of a row for the early ones of another, in parts of `apart` lanes.
INLINE void exchange(floats *rows, uint32_t apart) {
  const words lanes = *(const words *)LANES, early = lanes + (lanes & apart) * (L / apart - 1);
  EACH(i, L / 2) {
    floats *one = rows + ((i & -apart) * 2 | (i & (apart - 1))), *other = one + apart;
    const floats a = *one, b = *other;
    *one = shuffled(a, b, early), *other = shuffled(a, b, early + apart);
  }
}

// L rows of L numbers become columns.
INLINE void transpose(floats *rows) {
  if (L > 8) exchange(rows, 8);
  if (L > 4) exchange(rows, 4);
  exchange(rows, 2);
  exchange(rows, 1);
}

// a where the mask is set, else b.
INLINE floats pick(words mask, floats a, floats b) {
  return (floats)((mask & (words)a) | (~mask & (words)b));
}

// The larger of two; b if one is not a number.
INLINE floats larger(floats a, floats b) {
#if L == 16
  return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif L == 8
  return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return pick((words)(a > b), a, b);
#endif
}

// e^x for x up to 0; from -80 down it is 0.
INLINE floats exponential(floats x) {
  const floats least = (floats){0} - 80.f;
  return (floats)(~(words)(x < least) & (words)power(larger(least, x)));
}

INLINE floats logistic(floats z) {
  const floats zero = {0};
  const words negative = (words)(z < zero);
  const floats e = exponential(pick(negative, z, -z));
  return pick(negative, e, zero + 1.f) / (e + 1.f);
}
