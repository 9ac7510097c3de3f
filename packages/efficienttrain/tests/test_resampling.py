"""The public crop, Lanczos and preparation: what they promise, and what they say of bad input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from leap_efficienttrain.peers import composer_resize, has_composer, interpolate_crop, reference_crop
from leap_efficienttrain.resampling import lanczos_resize, lanczos_weights, low_frequency_crop, prepare
from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.testing.operators import without_type_checks

# Sums of some hundred float32 products, of numbers of about 1.
FLOAT32 = 5e-6
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int, width: int, seed: int = 0, hard: bool = False) -> NDArray[np.uint8]:
    """Noise, or noise of 0 and 255 alone, whose sums leave the range."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(values > 127, np.uint8(255), np.uint8(0)) if hard else values


def pillow(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Pillow's columns, then its rows: all versions but 13 do so in one call, and that one unless pictures are tall."""
    columns = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.LANCZOS)
    return np.asarray(columns.resize((width, height), Image.Resampling.LANCZOS))


def test_crop_is_the_papers_formula_on_square_images() -> None:
    x = noise(2, 3, 32, 32)
    assert torch.allclose(low_frequency_crop(x, 24), reference_crop(x, 24), rtol=0, atol=FLOAT32)


def test_crop_keeps_the_mean_of_images_that_are_not_square() -> None:
    x = noise(1, 2, 12, 20) + 3
    assert torch.allclose(low_frequency_crop(x, 8).mean((2, 3)), x.mean((2, 3)), rtol=0, atol=FLOAT32)


def test_reference_scaling_divides_by_the_width_alone() -> None:
    x = noise(1, 2, 12, 20)
    got = low_frequency_crop(x, 8, reference_scaling=True)
    assert torch.allclose(got, reference_crop(x, 8), rtol=0, atol=FLOAT32)
    assert torch.allclose(got, low_frequency_crop(x, 8) * 12 / 20, rtol=0, atol=FLOAT32)


def test_crop_commutes_with_normalisation() -> None:
    x, mean, std = noise(1, 3, 16, 16), noise(3, 1, 1, seed=1), noise(3, 1, 1, seed=2).exp()
    assert torch.allclose(
        low_frequency_crop((x - mean) / std, 10), (low_frequency_crop(x, 10) - mean) / std, rtol=1e-5, atol=1e-5
    )


def test_images_of_the_size_come_back_as_they_are() -> None:
    x = noise(1, 1, 8, 8)
    assert low_frequency_crop(x, 8) is x


def test_images_with_one_side_of_the_size_are_cropped_to_a_square() -> None:
    assert low_frequency_crop(noise(1, 1, 8, 12), 8).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("size", [17, 9])
def test_odd_sizes_become_even_with_one_warning(size: int) -> None:
    x = noise(1, 2, 17, 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = low_frequency_crop(x, size)
    assert [str(warning.message) for warning in caught] == [
        f"a low-frequency crop has an even size: {size} becomes {size - 1}; give an even size"
    ]
    assert torch.equal(got, low_frequency_crop(x, size - 1))


@pytest.mark.parametrize("size", [1, 0, -2])
def test_sizes_without_a_frequency_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"size {size} keeps no frequency"):
        low_frequency_crop(noise(1, 1, 8, 8), size)


def test_sizes_above_the_shorter_side_are_refused() -> None:
    with pytest.raises(UserError, match="size 10 is larger than the image of 8x12: give at most 8"):
        low_frequency_crop(noise(1, 1, 8, 12), 10)


@pytest.mark.parametrize(
    "x", [noise(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8, dtype=torch.complex64)]
)
def test_crop_of_what_is_no_batch_of_float_images_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"takes float images .*give x\[None\]"):
        low_frequency_crop(x, 4)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="unknown precision 'half'"):
        low_frequency_crop(noise(1, 1, 8, 8), 4, precision="half")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x = noise(2, 1, 12, 12).to(dtype)
    want = low_frequency_crop(x, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = low_frequency_crop(x, 8)
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)], ids=str)
def test_empty_batches_give_empty_batches(shape: tuple[int, ...]) -> None:
    assert low_frequency_crop(torch.zeros(shape), 4).shape == (*shape[:2], 4, 4)


def test_crop_compiles_in_one_graph_with_its_gradient() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return (low_frequency_crop(x, 6) ** 2).sum()

    torch.compiler.reset()
    x, y = noise(2, 3, 10, 9).requires_grad_(), noise(2, 3, 10, 9).requires_grad_()
    with without_type_checks():
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=FLOAT32)


def test_crop_and_preparation_can_be_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return low_frequency_crop(prepare(images, 8), 6)

    images = torch.from_numpy(picture(12, 16))[None]
    with without_type_checks():
        exported = torch.export.export(Model(), (images,), strict=False)
    assert torch.allclose(exported.module()(images), Model()(images), rtol=0, atol=FLOAT32)


@every_backend
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
    hard=st.booleans(),
)
def test_lanczos_is_pillows_bit_for_bit(
    backend: str, height: int, width: int, size: int, seed: int, hard: bool
) -> None:
    image = picture(height, width, seed, hard)
    with use(backend):
        got = lanczos_resize(image, size)
    shape = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    assert got.shape == (*shape, 3)
    assert np.array_equal(got, pillow(image, *shape))


@pytest.mark.parametrize(("height", "width", "size"), [(224, 224, 96), (97, 97, 33), (300, 64, 11), (500, 375, 224)])
def test_lanczos_of_larger_pictures_is_pillows(height: int, width: int, size: int) -> None:
    image = picture(height, width, hard=True)
    got = lanczos_resize(image, size)
    assert np.array_equal(got, pillow(image, *got.shape[:2]))


