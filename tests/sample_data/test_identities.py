"""Synthetic identities: images as functions of (seed, identity, sample); nuisances switched off; counts."""

from __future__ import annotations

import numpy as np
import pytest
from outsize.sample_data.identities import Nuisances, draw_faces, draw_uniform
from outsize.sample_data.identity_list import IdentityList

QUIET = Nuisances(pose=0, light=0, occlusion=0, noise=0)
IDENTITIES, SAMPLES = np.array([0, 7, 10_000_000, 7, 3]), np.array([0, 5, 1 << 41, 6, 2])


@pytest.mark.parametrize("size", [(32, 32), (40, 23)])
def test_an_image_does_not_depend_on_its_batch(size: tuple[int, int]) -> None:
    images = draw_faces(3, np.tile(IDENTITIES, 30), np.tile(SAMPLES, 30), *size)
    assert images.shape == (150, *size, 3)
    assert images.dtype == np.uint8
    alone = [draw_faces(3, IDENTITIES[k : k + 1], SAMPLES[k : k + 1], *size)[0] for k in range(5)]
    assert (images.reshape(30, 5, *size, 3) == np.stack(alone)).all()
    assert (draw_faces(4, IDENTITIES, SAMPLES, *size) != np.stack(alone)).any(axis=(1, 2, 3)).all()


def test_samples_of_one_identity_are_nearer_than_those_of_two() -> None:
    people, each = 60, 4
    weak = Nuisances(pose=0.2, light=0.2, occlusion=0)
    images = draw_faces(0, np.repeat(np.arange(people), each), np.tile(np.arange(each), people), nuisances=weak)
    flat = images.reshape(people, each, -1).astype(np.float64)
    within = np.linalg.norm(flat[:, 0] - flat[:, 1], axis=1).mean()
    between = np.linalg.norm(flat[:-1, 0] - flat[1:, 1], axis=1).mean()
    assert within < 0.8 * between
    # Without nuisances only what lies behind the head differs, which the corners show.
    still = draw_faces(0, np.zeros(2, np.int64), np.arange(2), 48, 48, QUIET).astype(int)
    assert abs(still[0] - still[1])[22:26, 22:26].max() <= 20
    assert abs(still[0] - still[1])[-3:, :3].max() > 5


@pytest.mark.parametrize("kind", ["pose", "light", "noise", "occlusion"])
def test_each_nuisance_changes_the_face(kind: str) -> None:
    identities, samples = np.zeros(40, np.int64), np.arange(40)
    still = draw_faces(0, identities, samples, 32, 32, QUIET).astype(int)
    strong = Nuisances(**{"pose": 0.0, "light": 0.0, "occlusion": 0.0, "noise": 0.0, kind: 1.0})
    moved = draw_faces(0, identities, samples, 32, 32, strong).astype(int)
    assert (abs(moved - still).reshape(40, -1).max(axis=1) > 5).all()


def test_two_identities_share_no_nuisance() -> None:
    covered = Nuisances(pose=0, light=0, occlusion=1, noise=0)
    samples = np.arange(40)
    one, other = (draw_faces(0, np.full(40, identity), samples, 32, 32, covered) for identity in (0, 1))
    assert (one == other).all(axis=3).mean() < 0.01  # a bar of one colour at one place would be a tenth


def test_random_numbers_are_even_and_do_not_repeat() -> None:
    numbers = draw_uniform(1, 0, np.arange(2000), np.zeros(2000, np.int64), 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.1
    assert len(np.unique(numbers)) > 15_900  # of 16,000 draws of 2^24 numbers, some coincide


def test_counts_follow_zipf_and_each_sample_comes_once() -> None:
    for zipf in (0.0, 1.0):
        samples = IdentityList(identities=50, samples=6, zipf=zipf)
        everything = np.arange(len(samples))
        assert len(samples) == 300
        first = samples.look_up(everything, np.zeros_like(everything))
        second = samples.look_up(everything, np.ones_like(everything))
        counts = np.bincount(first[0])
        assert (first[0] == first[2]).all()
        assert (first[0] == second[0]).all()
        pairs = set(zip(*(np.concatenate([first[k], second[k]]).tolist() for k in (0, 1)), strict=True))
        assert len(pairs) == 600
        assert max(number for identity, number in pairs if identity == 49) == 2 * counts[49] - 1
        harmonic = (1 / np.arange(1, 51)).sum()
        expected = 1 + 250 / np.arange(1, 51) / harmonic if zipf else np.full(50, 6)
        assert abs(counts - expected).max() < 1


def test_a_share_of_labels_is_wrong_the_same_in_each_epoch() -> None:
    samples = IdentityList(identities=100, samples=20, label_noise=0.1)
    indices = np.arange(2000)
    identity, _, label = samples.look_up(indices, np.zeros_like(indices))
    assert (identity != label).mean() == pytest.approx(0.1, abs=0.02)
    assert (label == samples.look_up(indices[::-1], np.full_like(indices, 4))[2][::-1]).all()
    assert label.min() >= 0
    assert label.max() < 100


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="occlusion is a share"):
        Nuisances(occlusion=1.5)
    with pytest.raises(ValueError, match=r"pose must be in 0 \.\.\. 3, got -1"):
        Nuisances(pose=-1)
    with pytest.raises(ValueError, match="8 x 8 or larger, got 4 x 9"):
        draw_faces(0, IDENTITIES, SAMPLES, 4, 9)
    with pytest.raises(ValueError, match="there must be 2 identities"):
        IdentityList(identities=1)
    with pytest.raises(ValueError, match="zipf must be in"):
        IdentityList(identities=2, zipf=-1)
