"""Triton kernels of the operators in test_ops.py; a module of its own, imported where one is launched."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _softmax_forward(x, out, columns, block: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, block)
    inside = column < columns
    value = tl.load(x + row * columns + column, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * columns + column, (value / tl.sum(value, 0)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_backward(gradient, out, result, columns, block: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, block)
    inside = column < columns
    dy = tl.load(gradient + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(out + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(dy * y, 0))
    tl.store(result + row * columns + column, dx.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_relu(x, bias, out, total, scale, columns, block: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, block)
    inside = column < columns
    value = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, tl.maximum(value, 0.0) * scale, 0.0)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)
    tl.store(total + row, tl.sum(value, 0).to(total.dtype.element_ty))


def softmax(x):
    return _by_row(_softmax_forward, x.contiguous())


def softmax_backward(gradient, out):
    return _by_row(_softmax_backward, gradient.contiguous(), out.contiguous())


def _by_row(kernel, *tensors):
    out = torch.empty_like(tensors[0])
    rows, columns = out.shape
    if rows > 0:
        kernel[(rows,)](*tensors, out, columns, block=triton.next_power_of_2(columns))
    return out


def scaled_relu(x, bias, scale):
    x, bias = x.contiguous(), bias.contiguous()
    out, total = torch.empty_like(x), x.new_empty(x.shape[0])
    if len(x) > 0:
        _scaled_relu[(len(x),)](x, bias, out, total, scale, x.shape[1], block=triton.next_power_of_2(x.shape[1]))
    return out, total
