// A GPT over slots on a CPU: the same sums in the same order for every row, however many there are.
//
// Weights are stored in panels of 64 outputs. An output is summed over all inputs in one register
// lane, first to last, so its bits depend on its own row alone; rows are tiled only to load weights
// less often. Activations between products are float32, or bfloat16 where the weights are, whose
// products are exact and added in float32. Those for int8 weights are rounded to 16 bits with a
// scale for each 64, whose sums of products are exact. One parallel region covers a step.
//
// Shapes: R rows, C channels, H heads, H' heads of keys and values, D head size, T context,
// N outputs, K inputs of a product.

#include <immintrin.h>
#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // GCC keeps vectors that are wider than a register in memory
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t bf16;

enum Dtype { FP32 = 0, BF16 = 1, INT8 = 2, FP24 = 3, WIDENED = 4 };  // the last: of bfloat16
enum Activation { GELU = 0, RELU2 = 1, SWIGLU = 2 };
constexpr int PANEL = 64;  // outputs
constexpr int PARTS = PANEL / LANES;  // of a panel: vectors
constexpr int GROUP = 64;  // inputs that share an int8 scale
constexpr int BLOCK_BYTES = 32768;  // of a panel at a time: the size of the L1 cache
constexpr int TILE = 6, TILE8 = 2;  // rows at most, of int8 weights: what the registers hold
constexpr int FEW = 8;  // rows that every thread normalises and rounds itself, which is faster

extern "C" {
struct Matrix {
    const void* weights;  // packed
    const bf16* scales;   // of int8: (N / 64, K / 64, 64)
    const float* bias;    // or null
    int32_t n, k;
};
struct Norm {
    const float *weight, *bias;  // each may be null
};
struct Layer {
    Norm ln_1, ln_2, q_norm, k_norm;  // the last two without weights, unless the model has some
    Matrix c_attn, attn_proj, mlp_proj;
    Matrix c_fc;  // with swiglu 16 rows of the gate, 16 of the other map, and so on
};
struct Model {
    int32_t dtype, n_layer, n_head, n_kv_head, head_size, n_embd, n_inner, block_size, n_slots;
    int32_t rms_norm, activation, qk_norm, n_threads;
    float norm_eps;
    const Layer* layers;
    Norm ln_f;
    Matrix head;
    const float* rotations;  // cosine, then sine (block_size, D / 2), or null
    void* cache;             // (L, 2, S, H', T, D): float32 with weights of 24 or 32 bits, or bfloat16
};
}

namespace {

inline vec load(const float* p) { return *(const vec*)p; }
inline void store(float* p, vec x) { *(vec*)p = x; }
inline vec all(float x) { return x - vec{}; }

inline vec load(const bf16* p) {
    typedef uint16_t u16 __attribute__((vector_size(2 * LANES), aligned(2)));
#ifdef __AVX512F__
    return (vec)((ivec)_mm512_cvtepu16_epi32((__m256i)*(const u16*)p) << 16);
#elif defined(__AVX2__)
    return (vec)((ivec)_mm256_cvtepu16_epi32((__m128i)*(const u16*)p) << 16);
#endif
    return (vec)(__builtin_convertvector(*(const u16*)p, ivec) << 16);
}

inline bf16 rounded(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(bf16* p, vec x) {
#ifdef __AVX512BF16__
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &y, 32);
#else
    for (int i = 0; i < LANES; i++) p[i] = rounded(x[i]);
#endif
}

struct Wide {  // a bfloat16 in 32 bits
    float value;
};
inline void store(Wide* p, vec x) {
    bf16 narrow[LANES];
    store(narrow, x);
    store(&p->value, load(narrow));
}

inline float sum(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#endif
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}

inline vec exponential(vec x) {
    x = x > -87.0f ? x : all(-87.0f);
    x = x < 88.0f ? x : all(88.0f);
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vec n = x * 1.44269504f + magic;
    n -= magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);  // Cephes expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
}

inline vec gelu(vec x) {  // the tanh form, as a logistic function
    vec u = 1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-u));
}

