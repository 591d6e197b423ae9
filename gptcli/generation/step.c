// One new token of each of R texts, or the first R tokens of one text, through all blocks of a GPT,
// in a single parallel region.
//
// Between two products a thread waits for the others at a barrier and for nothing else: at this
// size the launch of an operation takes longer than what it computes. Norms are computed, and what int8
// multiplies is rounded, by every thread for itself, which is sooner done than waited for. A row's
// result depends on that row only.
#include "matvec.c"

enum { LAYERNORM, RMSNORM };
enum { GELU_TANH, GELU_ERF, RELU2, SWIGLU };

typedef struct {
  const void *w, *scales;
  const float *bias;
  long N, K, kind;
} Matrix;

typedef struct {
  const float *weight, *bias;
} Norm;

typedef struct {
  Norm ln_1, ln_2;
  Matrix c_attn, c_proj, c_fc, c_gate, mlp_proj;
  const float *q_norm, *k_norm;  // (D), or null
  const float *x0_scale;         // of one number, or null
  const float *value;            // (R, G D) to be added to the values, or null
  char *cache;
} Layer;

typedef struct {
  const Layer *layers;
  Norm ln_f;
  Matrix head;
  const float *rope;  // (2, places, D): cosines, then sines; or null
  long n_layer, C, H, G, D, width, places, norm, mlp, offset;
  float eps;
} Net;

typedef struct {
  const Net *net;
  float *x, *logits;
  float *x0, *normed, *wide, *gate, *qkv, *y;  // scratch
  const int64_t *lengths;  // of the texts; 0 where all have `length`
  long length, cache_row, cache_head, R, threads, kind, of_thread, ids;  // cache_row is 0 for one text
  long next[];  // of each phase
} Run;

void GOMP_barrier(void);

// The phase's product: rows x (R, K) by a matrix, followed by what `after` says.
enum { PLAIN, ADD, ACTIVATE };

static void activate(int mlp, float *x, const float *gate, long n) {
  if (mlp == GELU_ERF) {
    for (long i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.f + erff(x[i] * 0.70710678f));
    return;
  }
  enum { SOME = L < 8 ? L : 8 };  // chunks are multiples of 8, vectors may be longer
  for (long i = 0; i < n; i += SOME) {
    floats v = {0}, g = {0};
    const size_t some = SOME * sizeof(float);
    memcpy(&v, x + i, some);
    if (mlp == RELU2) {
      const floats zero = {0};
      v = pick((words)(v > zero), v * v, zero);
    } else if (mlp == GELU_TANH) {
      v = v * logistic((v + v * v * v * 0.044715f) * 1.5957691216f);
    } else {
      memcpy(&g, gate + i, some);
      v = v * g * logistic(g);
    }
    memcpy(x + i, &v, some);
  }
}

static void multiply(Run *j, int phase, const Matrix *m, const float *x, float *y, long R,
                     uint32_t *rounded, int after) {
  const int kind = m->kind;
  const long in_row = kind == I8 ? m->K / 32 * GROUP_WORDS : m->K;
  if (kind == I8) {
    for (long r = 0; r < R; r += 8)
      round_rows(x + r * m->K, rounded + r * in_row, m->K, R - r < 8 ? R - r : 8);
    x = (const float *)rounded;
  }
  for (long first, end; take(&j->next[phase], m->N, j->threads, &first, &end);) {
    for (long r = 0; r < R; r += 8) {
      const Job job = {x + r * in_row, m->bias, m->w, m->scales, y + r * m->N, m->N, m->K,
                       .kind = kind, .R = R - r < 8 ? R - r : 8};
      tiles(&job, first, end);
    }
    for (long r = 0; r < R && after != PLAIN; r++) {
      float *of_row = y + r * m->N;
      if (after == ADD)
        for (long n = first; n < end; n++) j->x[r * m->N + n] += of_row[n];
      else
        activate(j->net->mlp, of_row + first, j->gate + r * m->N + first, end - first);
    }
  }
}

static void normalize(const Net *net, const Norm *norm, const float *x, float *y, long R) {
  const long C = net->C;
  for (long r = 0; r < R; r++, x += C, y += C) {
    floats sums = {0}, squares = {0};
    float mean = 0;
    if (net->norm == LAYERNORM) {
      for (long i = 0; i < C; i += L) sums += *(const floats *)(x + i);
      mean = total(sums) / C;
    }
    for (long i = 0; i < C; i += L) {
      const floats d = *(const floats *)(x + i) - mean;
      squares += d * d;
    }
    const float scale = 1.f / sqrtf(total(squares) / C + net->eps);
    for (long i = 0; i < C; i += L) {
      floats v = (*(const floats *)(x + i) - mean) * scale * *(const floats *)(norm->weight + i);
      if (norm->bias) v += *(const floats *)(norm->bias + i);
      *(floats *)(y + i) = v;
    }
  }
}

