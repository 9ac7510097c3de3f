"""Users' own transforms: what is inserted stands by role, wherever the steps are; real libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from leap_efficienttrain.live import Columns, LiveCompose, live
from leap_efficienttrain.pipelines import photographs
from leap_efficienttrain.resampling import low_frequency_crop
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError
from leap_shared.vision.data import isolated

PIXELS = np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
BASE = 48


def drawn(transform: Any, image: Any = PICTURE, seed: int = 0, **options: Any) -> Tensor:
    with isolated(seed):
        result: Tensor = transform(image, **options)
    return result


def names(transform: LiveCompose) -> tuple[list[str], list[str]]:
    return [type(step).__name__ for step in transform.before], [type(step).__name__ for step in transform.after]


def timm_transform(**options: Any) -> Any:
    policy = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "interpolation": "bicubic"}
    return create_transform(BASE, is_training=True, **{**policy, **options})


@pytest.mark.parametrize("options", [{}, {"hflip": 0.0}, {"vflip": 0.5}, {"use_prefetcher": True}])
def test_a_timm_transform_is_the_same_until_a_size_is_set(options: dict[str, Any]) -> None:
    given = timm_transform(**options)
    transform = live(given)
    for seed in range(5):
        assert np.array_equal(drawn(transform, seed=seed), drawn(given, seed=seed))


@pytest.mark.parametrize("options", [{}, {"hflip": 0.0}, {"vflip": 0.5, "grayscale_prob": 0.2}])
def test_pictures_become_smaller_after_augmentation_wherever_it_stands(options: dict[str, Any]) -> None:
    given = timm_transform(**options)
    place = next(at for at, step in enumerate(given.transforms) if type(step).__name__ == "MaybeToTensor")
    with isolated(3):
        expected: Any = PICTURE
        for number, step in enumerate(given.transforms):
            expected = expected.resize((32, 32), Image.Resampling.LANCZOS) if number == place else expected
            expected = step(expected)
    assert torch.equal(drawn(live(given), seed=3, size=32), expected)


def test_our_own_transform_and_timms_made_live_agree() -> None:
    made, own = live(timm_transform(re_mode="pixel")), LiveTransform(BASE, output="float")
    for seed in range(5):
        pair = [drawn(transform, seed=seed, size=32, magnitude=4.5) for transform in (made, own)]
        assert torch.equal(*pair)


def test_the_users_own_transform_stays_as_it_is() -> None:
    given = timm_transform()
    transform = live(given)
    drawn(transform, size=32, magnitude=1)
    randaug = next(step for step in given.transforms if isinstance(step, RandAugment))
    assert {operation.magnitude for operation in randaug.ops} == {9}


@pytest.mark.parametrize("library", [v1, v2])
def test_a_torchvision_transform_gets_size_and_magnitude(library: Any) -> None:
    crop = library.RandomResizedCrop(BASE)
    end = [library.ToTensor()] if library is v1 else [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    transform = live(library.Compose([crop, library.RandAugment(), *end, library.Normalize([0.5] * 3, [0.5] * 3)]))
    assert names(transform)[0] == ["RandomResizedCrop", "RandAugment"]
    transform.set(size=32, magnitude=9)
    assert drawn(transform).shape == (3, 32, 32)
    assert transform.before[1].magnitude == 27  # type: ignore[attr-defined]


def test_torchvision_on_tensors_gets_the_pixels_of_the_same_on_pictures() -> None:
    tail = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    tensors = live(v2.Compose([v2.ToImage(), v2.CenterCrop(BASE), *tail]))
    pictures = live(v2.Compose([v2.CenterCrop(BASE), v2.PILToTensor(), *tail]))
    assert names(tensors)[1] == ["ToDtype", "Normalize"]
    assert torch.equal(drawn(tensors, size=32), drawn(pictures, size=32))


def test_unknown_steps_stay_on_their_side() -> None:
    def half(image: Tensor) -> Tensor:
        return image.half()

    transform = live(v1.Compose([v1.CenterCrop(BASE), v1.ToTensor(), v1.Lambda(half), half]))
    assert names(transform) == (["CenterCrop"], ["ToTensor", "Lambda", "function"])
    assert drawn(transform, size=32).dtype == torch.float16


def test_a_single_step_is_a_transform_too() -> None:
    assert drawn(live(v1.ToTensor()), size=30).shape == (3, 30, 35)


def test_fourier_acts_at_the_end() -> None:
    given = v1.Compose([v1.CenterCrop(BASE), v1.ToTensor(), v1.Normalize([0.5] * 3, [0.5] * 3)])
    expected = low_frequency_crop(given(PICTURE)[None], 32)[0]
    assert torch.equal(drawn(live(given, downsample="fourier"), size=32), expected)


def test_low_lets_the_crop_go_straight_to_the_size() -> None:
    given = timm_transform(re_prob=0)
    transform = live(given, augment_at="low")
    small = create_transform(
        32, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0
    )
    assert torch.equal(drawn(transform, size=32), drawn(small))
    assert drawn(transform).shape == (3, BASE, BASE)


def test_randaugment_is_found_inside_of_other_steps() -> None:
    inner = v2.RandAugment()
    for outer in (v2.RandomApply([inner]), v2.Compose([v2.RandomChoice([inner])]), nn.Sequential(inner)):
        assert live(v2.Compose([outer, v2.ToImage()])).magnitudes is not None


def test_a_ramp_over_a_transform_without_randaugment_warns() -> None:
    transform = live(v1.Compose([v1.CenterCrop(BASE), v1.ToTensor()]))
    transform.set(size=32, magnitude=1)
    with pytest.warns(UserWarning, match="no RandAugment that it could drive"):
        transform.set(size=40, magnitude=2)


def test_separate_transforms_are_refused() -> None:
    with pytest.raises(UserError, match="a tuple of 3: give one Compose"):
        live(timm_transform(separate=True))


def test_float_tensors_cannot_become_smaller_by_lanczos() -> None:
    transform = live(v1.Compose([v1.ToTensor(), v1.CenterCrop(BASE), v1.Normalize([0.5] * 3, [0.5] * 3)]))
    with pytest.raises(UserError, match=r"a tensor torch\.float32 of shape \(3, 48, 48\): convert to float after"):
        drawn(transform, size=32)


class Pairs(Dataset[Any]):
    """Pictures of a list, for loaders of torch."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import os

        return self.transform(PICTURE), os.getpid()


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_running_workers_of_the_users_own_loader_see_a_change(context: str) -> None:
    transform = LiveTransform(BASE, output="float")
    loader = DataLoader(
        Pairs(transform), batch_size=2, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    seen = []
    for size in (32, 24):
        transform.set(size=size, magnitude=3.5)
        batches = list(loader)
        seen.append({pid for _, pids in batches for pid in pids.tolist()})
        assert {tuple(images.shape) for images, _ in batches} == {(2, 3, size, size)}
    assert seen[0] == seen[1]


def test_a_torchvision_data_set_takes_it(tmp_path: Any) -> None:
    for number, file in enumerate(photographs(4)):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number}.jpg").write_bytes(file)
    transform = live(timm_transform())
    data = ImageFolder(str(tmp_path), transform)
    transform.set(size=32)
    assert data[0][0].shape == (3, 32, 32)


def test_a_hugging_face_data_set_takes_it_and_stays_live() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": [PICTURE] * 4, "labels": [0, 1, 2, 3]}, features=features)
    transform = LiveTransform(BASE, output="float")
    data = data.with_transform(Columns(transform))
    for size in (32, 24):
        transform.set(size=size)
        row = data[1]
        assert row["pixel_values"].shape == (3, size, size)
        assert row["labels"] == 1
