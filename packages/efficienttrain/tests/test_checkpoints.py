"""Files: released ones in every envelope, other sizes and classes, refusals that say what to do, and round trips."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import metaformer
from torch import Tensor, nn

from leap_efficienttrain.checkpoints import convert, load_checkpoint, load_state, read_checkpoint, save_official
from leap_efficienttrain.models import create_model
from leap_efficienttrain.official import COMPUTED, family_of, official_names, official_state, timm_names
from leap_shared.checkpoints import write_safetensors
from leap_shared.errors import UserError
from leap_shared.testing import golden
from leap_shared.testing.fill import fill_state

GOLDEN = Path(__file__).parent / "golden"
SCHEMAS = {case["schema"]: case for case in golden.cases(GOLDEN, "model_")}
NAMES = ("deit_tiny_patch16_224", "swin_tiny", "CSWin_64_12211_tiny_224", "convnext_tiny", "caformer_s18", "resnet50")
CAFORMER = {
    "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
    "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
}
# timm's classes at a size that takes no time; the family is told by names alone
TINY: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin_tiny": {"embed_dim": 6, "depths": (2, 2, 2, 1), "num_heads": (1, 1, 2, 2)},
    "CSWin_64_12211_tiny_224": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 2)},
    "convnext_tiny": {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1)},
    "caformer_s18": {"dims": (8, 8, 32, 32), "depths": (1, 1, 1, 1), **CAFORMER},
    "resnet50": {"channels": (8, 8, 8, 8), "stem_width": 8},
}
State = dict[str, Tensor]

every_family = pytest.mark.parametrize("name", TINY)


def tiny(name: str, size: int = 64, num_classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if name == "caformer_s18":  # whose sizes timm's function does not let through
        model: nn.Module = metaformer.MetaFormer(num_classes=num_classes, **TINY[name]).eval()
        model.pretrained_cfg = {"classifier": "head.fc.fc2"}  # type: ignore[assignment]
    else:
        model = create_model(name, size=size, num_classes=num_classes, **TINY[name]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def answers(model: nn.Module, size: int = 64) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7)))
    return out


def same(model: nn.Module, other: nn.Module) -> bool:
    states = model.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.golden
@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_released_names_and_shapes_load_strictly(tmp_path: Path, schema: str) -> None:
    """The whole file, with Swin's index tables and masks, into a model that the file alone tells."""
    case, entries = SCHEMAS[schema], golden.read_schema(GOLDEN / schema)
    filled = fill_state(
        {name: (shape, dtype) for name, (shape, dtype) in entries.items() if not name.endswith(COMPUTED)}
    )
    state = {name: torch.from_numpy(value) for name, value in filled.items()}
    state |= {name: torch.zeros(shape) for name, (shape, _) in entries.items() if name.endswith(COMPUTED)}
    arguments = argparse.Namespace(model=case["model"], input_size=case["img_size"], lr=4e-3)
    path = saved(tmp_path / "ET_pp_200ep_x.pth", {"model": state, "optimizer": {}, "epoch": "best", "args": arguments})
    model = load_checkpoint(path)
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]
    written = official_state(model)
    assert {name: tuple(value.shape) for name, value in written.items()} == {
        name: shape for name, (shape, _) in entries.items()
    }
    assert all(torch.equal(written[name], value) for name, value in state.items() if not name.endswith(COMPUTED))


@every_family
def test_official_names_go_to_timms_and_back(name: str) -> None:
    model = tiny(name)
    official = official_names(model.state_dict())
    back = timm_names(official, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(value, back[key]) for key, value in model.state_dict().items())


@every_family
def test_the_family_is_told_by_either_names(name: str) -> None:
    state = tiny(name).state_dict()
    families = {family_of(state)[0], family_of(official_names(state))[0]}
    assert families == {name.lower().split("_")[0].removesuffix("50")}


