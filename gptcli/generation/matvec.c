// y[R, N] = x[R, K] W[N, K]^T + b for few rows, at the speed at which memory gives W.
//
// W is float32, float16, bfloat16, or int8 with a bfloat16 scale for every 32 weights of a row. Int8 is
// packed by 16 rows, the last with zeros: (N / 16, K / 2, 16, 2), and its scales (N / 16, K / 32, 16).
// K is a multiple of 64, N at least 8. Each sum has one order whatever R is, so a row's result depends
// on nothing but that row. Threads are those of the OpenMP that the process already has.
//
// `attend_group` is the attention of one new token of a text, in an order of sums that depends on the
// text's length alone. D is a multiple of 16, at most 256.
#include "../vectors.h"

// Bytes by which prefetching is ahead of a tile, at least. It is one run through memory: the rows of a
// tile, read side by side, are no pattern that a processor finds.
#define AHEAD 4096
#if L == 4
VECTOR(float16s, _Float16);
typedef int8_t bytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(16)));
#endif
VECTOR(ints, int32_t);
enum { F32, F16, BF16, I8 };
static const int SIZE[] = {4, 2, 2, 1};

typedef struct {
  const float *x, *bias;
  const char *w;
  const uint16_t *scales;
  float *y;
  long N, K, next, threads;
  int kind, R;
} Job;

INLINE floats load(int kind, const void *w) {
  switch (kind) {
  case F32: return *(const floats *)w;
  case BF16: return (floats)(__builtin_convertvector(*(const halves *)w, words) << 16);
#if L == 16
  default: return (floats)_mm512_cvtph_ps(_mm256_loadu_si256(w));
#elif L == 8
  default: return (floats)_mm256_cvtph_ps(_mm_loadu_si128(w));
#else
  default: return __builtin_convertvector(*(const float16s *)w, floats);
#endif
  }
}

// R rows of x (the last one repeated where there are fewer) by B rows of W, from n on.
INLINE void tile(const Job *j, const int kind, const int R, const int B, long n) {
  const long K = j->K, row = K * SIZE[kind];
  const char *w = j->w + n * row;
  const float *x[8];
  floats sums[16];
  EACH(r, R) x[r] = j->x + (r < j->R ? r : j->R - 1) * K;
  EACH(r, R) EACH(b, B) sums[r * B + b] = (floats){0};
  for (long k = 0; k < K; k += 64) {
    const char *ahead = w + (B - 1) * row + k * SIZE[kind] * B + AHEAD;
    EACH(line, B * SIZE[kind]) __builtin_prefetch(ahead + line * 64, 0, 2);  // 8 rows of x may fill L1
    EACH(u, 64 / L) {
      const long i = k + u * L;
      floats v[4];
      EACH(b, B) v[b] = load(kind, w + b * row + i * SIZE[kind]);
      EACH(r, R) {
        floats one = *(const floats *)(x[r] + i);
        if (B > 1) HOLD(one);
        EACH(b, B) sums[r * B + b] += one * v[b];
      }
    }
  }
  floats found[16];  // a copy, for an index that varies would keep sums out of the registers
  EACH(r, R) EACH(b, B) found[r * B + b] = sums[r * B + b];
  totals(found, R * B);
  for (int r = 0; r < R && r < j->R; r++)
    for (int b = 0; b < B; b++)
      j->y[r * j->N + n + b] = ((float *)found)[r * B + b] + (j->bias ? j->bias[n + b] : 0);
}

// x is rounded to 16 bits where int8 multiplies it, with a scale for every 32 numbers of a row: sums of
// 32 products are integers then, exact and twice as fast.
//
// Each 32 take GROUP_WORDS: 16 pairs and the scale. Those of the same columns of R rows are side by side
// (K / 32, R, GROUP_WORDS).
enum { PACK = 16, GROUP_WORDS = 17 };

