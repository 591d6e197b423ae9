// Products of float32 matrices on a CPU: y (M, N) of a (M, K) and b (K, N), each by rows or turned.
//
// MKL, on other makers' processors, reaches a half to nine tenths of what a core can do here; oneDNN
// takes 20 us to begin. As in BLIS (Van Zee and van de Geijn 2015), panels of both are copied, so that
// the innermost loop reads numbers one after another, while a tile of y stays in registers. Each
// number is a sum of sums of RUN products, in one order, however many rows and threads there are.
#include "../vectors.h"
#include <stdlib.h>

// A tile has as many rows as leave registers for what is read.
enum { TALL = L == 16 ? 12 : L == 8 ? 6 : 4, WIDE = 2 * L, RUN = 256 };
// Numbers of a that fit a core's cache, a strip; how many strips meet one copy of b, and how many of
// its columns, or for one strip alone.
enum { STRIP = L == 16 ? 1 << 17 : 1 << 16, STRIPS = L == 16 ? 1 : 8, COLUMNS = 1024, ALONE = 128 };
// Products so few that one thread takes them; steps that are copied before further lanes are, so that
// whole rows are read; and numbers of a line of the caches.
enum { FEW = 1 << 20, STEPS = 8, LINE = 16 };
#define ROWS(i) _Pragma("GCC unroll 12") for (int i = 0; i < TALL; i++)

typedef struct {
  const float *from;
  long lane, step;  // how far apart rows of a, or columns of b, and products of a sum are; one is 1
} Factor;

typedef struct {
  Factor a, b;
  const float *bias;  // (N), or null
  float *y;           // (M, N), summed or set
  long M, N, K;
  long share, strip, columns;  // rows that a thread takes, that are copied, and columns that are
  int adds, next;
} Job;

// A panel of `wide` lanes of n steps, whose lanes lie side by side; zeros for lanes that are not there.
INLINE void copy(float *to, Factor f, long n, long left, const int wide) {
  if (left >= wide)
    for (long k = 0; k < n; k++, f.from += f.step, to += wide) {
      __builtin_prefetch(f.from + STEPS * f.step);
      memcpy(to, f.from, wide * sizeof(float));  // moves of a known length, no call
    }
  else
    for (long k = 0; k < n; k++, f.from += f.step, to += wide)
      for (int i = 0; i < wide; i++) to[i] = i < left ? f.from[i] : 0;
}

// The same, where the steps of a lane lie side by side.
INLINE void turn(float *to, Factor f, long n, long left, const int wide) {
  long k = 0;
  for (; k + L <= n; k += L, to += L * wide) {
    if (k % LINE == 0)  // the next panel
      for (int i = 0; i < wide; i++) __builtin_prefetch(f.from + (wide + i) * f.lane + k);
    for (int first = 0; first < wide; first += L) {
      floats lanes[L];
      EACH(i, L) {
        const int is_there = first + i < wide && first + i < left;
        lanes[i] = is_there ? *(const floats *)(f.from + (first + i) * f.lane + k) : (floats){0};
      }
      transpose(lanes);
      // Where a panel is narrower than a vector, the next one overwrites what is too much.
      EACH(i, L) *(floats *)(to + i * wide + first) = lanes[i];
    }
  }
  for (; k < n; k++, to += wide)
    for (int i = 0; i < wide; i++) to[i] = i < left ? f.from[i * f.lane + k] : 0;
}

INLINE Factor at(Factor f, long lane, long step) {
  f.from += lane * f.lane + step * f.step;
  return f;
}

// Panels of n steps of some lanes, of which some are there.
INLINE void pack(float *to, Factor f, long n, long lanes, long left, const int wide) {
  const long most = f.lane == 1 ? STEPS : n;
  for (long k = 0; k < n; k += most)
    for (long lane = 0; lane < lanes; lane += wide) {
      float *panel = to + lane * n + k * wide;
      const long steps = k + most < n ? most : n - k;
      if (f.lane == 1) copy(panel, at(f, lane, k), steps, left - lane, wide);
      else turn(panel, at(f, lane, k), steps, left - lane, wide);
    }
}

