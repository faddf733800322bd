"""Addresses of this host as the other hosts of a run see it."""

from __future__ import annotations

import ipaddress
import socket

import psutil

ELSEWHERE = "192.0.2.1"  # of nobody (RFC 5737): the way there is the way out
_LOOPBACK = ("localhost", "127.", "::1")


def is_loopback_name(host: str) -> bool:
    """Whether `host` names the loopback of whoever reads it."""
    return host.startswith(_LOOPBACK)


def free_port() -> int:
    """A TCP port that nothing listens on now, on any interface."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def address_towards(host: str) -> str | None:
    """This host's address on the way to `host`; None where there is no way. Sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """Name of the network interface on the way to `host`; None where there is none or it is the loopback."""
    address = address_towards(host)
    if address is None or ipaddress.ip_address(address.split("%")[0]).is_loopback:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address.split("%")[0] for entry in entries):
            return name
    return None


def is_own(host: str) -> bool:
    """Whether `host` names this machine: the way to it is the address itself."""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)}
    except OSError:
        return False
    return address_towards(host) in addresses
