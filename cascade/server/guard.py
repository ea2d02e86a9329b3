"""Access control: requests from this machine's browser and the server's pages, or with the key; and request limits."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

from starlette.exceptions import HTTPException

from cascade.errors import quoted

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

COOKIE = "cascade-key"
_SAFE = ("GET", "HEAD", "OPTIONS")
_OPEN = ("/health",)
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;"
    " connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class _RefusedError(HTTPException):
    """A refused request; an HTTPException, which FastAPI passes on when raised while a body is read."""


@dataclass(frozen=True)
class Rules:
    """hosts: accepted host names in addition to loopback. key: required in every request; None: no key.

    body: maximum bytes of a request. seconds: time limit for the body to arrive.
    """

    hosts: tuple[str, ...] = ()
    key: str | None = None
    body: int = 24 << 20
    seconds: float = 30.0


class Guard:
    """An ASGI application in front of another one."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        secured = _with_headers(send)
        try:
            headers = _headers(scope)
            self._check_host(headers)
            self._check_origin(scope, headers)
            if await self._is_login(scope, secured):
                return
            self._check_key(scope, headers)
            self._check_length(headers)
            await self._app(scope, self._bounded(receive), secured)
        except _RefusedError as refused:
            await _answer(secured, refused.status_code, {"error": refused.detail})

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """Refuse unknown host names, as protection from DNS rebinding."""
        name = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if not is_loopback(name) and name not in self._rules.hosts:
            raise _RefusedError(403, f"host {quoted(name)} is not this server's; add it with --allowed-host")

    def _check_origin(self, scope: Message, headers: Mapping[str, str]) -> None:
        """Refuse requests that other sites make a browser send, except for following a link."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise _RefusedError(403, "requests from other sites are not answered")
        navigation = headers.get("sec-fetch-mode") == "navigate" and scope["method"] in _SAFE
        if site not in ("none", "same-origin") and not navigation:
            raise _RefusedError(403, "requests from other sites are not answered")

    def _check_key(self, scope: Message, headers: Mapping[str, str]) -> None:
        if self._rules.key is None or scope["path"] in _OPEN:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = self._rules.key
        given, wanted = (bearer.strip(), key) if scheme.lower() == "bearer" else (_cookie(headers), _cookie_of(key))
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            raise _RefusedError(401, "send the key of this server as `Authorization: Bearer KEY`, or open /?key=KEY")

    async def _is_login(self, scope: Message, send: Send) -> bool:
        """Turn `/?key=KEY` into a cookie, so that the key does not remain in addresses, history or logs."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [])
        key = self._rules.key
        if scope["path"] != "/" or not given or key is None or not hmac.compare_digest(given[0].encode(), key.encode()):
            return False
        cookie = f"{COOKIE}={_cookie_of(key)}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"
        await _answer(send, 303, {}, {"location": "/", "set-cookie": cookie})
        return True

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._rules.body:
            raise _RefusedError(413, f"a request may have {self._rules.body:,} bytes")

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` with the limits on bytes and time."""
        loop = asyncio.get_running_loop()
        deadline, left, more = loop.time() + self._rules.seconds, self._rules.body, True

        async def bounded() -> Message:
            nonlocal left, more
            if not more:
                return await receive()  # returns when the client disconnects
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except TimeoutError:
                raise _RefusedError(408, "the request did not arrive in time") from None
            left, more = left - len(message.get("body", b"")), bool(message.get("more_body"))
            if left < 0:
                raise _RefusedError(413, f"a request may have {self._rules.body:,} bytes")
            return message

        return bounded


def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _headers(scope: Message) -> dict[str, str]:
    """Headers by name. A repeated host header is refused."""
    pairs: Iterable[tuple[bytes, bytes]] = scope["headers"]
    headers: dict[str, str] = {}
    for name, value in pairs:
        key = name.decode("latin-1").lower()
        if key in headers and key in ("host", "origin", "content-length", "authorization"):
            raise _RefusedError(400, f"header {key} occurs twice")
        headers[key] = value.decode("latin-1")
    return headers


def _cookie_of(key: str) -> str:
    """The cookie's value for a key, which may contain characters that are invalid in a cookie."""
    return hashlib.sha256(key.encode()).hexdigest()


def _cookie(headers: Mapping[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _with_headers(send: Send) -> Send:
    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in given]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return secured


async def _answer(send: Send, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
    content = json.dumps(body).encode()
    own = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
