// The chunk scan on a CPU. README.md has the derivation, and counts bytes and operations.
//
// A head of a batch entry walks over its chunks with the state in its cache. Every product of a chunk is one call of
// `multiply`. A task of the backward pass has a slice of the heads of a group, one after another, and adds up their
// gradients of B and C. The number of slices depends on shapes alone, so sums have one order, whatever the number of
// threads is. A chunk whose results are not all finite is computed again, step by step: in a product, 0 x NaN would
// reach what the recurrence does not reach, and 0 x infinity would be NaN.
//
// t, s time in a chunk · n state · p channel · r query · F log of the decay since the chunk's start
#include <cmath>
#include <vector>

#include "../matrix.h"

constexpr int STEPS = 64;  // steps per chunk

// The arguments of a call. `state` is the first state, and the last when done; backward it is the gradient of the last
// state, and of the first when done.
struct Scan {
    int64_t batch, length, heads, groups, groups_of_C, queries, states, channels, slices, threads;
    const void *x, *B, *C;         // [batch, L, H, P], [batch, L, G, N], [batch, L, G or H, R, N]
    const double* log_decay;       // [batch, L, H]
    const int64_t* document_ids;   // [batch, L] or null
    void* state;                   // [batch, H, N, P]
    void* chunk_states;            // [batch, H, chunks, N, padded P]: the state before each chunk
    void* y;                       // [batch, L, H, R, P]
    void *dx, *dB, *dC;            // as x, [slices, *B], and [slices, *C] or [1, *C] if C has a group per head
    double* dlog_decay;
};

