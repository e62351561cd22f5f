// The selective scan on a CPU. Derivation, bytes and operations: README.md.
//
// A vector holds as many channels as it has lanes; the states of a channel are independent chains, so that the latency of one
// step hides behind the others, and no step needs a sum over lanes. Work is cut into (batch, group, slice of the group's
// channels); the number of slices depends on shapes alone, so sums over channels have one order whatever the threads are.
//
// b batch · d channel · n state · t time · g group · r reading · i input: the values, then (normalized) ones
#include <cmath>
#include <memory>
#include <type_traits>

#include "../vectors.h"

constexpr int STEPS = 64;  // of a chunk: the states at its start are kept for the backward pass, those inside are recomputed
constexpr int ABREAST = 8, ABREAST_BYTES = 1 << 16;  // blocks of channels that walk through time together at most, and their states
template <bool ONES> constexpr int STATES = ONES ? 4 : 8;  // at once: what fits in registers, gradients included

struct Sizes {
    int64_t batch, channels, length, states, groups, readings, inputs, slices, threads;
};
struct Strided {
    void* data;
    int64_t batch, channel, time;  // strides
};
struct Scan {  // shapes: README.md
    Sizes size;
    Strided u, delta, y, y_ones, du, ddelta;  // y: [batch, groups x readings x channels of a group, length]
    void *A2, *B, *C, *state, *begins, *dA, *dB, *dC;  // A2 = A / ln 2
    const uint8_t* starts;
};

template <typename T> static T* at(const Strided& s, int64_t b, int64_t channel) { return (T*)s.data + b * s.batch + channel * s.channel; }

