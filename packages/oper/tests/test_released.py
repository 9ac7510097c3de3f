"""The authors' .npy files are read whichever NumPy and Python wrote them, and nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import walk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from leap_oper import Priorities, oper_r
from leap_oper.priorities import convert_released
from leap_oper.released import read_npy
from leap_shared.errors import UserError

NAME = "nstep_nstep_nstep=5_500000_3_500000_kitchen-partial-v0_2.npy"
ROWS = 60


def header() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    return file.getvalue()


def write(path: Path, pickled: bytes) -> Path:
    path.write_bytes(header() + pickled)
    return path


def weights_of(iteration: int) -> np.ndarray:
    weights = np.random.default_rng(iteration).exponential(size=(ROWS, 1))
    weights /= weights.mean()
    return weights


def released() -> dict[Any, Any]:
    return {"iter": 3, "first_eval_steps": 5e5, "eval_steps": np.int64(500_000)} | {k: weights_of(k) for k in (1, 2, 3)}


def pickled(content: Any, protocol: int, numpy: str) -> bytes:
    """`content` in a 0-dimensional object array, with the module names of NumPy 1 or 2."""
    text = pickle.dumps(np.array(content, dtype=object), protocol=protocol)
    if numpy == "2":
        return text
    for module in (b"multiarray", b"numeric"):
        new, old = b"numpy.core." + module, b"numpy._core." + module
        text = text.replace(b"c" + old, b"c" + new)  # up to protocol 3
        text = text.replace(bytes([len(old)]) + old, bytes([len(new)]) + new)  # a length and the text
    return pickletools.optimize(text)  # frames of the new length


def python2() -> bytes:
    """What Python 2 wrote: arrays whose dtype codes and bytes are its 8-bit strings."""
    raw = weights_of(1).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K%cK\x01\x86" % ROWS
        + b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )  # fmt: skip
    content = b"}(U\x04iterK\x01K\x01" + array + b"u"
    outer = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01)"
        b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89]"
    )
    return b"\x80\x02" + outer + content + b"atb."


@pytest.mark.parametrize("numpy", ["1", "2"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_weights_of_all_iterations_are_read(tmp_path: Path, protocol: int, numpy: str) -> None:
    text = pickled(released(), protocol, numpy)
    assert (b"numpy._core" in text) == (numpy == "2")
    weights = Priorities.load(write(tmp_path / NAME, text))
    np.testing.assert_allclose(weights.weights, [[weights_of(k)[:, 0] for k in (1, 2, 3)]], rtol=1e-12)


def test_weights_that_python_2_wrote_are_read(tmp_path: Path) -> None:
    weights = Priorities.load(write(tmp_path / "w.npy", python2()), iteration=1)
    np.testing.assert_allclose(weights.probs * ROWS, weights_of(1)[:, 0], rtol=1e-12)


@given(
    arrays.arrays(
        arrays.floating_dtypes(sizes=(32, 64)) | arrays.integer_dtypes() | arrays.boolean_dtypes(),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0),
    ),
    st.integers(2, 5),
    st.sampled_from("CF"),
)
def test_arrays_come_back_in_native_byte_order(array: np.ndarray, protocol: int, order: Any) -> None:
    read = read_pickle(pickle.dumps([np.asarray(array, order=order), array.reshape(-1)[:1]], protocol))
    np.testing.assert_array_equal(read[0], array)
    assert read[0].dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read[1], array.reshape(-1)[:1])


def read_pickle(text: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return read_npy(write(Path(folder) / "a.npy", text))


def test_plain_containers_are_read() -> None:
    content = {"a": [1, (2.5, None)], "b": {"c": "text"}, "d": {1, 2}, "e": np.float32(0.5), "f": b"raw"}
    for protocol in (2, 5):
        assert read_pickle(pickle.dumps(content, protocol)) == content


def test_file_name_and_settings_become_facts(tmp_path: Path) -> None:
    meta = Priorities.load(write(tmp_path / NAME, pickled(released(), 4, "2"))).meta
    assert meta["seeds"] == [2]
    assert (meta["n_step"], meta["env"]) == (5, "kitchen-partial-v0")
    assert (meta["first_steps"], meta["steps"]) == (500_000, 500_000)


def test_one_iteration_can_be_drawn_by(tmp_path: Path) -> None:
    weights = Priorities.load(write(tmp_path / "w.npy", pickled(released(), 4, "2")), walk(), iteration=2)
    np.testing.assert_allclose(weights.probs * ROWS, weights_of(2)[:, 0], rtol=1e-12)


def test_files_of_several_seeds_stack(tmp_path: Path) -> None:
    parts = [
        Priorities.load(write(tmp_path / NAME.replace("_2.", f"_{seed}."), pickled(released(), 4, "2")))
        for seed in (1, 2)
    ]
    together = Priorities.stack(parts)
    assert together.weights.shape == (2, 3, ROWS)
    assert together.meta["seeds"] == [1, 2]


@pytest.mark.parametrize("iteration", [0, 4])
def test_iteration_that_is_not_stored_is_refused(tmp_path: Path, iteration: int) -> None:
    path = write(tmp_path / "w.npy", pickled(released(), 4, "2"))
    with pytest.raises(UserError, match=f"iteration {iteration} is not among the 3 stored"):
        Priorities.load(path, iteration=iteration)


def test_older_advantages_give_the_weights_of_iteration_1(tmp_path: Path) -> None:
    advantage = np.random.default_rng(0).standard_normal((ROWS, 1))
    path = write(tmp_path / "w.npy", pickled({1000000: {"adv": advantage, "v": advantage}}, 4, "2"))
    distance = advantage[:, 0] - advantage.min()
    np.testing.assert_allclose(Priorities.load(path, iteration=1).weights[0], distance / distance.mean(), rtol=1e-12)
    with pytest.raises(UserError, match="iteration 2 is not among the 1 stored"):
        Priorities.load(path, iteration=2)


def test_returns_give_the_weights_of_oper_r(tmp_path: Path) -> None:
    data = walk()
    np.save(tmp_path / "hopper_returns.npy", np.repeat(data.rewards.reshape(6, 10).sum(axis=1), 10)[:, None])
    loaded = Priorities.load(tmp_path / "hopper_returns.npy", data)
    np.testing.assert_allclose(loaded.weights, oper_r(data).weights, atol=1e-5)


def test_equal_returns_warn_and_are_uniform(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", np.ones(ROWS))
    with pytest.warns(UserWarning, match="all returns are 1"):
        np.testing.assert_array_equal(Priorities.load(tmp_path / "r.npy").weights, 1.0)


def test_converted_file_holds_the_same_and_knows_its_data(tmp_path: Path) -> None:
    path = write(tmp_path / NAME, pickled(released(), 4, "2"))
    convert_released(path, tmp_path / "w.npz", walk())
    loaded = Priorities.load(tmp_path / "w.npz", walk())
    np.testing.assert_allclose(loaded.weights, Priorities.load(path).weights, rtol=1e-6)
    with pytest.raises(UserError, match="made for other data"):
        Priorities.load(tmp_path / "w.npz", walk(seed=1))


def test_file_of_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are 60 weights for 70 rows"):
        Priorities.load(write(tmp_path / "w.npy", pickled(released(), 4, "2")), walk(7))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_pickle_is_named_and_not_executed(tmp_path: Path, protocol: int) -> None:
    content = released() | {"note": Evil(tmp_path / "made")}
    path = write(tmp_path / "w.npy", pickled(content, protocol, "2"))
    with pytest.raises(UserError, match=rf"only be read by running {os.mkdir.__module__}\.mkdir, which is refused"):
        Priorities.load(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "copyreg _reconstructor",
        "numpy load",
        "numpy.core.multiarray fromfile",
        "numpy memmap",
        "functools partial",
        "collections Counter",
    ],
)
def test_no_other_name_is_allowed(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    path = write(tmp_path / "w.npy", f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match=rf"running {module}\.{attribute}, which"):
        read_npy(path)


def test_file_cannot_change_how_the_next_is_read(tmp_path: Path) -> None:
    change = b"\x80\x02cnumpy\ndtype\n(NX\x08\x00\x00\x00__code__NtbN."
    with pytest.raises(UserError, match="not a whole"):
        read_npy(write(tmp_path / "a.npy", change))
    poison = b"\x80\x02cnumpy\ndtype\nN}X\x0c\x00\x00\x00__defaults__N\x85s\x86b0N."
    assert read_npy(write(tmp_path / "a.npy", poison)) is None
    assert Priorities.load(write(tmp_path / "w.npy", pickled(released(), 4, "2"))).weights.shape == (1, 3, ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"iter": 3}, "has the keys 'iter'"),
        ({1: np.ones(4), 2: np.ones(5)}, r"with \[4, 5\] rows"),
        ({1: np.ones((4, 2))}, r"iteration 1 has shape \(4, 2\)"),
        ({1: np.array([1.0, np.nan])}, "1 weights are NaN or infinite"),
        ({1: np.array(["a", "b"])}, "not a whole .npy file of numbers"),
        ({1: np.zeros(3, "f4,i4")}, "not a whole .npy file of numbers"),
        ({1000000: {"adv": np.ones(3)}}, "order no rows"),
        ("text", "holds a str"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "w.npy", pickled(content, 4, "2"))
    with pytest.raises(UserError, match=message):
        Priorities.load(path)


@pytest.mark.parametrize("size", [7, 60, 200, 700])
def test_cut_file_is_refused(tmp_path: Path, size: int) -> None:
    whole = header() + pickled(released(), 4, "2")
    (tmp_path / "w.npy").write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"not a whole \.npy file"):
        Priorities.load(tmp_path / "w.npy")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*w\.npy: No such file"):
        read_npy(tmp_path / "w.npy")


def test_lists_that_hold_each_other_a_thousandfold_are_no_work(tmp_path: Path) -> None:
    nested: list[Any] = [1.0]
    for _ in range(200):
        nested = [nested, nested]
    content = np.empty((), dtype=object)
    content[()] = {"iter": 1, 1: nested}
    path = write(tmp_path / NAME, pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="is a list, expected an array of numbers"):
        Priorities.load(path)
