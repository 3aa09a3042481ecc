// Winograd's convolution F(4 × 4, 3 × 3) (Lavin & Gray 2016) and its gradients, float32.
//
// Y = Aᵀ[(G·g·Gᵀ) ⊙ (Bᵀ·d·B)]A for each 4 × 4 tile of outputs; ⊙ becomes 36 matrix products over channels. Images are
// (B, H, W, C), C fastest and divisible by 8. A few tiles at a time go through all three steps while they are in a core's
// cache. Each sum has a fixed order, so results do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using lanes = float __attribute__((vector_size(32)));  // eight channels
constexpr int64_t kLanes = 8, kPanel = 2 * kLanes;     // filters are kept in panels of 16 output channels
constexpr int64_t kBlock = 1 << 18;                    // values of transformed tiles that a thread holds: 1 MiB
constexpr int64_t kDepth = 128;                        // tiles that a gradient sums at a time

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

// Map · x · Mapᵀ for in × in values x of eight channels each; get(i, j) gives them, put(i, j, v) takes the results.
template <class Map, class Get, class Put>
inline void both_axes(const Get& get, const Put& put) {
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
  int64_t B, H, W;
  int64_t rows() const { return (H + 3) / 4; }
  int64_t columns() const { return (W + 3) / 4; }
  int64_t tiles() const { return B * rows() * columns(); }
  int64_t image(int64_t tile) const { return tile / (rows() * columns()); }
  int64_t top(int64_t tile) const { return tile / columns() % rows() * 4; }
  int64_t left(int64_t tile) const { return tile % columns() * 4; }
};

// Transformed tiles (36, tiles, C). Rows and planes are spaced so that neither lands in one set of the first cache.
struct Tiles {
  int64_t row, plane;
  Tiles(int64_t tiles, int64_t C) : row(C % 64 ? C : C + kPanel), plane((tiles * row + 1023) / 1024 * 1024 + kPanel) {}
  int64_t size() const { return 36 * plane; }
};

// x (B, H, W, C) → Bᵀ·d·B of the 6 × 6 pixels around a tile, zeros beyond the border.
void transform_input(const Grid& g, const float* x, int64_t C, int64_t tile, float* to, int64_t plane) {
  const int64_t top = g.top(tile) - 1, left = g.left(tile) - 1;
  const float* image = x + g.image(tile) * g.H * g.W * C;
  const bool inside = top >= 0 && left >= 0 && top + 6 <= g.H && left + 6 <= g.W;
  for (int64_t c = 0; c < C; c += kLanes) {
    const auto put = [&](int i, int j, lanes v) { store(to + (i * 6 + j) * plane + c, v); };
    if (inside) {
      const float* corner = image + (top * g.W + left) * C + c;
      both_axes<Input>([&](int i, int j) { return load(corner + (i * g.W + j) * C); }, put);
    } else {
      both_axes<Input>([&](int i, int j) {
        const int64_t row = top + i, column = left + j;
        const bool there = row >= 0 && row < g.H && column >= 0 && column < g.W;
        return there ? load(image + (row * g.W + column) * C + c) : lanes{};
      }, put);
    }
  }
}

// Aᵀ·m·A of a transformed tile, plus the image's shift (K) and residual (B, H, W, K), each unless null → y (B, H, W, K).
void transform_output(const Grid& g, const float* from, int64_t plane, const float* shift, const float* residual,
                      float* y, int64_t K, int64_t tile) {
  const int64_t top = g.top(tile), left = g.left(tile);
  const int64_t height = std::min<int64_t>(4, g.H - top), width = std::min<int64_t>(4, g.W - left);
  const int64_t corner = ((g.image(tile) * g.H + top) * g.W + left) * K;
  for (int64_t k = 0; k < K; k += kLanes) {
    const lanes level = shift ? load(shift + k) : lanes{};
    both_axes<Output>([&](int i, int j) { return load(from + (i * 6 + j) * plane + k); }, [&](int i, int j, lanes v) {
      if (i >= height || j >= width) return;
      const int64_t at = corner + (i * g.W + j) * K + k;
      store(y + at, residual ? v + level + load(residual + at) : v + level);
    });
  }
}