// Blocks of channels of one batch entry, and what all loops over one of them need. Some blocks go through a chunk one after another
// before the next chunk: its B and C, and their gradients, then stay in the nearest cache, whatever the length is.
template <typename T> struct Block {
    static constexpr int W = WIDTH<T>;
    const Scan& scan;
    int64_t b, g, first;  // batch entry, group, first channel inside the group
    int lanes;
    typename Lanes<T>::bits is_channel;  // by lane: -1, or 0
    int64_t L, N, R, per_group, channel;  // channel: first, among all
    int64_t next_channel, next_time;      // from this tile to the one after it
    std::unique_ptr<Vec<T>[]> memory;  // aligned
    T *state, *A2, *delta, *u, *x, *y;  // [inputs][N][W], [N][W], tiles [STEPS][W]; y [readings][inputs][STEPS][W]

    Block(const Scan& s, int64_t b_, int64_t g_) : scan(s), b(b_), g(g_), L(s.size.length), N(s.size.states), R(s.size.readings) {
        int64_t K = s.size.inputs;
        per_group = s.size.channels / s.size.groups;
        memory.reset(new Vec<T>[ABREAST * (K + 1) * N + STEPS * (3 + R * K)]);
        delta = (T*)(memory.get() + ABREAST * (K + 1) * N);
        u = delta + W * STEPS, x = u + W * STEPS, y = x + W * STEPS;
    }
    static int64_t abreast(const Sizes& size) {
        int64_t fit = ABREAST_BYTES / (int64_t)((size.inputs + 1) * size.states * sizeof(Vec<T>));
        return fit < 1 ? 1 : fit < ABREAST ? fit : ABREAST;
    }
    // What `each` does, with every one of the blocks from .. to in place; `step`: to the next chunk
    template <typename Each> void for_blocks(int64_t from, int64_t to, int64_t step, Each each) {
        for (int64_t block = from; block < to; block++) {
            state = (T*)memory.get() + (block - from) * (scan.size.inputs + 1) * N * W, A2 = state + scan.size.inputs * N * W;
            first = block * W, channel = g * per_group + first;
            lanes = per_group - first < W ? per_group - first : W;
            for (int c = 0; c < W; c++) is_channel[c] = -(c < lanes);
            bool last = block + 1 == to;
            next_channel = last ? (from - block) * W : W, next_time = last ? step : 0;
            each();
        }
    }
    int64_t ahead(const Strided& s) { return next_channel * s.channel + next_time * s.time; }

    void load_decays() {
        memset(A2, 0, sizeof(T) * W * N);
        for (int c = 0; c < lanes; c++)
            for (int64_t n = 0; n < N; n++) A2[n * W + c] = ((const T*)scan.A2)[(channel + c) * N + n];
    }
    template <int COUNT> void clear_rest(Vec<T>* sums) {  // lanes without a channel are 0 but for 0 x infinity
        for (int n = 0; n < COUNT; n++) sums[n] = (Vec<T>)((typename Lanes<T>::bits)sums[n] & is_channel);
    }
    T* outside(void* states, int64_t input, int c) {  // of [inputs, batch, channels, N]
        return (T*)states + ((input * scan.size.batch + b) * scan.size.channels + channel + c) * N;
    }
    void load_state() {
        memset(state, 0, sizeof(T) * W * N * scan.size.inputs);
        for (int64_t i = 0; i < scan.size.inputs; i++)
            for (int c = 0; c < lanes; c++)
                for (int64_t n = 0; n < N; n++) state[(i * N + n) * W + c] = outside(scan.state, i, c)[n];
    }
    void store_state() {
        for (int64_t i = 0; i < scan.size.inputs; i++)
            for (int c = 0; c < lanes; c++)
                for (int64_t n = 0; n < N; n++) outside(scan.state, i, c)[n] = state[(i * N + n) * W + c];
    }
    int load_inputs(int64_t t0) {
        int steps = L - t0 < STEPS ? L - t0 : STEPS;
        load_tile(delta, at<T>(scan.delta, b, channel) + t0 * scan.delta.time, scan.delta.channel, scan.delta.time, lanes, steps, ahead(scan.delta));
        load_tile(u, at<T>(scan.u, b, channel) + t0 * scan.u.time, scan.u.channel, scan.u.time, lanes, steps, ahead(scan.u));
        for (int t = 0; t < steps; t++) store(x + t * W, load<T>(delta + t * W) * load<T>(u + t * W));
        return steps;
    }
    const Strided& of_input(int64_t i) { return i ? scan.y_ones : scan.y; }
    int64_t output_channel(int64_t r) { return (g * R + r) * per_group + first; }
    const T* B(int64_t t0) { return (const T*)scan.B + ((b * scan.size.groups + g) * L + t0) * N; }
    int64_t row_of_C(int64_t r, int64_t t0) { return ((b * scan.size.groups + g) * R + r) * L + t0; }
    const T* C(int64_t r, int64_t t0) { return (const T*)scan.C + row_of_C(r, t0) * N; }
    int64_t index() { return (b * scan.size.groups + g) * ((per_group + W - 1) / W) + first / W; }
    T* begins(int64_t chunk) { return (T*)scan.begins + (index() * ((L + STEPS - 1) / STEPS) + chunk) * scan.size.inputs * N * W; }
};

// What the states n0 .. n0 + COUNT are, in registers: h, and the same driven by ones.
template <typename T, int COUNT, bool ONES> struct States {
    static constexpr int W = WIDTH<T>;
    Vec<T> h[COUNT], ones[COUNT];
    void load_from(const T* states, int64_t n0, int64_t N) {
        for (int n = 0; n < COUNT; n++) {
            h[n] = load<T>(states + (n0 + n) * W);
            if (ONES) ones[n] = load<T>(states + (N + n0 + n) * W);
        }
    }
    void store_to(T* states, int64_t n0, int64_t N) const {
        for (int n = 0; n < COUNT; n++) {
            store(states + (n0 + n) * W, h[n]);
            if (ONES) store(states + (N + n0 + n) * W, ones[n]);
        }
    }
    void clear() {
        for (int n = 0; n < COUNT; n++) h[n] = ones[n] = Vec<T>{};
    }
    void advance(int n, Vec<T> a, T b, Vec<T> x, Vec<T> d) {
        h[n] = a * h[n] + x * b;
        if (ONES) ones[n] = a * ones[n] + d * b;
    }
};

