// The gated delta rule on a CPU. README.md has the derivation, and counts operations.
//
// A task has one batch entry and one head, and walks over its chunks with the state in its cache. Products of a chunk
// are calls of `multiply`. Sums have one order, whatever the number of threads is. A chunk whose results are not all
// finite is computed again, step by step: in a product, 0 x NaN would reach what the recurrence does not reach, and
// 0 x infinity would be NaN.
#include "pairs.h"
#include "steps.h"

// Products of whole chunks prefetch what the next chunk needs.
template <typename T>
static void product(Head<T>& m, int64_t count, int64_t columns, int64_t depth, const T* A, int64_t row_A,
                    int64_t step_A, const T* B, int64_t row_B, T* C, int64_t row_C, bool add, Part part = ALL) {
    auto prefetch = [&] { m.prefetch(); };
    multiply<T>(count, columns, depth, A, row_A, step_A, B, row_B, C, row_C, add, part, prefetch);
}

// The triangular system, by blocks: w = v + erase S + A u, u = beta w.
template <typename T> static void solve(Head<T>& m, int rows) {
    constexpr int W = WIDTH<T>;
    for (int t0 = 0; t0 < rows; t0 += BLOCK) {
        T *w = m.w + t0 * m.Vp, *u = m.u + t0 * m.Vp, *A = m.A + t0 * STEPS;
        multiply<T>(BLOCK, m.Vp, t0, A, STEPS, 1, m.u, m.Vp, w, m.Vp, true);
        for (int64_t p = 0; p < m.Vp; p += W) {
            Vec<T> left[BLOCK];
#pragma GCC unroll 16
            for (int t = 0; t < BLOCK; t++)
                left[t] = load<T>(m.v + (t0 + t) * m.Vp + p) + load<T>(w + t * m.Vp + p);
#pragma GCC unroll 16
            for (int s = 0; s < BLOCK; s++) {
                Vec<T> found = left[s] * m.beta[t0 + s];
                store(w + s * m.Vp + p, left[s]), store(u + s * m.Vp + p, found);
#pragma GCC unroll 16
                for (int t = s + 1; t < BLOCK; t++) left[t] += A[t * STEPS + t0 + s] * found;
            }
        }
    }
}

// The transposed system: du becomes the gradient of w as it is before the system is solved; dR = beta du, that of v.
template <typename T> static void solve_backward(Head<T>& m, int rows) {
    constexpr int W = WIDTH<T>;
    for (int t0 = rows - BLOCK; t0 >= 0; t0 -= BLOCK) {
        int end = t0 + BLOCK;
        const T *below = m.A + end * STEPS + t0, *A = m.A + t0 * STEPS + t0;
        T *du = m.du + t0 * m.Vp, *dR = m.dR + t0 * m.Vp;
        multiply<T>(BLOCK, m.Vp, rows - end, below, 1, STEPS, m.dR + end * m.Vp, m.Vp, du, m.Vp, true);
        for (int64_t p = 0; p < m.Vp; p += W) {
            Vec<T> left[BLOCK];
#pragma GCC unroll 16
            for (int t = 0; t < BLOCK; t++) left[t] = load<T>(du + t * m.Vp + p);
#pragma GCC unroll 16
            for (int t = BLOCK - 1; t >= 0; t--) {
                Vec<T> found = left[t] * m.beta[t0 + t];
                store(du + t * m.Vp + p, left[t]), store(dR + t * m.Vp + p, found);
#pragma GCC unroll 16
                for (int s = 0; s < t; s++) left[s] += A[t * STEPS + s] * found;
            }
        }
    }
}

// Everything of a chunk that does not depend on what comes after it, from the state S that enters.
template <typename T> static void solve_chunk(Head<T>& m, int rows, const T* S) {
    if (m.per_channel) pairs_per_channel(m, rows);
    else pairs_per_head(m, rows);
    product<T>(m, rows, m.Vp, m.K, m.erase, m.Kp, 1, S, m.Vp, m.w, m.Vp, false);
    solve(m, rows);
}

template <typename T> static void scale_state(Head<T>& m, const T* from, T* to) {
    for (int64_t n = 0; n < m.K; n++)
        for (int64_t p = 0; p < m.Vp; p += WIDTH<T>)
            store(to + n * m.Vp + p, load<T>(from + n * m.Vp + p) * m.chunk_decay[n]);
}

template <typename T> static bool forward_chunk(Head<T>& m, int rows) {
    int64_t K = m.K, Kp = m.Kp, Vp = m.Vp;
    solve_chunk(m, rows, m.S);
    product<T>(m, rows, Vp, K, m.ask, Kp, 1, m.S, Vp, m.o, Vp, false);
    product<T>(m, rows, Vp, rows, m.P, STEPS, 1, m.u, Vp, m.o, Vp, true, LOWER_A);
    scale_state(m, m.S, m.next);
    product<T>(m, K, Vp, rows, m.stage(rows / BLOCK), 1, Kp, m.u, Vp, m.next, Vp, true);
    if (!all_finite(rows * Vp, m.o) || !all_finite(K * Vp, m.next)) return false;
    std::swap(m.S, m.next);
    return true;
}

