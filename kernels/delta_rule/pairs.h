// What pairs of steps of a chunk have to do with each other, and the way back: A, P, erase, ask, the keys decayed to the
// chunk's end, and the chunk's decay. Every decay is the exponential of a sum of few logarithms, or a product of such.
//
// t later step · s earlier step · c channel · I block
#pragma once
#include "head.h"

// ------------------------------------------------------------------------------------------------- one decay per head

template <typename T> static void pairs_per_head(Head<T>& m, int rows) {
    constexpr int W = WIDTH<T>;
    T index[STEPS], sums[STEPS] = {}, sum = 0;  // sums: of the logarithms from s + 1 to t
    for (int t = 0; t < STEPS; t++) index[t] = t;
    T logs[STEPS + W];
    for (int t = 0; t < rows; t++) logs[t] = sum += m.log_of(t);
    for (int t = 0; t < rows; t += W) store(m.into_1 + t, exp_of<T>(load<T>(logs + t)));
    std::fill(m.chunk_decay, m.chunk_decay + m.Kp, m.into_1[rows - 1]);
    sum = 0;
    for (int s = rows - 1; s >= 0; s--) logs[s] = sum, sum += m.log_of(s);
    for (int s = 0; s < rows; s += W) store(m.out_1 + s, exp_of<T>(load<T>(logs + s)));
    for (int t = 0; t < rows; t++)
        for (int s = 0; s < rows; s += W) {
            Vec<T> i = load<T>(index + s), log = load<T>(sums + s) + m.log_of(t);
            log = i < (T)t ? log : Vec<T>{};
            store(sums + s, log);
            if (s <= t) store(m.decay + t * STEPS + s, i > (T)t ? Vec<T>{} : exp_of<T>(log));
        }
    for (int t = 0; t < rows; t++)
        for (int64_t c = 0; c < m.Kp; c += W) {
            int64_t i = t * m.Kp + c;
            Vec<T> k = load<T>(m.k + i);
            store(m.erase + i, -k * m.into_1[t]);
            store(m.ask + i, load<T>(m.q + i) * m.into_1[t]);
            store(m.stage(rows / BLOCK) + i, k * m.out_1[t]);
        }
    transpose_tile(rows, m.Kp, m.k, m.Kp, m.keys_T, STEPS);
    multiply<T>(rows, rows, m.K, m.k, m.Kp, 1, m.keys_T, STEPS, m.A, STEPS, false, LOWER_OUT);
    multiply<T>(rows, rows, m.K, m.q, m.Kp, 1, m.keys_T, STEPS, m.P, STEPS, false, LOWER_OUT);
    for (int t = 0; t < rows; t++)
        for (int s = 0; s < rows; s += W) {
            Vec<T> i = load<T>(index + s), decay = load<T>(m.decay + t * STEPS + s);
            T *A = m.A + t * STEPS + s, *P = m.P + t * STEPS + s;
            store(A, i < (T)t ? -load<T>(A) * decay : Vec<T>{});
            store(P, i > (T)t ? Vec<T>{} : load<T>(P) * decay);
        }
}

