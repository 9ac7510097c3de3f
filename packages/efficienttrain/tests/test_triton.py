"""The Triton kernels against the definitions, in Triton's interpreter, and those tests that are marked so on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from leap_efficienttrain import ops
from leap_efficienttrain.ops import reference
from leap_efficienttrain.resampling import lanczos_resize, low_frequency_crop, prepare
from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.testing.operators import TOLERANCES, check_operator

pytest.importorskip("triton")

# Sums of some hundred float32 products, of numbers of about 1; TensorFloat-32 keeps 11 bits of each input.
FLOAT32 = 5e-6
TENSOR_FLOAT32 = 1e-2


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


SIZES = st.tuples(st.integers(2, 40), st.integers(2, 40)).flatmap(
    lambda hw: st.tuples(st.just(hw[0]), st.just(hw[1]), st.integers(1, min(hw) // 2).map(lambda half: 2 * half))
)


def check_crop(height: int, width: int, size: int, dtype: torch.dtype, amp: bool, device: str, bound: float) -> None:
    """Crop and adjoint agree with the definitions in float64."""
    x, gradient = images(2, 3, height, width, dtype=dtype), images(2, 3, size, size, dtype=dtype, seed=1)
    with use("triton"):
        got = ops.low_frequency_crop(x.to(device), size, 1.5, amp)
        back = ops.low_frequency_crop_adjoint(gradient.to(device), height, width, 1.5, amp)
    assert got.dtype == back.dtype == dtype
    assert torch.allclose(got.cpu().double(), reference.crop(x.double(), size, 1.5), rtol=bound, atol=bound)
    want = reference.adjoint(gradient.double(), height, width, 1.5)
    assert torch.allclose(back.cpu().double(), want, rtol=bound, atol=bound)


@settings(max_examples=settings().max_examples // 4)
@given(sizes=SIZES)
def test_crop_and_adjoint_are_the_definitions_at_any_size(sizes: tuple[int, int, int]) -> None:
    check_crop(*sizes, torch.float32, False, "cpu", FLOAT32)


@pytest.mark.parametrize("sizes", [(70, 33, 20), (17, 150, 16), (24, 24, 24), (3, 5, 2)], ids=str)
def test_outputs_and_inputs_of_several_blocks_agree(sizes: tuple[int, int, int]) -> None:
    check_crop(*sizes, torch.float32, False, "cpu", FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("amp", [True, False])
def test_halves_agree(dtype: torch.dtype, amp: bool) -> None:
    check_crop(9, 12, 6, dtype, amp, "cpu", TOLERANCES[dtype])


def test_crop_agrees_through_the_dispatcher() -> None:
    check_operator(ops.low_frequency_crop, [(images(2, 3, 9, 12), 8, 1.0, False)], ["triton"])


def test_adjoint_agrees_through_the_dispatcher() -> None:
    check_operator(ops.low_frequency_crop_adjoint, [(images(2, 1, 4, 4), 5, 9, 0.5, False)], ["triton"])


def test_channels_last_is_read_in_place() -> None:
    x = images(2, 3, 10, 12)
    with use("triton"):
        got = ops.low_frequency_crop(x.to(memory_format=torch.channels_last), 6, 1.0, False)
        want = ops.low_frequency_crop(x, 6, 1.0, False)
    assert torch.equal(got, want)


def test_float64_is_refused_with_the_reason() -> None:
    with use("triton"), pytest.raises(UserError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        low_frequency_crop(torch.zeros(1, 1, 8, 8, dtype=torch.float64), 4)


@pytest.mark.parametrize("size", [(4, 5), (9, 14), (30, 3), (1, 1)], ids=str)
def test_lanczos_is_the_definition(size: tuple[int, int]) -> None:
    x = pictures(2, 9, 14, 3)
    with use("triton"):
        torch.library.opcheck(ops.lanczos_resize.overload, (x, *size))
        assert torch.equal(ops.lanczos_resize(x.transpose(1, 2), *size), reference.lanczos(x.transpose(1, 2), *size))
        assert ops.lanczos_resize(x[:0], *size).shape == (0, *size, 3)


def test_lanczos_of_black_and_white_stays_in_whole_numbers_of_32_bits() -> None:
    """Sums leave the range of bytes on both sides, by as much as they can."""
    x = torch.where(pictures(1, 30, 200, 3) > 127, 255, 0).to(torch.uint8)
    with use("triton"):
        assert torch.equal(ops.lanczos_resize(x, 7, 11), reference.lanczos(x, 7, 11))


@pytest.mark.parametrize("method", ["lanczos", "fourier", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prepare_is_the_definition(method: str, dtype: torch.dtype) -> None:
    arguments = (pictures(2, 9, 14, 3), 6, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], method)
    with use("triton"):
        torch.library.opcheck(ops.prepare.overload, (*arguments, dtype))
        got = ops.prepare(*arguments, dtype)
    want = reference.prepare(*arguments, torch.float32)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(224, 224, 96), (224, 224, 160), (32, 32, 24), (97, 130, 64)], ids=str)
@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_crop_on_a_gpu(sizes: tuple[int, int, int], amp: bool, dtype: torch.dtype) -> None:
    bound = TOLERANCES[dtype] if dtype != torch.float32 else TENSOR_FLOAT32 if amp else 2 * FLOAT32
    check_crop(*sizes, dtype, amp, "cuda", bound)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [96, 160, 300])
def test_lanczos_on_a_gpu_is_pillows(size: int) -> None:
    x = pictures(2, 224, 224, 3)
    got = lanczos_resize(x.cuda(), size).cpu().numpy()
    for image, small in zip(x.numpy(), got, strict=True):
        want = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
        assert np.array_equal(small, np.asarray(want))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lanczos", "fourier", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepare_on_a_gpu(method: str, dtype: torch.dtype) -> None:
    x, size = pictures(2, 224, 224, 3), 224 if method == "none" else 96
    got = prepare(x.cuda(), size, method=method, dtype=dtype).cpu().float()
    bound = 1e-4 if dtype == torch.float32 else TOLERANCES[dtype]
    assert torch.allclose(got, prepare(x, size, method=method), rtol=bound, atol=bound)
