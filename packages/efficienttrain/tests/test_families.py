"""Every family of the table changes its size as the table says, and equals a model made for that size."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from leap_efficienttrain import families
from leap_efficienttrain.families import FAMILIES, family_of, resized_pair
from leap_efficienttrain.sizes import flexible
from leap_shared.errors import UserError

SHALLOW: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 1},
    "deit3_small_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 1},
    "beit_base_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 1},
    "vit_relpos_small_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 2, "rel_pos_type": "bias"},
    "swin_tiny_patch4_window7_224": {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 2)},
    "swinv2_tiny_window8_256": {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 2)},
    "swinv2_cr_tiny_224": {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 2)},
    "maxvit_tiny_tf_224": {"depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16},
    "coatnet_nano_rw_224": {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": (16, 16)},
    "efficientvit_m0": {"depth": (1, 1, 1)},
    "cait_xxs24_224": {"depth": 1, "depth_token_only": 1},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 32},
    "tnt_s_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads_outer": 2},
    "coat_tiny": {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    "convit_tiny": {"depth": 2, "local_up_to_layer": 1},
    "visformer_tiny": {"depth": (1, 1, 1), "embed_dim": 96, "num_heads": 2},
    "levit_128s": {"depth": (1, 1, 1)},
    "efficientformerv2_s0": {"depths": (1, 1, 1, 1)},
    "crossvit_tiny_240": {"depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))},
}
MOVING = [(family, name) for family in FAMILIES if family.how in {"in place", "resample"} for name in family.examples]
TAKING_ALL = [(family, name) for family in FAMILIES if family.how == "any size" for name in family.examples]
HEAVY = {"nest_tiny", "volo_d1_224"}  # which nothing makes smaller
QUICK = {"resnet18", "convnext_atto", "pvt_v2_b0", "ghostnet_050"}

LATER = {"starnet_s1", "swiftformer_xs", "shvit_s1"}  # than timm 1.0.15


def made(name: str, size: int) -> Any:
    torch.manual_seed(0)
    windows = {"window_size": size // 32} if name.startswith("swin") else {}
    return timm.create_model(name, num_classes=3, img_size=size, **SHALLOW.get(name, {}), **windows)


def means(model: Any, name: str, size: int) -> dict[str, Any]:
    """What timm before 1.0.31 does not know of a model that was made with arguments, and has no set_input_size for."""
    known = hasattr(model, "_model_args") or callable(getattr(model, "set_input_size", None))
    return {} if known else {"size": size, "rebuild": lambda size: made(name, size)}


def pictures(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def step(model: Any, optimizer: torch.optim.Optimizer, size: int) -> None:
    outputs = model.train()(pictures(size))
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    optimizer.zero_grad()
    logits.square().sum().backward()
    optimizer.step()


@torch.no_grad()
def logits(model: Any, size: int) -> Tensor:
    found: Tensor = model.eval()(pictures(size))
    return found


def marked(rows: list[Any], heavy: Any) -> list[Any]:
    return [pytest.param(*row, id=row[1], marks=[pytest.mark.slow] * heavy(row[1])) for row in rows]


@pytest.mark.parametrize(("family", "name"), marked(MOVING, HEAVY.__contains__))
def test_family_moves_in_training_and_equals_a_model_of_that_size(family: Any, name: str) -> None:
    small, large = (112, 168) if "patch14" in name else (96, 160)
    model = made(name, small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, small)
    average = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    flex = flexible(model, optimizer, average, allow_resample=True, **means(model, name, small))
    assert (flex.family, flex.how, flex.size) == (family.name, family.how, small)
    assert small % flex.requires == 0
    flex.set_size(large)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    fresh = made(name, large)
    resized = [p.shape != fresh.get_parameter(key).shape for key, p in made(name, small).named_parameters()]
    assert flex.changed == any(resized)
    fresh.load_state_dict(model.state_dict())
    expected = logits(fresh, large)
    assert torch.equal(logits(model, large), expected)
    assert torch.equal(logits(average, large), expected)
    for parameter in model.parameters():
        moments = [value for value in optimizer.state[parameter].values() if value.ndim]
        assert all(value.shape == parameter.shape for value in moments)
        assert (optimizer.state[parameter]["exp_avg_sq"] >= 0).all()
    step(model, optimizer, large)
    flex.set_size(small)
    again = made(name, small)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, small), logits(again, small))


@pytest.mark.parametrize(("family", "name"), marked(TAKING_ALL, lambda name: name not in QUICK))
def test_family_takes_every_size_as_built(family: Any, name: str) -> None:
    if not timm.is_model(name):
        pytest.skip("this timm does not have the model yet")
    model = timm.create_model(name, num_classes=3, **SHALLOW.get(name, {})).eval()
    assert family_of(model) is family
    flex = flexible(model)
    assert (flex.how, flex.requires) == ("any size", 1)
    for size in (96, 160):
        assert not flex.set_size(size)
        with torch.no_grad():
            assert model(pictures(size)[:1]).shape == (1, 3)


@pytest.mark.parametrize("name", ["mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "efficientformer_l1"])
def test_refused_family_says_why_and_what_to_do(name: str) -> None:
    model = timm.create_model(name)
    for allowed in (False, True):
        with pytest.raises(UserError, match=r"cannot change its input size: its? .*; train it at one size, or give"):
            flexible(model, allow_resample=allowed)


@pytest.mark.parametrize("name", ["levit_128s", "pit_ti_224", "efficientformerv2_s0"])
def test_family_tied_to_its_grid_has_to_be_allowed(name: str) -> None:
    model = timm.create_model(name)
    with pytest.raises(UserError, match=r"tied to its input size: .*allow_resample=True"):
        flexible(model)
    assert flexible(model, allow_resample=True).how == "resample"


def test_table_names_every_family_once_with_models_of_timm() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert family.examples
        for example in family.examples:
            assert timm.is_model(example) or example in LATER


def test_table_states_a_requirement_in_words() -> None:
    words = {family.name: family.requirement for family in FAMILIES}
    assert words["vit, deit, deit3"] == "a multiple of the patch size"
    assert words["swin"] == "a multiple of 8 patches (32)"
    assert words["hiera"] == "a multiple of 32"
    assert words["resnet"] == "any"
    assert words["efficientformer"] == "no other size"


def test_class_derived_from_a_family_belongs_to_it() -> None:
    class Mine(timm.models.VisionTransformer): ...  # type: ignore[misc]

    model = Mine(depth=1, embed_dim=16, num_heads=2, img_size=96)
    family = family_of(model)
    assert family is not None
    assert family.name == "vit, deit, deit3"
    assert family_of(model.blocks[0]) is None
    assert flexible(model).set_size(160)


def test_class_that_the_factory_does_not_know_asks_for_rebuild() -> None:
    model = timm.models.cait.Cait(depth=1, depth_token_only=1, embed_dim=16, num_heads=2, img_size=96, num_classes=3)
    with pytest.raises(UserError, match=r"by which name .* give flexible rebuild="):
        flexible(model, size=96).set_size(160)


def test_family_moves_where_timm_has_no_set_input_size_for_it() -> None:
    model = made("beit_base_patch16_224", 96)
    if not hasattr(model, "_model_args"):
        pytest.skip("this timm does not keep the arguments of models")
    family = family_of(model)
    model.set_input_size = None
    old, new = resized_pair(model, family, (96, 96), (160, 160))
    assert old is not model
    assert new.blocks[0].attn.relative_position_bias_table.shape[0] == 19 * 19 + 3  # type: ignore[union-attr]


def test_cached_biases_of_evaluation_are_dropped() -> None:
    model = made("levit_128s", 96)
    logits(model, 96)
    flexible(model, allow_resample=True, **means(model, "levit_128s", 96)).set_size(160)
    fresh = made("levit_128s", 160)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, 160), logits(fresh, 160))


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "levit_128s"])
def test_model_without_values_can_be_planned_with(name: str) -> None:
    model = made(name, 96).to("meta").eval()
    flexible(model, allow_resample=True, **means(model, name, 96)).set_size(160)
    with torch.no_grad():
        assert model(torch.empty(2, 3, 160, 160, device="meta")).shape == (2, 3)


def test_windows_of_stages_differ_where_the_model_was_made_so() -> None:
    if "one per stage" not in (inspect.getdoc(timm.models.SwinTransformer.set_input_size) or ""):
        pytest.skip("this timm gives all stages one window")
    options: dict[str, Any] = {"depths": (1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1), "num_classes": 3}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=128, window_size=[4, 8, 4], **options)
    assert families._windows(model, (128, 128), (192, 192)) == [(6, 6), (12, 12), (6, 6)]
    flexible(model).set_size(192)
    assert [stage.blocks[0].window_size for stage in model.layers] == [(6, 6), (12, 12), (6, 6)]
