"""What slide attention looks at: the shares of its slots, and the kernel of values that they make for every pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies import Block
from leap_shared.vision.bodies.grids import Size, Tokens
from leap_shared.vision.pictures import INK, load_picture, new_figure, save_figure, to_input
from leap_slide.attention import SlideAttention
from leap_slide.functional import padded_maps
from leap_slide.ops import reference

__all__ = ["LocalAttention", "attention_of", "draw_local_attention", "layer_input", "load_picture", "local_attention"]
__all__ += ["slide_blocks", "to_input"]

MOST_HEADS = 8  # that a figure has room for
ARROWS = 12  # along the longer side of a map


@dataclass(frozen=True, eq=False)
class LocalAttention:
    """What one layer makes of one picture.

    Attributes:
        weights: shares of the softmax over the k * k slots of every pixel, which sum to 1.
        kernel: effective receptive kernel of every pixel: with which weight the value at each of the k x k offsets
            enters the output, sum_i a_i W[j, i, t] averaged over the channels j. They may be negative, and need not
            sum to 1. At borders some belong to pixels outside of the map.
        block: name of the layer's block.
    """

    weights: Float[Tensor, "heads slots height width"]
    kernel: Float[Tensor, "heads side side height width"]
    block: str = ""

    @property
    def hw(self) -> Size:
        """Height and width of the map."""
        return self.weights.shape[2], self.weights.shape[3]

    @property
    def mean_kernel(self) -> Float[Tensor, "heads side side"]:
        """Effective kernel, averaged over the map."""
        return self.kernel.mean((3, 4))

    @property
    def entropy(self) -> Float[Tensor, "heads height width"]:
        """Entropy of the shares over that of uniform ones: 0 where one slot takes all, 1 where all take the same."""
        nats: Tensor = torch.special.entr(self.weights).sum(1)
        return nats / max(math.log(self.weights.shape[1]), 1e-9)

    @property
    def offset(self) -> Float[Tensor, "heads two height width"]:
        """Rows and columns from a pixel to the centre of its kernel's magnitudes: whence most of the output comes."""
        side = self.kernel.shape[1]
        place = torch.arange(side, dtype=self.kernel.dtype, device=self.kernel.device) - side // 2
        size = self.kernel.abs() / self.kernel.abs().sum((1, 2), keepdim=True).clamp_min(1e-12)
        rows, columns = (size.sum(2) * place[:, None, None]).sum(1), (size.sum(1) * place[:, None, None]).sum(1)
        return torch.stack([rows, columns], 1)


def slide_blocks(model: nn.Module) -> dict[str, SlideAttention]:
    """The slide attention layers of a model by STAGE.BLOCK, both counted from 0; by their name outside of blocks."""
    layers: dict[str, SlideAttention] = {}
    blocks: dict[str, str] = {}
    stages: dict[str, int] = {}
    for name, module in model.named_modules():
        parent, _, index = name.rpartition(".")
        if isinstance(module, Block):
            blocks[name] = f"{stages.setdefault(parent, len(stages))}.{index}"
        elif isinstance(module, SlideAttention):
            layers[blocks.get(parent, name)] = module
    return layers


def layer_input(
    model: nn.Module, image: Float[Tensor, "batch channels height width"], block: int | str = 0
) -> tuple[str, SlideAttention, Float[Tensor, "items tokens dim"], Size]:
    """Name of a block, its slide attention, and what that is called with for an image: tokens, and their map's size.

    Args:
        model: one of this package's, or any with `SlideAttention` in it.
        image: normalised, at the model's size.
        block: number of the layer among those with slide attention, or STAGE.BLOCK as in ``1.0``.

    Raises:
        UserError: there is no such block with slide attention; those that have it are named.
    """
    layers = slide_blocks(model)
    names = list(layers)
    name = names[block] if isinstance(block, int) and 0 <= block < len(names) else str(block)
    if name not in layers or (isinstance(block, int) and block >= len(names)):
        found = f"slide attention is in {', '.join(names)}, or by number 0 to {len(names) - 1}" if names else "none has"
        raise UserError(f"block {block!r} (a number, or STAGE.BLOCK) is none with slide attention: {found}")
    calls: list[tuple[Tensor, Size | None]] = []

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((given[0] if given else named["x"], given[1] if len(given) > 1 else named.get("hw")))

    layer = layers[name]
    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(image)
    finally:
        handle.remove()
    if not calls:
        raise UserError(f"block {name} is not run by the model, perhaps as later stages are not: choose another")
    x, hw = calls[0]
    hw = layer.size_of(x, hw)
    return name, layer, x.flatten(2).transpose(1, 2) if x.ndim == 4 else x, hw


