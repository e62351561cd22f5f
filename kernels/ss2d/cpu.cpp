// The selective scan over images on a CPU. README.md counts bytes and operations.
//
// It is the selective scan with a group of channels for each direction, and one more thing: the places of a chunk of
// steps lie in pieces of rows or columns, forwards or backwards. Images are read and written in place, channels next
// to each other, and the four outputs of a place are added up there. A task has all directions of its channels, one
// after another, so that no two tasks add to the same place, and sums have one order.
//
// b batch · k direction · d channel · n state · t time
#include "../scan_steps.h"
#include "image.h"

// The arguments of a call; backward, y holds its gradient.
struct Scan2D {
    Scan scan;  // its u, delta, y, state and starts are not used
    Places places;
    Image x, delta, y, dx, ddelta;
};

template <typename T> struct Walk {
    static constexpr int W = WIDTH<T>;
    const Scan2D& s;
    Block<T>& block;
    int64_t k;

    T* start(const Image& image) const {
        return (T*)image.data + block.b * image.batch + k * image.direction + block.first;
    }
    void load(T* tile, const Image& image, int64_t t0, int steps) const {
        s.places.pieces(image, k, t0, steps, [&](int step, int64_t offset, int64_t stride, int count) {
            load_tile(tile + step * W, start(image) + offset, 1, stride, block.lanes, count, 0);
        });
    }
    void store(const T* tile, const Image& image, int64_t t0, int steps) const {
        s.places.pieces(image, k, t0, steps, [&](int step, int64_t offset, int64_t stride, int count) {
            store_tile(tile + step * W, start(image) + offset, 1, stride, block.lanes, count, 0);
        });
    }
    // What the first direction stores, and the others add to.
    void add(const T* tile, const Image& image, int64_t t0, int steps) const {
        if (k == 0) return store(tile, image, t0, steps);
        s.places.pieces(image, k, t0, steps, [&](int step, int64_t offset, int64_t stride, int count) {
            for (int t = 0; t < count; t++) {
                T* to = start(image) + offset + t * stride;
                const T* from = tile + (step + t) * W;
                if (block.lanes == W) ::store(to, ::load<T>(to) + ::load<T>(from));
                else
                    for (int c = 0; c < block.lanes; c++) to[c] += from[c];
            }
        });
    }
    int load_inputs(int64_t t0) const {
        int steps = block.L - t0 < STEPS ? block.L - t0 : STEPS;
        load(block.delta, s.delta, t0, steps);
        load(block.u, s.x, t0, steps);
        for (int t = 0; t < steps; t++)
            ::store(block.x + t * W, ::load<T>(block.delta + t * W) * ::load<T>(block.u + t * W));
        return steps;
    }
};

template <typename T> static void forward(const Scan2D& s) {
    constexpr int W = WIDTH<T>;
    const Sizes& size = s.scan.size;
    int64_t N = size.states, blocks = (size.channels / DIRECTIONS + W - 1) / W;
    int64_t busy = size.batch * blocks / (4 * size.threads), together = Block<T>::interleaved_blocks(size);
    together = together < busy ? together : busy > 1 ? busy : 1;
    int64_t parts = (blocks + together - 1) / together;
#pragma omp parallel for schedule(dynamic) num_threads(size.threads)
    for (int64_t task = 0; task < size.batch * parts; task++) {
        int64_t from = task % parts * together, to = from + together < blocks ? from + together : blocks;
        for (int64_t direction = 0; direction < DIRECTIONS; direction++) {
            Block<T> k(s.scan, task / parts, direction);
            Walk<T> walk{s, k, direction};
            k.for_blocks(from, to, 0, [&] { k.load_decays(), memset(k.state, 0, sizeof(T) * W * N); });
            for (int64_t t0 = 0; t0 < k.L; t0 += STEPS)
                k.for_blocks(from, to, 0, [&] {
                    if (s.scan.chunk_states) memcpy(k.chunk_state(t0 / STEPS), k.state, sizeof(T) * W * N);
                    int steps = walk.load_inputs(t0);
                    memset(k.y, 0, sizeof(T) * W * STEPS);
                    forward_chunk<T, false>(k, t0, steps);
                    walk.add(k.y, s.y, t0, steps);
                });
        }
    }
}

template <typename T> static void backward_tile(Walk<T>& walk, Gradients<T>& to, int64_t t0) {
    constexpr int W = WIDTH<T>;
    Block<T>& k = walk.block;
    int steps = walk.load_inputs(t0);
    walk.load(k.y, walk.s.y, t0, steps);
    memset(to.du, 0, sizeof to.du);
    memset(to.ddelta, 0, sizeof to.ddelta);
    backward_chunk<T, false>(k, to, k.chunk_state(t0 / STEPS), t0, steps);
    for (int t = 0; t < steps; t++) {
        Vec<T> dx = load<T>(to.du + t * W);
        store(to.ddelta + t * W, load<T>(to.ddelta + t * W) + dx * load<T>(k.u + t * W));
        store(to.du + t * W, dx * load<T>(k.delta + t * W));
    }
    walk.add(to.du, walk.s.dx, t0, steps);
    walk.store(to.ddelta, walk.s.ddelta, t0, steps);
}

template <typename T> static void backward(const Scan2D& s) {
    constexpr int W = WIDTH<T>;
    const Sizes& size = s.scan.size;
    int64_t L = size.length, N = size.states, S = size.slices, blocks = (size.channels / DIRECTIONS + W - 1) / W;
#pragma omp parallel for schedule(dynamic) num_threads(size.threads)
    for (int64_t task = 0; task < size.batch * S; task++) {
        int64_t slice = task % S, b = task / S;
        std::unique_ptr<Gradients<T>> to(new Gradients<T>);
        for (int64_t direction = 0; direction < DIRECTIONS; direction++) {
            Block<T> k(s.scan, b, direction);
            Walk<T> walk{s, k, direction};
            int64_t pair = b * DIRECTIONS + direction;
            to->dB = (T*)s.scan.dB + (slice * size.batch * DIRECTIONS + pair) * L * N;
            to->dC = (T*)s.scan.dC + (slice * size.batch * DIRECTIONS + pair) * L * N;
            to->dA = (T*)s.scan.dA + b * size.channels * N;
            int64_t end = blocks * (slice + 1) / S, together = Block<T>::interleaved_blocks(size);
            for (int64_t from = blocks * slice / S; from < end; from += together) {
                int64_t last = from + together < end ? from + together : end;
                k.for_blocks(from, last, 0, [&] { k.load_decays(), memset(k.state, 0, sizeof(T) * W * N); });
                for (int64_t t0 = (L - 1) / STEPS * STEPS; t0 >= 0; t0 -= STEPS)
                    k.for_blocks(from, last, 0, [&] { backward_tile(walk, *to, t0); });
            }
        }
    }
}

extern "C" {
void forward_float(const Scan2D* s) { forward<float>(*s); }
void forward_double(const Scan2D* s) { forward<double>(*s); }
void backward_float(const Scan2D* s) { backward<float>(*s); }
void backward_double(const Scan2D* s) { backward<double>(*s); }
int lanes_of_float() { return WIDTH<float>; }
int chunk_steps() { return STEPS; }
}
