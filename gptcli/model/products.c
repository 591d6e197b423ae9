// Products of matrices on a CPU: y (M, N) of a (M, K) and b (K, N), each by rows or turned: of float32
// or, if HALF is defined, of what is rounded to bfloat16. Sums are of float32.
//
// MKL, on other makers' processors, reaches a half to nine tenths of what a core can do here. oneDNN
// takes 10 to 20 us to start, and wants weights in bfloat16, which are rounded here while they are
// copied. HALF is not built where there is AMX, which only oneDNN uses. As in BLIS (Van Zee and van de
// Geijn 2015), panels of both are copied, so that the innermost loop reads numbers one after another,
// while a tile of y stays in registers. Each number is a sum of sums of RUN words, in one order,
// however many rows and threads there are.
#include "../vectors.h"
#if !defined(HALF) || (defined(__AVX512BF16__) && !defined(__AMX_BF16__) && L == 16)
#include <stdlib.h>

// Numbers of a word, which follow each other along the sum; words of a sum that are added at once, and
// words of a that fit a core's cache, a strip.
#ifdef HALF
typedef uint32_t word;
enum { EACH_WORD = 2, RUN = 384, STRIP = 1 << 18 };
#else
typedef float word;
enum { EACH_WORD = 1, RUN = 256, STRIP = L == 16 ? 1 << 17 : 1 << 16 };
#endif
// A tile has as many rows as leave registers for what is read. How many strips meet one copy of b, and
// how many of its columns are copied for them, or for one strip alone. COLUMNS is also how many columns
// of a y of bfloat16 have sums in float32 at a time.
enum { TALL = L == 16 ? 12 : L == 8 ? 6 : 4, WIDE = 2 * L };
enum { STRIPS = L == 16 ? 1 : 8, COLUMNS = 1024, ALONE = 128 };
// Products so few that one thread takes them; words that are copied before further lanes are, so that
// whole rows are read; and bytes of a line of the caches.
enum { FEW = 1 << 20, STEPS = 8, LINE = 64 };
#define ROWS(i) _Pragma("GCC unroll 12") for (int i = 0; i < TALL; i++)

typedef struct {
  const char *from;
  long lane, step;  // how far apart rows of a, or columns of b, and products of a sum are; one is 1
  long size;        // bytes of a number
} Factor;

typedef struct {
  Factor a, b;
  const float *bias;  // (N), or null
  void *y;            // (M, N), summed or set
  long M, N, K, size;
  long share, strip, columns;  // rows that a thread takes, that are copied, and columns that are
  int adds, next;
} Job;

INLINE long parts(long n, long most) { return (n + most - 1) / most; }
INLINE long least(long n, long most) { return n < most ? n : most; }

#ifdef HALF
INLINE floats added(floats sum, const word *a, const word *b) {
  const __m512i x = _mm512_set1_epi32(*a), y = _mm512_loadu_si512(b);
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

INLINE __mmask16 first(long n) { return n < L ? (1 << (n > 0 ? n : 0)) - 1 : -1; }

// n numbers from one place, m from another, L at most: each with zeros after them.
INLINE __m512i rounded(const char *one, long n, const char *other, long m, const long size) {
  if (size == sizeof(float)) {
    const __m512 low = _mm512_maskz_loadu_ps(first(n), one);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first(m), other), low);
  }
  const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first(n), one));
  return _mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(first(m), other), 1);
}

// Words of lanes that lie side by side, from a step and, if it is not the last, the next.
INLINE void across(word *to, const char *at, long step, long left, long steps, const int wide,
                   const long size) {
  static const uint16_t PAIRS[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int i = 0; i < wide; i += L, at += L * size) {
    const __m512i both = rounded(at, left - i, at + step * size, steps > 1 ? left - i : 0, size);
    const __m512i words = _mm512_permutexvar_epi16(_mm512_loadu_si512(PAIRS), both);
    _mm512_mask_storeu_epi32(to + i, first(wide - i), words);
  }
}

// L words of a lane whose steps lie side by side: zeros after those that are there.
INLINE floats along(const char *at, long steps, const long size) {
  return (floats)rounded(at, steps, at + L * size, steps - L, size);
}

// n numbers, of 2 L at most.
INLINE void round_to(uint16_t *y, const floats *sums, long n) {
  EACH(part, 2) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)sums[part]);
    _mm256_mask_storeu_epi16(y + part * L, first(n - part * L), half);
  }
}
#else
INLINE floats added(floats sum, const word *a, const word *b) { return sum + *a * *(const floats *)b; }

INLINE floats along(const char *at, long steps, const long size) {
  if (steps >= L) return *(const floats *)at;
  floats some = {0};
  if (steps > 0) memcpy(&some, at, steps * size);
  return some;
}

