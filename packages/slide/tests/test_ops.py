"""The operators: the CPU's against the reference in float64, their contract with PyTorch, and their memory."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from leap_shared.ops import use
from leap_shared.testing.operators import TOLERANCES, check_operator
from leap_slide import ops
from leap_slide.functional import slide_attention_conv
from leap_slide.ops import cpu, cpu_backward, reference

# Gradients of kernels and tables are sums over all pixels, of products of shares and of their differences.
FLOAT32 = {torch.float32: 5e-5}
SECOND_DERIVATIVES = {torch.float32: 1e-3}  # autograd's, through the reference
FLOAT64_ROUNDING = 1e-10
OUTPUTS = ("query", "key", "value", "key weight", "key bias", "value weight", "value bias", "position")
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


def sample(
    batch: int = 2,
    hw: tuple[int, int] = (3, 4),
    num_heads: int = 2,
    dim: int = 3,
    side: int = 3,
    own_values: bool = False,
    position: bool = True,
    keep: bool = False,
    on_logits: bool = False,
    masked: bool = False,
    padded: bool = False,
    first: bool = True,
    packed: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    """Arguments of the operator; maps have channels `first` in memory or last, and are views where `packed`."""
    generator, radius = torch.Generator().manual_seed(seed), side // 2 if padded else 0

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def maps(count: int, border: int) -> tuple[Tensor, ...]:
        height, width = hw[0] + 2 * border, hw[1] + 2 * border
        if first:
            views = draw(batch, num_heads, count, dim, height, width).unbind(2)
        else:
            views = draw(batch, height, width, num_heads, count, dim).permute(0, 3, 4, 5, 1, 2).unbind(2)
        return views if packed else tuple(torch.empty_like(x).copy_(x) for x in views)

    if padded:
        (query,), (key, value) = maps(1, 0), maps(2, radius)
    else:
        query, key, value = maps(3, 0)
    kernels = [(draw(dim, side**2, side**2) * 0.5, draw(dim, side**2)) for _ in range(2)]
    kept = (torch.rand(batch, num_heads, side**2, *hw, generator=generator) > 0.3).to(dtype) / 0.7
    return [
        *(query, key, value, *kernels[0]),
        *(kernels[1] if own_values else (None, None)),
        draw(num_heads, side**2) if position else None,
        kept if keep else None,
        *(dim**-0.5, on_logits, masked, padded),
    ]


def backward_of(args: list[Any], seed: int = 1) -> list[Any]:
    """Arguments of the backward operator for those of the forward one."""
    return [torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)).to(args[0]), *args]


def run(backend: str, args: list[Any]) -> tuple[Tensor, ...]:
    """Output and gradients of a backend, through the dispatcher."""
    with use(backend):
        return ops.slide_attention.overload(*args), *ops.slide_attention_backward.overload(*backward_of(args))


def check_both(args: list[Any], tolerance: float, backend: str = "cpu") -> None:
    """Both operators agree with the reference in float64, relative to the largest number of each tensor."""
    double = [x.double() if isinstance(x, Tensor) else x for x in args]
    gradient = [x.double() if isinstance(x, Tensor) else x for x in backward_of(args)]
    wanted = (reference.forward(*double), *reference.gradients(*gradient))
    for name, got, want in zip(("output", *OUTPUTS), run(backend, args), wanted, strict=True):
        assert got.shape == want.shape, name
        if want.numel():
            error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-2)
            assert error <= tolerance, f"{name} is off by {error:.2g} of its largest number"


# `check_operator` takes views of these itself; PyTorch's opcheck cannot copy empty ones of other strides.
SAMPLES = [
    sample(packed=False),
    sample(packed=False, hw=(2, 5), own_values=True, position=False),
    sample(packed=False, hw=(4, 1), side=5, dim=2, masked=True, on_logits=True, first=False),
    sample(packed=False, hw=(3, 3), num_heads=1, padded=True, first=False),
    sample(packed=False, side=1, dim=1, hw=(1, 1)),
]


@every_backend
def test_forward_and_its_gradients_agree_with_float64(backend: str) -> None:
    samples = SAMPLES if backend == "cpu" else SAMPLES[::-1]  # the first is traced, which takes long for many taps
    check_operator(ops.slide_attention, samples, [backend], FLOAT32)


@every_backend
def test_backward_agrees_with_float64_and_so_do_second_derivatives(backend: str) -> None:
    samples = [sample(packed=False, batch=1, hw=(2, 3), dim=2, side=1), SAMPLES[1], SAMPLES[3]]
    check_operator(ops.slide_attention_backward, [*map(backward_of, samples)], [backend], SECOND_DERIVATIVES)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_half_precision_agrees_with_float64(backend: str, dtype: torch.dtype, first: bool) -> None:
    check_both(sample(hw=(5, 4), keep=True, first=first, dtype=dtype), TOLERANCES[dtype], backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_kernels_are_summed_in_a_wide_dtype(backend: str, dtype: torch.dtype) -> None:
    args = sample(own_values=True, dtype=dtype)
    found = run(backend, args)[1:]
    assert {x.dtype for x in found[:3]} == {dtype}
    assert {x.dtype for x in found[3:]} == {torch.float64 if dtype == torch.float64 else torch.float32}


SHAPES = {
    "batch": st.integers(1, 3),
    "hw": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    "num_heads": st.integers(1, 3),
    "dim": st.sampled_from([1, 2, 5, 16]),
    "side": st.sampled_from([1, 3, 5, 7]),
    "own_values": st.booleans(),
    "position": st.booleans(),
    "keep": st.booleans(),
    "on_logits": st.booleans(),
    "masked": st.booleans(),
    "padded": st.booleans(),
    "first": st.booleans(),
    "seed": st.integers(0, 99),
}


@given(shapes=st.fixed_dictionaries(SHAPES))
def test_cpu_takes_every_map_option_and_memory_order(shapes: dict[str, Any]) -> None:
    check_both(sample(**shapes, dtype=torch.float64), FLOAT64_ROUNDING)


@settings(max_examples=settings().max_examples // 2)
@given(shapes=st.fixed_dictionaries(SHAPES), pixels=st.sampled_from([1, 20, 60, 200]))
def test_cpu_cuts_maps_into_strips_of_any_size(shapes: dict[str, Any], pixels: int) -> None:
    """Single rows, some rows with a shorter last strip, or some of the maps."""
    whole = cpu.Plan.strips
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.Plan, "strips", lambda plan: cut(plan, pixels))
        check_both(sample(**shapes, dtype=torch.float64), FLOAT64_ROUNDING)
    assert cpu.Plan.strips is whole


def cut(plan: cpu.Plan, pixels: int) -> list[cpu.Strip]:
    """What `Plan.strips` would give if memory had room for so few pixels."""
    total, rows = plan.batch * plan.heads, min(max(pixels // plan.row, 1), plan.height)
    maps = max(pixels // (plan.row * (plan.height + 2 * plan.radius)), 1)
    found = []
    for first in range(0, total, maps):
        for row in range(0, plan.height, rows if maps == 1 else plan.height):
            last = min(row + rows, plan.height) if maps == 1 else plan.height
            found.append(cpu.Strip(slice(first, min(first + maps, total)), slice(row, last)))
    return found


@pytest.mark.parametrize("hw", [(1, 1), (3, 4), (56, 56), (7, 3000), (300, 40)], ids=lambda hw: f"{hw[0]}x{hw[1]}")
@pytest.mark.parametrize("dim", [1, 32, 300])
def test_strips_cover_every_pixel_of_every_map_once(hw: tuple[int, int], dim: int) -> None:
    query = torch.empty(2, 3, dim, *hw, device="meta")
    seen = torch.zeros(6, hw[0], dtype=torch.int)
    for strip in cpu.Plan(query, torch.empty(dim, 25, 25, device="meta"), False).strips():
        seen[strip.maps, strip.rows] += 1
        assert strip.count == 1 or strip.height == hw[0]
    assert (seen == 1).all()


def test_large_map_of_several_strips_agrees() -> None:
    args = sample(batch=1, num_heads=1, hw=(180, 70), dim=16)
    parts = [strip.rows for strip in cpu.Plan(args[0], args[3], False).strips()]
    assert len(parts) > 1
    check_both(args, FLOAT32[torch.float32])


def test_scratch_memory_is_never_an_output() -> None:
    """A second call of other numbers leaves the first one's outputs alone."""
    first, second = sample(seed=0), sample(seed=1)
    out = run("cpu", first)
    before = [x.clone() for x in out]
    run("cpu", second)
    assert all(torch.equal(x, y) for x, y in zip(out, before, strict=True))