// Normalize a query or a key (D), and turn it by its position (halves as pairs).
static void place_head(const Net *net, const float *norm, float *head, long position) {
  const long D = net->D, half = D / 2;
  if (norm) {
    float sum = 0;
    for (long i = 0; i < D; i++) sum += head[i] * head[i];
    const float scale = 1.f / sqrtf(sum / D + net->eps);
    for (long i = 0; i < D; i++) head[i] *= scale * norm[i];
  }
  if (net->rope) {
    const float *cosine = net->rope + position * D, *sine = cosine + net->places * D;
    for (long i = 0; i < half; i++) {
      const float a = head[i], b = head[i + half];
      head[i] = a * cosine[i] - b * sine[i];
      head[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
  }
}

enum { STORE = 1, ATTEND = 2 };

static void attend_all(Run *j, int phase, const Layer *layer, int what) {
  const Net *net = j->net;
  const long H = net->H, G = net->G, D = net->D, row = (H + 2 * G) * D, each = H / G;
  const Step step = {j->qkv, j->qkv + H * D, j->qkv + (H + G) * D, layer->cache, j->y, j->lengths,
                     j->length, row, j->cache_row, j->cache_head, H, G, D, net->offset, j->kind};
  for (;;) {
    const long at = __atomic_fetch_add(&j->next[phase], 1, __ATOMIC_RELAXED);
    if (at >= j->R * G) return;
    const long b = at / G, g = at % G, position = j->lengths ? j->lengths[b] : j->length;
    float *of_row = j->qkv + b * row;
    if (what & STORE) {
      place_head(net, layer->k_norm, of_row + (H + g) * D, position);
      float *value = of_row + (H + G + g) * D;
      if (layer->value)
        for (long i = 0; i < D; i++) value[i] += layer->value[(b * G + g) * D + i];
      store_group(&step, b, g);
    }
    if (what & ATTEND) {
      for (long h = g * each; h < (g + 1) * each; h++)
        place_head(net, layer->q_norm, of_row + h * D, position);
      attend_group(&step, b, g);
    }
  }
}

static void pass(void *data) {
  Run *j = data;
  const Net *net = j->net;
  const long R = j->R, n = R * net->C, before_last = j->cache_row ? 0 : (R - 1) * net->C;
  float *normed = j->normed + __atomic_fetch_add(&j->ids, 1, __ATOMIC_RELAXED) * j->of_thread;
  uint32_t *rounded = (uint32_t *)(normed + n);
  int phase = 0;
  for (const Layer *layer = net->layers; layer < net->layers + net->n_layer; layer++) {
    if (layer->x0_scale) {
      if (!__atomic_fetch_add(&j->next[phase++], 1, __ATOMIC_RELAXED))
        for (long i = 0; i < n; i++) j->x[i] += *layer->x0_scale * j->x0[i];
      GOMP_barrier();
    }
    normalize(net, &layer->ln_1, j->x, normed, R);
    multiply(j, phase++, &layer->c_attn, normed, j->qkv, R, rounded, PLAIN);
    GOMP_barrier();
    if (before_last) {  // a token sees what the ones before it store
      attend_all(j, phase++, layer, STORE);
      GOMP_barrier();
    }
    attend_all(j, phase++, layer, before_last ? ATTEND : STORE | ATTEND);
    GOMP_barrier();
    multiply(j, phase++, &layer->c_proj, j->y, j->wide, R, rounded, ADD);
    GOMP_barrier();
    normalize(net, &layer->ln_2, j->x, normed, R);
    if (net->mlp == SWIGLU) {
      multiply(j, phase++, &layer->c_gate, normed, j->gate, R, rounded, PLAIN);
      GOMP_barrier();
    }
    multiply(j, phase++, &layer->c_fc, normed, j->wide, R, rounded, ACTIVATE);
    GOMP_barrier();
    multiply(j, phase++, &layer->mlp_proj, j->wide, j->qkv, R, rounded, ADD);
    GOMP_barrier();
  }
  const long n_last = before_last ? 1 : R;
  normalize(net, &net->ln_f, j->x + before_last, normed, n_last);
  multiply(j, phase, &net->head, normed, j->logits, n_last, rounded, PLAIN);
}

// Pass x (R, C) through the network, in place, and write the logits (R, V), or of one text (1, V).
// Scratch holds R (2 C + 2 widest + (H + 2 G) D + H D + threads (C + widest GROUP_WORDS / 32)) floats.
void decode_step(const Net *net, float *x, float *logits, float *scratch, const int64_t *lengths,
                 long length, long cache_row, long cache_head, int kind, long R, int threads) {
  const long n_phases = net->n_layer * 8 + 1;
  Run *run = __builtin_alloca(sizeof(Run) + n_phases * sizeof(long));
  memset(run, 0, sizeof(Run) + n_phases * sizeof(long));
  const long C = net->C, n = R * C, HD = net->H * net->D, wider = HD > C ? HD : C;
  const long widest = net->width > wider ? net->width : wider;
  *run = (Run){net, x, logits, scratch, .lengths = lengths, .length = length,
               .cache_row = cache_row, .cache_head = cache_head, .kind = kind, .R = R,
               .threads = threads, .of_thread = n + R * widest * GROUP_WORDS / 32};
  run->normed = run->x0 + n;
  run->wide = run->normed + threads * run->of_thread;
  run->gate = run->wide + R * widest;
  run->y = run->gate + R * widest;
  run->qkv = run->y + R * HD;  // (R, (H + 2 G) D), later (R, C)
  memcpy(run->x0, x, n * sizeof(float));
  GOMP_parallel(pass, run, threads, 0);
}
