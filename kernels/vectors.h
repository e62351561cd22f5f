// Vectors as wide as those of the machine, in the compiler's own vector types: one source for AVX-512, AVX2 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <typename T> struct Lanes;
template <> struct Lanes<float> {
    typedef float type __attribute__((vector_size(BYTES)));
    typedef int32_t bits __attribute__((vector_size(BYTES)));
    typedef double wide __attribute__((vector_size(2 * BYTES)));  // as many doubles as a vector has floats
};
template <> struct Lanes<double> {
    typedef double type __attribute__((vector_size(BYTES)));
    typedef int64_t bits __attribute__((vector_size(BYTES)));
    typedef double wide __attribute__((vector_size(BYTES)));
};
template <typename T> using Vec = typename Lanes<T>::type;
template <typename T> using Wide = typename Lanes<T>::wide;
template <typename T> constexpr int WIDTH = BYTES / sizeof(T);

template <typename T> static inline Vec<T> load(const T* p) {
    Vec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <typename T> static inline void store(T* p, Vec<T> v) { memcpy(p, &v, sizeof v); }

// 2^x with a relative error of 1.3e-7 (float) or 4e-16 (double): exactly 1 at 0, 0 for x = -infinity, and infinity for
// +infinity. Results below 2^-126 (2^-1022) are off by as little, or 0. x = k + r with r in [-1/2, 1/2]; 2^r is
// Taylor's polynomial (double) or a minimax one with its constant fixed at 1 (float). At the clamps 2^k is exactly 0 or
// infinity, whatever r is.
static inline Vec<float> exp2_of(Vec<float> x) {
#if defined(__AVX512F__)
    // the order of operands keeps a NaN
    x = (Vec<float>)_mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_min_ps(_mm512_set1_ps(128.0f), (__m512)x));
    Vec<float> whole = (Vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), r = x - whole;
#else
    x = x < -127.0f ? Vec<float>{} - 127.0f : x;
    x = x > 128.0f ? Vec<float>{} + 128.0f : x;
    Vec<float> shifted = x + 12582912.0f;  // 1.5 x 2^23: rounds to a whole number, which its low bits then are
    Vec<float> r = x - (shifted - 12582912.0f);
#endif
    Vec<float> p = r * 0.0001535335037f + 0.001339887455f;
    p = p * r + 0.009618437393f;
    p = p * r + 0.05550332471f;
    p = p * r + 0.2402264791f;
    p = p * r + 0.6931472029f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return (Vec<float>)((Lanes<float>::bits)p + ((Lanes<float>::bits)shifted << 23));
#endif
}
static inline Vec<double> exp2_of(Vec<double> x) {
    x = x < -1023.0 ? Vec<double>{} - 1023.0 : x;
    x = x > 1024.0 ? Vec<double>{} + 1024.0 : x;
    Vec<double> shifted = x + 6755399441055744.0;  // 1.5 x 2^52
    Vec<double> r = x - (shifted - 6755399441055744.0);
    constexpr double c[] = {1.0, 0.6931471805599453, 0.24022650695910072, 0.05550410866482158, 0.009618129107628477,
                            0.0013333558146428443, 0.00015403530393381606, 1.5252733804059841e-05,
                            1.3215486790144309e-06, 1.01780860092397e-07, 7.054911620801123e-09,
                            4.4455382718708116e-10, 2.5678435993488206e-11, 1.3691488853904128e-12};
    Vec<double> p = r * c[13] + c[12];
    for (int i = 11; i >= 0; i--) p = p * r + c[i];
    return (Vec<double>)((Lanes<double>::bits)p + ((Lanes<double>::bits)shifted << 52));
}

template <typename T> static inline Vec<T> exp_of(Vec<T> x) { return exp2_of(x * (T)1.4426950408889634); }

// log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x| <= 1; log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, by
// the series of atanh.
template <typename T> static inline Vec<T> softplus_of(Vec<T> x) {
    constexpr int TERMS = sizeof(T) == 4 ? 8 : 17;
    Vec<T> zero{}, e = exp_of<T>(x < zero ? x : -x), s = e / (e + (T)2), s2 = s * s;
    Vec<T> sum = zero + (T)1 / (2 * TERMS - 1);
    for (int i = TERMS - 2; i >= 0; i--) sum = sum * s2 + (T)1 / (2 * i + 1);
    return (x > zero ? x : zero) + (T)2 * s * sum;
}

// The lanes I of a and b together; those of b are numbered from WIDTH on.
template <typename T, size_t... I> static inline Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, typename Lanes<T>::bits{I...});
#endif
}

