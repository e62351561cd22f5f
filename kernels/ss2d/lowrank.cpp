// The scan over images whose transition has a low rank, on a CPU. README.md derives it and counts operations.
//
// What a chunk of places does is the same for all channels: small matrices, made once for the places of a span, that
// then go over blocks of channels, with the channels next to each other in memory. A task has some blocks of channels
// in all four directions, one after another, so that no two tasks add to the same place, and sums have one order.
//
// With s [r, channels] and the inputs u of a chunk:  y = pairs u + seen s,  s <- M^CHUNK s + left^T u
#include <memory>

#include "../matrix.h"
#include "image.h"

constexpr int CHUNK = 8, SPAN = 64, CHUNKS = SPAN / CHUNK, CHANNELS = 64;  // places, places, channels of a block
constexpr int LONG = SPAN + 2 * CHUNK;  // rows of places that are read as much as a chunk beyond the span

// The arguments of a call; backward, y holds its gradient.
struct LowRank {
    int64_t batch, channels, rank, parts, threads;
    Places places;
    Image x, delta, y, dx, ddelta;  // delta.data is null where delta is 1
    void *powers, *rows;            // [4, CHUNK + 1, r, r]: M^q; [batch, 4, L, 2 r + 1]: b, o and C . B in each order
    void *states;                   // [batch, 4, spans, r, channels], before each span, or null
    void *dpowers, *drows;          // [parts, batch, ...], as powers and rows
};

template <typename T> static T* take(T*& memory, int64_t count) {
    T* taken = memory;
    memory += count;
    return taken;
}

