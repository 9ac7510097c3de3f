"""The families: published sizes and costs, any image size, timm's interface, where which attention goes, bad input."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import leap_slide as ls
from leap_shared.errors import UserError
from leap_shared.testing.operators import without_type_checks
from leap_shared.vision.bodies import PVT, CSWin, PVTv2, Swin, SwinBlock
from leap_shared.vision.bodies.grids import to_tokens

FLOAT32_ROUNDING = 1e-5  # relative to the largest number
SMALL = {"depths": (2, 2, 2, 1), "num_classes": 5, "img_size": 64}
Make = Callable[..., Any]
Size = tuple[int, int]


def swin(**changes: Any) -> ls.SlideSwin:
    return ls.SlideSwin(**{"embed_dim": 8, "num_heads": (1, 2, 4, 8), **SMALL, **changes})


def pvt(**changes: Any) -> ls.SlidePVT:
    return ls.SlidePVT(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def pvt_v2(**changes: Any) -> ls.SlidePVTv2:
    return ls.SlidePVTv2(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def cswin(**changes: Any) -> ls.SlideCSWin:
    return ls.SlideCSWin(**{"embed_dim": 8, "num_heads": (2, 4, 8, 16), **SMALL, **changes})


def nat(**changes: Any) -> ls.SlideNAT:
    return ls.SlideNAT(**{"embed_dim": 8, "num_heads": (1, 2, 4, 8), **SMALL, **changes})


FAMILIES: list[Make] = [swin, pvt, pvt_v2, cswin, nat]
every_family = pytest.mark.parametrize("make", FAMILIES)


@every_family
def test_empty_batch_gives_no_logits(make: Make) -> None:
    with torch.no_grad():
        assert make()(torch.zeros(0, 3, 64, 64)).shape == (0, 5)


# Parameters with frozen kernels, and 1e9 multiply-adds with merged kernels (the specification's table of variants).
COUNTED = {
    "slide_swin_tiny": (28_348_834, 4.68),
    "slide_swin_tiny_w7": (28_308_514, 4.55),
    "slide_swin_small": (49_747_378, 9.20),
    "slide_swin_small_w7": (49_626_418, 8.80),
    "slide_swin_base": (87_948_704, 16.04),
    "slide_swin_base_w7": (87_787_424, 15.51),
    "slide_pvt_tiny": (12_224_670, 2.01),
    "slide_pvt_small": (22_728_459, 3.95),
    "slide_pvt_medium": (42_450_699, 6.80),
    "slide_pvt_v2_b1": (13_005_406, 2.19),
    "slide_pvt_v2_b2": (23_606_475, 4.17),
}
# Millions of parameters and 1e9 multiply-adds as published, of variants without published code.
PUBLISHED = {
    "slide_cswin_small": (35, 6.9),
    "slide_cswin_base": (78, 15.0),
    "slide_nat_tiny": (28, 4.3),
    "slide_nat_small": (51, 7.8),
    "slide_pvt_v2_b3": (None, 7.1),
    "slide_pvt_v2_b4": (None, 10.3),
    "slide_nat_mini": (None, 2.7),
}
UNCOUNTED = {"slide_cswin_tiny"}


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """The model in evaluation mode with all trained parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        if value.requires_grad:
            value.data = torch.randn(value.shape, generator=generator) * 0.2
    return model.eval()


