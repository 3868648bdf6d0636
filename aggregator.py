"""An event aggregator: it keeps each event exactly once and loses none that it acknowledged.

Publishers on an unreliable network can do no better than to send an event again until somebody
says that it arrived (at-least-once delivery). So the same event comes many times, also at the
same moment on two connections, also after a crash. A consumer has to make that harmless: it must
be idempotent. This is such a consumer, laid out in the order in which an event travels:

    POST /publish - admit - parse, validate - asyncio.Queue - the consumer takes all that waits
      202 - the counts of this request - future - COMMIT, fsync - one transaction, writer thread
    GET /events, /stats - reader thread with a read-only connection - pages, streamed

Four rules hold everywhere, and the rest follows from them:

    1. 202 means on disk. A request's future is resolved after COMMIT with synchronous=FULL.
    2. One writer. Only the writer thread changes the database, and what belongs together (events
       and counters) changes in one transaction.
    3. The database decides what is a duplicate: a UNIQUE constraint with ON CONFLICT DO NOTHING.
       Nobody asks first and inserts then, and no cache stands in front.
    4. A request stands or falls alone: all of it is stored or nothing, and no neighbour in the
       same group commit suffers for it.

Run it with `python aggregator.py`; `python aggregator.py --help` lists the settings.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import hmac
import json
import logging
import os
import re
import resource
import signal
import sqlite3
import sys
import time
import weakref
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import accumulate, chain, compress
from operator import itemgetter, not_
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from aiohttp import HttpVersion11, StreamReader, web

log = logging.getLogger("aggregator")


# --- Settings --------------------------------------------------------------------------------
# A setting is what an operator may want to change. The constants below are not settings: each has
# one right value for this design, and its reason beside it.

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set from outside: --port or PORT, --db or DB_PATH, and so on."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free one; the log says which
    db: str = "data/dedup.db"
    log_level: str = "INFO"
    max_body_bytes: int = 4 * MIB
    max_in_flight_bytes: int = 8 * MIB  # a body costs several times its size on its way through
    api_token: str = ""  # empty: everybody may do everything


VERSION = "1.0.0"
MAX_NAME_CHARACTERS = 512  # of a topic, an event_id, a source: they are keys, and keys are short
LARGE_BYTES = MIB  # larger bodies go one at a time: as objects they can be 50 times as large
MAX_ERRORS = 100  # listed for one request: enough to find the mistake
MAX_GROUP_EVENTS = 5_000  # in one commit: more make it longer, but no cheaper for each event
MAX_GROUP_BYTES = MIB  # in one commit: SQLite's JSON parser takes up to 12 bytes for each
BUSY_SECONDS = 2.0  # to wait for another process's lock before a group is refused
CACHE_KIB = 16 * 1024  # of database pages for each connection: the busy part of the index
CHECKPOINT_PAGES = 16_000  # 64 MB of log: a page that many groups changed is moved only once
PAGE_EVENTS = 500  # read at a time, which takes about 2 ms
PAGE_BYTES = MIB // 4  # of payloads read at a time (as characters), or one payload if larger
FEED_PAGE_SECONDS = 0.002  # for each page of all live feeds together: publishing comes first
HEARTBEAT_SECONDS = 15.0  # of silence on a live feed: proxies hang up after 30 or 60
BODY_SECONDS = 30.0  # for a body to arrive
SLOW_SECONDS = 1.0  # after which a body on its way must yield where room is short
KEEPALIVE_SECONDS = 30.0  # for a connection to begin a request and to finish its headers
LINGER_SECONDS = 5.0  # to read on after a refusal: hanging up at once could destroy the answer
SHUTDOWN_SECONDS = 1.0  # for answers under way; aiohttp waits it twice, docker stop gives 10 s
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
GIL_SECONDS = 0.0001  # the writer waits for the event loop to yield; Python's default is 5 ms
OPEN_FILES = 65_536  # a connection is an open file, and the usual limit is 1,024


# --- Validation ------------------------------------------------------------------------------
# From the bytes of a body to rows that can be stored, or to the list of all that is wrong. Pure
# functions, no I/O. There are two paths: `take` only wants to know whether all is well; when it
# says no, `explain` goes over the events again, slowly, and names each error. One function for
# both would make good events pay for the bookkeeping of bad ones. The two must never disagree: a
# test throws mutated events at both.
#
# What is stored is not the client's text but what Python understood, encoded anew: Python and
# SQLite read duplicated keys, NUL characters and deep nesting differently.


class Refused(Exception):
    """A request that is answered with an error: an HTTP status, a detail, headers."""

    def __init__(self, status: int, detail: Any, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.headers = status, detail, headers


class Publication(NamedTuple):
    """The events of one request, ready to be stored; all three in the same order."""

    rows: bytes  # "[topic, event_id, timestamp, source, payload],[…],…", JSON in UTF-8
    topics: list[str]
    event_ids: list[str]


def parse(body: bytes) -> Publication:
    """The body of a POST /publish as a Publication; raises Refused (422)."""
    if not body:
        raise invalid("missing", ["body"], "Field required")
    try:
        document = DECODER.decode(body.decode())
        events, loc = document, ["body"]  # loc: where the events are, [] if the body itself is one
        if type(document) is dict and "events" in document and "event_id" not in document:
            events, loc = document["events"], ["body", "events"]
        elif type(document) is not list:
            events, loc = [document], []
        if type(events) is not list:
            raise invalid("list_type", loc, "Input should be a valid list")
        if not events:
            ctx = {"field_type": "List", "min_length": 1, "actual_length": 0}
            why = "List should have at least 1 item after validation, not 0"
            raise invalid("too_short", loc, why, ctx)
        if publication := take(events):
            return publication
        raise Refused(422, explain(events, loc))
    except (ValueError, RecursionError) as error:
        raise not_json(error) from None


def take(events: list[Any]) -> Publication | None:
    """The straight path: the events as a Publication, or None if anything is wrong with any."""
    rows = []
    try:
        for topic, event_id, timestamp, source, payload in map(FIELDS_OF, events):
            topic, event_id, source = topic.strip(), event_id.strip(), source.strip()
            is_good = is_name(topic) and is_name(event_id) and is_name(source)
            if not (is_good and TIMESTAMP.fullmatch(timestamp) and type(payload) is dict):
                return None
            date.fromisoformat(timestamp[:10])
            rows.append((topic, event_id, timestamp, source, payload))
        text = ENCODER.encode(rows)[1:-1].encode()
    except (KeyError, TypeError, AttributeError, ValueError):
        # A field that is not there, an event that is no object, a name that is no string, a day
        # that does not exist, a number or a character that has no place in JSON.
        return None
    return Publication(text, [row[0] for row in rows], [row[1] for row in rows])


def is_name(text: str) -> bool:
    """Whether a stripped topic, event_id or source is good; what is printable has no controls."""
    has_no_controls = text.isprintable() or not CONTROLS.search(text)
    return 0 < len(text) <= MAX_NAME_CHARACTERS and has_no_controls


def explain(events: list[Any], loc: list[Any]) -> list[dict[str, Any]]:
    """All that is wrong with the events, in their order, at most MAX_ERRORS."""
    errors: list[dict[str, Any]] = []
    for index, event in enumerate(events):
        if len(errors) >= MAX_ERRORS:
            break
        here = [*loc, index] if loc else ["body"]
        if type(event) is not dict:
            why = "Input should be a valid dictionary or object to extract fields from"
            errors.append(entry("model_attributes_type", here, why))
            continue
        for field, rules in RULES.items():
            if field not in event:
                errors.append(entry("missing", [*here, field], "Field required"))
            elif broken := next((rule for rule in rules if rule[0](event[field])), None):
                errors.append(entry(broken[1], [*here, field], *broken[2:]))
    return errors[:MAX_ERRORS]


def entry(kind: str, loc: list[Any], msg: str, ctx: Any = None) -> dict[str, Any]:
    """An entry of a 422's detail, in pydantic's vocabulary, which clients of FastAPI know."""
    return {"type": kind, "loc": loc, "msg": msg, **({"ctx": ctx} if ctx else {})}


def invalid(kind: str, loc: list[Any], msg: str, ctx: Any = None) -> Refused:
    """The answer to a request with one error."""
    return Refused(422, [entry(kind, loc, msg, ctx)])


def not_json(error: Exception) -> Refused:
    """The answer to a body that is no JSON, for what Python says of it."""
    position = getattr(error, "pos", getattr(error, "start", None))
    why = getattr(error, "msg", getattr(error, "reason", str(error).partition(":")[0]))
    loc = ["body"] if position is None else ["body", position]
    return invalid("json_invalid", loc, "JSON decode error", {"error": why})


def refuse_constant(name: str) -> NoReturn:
    """What json calls for three words that it knows and JSON does not."""
    raise ValueError("NaN and Infinity are not JSON")


def fails(function: Callable[[], Any], error: type[Exception]) -> bool:
    """Whether a function raises that error."""
    try:
        function()
    except error:
        return True
    return False


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
)
# Controls could forge a line of the log, and so could the two separators that Unicode adds.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# datetime.fromisoformat alone also takes week dates, dates without a time, and a trailing NUL.
TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ]"
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]+)?)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?"
)
# What `explain` looks for: is it broken, type, msg, ctx. The first that is broken counts.
NOT_UNICODE = (
    lambda v: fails(lambda: ENCODER.encode(v).encode(), UnicodeEncodeError), "string_unicode",
    "Input should be a valid string, unable to parse raw data as a unicode string",
)  # fmt: skip
NAME_RULES = (
    (lambda v: type(v) is not str, "string_type", "Input should be a valid string"),
    (lambda v: not v, "string_too_short",
     "String should have at least 1 character", {"min_length": 1}),
    (lambda v: not v.strip(), "value_error",
     "Value error, Field cannot be empty or whitespace only"),
    (lambda v: len(v.strip()) > MAX_NAME_CHARACTERS, "string_too_long",
     "String should have at most 512 characters", {"max_length": MAX_NAME_CHARACTERS}),
    (lambda v: CONTROLS.search(v.strip()), "value_error",
     "Value error, Field cannot contain control characters or line separators"),
    NOT_UNICODE,
)  # fmt: skip
TIMESTAMP_RULES = (
    (lambda v: type(v) is not str, "datetime_type", "Input should be a valid datetime"),
    (lambda v: not TIMESTAMP.fullmatch(v), "datetime_parsing",
     "Input should be a valid datetime, expected YYYY-MM-DDTHH:MM:SS[.fraction][Z or +HH:MM]"),
    (lambda v: fails(lambda: date.fromisoformat(v[:10]), ValueError), "datetime_parsing",
     "Input should be a valid datetime, there is no such day"),
)  # fmt: skip
PAYLOAD_RULES = (
    (lambda v: type(v) is not dict, "dict_type", "Input should be a valid dictionary"),
    (lambda v: fails(lambda: ENCODER.encode(v), ValueError), "finite_number",
     "Input should be a finite number"),  # Python reads 1e400 as infinity
    NOT_UNICODE,
)  # fmt: skip
RULES: dict[str, tuple[Any, ...]] = {
    "topic": NAME_RULES, "event_id": NAME_RULES, "timestamp": TIMESTAMP_RULES,
    "source": NAME_RULES, "payload": PAYLOAD_RULES,
}  # fmt: skip
FIELDS_OF = itemgetter(*RULES)


# --- Store -----------------------------------------------------------------------------------
# The database: its schema, one transaction for a group, pages to read, totals. Plain SQL and no
# asyncio; the sections below decide which thread calls what.
#
# A group goes in with one statement, as one JSON text. sqlite3 lets go of Python's global lock at
# every step of a statement, and has to win it back from an event loop that hardly ever waits:
# `executemany` was measured at 1 ms a row beside a busy loop, this at 13 microseconds (the convoy
# effect). For the same reason the counters go with it, and each query returns one row.

SCHEMA_VERSION = 1
SCHEMA = f"""
    BEGIN IMMEDIATE;
    -- The counters change with the events, in the same transaction, so they always add up; and
    -- /stats costs the same however many events there are.
    CREATE TABLE IF NOT EXISTS topics (
        id         INTEGER PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        received   INTEGER NOT NULL,           -- acknowledged events, duplicates included
        duplicates INTEGER NOT NULL DEFAULT 0  -- those that were dropped
    );
    -- Rows are only ever added. A number in place of the topic's name makes the unique index a
    -- fifth smaller, and its size is what random ids pay for.
    CREATE TABLE IF NOT EXISTS events (
        seq       INTEGER PRIMARY KEY,  -- the order of the commits: with gaps, none given twice
        topic_id  INTEGER NOT NULL REFERENCES topics (id),
        event_id  TEXT NOT NULL,
        timestamp TEXT NOT NULL,
        source    TEXT NOT NULL,
        payload   TEXT NOT NULL,        -- JSON
        UNIQUE (topic_id, event_id)
    );
    -- Its entries end in the seq, so it leads from an event to the next one of its topic.
    CREATE INDEX IF NOT EXISTS events_of_topic ON events (topic_id);
    PRAGMA user_version = {SCHEMA_VERSION};
    COMMIT;