// The matrices of the chunks of a span, and their gradients.
template <typename T> struct Matrices {
    static constexpr int W = WIDTH<T>;
    const LowRank& s;
    int64_t b_, k, r, R, all, row;          // R: r padded; all: CHUNK + r; row: that padded
    std::unique_ptr<T[]> memory;
    T *powers, *powers_T;                   // [CHUNK + 1][r][R]
    T *b, *o, *direct, *b_T, *o_T;          // [SPAN][R], [SPAN], [r][LONG]
    T *ahead;                               // [CHUNK - 1][r][SPAN]: M^q b
    T *pairs, *seen, *left;                 // [SPAN][CHUNK], [SPAN][R]
    T *dpowers, *dmatrices, *db, *do_, *db_T, *do_T, *dahead;
    T lag[SPAN];

    Matrices(const LowRank& s_, int64_t batch, bool backward) : s(s_), b_(batch), r(s_.rank), R(padded<T>(r)) {
        all = CHUNK + r, row = padded<T>(all);
        int64_t table = (CHUNK + 1) * r * R, gradients = table + CHUNKS * all * row + r * (2 * SPAN + LONG);
        int64_t count = 2 * table + SPAN * (4 * R + 1 + CHUNK) + r * (2 * LONG + (CHUNK - 1) * SPAN);
        memory.reset(new T[count + (backward ? gradients + 2 * SPAN * R : 0) + 2 * W]());
        T* p = memory.get();
        powers = take(p, table), powers_T = take(p, table);
        b = take(p, SPAN * R), o = take(p, SPAN * R), seen = take(p, SPAN * R), left = take(p, SPAN * R);
        direct = take(p, SPAN), pairs = take(p, SPAN * CHUNK);
        b_T = take(p, r * LONG), o_T = take(p, r * LONG), ahead = take(p, (CHUNK - 1) * r * SPAN);
        if (!backward) return;
        dpowers = take(p, table), dmatrices = take(p, CHUNKS * all * row);
        db = take(p, SPAN * R), do_ = take(p, SPAN * R);
        db_T = take(p, r * SPAN), do_T = take(p, r * LONG), dahead = take(p, r * SPAN);
    }
    const T* power(int64_t q) const { return powers + q * r * R; }
    const T* power_T(int64_t q) const { return powers_T + q * r * R; }
    T* dpower(int64_t q) { return dpowers + q * r * R; }
    T* dmatrix(int64_t c) { return dmatrices + c * all * row; }  // rows: of y, then of s; columns: of u, then of s

    void load_direction(int64_t direction) {
        k = direction;
        for (int64_t q = 0; q <= CHUNK; q++)
            for (int64_t i = 0; i < r; i++)
                for (int64_t j = 0; j < r; j++) {
                    T value = ((const T*)s.powers)[((k * (CHUNK + 1) + q) * r + i) * r + j];
                    powers[(q * r + i) * R + j] = powers_T[(q * r + j) * R + i] = value;
                }
    }
    int64_t first_row(int64_t t0) const {
        return ((b_ * DIRECTIONS + k) * s.places.height * s.places.width + t0) * (2 * r + 1);
    }

    // Makes the matrices of the span at t0, as if b, o and C . B were 0 beyond the last place.
    void make(int64_t t0, int steps) {
        const T* from = (const T*)s.rows + first_row(t0);
        for (int t = 0; t < SPAN; t++, from += 2 * r + 1) {
            for (int64_t j = 0; j < r; j++) {
                b[t * R + j] = b_T[j * LONG + t] = t < steps ? from[j] : 0;
                o[t * R + j] = o_T[j * LONG + t] = t < steps ? from[r + j] : 0;
            }
            direct[t] = t < steps ? from[2 * r] : 0;
            pairs[t * CHUNK + t % CHUNK] = direct[t];
        }
        for (int q = 0; q < CHUNK - 1; q++) {  // what a place sees of the one q + 1 before it: o M^q b
            T* z = ahead + q * r * SPAN;
            multiply<T>(r, SPAN, r, power(q), R, 1, b_T, LONG, z, SPAN, false);
            for (int t = 0; t < SPAN; t += W) {
                Vec<T> sum{};
                for (int64_t j = 0; j < r; j++) sum += load<T>(o_T + j * LONG + t + q + 1) * load<T>(z + j * SPAN + t);
                store(lag + t, sum);
            }
            for (int t = 0; t < SPAN; t++)
                if (t % CHUNK + q + 1 < CHUNK) pairs[(t + q + 1) * CHUNK + t % CHUNK] = lag[t];
        }
        for (int q = 0; q < CHUNK; q++) {  // the places that are the q-th of their chunk
            int64_t at = q * R, next = CHUNK * R;
            multiply<T>(CHUNKS, R, r, o + at, next, 1, power(q), R, seen + at, next, false);
            multiply<T>(CHUNKS, R, r, b + at, next, 1, power_T(CHUNK - 1 - q), R, left + at, next, false);
        }
    }
    // Adds what `dmatrices` says of this span to dpowers, and stores the gradients of its rows.
    void pull_back(int64_t t0, int steps, T* drows) {
        memset(do_T, 0, sizeof(T) * r * LONG);
        memset(db_T, 0, sizeof(T) * r * SPAN);
        for (int q = 0; q < CHUNK - 1; q++) {
            const T* z = ahead + q * r * SPAN;
            for (int t = 0; t < SPAN; t++)
                lag[t] = t % CHUNK + q + 1 < CHUNK ? dmatrix(t / CHUNK)[(t % CHUNK + q + 1) * row + t % CHUNK] : 0;
            for (int64_t j = 0; j < r; j++)
                for (int t = 0; t < SPAN; t += W) {
                    T* to = do_T + j * LONG + t + q + 1;
                    Vec<T> of_lag = load<T>(lag + t);
                    store(dahead + j * SPAN + t, load<T>(o_T + j * LONG + t + q + 1) * of_lag);
                    store(to, load<T>(to) + load<T>(z + j * SPAN + t) * of_lag);
                }
            multiply<T>(r, SPAN, r, power(q), 1, R, dahead, SPAN, db_T, SPAN, true);
            multiply<T>(r, R, SPAN, dahead, SPAN, 1, b, R, dpower(q), R, true);
        }
        int64_t chunk = all * row, next = CHUNK * R;
        for (int q = 0; q < CHUNK; q++) {
            const T *dseen = dmatrices + q * row + CHUNK, *dleft = dmatrices + CHUNK * row + q;  // dleft: transposed
            multiply<T>(CHUNKS, R, r, dseen, chunk, 1, power_T(q), R, do_ + q * R, next, false);
            multiply<T>(r, R, CHUNKS, o + q * R, 1, next, dseen, chunk, dpower(q), R, true);
            multiply<T>(CHUNKS, R, r, dleft, chunk, row, power(CHUNK - 1 - q), R, db + q * R, next, false);
            multiply<T>(r, R, CHUNKS, dleft, row, chunk, b + q * R, next, dpower(CHUNK - 1 - q), R, true);
        }
        for (int c = 0; c < CHUNKS; c++)
            for (int64_t i = 0; i < r; i++)
                for (int64_t j = 0; j < r; j++) dpower(CHUNK)[i * R + j] += dmatrix(c)[(CHUNK + i) * row + CHUNK + j];
        T* to = drows + first_row(t0);
        for (int t = 0; t < steps; t++, to += 2 * r + 1) {
            for (int64_t j = 0; j < r; j++) {
                to[j] = db[t * R + j] + db_T[j * SPAN + t];
                to[r + j] = do_[t * R + j] + do_T[j * LONG + t];
            }
            to[2 * r] = dmatrix(t / CHUNK)[t % CHUNK * (row + 1)];
        }
    }
};