template <class To>
void normalize(const float* x, int n, Norm norm, const Model& model, To* y) {
    const bool rms = model.rms_norm;
    vec total{}, squares{};
    if (!rms)
        for (int i = 0; i < n; i += LANES) total += load(x + i);
    const float mean = rms ? 0.0f : sum(total) / n;
    for (int i = 0; i < n; i += LANES) {
        vec centred = load(x + i) - mean;
        squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / n + model.norm_eps);
    for (int i = 0; i < n; i += LANES) {
        vec z = (load(x + i) - mean) * scale;
        if (norm.weight) z *= load(norm.weight + i);
        if (norm.bias) z += load(norm.bias + i);
        store(y + i, z);
    }
}

// Products. A tile is M rows by N vectors of outputs: sums[M][N].

// A panel's weights of one input, or of two, whose second is added first, as vdpbf16ps does. Of 24
// bits, three of four are stored in words of 32, whose last 8 bits hold the bytes of the fourth.
template <int N>
struct Whole {
    enum { INPUTS = N };
    float weights[N][PANEL];
    inline vec read(int i, int j) const { return load(weights[i] + LANES * j); }
};
struct Cut {
    enum { INPUTS = 1 };
    uint32_t words[PANEL / 4 * 3];
    inline vec read(int, int j) const {
        const int n = LANES * j;
        if (n < 48) return (vec)(at(n) & ~255);
        const ivec a = at(n - 48), b = at(n - 32), c = at(n - 16);
        return (vec)(a << 24 | (b << 16 & 255 << 16) | (c << 8 & 255 << 8));
    }
    inline ivec at(int n) const { return *(const ivec*)(words + n); }
    void write(int n, uint32_t bits) {  // the others' before n = 48 and above
        if (n < 48) words[n] = bits & ~255u;
        else for (int j = 0; j < 3; j++) words[n - 48 + 16 * j] |= bits >> (24 - 8 * j) & 255;
    }
};
struct Pair {
    enum { INPUTS = 2 };
    uint32_t words[PANEL];  // the second input's in the upper half
    inline vec read(int i, int j) const {
        const ivec both = *(const ivec*)(words + LANES * j);
        return (vec)(i ? both & ~65535 : both << 16);
    }
};

template <int M, int N, class Weights>
inline void tile(const float* x, int64_t stride, const Weights* weights, int from, int k,
                 vec (&sums)[M][N]) {
    for (int i = 0; i < k; i += Weights::INPUTS, weights++)
#pragma GCC unroll 2
        for (int second = Weights::INPUTS - 1; second >= 0; second--) {
            vec w[N];
            for (int j = 0; j < N; j++) w[j] = weights->read(second, from + j);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const float xi = x[m * stride + i + second];
                for (int j = 0; j < N; j++) sums[m][j] += xi * w[j];
            }
        }
}

#ifdef __AVX512F__
inline __m512i repeated(const void* x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return _mm512_set1_epi32(bytes);
}
#endif

#ifdef __AVX512BF16__
template <int M>
inline void tile(const bf16* x, int64_t stride, const Pair* weights, int, int k,
                 vec (&sums)[M][4]) {
    for (int i = 0; i < k; i += 2, weights++) {
        __m512i w[4];
        for (int j = 0; j < 4; j++) w[j] = _mm512_loadu_si512(weights->words + 16 * j);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const __m512bh xi = (__m512bh)repeated(x + m * stride + i);
            for (int j = 0; j < 4; j++)
                sums[m][j] = (vec)_mm512_dpbf16_ps((__m512)sums[m][j], xi, (__m512bh)w[j]);
        }
    }
}
#endif

// Inputs that share a scale, as 256 * high + low. The sums of their products with unsigned weights,
// which are larger by 128, begin at `start`.
struct Group {
    int8_t bytes[2][GROUP];  // high, low
    int32_t start;
    float scale;
};