// `steps` steps of the states n0 .. n0 + COUNT
template <typename T, int COUNT, bool ONES> static void forward_states(Block<T>& k, int64_t t0, int steps, int64_t n0) {
    constexpr int W = WIDTH<T>;
    States<T, COUNT, ONES> now;
    now.load_from(k.state, n0, k.N);
    const uint8_t* starts = k.scan.starts ? k.scan.starts + k.b * k.L + t0 : nullptr;
    const T *A2 = k.A2 + n0 * W, *B = k.B(t0) + n0;
    for (int t = 0; t < steps; t++) {
        Vec<T> d = load<T>(k.delta + t * W), x = load<T>(k.x + t * W), of_decay = d;
        if (starts && starts[t]) now.clear(), of_decay = Vec<T>{};  // 0 times an infinite decay would be NaN
        for (int n = 0; n < COUNT; n++) now.advance(n, exp2_of(of_decay * load<T>(A2 + n * W)), B[t * k.N + n], x, d);
        for (int64_t r = 0; r < k.R; r++) {
            const T* C = k.C(r, t0 + t) + n0;
            T* y = k.y + (r * (1 + ONES) * STEPS + t) * W;
            Vec<T> sum = load<T>(y), sum_ones{};
            if (ONES) sum_ones = load<T>(y + STEPS * W);
            for (int n = 0; n < COUNT; n++) {
                sum += now.h[n] * C[n];
                if (ONES) sum_ones += now.ones[n] * C[n];
            }
            store(y, sum);
            if (ONES) store(y + STEPS * W, sum_ones);
        }
    }
    now.store_to(k.state, n0, k.N);
}

template <typename T, bool ONES> static void forward_chunk(Block<T>& k, int64_t t0, int steps) {
    int64_t n = 0;
    for (; n + STATES<ONES> <= k.N; n += STATES<ONES>) forward_states<T, STATES<ONES>, ONES>(k, t0, steps, n);
    for (; n + 4 <= k.N; n += 4) forward_states<T, 4, ONES>(k, t0, steps, n);
    for (; n < k.N; n++) forward_states<T, 1, ONES>(k, t0, steps, n);
}

template <typename T> static void forward(const Scan& s) {
    constexpr int W = WIDTH<T>;
    int64_t K = s.size.inputs, blocks = (s.size.channels / s.size.groups + W - 1) / W, pairs = s.size.batch * s.size.groups;
    int64_t busy = pairs * blocks / (4 * s.size.threads), some = Block<T>::abreast(s.size);  // no sum here goes over blocks
    some = some < busy ? some : busy > 1 ? busy : 1;
    int64_t parts = (blocks + some - 1) / some;
#pragma omp parallel for schedule(dynamic) num_threads(s.size.threads)
    for (int64_t task = 0; task < pairs * parts; task++) {
        int64_t pair = task / parts, from = task % parts * some, to = from + some < blocks ? from + some : blocks;
        Block<T> k(s, pair / s.size.groups, pair % s.size.groups);
        k.for_blocks(from, to, 0, [&] { k.load_decays(), k.load_state(); });
        for (int64_t t0 = 0; t0 < k.L; t0 += STEPS)
            k.for_blocks(from, to, STEPS, [&] {
                if (s.begins) memcpy(k.begins(t0 / STEPS), k.state, sizeof(T) * W * K * k.N);
                int steps = k.load_inputs(t0);
                memset(k.y, 0, sizeof(T) * W * STEPS * k.R * K);
                if (K == 2) forward_chunk<T, true>(k, t0, steps);
                else forward_chunk<T, false>(k, t0, steps);
                for (int64_t r = 0; r < k.R; r++)
                    for (int64_t i = 0; i < K; i++) {
                        const Strided& y = k.of_input(i);
                        T* out = at<T>(y, k.b, k.output_channel(r)) + t0 * y.time;
                        store_tile(k.y + (r * K + i) * STEPS * W, out, y.channel, y.time, k.lanes, steps, k.ahead(y));
                    }
            });
        k.for_blocks(from, to, 0, [&] { k.store_state(); });
    }
}

