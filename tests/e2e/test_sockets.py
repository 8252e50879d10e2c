"""Clients that do not speak HTTP well, or slowly: each is answered or dropped in time, and costs nobody anything."""

import json
import re
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection

import pytest
from e2e.cluster import KVFERRY, Cluster, credential, until

from kvferry.router.limits import DEFAULT_LIMITS
from kvferry.router.listener import MAX_HEADERS

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


@pytest.mark.parametrize("count", [MAX_HEADERS - 1, MAX_HEADERS, MAX_HEADERS + 1])
def test_how_many_headers_a_head_may_have(count, cluster):
    own = head(cluster, *close(), path="/health", method="GET").count(b"\r\n") - 2
    lines = ["a:b"] * (count - own)
    status, received, _ = exchange(cluster, head(cluster, *close(), *lines, path="/health", method="GET"))
    assert status == (431 if count > MAX_HEADERS else 200)
    assert (b"more than the 128 headers" in received) == (count > MAX_HEADERS)


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
    assert 'kvferry_requests_total{outcome="slow_reader"} 1.0' in cluster.admin("/metrics").text
    log = cluster.log.read_text()
    assert log.count("the client read nothing for 1 s and is dropped") == 1
    assert re.search(r"completion for tenant [0-9a-f]{16}: slow_reader, 900 prompt tokens", log)


