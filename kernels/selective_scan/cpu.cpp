// The selective scan on a CPU. README.md has the derivation, and counts bytes and operations.
//
// A vector holds as many channels as it has lanes; the states of a channel are independent chains, so that the latency
// of one step hides behind the others, and no step needs a sum over lanes. The backward pass is cut into (batch, group,
// slice of the group's channels). The number of slices depends on shapes alone, so sums over channels have one order,
// whatever the number of threads is.
//
// b batch · d channel · n state · t time · g group · r query · i input: the values, then (normalized) ones
#include "../scan_steps.h"
#include "update.h"

template <typename T> static void forward(const Scan& s) {
    constexpr int W = WIDTH<T>;
    int64_t K = s.size.inputs, pairs = s.size.batch * s.size.groups;
    int64_t blocks = (s.size.channels / s.size.groups + W - 1) / W;
    // no sum here goes over blocks, so how many are interleaved may depend on the number of threads
    int64_t busy = pairs * blocks / (4 * s.size.threads), together = Block<T>::interleaved_blocks(s.size);
    together = together < busy ? together : busy > 1 ? busy : 1;
    int64_t parts = (blocks + together - 1) / together;
#pragma omp parallel for schedule(dynamic) num_threads(s.size.threads)
    for (int64_t task = 0; task < pairs * parts; task++) {
        int64_t pair = task / parts, from = task % parts * together;
        int64_t to = from + together < blocks ? from + together : blocks;
        Block<T> k(s, pair / s.size.groups, pair % s.size.groups);
        k.for_blocks(from, to, 0, [&] { k.load_decays(), k.load_state(); });
        for (int64_t t0 = 0; t0 < k.L; t0 += STEPS)
            k.for_blocks(from, to, STEPS, [&] {
                if (s.chunk_states) memcpy(k.chunk_state(t0 / STEPS), k.state, sizeof(T) * W * K * k.N);
                int steps = k.load_inputs(t0);
                memset(k.y, 0, sizeof(T) * W * STEPS * k.R * K);
                if (K == 2) forward_chunk<T, true>(k, t0, steps);
                else forward_chunk<T, false>(k, t0, steps);
                for (int64_t r = 0; r < k.R; r++)
                    for (int64_t i = 0; i < K; i++) {
                        const T* tile = k.y + (r * K + i) * STEPS * W;
                        k.store(tile, k.output_of(i), k.output_channel(r), t0, steps);
                    }
            });
        k.for_blocks(from, to, 0, [&] { k.store_state(); });
    }
}

template <typename T> static void backward_tile(Block<T>& k, Gradients<T>& to, int64_t t0) {
    constexpr int W = WIDTH<T>;
    const Scan& s = k.scan;
    int64_t K = s.size.inputs;
    int steps = k.load_inputs(t0);
    for (int64_t r = 0; r < k.R; r++)
        for (int64_t i = 0; i < K; i++)
            k.load(k.y + (r * K + i) * STEPS * W, k.output_of(i), k.output_channel(r), t0, steps);
    memset(to.du, 0, sizeof to.du);
    memset(to.ddelta, 0, sizeof to.ddelta);
    if (K == 2) backward_chunk<T, true>(k, to, k.chunk_state(t0 / STEPS), t0, steps);
    else backward_chunk<T, false>(k, to, k.chunk_state(t0 / STEPS), t0, steps);
    for (int t = 0; t < steps; t++) {
        Vec<T> dx = load<T>(to.du + t * W);
        store(to.ddelta + t * W, load<T>(to.ddelta + t * W) + dx * load<T>(k.u + t * W));
        store(to.du + t * W, dx * load<T>(k.delta + t * W));
    }
    k.store(to.du, s.du, k.channel, t0, steps);
    k.store(to.ddelta, s.ddelta, k.channel, t0, steps);
}

// `state` is the gradient of the last state, and of the first when done.
template <typename T> static void backward(const Scan& s) {
    constexpr int W = WIDTH<T>;
    int64_t L = s.size.length, N = s.size.states, G = s.size.groups, S = s.size.slices;
    int64_t blocks = (s.size.channels / G + W - 1) / W;
#pragma omp parallel for schedule(dynamic) num_threads(s.size.threads)
    for (int64_t task = 0; task < s.size.batch * G * S; task++) {
        int64_t slice = task % S, pair = task / S;  // a pair is a batch entry and a group
        Block<T> k(s, pair / G, pair % G);
        std::unique_ptr<Gradients<T>> to(new Gradients<T>);
        to->dB = (T*)s.dB + (slice * s.size.batch * G + pair) * L * N;
        to->dC = (T*)s.dC + (slice * s.size.batch * G + pair) * k.R * L * N;
        to->dA = (T*)s.dA + k.b * s.size.channels * N;
        int64_t end = blocks * (slice + 1) / S, together = Block<T>::interleaved_blocks(s.size);
        for (int64_t from = blocks * slice / S; from < end; from += together) {
            int64_t last = from + together < end ? from + together : end;
            k.for_blocks(from, last, 0, [&] { k.load_decays(), k.load_state(); });
            for (int64_t t0 = (L - 1) / STEPS * STEPS; t0 >= 0; t0 -= STEPS)
                k.for_blocks(from, last, -STEPS, [&] { backward_tile(k, *to, t0); });
            k.for_blocks(from, last, 0, [&] { k.store_state(); });
        }
    }
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
