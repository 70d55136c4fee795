"""Everything works without a network: tests run with every host but this machine refused, in children too."""

import socket
import subprocess
import sys
import urllib.request

import pytest

OUTSIDE = "192.0.2.1"  # set aside for documentation: nobody answers there
REFUSED = "tests run without a network"


def test_no_host_outside_is_reached_by_number_or_by_name():
    with socket.socket() as stream, pytest.raises(PermissionError, match=REFUSED):
        stream.connect((OUTSIDE, 80))
    with socket.socket(type=socket.SOCK_DGRAM) as packets, pytest.raises(PermissionError, match=REFUSED):
        packets.sendto(b"?", (OUTSIDE, 53))
    with pytest.raises(PermissionError, match="wants to reach 'example"):
        socket.getaddrinfo("example.org", 443)
    with pytest.raises(OSError, match=REFUSED):
        urllib.request.urlopen("http://example.org", timeout=1)


def test_this_machine_is_reached():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    assert socket.getaddrinfo("localhost", 80)


def test_children_are_bound_too():
    command = f"import socket; socket.socket().connect(('{OUTSIDE}', 80))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert REFUSED in done.stderr
