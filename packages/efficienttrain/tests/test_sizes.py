"""Models change their input size in training: nothing is lost, nothing goes stale, and what cannot says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.swin_transformer import checkpoint_filter_fn
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from leap_efficienttrain.sizes import flexible
from leap_efficienttrain.tables import transfer_state
from leap_shared.errors import UserError
from leap_shared.testing import fill, golden
from leap_shared.vision.bodies import Swin

GOLDEN = golden.cases(Path(__file__).parent / "golden")
TABLES = ("pos_embed", "relative_position_bias_table")


def vit(img_size: int | tuple[int, int] = 96, **options: Any) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3, **options}
    return timm.create_model("vit_tiny_patch16_224", img_size=img_size, **small)


def swin(img_size: int = 96, **options: Any) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"depths": (2, 2), "embed_dim": 8, "num_heads": (1, 2), "num_classes": 3, **options}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=img_size, window_size=img_size // 32, **small)


def pictures(*hw: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *(hw * 2)[:2], generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *hw: int) -> Tensor:
    loss: Tensor = model(pictures(*hw)).square().sum()
    loss.backward()
    optimizer.step()
    return loss


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


class Net(nn.Module):
    """A net for every size, with statistics that a careless look at it would move."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


class Flat(nn.Module):
    """A net for one size."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 1 + size * size, 4))
        self.register_buffer("ramp", torch.arange(float(size)))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1).flatten(1) @ self.position[0, 1:] + self.ramp.sum()


def official_schema(case: golden.Case) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names and shapes of the released file at the case's first size, from the timm model that has them."""
    own = timm_model(case, case["from_size"]).state_dict()
    names = {name: name for name in own}
    if "swin" in case["model"]:
        names = {name: name.replace("head.fc", "head") for name in own}
        for stage in (1, 2, 3):
            here, there = f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample"
            names |= {name: name.replace(here, there) for name in own if name.startswith(here)}
    return {names[name]: (tuple(value.shape), "float32") for name, value in own.items()}


