"""Coroutines for callers that are none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any


def run_apart(job: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end in a thread of its own, also where an event loop runs already (notebooks).

    Signals interrupt the wait, never the job's own code, so that nothing which has arrived is lost on its way to the
    disk: the job is cancelled at its next ``await``, and has ended when this function raises.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(job)
    outcome: Future[None] = Future()

    def work() -> None:
        try:
            outcome.set_result(loop.run_until_complete(task))
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            loop.close()

    thread = threading.Thread(target=work, name="chat", daemon=True)
    thread.start()
    try:
        outcome.result()
    finally:
        with suppress(RuntimeError):  # the loop is closed: the job has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


async def run_all(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all jobs at once; the first error ends the others and is raised."""
    first: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
    if first is not None:  # raised here, it keeps its own cause
        raise first
