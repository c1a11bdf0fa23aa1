"""The patched llama-server: started under a model's plan, waited for, watched, and ended with who uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from . import native, rpc
from .errors import NativeError
from .gguf_file import write_plan_alone
from .in_force import Asked, asked_plan
from .machine import available_memory
from .plan import Plan
from .ports import LOOPBACK, free_port
from .printable import printable
from .report import MIB
from .runtime import Session
from .threads import checked_threads, default_threads

PLAN_VARIABLE = "KVTUNER_GGUF_PLAN"  # native/llama/kvt-plan.cpp
KEY_VARIABLE = "LLAMA_API_KEY"  # llama-server's own
_KEPT_LINES = 200
_POLL_S = 0.1
_GRACE_S = 10.0  # to end in, before it is killed
_STEADY_S = 10.0  # one that ran as long is started again if something kills it
_FAULT = ("error", "failed", "couldn't", "unable", "invalid")  # in lines that say why it ended


def server_program() -> Path:
    """llama-server, which lies beside the library. Raises NativeError if this build has none."""
    program = native.lib_dir() / ("llama-server.exe" if os.name == "nt" else "llama-server")
    if not program.is_file():
        raise NativeError(
            f"{program}: this build has no llama-server. Install kvtuner-gguf again, without -DKVTUNER_SERVER=OFF."
        )
    return program


class Server:
    """A running llama-server, whose OpenAI-like interface is at `url`.

    model         path of a GGUF
    plan          None = that in the file or beside it, a Plan, the path of a sidecar, False = none
    n_ctx         tokens that all slots share; one alone may have them all
    n_parallel    slots: requests that are answered at once
    port          0 = one that is free
    api_key       that requests must bring; None = none. Needed on a host that others reach
    slots         folder that slots are saved to and restored from; None = they are not
    n_threads     None = all processors
    extra         further arguments of llama-server
    verbose       whether what it logs goes to standard error
    say           is told in one line of each start

    Raises NativeError, PlanError before it is started for what cannot work, and NativeError with its own words if it
    ends before it is ready. To be closed, or used as a context manager: `with Server("model.gguf") as server: ...`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        plan: Asked = None,
        host: str = "127.0.0.1",
        port: int = 8080,
        n_ctx: int = 8192,
        n_parallel: int = 4,
        api_key: str | None = None,
        slots: str | os.PathLike[str] | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        extra: Sequence[str] = (),
        verbose: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = TemporaryDirectory(prefix="kvtuner-gguf-")
        self._say, self._verbose = say, verbose
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        try:
            program = server_program()
            _check_host(host, api_key)
            self.port = free_port(host, port)
            self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
            if n_parallel < 1:
                raise NativeError(f"slots: got {n_parallel}, need 1 or more.")
            given = _looked_at(model, plan, n_ctx, n_gpu_layers)
            self._command = [str(program), "--model", os.fspath(model), "--host", host, "--port", str(self.port)]
            self._command += ["--ctx-size", str(n_ctx), "--parallel", str(n_parallel), "--kv-unified"]
            self._command += ["--threads", str(checked_threads(n_threads or default_threads()))]
            self._command += ["--n-gpu-layers", str(n_gpu_layers), "--offline"]
            if hosts := rpc.in_use():
                self._command += ["--rpc", ",".join(host.endpoint for host in hosts)]
            if slots is not None:
                Path(slots).mkdir(mode=0o700, parents=True, exist_ok=True)
                self._command += ["--slot-save-path", f"{Path(slots).resolve()}{os.sep}"]
            self._environment = self._environment_of(given, api_key)
            if plan is False:
                self._command += ["--override-kv", "kvtuner.enabled=bool:false"]
            self._command += extra
            self._key = api_key
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of llama-server."""
        assert self._process is not None
        return self._process.pid

    def props(self) -> dict[str, Any]:
        """What GET /props answers; its "kvtuner" tells of plan and cache. Raises OSError."""
        return json.loads(self._get("/props"))

    def watch(self) -> None:
        """Return when llama-server has ended by itself in good order; start it again if something killed it.

        Raises NativeError if it failed, or was killed within seconds.
        """
        while True:
            assert self._process is not None
            code = self._process.wait()
            if code == 0:
                return
            if time.monotonic() - self._ready_at < _STEADY_S:
                raise NativeError(self._ended(code))
            self._say(f"{self._ended(code)} It is started again.")
            self._start()

    def close(self) -> None:
        """End llama-server, which finishes no answer."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    # ---- inside

    def _environment_of(self, plan: Plan | None, api_key: str | None) -> Mapping[str, str]:
        """With a plan that is not in the file, and with the key, which a command line would show to all."""
        environment = {key: value for key, value in os.environ.items() if key not in (PLAN_VARIABLE, KEY_VARIABLE)}
        if plan is not None:
            path = Path(self._folder.name) / "plan.gguf"
            write_plan_alone(plan, path)
            environment[PLAN_VARIABLE] = str(path)
        if api_key is not None:
            environment[KEY_VARIABLE] = api_key
        return environment

    def _start(self) -> None:
        self._lines.clear()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for us, who end it
            preexec_fn=partial(_end_with_parent, os.getpid()) if _may_end_with_parent() else None,
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        while True:
            if (code := self._process.poll()) is not None:
                raise NativeError(self._ended(code))
            with suppress(OSError, ValueError):
                if json.loads(self._get("/health")).get("status") == "ok":
                    break
            time.sleep(_POLL_S)
        self._ready_at = time.monotonic()
        self._say(f"{self.url}: {told(self.props())}")

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines.append(printable(line.decode(errors="replace").strip()))
                if self._verbose:
                    with suppress(OSError):
                        print(self._lines[-1], file=sys.stderr)

    def _get(self, path: str) -> bytes:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key is not None else {}
        with build_opener(ProxyHandler({})).open(Request(self.url + path, headers=headers), timeout=5) as answer:
            return answer.read()

    def _ended(self, code: int) -> str:
        """What it said last."""
        time.sleep(_POLL_S)  # its last lines are on their way
        faults = [line for line in self._lines if any(word in line.lower() for word in _FAULT)]
        why = " | ".join((faults or list(self._lines))[-3:]) or "it said nothing"
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        return f"llama-server {how}: {why}."


