// Winograd's convolution F(2 × 2, 3 × 3) (Lavin & Gray 2016) and its gradients on bfloat16 images with float32 filters.
//
// Y = Aᵀ[(G·g·Gᵀ) ⊙ (Bᵀ·d·B)]A for each 2 × 2 tile of outputs; ⊙ becomes 16 matrix products over channels, whose
// factors are rounded to bfloat16 and whose sums are float32. Images are (B, H, W, C), C fastest and divisible by 16;
// H and W are even. A few tiles at a time go through all three steps while they are in a core's cache. Each sum has a
// fixed order, so results do not depend on the number of threads. Built and called by winograd.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

using bfloat = uint16_t;
using lanes = __m512;  // sixteen channels
constexpr int64_t kLanes = 16, kPanel = 2 * kLanes, kPlanes = 16;
constexpr int64_t kBlock = 1 << 18;  // bytes of transformed tiles that a thread holds
constexpr int64_t kDepth = 256;      // tiles that a gradient sums at a time
constexpr int64_t kChunk = 32;       // of them that a thread transforms at a time
constexpr int64_t kApart = 512;      // values by which planes miss each other's sets of the first cache
constexpr int kRows = 8;             // of a product, enough to keep the multipliers of a core busy

inline lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline lanes load(const bfloat* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline __m256i rounded(lanes v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
inline void store(float* p, lanes v) { _mm512_storeu_ps(p, v); }
inline void store(bfloat* p, lanes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v)); }
inline void store_pairs(bfloat* p, lanes even, lanes odd) {  // 16 × (even, odd), as the products take their factors
  const __m512i low = _mm512_cvtepu16_epi32(rounded(even)), high = _mm512_cvtepu16_epi32(rounded(odd));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

struct Input {  // Bᵀ
  static constexpr int in = 4, out = 4;
  static void apply(const lanes* d, lanes* o) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[1] - d[3];
  }
};
struct Output {  // Aᵀ
  static constexpr int in = 4, out = 2;
  static void apply(const lanes* d, lanes* o) {
    o[0] = d[0] + d[1] + d[2];
    o[1] = d[1] - d[2] - d[3];
  }
};
struct OutputT {  // A
  static constexpr int in = 2, out = 4;
  static void apply(const lanes* d, lanes* o) {
    o[0] = d[0];
    o[1] = d[0] + d[1];
    o[2] = d[0] - d[1];
    o[3] = lanes{} - d[1];
  }
};
struct Filter {  // G
  static constexpr int in = 3, out = 4;
  static void apply(const lanes* d, lanes* o) {
    const lanes s = 0.5f * (d[0] + d[2]), t = 0.5f * d[1];
    o[0] = d[0];
    o[1] = s + t;
    o[2] = s - t;
    o[3] = d[2];
  }
};
struct FilterT {  // Gᵀ
  static constexpr int in = 4, out = 3;
  static void apply(const lanes* d, lanes* o) {
    const lanes s = 0.5f * (d[1] + d[2]);
    o[0] = d[0] + s;
    o[1] = 0.5f * (d[1] - d[2]);
    o[2] = s + d[3];
  }
};

// Map · x for a column x, or Map · x · Mapᵀ of columns that have been through Map: [column][row] → [row · out + column].
template <class Map, class Get>
inline void down(const Get& get, lanes* to) {
  lanes column[Map::in];
#pragma GCC unroll 4
  for (int i = 0; i < Map::in; ++i) column[i] = get(i);
  Map::apply(column, to);
}
template <class Map>
inline void across(const lanes (*columns)[Map::out], lanes* to) {
#pragma GCC unroll 4
  for (int i = 0; i < Map::out; ++i) {
    lanes row[Map::in];
#pragma GCC unroll 4
    for (int j = 0; j < Map::in; ++j) row[j] = columns[j][i];
    Map::apply(row, to + i * Map::out);
  }
}

// Map · x · Mapᵀ for in × in values x of sixteen channels each; get(i, j) gives them, put(place, v) takes the results.
template <class Map, class Get, class Put>
inline void both_axes(const Get& get, const Put& put) {
  lanes columns[Map::in][Map::out], results[Map::out * Map::out];
#pragma GCC unroll 4
  for (int j = 0; j < Map::in; ++j) down<Map>([&](int i) { return get(i, j); }, columns[j]);
  across<Map>(columns, results);
#pragma GCC unroll 16
  for (int p = 0; p < Map::out * Map::out; ++p) put(p, results[p]);
}