// Tiles [STEPS][W] that the backward pass adds up over the states, and the states and decays inside a chunk.
template <typename T> struct Gradients {
    static constexpr int W = WIDTH<T>;
    alignas(64) T du[STEPS * W], ddelta[STEPS * W];  // du: of x = delta u, not of u
    alignas(64) T decay[STEPS * STATES<false> * W], h[STEPS * STATES<false> * W], ones[STEPS * STATES<false> * W];
    T *dB, *dC, *dA;  // [L][N], [readings][L][N] of this slice; [channels][N] of this batch entry
};

// A function of its own: inlined, it kept less in the 16 registers of AVX2 and took 1.1 times as long.
template <typename T, int COUNT, bool ONES>
[[gnu::noinline]] static void backward_states(Block<T>& k, Gradients<T>& to, const T* begin, int64_t t0, int steps, int64_t n0) {
    constexpr int W = WIDTH<T>;
    const int64_t N = k.N, R = k.R, L = k.L;
    const uint8_t* starts = k.scan.starts ? k.scan.starts + k.b * L + t0 : nullptr;
    const T *A2 = k.A2 + n0 * W, *B = k.B(t0) + n0, *C0 = k.C(0, t0) + n0, *delta = k.delta, *xs = k.x, *ys = k.y;
    const bool full = k.lanes == W;
    // the states again; slot t holds what step t starts from, which is what step t - 1 left unless a document starts
    States<T, COUNT, ONES> now, g;  // g: their gradients
    now.load_from(begin, n0, N);
    for (int t = 0; t < steps; t++) {
        Vec<T> d = load<T>(delta + t * W), x = load<T>(xs + t * W), of_decay = d;
        if (starts && starts[t]) now.clear(), of_decay = Vec<T>{};
        for (int n = 0; n < COUNT; n++) {
            Vec<T> a = exp2_of(of_decay * load<T>(A2 + n * W));
            store(to.decay + (t * COUNT + n) * W, a);
            store(to.h + (t * COUNT + n) * W, now.h[n]);
            if (ONES) store(to.ones + (t * COUNT + n) * W, now.ones[n]);
            now.advance(n, a, B[t * N + n], x, d);
        }
    }
    Vec<T> dA[COUNT] = {};
    g.load_from(k.state, n0, N);
    for (int t = steps - 1; t >= 0; t--) {
        Vec<T> d = load<T>(delta + t * W), x = load<T>(xs + t * W);
        Vec<T> sums[COUNT];
        for (int64_t r = 0; r < R; r++) {  // now: after step t
            const T *C = C0 + (r * L + t) * N, *y = ys + (r * (1 + ONES) * STEPS + t) * W;
            Vec<T> dy = load<T>(y), dy_ones{};
            if (ONES) dy_ones = load<T>(y + STEPS * W);
            for (int n = 0; n < COUNT; n++) {
                g.h[n] += dy * C[n];
                sums[n] = dy * now.h[n];
                if (ONES) g.ones[n] += dy_ones * C[n];
                if (ONES) sums[n] += dy_ones * now.ones[n];
            }
            if (!full) k.template clear_rest<COUNT>(sums);
            add_lane_sums<T, COUNT>(sums, to.dC + (r * L + t0 + t) * N + n0);
        }
        Vec<T> of_x{}, of_ones{}, of_delta{};
        bool anew = starts && starts[t];
        auto gradients = [&](auto decays) {  // not where a document starts
            for (int n = 0; n < COUNT; n++) {
                T b = B[t * N + n];
                Vec<T> a = load<T>(to.decay + (t * COUNT + n) * W);
                now.h[n] = load<T>(to.h + (t * COUNT + n) * W);
                of_x += g.h[n] * b;
                sums[n] = g.h[n] * x;
                Vec<T> e = g.h[n] * now.h[n];
                g.h[n] *= a;
                if (ONES) {
                    now.ones[n] = load<T>(to.ones + (t * COUNT + n) * W);
                    of_ones += g.ones[n] * b;
                    sums[n] += g.ones[n] * d;
                    e += g.ones[n] * now.ones[n];
                    g.ones[n] *= a;
                }
                if constexpr (decays) {
                    e *= a;
                    of_delta += e * load<T>(A2 + n * W);
                    dA[n] += e * d;
                } else {
                    dA[n] += d * (T)0;
                }
            }
        };
        if (anew) gradients(std::false_type{});
        else gradients(std::true_type{});
        if (!full) k.template clear_rest<COUNT>(sums);
        add_lane_sums<T, COUNT>(sums, to.dB + (t0 + t) * N + n0);
        store(to.du + t * W, load<T>(to.du + t * W) + of_x);
        store(to.ddelta + t * W, load<T>(to.ddelta + t * W) + of_ones + of_delta * (T)0.6931471805599453);
        if (anew) {  // what came before this step reached nothing after it
            g.clear();
            if (t)  // slot t holds the zeros; what step t - 1 left is gone, so make it again
                for (int n = 0; n < COUNT; n++) {
                    int64_t slot = ((t - 1) * COUNT + n) * W;
                    now.h[n] = load<T>(to.h + slot);
                    if (ONES) now.ones[n] = load<T>(to.ones + slot);
                    now.advance(n, load<T>(to.decay + slot), B[(t - 1) * N + n], load<T>(xs + (t - 1) * W), load<T>(delta + (t - 1) * W));
                }
        }
    }
    g.store_to(k.state, n0, N);
    for (int n = 0; n < COUNT; n++)
        for (int c = 0; c < k.lanes; c++) to.dA[(k.channel + c) * N + n0 + n] += dA[n][c];
}

