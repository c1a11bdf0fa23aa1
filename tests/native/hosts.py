"""RPC hosts in processes of their own, and a man in the middle who changes what one says."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from kvtuner_gguf.ports import free_port

HELLO, KVT = 14, 200  # commands
ANSWERED = {0, 1, 2, 3, 7, 8, 9, 11, 13, HELLO, 15, KVT}


class Host:
    """`kvtuner-gguf rpc-server` of one thread."""

    def __init__(self, port: int = 0) -> None:
        self.port = port or free_port("127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "kvtuner_gguf", "rpc-server", "--port", str(self.port), "-t", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise AssertionError("it does not listen")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Middle:
    """Between clients and a host: `change` is given each answer to our own command, and what was asked; None instead of
    an answer ends the connection, as a llama.cpp does that does not know the command."""

    def __init__(self, host: Host, change: Callable[[bytes, bytes], bytes | None]) -> None:
        self.host, self.change = host, change
        self.server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._between, args=(self.server.accept()[0],), daemon=True).start()

    def _between(self, client: socket.socket) -> None:
        with suppress(OSError, EOFError), client, socket.create_connection(("127.0.0.1", self.host.port)) as host:
            while True:
                command = _exactly(client, 1)
                asked = _message(client)
                host.sendall(command + struct.pack("<Q", len(asked)) + asked)
                if command[0] in ANSWERED:
                    answer: bytes | None = _message(host)
                    if command[0] == KVT:
                        answer = self.change(asked, answer)
                    if answer is None:
                        return
                    client.sendall(struct.pack("<Q", len(answer)) + answer)

    def close(self) -> None:
        self.server.close()


def _message(sock: socket.socket) -> bytes:
    return _exactly(sock, *struct.unpack("<Q", _exactly(sock, 8)))


def _exactly(sock: socket.socket, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        part = sock.recv(n - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