template <typename T> static void pairs_per_head_backward(Head<T>& m, int rows) {
    constexpr int W = WIDTH<T>;
    int64_t Kp = m.Kp;
    T index[STEPS], later[STEPS] = {};  // later: what pairs of s with t and later steps give to decays between
    for (int t = 0; t < STEPS; t++) index[t] = t;
    T from_out[STEPS], from_pairs[STEPS], from_into = 0, from_end = 0;
    for (int64_t c = 0; c < Kp; c++) from_end += m.dlog_cd[c];
    for (int t = rows - 1; t >= 0; t--) {
        Vec<T> sum{};
        for (int s = 0; s <= t; s += W) {
            T *dA = m.dA + t * STEPS + s, *dP = m.dP + t * STEPS + s;
            Vec<T> i = load<T>(index + s), decay = load<T>(m.decay + t * STEPS + s), a = load<T>(dA), p = load<T>(dP);
            Vec<T> both = a * load<T>(m.A + t * STEPS + s) + p * load<T>(m.P + t * STEPS + s);
            both = load<T>(later + s) + (i < (T)t ? both : Vec<T>{});
            store(later + s, both);
            sum += i < (T)t ? both : Vec<T>{};
            store(dA, i < (T)t ? -a * decay : Vec<T>{});
            store(dP, i > (T)t ? Vec<T>{} : p * decay);
        }
        for (int s = (t / W + 1) * W; s < rows; s += W)
            store(m.dA + t * STEPS + s, Vec<T>{}), store(m.dP + t * STEPS + s, Vec<T>{});
        from_pairs[t] = sum_of_lanes<T>(sum);
    }
    const T* keys = m.stage(rows / BLOCK);
    for (int t = 0; t < rows; t++) {
        from_out[t] = dot(Kp, m.dkeys + t * Kp, keys + t * Kp);
        for (int64_t c = 0; c < Kp; c += W) {
            int64_t i = t * Kp + c;
            store(m.dk + i, load<T>(m.dkeys + i) * m.out_1[t] - load<T>(m.derase + i) * m.into_1[t]);
            store(m.dq + i, load<T>(m.dask + i) * m.into_1[t]);
        }
    }
    for (int t = rows - 1; t >= 0; t--) {
        from_into += dot(Kp, m.derase + t * Kp, m.erase + t * Kp) + dot(Kp, m.dask + t * Kp, m.ask + t * Kp);
        m.dg[t * W] = from_pairs[t] + from_into + from_end;
    }
    T earlier = 0;
    for (int t = 0; t < rows; t++) m.dg[t * W] += earlier, earlier += from_out[t];
    multiply<T>(rows, Kp, rows, m.dA, STEPS, 1, m.k, Kp, m.dk, Kp, true, LOWER_A);
    multiply<T>(rows, Kp, rows, m.dP, STEPS, 1, m.k, Kp, m.dq, Kp, true, LOWER_A);
    multiply<T>(rows, Kp, rows, m.dA, 1, STEPS, m.k, Kp, m.dk, Kp, true, UPPER_A);
    multiply<T>(rows, Kp, rows, m.dP, 1, STEPS, m.q, Kp, m.dk, Kp, true, UPPER_A);
}

// ---------------------------------------------------------------------------------------------- one decay per channel

// A and P of the pairs inside a block, whose keys decay from step to step.
template <typename T> static void pairs_of_block(Head<T>& m, int t0) {
    constexpr int W = WIDTH<T>, MANY = 4;  // vectors of channels at once
    const T *k = m.k + t0 * m.Kp, *q = m.q + t0 * m.Kp, *step = m.step + t0 * m.Kp;
    alignas(64) T A[BLOCK * BLOCK] = {}, P[BLOCK * BLOCK] = {};  // [s][t]
    for (int s = 0; s < BLOCK; s++) {
        Vec<T> of_k[BLOCK] = {}, of_q[BLOCK] = {};
        for (int64_t c = 0; c < m.Kp; c += MANY * W) {
            int many = m.Kp - c < MANY * W ? (m.Kp - c) / W : MANY;
            auto sum_pairs = [&](auto count) {
                constexpr int N = decltype(count)::value;
                Vec<T> key[N], sum_k, sum_q{};
                for (int j = 0; j < N; j++) {
                    key[j] = load<T>(k + s * m.Kp + c + j * W);
                    sum_q += key[j] * load<T>(q + s * m.Kp + c + j * W);
                }
                of_q[s] += sum_q;
                for (int t = s + 1; t < BLOCK; t++) {
                    sum_k = Vec<T>{}, sum_q = Vec<T>{};
                    for (int j = 0; j < N; j++) {
                        int64_t i = t * m.Kp + c + j * W;
                        key[j] *= load<T>(step + i);
                        sum_k += key[j] * load<T>(k + i), sum_q += key[j] * load<T>(q + i);
                    }
                    of_k[t] += sum_k, of_q[t] += sum_q;
                }
            };
            if (many == 4) sum_pairs(std::integral_constant<int, 4>{});
            else
                for (int j = 0; j < many; j++, c += W) sum_pairs(std::integral_constant<int, 1>{});
        }
        add_lane_sums<T, BLOCK>(of_k, A + s * BLOCK);
        add_lane_sums<T, BLOCK>(of_q, P + s * BLOCK);
    }
    for (int i = 0; i < BLOCK * BLOCK; i += W) store(A + i, -load<T>(A + i));
    transpose_tile(BLOCK, BLOCK, A, BLOCK, m.A + t0 * (STEPS + 1), STEPS);
    transpose_tile(BLOCK, BLOCK, P, BLOCK, m.P + t0 * (STEPS + 1), STEPS);
}

