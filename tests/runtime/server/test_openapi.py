"""The OpenAPI document is true: whatever fits it is answered, and nothing makes the server fail."""

from __future__ import annotations

from typing import Any

import httpx
import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")


def test_the_document_names_every_route_for_applications(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1") and "/v1/chat/completions" in document["paths"]
    chat = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "slo", "service_tier", "tools"} <= set(chat["properties"]) and "messages" in chat["required"]


@pytest.fixture(scope="module")
def schema(served: Any) -> Any:
    document = httpx.get(f"{served.url}/openapi.json").json()
    # Generated requests are to be quick: no generated prompt is long, but max_tokens may be.
    return schemathesis.openapi.from_dict(document)


def test_no_request_makes_the_server_fail(schema: Any, served: Any) -> None:
    """Requests that fit the document and some that do not: none is answered by a 5xx."""
    with served.http() as http:
        for operation in (result.ok() for result in schema.get_all_operations()):

            @hypothesis.settings(
                max_examples=15,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy())
            def check(case: Any) -> None:
                sent = case.as_transport_kwargs(base_url=served.url)
                sent = {name: sent[name] for name in ("method", "url", "headers", "params", "json") if sent.get(name)}
                body = sent.get("json")
                if isinstance(body, dict):  # of the model that is there, and short
                    body["model"] = "tiny"
                    if "messages" in body or "prompt" in body:
                        body["max_tokens"] = 2
                answer = http.request(**sent)
                assert answer.status_code < 500, (sent, answer.text)
                if answer.status_code >= 400 and answer.headers["content-type"] == "application/json":
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            check()
