// Group normalisation, an affine map per sample and optional SiLU over channels-last memory, and their gradient.
//
// x, y, dy, dx: (B, N, C), C fastest, float32 or bfloat16. mean, rstd: (B, G). gamma, beta, dgamma, dbeta: (B, C), all
// float32. z = (x − mean)·rstd·gamma + beta; y = silu ? z·sigmoid(z) : z. A task is one sample and a run of whole
// groups, summed in a fixed order: results do not depend on the number of threads. Built and called by norm_act.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kRun = 128;       // channels of a task, where a group is no wider
constexpr int64_t kSerial = 16384;  // elements below which threads are not worth waking

using bfloat = uint16_t;

inline float as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float load(float v) { return v; }
inline float load(bfloat v) { return as_float(static_cast<uint32_t>(v) << 16); }
inline void store(float* p, float v) { *p = v; }
inline void store(bfloat* p, float v) {  // round to nearest even
  const uint32_t u = as_bits(v);
  *p = static_cast<bfloat>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float sigmoid(float z) {  // 2^n in the exponent bits, 2^f by its Taylor polynomial: relative error below 1e-6
  const float t = std::min(std::max(z * -1.44269504f, -126.f), 126.f);
  const float n = std::nearbyint(t), f = t - n;
  float p = 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.f;
  return 1.f / (1.f + p * as_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23));
}

template <class Task>
void each_task(int64_t B, int64_t N, int64_t C, int64_t G, int threads, const Task& task) {
  const int64_t group = C / G, run = group * std::max<int64_t>(1, kRun / group), runs = (C + run - 1) / run;
  const bool serial = B * N * C < kSerial;
#pragma omp parallel for schedule(static) num_threads(threads) if (!serial)
  for (int64_t i = 0; i < B * runs; ++i) {
    const int64_t first = (i % runs) * run;
    task(i / runs, first, std::min(run, C - first));
  }
}

template <class T>
void forward(const T* x_all, T* y_all, float* mean, float* rstd, const float* gamma, const float* beta, int64_t B,
             int64_t N, int64_t C, int64_t G, float eps, bool silu, int threads) {
  const int64_t group = C / G;
  each_task(B, N, C, G, threads, [&](int64_t b, int64_t first, int64_t width) {
    std::vector<float> buffer(5 * width);
    float *__restrict shift = buffer.data(), *__restrict sum = shift + width, *__restrict square = sum + width,
          *__restrict scale = square + width, *__restrict offset = scale + width;
    const T* __restrict x = x_all + b * N * C + first;
    for (int64_t c = 0; c < width; ++c) shift[c] = load(x[c]);  // against cancellation
    for (int64_t n = 0; n < N; ++n) {
      const T* __restrict row = x + n * C;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        const float d = load(row[c]) - shift[c];
        sum[c] += d;
        square[c] += d * d;
      }
    }
    for (int64_t g = 0; g < width; g += group) {
      double total = 0, spread = 0;
      for (int64_t c = g; c < g + group; ++c) total += shift[c] + sum[c] / static_cast<double>(N);
      const double mu = total / group;
      for (int64_t c = g; c < g + group; ++c) {
        const double own = sum[c] / static_cast<double>(N), away = shift[c] + own - mu;
        spread += square[c] - own * sum[c] + N * away * away;
      }
      const float r = 1.0 / std::sqrt(std::max(spread, 0.0) / (static_cast<double>(N) * group) + eps);
      const int64_t at = b * G + (first + g) / group;
      mean[at] = mu;
      rstd[at] = r;
      for (int64_t c = g; c < g + group; ++c) {
        scale[c] = r * gamma[b * C + first + c];
        offset[c] = beta[b * C + first + c] - static_cast<float>(mu) * scale[c];
      }
    }
    T* __restrict y = y_all + b * N * C + first;
    for (int64_t n = 0; n < N; ++n) {
      const T* __restrict row = x + n * C;
      T* __restrict out = y + n * C;
      if (silu) {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
          const float z = load(row[c]) * scale[c] + offset[c];
          store(out + c, z * sigmoid(z));
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) store(out + c, load(row[c]) * scale[c] + offset[c]);
      }
    }
  });
}