static void round_rows(const float *x, uint32_t *to, long K, long R) {
  for (long r = 0; r < R; r++) {
    for (long g = 0; g < K / 32; g++, x += 32) {
      ints most = {0};  // of the bits, among which those of NaN are the largest
      EACH(i, 32 / L) {
        const ints bits = *(const ints *)(x + i * L) & 0x7fffffff;
        most = (ints)pick((words)(bits > most), (floats)bits, (floats)most);
      }
      int32_t largest_bits = 0;
      EACH(i, L) largest_bits = most[i] > largest_bits ? most[i] : largest_bits;
      float largest;
      memcpy(&largest, &largest_bits, sizeof largest);
      uint32_t *group = to + (g * R + r) * GROUP_WORDS;
      const float scale = largest / 32767, by = largest > 0 ? 32767 / largest : 0;
      EACH(i, 32 / L) {
        const words whole = (words)(*(const floats *)(x + i * L) * by + 12582912.f);
        *(halves *)((uint16_t *)group + i * L) = __builtin_convertvector(whole, halves);
      }
      memcpy(group + 16, &scale, sizeof scale);
    }
  }
}

// 2 L int8 as pairs of int16.
INLINE words pairs(const void *w) {
#if L == 16
  return (words)_mm512_cvtepi8_epi16(_mm256_loadu_si256(w));
#elif L == 8
  return (words)_mm256_cvtepi8_epi16(_mm_loadu_si128(w));
#else
  return (words)__builtin_convertvector(*(const bytes *)w, shorts);
#endif
}

// Add the products of pairs to sums.
INLINE words add_pairs(words sums, words w, words x) {
#if L == 16 && defined(__AVX512VNNI__)
  return (words)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif L == 16
  return sums + (words)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif L == 8
  return sums + (words)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
  const ints low = (ints)(w << 16) >> 16, high = (ints)w >> 16;
  return sums + (words)(low * ((ints)(x << 16) >> 16) + high * ((ints)x >> 16));
#endif
}

// R rows of x (the last one repeated where there are fewer) by 16 rows of packed W, from n on.
INLINE void packed_tile(const Job *j, const int R, long n) {
  enum { PARTS = PACK / L };
  const char *w = j->w + n * j->K;
  const uint16_t *scales = j->scales + n * (j->K / 32);
  const uint32_t *x[8];
  floats sums[8 * PARTS];
  EACH(r, R) x[r] = (const uint32_t *)j->x + (r < j->R ? r : j->R - 1) * GROUP_WORDS;
  EACH(i, R * PARTS) sums[i] = (floats){0};
  for (long g = 0; g < j->K / 32; g++, w += 32 * PACK, scales += PACK) {
    EACH(line, 32 * PACK / 64) __builtin_prefetch(w + AHEAD + line * 64);
    EACH(part, PARTS) {
      words found[8];
      __asm__("" ::: "memory");  // or x would be read for both parts at once, into too few registers
      EACH(r, R) found[r] = (words){0};
      EACH(u, 16) {
        const words v = pairs(w + u * 2 * PACK + part * 2 * L);
        EACH(r, R) {
          found[r] = add_pairs(found[r], v, (words){0} + x[r][u]);
          HOLD(found[r]);
        }
      }
      const floats scale = load(BF16, scales + part * L);
      EACH(r, R) {
        float of_x;
        memcpy(&of_x, x[r] + 16, sizeof of_x);
        const floats whole = __builtin_convertvector((ints)found[r], floats);
        sums[r * PARTS + part] += whole * (scale * of_x);
      }
    }
    EACH(r, R) x[r] += j->R * GROUP_WORDS;
  }
  const long some = j->N - n < PACK ? j->N - n : PACK;
  for (int r = 0; r < R && r < j->R; r++) {
    float *y = j->y + r * j->N + n;
    memcpy(y, sums + r * PARTS, some * sizeof(float));
    for (long i = 0; j->bias && i < some; i++) y[i] += j->bias[n + i];
  }
}