template <typename T> static void forward(const Rule& r) {
#pragma omp parallel num_threads(r.threads)
    {
        Head<T> m(r, false);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < r.batch * r.heads; task++) {
            m.begin(task);
            for (int64_t t0 = 0; t0 < m.L; t0 += m.chunk) {
                int rows, steps = m.load_chunk(t0, rows);
                if (r.chunk_states) memcpy(m.chunk_state(t0), m.S, sizeof(T) * m.K * m.Vp);
                if (m.few || !forward_chunk(m, rows))
                    for (int t = 0; t < steps; t++) advance<T>(m, t, m.o + t * m.Vp, nullptr);
                m.store_rows(m.o, steps, t0, m.V, r.o);
            }
            m.end();
        }
    }
}

// The gradients of a chunk's arguments, and that of the state that enters it, which becomes m.S.
template <typename T> static bool backward_chunk(Head<T>& m, int rows, const T* S) {
    int64_t K = m.K, V = m.V, Kp = m.Kp, Vp = m.Vp;
    solve_chunk(m, rows, S);
    transpose<T>(K, V, S, Vp, m.ST, Kp);
    transpose<T>(K, V, m.S, Vp, m.DT, Kp);
    transpose_tile(rows, Vp, m.u, Vp, m.UT, STEPS);
    product<T>(m, rows, Vp, rows, m.P, 1, STEPS, m.dO, Vp, m.du, Vp, false, UPPER_A);
    product<T>(m, rows, Vp, K, m.stage(rows / BLOCK), Kp, 1, m.S, Vp, m.du, Vp, true);
    solve_backward(m, rows);
    for (int t = 0; t < rows; t++) m.dbeta[t] = dot(Vp, m.du + t * Vp, m.w + t * Vp);
    product<T>(m, rows, rows, V, m.dR, Vp, 1, m.UT, STEPS, m.dA, STEPS, false, LOWER_OUT);
    product<T>(m, rows, rows, V, m.dO, Vp, 1, m.UT, STEPS, m.dP, STEPS, false, LOWER_OUT);
    product<T>(m, rows, Kp, V, m.dR, Vp, 1, m.ST, Kp, m.derase, Kp, false);
    product<T>(m, rows, Kp, V, m.dO, Vp, 1, m.ST, Kp, m.dask, Kp, false);
    product<T>(m, rows, Kp, V, m.u, Vp, 1, m.DT, Kp, m.dkeys, Kp, false);
    for (int64_t n = 0; n < K; n++) m.dlog_cd[n] = m.chunk_decay[n] * dot(Vp, m.S + n * Vp, S + n * Vp);
    scale_state(m, m.S, m.next);
    product<T>(m, K, Vp, rows, m.ask, 1, Kp, m.dO, Vp, m.next, Vp, true);
    product<T>(m, K, Vp, rows, m.erase, 1, Kp, m.dR, Vp, m.next, Vp, true);
    if (m.per_channel) pairs_per_channel_backward(m, rows);
    else pairs_per_head_backward(m, rows);
    bool finite = all_finite(rows * Kp, m.dq) && all_finite(rows * Kp, m.dk) && all_finite(rows * Vp, m.dR);
    finite = finite && all_finite(rows * (m.per_channel ? Kp : m.W), m.dg) && all_finite(K * Vp, m.next);
    for (int t = 0; t < rows; t++) finite &= std::isfinite(m.dbeta[t]);
    if (finite) std::swap(m.S, m.next);
    return finite;
}

template <typename T> static void backward(const Rule& r) {
#pragma omp parallel num_threads(r.threads)
    {
        Head<T> m(r, true);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < r.batch * r.heads; task++) {
            m.begin(task);
            for (int64_t t0 = (m.L - 1) / m.chunk * m.chunk; t0 >= 0; t0 -= m.chunk) {
                int rows, steps = m.load_chunk(t0, rows);
                m.load_rows(r.o, t0, steps, rows, m.H, m.V, m.dO);
                const T* S = m.chunk_state(t0);
                if (!backward_chunk(m, rows, S)) backward_by_steps(m, steps, S);
                for (int t = 0; t < steps; t++) {
                    m.denormalize(m.q + t * m.Kp, m.length_q[t], r.scale, m.dq + t * m.Kp);
                    m.denormalize(m.k + t * m.Kp, m.length_k[t], 1, m.dk + t * m.Kp);
                }
                m.store_rows(m.dq, steps, t0, m.K, r.dq), m.store_rows(m.dk, steps, t0, m.K, r.dk);
                m.store_rows(m.dR, steps, t0, m.V, r.dv), m.store_numbers(m.dbeta, steps, t0, r.dbeta);
                m.store_rows(m.dg, steps, t0, m.per_channel ? m.K : 1, r.dg);
            }
            m.end();
        }
    }
}

extern "C" {
void forward_float(const Rule* r) { forward<float>(*r); }
void forward_double(const Rule* r) { forward<double>(*r); }
void backward_float(const Rule* r) { backward<float>(*r); }
void backward_double(const Rule* r) { backward<double>(*r); }
int lanes_of_float() { return WIDTH<float>; }
int steps_of_chunk(int64_t keys, int64_t values) { return chunk_steps(keys, values); }
}
