// The chunk scan on a CPU. Derivation, bytes and operations: README.md.
//
// A task has one batch entry and one head and walks over its chunks with the state in its cache; every product of a chunk is
// one call of `multiply`. Sums have one order, whatever the threads are.
//
// t, s time in a chunk · n state · p channel · r reading · F log of the decay since the chunk's start
#include <cmath>
#include <memory>
#include <vector>

#include "../vectors.h"

constexpr int STEPS = 64;                      // of a chunk
constexpr int ROWS = BYTES == 64 ? 8 : 4;      // of a block of sums held in registers, times two vectors

struct Scan {  // shapes: README.md; `state`: the first, then the last (backward: gradient of the last, then of the first)
    int64_t batch, length, heads, readings, states, channels, threads;
    const void *x, *B, *C;         // [batch, L, H, P], [batch, L, H, N], [batch, L, H, R, N]
    const double* log_decay;       // [batch, L, H]
    const int64_t* document_ids;   // [batch, L] or null
    void *state, *begins, *y;      // [batch, H, N, P], [batch, H, chunks, N, padded P], [batch, L, H, R, P]
    void *dx, *dB, *dC;            // as x, B, C
    double* dlog_decay;
};

template <typename T> static int64_t padded(int64_t n) { return (n + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>; }

template <typename T, int M, int V>
static inline void block(int64_t depth, const T* A, int64_t row_A, int64_t step_A, const T* B, int64_t row_B, T* C, int64_t row_C, bool add) {
    constexpr int W = WIDTH<T>;
    Vec<T> sums[M][V];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < V; j++) sums[i][j] = add ? load<T>(C + i * row_C + j * W) : Vec<T>{};
    for (int64_t k = 0; k < depth; k++) {
        Vec<T> b[V];
        for (int j = 0; j < V; j++) b[j] = load<T>(B + k * row_B + j * W);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < V; j++) sums[i][j] += A[i * row_A + k * step_A] * b[j];
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < V; j++) store(C + i * row_C + j * W, sums[i][j]);
}

template <typename T, int M>
static inline void rows(int64_t columns, int64_t depth, const T* A, int64_t row_A, int64_t step_A, const T* B, int64_t row_B, T* C, int64_t row_C,
                        bool add) {
    constexpr int W = WIDTH<T>;
    int64_t j = 0;
    for (; j + 2 * W <= columns; j += 2 * W) block<T, M, 2>(depth, A, row_A, step_A, B + j, row_B, C + j, row_C, add);
    for (; j < columns; j += W) block<T, M, 1>(depth, A, row_A, step_A, B + j, row_B, C + j, row_C, add);
}

enum Part { ALL, LOWER_OUT, LOWER_A, UPPER_A };  // which triangle is all that is wanted, or all there is

// C [count, columns] (+)= A [count, depth] B [depth, columns]; A by any strides; B, C by rows padded to whole vectors.
template <typename T>
static void multiply(int64_t count, int64_t columns, int64_t depth, const T* A, int64_t row_A, int64_t step_A, const T* B, int64_t row_B, T* C,
                     int64_t row_C, bool add, Part part = ALL) {
    for (int64_t i = 0; i < count;) {
        bool whole = i + ROWS <= count;
        int64_t end = whole ? i + ROWS : i + 1;
        int64_t wide = part == LOWER_OUT && padded<T>(end) < columns ? padded<T>(end) : columns;
        int64_t first = part == UPPER_A ? i : 0, deep = (part == LOWER_A && end < depth ? end : depth) - first;
        const T *a = A + i * row_A + first * step_A, *b = B + first * row_B;
        if (whole) rows<T, ROWS>(wide, deep, a, row_A, step_A, b, row_B, C + i * row_C, row_C, add);
        else rows<T, 1>(wide, deep, a, row_A, step_A, b, row_B, C + i * row_C, row_C, add);
        i = end;
    }
}

// to [columns, row_to] = from [count, columns]^T, zeros beyond `count`
template <typename T> static void transpose(int64_t count, int64_t columns, const T* from, int64_t row_from, T* to, int64_t row_to) {
    constexpr int W = WIDTH<T>;
    for (int64_t i = 0; i < row_to; i += W)  // row_to: whole vectors
        for (int64_t j = 0; j < columns; j += W) {
            Vec<T> v[W];
            if (i + W <= count && j + W <= columns) {
                for (int k = 0; k < W; k++) v[k] = load<T>(from + (i + k) * row_from + j);
                transpose_square<T>(v);
                for (int k = 0; k < W; k++) store(to + (j + k) * row_to + i, v[k]);
            } else {
                for (int64_t c = j; c < j + W && c < columns; c++)
                    for (int64_t r = i; r < i + W; r++) to[c * row_to + r] = r < count ? from[r * row_from + c] : 0;
            }
        }
}

