"""Augmentation of faces: what each kind does, how strongly, and that it is a function of seed, epoch and sample."""

from __future__ import annotations

import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from math import erf
from typing import Any

import numpy as np
import pytest
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.pictures.augmentation import KINDS, Chance, FaceAugmentation
from outsize.pipelines.commands.face import face_train
from PIL import Image

NOISE = np.random.default_rng(0).integers(40, 200, (24, 24, 3), dtype=np.uint8)


def variants(pixels: np.ndarray, count: int, **strengths: float) -> list[np.ndarray]:
    """Of the first samples."""
    return [FaceAugmentation(**strengths).apply(pixels, 0, 0, sample) for sample in range(count)]


def smooth(size: int) -> np.ndarray:
    """A picture without detail."""
    wave = 120 + 90 * np.sin(np.linspace(0, 3, size))
    return np.stack([wave[:, None] + 0 * wave, wave[None] + 0 * wave[:, None], (wave[:, None] + wave) / 2], -1).astype(
        np.uint8
    )


def find_places(found: list[np.ndarray], candidates: dict[int, np.ndarray]) -> list[int]:
    """The key of the candidate that each of them is."""
    keys = [[key for key, pixels in candidates.items() if (pixels == one).all()] for one in found]
    assert all(keys)
    return [places[0] for places in keys]


def test_pictures_are_mirrored_recoloured_cropped_and_partly_erased() -> None:
    assert (variants(NOISE, 1, flip=1.0)[0] == NOISE[:, ::-1]).all()
    assert 70 < sum((one != NOISE).any() for one in variants(NOISE, 200, flip=0.5)) < 130
    coloured = variants(NOISE, 2, colour=0.2)[1].astype(int)
    for channel in range(3):  # one affine map for each colour
        slope = np.polyfit(NOISE[..., channel].ravel(), coloured[..., channel].ravel(), 1)
        assert abs(np.polyval(slope, NOISE[..., channel]) - coloured[..., channel]).max() < 1
    erased = variants(NOISE, 3, erase=1.0)[2] != NOISE
    assert 0.01 < erased.any(axis=2).mean() < 0.25
    cropped = variants(NOISE, 4, crop=0.3)[3]
    assert cropped.shape == NOISE.shape
    assert (cropped != NOISE).mean() > 0.5


def test_a_share_of_the_pictures_is_made_grey() -> None:
    luma = NOISE @ np.array([0.299, 0.587, 0.114])
    greys = [one for one in variants(NOISE, 200, grey=0.3) if (one != NOISE).any()]
    assert 40 < len(greys) < 80
    assert abs(greys[0] - luma[..., None]).max() <= 1


def test_blur_is_a_gaussian_s_of_up_to_the_deviation_that_is_asked_for() -> None:
    """The profile of an edge is the integral of what it is blurred with."""
    edge = np.zeros((100, 100, 3), np.uint8)
    edge[:, 50:] = 250
    deviations = []
    for one in variants(edge, 40, blur=0.06):
        assert (one == one[:1, :, :1]).all()  # from left to right alone, all colours alike
        profile = one[0, :, 0] / 250
        steps = np.diff(profile)
        deviations.append(float(np.sqrt(steps @ (np.arange(99) - 49) ** 2)))
        if deviations[-1] > 1:  # below, pixels are coarser than the curve
            places = (np.arange(100) - 49.5) / deviations[-1]
            assert np.allclose(profile, [0.5 + erf(x / 2**0.5) / 2 for x in places], atol=0.02)
    assert 5 < max(deviations) <= 6.1
    assert min(deviations) < 1
    assert 2 < np.mean(deviations) < 4


def test_a_part_of_the_resolution_is_lost() -> None:
    scaled: dict[int, np.ndarray] = {}
    for size in range(1, 25):
        small = Image.fromarray(NOISE).resize((size, size), Image.Resampling.BILINEAR)
        scaled[size] = np.asarray(small.resize((24, 24), Image.Resampling.BICUBIC))
    sizes = find_places(variants(NOISE, 60, resolution=0.75), scaled)
    assert min(sizes) in (6, 7)  # a quarter of 24
    assert max(sizes) in (23, 24)
    assert len(set(sizes)) > 12
    assert max(abs(one.astype(int) - smooth(64)).max() for one in variants(smooth(64), 20, resolution=0.75)) <= 8
    assert FaceAugmentation(resolution=0.9).apply(NOISE[:2, :1], 0, 0, 0).shape == (2, 1, 3)


