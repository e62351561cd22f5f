// The memory of one thread, and the tensors of a call. README.md has the derivation.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../matrix.h"

constexpr int STEPS = 64;  // steps per chunk, at most
constexpr int BLOCK = 16;  // steps per block: pairs inside one are summed each by itself
constexpr int BLOCKS = STEPS / BLOCK;
constexpr int FEW = 6;     // steps of a call for which no chunk is made (ours)
constexpr double EPSILON = 1e-6;  // under the root of an L2 norm

// The arguments of a call. `state` is the first state, and the last when done; backward it is the gradient of the last
// state, and of the first when done. Gradients have H heads each.
struct Rule {
    int64_t batch, length, heads, heads_q, heads_k, heads_v, keys, values, per_channel, normalize, threads;
    double scale;
    const void *q, *k, *v, *g, *beta;  // [batch, T, heads of each, K or V]; g [batch, T, H, K or 1]; beta [batch, T, H]
    const int64_t* document_ids;       // [batch, T] or null
    void *state, *chunk_states;        // [batch, H, K, V]; [batch, H, chunks, K, padded V], the state before each chunk
    void* o;                           // [batch, T, H, V]; backward: its gradient
    void *dq, *dk, *dv, *dg, *dbeta;   // [batch, T, H, K, V, K or 1, or none]
};

// Small heads have shorter chunks: what pairs of steps take is more of the work, and what a state takes is less (ours).
static int chunk_steps(int64_t keys, int64_t values) { return keys <= 64 && values <= 64 ? 32 : STEPS; }