#ifdef __AVX512VNNI__
void quantize(const float* x, Group& group) {
    vec largest = all(1e-30f), invalid{};  // the latter: not a number where an input is not finite
    for (int i = 0; i < GROUP; i += 16) {
        const vec size = (vec)((ivec)load(x + i) & 0x7fffffff);
        largest = size > largest ? size : largest;
        invalid += load(x + i) * 0.0f;
    }
    const float step = _mm512_reduce_max_ps((__m512)largest) / 32512;  // 127 * 256
    const float inverse = 1 / step;
    group.scale = step + sum(invalid);
    ivec total{};
    for (int i = 0; i < GROUP; i += 16) {
        const ivec q = (ivec)_mm512_cvtps_epi32((__m512)(load(x + i) * inverse));
        total += q;
        _mm_storeu_si128((__m128i*)(group.bytes[0] + i), _mm512_cvtepi32_epi8((__m512i)(q + 128 >> 8)));
        _mm_storeu_si128((__m128i*)(group.bytes[1] + i), _mm512_cvtepi32_epi8((__m512i)q));
    }
    group.start = -128 * _mm512_reduce_add_epi32((__m512i)total);
}

template <int M>
inline void tile(const Group* x, int64_t stride, const uint8_t* w, const bf16* scales, int k,
                 vec (*sums)[4]) {
    for (int g = 0; g < k; g += GROUP, x++, scales += PANEL) {
        __m512i part[2 * M][4];
        for (int m = 0; m < 2 * M; m++)
            for (int j = 0; j < 4; j++) part[m][j] = _mm512_set1_epi32(m % 2 ? x[m / 2 * stride].start : 0);
        for (int i = 0; i < GROUP; i += 4, w += 4 * PANEL) {
            __m512i wi[4];
            for (int j = 0; j < 4; j++) wi[j] = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 8
            for (int m = 0; m < 2 * M; m++) {
                const __m512i xi = repeated(x[m / 2 * stride].bytes[m % 2] + i);
                for (int j = 0; j < 4; j++) part[m][j] = _mm512_dpbusd_epi32(part[m][j], wi[j], xi);
            }
        }
        for (int j = 0; j < 4; j++) {
            const vec scale = load(scales + 16 * j);
            for (int m = 0; m < M; m++) {
                const ivec both = ((ivec)part[2 * m][j] << 8) + (ivec)part[2 * m + 1][j];
                sums[m][j] += __builtin_convertvector(both, vec) * (scale * x[m * stride].scale);
            }
        }
    }
}
#endif

template <int M, class F>
inline void for_size(int size, int row, const F& f) {
    if (size == M) f(std::integral_constant<int, M>(), row);
    else if constexpr (M > 1) for_size<M - 1>(size, row, f);
}

// Call f with rows in tiles of at most M, of nearly equal sizes: in small tiles latency dominates.
template <int M, class F>
inline void for_tiles(int rows, const F& f) {
    const int tiles = (rows + M - 1) / M;
    for (int t = 0, row = 0; t < tiles; t++) {
        const int size = (rows - row) / (tiles - t);
        for_size<M>(size, row, f);
        row += size;
    }
}

struct Share {  // a thread's part of n things
    int first, last;
    Share(int n) {
        const int t = omp_get_thread_num(), all = omp_get_num_threads();
        first = int(int64_t(n) * t / all), last = int(int64_t(n) * (t + 1) / all);
    }
};

// Buffers of a thread, allocated before the parallel region: no thread runs out of memory.
template <class A>
struct Scratch {
    std::vector<vec> sums;  // (R, PARTS)
    std::vector<Whole<2>> widened;
    std::vector<float> scores, attended;
    std::vector<A> own_normed;
    std::vector<Group> own_groups;
    A* normed;      // (R, C), and
    Group* groups;  // (R, K / 64): of all threads, unless rows are few
    Scratch(const Model& model, int rows, const Scratch* first)
        : sums(int64_t(rows) * PARTS),
          widened(model.dtype == WIDENED ? BLOCK_BYTES / sizeof(Whole<2>) : 0),
          scores(model.block_size + LANES), attended(model.head_size) {
        const bool own = rows <= FEW || !first;
        const int widest = std::max({model.n_embd, model.n_inner, model.n_head * model.head_size});
        if (own) own_normed.resize(int64_t(rows) * model.n_embd);
        if (own && model.dtype == INT8) own_groups.resize(int64_t(rows) * (widest / GROUP));
        normed = own ? own_normed.data() : first->normed;
        groups = own ? own_groups.data() : first->groups;
    }
};

