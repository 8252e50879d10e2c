"""Clients that do not speak HTTP well, or slowly: each is answered or dropped in time, and costs nobody anything."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from e2e.cluster import Cluster, credential, until

HEADER_S, BODY_S, WRITE_S = 1.0, 1.0, 1.0
BODY_BYTES, HEADER_BYTES = 20_000, 1000
LINGER_S = 2.0  # how long the rest of a refused request is awaited
SLACK_S = 3.0  # other tests may be using the machine
FLAT_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def cluster(own) -> Cluster:
    flags = {"header": HEADER_S, "body": BODY_S, "write": WRITE_S}
    sizes = {"body": BODY_BYTES, "header": HEADER_BYTES}
    return own(
        *(f"--max-{name}-seconds={value}" for name, value in flags.items()),
        *(f"--max-{name}-size={value}" for name, value in sizes.items()),
    )


@contextmanager
def connected(cluster: Cluster) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=BODY_S + LINGER_S + SLACK_S) as connection:
        yield connection


def head(cluster: Cluster, *lines: str, path: str = "/v1/completions", method: str = "POST") -> bytes:
    own = [f"{name}: {value}" for name, value in credential(cluster.key).items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *own, *lines, "", ""]).encode()


def everything(connection: socket.socket) -> bytes:
    """Until the other side closes; TimeoutError when it does not."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass  # closed as well, with something of ours unread
    return received


def exchange(cluster: Cluster, *pieces: bytes, pause_s: float = 0.0) -> tuple[int, bytes, float]:
    """Send; the status of what comes back until the connection is closed, 0 for nothing, and how long it took."""
    with connected(cluster) as connection:
        begun = time.monotonic()
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was dropped before it had said all
        received = everything(connection)
    return status_of(received), received, time.monotonic() - begun


def status_of(received: bytes) -> int:
    return int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.") else 0


def error_of(received: bytes) -> dict:
    return json.loads(received.partition(b"\r\n\r\n")[2])["error"]


def close(**fields: object) -> tuple[str, ...]:
    return (*(f"{name.replace('_', '-')}: {value}" for name, value in fields.items()), "Connection: close")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HT", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "])
def test_a_head_that_does_not_come(sent, cluster):
    status, _, took = exchange(cluster, sent)
    assert status == 0
    assert took < HEADER_S + SLACK_S


def test_a_head_that_drips(cluster):
    drops = [bytes([byte]) for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 60]
    status, _, took = exchange(cluster, *drops, pause_s=0.05)
    assert status == 0
    assert took < HEADER_S + SLACK_S < len(drops) * 0.05


def test_a_body_that_does_not_come(cluster):
    begin = head(cluster, *close(Content_Length=100))
    for pieces in ([begin], [begin, *[b"{"] * 30]):
        status, received, took = exchange(cluster, *pieces, pause_s=0.05)
        assert (status, error_of(received)["code"]) == (408, "request_timeout")
        assert BODY_S * 0.9 < took < BODY_S + LINGER_S + SLACK_S
        assert b"did not arrive within 1 s" in received


@pytest.mark.parametrize("size", [BODY_BYTES - 1, BODY_BYTES, BODY_BYTES + 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_how_large_a_body_may_be(chunked, size, cluster):
    """Below and at the limit the body is read, and found to be no JSON."""
    body = b"x" * size
    if chunked:
        begin, body = head(cluster, *close(Transfer_Encoding="chunked")), b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    else:
        begin = head(cluster, *close(Content_Length=size))
    status, received, _ = exchange(cluster, begin, body)
    assert status == (413 if size > BODY_BYTES else 400), received
    assert (b"larger than the 20000 bytes" in received) == (size > BODY_BYTES)


@pytest.mark.parametrize("size", [HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1])
def test_how_large_a_head_may_be(size, cluster):
    rest = head(cluster, *close(), "X-Fill: ", path="/health", method="GET")
    filled = rest.replace(b"X-Fill: ", b"X-Fill: " + b"a" * (size - len(rest)))
    assert len(filled) == size
    status, received, _ = exchange(cluster, filled)
    assert status == (431 if size > HEADER_BYTES else 200)
    if status == 431:
        assert (error_of(received)["code"], b"1001 bytes" in received) == ("headers_too_large", True)


@pytest.mark.parametrize(
    "lines",
    [
        [f"X-Long: {'a' * 5000}"],
        [f"X-{'a' * 5000}: b"],
        [f"X-{number}: b" for number in range(200)],
        [f"Authorization: {'a' * 100_000}"],
    ],
)
def test_an_oversize_head(lines, cluster):
    status, received, took = exchange(cluster, head(cluster, *lines, path="/health", method="GET"))
    assert (status, error_of(received)["code"]) == (431, "headers_too_large")
    assert took < HEADER_S + SLACK_S
    assert b"aaaaaaaa" not in received


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 2", "Content-Length: 3"],
        ["Content-Length: 2", "Transfer-Encoding: chunked"],
        ["Content-Length: -1"],
        ["Content-Length: ten"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Bad Header: x"],
        ["NoColon"],
    ],
)
def test_heads_that_two_would_read_differently(lines, cluster):
    """Not one of them is taken for a request."""
    status, received, took = exchange(cluster, head(cluster, *lines) + b"{}\r\nGET /health HTTP/1.1\r\n\r\n")
    assert (status, error_of(received)["code"]) == (400, "invalid_request")
    assert received.count(b"HTTP/1.") == 1
    assert took < BODY_S + SLACK_S


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 64, b"GET\r\n\r\n", b"EHLO a\r\n\r\n"])
def test_what_is_no_http(noise, cluster):
    status, received, took = exchange(cluster, noise)
    assert status in (0, 400)
    assert took < HEADER_S + SLACK_S
    if status:
        assert error_of(received)["message"]