def test_pictures_are_compressed_with_qualities_down_to_the_least() -> None:
    compressed: dict[int, np.ndarray] = {}
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.fromarray(NOISE).save(file, "JPEG", quality=quality)
        compressed[quality] = np.asarray(Image.open(file))
    qualities = find_places(variants(NOISE, 60, jpeg=0.6), compressed)
    assert 40 <= min(qualities) < 45
    assert 95 < max(qualities) <= 100
    assert len(set(qualities)) > 20
    assert max(abs(one.astype(int) - smooth(64)).mean() for one in variants(smooth(64), 20, jpeg=0.6)) < 3


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(KINDS, 2)))
def test_each_kind_draws_as_it_does_alone(first: str, second: str) -> None:
    strengths = {name: {"flip": 0.5, "grey": 0.5, "erase": 0.5}.get(name, KINDS[name].highest) for name in KINDS}
    for sample in range(8):
        both = NOISE
        for name in (first, second):
            both = FaceAugmentation(**{name: strengths[name]}).apply(both, 5, 2, sample)
        together = FaceAugmentation(**{name: strengths[name] for name in (first, second)})
        assert (together.apply(NOISE, 5, 2, sample) == both).all()


def test_what_was_drawn_is_drawn_again_by_later_versions() -> None:
    """A training that an earlier version began goes on to the same bits: numbers by their places in the stream."""
    for sample in range(40):
        random = np.random.Generator(np.random.Philox(key=[3, 17], counter=[0, 4, sample, 0]))
        chance = random.random(20)
        expected = NOISE[:, ::-1].copy() if chance[4] < 0.5 else NOISE.copy()
        if chance[10] < 0.5:
            area, ratio = 0.02 + 0.18 * chance[11], 3.0 ** (2 * chance[12] - 1)
            tall, broad = round(24 * (area * ratio) ** 0.5), round(24 * (area / ratio) ** 0.5)
            top, left = int(chance[13] * (25 - tall)), int(chance[14] * (25 - broad))
            expected[top : top + tall, left : left + broad] = random.integers(0, 256, (tall, broad, 3), np.uint8)
        assert (FaceAugmentation(flip=0.5, erase=0.5).apply(NOISE, 3, 4, sample) == expected).all()


def test_no_picture_in_any_epoch_has_a_random_number_of_another() -> None:
    numbers = [n for epoch in range(8) for sample in range(8) for n in Chance(3, epoch, sample).numbers]
    assert len(set(numbers)) == len(numbers)


def test_a_variant_is_a_function_of_seed_epoch_and_sample() -> None:
    varied = FaceAugmentation(**{name: kind.usual for name, kind in KINDS.items()})

    def vary(numbers: tuple[int, int, int]) -> bytes:
        return varied.apply(NOISE, *numbers).tobytes()

    numbers = list(itertools.product((1, 2), range(4), range(8)))
    alone = [vary(number) for number in numbers]
    assert len(set(alone)) == len(numbers)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(vary, numbers)) == alone
    for name in ("crop", "colour", "blur", "resolution", "jpeg"):
        kind = FaceAugmentation(**{name: KINDS[name].highest})
        for others in ((2, 0, 0), (1, 1, 0), (1, 0, 1)):
            assert (kind.apply(NOISE, 1, 0, 0) != kind.apply(NOISE, *others)).any()
    assert FaceAugmentation.parse("none").apply(NOISE, 1, 2, 3) is NOISE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turn", "augmentations are crop, flip, colour, grey, blur, resolution, jpeg, erase, such as"),
        ("colour=x", "colour must be a number, such as colour=0.1, got 'x'"),
        ("crop=0.9", r"crop must be in 0 \.\.\. 0\.5, got 0\.9"),
        ("blur=1", r"blur must be in 0 \.\.\. 0\.1, got 1"),
        ("resolution=1", r"resolution must be in 0 \.\.\. 0\.9, got 1"),
        ("jpeg=nan", r"jpeg must be in 0 \.\.\. 0\.95, got nan"),
        ("grey=-0.1", r"grey must be in 0 \.\.\. 1, got -0\.1"),
    ],
)
def test_other_augmentations_are_refused(text: str, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        FaceAugmentation.parse(text)


def test_the_help_names_all_kinds_with_their_strengths() -> None:
    assert str(FaceAugmentation.parse("erase,flip=0.25")) == "flip=0.25,erase=0.2"
    (option,) = [parameter for parameter in face_train.params if parameter.name == "augment"]
    described: Any = option
    assert described.help.startswith(", ".join(f"{name}={kind.usual:g}" for name, kind in KINDS.items()))
    assert str(FaceAugmentation.parse(",".join(KINDS))).replace(",", ", ") in described.help
