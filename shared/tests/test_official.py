"""Files of a package's models: variants by name and by shape, hooks of a package, other sizes and heads, conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from leap_shared.checkpoints import write_safetensors
from leap_shared.errors import UserError
from leap_shared.vision import official
from leap_shared.vision.bodies import CSWin, Swin, build, pretrained_config
from leap_shared.vision.bodies.grids import Size
from leap_shared.vision.official import Official, find, read_official, save_safetensors

NAMES = ("leap_official_swin", "leap_official_swin_wide")
default_cfgs = generate_default_cfgs({name: pretrained_config(Swin, input_size=(3, 64, 64)) for name in NAMES})


@register_model
def leap_official_swin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "softmax_window": 4}
    return build(Swin, "leap_official_swin", pretrained, **{"img_size": 64, "num_classes": 5, **sizes, **kwargs})


@register_model
def leap_official_swin_wide(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Like the other, but with tables of other windows."""
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "softmax_window": 8}
    return build(Swin, "leap_official_swin_wide", pretrained, **{"img_size": 64, "num_classes": 5, **sizes, **kwargs})


def counted(name: str) -> int:
    return sum(value.numel() for value in timm.create_model(name).parameters())


VARIANTS = {name: counted(name) for name in NAMES}
OFFICIAL = Official(VARIANTS, {"layers": "leap_official_swin.*"}, "give the path of {name}.pth")


def drawn(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.2
    return model.eval()


def create(**options: Any) -> Any:
    return drawn(OFFICIAL.create_model(NAMES[0], **options))


def logits(model: nn.Module, size: Size = (64, 64)) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)))
    return out


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_nearest_names_are_given_for_an_unknown_one() -> None:
    assert find("swin", {"swin": 3}) == 3
    with pytest.raises(UserError, match="model 'swim' is unknown: did you mean swin"):
        find("swim", {"swin": 3, "pvt": 4})
    with pytest.raises(UserError, match="did you mean leap_official_swin"):
        OFFICIAL.create_model("leap_official_swim")


def test_weights_to_download_do_not_exist_and_the_package_says_what_to_do() -> None:
    message = "^leap_official_swin has no weights to download: give the path of leap_official_swin.pth$"
    with pytest.raises(UserError, match=message):
        OFFICIAL.create_model(NAMES[0], pretrained=True)


@pytest.mark.parametrize("argument", ["checkpoint", "pretrained"])
def test_model_is_created_with_the_weights_of_a_file(tmp_path: Path, argument: str) -> None:
    source = create()
    given: Any = {argument: saved(tmp_path / "w.pth", {"model": source.state_dict()})}
    assert torch.equal(logits(OFFICIAL.create_model(NAMES[0], **given)), logits(source))