template <typename T> struct Head {
    static constexpr int W = WIDTH<T>;
    const Scan& scan;
    int64_t b, h, L, H, R, N, P, Pp, Np, chunks;
    std::vector<Vec<T>> memory;
    T *S, *x, *xs, *Bt, *decay, *scores;  // [N][Pp]; [STEPS][Pp]; scaled x; [N][STEPS]; [STEPS][STEPS] twice
    T *D, *DT, *ST, *xT, *dy, *products, *tile_p, *tile_n, *row;  // backward: of the state and its transpose, ...
    double F[STEPS];
    T into[STEPS], out[STEPS], keep;  // from the state to t, from t to the chunk's end, from end to end
    int first[STEPS];                 // of t's document in this chunk

    Head(const Scan& s, int64_t task, bool backward)
        : scan(s), b(task / s.heads), h(task % s.heads), L(s.length), H(s.heads), R(s.readings), N(s.states), P(s.channels), Pp(padded<T>(s.channels)),
          Np(padded<T>(s.states)), chunks((s.length + STEPS - 1) / STEPS) {
        int64_t sizes[] = {N * Pp, STEPS * Pp, STEPS * Pp, N * STEPS, STEPS * STEPS, STEPS * STEPS};
        int64_t more[] = {N * Pp, P * Np, P * Np, P * STEPS, STEPS * Pp, STEPS * STEPS, STEPS * Pp, STEPS * Np, STEPS * Np};
        T** places[] = {&S, &x, &xs, &Bt, &decay, &scores};
        T** others[] = {&D, &DT, &ST, &xT, &dy, &products, &tile_p, &tile_n, &row};
        int64_t total = 0;
        for (int64_t n : sizes) total += n;
        if (backward) for (int64_t n : more) total += n;
        memory.assign(total / W + 1, Vec<T>{});
        T* at = (T*)memory.data();
        for (int i = 0; i < 6; i++) *places[i] = at, at += sizes[i];
        if (backward) for (int i = 0; i < 9; i++) *others[i] = at, at += more[i];
    }
    const T* B(int64_t t) { return (const T*)scan.B + ((b * L + t) * H + h) * N; }
    int64_t row_of_C(int64_t t, int64_t r) { return ((b * L + t) * H + h) * R + r; }
    const T* C(int64_t t, int64_t r) { return (const T*)scan.C + row_of_C(t, r) * N; }
    T* begin(int64_t chunk) { return (T*)scan.begins + ((b * H + h) * chunks + chunk) * N * Pp; }

    void load_state(T* to) {
        for (int64_t n = 0; n < N; n++) {
            memcpy(to + n * Pp, (T*)scan.state + ((b * H + h) * N + n) * P, sizeof(T) * P);
            for (int64_t p = P; p < Pp; p++) to[n * Pp + p] = 0;
        }
    }
    void store_state(const T* from) {
        for (int64_t n = 0; n < N; n++) memcpy((T*)scan.state + ((b * H + h) * N + n) * P, from + n * Pp, sizeof(T) * P);
    }
    // x, the decays and the transpose of B, of the chunk at t0; the number of its steps
    int enter(int64_t t0) {
        int steps = L - t0 < STEPS ? L - t0 : STEPS;
        double sum = 0;
        for (int t = 0; t < steps; t++) {
            memcpy(x + t * Pp, (const T*)scan.x + ((b * L + t0 + t) * H + h) * P, sizeof(T) * P);
            F[t] = sum += scan.log_decay[(b * L + t0 + t) * H + h];
            first[t] = 0;
        }
        bool same = true, whole = true;  // as the state that enters; from the chunk's start to its end
        if (scan.document_ids) {
            const int64_t* ids = scan.document_ids + b * L + t0;
            same = t0 == 0 || ids[-1] == ids[0];
            for (int t = 1; t < steps; t++) first[t] = ids[t] == ids[t - 1] ? first[t - 1] : t;
            whole = first[steps - 1] == 0;
        }
        for (int t = 0; t < steps; t++) {
            into[t] = same && first[t] == 0 ? std::exp(F[t]) : 0;
            out[t] = first[t] == first[steps - 1] ? std::exp(F[steps - 1] - F[t]) : 0;
        }
        keep = same && whole ? std::exp(F[steps - 1]) : 0;
        // exp(F_t - F_s): the difference of two doubles, each as a sum of two T
        alignas(64) T high[STEPS], low[STEPS], index[STEPS];
        constexpr double LOG2E = 1.4426950408889634;
        for (int t = 0; t < STEPS; t++) {
            double f = t < steps ? F[t] * LOG2E : 0;
            high[t] = f, low[t] = f - (double)high[t], index[t] = t;
        }
        for (int t = 0; t < steps; t++)
            for (int s = 0; s < STEPS; s += W) {
                Vec<T> i = load<T>(index + s), e = (high[t] - load<T>(high + s)) + (low[t] - load<T>(low + s));
                e = exp2_of(i > (T)t ? Vec<T>{} : e);  // s > t is not wanted, and could overflow
                e = i > (T)t ? Vec<T>{} : e;
                store(decay + t * STEPS + s, i < (T)first[t] ? Vec<T>{} : e);
            }
        transpose(steps, N, B(t0), H * N, Bt, STEPS);
        return steps;
    }
    void scale(int steps, const T* from, const T* by, T* to) {
        for (int t = 0; t < steps; t++)
            for (int64_t p = 0; p < Pp; p += W) store(to + t * Pp + p, load<T>(from + t * Pp + p) * by[t]);
    }
    void score(int steps, int64_t t0, int64_t r) {  // C B^T, the lower triangle
        multiply<T>(steps, STEPS, N, C(t0, r), H * R * N, 1, Bt, STEPS, scores, STEPS, false, LOWER_OUT);
    }
};