def attention_of(layer: SlideAttention, tokens: Tokens, hw: Size, item: int = 0, block: str = "") -> LocalAttention:
    """What a layer makes of tokens (batch, height * width, channels), by the formula of its convolutions.

    Args:
        layer: with two paths or one.
        tokens: what it is called with.
        hw: height and width of their map.
        item: of the batch.
        block: name to keep.

    Raises:
        UserError: there is no such item, or the numbers are not finite.
    """
    if not 0 <= item < len(tokens):
        raise UserError(f"item {item}: the batch has {len(tokens)}, expected 0 to {len(tokens) - 1}")
    side = layer.kernel_size
    with torch.no_grad():
        query, key, _ = layer.projected(tokens[item : item + 1], hw)
        keys, values = layer.kernels()
        wide = reference.widest(query.dtype)
        key = padded_maps(key.to(wide), side // 2, layer.padding_mode)
        weight, bias = (x.to(wide).reshape(layer.head_dim, side**2, -1) for x in keys)
        table = layer.relative_position_bias_table
        position = None if table is None else table.to(wide).reshape(layer.num_heads, -1)
        options = (layer.scale, layer.rpb_on == "logits", layer.mask_padding)
        share = reference.shares(query.to(wide), key, weight, bias[..., 0], position, *options)[0]
        mean = (values or keys)[0].to(wide).reshape(layer.head_dim, side**2, side, side).mean(0)
        kernel = torch.einsum("hiyx,ist->hstyx", share, mean)
    if not (share.isfinite().all() and kernel.isfinite().all()):
        raise UserError("the attention is not finite: the input or the layer's weights hold NaN or infinity")
    return LocalAttention(share, kernel, block)


def local_attention(
    model: nn.Module, image: Float[Tensor, "batch channels height width"], block: int | str = 0, item: int = 0
) -> LocalAttention:
    """Shares of the slots and effective receptive kernels (section 3.3) of one block of a model for an image.

    Args:
        model: one of this package's, or any with `SlideAttention` in it; with two paths or one.
        image: normalised, at the model's size.
        block: see `layer_input`.
        item: of the batch.

    Raises:
        UserError: there is no such block or item, or the numbers are not finite.
    """
    name, layer, tokens, hw = layer_input(model, image, block)
    return attention_of(layer, tokens, hw, item, name)


def draw_local_attention(
    path: Path,
    picture: Image.Image,
    found: LocalAttention,
    queries: Sequence[Size],
    title: str,
    warning: str = "",
) -> None:
    """The picture with numbered pixels of the map, and a row per head of what it looks at.

    First the effective kernels: the mean one and those of the pixels, all on one scale. Then over the picture where
    the head spreads its attention (entropy), and whence its output comes: arrows lead there, on a scale of their own.

    Args:
        path: of the .png.
        picture: at the size that the model saw.
        found: of one block.
        queries: rows and columns on the map.
        title: above all.
        warning: below it; both are red where there is one.
    """
    heads, side = min(len(found.weights), MOST_HEADS), found.kernel.shape[1]
    ratio, columns = min(max(picture.width / picture.height, 0.5), 2.5), len(queries) + 1
    shown = f", {heads} of {len(found.weights)} heads" if heads < len(found.weights) else ""
    ratios = (4.2 * ratio, 1.4 * columns + 0.7, 4.2 * ratio + 0.9)
    figure = new_figure(sum(ratios), max(1.6 * heads, 3.4) + 1.2, title + shown, warning)
    left, middle, right = figure.subfigures(1, 3, width_ratios=ratios)
    _draw_overview(left, picture, found.hw, side, queries)
    kernels = torch.stack([found.mean_kernel, *(found.kernel[..., y, x] for y, x in queries)], 1)[:heads].cpu()
    _draw_kernels(middle, kernels)
    _draw_maps(right, picture, found, heads)
    save_figure(figure, path)


def _draw_overview(figure: Any, picture: Image.Image, hw: Size, side: int, queries: Sequence[Size]) -> None:
    """The picture, and what each of the chosen pixels can see."""
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    axes.imshow(picture)
    axes.set_axis_off()
    high, wide = picture.height / hw[0], picture.width / hw[1]
    for number, (row, column) in enumerate(queries, 1):
        corner = ((column - side // 2) * wide, (row - side // 2) * high)
        axes.add_patch(Rectangle(corner, side * wide, side * high, fill=False, ec="white", lw=2.4))
        axes.add_patch(Rectangle(corner, side * wide, side * high, fill=False, ec=INK, lw=1.2))
        box = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": INK}
        place = (corner[0] + side * wide, corner[1])
        axes.annotate(str(number), place, (9, 9), textcoords="offset points", ha="center", color=INK, bbox=box)
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.set_title(f"boxes: the {side}x{side} pixels of a {hw[0]}x{hw[1]} map that each sees", color=INK, fontsize=10)


def _draw_kernels(figure: Any, kernels: Float[Tensor, "heads shown side side"]) -> None:
    """A row per head of kernels with the weights in their cells, where there is room for them."""
    top, side = max(float(kernels.abs().max()), 1e-12), kernels.shape[3]
    figure.suptitle("effective kernels, over the map and at the boxes", color=INK, fontsize=10)
    rows = figure.subplots(*kernels.shape[:2], squeeze=False)
    for head, (axes, of_head) in enumerate(zip(rows, kernels, strict=True)):
        for number, (panel, kernel) in enumerate(zip(axes, of_head, strict=True)):
            image = panel.imshow(kernel.numpy(), cmap="RdBu_r", vmin=-top, vmax=top)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            for (row, column), weight in _cells(kernel) if side <= 3 else ():
                colour = "white" if abs(weight) > 0.6 * top else INK
                panel.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=6, color=colour)
            if not head:
                panel.set_title(str(number) if number else "mean", color=INK, fontsize=10)
        axes[0].set_ylabel(f"head {head}", color=INK, fontsize=10)
    bar = figure.colorbar(image, ax=rows, location="bottom", fraction=0.05, aspect=30, format="%g")
    bar.set_label("effective kernel: weight of the value there", color=INK, fontsize=9)


def _cells(kernel: Float[Tensor, "side side"]) -> list[tuple[Size, float]]:
    return [((row, column), weight) for row, line in enumerate(kernel.tolist()) for column, weight in enumerate(line)]


def _draw_maps(figure: Any, picture: Image.Image, found: LocalAttention, heads: int) -> None:
    """A row per head of how wide it looks, and where to."""
    entropy, offset = found.entropy[:heads].cpu().numpy(), found.offset[:heads].cpu()
    length = offset.norm(dim=1)
    extent, bottom = (0, picture.width, picture.height, 0), float(entropy.min())
    rows = figure.subplots(heads, 2, squeeze=False)
    step = max(-(-max(found.hw) // ARROWS), 1)
    high, wide = picture.height / found.hw[0], picture.width / found.hw[1]
    ys, xs = (torch.arange(step // 2, count, step) for count in found.hw)
    longest = max(float(length[:, ys][:, :, xs].max()), 1e-12)
    for head, (spread, towards) in enumerate(rows):
        image = spread.imshow(entropy[head], "viridis", vmin=bottom, vmax=1, extent=extent, interpolation="nearest")
        towards.imshow(picture.convert("L"), cmap="gray", vmin=-150, vmax=300)
        down, across = offset[head][:, ys][:, :, xs] / longest * step
        place = ((xs + 0.5) * wide, (ys + 0.5) * high)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.014, "color": "#E69F00"}
        towards.quiver(*(x.numpy() for x in (*place, across * wide, down * high)), **arrows)
        towards.set(xlim=(0, picture.width), ylim=(picture.height, 0))
        for panel in (spread, towards):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    rows[0, 0].set_title("how widely", color=INK, fontsize=10)
    rows[0, 1].set_title(f"where to (at most {longest:.2g} pixels)", color=INK, fontsize=10)
    bar = figure.colorbar(image, ax=rows, location="bottom", fraction=0.05, aspect=30, format="%.4g")
    bar.ax.locator_params(nbins=4)
    bar.set_label("entropy of the shares, uniform = 1", color=INK, fontsize=9)