def test_feature_pyramid_is_created_with_the_weights_of_a_file(tmp_path: Path) -> None:
    source = create()
    path = saved(tmp_path / "w.pth", source.state_dict())
    pyramid = OFFICIAL.create_model(NAMES[0], checkpoint=path, features_only=True, out_indices=(1, 3)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = source.forward_intermediates(image, indices=(1, 3), intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(pyramid(image), wanted, strict=True))


def test_computed_tables_are_not_read_and_the_average_is_on_request(tmp_path: Path) -> None:
    average = {"norm.weight": torch.ones(2), "layers.2.blocks.1.attn_mask": torch.ones(1)}
    path = saved(tmp_path / "w.pth", {"model": {"norm.weight": torch.zeros(2)}, "state_dict_ema": average})
    assert not read_official(path)["norm.weight"].any()
    state = read_official(path, use_ema=True)
    assert list(state) == ["norm.weight"]
    assert state["norm.weight"].all()


def test_another_size_and_other_classes_are_named_together(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", create(softmax_window=2, num_classes=3).state_dict())
    message = "It is for another image size: pass resize=True and for other classes: pass new_head=True$"
    with pytest.raises(UserError, match=message):
        OFFICIAL.load_official(create(), path)
    model = create()
    OFFICIAL.load_official(model, path, resize=True, new_head=True)
    assert not model.head.weight.any()


def test_resizing_while_loading_equals_setting_the_size(tmp_path: Path) -> None:
    source, model = create(softmax_window=16, ape=True), create(softmax_window=16, ape=True, img_size=96)
    OFFICIAL.load_official(model, saved(tmp_path / "w.pth", source.state_dict()), resize=True)
    source.set_input_size(96)
    assert torch.equal(logits(model, (96, 96)), logits(source, (96, 96)))


def test_tables_of_more_dimensions_are_not_of_places() -> None:
    model: Any = create()
    model.layers[0].blocks[0].attn.relative_position_bias_table = nn.Parameter(torch.zeros(1, 1, 1, 9, 1, 1))
    table = torch.zeros(1, 1, 1, 25, 1, 1)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert OFFICIAL.resize_tables(model, {name: table})[name] is table


def test_bias_table_that_is_no_square_is_refused() -> None:
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(UserError, match=f"{name} has 8 rows: expected a square number"):
        OFFICIAL.resize_tables(create(), {name: torch.zeros(8, 1)})


def test_branches_of_cswin_are_parted_and_joined() -> None:
    sizes: dict[str, Any] = {"embed_dim": 8, "num_heads": (2, 4, 8, 16), "depths": (1, 1, 1, 1)}
    one, two = (CSWin(img_size=size, split_sizes=(1, 2, 7, 7), **sizes) for size in (64, 224))
    name = "stage3.0.attns.{}.get_v.weight"
    whole = one.state_dict()[name.format(0)]
    parted = OFFICIAL.resize_tables(two, one.state_dict())
    assert torch.equal(torch.cat((parted[name.format(0)], parted[name.format(1)])), whole)
    assert torch.equal(OFFICIAL.resize_tables(one, parted)[name.format(0)], whole)


def test_variants_are_told_apart_by_all_but_the_head_before_the_image_size_is_ignored() -> None:
    exact, other_classes = create().state_dict(), create(num_classes=3).state_dict()
    assert OFFICIAL.variants_of(exact) == OFFICIAL.variants_of(other_classes) == [NAMES[0]]
    assert OFFICIAL.variants_of(create(softmax_window=2).state_dict()) == list(NAMES)
    assert OFFICIAL.variants_of({**exact, "norm.weight": torch.zeros(3)}) == []
    assert OFFICIAL.variants_of({"conv1.weight": torch.zeros(3)}) == []


def test_misfit_names_the_variant_that_fits_or_what_the_package_says(tmp_path: Path) -> None:
    model = Swin(img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    with pytest.raises(UserError, match=r"does not fit Swin: .*It fits leap_official_swin$"):
        OFFICIAL.load_official(model, saved(tmp_path / "w.pth", create().state_dict()))
    with pytest.raises(UserError, match="is it one of the authors' classification checkpoints"):
        OFFICIAL.load_official(model, saved(tmp_path / "w.pth", {"conv1.weight": torch.zeros(3)}))


class Renaming(Official):
    """A package whose files call the final norm `last`, and have models with a mark."""

    def prepare(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        del model
        if "broken" in state:
            raise UserError("broken: mend it")
        for leaf in ("weight", "bias"):
            if f"last.{leaf}" in state:
                state[f"norm.{leaf}"] = state.pop(f"last.{leaf}")

    def adapt(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        model.marked = "last.weight" in state  # type: ignore[assignment] # a plain attribute

    def trained(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name.replace("last.", "norm."): value for name, value in state.items()}


RENAMING = Renaming(VARIANTS, OFFICIAL.families, "")


def test_a_package_mends_and_recognises_its_own_forms(tmp_path: Path) -> None:
    source = create()
    state = {
        name.replace("norm.", "last.") if name.startswith("norm.") else name: x
        for name, x in source.state_dict().items()
    }
    path = saved(tmp_path / "w.pth", state)
    assert RENAMING.variants_of(state) == [NAMES[0]]
    model: Any = RENAMING.create_model(NAMES[0], checkpoint=path)
    assert model.marked
    assert torch.equal(logits(model), logits(source))


def test_refusal_of_a_package_is_one_line_with_the_path_and_loads_nothing(tmp_path: Path) -> None:
    model = create()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    path = saved(tmp_path / "w.pth", {**state, "broken": torch.zeros(1)})
    with pytest.raises(UserError, match=r"w\.pth: broken: mend it$"):
        RENAMING.load_official(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_conversion_of_a_variant_compares_tensors_and_logits(tmp_path: Path) -> None:
    source = create()
    save_safetensors(source, tmp_path / "a.safetensors")
    told = OFFICIAL.convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert (told.variant, told.verified, told.parameters) == (NAMES[0], "tensors and logits", VARIANTS[NAMES[0]])
    found = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert "layers.0.blocks.0.attn.relative_position_index" in found
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())


def test_conversion_names_all_variants_that_may_be_meant(tmp_path: Path) -> None:
    save_safetensors(create(softmax_window=2), tmp_path / "a.safetensors")
    told = OFFICIAL.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (told.variant, told.verified) == (" or ".join(NAMES), "tensors")


def test_conversion_writes_what_a_change_makes_of_the_weights(tmp_path: Path) -> None:
    save_safetensors(create(), tmp_path / "a.safetensors")
    told = OFFICIAL.convert(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", change=lambda state: {"one": state["norm.bias"]}
    )
    assert (told.variant, told.verified, told.parameters) == (None, "tensors", 64)
    assert list(read_official(tmp_path / "b.safetensors")) == ["one"]


def test_verification_finds_a_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
        bias = state["norm.bias"]
        write_safetensors(path, {**state, "norm.bias": bias.nextafter(bias + 1)}, metadata)

    save_safetensors(create(), tmp_path / "a.safetensors")
    monkeypatch.setattr(official, "write_safetensors", damaged)
    with pytest.raises(RuntimeError, match=r"1 tensors are not those that were read: \['norm.bias'\]"):
        OFFICIAL.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a.pth", "b.onnx", r"b.onnx ends in .onnx: expected .pth or .safetensors"),
        ("a.npz", "b.pth", r"a.npz ends in .npz: expected"),
        ("a.pth", "a.pth", r"a.pth would replace the file that it is made of: give another name"),
    ],
)
def test_conversion_refuses(tmp_path: Path, source: str, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OFFICIAL.convert(tmp_path / source, tmp_path / target)
