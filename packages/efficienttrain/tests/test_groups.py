"""Parameter groups: what is decayed, the papers' layers for smaller rates, and refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leap_efficienttrain.groups import named_groups, param_groups
from leap_efficienttrain.models import create_model
from leap_shared.errors import UserError
from leap_shared.testing import golden

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def empty(name: str, **options: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        return create_model(name, **options)


def decayed(groups: list[dict[str, Any]]) -> set[str]:
    return {name for group in groups if group["weight_decay"] for name in group["params"]}


def scales(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr_scale"] for group in groups for name in group["params"]}


@pytest.mark.golden
@pytest.mark.parametrize("case", golden.cases(GOLDEN, "groups_"), ids=lambda case: case.name)
def test_groups_are_those_of_the_released_code(case: golden.Case) -> None:
    model = empty(case["model"], size=case["img_size"])
    groups = named_groups(model, weight_decay=case["weight_decay"], layer_decay=case["layer_decay"])
    want = golden.read_json(GOLDEN / case["file"])

    def comparable(given: list[dict[str, Any]]) -> list[tuple[float, float, list[str]]]:
        """In an order of its own: that of the parameters inside a block is not ours."""
        return sorted((round(group["lr_scale"], 12), group["weight_decay"], sorted(group["params"])) for group in given)

    assert comparable(groups) == comparable(want)


def test_position_embedding_and_class_token_of_deit_are_not_decayed() -> None:
    names = decayed(named_groups(empty("deit_tiny"), weight_decay=0.05))
    assert not names & {"pos_embed", "cls_token"}
    assert "blocks.0.attn.qkv.weight" in names


def test_relative_position_biases_of_swin_are_decayed_although_timm_spares_them() -> None:
    model = empty("swin_tiny")
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert table in model.no_weight_decay()  # type: ignore[operator]
    assert table in decayed(named_groups(model, weight_decay=0.05))


def test_biases_of_more_than_one_dimension_are_not_decayed() -> None:
    model = nn.Module()
    model.bias = nn.Parameter(torch.ones(2, 2))
    model.inner = nn.Module()
    model.inner.bias = nn.Parameter(torch.ones(2, 2))
    model.inner.weight = nn.Parameter(torch.ones(2, 2))
    assert decayed(named_groups(model, weight_decay=0.1)) == {"bias", "inner.weight"}


def test_convnext_names_are_the_released_ones() -> None:
    names = scales(named_groups(empty("convnext_tiny"), weight_decay=0.05))
    assert {"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "stages.3.2.pwconv2.bias", "norm.bias"} <= set(
        names
    )
    assert {"head.weight", "stages.0.0.gamma"} <= set(names)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("downsample_layers.0.1.weight", 0),
        ("downsample_layers.1.1.weight", 2),
        ("downsample_layers.2.1.weight", 3),
        ("downsample_layers.3.1.weight", 12),
        ("stages.0.2.dwconv.weight", 1),
        ("stages.1.0.gamma", 2),
        ("stages.2.0.dwconv.weight", 3),
        ("stages.2.8.dwconv.weight", 5),
        ("stages.2.26.pwconv1.weight", 11),
        ("stages.3.0.norm.bias", 12),
        ("norm.weight", 13),
        ("head.bias", 13),
    ],
)
def test_layers_of_convnext_follow_the_released_table(name: str, layer: int) -> None:
    found = scales(named_groups(empty("convnext_small"), weight_decay=0.05, layer_decay=0.5))
    assert found[name] == 0.5 ** (13 - layer)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("stage1_conv_embed.2.bias", 0),
        ("stage1.0.qkv.weight", 1),
        ("merge1.conv.weight", 2),
        ("merge2.norm.bias", 4),
        ("stage3.19.proj.weight", 13),
        ("merge3.conv.weight", 20),
        ("stage4.0.mlp.fc1.weight", 20),
        ("head.weight", 21),
    ],
)
def test_layers_of_cswin_follow_the_released_table(name: str, layer: int) -> None:
    found = scales(named_groups(empty("cswin_tiny"), weight_decay=0.05, layer_decay=0.5))
    assert found[name] == 0.5 ** (21 - layer)


@pytest.mark.parametrize("name", ["deit_tiny", "swin_tiny", "resnet50", "caformer_s18"])
def test_other_models_take_timms_layers(name: str) -> None:
    model = empty(name)
    scaled = {
        id(p): group["lr_scale"]
        for group in param_groups(model, weight_decay=0.1, layer_decay=0.7)
        for p in group["params"]
    }
    want = timm.optim.param_groups_layer_decay(model, layer_decay=0.7)
    assert scaled == {id(p): group["lr_scale"] for group in want for p in group["params"]}
    assert len(set(scaled.values())) > 3


@settings(max_examples=10, deadline=None)
@given(st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from([None, 0.9, 1.0]))
def test_every_trained_parameter_is_in_one_group_and_no_frozen_one_is(
    trained: list[bool], layer_decay: float | None
) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    for parameter, on in zip(model.parameters(), trained, strict=True):
        parameter.requires_grad_(on)
    want = {id(p) for p in model.parameters() if p.requires_grad}
    if not want:
        with pytest.raises(UserError, match="unfreeze some"):
            param_groups(model, weight_decay=0.1)
        return
    found = [id(p) for group in param_groups(model, weight_decay=0.1, layer_decay=layer_decay) for p in group["params"]]
    assert len(found) == len(want)
    assert set(found) == want


@pytest.mark.parametrize("attribute", ["module", "_orig_mod"])
def test_a_wrapped_model_has_the_groups_of_the_model_inside(attribute: str) -> None:
    model, wrapper = create_model("resnet18"), nn.Module()
    setattr(wrapper, attribute, model)
    found = param_groups(wrapper, weight_decay=0.1)
    assert [group["params"] for group in found] == [group["params"] for group in param_groups(model, weight_decay=0.1)]


def test_groups_serve_torchs_and_timms_optimisers() -> None:
    model = nn.Linear(3, 2)
    groups = param_groups(model, weight_decay=0.1, layer_decay=0.5)
    for optimiser in (torch.optim.AdamW(groups, lr=1e-3), timm.optim.Lamb(groups, lr=1e-3, eps=1e-6)):
        assert [(group["weight_decay"], group["lr_scale"]) for group in optimiser.param_groups] == [
            (0.1, 1.0),
            (0.0, 1.0),
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"weight_decay": 0.1, "layer_decay": 0.0}, "layer_decay 0.0"),
        ({"weight_decay": 0.1, "layer_decay": 1.5}, "in \\(0, 1\\]"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        param_groups(nn.Linear(2, 2), **options)
