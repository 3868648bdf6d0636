"""An event aggregator: it keeps each event exactly once and loses none that it acknowledged.

Publishers on an unreliable network can do no better than to send an event again until somebody
says that it arrived (at-least-once delivery). So the same event comes many times, also at the
same moment on two connections, also after a crash. A consumer has to make that harmless: it must
be idempotent. This is such a consumer, laid out in the order in which an event travels:

    POST /publish - admit - asyncio.Queue - the consumer parses, validates - batches that are ready
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
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import date
from itertools import chain, compress
from operator import itemgetter, not_
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

from aiohttp import HttpVersion11, StreamReader, helpers, web

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
MAX_ERRORS = 100  # listed for one request: enough to find the mistake
BATCH_REQUESTS = 16  # parsed in a row: fewer cost more each, more keep the writer waiting
MAX_GROUP_BYTES = MIB // 2  # in a batch or a commit: more make it longer, but hardly cheaper
BUSY_SECONDS = 2.0  # to wait for another process's lock before a group is refused
CACHE_KIB = 16 * 1024  # of database pages for each connection: the busy part of the index
CHECKPOINT_PAGES = 32_000  # 128 MB of log: a page that many groups changed is moved only once
PAGE_EVENTS = 500  # read at a time, which takes about 2 ms
PAGE_BYTES = MIB // 4  # of payloads read at a time (as characters), or one payload if larger
FEED_PAGE_SECONDS = 0.002  # for each page of all live feeds together: publishing comes first
HEARTBEAT_SECONDS = 15.0  # of silence on a live feed: proxies hang up after 30 or 60
BODY_SECONDS = 30.0  # for a body to arrive
SLOW_SECONDS = 1.0  # after which a body on its way must yield where room is short
KEEPALIVE_SECONDS = 30.0  # for a connection to begin a request and to finish its headers
SHUTDOWN_SECONDS = 1.0  # for answers under way; aiohttp waits it twice, docker stop gives 10 s
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
        self.status, self.detail, self.headers = status, detail, headers


class Rows(NamedTuple):
    """Events ready to be stored; all three in the same order."""

    text: bytes  # "[topic, event_id, timestamp, source, payload],[…],…", JSON in UTF-8
    topics: list[str]
    event_ids: list[str]


def refuse_constant(name: str) -> NoReturn:
    """What json calls for three words that it knows and JSON does not."""
    raise ValueError("NaN and Infinity are not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
)
FIELDS = ("topic", "event_id", "timestamp", "source", "payload")
FIELDS_OF = itemgetter(*FIELDS)
# Controls could forge a line of the log, and so could the two separators that Unicode adds.
NAME = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,%d}" % MAX_NAME_CHARACTERS)
# datetime.fromisoformat alone also takes week dates, dates without a time, and a trailing NUL.
TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ]"
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]+)?)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?"
)


def parse(body: bytes) -> tuple[list[Any], list[Any]]:
    """The events of a body, not yet validated, and their loc: [] if the body itself is the event.

    Raises Refused (422), or ValueError or RecursionError for what is no JSON.
    """
    if not body:
        raise Refused(422, [entry(["body"], "missing", "Field required")])
    events, loc = DECODER.decode(body.decode()), ["body"]
    if type(events) is dict and "events" in events and "event_id" not in events:
        events, loc = events["events"], ["body", "events"]
    elif type(events) is not list:
        return [events], []
    if type(events) is not list:
        raise Refused(422, [entry(loc, "list_type", "Input should be a valid list")])
    if not events:
        why = "List should have at least 1 item after validation, not 0"
        ctx = {"field_type": "List", "min_length": 1, "actual_length": 0}
        raise Refused(422, [entry(loc, "too_short", why, ctx)])
    return events, loc


def take(events: list[Any]) -> Rows | None:
    """The straight path: the events as Rows, or None if anything is wrong with any."""
    rows, is_name = [], NAME.fullmatch
    try:
        for topic, event_id, timestamp, source, payload in map(FIELDS_OF, events):
            topic, event_id, source = topic.strip(), event_id.strip(), source.strip()
            if not (is_name(topic) and is_name(event_id) and is_name(source)):
                return None
            if not (TIMESTAMP.fullmatch(timestamp) and type(payload) is dict):
                return None
            date.fromisoformat(timestamp[:10])
            rows.append((topic, event_id, timestamp, source, payload))
        text = ENCODER.encode(rows)[1:-1].encode()
    except (KeyError, TypeError, AttributeError, ValueError):
        # A field that is not there, an event that is no object, a name that is no string, a day
        # that does not exist, a number or a character that has no place in JSON.
        return None
    return Rows(text, [row[0] for row in rows], [row[1] for row in rows])


def explain(events: list[Any], loc: list[Any]) -> list[dict[str, Any]]:
    """All that is wrong with the events, in their order, at most MAX_ERRORS."""
    errors: list[dict[str, Any]] = []
    for index, event in enumerate(events):
        here = [*loc, index] if loc else ["body"]
        if type(event) is dict:
            broken = {field: broken_rule(event, field) for field in FIELDS}
            errors += [entry([*here, field], *rule) for field, rule in broken.items() if rule]
        else:
            why = "Input should be a valid dictionary or object to extract fields from"
            errors.append(entry(here, "model_attributes_type", why))
        if len(errors) >= MAX_ERRORS:
            break
    return errors[:MAX_ERRORS]


def broken_rule(event: dict[str, Any], field: str) -> tuple[Any, ...] | None:
    """The first rule that a field of an event breaks: type, msg and perhaps ctx of its entry."""
    if field not in event:
        return "missing", "Field required"
    value = event[field]
    if field == "payload":
        if type(value) is not dict:
            return "dict_type", "Input should be a valid dictionary"
    elif type(value) is not str:
        what = "datetime" if field == "timestamp" else "string"
        return f"{what}_type", f"Input should be a valid {what}"
    elif field == "timestamp":
        why = "expected YYYY-MM-DDTHH:MM:SS[.fraction][Z or +HH:MM]"
        with contextlib.suppress(ValueError):
            if TIMESTAMP.fullmatch(value):
                why = "there is no such day"
                date.fromisoformat(value[:10])
                return None
        return "datetime_parsing", f"Input should be a valid datetime, {why}"
    elif not value:
        return "string_too_short", "String should have at least 1 character", {"min_length": 1}
    elif not value.strip():
        return "value_error", "Value error, Field cannot be empty or whitespace only"
    elif len(value.strip()) > MAX_NAME_CHARACTERS:
        ctx = {"max_length": MAX_NAME_CHARACTERS}
        return "string_too_long", "String should have at most 512 characters", ctx
    elif not NAME.fullmatch(value.strip()):
        why = "Field cannot contain control characters or line separators"
        return "value_error", f"Value error, {why}"
    try:
        ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        why = "Input should be a valid string, unable to parse raw data as a unicode string"
        return "string_unicode", why
    except ValueError:  # Python reads 1e400 as infinity
        return "finite_number", "Input should be a finite number"
    return None


def entry(loc: list[Any], kind: str, msg: str, ctx: Any = None) -> dict[str, Any]:
    """An entry of a 422's detail, in pydantic's vocabulary, which clients of FastAPI know."""
    return {"type": kind, "loc": loc, "msg": msg, **({"ctx": ctx} if ctx else {})}


def not_json(error: Exception) -> Refused:
    """The answer to a body that is no JSON, for what Python says of it."""
    position = getattr(error, "pos", getattr(error, "start", None))
    why = getattr(error, "msg", getattr(error, "reason", str(error).partition(":")[0]))
    loc = ["body"] if position is None else ["body", position]
    return Refused(422, [entry(loc, "json_invalid", "JSON decode error", {"error": why})])


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
# For each connection. SQLite copies a page before a statement changes it, to undo half of one.
PRAGMAS = f"""
    PRAGMA synchronous = FULL;    -- COMMIT waits until the log is on the disk
    PRAGMA fullfsync = ON;        -- macOS: on the disk, and not in its cache
    PRAGMA temp_store = MEMORY;   -- for those copies: in a file they were half of all writes
    PRAGMA cache_size = -{CACHE_KIB};
    PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};
