"""One check for every operator: each backend against the float64 reference, PyTorch's dispatcher and its compiler."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jaxtyping
import torch
from torch import Tensor

from leap_shared import ops

__all__ = ["TOLERANCES", "check_operator", "prefer_interpreter", "without_type_checks"]

# |got - wanted| <= tolerance * (1 + |wanted|). Inputs are rounded to the dtype before the float64 reference sees them,
# so what is left is the rounding of the output and of a few intermediates: 4 eps for the half precisions, and for
# float32, where sums over hundreds of terms dominate, 84 eps.
TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 3.2e-2, torch.float16: 4e-3}


def prefer_interpreter() -> None:
    """Let Triton kernels run on the CPU where there is no GPU; call it at the top of conftest.py.

    Raises:
        RuntimeError: Triton is imported already, too late to switch its own library to the interpreter.
    """
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        return
    if "triton" in sys.modules:
        raise RuntimeError(
            "Triton was imported before prefer_interpreter(): call it earlier, or set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@contextlib.contextmanager
def without_type_checks() -> Iterator[None]:
    """Switch jaxtyping's checks off where `torch.compile` traces: it cannot trace them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def check_operator(
    operator: ops.Operator[..., Any],
    sample_inputs: Sequence[Sequence[Any]],
    backends: Sequence[str] | None = None,
    tolerances: Mapping[torch.dtype, float] = TOLERANCES,
    compile_backend: str = "aot_eager",
) -> None:
    """Check values, gradients, fake outputs, registration and compilation of an operator's backends.

    Every sample is tried in every dtype as it is, with non-contiguous tensors and gradients, and with an empty batch
    (the first axis of the first tensor, and of those whose annotation names that axis). What a backend's `supports`
    refuses is left out, but not everything may be.

    Args:
        operator: the one to check.
        sample_inputs: positional arguments per sample; floating-point tensors are cast to each dtype.
        backends: default: those registered that work on this machine.
        tolerances: by dtype; their keys are the dtypes that are tried.
        compile_backend: of `torch.compile`, "inductor" for the slow and whole check.

    Raises:
        AssertionError: names the backend, dtype, sample and the largest error.
    """
    layouts: dict[str, Callable[[list[Any]], list[Any]]] = {
        "as given": list,
        "non-contiguous": _non_contiguous,
        "empty batch": functools.partial(_empty_batch, operator),
    }
    state = {name: word for name, word in ops.backends().items() if word == "works" or word.startswith("interpreter")}
    for backend in [name for name in operator.implementations() if name in state] if backends is None else backends:
        device = "cuda" if backend == "triton" and state.get("triton") == "works" else "cpu"
        refusal, tried = "no sample was given", 0
        for (number, sample), dtype, (layout, change) in itertools.product(
            enumerate(sample_inputs), tolerances, layouts.items()
        ):
            args = change([_place(value, device, dtype) for value in sample])
            if (reason := operator.refusal(backend, *args)) is not None:
                refusal = reason
                continue
            tried += 1
            try:
                with ops.use(backend):
                    _check_one(operator, args, tolerances[dtype], compile_backend if tried == 1 else None)
            except Exception as error:
                what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                where = f"{operator.name}, backend {backend}, {dtype}, sample {number}, {layout}"
                raise AssertionError(f"{where}: {what}") from error
        if tried == 0:
            raise AssertionError(f"{operator.name}, backend {backend}: ran no sample: {refusal}")


def _check_one(operator: Any, args: Sequence[Any], tolerance: float, compile_backend: str | None) -> None:
    wanted = _evaluate(operator.reference, [_place(value, "cpu", torch.float64) for value in args], args)
    _compare("eager", _evaluate(operator.overload, args, args), wanted, tolerance)
    torch.library.opcheck(operator.overload, tuple(args), test_utils="test_faketensor")
    if compile_backend is not None:
        with warnings.catch_warnings():  # opcheck itself looks at the gradients of tensors that are no leaves
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            torch.library.opcheck(operator.overload, tuple(_leaf(value) for value in args))
        torch.compiler.reset()
        with without_type_checks():
            compiled = torch.compile(operator, fullgraph=True, backend=compile_backend)
            _compare("compiled", _evaluate(compiled, args, args), wanted, tolerance)


def _evaluate(function: Callable[..., Any], args: Sequence[Any], rounded: Sequence[Any]) -> dict[str, Tensor]:
    """Outputs by name, and gradients of the floating-point arguments; output gradients are in `rounded`'s dtype."""
    leaves = [_leaf(value) for value in args]
    result = function(*leaves)
    outputs = {f"output {i}": y for i, y in enumerate(result if isinstance(result, tuple) else (result,))}
    inputs = {f"gradient {i}": x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    roots = [output for output in outputs.values() if output.requires_grad]
    given = next(value for value in rounded if isinstance(value, Tensor) and value.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(root.shape, generator=generator).to(given.dtype).to(root) for root in roots]
    if not given.is_contiguous():  # as `output.sum().backward()` gives it: one number, expanded
        weights = [root.new_ones(()).expand(root.shape) for root in roots]
    found: Sequence[Tensor | None] = ()
    if roots:
        found = torch.autograd.grad(roots, list(inputs.values()), weights, allow_unused=True)
    gradients = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), found, strict=False)}
    return {name: value.detach() for name, value in (outputs | gradients).items()}


def _compare(mode: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        if name not in got or got[name].shape != value.shape:
            raise AssertionError(f"{mode}: {name} has no or another shape than {tuple(value.shape)}")
        error = (got[name].cpu().double() - value.double()).abs() / (1 + value.double().abs())
        worst = error.nan_to_num(nan=float("inf")).max().item() if error.numel() else 0.0
        if worst > tolerance:
            raise AssertionError(f"{mode}: {name} is off by {worst:.3g}, more than {tolerance:.3g}")


def _place(value: Any, device: str, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device, dtype if value.is_floating_point() else value.dtype)


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _non_contiguous(args: Sequence[Any]) -> list[Any]:
    return [x.repeat_interleave(2, dim=-1)[..., ::2] if isinstance(x, Tensor) and x.ndim else x for x in args]


def _empty_batch(operator: Any, args: Sequence[Any]) -> list[Any]:
    hints = [*typing.get_type_hints(operator.reference).values()][: len(args)]
    axes = []
    for hint in hints:
        shapes = [getattr(member, "dim_str", "") for member in (hint, *typing.get_args(hint))]
        axes.append("".join(shapes).split(" ")[0])
    first = next(index for index, value in enumerate(args) if isinstance(value, Tensor))
    batched = [index == first or (axis != "" and axis == axes[first]) for index, axis in enumerate(axes)]
    return [x[:0] if batch and isinstance(x, Tensor) else x for x, batch in zip(args, batched, strict=True)]
