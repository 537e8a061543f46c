// Reads memory once with all threads: the floor of everything that reads weights. Built and called by floors.py.
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int64_t kStreams = 4;  // one thread reads faster in a few places far apart than in one
constexpr int64_t kVectors = 2;  // of each stream at a time

Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));  // `from` need not be aligned
  return x;
}

}  // namespace

// Returns the sum of x [n]; each thread reads a stretch of it.
extern "C" double read_all(const float* x, int64_t n, int threads) {
  constexpr int64_t STEP = kVectors * kLanes;
  double total = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const int64_t streams = kStreams * omp_get_num_threads(), length = n / streams / STEP * STEP;
    const float* stream = x + kStreams * omp_get_thread_num() * length;
    Vec sum[kStreams][kVectors] = {};
    for (int64_t i = 0; i < length; i += STEP) {
#pragma GCC unroll 4
      for (int64_t s = 0; s < kStreams; ++s) {
        sum[s][0] += load(stream + s * length + i);
        sum[s][1] += load(stream + s * length + i + kLanes);
      }
    }
    for (const auto& row : sum) {
      const Vec both = row[0] + row[1];
      for (int64_t lane = 0; lane < kLanes; ++lane) total += both[lane];
    }
    if (omp_get_thread_num() == 0) {
      for (int64_t i = streams * length; i < n; ++i) total += x[i];
    }
  }
  return total;
}
