from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from leap_shared import bench
from leap_shared.bench import Case, Remote, compare, contenders, report, stamp, table, write
from leap_shared.bench.compare import ratio_interval
from leap_shared.errors import UserError

KEYS = {"case", "device", "threads", "dtype", "ours_ms", "peer", "peer_ms", "ratio", "interval", "target", "met"}


class Clock:
    """A clock that moves only when a callable says so, and remembers who moved it."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def task(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock():
    return Clock()


def _rows(clock, target=None, peers=(("slow", 0.03),), **options):
    peers = {name: clock.task(name, seconds) for name, seconds in peers}
    case = Case("toy", clock.task("ours", 0.01), peers, target)
    return compare([case], rounds=5, min_seconds=0.02, timer=clock, **options)


def test_row_holds_medians_ratio_and_verdict(clock):
    (row,) = _rows(clock, target=2.5)
    assert (row.ours_ms, row.peer_ms, row.ratio) == pytest.approx((10, 30, 3))
    assert row.interval == pytest.approx((3, 3))
    assert (row.target, row.met) == (2.5, True)
    assert row.details["iqr_ms"] == {"ours": pytest.approx([10, 10]), "peer": pytest.approx([30, 30])}


def test_missed_target_is_said_and_no_target_gives_no_verdict(clock):
    first, second = _rows(clock, target={"slow": 3.5}, peers=[("slow", 0.03), ("quick", 0.005)])
    assert (first.peer, first.target, first.met) == ("slow", 3.5, False)
    assert (second.peer, second.target, second.met) == ("quick", None, None)


def test_json_row_has_the_common_keys_and_details(clock):
    (row,) = _rows(clock)
    value = json.loads(json.dumps(row.to_json()))
    assert set(value) == KEYS | {"details"}
    assert set(value["details"]) == {"rounds", "iqr_ms", "iterations", "peak_memory_mb", "gflop"}
    assert value["interval"] == pytest.approx([3, 3])


def test_calls_are_calibrated_to_the_least_time(clock):
    (row,) = _rows(clock)
    assert row.details["iterations"] == {"ours": 2, "peer": 1}


def test_every_round_runs_every_contender_once_in_shuffled_order(clock):
    _rows(clock, peers=[("slow", 0.03), ("slower", 0.05)], progress=lambda rounds, description: _marked(rounds, clock))
    text = "".join({"ours": "o", "slow": "s", "slower": "S"}.get(call, call) for call in clock.calls)
    rounds = re.split(r"\|", text)[1:-1]
    assert [sorted(turn.replace("oo", "o")) for turn in rounds] == [["S", "o", "s"]] * 5
    assert len(set(rounds)) > 1


def _marked(rounds, clock):
    for number in rounds:
        clock.calls.append("|")
        yield number
    clock.calls.append("|")


def test_same_seed_runs_the_same_order(clock):
    other = Clock()
    _rows(clock, seed=3)
    _rows(other, seed=3)
    assert clock.calls == other.calls


def test_drift_of_the_machine_cancels_in_the_ratio():
    clock = Clock()
    slowdown = [1.0]

    def task(seconds):
        def run():
            slowdown[0] *= 1.002
            clock.now += seconds * slowdown[0]

        return run

    case = Case("drifting", task(1.0), {"peer": task(1.5)})
    (row,) = compare([case], rounds=200, timer=clock)
    assert row.ratio == pytest.approx(1.5, rel=0.02)
    assert slowdown[0] > 2


def test_interval_covers_the_true_ratio_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        ours, peer = np.exp(0.1 * generator.standard_normal((2, 30))) * [[1.0], [1.5]]
        low, high = ratio_interval(ours, peer, generator, resamples=500)
        covered += low <= 1.5 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_interval_uses_both_times_of_a_round():
    noise = np.exp(np.random.default_rng(0).standard_normal(31))
    low, high = ratio_interval(noise, 2 * noise, np.random.default_rng(1))
    assert (low, high) == pytest.approx((2, 2))


def test_cases_are_built_when_their_turn_comes(clock):
    order = []

    def cases():
        for name in ("first", "second"):
            order.append(f"build {name}")
            yield Case(
                name, clock.task("ours", 0.02), {"peer": lambda name=name: order.append(name) or clock.task("", 1)()}
            )

    compare(cases(), rounds=2, timer=clock)
    assert order.index("build second") > order.index("first")
    assert "first" not in order[order.index("build second") :]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_set_inside_and_restored(clock, fails):
    before, seen = torch.get_num_threads(), []

    def ours():
        seen.append(torch.get_num_threads())
        clock.now += 1
        if fails:
            raise ArithmeticError

    try:
        compare([Case("toy", ours, {"peer": clock.task("peer", 1)})], threads=before + 1, rounds=2, timer=clock)
    except ArithmeticError:
        assert fails
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_garbage_collection_rests_while_timing():
    seen = []
    contenders.Local(lambda: seen.append(gc.isenabled()), "cpu").time(2)
    assert (seen, gc.isenabled()) == ([False, False], True)


def test_flops_are_those_of_torch():
    matrix = torch.randn(20, 30)
    assert contenders.Local(lambda: matrix @ matrix.T, "cpu").facts()["gflop"] == pytest.approx(2 * 20 * 30 * 20 / 1e9)
    assert contenders.Local(lambda: matrix + 1, "cpu").facts()["gflop"] is None


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux forgets the peak")
def test_peak_memory_of_a_call_is_what_it_adds_and_gives_back():
    held = torch.ones(40_000_000)
    assert contenders.Local(lambda: held[:1].add(1), "cpu").facts()["peak_memory_mb"] < 10
    peak = contenders.Local(lambda: torch.ones(20_000_000).sum(), "cpu").facts()["peak_memory_mb"]
    assert 79 <= peak <= 100


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    def refuse(*_):
        raise AttributeError

    monkeypatch.setattr(contenders.ctypes, "CDLL", refuse)
    assert contenders.Local(lambda: None, "cpu").facts()["peak_memory_mb"] is None


@pytest.mark.gpu
def test_cuda_is_timed_by_events_and_its_memory_is_the_allocators():
    matrix = torch.randn(2048, 2048, device="cuda")
    case = Case("matmul", lambda: matrix @ matrix, {"twice": lambda: (matrix @ matrix) @ matrix})
    (row,) = compare([case], device="cuda", rounds=10)
    assert 1.2 < row.ratio < 3.5
    assert row.details["peak_memory_mb"]["ours"] == pytest.approx(2048 * 2048 * 4 / 1e6, rel=0.1)
    assert row.details["gflop"] == {"ours": pytest.approx(2 * 2.048**3), "peer": pytest.approx(4 * 2.048**3)}


PEER = """
import time
import torch

