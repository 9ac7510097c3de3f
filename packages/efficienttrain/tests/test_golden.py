"""The golden numbers, through `golden_adapter.py`; tables, streams, sizes and groups have files of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_adapter
import numpy as np
import pytest
import torch

from leap_shared import ops
from leap_shared.testing import fill, golden

FOLDER = Path(__file__).parent / "golden"
CASES = golden.cases(FOLDER)
ELSEWHERE = ("stages", "replay", "size", "groups")

pytestmark = pytest.mark.golden


def of_kind(prefix: str) -> Any:
    return pytest.mark.parametrize("case", golden.cases(FOLDER, prefix), ids=lambda case: case.name)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.use(request.param):
        yield request.param


def named(entry: Any) -> torch.Tensor:
    name, shape = entry
    return torch.from_numpy(fill.tensor(name, shape))


def close(got: Any, want: Any, rtol: float, atol: float = 0.0) -> None:
    got = got.detach() if isinstance(got, torch.Tensor) else got
    got = np.asarray(got) if tuple(got.shape) == want.shape else golden.digest(got)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def test_every_case_is_run() -> None:
    assert len(CASES) == 25
    assert {case.name.partition("_")[0] for case in CASES} == {"fc", "lanczos", "lr", "model", "lamb", *ELSEWHERE}


@of_kind("fc_")
@pytest.mark.filterwarnings("ignore:a low-frequency crop has an even size")
def test_crops_and_their_gradients(case: golden.Case, backend: str) -> None:
    del backend
    picture = named(case["input"]).requires_grad_()
    out = golden_adapter.low_frequency_crop(picture, case["band_width"])
    assert list(out.shape) == case["out_shape"]
    close(out, case.arrays["out"], case["rtol"], case["atol"])
    (gradient,) = torch.autograd.grad(out, picture, named(case["cotangent"]))
    close(gradient, case.arrays["grad_in"], case["rtol"], case["atol"])


@of_kind("lanczos_")
def test_lanczos_is_pillows_to_the_bit(case: golden.Case, backend: str) -> None:
    del backend
    noise = fill.tensor("image", (*case["hw"], 3))
    picture = np.clip(np.round(noise * 40 + 128), 0, 255).astype(np.uint8)
    assert np.array_equal(golden_adapter.lanczos_resize(picture, case["size"]), case.arrays["out"])


@of_kind("lr_")
def test_rates_of_every_iteration(case: golden.Case) -> None:
    keys = ("base", "final", "epochs", "iters_per_epoch", "warmup_epochs", "warmup_steps")
    rates = golden_adapter.lr_schedule(*(case[key] for key in keys))
    assert len(rates) == case["length"]
    close(rates[case.arrays["index"]], case.arrays["value"], case["rtol"])


@of_kind("model_")
def test_logits_and_gradients_of_official_weights(case: golden.Case) -> None:
    computed = ("attn_mask", "relative_position_index", "num_batches_tracked")
    schema = {name: entry for name, entry in case.schema.items() if not name.endswith(computed)}
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in fill.fill_state(schema).items()}
    model = golden_adapter.build_model(case["model"], case["img_size"], case["num_classes"], state).eval()
    picture = named(case["input"]).requires_grad_()
    logits = model(picture)
    close(logits, case.arrays["logits"], case["rtol"], case["atol"])
    assert sum(value.numel() for value in model.parameters()) == case["params"]
    if case["cotangent"]:
        (gradient,) = torch.autograd.grad(logits, picture, named(case["cotangent"]))
        close(golden.digest(gradient), case.arrays["grad_input_stats"], case["rtol"], case["atol"])


@of_kind("lamb_")
def test_steps_of_lamb(case: golden.Case) -> None:
    start = [named(("p0", (6, 5))), named(("p1", (5,))), torch.zeros(3, 2)]
    gradients = [
        [named((f"g{number}.{step}", value.shape)) * case["grad_scale"] for number, value in enumerate(start)]
        for step in range(case["steps"])
    ]
    found = golden_adapter.lamb(start, [True, False, True], gradients, case["weight_decay"], **case["options"])
    for number, value in enumerate(found):
        close(value, case.arrays[f"p{number}"], case["rtol"])
