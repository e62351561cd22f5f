// The memory of a task of the selective scan: blocks of channels, and their states in registers.
#pragma once
#include <memory>

#include "vectors.h"

// Steps per chunk. The states before each chunk are kept for the backward pass, which computes the others again.
constexpr int STEPS = 64;
constexpr int MAX_INTERLEAVED = 8, INTERLEAVED_BYTES = 1 << 16;  // most blocks in a group, and the size of their states
template <bool ONES> constexpr int STATES = ONES ? 4 : 8;  // states that fit in registers with their gradients

struct Sizes {
    int64_t batch, channels, length, states, groups, queries, inputs, slices, threads;
};
struct Strided {
    void* data;
    int64_t batch, channel, time;  // strides
};

// The arguments of a call; backward, y and y_ones hold their gradients, and `state` the gradient of the last state.
struct Scan {
    Sizes size;
    Strided u, delta, y, y_ones, du, ddelta;  // y: [batch, groups x queries x channels of a group, length]
    void *A2, *B, *C;                         // A2 = A / ln 2 [channels, N]; [batch, groups (x queries), length, N]
    void *state, *chunk_states;               // [inputs, batch, channels, N]; [batch, blocks, chunks, inputs, N, W]
    void *dA, *dB, *dC;                       // [batch, channels, N]; [slices, ...], as B and C
    const uint8_t* starts;                    // [batch, length] or null
};

template <typename T> static T* at(const Strided& s, int64_t b, int64_t channel) {
    return (T*)s.data + b * s.batch + channel * s.channel;
}

// Blocks of channels of one batch entry, and what all loops over one of them need. Blocks are interleaved: several go
// through a chunk one after another before any goes to the next chunk, so that the chunk's B and C, and their
// gradients, stay in the nearest cache, whatever the length is.
template <typename T> struct Block {
    static constexpr int W = WIDTH<T>;
    const Scan& scan;
    int64_t b, g, first;  // batch entry, group, first channel inside the group
    int lanes;
    typename Lanes<T>::bits is_channel;   // by lane: -1 for a channel, else 0
    int64_t L, N, R, per_group, channel;  // channel: the first, counted among all channels
    int64_t next_channel, next_time;      // distance from this tile to the one after it
    std::unique_ptr<Vec<T>[]> memory;     // aligned
    T *state, *A2, *delta, *u, *x, *y;    // [inputs][N][W], [N][W], tiles [STEPS][W]; y [queries][inputs][STEPS][W]

    Block(const Scan& s, int64_t b_, int64_t g_)
        : scan(s), b(b_), g(g_), L(s.size.length), N(s.size.states), R(s.size.queries) {
        int64_t K = s.size.inputs;
        per_group = s.size.channels / s.size.groups;
        memory.reset(new Vec<T>[MAX_INTERLEAVED * (K + 1) * N + STEPS * (3 + R * K)]);
        delta = (T*)(memory.get() + MAX_INTERLEAVED * (K + 1) * N);
        u = delta + W * STEPS, x = u + W * STEPS, y = x + W * STEPS;
    }
    // How many blocks are interleaved.
    static int64_t interleaved_blocks(const Sizes& size) {
        int64_t fit = INTERLEAVED_BYTES / (int64_t)((size.inputs + 1) * size.states * sizeof(Vec<T>));
        return fit < 1 ? 1 : fit < MAX_INTERLEAVED ? fit : MAX_INTERLEAVED;
    }
    // Calls `each` for every block from .. to; `step` is the distance in time to the next chunk.
    template <typename Each> void for_blocks(int64_t from, int64_t to, int64_t step, Each each) {
        for (int64_t block = from; block < to; block++) {
            state = (T*)memory.get() + (block - from) * (scan.size.inputs + 1) * N * W;
            A2 = state + scan.size.inputs * N * W;
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
    // Sets the lanes without a channel to 0, which they are already, except after 0 x infinity.
    template <int COUNT> void clear_unused_lanes(Vec<T>* sums) {
        for (int n = 0; n < COUNT; n++) sums[n] = (Vec<T>)((typename Lanes<T>::bits)sums[n] & is_channel);
    }
    T* state_of(void* states, int64_t input, int c) {  // in a tensor [inputs, batch, channels, N]
        return (T*)states + ((input * scan.size.batch + b) * scan.size.channels + channel + c) * N;
    }
    void load_state() {
        memset(state, 0, sizeof(T) * W * N * scan.size.inputs);
        for (int64_t i = 0; i < scan.size.inputs; i++)
            for (int c = 0; c < lanes; c++)
                for (int64_t n = 0; n < N; n++) state[(i * N + n) * W + c] = state_of(scan.state, i, c)[n];
    }
    void store_state() {
        for (int64_t i = 0; i < scan.size.inputs; i++)
            for (int c = 0; c < lanes; c++)
                for (int64_t n = 0; n < N; n++) state_of(scan.state, i, c)[n] = state[(i * N + n) * W + c];
    }
    void load(T* tile, const Strided& s, int64_t first_channel, int64_t t0, int steps) {
        load_tile(tile, at<T>(s, b, first_channel) + t0 * s.time, s.channel, s.time, lanes, steps, ahead(s));
    }
    void store(const T* tile, const Strided& s, int64_t first_channel, int64_t t0, int steps) {
        store_tile(tile, at<T>(s, b, first_channel) + t0 * s.time, s.channel, s.time, lanes, steps, ahead(s));
    }
    // Loads delta, u and x = delta u of the chunk at t0; returns the number of its steps.
    int load_inputs(int64_t t0) {
        int steps = L - t0 < STEPS ? L - t0 : STEPS;
        load(delta, scan.delta, channel, t0, steps);
        load(u, scan.u, channel, t0, steps);
        for (int t = 0; t < steps; t++) ::store(x + t * W, ::load<T>(delta + t * W) * ::load<T>(u + t * W));
        return steps;
    }
    const Strided& output_of(int64_t input) { return input ? scan.y_ones : scan.y; }
    int64_t output_channel(int64_t r) { return (g * R + r) * per_group + first; }
    const T* B(int64_t t0) { return (const T*)scan.B + ((b * scan.size.groups + g) * L + t0) * N; }
    int64_t row_of_C(int64_t r, int64_t t0) { return ((b * scan.size.groups + g) * R + r) * L + t0; }
    const T* C(int64_t r, int64_t t0) { return (const T*)scan.C + row_of_C(r, t0) * N; }
    int64_t index() { return (b * scan.size.groups + g) * ((per_group + W - 1) / W) + first / W; }
    T* chunk_state(int64_t chunk) {
        return (T*)scan.chunk_states + (index() * ((L + STEPS - 1) / STEPS) + chunk) * scan.size.inputs * N * W;
    }
};

// The states n0 .. n0 + COUNT in registers: h, and the same driven by ones.
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