struct Grid {
  int64_t B, H, W;
  int64_t rows() const { return H / 2; }
  int64_t columns() const { return W / 2; }
  int64_t tiles() const { return B * rows() * columns(); }
};

struct Tile {  // where a tile is; moves on to the next one
  const Grid& g;
  int64_t image, top, left;
  Tile(const Grid& g, int64_t number)
      : g(g), image(number / (g.rows() * g.columns())), top(number / g.columns() % g.rows() * 2),
        left(number % g.columns() * 2) {}
  void advance() {
    if ((left += 2) < g.W) return;
    left = 0;
    if ((top += 2) < g.H) return;
    top = 0;
    ++image;
  }
  int64_t pixel() const { return (image * g.H + top) * g.W + left; }
};

// Bᵀ·d·B of the 4 × 4 pixels around each of some tiles, zeros beyond the border: emit(t, c, 16 values of 16 channels),
// the tiles in order for each c. Neighbours share two columns.
template <class Emit>
inline void transform_inputs(const Grid& g, const bfloat* x, int64_t C, int64_t first, int64_t count, const Emit& emit) {
  for (int64_t c = 0; c < C; c += kLanes) {
    Tile tile(g, first);
    lanes columns[4][4], results[kPlanes];
    for (int64_t t = 0; t < count; ++t, tile.advance()) {
      const bfloat* corner = x + tile.pixel() * C + c;
      const bool above = tile.top > 0, below = tile.top + 2 < g.H;
      const auto fill = [&](int j) {  // of pixels left − 1 + j
        const int64_t column = tile.left + j - 1;
        if (column < 0 || column >= g.W) {
          std::fill(columns[j], columns[j] + 4, lanes{});
          return;
        }
        const bfloat* from = corner + (j - 1) * C;
        down<Input>([&](int i) {
          return (i > 0 || above) && (i < 3 || below) ? load(from + (i - 1) * g.W * C) : lanes{};
        }, columns[j]);
      };
      if (t == 0 || tile.left == 0) {
        fill(0);
        fill(1);
      } else {
        std::copy(columns[2], columns[4], columns[0]);
      }
      fill(2);
      fill(3);
      across<Input>(columns, results);
      emit(t, c, results);
    }
  }
}

// Aᵀ·m·A of some transformed tiles, plus their images' shift (B, K) and residual (B, H, W, K), each unless null → y.
void transform_outputs(const Grid& g, const float* from, int64_t plane, const float* shift, const bfloat* residual,
                       bfloat* y, int64_t K, int64_t first, int64_t count) {
  Tile tile(g, first);
  for (int64_t t = 0; t < count; ++t, tile.advance(), from += K) {
    const int64_t corner = tile.pixel() * K;
    for (int64_t k = 0; k < K; k += kLanes) {
      const lanes level = shift ? load(shift + tile.image * K + k) : lanes{};
      both_axes<Output>([&](int i, int j) { return load(from + (i * 4 + j) * plane + k); }, [&](int p, lanes v) {
        const int64_t at = corner + (p / 2 * g.W + p % 2) * K + k;
        store(y + at, residual ? v + level + load(residual + at) : v + level);
      });
    }
  }
}

// The transpose of transform_outputs: A·dy·Aᵀ of some tiles of dy (B, H, W, K), emitted like transform_inputs' values.
template <class Emit>
inline void transform_outputs_t(const Grid& g, const bfloat* dy, int64_t K, int64_t first, int64_t count,
                                const Emit& emit) {
  for (int64_t k = 0; k < K; k += kLanes) {
    Tile tile(g, first);
    lanes results[kPlanes];
    for (int64_t t = 0; t < count; ++t, tile.advance()) {
      const bfloat* corner = dy + tile.pixel() * K + k;
      both_axes<OutputT>([&](int i, int j) { return load(corner + (i * g.W + j) * K); },
                         [&](int p, lanes v) { results[p] = v; });
      emit(t, k, results);
    }
  }
}

// Takes what the two transforms emit and stores tiles in pairs, (16, tiles / 2, C, 2); an odd last one beside zeros.
struct InPairs {
  bfloat* to;
  int64_t plane, C, count;
  mutable lanes even[kPlanes];
  void operator()(int64_t t, int64_t c, const lanes* v) const {
    if (t % 2 == 0) std::copy(v, v + kPlanes, even);
    if (t % 2 == 0 && t + 1 < count) return;
    for (int p = 0; p < kPlanes; ++p)
      store_pairs(to + p * plane + (t & ~1) * C + 2 * c, even[p], t % 2 ? v[p] : lanes{});
  }
};