@pytest.mark.parametrize("name", ["swin_tiny", "convnext_tiny", "caformer_s18"])
def test_official_names_map_as_timms_own_filter_maps_them(name: str) -> None:
    model = tiny(name)
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    official = official_names(model.state_dict())
    mapped = module.checkpoint_filter_fn(dict(official), model)
    ours = timm_names(official, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    assert {key: value.shape for key, value in mapped.items()} == {key: value.shape for key, value in ours.items()}


@every_family
def test_a_file_in_the_released_layout_restores_the_model(tmp_path: Path, name: str) -> None:
    model, other = tiny(name), tiny(name, seed=1)
    save_official(model, tmp_path / "x.pth", epoch=3)
    assert load_checkpoint(tmp_path / "x.pth", other) is other
    assert same(model, other)
    torch.testing.assert_close(answers(other), answers(model), rtol=0, atol=0)


def test_what_is_written_is_the_released_envelope(tmp_path: Path) -> None:
    model = tiny("swin_tiny", size=96)
    save_official(model, tmp_path / "x.pth", epoch=12, ema=tiny("swin_tiny", size=96, seed=1))
    content = torch.load(tmp_path / "x.pth", weights_only=False)
    assert content["epoch"] == 12
    assert content["args"].input_size == 96
    assert {"layers.0.downsample.norm.weight", "head.weight", "layers.0.blocks.1.attn_mask"} <= content["model"].keys()
    assert content["model"]["layers.0.blocks.0.attn.relative_position_index"].shape == (9, 9)
    assert content["model_ema"].keys() == content["model"].keys()


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_weights_are_found_in_every_envelope(tmp_path: Path, key: str | None) -> None:
    model, other = tiny("convnext_tiny"), tiny("convnext_tiny", seed=1)
    state = official_state(model)
    load_checkpoint(saved(tmp_path / "x.pth", {key: state} if key else state), other)
    assert same(model, other)


def test_the_model_entry_is_searched_before_the_module_entry(tmp_path: Path) -> None:
    first, second, other = (tiny("resnet50", seed=seed) for seed in range(3))
    path = saved(tmp_path / "x.pth", {"module": second.state_dict(), "model": first.state_dict()})
    assert same(load_checkpoint(path, other), first)


def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    model, other = tiny("deit_tiny_patch16_224"), tiny("deit_tiny_patch16_224", seed=1)
    state = {f"module.{name}": value for name, value in official_state(model).items()}
    assert same(load_checkpoint(saved(tmp_path / "x.pth", {"model": state}), other), model)


def test_arguments_and_epoch_are_read_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {
        "model": tiny("resnet50").state_dict(),
        "epoch": 199,
        "args": argparse.Namespace(input_size=160, lr=4e-3),
    }
    found = read_checkpoint(saved(tmp_path / "x.pth", content))
    assert (found.epoch, found.size, found.num_classes, found.arguments["lr"]) == (199, 160, 5, 4e-3)
    assert not caplog.records


RAN: list[str] = []


class Foreign:
    """Calls a function when unpickled by the ordinary reader."""

    def __init__(self, function: Any, argument: Any) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def run(name: str) -> None:
    RAN.append(name)


def test_code_of_others_is_skipped_and_never_run(tmp_path: Path) -> None:
    model = tiny("resnet50")
    path = saved(tmp_path / "x.pth", {"model": model.state_dict(), "scaler": Foreign(run, "x")})
    assert same(load_checkpoint(path, tiny("resnet50", seed=1)), model)
    assert not RAN


def test_a_file_that_asks_for_a_system_call_is_refused(tmp_path: Path) -> None:
    content = {"model": tiny("resnet50").state_dict(), "scaler": Foreign(os.mkdir, str(tmp_path / "ran"))}
    with pytest.raises(UserError, match="can only be read by running code"):
        load_checkpoint(saved(tmp_path / "x.pth", content), tiny("resnet50", seed=1))
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": Foreign(run, "x")}))
    with pytest.raises(UserError, match="bare pickle"):
        load_checkpoint(tmp_path / "x.pth", tiny("resnet50"))


def test_the_moving_average_is_taken_on_request(tmp_path: Path) -> None:
    model, average, other = (tiny("convnext_tiny", seed=seed) for seed in range(3))
    save_official(model, tmp_path / "x.pth", ema=average)
    assert same(load_checkpoint(tmp_path / "x.pth", other, which="ema"), average)


def test_a_file_without_moving_average_is_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    save_official(tiny("convnext_tiny"), tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds no moving average"):
        load_checkpoint(tmp_path / "x.pth", tiny("convnext_tiny"), which="ema")


def test_the_folder_of_a_training_is_read(tmp_path: Path) -> None:
    model, average, other = (tiny("swin_tiny", seed=seed) for seed in range(3))
    write_safetensors(tmp_path / "weights.safetensors", model.state_dict())
    write_safetensors(tmp_path / "ema.safetensors", average.state_dict())
    assert same(load_checkpoint(tmp_path, other), model)
    assert same(load_checkpoint(tmp_path, other, which="ema"), average)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny"])
def test_tables_of_another_size_are_resampled_bilinearly(tmp_path: Path, name: str) -> None:
    model, other = tiny(name, size=96), tiny(name, size=160, seed=1)
    save_official(model, tmp_path / "x.pth")
    load_checkpoint(tmp_path / "x.pth", other)
    if name == "swin_tiny":
        table = model.layers[1].blocks[0].attn.relative_position_bias_table  # type: ignore[union-attr, index]
        found = other.layers[1].blocks[0].attn.relative_position_bias_table.T.reshape(1, -1, 9, 9)  # type: ignore[union-attr, index]
        old, grid = table.T.reshape(1, -1, 5, 5), (9, 9)
    else:
        assert torch.equal(other.pos_embed[:, 0], model.pos_embed[:, 0])  # type: ignore[index]
        found = other.pos_embed[:, 1:].mT.reshape(1, -1, 10, 10)  # type: ignore[index]
        old, grid = model.pos_embed[:, 1:].mT.reshape(1, -1, 6, 6), (10, 10)  # type: ignore[index]
    torch.testing.assert_close(found, nn.functional.interpolate(old, grid, mode="bilinear", align_corners=False))
    assert torch.equal(
        other.head.weight if name != "swin_tiny" else other.head.fc.weight, official_state(model)["head.weight"]
    )  # type: ignore[union-attr]


def test_another_size_is_refused_where_resizing_is_off(tmp_path: Path) -> None:
    save_official(tiny("deit_tiny_patch16_224", size=96), tmp_path / "x.pth")
    other = tiny("deit_tiny_patch16_224", size=160)
    with pytest.raises(UserError, match="for images of 96 pixels: pass resize=True"):
        load_checkpoint(tmp_path / "x.pth", other, resize=False)


@every_family
def test_a_head_for_other_classes_is_refused_or_stays_the_models_own(tmp_path: Path, name: str) -> None:
    model, other, untouched = tiny(name), tiny(name, num_classes=9, seed=1), tiny(name, num_classes=9, seed=1)
    save_official(model, tmp_path / "x.pth")
    with pytest.raises(UserError, match="for 5 classes: pass new_head=True"):
        load_checkpoint(tmp_path / "x.pth", other)
    assert same(other, untouched)
    load_checkpoint(tmp_path / "x.pth", other, new_head=True)
    states = [official_names(given.state_dict()) for given in (other, untouched, model)]
    own = {key for key in states[0] if states[0][key].shape != states[2][key].shape}
    assert {key.rpartition(".")[2] for key in own} == {"weight", "bias"}
    assert all(torch.equal(value, states[1 if key in own else 2][key]) for key, value in states[0].items())


@every_family
def test_a_model_without_head_takes_the_body_alone(tmp_path: Path, name: str) -> None:
    save_official(tiny(name), tmp_path / "x.pth")
    other = tiny(name, num_classes=0, seed=1)
    load_checkpoint(tmp_path / "x.pth", other, new_head=True)
    body = official_names(tiny(name).state_dict())
    assert all(torch.equal(value, body[key]) for key, value in official_names(other.state_dict()).items())


def test_misfits_are_named_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    state = official_state(tiny("convnext_tiny"))
    state["stray.weight"] = state.pop("stages.0.0.gamma")
    state["stages.1.0.gamma"] = torch.ones(3)
    other, untouched = tiny("convnext_tiny", seed=1), tiny("convnext_tiny", seed=1)
    with pytest.raises(UserError) as caught:
        load_checkpoint(saved(tmp_path / "x.pth", state), other)
    for part in ("missing: stages.0.blocks.0.gamma", "unexpected: stray.weight", "(3,) in the file, (8,) in the model"):
        assert part in str(caught.value)
    assert same(other, untouched)


def test_no_more_than_five_misfits_of_a_kind_are_named() -> None:
    state = {name: value for name, value in official_state(tiny("resnet50")).items() if not name.startswith("layer1.0")}
    with pytest.raises(UserError, match=r"missing: ([\w.]+, ){4}[\w.]+ and 15 more"):
        load_state(tiny("resnet50"), state)


def test_what_does_not_fit_is_left_out_and_logged_where_it_may_be(caplog: pytest.LogCaptureFixture) -> None:
    model, other = tiny("resnet50"), tiny("resnet50", seed=1)
    state = {**official_state(model), "stray": torch.ones(1)}
    del state["fc.bias"]
    with caplog.at_level(logging.WARNING):
        load_state(other, state, strict=False)
    assert "1 missing: fc.bias; 1 unexpected: stray" in caplog.text
    assert torch.equal(other.fc.weight, model.fc.weight)  # type: ignore[union-attr]


def test_weights_of_another_model_are_refused_with_the_one_that_they_fit(tmp_path: Path) -> None:
    save_official(create_model("deit_tiny", size=64, num_classes=3), tmp_path / "x.pth")
    with pytest.raises(UserError, match="It fits deit_tiny_patch16_224"):
        load_checkpoint(tmp_path / "x.pth", tiny("resnet50"))


def test_a_file_of_no_known_model_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the model to load it into"):
        load_checkpoint(saved(tmp_path / "x.pth", {"weight": torch.ones(2)}))


def test_a_model_of_timm_that_the_arguments_name_is_built(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3)
    path = saved(tmp_path / "x.pth", {"model": model.state_dict(), "args": argparse.Namespace(model="resnet18")})
    assert same(load_checkpoint(path), model)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path / "ET_pp_200ep_swinT.pth")


def test_an_unknown_kind_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 'model' or 'ema'"):
        read_checkpoint(tmp_path / "x.pth", which="best")  # type: ignore[arg-type]


def test_batch_counters_may_be_missing() -> None:
    model, other = tiny("resnet50"), tiny("resnet50", seed=1)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert same(load_state(other, state), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_conversion_to_timm_and_back_keeps_every_bit(tmp_path: Path, name: str) -> None:
    model = create_model(name, size=96, num_classes=7).eval()
    save_official(model, tmp_path / "a.pth", size=96, epoch=4)
    report = convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pth", to="official")
    first, last = (torch.load(tmp_path / f"{letter}.pth", weights_only=False) for letter in "ac")
    assert report.variant == name
    assert first["args"] == last["args"]
    assert first["model"].keys() == last["model"].keys()
    assert all(torch.equal(value, last["model"][key]) for key, value in first["model"].items())
    assert same(load_checkpoint(tmp_path / "b.safetensors"), model)


def test_a_converted_file_is_one_that_timm_loads(tmp_path: Path) -> None:
    model = create_model("deit_tiny", size=32, num_classes=3)
    save_official(model, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.pth", to="timm")
    other = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3, checkpoint_path=tmp_path / "b.pth")
    assert same(other, model)


def test_conversion_keeps_half_precision(tmp_path: Path) -> None:
    model = create_model("deit_tiny", size=32, num_classes=3).half()
    convert(saved(tmp_path / "a.pth", {"model": model.state_dict()}), tmp_path / "b.safetensors")
    assert {value.dtype for value in read_checkpoint(tmp_path / "b.safetensors").state.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("b.bin", {}, r"ends in \.bin: expected \.pth or \.safetensors"),
        ("a.pth", {}, "would replace the file"),
        ("b.pth", {"to": "keras"}, "expected 'timm' or 'official'"),
        ("b.pth", {}, "fits no model of the papers"),
        ("missing/b.pth", {}, "fits no model"),
    ],
)
def test_conversions_that_cannot_be_are_refused(
    tmp_path: Path, target: str, options: dict[str, Any], message: str
) -> None:
    saved(tmp_path / "a.pth", {"weight": torch.ones(2)})
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a.pth", tmp_path / target, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]