// The memory of a task, and its place in the tensors.
template <typename T> struct Head {
    static constexpr int W = WIDTH<T>;
    const Scan& scan;
    int64_t b, h, L, H, R, N, P, Pp, Np, chunks;
    int64_t row_B, row_C;      // numbers from a step of B, C to the next
    int64_t slice = 0;         // backward: the slice of dB and dC to which this head belongs
    bool adds = false;         // whether another head has stored its part there
    std::vector<Vec<T>> memory;
    T *S, *next;                        // the state (backward: its gradient) before and after the chunk [N][Pp]
    T *x, *xs, *Bt, *decay, *scores;    // x and scaled x [STEPS][Pp]; B^T [N][STEPS]; [STEPS][STEPS] twice
    T *DT, *ST, *xT;                    // backward: the transposes of the state's gradient, of the state and of x
    T *dy, *products, *tile_p, *tile_n, *row;  // backward: more blocks of steps
    double F[STEPS];
    T decay_in[STEPS], decay_out[STEPS];  // from the state that enters to t; from t to the chunk's end
    T chunk_decay;                        // from end to end
    int first[STEPS];                     // the first step of t's document in this chunk

    Head(const Scan& s, int64_t b, int64_t h, bool backward)
        : scan(s), b(b), h(h), L(s.length), H(s.heads), R(s.queries), N(s.states), P(s.channels),
          Pp(padded<T>(s.channels)), Np(padded<T>(s.states)), chunks((s.length + STEPS - 1) / STEPS),
          row_B(s.groups * s.states), row_C(s.groups_of_C * s.queries * s.states) {
        int64_t sizes[] = {N * Pp, N * Pp, STEPS * Pp, STEPS * Pp, N * STEPS, STEPS * STEPS, STEPS * STEPS};
        int64_t more[] = {P * Np, P * Np, P * STEPS, STEPS * Pp, STEPS * STEPS, STEPS * Pp, STEPS * Np, STEPS * Np};
        T** places[] = {&S, &next, &x, &xs, &Bt, &decay, &scores};
        T** others[] = {&DT, &ST, &xT, &dy, &products, &tile_p, &tile_n, &row};
        int64_t total = 0;
        for (int64_t n : sizes) total += n;
        if (backward) for (int64_t n : more) total += n;
        memory.assign(total / W + 1, Vec<T>{});
        T* at = (T*)memory.data();
        for (int i = 0; i < 7; i++) *places[i] = at, at += sizes[i];
        if (backward) for (int i = 0; i < 8; i++) *others[i] = at, at += more[i];
    }
    int64_t in_B(int64_t t) { return (b * L + t) * row_B + h / (H / scan.groups) * N; }
    int64_t in_C(int64_t t, int64_t r) { return (b * L + t) * row_C + (h / (H / scan.groups_of_C) * R + r) * N; }
    const T* B(int64_t t) { return (const T*)scan.B + in_B(t); }
    const T* C(int64_t t, int64_t r) { return (const T*)scan.C + in_C(t, r); }
    bool shares_C() { return scan.groups_of_C < H; }
    T* dB(int64_t t) { return (T*)scan.dB + slice * scan.batch * L * row_B + in_B(t); }
    T* dC(int64_t t, int64_t r) { return (T*)scan.dC + (shares_C() ? slice : 0) * scan.batch * L * row_C + in_C(t, r); }
    T* y(int64_t t, int64_t r) { return (T*)scan.y + (((b * L + t) * H + h) * R + r) * P; }
    T decay_of(int64_t t) { return std::exp(scan.log_decay[(b * L + t) * H + h]); }
    bool starts(int64_t t) {  // whether a document starts at t
        return scan.document_ids && t > 0 && scan.document_ids[b * L + t] != scan.document_ids[b * L + t - 1];
    }
    T* chunk_state(int64_t chunk) { return (T*)scan.chunk_states + ((b * H + h) * chunks + chunk) * N * Pp; }

    void load_state(T* to) {
        for (int64_t n = 0; n < N; n++) {
            memcpy(to + n * Pp, (T*)scan.state + ((b * H + h) * N + n) * P, sizeof(T) * P);
            for (int64_t p = P; p < Pp; p++) to[n * Pp + p] = 0;
        }
    }
    void store_state(const T* from) {
        for (int64_t n = 0; n < N; n++)
            memcpy((T*)scan.state + ((b * H + h) * N + n) * P, from + n * Pp, sizeof(T) * P);
    }
    // Loads x, the decays and the transpose of B of the chunk at t0; returns the number of its steps.
    int enter(int64_t t0) {
        int steps = L - t0 < STEPS ? L - t0 : STEPS;
        double sum = 0;
        for (int t = 0; t < steps; t++) {
            memcpy(x + t * Pp, (const T*)scan.x + ((b * L + t0 + t) * H + h) * P, sizeof(T) * P);
            F[t] = sum += scan.log_decay[(b * L + t0 + t) * H + h];
            first[t] = 0;
        }
        bool same = true, whole = true;  // one document from the chunk before to t = 0; from t = 0 to the chunk's end
        if (scan.document_ids) {
            const int64_t* ids = scan.document_ids + b * L + t0;
            same = t0 == 0 || ids[-1] == ids[0];
            for (int t = 1; t < steps; t++) first[t] = ids[t] == ids[t - 1] ? first[t - 1] : t;
            whole = first[steps - 1] == 0;
        }
        for (int t = 0; t < steps; t++) {
            decay_in[t] = same && first[t] == 0 ? std::exp(F[t]) : 0;
            decay_out[t] = first[t] == first[steps - 1] ? std::exp(F[steps - 1] - F[t]) : 0;
        }
        chunk_decay = same && whole ? std::exp(F[steps - 1]) : 0;
        // exp(F_t - F_s) from the difference of two doubles, each a sum of two T
        alignas(64) T high[STEPS], low[STEPS], index[STEPS];
        constexpr double LOG2E = 1.4426950408889634;
        for (int t = 0; t < STEPS; t++) {
            double f = t < steps ? F[t] * LOG2E : 0;
            high[t] = f, low[t] = f - (double)high[t], index[t] = t;
        }
        for (int t = 0; t < steps; t++)
            for (int s = 0; s < STEPS; s += W) {
                Vec<T> i = load<T>(index + s), e = (high[t] - load<T>(high + s)) + (low[t] - load<T>(low + s));
                e = exp2_of(i > (T)t ? Vec<T>{} : e);  // s > t is not used, and could overflow
                e = i > (T)t ? Vec<T>{} : e;
                store(decay + t * STEPS + s, i < (T)first[t] ? Vec<T>{} : e);
            }
        transpose(steps, N, B(t0), row_B, Bt, STEPS);
        return steps;
    }
    // Stores rows [steps][Np] of dB or dC, or adds them to those of the slice's heads before this one.
    void store_rows(int steps, const T* from, T* to, int64_t row_to, bool add) {
        for (int t = 0; t < steps; t++, from += Np, to += row_to)
            if (add) for (int64_t n = 0; n < N; n++) to[n] += from[n];
            else memcpy(to, from, sizeof(T) * N);
    }
    void scale(int steps, const T* from, const T* by, T* to) {
        for (int t = 0; t < steps; t++)
            for (int64_t p = 0; p < Pp; p += W) store(to + t * Pp + p, load<T>(from + t * Pp + p) * by[t]);
    }
    void score(int steps, int64_t t0, int64_t r) {  // the lower triangle of C B^T
        multiply<T>(steps, STEPS, N, C(t0, r), row_C, 1, Bt, STEPS, scores, STEPS, false, LOWER_OUT);
    }
};

