"""Hosts of tests themselves: their cables, and that nothing of them stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.cluster import until
from e2e.netns import Host, Loopback, bridges, can_make_namespaces, network, spaces

SAY = "import socket; s = socket.create_connection(('{}', 99), timeout={}); s.sendall(b'x'); print(s.recv(9))"
ECHO = """
import socket
with socket.create_server(('{}', 99)) as listener:
    while True:
        peer, _ = listener.accept()
        peer.sendall(peer.recv(9))
"""
LEFT = """
import os, sys
from e2e.netns import network
with network("left") as net, open(os.devnull, "wb") as out:
    print(net._bridge, net.hosts["left"].popen(["sleep", "60"], out).pid, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def net():
    if not can_make_namespaces():
        pytest.skip("no namespaces can be made here")
    with network("a", "b", "c") as net:
        yield net


def answers(here: Host, there: Host, patience_s: float = 5) -> bool:
    say = [*here.inside, sys.executable, "-c", SAY.format(there.address, patience_s)]
    return subprocess.run(say, capture_output=True, check=False).stdout == b"b'x'\n"


def test_a_cut_is_between_two_and_is_healed(net, tmp_path):
    a, b, c = net.hosts.values()
    with open(tmp_path / "log", "wb") as log:
        echo = a.popen([sys.executable, "-c", ECHO.format(a.address)], log)
        try:
            until(lambda: answers(b, a), 20, "echo")
            assert answers(Host("the test's own", ""), a)
            net.cut(a, b)
            assert not answers(b, a, 0.5)
            assert answers(c, a)
            assert answers(Host("the test's own", ""), a)
            net.heal()
            assert answers(b, a)
        finally:
            echo.kill()
            echo.wait()


def test_nothing_stays(net):
    number = int(net._bridge.removeprefix("kvf"))
    assert number in bridges()
    assert {name for name, of in spaces() if of == number} == {f"kvf{number}-{name}" for name in "abc"}
    net.close()
    assert number not in bridges()
    assert number not in {of for _, of in spaces()}


def test_what_a_killed_run_left_is_removed(net):
    """By the next one, though not what another that still runs has."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    left = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, env=env, check=False)
    assert left.returncode == -signal.SIGKILL, left.stderr
    bridge, process = next(line.split() for line in left.stdout.splitlines() if line.startswith("kvf"))
    with network("next"):
        assert f"{bridge}-left" not in {name for name, _ in spaces()}
        until(lambda: not os.path.exists(f"/proc/{process}"), 5, "its process gone")
        assert int(net._bridge.removeprefix("kvf")) in bridges(), "this one's are there still"


def test_without_namespaces_hosts_are_addresses_of_loopback(monkeypatch):
    monkeypatch.setattr("e2e.netns.can_make_namespaces", lambda: False)
    with network("a", "b") as net:
        assert type(net) is Loopback
        assert not net.can_cut
        a, b = net.hosts.values()
        assert a.address != b.address
        assert all(one.address.startswith("127.77.") and one.inside == () for one in (a, b))
