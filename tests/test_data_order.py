"""The order of training: exact epochs, purity, locality, sizes no table could hold."""

import numpy as np
import pytest

from vlm_jax.data.order import (
    MIXTURE_PERIOD,
    MixtureOrder,
    Order,
    generators,
    hash64,
    order_of,
    permute,
)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 100, 1000])
@pytest.mark.parametrize("block,window", [(1, 1), (1, 9), (4, 1), (7, 3), (5000, 2)])
def test_every_epoch_visits_each_sample_once(n, block, window):
    order = Order(n, seed=3, block=block, window=window)
    epochs = order.index(np.arange(3 * n)).reshape(3, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    if n >= 100 and block < n:
        assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_index_is_a_pure_function_of_seed_and_position():
    n = 1000
    whole = Order(n, 5, 8, 4).index(np.arange(n))
    for batch in (1, 7, 64):  # asked for in other portions, in reverse, from a fresh object
        for start in reversed(range(0, n, batch * 5)):
            positions = np.arange(start, min(start + batch, n))
            assert (Order(n, 5, 8, 4).index(positions) == whole[positions]).all()
    assert (Order(n, 6, 8, 4).index(np.arange(n)) != whole).mean() > 0.9
    assert Order(n, 5).index(17) == Order(n, 5).index([[17]])[0, 0]


def test_known_order():
    """A new release must not reshuffle a run that resumes: these numbers are stored."""
    assert Order(1000, 0).index(np.arange(6)).tolist() == [863, 517, 944, 251, 392, 819]
    assert Order(1000, 0, 16, 4).index(np.arange(6)).tolist() == [958, 920, 158, 924, 145, 956]


def test_blocks_of_neighbours_stay_in_their_window():
    n, block, window = 64 * 100, 64, 4
    index = Order(n, 1, block, window).index(np.arange(n))
    for w in range(0, n, block * window):  # a window reads exactly its blocks, mixed
        blocks = index[w:w + block * window] // block
        assert len(np.unique(blocks)) == window
        assert (np.diff(blocks) != 0).mean() > 0.5
    assert np.abs(np.diff(index[::block * window] // block)).mean() > 10  # and the blocks come from everywhere


def test_huge_data_needs_no_table():
    n = 2**40 - 87
    for order in (Order(n, 1), Order(n, 1, 256, 8)):
        positions = np.concatenate([np.arange(4096), n - 1 - np.arange(4096), n + np.arange(4096)])
        index = order.index(positions)
        assert index.min() >= 0 and index.max() < n
        assert len(np.unique(index[:8192])) == 8192  # one epoch: no repeats
    with pytest.raises(ValueError, match="2\\*\\*40"):
        Order(2**40 + 1, 0)


def test_permutations_look_random():
    seen = [tuple(permute(np.arange(4), 4, hash64(s)).tolist()) for s in range(2400)]
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 60 and counts.max() < 150  # 100 each expected
    index = Order(10000, 0).index(np.arange(10000))
    assert abs(np.corrcoef(index, np.arange(10000))[0, 1]) < 0.05
    assert (np.abs(np.diff(index)) < 10).mean() < 0.01


def test_mixture_shares_and_epochs():
    sizes, weights = (500, 40, 3000), (0.5, 0.2, 0.3)
    mixture = MixtureOrder([Order(n, 9 + i) for i, n in enumerate(sizes)], weights, seed=1)
    positions = np.arange(MIXTURE_PERIOD * 4)
    stream, inner = mixture.stream(positions)
    for s, share in enumerate(weights):
        counts = (stream == s).reshape(4, -1).sum(axis=1)
        assert (counts == counts[0]).all() and abs(counts[0] / MIXTURE_PERIOD - share) <= 1 / MIXTURE_PERIOD
        assert (inner[stream == s] == np.arange((stream == s).sum())).all()  # each stream counts up, none skipped
        assert abs((stream[:1024] == s).mean() - share) < 0.06  # well mixed inside a period too
    assert (stream[:MIXTURE_PERIOD] != stream[MIXTURE_PERIOD:2 * MIXTURE_PERIOD]).any()
    index = mixture.index(positions)
    first = index[stream == 0][:500]
    assert (np.sort(first) == np.arange(500)).all()
    assert ((index[stream == 1] >= 500) & (index[stream == 1] < 540)).all()
    assert (mixture.index(positions[777:999]) == index[777:999]).all()
    replaced = [mixture.replacement(int(p), 1) for p in positions[stream == 1][:20]]
    assert all(500 <= r < 540 for r in replaced)  # a bad sample's place stays with its stream


def test_mixture_refuses_wrong_weights():
    for weights in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="positive weights"):
            MixtureOrder([Order(3, 0), Order(4, 0)], weights, 0)


def test_replacements_are_pure_and_varied():
    order = Order(1000, 2)
    picks = [order.replacement(5, a) for a in range(1, 30)]
    assert picks == [Order(1000, 2).replacement(5, a) for a in range(1, 30)]
    assert len(set(picks)) > 25 and max(picks) < 1000
    assert order_of(range(10), 0).n == 10


def test_generators_are_pure_and_independent():
    positions = np.arange(10**9, 10**9 + 2000)
    draws = np.array([[r.random(3) for r in generators(seed, positions, attempt)] for seed, attempt in ((0, 1), (0, 2), (1, 1))])
    again = np.array([r.random(3) for r in generators(0, positions[7:9], 2)])
    assert (again == draws[1, 7:9]).all()                              # of (seed, position, attempt) alone
    assert len(np.unique(draws)) == draws.size
    counts = np.stack([np.histogram(d, 20, (0, 1))[0] for d in draws.reshape(3, -1, 3).transpose(0, 2, 1).reshape(9, -1)])
    assert (np.abs(counts - 100) < 5 * 100**0.5).all()                 # uniform, each draw of each stream
    streams = np.concatenate([draws.transpose(0, 2, 1).reshape(9, -1), draws[0, :, 0][None, np.r_[1:2000, 0]]])
    assert np.abs(np.corrcoef(streams) - np.eye(10)).max() < 5 / 2000**0.5     # across draws, attempts, seeds and neighbours