def timm_model(case: golden.Case, size: int) -> Any:
    name, options = case["model"], {"img_size": size, **case["constructor"]}
    if "swin" in name:
        return timm.create_model(f"{name}_patch4_window7_224", **{**options, "window_size": size // 32})
    return timm.create_model(name, **options)


def as_timm(case: golden.Case, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return checkpoint_filter_fn(state, timm_model(case, case["from_size"])) if "swin" in case["model"] else state


def filled(case: golden.Case, only: tuple[str, ...] = ("",)) -> dict[str, dict[str, Tensor]]:
    schema = {name: entry for name, entry in official_schema(case).items() if name.endswith(only)}
    weights = {name: torch.from_numpy(np.asarray(value)) for name, value in fill.fill_state(schema).items()}
    tables = {name: tuple(value.shape) for name, value in weights.items() if name.endswith(TABLES)}
    moments = {
        kind: {name: torch.from_numpy(fill.tensor(f"{kind}.{name}", shape)) for name, shape in tables.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    moments["exp_avg_sq"] = {name: value.abs() for name, value in moments["exp_avg_sq"].items()}
    return {"model": weights, "ema": {name: 2 * value for name, value in weights.items()}, **moments}


SIZE_CASES = [case for case in GOLDEN if case.facts["case"].startswith("size_")]


@pytest.mark.golden
@pytest.mark.parametrize("case", SIZE_CASES, ids=lambda case: case["case"])
def test_named_states_move_as_in_the_released_program(case: golden.Case) -> None:
    moved = {
        kind: transfer_state(state, case["from_size"], case["to_size"]) for kind, state in filled(case, TABLES).items()
    }
    compared = [name for name in case.arrays if "/" in name]
    assert compared
    for name in compared:
        kind, key = name.split("/", 1)
        every = moved[kind][key].shape[-1] // case.arrays[name].shape[-1]
        found = moved[kind][key][..., ::every].numpy()
        np.testing.assert_allclose(found, case.arrays[name], rtol=case["rtol"], atol=case["atol"], err_msg=name)


@pytest.mark.slow
@pytest.mark.golden
@pytest.mark.parametrize("case", SIZE_CASES, ids=lambda case: case["case"])
def test_model_in_training_moves_as_in_the_released_program(case: golden.Case) -> None:
    states = filled(case)
    model, average = timm_model(case, case["from_size"]), timm_model(case, case["from_size"])
    model.load_state_dict(as_timm(case, states["model"]))
    average.load_state_dict(as_timm(case, states["ema"]))
    optimizer = adamw(model)
    for name, parameter in model.named_parameters():
        moments = {kind: states[kind].get(name, parameter.detach()).clone() for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(7.0), **moments}
    flexible(model, optimizer, average).set_size(case["to_size"])
    found = {"model": dict(model.named_parameters()), "ema": dict(average.named_parameters())}
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = {name: optimizer.state[p][kind] for name, p in model.named_parameters()}
    for name, expected in case.arrays.items():
        if "/" in name:
            kind, key = name.split("/", 1)
            value = found[kind][key].detach()
            value = value[..., :: value.shape[-1] // expected.shape[-1]].numpy()
            np.testing.assert_allclose(value, expected, rtol=case["rtol"], atol=case["atol"], err_msg=name)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(fill.tensor(case["input"][0], tuple(case["input"][1]))))
    tolerance = {"rtol": case["logits_rtol"], "atol": case["logits_atol"]}
    np.testing.assert_allclose(logits, case.arrays["logits_at_new_size"], **tolerance)


@pytest.mark.parametrize("make", [vit, swin])
def test_parameters_stay_the_same_objects_and_go_on_being_trained(make: Any) -> None:
    model = make()
    optimizer = adamw(model)
    before = dict(model.named_parameters())
    step(model, optimizer, 96)
    flex = flexible(model, optimizer)
    assert flex.set_size(160)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    resized = [parameter for name, parameter in after.items() if name.endswith(TABLES)]
    values = [parameter.detach().clone() for parameter in resized]
    step(model, optimizer, 160)
    assert not any(torch.equal(parameter, value) for parameter, value in zip(resized, values, strict=True))


@pytest.mark.parametrize(
    "make_optimizer",
    [
        adamw,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
        lambda model: torch.optim.RMSprop(model.parameters(), momentum=0.9, centered=True),
        lambda model: timm.optim.create_optimizer_v2(model, "lookahead_lamb", lr=1e-3),
    ],
)
def test_every_state_of_a_parameters_shape_goes_through_the_map_of_the_weights(make_optimizer: Any) -> None:
    model = vit()
    optimizer = make_optimizer(model)
    step(model, optimizer, 96)
    inner = getattr(optimizer, "_base_optimizer", optimizer)
    before = {key: value.clone() for key, value in inner.state[model.pos_embed].items() if isinstance(value, Tensor)}
    flexible(model, optimizer).set_size(160)
    assert before
    for key, value in before.items():
        same = transfer_state({"pos_embed": value}, 96, 160)["pos_embed"] if value.numel() > 1 else value
        assert torch.equal(inner.state[model.pos_embed][key], same), key
    step(model, optimizer, 160)


def test_factored_state_starts_anew_with_a_warning() -> None:
    model = vit()
    optimizer = timm.optim.create_optimizer_v2(model, "adafactorbv", lr=1e-3, min_dim_size_to_factor=8)
    step(model, optimizer, 96)
    flex = flexible(model, optimizer)
    with pytest.warns(UserWarning, match="factored state of pos_embed"):
        flex.set_size(160)
    step(model, optimizer, 160)


def test_loss_that_is_still_referred_to_does_not_stop_the_next_backward_pass() -> None:
    model = vit()
    optimizer = adamw(model)
    kept = step(model, optimizer, 96)
    flexible(model, optimizer).set_size(160)
    step(model, optimizer, 160)
    assert kept.grad_fn is not None
    assert model.pos_embed.grad.shape == model.pos_embed.shape


def test_gradients_of_resized_parameters_are_dropped_and_others_kept() -> None:
    model = vit()
    model(pictures(96)).sum().backward()
    flexible(model).set_size(160)
    assert model.pos_embed.grad is None
    assert model.head.weight.grad is not None


@pytest.mark.parametrize(
    "wrap",
    [
        copy.deepcopy,
        ModelEmaV2,
        ModelEmaV3,
        AveragedModel,
        lambda model: [copy.deepcopy(model), AveragedModel(model)],
    ],
)
def test_moving_averages_move_along_and_go_on(wrap: Any) -> None:
    model = vit()
    average = wrap(model)
    with torch.no_grad():
        model.pos_embed.mul_(2)
    flexible(model, ema=average).set_size(160)
    for each in average if isinstance(average, list) else [average]:
        inside = each.module if hasattr(each, "module") else each
        torch.testing.assert_close(inside.pos_embed * 2, model.pos_embed)
        inside(pictures(160))
    if isinstance(average, ModelEmaV2 | ModelEmaV3):
        average.update(model)
    elif isinstance(average, AveragedModel):
        average.update_parameters(model)


def test_average_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"moving average \(VisionTransformer\) differs from the model"):
        flexible(vit(96), ema=vit(160))


def test_same_size_changes_nothing() -> None:
    model = vit()
    values = model.pos_embed.data
    flex = flexible(model)
    assert not flex.set_size(96)
    assert model.pos_embed.data.data_ptr() == values.data_ptr()
    assert (flex.size, flex.changed) == (96, False)


def test_there_and_back_is_the_size_of_before() -> None:
    model = swin()
    flex = flexible(model)
    assert flex.set_size(160)
    assert flex.set_size(96)
    assert (flex.size, flex.changed) == (96, True)
    assert model(pictures(96)).shape == (2, 3)


def test_swin_equals_one_made_for_the_size_with_the_moved_weights() -> None:
    model = swin(224, depths=(2, 2, 2), num_heads=(1, 2, 4))
    flexible(model).set_size(128)
    fresh = swin(128, depths=(2, 2, 2), num_heads=(1, 2, 4))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(pictures(128)), fresh.eval()(pictures(128)))
    assert [block.shift_size for block in model.layers[2].blocks] == [(0, 0), (2, 2)]


def test_swin_with_windows_of_another_share_keeps_the_share() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=128, window_size=8, depths=(2, 2))
    flexible(model).set_size(64)
    assert model.layers[0].blocks[0].window_size == (4, 4)


@pytest.mark.parametrize(("start", "end"), [((96, 96), (96, 128)), ((96, 128), (128, 96)), ((64, 96), (112, 80))])
def test_sizes_need_not_be_square(start: tuple[int, int], end: tuple[int, int]) -> None:
    model = vit(start)
    flex = flexible(model)
    flex.set_size(end)
    assert flex.size == end
    fresh = vit(end)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(pictures(*end)), fresh.eval()(pictures(*end)))


def test_swin_takes_sizes_that_are_not_square() -> None:
    model = swin()
    flexible(model).set_size((96, 160))
    assert model.layers[0].blocks[0].window_size == (3, 5)
    assert model(pictures(96, 160)).shape == (2, 3)


def test_bfloat16_models_stay_bfloat16() -> None:
    model = swin().to(torch.bfloat16)
    optimizer = adamw(model)
    flex = flexible(model, optimizer)
    flex.set_size(160)
    assert {value.dtype for value in [*model.parameters(), *model.buffers()] if value.is_floating_point()} == {
        torch.bfloat16
    }
    assert model(pictures(160).bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("make", [vit, lambda: swin(depths=(2,), num_heads=(1,))], ids=["vit", "swin"])
def test_compiled_model_sees_the_new_size(make: Any) -> None:
    model = make().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(pictures(96))
    flexible(compiled).set_size(160)
    torch.testing.assert_close(compiled(pictures(160)), model(pictures(160)))


def test_data_parallel_wrappers_are_looked_through_and_told_to_wrap_again() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = vit()
        optimizer = adamw(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        step(wrapped, optimizer, 96)
        flex = flexible(wrapped, optimizer)
        assert flex.set_size(160)
        assert flex.changed
        step(nn.parallel.DistributedDataParallel(model), optimizer, 160)
    finally:
        torch.distributed.destroy_process_group()


def test_model_inside_another_moves() -> None:
    body = vit()
    model = nn.Sequential(body, nn.Linear(3, 2))
    optimizer = adamw(model)
    flex = flexible(model, optimizer, copy.deepcopy(model))
    assert (flex.size, flex.requires, flex.family) == (96, 16, "vit, deit, deit3")
    assert flex.set_size(160)
    step(model, optimizer, 160)


def test_hooks_are_not_copied_along() -> None:
    class Trainer:
        def hook(self, *_: Any) -> None: ...

        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("a trainer must not be copied")

    model = vit()
    model.blocks[0].register_forward_hook(Trainer().hook)
    flexible(model).set_size(160)
    assert model(pictures(160)).shape == (2, 3)


def convit(img_size: int = 96) -> Any:
    return timm.create_model("convit_tiny", depth=2, local_up_to_layer=1, img_size=img_size, drop_path_rate=0.2)


def test_changing_the_size_draws_no_random_numbers() -> None:
    model = convit()
    state = torch.get_rng_state()
    assert flexible(model, rebuild=convit).set_size(160)
    assert torch.equal(torch.get_rng_state(), state)


def test_fresh_model_for_the_size_gives_only_what_depends_on_it() -> None:
    model = convit()
    model.blocks[1].drop_path.drop_prob = 0.7
    weight = model.head.weight.detach().clone()
    flexible(model, rebuild=convit).set_size(160)
    assert model.blocks[1].drop_path.drop_prob == 0.7
    assert torch.equal(model.head.weight, weight)


def test_optimizer_of_before_set_input_size_is_stale() -> None:
    model = vit()
    optimizer = adamw(model)
    model.set_input_size((160, 160))
    with pytest.raises(UserError, match=r"does not hold pos_embed of the model, but 1 tensors .* stale"):
        flexible(model, optimizer)


def test_set_input_size_behind_the_back_is_noticed() -> None:
    model = vit()
    flex = flexible(model, adamw(model))
    model.set_input_size((160, 160))
    with pytest.raises(UserError, match="stale after set_input_size"):
        flex.set_size(192)


def test_optimizers_of_parts_and_of_more_than_the_model_are_fine() -> None:
    model, extra = vit(), nn.Linear(2, 2)
    flexible(model, torch.optim.SGD(model.head.parameters(), lr=0.1)).set_size(160)
    whole = torch.optim.SGD([*model.parameters(), *extra.parameters()], lr=0.1)
    assert flexible(model, whole).size == 160


def test_frozen_parameters_may_be_in_the_optimizer_or_not() -> None:
    model = vit()
    model.pos_embed.requires_grad_(False)
    flex = flexible(model, [adamw(model.blocks), torch.optim.SGD([model.pos_embed, *model.head.parameters()], lr=0.1)])
    assert flex.set_size(160)


@pytest.mark.parametrize(
    ("make", "size", "near"),
    [(vit, 100, "96 and 112"), (swin, 170, "168 and 176"), (vit, 7, "16"), (vit, (96, 100), "96 and 96x112")],
)
def test_size_that_does_not_fit_names_requirement_and_neighbours(
    make: Any, size: int | tuple[int, int], near: str
) -> None:
    flex = flexible(make())
    with pytest.raises(UserError, match=rf"not a multiple of {flex.requires}, .* the nearest valid sizes are {near}$"):
        flex.set_size(size)
    assert flex.size == 96


def test_nearest_sizes_include_the_size_itself_where_it_fits() -> None:
    flex = flexible(vit())
    assert flex.nearest(160) == (160,)
    assert flex.nearest(161) == (160, 176)
    assert flex.nearest((96, 100)) == (96, (96, 112))


def test_failed_change_leaves_everything_as_it_was() -> None:
    model = vit()
    flex = flexible(model)
    shape = model.pos_embed.shape
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
    model.set_input_size = lambda *_, **__: (_ for _ in ()).throw(ValueError("not today"))
    with pytest.raises(UserError, match="set_input_size refuses input size 160: not today"):
        flex.set_size(160)
    assert (flex.size, model.pos_embed.shape) == (96, shape)


def test_own_net_for_every_size_is_taken_as_it_is() -> None:
    model = Net().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    flex = flexible(model, adamw(model))
    assert (flex.how, flex.family, flex.requires, flex.size) == ("any size", "own model", 1, None)
    assert not flex.set_size(37)
    assert flex.size == 37
    assert model.training
    assert model.body[3].training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_own_net_for_one_size_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"Flat .*fails at 96 pixels .* give flexible rebuild="):
        flexible(Flat())


def test_own_net_for_one_size_moves_if_it_can_be_made_for_another() -> None:
    model = Flat(8)
    optimizer, average = adamw(model), copy.deepcopy(model)
    expected = transfer_state({"pos_embed": model.position.detach()}, 8, 12, patch_size=1)["pos_embed"]
    flex = flexible(model, optimizer, average, size=8, rebuild=Flat)
    assert flex.set_size(12)
    assert torch.equal(model.position, expected)
    assert torch.equal(average.position, expected)
    assert (model.size, len(model.ramp)) == (12, 12)
    step(model, optimizer, 12)


def test_rebuilding_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="differs from this model, first in position"):
        flexible(Flat(8), size=12, rebuild=Flat).set_size(16)


def test_size_that_rebuilding_refuses_says_so() -> None:
    def only_eight(size: int) -> Flat:
        if size != 8:
            raise ValueError("expected 8")
        return Flat()

    with pytest.raises(UserError, match="Flat cannot be made for input size 16: expected 8"):
        flexible(Flat(), size=8, rebuild=only_eight).set_size(16)


def test_model_that_does_not_tell_its_size_has_to_be_told() -> None:
    with pytest.raises(UserError, match="does not tell its input size: give flexible size="):
        flexible(Flat(), rebuild=Flat)


def test_factory_model_with_lost_arguments_is_refused_with_what_to_do() -> None:
    model = convit()
    model._model_args = {}
    with pytest.raises(UserError, match=r"differs from this model.* rebuild="):
        flexible(model, size=96).set_size(160)


def test_own_set_input_size_carries_moments_and_averages_by_its_own_map() -> None:
    torch.manual_seed(0)
    model = Swin(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 2), softmax_window=8, ape=True, img_size=64)
    twin, optimizer, average = copy.deepcopy(model), adamw(model), copy.deepcopy(model)
    step(model, optimizer, 64)
    weights = copy.deepcopy(model)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    moment = optimizer.state[model.absolute_pos_embed]["exp_avg"].clone()
    flex = flexible(model, optimizer, average)
    assert (flex.requires, flex.how) == (32, "in place")
    assert flex.set_size(96)
    weights.set_input_size(96)
    twin.set_input_size(96)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert torch.equal(model.absolute_pos_embed, weights.absolute_pos_embed)
    assert torch.equal(average.absolute_pos_embed, twin.absolute_pos_embed)
    carrier = Swin(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 2), softmax_window=8, ape=True, img_size=64)
    carrier.absolute_pos_embed.data = moment
    carrier.set_input_size(96)
    assert torch.equal(optimizer.state[model.absolute_pos_embed]["exp_avg"], carrier.absolute_pos_embed)
    assert optimizer.state[model.absolute_pos_embed]["exp_avg_sq"].min() >= 0
    step(model, optimizer, 96)


@pytest.mark.gpu
def test_states_stay_on_the_gpu() -> None:
    model = swin().cuda()
    optimizer = adamw(model)
    model(pictures(96).cuda()).sum().backward()
    optimizer.step()
    flexible(model, optimizer, copy.deepcopy(model)).set_size(160)
    model(pictures(160).cuda()).sum().backward()
    optimizer.step()
    assert all(value.is_cuda for value in model.buffers())