@pytest.mark.parametrize("size", [(224, 224), (60, 80), (100, 64)], ids=str)
def test_lanczos_is_one_call_of_pillow(size: tuple[int, int]) -> None:
    image = picture(*size)
    got = lanczos_resize(image, 40)
    want = Image.fromarray(image).resize(got.shape[1::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(got, np.asarray(want))


def test_lanczos_gives_the_kind_that_it_is_given() -> None:
    image = picture(9, 12)
    want = pillow(image, 6, 8)
    batch = lanczos_resize(torch.from_numpy(np.stack([image, image[::-1]])), 6)
    assert isinstance(batch, torch.Tensor)
    assert np.array_equal(batch[0].numpy(), want)
    assert np.array_equal(batch[1].numpy(), pillow(np.ascontiguousarray(image[::-1]), 6, 8))
    assert torch.equal(lanczos_resize(torch.from_numpy(image), 6), batch[0])
    small = lanczos_resize(Image.fromarray(image), 6)
    assert isinstance(small, Image.Image)
    assert np.array_equal(np.asarray(small), want)
    grey = Image.fromarray(image[:, :, 0])
    assert np.array_equal(
        np.asarray(lanczos_resize(grey, 6)), np.asarray(grey.resize((8, 6), Image.Resampling.LANCZOS))
    )


def test_lanczos_leaves_what_it_is_given_alone() -> None:
    image = picture(8, 8)
    before = image.copy()
    got = lanczos_resize(image, 8)
    got[:] = 0
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "expected bytes .*not float32"),
        (torch.zeros(8, 8), "expected bytes .*not torch.float32"),
        (np.zeros((8, 8), np.uint8), r"expected bytes .*shape \(8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), "picture of 0x8"),
        (Image.new("RGBA", (8, 8)), "mode RGBA is neither RGB nor L"),
    ],
    ids=["float array", "float tensor", "no channels", "no pixels", "alpha"],
)
def test_lanczos_of_what_are_no_pictures_of_bytes_is_refused(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lanczos_resize(image, 4)


def test_lanczos_to_no_pixels_is_refused() -> None:
    with pytest.raises(UserError, match="cannot have the size 0"):
        lanczos_resize(picture(8, 8), 0)


@pytest.mark.parametrize(("given", "wanted"), [(10, 4), (7, 7), (5, 12), (1, 3)])
def test_weights_are_those_that_pillow_multiplies_by(given: int, wanted: int) -> None:
    """A line of pixels, resized by the table, is Pillow's."""
    table, line = lanczos_weights(given, wanted), picture(1, given)[0]
    assert table.shape == (wanted, given)
    assert (abs(table.sum(1) - 2**22) <= given).all()
    got = np.clip((table.astype(np.int64) @ line + 2**21) >> 22, 0, 255)
    assert np.array_equal(got, pillow(line[None], 1, wanted)[0])


def test_weights_of_no_pixels_are_refused() -> None:
    with pytest.raises(UserError, match="sizes are 1 or more, not 4 and 0"):
        lanczos_weights(4, 0)


MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.2, 0.25)


@every_backend
def test_prepare_is_lanczos_then_normalisation(backend: str) -> None:
    image = picture(12, 9)
    with use(backend):
        got = prepare(torch.from_numpy(image)[None], 6, mean=MEAN, std=STD)
    want = (pillow(image, 8, 6).transpose(2, 0, 1) / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert np.allclose(got[0].numpy(), want, atol=1e-5)


@every_backend
def test_prepare_by_fourier_is_normalisation_then_the_crop(backend: str) -> None:
    images = torch.from_numpy(np.stack([picture(12, 14), picture(12, 14, 1)]))
    with use(backend):
        plain = prepare(images, 12, mean=MEAN, std=STD, method="none")
        got = prepare(images, 8, mean=MEAN, std=STD, method="fourier")
        want = low_frequency_crop(plain, 8)
    assert torch.allclose(got, want, rtol=0, atol=2e-5)  # normalised numbers are up to 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["lanczos", "fourier", "none"])
def test_prepare_of_an_empty_batch_is_empty(method: str, dtype: torch.dtype) -> None:
    got = prepare(torch.zeros(0, 8, 8, 3, dtype=torch.uint8), 8, method=method, dtype=dtype)
    assert got.shape == (0, 3, 8, 8)
    assert got.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 8)}, "expected bytes"),
        ({"images": torch.zeros(8, 8, 3, dtype=torch.uint8)}, "takes a batch, not one picture"),
        ({"method": "bicubic"}, "unknown method 'bicubic'"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"mean": (0.5,)}, "pictures of 3 channels"),
        ({"std": (1, 0, 1)}, "positive deviations"),
        ({"method": "fourier", "size": 10}, "larger than the image of 8x8"),
        ({"method": "none"}, 'keep their size under method "none": give 8, not 4'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prepare_refuses_what_the_method_does_not_take(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "size": 4, **change}
    with pytest.raises(UserError, match=message):
        prepare(arguments.pop("images"), arguments.pop("size"), **arguments)


def test_bicubic_peer_has_the_crops_shape_and_mean() -> None:
    x = noise(1, 2, 16, 16) + 3
    got = interpolate_crop(x, 8)
    assert got.shape == (1, 2, 8, 8)
    assert torch.allclose(got.mean(), x.mean(), rtol=0, atol=0.2)


@pytest.mark.skipif(has_composer(), reason="Composer is installed")
def test_composer_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="pip install mosaicml"):
        composer_resize(noise(1, 3, 8, 8), 4)
