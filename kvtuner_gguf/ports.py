"""Ports to listen at."""

from __future__ import annotations

import os
import socket

from .errors import NativeError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def free_port(host: str, port: int) -> int:
    """The port, or one that is free for 0. Raises NativeError."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
            return found.getsockname()[1]
    except OSError as error:
        raise NativeError(
            f"port {port} of {host}: cannot be had ({os.strerror(error.errno or 0)}). Give another with "
            "--port, or --port 0 for any that is free."
        ) from None
