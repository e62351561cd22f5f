// One step of the selective scan for decoding, on a CPU.
#pragma once
#include "../vectors.h"

// The arguments of a step of every channel; update.py packs them in this order.
struct Update {
    int64_t batch, heads, dim, groups, states, softplus, threads;
    void* state;                      // [batch, heads, dim, N]
    const void *x, *dt, *A, *B, *C;   // [batch, heads, dim] twice; [heads, dim, N]; [batch, groups, N] twice
    const void *D, *z, *dt_bias;      // [heads, dim], [batch, heads, dim], [heads, dim]; they may be null
    void* out;                        // [batch, heads, dim]
};

constexpr int CHANNELS = 16;             // channels of a block, at any width of vectors
constexpr int INTERLEAVED_CHANNELS = 8;  // channels of a block whose states advance side by side

// Advances one vector of states of one channel, and returns what they add to y, lane by lane. `non_finite` becomes NaN
// where A is not finite.
template <typename T>
static inline Vec<T> update_vector(T* state, const T* A, Vec<T> b, Vec<T> c, T scale, T drive, Vec<T>& non_finite) {
    Vec<T> a = load<T>(A), h = exp2_of(a * scale) * load<T>(state) + b * drive;
    non_finite += a * (T)0;
    store(state, h);
    return h * c;
}

// Advances the states n .. N of COUNT channels, in vectors that are padded with zeros.
template <typename T, int COUNT>
[[gnu::noinline]] static void update_rest(int64_t n, int64_t N, T* state, const T* A, const T* B, const T* C,
                                          const T* scale, const T* drive, Vec<T>* sums, Vec<T>& non_finite) {
    constexpr int W = WIDTH<T>;
    T rest[4][W] = {};
    memcpy(rest[0], B + n, sizeof(T) * (N - n));
    memcpy(rest[1], C + n, sizeof(T) * (N - n));
    for (int j = 0; j < COUNT; j++) {
        memcpy(rest[2], A + j * N + n, sizeof(T) * (N - n));
        memcpy(rest[3], state + j * N + n, sizeof(T) * (N - n));
        sums[j] += update_vector(rest[3], rest[2], load<T>(rest[0]), load<T>(rest[1]), scale[j], drive[j], non_finite);
        memcpy(state + j * N + n, rest[3], sizeof(T) * (N - n));
    }
}

// Advances COUNT channels that share B and C; y[j] += C . state of channel j.
template <typename T, int COUNT>
static inline void update_channels(int64_t N, T* state, const T* A, const T* B, const T* C, const T* scale,
                                   const T* drive, T* y, Vec<T>& non_finite) {
    constexpr int W = WIDTH<T>;
    Vec<T> sums[COUNT] = {};
    int64_t n = 0;
    for (; n + W <= N; n += W) {
        Vec<T> b = load<T>(B + n), c = load<T>(C + n);
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; j++)
            sums[j] += update_vector(state + j * N + n, A + j * N + n, b, c, scale[j], drive[j], non_finite);
    }
    if (n < N) update_rest<T, COUNT>(n, N, state, A, B, C, scale, drive, sums, non_finite);
    add_lane_sums<T, COUNT>(sums, y);
}

// Advances up to CHANNELS channels of one batch entry from `first` on; returns whether their A is finite.
template <typename T> static bool update_block(const Update& u, int64_t b, int64_t first) {
    constexpr int W = WIDTH<T>;
    int64_t channels = u.heads * u.dim, per_group = channels / u.groups, N = u.states;
    int64_t count = channels - first < CHANNELS ? channels - first : CHANNELS;
    auto copy = [&](T* to, const void* from) {  // a constant size needs no call
        if (count == CHANNELS) memcpy(to, from, sizeof(T) * CHANNELS);
        else memcpy(to, from, sizeof(T) * count);
    };
    alignas(64) T x[CHANNELS] = {}, dt[CHANNELS] = {}, y[CHANNELS] = {};
    alignas(64) T bias[CHANNELS] = {}, D[CHANNELS] = {}, z[CHANNELS] = {};
    alignas(64) T scale[CHANNELS], drive[CHANNELS];
    int64_t here = b * channels + first;
    copy(x, (const T*)u.x + here);
    copy(dt, (const T*)u.dt + here);
    if (u.dt_bias) copy(bias, (const T*)u.dt_bias + first);
    if (u.D) copy(D, (const T*)u.D + first);
    if (u.z) copy(z, (const T*)u.z + here);
    for (int i = 0; i < CHANNELS; i += W) {
        Vec<T> d = load<T>(dt + i) + load<T>(bias + i);
        if (u.softplus) d = softplus_of<T>(d);
        store(scale + i, d * (T)1.4426950408889634);
        store(drive + i, d * load<T>(x + i));
    }
    Vec<T> non_finite{};
    for (int64_t i = 0; i < count;) {
        int64_t group = (first + i) / per_group, shared = (b * u.groups + group) * N;
        const T *A = (const T*)u.A + (first + i) * N, *B = (const T*)u.B + shared, *C = (const T*)u.C + shared;
        T* state = (T*)u.state + (here + i) * N;
        if (i + INTERLEAVED_CHANNELS <= count && first + i + INTERLEAVED_CHANNELS <= (group + 1) * per_group) {
            update_channels<T, INTERLEAVED_CHANNELS>(N, state, A, B, C, scale + i, drive + i, y + i, non_finite);
            i += INTERLEAVED_CHANNELS;
        } else {
            update_channels<T, 1>(N, state, A, B, C, scale + i, drive + i, y + i, non_finite);
            i += 1;
        }
    }
    for (int i = 0; i < CHANNELS; i += W) {
        Vec<T> gate = load<T>(z + i), out = load<T>(y + i) + load<T>(D + i) * load<T>(x + i);
        store(y + i, u.z ? out * gate / (exp_of<T>(-gate) + (T)1) : out);
    }
    memcpy((T*)u.out + here, y, sizeof(T) * count);
    bool finite = true;
    for (int i = 0; i < W; i++) finite &= non_finite[i] == 0;
    return finite;
}

// Advances all channels; returns whether A is finite.
template <typename T> static int update(const Update& u) {
    int64_t blocks = (u.heads * u.dim + CHANNELS - 1) / CHANNELS, tasks = u.batch * blocks;
    int finite = 1;
    auto task = [&](int64_t i) { return update_block<T>(u, i / blocks, i % blocks * CHANNELS); };
    if (u.threads == 1) {  // even a parallel region of one thread puts torch's others to sleep: as long as the step
        for (int64_t i = 0; i < tasks; i++) finite &= task(i);
    } else {
#pragma omp parallel for num_threads(u.threads) reduction(& : finite)
        for (int64_t i = 0; i < tasks; i++) finite &= task(i);
    }
    return finite;
}