// A tile of y at a row and a column, from n steps of two panels; the first ones begin its sums.
static void add_tile(const Job *j, const float *a, const float *b, long n, long row, long column,
                     int is_first) {
  const long rows = j->M - row, columns = j->N - column;
  const int adds = j->adds || !is_first;
  float *y = j->y + row * j->N + column, edge[TALL][WIDE];
  // It comes while the sums are made.
  for (long i = 0; i < TALL && i < rows; i++)
    EACH(part, 2) __builtin_prefetch(y + i * j->N + part * (WIDE - 1), 1);
  floats sums[TALL][2] = {0};
  for (long k = 0; k < n; k++, a += TALL, b += WIDE) {
    const floats low = *(const floats *)b, high = *(const floats *)(b + L);
    ROWS(i) sums[i][0] += a[i] * low, sums[i][1] += a[i] * high;
  }
  if (is_first && j->bias) {
    float bias[WIDE] = {0};
    memcpy(bias, j->bias + column, (columns < WIDE ? columns : WIDE) * sizeof(float));
    ROWS(i) EACH(part, 2) sums[i][part] += *(floats *)(bias + part * L);
  }
  if (rows >= TALL && columns >= WIDE) {
    ROWS(i) EACH(part, 2) {
      floats *to = (floats *)(y + i * j->N + part * L);
      if (adds) sums[i][part] += *to;
      *to = sums[i][part];
    }
    return;
  }
  memcpy(edge, sums, sizeof edge);
  for (long i = 0; i < TALL && i < rows; i++, y += j->N)
    for (long k = 0; k < WIDE && k < columns; k++) y[k] = adds ? y[k] + edge[i][k] : edge[i][k];
}

INLINE long parts(long n, long most) { return (n + most - 1) / most; }

static void work(void *argument) {
  Job *j = argument;
  const long run = j->K < RUN ? j->K : RUN, strip = j->strip;
  // The last panel of a may be followed by what is too much.
  float *a = aligned_alloc(64, parts(((strip + j->columns) * run + L) * sizeof(float), 64) * 64);
  float *b = a + strip * run + L;
  if (!a) abort();
  for (;;) {
    const long begin = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED) * j->share;
    if (begin >= j->M) break;
    const long end = begin + j->share < j->M ? begin + j->share : j->M;
    for (long from = 0; from < j->K; from += RUN) {
      const long n = j->K - from < RUN ? j->K - from : RUN;
      for (long column = 0; column < j->N; column += j->columns) {
        const long left = j->N - column, columns = left < j->columns ? left : j->columns;
        pack(b, at(j->b, column, from), n, columns, left, WIDE);
        for (long first = begin; first < end; first += strip) {
          const long last = first + strip < end ? first + strip : end;
          if (strip < j->share || !column)  // else it is there
            pack(a, at(j->a, first, from), n, last - first, j->M - first, TALL);
          for (long c = 0; c < columns; c += WIDE)
            for (long row = first; row < last; row += TALL)
              add_tile(j, a + (row - first) * n, b + c * n, n, row, column + c, from == 0);
        }
      }
    }
  }
  free(a);
}

// Of n rows, as many for each of the fewest parts of at most so many; of whole tiles.
INLINE long even(long n, long most) { return parts(parts(n, parts(n, most)), TALL) * TALL; }

void multiply(Job *job, int threads) {
  if (job->M * job->N * job->K < FEW) threads = 1;
  const long strip = STRIP / (job->K < RUN ? job->K : RUN);
  job->share = even(parts(job->M, threads), STRIPS * strip);
  job->strip = even(job->share, strip);
  job->columns = job->strip < job->share ? COLUMNS : ALONE;
  GOMP_parallel(work, job, threads, 0);
}
