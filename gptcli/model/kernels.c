// What lies between the products of a training step on a CPU, each in one pass over memory.
//
// `heads`: from a row of c_attn to the queries, keys and values of its heads, and back to its
// gradient: the norm, the rotation, the offset of keys and the change of layout, where torch takes
// fifteen passes. `normalize`: an RMSNorm, or its gradient, where torch takes four and nine.
// `activate`: what an MLP does between its products, and on the way back the same again together with
// its gradient. `losses`: from logits to losses and to the gradient, where torch takes five.
// `sum_of_squares`: in float64, whose conversions torch does one number at a time.
//
// Sums are of chunks, whose order is one, however many threads there are.
#include "../vectors.h"

enum { LONGEST = 256, ROWS = 32, CHUNK = 8192 };  // numbers of a head; of a chunk, rows or numbers
typedef double doubles __attribute__((vector_size(8 * sizeof(double))));

typedef struct {
  double *sums;  // one for each chunk of 8,192 numbers
  long n, next;
  struct {
    const float *x;
    long size, end;  // the end of its chunks among those of all
  } tensors[];
} Squares;

typedef struct {
  const void *inputs;  // (B, T, H + 2G, D), what c_attn gave
  void *rows;          // its gradient
  const float *q_weight, *k_weight;  // (D), or null
  const float *rotation;           // (2, T, D): cosines, then sines; or null
  const float *value;              // (B, T, G, D) to be added to the values, or null
  void *q, *k, *v;                 // (B, H, T, D), (B, G, T, D) twice; or their gradients
  float *value_grad;               // like value
  float *weight_grads;             // (chunks, 2, D), or null on the way forward
  long B, T, H, G, D, is_offset, rows_half, heads_half;  // half: bfloat16, else float32
  float eps;
  int next;
} Heads;

INLINE floats load(const void *from, long at, int half) {
  if (!half) return *(const floats *)((const float *)from + at);
  const uint16_t *halved = (const uint16_t *)from + at;
#if L == 16  // or the compiler takes three instructions for one
  return (floats)((words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)halved)) << 16);
#else
  return (floats)(__builtin_convertvector(*(const halves *)halved, words) << 16);
#endif
}

INLINE void store(void *to, long at, int half, floats x) {
  if (!half) {
    *(floats *)((float *)to + at) = x;
    return;
  }
#if L == 16 && defined(__AVX512BF16__)
  *(halves *)((uint16_t *)to + at) = (halves)_mm512_cvtneps_pbh((__m512)x);
#else
  // To the nearest, even ones where two are; what is not a number stays none.
  const words bits = (words)x, near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const words none = (words)(x != x);
  *(halves *)((uint16_t *)to + at) = __builtin_convertvector((none & 0x7fc0) | (~none & near), halves);
#endif
}

// The last vector of n numbers overlaps the one before it: where it begins, and which of its lanes
// are new.
INLINE long place(long i, long n) { return i + L <= n ? i : n - L; }

INLINE floats fresh(long i, long n) {
  const words seen = *(const words *)LANES + (uint32_t)(i + L <= n ? L : n - i);
  return (floats)((words)(seen >= L) & (words)((floats){0} + 1));
}

INLINE float norm_scale(const Heads *j, long at) {
  floats sums = {0};
  for (long i = 0; i < j->D; i += L) {
    const floats x = load(j->inputs, at + place(i, j->D), j->rows_half) * fresh(i, j->D);
    sums += x * x;
  }
  return 1 / sqrtf(total(sums) / j->D + j->eps);
}