struct Pairs {  // factors of a product in pairs along its depth: element (i, d) at data[i · row + d · step]
  const uint32_t* data;
  int64_t row, step;
};

inline const uint32_t* pairs(const bfloat* p) { return reinterpret_cast<const uint32_t*>(p); }

// c (R × 16V, rows spaced by c_row) = a (R × 2·depth) · b (2·depth × 16V), added to c if `add`.
template <int R, int V>
inline void multiply(Pairs a, Pairs b, int64_t depth, float* c, int64_t c_row, bool add) {
  lanes sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * c_row + v * kLanes) : lanes{};
  for (int64_t d = 0; d < depth; ++d) {
    __m512bh right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      right[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b.data + d * b.step + v * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(a.data[r * a.row + d * a.step]));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
}

// The same for any number of rows.
template <int V>
void multiply_rows(int64_t rows, Pairs a, Pairs b, int64_t depth, float* c, int64_t c_row, bool add) {
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row)
    multiply<kRows, V>(a, b, depth, c, c_row, add);
  if (rows >= 4) {
    multiply<4, V>(a, b, depth, c, c_row, add);
    rows -= 4, a.data += 4 * a.row, c += 4 * c_row;
  }
  if (rows >= 2) {
    multiply<2, V>(a, b, depth, c, c_row, add);
    rows -= 2, a.data += 2 * a.row, c += 2 * c_row;
  }
  if (rows) multiply<1, V>(a, b, depth, c, c_row, add);
}

void multiply_panel(int64_t columns, int64_t rows, Pairs a, Pairs b, int64_t depth, float* c, int64_t c_row, bool add) {
  if (columns >= kPanel) multiply_rows<2>(rows, a, b, depth, c, c_row, add);
  else multiply_rows<1>(rows, a, b, depth, c, c_row, add);
}

// Filters (16, channels_out / 32, channels_in / 2, 32, 2), kApart values between the planes; the last panel may have 16
// columns.
inline int64_t panel_at(int64_t p, int64_t column, int64_t depth, int64_t columns) {
  return p * (columns * depth + kApart) + column / kPanel * kPanel * depth;
}
inline int64_t panel_width(int64_t column, int64_t columns) {
  return std::min(kPanel, columns - column / kPanel * kPanel);
}

// From one plane of n values to the next.
inline int64_t plane_of(int64_t n) { return (n + kApart - 1) / kApart * kApart + kApart / 8; }

}  // namespace

extern "C" {

int available() { return 1; }

// weight (K, 3, 3, C) → G·g·Gᵀ in panels over K, for the convolution (C → K channels).
void winograd_filters(const float* weight, bfloat* filters, int64_t K, int64_t C, int threads) {
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
  for (int64_t first = 0; first < K; first += kLanes)
    for (int64_t c = 0; c < C; c += kLanes) {
      const int64_t width = panel_width(first, K);
      for (int64_t k = first; k < first + kLanes; ++k)
        both_axes<Filter>([&](int i, int j) { return load(weight + (k * 9 + i * 3 + j) * C + c); },
                          [&](int p, lanes v) {
                            uint32_t words[kLanes / 2];
                            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), rounded(v));
                            bfloat* to = filters + panel_at(p, k, C, K) + c * width + k % kPanel * 2;
                            for (int64_t w = 0; w < kLanes / 2; ++w) std::memcpy(to + w * 2 * width, words + w, 4);
                          });
    }
}

// weight (K, 3, 3, C) → panels over C of the rotated filters, for the gradient with respect to x (K → C channels).
void winograd_filters_back(const float* weight, bfloat* filters, int64_t K, int64_t C, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < K; k += 2)
    for (int64_t c = 0; c < C; c += kLanes) {
      lanes even[kPlanes];
      const auto filter = [&](int64_t row) {
        return [=](int i, int j) { return load(weight + (row * 9 + (2 - i) * 3 + 2 - j) * C + c); };
      };
      both_axes<Filter>(filter(k), [&](int p, lanes v) { even[p] = v; });
      both_axes<Filter>(filter(k + 1), [&](int p, lanes v) {
        store_pairs(filters + panel_at(p, c, K, C) + k * panel_width(c, C) + c % kPanel * 2, even[p], v);
      });
    }
}

