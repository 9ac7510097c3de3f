"""The families: published sizes and costs, any image size, timm's interface, where which attention goes, bad input."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leap_flatten import (
    VARIANTS,
    CSWinFocusedLinearAttention,
    FlattenCSWin,
    FlattenDeiT,
    FlattenPVT,
    FlattenPVTv2,
    FlattenSwin,
    FocusedLinearAttention,
    create_model,
    load_official,
    save_safetensors,
)
from leap_flatten.attention import Focused
from leap_shared.errors import UserError
from leap_shared.vision.bodies import PVT, CSWin, PVTv2, Swin, SwinBlock
from leap_shared.vision.bodies.grids import to_tokens

FLOAT32_ROUNDING = 1e-5  # relative to the largest number
SMALL = {"depths": (2, 2, 2, 1), "num_classes": 5, "img_size": 64}
Make = Callable[..., Any]
Size = tuple[int, int]


def swin(**changes: Any) -> FlattenSwin:
    return FlattenSwin(**{"embed_dim": 8, "num_heads": (1, 2, 4, 8), **SMALL, **changes})


def pvt(**changes: Any) -> FlattenPVT:
    return FlattenPVT(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def pvt_v2(**changes: Any) -> FlattenPVTv2:
    return FlattenPVTv2(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def cswin(**changes: Any) -> FlattenCSWin:
    return FlattenCSWin(**{"embed_dim": 8, "num_heads": (2, 4, 8, 16), **SMALL, **changes})


def deit(**changes: Any) -> FlattenDeiT:
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5}
    return FlattenDeiT(**{**options, **changes})


PYRAMIDS: list[Make] = [swin, pvt, pvt_v2, cswin]
every_pyramid = pytest.mark.parametrize("make", PYRAMIDS)
every_family = pytest.mark.parametrize("make", [*PYRAMIDS, deit])


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """The model in evaluation mode with all parameters drawn anew, tables and scales too."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.2
    return model.eval()