def image_of(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def slide_layers(model: nn.Module) -> dict[str, ls.SlideAttention]:
    """Slide attention by the names of their blocks."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ls.SlideAttention)}
    return {name.removesuffix(".attn"): module for name, module in found.items()}


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= FLOAT32_ROUNDING * want.abs().max())


@functools.cache
def on_meta(name: str) -> Any:
    """The variant without memory."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def gmac_of(name: str) -> float:
    """1e9 multiply-adds of one image of 224 pixels."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(name)(torch.zeros(1, 3, 224, 224, device="meta"))
    return float(counter.get_total_flops()) / 2e9


def test_timm_lists_all_variants() -> None:
    assert set(timm.list_models("slide_*")) == {*COUNTED, *PUBLISHED, *UNCOUNTED}


@pytest.mark.parametrize("name", COUNTED)
def test_number_of_parameters_is_the_counted_one(name: str) -> None:
    assert sum(value.numel() for value in on_meta(name).parameters()) == COUNTED[name][0]


@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_are_the_counted_ones(name: str) -> None:
    assert gmac_of(name) == pytest.approx(COUNTED[name][1], abs=0.006)


@pytest.mark.parametrize("name", ["slide_swin_tiny", "slide_swin_base"])
def test_frozen_kernels_of_swin_are_counted_and_not_trained(name: str) -> None:
    frozen = [value.numel() for value in on_meta(name).parameters() if not value.requires_grad]
    assert sum(frozen) == 10_368
    assert len(frozen) == 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_derived_variants_have_about_the_published_sizes(name: str) -> None:
    """Furthest off are CSWin-B's parameters, 6% fewer, and NAT-T's operations, 5% more for keys that are masked."""
    millions, gmac = PUBLISHED[name]
    count = sum(value.numel() for value in on_meta(name).parameters()) / 1e6
    assert millions is None or count == pytest.approx(millions, rel=0.07)
    assert gmac_of(name) == pytest.approx(gmac, rel=0.07)


@pytest.mark.parametrize("name", [*COUNTED, *PUBLISHED, *UNCOUNTED])
def test_timm_knows_size_and_preprocessing_of_each_variant(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    assert config.input_size == (3, 224, 224)
    assert config.interpolation == "bicubic"
    assert (config.num_classes, config.classifier) == (1000, "head")
    assert isinstance(on_meta(name).get_submodule(config.first_conv), nn.Conv2d)


@pytest.mark.parametrize("enabled", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("make", [swin, pvt, pvt_v2])
def test_operators_cost_the_same_on_every_device(make: Make, enabled: bool) -> None:
    """On a CPU projections go another way; no stage has softmax attention, which PyTorch does not count there."""
    model, counts = make(num_slide_stages=4), []
    for device in ("cpu", "meta"):
        model, image = model.to(device), image_of(64, 64).to(device)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(enabled):
            out = model(image)
            if enabled:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@every_family
@pytest.mark.parametrize("number", range(5))
def test_first_stages_have_slide_attention_in_every_block(make: Make, number: int) -> None:
    model = make(num_slide_stages=number)
    stages = [facts["module"] for facts in model.feature_info]
    depths = (2, 2, 2, 1)
    want = [f"{stage}.{block}" for stage, depth in zip(stages[:number], depths, strict=False) for block in range(depth)]
    assert list(slide_layers(model)) == want
    assert model.eval()(image_of(64, 64)).isfinite().all()


SOFTMAX: list[tuple[Make, Callable[[], nn.Module]]] = [
    (swin, lambda: Swin(embed_dim=8, num_heads=(1, 2, 4, 8), softmax_window=56, **SMALL)),
    (pvt, lambda: PVT(embed_dims=(8, 16, 20, 32), mlp_ratios=(2, 2, 2, 2), **SMALL)),
    (pvt_v2, lambda: PVTv2(embed_dims=(8, 16, 20, 32), mlp_ratios=(2, 2, 2, 2), **SMALL)),
    (cswin, lambda: CSWin(embed_dim=8, num_heads=(2, 4, 8, 16), **SMALL)),
]


@pytest.mark.parametrize(("make", "body"), SOFTMAX)
def test_no_slide_stage_is_the_body_itself(make: Make, body: Callable[[], nn.Module]) -> None:
    ours, plain = make(num_slide_stages=0), drawn(body())
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.eval()(image_of(64, 64)), plain(image_of(64, 64)))


@every_family
@pytest.mark.parametrize("side", [1, 5, 7])
def test_kernel_size_reaches_every_layer(make: Make, side: int) -> None:
    model = make(kernel_size=side)
    assert {layer.kernel_size for layer in slide_layers(model).values()} == {side}
    assert model(image_of(64, 64)).isfinite().all()


@every_family
def test_options_reach_every_layer(make: Make) -> None:
    options = {"padding_mode": "replicate", "single_bias": True, "dim_reduction": 2, "backend": "conv"}
    model = make(slide_options=options, num_heads=(1, 2, 2, 2), qkv_bias=False, attn_drop_rate=0.25)
    layers = list(slide_layers(model).values())
    assert layers
    for layer in layers:
        assert (layer.padding_mode, layer.single_bias, layer.dim_reduction, layer.backend) == tuple(options.values())
        assert layer.qkv.bias is None
        assert layer.attn_drop == 0.25


@every_family
def test_every_backend_gives_the_same_logits(make: Make) -> None:
    state, image, found = drawn(make()).state_dict(), image_of(64, 64), []
    for backend in ("auto", "conv", "gemm"):
        model = make(slide_options={"backend": backend}).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            found.append(model(image))
    assert close(found[1], found[0])
    assert close(found[2], found[0])


@every_family
@pytest.mark.parametrize("size", [(32, 32), (96, 64), (64, 160)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_family_takes_every_size(make: Make, size: Size) -> None:
    with torch.no_grad():
        out = drawn(make(img_size=size))(image_of(*size))
    assert out.shape == (1, 5)
    assert out.isfinite().all()


@every_family
@settings(max_examples=4)
@given(height=st.integers(1, 5), width=st.integers(1, 5))
def test_two_ways_to_another_size_give_the_same_logits(make: Make, height: int, width: int) -> None:
    size = (32 * height, 32 * width)
    model = drawn(make(img_size=96, dynamic_img_size=True))
    with torch.no_grad():
        dynamic = model(image_of(*size))
        model.set_input_size(size)
        assert close(dynamic, model(image_of(*size)))
    assert model.img_size == size


@every_family
def test_changing_the_size_keeps_the_parameters_that_an_optimiser_holds(make: Make) -> None:
    model = make()
    before = dict(model.named_parameters())
    model.set_input_size((96, 128))
    assert all(value is before[name] for name, value in model.named_parameters())


SIZES: dict[Make, dict[str, Any]] = {
    swin: {"embed_dim": 8, "num_heads": (1, 2, 4, 8)},
    pvt: {"embed_dims": (8, 16, 20, 32)},
    pvt_v2: {"embed_dims": (8, 16, 20, 32)},
    cswin: {"embed_dim": 8, "num_heads": (2, 4, 8, 16)},
    nat: {"embed_dim": 8, "num_heads": (1, 2, 4, 8)},
}


@every_family
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 160)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_pyramid_has_strides_4_to_32_at_every_size(make: Make, size: Size) -> None:
    name = f"slide_{make.__name__}_{'b1' if make is pvt_v2 else 'tiny'}"
    pyramid = timm.create_model(name, features_only=True, depths=(1, 1, 1, 1), img_size=64, **SIZES[make])
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    channels = pyramid.feature_info.channels()
    with torch.no_grad():
        maps = pyramid(image_of(*size))
    want = [
        (1, dim, size[0] // stride, size[1] // stride) for dim, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert [tuple(one.shape) for one in maps] == want
    assert tuple(channels) == make().dims


@every_family
@pytest.mark.parametrize("stage", range(4))
def test_features_are_maps_of_the_last_blocks(make: Make, stage: int) -> None:
    """Before Swin's merging, and after the norm that closes a stage of PVTv2."""
    model, seen = drawn(make(img_size=(64, 96))), []
    model.get_submodule(model.feature_info[stage]["module"])[-1].register_forward_hook(
        lambda *args: seen.append(args[2])
    )
    with torch.no_grad():
        _, maps = model.forward_intermediates(image_of(64, 96), indices=(stage,))
        want = getattr(model, f"norm{stage + 1}")(seen[0]) if make is pvt_v2 else seen[0]
        assert torch.equal(to_tokens(maps[0]), want)


@every_family
def test_head_pools_and_classifies(make: Make) -> None:
    model, image = drawn(make()), image_of(64, 64, batch=2)
    with torch.no_grad():
        tokens = model.forward_features(image)
        pooled = model.forward_head(tokens, pre_logits=True)
        assert torch.equal(pooled, tokens.mean(1))
        assert torch.equal(model(image), model.head(pooled))
        model.reset_classifier(3)
        assert model(image).shape == (2, 3)
        model.reset_classifier(0)
        assert torch.equal(model(image), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(image), tokens)


@every_family
def test_no_classes_give_pooled_features(make: Make) -> None:
    model = make(num_classes=0).eval()
    assert model(image_of(64, 64)).shape == (1, model.num_features)


@every_family
def test_images_may_have_other_channels(make: Make) -> None:
    model = make(in_chans=4).eval()
    assert model(torch.zeros(1, 4, 64, 64)).shape == (1, 5)
    assert model.get_submodule(model.first_conv).in_channels == 4


@every_family
def test_timm_creates_models_of_other_sizes(make: Make) -> None:
    name = f"slide_{make.__name__}_{'b1' if make is pvt_v2 else 'tiny'}"
    options = {"depths": (1, 1, 1, 1), "img_size": 64, "in_chans": 1, "num_classes": 2, **SIZES[make]}
    model = timm.create_model(name, kernel_size=5, num_slide_stages=1, **options).eval()
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 2)
    assert [layer.kernel_size for layer in slide_layers(model).values()] == [5]


