// The gradient of a weight in float32 on a CPU: A (R, N) transposed times B (R, K).
//
// oneDNN and, on other makers' processors, MKL reach half to nine tenths of what a core can do here.
// As in BLIS (Van Zee and van de Geijn 2015), panels of both are copied, so that the innermost loop
// reads numbers one after another, while a tile of the result stays in registers. Each number is a
// sum of sums of RUN products, in one order, however many threads there are.
#include "../vectors.h"
#include <stdlib.h>

// A tile has as many rows as leave registers for what is read. A strip of A fits a core's cache.
enum { TALL = L == 16 ? 12 : L == 8 ? 6 : 4, WIDE = 2 * L, RUN = 256, STRIP = 256 };
#define ROWS(i) _Pragma("GCC unroll 12") for (int i = 0; i < TALL; i++)

typedef struct {
  const float *a, *b;
  float *y;             // (N, K), summed or set
  long R, N, K, strip;  // rows of y that a thread takes at a time
  int adds, next;
} Job;

// `wide` columns of `left` that are there, of n rows that are `apart`; zeros for those that are not.
INLINE void pack(float *to, const float *from, long n, long apart, long left, const int wide) {
  if (left >= wide) {  // by moves of a length that is known, not by calls
    for (; n > 0; n--, from += apart, to += wide) memcpy(to, from, wide * sizeof(float));
    return;
  }
  memset(to, 0, n * wide * sizeof(float));
  for (; n > 0; n--, from += apart, to += wide) memcpy(to, from, left * sizeof(float));
}

// A tile of y at a row and a column, from n rows of two panels.
static void add_tile(const Job *j, const float *a, const float *b, long n, long row, long column,
                     int adds) {
  const long rows = j->N - row, columns = j->K - column;
  floats sums[TALL][2] = {0};
  for (long r = 0; r < n; r++, a += TALL, b += WIDE) {
    const floats low = *(const floats *)b, high = *(const floats *)(b + L);
    ROWS(i) sums[i][0] += a[i] * low, sums[i][1] += a[i] * high;
  }
  float *y = j->y + row * j->K + column, edge[TALL][WIDE];
  if (rows >= TALL && columns >= WIDE) {
    ROWS(i) EACH(part, 2) {
      floats *to = (floats *)(y + i * j->K + part * L);
      if (adds) sums[i][part] += *to;
      *to = sums[i][part];
    }
    return;
  }
  memcpy(edge, sums, sizeof edge);
  for (long i = 0; i < TALL && i < rows; i++, y += j->K)
    for (long k = 0; k < WIDE && k < columns; k++) y[k] = adds ? y[k] + edge[i][k] : edge[i][k];
}

static void work(void *argument) {
  Job *j = argument;
  float *a = aligned_alloc(64, (j->strip + WIDE) * RUN * sizeof(float)), *b = a + j->strip * RUN;
  if (!a) abort();
  for (;;) {
    const long first = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED) * j->strip;
    if (first >= j->N) break;
    const long end = first + j->strip < j->N ? first + j->strip : j->N;
    for (long from = 0; from < j->R; from += RUN) {
      const long n = j->R - from < RUN ? j->R - from : RUN;
      for (long row = first; row < end; row += TALL)
        pack(a + (row - first) * n, j->a + from * j->N + row, n, j->N, j->N - row, TALL);
      for (long column = 0; column < j->K; column += WIDE) {
        pack(b, j->b + from * j->K + column, n, j->K, j->K - column, WIDE);
        for (long row = first; row < end; row += TALL)
          add_tile(j, a + (row - first) * n, b, n, row, column, j->adds || from);
      }
    }
  }
  free(a);
}

INLINE long parts(long n, long most) { return (n + most - 1) / most; }

void multiply_turned(Job *job, int threads) {
  const long each = parts(job->N, threads);  // and strips of about one length, as many for each
  job->strip = parts(parts(each, parts(each, STRIP)), TALL) * TALL;
  GOMP_parallel(work, job, threads, 0);
}
