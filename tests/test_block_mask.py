"""Block-wise masks of patches."""

import jax
import numpy as np
import pytest

from vlm_jax.losses.block_mask import block_mask, masked_neighbours

MASKS = jax.jit(block_mask, static_argnums=(1, 2, 3, 4))(jax.random.key(0), 512, 14, 75, 16)


def test_every_mask_has_exactly_its_cells_and_follows_from_the_key():
    assert MASKS.shape == (512, 196) and (np.asarray(MASKS).sum(1) == 75).all()
    again = block_mask(jax.random.key(0), 512, 14, 75)
    np.testing.assert_array_equal(MASKS, again)
    assert (np.asarray(block_mask(jax.random.key(1), 4, 14, 75)) != MASKS[:4]).any(1).all()
    assert len(np.unique(np.asarray(MASKS), axis=0)) == 512
    small = np.asarray(block_mask(jax.random.key(2), 64, 6, 14, 4))
    assert (small.sum(1) == 14).all()


def test_masks_are_as_blocky_as_the_official_generator_s():
    """3.35 masked neighbours, measured with beit2/masking_generator.py; 1.41 where cells are drawn one by one."""
    assert abs(float(masked_neighbours(MASKS, 14)) - 3.35) < 0.03
    uniform = np.argsort(np.random.default_rng(0).random((512, 196)), 1) < 75
    assert abs(float(masked_neighbours(uniform, 14)) - 1.41) < 0.03


def test_the_middle_is_masked_as_often_as_there_and_corners_as_seldom():
    """Measured there over 3,000 masks: 0.727 in the middle, 0.042 in the corners."""
    share = np.asarray(MASKS).mean(0).reshape(14, 14)
    assert abs(share[6:8, 6:8].mean() - 0.727) < 0.04 and abs(share[::13, ::13].mean() - 0.042) < 0.015


@pytest.mark.parametrize("count", [0, 197])
def test_a_count_that_the_grid_has_not_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} masked cells of 196 are none or too many"):
        block_mask(jax.random.key(0), 1, 14, count)
