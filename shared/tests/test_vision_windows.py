from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_shared.vision.bodies.grids import to_map
from leap_shared.vision.windows import WindowedAttention


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_windows_attend_inside_themselves_on_a_padded_map(height: int, width: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = WindowedAttention(6, 2, window).double().eval()
    x = torch.randn(2, height * width, 6, generator=generator, dtype=torch.float64)
    out = to_map(layer(x, (height, width)), (height, width))
    image = torch.zeros(2, height + window, width + window, 6, dtype=torch.float64)
    image[:, :height, :width] = to_map(x, (height, width))
    for top in range(0, height, window):
        for left in range(0, width, window):
            part = layer.attention(image[:, top : top + window, left : left + window].flatten(1, 2))
            expected = to_map(part, (window, window))[:, : height - top, : width - left]
            torch.testing.assert_close(out[:, top : top + window, left : left + window], expected)