"""
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
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM events"
TOTALS = """
    SELECT total(received), total(received - duplicates), json_group_array(name)
    FROM (SELECT * FROM topics ORDER BY name)
"""
# The recursion steps from event to event until the page is full, so that a page holds either
# many small payloads or few large ones. LIMIT 500 would be half as dear, and hold 500 of 4 MB.
PAGE = """
    WITH RECURSIVE page (number, seq, size, item) AS (
        SELECT 0, :after, 0, NULL
        UNION ALL
        SELECT number + 1, events.seq, size + length(payload), {item}
        FROM page JOIN events
          ON events.seq = (SELECT min(seq) FROM events WHERE {topic} seq > page.seq)
        WHERE number < :limit AND size < :size AND events.seq <= :upto
    )
    SELECT max(number), max(seq), group_concat(item, :separator) FROM page
"""
ONE_TOPIC = "topic_id = (SELECT id FROM topics WHERE name = :topic) AND"
# The payload is JSON already. To have SQLite read it again would cost memory, and time.
EVENT = """'{"topic":' || json_quote((SELECT name FROM topics WHERE id = topic_id))
    || ',"event_id":' || json_quote(event_id) || ',"timestamp":' || json_quote(timestamp)
    || ',"source":' || json_quote(source) || ',"payload":' || payload || '}'"""
# The representations of GET /events: an event as SQL, and what separates two.
FEED, LINES, ARRAY = "text/event-stream", "application/x-ndjson", "application/json"
FORMS = {
    FEED: (f"'id: ' || events.seq || char(10) || 'data: ' || {EVENT} || char(10, 10)", ""),
    LINES: (f"{EVENT} || char(10)", ""),
    ARRAY: (EVENT, ","),
}
Page = tuple[int, int, bytes]  # how many events, the last one's sequence number, their text


class StartError(Exception):
    """Why the service cannot start, in one line."""


class Store:
    """The SQLite file, by two connections: one writes, one reads. Every method blocks."""

    def __init__(self, path: str) -> None:
        """Opens the file, or makes it; raises StartError."""
        try:
            if sqlite3.sqlite_version_info < (3, 38):
                raise StartError(f"SQLite {sqlite3.sqlite_version} is older than 3.38")
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._writer, self._reader = connect(path), connect(path)
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            (tables,) = self._writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if version > SCHEMA_VERSION:
                raise StartError(f"a newer version of this service made it (schema {version})")
            if tables and not version:
                raise StartError("it belongs to another program")
            if self._writer.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise StartError("its file system cannot share memory, as write-ahead logs must")
            self._writer.executescript(SCHEMA)  # always: it proves that the file can be written
            self._writer.executescript(GROUP_COMMIT)
            self._reader.execute("PRAGMA query_only = ON")
        except (OSError, sqlite3.Error, StartError) as why:
            raise StartError(f"cannot use the database {path}: {why}") from why

    def commit(self, group: Sequence[Rows]) -> bytearray:
        """Stores a group in one transaction; when this returns, all of it is on disk.

        Returns a flag for each event of the group, in order: 1 it was new, 0 a duplicate.
        Raises sqlite3.Error; then nothing of the group is stored.
        """
        text = b"[%b]" % b",".join([rows.text for rows in group])
        topics = list(chain.from_iterable([rows.topics for rows in group]))
        self._writer.execute(COMMIT_GROUP, [text, json.dumps(list(Counter(topics).items()))])
        is_new = bytearray(len(topics))
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
        values |= {"limit": min(limit, PAGE_EVENTS), "size": PAGE_BYTES}
        number, last_seq, text = self._reader.execute(query, values).fetchone()
        return number, last_seq, (text or "").encode()

    def totals(self) -> tuple[int, int, list[str]]:
        """Events received, events stored, and the sorted topics, all of one moment."""
        received, stored, topics = self._reader.execute(TOTALS).fetchone()
        return int(received), int(stored), json.loads(topics)

    def close(self) -> None:
        """Closes the file; the last connection to go moves the log into it and removes the log."""
        self._reader.close()
        self._writer.close()


def connect(path: str) -> sqlite3.Connection:
    """A connection that leaves transactions to us, for any one thread at a time."""
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.executescript(PRAGMAS)
    return db


# --- Group commit ----------------------------------------------------------------------------
# Admission, queue, consumer, writer, futures. An fsync takes a disk a third of a millisecond to
# ten; one for each request would be the end of all speed. So the writer commits together all that
# is ready, and meanwhile the consumer makes the next batches ready: groups grow with the load by
# themselves. No timer, and a lone request waits for nobody. PostgreSQL, MySQL and Kafka's brokers
# do the same.
#
# The consumer parses some bodies in a row and encodes their events in one call, which costs less
# than each in its own handler: code and data are still in the processor's caches. The writer keeps
# its thread: by way of the event loop, from one group to the next took a third of a millisecond.

# What a commit fails with for what is in it, and not because a disk is full, locked or broken.
ERRORS_OF_EVENTS = sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT
Request = tuple[bytes, "asyncio.Future[tuple[int, int]]"]  # a body; the future: received, new


class Batch(NamedTuple):
    """Some requests that are ready to be committed."""

    requests: list[Request]
    counts: list[int]  # of the events of each
    rows: Rows


def make_batch(requests: list[Request]) -> Batch:
    """The requests as a batch; raises Refused (422), which may be due to any one of them."""
    events, counts = [], []
    try:
        for body, _ in requests:
            found, loc = parse(body)
            events += found
            counts.append(len(found))
        if rows := take(events):
            return Batch(requests, counts, rows)
        refusal = Refused(422, explain(events, loc))
    except (ValueError, RecursionError) as error:
        refusal = not_json(error)
    raise refusal


class Histogram:
    """How often a value was in which range, for GET /metrics."""

    def __init__(self, *bounds: float) -> None:
        self._buckets, self._sum = dict.fromkeys([*map(str, bounds), "+Inf"], 0), 0.0

    def observe(self, value: float) -> None:
        """Counts a value under each bound that is not below it, as Prometheus has it."""
        self._sum += value
        for bound in self._buckets:
            self._buckets[bound] += value <= float(bound)

    def values(self) -> dict[str, float]:
        """The samples, by what follows the metric's name."""
        buckets = {f'_bucket{{le="{bound}"}}': n for bound, n in self._buckets.items()}
        return {**buckets, "_sum": self._sum, "_count": self._buckets["+Inf"]}


