"""No network: with this folder on PYTHONPATH, every Python process may talk to its own machine and to nothing else.

Python imports `sitecustomize` by itself when it starts, so kernels, servers and workers that a test launches are bound
as well. An audit hook cannot be taken off again. It sees what Python's own sockets do; libraries that open sockets
below Python (ZeroMQ for Jupyter, gloo for torch) are given loopback addresses by whoever starts them.
"""

import ipaddress
import socket
import sys

OWN = {"", "localhost", socket.gethostname()}
WATCHED = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}


def is_own(host: object) -> bool:
    """Whether a host, by name or by number, is this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name in OWN:
        return True
    try:
        return isinstance(name, str) and ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_of(event: str, args: tuple) -> object:
    """The host that an event is about; None for sockets that are files, or already connected."""
    if event.startswith("socket.get"):
        return args[0]
    address = args[1] if len(args) > 1 else None
    return address[0] if isinstance(address, tuple) else None


def refuse_strangers(event: str, args: tuple) -> None:
    """The hook: an error where Python would reach beyond this machine."""
    if event in WATCHED and not is_own(host := host_of(event, args)):
        raise PermissionError(f"tests run without a network, and something wants to reach {host!r}")


sys.addaudithook(refuse_strangers)