"""
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM events"
# Storing a group is one INSERT into a view of the writer's own, and so one transaction: what its
# trigger does is done whole or not at all. The write lock is taken first, so `first` stays true
# whatever other processes do to the file. The conflict target is named: without it a clash of
# seq, too, would pass for a duplicate. The + keeps SQLite from walking along a whole index.
GROUP_COMMIT = """
    CREATE TEMP TABLE outcome (first INTEGER, positions TEXT);
    INSERT INTO outcome DEFAULT VALUES;
    CREATE TEMP VIEW arrivals AS SELECT NULL AS rows, NULL AS topics;
    CREATE TEMP TRIGGER group_commit INSTEAD OF INSERT ON arrivals BEGIN
        INSERT INTO topics (name, received, duplicates)  -- duplicates until they are stored
        SELECT value ->> 0, value ->> 1, value ->> 1 FROM json_each(NEW.topics) WHERE true
        ON CONFLICT (name) DO UPDATE SET received = received + excluded.received,
                                         duplicates = duplicates + excluded.duplicates;
        UPDATE outcome SET first = 1 + (SELECT coalesce(max(seq), 0) FROM events);
        INSERT INTO events (seq, topic_id, event_id, timestamp, source, payload)
        SELECT first + key, (SELECT id FROM topics WHERE name = value ->> 0),
               value ->> 1, value ->> 2, value ->> 3, value -> 4
        FROM outcome, json_each(NEW.rows) WHERE true
        ON CONFLICT (topic_id, event_id) DO NOTHING;
        UPDATE topics SET duplicates = duplicates - stored
        FROM (SELECT topic_id, count(*) AS stored FROM events
              WHERE seq >= (SELECT first FROM outcome) GROUP BY +topic_id)
        WHERE id = topic_id;
        UPDATE outcome SET positions =
            (SELECT json_group_array(seq - first) FROM events WHERE seq >= first);
    END;
