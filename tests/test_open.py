"""`normwise open`: one page for this machine's browser, whatever else is asked for, and an end that is quick."""

from __future__ import annotations

import contextlib
import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import normwise as nw
from normwise import cli
from normwise.explain import load_batch, page, serve
from normwise.explain.serve import Server

DOCUMENT = "<!doctype html><title>√2</title>"


@contextlib.contextmanager
def running(document: str = DOCUMENT) -> Iterator[Server]:
    """A server on a port of its own."""
    with Server(document) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


def send(server: Server, data: bytes, end: bool = True) -> bytes:
    """Everything that the server says to these bytes."""
    with socket.create_connection((serve.ADDRESS, server.port), timeout=20) as connection:
        with contextlib.suppress(OSError):  # it may answer before all has come
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    return answer


def ask(server: Server, method: str = "GET", target: str = "/", host: str | None = None, *more: str) -> bytes:
    """A request line, a Host and other headers."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host or f'127.0.0.1:{server.port}'}", *more, "", ""]
    return send(server, "\r\n".join(lines).encode("latin-1"))


def status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert found is not None, answer
    return int(found[1])


def headers(answer: bytes) -> dict[str, str]:
    lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): text for name, _, text in (line.partition(": ") for line in lines)}


# What is served


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost"])
def test_the_page(server: Server, name: str) -> None:
    answer = ask(server, host=f"{name}:{server.port}")
    assert status(answer) == 200
    assert answer.partition(b"\r\n\r\n")[2].decode() == DOCUMENT
    assert headers(answer) == {
        "content-type": "text/html; charset=utf-8",
        "content-length": str(len(DOCUMENT.encode())),
        "content-security-policy": f"{page.policy()}; frame-ancestors 'none'",
        "cross-origin-resource-policy": "same-origin",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "connection": "close",
    }
    assert "default-src 'none'" in page.policy()


def test_an_ordinary_client(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for _ in range(2):  # it connects anew each time
        connection.request("GET", "/")
        assert connection.getresponse().read().decode() == DOCUMENT


def test_head_has_no_body(server: Server) -> None:
    answer = ask(server, "HEAD")
    assert (status(answer), answer.partition(b"\r\n\r\n")[2]) == (200, b"")
    assert headers(answer) == headers(ask(server))


def test_only_this_machine_is_answered(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.port}/"


# What is refused


@pytest.mark.parametrize(
    "target",
    [
        "/index.html", "/..", "/../", "/../../etc/passwd", "/%2e%2e/", "/%2e", "/.", "//", "/?", "/?x=1", "/#", "*",
        "x", "/\\", "/;", "/\0", "http://127.0.0.1/", "http://127.0.0.1:{port}/", "https://localhost:{port}/", "file:///",
        "/favicon.ico", "/" + "a" * 9000,
    ],
)  # fmt: skip
def test_there_is_nothing_else(server: Server, target: str) -> None:
    answer = ask(server, target=target.format(port=server.port))
    assert status(answer) == 404
    assert DOCUMENT.encode() not in answer


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:{port}", "127.0.0.1", "localhost", "127.0.0.1:1",
        "127.0.0.1:{port}.evil.example", "localhost.:{port}", "[::1]:{port}", "0.0.0.0:{port}", "127.1:{port}",
        "2130706433:{port}", "127.0.0.1:{port}@x", "a@127.0.0.1:{port}", "127.0.0.1:0{port}", "127.0.0.1:{port} x",
        "127.0.0.1:{port},evil.example", "",
    ],
)  # fmt: skip
def test_foreign_host(server: Server, host: str) -> None:
    """A name of someone's that leads here would let their site read the page."""
    answer = send(server, f"GET / HTTP/1.1\r\nHost: {host.format(port=server.port)}\r\n\r\n".encode())
    assert status(answer) == 403
    assert DOCUMENT.encode() not in answer


def test_host_must_be_there_once(server: Server) -> None:
    own = f"Host: 127.0.0.1:{server.port}\r\n"
    for lines in ("", own * 2, own + "Host: evil.example\r\n", "X-Forwarded-Host: evil.example\r\n"):
        for version in ("1.0", "1.1"):
            assert status(send(server, f"GET / HTTP/{version}\r\n{lines}\r\n".encode())) == 403
    assert status(send(server, f"GET / HTTP/1.0\r\n{own}\r\n".encode())) == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "BREW"])
def test_other_methods(server: Server, method: str) -> None:
    answer = ask(server, method, "/", None, "Origin: http://evil.example", "Content-Length: 2")
    assert (status(answer), headers(answer)["allow"]) == (405, "GET, HEAD")
    assert not [name for name in headers(answer) if name.startswith("access-control")]


def test_a_long_body_does_not_cost_the_client_its_answer(server: Server) -> None:
    head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 1000000\r\n\r\n"
    assert status(send(server, head.encode() + b"x" * 1_000_000)) == 405


