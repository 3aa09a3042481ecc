// The linear maps of Winograd's convolution F(4 × 4, 3 × 3) (Lavin & Gray 2016) and their transposes, float32.
//
// Y = Aᵀ[(G·g·Gᵀ) ⊙ (Bᵀ·d·B)]A for each 4 × 4 tile of outputs. What ⊙ becomes over channels is 36 matrix products, which
// winograd.py leaves to torch. Images are (B, H, W, C) and transformed tiles (36, B·tiles, C), C fastest and divisible
// by 8. Each sum has a fixed order, so results do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using lanes = float __attribute__((vector_size(32)));  // eight channels
constexpr int64_t kLanes = 8, kChunk = 32;             // a task that must own its outputs takes kChunk channels

inline lanes load(const float* p) { lanes v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, lanes v) { std::memcpy(p, &v, sizeof v); }

struct Input {  // Bᵀ
  static constexpr int in = 6, out = 6;
  static void apply(const lanes* d, lanes* o) {
    const lanes a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
    o[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    o[1] = a + b;
    o[2] = a - b;
    o[3] = c + e;
    o[4] = c - e;
    o[5] = 4.f * d[1] - 5.f * d[3] + d[5];
  }
};
struct InputT {  // B
  static constexpr int in = 6, out = 6;
  static void apply(const lanes* d, lanes* o) {
    o[0] = 4.f * d[0];
    o[1] = 4.f * (d[2] - d[1] + d[5]) + 2.f * (d[4] - d[3]);
    o[2] = -5.f * d[0] - 4.f * (d[1] + d[2]) - (d[3] + d[4]);
    o[3] = d[1] - d[2] + 2.f * (d[3] - d[4]) - 5.f * d[5];
    o[4] = d[0] + d[1] + d[2] + d[3] + d[4];
    o[5] = d[5];
  }
};
struct Output {  // Aᵀ
  static constexpr int in = 6, out = 4;
  static void apply(const lanes* d, lanes* o) {
    const lanes s = d[1] + d[2], t = d[1] - d[2], u = d[3] + d[4], v = d[3] - d[4];
    o[0] = d[0] + s + u;
    o[1] = t + 2.f * v;
    o[2] = s + 4.f * u;
    o[3] = t + 8.f * v + d[5];
  }
};
struct OutputT {  // A
  static constexpr int in = 4, out = 6;
  static void apply(const lanes* d, lanes* o) {
    const lanes s = d[0] + d[2], t = d[1] + d[3], u = d[0] + 4.f * d[2], v = 2.f * d[1] + 8.f * d[3];
    o[0] = d[0];
    o[1] = s + t;
    o[2] = s - t;
    o[3] = u + v;
    o[4] = u - v;
    o[5] = d[3];
  }
};
struct Filter {  // G
  static constexpr int in = 3, out = 6;
  static void apply(const lanes* d, lanes* o) {
    const lanes s = (-1.f / 6) * (d[0] + d[2]), t = (-1.f / 6) * d[1];
    const lanes u = (1.f / 24) * d[0] + (1.f / 6) * d[2], v = (1.f / 12) * d[1];
    o[0] = 0.25f * d[0];
    o[1] = s + t;
    o[2] = s - t;
    o[3] = u + v;
    o[4] = u - v;
    o[5] = d[2];
  }
};
struct FilterT {  // Gᵀ
  static constexpr int in = 6, out = 3;
  static void apply(const lanes* d, lanes* o) {
    const lanes s = d[1] + d[2], u = d[3] + d[4];
    o[0] = 0.25f * d[0] - (1.f / 6) * s + (1.f / 24) * u;
    o[1] = (1.f / 6) * (d[2] - d[1]) + (1.f / 12) * (d[3] - d[4]);
    o[2] = (1.f / 6) * (u - s) + d[5];
  }
};

// Map · x · Mapᵀ for in × in values x of eight channels each; load(i, j) gives them, store(i, j, v) takes the results.
template <class Map, class Load, class Store>
inline void both_axes(const Load& get, const Store& put) {
  lanes mid[Map::in][Map::out];  // [column][row]
  for (int j = 0; j < Map::in; ++j) {
    lanes column[Map::in];
    for (int i = 0; i < Map::in; ++i) column[i] = get(i, j);
    Map::apply(column, mid[j]);
  }
  for (int i = 0; i < Map::out; ++i) {
    lanes row[Map::in], result[Map::out];
    for (int j = 0; j < Map::in; ++j) row[j] = mid[j][i];
    Map::apply(row, result);
    for (int j = 0; j < Map::out; ++j) put(i, j, result[j]);
  }
}

struct Grid {
  int64_t B, H, W, C;
  int64_t rows() const { return (H + 3) / 4; }
  int64_t columns() const { return (W + 3) / 4; }
  int64_t tiles() const { return B * rows() * columns(); }
};

template <class Task>
void each_tile_row(const Grid& g, int threads, const Task& task) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < g.B * g.rows(); ++r)
    for (int64_t column = 0; column < g.columns(); ++column)
      task(r / g.rows(), r % g.rows() * 4, column * 4, r * g.columns() + column);
}

}  // namespace

