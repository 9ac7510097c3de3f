from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import nn

from leap_shared.bench import (
    Row,
    contenders,
    copy_with,
    dtype_on,
    infer,
    memory_table,
    model_call,
    models,
    noise,
    peak_allocation,
    placed,
    training_step,
    write,
)

CPU = torch.device("cpu")
MAP = 4 * 100_000  # bytes
ROUNDING = 100  # bytes of scalars beside the maps


def test_training_step_gives_every_input_a_fresh_gradient():
    layer = nn.Linear(3, 4)
    x = torch.randn(2, 3, requires_grad=True)
    step = training_step(lambda: layer(x), (x, *layer.parameters()))
    step()
    first = [tensor.grad for tensor in (x, *layer.parameters())]
    step()
    for before, tensor in zip(first, (x, *layer.parameters()), strict=True):
        torch.testing.assert_close(tensor.grad, before)
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 3))


def test_training_step_goes_back_through_each_of_several_outputs():
    x = torch.ones(2, requires_grad=True)
    training_step(lambda: (2 * x, 3 * x), (x,))()
    assert x.grad is not None
    assert x.grad.tolist() == [5, 5]


def test_inference_records_no_gradient():
    x = torch.ones(2, requires_grad=True)
    assert not infer(torch.mul, x, 2).requires_grad


@pytest.mark.parametrize(("gpu", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_gpu_is_measured_in_bfloat16_and_compiled(gpu, dtype, monkeypatch):
    compiled = []
    monkeypatch.setattr(models, "on_gpu", lambda device: gpu)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    layer, x = placed(nn.Linear(3, 3), CPU), noise(CPU, 0, 2, 3)
    assert {layer.weight.dtype, x.dtype, dtype_on(CPU), model_call(layer, x)().dtype} == {dtype}
    assert len(compiled) == gpu
    assert not layer.training


def test_noise_is_that_of_its_seed():
    assert torch.equal(noise(CPU, 3, 4), noise(CPU, 3, 4))
    assert not torch.equal(noise(CPU, 3, 4), noise(CPU, 4, 4))


def test_a_copy_has_its_layers_replaced_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    found = copy_with(model, nn.Linear, lambda layer: nn.Sequential(layer, nn.Identity()))
    assert [type(part) for part in (found[0], found[1][0], found[1][1])] == [nn.Sequential, nn.Sequential, nn.ReLU]
    assert torch.equal(found[1][0][0].weight, model[1][0].weight)
    assert isinstance(model[0], nn.Linear)
    assert found[0][0] is not model[0]


def test_peak_is_what_is_held_at_once_beyond_the_results():
    x = torch.zeros(100_000)

    def call():
        first, second, third = x + 1, x + 2, x + 3
        del second, third
        return (first + 1,)

    assert peak_allocation(call, CPU) == pytest.approx(3 * MAP, abs=ROUNDING)


def test_peak_of_a_backward_pass_counts_what_was_saved_for_it():
    x = torch.ones(100_000, requires_grad=True)

    def call(saved):
        y = x
        for _ in range(saved):
            y = y.exp()
        return (y, *torch.autograd.grad(y, x, torch.ones(()).expand(100_000)))

    three, five = (peak_allocation(partial(call, saved), CPU) for saved in (3, 5))
    assert five - three == pytest.approx(2 * MAP, abs=ROUNDING)


def test_peak_counts_buffers_that_a_thread_keeps():
    kept = threading.local()
    x = torch.zeros(100_000)

    def call():
        if not hasattr(kept, "buffer"):
            kept.buffer = torch.empty(100_000)
        return (x + 1,)

    call()
    assert peak_allocation(call, CPU) == pytest.approx(MAP, abs=ROUNDING)


def test_results_that_share_memory_are_left_out_once():
    x = torch.zeros(100_000)

    def call():
        y = x + 1
        return y, y[:10]

    assert peak_allocation(call, CPU) == pytest.approx(0, abs=ROUNDING)


def test_peak_tells_the_terminal_nothing(capfd):
    peak_allocation(lambda: (torch.zeros(3),), CPU)
    assert capfd.readouterr() == ("", "")


def test_what_a_call_raises_comes_through():
    def call():
        raise ArithmeticError("ill")

    with pytest.raises(ArithmeticError, match="ill"):
        peak_allocation(call, CPU)


def row(name, **memory):
    return Row("toy", "cpu", 1, "float32", 1.0, name, 2.0, 2.0, (1.9, 2.1), None, None, {"peak_memory_mb": memory})


def test_memory_is_told_by_contender():
    rows = [row("first", ours=1.25, peer=None), row("second", ours=1.25, peer=20.0)]
    assert memory_table(rows).splitlines()[-2:] == [
        "| toy | cpu | 1 | 1.2 | first | unknown |",
        "| toy | cpu | 1 | 1.2 | second | 20.0 |",
    ]


def test_absent_peers_have_a_row_of_the_table_and_are_stored(tmp_path):
    data, text = write([row("first", ours=1.0, peer=2.0)], tmp_path, "toy", absent={"natten": "not installed"})
    lines = text.read_text().splitlines()
    assert [line.count("|") for line in lines[:4]] == [11] * 4
    assert "| natten | not installed |" in lines[3]
    assert '"natten": "not installed"' in data.read_text()


def test_operations_of_what_refuses_to_be_looked_into_are_unknown():
    matrix, calls = torch.ones(3, 3), []

    def call():
        calls.append(matrix @ matrix)
        if torch.utils._python_dispatch._len_torch_dispatch_stack():
            raise RuntimeError("a mode is active")

    assert contenders.Local(call, "cpu").facts()["gflop"] is None
    assert len(calls) == 2