def told(props: Mapping[str, Any]) -> str:
    """What the server's /props tell of slots, plan and cache, in one line and one for each note."""
    ours = props["kvtuner"]
    pairs = sorted({f"{layer['type_k']}/{layer['type_v']}" for layer in ours["layers"]})
    plan = "no plan" if ours["plan"] == "none" else "under a plan"
    n_ctx = props["default_generation_settings"]["n_ctx"]
    notes = "".join(f"\nnote: {note}" for note in ours["notes"])
    return (
        f"{props['total_slots']} slots of up to {n_ctx} tokens, {ours['bytes'] / MIB:.1f} MiB, {plan}: "
        f"{', '.join(pairs)}{notes}"
    )


def _may_end_with_parent() -> bool:
    """Linux tells a child of the end of the thread that started it: of no other than the main one is that wanted."""
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()


def _end_with_parent(parent: int) -> None:
    """In the child, on Linux: a server whose starter was killed would keep port and memory."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _check_host(host: str, api_key: str | None) -> None:
    if host not in LOOPBACK and not api_key:
        raise NativeError(
            f"host {host}: other machines reach it, and no key is asked of them. Give --api-key (or set "
            f"{KEY_VARIABLE}), or leave out --host."
        )
    if api_key == "":
        raise NativeError("the key for requests is empty. Give another, or none.")


def _looked_at(model: str | os.PathLike[str], plan: Asked, n_ctx: int, n_gpu_layers: int) -> Plan | None:
    """The plan to serve under, if it is not in the file. Loads no weights. Raises NativeError if they, the cache and
    the buffers do not fit."""
    with Session(Path(model), no_alloc=True, n_gpu_layers=n_gpu_layers) as session:
        given = session.put_in_force(asked_plan(plan))
        with session.context(n_ctx) as ctx:
            needed, available = ctx.memory().total, available_memory()
    if needed > available and not n_gpu_layers:
        raise NativeError(
            f"model '{os.fspath(model)}' at {n_ctx} tokens: takes {needed / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} are free. Use a smaller -c: `kvtuner-gguf fit` tells how many tokens fit."
        )
    return given