template <class A>
std::vector<Scratch<A>> scratch_of_threads(const Model& model, int rows) {
    std::vector<Scratch<A>> of_threads;
    of_threads.reserve(model.n_threads);
    for (int t = 0; t < model.n_threads; t++)
        of_threads.emplace_back(model, rows, t ? of_threads.data() : nullptr);
    return of_threads;
}

// Add n inputs, of K in a row, to the sums (R, PARTS) of all rows: N vectors of M rows at a time.
template <int M, int N, class A, class Weights>
inline void add_tiles(const A* x, int k, const Weights* w, int rows, int n, vec* sums) {
    for (int j = 0; j < PARTS; j += N)
        for_tiles<M>(rows, [=](auto m, int row) {
            vec local[m()][N], *own = sums + row * PARTS + j;
            for (int i = 0; i < m(); i++) memcpy(local[i], own + PARTS * i, sizeof local[i]);
            tile(x + int64_t(row) * k, k, w, N == PARTS ? 0 : j, n, local);
            for (int i = 0; i < m(); i++) memcpy(own + PARTS * i, local[i], sizeof local[i]);
        });
}

// A tile's sums fit the registers: 32 with AVX-512, else 16.
template <class A, class Weights>
inline void add_tiles(const A* x, int k, const Weights* w, int rows, int n, vec* sums) {
    if constexpr (PARTS == 4) add_tiles<TILE, PARTS>(x, k, w, rows, n, sums);
    else if (rows == 1) add_tiles<1, PARTS>(x, k, w, rows, n, sums);
    else if (rows <= 3) add_tiles<3, PARTS / 2>(x, k, w, rows, n, sums);
    else add_tiles<TILE, PARTS / 4>(x, k, w, rows, n, sums);
}

// Add inputs [from, to) of a panel to the sums (R, PARTS) of all rows.

void add_inputs(Dtype dtype, const Matrix& matrix, int panel, const float* x, int rows, int from,
                int to, Scratch<float>& scratch) {
    const int k = matrix.k, n = to - from;
    const int64_t at = int64_t(panel) * k + from;
    if (dtype == FP32)
        add_tiles(x + from, k, (const Whole<1>*)matrix.weights + at, rows, n, scratch.sums.data());
    if (dtype == FP24)
        add_tiles(x + from, k, (const Cut*)matrix.weights + at, rows, n, scratch.sums.data());
#ifdef __AVX512VNNI__
    if (dtype != INT8) return;
    for_tiles<TILE8>(rows, [&](auto m, int row) {
        const Group* inputs = scratch.groups + (int64_t(row) * k + from) / GROUP;
        tile<m()>(inputs, k / GROUP, (const uint8_t*)matrix.weights + at * PANEL,
                  matrix.scales + at, n, (vec(*)[4])&scratch.sums[row * PARTS]);
    });
#endif
}

void add_inputs(Dtype, const Matrix& matrix, int panel, const Wide* x, int rows, int from, int to,
                Scratch<Wide>& scratch) {
    const int k = matrix.k, n = to - from;
    const Pair* pairs = (const Pair*)matrix.weights + (int64_t(panel) * k + from) / 2;
    if (rows <= TILE) return add_tiles(&x[from].value, k, pairs, rows, n, scratch.sums.data());
    for (int i = 0; i < n / 2; i++)
        for (int second = 0; second < 2; second++) {
            float* widened = scratch.widened[i].weights[second];
            for (int j = 0; j < PARTS; j++) store(widened + LANES * j, pairs[i].read(second, j));
        }
    add_tiles(&x[from].value, k, scratch.widened.data(), rows, n, scratch.sums.data());
}