// The transpose of transform_output: dy (B, H, W, K) → A·dy·Aᵀ of a tile, zeros beyond the border.
void transform_output_t(const Grid& g, const float* dy, int64_t K, int64_t tile, float* to, int64_t plane) {
  const int64_t top = g.top(tile), left = g.left(tile);
  const int64_t height = std::min<int64_t>(4, g.H - top), width = std::min<int64_t>(4, g.W - left);
  const float* corner = dy + ((g.image(tile) * g.H + top) * g.W + left) * K;
  for (int64_t k = 0; k < K; k += kLanes)
    both_axes<OutputT>(
        [&](int i, int j) { return i < height && j < width ? load(corner + (i * g.W + j) * K + k) : lanes{}; },
        [&](int i, int j, lanes v) { store(to + (i * 6 + j) * plane + k, v); });
}

struct Matrix {  // element (i, j) at data[i · row + j · column]
  const float* data;
  int64_t row, column;
};

// c (R × 8V, rows spaced by c_row) = a (R × depth) · b (depth × 8V, b's columns adjacent), added to c if `add`.
template <int R, int V>
inline void multiply(Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool add) {
  lanes sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * c_row + v * kLanes) : lanes{};
  for (int64_t d = 0; d < depth; ++d) {
    lanes right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + d * b_row + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float left = a.data[r * a.row + d * a.column];
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
}

// The same for any number of rows: six at a time keep the multipliers of a core busy.
template <int V>
void multiply_rows(int64_t rows, Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                   bool add) {
  for (; rows >= 6; rows -= 6, a.data += 6 * a.row, c += 6 * c_row)
    multiply<6, V>(a, b, b_row, depth, c, c_row, add);
  switch (rows) {
    case 5: return multiply<5, V>(a, b, b_row, depth, c, c_row, add);
    case 4: return multiply<4, V>(a, b, b_row, depth, c, c_row, add);
    case 3: return multiply<3, V>(a, b, b_row, depth, c, c_row, add);
    case 2: return multiply<2, V>(a, b, b_row, depth, c, c_row, add);
    case 1: return multiply<1, V>(a, b, b_row, depth, c, c_row, add);
  }
}

void multiply_panel(int64_t columns, int64_t rows, Matrix a, const float* b, int64_t b_row, int64_t depth, float* c,
                    int64_t c_row, bool add) {
  if (columns >= kPanel) multiply_rows<2>(rows, a, b, b_row, depth, c, c_row, add);
  else multiply_rows<1>(rows, a, b, b_row, depth, c, c_row, add);
}

inline void transpose(lanes* m) {  // 8 × 8
  using index = int32_t __attribute__((vector_size(32)));
  constexpr index low1 = {0, 8, 2, 10, 4, 12, 6, 14}, high1 = {1, 9, 3, 11, 5, 13, 7, 15};
  constexpr index low2 = {0, 1, 8, 9, 4, 5, 12, 13}, high2 = {2, 3, 10, 11, 6, 7, 14, 15};
  constexpr index low4 = {0, 1, 2, 3, 8, 9, 10, 11}, high4 = {4, 5, 6, 7, 12, 13, 14, 15};
  const auto swap = [m](int step, index low, index high) {
    for (int i = 0; i < 8; ++i)
      if (!(i & step)) {
        const lanes a = m[i], b = m[i + step];
        m[i] = __builtin_shuffle(a, b, low);
        m[i + step] = __builtin_shuffle(a, b, high);
      }
  };
  swap(1, low1, high1);
  swap(2, low2, high2);
  swap(4, low4, high4);
}

// Filters (36, channels_out / 16, channels_in, 16), 16 values between the planes; the last panel may have 8 columns.
inline int64_t plane_of(int64_t C, int64_t K) { return C * K + kPanel; }
inline int64_t panel_at(int64_t p, int64_t column, int64_t depth, int64_t columns) {
  return p * plane_of(depth, columns) + column / kPanel * kPanel * depth;
}

}  // namespace

extern "C" {

int available() { return 1; }

// weight (K, 3, 3, C) → G·g·Gᵀ in panels over K, for the convolution (C → K channels).
void winograd_filters(const float* weight, float* filters, int64_t K, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < K; k += kLanes)
    for (int64_t c = 0; c < C; c += kLanes) {
      lanes block[36][kLanes];
      for (int64_t r = 0; r < kLanes; ++r)
        both_axes<Filter>([&](int i, int j) { return load(weight + ((k + r) * 9 + i * 3 + j) * C + c); },
                          [&](int i, int j, lanes v) { block[i * 6 + j][r] = v; });
      const int64_t width = std::min(kPanel, K - k / kPanel * kPanel);
      for (int p = 0; p < 36; ++p) {
        transpose(block[p]);
        float* to = filters + panel_at(p, k, C, K) + c * width + k % kPanel;
        for (int64_t r = 0; r < kLanes; ++r) store(to + r * width, block[p][r]);
      }
    }
}