// The last tile overlaps the one before, so that all are whole (but for int8). Fewer rows of W at once
// are read faster, but have fewer sums to hide what 16 bits take to widen, and more so 8 without AVX512.
#define TILES(kind, R, B)                                                                         \
  for (; n < end; n += B) tile(j, kind, R, B, n + B <= j->N ? n : j->N - B)
#define BY_ROWS(kind)                                                                             \
  if (j->R == 1) TILES(kind, 1, (kind == F32 ? 1 : 2));                                           \
  else if (j->R <= 4) TILES(kind, 4, (L == 16 ? 4 : 2));                                          \
  else TILES(kind, 8, (L == 16 ? 2 : 1))

static void tiles(const Job *j, long n, long end) {
  switch (j->kind) {
  case F32: BY_ROWS(F32); break;
  case F16: BY_ROWS(F16); break;
  case BF16: BY_ROWS(BF16); break;
  default:
    if (j->R == 1) for (; n < end; n += PACK) packed_tile(j, 1, n);
    else if (j->R <= 4) for (; n < end; n += PACK) packed_tile(j, 4, n);
    else for (; n < end; n += PACK) packed_tile(j, 8, n);
  }
}

// Take the next rows of N, from `first` up to `end`; 0 if none are left. A thread takes a share of
// what is left: most rows are read one after another, and few are left to wait for at the end
// (guided self-scheduling, Polychronopoulos and Kuck 1987).
INLINE int take(long *next, long N, long threads, long *first, long *end) {
  long before = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
  for (*end = 0; *end < N && before >= 0; before--) {
    const long share = (N - *end) / threads / PACK * PACK;
    *first = *end;
    *end += share < PACK ? PACK : share;
  }
  if (*end > N) *end = N;
  return before < 0;
}

static void work(void *data) {
  Job *j = data;
  for (long first, end; take(&j->next, j->N, j->threads, &first, &end);) tiles(j, first, end);
}

void matvec(int kind, const float *x, const void *w, const void *scales, const float *bias,
            float *y, long N, long K, long R, int threads) {
  uint32_t rounded[kind == I8 ? 8 * K / 32 * GROUP_WORDS : 1];
  for (long r = 0; r < R; r += 8) {
    Job job = {x + r * K, bias, w, scales, y + r * N, N, K, 0, threads, kind, R - r < 8 ? R - r : 8};
    if (kind == I8) {
      round_rows(job.x, rounded, K, job.R);
      job.x = (float *)rounded;
    }
    GOMP_parallel(work, &job, threads, 0);
  }
}

// What one step attends to. Rows of q, k and v are `row` floats apart, their heads D; the cache has
// 2G heads of each row, the keys' before the values', and D numbers for each place, float32 or
// float16 as `kind` says.
typedef struct {
  const float *q, *k, *v;
  char *cache;
  float *y;
  const int64_t *lengths;  // of the texts; 0 where all have `length`
  long length, row, cache_row, cache_head, H, G, D;
  int offset, kind;
} Step;

enum { BLOCK = 64 };  // places whose scores are computed before their values are read

