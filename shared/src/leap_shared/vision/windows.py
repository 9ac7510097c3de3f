"""Attention in windows as timm's Swin has it, as a layer alone: what others are measured beside."""

from __future__ import annotations

from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from leap_shared.vision.bodies.grids import Size, Tokens, merge, pad_map, partition, to_map

__all__ = ["WindowedAttention"]


class WindowedAttention(nn.Module):
    """timm's attention in windows without a shift, on a map zero-padded to whole windows as timm's Swin pads it.

    Args:
        dim: channels.
        num_heads: heads.
        window: side of the windows in tokens.
    """

    def __init__(self, dim: int, num_heads: int, window: int = 7) -> None:
        super().__init__()
        self.window = window
        self.attention: nn.Module = WindowAttention(dim, num_heads, window_size=window)

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """Tokens of a map to tokens of the same shape."""
        window = (self.window, self.window)
        padded = (hw[0] + -hw[0] % self.window, hw[1] + -hw[1] % self.window)
        windows = self.attention(partition(pad_map(to_map(x, hw), padded), window))
        out: Tensor = merge(windows, window, padded)[:, : hw[0], : hw[1]].flatten(1, 2)
        return out
