"""Hosts over RPC: programs on other machines that hold layers of a model, with their caches, and compute them.

llama.cpp's protocol, which knows no key and trusts whoever speaks it: for networks of one's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import native
from .errors import NativeError
from .log import heard
from .ports import free_port
from .threads import checked_threads, default_threads

__all__ = ["Host", "in_use", "serve", "use"]

PORT = 50052  # llama.cpp's own
ALL_LAYERS = 999  # more than any model has


@dataclass(frozen=True)
class Host:
    """A host that models use.

    endpoint    host:port
    free total  bytes of its devices, when it was asked
    """

    endpoint: str
    n_devices: int
    free: int
    total: int


_in_use: dict[str, Host] = {}


def in_use() -> tuple[Host, ...]:
    """The hosts that models loaded from now on use."""
    return tuple(_in_use.values())


def use(servers: str | Iterable[str]) -> tuple[Host, ...]:
    """Let models that this process loads from now on use these hosts, for the layers of n_gpu_layers; those named
    before as well, as llama.cpp has one list for all models.

    servers  "host:port", separated by commas, or one by one
    Raises NativeError for one that is not reached, or runs another build.
    """
    endpoints = [part for text in ([servers] if isinstance(servers, str) else servers) for part in text.split(",")]
    for endpoint in (found := list(dict.fromkeys(_checked(endpoint) for endpoint in endpoints))):
        native.library()
        with heard() as log:
            try:
                _in_use[endpoint] = Host(endpoint, *native.rpc_use(endpoint))
            except NativeError as error:
                raise NativeError(
                    f"{error}: {log.reason()}. Start 'kvtuner-gguf rpc-server' there, of this version, and look at its "
                    "--host and --port."
                ) from None
    return tuple(_in_use[endpoint] for endpoint in found)


def _checked(endpoint: str) -> str:
    endpoint = endpoint.strip()
    match = re.fullmatch(r"[A-Za-z0-9._-]+:(\d{1,5})", endpoint)
    if match is None or not 0 < int(match[1]) < 65536:
        raise NativeError(
            f"RPC host '{endpoint}': need HOST:PORT, a name or an IPv4 address, for example 10.0.0.2:{PORT}."
        )
    return endpoint


def serve(
    host: str = "127.0.0.1", port: int = PORT, *, n_threads: int | None = None, cache: Path | None = None
) -> None:
    """Be a host, for one client after another, until the process ends.

    port   0 = one that is free; llama.cpp says on standard output what it listens at
    cache  folder where large tensors are kept, so that a model is sent once; None = none
    Raises NativeError if the port cannot be had.
    """
    endpoint = f"{host}:{free_port(host, port)}"
    n_threads = checked_threads(n_threads or default_threads())
    if cache is not None:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    native.rpc_serve(endpoint, None if cache is None else str(cache), n_threads)