template <typename T, bool ONES> static void backward_chunk(Block<T>& k, Gradients<T>& to, const T* begin, int64_t t0, int steps) {
    int64_t n = 0;
    for (; n + STATES<ONES> <= k.N; n += STATES<ONES>) backward_states<T, STATES<ONES>, ONES>(k, to, begin, t0, steps, n);
    for (; n + 4 <= k.N; n += 4) backward_states<T, 4, ONES>(k, to, begin, t0, steps, n);
    for (; n < k.N; n++) backward_states<T, 1, ONES>(k, to, begin, t0, steps, n);
}

template <typename T> static void backward_tile(Block<T>& k, Gradients<T>& to, int64_t t0) {
    constexpr int W = WIDTH<T>;
    const Scan& s = k.scan;
    int64_t K = s.size.inputs;
    int steps = k.load_inputs(t0);
    for (int64_t r = 0; r < k.R; r++)
        for (int64_t i = 0; i < K; i++) {
            const Strided& y = k.of_input(i);
            const T* from = at<T>(y, k.b, k.output_channel(r)) + t0 * y.time;
            load_tile(k.y + (r * K + i) * STEPS * W, from, y.channel, y.time, k.lanes, steps, k.ahead(y));
        }
    memset(to.du, 0, sizeof to.du);
    memset(to.ddelta, 0, sizeof to.ddelta);
    if (K == 2) backward_chunk<T, true>(k, to, k.begins(t0 / STEPS), t0, steps);
    else backward_chunk<T, false>(k, to, k.begins(t0 / STEPS), t0, steps);
    for (int t = 0; t < steps; t++) {
        Vec<T> dx = load<T>(to.du + t * W);
        store(to.ddelta + t * W, load<T>(to.ddelta + t * W) + dx * load<T>(k.u + t * W));
        store(to.du + t * W, dx * load<T>(k.delta + t * W));
    }
    store_tile(to.du, at<T>(s.du, k.b, k.channel) + t0 * s.du.time, s.du.channel, s.du.time, k.lanes, steps, k.ahead(s.du));
    store_tile(to.ddelta, at<T>(s.ddelta, k.b, k.channel) + t0 * s.ddelta.time, s.ddelta.channel, s.ddelta.time, k.lanes, steps, k.ahead(s.ddelta));
}

