"""The golden numbers: what the authors' program computed from weights that are filled by rule."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_adapter
import numpy as np
import pytest
from torch import Tensor

from leap_shared import ops
from leap_shared.testing import fill, golden
from leap_slide.functional import shift_kernel

FOLDER = Path(__file__).parent / "golden"
CASES = golden.cases(FOLDER)
ARGUMENTS = {"ka": "kernel_size", "share_dwc_kernel": "share_kernel", "rpb": "rel_pos_bias"}

pytestmark = pytest.mark.golden


def holding(array: str) -> Any:
    """Cases of one kind, which an array of their file tells."""
    chosen = [case for case in CASES if array in case.arrays]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.use(request.param):
        yield request.param


def state_of(case: golden.Case) -> dict[str, Any]:
    """The filled checkpoint, with the frozen kernels that a case keeps."""
    state: dict[str, Any] = dict(fill.fill_state(case.schema))
    for pattern, scale in case["fill_scales"].items():
        for key in fnmatch.filter(state, pattern):
            state[key] = fill.tensor(key, state[key].shape, scale)
    for key, (shape, _) in case["constant_keys"].items():
        state[key] = shift_kernel(shape[0] // shape[3] ** 2, shape[3])
    return state


def configuration(case: golden.Case) -> dict[str, Any]:
    """The constructor's arguments by this package's names."""
    return {ARGUMENTS.get(name, name): value for name, value in case["constructor"].items()}


def input_of(case: golden.Case) -> Any:
    (given,) = case["inputs"]
    return fill.tensor(given["name"], given["shape"], given["scale"])


def digest(values: Tensor) -> Any:
    """Mean, deviation and 64 elements at truncated places: these files do not round them."""
    flat = values.detach().double().numpy().ravel()
    return np.concatenate([[flat.mean(), flat.std()], flat[np.linspace(0, flat.size - 1, 64).astype(int)]])


def check(got: Any, want: Any, tolerance: float, label: str) -> None:
    """The largest error is within `tolerance` times the largest number wanted."""
    got = np.asarray(got.detach() if isinstance(got, Tensor) else got, dtype=np.float64)
    assert got.shape == want.shape, label
    assert np.isfinite(got).all(), label
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), label


def test_every_case_is_run() -> None:
    assert len(CASES) == 6
    assert all("output" in case.arrays or "logits" in case.arrays for case in CASES)


@holding("output")
@pytest.mark.parametrize("form", ["auto", "conv"])
def test_layers_give_the_official_outputs_and_gradients(case: golden.Case, form: str, backend: str) -> None:
    options = configuration(case) | {"backend": form}
    hw = options.pop("H"), options.pop("W")
    cotangent = fill.tensor("cotangent", case.arrays["output"].shape)
    output, of_x, found = golden_adapter.attention(input_of(case), state_of(case), hw, options, cotangent)
    check(output, case.arrays["output"], case["tolerance"], "output")
    check(of_x, case.arrays["grad_x"], case["gradient_tolerance"], "grad_x")
    names = [name for name in case.arrays if name.startswith("pgrad_")]
    assert names
    for name in names:
        gradient = digest(found[name.removeprefix("pgrad_")])
        check(gradient, case.arrays[name], case["gradient_tolerance"], f"{backend}: {name}")


@holding("logits")
def test_models_give_the_official_logits_and_stages(case: golden.Case, backend: str) -> None:
    got = golden_adapter.model(input_of(case), state_of(case), configuration(case))
    assert got["parameters"] == case["parameters"]
    for name, want in case.arrays.items():
        value = got[name]
        if name.startswith("stage_"):
            assert list(value.shape) == case.facts.get("stage_shapes", {}).get(name, list(value.shape))
            value = digest(value)
        check(value, want, case["tolerance"], f"{backend}: {name}")