void add_inputs(Dtype, const Matrix& matrix, int panel, const bf16* x, int rows, int from, int to,
                Scratch<bf16>& scratch) {
#ifdef __AVX512BF16__
    const Pair* pairs = (const Pair*)matrix.weights + (int64_t(panel) * matrix.k + from) / 2;
    add_tiles(x + from, matrix.k, pairs, rows, to - from, scratch.sums.data());
#endif
}

// Pass the outputs of all rows to `finish`, LANES at a time. Panels are scheduled dynamically, so
// that a descheduled thread delays the others by one panel.
template <class A, class Finish>
void product(Dtype dtype, const Matrix& matrix, const A* x, int rows, Scratch<A>& scratch,
             const Finish& finish) {
    const int tile = dtype == INT8 ? TILE8 : TILE, bytes = dtype == INT8 ? 1 : sizeof(A);
    const int once = PARTS == 4 ? tile : 1;  // rows for which a panel is read once: from any cache
    const int block = rows <= once ? matrix.k : BLOCK_BYTES / bytes / PANEL;
    const int panels = (matrix.n + PANEL - 1) / PANEL;
    std::vector<vec>& sums = scratch.sums;
#ifdef __AVX512VNNI__
    if constexpr (std::is_same<A, float>::value)
        if (dtype == INT8) {
            const int n = rows * (matrix.k / GROUP);
            const Share share(n);
            for (int g = rows <= FEW ? 0 : share.first; g < (rows <= FEW ? n : share.last); g++)
                quantize(x + int64_t(g) * GROUP, scratch.groups[g]);
            if (rows > FEW) {
#pragma omp barrier
            }
        }
#endif
#pragma omp for schedule(dynamic, 1) nowait
    for (int panel = 0; panel < panels; panel++) {
        std::fill(sums.begin(), sums.end(), vec{});
        for (int from = 0; from < matrix.k; from += block)
            add_inputs(dtype, matrix, panel, x, rows, from, std::min(from + block, matrix.k), scratch);
        for (int r = 0; r < rows; r++)
            for (int n = panel * PANEL, j = 0; j < PARTS && n < matrix.n; j++, n += LANES) {
                vec bias = matrix.bias ? load(matrix.bias + n) : vec{};
                finish(r, n, sums[r * PARTS + j] + bias);
            }
    }
}

// Attention of one row and head over the first n keys and values (n, D); D is N vectors.
template <int N, class KV>
void attend(const float* q, const KV* keys, const KV* values, int n, float* scores, float* y) {
    constexpr int d = LANES * N;
    const float scale = 1.0f / std::sqrt(float(d));
    vec query[N], largest = all(-INFINITY), total{}, sums[N] = {};
    for (int j = 0; j < N; j++) query[j] = load(q + LANES * j) * scale;
    for (int t = 0; t < n; t++) {
        vec products{};
        for (int j = 0; j < N; j++) products += query[j] * load(keys + t * d + LANES * j);
        scores[t] = sum(products);
    }
    for (int t = n; t % LANES; t++) scores[t] = -INFINITY;
    for (int t = 0; t < n; t += LANES) {
        vec s = load(scores + t);
        largest = s > largest ? s : largest;
    }
    float top = largest[0];
    for (int i = 1; i < LANES; i++) top = std::max(top, float(largest[i]));
    for (int t = 0; t < n; t += LANES) {
        vec s = load(scores + t), e = exponential(s - top);
        e = s == -INFINITY ? vec{} : e;
        store(scores + t, e);
        total += e;
    }
    const float inverse = 1.0f / sum(total);
    for (int t = 0; t < n; t++)
        for (int j = 0; j < N; j++) sums[j] += scores[t] * load(values + t * d + LANES * j);
    for (int j = 0; j < N; j++) store(y + LANES * j, sums[j] * inverse);
}

template <class KV>
void attend(const float* q, const KV* keys, const KV* values, int n, int d, float* scores,
            float* y) {
    for_size<8>(d / 16, 0, [&](auto m, int) {
        attend<m() * 16 / LANES>(q, keys, values, n, scores, y);
    });
}