def image_of(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def linear_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks with linear attention."""
    found = [name for name, module in model.named_modules() if isinstance(module, Focused)]
    return [name.partition(".attn")[0] for name in found]


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= FLOAT32_ROUNDING * want.abs().max())


@functools.cache
def on_meta(name: str) -> Any:
    """The variant without memory."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    assert sum(value.numel() for value in on_meta(name).parameters()) == VARIANTS[name].parameters


@pytest.mark.parametrize("name", [name for name in VARIANTS if "tiny" in name or name.endswith(("b0", "b1", "384"))])
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    """CSWin's are 0.2% fewer: one convolution does what two do there."""
    side = VARIANTS[name].image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(name)(torch.zeros(1, 3, side, side, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(VARIANTS[name].gmac, rel=2e-3)


@pytest.mark.parametrize("enabled", [False, True], ids=["inference", "training"])
def test_operators_cost_the_same_however_they_are_run(enabled: bool) -> None:
    """On a CPU, inference goes through the operator that projects too; on the meta device it does not.

    Every block is linear, as PyTorch 2.14 does not count softmax attention on a CPU.
    """
    model, counts = swin(attn_type="LLLL"), []
    for device in ("cpu", "meta"):
        model, image = model.to(device), image_of(64, 64).to(device)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(enabled):
            out = model(image)
            if enabled:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_timm_lists_all_variants() -> None:
    assert set(VARIANTS) == set(timm.list_models("flatten_*"))


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_knows_size_and_preprocessing_of_each_variant(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    side = 384 if name.endswith("384") else 224
    assert config.input_size == (3, side, side)
    assert VARIANTS[name].image_size == side
    assert config.interpolation == "bicubic"
    assert (config.num_classes, config.classifier) == (1000, "head")


@pytest.mark.parametrize("name", ["flatten_swin_base_384", "flatten_cswin_base_384"])
def test_variants_for_384_are_built_for_384(name: str) -> None:
    assert on_meta(name).img_size == (384, 384)
    assert on_meta(name).pretrained_cfg["input_size"] == (3, 384, 384)


def test_windows_and_stripes_at_384_are_those_of_the_paper() -> None:
    swin_384, cswin_384 = (on_meta(f"flatten_{one}_base_384") for one in ("swin", "cswin"))
    assert [module.window for module in swin_384.layers[2].blocks] == [12] * 18
    assert [module.grid for module in swin_384.modules() if isinstance(module, Focused)] == [(96, 96)] * 2 + [
        (48, 48)
    ] * 2
    assert cswin_384.stage3[0]._stripes((24, 24))[0] == [(24, 12), (12, 24)]
    assert [len(stage[0].attns) for stage in (cswin_384.stage1, cswin_384.stage2, cswin_384.stage4)] == [1, 1, 1]


@pytest.mark.parametrize(("window", "softmax"), [(None, 7), (7, 7), (56, 7), (57, 12), (96, 12)])
def test_softmax_windows_follow_the_linear_ones(window: int | None, softmax: int) -> None:
    with torch.device("meta"):
        model = FlattenSwin(window_size=window, img_size=384)
    assert model.softmax_window == softmax


@every_family
@pytest.mark.parametrize("size", [(192, 192), (224, 256), (320, 512)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_family_takes_every_size(make: Make, size: Size) -> None:
    model = make(img_size=size).eval()
    with torch.no_grad():
        out = model(image_of(*size))
    assert out.shape == (1, 5)
    assert out.isfinite().all()


@every_family
@settings(max_examples=4)
@given(height=st.integers(1, 5), width=st.integers(1, 5))
def test_three_ways_to_another_size_give_the_same_logits(
    make: Make, tmp_path_factory: pytest.TempPathFactory, height: int, width: int
) -> None:
    """A call with dynamic_img_size, set_input_size, and loading into a model built there."""
    size = (32 * height, 32 * width)
    model, built = drawn(make(img_size=96, dynamic_img_size=True)), make(img_size=size).eval()
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_safetensors(model, path)
    load_official(built, path, resize=True)
    image = image_of(*size)
    with torch.no_grad():
        dynamic, loaded = model(image), built(image)
        model.set_input_size(size)
        fixed = model(image)
    assert close(dynamic, fixed)
    assert close(loaded, fixed)


@every_family
def test_changing_the_size_keeps_the_parameters_that_an_optimiser_holds(make: Make) -> None:
    model = make()
    before = dict(model.named_parameters())
    model.set_input_size((96, 128))
    assert all(value is before[name] for name, value in model.named_parameters())
    assert model.img_size == (96, 128)


@every_pyramid
def test_pyramid_has_strides_4_to_32(make: Make) -> None:
    name = f"flatten_{make.__name__}_{'b0' if make is pvt_v2 else 'tiny'}"
    options = make(depths=(1, 1, 1, 1))
    sizes = {"embed_dims": options.dims} if make in (pvt, pvt_v2) else {"embed_dim": 8}
    heads = {} if make in (pvt, pvt_v2) else {"num_heads": (2, 4, 8, 16)}
    pyramid = timm.create_model(name, features_only=True, depths=(1, 1, 1, 1), img_size=64, **sizes, **heads)
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    assert tuple(pyramid.feature_info.channels()) == options.dims
    maps = pyramid(image_of(96, 64))  # any size: pyramids are dynamic
    want = [(1, dim, 96 // stride, 64 // stride) for dim, stride in zip(options.dims, (4, 8, 16, 32), strict=True)]
    assert [tuple(one.shape) for one in maps] == want


def test_deit_gives_maps_of_one_stride() -> None:
    options = {"embed_dim": 16, "num_heads": 2, "img_size": 64}
    pyramid = timm.create_model("flatten_deit_tiny", features_only=True, **options)
    assert pyramid.feature_info.reduction() == [16] * 4
    assert [tuple(one.shape) for one in pyramid(image_of(64, 96))] == [(1, 16, 4, 6)] * 4


@every_family
def test_intermediates_are_maps_of_the_last_blocks(make: Make) -> None:
    model = drawn(make())
    image, seen = image_of(64, 64), []
    blocks = model.get_submodule(model.feature_info[1]["module"])
    last = blocks if make is deit else blocks[-1]
    last.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(image, indices=(1,))
        want = seen[0][:, 1:] if make is deit else seen[0]
        if make is pvt_v2:
            want = model.norm2(want)
        assert torch.equal(to_tokens(maps[0]), want)
        assert torch.equal(tokens, model.forward_features(image))


@every_family
def test_norm_of_intermediates_is_the_final_one(make: Make) -> None:
    model = drawn(make())
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(image_of(64, 64), norm=True)
    assert torch.equal(to_tokens(maps[-1]), tokens[:, 1:] if make is deit else tokens)


@every_family
def test_intermediates_may_stop_early_and_come_alone(make: Make) -> None:
    model = drawn(make())
    maps = model.forward_intermediates(image_of(64, 64), indices=[0], stop_early=True, intermediates_only=True)
    assert len(maps) == 1


@every_family
def test_head_pools_and_classifies(make: Make) -> None:
    model = drawn(make())
    image = image_of(64, 64, batch=2)
    with torch.no_grad():
        tokens = model.forward_features(image)
        pooled = model.forward_head(tokens, pre_logits=True)
        assert torch.equal(pooled, tokens[:, 0] if make is deit else tokens.mean(1))
        assert torch.equal(model.get_classifier()(pooled), model(image))


@every_family
def test_classifier_is_replaced_or_left_out(make: Make) -> None:
    model = drawn(make())
    image = image_of(64, 64, batch=2)
    model.reset_classifier(10)
    assert model(image).shape == (2, 10)
    assert model.get_classifier().out_features == model.num_classes == 10
    model.reset_classifier(0)
    assert torch.equal(model(image), model.forward_head(model.forward_features(image), pre_logits=True))
    model.reset_classifier(0, "")
    assert torch.equal(model(image), model.forward_features(image))
    assert make(num_classes=0)(image).shape == (2, model.num_features)


def test_deit_may_pool_its_patches() -> None:
    model = drawn(deit(global_pool="avg"))
    tokens = model.forward_features(image_of(64, 64))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))


@every_family
def test_images_of_other_numbers_of_channels_are_taken(make: Make) -> None:
    model = make(in_chans=5)
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 5)
    assert model.get_parameter(f"{model.first_conv}.weight").shape[1] == 5


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(make: Make) -> None:
    model = drawn(make()).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image_of(64, 64)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@every_family
def test_every_parameter_that_trains_gets_a_gradient(make: Make) -> None:
    model = drawn(make()).train()
    model(image_of(64, 64, batch=2)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_final_norm_of_pvt_is_frozen_kept_and_never_applied() -> None:
    model = drawn(pvt())
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert names == ["norm.weight", "norm.bias"]
    assert "norm.weight" in model.state_dict()
    before = model(image_of(64, 64))
    model.norm.weight.data.fill_(7)
    assert torch.equal(model(image_of(64, 64)), before)


@every_family
def test_stochastic_depth_grows_linearly_over_all_blocks(make: Make) -> None:
    model = make(drop_path_rate=0.6)
    rates = [getattr(m.drop_path2, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path2")]
    assert rates == pytest.approx(torch.linspace(0, 0.6, len(rates)).tolist())
    assert isinstance(next(m for m in model.modules() if hasattr(m, "drop_path1")).drop_path1, nn.Identity)


@every_pyramid
@pytest.mark.parametrize(
    ("attn_type", "linear"),
    [
        ("LLSS", (2, 2, 0, 0)),
        ("SSSS", (0, 0, 0, 0)),
        ("LLLL", (2, 2, 2, 1)),
        ("LLMS1", (2, 2, 1, 0)),
        ("MSMS1", (1, 0, 1, 0)),
        ("SSML2", (0, 0, 2, 1)),
    ],
)
def test_letters_say_which_blocks_are_linear(make: Make, attn_type: str, linear: tuple[int, ...]) -> None:
    model = make(attn_type=attn_type)
    stages = [facts["module"] for facts in model.feature_info]
    blocks = linear_blocks(model)
    assert tuple(len({b for b in blocks if b.startswith(f"{stage}.")}) for stage in stages) == linear
    leading = [f"{stage}.{i}" for stage, count in zip(stages, linear, strict=True) for i in range(count)]
    assert sorted(set(blocks)) == sorted(leading)
    assert model(image_of(64, 64)).isfinite().all()


def test_all_blocks_of_deit_are_linear() -> None:
    assert linear_blocks(deit()) == ["blocks.0", "blocks.1"]


SOFTMAX: list[tuple[Make, Callable[[], nn.Module]]] = [
    (swin, lambda: Swin(embed_dim=8, num_heads=(1, 2, 4, 8), **SMALL)),
    (pvt, lambda: PVT(embed_dims=(8, 16, 20, 32), mlp_ratios=(2, 2, 2, 2), **SMALL)),
    (pvt_v2, lambda: PVTv2(embed_dims=(8, 16, 20, 32), mlp_ratios=(2, 2, 2, 2), **SMALL)),
    (cswin, lambda: CSWin(embed_dim=8, num_heads=(2, 4, 8, 16), **SMALL)),
]


@pytest.mark.parametrize(("make", "body"), SOFTMAX)
def test_softmax_everywhere_is_the_body_itself(make: Make, body: Callable[[], nn.Module]) -> None:
    ours, plain = make(attn_type="SSSS"), drawn(body())
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.eval()(image_of(64, 64)), plain(image_of(64, 64)))


@every_family
@pytest.mark.parametrize(
    ("option", "value", "attribute"),
    [("focusing_factor", 4, "focusing_factor"), ("denominator", "sum", "denominator")],
)
def test_options_of_the_attention_reach_every_layer(make: Make, option: str, value: Any, attribute: str) -> None:
    layers = [module for module in make(**{option: value}).modules() if isinstance(module, Focused)]
    assert layers
    assert {getattr(layer, attribute) for layer in layers} == {value}


@every_family
def test_kernel_size_reaches_every_layer(make: Make) -> None:
    layers = [module for module in make(kernel_size=3).modules() if isinstance(module, Focused)]
    assert {tuple(layer.dwc.kernel_size) for layer in layers} == {(3, 3)}


@every_family
def test_denominators_give_other_logits(make: Make) -> None:
    mean, total = drawn(make()), drawn(make(denominator="sum"))
    with torch.no_grad():
        assert not torch.equal(mean(image_of(64, 64)), total(image_of(64, 64)))


def test_linear_windows_smaller_than_the_map_shift_in_odd_blocks_without_a_mask() -> None:
    model = drawn(swin(window_size=4))
    even, odd = model.layers[0].blocks
    x, hw = torch.randn(2, 256, 8, generator=torch.Generator().manual_seed(0)), (16, 16)

    def by_hand(block: SwinBlock, shift: int) -> Tensor:
        rolled = x.unflatten(1, hw).roll((-shift, -shift), (1, 2))
        windows = rolled.unflatten(2, (4, 4)).unflatten(1, (4, 4)).transpose(2, 3).reshape(-1, 16, 8)
        out = block.attn(windows, (4, 4)).reshape(2, 4, 4, 4, 4, 8).transpose(2, 3).reshape(2, 16, 16, 8)
        return out.roll((shift, shift), (1, 2)).flatten(1, 2)

    with torch.no_grad():
        assert close(even.attend(x, hw), by_hand(even, 0))
        assert close(odd.attend(x, hw), by_hand(odd, 2))
    assert odd.attn_mask is None
    assert odd.attn.grid == (4, 4)


def test_linear_window_that_covers_the_shorter_side_does_not_shift() -> None:
    model = swin(window_size=16, img_size=(64, 128))
    assert [block._windows((16, 32))[:2] for block in model.layers[0].blocks] == [((16, 16), 0)] * 2


def test_linear_stages_without_a_window_cover_every_map() -> None:
    model = swin(img_size=(64, 96))
    assert model.layers[0].blocks[1].attn.grid == (16, 24)
    model.set_input_size((96, 64))
    assert model.layers[0].blocks[1].attn.grid == (24, 16)


def test_stripes_of_linear_cswin_blocks_have_their_own_keys() -> None:
    """Half the channels in columns and half in rows; nothing passes between stripes."""
    model = drawn(cswin(attn_type="LSSS", la_split_size="4-2-2-2")).double()
    block = model.stage1[0]
    assert [attn.grid for attn in block.attns] == [(16, 4), (4, 16)]
    assert all(isinstance(attn, CSWinFocusedLinearAttention) for attn in block.attns)
    x = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = x.clone()
    changed[0, 5 * 16 + 6] += 1  # row 5, column 6: second stripe each way
    block.proj = nn.Identity()
    with torch.no_grad():
        moved = (block.attend(x, (16, 16)) != block.attend(changed, (16, 16)))[0].unflatten(0, (16, 16))
    columns, rows = moved[..., :4].any(-1), moved[..., 4:].any(-1)
    assert columns[:, 4:8].float().mean() > 0.9  # a query without a positive channel sees no keys
    assert not columns[:, :4].any()
    assert not columns[:, 8:].any()
    assert rows[4:8].float().mean() > 0.9
    assert not rows[:4].any()
    assert not rows[8:].any()


def test_stripes_equal_the_layer_on_each_stripe() -> None:
    model = drawn(cswin(attn_type="LSSS", la_split_size="4-2-2-2"))
    block = model.stage1[0]
    block.proj = nn.Identity()
    x = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = block.attend(x, (16, 16)).unflatten(1, (16, 16))
        qkv = block.qkv(x).unflatten(2, (3, 8)).movedim(2, 0).unflatten(2, (16, 16))
        column = qkv[..., 4:8, :4].flatten(2, 3)
        row = qkv[:, :, 4:8, :, 4:].flatten(2, 3)
        assert close(out[0, :, 4:8, :4].flatten(0, 1), block.attns[0](column, (16, 4))[0])
        assert close(out[0, 4:8, :, 4:].flatten(0, 1), block.attns[1](row, (4, 16))[0])


def test_stripes_that_cover_the_map_are_one_branch() -> None:
    model = cswin(la_split_size="16-8-4-2", attn_type="LLLL")
    assert [len(block.attns) for block in (model.stage1[0], model.stage2[0], model.stage3[0])] == [1, 1, 1]


def test_reductions_of_linear_pvt_blocks_are_their_own() -> None:
    model = pvt(la_sr_ratios="4211", attn_type="LLSS")
    assert [getattr(model, f"block{stage}")[0].attn.sr_ratio for stage in (1, 2, 3, 4)] == [4, 2, 2, 1]
    assert model.block1[0].attn.grid == (4, 4)


def deviation(values: Tensor) -> float:
    return float(values.detach().std())


@pytest.mark.parametrize("make", [swin, pvt, cswin, deit])
def test_depthwise_kernels_start_uniform(make: Make) -> None:
    layers = [module for module in make(**wide(make)).modules() if isinstance(module, Focused)]
    weights = torch.cat([layer.dwc.weight.flatten() for layer in layers])
    assert 0.199 < weights.abs().max() <= 0.2
    assert deviation(weights) == pytest.approx(0.2 / math.sqrt(3), rel=0.05)


def wide(make: Make) -> dict[str, Any]:
    """Sizes with enough numbers for statistics."""
    torch.manual_seed(0)
    return {"embed_dim": 64} if make in (swin, cswin, deit) else {"embed_dims": (64, 64, 80, 64)}


def test_depthwise_kernels_of_pvt_v2_start_normal() -> None:
    model = pvt_v2(**wide(pvt_v2))
    weights = torch.cat([module.dwc.weight.flatten() for module in model.modules() if isinstance(module, Focused)])
    assert deviation(weights) == pytest.approx(math.sqrt(2 / 25), rel=0.05)
    assert all((module.dwc.bias == 0).all() for module in model.modules() if isinstance(module, Focused))


@every_family
def test_tables_and_linear_layers_start_as_published(make: Make) -> None:
    model = make(**wide(make))
    for name, value in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("scale", "positional_encoding"):
            assert not value.any(), name
        elif leaf.startswith("pos_embed") or leaf == "relative_position_bias_table":
            assert deviation(value) == pytest.approx(0.02, rel=0.25), name
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert deviation(torch.cat([module.weight.flatten() for module in linears])) == pytest.approx(0.02, rel=0.02)
    assert not any(module.bias.any() for module in linears if module.bias is not None)


UNDECAYED = {
    swin: {
        f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table" for stage, block in ((2, 0), (2, 1), (3, 0))
    },
    pvt: set(),
    pvt_v2: set(),
    cswin: set(),
    deit: {"pos_embed", "cls_token"},
}


@every_family
def test_tables_without_weight_decay_are_named(make: Make) -> None:
    assert make().no_weight_decay() == UNDECAYED[make]


def test_absolute_embedding_of_swin_is_not_decayed() -> None:
    assert "absolute_pos_embed" in swin(ape=True).no_weight_decay()


@every_family
def test_layer_wise_learning_rates_fall_from_head_to_stem(make: Make) -> None:
    model = make()
    optimiser = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimiser.param_groups for p in group["params"]}
    blocks = [module for module in model.modules() if hasattr(module, "drop_path2")]
    by_block = [{scale[id(p)] for p in block.parameters()} for block in blocks]
    assert all(len(scales) == 1 for scales in by_block)
    assert [max(s) for s in by_block] == sorted({max(s) for s in by_block})
    assert min(scale.values()) == scale[id(model.get_parameter(f"{model.first_conv}.weight"))]


@every_family
def test_copies_are_independent(make: Make) -> None:
    model = drawn(make())
    other = copy.deepcopy(model)
    other.set_input_size(96)
    assert model(image_of(64, 64)).isfinite().all()
    assert other(image_of(96, 96)).isfinite().all()


def test_class_token_of_deit_sees_the_patches_and_is_not_convolved() -> None:
    layer = drawn(deit()).blocks[0].attn
    assert isinstance(layer, FocusedLinearAttention)
    assert layer.prefix_tokens == 1
    assert layer.positional_encoding.shape[1] == 17


BAD_MODELS = [
    (lambda: swin(img_size=(225, 224)), "225x224: height and width must be multiples of 32"),
    (lambda: swin(img_size=16), "16x16: height and width must be multiples of 32"),
    (
        lambda: cswin(img_size=(64, 100)),
        "64x100: height and width must be multiples of 32: resize or pad, say to 64x96",
    ),
    (lambda: deit(img_size=60), "60x60: height and width must be multiples of the patches' 16"),
    (lambda: swin(attn_type="LLS"), "attn_type 'LLS': expected 4 letters out of L, S and M"),
    (lambda: pvt(attn_type="LLSX"), "attn_type 'LLSX'"),
    (lambda: pvt_v2(attn_type="llss"), "attn_type 'llss'"),
    (lambda: cswin(attn_type="LLMS"), "the number of leading L blocks of the M stages, as in LLMS2"),
    (lambda: swin(attn_type="LLSS2"), "attn_type 'LLSS2'"),
    (lambda: pvt(la_sr_ratios="211"), "la_sr_ratios '211': expected four digits above 0, one per stage, as in '2111'"),
    (lambda: pvt_v2(la_sr_ratios="21111"), "la_sr_ratios '21111'"),
    (lambda: pvt(la_sr_ratios="0111"), "la_sr_ratios '0111'"),
    (lambda: pvt(la_sr_ratios="3111"), "a map of 16x16 tokens is not divisible by the spatial reduction ratio 3"),
    (lambda: cswin(la_split_size="56-28-14"), "la_split_size '56-28-14': expected four widths joined by dashes"),
    (lambda: cswin(la_split_size="0-28-14-7"), "la_split_size '0-28-14-7'"),
    (lambda: swin(num_heads=(3, 2, 4, 8)), "stage 1: 8 channels and 3 heads: the channels must be a multiple"),
    (lambda: deit(num_heads=3), "16 channels and 3 heads"),
    (lambda: swin(window_size=0), "window size 0: expected 1 or more tokens"),
    (lambda: swin(focusing_factor=0), "focusing_factor 0: expected a number above 0"),
    (lambda: pvt(kernel_size=2), "kernel_size 2: expected an odd number"),
    (lambda: cswin(denominator="median"), "denominator 'median'"),
    (lambda: deit(global_pool="max"), "global_pool 'max': expected >= 0, and 'token', 'avg' or ''"),
    (lambda: create_model("flatten_pvt_tyni"), "model 'flatten_pvt_tyni' is unknown: did you mean flatten_pvt_tiny"),
]


@pytest.mark.parametrize(("build", "message"), BAD_MODELS, ids=[row[1][:40] for row in BAD_MODELS])
def test_configuration_that_does_not_fit_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        build()
    assert message in str(refused.value)


BAD_IMAGES = [
    (torch.zeros(1, 3, 96, 64), "image of 96x64 pixels, but the model is set to 64x64: call set_input_size((96, 64))"),
    (torch.zeros(1, 3, 65, 64), "65x64: height and width must be multiples of"),
    (torch.zeros(1, 4, 64, 64), "expected floating-point numbers of shape (batch, 3, height, width)"),
    (torch.zeros(3, 64, 64), "image of shape (3, 64, 64)"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "type torch.uint8: expected floating-point numbers"),
    (torch.full((1, 3, 64, 64), float("nan")), "image of shape (1, 3, 64, 64) holds NaN or infinity"),
]


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES, ids=[row[1][:40] for row in BAD_IMAGES])
@every_family
def test_image_that_does_not_fit_is_refused(make: Make, image: Tensor, message: str) -> None:
    for model in (make(), make().eval()):
        with pytest.raises(UserError) as refused:
            model(image)
        assert message in str(refused.value)


@every_family
def test_size_that_no_model_has_is_refused_when_it_is_set(make: Make) -> None:
    with pytest.raises(UserError, match="100x64: height and width must be multiples of"):
        make().set_input_size((100, 64))


def test_size_that_the_reduction_does_not_divide_is_refused_when_it_is_called() -> None:
    model = pvt(la_sr_ratios="1113", img_size=96, dynamic_img_size=True)
    with pytest.raises(UserError, match="2x2 tokens is not divisible by the spatial reduction ratio 3"):
        model(image_of(64, 64))


@every_family
def test_output_format_other_than_nchw_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="only 'NCHW' is offered"):
        make().forward_intermediates(image_of(64, 64), output_fmt="NLC")
