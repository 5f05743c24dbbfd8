# SPDX-License-Identifier: Apache-2.0
"""Counters of the server in the Prometheus format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cumo.inference.features import FeatureCache

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        features: cache of picture features; its figures are read at each scrape.
        waiting: function that returns how many answers wait to be generated.
    """

    def __init__(self, features: FeatureCache, waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("cumo_requests", "Requests that were answered.", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            "cumo_request_seconds",
            "From a request to the end of its response.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "cumo_time_to_first_token_seconds",
            "From a request to the first piece of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter("cumo_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.completion_tokens = Counter("cumo_completion_tokens", "Tokens that were generated.", registry=registry)
        self.completions = Counter(
            "cumo_completions", "Answers, by why they ended.", ["finish_reason"], registry=registry
        )
        self.batch_size = Histogram(
            "cumo_batch_size",
            "Answers that were generated together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.running = Gauge("cumo_answers_running", "Answers that are being generated.", registry=registry)
        self.failures = Counter("cumo_batch_failures", "Batches that raised an error.", registry=registry)
        registry.register(_Readings(features, waiting))

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _Readings(Collector):
    """Figures that other objects keep, read at each scrape."""

    def __init__(self, features: FeatureCache, waiting: Callable[[], int]) -> None:
        self._features = features
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """Yield the current figures."""
        yield GaugeMetricFamily("cumo_answers_waiting", "Answers that wait to be generated.", value=self._waiting())
        features = self._features
        yield GaugeMetricFamily("cumo_picture_cache_bytes", "Of kept embeddings.", value=features.bytes)
        for name, value in (("hits", features.hits), ("misses", features.misses)):
            yield CounterMetricFamily(f"cumo_picture_cache_{name}", f"{name.title()} of the cache.", value=value)
