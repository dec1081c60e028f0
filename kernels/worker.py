"""A process for work that may crash or hang: it is then replaced, and whoever asked for the work goes on."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class WorkerError(OSError):
    """A call that gave no answer: it raised, took too long, or took its process down."""


class Worker:
    """Calls functions in another process, which the first call starts, and the first one after a WorkerError again."""

    def __init__(self):
        self.process: Any = None
        self.connection: Any = None

    def call(self, function: Callable, *arguments: Any, seconds: float) -> Any:
        """function(*arguments), a function of a module, or WorkerError if that fails or takes longer."""
        if self.process is None:
            self._start()
        try:
            return self._answer(function, arguments, seconds)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
            self.connection.close()
            self.process = self.connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,))
        self.process.start()
        other.close()  # so that this end hears when the process is gone

    def _answer(self, function: Callable, arguments: tuple, seconds: float) -> Any:
        try:
            self.connection.send((function, arguments))
            if not self.connection.poll(max(seconds, 0)):
                raise WorkerError(f"took more than {seconds:.0f} seconds")
            answer, failure = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(10)
            raise WorkerError(f"took its process down, exit status {self.process.exitcode}") from error
        if failure:
            raise WorkerError(failure)
        return answer


def serve(connection: Connection) -> None:
    """Answer calls with (result, "") or (None, what was raised) until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that asks
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments), ""
        except Exception as error:
            answer = None, one_line(error)
        connection.send(answer)


def one_line(error: BaseException) -> str:
    """The error with its kind, cut to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