// y, y_ones hold their gradients; `state` the gradient of the last state, and of the first when done.
template <typename T> static void backward(const Scan& s) {
    constexpr int W = WIDTH<T>;
    int64_t L = s.size.length, N = s.size.states, G = s.size.groups, S = s.size.slices;
    int64_t blocks = (s.size.channels / G + W - 1) / W;
#pragma omp parallel for schedule(dynamic) num_threads(s.size.threads)
    for (int64_t task = 0; task < s.size.batch * G * S; task++) {
        int64_t slice = task % S, pair = task / S;  // pair: batch entry and group
        Block<T> k(s, pair / G, pair % G);
        std::unique_ptr<Gradients<T>> to(new Gradients<T>);
        to->dB = (T*)s.dB + (slice * s.size.batch * G + pair) * L * N;
        to->dC = (T*)s.dC + (slice * s.size.batch * G + pair) * k.R * L * N;
        to->dA = (T*)s.dA + k.b * s.size.channels * N;
        int64_t end = blocks * (slice + 1) / S, some = Block<T>::abreast(s.size);
        for (int64_t from = blocks * slice / S; from < end; from += some) {
            int64_t last = from + some < end ? from + some : end;
            k.for_blocks(from, last, 0, [&] { k.load_decays(), k.load_state(); });
            for (int64_t t0 = (L - 1) / STEPS * STEPS; t0 >= 0; t0 -= STEPS) k.for_blocks(from, last, -STEPS, [&] { backward_tile(k, *to, t0); });
            k.for_blocks(from, last, 0, [&] { k.store_state(); });
        }
    }
}

struct Update {  // one step of every channel: x, dt, z, out [batch, heads, dim]; B, C [batch, groups, N]; state [batch, heads, dim, N]
    int64_t batch, heads, dim, groups, states, softplus, threads;  // update.py packs them in this order
    void* state;
    const void *x, *dt, *A, *B, *C, *D, *z, *dt_bias;  // A [heads, dim, N]; D, dt_bias [heads, dim]; the last three may be null
    void* out;
};

constexpr int CHANNELS = 16, TOGETHER = 8;  // of a block, at any width of vectors; of those whose states advance side by side

// One vector of states of one channel: what they add to y, lane by lane. `odd` becomes NaN where A is not finite.
template <typename T> static inline Vec<T> update_vector(T* state, const T* A, Vec<T> b, Vec<T> c, T scale, T drive, Vec<T>& odd) {
    Vec<T> a = load<T>(A), h = exp2_of(a * scale) * load<T>(state) + b * drive;
    odd += a * (T)0;
    store(state, h);
    return h * c;
}

// The states n .. N of COUNT channels, in vectors that are filled up with zeros.
template <typename T, int COUNT>
[[gnu::noinline]] static void update_rest(int64_t n, int64_t N, T* state, const T* A, const T* B, const T* C, const T* scale, const T* drive, Vec<T>* sums, Vec<T>& odd) {
    constexpr int W = WIDTH<T>;
    T rest[4][W] = {};
    memcpy(rest[0], B + n, sizeof(T) * (N - n));
    memcpy(rest[1], C + n, sizeof(T) * (N - n));
    for (int j = 0; j < COUNT; j++) {
        memcpy(rest[2], A + j * N + n, sizeof(T) * (N - n));
        memcpy(rest[3], state + j * N + n, sizeof(T) * (N - n));
        sums[j] += update_vector(rest[3], rest[2], load<T>(rest[0]), load<T>(rest[1]), scale[j], drive[j], odd);
        memcpy(state + j * N + n, rest[3], sizeof(T) * (N - n));
    }
}

// COUNT channels that share B and C; y[j] += the reading of channel j.
template <typename T, int COUNT>
static inline void update_channels(int64_t N, T* state, const T* A, const T* B, const T* C, const T* scale, const T* drive, T* y, Vec<T>& odd) {
    constexpr int W = WIDTH<T>;
    Vec<T> sums[COUNT] = {};
    int64_t n = 0;
    for (; n + W <= N; n += W) {
        Vec<T> b = load<T>(B + n), c = load<T>(C + n);
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; j++) sums[j] += update_vector(state + j * N + n, A + j * N + n, b, c, scale[j], drive[j], odd);
    }
    if (n < N) update_rest<T, COUNT>(n, N, state, A, B, C, scale, drive, sums, odd);
    add_lane_sums<T, COUNT>(sums, y);
}

