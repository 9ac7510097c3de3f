"""The fill makes the numbers that the golden files were made with; the comparison can fail."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_shared.testing import fill, golden


def test_tensor_is_the_frozen_stream_of_its_name() -> None:
    wanted = np.float32([[0.023676395416259766, -0.18612070381641388, -0.01949254609644413, -0.1837931126356125]])
    assert fill.tensor("layer.weight", (2, 2), 0.5).reshape(1, -1).tolist() == wanted.tolist()


def test_roles_get_their_scales() -> None:
    big = 40_000
    assert fill.parameter("conv.weight", (100, 4, 10, 10)).std() == pytest.approx(400**-0.5, rel=0.02)
    assert fill.parameter("norm.weight", (big,)).mean() == pytest.approx(1.0, abs=0.002)
    assert fill.parameter("norm.bias", (big,)).std() == pytest.approx(0.1, rel=0.02)
    assert fill.parameter("norm.running_mean", (big,)).mean() == pytest.approx(0.0, abs=0.002)
    assert fill.parameter("norm.running_var", (big,)).min() >= 1.0


def test_integer_entries_are_left_to_the_model() -> None:
    state = fill.fill_state({"a": ((2,), "float32"), "index": ((2,), "int64"), "half": ((), "bfloat16")})
    assert set(state) == {"a", "half"}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_digest_is_mean_deviation_and_64_elements(values: list[float]) -> None:
    found = golden.digest(values)
    assert found.shape == (66,)
    assert found[0] == pytest.approx(np.mean(values), abs=1e-6)
    assert found[2] == values[0]
    assert found[-1] == values[-1]


def test_comparison_names_the_worst_place() -> None:
    golden.assert_close([1.0, 2.0], [1.0, 2.00001], 1e-5)
    with pytest.raises(AssertionError, match=r"log_loss differs by .* at 1"):
        golden.assert_close([1.0, 2.1], [1.0, 2.0], 1e-5, "log_loss")
    with pytest.raises(AssertionError, match="differs"):
        golden.assert_close([np.nan], [1.0], 1e-5)
    with pytest.raises(AssertionError, match="shape"):
        golden.assert_close([1.0], [1.0, 1.0], 1e-5)


def test_cases_of_either_form_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    rows = [{"name": "a_one", "file": "a.npz", "tolerance": 1e-5, "gamma": 0.9}]
    for content in (rows, {"note": "", "cases": rows}):
        (tmp_path / "cases.json").write_text(json.dumps(content))
        (case,) = golden.cases(tmp_path, "a_")
        assert (case.name, case.tolerance, case["gamma"], case.arrays["x"].tolist()) == ("a_one", 1e-5, 0.9, [0, 1, 2])
    with pytest.raises(AssertionError, match="no case"):
        golden.cases(tmp_path, "b_")


def test_schema_is_read_plain_and_compressed(tmp_path: Path) -> None:
    data = json.dumps({"w": [[2, 3], "float32"]}).encode()
    (tmp_path / "a.schema.json").write_bytes(data)
    (tmp_path / "a.schema.json.gz").write_bytes(gzip.compress(data))
    for name in ("a.schema.json", "a.schema.json.gz"):
        assert golden.read_schema(tmp_path / name) == {"w": ((2, 3), "float32")}
