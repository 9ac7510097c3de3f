"""One operator, several implementations: a readable reference, a fast CPU version, Triton kernels.

A package writes the reference as an ordinary function and adds what is faster::

    @operator("leap_flatten::focus")
    def focus(x: Float[Tensor, "batch tokens dim"], power: float) -> Float[Tensor, "batch tokens dim"]: ...

    @focus.backend("triton", supports=lambda x, power: x.shape[-1] <= 512 or "dim is over 512")
    def _(x, power):
        from leap_flatten.ops import triton

        return triton.focus(x, power)

The operator lives in PyTorch's dispatcher, so that `torch.compile`, `torch.export`, autograd and `opcheck` know it;
`torch.onnx.export` with ``dynamo=True`` takes the reference's own operations in its place.
The implementation is chosen when it runs, also inside a compiled graph: Triton for CUDA tensors, the CPU version for
CPU tensors, the reference where those are missing or do not support the arguments. ``LEAP_OPS=reference|cpu|triton``
or `use` overrides the choice. Under autocast an operator computes in the dtypes of its arguments: cast them before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from jaxtyping import AbstractArray
from torch import Tensor
from torch._decomp import register_decomposition

from leap_shared.errors import UserError, did_you_mean

__all__ = ["BACKENDS", "Operator", "backends", "operator", "requested", "use"]

BACKENDS = ("reference", "cpu", "triton")

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

_forced: list[str] = []
_SAVED = object()


def requested() -> str:
    """The backend that `use` or else ``LEAP_OPS`` asks for; "auto" where neither does."""
    return _forced[-1] if _forced else _known(os.environ.get("LEAP_OPS") or "auto")


def _known(backend: str) -> str:
    if backend not in (*BACKENDS, "auto"):
        raise UserError(f"unknown operator backend {backend!r} (LEAP_OPS): {did_you_mean(backend, BACKENDS)}")
    return backend


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every operator of the process through one backend; "auto" lifts what LEAP_OPS asks for.

    It holds for all threads, since autograd runs backward passes in its own. Put it around the call of a compiled
    function, not inside.
    """
    _forced.append(_known(backend))
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def backends() -> dict[str, str]:
    """Says of each backend whether it works on this machine, or why not."""
    if not _installed("triton"):
        triton = "triton is not installed: pip install triton (Linux; it comes with the CUDA builds of torch)"
    elif os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}:
        triton = "interpreter (TRITON_INTERPRET=1)" if torch.cuda.is_available() else "interpreter (no GPU)"
    elif torch.cuda.is_available():
        triton = "works"
    else:
        triton = "no CUDA device; TRITON_INTERPRET=1, set before Triton is imported, runs it slowly on the CPU"
    return {"reference": "works", "cpu": "works", "triton": triton}


