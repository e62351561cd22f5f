// Products of small matrices and transposes, through vectors.h.
#pragma once
#include "vectors.h"

constexpr int ROWS = BYTES == 64 ? 8 : BYTES == 32 ? 6 : 4;  // rows of sums held in registers, two vectors each

template <typename T> static int64_t padded(int64_t n) { return (n + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>; }

template <typename T, int M, int V>
static inline void block(int64_t depth, const T* A, int64_t row_A, int64_t step_A, const T* B, int64_t row_B, T* C,
                         int64_t row_C, bool add) {
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
static inline void rows(int64_t columns, int64_t depth, const T* A, int64_t row_A, int64_t step_A, const T* B,
                        int64_t row_B, T* C, int64_t row_C, bool add) {
    constexpr int W = WIDTH<T>;
    int64_t j = 0;
    for (; j + 2 * W <= columns; j += 2 * W) block<T, M, 2>(depth, A, row_A, step_A, B + j, row_B, C + j, row_C, add);
    for (; j < columns; j += W) block<T, M, 1>(depth, A, row_A, step_A, B + j, row_B, C + j, row_C, add);
}

// The number of rows of the next block, where `left` are left. 8 and 9 rows become two blocks of 4, because single rows
// leave most registers idle.
static inline int64_t rows_at_once(int64_t left) {
    return left >= ROWS && !(ROWS == 6 && left / 4 == 2) ? ROWS : left >= 4 ? 4 : 1;
}

enum Part { ALL, LOWER_OUT, LOWER_A, UPPER_A };  // all; the lower triangle of C only; A is a lower or an upper triangle

struct Nothing {
    void operator()() const {}
};

// C [count, columns] (+)= A [count, depth] B [depth, columns]. A has any strides; rows of B and C are whole vectors.
// `meanwhile` is called before each block of rows.
template <typename T, typename Meanwhile = Nothing>
static void multiply(int64_t count, int64_t columns, int64_t depth, const T* A, int64_t row_A, int64_t step_A,
                     const T* B, int64_t row_B, T* C, int64_t row_C, bool add, Part part = ALL,
                     Meanwhile meanwhile = {}) {
    for (int64_t i = 0; i < count;) {
        meanwhile();
        int64_t some = rows_at_once(count - i), end = i + some;
        int64_t wide = part == LOWER_OUT && padded<T>(end) < columns ? padded<T>(end) : columns;
        int64_t first = part == UPPER_A ? i : 0, deep = (part == LOWER_A && end < depth ? end : depth) - first;
        const T *a = A + i * row_A + first * step_A, *b = B + first * row_B;
        auto take = some == ROWS ? rows<T, ROWS> : some == 4 ? rows<T, 4> : rows<T, 1>;
        take(wide, deep, a, row_A, step_A, b, row_B, C + i * row_C, row_C, add);
        i = end;
    }
}

// to [columns, row_to] = from [count, columns]^T, with zeros beyond `count`
template <typename T>
static void transpose(int64_t count, int64_t columns, const T* from, int64_t row_from, T* to, int64_t row_to) {
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

// Whether `count` numbers are all finite; they must be a whole number of vectors.
template <typename T> static bool all_finite(int64_t count, const T* p) {
    constexpr int W = WIDTH<T>, MANY = 4;  // sums that do not wait for each other
    Vec<T> odd[MANY] = {};
    int64_t i = 0;
    for (; i + MANY * W <= count; i += MANY * W)
        for (int j = 0; j < MANY; j++) odd[j] += load<T>(p + i + j * W) * (T)0;
    for (; i < count; i += W) odd[0] += load<T>(p + i) * (T)0;
    odd[0] += odd[1] + odd[2] + odd[3];
    bool finite = true;
    for (int j = 0; j < W; j++) finite &= odd[0][j] == 0;
    return finite;
}