void rotate(float* x, int d, const float* cosine, const float* sine) {
    for (int i = 0; i < d / 2; i++) {
        const float first = x[i], second = x[i + d / 2];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + d / 2] = first * sine[i] + second * cosine[i];
    }
}

// One layer's keys and values, (S, H', T, D) each.
template <class A>
struct Cache {
    A *keys, *values;
    int64_t lane;  // of a slot's head
    Cache(const Model& model, int layer) {
        const int64_t heads = int64_t(model.n_slots) * model.n_kv_head;
        lane = int64_t(model.block_size) * model.head_size;
        keys = (A*)model.cache + 2 * layer * heads * lane;
        values = keys + heads * lane;
    }
};

// Normalise and rotate a row's key of head g and the queries that share it, in place; store key
// and value. `qkv` is the row's (H + 2H', D).
template <class A>
void store_kv(const Model& model, int layer, const Cache<A>& cache, int slot, int position, int g,
              float* qkv) {
    const int d = model.head_size, sharing = model.n_head / model.n_kv_head;
    float *k = qkv + (model.n_head + g) * d, *v = k + model.n_kv_head * d;
    const int64_t angle = int64_t(position) * (d / 2), sines = int64_t(model.block_size) * (d / 2);
    for (int i = 0; i <= sharing; i++) {
        float* x = i < sharing ? qkv + (g * sharing + i) * d : k;
        const Layer& own = model.layers[layer];
        if (model.qk_norm) normalize(x, d, i < sharing ? own.q_norm : own.k_norm, model, x);
        if (const float* cosine = model.rotations) rotate(x, d, cosine + angle, cosine + sines + angle);
    }
    const int64_t at = (int64_t(slot) * model.n_kv_head + g) * cache.lane + int64_t(position) * d;
    for (int i = 0; i < d; i += LANES) {
        store(cache.keys + at + i, load(k + i));
        store(cache.values + at + i, load(v + i));
    }
}

