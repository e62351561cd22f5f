// The steps of a chunk of the selective scan, forward and backward, for a block of channels.
#pragma once
#include <type_traits>

#include "scan_block.h"

// Runs the recurrence of the states n0 .. n0 + COUNT over the `steps` steps from t0 on.
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

// Tiles [STEPS][W] that the backward pass sums over the states, and the states and decays inside a chunk.
template <typename T> struct Gradients {
    static constexpr int W = WIDTH<T>;
    alignas(64) T du[STEPS * W], ddelta[STEPS * W];  // du: at first the gradient of x = delta u
    alignas(64) T decay[STEPS * STATES<false> * W], h[STEPS * STATES<false> * W], ones[STEPS * STATES<false> * W];
    T *dB, *dC, *dA;  // [L][N] and [queries][L][N] of this slice; [channels][N] of this batch entry
};

// It is not inlined, because it then kept less in the 16 registers of AVX2 and took 1.1 times as long.
template <typename T, int COUNT, bool ONES>
[[gnu::noinline]] static void backward_states(Block<T>& k, Gradients<T>& to, const T* chunk_state, int64_t t0,
                                              int steps, int64_t n0) {
    constexpr int W = WIDTH<T>;
    const int64_t N = k.N, R = k.R, L = k.L;
    const uint8_t* starts = k.scan.starts ? k.scan.starts + k.b * L + t0 : nullptr;
    const T *A2 = k.A2 + n0 * W, *B = k.B(t0) + n0, *C0 = k.C(0, t0) + n0, *delta = k.delta, *xs = k.x, *ys = k.y;
    const bool full = k.lanes == W;
    // compute the states again; slot t holds what step t starts from: the state after t - 1, or 0 if a document starts
    States<T, COUNT, ONES> now, g;  // g: their gradients
    now.load_from(chunk_state, n0, N);
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
        for (int64_t r = 0; r < R; r++) {  // `now` holds the states after step t
            const T *C = C0 + (r * L + t) * N, *y = ys + (r * (1 + ONES) * STEPS + t) * W;
            Vec<T> dy = load<T>(y), dy_ones{};
            if (ONES) dy_ones = load<T>(y + STEPS * W);
            for (int n = 0; n < COUNT; n++) {
                g.h[n] += dy * C[n];
                sums[n] = dy * now.h[n];
                if (ONES) g.ones[n] += dy_ones * C[n];
                if (ONES) sums[n] += dy_ones * now.ones[n];
            }
            if (!full) k.template clear_unused_lanes<COUNT>(sums);
            add_lane_sums<T, COUNT>(sums, to.dC + (r * L + t0 + t) * N + n0);
        }
        Vec<T> of_x{}, of_ones{}, of_delta{};
        bool fresh = starts && starts[t];
        auto gradients = [&](auto decays) {  // `decays` is false where a document starts
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
        if (fresh) gradients(std::false_type{});
        else gradients(std::true_type{});
        if (!full) k.template clear_unused_lanes<COUNT>(sums);
        add_lane_sums<T, COUNT>(sums, to.dB + (t0 + t) * N + n0);
        store(to.du + t * W, load<T>(to.du + t * W) + of_x);
        store(to.ddelta + t * W, load<T>(to.ddelta + t * W) + of_ones + of_delta * (T)0.6931471805599453);
        if (fresh) {  // the steps before this one reached nothing after it
            g.clear();
            if (t)  // slot t holds zeros in place of the state after t - 1, which is computed again
                for (int n = 0; n < COUNT; n++) {
                    int64_t slot = ((t - 1) * COUNT + n) * W;
                    now.h[n] = load<T>(to.h + slot);
                    if (ONES) now.ones[n] = load<T>(to.ones + slot);
                    Vec<T> x = load<T>(xs + (t - 1) * W), d = load<T>(delta + (t - 1) * W);
                    now.advance(n, load<T>(to.decay + slot), B[(t - 1) * N + n], x, d);
                }
        }
    }
    g.store_to(k.state, n0, N);
    for (int n = 0; n < COUNT; n++)
        for (int c = 0; c < k.lanes; c++) to.dA[(k.channel + c) * N + n0 + n] += dA[n][c];
}

template <typename T, bool ONES>
static void backward_chunk(Block<T>& k, Gradients<T>& to, const T* chunk_state, int64_t t0, int steps) {
    constexpr int COUNT = STATES<ONES>;
    int64_t n = 0;
    for (; n + COUNT <= k.N; n += COUNT) backward_states<T, COUNT, ONES>(k, to, chunk_state, t0, steps, n);
    for (; n + 4 <= k.N; n += 4) backward_states<T, 4, ONES>(k, to, chunk_state, t0, steps, n);
    for (; n < k.N; n++) backward_states<T, 1, ONES>(k, to, chunk_state, t0, steps, n);
}