def test_scratch_memory_of_larger_calls_leaves_nothing_behind() -> None:
    """Borders and places that are no pixel are zero whatever the memory was used for before."""
    args = sample(hw=(2, 3), masked=True)
    want = run("cpu", args)
    infinite = [x * torch.inf if isinstance(x, Tensor) else x for x in sample(batch=3, hw=(9, 9), side=5, dim=8)]
    run("cpu", infinite)
    assert all(torch.equal(x, y) for x, y in zip(run("cpu", args), want, strict=True))


def test_threads_have_scratch_memory_of_their_own() -> None:
    samples = [sample(hw=(40, 40), dim=8, seed=seed) for seed in range(3)]
    wanted, found = [run("cpu", args) for args in samples], {}

    def work(number: int) -> None:
        for _ in range(5):
            out = ops.slide_attention(*samples[number])
            gradients = ops.slide_attention_backward(*backward_of(samples[number]))
            found.setdefault(number, []).append((out, *gradients))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate(wanted):
        assert len(found[number]) == 5
        for got in found[number]:
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_memory_made_in_inference_mode_serves_training() -> None:
    args = sample(hw=(11, 13), dim=7)
    with torch.inference_mode():
        run("cpu", args)
    leaf = args[0].clone().requires_grad_()
    with use("cpu"):
        ops.slide_attention(leaf, *args[1:]).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@every_backend
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "zeros"])
def test_strides_are_those_that_the_fake_promises(backend: str, first: bool, padded: bool) -> None:
    """A compiled graph relies on them; opcheck compares contiguous samples too, this one names the rule."""
    args = sample(first=first, padded=padded)
    found = run(backend, args)
    with torch.device("meta"):
        fakes = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
        promised = (ops.slide_attention(*fakes), *ops.slide_attention_backward(*backward_of(fakes)))
    assert [x.stride() for x in found] == [x.stride() for x in promised]
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in promised]
    assert found[0].stride() == torch.empty_like(args[0]).stride()