// A is the type of activations, KV that of keys and values.
template <class A, class KV>
void forward(const Model& model, int rows, const int32_t* slots, const int32_t* positions,
             float* x, float* states) {
    const int c = model.n_embd, d = model.head_size, inner = model.n_inner;
    const int groups = model.n_kv_head, sharing = model.n_head / groups, out = model.n_head * d;
    const int width = out + 2 * groups * d;  // of a row's queries, keys and values
    const Dtype dtype = Dtype(model.dtype);
    const bool few = rows <= FEW;
    std::vector<char> seen(model.n_slots);
    bool apart = true;  // no row attends to another of this step
    for (int r = 0; r < rows; r++) apart = apart && !seen[slots[r]]++;
    const int64_t R = rows;
    std::unique_ptr<A[]> attended(new A[R * out]), wide(new A[R * inner]);
    std::unique_ptr<float[]> qkv(new float[R * width]);
    std::vector<Scratch<A>> of_threads = scratch_of_threads<A>(model, rows);
#pragma omp parallel num_threads(model.n_threads)
    {
        Scratch<A>& scratch = of_threads[omp_get_thread_num()];
        A* normed = scratch.normed;
        float* head_output = scratch.attended.data();
        const Share share(rows), pairs(rows * groups);
        vec gate[16 / LANES];
        auto norm = [&](const Norm& norm) {
            for (int r = few ? 0 : share.first; r < (few ? rows : share.last); r++)
                normalize(x + int64_t(r) * c, c, norm, model, normed + int64_t(r) * c);
            if (!few) {
#pragma omp barrier
            }
        };
        auto add = [&](int r, int n, vec y) {
            float* at = x + int64_t(r) * c + n;
            store(at, load(at) + y);
        };
        for (int l = 0; l < model.n_layer; l++) {
            const Layer& layer = model.layers[l];
            const Cache<KV> cache(model, l);
            norm(layer.ln_1);
            product(dtype, layer.c_attn, normed, rows, scratch,
                    [&](int r, int n, vec y) { store(&qkv[int64_t(r) * width + n], y); });
#pragma omp barrier
            auto store_pair = [&](int p) {
                const int r = p / groups;
                store_kv(model, l, cache, slots[r], positions[r], p % groups, &qkv[int64_t(r) * width]);
            };
            if (!apart) {
                for (int p = pairs.first; p < pairs.last; p++) store_pair(p);
#pragma omp barrier
            }
#pragma omp for schedule(dynamic, 1)
            for (int p = 0; p < rows * groups; p++) {
                const int r = p / groups, g = p % groups;
                if (apart) store_pair(p);
                const int64_t at = (int64_t(slots[r]) * groups + g) * cache.lane;
                for (int h = g * sharing; h < (g + 1) * sharing; h++) {
                    attend(&qkv[int64_t(r) * width + h * d], cache.keys + at, cache.values + at,
                           positions[r] + 1, d, scratch.scores.data(), head_output);
                    for (int i = 0; i < d; i += LANES)
                        store(&attended[int64_t(r) * out + h * d + i], load(head_output + i));
                }
            }
            product(dtype, layer.attn_proj, attended.get(), rows, scratch, add);
#pragma omp barrier
            norm(layer.ln_2);
            product(dtype, layer.c_fc, normed, rows, scratch, [&](int r, int n, vec y) {
                A* row = &wide[int64_t(r) * inner];
                vec positive = y > 0.0f ? y : vec{};
                if (model.activation == RELU2) store(row + n, positive * positive);
                else if (model.activation == GELU) store(row + n, gelu(y));
                else if (n % 32 < 16) gate[n % 16 / LANES] = y / (1.0f + exponential(-y));
                else store(row + n / 32 * 16 + n % 16, gate[n % 16 / LANES] * y);  // after its gate
            });
#pragma omp barrier
            product(dtype, layer.mlp_proj, wide.get(), rows, scratch, add);
#pragma omp barrier
        }
        for (int r = share.first; r < share.last; r++)
            normalize(x + int64_t(r) * c, c, model.ln_f, model, states + int64_t(r) * c);
    }
}

template <class A>
void head(const Model& model, int rows, const float* states, float* logits) {
    const int c = model.n_embd, n_vocab = model.head.n;
    std::unique_ptr<A[]> x(new A[int64_t(rows) * c]);
    for (int64_t i = 0; i < int64_t(rows) * c; i += LANES) store(&x[i], load(states + i));
    std::vector<Scratch<A>> of_threads = scratch_of_threads<A>(model, rows);
    auto finish = [&](int r, int n, vec y) {
        float* at = logits + int64_t(r) * n_vocab + n;
        if (n + LANES <= n_vocab)
            store(at, y);
        else
            for (int i = 0; i < n_vocab - n; i++) at[i] = y[i];
    };
#pragma omp parallel num_threads(model.n_threads)
    product(Dtype(model.dtype), model.head, x.get(), rows, of_threads[omp_get_thread_num()], finish);
}

// Return the cycles of a product of many rows, the least of several.
template <class A>
uint64_t cycles(Dtype dtype) {
    const int rows = 4 * TILE, k = 4 * PANEL;
    std::vector<A> x(rows * k);
    const std::vector<bf16> weights(PANEL * k);
    const Matrix matrix{weights.data(), nullptr, nullptr, PANEL, k};
    Model model{};
    model.dtype = dtype;
    Scratch<A> scratch(model, rows, nullptr);
    uint64_t least = ~uint64_t(0);
    for (int i = 0; i < 50; i++) {
        const uint64_t start = __rdtsc();
        product(dtype, matrix, x.data(), rows, scratch, [](int, int, vec) {});
        least = std::min(least, uint64_t(__rdtsc()) - start);
    }
    return least;
}