"""
COMMIT_GROUP = "INSERT INTO arrivals VALUES (CAST(? AS TEXT), ?)"
NEW_POSITIONS = "SELECT positions FROM outcome"
TOTALS = """
    SELECT total(received), total(received - duplicates), json_group_array(name)
    FROM (SELECT * FROM topics ORDER BY name)
"""
# The recursion steps from event to event until the page is full, so that a page holds either
# many small payloads or few large ones. LIMIT 500 would be half as dear, and hold 500 of 4 MB.
PAGE = """
    WITH RECURSIVE page (number, seq, bytes, item) AS (
        SELECT 0, :after, 0, NULL
        UNION ALL
        SELECT number + 1, events.seq, bytes + length(payload), {item}
        FROM page JOIN events
          ON events.seq = (SELECT min(seq) FROM events WHERE {topic} seq > page.seq)
        WHERE number < :limit AND bytes < :bytes AND events.seq <= :upto
    )
    SELECT max(number), max(seq), group_concat(item, :separator) FROM page
"""
ONE_TOPIC = "topic_id = (SELECT id FROM topics WHERE name = :topic) AND"
# The payload is JSON already. To have SQLite read it again would cost memory, and time.
EVENT = """'{"topic":' || json_quote((SELECT name FROM topics WHERE id = topic_id))
    || ',"event_id":' || json_quote(event_id) || ',"timestamp":' || json_quote(timestamp)
    || ',"source":' || json_quote(source) || ',"payload":' || payload || '}'"""
# The representations of GET /events by their media types: an event as SQL, what separates two.
FORMS = {
    "text/event-stream": (
        f"'id: ' || events.seq || char(10) || 'data: ' || {EVENT} || char(10, 10)", ""
    ),
    "application/x-ndjson": (f"{EVENT} || char(10)", ""),
    "application/json": (EVENT, ","),
}  # fmt: skip
Page = tuple[int, int, bytes]  # how many events, the last one's sequence number, their text


class StartError(Exception):
    """Why the service cannot start, in one line."""


class Store:
    """The SQLite file, by two connections: one writes, one reads. Every method blocks."""

    def __init__(self, path: str) -> None:
        """Opens the file, or makes it; raises StartError."""
        self._path = path
        try:
            if sqlite3.sqlite_version_info < (3, 38):
                raise StartError(f"SQLite {sqlite3.sqlite_version} is older than 3.38")
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._writer = connect(path)
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            tables = self._writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StartError(f"a newer version of this service made it (schema {version})")
            if version == 0 and tables:
                raise StartError("it belongs to another program")
            if self._writer.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise StartError("its file system cannot share memory, as write-ahead logs must")
            self._writer.executescript(SCHEMA)  # always: it proves that the file can be written
            self._writer.executescript(GROUP_COMMIT)
            self._reader = connect(path)
            self._reader.execute("PRAGMA query_only = ON")
        except (OSError, sqlite3.Error, StartError) as why:
            raise StartError(f"cannot use the database {path}: {why}") from why

    def commit(self, publications: Sequence[Publication]) -> bytearray:
        """Stores a group in one transaction; when this returns, all of it is on disk.

        Returns a flag for each event of the group, in order: 1 it was new, 0 a duplicate.
        Raises sqlite3.Error; then nothing of the group is stored.
        """
        rows = b"[%b]" % b",".join([publication.rows for publication in publications])
        topics = list(chain.from_iterable([publication.topics for publication in publications]))
        is_new = bytearray(len(topics))
        self._writer.execute(COMMIT_GROUP, [rows, json.dumps(list(Counter(topics).items()))])
        for position in json.loads(self._writer.execute(NEW_POSITIONS).fetchone()[0]):
            is_new[position] = 1
        return is_new

    def last_seq(self) -> int:
        """The highest sequence number, 0 where there is no event."""
        return self._reader.execute(LAST_SEQ).fetchone()[0]

    def page(self, form: str, topic: str | None, after: int, upto: int, limit: int) -> Page:
        """The next events, after < seq <= upto, in one of FORMS; of all topics if topic is None.

        Where there is none, the last one's number is `after`. A page ends at PAGE_EVENTS, at
        PAGE_BYTES or at `limit` events, whichever comes first.
        """
        item, separator = FORMS[form]
        query = PAGE.format(item=item, topic=ONE_TOPIC if topic else "")
        values = {"topic": topic, "after": after, "upto": upto, "separator": separator}
        values |= {"limit": min(limit, PAGE_EVENTS), "bytes": PAGE_BYTES}
        number, last_seq, text = self._reader.execute(query, values).fetchone()
        return number, last_seq, (text or "").encode()

    def totals(self) -> tuple[int, int, list[str]]:
        """Events received, events stored, and the sorted topics, all of one moment."""
        received, stored, topics = self._reader.execute(TOTALS).fetchone()
        return int(received), int(stored), json.loads(topics)

    def size(self) -> int:
        """Bytes on disk, the log included."""
        files = Path(self._path), Path(self._path + "-wal")
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """Closes the file; the last connection to go moves the log into it and removes the log."""
        self._reader.close()
        self._writer.close()


def connect(path: str) -> sqlite3.Connection:
    """A connection that leaves transactions to us, for any one thread at a time."""
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")  # COMMIT waits until the log is on the disk
    db.execute("PRAGMA fullfsync = ON")  # macOS: on the disk, not in its cache
    db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    # SQLite copies each page that a statement changes, to undo half of it; in memory, not a file.
    db.execute("PRAGMA temp_store = MEMORY")
    return db


# --- Group commit ----------------------------------------------------------------------------
# Admission, queue, consumer, executor, futures. An fsync takes a disk a third of a millisecond to
# ten; one for each request would be the end of all speed. So the consumer takes every request
# that waits and commits them together, and while one commit runs the next group gathers: groups
# grow with the load by themselves. No timer, and a lone request waits for nobody. PostgreSQL,
# MySQL and Kafka's brokers do the same.

Waiting = tuple[Publication, "asyncio.Future[int]"]  # the future: how many events were new


class GroupCommit:
    """Takes in publications one by one and commits them in groups."""

    def __init__(self, store: Store, max_in_flight_bytes: int) -> None:
        self.in_flight_bytes = 0
        self.stopping = False
        self.failure: str | None = None  # why the last commit failed, None if it did not
        self.seconds = Histogram(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
        self.events = Histogram(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self._store = store
        self._max_in_flight_bytes = max_in_flight_bytes
        self._arriving: dict[asyncio.Timeout, float] = {}  # since when, the oldest first
        # What a live feed waits for, by topic (None: any). Weak: gone with the last who waits.
        self._news: Any = weakref.WeakValueDictionary()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def start(self) -> None:
        """Starts the consumer."""
        self._consumer = asyncio.create_task(self._consume(), name="consumer")

    # Admission bounds the memory: the bytes of a body are accounted for from before they are read
    # until they are committed, and so the queue needs no bound of its own.

    def admit(self, size: int) -> None:
        """Takes `size` bytes in flight, for the caller to give back; raises Refused (503)."""
        if self.stopping:
            raise unavailable("The service is stopping")
        if self.in_flight_bytes + size > self._max_in_flight_bytes:
            self.hurry(SLOW_SECONDS)  # who sends half a body and falls silent keeps nobody out
            raise unavailable("Too many bytes in flight")
        self.in_flight_bytes += size

    @contextlib.asynccontextmanager
    async def arriving(self) -> AsyncIterator[None]:
        """Around the reading of a body that was not there at once; raises Refused (408, 503)."""
        since = time.monotonic()
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                self._arriving[deadline] = since
                yield
        except TimeoutError:
            if time.monotonic() < since + BODY_SECONDS:
                why = "is stopping" if self.stopping else "is too busy for a body this slow"
                raise unavailable(f"The service {why}") from None
            raise Refused(408, f"The body did not arrive within {BODY_SECONDS:.0f} s") from None
        finally:
            del self._arriving[deadline]

    def hurry(self, seconds: float) -> None:
        """Ends the wait for the bodies that have been arriving for longer than that."""
        for deadline, since in self._arriving.items():
            if since <= time.monotonic() - seconds and not deadline.expired():
                deadline.reschedule(0)

    async def submit(self, publication: Publication) -> int:
        """Waits until the publication is on disk; returns how many of its events were new.

        Raises Refused: 503 where it could not be stored, 422 where SQLite cannot read it.
        """
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((publication, future))
        return await future

    async def _consume(self) -> None:
        """The consumer: commits all that waits, for ever."""
        while True:
            group = [await self.queue.get()]
            events, size = len(group[0][0].topics), len(group[0][0].rows)
            while not self.queue.empty() and events < MAX_GROUP_EVENTS and size < MAX_GROUP_BYTES:
                group.append(self.queue.get_nowait())
                events += len(group[-1][0].topics)
                size += len(group[-1][0].rows)
            try:
                if self.stopping and self.failure:  # the disk had its chance, and time is short
                    self._refuse(group, sqlite3.OperationalError(self.failure))
                else:
                    await self._commit(group)
            except Exception:  # after the commit: the log, the feeds; the next group must not wait
                log.exception("A fault of this program")
            for _ in group:
                self.queue.task_done()

    async def _commit(self, group: list[Waiting]) -> None:
        """Commits a group and resolves its futures, whatever happens."""
        publications = [publication for publication, _ in group]
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        try:
            is_new = await loop.run_in_executor(self._writer, self._store.commit, publications)
        except Exception as why:
            if len(group) > 1 and not is_about_the_disk(why):
                for waiting in group:  # one by one, so that only the culprit is refused
                    await self._commit([waiting])
            else:
                self._refuse(group, why)
            return
        self.seconds.observe(time.perf_counter() - started)
        self.events.observe(len(is_new))
        if self.failure:
            log.warning("Commits work again")
            self.failure = None
        start = 0
        for publication, future in group:
            end = start + len(publication.topics)
            if not future.done():  # done: nobody waits; its events are stored all the same
                future.set_result(is_new.count(1, start, end))
            start = end
        if self._news and any(is_new):
            topics = chain.from_iterable([publication.topics for publication in publications])
            self._tell([None, *compress(topics, is_new)])
        log_events(publications, is_new)

    def _refuse(self, group: list[Waiting], why: Exception) -> None:
        if str(why) == "malformed JSON":  # SQLite's parser gives up earlier than Python's may
            refusal = not_json(ValueError("nested too deeply"))
        else:
            # SQLite's messages name no paths. Those of other errors might, and stay in the log.
            reason = str(why) if isinstance(why, sqlite3.Error) else type(why).__name__
            if reason != self.failure:  # once, and not for each request
                log.error("Commits fail: %s", why, exc_info=not isinstance(why, sqlite3.Error))
            self.failure = reason
            refusal = unavailable(f"The database cannot be written: {reason}")
        for _, future in group:
            if not future.done():
                future.set_exception(Refused(refusal.status, refusal.detail, refusal.headers))

    def news(self, topic: str | None) -> asyncio.Future[None]:
        """Resolved when the next new event of the topic (None: of any) is on disk."""
        future = self._news.get(topic)
        if future is None:
            future = self._news[topic] = asyncio.get_running_loop().create_future()
        return future

    def _tell(self, topics: Iterable[str | None]) -> None:
        for topic in {*topics}:
            if future := self._news.pop(topic, None):
                future.set_result(None)

    def stop(self) -> None:
        """Refuses what comes from now on; what waits is stored, and has 2 s to be answered."""
        self.stopping = True
        self.hurry(0)
        self._tell(list(self._news))

    async def close(self) -> None:
        """Returns when the last request that waits is committed and answered."""
        await self.queue.join()
        self._consumer.cancel()
        self._writer.shutdown()


def unavailable(detail: str) -> Refused:
    """Nothing is stored, and the client should send the same again, which is safe."""
    return Refused(503, detail, {"Retry-After": "1"})


def is_about_the_disk(why: Exception) -> bool:
    """Whether a commit failed for a reason outside of its events: full, locked, broken."""
    code = getattr(why, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code not in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT)


def log_events(publications: Sequence[Publication], is_new: bytearray) -> None:
    """Logs what became of each event: two records of many lines, because a record costs 6 µs."""
    if log.isEnabledFor(logging.WARNING):
        lines = [
            f" event: topic={topic}, event_id={event_id}"
            for publication in publications
            for topic, event_id in zip(publication.topics, publication.event_ids)
        ]
        if new := "\nProcessed new".join(compress(lines, is_new)):
            log.info("Processed new%s", new)
        if duplicates := "\nDropped duplicate".join(compress(lines, map(not_, is_new))):
            log.warning("Dropped duplicate%s", duplicates)


class Histogram:
    """How often a value was in which range, for GET /metrics."""

    def __init__(self, *bounds: float) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Counts a value under the first bound that is not below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def values(self) -> dict[str, float]:
        """As Prometheus has it: a bucket counts what the ones below it count, too."""
        counts = list(accumulate(self._counts))
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = {f'_bucket{{le="{bound}"}}': n for bound, n in zip(bounds, counts)}
        return {**buckets, "_sum": self._sum, "_count": counts[-1]}


# --- HTTP ------------------------------------------------------------------------------------
# The handlers, and one middleware that turns every error into its answer. Bodies are read here and
# not by aiohttp's request.read(): to refuse them before they take memory, and because aiohttp
# takes a truncated gzip for whole.

WINDOW_BITS = {"": 0, "identity": 0, "gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's codes
MAX_INTEGER = 2**63 - 1  # SQLite's
DASHBOARD = Path(__file__).with_name("dashboard.html")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The handlers, with what they share."""

    def __init__(self, settings: Settings, store: Store, commits: GroupCommit) -> None:
        self._settings, self._store, self._commits = settings, store, commits
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._large = asyncio.Lock()
        self._refusals: Counter[int] = Counter()  # by status, for GET /metrics
        self._pages: dict[Any, asyncio.Future[Page]] = {}  # that live feeds are reading now
        self._subscribers = self._idle = 0  # live feeds, and those that wait for news
        self._started = time.time()

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets in who may come in, and answers every error as {"detail": …}."""
        try:
            if self._settings.api_token:
                self._check_token(request)
            return await handler(request)
        except Refused as why:
            status, detail, headers = why.status, why.detail, why.headers
        except web.HTTPException as why:  # 404 and 405
            allow = why.headers.get("Allow")
            status, detail, headers = why.status, why.reason, {"Allow": allow} if allow else {}
        except sqlite3.Error as why:
            log.error("The database cannot be read: %s", why)
            status, detail, headers = 503, "The database cannot be read", {"Retry-After": "1"}
        except ConnectionError:  # the client has gone
            raise
        except Exception:
            log.exception("A fault of this program")
            status, detail, headers = 500, "Internal Server Error", {}
        if request.writer.output_size:  # the answer has begun: break it off rather than mend it
            raise ConnectionError
        self._refusals[status] += 1
        return web.json_response({"detail": detail}, status=status, headers=headers)

    def _check_token(self, request: web.Request) -> None:
        """Raises Refused (401); the time that the comparison takes tells nothing of the token."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given, right = token.strip().encode(errors="surrogateescape"), self._settings.api_token
        if not (hmac.compare_digest(given, right.encode()) and scheme.lower() == "bearer"):
            if request.path != "/" or request.method not in ("GET", "HEAD"):
                raise Refused(401, "Missing or wrong API token", {"WWW-Authenticate": "Bearer"})

    async def publish(self, request: web.Request) -> web.Response:
        """POST /publish: answers when the events of the request are on disk."""
        commits, headers, most = self._commits, request.headers, self._settings.max_body_bytes
        media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type not in ("application/json", ""):
            raise Refused(415, "The Content-Type of events is application/json")
        encoding = headers.get("Content-Encoding", "").strip().lower()
        if encoding not in WINDOW_BITS:
            accept = {"Accept-Encoding": "gzip, deflate"}
            raise Refused(415, "A body is compressed by gzip or deflate", accept)
        length = request.content_length
        size = most if length is None or WINDOW_BITS[encoding] else length
        if max(size, length or 0) > most:
            raise too_large(most)
        commits.admit(size)
        try:
            body = await self._read_body(request.content)
            if WINDOW_BITS[encoding]:
                body = decompress(body, WINDOW_BITS[encoding], most)
            if len(body) > most:
                raise too_large(most)
            commits.in_flight_bytes += len(body) - size
            size = len(body)
            async with self._large if size > LARGE_BYTES else contextlib.nullcontext():
                publication = parse(body)
                del body  # what waits for the disk is only what is to be stored
                received, unique = len(publication.topics), await commits.submit(publication)
        finally:
            commits.in_flight_bytes -= size
        text = (
            f'{{"received": {received}, "unique_processed": {unique}, '
            f'"duplicate_dropped": {received - unique}, '
            f'"message": "Received {received} event(s) for processing"}}'
        )
        return web.Response(status=202, body=text.encode(), content_type="application/json")

    async def _read_body(self, content: StreamReader) -> bytes:
        """The body as it was sent; raises Refused (400, 408, 413, 503)."""
        try:
            if content.is_eof():  # it came together with the headers: no deadline, no waiting
                return content.read_nowait()
            body = bytearray()
            async with self._commits.arriving():
                while chunk := await content.readany():
                    body += chunk
                    if len(body) > self._settings.max_body_bytes:
                        raise too_large(self._settings.max_body_bytes)
            return bytes(body)
        except (web.RequestPayloadError, ConnectionError):
            raise Refused(400, "The body breaks off") from None

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /events: a snapshot as JSON or NDJSON, page by page; or a live feed.

        Rows are only added, so "up to the highest number of this moment" is a snapshot by itself:
        no transaction stays open between two pages, and no slow reader keeps the log from
        being reclaimed.
        """
        topic, accept = request.query.get("topic") or None, request.headers.get("Accept", "")
        form = next((form for form in FORMS if form in accept), "application/json")
        upto = await self._read(self._store.last_seq)
        from_now = request.query.get("after") == "latest"
        after = upto if from_now else integer(request.query, "after", 0, 0)
        rest = integer(request.query, "limit", 1, MAX_INTEGER)
        is_feed, is_json = form == "text/event-stream", form == "application/json"
        if is_feed:
            after = integer(request.headers, "Last-Event-ID", 0, after)
        headers = {"Content-Type": form, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if is_feed:
            await self._feed(response, topic, after, rest)
            return response
        if is_json:
            await response.write(b'{"topic": %b, "events": [' % json.dumps(topic).encode())
        total = 0
        while rest > total and after < upto:
            page = self._read(self._store.page, form, topic, after, upto, rest - total)
            number, after, text = await page
            if not number:
                break
            await response.write(b"," + text if is_json and total else text)
            total += number
        if is_json:
            await response.write(b'], "count": %d, "last_seq": %d}' % (total, after))
        return response

    async def _feed(
        self, response: web.StreamResponse, topic: str | None, after: int, rest: int
    ) -> None:
        """Server-Sent Events: what is stored, then what comes, until `rest` are sent or we stop.

        A subscriber is a place in the sequence and nothing else: there is no buffer that could
        overflow. It reads the next page when its connection has taken the last one, so a slow
        one falls behind and catches up from the database, at the cost of a page.
        """
        self._subscribers += 1
        try:
            await response.write(b"retry: 1000\n\n")
            while rest and not self._commits.stopping:
                news = self._commits.news(topic)  # before reading, so that nothing slips between
                limit = min(rest, PAGE_EVENTS)
                number, after, text = await self._shared_page(news, topic, after, limit)
                rest -= number
                if number:
                    await response.write(text)
                    await asyncio.sleep(FEED_PAGE_SECONDS * (self._subscribers - self._idle))
                    continue
                self._idle += 1
                try:
                    told, _ = await asyncio.wait([news], timeout=HEARTBEAT_SECONDS)
                finally:
                    self._idle -= 1
                if not told:
                    await response.write(b": nothing new\n\n")
        finally:
            self._subscribers -= 1

    async def _shared_page(
        self, news: asyncio.Future[None], topic: str | None, after: int, limit: int
    ) -> Page:
        """Store.page for a live feed: subscribers at the same place share one query.

        Only those who wait for the same news: a query from before it may not have seen it.
        """
        key = news, topic, after, limit
        if key not in self._pages:
            form, page = "text/event-stream", self._store.page
            query = self._read(page, form, topic, after, MAX_INTEGER, limit)
            self._pages[key] = asyncio.ensure_future(query)
            self._pages[key].add_done_callback(lambda _: self._pages.pop(key))
        return await asyncio.shield(self._pages[key])  # who leaves does not cancel it for others

    async def _read(self, query: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a method of the store in the reader thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.reader, query, *arguments)

    async def stats(self, request: web.Request) -> web.Response:
        """GET /stats: the counters, which live in the database and outlive the process."""
        received, stored, topics = await self._read(self._store.totals)
        totals = {
            "received": received,
            "unique_processed": stored,
            "duplicate_dropped": received - stored,
            "topics": topics,
            "uptime_seconds": round(time.time() - self._started, 2),
        }
        return web.json_response(totals)

    async def health(self, request: web.Request) -> web.StreamResponse:
        """GET /: whether events can be stored, as the last commit tells; for browsers, a page."""
        if DASHBOARD.exists() and "text/html" in request.headers.get("Accept", ""):
            headers = {"X-Frame-Options": "DENY", "Cache-Control": "no-cache", "Vary": "Accept"}
            return web.FileResponse(DASHBOARD, headers=headers)
        service = {"service": "Event Aggregator", "status": "running", "version": VERSION}
        if reason := self._commits.failure:
            service |= {"status": "failing", "reason": reason}
            return web.json_response(service, status=503)
        return web.json_response(service)

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus's text format 0.0.4."""
        received, stored, _ = await self._read(self._store.totals)
        refusals = {f'{{status="{code}"}}': n for code, n in sorted(self._refusals.items())}
        python, lite = sys.version.split()[0], sqlite3.sqlite_version
        build = f'{{version="{VERSION}",python="{python}",sqlite="{lite}"}}'
        outcomes = {'{outcome="unique"}': stored, '{outcome="duplicate"}': received - stored}
        commits = self._commits
        metrics = [
            ("events_received_total", "counter", "Events acknowledged.", {"": received}),
            ("events_processed_total", "counter", "The same, by outcome.", outcomes),
            ("requests_refused_total", "counter", "Requests refused, by status.", refusals),
            ("in_flight_bytes", "gauge", "Request bodies held.", {"": commits.in_flight_bytes}),
            ("requests_queued", "gauge", "Requests in no group yet.", {"": commits.queue.qsize()}),
            ("group_commit_seconds", "histogram", "Time they took.", commits.seconds.values()),
            ("group_commit_events", "histogram", "Events in each.", commits.events.values()),
            ("live_subscribers", "gauge", "Live feeds.", {"": self._subscribers}),
            ("database_bytes", "gauge", "Size with its log.", {"": self._store.size()}),
            ("process_start_time_seconds", "gauge", "Unix time.", {"": self._started}),
            ("build_info", "gauge", "Versions, as labels.", {build: 1}),
        ]
        text = ""
        for name, kind, what, values in metrics:
            name = name if name.startswith("process_") else f"aggregator_{name}"
            text += f"# HELP {name} {what}\n# TYPE {name} {kind}\n"
            text += "".join(f"{name}{suffix} {value}\n" for suffix, value in values.items())
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(text=text, headers=headers)


