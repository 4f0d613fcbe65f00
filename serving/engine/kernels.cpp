// A GPT over slots on a CPU: the same sums in the same order for every row, however many there are.
//
// Weights are stored in panels of 64 outputs. An output is summed over all inputs in one register
// lane, first to last, so its bits depend on its own row alone; rows are tiled only to load weights
// less often. Activations between products are float32, or bfloat16 where the weights are bfloat16
// or int8 (their products are then exact and added in float32). One parallel region covers a step.
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

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t bf16;

enum Dtype { FP32 = 0, BF16 = 1, INT8 = 2, FP24 = 3 };
enum Activation { GELU = 0, RELU2 = 1, SWIGLU = 2 };
constexpr int PANEL = 64;  // outputs
constexpr int GROUP = 64;  // inputs that share an int8 scale
constexpr int INPUT_BYTES = 32768;  // of a panel at a time: the size of the L1 cache
constexpr int WIDENED_ABOVE = 2;  // rows: int8 weights are widened once for all rows
constexpr int FEW = 8;            // rows that every thread normalises itself, which is faster

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
    void* cache;             // (L, 2, S, H', T, D) of the type of activations
};
}

namespace {

inline v16 load(const float* p) { return *(const v16*)p; }
inline void store(float* p, v16 x) { *(v16*)p = x; }
inline v16 all(float x) { return x - v16{}; }

inline v16 load(const bf16* p) {
    typedef uint16_t u16 __attribute__((vector_size(32), aligned(2)));
    return (v16)(__builtin_convertvector(*(const u16*)p, i16) << 16);
}

inline bf16 rounded(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(bf16* p, v16 x) {
#ifdef __AVX512BF16__
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &y, 32);
#else
    for (int i = 0; i < 16; i++) p[i] = rounded(x[i]);
#endif
}

inline float sum(v16 x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#endif
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}

inline v16 exponential(v16 x) {
    x = x > -87.0f ? x : all(-87.0f);
    x = x < 88.0f ? x : all(88.0f);
    const v16 magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    v16 n = x * 1.44269504f + magic;
    n -= magic;
    v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 p = all(1.9875691500e-4f);  // Cephes expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16 power = (__builtin_convertvector(n, i16) + 127) << 23;
    return p * (v16)power;
}

inline v16 gelu(v16 x) {  // the tanh form, as a logistic function
    v16 u = 1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-u));
}

template <class To>
void normalize(const float* x, int n, Norm norm, const Model& model, To* y) {
    const bool rms = model.rms_norm;
    v16 total{}, squares{};
    if (!rms)
        for (int i = 0; i < n; i += 16) total += load(x + i);
    const float mean = rms ? 0.0f : sum(total) / n;
    for (int i = 0; i < n; i += 16) {
        v16 centred = load(x + i) - mean;
        squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / n + model.norm_eps);
    for (int i = 0; i < n; i += 16) {
        v16 z = (load(x + i) - mean) * scale;
        if (norm.weight) z *= load(norm.weight + i);
        if (norm.bias) z += load(norm.bias + i);
        store(y + i, z);
    }
}

// Products. A tile is M rows by 64 outputs: sums[M][4], each of 16 lanes.

// A panel's weights of one input. Of 24 bits, three of four are stored in words of 32, whose last 8
// bits hold the bytes of the fourth.
struct Whole {
    float weights[PANEL];
    inline void read(v16 (&w)[4]) const {
        for (int j = 0; j < 4; j++) w[j] = load(weights + 16 * j);
    }
};
struct Cut {
    uint32_t words[PANEL / 4 * 3];
    inline void read(v16 (&w)[4]) const {
        const i16 a = *(const i16*)words, b = *(const i16*)(words + 16), c = *(const i16*)(words + 32);
        w[0] = (v16)(a & ~255), w[1] = (v16)(b & ~255), w[2] = (v16)(c & ~255);
        w[3] = (v16)(a << 24 | (b << 16 & 255 << 16) | (c << 8 & 255 << 8));
    }
    void write(int n, uint32_t bits) {  // the others' before n = 48 and above
        if (n < 48) words[n] = bits & ~255u;
        else for (int j = 0; j < 3; j++) words[n - 48 + 16 * j] |= bits >> (24 - 8 * j) & 255;
    }
};