@every_family
def test_recomputing_blocks_gives_the_same_gradients(make: Make) -> None:
    model, found = drawn(make(attn_drop_rate=0.2)).train(), []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(image_of(64, 64)).square().sum().backward()
        found.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(close(found[1][name], found[0][name]) for name in found[0])


@every_family
def test_every_trained_parameter_gets_a_gradient(make: Make) -> None:
    """So that training in parallel needs no search for unused ones."""
    model = drawn(make()).train()
    model(image_of(64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_family
def test_stochastic_depth_grows_linearly_over_all_blocks(make: Make) -> None:
    model = make(drop_path_rate=0.6)
    rates = [getattr(m.drop_path2, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path2")]
    assert rates == pytest.approx(torch.linspace(0, 0.6, 7).tolist())


@every_family
def test_copies_and_pickles_are_independent(make: Make) -> None:
    model = drawn(make())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - it was just pickled
        assert torch.equal(other(image_of(64, 64)), model(image_of(64, 64)))
        other.set_input_size(96)
        assert other(image_of(96, 96)).isfinite().all()
    assert model.img_size == (64, 64)


def windows(name: str) -> list[list[tuple[int, int, bool]]]:
    """Side, shift, and whether there is a mask, of the blocks of stages 3 and 4."""
    model, found = on_meta(name), []
    for stage, hw in ((2, (14, 14)), (3, (7, 7))):
        blocks = [block for block in model.layers[stage].blocks if isinstance(block, SwinBlock)]
        found.append(
            [(block._windows(hw)[0][0], block._windows(hw)[1], block.attn_mask is not None) for block in blocks]
        )
    return found


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_released_configurations_have_global_attention_in_the_last_stages(size: str) -> None:
    third, fourth = windows(f"slide_swin_{size}")
    assert third == [(14, 0, False)] * (6 if size == "tiny" else 18)
    assert fourth == [(7, 0, False)] * 2


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_windows_of_7_shift_in_odd_blocks_under_a_mask(size: str) -> None:
    third, fourth = windows(f"slide_swin_{size}_w7")
    assert third == [(7, 0, False), (7, 3, True)] * (3 if size == "tiny" else 9)
    assert fourth == [(7, 0, False)] * 2


def test_released_windows_are_of_56_at_every_size() -> None:
    assert on_meta("slide_swin_tiny").softmax_window == 56
    assert on_meta("slide_swin_tiny_w7").softmax_window == 7


def test_slide_blocks_of_swin_see_the_whole_map_unshifted() -> None:
    model, seen = swin(window_size=2, img_size=(64, 96)), []
    for block in slide_layers(model).values():
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].shape[:2], args[1])))
    model(image_of(64, 96))
    assert seen == [((1, 384), (16, 24))] * 2 + [((1, 96), (8, 12))] * 2


