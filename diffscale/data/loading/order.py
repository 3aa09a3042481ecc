"""Which row comes at which position: a keyed permutation of each epoch, evaluated at single points.

Position p lies in epoch p // n at place p % n; the epoch's permutation of 0..n-1 is a generalised Feistel network
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4) over a x b >= n with cycle
walking, whose round keys come from (seed, epoch). Nothing of the size of the dataset is ever held; the same position
gives the same row on every machine, worker and restart.

`rows` permutes all rows. `blocks` permutes blocks of neighbouring rows and then the rows inside a window of blocks, so
that only `window` blocks need to be near at any time: for object stores and compressed columns. A batch then holds rows
of `window` blocks: where neighbouring rows are alike (sorted by class) that shuffles only as well as `window` is large,
where they are not (a build with `--shuffle`) a few blocks are enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffscale.kernels import compile as native

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

ROUNDS = 10
MOST_ROWS = 1 << 60
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def positions_to_indices(
    positions: Int64,
    n: int,
    seed: int,
    *,
    order: Literal["rows", "blocks"] = "rows",
    block_rows: int = 1024,
    window: int = 64,
) -> Int64:
    """Row of the dataset for each position of the run.

    positions: int64, any shape, >= 0 (images seen since the start of the run); n: rows of the dataset, 1 to 2^60.
    Returns int64 rows in [0, n), the same shape; each run of n positions from a multiple of n holds every row once.
    """
    if not 1 <= n <= MOST_ROWS:
        raise ValueError(f"n = {n}: a dataset has 1 to 2^60 rows")
    positions = np.asarray(positions, np.int64)
    if positions.size and int(positions.min()) < 0:
        raise ValueError("positions count from 0")
    flat = positions.reshape(-1)
    if not flat.size:
        return positions
    epochs, places = np.divmod(flat, n)
    out = np.empty_like(flat)
    single = epochs.min() == epochs.max()
    for epoch in [int(epochs[0])] if single else np.unique(epochs).tolist():
        chosen = slice(None) if single else epochs == epoch
        if order == "rows":
            out[chosen] = permutation(n, seed, epoch).forward(places[chosen])
        else:
            out[chosen] = _blocked(places[chosen], n, seed, epoch, block_rows, window)
    return out.reshape(positions.shape)


def permutation(n: int, *key: int) -> Permutation:
    """The keyed permutation of 0..n-1; independent for each key."""
    a = max(1, math.isqrt(n - 1) + 1)
    b = -(-n // a)
    return Permutation(n, a, b, tuple(_round_keys(key)))


@dataclass(frozen=True)
class Permutation:
    """A bijection of 0..n-1 in constant memory. `forward` and `inverse` take and give int64 arrays."""

    n: int
    a: int
    b: int
    keys: tuple[int, ...]

    def forward(self, x: Int64) -> Int64:
        kernel = native.library("rows")
        if kernel is None or self.n == 1:
            return self._walk(x, self._rounds)
        out, keys = x.astype(np.int64, order="C"), np.array(self.keys, np.uint64)
        kernel.permute(
            *native.addresses(out),
            *native.integers(out.size, self.n, self.a, self.b),
            *native.addresses(keys),
            *native.integers(len(keys)),
        )
        return out

    def inverse(self, y: Int64) -> Int64:
        return self._walk(y, self._rounds_back)

    def _walk(self, x: Int64, step) -> Int64:
        """Applies the permutation of 0..ab-1 until the value is below n (expected less than 1 + 1/sqrt(n) times)."""
        if self.n == 1:
            return np.zeros_like(x)
        out = step(x.astype(np.uint64))
        outside = np.flatnonzero(out >= self.n)
        while len(outside):
            out[outside] = step(out[outside])
            outside = outside[out[outside] >= self.n]
        return out.astype(np.int64)

    def _rounds(self, x: UInt64) -> UInt64:
        a, b = np.uint64(self.a), np.uint64(self.b)
        high = x // a
        low = x - high * a
        for i, key in enumerate(self.keys):
            if i % 2 == 0:
                low += _below(high, key, self.a)
                np.minimum(low, low - a, out=low)  # modulo a: the smaller one, since low - a wraps around below a
            else:
                high += _below(low, key, self.b)
                np.minimum(high, high - b, out=high)
        return high * a + low

    def _rounds_back(self, y: UInt64) -> UInt64:
        a, b = np.uint64(self.a), np.uint64(self.b)
        high = y // a
        low = y - high * a
        for i, key in reversed(list(enumerate(self.keys))):
            if i % 2 == 0:
                low += a - _below(high, key, self.a)
                np.minimum(low, low - a, out=low)
            else:
                high += b - _below(low, key, self.b)
                np.minimum(high, high - b, out=high)
        return high * a + low


def _below(x: UInt64, key: int, bound: int) -> UInt64:
    """A hash of (x, key) in [0, bound), bound < 2^32: the finaliser of MurmurHash3, its top 32 bits scaled."""
    h = x + np.uint64(key)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h >>= np.uint64(32)
    h *= np.uint64(bound)
    h >>= np.uint64(32)
    return h


def _round_keys(key: tuple[int, ...]) -> list[int]:
    """64-bit keys of the rounds from a tuple of integers: SplitMix64 (Steele, Lea, Flood 2014), absorbing each."""
    state = 0
    for word in key:
        state = _split_mix((state ^ (word & MASK)) + GOLDEN & MASK)
    return [_split_mix(state + (i + 1) * GOLDEN & MASK) for i in range(ROUNDS)]


def _split_mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


BLOCKS, ROWS = 1, 2  # keys of the two levels


def _blocked(places: Int64, n: int, seed: int, epoch: int, block_rows: int, window: int) -> Int64:
    """Rows at `places` of one epoch: blocks are permuted, then the rows within every `window` permuted blocks."""
    if block_rows < 1 or window < 1:
        raise ValueError(f"block_rows = {block_rows}, window = {window}: both are at least 1")
    blocks = -(-n // block_rows)
    short = n - (blocks - 1) * block_rows  # rows of the last block
    order = permutation(blocks, seed, epoch, BLOCKS)
    short_slot = int(order.inverse(np.array([blocks - 1]))[0])

    def start_of(slot: int) -> int:  # the place at which a slot begins: one slot is shorter than the others
        return slot * block_rows - (block_rows - short if slot > short_slot else 0)

    def slot_of(place: Int64) -> Int64:
        full = np.where(place >= short_slot * block_rows + short, place + block_rows - short, place)
        return full // block_rows

    count = -(-blocks // window)
    least, larger = divmod(blocks, count)  # windows are as equal as can be, the first `larger` have one slot more

    def first_slot(w: int) -> int:
        return w * least + min(w, larger)

    out = np.empty_like(places)
    slots = slot_of(places)
    windows = np.where(slots < larger * (least + 1), slots // (least + 1), (slots - larger) // least)
    for w in np.unique(windows).tolist():
        chosen = windows == w
        low, high = start_of(first_slot(w)), start_of(first_slot(w + 1))
        shuffled = low + permutation(high - low, seed, epoch, ROWS, w).forward(places[chosen] - low)
        slot = slot_of(shuffled)
        within = shuffled - slot * block_rows + np.where(slot > short_slot, block_rows - short, 0)
        out[chosen] = order.forward(slot) * block_rows + within
    return out


def first_use(rows: range, n: int, seed: int, start: int, stop: int, **form: object) -> int | None:
    """The first position in [start, stop) whose row lies in `rows`: from where a damaged shard was used.

    Takes the keywords of `positions_to_indices`. None when no position uses them.
    """
    chunk = 65536
    for low in range(start, stop, chunk):
        positions = np.arange(low, min(low + chunk, stop), dtype=np.int64)
        indices = positions_to_indices(positions, n, seed, **form)  # type: ignore[arg-type]
        hits = np.flatnonzero((indices >= rows.start) & (indices < rows.stop))
        if len(hits):
            return int(positions[hits[0]])
    return None
