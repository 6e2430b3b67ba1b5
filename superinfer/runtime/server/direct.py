"""From the gate straight to the routes that generate, past the layers of the framework.

What FastAPI puts around a route (exception handlers, telemetry, exit stacks, the search for the route) takes a sixth of
the CPU of a request, and is passed by each piece of an answer. These routes need none of it: they parse their bodies
themselves, and an error is turned into an answer here, as the framework's handlers do for all others.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from superinfer.runtime.server.errors import as_api_error
from superinfer.runtime.server.relay import ClientGone


class Application(FastAPI):
    """FastAPI with `front` before it: middleware that ends in `Direct`. Set it once all routes are there."""

    front: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if self.front is None or scope["type"] != "http":
            await super().__call__(scope, receive, send)
        else:
            await self.front(scope, receive, send)

    async def behind(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The framework's own way, for what `Direct` does not take."""
        await super().__call__(scope, receive, send)


class Direct:
    """Calls an application's plain POST routes itself, all else by `Application.behind`."""

    def __init__(self, app: Application) -> None:
        self._rest = app.behind
        self._routes = {
            route.path: route.endpoint
            for route in app.routes
            if type(route) is Route and "POST" in (route.methods or ()) and "{" not in route.path
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        endpoint = self._routes.get(scope["path"]) if scope["method"] == "POST" else None
        if endpoint is None:
            await self._rest(scope, receive, send)
            return
        scope["endpoint"] = endpoint
        try:
            response = await endpoint(Request(scope, receive, send))
        except (ClientGone, ClientDisconnect):
            return
        except Exception as error:
            response = as_api_error(error).response()
        await response(scope, receive, send)