template <int M, class Weights>
inline void tile(const float* x, int64_t stride, const Weights* weights, int k, v16 (&sums)[M][4]) {
    for (int i = 0; i < k; i++) {
        v16 w[4];
        weights[i].read(w);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            v16 xi = all(x[m * stride + i]);
            for (int j = 0; j < 4; j++) sums[m][j] += xi * w[j];
        }
    }
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define NARROW 1

inline __m512bh pair(const bf16* x) {
    int32_t both;
    memcpy(&both, x, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

inline v16 dot(v16 sums, __m512bh x, __m512i w) {
    return (v16)_mm512_dpbf16_ps((__m512)sums, x, (__m512bh)w);
}

template <int M>
inline void tile(const bf16* x, int64_t stride, const bf16* w, int k, v16 (&sums)[M][4]) {
    for (int i = 0; i < k; i += 2, w += 2 * PANEL) {
        __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 32);
        __m512i w2 = _mm512_loadu_si512(w + 64), w3 = _mm512_loadu_si512(w + 96);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m512bh xi = pair(x + m * stride + i);
            sums[m][0] = dot(sums[m][0], xi, w0);
            sums[m][1] = dot(sums[m][1], xi, w1);
            sums[m][2] = dot(sums[m][2], xi, w2);
            sums[m][3] = dot(sums[m][3], xi, w3);
        }
    }
}

// Integers up to 127 are exact in bfloat16: their two bytes are looked up by the magnitude.
struct Widener {
    __m512i high[2], low[2];
    Widener() {
        uint8_t h[128], l[128];
        for (int i = 0; i < 128; i++) {
            bf16 bits = rounded(float(i));
            h[i] = bits >> 8, l[i] = bits & 255;
        }
        for (int i = 0; i < 2; i++)
            high[i] = _mm512_loadu_si512(h + 64 * i), low[i] = _mm512_loadu_si512(l + 64 * i);
    }
    inline void operator()(const uint8_t* w, __m512i& first, __m512i& second) const {
        __m512i q = _mm512_loadu_si512(w);  // sign and magnitude
        __m512i h = _mm512_permutex2var_epi8(high[0], q, high[1]);
        __m512i l = _mm512_permutex2var_epi8(low[0], q, low[1]);
        h = _mm512_ternarylogic_epi32(h, q, _mm512_set1_epi8(-128), 0xf8);  // h | (q & sign)
        first = _mm512_unpacklo_epi8(l, h);
        second = _mm512_unpackhi_epi8(l, h);
    }
};

template <int M>
inline void add_scaled(v16 (&sums)[M][4], const v16 (&part)[M][4], const bf16* scales) {
    for (int j = 0; j < 4; j++) {
        v16 scale = load(scales + 16 * j);
        for (int m = 0; m < M; m++) sums[m][j] += part[m][j] * scale;
    }
}

template <int M>
inline void tile8(const bf16* x, int64_t stride, const bf16* w, const bf16* scales, int k,
                  v16 (&sums)[M][4]) {
    for (int i = 0; i < k; i += GROUP, scales += PANEL) {
        v16 part[M][4] = {};
        tile<M>(x + i, stride, w + int64_t(i) * PANEL, GROUP, part);
        add_scaled<M>(sums, part, scales);
    }
}

template <int M>
inline void tile8(const bf16* x, int64_t stride, const uint8_t* w, const bf16* scales, int k,
                  v16 (&sums)[M][4]) {
    const Widener widen;
    for (int i = 0; i < k; i += GROUP, scales += PANEL) {
        v16 part[M][4] = {};
        for (int g = 0; g < GROUP; g += 2, w += 2 * PANEL) {
            __m512i w0, w1, w2, w3;
            widen(w, w0, w1);
            widen(w + 64, w2, w3);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                __m512bh xi = pair(x + m * stride + i + g);
                part[m][0] = dot(part[m][0], xi, w0);
                part[m][1] = dot(part[m][1], xi, w1);
                part[m][2] = dot(part[m][2], xi, w2);
                part[m][3] = dot(part[m][3], xi, w3);
            }
        }
        add_scaled<M>(sums, part, scales);
    }
}
#endif

