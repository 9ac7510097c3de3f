"""What the package is measured beside: the paper's formula as a script holds it, unfold, windows, and bare products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Size, Tokens, merge, pad_map, partition, to_map
from leap_slide.attention import SlideAttention
from leap_slide.functional import Kernels

__all__ = ["EagerAttention", "Floor", "Image", "flex", "global_softmax", "has_natten", "merged"]
__all__ += ["neighborhood", "two_path", "unfold", "window_operands", "windowed"]

Image = Float[Tensor, "batch height width channels"]
Position = Float[Tensor, "heads slots"]
BLOCK = 4096  # pixels whose 32 channels fit a second-level cache


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """The channels' dimension as heads and their channels."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def _tokens(x: Image, num_heads: int) -> Float[Tensor, "batch heads tokens dim"]:
    return _heads(x.flatten(1, 2), num_heads).transpose(1, 2)


def _folded(x: Image, num_heads: int) -> Float[Tensor, "maps dim height width"]:
    """Heads folded into the batch, channels first, as depthwise convolutions take them."""
    return x.permute(0, 3, 1, 2).reshape(-1, x.shape[3] // num_heads, *x.shape[1:3])


def _unfolded(x: Float[Tensor, "maps dim height width"], num_heads: int) -> Image:
    return x.reshape(-1, num_heads * x.shape[1], *x.shape[2:]).permute(0, 2, 3, 1)


def _convolved(x: Image, kernels: Kernels, num_heads: int) -> Float[Tensor, "maps dim slots height width"]:
    """Copies of a map, one for each slot, by a depthwise convolution that all heads share."""
    maps, (weight, bias) = _folded(x, num_heads), kernels
    out = F.conv2d(maps, weight, bias, padding=weight.shape[2] // 2, groups=maps.shape[1])
    return out.reshape(*maps.shape[:2], -1, *maps.shape[2:])


def _local(q: Image, key: Tensor, value: Tensor, rpb: Position | None, num_heads: int) -> Image:
    """Softmax over slots, of keys and values (maps, dim, slots, height, width) that lie there for all slots."""
    query = _folded(q, num_heads) * (q.shape[3] // num_heads) ** -0.5
    if rpb is not None:
        key = key + rpb.repeat(len(q), 1)[:, None, :, None, None]
    share = (query[:, :, None] * key).sum(1, keepdim=True).softmax(2)
    return _unfolded((share * value).sum(2), num_heads)


def two_path(
    q: Image, k: Image, v: Image, dep_conv: Kernels, dep_conv1: Kernels, rpb: Position | None, num_heads: int
) -> Image:
    """Slide attention by the sum of two depthwise convolutions, for keys and for values (eq. 4 to 9 of the paper).

    Args:
        q: queries, not yet scaled, channels head-major and last.
        k: keys, as the queries.
        v: values, as the queries.
        dep_conv: weight and bias of the fixed path.
        dep_conv1: those of the learned path.
        rpb: relative position bias, added to every channel of a slot's key.
        num_heads: heads.
    """
    keys, values = (_convolved(x, dep_conv, num_heads) + _convolved(x, dep_conv1, num_heads) for x in (k, v))
    return _local(q, keys, values, rpb, num_heads)


def merged(q: Image, k: Image, v: Image, kernels: Kernels, rpb: Position | None, num_heads: int) -> Image:
    """Slide attention by one depthwise convolution of merged kernels, for keys and for values (section 3.3)."""
    keys, values = (_convolved(x, kernels, num_heads) for x in (k, v))
    return _local(q, keys, values, rpb, num_heads)


def unfold(q: Image, k: Image, v: Image, num_heads: int, kernel_size: int) -> Image:
    """Local attention with fixed shifts alone, their copies by `torch.nn.functional.unfold`; zeros take their share."""
    maps = (_folded(x, num_heads) for x in (k, v))
    keys, values = (
        F.unfold(x, kernel_size, padding=kernel_size // 2).reshape(*x.shape[:2], -1, *x.shape[2:]) for x in maps
    )
    return _local(q, keys, values, None, num_heads)


def window_operands(x: Image, num_heads: int, window: int = 7) -> Float[Tensor, "windows heads tokens dim"]:
    """A map cut into windows, zero-padded to whole ones as Swin pads it, heads apart."""
    height, width = x.shape[1] + -x.shape[1] % window, x.shape[2] + -x.shape[2] % window
    return _heads(partition(pad_map(x, (height, width)), (window, window)), num_heads).transpose(1, 2)


def windowed(q: Image, k: Image, v: Image, num_heads: int, window: int = 7) -> Image:
    """Softmax attention in windows without shift or bias, by PyTorch's fused attention; cuts and merges the map."""
    _, height, width, _ = q.shape
    query, key, value = (window_operands(x, num_heads, window) for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value)
    padded = (height + -height % window, width + -width % window)
    image: Tensor = merge(out.transpose(1, 2).flatten(2), (window, window), padded)[:, :height, :width]
    return image


def global_softmax(q: Image, k: Image, v: Image, num_heads: int) -> Image:
    """Softmax attention over the whole map, by PyTorch's fused attention."""
    query, key, value = (_tokens(x, num_heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value)
    return to_map(out.transpose(1, 2).flatten(2), (q.shape[1], q.shape[2]))


def has_natten() -> bool:
    """Whether natten is installed."""
    return importlib.util.find_spec("natten") is not None


def neighborhood(q: Image, k: Image, v: Image, num_heads: int, kernel_size: int) -> Image:
    """Neighbourhood attention by natten: k x k pixels, moved inwards at borders, where ours reads zeros.

    Raises:
        UserError: natten is not installed.
    """
    if not has_natten():
        raise UserError("neighbourhood attention needs natten: pip install natten")
    from natten import na2d  # type: ignore[import-not-found, unused-ignore] # it is optional

    query, key, value = (_heads(x, num_heads) for x in (q, k, v))
    out: Tensor = na2d(query, key, value, kernel_size=kernel_size)
    return out.flatten(3)


def flex(hw: Size, num_heads: int, kernel_size: int, device: torch.device, compiled: bool = True) -> Callable[..., Any]:
    """FlexAttention with a block mask of the k x k pixels around each that are inside of the map.

    Args:
        hw: height and width of the map.
        num_heads: heads.
        kernel_size: k, odd.
        device: of the tensors.
        compiled: whether to compile it, as is meant; without, it makes the whole matrix.

    Returns:
        A function of q, k and v, (batch, height, width, channels) each.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (height, width), radius = hw, kernel_size // 2

    mask = create_block_mask(
        lambda _batch, _head, query, key: (
            ((query // width - key // width).abs() <= radius) & ((query % width - key % width).abs() <= radius)
        ),
        None,
        None,
        height * width,
        height * width,
        device=str(device),
    )
    attention: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def call(q: Image, k: Image, v: Image) -> Image:
        query, key, value = (_tokens(x, num_heads) for x in (q, k, v))
        out: Tensor = attention(query, key, value, block_mask=mask)
        return to_map(out.transpose(1, 2).flatten(2), hw)

    return call


class EagerAttention(nn.Module):
    """A layer of this package by `two_path` or, reparameterized, by `merged`, with the layer's own parameters.

    Raises:
        UserError: the layer has options that the released module has not, or dropout of shares.
    """

    def __init__(self, layer: SlideAttention) -> None:
        super().__init__()
        plain = layer.padding_mode == "zeros" and layer.rpb_on == "keys" and layer.scale == layer.head_dim**-0.5
        shared = layer.share_kernel and not layer.share_qkv and not layer.single_bias
        if not plain or not shared or layer.mask_padding or layer.attn_drop:
            raise UserError(f"the eager formula has the released module's form alone, not that of {layer}")
        self.layer = layer

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """What the layer gives."""
        layer = self.layer
        packed: Tensor = layer.qkv(x)
        parts = packed.reshape(*packed.shape[:2], layer.num_heads, 3, -1).unbind(3)
        query, key, value = (to_map(part.flatten(2), hw) for part in parts)
        projected: Tensor = layer.proj(self.attended(query, key, value).flatten(1, 2))
        return projected

    def attended(self, q: Image, k: Image, v: Image) -> Image:
        """The attention between projections."""
        layer: Any = self.layer
        table = layer.relative_position_bias_table
        rpb = None if table is None else table.reshape(layer.num_heads, -1)
        if layer.reparameterized:
            return merged(q, k, v, layer.kernels()[0], rpb, layer.num_heads)
        fixed, learned = ((path.weight, path.bias) for path in (layer.dep_conv, layer.dep_conv1))
        return two_path(q, k, v, fixed, learned, rpb, layer.num_heads)


class Floor(nn.Module):
    """Matrix products alone: both projections, and for every tap the kernels' with queries and with shares.

    Blocks of pixels share their operands and results, which stay in the cache. The products with keys and values,
    softmax, biases and every copy are left out: what a layer takes above it is its own to lose.

    Args:
        layer: whose parameters are taken.
        x: its input.
        hw: height and width of the map.
    """

    def __init__(self, layer: SlideAttention, x: Tokens, hw: Size) -> None:
        super().__init__()
        self.layer, self.x = layer, x
        dim, side = layer.head_dim, layer.kernel_size
        pixels = len(x) * layer.num_heads * hw[0] * hw[1]
        self.sizes = [min(BLOCK, pixels - first) for first in range(0, pixels, BLOCK)]
        with torch.no_grad():
            weight = layer.kernels()[0][0].reshape(dim, side**2, side**2).permute(2, 1, 0).contiguous()
            self.operands = weight, weight.mT.contiguous(), x.new_ones(dim, BLOCK), x.new_ones(side**2, BLOCK)
            self.results = x.new_zeros(side**2, BLOCK), x.new_zeros(dim, BLOCK)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Projections of the input and of the output."""
        to_slots, to_dim, query, share = self.operands
        logits, mixed = self.results
        for size in self.sizes:
            for tap in range(len(to_slots)):
                torch.mm(to_slots[tap], query[:, :size], out=logits[:, :size])
                torch.mm(to_dim[tap], share[:, :size], out=mixed[:, :size])
        return self.layer.qkv(self.x), self.layer.proj(self.x)