// Request large pages for memory before its first write: reads of weights miss the TLB less often.
void request_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = uintptr_t(1) << 21, begin = (uintptr_t(memory) + page - 1) & ~(page - 1);
    const uintptr_t end = (uintptr_t(memory) + bytes) & ~(page - 1);
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Call f with the types of activations and of keys and values; return 1, or 0 where it ran out of
// memory, which happens before it changes anything.
template <class F>
int32_t with_types(const Model& model, const F& f) {
    try {
        switch (model.dtype) {
            case BF16: f(bf16(), bf16()); break;
            case WIDENED: f(Wide(), bf16()); break;
            case INT8: f(float(), bf16()); break;
            default: f(float(), float());
        }
        return 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

}  // namespace

extern "C" {

int32_t supports(int32_t dtype) {
#ifdef __AVX512VNNI__
    return 1;
#else
    return dtype != INT8;
#endif
}

// Return the faster way to compute in a precision: the bits of bfloat16 are the same in both.
int32_t fastest(int32_t dtype) {
    if (dtype != BF16) return dtype;
#ifdef __AVX512BF16__
    static const bool paired = cycles<bf16>(BF16) < cycles<Wide>(WIDENED);
    if (paired) return BF16;
#endif
    return WIDENED;
}

// Round and reorder weights (N, K) float32 into panels, the last one padded, in `packed` and
// `scales`. Weights for 24 bits are rounded by the caller.
void pack(int32_t dtype, int32_t n, int32_t k, const float* weights, void* packed, bf16* scales) {
    const int panels = (n + PANEL - 1) / PANEL;
    const int bytes = dtype == FP32 ? 4 : dtype == FP24 ? 3 : dtype == BF16 ? 2 : 1;
    request_large_pages(packed, int64_t(panels) * PANEL * k * bytes);
#pragma omp parallel for
    for (int p = 0; p < panels; p++) {
        const int64_t base = int64_t(p) * PANEL * k;
        for (int g = 0; g < k; g += GROUP)
            for (int j = 0; j < PANEL; j++) {
                const int row = p * PANEL + j;
                const float* w = row < n ? weights + int64_t(row) * k : nullptr;
                if (dtype == FP32)
                    for (int i = g; i < g + GROUP; i++)
                        ((float*)packed)[base + i * PANEL + j] = w ? w[i] : 0;
                for (int i = g; dtype == FP24 && i < g + GROUP; i++) {
                    uint32_t bits = 0;
                    if (w) memcpy(&bits, w + i, 4);
                    ((Cut*)packed)[base / PANEL + i].write(j, bits);
                }
                for (int i = g; dtype == BF16 && i < g + GROUP; i++)
                    ((bf16*)packed)[base + i / 2 * 2 * PANEL + 2 * j + i % 2] = w ? rounded(w[i]) : 0;
                if (dtype != INT8) continue;
                float largest = 1e-12f;
                for (int i = g; w && i < g + GROUP; i++) largest = std::max(largest, std::fabs(w[i]));
                const bf16 bits = rounded(largest / 127);
                scales[int64_t(p) * PANEL * (k / GROUP) + g / GROUP * PANEL + j] = bits;
                const uint32_t wide = uint32_t(bits) << 16;
                float scale;
                memcpy(&scale, &wide, 4);
                for (int i = g; i < g + GROUP; i++) {
                    const int q = w ? int(std::nearbyint(w[i] / scale)) : 0;
                    const uint8_t byte = 128 + std::max(-127, std::min(q, 127));
                    ((uint8_t*)packed)[base + i / 4 * 4 * PANEL + 4 * j + i % 4] = byte;
                }
            }
    }
}

// Append rows of embedded tokens `x` (R, C), which is overwritten, to the cache; compute `states`.
int32_t hidden_states(const Model* model, int32_t rows, const int32_t* slots,
                      const int32_t* positions, float* x, float* states) {
    return with_types(*model, [&](auto a, auto kv) {
        forward<decltype(a), decltype(kv)>(*model, rows, slots, positions, x, states);
    });
}

// Compute the logits (R, V) of states (R, C).
int32_t logits(const Model* model, int32_t rows, const float* states, float* out) {
    return with_types(*model, [&](auto a, auto) { head<decltype(a)>(*model, rows, states, out); });
}
}
