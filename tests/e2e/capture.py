"""What passes a host's network, as TCP streams: by a raw socket in its namespace; or, where hosts are addresses of
loopback, by relays that stand between its processes and those of other hosts."""

import signal
import socket
import struct
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from e2e.cluster import until
from e2e.netns import Host

ETH_P_ALL, ETH_P_IP = 3, 0x0800
SOL_PACKET, PACKET_STATISTICS = 263, 6
SO_RCVBUFFORCE = 33
BUFFER = 64 * 2**20
LENGTH = struct.Struct("<I")

Flow = tuple[str, int, str, int]  # from address and port, to address and port


def write_packets(file: Path) -> None:
    """Record until SIGTERM; fails if the kernel had to drop a packet."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    wire.bind(("eth0", 0))
    wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    wire.settimeout(0.1)
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(number))
    with open(file, "wb", buffering=0) as out:
        while True:
            try:
                packet = wire.recv(2**17)
            except TimeoutError:
                if ending:
                    break
                continue
            out.write(LENGTH.pack(len(packet)) + packet)
    _, dropped = struct.unpack("@II", wire.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    sys.exit(f"{dropped} packets were dropped" if dropped else 0)


class Capture:
    """The streams that passed, once the capture has ended."""

    def __init__(self) -> None:
        self.streams: dict[Flow, bytes] = {}

    def take(self, packets: Iterator[bytes]) -> None:
        """Put each flow together by its sequence numbers, from the first that was seen on."""
        parts: dict[Flow, bytearray] = defaultdict(bytearray)
        begins: dict[Flow, int] = {}
        for flow, number, payload in filter(None, map(segment_of, packets)):
            at = (number - begins.setdefault(flow, number)) % 2**32
            if at < 2**31:
                stream = parts[flow]
                stream.extend(bytes(max(0, at + len(payload) - len(stream))))
                stream[at : at + len(payload)] = payload
        self.streams = {flow: bytes(stream) for flow, stream in parts.items()}

    def between(self, one: str, other: str) -> list[bytes]:
        """What two addresses said to each other."""
        return [stream for flow, stream in self.streams.items() if {flow[0], flow[2]} == {one, other}]


def segment_of(packet: bytes) -> tuple[Flow, int, bytes] | None:
    """Flow, sequence number and payload of a TCP segment that has one."""
    if len(packet) < 54 or packet[12:14] != ETH_P_IP.to_bytes(2, "big") or packet[23] != socket.IPPROTO_TCP:
        return None
    whole = packet[14 : 14 + int.from_bytes(packet[16:18], "big")]
    tcp = whole[(whole[0] & 15) * 4 :]
    source, target, number = struct.unpack("!HHI", tcp[:8])
    flow = (socket.inet_ntoa(whole[12:16]), source, socket.inet_ntoa(whole[16:20]), target)
    payload = tcp[(tcp[12] >> 4) * 4 :]
    return (flow, number, payload) if payload else None


class Relays:
    """Each passes on what comes, both ways, and keeps it."""

    def __init__(self) -> None:
        self.streams: list[bytearray] = []
        self._listeners: list[socket.socket] = []

    def to(self, address: str) -> str:
        """Where to go instead."""
        host, _, port = address.rpartition(":")
        listener = socket.create_server((host, 0))
        self._listeners.append(listener)
        threading.Thread(target=self._serve, args=(listener, (host, int(port))), daemon=True).start()
        return f"{host}:{listener.getsockname()[1]}"

    def _serve(self, listener: socket.socket, there: tuple[str, int]) -> None:
        with suppress(OSError):  # it was closed
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(there, timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        """Until one side ends; then both do."""
        stream = bytearray()
        self.streams.append(stream)
        with suppress(OSError):
            while piece := source.recv(2**18):
                stream += piece
                target.sendall(piece)
        for one in (source, target):
            with suppress(OSError):  # the other direction was first
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@contextmanager
def captured(host: Host, file: Path) -> Iterator[Capture]:
    """What passes the host's cable until the end of the block."""
    capture = Capture()
    with open(file.with_suffix(".log"), "wb") as log:
        code = f"import pathlib, e2e.capture as c; c.write_packets(pathlib.Path({str(file)!r}))"
        recorder = host.popen([sys.executable, "-c", code], log, {"PYTHONPATH": str(Path(__file__).parent.parent)})
    try:
        until(file.exists, 20, "recording")
        yield capture
        recorder.send_signal(signal.SIGTERM)
        assert recorder.wait(20) == 0, file.with_suffix(".log").read_text()
    finally:
        if recorder.poll() is None:
            recorder.kill()
            recorder.wait()
    capture.take(packets_in(file))


def packets_in(file: Path) -> Iterator[bytes]:
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = LENGTH.unpack_from(data, at)
        yield data[at + LENGTH.size : at + LENGTH.size + length]
        at += LENGTH.size + length
