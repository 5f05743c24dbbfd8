# SPDX-License-Identifier: Apache-2.0
"""Run the model in one thread, and gather waiting answers into batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from cumo.inference.pipeline import CuMoPipeline
from cumo.inference.rows import Row
from cumo.serve.limits import Limits
from cumo.serve.metrics import Metrics

logger = logging.getLogger(__name__)


class Job:
    """A row that waits for its batch.

    Args:
        row: a row from the pipeline's `prepare`.
        on_error: called in the model's thread if the row cannot be answered.
    """

    def __init__(self, row: Row, on_error: Callable[[Exception], None]) -> None:
        self.row = row
        self.on_error = on_error


class Scheduler:
    """Runs jobs in batches, in the order of their arrival.

    A batch takes the jobs that wait when the previous batch ends. A job that arrives while the model is idle waits a
    moment for others.

    Args:
        pipeline: the pipeline that answers; nothing else may use it.
        limits: upper limits of a batch.
        company_seconds: seconds that the first job waits for others.
    """

    def __init__(self, pipeline: CuMoPipeline, limits: Limits, company_seconds: float = 0.01) -> None:
        self.metrics: Metrics | None = None  # set by whoever wants the counters
        self._pipeline = pipeline
        self._limits = limits
        self._company_seconds = company_seconds
        self._jobs: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running: list[Job] = []
        self._thread = threading.Thread(target=self._work, name="cumo-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of rows that are not in a batch yet."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs, so that jobs will be answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            RuntimeError: the scheduler is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            self._jobs.append(job)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Call a function in the model's thread, before the next batch.

        Raises:
            RuntimeError: the scheduler is closed.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def close(self, timeout: float | None = None) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._running, *self._jobs):
                job.row.cancel()
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._calls or self._closed)
                calls = list(self._calls)
                self._calls.clear()
            for function, future in calls:
                self._call(function, future)
            if self._jobs and len(self._jobs) < self._limits.max_batch_size and not self._closed:
                self._wait_for_company()
            batch = self._next_batch()
            if batch:
                self._run(batch)
            if self._closed and not self._jobs and not self._calls:
                return

    def _wait_for_company(self) -> None:
        end = time.monotonic() + self._company_seconds
        with self._changed:
            while len(self._jobs) < self._limits.max_batch_size and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _next_batch(self) -> list[Job]:
        """Take jobs from the front of the queue, as many as fit."""
        batch: list[Job] = []
        longest = 0
        with self._changed:
            while self._jobs and len(batch) < self._limits.max_batch_size:
                job = self._jobs[0]
                if job.row.is_cancelled:
                    self._jobs.popleft()
                    job.row.end_cancelled()
                    continue
                longest = max(longest, len(job.row.prompt_ids) + job.row.max_new_tokens)
                if batch and longest * (len(batch) + 1) > self._limits.max_batch_tokens:
                    break
                batch.append(self._jobs.popleft())
        return batch

    def _call(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    def _run(self, batch: list[Job]) -> None:
        metrics = self.metrics
        with self._changed:
            self._running = batch
            if self._closed:
                for job in batch:
                    job.row.cancel()
        if metrics is not None:
            metrics.batch_size.observe(len(batch))
            metrics.running.set(len(batch))
        try:
            self._pipeline.run([job.row for job in batch])
        except Exception as error:
            self._failed(batch, error)
        finally:
            with self._changed:
                self._running = []
            if metrics is not None:
                metrics.running.set(0)

    def _failed(self, batch: list[Job], error: Exception) -> None:
        """Fail the rows that have produced tokens, and retry the others alone, as one row may have caused the error."""
        logger.error("a batch of %d failed", len(batch), exc_info=error)
        if self.metrics is not None:
            self.metrics.failures.inc()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for job in batch:
            if job.row.finish_reason is not None:
                continue
            if len(batch) == 1 or job.row.tokens:
                job.on_error(error)
            else:
                job.row.restart()
                self._run([job])