class GroupCommit:
    """Takes in bodies one by one and commits them in groups."""

    def __init__(self, store: Store, max_in_flight_bytes: int) -> None:
        self.in_flight_bytes = 0
        self.waiting = 0  # requests, for their commit
        self.stopping = False
        self.failure: str | None = None  # why the last commit failed, None if it did not
        self.arriving: dict[asyncio.Timeout, float] = {}  # bodies: since when, the oldest first
        self.seconds = Histogram(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
        self.events = Histogram(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
        self._store, self._max_in_flight_bytes = store, max_in_flight_bytes
        self._queue: asyncio.Queue[Request] = asyncio.Queue()
        self._ready: SimpleQueue[Batch | None] = SimpleQueue()
        # What a live feed waits for, by topic (None: any). Weak: gone with the last who waits.
        self._news: Any = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the consumer and the writer; at the end, until the last request is committed."""
        self._loop, executor = asyncio.get_running_loop(), ThreadPoolExecutor(1, "writer")
        consumer = asyncio.create_task(self._consume(), name="consumer")
        writer = self._loop.run_in_executor(executor, self._write)
        yield
        await self._queue.join()
        consumer.cancel()
        self._ready.put(None)
        await writer
        executor.shutdown()

    # Admission bounds the memory: the bytes of a body are accounted for from before they are read
    # until they are committed, and so the queues need no bound of their own.

    def admit(self, size: int) -> None:
        """Takes `size` bytes in flight, for the caller to give back; raises Refused (503)."""
        if self.stopping:
            raise unavailable("The service is stopping")
        if self.in_flight_bytes + size > self._max_in_flight_bytes:
            self.hurry(SLOW_SECONDS)  # who sends half a body and falls silent keeps nobody out
            raise unavailable("Too many bytes in flight")
        self.in_flight_bytes += size

    def hurry(self, seconds: float) -> None:
        """Ends the wait for the bodies that have been arriving for longer than that."""
        for deadline, since in self.arriving.items():
            if since <= self._loop.time() - seconds and not deadline.expired():
                deadline.reschedule(0)

    def submit(self, body: bytes) -> asyncio.Future[tuple[int, int]]:
        """Resolved when the events of a body are on disk: how many there were, how many were new.

        Or Refused: 503 where they could not be stored, 422 if they are not good.
        """
        future = self._loop.create_future()
        self._queue.put_nowait((body, future))
        self.waiting += 1
        return future

    async def _consume(self) -> None:
        """The consumer: makes batches of what waits in the queue, for ever."""
        while True:
            requests = [await self._queue.get()]
            size = len(requests[0][0])
            while len(requests) < BATCH_REQUESTS and size < MAX_GROUP_BYTES:
                if self._queue.empty():
                    break
                requests.append(self._queue.get_nowait())
                size += len(requests[-1][0])
            self._pass_on(requests)
            del requests  # while the consumer waits, it holds nothing

    def _pass_on(self, requests: list[Request]) -> None:
        """To the writer, as one batch; if anything is wrong with it, each request by itself."""
        try:
            self._ready.put(make_batch(requests))
            return
        except Exception as why:
            fault = why.with_traceback(None)  # whose frames would keep the bodies in memory
        if len(requests) == 1:
            self._resolve(requests[0], fault)
        else:
            for request in requests:
                self._pass_on([request])

    def _write(self) -> None:
        """The writer, a thread: commits all that is ready, until it is told to end."""
        while batch := self._ready.get():
            group, size = [batch], len(batch.rows.text)
            while size < MAX_GROUP_BYTES and not self._ready.empty():
                group.append(self._ready.get())
                size += len(group[-1].rows.text)
            self._commit(group)

    def _commit(self, group: list[Batch]) -> None:
        """In the writer's thread: stores a group, and has the event loop answer it."""
        started = time.perf_counter()
        try:
            if self.stopping and self.failure:  # the disk had its chance, and time is short
                raise sqlite3.OperationalError(self.failure)
            outcome: Any = self._store.commit([batch.rows for batch in group])
        except Exception as why:
            outcome = why.with_traceback(None)
        requests = [request for batch in group for request in batch.requests]
        code = getattr(outcome, "sqlite_errorcode", 0) & 0xFF
        if code in ERRORS_OF_EVENTS and len(requests) > 1:
            for request in requests:  # one by one, so that only the culprit is refused
                try:
                    self._commit([make_batch([request])])
                except Exception as why:
                    fault = why.with_traceback(None)
                    self._loop.call_soon_threadsafe(self._resolve, request, fault)
        else:
            seconds = time.perf_counter() - started
            self._loop.call_soon_threadsafe(self._answer, group, requests, outcome, seconds)

    def _answer(
        self, group: list[Batch], requests: list[Request], outcome: Any, seconds: float
    ) -> None:
        """On the event loop: tells each request of a group what became of it."""
        if isinstance(outcome, Exception):
            for request in requests:
                self._resolve(request, self._refusal(outcome))
            return
        self.seconds.observe(seconds)
        self.events.observe(len(outcome))
        if self.failure:
            log.warning("Commits work again")
            self.failure = None
        start = 0
        for request, count in zip(requests, chain.from_iterable([b.counts for b in group])):
            self._resolve(request, (count, outcome.count(1, start, start + count)))
            start += count
        self._loop.call_soon(self._announce, group, outcome)  # when the answers are out

    def _announce(self, group: list[Batch], is_new: bytearray) -> None:
        topics = list(chain.from_iterable([batch.rows.topics for batch in group]))
        if self._news and any(is_new):
            self._tell([None, *compress(topics, is_new)])
        log_events(topics, chain.from_iterable([batch.rows.event_ids for batch in group]), is_new)

    def _refusal(self, why: Exception) -> Refused:
        if str(why) == "malformed JSON":  # SQLite's parser gives up earlier than Python's may
            return not_json(ValueError("nested too deeply"))
        # SQLite's messages name no paths. Those of other errors might, and stay in the log.
        reason = str(why) if isinstance(why, sqlite3.Error) else type(why).__name__
        if reason != self.failure:  # once, and not for each request
            log.error("Commits fail: %s", why, exc_info=not isinstance(why, sqlite3.Error))
        self.failure = reason
        return unavailable(f"The database cannot be written: {reason}")

    def _resolve(self, request: Request, result: Any) -> None:
        self.waiting -= 1
        self._queue.task_done()
        future = request[1]
        if not future.done():  # done: nobody waits; its events are stored all the same
            is_error = isinstance(result, Exception)
            future.set_exception(result) if is_error else future.set_result(result)

    def news(self, topic: str | None) -> asyncio.Future[None]:
        """Resolved when the next new event of the topic (None: of any) is on disk."""
        future = self._news.get(topic)
        if future is None:
            future = self._news[topic] = self._loop.create_future()
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


def unavailable(detail: str) -> Refused:
    """Nothing is stored, and the client should send the same again, which is safe."""
    return Refused(503, detail, {"Retry-After": "1"})


def log_events(topics: Iterable[str], event_ids: Iterable[str], is_new: bytearray) -> None:
    """Logs what became of each event: two records of many lines, because a record costs 6 µs."""
    if log.isEnabledFor(logging.WARNING):
        names = zip(topics, event_ids)
        lines = [f" event: topic={topic}, event_id={event_id}" for topic, event_id in names]
        if new := "\nProcessed new".join(compress(lines, is_new)):
            log.info("Processed new%s", new)
        if duplicates := "\nDropped duplicate".join(compress(lines, map(not_, is_new))):
            log.warning("Dropped duplicate%s", duplicates)


# --- HTTP ------------------------------------------------------------------------------------
# The handlers, and one middleware that turns every error into its answer. Bodies are read here and
# not by aiohttp's request.read(): to refuse them before they take memory, and because aiohttp
# takes a truncated gzip for whole.

WINDOW_BITS = {"identity": 0, "gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's codes
MAX_INTEGER = 2**63 - 1  # SQLite's
DASHBOARD = Path(__file__).with_name("dashboard.html")
RECEIPT = (
    "HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    "Connection: %s\r\nDate: %s\r\n\r\n%s"
)


class Receipt(NamedTuple):
    """A 202 in one piece, with all that aiohttp asks of a response; its own costs a sixth more."""

    text: str
    keep_alive: bool

    async def prepare(self, request: web.BaseRequest) -> None:
        """Sends it; waits if the client does not read."""
        connection, now = ("close", "keep-alive")[self.keep_alive], helpers.rfc822_formatted_time()
        message = RECEIPT % (len(self.text), connection, now, self.text)
        await request.writer.write_eof(message.encode())

    async def write_eof(self) -> None:
        """Nothing is left to be sent."""


Answer = web.StreamResponse | Receipt
Handler = Callable[[web.Request], Awaitable[Answer]]


class Api:
    """The handlers, with what they share."""

    def __init__(self, settings: Settings, store: Store, commits: GroupCommit) -> None:
        self._settings, self._store, self._commits = settings, store, commits
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._refusals: Counter[int] = Counter()  # by status, for GET /metrics
        self._pages: dict[Any, asyncio.Future[Page]] = {}  # that live feeds are reading now
        self._subscribers = self._idle = 0  # live feeds, and those that wait for news
        self._started = time.time()

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Handler) -> Answer:
        """Lets in who may come in, and answers every error as {"detail": …}."""
        try:
            if self._settings.api_token:
                self._check_token(request)
            return await handler(request)
        except Refused as why:
            status, detail, headers = why.status, why.detail, why.headers
        except web.HTTPException as why:  # 404 and 405
            allow = why.headers.get("Allow")
            status, detail, headers = why.status, why.reason, {"Allow": allow} if allow else None
        except sqlite3.Error as why:
            log.error("The database cannot be read: %s", why)
            status, detail, headers = 503, "The database cannot be read", {"Retry-After": "1"}
        except ConnectionError:  # the client has gone
            raise
        except Exception:
            log.exception("A fault of this program")
            status, detail, headers = 500, "Internal Server Error", None
        if request.writer.output_size:  # the answer has begun: break it off rather than mend it
            raise ConnectionError
        self._refusals[status] += 1
        return web.json_response({"detail": detail}, status=status, headers=headers)

    def _check_token(self, request: web.Request) -> None:
        """Raises Refused (401); the time that the comparison takes tells nothing of the token."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given, right = token.strip().encode(errors="surrogateescape"), self._settings.api_token
        is_right = hmac.compare_digest(given, right.encode()) and scheme.lower() == "bearer"
        if not is_right and (request.path != "/" or request.method not in ("GET", "HEAD")):
            raise Refused(401, "Missing or wrong API token", {"WWW-Authenticate": "Bearer"})

    async def publish(self, request: web.Request) -> Receipt:
        """POST /publish: answers when the events of the request are on disk."""
        commits, headers, most = self._commits, request.headers, self._settings.max_body_bytes
        media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type not in ("application/json", ""):
            raise Refused(415, "The Content-Type of events is application/json")
        bits = WINDOW_BITS.get((headers.get("Content-Encoding") or "identity").strip().lower())
        if bits is None:
            accept = {"Accept-Encoding": "gzip, deflate"}
            raise Refused(415, "A body is compressed by gzip or deflate", accept)
        length = request.content_length
        size = most if length is None or bits else length
        if max(size, length or 0) > most:
            raise Refused(413, f"The body is larger than {most} bytes")
        commits.admit(size)
        try:
            content = request.content  # at its end: it came together with the headers
            body = content.read_nowait() if content.is_eof() else await self._read_body(content)
            if bits and len(body) <= most:
                body = decompress(body, bits, most)
            if len(body) > most:
                raise Refused(413, f"The body is larger than {most} bytes")
            commits.in_flight_bytes += len(body) - size
            size = len(body)
            received, unique = await commits.submit(body)
        finally:
            commits.in_flight_bytes -= size
        text = f'{{"received": {received}, "unique_processed": {unique}, "duplicate_dropped": '
        text += f'{received - unique}, "message": "Received {received} event(s) for processing"}}'
        return Receipt(text, request.keep_alive)

    async def _read_body(self, content: StreamReader) -> bytes:
        """The body, or the beginning of one too large; raises Refused (400, 408, 503)."""
        body, arriving = bytearray(), self._commits.arriving
        deadline = asyncio.timeout(BODY_SECONDS)
        arriving[deadline] = asyncio.get_running_loop().time()
        try:
            async with deadline:
                while chunk := await content.readany():
                    body += chunk
                    if len(body) > self._settings.max_body_bytes:
                        break
            return bytes(body)
        except TimeoutError:
            if not deadline.when():  # it was hurried
                raise unavailable("The service is stopping, or too busy for a slow body") from None
            raise Refused(408, f"The body did not arrive within {BODY_SECONDS:.0f} s") from None
        except (web.RequestPayloadError, ConnectionError):
            raise Refused(400, "The body breaks off") from None
        finally:
            del arriving[deadline]

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /events: a snapshot as JSON or NDJSON, page by page; or a live feed.

        Rows are only added, so "up to the highest number of this moment" is a snapshot by itself:
        no transaction stays open between two pages, and no slow reader keeps the log from
        being reclaimed.
        """
        topic, accept = request.query.get("topic") or None, request.headers.get("Accept", "")
        form = next((form for form in FORMS if form in accept), ARRAY)
        upto = await self._read(self._store.last_seq)
        from_now = request.query.get("after") == "latest"
        after = upto if from_now else integer(request.query, "after", 0, 0)
        rest = integer(request.query, "limit", 1, MAX_INTEGER)
        is_feed, is_json = form == FEED, form == ARRAY
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
        one falls behind and catches up from the database, at the cost of a page. Subscribers at
        the same place share a query if they wait for the same news: one from before it may not
        have seen it.
        """
        pages = self._pages
        self._subscribers += 1
        try:
            await response.write(b"retry: 1000\n\n")
            while rest and not self._commits.stopping:
                news = self._commits.news(topic)  # before reading, so that nothing slips between
                limit = min(rest, PAGE_EVENTS)
                place = news, after, limit
                if place not in pages:
                    query = self._read(self._store.page, FEED, topic, after, MAX_INTEGER, limit)
                    pages[place] = asyncio.ensure_future(query)
                    pages[place].add_done_callback(lambda _, place=place: pages.pop(place))
                # A subscriber that leaves does not cancel the query for the others.
                number, after, text = await asyncio.shield(pages[place])
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
        commits, files = self._commits, [Path(self._settings.db), Path(self._settings.db + "-wal")]
        outcomes = {'{outcome="unique"}': stored, '{outcome="duplicate"}': received - stored}
        refusals = {f'{{status="{code}"}}': n for code, n in sorted(self._refusals.items())}
        size = sum(file.stat().st_size for file in files if file.exists())
        python, lite = sys.version.split()[0], sqlite3.sqlite_version
        build = f'{{version="{VERSION}",python="{python}",sqlite="{lite}"}}'
        text = ""
        for name, kind, what, value in (
            ("events_received_total", "counter", "Events acknowledged.", received),
            ("events_processed_total", "counter", "The same, by outcome.", outcomes),
            ("requests_refused_total", "counter", "Requests refused, by status.", refusals),
            ("in_flight_bytes", "gauge", "Bodies held.", commits.in_flight_bytes),
            ("requests_queued", "gauge", "Requests before their commit.", commits.waiting),
            ("group_commit_seconds", "histogram", "Time of a commit.", commits.seconds.values()),
            ("group_commit_events", "histogram", "Events in a commit.", commits.events.values()),
            ("live_subscribers", "gauge", "Live feeds.", self._subscribers),
            ("database_bytes", "gauge", "Size of the database with its log.", size),
            ("process_start_time_seconds", "gauge", "Start, Unix time.", self._started),
            ("build_info", "gauge", "Versions, as labels.", {build: 1}),
        ):
            name = name if name.startswith("process_") else f"aggregator_{name}"
            text += f"# HELP {name} {what}\n# TYPE {name} {kind}\n"
            for suffix, number in (value if isinstance(value, dict) else {"": value}).items():
                text += f"{name}{suffix} {number}\n"
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(text=text, headers=headers)


async def go_on(request: web.Request) -> None:
    """What a client that sends Expect waits for before its body; aiohttp's own answers 417."""
    if request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun


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
        raise Refused(422, [entry(loc, "int_parsing", why)]) from None
    if value < least:
        why = f"Input should be greater than or equal to {least}"
        raise Refused(422, [entry(loc, "greater_than_equal", why, {"ge": least})])
    return min(value, MAX_INTEGER)


# --- Application -----------------------------------------------------------------------------
# Who knows whom: the store knows nobody, group commit knows the store, the handlers know both.
# They are handed to each other here and not kept in module globals, so that a test can have two.


def create_app(settings: Settings) -> web.Application:
    """The service as an aiohttp application; raises StartError."""
    store = Store(settings.db)
    commits = GroupCommit(store, settings.max_in_flight_bytes)
    api = Api(settings, store, commits)
    handler_args = {"auto_decompress": False, "keepalive_timeout": KEEPALIVE_SECONDS}
    app = web.Application(middlewares=[api.answer_errors], handler_args=handler_args)
    app.router.add_post("/publish", api.publish, expect_handler=go_on)
    app.router.add_get("/events", api.events)
    app.router.add_get("/stats", api.stats)
    app.router.add_get("/metrics", api.metrics)
    app.router.add_get("/", api.health)

    async def run(app: web.Application) -> AsyncIterator[None]:
        async with commits.running():
            yield
        api.reader.shutdown()  # in the reverse order: what was opened first is closed last
        store.close()

    async def stop(app: web.Application) -> None:
        commits.stop()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(stop)  # before aiohttp waits for the handlers
    return app


# --- Command line ----------------------------------------------------------------------------
# Settings, the log, the signals. web.run_app would be shorter, but it answers a start that fails
# with a traceback, and a second signal with more patience than whoever sent it has.


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """A flag wins over its variable, and that over the default; exits with 2 on nonsense."""
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser("aggregator.py", argparse.SUPPRESS, about, allow_abbrev=False)
    for field in fields(Settings):
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
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
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
