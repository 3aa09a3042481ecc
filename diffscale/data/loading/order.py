"""The order of training: a keyed permutation of each epoch, evaluated at single positions.

Position p lies in epoch p // n at place p % n. The epoch's permutation of 0..n-1 is a generalised Feistel network
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4) over a x b >= n with cycle
walking; its round keys come from (seed, epoch). No array of the dataset's size is ever held, and a position has the
same row on every machine and worker and after every restart.

`rows` permutes all rows. `blocks`, for object stores and compressed columns, permutes blocks of neighbouring rows and
then the rows inside a window of blocks, so that only `window` blocks are needed at once. Each batch then comes from
`window` blocks: many are needed to shuffle rows that are sorted by class, a few are enough after a build with
`--shuffle`.

`lanes`, for many nodes, cuts the rows into contiguous lanes that take turns (loading/lanes.py). Each lane has its own
permutation, of blocks and then of the rows in a window of them, so a worker that takes whole lanes reads its share of
the data alone. A batch draws from as many parts of the data as it has images, up to the number of lanes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffscale.core.hashing import GOLDEN, MASK, splitmix64
from diffscale.data.loading.lanes import lane_starts, parts_of_lanes
from diffscale.kernels import rows

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
Order = Literal["rows", "blocks", "lanes"]

ROUNDS = 10
MOST_ROWS = 1 << 60


def positions_to_indices(
    positions: Int64,
    n: int,
    seed: int,
    *,
    order: Order = "rows",
    block_rows: int = 1024,
    window: int = 64,
    lanes: int = 1024,
) -> Int64:
    """Return the dataset's row for each position of the run.

    positions: int64 >= 0, any shape; images since the start of the run
    n: rows of the dataset, 1 to 2^60
    seed: key of the order
    order: `rows`, `blocks` or `lanes`
    block_rows: rows of a block, for `blocks` and `lanes`
    window: blocks in a window, for `blocks`; in the windows of all lanes together, at least one in each, for `lanes`
    lanes: number of lanes, for `lanes`

    Returns int64 rows in [0, n) of the same shape. Each epoch, n positions from a multiple of n, has every row once.
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
        elif order == "blocks":
            out[chosen] = _blocked(places[chosen], 0, n, block_rows, window, seed, epoch)
        else:
            out[chosen] = _laned(flat[chosen], n, lanes, block_rows, lane_window(window, lanes), seed, epoch)
    return out.reshape(positions.shape)


