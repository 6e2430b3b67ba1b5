"""OpenTelemetry spans: one for each request, made when it ends, with what the engine reported of its stages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from superinfer.errors import InvalidRequestError
from superinfer.runtime.protocol import FinishReason, RequestReport
from superinfer.runtime.server.promises import Promise

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


def tracer_to(endpoint: str, model: str) -> Tracer:
    """Sends spans to an OTLP/HTTP endpoint in the background. Raises InvalidRequestError without the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidRequestError(
            f"otlp_endpoint={endpoint!r} needs OpenTelemetry: pip install 'superinfer[otel]' ({error})"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "superinfer", "superinfer.model": model}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider.get_tracer("superinfer")


def trace_request(
    tracer: Tracer, carrier: dict[str, str], report: RequestReport, reason: FinishReason, promise: Promise
) -> None:
    """One sequence's span. `carrier`: the HTTP headers, whose `traceparent` it belongs to."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    end = time.time_ns()
    context = TraceContextTextMapPropagator().extract(carrier)
    start = end - int(report.e2e_s * 1e9)
    span = tracer.start_span("llm_request", context=context, kind=SpanKind.SERVER, start_time=start)
    attributes: dict[str, str | int | float | bool | None] = {
        "gen_ai.usage.prompt_tokens": report.prompt_tokens,
        "gen_ai.usage.completion_tokens": report.output_tokens,
        "gen_ai.latency.time_in_queue": report.queue_s,
        "gen_ai.latency.time_to_first_token": report.ttft_s,
        "gen_ai.latency.e2e": report.e2e_s,
        "gen_ai.latency.time_in_model_prefill": report.prefill_s,
        "gen_ai.latency.time_in_model_decode": report.decode_s,
        "gen_ai.response.finish_reason": reason,
        "superinfer.cached_tokens": report.cached_tokens,
        "superinfer.rotations": report.rotations,
        "superinfer.rotated_s": report.rotated_s,
        "superinfer.slo_class": promise.slo_class,
        "superinfer.slo_met": report.met,
        "superinfer.slo_why": report.why,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    span.end(end)