// One query against n keys and values: a softmax whose largest score is found on the way.
INLINE void attend_head(const int kind, const float *q, const char *keys, const char *values,
                        float *y, long n, const int D) {
  const float scale = 1.f / sqrtf(D);
  const long size = SIZE[kind], place = D * size;
  floats sums[256 / L], weights = {0};
  float top = -INFINITY;
  for (int i = 0; i < D / L; i++) sums[i] = (floats){0};
  for (long first = 0; first < n; first += BLOCK) {
    float scores[BLOCK];
    const long m = n - first < BLOCK ? n - first : BLOCK;
    float largest = top;
    for (long t = 0; t < m; t += L) {
      floats sums_of[L];
      for (int u = 0; u < L; u++) {
        const char *key = keys + (first + (t + u < m ? t + u : m - 1)) * place;
        sums_of[u] = (floats){0};
        for (int i = 0; i < D; i += L)
          sums_of[u] += *(const floats *)(q + i) * load(kind, key + i * size);
      }
      totals(sums_of, L);
      *(floats *)(scores + t) = sums_of[0] * scale;
    }
    for (long t = 0; t < m; t++) if (scores[t] > largest) largest = scores[t];
    for (long t = 0; t < m; t++) scores[t] = scores[t] - largest < -80 ? -80 : scores[t] - largest;
    for (long t = m; t < BLOCK; t++) scores[t] = -80;
    const float before = top == -INFINITY ? 0 : expf(top - largest);
    top = largest;
    weights *= before;
    for (int i = 0; i < D / L; i++) sums[i] *= before;
    for (long t = 0; t < BLOCK; t += L) {
      floats *some = (floats *)(scores + t);
      *some = power(*some);
    }
    for (long t = m; t < BLOCK; t++) scores[t] = 0;
    for (long t = 0; t < BLOCK; t += L) weights += *(const floats *)(scores + t);
    for (long t = 0; t < m; t++) {
      const char *value = values + (first + t) * place;
      for (int i = 0; i < D / L; i++)
        sums[i] += load(kind, value + i * L * size) * scores[t];
    }
  }
  const float all = total(weights);
  for (int i = 0; i < D / L; i++) *(floats *)(y + i * L) = sums[i] / all;
}

// Write D floats in the cache's kind.
static void narrow(int kind, const float *x, void *y, long D) {
  if (kind == F32) {
    memcpy(y, x, D * sizeof(float));
    return;
  }
  for (long i = 0; i < D; i += L) {
    const floats v = *(const floats *)(x + i);
    halves *to = (halves *)((uint16_t *)y + i);
#if L == 16
    *to = (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif L == 8
    *to = (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    *to = (halves)__builtin_convertvector(v, float16s);
#endif
  }
}

// Return where the keys of a head are; its values are G heads after them.
static char *keys_of(const Step *j, long b, long g) {
  return j->cache + (b * j->cache_row + g * j->cache_head) * SIZE[j->kind];
}

// Store the key and the value of a head.
static void store_group(const Step *j, long b, long g) {
  const long D = j->D, n = j->lengths ? j->lengths[b] : j->length, place = D * SIZE[j->kind];
  char *keys = keys_of(j, b, g), key[256 * sizeof(float)];
  narrow(j->kind, j->k + b * j->row + g * D, key, D);
  for (int i = 0; i < 4; i++)  // with offset keys the second and the last go one place on
    memcpy(keys + (n + (j->offset && i % 2)) * place + i * place / 4, key + i * place / 4, place / 4);
  char *values = keys + j->G * j->cache_head * SIZE[j->kind];
  narrow(j->kind, j->v + b * j->row + g * D, values + n * place, D);
}

#define BY_SIZE(kind)                                                                             \
  switch (D) {                                                                                    \
  case 32: attend_head(kind, q, keys, values, y, n + 1, 32); break;                               \
  case 64: attend_head(kind, q, keys, values, y, n + 1, 64); break;                               \
  case 128: attend_head(kind, q, keys, values, y, n + 1, 128); break;                             \
  default: attend_head(kind, q, keys, values, y, n + 1, D);                                       \
  }

// Attend with the queries of a head.
static void attend_group(const Step *j, long b, long g) {
  const long D = j->D, n = j->lengths ? j->lengths[b] : j->length, each = j->H / j->G;
  const char *keys = keys_of(j, b, g), *values = keys + j->G * j->cache_head * SIZE[j->kind];
  for (long h = g * each; h < (g + 1) * each; h++) {
    const float *q = j->q + b * j->row + h * D;
    float *y = j->y + (b * j->H + h) * D;
    if (j->kind == F32) BY_SIZE(F32)
    else BY_SIZE(F16)
  }
}