@pytest.mark.long
def test_a_slow_reader_is_no_reader_that_stops(cluster, prompts):
    """It reads a little at a time, all the time, for longer than one may read nothing."""
    body = cluster.body(prompts.tokens(900), max_tokens=1, prompt_logprobs=20, n=8)
    asked, received = json.dumps(body).encode(), b""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", cluster.port))
        connection.sendall(head(cluster, f"Content-Length: {len(asked)}") + asked)
        received += connection.recv(2**16)
        begun = time.monotonic()
        while time.monotonic() - begun < 5 * WRITE_S:
            received += connection.recv(2**16)
            time.sleep(WRITE_S / 10)
        length = int(re.search(rb"Content-Length: (\d+)", received)[1]) + received.index(b"\r\n\r\n") + 4
        assert len(received) < length, "it was slow"
        while len(received) < length:
            data = connection.recv(2**20)
            assert data, f"dropped after {len(received)} of {length} bytes"
            received += data
    assert json.loads(received.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 8


def peers(cluster: Cluster, connection: socket.socket) -> list:
    """The router's side of a connection."""
    mine = connection.getsockname()[1]
    return [one for one in cluster.of_role("router").net_connections("tcp") if one.raddr and one.raddr.port == mine]


def test_silent_connections_keep_nobody_out(own, checkpoints, prompts):
    """However few descriptors the process began with: more than that many connections, of no request."""
    few = ("sh", "-c", 'ulimit -Sn 300; exec "$0" "$@"', *KVFERRY)
    cluster = own(command=few)
    soft, hard = cluster.of_role("router").rlimit(resource.RLIMIT_NOFILE)
    assert 300 < soft <= hard
    with ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(connected(cluster))
        assert len(cluster.ask(prompts.tokens(20)).token_ids) == 24
        assert cluster.ready()
    cluster.stop()


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


# -- bodies as large as they may be ------------------------------------------------------------------------------------

LONGEST_S = 0.5  # that somebody else may have to wait, beside what it takes when nothing is asked for
BODIES_BYTES = 256 * 2**20  # --max-bodies-size
NEARLY = DEFAULT_LIMITS.body_bytes - 2**18
TURN = '{"role":"user","content":"a"}'
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"


def listed(item: str, most: int = NEARLY) -> str:
    return f"[{','.join([item] * (min(most, NEARLY // (len(item) + 1))))}]"


def keyed(value: str) -> str:
    count = NEARLY // (len(value) + 11)
    return "{" + ",".join(f'"{number:07}":{value}' for number in range(count)) + "}"


def large_bodies() -> Iterator[tuple[str, str]]:
    """Path and body, nearly as large as a body or a field may be."""
    tokens, chars = DEFAULT_LIMITS.prompt_tokens, DEFAULT_LIMITS.prompt_chars
    for prompt in (
        listed("[1]"),
        listed('"a"'),
        listed("97", tokens),
        listed("97"),
        listed("9" * 4290),  # each takes as long as thousands of short ones
        listed("9" * 400),
        listed('"' + "ab c" * 1022 + '"', 128),
    ):
        yield COMPLETION, f'{{"prompt":{prompt},"max_tokens":1}}'
    for name, value in (
        ("metadata", listed("[]")), ("metadata", keyed("{}")), ("metadata", listed("1", tokens)),
        ("stop", listed('"a"')), ("bad_words", listed('"a"')), ("stop_token_ids", listed("1")),
        ("logit_bias", keyed("1")), ("metadata", listed("[]", 60_000)),
    ):  # fmt: skip
        yield COMPLETION, f'{{"prompt":"a","max_tokens":1,"{name}":{value}}}'
    part = '{"type":"text","text":""}'
    for messages in (
        listed(TURN), listed(TURN, DEFAULT_LIMITS.messages), f'[{{"role":"user","content":{listed(part)}}}]',
        f'[{{"role":"user","content":{listed(part, DEFAULT_LIMITS.parts)}}}]',
        TURN.replace('"a"', f'"a","name":"{"n" * NEARLY}"').join("[]"),
    ):  # fmt: skip
        yield CHAT, f'{{"messages":{messages},"max_tokens":1}}'
    for fields in (f'{{"bos_token":"{"a" * 2**22}"}}', f'{{"a":{listed("[]")}}}', f'{{"a":"{"a" * (chars - 99)}"}}'):
        yield CHAT, f'{{"messages":[{TURN}],"max_tokens":1,"chat_template_kwargs":{fields}}}'
    yield "/tokenize", f'{{"prompt":"{"ab c" * (chars // 4 - 1)}","return_token_strs":true}}'
    yield "/tokenize", f'{{"messages":{listed(TURN, DEFAULT_LIMITS.messages)}}}'
    yield "/detokenize", f'{{"tokens":{listed("97", tokens)}}}'
    yield "/detokenize", f'{{"tokens":{listed("97")}}}'


class Watch:
    """Asks for /health every 20 ms, from `with` to its end; how long each answer took, in seconds."""

    def __init__(self, cluster: Cluster):
        self._port, self.took = cluster.port, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self._stop.wait(0.02):
            begun = time.monotonic()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self.took.append(time.monotonic() - begun)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._stop.set()
        self._thread.join()


def test_no_body_keeps_others_waiting(llama):
    """Whatever comes of it."""
    with Watch(llama) as alone:
        time.sleep(1)
    bound, found = max(alone.took) + LONGEST_S, []
    for path, body in large_bodies():
        body = body.encode()
        assert len(body) < DEFAULT_LIMITS.body_bytes
        with Watch(llama) as watch:
            status = llama.http.post(path, content=body, headers=credential(llama.key)).status_code
        assert status in (200, 400), (path, body[:80])
        found.append((max(watch.took, default=0.0), status, path, body[:60]))
    print(f"alone {max(alone.took):.3f} s", *sorted(found)[::-1], sep="\n")
    assert max(found)[0] < bound, max(found)


def test_bodies_that_are_half_sent_take_no_more_than_they_may(llama):
    """Of fifty connections with eight MiB each; the others are told to come again."""
    router, half = llama.of_role("router"), b" " * 2**23
    begin = head(llama, f"Content-Length: {2 * len(half)}")
    before = router.memory_info().rss
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(llama)) for _ in range(50)]
        llama.together([partial(sent, connection, begin + half) for connection in connections])
        time.sleep(0.5)
        assert router.memory_info().rss - before < BODIES_BYTES + 2 * FLAT_BYTES
        answered = select.select(connections, [], [], 0)[0]
        assert len(connections) - len(answered) <= BODIES_BYTES // len(half)
        received = answered[0].recv(4096)
        assert (status_of(received), b"Retry-After" in received) == (503, True)
        with Watch(llama) as watch:
            time.sleep(0.2)
        assert watch.took
    until(lambda: llama.post("/tokenize", {"prompt": "a" * 2000}).status == 200, SLACK_S, "room again")


def sent(connection: socket.socket, data: bytes) -> None:
    with suppress(ConnectionError):
        connection.sendall(data)