// One step of the recurrence, from `before` to `after`, which may be the same.
template <typename T> static void advance(Head<T>& k, int64_t t, const T* x, const T* before, T* after) {
    bool fresh = k.starts(t);
    T decay = k.decay_of(t);
    for (int64_t n = 0; n < k.N; n++)
        for (int64_t p = 0; p < k.P; p++)
            after[n * k.Pp + p] = (fresh ? 0 : decay * before[n * k.Pp + p]) + k.B(t)[n] * x[p];
}

template <typename T> static void forward_by_steps(Head<T>& k, int64_t t0, int steps) {
    for (int t = 0; t < steps; t++) {
        advance(k, t0 + t, k.x + t * k.Pp, k.S, k.S);
        for (int64_t r = 0; r < k.R; r++) {
            T* y = k.y(t0 + t, r);
            for (int64_t p = 0; p < k.P; p++) y[p] = 0;
            for (int64_t n = 0; n < k.N; n++)
                for (int64_t p = 0; p < k.P; p++) y[p] += k.C(t0 + t, r)[n] * k.S[n * k.Pp + p];
        }
    }
}

template <typename T> static void forward(const Scan& s) {
    constexpr int W = WIDTH<T>;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < s.batch * s.heads; task++) {
        Head<T> k(s, task / s.heads, task % s.heads, false);
        std::vector<Vec<T>> tile(STEPS * k.Pp / W);
        T* y = (T*)tile.data();
        k.load_state(k.S);
        for (int64_t t0 = 0; t0 < k.L; t0 += STEPS) {
            if (s.chunk_states) memcpy(k.chunk_state(t0 / STEPS), k.S, sizeof(T) * k.N * k.Pp);
            int steps = k.enter(t0);
            bool finite = true;
            for (int64_t r = 0; r < k.R; r++) {
                k.score(steps, t0, r);
                for (int64_t i = 0; i < steps * STEPS; i += W)
                    store(k.scores + i, load<T>(k.scores + i) * load<T>(k.decay + i));
                multiply<T>(steps, k.Pp, k.N, k.C(t0, r), k.row_C, 1, k.S, k.Pp, y, k.Pp, false);
                k.scale(steps, y, k.decay_in, y);
                multiply<T>(steps, k.Pp, steps, k.scores, STEPS, 1, k.x, k.Pp, y, k.Pp, true, LOWER_A);
                finite &= all_finite(steps * k.Pp, y);
                for (int t = 0; t < steps; t++) memcpy(k.y(t0 + t, r), y + t * k.Pp, sizeof(T) * k.P);
            }
            k.scale(steps, k.x, k.decay_out, k.xs);
            for (int64_t i = 0; i < k.N * k.Pp; i += W) store(k.next + i, load<T>(k.S + i) * k.chunk_decay);
            multiply<T>(k.N, k.Pp, steps, k.Bt, STEPS, 1, k.xs, k.Pp, k.next, k.Pp, true);
            if (finite && all_finite(k.N * k.Pp, k.next)) std::swap(k.S, k.next);
            else forward_by_steps(k, t0, steps);
        }
        k.store_state(k.S);
    }
}

// Sums are in double, because the gradient of a decay is a small difference of large numbers.
template <typename T> static Wide<T> widened(Vec<T> v) { return __builtin_convertvector(v, Wide<T>); }
template <typename T> static double sum_of_lanes(Wide<T> v) {
    double total = 0;
    for (int i = 0; i < WIDTH<T>; i++) total += v[i];
    return total;
}