template <typename T> static void pairs_per_channel(Head<T>& m, int rows) {
    constexpr int W = WIDTH<T>;
    int64_t Kp = m.Kp;
    std::fill(m.chunk_decay, m.chunk_decay + Kp, 0);  // first its logarithm
    for (int t0 = 0; t0 < rows; t0 += BLOCK) {
        int I = t0 / BLOCK;
        const T* before = I ? m.stage(I) : nullptr;
        T *keys = m.stage(I + 1), *block_decay = m.block_decay + I * Kp;
        for (int64_t c = 0; c < Kp; c += W) {
            Vec<T> earlier = load<T>(m.chunk_decay + c), start = exp_of<T>(earlier), sum{}, into = sum + (T)1, out = into;
            for (int64_t i = t0 * Kp + c; i < (t0 + BLOCK) * Kp; i += Kp) {
                Vec<T> log = load<T>(m.g + i), step = exp_of<T>(log), k = load<T>(m.k + i), q = load<T>(m.q + i);
                into *= step, sum += log;
                store(m.step + i, step), store(m.into + i, into);
                store(m.near_k + i, -k * into), store(m.near_q + i, q * into);
                store(m.erase + i, -k * into * start), store(m.ask + i, q * into * start);
            }
            store(m.start + I * Kp + c, start), store(block_decay + c, into);
            store(m.chunk_decay + c, earlier + sum);
            for (int64_t i = (t0 + BLOCK - 1) * Kp + c; i >= t0 * Kp; i -= Kp) {
                store(m.out + i, out), store(keys + i, load<T>(m.k + i) * out);
                out *= load<T>(m.step + i);
            }
        }
        pairs_of_block(m, t0);
        if (I > 0) {
            int64_t i = t0 * Kp;
            multiply<T>(BLOCK, t0, m.K, m.near_k + i, Kp, 1, m.keys_T, STEPS, m.A + t0 * STEPS, STEPS, false);
            multiply<T>(BLOCK, t0, m.K, m.near_q + i, Kp, 1, m.keys_T, STEPS, m.P + t0 * STEPS, STEPS, false);
            for (int s = 0; s < t0; s++)
                for (int64_t c = 0; c < Kp; c += W)
                    store(keys + s * Kp + c, load<T>(before + s * Kp + c) * load<T>(block_decay + c));
        }
        if (t0 + BLOCK == rows) break;
        for (int64_t c = 0; c < Kp; c++)
            for (int s = 0; s < t0; s += W)
                store(m.keys_T + c * STEPS + s, load<T>(m.keys_T + c * STEPS + s) * block_decay[c]);
        transpose_tile(BLOCK, Kp, keys + t0 * Kp, Kp, m.keys_T + t0, STEPS);
    }
    for (int64_t c = 0; c < Kp; c += W) store(m.chunk_decay + c, exp_of<T>(load<T>(m.chunk_decay + c)));
}

template <typename T> static void pairs_of_block_backward(Head<T>& m, int t0) {
    constexpr int W = WIDTH<T>;
    const T *A = m.dA + t0 * (STEPS + 1), *P = m.dP + t0 * (STEPS + 1);
    for (int64_t c = 0; c < m.Kp; c += W) {
        Vec<T> key[BLOCK], dkey[BLOCK] = {};  // k_s, decayed to t
        auto at = [&](const T* base, int t) { return load<T>(base + (t0 + t) * m.Kp + c); };
        auto add = [&](T* base, int t, Vec<T> x) { store(base + (t0 + t) * m.Kp + c, at(base, t) + x); };
        for (int t = 0; t < BLOCK; t++) {
            Vec<T> step = at(m.step, t), of_k{}, of_q = at(m.k, t) * P[t * STEPS + t];
            for (int s = 0; s < t; s++) {
                key[s] *= step;
                store(m.kept + (t * BLOCK + s) * W, key[s]);
                of_k += key[s] * A[t * STEPS + s], of_q += key[s] * P[t * STEPS + s];
            }
            key[t] = at(m.k, t);
            add(m.dk, t, at(m.q, t) * P[t * STEPS + t] - of_k), add(m.dq, t, of_q);
        }
        for (int t = BLOCK - 1; t >= 0; t--) {
            Vec<T> step = at(m.step, t), k = at(m.k, t), q = at(m.q, t), dlog{};
            add(m.dk, t, dkey[t]);
            for (int s = 0; s < t; s++) {
                dkey[s] += q * P[t * STEPS + s] - k * A[t * STEPS + s];
                dlog += dkey[s] * load<T>(m.kept + (t * BLOCK + s) * W);
                dkey[s] *= step;
            }
            add(m.dg, t, dlog);
        }
    }
}