// Call f with rows in tiles of at most 6, of nearly equal sizes: in small tiles latency dominates.
template <class F>
inline void for_tiles(int rows, const F& f) {
    const int tiles = (rows + 5) / 6;
    for (int t = 0, row = 0; t < tiles; t++) {
        const int size = (rows - row) / (tiles - t);
        switch (size) {
            case 6: f(std::integral_constant<int, 6>(), row); break;
            case 5: f(std::integral_constant<int, 5>(), row); break;
            case 4: f(std::integral_constant<int, 4>(), row); break;
            case 3: f(std::integral_constant<int, 3>(), row); break;
            case 2: f(std::integral_constant<int, 2>(), row); break;
            case 1: f(std::integral_constant<int, 1>(), row); break;
        }
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

// Add n inputs, of K in a row, to the sums (R, 4) of all rows.
template <class A, class Weights>
inline void add_tiles(const A* x, int k, const Weights* w, int rows, int n, v16* sums) {
    for_tiles(rows, [&](auto m, int row) {
        auto& own = *(v16(*)[m()][4])(sums + row * 4);
        v16 local[m()][4];
        memcpy(local, own, sizeof local);
        tile<m()>(x + int64_t(row) * k, k, w, n, local);
        memcpy(own, local, sizeof local);
    });
}

// Add inputs [from, to) of a panel to the sums (R, 4) of all rows.

void add_inputs(Dtype dtype, const Matrix& matrix, int panel, const float* x, int rows, int from,
                int to, v16* sums, float*) {
    const int k = matrix.k;
    const int64_t at = int64_t(panel) * k + from;
    if (dtype == FP32)
        add_tiles(x + from, k, (const Whole*)matrix.weights + at, rows, to - from, sums);
    else
        add_tiles(x + from, k, (const Cut*)matrix.weights + at, rows, to - from, sums);
}

void add_inputs(Dtype dtype, const Matrix& matrix, int panel, const bf16* x, int rows, int from,
                int to, v16* sums, bf16* wide) {
#ifdef NARROW
    const int k = matrix.k;
    const int64_t at = (int64_t(panel) * k + from) * PANEL;
    if (dtype == BF16)
        return add_tiles(x + from, k, (const bf16*)matrix.weights + at, rows, to - from, sums);
    const uint8_t* w = (const uint8_t*)matrix.weights + at;
    const bf16* scales = matrix.scales + (int64_t(panel) * k + from) / GROUP * PANEL;
    const bool widened = rows > WIDENED_ABOVE;
    if (widened) {
        const Widener widen;
        for (int64_t i = 0; i < int64_t(to - from) * PANEL; i += 64) {
            __m512i first, second;
            widen(w + i, first, second);
            _mm512_storeu_si512(wide + i, first);
            _mm512_storeu_si512(wide + i + 32, second);
        }
    }
    for_tiles(rows, [&](auto m, int row) {
        auto& own = *(v16(*)[m()][4])(sums + row * 4);
        const bf16* inputs = x + int64_t(row) * k + from;
        if (widened)
            tile8<m()>(inputs, k, wide, scales, to - from, own);
        else if constexpr (m() <= WIDENED_ABOVE)
            tile8<m()>(inputs, k, w, scales, to - from, own);
    });
#endif
}

// Buffers of a thread, allocated before the parallel region: no thread runs out of memory.
template <class A>
struct Scratch {
    std::vector<v16> sums;  // (R, 4)
    std::vector<A> wide, normed;
    std::vector<float> scores, attended;
    Scratch(const Model& model, int rows)
        : sums(int64_t(rows) * 4),
          wide(model.dtype == INT8 && rows > WIDENED_ABOVE ? INPUT_BYTES / sizeof(A) : 0),
          normed(rows <= FEW ? int64_t(rows) * model.n_embd : 0), scores(model.block_size + 16),
          attended(model.head_size) {}
};

template <class A>
std::vector<Scratch<A>> scratch_of_threads(const Model& model, int rows) {
    std::vector<Scratch<A>> of_threads;
    for (int t = 0; t < model.n_threads; t++) of_threads.emplace_back(model, rows);
    return of_threads;
}

// Pass the outputs of all rows to `finish`, 16 at a time. Panels are scheduled dynamically, so that
// a descheduled thread delays the others by one panel.
template <class A, class Finish>
void product(Dtype dtype, const Matrix& matrix, const A* x, int rows, Scratch<A>& scratch,
             const Finish& finish) {
    const bool whole = rows <= (dtype == INT8 ? WIDENED_ABOVE : 6);  // a panel is read once
    const int block = whole ? matrix.k : INPUT_BYTES / int(sizeof(A)) / PANEL;
    const int panels = (matrix.n + PANEL - 1) / PANEL;
    std::vector<v16>& sums = scratch.sums;
#pragma omp for schedule(dynamic, 1) nowait
    for (int panel = 0; panel < panels; panel++) {
        std::fill(sums.begin(), sums.end(), v16{});
        for (int from = 0; from < matrix.k; from += block)
            add_inputs(dtype, matrix, panel, x, rows, from, std::min(from + block, matrix.k),
                       sums.data(), scratch.wide.data());
        for (int r = 0; r < rows; r++)
            for (int n = panel * PANEL, j = 0; j < 4 && n < matrix.n; j++, n += 16) {
                v16 bias = matrix.bias ? load(matrix.bias + n) : v16{};
                finish(r, n, sums[r * 4 + j] + bias);
            }
    }
}

// Attention of one row and head over the first n keys and values (n, D); D is 16 * PARTS.
template <int PARTS, class KV>
void attend(const float* q, const KV* keys, const KV* values, int n, float* scores, float* y) {
    constexpr int d = 16 * PARTS;
    const float scale = 1.0f / std::sqrt(float(d));
    v16 query[PARTS], largest = all(-INFINITY), total{}, sums[PARTS] = {};
    for (int j = 0; j < PARTS; j++) query[j] = load(q + 16 * j) * scale;
    for (int t = 0; t < n; t++) {
        v16 products{};
        for (int j = 0; j < PARTS; j++) products += query[j] * load(keys + t * d + 16 * j);
        scores[t] = sum(products);
    }
    for (int t = n; t % 16; t++) scores[t] = -INFINITY;
    for (int t = 0; t < n; t += 16) {
        v16 s = load(scores + t);
        largest = s > largest ? s : largest;
    }
    float top = largest[0];
    for (int i = 1; i < 16; i++) top = std::max(top, float(largest[i]));
    for (int t = 0; t < n; t += 16) {
        v16 s = load(scores + t), e = exponential(s - top);
        e = s == -INFINITY ? v16{} : e;
        store(scores + t, e);
        total += e;
    }
    const float inverse = 1.0f / sum(total);
    for (int t = 0; t < n; t++)
        for (int j = 0; j < PARTS; j++) sums[j] += scores[t] * load(values + t * d + 16 * j);
    for (int j = 0; j < PARTS; j++) store(y + 16 * j, sums[j] * inverse);
}

template <class KV>
void attend(const float* q, const KV* keys, const KV* values, int n, int d, float* scores,
            float* y) {
    switch (d / 16) {
        case 1: return attend<1>(q, keys, values, n, scores, y);
        case 2: return attend<2>(q, keys, values, n, scores, y);
        case 3: return attend<3>(q, keys, values, n, scores, y);
        case 4: return attend<4>(q, keys, values, n, scores, y);
        case 5: return attend<5>(q, keys, values, n, scores, y);
        case 6: return attend<6>(q, keys, values, n, scores, y);
        case 7: return attend<7>(q, keys, values, n, scores, y);
        case 8: return attend<8>(q, keys, values, n, scores, y);
    }
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
    for (int i = 0; i < d; i += 16) {
        store(cache.keys + at + i, load(k + i));
        store(cache.values + at + i, load(v + i));
    }
}

// A is the type of activations, keys and values: float or bf16.
template <class A>
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
    std::unique_ptr<A[]> shared(new A[R * c]), attended(new A[R * out]), wide(new A[R * inner]);
    std::unique_ptr<float[]> qkv(new float[R * width]);
    std::vector<Scratch<A>> of_threads = scratch_of_threads<A>(model, rows);
#pragma omp parallel num_threads(model.n_threads)
    {
        Scratch<A>& scratch = of_threads[omp_get_thread_num()];
        A* normed = few ? scratch.normed.data() : shared.get();
        float* head_output = scratch.attended.data();
        const Share share(rows), pairs(rows * groups);
        v16 gate{};
        auto norm = [&](const Norm& norm) {
            for (int r = few ? 0 : share.first; r < (few ? rows : share.last); r++)
                normalize(x + int64_t(r) * c, c, norm, model, normed + int64_t(r) * c);
            if (!few) {
#pragma omp barrier
            }
        };
        auto add = [&](int r, int n, v16 y) {
            float* at = x + int64_t(r) * c + n;
            store(at, load(at) + y);
        };
        for (int l = 0; l < model.n_layer; l++) {
            const Layer& layer = model.layers[l];
            const Cache<A> cache(model, l);
            norm(layer.ln_1);
            product(dtype, layer.c_attn, normed, rows, scratch,
                    [&](int r, int n, v16 y) { store(&qkv[int64_t(r) * width + n], y); });
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
                    for (int i = 0; i < d; i += 16)
                        store(&attended[int64_t(r) * out + h * d + i], load(head_output + i));
                }
            }
            product(dtype, layer.attn_proj, attended.get(), rows, scratch, add);
#pragma omp barrier
            norm(layer.ln_2);
            product(dtype, layer.c_fc, normed, rows, scratch, [&](int r, int n, v16 y) {
                A* row = &wide[int64_t(r) * inner];
                v16 positive = y > 0.0f ? y : v16{};
                if (model.activation == RELU2) store(row + n, positive * positive);
                else if (model.activation == GELU) store(row + n, gelu(y));
                else if (n % 32 == 0) gate = y / (1.0f + exponential(-y));
                else store(row + n / 32 * 16, gate * y);  // after its gate, of the same panel
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
    for (int64_t i = 0; i < int64_t(rows) * c; i += 16) store(&x[i], load(states + i));
    std::vector<Scratch<A>> of_threads = scratch_of_threads<A>(model, rows);
    auto finish = [&](int r, int n, v16 y) {
        float* at = logits + int64_t(r) * n_vocab + n;
        if (n + 16 <= n_vocab)
            store(at, y);
        else
            for (int i = 0; i < n_vocab - n; i++) at[i] = y[i];
    };
#pragma omp parallel num_threads(model.n_threads)
    product(Dtype(model.dtype), model.head, x.get(), rows, of_threads[omp_get_thread_num()], finish);
}

// Request large pages for memory before its first write: reads of weights miss the TLB less often.
void request_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = uintptr_t(1) << 21, begin = (uintptr_t(memory) + page - 1) & ~(page - 1);
    const uintptr_t end = (uintptr_t(memory) + bytes) & ~(page - 1);
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Return 1, or 0 where `compute` ran out of memory, which happens before it changes anything.
template <class F>
int32_t had_memory(const F& compute) {
    try {
        compute();
        return 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

}  // namespace

extern "C" {

int32_t supports(int32_t dtype) {
#ifdef NARROW
    return 1;
#else
    return dtype == FP32 || dtype == FP24;
#endif
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
                if (dtype == BF16)
                    for (int i = g; i < g + GROUP; i++)
                        ((bf16*)packed)[base + i / 2 * 2 * PANEL + 2 * j + i % 2] =
                            w ? rounded(w[i]) : 0;
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
                    const uint8_t byte = std::min(std::abs(q), 127) | (q < 0 ? 128 : 0);
                    // unpacking takes 8 bytes of each 16: outputs 0-15 of 32, then 16-31
                    const int half = j / 32, group = j % 32 / 16, quad = j % 16 / 4;
                    const int at = half * 64 + quad * 16 + group * 8 + j % 4 * 2 + i % 2;
                    ((uint8_t*)packed)[base + i / 2 * 2 * PANEL + at] = byte;
                }
            }
    }
}

// Append rows of embedded tokens `x` (R, C), which is overwritten, to the cache; compute `states`.
int32_t hidden_states(const Model* model, int32_t rows, const int32_t* slots,
                      const int32_t* positions, float* x, float* states) {
    return had_memory([&] {
        if (model->dtype == FP32 || model->dtype == FP24)
            forward<float>(*model, rows, slots, positions, x, states);
        else
            forward<bf16>(*model, rows, slots, positions, x, states);
    });
}

// Compute the logits (R, V) of states (R, C).
int32_t logits(const Model* model, int32_t rows, const float* states, float* out) {
    return had_memory([&] {
        if (model->dtype == FP32 || model->dtype == FP24)
            head<float>(*model, rows, states, out);
        else
            head<bf16>(*model, rows, states, out);
    });
}
}