template <class T>
void backward(const T* x_all, const T* dy_all, const float* mean, const float* rstd, const float* gamma,
              const float* beta, T* dx_all, float* dgamma, float* dbeta, int64_t B, int64_t N, int64_t C, int64_t G,
              bool silu, int threads) {
  const int64_t group = C / G;
  each_task(B, N, C, G, threads, [&](int64_t b, int64_t first, int64_t width) {
    std::vector<float> buffer(6 * width);
    float *__restrict scale = buffer.data(), *__restrict offset = scale + width, *__restrict sum = offset + width,
          *__restrict product = sum + width, *__restrict slope = product + width, *__restrict level = slope + width;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t at = b * G + (first + c) / group;
      scale[c] = rstd[at] * gamma[b * C + first + c];
      offset[c] = beta[b * C + first + c] - mean[at] * scale[c];
    }
    const T *__restrict x = x_all + b * N * C + first, *__restrict dy = dy_all + b * N * C + first;
    T* __restrict dx = dx_all + b * N * C + first;
    for (int64_t n = 0; n < N; ++n) {  // dz goes to dx for now
      const T *__restrict row = x + n * C, *__restrict up = dy + n * C;
      T* __restrict out = dx + n * C;
      if (silu) {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
          const float v = load(row[c]), z = v * scale[c] + offset[c], s = sigmoid(z);
          const float dz = load(up[c]) * s * (1.f + z * (1.f - s));
          sum[c] += dz;
          product[c] += dz * v;
          store(out + c, dz);
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
          const float dz = load(up[c]);
          sum[c] += dz;
          product[c] += dz * load(row[c]);
          store(out + c, dz);
        }
      }
    }
    for (int64_t g = 0; g < width; g += group) {
      const int64_t at = b * G + (first + g) / group;
      const double mu = mean[at], r = rstd[at];
      double a = 0, p = 0;  // Σ γ·dz and Σ γ·dz·x̂ over the group
      for (int64_t c = g; c < g + group; ++c) {
        const double normed = (product[c] - mu * sum[c]) * r;
        dgamma[b * C + first + c] = normed;
        dbeta[b * C + first + c] = sum[c];
        a += gamma[b * C + first + c] * sum[c];
        p += gamma[b * C + first + c] * normed;
      }
      const double count = static_cast<double>(N) * group;
      for (int64_t c = g; c < g + group; ++c) {  // dx = scale·dz + slope·x + level
        slope[c] = -r * r * p / count;
        level[c] = -r * a / count + mu * r * r * p / count;
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      const T* __restrict row = x + n * C;
      T* __restrict out = dx + n * C;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c)
        store(out + c, load(out[c]) * scale[c] + load(row[c]) * slope[c] + level[c]);
    }
  });
}

}  // namespace

extern "C" {

void norm_act_forward(const void* x, void* y, float* mean, float* rstd, const float* gamma, const float* beta,
                      int64_t B, int64_t N, int64_t C, int64_t G, float eps, int silu, int bf16, int threads) {
  if (bf16)
    forward(static_cast<const bfloat*>(x), static_cast<bfloat*>(y), mean, rstd, gamma, beta, B, N, C, G, eps, silu, threads);
  else
    forward(static_cast<const float*>(x), static_cast<float*>(y), mean, rstd, gamma, beta, B, N, C, G, eps, silu, threads);
}

void norm_act_backward(const void* x, const void* dy, const float* mean, const float* rstd, const float* gamma,
                       const float* beta, void* dx, float* dgamma, float* dbeta, int64_t B, int64_t N, int64_t C,
                       int64_t G, int silu, int bf16, int threads) {
  if (bf16)
    backward(static_cast<const bfloat*>(x), static_cast<const bfloat*>(dy), mean, rstd, gamma, beta,
             static_cast<bfloat*>(dx), dgamma, dbeta, B, N, C, G, silu, threads);
  else
    backward(static_cast<const float*>(x), static_cast<const float*>(dy), mean, rstd, gamma, beta,
             static_cast<float*>(dx), dgamma, dbeta, B, N, C, G, silu, threads);
}
}
