// Where the places of an image lie in memory, in the order of each direction.
#pragma once
#include <cstdint>

constexpr int64_t DIRECTIONS = 4;

// A tensor [batch, directions, channels, H, W], with channels next to each other.
struct Image {
    void* data;
    int64_t batch, direction, row, column;  // strides
};

struct Places {
    int64_t height, width;
    // Calls `each(step, offset, stride, count)` for the pieces of the steps t0 .. t0 + steps in direction k: as many
    // places, the first at an offset, each further one a stride away.
    template <typename Each> void pieces(const Image& image, int64_t k, int64_t t0, int steps, Each each) const {
        bool columns = k % 2, backwards = k >= 2;
        int64_t inner = columns ? height : width;
        int64_t next_inner = columns ? image.row : image.column, next_outer = columns ? image.column : image.row;
        for (int step = 0; step < steps;) {
            int64_t place = backwards ? height * width - 1 - t0 - step : t0 + step;
            int64_t outer = place / inner, i = place % inner, count = backwards ? i + 1 : inner - i;
            if (count > steps - step) count = steps - step;
            each(step, outer * next_outer + i * next_inner, backwards ? -next_inner : next_inner, (int)count);
            step += count;
        }
    }
};