// Sums over the lanes of several vectors together: each level adds the halves of twice as many segments.
template <typename T, int D, size_t... I> static inline Vec<T> merge(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
    constexpr int W = WIDTH<T>;
    return shuffle<T, (I / (2 * D) * (2 * D) + I % D + (I / D % 2) * W)...>(a, b) +
           shuffle<T, (I / (2 * D) * (2 * D) + I % D + (I / D % 2) * W + D)...>(a, b);
}
template <typename T, int COUNT, int D> static inline void merge_all(Vec<T>* v) {
    if constexpr (COUNT > 1) {
        for (int i = 0; i < COUNT / 2; i++)
            v[i] = merge<T, D>(v[i], v[i + COUNT / 2], std::make_index_sequence<WIDTH<T>>{});
        merge_all<T, COUNT / 2, D / 2>(v);
    }
}
template <typename T, int D, size_t... I> static inline Vec<T> fold(Vec<T> v, std::index_sequence<I...>) {
    return v + shuffle<T, (I ^ D)...>(v, v);
}
template <typename T, int D> static inline Vec<T> fold_all(Vec<T> v) {
    if constexpr (D == 0) return v;
    else return fold_all<T, D / 2>(fold<T, D>(v, std::make_index_sequence<WIDTH<T>>{}));
}

template <typename T, int EVERY, size_t... I> static inline Vec<T> gather(Vec<T> v, std::index_sequence<I...>) {
    return shuffle<T, I * EVERY % sizeof...(I)...>(v, v);
}

// sums[i] += the lanes of v[i], i < COUNT, a power of two; v is overwritten.
template <typename T, int COUNT> static inline void add_lane_sums(Vec<T>* v, T* sums) {
    constexpr int W = WIDTH<T>, GROUP = W < COUNT ? W : COUNT;
    for (int g = 0; g < COUNT; g += GROUP) {
        merge_all<T, GROUP, W / 2>(v + g);
        Vec<T> all = fold_all<T, W / GROUP / 2>(v[g]);  // each value fills W / GROUP lanes
        T totals[W];
        store(totals, gather<T, W / GROUP>(all, std::make_index_sequence<W>{}));
        for (int i = 0; i < GROUP; i++) sums[g + i] += totals[i];
    }
}

// Transposes as many vectors as one has lanes: each level swaps the squares of side D beside the diagonal.
template <typename T, int D, size_t... I>
static inline void swap_squares(Vec<T>& a, Vec<T>& b, std::index_sequence<I...>) {
    constexpr int W = WIDTH<T>;
    Vec<T> above = shuffle<T, (I & D ? I - D + W : I)...>(a, b);
    b = shuffle<T, (I & D ? I + W : I + D)...>(a, b);
    a = above;
}
template <typename T, int D = WIDTH<T> / 2> static inline void transpose_square(Vec<T>* v) {
    if constexpr (D > 0) {
        for (int i = 0; i < WIDTH<T>; i++)
            if (!(i & D)) swap_squares<T, D>(v[i], v[i + D], std::make_index_sequence<WIDTH<T>>{});
        transpose_square<T, D / 2>(v);
    }
}

// Copies a tile [steps][WIDTH] of channels by time from memory of any layout; lanes beyond `channels` are 0. The
// numbers at an offset of `ahead`, which the next tile takes, are prefetched: they are there when the arithmetic of
// this one is done.
template <typename T>
static inline void load_tile(T* tile, const T* from, int64_t channel_stride, int64_t time_stride, int channels,
                             int steps, int64_t ahead) {
    constexpr int W = WIDTH<T>;
    if (channel_stride == 1 && channels == W) {
        for (int t = 0; t < steps; t++) memcpy(tile + t * W, from + t * time_stride, W * sizeof(T));
        return;
    }
    if (channels < W) memset(tile, 0, sizeof(T) * W * steps);
    for (int t0 = 0; t0 < steps; t0 += W) {
        for (int c = 0; c < channels; c++) __builtin_prefetch(from + c * channel_stride + t0 * time_stride + ahead);
        if (time_stride == 1 && channels == W && t0 + W <= steps) {
            Vec<T> v[W];
            for (int c = 0; c < W; c++) v[c] = load<T>(from + c * channel_stride + t0);
            transpose_square<T>(v);
            for (int t = 0; t < W; t++) store(tile + (t0 + t) * W, v[t]);
        } else {
            for (int c = 0; c < channels; c++)
                for (int t = t0; t < steps && t < t0 + W; t++)
                    tile[t * W + c] = from[c * channel_stride + t * time_stride];
        }
    }
}

// Copies a tile to memory of any layout, and prefetches as load_tile does.
template <typename T>
static inline void store_tile(const T* tile, T* to, int64_t channel_stride, int64_t time_stride, int channels,
                              int steps, int64_t ahead) {
    constexpr int W = WIDTH<T>;
    if (channel_stride == 1 && channels == W) {
        for (int t = 0; t < steps; t++) memcpy(to + t * time_stride, tile + t * W, W * sizeof(T));
        return;
    }
    for (int t0 = 0; t0 < steps; t0 += W) {
        for (int c = 0; c < channels; c++) __builtin_prefetch(to + c * channel_stride + t0 * time_stride + ahead, 1);
        if (time_stride == 1 && channels == W && t0 + W <= steps) {
            Vec<T> v[W];
            for (int t = 0; t < W; t++) v[t] = load<T>(tile + (t0 + t) * W);
            transpose_square<T>(v);
            for (int c = 0; c < W; c++) store(to + c * channel_stride + t0, v[c]);
        } else {
            for (int c = 0; c < channels; c++)
                for (int t = t0; t < steps && t < t0 + W; t++)
                    to[c * channel_stride + t * time_stride] = tile[t * W + c];
        }
    }
}
