"""Which requests the studio lets in: by the names that it was opened at."""

from __future__ import annotations

import asyncio
import re
import socket

import pytest

from eqldm.gate import Gate, check_listening, host_name, names_of


@pytest.mark.parametrize(("header", "name"), [
    ("localhost", "localhost"), ("LocalHost:7860", "localhost"), ("127.0.0.1:1", "127.0.0.1"), ("[::1]:7860", "::1"), ("[::1]", "::1"),
    ("::1", "::1"), (None, None), ("", None), (":7860", None), ("a b", None), ("user@localhost", None), ("localhost/x", None),
    ("[::1", None), ("localhost:x", None), ("localhost\n", None),
])  # fmt: skip
def test_the_name_of_a_host_header(header, name):
    assert host_name(header) == name


def status(host: str | None, names=(), at="127.0.0.1", kind="http", further=(), **headers) -> int:
    """What a gate answers to a request: 200 where it is let in. further: headers, by name."""
    sent = []

    async def answer(scope, receive, send):
        await send({"status": 200})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    given = [*([("host", host)] if host is not None else []), *headers.items(), *further]
    scope = {"type": kind, "headers": [(k.encode(), v.encode()) for k, v in given]}
    asyncio.run(Gate(answer, names_of(at, names), at in ("0.0.0.0", "::"))(scope, receive, send))
    return sent[0].get("status") or sent[0]["code"]


def test_it_answers_to_the_names_it_is_served_at():
    assert status("studio.example:80") == 400 and status("studio.example:80", ["Studio.example"]) == 200
    assert status("192.168.1.5") == 400
    assert status("192.168.1.5:7860", at="192.168.1.5") == status("localhost", at="192.168.1.5") == 200
    for everywhere in ("0.0.0.0", "::"):  # an address is no name that a stranger could have taken
        assert status("192.168.1.5:7860", at=everywhere) == status("[fe80::1]:7860", at=everywhere) == 200
        assert status(socket.gethostname(), at=everywhere) == 200 and status("evil.example", at=everywhere) == 400
    assert status("proxy.example", ["proxy.example"], origin="https://proxy.example") == 200
    assert status("localhost", ["proxy.example"], origin="https://proxy.example") == 200  # a proxy may rewrite the host
    assert status("localhost", ["proxy.example"], origin="https://other.example") == 403
    assert status("evil.example", kind="websocket") == 1008 and status("localhost", kind="websocket", origin="http://evil.example") == 1008
    for name in ("http://studio.example", "studio.example:80", "[::1]:80", "", "a b", "*", "*.example"):
        with pytest.raises(ValueError, match=f"--allow-host '{re.escape(name)}' is no name of a host"):
            names_of("127.0.0.1", [name])


def test_two_headers_of_a_kind_are_none():
    """Of two, this gate read the last and Gradio the first."""
    assert status(None) == 400
    for first, second in (("localhost", "evil.example"), ("evil.example", "localhost"), ("localhost", "localhost")):
        assert status(first, further=[("Host", second)]) == 400
    for first, second in (("http://localhost", "http://evil.example"), ("http://evil.example", "http://localhost")):
        assert status("localhost", origin=first, further=[("origin", second)]) == 403


@pytest.mark.parametrize(("host", "port", "message"), [
    ("", None, "--host '': nothing can listen there .it is empty"), ("192.0.2.1", None, "--host '192.0.2.1': nothing can listen there"),
    ("no such host", None, "--host 'no such host': nothing can listen there"), ("127.0.0.1", 65536, "--port 65536: wanted 1 to 65535"),
    ("127.0.0.1", 0, "--port 0: wanted 1 to 65535"), ("x" * 300, None, "nothing can listen there"),
])  # fmt: skip
def test_where_nothing_can_listen(host, port, message):
    with pytest.raises((ValueError, OSError), match=message):
        check_listening(host, port)


def test_where_it_can_listen():
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        check_listening(host, 7860)
