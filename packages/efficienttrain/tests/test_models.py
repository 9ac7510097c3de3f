"""Models: the table's counts, CSWin at every size, timm's interface, and sizes and names that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leap_efficienttrain.models import VARIANTS, CSWin, create_model, find
from leap_shared.errors import UserError
from leap_shared.testing.operators import without_type_checks

SMALL: dict[str, Any] = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 2, 2), "num_classes": 5}
COUNTING_ERROR = 5e-4  # the table has four digits behind the point

sizes = st.integers(2, 12).map(lambda n: 32 * n)


def small(size: int = 64, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_model("cswin_tiny", size=size, **{**SMALL, **options}).eval()


def pictures(size: int, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def counted(name: str, size: int) -> tuple[int, float]:
    """Parameters, and multiply-adds of one picture in 10^9."""
    with torch.device("meta"):
        model = create_model(name, size=size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, size, size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny", "CSWin_64_12211_tiny_224", "caformer_s18"])
def test_parameters_and_operations_at_224_are_those_of_the_table(name: str) -> None:
    variant = VARIANTS[name]
    assert counted(name, 224) == (variant.parameters, pytest.approx(variant.gmac[224], abs=COUNTING_ERROR))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith("_384")])
def test_every_model_has_the_counts_of_the_table(name: str) -> None:
    variant = VARIANTS[name]
    (_, small_size), (parameters, full_size) = counted(name, 96), counted(name, 224)
    assert (small_size, full_size) == pytest.approx((variant.gmac[96], variant.gmac[224]), abs=COUNTING_ERROR)
    assert parameters == variant.parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_near_the_published_ones(name: str) -> None:
    assert VARIANTS[name].gmac[224] == pytest.approx(VARIANTS[name].published_gmac, rel=0.06)


@pytest.mark.parametrize(("name", "parameters"), [("swin_tiny", 28_268_482), ("deit_small", 21_989_224)])
def test_tables_of_small_sizes_are_small(name: str, parameters: int) -> None:
    assert counted(name, 96)[0] == parameters


@settings(max_examples=12, deadline=None)
@given(sizes, sizes)
def test_no_entry_of_cswin_depends_on_the_size(first: int, second: int) -> None:
    shapes = [{key: value.shape for key, value in small(size).state_dict().items()} for size in (first, second)]
    assert shapes[0] == shapes[1]


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([64, 96, 160]), st.sampled_from([64, 96, 160, 192]))
def test_cswin_set_to_a_size_answers_as_if_built_for_it(first: int, second: int) -> None:
    model, built = small(first), small(second)
    parameters = list(model.parameters())
    model.set_input_size(second)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(pictures(second)), built(pictures(second)), rtol=0, atol=0)


@pytest.mark.parametrize("size", [96, 224, 384])
def test_stripes_of_stage_3_are_size_over_32_wide_whatever_the_name_says(size: int) -> None:
    seen: list[tuple[int, int]] = []
    model = create_model("CSWin_96_24322_base_224", size=size, **SMALL).eval()
    for branch in model.stage3[0].attns:  # type: ignore[union-attr, index]
        branch.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        model(pictures(size))
    assert seen == [(size // 16, size // 32), (size // 32, size // 16)]


@pytest.mark.parametrize("name", ["CSWin_64_24322_small_224", "cswin_small"])
def test_timm_knows_cswin_by_the_released_and_by_a_short_name(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model, CSWin)
    assert sum(parameter.numel() for parameter in model.parameters()) == 34_643_304


def test_released_names_of_384_pixels_are_built_for_them() -> None:
    with torch.device("meta"):
        assert timm.create_model("CSWin_96_24322_base_384").img_size == (384, 384)


def test_cswin_gives_a_pyramid_of_features() -> None:
    model = timm.create_model("cswin_tiny", features_only=True, **SMALL)
    assert [tuple(level.shape[1:]) for level in model(pictures(96))] == [
        (8, 24, 24),
        (16, 12, 12),
        (32, 6, 6),
        (64, 3, 3),
    ]


def test_cswin_starts_as_the_paper_says() -> None:
    model = small(embed_dim=32)
    linear = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert linear.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert all(m.weight.eq(1).all() and not m.bias.any() and m.eps == 1e-5 for m in norms)


def test_drop_path_of_cswin_grows_linearly_over_all_blocks() -> None:
    model = small(drop_path_rate=0.5)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for i in range(4) for block in getattr(model, f"stage{i + 1}")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_cswin_spares_no_table_from_decay() -> None:
    assert small().no_weight_decay() == set()


@pytest.mark.slow
def test_cswin_exports_and_compiles_to_the_same_answer() -> None:
    model, x = small(), pictures(64)
    torch.compiler.reset()
    with torch.no_grad(), without_type_checks():
        want = model(x)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)


@pytest.mark.parametrize(("size", "window"), [(96, 3), (160, 5), (192, 6), (224, 7)])
def test_windows_of_swin_are_size_over_32_wide(size: int, window: int) -> None:
    with torch.device("meta"):
        model = create_model("swin_tiny", size=size)
    tables = {p.shape[0] for name, p in model.named_parameters() if name.endswith("bias_table")}
    assert tables == {(2 * window - 1) ** 2}


def test_resnet_takes_classes_and_drop_path() -> None:
    model = create_model("resnet50", num_classes=7, drop_path_rate=0.3)
    assert model.fc.out_features == 7  # type: ignore[union-attr]
    assert model.layer4[2].drop_path.drop_prob == pytest.approx(0.3)  # type: ignore[union-attr, index]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_any_model_of_timm_is_built_for_the_size(name: str) -> None:
    with torch.no_grad():
        assert create_model(name, size=64, num_classes=3).eval()(pictures(64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("deit_small", "deit_small_patch16_224"),
        ("swin_base_patch4_window7_224", "swin_base"),
        ("cswin_large", "CSWin_144_24322_large_224"),
        ("convnext_tiny", "convnext_tiny"),
    ],
)
def test_short_and_timms_names_find_the_released_model(name: str, official: str) -> None:
    variant = find(name)
    assert variant is not None
    assert variant.name == official


def test_names_of_other_models_find_nothing() -> None:
    assert find("resnet18") is None


def test_released_files_are_named_with_their_accuracy() -> None:
    assert VARIANTS["swin_tiny"].files["ET_pp_200ep_swinT.pth"] == 81.6
    files = [row.file for row in VARIANTS["CSWin_96_24322_base_224"].pretraining if row.file]
    assert files == ["ET_pp_in22k_pre_trained_speedup2x_cswinB.pth"]


def test_families_are_those_of_the_papers() -> None:
    assert {variant.family for variant in VARIANTS.values()} == {
        "resnet",
        "convnext",
        "deit",
        "swin",
        "cswin",
        "caformer",
    }


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("swin_tiny", 100, "multiples of 32, such as 96 or 128"),
        ("deit_tiny", 90, "multiples of 16, such as 80 or 96"),
        ("cswin_tiny", 16, "multiples of 32, such as 32"),
        ("resnet50", 0, "image size 0"),
    ],
)
def test_sizes_that_a_model_cannot_take_are_refused_with_the_nearest(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, size=size)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean swin_tiny_patch4_window7_224"):
        create_model("swin_tiny_patch4_window7_244")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UserError, match="windows"):
        create_model("swin_tiny", windows=3)