// The late half of a key (D) goes to the place after its own: write or read its parts.
INLINE void move(const Heads *j, float *x, long head, long t, int back) {
  const long D = j->D, quarter = D / 4, size = j->heads_half ? 2 : 4;
  for (long part = 0; part < 4; part++) {
    const int late = part & 1;
    char *at = (char *)j->k + ((head + t + late) * D + part * quarter) * size;
    uint16_t *half = (uint16_t *)at;
    const int beyond = late && t + 1 == j->T;
    for (long i = 0; i < quarter; i++, x++) {
      uint32_t bits = 0;
      if (back) {
        if (!beyond) bits = j->heads_half ? (uint32_t)half[i] << 16 : ((uint32_t *)at)[i];
        memcpy(x, &bits, 4);
      } else if (!beyond) {
        memcpy(&bits, x, 4);
        if (j->heads_half) half[i] = *x != *x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        else ((uint32_t *)at)[i] = bits;
      }
    }
    if (late && t == 0 && !back) memset(at - D * size, 0, quarter * size);
  }
}

INLINE void forward_head(const Heads *j, long at, long t, const float *weight, void *to, long head,
                         int moved) {
  const long D = j->D, half = D / 2;
  const float *cosine = j->rotation + t * D, *sine = cosine + j->T * D;
  const float scale = weight ? norm_scale(j, at) : 1;
  float y[LONGEST];
  for (long i = 0; i < half; i += L) {
    const long k = place(i, half), m = k + half;
    floats a = load(j->inputs, at + k, j->rows_half), b = load(j->inputs, at + m, j->rows_half);
    if (weight) {
      a *= scale * *(const floats *)(weight + k);
      b *= scale * *(const floats *)(weight + m);
    }
    if (j->rotation) {
      const floats turned = a * *(const floats *)(cosine + k) - b * *(const floats *)(sine + k);
      b = b * *(const floats *)(cosine + m) + a * *(const floats *)(sine + m);
      a = turned;
    }
    store(moved ? (void *)y : to, moved ? k : (head + t) * D + k, !moved && j->heads_half, a);
    store(moved ? (void *)y : to, moved ? m : (head + t) * D + m, !moved && j->heads_half, b);
  }
  if (moved) move(j, y, head, t, 0);
}

INLINE void backward_head(const Heads *j, long at, long t, const float *weight, const void *from,
                          long head, int moved, float *of_weight) {
  const long D = j->D, half = D / 2;
  const float *cosine = j->rotation + t * D, *sine = cosine + j->T * D;
  const float scale = weight ? norm_scale(j, at) : 1;
  float y[LONGEST];
  floats g[LONGEST / L], along = {0};
  if (moved) move(j, y, head, t, 1);
  for (long i = 0, n = 0; i < half; i += L, n += 2) {
    const long k = place(i, half), m = k + half, z = moved ? 0 : (head + t) * D;
    const int is_half = !moved && j->heads_half;
    floats a = load(moved ? y : from, z + k, is_half), b = load(moved ? y : from, z + m, is_half);
    if (j->rotation) {
      const floats turned = a * *(const floats *)(cosine + k) + b * *(const floats *)(sine + m);
      b = b * *(const floats *)(cosine + m) - a * *(const floats *)(sine + k);
      a = turned;
    }
    if (weight) {
      const floats x = load(j->inputs, at + k, j->rows_half), w = *(const floats *)(weight + k);
      const floats u = load(j->inputs, at + m, j->rows_half), v = *(const floats *)(weight + m);
      const floats once = fresh(i, half);
      *(floats *)(of_weight + k) += a * x * (scale * once);
      *(floats *)(of_weight + m) += b * u * (scale * once);
      a *= w, b *= v;
      along += (a * x + b * u) * once;
    }
    g[n] = a, g[n + 1] = b;
  }
  const float back = weight ? total(along) * scale * scale / D : 0;
  for (long i = 0, n = 0; i < half; i += L, n += 2) {
    const long k = place(i, half), m = k + half;
    if (weight) {
      g[n] = scale * (g[n] - back * load(j->inputs, at + k, j->rows_half));
      g[n + 1] = scale * (g[n + 1] - back * load(j->inputs, at + m, j->rows_half));
    }
    store(j->rows, at + k, j->rows_half, g[n]);
    store(j->rows, at + m, j->rows_half, g[n + 1]);
  }
}