@every_backend
def test_expanded_queries_give_outputs_of_their_own_memory(backend: str) -> None:
    args = sample(batch=1)
    wide = [x.expand(3, -1, -1, -1, -1) if number < 3 else x for number, x in enumerate(args)]
    with use(backend):
        out, want = ops.slide_attention(*wide), ops.slide_attention(*args)
    assert torch.allclose(out, want.expand_as(out))


@every_backend
@pytest.mark.parametrize(("batch", "hw"), [(0, (3, 4)), (2, (0, 4)), (2, (3, 0))], ids=str)
def test_empty_maps_give_empty_outputs_and_zero_gradients(backend: str, batch: int, hw: tuple[int, int]) -> None:
    args = sample(batch=batch, hw=hw, own_values=True)
    out, *found = run(backend, args)
    assert out.shape == args[0].shape
    assert [x.shape for x in found] == [x.shape for x in args[:8]]
    assert not any(x.any() for x in found)


@every_backend
@pytest.mark.parametrize("options", [{}, {"on_logits": True}, {"masked": True}, {"own_values": True}], ids=str)
def test_gradients_pass_finite_differences_with_a_fixed_dropout_mask(backend: str, options: dict[str, Any]) -> None:
    args = sample(batch=1, hw=(2, 3), dim=2, keep=True, dtype=torch.float64, **options)
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    leaves[8] = args[8]
    with use(backend):
        assert torch.autograd.gradcheck(ops.slide_attention, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(ops.slide_attention, leaves, fast_mode=True)


@every_backend
def test_kept_shares_multiply_the_softmax(backend: str) -> None:
    """All twice is the output twice, none is zero."""
    args = sample()
    with use(backend):
        once = ops.slide_attention(*args)
        twice = ops.slide_attention(*args[:8], torch.full((2, 2, 9, 3, 4), 2.0), *args[9:])
        none = ops.slide_attention(*args[:8], torch.zeros(2, 2, 9, 3, 4), *args[9:])
    assert torch.allclose(twice, 2 * once)
    assert not none.any()


@every_backend
def test_large_logits_do_not_overflow(backend: str) -> None:
    args = sample()
    args[0] = args[0] * 1e5
    check_both(args, 1e-3, backend)  # float32 has 1e-7 of logits of 1e5


@every_backend
def test_masked_slots_have_no_weight(backend: str) -> None:
    """Biases of slots outside of the map are infinite: what reads them is not finite."""
    args = sample(hw=(1, 4), masked=True, position=False, dtype=torch.float64)
    outside = [0, 1, 2, 6, 7, 8]
    want = run(backend, args)[0]
    changed = args[4].clone()
    changed[:, outside] = 1e3
    assert torch.equal(run(backend, [*args[:4], changed, *args[5:]])[0], want)
    assert not torch.equal(run(backend, [*args[:4], changed, *args[5:11], False, False])[0], want)


def test_only_gradients_that_are_wanted_come_back() -> None:
    args = sample()
    query = args[0].clone().requires_grad_()
    with use("cpu"):
        out = ops.slide_attention(query, *args[1:])
    assert [x.shape for x in torch.autograd.grad(out.sum(), [query])] == [query.shape]


def test_forward_saves_its_inputs_and_nothing_else() -> None:
    """The backward pass computes shares again: there is no tensor of k * k numbers a pixel in memory between."""
    saved: list[Tensor] = []
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in sample(side=5)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), use("cpu"):
        ops.slide_attention(*leaves)
    given = [x.data_ptr() for x in leaves if isinstance(x, Tensor)]
    assert len(saved) == len(given)
    assert sorted(x.data_ptr() for x in saved) == sorted(given)