async def go_on(request: web.Request) -> None:
    """What a client that sends Expect waits for before its body; aiohttp's own answers 417."""
    if request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun


def too_large(most: int) -> Refused:
    """The answer to a body that is larger than allowed."""
    return Refused(413, f"The body is larger than {most} bytes")


def decompress(body: bytes, bits: int, most: int) -> bytes:
    """The body without its compression, and of a bomb its first `most` + 1 bytes."""
    if bits == 15 and body[:1] and body[0] & 15 != 8:
        bits = -15  # "deflate" without the zlib header that belongs to it: some clients do that
    inflate = zlib.decompressobj(bits)
    try:
        plain = inflate.decompress(body, most + 1)
    except zlib.error:
        raise Refused(400, "The compressed body is broken") from None
    if len(plain) <= most and (not inflate.eof or inflate.unused_data):
        raise Refused(400, "The compressed body breaks off, or something follows it")
    return plain


def integer(source: Mapping[str, str], name: str, least: int, default: int) -> int:
    """A query parameter, or a header; raises Refused (422)."""
    loc = ["header" if name == "Last-Event-ID" else "query", name]
    try:
        value = int(source.get(name, default))
    except ValueError:
        why = "Input should be a valid integer, unable to parse string as an integer"
        raise invalid("int_parsing", loc, why) from None
    if value < least:
        why = f"Input should be greater than or equal to {least}"
        raise invalid("greater_than_equal", loc, why, {"ge": least})
    return min(value, MAX_INTEGER)


