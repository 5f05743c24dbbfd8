# SPDX-License-Identifier: Apache-2.0
"""Fetch files from the web: never more bytes than a limit, and by default never from a private network.

A host name is resolved once, every address it has is checked, and the connection goes to a checked address. A name
that resolves to another address a moment later gains nothing. Each redirection is checked in the same way.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from urllib.parse import SplitResult, urljoin, urlsplit

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_CHUNK = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class FetchError(ValueError):
    """A file could not be fetched; the message says why."""


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet; addresses embedded in it are checked too."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        tunnels = [address.sixtofour, *(address.teredo or ())]
        if not all(is_public(inner) for inner in tunnels if inner is not None):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def fetch(
    url: str, *, max_bytes: int, timeout: float = 10.0, is_allowed: Callable[[Address], bool] = is_public
) -> bytes:
    """Fetch the content of an http or https address.

    Args:
        url: the address.
        max_bytes: largest size of the content in bytes.
        timeout: seconds for the whole fetch.
        is_allowed: function that says whether an address may be connected to.

    Raises:
        FetchError: `url` is malformed or not allowed, its content is too large, or the server did not answer properly.
    """
    with _Deadline(timeout) as deadline:
        for _ in range(MAX_REDIRECTS + 1):
            target = _split(url)
            try:
                with _response(target, _resolve(target, is_allowed), timeout, deadline) as response:
                    if response.status not in REDIRECTS:
                        return _content(response, target, max_bytes)
                    url = urljoin(url, response.headers.get("Location") or "")
            except (OSError, http.client.HTTPException) as error:
                reason = "it took too long" if deadline.passed else str(error) or type(error).__name__
                raise FetchError(f"{target.hostname}: could not be read: {reason}") from error
    raise FetchError(f"{target.hostname}: expected up to {MAX_REDIRECTS} redirections, got more")


def _split(url: str) -> SplitResult:
    try:
        target = urlsplit(url)
        target.port  # noqa: B018  # the property parses the port
    except ValueError as error:
        raise FetchError(f"expected an http or https address, got a malformed one: {error}") from error
    if target.scheme not in ("http", "https") or not target.hostname:
        raise FetchError(f"expected an http or https address, got {url[:80]!r}")
    if target.username is not None or target.password is not None:
        raise FetchError("expected an address without user name and password")
    return target


def _port(target: SplitResult) -> int:
    return target.port or (443 if target.scheme == "https" else 80)


def _resolve(target: SplitResult, is_allowed: Callable[[Address], bool]) -> str:
    """Return the address to connect to. All addresses of the name must be allowed."""
    host = str(target.hostname)
    try:
        found = socket.getaddrinfo(host, _port(target), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError(f"{host}: no such host") from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for address in addresses:
        if not is_allowed(ipaddress.ip_address(address)):
            raise FetchError(f"{host}: expected a host of the public internet, got one with the address {address}")
    return addresses[0]


class _Deadline:
    """Shuts the connection down when the time is over, whatever it is waiting for."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        """Set the connection that is open now."""
        self._socket = connected
        if self.passed:
            self._shut()

    def _shut(self) -> None:
        self.passed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _response(
    target: SplitResult, address: str, timeout: float, deadline: _Deadline
) -> Iterator[http.client.HTTPResponse]:
    host, port = str(target.hostname), _port(target)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    plain = socket.create_connection((address, port), timeout)
    try:
        deadline.watch(plain)
        if target.scheme == "https":
            plain = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            deadline.watch(plain)
        connection.sock = plain
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        netloc = target.netloc.encode("idna").decode("ascii") if not target.netloc.isascii() else target.netloc
        connection.request("GET", path, headers={"Host": netloc, "Accept": "image/*", "Accept-Encoding": "identity"})
        yield connection.getresponse()
    finally:
        connection.close()
        plain.close()


def _content(response: http.client.HTTPResponse, target: SplitResult, max_bytes: int) -> bytes:
    if response.status != 200:
        raise FetchError(f"{target.hostname}: expected status 200, got {response.status}")
    content = bytearray()
    while chunk := response.read(min(_CHUNK, max_bytes + 1 - len(content))):
        content += chunk
        if len(content) > max_bytes:
            raise FetchError(f"{target.hostname}: expected up to {max_bytes} bytes, got more")
    if response.length:  # bytes that were announced and did not arrive
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(content)