class Allocations(TorchDispatchMode):
    """Records the size, in bytes, of the largest memory that operations return and that was not there before."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.known, self.largest = {x.untyped_storage().data_ptr() for x in given}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return found


def largest_allocation(args: list[Any], conv: bool) -> float:
    """The largest memory that forward and backward passes make, in feature maps (batch, heads, dim, height, width)."""
    gradient = backward_of(args)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    vars(cpu._memory).clear()  # so that scratch memory is made while recording
    with Allocations([x for x in gradient if isinstance(x, Tensor)]) as mode:
        if conv:
            side = math.isqrt(args[3].shape[1])
            kernels = leaves[3].reshape(-1, 1, side, side), leaves[4].flatten()
            slide_attention_conv(*leaves[:3], kernels, kernels, leaves[7], None, 1.0).sum().backward()
        else:  # what the operators call: the mode does not see inside of them
            cpu.forward(*args)
            cpu_backward.gradients(*gradient)
    return mode.largest / (args[0].numel() * args[0].element_size())


@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_cpu_makes_no_copy_of_keys_or_values_per_slot(side: int, first: bool) -> None:
    """Its largest tensors are its outputs, of one feature map, whatever k; convolutions make k * k."""
    args = sample(batch=4, hw=(56, 56), num_heads=1, dim=32, side=side, first=first)
    assert largest_allocation(args, conv=False) <= 1
    assert largest_allocation([x[:1] if i < 3 else x for i, x in enumerate(args)], conv=True) >= side**2


@pytest.mark.parametrize("side", [3, 5])
def test_costs_are_those_of_merged_convolutions_and_the_same_on_every_device(side: int) -> None:
    args, counts = sample(batch=2, hw=(6, 5), num_heads=2, dim=4, side=side), []
    for device in ("cpu", "meta"):
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in args]
        with FlopCounterMode(display=False) as counter:
            ops.slide_attention(*moved)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            ops.slide_attention_backward(*backward_of(moved))
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    multiply_adds = 2 * 2 * 30 * 2 * 4 * side**4  # keys and values, batch, pixels, heads, channels, slots * taps
    assert counts[0] == (2 * multiply_adds, 7 * multiply_adds)