INLINE void value_head(const Heads *j, long at, long row, long head, int back) {
  for (long i = 0; i < j->D; i += L) {
    const long k = place(i, j->D);
    floats x = load(back ? j->v : j->inputs, (back ? head : at) + k, back ? j->heads_half : j->rows_half);
    if (!back && j->value) x += *(const floats *)(j->value + row + k);
    if (back && j->value_grad) *(floats *)(j->value_grad + row + k) = x;
    store(back ? j->rows : j->v, (back ? at : head) + k, back ? j->rows_half : j->heads_half, x);
  }
}

static void heads_of(const Heads *j, long b, long t, float *weight_grads) {
  const long T = j->T, H = j->H, G = j->G, D = j->D;
  long at = (b * T + t) * (H + 2 * G) * D;
  for (long h = 0; h < H + G; h++, at += D) {
    const int is_key = h >= H, moved = is_key && j->is_offset;
    const float *weight = is_key ? j->k_weight : j->q_weight;
    const long head = is_key ? (b * G + h - H) * T : (b * H + h) * T;
    void *heads = is_key ? j->k : j->q;
    if (weight_grads) backward_head(j, at, t, weight, heads, head, moved, weight_grads + is_key * D);
    else forward_head(j, at, t, weight, heads, head, moved);
  }
  for (long g = 0; g < G; g++, at += D)
    value_head(j, at, ((b * T + t) * G + g) * D, ((b * G + g) * T + t) * D, weight_grads != 0);
}

static void work(void *argument, int back) {
  Heads *j = argument;
  const long n = j->B * j->T;
  for (;;) {
    const long chunk = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED), first = chunk * ROWS;
    if (first >= n) return;
    for (long i = first; i < first + ROWS && i < n; i++) {
      heads_of(j, i / j->T, i % j->T, back ? j->weight_grads + chunk * 2 * j->D : 0);
    }
  }
}

static void work_forward(void *job) { work(job, 0); }
static void work_backward(void *job) { work(job, 1); }

void heads(Heads *job, int threads) {
  GOMP_parallel(job->weight_grads ? work_backward : work_forward, job, threads, 0);
}

typedef struct {
  const void *x, *grad;  // (n, C); grad is null for the value
  const float *weight;   // (C)
  void *y;               // the value, or the gradient of x
  float *weight_grads;   // (chunks, C)
  long n, C, x_half, grad_half, y_half;
  float eps;
  int next;
} Norm;

INLINE void norm_row(const Norm *j, long at, float *of_weight) {
  floats sums = {0}, along = {0};
  for (long i = 0; i < j->C; i += L) {
    const floats x = load(j->x, at + i, j->x_half);
    sums += x * x;
    if (of_weight) along += x * load(j->grad, at + i, j->grad_half) * *(const floats *)(j->weight + i);
  }
  const float scale = 1 / sqrtf(total(sums) / j->C + j->eps);
  const float back = total(along) * scale * scale / j->C;
  for (long i = 0; i < j->C; i += L) {
    const floats x = load(j->x, at + i, j->x_half), w = *(const floats *)(j->weight + i);
    floats y = x * w;
    if (of_weight) {
      const floats grad = load(j->grad, at + i, j->grad_half);
      *(floats *)(of_weight + i) += grad * x * scale;
      y = grad * w - back * x;
    }
    store(j->y, at + i, j->y_half, scale * y);
  }
}

static void norms(void *argument) {
  Norm *j = argument;
  for (;;) {
    const long chunk = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED), first = chunk * ROWS;
    if (first >= j->n) return;
    for (long i = first; i < first + ROWS && i < j->n; i++)
      norm_row(j, i * j->C, j->grad ? j->weight_grads + chunk * j->C : 0);
  }
}

