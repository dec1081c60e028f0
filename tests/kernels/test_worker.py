"""Calls in another process, which may die or hang."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator

import pytest

from kernels.worker import Worker, WorkerError


@pytest.fixture
def worker() -> Iterator[Worker]:
    """One that is ended after the test."""
    worker = Worker()
    yield worker
    worker.stop()


def test_calls_are_answered_by_one_process(worker):
    first = worker.call(os.getpid, seconds=60)
    assert worker.call(math.gcd, 12, 18, seconds=60) == 6
    assert worker.call(os.getpid, seconds=60) == first != os.getpid()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ((math.sqrt, -1.0), r"^ValueError: [^\n]+$"),
        ((os._exit, 3), "^took its process down, exit status 3$"),
        ((time.sleep, 600), "^took more than 1 seconds$"),
    ],
)
def test_a_call_without_an_answer_is_explained_and_costs_a_fresh_process(worker, call, words):
    first = worker.call(os.getpid, seconds=60)
    with pytest.raises(WorkerError, match=words):
        worker.call(*call, seconds=1 if call[0] is time.sleep else 60)
    assert worker.process is None
    assert worker.call(os.getpid, seconds=60) != first


def test_a_stopped_process_is_gone(worker):
    worker.stop()  # none yet
    worker.call(os.getpid, seconds=60)
    process = worker.process
    worker.stop()
    assert not process.is_alive()


def test_an_interrupt_ends_the_process_too(worker):
    worker.call(os.getpid, seconds=60)
    process = worker.process

    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

        def close(self):
            pass

    worker.connection = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        worker.call(os.getpid, seconds=60)
    assert not process.is_alive()
