"""Slide attention as a function: every backend against the formula, the two paths' sum, options, bad input."""

from __future__ import annotations

import functools
from typing import Any

import direct
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import leap_slide as ls
from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.testing.operators import without_type_checks
from leap_slide.functional import (
    PADDINGS,
    check_backend,
    padded_maps,
    shift_kernel,
    slide_attention,
    slide_attention_conv,
)

FLOAT64_ROUNDING = 1e-10  # of sums over up to 49 * 49 products
every_backend = pytest.mark.parametrize("backend", ["auto", "conv", "gemm"])


def sample(
    hw: tuple[int, int] = (4, 5),
    num_heads: int = 2,
    dim: int = 3,
    side: int = 3,
    batch: int = 2,
    rpb: bool = True,
    own_values: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Arguments of `slide_attention`, and the names of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=dtype)
    q, k, v = draw(batch, *hw, 3 * num_heads * dim).chunk(3, 3)  # strided
    kernels = dim * side**2
    given: dict[str, Any] = {"q": q, "k": k, "v": v}
    given |= {"weight": draw(kernels, 1, side, side) * 0.5, "bias": draw(kernels)}
    if own_values:
        given |= {"value_weight": draw(kernels, 1, side, side) * 0.5, "value_bias": draw(kernels)}
    given["rpb"] = draw(1, num_heads, 1, side**2, 1, 1) if rpb else None
    return {**given, "num_heads": num_heads, "kernel_size": side}


def is_close(got: Tensor, want: Tensor, tolerance: float = FLOAT64_ROUNDING) -> bool:
    """Whether the largest error is within `tolerance` times the largest number wanted."""
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())


OPTIONS = st.one_of(
    st.fixed_dictionaries({"rpb_on": st.sampled_from(["keys", "logits"]), "mask_padding": st.booleans()}),
    st.fixed_dictionaries({"padding_mode": st.sampled_from(["replicate"]), "scale": st.sampled_from([0.3, 1.0])}),
)
SHAPES = {
    "hw": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    "num_heads": st.integers(1, 3),
    "dim": st.integers(1, 4),
    "side": st.sampled_from([1, 3, 5, 7]),
    "rpb": st.booleans(),
    "own_values": st.booleans(),
    "seed": st.integers(0, 99),
}