def permutation(n: int, *key: int) -> Permutation:
    """Return the keyed permutation of 0..n-1; different keys give independent ones."""
    a = max(1, math.isqrt(n - 1) + 1)
    b = -(-n // a)
    return Permutation(n, a, b, tuple(_round_keys(key)))


@dataclass(frozen=True)
class Permutation:
    """A bijection of 0..n-1 in constant memory. `forward` and `inverse` map int64 arrays."""

    n: int
    a: int
    b: int
    keys: tuple[int, ...]

    def forward(self, x: Int64) -> Int64:
        out = x.astype(np.int64, order="C")
        if self.n > 1 and rows.permute(out, self.n, self.a, self.b, self.keys):
            return out
        return self._walk(x, self._rounds)

    def inverse(self, y: Int64) -> Int64:
        return self._walk(y, self._rounds_back)

    def _walk(self, x: Int64, step) -> Int64:
        """Apply the permutation of 0..ab-1 until the value is below n: on average under 1 + 1/sqrt(n) times."""
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
    """Hash (x, key) to [0, bound), bound < 2^32: the finaliser of MurmurHash3, its top 32 bits scaled."""
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
    """Derive 64-bit round keys from a tuple of integers by SplitMix64 (Steele, Lea, Flood 2014)."""
    state = 0
    for word in key:
        state = splitmix64((state ^ (word & MASK)) + GOLDEN & MASK)
    return [splitmix64(state + (i + 1) * GOLDEN & MASK) for i in range(ROUNDS)]


BLOCKS, ROWS, LANE = 1, 2, 3  # keys of the levels


def lane_window(window: int, lanes: int) -> int:
    """Return the blocks in a window of one lane, if the windows of all lanes together have `window`."""
    return max(1, window // lanes)


def _laned(positions: Int64, n: int, lanes: int, block_rows: int, window: int, seed: int, epoch: int) -> Int64:
    """Return the rows at `positions`, all of one epoch: each lane is blocked on its own."""
    if lanes < 1:
        raise ValueError(f"lanes = {lanes}: at least 1")
    begin = epoch * n
    lane = positions % lanes
    turn = (positions - begin) // lanes  # lanes that come before in the epoch's order have had one turn more
    starts, parts = lane_starts(n, lanes, epoch), parts_of_lanes(lanes)
    out = np.empty_like(positions)
    by_lane = np.argsort(lane, kind="stable")
    present, firsts = np.unique(lane[by_lane], return_index=True)
    for one, chosen in zip(present.tolist(), np.split(by_lane, firsts[1:]), strict=True):
        first, last = int(starts[parts[one]]), int(starts[parts[one] + 1])
        out[chosen] = _blocked(turn[chosen], first, last, block_rows, window, seed, epoch, LANE, one)
    return out


def _blocked(places: Int64, first: int, last: int, block_rows: int, window: int, *key: int) -> Int64:
    """Return the rows of [first, last) at `places`: blocks are permuted, then the rows in each `window` of them.

    Blocks begin at multiples of `block_rows`, so the first and the last may be short.
    """
    if block_rows < 1 or window < 1:
        raise ValueError(f"block_rows = {block_rows}, window = {window}: both are at least 1")
    base = first // block_rows
    blocks = -(-last // block_rows) - base
    order = permutation(blocks, *key, BLOCKS)
    before, after = first - base * block_rows, (base + blocks) * block_rows - last  # rows that the end blocks lack
    ends = order.inverse(np.array([0, blocks - 1])).tolist()
    short = sorted((slot, lacks) for slot, lacks in zip(ends, (before, after), strict=True) if lacks)

    def start_of(slot: int) -> int:  # first place of a slot
        return slot * block_rows - sum(lacks for other, lacks in short if slot > other)

    def as_if_full(place: Int64) -> Int64:  # the place if no block were short
        for slot, lacks in short:
            place = np.where(place >= (slot + 1) * block_rows - lacks, place + lacks, place)
        return place

    count = -(-blocks // window)
    least, larger = divmod(blocks, count)  # the first `larger` windows have one slot more

    def first_slot(w: int) -> int:
        return w * least + min(w, larger)

    out = np.empty_like(places)
    slots = as_if_full(places) // block_rows
    windows = np.where(slots < larger * (least + 1), slots // (least + 1), (slots - larger) // least)
    for w in np.unique(windows).tolist():
        chosen = windows == w
        low, high = start_of(first_slot(w)), start_of(first_slot(w + 1))
        shuffled = as_if_full(low + permutation(high - low, *key, ROWS, w).forward(places[chosen] - low))
        slot = shuffled // block_rows
        block = order.forward(slot)
        within = shuffled - slot * block_rows + np.where(block == 0, before, 0)
        out[chosen] = (base + block) * block_rows + within
    return out


def first_use(rows: range, n: int, seed: int, start: int, stop: int, **form: object) -> int | None:
    """Return the first position in [start, stop) whose row lies in `rows`, or None.

    Tells since when training has used a damaged shard. `form`: keywords of `positions_to_indices`.
    """
    chunk = 65536
    for low in range(start, stop, chunk):
        positions = np.arange(low, min(low + chunk, stop), dtype=np.int64)
        indices = positions_to_indices(positions, n, seed, **form)  # type: ignore[arg-type]
        hits = np.flatnonzero((indices >= rows.start) & (indices < rows.stop))
        if len(hits):
            return int(positions[hits[0]])
    return None
