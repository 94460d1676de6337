"""Which requests the studio answers: those of its own page, and of programs on machines that it was opened for.

A browser lets any page send requests to any address of this machine. A page of a stranger whose name suddenly points here (DNS rebinding)
may even read the answers: only the Host header tells it from the studio's own. Gradio checks neither Host nor, of requests that change
something, Origin.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

OWN_NAMES = ("localhost", "127.0.0.1", "::1")
MOST_BYTES = 2**20  # of a request's body: the page's own take some thousands
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s\[\]:@/?#]+)(:\d*)?", re.IGNORECASE)


def names_of(host: str, further: Sequence[str] = ()) -> frozenset[str]:
    """The names that a studio which listens at `host` answers to: this machine's own, and `further` ones.

    One that listens at all addresses (0.0.0.0, ::) also answers to the machine's name, and to addresses: see `Gate`.
    Raises ValueError where a further name is none.
    """
    for name in further:
        if host_name(name) != name.lower().strip("[]") or "*" in name:
            raise ValueError(f"--allow-host '{name}' is no name of a host: wanted one such as studio.example.org, without http:// and port")
    names = [*OWN_NAMES, host, *further]
    if is_everywhere(host):
        names += [socket.gethostname(), socket.getfqdn()]
    return frozenset(name.lower().strip("[]") for name in names)


def host_name(header: str | None) -> str | None:
    """The name in a Host header, in small letters, without the port and brackets; None where it holds none."""
    if header and header.count(":") > 1 and not header.startswith("["):  # a bare IPv6 address, as an option may have it
        header = f"[{header}]"
    found = HOST.fullmatch(header or "")
    return found["name"].lower().strip("[]") if found else None


def check_listening(host: str, port: int | None) -> None:
    """Raises ValueError, OSError where nothing can listen at `host`, an address of this machine or a name of one; port: None is any."""
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"--port {port}: wanted 1 to 65535")
    try:
        if not host:
            raise OSError("it is empty")
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as found:
            found.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(f"--host '{host}': nothing can listen there ({why}): give an address of this machine, such as 127.0.0.1") from error


def is_everywhere(host: str) -> bool:
    """Whether it stands for all addresses of this machine."""
    return host.strip("[]") in ("0.0.0.0", "::")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Gate:
    """ASGI middleware in front of an application. It refuses, with a line of plain text,

    400  a Host that is none of `names`, nor, with `addresses`, an IP address (no stranger's page has one as its name here)
    403  an Origin that is another page's than the Host's or one of `names`, and files, of which the studio takes none
    413  a body of more than `MOST_BYTES`
    """

    def __init__(self, app: Application, names: frozenset[str], addresses: bool = False):
        self.app, self.names, self.addresses = app, names, addresses

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        body = await _read(receive) if scope["type"] == "http" else []  # also of what is refused, else its sender would not hear why
        headers: dict[str, str] = {}
        for name, value in ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]):
            headers[name] = f"{headers[name]}, {value}" if name in headers else value  # two hosts are none
        refusal = self.refusal(headers)
        if refusal is None and body is None:
            refusal = 413, f"A request of more than {MOST_BYTES} bytes is not taken."
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return

        async def again() -> dict[str, Any]:
            return body.pop(0) if body else await receive()

        await self.app(scope, again, send)

    def refusal(self, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, words) for a request's headers, by their names in small letters; None where it is let in."""
        name = host_name(headers.get("host"))
        if name is None or name not in self.names and not (self.addresses and _is_address(name)):
            shown = (headers.get("host") or "")[:80]
            return 400, f"This studio does not answer to the host '{shown}'. Open it as localhost, or start it with --allow-host NAME."
        origin = headers.get("origin")
        if origin is not None and _name_of_origin(origin) not in (name, *self.names):
            return 403, f"This studio takes no requests of other pages (Origin '{origin[:80]}')."
        if headers.get("content-type", "").lower().startswith("multipart/"):
            return 403, "This studio takes no files."
        return None


def _name_of_origin(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:  # such as http://[
        return ""


async def _read(receive: Receive) -> list[dict[str, Any]] | None:
    """The messages of a request's body; None where it is too large, and has been thrown away."""
    body: list[dict[str, Any]] = []
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        if size <= MOST_BYTES:
            body.append(message)
        else:
            body.clear()
        more = message.get("more_body", False)  # nor is there more where the sender has gone
    return body if size <= MOST_BYTES else None


async def _refuse(scope: dict[str, Any], send: Send, status: int, words: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": words[:100]})
        return
    content = f"{words}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
