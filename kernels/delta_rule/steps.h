// The recurrence step by step, in the order of reference.py: for few steps, and where values are not finite.
#pragma once
#include "head.h"

// One step of N vectors of values, from column p on.
template <typename T, int N> static void advance_columns(Head<T>& m, int t, int64_t p, T* o, T* surprise) {
    constexpr int W = WIDTH<T>;
    const T *k = m.k + t * m.Kp, *q = m.q + t * m.Kp, *v = m.v + t * m.Vp + p, *decay = m.chunk_decay;
    Vec<T> known[N] = {}, write[N], read[N] = {};
    for (int64_t n = 0; n < m.K; n++)
        for (int j = 0; j < N; j++) {
            T* S = m.S + n * m.Vp + p + j * W;
            Vec<T> decayed = m.starts[t] ? Vec<T>{} : load<T>(S) * decay[n];
            known[j] += decayed * k[n];
            store(S, decayed);
        }
    for (int j = 0; j < N; j++) {
        Vec<T> wrong = load<T>(v + j * W) - known[j];
        write[j] = wrong * m.beta[t];
        if (surprise) store(surprise + p + j * W, wrong);
    }
    for (int64_t n = 0; n < m.K; n++)
        for (int j = 0; j < N; j++) {
            T* S = m.S + n * m.Vp + p + j * W;
            Vec<T> after = load<T>(S) + write[j] * k[n];
            read[j] += after * q[n];
            store(S, after);
        }
    for (int j = 0; j < N; j++) store(o + p + j * W, read[j]);
}

// One step of the state, in place, with its row of the result. `surprise` becomes v minus what the state answers, if
// it is not null.
template <typename T> static void advance(Head<T>& m, int t, T* o, T* surprise) {
    constexpr int W = WIDTH<T>, MANY = 4;
    for (int64_t c = 0; c < m.Kp; c += W)
        store(m.chunk_decay + c, exp_of<T>(m.per_channel ? load<T>(m.g + t * m.Kp + c) : Vec<T>{} + m.log_of(t)));
    int64_t p = 0;
    for (; p + MANY * W <= m.Vp; p += MANY * W) advance_columns<T, MANY>(m, t, p, o, surprise);
    for (; p < m.Vp; p += W) advance_columns<T, 1>(m, t, p, o, surprise);
}

// The gradients of a chunk's steps from `before`, the state that enters it. m.S is the gradient of the state that
// leaves the chunk, and becomes that of the state that enters it; m.dO is that of the outputs.
template <typename T> static void backward_by_steps(Head<T>& m, int steps, const T* before) {
    constexpr int W = WIDTH<T>;
    int64_t size = m.K * m.Vp;
    std::vector<Vec<T>> memory(((steps + 1) * size + steps * m.Vp) / W);
    T *states = (T*)memory.data(), *surprise = states + (steps + 1) * size, *dS = m.next;
    memcpy(dS, m.S, sizeof(T) * size);
    memcpy(m.S, before, sizeof(T) * size);
    memcpy(states, before, sizeof(T) * size);
    for (int t = 0; t < steps; t++) {
        advance(m, t, m.o + t * m.Vp, surprise + t * m.Vp);
        memcpy(states + (t + 1) * size, m.S, sizeof(T) * size);
    }
    memset(m.dg, 0, sizeof(T) * steps * m.Kp);
    for (int t = steps - 1; t >= 0; t--) {
        const T *S = states + t * size, *after = S + size, *k = m.k + t * m.Kp, *q = m.q + t * m.Kp;
        const T *dO = m.dO + t * m.Vp, *wrong = surprise + t * m.Vp;
        T *dk = m.dk + t * m.Kp, *dq = m.dq + t * m.Kp, *dv = m.dR + t * m.Vp, dbeta = 0, dlog = 0;
        for (int64_t n = 0; n < m.Kp; n++) dk[n] = dq[n] = 0;
        for (int64_t p = 0; p < m.V; p++) {
            T dwrite = 0;
            for (int64_t n = 0; n < m.K; n++) {
                T& d = dS[n * m.Vp + p];
                dq[n] += after[n * m.Vp + p] * dO[p];
                d += q[n] * dO[p];
                dk[n] += d * (m.beta[t] * wrong[p]);
                dwrite += d * k[n];
            }
            dbeta += dwrite * wrong[p];
            dv[p] = m.beta[t] * dwrite;
        }
        m.dbeta[t] = dbeta;
        for (int64_t n = 0; n < m.K; n++) {
            T decay = std::exp(m.per_channel ? m.g[t * m.Kp + n] : m.log_of(t)), sum = 0;
            for (int64_t p = 0; p < m.V; p++) {
                T before_step = m.starts[t] ? 0 : S[n * m.Vp + p], &d = dS[n * m.Vp + p];
                dk[n] -= dv[p] * (m.starts[t] ? 0 : decay * before_step);
                d -= dv[p] * k[n];
                sum += d * before_step;
                d = m.starts[t] ? 0 : d * decay;
            }
            dlog += sum;
            if (m.per_channel) m.dg[t * m.Kp + n] = m.starts[t] ? 0 : sum * decay;
        }
        if (!m.per_channel) m.dg[t * W] = m.starts[t] ? 0 : dlog * std::exp(m.log_of(t));
    }
    std::swap(m.S, m.next);
}
