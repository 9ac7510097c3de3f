"""The fill makes the numbers that the golden files were made with; the comparison can fail."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leap_shared.testing import fill, golden


def test_tensor_is_the_frozen_stream_of_its_name() -> None:
    wanted = np.float32([[0.023676395416259766, -0.18612070381641388, -0.01949254609644413, -0.1837931126356125]])
    assert fill.tensor("layer.weight", (2, 2), 0.5).reshape(1, -1).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("norm.weight", (2,), [1.006795883178711, 1.1642957925796509]),
        ("norm.bias", (2,), [-0.11793474853038788, -0.06297024339437485]),
        ("bn.running_var", (2,), [1.020931363105774, 1.0024579763412476]),
        ("bn.running_mean", (2,), [0.11585340648889542, 0.06459940969944]),
        ("conv.weight", (1, 2, 1, 1), [0.46799221634864807, -0.7159111499786377]),
        ("scale", (), [-0.024814190343022346]),
    ],
)
def test_parameter_of_every_role_is_frozen(name: str, shape: tuple[int, ...], wanted: list[float]) -> None:
    found = fill.parameter(name, shape)
    assert (found.shape, found.dtype) == (shape, np.float32)
    assert found.reshape(-1).tolist() == wanted


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
    places = [round(index * (len(values) - 1) / 63) for index in range(64)]
    assert found[0] == pytest.approx(np.mean(values), abs=1e-6)
    assert found[1] == pytest.approx(np.sqrt(np.mean((values - np.mean(values)) ** 2)), abs=1e-6)
    assert found[2:].tolist() == [values[place] for place in places]


def test_digest_flattens_tensors_in_row_major_order() -> None:
    assert golden.digest(torch.arange(64.0).reshape(8, 8))[2:].tolist() == list(range(64))


def test_comparison_names_the_worst_place() -> None:
    golden.assert_close([1.0, 2.0], [1.0, 2.00001], 1e-5)
    with pytest.raises(AssertionError, match=r"log_loss differs by .* at \(1,\)"):
        golden.assert_close([1.0, 2.1], [1.0, 2.0], 1e-5, "log_loss")
    with pytest.raises(AssertionError, match="differs"):
        golden.assert_close([np.nan], [1.0], 1e-5)
    with pytest.raises(AssertionError, match="shape"):
        golden.assert_close([1.0], [1.0, 1.0], 1e-5)
    with pytest.raises(AssertionError, match="shape"):
        golden.assert_close(np.ones((2, 3)), np.ones((3, 2)), 1e-5)


def test_comparison_takes_tensors_and_equal_infinities() -> None:
    got = torch.tensor([1.0, -torch.inf], dtype=torch.bfloat16, requires_grad=True)
    golden.assert_close(got, [1.0, -np.inf], 0.0)
    with pytest.raises(AssertionError, match="differs"):
        golden.assert_close(got, [1.0, np.inf], 1e9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.floats(-1, 1), st.floats(1e-6, 1e-2))
def test_comparison_is_relative_to_one_plus_the_wanted_size(want: list[float], shift: float, tolerance: float) -> None:
    if abs(abs(shift) - tolerance) < 1e-9:
        return
    got = [value + shift * (1 + abs(value)) for value in want]
    if abs(shift) < tolerance:
        golden.assert_close(got, want, tolerance)
    else:
        with pytest.raises(AssertionError):
            golden.assert_close(got, want, tolerance)


def test_cases_of_every_form_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    facts = {"file": "a.npz", "tolerance": 1e-5, "gamma": 0.9}
    rows = [{"name": "a_one", **facts}]
    for content in (rows, {"note": "n", "cases": rows}, {"note": "n", "cases": [{"case": "a_one", **facts}]}):
        (tmp_path / "cases.json").write_text(json.dumps(content))
        (case,) = golden.cases(tmp_path, "a_")
        assert (case.name, case.tolerance, case["gamma"], case.arrays["x"].tolist()) == ("a_one", 1e-5, 0.9, [0, 1, 2])
        assert case.header == ({} if content is rows else {"note": "n"})
    with pytest.raises(AssertionError, match="no case"):
        golden.cases(tmp_path, "b_")


def test_arrays_that_need_unpickling_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        _ = golden.Case(tmp_path, {"file": "a.npz"}).arrays


def test_tolerance_of_several_numbers_is_left_to_the_test(tmp_path: Path) -> None:
    assert golden.Case(tmp_path, {"name": "a", "tol": 0}).tolerance == 0
    with pytest.raises(TypeError, match="of a is no single number but"):
        _ = golden.Case(tmp_path, {"name": "a", "tolerance": {"atol": 1e-6}}).tolerance


@pytest.mark.parametrize("name", ["a.schema.json", "a.schema.json.gz"])
def test_schema_is_read_plain_and_compressed(tmp_path: Path, name: str) -> None:
    data = json.dumps({"w": [[2, 3], "float32"]}).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert golden.read_schema(tmp_path / name) == {"w": ((2, 3), "float32")}
    assert golden.Case(tmp_path, {"schema": name}).schema == {"w": ((2, 3), "float32")}


def test_schema_may_stand_in_the_case_and_hold_several_networks(tmp_path: Path) -> None:
    schema = {"actor": {"w": [[2], "float32"]}, "b": [[], "int64"]}
    assert golden.Case(tmp_path, {"schema": schema}).schema == {"actor": {"w": ((2,), "float32")}, "b": ((), "int64")}