template <typename T> static void pairs_per_channel_backward(Head<T>& m, int rows) {
    constexpr int W = WIDTH<T>;
    int64_t Kp = m.Kp;
    memset(m.dg, 0, sizeof(T) * rows * Kp);
    for (int t0 = rows - BLOCK; t0 >= 0; t0 -= BLOCK) {
        int I = t0 / BLOCK;
        const T *keys = m.stage(I + 1), *start = m.start + I * Kp;
        for (int64_t c = 0; c < Kp; c += W) {
            Vec<T> decay = load<T>(m.block_decay + I * Kp + c), whole = load<T>(m.dlog_cd + c);
            for (int64_t i = t0 * Kp + c; i < (t0 + BLOCK) * Kp; i += Kp) {
                Vec<T> d = load<T>(m.dkeys + i);
                store(m.dk + i, d * load<T>(m.out + i)), store(m.dout + i, d * load<T>(keys + i));
            }
            for (int64_t i = c; i < t0 * Kp; i += Kp) {
                Vec<T> d = load<T>(m.dkeys + i);
                whole += d * load<T>(keys + i), store(m.dkeys + i, d * decay);
            }
            for (int64_t i = t0 * Kp + c; i < (t0 + BLOCK) * Kp; i += Kp) store(m.dg + i, whole);
        }
        if (I > 0) {
            const T *before = m.stage(I), *A = m.dA + t0 * STEPS, *P = m.dP + t0 * STEPS;
            multiply<T>(BLOCK, Kp, t0, A, STEPS, 1, before, Kp, m.dnear_k, Kp, false);
            multiply<T>(BLOCK, Kp, t0, P, STEPS, 1, before, Kp, m.dnear_q, Kp, false);
            multiply<T>(t0, Kp, BLOCK, A, 1, STEPS, m.near_k + t0 * Kp, Kp, m.dkeys, Kp, true);
            multiply<T>(t0, Kp, BLOCK, P, 1, STEPS, m.near_q + t0 * Kp, Kp, m.dkeys, Kp, true);
        } else {
            memset(m.dnear_k, 0, sizeof(T) * BLOCK * Kp), memset(m.dnear_q, 0, sizeof(T) * BLOCK * Kp);
        }
        for (int64_t c = 0; c < Kp; c += W) {
            Vec<T> dstart{}, sum{}, first = load<T>(start + c);
            for (int t = BLOCK - 1; t >= 0; t--) {
                int64_t i = (t0 + t) * Kp + c, j = t * Kp + c;
                Vec<T> de = load<T>(m.derase + i), da = load<T>(m.dask + i), into = load<T>(m.into + i);
                dstart += de * load<T>(m.erase + i) + da * load<T>(m.ask + i);
                Vec<T> dk = load<T>(m.dnear_k + j) + de * first, dq = load<T>(m.dnear_q + j) + da * first;
                store(m.dk + i, load<T>(m.dk + i) - dk * into), store(m.dq + i, dq * into);
                sum += dk * load<T>(m.near_k + i) + dq * load<T>(m.near_q + i);
                store(m.dg + i, load<T>(m.dg + i) + sum);
            }
            sum = Vec<T>{};
            for (int64_t i = t0 * Kp + c; i < (t0 + BLOCK) * Kp; i += Kp) {
                store(m.dg + i, load<T>(m.dg + i) + sum);
                sum += load<T>(m.dout + i);
            }
            store(m.dlog_cd + c, load<T>(m.dlog_cd + c) + dstart);  // earlier blocks are before this start, too
        }
        pairs_of_block_backward(m, t0);
    }
}
