"""Which sample stands at which position of training: a pure function of (seed, position).

Nothing is stored, so resuming is a number and no table grows with the data. A permutation of n
numbers is a Feistel network over Z_a x Z_b, the smallest near-square grid that holds n; results
beyond n are sent through again (cycle walking, Black & Rogaway 2002). All functions take arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_SAMPLES = 2**40
ROUNDS = 8
MIXTURE_PERIOD = 4096  # positions after which every stream of a mixture has had its exact share; doubled for small shares
LONGEST_PERIOD, SHARE_ERROR = 2**16, 0.004
_U64 = np.uint64
_STEP, _FIRST, _SECOND = _U64(0x9E3779B97F4A7C15), _U64(0xBF58476D1CE4E5B9), _U64(0x94D049BB133111EB)   # SplitMix64's
_30, _27, _31 = _U64(30), _U64(27), _U64(31)
_ROUND = [_U64(i << 48) for i in range(ROUNDS)]


def hash64(*parts) -> np.ndarray:
    """Mixes integers or integer arrays (broadcast) into uint64 (SplitMix64's finaliser, chained)."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = _mix(state, np.asarray(part % 2**64 if isinstance(part, int) else part).astype(np.uint64))
    return state


def _mix(state: np.ndarray, part: np.ndarray) -> np.ndarray:
    state = (state ^ part) + _STEP
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    return state ^ (state >> _31)


def permute(x: np.ndarray, n, key) -> np.ndarray:
    """The image of ``x`` (uint64, each below n) under the permutation of range(n) that ``key`` selects.

    ``n`` and ``key`` are scalars or arrays of x's shape (then each element has its own permutation).
    """
    x = np.asarray(x, np.uint64)
    n, key = (np.broadcast_to(np.asarray(v, np.uint64), x.shape).reshape(-1) for v in (n, key))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)  # exact: n is below 2**53
    b = (n + a - _U64(1)) // a
    key = hash64(key)
    out = _feistel(x.reshape(-1), a, b, key)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _feistel(out[outside], a[outside], b[outside], key[outside])
    return out.reshape(x.shape)


