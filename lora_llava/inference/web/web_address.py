"""The address of the chat page: check that it can be served."""

from __future__ import annotations

import errno
import ipaddress
import socket

from lora_llava.core.errors import UserError


def check_address(host: str, port: int) -> int:
    """Check that a page can be served at an address.

    Args:
        host: A name or address of this machine.
        port: The port, or 0 for any free one.

    Returns:
        The port.

    Raises:
        UserError: If the port is in use or not permitted, or the host is not an address of this machine.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port} is not a port; use a number from 1024 to 65535, or 0 for any free one")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server does: a port just closed is free
            probe.bind(found[4])
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise UserError(f"--host {host} is unknown; use an address of this machine, such as 127.0.0.1") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use; choose another, or 0 for any free one") from None
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port} is reserved for the system; choose one from 1024 to 65535") from None
        raise UserError(f"--host {host} cannot be used ({error.strerror}); leave it out") from None


def is_loopback(host: str) -> bool:
    """Check whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
