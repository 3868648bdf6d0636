"""What the event aggregator promises, as examples; the names of the tests are the specification.

Where things are: "In short" shows the idea in three tests. "Vocabulary" has the words in which all
others are written; skip it, and come back when a word is not clear. Then each section of the
contract has its tests, from "Starting it" to "Stopping", and last come the other files.

There are two ways to run the service: `service` (or `serve`, with settings) in this process, on a
free port and a temporary file; and `process`, a process of its own that can be killed, forked to
save the start of an interpreter, or with `kind=Process` a real `python aggregator.py`.
`disk`, `reads` and `pace` hold up the first one, or make it fail, at the doors between its parts.
What a client is told is checked against `rows`, which reads the file through another connection.

Everything waits for conditions, up to PATIENCE_SECONDS, and never sleeps for luck.
"""

from __future__ import annotations

import array
import asyncio
import base64
import configparser
import contextlib
import dataclasses
import datetime
import email.utils
import errno
import functools
import gc
import gzip
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unicodedata
import urllib.parse
import urllib.request
import uuid
import weakref
import zlib
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from unittest.mock import ANY

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

import aggregator
from aggregator import (
    Batch,
    Outcome,
    Refused,
    Settings,
    SqliteStore,
    create_app,
    validate,
)

with contextlib.suppress(ModuleNotFoundError):
    import publisher

pytestmark = [
    pytest.mark.asyncio,  # here, because no configuration file says asyncio_mode
    pytest.mark.filterwarnings("ignore:.*is not an async function"),
]

HERE = Path(__file__).resolve().parent
PATIENCE_SECONDS = 20.0  # for what takes milliseconds, on a machine that has other things to do
HANG_SECONDS = 30.0  # for a whole test; the longest takes 3
HEARTBEAT_SECONDS = aggregator.HEARTBEAT_SECONDS  # before `only_news_wakes_a_feed` changes it
posix = pytest.mark.skipif(os.name != "posix", reason="only on POSIX")
needs_publisher = pytest.mark.skipif(not (HERE / "publisher.py").exists(), reason="no publisher.py")


# --- In short ----------------------------------------------------------------------------------


async def test_an_event_that_is_sent_again_is_kept_once(service: InProcess) -> None:
    assert (await service.publish(event(payload={"n": 1}))).counts == (1, 1, 0)
    assert (await service.publish(event(payload={"n": 2}))).counts == (1, 0, 1)
    assert await service.stored() == [event(payload={"n": 1})]
    assert await service.stats() == (2, 1, 1)


async def test_what_is_acknowledged_survives_kill_9(process: StartProcess, serve: Serve) -> None:
    service = await process()
    assert (await service.publish(numbered(range(50)))).counts == (50, 50, 0)
    await service.kill()
    service = await serve(service.db)
    assert (await service.publish(numbered(range(60)))).counts == (60, 10, 50)
    assert await all_adds_up(service) == numbered(range(60))


async def test_a_subscriber_gets_what_is_stored_and_what_comes(service: InProcess) -> None:
    await service.publish(event(event_id="1"))
    async with service.feed() as feed:
        assert await feed.take(1) == [(1, event(event_id="1"))]
        await service.publish(event(event_id="2"))
        assert await feed.take(1) == [(2, event(event_id="2"))]


# --- Vocabulary: events ------------------------------------------------------------------------
# event, numbered, json_of, nested, in_chunks, in_all_forms, rows, same_json, faults_of, Says

ABSENT: Any = object()


def event(**changes: Any) -> dict[str, Any]:
    """A good event with some fields changed; ABSENT takes a field away."""
    fields = {
        "topic": "order.created",
        "event_id": "1",
        "timestamp": "2025-10-24T10:30:00Z",
        "source": "shop",
        "payload": {"amount": 9.95},
    }
    return {name: value for name, value in (fields | changes).items() if value is not ABSENT}


def numbered(numbers: Sequence[int], **changes: Any) -> list[dict[str, Any]]:
    """Good events with these numbers for ids."""
    return [event(event_id=str(number), **changes) for number in numbers]


def json_of(document: Any) -> bytes:
    """The document as a body; infinity becomes 1e400, which is what a client can send."""
    return json.dumps(document).replace("Infinity", "1e400").encode()


def nested(depth: int) -> bytes:
    """An object in an object in an object, so many."""
    return b'{"a":' * depth + b"1" + b"}" * depth


def nested_event(depth: int, **changes: Any) -> bytes:
    """A good event, but for the changes, with such a payload."""
    return json_of(event(payload="HERE", **changes)).replace(b'"HERE"', nested(depth))


async def in_chunks(body: bytes, size: int = 300) -> AsyncIterator[bytes]:
    """The body for a request with Transfer-Encoding: chunked."""
    for start in range(0, len(body), size):
        yield body[start : start + size]
        await asyncio.sleep(0)


def in_all_forms(bad: Any) -> list[tuple[Any, list[Any]]]:
    """Bodies that hold a bad event, each with the loc of that event."""
    good = event(event_id="good")
    return [
        (bad, ["body"]),
        ({"events": [good, bad]}, ["body", "events", 1]),
        ([good, bad, good], ["body", 1]),
    ]


def rows(db: Path | str) -> list[dict[str, Any]]:
    """The truth: the stored events in order, as the service should return them."""
    query = """
        SELECT name AS topic, event_id, timestamp, source, payload
        FROM events JOIN topics ON topics.id = topic_id ORDER BY seq
    """
    if isinstance(db, str):
        found = rows_of_postgres(db, query)
    else:
        with contextlib.closing(sqlite3.connect(db, timeout=PATIENCE_SECONDS)) as truth:
            truth.row_factory = sqlite3.Row
            found = [dict(row) for row in truth.execute(query)]
    return [row | {"payload": json.loads(row["payload"])} for row in found]


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON; for Python alone, True is 1, 1 is 1.0, and 0.0 is -0.0."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def faults_of(body: bytes) -> list[dict[str, Any]]:
    """What is found wrong with a body; [] if it is taken."""
    try:
        validate(body, SqliteStore.encode)
    except Refused as refusal:
        assert refusal.status == 422
        assert isinstance(refusal.detail, list)
        return refusal.detail
    return []


class Says:
    """Equal to any string that begins like this and goes on."""

    def __init__(self, start: str) -> None:
        self.start = start

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.startswith(self.start) and other != self.start

    def __repr__(self) -> str:
        return f"{self.start!r}…"


# --- Vocabulary: services ----------------------------------------------------------------------
# until, memory; Answer, Feed, Connection, Service; tmp_path; InProcess, Process, ForkedProcess;
# serve, service, process; closed, Disk, Reads, Pace, Connections; queued, in_flight, subscribers,
# is_closed, commit_held, locked, all_adds_up; errors_logged; what holds for every test:
# nothing_else_goes_wrong, nothing_hangs, only_news_wakes_a_feed


async def until(condition: Callable[[], Any]) -> Any:
    """Waits until the condition (a function, a coroutine function) is true; returns its value."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"waited in vain: {inspect.getsource(condition)}"
        await asyncio.sleep(0.005)


@dataclass(slots=True)
class Memory:
    """What Python's objects took: at the end, and at most."""

    held: int = 0
    peak: int = 0


@contextlib.contextmanager
def memory() -> Iterator[Memory]:
    """Measures the memory that its block takes; the garbage collector helps nobody meanwhile."""
    found = Memory()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield found
        found.held, found.peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response, its header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Of a 202: received, unique, duplicates."""
        assert self.status == 202, self
        document = self.document
        received, unique, duplicates = map(
            document.pop, ("received", "unique_processed", "duplicate_dropped")
        )
        assert document == {"message": f"Received {received} event(s) for processing"}
        return received, unique, duplicates

    def detail(self, status: int) -> Any:
        """Of a refusal with this status: why."""
        assert self.status == status, self
        assert self.headers["content-type"].startswith("application/json")
        assert list(self.document) == ["detail"]
        if status == 503:
            assert self.headers["retry-after"] == "1"
        return self.document["detail"]


class Feed:
    """A live feed that a client has opened."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._lines = response.content

    async def line(self) -> str:
        """The next line as it comes; "" at the end."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return (await self._lines.readline()).decode()

    async def message(self) -> dict[str, str] | None:
        """The next message by its fields, as a client understands it; None at the end."""
        fields: dict[str, str] = {}
        while line := await self.line():
            if line == "\n":
                assert "data" in fields, "some clients take a block without data for an event"
                return fields
            name, _, value = line.removesuffix("\n").partition(":")
            if name:  # and not a comment
                assert name not in fields, "an event is one line of data"
                fields[name] = value.removeprefix(" ")
        return None

    async def take(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        """The next events with their sequence numbers; fewer if the feed ends before."""
        found: list[tuple[int, dict[str, Any]]] = []
        while len(found) < count and (message := await self.message()) is not None:
            if "event" not in message:  # that would be a position
                found.append((int(message["id"]), json.loads(message["data"])))
        return found


class Service:
    """An aggregator as a client sees it: an address; and its file, for the truth."""

    def __init__(self, db: Path) -> None:
        self.db = db
        self.port = 0
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(PATIENCE_SECONDS),
            skip_auto_headers=["Content-Type"],
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> Answer:
        """A request and its answer."""
        async with self.session.request(
            method, self.url + path, data=body, headers=headers, params=query
        ) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, found, await response.read())

    async def publish(self, body: Any, **headers: str) -> Answer:
        """POST /publish; bytes and streams go as they are, all else as JSON."""
        if not isinstance(body, (bytes, AsyncIterator)):
            body = json_of(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.ask(
            "POST", "/publish", body, {"Content-Type": "application/json"} | headers
        )

    async def read(self, **query: Any) -> dict[str, Any]:
        """GET /events, as JSON."""
        answer = await self.ask("GET", "/events", **query)
        assert answer.status == 200, answer
        return answer.document

    async def stored(self, **query: Any) -> list[dict[str, Any]]:
        """The events of GET /events."""
        return (await self.read(**query))["events"]

    async def stats(self) -> tuple[int, int, int]:
        """GET /stats: received, unique, duplicates."""
        document = (await self.ask("GET", "/stats")).document
        return tuple(document[name] for name in COUNTERS)

    async def topics(self, **query: Any) -> dict[str, tuple[int, int, int]]:
        """GET /topics: received, unique, duplicates of each topic, in order."""
        document = (await self.ask("GET", "/topics", **query)).document
        found = {
            counts["topic"]: tuple(counts[name] for name in COUNTERS)
            for counts in document["topics"]
        }
        assert document["count"] == len(document["topics"]) == len(found)
        return found

    async def health(self) -> int:
        """The status of GET /health."""
        return (await self.ask("GET", "/health")).status

    async def metric(self, sample: str) -> float:
        """One value of GET /metrics."""
        return samples((await self.ask("GET", "/metrics")).body.decode())[sample]

    @contextlib.asynccontextmanager
    async def feed(self, *, last_event_id: str = "", **query: Any) -> AsyncIterator[Feed]:
        """GET /events as a live feed."""
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        async with self.session.get(
            self.url + "/events", headers=headers, params=query
        ) as response:
            assert response.status == 200
            yield Feed(response)

    @contextlib.asynccontextmanager
    async def connection(self, *sent: bytes) -> AsyncIterator[Connection]:
        """A socket to the service, for what no HTTP library would send."""
        client = socket.socket()
        client.setblocking(False)
        # It takes in little that nobody reads, so that the service has to keep it.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        except BaseException:
            client.close()
            raise
        connection = Connection(*await asyncio.open_connection(sock=client))
        try:
            await connection.send(*sent)
            yield connection
        finally:
            connection.hang_up()


COUNTERS = ("received", "unique_processed", "duplicate_dropped")


class Connection:
    """A client's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def send(self, *pieces: bytes) -> None:
        """Sends these bytes."""
        self._writer.write(b"".join(pieces))
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def answer(self) -> Answer:
        """The next response."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
            headers = {name.lower(): value for name, value in (f.split(": ", 1) for f in fields)}
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(int(status.split(" ")[1]), headers, body)

    async def rest(self) -> bytes:
        """All that still comes; raises ConnectionResetError if it is broken off."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.reader.read()

    def end(self) -> None:
        """Sends nothing more, and still reads."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    def is_reset(self) -> bool:
        """Whether the service has broken off the connection, though nobody reads from it."""
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket"), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    def hang_up(self) -> None:
        """Closes the socket without a good-bye, whatever is still to be read."""
        self._writer.transport.abort()


def request(body: bytes, *, length: int | str | None = None, headers: str = "") -> bytes:
    """A POST /publish as it goes over the wire, its Content-Length perhaps a lie."""
    length = len(body) if length is None else length
    head = f"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{headers}\r\n"
    return head.encode() + body


CHUNKED = b"POST /publish HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


def reading(path: str, *, version: str = "1.1", accept: str = "*/*") -> bytes:
    """A GET as it goes over the wire; the connection is to be closed after it."""
    head = f"GET {path} HTTP/{version}\r\nHost: localhost\r\nAccept: {accept}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n"


def folder_in_memory() -> str | None:
    """Where an fsync takes no time; nothing here can see what it does to a disk."""
    place = "/dev/shm"
    with contextlib.suppress(OSError):
        if shutil.disk_usage(place).free > 10**9:  # containers may have very little there
            return place
    return None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """An empty folder."""
    with tempfile.TemporaryDirectory(prefix="aggregator-", dir=folder_in_memory()) as folder:
        yield Path(folder)


class InProcess(Service):
    """A service in this process, so that a test can reach its constants and its Store."""

    async def start(self, **settings: Any) -> None:
        """Starts it as `python aggregator.py` does, but for signals and the log."""
        self.app = create_app(Settings(db=str(self.db), **settings))
        self._runner = web.AppRunner(
            self.app, access_log=None, shutdown_timeout=aggregator.SHUTDOWN_SECONDS
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """What SIGTERM does."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._runner.cleanup()


Serve = Callable[..., Awaitable[InProcess]]


@pytest.fixture
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a service in this process has its events: in a file, or in a schema of PostgreSQL."""
    if getattr(request, "param", "SQLite") == "SQLite":
        return tmp_path / "events.db"
    database: Database = request.getfixturevalue("database")
    return database.address


@pytest_asyncio.fixture
async def serve(db: Path | str) -> AsyncIterator[Serve]:
    """Starts services in this process: `await serve(max_body_bytes=1000)`."""
    services: list[InProcess] = []

    async def start(db: Path | str = db, **settings: Any) -> InProcess:
        services.append(InProcess(db))
        await services[-1].start(**settings)
        return services[-1]

    yield start
    for service in services:
        await service.session.close()
        await service.stop()


@pytest_asyncio.fixture
async def service(serve: Serve) -> InProcess:
    """A service in this process with the default settings."""
    return await serve()


class Process(Service):
    """A real `python aggregator.py`."""

    def __init__(
        self, db: Path, log: Path, command: Sequence[str], environment: dict[str, str]
    ) -> None:
        super().__init__(db)
        self._command = command
        self._environment = clean_environment(environment)
        self._log_file = log
        self.popen: subprocess.Popen[bytes] | Fork | None = None

    async def start(self, *flags: str, **environment: str) -> None:
        """Returns once it says where it listens."""
        heard = len(self.log())
        with self.open_log() as log:
            self.popen = self._spawn(flags, environment, log)
        place = re.compile(r"Running on http://localhost:(\d+)/")
        await until(lambda: place.search(self.log(), heard) or self.popen.poll() is not None)
        found = place.search(self.log(), heard)
        assert found, self.log()
        self.port = int(found[1])

    def _spawn(
        self, flags: Sequence[str], environment: dict[str, str], log: BinaryIO
    ) -> subprocess.Popen[bytes] | Fork:
        return subprocess.Popen(
            [*self._command, *flags],
            env=self._environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def open_log(self) -> BinaryIO:
        """Where it writes."""
        return self._log_file.open("ab")

    def log(self) -> str:
        """All that it has written so far."""
        return self._log_file.read_text("utf-8") if self._log_file.exists() else ""

    async def ended(self) -> int:
        """Waits for its end; returns its exit code."""
        await until(lambda: self.popen.poll() is not None)
        return self.popen.returncode

    async def kill(self) -> None:
        """kill -9"""
        self.popen.kill()
        await self.ended()

    async def terminate(self, number: int = signal.SIGTERM) -> int:
        """Asks it to stop; returns its exit code."""
        self.popen.send_signal(number)
        return await self.ended()


# A new interpreter needs a long time, most of it to load aiohttp. Where the start is not the point,
# the process is a fork of one that has loaded all but the project's own modules.
FORKS = multiprocessing.get_context("forkserver" if os.name == "posix" else None)
FORKS.set_forkserver_preload(["aiohttp.web", "argparse", "runpy", "sqlite3", "psycopg"])
BECOME_THE_PROGRAM = """
import logging, os, runpy, sys
descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
os.dup2(descriptor, 1)
os.dup2(descriptor, 2)
os.close(descriptor)
os.environ.clear()
os.environ.update(environment)
sys.argv = command
sys.path[0] = os.path.dirname(command[0])
try:
    runpy.run_path(command[0], run_name="__main__")
finally:
    logging.shutdown()  # which is what an interpreter does at its end, and a fork does not
"""


class Fork:
    """A process like that of `python aggregator.py`, with as much of Popen as is used here."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: str) -> None:
        names = {"command": command, "environment": environment, "log": log}
        self._process = FORKS.Process(
            target=exec,
            args=(BECOME_THE_PROGRAM, names),
            daemon=True,  # nobody waits at the end
        )
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)


class ForkedProcess(Process):
    """One without the start of an interpreter."""

    def _spawn(self, flags: Sequence[str], environment: dict[str, str], log: BinaryIO) -> Fork:
        _, *command = self._command
        return Fork([*command, *flags], self._environment | environment, log.name)


class PipedProcess(Process):
    """One whose log goes into a pipe; nobody reads from it after the start."""

    def open_log(self) -> BinaryIO:
        self.pipe, writer = os.pipe()
        os.set_blocking(self.pipe, False)
        self._text = b""
        return os.fdopen(writer, "wb")

    def log(self) -> str:
        if self.popen is not None:
            with contextlib.suppress(BlockingIOError):
                self._text += os.read(self.pipe, 100)
        return self._text.decode() if self.popen is not None else ""


def free_port() -> int:
    """One that was free a moment ago, for where nobody can say which one it got."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def clean_environment(changes: dict[str, str]) -> dict[str, str]:
    """The environment without what would be settings, and with these changes."""
    names = "HOST PORT DB_PATH LOG_LEVEL MAX_BODY_BYTES MAX_IN_FLIGHT_BYTES API_TOKEN"
    names += " AGGREGATOR_URL TOTAL_EVENTS DUPLICATE_RATE BATCH_SIZE CONCURRENCY"
    return {name: text for name, text in os.environ.items() if name not in names.split()} | changes


@pytest_asyncio.fixture
async def process(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    """Starts real processes: `await process(API_TOKEN="secret")`."""
    processes: list[Process] = []
    usual = tmp_path / "data" / "events.db"

    async def start(
        *flags: str,
        db: Path = usual,
        ulimit: str = "",
        kind: type[Process] = ForkedProcess,
        **environment: str,
    ) -> Process:
        log = tmp_path / f"{len(processes)}.log"
        where = [] if "DB_PATH" in environment else ["--db", str(db)]
        command = [sys.executable, str(HERE / "aggregator.py"), "--port", "0", *where, *flags]
        if ulimit:
            kind = Process
            command = ["sh", "-c", f'ulimit {ulimit}; exec "$@"', "sh", *command]
        started = kind(db, log, command, environment)
        processes.append(started)
        await started.start()
        return started

    yield start
    for each in processes:
        await each.session.close()
        if each.popen and each.popen.poll() is None:
            await each.kill()


StartProcess = Callable[..., Awaitable[Process]]


@contextlib.contextmanager
def closed(gate: threading.Event | asyncio.Event) -> Iterator[None]:
    """Whoever waits at the gate stands there while this lasts."""
    gate.clear()
    try:
        yield
    finally:
        gate.set()


class Disk:
    """Store.commit under the test's control: watched, held up, made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []  # the events in each commit that was begun
        self.probes = 0  # commits of nothing
        self.threads: set[str] = set()
        self.error: Exception | None = None
        self.poison = ""  # the id of an event that the database refuses for what is in it
        self._free = threading.Event()
        self._free.set()
        really_commit = SqliteStore.commit

        def commit(store: SqliteStore, batches: Sequence[Batch]) -> Outcome:
            self.threads.add(threading.current_thread().name)
            if batches:
                self.groups.append(sum(len(batch.topics) for batch in batches))
            else:
                self.probes += 1
            assert self._free.wait(PATIENCE_SECONDS)
            if self.error:
                raise type(self.error)(*self.error.args)  # a new one, as its frames hold the group
            if self.poison and any(self.poison in batch.event_ids for batch in batches):
                raise aggregator.Unstorable("it is poisoned")
            return really_commit(store, batches)

        monkeypatch.setattr(SqliteStore, "commit", commit)

    def held(self) -> AbstractContextManager[None]:
        """No commit gets any further while this lasts."""
        return closed(self._free)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Ask for it before `service`."""
    return Disk(monkeypatch)


READS = ("last_seq", "page", "position", "find", "topics", "totals", "size")


class Reads:
    """The reading methods of the store under the test's control: counted, held up, made to fail.

    What is held up has been read already. There is one thread for reading: all others wait, too.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []  # the methods with their arguments
        self.threads: set[str] = set()
        self.error: Exception | None = None
        self.failing: Sequence[str] = READS  # the methods that raise the error
        self.good_calls = 0  # of theirs that go well before
        self.waiting = 0  # calls that are held up
        self._held = ""  # the method that is held up
        self._free = threading.Event()
        for name in READS:
            monkeypatch.setattr(SqliteStore, name, self._watched(name, getattr(SqliteStore, name)))

    def _watched(self, name: str, really_read: Callable[..., Any]) -> Callable[..., Any]:
        def read(store: SqliteStore, *arguments: Any) -> Any:
            self.calls.append((name, arguments))
            self.threads.add(threading.current_thread().name)
            if self.error and name in self.failing:
                self.good_calls -= 1
                if self.good_calls < 0:
                    raise type(self.error)(*self.error.args)
            found = really_read(store, *arguments)
            if name == self._held:
                self.waiting += 1
                assert self._free.wait(PATIENCE_SECONDS)
                self.waiting -= 1
            return found

        return read

    def count(self, name: str) -> int:
        """How often this method was called."""
        return sum(called == name for called, _ in self.calls)

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """No call of this method gets any further while this lasts."""
        with closed(self._free):
            self._held = name
            try:
                yield
            finally:
                self._held = ""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Ask for it before `service`."""
    return Reads(monkeypatch)


class Pace(float):
    """FEED_PAGE_SECONDS under the test's control: its sleeps are noted, and can be held up."""

    def __init__(self, _seconds: float) -> None:
        self.active: list[int] = []  # the feeds that shared the pace, at each sleep
        self.waiting = 0  # sleeps that are held up
        self._free = asyncio.Event()
        self._free.set()

    def __mul__(self, active: Any) -> float:
        self.active.append(active)
        return self

    async def sleep(self) -> None:
        """In place of asyncio.sleep for this time."""
        self.waiting += 1
        await self._free.wait()
        self.waiting -= 1

    def held(self) -> AbstractContextManager[None]:
        """No feed goes on after a page while this lasts."""
        return closed(self._free)

    def release(self) -> None:
        """Lets those go on that wait."""
        self._free.set()


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    """How live feeds give way to publishing."""
    really_sleep = asyncio.sleep

    async def sleep(seconds: float, *result: Any) -> Any:
        if isinstance(seconds, Pace):
            await seconds.sleep()
        return await really_sleep(0 if isinstance(seconds, Pace) else seconds, *result)

    found = Pace(0.002)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(aggregator, "FEED_PAGE_SECONDS", found)
    return found


async def queued(service: Service, requests: int) -> bool:
    """Whether so many requests wait behind the group that is being committed."""
    return await service.metric("aggregator_requests_queued") == requests


async def in_flight(service: Service, size: int) -> bool:
    """Whether bodies of exactly this size are in flight."""
    return await service.metric("aggregator_in_flight_bytes") == size


async def subscribers(service: Service, count: int) -> bool:
    """Whether there are so many live feeds."""
    return await service.metric("aggregator_live_subscribers") == count


async def is_closed(service: Service) -> bool:
    """Whether nobody listens any more."""
    try:
        async with service.connection():
            return False
    except ConnectionError:
        return True


async def queue_up(
    service: Service, waiting: list[asyncio.Task[Answer]], bodies: Iterable[Any]
) -> None:
    """Publishes bodies one by one, behind the commit that is held."""
    for body in bodies:
        waiting.append(asyncio.create_task(service.publish(body)))
        await until(lambda: queued(service, len(waiting) - 1))


@contextlib.asynccontextmanager
async def commit_held(disk: Disk, service: Service) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """One event is being committed and gets no further while this lasts."""
    with disk.held():
        before = len(disk.groups)
        waiting = [asyncio.create_task(service.publish(event(event_id="held")))]
        await until(lambda: len(disk.groups) > before)
        yield waiting


@pytest.fixture(autouse=True)
def nothing_else_goes_wrong(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No service in this process may log an error; who provokes one looks at it and clears it."""
    yield
    assert [record.message for record in caplog.get_records("call") if is_error(record)] == []


def is_error(record: logging.LogRecord) -> bool:
    return record.name in ("aggregator", "asyncio") and record.levelno >= logging.ERROR


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error; they are expected, and so they are cleared."""
    found = [record.getMessage() for record in caplog.records if is_error(record)]
    caplog.clear()
    return found


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """A test that hangs fails."""

    def fail(number: int, frame: Any) -> None:
        raise AssertionError(f"it hangs for {HANG_SECONDS} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def only_news_wakes_a_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat would hide that a feed was not told of an event."""
    monkeypatch.setattr(aggregator, "HEARTBEAT_SECONDS", 3600.0)


class Connections:
    """All connections to SQLite that were made, watched from inside of SQLite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[sqlite3.Connection] = []
        self.steps = 0  # of SQLite's virtual machine, while they are counted
        self.statements: list[str] = []  # with their values, while they are noted
        really_connect = sqlite3.connect

        def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
            self.made.append(really_connect(*arguments, **options))
            return self.made[-1]

        monkeypatch.setattr(sqlite3, "connect", connect)

    def count_steps(self) -> None:
        """From now on; a measure of work that is the same on all machines."""
        for connection in self.made:
            with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed
                connection.set_progress_handler(self._step, 1)

    def _step(self) -> int:
        self.steps += 1
        return 0

    def note_statements(self) -> None:
        """From now on."""
        for connection in self.made:
            with contextlib.suppress(sqlite3.ProgrammingError):
                connection.set_trace_callback(self.statements.append)

    def refuse_checkpoints(self, refuse: bool) -> None:
        """Lets every checkpoint fail, or work again."""

        def judge(action: int, name: str | None, *_: str | None) -> int:
            is_checkpoint = action == sqlite3.SQLITE_PRAGMA and name == "wal_checkpoint"
            return sqlite3.SQLITE_DENY if is_checkpoint else sqlite3.SQLITE_OK

        for connection in self.made:
            with contextlib.suppress(sqlite3.ProgrammingError):
                connection.set_authorizer(judge if refuse else None)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    """Ask for it before `service`."""
    return Connections(monkeypatch)


@contextlib.contextmanager
def locked(db: Path) -> Iterator[None]:
    """Another program is writing into the file."""
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def all_adds_up(service: Service) -> list[dict[str, Any]]:
    """What holds at every moment, by the file and by the answers; returns the stored events."""
    truth = rows(service.db)
    identities = {(row["topic"], row["event_id"]) for row in truth}
    assert len(identities) == len(truth), "an event is stored twice"
    received, unique, duplicates = await service.stats()
    assert unique == len(truth)
    assert received == unique + duplicates
    answer = (await service.ask("GET", "/stats")).document
    assert answer["topics"] == sorted({row["topic"] for row in truth})
    topics = await service.topics()
    assert list(topics) == answer["topics"]
    assert {topic: counts[1] for topic, counts in topics.items()} == Counter(
        row["topic"] for row in truth
    )
    assert all(got == new + again for got, new, again in topics.values())
    assert sum(got for got, _, _ in topics.values()) == received
    assert same_json(await service.stored(), truth)
    return truth


# --- Starting it -------------------------------------------------------------------------------

# What is wrong: flags, variables, a word of the line that says so.
BAD_SETTINGS: list[tuple[list[str], dict[str, str], str]] = [
    (["--port", "many"], {}, "port"),
    ([], {"PORT": "many"}, "port"),
    ([], {"PORT": "8080.0"}, "port"),
    (["--port", "65536"], {}, "65536"),
    (["--port", "-1"], {}, "-1"),
    (["--log-level", "LOUD"], {}, "LOUD"),
    (["--log-level", "CRITICAL"], {}, "CRITICAL"),
    (["--max-body-bytes", "0"], {}, "max-body-bytes"),
    (["--max-in-flight-bytes", "1000"], {}, "in-flight"),  # room for less than one body
    (["--max-in-flight-bytes", str(2**63)], {}, "in-flight"),
    (["--api-token", "a b"], {}, "token"),  # no header could carry these
    ([], {"API_TOKEN": "a\n"}, "token"),
    (["--api-token", "é"], {}, "token"),
    (["--nonsense"], {}, "nonsense"),
    (["--por", "1"], {}, "--por"),  # no abbreviations: tomorrow they could mean something else
    (["8080"], {}, "8080"),
]


@pytest.mark.parametrize(("flags", "variables", "word"), BAD_SETTINGS)
def test_a_setting_that_makes_no_sense_is_one_line(
    flags: list[str], variables: dict[str, str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        aggregator.read_settings(flags, variables)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("aggregator: ") and err.count("\n") == 1 and err.endswith("\n")
    assert word in err


def test_a_flag_beats_its_variable_and_that_the_default() -> None:
    variables = {each.metadata["variable"]: "" for each in dataclasses.fields(Settings)}
    assert aggregator.read_settings([], {}) == Settings()
    assert aggregator.read_settings([], variables) == Settings(), "an empty one is none"
    variables |= {"HOST": "::1", "PORT": "1", "DB_PATH": "a.db", "LOG_LEVEL": "error"}
    variables |= {"MAX_BODY_BYTES": "300", "MAX_IN_FLIGHT_BYTES": "400", "API_TOKEN": "t0ken"}
    expected = Settings("::1", 1, "a.db", "ERROR", 300, 400, "t0ken")
    assert aggregator.read_settings([], variables) == expected
    flags = ["--port=0", "--db=b.db", "--log-level", "Debug", "--max-body-bytes", "400"]
    changes = {"port": 0, "db": "b.db", "log_level": "DEBUG", "max_body_bytes": 400}
    assert aggregator.read_settings(flags, variables) == dataclasses.replace(expected, **changes)
    flags = ["--host", "h", "--max-in-flight-bytes", "500", "--api-token", "!~"]
    changes = {"host": "h", "max_in_flight_bytes": 500, "api_token": "!~"}
    assert aggregator.read_settings(flags, variables) == dataclasses.replace(expected, **changes)
    assert aggregator.read_settings(["--port", "65535"], {}).port == 65_535


def test_its_defaults_are_safe_and_those_of_the_contract() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.db) == ("127.0.0.1", 8080, "data/dedup.db")
    assert (settings.log_level, settings.max_body_bytes) == ("INFO", 4 * 1024 * 1024)
    assert settings.max_body_bytes <= settings.max_in_flight_bytes
    assert not settings.api_token


def test_help_says_what_each_flag_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        aggregator.read_settings(["--help"], {})
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for each in dataclasses.fields(Settings):
        flag = "--" + each.name.replace("_", "-")
        meaning = re.search(rf"{flag} [A-Z_]+ (.+?) \(default: (.+?); environment: (\w+)\)", text)
        assert meaning and len(meaning[1]) > 10, flag
        assert meaning[2] == (str(each.default) or "none")
        assert meaning[3] == each.metadata["variable"]


def test_version_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        aggregator.read_settings(["--version"], {})
    assert ended.value.code == 0
    assert capsys.readouterr().out == "Event Aggregator 1.0.0\n"


def diary(path: Path) -> None:
    path.write_text("Dear diary, today I was taken for a database. " * 50)


def sqlite_file(*statements: str) -> Callable[[Path], None]:
    """What makes a SQLite file with these statements."""

    def make(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(";".join(statements))

    return make


VERSION_1 = """
    CREATE TABLE topics (
        id         INTEGER PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        received   INTEGER NOT NULL,
        duplicates INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE events (
        seq       INTEGER PRIMARY KEY,
        topic_id  INTEGER NOT NULL REFERENCES topics (id),
        event_id  TEXT NOT NULL,
        timestamp TEXT NOT NULL,
        source    TEXT NOT NULL,
        payload   TEXT NOT NULL,
        UNIQUE (topic_id, event_id)
    );
    CREATE INDEX events_of_topic ON events (topic_id);
    PRAGMA user_version = 1;
    PRAGMA journal_mode = WAL;
    INSERT INTO topics VALUES (1, 'b', 7, 5), (2, 'a', 3, 2);
    INSERT INTO events VALUES
        (1, 1, '1', '2025-10-24T10:30:00Z', 's', '{"n":1}'),
        (4, 2, '1', '2025-10-24T10:30:00Z', 's', '{"n":2}'),
        (5, 1, '2', '2025-10-24T10:30:00Z', 's', '{"n":3}');
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Refused(503, "The database cannot be read: why"), "The database cannot be read: why"),
        (aggregator.Unavailable("disk I/O error"), "disk I/O error"),
        (RuntimeError("can't start new thread"), "can't start new thread; see ulimit -u"),
    ],
)
def test_an_error_at_the_start_is_told_in_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"^aggregator: {re.escape(line)}") as ended:
        start_that_raises(error, monkeypatch)
    assert str(ended.value).count("\n") == 0


def test_a_fault_of_the_program_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="dictionary changed size"):
        start_that_raises(RuntimeError("dictionary changed size"), monkeypatch)


def start_that_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python aggregator.py`, where serving ends with an error."""

    async def serve(settings: Settings) -> int:
        raise error

    monkeypatch.setattr(aggregator, "serve", serve)
    monkeypatch.setattr(aggregator, "prepare_process", lambda settings: None)
    monkeypatch.setattr(sys, "argv", ["aggregator.py"])
    aggregator.main()


def unfinished(path: Path) -> None:
    """A database whose program has died: what it wrote last is in the log only."""
    with contextlib.closing(sqlite3.connect(f"{path}.old")) as db:
        db.executescript("PRAGMA journal_mode = WAL; CREATE TABLE t (x); INSERT INTO t VALUES (1)")
        for ending in "", "-wal":
            shutil.copy(f"{path}.old{ending}", f"{path}{ending}")
    Path(f"{path}.old").unlink()


OTHER_TABLES = ["CREATE TABLE events (seq, topic_id)", "CREATE TABLE topics (id)"]
# Files that it must not touch, and a word of the line that says so.
FOREIGN_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a folder": (Path.mkdir, "cannot"),
    "no database": (diary, "not a database"),
    "another program's": (sqlite_file("CREATE TABLE t (x)"), "another program"),
    "another program's, of version 1": (
        sqlite_file("CREATE TABLE t (x)", "PRAGMA user_version = 1"),
        "another program",
    ),
    "another program's, with our names": (
        sqlite_file(*OTHER_TABLES, "PRAGMA user_version = 1"),
        "another program",
    ),
    "another program's, empty but marked": (
        sqlite_file("PRAGMA application_id = 252006673", "PRAGMA user_version = 1"),
        "another program",
    ),
    "another program's, with a version alone": (
        sqlite_file("PRAGMA user_version = 99"),
        "another program",
    ),
    "another program's, with our tables": (
        sqlite_file(VERSION_1, "PRAGMA application_id = 7"),
        "another program",
    ),
    "another program's, in the middle of its work": (unfinished, "another program"),
    "of a newer version": (
        sqlite_file(
            f"PRAGMA application_id = {aggregator.APPLICATION_ID}",
            f"PRAGMA user_version = {aggregator.SCHEMA_VERSION + 1}",
        ),
        "newer version",
    ),
}


@pytest.mark.parametrize("case", FOREIGN_FILES)
def test_a_file_of_others_is_left_byte_for_byte(case: str, tmp_path: Path) -> None:
    make, word = FOREIGN_FILES[case]
    file = tmp_path / "other.db"
    make(file)

    def look() -> dict[Path, tuple[bytes, int]]:
        files = [path for path in tmp_path.iterdir() if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = look()
    with pytest.raises(aggregator.StoreError) as refused:
        SqliteStore(str(file))
    why = str(refused.value)
    assert word in why and str(file) in why and "\n" not in why
    assert look().items() >= before.items()


@pytest.mark.parametrize("db", [":memory:", "{folder}/text/x.db"])
def test_a_database_that_cannot_be_there_is_named(db: str, tmp_path: Path) -> None:
    diary(tmp_path / "text")
    with pytest.raises(aggregator.StoreError, match="cannot use the database"):
        SqliteStore(db.format(folder=tmp_path))


def test_a_sqlite_older_than_3_38_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 99))
    with pytest.raises(aggregator.StoreError, match="3.38"):
        SqliteStore(str(tmp_path / "events.db"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 38, 0))
    SqliteStore(str(tmp_path / "events.db")).close()


# Whatever is left open, and whatever is not ASCII, is an error here.
STRICT = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii"}


async def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    sqlite_file("CREATE TABLE t (x)")(other)
    (tmp_path / "no log.db-wal").mkdir()  # where the write-ahead log should be
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {  # the flags, and what the line ends in
            f"already in use; try --port {port + 1}": ["--port", port],
            "it belongs to another program; name another file": ["--db", other],
            "that this user may write to both": ["--db", tmp_path / "no log.db"],
        }
        usual = ["--port", 0, "--db", tmp_path / "x.db"]
        running = [run_aggregator(*usual, *flags) for flags in cases.values()]
        helped = run_aggregator("--help")
        for popen, end in zip(running, cases):
            out, err = await asyncio.to_thread(finished, popen)
            assert (popen.returncode, out) == (1, "")
            # In development mode asyncio complains of all that is slow.
            (line,) = [line for line in err.splitlines() if " - asyncio - " not in line]
            assert line.startswith("aggregator: cannot ") and line.endswith(end), err
        out, err = await asyncio.to_thread(finished, helped)
        assert (helped.returncode, err) == (0, "") and "environment: DB_PATH" in out


def run_aggregator(*flags: object) -> subprocess.Popen[str]:
    """A process that should end by itself."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "aggregator.py"), *map(str, flags)],
        env=clean_environment(STRICT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(popen: subprocess.Popen[str]) -> tuple[str, str]:
    """stdout and stderr of a process that should end by itself."""
    try:
        return popen.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:  # it serves, and should not
        popen.kill()
        return popen.communicate()


async def test_it_introduces_itself_and_says_that_it_has_stopped(
    process: StartProcess, tmp_path: Path
) -> None:
    db = tmp_path / "a folder" / "that is made" / "events.db"
    service = await process("--log-level", "ERROR", db=db, API_TOKEN="t0ken")
    service.session.headers["Authorization"] = "Bearer t0ken"
    assert (await service.publish(numbered([1, 2, 2]))).counts == (3, 2, 1)
    assert await service.terminate(signal.SIGINT) == 0
    await service.start("--log-level", "warning", "--host", "0.0.0.0", API_TOKEN="")
    assert await service.terminate() == 0
    said = [line.partition(" - INFO - ")[2] for line in service.log().splitlines()]
    ports = re.findall(r"localhost:(\d+)/ ", service.log())
    for text, events, token, port in (
        (said[:7], 0, "set", ports[0]),
        (said[7:], 2, "not set, so whoever reaches the address may use it", ports[1]),
    ):
        assert text == [
            "Event Aggregator 1.0.0",
            f"Database: {db}, {events} events",
            f"API token: {token}",
            f"Running on http://localhost:{port}/ (Ctrl-C stops it)",
            f"Try: open it in a browser, or python publisher.py --url http://localhost:{port}/",
            "Stopping: what was accepted is stored",
            "Stopped",
        ]


@pytest.mark.parametrize(
    ("host", "link"),
    [
        ("0.0.0.0", "http://localhost:80/"),
        ("::", "http://localhost:80/"),
        ("127.0.0.1", "http://localhost:80/"),
        ("::1", "http://[::1]:80/"),
        ("192.0.2.1", "http://192.0.2.1:80/"),
        ("2001:db8::1", "http://[2001:db8::1]:80/"),
    ],
)
def test_the_link_works_where_it_is_read(host: str, link: str) -> None:
    assert aggregator.link(host, 80) == link


async def test_many_first_starts_at_once_all_succeed(tmp_path: Path) -> None:
    db = str(tmp_path / "new folder" / "events.db")
    at_once = threading.Barrier(8)

    def open_and_close() -> None:
        at_once.wait(PATIENCE_SECONDS)
        SqliteStore(db).close()

    with ThreadPoolExecutor(8) as threads:
        for started in [threads.submit(open_and_close) for _ in range(8)]:
            started.result(PATIENCE_SECONDS)


async def test_a_start_waits_for_others_who_make_the_file(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aggregator, "BUSY_SECONDS", 0.0)
    db = str(tmp_path / "events.db")
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        starting = asyncio.create_task(asyncio.to_thread(SqliteStore, db))
        await until(lambda: len(connections.made) >= 2)
        await asyncio.sleep(0.05)  # it tries in vain
        assert not starting.done()
        other.execute("COMMIT")
        (await starting).close()
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(aggregator, "OPEN_SECONDS", 0.05)
        with pytest.raises(aggregator.StoreError, match="locked"):
            await asyncio.to_thread(SqliteStore, db)


@posix
def test_a_new_folder_is_there_after_a_power_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    SqliteStore(str(tmp_path / "a" / "b" / "events.db")).close()
    assert {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino} <= synced


async def test_a_file_of_version_1_0_0_opens_with_its_counters(
    serve: Serve, tmp_path: Path
) -> None:
    db = tmp_path / "old.db"
    sqlite_file(VERSION_1)(db)
    for number, counters in enumerate([(10, 3, 7), (13, 4, 9), (16, 5, 11)]):
        service = await serve(db)  # the second time, it is a file of today
        assert await service.stats() == counters
        assert await service.topics() == {
            "a": (3 + 2 * number, 1 + number, 2 + number),
            "b": (7 + number, 2, 5 + number),
        }
        await all_adds_up(service)
        batch = [event(topic="b"), event(topic="a", event_id=f"new {number}"), event(topic="a")]
        assert (await service.publish(batch)).counts == (3, 1, 2)
        await service.stop()
    with contextlib.closing(sqlite3.connect(db)) as opened:
        marks = [opened.execute(f"PRAGMA {name}").fetchone()[0] for name in MARKS]
    assert marks == [aggregator.APPLICATION_ID, 2], "so the version before refuses it"


MARKS = ["application_id", "user_version"]


# --- Where it runs -----------------------------------------------------------------------------
# On each system, from any folder, with whatever streams, locale and interpreter's flags. No other
# system than this one is at hand, so Windows is simulated: what a Python there has not is taken
# away, and what an open file forbids there is forbidden.

WINDOWS = """
import io, sys, types, weakref
import aiohttp.web, argparse, asyncio, ctypes, concurrent.futures.thread, os, signal, sqlite3

def copy_of(module, without, **changes):
    copy = types.ModuleType(module.__name__)
    names = {name: value for name, value in vars(module).items() if name not in without}
    vars(copy).update(names, **changes)
    sys.modules[module.__name__] = copy

def open_file(path, *flags, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return os.open(path, *flags, **options)

copy_of(os, ["pread", "pwrite", "preadv", "getuid", "geteuid", "fork", "fchmod", "fchown",
    "sched_getaffinity", "sysconf", "uname", "mkfifo", "O_DIRECTORY", "O_CLOEXEC"],
    name="nt", open=open_file)
# Ctrl-Break comes as a signal that Unix has not; SIGUSR1 is sent in its place.
copy_of(signal, ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGKILL", "SIGALRM", "alarm",
    "setitimer", "pthread_sigmask", "sigwait"], SIGBREAK=signal.SIGUSR1)
for name in "resource", "fcntl", "pwd", "grp", "termios":
    sys.modules[name] = None

def only_on_unix(*arguments):
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = only_on_unix

# The first client resets its connection before it is accepted: asyncio then closes the listener.
# https://github.com/python/cpython/issues/93821
async def create_server(loop, *arguments, **options):
    server = await asyncio.BaseEventLoop.create_server(loop, *arguments, **options)
    if not failures:
        failures.append(OSError(64, "The specified network name is no longer available"))
        loop.call_soon(fail_to_accept, loop, server)
    return server
def fail_to_accept(loop, server):
    message = "Accept failed on a socket"
    context = {"message": message, "exception": failures[0], "socket": server.sockets[0]}
    loop.call_exception_handler(context)
    server.close()
failures = []
asyncio.SelectorEventLoop.create_server = create_server

class CDLL(ctypes.CDLL):
    def __init__(self, name, *arguments):
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *arguments)
ctypes.CDLL = CDLL

class FileIO(io.FileIO):
    opened = weakref.WeakSet()
    def __init__(self, name, *arguments, **options):
        super().__init__(name, *arguments, **options)
        if str(name).endswith("-wal"):
            self.opened.add(self)
io.FileIO = FileIO

class Connection(sqlite3.Connection):
    connected = weakref.WeakSet()
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.connected.add(self)
    def close(self):  # the last one removes the write-ahead log
        self.connected.discard(self)
        if not self.connected and not all(file.closed for file in FileIO.opened):
            raise PermissionError(13, "an open file cannot be removed")
        super().close()
really_connect = sqlite3.connect
sqlite3.connect = lambda *arguments, **options: really_connect(
    *arguments, factory=Connection, **options)
"""


class Elsewhere(Process):
    """A process in unusual surroundings; perhaps it has no log that could tell its port."""

    def __init__(
        self,
        db: Path,
        *,
        program: Path = HERE / "aggregator.py",
        streams: str = "",
        **environment: str,
    ) -> None:
        super().__init__(db, db.parent.with_suffix(".log"), [], environment)
        self._arguments = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, str(program)]
        self._arguments += ["--port", "0", "--db", str(db)]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It answers while this lasts."""
        self.popen = self._begin()
        try:
            self.port = await until(self.place)
            await until(self.answers)
            yield
        finally:
            await self.session.close()
            if self.popen.poll() is None:
                await self.kill()

    def _begin(self) -> subprocess.Popen[bytes]:
        with self._log_file.open("wb") as log:
            return subprocess.Popen(
                self._arguments, env=self._environment, cwd=self.db.parent.parent, stderr=log
            )

    def place(self) -> int:
        """The port at which it listens; 0 before it does."""
        assert self.popen.poll() is None, self.log()
        found = re.search(r"Running on http://localhost:(\d+)/", self.log())
        if found:
            return int(found[1])
        has_no_log = "2>&-" in self._arguments[2]
        return listening_port(self.popen.pid) if has_no_log and self.db.exists() else 0

    async def answers(self) -> bool:
        assert self.popen.poll() is None, self.log()
        with contextlib.suppress(aiohttp.ClientConnectionError):
            return await self.health() == 200
        return False

    async def stops(self, number: int = signal.SIGTERM) -> None:
        """It stops as it should."""
        assert await self.terminate(number) == 0, self.log()
        assert [path.name for path in self.db.parent.iterdir()] == [self.db.name]


def listening_port(pid: int) -> int:
    """The TCP port at which a process listens, by what Linux knows of it; 0 if there is none."""
    opened = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been closed
            opened.add(os.readlink(descriptor))
    for line in Path("/proc/net/tcp").read_text("ascii").splitlines():
        columns = line.split()
        if columns[3] == "0A" and f"socket:[{columns[9]}]" in opened:  # 0A: it listens
            return int(columns[1].rpartition(":")[2], 16)
    return 0


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a simulation, for Unix")
async def test_on_windows_ctrl_c_and_ctrl_break_stop_it_under_load(
    serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WINDOWS, "utf-8")

    async def run(number: signal.Signals) -> tuple[Book, Path]:
        chance, book = random.Random(number), Book(set(), 0, 0)
        service = Elsewhere(tmp_path / number.name / "events.db", PYTHONPATH=str(tmp_path))
        async with service.running():
            crowd = [asyncio.create_task(book.keep_publishing(service, chance)) for _ in range(6)]
            await until(lambda: book.answers >= 50 or any(each.done() for each in crowd))
            await service.stops(number)
            await asyncio.gather(*crowd)
        assert "New connections cannot be accepted" in service.log()
        assert service.log().endswith(" - Stopped\n")
        assert book.answers >= 50
        return book, service.db

    for book, db in await asyncio.gather(run(signal.SIGINT), run(signal.SIGUSR1)):
        await book.check(await serve(db))


def test_a_folder_on_a_missing_drive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os.path, "isdir", lambda path: False)  # not even Q:\, or / here
    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(FileNotFoundError):
        aggregator.make_folder("/data")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="nothing tells its port here")
async def test_without_its_standard_streams_it_serves_all_the_same(tmp_path: Path) -> None:
    async def run(name: str, streams: str) -> None:
        service = Elsewhere(tmp_path / name / "events.db", streams=streams)
        async with service.running():
            assert (await service.publish(numbered([1, 1]))).counts == (2, 1, 1)
            await service.stops()
        assert rows(service.db) == numbered([1])

    await asyncio.gather(run("none", "<&- >&- 2>&-"), run("no errors", "2>&-"))


async def test_through_a_link_without_docstrings_it_has_its_page(tmp_path: Path) -> None:
    link = tmp_path / "aggregator"  # and it runs in another folder
    link.symlink_to(HERE / "aggregator.py")
    service = Elsewhere(tmp_path / "data" / "events.db", program=link, PYTHONOPTIMIZE="2")
    async with service.running():
        page = await service.ask("GET", "/", headers={"Accept": "text/html"})
        assert page.headers["content-type"].startswith("text/html")
        await service.stops()


SURROUNDINGS = {
    "ASCII alone": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "development mode": {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"},
    "every address": {"HOST": "::", "LOG_LEVEL": "warning"},
}


async def test_it_runs_in_every_locale_mode_and_kind_of_address(
    tmp_path: Path,
) -> None:
    odd = event(topic="über", payload={"text": "naïve \u2028 😀"})
    name = os.fsdecode("größe #1 100% sure?.db".encode())  # also where names are ASCII

    async def run(case: str) -> None:
        db = tmp_path / case / name
        service = Elsewhere(db, **SURROUNDINGS[case])
        async with service.running():
            assert (await service.publish([odd, odd])).counts == (2, 1, 1)
            if case == "every address":
                async with service.session.get(f"http://[::1]:{service.port}/health") as response:
                    assert response.status == 200
            await service.stops()
        assert rows(db) == [odd]
        for sign in "Traceback", "Warning", " ERROR ":
            assert sign not in service.log()
        for said in "Database: ", "Running on", "Dropped duplicate", "Stopped":
            assert said in service.log(), "also where little is logged"

    await asyncio.gather(*(run(case) for case in SURROUNDINGS if case != "every address" or IPV6))


def has_both_addresses() -> bool:
    """Whether this machine has IPv4 and IPv6."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return socket.has_dualstack_ipv6()
    return False


IPV6 = has_both_addresses()


# SIGTERM comes while the interpreter still loads the program.
SIGNAL_AT_THE_START = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "asyncio":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder)
"""


def test_process_1_obeys_a_signal_while_it_is_loaded(
    tmp_path: Path,
) -> None:
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as why:
        pytest.skip(f"no process can be made process 1 here: {why}")
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_AT_THE_START, "utf-8")
    command = [*alone, sys.executable, str(HERE / "aggregator.py"), "--port", "0"]
    ended = subprocess.run(
        [*command, "--db", str(tmp_path / "events.db")],
        env=clean_environment({"PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


# --- The event ---------------------------------------------------------------------------------


async def test_an_event_is_stored_and_returned_as_it_was_sent(service: InProcess) -> None:
    assert (await service.publish(event())).counts == (1, 1, 0)
    assert rows(service.db) == [event()]
    assert await service.stored() == [event()]


PAYLOADS = {
    "nothing": "{}",
    "every kind of value": '{"a": [null, true, false, 1, 1.0, "", [], {}], "": {"b": {"c": []}}}',
    "any script": '{"Grüße": "日本語 🎉 \u0627\u0644", "\\ud83c\\udf89": "\\u00e9"}',
    "line ends": '{"a\\nb": "c\\r\\nd\\u2028e\\u2029f\\u0085"}',
    "quotes and slashes": r"""{"a\"b\\c\/d": "\b\f\t\u001b'; DROP TABLE events; --"}""",
    "NUL in keys and values": r'{"a\u0000b": "c\u0000d", "\u0000": "\u0000"}',
    "what looks like SQL or JSON": '{"$.a": "{}", "[0]": "json(\'1\')", "null": "null"}',
    "large integers": json.dumps({"n": [2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**99]}),
    "an integer of 4300 digits": json.dumps({"n": 10**4300 - 1, "m": -(10**4299)}),
    "floats": '{"n": [0.1, 1e308, 5e-324, -0.0, 0.0, 1E5, 1e16, 0.30000000000000004, -2.5e-7]}',
    "as precise as a float can be": '{"n": [1.7976931348623157e308, 123456789.12345678, 1e-400]}',
    "duplicated keys": '{"a": 1, "b": {"c": 2, "c": 3}, "a": {"d": 4}}',
    "noncharacters": '{"\uffff\ufffe": "\ufdd0\ufeff\U0010ffff"}',
    "many members": json.dumps({str(number): number for number in range(2000)}),
    "long strings": json.dumps({"x" * 5000: "ü" * 50_000}),
}


async def test_a_payload_comes_back_equal(service: InProcess) -> None:
    for case, payload in PAYLOADS.items():
        sent = event(event_id=case, payload="HERE")
        body = json_of(sent).replace(b'"HERE"', payload.encode())
        assert (await service.publish(body)).counts == (1, 1, 0), case
    stored = await service.stored()
    for case, one, other in zip(PAYLOADS, stored, rows(service.db), strict=True):
        expected = event(event_id=case, payload=json.loads(PAYLOADS[case]))  # the last of two keys
        assert same_json(one, expected), case
        assert same_json(other, expected), case


async def test_json_may_be_nested_500_levels_and_no_more(service: InProcess) -> None:
    for form, levels in (b"%b", 1), (b"[%b]", 2), (b'{"events": [%b]}', 3):
        fits = form % nested_event(500 - levels, topic=f"{levels}")
        assert (await service.publish(fits)).counts == (1, 1, 0)
        stored = await service.ask("GET", "/events", topic=f"{levels}")
        assert nested(500 - levels) in stored.body  # as text: this parser, too, has its limits
        for depth in 501 - levels, 502, 1000, 20_000:
            (fault,) = (await service.publish(form % nested_event(depth))).detail(422)
            assert fault == TOO_DEEP
    beside = b"[%b,%b]" % (nested_event(498, event_id="2"), nested_event(100, event_id="3"))
    assert (await service.publish(beside)).counts == (2, 2, 0)
    (fault,) = (await service.publish(b"[%b,{}]" % nested_event(499))).detail(422)
    assert fault == TOO_DEEP


@pytest.mark.parametrize("form", [b"%b", b"[%b]", b'{"events":[%b]}'])
def test_a_bad_event_is_refused_at_every_depth_of_nesting(form: bytes) -> None:
    for depth in 1, 100, 495, 496, 497, 498, 499, 500, 501, 990, 1000, 1010, 5000:
        (fault,) = faults_of(form % nested_event(depth, topic=1))
        assert fault["type"] == ("string_type" if depth + form.count(b"[") < 498 else ANY)
        assert fault["type"] == "string_type" or fault == TOO_DEEP


async def test_white_space_around_names_is_no_part_of_the_identity(
    service: InProcess,
) -> None:
    padded = event(topic="  a b\t", event_id="\r\n1\u3000", source="\u00a0s\n")
    assert (await service.publish(padded)).counts == (1, 1, 0)
    assert (await service.publish(event(topic="a b", event_id="1"))).counts == (1, 0, 1)
    assert await service.stored() == [event(topic="a b", event_id="1", source="s")]


async def test_a_name_has_512_characters_without_what_is_stripped(
    service: InProcess,
) -> None:
    name = "🎉" * 512
    sent = event(topic=f" {name} ", event_id=f"\t{name}", source=f"{name}\n")
    assert (await service.publish(sent)).counts == (1, 1, 0)
    assert await service.stored() == [event(topic=name, event_id=name, source=name)]


NAMES = [
    *'-0%"\\🎉\ufeff~',
    *("null", "a b", "$.a", "{}", "[0]", "'; --", "a\u0301", "a\xa0b", "a\u2027\u202ab"),
    *("\ud7ff\ue000", "a\u200bb", "\U0010ffff"),
]


async def test_a_name_may_be_any_text_without_control_characters(service: InProcess) -> None:
    sent = [event(topic=name, event_id=name, source=name) for name in NAMES]
    for each in sent:
        assert (await service.publish([each, each])).counts == (2, 1, 1), each
    assert await all_adds_up(service) == sent
    for each in sent:
        assert await service.stored(topic=each["topic"]) == [each]


async def test_the_first_event_with_an_identity_is_kept(service: InProcess) -> None:
    await service.publish(event())
    for changes in [
        {},
        {"payload": {"amount": 0}},
        {"timestamp": "2030-01-01 00:00:00"},
        {"source": "another"},
        {"topic": "order.created "},
    ]:
        assert (await service.publish(event(**changes))).counts == (1, 0, 1), changes
    assert rows(service.db) == [event()]
    others = [
        *(event(topic=topic) for topic in ("order.paid", "ORDER.CREATED")),
        *(event(event_id=event_id) for event_id in ("2", "01", "1.0", "１")),
    ]
    for other in others:
        assert (await service.publish(other)).counts == (1, 1, 0), other
    assert rows(service.db) == [event(), *others]


async def test_ids_that_only_differ_in_unicode_normalization_are_two(service: InProcess) -> None:
    both = [event(event_id="\u00e9"), event(event_id="e\u0301")]
    assert (await service.publish(both)).counts == (2, 2, 0)


TIMESTAMPS = [
    "2025-10-24T10:30:00Z",
    "2025-10-24T10:30:00",
    "2025-10-24 10:30:00",
    "2025-10-24 10:30:00.5Z",
    "2025-10-24T10:30:00.123456Z",
    "2025-10-24T10:30:00.123456789+07:00",
    "2025-10-24T10:30:00-05:30",
    "2025-10-24T00:00:00+00:00",
    "2024-02-29T23:59:59Z",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999999-12:00",
    "2025-10-24t10:30:00z",
    "2025-10-24T10:30Z",
    "2025-10-24T10:30:00,25Z",
    "2025-10-24T10:30:00+07",
    "2025-10-24T10:30:00+0730",
    "2025-10-24T10:30:00-0000",
    "2025-10-24T23:59:59+23:59",
    "2016-12-31T23:59:60Z",
    "2016-12-31 23:59:60.999",
]
LEAP_SECONDS_ELSEWHERE = [
    "2015-06-30T19:59:60-04:00",
    "2017-01-01T05:29:60+05:30",
    "1972-06-30T23:29:60-0030",
]
NO_TIMESTAMPS = [
    "",
    "yesterday",
    "1761301800",
    "10:30:00",
    "2025-10-24",
    "2025-10-24T",
    "2025-10-24X10:30:00Z",
    "2025-W43-5T10:30:00Z",
    "2025-13-01T10:30:00Z",
    "2025-00-01T10:30:00Z",
    "2025-02-29T10:30:00Z",
    "2025-04-31T10:30:00Z",
    "2025-10-24T25:00:00Z",
    "2025-10-24T10:61:00Z",
    "2025-10-24T10:30:99Z",
    "2025-10-24T10:30:00+25:00",
    "2025-10-24T10:30:00+02:75",
    "2025-10-24T10:30:00.Z",
    "2025-10-24T10:30:00.1234567890Z",
    "2025-10-24T10:30:00." + "1" * 100_000 + "Z",
    "2025-10-24T10:30:00,",
    "2025-10-24T10:30:00 Z",
    "2025-10-24T10:30:00+7",
    "2025-10-24T10:30:00+07:",
    "2025-10-24T10:30:00+073",
    "2025-10-24T10:30:00+24:00",
    "2025-10-24T10:30:00+07:60",
    "2025-10-24T24:00:00Z",
    "2025-10-24T10:60:00Z",
    "2025-10-24T10:30:61Z",
    "2025-10-24T1:30:00Z",
    "0000-01-01T00:00:00Z",
    "2016-12-31T23:58:60Z",
    "2016-12-31T22:59:60Z",
    "2016-12-30T23:59:60Z",
    "2016-12-31T23:59:60+01:00",
    "2017-01-01T05:29:60-05:30",
    "0001-01-01T00:00:60+01:00",
    "2025-10-24T10:30:00ZZ",
    "2025-10-24T10:30:00Z and so on",
    "2025-10-24T10:30:00Z\n",
    "2025-10-24T10:30:00Z\0",
    "２０２５-10-24T10:30:00Z",
    "2025-10-24T10:30:00Z\ud800",
]


async def test_a_timestamp_is_kept_as_it_was_written(
    service: InProcess,
) -> None:
    texts = TIMESTAMPS + LEAP_SECONDS_ELSEWHERE
    sent = [event(event_id=text, timestamp=text) for text in texts]
    assert (await service.publish(sent)).counts == (len(sent), len(sent), 0)
    assert rows(service.db) == await service.stored() == sent


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
async def test_line_separators_in_a_payload_are_returned_as_escapes(
    accept: str, service: InProcess
) -> None:
    awkward = event(payload={"a\x85b\u2028c\u2029d": "\u2029\u2028\x85", "e": "\x84\u2027\u202a"})
    await service.publish(json.dumps(awkward, ensure_ascii=False).encode())
    found = await service.ask("GET", "/events", headers={"Accept": accept})
    text = found.body.decode()
    for name in "0085", "2028", "2029":
        assert text.count(f"\\u{name}") == 2
        assert chr(int(name, 16)) not in text
    assert "\x84\u2027\u202a" in text
    assert json.dumps(awkward["payload"]) in json.dumps(json.loads(text))


def test_brackets_in_strings_are_no_nesting() -> None:
    payload = {"[": "[" * 3000, '"{': '\\"[{' * 600, "\\": ["]" * 5, "{\\" * 900, '"' * 7]}
    assert faults_of(json_of(event(payload=payload))) == []
    assert faults_of(json_of(event(payload={"a": [[]] * 3000}))) == []
    for strings in '"[\\\\"', '"\\""', '"\\\\\\"]"', '"]}]}"':  # these hide nothing
        body = b'{"a": [%b, %b]}' % (strings.encode(), b"[" * 600 + b"]" * 600)
        assert faults_of(body) == [TOO_DEEP]
    assert faults_of(b"]" * 600 + b"[" * 600) != [], "and no exception"


async def test_other_fields_are_ignored_and_not_stored(service: InProcess) -> None:
    sent = event(id=7, events=[1], seq=99, note={"a": None})
    assert (await service.publish([sent])).counts == (1, 1, 0)
    assert await service.stored() == [event()]


async def test_of_duplicated_keys_the_last_one_counts(
    service: InProcess,
) -> None:
    body = json_of(event(topic="last", event_id="last"))
    body = b'{"topic": "first", "event_id": 5, "payload": [], ' + body[1:]
    assert (await service.publish(body)).counts == (1, 1, 0)
    assert await service.stored() == [event(topic="last", event_id="last")]
    twice = b'{"events": 5, "events": [%b]}' % json_of(event(topic="last", event_id="last"))
    assert (await service.publish(twice)).counts == (1, 0, 1)


# --- Publish -----------------------------------------------------------------------------------


async def test_a_body_is_an_event_a_batch_or_an_array(service: InProcess) -> None:
    bodies = [
        *(event(), {"events": [event()]}, [event()], {"events": [event()], "other": 1}),
        *({"events": [event()], "topic": "x"}, event(events=5)),
    ]
    for number, body in enumerate(bodies):
        answer = await service.publish(body)
        assert answer.counts == ((1, 0, 1) if number else (1, 1, 0)), body
        assert answer.headers["content-type"].startswith("application/json")
    assert rows(service.db) == [event()]


async def test_an_object_with_events_and_event_id_is_an_event(service: InProcess) -> None:
    assert (await service.publish(event(events=[]))).counts == (1, 1, 0)


async def test_a_duplicate_in_the_same_batch_is_dropped(
    service: InProcess,
) -> None:
    first = event(payload={"n": 1})
    second = event(payload={"n": 2})
    assert (await service.publish([first, second, event(event_id="2"), second])).counts == (4, 2, 2)
    assert rows(service.db) == [first, event(event_id="2")]


async def test_a_duplicate_in_a_later_batch_is_dropped(
    service: InProcess,
) -> None:
    assert (await service.publish(numbered(range(10)))).counts == (10, 10, 0)
    assert (await service.publish(numbered(range(5, 20)))).counts == (15, 10, 5)
    assert await all_adds_up(service) == numbered(range(20))


async def test_counts_are_of_the_request_also_in_a_shared_commit(
    disk: Disk, service: InProcess
) -> None:
    batches = [range(4), range(2, 6), range(1), range(9, 10), range(10)]
    async with commit_held(disk, service) as waiting:
        await queue_up(service, waiting, map(numbered, batches))
    answers = [(await answer).counts for answer in waiting]
    assert answers[1:] == [(4, 4, 0), (4, 2, 2), (1, 0, 1), (1, 1, 0), (10, 3, 7)]
    assert disk.groups == [1, 20], "all that waits is committed together"
    assert await queued(service, 0)
    assert len(await all_adds_up(service)) == 11


async def test_202_is_sent_only_after_the_commit(disk: Disk, service: InProcess) -> None:
    with disk.held():
        waiting = asyncio.create_task(service.publish(event()))
        await until(lambda: disk.groups)
        for _ in range(5):  # each of them would give an answer time to arrive
            assert await service.stats() == (0, 0, 0)
        assert not waiting.done() and rows(service.db) == []
    assert (await waiting).counts == (1, 1, 0)
    assert rows(service.db) == [event()]


async def test_each_connection_waits_for_the_disk_and_for_others(
    connections: Connections, service: InProcess
) -> None:
    assert (await service.publish(event())).counts == (1, 1, 0)
    full = 2
    memory = 2
    pragmas = {
        "synchronous": full,
        "fullfsync": 1,
        "temp_store": memory,
        "wal_autocheckpoint": 0,
        "journal_size_limit": 48_000 * 4096,
        "cache_size": -16384,
        "busy_timeout": 2000,
        "journal_mode": "wal",
    }
    for each in connections.made:
        found = {name: each.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas}
        assert found == pragmas
    read_only = [each.execute("PRAGMA query_only").fetchone()[0] for each in connections.made]
    assert read_only == [0, 1, 1, 0], "the writer, the reader, the watcher, the checkpoints"


async def test_a_request_is_stored_whole_or_not_at_all(service: InProcess) -> None:
    (await service.publish([*numbered(range(50)), event(topic="")])).detail(422)
    (await service.publish({"events": [event(source=5), *numbered(range(50))]})).detail(422)
    assert rows(service.db) == []
    assert await service.stats() == (0, 0, 0)
    assert (await service.publish(numbered(range(50)))).counts == (50, 50, 0)


JSON_TYPES_SENT = ["application/json", "Application/JSON", "application/json; charset=utf-8; x=y"]


async def test_json_or_no_content_type_is_taken(service: InProcess) -> None:
    for number, content_type in enumerate([*JSON_TYPES_SENT, None]):
        headers = {"Content-Type": content_type} if content_type else {}
        body = json_of(event(event_id=str(number)))
        answer = await service.ask("POST", "/publish", body, headers)
        assert answer.counts == (1, 1, 0), content_type


async def test_the_connection_goes_on_after_a_202_if_wished(service: InProcess) -> None:
    for version, headers, connection in [
        ("1.1", "", None),
        ("1.1", "Connection: close\r\n", "close"),
        ("1.0", "", None),
        ("1.0", "Connection: keep-alive\r\n", "keep-alive"),
    ]:
        body = json_of(event(event_id=f"{version}{headers.strip()}"))
        sent = request(body, headers=headers).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
        async with service.connection(sent) as client:
            answer = await client.answer()
            assert answer.counts == (1, 1, 0)
            assert answer.headers.get("connection") == connection
            sent_at = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
            assert abs(sent_at - time.time()) < PATIENCE_SECONDS
            if connection == "close" or (version, headers) == ("1.0", ""):
                assert await client.reader.read() == b""
            else:
                await client.send(sent)
                assert (await client.answer()).counts == (1, 0, 1)


async def test_counters_of_each_topic_are_exact_in_shared_groups(
    disk: Disk, service: InProcess
) -> None:
    chance = random.Random(12)
    expected: dict[str, Counter[str]] = {topic: Counter() for topic in "abc"}
    batches = [
        [
            event(topic=chance.choice("abc"), event_id=chance.choice("0123456"))
            for _ in range(chance.randrange(1, 12))
        ]
        for _ in range(8)
    ]
    for each in itertools.chain(*batches):
        expected[each["topic"]][each["event_id"]] += 1
    async with commit_held(disk, service) as waiting:
        await queue_up(service, waiting, batches)
    answers = [(await answer).counts for answer in waiting]
    assert len(disk.groups) == 2
    found = await service.topics()
    assert found.pop("order.created") == (1, 1, 0)
    assert found == {
        topic: (ids.total(), len(ids), ids.total() - len(ids)) for topic, ids in expected.items()
    }
    assert await service.stats() == tuple(map(sum, zip(*answers)))
    await all_adds_up(service)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([500, 500, 500], [2, 1]),  # 1000 bytes are enough
        ([999, 600, 300, 100], [2, 2]),  # 999 are not
        ([400, 400, 400, 400], [3, 1]),
        ([2000, 400], [1, 1]),  # one that is larger has a commit of its own
        ([300, 300, 300], [3]),
    ],
)
async def test_a_group_is_bounded_by_its_bytes(
    sizes: list[int],
    groups: list[int],
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk,
    service: InProcess,
) -> None:
    monkeypatch.setattr(aggregator, "MAX_GROUP_BYTES", 1000)
    bodies = [json_of(event(event_id=str(n))).ljust(size) for n, size in enumerate(sizes)]
    async with commit_held(disk, service) as waiting:
        await queue_up(service, waiting, bodies)
    assert {(await answer).counts for answer in waiting} == {(1, 1, 0)}
    assert disk.groups == [1, *groups]


async def answers_at_once(service: Service, number: int, size: int = 0) -> list[Any]:
    """Publishes so many events in the same turn of the event loop; returns the counts."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(service.connection()) for _ in range(number)]
        bodies = [json_of(event(event_id=str(n))).ljust(size) for n in range(number)]
        await asyncio.gather(*(each.send(request(body)) for each, body in zip(clients, bodies)))
        return [(await client.answer()).counts for client in clients]


async def test_the_writer_begins_before_all_that_waits_is_validated(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, service: InProcess
) -> None:
    monkeypatch.setattr(aggregator, "PIECE_REQUESTS", 4)
    really_validate = aggregator.validate
    validated = 0

    def validate_the_sixth_later(body: bytes, encode: Any) -> Batch:
        nonlocal validated
        validated += 1
        deadline = time.monotonic() + 5
        while validated == 6 and not disk.groups:  # nothing else happens on the event loop
            assert time.monotonic() < deadline, "the writer waits for all of them"
            time.sleep(0.005)
        return really_validate(body, encode)

    monkeypatch.setattr(aggregator, "validate", validate_the_sixth_later)
    assert await answers_at_once(service, 6) == [(1, 1, 0)] * 6


async def test_a_group_of_requests_that_come_at_once_is_bounded(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, service: InProcess
) -> None:
    monkeypatch.setattr(aggregator, "MAX_GROUP_BYTES", 1000)
    really_validate = aggregator.validate
    turn = 0  # of the event loop
    validated_in: set[int] = set()  # turns

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def validate(body: bytes, encode: Any) -> Batch:
        validated_in.add(turn)
        return really_validate(body, encode)

    monkeypatch.setattr(aggregator, "validate", validate)
    counting = asyncio.create_task(count_turns())
    assert await answers_at_once(service, 6, size=500) == [(1, 1, 0)] * 6
    counting.cancel()
    assert max(disk.groups) <= 2
    assert len(validated_in) >= 3, "others have their turns in between"


async def test_no_request_stays_in_memory_after_its_answer(service: InProcess) -> None:
    kept = (aggregator.Submission, aggregator.Validated)
    assert (await service.publish(event())).counts == (1, 1, 0)
    (await service.publish(event(topic=""))).detail(422)
    await until(lambda: not any(isinstance(each, kept) for each in gc.get_objects()))


async def test_what_comes_just_before_the_end_is_answered(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    commits = aggregator.GroupCommit(store, aggregator.Health())
    await commits.start()
    answer = commits.submit(json_of(event()))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await commits.finish()
            assert await answer == (1, 1)
    finally:
        store.wake()
        commits.close()
        store.close()


async def test_only_the_writers_thread_writes_and_only_the_readers_reads(
    disk: Disk, reads: Reads, service: InProcess
) -> None:
    for number in range(3):
        await asyncio.gather(*(service.publish(numbered([n, number])) for n in range(5)))
        for path in "/events", "/events?tail=2", "/stats", "/topics", "/metrics":
            assert (await service.ask("GET", path)).status == 200
        assert await service.stored(topic="order.created", event_id="1") == numbered([1])
    assert {name for name, _ in reads.calls} == set(READS)
    assert len(disk.threads) == len(reads.threads) == 1
    assert len(disk.threads | reads.threads | {threading.current_thread().name}) == 3


@pytest.mark.parametrize(
    ("function", "sent"),
    [("validate", request(json_of(event()))), ("preferred", reading("/events"))],
    ids=["in the consumer", "in a handler"],
)
async def test_a_fault_of_the_program_is_500_and_harms_nobody(
    function: str,
    sent: bytes,
    monkeypatch: pytest.MonkeyPatch,
    service: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("in /secret/path")

    with monkeypatch.context() as patched:
        patched.setattr(aggregator, function, fail)
        async with service.connection(sent) as client:
            assert (await client.answer()).detail(500) == "Internal Server Error"
    assert errors_logged(caplog) == ["A fault of this program"]
    assert (await service.publish(event())).counts == (1, 1, 0)
    assert await service.health() == 200
    assert await in_flight(service, 0)


async def test_fifty_publishers_of_the_same_ids_store_each_once(service: InProcess) -> None:
    chance = random.Random(50)

    async def publisher() -> list[tuple[int, int, int]]:
        numbers = list(range(60))
        chance.shuffle(numbers)
        batches = [numbers[:1], numbers[1:2], numbers[2:30], numbers[30:]]
        return [(await service.publish(numbered(batch))).counts for batch in batches]

    answers = itertools.chain(*await asyncio.gather(*(publisher() for _ in range(50))))
    assert [sum(column) for column in zip(*answers)] == [3000, 60, 2940]
    assert await service.stats() == (3000, 60, 2940)
    assert len(await all_adds_up(service)) == 60


async def test_a_body_may_come_in_chunks_of_any_size(service: InProcess) -> None:
    for size in 1, 97, 100_000:
        body = json_of(numbered(range(3), topic=f"{size}"))
        assert (await service.publish(in_chunks(body, size))).counts == (3, 3, 0)


async def test_a_client_that_asks_first_is_told_to_go_on(
    service: InProcess,
) -> None:
    for body, status in (json_of(event()), 202), (b"[]", 422):
        head = request(b"", length=len(body), headers="Expect: 100-continue\r\n")
        async with service.connection(head) as client:
            assert b" 100 " in await client.reader.readuntil(b"\r\n\r\n")
            await client.send(body)
            assert (await client.answer()).status == status


COMPRESSORS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
    "": bytes,
}


async def test_a_body_may_be_compressed(service: InProcess) -> None:
    for encoding, compress in COMPRESSORS.items():
        sent = numbered(range(300), topic=f"<{encoding}>")
        answer = await service.publish(compress(json_of(sent)), Content_Encoding=encoding)
        assert answer.counts == (300, 300, 0), encoding
        assert await service.stored(topic=f"<{encoding}>") == sent


async def test_bodies_of_log_shippers_are_understood(service: InProcess) -> None:
    fluent_bit = [{"date": 1761301800.25} | event(event_id=name) for name in ("f1", "f2")]
    body = gzip.compress(json.dumps(fluent_bit, separators=(",", ":")).encode())
    assert (await service.publish(body, Content_Encoding="gzip")).counts == (2, 2, 0)
    vector = [event(event_id=f"v{n}", host="web-1", source_type="file") for n in range(3)]
    body = b"[" + b",".join(json.dumps(each).encode() for each in vector) + b"]"
    assert (await service.publish(body)).counts == (3, 3, 0)
    assert [each["event_id"] for each in await service.stored()] == ["f1", "f2", "v0", "v1", "v2"]


# --- Refusals: 422 -----------------------------------------------------------------------------

MISSING = {"type": "missing", "msg": "Field required"}
NO_STRING = {"type": "string_type", "msg": "Input should be a valid string"}
NO_OBJECT = {
    "type": "model_attributes_type",
    "msg": "Input should be a valid dictionary or object to extract fields from",
}
NO_LIST = {"type": "list_type", "msg": "Input should be a valid list"}
TOO_SHORT = {
    "type": "string_too_short",
    "msg": "String should have at least 1 character",
    "ctx": {"min_length": 1},
}
TOO_LONG = {
    "type": "string_too_long",
    "msg": "String should have at most 512 characters",
    "ctx": {"max_length": 512},
}
BLANK = {"type": "value_error", "msg": "Value error, Field cannot be empty or whitespace only"}
CONTROL = {"type": "value_error", "msg": Says("Value error, ")}
SURROGATE = {
    "type": "string_unicode",
    "msg": "Input should be a valid string, unable to parse raw data as a unicode string",
}
NO_DATETIME = {"type": "datetime_type", "msg": "Input should be a valid datetime"}
BAD_DATETIME = {"type": "datetime_parsing", "msg": Says("Input should be a valid datetime, ")}
NO_DICT = {"type": "dict_type", "msg": "Input should be a valid dictionary"}
NOT_FINITE = {"type": "finite_number", "msg": "Input should be a finite number"}
NO_EVENTS = {
    "type": "too_short",
    "msg": "List should have at least 1 item after validation, not 0",
    "ctx": {"field_type": "List", "min_length": 1, "actual_length": 0},
}
NO_JSON = {"type": "json_invalid", "msg": "JSON decode error", "ctx": {"error": Says("")}}
TOO_DEEP = NO_JSON | {"loc": ["body"], "ctx": {"error": "nested too deeply"}}

# One bad field: its name, its value, the entry (to which the test adds the loc).
BAD_FIELDS: list[tuple[str, Any, dict[str, Any]]] = [
    *(
        (field, value, entry)
        for field in ("topic", "event_id", "source")
        for value, entry in [
            (ABSENT, MISSING),
            *((value, NO_STRING) for value in (None, True, 5, 0.5, ["x"], {"x": 1}, math.inf)),
            ("", TOO_SHORT),
            *((value, BLANK) for value in (" ", "\t\r\n", "\u3000\u00a0")),
            *((value, TOO_LONG) for value in ("x" * 513, " " + "ü" * 600)),
            *((f"a{value}b", CONTROL) for value in ("\n", "\r", "\0", "\x1b[31m", "\x1f", "\x7f")),
            *((f"a{value}b", CONTROL) for value in ("\x80", "\x85", "\x9f", "\u2028", "\u2029")),
            *((value, SURROGATE) for value in ("a\ud800", "\udfff")),
        ]
    ),
    ("timestamp", ABSENT, MISSING),
    *(("timestamp", value, NO_DATETIME) for value in (None, True, 1761301800, [], {}, math.inf)),
    *(("timestamp", value, BAD_DATETIME) for value in NO_TIMESTAMPS),
    ("payload", ABSENT, MISSING),
    *(("payload", value, NO_DICT) for value in (None, False, 0, "{}", [], [{"a": 1}], math.inf)),
    *(("payload", {"a": value}, SURROGATE) for value in ("\ud800", ["\udc00x"], {"b": "\udbff"})),
    *(("payload", {key: 1}, SURROGATE) for key in ("\ud800", "a\udfff")),
    ("payload", {"a": {"\ud800": 1}}, SURROGATE),
    *(("payload", {"a": value}, NOT_FINITE) for value in (math.inf, -math.inf, [{"b": math.inf}])),
]


def label(value: Any) -> str | None:
    """A short and printable name for a row of a table."""
    if value is ABSENT:
        return "absent"
    return None if isinstance(value, dict) and "type" in value else ascii(value)[:24]


@pytest.mark.parametrize(("field", "value", "entry"), BAD_FIELDS, ids=label)
def test_a_bad_field_is_named_with_its_fault(field: str, value: Any, entry: dict[str, Any]) -> None:
    for body, loc in in_all_forms(event(**{field: value})):
        assert faults_of(json_of(body)) == [entry | {"loc": [*loc, field]}]


# Bodies that are bad as a whole.
BAD_BODIES: list[tuple[bytes, list[dict[str, Any]]]] = [
    (b"", [MISSING | {"loc": ["body"]}]),
    *((body, [NO_OBJECT | {"loc": ["body"]}]) for body in (b"null", b"true", b"5", b'"event"')),
    *((body, [NO_EVENTS | {"loc": ["body"]}]) for body in (b"[]", b" [ ] ")),
    (b'{"events": []}', [NO_EVENTS | {"loc": ["body", "events"]}]),
    *(
        (b'{"events": %b}' % events, [NO_LIST | {"loc": ["body", "events"]}])
        for events in (b"null", b"{}", b'"x"', b"1")
    ),
    (b"[1, [], null]", [NO_OBJECT | {"loc": ["body", index]} for index in range(3)]),
    (b'{"events": ["x"]}', [NO_OBJECT | {"loc": ["body", "events", 0]}]),
    (
        b"{}",
        [
            MISSING | {"loc": ["body", field]}
            for field in ("topic", "event_id", "timestamp", "source", "payload")
        ],
    ),
    (b'{"topic": nope}', [NO_JSON | {"loc": ["body", 10]}]),
    *(
        (body, [NO_JSON | {"loc": ANY}])
        for body in (
            *(b"{", b"nope", b"[1,]", b"{'a': 1}", b'{"a": 01}', b"{} {}", b" ", b"\0", b"[}"),
            *(b'{"a": NaN}', b"[Infinity]", b"[-Infinity]", b'{"a": "\n"}', b'{"a": "\\x"}'),
            *(b"\xff\xfe", b'"\xc3"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf{}", "{}".encode("utf-16")),
            *(b"[" * 100_000, b'{"a":' * 100_000),
            *(b'{"n": %b}' % (b"9" * 4301), b"-" + b"1" * 5000),
        )
    ),
]


@pytest.mark.parametrize(("body", "entries"), BAD_BODIES, ids=label)
def test_a_bad_body_is_answered_with_its_fault(body: bytes, entries: list[dict[str, Any]]) -> None:
    faults = faults_of(body)
    assert faults == entries
    assert faults[0]["loc"][0] == "body"


async def test_a_422_carries_these_entries_and_nothing_is_stored(service: InProcess) -> None:
    table = [(body, entries) for body, entries in BAD_BODIES]
    for number, (field, value, entry) in enumerate(BAD_FIELDS):
        body, loc = in_all_forms(event(**{field: value}))[number % 3]
        table.append((json_of(body), [entry | {"loc": [*loc, field]}]))
    for start in range(0, len(table), 100):
        some = table[start : start + 100]
        answers = await asyncio.gather(*(service.publish(body) for body, _ in some))
        for answer, (body, entries) in zip(answers, some):
            assert answer.detail(422) == entries, body[:200]
    assert await service.stats() == (0, 0, 0) and rows(service.db) == []


def test_all_errors_are_listed_in_order() -> None:
    bad = [
        event(source="", topic=5),
        event(),
        "no event",
        dict(reversed(event(payload=[], timestamp="now", event_id="a\nb").items())),
        {},
    ]
    assert [tuple(fault["loc"][2:]) for fault in faults_of(json_of({"events": bad}))] == [
        (0, "topic"),
        (0, "source"),
        (2,),
        (3, "event_id"),
        (3, "timestamp"),
        (3, "payload"),
        *((4, field) for field in ("topic", "event_id", "timestamp", "source", "payload")),
    ]


async def test_at_most_100_errors_are_listed(service: InProcess) -> None:
    for bad, times in [
        ({}, 10_000),
        (5, 101),
        ({"topic": "t"}, 26),
        ({"topic": "t", "event_id": "1"}, 40),
    ]:
        detail = (await service.publish([event(), *[bad] * times])).detail(422)
        assert len(detail) == 100
        assert detail[0]["loc"][:2] == ["body", 1]


def test_looking_for_errors_ends_after_100_of_them() -> None:
    encoded = []

    def encode(batch: Sequence[Any]) -> bytes:
        encoded.append(len(batch))
        return SqliteStore.encode(batch)

    for start, least in ([], 100), ([event()] * 1000, 1100):
        encoded.clear()
        with pytest.raises(Refused):
            validate(json_of([*start, *[event(topic=5)] * 10_000]), encode)
        assert least <= sum(encoded) < 5 * least


@pytest.mark.parametrize(
    ("body", "loc", "why"),
    [
        (b"[NaN]", ["body"], "NaN and Infinity are not JSON"),
        (b"[-Infinity]", ["body"], "NaN and Infinity are not JSON"),
        (b"[%b]" % (b"1" * 4301), ["body"], "Exceeds the limit (4300 digits) for integer string"),
        (b'["a", b]', ["body", 6], "Expecting value"),
        (b'[\n"a"\n1]', ["body", 6], "Expecting ',' delimiter"),
        (b'["a\xff"]', ["body", 3], "invalid start byte"),
        (b"[" * 501, ["body"], "nested too deeply"),
    ],
)
def test_why_a_body_is_no_json_and_where_is_said(body: bytes, loc: list[Any], why: str) -> None:
    (fault,) = faults_of(body)
    assert fault["loc"] == loc
    assert fault["ctx"]["error"].startswith(why)
    assert "sys." not in fault["ctx"]["error"]


async def test_a_bad_request_harms_none_that_arrives_with_it(service: InProcess) -> None:
    bad = [b"{", b"[]", json_of(event(topic="")), json_of(event(payload={"a": math.inf}))]
    bodies = [json_of(event(event_id=str(n))) if n % 3 else bad[n // 3 % 4] for n in range(24)]
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(service.connection()) for _ in bodies]
        await asyncio.gather(*(c.send(request(body)) for c, body in zip(clients, bodies)))
        statuses = [(await client.answer()).status for client in clients]
    assert statuses == [202 if n % 3 else 422 for n in range(24)]
    assert {row["event_id"] for row in await all_adds_up(service)} == {
        str(n) for n in range(24) if n % 3
    }


async def test_a_refused_body_is_let_go_at_once(service: InProcess) -> None:
    bodies = [b'[{"a": "%b"},' % bytes(100_000), json_of([event(topic="x" * 50_000)] * 2)] * 4
    with memory() as measured:
        for _ in range(12):
            async with contextlib.AsyncExitStack() as stack:  # all at once, so in one batch
                clients = [await stack.enter_async_context(service.connection()) for _ in bodies]
                await asyncio.gather(*(c.send(request(b)) for c, b in zip(clients, bodies)))
                for client in clients:
                    (await client.answer()).detail(422)
    assert measured.held < 3_000_000, "of 10 MB"


async def test_a_refusal_does_not_echo_what_was_refused(service: InProcess) -> None:
    secret = "4111111111111111"
    bodies = [
        event(topic=f"{secret}\n", event_id=f"a\0{secret}", timestamp=secret, source=[secret]),
        event(topic=secret * 50, payload=secret),
        event(payload={secret: "\ud800"}),
        event(payload={secret: math.inf}),
        [secret],
        b'{"topic": "%b' % secret.encode(),
        b'{"n": %b}' % (secret.encode() * 300),
        b'"%b\xff"' % secret.encode(),
    ]
    for body in bodies:
        answer = await service.publish(body)
        assert answer.detail(422)
        assert secret.encode() not in answer.body


# `take` says whether all is well, `explain` what is not, and a bare few lines here what the
# contract says. Thousands of damaged events must not find them of different minds.

JUNK = [
    *(None, True, False, 0, -1, 2.5, 10**400, math.inf, "", " ", "a", "x" * 512, "x" * 513),
    *(" " + "x" * 512, "\n", "a\nb", "a\u2028b", "\x7f", "\x85", "a\ud800", "é🎉"),
    *([], {}, [1], {"a": []}),
    *({"a": math.inf}, {"\ud800": 1}, {"a": ["\udfff"]}, {"a": {"a": {"\0": "\0"}}}, [math.inf]),
    *TIMESTAMPS,
    *NO_TIMESTAMPS,
]


def damaged(chance: random.Random) -> Any:
    """An event to which something was done, mostly something bad."""
    damaged: Any = event(event_id=f"{chance.random()}")
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        field = chance.choice([*event(), "other"])
        match chance.randrange(6):
            case 0:
                damaged.pop(field, None)
            case 1 | 2:
                damaged[field] = chance.choice(JUNK)
            case 3 if isinstance(damaged.get(field), str):
                at = chance.randrange(len(damaged[field]) + 1)
                piece = chance.choice([" ", "\n", "\0", "\u3000", "\udc00", "Z", "ü", "0"])
                damaged[field] = damaged[field][:at] + piece + damaged[field][at:]
            case 4:
                damaged["payload"] = {"a": {str(chance.choice(JUNK)): [chance.choice(JUNK)]}}
            case 5 if chance.random() < 0.2:
                return chance.choice(JUNK)
    return damaged


def is_good(candidate: Any) -> bool:
    """What the contract says of an event, in the plainest words."""

    def is_name(value: Any) -> bool:
        return (
            isinstance(value, str)
            and 1 <= len(value.strip()) <= 512
            and not {unicodedata.category(c) for c in value.strip()} & {"Cc", "Cs", "Zl", "Zp"}
        )

    def is_json(value: Any) -> bool:
        if isinstance(value, dict):
            return all(is_json(key) and is_json(value[key]) for key in value)
        if isinstance(value, list):
            return all(map(is_json, value))
        if isinstance(value, str):
            return not any(unicodedata.category(c) == "Cs" for c in value)
        return not isinstance(value, float) or math.isfinite(value)

    return (
        isinstance(candidate, dict)
        and all(is_name(candidate.get(field)) for field in ("topic", "event_id", "source"))
        and candidate.get("timestamp") not in NO_TIMESTAMPS
        and isinstance(candidate.get("timestamp"), str)
        and bool(ISO_8601.fullmatch(candidate["timestamp"]))
        and isinstance(candidate.get("payload"), dict)
        and is_json(candidate["payload"])
    )


ISO_8601 = re.compile(  # what is in NO_TIMESTAMPS is left out
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d([.,]\d{1,9})?)?([Zz]|[+-]\d\d(:?\d\d)?)?", re.ASCII
)


def test_the_judge_and_its_reasons_agree_on_damaged_events() -> None:
    chance = random.Random(2025)
    taken = 0
    faults: Counter[str] = Counter()
    for _ in range(2000):
        events = [damaged(chance) for _ in range(chance.choice([1, 1, 2, 4]))]
        errors = faults_of(json_of({"events": events}))
        assert bool(errors) == (not all(map(is_good, events))), events
        taken += not errors
        faults.update(error["type"] for error in errors)
        for error in errors:
            assert error["loc"][:2] == ["body", "events"]
            assert not is_good(events[error["loc"][2]])
    assert taken > 250 and len(faults) >= 11, "the mutations must reach everything"


async def test_whatever_damaged_event_is_taken_comes_back_equal(service: InProcess) -> None:
    chance = random.Random(4)
    good = [each for each in (damaged(chance) for _ in range(2000)) if is_good(each)]
    answers = [await service.publish(good[n : n + 100]) for n in range(0, len(good), 100)]
    assert {answer.status for answer in answers} == {202}
    first: dict[tuple[str, str], Any] = {}
    for each in good:
        names = {field: each[field].strip() for field in ("topic", "event_id", "source")}
        kept = {field: (each | names)[field] for field in event()}
        first.setdefault((kept["topic"], kept["event_id"]), kept)
    assert len(first) > 300
    assert same_json(await all_adds_up(service), list(first.values()))


# --- Refusals: the others ----------------------------------------------------------------------


async def test_a_page_elsewhere_has_to_send_a_content_type(
    service: InProcess,
) -> None:
    body = json_of(event())
    origin = {"Origin": "http://elsewhere.example"}
    (await service.ask("POST", "/publish", body, origin)).detail(415)
    assert (await service.publish(body, **origin)).counts == (1, 1, 0)


async def test_another_content_type_is_415_and_told_the_right_one(service: InProcess) -> None:
    for content_type in [
        "text/plain",
        "text/plain; charset=application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/jsonx",
        "application/xml",
        "json",
    ]:
        answer = await service.publish(event(), Content_Type=content_type)
        assert "Content-Type: application/json" in answer.detail(415)
        assert answer.headers["accept"] == "application/json"
    assert rows(service.db) == []


BROKEN = gzip.compress(json_of(numbered(range(100))))
BROKEN_COMPRESSION = {
    "truncated": ("gzip", BROKEN[: len(BROKEN) // 2]),
    "without its last byte": ("gzip", BROKEN[:-1]),
    "without its checksum": ("gzip", BROKEN[:-8]),
    "only its header": ("gzip", BROKEN[:10]),
    "nothing": ("gzip", b""),
    "no gzip": ("gzip", json_of(event())),
    "with a wrong checksum": ("gzip", BROKEN[:-8] + bytes(4) + BROKEN[-4:]),
    "damaged in the middle": ("gzip", BROKEN[:60] + b"\xff" * 20 + BROKEN[80:]),
    "followed by something": ("gzip", BROKEN + b"garbage"),
    "truncated deflate": ("deflate", zlib.compress(json_of(event()))[:-3]),
    "no deflate": ("deflate", b"\xff\xff\xff\xff"),
    "deflate followed by something": ("deflate", zlib.compress(json_of(event())) + b"."),
    "zlib sent as gzip": ("gzip", zlib.compress(json_of(event()))),
    "gzip sent as deflate": ("deflate", gzip.compress(json_of(event()))),
    "gzip twice": ("gzip", gzip.compress(json_of(event())) * 2),
}


async def test_broken_compression_is_400(service: InProcess) -> None:
    for case, (encoding, body) in BROKEN_COMPRESSION.items():
        answer = await service.publish(body, Content_Encoding=encoding)
        assert answer.status == 400, case
        answer.detail(400)
    assert rows(service.db) == []
    assert await service.metric("aggregator_in_flight_bytes") == 0


async def test_an_unknown_compression_is_415_and_told_the_known(service: InProcess) -> None:
    body = gzip.compress(json_of(event()))
    for encoding in "br", "zstd", "compress", "gzip, gzip", "x":
        answer = await service.publish(body, Content_Encoding=encoding)
        assert "Content-Encoding" in answer.detail(415) and "gzip" in answer.detail(415)
        assert answer.headers["accept-encoding"] == "gzip, deflate"


async def test_a_body_is_taken_up_to_max_body_bytes(serve: Serve) -> None:
    service = await serve(max_body_bytes=1000)
    fits = json_of(event()).ljust(1000)

    for transport, encoding in [
        (bytes, "identity"),
        (in_chunks, "identity"),
        (gzip.compress, "gzip"),
        (zlib.compress, "deflate"),
    ]:
        assert (await service.publish(transport(fits), Content_Encoding=encoding)).status == 202
        (await service.publish(transport(fits + b" "), Content_Encoding=encoding)).detail(413)
    assert await service.metric("aggregator_in_flight_bytes") == 0
    assert await service.metric('aggregator_requests_refused_total{status="413"}') == 4


async def test_a_body_too_large_that_comes_at_once_is_413(
    serve: Serve,
) -> None:
    service = await serve(max_body_bytes=1000)
    body = json_of(event()).ljust(5000)
    async with service.connection(CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)) as client:
        (await client.answer()).detail(413)
    assert rows(service.db) == []


@pytest.mark.parametrize("encoding", ["identity", "deflate"])
async def test_a_body_without_an_end_is_413_once_too_large(encoding: str, serve: Serve) -> None:
    service = await serve(max_body_bytes=1000)
    head = CHUNKED[:-2] + f"Content-Encoding: {encoding}\r\n\r\n".encode()
    async with service.connection(head + b"1f4\r\n" + bytes(500) + b"\r\n") as client:
        await until(lambda: in_flight(service, 500))
        await client.send(b"1f5\r\n", bytes(501), b"\r\n")
        (await client.answer()).detail(413)
    assert await in_flight(service, 0)


async def test_a_length_above_the_limit_is_413_at_once(
    service: InProcess,
) -> None:
    async with service.connection(request(b"", length=5 * 1024 * 1024)) as client:
        (await client.answer()).detail(413)


async def test_a_bomb_is_413_and_takes_little_memory(service: InProcess) -> None:
    bomb = gzip.compress(bytes(50_000_000), 1)
    assert len(bomb) < 500_000
    with memory() as measured:
        (await service.publish(bomb, Content_Encoding="gzip")).detail(413)
    assert measured.peak < 20_000_000
    assert (await service.publish(event())).status == 202


async def test_a_body_that_does_not_arrive_is_408(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(aggregator, "BODY_SECONDS", 0.1)
    service = await serve()
    body = json_of(event())
    async with service.connection(request(body[:10], length=len(body))) as client:
        assert "did not arrive in" in (await client.answer()).detail(408)
    assert await service.metric("aggregator_in_flight_bytes") == 0
    assert rows(service.db) == []


def test_a_body_has_30_seconds_to_arrive() -> None:
    assert aggregator.BODY_SECONDS == 30


@pytest.mark.parametrize(
    "broken", [b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n", b"2\r\n{}{}\r\n", b"1;" + b"x" * 20_000]
)
async def test_a_chunk_that_breaks_later_is_no_server_error(
    broken: bytes, monkeypatch: pytest.MonkeyPatch, service: InProcess
) -> None:
    monkeypatch.setattr(aggregator, "BODY_SECONDS", 0.2)
    async with service.connection(CHUNKED, b"2\r\n[ \r\n") as client:
        await client.send(broken)
        # One of aiohttp's two parsers tells of it at once; with the other one nothing more comes.
        assert (await client.answer()).status in (400, 408)
    await until(lambda: in_flight(service, 0))


async def test_a_body_that_breaks_off_gives_its_room_back(
    service: InProcess,
) -> None:
    body = json_of(event())
    async with service.connection(request(body[:-1], length=len(body))):
        await until(lambda: in_flight(service, len(body) - 1))
    await until(lambda: in_flight(service, 0))
    assert await service.metric('aggregator_requests_refused_total{status="400"}') == 1
    assert rows(service.db) == []


async def test_an_unknown_path_is_404(service: InProcess) -> None:
    for path in "/nothing", "/publish/", "/events/1", "//", "/%00", "/..%2f":
        assert (await service.ask("GET", path)).detail(404) == "Not Found"


async def test_a_wrong_method_is_405_and_told_the_right_ones(service: InProcess) -> None:
    for method, path, allowed in [
        ("GET", "/publish", "POST"),
        ("PUT", "/publish", "POST"),
        ("POST", "/events", "GET"),
        ("DELETE", "/events", "GET"),
        ("POST", "/stats", "GET"),
        ("POST", "/", "GET"),
        ("POST", "/metrics", "GET"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("PUT", "/topics", "GET, HEAD"),
    ]:
        answer = await service.ask(method, path)
        assert answer.detail(405) == "Method Not Allowed"
        assert set(allowed.split(", ")) <= set(re.split(", ?", answer.headers["allow"]))


REQUESTS = [
    *(("POST", "/publish"), ("GET", "/events"), ("GET", "/stats"), ("GET", "/metrics")),
    *(("GET", "/topics"), ("GET", "/openapi.json"), ("POST", "/health"), ("DELETE", "/")),
    *(("GET", "/nothing"), ("GET", "/publish"), ("POST", "/")),
]


async def test_without_the_token_all_but_health_is_401(serve: Serve) -> None:
    service = await serve(api_token="s3cret")
    wrong = [f"Bearer {token}".strip() for token in ("", "wrong", "s3cre", "s3cret2", "S3CRET")]
    wrong += ["", "s3cret", "Basic s3cret"]
    for method, path in REQUESTS:
        for authorization in wrong:
            headers = {"Authorization": authorization} if authorization else {}
            answer = await service.ask(method, path, json_of(event()), headers)
            answer.detail(401)
            assert answer.headers["www-authenticate"] == "Bearer"
    for method, path in itertools.product(("GET", "HEAD", "OPTIONS"), ("/", "/health")):
        assert (await service.ask(method, path)).status == 200
    assert rows(service.db) == []


async def test_with_the_right_token_everything_is_open(serve: Serve) -> None:
    service = await serve(api_token="s3cret")
    headers = {"Authorization": "Bearer s3cret", "Content-Type": "application/json"}
    assert (await service.ask("POST", "/publish", json_of(event()), headers)).counts == (1, 1, 0)
    for path in "/events", "/stats", "/metrics", "/", "/topics":
        assert (await service.ask("GET", path, headers=headers)).status == 200
    for scheme in "bearer", "BEARER", "Bearer ":
        authorization = {"Authorization": f"{scheme} s3cret"}
        assert (await service.ask("GET", "/stats", headers=authorization)).status == 200
    (await service.ask("GET", "/nothing", headers=headers)).detail(404)


async def test_a_token_that_is_no_text_is_401_too(serve: Serve) -> None:
    service = await serve(api_token="s3cret")
    headers = "Authorization: Bearer \xff\xfe\r\nConnection: close\r\n"
    async with service.connection(request(b"{}", headers=headers)) as client:
        (await client.answer()).detail(401)


LOCAL_NAMES = ["localhost", "LocalHost:80", "127.0.0.1", "127.0.0.1:8080", "[::1]:8080", "[::1]"]
LOCAL_NAMES += ["192.0.2.7:1", "localhost:", "localhost.:80", ""]
OTHER_NAMES = ["attacker.example", "attacker.example:8080", "localhost.attacker.example", "a"]
OTHER_NAMES += ["attackerlocalhost", "attacker.localhost", "localhost.attacker"]
OTHER_NAMES += ["localhost@attacker.example", "127.0.0.1.attacker.example", "[attacker.example]"]


async def test_without_a_token_only_local_names_are_answered(serve: Serve) -> None:
    service = await serve()
    for name in LOCAL_NAMES:
        sent = request(json_of(event())).replace(b"Host: localhost", f"Host: {name}".encode())
        async with service.connection(sent) as client:
            assert (await client.answer()).status == 202, name
    for name in OTHER_NAMES:
        for method, path in [*REQUESTS, ("GET", "/"), ("GET", "/health")]:
            answer = await service.ask(method, path, json_of(event()), {"Host": name})
            assert "token" in answer.detail(421) and "Host: localhost" in answer.detail(421)
    assert await service.stats() == (len(LOCAL_NAMES), 1, len(LOCAL_NAMES) - 1)


@pytest.mark.parametrize("settings", [{"api_token": "s3cret"}, {"host": "0.0.0.0"}])
async def test_with_a_token_or_for_others_any_name_is_answered(
    settings: dict[str, str], serve: Serve
) -> None:
    service = await serve(**settings)
    headers = {"Host": "attacker.example", "Authorization": "Bearer s3cret"}
    assert (await service.ask("GET", "/stats", headers=headers)).status == 200


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("LOCALHOST", True), ("0.0.0.0", False), ("::", False), ("192.0.2.1", False)),
        *(("example.com", False), ("", False)),
    ],
)
def test_loopback_is_what_only_this_machine_can_reach(host: str, is_loopback: bool) -> None:
    assert aggregator.is_loopback(host) == is_loopback


# --- Reading -----------------------------------------------------------------------------------


async def test_events_come_in_the_order_of_their_commits(
    service: InProcess,
) -> None:
    assert await service.read() == {"topic": None, "events": [], "count": 0, "last_seq": 0}
    sent = [*numbered([3, 1, 2], topic="b"), *numbered([9, 8], topic="a"), event(event_id="z")]
    for each in sent:
        await service.publish(each)
    answer = await service.ask("GET", "/events")
    assert answer.headers["content-type"].startswith("application/json")
    found = answer.document
    assert list(found) == ["topic", "events", "count", "last_seq"]
    assert (found["topic"], found["events"], found["count"]) == (None, sent, 6)
    assert [list(each) for each in found["events"]] == [list(event())] * 6
    assert found["last_seq"] >= 6


async def test_events_of_one_batch_keep_its_order(service: InProcess) -> None:
    numbers = random.Random(1).sample(range(1000), 300)
    await service.publish(numbered(numbers))
    assert await service.stored(topic="order.created") == numbered(numbers)


async def test_one_topic_has_only_its_own_events(
    service: InProcess,
) -> None:
    both = [*numbered(range(3), topic="a"), *numbered(range(2), topic="b & c/ü")]
    await service.publish(both)
    found = await service.read(topic="b & c/ü")
    assert (found["topic"], found["events"], found["count"]) == ("b & c/ü", both[3:], 2)
    assert await service.stored(topic="") == both
    last_seq = found["last_seq"]
    for query in {"topic": "unknown"}, {"topic": "a", "after": last_seq}, {"topic": "\0"}:
        after = query.get("after", 0)
        assert await service.read(**query) == {
            "topic": query["topic"],
            "events": [],
            "count": 0,
            "last_seq": after,
        }


async def test_paging_misses_nothing_and_repeats_nothing(service: InProcess) -> None:
    sent = [event(event_id=str(n), topic="odd" if n % 2 else "even") for n in range(1234)]
    for limit, count in (1, 20), (7, 140), (500, 1234), (501, 1234):
        await service.publish(sent[:count])
        for topic in "", "even":
            expected = [each for each in sent[:count] if topic in ("", each["topic"])]
            after = 0
            found: list[dict[str, Any]] = []
            while page := await service.read(topic=topic, after=after, limit=limit):
                assert page["count"] == len(page["events"]) <= limit
                if not page["events"]:
                    assert page["last_seq"] == after
                    break
                assert page["last_seq"] > after
                assert page["count"] == limit or len(found) + page["count"] == len(expected)
                after = page["last_seq"]
                found += page["events"]
            assert found == expected == await service.stored(topic=topic)


async def test_large_pages_are_put_together_without_a_seam(service: InProcess) -> None:
    sent = [event(event_id=str(n), payload={"text": f"{n}" * 200_000}) for n in range(6)]
    sent[3:3] = numbered(range(100, 120))
    for start in range(0, len(sent), 5):
        await service.publish(sent[start : start + 5])
    assert await service.stored() == sent
    assert await service.stored(limit=3) == sent[:3]


async def test_an_answer_is_a_snapshot_that_holds_nobody_up(
    service: InProcess,
) -> None:
    before = [event(event_id=str(n), payload={"text": "x" * 400_000}) for n in range(24)]
    before += numbered(range(24, 30))
    for each in before:
        await service.publish(each)
    async with service.connection(reading("/events")) as client:
        start = await client.reader.readuntil(b"event_id")  # and then no more for a while
        for each in numbered(range(100, 130)):
            assert (await service.publish(each)).counts == (1, 1, 0)
        assert len(await service.stored(after=30)) == 30
        with contextlib.closing(sqlite3.connect(service.db, timeout=0.05)) as other:
            is_busy, _, _ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert not is_busy, "the reader holds the log"
        rest = start + await client.reader.read()
    assert rest.count(b'"event_id"') == 30
    assert re.search(rb'"count": 30, "last_seq": 30\}\r\n0\r\n\r\n$', rest)


EXTRA = {"type": "extra_forbidden", "msg": "Extra inputs are not permitted"}
BAD_QUERIES = [
    *(
        ({name: value}, {"type": "int_parsing", "msg": Says("Input should be a valid integer, ")})
        for name in ("after", "limit", "tail")
        for value in ("x", "1.5", "0x10", "1 2", "", "9" * 5000, "１", "1_0", "Latest")
    ),
    ({"limit": "latest"}, {"type": "int_parsing", "msg": ANY}),
    ({"after": "-1"}, {"type": "greater_than_equal", "ctx": {"ge": 0}}),
    ({"tail": "-1"}, {"type": "greater_than_equal", "ctx": {"ge": 0}}),
    ({"limit": "-1"}, {"type": "greater_than_equal", "ctx": {"ge": 1}}),
    ({"limit": "0"}, {"type": "greater_than_equal", "ctx": {"ge": 1}}),
    ({"after": "1"}, {"type": "less_than_equal", "ctx": {"le": 0}}),
    *(({name: "1"}, EXTRA) for name in ("offset", "Limit", "topics", "lastEventId", "")),
]


async def test_a_bad_query_parameter_is_422(service: InProcess) -> None:
    for query, entry in BAD_QUERIES:
        (fault,) = (await service.ask("GET", "/events", **query)).detail(422)
        assert fault == {"msg": ANY, "loc": ["query", *query]} | entry, query
        if fault["type"] == "int_parsing":
            assert fault["msg"].endswith("unable to parse string as an integer")
        elif fault["type"] != "extra_forbidden":
            ((_, bound),) = fault["ctx"].items()
            how = fault["type"].replace("_equal", "_or_equal_to").replace("_", " ")
            assert fault["msg"] == f"Input should be {how} {bound}"


async def test_nothing_that_a_reader_asks_for_is_ignored(service: InProcess) -> None:
    await service.publish(event())
    for path, faults in {
        "/events?limit=1&limit=1": ["limit"],
        "/events?topic=a&topic=a&b=1&c=2&b=3": ["topic", "b", "c"],
        "/events?after=0&tail=1": ["tail"],
        "/events?after=latest&tail=1": ["tail"],
        "/events?topic=order.created&event_id=1&tail=1": ["tail"],
        "/topics?topic=a": ["topic"],
        "/topics?after=a&after=b": ["after"],
        "/topics?tail=1": ["tail"],
        "/stats?topic=a": ["topic"],
        "/stats?after=0": ["after"],
    }.items():
        found = (await service.ask("GET", path)).detail(422)
        assert found == [EXTRA | {"loc": ["query", name]} for name in faults], path
    found = (await service.ask("GET", "/events?event_id=1")).detail(422)
    assert found == [MISSING | {"loc": ["query", "topic"]}]
    found = (await service.ask("GET", "/events?topic=&event_id=1")).detail(422)
    assert found == [MISSING | {"loc": ["query", "topic"]}]
    (fault,) = (await service.ask("GET", "/topics?limit=0")).detail(422)
    assert (fault["type"], fault["ctx"]) == ("greater_than_equal", {"ge": 1})
    query = "&".join(f"p{n}=1" for n in range(150))
    assert len((await service.ask("GET", f"/events?{query}")).detail(422)) == 100
    for path in "/", "/health", "/metrics":  # monitors put there what they like
        assert (await service.ask("GET", path, after=7, x="")).status == 200


async def test_one_event_is_found_by_its_identity(service: InProcess) -> None:
    sent = [event(topic=topic, event_id=event_id) for topic in "ab" for event_id in "123"]
    await service.publish(sent)
    for number, each in enumerate(sent, start=1):
        identity = {"topic": each["topic"], "event_id": each["event_id"]}
        expected = {"topic": each["topic"], "events": [each], "count": 1, "last_seq": number}
        assert await service.read(**identity) == expected
        assert await service.read(**identity, limit=5, after=number - 1) == expected
        nothing = {"topic": each["topic"], "events": [], "count": 0, "last_seq": number}
        assert await service.read(**identity, after=number) == nothing
    lines = await service.ask(
        "GET", "/events", headers={"Accept": "application/jsonl"}, topic="b", event_id="2"
    )
    assert json.loads(lines.body) == sent[4] and lines.body.count(b"\n") == 1
    for topic, event_id in ("a", "4"), ("c", "1"), ("a", ""), ("a", " 1"):
        found = await service.read(topic=topic, event_id=event_id)
        assert (found["events"], found["count"]) == ([], 0)
    feed = {"Accept": "text/event-stream"}
    faults = (await service.ask("GET", "/events?topic=a&event_id=1", headers=feed)).detail(422)
    assert faults == [EXTRA | {"loc": ["query", "event_id"]}]


async def test_tail_is_the_newest_events_in_their_order(service: InProcess) -> None:
    assert await service.read(tail=5) == {"topic": None, "events": [], "count": 0, "last_seq": 0}
    sent = [event(event_id=str(n), topic="odd" if n % 2 else "even") for n in range(1, 1201)]
    await service.publish(sent)
    for tail in 1, 7, 500, 501, 1199, 1200, 1201, 10**30:
        assert await service.stored(tail=tail) == sent[-tail:]
    for tail in 1, 7, 600, 601:
        assert await service.stored(topic="odd", tail=tail) == sent[::2][-tail:]
    assert await service.stored(tail=5, limit=2) == sent[-5:-3]
    nothing = {"topic": "unknown", "events": [], "count": 0, "last_seq": 1200}
    assert await service.read(topic="unknown", tail=2) == nothing
    found = await service.read(tail=0)
    assert (found["events"], found["last_seq"]) == ([], 1200)


ACCEPTED = {
    None: "application/json",
    "": "application/json",
    "*/*": "application/json",
    "application/*": "application/json",
    "text/html": "application/json",
    "application/x-ndjson": "application/x-ndjson",
    "application/ndjson": "application/x-ndjson",
    "application/jsonl": "application/x-ndjson",
    "Application/X-NDJSON; q=1": "application/x-ndjson",
    "text/event-stream": "text/event-stream",
    "text/*": "text/event-stream",
    "application/json, text/event-stream": "application/json",
    "text/event-stream, application/json": "application/json",
    "text/event-stream, */*": "text/event-stream",
    "text/event-stream;q=0.9, application/json;q=0.8": "text/event-stream",
    "text/event-stream;q=0.8, application/json;q=0.9": "application/json",
    "application/json;q=0, */*": "application/x-ndjson",
    "application/json;q=0.5, application/x-ndjson;q=0.6": "application/x-ndjson",
    "text/*;q=0.3, text/event-stream;q=0.1, application/json;q=0.2": "application/json",
    "application/*;q=0.1, text/event-stream;q=0.2": "text/event-stream",
    "*/*;q=0.5, text/*;q=0.4": "application/json",
    "text/event-stream; charset=utf-8; q = 0.5, application/json;q=0.4": "text/event-stream",
    "application/json;q=0.7;x=1, text/event-stream;q=7": "text/event-stream",
    "application/json;q=1, text/event-stream;q=x": "application/json",
    "application/json;q=1, text/event-stream;q=1.5": "application/json",
}


async def test_accept_is_read_with_its_weights(service: InProcess) -> None:
    for accept, expected in ACCEPTED.items():
        headers = {} if accept is None else {"Accept": accept}
        answer = await service.ask("HEAD", "/events", headers=headers)
        assert answer.headers["content-type"].split(";")[0] == expected, accept


async def test_several_accept_headers_are_one(service: InProcess) -> None:
    get = reading("/events", accept="text/html\r\nAccept: application/x-ndjson")
    async with service.connection(get) as client:
        assert b"application/x-ndjson" in await client.reader.readuntil(b"\r\n\r\n")


HEADERS = {  # of what is read: path, Accept, Content-Type, Cache-Control, Vary
    ("/events", "*/*"): ("application/json; charset=utf-8", "no-store", "Accept"),
    ("/events", "application/jsonl"): ("application/x-ndjson", "no-store", "Accept"),
    ("/events", "text/event-stream"): (
        "text/event-stream; charset=utf-8",
        "no-store, no-transform",
        "Accept",
    ),
    ("/stats", "*/*"): ("application/json; charset=utf-8", "no-store", None),
    ("/topics", "*/*"): ("application/json; charset=utf-8", "no-store", None),
    ("/health", "text/html"): ("application/json; charset=utf-8", "no-store", ANY),
    ("/", "*/*"): ("application/json; charset=utf-8", "no-store", "Accept"),
    ("/", "text/html"): ("text/html; charset=utf-8", "no-store", "Accept"),
    ("/metrics", "*/*"): ("text/plain; version=0.0.4; charset=utf-8", "no-store", None),
}


async def test_head_has_the_headers_of_get_and_no_body(service: InProcess) -> None:
    await service.publish(event())
    for (path, accept), (content_type, cache_control, vary) in HEADERS.items():
        answers = []
        for method in "GET", "HEAD":
            if (method, accept) == ("GET", "text/event-stream"):
                async with service.feed() as feed:
                    answers.append(feed.headers)
                continue
            answer = await service.ask(method, path, headers={"Accept": accept})
            assert answer.status == 200
            assert bool(answer.body) == (method == "GET")
            answers.append(answer.headers)
        for found in answers:
            assert found["content-type"] == content_type
            assert found["cache-control"] == cache_control
            assert found.get("vary") == vary
        assert [found.get("content-length") for found in answers] in ([None, None], [ANY, ANY])
    assert (await service.ask("HEAD", "/events", limit=0)).status == 422


async def test_two_forms_of_a_page_at_once_are_two(reads: Reads, service: InProcess) -> None:
    sent = [*numbered(range(5), topic="a"), *numbered(range(5), topic="b")]
    await service.publish(sent)

    async def ask(accept: str, **query: Any) -> bytes:
        return (await service.ask("GET", "/events", headers={"Accept": accept}, **query)).body

    with reads.held("last_seq"):  # so that all of them come to their pages together
        asked = [
            asyncio.create_task(ask(accept, **query))
            for accept in ("application/json", "application/jsonl")
            for query in ({}, {"topic": "a"}, {"limit": 3}, {"after": 2}, {})
        ]
        await until(lambda: reads.waiting)
    answers = [await answer for answer in asked]
    expected = [sent, sent[:5], sent[:3], sent[2:], sent]
    assert [json.loads(body)["events"] for body in answers[:5]] == expected
    assert [[*map(json.loads, body.splitlines())] for body in answers[5:]] == expected


async def test_whoever_comes_later_reads_a_page_anew(reads: Reads, service: InProcess) -> None:
    await service.publish(event())
    for _ in range(3):
        assert await service.stored() == [event()]
    assert reads.count("page") == 3


async def test_a_page_is_bounded_by_the_bytes_of_whole_events(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    large = [event(event_id=str(n), payload={"text": "ü" * 5_000}) for n in range(10)]
    body = json_of({"events": [*large, *numbered(range(10, 1000))]})
    store.commit([validate(body.replace(b"\\u00fc", "ü".encode()), store.encode)])
    one_form = "application/json"
    size = len(store.page(one_form, None, 0, 1000, 1, 1).text)
    assert size > 10_000, "bytes and not characters"
    for most_bytes, count in (1, 1), (size, 1), (size + 1, 2), (2 * size, 2), (5 * size, 5):
        for topic in None, "order.created":
            page = store.page(one_form, topic, 0, 1000, 500, most_bytes)
            assert (page.count, page.last_seq) == (count, count)
            assert len(json.loads(b"[%b]" % page.text)) == count
    assert store.page(one_form, None, 0, 1000, 4, 10**9).count == 4
    assert store.page(one_form, None, 0, 1000, 10**9, 10**9).count == 500
    assert store.page(one_form, None, 5, 8, 10**9, 10**9).last_seq == 8
    page = store.page(one_form, None, 1000, 1000, 10, 10**9)
    assert (page.count, page.last_seq, page.text) == (0, 1000, b"")
    store.close()


async def test_pages_are_asked_for_by_bytes_and_events(reads: Reads, service: InProcess) -> None:
    await service.publish(numbered(range(1200), source="x" * 300))
    await service.stored(limit=1100)
    pages = [arguments for name, arguments in reads.calls if name == "page"]
    assert {most_bytes for *_, most_bytes in pages} == {64 * 1024}
    assert all(limit <= 500 for *_, limit, _ in pages)
    assert len(pages) > 4


async def test_what_an_older_version_stored_is_read_in_bounded_pages(
    reads: Reads, service: InProcess
) -> None:
    await service.publish(event())
    huge = "2025-10-24T10:30:00." + "1" * 300_000 + "Z"  # no bound was on it then
    with contextlib.closing(sqlite3.connect(service.db)) as old:
        for number in range(2, 22):
            old.execute(
                "INSERT INTO events SELECT ?, topic_id, ?, ?, source, payload FROM events"
                " WHERE seq = 1",
                [number, str(number), huge],
            )
        old.commit()
    assert len(await service.stored()) == 21
    assert reads.count("page") >= 20
    async with service.feed(after=1) as feed:
        assert [seq for seq, _ in await feed.take(20)] == [*range(2, 22)]


async def test_the_cost_of_reading_and_writing_does_not_grow(
    connections: Connections, tmp_path: Path
) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    form = "application/json"
    numbers = itertools.count()

    def publish(count: int) -> None:
        batch = [event(topic=f"t{n % 3}", event_id=str(next(numbers))) for n in range(count)]
        store.commit([validate(json_of(batch), store.encode)])

    tasks: dict[str, Callable[[], object]] = {
        "a commit": lambda: publish(3),
        "a page": lambda: store.page(form, None, 100, 10**9, 5, 10**9),
        "a page of a topic": lambda: store.page(form, "t1", 100, 10**9, 5, 10**9),
        "one event": lambda: store.find("t1", "100"),
        "the newest": lambda: store.position(None, 5),
        "the newest of a topic": lambda: store.position("t2", 5),
        "the totals": store.totals,
        "topics": lambda: store.topics("t0", 1),
        "the last number": store.last_seq,
        "a look for news": store.changed,
    }
    store.wake()  # so that a look for news waits for nothing
    publish(300)
    connections.count_steps()

    def steps() -> dict[str, int]:
        found = {}
        for name, task in tasks.items():
            connections.steps = 0
            task()
            found[name] = connections.steps
        return found

    few = steps()
    publish(6000)
    many = steps()
    assert min(few.values()) > 0
    assert {name for name in tasks if many[name] > 1.2 * few[name] + 20} == set(), (few, many)
    store.close()


async def test_a_page_of_a_topic_is_found_by_an_index(
    connections: Connections, tmp_path: Path
) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    store.commit([validate(json_of(numbered(range(10))), store.encode)])
    connections.note_statements()
    store.page("application/json", "order.created", 3, 10, 5, 10**6)
    (statement,) = connections.statements
    plan = connections.made[0].execute("EXPLAIN QUERY PLAN " + statement).fetchall()
    assert any("events_of_topic (topic_id=? AND rowid>?)" in row[3] for row in plan), plan
    assert not any(row[3].startswith("SCAN events") for row in plan), plan
    store.close()


# What the readers get if the database cannot be read.

UNREADABLE = aggregator.Unavailable("disk I/O error")
READ_PATHS = [
    *(("/events", accept) for accept in ("*/*", "application/jsonl", "text/event-stream")),
    *(("/events?tail=2", "*/*"), ("/events?topic=a&event_id=1", "*/*")),
    *(("/events?after=latest", "*/*"), ("/topics", "*/*"), ("/stats", "*/*")),
]


@pytest.mark.parametrize("error", [UNREADABLE, RuntimeError("in /secret"), MemoryError()])
async def test_a_failing_read_is_503_until_one_works(
    error: Exception, reads: Reads, service: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    await service.publish(event())
    reads.error = error
    reason = str(error) if error is UNREADABLE else type(error).__name__
    for path, accept in READ_PATHS:
        answer = await service.ask("GET", path, headers={"Accept": accept})
        assert answer.detail(503) == f"The database cannot be read: {reason}"
    assert (await service.ask("HEAD", "/events")).status == 503
    for path in "/health", "/":
        sick = await service.ask("GET", path)
        expected = {"status": "failing", "reason": f"Reads fail: {reason}"}
        assert (sick.status, sick.document) == (503, HEALTH | expected)
    metrics = samples((await service.ask("GET", "/metrics")).body.decode())
    assert metrics["aggregator_healthy"] == 0
    assert metrics['aggregator_requests_refused_total{status="503"}'] == len(READ_PATHS) + 1
    assert "aggregator_database_bytes" not in metrics
    assert (await service.publish(event())).counts == (1, 0, 1), "publishing goes on"
    assert errors_logged(caplog) == [f"Reads fail: {reason}"], "once, and not for each request"
    reads.error = None
    assert await service.health() == 200, "it tries for itself"
    assert await service.stored() == [event()]
    said = [record.getMessage() for record in caplog.records]
    assert said.count("Reads work again") == 1
    assert await service.metric("aggregator_healthy") == 1


@pytest.mark.parametrize("method", ["page", "position", "find", "topics", "totals"])
async def test_each_kind_of_read_may_fail_alone(
    method: str, reads: Reads, service: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    await service.publish(event())
    reads.error = UNREADABLE
    reads.failing = [method]
    path = {
        "page": "/events",
        "position": "/events?tail=1",
        "find": "/events?topic=a&event_id=1",
        "topics": "/topics",
        "totals": "/stats",
    }[method]
    (await service.ask("GET", path)).detail(503)
    assert errors_logged(caplog) == ["Reads fail: disk I/O error"]


@pytest.mark.parametrize(
    ("path", "accept", "failing"),
    [
        *(("/events", accept, "page") for accept in ("*/*", "application/jsonl")),
        *(("/events", "text/event-stream", "page"), ("/topics", "*/*", "topics")),
        ("/stats", "*/*", "topics"),
    ],
)
async def test_an_answer_that_fails_in_the_middle_is_reset(
    path: str,
    accept: str,
    failing: str,
    reads: Reads,
    service: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await service.publish([event(topic=f"t{n:04}", event_id=str(n)) for n in range(1200)])
    for version in "1.0", "1.1":
        reads.error = UNREADABLE
        reads.failing = [failing]
        reads.good_calls = 2
        asked = reading(path, version=version, accept=accept)
        async with service.connection(asked) as client:
            start = await client.reader.readuntil(b"t0001")
            assert b" 200 " in start
            with pytest.raises(ConnectionResetError):
                await client.rest()
        reads.error = None
        assert len(await service.stored()) == 1200
    assert set(errors_logged(caplog)) == {"Reads fail: disk I/O error"}


async def test_a_listing_is_reset_if_the_process_is_killed(
    process: StartProcess,
) -> None:
    service = await process()
    for number in range(8):
        await service.publish(event(event_id=str(number), payload={"text": "x" * 1_000_000}))
    lines = reading("/events", version="1.0", accept="application/jsonl")
    async with service.connection(lines) as client, service.connection(lines) as other:
        await client.reader.readuntil(b"event_id")
        await other.reader.readuntil(b"event_id")
        await service.kill()
        for each in client, other:
            with pytest.raises(ConnectionResetError):
                await each.rest()


async def test_a_parameter_of_any_size_is_no_server_error(service: InProcess) -> None:
    for value in "9" * 30, "9223372036854775807", "9223372036854775808":
        (fault,) = (await service.ask("GET", "/events", after=value)).detail(422)
        assert (fault["type"], fault["ctx"]) == ("less_than_equal", {"le": 0})
        assert (await service.ask("GET", "/events", limit=value)).status == 200


async def test_after_latest_means_what_comes_from_now_on(service: InProcess) -> None:
    await service.publish(numbered(range(3)))
    last_seq = (await service.read())["last_seq"]
    found = await service.read(after="latest")
    assert found == {"topic": None, "events": [], "count": 0, "last_seq": last_seq}
    lines = await service.ask(
        "GET", "/events", headers={"Accept": "application/x-ndjson"}, after="latest"
    )
    assert (lines.status, lines.body) == (200, b"")
    await service.publish(numbered([7]))
    assert await service.stored(after=found["last_seq"]) == numbered([7])


async def test_ndjson_is_the_same_events_a_line_each(service: InProcess) -> None:
    sent = [event(event_id=str(n), payload={"text": "a\nb\u2028\r"}) for n in range(700)]
    await service.publish([*sent, event(topic="other")])
    accept = {"Accept": "application/x-ndjson"}
    answer = await service.ask("GET", "/events", headers=accept, topic="order.created")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.body.endswith(b"\n")
    lines = answer.body.removesuffix(b"\n").split(b"\n")
    assert [json.loads(line) for line in lines] == sent
    answer = await service.ask("GET", "/events", headers=accept, after=600, limit=2)
    assert [json.loads(line) for line in answer.body.splitlines()] == sent[600:602]


# --- The live feed -----------------------------------------------------------------------------


async def test_a_feed_replays_what_is_stored_and_goes_on(
    service: InProcess,
) -> None:
    sent = numbered(range(5))
    await service.publish(sent[:3])
    async with service.feed() as feed:
        assert feed.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert feed.headers["cache-control"] == "no-store, no-transform"
        assert feed.headers["x-accel-buffering"] == "no"
        assert [each for _, each in await feed.take(3)] == sent[:3]
        await service.publish(sent[:4])  # three of them again: nothing to tell
        assert [each for _, each in await feed.take(1)] == sent[3:4]
        await service.publish(sent[4])
        (last,) = await feed.take(1)
        assert last == ((await service.read())["last_seq"], sent[4])


async def test_a_feed_starts_after_the_number_that_it_is_given(service: InProcess) -> None:
    await service.publish(numbered(range(1, 11)))
    for query, last_event_id, first in [
        ({}, "", 1),
        ({"after": 4}, "", 5),
        ({"after": 2}, "7", 8),  # as EventSource reconnects
        ({"tail": 3}, "", 8),
        ({"tail": 3}, "5", 6),
        ({"after": "latest"}, "9", 10),
        ({"after": 2}, " ", 3),  # an empty one means none
        ({"lastEventId": "6"}, "", 7),
        ({"lastEventId": "6", "after": 1}, "", 7),
        ({"lastEventId": "6"}, "8", 9),
        ({"lastEventId": ""}, "", 1),
        ({"lastEventId": "0", "tail": 1}, "", 1),
    ]:
        async with service.feed(last_event_id=last_event_id, **query) as feed:
            expected = (first, event(event_id=str(first)))
            assert await feed.take(1) == [expected], (query, last_event_id)


@pytest.mark.parametrize("query", [{"after": "latest"}, {"tail": 0}])
async def test_a_feed_from_now_on_is_told_its_position_first(
    query: dict[str, Any], service: InProcess
) -> None:
    await service.publish(numbered(range(1, 4)))
    async with service.feed(**query) as feed:
        message = await feed.message()
        assert message.pop("retry") == "1000"
        assert message == {"event": "position", "id": "3", "data": '{"last_seq": 3}'}
    await service.publish(numbered(range(4, 6)))  # while it is away
    async with service.feed(**query, last_event_id=message["id"]) as feed:
        first = await feed.message()
        assert "event" not in first, "it resumes"
        assert first["id"] == "4"
        assert await feed.take(1) == [(5, event(event_id="5"))]


async def test_a_tail_on_a_feed_goes_on_with_what_comes(service: InProcess) -> None:
    async with service.feed(tail=2) as empty, service.feed(topic="b", tail=1) as of_topic:
        assert (await empty.message())["event"] == "position"
        await service.publish([*numbered(range(1, 4), topic="b"), event(topic="a", event_id="4")])
        assert [seq for seq, _ in await empty.take(4)] == [1, 2, 3, 4]
        assert [seq for seq, _ in await of_topic.take(3)] == [1, 2, 3]
    async with service.feed(tail=2) as feed, service.feed(topic="b", tail=2) as of_topic:
        await service.publish(event(topic="b", event_id="5"))
        first = await feed.message()
        assert "event" not in first and first["id"] == "3", "no position, as there are events"
        assert [seq for seq, _ in await feed.take(2)] == [4, 5]
        assert [seq for seq, _ in await of_topic.take(3)] == [2, 3, 5]


async def test_a_feed_with_a_limit_ends_after_so_many_events(service: InProcess) -> None:
    await service.publish(numbered(range(1, 701)))
    for limit in 1, 500, 501:
        async with service.feed(limit=limit) as feed:
            assert len(await feed.take(10**6)) == limit
    async with service.feed(limit=3, after=698) as feed:
        assert [seq for seq, _ in await feed.take(2)] == [699, 700]
        await service.publish(numbered(range(701, 711)))
        assert [seq for seq, _ in await feed.take(10)] == [701]
    await until(lambda: subscribers(service, 0))


async def test_a_place_that_cannot_be_resumed_is_422(service: InProcess) -> None:
    await service.publish(numbered(range(4)))
    feed = {"Accept": "text/event-stream"}
    for value, kind, bound in [
        ("x", "int_parsing", {}),
        ("-1", "greater_than_equal", {"ctx": {"ge": 0}}),
        ("5", "less_than_equal", {"ctx": {"le": 4}}),
    ]:
        expected = {"type": kind, "msg": ANY} | bound
        headers = feed | {"Last-Event-ID": value}
        in_header = await service.ask("GET", "/events", headers=headers)
        assert in_header.detail(422) == [expected | {"loc": ["header", "Last-Event-ID"]}]
        in_query = await service.ask("GET", "/events", headers=feed, lastEventId=value)
        assert in_query.detail(422) == [expected | {"loc": ["query", "lastEventId"]}]


async def test_a_feed_of_one_topic_has_only_its_own_events(service: InProcess) -> None:
    await service.publish([*numbered(range(3), topic="a"), *numbered(range(3), topic="b")])
    async with service.feed(topic="b") as feed, service.feed(topic="new") as other:
        assert [each for _, each in await feed.take(3)] == numbered(range(3), topic="b")
        for topic in "a", "b", "new", "b":
            await service.publish(event(topic=topic, event_id=f"{time.monotonic_ns()}"))
        assert [each["topic"] for _, each in await feed.take(2)] == ["b", "b"]
        assert [each["topic"] for _, each in await other.take(1)] == ["new"]


async def test_a_batch_wakes_the_feeds_of_all_its_new_topics(service: InProcess) -> None:
    await service.publish(event(topic="old"))
    last = (await service.read())["last_seq"]
    async with contextlib.AsyncExitStack() as stack:
        feeds = {
            topic: await stack.enter_async_context(service.feed(topic=topic, after=last))
            for topic in ("old", "a", "b", "c")
        }
        commits = service.app[aggregator.COMMITS_KEY]
        waiting = commits.next_event("old")
        await service.publish([event(topic=topic) for topic in ("old", "a", "b", "b", "c")])
        for topic in "a", "b", "c":
            assert [each for _, each in await feeds[topic].take(1)] == [event(topic=topic)]
        assert not waiting.done(), "it has nothing new"


async def test_no_event_slips_past_a_feed_at_whatever_moment(service: InProcess) -> None:
    async with service.feed() as feed:
        for number, each in enumerate(numbered(range(90))):
            await service.publish(each)
            assert [found for _, found in await feed.take(1)] == [each]
            for _ in range(number % 30):  # another moment in the life of the feed
                await asyncio.sleep(0)


async def test_twenty_feeds_at_one_place_read_once(
    pace: Pace, reads: Reads, service: InProcess
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        feeds = [await stack.enter_async_context(service.feed()) for _ in range(20)]
        quiet = [await stack.enter_async_context(service.feed(topic="quiet")) for _ in range(3)]
        await until(lambda: subscribers(service, 23))
        assert reads.count("page") == 23, "they came one by one"
        for number in range(1, 4):
            with pace.held():
                await service.publish(event(event_id=str(number)))
                for feed in feeds:
                    assert await feed.take(1) == [(number, event(event_id=str(number)))]
                await until(lambda: pace.waiting == 20)
                assert reads.count("page") == 22 + 2 * number, "for all of them"
            while pace.waiting or reads.count("page") < 23 + 2 * number:  # and they rest again
                await asyncio.sleep(0)
        assert pace.active == [20] * 60, "idle feeds slow nobody down"
        assert len(quiet) == 3


async def test_feeds_give_way_to_publishing(pace: Pace, service: InProcess) -> None:
    assert 0.001 <= pace <= 0.01
    await service.publish(numbered(range(1200)))
    async with service.feed() as feed:
        with pace.held():
            await until(lambda: pace.waiting)
            assert (await service.publish(event(event_id="new"))).counts == (1, 1, 0)
        assert len(await feed.take(1201)) == 1201
        await until(lambda: len(pace.active) >= 3)
    assert set(pace.active) == {1}, "it pauses after each page"


async def test_what_feeds_wait_for_is_gone_with_the_last_one(service: InProcess) -> None:
    commits = service.app[aggregator.COMMITS_KEY]
    one = commits.next_event("a")
    assert commits.next_event("a") is one
    assert commits.next_event("b") is not one and commits.next_event(None) is not one
    gone = weakref.ref(one)
    del one
    assert gone() is None
    async with service.feed(topic="x") as feed:
        await until(lambda: subscribers(service, 1))
        await service.publish(event(topic="x"))
        await feed.take(1)
    before = commits.next_event("x")
    await service.publish([event(topic="y"), event(topic="x")])  # the second is a duplicate
    assert not before.done()
    await service.publish(event(topic="x", event_id="2"))
    await until(before.done)


async def test_commits_of_another_service_wake_a_feed(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    assert aggregator.WATCH_SECONDS <= 1
    monkeypatch.setattr(aggregator, "WATCH_SECONDS", 0.02)
    other = await serve()
    service = await serve(other.db)
    async with service.feed() as feed, service.feed(topic="b") as of_topic:
        await until(lambda: subscribers(service, 2))
        await other.publish(event(topic="a"))
        assert await feed.take(1) == [(1, event(topic="a"))]
        await other.publish(event(topic="b"))
        assert await of_topic.take(1) == await feed.take(1) == [(2, event(topic="b"))]
        await service.publish(event(topic="b", event_id="ours"))
        await of_topic.take(1)
        await other.publish(event(topic="b", event_id="theirs"))
        assert await of_topic.take(1) == [(4, event(topic="b", event_id="theirs"))]


async def test_news_of_some_topics_wakes_their_feeds_alone(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    news: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def changed(store: SqliteStore) -> list[str]:  # as PostgresStore answers
        with contextlib.suppress(queue.Empty):
            return news.get(timeout=0.05)
        return []

    monkeypatch.setattr(SqliteStore, "changed", changed)
    service = await serve()
    commits = service.app[aggregator.COMMITS_KEY]
    waiting = {topic: commits.next_event(topic) for topic in ("a", "b", None)}
    news.put(["b", "nobody waits for this"])
    await until(waiting["b"].done)
    await until(waiting[None].done)
    assert not waiting["a"].done()


async def test_a_feed_wakes_though_its_own_commit_came_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aggregator, "WATCH_SECONDS", 0.0)
    db = str(tmp_path / "events.db")
    one = SqliteStore(db)
    other = SqliteStore(db)

    def commit(store: SqliteStore, *events: dict[str, Any]) -> None:
        store.commit([validate(json_of(events), store.encode)])

    assert one.changed() == ()
    commit(one, event(event_id="1"))
    assert one.changed() == ()
    assert other.changed() is None
    assert other.changed() == ()
    commit(other, event(event_id="2"))
    commit(one, event(event_id="3"))  # so the highest number is its own
    assert one.changed() is None
    assert one.changed() == ()
    commit(one, event(event_id="3"), event(event_id="4"), event(event_id="4"))
    assert one.changed() == ()
    commit(one, event(event_id="4"))
    assert one.changed() == ()
    commit(one, event(event_id="4"), event(event_id="4.1"), event(event_id="4.2"))
    assert one.changed() == ()
    commit(other, event(event_id="5"))
    commit(one, event(event_id="5"))  # a duplicate of what it has not seen yet
    assert one.changed() is None
    assert one.changed() == ()
    one.close()
    other.close()


async def test_a_page_from_before_an_event_is_not_shared(
    pace: Pace, reads: Reads, service: InProcess
) -> None:
    async with service.feed() as feed:
        with pace.held():
            await service.publish(event(event_id="1"))
            await feed.take(1)
            await until(lambda: pace.waiting)  # before it reads on
            with reads.held("page"):
                late = asyncio.create_task(first_event(service, after=1))
                await until(lambda: reads.waiting)  # with a page without the second event
                await service.publish(event(event_id="2"))
                pace.release()
                for _ in range(10):  # the first feed reads on now, and waits for what comes next
                    await asyncio.sleep(0)
        assert await feed.take(1) == [(2, event(event_id="2"))]
        assert await late == event(event_id="2")


async def first_event(service: Service, **query: Any) -> dict[str, Any]:
    """The first event on a feed of its own."""
    async with service.feed(**query) as feed:
        ((_, found),) = await feed.take(1)
        return found


def test_a_feed_is_silent_for_15_seconds_at_most() -> None:
    assert HEARTBEAT_SECONDS == 15


async def test_silence_on_a_feed_is_broken_by_comments(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(aggregator, "HEARTBEAT_SECONDS", 0.02)
    service = await serve()
    async with service.feed() as feed:
        assert await feed.line() == "retry: 1000\n"
        for _ in range(3):
            assert (await feed.line()).startswith(":"), "and no blank line after it"
        await service.publish(event())
        assert [each for _, each in await feed.take(1)] == [event()]
        assert await subscribers(service, 1)
        assert await feed.line() == ": nothing new\n"
    await until(lambda: subscribers(service, 0))


async def test_a_busy_feed_has_no_comments(
    monkeypatch: pytest.MonkeyPatch, service: InProcess
) -> None:
    await service.publish(numbered(range(1500)))
    async with service.feed() as feed:
        lines = [await feed.line() for _ in range(3 * 1500 + 1)]
    assert lines.pop(0) == "retry: 1000\n"
    assert {line[:3] for line in lines} == {"id:", "dat", "\n"}


async def test_an_event_is_one_line_of_data(service: InProcess) -> None:
    awkward = event(payload={"a\nb": "c\r\nd\n\ndata: e\u2028\u0085"})
    await service.publish(awkward)
    async with service.feed() as feed:
        assert [each for _, each in await feed.take(1)] == [awkward]


async def test_subscribers_see_every_event_once_in_order(
    service: InProcess,
) -> None:
    async def subscriber(impatience: int) -> list[tuple[int, dict[str, Any]]]:
        found: list[tuple[int, dict[str, Any]]] = []
        while len(found) < 100:
            last = str(found[-1][0]) if found else ""
            async with service.feed(last_event_id=last) as feed:
                found += await feed.take(min(impatience, 100 - len(found)))
        return found

    async def publisher(start: int) -> None:
        for number in range(start, 100, 6):
            await service.publish([event(event_id=str(number)), event(event_id="0")])

    subscribers = [asyncio.create_task(subscriber(10 + 10 * n)) for n in range(10)]
    await asyncio.gather(*map(publisher, range(6)))
    truth = rows(service.db)
    for found in await asyncio.gather(*subscribers):
        numbers = [number for number, _ in found]
        assert numbers == sorted(set(numbers))
        assert [each for _, each in found] == truth


async def test_a_feed_ends_at_the_stop_and_is_resumed(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(aggregator, "SHUTDOWN_SECONDS", 2 * PATIENCE_SECONDS)  # it must not wait
    service = await serve()
    await service.publish(numbered(range(3)))
    async with service.feed() as feed:
        found = await feed.take(3)
        await until(lambda: subscribers(service, 1))
        stopping = asyncio.create_task(service.stop())
        assert await feed.take(1) == [], "the feed ends"
        await stopping
    service = await serve()
    await service.publish(numbered(range(2, 6)))
    async with service.feed(last_event_id=str(found[-1][0])) as feed:
        found += await feed.take(6 - len(found))
    assert [each for _, each in found] == numbered(range(6))


# --- Stats and topics --------------------------------------------------------------------------


async def test_stats_count_what_was_acknowledged(
    service: InProcess,
) -> None:
    empty = (await service.ask("GET", "/stats")).document
    assert empty.pop("uptime_seconds") >= 0
    assert empty == dict.fromkeys(COUNTERS, 0) | {"topics": []}
    for topic in "b", "a", "Z", "ü", "b", "10", "9", "🎉":
        await service.publish(event(topic=topic))
    (await service.publish([event(topic="never seen"), {}])).detail(422)
    stats = (await service.ask("GET", "/stats")).document
    assert list(stats) == [*COUNTERS, "topics", "uptime_seconds"]
    assert tuple(stats[name] for name in COUNTERS) == (8, 7, 1)
    assert stats["topics"] == sorted({"b", "a", "Z", "ü", "10", "9", "🎉"})
    await all_adds_up(service)


async def test_topics_are_listed_by_name_in_pages(service: InProcess) -> None:
    assert (await service.ask("GET", "/topics")).document == {"topics": [], "count": 0}
    names = sorted(['"', "a", "ab", "b", "Z", "ü", "10", "9", "🎉", "\uffff"])
    for number, name in enumerate(names):
        await service.publish(numbered([*range(number + 1), 0], topic=name))
    expected = {name: (number + 2, number + 1, 1) for number, name in enumerate(names)}
    found = (await service.ask("GET", "/topics")).document
    assert list(found) == ["topics", "count"] and found["count"] == 10
    assert list(found["topics"][0]) == ["topic", *COUNTERS]
    assert await service.topics() == expected
    assert list(await service.topics()) == names
    for limit in 1, 3, 10, 11:
        after = ""
        listed: list[str] = []
        while page := list(await service.topics(after=after, limit=limit)):
            assert len(page) == min(limit, 10 - len(listed))
            listed += page
            after = page[-1]
        assert listed == names
    assert await service.topics(after="aa", limit=1) == {"ab": expected["ab"]}
    assert await service.topics(after="\U0010ffff") == {}


async def test_topics_are_read_in_bounded_pages(reads: Reads, service: InProcess) -> None:
    names = [f"{'🎉' * 500}{number:03}" for number in range(100)]
    await service.publish([event(topic=name) for name in names])
    reads.calls.clear()
    stats = (await service.ask("GET", "/stats")).document
    assert stats["topics"] == names == list(await service.topics())
    limits = [arguments[1] for name, arguments in reads.calls if name == "topics"]
    assert max(limits) * 512 * 4 < 80_000, "bytes in a page"
    assert len(limits) > 6
    reads.calls.clear()
    await service.ask("GET", "/metrics")
    assert {name for name, _ in reads.calls} == {"totals", "size"}, "it never reads names"


async def test_uptime_is_in_seconds_and_does_not_follow_the_clock(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    started = time.monotonic()
    service = await serve()
    is_up = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    await asyncio.sleep(0.05)
    least = time.monotonic() - is_up
    uptime = (await service.ask("GET", "/stats")).document["uptime_seconds"]
    assert least - 0.01 <= uptime <= time.monotonic() - started + 0.01


async def test_counters_and_duplicates_are_remembered_after_a_restart(serve: Serve) -> None:
    service = await serve()
    await service.publish(numbered([1, 2, 2, 3]))
    last_seq = (await service.read())["last_seq"]
    await service.stop()
    assert not list(service.db.parent.glob("*-wal"))
    service = await serve()
    assert await service.stats() == (4, 3, 1)
    assert (await service.publish(numbered([3, 4]))).counts == (2, 1, 1)
    assert await service.stats() == (6, 4, 2)
    assert (await service.read())["last_seq"] > last_seq
    await all_adds_up(service)


# --- Health ------------------------------------------------------------------------------------


HEALTH = {"service": "Event Aggregator", "status": "running", "version": "1.0.0"}


@pytest.mark.parametrize("path", ["/", "/health"])
async def test_health_says_what_it_is_and_that_it_runs(path: str, service: InProcess) -> None:
    answer = await service.ask("GET", path)
    assert (answer.status, answer.document) == (200, HEALTH)
    head = await service.ask("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    options = await service.ask("OPTIONS", path)
    assert (options.status, options.headers["allow"]) == (200, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (aggregator.Unavailable("disk I/O error"), "disk I/O error"),
        (aggregator.Unavailable("database or disk is full"), "database or disk is full"),
        (OSError(28, "No space left on device", "/secret/path"), "OSError"),
        (RuntimeError("in /secret/path"), "RuntimeError"),
        (MemoryError(), "MemoryError"),
    ],
)
async def test_what_makes_commits_fail_is_503_until_one_works(
    error: Exception,
    reason: str,
    disk: Disk,
    service: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk.error = error
    async with commit_held(disk, service) as waiting:  # behind it a group of several
        waiting += [asyncio.create_task(service.publish(numbered([n]))) for n in range(1, 5)]
        await until(lambda: queued(service, 4))
    answers = [*await asyncio.gather(*waiting), await service.publish(event())]
    for answer in answers:
        assert answer.detail(503) == f"The database cannot be written: {reason}"
    assert disk.groups == [1, 4, 1], "a group is not taken apart for what is not in it"
    for path, accept in ("/", "*/*"), ("/health", "text/html"):
        sick = await service.ask("GET", path, headers={"Accept": accept})
        expected = HEALTH | {"status": "failing", "reason": f"Commits fail: {reason}"}
        assert (sick.status, sick.document) == (503, expected)
    page = await service.ask("GET", "/", headers={"Accept": "text/html"})
    assert (page.status, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
    for method in "HEAD", "OPTIONS":
        assert (await service.ask(method, "/")).status == 503
    assert await service.metric("aggregator_healthy") == 0
    assert rows(service.db) == [] and await service.stats() == (0, 0, 0)
    assert errors_logged(caplog) == [f"Commits fail: {reason}"], "once, and not for each request"

    disk.error = None
    assert (await service.publish([event(), event()])).counts == (2, 1, 1)
    assert (await service.ask("GET", "/")).document == HEALTH
    assert await service.metric("aggregator_healthy") == 1
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.count("Commits work again") == 1
    assert await all_adds_up(service) == [event()]


async def test_another_reason_is_logged_too(
    disk: Disk, service: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in "disk I/O error", "disk I/O error", "database or disk is full":
        disk.error = aggregator.Unavailable(reason)
        (await service.publish(event())).detail(503)
    assert errors_logged(caplog) == [
        "Commits fail: disk I/O error",
        "Commits fail: database or disk is full",
    ]


async def test_the_last_word_of_the_log_is_true(
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk,
    service: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def last_word() -> str:
        return [each.getMessage() for each in caplog.records if "Commits" in each.getMessage()][-1]

    failing = "Commits fail: disk I/O error"
    for error in aggregator.Unavailable("disk I/O error"), None:
        disk.error = error
        await service.publish(event())
    disk.error = aggregator.Unavailable("disk I/O error")
    await service.publish(event())
    assert last_word() == "Commits work again", "the other line was written a moment ago"
    monkeypatch.setattr(aggregator, "COMPLAINT_SECONDS", 0.0)
    await service.publish(event())
    assert last_word() == failing
    disk.error = None
    for _ in range(3):
        await service.publish(event())
    assert last_word() == "Commits work again"
    said = [record.getMessage() for record in caplog.records]
    assert said.count("Commits work again") == 2
    assert errors_logged(caplog) == [failing, failing]


async def test_health_mends_itself_though_nobody_publishes(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aggregator, "WATCH_SECONDS", 0.01)
    service = await serve()
    await until(lambda: service.stats())
    assert disk.probes == 0, "nothing fails"
    disk.error = aggregator.Unavailable("disk I/O error")
    (await service.publish(event())).detail(503)
    await until(lambda: disk.probes >= 3)
    assert await service.health() == 503
    assert errors_logged(caplog) == ["Commits fail: disk I/O error"]
    disk.error = None

    async def is_well() -> bool:
        return await service.health() == 200

    await until(is_well)
    assert disk.groups == [1]
    assert await service.metric("aggregator_group_commit_seconds_count") == 0, "no probe counts"
    assert await service.stats() == (0, 0, 0)
    assert await service.metric("aggregator_requests_queued") == 0
    probes = disk.probes
    assert (await service.publish(event())).counts == (1, 1, 0)
    assert disk.probes == probes


def test_a_probe_fails_where_a_commit_would(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    before = (tmp_path / "events.db-wal").stat().st_size
    assert store.commit([]).is_new == b""
    assert (tmp_path / "events.db-wal").stat().st_size > before, "it is written to the disk"
    shutil.move(tmp_path / "events.db-wal", tmp_path / "elsewhere")
    with pytest.raises(aggregator.Unavailable):
        store.commit([])
    store.close()


async def test_a_database_locked_by_another_program_is_503(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aggregator, "BUSY_SECONDS", 0.02)
    service = await serve()
    with locked(service.db):
        for answer in await asyncio.gather(*(service.publish(event()) for _ in range(8))):
            assert answer.detail(503)
        assert await service.health() == 503
        assert await service.stored() == [], "reading goes on"
    assert len([record for record in caplog.records if is_error(record)]) == 1
    caplog.clear()
    assert (await service.publish(event())).counts == (1, 1, 0)
    assert await service.health() == 200


async def test_a_group_fails_only_for_the_request_that_is_unstorable(
    disk: Disk, service: InProcess
) -> None:
    disk.poison = "poison"
    batches = [numbered([1]), [event(event_id="poison")], [event(event_id="2"), event()]]
    async with commit_held(disk, service) as waiting:
        await queue_up(service, waiting, batches)
    _, good, bad, also_good = await asyncio.gather(*waiting)
    assert (good.counts, also_good.counts) == ((1, 1, 0), (2, 1, 1))
    assert bad.detail(422) == [NO_JSON | {"loc": ["body"], "ctx": {"error": "it is poisoned"}}]
    assert disk.groups == [1, 4, 1, 3, 1, 2], "in halves, until only the culprit fails"
    assert [each["event_id"] for each in await all_adds_up(service)] == ["held", "1", "2"]
    assert await service.health() == 200
    assert await service.metric("aggregator_group_commit_events_sum") == 4


def test_what_sqlite_refuses_for_its_content_is_known(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    good = validate(json_of(event()), store.encode)
    for text in b"[1", b'["t","1","x","s",' + b"[" * 5000 + b"]" * 5000 + b"]":
        with pytest.raises(aggregator.Unstorable):
            store.commit([good, good._replace(text=text)])
    assert store.commit([good]).is_new == b"\1", "nothing of the group was stored"
    store.close()


MISHAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the database is removed": (Path.unlink, "database"),
    "the database is moved": (lambda db: db.rename(db.with_name("moved.db")), "database"),
    "the database is replaced": (
        lambda db: (shutil.copy(db, db.with_name("copy")), db.with_name("copy").replace(db)),
        "database",
    ),
    "the log is removed": (lambda db: db.with_name(db.name + "-wal").unlink(), "write-ahead log"),
    "the folder is moved": (lambda db: db.parent.rename(db.parent.with_name("moved")), "database"),
    "the folder is removed": (lambda db: shutil.rmtree(db.parent), "database"),
}


@posix
@pytest.mark.parametrize("case", MISHAPS)
async def test_nothing_is_acknowledged_into_a_file_that_is_gone(
    case: str, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    happens, what = MISHAPS[case]
    db = tmp_path / "data" / "events.db"
    service = await serve(db)
    assert (await service.publish(event())).counts == (1, 1, 0)
    happens(db)
    reason = f"the {what} was removed, moved or replaced; start the service again"
    for _ in range(3):
        answer = await service.publish(event(event_id="2"))
        assert answer.detail(503) == f"The database cannot be written: {reason}"
    sick = await service.ask("GET", "/health")
    assert sick.status == 503 and f"Commits fail: {reason}" in sick.document["reason"]
    if case.endswith(" moved"):  # and back: who knows what happened meanwhile
        if "folder" in case:
            db.parent.with_name("moved").rename(db.parent)
        else:
            db.with_name("moved.db").rename(db)
        (await service.publish(event(event_id="2"))).detail(503)
    await service.stop()
    assert {message.partition(":")[0] for message in errors_logged(caplog)} <= {
        "Commits fail",
        "Checks of the database fail",
    }
    service = await serve(db)
    assert (await service.publish(event(event_id="2"))).status == 202
    assert await service.health() == 200
    await all_adds_up(service)


@posix
async def test_a_file_that_is_gone_is_noticed_though_nobody_publishes(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aggregator, "WATCH_SECONDS", 0.01)
    service = await serve()
    service.db.unlink()

    async def is_sick() -> bool:
        return await service.health() == 503

    await until(is_sick)
    await service.stop()
    assert all("start the service again" in message for message in errors_logged(caplog))


@pytest.mark.parametrize("worker", ["commit", "changed"])
async def test_a_worker_that_ends_stops_the_process_clearly(
    worker: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Ended(BaseException):
        """No Exception, so it ends the worker."""

    def end(*arguments: Any) -> Any:
        raise Ended

    monkeypatch.setattr(SqliteStore, worker, end)
    monkeypatch.setattr(aggregator, "SHUTDOWN_SECONDS", 0.01)
    service = Service(tmp_path / "events.db")
    service.port = free_port()
    settings = Settings(port=service.port, db=str(service.db))
    with handlers_restored():
        serving = asyncio.create_task(aggregator.serve(settings))
        if worker == "commit":

            async def is_open() -> bool:
                return not await is_closed(service)

            await until(is_open)
            with pytest.raises(aiohttp.ClientError):
                await service.publish(event())
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await serving == 1
    await service.session.close()
    said = errors_logged(caplog)
    assert said[0] == "Commits fail: a worker of this process has ended"
    assert said[-1] == "Stopped, because a worker of this process has ended. Start it again"


async def test_an_exception_in_looking_for_news_ends_no_worker(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aggregator, "WATCH_SECONDS", 0.01)
    really_changed = SqliteStore.changed
    errors: list[Exception] = [aggregator.Unavailable("disk I/O error"), RuntimeError("secret")]

    def changed(store: SqliteStore) -> Any:
        if errors:
            raise errors.pop(0)
        return really_changed(store)

    monkeypatch.setattr(SqliteStore, "changed", changed)
    service = await serve()

    async def is_well() -> bool:
        return not errors and await service.health() == 200

    await until(is_well)
    assert errors_logged(caplog) == [
        "Checks of the database fail: disk I/O error",
        "Checks of the database fail: RuntimeError",
    ]
    assert (await service.publish(event())).counts == (1, 1, 0)


def test_a_start_without_threads_fails_and_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(aggregator.StoreError, match="can't start new thread"):
        SqliteStore(str(tmp_path / "events.db"))
    assert [path.name for path in tmp_path.iterdir()] == ["events.db"], "it is closed"
    assert threading.active_count() == 1


@pytest.mark.skipif(not (HERE / "dashboard.html").exists(), reason="no dashboard.html")
async def test_a_browser_gets_a_page_that_fetches_nothing_elsewhere(
    service: InProcess,
) -> None:
    accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    answer = await service.ask("GET", "/", headers={"Accept": accept})
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.body.decode()
    assert "</html>" in page.lower()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    policy = answer.headers.get("content-security-policy", page)  # or in a meta element
    assert "Content-Security-Policy" in policy or policy is not page
    assert "default-src 'none'" in policy
    for accept in "*/*", "application/json":
        answer = await service.ask("GET", "/", headers={"Accept": accept})
        assert answer.document["status"] == "running"


@pytest.mark.parametrize("worker", ["writer", "reader"])
async def test_it_does_not_listen_without_all_its_threads(
    worker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    really_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith(worker):
            raise RuntimeError("can't start new thread")
        really_start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = threading.active_count()
    service = InProcess(tmp_path / "events.db")
    with pytest.raises((RuntimeError, aggregator.StoreError), match="can't start new thread"):
        await service.start()
    await service.session.close()
    await service.stop()
    assert service.port == 0, "it has not listened"
    assert [path.name for path in tmp_path.iterdir()] == ["events.db"], "the file is closed"
    assert threading.active_count() == before


# --- The page ----------------------------------------------------------------------------------
# It is run in a real browser, headless, over the DevTools protocol: JSON messages on a WebSocket.
# Every test with a browser also checks what the page asked for and that its console is empty.

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CHROMIUM_FLAGS = [
    "--headless",
    "--remote-debugging-port=0",  # any free one
    "--no-sandbox",  # which does not work for root, and in most containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",  # and all else that would go to the Internet
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium and no google-chrome")
# Runs before the page's own script: its timers are ten times as fast, and what moves is noted.
BEFORE_THE_PAGE = """
    var slowly = setTimeout;
    window.setTimeout = (callback, milliseconds) => slowly(callback, milliseconds / 10);
    var moves = [];
    new PerformanceObserver((list) => moves.push(...list.getEntries())).observe(
        { type: "layout-shift", buffered: true });
"""
SHOWS = "document.getElementById('%s').innerText.includes(%s)"
RED = "rgb(179, 32, 42)"
HOSTILE = (
    '<img src="/x" onerror="hacked=1"><script>hacked=1</script>'
    "</li></ol></pre><b>&lt;&amp;'\"`${hacked=1}"
    "\u202e\u2067\u05d0 \u200f%s\\"
)


class Tab:
    """The browser's tab. Each service has a port of its own, and so its page has a storage."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.paused: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # answers that are held up
        self.requests: list[str] = []  # addresses that the page asked for
        self.complaints: list[dict[str, Any]] = []  # what the console would show

    async def listen(self) -> None:
        """Takes in all that the browser says, until it is cancelled."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
                continue
            method = said["method"]
            if method == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            elif method == "Fetch.requestPaused":
                self.paused.put_nowait(said["params"])
            elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(said)
            elif method == "Log.entryAdded" and said["params"]["entry"]["source"] != "network":
                self.complaints.append(said)  # "network" is a status such as 503, and no fault

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol; returns its result."""
        number = next(self._calls)
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE_SECONDS):
            said: dict[str, dict[str, Any]] = await answer
        assert "result" in said, said
        return said["result"]

    async def open(self, url: str) -> None:
        """Goes there, in a window that is as large as that of a usual notebook."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.resize(1366, 650)
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=BEFORE_THE_PAGE)
        await self.call("Page.navigate", url=url)
        await until(lambda: self.run(f"document.readyState + location.href === 'complete{url}'"))

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        done = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    async def text(self, element: str) -> str:
        """The text of the element with this id, as a reader sees it."""
        shown: str = await self.run(f"document.getElementById({element!r}).innerText")
        return shown

    async def texts(self, selector: str) -> list[str]:
        """The whole texts of all elements for a CSS selector, in the order of the page."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        texts: list[str] = await self.run(f"{found}.map((each) => each.textContent)")
        return texts

    async def shows(self, element: str, text: str) -> None:
        """Waits until the element with this id shows this text."""
        try:
            await until(lambda: self.run(SHOWS % (element, json.dumps(text))))
        except AssertionError:
            raise AssertionError(f"not {text!r} but {await self.text(element)!r}") from None

    async def fill(self, **fields: str) -> None:
        """Types into fields: event_id is the field with the id event-id."""
        for name, value in fields.items():
            element = name.replace("_", "-")
            await self.run(f"document.getElementById({element!r}).value = {json.dumps(value)}")

    async def press(self, selector: str) -> None:
        """Clicks on the first element for a CSS selector."""
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")

    async def event_ids(self) -> list[str]:
        """The ids in the list of newest events, the newest first."""
        return await self.texts("#events code bdi")

    async def topics(self) -> list[list[str]]:
        """The rows of the table of topics."""
        cells = iter(await self.texts("#topics td"))
        return [list(row) for row in zip(cells, cells, cells, cells, strict=True)]

    async def card(self, number: int) -> Card:
        """A card with a chart, as a reader sees it."""
        text = await self.run(f"document.getElementById('cards').children[{number}].innerText")
        return Card(*text.split("\n"))

    async def polled(self, times: int) -> None:
        """Waits until it has asked for figures so many times more."""
        await self.run(f"window.pollsBefore = polls.length + {times}")
        await until(lambda: self.run("polls.length >= pollsBefore"))


class Card(NamedTuple):
    """The lines of a card, from the top."""

    title: str
    figure: str
    readout: str
    top: str  # of the scale
    zero: str
    left: str  # of the axis
    right: str
    note: str


async def becomes(expected: Any, probe: Callable[[], Awaitable[Any]]) -> None:
    """Waits until the probe gives what is expected."""

    async def is_so() -> bool:
        return bool(await probe() == expected)

    with contextlib.suppress(AssertionError):
        await until(is_so)
    assert await probe() == expected


OpenPage = Callable[[Service], Awaitable[Tab]]


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    """A headless browser; the address of the WebSocket of its tab."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(
        prefix="aggregator-chromium-",
        ignore_cleanup_errors=True,  # one of its processes may still be writing
    ) as folder:
        yield from running_chromium(CHROMIUM, Path(folder))


def running_chromium(program: str, profile: Path) -> Iterator[str]:
    """What the fixture gives, with the profile in this folder."""
    arguments = [program, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    log = (profile / "log").open("wb")
    process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
    try:
        place = profile / "DevToolsActivePort"  # its port and path, a line each
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not place.exists() or place.read_text().count("\n") < 1:
            assert process.poll() is None and time.monotonic() < deadline, "it does not start"
            time.sleep(0.01)
        port, _ = place.read_text().split()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            (tab,) = [each for each in json.load(answer) if each["type"] == "page"]
        yield tab["webSocketDebuggerUrl"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it has children of its own
        process.wait()
        log.close()


@pytest_asyncio.fixture
async def open_page(chromium: str) -> AsyncIterator[OpenPage]:
    """Opens the page of a service; afterwards, checks what no test may bring about."""
    urls: list[str] = []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(chromium, max_msg_size=0) as socket,
    ):
        tab = Tab(socket)

        async def open_page(service: Service) -> Tab:
            urls.append(f"{service.url}/")
            await tab.open(urls[-1])
            return tab

        listener = asyncio.create_task(tab.listen())
        yield open_page
        hacked = await tab.run("typeof hacked !== 'undefined'")
        await tab.call("Page.navigate", url="about:blank")
        listener.cancel()
    assert not hacked
    assert tab.complaints == [], "the console is empty"
    elsewhere = [each for each in tab.requests if not each.startswith(tuple(urls))]
    assert set(elsewhere) <= {"data:,"}, "the icon is empty"


def test_the_page_allows_its_own_script_and_style_alone() -> None:
    page = (HERE / "dashboard.html").read_text(encoding="utf-8")
    found = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert found
    assert found.start() < min(page.index("<script>"), page.index("<style>"))
    policy = dict(each.split(" ", 1) for each in found[1].split("; "))
    for tag in "script", "style":
        (text,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


@needs_browser
async def test_the_page_shows_counters_topics_and_the_newest_events(
    service: InProcess, open_page: OpenPage
) -> None:
    await service.publish(numbered(range(40)))
    await service.publish(numbered(range(10)))
    await service.publish(numbered([1], topic="other"))
    await service.publish({})
    tab = await open_page(service)
    await tab.shows("state", "Live.")
    await becomes([["order.created", "50", "40", "10"], ["other", "1", "1", "0"]], tab.topics)
    newest = ["1", *map(str, range(39, 10, -1))]
    await becomes(newest, tab.event_ids)
    received, unique, duplicates, refused = [await tab.card(number) for number in range(4)]
    assert (received.title, received.figure) == ("Received", "51")
    assert (unique.title, unique.figure) == ("Unique", "41")
    assert (duplicates.title, duplicates.figure) == ("Duplicates", "10")
    assert duplicates.note == "19.6% of received"
    assert (refused.title, refused.figure, refused.note) == ("Refused", "1", "1 × 422")

    await service.publish(numbered([100], payload={"id": 12345678901234567890, "float": 1.0}))
    await tab.shows("events", '{"id":12345678901234567890,"float":1.0}')
    assert await tab.event_ids() == ["100", *newest[:-1]]
    (number,) = await tab.run("[document.querySelector('#events .soft bdi').textContent]")
    assert number == f"#{(await service.read(tail=1))['last_seq']}"
    await until(lambda: tab.run("document.querySelector('.figure').innerText === '52'"))


@needs_browser
async def test_the_page_says_what_to_do_where_nothing_is(
    service: InProcess, open_page: OpenPage
) -> None:
    tab = await open_page(service)
    await tab.shows("topics-note", "No topics yet")
    await tab.shows("newest", "No events yet. Send one with the form here, or run")
    await service.publish(event())
    await becomes(["1"], tab.event_ids)
    assert "No events yet" not in await tab.text("newest")


@needs_browser
async def test_nothing_on_the_page_moves_or_is_too_wide(
    service: InProcess, open_page: OpenPage
) -> None:
    await service.publish(numbered(range(3)))
    tab = await open_page(service)
    await tab.polled(4)
    await tab.run("document.querySelector('main').style.marginTop = '99px'")
    await until(lambda: tab.run("moves.length && moves.at(-1).startTime > polls.at(-4).time"))
    late = "moves.filter(({ startTime }) => startTime > polls[0].time).length"
    assert await tab.run(late) == 1, "nothing but what was moved here, after the first figures"
    table, card = await tab.run(
        "['#topics-table', '[aria-labelledby=topics-title]'].map("
        "(each) => document.querySelector(each).getBoundingClientRect().bottom)"
    )
    assert 0 < card - table < 30, "the card is as high as its table"
    for width in 1366, 900, 390:
        await tab.resize(width, 650)
        assert await tab.run("document.documentElement.scrollWidth") <= width


@needs_browser
async def test_hostile_text_stays_text_everywhere_on_the_page(
    service: InProcess, open_page: OpenPage
) -> None:
    tab = await open_page(service)
    payload = json.dumps({HOSTILE: [HOSTILE]}, ensure_ascii=False, separators=(",", ":"))
    await tab.fill(topic=HOSTILE, source=HOSTILE, event_id=HOSTILE, payload=payload)
    await tab.press("#send [type=submit]")
    await tab.shows("answer", "New: it is stored.")
    await tab.press("#again")
    await tab.shows("answer", "A duplicate: it was there already, so this one is dropped.")
    await tab.fill(find_topic=HOSTILE, find_id=HOSTILE)
    await tab.press("#find [type=submit]")
    await tab.shows("found", "It is stored.")
    await becomes([[HOSTILE, "2", "1", "1"]], tab.topics)
    await becomes([HOSTILE] * 2, tab.event_ids)
    assert await tab.texts("#events b bdi") == [HOSTILE] * 2
    assert await tab.texts("#events .soft bdi:last-child") == [HOSTILE] * 2
    assert await tab.texts("#events .payload") == [payload] * 2
    topic, event_id, _, source, found = await tab.texts("#found dd")
    assert (topic, event_id, source) == (HOSTILE, HOSTILE, HOSTILE)
    assert json.loads(found) == json.loads(payload)
    (exchange,) = await tab.texts("#answer pre")
    assert payload in exchange
    assert await tab.texts("main img, main script, #events li li, #events b b") == []
    for isolated in "#events b bdi", "#events .soft bdi", "#topics td", "#found dd":
        style = f"getComputedStyle(document.querySelector('{isolated}'))"
        assert await tab.run(f"{style}.unicodeBidi") == "isolate", "it turns no neighbours round"


@needs_browser
async def test_the_page_resumes_at_its_place_after_a_restart(
    process: StartProcess, open_page: OpenPage
) -> None:
    service = await process()
    await service.publish(numbered(range(5)))
    tab = await open_page(service)
    await becomes(["4", "3", "2", "1", "0"], tab.event_ids)
    await service.kill()
    await tab.shows("state", "Connection lost")
    assert await tab.run("document.title") == "(lost) Event Aggregator"
    assert await tab.run("getComputedStyle(document.getElementById('state')).color") == RED
    await service.start("--port", str(service.port))
    await service.publish(numbered(range(5, 15)))
    await tab.shows("state", "Live again. It went on where it was, after event 5.")
    assert await tab.run("document.title") == "Event Aggregator"
    await service.publish(numbered([15]))
    await becomes([str(number) for number in range(15, -1, -1)], tab.event_ids)


@needs_browser
async def test_the_page_begins_anew_where_another_database_took_the_place(
    process: StartProcess, open_page: OpenPage, tmp_path: Path
) -> None:
    service = await process()
    await service.publish(numbered(range(5)))
    tab = await open_page(service)
    await becomes(["4", "3", "2", "1", "0"], tab.event_ids)
    await service.kill()
    await service.start("--port", str(service.port), "--db", str(tmp_path / "other.db"))
    await service.publish(numbered([7, 8]))
    await tab.shows("state", "Live again, with another database: it does not have event 5 yet.")
    await becomes(["8", "7"], tab.event_ids)
    await service.publish(numbered([9]))
    await becomes(["9", "8", "7"], tab.event_ids)


@needs_browser
async def test_a_hidden_page_hangs_up_and_catches_up_later(
    service: InProcess, open_page: OpenPage
) -> None:
    await service.publish(numbered([1]))
    tab = await open_page(service)
    await becomes(["1"], tab.event_ids)
    hide = "Object.defineProperty(document, 'hidden', { configurable: true, value: %s })"
    hide += ", document.dispatchEvent(new Event('visibilitychange'))"
    await tab.run(hide % "true")
    await until(lambda: tab.run("!isLive"))
    await service.publish(numbered([2, 3]))  # so the service notices that nobody listens
    await becomes(0, lambda: service.metric("aggregator_live_subscribers"))
    assert await tab.event_ids() == ["1"]
    assert await tab.run("document.title") == "Event Aggregator", "nothing is lost"
    await tab.run(hide % "false")
    await becomes(["3", "2", "1"], tab.event_ids)
    await tab.shows("state", "Live again. It went on where it was, after event 1.")

    await tab.run(hide % "true")
    await until(lambda: tab.run("!isLive"))
    await tab.run("position = '-100001'")  # as if it had been hidden for very long
    await service.publish(numbered([4]))
    await tab.run(hide % "false")
    await tab.shows("state", "Live again. It skipped many events after event -100001")
    await becomes(["4", "3", "2", "1"], tab.event_ids)


@needs_browser
async def test_the_verdicts_of_send_are_the_right_way_round(
    service: InProcess, open_page: OpenPage
) -> None:
    tab = await open_page(service)
    await tab.fill(event_id="A-1", payload='{"n": 12345678901234567890}')
    await tab.press("#send [type=submit]")
    await tab.shows("answer", "New: it is stored.\n202 Accepted")
    in_view = """(([state, answer]) => state.bottom <= answer.top && answer.bottom <= innerHeight)(
        ["state", "answer"].map((id) => document.getElementById(id).getBoundingClientRect()))"""
    assert await tab.run(in_view)
    await tab.press("#again")
    await tab.shows("answer", "A duplicate: it was there already, so this one is dropped.\n202")
    await becomes(["A-1", "A-1"], tab.event_ids)
    dropped, stored = await tab.texts("#events li")
    assert dropped.startswith("Duplicate, dropped:") and "not stored again" in dropped
    assert stored.startswith("demo.clicked") and "#1" in stored
    assert '{"n":12345678901234567890}' in dropped and '{"n":12345678901234567890}' in stored

    await tab.press("#new-id")
    await tab.fill(payload="[]")
    await tab.press("#send [type=submit]")
    await tab.shows("answer", "Refused: nothing of it is stored. body.payload: Input should be a")
    await tab.fill(payload="{")
    await tab.press("#send [type=submit]")
    await tab.shows("answer", "The payload is not JSON")
    assert await service.stats() == (2, 1, 1)

    await tab.fill(payload="{}")
    answers = {"urlPattern": "*/publish", "requestStage": "Response"}
    await tab.call("Fetch.enable", patterns=[answers])
    await tab.press("#send [type=submit]")
    held = await tab.paused.get()
    await tab.call("Fetch.failRequest", requestId=held["requestId"], errorReason="ConnectionReset")
    await tab.shows("answer", "No answer (Failed to fetch), so it may be stored or not.")
    assert await service.stats() == (3, 2, 1), "it was stored, and only the answer was lost"
    await tab.press("#again")
    held = await tab.paused.get()
    await tab.call("Fetch.fulfillRequest", requestId=held["requestId"], responseCode=502)
    await tab.shows("answer", "No answer from the service, but 502, so it may be stored or not.")
    await tab.call("Fetch.disable")
    await tab.press("#again")
    await tab.shows("answer", "A duplicate: it was there already, so this one is dropped.")
    await tab.press("#new-id")
    await tab.press("#send [type=submit]")
    await tab.shows("answer", "New: it is stored.")
    assert await service.stats() == (6, 3, 3)

    sent = len([each for each in tab.requests if each.endswith("/publish")])
    await tab.run("by('again').click(), by('again').click()")
    await tab.shows("answer", "A duplicate")
    assert len([each for each in tab.requests if each.endswith("/publish")]) == sent + 1


@needs_browser
async def test_the_page_says_in_red_that_events_cannot_be_stored(
    monkeypatch: pytest.MonkeyPatch,
    serve: Serve,
    open_page: OpenPage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(aggregator, "BUSY_SECONDS", 0.02)
    service = await serve()
    tab = await open_page(service)
    await tab.shows("state", "Live.")
    with locked(service.db):
        await tab.press("#send [type=submit]")
        await tab.shows("answer", "Refused: nothing of it is stored.")
        await tab.shows("state", "Connected, but events cannot be stored: ")
        reason = (await service.ask("GET", "/health")).document["reason"]
        assert (await tab.text("state")).endswith(f": {reason}")
        assert await tab.run("getComputedStyle(document.getElementById('state')).color") == RED
        assert await tab.run("document.title") == "(failing) Event Aggregator"
        await until(lambda: tab.run("document.body.innerText.includes('1 × 503')"))
    await tab.press("#again")
    await tab.shows("answer", "New: it is stored.")
    await tab.shows("state", "Live again. Events can be stored again.")
    assert await tab.run("getComputedStyle(document.getElementById('state')).color") != RED
    assert await tab.run("document.title") == "Event Aggregator"
    caplog.clear()


@needs_browser
async def test_the_page_finds_an_event_by_topic_and_id(
    service: InProcess, open_page: OpenPage
) -> None:
    wanted = event(topic="a&b=1", event_id="ü +1", payload={"n": [12345678901234567890, 1.50]})
    await service.publish([event(), wanted, event(topic="other", event_id="ü +1")])
    tab = await open_page(service)
    await tab.fill(find_topic=" a&b=1 ", find_id="ü +1")
    await tab.press("#find [type=submit]")
    await tab.shows("found", "It is stored.")
    fields = await tab.texts("#found dd")
    assert fields[:4] == ["a&b=1", "ü +1", "2025-10-24T10:30:00Z", "shop"]
    assert "12345678901234567890" in fields[4]
    assert json.loads(fields[4]) == wanted["payload"]
    await tab.fill(find_id="1")
    await tab.press("#find [type=submit]")
    await tab.shows("found", "Not stored: no event has this topic and this event id.")


@needs_browser
async def test_the_page_asks_for_a_token_and_uses_it(serve: Serve, open_page: OpenPage) -> None:
    service = await serve(api_token="secret")
    await service.publish(event(), Authorization="Bearer secret")
    tab = await open_page(service)
    await tab.shows("state", "The service asks for a token.")
    assert not await tab.run("by('token-form').hidden")
    assert await tab.run("document.activeElement.id") == "token", "one can type at once"
    await tab.fill(token="wrong")
    await tab.press("#token-form [type=submit]")
    await tab.shows("state", "The service refuses this token.")
    assert not await tab.run("by('token-form').hidden")
    await tab.fill(token="secret")
    await tab.press("#token-form [type=submit]")
    await tab.shows("state", "Live.")
    assert await tab.run("document.getElementById('token-form').hidden")
    await becomes(["1"], tab.event_ids)
    await becomes([["order.created", "1", "1", "0"]], tab.topics)
    await tab.press("#send [type=submit]")
    await tab.shows("answer", "New: it is stored.")
    await tab.fill(find_topic="order.created", find_id="1")
    await tab.press("#find [type=submit]")
    await tab.shows("found", "It is stored.")
    assert not any("secret" in each for each in tab.requests), "an address may be logged"
    assert await tab.run("localStorage.length") == 0, "it is kept until the tab is closed"


@needs_browser
async def test_the_table_of_topics_has_pages(service: InProcess, open_page: OpenPage) -> None:
    names = [f"{number:02} &=+%é" for number in range(45)]
    await service.publish([event(topic=name) for name in names])
    tab = await open_page(service)
    pages = [[[name, "1", "1", "0"] for name in names[start : start + 20]] for start in (0, 20, 40)]
    await becomes(pages[0], tab.topics)
    assert await tab.run("document.getElementById('topics-first').disabled")
    assert not await tab.run("by('topics-pages').hidden")
    await tab.press("#topics-next")
    await becomes(pages[1], tab.topics)
    await tab.press("#topics-next")
    await becomes(pages[2], tab.topics)
    assert await tab.run("document.getElementById('topics-next').disabled")
    await tab.press("#topics-first")
    await becomes(pages[0], tab.topics)


@needs_browser
async def test_the_list_can_be_held_and_shortens_what_is_long(
    service: InProcess, open_page: OpenPage
) -> None:
    await service.publish(numbered([1]))
    tab = await open_page(service)
    await becomes(["1"], tab.event_ids)
    await tab.press("#hold")
    long, longer = ({"text": "x" * size} for size in (500, 200_000))
    await service.publish([event(event_id="2", payload=long), event(event_id="3", payload=longer)])
    await becomes([["order.created", "3", "3", "0"]], tab.topics)
    assert await tab.event_ids() == ["1"]
    await tab.press("#hold")
    await becomes(["3", "2", "1"], tab.event_ids)
    shown = await tab.texts("#events .payload")
    assert shown[0].startswith("(an event of 200,1")
    assert shown[1] == '{"text":"' + "x" * 391 + "… (511 characters)"


@needs_browser
async def test_charts_have_a_scale_and_explain_the_pointers_place(
    service: InProcess, open_page: OpenPage
) -> None:
    tab = await open_page(service)
    await tab.polled(2)
    await tab.shows("cards", "none since its start")
    await service.publish(numbered([1, 2, 3]))
    await tab.shows("cards", "p99")
    group = await tab.card(4)
    assert (group.title, group.figure, group.readout) == ("Group size", "mean 3", "peak 3")
    assert group.top == "5", "the next of 1, 2, 5, 10"
    commit = await tab.card(5)
    assert commit.title == "Commit time"
    p50 = re.fullmatch(r"p50 ([0-9.]+) ms", commit.figure)
    p99 = re.fullmatch(r"p99 ([0-9.]+) ms", commit.readout)
    assert p50 and p99 and 0 < float(p50[1]) < float(p99[1])
    line = await tab.run("CARDS[4].lines[0].getAttribute('d')")
    assert line.endswith(" 40.0h0"), "3 of 5, from the top of 100"

    place = await tab.run(
        "(({x, y, width, height}) => [x + width - 0.1, y + height / 2])"
        "(document.querySelector('.chart').getBoundingClientRect())"
    )
    await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    received = await tab.card(0)
    assert re.fullmatch("[0-9.,]+/s", received.readout), received
    assert re.fullmatch(r"at \d\d:\d\d:\d\d", received.left), received
    assert (await tab.card(4)).left == received.left, "all charts show the same moment"
    await tab.run("polls.shift()")  # the only one that knows nothing of the second before
    await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0] - 150, y=place[1])
    assert (await tab.card(0)).readout == "no data"
    await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    received = await tab.card(0)
    assert re.fullmatch("[0-9.,]+/s", received.readout), received
    assert received.left == "2 min ago"


@needs_browser
async def test_figures_of_the_page_are_rounded_and_estimated_well(
    service: InProcess, open_page: OpenPage
) -> None:
    tab = await open_page(service)
    poll = "{ time: %s, values: new Map(%s) }"

    async def value(script: str, now: Any, before: Any) -> Any:
        polls = [poll % (time, json.dumps(list(values.items()))) for time, values in (now, before)]
        return await tab.run(f"{script}({', '.join(polls)})")

    for count, milliseconds, shown in (1, 1007, 1), (1400, 1000, 1400), (1, 4000, 0.25), (0, 9, 0):
        rate = "((now, before) => rate('n', now, before)[0])"
        assert await value(rate, (milliseconds, {"n": 5 + count}), (0, {"n": 5})) == shown
    buckets = 'aggregator_group_commit_seconds_bucket{le="%s"}'
    counts = {"0.001": 10, "0.002": 70, "0.01": 100, "+Inf": 100}
    before = {buckets % bound: 7 for bound in counts}
    now = {buckets % bound: 7 + count for bound, count in counts.items()}
    p50, p99 = await value("commitTimes", (1, now), (0, before))
    assert (round(p50, 3), round(p99, 3)) == (1.667, 9.733)
    assert await value("commitTimes", (1, now), (0, now)) == []
    assert await value("commitTimes", (1, before | {buckets % "+Inf": 9}), (0, before)) == [10, 10]
    for highest, top in (0, 1), (0.3, 0.5), (1, 1), (1.1, 2), (19, 20), (20, 20), (51, 100):
        assert await tab.run(f"peak = () => {highest}, scaleTop('time')") == top


@needs_browser
async def test_the_page_understands_a_feed_however_it_is_cut(
    service: InProcess, open_page: OpenPage
) -> None:
    tab = await open_page(service)
    stream = (
        "retry: 2000\n: comment\nid: 7\nevent: position\ndata: {}\n\n"
        "id: 8\ndata: one\n\n: nothing new\nid:9\r\ndata:a:b\r\ndata:  c\r\n\r\n"
        "retry: soon\nid: 10\rdata\r\rid: 11\n\n"
        "event: message\ndata: d\u2028e\n\nid: 12\ndata: cut"
    )
    read = """((pieces) => {
        const found = [];
        arrive = ({ number, text }) => found.push([number, text]);
        const parser = new FeedParser();
        for (const piece of pieces) parser.take(piece);
        return [...found, [position, retryMs]];
    })(%s)"""
    expected = [["8", "one"], ["9", "a:b\n c"], ["10", ""], ["11", "d\u2028e"], ["11", 2000]]
    position = ["id: 7\nevent: position\ndata: {}\n\n"]
    assert (await tab.run(read % json.dumps(position)))[0][0] == "7", "and it is no event"
    assert await tab.run(read % json.dumps([stream])) == expected
    assert await tab.run(read % json.dumps([*stream])) == expected
    assert await tab.run(read % json.dumps(stream.partition("\r"))) == expected


# --- Metrics -----------------------------------------------------------------------------------

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABELS = r'\{[a-z_]+="[^"\\\n]*"(?:,[a-z_]+="[^"\\\n]*")*\}'
SAMPLE = re.compile(rf"({NAME})({LABELS})? (-?[0-9.]+(?:e[+-]?[0-9]+)?)")


def samples(text: str) -> dict[str, float]:
    """Prometheus's text format by sample; refuses what Prometheus would refuse."""
    values: dict[str, float] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert re.fullmatch(rf"# HELP {NAME} \S.*", line)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind in ("counter", "gauge", "histogram") and name not in kinds
            assert (kind == "counter") == name.endswith("_total"), "what promtool would say"
            kinds[name] = kind
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            name, labels, value = sample.groups(default="")
            base = re.sub("_(bucket|sum|count)$", "", name)
            assert name in kinds or kinds.get(base) == "histogram", "its TYPE comes first"
            assert name + labels not in values
            values[name + labels] = float(value)
    return values


async def test_metrics_are_prometheus_text_with_true_values(serve: Serve) -> None:
    before = time.time()
    service = await serve()
    await service.publish(numbered([1, 2, 2]))
    await service.publish(event(event_id="3"))
    await service.publish(b"nonsense")
    await service.ask("GET", "/nothing")
    await service.ask("GET", "/nothing")
    async with service.feed() as feed:  # it idles: it is counted all the same
        await feed.take(3)
        answer = await service.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.body.decode())
    expected = {
        "aggregator_events_received_total": 4,
        'aggregator_events_processed_total{outcome="unique"}': 3,
        'aggregator_events_processed_total{outcome="duplicate"}': 1,
        'aggregator_requests_refused_total{status="422"}': 1,
        'aggregator_requests_refused_total{status="404"}': 2,
        "aggregator_in_flight_bytes": 0,
        "aggregator_requests_queued": 0,
        "aggregator_live_subscribers": 1,
        "aggregator_healthy": 1,
        "aggregator_log_lines_dropped_total": 0,
        "aggregator_checkpoint_failures_total": 0,
        "aggregator_group_commit_seconds_count": 2,
        "aggregator_group_commit_events_count": 2,
        "aggregator_group_commit_events_sum": 4,
        'aggregator_group_commit_events_bucket{le="1"}': 1,
        'aggregator_group_commit_events_bucket{le="2"}': 1,
        'aggregator_group_commit_events_bucket{le="5"}': 2,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert 0 < found["aggregator_group_commit_seconds_sum"] <= time.time() - before
    log = service.db.with_name(service.db.name + "-wal")
    assert found["aggregator_log_bytes"] == log.stat().st_size > 0
    assert found["aggregator_database_bytes"] == service.db.stat().st_size + log.stat().st_size
    assert before <= found["process_start_time_seconds"] <= time.time()
    build = f'aggregator_build_info{{version="1.0.0",sqlite="{sqlite3.sqlite_version}"}}'
    assert found[build] == 1


async def test_histograms_are_cumulative_and_end_in_infinity(service: InProcess) -> None:
    for size in 1, 1, 3, 30, 600:
        await service.publish(numbered(range(size)))
    found = samples((await service.ask("GET", "/metrics")).body.decode())
    for name in "aggregator_group_commit_seconds", "aggregator_group_commit_events":
        buckets = {
            float(sample.removeprefix(f'{name}_bucket{{le="').removesuffix('"}')): count
            for sample, count in found.items()
            if sample.startswith(f"{name}_bucket")
        }
        bounds = list(buckets)
        assert bounds == sorted(bounds) and bounds[-1] == math.inf
        assert list(buckets.values()) == sorted(buckets.values())
        assert buckets[math.inf] == found[f"{name}_count"] == 5


def test_the_seconds_of_a_commit_are_seconds(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    batch = validate(json_of(numbered(range(2000))), store.encode)
    before = time.perf_counter()
    outcome = store.commit([batch])
    took = time.perf_counter() - before
    assert outcome.seconds <= took < 10 * outcome.seconds
    assert outcome.is_new == b"\1" * 2000
    store.close()


def test_a_bucket_counts_values_up_to_its_bound() -> None:
    values = aggregator.Histogram(1, 5)
    for value in 0.5, 1, 1.5, 5, 5.5, 100:
        values.observe(value)
    assert aggregator.histogram("h", "What it is.", values).samples == {
        '_bucket{le="1"}': 2,
        '_bucket{le="5"}': 4,
        '_bucket{le="+Inf"}': 6,
        "_sum": 113.5,
        "_count": 6,
    }


async def test_a_scrape_costs_the_same_at_any_age(connections: Connections, serve: Serve) -> None:
    service = await serve()
    connections.count_steps()
    await service.ask("GET", "/metrics")
    first = connections.steps
    await service.publish([event(topic=str(n % 200), event_id=str(n)) for n in range(1000)])
    for number in range(20):
        await service.publish(event(topic=f"more {number}"))
    connections.steps = 0
    answer = await service.ask("GET", "/metrics")
    assert 0 < connections.steps <= first + 10
    assert answer.body.count(b"\n") < 100


# --- The contract as OpenAPI -------------------------------------------------------------------
# openapi.json is what tools read in place of the README. It is written by hand and held true in
# both directions: what it says is asked of a service, and what a service answers in any test of
# this file has to be in it.

CONTRACT = json.loads((HERE / "openapi.json").read_text(encoding="utf-8"))
METHODS = ("get", "head", "options", "post")
OPERATIONS = [
    (method, path)
    for path, item in CONTRACT["paths"].items()
    for method in item
    if method in METHODS
]
READERS = ("/events", "/topics", "/stats")  # where no parameter is ignored
ANNOTATIONS = {"description", "default", "examples"}
KEYWORDS = {
    *("type", "const", "enum", "oneOf", "anyOf", "not", "minimum", "pattern"),
    *("minLength", "maxLength", "minItems", "maxItems", "items"),
    *("required", "properties", "additionalProperties"),
}
KNOWN_WORDS = KEYWORDS | ANNOTATIONS
JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
# Of the transport. The document is silent about them.
USUAL_HEADERS = {
    *("content-type", "content-length", "transfer-encoding", "date", "server", "connection"),
    "vary",  # where nothing varies it is only of no use; where it is promised, it is looked for
}


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """The part of the document that is meant, where this one only refers to it."""
    if "$ref" not in node:
        return node
    assert set(node) <= {"$ref", "description"}
    found: dict[str, Any] = CONTRACT
    for name in node["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def schema_of(name: str) -> dict[str, Any]:
    """A schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def misfits(value: Any, schema: Any, place: str = "$") -> list[str]:
    """What in a value does not fit a JSON Schema; knows the document's keywords and no others."""
    if isinstance(schema, bool):
        return [] if schema else [f"{place} must not be there"]
    schema = resolved(schema)
    assert schema.keys() <= KNOWN_WORDS, schema
    if "type" in schema and not is_of_type(value, schema["type"]):
        return [f"{place} is no {schema['type']}"]

    found: list[str] = []
    if "const" in schema and not same_json(value, schema["const"]):
        found.append(f"{place} is not {schema['const']}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place} is none of {schema['enum']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{place} is less than {schema['minimum']}")
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            found.append(f"{place} has {len(value)} characters")
        # In JSON Schema `$` is the end of the text; in Python it is also before a last newline.
        if not re.search(re.sub(r"\$$", r"\\Z", schema.get("pattern", "")), value):
            found.append(f"{place} does not match {schema['pattern']}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{place} has {len(value)} items")
        for index, item in enumerate(value):
            found += misfits(item, schema.get("items", True), f"{place}[{index}]")
    if isinstance(value, dict):
        found += [f"{place} lacks {key}" for key in schema.get("required", []) if key not in value]
        rules = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        for key, member in value.items():
            found += misfits(member, rules.get(key, others), f"{place}.{key}")

    def fitting(schemas: list[Any]) -> int:
        return sum(not misfits(value, each, place) for each in schemas)

    if "oneOf" in schema and (count := fitting(schema["oneOf"])) != 1:
        found.append(f"{place} fits {count} of oneOf")
    if "anyOf" in schema and not fitting(schema["anyOf"]):
        found.append(f"{place} fits none of anyOf")
    if "not" in schema and fitting([schema["not"]]):
        found.append(f"{place} is what it must not be")
    return found


def is_of_type(value: Any, kinds: str | list[str]) -> bool:
    """Whether a value has one of these JSON types; for Python alone, True is an integer."""
    if isinstance(value, bool):
        return False
    names = [kinds] if isinstance(kinds, str) else kinds
    return any(isinstance(value, JSON_TYPES[name]) for name in names)


def as_json(text: str) -> Any:
    """A header or a query parameter as a schema sees it: digits are a number."""
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text


def responses_of(method: str, path: str) -> dict[str, Any]:
    """The document's responses by status; also where there is no such path or method."""
    item = CONTRACT["paths"].get(path, {})
    if method.lower() in item:
        return dict(item[method.lower()]["responses"])
    shared = CONTRACT["components"]["responses"]
    refusal = {"405": shared["MethodNotAllowed"]} if item else {"404": shared["NotFound"]}
    return refusal | {"401": shared["Unauthorized"], "421": shared["Misdirected"]}


def assert_documented(method: str, path: str, answer: Answer) -> None:
    """The document has this answer: its status, its headers, its media type and its shape."""
    responses = responses_of(method, path)
    assert str(answer.status) in responses, f"{method} {path}: {answer.status} is not documented"
    response = resolved(responses[str(answer.status)])
    headers = {name.lower(): resolved(rule) for name, rule in response.get("headers", {}).items()}
    for name in set(answer.headers) - USUAL_HEADERS:
        assert name in headers, f"{method} {path} {answer.status}: {name} is not documented"
    for name, rule in headers.items():
        if name in answer.headers:
            value = answer.headers[name]
            value = as_json(value) if rule["schema"]["type"] == "integer" else value
            assert misfits(value, rule["schema"], name) == []
        else:
            assert not rule.get("required"), f"{method} {path} {answer.status}: no {name}"
    if method == "HEAD" or "content" not in response:
        assert answer.body == b""
        return
    media_type = answer.headers["content-type"].partition(";")[0]
    assert media_type in response["content"]
    schema = response["content"][media_type]["schema"]
    if media_type != "application/json":
        assert misfits(answer.body.decode(), schema) == []
    elif len(answer.body) < 10_000:  # what is longer has more of the same
        assert misfits(answer.document, schema) == []


@pytest.fixture(autouse=True)
def every_answer_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a service answers in any test, the document says so."""
    really_ask = Service.ask

    async def ask(self: Service, method: str, path: str, *more: Any, **query: Any) -> Answer:
        answer = await really_ask(self, method, path, *more, **query)
        assert_documented(method, path.partition("?")[0], answer)
        return answer

    monkeypatch.setattr(Service, "ask", ask)


async def test_it_is_served_as_it_stands_and_has_the_version(
    service: InProcess,
) -> None:
    answer = await service.ask("GET", "/openapi.json")
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.document == CONTRACT
    assert CONTRACT["info"]["version"] == aggregator.VERSION


async def test_its_paths_and_methods_are_those_of_the_router(service: InProcess) -> None:
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in service._runner.app.router.routes()
        if route.resource is not None
    }
    assert routes == set(OPERATIONS)


def test_whatever_is_in_it_is_referred_to_and_the_reverse() -> None:
    referred = set(re.findall(r'"#/components/(\w+)/(\w+)"', json.dumps(CONTRACT)))
    by_name = {("responses", "NotFound"), ("responses", "MethodNotAllowed")}
    there = {
        (kind, name)
        for kind, parts in CONTRACT["components"].items()
        for name in parts
        if kind != "securitySchemes"
    }
    assert referred | by_name == there


async def test_each_status_in_it_is_one_that_the_service_gives(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(aggregator, "BODY_SECONDS", 0.1)
    body = json_of(event())
    plain = await serve(tmp_path / "plain.db", max_body_bytes=1000)
    guarded = await serve(tmp_path / "guarded.db", api_token="secret")
    statuses: dict[tuple[str, str], set[str]] = {}

    def note(method: str, path: str, answer: Answer) -> None:
        statuses.setdefault((method.lower(), path), set()).add(str(answer.status))

    for method, path in OPERATIONS:
        method = method.upper()
        note(method, path, await plain.ask(method, path, body))
        note(method, path, await plain.ask(method, path, body, {"Host": "elsewhere.example"}))
        note(method, path, await plain.ask(method, path, body, unknown="1"))
        note(method, path, await guarded.ask(method, path, body))
    for sent, headers in [
        (b"no compression", {"Content_Encoding": "gzip"}),
        (b"no JSON", {}),
        (body, {"Content_Type": "text/plain"}),
        (body.ljust(1001), {}),
    ]:
        note("POST", "/publish", await plain.publish(sent, **headers))
    async with plain.connection(request(body[:9], length=len(body))) as client:
        late = await client.answer()
    assert_documented("POST", "/publish", late)
    note("POST", "/publish", late)

    def fails(*_: Any) -> None:
        raise aggregator.Unavailable("disk I/O error")

    for name in "commit", "last_seq", "topics", "totals":
        monkeypatch.setattr(aggregator.SqliteStore, name, fails)
    assert (await plain.ask("GET", "/stats")).status == 503
    assert await plain.health() == 503
    for method, path in OPERATIONS:
        note(method.upper(), path, await plain.ask(method.upper(), path, body))
    caplog.clear()  # of what the log says about it
    assert statuses == {operation: set(responses_of(*operation)) for operation in OPERATIONS}


async def test_each_media_type_in_it_can_be_asked_for(service: InProcess) -> None:
    await service.publish(numbered(range(3)))
    for method, path in OPERATIONS:
        if method == "get":
            for media_type in CONTRACT["paths"][path]["get"]["responses"]["200"]["content"]:
                accept = {"Accept": media_type}
                async with service.session.get(service.url + path, headers=accept) as response:
                    headers = {name.lower(): value for name, value in response.headers.items()}
                    is_endless = media_type == "text/event-stream"
                    body = b"" if is_endless else await response.read()
                assert response.content_type == media_type
                assert_documented("GET", path, Answer(response.status, headers, body))


async def test_each_event_in_each_form_has_the_shape_in_it(service: InProcess) -> None:
    sent = numbered(range(3), payload={"a": [None, True, {"b": "é🎉\u2028"}]})
    await service.publish(sent)
    answer = await service.ask("GET", "/events", headers={"Accept": "application/x-ndjson"})
    lines = [json.loads(line) for line in answer.body.splitlines()]
    async with service.feed() as feed:
        fed = [each for _, each in await feed.take(3)]
    assert lines == fed == sent
    for each in lines + fed:
        assert misfits(each, schema_of("StoredEvent")) == []


def query_parameters(path: str) -> dict[str, Any]:
    """The schemas of a path's query parameters in the document, by name."""
    parameters = CONTRACT["paths"][path].get("parameters", [])
    return {each["name"]: each["schema"] for each in parameters if each["in"] == "query"}


async def test_a_query_parameter_that_is_not_in_it_is_refused(service: InProcess) -> None:
    # Whatever name the service could know stands in its source, and in quotes.
    source = (HERE / "aggregator.py").read_text(encoding="utf-8")
    names = {*re.findall(r'"(\w+)"', source), "offset", "Limit", "limit[]", "$limit", "é", ""}
    for path in READERS:
        others = sorted(names - set(query_parameters(path)))
        for start in range(0, len(others), 90):
            asked = others[start : start + 90]
            query = urllib.parse.urlencode(dict.fromkeys(asked, "1"))
            detail = (await service.ask("GET", f"{path}?{query}")).detail(422)
            found = {fault["loc"][1] for fault in detail if fault["type"] == "extra_forbidden"}
            assert found == set(asked)


async def test_a_query_parameter_that_is_given_twice_is_refused(service: InProcess) -> None:
    for path in READERS:
        for name in query_parameters(path):
            for value in "", "1":
                twice = f"{path}?{name}={value}&{name}={value}"
                detail = (await service.ask("GET", twice)).detail(422)
                assert ("extra_forbidden", ["query", name]) in [
                    (fault["type"], fault["loc"]) for fault in detail
                ]


NUMBERS_AND_OTHERS = [
    *("0", "1", "2", "01", "-1", "1.5", "1_0", "0x1", "1 2", "１", "", "x", "é", "latest"),
]


async def test_a_query_parameter_takes_the_values_in_it_alone(service: InProcess) -> None:
    await service.publish(numbered(range(3)))
    parameters = [(path, *each) for path in READERS for each in query_parameters(path).items()]
    for path, name, schema in parameters:
        with_it = {"topic": "order.created"} if name == "event_id" else {}
        headers = {"Accept": "text/event-stream"} if name == "lastEventId" else {}
        for value in NUMBERS_AND_OTHERS:
            is_in_it = not misfits(value, schema) or not misfits(as_json(value), schema)
            query = {name: value} | with_it
            async with service.session.get(
                service.url + path, params=query, headers=headers
            ) as response:
                assert (response.status == 200) == is_in_it, (name, value)


BODY = CONTRACT["paths"]["/publish"]["post"]["requestBody"]["content"]["application/json"]
NAMES_AT_THE_EDGE = [
    *("x" * 512, "x" * 513, " \t\r\n" + "x" * 512 + "\u3000", "\u00a0" + "x" * 513, "🎉" * 512),
    *("\ufeff", "\u200b", "a\ufffeb", "\x1fa\x1c", "\x85a\u2028", "a\u2029b", "a\x9fb", "a b", "é"),
]
TIMESTAMPS_AT_THE_EDGE = [
    *("2025-10-24t10:30:00z", "2025-10-24 10:30", "2025-10-24T10:30Z", "2025-10-24T10:30:00,5Z"),
    *("2025-10-24T10:30:00+0700", "2025-10-24T10:30:00-05", "2025-10-24T10:30:00+7:00"),
    *("2025-10-24T10:30:00.1234567890Z", "2025-10-24T10:30:00.", "2025-10-24T24:00:00Z"),
    *("2024-02-29T00:00:00Z", "2000-02-29T00:00:00Z", "1900-02-29T00:00:00Z", "0000-01-01T00:00Z"),
    *("2023-02-29T00:00:00Z", "2024-02-30T00:00:00Z", "2025-09-31T00:00Z", "2025-1-01T00:00Z"),
    *("2016-12-31T23:59:60Z", "2015-06-30 23:59:60.5", "2016-12-30T23:59:60Z"),
    *("2016-12-31T22:59:60Z", "2016-12-31T23:58:60Z", "2016-12-31T23:59:61Z"),
    *("9999-12-31T23:59:60Z", " 2025-10-24T10:30:00Z", "2025-10-24T10:30:00 Z"),
]
AT_THE_EDGE: list[Any] = [
    *(
        event(**{field: value})
        for field in ("topic", "event_id", "source")
        for value in NAMES_AT_THE_EDGE
    ),
    *(event(timestamp=text) for text in TIMESTAMPS_AT_THE_EDGE + TIMESTAMPS + NO_TIMESTAMPS),
    *(event(**{field: value}) for field, value, _ in BAD_FIELDS),
    *(event(), event(other=1), event(events=[]), {}, [], None, 1, "event"),
]


def is_plain_json(value: Any) -> bool:
    """Whether a schema can look at it: JSON Schema knows no lone surrogates and no infinity."""
    return not re.search("[\ud800-\udfff]|Infinity", json.dumps(value, ensure_ascii=False))


def test_a_body_is_taken_just_if_it_fits_the_schema() -> None:
    bodies: list[Any] = [[], {"events": []}, {"events": 1}, {"events": [event()], "a": 1}, [[{}]]]
    for candidate in filter(is_plain_json, AT_THE_EDGE):
        bodies += [candidate, [candidate], {"events": [event(), candidate]}]
    taken = 0
    for body in bodies:
        fits = misfits(body, BODY["schema"]) == []
        assert (faults_of(json_of(body)) == []) == fits, body
        taken += fits
    assert 100 < taken < len(bodies) - 100


def test_the_schema_and_the_service_agree_on_damaged_events() -> None:
    chance = random.Random(14)
    taken = 0
    for _ in range(2000):
        candidate = damaged(chance)
        if is_plain_json(candidate):
            fits = misfits(candidate, BODY["schema"]) == []
            assert (faults_of(json_of(candidate)) == []) == fits, candidate
            taken += fits
    assert 400 < taken < 1600


def test_only_leap_seconds_elsewhere_are_not_in_the_schema() -> None:
    for text in "2016-12-31T18:59:60-05:00", "2017-01-01T05:29:60+05:30", "2016-03-31T23:59:60Z":
        assert faults_of(json_of(event(timestamp=text))) == []
        assert misfits(event(timestamp=text), BODY["schema"]) != []


def kinds_of(name: str) -> set[str]:
    """The kinds of fault that a schema of faults knows."""
    kinds = [resolved(each) for each in resolved(schema_of(name))["oneOf"]]
    return {kind["properties"]["type"]["const"] for kind in kinds}


def test_its_faults_of_a_body_are_those_found() -> None:
    bodies = [body for body, _ in BAD_BODIES]
    bodies += [json_of(event(**{field: value})) for field, value, _ in BAD_FIELDS]
    found = []
    for body in bodies:
        found.append(faults_of(body))
        assert misfits({"detail": found[-1]}, schema_of("BodyFaults")) == [], body
    assert {fault["type"] for detail in found for fault in detail} == kinds_of("BodyFault")


async def test_its_faults_of_a_query_are_those_found(service: InProcess) -> None:
    queries: list[dict[str, Any]] = [
        *({"after": "x"}, {"tail": "-1"}, {"limit": "0"}, {"after": "1"}, {"offset": "1"}),
        *({"event_id": "1"}, {"tail": "1", "after": "0"}, {"lastEventId": "0"}),
    ]
    found = set()
    for query in queries:
        detail = (await service.ask("GET", "/events", **query)).detail(422)
        found |= {fault["type"] for fault in detail}
    assert found == kinds_of("QueryFault")


async def test_its_examples_are_true(service: InProcess) -> None:
    for example in BODY["examples"].values():
        assert (await service.publish(example["value"])).status == 202
    for name, schema in CONTRACT["components"]["schemas"].items():
        for example in schema.get("examples", []):
            assert misfits(example, schema_of(name)) == []
    for item in CONTRACT["paths"].values():
        for parameter in item.get("parameters", []):
            for example in parameter["examples"].values():
                assert misfits(example["value"], parameter["schema"]) == []


# --- The log -----------------------------------------------------------------------------------


async def test_the_log_has_nothing_that_a_client_could_forge(
    process: StartProcess,
) -> None:
    service = await process(API_TOKEN="t0ken")
    service.session.headers["Authorization"] = "Bearer t0ken"
    first = event(topic="order", event_id="001")
    await service.publish(first)
    await service.publish([first, event(topic="é %s", event_id="🎉"), event(event_id="last")])
    forged = "\nERROR - forged\x1b[31m\r\u2028x"
    for field in "topic", "event_id", "source", "timestamp":
        (await service.publish(event(**{field: f"a{forged}"}))).detail(422)
    await service.publish(event(event_id="kept", payload={"a": forged, forged: 1}))
    (await service.ask("GET", f"/{forged}")).detail(404)
    await service.ask("GET", "/stats", headers={"Authorization": "Bearer wr0ng"})
    assert await service.terminate() == 0
    lines = service.log().split("\n")
    assert lines.pop() == ""
    said = [re.fullmatch(r"[0-9 :,-]+ - aggregator - ([A-Z]+ - .+)", line)[1] for line in lines]
    assert [line for line in said if re.search("new event|duplicate event", line)] == [
        "INFO - Processed new event: topic=order, event_id=001",
        "INFO - Processed new event: topic=é %s, event_id=🎉",
        "INFO - Processed new event: topic=order.created, event_id=last",
        "WARNING - Dropped duplicate event: topic=order, event_id=001",
        "INFO - Processed new event: topic=order.created, event_id=kept",
    ]
    assert len(said) == 5 + 7, "there is no access log"
    never = "forged|t0ken|wr0ng|Traceback|[\x00-\x09\x0b-\x1f\x7f-\x9f]"
    assert not re.search(never, service.log())


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (logging.DEBUG, ["Processed", "Dropped", "Refused"]),
        (logging.INFO, ["Processed", "Dropped"]),
        (logging.WARNING, ["Dropped"]),
        (logging.ERROR, []),
    ],
)
async def test_each_level_shows_what_belongs_to_it(
    level: int, expected: list[str], service: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, "aggregator")
    await service.publish(event())
    await service.publish(event())
    await service.ask("GET", '/a"%0Aforged')
    await service.stop()
    said = [record.getMessage() for record in caplog.records if record.name == "aggregator"]
    assert [line.split(" ")[0] for line in said] == expected
    if level == logging.DEBUG:
        assert said[-1] == r'''Refused GET "/a\"\nforged": 404 "Not Found"'''


async def test_a_batch_is_logged_line_by_line_in_its_order(
    service: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aggregator")
    await service.publish([event(topic=f"t{n}", event_id=f"%s{n % 3}") for n in (0, 1, 0, 2, 1)])
    await service.stop()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [each for each in said if "event: " in each[1]] == [
        (
            "INFO",
            "\n".join(f"Processed new event: topic=t{n}, event_id=%s{n}" for n in range(3)),
        ),
        (
            "WARNING",
            "\n".join(f"Dropped duplicate event: topic=t{n}, event_id=%s{n}" for n in range(2)),
        ),
    ]


def test_each_line_of_a_record_has_time_and_level() -> None:
    record = logging.LogRecord("a", logging.WARNING, "f", 1, "one\ntwo %s", ("\nthree",), None)
    lines = aggregator.LinesFormatter("%(message)s").format(record).split("\n")
    assert [line[line.index(" - ") :] for line in lines] == [
        " - a - WARNING - one",
        " - a - WARNING - two ",
        " - a - WARNING - three",
    ]
    assert len({line[: line.index(" - ")] for line in lines}) == 1


async def test_a_log_that_nobody_reads_holds_nothing_up(
    process: StartProcess, tmp_path: Path
) -> None:
    service = await process(kind=PipedProcess)
    name = "x" * 512
    for number in range(6):  # 7 MB of lines; a pipe takes 64 KB, and the queue 4 MiB
        batch = [event(topic=name, event_id=f"{number}-{n:0508}") for n in range(1000)]
        assert (await service.publish(batch)).counts == (1000, 1000, 0)
    dropped = await service.metric("aggregator_log_lines_dropped_total")
    assert 1000 < dropped < 6000
    assert await service.health() == 200
    os.set_blocking(service.pipe, True)
    stopping = asyncio.create_task(service.terminate())
    text = service.log() + (await asyncio.to_thread(read_all, service.pipe)).decode()
    assert await stopping == 0
    lines = text.splitlines()
    said = re.findall("WARNING - ([0-9]+) lines of the log were dropped: it was not read", text)
    assert sum(map(int, said)) == dropped
    assert len([line for line in lines if "Processed new event" in line]) == 6000 - dropped
    assert len(rows(service.db)) == 6000


def read_all(descriptor: int) -> bytes:
    """What comes out of a pipe, until its other end is closed."""
    with open(descriptor, "rb") as pipe:
        return pipe.read()


def log_handler(descriptor: int) -> aggregator.LogHandler:
    """The handler of a process whose stderr is that."""
    handler = aggregator.LogHandler(descriptor)
    handler.setFormatter(aggregator.LinesFormatter("%(message)s"))
    return handler


def write_line(handler: aggregator.LogHandler, text: str) -> None:
    handler.emit(logging.LogRecord("a", logging.INFO, "f", 1, text, (), None))
    handler.flush()


@posix
def test_a_line_that_cannot_be_written_is_counted() -> None:
    reader, writer = os.pipe()
    nobody, broken = os.pipe()
    os.close(nobody)
    descriptor = os.dup(writer)
    handler = log_handler(descriptor)
    for lost in ["one\ntwo", "three"], ["four"]:
        os.dup2(broken, descriptor)  # so that each write fails
        for text in lost:
            write_line(handler, text)
        os.dup2(writer, descriptor)
        write_line(handler, "\udc00 again")
    said = os.read(reader, 10_000).decode().splitlines()
    assert [line.partition(" - ")[2] for line in said if "again" in line] == [
        "a - INFO - \\udc00 again",
        "a - INFO - \\udc00 again",
    ]
    assert [line.partition(" - ")[2].partition(":")[0] for line in said if "dropped" in line] == [
        "aggregator - WARNING - 3 lines of the log were dropped",
        "aggregator - WARNING - 1 lines of the log were dropped",
    ]
    assert handler.dropped_lines == 4
    for each in reader, writer, broken, descriptor:
        os.close(each)


@posix
def test_a_long_log_that_is_read_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aggregator, "LOG_QUEUE_BYTES", 500)
    monkeypatch.setattr(aggregator, "LOG_SECONDS", 0.001)
    with (tmp_path / "log").open("wb") as file:
        handler = log_handler(file.fileno())
        for number in range(10):
            write_line(handler, f"line {number} {'x' * 100}")
        assert handler.dropped_lines == 0
        write_line(handler, "x" * 500)
        assert handler.dropped_lines == 1, "too long for the queue"
    assert (tmp_path / "log").read_text().count("line ") == 10


# --- Durability and crashes --------------------------------------------------------------------


def crowded(number: int) -> dict[str, Any]:
    """An event as a function of its number."""
    return event(topic=f"topic {number % 3}", event_id=str(number), payload={"number": number})


@dataclass(slots=True)
class Book:
    """What publishers remember: which events were acknowledged, which may have been sent."""

    acknowledged: set[int]
    sent: int  # events, repeats included
    answers: int

    async def keep_publishing(self, service: Service, chance: random.Random) -> None:
        """Publishes on one connection, single events and batches, until the service is gone."""
        async with aiohttp.ClientSession(timeout=service.session.timeout) as session:
            while True:
                numbers = chance.choices(range(20_000), k=chance.choice([1, 1, 5, 20]))
                body = json_of([crowded(number) for number in numbers])
                self.sent += len(numbers)
                try:
                    async with session.post(
                        f"{service.url}/publish",
                        data=body,
                        headers={"Content-Type": "application/json"},
                    ) as response:
                        answer = await response.read()
                except aiohttp.ClientError:
                    return
                assert response.status in (202, 503), answer
                if response.status == 202:
                    assert json.loads(answer)["received"] == len(numbers)
                    self.acknowledged.update(numbers)
                    self.answers += 1

    async def check(self, service: Service) -> None:
        """Nothing that was acknowledged is missing, nothing is twice, everything adds up."""
        truth = {int(row["event_id"]): row for row in await all_adds_up(service)}
        assert self.acknowledged <= truth.keys()
        assert all(row == crowded(number) for number, row in truth.items())
        received, _, _ = await service.stats()
        assert received <= self.sent


async def test_acknowledged_events_survive_kill_9_under_load(
    process: StartProcess, serve: Serve
) -> None:
    chance = random.Random(9)
    book = Book(set(), 0, 0)
    service = await process()
    for is_last in False, True:
        book.answers = 0
        crowd = [asyncio.create_task(book.keep_publishing(service, chance)) for _ in range(12)]
        enough = chance.randrange(50, 100)
        while book.answers < enough:
            await asyncio.sleep(0.005)
        await service.kill()
        await asyncio.gather(*crowd)
        if not is_last:
            await service.start()
            await book.check(service)
    assert "ERROR" not in service.log()
    await book.check(await serve(service.db))


async def test_two_processes_on_one_file_store_nothing_twice(
    process: StartProcess, serve: Serve
) -> None:
    one = await process()
    services = [one, await serve(one.db)]  # the other process is this one
    chance = random.Random(2)

    async def publisher(service: Service) -> list[tuple[int, int, int]]:
        answers = []
        for _ in range(10):
            batch = [crowded(n) for n in chance.choices(range(400), k=chance.choice([1, 20]))]
            while (answer := await service.publish(batch)).status == 503:
                assert answer.detail(503)  # the other one holds the lock: try again
            answers.append(answer.counts)
        return answers

    crowd = [publisher(service) for service in services for _ in range(10)]
    answers = itertools.chain(*await asyncio.gather(*crowd))
    sums = tuple(map(sum, zip(*answers)))
    for service in services:
        assert await service.stats() == sums
        assert len(await all_adds_up(service)) == sums[1]


@pytest.fixture
def often_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is moved into the database after some pages already."""
    monkeypatch.setattr(aggregator, "CHECKPOINT_PAGES", 60)
    monkeypatch.setattr(aggregator, "CHECKPOINT_RETRY_PAGES", 15)


def log_path(service: Service) -> Path:
    """The write-ahead log."""
    return service.db.with_name(service.db.name + "-wal")


async def keep_writing(service: Service, commits: int) -> None:
    """So many commits of some twenty pages each."""
    for _ in range(commits):
        batch = [event(event_id=str(uuid.uuid4()), source="x" * 400) for _ in range(100)]
        assert (await service.publish(batch)).counts == (100, 100, 0)


async def starts_anew(service: Service) -> int:
    """Writes until the log starts anew from its beginning; returns the number of commits."""

    def salt() -> bytes:  # each log has another one
        return log_path(service).read_bytes()[16:24]

    before = salt()
    commits = 0
    while salt() == before:
        await keep_writing(service, 1)
        commits += 1
        assert commits < 1000
    return commits


async def test_the_log_starts_anew_again_and_again(
    often_checkpoints: None, service: InProcess
) -> None:
    await keep_writing(service, 1)
    for _ in range(4):
        await starts_anew(service)
    assert service.db.stat().st_size > 500_000, "it was moved"
    assert await service.metric("aggregator_checkpoint_failures_total") == 0
    await all_adds_up(service)


async def test_a_checkpoint_that_fails_is_logged_once_and_counted(
    often_checkpoints: None,
    connections: Connections,
    service: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    connections.refuse_checkpoints(True)

    async def have_failed_thrice() -> bool:
        await keep_writing(service, 1)
        return await service.metric("aggregator_checkpoint_failures_total") >= 3

    await until(have_failed_thrice)
    said = errors_logged(caplog)
    assert said == ["Checkpoints fail, so the write-ahead log grows: not authorized"]
    assert await service.health() == 200, "nothing is lost by it"
    connections.refuse_checkpoints(False)
    await starts_anew(service)
    await starts_anew(service)
    said = [record.getMessage() for record in caplog.records]
    assert said.count("Checkpoints work again") == 1
    await all_adds_up(service)


async def test_no_commit_waits_until_moved_pages_are_on_disk(
    often_checkpoints: None, monkeypatch: pytest.MonkeyPatch, service: InProcess
) -> None:
    flushed: list[str] = []  # files, by what the system knows of them
    go_on = threading.Event()

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert go_on.wait(PATIENCE_SECONDS)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    try:
        while not flushed:
            await keep_writing(service, 1)
        await keep_writing(service, 3)
        assert flushed == [str(service.db)]
    finally:
        go_on.set()
    await starts_anew(service)
    await all_adds_up(service)


async def test_moved_pages_are_written_in_parts_of_the_file(
    often_checkpoints: None, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    rounds: list[list[int]] = []  # in each, where parts begin and the last one ends
    sizes: list[int] = []  # of the file, at the end of each round

    def write_part(descriptor: int, start: int, size: int, flags: int) -> int:
        if start == 0:
            rounds.append([0])
            sizes.append(0)
        assert rounds[-1][-1] == start, "nothing is left out"
        rounds[-1].append(start + size)
        sizes[-1] = os.fstat(descriptor).st_size
        return -1  # it does not matter

    monkeypatch.setattr(aggregator, "SYNC_PAGES", 15)
    monkeypatch.setattr(aggregator, "part_writer", lambda: write_part)
    service = await serve()
    await keep_writing(service, 1)
    await starts_anew(service)
    for parts, size in zip(rounds, sizes):
        assert parts[-1] >= size > 0
        assert len(parts) > 2
    assert len(rounds[0]) >= 60 / 15, "some 60 pages were moved"
    await all_adds_up(service)


async def test_moved_pages_are_written_at_once_where_there_is_no_other_way(
    often_checkpoints: None, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(aggregator, "SYNC_PAGES", 15)
    monkeypatch.setattr(aggregator, "part_writer", lambda: None)
    service = await serve()
    await keep_writing(service, 1)
    for _ in range(2):
        await starts_anew(service)
    assert await service.metric("aggregator_checkpoint_failures_total") == 0
    await all_adds_up(service)


async def test_a_fault_of_the_program_in_a_checkpoint_is_counted(
    often_checkpoints: None,
    monkeypatch: pytest.MonkeyPatch,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
) -> None:
    is_faulty = True

    def write_part(descriptor: int, start: int, size: int, flags: int) -> int:
        if is_faulty:
            raise RuntimeError("in /secret/path")
        return 0

    monkeypatch.setattr(aggregator, "SYNC_PAGES", 15)
    monkeypatch.setattr(aggregator, "part_writer", lambda: write_part)
    service = await serve()

    async def has_failed() -> bool:
        await keep_writing(service, 1)
        return await service.metric("aggregator_checkpoint_failures_total") >= 1

    await until(has_failed)
    said = errors_logged(caplog)
    assert said == ["Checkpoints fail, so the write-ahead log grows: RuntimeError"]
    is_faulty = False
    for _ in range(2):
        await starts_anew(service)
    await all_adds_up(service)


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux")
def test_linux_can_write_a_part_of_a_file(tmp_path: Path) -> None:
    write_part = aggregator.part_writer()
    assert write_part is not None
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 10_000)
        file.flush()
        for start in (0, 4096, 2**31, 2**33):
            assert write_part(file.fileno(), start, 4096, aggregator.WRITE_AND_WAIT) == 0
        assert write_part(file.fileno(), -1, 4096, aggregator.WRITE_AND_WAIT) == -1


async def test_a_disk_that_fails_in_a_checkpoint_is_counted(
    often_checkpoints: None,
    monkeypatch: pytest.MonkeyPatch,
    service: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)

        async def has_failed() -> bool:
            await keep_writing(service, 1)
            return await service.metric("aggregator_checkpoint_failures_total") >= 1

        await until(has_failed)
        said = errors_logged(caplog)
        assert said == ["Checkpoints fail, so the write-ahead log grows: Input/output error"]
    await starts_anew(service)
    await all_adds_up(service)


async def test_a_log_that_another_program_holds_is_warned_of_once(
    often_checkpoints: None,
    monkeypatch: pytest.MonkeyPatch,
    service: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert aggregator.WARN_WAL_BYTES == 1e9
    monkeypatch.setattr(aggregator, "WARN_WAL_BYTES", 900_000)
    await keep_writing(service, 1)
    with contextlib.closing(sqlite3.connect(service.db, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM events").fetchone()
        await keep_writing(service, 60)
        held = log_path(service).stat().st_size
        assert held > 2_000_000, "it cannot start anew"
        said = [record.getMessage() for record in caplog.records]
        assert len([each for each in said if "write-ahead log has grown to" in each]) == 1
        assert await service.metric("aggregator_log_bytes") == held
        other.execute("COMMIT")
    await starts_anew(service)
    assert await starts_anew(service) < 40, "what it was then does not matter any more"
    await all_adds_up(service)


def test_it_closes_though_a_checkpoint_is_due(often_checkpoints: None, tmp_path: Path) -> None:
    for number in range(10):
        store = SqliteStore(str(tmp_path / "events.db"))
        for start in range(0, 400, 100):
            ids = range(number * 1000 + start, number * 1000 + start + 100)
            store.commit([validate(json_of(numbered(ids, source="x" * 400)), store.encode)])
        store.close()
        assert [path.name for path in tmp_path.iterdir()] == ["events.db"]
    assert len(rows(tmp_path / "events.db")) == 4000


# --- Overload and bad clients ------------------------------------------------------------------


async def test_beyond_the_bytes_in_flight_a_request_is_503(
    serve: Serve,
) -> None:
    service = await serve(max_body_bytes=1000, max_in_flight_bytes=1500)
    body = json_of(event(event_id="slow")).ljust(1000)
    async with service.connection(request(body[:-1], length=1000)) as slow:
        await until(lambda: in_flight(service, 999))
        answer = await service.publish(json_of(event()).ljust(502))
        assert answer.detail(503)
        assert (await service.publish(json_of(event()).ljust(501))).counts == (1, 1, 0)
        await slow.send(body[-1:])
        assert (await slow.answer()).counts == (1, 1, 0)
    assert await in_flight(service, 0)
    assert (await service.publish(json_of(event()).ljust(1000))).counts == (1, 0, 1)


async def test_an_unpacked_body_counts_with_its_full_size(disk: Disk, serve: Serve) -> None:
    service = await serve(max_body_bytes=1000, max_in_flight_bytes=1500)
    small, large = (gzip.compress(json_of(event()).ljust(size)) for size in (200, 1000))
    with disk.held():
        waiting = [asyncio.create_task(service.publish(small, Content_Encoding="gzip"))]
        await until(lambda: in_flight(service, 200))
        waiting += [asyncio.create_task(service.publish(large, Content_Encoding="gzip"))]
        await until(lambda: in_flight(service, 1200))
        (await service.publish(large, Content_Encoding="gzip")).detail(503)
    assert sorted([(await answer).counts for answer in waiting]) == [(1, 0, 1), (1, 1, 0)]
    await until(lambda: in_flight(service, 0))


async def test_a_failing_disk_lets_the_bodies_go_at_once(
    disk: Disk, service: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    disk.error = aggregator.Unavailable("database or disk is full")
    body = json_of(event(payload={"text": "x" * 500_000}))
    with memory() as measured:
        for _ in range(20):
            (await service.publish(body)).detail(503)
    assert errors_logged(caplog) == ["Commits fail: database or disk is full"]
    assert measured.held < 5_000_000, "of twice 10 MB"


async def test_bytes_are_in_flight_until_the_commit(disk: Disk, serve: Serve) -> None:
    service = await serve(max_body_bytes=1000, max_in_flight_bytes=2000)
    body = json_of(event()).ljust(900)
    with disk.held():
        waiting = [asyncio.create_task(service.publish(body)) for _ in range(2)]
        await until(lambda: in_flight(service, 1800))
        assert (await service.publish(body)).detail(503)
    assert sorted([(await answer).counts for answer in waiting]) == [(1, 0, 1), (1, 1, 0)]
    await until(lambda: in_flight(service, 0))


async def test_a_body_counts_by_what_has_arrived_of_it(serve: Serve) -> None:
    service = await serve(max_body_bytes=100_000, max_in_flight_bytes=100_000)
    async with contextlib.AsyncExitStack() as stack:
        for sent in range(1, 201):  # each announces all the room that there is
            begun = request(b"[", length=100_000)
            await stack.enter_async_context(service.connection(begun))
        await until(lambda: in_flight(service, sent))
        for number in range(20):
            assert (await service.publish(event(event_id=str(number)))).counts == (1, 1, 0)
    await until(lambda: in_flight(service, 0))


async def test_small_bodies_in_chunks_exclude_nobody(disk: Disk, serve: Serve) -> None:
    service = await serve(max_body_bytes=100_000, max_in_flight_bytes=100_000)

    bodies = [json_of(event(event_id=str(number))) for number in range(20)]
    with disk.held():
        waiting = [asyncio.create_task(service.publish(in_chunks(body))) for body in bodies]
        await until(lambda: in_flight(service, sum(map(len, bodies))))
    assert {(await answer).counts for answer in waiting} == {(1, 1, 0)}


def hurry_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where room is short, every body is too slow."""
    monkeypatch.setattr(aggregator, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(aggregator, "SLOW_BYTES_PER_SECOND", 10**9)


async def test_a_body_that_has_arrived_is_not_hurried_any_more(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, serve: Serve
) -> None:
    hurry_everybody(monkeypatch)
    service = await serve(max_body_bytes=1000, max_in_flight_bytes=1500)
    body = json_of(event()).ljust(1000)
    for _ in range(2):
        async with service.connection(request(body[:-1], length=1000)) as client:
            with disk.held():
                await until(lambda: in_flight(service, 999))
                await client.send(body[-1:])
                await until(lambda: in_flight(service, 1000))
                (await service.publish(body)).detail(503)  # which hurries those that are slow
            assert (await client.answer()).status == 202
    assert await in_flight(service, 0)


@pytest.mark.parametrize(
    ("seconds", "bytes_per_second", "is_hurried"),
    [(0.0, 10**9, True), (0.0, 0, False), (60.0, 10**9, False)],
)
async def test_only_a_body_that_hardly_moves_is_hurried(
    seconds: float,
    bytes_per_second: int,
    is_hurried: bool,
    monkeypatch: pytest.MonkeyPatch,
    serve: Serve,
) -> None:
    monkeypatch.setattr(aggregator, "SLOW_SECONDS", seconds)
    monkeypatch.setattr(aggregator, "SLOW_BYTES_PER_SECOND", bytes_per_second)
    service = await serve(max_body_bytes=1000, max_in_flight_bytes=1500)
    body = json_of(event()).ljust(1000)
    async with service.connection(request(body[:-1], length=1000)) as client:
        await until(lambda: in_flight(service, 999))
        (await service.publish(body)).detail(503)
        if not is_hurried:
            await client.send(body[-1:])
        assert (await client.answer()).status == (503 if is_hurried else 202)


async def large_log(service: Service, megabytes: int) -> None:
    """More than the sockets on the way to a reader can hold."""
    for number in range(megabytes):
        body = event(event_id=str(number), payload={"text": "x" * 1_000_000})
        assert (await service.publish(body)).counts == (1, 1, 0)


async def test_a_reader_that_takes_nothing_is_let_go(
    monkeypatch: pytest.MonkeyPatch, service: InProcess
) -> None:
    assert aggregator.READER_SECONDS == 60
    await large_log(service, 8)
    monkeypatch.setattr(aggregator, "READER_SECONDS", 0.5)
    began = time.monotonic()
    feed = reading("/events", accept="text/event-stream")
    async with service.connection(reading("/events")) as one, service.connection(feed) as other:
        await until(one.is_reset)
        await until(other.is_reset)
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    await until(lambda: subscribers(service, 0))
    assert len(await service.stored()) == 8, "who takes something now and then may go on"


async def test_a_reader_that_stops_just_before_the_end_is_let_go(
    monkeypatch: pytest.MonkeyPatch, service: InProcess
) -> None:
    async def never_ends(response: web.StreamResponse, data: bytes = b"") -> None:
        await asyncio.Event().wait()  # as aiohttp does until the client has taken nearly all

    await service.publish(event())
    monkeypatch.setattr(aggregator, "READER_SECONDS", 0.2)
    monkeypatch.setattr(web.StreamResponse, "write_eof", never_ends)
    async with service.connection(reading("/events")) as client:
        with pytest.raises(ConnectionResetError):
            await client.reader.read()


async def test_readers_that_read_nothing_leave_room_for_the_others(
    monkeypatch: pytest.MonkeyPatch, service: InProcess
) -> None:
    await large_log(service, 8)
    monkeypatch.setattr(aggregator, "READERS_BYTES", 1_500_000)
    monkeypatch.setattr(aggregator, "STUCK_SECONDS", 0.1)
    monkeypatch.setattr(aggregator, "ROOM_SECONDS", 0.05)
    monkeypatch.setattr(aggregator, "SLOW_SECONDS", 0.05)
    async with contextlib.AsyncExitStack() as stack:
        stuck = [
            await stack.enter_async_context(service.connection(reading(f"/events?after={n}")))
            for n in range(3)
        ]
        for client in stuck:
            await client.reader.readuntil(b"event_id")
        assert len(await service.stored()) == 8
        assert any(client.is_reset() for client in stuck)
    assert len(await service.stored()) == 8


async def test_what_readers_share_counts_once_until_the_last_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aggregator, "READERS_BYTES", 6400)
    room = aggregator.ReadersRoom()
    assert room.page_bytes() == 100
    piece = bytes(3200)
    other = bytes(3200)
    with room.holding(piece):
        with room.holding(piece):
            assert (room.page_bytes(), room.is_full) == (50, False)
            with room.holding(other):
                assert (room.page_bytes(), room.is_full) == (1, True)
        assert room.page_bytes() == 50
    assert (room.page_bytes(), room.is_full) == (100, False)
    monkeypatch.setattr(aggregator, "READERS_BYTES", 10**9)
    assert room.page_bytes() == 64 * 1024


async def test_the_fuller_the_readers_room_the_smaller_the_pages(
    monkeypatch: pytest.MonkeyPatch, reads: Reads, service: InProcess
) -> None:
    await large_log(service, 8)
    await service.publish(numbered(range(100, 120)))
    monkeypatch.setattr(aggregator, "READERS_BYTES", 2_000_000)
    async with service.connection(reading("/events")) as client:
        await client.reader.readuntil(b"event_id")

        async def is_stuck() -> bool:
            before = reads.count("page")
            await service.stats()
            return reads.count("page") == before

        await until(is_stuck)
        reads.calls.clear()
        assert len(await service.stored(topic="order.created", tail=15)) == 15
        asked = [arguments[-1] for name, arguments in reads.calls if name == "page"]
        assert 1 <= max(asked) <= 1_000_000 // 64, "an event of 1 MB waits for its reader"


async def test_senders_of_half_a_body_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    hurry_everybody(monkeypatch)
    service = await serve(max_body_bytes=1000, max_in_flight_bytes=1700)
    whole = request(json_of(event()).ljust(1000))
    async with contextlib.AsyncExitStack() as connections:
        slow, crowd = [
            [
                await connections.enter_async_context(service.connection(sent))
                for sent in [begun] * number
            ]
            for begun, number in ((whole[:-500], 3), (b"", 50))
        ]
        await until(lambda: in_flight(service, 3 * 500))
        for client in crowd:
            await client.send(whole)
            await asyncio.sleep(0)  # so that they come at every moment of making room
        for client in slow:
            assert (await client.answer()).detail(503)
        assert {(await client.answer()).status for client in crowd} <= {202, 503}
        assert (await service.publish(event())).status == 202
    assert rows(service.db) == [event()]


async def test_silent_connections_keep_nobody_out(service: InProcess) -> None:
    async with contextlib.AsyncExitStack() as connections:
        for half in [b"", b"POST /pub", request(b'{"topic"', length=500)] * 60:
            await connections.enter_async_context(service.connection(half))
        assert (await service.publish(event())).counts == (1, 1, 0)


@posix
async def test_established_clients_are_served_without_free_descriptors(
    process: StartProcess,
) -> None:
    service = await process(ulimit="-n 64")
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def publish(number: int) -> int:
            body = json_of(event(event_id=str(number)))
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{service.url}/publish", data=body, headers=headers) as answer:
                return answer.status

        assert await publish(0) == 202
        for _ in range(150):
            await stack.enter_async_context(service.connection())
        await until(lambda: "New connections cannot be accepted" in service.log())
        assert [await publish(number) for number in range(1, 50)] == [202] * 49
        began = time.monotonic()
        assert await service.terminate() == 0
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert service.log().count("cannot be accepted") == 1, "once a minute"
    assert "Traceback" not in service.log()


@posix
async def test_it_runs_with_few_open_files_and_little_stack(process: StartProcess) -> None:
    resource = pytest.importorskip("resource")
    service = await process(ulimit="-Sn 256; ulimit -s 512")
    if hasattr(resource, "prlimit"):  # only Linux tells the limits of another process
        soft, hard = resource.prlimit(service.popen.pid, resource.RLIMIT_NOFILE)
        assert soft == min(10_000, hard), "it is raised"
    for depth in 20_000, 4000, 1000, 501:
        for inner in nested(depth), b"[" * depth + b"]" * depth:
            for outer in b'{"a":%b}', b"[%b]", b'{"event_id":1,"payload":%b}':
                (fault,) = (await service.publish(outer % inner)).detail(422)
                assert fault == TOO_DEEP
    assert (await service.publish(nested_event(499))).counts == (1, 1, 0)
    for accept in "application/json", "text/event-stream":
        async with service.connection(reading("/events?limit=1", accept=accept)) as client:
            assert nested(499) in await client.rest()


async def test_an_event_is_stored_though_its_client_hangs_up(
    disk: Disk, service: InProcess
) -> None:
    with disk.held():
        async with service.connection(request(json_of(event()))):
            await until(lambda: disk.groups)
        neighbour = asyncio.create_task(service.publish(event(event_id="2")))
        await until(lambda: in_flight(service, 2 * len(json_of(event()))))
        async with service.connection(request(json_of(event(event_id="3")))):
            await until(lambda: queued(service, 2))
    assert (await neighbour).counts == (1, 1, 0)
    await until(lambda: len(rows(service.db)) == 3)
    assert await service.stats() == (3, 3, 0)
    await until(lambda: in_flight(service, 0))


GARBAGE = [
    b"\r\n\r\n",
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    bytes(range(256)) * 4,
    b"GET /events?topic=\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    request(b"{}", length="-1"),
    request(b"{}", length="9" * 30),
    request(b"{}", headers="Transfer-Encoding: chunked\r\n"),
    request(b"{}", headers="Content-Length: 7\r\n"),
    request(b"{}", headers="Content-Encoding: \xff\r\n"),
    request(b"{}", headers="Content-Type: \xff\r\n"),
    request(b"{}", headers="Expect: the unexpected\r\n"),
    request(b"", length=5),
    CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    CHUNKED + b"ffffffffffffffff\r\n",
]


async def test_whatever_one_client_sends_its_neighbours_are_served(
    process: StartProcess,
) -> None:
    service = await process("--max-body-bytes", "300000")
    chance = random.Random(66)
    statuses: Counter[int] = Counter()
    bodies = [body for body, _ in BAD_BODIES]
    bodies += [json_of(event(**{field: value})) for field, value, _ in BAD_FIELDS[::7]]
    bodies += [json_of([*numbered(range(50)), 5]), json_of([{}] * 100_000)]
    nested = [b'{"a":' * depth + b"1" + b"}" * depth for depth in range(950, 1003, 3)]
    bodies += [json_of(event(payload="HERE", source=5)).replace(b'"HERE"', deep) for deep in nested]
    bodies += [bytes(chance.choices(range(256), k=50)) for _ in range(20)]
    for body in [json_of(event())] * 100:  # a byte is changed, lost or doubled
        at = chance.randrange(len(body))
        piece = chance.choice([b"", bytes([chance.randrange(256)]), body[at : at + 1] * 2])
        bodies.append(body[:at] + piece + body[at + 1 :])

    async def poisoner() -> None:
        for body in bodies:
            encoding = chance.choice(["identity"] * 8 + ["gzip", "deflate"])
            statuses[(await service.publish(body, Content_Encoding=encoding)).status] += 1
        for garbage in GARBAGE:
            async with service.connection(garbage) as client:
                client.end()  # so that an answer comes, or the end
                with contextlib.suppress(ConnectionError):
                    assert b" 500 " not in await client.rest()
            async with service.feed() as feed:
                await feed.take(1)  # and gone

    async def neighbour(name: str) -> int:
        count = 0
        while not poison.done():
            sent = event(topic="good", event_id=f"{name} {count}")
            assert (await service.publish(sent)).counts == (1, 1, 0)
            count += 1
        return count

    poison = asyncio.create_task(poisoner())
    stored = sum(await asyncio.gather(*map(neighbour, "ab")))
    await poison
    assert set(statuses) == {202, 400, 413, 422} and statuses[422] > 100, statuses
    assert len(await service.stored(topic="good")) == stored > 0
    await all_adds_up(service)
    assert await service.terminate() == 0
    assert "Traceback" not in service.log() and "ERROR" not in service.log()


# --- Stopping ----------------------------------------------------------------------------------


async def test_what_was_accepted_before_the_stop_is_stored_and_answered(
    disk: Disk, service: InProcess
) -> None:
    body = json_of(event(event_id="half"))
    async with commit_held(disk, service) as waiting:
        waiting += [asyncio.create_task(service.publish(numbered([n]))) for n in range(5)]
        await until(lambda: queued(service, 5))
        async with service.connection(request(body[:-1], length=len(body))) as half:
            before = await service.metric("aggregator_in_flight_bytes")
            stopping = asyncio.create_task(service.stop())
            assert before > 0
            assert (await half.answer()).detail(503)  # and what was not, is refused
        assert not stopping.done()
    answers = [await answer for answer in waiting]
    await stopping
    assert [answer.counts for answer in answers] == [(1, 1, 0)] * 6
    assert sorted(row["event_id"] for row in rows(service.db)) == [*"01234", "held"]


async def test_what_was_accepted_is_stored_though_the_disk_is_slow(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, serve: Serve
) -> None:
    monkeypatch.setattr(aggregator, "SHUTDOWN_SECONDS", 0.01)
    service = await serve()
    async with commit_held(disk, service) as waiting:
        waiting += [asyncio.create_task(service.publish(numbered([n]))) for n in range(2, 4)]
        await until(lambda: queued(service, 2))
        stopping = asyncio.create_task(service.stop())
        await until(lambda: all(answer.done() for answer in waiting))
    for answer in waiting:
        assert isinstance(answer.exception(), aiohttp.ClientError)
    await stopping
    assert sorted(row["event_id"] for row in rows(service.db)) == ["2", "3", "held"]


async def test_a_disk_that_fails_is_not_tried_while_stopping(
    disk: Disk, service: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    disk.error = aggregator.Unavailable("database is locked")
    (await service.publish(event())).detail(503)
    async with commit_held(disk, service) as waiting:
        waiting += [asyncio.create_task(service.publish(event())) for _ in range(3)]
        await until(lambda: queued(service, 3))
        before = await service.metric("aggregator_in_flight_bytes")
        async with service.connection(request(b"[", length=9)) as half:
            await until(lambda: in_flight(service, 1 + before))
            stopping = asyncio.create_task(service.stop())
            (await half.answer()).detail(503)  # so it is stopping
    for answer in waiting:
        (await answer).detail(503)
    await stopping
    assert disk.groups == [1, 1], "only the one that was on its way"
    caplog.clear()


async def test_sigterm_under_load_ends_it_cleanly(process: StartProcess, serve: Serve) -> None:
    chance = random.Random(15)
    book = Book(set(), 0, 0)
    service = await process()
    crowd = [asyncio.create_task(book.keep_publishing(service, chance)) for _ in range(12)]
    half = request(b'{"topic"', length=500)
    async with service.feed() as feed, service.connection(half) as slow:
        await until(lambda: book.answers >= 50)
        assert await service.terminate() == 0, "it has not run out of time"
        with contextlib.suppress(asyncio.IncompleteReadError):
            assert (await slow.answer()).detail(503)
        assert await feed.take(10**6), "the feed ends as a feed should"
    await asyncio.gather(*crowd)
    assert aggregator.SHUTDOWN_SECONDS == 1, "aiohttp waits twice so long at most"
    assert [path.name for path in service.db.parent.iterdir()] == ["events.db"]
    await book.check(await serve(service.db))


@posix
async def test_a_second_signal_ends_it_at_once(process: StartProcess) -> None:
    service = await process()
    with locked(service.db):  # so that there is something to wait for
        body = json_of(event())
        waiting = asyncio.create_task(service.publish(body))
        await until(lambda: in_flight(service, len(body)))
        service.popen.send_signal(signal.SIGTERM)
        await until(lambda: "Stopping" in service.log())
        assert await service.terminate(signal.SIGINT) == 128 + signal.SIGINT
        with pytest.raises(aiohttp.ClientError):
            await waiting
    assert "Traceback" not in service.log()


@posix
@pytest.mark.parametrize("second", ["SIGTERM", "SIGALRM"])
@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_a_stop_that_hangs_ends_before_docker_kills_it(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarms: list[int] = []
    stops: list[str] = []
    exits: list[int] = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    monkeypatch.setattr(os, "_exit", exits.append)
    with handlers_restored():
        aggregator.handle_signals(lambda: stops.append("stop"))
        assert (alarms, stops) == ([], [])
        signal.raise_signal(getattr(signal, first))
        assert (alarms, stops, exits) == ([9], ["stop"], [])
        signal.raise_signal(getattr(signal, second))
    assert exits[0] == 128 + getattr(signal, second)


@posix
def test_a_terminal_that_closes_stops_it_but_for_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "alarm", lambda seconds: None)
    stops: list[str] = []
    with handlers_restored():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        aggregator.handle_signals(lambda: stops.append("ignored"))
        signal.raise_signal(signal.SIGHUP)
        assert stops == []
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        aggregator.handle_signals(lambda: stops.append("stop"))
        signal.raise_signal(signal.SIGHUP)
    assert stops == ["stop"]


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """After what handles signals for the whole process."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGALRM")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_a_lock_and_a_stuck_reader_delay_the_stop_little(
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(aggregator, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(aggregator, "SHUTDOWN_SECONDS", 0.1)
    monkeypatch.setattr(signal, "alarm", lambda seconds: None)
    service = Service(tmp_path / "events.db")
    with handlers_restored():
        settings = Settings(port=0, db=str(service.db))
        serving = asyncio.create_task(aggregator.serve(settings))
        place = await until(lambda: re.search(r"Running on http://localhost:(\d+)", caplog.text))
        service.port = int(place[1])
        await large_log(service, 8)
        disk.groups.clear()
        lines = reading("/events", version="1.0", accept="application/jsonl")
        async with service.connection(lines) as reader:
            await reader.reader.readuntil(b"event_id")
            with locked(service.db):
                bodies = [event(topic="late", event_id=str(n)) for n in range(5)]
                async with commit_held(disk, service) as waiting:
                    await queue_up(service, waiting, bodies)
                    signal.raise_signal(signal.SIGTERM)
                    await until(lambda: is_closed(service))
                await asyncio.wait([serving], timeout=PATIENCE_SECONDS / 4)
                assert serving.done() and serving.result() == 0
            for answer in waiting:
                with contextlib.suppress(aiohttp.ClientError):
                    (await answer).detail(503)
            with pytest.raises(ConnectionResetError):
                await reader.rest()
    await service.session.close()
    assert len(disk.groups) <= 2, "it waits for the lock, but not once for each request"
    assert len(rows(service.db)) == 8
    assert errors_logged(caplog) == ["Commits fail: database is locked"]


async def test_what_comes_during_the_stop_is_503(disk: Disk, service: InProcess) -> None:
    commits = service.app[aggregator.COMMITS_KEY]
    commits.stop()
    assert (await service.publish(event())).detail(503) == "The service is stopping"
    assert await service.stored() == []
    async with service.feed() as feed:
        assert await feed.take(1) == [], "a feed that begins now ends at once"
    assert disk.groups == []


# --- publisher.py ------------------------------------------------------------------------------
# StandIn and its fixtures, then: what is sent, the verdict, troubles and pauses, the command line,
# and last the real thing against the real service.

Event = dict[str, Any]
Trouble = Callable[[int, web.Request], Awaitable[web.Response | None]]


async def no_trouble(_post: int, _request: web.Request) -> web.Response | None:
    """A Trouble: given the number of a POST, from 1, what is answered in place of the truth."""
    return None


class StandIn:
    """A service that stores in a list, and that a test can make fail or lie."""

    def __init__(self) -> None:
        self.log: list[Event] = []  # an event's sequence number is its place, from 1
        self.posts: list[list[Event]] = []  # what came, also if it was not taken
        self.times: list[float] = []  # when each of them came
        self.under_way: list[list[Event]] = []
        self.tokens: set[str | None] = set()
        self.trouble: Trouble = no_trouble
        self.lie: Callable[[list[Event]], object] = lambda log: None  # told once, before reading
        self.counts: Callable[[dict[str, Any]], object] = lambda counts: counts
        self.page: Callable[[dict[str, Any]], object] = lambda page: page

    async def publish(self, request: web.Request) -> web.Response:
        self.times.append(time.monotonic())
        assert request.content_type == "application/json"
        events = (await request.json())["events"]
        self.posts.append(events)
        self.under_way.append(events)
        try:
            troubled = await self.trouble(len(self.posts), request)
        finally:
            self.under_way.remove(events)
        return troubled or web.json_response(self.counts(self.store(events)), status=202)

    def store(self, events: list[Event]) -> dict[str, Any]:
        known = {(old["topic"], old["event_id"]) for old in self.log if old and "topic" in old}
        before = len(self.log)
        for each in events:
            if (each["topic"], each["event_id"]) not in known:
                known.add((each["topic"], each["event_id"]))
                self.log.append(each)
        new = len(self.log) - before
        values = (len(events), new, len(events) - new)
        return dict(zip(COUNTERS, values, strict=True))

    async def events(self, request: web.Request) -> web.Response:
        self.tokens.add(request.headers.get("Authorization"))
        if request.query["after"] == "latest":
            if self.posts:
                self.lie(self.log)
            after = len(self.log)
        else:
            after = int(request.query["after"])
        events = self.log[after : after + int(request.query["limit"])]
        page = {"after": after, "events": events, "count": len(events)}
        page["last_seq"] = after + len(events)
        answer = self.page(page)
        return answer if isinstance(answer, web.Response) else web.json_response(answer)


@pytest_asyncio.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    """A StandIn that listens at `stand_in.url`."""
    found = StandIn()
    app = web.Application(client_max_size=2**24)
    app.add_routes([web.post("/publish", found.publish), web.get("/events", found.events)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


class Ended(NamedTuple):
    """What a run of the publisher ends in."""

    code: int
    out: str
    err: str

    @property
    def verdict(self) -> str:
        """The last line of the report."""
        return self.out.splitlines()[-1]


@pytest.fixture
def signals() -> Iterator[None]:
    """Gives the handlers of signals back that the publisher takes."""
    handlers = {number: signal.getsignal(number) for number in publisher.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def simulate(
    stand_in: StandIn, signals: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Awaitable[Ended]]:
    """Runs the publisher in this process: `await simulate(events=20)`."""

    async def run(**changes: Any) -> Ended:
        usual = {"url": stand_in.url, "events": 20, "batch_size": 5, "concurrency": 2, "wait": 5.0}
        capsys.readouterr()
        async with asyncio.timeout(PATIENCE_SECONDS):
            code = await publisher.simulate(publisher.Settings(**(usual | changes)))
        return Ended(code, *capsys.readouterr())

    return run


Simulate = Callable[..., Awaitable[Ended]]


def planned(**changes: Any) -> publisher.Run:
    """A run as it is planned."""
    return publisher.plan(publisher.Settings(**changes))


PINNED_EVENT = (
    '{"topic":"user.registered","event_id":"09d6c961-74d5-40ef-a0a7-084411cf0719",'
    '"timestamp":"2025-10-24T10:30:00.001Z","source":"publisher-68f63c9a1fe6",'
    r'"payload":{"user_id":1,"age":9,"name":"Zoë \"Z\" \u0141uk","referrer":null}}'
)


def answers_with(status: int, times: int = 1, **headers: str) -> Trouble:
    """A Trouble: the first requests get this status."""

    async def trouble(post: int, _request: web.Request) -> web.Response | None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, text="no", headers=names) if post <= times else None

    return trouble


# What it sends.


@needs_publisher
def test_the_number_of_an_event_is_in_its_id() -> None:
    noise = bytes(9 * 5) + bytes.fromhex("0123456789abcdef01")
    run = publisher.Run(6, "publisher-1", 0, 0xFFFFFFFFFFFF, noise, array.array("L", range(6)))
    assert run.event_id(5) == "01234567-89ab-4cde-af01-fedcba987651"  # as its docstring says
    assert [run.number(run.event_id(number)) for number in range(6)] == list(range(6))
    for other in (
        "01234567-89ab-4cde-af01-fedcba987650",  # event 4 of other noise
        "01234567-89ab-4cde-af01-fedcba98765e",  # number 10, and there are 6
        "01234567-89ab-4cde-af02-fedcba987651",
        "01234567-89AB-4cde-af01-fedcba987651",
        "",
        "5",
    ):
        assert run.number(other) is None, other


@needs_publisher
async def test_what_it_sends_is_valid_and_has_unique_ids() -> None:
    run = planned(events=1000, duplicate_rate=0.0)
    events = [json.loads(run.event(number)) for number in range(1000)]
    body = run.body(run.order)
    assert json.loads(body) == {"events": events}
    assert faults_of(body) == []
    assert len({each["event_id"] for each in events}) == 1000
    assert {each["source"] for each in events} == {run.source}
    assert len({each["topic"] for each in events}) == len(publisher.TOPICS)
    assert len({each["timestamp"] for each in events}) == 1000
    times = [datetime.datetime.fromisoformat(each["timestamp"]) for each in events]
    assert times == sorted(times)
    assert (times[-1] - times[0]).total_seconds() == 0.999
    assert -PATIENCE_SECONDS < times[-1].timestamp() - time.time() < 1


@needs_publisher
@pytest.mark.parametrize(
    ("events", "rate", "unique"),
    [(5000, 0.2, 4000), (10, 0.0, 10), (10, 0.99, 1), (1, 0.5, 1), (3, 0.5, 1), (7, 0.3, 5)],
)
def test_the_share_of_repeats_is_as_asked(events: int, rate: float, unique: int) -> None:
    run = planned(events=events, duplicate_rate=rate)
    assert (run.unique, len(run.order), set(run.order)) == (unique, events, set(range(unique)))


@needs_publisher
def test_a_seed_makes_the_same_bytes_every_time() -> None:
    def body(**changes: Any) -> bytes:
        run = planned(**{"events": 300, "duplicate_rate": 0.2} | changes)
        return run.body(run.order)

    assert body(seed=7) == body(seed=7)
    assert body(seed=7) != body(seed=8)
    assert body() != body()
    ids = [
        {each["event_id"] for each in json.loads(body(**changes))["events"]}
        for changes in ({"seed": 7}, {"seed": 7, "events": 301}, {"seed": 8}, {})
    ]
    assert sum(map(len, ids)) == len(set.union(*ids)), "another run has other ids"
    # In another process, on another day, with another Python: this.
    assert planned(events=300, duplicate_rate=0.2, seed=7).event(1) == PINNED_EVENT


@needs_publisher
def test_repeats_fall_into_the_same_batch_the_next_and_any() -> None:
    run = planned(events=10_000, duplicate_rate=0.2, batch_size=50)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(run.order):
        places.setdefault(number, []).append(place // 50)
    distances = [later - batches[0] for batches in places.values() for later in batches[1:]]
    assert len(distances) == 2000
    near = Counter(min(distance, 5) for distance in distances)
    assert near[0] > 500, "the same batch"
    assert near[1] > 200, "the next one, which is in flight at the same time"
    assert near[5] > 400, "anywhere"


@needs_publisher
async def test_two_requests_at_once_hold_the_same_event(
    stand_in: StandIn, simulate: Simulate
) -> None:
    gate = asyncio.Event()
    under_way: list[list[Event]] = []

    async def hold(_post: int, _request: web.Request) -> None:
        if len(stand_in.under_way) == 8:
            under_way.extend(stand_in.under_way)
            gate.set()
        await gate.wait()

    stand_in.trouble = hold
    assert (await simulate(events=500, duplicate_rate=0.5, concurrency=8, seed=1)).code == 0
    ids = [{each["event_id"] for each in events} for events in under_way[:8]]
    assert sum(map(len, ids)) > len(set.union(*ids))


@needs_publisher
async def test_each_batch_goes_out_once_in_order_with_the_token(
    stand_in: StandIn, simulate: Simulate
) -> None:
    ended = await simulate(events=23, batch_size=5, concurrency=1, seed=3, api_token="t0ken")
    assert ended.code == 0
    run = planned(events=23, batch_size=5, seed=3)
    sent = [each for events in stand_in.posts for each in events]
    assert sent == json.loads(run.body(run.order))["events"]
    assert [len(events) for events in stand_in.posts] == [5, 5, 5, 5, 3]
    assert stand_in.tokens == {"Bearer t0ken"}


@needs_publisher
async def test_so_many_requests_are_under_way_and_no_more(
    stand_in: StandIn, simulate: Simulate
) -> None:
    gate = asyncio.Event()

    async def hold(_post: int, _request: web.Request) -> None:
        if len(stand_in.under_way) == 3:
            gate.set()
        await gate.wait()
        assert len(stand_in.under_way) <= 3

    stand_in.trouble = hold
    assert (await simulate(events=100, concurrency=3)).code == 0


@needs_publisher
async def test_a_rate_sets_the_earliest_moment_of_each_batch(
    stand_in: StandIn, simulate: Simulate
) -> None:
    began = time.monotonic()
    assert (await simulate(rate=100.0, concurrency=4)).code == 0  # 5 events each 0.05 s
    assert all(came - began > 0.049 * batch for batch, came in enumerate(stand_in.times))


@needs_publisher
async def test_a_delay_is_caught_up_after_it(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds != publisher.LINES_SECONDS:
            pauses.append(seconds)
        await real_sleep(seconds)

    async def hold(post: int, _request: web.Request) -> None:
        if post == 1:
            await real_sleep(0.15)

    stand_in.trouble = hold
    monkeypatch.setattr(publisher.asyncio, "sleep", sleep)
    assert (await simulate(rate=100.0, concurrency=1)).code == 0
    assert len(pauses) == 4
    assert pauses[1] < -0.09 and pauses[2] < -0.04 and pauses[3] < 0.01, pauses


# Its verdict.


@needs_publisher
async def test_an_honest_service_passes_and_the_report_says_so(simulate: Simulate) -> None:
    ended = await simulate(events=50, duplicate_rate=0.2)
    assert ended.code == 0
    outcome = "40 unique events stored exactly once, 10 duplicates dropped"
    assert ended.verdict == f"Verdict: OK - {outcome}"
    for line in (
        r"Planned     50 events: 40 unique, 10 repeats",
        r"Answered    50 events: 40 new, 10 duplicates",
        r"Throughput  [1-9]\d* events/s, [1-9]\d* requests/s, 0\.\d\d s",
        r"Latency     p50 \d+\.\d ms, p95 \d+\.\d ms, p99 \d+\.\d ms \(from first try to 202\)",
        r"Retries     none",
        r"Publisher   \d\.\d\d s of CPU, \d+% of the time",
        r"Read back   40 events of publisher-[0-9a-f]{12}",
    ):
        assert re.search(f"^{line}$", ended.out, re.MULTILINE), line
    assert not re.search("Note|Example|FAILED", ended.out)


def moved_to(topic: str) -> Callable[[Event], Event]:
    return lambda event: event | {"topic": topic}


def with_payload(**changes: Any) -> Callable[[Event], Event]:
    return lambda event: event | {"payload": event["payload"] | changes}


def replaced(change: Callable[[Event], Any], where: int = 3) -> Callable[[list[Event]], None]:
    """A lie: one event comes back changed."""

    def lie(log: list[Event]) -> None:
        log[where] = change(log[where])

    return lie


def to_floats(log: list[Event]) -> None:
    """A lie: a payload with 1.0 in place of 1, which Python takes for equal."""
    where, user = next((n, e) for n, e in enumerate(log) if e["topic"] == "user.registered")
    log[where] = user | {"payload": user["payload"] | {"age": float(user["payload"]["age"])}}
    assert log[where] == user


LIES: dict[str, tuple[Callable[[list[Event]], object], str]] = {
    "one stored twice": (lambda log: log.append(log[3]), "1 stored more than once"),
    "all stored twice": (lambda log: log.extend(log[:]), "20 stored more than once"),
    "two in a row": (lambda log: log.insert(3, log[3]), "1 stored more than once"),
    "stored also under another topic": (
        lambda log: log.append(log[3] | {"topic": "x"}),
        "1 stored more than once",
    ),
    "stored only under another topic": (replaced(moved_to("x")), "1 altered"),
    "capital letters": (replaced(lambda e: e | {"topic": e["topic"].upper()}), "1 altered"),
    "a payload changed": (replaced(with_payload(extra=None)), "1 altered"),
    "a payload lost": (replaced(lambda event: event | {"payload": {}}), "1 altered"),
    "numbers that Python takes for equal": (to_floats, "1 altered"),
    "a payload as text": (replaced(lambda e: e | {"payload": str(e["payload"])}), "1 altered"),
    "another time": (replaced(lambda e: e | {"timestamp": e["timestamp"][:-1]}), "1 altered"),
    "another source": (replaced(lambda event: event | {"source": "x"}), "1 altered"),
    "a field more": (replaced(lambda event: event | {"seq": 4}), "1 altered"),
    "a field less": (replaced(lambda e: {n: e[n] for n in e if n != "timestamp"}), "1 altered"),
    "one lost": (lambda log: log.pop(3), "1 missing"),
    "the first lost": (lambda log: log.pop(0), "1 missing"),
    "the last lost": (lambda log: log.pop(), "1 missing"),
    "all lost": (lambda log: log.clear(), "20 missing"),
    "one invented": (lambda log: log.append(log[3] | {"event_id": "new"}), "1 never sent"),
    "one invented, its id a number": (
        lambda log: log.append(log[3] | {"event_id": 7}),
        "1 never sent",
    ),
    "another id": (
        replaced(lambda e: e | {"event_id": e["event_id"].upper()}),
        "1 never sent, 1 missing",
    ),
    "no event any more": (replaced(lambda event: None), "1 missing"),
    "backwards": (lambda log: log.reverse(), "19 out of order"),
    "neighbours swapped": (lambda log: log.insert(3, log.pop(2)), "1 out of order"),
    "the first request last": (lambda log: log.extend([log.pop(0) for _ in range(5)]), "5 out"),
    "one comes too soon": (lambda log: log.insert(0, log.pop()), "19 out of order"),
}


@needs_publisher
@pytest.mark.parametrize("case", LIES)
async def test_a_lie_about_what_is_stored_is_found(
    case: str, stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "PAGE_EVENTS", 7)
    lie, problem = LIES[case]
    told: list[object] = []
    stand_in.lie = lambda log: told or told.append(lie(log))
    ended = await simulate(duplicate_rate=0.0, concurrency=1, seed=7)
    assert ended.code == 1
    assert ended.verdict.startswith(f"Verdict: FAILED - {problem}"), ended.verdict
    assert ended.verdict.endswith(" (of 20 unique events)")
    problems = [part.split(" ", 1)[1] for part in problem.split(", ")]
    examples = re.findall("^Example     ([a-z ]+): .+$", ended.out, re.MULTILINE)
    assert [name[: len(problem)] for name, problem in zip(examples, problems, strict=True)] == (
        problems
    )


@needs_publisher
async def test_each_problem_is_counted_and_has_one_example(
    stand_in: StandIn, simulate: Simulate
) -> None:
    def lie(log: list[Event]) -> None:
        if len(log) == 20:
            log[4:6] = []
            log[6] = log[6] | {"payload": {}}
            log += [log[0], log[1], log[2], log[3] | {"event_id": "x"}]

    stand_in.lie = lie
    ended = await simulate(duplicate_rate=0.0, concurrency=1)
    found = "1 altered, 3 stored more than once, 1 never sent, 2 missing"
    assert ended.verdict == f"Verdict: FAILED - {found} (of 20 unique events)"
    assert ended.out.count("\nExample     ") == 4
    assert stand_in.log[0]["event_id"] in ended.out


@needs_publisher
async def test_events_of_others_and_requests_at_once_are_no_problem(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "PAGE_EVENTS", 7)
    stand_in.log = [event(event_id="before"), {"anything": 1}, None, []]

    async def mixed(post: int, _request: web.Request) -> None:
        stand_in.log.append(event(event_id=f"beside {post}"))
        if post % 3:  # later ones overtake it
            await asyncio.sleep(0.002)

    stand_in.trouble = mixed
    ended = await simulate(events=200, duplicate_rate=0.4, concurrency=6)
    assert (ended.code, ended.err.count("Waiting")) == (0, 0), ended


@needs_publisher
async def test_the_order_of_keys_and_the_spelling_do_not_matter(
    stand_in: StandIn, simulate: Simulate
) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: turned(value[name]) for name in reversed(value)}
        return value

    stand_in.page = lambda page: web.Response(text=json.dumps(turned(page), indent=1))
    stand_in.lie = lambda log: log.__setitem__(slice(None), [turned(each) for each in log])
    assert (await simulate(events=100)).code == 0


@needs_publisher
def test_json_of_any_depth_can_be_compared() -> None:
    deep: dict[str, Any] = {}
    for _ in range(20_000):
        deep = {"deeper": deep}
    assert publisher.canonical(deep) != publisher.canonical({"deeper": {}})


@needs_publisher
def test_a_repeat_that_overtakes_its_first_sending_is_in_order() -> None:
    run = publisher.Run(2, "publisher-1", 0, 0, bytes(18), array.array("L", [0, 0, 1]))
    tally = publisher.new_tally(3)
    tally.sent[:] = array.array("d", [5.0, 1.0, 0.0])
    tally.answered[:] = array.array("d", [6.0, 2.0, 3.0])
    order = publisher.CommitOrder(run, 1, tally)
    assert order.allows(0) and order.allows(1)


@needs_publisher
async def test_events_behind_the_end_that_it_names_are_seen(
    stand_in: StandIn, simulate: Simulate
) -> None:
    def too_low(page: dict[str, Any]) -> dict[str, Any]:
        return page | {"last_seq": 20} if page["last_seq"] == 21 and not page["events"] else page

    def hide(log: list[Event]) -> None:
        if len(log) == 20:
            log.append(log[0])

    stand_in.lie = hide
    stand_in.page = too_low
    ended = await simulate(duplicate_rate=0.0)
    assert "1 stored more than once" in ended.verdict


# How much too high the counts of each answer are: received, new, duplicates.
FALSE_COUNTS = {
    (1, 0, 0): "4 answers with wrong counts",
    (1, 0, 1): "4 answers with wrong counts",
    (0, 0, 1): "4 answers with wrong counts",
    (0, 1, 0): "4 answers with wrong counts, 1 wrong sums of counts",
    (0, -1, 1): "1 wrong sums of counts",
    (0, -5, 5): "1 wrong sums of counts",
}


@needs_publisher
@pytest.mark.parametrize("off", FALSE_COUNTS)
async def test_a_lie_about_counts_is_found(
    off: tuple[int, int, int], stand_in: StandIn, simulate: Simulate
) -> None:
    stand_in.counts = lambda found: {
        name: found[name] + more for name, more in zip(COUNTERS, off, strict=True)
    }
    ended = await simulate(duplicate_rate=0.0)
    assert ended.code == 1
    assert ended.verdict == f"Verdict: FAILED - {FALSE_COUNTS[off]} (of 20 unique events)"
    received, new, duplicates = (4 * each for each in off)
    said = f"{20 + received} events: {20 + new} new, {duplicates} duplicates"
    assert f"Answered    {said}\n" in ended.out
    assert "Retries     none" in ended.out


@needs_publisher
async def test_a_repeat_that_is_counted_as_new_is_found(
    stand_in: StandIn, simulate: Simulate
) -> None:
    stand_in.counts = lambda found: found | {"unique_processed": 5, "duplicate_dropped": 0}
    ended = await simulate(events=20, duplicate_rate=0.5, seed=1)
    assert ended.code == 1
    assert re.search(r"[1-4] answers with wrong counts, 1 wrong sums of counts", ended.verdict)


@needs_publisher
async def test_what_a_lost_answer_had_stored_counts_as_duplicates(
    stand_in: StandIn, simulate: Simulate
) -> None:
    async def stored_but_not_said(post: int, request: web.Request) -> web.Response | None:
        if post != 2:
            return None
        stand_in.store(stand_in.posts[1])
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    stand_in.trouble = stored_but_not_said
    ended = await simulate(duplicate_rate=0.0)
    assert ended.code == 0, ended
    assert "Note        5 events were stored before, by a try whose answer got lost\n" in ended.out
    assert "Answered    20 events: 15 new, 5 duplicates" in ended.out
    assert "Retries     1 x connection" in ended.out

    # One more than that try can have stored is a lie.
    stand_in.posts.clear()
    stand_in.counts = lambda found: (
        found | {"unique_processed": 4, "duplicate_dropped": 1}
        if found["unique_processed"] and len(stand_in.posts) == 5
        else found
    )
    ended = await simulate(duplicate_rate=0.0, concurrency=1)
    assert "FAILED - 1 wrong sums of counts" in ended.verdict


@needs_publisher
async def test_a_seed_that_was_sent_before_is_all_duplicates(
    stand_in: StandIn, simulate: Simulate
) -> None:
    assert (await simulate(seed=7)).code == 0
    first = sorted(map(str, stand_in.posts))
    stand_in.posts.clear()
    stand_in.log.insert(0, stand_in.log.pop())  # nobody knows who stored them in which order
    again = await simulate(seed=7)
    assert again.code == 0
    assert sorted(map(str, stand_in.posts)) == first
    assert "Answered    20 events: 0 new, 20 duplicates" in again.out
    assert "16 events were stored before, by a try whose answer got lost, or another" in again.out
    stand_in.log.append(stand_in.log[3])
    assert (await simulate(seed=7)).code == 1


@needs_publisher
async def test_the_order_of_a_new_seed_is_judged_too(stand_in: StandIn, simulate: Simulate) -> None:
    stand_in.lie = lambda log: log.reverse()
    ended = await simulate(seed=7, concurrency=1)
    assert "out of order" in ended.verdict


@needs_publisher
async def test_only_what_came_since_it_began_is_read(stand_in: StandIn, simulate: Simulate) -> None:
    starts: list[int] = []
    stand_in.page = lambda page: starts.append(page["after"]) or page
    stand_in.log = [event(event_id=str(number)) for number in range(9)]
    assert (await simulate(duplicate_rate=0.0)).code == 0
    assert starts == [9, 29, 9, 29]  # where the end is, twice; the events; one page more
    starts.clear()
    assert (await simulate(duplicate_rate=0.0, seed=1)).code == 0
    assert starts[2] == 0, "what has a seed may have been stored before"


NO_PAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "events are no list": (lambda page: page | {"events": {}}, "events is no list"),
    "no events": (lambda page: {"last_seq": page["last_seq"]}, "events is no list"),
    "no last_seq": (lambda page: {"events": page["events"]}, "last_seq is null"),
    "last_seq is true": (lambda page: page | {"last_seq": True}, "last_seq is true"),
    "last_seq is text": (lambda page: page | {"last_seq": "20"}, 'last_seq is "20"'),
    "last_seq does not grow": (lambda page: page | {"last_seq": page["after"]}, "last_seq is 0"),
    "a list": (lambda page: page["events"], "[{"),
    "no JSON": (lambda page: web.Response(text="<p>Hello"), "<p>Hello"),
    "no UTF-8": (lambda page: web.Response(body=b"\xff\xfe{"), "not the answer"),
    "too deep": (lambda page: web.Response(text="[" * 200_000), "[[["),
    "without an end": (lambda page: web.Response(text=" " * 100_001), "larger than 100000 bytes"),
}


@needs_publisher
@pytest.mark.parametrize("case", NO_PAGES)
async def test_a_page_that_is_none_ends_the_run(
    case: str, stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "without an end":
        monkeypatch.setattr(publisher, "MAX_ANSWER_BYTES", 100_000)
    lie, why = NO_PAGES[case]
    stand_in.page = lambda page: lie(page) if page["events"] else page
    ended = await simulate()
    assert (ended.code, ended.out) == (1, "")
    assert why in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


@needs_publisher
async def test_a_page_that_skips_or_holds_back_makes_events_missing(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "PAGE_EVENTS", 5)
    stand_in.page = lambda page: page | {"events": page["events"][:-1]}
    assert "FAILED - 4 missing" in (await simulate(duplicate_rate=0.0)).verdict
    stand_in.page = lambda page: (
        page | {"events": [], "last_seq": page["after"]} if page["events"] else page
    )
    assert "FAILED - 20 missing" in (await simulate(duplicate_rate=0.0)).verdict


@needs_publisher
async def test_a_log_that_grows_is_read_to_where_it_ended(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "PAGE_EVENTS", 5)
    pages: list[int] = []

    def grow(page: dict[str, Any]) -> dict[str, Any]:
        if page["events"]:
            pages.append(page["after"])
            stand_in.log.extend(event(event_id=f"{len(pages)}/{n}") for n in range(9))
        return page

    stand_in.page = grow
    assert (await simulate(duplicate_rate=0.0)).code == 0
    assert pages == [0, 5, 10, 15, 20]


@needs_publisher
def test_a_page_of_its_own_events_is_not_too_large() -> None:
    run = planned(events=publisher.PAGE_EVENTS, duplicate_rate=0.0)
    assert 2 * len(run.body(run.order)) < publisher.MAX_ANSWER_BYTES


@needs_publisher
async def test_large_events_of_others_are_read_in_smaller_pages(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MAX_ANSWER_BYTES", 100_000)

    async def beside(post: int, _request: web.Request) -> None:
        stand_in.log.extend(event(payload={"text": "x" * 40_000}) for _ in range(post))

    stand_in.trouble = beside
    assert (await simulate()).code == 0
    stand_in.log.append(event(payload={"text": "x" * 100_000}))
    stand_in.lie = lambda log: log.append(event(payload={"text": "x" * 100_000}))
    ended = await simulate()
    assert ended.code == 1
    assert "larger than 100000 bytes" in ended.err


@needs_publisher
@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.parametrize("value", [None, "5", 5.0, True, -1, 2**63])
async def test_a_count_that_is_no_whole_number_ends_the_run(
    name: str, value: Any, stand_in: StandIn, simulate: Simulate
) -> None:
    stand_in.counts = lambda found: found | {name: value}
    ended = await simulate()
    assert (ended.code, ended.out) == (1, "")
    why = f"not the answer of an event aggregator: {name} is {json.dumps(value)}"
    assert ended.err.splitlines()[-1] == f"publisher: {why}"


# Troubles and pauses.


@needs_publisher
@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_later_is_tried_again(status: int, stand_in: StandIn, simulate: Simulate) -> None:
    stand_in.trouble = answers_with(status, times=2)
    ended = await simulate(concurrency=1)
    assert ended.code == 0
    assert f"Retries     2 x {status}\n" in ended.out
    assert stand_in.posts[0] == stand_in.posts[1] == stand_in.posts[2]


@needs_publisher
@pytest.mark.parametrize("status", [301, 400, 401, 404, 408, 413, 415, 422, 500, 501])
async def test_a_refusal_is_never_tried_again(
    status: int, stand_in: StandIn, simulate: Simulate
) -> None:
    stand_in.trouble = answers_with(status, times=99, Retry_After="0", Location="/elsewhere")
    ended = await simulate(concurrency=1)
    assert (ended.code, ended.out, len(stand_in.posts)) == (1, "", 1)
    where = f"POST {stand_in.url}/publish"
    assert ended.err.splitlines()[-1] == f"publisher: {where} was refused: {status} no"


@needs_publisher
async def test_a_service_that_hangs_or_hangs_up_is_tried_again(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trouble(post: int, request: web.Request) -> None:
        assert request.transport is not None
        if post == 1:
            await asyncio.Event().wait()
        if post == 2:
            request.transport.abort()
        if post == 3:
            request.transport.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 99\r\n\r\n{")
            request.transport.close()
        if post == 4:
            request.transport.write(b"nonsense\r\n\r\n")

    stand_in.trouble = trouble
    monkeypatch.setattr(publisher, "REQUEST_SECONDS", 0.3)
    ended = await simulate(concurrency=1)
    assert ended.code == 0, ended
    assert "Retries     3 x connection, 1 x time-out\n" in ended.out


@needs_publisher
async def test_a_reason_is_one_line_that_cannot_steer_a_terminal(
    stand_in: StandIn, simulate: Simulate
) -> None:
    stand_in.page = lambda page: web.Response(status=500, text="\x1b[2J\n\x07no\r\nway\u2028out")
    ended = await simulate()
    assert ended.err.endswith("&limit=1 was refused: 500 [2J no way out\n")

    async def nonsense(_post: int, request: web.Request) -> None:
        assert request.transport is not None
        request.transport.write(b"\x1b[2Jnonsense\r\n\r\n")

    stand_in.page = lambda page: page
    stand_in.trouble = nonsense
    ended = await simulate(wait=0.0, concurrency=1)
    assert (ended.code, len(ended.err.splitlines())) == (1, 2)
    assert ended.err.removesuffix("\n").replace("\n", "").isprintable()


@needs_publisher
async def test_pauses_are_random_below_a_limit_that_doubles(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        limits.append((low, high))
        return high

    monkeypatch.setattr(publisher.random, "uniform", uniform)
    monkeypatch.setattr(publisher, "BACKOFF_MAX_SECONDS", 0.15)
    stand_in.trouble = answers_with(503, times=4)
    assert (await simulate(concurrency=1)).code == 0
    assert limits == [(0, 0.05), (0, 0.1), (0, 0.15), (0, 0.15)]
    pauses = [later - earlier for earlier, later in itertools.pairwise(stand_in.times[:5])]
    for pause, (_, least) in zip(pauses, limits, strict=True):
        assert pause >= least - 0.001


@needs_publisher
async def test_retry_after_is_waited_for_and_the_pause_added(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(publisher, "retry_after", {"7": 0.1, None: 0.0}.__getitem__)
    stand_in.trouble = answers_with(503, Retry_After="7")
    ended = await simulate(concurrency=1)
    assert ended.code == 0
    assert stand_in.times[1] - stand_in.times[0] >= 0.149
    slowest = re.search(r"p99 (\d+)\.\d ms", ended.out)
    assert slowest and int(slowest[1]) >= 149, "the pause counts: it is what a publisher feels"


@needs_publisher
def test_retry_after_is_seconds_or_a_date_or_nothing() -> None:
    assert publisher.retry_after("0") == 0
    assert publisher.retry_after("120") == 120
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < publisher.retry_after(in_a_minute) <= 60
    long_ago = "Wed, 21 Oct 2015 07:28:00 GMT"
    for nothing in (None, "", "soon", "-1", "1.5", long_ago, "Wed, 21 Oct 99999999 07:28:00 GMT"):
        assert publisher.retry_after(nothing) == 0, nothing


@needs_publisher
async def test_it_gives_up_after_so_long_without_success(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher.random, "uniform", lambda low, high: 99.0)
    stand_in.trouble = answers_with(503, times=999)
    ended = await simulate(concurrency=1, wait=0.3)
    assert (ended.code, ended.out) == (1, "")
    first, *others = stand_in.times
    assert len(others) < 3, "the last try falls on the end of that time"
    assert others[-1] - first > 0.29
    words = r"publisher: gave up on \S+, [\d.]+ s without success: 503 no"
    assert re.fullmatch(words, ended.err.splitlines()[-1]), ended.err


@needs_publisher
def test_a_service_that_hangs_is_tried_again_before_giving_up() -> None:
    assert publisher.BACKOFF_MAX_SECONDS + 2 * publisher.REQUEST_SECONDS < publisher.Settings().wait


@needs_publisher
async def test_it_gives_up_if_asked_to_wait_too_long(stand_in: StandIn, simulate: Simulate) -> None:
    stand_in.trouble = answers_with(503, times=999, Retry_After="6")
    ended = await simulate(concurrency=1)
    assert (ended.code, len(stand_in.posts)) == (1, 1)
    assert ended.err.endswith(": 503 no (it asks for 6 s more)\n")


@needs_publisher
async def test_one_request_may_fail_while_others_go_on(
    stand_in: StandIn, simulate: Simulate
) -> None:
    async def unlucky(post: int, request: web.Request) -> web.Response | None:
        is_first = (await request.json())["events"] == stand_in.posts[0]
        return web.Response(status=503) if is_first and len(stand_in.log) < 80 else None

    stand_in.trouble = unlucky
    ended = await simulate(events=100, duplicate_rate=0.0, rate=150.0, wait=0.45)
    assert ended.code == 0, ended
    assert re.search(r"Retries     \d+ x 503\n", ended.out)


@needs_publisher
async def test_it_says_that_it_waits_only_after_a_failure(
    stand_in: StandIn, simulate: Simulate
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        ended = await simulate(url=url, wait=0.2)
    assert (ended.code, ended.out) == (1, "")
    waiting, gave_up = ended.err.splitlines()
    assert waiting.startswith(f"Waiting for {url}, 0.2 s at most: ")
    assert gave_up.startswith(f"publisher: gave up on {url}, ")
    assert waiting.endswith(" (is aggregator.py running?)")
    assert gave_up.endswith(" (is aggregator.py running?)")

    failures = iter([web.Response(status=503, text="starting"), web.Response(status=503)])
    stand_in.page = lambda page: next(failures, page)
    ended = await simulate()
    assert ended.code == 0
    assert f"Waiting for {stand_in.url}, 5 s at most: 503 starting\n" in ended.err
    assert ended.err.count("Waiting") == 1
    assert "Retries     none" in ended.out, "waiting for the start is no trouble of the run"
    stand_in.trouble = answers_with(503)
    stand_in.posts.clear()
    assert "Waiting" not in (await simulate()).err


# The command line.


@needs_publisher
async def test_it_says_how_to_watch_a_run(stand_in: StandIn, simulate: Simulate) -> None:
    said = (await simulate(events=50)).err
    fast = "as fast as it can (to watch it on the page there: --rate 3)"
    assert said == f"Sending 50 events to {stand_in.url}, {fast}\n"
    said = (await simulate(events=5, rate=2000.0)).err
    assert said == f"Sending 5 events to {stand_in.url}, 2000 events a second\n"


@needs_publisher
async def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    stand_in: StandIn, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = asyncio.Event()

    async def pause(post: int, _request: web.Request) -> web.Response | None:
        if post == 3:
            await half.wait()
        return web.Response(status=503) if post == 2 else None

    async def seen(text: str) -> None:
        await until(lambda: text in shown())
        half.set()

    shown: Callable[[], str]
    stand_in.trouble = pause
    monkeypatch.setattr(publisher, "TERMINAL_SECONDS", 0.01)
    monkeypatch.setattr(publisher, "LINES_SECONDS", 0.01)
    for is_terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda answer=is_terminal: answer
        shown = stream.getvalue
        monkeypatch.setattr(sys, "stderr", stream)
        bar = "\r[###############...............] " if is_terminal else "\n"
        text = f"{bar}Sent 5 of 10 events, 1 retries" + ("" if is_terminal else "\n")
        stand_in.posts.clear()
        half.clear()
        watcher = asyncio.create_task(seen(text))
        ended = await simulate(events=10, concurrency=1)
        await watcher
        assert ended.code == 0
        full = f"\r[{'#' * 30}] Sent 10 of 10 events, 1 retries\n"
        assert (full in shown()) == is_terminal
        assert (f"\r[{'#' * 30}] Read 8 of 8 events, 1 retries\n" in shown()) == is_terminal


@needs_publisher
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_cleanly(number: int, stand_in: StandIn, simulate: Simulate) -> None:
    async def interrupt(post: int, _request: web.Request) -> None:
        if post == 3:
            signal.raise_signal(number)
            signal.raise_signal(number)  # a second one changes nothing
            await asyncio.Event().wait()

    stand_in.trouble = interrupt
    ended = await simulate(concurrency=1)
    assert (ended.code, ended.out) == (128 + number, "")
    name = signal.Signals(number).name
    assert ended.err.splitlines()[-1] == f"publisher: ended by {name}, 10 events acknowledged"
    await until(lambda: not [task for task in asyncio.all_tasks() if "publisher.py" in repr(task)])


@needs_publisher
def test_a_signal_at_the_very_end_does_no_harm(signals: None) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert asyncio.run(publisher.simulate(publisher.Settings(url=url, wait=0.0))) == 1
    for number in publisher.STOP_SIGNALS:
        signal.raise_signal(number)


BAD_FLAGS = {
    "--events": ["0", "-1", "1.5", "many", "", "10000001"],
    "--duplicate-rate": ["1", "1.5", "-0.1", "nan", "x", ""],
    "--batch-size": ["0", "10001", "x"],
    "--concurrency": ["0", "1001", "x"],
    "--rate": ["-1", "inf", "nan", "x"],
    "--seed": ["1.5", "x", ""],
    "--wait": ["-1", "inf", "x"],
    "--api-token": ["two words", "é", "a\nb"],
    "--url": [
        *("localhost:8080", "ftp://localhost", "http://", "http://h:0", "http://h:65536", ""),
        *("http://h:x", "http://[::1", "http://a b", "http://u@h", "http://h?q", "http://h#f"),
        *("http://h/\udcff", "http://" + "h" * 64, "http://h\\x"),
    ],
    "--nonsense": ["1"],
    "--event": ["5"],  # no abbreviations
}


@needs_publisher
@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in BAD_FLAGS.items() for value in values]
)
def test_a_flag_that_makes_no_sense_ends_it_with_2(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        publisher.read_settings([flag, value], {})
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert re.fullmatch(rf"publisher: .*{flag}.*\n", err)


@needs_publisher
def test_a_bad_variable_is_named_an_empty_one_ignored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert publisher.read_settings([], {"TOTAL_EVENTS": "", "API_TOKEN": ""}).events == 5000
    with pytest.raises(SystemExit) as ended:
        publisher.read_settings([], {"TOTAL_EVENTS": "many"})
    said = "publisher: TOTAL_EVENTS must be a whole number, 1 to 10000000, not 'many'\n"
    assert (ended.value.code, capsys.readouterr()) == (2, ("", said))


@needs_publisher
def test_the_settings_are_those_of_the_contract() -> None:
    assert publisher.read_settings([], {"PATH": "/"}) == publisher.Settings(
        url="http://127.0.0.1:8080",
        events=5000,
        duplicate_rate=0.2,
        batch_size=50,
        concurrency=8,
        rate=0.0,
        seed=None,
        wait=30.0,
        api_token=None,
    )
    variables = {
        "AGGREGATOR_URL": "https://[::1]:9/under/",
        "TOTAL_EVENTS": "10000000",
        "DUPLICATE_RATE": "0",
        "BATCH_SIZE": "10000",
        "CONCURRENCY": "1000",
        "API_TOKEN": "t0ken",
    }
    flags = ["--rate", "1.5", "--seed", "-3", "--wait", "0"]
    chosen = publisher.Settings(
        "https://[::1]:9/under", 10_000_000, 0.0, 10_000, 1_000, 1.5, -3, 0.0, "t0ken"
    )
    assert publisher.read_settings(flags, variables) == chosen
    over = ["--url", "http://h", "--events", "1", "--duplicate-rate", "0.9", "--batch-size", "1"]
    over += ["--concurrency", "1", "--api-token", ""]
    assert publisher.read_settings(over, variables) == publisher.Settings(
        "http://h", 1, 0.9, 1, 1, 0.0, None, 30.0, None
    )


@needs_publisher
def test_the_nearest_rank_is_the_percentile() -> None:
    values = [float(number) for number in range(1, 201)]
    assert [publisher.percentile(values, p) for p in (50, 95, 99)] == [100, 190, 198]
    assert [publisher.percentile([7.0], p) for p in (50, 95, 99)] == [7, 7, 7]


@needs_publisher
def test_nobody_has_to_read_what_it_says(capfd: pytest.CaptureFixture[str]) -> None:
    publisher.say("nothing", None)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        publisher.say("nothing", stream)
        publisher.say("nothing", stream)
    assert capfd.readouterr() == ("", "")


# As it is run.


async def started(*flags: str, **environment: str) -> asyncio.subprocess.Process:
    """A running `python publisher.py`; the flags before `publisher.py` are for Python."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *(flags if "publisher.py" in flags else ("publisher.py", *flags)),
        cwd=HERE,
        env=clean_environment(environment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def outcome(running: asyncio.subprocess.Process) -> Ended:
    """Waits for the end of a publisher."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            out, err = await running.communicate()
    except BaseException:
        running.kill()
        await running.wait()
        raise
    assert running.returncode is not None
    return Ended(running.returncode, out.decode(), err.decode())


@needs_publisher
async def test_it_runs_optimized_in_any_locale_and_with_closed_streams(
    stand_in: StandIn,
) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--url", stand_in.url, "--events", "10"]
    closed = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, sys.argv[1:])"
    helped, optimized, unheard = await asyncio.gather(
        *[
            outcome(await started(*arguments, **plain))
            for arguments in (
                ["-OO", "publisher.py", "--help"],
                ["-OO", "publisher.py", *flags],
                ["-c", closed, sys.executable, "publisher.py", *flags],
            )
        ]
    )
    assert (helped.code, helped.err) == (0, "")
    for name in ("simulator", "--url", "AGGREGATOR_URL", "http://127.0.0.1:8080", "Exit status"):
        assert name in helped.out
    assert (optimized.code, unheard.code) == (0, 0), (optimized, unheard)
    assert optimized.verdict.startswith("Verdict: OK - 8 unique")
    assert (unheard.out, unheard.err) == ("", "")
    assert len(stand_in.log) == 16


@needs_publisher
async def test_it_proves_that_each_event_is_stored_exactly_once(process: StartProcess) -> None:
    service = await process(API_TOKEN="t0ken")
    service.session.headers["Authorization"] = "Bearer t0ken"
    flags = ["--url", service.url, "--events", "2000", "--duplicate-rate", "0.2", "--seed", "7"]
    ended = await outcome(await started(*flags, API_TOKEN="t0ken"))
    assert ended.code == 0, ended
    assert ended.verdict.startswith("Verdict: OK - 1600 unique events stored exactly once, 400 ")
    assert await service.stats() == (2000, 1600, 400)
    assert len(await all_adds_up(service)) == 1600


@needs_publisher
async def test_its_verdict_holds_though_the_service_is_killed_under_it(
    process: StartProcess, simulate: Simulate
) -> None:
    service = await process()
    run = {"events": 2000, "duplicate_rate": 0.3, "batch_size": 10, "rate": 4000.0, "wait": 30.0}
    running = asyncio.create_task(simulate(url=service.url, **run))

    async def is_under_way() -> bool:
        return (await service.stats())[1] >= 300

    await until(is_under_way)
    await service.kill()
    assert not running.done()
    await service.start("--port", str(service.port))
    ended = await running
    assert ended.code == 0, ended
    assert re.search(r"Retries     \d+ x connection", ended.out), ended
    assert len(await all_adds_up(service)) == 1400


# --- PostgreSQL --------------------------------------------------------------------------------
# Several aggregators on one database. The tests start a PostgreSQL of their own, or use the one
# whose address is in AGGREGATOR_TEST_POSTGRES; each test has a schema of its own there.

POSTGRES_PASSWORD = "secret-password"
POSTGRES_USER = "secret-user"
POSTGRES_HOST = "secret-host.example"  # found by the hostaddr beside it
SECRETS = re.compile(f"{POSTGRES_PASSWORD}|{POSTGRES_USER}|{re.escape(POSTGRES_HOST)}")


class PostgresServer:
    """A PostgreSQL that can be killed; the folder is its own and is gone at the end."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._data = folder / "data"
        self._log = folder / "log"
        self._owner: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            import pwd

            nobody = pwd.getpwnam("nobody")
            self._owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            shutil.chown(folder, nobody.pw_uid)
        password = folder / "password"
        password.write_text(POSTGRES_PASSWORD)
        self._run(
            "initdb",
            *("--username", POSTGRES_USER, "--pwfile", str(password), "--auth", "scram-sha-256"),
            *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
        )
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), "--pgdata", str(self._data), *arguments]
        with self._log.open("ab") as log:
            done = subprocess.run(command, stdout=log, stderr=log, check=False, **self._owner)
        assert done.returncode == 0, self._log.read_text()

    def start(self) -> None:
        """Returns when it takes connections."""
        # Without fsync: here processes die, and no machine loses its power.
        options = f"-h 127.0.0.1 -p {self._port} -k {self._data} -F"
        self._run("pg_ctl", "--wait", "--silent", "--options", options, "start")

    def stop(self) -> None:
        """Ends all its processes at once, in the middle of whatever they do."""
        self._run("pg_ctl", "--wait", "--silent", "--mode", "immediate", "stop")

    @property
    def address(self) -> str:
        return (
            f"postgresql://{POSTGRES_USER}:{POSTGRES_PASSWORD}@{POSTGRES_HOST}:{self._port}/postgres"
            "?hostaddr=127.0.0.1"
        )


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[PostgresServer]:
    """A server of our own."""
    if os.environ.get("AGGREGATOR_TEST_POSTGRES"):
        pytest.skip("AGGREGATOR_TEST_POSTGRES names a server that is not ours to restart")
    pytest.importorskip(
        "psycopg", reason='needs pip install "psycopg[binary]"', exc_type=ImportError
    )
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (installed and installed[-1])
    if not found:
        pytest.skip("needs PostgreSQL (Debian: apt-get install postgresql)")
    with tempfile.TemporaryDirectory(
        prefix="aggregator-postgres-", dir=folder_in_memory()
    ) as folder:
        server = PostgresServer(Path(found).resolve().parent, Path(folder))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def postgres_address(request: pytest.FixtureRequest) -> str:
    """The address of a database."""
    address = os.environ.get("AGGREGATOR_TEST_POSTGRES")
    if address:
        pytest.importorskip(
            "psycopg", reason='needs pip install "psycopg[binary]"', exc_type=ImportError
        )
        return address
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.address


class Database:
    """A schema of its own in a PostgreSQL, as far as a client of it can see."""

    def __init__(self, address: str) -> None:
        import psycopg

        self.server_address = address
        self.schema = f"test_{random.SystemRandom().getrandbits(48):x}"
        self.address = self.with_options(f"-csearch_path={self.schema}")
        self._connect = functools.partial(psycopg.connect, self.address, autocommit=True)
        self._connection = self._connect()
        self.ask(f"CREATE SCHEMA {self.schema}")

    def with_options(self, options: str) -> str:
        """The address with settings for its connections: "-cname=value"."""
        separator = "&" if "?" in self.server_address else "?"
        return f"{self.server_address}{separator}options={urllib.parse.quote(options)}"

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, through a connection of ours."""
        import psycopg

        try:
            cursor = self._connection.execute(query, values or None)
        except psycopg.OperationalError:
            if not self._connection.broken:
                raise
            self._connection = self._connect()  # the server was started anew
            cursor = self._connection.execute(query, values or None)
        return cursor.fetchall() if cursor.description else []

    def events(self) -> list[tuple[int, str, str]]:
        """The truth: seq, topic and event_id of what is stored, in order."""
        return self.ask(
            "SELECT seq, name, event_id FROM events JOIN topics ON id = topic_id ORDER BY seq"
        )

    def counters(self) -> dict[str, tuple[int, int]]:
        """By topic, and for all ("") together: received and stored."""
        found = self.ask(
            "SELECT name, received, stored FROM topics"
            " UNION ALL SELECT '', received, stored FROM aggregator"
        )
        return {name: (received, stored) for name, received, stored in found}

    def backends(self) -> list[int]:
        """The server's processes for the connections of aggregators to this schema."""
        found = self.ask(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'event-aggregator'"
        )
        return [process_id for (process_id,) in found]

    def drop(self) -> None:
        """Takes it away."""
        self.ask(f"DROP SCHEMA {self.schema} CASCADE")
        self._connection.close()


def rows_of_postgres(address: str, query: str) -> list[dict[str, Any]]:
    """What `rows` reads."""
    import psycopg
    from psycopg.rows import dict_row

    with psycopg.connect(address, row_factory=dict_row) as truth:
        return list(truth.execute(query))


# These run on both stores: what they say of the service does not depend on where its events are.
ON_BOTH_STORES = {
    "test_an_event_is_stored_and_returned_as_it_was_sent",
    "test_a_payload_comes_back_equal",
    "test_white_space_around_names_is_no_part_of_the_identity",
    "test_a_name_has_512_characters_without_what_is_stripped",
    "test_a_name_may_be_any_text_without_control_characters",
    "test_the_first_event_with_an_identity_is_kept",
    "test_ids_that_only_differ_in_unicode_normalization_are_two",
    "test_a_timestamp_is_kept_as_it_was_written",
    "test_other_fields_are_ignored_and_not_stored",
    "test_of_duplicated_keys_the_last_one_counts",
    "test_a_body_is_an_event_a_batch_or_an_array",
    "test_an_object_with_events_and_event_id_is_an_event",
    "test_a_duplicate_in_the_same_batch_is_dropped",
    "test_a_duplicate_in_a_later_batch_is_dropped",
    "test_a_request_is_stored_whole_or_not_at_all",
    "test_json_or_no_content_type_is_taken",
    "test_the_connection_goes_on_after_a_202_if_wished",
    "test_events_come_in_the_order_of_their_commits",
    "test_events_of_one_batch_keep_its_order",
    "test_one_topic_has_only_its_own_events",
    "test_paging_misses_nothing_and_repeats_nothing",
    "test_large_pages_are_put_together_without_a_seam",
    "test_one_event_is_found_by_its_identity",
    "test_tail_is_the_newest_events_in_their_order",
    "test_after_latest_means_what_comes_from_now_on",
    "test_ndjson_is_the_same_events_a_line_each",
    "test_a_feed_replays_what_is_stored_and_goes_on",
    "test_a_feed_starts_after_the_number_that_it_is_given",
    "test_a_feed_from_now_on_is_told_its_position_first",
    "test_a_tail_on_a_feed_goes_on_with_what_comes",
    "test_a_feed_with_a_limit_ends_after_so_many_events",
    "test_a_feed_of_one_topic_has_only_its_own_events",
    "test_a_batch_wakes_the_feeds_of_all_its_new_topics",
    "test_no_event_slips_past_a_feed_at_whatever_moment",
    "test_an_event_is_one_line_of_data",
    "test_subscribers_see_every_event_once_in_order",
    "test_stats_count_what_was_acknowledged",
    "test_topics_are_listed_by_name_in_pages",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Has pytest run those tests twice."""
    if metafunc.function.__name__ in ON_BOTH_STORES:
        metafunc.parametrize("db", ["SQLite", "PostgreSQL"], indirect=True)


@pytest.fixture
def database(postgres_address: str) -> Iterator[Database]:
    """An empty schema."""
    made = Database(postgres_address)
    yield made
    made.drop()


Open = Callable[..., Any]


@pytest.fixture
def open_store(database: Database) -> Iterator[Open]:
    """Opens stores in this process; each is to the database what a process is."""
    from postgres import PostgresStore

    stores: list[Any] = []

    def open_store(address: str = database.address) -> Any:
        stores.append(PostgresStore(address))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def batch_of(store: Any, events: Sequence[dict[str, Any]]) -> Batch:
    """The events as a store wants them."""
    return validate(json_of(events), store.encode)


def store_events(store: Any, *batches: Sequence[dict[str, Any]]) -> list[int]:
    """Commits these batches as one group; returns for each event whether it was new."""
    return list(store.commit([batch_of(store, events) for events in batches]).is_new)


def add_up(database: Database) -> list[tuple[int, str, str]]:
    """What holds at every moment, by the tables; returns the stored events."""
    events = database.events()
    assert len({(topic, event_id) for _, topic, event_id in events}) == len(events)
    stored = Counter(topic for _, topic, _ in events)
    counters = database.counters()
    received, unique = counters.pop("")
    assert {topic: unique for topic, (_, unique) in counters.items()} == stored
    assert unique == len(events)
    assert received == sum(received for received, _ in counters.values())
    assert all(received >= unique for received, unique in counters.values())
    return events


def test_a_start_without_the_driver_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError")
    address = f"postgresql://{POSTGRES_USER}:{POSTGRES_PASSWORD}@{POSTGRES_HOST}/events"
    done = subprocess.run(
        [sys.executable, str(HERE / "aggregator.py"), "--db", address],
        env=clean_environment({"PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.decode() == (
        'aggregator: PostgreSQL needs a driver: pip install "psycopg[binary]"\n'
    )


def test_a_group_tells_new_events_from_duplicates(database: Database, open_store: Open) -> None:
    one, other = open_store(), open_store()
    assert store_events(one, numbered([1, 2]), numbered([2, 3, 3])) == [1, 1, 0, 1, 0]
    assert store_events(other, numbered([3, 4]), numbered([1], topic="another")) == [0, 1, 1]
    assert [event_id for _, _, event_id in add_up(database)] == ["1", "2", "3", "4", "1"]
    assert database.counters() == {"order.created": (7, 4), "another": (1, 1), "": (8, 5)}
    assert one.totals() == (8, 5, 3)
    assert other.topics("", 10) == [("another", 1, 1, 0), ("order.created", 7, 4, 3)]
    assert other.topics("another", 10) == other.topics("", 10)[1:]


def test_events_come_back_as_they_were_sent(open_store: Open) -> None:
    store = open_store()
    sent = [
        event(event_id="1", source='quote " backslash \\ é 😀', topic="topic/é"),
        event(event_id="2", payload={"\0\t\n": ["\x85\u2028\u2029", 10**400, -0.0, 1e-7, None]}),
        event(event_id="3", payload={}, timestamp="2025-10-24 10:30"),
    ]
    assert store_events(store, sent) == [1, 1, 1]
    last = store.last_seq()
    texts = {
        form: store.page(form, None, 0, last, 100, 100_000).text.decode()
        for form in (aggregator.JSON, aggregator.LINES, aggregator.FEED)
    }
    assert same_json(json.loads(f"[{texts[aggregator.JSON]}]"), sent)
    lines = texts[aggregator.LINES].splitlines()  # splits at U+0085 and its like, too
    assert same_json([json.loads(line) for line in lines], sent)
    assert texts[aggregator.FEED] == "".join(
        f"id: {seq}\ndata: {line}\n\n" for seq, line in enumerate(lines, last - 2)
    )


def test_a_page_ends_with_the_event_that_fills_it(open_store: Open) -> None:
    store = open_store()
    store_events(store, numbered(range(600)), numbered([600], payload={"text": "x" * 100_000}))
    form, last = aggregator.LINES, store.last_seq()

    def page(after: int, limit: int, most_bytes: int, upto: int = last) -> tuple[int, int]:
        found = store.page(form, None, after, upto, limit, most_bytes)
        assert found.text.count(b"\n") == found.count
        return found.count, found.last_seq - after

    assert page(0, 7, 100_000) == (7, 7)
    assert page(0, 10**9, 10**9) == (500, 500)
    assert page(0, 10**9, 10**9, upto=3) == (3, 3)
    few, _ = page(0, 10**9, 2_000)
    assert 5 < few < 20
    assert page(last - 1, 10**9, 1) == (1, 1)  # an event larger than the page
    assert page(last, 10**9, 1) == (0, 0)


def test_the_newest_events_and_a_single_one_are_found(open_store: Open) -> None:
    store = open_store()
    assert store.last_seq() == store.position(None, 3) == 0
    store_events(store, numbered([1, 2, 3]), numbered([1, 2], topic="other"), numbered([4]))
    first = store.find("order.created", "1")
    assert [store.position(None, tail) - first for tail in (0, 1, 3, 99)] == [5, 4, 2, -1]
    assert [store.position("other", tail) - first for tail in (0, 1, 2, 99)] == [5, 3, 2, 2]
    assert store.position("unknown", 3) == store.last_seq()
    assert store.find("other", "2") == first + 4
    for topic, event_id in [("other", "3"), ("unknown", "1"), ("other\0", "1"), ("\ud800", "1")]:
        assert store.find(topic, event_id) is None
        assert store.topics(topic, 1) is not None


def test_pages_are_ranges_of_an_index_however_rare_the_topic(
    database: Database, open_store: Open
) -> None:
    import postgres

    open_store()
    database.ask("INSERT INTO topics (id, name) VALUES (1, 'busy'), (21, 'rare')")
    database.ask(  # a planner who does not know better expects each topic to have its share
        "INSERT INTO events"
        " SELECT n, CASE WHEN n % 10000 = 7 THEN 21 ELSE 1 + n % 20 END, n, '', '', '{}'"
        " FROM generate_series(1, 20000) AS n"
    )
    database.ask("ANALYZE events")
    for topic, index, count in [
        (None, "events_pkey", 500),
        ("busy", "events_of_topic", 500),
        ("rare", "events_of_topic", 1),
    ]:
        which = postgres.OF_TOPIC if topic else postgres.OF_ALL
        page = postgres.PAGE.format(text=postgres.TEXTS[aggregator.LINES], **which)
        values = {"topic": topic, "after": 5000, "upto": 20000, "limit": 500, "most_bytes": 10**6}
        plan = explain_plan(database, page, values)
        (scan,) = [node for node in plan if node.get("Relation Name") == "events"]
        assert scan["Index Name"] == index
        assert "seq" in scan["Index Cond"]
        assert "Filter" not in scan
        assert scan["Actual Rows"] == count


def explain_plan(database: Database, query: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes of the plan by which a query was run."""
    import psycopg

    with psycopg.connect(database.address) as connection:
        row = connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", values).fetchone()
    assert row
    waiting = [row[0][0]["Plan"]]
    nodes = []
    while waiting:
        nodes.append(waiting.pop())
        waiting += nodes[-1].get("Plans", [])
    return nodes


def waits_for_the_lock(database: Database) -> bool:
    """Whether a process waits until another one's group is committed."""
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    return database.ask(query) == [(1,)]


async def test_no_reader_sees_an_event_before_an_earlier_one(
    database: Database, open_store: Open
) -> None:
    import psycopg

    import postgres

    store, reader = open_store(), open_store()
    batch = batch_of(store, numbered([1]))
    with psycopg.connect(database.address) as slow:  # a process whose commit takes its time
        slow.execute(postgres.COMMIT_GROUP_FUNCTION)
        slow.execute(postgres.COMMIT_GROUP, [batch.text.decode(), f"1\t{batch.topics[0]}"])
        second = asyncio.create_task(asyncio.to_thread(store_events, store, numbered([2])))
        await until(lambda: waits_for_the_lock(database))
        assert reader.last_seq() == 0
        slow.commit()
    assert await second == [1]
    assert [event_id for _, _, event_id in add_up(database)] == ["1", "2"]


def test_an_empty_group_writes_and_fails_where_a_group_would(
    database: Database, open_store: Open
) -> None:
    store = open_store()
    version = "SELECT xmin::text FROM aggregator"
    before = database.ask(version)
    assert store.commit([]).is_new == b""
    assert database.ask(version) != before
    database.ask("ALTER TABLE events RENAME TO elsewhere")
    with pytest.raises(aggregator.Unavailable, match="missing"):
        store.commit([])
    database.ask("ALTER TABLE elsewhere RENAME TO events")
    assert store.commit([]).is_new == b""
    assert database.counters() == {"": (0, 0)}


def test_news_name_the_topics_unless_the_names_are_too_long(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    import postgres

    one, other = open_store(), open_store()
    assert one.changed() is None  # it listens from now on
    store_events(other, numbered([1, 2]), numbered([1], topic="other"))
    assert one.changed() == {"order.created", "other"}
    store_events(other, numbered([1, 3], topic="other"), numbered([1]))
    assert one.changed() == {"other"}
    store_events(one, numbered([4]))
    with monkeypatch.context() as patched:
        patched.setattr(postgres, "LISTEN_SECONDS", 0.1)
        assert one.changed() == set()  # its own
    store_events(other, [event(topic=f"{number}{'x' * 500}") for number in range(20)])
    assert one.changed() is None


def test_a_listener_that_was_cut_off_wakes_everybody(database: Database, open_store: Open) -> None:
    one, other = open_store(), open_store()
    assert one.changed() is None
    for backend in database.backends():
        database.ask("SELECT pg_terminate_backend(%s)", backend)
    with pytest.raises(aggregator.Unavailable):
        one.changed()
    assert store_events(one, numbered([1])) == [1]  # it knows that its connection is broken
    with pytest.raises(aggregator.Unavailable):
        store_events(other, numbered([1]))
    assert store_events(other, numbered([1])) == [0]
    assert one.changed() is None


async def test_a_silent_server_is_given_up(
    postgres_server: PostgresServer,
    database: Database,
    open_store: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import postgres

    monkeypatch.setattr(postgres, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(postgres, "WATCH_SECONDS", 0.05)
    store = open_store()
    (backend,) = database.backends()
    rescue = threading.Timer(PATIENCE_SECONDS, os.kill, [backend, signal.SIGCONT])
    rescue.start()
    os.kill(backend, signal.SIGSTOP)
    try:
        with pytest.raises(aggregator.Unavailable, match="lost"):
            store_events(store, numbered([1]))
    finally:
        rescue.cancel()
        os.kill(backend, signal.SIGCONT)
    await until(lambda: can_commit(store))
    await until(lambda: database.events())  # it was in doubt, and is stored after all
    assert store_events(store, numbered([1])) == [0]


def can_commit(store: Any) -> bool:
    """Whether a probe goes well."""
    with contextlib.suppress(aggregator.Unavailable):
        store.commit([])
        return True
    return False


async def test_a_commit_without_its_standby_is_not_acknowledged(
    postgres_server: PostgresServer, database: Database, open_store: Open
) -> None:
    store = open_store()
    standby = "ALTER SYSTEM SET synchronous_standby_names = '{}'"
    database.ask(standby.format("nobody"))
    try:
        database.ask("SELECT pg_reload_conf()")
        await until(lambda: database.ask("SHOW synchronous_standby_names") == [("nobody",)])
        first = asyncio.create_task(asyncio.to_thread(store_events, store, numbered([1])))
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        await until(lambda: database.ask(waits) == [(1,)])
        for backend in database.backends():
            database.ask("SELECT pg_cancel_backend(%s)", backend)
        with pytest.raises(aggregator.Unavailable, match="standby"):
            await first
    finally:
        database.ask(standby.format(""))
        database.ask("SELECT pg_reload_conf()")
    assert store_events(store, numbered([1])) == [0]  # it was stored here, in doubt


def foreign_tables(database: Database) -> str:
    database.ask("CREATE TABLE events (id integer)")
    return database.address


def newer_tables(database: Database) -> str:
    import postgres

    postgres.PostgresStore(database.address).close()
    database.ask("UPDATE aggregator SET schema_version = 99")
    return database.address


def cockroach(database: Database) -> str:
    database.ask(
        "CREATE FUNCTION version() RETURNS text LANGUAGE sql AS $$ SELECT 'CockroachDB CCL v25' $$"
    )
    return database.with_options(f"-csearch_path={database.schema},pg_catalog")


def latin_database(database: Database) -> str:
    database.ask(
        f"CREATE DATABASE {database.schema} TEMPLATE template0 ENCODING 'LATIN1'"
        " LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    return database.server_address.replace("/postgres?", f"/{database.schema}?")


REFUSALS: dict[str, tuple[Callable[[Database], str], str]] = {
    "foreign": (foreign_tables, "another program"),
    "newer": (newer_tables, "newer version"),
    "CockroachDB": (cockroach, "CockroachDB"),
    "LATIN1": (latin_database, "UTF8"),
    "off": (lambda it: it.with_options("-csynchronous_commit=off"), "synchronous_commit"),
    "local": (lambda it: it.with_options("-csynchronous_commit=local"), "synchronous_commit"),
    "read-only": (lambda it: it.with_options("-cdefault_transaction_read_only=on"), "only reads"),
    "no schema": (lambda it: it.with_options("-csearch_path=nowhere"), "schema"),
    "password": (lambda it: it.address.replace(POSTGRES_PASSWORD, "wrong"), "psql"),
    "database": (lambda it: it.address.replace("/postgres?", "/secret-user?"), "psql"),
    "port": (lambda it: re.sub(r":\d+/", ":1/", it.address), "psql"),
    "address": (lambda it: it.address.replace(POSTGRES_HOST, f"[{POSTGRES_HOST}"), "address"),
    "parameter": (lambda it: it.address + "&secret-user=1", "address"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_keep_the_promises_is_refused_untouched(
    postgres_server: PostgresServer, database: Database, refusal: str
) -> None:
    from postgres import PostgresStore

    prepare, reason = REFUSALS[refusal]
    address = prepare(database)
    query = "SELECT relname, relkind FROM pg_class WHERE relnamespace = %s::regnamespace ORDER BY 1"
    before = database.ask(query, database.schema)
    with pytest.raises(aggregator.StoreError) as refused:
        PostgresStore(address)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not SECRETS.search(str(refused.value))
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
    assert database.ask(query, database.schema) == before


async def test_who_starts_while_another_makes_the_tables_waits_for_them(
    database: Database, open_store: Open
) -> None:
    import psycopg

    import postgres

    with psycopg.connect(database.address) as other:
        other.execute(postgres.MAKE_TABLES)
        opening = asyncio.create_task(asyncio.to_thread(open_store))
        await until(lambda: waits_for_the_lock(database))
        other.commit()
    assert store_events(await opening, numbered([1])) == [1]


async def test_processes_that_start_at_once_share_the_events(
    database: Database, process: StartProcess
) -> None:
    services = await asyncio.gather(
        *[process(DB_PATH=database.address, kind=Process) for _ in range(2)]
    )
    answers = [await service.publish(numbered([1, 2])) for service in services]
    assert [answer.counts for answer in answers] == [(2, 2, 0), (2, 0, 2)]
    for service in services:
        assert await service.stats() == (4, 2, 2)
        assert not SECRETS.search(service.log())
    add_up(database)


async def test_a_live_feed_hears_of_another_process_within_a_second(
    database: Database, process: StartProcess
) -> None:
    one, other = await asyncio.gather(*[process(DB_PATH=database.address) for _ in range(2)])
    async with one.feed() as of_all, one.feed(topic="order.created") as of_topic:
        for number in range(5):
            assert (await other.publish(numbered([number]))).status == 202
            answered = time.monotonic()
            for feed in (of_all, of_topic):
                [(_, found)] = await feed.take(1)
                assert found["event_id"] == str(number)
            assert time.monotonic() - answered < 1


async def test_every_process_reports_a_lost_database_and_recovers(
    postgres_server: PostgresServer, database: Database, process: StartProcess
) -> None:
    services = await asyncio.gather(
        *[process(DB_PATH=database.address, LOG_LEVEL="DEBUG") for _ in range(2)]
    )
    postgres_server.stop()
    try:
        for service in services:  # nobody posts
            await health_becomes(service, 503)
        answers = [
            await services[0].publish(event()),
            await services[0].ask("GET", "/events"),
            await services[0].ask("GET", "/stats"),
            await services[1].ask("GET", "/health"),
        ]
        for answer in answers[:3]:
            assert answer.detail(503)
    finally:
        postgres_server.start()
    for service in services:
        await health_becomes(service, 200)
        assert (await service.publish(event())).status == 202
        assert not SECRETS.search(service.log())
    assert not any(SECRETS.search(answer.body.decode()) for answer in answers)
    assert len(add_up(database)) == 1


async def health_becomes(service: Service, status: int) -> None:
    async def is_it() -> bool:
        return await service.health() == status

    await until(is_it)


@dataclass(slots=True)
class Chaos:
    """Publishers and subscribers who go from process to process while these are killed."""

    services: list[Process]
    chance: random.Random
    acknowledged: set[tuple[str, str]]
    answered: int = 0  # events of which somebody was told that they are stored
    sent: int = 0  # events, with those sent again
    is_over: bool = False

    async def more(self, events: int) -> None:
        """Returns when so many more events are acknowledged."""
        enough = self.answered + events
        await until(lambda: self.answered >= enough)

    async def publish(self, name: str) -> None:
        """Sends events in order, each until it is acknowledged, and some of them again."""
        number = 0
        while not self.is_over:
            count = self.chance.choice([1, 1, 5, 20])
            numbers = range(max(0, number - self.chance.choice([0, 0, 3])), number + count)
            batch = [
                event(topic=f"topic {each % 3}", event_id=f"{name} {each}") for each in numbers
            ]
            await self.send(batch)
            number += count

    async def send(self, batch: list[dict[str, Any]]) -> None:
        """Publishes a batch, again and again, until some process acknowledges it."""
        while True:
            self.sent += len(batch)
            with contextlib.suppress(aiohttp.ClientError, ConnectionError, asyncio.TimeoutError):
                answer = await self.chance.choice(self.services).publish(batch)
                if answer.status == 202:
                    break
                assert answer.status == 503, answer
            await asyncio.sleep(0.02)  # as a publisher would, and shorter
        self.answered += len(batch)
        self.acknowledged.update((each["topic"], each["event_id"]) for each in batch)

    async def subscribe(self) -> list[tuple[int, str, str]]:
        """Reads a live feed to the event "end", going on after what it has wherever it can."""
        found: list[tuple[int, str, str]] = []
        while not found or found[-1][2] != "end":
            service = self.chance.choice(self.services)
            headers = {"Accept": "text/event-stream"}
            if found:
                headers["Last-Event-ID"] = str(found[-1][0])
            with contextlib.suppress(aiohttp.ClientError, ConnectionError, asyncio.TimeoutError):
                async with service.session.get(f"{service.url}/events", headers=headers) as answer:
                    assert answer.status in (200, 503)
                    feed = Feed(answer)
                    for _ in range(self.chance.randrange(50, 2000)):
                        taken = await feed.take(1) if answer.status == 200 else []
                        if not taken:
                            break
                        seq, each = taken[0]
                        found.append((seq, each["topic"], each["event_id"]))
                        if each["event_id"] == "end":
                            break
            await asyncio.sleep(0.02)
        return found


async def run_chaos(
    server: PostgresServer, database: Database, services: list[Process], blows: Sequence[str]
) -> Chaos:
    """Strikes a process or the database, blow by blow, under load; then checks everything."""
    chaos = Chaos(services, random.Random(18), set())
    publishers = [asyncio.create_task(chaos.publish(f"publisher {n}")) for n in range(6)]
    subscribers = [asyncio.create_task(chaos.subscribe()) for _ in range(3)]
    for blow in blows:
        await chaos.more(chaos.chance.randrange(100, 200))
        if blow == "database":
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
        else:
            victim = chaos.chance.choice(services)
            await victim.kill()
            await victim.start()
    chaos.is_over = True
    await asyncio.gather(*publishers)
    await chaos.send([event(topic="end", event_id="end")])
    truth = add_up(database)
    assert chaos.acknowledged <= {(topic, event_id) for _, topic, event_id in truth}
    received, _ = database.counters()[""]
    assert chaos.answered <= received <= chaos.sent
    for found in await asyncio.gather(*subscribers):
        assert found == truth
    numbers: dict[str, list[int]] = {}
    for _, _, event_id in truth[:-1]:
        publisher, _, number = event_id.rpartition(" ")
        numbers.setdefault(publisher, []).append(int(number))
    assert all(each == list(range(len(each))) for each in numbers.values())
    for service in services:
        assert await service.stats() == (received, len(truth), received - len(truth))
        assert not SECRETS.search(service.log())
    return chaos


async def test_nothing_is_lost_or_stored_twice_whatever_is_killed(
    postgres_server: PostgresServer, database: Database, process: StartProcess
) -> None:
    services = await asyncio.gather(*[process(DB_PATH=database.address) for _ in range(3)])
    blows = ["process", "database", "process", "process"]
    await run_chaos(postgres_server, database, list(services), blows)


# --- The README --------------------------------------------------------------------------------
# README.md and docs/ are compared with what is so: links, names, numbers, tables, and every sample
# that is printed. Block, blocks_of, Laboratory, plain, table_rows, whole_project

README = HERE / "README.md"
TEXTS = [README, *sorted((HERE / "docs").glob("*.md"))]
LANGUAGES = {
    "sh", "text", "python", "json", "yaml", "js", "lua", "ini",
    "nginx", "haproxy", "caddyfile", "powershell", "sql",
}  # fmt: skip
whole_project = pytest.mark.skipif(
    not (README.exists() and (HERE / "Dockerfile").exists()), reason="not the whole project"
)
needs_readme = pytest.mark.skipif(not README.exists(), reason="no README.md")
needs_curl = pytest.mark.skipif(
    not (README.exists() and shutil.which("bash") and shutil.which("curl")),
    reason="the samples are for bash and curl",
)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code in one of the texts."""

    text: str  # the file it is in
    heading: str  # the nearest one above it
    language: str
    code: str
    printed: str | None  # the block right behind it, if that is what it prints


def blocks_of(path: Path) -> list[Block]:
    """The blocks of code in a text, in order."""
    heading = ""
    fence: str | None = None  # the language of the block that is open
    lines: list[str] = []
    found: list[Block] = []
    is_next = False  # nothing but blank lines since the last block
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if fence is None:
                fence = line[3:]
                lines = []
                continue
            code = "".join(f"{each}\n" for each in lines)
            if fence == "text" and is_next and found[-1].printed is None:
                found[-1] = dataclasses.replace(found[-1], printed=code)
            else:
                found.append(Block(path.name, heading, fence, code, None))
            fence = None
            is_next = found[-1].language != "text"
        elif fence is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
            is_next = False
        elif line:
            is_next = False
    assert fence is None, f"{path.name}: a block has no end"
    return found


def prose_of(path: Path) -> str:
    """A text without its blocks of code."""
    return re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def anchors_of(path: Path) -> set[str]:
    """What links to the headings of a text look like."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    letters = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in letters}


def table_rows(text: str, first_column: str) -> list[list[str]]:
    """The rows of the table that begins with this column."""
    _, found, rest = text.partition(f"\n| {first_column} |")
    assert found, first_column
    rows_of_it: list[list[str]] = []
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows_of_it.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows_of_it


def plain(text: str) -> list[str]:
    """The lines of a sample without what differs from run to run."""
    for changing, constant in (
        (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME"),
        (r"Database: .*/data/dedup\.db", "Database: FILE"),
        (r"(localhost|127\.0\.0\.1):\d+", "ADDRESS"),
        (r"publisher-[0-9a-f]{12}", "RUN"),
        (r'(?<="uptime_seconds": )[\d.]+', "N"),
        (r'(?<="last_seq": )\d+', "N"),
        (r"(?m)^id: \d+", "id: N"),
        (r"(twice|batch|same)-\d+", "ID"),
    ):
        text = re.sub(changing, constant, text)
    lines = text.strip("\n").split("\n")
    measured = ("Throughput", "Latency", "Publisher", '{"topics"')
    return [re.sub(r"[\d.]+", "N", each) if each.startswith(measured) else each for each in lines]


class Laboratory:
    """A folder with the project in it and a service, where samples are run as they are printed."""

    def __init__(self, folder: Path, service: Process) -> None:
        self.service = service
        self._folder = folder
        self._second_port = free_port()
        for name in ("aggregator.py", "publisher.py", "dashboard.html", "openapi.json"):
            if (HERE / name).exists():
                (folder / name).symlink_to(HERE / name)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)

    def run(self, block: Block) -> str:
        """What the block prints."""
        code = re.sub(r"\b8080\b", str(self.service.port), block.code)
        code = re.sub(r"\b8081\b", str(self._second_port), code)
        code = code.replace("-m 1 ", "-m 0.5 ")  # for how long curl reads a feed
        address = {"AGGREGATOR_URL": f"http://127.0.0.1:{self.service.port}"}
        done = subprocess.run(
            ["bash", "-c", code],
            cwd=self._folder,
            env=clean_environment(address),
            stdout=subprocess.PIPE,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        return done.stdout.decode()


@pytest_asyncio.fixture
async def laboratory(tmp_path: Path, process: Callable[..., Awaitable[Process]]) -> Laboratory:
    """A laboratory whose service has an empty database."""
    return Laboratory(tmp_path, await process(db=tmp_path / "data" / "dedup.db"))


@whole_project
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if not re.match("https?:", target):
            name, _, anchor = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            assert there.exists(), target
            assert not anchor or anchor in anchors_of(there), target


@whole_project
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_function_that_is_named_exists(path: Path) -> None:
    modules = [HERE / name for name in ("aggregator.py", "publisher.py", "postgres.py")]
    code = "".join(module.read_text(encoding="utf-8") for module in modules if module.exists())
    for name in re.findall(r"`(?:\w+\.)*(\w+)\(\)`", prose_of(path)):
        assert re.search(rf"\b(def|class) {name}\b", code), name


@needs_readme
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_block_can_be_parsed(path: Path) -> None:
    for block in blocks_of(path):
        assert block.language in LANGUAGES, block
        if block.language == "python":
            compile(block.code, path.name, "exec")
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "ini":
            configparser.ConfigParser(strict=False).read_string(block.code)
        elif block.language == "sh" and shutil.which("bash"):
            check = ["bash", "-n", "-c", block.code]
            done = subprocess.run(check, capture_output=True, check=False)
            assert not done.returncode and not done.stderr, (block, done.stderr)
            for script in re.findall(r"<<'EOF'\n(.*?)^EOF$", block.code, re.MULTILINE | re.DOTALL):
                compile(script, path.name, "exec")


@needs_readme
def test_commands_ask_for_paths_that_exist(tmp_path: Path) -> None:
    app = create_app(Settings(db=str(tmp_path / "events.db")))
    app[aggregator.STORE_KEY].close()
    paths = {resource.canonical for resource in app.router.resources()} | {""}
    for block in itertools.chain.from_iterable(map(blocks_of, TEXTS)):
        for path in re.findall(r"(?:localhost|127\.0\.0\.1):808[01](/\w*)?", block.code):
            assert path in paths, (path, block)


@needs_readme
@needs_publisher
def test_commands_use_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {}
    for module in aggregator, publisher:
        with pytest.raises(SystemExit):
            module.read_settings(["--help"], {})
        known[f"{module.__name__}.py"] = capsys.readouterr().out
    for block in itertools.chain.from_iterable(map(blocks_of, TEXTS)):
        for program, arguments in re.findall(r"(\w+\.py)((?: [^|&;\n]+)?)", block.code):
            for flag in re.findall(r"(?<= )--[a-z-]+", arguments):
                assert program not in known or flag in known[program], (flag, block)


@needs_curl
@needs_publisher
async def test_the_readme_prints_what_is_answered(laboratory: Laboratory) -> None:
    compared = 0
    for block in blocks_of(README):
        if block.language == "sh" and block.printed is not None:
            assert plain(laboratory.run(block)) == plain(block.printed), block.code
            compared += 1
    assert compared >= 12, "the samples are not where this test looks for them"
    log = plain(laboratory.service.log())
    samples = [each for each in blocks_of(README) if " - aggregator" in each.code]
    assert len(samples) == 2, "of the start, and of an event and its duplicate"
    for sample in samples:
        assert sample.language == "text"
        for line in plain(sample.code):
            assert line in log


@needs_curl
@pytest.mark.parametrize(
    "text, heading, tools",
    [
        ("experiments.md", "1. Send an event twice", []),
        ("experiments.md", "2. A duplicate inside one batch", []),
        ("experiments.md", "3. The same id on two topics", []),
        ("experiments.md", "4. Fifty publishers with the same ids at once", ["python3"]),
        ("operations.md", "Restore", []),
        ("operations.md", "CloudEvents", ["jq"]),
    ],
)
async def test_docs_print_what_is_answered(
    laboratory: Laboratory, text: str, heading: str, tools: list[str]
) -> None:
    if not all(map(shutil.which, tools)):
        pytest.skip(f"needs {tools}")
    compared = 0
    for block in blocks_of(HERE / "docs" / text):
        if block.heading == heading and block.printed is not None:
            assert plain(laboratory.run(block)) == plain(block.printed), block.code
            compared += 1
    assert compared, "there is no such sample"


@needs_readme
async def test_all_printed_json_has_the_shape_of_an_answer(
    service: InProcess, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [await service.publish(event())]
    for path in ("/stats", "/topics", "/events", "/health", "/nowhere"):
        answers.append(await service.ask("GET", path))
    disk.error = aggregator.Unavailable("database or disk is full")
    answers.append(await service.publish(event()))
    answers.append(await service.ask("GET", "/health"))
    caplog.clear()
    shapes = {tuple(answer.document) for answer in answers} | {tuple(event())}
    shapes |= {tuple(entry) for entry in answers[2].document["topics"]}
    printed = 0
    for block in itertools.chain.from_iterable(map(blocks_of, TEXTS)):
        for line in (block.printed or "").splitlines():
            if line.startswith('{"'):
                document, _ = json.JSONDecoder().raw_decode(line)
                assert tuple(document) in shapes, line
                printed += 1
    assert printed > 12


@whole_project
def test_the_settings_table_is_the_settings() -> None:
    found = table_rows(README.read_text(encoding="utf-8"), "flag")
    (environment,) = re.findall(r"(?m)^ENV (HOST.*)", dockerfile())
    in_the_image = dict(re.findall(r"(\w+)=(\S+)", environment))
    assert len(found) == len(dataclasses.fields(Settings))
    for (flag, variable, default, _), setting in zip(found, dataclasses.fields(Settings)):
        assert flag == f"`--{setting.name.replace('_', '-')}`"
        assert variable == f"`{setting.metadata['variable']}`"
        assert default.replace("`", "").startswith(str(setting.default or "none"))
        image = re.findall("`([^`]*)` in the image", default)
        assert image == [in_the_image[name] for name in in_the_image if f"`{name}`" == variable]


def dockerfile() -> str:
    """The Dockerfile with its continued lines joined."""
    return (HERE / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")


HEARTBEAT_SECONDS = aggregator.HEARTBEAT_SECONDS  # as it is before a fixture changes it
IN_WORDS = {2: "two"}
NUMBERS = [  # the text, and what it says
    ("README.md", f"1 to {aggregator.MAX_NAME_CHARACTERS} characters"),
    ("README.md", f"more than {aggregator.MAX_NESTING} levels deep"),
    ("README.md", f"at most {aggregator.MAX_ERRORS} "),
    ("README.md", f"did not arrive within {aggregator.BODY_SECONDS:.0f} s"),
    ("README.md", f"a body has {aggregator.BODY_SECONDS:.0f} s to arrive"),
    ("README.md", f"takes nothing for {aggregator.READER_SECONDS:.0f} s"),
    ("README.md", f"closed after {aggregator.KEEPALIVE_SECONDS:.0f} s"),
    ("README.md", f"After {HEARTBEAT_SECONDS:.0f} s without an event"),
    ("README.md", f"hold at most {aggregator.READERS_BYTES // aggregator.MIB} MiB"),
    ("README.md", f"to {aggregator.OPEN_FILES:,} where the system allows it"),
    ("README.md", f"{aggregator.PAGE_EVENTS} events or {aggregator.PAGE_BYTES // 1024} KiB"),
    ("README.md", f"about {aggregator.CHECKPOINT_PAGES * 4096 // 10**7}0 MB"),
    ("README.md", f"keeps up to {round(aggregator.LOG_PAGES * 4096 / 10**8)}00 MB"),
    ("README.md", f"for more than {IN_WORDS[int(aggregator.BUSY_SECONDS)]} seconds"),
    ("README.md", f"a database log over {aggregator.WARN_WAL_BYTES // 10**9} GB"),
    ("README.md", "with SQLite 3.38 or newer"),  # check_sqlite_version has a test of its own
    ("docs/operations.md", f"larger than {aggregator.WARN_WAL_BYTES // 10**9} GB"),
    ("docs/operations.md", f"longer than about {aggregator.CHECKPOINT_PAGES * 4096 // 10**7}0 MB"),
    ("docs/operations.md", f"comment every {HEARTBEAT_SECONDS:.0f} s"),
    ("docs/operations.md", f"closes it after {aggregator.KEEPALIVE_SECONDS:.0f} s"),
]


@needs_readme
@pytest.mark.parametrize("text, phrase", NUMBERS, ids=[phrase for _, phrase in NUMBERS])
def test_numbers_in_the_texts_are_the_constants(text: str, phrase: str) -> None:
    assert phrase in (HERE / text).read_text(encoding="utf-8")


@needs_readme
async def test_the_table_of_422_lists_all_errors(service: InProcess) -> None:
    bad_bodies: list[Any] = [
        b"",
        b"{",
        [],
        {"events": {}},
        [1],
        [
            event(source=ABSENT),
            event(topic=1, event_id="", source=" "),
            event(topic="x" * 513, event_id="a\nb", source="\ud800"),
            event(timestamp=1),
            event(timestamp="yesterday"),
            event(payload=[]),
            event(payload={"n": math.inf}),
        ],
    ]
    entries: list[dict[str, Any]] = []
    for body in bad_bodies:
        entries += (await service.publish(body)).detail(422)
    for query in ({"limit": "x"}, {"limit": "0"}, {"after": "1"}, {"offset": "1"}):
        entries += (await service.ask("GET", "/events", **query)).detail(422)
    real = {(each["type"], without_numbers(each["msg"])) for each in entries}
    rows_of_it = table_rows(README.read_text(encoding="utf-8"), "`type`")
    assert {(kind.strip("`"), without_numbers(message)) for kind, _, message in rows_of_it} == real


def without_numbers(message: str) -> str:
    """A message without its numbers, and without the reason why a timestamp is refused."""
    text = re.sub(r"\d+", "N", message)
    return re.sub("(?<=valid datetime, ).*", "…", text)


@needs_readme
def test_the_table_of_refusals_lists_every_status() -> None:
    code = (HERE / "aggregator.py").read_text(encoding="utf-8")
    real = {int(status) for status in re.findall(r"Refused\(\s*(\d{3})", code)} | {404, 405}
    real.remove(500)  # a fault of ours, for nothing that a client sends
    listed = table_rows(README.read_text(encoding="utf-8"), "status")
    assert {int(each) for row in listed for each in row[0].split(", ")} == real


FROM_ELSEWHERE = (  # what Python, SQLite and the system say
    "ModuleNotFoundError: No module named 'aiohttp'",
    "Address already in use",
    "unable to open database file",
    "readonly database",
    "file is not a database",
    "database is locked",
    "database or disk is full",
)


@needs_readme
def test_troubleshooting_quotes_messages_that_exist() -> None:
    code = (HERE / "aggregator.py").read_text(encoding="utf-8")
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that go on in the next line
    for seen, *_ in table_rows(README.read_text(encoding="utf-8"), "what you see"):
        for quoted in re.findall("`([^`]*[ _][^`]*)`", seen):
            for part in re.split(r"\s*…:?\s*|3\.x", quoted):
                assert part.strip(" :") in code + "".join(FROM_ELSEWHERE), quoted


@needs_readme
async def test_metrics_that_are_named_exist(service: InProcess) -> None:
    await service.ask("GET", "/nowhere")
    real = (await service.ask("GET", "/metrics")).body.decode()
    for path in TEXTS:
        for name in re.findall(r"\baggregator_\w+", path.read_text(encoding="utf-8")):
            assert re.search(rf"(?m)^{name}\b", real) or f" {name} " in real, name
    operations = (HERE / "docs" / "operations.md").read_text(encoding="utf-8")
    listed = [name.strip("`") for name, _ in table_rows(operations, "metric")]
    assert sorted(listed) == sorted(re.findall("(?m)^# TYPE (\\w+)", real))


@whole_project
async def test_the_image_asks_health_and_no_proxy(
    process: Callable[..., Awaitable[Process]], tmp_path: Path
) -> None:
    compose = (HERE / "docker-compose.yml").read_text(encoding="utf-8")
    assert "test:" not in compose, "there is one health check, the image's"
    (healthcheck,) = re.findall(r"(?m)^HEALTHCHECK .* CMD (\[.*\])$", dockerfile())
    command = json.loads(healthcheck)
    assert command[0] == "python"
    folder = tmp_path / "another"
    services = [await process(), await process("--host", "::", db=folder / "events.db")]

    async def check(port: int) -> int:
        environment = clean_environment({"PORT": str(port), "HTTP_PROXY": "http://127.0.0.1:9"})
        checking = await asyncio.create_subprocess_exec(
            sys.executable, *command[1:], env=environment, stderr=subprocess.DEVNULL
        )
        return await checking.wait()

    failing, other = services
    assert await asyncio.gather(check(failing.port), check(other.port)) == [0, 0]
    failing.db.unlink()
    (await failing.publish(event())).detail(503)
    status, without_service = await asyncio.gather(check(failing.port), check(free_port()))
    assert (status, bool(without_service)) == (1, True)
