"""Distorted copies of images: what they are of, what they keep, and that they differ."""

from __future__ import annotations

import numpy as np
import pytest

from calibrators.augment import DISTORTIONS, augmented

IMAGES = np.random.default_rng(0).integers(0, 256, size=(40, 3, 16, 16), dtype=np.uint8)


def test_copies_keep_form_type_and_range_and_each_differs_from_its_original() -> None:
    for images in (IMAGES, IMAGES.astype(np.float32) / 255 * 4 - 2, np.moveaxis(IMAGES, 1, 3)):
        copies = augmented(images, 0.75)
        assert copies.images.shape == (30, *images.shape[1:])
        assert copies.images.dtype == images.dtype
        assert copies.images.min() >= images.min()
        assert copies.images.max() <= images.max()
        assert len(set(copies.index.tolist())) == 30
        assert sum(np.array_equal(a, images[i]) for a, i in zip(copies.images, copies.index, strict=True)) <= 1


def test_bytes_and_numbers_in_a_range_are_distorted_alike() -> None:
    of_bytes = augmented(IMAGES, 1.0, seed=3)
    of_numbers = augmented(IMAGES.astype(np.float64) / 255, 1.0, seed=3)
    assert of_bytes.names == of_numbers.names
    assert np.abs(of_bytes.images / 255 - of_numbers.images).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize("name", DISTORTIONS)
def test_each_distortion_moves_some_pixels_and_is_drawn_anew_by_seed(name: str) -> None:
    one, same, other = (augmented(IMAGES, 1.0, distortions=[name], seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.images, same.images)
    assert not np.array_equal(one.images, other.images)
    assert set(one.names) == {name}
    assert str(one) == f"40 distorted copies of images: {name} 40"


def test_more_copies_than_images_take_each_as_often() -> None:
    counts = np.bincount(augmented(IMAGES, 2.5).index, minlength=40)
    assert counts.sum() == 100
    assert set(counts.tolist()) == {2, 3}


def test_a_roll_loses_nothing_and_a_cutout_leaves_the_rest() -> None:
    rolled = augmented(IMAGES, 1.0, distortions=["roll"])
    np.testing.assert_array_equal(np.sort(rolled.images.reshape(40, -1)), np.sort(IMAGES[rolled.index].reshape(40, -1)))
    cut = augmented(IMAGES, 1.0, distortions=["cutout"])
    kept = (cut.images == IMAGES[cut.index]).mean(axis=(1, 2, 3))
    assert 0.75 < kept.min() < kept.max() < 0.97


def test_what_is_no_image_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"images must be \(n_samples, C, H, W\) .*got \(3, 7\)"):
        augmented(np.zeros((3, 7)))
    with pytest.raises(TypeError, match="real numbers"):
        augmented(np.array([[[["a"]]]]))
    with pytest.raises(ValueError, match=r"distortions are rotate, .*got noise"):
        augmented(IMAGES, distortions=["noise"])
    with pytest.raises(ValueError, match="share must be a positive number, got 0"):
        augmented(IMAGES, 0)