@pytest.mark.parametrize(
    "chunk", [b"zz\r\n{}\r\n", b"-1\r\n{}\r\n", b"2\r\n{}xx\r\n", b"f" * 40 + b"\r\n", b"2;" * 9000]
)
def test_chunks_of_bad_sizes(chunk, cluster):
    status, received, took = exchange(cluster, head(cluster, *close(Transfer_Encoding="chunked")), chunk)
    assert status in (400, 408, 413)
    assert error_of(received)["type"] == "invalid_request_error"
    assert took < BODY_S + LINGER_S + SLACK_S


def test_a_client_that_shuts_its_side(cluster, prompts):
    """It has said all, but it may have gone: it is answered or dropped at once, and everything of it is given back."""
    cluster.settle()
    body = json.dumps(cluster.body(prompts.tokens(50), max_tokens=600)).encode()
    for whole in (body, body[:20]):
        with connected(cluster) as connection:
            connection.sendall(head(cluster, f"Content-Length: {len(body)}") + whole)
            connection.shutdown(socket.SHUT_WR)
            assert status_of(everything(connection)) in (0, 200, 400)
    until(lambda: not cluster.busy(), SLACK_S, "idle")


def test_pipelined_requests(cluster, prompts):
    """Each has its answer, in order."""
    body = json.dumps(cluster.body(prompts.tokens(20), max_tokens=2)).encode()
    ask = head(cluster, f"Content-Length: {len(body)}", "X-Request-Id: {}").replace(b"{}", b"%d") + body
    last = head(cluster, *close(), path="/health", method="GET")
    _, received, _ = exchange(cluster, b"".join(ask.replace(b"%d", b"%d" % number) for number in range(3)) + last)
    assert received.count(b"HTTP/1.1 200") == 4
    at = [received.index(b'"cmpl-%d"' % number) for number in range(3)]
    assert at == sorted(at)


def test_a_reader_that_stops(cluster, prompts):
    """What it leaves unread is bounded, and it is dropped: its answer is larger than what the kernel holds for it."""
    cluster.settle()
    body = cluster.body(prompts.tokens(900), max_tokens=1, prompt_logprobs=20, n=8)
    asked = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", cluster.port))
        connection.sendall(head(cluster, f"Content-Length: {len(asked)}") + asked)
        assert connection.recv(1) == b"H"
        begun = time.monotonic()
        until(lambda: not peers(cluster, connection), WRITE_S + SLACK_S + 2, "dropped")
        assert time.monotonic() - begun > WRITE_S / 2
    until(lambda: not cluster.busy(), SLACK_S, "idle")


def peers(cluster: Cluster, connection: socket.socket) -> list:
    """The router's side of a connection."""
    mine = connection.getsockname()[1]
    return [one for one in cluster.of_role("router").net_connections("tcp") if one.raddr and one.raddr.port == mine]


def test_nothing_grows(cluster, prompts):
    """A thousand connections of each bad kind later the router is as large as before, and serves."""
    router = cluster.of_role("router")
    kinds = [
        head(cluster, f"X-Long: {'a' * 5000}"),
        head(cluster, f"Content-Length: {10**12}"),
        head(cluster, "Transfer-Encoding: chunked") + b"ffffffff\r\n" + b"x" * 5000,
        b"\x00" * 1000,
        head(cluster, "Content-Length: 2") + b"{}",
    ]

    def round_of(count: int) -> int:
        for number in range(count):
            with connected(cluster) as connection:
                connection.sendall(kinds[number % len(kinds)])
        until(lambda: len(router.net_connections("tcp")) < 10, BODY_S + LINGER_S + SLACK_S, "all gone")
        return router.memory_info().rss

    before = round_of(300)
    assert round_of(1000) - before < FLAT_BYTES
    assert len(cluster.ask(prompts.tokens(20)).token_ids) == 24