template <typename T> static void forward(const Scan& s) {
    constexpr int W = WIDTH<T>;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < s.batch * s.heads; task++) {
        Head<T> k(s, task, false);
        std::vector<Vec<T>> tile(STEPS * k.Pp / W);
        T* y = (T*)tile.data();
        k.load_state(k.S);
        for (int64_t t0 = 0; t0 < k.L; t0 += STEPS) {
            if (s.begins) memcpy(k.begin(t0 / STEPS), k.S, sizeof(T) * k.N * k.Pp);
            int steps = k.enter(t0);
            for (int64_t r = 0; r < k.R; r++) {
                k.score(steps, t0, r);
                for (int64_t i = 0; i < steps * STEPS; i += W) store(k.scores + i, load<T>(k.scores + i) * load<T>(k.decay + i));
                multiply<T>(steps, k.Pp, k.N, k.C(t0, r), k.H * k.R * k.N, 1, k.S, k.Pp, y, k.Pp, false);
                k.scale(steps, y, k.into, y);
                multiply<T>(steps, k.Pp, steps, k.scores, STEPS, 1, k.x, k.Pp, y, k.Pp, true, LOWER_A);
                for (int t = 0; t < steps; t++) memcpy((T*)s.y + k.row_of_C(t0 + t, r) * k.P, y + t * k.Pp, sizeof(T) * k.P);
            }
            k.scale(steps, k.x, k.out, k.xs);
            for (int64_t i = 0; i < k.N * k.Pp; i += W) store(k.S + i, load<T>(k.S + i) * k.keep);
            multiply<T>(k.N, k.Pp, steps, k.B(t0), 1, k.H * k.N, k.xs, k.Pp, k.S, k.Pp, true);
        }
        k.store_state(k.S);
    }
}

// Sums in double: the gradient of a decay is a small difference of large ones.
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