template <typename T> static double dot(int64_t n, const T* a, const T* b) {
    constexpr int W = WIDTH<T>;
    Wide<T> sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W)
        for (int j = 0; j < 2; j++) sums[j] += widened<T>(load<T>(a + i + j * W)) * widened<T>(load<T>(b + i + j * W));
    for (; i + W <= n; i += W) sums[0] += widened<T>(load<T>(a + i)) * widened<T>(load<T>(b + i));
    double sum = sum_of_lanes<T>(sums[0] + sums[1]);
    for (; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

// The gradients of a chunk's steps. k.S is the gradient of the state that leaves the chunk, and becomes that of the
// state that enters it.
template <typename T> static void backward_by_steps(Head<T>& k, int64_t t0, int steps) {
    int64_t N = k.N, P = k.P, Pp = k.Pp;
    std::vector<T> states((steps + 1) * N * Pp);  // the state before each step, and after the last
    memcpy(states.data(), k.chunk_state(t0 / STEPS), sizeof(T) * N * Pp);
    for (int t = 0; t < steps; t++) advance(k, t0 + t, k.x + t * Pp, &states[t * N * Pp], &states[(t + 1) * N * Pp]);
    for (int t = steps - 1; t >= 0; t--) {
        const T *before = &states[t * N * Pp], *after = before + N * Pp, *x = k.x + t * Pp, *B = k.B(t0 + t);
        int64_t row = (k.b * k.L + t0 + t) * k.H + k.h;
        T *dx = (T*)k.scan.dx + row * P, *dB = k.dB(t0 + t), decay = k.decay_of(t0 + t);
        for (int64_t r = 0; r < k.R; r++) {
            const T *dy = k.y(t0 + t, r), *C = k.C(t0 + t, r);
            T* dC = k.dC(t0 + t, r);
            for (int64_t n = 0; n < N; n++) {
                dC[n] = (k.adds && k.shares_C() ? dC[n] : 0) + dot(P, dy, after + n * Pp);
                for (int64_t p = 0; p < P; p++) k.S[n * Pp + p] += C[n] * dy[p];
            }
        }
        double dS_S = 0;  // the product of the state before the step and its gradient
        for (int64_t p = 0; p < P; p++) dx[p] = 0;
        for (int64_t n = 0; n < N; n++) {
            dB[n] = (k.adds ? dB[n] : 0) + dot(P, k.S + n * Pp, x);
            dS_S += dot(P, k.S + n * Pp, before + n * Pp);
            for (int64_t p = 0; p < P; p++) dx[p] += k.S[n * Pp + p] * B[n];
        }
        bool fresh = k.starts(t0 + t);
        k.scan.dlog_decay[row] = fresh ? 0 : dS_S * decay;
        for (int64_t i = 0; i < N * Pp; i++) k.S[i] = fresh ? 0 : k.S[i] * decay;
    }
}

// The gradients of all arguments of a head.
template <typename T> static void backward(Head<T>& k) {
    constexpr int W = WIDTH<T>;
    const Scan& s = k.scan;
    int64_t N = k.N, P = k.P, Pp = k.Pp, Np = k.Np, H = k.H, R = k.R;
    k.load_state(k.S);
    for (int64_t t0 = (k.L - 1) / STEPS * STEPS; t0 >= 0; t0 -= STEPS) {
        int steps = k.enter(t0);
        const T* S = k.chunk_state(t0 / STEPS);
        double dF[STEPS] = {};
        transpose(N, P, S, Pp, k.ST, Np);
        transpose<T>(N, P, k.S, Pp, k.DT, Np);
        transpose<T>(steps, P, k.x, Pp, k.xT, STEPS);
        // from the state that leaves: dB = decay_out x D^T, dx = decay_out B D
        k.scale(steps, k.x, k.decay_out, k.xs);
        T *dB = k.tile_n, *dx = k.tile_p;
        multiply<T>(steps, Np, P, k.xs, Pp, 1, k.DT, Np, dB, Np, false);
        multiply<T>(steps, Pp, N, k.B(t0), k.row_B, 1, k.S, Pp, dx, Pp, false);
        k.scale(steps, dx, k.decay_out, dx);
        for (int t = 0; t < steps; t++) {
            double dx_x = dot(P, k.x + t * Pp, dx + t * Pp);
            dF[t] -= dx_x, dF[steps - 1] += dx_x;
        }
        if (k.chunk_decay != 0) dF[steps - 1] += k.chunk_decay * dot<T>(N * Pp, k.S, S);
        for (int64_t i = 0; i < N * Pp; i += W) store(k.next + i, load<T>(k.S + i) * k.chunk_decay);
        bool finite = true;
        for (int64_t r = 0; r < R; r++) {
            for (int t = 0; t < steps; t++) memcpy(k.dy + t * Pp, k.y(t0 + t, r), sizeof(T) * P);
            k.score(steps, t0, r);
            // the rows of B and C are not padded and far apart, so the matrices that products walk down are copies
            T* right = k.Bt;  // no longer used; [STEPS][Np] fits where N is a whole number of vectors, else `side`
            std::vector<Vec<T>> side;
            if (Np != N) side.assign(STEPS * Np / W, Vec<T>{}), right = (T*)side.data();
            for (int t = 0; t < steps; t++) memcpy(right + t * Np, k.C(t0 + t, r), sizeof(T) * N);
            // from the state that enters: dC = decay_in dy S^T, D += C^T decay_in dy
            k.scale(steps, k.dy, k.decay_in, k.xs);
            multiply<T>(steps, Np, P, k.xs, Pp, 1, k.ST, Np, k.row, Np, false);
            for (int t = 0; t < steps; t++) dF[t] += dot(N, k.C(t0 + t, r), k.row + t * Np);
            multiply<T>(N, Pp, steps, right, 1, Np, k.xs, Pp, k.next, Pp, true);
            // inside the chunk: products = dy x^T
            multiply<T>(steps, STEPS, P, k.dy, Pp, 1, k.xT, STEPS, k.products, STEPS, false, LOWER_OUT);
            Wide<T> lost[STEPS / W] = {};  // what each s takes from dF, over t; these sums cancel
            for (int t = 0; t < steps; t++) {
                Wide<T> gained{};
                for (int i = 0; i < STEPS; i += W) {  // the decays are 0 above the diagonal
                    T *c = k.scores + t * STEPS + i, *p = k.products + t * STEPS + i;
                    Vec<T> m = load<T>(k.decay + t * STEPS + i), dscore = i > t ? m : load<T>(p) * m;
                    Vec<T> e = i > t ? m : dscore * load<T>(c);
                    store(p, dscore);
                    store(c, i > t ? m : load<T>(c) * m);
                    if (i <= t && t < i + W) e[t - i] = 0;  // F_t - F_t has no gradient
                    gained += widened<T>(e), lost[i / W] += widened<T>(e);
                }
                dF[t] += sum_of_lanes<T>(gained);
            }
            for (int t = 0; t < steps; t++) dF[t] -= lost[t / W][t % W];
            multiply<T>(steps, Pp, steps, k.scores, 1, STEPS, k.dy, Pp, dx, Pp, true, UPPER_A);
            multiply<T>(steps, Np, steps, k.products, 1, STEPS, right, Np, dB, Np, true, UPPER_A);
            for (int t = 0; t < steps; t++) memcpy(right + t * Np, k.B(t0 + t), sizeof(T) * N);
            multiply<T>(steps, Np, steps, k.products, STEPS, 1, right, Np, k.row, Np, true, LOWER_A);
            finite &= all_finite(steps * Np, k.row);
            if (!k.shares_C()) k.store_rows(steps, k.row, k.dC(t0, r), k.row_C, false);
            if (right == k.Bt && r + 1 < R) transpose(steps, N, k.B(t0), k.row_B, k.Bt, STEPS);
        }
        double sum = 0;
        for (int t = steps - 1; t >= 0; t--) {
            s.dlog_decay[(k.b * k.L + t0 + t) * H + k.h] = sum += dF[t];
            memcpy((T*)s.dx + ((k.b * k.L + t0 + t) * H + k.h) * P, dx + t * Pp, sizeof(T) * P);
        }
        finite &= std::isfinite(sum) && all_finite(steps * Pp, dx) && all_finite(steps * Np, dB);
        if (!finite || !all_finite(N * Pp, k.next)) {
            backward_by_steps(k, t0, steps);
            continue;
        }
        k.store_rows(steps, dB, k.dB(t0), k.row_B, k.adds);
        if (k.shares_C()) k.store_rows(steps, k.row, k.dC(t0, 0), k.row_C, k.adds);  // of the one query
        std::swap(k.S, k.next);
    }
    k.store_state(k.S);
}

// Backward, `y` holds the gradient of y, and `state` that of the last state.
template <typename T> static void backward(const Scan& s) {
    int64_t heads = s.heads / s.groups;  // of a group
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < s.batch * s.groups * s.slices; task++) {
        int64_t slice = task % s.slices, pair = task / s.slices;  // a pair is a batch entry and a group
        int64_t first = heads * slice / s.slices, end = heads * (slice + 1) / s.slices;
        for (int64_t h = first; h < end; h++) {
            Head<T> k(s, pair / s.groups, pair % s.groups * heads + h, true);
            k.slice = slice, k.adds = h > first;
            backward(k);
        }
    }
}

extern "C" {
void forward_float(const Scan* s) { forward<float>(*s); }
void forward_double(const Scan* s) { forward<double>(*s); }
void backward_float(const Scan* s) { backward<float>(*s); }
void backward_double(const Scan* s) { backward<double>(*s); }
int lanes_of_float() { return WIDTH<float>; }
int chunk_steps() { return STEPS; }
}
