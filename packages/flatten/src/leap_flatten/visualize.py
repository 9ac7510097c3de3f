"""Attention as a matrix: what one head and channel of a linear layer does to its values, its rank, and its pictures."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from leap_flatten.attention import Focused
from leap_flatten.functional import EPSILON, check_focus, epsilon_of, stretch
from leap_flatten.ops import reference
from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.vision.bodies import Block
from leap_shared.vision.bodies.grids import Number, Size
from leap_shared.vision.pictures import INK, load_picture, new_figure, save_figure, to_input

__all__ = [
    "TOLERANCE",
    "EquivalentAttention",
    "draw_attention",
    "draw_spectra",
    "equivalent_attention",
    "layer_input",
    "linear_layers",
    "load_picture",
    "reference_attention_map",
    "to_input",
]

TOLERANCE = 1e-3
"""Singular values above this share of the largest count towards the rank."""

PLAIN, CONVOLVED = "#E69F00", "#0072B2"


@dataclass(frozen=True, eq=False)
class EquivalentAttention:
    """Matrix by which one head and channel of a layer weighs its values: queries down, keys across.

    Attributes:
        matrix: row-major tokens of the map, those before the map first.
        hw: height and width of the queries' map.
        keys_hw: height and width of the keys' map, smaller where PVT reduces it.
        prefix_tokens: tokens before both maps, as DeiT's class token.
    """

    matrix: Float[Tensor, "queries keys"]
    hw: Size
    keys_hw: Size
    prefix_tokens: int = 0

    @cached_property
    def singular_values(self) -> Float[Tensor, " values"]:
        """Singular values, the largest first."""
        values: Tensor = torch.linalg.svdvals(self.matrix)
        return values

    def rank(self, tolerance: Number = TOLERANCE) -> int:
        """Numerical rank: how many singular values exceed `tolerance` (1e-3) times the largest.

        Raises:
            UserError: the tolerance is not in [0, 1).
        """
        if not 0 <= tolerance < 1:
            raise UserError(f"tolerance {tolerance}: expected a share of the largest singular value, in [0, 1)")
        return int((self.singular_values > tolerance * self.singular_values[0]).sum())

    def query_map(self, query: Size | int) -> Float[Tensor, "height width"]:
        """Weights of one query on the keys' map; class tokens as keys are left out.

        Args:
            query: row and column on the map, or the number of a token before it.

        Raises:
            UserError: there is no such token.
        """
        if isinstance(query, int):
            index, inside = query, 0 <= query < self.prefix_tokens
        else:
            index = self.prefix_tokens + query[0] * self.hw[1] + query[1]
            inside = 0 <= query[0] < self.hw[0] and 0 <= query[1] < self.hw[1]
        if not inside:
            expected = f"a row below {self.hw[0]} and a column below {self.hw[1]}"
            raise UserError(
                f"query {query}: expected {expected}, or a number below {self.prefix_tokens} (class tokens)"
            )
        return self.matrix[index, self.prefix_tokens :].reshape(self.keys_hw)


def equivalent_attention(
    attn: nn.Module,
    x: Float[Tensor, "*stacked batch tokens channels"],
    head: int = 0,
    channel: int | str = 0,
    exact: bool = True,
    *,
    hw: Size | None = None,
    item: int = 0,
    convolution: bool = True,
) -> EquivalentAttention:
    """Matrix M_eq of one head and channel of a layer: normalised linear attention plus the convolution (section 3).

    M_eq v + bias, v being the values of that head and channel, is what the layer feeds into `proj`. Borders are
    zero-padded. CSWin's LePE is left out, as it is no part of the paper's matrix. Where PVT has fewer keys than
    queries, their stretching to the map is composed into the convolution, so that it stays exact.

    Args:
        attn: one of this package's layers, Swin's, PVT's or CSWin's.
        x: what the layer is called with.
        head: of the layer.
        channel: of the head, whose kernel is taken; "mean" for the mean of all its kernels.
        exact: whether to give the matrix; else the authors' rendering of it, see `reference_attention_map`, with the
            kernel of this channel and without class tokens.
        hw: height and width of the map; the layer's own where None.
        item: of the batch: which image, window or stripe.
        convolution: whether to add the convolution.

    Raises:
        UserError: the layer is another one, there is no such head, channel or item, or the numbers are not finite.
    """
    if not isinstance(attn, Focused):
        raise UserError(f"{type(attn).__name__} is no focused linear attention: give a layer of leap_flatten")
    with torch.no_grad():
        query, key, hw, keys_hw = _focused(attn, x, hw, item)
        weight, prefix = attn.dwc.weight.to(query.dtype), attn.prefix_tokens
        if not 0 <= head < attn.num_heads:
            raise UserError(f"head {head}: expected 0 to {attn.num_heads - 1}")
        if channel != "mean" and not (isinstance(channel, int) and 0 <= channel < len(weight)):
            raise UserError(f"channel {channel!r}: expected 0 to {len(weight) - 1}, or 'mean'")
        kernel = weight[channel : channel + 1] if isinstance(channel, int) else weight.mean(0, keepdim=True)
        query, key = query[:, head], key[:, head]
        if exact:
            share = query[0] @ key[0].mean(0)[:, None] + epsilon_of(attn.denominator, key.shape[1])
            matrix = query[0] @ key[0].T / (share * key.shape[1])
            if convolution:
                matrix = matrix + _convolution(kernel, keys_hw, hw, prefix)
        elif keys_hw != hw:
            raise UserError("the authors' rendering has no form for reduced keys (sr_ratio above 1): pass exact=True")
        else:
            kernel = kernel if convolution else torch.zeros_like(kernel)
            matrix = reference_attention_map(query[None, :, prefix:], key[None, :, prefix:], kernel, hw)
    if not matrix.isfinite().all():
        raise UserError("the attention is not finite: the input or the layer's weights hold NaN or infinity")
    return EquivalentAttention(matrix, hw, keys_hw, prefix if exact else 0)


def _focused(
    attn: Focused, x: Tensor, hw: Size | None, item: int
) -> tuple[Float[Tensor, "1 heads tokens dim"], Float[Tensor, "1 heads keys dim"], Size, Size]:
    """Focused queries and keys of one item, and the sizes of their maps."""
    probe, calls = copy.copy(attn), []

    def attend(query: Tensor, key: Tensor, _: Tensor, hw: Size, grid: Size | None = None) -> Tensor:
        calls.append((query, key, hw, grid or hw))
        return query

    vars(probe)["attend"] = attend
    with use("reference"):  # which projects apart from the attention
        probe.forward(x, hw)
    ((query, key, hw, keys_hw),) = calls
    if not 0 <= item < len(query):
        raise UserError(f"item {item}: the batch has {len(query)}, expected 0 to {len(query) - 1}")
    wide = reference.widest(query.dtype)
    query, key = (tokens[item : item + 1].to(wide) for tokens in (query, key))
    key = key + attn.position_for(keys_hw)[0]
    gain, floor = attn._features()
    sharp = (reference.focus(reference.features(t, gain, floor), attn.focusing_factor) for t in (query, key))
    query, key = (reference.heads(t, attn.num_heads) for t in sharp)
    return query, key, hw, keys_hw


def _convolution(
    kernel: Float[Tensor, "1 1 side side"], keys_hw: Size, hw: Size, prefix: int
) -> Float[Tensor, "queries keys"]:
    """Matrix of the depthwise convolution with one kernel, after the stretch of reduced values."""
    places = torch.eye(math.prod(keys_hw), dtype=kernel.dtype, device=kernel.device)[None]
    if keys_hw != hw:
        places = stretch(places, math.prod(hw))
    return F.pad(reference.depthwise(places, kernel, None, hw)[0], (prefix, 0, prefix, 0))


def reference_attention_map(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    kernel: Float[Tensor, "kernels 1 side side"],
    hw: Size | None = None,
) -> Float[Tensor, "tokens tokens"]:
    """The picture that the authors' visualiser makes of focused queries and keys: of head 0, item 0 and kernel 0.

    It is not the layer's matrix: taps are laid by flat offset, so that they wrap around the left and right border,
    and what follows is |.|, division by the row's sum, times (tokens / 196) * 10, and a cut at 1.

    Args:
        q: queries after the focus.
        k: keys after the focus.
        kernel: of the depthwise convolution.
        hw: height and width of the map; a square where None.

    Raises:
        UserError: the shapes do not fit together.
    """
    count, side = q.shape[2], kernel.shape[3]
    check_focus(1, side, "mean")
    hw = hw or (math.isqrt(count),) * 2
    if q.shape != k.shape or math.prod(hw) != count:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and a map of {hw[0]}x{hw[1]}"
        raise UserError(f"{shapes}: expected as many keys as queries, one for each place: give hw=(height, width)")
    weights = q[0, 0] @ k[0, 0].T
    weights = weights / (weights.sum(1, keepdim=True) + EPSILON)
    for row in range(side):
        for column in range(side):
            offset = (row - side // 2) * hw[1] + column - side // 2
            if abs(offset) < count:
                weights.diagonal(offset).add_(kernel[0, 0, row, column])
    weights = weights.abs()
    return (weights / weights.sum(1, keepdim=True) * (count / 196 * 10)).clamp_max(1)


def linear_layers(model: nn.Module) -> dict[str, Focused]:
    """The linear attention layers of a model by STAGE.BLOCK, both counted from 0; DeiT is one stage."""
    layers: dict[str, Focused] = {}
    stages: dict[str, int] = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            stage, _, index = name.rpartition(".")
            number = stages.setdefault(stage, len(stages))
            found = [module for module in block.modules() if isinstance(module, Focused)]
            layers.update({f"{number}.{index}": layer for layer in found[:1]})
    return layers


def layer_input(
    model: nn.Module, image: Float[Tensor, "batch channels height width"], block: str
) -> tuple[Focused, Tensor, Size]:
    """A linear layer of a model, and what it is called with for an image: tokens, and the size of their map.

    Args:
        model: one of this package's.
        image: normalised, at the model's size.
        block: STAGE.BLOCK as in ``0.1``.

    Raises:
        UserError: the block is none of the linear ones, which are named.
    """
    layers, calls = linear_layers(model), []
    if block not in layers:
        linear = f"linear attention is in {', '.join(layers)}" if layers else "the model has none"
        raise UserError(f"block {block!r} (STAGE.BLOCK) is no block with linear attention: {linear}")
    handle = layers[block].register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    try:
        with torch.no_grad():
            model(image)
    finally:
        handle.remove()
    ((x, hw),) = calls
    return layers[block], x, hw


def draw_attention(
    path: Path,
    picture: Image.Image,
    plain: EquivalentAttention,
    convolved: EquivalentAttention,
    queries: Sequence[Size],
    title: str,
    warning: str = "",
) -> None:
    """The picture with numbered queries, and their weights laid over it, without the convolution and with it.

    Weights are in units of 1 / keys, those of uniform attention. Those with the convolution are on a scale that is
    linear up to one unit and logarithmic beyond, as its taps are larger by the hundreds, and of either sign.

    Args:
        path: of the .png.
        picture: at the size that the model saw.
        plain: matrix of the layer without the convolution.
        convolved: with it.
        queries: rows and columns on the map.
        title: above all.
        warning: below it; both are red where there is one.
    """
    from matplotlib.colors import PowerNorm, SymLogNorm

    ratio = max(0.6, picture.width / picture.height)
    figure = new_figure(max(7.0, 1.6 + 2.2 * ratio * (len(queries) + 2)), 5.4, title, warning)
    left, right = figure.subfigures(1, 2, width_ratios=(2, len(queries) + 0.7 / ratio))
    overview = left.subplots()
    overview.imshow(picture)
    overview.set_axis_off()
    for number, query in enumerate(queries, 1):
        box = {"boxstyle": "circle", "facecolor": "white", "edgecolor": INK}
        overview.text(*_centre(query, plain.hw, picture), str(number), ha="center", va="center", color=INK, bbox=box)
    names = ("attention alone", "with convolution")
    rows = right.subplots(2, len(queries) + 1, width_ratios=(*[1] * len(queries), 0.07))
    for name, axes, found in zip(names, rows, (plain, convolved), strict=True):
        maps = [found.query_map(query).cpu().numpy() * found.matrix.shape[1] for query in queries]
        top = max(1.5, *(float(abs(weights).max()) for weights in maps))
        alone = found is plain
        norm = PowerNorm(0.5, 0, top) if alone else SymLogNorm(1, linscale=0.5, vmin=-top, vmax=top)
        for number, (panel, query, weights) in enumerate(zip(axes, queries, maps, strict=False), 1):
            _draw_weights(panel, picture, weights, norm, "inferno" if alone else "RdBu_r")
            if alone:
                panel.plot(*_centre(query, found.hw, picture), "o", mfc="none", mec="white", ms=10, mew=1.5)
                panel.set_title(str(number), color=INK, fontsize=11)
        axes[0].set_ylabel(f"{name}\nrank {found.rank()} of {min(found.matrix.shape)}", color=INK, fontsize=11)
        right.colorbar(axes[0].images[1], cax=axes[-1], label="weight, uniform = 1", format="%g").solids.set_alpha(1)
    save_figure(figure, path)


def _centre(query: Size, hw: Size, picture: Image.Image) -> tuple[float, float]:
    return (query[1] + 0.5) * picture.width / hw[1], (query[0] + 0.5) * picture.height / hw[0]


def _draw_weights(axes: Any, picture: Image.Image, weights: Any, norm: Any, colormap: str) -> None:
    axes.imshow(picture.convert("L"), cmap="gray", vmin=-50, vmax=280)
    extent = (0, picture.width, picture.height, 0)
    axes.imshow(weights, colormap, norm, extent=extent, alpha=0.7, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_spectra(
    path: Path, plain: EquivalentAttention, convolved: EquivalentAttention, title: str, warning: str = ""
) -> None:
    """Singular values, over the largest, of a layer's matrices without and with the convolution.

    Args:
        path: of the .png.
        plain: matrix of the layer without the convolution.
        convolved: with it.
        title: above all.
        warning: below it; both are red where there is one.
    """
    figure = new_figure(8.0, 4.2, title, warning)
    axes = figure.subplots()
    shown = {"attention alone": (PLAIN, plain), "with the depthwise convolution": (CONVOLVED, convolved)}
    for name, (colour, found) in shown.items():
        values = found.singular_values.cpu().numpy()
        label = f"{name}: rank {found.rank()} of {len(values)}"
        axes.plot(range(1, len(values) + 1), values / values[0], color=colour, lw=2, label=label)
    axes.axhline(TOLERANCE, color=INK, lw=1, ls="--")
    axes.text(1, TOLERANCE, f" counts towards the rank above {TOLERANCE:g}", va="bottom", color=INK, fontsize=9)
    axes.set(xscale="log", yscale="log", xlim=(1, None), ylim=(1e-5, 2))
    axes.set_xlabel("singular value", color=INK)
    axes.set_ylabel("share of the largest", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    figure.legend(frameon=False, loc="outside lower left", ncols=2)
    save_figure(figure, path)