@pytest.mark.parametrize(
    "data",
    [
        b"GET /\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n", b" GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: 1\r\n\r\n", b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"\xff\xfe\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\n\xe9: 1\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_request(server: Server, data: bytes) -> None:
    assert status(send(server, data)) == 400


def test_too_much(server: Server) -> None:
    own = f"Host: 127.0.0.1:{server.port}\r\n"
    for data in (
        f"GET /{'a' * 100_000} HTTP/1.1\r\n{own}\r\n",
        f"GET / HTTP/1.1\r\n{own}X: {'a' * 100_000}\r\n\r\n",
        f"GET / HTTP/1.1\r\n{own}" + "X: a\r\n" * 10_000 + "\r\n",
        "a" * 100_000,
    ):
        assert status(send(server, data.encode())) == 431


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=200) | st.text(" GET/HTTP1.\r\n:Host", min_size=1, max_size=80).map(str.encode)
)
def test_whatever_comes_is_answered_and_never_with_the_page(server: Server, data: bytes) -> None:
    answer = send(server, data)
    assert status(answer) in (400, 403, 404, 405, 408)
    assert DOCUMENT.encode() not in answer


def test_a_slow_client_keeps_no_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "SECONDS", 1.0)
    with running() as server, socket.create_connection((serve.ADDRESS, server.port), timeout=20) as slow:
        start = time.monotonic()
        slow.sendall(b"GET / HT")
        assert status(ask(server)) == 200
        assert time.monotonic() - start < 0.9  # before the slow one's time is over
        with contextlib.suppress(OSError):  # a byte now and then does not prolong it
            for _ in range(40):
                slow.sendall(b"T")
                time.sleep(0.05)
        assert status(slow.recv(1000)) == 408
        assert time.monotonic() - start < 10


def test_a_connection_ahead_of_need_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As browsers make them: an answer that nobody asked for would be taken for that of the next request."""
    monkeypatch.setattr(serve, "SECONDS", 0.2)
    with running() as server:
        assert send(server, b"", end=False) == b""


def test_it_says_nothing(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection((serve.ADDRESS, server.port)) as leaving:
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leaves with a reset
        leaving.sendall(b"GET / HTTP/1.1\r\n")
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x1b[31mred\r\n\r\n"):
        send(server, data)
    assert capfd.readouterr() == ("", "")


# The command


@contextlib.contextmanager
def opened(*arguments: str, code: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program with a page open, and where."""
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{listen}\n{code}\nfrom normwise.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", command, "open", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_command() -> None:
    """Address on stdout, the page behind it, and Ctrl-C ends it at once, even while someone is slow."""
    with opened("[[1,2],[3,5]]", "--no-browser", "--norms", "all", "--groups", "1") as (process, url):
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)[1])  # type: ignore[index]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        assert (
            connection.getresponse().read().decode()
            == nw.compare(load_batch("[[1,2],[3,5]]"), "all", groups=1).to_html()
        )
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"GET")
            time.sleep(0.2)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
            assert time.monotonic() - start < serve.SECONDS  # which the slow client would have had
    assert (process.returncode, out, err.strip()) == (130, "", "Ctrl-C ends it")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()


def test_command_opens_a_browser_and_needs_none() -> None:
    shows = "import sys, webbrowser; webbrowser.open = lambda url: print('browser', url, file=sys.stderr, flush=True)"
    with opened(code=shows) as (process, url):
        assert process.stderr is not None
        assert sorted(process.stderr.readline().strip() for _ in range(2)) == ["Ctrl-C ends it", f"browser {url}"]
    with opened(code="import os; os.environ.update(PATH='', DISPLAY='', BROWSER='')") as (process, url):
        assert url.startswith("http://127.0.0.1:")
        assert process.poll() is None


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["normwise", "open", "--no-browser", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    assert (left.value.code, captured.out) == (2, "")
    assert re.fullmatch(r"normwise: [^\n]+\.\n", captured.err)
    return captured.err


def test_port_in_use(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["--port", str(server.port)], monkeypatch, capsys)
    assert f"port: {server.port} must be free for this program; Address already in use; choose another" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "'--port': 70000 is not in the range"),
        (["[[1,2],[3]]"], "row 2 has 1 value"),
        (["none.npy"], "there is none of this name"),
        (["--eps", "-1"], "eps: it must be 0 or more"),
        (["--summary"], "--summary"),
    ],
)
def test_command_refuses(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(arguments, monkeypatch, capsys)


def test_options_are_those_of_compare() -> None:
    shared = {option.name for option in cli.cli.commands["compare"].params} - {"html"}
    own = {option.name for option in cli.cli.commands["open"].params}
    assert own - shared == {"port", "no_browser"}
    assert shared - own == {"cell", "grad", "precision", "summary", "as_json"}
