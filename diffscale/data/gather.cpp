// Rows from anywhere into one block, a share of them by each thread. Fetching a row that is four places ahead hides the
// wait for its page.
#include <cstdint>
#include <cstring>

extern "C" void gather_rows(const std::int64_t* sources, char* target, std::int64_t rows, std::int64_t size, int threads) {
    constexpr std::int64_t ahead = 4;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
        const std::int64_t last = rows * (part + 1) / threads;
        for (std::int64_t i = rows * part / threads; i < last; ++i) {
            if (i + ahead < last) {
                const char* next = reinterpret_cast<const char*>(sources[i + ahead]);
                for (std::int64_t k = 0; k < size; k += 1024) __builtin_prefetch(next + k);
            }
            std::memcpy(target + i * size, reinterpret_cast<const char*>(sources[i]), static_cast<std::size_t>(size));
        }
    }
}
