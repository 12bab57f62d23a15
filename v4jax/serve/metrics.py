"""What Prometheus reads (inference.md, 6.5): counts of the server, of its engine and its cache.

No label has a value that a user can choose.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One server's metrics.

    Args:
      stats: `Engine.stats`.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]]):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "requests_total", "Requests by endpoint and status", ("endpoint", "status"),
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = _counter("prompt_tokens_total", "Tokens of prompts", registry)
        self.cached_tokens = _counter(
            "cached_tokens_total", "Tokens of prompts that came from the prefix cache", registry
        )
        self.output_tokens = _counter("output_tokens_total", "Tokens of answers", registry)
        self.first_token = _histogram(
            "time_to_first_token_seconds", "From a request to its first token", _SECONDS, registry
        )
        self.between_tokens = _histogram(
            "inter_token_seconds", "Between two tokens of an answer", _BETWEEN, registry
        )
        self.request_seconds = _histogram(
            "request_seconds", "From a request to the end of its answer", _SECONDS, registry
        )
        registry.register(_OfEngine(stats))

    def text(self) -> bytes:
        """All of them, in Prometheus's text format; may wait for the prefix cache."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """What the engine counts itself."""

    def __init__(self, stats):
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        now = self._stats()
        yield GaugeMetricFamily("queue_depth", "Requests without a slot", now["queue_depth"])
        yield GaugeMetricFamily("slots_busy", "Slots that are taken", now["slots_busy"])
        accepted = CounterMetricFamily(
            "draft_accepted", "Drafts that the model took, by their place", labels=["position"]
        )
        for place, count in enumerate(now["accepted_at"]):
            accepted.add_metric([str(place)], count)
        yield accepted
        rounds = now["rounds"] if now["accepted_at"] else 0
        yield CounterMetricFamily("draft_rounds", "Rounds that verified drafts", rounds)
        size = GaugeMetricFamily("prefix_cache_bytes", "Stored prefixes", labels=["tier"])
        size.add_metric(["memory"], now.get("prefix_memory_bytes", 0))
        size.add_metric(["disk"], now.get("prefix_disk_bytes", 0))
        yield size
        units = now.get("prefix_units", 0)
        yield GaugeMetricFamily("prefix_cache_units", "Prefixes in memory", units)
        compiled = now["compilations"]
        yield CounterMetricFamily("compilations", "Programs that were compiled", compiled)
        steps = SummaryMetricFamily(
            "step_seconds", "Steps that read a prompt, decoded, or did both", labels=["kind"]
        )
        for kind, (count, seconds) in now["step_seconds"].items():
            steps.add_metric([kind], count, seconds)
        yield steps


def _counter(name, what, registry):
    return Counter(name, what, registry=registry)


def _histogram(name, what, buckets, registry):
    return Histogram(name, what, buckets=buckets, registry=registry)
