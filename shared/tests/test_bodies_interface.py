"""The bodies' interface: sizes, feature pyramids, plugged-in attention, heads, checkpointing, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import generate_default_cfgs, register_model
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies import PVT, CSWin, PVTv2, Site, Swin, build, pretrained_config
from leap_shared.vision.bodies.grids import Size, merge, partition, replace_data, resample_grid, to_image, to_tokens
from leap_shared.vision.bodies.parts import uses_attention

FLOAT32_ROUNDING = 1e-5
SMALL = {"depths": (2, 2, 2, 1), "num_classes": 5}
Make = Callable[..., Any]


class Positional(nn.Module):
    """A table with one row per place, added to tokens: the least that depends on the size."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.size = site.input_size
        self.table = nn.Parameter(torch.randn(1, self.size[0] * self.size[1], site.dim))
        self.seen: list[Size] = []

    def set_input_size(self, hw: Size) -> None:
        replace_data(self.table, resample_grid(self.table, self.size, hw))
        self.size = hw

    def forward(self, x: Tensor, hw: Size) -> Tensor:
        self.seen.append(hw)
        table = resample_grid(self.table, self.size, hw)
        return x + table if x.ndim == 3 else x[2] + table


def swin(**changes: Any) -> Swin:
    return Swin(**{"embed_dim": 8, "num_heads": (1, 2, 4, 8), **SMALL, **changes})


