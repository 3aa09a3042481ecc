// Which rows come at some places of an epoch (the Feistel network of order.py, of which this is the fast form), rows
// from anywhere copied into one block, and decoded pixels without their fourth byte.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// The finaliser of MurmurHash3 of x + key, its top 32 bits scaled to [0, bound).
static inline std::uint64_t below(std::uint64_t x, std::uint64_t key, std::uint64_t bound) {
    std::uint64_t h = x + key;
    h ^= h >> 33;
    h *= 0xFF51AFD7ED558CCDull;
    h ^= h >> 33;
    h *= 0xC4CEB9FE1A85EC53ull;
    return (h >> 32) * bound >> 32;
}

// Each place below n (of a * b >= n) to its row, in place. The values of a block go through a round side by side, since
// a round waits for the one before; a value that is not below n then walks on alone.
extern "C" void permute(std::int64_t* places, std::int64_t count, std::int64_t n, std::int64_t a, std::int64_t b,
                        const std::uint64_t* keys, std::int64_t rounds) {
    constexpr std::int64_t block = 64;
    const std::uint64_t wide = static_cast<std::uint64_t>(a), tall = static_cast<std::uint64_t>(b);
    std::uint64_t high[block], low[block];
    const auto walk = [&](std::int64_t* values, std::int64_t size) {
        for (std::int64_t i = 0; i < size; ++i) {
            high[i] = static_cast<std::uint64_t>(values[i]) / wide;
            low[i] = static_cast<std::uint64_t>(values[i]) - high[i] * wide;
        }
        for (std::int64_t r = 0; r < rounds; ++r) {
            std::uint64_t* to = r % 2 == 0 ? low : high;
            const std::uint64_t* from = r % 2 == 0 ? high : low;
            const std::uint64_t bound = r % 2 == 0 ? wide : tall;
            for (std::int64_t i = 0; i < size; ++i) {
                const std::uint64_t moved = to[i] + below(from[i], keys[r], bound);
                to[i] = moved < moved - bound ? moved : moved - bound;  // moved - bound wraps around where it is negative
            }
        }
        for (std::int64_t i = 0; i < size; ++i) values[i] = static_cast<std::int64_t>(high[i] * wide + low[i]);
    };
    for (std::int64_t first = 0; first < count; first += block) {
        const std::int64_t size = first + block < count ? block : count - first;
        walk(places + first, size);
        for (std::int64_t i = first; i < first + size; ++i) {
            while (places[i] >= n) walk(places + i, 1);
        }
    }
}

// A share of the rows by each thread. Fetching a row that is four places ahead hides the wait for its page. The threads
// are not OpenMP's: a pool of this caller's would slow down the one that trains (kernels/runtime.py, single_threaded).
extern "C" void gather_rows(const std::int64_t* sources, char* target, std::int64_t rows, std::int64_t size, int threads) {
    constexpr std::int64_t ahead = 4;
    const auto copy = [=](int part) {
        const std::int64_t last = rows * (part + 1) / threads;
        for (std::int64_t i = rows * part / threads; i < last; ++i) {
            if (i + ahead < last) {
                const char* next = reinterpret_cast<const char*>(sources[i + ahead]);
                for (std::int64_t k = 0; k < size; k += 1024) __builtin_prefetch(next + k);
            }
            std::memcpy(target + i * size, reinterpret_cast<const char*>(sources[i]), static_cast<std::size_t>(size));
        }
    };
    std::vector<std::thread> others;
    for (int part = 1; part < threads; ++part) others.emplace_back(copy, part);
    copy(0);
    for (std::thread& other : others) other.join();
}

// Pixels of four bytes to pixels of their first three. Sixteen bytes are written for every twelve; the last few pixels
// go one by one, so that nothing is written behind the target.
extern "C" void drop_fourth(const std::uint8_t* from, std::uint8_t* to, std::int64_t pixels) {
    using Bytes = std::uint8_t __attribute__((vector_size(16)));
    constexpr Bytes order = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15};
    std::int64_t i = 0;
    for (; i + 6 <= pixels; i += 4) {
        Bytes four;
        std::memcpy(&four, from + 4 * i, sizeof four);
        four = __builtin_shuffle(four, order);
        std::memcpy(to + 3 * i, &four, sizeof four);
    }
    for (; i < pixels; ++i) std::memcpy(to + 3 * i, from + 4 * i, 3);
}