// A block of at most CHANNELS channels. Rows of channels are CHANNELS numbers apart; those beyond `lanes` are 0.
template <typename T> struct Channels {
    const Matrices<T>& m;
    int64_t first, lanes, width;

    Channels(const Matrices<T>& matrices, int64_t block) : m(matrices), first(block * CHANNELS) {
        lanes = m.s.channels - first < CHANNELS ? m.s.channels - first : CHANNELS, width = padded<T>(lanes);
    }
    // Calls `each(step, address)` for the first of the channels at the places of the steps t0 .. t0 + steps.
    template <typename Each> void places(const Image& image, int64_t t0, int steps, Each each) const {
        T* start = (T*)image.data + m.b_ * image.batch + m.k * image.direction + first;
        m.s.places.pieces(image, m.k, t0, steps, [&](int step, int64_t offset, int64_t stride, int count) {
            for (int t = 0; t < count; t++) each(step + t, start + offset + t * stride);
        });
    }
    void load_row(T* to, const T* from) const {
        memcpy(to, from, sizeof(T) * lanes);
        memset(to + lanes, 0, sizeof(T) * (width - lanes));
    }
    void load(T* rows, const Image& image, int64_t t0, int steps) const {
        places(image, t0, steps, [&](int t, const T* from) { load_row(rows + t * CHANNELS, from); });
        for (int t = steps; t < SPAN; t++) memset(rows + t * CHANNELS, 0, sizeof(T) * width);
    }
    // Loads u = delta x.
    void load_inputs(T* rows, int64_t t0, int steps) const {
        load(rows, m.s.x, t0, steps);
        if (!m.s.delta.data) return;
        places(m.s.delta, t0, steps, [&](int t, const T* delta) {
            for (int64_t c = 0; c < lanes; c++) rows[t * CHANNELS + c] *= delta[c];
        });
    }
    // Adds rows to an image, in which the first direction stores.
    void add(const T* rows, const Image& image, int64_t t0, int steps) const {
        places(image, t0, steps, [&](int t, T* to) {
            const T* from = rows + t * CHANNELS;
            if (m.k == 0) memcpy(to, from, sizeof(T) * lanes);
            else
                for (int64_t c = 0; c < lanes; c++) to[c] += from[c];
        });
    }
    T* kept(int64_t t0) const {  // the state before the span at t0: rows of all channels
        int64_t spans = (m.s.places.height * m.s.places.width + SPAN - 1) / SPAN;
        return (T*)m.s.states + ((m.b_ * DIRECTIONS + m.k) * spans + t0 / SPAN) * m.r * m.s.channels + first;
    }
    void keep(const T* state, int64_t t0) const {
        for (int64_t i = 0; i < m.r; i++) memcpy(kept(t0) + i * m.s.channels, state + i * CHANNELS, sizeof(T) * lanes);
    }
    void load_kept(T* state, int64_t t0) const {
        for (int64_t i = 0; i < m.r; i++) load_row(state + i * CHANNELS, kept(t0) + i * m.s.channels);
    }
    // next = M^CHUNK state + left^T u of chunk c
    void advance(int64_t c, const T* state, const T* u, T* next) const {
        multiply<T>(m.r, width, m.r, m.power(CHUNK), m.R, 1, state, CHANNELS, next, CHANNELS, false);
        multiply<T>(m.r, width, CHUNK, m.left + c * CHUNK * m.R, 1, m.R, u, CHANNELS, next, CHANNELS, true);
    }
};

