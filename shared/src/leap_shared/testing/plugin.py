"""What the tests of every package start with; a conftest.py of one line takes it: ``pytest_plugins = [...]``.

Triton kernels run in their interpreter where there is no GPU, tests marked `gpu` skip themselves there, torch computes
on one thread (sums of several threads differ in their last bits), and hypothesis has two profiles: `quick`, and
`thorough` for ``HYPOTHESIS_PROFILE=thorough``.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from leap_shared.testing.operators import prefer_interpreter

prefer_interpreter()
torch.set_num_threads(1)
# A deadline would be an assertion on time; the same examples in every run keep a red test red.
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
