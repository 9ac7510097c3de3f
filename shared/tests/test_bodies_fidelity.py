"""The bodies against official numbers, against timm's twins, and against the official names of parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_shared.testing import fill, golden
from leap_shared.vision.bodies import PVT, CSWin, PVTv2, Site, Swin, drop_computed
from leap_shared.vision.bodies.grids import Size, to_image, to_tokens

GOLDEN = Path(__file__).parent / "golden" / "bodies"
FLOAT32_ROUNDING = 1e-5  # relative to the largest logit: another order of the same float32 sums


def filled(schema: dict[str, tuple[tuple[int, ...], str]], scales: dict[str, float] | None = None) -> dict[str, Tensor]:
    state = {name: torch.from_numpy(values) for name, values in fill.fill_state(schema).items()}
    for suffix, scale in (scales or {}).items():
        scaled = {name: fill.tensor(name, value.shape, scale) for name, value in state.items() if name.endswith(suffix)}
        state |= {name: torch.from_numpy(values) for name, values in scaled.items()}
    return drop_computed(state)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


class Focused(nn.Module):
    """Focused linear attention with mean denominators, on queries, keys and values."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.num_heads, width = site.num_heads, site.dim // site.num_heads
        tokens = site.input_size[0] * site.input_size[1] // site.sr_ratio**2
        self.dwc = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.scale = nn.Parameter(torch.zeros(1, 1, site.dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, tokens, site.dim))

    def focus(self, x: Tensor) -> Tensor:
        x = (F.relu(x) + 1e-6) / F.softplus(self.scale)
        return x**3 / (x**3).norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, hw: Size) -> Tensor:
        query, key = self.focus(query), self.focus(key + self.positional_encoding)
        query, key, value = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        share = 1 / ((query * key.mean(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6)
        out = query @ (key.transpose(2, 3) @ value / key.shape[2]) * share
        local = to_tokens(self.dwc(to_image(value.flatten(0, 1), hw))).unflatten(0, (-1, self.num_heads))
        return (out + local).transpose(1, 2).flatten(2)


class FocusedLinear(Focused):
    """With the projections of Swin (`qkv`) or PVT (`q`, `kv`)."""

    def __init__(self, site: Site, fused: bool) -> None:
        super().__init__(site)
        self.fused, dim = fused, site.dim
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        if site.sr_ratio > 1:
            self.sr, self.norm = nn.Conv2d(dim, dim, site.sr_ratio, site.sr_ratio), nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, hw: Size) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), *self.kv(x).chunk(2, -1))
        return self.proj(self.attend(*parts, hw))


class FocusedBranch(Focused):
    """As a branch of CSWin."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.get_v = nn.Conv2d(site.dim, site.dim, 3, padding=1, groups=site.dim)

    def forward(self, qkv: Tensor, hw: Size) -> Tensor:
        return self.attend(*qkv, hw) + to_tokens(self.get_v(to_image(qkv[2], hw)))


class Slide(nn.Module):
    """Parameters of slide attention, without its frozen kernel."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        width = site.dim // site.num_heads
        self.qkv, self.proj = nn.Linear(site.dim, 3 * site.dim), nn.Linear(site.dim, site.dim)
        self.dep_conv = nn.ParameterDict({"bias": torch.zeros(9 * width)})
        self.dep_conv1 = nn.Conv2d(width, 9 * width, 3, groups=width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(1, site.num_heads, 1, 9, 1, 1))


def linear(fused: bool) -> Callable[[Site], nn.Module]:
    return lambda site: FocusedLinear(site, fused)