def pvt(**changes: Any) -> PVT:
    return PVT(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def pvt_v2(**changes: Any) -> PVTv2:
    return PVTv2(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def cswin(**changes: Any) -> CSWin:
    plugged = {"branch_attention": changes.pop("attention", None)}
    return CSWin(**{"embed_dim": 8, "num_heads": (2, 4, 8, 16), **SMALL, **plugged, **changes})


def cswin_whole_blocks(**changes: Any) -> CSWin:
    return CSWin(**{"embed_dim": 8, "num_heads": (2, 4, 8, 16), **SMALL, **changes})


def swin_with_ape(**changes: Any) -> Swin:
    return swin(ape=True, **changes)


FAMILIES: list[Make] = [swin, pvt, pvt_v2, cswin]
every_family = pytest.mark.parametrize("make", FAMILIES)


@every_family
@pytest.mark.parametrize("size", [(192, 192), (224, 256), (320, 512), (32, 64)])
def test_every_family_gives_maps_of_strides_4_to_32_at_every_size(make: Make, size: Size) -> None:
    model = make(img_size=size, attn_type="LMSS1", attention=Positional).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    expected = [(size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected


@pytest.mark.parametrize("make", [*FAMILIES, cswin_whole_blocks, swin_with_ape])
@pytest.mark.parametrize("attn_type", ["SSSS", "LLSS"])
@pytest.mark.parametrize("target", [(96, 128), (32, 64), (448, 256)])
def test_dynamic_size_equals_setting_the_size(make: Make, attn_type: str, target: Size) -> None:
    torch.manual_seed(0)
    model = make(img_size=(128, 96), attn_type=attn_type, attention=Positional, dynamic_img_size=True).eval()
    resized = copy.deepcopy(model)
    resized.set_input_size(target)
    image = torch.randn(1, 3, *target)
    with torch.no_grad():
        dynamic, fixed = model(image), resized(image)
    assert (dynamic - fixed).abs().max() <= FLOAT32_ROUNDING * fixed.abs().max()


@pytest.mark.parametrize("make", [*FAMILIES, swin_with_ape])
def test_setting_the_size_gives_the_parameters_of_a_model_built_there(make: Make) -> None:
    model = make(img_size=128, attn_type="LLSS", attention=Positional)
    built = make(img_size=(160, 224), attn_type="LLSS", attention=Positional)
    model.set_input_size((160, 224))
    shapes, expected = ({k: tuple(v.shape) for k, v in m.named_parameters()} for m in (model, built))
    assert shapes == expected


@every_family
def test_setting_the_size_keeps_the_parameters_that_an_optimiser_holds(make: Make) -> None:
    model = make(img_size=64, attn_type="LLSS", attention=Positional)
    before = dict(model.named_parameters())
    model.set_input_size(128)
    assert all(value is before[name] for name, value in model.named_parameters())


@every_family
def test_a_loss_that_is_still_referred_to_does_not_stop_training_at_the_next_size(make: Make) -> None:
    model = make(img_size=64, attn_type="LLSS", attention=Positional)
    loss = model(torch.ones(1, 3, 64, 64)).sum()
    loss.backward()
    model.set_input_size(128)
    model(torch.ones(1, 3, 128, 128)).sum().backward()
    assert loss.grad_fn is not None
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "table", "old", "new", "mode"),
    [
        (pvt, "pos_embed1", (16, 16), (24, 32), "bilinear"),
        (swin_with_ape, "absolute_pos_embed", (16, 16), (24, 32), "bicubic"),
        (swin, "layers.3.blocks.0.attn.relative_position_bias_table", (3, 3), (5, 5), "bicubic"),
    ],
)
def test_tables_are_resampled_as_their_papers_do(make: Make, table: str, old: Size, new: Size, mode: str) -> None:
    model = make(img_size=64)
    before = model.get_parameter(table).detach().clone().reshape(1, *old, -1).permute(0, 3, 1, 2)
    model.set_input_size((96, 128))
    want = F.interpolate(before, new, mode=mode, align_corners=False)
    assert torch.equal(model.get_parameter(table).reshape(1, *new, -1), want.permute(0, 2, 3, 1))


def test_swin_built_at_another_size_gives_the_logits_of_one_resized_to_it() -> None:
    model, built = swin(img_size=448, softmax_window=7).eval(), swin(img_size=128, softmax_window=7).eval()
    model.set_input_size(128)  # stage 3 has 8x8, stage 4 4x4 tokens: its window shrinks from 7
    built.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(model(image), built(image))


def test_cswin_branch_over_the_whole_map_splits_into_the_two_of_a_larger_size() -> None:
    """Stage 3 has 4x4 tokens at 64 px and one branch; at 224 px 14x14 and two branches, of the same kernels."""
    model, built = cswin(img_size=64).eval(), cswin(img_size=224).eval()
    model.set_input_size(224)
    state = model.state_dict()
    for name in [name for name in state if name.startswith("stage3") and ".attns.0." in name]:
        half = state[name].shape[0] // 2
        state[name.replace("attns.0", "attns.1")] = state[name][half:]
        state[name] = state[name][:half]
    built.load_state_dict(state)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        got, want = model(image), built(image)
    assert (got - want).abs().max() <= FLOAT32_ROUNDING * want.abs().max()


@pytest.mark.parametrize("window", [None, 4])
def test_plugged_in_attention_of_swin_sees_the_map_or_its_windows(window: int | None) -> None:
    model = swin(img_size=(64, 96), attn_type="LSSS", attention=Positional, window_size=window)
    model(torch.randn(1, 3, 64, 96))
    assert model.layers[0].blocks[0].attn.seen == [(16, 24) if window is None else (4, 4)]


def test_mixed_letters_put_the_attention_into_the_leading_blocks_only() -> None:
    assert uses_attention("LSMM2", (2, 1, 3, 1)) == [[True, True], [False], [True, True, False], [True]]


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([(), (2,), (2, 3)]),
)
@settings(max_examples=40, deadline=None)
def test_merging_windows_undoes_partitioning(counts: tuple[int, int, int], window: Size, rest: tuple[int, ...]) -> None:
    size = (counts[1] * window[0], counts[2] * window[1])
    image = torch.randn(counts[0], *size, *rest)
    windows = partition(image, window)
    assert torch.equal(merge(windows, window, size), image)
    assert torch.equal(windows[0], image[0, : window[0], : window[1]].flatten(0, 1))


def test_tokens_and_images_are_views_of_each_other() -> None:
    tokens = torch.randn(2, 6, 5)
    image = to_image(tokens, (2, 3))
    assert image.data_ptr() == to_tokens(image).data_ptr() == tokens.data_ptr()


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(make: Make) -> None:
    model = make(img_size=64)
    image = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@every_family
def test_every_trainable_parameter_gets_a_gradient(make: Make) -> None:
    model = make(img_size=64)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_family
def test_stochastic_depth_grows_linearly_over_all_blocks(make: Make) -> None:
    model = make(img_size=64, drop_path_rate=0.6)
    rates = [getattr(m.drop_path2, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path2")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


@every_family
def test_head_can_be_read_replaced_and_left_out(make: Make) -> None:
    model = make(img_size=64).eval()
    image = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(image)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(pooled, tokens.mean(1))
    assert torch.equal(model.get_classifier()(pooled), model(image))
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(image), tokens)


@every_family
def test_intermediates_end_with_the_tokens_of_forward_features(make: Make) -> None:
    model = make(img_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    tokens, maps = model.forward_intermediates(image, indices=2, norm=True)
    assert len(maps) == 2
    assert torch.equal(tokens, model.forward_features(image))
    assert torch.equal(to_tokens(maps[-1]), tokens)


@every_family
def test_pruned_model_keeps_just_what_the_chosen_maps_need(make: Make) -> None:
    model = make(img_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    want = model.forward_intermediates(image, indices=(0, 1), intermediates_only=True)
    model.prune_intermediate_layers((0, 1))
    got = model.forward_intermediates(image, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.stack([m.square().sum() for m in got]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model(image).shape[2] == model.num_features == 16


default_cfgs = generate_default_cfgs({"leap_test_swin": pretrained_config(Swin)})


@register_model
def leap_test_swin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    options = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    return build(Swin, "leap_test_swin", pretrained, **{**options, **kwargs})


def test_timm_creates_models_and_feature_pyramids() -> None:
    model = timm.create_model("leap_test_swin", num_classes=3, img_size=64, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    pyramid = timm.create_model("leap_test_swin", features_only=True, out_indices=(1, 2))
    assert pyramid.feature_info.channels() == [16, 32]
    assert pyramid.feature_info.reduction() == [8, 16]
    assert [tuple(m.shape) for m in pyramid(torch.randn(1, 3, 64, 96))] == [(1, 16, 8, 12), (1, 32, 4, 6)]


@pytest.mark.parametrize("make", [*FAMILIES, swin_with_ape])
def test_layer_wise_learning_rates_fall_from_head_to_stem(make: Make) -> None:
    model = make(img_size=64)
    optimiser = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimiser.param_groups for p in group["params"]}
    blocks = [m for m in model.modules() if hasattr(m, "drop_path2")]
    by_block = [{scale[id(p)] for p in block.parameters()} for block in blocks]
    assert all(len(scales) == 1 for scales in by_block)
    assert [max(s) for s in by_block] == sorted({max(s) for s in by_block})
    assert {scale[id(p)] for p in model.get_classifier().parameters()} == {1.0}
    assert min(scale.values()) == scale[id(model.get_parameter(f"{model.first_conv}.weight"))]


def test_position_bias_is_not_decayed() -> None:
    model = swin(img_size=64, ape=True)
    names = model.no_weight_decay()
    assert len(names) == 7 + 1
    assert "absolute_pos_embed" in names


@every_family
def test_export_keeps_the_logits(make: Make) -> None:
    model = make(img_size=64).eval()
    image = torch.randn(2, 3, 64, 64)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (image,), dynamic_shapes=shapes, strict=False)
    larger = torch.randn(3, 3, 64, 64)
    assert (program.module()(larger) - model(larger)).abs().max() <= FLOAT32_ROUNDING * model(larger).abs().max()


@every_family
def test_half_precision_gives_nearly_the_same_logits(make: Make) -> None:
    model = make(img_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    want, got = model(image), model.bfloat16()(image.bfloat16()).float()
    assert (got - want).abs().max() <= 0.05 * want.abs().max().clamp(min=0.1)  # bfloat16 has 8 bits


BAD = {
    "225x224: height and width must be multiples of 32": lambda: swin(img_size=(225, 224)),
    "say to 224x224": lambda: pvt(img_size=(225, 224)),
    "16x16: height": lambda: cswin(img_size=16),
    "channels must be a multiple of the heads": lambda: pvt_v2(num_heads=(3, 2, 5, 8)),
    "two branches need an even number": lambda: cswin(num_heads=(1, 4, 8, 16)),
    "expected 4 letters": lambda: swin(attn_type="LLS"),
    "the number of leading L blocks": lambda: swin(attn_type="LLMS"),
    "but no attention was given": lambda: pvt(attn_type="LSSS"),
    "not divisible by the spatial reduction ratio 3": lambda: pvt(sr_ratios=(3, 4, 2, 1)),
    "depths (2, 2)": lambda: pvt(depths=(2, 2)),
    "window size 0": lambda: swin(softmax_window=0),
    "split size 0": lambda: cswin(split_sizes=(0, 2, 7, 7)),
    "global_pool 'max'": lambda: swin(global_pool="max"),
    "not both": lambda: CSWin(attention=Positional, branch_attention=Positional),
}


@pytest.mark.parametrize("message", BAD)
def test_configuration_that_does_not_fit_is_refused(message: str) -> None:
    with pytest.raises(UserError) as caught:
        BAD[message]()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 96, 64), "call set_input_size((96, 64)), or create it with dynamic_img_size=True"),
        (torch.zeros(1, 3, 65, 64), "65x64: height and width must be multiples of 32"),
        (torch.zeros(1, 4, 64, 64), "expected floating-point numbers of shape (batch, 3, height, width)"),
        (torch.zeros(3, 64, 64), "image of shape (3, 64, 64)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
    ],
)
@every_family
def test_image_that_does_not_fit_is_refused(make: Make, image: Tensor, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(img_size=64)(image)
    assert message in str(caught.value)


def test_output_format_other_than_nchw_is_refused() -> None:
    with pytest.raises(UserError, match="only 'NCHW'"):
        swin(img_size=64).forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NLC")