@every_backend
@settings(max_examples=settings().max_examples // 2)
@given(shapes=st.fixed_dictionaries(SHAPES), options=OPTIONS)
def test_every_backend_is_the_formula_on_every_map(backend: str, shapes: Any, options: Any) -> None:
    """Rectangles, single pixels, and maps that are smaller than the kernel among them."""
    given = sample(**shapes, batch=1)
    assert is_close(slide_attention(**given, **options, backend=backend), direct.attention(**given, **options))


@settings(max_examples=settings().max_examples // 2)
@given(
    hw=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    side=st.sampled_from([1, 3, 5, 7]),
    num_heads=st.integers(1, 3),
    dim=st.integers(1, 17),
    seed=st.integers(0, 99),
)
def test_a_tap_at_a_time_is_the_convolution_on_larger_maps(**shapes: Any) -> None:
    given = sample(**shapes)
    assert is_close(slide_attention(**given, backend="gemm"), slide_attention(**given, backend="conv"))


@every_backend
@pytest.mark.parametrize("mode", PADDINGS)
@pytest.mark.parametrize("side", [3, 5])
def test_padding_modes_are_those_of_convolutions(backend: str, mode: str, side: int) -> None:
    given = sample(hw=(4, 6), side=side)
    got = slide_attention(**given, padding_mode=mode, backend=backend)
    assert is_close(got, direct.attention(**given, padding_mode=mode))


def test_padding_modes_give_four_outputs() -> None:
    outputs = [slide_attention(**sample(), padding_mode=mode) for mode in PADDINGS]
    assert not any(torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("mode", PADDINGS)
def test_convolution_by_padded_maps_is_that_of_pytorch(mode: str) -> None:
    x, generator = torch.arange(30.0, dtype=torch.float64).reshape(1, 1, 1, 5, 6), torch.Generator().manual_seed(0)
    conv = nn.Conv2d(1, 9, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    conv.weight.data = torch.randn(9, 1, 3, 3, generator=generator, dtype=torch.float64)
    around = padded_maps(x, 1, mode)
    assert around.shape == (1, 1, 1, 7, 8)
    assert is_close(F.conv2d(around[0], conv.weight, conv.bias), conv(x[0]))


@every_backend
@pytest.mark.parametrize("option", ["keys", "logits", "mask_padding", "replicate", "own_values"])
def test_gradients_are_those_of_the_formula(backend: str, option: str) -> None:
    given = sample(hw=(2, 4), own_values=option == "own_values")
    options: dict[str, Any] = {"rpb_on": option} if option in ("keys", "logits") else {}
    options |= {"mask_padding": True} if option == "mask_padding" else {}
    options |= {"padding_mode": option} if option == "replicate" else {}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items() if isinstance(x, Tensor)}
    cotangent = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = (
        slide_attention(**{**given, **leaves}, **options, backend=backend),
        direct.attention(**{**given, **leaves}, **options),
    )
    found = [torch.autograd.grad((out * cotangent).sum(), list(leaves.values())) for out in outputs]
    for name, got, want in zip(leaves, *found, strict=True):
        assert is_close(got, want), name


@every_backend
@pytest.mark.parametrize("side", [3, 5])
def test_fixed_shifts_alone_are_local_attention_by_unfold(backend: str, side: int) -> None:
    """With dep_conv1 and biases of zero, logits are sum_j q_j(x) k_j(x + i - r), and the softmax counts the padding."""
    given = sample(side=side, rpb=False)
    given["weight"], given["bias"] = shift_kernel(3, side).double(), torch.zeros(3 * side**2, dtype=torch.float64)

    def unfolded(x: Tensor) -> Tensor:  # batch, heads, dim, slots, pixels
        return F.unfold(x.permute(0, 3, 1, 2), side, padding=side // 2).reshape(2, 2, 3, side**2, 20)

    query = given["q"].permute(0, 3, 1, 2).reshape(2, 2, 3, 1, 20) * 3**-0.5
    share = (query * unfolded(given["k"])).sum(2).softmax(2)
    want = (share[:, :, None] * unfolded(given["v"])).sum(3).reshape(2, 6, 4, 5).permute(0, 2, 3, 1)
    assert is_close(slide_attention(**given, backend=backend), want)


@every_backend
def test_kernel_of_one_is_a_product_by_channel(backend: str) -> None:
    """One slot: the softmax is 1 and the output the scaled and moved value."""
    given = sample(side=1)
    scaled = given["v"].unflatten(3, (2, 3)) * given["weight"].flatten() + given["bias"]
    assert is_close(slide_attention(**given, backend=backend), scaled.flatten(3))


@every_backend
def test_single_pixel_sees_its_own_weight_and_the_biases_of_all_slots(backend: str) -> None:
    given = sample(hw=(1, 1), num_heads=1)
    weight, bias = given["weight"][:, 0, 1, 1].reshape(3, 9), given["bias"].reshape(3, 9)
    q, k, v = (given[name].reshape(2, 3, 1) for name in "qkv")
    logits = (q * 3**-0.5 * (k * weight + bias + given["rpb"].reshape(9))).sum(1, keepdim=True)
    want = (logits.softmax(2) * (v * weight + bias)).sum(2).reshape(2, 1, 1, 3)
    assert is_close(slide_attention(**given, backend=backend), want)


def test_slots_of_the_shift_kernel_are_read_row_by_row() -> None:
    x = torch.arange(35.0).reshape(1, 1, 5, 7).repeat(1, 2, 1, 1)
    slots = F.conv2d(x, shift_kernel(2, 3), padding=1, groups=2).reshape(2, 9, 5, 7)
    for slot in range(9):
        dy, dx = slot // 3 - 1, slot % 3 - 1
        assert torch.equal(slots[0, slot, 1:4, 1:6], x[0, 0, 1 + dy : 4 + dy, 1 + dx : 6 + dx]), slot
    assert torch.equal(slots[0], slots[1])


@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_shift_kernel_has_one_tap_a_slot(side: int) -> None:
    kernel = shift_kernel(4, side)
    assert kernel.shape == (4 * side**2, 1, side, side)
    assert torch.equal(kernel.flatten(1), torch.eye(side**2).repeat(4, 1))


def test_merged_kernels_are_sums() -> None:
    a, b, c, d = (torch.randn(*shape) for shape in [(18, 1, 3, 3), (18,), (18, 1, 3, 3), (18,)])
    weight, bias = ls.merge_weights(a, b, c, d)
    assert torch.equal(weight, a + c)
    assert torch.equal(bias, b + d)
    assert torch.equal(ls.merge_weights(a, None, c, d)[1], d)
    assert torch.equal(ls.merge_weights(a, b, c, None)[1], b)
    assert torch.equal(ls.merge_weights(a, None, c, None)[1], torch.zeros(18))


def test_two_paths_give_what_their_merged_kernels_give() -> None:
    """By convolution of each path and the sum, in float32 (section 3.3)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 6, 6, generator=generator)
    paths = [torch.randn(*shape, generator=generator) for shape in [(18, 1, 3, 3), (18,), (18, 1, 3, 3), (18,)]]
    two = F.conv2d(x, *paths[:2], padding=1, groups=2) + F.conv2d(x, *paths[2:], padding=1, groups=2)
    assert is_close(F.conv2d(x, *ls.merge_weights(*paths), padding=1, groups=2), two, 1e-6)


def test_bias_on_keys_is_weighted_by_the_query_and_that_on_logits_is_not() -> None:
    """A query whose channels sum to 0 does not see the first."""
    given = sample()
    given["q"] = given["q"].unflatten(3, (2, 3)) - given["q"].unflatten(3, (2, 3)).mean(4, keepdim=True)
    given["q"] = given["q"].flatten(3)
    without = slide_attention(**{**given, "rpb": None})
    assert is_close(slide_attention(**given), without)
    assert not is_close(slide_attention(**given, rpb_on="logits"), without, 1e-3)


def test_table_may_have_any_shape() -> None:
    given = sample()
    flat = given["rpb"].reshape(2, 9)
    assert torch.equal(slide_attention(**given), slide_attention(**{**given, "rpb": flat}))


def test_scale_is_one_over_the_root_of_the_head_width() -> None:
    given = sample(dim=4)
    assert torch.equal(slide_attention(**given), slide_attention(**given, scale=0.5))
    assert not is_close(slide_attention(**given), slide_attention(**given, scale=1.0), 1e-3)


def test_output_of_channels_last_is_contiguous_without_a_copy() -> None:
    given = sample()
    given |= {name: given[name].contiguous() for name in "qkv"}
    assert slide_attention(**given).is_contiguous()


@every_backend
def test_inputs_in_any_memory_order_give_the_same(backend: str) -> None:
    given = sample()
    moved = {name: given[name].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) for name in "qkv"}
    moved["weight"] = given["weight"].transpose(0, 3).contiguous().transpose(0, 3)
    moved["bias"] = given["bias"].repeat_interleave(2)[::2]
    got = slide_attention(**{**given, **moved}, backend=backend)
    assert is_close(got, direct.attention(**given))


@every_backend
def test_expanded_inputs_give_the_same(backend: str) -> None:
    given = sample(batch=1)
    wide = {name: given[name].expand(3, -1, -1, -1) for name in "qkv"}
    got = slide_attention(**{**given, **wide}, backend=backend)
    assert is_close(got, direct.attention(**given).expand(3, -1, -1, -1))


@every_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_near_float64(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Within a few roundings of the inputs' dtype; the operators compute in float32."""
    given = sample(dtype=dtype)
    got = slide_attention(**given, backend=backend)
    assert got.dtype == dtype
    assert is_close(got.double(), direct.attention(**given), tolerance)


@every_backend
def test_half_precision_maps_take_kernels_of_float32(backend: str) -> None:
    """Master weights stay in float32 where the caller casts the maps alone."""
    given = sample(dtype=torch.float32)
    given |= {name: given[name].bfloat16() for name in "qkv"}
    got = slide_attention(**given, backend=backend)
    assert got.dtype == torch.bfloat16
    assert is_close(got.double(), direct.attention(**given), 2e-2)


@pytest.mark.parametrize("backend", ["conv", "gemm"])
def test_backend_that_is_asked_for_runs(backend: str) -> None:
    """The convolution is two operations of PyTorch, the others one of this package."""
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Names():
        slide_attention(**sample(), backend=backend)
    assert ("aten.convolution.default" in names) == (backend == "conv")
    assert ("leap_slide.slide_attention.default" in names) == (backend == "gemm")


def test_use_chooses_for_auto_and_not_for_gemm() -> None:
    given = sample(dtype=torch.float32, hw=(9, 9), dim=16)
    with use("reference"):
        chosen, forced = slide_attention(**given), slide_attention(**given, backend="gemm")
    assert torch.equal(forced, slide_attention(**given, backend="gemm"))
    assert is_close(chosen, forced, 1e-5)


class Module(nn.Module):
    """The function of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = {name: value for name, value in sample(dtype=torch.float32).items() if name not in "qkv"}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return slide_attention(q, k, v, **self.rest)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("how", ["export", "trace"])
def test_exporters_record_convolutions(how: str) -> None:
    given = [sample(dtype=torch.float32)[name].contiguous() for name in "qkv"]
    want = Module()(*given)
    with without_type_checks():
        if how == "export":
            program = torch.export.export(Module(), tuple(given))
            text, got = str(program.graph), program.module()(*given)
        else:
            traced = torch.jit.trace(Module(), tuple(given))
            text, got = str(traced.inlined_graph), traced(*given)
    assert "conv" in text
    assert "leap_slide::" not in text
    assert "leap_slide.slide" not in text
    assert is_close(got, want, 1e-5)


def test_compiled_graphs_keep_the_operator() -> None:
    given = [sample(dtype=torch.float32)[name] for name in "qkv"]
    graphs = []

    def record(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    rest = {name: value for name, value in sample(dtype=torch.float32).items() if name not in "qkv"}
    torch.compiler.reset()
    with without_type_checks():
        got = torch.compile(functools.partial(slide_attention, **rest), backend=record, fullgraph=True)(*given)
    assert ["leap_slide" in graph for graph in graphs] == [True]
    assert is_close(got, slide_attention(*given, **rest), 1e-5)


@pytest.mark.parametrize("mode", PADDINGS)
def test_meta_tensors_give_meta_tensors(mode: str) -> None:
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in sample().items()}
    out = slide_attention(**given, padding_mode=mode)
    assert out.device.type == "meta"
    assert out.shape == (2, 4, 5, 6)


def test_conv_form_takes_kept_shares() -> None:
    q, k, v = (x.unflatten(3, (2, 3)).permute(0, 3, 4, 1, 2) for x in (sample()[name] for name in "qkv"))
    kernels = sample()["weight"], sample()["bias"]
    keep = torch.zeros(2, 2, 9, 4, 5, dtype=torch.float64)
    out = slide_attention_conv(q, k, v, kernels, kernels, None, keep, 1.0)
    assert not out.any()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": 4}, "kernel_size 4: expected an odd number of 1 or more"),
    ({"kernel_size": 0}, "kernel_size 0: expected an odd number of 1 or more"),
    ({"kernel_size": -3}, "kernel_size -3"),
    ({"kernel_size": 5}, "weight (27, 1, 3, 3) and bias (27,): expected (75, 1, 5, 5) and (75,)"),
    ({"num_heads": 4}, "6 channels and 4 heads: the channels must be a multiple of the heads"),
    ({"num_heads": 0}, "6 channels and 0 heads"),
    ({"num_heads": 3}, "weight (27, 1, 3, 3) and bias (27,): expected (18, 1, 3, 3) and (18,), for 2 channels a head"),
    ({"backend": "cuda"}, "backend 'cuda' is unknown"),
    ({"rpb_on": "queries"}, "rpb_on 'queries': expected 'keys' (as in the paper's code) or 'logits'"),
    ({"padding_mode": "zeroes"}, "padding_mode 'zeroes' is unknown: did you mean zeros"),
    ({"padding_mode": "reflect", "mask_padding": True}, "mask_padding leaves the padding out"),
    ({"k": torch.zeros(2, 4, 4, 6)}, "k (2, 4, 4, 6), v (2, 4, 5, 6): expected three tensors"),
    ({"v": torch.zeros(1, 4, 5, 6)}, "expected three tensors (batch, height, width, channels) of one shape"),
    ({"q": torch.zeros(2, 4, 5, 6, dtype=torch.float32)}, "k is of type torch.float64, q of torch.float32"),
    ({"rpb": torch.zeros(2, 25)}, "rpb has 50 numbers: expected 2 heads times 9 slots"),
    ({"weight": torch.zeros(27, 3, 3)}, "weight (27, 3, 3) and bias (27,): expected (27, 1, 3, 3)"),
    ({"bias": torch.zeros(3)}, "weight (27, 1, 3, 3) and bias (3,)"),
    ({"value_weight": torch.zeros(27, 1, 3, 3)}, "need both value_weight and value_bias"),
    ({"value_bias": torch.zeros(27)}, "need both value_weight and value_bias"),
    ({"value_weight": torch.zeros(27, 1, 5, 5), "value_bias": torch.zeros(27)}, "value_weight (27, 1, 5, 5) and"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[row[1][:40] for row in BAD])
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with without_type_checks(), pytest.raises(UserError) as refused:
        slide_attention(**{**sample(), **change})
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_integers_are_refused(name: str) -> None:
    given = sample()
    with without_type_checks(), pytest.raises(UserError, match="expected one floating-point type"):
        slide_attention(**{**given, name: given[name].long()})


@pytest.mark.parametrize("name", ["weight", "bias", "rpb"])
def test_kernels_and_tables_of_integers_are_refused(name: str) -> None:
    given = sample()
    with without_type_checks(), pytest.raises(UserError, match=f"{name} is of type torch.int64"):
        slide_attention(**{**given, name: given[name].long()})


@pytest.mark.parametrize("name", ["k", "weight", "rpb"])
def test_tensors_on_several_devices_are_refused(name: str) -> None:
    given = sample()
    with pytest.raises(UserError, match=f"{name} is on meta, q on cpu"):
        slide_attention(**{**given, name: given[name].to("meta")})


@every_backend
def test_empty_batch_gives_an_empty_output(backend: str) -> None:
    given = sample() | {name: torch.zeros(0, 4, 5, 6, dtype=torch.float64) for name in "qkv"}
    assert slide_attention(**given, backend=backend).shape == (0, 4, 5, 6)


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 4, 0)])
def test_empty_maps_are_refused(shape: tuple[int, int, int]) -> None:
    given = sample() | {name: torch.zeros(*shape, 6, dtype=torch.float64) for name in "qkv"}
    with pytest.raises(UserError, match="expected at least one pixel"):
        slide_attention(**given)


@every_backend
@pytest.mark.parametrize(("mode", "hw"), [("reflect", (1, 5)), ("reflect", (5, 1)), ("circular", (5, 1))])
def test_map_too_small_to_be_padded_is_refused(backend: str, mode: str, hw: tuple[int, int]) -> None:
    side = 3 if mode == "reflect" else 5
    with pytest.raises(UserError, match=f"{hw[0]}x{hw[1]} tokens is too small for padding_mode '{mode}'"):
        slide_attention(**sample(hw=hw, side=side), padding_mode=mode, backend=backend)


@every_backend
@pytest.mark.parametrize(("mode", "hw"), [("reflect", (2, 3)), ("circular", (1, 2)), ("replicate", (1, 1))])
def test_smallest_map_that_can_be_padded_is(backend: str, mode: str, hw: tuple[int, int]) -> None:
    given = sample(hw=hw)
    got = slide_attention(**given, padding_mode=mode, backend=backend)
    assert is_close(got, direct.attention(**given, padding_mode=mode))


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_slide.functional.backends", lambda: {"triton": "no CUDA device"})
    with pytest.raises(UserError, match="backend='triton' cannot run here: no CUDA device; 'auto' takes what works"):
        slide_attention(**sample(), backend="triton")


def test_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_slide.functional.backends", lambda: {"triton": "works"})
    with pytest.raises(UserError, match="backend='triton' needs CUDA tensors, these are on cpu: move them, or take"):
        check_backend("triton", torch.device("cpu"))


BAD_KERNELS = [
    (((18, 1, 3, 3), (18,), (27, 1, 3, 3), (27,)), "kernels of shapes (18, 1, 3, 3) and (27, 1, 3, 3)"),
    (((18, 2, 3, 3), (18,), (18, 2, 3, 3), (18,)), "expected two of (dim * k * k, 1, k, k)"),
    (((16, 16), (16,), (16, 16), (16,)), "kernels of shapes (16, 16) and"),
    (((18, 1, 3, 5), (18,), (18, 1, 3, 5), (18,)), "expected two of (dim * k * k, 1, k, k)"),
    (((18, 1, 3, 3), (9,), (18, 1, 3, 3), (18,)), "a bias of shape (9,): expected (18,), one per kernel"),
    (((18, 1, 3, 3), (18,), (18, 1, 3, 3), (1,)), "a bias of shape (1,): expected (18,)"),
    (((16, 1, 2, 2), (16,), (16, 1, 2, 2), (16,)), "kernels of shapes (16, 1, 2, 2) and"),
    (((10, 1, 3, 3), (10,), (10, 1, 3, 3), (10,)), "kernels of shapes (10, 1, 3, 3) and"),
]


@pytest.mark.parametrize(("shapes", "message"), BAD_KERNELS, ids=[row[1][:40] for row in BAD_KERNELS])
def test_kernels_that_do_not_fit_each_other_are_refused(shapes: Any, message: str) -> None:
    with without_type_checks(), pytest.raises(UserError) as refused:
        ls.merge_weights(*(torch.zeros(shape) for shape in shapes))
    assert message in str(refused.value)