// weight (K, 3, 3, C) → panels over C of the rotated filters, for the gradient with respect to x (K → C channels).
void winograd_filters_back(const float* weight, float* filters, int64_t K, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < C; c += kLanes) {
      const int64_t width = std::min(kPanel, C - c / kPanel * kPanel);
      both_axes<Filter>([&](int i, int j) { return load(weight + (k * 9 + (2 - i) * 3 + 2 - j) * C + c); },
                        [&](int i, int j, lanes v) {
                          store(filters + panel_at(i * 6 + j, c, K, C) + k * width + c % kPanel, v);
                        });
    }
}

// y (B, H, W, K) = x (B, H, W, C) convolved with the filters, zeros beyond the border, plus shift (B, K) and residual
// (B, H, W, K), each unless null.
void winograd_convolve(const float* x, const float* filters, const float* shift, const float* residual, float* y,
                       int64_t B, int64_t H, int64_t W, int64_t C, int64_t K, int threads) {
  const Grid g{B, H, W};
  const int64_t tiles = g.tiles(), most = std::max<int64_t>(12, kBlock / (36 * (C + K)) / 6 * 6);
  const int64_t rounds = (tiles + threads * most - 1) / (threads * most);  // of all threads, with equal shares
  const int64_t block = (tiles + threads * rounds - 1) / (threads * rounds);
  const Tiles in(block, C), out(block, K);
#pragma omp parallel num_threads(threads)
  {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), in.size() + out.size()));
    float *from = scratch.data(), *to = from + in.size();
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tiles; first += block) {
      const int64_t count = std::min(block, tiles - first);
      for (int64_t t = 0; t < count; ++t) transform_input(g, x, C, first + t, from + t * in.row, in.plane);
      for (int p = 0; p < 36; ++p)
        for (int64_t k = 0; k < K; k += kPanel)
          multiply_panel(K - k, count, {from + p * in.plane, in.row, 1}, filters + panel_at(p, k, C, K),
                         std::min(kPanel, K - k), C, to + p * out.plane + k, out.row, false);
      for (int64_t t = 0; t < count; ++t) {
        const float* level = shift ? shift + g.image(first + t) * K : nullptr;
        transform_output(g, to + t * out.row, out.plane, level, residual, y, K, first + t);
      }
    }
  }
}

// dweight (K, 3, 3, C) and dshift (B, K) from x (B, H, W, C) and dy (B, H, W, K).
void winograd_weight_gradient(const float* x, const float* dy, float* dweight, float* dshift, int64_t B, int64_t H,
                              int64_t W, int64_t C, int64_t K, int threads) {
  const Grid g{B, H, W};
  const int64_t tiles = g.tiles(), depth = std::min(tiles, kDepth), rows = 24;
  const Tiles in(depth, C), up(depth, K);
  static thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), in.size() + up.size() + 36 * plane_of(C, K)));
  float *from = memory.data(), *to = from + in.size(), *sums = to + up.size();
  std::fill(dshift, dshift + B * K, 0.f);
#pragma omp parallel num_threads(threads)
  {
    for (int64_t first = 0; first < tiles; first += depth) {
      const int64_t count = std::min(depth, tiles - first);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t) {
        transform_input(g, x, C, first + t, from + t * in.row, in.plane);
        transform_output_t(g, dy, K, first + t, to + t * up.row, up.plane);
      }
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < 36; ++p)
        for (int64_t k = 0; k < K; k += rows)
          for (int64_t c = 0; c < C; c += kPanel)
            multiply_panel(C - c, std::min(rows, K - k), {to + p * up.plane + k, 1, up.row}, from + p * in.plane + c,
                           in.row, count, sums + p * plane_of(C, K) + k * C + c, C, first > 0);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < K; k += kLanes)  // the second row of A is all ones: a tile's (1, 1) is the sum of its dy
        for (int64_t t = 0; t < count; ++t) {
          float* sum = dshift + g.image(first + t) * K + k;
          store(sum, load(sum) + load(to + 7 * up.plane + t * up.row + k));
        }
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; c += kLanes)
        both_axes<FilterT>([&](int i, int j) { return load(sums + (i * 6 + j) * plane_of(C, K) + k * C + c); },
                           [&](int i, int j, lanes v) { store(dweight + (k * 9 + i * 3 + j) * C + c, v); });
  }
}
}
