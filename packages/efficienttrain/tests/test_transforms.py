"""The live transform: timm's own at the base size, the authors' order below it, and what workers see of a change."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.decoding import crop_resized, decode, decode_factor, is_encoded, opened, shrink
from leap_efficienttrain.pipelines import photographs
from leap_efficienttrain.randaug import Magnitude
from leap_efficienttrain.resampling import low_frequency_crop
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError
from leap_shared.vision.config import AugmentationConfig
from leap_shared.vision.data import isolated

FILES = photographs(6)
PLAIN = AugmentationConfig(auto_augment=None, colour_jitter=0, erasing=0)


def timm_transform(magnitude: int, size: int = 224, **options: Any) -> Any:
    policy = f"rand-m{magnitude}-mstd0.5-inc1"
    settings = {"auto_augment": policy, "interpolation": "bicubic", "re_prob": 0.25, "re_mode": "pixel", **options}
    return create_transform(size, is_training=True, **settings)


def picture(number: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(FILES[number]))


def drawn(transform: Any, image: Any, seed: int, **options: Any) -> Tensor:
    with isolated(seed):
        result: Tensor = transform(image, **options)
    return result


@pytest.mark.parametrize("magnitude", [0, 3, 9])
def test_at_the_base_size_it_is_timms_transform_to_the_bit(magnitude: int) -> None:
    ours, theirs = LiveTransform(output="float"), timm_transform(magnitude)
    ours.set(magnitude=magnitude)
    for seed in range(12):
        image = picture(seed % len(FILES)).convert("RGB")
        assert torch.equal(drawn(ours, image, seed), drawn(theirs, image, seed))


def test_below_the_base_size_lanczos_comes_after_randaugment_and_before_the_tensor() -> None:
    ours, theirs = LiveTransform(), timm_transform(5)
    for seed in range(6):
        with isolated(seed):
            expected: Any = picture(seed).convert("RGB")
            for step in theirs.transforms[:3]:
                expected = step(expected)
            expected = expected.resize((96, 96), Image.Resampling.LANCZOS)
        assert np.array_equal(drawn(ours, FILES[seed], seed, size=96, magnitude=5).numpy(), np.asarray(expected))


def test_fourier_acts_on_the_erased_float_picture() -> None:
    ours, theirs = LiveTransform(downsample="fourier", output="float"), timm_transform(9)
    expected = low_frequency_crop(drawn(theirs, picture().convert("RGB"), 3)[None], 160)[0]
    assert torch.equal(drawn(ours, FILES[0], 3, size=160), expected)


def test_fourier_and_lanczos_in_the_batch_leave_bytes_at_the_base_size() -> None:
    for transform in (LiveTransform(downsample="fourier"), LiveTransform(downsample_in="batch")):
        assert transform(FILES[0], size=96).shape == (224, 224, 3)


@pytest.mark.parametrize("method", ["lanczos", "area", "bicubic"])
@given(width=st.integers(8, 40), height=st.integers(8, 40), size=st.integers(1, 50))
@settings(max_examples=15, deadline=None)
def test_the_shorter_side_gets_the_size_and_the_longer_one_follows(
    method: str, width: int, height: int, size: int
) -> None:
    small = shrink(Image.new("RGB", (width, height)), size, method)
    short, long = sorted((width, height))
    assert sorted(small.size) == ([size, int(size * long / short)] if size < short else [short, long])
    assert (small.width if width <= height else small.height) == min(size, short)


def test_magnitude_is_live_and_need_not_be_whole() -> None:
    transform = rand_augment_transform("rand-m9-mstd0-inc1-p1", {"img_mean": (0, 0, 0), "magnitude_std": 0})
    magnitude = Magnitude.found([transform])
    assert magnitude is not None
    magnitude.value = 4.5
    rotate = next(operation for operation in transform.ops if operation.name == "Rotate")
    angles: list[float] = []
    rotate.aug_fn = lambda image, degrees, **_: angles.append(abs(degrees)) or image
    rotate(picture())
    assert angles == [pytest.approx(13.5)]


def test_a_magnitude_that_was_left_comes_back_the_same() -> None:
    transform = LiveTransform()
    before = drawn(transform, FILES[1], 0, magnitude=9)
    drawn(transform, FILES[1], 0, magnitude=2.5)
    assert torch.equal(drawn(transform, FILES[1], 0, magnitude=9), before)


def test_magnitude_zero_is_no_identity_unless_randaug_is_off_there() -> None:
    settings = {"augmentation": AugmentationConfig(flip=0, erasing=0)}
    plain = LiveTransform(augmentation=AugmentationConfig(flip=0, erasing=0, auto_augment=None, colour_jitter=0))
    acting, off = LiveTransform(**settings), LiveTransform(**settings, randaug_off_at_zero=True)  # type: ignore[arg-type]
    same = [torch.equal(drawn(acting, FILES[0], seed, magnitude=0), drawn(plain, FILES[0], seed)) for seed in range(8)]
    assert not all(same)
    assert all(torch.equal(drawn(off, FILES[0], seed, magnitude=0), drawn(plain, FILES[0], seed)) for seed in range(8))
    assert torch.equal(drawn(off, FILES[0], 5, magnitude=9), drawn(acting, FILES[0], 5, magnitude=9))


def test_posterize_to_no_bits_is_black_and_no_error() -> None:
    magnitude = Magnitude.found([transform := rand_augment_transform("rand-m10-mstd0-inc1-p1", {})])
    assert magnitude is not None
    operation = next(operation for operation in transform.ops if operation.name == "PosterizeIncreasing")
    assert np.asarray(operation(picture().convert("RGB"))).max() == 0


@pytest.mark.parametrize("library", [v1, v2])
def test_torchvisions_bins_follow_the_magnitude(library: Any) -> None:
    transform = library.RandAugment(num_ops=2, magnitude=9)
    magnitude = Magnitude.found([library.Compose([library.RandomApply([transform])])])
    assert magnitude is not None
    assert magnitude.value == pytest.approx(3)
    magnitude.value = 9
    assert transform.magnitude == 27


def test_set_changes_size_and_magnitude_of_all_copies() -> None:
    transform = LiveTransform()
    twin = copy.deepcopy(transform)
    transform.set(size=96, magnitude=2.5)
    assert (twin.size, twin.magnitude) == (96, 2.5)
    assert torch.equal(drawn(twin, FILES[0], 1), drawn(transform, FILES[0], 1, size=96, magnitude=2.5))


def test_set_state_takes_the_state_of_a_curriculum() -> None:
    transform = LiveTransform()
    transform.set_state(next(Curriculum.preset("et++", epochs=200).epochs()))
    assert (transform.size, transform.magnitude) == (96, 0)


def test_it_can_be_pickled() -> None:
    transform = pickle.loads(pickle.dumps(LiveTransform()))  # noqa: S301 - our own
    assert torch.equal(drawn(transform, FILES[0], 0), drawn(LiveTransform(), FILES[0], 0))


def test_a_ramp_without_randaugment_warns_once_and_one_magnitude_does_not() -> None:
    transform = LiveTransform(augmentation=PLAIN)
    transform.set(magnitude=3)
    transform.set(magnitude=3)
    with pytest.warns(UserWarning, match="no RandAugment that it could drive"):
        transform.set(magnitude=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform.set(magnitude=5)


@pytest.mark.parametrize(("change", "said"), [({"size": 256}, "size 256: expected 1 to 224"), ({"size": 0}, "size 0")])
def test_impossible_sizes_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LiveTransform().set(**change)


def test_impossible_magnitudes_are_refused() -> None:
    with pytest.raises(UserError, match=r"magnitude 10\.5: expected a number from 0 to 10"):
        LiveTransform().set(magnitude=10.5)


def test_lanczos_in_the_batch_goes_with_bytes_only() -> None:
    with pytest.raises(UserError, match="it goes with lanczos and uint8"):
        LiveTransform(downsample_in="batch", output="float")


@pytest.mark.parametrize("augment_at", ["base", "low"])
def test_pictures_of_all_kinds_are_taken(augment_at: Any) -> None:
    transform = LiveTransform(64, augment_at=augment_at, augmentation=PLAIN)
    pixels = np.array(picture().convert("RGB"))
    kinds = [FILES[0], picture(), picture().convert("RGB"), pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    kinds += [picture().convert("L"), picture().convert("RGBA"), pixels[..., 0], picture().quantize()]
    assert all(transform(kind, size=48).shape == (48, 48, 3) for kind in kinds)
    assert torch.equal(drawn(transform, FILES[0], 0), drawn(transform, picture(), 0))


def test_tensors_of_floats_stay_as_they_are() -> None:
    given = torch.rand(3, 20, 20)
    assert LiveTransform(32)(given) is given


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(UserError, match="the picture is a str"):
        opened("a.jpg")


def test_padding_and_crop_of_small_pictures_take_both_orders() -> None:
    augmentation = AugmentationConfig(crop_padding=4, auto_augment=None, colour_jitter=0, erasing=0)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    base = LiveTransform(32, augmentation=augmentation)
    low = LiveTransform(32, augmentation=augmentation, augment_at="low")
    assert torch.equal(drawn(base, pixels, 4, size=16), drawn(low, pixels, 4, size=16))


def test_low_draws_the_crop_box_of_timm_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[Any] = []

    def recorded(image: Image.Image, box: Any, size: int, *_: Any) -> Image.Image:
        boxes.append((image.size, box, is_encoded(image)))
        return Image.new("RGB", (size, size))

    monkeypatch.setattr("leap_efficienttrain.transforms.crop_resized", recorded)
    drawn(LiveTransform(augment_at="low", augmentation=PLAIN), FILES[0], 11, size=96)
    with isolated(11):
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(picture(), (0.08, 1.0), (3 / 4, 4 / 3))
    assert boxes == [((360, 270), (left, top, left + width, top + height), True)]


def test_low_is_near_the_crop_from_the_whole_picture() -> None:
    augmentation = AugmentationConfig(auto_augment=None, colour_jitter=0, scale=(0.5, 1.0))
    low = LiveTransform(224, augment_at="low", augmentation=augmentation)
    straight = LiveTransform(96, augmentation=augmentation)
    for seed in range(6):
        pair = (drawn(low, FILES[seed], seed, size=96), drawn(straight, FILES[seed], seed))
        assert (pair[0].float() - pair[1].float()).abs().mean() < 6


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_a_jpeg_is_decoded_as_small_as_the_crop_allows(width: int, height: int, size: int) -> None:
    factor = decode_factor((7, 9, 7 + width, 9 + height), size)
    assert factor == 1 or min(width, height) / factor >= size
    assert factor == 8 or min(width, height) / (2 * factor) < size


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_simplejpeg_gives_the_pixels_of_pillow(factor: int) -> None:
    pytest.importorskip("simplejpeg")
    for number in range(len(FILES)):
        fast, plain = (np.asarray(decode(picture(number), factor, decoder)) for decoder in ("simplejpeg", "pillow"))
        assert fast.shape == (-(-270 // factor), -(-360 // factor), 3)
        assert np.array_equal(fast, plain)


def test_decoders_give_the_same_transform() -> None:
    for augment_at in ("base", "low"):
        pair = [LiveTransform(augment_at=augment_at, decoder=decoder) for decoder in ("simplejpeg", "pillow")]  # type: ignore[arg-type]
        assert torch.equal(*(drawn(transform, FILES[2], 7, size=96) for transform in pair))


def test_an_image_that_is_kept_is_not_made_smaller_by_decoding() -> None:
    image = picture()
    transform = LiveTransform(augment_at="low", decoder="pillow")
    first = drawn(transform, image, 3, size=48)
    assert image.size == (360, 270)
    assert torch.equal(drawn(transform, image, 3, size=48), first)


@given(st.integers(1, 60), st.data())
@settings(max_examples=30, deadline=None)
def test_any_box_becomes_a_square_of_the_size(size: int, data: st.DataObject) -> None:
    left, top = data.draw(st.integers(0, 359)), data.draw(st.integers(0, 269))
    box = (left, top, data.draw(st.integers(left + 1, 360)), data.draw(st.integers(top + 1, 270)))
    assert crop_resized(picture(), box, size).size == (size, size)


def test_a_truncated_jpeg_is_an_error_of_reading() -> None:
    for augment_at in ("base", "low"):
        with pytest.raises(OSError, match="truncated"):
            LiveTransform(augment_at=augment_at)(FILES[0][:4000])  # type: ignore[arg-type]


def test_cmyk_and_grey_jpegs_are_read() -> None:
    for mode in ("CMYK", "L"):
        picture().convert(mode).save(file := io.BytesIO(), "JPEG")
        assert LiveTransform(augment_at="low", augmentation=PLAIN)(file.getvalue(), size=40).shape == (40, 40, 3)


def test_it_draws_from_the_global_generators_alone() -> None:
    transform = LiveTransform(output="float")
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - timm draws from it
    torch.manual_seed(5)
    first = transform(FILES[3], size=64)
    assert torch.equal(drawn(transform, FILES[3], 5, size=64), first)