def build(size, exponent=1):
    print("peers may talk")
    matrix = torch.randn(size, size)
    def run():
        print("even while they run")
        return torch.linalg.matrix_power(matrix @ matrix, exponent)
    return run

def broken():
    def run():
        raise ArithmeticError("the peer is ill")
    return run

def threads():
    raise ArithmeticError(f"{torch.get_num_threads()} threads")

def dying():
    import os
    return lambda: os._exit(7)
"""


@pytest.fixture
def peer_module(tmp_path, monkeypatch):
    (tmp_path / "some_peer.py").write_text(PEER)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("peer_module")
def test_peer_in_a_process_of_its_own_is_measured_in_turn_and_keeps_stdout_clean(capfd):
    matrix = torch.randn(16, 16)
    case = Case("remote", lambda: matrix @ matrix, {"theirs": Remote("some_peer:build", {"size": 32})})
    (row,) = compare([case], rounds=3, min_seconds=1e-4)
    assert row.details["gflop"] == {"ours": pytest.approx(2 * 16**3 / 1e9), "peer": pytest.approx(2 * 32**3 / 1e9)}
    assert row.peer_ms > 0
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("peer_module")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("some_peer:broken", "the peer is ill"),
        ("some_peer:threads", "^3 threads$"),
        ("some_peer:absent", "has no attribute 'absent'"),
        ("some_peer:dying", "the process of some_peer:dying ended while it was measured"),
    ],
)
def test_failing_child_is_told_with_its_reason(factory, message, clock):
    with pytest.raises((RuntimeError, ArithmeticError, AttributeError), match=message):
        compare([Case("remote", Remote(factory), {"peer": clock.task("peer", 1)})], rounds=2, threads=3, timer=clock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 1}, "rounds is 1: give at least 2"),
        ({"threads": 0}, "threads is 0: give at least 1"),
        ({"warmup": 0}, "warmup is 0: give at least 1"),
        ({"min_seconds": 0.0}, "min_seconds is 0.0: give at least"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        compare([], **options)


def test_case_without_peer_or_with_a_target_for_nobody_is_refused():
    with pytest.raises(UserError, match="has no peer"):
        Case("alone", time.time, {})
    with pytest.raises(UserError, match=r"target for 'eagre': did you mean eager\?"):
        Case("misspelt", time.time, {"eager": time.time}, {"eagre": 1.0})


def test_stamp_says_machine_and_versions_and_nobody():
    value = stamp()
    assert value.keys() - {"commit"} == {
        "cpu", "cores", "memory", "os", "python", "torch", "numpy", "triton", "cuda_device", "threads", "date"
    }  # fmt: skip
    assert all(isinstance(text, str) and text for text in value.values())
    assert value["python"] == sys.version.split()[0]
    assert not any(
        secret and secret in " ".join(value.values()) for secret in (os.uname().nodename, os.environ.get("HOME"))
    )


def test_stamp_names_the_commit_of_the_checkout_that_tracks_the_file(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run([shutil.which("git"), *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "module.py"
    file.write_text("")
    assert report._commit(file) is None
    git("init")
    assert report._commit(file) is None
    git("add", "module.py")
    git("commit", "-m", "first")
    clean = report._commit(file)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    file.write_text("changed")
    assert report._commit(file) == clean + "+"


def test_table_has_a_line_per_row(clock):
    rows = _rows(clock, target={"slow": 4.0}, peers=[("slow", 0.03), ("quick", 0.005)])
    assert table(rows).splitlines()[2:] == [
        "| toy | cpu | 1 | float32 | 10 | slow | 30 | 3.00 (3.00 to 3.00) | 4 | no |",
        "| toy | cpu | 1 | float32 | 10 | quick | 5 | 0.50 (0.50 to 0.50) |  |  |",
    ]


def test_written_files_hold_stamp_rows_table_and_picture(clock, tmp_path):
    pytest.importorskip("matplotlib")
    rows = _rows(clock, target=2.0)
    data, text, picture = write(rows, tmp_path / "results", "toy", plot=True)
    value = json.loads(data.read_text())
    assert value["rows"] == [row.to_json() for row in rows]
    assert value["stamp"]["torch"] == torch.__version__
    assert table(rows) in text.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_extra_and_writes_nothing(clock, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = _rows(clock)
    with pytest.raises(UserError, match=r'pip install "leap-shared\[report\]"'):
        write(rows, tmp_path, "toy", plot=True)
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in write(rows, tmp_path, "toy")] == ["toy.json", "toy.md"]


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        write([], tmp_path, "toy")


def test_public_names_are_those_of_the_module():
    assert all(hasattr(bench, name) for name in bench.__all__)
