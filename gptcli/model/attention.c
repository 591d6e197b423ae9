// Causal attention and its gradient on a CPU, a head at a time: of float32 if SINGLE is defined, else
// of bfloat16, where the processor multiplies it (AMX or AVX512-BF16).
//
// Products are of blocks of 32 x 32, summed in float32; nothing above the diagonal is computed.
// torch's kernel does so too, but goes back in bfloat16 at a fifth to a tenth of the speed.
//
// A product takes its left matrix as rows and its right one as words, each of which holds the
// numbers (one, or two of bfloat16) that follow each other along the sum. Scores go back transposed
// (keys by queries), so that they are the left matrix of the gradients of keys and values as they are.
//
// A head, with backward all heads that share a key, is one thread's: sums have one order.
#include "../vectors.h"
#if defined(SINGLE) ? L >= 8 : defined(__AVX512BF16__) && L == 16
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef SINGLE
typedef float number, word;
#else
typedef uint16_t number;
typedef uint32_t word;
#ifdef __AMX_BF16__
#define TILES
#endif
#endif
// Rows and columns of a block; numbers of a word; words of a sum that are added at once.
enum { BLOCK = 32, EACH_WORD = sizeof(word) / sizeof(number), STEP = BLOCK / EACH_WORD };

typedef struct {
  number *at;
  long b, h, t;  // how far texts, heads and tokens are apart, in numbers
} Heads;

typedef struct {
  Heads q, k, v;                 // (B, H, T, D), (B, G, T, D) twice
  Heads q_grad, k_grad, v_grad;  // likewise
  Heads grad;                    // of y, or null
  number *y;                     // (B, T, H, D)
  float *log_sums;               // (B, H, T), of the exponentials of scores
  long B, H, G, T, D;
  int next, tiles;
} Job;

// A head's matrices are padded to Tp x Dp; rows of T numbers are `wide` numbers apart.
typedef struct {
  long Tp, Dp, wide;
  number *keys, *values, *turned;                    // left: (Tp, Dp) twice, (Dp, Tp)
  word *queries_by_d, *grads_by_d, *keys_by_d;       // right: (Dp / EACH_WORD, Tp)
  word *queries_by_t, *grads_by_t, *values_by_t;     // right: (Tp / EACH_WORD, Dp)
  number *queries, *y_grads, *probs, *score_grads;   // left: (Tp, Dp) twice, (2 BLOCK, Tp) twice
  word *score_grads_by_key;                          // right: (2 BLOCK / EACH_WORD, Tp)
  float *scores, *other, *q_grad, *k_grad, *v_grad;  // (BLOCK, Tp), (BLOCK, BLOCK), (Dp, Tp), ...
  float *log_sums, *deltas;                          // (Tp)
} Head;