INLINE void across(word *to, const char *at, long step, long left, long steps, const int wide,
                   const long size) {
  if (left >= wide) memcpy(to, at, wide * sizeof(word));  // moves of a known length, no call
  else
    for (int i = 0; i < wide; i++) to[i] = i < left ? ((const float *)at)[i] : 0;
}

INLINE void round_to(uint16_t *y, const floats *sums, long n) { __builtin_trap(); }
#endif

// A panel of `wide` lanes of n steps, whose lanes lie side by side; zeros for lanes that are not there.
INLINE void copy(word *to, Factor f, long n, long left, const int wide, const long size) {
  const long row = f.step * size;
  const int is_whole = left >= wide && n % EACH_WORD == 0;
  for (; n > 0; n -= EACH_WORD, f.from += EACH_WORD * row, to += wide) {
    EACH(odd, EACH_WORD)
      for (int i = 0; i < wide * size; i += LINE)
        __builtin_prefetch(f.from + (STEPS * EACH_WORD + odd) * row + i);
    if (is_whole) across(to, f.from, f.step, wide, EACH_WORD, wide, size);
    else across(to, f.from, f.step, left, n, wide, size);
  }
}

// L words at most of each lane of a panel, where the steps of a lane lie side by side.
INLINE void turn_block(word *to, Factor f, long n, long left, const int wide, const long size) {
  const long apart = f.lane * size;
  for (int first = 0; first < wide; first += L) {
    floats lanes[L];
    EACH(i, L) {
      const int is_there = first + i < wide && first + i < left;
      lanes[i] = is_there ? along(f.from + (first + i) * apart, n, size) : (floats){0};
    }
    transpose(lanes);
    // Where a panel is narrower than a vector, the next one overwrites what is too much.
    EACH(i, L) if (i * EACH_WORD < n) *(floats *)(to + i * wide + first) = lanes[i];
  }
}

INLINE void turn(word *to, Factor f, long n, long left, const int wide, const long size) {
  const long most = L * EACH_WORD;
  for (long k = 0; k < n; k += most, f.from += most * size, to += L * wide) {
    if (k * size % LINE == 0)  // the next panel
      for (int i = 0; i < wide; i++)
        for (long line = 0; line < most * size; line += LINE)
          __builtin_prefetch(f.from + (wide + i) * f.lane * size + line);
    if (n - k >= most) turn_block(to, f, most, left, wide, size);
    else turn_block(to, f, n - k, left, wide, size);
  }
}

// Panels of n steps of some lanes, of which some are there.
INLINE void pack_all(word *to, Factor f, long n, long lanes, long left, const int wide, const long size) {
  const long words = parts(n, EACH_WORD), most = f.lane == 1 ? STEPS : words;
  for (long k = 0; k < words; k += most)
    for (long lane = 0; lane < lanes; lane += wide) {
      const char *from = f.from + (lane * f.lane + k * EACH_WORD * f.step) * size;
      const Factor rest = {from, f.lane, f.step, size};
      const long steps = least(n - k * EACH_WORD, most * EACH_WORD);
      word *panel = to + lane * words + k * wide;
      if (f.lane == 1) copy(panel, rest, steps, left - lane, wide, size);
      else turn(panel, rest, steps, left - lane, wide, size);
    }
}

// The same from a lane and a step on.
INLINE void pack(word *to, Factor f, long lane, long step, long n, long lanes, long left, const int wide) {
  f.from += (lane * f.lane + step * f.step) * f.size;
  if (f.size == sizeof(float)) pack_all(to, f, n, lanes, left, wide, sizeof(float));
  else if (EACH_WORD == 1) __builtin_trap();
  else pack_all(to, f, n, lanes, left, wide, sizeof(uint16_t));
}