// While it lives, subnormal numbers (below 1.2e-38 in float32) are 0 in this thread: strong decays make many, and
// processors take longer for them.
struct FlushSubnormals {
#if defined(__SSE__)
    const unsigned before = __builtin_ia32_stmxcsr();
    FlushSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // FTZ and DAZ
    ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// A task has one batch entry and one head. Blocks of steps are [STEPS][padded K or V], with zeros beyond K, V and the
// last step: a step of zeros changes nothing.
template <typename T> struct Head {
    static constexpr int W = WIDTH<T>;
    const FlushSubnormals flush;
    const Rule& rule;
    const int64_t L, H, K, V, Kp, Vp, chunk, chunks;
    const bool per_channel, backward, few, in_place;  // few: no chunk is made; in_place: S is in the result
    int64_t b = 0, h = 0, t0 = 0;    // the batch entry, the head, the start of the chunk
    int share = 0, shares;           // of what is prefetched: those that are done, and all
    struct Rows { const T* first; int64_t apart, size, ahead; };  // of a tensor, `ahead` steps after those of the chunk
    std::vector<Rows> fetched;       // what `prefetch` fetches
    bool starts[STEPS];              // whether a document starts there
    T beta[STEPS], dbeta[STEPS];
    T length_q[STEPS], length_k[STEPS];  // the inverse lengths of q and k as they were given
    T into_1[STEPS], out_1[STEPS];   // one decay per head: from the chunk's start to t, from t to its end
    T *S, *next;                     // the state (backward: its gradient) before and after the chunk [K][Vp]
    T *q, *k, *v, *g;                // the arguments; g is -infinity where a document starts
    T *erase, *ask;                  // -k and q, decayed from the chunk's start
    T *keys, *keys_T;                // k decayed to the end of what is done; backward: after each block
    T *A, *P;                        // pairs of steps t, s: of -k_t and k_s (s < t), of q_t and k_s (s <= t)
    T *w, *u, *o;                    // v minus what the state answers, that times beta, and the result
    T *chunk_decay;                  // [Kp]
    T *step, *into, *out, *near_k, *near_q, *start, *block_decay, *decay;  // of pairs.h
    T *ST, *DT, *UT, *dO, *du, *dR, *dA, *dP, *dask, *derase, *dkeys, *dq, *dk, *dg, *dlog_cd;  // backward
    T *dnear_k, *dnear_q, *dout, *kept;

    Head(const Rule& r, bool back)
        : rule(r), L(r.length), H(r.heads), K(r.keys), V(r.values), Kp(padded<T>(r.keys)), Vp(padded<T>(r.values)),
          chunk(chunk_steps(r.keys, r.values)), chunks((r.length + chunk - 1) / chunk), per_channel(r.per_channel),
          backward(back), few(r.length <= FEW && !back), in_place(few && Vp == V) {
        shares = backward ? 32 : 16;
        int64_t steps = few ? BLOCK : chunk, k_steps = steps * Kp, v_steps = steps * Vp, pairs = steps * STEPS;
        int64_t stages = backward && per_channel ? chunk / BLOCK : 1;
        std::vector<std::pair<T**, int64_t>> places = {{&S, K * Vp}, {&q, k_steps}, {&k, k_steps}, {&v, v_steps},
                                                       {&g, k_steps}, {&o, v_steps}, {&chunk_decay, Kp}};
        if (!few)
            places.insert(places.end(), {{&next, K * Vp}, {&erase, k_steps}, {&ask, k_steps}, {&keys_T, Kp * STEPS},
                                         {&keys, stages * k_steps}, {&A, pairs}, {&P, pairs}, {&w, v_steps},
                                         {&u, v_steps}});
        if (!few && per_channel)
            places.insert(places.end(), {{&step, k_steps}, {&into, k_steps}, {&out, k_steps}, {&near_k, k_steps},
                                         {&near_q, k_steps}, {&start, BLOCKS * Kp}, {&block_decay, BLOCKS * Kp}});
        if (!few && !per_channel) places.push_back({&decay, pairs});
        if (backward)
            places.insert(places.end(),
                          {{&ST, Vp * Kp}, {&DT, Vp * Kp}, {&UT, Vp * STEPS}, {&dO, v_steps}, {&du, v_steps},
                           {&dR, v_steps}, {&dA, pairs}, {&dP, pairs}, {&dask, k_steps}, {&derase, k_steps},
                           {&dkeys, k_steps}, {&dq, k_steps}, {&dk, k_steps}, {&dg, k_steps}, {&dlog_cd, Kp},
                           {&dnear_k, k_steps}, {&dnear_q, k_steps}, {&dout, k_steps}, {&kept, BLOCK * BLOCK * W}});
        int64_t total = 0;
        for (auto& [_, size] : places) total += padded<T>(size);
        static thread_local std::vector<Vec<T>> memory;  // kept between calls: new pages take longer than a short call
        memory.assign(total / W, Vec<T>{});
        T* at = (T*)memory.data();
        for (auto& [place, size] : places) *place = at, at += padded<T>(size);
    }
    T* stage(int blocks) { return keys + (backward && per_channel ? (blocks - 1) * chunk * Kp : 0); }

    int64_t row(int64_t t) { return (b * L + t) * H + h; }
    template <typename U> U* at(void* base, int64_t t, int64_t size) { return (U*)base + row(t) * size; }
    const T* argument(const void* base, int64_t t, int64_t heads, int64_t size) {
        return (const T*)base + ((b * L + t) * heads + h / (H / heads)) * size;
    }
    T* chunk_state(int64_t t) { return (T*)rule.chunk_states + ((b * H + h) * chunks + t / chunk) * K * Vp; }

    void begin(int64_t task) {
        b = task / H, h = task % H;
        if (!few) plan_prefetches();
        if (in_place) S = (T*)rule.state + task * K * V;
        for (int64_t n = 0; n < K && !in_place; n++) {
            memcpy(S + n * Vp, (T*)rule.state + (task * K + n) * V, sizeof(T) * V);
            for (int64_t p = V; p < Vp; p++) S[n * Vp + p] = 0;
        }
    }
    void end() {
        for (int64_t n = 0; n < K && !in_place; n++)
            memcpy((T*)rule.state + ((b * H + h) * K + n) * V, S + n * Vp, sizeof(T) * V);
    }
    static void copy(const T* from, int64_t size, T* to) {  // no call of memcpy, which takes longer for such few
        int64_t i = 0;
        for (; i + W <= size; i += W) store(to + i, load<T>(from + i));
        for (; i < size; i++) to[i] = from[i];
    }
    void load_rows(const void* base, int64_t t0, int steps, int rows, int64_t heads, int64_t size, T* to) {
        const T* from = argument(base, t0, heads, size);
        int64_t wide = padded<T>(size), apart = heads * size;
        for (int t = 0; t < steps; t++) {
            copy(from + t * apart, size, to + t * wide);
            for (int64_t i = size; i < wide; i++) to[t * wide + i] = 0;
        }
        memset(to + steps * wide, 0, sizeof(T) * (rows - steps) * wide);
    }
    void store_rows(const T* from, int steps, int64_t t0, int64_t size, void* base) {
        int64_t wide = padded<T>(size), apart = H * size;
        T* to = at<T>(base, t0, size);
        for (int t = 0; t < steps; t++) copy(from + t * wide, size, to + t * apart);
    }
    void store_numbers(const T* from, int steps, int64_t t0, void* to) {
        for (int t = 0; t < steps; t++) *at<T>(to, t0 + t, 1) = from[t];
    }
    void plan_prefetches() {
        int64_t next = backward ? -chunk : chunk, size_g = per_channel ? K : 1;
        auto rows = [&](const void* base, int64_t heads, int64_t size, int64_t ahead) {
            return Rows{argument(base, 0, heads, size), heads * size, size, ahead};
        };
        fetched = {rows(rule.q, rule.heads_q, K, next), rows(rule.k, rule.heads_k, K, next),
                   rows(rule.v, rule.heads_v, V, next), rows(rule.g, H, size_g, next),
                   rows(rule.beta, H, 1, next), rows(rule.o, H, V, backward ? next : 0)};
        if (backward)
            fetched.insert(fetched.end(), {rows(rule.dq, H, K, 0), rows(rule.dk, H, K, 0), rows(rule.dv, H, V, 0),
                                           rows(rule.dg, H, size_g, 0)});
    }
    // Prefetches a share of what the next chunk loads, and of where this one stores. Memory then works while products
    // do: the rows of a head lie far apart, where no processor expects them.
    void prefetch() {
        if (share == shares) return;
        int64_t begin = share++ * chunk / shares, end = share * chunk / shares, next = t0 + (backward ? -chunk : chunk);
        for (auto& [rows, apart, size, ahead] : fetched)
            for (int64_t t = std::max<int64_t>(t0 + ahead + begin, 0); t < std::min(t0 + ahead + end, L); t++)
                for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(rows + t * apart + i, 0, 2);
        if (!backward || next < 0) return;
        for (int64_t i = K * Vp * begin / chunk; i < K * Vp * end / chunk; i += 64 / sizeof(T))
            __builtin_prefetch(chunk_state(next) + i, 0, 2);
    }
    // Loads the arguments of the chunk at t0; returns the number of its steps. `rows`: that, in whole blocks.
    int load_chunk(int64_t start, int& rows) {
        t0 = start, share = 0;
        int steps = L - t0 < chunk ? L - t0 : chunk;
        rows = (steps + BLOCK - 1) / BLOCK * BLOCK;
        load_rows(rule.q, t0, steps, rows, rule.heads_q, K, q);
        load_rows(rule.k, t0, steps, rows, rule.heads_k, K, k);
        load_rows(rule.v, t0, steps, rows, rule.heads_v, V, v);
        if (per_channel) load_rows(rule.g, t0, steps, rows, H, K, g);
        else load_rows(rule.g, t0, steps, rows, H, 1, g);
        for (int t = 0; t < rows; t++) {
            beta[t] = t < steps ? *argument(rule.beta, t0 + t, H, 1) : 0;
            const int64_t* ids = rule.document_ids ? rule.document_ids + b * L + t0 + t : nullptr;
            starts[t] = ids && t < steps && t0 + t > 0 && ids[0] != ids[-1];
            int64_t wide = per_channel ? Kp : W;
            if (starts[t])
                for (int64_t c = 0; c < wide; c++) g[t * wide + c] = -INFINITY;
            length_k[t] = normalize(k + t * Kp, 1), length_q[t] = normalize(q + t * Kp, rule.scale);
        }
        return steps;
    }
    T log_of(int t) { return g[t * W]; }  // with one decay per head
    // Divides a row by its length, if asked; returns the inverse of it, or 1.
    T normalize(T* x, T scale) {
        T inverse = 1;
        if (rule.normalize) {
            Vec<T> squares{};
            for (int64_t c = 0; c < Kp; c += W) squares += load<T>(x + c) * load<T>(x + c);
            T sum = EPSILON;
            for (int i = 0; i < W; i++) sum += squares[i];
            inverse = 1 / std::sqrt(sum);
        }
        T factor = inverse * scale;
        for (int64_t c = 0; c < Kp; c += W) store(x + c, load<T>(x + c) * factor);
        return inverse;
    }
    // Makes of the gradient of a row that `normalize` left at x that of the row before it.
    void denormalize(const T* x, T inverse, T scale, T* dx) {
        Vec<T> along{};
        if (rule.normalize)
            for (int64_t c = 0; c < Kp; c += W) along += load<T>(x + c) * load<T>(dx + c);
        T sum = 0;
        for (int i = 0; i < W; i++) sum += along[i];
        sum = scale != 0 ? sum / scale : 0;
        for (int64_t c = 0; c < Kp; c += W) {
            Vec<T> d = load<T>(dx + c) * scale;
            store(dx + c, rule.normalize ? (d - load<T>(x + c) * sum) * inverse : d);
        }
    }
};

// to [columns][row_to] = from [rows][columns]^T; both counts are whole vectors
template <typename T>
static void transpose_tile(int64_t rows, int64_t columns, const T* from, int64_t row_from, T* to, int64_t row_to) {
    constexpr int W = WIDTH<T>;
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t j = 0; j < columns; j += W) {
            Vec<T> v[W];
            for (int k = 0; k < W; k++) v[k] = load<T>(from + (i + k) * row_from + j);
            transpose_square<T>(v);
            for (int k = 0; k < W; k++) store(to + (j + k) * row_to + i, v[k]);
        }
}

template <typename T> static T sum_of_lanes(Vec<T> v) {
    T total[1] = {};
    add_lane_sums<T, 1>(&v, total);
    return total[0];
}

template <typename T> static T dot(int64_t n, const T* a, const T* b) {  // n: whole vectors
    Vec<T> sum{};
    for (int64_t i = 0; i < n; i += WIDTH<T>) sum += load<T>(a + i) * load<T>(b + i);
    return sum_of_lanes<T>(sum);
}
