"""The golden numbers: what the authors' program computed from weights that are filled by rule."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_adapter
import numpy as np
import pytest
import torch
from torch import Tensor

from leap_shared import ops
from leap_shared.testing import fill, golden

FOLDER = Path(__file__).parent / "golden"
CASES = golden.cases(FOLDER)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

pytestmark = pytest.mark.golden


def holding(array: str) -> Any:
    """Cases of one kind, which an array of their file tells."""
    chosen = [case for case in CASES if array in case.arrays]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def on(*backends: Any) -> Any:
    return pytest.mark.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.use(request.param):
        yield request.param


def inputs_of(case: golden.Case) -> dict[str, Tensor]:
    given = case["inputs"]
    return {one["name"]: torch.from_numpy(fill.tensor(one["name"], one["shape"], one["scale"])) for one in given}


def state_of(case: golden.Case) -> dict[str, Tensor]:
    """The filled checkpoint, without what the authors' file stores and a model computes."""
    computed = case.facts.get("computed_float_buffers", {})
    state = fill.fill_state({key: entry for key, entry in case.schema.items() if key not in computed})
    for pattern, scale in case["fill_scales"].items():
        for key in fnmatch.filter(state, pattern):
            state[key] = fill.tensor(key, state[key].shape, scale)
    return {key: torch.from_numpy(array) for key, array in state.items()}


def digest(values: Tensor) -> Any:
    """Mean, deviation and 64 elements at truncated places: these files do not round them."""
    flat = values.detach().numpy().ravel()
    chosen = flat[np.linspace(0, flat.size - 1, 64).astype(int)]
    return np.concatenate([[flat.mean(dtype=np.float64), flat.std(dtype=np.float64)], chosen])


def check(got: Any, want: Any, tolerance: float, label: str) -> None:
    """The largest error is within `tolerance` times the largest number wanted."""
    got = np.asarray(got.detach() if isinstance(got, Tensor) else got, dtype=np.float64)
    assert got.shape == want.shape, label
    assert np.isfinite(got).all(), label
    assert np.abs(got - want).max() <= tolerance * (np.abs(want).max() or 1.0), label


@on("reference", "cpu", pytest.param("triton", marks=needs_triton))
@holding("output")
def test_layers_give_the_official_outputs_and_gradients(case: golden.Case, backend: str) -> None:
    inputs = {name: value.requires_grad_() for name, value in inputs_of(case).items()}
    output, parameters = golden_adapter.layer(case["constructor"], state_of(case), inputs)
    check(output, case.arrays["output"], case["tolerance"], "output")
    leaves = {f"grad_{key}": value for key, value in inputs.items()}
    leaves |= {f"pgrad_{key}": value for key, value in parameters.items()}
    names = [name for name in case.arrays if name != "output"]
    cotangent = torch.from_numpy(fill.tensor("cotangent", tuple(output.shape)))
    gradients = torch.autograd.grad((output * cotangent).sum(), [leaves[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        value = digest(gradient) if name.startswith("pgrad_") else gradient
        check(value, case.arrays[name], case["gradient_tolerance"], f"{backend}: {name}")


@on("reference", "cpu")
@holding("logits")
def test_models_give_the_official_logits_and_stages(case: golden.Case, backend: str) -> None:
    (image,) = inputs_of(case).values()
    with torch.no_grad():
        got = golden_adapter.model(case["constructor"], state_of(case), image)
    assert got["parameters"] == case["parameters"]
    for name, want in case.arrays.items():
        if name.startswith("stage_"):
            stage = got["stages"][int(name[-1]) - 1]
            assert list(stage.shape) == case["stage_shapes"][name]
            check(digest(stage), want, case["tolerance"], f"{backend}: {name}")
        else:
            check(got[name], want, case["tolerance"], f"{backend}: {name}")


@holding("lr")
def test_learning_rates_are_those_of_the_published_schedule(case: golden.Case) -> None:
    name = case.name.replace("lr_", "flatten_")
    rates = golden_adapter.learning_rates(name, 1024, 1251, case["steps"])
    check(rates, case.arrays["lr"], case["tolerance"], "rates")


GROUPS = [(name, counts) for case in CASES for name, counts in case.facts.get("optimiser_groups", {}).items()]


@pytest.mark.parametrize(("name", "counts"), GROUPS, ids=[name for name, _ in GROUPS])
def test_parameters_without_weight_decay_are_the_official_ones(name: str, counts: dict[str, int]) -> None:
    assert golden_adapter.optimiser_groups(name) == counts


@holding("map")
def test_rendered_attention_is_the_authors_picture(case: golden.Case) -> None:
    query, key = (torch.from_numpy(np.abs(fill.tensor(name, (1, 2, 36, 8)))) for name in "qk")
    kernel = torch.from_numpy(fill.tensor("kernel", (8, 1, 5, 5), 0.05))
    got = golden_adapter.reference_attention_map(query, key, kernel)
    check(got, case.arrays["map"], case["tolerance"], "map")
