"""The layer: the released module's facts one by one, its options, its two forms, checkpoints and bad input."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable
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
from leap_slide.attention import DepthwiseKernels, check_state
from leap_slide.functional import PADDINGS, shift_kernel

FLOAT64_ROUNDING = 1e-10
FLOAT32_ROUNDING = 1e-5
every_backend = pytest.mark.parametrize("backend", ["auto", "conv", "gemm"])


def layer_of(
    dim: int = 8, num_heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> ls.SlideAttention:
    """A layer in evaluation mode with all trained parameters drawn."""
    layer, generator = ls.SlideAttention(dim, num_heads, **options).to(dtype), torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.5
    return layer.eval()


def tokens_of(
    count: int = 20, dim: int = 8, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def is_close(got: Tensor, want: Tensor, tolerance: float = FLOAT64_ROUNDING) -> bool:
    """Whether the largest error is within `tolerance` times the largest number wanted."""
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())


@every_backend
@given(
    hw=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    num_heads=st.integers(1, 3),
    dim=st.integers(1, 3),
    side=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings().max_examples // 3)
def test_layer_is_the_released_formula(
    backend: str, hw: tuple[int, int], num_heads: int, dim: int, side: int, seed: int
) -> None:
    """Head-major projection, scaled queries, summed kernels, bias on keys, padding in the softmax."""
    layer = layer_of(dim * num_heads, num_heads, seed, kernel_size=side, backend=backend)
    x = tokens_of(hw[0] * hw[1], dim * num_heads, seed=seed)
    assert is_close(layer(x, hw), direct.layer(x, layer.state_dict(), hw, num_heads))


@every_backend
def test_gradients_are_those_of_the_released_formula(backend: str) -> None:
    layer, x = layer_of(backend=backend).train(), tokens_of(6).requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(layer(x, (2, 3)).square().sum(), leaves)
    named = dict(layer.named_parameters())
    wanted = torch.autograd.grad(direct.layer(x, named, (2, 3), 2).square().sum(), leaves)
    assert all(is_close(got, want) for got, want in zip(found, wanted, strict=True))


def test_projection_is_head_major() -> None:
    """Rows of qkv are queries, keys and values of the first head, then those of the second."""
    layer, x = layer_of(), tokens_of()
    query, key, value = layer.projected(x, (4, 5))
    rows = F.linear(x, layer.qkv.weight, layer.qkv.bias)
    for head in range(2):
        for part, found in enumerate((query, key, value)):
            first = head * 12 + part * 4
            want = rows[..., first : first + 4].transpose(1, 2).unflatten(2, (4, 5))
            assert is_close(found[:, head], want)


def test_hooks_on_the_projection_are_called() -> None:
    """A layer whose projection is watched, pruned or replaced goes through it, in its memory order."""
    layer, x, seen = layer_of(), tokens_of(), []
    want = layer(x, (4, 5))
    handle = layer.qkv.register_forward_hook(lambda *_: seen.append(1))
    assert is_close(layer(x, (4, 5)), want)
    assert seen == [1]
    handle.remove()
    layer.qkv.register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    assert not is_close(layer(x, (4, 5)), want)


def test_backward_hooks_on_the_projection_are_called() -> None:
    layer, seen = layer_of(), []
    layer.qkv.register_full_backward_hook(lambda *args: seen.append(args))
    layer(tokens_of().requires_grad_(), (4, 5)).sum().backward()
    assert len(seen) == 1


def test_replaced_projection_is_used() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = layer_of(), tokens_of()
    other = copy.deepcopy(layer)
    other.qkv = Doubled(8, 24, dtype=torch.float64)
    other.qkv.load_state_dict(layer.qkv.state_dict())
    layer.qkv.weight.data *= 2
    layer.qkv.bias.data *= 2
    assert is_close(other(x, (4, 5)), layer(x, (4, 5)))


def test_kernel_of_the_fixed_path_is_frozen_and_its_bias_is_not() -> None:
    layer = ls.SlideAttention(8, 2)
    assert torch.equal(layer.dep_conv.weight, shift_kernel(4, 3))
    assert not layer.dep_conv.weight.requires_grad
    assert layer.dep_conv.bias.requires_grad
    assert layer.dep_conv1.weight.requires_grad
    assert layer.dep_conv1.bias.requires_grad
    layer(tokens_of(dtype=torch.float32), (4, 5)).sum().backward()
    assert layer.dep_conv.weight.grad is None
    assert layer.dep_conv.bias.grad is not None
    assert torch.equal(layer.dep_conv.bias.grad, layer.dep_conv1.bias.grad)


@pytest.mark.parametrize("names", [("qkv.weight", "qkv.bias"), ("q.weight", "kv.weight")], ids=["packed", "apart"])
def test_weights_of_another_attention_are_refused_with_the_converter(names: tuple[str, ...]) -> None:
    layer = layer_of()
    state = {name: torch.zeros(2, 2) for name in names}
    with pytest.raises(UserError, match=r"of another attention.*leap_slide\.convert\.from_swin"):
        check_state(layer, state, "")
    own = {"qkv.bias": torch.ones_like(layer.qkv.bias)}
    layer.load_state_dict(own, strict=False)  # a part of the layer's own is no other attention
    assert torch.equal(layer.qkv.bias, own["qkv.bias"])


def test_checkpoint_has_the_released_names_and_shapes() -> None:
    assert {name: tuple(value.shape) for name, value in ls.SlideAttention(8, 2).state_dict().items()} == {
        "relative_position_bias_table": (1, 2, 1, 9, 1, 1),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "dep_conv.weight": (36, 1, 3, 3),
        "dep_conv.bias": (36,),
        "dep_conv1.weight": (36, 1, 3, 3),
        "dep_conv1.bias": (36,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }


def test_loaded_kernel_of_the_fixed_path_is_honoured() -> None:
    """A checkpoint may hold another one than the plain shifts."""
    layer, x = layer_of(), tokens_of()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["dep_conv.weight"] = state["dep_conv.weight"].flip(0)
    layer.load_state_dict(state)
    assert is_close(layer(x, (4, 5)), direct.layer(x, state, (4, 5), 2))


@every_backend
def test_layouts_give_the_same(backend: str) -> None:
    layer, x = layer_of(backend=backend), tokens_of()
    image = x.transpose(1, 2).unflatten(2, (4, 5))
    want = layer(x, (4, 5)).transpose(1, 2).unflatten(2, (4, 5))
    for memory in (torch.contiguous_format, torch.channels_last):
        assert is_close(layer(image.contiguous(memory_format=memory)), want)
    assert is_close(layer(image, (4, 5)), want)


def test_tokens_without_a_size_are_a_square() -> None:
    layer, x = layer_of(), tokens_of(16)
    assert torch.equal(layer(x), layer(x, (4, 4)))


@every_backend
def test_strided_inputs_give_the_same(backend: str) -> None:
    layer, x = layer_of(backend=backend), tokens_of()
    assert is_close(layer(x.transpose(0, 1).contiguous().transpose(0, 1), (4, 5)), layer(x, (4, 5)))
    assert is_close(layer(x.repeat_interleave(2, 2)[..., ::2], (4, 5)), layer(x, (4, 5)))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    layer, x = layer_of(), tokens_of(batch=3)
    assert is_close(layer(x, (4, 5)), torch.cat([layer(one[None], (4, 5)) for one in x]))


def test_empty_batch_gives_an_empty_output() -> None:
    assert layer_of()(tokens_of(batch=0), (4, 5)).shape == (0, 20, 8)


@pytest.mark.parametrize("side", [3, 5])
def test_pixel_sees_its_neighbourhood_and_nothing_else(side: int) -> None:
    """Through kernels of k x k around slots of k x k: the plain shifts reach r, deformed ones no further."""
    layer, x = layer_of(kernel_size=side), tokens_of(81)
    changed = x.clone()
    changed[:, 40] += 1
    moved = (layer(x, (9, 9)) != layer(changed, (9, 9)))[0].any(1).reshape(9, 9)
    want = torch.zeros(9, 9, dtype=torch.bool)
    want[4 - side // 2 : 5 + side // 2, 4 - side // 2 : 5 + side // 2] = True
    assert torch.equal(moved, want)


def parts(layer: ls.SlideAttention, x: Tensor, hw: tuple[int, int], share_qkv: bool = False) -> list[Tensor]:
    """Queries, keys and values as maps (batch, height, width, channels), from head-major rows."""
    rows = F.linear(x, layer.qkv.weight, layer.qkv.bias)
    heads = rows.reshape(-1, *hw, layer.num_heads, 1 if share_qkv else 3, layer.head_dim)
    found = [part.flatten(3) for part in heads.unbind(4)]
    return found * 3 if share_qkv else found


OPTIONS: list[dict[str, Any]] = [
    {"dim_reduction": 2},
    {"dim_reduction": 4, "share_qkv": True},
    {"share_qkv": True, "qk_scale": 0.7},
    {"share_kernel": False},
    {"rel_pos_bias": False, "qkv_bias": False},
    {"rpb_on": "logits"},
    {"mask_padding": True},
    {"single_bias": True, "share_kernel": False},
    *({"padding_mode": mode} for mode in PADDINGS),
]


@every_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_the_formulas_ones(backend: str, options: dict[str, Any]) -> None:
    """With dim_reduction the scale stays (C / h)^-1/2, and heads have C / g / h channels."""
    layer, x = layer_of(backend=backend, **options), tokens_of()
    fixed, keys, table = layer.dep_conv, layer.dep_conv1, layer.relative_position_bias_table
    of_keys = fixed.weight + keys.weight, keys.bias if fixed.bias is None else fixed.bias + keys.bias
    of_values: dict[str, Tensor] = {}
    if not options.get("share_kernel", True):
        values = layer.dep_conv2
        bias = values.bias if fixed.bias is None else fixed.bias + values.bias
        of_values = {"value_weight": fixed.weight + values.weight, "value_bias": bias}
    named = {name: options[name] for name in ("rpb_on", "mask_padding", "padding_mode") if name in options}
    scale = options.get("qk_scale", 4**-0.5)
    given = parts(layer, x, (4, 5), options.get("share_qkv", False))
    out = direct.attention(*given, *of_keys, table, num_heads=2, scale=scale, **of_values, **named)
    assert is_close(layer(x, (4, 5)), layer.proj(out.flatten(1, 2)))


def test_options_change_the_parameters_as_the_extended_module_does() -> None:
    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in ls.SlideAttention(16, 2, **options).named_parameters()}

    reduced = shapes(dim_reduction=4)
    assert reduced["qkv.weight"] == (12, 16)
    assert reduced["proj.weight"] == (16, 4)
    assert reduced["dep_conv1.weight"] == (18, 1, 3, 3)
    assert shapes(share_qkv=True)["qkv.weight"] == (16, 16)
    assert shapes(dim_reduction=2, share_qkv=True)["qkv.weight"] == (8, 16)
    own = shapes(share_kernel=False)
    assert own.keys() - shapes().keys() == {"dep_conv2.weight", "dep_conv2.bias"}
    assert shapes().keys() - shapes(rel_pos_bias=False).keys() == {"relative_position_bias_table"}
    assert shapes().keys() - shapes(single_bias=True).keys() == {"dep_conv.bias"}
    assert shapes().keys() - shapes(qkv_bias=False).keys() == {"qkv.bias"}


def test_single_bias_trains_one_and_computes_the_same() -> None:
    two, one, x = layer_of(), layer_of(single_bias=True), tokens_of()
    one.load_state_dict(two.state_dict())
    assert is_close(one(x, (4, 5)), two(x, (4, 5)))
    assert torch.equal(one.dep_conv1.bias, two.dep_conv1.bias + two.dep_conv.bias)


def test_single_bias_is_folded_into_both_kernels_and_leaves_the_callers_state_alone() -> None:
    two = layer_of(share_kernel=False)
    one, state = layer_of(share_kernel=False, single_bias=True), two.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    one.load_state_dict(state)
    assert torch.equal(one.dep_conv2.bias, two.dep_conv2.bias + two.dep_conv.bias)
    assert is_close(one(tokens_of(), (4, 5)), two(tokens_of(), (4, 5)))
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_weights_of_one_bias_are_refused_where_there_are_two() -> None:
    state = layer_of(single_bias=True).state_dict()
    with pytest.raises(UserError, match="one bias, this model two: create it with single_bias=True"):
        check_state(layer_of(), state, "")
    assert layer_of().load_state_dict(state, strict=False).missing_keys == ["dep_conv.bias"]


def test_single_bias_loads_its_own_state() -> None:
    layer, other = layer_of(single_bias=True), layer_of(single_bias=True, seed=3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dep_conv1.bias, layer.dep_conv1.bias)


def test_initial_numbers_are_those_of_convolutions_and_published_tables() -> None:
    torch.manual_seed(0)
    for side in (3, 5):
        layer = ls.SlideAttention(256, 4, kernel_size=side, share_kernel=False)
        kernels = (layer.dep_conv1.weight, layer.dep_conv2.weight, layer.dep_conv1.bias, layer.dep_conv.bias)
        for values in (kernel.detach() for kernel in kernels):
            assert 0.97 / side < values.abs().max() <= 1 / side
            assert values.std() == pytest.approx(1 / side / 3**0.5, rel=0.05)
            assert abs(values.mean()) < 0.1 / side
        reference = nn.Conv2d(64, 64 * side**2, side, groups=64)
        assert kernels[0].detach().std() == pytest.approx(float(reference.weight.detach().std()), rel=0.05)
    table = ls.SlideAttention(512, 256).relative_position_bias_table.detach()
    assert table.std() == pytest.approx(0.02, rel=0.05)


@every_backend
def test_dropout_of_shares_keeps_the_mean(backend: str) -> None:
    """The output is linear in the shares, so its mean over masks is the output without dropout."""
    layer, x = layer_of(attn_drop=0.4, backend=backend).train(), tokens_of(6, batch=1)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = layer(x.expand(4000, -1, -1), (2, 3))
        spread = draws.std(0, keepdim=True)
        assert spread.min() > 0
        assert ((draws.mean(0, keepdim=True) - layer.eval()(x, (2, 3))).abs() < 5 * spread / 4000**0.5).all()


@every_backend
def test_dropout_in_evaluation_is_none(backend: str) -> None:
    dropped, plain, x = layer_of(attn_drop=0.5, proj_drop=0.5, backend=backend), layer_of(), tokens_of()
    assert is_close(dropped(x, (4, 5)), plain(x, (4, 5)))


def test_dropout_zeroes_shares_of_heads_pixels_and_slots_apart() -> None:
    """Where all values are one number, what is left of a pixel is the sum of its kept shares."""
    layer = layer_of(attn_drop=0.5).train()
    given = torch.zeros(1, 2, 4, 40, 40, dtype=torch.float64)
    layer.relative_position_bias_table.data.zero_()
    layer.dep_conv1.weight.data = -layer.dep_conv.weight.data
    layer.dep_conv.bias.data.zero_()
    layer.dep_conv1.bias.data.fill_(1)
    torch.manual_seed(0)
    out = layer.attended(given, given, given).detach()
    counts = out * 9 / 2
    assert is_close(counts, counts.round())
    assert is_close(counts, counts[:, :, :1].expand_as(counts))
    assert not torch.equal(counts[:, 0], counts[:, 1])
    assert counts.mean() == pytest.approx(4.5, abs=0.1)
    assert counts.var() == pytest.approx(9 / 4, rel=0.1)


def test_dropout_of_the_output_acts_in_training() -> None:
    layer, x = layer_of(proj_drop=0.5).train(), tokens_of()
    assert 0.2 < (layer(x, (4, 5)) == 0).double().mean() < 0.8


@every_backend
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_autocast_keeps_the_numbers(backend: str, rate: float) -> None:
    """Projections run in bfloat16; what is left is its rounding of a few products in a row."""
    layer, x = layer_of(dtype=torch.float32, backend=backend, attn_drop=rate), tokens_of(dtype=torch.float32)
    want = layer(x, (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, (4, 5))
        layer.train()(x, (4, 5)).float().sum().backward()
    assert got.dtype == torch.bfloat16
    assert is_close(got.float(), want, 5e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_half_precision_layers_stay_near_float64(backend: str, dtype: torch.dtype, rate: float) -> None:
    layer, x = layer_of(dtype=dtype, backend=backend, attn_drop=rate), tokens_of(dtype=dtype)
    got = layer(x, (4, 5))
    assert got.dtype == dtype
    assert is_close(got.double(), copy.deepcopy(layer).double()(x.double(), (4, 5)), 4 * torch.finfo(dtype).eps)
    assert layer.train()(x, (4, 5)).dtype == dtype


def test_checkpointed_layers_draw_the_same_mask_again() -> None:
    layer, x = layer_of(attn_drop=0.5).train(), tokens_of(6).requires_grad_()
    found = []
    for run in (layer, functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(run(x, (2, 3)).square().sum(), x)[0])
    assert is_close(found[1], found[0])


def test_meta_layers_give_meta_outputs() -> None:
    with torch.device("meta"):
        layer = ls.SlideAttention(8, 2, attn_drop=0.1)
        out = layer(torch.empty(2, 20, 8), (4, 5))
    assert (out.device.type, tuple(out.shape)) == ("meta", (2, 20, 8))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_path_computes_what_two_do(options: dict[str, Any]) -> None:
    layer, x = layer_of(dtype=torch.float32, **options), tokens_of(dtype=torch.float32)
    want = layer(x, (4, 5))
    layer.reparameterize()
    assert is_close(layer(x, (4, 5)), want, 1e-6)


def test_one_path_has_merged_parameters_only() -> None:
    layer = layer_of(share_kernel=False)
    assert not layer.reparameterized
    layer.reparameterize()
    assert layer.reparameterized
    assert {name for name, _ in layer.named_parameters() if name.startswith("dep")} == {
        *("dep_conv_merged.weight", "dep_conv_merged.bias"),
        *("dep_conv_merged2.weight", "dep_conv_merged2.bias"),
    }
    assert all(p.requires_grad and p.dtype == torch.float64 for p in layer.parameters())


def test_merging_twice_is_merging_once() -> None:
    layer = layer_of()
    layer.reparameterize()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.reparameterize()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merged_layer_trains_and_loads_its_own_state() -> None:
    layer, other = layer_of(), layer_of(seed=5)
    layer.reparameterize()
    other.reparameterize()
    other.load_state_dict(layer.state_dict())
    x = tokens_of()
    assert torch.equal(other(x, (4, 5)), layer(x, (4, 5)))
    other(x, (4, 5)).sum().backward()
    assert other.dep_conv_merged.weight.grad is not None


def test_copies_and_pickles_compute_the_same() -> None:
    layer, x = layer_of(share_kernel=False), tokens_of()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - it was just pickled
        assert torch.equal(other(x, (4, 5)), layer(x, (4, 5)))


def test_compiled_layer_is_one_graph() -> None:
    layer, x = layer_of(dtype=torch.float32, attn_drop=0.1), tokens_of(dtype=torch.float32)
    torch.compiler.reset()
    with without_type_checks():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert is_close(compiled(x, (4, 5)), layer(x, (4, 5)), FLOAT32_ROUNDING)
        compiled.train()(x, (4, 5)).sum().backward()
    assert layer.dep_conv1.weight.grad is not None


def test_exported_layer_is_made_of_ordinary_operations() -> None:
    layer, x = layer_of(dtype=torch.float32), tokens_of(dtype=torch.float32)
    with without_type_checks():
        program = torch.export.export(layer, (x, (4, 5)))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("conv" in target for target in targets)
    assert not any("leap_slide" in target for target in targets)
    assert is_close(program.module()(x, (4, 5)), layer(x, (4, 5)), FLOAT32_ROUNDING)


def test_representation_tells_layers_apart() -> None:
    assert "dim=8, num_heads=2, kernel_size=5, backend='conv'" in repr(layer_of(kernel_size=5, backend="conv"))


def test_depthwise_kernels_are_those_of_a_convolution() -> None:
    kernels, conv = DepthwiseKernels(4, 3), nn.Conv2d(4, 36, 3, groups=4, padding=1)
    conv.load_state_dict(kernels.state_dict())
    assert torch.equal(conv.weight, kernels.weight)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backend_of_the_process_is_that_of_the_layer(backend: str) -> None:
    layer, x = layer_of(), tokens_of()
    want = layer(x, (4, 5))
    with use(backend):
        assert is_close(layer(x, (4, 5)), want)


SWIN_STATE = {
    "qkv.weight": torch.zeros(24, 8),
    "qkv.bias": torch.zeros(24),
    "relative_position_bias_table": torch.zeros(169, 2),
    "proj.weight": torch.zeros(8, 8),
    "proj.bias": torch.zeros(8),
}


def merged(layer: ls.SlideAttention) -> ls.SlideAttention:
    layer.reparameterize()
    return layer


BAD_STATES: list[tuple[Callable[[], ls.SlideAttention], Callable[[], dict[str, Tensor]], str]] = [
    (
        layer_of,
        lambda: merged(layer_of()).state_dict(),
        "the layer: the weights have one path, this model two: call reparameterize(model), then load",
    ),
    (
        lambda: merged(layer_of()),
        lambda: layer_of().state_dict(),
        "the layer: the weights have two paths, this model one: load, then call reparameterize(model)",
    ),
    (layer_of, lambda: SWIN_STATE, "weights of window attention, whose qkv rows are ordered in another way: use leap_"),
    (
        layer_of,
        lambda: layer_of(kernel_size=5).state_dict(),
        "the weights have kernel_size 5, this model 3: create it so",
    ),
    (
        lambda: merged(layer_of()),
        lambda: merged(layer_of(kernel_size=5)).state_dict(),
        "the weights have kernel_size 5, this model 3",
    ),
]


@pytest.mark.parametrize(("build", "state", "message"), BAD_STATES, ids=[row[2][:50] for row in BAD_STATES])
def test_weights_of_another_form_are_refused(
    build: Callable[[], ls.SlideAttention], state: Callable[[], dict[str, Tensor]], message: str
) -> None:
    layer = build()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(UserError) as refused:
        layer.load_state_dict(state())
    assert message in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_place_of_a_misfit_in_a_model_is_named() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"attn": layer_of()})})
    state = {f"block.attn.{name}": value for name, value in layer_of(kernel_size=5).state_dict().items()}
    with pytest.raises(UserError, match=r"^block\.attn: the weights have kernel_size 5"):
        model.load_state_dict(state)


def test_fixed_path_that_is_no_plain_shift_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    layer, state = layer_of(), layer_of().state_dict()
    with caplog.at_level(logging.WARNING, "leap_slide"):
        layer.load_state_dict(state)
        assert not caplog.records
        layer.load_state_dict({**state, "dep_conv.weight": state["dep_conv.weight"] * 2})
    assert ["dep_conv.weight of these weights is not the plain shift" in r.getMessage() for r in caplog.records] == [
        True
    ]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": 2}, "kernel_size 2: expected an odd number of 1 or more, the paper takes 3"),
    ({"kernel_size": 0}, "kernel_size 0"),
    ({"kernel_size": -1}, "kernel_size -1"),
    ({"kernel_size": 3.0}, "kernel_size 3.0"),
    ({"kernel_size": True}, "kernel_size True"),
    ({"num_heads": 3}, "8 channels and 3 heads: the channels must be a multiple of the heads"),
    ({"num_heads": 0}, "8 channels and 0 heads"),
    ({"dim": 0}, "0 channels and 2 heads"),
    ({"dim_reduction": 3}, "8 channels: expected a multiple of heads times dim_reduction, 2 * 3"),
    ({"dim_reduction": 8}, "8 channels: expected a multiple of heads times dim_reduction, 2 * 8"),
    ({"dim_reduction": 0}, "2 * 0 (which must be 1 or more)"),
    ({"padding_mode": "reflection"}, "padding_mode 'reflection' is unknown: did you mean reflect"),
    ({"padding_mode": "circular", "mask_padding": True}, "mask_padding leaves the padding out, so padding_mode"),
    ({"backend": "gem"}, "backend 'gem' is unknown: did you mean gemm"),
    ({"rpb_on": "values"}, "rpb_on 'values': expected 'keys' (as in the paper's code) or 'logits'"),
    ({"attn_drop": 1.0}, "attn_drop 1.0: expected a rate from 0 to below 1"),
    ({"attn_drop": -0.1}, "attn_drop -0.1"),
    ({"proj_drop": 1.5}, "proj_drop 1.5: expected a rate from 0 to below 1"),
    ({"proj_drop": -1}, "proj_drop -1"),
    ({"qk_scale": float("nan")}, "qk_scale nan: expected a finite number"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[row[1][:40] for row in BAD])
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with without_type_checks(), pytest.raises(UserError) as refused:
        ls.SlideAttention(**{"dim": 8, "num_heads": 2, **options})
    assert message in str(refused.value)


BAD_INPUT: list[tuple[Tensor, Any, str]] = [
    (torch.zeros(1, 20, 8), None, "20 tokens are no map of 4x4: give hw=(height, width)"),
    (torch.zeros(1, 20, 8), (4, 4), "20 tokens are no map of 4x4"),
    (torch.zeros(1, 20, 8), (-4, -5), "20 tokens are no map of -4x-5"),
    (torch.zeros(1, 0, 8), (0, 5), "0 tokens are no map of 0x5"),
    (torch.zeros(1, 0, 8), None, "0 tokens are no map of 0x0"),
    (torch.zeros(1, 8, 0, 5), None, "0 tokens are no map of 0x5"),
    (torch.zeros(1, 20, 6), (4, 5), "input of shape (1, 20, 6) and type torch.float32: expected floating-point"),
    (torch.zeros(1, 4, 5, 8), None, "expected floating-point numbers of shape (batch, height * width, 8) or (batch, 8"),
    (torch.zeros(20, 8), (4, 5), "input of shape (20, 8)"),
    (torch.zeros(1, 1, 8, 4, 5), None, "input of shape (1, 1, 8, 4, 5)"),
    (torch.zeros(1, 20, 8, dtype=torch.int64), (4, 5), "type torch.int64: expected floating-point numbers"),
    (torch.zeros(1, 8, 4, 5), (5, 4), "is a map of 4x5, but hw is (5, 4): leave hw out"),
]


@pytest.mark.parametrize(("x", "hw", "message"), BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT])
def test_input_that_does_not_fit_is_refused(x: Tensor, hw: Any, message: str) -> None:
    layer = ls.SlideAttention(8, 2)
    with without_type_checks(), pytest.raises(UserError) as refused:
        layer(x, hw)
    assert message in str(refused.value)


@every_backend
def test_map_too_small_for_reflection_is_refused(backend: str) -> None:
    layer = layer_of(padding_mode="reflect", kernel_size=5, backend=backend)
    with pytest.raises(UserError, match="a map of 2x5 tokens is too small for padding_mode 'reflect' with a kernel"):
        layer(tokens_of(10), (2, 5))


def test_triton_that_cannot_run_is_refused_when_the_layer_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be made on one machine for another."""
    layer = layer_of(backend="triton")
    monkeypatch.setattr("leap_slide.functional.backends", lambda: {"triton": "no CUDA device"})
    with pytest.raises(UserError, match="backend='triton' cannot run here: no CUDA device"):
        layer(tokens_of(), (4, 5))