extern "C" {

// x (B, H, W, C) → Bᵀ·d·B of the 6 × 6 pixels around each tile, zeros beyond the border.
void winograd_input(const float* x, float* tiles, int64_t B, int64_t H, int64_t W, int64_t C, int threads) {
  const Grid g{B, H, W, C};
  const int64_t plane = g.tiles() * C;
  each_tile_row(g, threads, [&](int64_t b, int64_t y, int64_t left, int64_t tile) {
    const float* image = x + b * H * W * C;
    const bool inside = y >= 1 && left >= 1 && y + 5 <= H && left + 5 <= W;
    for (int64_t c = 0; c < C; c += kLanes) {
      const auto put = [&](int i, int j, lanes v) { store(tiles + (i * 6 + j) * plane + tile * C + c, v); };
      if (inside) {
        const float* corner = image + ((y - 1) * W + left - 1) * C + c;
        both_axes<Input>([&](int i, int j) { return load(corner + (i * W + j) * C); }, put);
      } else {
        both_axes<Input>([&](int i, int j) {
          const int64_t row = y + i - 1, column = left + j - 1;
          const bool there = row >= 0 && row < H && column >= 0 && column < W;
          return there ? load(image + (row * W + column) * C + c) : lanes{};
        }, put);
      }
    }
  });
}

// The transpose of winograd_input: dx is overwritten with what its tiles, which overlap, add up to.
void winograd_input_t(const float* tiles, float* dx, int64_t B, int64_t H, int64_t W, int64_t C, int threads) {
  const Grid g{B, H, W, C};
  const int64_t plane = g.tiles() * C, chunks = (C + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < B * chunks; ++task) {
    const int64_t b = task / chunks, first = task % chunks * kChunk, last = std::min(C, first + kChunk);
    float* image = dx + b * H * W * C;
    for (int64_t p = 0; p < H * W; ++p) std::memset(image + p * C + first, 0, (last - first) * sizeof(float));
    for (int64_t r = 0; r < g.rows(); ++r)
      for (int64_t q = 0; q < g.columns(); ++q)
        for (int64_t c = first; c < last; c += kLanes) {
          const float* from = tiles + ((b * g.rows() + r) * g.columns() + q) * C + c;
          both_axes<InputT>([&](int i, int j) { return load(from + (i * 6 + j) * plane); }, [&](int i, int j, lanes v) {
            const int64_t row = 4 * r + i - 1, column = 4 * q + j - 1;
            if (row < 0 || row >= H || column < 0 || column >= W) return;
            float* at = image + (row * W + column) * C + c;
            store(at, load(at) + v);
          });
        }
  }
}

// Aᵀ·m·A of each transformed tile, plus the bias (C) unless null → y (B, H, W, C).
void winograd_output(const float* tiles, const float* bias, float* y, int64_t B, int64_t H, int64_t W, int64_t C,
                     int threads) {
  const Grid g{B, H, W, C};
  const int64_t plane = g.tiles() * C;
  each_tile_row(g, threads, [&](int64_t b, int64_t top, int64_t left, int64_t tile) {
    float* image = y + b * H * W * C;
    const int64_t height = std::min<int64_t>(4, H - top), width = std::min<int64_t>(4, W - left);
    for (int64_t c = 0; c < C; c += kLanes) {
      const lanes add = bias ? load(bias + c) : lanes{};
      both_axes<Output>([&](int i, int j) { return load(tiles + (i * 6 + j) * plane + tile * C + c); },
                        [&](int i, int j, lanes v) {
                          if (i < height && j < width) store(image + ((top + i) * W + left + j) * C + c, v + add);
                        });
    }
  });
}

// The transpose of winograd_output, without the bias: dy → A·dy·Aᵀ of each tile, zeros beyond the border.
void winograd_output_t(const float* dy, float* tiles, int64_t B, int64_t H, int64_t W, int64_t C, int threads) {
  const Grid g{B, H, W, C};
  const int64_t plane = g.tiles() * C;
  each_tile_row(g, threads, [&](int64_t b, int64_t top, int64_t left, int64_t tile) {
    const float* image = dy + b * H * W * C;
    const int64_t height = std::min<int64_t>(4, H - top), width = std::min<int64_t>(4, W - left);
    for (int64_t c = 0; c < C; c += kLanes)
      both_axes<OutputT>(
          [&](int i, int j) {
            return i < height && j < width ? load(image + ((top + i) * W + left + j) * C + c) : lanes{};
          },
          [&](int i, int j, lanes v) { store(tiles + (i * 6 + j) * plane + tile * C + c, v); });
  });
}

// Filters (K, 3, 3, C) → G·g·Gᵀ as (36, K, C).
void winograd_filter(const float* filters, float* out, int64_t K, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < C; c += kLanes)
      both_axes<Filter>([&](int i, int j) { return load(filters + (k * 9 + i * 3 + j) * C + c); },
                        [&](int i, int j, lanes v) { store(out + ((i * 6 + j) * K + k) * C + c, v); });
}

// The transpose of winograd_filter.
void winograd_filter_t(const float* out, float* filters, int64_t K, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < C; c += kLanes)
      both_axes<FilterT>([&](int i, int j) { return load(out + ((i * 6 + j) * K + k) * C + c); },
                         [&](int i, int j, lanes v) { store(filters + (k * 9 + i * 3 + j) * C + c, v); });
}
}
