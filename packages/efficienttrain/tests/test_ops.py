"""The operators: the CPU's against the definitions in float64, their contract with PyTorch, and batches in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leap_efficienttrain import ops
from leap_efficienttrain.ops import cpu, folding, reference
from leap_efficienttrain.ops.weights import crop_axis
from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.testing.operators import TOLERANCES, check_operator, without_type_checks

# The reference is computed from inputs of the same dtype, so that only the arithmetic differs: sums of hundreds of
# float32 products, each of numbers of about 1.
FLOAT32 = 5e-6
FLOAT64 = 1e-13
FORMS = ("dense", "folded", "transformed")
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@contextmanager
def only(form: str, numbers: int = 2**17) -> Iterator[None]:
    """Compute all sizes by one form of the CPU's, so many numbers at a time."""
    with pytest.MonkeyPatch.context() as patch, use("cpu"):
        patch.setattr(cpu, "form", lambda *_: form)
        patch.setattr(cpu, "NUMBERS", dict.fromkeys(FORMS, numbers))
        yield


SIZES = st.tuples(st.integers(2, 40), st.integers(2, 40)).flatmap(
    lambda hw: st.tuples(st.just(hw[0]), st.just(hw[1]), st.integers(1, min(hw) // 2).map(lambda half: 2 * half))
)


@pytest.mark.parametrize("form", FORMS)
@given(sizes=SIZES)
def test_every_form_is_the_definition_at_any_size(form: str, sizes: tuple[int, int, int]) -> None:
    height, width, size = sizes
    x, gradient = images(1, 3, height, width), images(1, 3, size, size, seed=1)
    with only(form):
        got = (
            ops.low_frequency_crop(x, size, 1.5, False),
            ops.low_frequency_crop_adjoint(gradient, height, width, 1.5, False),
        )
    assert torch.allclose(got[0].double(), reference.crop(x.double(), size, 1.5), rtol=0, atol=FLOAT32)
    assert torch.allclose(
        got[1].double(), reference.adjoint(gradient.double(), height, width, 1.5), rtol=0, atol=FLOAT32
    )


@pytest.mark.parametrize("form", ["dense", "transformed"])
@pytest.mark.parametrize("sizes", [(33, 20, 16), (24, 24, 24), (30, 41, 2), (20, 28, 20), (28, 20, 20)], ids=str)
def test_float64_stays_exact(form: str, sizes: tuple[int, int, int]) -> None:
    height, width, size = sizes
    x, gradient = images(1, 2, height, width, dtype=torch.float64), images(1, 2, size, size, dtype=torch.float64)
    with only(form):
        got = ops.low_frequency_crop(x, size, 1.0, False)
        back = ops.low_frequency_crop_adjoint(gradient, height, width, 1.0, False)
    assert torch.allclose(got, reference.crop(x, size, 1.0), rtol=0, atol=FLOAT64)
    assert torch.allclose(back, reference.adjoint(gradient, height, width, 1.0), rtol=0, atol=FLOAT64)


@given(sizes=SIZES)
def test_adjoint_is_the_gradient_of_the_definition(sizes: tuple[int, int, int]) -> None:
    height, width, size = sizes
    x = images(1, 2, height, width, dtype=torch.float64).requires_grad_()
    gradient = images(1, 2, size, size, dtype=torch.float64)
    (want,) = torch.autograd.grad(reference.crop(x, size, 0.7), x, gradient)
    assert torch.allclose(reference.adjoint(gradient, height, width, 0.7), want, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(224, 224, 96), (224, 224, 160), (112, 150, 64), (400, 384, 128)]
)
def test_larger_images_agree(height: int, width: int, size: int) -> None:
    x, gradient = images(1, 1, height, width), images(1, 1, size, size)
    with use("cpu"):
        got = ops.low_frequency_crop(x, size, 1.0, False)
        back = ops.low_frequency_crop_adjoint(gradient, height, width, 1.0, False)
    assert torch.allclose(got.double(), reference.crop(x.double(), size, 1.0), rtol=0, atol=FLOAT32)
    assert torch.allclose(back.double(), reference.adjoint(gradient.double(), height, width, 1.0), rtol=0, atol=FLOAT32)


def test_form_follows_size_and_dtype() -> None:
    assert [cpu.form(n, n, torch.float32) for n in (32, 96, 224, 448)] == ["dense", "dense", "folded", "transformed"]
    assert [cpu.form(n, n, torch.float64) for n in (32, 96, 224, 448)] == ["dense"] * 2 + ["transformed"] * 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numbers", [1, 20 * 24 * 2, 20 * 24 * 7])
def test_parts_of_a_batch_make_the_batch(form: str, numbers: int) -> None:
    """One image, a few of one item, and several items with fewer at the end."""
    x = images(5, 3, 20, 24)
    with only(form, numbers):
        got = ops.low_frequency_crop(x, 16, 1.0, False)
        back = ops.low_frequency_crop_adjoint(got, 20, 24, 1.0, False)
    assert torch.allclose(got.double(), reference.crop(x.double(), 16, 1.0), rtol=0, atol=FLOAT32)
    assert torch.allclose(back.double(), reference.adjoint(got.double(), 20, 24, 1.0), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("form", FORMS)
def test_channels_last_and_expanded_gradients_are_read_right(form: str) -> None:
    x = images(2, 3, 12, 14).to(memory_format=torch.channels_last).requires_grad_()
    with only(form):
        out = ops.low_frequency_crop(x, 8, 1.0, False)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    want = reference.adjoint(torch.ones(2, 3, 8, 8, dtype=torch.float64), 12, 14, 1.0)
    assert torch.allclose(out.double(), reference.crop(x.double(), 8, 1.0), rtol=0, atol=FLOAT32)
    assert torch.allclose(gradient.double(), want, rtol=0, atol=FLOAT32)


SAMPLES = [
    (images(2, 3, 9, 12), 8, 1.0, False),
    (images(1, 1, 6, 6), 6, 0.5, True),
    (images(2, 1, 5, 4), 2, 1.0, False),
]
ADJOINT_SAMPLES = [(images(2, 3, 8, 8), 9, 12, 1.0, False), (images(1, 1, 2, 2), 3, 2, 0.5, True)]


@every_backend
def test_crop_and_its_gradient_agree_with_float64_through_the_dispatcher(backend: str) -> None:
    check_operator(ops.low_frequency_crop, SAMPLES, [backend])


@every_backend
def test_adjoint_and_its_gradient_agree_with_float64_through_the_dispatcher(backend: str) -> None:
    check_operator(ops.low_frequency_crop_adjoint, ADJOINT_SAMPLES, [backend])


@pytest.mark.parametrize("form", FORMS)
def test_folded_and_transformed_halves_agree_with_float64(form: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = images(2, 1, 10, 12, dtype=dtype)
        with only(form):
            got = ops.low_frequency_crop(x, 6, 1.0, False)
        assert got.dtype == dtype
        assert torch.allclose(got.double(), reference.crop(x.double(), 6, 1.0), rtol=0, atol=TOLERANCES[dtype])


@every_backend
def test_gradients_of_gradients_pass_finite_differences(backend: str) -> None:
    x = images(1, 2, 6, 7, dtype=torch.float64).requires_grad_()
    with use(backend):
        assert torch.autograd.gradcheck(lambda x: ops.low_frequency_crop(x, 4, 1.0, False) ** 2, x)
        assert torch.autograd.gradgradcheck(lambda x: ops.low_frequency_crop(x, 4, 1.0, False) ** 2, x)


@every_backend
def test_memory_made_in_inference_mode_serves_training(backend: str) -> None:
    x = images(1, 1, 114, 118)
    with torch.inference_mode(), use(backend):
        ops.low_frequency_crop(x, 12, 1.0, False)
    x.requires_grad_()
    with use(backend):
        (gradient,) = torch.autograd.grad(ops.low_frequency_crop(x, 12, 1.0, False).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("length", [12, 15, 16])
@pytest.mark.parametrize("size", [4, 6, 12])
def test_matrices_keep_means_and_frequencies(length: int, size: int) -> None:
    axis = crop_axis(length, size)
    assert np.allclose(axis.matrix.sum(1), 1)
    for k in range(size // 2):
        wave = np.exp(2j * np.pi * k * np.arange(length) / length)
        assert np.allclose(axis.matrix @ wave, np.exp(2j * np.pi * k * np.arange(size) / size), atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 16])
@pytest.mark.parametrize("mirrored", [True, False])
def test_parts_of_a_signal_hold_all_of_it(length: int, mirrored: bool) -> None:
    tables = folding.parts(length, 3, 2 - length % 2, mirrored)
    found = np.concatenate([table / np.sqrt(abs(table).sum(1, keepdims=True)) for table in tables])
    assert np.allclose(found @ found.T, np.eye(length))


BYTES = torch.randint(0, 256, (3, 9, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STATISTICS = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])


@every_backend
@pytest.mark.parametrize("size", [(4, 5), (9, 14), (20, 3), (1, 1)], ids=str)
def test_lanczos_passes_opcheck_and_takes_any_strides(backend: str, size: tuple[int, int]) -> None:
    with use(backend):
        torch.library.opcheck(ops.lanczos_resize.overload, (BYTES, *size))
        want = ops.lanczos_resize(BYTES.permute(0, 2, 1, 3).contiguous(), *size)
        assert torch.equal(ops.lanczos_resize(BYTES.permute(0, 2, 1, 3), *size), want)
        assert ops.lanczos_resize(BYTES[:0], *size).shape == (0, *size, 3)


@pytest.mark.parametrize("pixels", [1, 9 * 14 * 2])
def test_lanczos_of_parts_is_that_of_the_batch(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from leap_efficienttrain.ops import cpu_pictures

    monkeypatch.setattr(cpu_pictures, "PIXELS", pixels)
    with use("cpu"):
        assert torch.equal(ops.lanczos_resize(BYTES, 5, 7), ops.lanczos_resize.reference(BYTES, 5, 7))


def test_lanczos_leaves_sums_that_float32_cannot_hold_to_the_reference() -> None:
    pictures = BYTES.repeat(1, 80, 1, 1)
    assert ops.lanczos_resize.chosen(pictures, 5, 7) == "reference"
    assert ops.lanczos_resize.chosen(pictures, 50, 7) == "cpu"
    with use("cpu"), pytest.raises(UserError, match="weights for an output are more than"):
        ops.lanczos_resize(pictures, 5, 7)
    with use("cpu"), pytest.raises(UserError, match="weights for an output are more than"):
        ops.prepare(BYTES.repeat(1, 80, 60, 1), 8, *STATISTICS, "lanczos", torch.float32)


@every_backend
@pytest.mark.parametrize("method", ["lanczos", "fourier", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prepare_agrees_with_the_definition(backend: str, method: str, dtype: torch.dtype) -> None:
    arguments = (BYTES, 6, *STATISTICS, method)
    with use(backend):
        torch.library.opcheck(ops.prepare.overload, (*arguments, dtype))
        got = ops.prepare(*arguments, dtype)
        assert ops.prepare(BYTES[:0], *arguments[1:], dtype).shape == (0, *got.shape[1:])
    want = ops.prepare.reference(*arguments, torch.float32)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert torch.allclose(got.float(), want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@every_backend
def test_prepare_compiles_in_one_graph(backend: str) -> None:
    def call(images: Tensor) -> Tensor:
        small = ops.prepare(images, 6, *STATISTICS, "fourier", torch.float32)
        return ops.low_frequency_crop(small, 4, 1.0, False) + 1

    torch.compiler.reset()
    with use(backend), without_type_checks():
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(BYTES)
    assert torch.allclose(got, call(BYTES), rtol=0, atol=FLOAT32)