// A tile of y at a row and a column, from n words of two panels. Its sums begin with the first ones,
// and end with the last; where y is of bfloat16 they are elsewhere, whole tiles.
static void add_tile(const Job *j, const word *a, const word *b, long n, long row, long column,
                     float *to, long apart, int is_first, int is_last) {
  const long rows = j->M - row, columns = j->N - column, some = least(columns, WIDE);
  const int is_half = j->size == sizeof(uint16_t), rounds = is_half && is_last;
  const int adds = j->adds || !is_first, is_whole = is_half || (rows >= TALL && columns >= WIDE);
  float edge[TALL][WIDE];
  if (adds || !rounds)  // they come while the sums are made
    for (long i = 0; i < TALL && i < rows; i++)
      EACH(part, 2) __builtin_prefetch(to + i * apart + part * (WIDE - 1), 1);
  floats sums[TALL][2] = {0};
  for (long k = 0; k < n; k++, a += TALL, b += WIDE)
    ROWS(i) EACH(part, 2) sums[i][part] = added(sums[i][part], a + i, b + part * L);
  if (is_first && j->bias) {
    float bias[WIDE] = {0};
    memcpy(bias, j->bias + column, some * sizeof(float));
    ROWS(i) EACH(part, 2) sums[i][part] += *(floats *)(bias + part * L);
  }
  float *sums_at = is_whole ? to : edge[0];
  const long next = is_whole ? apart : WIDE;
  if (!is_whole && adds)
    for (long i = 0; i < TALL && i < rows; i++) memcpy(edge[i], to + i * apart, some * sizeof(float));
  ROWS(i) EACH(part, 2) {
    floats *sum = (floats *)(sums_at + i * next + part * L);
    if (adds) sums[i][part] += *sum;
    if (!rounds) *sum = sums[i][part];
  }
  if (rounds) {
    ROWS(i) if (i < rows) round_to((uint16_t *)j->y + (row + i) * j->N + column, sums[i], columns);
  } else if (!is_whole)
    for (long i = 0; i < TALL && i < rows; i++) memcpy(to + i * apart, edge[i], some * sizeof(float));
}

typedef struct {
  word *a, *b;        // panels
  float *sums;        // (share, apart) of a y of bfloat16, unread if there is one run; else null
  long apart, row, column, columns;  // of y: the rows of a share, some columns
} Part;

static void multiply_part(const Job *j, const Part *p) {
  const long K = parts(j->K, EACH_WORD), bottom = least(p->row + j->share, j->M);
  const long right = least(p->column + p->columns, j->N);
  for (long from = 0; from < K; from += RUN) {
    const long n = least(K - from, RUN), step = from * EACH_WORD, steps = least(j->K - step, n * EACH_WORD);
    for (long column = p->column; column < right; column += j->columns) {
      const long columns = least(right - column, j->columns);
      pack(p->b, j->b, column, step, steps, columns, j->N - column, WIDE);
      for (long first = p->row; first < bottom; first += j->strip) {
        const long last = least(first + j->strip, bottom);
        if (j->strip < j->share || column == p->column)  // else it is there
          pack(p->a, j->a, first, step, steps, last - first, j->M - first, TALL);
        for (long c = 0; c < columns; c += WIDE)
          for (long row = first; row < last; row += TALL) {
            float *to = p->sums ? p->sums + (row - p->row) * p->apart + column + c - p->column
                                : (float *)j->y + row * p->apart + column + c;
            const word *a = p->a + (row - first) * n;
            add_tile(j, a, p->b + c * n, n, row, column + c, to, p->apart, from == 0, from + n == K);
          }
      }
    }
  }
}

static void work(void *argument) {
  Job *j = argument;
  const long K = parts(j->K, EACH_WORD), run = least(K, RUN), is_half = j->size == sizeof(uint16_t);
  // The last panel of a may be followed by what is too much.
  const long words_a = j->strip * run + L, words_b = j->columns * run;
  const int has_sums = is_half && K > RUN;
  Part p = {.columns = has_sums ? COLUMNS : j->N, .apart = j->N};
  // Rows that are a power of two apart would share a part of the cache.
  if (is_half) p.apart = parts(least(j->N, p.columns), WIDE) * WIDE + LINE / sizeof(float);
  const long words = words_a + words_b + (has_sums ? j->share * p.apart : 0);
  p.a = aligned_alloc(64, parts(words * sizeof(word), 64) * 64);
  if (!p.a) abort();
  p.b = p.a + words_a, p.sums = is_half ? (float *)(p.b + words_b) : 0;
  for (;;) {
    p.row = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED) * j->share;
    if (p.row >= j->M) break;
    for (p.column = 0; p.column < j->N; p.column += p.columns) multiply_part(j, &p);
  }
  free(p.a);
}

// Of n rows, as many for each of the fewest parts of at most so many; of whole tiles.
INLINE long even(long n, long most) { return parts(parts(n, parts(n, most)), TALL) * TALL; }

int can_multiply(void) { return 1; }

void multiply(Job *job, int threads) {
  if (!job->M || !job->N) return;
  if (job->M * job->N * job->K < FEW) threads = 1;
  const long strip = STRIP / least(parts(job->K, EACH_WORD), RUN);
  job->share = even(parts(job->M, threads), STRIPS * strip);
  job->strip = even(job->share, strip);
  job->columns = job->strip < job->share ? COLUMNS : ALONE;
  GOMP_parallel(work, job, threads, 0);
}
#else
int can_multiply(void) { return 0; }
void multiply(void *job, int threads) {}
#endif