// `y` holds the gradient of y, `state` that of the last state.
template <typename T> static void backward(const Scan& s) {
    constexpr int W = WIDTH<T>;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < s.batch * s.heads; task++) {
        Head<T> k(s, task, true);
        int64_t N = k.N, P = k.P, Pp = k.Pp, Np = k.Np, H = k.H, R = k.R;
        k.load_state(k.D);
        for (int64_t t0 = (k.L - 1) / STEPS * STEPS; t0 >= 0; t0 -= STEPS) {
            int steps = k.enter(t0);
            const T* S = k.begin(t0 / STEPS);
            double dF[STEPS] = {};
            transpose(N, P, S, Pp, k.ST, Np);
            transpose(N, P, k.D, Pp, k.DT, Np);
            transpose<T>(steps, P, k.x, Pp, k.xT, STEPS);
            // from the state that leaves: dB = out x D^T, dx = out B D
            k.scale(steps, k.x, k.out, k.xs);
            T *dB = k.tile_n, *dx = k.tile_p;
            multiply<T>(steps, Np, P, k.xs, Pp, 1, k.DT, Np, dB, Np, false);
            multiply<T>(steps, Pp, N, k.B(t0), H * N, 1, k.D, Pp, dx, Pp, false);
            k.scale(steps, dx, k.out, dx);
            for (int t = 0; t < steps; t++) {
                double through = dot(P, k.x + t * Pp, dx + t * Pp);
                dF[t] -= through, dF[steps - 1] += through;
            }
            if (k.keep != 0) dF[steps - 1] += k.keep * dot(N * Pp, k.D, S);
            for (int64_t i = 0; i < N * Pp; i += W) store(k.D + i, load<T>(k.D + i) * k.keep);
            for (int64_t r = 0; r < R; r++) {
                for (int t = 0; t < steps; t++) memcpy(k.dy + t * Pp, (const T*)s.y + k.row_of_C(t0 + t, r) * P, sizeof(T) * P);
                // from the state that enters: dC = into dy S^T, D += C^T into dy
                k.scale(steps, k.dy, k.into, k.xs);
                multiply<T>(steps, Np, P, k.xs, Pp, 1, k.ST, Np, k.row, Np, false);
                for (int t = 0; t < steps; t++) dF[t] += dot(N, k.C(t0 + t, r), k.row + t * Np);
                multiply<T>(N, Pp, steps, k.C(t0, r), 1, H * R * N, k.xs, Pp, k.D, Pp, true);
                // inside the chunk: products = dy x^T
                k.score(steps, t0, r);
                multiply<T>(steps, STEPS, P, k.dy, Pp, 1, k.xT, STEPS, k.products, STEPS, false, LOWER_OUT);
                Wide<T> fallen[STEPS / W] = {};  // what each s takes from dF, over t; these sums cancel
                for (int t = 0; t < steps; t++) {
                    Wide<T> gained{};
                    for (int i = 0; i < STEPS; i += W) {  // the decays are 0 above the diagonal
                        T *c = k.scores + t * STEPS + i, *p = k.products + t * STEPS + i;
                        Vec<T> m = load<T>(k.decay + t * STEPS + i), of_c = i > t ? m : load<T>(p) * m, e = i > t ? m : of_c * load<T>(c);
                        store(p, of_c);
                        store(c, i > t ? m : load<T>(c) * m);
                        if (i <= t && t < i + W) e[t - i] = 0;  // F_t - F_t
                        gained += widened<T>(e), fallen[i / W] += widened<T>(e);
                    }
                    dF[t] += sum_of_lanes<T>(gained);
                }
                for (int t = 0; t < steps; t++) dF[t] -= fallen[t / W][t % W];
                multiply<T>(steps, Pp, steps, k.scores, 1, STEPS, k.dy, Pp, dx, Pp, true, UPPER_A);
                // the rows of B and C are not padded, so the right-hand sides are copies
                T* right = k.Bt;  // done with; [STEPS][Np] fits where N is a whole number of vectors, else `side`
                std::vector<Vec<T>> side;
                if (Np != N) side.assign(STEPS * Np / W, Vec<T>{}), right = (T*)side.data();
                for (int t = 0; t < steps; t++) memcpy(right + t * Np, k.C(t0 + t, r), sizeof(T) * N);
                multiply<T>(steps, Np, steps, k.products, 1, STEPS, right, Np, dB, Np, true, UPPER_A);
                for (int t = 0; t < steps; t++) memcpy(right + t * Np, k.B(t0 + t), sizeof(T) * N);
                multiply<T>(steps, Np, steps, k.products, STEPS, 1, right, Np, k.row, Np, true, LOWER_A);
                for (int t = 0; t < steps; t++) memcpy((T*)s.dC + k.row_of_C(t0 + t, r) * N, k.row + t * Np, sizeof(T) * N);
                if (right == k.Bt && r + 1 < R) transpose(steps, N, k.B(t0), H * N, k.Bt, STEPS);
            }
            double sum = 0;
            for (int t = steps - 1; t >= 0; t--) {
                s.dlog_decay[(k.b * k.L + t0 + t) * H + k.h] = sum += dF[t];
                memcpy((T*)s.dx + ((k.b * k.L + t0 + t) * H + k.h) * P, dx + t * Pp, sizeof(T) * P);
                memcpy((T*)s.dB + ((k.b * k.L + t0 + t) * H + k.h) * N, dB + t * Np, sizeof(T) * N);
            }
        }
        k.store_state(k.D);
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
