"""Workers of dask.distributed, who do the runs of a calibration: handed out, waited for, and handed to another where
one dies, stalls, or is wrong. One that has not the model is sent it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvtuner_gguf.calibrate.delivery import Delivery
from kvtuner_gguf.calibrate.jobs import Job, MissingError, RefusedError, Weights, perform
from kvtuner_gguf.errors import CalibrationError, KvtunerError
from kvtuner_gguf.quality import Quality
from kvtuner_gguf.room import mib

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_S = 10.0
_POLL_S = 0.5
_STALLED, _STALLED_S = (
    10.0,
    120.0,
)  # a run that takes so many times the median, and so long, is given to another as well
_TRIES = 3  # workers that a run may fail on, before it is the run that is at fault
_DEATHS = 20  # workers that may die over one run
_MOST_SAID = 200  # characters of an error of its
_DONE, _MISSING, _REFUSED, _FAILED = "done", "missing", "refused", "failed"


def _perform_here(job: Job) -> tuple[str, str, Any]:
    """On a worker -> (its address, how it went, the fields of a Quality or why not)."""
    from distributed import get_worker

    address = str(get_worker().address)
    try:
        return address, _DONE, perform(job)
    except MissingError as error:
        return address, _MISSING, str(error)
    except RefusedError as error:
        return address, _REFUSED, str(error)
    except KvtunerError as error:
        return address, _FAILED, str(error)


def _machine(address: str) -> str:
    return address.rpartition(":")[0]


@dataclass
class _Work:
    """One job: the futures that may bring it, and whom it was no good with. None, and it waits for a worker to have
    the model."""

    job: Job
    futures: set[Future[Any]] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    n_deaths: int = 0
    n_sent: int = 0
    since: dict[str, float] = field(default_factory=dict)  # worker -> when it was first seen at it
    allowed: frozenset[str] = frozenset()  # workers that it was last sent to; none: to any

    def key_in(self, keys: Sequence[str]) -> bool:
        """Whether one of its futures is among these."""
        return any(future.key in keys for future in self.futures)


class Crew:
    """Workers at a scheduler, or of this process.

    where  "tcp://host:8786", or a number of processes on this machine
    say    is told in a line of each worker that is lost, refuses, or is passed over

    Raises CalibrationError if dask.distributed is missing, or the scheduler is not reached. To be closed, or used as a
    context manager.
    """

    def __init__(self, where: str, say: Callable[[str], None]) -> None:
        try:
            from distributed import Client, LocalCluster
        except ImportError:
            raise CalibrationError(
                "workers need dask.distributed. Install it: pip install 'kvtuner-gguf[workers]'"
            ) from None
        if not re.fullmatch(r"\d{1,4}|(tcp|tls|ucx)://[^\s/]+:\d{1,5}", where) or where.strip("0") == "":
            raise CalibrationError(
                f"workers '{where}': need tcp://HOST:PORT, where 'dask scheduler' runs, or a number of local workers."
            )
        self._say, self._where, self._stack = say, where, ExitStack()
        self._refused: dict[str, str] = {}
        self._stalled: set[str] = set()
        self._deliveries: dict[str, Delivery] = {}  # by the workers that they go to
        self._seconds: list[float] = []
        try:
            if where.isdigit():
                cluster = LocalCluster(n_workers=int(where), threads_per_worker=1, dashboard_address=None)
                self._client: Client = self._stack.enter_context(
                    Client(self._stack.enter_context(cluster), set_as_default=False)
                )
            else:
                self._client = self._stack.enter_context(Client(where, timeout=CONNECT_S, set_as_default=False))
        except (OSError, TimeoutError, ValueError) as error:
            self._stack.close()
            raise CalibrationError(
                f"workers '{where}': {error or 'no scheduler answers'}. Start 'dask scheduler' there, or give a number "
                "of local workers."
            ) from None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the scheduler; local workers end."""
        with suppress(OSError, TimeoutError):
            self._stack.close()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Quality]]:
        """Each job with its quality, as they come in. Raises CalibrationError where a run fails with several workers,
        no worker is left that may do it, or the scheduler is gone."""
        works = [_Work(job) for job in jobs]
        for work in works:
            self._send(work)
        left = works
        while left:
            self._check_scheduler()
            open_works = []
            for work in left:
                if (quality := self._outcome(work)) is None:
                    open_works.append(work)
                else:
                    self._drop(work)
                    yield work.job, quality
            left = open_works
            with self._scheduler_or_error():
                self._look_for_stalled(left)
                self._look_for_gone(left)
                self._look_for_delivered(left)
            time.sleep(_POLL_S if left else 0)

    # ---- inside

    def _send(self, work: _Work) -> None:
        """To any worker but those that refused, failed with it, stall, or have not the model yet."""
        self._check_scheduler()
        barred = {*self._refused, *work.failed, *self._stalled, *self._deliveries}
        workers = self._workers()
        allowed = [address for address in workers if address not in barred]
        if not allowed and self._deliveries:
            return
        if workers and not allowed and self._refused:
            reasons = "; ".join(f"{address}: {reason}" for address, reason in self._refused.items())
            raise CalibrationError(f"workers '{self._where}': none is left that may do the runs. {reasons}")
        work.allowed = frozenset(allowed if barred else ())
        work.n_sent += 1
        work.futures.add(
            self._client.submit(
                _perform_here,
                work.job,
                key=f"kvtuner-{work.job.key}-{work.n_sent}-{time.monotonic_ns()}",
                pure=False,
                workers=sorted(work.allowed) or None,
            )
        )

    def _outcome(self, work: _Work) -> Quality | None:
        """What came in; where that is nothing good, another is asked."""
        for future in [future for future in work.futures if future.done()]:
            work.futures.discard(future)
            if future.status != "finished":
                self._died(work, future)
                continue
            address, how, what = future.result()
            if how == _DONE:
                if address in work.since:
                    self._seconds.append(time.monotonic() - work.since[address])
                self._stalled.discard(address)
                return Quality(**what)
            self._no_good(work, address, how, what)
            self._send(work)
        if not work.futures:
            self._send(work)
        return None

    def _no_good(self, work: _Work, address: str, how: str, why: str) -> None:
        if how == _MISSING:
            self._deliver(address, work.job.weights)
        elif how == _REFUSED:
            self._refuse(address, why)
        else:
            work.failed[address] = why
            self._say(f"worker {address}: {why}. The run is given to another")
            if len(work.failed) >= min(_TRIES, len(self._workers())):
                raise CalibrationError(why)

    def _refuse(self, address: str, why: str) -> None:
        if address not in self._refused:
            self._refused[address] = why
            self._say(f"worker {address} is passed over: {why}")

    def _deliver(self, address: str, weights: Weights) -> None:
        """Send it the model, unless that is under way to its machine, for all workers there."""
        there = [sent for other, sent in self._deliveries.items() if _machine(other) == _machine(address)]
        if not there:
            path = Path(weights.path)
            self._say(f"worker {address} has not the model: it is sent {mib(path.stat().st_size)}")
            there = [Delivery(self._client, address, path, weights.sample)]
        self._deliveries.setdefault(address, there[0])

    def _look_for_delivered(self, works: Sequence[_Work]) -> None:
        """Who has the model now takes part in what nobody is at."""
        over = {address: sent for address, sent in self._deliveries.items() if sent.is_over}
        for address, sent in over.items():
            del self._deliveries[address]
            if sent.why_not:
                self._refuse(address, sent.why_not)
        for work in works if over else ():
            if not work.since:
                self._send(work)

    def _died(self, work: _Work, future: Future[Any]) -> None:
        work.n_deaths += 1
        why = repr(future.exception())[:_MOST_SAID] if future.status == "error" else future.status
        self._say(f"a worker was lost with a run ({why}), which is given to another")
        if work.n_deaths >= _DEATHS:
            raise CalibrationError(
                f"workers '{self._where}': {work.n_deaths} were lost over one run. Look at their logs."
            )
        self._send(work)

    def _look_for_stalled(self, works: Sequence[_Work]) -> None:
        """What a worker has that takes far longer with a run than others is given to others as well: whoever is first
        counts."""
        now, at_work = time.monotonic(), self._client.processing()
        most = max(_STALLED_S, _STALLED * median(self._seconds)) if self._seconds else float("inf")
        for address, keys in at_work.items():
            theirs = [work for work in works if work.key_in(keys)]
            since = [work.since.setdefault(address, now) for work in theirs if work.key_in(keys[:1])]
            if since and now - since[0] > most and address not in self._stalled:
                self._stalled.add(address)
                self._say(f"worker {address}: a run takes {now - since[0]:.0f} s there, and is given to others, too")
                for work in theirs:
                    self._send(work)

    def _look_for_gone(self, works: Sequence[_Work]) -> None:
        """A run whose workers are all gone would wait for ever, though others have come."""
        workers = self._workers()
        for work in works:
            if work.allowed and workers and work.allowed.isdisjoint(workers):
                self._send(work)

    def _drop(self, work: _Work) -> None:
        for future in work.futures:
            future.cancel()
        work.futures.clear()

    def _workers(self) -> list[str]:
        return list(self._client.scheduler_info(n_workers=-1).get("workers", ()))

    def _check_scheduler(self) -> None:
        if self._client.status != "running":
            raise self._gone()

    @contextmanager
    def _scheduler_or_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a closed connection
            raise self._gone() from None

    def _gone(self) -> CalibrationError:
        return CalibrationError(
            f"workers '{self._where}': the scheduler is gone. What came in is kept: run the same command again when it "
            "is back, or without --workers."
        )