# --- Application -----------------------------------------------------------------------------
# Who knows whom: the store knows nobody, group commit knows the store, the handlers know both.
# They are handed to each other here and not kept in module globals, so that a test can have two.


def create_app(settings: Settings) -> web.Application:
    """The service as an aiohttp application; raises StartError."""
    store = Store(settings.db)
    commits = GroupCommit(store, settings.max_in_flight_bytes)
    api = Api(settings, store, commits)
    handler_args = {
        "auto_decompress": False,
        "keepalive_timeout": KEEPALIVE_SECONDS,
        "lingering_time": LINGER_SECONDS,
    }
    app = web.Application(middlewares=[api.answer_errors], handler_args=handler_args)
    app.router.add_post("/publish", api.publish, expect_handler=go_on)
    app.router.add_get("/events", api.events)
    app.router.add_get("/stats", api.stats)
    app.router.add_get("/metrics", api.metrics)
    app.router.add_get("/", api.health)

    async def run(app: web.Application) -> AsyncIterator[None]:
        commits.start()
        yield
        await commits.close()  # in the reverse order: what was opened first is closed last
        api.reader.shutdown()
        store.close()

    async def stop(app: web.Application) -> None:
        commits.stop()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(stop)  # before aiohttp waits for the handlers
    return app


# --- Command line ----------------------------------------------------------------------------
# Settings, the log, the signals. web.run_app would be shorter, but it answers a start that fails
# with a traceback, and a second signal with more patience than whoever sent it has.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with 2."""
        self.exit(2, f"aggregator: {message}\n")


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """A flag wins over its variable, and that over the default; exits with 2 on nonsense."""
    description = __doc__.partition("\n")[0]
    parser = Parser(prog="aggregator.py", description=description, allow_abbrev=False)
    for field in dataclasses.fields(Settings):
        variable = "DB_PATH" if field.name == "db" else field.name.upper()
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=environment.get(variable) or field.default,
            help=f"or {variable} in the environment (default: {field.default or 'none'})",
        )
    settings = Settings(**vars(parser.parse_args(arguments)))
    if not 0 <= settings.port <= 65_535:
        parser.error(f"--port is 0 to 65535, not {settings.port}")
    if settings.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        parser.error(f"--log-level is DEBUG, INFO, WARNING or ERROR, not {settings.log_level!r}")
    if not 1 <= settings.max_body_bytes <= settings.max_in_flight_bytes < sys.maxsize:
        parser.error("--max-body-bytes is 1 to --max-in-flight-bytes, so that one body fits")
    if not re.fullmatch("[!-~]*", settings.api_token):
        parser.error("--api-token is printable ASCII without spaces: a header has to carry it")
    return settings