// y (B, H, W, K) = x (B, H, W, C) convolved with the filters, zeros beyond the border, plus shift (B, K) and residual
// (B, H, W, K), each unless null.
void winograd_convolve(const bfloat* x, const bfloat* filters, const float* shift, const bfloat* residual,
                            bfloat* y, int64_t B, int64_t H, int64_t W, int64_t C, int64_t K, int threads) {
  const Grid g{B, H, W};
  const int64_t tiles = g.tiles(), most = std::max<int64_t>(kRows, kBlock / (kPlanes * (2 * C + 4 * K)) / kRows * kRows);
  const int64_t rounds = (tiles + threads * most - 1) / (threads * most);  // of all threads, with equal shares
  const int64_t block = (tiles + threads * rounds - 1) / (threads * rounds);
  const int64_t in = plane_of(block * C), out = plane_of(block * K);
#pragma omp parallel num_threads(threads)
  {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), kPlanes * (in / 2 + out)));
    float* to = scratch.data();
    bfloat* from = reinterpret_cast<bfloat*>(to + kPlanes * out);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tiles; first += block) {
      const int64_t count = std::min(block, tiles - first);
      transform_inputs(g, x, C, first, count, [&](int64_t t, int64_t c, const lanes* v) {
#pragma GCC unroll 16
        for (int p = 0; p < kPlanes; ++p) store(from + p * in + t * C + c, v[p]);
      });
      for (int p = 0; p < kPlanes; ++p)
        for (int64_t k = 0; k < K; k += kPanel)
          multiply_panel(K - k, count, {pairs(from + p * in), C / 2, 1},
                         {pairs(filters + panel_at(p, k, C, K)), 0, panel_width(k, K)}, C / 2, to + p * out + k, K,
                         false);
      transform_outputs(g, to, out, shift, residual, y, K, first, count);
    }
  }
}

// dweight (K, 3, 3, C) and dshift (B, K), float32, from x (B, H, W, C) and dy (B, H, W, K).
void winograd_weight_gradient(const bfloat* x, const bfloat* dy, float* dweight, float* dshift, int64_t B,
                                   int64_t H, int64_t W, int64_t C, int64_t K, int threads) {
  const Grid g{B, H, W};
  const int64_t tiles = g.tiles(), depth = std::min((tiles + 1) / 2 * 2, kDepth), rows = 4 * kRows;
  const int64_t in = plane_of(depth * C), up = plane_of(depth * K), sum = plane_of(K * C);
  static thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), kPlanes * (in / 2 + up / 2 + sum)));
  float* sums = memory.data();
  bfloat *from = reinterpret_cast<bfloat*>(sums + kPlanes * sum), *to = from + kPlanes * in;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t first = 0; first < tiles; first += depth) {
      const int64_t count = std::min(depth, tiles - first);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; t += kChunk) {
        const int64_t part = std::min(kChunk, count - t);
        transform_inputs(g, x, C, first + t, part, InPairs{from + t * C, in, C, part});
        transform_outputs_t(g, dy, K, first + t, part, InPairs{to + t * K, up, K, part});
      }
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < kPlanes; ++p)
        for (int64_t k = 0; k < K; k += rows)
          for (int64_t c = 0; c < C; c += kPanel)
            multiply_panel(C - c, std::min(rows, K - k), {pairs(to + p * up + 2 * k), 1, K},
                           {pairs(from + p * in + 2 * c), 0, C}, (count + 1) / 2, sums + p * sum + k * C + c, C,
                           first > 0);
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; c += kLanes)
        both_axes<FilterT>([&](int i, int j) { return load(sums + (i * 4 + j) * sum + k * C + c); },
                           [&](int p, lanes v) { store(dweight + (k * 9 + p) * C + c, v); });
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; ++b) {
      std::fill(dshift + b * K, dshift + (b + 1) * K, 0.f);
      for (int64_t n = 0; n < H * W; ++n)
        for (int64_t k = 0; k < K; k += kLanes)
          store(dshift + b * K + k, load(dshift + b * K + k) + load(dy + (b * H * W + n) * K + k));
    }
  }
}
}

#else
extern "C" int available() { return 0; }  // the processor has no products of bfloat16
#endif