def operator(name: str) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make an annotated function the reference of the operator `name`, such as "leap_flatten::focus"."""
    return functools.partial(Operator, name)


class Operator(Generic[P, R]):
    """A function with several implementations, registered with PyTorch's dispatcher.

    The annotations of the reference are the schema: tensors (jaxtyping's too), optional tensors, numbers, strings and
    lists of numbers come in; one tensor or a tuple of tensors goes out. With ``LEAP_OPS=reference`` an eager call is
    the plain differentiable reference itself.

    Args:
        name: namespace and name, "leap_flatten::focus".
        reference: ordinary differentiable PyTorch code that reads like the equation.

    Raises:
        UserError: a parameter is keyword-only or a list of tensors.
    """

    def __init__(self, name: str, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.name = name
        self.reference = reference
        self._signature = _plain_signature(reference)
        self._defaults = tuple(parameter.default for parameter in self._signature.parameters.values())
        self._kernels: dict[str, Callable[..., Any]] = {"reference": reference}
        self._supports: dict[str, Callable[..., bool | str]] = {}
        self._fake: Callable[..., Any] | None = None
        self._gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None

        def prototype() -> None: ...

        vars(prototype)["__signature__"] = self._signature
        schema = torch.library.infer_schema(prototype, mutates_args=())
        if any(mark in schema.partition("->")[0] for mark in ("*", "Tensor[]")):
            raise UserError(f"{name} takes {schema}: give each tensor its own parameter, and none by keyword only")
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", self._run)
        torch.library.register_fake(name, self._infer)
        torch.library.register_autograd(name, self._differentiate, setup_context=self._save)
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        # The exporter to ONNX reads the first of these tables, the compiler neither. Where shapes are dynamic, their
        # inference would take the first for a fake, were there nothing in the second.
        register_decomposition(self.overload)(self._decompose)
        register_decomposition(self.overload, type="meta")(self._infer)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the backend that fits the arguments, or the one asked for."""
        if not torch.compiler.is_compiling() and requested() == "reference":
            with _as_given(self._bind(args, kwargs)):
                return self.reference(*args, **kwargs)
        return typing.cast("R", self.overload(*args, **kwargs))

    def backend(self, name: str, supports: Callable[..., bool | str] | None = None) -> Callable[[F], F]:
        """Register a faster implementation, with the signature of the reference.

        It returns new contiguous tensors (others are copied, unless `fake` says otherwise) and needs no gradient.

        Args:
            name: "cpu" (asked for CPU tensors only) or "triton" (CUDA tensors, or any under its interpreter).
            supports: called with the operator's arguments; True, or the reason why it cannot take them.
        """
        if name not in BACKENDS[1:]:
            raise UserError(f"{self.name}: a backend is cpu or triton, not {name!r}")

        def register(kernel: F) -> F:
            self._kernels[name] = kernel
            if supports is not None:
                self._supports[name] = supports
            return kernel

        return register

    def fake(self, function: F) -> F:
        """Register what gives outputs of the right shape, stride and dtype; else the reference does, contiguous."""
        self._fake = function
        return function

    def backward(self, setup: Callable[..., None]) -> Callable[[F], F]:
        """Register ``function(ctx, *output_gradients)``, which returns one gradient or None per parameter.

        It may call another operator, whose implementation is chosen in its turn. Where no backward is registered, the
        gradient is autograd's through the reference, run again.

        Args:
            setup: ``setup(ctx, inputs, output)`` saves what the backward needs, as `torch.library.register_autograd`.
        """

        def register(function: F) -> F:
            self._gradient = (setup, function)
            return function

        return register

    def implementations(self) -> Mapping[str, Callable[..., Any]]:
        """The registered implementations by backend, the reference first."""
        return types.MappingProxyType(self._kernels)

    def chosen(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Name of the backend that would run with these arguments.

        Raises:
            UserError: the backend asked for cannot.
        """
        return self._choose(self._bind(args, kwargs))

    def refusal(self, backend: str, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """Why a backend cannot run with these arguments on this machine; None where it can."""
        return self._refusal(_known(backend), self._bind(args, kwargs))

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def _refusal(self, backend: str, args: Sequence[Any]) -> str | None:
        if backend == "reference":
            return None
        if backend not in self._kernels:
            return f"it has no {backend} implementation"
        devices = {value.device.type for value in args if isinstance(value, Tensor)}
        possible = {"cpu"}
        if backend == "triton":
            state = backends()["triton"]
            if state != "works" and not state.startswith("interpreter"):
                return state
            possible = {"cuda"} if state == "works" else {"cuda", "cpu"}
        if not devices <= possible:
            return f"the tensors are on {', '.join(sorted(devices))}, not on {' or '.join(sorted(possible))}"
        verdict = self._supports[backend](*args) if backend in self._supports else True
        if isinstance(verdict, str):
            return verdict
        return None if verdict else "it does not support these shapes, dtypes or values"

    def _choose(self, args: Sequence[Any]) -> str:
        wanted = requested()
        if wanted == "auto":
            fast = "cpu" if _device(args).type == "cpu" else "triton"
            works = self._refusal(fast, args) is None and backends()[fast] == "works"
            return fast if works else "reference"
        if (reason := self._refusal(wanted, args)) is not None:
            able = ", ".join(name for name in BACKENDS if self._refusal(name, args) is None)
            raise UserError(
                f"{self.name} cannot run with LEAP_OPS={wanted}: {reason}. Unset LEAP_OPS, or choose from: {able}"
            )
        return wanted

    def _filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`args` with the trailing defaults that the dispatcher leaves out."""
        return (*args, *self._defaults[len(args) :])

    def _run(self, *args: Any) -> Any:
        args = self._filled(args)
        with _as_given(args):
            return self._own(self._kernels[self._choose(args)](*args), args)

    def _infer(self, *args: Any) -> Any:
        args = self._filled(args)
        with _as_given(args):
            return self._own((self._fake or self._kernels["reference"])(*args), args)

    def _decompose(self, *args: Any) -> Any:
        args = self._filled(args)
        with _as_given(args):
            return self._kernels["reference"](*args)

    def _own(self, result: Any, args: Sequence[Any]) -> Any:
        """Copy outputs that share memory with an input or with each other, which the dispatcher forbids."""
        taken = [value.untyped_storage() for value in args if isinstance(value, Tensor)]
        owned = []
        for output in result if isinstance(result, tuple) else (result,):
            fresh = output if self._fake else output.contiguous()
            if any(fresh.untyped_storage() is storage for storage in taken):
                fresh = fresh.clone()
            taken.append(fresh.untyped_storage())
            owned.append(fresh)
        return tuple(owned) if isinstance(result, tuple) else owned[0]

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs = self._filled(inputs)
        if self._gradient is not None:
            self._gradient[0](ctx, inputs, output)
            return
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.constants = [_SAVED if isinstance(value, Tensor) else value for value in inputs]

    def _differentiate(self, ctx: Any, *gradients: Tensor) -> Any:
        if self._gradient is not None:
            return self._gradient[1](ctx, *gradients)
        again = torch.is_grad_enabled()  # create_graph=True: the gradient itself is to be differentiated
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if constant is _SAVED else constant for constant in ctx.constants]
        needed = [index for index, wanted in enumerate(ctx.needs_input_grad) if wanted]
        with torch.enable_grad(), _as_given(inputs):
            for index in needed:
                value = inputs[index]
                inputs[index] = value.view_as(value) if again else value.detach().requires_grad_()
            result = self._kernels["reference"](*inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [inputs[index] for index in needed],
                [gradient for _, gradient in pairs],
                allow_unused=True,
                create_graph=again,
            )
        by_index = dict(zip(needed, found, strict=True))
        return tuple(by_index.get(index) for index in range(len(ctx.needs_input_grad)))


def _device(args: Sequence[Any]) -> torch.device:
    return next((value.device for value in args if isinstance(value, Tensor)), torch.device("cpu"))


@contextlib.contextmanager
def _as_given(args: Sequence[Any]) -> Iterator[None]:
    """Compute in the dtypes of the arguments whatever autocast says, on the GPU where they are."""
    device = _device(args)
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _plain_signature(reference: Callable[..., Any]) -> inspect.Signature:
    """Signature of `reference` in the types that torch's schemas know."""
    hints = {key: _plain(hint) for key, hint in typing.get_type_hints(reference).items()}
    signature = inspect.signature(reference)
    parameters = [p.replace(annotation=hints.get(key, p.empty)) for key, p in signature.parameters.items()]
    return signature.replace(parameters=parameters, return_annotation=hints.get("return", signature.empty))


def _plain(hint: Any) -> Any:
    """`hint` with jaxtyping's arrays turned into plain tensors."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return Tensor
    origin, arguments = typing.get_origin(hint), tuple(_plain(argument) for argument in typing.get_args(hint))
    if origin in {typing.Union, types.UnionType}:
        return typing.Union[arguments]  # noqa: UP007  the members are known at run time only
    generics: dict[Any, Any] = {tuple: tuple, list: typing.List, Sequence: typing.Sequence}  # noqa: UP006  torch 2.6
    return generics[origin][arguments] if origin in generics else hint