def test_spatial_reductions_of_pvt_are_those_of_softmax_stages() -> None:
    for name in ("slide_pvt_tiny", "slide_pvt_v2_b1"):
        model = on_meta(name)
        assert [block.attn.sr_ratio for block in (model.block3[0], model.block4[0])] == [2, 1]
        assert not any("sr." in key for key in model.state_dict() if key.startswith(("block1", "block2")))


def test_names_of_parameters_are_the_released_ones() -> None:
    names = set(swin().state_dict())
    attention = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "relative_position_bias_table"}
    slide = {f"layers.0.blocks.1.attn.{name}" for name in attention}
    slide |= {f"layers.0.blocks.1.attn.dep_conv{n}.{leaf}" for n in ("", "1") for leaf in ("weight", "bias")}
    rest = {
        f"layers.0.blocks.1.{part}.{leaf}"
        for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    }
    assert {name for name in names if name.startswith("layers.0.blocks.1.")} == slide | rest
    assert {name for name in names if name.startswith("layers.0.downsample")} == {
        *("layers.0.downsample.norm.weight", "layers.0.downsample.norm.bias", "layers.0.downsample.reduction.weight")
    }
    assert {f"patch_embed.{part}.weight" for part in ("proj", "norm")} | {"norm.weight", "head.weight"} <= names