// C is a multiple of 16.
void normalize(Norm *job, int threads) { GOMP_parallel(norms, job, threads, 0); }

typedef struct {
  void *logits;  // (n, V), overwritten by their gradient
  const int64_t *targets;
  float *losses;
  long n, V;
  int half, needs_grad, next;
} Losses;

enum { IGNORED = -100 };

// n of the numbers from `at` on, and minus infinity in the lanes after them.
INLINE floats load_some(const void *from, long at, long n, int half) {
  if (n >= L) return load(from, at, half);
  const size_t size = half ? 2 : 4;
  char part[4 * L] = {0};
  memcpy(part, (const char *)from + at * size, n * size);
  const words is_there = (words)(*(const words *)LANES < (uint32_t)n);
  return pick(is_there, load(part, 0, half), (floats){0} - INFINITY);
}

INLINE void store_some(void *to, long at, long n, int half, floats x) {
  char part[4 * L];
  const size_t size = half ? 2 : 4;
  store(n < L ? (void *)part : to, n < L ? 0 : at, half, x);
  if (n < L) memcpy((char *)to + at * size, part, n * size);
}

enum { SQUARED_RELU, SWIGLU, GELU, GELU_ERF };

typedef struct {
  const void *x, *up;  // up is what a SwiGLU gates
  void *grad;          // of the value, overwritten by that of x; or null
  void *y, *up_grad;   // y is the value, or null
  long n;
  int kind, half, next;
} Pass;

// The share of x that a GELU by tanh keeps, a logistic function, and its derivative.
INLINE floats tanh_gate(floats x, floats *slope) {
  const floats z = x * (1.5957691f + 0.071354816f * x * x);
  const floats e = exponential((floats)((words)z | 0x80000000));
  const floats share = 1 / (1 + e);
  *slope = e * share * share * (1.5957691f + 0.21406445f * x * x);
  return pick((words)(z < 0), e, (floats){0} + 1) * share;
}

// The normal distribution's share below x, and its density. A minimax polynomial of 1 / (1 + 0.3 |x|)
// gives the lower tail divided by e^(-x^2 / 2), to a relative error of 1.2e-7.
INLINE floats normal_gate(floats x, floats *slope) {
  const floats e = exponential(x * x * -0.5f);
  const floats t = 1 / (1 + 0.3f * (floats)((words)x & 0x7fffffff));
  floats p = (floats){0} + 0.03619493f;
  p = p * t - 0.15937861f;
  p = p * t + 0.21011889f;
  p = p * t - 0.057167805f;
  p = p * t + 0.13041667f;
  p = p * t + 0.09934706f;
  p = p * t + 0.12084554f;
  p = p * t + 0.11962326f;
  const floats tail = p * t * e;
  *slope = e * 0.39894228f;
  return pick((words)(x < 0), tail, 1 - tail);
}

INLINE void activate_vector(const Pass *j, long i, const int kind, const int half) {
  const long left = j->n - i;
  const floats zero = {0}, x = load_some(j->x, i, left, half);
  floats y, slope, gate, gated;
  if (kind == SWIGLU) {
    const floats up = load_some(j->up, i, left, half);
    gate = logistic(x), gated = x * gate;
    slope = up * (gate + gated * (1 - gate)), y = up * gated;
  } else if (kind == SQUARED_RELU) {
    const floats above = pick((words)(x < zero), zero, x);  // not a number stays none
    slope = above * 2, y = above * above;
  } else {
    gate = kind == GELU ? tanh_gate(x, &slope) : normal_gate(x, &slope);
    slope = gate + x * slope, y = x * gate;
  }
  if (j->y) store_some(j->y, i, left, half, y);
  if (!j->grad) return;
  const floats grad = load_some(j->grad, i, left, half);
  if (kind == SWIGLU) store_some(j->up_grad, i, left, half, grad * gated);
  store_some(j->grad, i, left, half, grad * slope);
}