template <typename T> static void forward(const LowRank& s) {
    int64_t L = s.places.height * s.places.width, blocks = (s.channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < s.batch * s.parts; task++) {
        int64_t part = task % s.parts, from = blocks * part / s.parts, to = blocks * (part + 1) / s.parts;
        int64_t size = s.rank * CHANNELS;
        Matrices<T> m(s, task / s.parts, false);
        std::unique_ptr<T[]> memory(new T[(to - from + 1) * size + 2 * SPAN * CHANNELS]);
        T *u = memory.get(), *y = u + SPAN * CHANNELS, *next = y + SPAN * CHANNELS, *states = next + size;
        for (int64_t direction = 0; direction < DIRECTIONS; direction++) {
            m.load_direction(direction);
            memset(states, 0, sizeof(T) * (to - from) * size);
            for (int64_t t0 = 0; t0 < L; t0 += SPAN) {
                int steps = L - t0 < SPAN ? L - t0 : SPAN;
                m.make(t0, steps);
                for (int64_t block = from; block < to; block++) {
                    Channels<T> channels(m, block);
                    T* state = states + (block - from) * size;
                    if (s.states) channels.keep(state, t0);
                    channels.load_inputs(u, t0, steps);
                    for (int64_t c = 0; c * CHUNK < steps; c++) {
                        const T *u_c = u + c * CHUNK * CHANNELS, *pairs = m.pairs + c * CHUNK * CHUNK;
                        T* y_c = y + c * CHUNK * CHANNELS;
                        multiply<T>(CHUNK, channels.width, CHUNK, pairs, CHUNK, 1, u_c, CHANNELS, y_c, CHANNELS, false,
                                    LOWER_A);
                        multiply<T>(CHUNK, channels.width, m.r, m.seen + c * CHUNK * m.R, m.R, 1, state, CHANNELS, y_c,
                                    CHANNELS, true);
                        channels.advance(c, state, u_c, next);
                        memcpy(state, next, sizeof(T) * size);
                    }
                    channels.add(y, s.y, t0, steps);
                }
            }
        }
    }
}

// What the backward pass of a block of channels needs of a span.
template <typename T> struct Tiles {
    std::unique_ptr<T[]> memory;
    T *rows, *dy, *du, *next, *transposed;  // rows [CHUNKS + 1][u, then the state before: CHUNK + r][CHANNELS]

    explicit Tiles(const Matrices<T>& m)
        : memory(new T[CHANNELS * ((CHUNKS + 1) * m.all + 2 * SPAN + m.r + m.row)]) {
        rows = memory.get(), dy = rows + (CHUNKS + 1) * m.all * CHANNELS, du = dy + SPAN * CHANNELS;
        next = du + SPAN * CHANNELS, transposed = next + m.r * CHANNELS;
    }
};