def deviation(values: Tensor) -> float:
    return float(values.detach().std())


def wide(make: Make) -> Any:
    """A model with enough numbers for statistics."""
    torch.manual_seed(0)
    return make(**({"embed_dims": (64, 64, 80, 64)} if make in (pvt, pvt_v2) else {"embed_dim": 64}))


@every_family
def test_deformed_kernels_start_uniform_and_fixed_ones_as_shifts(make: Make) -> None:
    """The bodies initialise their own convolutions and linear layers, not these."""
    for layer in slide_layers(wide(make)).values():
        weight = layer.dep_conv1.weight.detach()
        assert 0.32 < weight.abs().max() <= 1 / 3
        assert deviation(weight) == pytest.approx(1 / 3 / 3**0.5, rel=0.1)
        assert layer.dep_conv.bias.abs().max() > 0.2
        assert torch.equal(layer.dep_conv.weight, ls.functional.shift_kernel(layer.head_dim, 3))


@every_family
def test_tables_and_linear_layers_start_as_published(make: Make) -> None:
    model, tables = wide(make), ("relative_position_bias_table", "rpb", "pos_embed1", "pos_embed2")
    found = [value.flatten() for name, value in model.named_parameters() if name.endswith(tables)]
    assert deviation(torch.cat(found)) == pytest.approx(0.02, rel=0.15)
    assert 0 < torch.cat(found).abs().max() < 0.1
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert deviation(torch.cat([module.weight.flatten() for module in linears])) == pytest.approx(0.02, rel=0.02)
    assert not any(module.bias.any() for module in linears if module.bias is not None)


@every_family
def test_tables_of_both_kinds_are_not_decayed(make: Make) -> None:
    model = make()
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) >= len(slide_layers(model))
    assert tables <= model.no_weight_decay()
    assert not any("dep_conv" in name for name in model.no_weight_decay())


