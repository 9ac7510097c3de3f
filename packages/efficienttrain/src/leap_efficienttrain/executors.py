"""Where trials run: in this process, in others of this machine, or on a cluster with Ray."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

import torch

from leap_shared.errors import UserError, did_you_mean

__all__ = ["RayExecutor", "SerialExecutor", "make_executor"]

RUNNERS = ("serial", "processes", "ray")


class SerialExecutor(Executor):
    """Runs each call where and when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The finished future of `fn(*args, **kwargs)`."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 # whoever asks for the result gets it
            future.set_exception(error)
        return future


class RayExecutor(Executor):
    """Runs each call as a task of Ray, in the session or the cluster that Ray is connected to, or in a local one.

    A started session ends with the executor; one that was there stays. Ray starts a task again whose machine was lost.

    Args:
        **resources: of one task, as `ray.remote` takes them: num_cpus, num_gpus, memory and so on. Where none are given
            each has a GPU, if the cluster has any, or else a CPU.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, **resources: Any) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("runner ray needs Ray: pip install 'leap-efficienttrain[ray]'") from error
        self._ray: Any = ray
        self._is_mine = not self._ray.is_initialized()
        if self._is_mine:
            self._ray.init()
        chosen = resources or {"num_gpus" if self._ray.cluster_resources().get("GPU") else "num_cpus": 1}
        self._task = self._ray.remote(_called).options(**chosen)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of `fn(*args, **kwargs)`."""
        future: Future[Any] = self._task.remote(fn, args, kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 # an Executor's
        """End the session where this executor started it."""
        if self._is_mine:
            self._ray.shutdown()


def _called(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def make_executor(runner: str | Executor | None, workers: int, function: Callable[..., Any]) -> Executor:
    """The executor that a search asks for.

    Args:
        runner: serial, processes or ray; None: processes where there are several workers. Or an executor.
        workers: trials at a time.
        function: what each trial calls.

    Raises:
        UserError: the runner is unknown, or cannot take the workers or the function.
    """
    if workers < 1:
        raise UserError(f"workers {workers}: expected 1 or more")
    if isinstance(runner, Executor):
        return runner
    name = runner or ("processes" if workers > 1 else "serial")
    if name not in RUNNERS:
        raise UserError(f"runner {name!r} is unknown: {did_you_mean(name, RUNNERS)}")
    if name == "ray":
        return RayExecutor()
    if name == "processes":
        return _processes(workers, function)
    if workers > 1:
        raise UserError(f"runner serial has one worker, not {workers}: take runner processes or ray")
    return SerialExecutor()


def _processes(workers: int, function: Callable[..., Any]) -> Executor:
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        hint = "define it at the top level of a module, and bind what it needs with functools.partial"
        raise UserError(f"the train function cannot be sent to other processes ({error}): {hint}") from error
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU, nor torch's threads safely
    return ProcessPoolExecutor(workers, context, _start, (context.Value("i", 0), _visible_devices()))


def _visible_devices() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]


def _start(counter: Any, devices: Sequence[str]) -> None:
    """One thread for each process, and, in turn, one of the GPUs."""
    torch.set_num_threads(1)
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
