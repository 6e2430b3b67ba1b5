"""Prometheus metrics: what requests got, observed as they finish, and the engine's counters, asked for at scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from superinfer.runtime.protocol import FinishReason, RequestReport, StatsReport
from superinfer.runtime.server.promises import DEFAULT, Promise

# Seconds. From one decode step of a small model to the longest answers.
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """One server's. All names begin with `superinfer:`."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._engine = _Engine(model)
        self.registry.register(self._engine)
        self._all = (
            self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST),
            self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _WHOLE),
            self._histogram("request_queue_time_seconds", "Arrival to first scheduled.", _FIRST),
            self._histogram("request_prefill_time_seconds", "First scheduled to first token.", _FIRST),
            self._histogram("request_decode_time_seconds", "First to last token.", _WHOLE),
            self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
            self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS),
            self._histogram("request_time_per_output_token_seconds", "Mean time between a request's tokens.", _BETWEEN),
            self._histogram("max_time_between_tokens_seconds", "Longest time between a request's tokens.", _BETWEEN),
        )
        self._by_class: dict[str, list[Histogram]] = {}  # looking for a histogram's labels takes longer than observing
        self._finished = self._counter("request_success", "Finished sequences.", "finished_reason")
        self._slo = self._counter("slo_requests", "Finished sequences with a promise.", "outcome")
        self._http = Counter(
            "superinfer:http_requests", "HTTP requests answered.", ("path", "status"), registry=self.registry
        )

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"superinfer:{name}", help, ("model_name", "slo_class"), buckets=buckets, registry=self.registry
        )

    def _counter(self, name: str, help: str, label: str) -> Counter:
        return Counter(f"superinfer:{name}", help, ("model_name", "slo_class", label), registry=self.registry)

    def finished(self, report: RequestReport, reason: FinishReason, promise: Promise) -> None:
        """One sequence has finished."""
        name = promise.slo_class or DEFAULT  # of a class that the operator made, so that there are few
        labels = (self._model, name)
        found = self._by_class.get(name)
        if found is None:
            found = self._by_class[name] = [histogram.labels(*labels) for histogram in self._all]
        ttft, e2e, queue, prefill, decode, prompt, output, tpot, max_tbt = found
        if report.ttft_s is not None:
            ttft.observe(report.ttft_s)
        e2e.observe(report.e2e_s)
        queue.observe(report.queue_s)
        prefill.observe(report.prefill_s)
        decode.observe(report.decode_s)
        prompt.observe(report.prompt_tokens)
        output.observe(report.output_tokens)
        if report.output_tokens > 1:
            tpot.observe(report.decode_s / (report.output_tokens - 1))
            max_tbt.observe(report.max_tbt_s)
        self._finished.labels(*labels, reason).inc()
        if report.met is not None:
            self._slo.labels(*labels, "met" if report.met else "missed").inc()

    def answered(self, path: str, status: int) -> None:
        """One HTTP request has been answered; `path`: of a route, so that there are few."""
        self._http.labels(path, str(status)).inc()

    def attainment(self) -> dict[str, tuple[int, int]]:
        """Met and all, of each class that had promises."""
        out: dict[str, tuple[int, int]] = {}
        for metric in self._slo.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    met, total = out.get(sample.labels["slo_class"], (0, 0))
                    count = int(sample.value)
                    met += count if sample.labels["outcome"] == "met" else 0
                    out[sample.labels["slo_class"]] = (met, total + count)
        return out

    def text(self, stats: StatsReport | None) -> bytes:
        """The exposition; `stats`: the engine's, None where it does not answer."""
        self._engine.stats = stats
        return generate_latest(self.registry)


class _Engine(Collector):
    """The engine's gauges and counters."""

    def __init__(self, model: str) -> None:
        self.stats: StatsReport | None = None
        self._model = model

    def collect(self) -> Iterable[Metric]:
        stats = self.stats
        yield self._gauge("engine_up", "1 while the engine answers.", 0 if stats is None else 1)
        if stats is None:
            return
        used = stats.blocks_total - stats.blocks_free - stats.blocks_cached
        yield self._gauge("num_requests_running", "Sequences with a slot.", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences without one.", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of GPU KV blocks in use, 0..1.", used / stats.blocks_total)
        yield self._counter("num_preemptions", "Sequences that lost their KV.", stats.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens of finished sequences.", stats.prompt_tokens)
        yield self._counter("prefix_cache_queries", "The same, as looked up in the cache.", stats.prompt_tokens)
        yield self._counter("prefix_cache_hits", "Of these, whose KV was cached.", stats.cached_tokens)
        yield self._counter("prefill_tokens", "Tokens computed that were known before.", stats.prefill_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.output_tokens)
        yield self._counter("engine_steps", "Steps.", stats.steps)
        yield self._counter("failed_sequences", "Sequences that ended with an error.", stats.failed)
        yield self._counter("non_finite_sequences", "Of these, whose logits were NaN or infinite.", stats.not_finite)
        yield self._gauge("step_seconds_mean", "Mean time of a step since start.", stats.step_s_mean)
        yield from self._classes(stats)
        blocks = GaugeMetricFamily("superinfer:kv_blocks", "KV blocks.", labels=("model_name", "tier", "state"))
        for state, count in (("used", used), ("cached", stats.blocks_cached), ("free", stats.blocks_free)):
            blocks.add_metric((self._model, "gpu", state), count)
        tiers = stats.tiers
        if tiers is not None:
            taken = tiers.dram_blocks - tiers.dram_free - tiers.dram_pinned
            for state, count in (("rotated", tiers.dram_pinned), ("cached", taken), ("free", tiers.dram_free)):
                blocks.add_metric((self._model, "cpu", state), count)
        yield blocks
        if tiers is None:
            return
        yield self._both("rotations", "Sequences rotated.", tiers.rotations_in, tiers.rotations_out)
        yield self._both("link_bytes", "Bytes moved between the tiers.", tiers.bytes_in, tiers.bytes_out)
        yield self._counter("link_stall_seconds", "Seconds that steps waited for copies.", tiers.stall_s)
        yield self._gauge("link_overlap", "Share of busy time that no step waited for, 0..1.", tiers.overlap)
        yield self._gauge("mirror_hit_rate", "Share of rotated blocks mirrored before, 0..1.", tiers.mirror_hit_rate)

    def _classes(self, stats: StatsReport) -> Iterable[Metric]:
        """What never became an answer in time: by class, as the engine counts."""
        labels = ("model_name", "slo_class")
        refused = CounterMetricFamily("superinfer:slo_refused", "Sequences refused on arrival.", labels=labels)
        degraded = CounterMetricFamily("superinfer:slo_degraded", "Sequences run without their promise.", labels=labels)
        expired = CounterMetricFamily("superinfer:slo_expired", "Sequences ended at their deadline.", labels=labels)
        for name, counts in stats.classes.items():
            refused.add_metric((self._model, name), counts.refused)
            degraded.add_metric((self._model, name), counts.degraded)
            expired.add_metric((self._model, name), counts.expired)
        yield refused
        yield degraded
        yield expired

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"superinfer:{name}", help, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(f"superinfer:{name}", help, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _both(self, name: str, help: str, into: float, out: float) -> Metric:
        family = CounterMetricFamily(f"superinfer:{name}", help, labels=("model_name", "direction"))
        family.add_metric((self._model, "in"), into)
        family.add_metric((self._model, "out"), out)
        return family