@every_family
def test_half_precision_and_autocast_run(make: Make) -> None:
    model, image = drawn(make()), image_of(64, 64)
    with torch.no_grad():
        want = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(image)
        half = model.bfloat16()(image.bfloat16())
    assert half.dtype == torch.bfloat16
    for got in (cast, half):
        assert got.isfinite().all()
        assert (got.float() - want).abs().max() < 0.2 * want.abs().max()


BAD_MODELS = [
    (lambda: swin(img_size=(225, 224)), "225x224: height and width must be multiples of 32"),
    (lambda: nat(img_size=100), "100x100: height and width must be multiples of 32"),
    (lambda: swin(num_slide_stages=5), "num_slide_stages 5: expected 0 to 4, there are four stages"),
    (lambda: pvt(num_slide_stages=-1), "num_slide_stages -1: expected 0 to 4"),
    (lambda: pvt_v2(num_slide_stages=1.5), "num_slide_stages 1.5: expected 0 to 4"),
    (lambda: cswin(kernel_size=4), "kernel_size 4: expected an odd number"),
    (lambda: nat(kernel_size=0), "kernel_size 0: expected an odd number"),
    (lambda: swin(num_heads=(3, 2, 4, 8)), "stage 1: 8 channels and 3 heads: the channels must be a multiple"),
    (lambda: swin(slide_options={"dim_reduction": 3}), "a multiple of heads times dim_reduction, 1 * 3"),
    (lambda: pvt(slide_options={"backend": "fast"}), "backend 'fast' is unknown"),
    (lambda: pvt(slide_options={"padding_mode": "none"}), "padding_mode 'none' is unknown"),
    (lambda: swin(window_size=0), "window size 0: expected 1 or more tokens"),
    (lambda: nat(neighborhood_options={"kernel_size": 6}), "kernel_size 6: expected an odd number"),
    (
        lambda: nat(neighborhood_options={"implementation": "cuda"}),
        "implementation 'cuda': expected 'auto', 'masked' or",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD_MODELS, ids=[row[1][:40] for row in BAD_MODELS])
def test_configuration_that_does_not_fit_is_refused(build: Callable[[], object], message: str) -> None:
    with without_type_checks(), pytest.raises(UserError) as refused:
        build()
    assert message in str(refused.value)


BAD_IMAGES = [
    (torch.zeros(1, 3, 96, 64), "image of 96x64 pixels, but the model is set to 64x64: call set_input_size((96, 64))"),
    (torch.zeros(1, 3, 65, 64), "65x64: height and width must be multiples of"),
    (torch.zeros(1, 4, 64, 64), "expected floating-point numbers of shape (batch, 3, height, width)"),
    (torch.zeros(3, 64, 64), "image of shape (3, 64, 64)"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "type torch.uint8: expected floating-point numbers"),
]


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES, ids=[row[1][:40] for row in BAD_IMAGES])
@every_family
def test_image_that_does_not_fit_is_refused(make: Make, image: Tensor, message: str) -> None:
    with pytest.raises(UserError) as refused:
        make()(image)
    assert message in str(refused.value)


@every_family
def test_weights_of_another_kernel_size_are_refused_by_name_of_their_block(make: Make) -> None:
    first = next(iter(slide_layers(make())))
    with pytest.raises(UserError, match=f"{first}.attn: the weights have kernel_size 5, this model 3"):
        make().load_state_dict(make(kernel_size=5).state_dict())


def test_swin_weights_in_slide_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="weights of window attention, whose qkv rows are ordered in another way"):
        swin().load_state_dict(swin(num_slide_stages=0).state_dict())


def test_reflection_of_a_map_of_one_pixel_is_refused() -> None:
    model = swin(img_size=32, num_slide_stages=4, slide_options={"padding_mode": "reflect"})
    with pytest.raises(UserError, match="a map of 1x1 tokens is too small for padding_mode 'reflect'"):
        model(image_of(32, 32))