SMALL = {"embed_dims": (16, 32, 40, 64), "img_size": 64, "num_classes": 10}
OFFICIAL = {
    "cswin_tiny": lambda: CSWin(num_classes=100),
    "cswin_reduced": lambda: CSWin(
        img_size=32,
        embed_dim=16,
        depths=(1, 1, 2, 1),
        split_sizes=(1, 2, 1, 1),
        num_classes=10,
        attn_type="LLSS",
        branch_attention=FocusedBranch,
    ),
    "flatten_pvt_tiny_224": lambda: PVT(attn_type="LLLL", attention=linear(fused=False)),
    "flatten_swin_tiny_224": lambda: Swin(attn_type="LLSS", attention=linear(fused=True)),
    "pvt_v2_reduced_dev": lambda: PVTv2(
        depths=(1, 1, 1, 1),
        attn_type="LLLL",
        attention_sr_ratios=(2, 1, 1, 1),
        attention=linear(fused=False),
        **SMALL,
    ),
    "derived_slide_pvt_small": lambda: PVT(depths=(1, 2, 2, 1), attn_type="LLSS", attention=Slide, **SMALL),
    "slide_swin_tiny_224": lambda: Swin(attn_type="LLSS", softmax_window=56, attention=Slide),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_of_parameters_are_the_official_ones(name: str) -> None:
    with torch.device("meta"):
        model = OFFICIAL[name]()
    schema = golden.read_schema(GOLDEN / "schemas" / f"{name}.json.gz")
    computed = ("relative_position_index", "attn_mask")
    assert shapes(model) == {key: shape for key, (shape, _) in schema.items() if not key.endswith(computed)}


@pytest.mark.golden
@pytest.mark.parametrize("case", golden.cases(GOLDEN, "model_cswin"), ids=lambda case: case.name)
def test_cswin_gives_the_official_logits_and_gradients(case: golden.Case) -> None:
    model = CSWin(img_size=case["img_size"], num_classes=100, split_sizes=(1, 2, 0.5, 1.0)).eval()
    model.load_state_dict(filled(golden.read_schema(GOLDEN / case["schema"])))
    name, shape = case["input"]
    image = torch.from_numpy(fill.tensor(name, shape)).requires_grad_()
    logits = model(image)
    golden.assert_close(logits.detach(), case.arrays["logits"], case.tolerance, "logits")
    if case["cotangent"]:
        name, shape = case["cotangent"]
        (logits * torch.from_numpy(fill.tensor(name, shape))).sum().backward()
        assert image.grad is not None
        golden.assert_close(golden.digest(image.grad), case.arrays["grad_input_stats"], case.tolerance, "gradient")


@pytest.mark.golden
@pytest.mark.parametrize("name", ["flatten_pvt_tiny_224", "flatten_swin_tiny_224", "cswin_reduced"])
def test_a_plugged_in_attention_gives_the_official_logits(name: str) -> None:
    (case,) = golden.cases(GOLDEN, name)
    model = OFFICIAL[name]().eval()
    schema = golden.read_schema(GOLDEN / "schemas" / f"{name}.json.gz")
    model.load_state_dict(filled(schema, {"positional_encoding": 0.5, ".scale": 0.7}))
    with torch.no_grad():
        tokens = model.forward_features(torch.from_numpy(fill.tensor(*case["input"])))
        golden.assert_close(
            model.forward_head(tokens, pre_logits=True), case.arrays["pooled"], case.tolerance, "pooled"
        )
        golden.assert_close(model.forward_head(tokens), case.arrays["logits"], case.tolerance, "logits")


def from_timm_swin(name: str) -> str:
    return re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name).replace(
        ".fc.", "."
    )


def from_timm_pvt(name: str) -> str:
    parts = {"blocks": "block", "downsample": "patch_embed", "norm": "norm"}
    name = re.sub(r"^stages\.(\d)\.(\w+)", lambda m: f"{parts[m[2]]}{int(m[1]) + 1}", name)
    return re.sub(r"^patch_embed\.", "patch_embed1.", name).replace("mlp.dwconv", "mlp.dwconv.dwconv")


@pytest.mark.parametrize(
    ("twin", "rename", "body", "size"),
    [
        ("swin_tiny_patch4_window7_224", from_timm_swin, Swin, (224, 224)),
        ("swin_tiny_patch4_window7_224", from_timm_swin, Swin, (256, 320)),  # windows need padding
        ("pvt_v2_b1", from_timm_pvt, PVTv2, (224, 224)),
        ("pvt_v2_b1", from_timm_pvt, PVTv2, (96, 160)),
    ],
)
def test_softmax_bodies_equal_their_twins_in_timm(
    twin: str, rename: Callable[[str], str], body: Callable[..., nn.Module], size: Size
) -> None:
    options = {"img_size": size, "window_size": 7} if "swin" in twin else {}
    theirs = timm.create_model(twin, num_classes=10, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
        ours = body(num_classes=10, img_size=size).eval()
        ours.load_state_dict(drop_computed({rename(name): value for name, value in theirs.state_dict().items()}))
        image = torch.randn(1, 3, *size, generator=generator)
        want, got = theirs(image), ours(image)
    assert (got - want).abs().max() <= FLOAT32_ROUNDING * want.abs().max()


@pytest.mark.parametrize(
    ("millions", "build"),
    [
        (13.2, PVT),
        (24.5, lambda: PVT(depths=(3, 4, 6, 3))),
        (44.2, lambda: PVT(depths=(3, 4, 18, 3))),
        (22.320552, CSWin),
        (77.382184, lambda: CSWin(embed_dim=96, depths=(2, 4, 32, 2), num_heads=(4, 8, 16, 32))),
        (28.288354, Swin),
    ],
)
def test_number_of_parameters_is_the_published_one(millions: float, build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        count = sum(value.numel() for value in build().parameters()) / 1e6
    assert round(count, len(str(millions).partition(".")[2])) == millions