INLINE void activate_all(Pass *j, const int kind, const int half) {
  for (;;) {
    const long first = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED) * (long)CHUNK;
    if (first >= j->n) return;
    for (long i = first; i < first + CHUNK && i < j->n; i += L) activate_vector(j, i, kind, half);
  }
}

static void activations(void *argument) {
  Pass *j = argument;
  EACH(kind, 4) EACH(half, 2)  // each compiled by itself
    if (j->kind == kind && j->half == half) activate_all(j, kind, half);
}

// The value, and where the gradient of it is there, that of x in its place, and that of up.
void activate(Pass *job, int threads) { GOMP_parallel(activations, job, threads, 0); }

INLINE void loss_row(const Losses *j, long row, const int half) {
  const long V = j->V, at = row * V, target = j->targets[row];
  const int is_known = target >= 0 && target < V;
  j->losses[row] = is_known || target == IGNORED ? 0 : NAN;
  if (!is_known) {
    if (j->needs_grad) memset((char *)j->logits + at * (half ? 2 : 4), 0, V * (half ? 2 : 4));
    return;
  }
  floats tops = (floats){0} - INFINITY, sums = {0};
  for (long i = 0; i < V; i += L) {
    const floats x = load_some(j->logits, at + i, V - i, half);
    tops = pick((words)(x > tops), x, tops);
  }
  float top = tops[0];
  for (int i = 1; i < L; i++) top = tops[i] > top ? tops[i] : top;
  for (long i = 0; i < V; i += L)
    sums += exponential(load_some(j->logits, at + i, V - i, half) - top);
  const float log_sum = logf(total(sums));
  const float aim = load_some(j->logits, at + target, 1, half)[0] - top;
  j->losses[row] = log_sum - aim;
  if (!j->needs_grad) return;
  for (long i = 0; i < V; i += L) {
    const floats x = load_some(j->logits, at + i, V - i, half);
    store_some(j->logits, at + i, V - i, half, exponential(x - top - log_sum));
  }
  store_some(j->logits, at + target, 1, half, (floats){0} + (expf(aim - log_sum) - 1));
}

static void loss_rows(void *argument) {
  Losses *j = argument;
  for (;;) {
    const long row = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
    if (row >= j->n) return;
    if (j->half) loss_row(j, row, 1);
    else loss_row(j, row, 0);
  }
}

// Losses in nats and, where it is needed, their gradient: probabilities minus one at the target.
void losses(Losses *job, int threads) { GOMP_parallel(loss_rows, job, threads, 0); }

static void sums(void *argument) {
  Squares *j = argument;
  for (long tensor = 0;;) {
    const long chunk = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
    while (tensor < j->n && chunk >= j->tensors[tensor].end) tensor++;
    if (tensor == j->n) return;
    const float *x = j->tensors[tensor].x;
    const long size = j->tensors[tensor].size, begin = tensor ? j->tensors[tensor - 1].end : 0;
    const long first = (chunk - begin) * CHUNK;
    const long end = first + CHUNK < size ? first + CHUNK : size;
    typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
    doubles lanes[4] = {{0}};
    double sum = 0;
    long i = first;
    for (; i + 32 <= end; i += 32)
      for (int k = 0; k < 4; k++) {
        const doubles some = __builtin_convertvector(*(const eight *)(x + i + 8 * k), doubles);
        lanes[k] += some * some;
      }
    for (; i < end; i++) sum += (double)x[i] * x[i];
    lanes[0] += lanes[1] + (lanes[2] + lanes[3]);
    for (int k = 0; k < 8; k++) sum += lanes[0][k];
    j->sums[chunk] = sum;
  }
}

void sum_of_squares(Squares *job, int threads) {
  const long chunks = job->n ? job->tensors[job->n - 1].end : 0;
  GOMP_parallel(sums, job, chunks < 1 ? 1 : chunks < threads ? chunks : threads, 0);
}