// C (32, 32), summed or set, from `steps` steps of A (32, 32) by B (STEP, 32).
#ifdef TILES
static void product_of_tiles(const number *A, long a, const word *B, long b, float *C, long c,
                             long steps, int adds) {
  if (adds) {
    _tile_loadd(0, C, c * 4);
    _tile_loadd(1, C + 16, c * 4);
    _tile_loadd(2, C + 16 * c, c * 4);
    _tile_loadd(3, C + 16 * c + 16, c * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; steps > 0; steps--, A += 2 * STEP, B += STEP * b) {
    _tile_loadd(4, A, a * 2);
    _tile_loadd(5, A + 16 * a, a * 2);
    _tile_loadd(6, B, b * 4);
    _tile_loadd(7, B + 16, b * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, C, c * 4);
  _tile_stored(1, C + 16, c * 4);
  _tile_stored(2, C + 16 * c, c * 4);
  _tile_stored(3, C + 16 * c + 16, c * 4);
}

typedef struct {
  uint8_t palette, start, none[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} Tiles;
#endif

#ifdef SINGLE
typedef floats vector;
INLINE vector added(vector sum, const number *a, const word *b) { return sum + *a * *(const floats *)b; }
#else
typedef __m512 vector;
INLINE vector added(vector sum, const number *a, const word *b) {
  const __m512i x = _mm512_set1_epi32(*(const int *)a), y = _mm512_loadu_si512(b);
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}
#endif
enum { ROWS = L / 2 };  // as many as leave registers for what is read

static void product_of_vectors(const number *A, long a, const word *B, long b, float *C, long c,
                               long steps, int adds) {
  for (long row = 0; row < BLOCK; row += ROWS)
    for (long column = 0; column < BLOCK; column += 2 * L) {
      const number *left = A + row * a;
      floats *to[ROWS];
      vector sums[ROWS][2];
      EACH(r, ROWS) to[r] = (floats *)(C + (row + r) * c + column);
      EACH(r, ROWS) EACH(n, 2) sums[r][n] = (vector)(adds ? to[r][n] : (floats){0});
      for (long k = 0; k < STEP * steps; k++) {
        const word *right = B + k * b + column;
        EACH(r, ROWS) EACH(n, 2)
          sums[r][n] = added(sums[r][n], left + r * a + k * EACH_WORD, right + n * L);
      }
      EACH(r, ROWS) EACH(n, 2) to[r][n] = (floats)sums[r][n];
    }
}

INLINE void product(const Job *j, const number *A, long a, const word *B, long b, float *C, long c,
                    long steps, int adds) {
#ifdef TILES
  if (j->tiles) {
    product_of_tiles(A, a, B, b, C, c, steps, adds);
    return;
  }
#endif
  product_of_vectors(A, a, B, b, C, c, steps, adds);
}

#ifdef SINGLE
INLINE void round_to(number *to, floats x) { *(floats *)to = x; }
INLINE floats widen(const number *from) { return *(const floats *)from; }
#else
INLINE void round_to(number *to, floats x) { *(halves *)to = (halves)_mm512_cvtneps_pbh((__m512)x); }
INLINE floats widen(const number *from) {
  return (floats)(__builtin_convertvector(*(const halves *)from, words) << 16);
}
#endif

INLINE number *rows_of(Heads of, long b, long head) { return of.at + b * of.b + head * of.h; }

// A head's rows (T, D), padded with zeros to (Tp, Dp).
static void copy_rows(const Job *j, const Head *h, number *to, Heads of, long b, long head) {
  const long T = j->T, D = j->D;
  const number *from = rows_of(of, b, head);
  if (T < h->Tp || D < h->Dp) memset(to, 0, h->Tp * h->Dp * sizeof(number));
  for (long t = 0; t < T; t++) memcpy(to + t * h->Dp, from + t * of.t, D * sizeof(number));
}

// Words of rows that are `from_apart`, by their places in a row, which are `to_apart`: L x L of them.
INLINE void turn_block(void *to, long to_apart, const void *from, long from_apart) {
  floats rows[L];
  EACH(i, L) rows[i] = *(const floats *)((const float *)from + i * from_apart);
  transpose(rows);
  EACH(i, L) *(floats *)((float *)to + i * to_apart) = rows[i];
}

// Words of rows (Tp, Dp), by their places in a row.
static void by_d(const Head *h, word *to, const number *rows) {
  const long n = h->Dp / EACH_WORD;
  for (long t = 0; t < h->Tp; t += L)
    for (long d = 0; d < n; d += L)
      turn_block(to + d * h->wide + t, h->wide, (const word *)rows + t * n + d, n);
}

#ifdef SINGLE
// Words are numbers here: rows are in order by t as they are, and turned ones are those by d.
static void by_t(const Head *h, word *to, const number *rows) {}
static void turn(const Head *h, number *to, const word *by_d) {}

// The gradients of the scores of two keys as words.
INLINE void join(word *to, long wide, const number *one) {
  EACH(i, 2) *(floats *)(to + i * wide) = *(const floats *)(one + i * wide);
}
#else
// The same number of two rows in each word.
static void by_t(const Head *h, word *to, const number *rows) {
  for (long t = 0; t < h->Tp; t += 2)
    for (long d = 0; d < h->Dp; d += L) {
      const number *even = rows + t * h->Dp + d, *odd = even + h->Dp;
      *(words *)(to + t / 2 * h->Dp + d) = __builtin_convertvector(*(const halves *)even, words) |
                                           __builtin_convertvector(*(const halves *)odd, words) << 16;
    }
}

// (Dp, Tp) from words of two numbers of one row.
static void turn(const Head *h, number *to, const word *by_d) {
  for (long d = 0; d < h->Dp; d += 2)
    for (long t = 0; t < h->Tp; t += L) {
      const words pair = *(const words *)(by_d + d / 2 * h->wide + t);
      *(halves *)(to + d * h->wide + t) = __builtin_convertvector(pair, halves);
      *(halves *)(to + (d + 1) * h->wide + t) = __builtin_convertvector(pair >> 16, halves);
    }
}

// The gradients of the scores of two keys as words.
INLINE void join(word *to, long wide, const number *one) {
  *(words *)to = __builtin_convertvector(*(const halves *)one, words) |
                 __builtin_convertvector(*(const halves *)(one + wide), words) << 16;
}
#endif

// Scores of 32 queries become weights, not yet divided by their sums; n are the keys up to them.
static void weigh(const Job *j, const Head *h, long first, float *sums, float *log_sums) {
  const float scale = 1 / sqrtf(j->D);
  const long n = first + BLOCK;
  for (long r = 0; r < BLOCK; r++) {
    float *row = h->scores + r * h->wide;
    const words last = (words){0} + (uint32_t)(first + r);
    floats tops = (floats){0} - INFINITY, all = {0};
    for (long t = 0; t < n; t += L) {
      floats x = *(floats *)(row + t) * scale;
      if (t + L > first)
        x = pick((words)(*(const words *)LANES + (uint32_t)t > last), (floats){0} - INFINITY, x);
      *(floats *)(row + t) = x;
      tops = pick((words)(x > tops), x, tops);
    }
    float top = tops[0];
    for (int i = 1; i < L; i++) top = tops[i] > top ? tops[i] : top;
    for (long t = 0; t < n; t += L) {
      const floats p = exponential(*(floats *)(row + t) - top);
      all += p;
      round_to(h->probs + r * h->wide + t, p);
    }
    sums[r] = total(all);
    log_sums[r] = top + logf(sums[r]);
  }
}

static void attend(const Job *j, const Head *h, long b, long head) {
  const long T = j->T, D = j->D, Dp = h->Dp, g = head / (j->H / j->G);
  copy_rows(j, h, h->queries, j->q, b, head);
  copy_rows(j, h, h->keys, j->k, b, g);
  by_d(h, h->keys_by_d, h->keys);
  copy_rows(j, h, h->values, j->v, b, g);
  by_t(h, h->values_by_t, h->values);
  for (long first = 0; first < T; first += BLOCK) {
    float sums[BLOCK], log_sums[BLOCK];
    const number *queries = h->queries + first * Dp;
    for (long key = 0; key <= first; key += BLOCK)
      product(j, queries, Dp, h->keys_by_d + key, h->wide, h->scores + key, h->wide, Dp / BLOCK, 0);
    weigh(j, h, first, sums, log_sums);
    for (long d = 0; d < Dp; d += BLOCK) {
      product(j, h->probs, h->wide, h->values_by_t + d, Dp, h->other, BLOCK, first / BLOCK + 1, 0);
      for (long r = 0; r < BLOCK && first + r < T; r++) {
        number y[BLOCK];
        for (long i = 0; i < BLOCK; i += L)
          round_to(y + i, *(floats *)(h->other + r * BLOCK + i) / sums[r]);
        memcpy(j->y + ((b * T + first + r) * j->H + head) * D + d, y,
               (D - d < BLOCK ? D - d : BLOCK) * sizeof(number));
      }
    }
    for (long r = 0; r < BLOCK && first + r < T; r++)
      j->log_sums[(b * j->H + head) * T + first + r] = log_sums[r];
  }
}

// From the scores of 32 keys by 32 queries, and the products of values and gradients in `other`:
// weights, and the gradients of scores, at row `at` and from query `query` on.
static void go_back(const Job *j, const Head *h, long at, long query, int is_diagonal) {
  const float scale = 1 / sqrtf(j->D);
  for (long r = 0; r < BLOCK; r += 2)
    for (long t = 0; t < BLOCK; t += L) {
      EACH(odd, 2) {
        const long row = (r + odd) * BLOCK + t, to = (at + r + odd) * h->wide + query + t;
        floats p = exponential(*(floats *)(h->scores + row) * scale - *(floats *)(h->log_sums + query + t));
        if (is_diagonal)
          p = pick((words)(*(const words *)LANES + (uint32_t)t < (uint32_t)(r + odd)), (floats){0}, p);
        round_to(h->probs + to, p);
        round_to(h->score_grads + to, p * (*(floats *)(h->other + row) - *(floats *)(h->deltas + query + t)));
      }
      join(h->score_grads_by_key + (at + r) / EACH_WORD * h->wide + query + t, h->wide,
           h->score_grads + (at + r) * h->wide + query + t);
    }
}

// Gradients of 2 x 32 keys and values, and what these give to those of the queries from there on.
// The first 32 queries see only the first 32 keys.
static void of_keys(const Job *j, const Head *h, long first, int adds) {
  const long Tp = h->Tp, Dp = h->Dp, wide = h->wide;
  for (long at = 0; at < 2 * BLOCK; at += BLOCK)
    for (long key = first + at, query = key; query < Tp; query += BLOCK) {
      product(j, h->keys + key * Dp, Dp, h->queries_by_d + query, wide, h->scores, BLOCK, Dp / BLOCK, 0);
      product(j, h->values + key * Dp, Dp, h->grads_by_d + query, wide, h->other, BLOCK, Dp / BLOCK, 0);
      go_back(j, h, at, query, key == query);
    }
  for (long d = 0; d < Dp; d += BLOCK) {
    for (long at = 0; at < 2 * BLOCK; at += BLOCK) {
      const long key = first + at, steps = (Tp - key) / BLOCK;
      const long to = key * Dp + d, from = at * wide + key, by_t = key / EACH_WORD * Dp + d;
      product(j, h->probs + from, wide, h->grads_by_t + by_t, Dp, h->v_grad + to, Dp, steps, adds);
      product(j, h->score_grads + from, wide, h->queries_by_t + by_t, Dp, h->k_grad + to, Dp, steps, adds);
    }
    for (long query = first; query < Tp; query += BLOCK)
      product(j, h->turned + d * wide + first, wide, h->score_grads_by_key + query, wide,
              h->q_grad + d * wide + query, wide, query > first ? 2 : 1, first > 0);
  }
}

// n rows of gradients that are `apart`, times a factor, from rows (Tp, Dp).
static void write_rows(const Job *j, const Head *h, number *to, long apart, const float *from, long n,
                       float factor) {
  for (; n > 0; n--, to += apart, from += h->Dp) {
    number row[256];
    for (long i = 0; i < h->Dp; i += L) round_to(row + i, *(const floats *)(from + i) * factor);
    memcpy(to, row, j->D * sizeof(number));
  }
}

static void attend_back(const Job *j, const Head *h, long b, long g) {
  const long T = j->T, D = j->D, Tp = h->Tp, Dp = h->Dp, each = j->H / j->G;
  const float scale = 1 / sqrtf(D);
  copy_rows(j, h, h->keys, j->k, b, g);
  by_d(h, h->keys_by_d, h->keys);
  turn(h, h->turned, h->keys_by_d);
  copy_rows(j, h, h->values, j->v, b, g);
  for (long head = g * each; head < (g + 1) * each; head++) {
    const long at = (b * j->H + head) * T;
    copy_rows(j, h, h->queries, j->q, b, head);
    by_d(h, h->queries_by_d, h->queries);
    by_t(h, h->queries_by_t, h->queries);
    copy_rows(j, h, h->y_grads, j->grad, b, head);
    by_d(h, h->grads_by_d, h->y_grads);
    by_t(h, h->grads_by_t, h->y_grads);
    memset(h->deltas, 0, Tp * sizeof(float));
    memset(h->log_sums, 0, Tp * sizeof(float));
    memcpy(h->log_sums, j->log_sums + at, T * sizeof(float));
    for (long t = 0; t < T; t++) {
      number y[256];
      memset(y + Dp - BLOCK, 0, BLOCK * sizeof(number));
      memcpy(y, j->y + ((b * T + t) * j->H + head) * D, D * sizeof(number));
      floats sums = {0};
      for (long d = 0; d < Dp; d += L) sums += widen(y + d) * widen(h->y_grads + t * Dp + d);
      h->deltas[t] = total(sums);
    }
    for (long first = 0; first < T; first += 2 * BLOCK) of_keys(j, h, first, head > g * each);
    number *q_grad = rows_of(j->q_grad, b, head);
    for (long t = 0; t < T; t += L) {
      for (long d = 0; d < Dp; d += L)
        turn_block(h->scores + d, Dp, h->q_grad + d * h->wide + t, h->wide);
      const long n = T - t < L ? T - t : L;
      write_rows(j, h, q_grad + t * j->q_grad.t, j->q_grad.t, h->scores, n, scale);
    }
  }
  write_rows(j, h, rows_of(j->k_grad, b, g), j->k_grad.t, h->k_grad, T, scale);
  write_rows(j, h, rows_of(j->v_grad, b, g), j->v_grad.t, h->v_grad, T, 1);
}

static void *take(char **place, long bytes) {
  void *found = *place;
  *place += (bytes + 63) / 64 * 64;
  return found;
}

// Lay out a thread's matrices from `place` on; returns where they end.
static char *lay_out(const Job *j, Head *h, char *place) {
  h->Tp = (j->T + 2 * BLOCK - 1) / (2 * BLOCK) * 2 * BLOCK, h->Dp = (j->D + BLOCK - 1) / BLOCK * BLOCK;
  h->wide = h->Tp + BLOCK;  // rows that are a power of two apart would share a part of the cache
  const long rows = h->Tp * h->Dp, columns = h->wide * h->Dp, block = BLOCK * h->wide;
  const long size = sizeof(number);
  h->keys = take(&place, rows * size), h->values = take(&place, rows * size);
  h->queries = take(&place, rows * size), h->keys_by_d = take(&place, columns * size);
  h->probs = take(&place, 2 * block * size);
  h->scores = take(&place, (block > L * h->Dp ? block : L * h->Dp) * 4);
  h->other = take(&place, BLOCK * BLOCK * 4);
#ifdef SINGLE
  h->values_by_t = (word *)h->values, h->queries_by_t = (word *)h->queries;
#else
  h->values_by_t = h->queries_by_t = take(&place, rows * size);
#endif
  if (j->grad.at) {
#ifdef SINGLE
    h->y_grads = take(&place, rows * size);
    h->turned = (number *)h->keys_by_d, h->grads_by_t = (word *)h->y_grads;
#else
    h->y_grads = h->queries;  // which are then needed no more
    h->turned = take(&place, columns * size), h->grads_by_t = take(&place, rows * size);
#endif
    h->queries_by_d = take(&place, columns * size), h->grads_by_d = take(&place, columns * size);
    h->score_grads = take(&place, 2 * block * size);
    h->score_grads_by_key = take(&place, 2 * block * size);
    h->q_grad = take(&place, columns * 4), h->k_grad = take(&place, rows * 4);
    h->v_grad = take(&place, rows * 4);
    h->log_sums = take(&place, h->Tp * 4), h->deltas = take(&place, h->Tp * 4);
  }
  return place;
}

static void heads(void *argument) {
  Job *j = argument;
  Head h = {0};
  char *scratch = aligned_alloc(64, (size_t)lay_out(j, &h, 0));
  if (!scratch) abort();
  lay_out(j, &h, scratch);
#ifdef TILES
  Tiles before, tiles = {.palette = 1};
  if (j->tiles) {
    EACH(i, 8) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_storeconfig(&before);  // of whoever uses them next
    _tile_loadconfig(&tiles);
  }
#endif
  const long each = j->grad.at ? j->G : j->H;
  for (;;) {
    const long at = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
    if (at >= j->B * each) break;
    if (j->grad.at) attend_back(j, &h, at / each, at % each);
    else attend(j, &h, at / each, at % each);
  }
#ifdef TILES
  if (j->tiles) _tile_loadconfig(&before);
#endif
  free(scratch);
}

int can_attend(void) { return 1; }

void causal_attention(Job *job, int threads) {
  static int allowed = -1;  // Linux gives tiles to a process that asks
#ifdef TILES
  if (allowed < 0) allowed = !syscall(SYS_arch_prctl, 0x1023, 18);
#endif
  job->tiles = allowed > 0;
  GOMP_parallel(heads, job, threads, 0);
}
#else
int can_attend(void) { return 0; }
void causal_attention(void *job, int threads) {}
#endif