// Up to CHANNELS channels of one batch entry; `first` is among all its channels. Whether their A is finite.
template <typename T> static bool update_block(const Update& u, int64_t b, int64_t first) {
    constexpr int W = WIDTH<T>;
    int64_t channels = u.heads * u.dim, per_group = channels / u.groups, N = u.states, count = channels - first < CHANNELS ? channels - first : CHANNELS;
    auto copy = [&](T* to, const void* from) {  // a constant size needs no call
        if (count == CHANNELS) memcpy(to, from, sizeof(T) * CHANNELS);
        else memcpy(to, from, sizeof(T) * count);
    };
    alignas(64) T x[CHANNELS] = {}, dt[CHANNELS] = {}, y[CHANNELS] = {}, bias[CHANNELS] = {}, D[CHANNELS] = {}, z[CHANNELS] = {};
    alignas(64) T scale[CHANNELS], drive[CHANNELS];
    int64_t here = b * channels + first;
    copy(x, (const T*)u.x + here);
    copy(dt, (const T*)u.dt + here);
    if (u.dt_bias) copy(bias, (const T*)u.dt_bias + first);
    if (u.D) copy(D, (const T*)u.D + first);
    if (u.z) copy(z, (const T*)u.z + here);
    for (int i = 0; i < CHANNELS; i += W) {
        Vec<T> d = load<T>(dt + i) + load<T>(bias + i);
        if (u.softplus) d = softplus_of<T>(d);
        store(scale + i, d * (T)1.4426950408889634);
        store(drive + i, d * load<T>(x + i));
    }
    Vec<T> odd{};
    for (int64_t i = 0; i < count;) {
        int64_t group = (first + i) / per_group, shared = (b * u.groups + group) * N;
        const T *A = (const T*)u.A + (first + i) * N, *B = (const T*)u.B + shared, *C = (const T*)u.C + shared;
        T* state = (T*)u.state + (here + i) * N;
        if (i + TOGETHER <= count && first + i + TOGETHER <= (group + 1) * per_group) {
            update_channels<T, TOGETHER>(N, state, A, B, C, scale + i, drive + i, y + i, odd);
            i += TOGETHER;
        } else {
            update_channels<T, 1>(N, state, A, B, C, scale + i, drive + i, y + i, odd);
            i += 1;
        }
    }
    for (int i = 0; i < CHANNELS; i += W) {
        Vec<T> gate = load<T>(z + i), out = load<T>(y + i) + load<T>(D + i) * load<T>(x + i);
        store(y + i, u.z ? out * gate / (exp_of<T>(-gate) + (T)1) : out);
    }
    memcpy((T*)u.out + here, y, sizeof(T) * count);
    bool finite = true;
    for (int i = 0; i < W; i++) finite &= odd[i] == 0;
    return finite;
}

template <typename T> static int update(const Update& u) {
    int64_t blocks = (u.heads * u.dim + CHANNELS - 1) / CHANNELS, tasks = u.batch * blocks;
    int finite = 1;
    auto task = [&](int64_t i) { return update_block<T>(u, i / blocks, i % blocks * CHANNELS); };
    if (u.threads == 1) {  // a parallel region of one thread would still put torch's others to sleep: as long as the step
        for (int64_t i = 0; i < tasks; i++) finite &= task(i);
    } else {
#pragma omp parallel for num_threads(u.threads) reduction(& : finite)
        for (int64_t i = 0; i < tasks; i++) finite &= task(i);
    }
    return finite;
}

extern "C" {
int update_float(const Update* u) { return update<float>(*u); }  // 0 if A is not finite
int update_double(const Update* u) { return update<double>(*u); }
void forward_float(const Scan* s) { forward<float>(*s); }
void forward_double(const Scan* s) { forward<double>(*s); }
void backward_float(const Scan* s) { backward<float>(*s); }
void backward_double(const Scan* s) { backward<double>(*s); }
int lanes_of_float() { return WIDTH<float>; }
int chunk_steps() { return STEPS; }
}
