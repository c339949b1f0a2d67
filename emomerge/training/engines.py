"""Engines that start workers: local processes, Ray tasks, Slurm jobs. Retrying is left to the caller."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from emomerge.errors import BadInput

EngineName = Literal["local", "ray", "slurm"]


class Submitted(Protocol):
    """A call submitted to a worker."""

    def done(self) -> bool:
        """Return whether it has ended, successfully or not."""
        ...

    def result(self) -> Any:
        """Return the result of the call. Raises an exception of the engine's own if the worker was lost."""
        ...

    def cancel(self) -> None:
        """Stop the worker, unless the call has ended."""
        ...


class Engine(Protocol):
    """Starts workers."""

    max_parallel: int | None

    def submit(self, function: Callable[..., Any], *args: Any) -> Submitted:
        """Call a module-level function in a worker, with picklable arguments."""
        ...


def open_engine(name: EngineName, *, max_parallel: int | None, settings: Mapping[str, Any], folder: Path) -> Engine | None:
    """Return an engine; None if the work is done one piece after the other in this process.

    Args:
        name: local, ray or slurm.
        max_parallel: workers at a time (default: local 1, else unlimited).
        settings: for ray, task options (`num_cpus`, `num_gpus`, …); for slurm, submitit parameters (`slurm_partition`,
            `timeout_min`, …).
        folder: for Slurm's scripts and logs.

    Raises:
        BadInput: the engine is not installed or rejects a setting.
    """
    if name == "ray":
        return Ray(max_parallel, settings)
    if name == "slurm":
        return Slurm(max_parallel, settings, folder)
    if settings:
        raise BadInput("local workers have no settings", found=", ".join(settings))
    return None if max_parallel in (None, 1) else Local(max_parallel)


class Local:
    """Processes on this machine, which share its cores. Each stays for further calls, with what it has loaded.

    Args:
        max_parallel: processes at a time.
        threads: threads of each; by default an equal share of this process's.
    """

    def __init__(self, max_parallel: int, threads: int | None = None) -> None:
        self.max_parallel: int | None = max_parallel
        self._threads = threads or max(1, torch.get_num_threads() // max_parallel)
        # Forked from a server that has done the imports, so that workers start quickly.
        linux = sys.platform == "linux"
        self._context = multiprocessing.get_context("forkserver") if linux else multiprocessing.get_context("spawn")
        self._context.set_forkserver_preload(["emomerge.training", "transformers", "peft"])
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def begin(self, closing: Callable[[], None] = lambda: None) -> None:
        """Start all processes at once, as copies of this one, with its imports and data.

        Does nothing where copies are not safe: beside other threads of this process, an accelerator's driver in particular, or
        if they are to have several threads themselves, as OpenMP does not survive it.
        Processes are then started when they are needed.

        Args:
            closing: called in each copy, to close what only this process should hold.
        """
        alone = threading.active_count() == 1 and not torch.accelerator.is_available()
        if sys.platform == "linux" and alone and self._threads == 1:
            fork = multiprocessing.get_context("fork")
            self._workers += [
                _Worker(fork, self._threads, closing) for _ in range((self.max_parallel or 1) - len(self._workers))
            ]

    def submit(self, function: Callable[..., Any], *args: Any) -> Submitted:
        """Call the function in an idle process, or in a new one."""
        with self._lock:
            self._workers = [worker for worker in self._workers if worker.is_alive()]
            worker = next((worker for worker in self._workers if not worker.busy), None)
            if worker is None:
                worker = _Worker(self._context, self._threads)
                self._workers.append(worker)
            worker.call(function, args)
        return worker

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.cancel()
        self._workers.clear()


class _Worker:
    """A process that makes one call at a time, and the call that it makes."""

    def __init__(self, context: Any, threads: int, closing: Callable[[], None] | None = None) -> None:
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, threads, closing), daemon=True)
        self._process.start()
        theirs.close()
        self.busy = False

    def is_alive(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.is_alive()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Begin a call."""
        self.busy = True
        with contextlib.suppress(OSError):  # the process has just died, which `result` tells
            self._connection.send((function, args))

    def done(self) -> bool:
        return self._connection.poll() or not self._process.is_alive()

    def result(self) -> Any:
        try:
            found = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"exit status {self._process.exitcode}") from None
        self.busy = False
        return found

    def cancel(self) -> None:
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, threads: int, closing: Callable[[], None] | None) -> None:
    """Make the calls that arrive, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well and stops this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a copy of the parent has its handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if closing is not None:
        closing()
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(function(*args))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Ray:
    """Tasks on a Ray cluster: the one named by RAY_ADDRESS or running here, else one started on this machine.

    Args:
        max_parallel: tasks at a time; None leaves it to Ray's resources.
        settings: task options.
    """

    def __init__(self, max_parallel: int | None, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise BadInput("--executor ray needs Ray", fix="pip install 'emomerge[ray]'") from None
        self.max_parallel = max_parallel
        self._ray = ray
        try:
            self._options = ray.remote(_call).options(**{"num_cpus": 1, "max_retries": 0, **settings})
        except (TypeError, ValueError) as error:
            raise BadInput("Ray rejects these settings", found=error) from None
        if not ray.is_initialized():
            ray.init(logging_level="ERROR", log_to_driver=False)

    def submit(self, function: Callable[..., Any], *args: Any) -> Submitted:
        """Submit a task."""
        return _RayTask(self._ray, self._options.remote(function, *args))


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class _RayTask:
    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def done(self) -> bool:
        return bool(self._ray.wait([self._reference], timeout=0)[0])

    def result(self) -> Any:
        return self._ray.get(self._reference)

    def cancel(self) -> None:
        if not self.done():  # Ray ends this process if a task is cancelled as it ends
            self._ray.cancel(self._reference, force=True)


class Slurm:
    """Jobs submitted to Slurm by submitit. A job that reaches its time limit is requeued, and its run resumes.

    Args:
        max_parallel: jobs at a time; None submits all at once.
        settings: submitit's parameters; `cluster: local` or `debug` needs no Slurm.
        folder: for scripts and logs, on a file system that all nodes share.
    """

    def __init__(self, max_parallel: int | None, settings: Mapping[str, Any], folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise BadInput("--executor slurm needs submitit", fix="pip install 'emomerge[slurm]'") from None

        class Requeued(submitit.helpers.Checkpointable):  # type: ignore[misc]
            def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
                return function(*args)

        self.max_parallel = max_parallel
        self._submitit, self._call, self._folder = submitit, Requeued(), folder.absolute()
        self._parameters = {"name": "emomerge", "timeout_min": 24 * 60, **settings}
        with tempfile.TemporaryDirectory() as scratch:  # report errors before anything is written
            self._open(Path(scratch))

    def _open(self, folder: Path) -> Any:
        parameters = dict(self._parameters)
        try:
            executor = self._submitit.AutoExecutor(folder, cluster=parameters.pop("cluster", "slurm"))
            executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise BadInput("submitit cannot submit jobs", found=error) from None
        return executor

    @cached_property
    def _executor(self) -> Any:
        return self._open(self._folder)

    def submit(self, function: Callable[..., Any], *args: Any) -> Submitted:
        """Submit a job."""
        job: Submitted = self._executor.submit(self._call, function, *args)
        return job