class LinesFormatter(logging.Formatter):
    """Gives each line of a record its own time and level, so none can pass for another record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        head = f"{self.formatTime(record)} - {record.name} - {record.levelname} - "
        return head + super().format(record).replace("\n", "\n" + head)


def set_up(log_level: str) -> None:
    """The log, to stderr; and enough open files for some thousand connections."""
    handler = logging.StreamHandler()
    handler.setFormatter(LinesFormatter("%(message)s"))
    logging.basicConfig(level=log_level, handlers=[handler])
    logging.raiseExceptions = False  # a full disk below the log must not end the service
    # aiohttp logs a traceback for what is not HTTP: the client's mistake, and answered with 400.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    with contextlib.suppress(AttributeError, OSError):  # glibc: give large blocks back when freed
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted; raises StartError."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    app = create_app(settings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port, backlog=1024).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        log.info("Listening on http://%s:%d", *runner.addresses[0][:2])
        await stop.wait()
        log.info("Stopping")
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one ends it at once
            signal.signal(number, lambda number, frame: os._exit(128 + number))
    except (OSError, UnicodeError) as why:
        address, reason = f"{settings.host}:{settings.port}", getattr(why, "strerror", why)
        raise StartError(f"cannot listen on {address}: {reason}") from why
    finally:
        await runner.cleanup()


def main() -> None:
    """`python aggregator.py`."""
    settings = read_settings(sys.argv[1:], os.environ)
    set_up(settings.log_level)
    # This process lives on short-lived lists: look for cycles less often, and not in the modules.
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    sys.setswitchinterval(GIL_SECONDS)
    try:
        asyncio.run(serve(settings))
    except StartError as why:
        sys.exit(f"aggregator: {why}")


if __name__ == "__main__":
    main()