// Takes a span back: dstate is the gradient of the state after it, and of that before it when done.
template <typename T>
static void backward_span(const Channels<T>& channels, Matrices<T>& m, Tiles<T>& tiles, T* dstate, int64_t t0,
                          int steps) {
    const LowRank& s = m.s;
    int64_t width = channels.width, r = m.r, size = m.all * CHANNELS, used = (steps + CHUNK - 1) / CHUNK;
    channels.load_inputs(tiles.du, t0, steps);
    channels.load(tiles.dy, s.y, t0, steps);
    channels.load_kept(tiles.rows + CHUNK * CHANNELS, t0);
    for (int64_t c = 0; c < used; c++) {
        T* u = tiles.rows + c * size;
        memcpy(u, tiles.du + c * CHUNK * CHANNELS, sizeof(T) * CHUNK * CHANNELS);
        channels.advance(c, u + CHUNK * CHANNELS, u, u + size + CHUNK * CHANNELS);
    }
    for (int64_t c = used - 1; c >= 0; c--) {
        const T *dy = tiles.dy + c * CHUNK * CHANNELS, *pairs = m.pairs + c * CHUNK * CHUNK;
        const T *seen = m.seen + c * CHUNK * m.R, *left = m.left + c * CHUNK * m.R;
        T *du = tiles.du + c * CHUNK * CHANNELS, *dmatrix = m.dmatrix(c), *next = tiles.next;
        transpose<T>(m.all, width, tiles.rows + c * size, CHANNELS, tiles.transposed, m.row);
        multiply<T>(CHUNK, m.row, width, dy, CHANNELS, 1, tiles.transposed, m.row, dmatrix, m.row, true);
        multiply<T>(r, m.row, width, dstate, CHANNELS, 1, tiles.transposed, m.row, dmatrix + CHUNK * m.row, m.row,
                    true);
        multiply<T>(CHUNK, width, CHUNK, pairs, 1, CHUNK, dy, CHANNELS, du, CHANNELS, false, UPPER_A);
        multiply<T>(CHUNK, width, r, left, m.R, 1, dstate, CHANNELS, du, CHANNELS, true);
        multiply<T>(r, width, r, m.power(CHUNK), 1, m.R, dstate, CHANNELS, next, CHANNELS, false);
        multiply<T>(r, width, CHUNK, seen, 1, m.R, dy, CHANNELS, next, CHANNELS, true);
        memcpy(dstate, next, sizeof(T) * r * CHANNELS);
    }
    if (s.delta.data) {
        channels.load(tiles.dy, s.x, t0, steps);  // dy is done
        channels.places(s.ddelta, t0, steps, [&](int t, T* to) {
            const T *du = tiles.du + t * CHANNELS, *x = tiles.dy + t * CHANNELS;
            for (int64_t c = 0; c < channels.lanes; c++) to[c] = du[c] * x[c];
        });
        channels.places(s.delta, t0, steps, [&](int t, const T* delta) {
            for (int64_t c = 0; c < channels.lanes; c++) tiles.du[t * CHANNELS + c] *= delta[c];
        });
    }
    channels.add(tiles.du, s.dx, t0, steps);
}

template <typename T> static void backward(const LowRank& s) {
    int64_t L = s.places.height * s.places.width, blocks = (s.channels + CHANNELS - 1) / CHANNELS, r = s.rank;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int64_t task = 0; task < s.batch * s.parts; task++) {
        int64_t part = task % s.parts, from = blocks * part / s.parts, to = blocks * (part + 1) / s.parts;
        int64_t b = task / s.parts, size = r * CHANNELS, table = (CHUNK + 1) * r * r, slice = part * s.batch + b;
        Matrices<T> m(s, b, true);
        Tiles<T> tiles(m);
        std::unique_ptr<T[]> dstates(new T[(to - from) * size]);
        for (int64_t direction = 0; direction < DIRECTIONS; direction++) {
            m.load_direction(direction);
            memset(dstates.get(), 0, sizeof(T) * (to - from) * size);
            memset(m.dpowers, 0, sizeof(T) * (CHUNK + 1) * r * m.R);
            for (int64_t t0 = (L - 1) / SPAN * SPAN; t0 >= 0; t0 -= SPAN) {
                int steps = L - t0 < SPAN ? L - t0 : SPAN;
                m.make(t0, steps);
                memset(m.dmatrices, 0, sizeof(T) * CHUNKS * m.all * m.row);
                for (int64_t block = from; block < to; block++)
                    backward_span(Channels<T>(m, block), m, tiles, dstates.get() + (block - from) * size, t0, steps);
                m.pull_back(t0, steps, (T*)s.drows + part * s.batch * DIRECTIONS * L * (2 * r + 1));
            }
            T* dpowers = (T*)s.dpowers + (slice * DIRECTIONS + direction) * table;
            for (int64_t i = 0; i < (CHUNK + 1) * r; i++) memcpy(dpowers + i * r, m.dpowers + i * m.R, sizeof(T) * r);
        }
    }
}

extern "C" {
void forward_float(const LowRank* s) { forward<float>(*s); }
void forward_double(const LowRank* s) { forward<double>(*s); }
void backward_float(const LowRank* s) { backward<float>(*s); }
void backward_double(const LowRank* s) { backward<double>(*s); }
int chunk_places() { return CHUNK; }
int span_places() { return SPAN; }
int block_channels() { return CHANNELS; }
}