def _feistel(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = x // b, x % b
    for i in range(ROUNDS):
        if i % 2:
            right = (right + _mix(key, left + _ROUND[i]) % b) % b
        else:
            left = (left + _mix(key, right + _ROUND[i]) % a) % a
    return left * b + right


class _Words(np.random.bit_generator.ISeedSequence):
    def __init__(self, words: np.ndarray):
        self.words = words

    def generate_state(self, n_words: int, dtype=np.uint32) -> np.ndarray:
        return self.words


def generators(seed: int, positions: np.ndarray, attempt: int) -> list[np.random.Generator]:
    """A generator for each position: what is drawn for its ``attempt``-th candidate follows from (seed, position, attempt).

    PCG64 with hashed words for its state; numpy's own way there, a SeedSequence for each, takes ten times as long.
    """
    words = hash64(seed, attempt, 7, np.asarray(positions)[:, None], np.arange(4))
    return [np.random.Generator(np.random.PCG64(_Words(row))) for row in words]


class Order:
    """The order of one source of n samples, epoch after epoch.

    Blocks of ``block`` neighbouring samples are permuted, then samples are permuted inside windows of
    ``window`` blocks; ``block=1`` is the full shuffle (``window`` then has no effect). Every epoch
    (position // n) visits each sample exactly once, in another order.
    """

    def __init__(self, n: int, seed: int, block: int = 1, window: int = 1):
        if not 0 < n <= MAX_SAMPLES:
            raise ValueError(f"an order over n={n} samples is not possible (1 to 2**40)")
        if block < 1 or window < 1:
            raise ValueError(f"block={block}, window={window} must be at least 1")
        self.n, self.seed, self.block, self.window = n, seed, min(block, n), window

    def index(self, positions) -> np.ndarray:
        """int64 sample indices at ``positions`` (non-negative integers, any shape)."""
        positions = np.asarray(positions, np.uint64)
        shape, flat = positions.shape, positions.reshape(-1)
        epoch, x = flat // _U64(self.n), flat % _U64(self.n)
        key = hash64(self.seed, epoch)
        if self.block == 1:
            return permute(x, self.n, key).astype(np.int64).reshape(shape)
        todo = np.arange(x.size)
        while todo.size:  # the last block may be partial: its missing samples are walked past
            x[todo] = self._shuffle_blocks(x[todo], key[todo])
            todo = todo[x[todo] >= _U64(self.n)]
        return x.astype(np.int64).reshape(shape)

    def _shuffle_blocks(self, x: np.ndarray, key: np.ndarray) -> np.ndarray:
        blocks = -(-self.n // self.block)
        total, span = blocks * self.block, self.window * self.block
        start = x // _U64(span) * _U64(span)
        inside = permute(x - start, np.minimum(_U64(span), _U64(total) - start), hash64(key, start, 1))
        place = start + inside
        return permute(place // _U64(self.block), blocks, hash64(key, 2)) * _U64(self.block) + place % _U64(self.block)

    def replacement(self, position: int, attempt: int) -> int:
        """The sample that stands in at ``position`` after ``attempt`` >= 1 bad ones."""
        return int(hash64(self.seed, position, attempt, 3) % _U64(self.n))


class MixtureOrder:
    """Several orders read side by side with fixed shares.

    Shares are rounded to 1/4096 (at least 1/4096 each) and met exactly in every 4096 positions; where that is more than 0.4% off a small
    share, to 1/8192, and so on to 1/65536. Which
    stream serves a position, and how often it served before, follow from (seed, position), so each
    stream runs through its own exact epochs. Indices count through the streams' concatenation.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int):
        weights = np.asarray(weights, np.float64)
        if len(weights) != len(orders) or not np.all(weights > 0):
            raise ValueError(f"a mixture of {len(orders)} streams needs as many positive weights, not {list(weights)}")
        self.orders, self.seed = list(orders), seed
        self.n = sum(o.n for o in orders)
        shares, self.period = weights / weights.sum(), MIXTURE_PERIOD
        self.slots = _share(shares, self.period)
        while self.period < LONGEST_PERIOD and np.any(np.abs(self.slots - shares * self.period) > SHARE_ERROR * shares * self.period):
            self.period *= 2
            self.slots = _share(shares, self.period)
        streams = np.repeat(np.arange(len(orders)), self.slots)
        pattern = streams[permute(np.arange(self.period), self.period, hash64(seed, 4)).astype(np.int64)]
        self._pattern = np.concatenate([pattern, pattern])
        hits = self._pattern == np.arange(len(orders))[:, None]
        self._before = np.concatenate([np.zeros((len(orders), 1), np.int64), np.cumsum(hits, axis=1)], axis=1)
        self._offset = np.cumsum([0] + [o.n for o in orders])

    def stream(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """(stream number, position within that stream), both int64 of the shape of ``positions``."""
        period, slot = np.divmod(np.asarray(positions, np.int64), self.period)
        turn = (hash64(self.seed, period, 5) % _U64(self.period)).astype(np.int64)  # no two periods alike
        stream = self._pattern[slot + turn]
        rank = self._before[stream, slot + turn] - self._before[stream, turn]
        return stream, period * self.slots[stream] + rank

    def index(self, positions) -> np.ndarray:
        """int64 indices into the concatenated streams."""
        stream, inner = self.stream(positions)
        out = np.empty(stream.shape, np.int64)
        for s, order in enumerate(self.orders):
            here = stream == s
            out[here] = order.index(inner[here]) + self._offset[s]
        return out

    def replacement(self, position: int, attempt: int) -> int:
        """As ``Order.replacement``, from the same stream, so that shares hold."""
        stream, inner = (int(v) for v in self.stream(position))
        return self.orders[stream].replacement(inner, attempt) + int(self._offset[stream])


def _share(fractions: np.ndarray, total: int) -> np.ndarray:
    """Integers summing to ``total`` nearest to ``fractions`` of it, none of them 0 (largest remainder)."""
    exact = fractions * total
    slots = np.maximum(1, np.floor(exact).astype(np.int64))
    while slots.sum() < total:
        slots[np.argmax(exact - slots)] += 1
    while slots.sum() > total:
        slots[np.argmax(np.where(slots > 1, slots - exact, -np.inf))] -= 1
    return slots


def order_of(source, seed: int, block: int = 1, window: int = 1) -> Order | MixtureOrder:
    """The order of a source; a source with ``parts`` and ``weights`` is a mixture."""
    if getattr(source, "weights", None) is None:
        return Order(len(source), seed, block, window)
    orders = [Order(len(part), int(hash64(seed, s, 6) >> _U64(1)), block, window)
              for s, part in enumerate(source.parts)]
    return MixtureOrder(orders, source.weights, seed)
