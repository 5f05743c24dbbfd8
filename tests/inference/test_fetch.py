# SPDX-License-Identifier: Apache-2.0
"""Fetching: what is refused before a connection is made, and what a hostile server may try."""

import http.server
import ipaddress
import socket
import threading
import time

import pytest

from cumo.inference.fetch import FetchError, fetch, is_public

SECRET = b"what the private network holds"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path == "/good":
            self.reply(200, SECRET)
        elif self.path == "/large":
            self.reply(200, b"x" * 5000)
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        else:
            self.reply(404, b"")

    def reply(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.handle_error = lambda *_: None  # clients that are gone
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def everything(_):
    return True


def test_a_file(server):
    url = f"http://127.0.0.1:{server.server_port}"
    assert fetch(f"{url}/good", max_bytes=100, is_allowed=everything) == SECRET
    assert fetch(f"{url}/to?/good", max_bytes=len(SECRET), is_allowed=everything) == SECRET
    assert server.asked[0] == ("/good", f"127.0.0.1:{server.server_port}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/large", "expected up to 100 bytes, got more"),
        ("/absent", "expected status 200, got 404"),
        ("/short", "could not be read: IncompleteRead"),
        ("/to?/to?/to?/to?/good", "expected up to 3 redirections, got more"),
        ("/to?file:///etc/passwd", "expected an http or https address, got 'file:///etc/passwd'"),
        ("/to?gopher://127.0.0.1/", "expected an http or https address"),
    ],
)
def test_what_a_server_may_not_do(server, path, message):
    with pytest.raises(FetchError, match=message):
        fetch(f"http://127.0.0.1:{server.server_port}{path}", max_bytes=100, is_allowed=everything)


def test_a_server_that_drips(server):
    begin = time.monotonic()
    with pytest.raises(FetchError, match="it took too long"):
        fetch(f"http://127.0.0.1:{server.server_port}/slow", max_bytes=1000, timeout=0.3, is_allowed=everything)
    assert time.monotonic() - begin < 4  # it would drip for five seconds


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0x7f000001", "2130706433", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_this_machine_is_never_asked(server, host):
    with pytest.raises(
        FetchError, match="expected a host of the public internet, got one with the address|no such host"
    ):
        fetch(f"http://{host}:{server.server_port}/good", max_bytes=100)
    assert server.asked == []


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "0.0.0.0",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
    ],
)
def test_private_addresses(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(ipaddress.ip_address(address))


def resolve_to(monkeypatch, *answers):
    """Name resolution that gives these addresses, one list after the other."""
    left = list(answers)
    real = socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        if host.endswith(".test"):
            addresses = left.pop(0) if len(left) > 1 else left[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_a_name_with_one_private_address_of_several(server, monkeypatch):
    resolve_to(monkeypatch, ["8.8.8.8", "127.0.0.1"])
    with pytest.raises(FetchError, match="got one with the address 127.0.0.1"):
        fetch(f"http://mixed.test:{server.server_port}/good", max_bytes=100)
    assert server.asked == []


def test_a_name_that_resolves_to_something_else_later(server, monkeypatch):
    """The connection goes to the address that was checked, whatever the name is by then."""
    connected = []
    monkeypatch.setattr(socket, "create_connection", lambda address, *_: connected.append(address) or refuse())

    def refuse():
        raise ConnectionRefusedError("refused")

    resolve_to(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    with pytest.raises(FetchError, match="refused"):
        fetch(f"http://rebinding.test:{server.server_port}/good", max_bytes=100)
    assert connected == [("8.8.8.8", server.server_port)]


def test_redirections_are_checked_too(server, monkeypatch):
    resolve_to(monkeypatch, ["127.0.0.1"])
    checked = []

    def only_the_name(address):
        checked.append(str(address))
        return len(checked) == 1

    with pytest.raises(FetchError, match="localhost: expected a host of the public internet"):
        fetch(
            f"http://first.test:{server.server_port}/to?http://localhost:{server.server_port}/good",
            max_bytes=100,
            is_allowed=only_the_name,
        )
    assert [path for path, _ in server.asked] == [f"/to?http://localhost:{server.server_port}/good"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "http://",
        "http:///a.png",
        "http://user:secret@example.com/a.png",
        "http://example.com:99999/",
        "http://[::1/",
        "a.png",
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(FetchError, match="expected an"):
        fetch(url, max_bytes=100)


def test_a_path_that_would_add_a_header(server):
    with pytest.raises(FetchError):
        fetch(f"http://127.0.0.1:{server.server_port}/good HTTP/1.1\r\nX: y", max_bytes=100, is_allowed=everything)
