"""An event aggregator: it keeps each event exactly once and loses none that it acknowledged.

Publishers on an unreliable network send an event again until somebody says that it arrived. This
is called at-least-once delivery. So the same event comes many times: at the same moment on two
connections, or again after a crash. A consumer has to make this harmless: it must be idempotent.
This module is such a consumer. It is laid out in the order in which an event travels:

    POST /publish ─ memory left? ─ asyncio.Queue ─ consumer: validate ─ queue of the writer ──┐
         202 ◄─ counts of this request ◄─ future ◄─ COMMIT, fsync ◄─ a group: one transaction ◄┘
    GET /events, /topics, /stats ─ reader's thread, its own read-only connection ─ pages, streamed

What is "the same event"? One with the same topic and event_id, white space around them aside. The
first one is kept. Each later one is a duplicate and is dropped, whatever the rest of it says.

Four rules hold everywhere, and the rest follows from them:

    1. 202 means on disk. The future of a request is resolved after COMMIT with synchronous=FULL.
    2. One writer. In this process only the writer's thread stores events, and what belongs
       together (events and counters) changes in one transaction.
    3. The database decides what is a duplicate: a UNIQUE constraint and ON CONFLICT DO NOTHING.
       With a SELECT before the INSERT, two writers could both see nothing, and both insert.
    4. A request stands or falls alone: all of it is stored or nothing, and no other request in
       the same group suffers for it.

What a crash leaves, and what the publisher does then:

    before COMMIT           nothing is stored  ─ it got no 202, so it sends again: new events
    after COMMIT, no 202    all is stored      ─ it got no 202, so it sends again: duplicates
    after the 202           all is stored      ─ it has nothing left to do

The publisher cannot tell the first two apart, and need not. That is the whole idea.

To learn that idea, read Validation, the first half of Store (to SqliteStore.commit), and Group
commit. The rest is for daily operation: limits, checkpoints, feeds, the command line.

`python aggregator.py` runs it, and `python aggregator.py --help` lists the settings.
"""

from __future__ import annotations

import os
import signal

# Process 1 of a container ignores a signal that it has no handler for. The other imports take
# 0.2 s, so there is a handler before them.
if __name__ == "__main__":
    for early_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(early_signal, lambda number, frame: os._exit(0))

import argparse
import asyncio
import bisect
import contextlib
import errno
import functools
import gc
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import queue
import re
import socket
import sqlite3
import struct
import sys
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timedelta
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Protocol, Self, TypeVar

from aiohttp import StreamReader, web
from aiohttp.http import HttpProcessingError

T = TypeVar("T")
log = logging.getLogger("aggregator")


# --- Settings --------------------------------------------------------------------------------
# A setting is what an operator may want to change. The constants below are not settings: each has
# one right value for this design, and the reason for it stands beside it.

MIB = 1024 * 1024


def setting(default: Any, variable: str, meaning: str) -> Any:
    """A field of Settings: its default, its environment variable, and what --help says of it."""
    return field(default=default, metadata={"variable": variable, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set from outside. Each field is a flag, too: max_body_bytes, --max-body-bytes."""

    host: str = setting("127.0.0.1", "HOST", "address to listen on; 0.0.0.0 or :: is every one")
    port: int = setting(
        8080, "PORT", "port to listen on; 0 is any free one, and the log says which"
    )
    db: str = setting(
        "data/dedup.db",
        "DB_PATH",
        "SQLite file, made if it is not there; or postgresql://HOST/SERVICE_NAME",
    )
    log_level: str = setting("INFO", "LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR")
    max_body_bytes: int = setting(
        4 * MIB, "MAX_BODY_BYTES", "largest request body, after decompression"
    )
    # An event in memory takes several times the room of its text.
    max_in_flight_bytes: int = setting(
        6 * MIB, "MAX_IN_FLIGHT_BYTES", "request bodies held at once; beyond it, 503"
    )
    api_token: str = setting(
        "", "API_TOKEN", "if set, requests need the header Authorization: Bearer TOKEN"
    )


SERVICE_NAME = "Event Aggregator"
VERSION = "1.0.0"

MAX_NAME_CHARACTERS = 512  # of a topic, an event_id, a source: they are keys, and keys are short
MAX_NESTING = 500  # levels of JSON: far below what overflows the smallest stack of a thread
MAX_ERRORS = 100  # listed for one request: enough to find the mistake
MAX_INTEGER = 2**63 - 1  # SQLite's and PostgreSQL's

PIECE_REQUESTS = 32  # handed to the writer at a time: with more of them, it begins later
MAX_GROUP_BYTES = MIB // 2  # of bodies in a commit: a larger one is longer, and hardly cheaper
BUSY_SECONDS = 2.0  # to wait for another process's lock before a group is refused
OPEN_SECONDS = 10.0  # the same at the start, when several processes may be making the file
WATCH_SECONDS = 1.0  # between two looks for commits of other processes, and between two probes
PROBE_BYTES = 64 * 1024  # at least, in a probe: a nearly full disk has room for small commits only
CHECKPOINT_PAGES = 32_000  # 128 MB of log: a page that many groups changed is moved only once
CHECKPOINT_RETRY_PAGES = CHECKPOINT_PAGES // 4  # the log may grow by so many until the next try
CHECKPOINT_ROUNDS = 3  # each takes less time than the one before, and leaves less to the next
LOG_PAGES = CHECKPOINT_PAGES * 3 // 2  # the log's file keeps room: to make it longer is slow
SYNC_PAGES = 512  # moved pages (2 MB) that are written to the disk without a pause
WARN_WAL_BYTES = (
    1_000_000_000  # so long a write-ahead log means that something keeps it from being reused
)

PAGE_EVENTS = 500  # read at a time: some 2 ms of work
PAGE_BYTES = 64 * 1024  # of whole events read at a time, or one event if it is larger
TOPIC_BYTES = 2_200  # a topic with its counters, at most
READERS_BYTES = 32 * MIB  # pages in memory for all readers together
PAGES_IN_ROOM = 64  # a page may take 1/64 of the room that is left
READER_SECONDS = 60.0  # for a reader to take a piece of its answer: after it, it is let go
STUCK_SECONDS = 5.0  # for the same, while others wait for the room that it takes
ROOM_SECONDS = 1.0  # between two looks whether there is room again
WRITE_BYTES = 64 * 1024  # of an answer that are handed to the connection at a time
FEED_PAGE_SECONDS = 0.002  # for each page of all live feeds together: publishing comes first
HEARTBEAT_SECONDS = 15.0  # of silence on a live feed: proxies hang up after 30 or 60
RETRY_MS = 1_000  # a subscriber that lost its feed waits so long before it comes back

BODY_SECONDS = 30.0  # for a body to arrive
SLOW_SECONDS = 1.0  # a body that takes longer, and hardly moves, is refused if room is short
SLOW_BYTES_PER_SECOND = 10_000  # this is what "hardly moves" means
KEEPALIVE_SECONDS = 30.0  # for a connection to begin a request and to finish its headers
SHUTDOWN_SECONDS = 1.0  # for answers under way; aiohttp waits it twice, docker stop gives 10 s
BACKLOG = 128  # connections that wait to be accepted; asyncio tries so many in a row
OPEN_FILES = 10_000  # a connection is an open file, and the usual limit is 1,024
COMPLAINT_SECONDS = 60.0  # between two lines of the log about the same trouble
LOG_QUEUE_BYTES = 4 * MIB  # of lines that wait to be written; what is beyond them is dropped
STOP_SECONDS = 9  # to stop in; what hangs then, hangs for good, and docker stop gives 10 s
LOG_SECONDS = 0.05  # for lines of the log to gather before they are written
LOG_FLUSH_SECONDS = 1.0  # at the end, for a log that nobody reads
# Garbage is looked for after so many new objects. Up to Python 3.12 the default is 700, and the
# events of one batch are more: p99 of single posts was 45 ms with it, and is 30 ms with this. The
# two others, for older objects, matter little here.
GC_THRESHOLD = (10_000, 20, 50)
# The writer waits so long for the event loop to yield. Python's default of 5 ms is longer than a
# commit. With 0.1 ms the two take turns so often that each of them costs more CPU.
GIL_SECONDS = 0.0003


# --- Validation ------------------------------------------------------------------------------
# From the bytes of a body to a batch that can be stored, or to the list of all that is wrong. Pure
# functions, no I/O.
#
# There is one judge: `checked_row` looks at the fields of an event, and the store's `encode` at
# what is inside of its payload. Good events pass once through both. When one of them refuses,
# `explain` asks the same judge again, field by field: so the two cannot disagree on which field is
# bad.
#
# What is stored is not the client's text but what Python understood of it, encoded anew. Parsers
# differ: SQLite reads duplicated keys and NUL characters in another way than Python does.

Loc = list[str | int]  # where an error is: ["body", "events", 3, "topic"]
ErrorEntry = dict[str, Any]  # one error of a 422, in pydantic's vocabulary, as FastAPI has it
# A plain tuple, and not one with names: making those would cost a tenth of publishing a batch.
Row = tuple[str, str, str, str, dict[str, Any]]  # topic, event_id, timestamp, source, payload
Encode = Callable[[Sequence[Row]], bytes]  # a store's; raises ValueError


class Refused(Exception):
    """A request that is answered with an error: the HTTP status, the detail, more headers."""

    def __init__(
        self, status: int, detail: str | list[ErrorEntry], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}


class Parsed(NamedTuple):
    """The events of a body, not yet validated."""

    events: list[Any]
    loc: Loc  # of the list of events; of the event itself where the body is one event
    is_list: bool

    def loc_of(self, index: int) -> Loc:
        """Where the event with this index is."""
        return [*self.loc, index] if self.is_list else self.loc


class Batch(NamedTuple):
    """The validated events of one request; all three in the same order."""

    text: bytes  # what the store's `encode` made of the rows
    topics: list[str]
    event_ids: list[str]


def refuse_constant(name: str) -> NoReturn:
    """The json module calls this for NaN, Infinity and -Infinity, which are not valid JSON."""
    raise ValueError("NaN and Infinity are not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
)
FIELDS = ("topic", "event_id", "timestamp", "source", "payload")
FIELDS_OF = itemgetter(*FIELDS)
TOPIC_OF = itemgetter(FIELDS.index("topic"))  # of a row
EVENT_ID_OF = itemgetter(FIELDS.index("event_id"))
# Control characters and line separators could forge a line of the log. Lone surrogates are half
# a character each, and cannot be written as UTF-8.
NAME_RULE = re.compile(f"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{{1,{MAX_NAME_CHARACTERS}}}")
SURROGATE = re.compile("[\ud800-\udfff]")
# datetime.fromisoformat alone also takes week dates, dates without a time, and a trailing NUL.
TIMESTAMP = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]"
    r"(?P<hour>[01][0-9]|2[0-3]):(?P<minute>[0-5][0-9])"
    r"(?::(?P<second>[0-5][0-9]|60)(?:[.,][0-9]{1,9})?)?"
    r"(?:[Zz]|(?P<sign>[+-])(?P<hours>[01][0-9]|2[0-3])(?::?(?P<minutes>[0-5][0-9]))?)?"
)
# What `checked_row` and `encode` raise: a field that is not there, an event that is no object, a
# name that is no string, a rule that is broken.
NOT_AN_EVENT = (KeyError, TypeError, AttributeError, ValueError)
# A good event. With one field taken from a bad event, it tells whether that field is to blame.
GOOD_EVENT = {
    "topic": "t",
    "event_id": "1",
    "timestamp": "2025-10-24T10:30:00Z",
    "source": "s",
    "payload": {},
}


def validate(body: bytes, encode: Encode) -> Batch:
    """The events of a body, ready for the store whose `encode` it is; raises Refused (422)."""
    parsed = parse(body)
    rows: list[Row] = []
    try:
        for event in parsed.events:
            rows.append(checked_row(event))
        text = encode(rows)
    except NOT_AN_EVENT:
        raise Refused(422, explain(parsed, rows, encode)) from None
    return Batch(text, list(map(TOPIC_OF, rows)), list(map(EVENT_ID_OF, rows)))


def parse(body: bytes) -> Parsed:
    """The events of a body: one event, an object with `events`, or an array; raises Refused."""
    if not body:
        raise Refused(422, [error_entry(["body"], "missing", "Field required")])
    if is_nested_deeper(body, MAX_NESTING):
        raise not_json("nested too deeply")
    try:
        document = DECODER.decode(body.decode())
    except UnicodeDecodeError as error:
        raise not_json(error.reason, error.start) from None
    except json.JSONDecodeError as error:
        raise not_json(error.msg, error.pos) from None
    except ValueError as error:  # NaN, or an integer of over 4300 digits: "why: what to do"
        raise not_json(str(error).partition(":")[0]) from None

    # With an event_id, it is an event that happens to have a field `events`.
    if type(document) is dict and "events" in document and "event_id" not in document:
        return parsed_list(document["events"], ["body", "events"])
    if type(document) is list:
        return parsed_list(document, ["body"])
    return Parsed([document], ["body"], is_list=False)


def parsed_list(events: Any, loc: Loc) -> Parsed:
    """The events of a list that has some; raises Refused."""
    if type(events) is not list:
        raise Refused(422, [error_entry(loc, "list_type", "Input should be a valid list")])
    if not events:
        why = "List should have at least 1 item after validation, not 0"
        ctx = {"field_type": "List", "min_length": 1, "actual_length": 0}
        raise Refused(422, [error_entry(loc, "too_short", why, ctx)])
    return Parsed(events, loc, is_list=True)


BRACKETS = bytes.maketrans(b"{}", b"[]")
NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))
MIDDLE = (ord("[") + ord("]")) // 2  # MIDDLE - "[" is 92 - 91 = 1; MIDDLE - "]" is 92 - 93 = -1


def is_nested_deeper(body: bytes, levels: int) -> bool:
    """Whether arrays and objects are nested deeper than that, and a parser's stack in danger.

    Python's parser calls itself at each level, and not every version of it stops in time. So the
    depth is counted before, without a stack: everything but the brackets outside of strings is
    cut away, and then each "[" counts 1 and each "]" counts -1.
    """
    if len(body) <= levels or body.count(b"[") + body.count(b"{") <= levels:
        return False  # almost every body
    # Without backslashes before quotes, each quote left begins or ends a string.
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Quotes are removed in pairs, so what is inside of a string stays inside.
    marks = body.translate(BRACKETS, NO_MARKS).replace(b'""', b"")
    brackets = b"".join(marks.split(b'"')[::2])  # every other piece is inside of a string
    steps = map(MIDDLE.__sub__, brackets)
    return max(itertools.accumulate(steps), default=0) > levels


def checked_row(event: Any) -> Row:
    """Checks an event, and returns it as it will be stored; raises one of NOT_AN_EVENT.

    Only `encode` looks inside of the payload.
    """
    topic, event_id, timestamp, source, payload = FIELDS_OF(event)
    topic = topic.strip()
    event_id = event_id.strip()
    source = source.strip()
    is_name = NAME_RULE.fullmatch
    if not (is_name(topic) and is_name(event_id) and is_name(source)):
        raise ValueError
    if type(payload) is not dict:
        raise TypeError
    check_timestamp(timestamp)
    return topic, event_id, timestamp, source, payload


def check_timestamp(text: str) -> None:
    """Raises ValueError, which says why, if it is not a date and time as TIMESTAMP has it."""
    match = TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError("expected YYYY-MM-DDTHH:MM:SS[.fraction][Z or +HH:MM]")
    try:
        day = date.fromisoformat(match["date"])
    except ValueError:
        raise ValueError("there is no such day") from None
    if match["second"] == "60" and not is_leap_minute(day, match):
        raise ValueError("a second of 60 is only in 23:59:60 UTC at the end of a month")


def is_leap_minute(day: date, match: re.Match[str]) -> bool:
    """Whether a leap second can follow this minute: RFC 3339, section 5.7."""
    moment = datetime(day.year, day.month, day.day, int(match["hour"]), int(match["minute"]))
    offset = timedelta(hours=int(match["hours"] or 0), minutes=int(match["minutes"] or 0))
    try:
        utc = moment + offset if match["sign"] == "-" else moment - offset
        following = utc + timedelta(minutes=1)
    except OverflowError:  # in the years 1 and 9999
        return False
    return (following.day, following.hour, following.minute) == (1, 0, 0)


def explain(parsed: Parsed, rows: list[Row], encode: Encode) -> list[ErrorEntry]:
    """All that is wrong with the events, in their order, at most MAX_ERRORS.

    `rows` were made before `checked_row` refused an event. If all of them can be encoded, then the
    first error is in that event. If not, or if no event was refused, it can be in any.
    """
    is_first_known = len(rows) < len(parsed.events) and can_encode(rows, encode)
    errors: list[ErrorEntry] = []
    for index in range(len(rows) if is_first_known else 0, len(parsed.events)):
        errors += event_errors(parsed.events[index], parsed.loc_of(index), encode)
        if len(errors) >= MAX_ERRORS:
            break
    return errors[:MAX_ERRORS]


def can_encode(rows: list[Row], encode: Encode) -> bool:
    """Whether nothing is wrong inside of the payloads."""
    try:
        encode(rows)
    except ValueError:
        return False
    return True


def is_good(event: Any, encode: Encode) -> bool:
    """Whether an event passes both `checked_row` and `encode`."""
    try:
        encode([checked_row(event)])
    except NOT_AN_EVENT:
        return False
    return True


def event_errors(event: Any, loc: Loc, encode: Encode) -> Iterator[ErrorEntry]:
    """All that is wrong with one event, its fields in order."""
    if type(event) is not dict:
        why = "Input should be a valid dictionary or object to extract fields from"
        yield error_entry(loc, "model_attributes_type", why)
    elif not is_good(event, encode):
        for name in FIELDS:
            if name not in event:
                yield error_entry([*loc, name], "missing", "Field required")
            elif not is_good(GOOD_EVENT | {name: event[name]}, encode):
                yield field_error(name, event[name], [*loc, name])


def field_error(name: str, value: Any, loc: Loc) -> ErrorEntry:
    """What is wrong with a field, as the judge has refused it."""
    if name == "payload":
        return payload_error(value, loc)
    if name == "timestamp":
        return timestamp_error(value, loc)
    if type(value) is not str:
        return error_entry(loc, "string_type", "Input should be a valid string")
    if not value:
        why = "String should have at least 1 character"
        return error_entry(loc, "string_too_short", why, {"min_length": 1})
    text = value.strip()
    if not text:
        why = "Value error, Field cannot be empty or whitespace only"
        return error_entry(loc, "value_error", why)
    if len(text) > MAX_NAME_CHARACTERS:
        why = f"String should have at most {MAX_NAME_CHARACTERS} characters"
        return error_entry(loc, "string_too_long", why, {"max_length": MAX_NAME_CHARACTERS})
    if SURROGATE.search(text):
        return not_unicode(loc)
    why = "Value error, Field cannot contain control characters or line separators"
    return error_entry(loc, "value_error", why)


def timestamp_error(value: Any, loc: Loc) -> ErrorEntry:
    """What is wrong with a timestamp."""
    if type(value) is not str:
        return error_entry(loc, "datetime_type", "Input should be a valid datetime")
    try:
        check_timestamp(value)
    except ValueError as why:
        return error_entry(loc, "datetime_parsing", f"Input should be a valid datetime, {why}")
    raise AssertionError("a timestamp that is good was asked about")


def payload_error(value: Any, loc: Loc) -> ErrorEntry:
    """What is wrong with a payload."""
    if type(value) is not dict:
        return error_entry(loc, "dict_type", "Input should be a valid dictionary")
    if SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        return not_unicode(loc)
    # All that is left is a number such as 1e400, which Python reads as infinity.
    return error_entry(loc, "finite_number", "Input should be a finite number")


def not_unicode(loc: Loc) -> ErrorEntry:
    """The error of a text with a lone surrogate in it."""
    why = "Input should be a valid string, unable to parse raw data as a unicode string"
    return error_entry(loc, "string_unicode", why)


def not_json(why: str, position: int | None = None) -> Refused:
    """The answer to a body that is no JSON, with the position where that is known.

    The position counts characters, or bytes where the body is not even text.
    """
    loc: Loc = ["body"] if position is None else ["body", position]
    return Refused(422, [error_entry(loc, "json_invalid", "JSON decode error", {"error": why})])


def error_entry(loc: Loc, kind: str, message: str, ctx: dict[str, Any] | None = None) -> ErrorEntry:
    """One error of a 422."""
    error: ErrorEntry = {"type": kind, "loc": loc, "msg": message}
    if ctx is not None:
        error["ctx"] = ctx
    return error


# --- Store -----------------------------------------------------------------------------------
# The database, behind a door: nobody else knows SQL, or how a row is stored. It knows nothing of
# HTTP and of asyncio; its methods block, and the sections below decide which thread
# calls what. A second store, on PostgreSQL, is behind the same door in postgres.py.

JSON = "application/json"  # events with commas between them
LINES = "application/x-ndjson"  # an event a line
FEED = "text/event-stream"  # an event a message, with its sequence number for an id


class Outcome(NamedTuple):
    """What became of a group."""

    is_new: bytearray  # for each event, in order: 1 if it was new, 0 if it was a duplicate
    seconds: float  # that the commit took, with its share of a checkpoint


@dataclass(frozen=True, slots=True)
class Page:
    """Some events, in the order of their sequence numbers."""

    count: int
    last_seq: int  # of the last event; where there is none, the `after` that was asked for
    text: bytes  # the events in the form that was asked for: JSON, LINES or FEED


class TopicCounts(NamedTuple):
    """The counters of a topic."""

    topic: str
    received: int  # acknowledged events, duplicates included
    unique: int  # stored events
    duplicates: int  # dropped ones


class Totals(NamedTuple):
    """The same for all topics together."""

    received: int
    unique: int
    duplicates: int


class Size(NamedTuple):
    """What the database takes, and how its log fares."""

    database_bytes: int  # with the log
    log_bytes: int
    failed_checkpoints: int  # since the start


class StoreError(Exception):
    """Why a store cannot be opened: one line that says what to do."""


class Unavailable(Exception):
    """The database cannot do it now. The message is a reason that may be told to anybody."""


class Unstorable(Exception):
    """The database refuses what is in a group. The message may be told to anybody."""


class Store(Protocol):
    """What others know of a store. Each group of methods has a thread; the threads are parallel."""

    location: str  # for the first lines of the log, without secrets

    def encode(self, rows: Sequence[Row]) -> bytes:
        """The rows as `commit` wants them, in a Batch; on the event loop. Raises ValueError."""

    # --- in the writer's thread ---

    def commit(self, batches: Sequence[Batch]) -> Outcome:
        """Stores a group in one transaction; when this returns, it is on disk.

        An empty group is a probe: it fails if a group would fail. Raises Unstorable; then nothing
        is stored. Or Unavailable; then nothing is stored, or in rare cases all of it, but that
        cannot be relied on. To send the same again is right in both cases.
        """

    # --- in the reader's thread; each raises Unavailable ---

    def last_seq(self) -> int:
        """The highest sequence number, 0 where there is no event."""

    def page(
        self, form: str, topic: str | None, after: int, upto: int, limit: int, most_bytes: int
    ) -> Page:
        """The next events with after < seq <= upto, of one topic or (None) of all.

        It ends with the event that fills `limit`, PAGE_EVENTS or `most_bytes`.
        """

    def position(self, topic: str | None, tail: int) -> int:
        """The position just before the newest `tail` events; `last_seq` where there are none."""

    def find(self, topic: str, event_id: str) -> int | None:
        """The sequence number of the event with this identity."""

    def topics(self, after: str, limit: int) -> list[TopicCounts]:
        """The next topics by name, in the order of their code points."""

    def totals(self) -> Totals:
        """The counters of all topics together; at the same cost however many there are."""

    def size(self) -> Size:
        """What the database takes."""

    # --- in the watcher's thread ---

    def changed(self) -> Collection[str] | None:
        """Waits, a second or so, for commits of other processes; returns the topics with news.

        None: any topic may have some. Raises Unavailable.
        """

    # --- in any thread ---

    def wake(self) -> None:
        """Lets `changed` return soon; at the stop."""

    def close(self) -> None:
        """Closes the database, when no other method is running any more."""


# A group goes into SQLite with one statement, as one JSON text. Python's sqlite3 gives up the
# global interpreter lock at each step of a statement, and has to get it back from an event loop
# that hardly ever waits. `executemany` took 1 ms a row beside a busy loop, one statement takes 13
# microseconds a row. (This is the convoy effect.) For the same reason each query returns one row.

APPLICATION_ID = 0x45764167  # "EvAg": the mark of our files
SCHEMA_VERSION = 2
VERSION_1 = (0, 1)  # its application_id, which it did not set, and its user_version
SCHEMA = f"""
    BEGIN IMMEDIATE;
    -- The counters change with the events, in the same transaction: so they always add up. The
    -- row with the empty name, which no topic can have, counts all topics together.
    CREATE TABLE IF NOT EXISTS topics (
        id         INTEGER PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        received   INTEGER NOT NULL,           -- acknowledged events, duplicates included
        duplicates INTEGER NOT NULL DEFAULT 0  -- those that were dropped
    );
    -- Rows are only ever added. With the number of the topic in place of its name, the unique
    -- index is a fifth smaller; the size of that index is what makes random ids expensive.
    CREATE TABLE IF NOT EXISTS events (
        seq       INTEGER PRIMARY KEY,  -- the order of the commits: gaps are allowed
        topic_id  INTEGER NOT NULL REFERENCES topics (id),
        event_id  TEXT NOT NULL,
        timestamp TEXT NOT NULL,
        source    TEXT NOT NULL,
        payload   TEXT NOT NULL,        -- JSON
        UNIQUE (topic_id, event_id)
    );
    -- Each of its entries ends with the seq, so it leads from an event to the next of its topic.
    CREATE INDEX IF NOT EXISTS events_of_topic ON events (topic_id);
    INSERT INTO topics (id, name, received, duplicates)  -- version 1 had no such row
    SELECT 0, '', ifnull(sum(received), 0), ifnull(sum(duplicates), 0) FROM topics WHERE true
    ON CONFLICT (id) DO NOTHING;
    -- For trying whether commits work again.
    CREATE TABLE IF NOT EXISTS probe (padding BLOB);
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {SCHEMA_VERSION};
    COMMIT;
"""
# The marks by which one of our files differs from another program's.
FILE_MARKS = """
    SELECT (SELECT application_id FROM pragma_application_id),
           (SELECT user_version FROM pragma_user_version),
           (SELECT count(*) FROM sqlite_schema),
           (SELECT group_concat(name) FROM pragma_table_info('topics')),
           (SELECT group_concat(name) FROM pragma_table_info('events'))
"""
OUR_COLUMNS = ("id,name,received,duplicates", "seq,topic_id,event_id,timestamp,source,payload")
# For each connection.
PRAGMAS = f"""
    PRAGMA synchronous = FULL;     -- COMMIT waits until the log is on the disk
    PRAGMA fullfsync = ON;         -- macOS: on the disk, and not only in its cache
    PRAGMA temp_store = MEMORY;    -- for copies of pages, by which half a statement is undone
    PRAGMA cache_size = -16384;    -- KiB: the busy part of the index
    PRAGMA wal_autocheckpoint = 0; -- checkpoints have a thread of their own, below
    PRAGMA journal_size_limit = {LOG_PAGES * 4096};  -- a log that starts anew is cut to it
"""
# One INSERT into a view of the writer's own is one transaction: what its trigger does is done
# whole or not at all. The write lock is taken first, so `first` stays true whatever other processes
# do to the file. (Where it says WHERE true, SQLite's grammar needs it before ON CONFLICT.)
GROUP_TRIGGER = """
    CREATE TEMP TABLE outcome (first INTEGER, positions TEXT);
    INSERT INTO outcome DEFAULT VALUES;
    CREATE TEMP VIEW arrivals AS SELECT NULL AS rows, NULL AS topics;
    CREATE TEMP TRIGGER commit_group INSTEAD OF INSERT ON arrivals BEGIN
        -- 1. Count: each event is a duplicate until it is stored. NEW.topics has the number of
        -- events of each topic, and of all together under the empty name.
        INSERT INTO topics (name, received, duplicates)
        SELECT key, value, value FROM json_each(NEW.topics) WHERE true
        ON CONFLICT (name) DO UPDATE SET received = received + excluded.received,
                                         duplicates = duplicates + excluded.duplicates;
        -- 2. Store: event number n of the group gets the seq first + n.
        UPDATE outcome SET first = 1 + (SELECT ifnull(max(seq), 0) FROM events);
        INSERT INTO events (seq, topic_id, event_id, timestamp, source, payload)
        SELECT first + key, (SELECT id FROM topics WHERE name = value ->> 0),
               value ->> 1, value ->> 2, value ->> 3, value -> 4
        FROM outcome, json_each(NEW.rows) WHERE true
        -- With no target named, a clash of seq would pass for a duplicate, and lose an event.
        ON CONFLICT (topic_id, event_id) DO NOTHING;
        -- 3. What has a seq from `first` on is new: it was no duplicate. (The + keeps SQLite from
        -- using the topic's index, which it would walk along from end to end.)
        UPDATE topics SET duplicates = duplicates - stored
        FROM (SELECT topic_id, count(*) AS stored FROM events
              WHERE seq >= (SELECT first FROM outcome) GROUP BY +topic_id)
        WHERE id = topic_id;
        UPDATE topics SET duplicates = duplicates -
            (SELECT count(*) FROM events WHERE seq >= (SELECT first FROM outcome))
        WHERE id = 0;
        UPDATE outcome SET positions =
            (SELECT json_group_array(seq - first) FROM events WHERE seq >= first);
    END;
"""
COMMIT_GROUP = "INSERT INTO arrivals VALUES (CAST(? AS TEXT), ?)"  # bytes, to text, in SQLite
GROUP_OUTCOME = "SELECT first, positions FROM outcome"
PROBE = "INSERT INTO probe VALUES (zeroblob(?))"
CLEAR_PROBE = "DELETE FROM probe"
CHECKPOINT = "PRAGMA wal_checkpoint(PASSIVE)"  # moves what it can without holding anybody up
LAST_SEQ = "SELECT ifnull(max(seq), 0) FROM events"
TOTALS = "SELECT received, received - duplicates, duplicates FROM topics WHERE id = 0"
TOPICS = """
    SELECT json_group_array(json_array(name, received, received - duplicates, duplicates))
    FROM (SELECT * FROM topics WHERE name > :after ORDER BY name LIMIT :limit)
"""
FIND = """
    SELECT max(seq) FROM events
    WHERE topic_id = (SELECT id FROM topics WHERE name = :topic) AND event_id = :event_id
"""
TAIL = "SELECT min(seq) - 1 FROM (SELECT seq FROM events ORDER BY seq DESC LIMIT :tail)"
TAIL_OF_TOPIC = """
    SELECT min(seq) - 1 FROM (
        SELECT seq FROM events WHERE topic_id = (SELECT id FROM topics WHERE name = :topic)
        ORDER BY seq DESC LIMIT :tail
    )
"""
# An event as JSON. Its payload is JSON already: to have SQLite read it again would cost time.
EVENT = """
    '{"topic":' || json_quote((SELECT name FROM topics WHERE id = topic_id))
    || ',"event_id":' || json_quote(event_id) || ',"timestamp":' || json_quote(timestamp)
    || ',"source":' || json_quote(source) || ',"payload":' || payload || '}'
"""
# A page goes from event to event until it is full, so that it holds many small events or few large
# ones. A mere LIMIT could hold 500 events of 4 MB.
PAGE = """
    WITH RECURSIVE page (number, seq, bytes_before, item) AS (
        SELECT 0, :after, 0, NULL
        UNION ALL
        SELECT number + 1, events.seq, bytes_before + ifnull(length(CAST(item AS BLOB)), 0), {item}
        FROM page JOIN events ON events.seq = ({next})
        WHERE number < :limit AND events.seq <= :upto
          AND bytes_before + ifnull(length(CAST(item AS BLOB)), 0) < :most_bytes
    )
    SELECT max(number), max(seq), CAST(group_concat(item, '{separator}') AS BLOB) FROM page
"""
NEXT = "SELECT min(seq) FROM events WHERE seq > page.seq"
NEXT_OF_TOPIC = """
    SELECT min(seq) FROM events
    WHERE topic_id = (SELECT id FROM topics WHERE name = :topic) AND seq > page.seq
"""
ITEM = {  # an event in each of the forms
    JSON: EVENT,
    LINES: f"{EVENT} || char(10)",
    FEED: f"'id: ' || events.seq || char(10) || 'data: ' || {EVENT} || char(10, 10)",
}
SEPARATOR = {JSON: ",", LINES: "", FEED: ""}
PAGES = {  # by form, and whether it is of one topic
    (form, is_of_topic): PAGE.format(
        item=ITEM[form],
        separator=SEPARATOR[form],
        next=NEXT_OF_TOPIC if is_of_topic else NEXT,
    )
    for form in (JSON, LINES, FEED)
    for is_of_topic in (False, True)
}
FILES = {"": "database", "-wal": "write-ahead log", "-shm": "index of the log"}  # by their endings
PRIMARY_CODE = 0xFF  # the part of an SQLite error code without its details
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
# Programs that split a text into lines may split it at these characters too, and JSON allows them
# inside of strings. Their escapes mean the same.
LINE_BREAKS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class SqliteStore:
    """The SQLite file: a Store."""

    def __init__(self, path: str) -> None:
        """Opens the file, or makes it; raises StoreError."""
        self.location = os.path.realpath(path)
        self._wal_path = self.location + "-wal"
        self._connections: list[sqlite3.Connection] = []
        self._probe_bytes = PROBE_BYTES  # more than the largest group that has failed
        # Two threads change the next three, the writer's and the watcher's. The worst that a race
        # between them can do is to wake the live feeds for nothing.
        self._gone = ""  # why the file is not ours any more: then nothing is stored until a restart
        self._known_seq = 0  # the highest seq that this process knows of
        self._others_stored = False  # another process has, since `changed` last looked
        self._closing = threading.Event()
        try:
            check_sqlite_version()
            check_path(path)
            make_folder(os.path.dirname(self.location))
            check_owner(self.location)
            self._open()
        except (OSError, RuntimeError, ValueError, sqlite3.Error, StoreError, Unavailable) as why:
            self._close_connections()
            raise StoreError(f"cannot use the database {path}: {reason_of(why)}") from why

    def _open(self) -> None:
        """Opens the connections, makes the tables, and starts the checkpoints."""
        self._writer = self._connect()
        self._make_tables()
        self._writer.executescript(GROUP_TRIGGER)
        self._file_ids = {ending: file_id(self.location + ending) for ending in FILES}
        self._reader = self._connect()
        self._reader.execute("PRAGMA query_only = ON")
        self._watcher = self._connect()
        self._watcher.execute("PRAGMA query_only = ON")
        (self._known_seq,) = self._watcher.execute(LAST_SEQ).fetchone()
        self._checkpoints = Checkpoints(self._connect(), self.location, self._wal_path)
        for connection in self._connections:
            connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")

    def _make_tables(self) -> None:
        """Makes the tables where they are missing; waits for others who are at it just now."""
        deadline = time.monotonic() + OPEN_SECONDS
        while True:
            try:
                (mode,) = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()
                if mode != "wal":
                    raise StoreError("a write-ahead log cannot be kept there; use a local disk")
                self._writer.executescript(SCHEMA)  # always: it proves that the file can be written
                return
            except sqlite3.OperationalError as why:
                if why.sqlite_errorcode & PRIMARY_CODE not in BUSY or time.monotonic() > deadline:
                    raise
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                time.sleep(0.02)

    def _connect(self) -> sqlite3.Connection:
        """A connection in autocommit mode. Any thread may use it, but one at a time."""
        connection = sqlite3.connect(
            self.location, timeout=OPEN_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connections.append(connection)
        connection.executescript(PRAGMAS)
        return connection

    @staticmethod
    def encode(rows: Sequence[Row]) -> bytes:
        """The rows as a JSON array without its brackets; raises ValueError."""
        text = ENCODER.encode(rows)[1:-1]
        if not text.isascii():
            for character, escape in LINE_BREAKS.items():
                text = text.replace(character, escape)
        return text.encode()

    def commit(self, batches: Sequence[Batch]) -> Outcome:
        """Stores a group in one transaction, and lets the checkpoints do their part around it."""
        started = time.perf_counter()
        topics = list(itertools.chain.from_iterable(batch.topics for batch in batches))
        texts = [batch.text for batch in batches]
        is_new = bytearray(len(topics))
        if self._gone:
            raise Unavailable(self._gone)
        self._checkpoints.take_last_step(self._writer)
        try:
            if topics:
                rows = b"[%b]" % b",".join(texts)
                counts = Counter(topics)
                counts[""] = len(topics)
                self._writer.execute(COMMIT_GROUP, [rows, json.dumps(counts)])
                first, positions = self._writer.execute(GROUP_OUTCOME).fetchone()
                for position in json.loads(positions):
                    is_new[position] = 1
                self._update_known_seq(first, is_new)
            else:
                self._writer.execute(PROBE, [self._probe_bytes])
                self._writer.execute(CLEAR_PROBE)
        except sqlite3.Error as why:
            self._probe_bytes = max(self._probe_bytes, PROBE_BYTES + sum(map(len, texts)))
            raise store_error(why) from why
        self._probe_bytes = PROBE_BYTES
        self._check_not_replaced()  # only now: what went into a file that is gone is not stored
        self._checkpoints.begin_if_due()
        return Outcome(is_new, time.perf_counter() - started)

    def _update_known_seq(self, first: int, is_new: bytearray) -> None:
        """Remembers where the events end, and whether others have stored some in between."""
        if first > self._known_seq + 1:
            self._others_stored = True
        self._known_seq = first + is_new.rfind(1)  # rfind: the last new one, -1 if there is none

    def _check_not_replaced(self) -> None:
        """Raises Unavailable if the database or what belongs to it is not at its place any more."""
        for ending, known in self._file_ids.items():
            if not self._gone and file_id(self.location + ending) != known:
                what = FILES[ending]
                self._gone = f"the {what} was removed, moved or replaced; start the service again"
        if self._gone:
            raise Unavailable(self._gone)

    def last_seq(self) -> int:
        """The highest sequence number."""
        return int(self._read(LAST_SEQ)[0])

    def page(
        self, form: str, topic: str | None, after: int, upto: int, limit: int, most_bytes: int
    ) -> Page:
        """The next events, in one of the forms."""
        count, last_seq, text = self._read(
            PAGES[form, topic is not None],
            topic=topic,
            after=after,
            upto=upto,
            limit=min(limit, PAGE_EVENTS),
            most_bytes=most_bytes,
        )
        return Page(count, last_seq, text or b"")

    def position(self, topic: str | None, tail: int) -> int:
        """The sequence number after which the newest `tail` events are."""
        query = TAIL if topic is None else TAIL_OF_TOPIC
        (position,) = self._read(query, topic=topic, tail=tail)
        return self.last_seq() if position is None else int(position)

    def find(self, topic: str, event_id: str) -> int | None:
        """The sequence number of the event with this identity."""
        (seq,) = self._read(FIND, topic=topic, event_id=event_id)
        return None if seq is None else int(seq)

    def topics(self, after: str, limit: int) -> list[TopicCounts]:
        """The next topics by name."""
        (found,) = self._read(TOPICS, after=after, limit=limit)
        return [TopicCounts(*counts) for counts in json.loads(found)]

    def totals(self) -> Totals:
        """The counters of all topics together."""
        return Totals(*self._read(TOTALS))

    def size(self) -> Size:
        """What the file and its log take."""
        log_bytes = size_of(self._wal_path)
        database_bytes = size_of(self.location) + log_bytes
        return Size(database_bytes, log_bytes, self._checkpoints.failed)

    def _read(self, query: str, **values: Any) -> Any:
        """The only row of a query, by the reader's connection."""
        try:
            return self._reader.execute(query, values).fetchone()
        except sqlite3.Error as why:
            raise Unavailable(str(why)) from why

    def changed(self) -> Collection[str] | None:
        """Looks once a second whether another process has stored events."""
        self._closing.wait(WATCH_SECONDS)
        self._check_not_replaced()
        try:
            (last_seq,) = self._watcher.execute(LAST_SEQ).fetchone()
        except sqlite3.Error as why:
            raise Unavailable(str(why)) from why
        if last_seq <= self._known_seq and not self._others_stored:
            return ()
        self._others_stored = False
        self._known_seq = max(self._known_seq, last_seq)
        return None

    def wake(self) -> None:
        """Lets `changed` return."""
        self._closing.set()

    def close(self) -> None:
        """Closes the file; the last connection to go moves the log into it and removes the log."""
        self._checkpoints.end()
        self._close_connections()
        self._checkpoints.close()

    def _close_connections(self) -> None:
        """Closes what was opened, the writer last."""
        for connection in reversed(self._connections):
            connection.close()


# Where things are in a write-ahead log: https://www.sqlite.org/fileformat2.html, section 4.1.
WAL_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
SALT_BYTES = 8
SALT_IN_WAL_HEADER = 16
SALT_IN_FRAME = 8


class Progress(NamedTuple):
    """How far the checkpoint of a log is."""

    moved_pages: int
    left_pages: int


class Checkpoints:
    """Moves the log into the database while the writer goes on, in a thread of its own.

    SQLite would do it in the commit that happens to pass a mark, and everybody would wait for 0.1
    to 0.2 s. Here a connection of its own moves pages into the database file, and has them written
    to the disk, while the writer goes on. The writer moves the rest between two commits: only when
    everything is moved and on the disk does the log start anew from its beginning.

    Nothing here can lose an event. If a checkpoint fails, or another program's open transaction
    holds it up, then the log grows, and that is all.
    """

    def __init__(self, connection: sqlite3.Connection, path: str, wal_path: str) -> None:
        self.failed = 0
        self._connection = connection
        self._database = io.FileIO(path, "r+")  # Windows flushes only what can be written
        self._wal = io.FileIO(wal_path)
        self._write_part = part_writer()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        self._frame_bytes = FRAME_HEADER_BYTES + page_bytes
        self._salt = b""  # of the log as it is now: each time that it starts anew, it changes
        self._due_pages = CHECKPOINT_PAGES  # the length at which the next one is due
        self._is_due = threading.Event()
        self._is_last_step = False  # it is the writer's turn to move the rest
        self._is_closing = False
        self._is_failing = False
        self._is_warned = False
        self._thread = threading.Thread(target=self._keep_moving, name="checkpoints", daemon=True)
        self._thread.start()

    def begin_if_due(self) -> None:
        """Wakes the thread if the log is long; by the writer, after each commit.

        The file does not get shorter when the log starts anew: it is overwritten. So its size says
        nothing. But the header of the log has a salt, a new one each time, and each frame (a page
        with its header) has a copy. Two short reads show whether the frame at the mark belongs to
        the log as it is now.
        """
        if self._is_due.is_set() or self._is_last_step:
            return
        self._wal.seek(SALT_IN_WAL_HEADER)
        salt = self._wal.read(SALT_BYTES)
        if salt != self._salt:
            self._salt = salt
            self._due_pages = CHECKPOINT_PAGES
        frame = WAL_HEADER_BYTES + (self._due_pages - 1) * self._frame_bytes
        self._wal.seek(frame + SALT_IN_FRAME)
        if self._wal.read(SALT_BYTES) == salt:
            self._is_due.set()

    def take_last_step(self, writer: sqlite3.Connection) -> None:
        """Moves the rest, if it is the writer's turn; by the writer, between two commits."""
        if self._is_last_step:
            self._is_last_step = False
            progress = self._move(writer)
            is_synced = progress is not None and progress.left_pages == 0  # SQLite has done that
            if is_synced and self._is_failing:
                self._is_failing = False
                log.warning("Checkpoints work again")

    def _keep_moving(self) -> None:
        """Runs in the thread: waits until a checkpoint is due, and makes it."""
        while True:
            self._is_due.wait()
            if self._is_closing:
                return
            try:
                self._is_last_step = self._move_most()
            except Exception as why:  # noqa: BLE001 - whatever it is, the thread goes on
                self._fail(type(why).__name__, why)
            self._is_due.clear()
            if self._is_closing:  # `end` may have set the event just before it was cleared
                return

    def _move_most(self) -> bool:
        """Moves pages and syncs them, round after round; returns whether that worked."""
        moved_pages = 0
        for _ in range(CHECKPOINT_ROUNDS):
            progress = self._move(self._connection)
            if progress is None or not self._sync(progress.moved_pages - moved_pages):
                return False
            moved_pages = progress.moved_pages
        return True

    def _move(self, connection: sqlite3.Connection) -> Progress | None:
        """Moves what nobody needs in the log any more, and returns how far it came.

        None if it failed, or if another process is doing it. It sets the next mark, so that a
        checkpoint that is held up is not tried at each commit.
        """
        try:
            is_busy, pages, moved = connection.execute(CHECKPOINT).fetchone()
        except sqlite3.Error as why:
            self._fail(str(why))
            return None
        if is_busy:  # another process is at it
            self._due_pages += CHECKPOINT_RETRY_PAGES
            return None
        self._due_pages = max(CHECKPOINT_PAGES, pages + CHECKPOINT_RETRY_PAGES)
        self._warn(pages)
        return Progress(moved, pages - moved)

    def _sync(self, pages: int) -> bool:
        """Has so many moved pages written to the disk; returns whether that worked.

        SQLite does this only when everything is moved: in the last step, where the writer, and
        everybody with it, would wait for all of them.
        """
        try:
            self._write_in_parts(pages)
            os.fsync(self._database.fileno())
        except OSError as why:
            self._fail(str(why.strerror))
            return False
        return True

    def _write_in_parts(self, pages: int) -> None:
        """Has the moved pages written in parts, with pauses, where the system can do that.

        Commits need the disk, too. A part of the file has some SYNC_PAGES moved pages in it. After
        each, the disk is left to the writer for half as long as the part took. PostgreSQL spreads
        its checkpoints, too. Whether it worked need not be asked: SQLite's own sync will tell.
        """
        if self._write_part is None or pages <= SYNC_PAGES:
            return
        database = self._database.fileno()
        size = os.fstat(database).st_size
        part = math.ceil(size * SYNC_PAGES / pages)
        for start in range(0, size, part):
            if self._is_closing:
                return
            started = time.perf_counter()
            self._write_part(database, start, part, WRITE_AND_WAIT)
            time.sleep((time.perf_counter() - started) / 2)

    def _fail(self, reason: str, error: Exception | None = None) -> None:
        """Counts a checkpoint that failed, and says it once.

        `error` is one that nobody expected, for its traceback.
        """
        if self._is_closing:
            return
        self._due_pages += CHECKPOINT_RETRY_PAGES
        if not self._is_failing:
            line = f"Checkpoints fail, so the write-ahead log grows: {reason}"
            log.error("%s", line, exc_info=error)
        self._is_failing = True
        self.failed += 1  # last: whoever sees it finds the line in the log

    def _warn(self, pages: int) -> None:
        """Says once that the log has become very long."""
        is_long = pages * self._frame_bytes > WARN_WAL_BYTES
        if is_long and not self._is_warned:
            size = pages * self._frame_bytes / 1e9
            why = "another program's open transaction may hold it"
            log.warning("The write-ahead log has grown to %.1f GB: %s", size, why)
        self._is_warned = is_long

    def end(self) -> None:
        """Ends the thread, also in the middle of a checkpoint."""
        self._is_closing = True
        self._is_due.set()
        self._connection.interrupt()
        self._thread.join()
        self._wal.close()  # the last connection removes it, and on Windows no open file can be

    def close(self) -> None:
        """Closes the database file, when all connections are closed.

        A POSIX system gives up all locks of a process on a file when the process closes any
        descriptor of it: https://www.sqlite.org/howtocorrupt.html, section 2.2.
        """
        self._database.close()


WRITE_AND_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER


def part_writer() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range, which writes a part of a file to the disk; None on other systems.

    It takes a descriptor, the start, the number of bytes, and flags. It returns 0, or -1.
    https://man7.org/linux/man-pages/man2/sync_file_range.2.html
    """
    try:
        import ctypes

        write_part = ctypes.CDLL(None).sync_file_range
    except (ImportError, AttributeError, OSError, TypeError):
        return None
    write_part.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return write_part


def check_sqlite_version() -> None:
    """Raises StoreError if SQLite lacks what the statements need."""
    if sqlite3.sqlite_version_info < (3, 38):
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is older than 3.38; use a newer Python")


def check_path(path: str) -> None:
    """Raises StoreError if no database file can be there."""
    if path == ":memory:":
        raise StoreError("it would be in memory only; name a file")
    if os.path.isdir(path):
        raise StoreError("it is a folder; name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise StoreError("it is not a regular file; name another file")


def reason_of(why: Exception) -> str:
    """Why a database cannot be opened, and what to do."""
    if isinstance(why, OSError):
        return f"{why.strerror}; name a file in a folder where this user may write"
    code = getattr(why, "sqlite_errorcode", 0) & PRIMARY_CODE
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR):
        return f"{why}; check its folder, and that this user may write to both"
    if code == sqlite3.SQLITE_NOTADB:
        return f"{why}; name another file"
    return str(why)


def make_folder(path: str) -> None:
    """Makes a folder and those above it, and sees to it that a power cut does not undo it."""
    parent = os.path.dirname(path)
    if os.path.isdir(path) or parent == path:  # the root of a drive that is not there
        return
    make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_owner(path: str) -> None:
    """Raises StoreError if the file is there and belongs to another program.

    It only reads, so a file that is not ours stays as it is.
    """
    if size_of(path) == 0:
        return
    try:
        application, version, tables, *columns = read_marks(path, "mode=ro")
    except sqlite3.OperationalError as why:
        # A crash left a journal, which must not be rolled back before we know whose file it is.
        if why.sqlite_errorcode & PRIMARY_CODE != sqlite3.SQLITE_READONLY:
            raise
        application, version, tables, *columns = read_marks(path, "mode=ro&immutable=1")
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise StoreError("a newer version of this service made it; use that version")
    is_new = (application, version, tables) == (0, 0, 0)
    is_ours = application == APPLICATION_ID or (application, version) == VERSION_1
    if not is_new and not (is_ours and tuple(columns) == OUR_COLUMNS):
        raise StoreError("it belongs to another program; name another file")


def read_marks(path: str, options: str) -> tuple[Any, ...]:
    """The FILE_MARKS of a file that is there; raises sqlite3.Error."""
    address = f"{Path(path).as_uri()}?{options}"
    connection = sqlite3.connect(address, uri=True, timeout=OPEN_SECONDS)
    with contextlib.closing(connection):
        marks: tuple[Any, ...] = connection.execute(FILE_MARKS).fetchone()
        return marks


def file_id(path: str) -> tuple[int, int] | None:
    """The device and the inode of a file; None if there is no file."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as why:
        raise Unavailable(f"the database cannot be looked at: {why.strerror}") from why
    return status.st_dev, status.st_ino


def size_of(path: str) -> int:
    """The size of a file in bytes, 0 if there is none."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def store_error(why: sqlite3.Error) -> Unavailable | Unstorable:
    """What a failed commit means. SQLite's messages name no paths, so clients may see them."""
    is_too_big = getattr(why, "sqlite_errorcode", 0) == sqlite3.SQLITE_TOOBIG
    if is_too_big or str(why) == "malformed JSON":
        return Unstorable(str(why))
    return Unavailable(str(why))


def open_store(db: str) -> Store:
    """The store that the setting names; raises StoreError."""
    if not db.startswith(("postgresql://", "postgres://")):
        return SqliteStore(db)
    # Run as a program, this module is called __main__. postgres.py has to find the same module
    # under its own name, and not a second copy with other classes.
    sys.modules.setdefault("aggregator", sys.modules[__name__])
    try:
        import postgres
    except ModuleNotFoundError as why:
        raise StoreError(f"PostgreSQL needs the module {why.name}") from why

    store: Store = postgres.PostgresStore(db)
    return store


# --- Group commit ----------------------------------------------------------------------------
# Queue, consumer, writer, futures. An fsync takes 0.3 to 10 ms. One for each request would allow
# 100 to 3,000 requests a second. So the writer commits all requests that are ready as one group.
# While it waits for the disk, the next group gathers: groups grow with the load by themselves.
# There is no timer, and a lone request waits for nobody.
# PostgreSQL, MySQL and Kafka's brokers do the same.
#
# The writer takes its groups from a queue of its own, and does not ask the event loop for each of
# them: that took a third of a millisecond from one group to the next.

AGAIN = {"Retry-After": "1"}  # with 503: to send the same again is safe, and right


class Counts(NamedTuple):
    """What a 202 tells: how many events a request had, and how many of them were new."""

    received: int
    unique: int


class Submission(NamedTuple):
    """A request on its way to the consumer."""

    body: bytes
    answer: asyncio.Future[Counts | Refused]  # resolved when its events are on disk, or are not


class Validated(NamedTuple):
    """A request on its way to the writer."""

    batch: Batch
    size: int  # bytes of its body
    answer: asyncio.Future[Counts | Refused]


def unavailable(detail: str) -> Refused:
    """The answer to a request that may be sent again."""
    return Refused(503, detail, AGAIN)


class Histogram:
    """How often a value was in which range, for GET /metrics."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # one for each range; the last is above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value in the first range whose bound is not below it."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


COMMITS = "Commits"  # what can fail, in the words of the log: "Commits fail: …"
READS = "Reads"
CHECKS = "Checks of the database"


class Health:
    """What fails now. The log says it when it begins and when it ends, and not at each request."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}  # what fails - why
        self._said: dict[str, str] = {}  # what has failed - the last line about it
        self._written_at: dict[str, float] = {}  # a line - when it was written last

    def fails(self, what: str, reason: str, error: BaseException | None = None) -> None:
        """Notes that something fails; `error` is one that nobody expected, for its traceback."""
        self._reasons[what] = reason
        self._say(what, logging.ERROR, f"{what} fail: {reason}", error)

    def works(self, what: str) -> None:
        """Notes that something works."""
        self._reasons.pop(what, None)
        if what in self._said:
            self._say(what, logging.WARNING, f"{what} work again")

    def _say(self, what: str, level: int, line: str, error: BaseException | None = None) -> None:
        """Logs a line that is not said yet, but none more than once a minute.

        On a nearly full disk, commits fail and work in turn. A line that comes too early is left
        out; what fails or works for longer calls this again.
        """
        now = time.monotonic()
        is_early = now - self._written_at.get(line, -math.inf) < COMPLAINT_SECONDS
        if is_early or self._said.get(what) == line:
            return
        self._said[what] = line
        self._written_at[line] = now
        log.log(level, "%s", line, exc_info=error)

    def reason(self, what: str) -> str | None:
        """Why this fails; None if it works."""
        return self._reasons.get(what)

    @property
    def reasons(self) -> str:
        """Why anything fails; empty if all is well."""
        return "; ".join(f"{what} fail: {reason}" for what, reason in self._reasons.items())


EMPTY = Batch(b"", [], [])  # of a probe


class GroupCommit:
    """Takes in the bodies of requests one by one, and commits them in groups."""

    def __init__(self, store: Store, health: Health) -> None:
        self.commit_seconds = Histogram(
            0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1
        )
        self.group_events = Histogram(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
        self.is_stopping = False
        self._store = store
        self._health = health
        self._queue: asyncio.Queue[Submission | None] = asyncio.Queue()  # None: the end
        self._ready: queue.SimpleQueue[list[Validated] | None] = queue.SimpleQueue()
        self._writer_thread = ThreadPoolExecutor(1, "writer")
        self._watcher_thread = ThreadPoolExecutor(1, "watcher")
        self._submitted = 0  # requests without the refused ones; the event loop counts these
        self._taken = 0  # those that the writer has taken; it counts these
        # What live feeds wait for, by topic (None: any). Weak: it is gone with the last one.
        self._next_events: weakref.WeakValueDictionary[str | None, asyncio.Future[None]] = (
            weakref.WeakValueDictionary()
        )

    async def start(self) -> None:
        """Starts the consumer, the writer and the watcher; raises RuntimeError without a thread."""
        self._loop = asyncio.get_running_loop()
        self.crashed: asyncio.Future[str] = self._loop.create_future()
        await self._loop.run_in_executor(self._watcher_thread, time.sleep, 0)  # it can be started
        self._writer = self._loop.run_in_executor(self._writer_thread, self._write)
        self._consumer = asyncio.create_task(self._consume(), name="consumer")
        self._watcher = asyncio.create_task(self._watch(), name="watcher")
        for worker in (self._writer, self._consumer, self._watcher):
            worker.add_done_callback(self._handle_end)

    def _handle_end(self, worker: asyncio.Future[None]) -> None:
        """A worker ends at the stop. If one ends earlier, the process must not go on without it."""
        if self.is_stopping:
            return
        why = None if worker.cancelled() else worker.exception()
        reason = "a worker of this process has ended"
        self._health.fails(COMMITS, reason, why)
        self.crash(reason)

    def crash(self, reason: str) -> None:
        """Makes the process stop."""
        if not self.crashed.done():
            self.crashed.set_result(reason)

    def submit(self, body: bytes) -> asyncio.Future[Counts | Refused]:
        """Takes in a body. The future is resolved when its events are on disk.

        Or with Refused: 422 if they are not good, 503 if they could not be stored.
        """
        answer: asyncio.Future[Counts | Refused] = self._loop.create_future()
        self._submitted += 1
        self._queue.put_nowait(Submission(body, answer))
        return answer

    @property
    def queued(self) -> int:
        """The requests that wait for the writer."""
        return self._submitted - self._taken

    async def _consume(self) -> None:
        """The consumer: validates all that waits, and hands it to the writer, until the end.

        It runs when the handlers of this turn of the event loop have queued their requests. To
        validate them in a row takes half the time that it takes between two requests, when code
        and data have left the processor's caches. They are handed on in pieces, so that the writer
        begins with the first while the others are validated.
        """
        while submissions := await self._take_submissions():
            for start in range(0, len(submissions), PIECE_REQUESTS):
                good = self._validated(submissions[start : start + PIECE_REQUESTS])
                if good:
                    self._ready.put(good)
                del good
            del submissions  # while the consumer waits, it holds no body
            if not self._queue.empty():  # these were as many as may be taken at a time
                await asyncio.sleep(0)  # that took its time: let others have a turn

    async def _take_submissions(self) -> list[Submission]:
        """Takes all that waits, up to a size, or waits for the next; empty at the end."""
        submissions: list[Submission] = []
        size = 0
        submission = await self._queue.get()
        while submission is not None:
            submissions.append(submission)
            size += len(submission.body)
            if size >= MAX_GROUP_BYTES or self._queue.empty():
                return submissions
            submission = self._queue.get_nowait()
        if submissions:
            self._queue.put_nowait(None)  # the end, after these
        return submissions

    def _validated(self, submissions: Sequence[Submission]) -> list[Validated]:
        """Those whose body is good, each validated by itself; the others are answered at once."""
        good: list[Validated] = []
        for body, answer in submissions:
            try:
                batch = validate(body, self._store.encode)
            except Refused as why:  # a new one: the traceback of this one holds the body
                self._turn_down(answer, Refused(why.status, why.detail, why.headers))
            except Exception:
                log.exception("A fault of this program")
                self._turn_down(answer, Refused(500, "Internal Server Error"))
            else:
                good.append(Validated(batch, len(body), answer))
        return good

    def _turn_down(self, answer: asyncio.Future[Counts | Refused], refusal: Refused) -> None:
        """Answers a request that does not reach the writer."""
        self._submitted -= 1
        self._resolve(answer, refusal)

    def _write(self) -> None:
        """The writer, in its thread: commits all that is ready, until it is told to end."""
        while (group := self._ready.get()) is not None:
            self._add_ready(group)
            self._taken += len(group)
            self._commit(group)
            del group  # while the writer waits, it holds no events

    def _add_ready(self, group: list[Validated]) -> None:
        """In the writer's thread: adds all that is ready by now to a group, up to a size."""
        size = sum(request.size for request in group)
        while size < MAX_GROUP_BYTES and not self._ready.empty():
            more = self._ready.get()
            if more is None:
                self._ready.put(None)  # the end, after this group
                break
            group += more
            size += sum(request.size for request in more)

    def _commit(self, group: list[Validated]) -> None:
        """In the writer's thread: stores a group, and has the event loop answer it."""
        try:
            failure = self._health.reason(COMMITS)
            if self.is_stopping and failure:  # do not wait for a failing disk again
                raise Unavailable(failure)
            batches = [request.batch for request in group if request.batch.topics]
            outcome = self._store.commit(batches)
        except Unstorable as why:
            if len(group) > 1:  # halve it until the bad request is alone: the others are stored
                half = len(group) // 2
                self._commit(group[:half])
                self._commit(group[half:])
            else:
                ctx = {"error": str(why)}
                errors = [error_entry(["body"], "json_invalid", "JSON decode error", ctx)]
                self._call(self._refuse, group, Refused(422, errors))
        except Unavailable as why:
            self._call(self._fail, group, str(why), None)
        except Exception as why:  # noqa: BLE001 - whatever it is, each client gets an answer
            self._call(self._fail, group, type(why).__name__, why)
        else:
            self._call(self._answer, group, outcome)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function on the event loop."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def _answer(self, group: list[Validated], outcome: Outcome) -> None:
        """On the event loop: tells each request what became of its events."""
        self._health.works(COMMITS)
        start = 0
        for request in group:
            received = len(request.batch.topics)
            end = start + received
            self._resolve(request.answer, Counts(received, outcome.is_new.count(1, start, end)))
            start = end
        if len(outcome.is_new) > 0:  # else it was a probe
            self.commit_seconds.observe(outcome.seconds)
            self.group_events.observe(len(outcome.is_new))
            self._loop.call_soon(self._announce, group, outcome)  # when the answers are out

    def _announce(self, group: list[Validated], outcome: Outcome) -> None:
        """Tells the live feeds and the log about a group."""
        topics: list[str] = []
        event_ids: list[str] = []
        for request in group:
            topics += request.batch.topics
            event_ids += request.batch.event_ids
        if self._next_events and 1 in outcome.is_new:
            self._wake_feeds({None, *itertools.compress(topics, outcome.is_new)})
        log_events(topics, event_ids, outcome.is_new)

    def _fail(self, group: list[Validated], reason: str, error: Exception | None) -> None:
        """On the event loop: the database could not store a group."""
        self._health.fails(COMMITS, reason, error)
        self._refuse(group, unavailable(f"The database cannot be written: {reason}"))

    def _refuse(self, group: list[Validated], refusal: Refused) -> None:
        """On the event loop: tells each request why nothing of it is stored."""
        for request in group:  # each raises it, and raising changes it: so they cannot share one
            answer = Refused(refusal.status, refusal.detail, refusal.headers)
            self._resolve(request.answer, answer)

    def _resolve(self, future: asyncio.Future[Counts | Refused], answer: Counts | Refused) -> None:
        """Tells one request."""
        if not future.done():  # done: nobody waits; its events are stored all the same
            future.set_result(answer)

    def next_event(self, topic: str | None) -> asyncio.Future[None]:
        """Resolved when the next new event of the topic (None: of any) is on disk.

        It may be resolved without a new event, too. So the caller has to look into the database.
        """
        future = self._next_events.get(topic)
        if future is None:
            future = self._loop.create_future()
            self._next_events[topic] = future
        return future

    def _wake_feeds(self, topics: Collection[str | None]) -> None:
        """Resolves what feeds of these topics wait for."""
        for topic in topics:
            future = self._next_events.pop(topic, None)
            if future is not None:
                future.set_result(None)

    async def _watch(self) -> None:
        """Looks for commits of other processes; while something fails, tries whether it works.

        Only a commit can tell that commits work again. A balancer that obeys GET /health sends
        none to a service that is failing, so the service has to try for itself.
        """
        while not self.is_stopping:
            run = self._loop.run_in_executor(self._watcher_thread, self._store.changed)
            try:
                topics = await run
            except Unavailable as why:
                self._health.fails(CHECKS, str(why))
                await asyncio.sleep(WATCH_SECONDS)
            except Exception as why:  # noqa: BLE001 - as in _commit
                self._health.fails(CHECKS, type(why).__name__, why)
                await asyncio.sleep(WATCH_SECONDS)
            else:
                self._health.works(CHECKS)
                if topics is None:
                    self._wake_feeds(list(self._next_events))
                elif topics:
                    self._wake_feeds([*topics, None])
            if self._health.reason(COMMITS) and not self.is_stopping:
                await self._probe()

    async def _probe(self) -> None:
        """Tries a commit without events."""
        answer: asyncio.Future[Counts | Refused] = self._loop.create_future()
        self._submitted += 1
        self._ready.put([Validated(EMPTY, 0, answer)])
        await answer

    def stop(self) -> None:
        """Lets the live feeds end. What was submitted will be stored."""
        self.is_stopping = True
        self._wake_feeds(list(self._next_events))
        self._store.wake()

    async def finish(self) -> None:
        """Returns when all that was submitted is answered and the workers have ended.

        If a worker has ended before, nothing more can be answered.
        """
        self.is_stopping = True
        self._queue.put_nowait(None)
        await asyncio.wait([self._consumer])
        self._watcher.cancel()
        self._ready.put(None)
        await asyncio.wait([self._writer])

    def close(self) -> None:
        """Ends the threads, also if only some of them could be started."""
        self._writer_thread.shutdown()
        self._watcher_thread.shutdown()


def log_events(topics: Sequence[str], event_ids: Sequence[str], is_new: bytearray) -> None:
    """Logs what became of each event. One record has many lines, because a record costs 6 µs."""
    if not log.isEnabledFor(logging.WARNING):
        return
    new = []
    dropped = []
    for topic, event_id, flag in zip(topics, event_ids, is_new):
        if flag:
            new.append(f"Processed new event: topic={topic}, event_id={event_id}")
        else:
            dropped.append(f"Dropped duplicate event: topic={topic}, event_id={event_id}")
    if new:
        log.info("%s", "\n".join(new))
    if dropped:
        log.warning("%s", "\n".join(dropped))


# --- HTTP ------------------------------------------------------------------------------------
# Admission, the representations of what is read, and the handlers. Bodies are read here and not by
# request.read(): to refuse them before they take memory, and because aiohttp takes a truncated
# gzip for whole.

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HTML = "text/html"
READ_FORMS = {  # what a reader may ask for in Accept, and what it gets
    JSON: JSON,
    LINES: LINES,
    "application/ndjson": LINES,
    "application/jsonl": LINES,
    FEED: FEED,
}
WINDOW_BITS = {"": 0, "identity": 0, "gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's codes
JSON_UTF8 = JSON + "; charset=utf-8"
ACCEPTED_HEADERS = {"Content-Type": JSON_UTF8}
NO_STORE = {"Cache-Control": "no-store"}
FEED_HEADERS = {
    "Cache-Control": "no-store, no-transform",  # some proxies hold back what they compress
    "X-Accel-Buffering": "no",  # nginx: pass on each event as it comes
    "Vary": "Accept",
}


class TimeLimit:
    """A time limit for a client that keeps room in memory, as a context manager.

    The block ends with TimeoutError after so many seconds, or when the limit is cut short.
    """

    def __init__(self, limits: set[TimeLimit], seconds: float, progress: Callable[[], int]) -> None:
        self.is_cut_short = False
        self.since = asyncio.get_running_loop().time()
        self.progress = progress  # bytes that have arrived since then
        self._limits = limits
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> Self:
        self._limits.add(self)
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._limits.remove(self)
        await self._timeout.__aexit__(kind, error, traceback)

    def cut_short(self) -> None:
        """Ends the time now."""
        if not self._timeout.expired():
            self.is_cut_short = True
            self._timeout.reschedule(asyncio.get_running_loop().time())


class TimeLimits:
    """The time limits of many clients; they are cut short where their room is needed."""

    def __init__(self) -> None:
        self._limits: set[TimeLimit] = set()

    def limit(self, seconds: float, progress: Callable[[], int] = lambda: 0) -> TimeLimit:
        """A new limit, for an `async with`."""
        return TimeLimit(self._limits, seconds, progress)

    def end_slow(self, seconds: float, bytes_per_second: int) -> None:
        """Ends each limit that has run for so long, and whose client was no faster than that."""
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            age = now - limit.since
            if age >= seconds and limit.progress() <= age * bytes_per_second:
                limit.cut_short()

    def end_all(self) -> None:
        """Ends them all."""
        for limit in self._limits:
            limit.cut_short()


class Admission:
    """Room in memory for the bodies of requests, by their bytes.

    A body takes room as it arrives, until its events are committed. So a sender that announces
    much and sends little takes little. Where the room is used up, bodies that hardly move must go,
    so that senders of half a body keep nobody out.
    """

    def __init__(self, most_bytes: int) -> None:
        self.in_flight_bytes = 0
        self.arriving = TimeLimits()
        self._most_bytes = most_bytes

    def take(self, size: int) -> None:
        """Takes room for so many bytes; raises Refused (503) where there is none."""
        if self.in_flight_bytes + size > self._most_bytes:
            self.arriving.end_slow(SLOW_SECONDS, SLOW_BYTES_PER_SECOND)
            raise unavailable("Too many bytes in flight")
        self.in_flight_bytes += size


class Share:
    """The room that one request takes; it is given back at the end of the `with`."""

    def __init__(self, admission: Admission) -> None:
        self.size = 0
        self._admission = admission

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._admission.in_flight_bytes -= self.size

    def grow(self, size: int) -> None:
        """Takes more room, or less; raises Refused (503)."""
        self._admission.take(size)
        self.size += size


class ReadersRoom:
    """Room in memory for what readers have asked for and have not taken yet.

    The fuller it is, the smaller are the pages that may be read. So readers of common events never
    wait for it. Large events can fill it. Then readers who take nothing for a while must go.
    """

    def __init__(self) -> None:
        self.taking = TimeLimits()
        self._held_bytes = 0
        self._holders: Counter[int] = Counter()  # of each piece, as readers may share one
        self._has_changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether no large page may be read now."""
        return self._held_bytes >= READERS_BYTES

    def page_bytes(self) -> int:
        """How many bytes the next page may have; the last event of a page may go beyond it."""
        most_bytes = (READERS_BYTES - self._held_bytes) // PAGES_IN_ROOM
        return max(1, min(PAGE_BYTES, most_bytes))

    async def wait(self) -> None:
        """Waits until it is not full any more."""
        while self.is_full:
            self.taking.end_slow(STUCK_SECONDS, 0)
            self._has_changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_changed.wait(), ROOM_SECONDS)

    @contextlib.contextmanager
    def holding(self, piece: bytes) -> Iterator[None]:
        """A piece of an answer is in memory while this lasts."""
        key = id(piece)  # no other piece has it while this one is alive, as it is in this block
        if key not in self._holders:
            self._held_bytes += len(piece)
        self._holders[key] += 1
        try:
            yield
        finally:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._held_bytes -= len(piece)
                self._has_changed.set()


class EventsQuery(NamedTuple):
    """What a reader of GET /events asks for."""

    form: str  # JSON, LINES or FEED
    topic: str | None  # None: all
    after: int
    upto: int
    limit: int
    is_from_now: bool  # a feed of new events only: its first message tells it its position


class Place(NamedTuple):
    """Where a reader is: readers at the same place at the same time share a page."""

    form: str
    topic: str | None
    after: int
    upto: int
    limit: int
    # Event 7 may be stored while a page without it is being read. A feed that comes after that
    # waits for event 8. It needs a page of its own: with this one, it would miss event 7.
    next_event: asyncio.Future[None] | None


class Metric(NamedTuple):
    """A metric of GET /metrics."""

    name: str
    kind: str
    meaning: str
    samples: Mapping[str, float]  # by what follows the name: labels, or _sum


class Api:
    """The handlers, with what they share."""

    def __init__(
        self, settings: Settings, store: Store, health: Health, commits: GroupCommit
    ) -> None:
        self._settings = settings
        self._store = store
        self._health = health
        self._commits = commits
        self._admission = Admission(settings.max_in_flight_bytes)
        self.is_local = is_loopback(settings.host)  # `serve` sets it again, when it listens
        self._reader_thread = ThreadPoolExecutor(1, "reader")
        self._refusals: Counter[int] = Counter()  # by status
        self._started = time.time()
        self._started_ticks = time.monotonic()
        self._subscribers = 0
        self._idle_subscribers = 0  # those that wait for the next event
        self._room = ReadersRoom()
        self._failed_read: Callable[[], object] | None = None  # the last one, until it works
        self._turn = asyncio.Lock()  # one page is read at a time, so that the room holds
        self._large_turn = asyncio.Lock()  # the same for pages that wait for room
        self._pages: dict[Place, asyncio.Task[Page]] = {}  # that are being read now
        self._dashboard = read_beside("dashboard.html")
        self._openapi = read_beside("openapi.json")

    async def start(self) -> None:
        """Starts the reader's thread, before anybody asks.

        Raises RuntimeError without a thread, Unavailable if nothing can be read.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._reader_thread, self._store.last_seq)

    async def totals(self) -> Totals:
        """The counters of all topics together; raises Refused (503)."""
        return await self._read(self._store.totals)

    def stop(self) -> None:
        """Refuses what comes from now on; what is under way has a short time to be answered."""
        self._commits.stop()
        self._admission.arriving.end_all()

    def close(self) -> None:
        """Ends the reader's thread."""
        self._reader_thread.shutdown()

    # --- the middleware ---

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets in who may come in, and answers every error as {"detail": …}.

        Only if the connection is gone, there is nobody to answer.
        """
        try:
            self._check_access(request)
            return await handler(request)
        except Refused as why:
            why.__traceback__ = None  # its frames hold the body
            return self._refuse(request, why)
        except web.HTTPException as why:  # 404 and 405
            allow = why.headers.get("Allow")
            return self._refuse(
                request, Refused(why.status, why.reason, {"Allow": allow} if allow else None)
            )
        except ConnectionError as why:  # the client is gone, or its answer was broken off
            raise why.with_traceback(None)  # the traceback would keep a page in memory
        except Exception:
            log.exception("A fault of this program")
            return self._refuse(request, Refused(500, "Internal Server Error"))

    def _refuse(self, request: web.Request, refusal: Refused) -> web.Response:
        """The answer to a request that is refused."""
        self._refusals[refusal.status] += 1
        detail = {"detail": refusal.detail}
        if log.isEnabledFor(logging.DEBUG):
            path = json.dumps(request.path)  # in ASCII and quotes: nothing in it can forge a line
            reason = json.dumps(refusal.detail)
            log.debug("Refused %s %s: %d %s", request.method, path, refusal.status, reason)
        headers = NO_STORE | dict(refusal.headers)
        return web.json_response(detail, status=refusal.status, headers=headers)

    def _check_access(self, request: web.Request) -> None:
        """With a token set, asks for it. Without one, on loopback, refuses foreign names of hosts.

        Such a name may be an attacker's, made to point to 127.0.0.1 (DNS rebinding).
        """
        if self._settings.api_token:
            self._check_token(request)
        elif self.is_local and not is_local_name(request.headers.get("Host", "")):
            raise Refused(
                421,
                "Without a token, this address answers only to the names localhost and to IP "
                "addresses: otherwise any web page could read and post here. Set an API token, or "
                "let the proxy in front pass the header Host: localhost",
            )

    def _check_token(self, request: web.Request) -> None:
        """Raises Refused (401); / and /health need no token.

        How long the comparison takes does not depend on the token.
        """
        if request.path in ("/", "/health") and request.method in ("GET", "HEAD", "OPTIONS"):
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode(errors="surrogateescape")
        is_right = hmac.compare_digest(given, self._settings.api_token.encode())
        if not is_right or scheme.lower() != "bearer":
            raise Refused(401, "Missing or wrong API token", {"WWW-Authenticate": "Bearer"})

    # --- POST /publish ---

    async def publish(self, request: web.Request) -> web.Response:
        """POST /publish: answers when the events of the request are on disk."""
        check_content_type(request)
        bits = window_bits(request)
        if self._commits.is_stopping:
            raise unavailable("The service is stopping")
        with Share(self._admission) as share:
            # The body has no name here: so it is let go as soon as it is validated.
            result = await self._commits.submit(await self._read_body(request, bits, share))
        if isinstance(result, Refused):
            raise result
        received, unique = result
        text = (
            f'{{"received": {received}, "unique_processed": {unique}, '
            f'"duplicate_dropped": {received - unique}, '
            f'"message": "Received {received} event(s) for processing"}}'
        )
        return web.Response(status=202, body=text.encode(), headers=ACCEPTED_HEADERS)

    def _too_large(self) -> Refused:
        """The answer to a body above the limit."""
        return Refused(413, f"The body is larger than {self._settings.max_body_bytes} bytes")

    async def _read_body(self, request: web.Request, bits: int, share: Share) -> bytes:
        """The body without its compression; raises Refused (400, 408, 413, 503)."""
        most = self._settings.max_body_bytes
        try:
            if request.content.is_eof():  # it came together with the headers
                body = request.content.read_nowait()
                share.grow(len(body))
            elif (request.content_length or 0) > most:
                raise self._too_large()
            else:
                body = await self._receive(request.content, share)
        except (web.RequestPayloadError, HttpProcessingError, ConnectionError):
            raise Refused(400, "The body breaks off") from None
        if len(body) > most:
            raise self._too_large()
        if not bits:
            return body
        plain = decompress(body, bits, most)
        if len(plain) > most:
            raise self._too_large()
        share.grow(len(plain) - len(body))
        return plain

    async def _receive(self, content: StreamReader, share: Share) -> bytes:
        """The body, or the beginning of one that is too large; raises Refused (408, 503)."""
        body = bytearray()
        limit = self._admission.arriving.limit(BODY_SECONDS, lambda: len(body))
        try:
            async with limit:
                while len(body) <= self._settings.max_body_bytes:
                    piece = await content.readany()
                    if not piece:
                        break
                    share.grow(len(piece))
                    body += piece
        except TimeoutError:
            if limit.is_cut_short:
                raise unavailable("The service is stopping, or too busy for a slow body") from None
            raise Refused(408, f"The body did not arrive in {BODY_SECONDS:.0f} s") from None
        return bytes(body)

    # --- GET /events ---

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /events: what is stored, as JSON or as lines; or a live feed."""
        asked = await self._read_query(request)
        if asked.form == FEED:
            content_type = FEED + "; charset=utf-8"
            return await self._stream(request, content_type, self._feed(asked), FEED_HEADERS)
        content_type = JSON_UTF8 if asked.form == JSON else asked.form
        headers = NO_STORE | {"Vary": "Accept"}
        return await self._stream(request, content_type, self._snapshot(asked), headers)

    async def _read_query(self, request: web.Request) -> EventsQuery:
        """What a reader asks for, by the query and the headers; raises Refused (422)."""
        accept = header(request, "Accept")
        form = READ_FORMS[preferred(accept, list(READ_FORMS))]
        known = ["topic", "event_id", "after", "tail", "limit"]
        query = parameters(request, [*known, "lastEventId"] if form == FEED else known)
        topic = query.get("topic") or None
        limit = integer(query.get("limit"), ["query", "limit"], default=MAX_INTEGER, least=1)
        last_seq = await self._read(self._store.last_seq)
        if "event_id" in query:
            return await self._query_for_one(query, form, last_seq)
        if "tail" in query and "after" in query:
            raise Refused(422, [not_permitted("tail")])

        resumed_at = resume_position(request, query, last_seq) if form == FEED else None
        is_from_now = False
        if resumed_at is not None:
            after = resumed_at
        elif "tail" in query:
            tail = integer(query["tail"], ["query", "tail"], 0)
            after = await self._read(self._store.position, topic, tail) if tail else last_seq
            is_from_now = after >= last_seq
        elif query.get("after") == "latest":
            after = last_seq
            is_from_now = True
        else:
            after = integer(query.get("after"), ["query", "after"], 0, most=last_seq)
        upto = MAX_INTEGER if form == FEED else last_seq
        return EventsQuery(form, topic, after, upto, limit, is_from_now)

    async def _query_for_one(
        self, query: Mapping[str, str], form: str, last_seq: int
    ) -> EventsQuery:
        """One event is asked for by its identity: a page from just before it up to it."""
        if not query.get("topic"):
            raise Refused(422, [error_entry(["query", "topic"], "missing", "Field required")])
        if form == FEED:
            raise Refused(422, [not_permitted("event_id")])
        if "tail" in query:
            raise Refused(422, [not_permitted("tail")])
        topic = query["topic"]
        after = last_seq
        if query.get("after") != "latest":
            after = integer(query.get("after"), ["query", "after"], 0, most=last_seq)
        seq = await self._read(self._store.find, topic, query["event_id"])
        if seq is None or seq <= after:
            return EventsQuery(form, topic, after, after, 1, is_from_now=False)
        return EventsQuery(form, topic, seq - 1, seq, 1, is_from_now=False)

    async def _snapshot(self, asked: EventsQuery) -> AsyncGenerator[bytes, None]:
        """What was stored when the reader asked, page by page.

        Rows are only ever added. So "up to the highest number of that moment" is a snapshot
        without a transaction, and a slow reader does not keep the log from being reused.
        """
        count = 0
        after = asked.after
        is_json = asked.form == JSON
        before = b""  # what comes before the next page
        if is_json:
            before = b'{"topic": %b, "events": [' % json.dumps(asked.topic).encode()
        while count < asked.limit and after < asked.upto:
            limit = min(asked.limit - count, PAGE_EVENTS)
            page = await self._shared_page(asked.form, asked.topic, after, asked.upto, limit)
            if page.count == 0:
                break
            if before:
                yield before
            yield page.text  # as it is: readers at one place share these bytes
            before = b"," if is_json else b""
            count += page.count
            after = page.last_seq
        if is_json:
            end = b'], "count": %d, "last_seq": %d}' % (count, after)
            if count == 0:
                end = before + end
            yield end

    async def _feed(self, asked: EventsQuery) -> AsyncGenerator[bytes, None]:
        """Server-Sent Events: what is stored, then what comes, until `limit` or the stop.

        A subscriber is a position in the sequence and nothing else. There is no buffer for it
        that could overflow: it gets the next page when its connection has taken the last one. A
        slow subscriber falls behind, and catches up from the database.
        https://html.spec.whatwg.org/multipage/server-sent-events.html
        """
        loop = asyncio.get_running_loop()
        count = 0
        after = asked.after
        # `retry:` and comments come without an empty line after them: with one, some clients would
        # take them for empty events.
        head = b"retry: %d\n" % RETRY_MS
        if asked.is_from_now:  # so that a connection lost before the first event loses none
            head += b'event: position\nid: %d\ndata: {"last_seq": %d}\n\n' % (after, after)
        sent = loop.time()
        self._subscribers += 1
        try:
            while count < asked.limit and not self._commits.is_stopping:
                next_event = self._commits.next_event(asked.topic)  # before reading: none slips by
                limit = min(asked.limit - count, PAGE_EVENTS)
                page = await self._shared_page(
                    FEED, asked.topic, after, asked.upto, limit, next_event
                )
                if head:
                    yield head
                    head = b""
                    sent = loop.time()
                count += page.count
                after = page.last_seq
                if page.count:
                    yield page.text
                    sent = loop.time()
                    active = self._subscribers - self._idle_subscribers
                    await asyncio.sleep(FEED_PAGE_SECONDS * active)
                elif not await self._wait_for_news(
                    next_event, sent + HEARTBEAT_SECONDS - loop.time()
                ):
                    yield b": nothing new\n"
                    sent = loop.time()
        finally:
            self._subscribers -= 1

    async def _wait_for_news(self, next_event: asyncio.Future[None], seconds: float) -> bool:
        """Waits until the next event is stored, or so long; returns whether it is."""
        self._idle_subscribers += 1
        try:
            done, _ = await asyncio.wait([next_event], timeout=max(0.0, seconds))
        finally:
            self._idle_subscribers -= 1
        return bool(done)

    async def _shared_page(
        self,
        form: str,
        topic: str | None,
        after: int,
        upto: int,
        limit: int,
        next_event: asyncio.Future[None] | None = None,
    ) -> Page:
        """A page, from a read that is shared with all who are at the same place."""
        place = Place(form, topic, after, upto, limit, next_event)
        reading = self._pages.get(place)
        if reading is None:
            read = functools.partial(self._store.page, form, topic, after, upto, limit)
            reading = asyncio.create_task(self._read_in_turn(read))
            self._pages[place] = reading
            reading.add_done_callback(lambda done: self._forget(place, done))
        return await asyncio.shield(reading)  # who leaves does not take the page from the others

    def _forget(self, place: Place, reading: asyncio.Task[Page]) -> None:
        """A page has been read: who comes now reads it anew."""
        del self._pages[place]
        if not reading.cancelled():
            reading.exception()  # has been looked at, even if everybody has left

    # --- GET /stats and GET /topics ---

    async def stats(self, request: web.Request) -> web.StreamResponse:
        """GET /stats: the counters, which live in the database and outlive the process."""
        parameters(request, [])
        return await self._stream(request, JSON_UTF8, self._stats_text())

    async def _stats_text(self) -> AsyncGenerator[bytes, None]:
        """The body of GET /stats, in pieces: there may be many topics."""
        totals = await self.totals()
        text = (
            f'{{"received": {totals.received}, "unique_processed": {totals.unique}, '
            f'"duplicate_dropped": {totals.duplicates}, "topics": ['
        )
        separator = ""
        async for page in self._topic_pages("", MAX_INTEGER):
            text += separator + ", ".join(json.dumps(counts.topic) for counts in page)
            yield text.encode()
            text = ""
            separator = ", "
        uptime = time.monotonic() - self._started_ticks
        yield f'{text}], "uptime_seconds": {uptime:.2f}}}'.encode()

    async def topics(self, request: web.Request) -> web.StreamResponse:
        """GET /topics: the counters of each topic."""
        query = parameters(request, ["after", "limit"])
        limit = integer(query.get("limit"), ["query", "limit"], default=MAX_INTEGER, least=1)
        text = self._topics_text(query.get("after", ""), limit)
        return await self._stream(request, JSON_UTF8, text)

    async def _topics_text(self, after: str, limit: int) -> AsyncGenerator[bytes, None]:
        """The body of GET /topics, in pieces."""
        text = '{"topics": ['
        separator = ""
        count = 0
        async for page in self._topic_pages(after, limit):
            objects = (
                {
                    "topic": counts.topic,
                    "received": counts.received,
                    "unique_processed": counts.unique,
                    "duplicate_dropped": counts.duplicates,
                }
                for counts in page
            )
            text += separator + ", ".join(map(json.dumps, objects))
            yield text.encode()
            text = ""
            separator = ", "
            count += len(page)
        yield f'{text}], "count": {count}}}'.encode()

    async def _topic_pages(self, after: str, limit: int) -> AsyncGenerator[list[TopicCounts], None]:
        """The topics by name, some at a time."""

        def read(most_bytes: int) -> list[TopicCounts]:
            return self._store.topics(after, min(limit, max(1, most_bytes // TOPIC_BYTES)))

        while limit > 0:
            page = await self._read(read, self._room.page_bytes())
            if not page:
                break
            yield page
            limit -= len(page)
            after = page[-1].topic

    # --- reading and streaming ---

    async def _read(self, query: Callable[..., T], *arguments: Any) -> T:
        """Runs a method of the store in the reader's thread; raises Refused (503)."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reader_thread, query, *arguments)
        except Unavailable as why:
            reason = str(why)
            self._health.fails(READS, reason)
        except Exception as why:  # noqa: BLE001 - as in GroupCommit
            reason = type(why).__name__
            self._health.fails(READS, reason, why)
        self._failed_read = functools.partial(query, *arguments)
        raise unavailable(f"The database cannot be read: {reason}")

    async def _check_reads(self) -> None:
        """While reads fail: tries whether the one that failed works again.

        That others work means little: perhaps only some pages of the file are damaged.
        """
        failed_read = self._failed_read
        if failed_read is None:
            return
        with contextlib.suppress(Refused):
            await self._read(failed_read)
            if self._failed_read is failed_read:  # and no other has failed since
                self._failed_read = None
                self._health.works(READS)

    async def _read_in_turn(self, query: Callable[[int], Page]) -> Page:
        """Runs a query for a page; it is told how many bytes it may have.

        Where there is no room, a page with a large event has to wait; all others go on.
        """
        async with self._turn:
            page = await self._read(query, self._room.page_bytes())
            if len(page.text) <= PAGE_BYTES or not self._room.is_full:
                return page
        del page
        async with self._large_turn:
            await self._room.wait()
            return await self._read(query, self._room.page_bytes())

    async def _stream(
        self,
        request: web.Request,
        content_type: str,
        pieces: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] = NO_STORE,
    ) -> web.StreamResponse:
        """Answers with these pieces, as they come.

        An answer that has to be broken off ends in a reset of the connection, and so never looks
        complete: HTTP/1.0 has no other way to tell. It does so also if the process dies.
        """
        response = web.StreamResponse(headers={"Content-Type": content_type} | dict(headers))
        try:
            async with contextlib.aclosing(pieces):
                first = await anext(pieces, b"")  # if this read fails, it is not too late for a 503
                if request.method == "HEAD":
                    await response.prepare(request)
                    return response
                set_reset_on_close(request, True)
                try:
                    await response.prepare(request)
                    await self._write(response, first)
                    async for piece in pieces:
                        await self._write(response, piece)
                    async with self._room.taking.limit(READER_SECONDS):
                        await response.write_eof()
                    set_reset_on_close(request, False)
                except BaseException:
                    if request.transport is not None:
                        request.transport.abort()
                    raise
        except (TimeoutError, Refused):  # the reader takes nothing, or nothing more can be read
            if not response.prepared:
                raise
        return response

    async def _write(self, response: web.StreamResponse, piece: bytes) -> None:
        """Sends a piece; raises TimeoutError if the reader does not take it."""
        with self._room.holding(piece):
            for start in range(0, len(piece), WRITE_BYTES):
                async with self._room.taking.limit(READER_SECONDS):
                    await response.write(piece[start : start + WRITE_BYTES])

    # --- the service itself ---

    async def root(self, request: web.Request) -> web.Response:
        """GET /: for browsers the page, for all others GET /health."""
        accept = header(request, "Accept")
        if not self._dashboard or preferred(accept, [JSON, HTML]) == JSON:
            health = await self.health(request)
            health.headers["Vary"] = "Accept"
            return health
        await self._check_reads()
        status = 503 if self._health.reasons else 200
        headers = NO_STORE | {"Vary": "Accept", "X-Frame-Options": "DENY"}
        return web.Response(
            status=status, body=self._dashboard, content_type=HTML, charset="utf-8", headers=headers
        )

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: whether events can be stored and read."""
        await self._check_reads()
        reason = self._health.reasons
        health = {"service": SERVICE_NAME, "status": "running", "version": VERSION}
        if reason:
            health |= {"status": "failing", "reason": reason}
        headers = dict(NO_STORE)
        if request.method == "OPTIONS":
            headers["Allow"] = "GET, HEAD, OPTIONS"
        return web.json_response(health, status=503 if reason else 200, headers=headers)

    async def openapi(self, request: web.Request) -> web.Response:
        """GET /openapi.json: the contract as an OpenAPI document."""
        if not self._openapi:
            raise web.HTTPNotFound
        return web.Response(body=self._openapi, content_type=JSON, headers=NO_STORE)

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus's text format 0.0.4."""
        await self._check_reads()
        text = ""
        for metric in [*await self._stored_metrics(), *self._own_metrics()]:
            text += f"# HELP {metric.name} {metric.meaning}\n# TYPE {metric.name} {metric.kind}\n"
            for suffix, value in metric.samples.items():
                text += f"{metric.name}{suffix} {value}\n"
        headers = NO_STORE | {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(text=text, headers=headers)

    async def _stored_metrics(self) -> list[Metric]:
        """What only the database knows. If it cannot be read, the other metrics are shown alone."""
        try:
            totals = await self.totals()
            size = await self._read(self._store.size)
        except Refused:
            return []
        outcomes = {'{outcome="unique"}': totals.unique, '{outcome="duplicate"}': totals.duplicates}
        return [
            counter("aggregator_events_received_total", "Events acknowledged.", totals.received),
            Metric(
                "aggregator_events_processed_total", "counter", "The same, by outcome.", outcomes
            ),
            gauge("aggregator_database_bytes", "The database with its log.", size.database_bytes),
            gauge("aggregator_log_bytes", "The write-ahead log.", size.log_bytes),
            counter(
                "aggregator_checkpoint_failures_total",
                "Checkpoints that failed.",
                size.failed_checkpoints,
            ),
        ]

    def _own_metrics(self) -> list[Metric]:
        """What this process counts."""
        refusals = {f'{{status="{status}"}}': n for status, n in sorted(self._refusals.items())}
        build = {f'{{version="{VERSION}",sqlite="{sqlite3.sqlite_version}"}}': 1}
        commits = self._commits
        return [
            Metric(
                "aggregator_requests_refused_total", "counter", "Refusals, by status.", refusals
            ),
            gauge("aggregator_in_flight_bytes", "Bodies held.", self._admission.in_flight_bytes),
            gauge("aggregator_requests_queued", "Requests that wait.", commits.queued),
            histogram(
                "aggregator_group_commit_seconds", "Time of a commit.", commits.commit_seconds
            ),
            histogram(
                "aggregator_group_commit_events", "Events in a commit.", commits.group_events
            ),
            gauge("aggregator_live_subscribers", "Live feeds.", self._subscribers),
            gauge(
                "aggregator_healthy", "1 if commits and reads work.", int(not self._health.reasons)
            ),
            counter(
                "aggregator_log_lines_dropped_total",
                "Lines of the log that nobody read.",
                dropped_log_lines(),
            ),
            Metric("aggregator_build_info", "gauge", "Versions, as labels.", build),
            gauge("process_start_time_seconds", "Start, Unix time.", self._started),
        ]


def counter(name: str, meaning: str, value: float) -> Metric:
    """A metric that only grows."""
    return Metric(name, "counter", meaning, {"": value})


def gauge(name: str, meaning: str, value: float) -> Metric:
    """A metric that goes up and down."""
    return Metric(name, "gauge", meaning, {"": value})


def histogram(name: str, meaning: str, values: Histogram) -> Metric:
    """A histogram: its buckets are cumulative, as Prometheus wants them."""
    bounds = [*map(str, values.bounds), "+Inf"]
    counts = list(itertools.accumulate(values.counts))
    samples: dict[str, float] = {
        f'_bucket{{le="{bound}"}}': count for bound, count in zip(bounds, counts)
    }
    return Metric(name, "histogram", meaning, samples | {"_sum": values.sum, "_count": counts[-1]})


def read_beside(name: str) -> bytes:
    """A file beside this module, also if that is run through a link; empty if there is none."""
    try:
        return Path(__file__).resolve().with_name(name).read_bytes()
    except OSError:
        return b""


def header(request: web.Request, name: str) -> str:
    """A header; if it is there several times, all of them as one list."""
    return ",".join(request.headers.getall(name, []))


def set_reset_on_close(request: web.Request, is_on: bool) -> None:
    """Makes the end of the connection a reset, however it comes; or stops making it one.

    This is what the socket option SO_LINGER does, with a time of 0 s.
    """
    if request.transport is not None:
        linger = struct.pack("hh" if os.name == "nt" else "ii", int(is_on), 0)
        connection = request.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is closed already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def check_content_type(request: web.Request) -> None:
    """Raises Refused (415) unless the body is JSON.

    Without asking first (a CORS preflight), a web page can send to another site only what a form
    can send, and a form cannot send JSON. So everything else is refused. If the header Origin shows
    that a web page sends this, a missing type is refused, too.
    """
    content_type = request.headers.get("Content-Type", "")
    if content_type == JSON:  # almost always
        return
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != JSON and (media_type or "Origin" in request.headers):
        raise Refused(415, "Send the header Content-Type: application/json", {"Accept": JSON})


def window_bits(request: web.Request) -> int:
    """How the body is compressed, as zlib's wbits, 0 if it is not; raises Refused (415)."""
    if "Content-Encoding" not in request.headers:  # almost always
        return 0
    encoding = header(request, "Content-Encoding").strip().lower()
    if encoding not in WINDOW_BITS:
        raise Refused(
            415,
            "Send the header Content-Encoding: gzip or deflate, or none and a plain body",
            {"Accept-Encoding": "gzip, deflate"},
        )
    return WINDOW_BITS[encoding]


def decompress(body: bytes, bits: int, most: int) -> bytes:
    """The body without its compression; no more than `most` + 1 bytes of it (zip bombs)."""
    inflate = zlib.decompressobj(bits)
    try:
        plain = inflate.decompress(body, most + 1)
    except zlib.error:
        raise Refused(400, "The compressed body is broken") from None
    if len(plain) <= most and (not inflate.eof or inflate.unused_data):
        raise Refused(400, "The compressed body breaks off, or something follows it")
    return plain


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@functools.lru_cache(maxsize=64)
def is_local_name(host: str) -> bool:
    """Whether it is localhost, an IP address, or empty. Any other name may be an attacker's."""
    name = host.rpartition(":")[0] if re.fullmatch(r".*:[0-9]*", host) else host
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name.lower().removesuffix(".") in ("localhost", "")
    return True


NO_FIT = -3  # worse than the fit of "*/*", which is -2


def preferred(accept: str, offers: Sequence[str]) -> str:
    """The media type that an Accept header prefers: RFC 9110, section 12.5.1.

    The first offer if it prefers several equally, or none.
    """
    ranges: dict[str, float] = {}
    for item in accept.lower().split(","):
        media_range, *options = (part.strip() for part in item.split(";"))
        ranges[media_range] = weight(options)

    def preference(offer: str) -> tuple[float, int]:
        """The weight of the range that fits best, and its fit: 0 is exact, -1 type/*, -2 */*."""
        for fit, media_range in enumerate((offer, offer.partition("/")[0] + "/*", "*/*")):
            if media_range in ranges:
                return ranges[media_range], -fit if ranges[media_range] else NO_FIT
        return 0.0, NO_FIT

    return max(offers, key=preference)


def weight(options: Sequence[str]) -> float:
    """The weight q among the options of a media range, 0 to 1."""
    for option in options:
        name, _, value = option.partition("=")
        if name.strip() == "q" and re.fullmatch(r"[01](\.[0-9]*)?", value.strip()):
            return min(1.0, float(value))
    return 1.0


def parameters(request: web.Request, known: Sequence[str]) -> dict[str, str]:
    """The query; raises Refused (422) if it asks for what is unknown, or twice for the same."""
    query = request.query
    surplus = [name for name in query if name not in known or len(query.getall(name)) > 1]
    if surplus:
        raise Refused(422, [not_permitted(name) for name in dict.fromkeys(surplus)][:MAX_ERRORS])
    return dict(query)


def not_permitted(name: str) -> ErrorEntry:
    """The error of a query parameter that has no place here."""
    return error_entry(["query", name], "extra_forbidden", "Extra inputs are not permitted")


def resume_position(request: web.Request, query: Mapping[str, str], last_seq: int) -> int | None:
    """Where a subscriber that reconnects left off; None if this is its first time.

    EventSource sends the id that it saw last in a header; some polyfills send it in the query.
    """
    text = request.headers.get("Last-Event-ID", "").strip()
    if text:
        return integer(text, ["header", "Last-Event-ID"], 0, most=last_seq)
    text = query.get("lastEventId", "").strip()
    if text:
        return integer(text, ["query", "lastEventId"], 0, most=last_seq)
    return None


def integer(
    text: str | None, loc: Loc, default: int, least: int = 0, most: int | None = None
) -> int:
    """The integer in a parameter; above MAX_INTEGER, it is that. Raises Refused (422)."""
    if text is None:
        return default
    try:
        if not re.fullmatch("[+-]?[0-9]+", text):
            raise ValueError
        value = int(text)  # of more than 4300 digits: ValueError
    except ValueError:
        why = "Input should be a valid integer, unable to parse string as an integer"
        raise Refused(422, [error_entry(loc, "int_parsing", why)]) from None
    if value < least:
        why = f"Input should be greater than or equal to {least}"
        raise Refused(422, [error_entry(loc, "greater_than_equal", why, {"ge": least})])
    if most is not None and value > most:
        why = f"Input should be less than or equal to {most}"
        raise Refused(422, [error_entry(loc, "less_than_equal", why, {"le": most})])
    return min(value, MAX_INTEGER)


# --- Application -----------------------------------------------------------------------------
# Who knows whom: the store knows nobody, group commit knows the store, the handlers know both.
# They are handed to each other here and are not kept in globals, so that a test can have two.

COMMITS_KEY = web.AppKey("commits", GroupCommit)
API_KEY = web.AppKey("api", Api)
STORE_KEY = web.AppKey[Store]("store")


def create_app(settings: Settings) -> web.Application:
    """The service as an aiohttp application; raises StoreError."""
    store = open_store(settings.db)
    health = Health()
    commits = GroupCommit(store, health)
    api = Api(settings, store, health, commits)
    app = web.Application(
        middlewares=[api.guard],
        handler_args={"auto_decompress": False, "keepalive_timeout": KEEPALIVE_SECONDS},
    )
    app[COMMITS_KEY] = commits
    app[API_KEY] = api
    app[STORE_KEY] = store
    app.router.add_get("/", api.root)
    app.router.add_options("/", api.health)
    app.router.add_get("/health", api.health)
    app.router.add_options("/health", api.health)
    app.router.add_post("/publish", api.publish)
    app.router.add_get("/events", api.events)
    app.router.add_get("/topics", api.topics)
    app.router.add_get("/stats", api.stats)
    app.router.add_get("/metrics", api.metrics)
    app.router.add_get("/openapi.json", api.openapi)

    async def run(app: web.Application) -> AsyncIterator[None]:
        """The threads, from before the first request to after the last answer."""
        try:
            await api.start()
            await commits.start()
            yield
            await commits.finish()
        finally:
            store.wake()
            commits.close()
            api.close()
            store.close()

    async def stop(app: web.Application) -> None:
        """Before aiohttp waits for the handlers."""
        api.stop()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(stop)
    return app


# --- Command line ----------------------------------------------------------------------------
# Three steps: read the settings, prepare the process, serve.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with 2."""
        self.exit(2, f"aggregator: {message}\n")


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings: a flag wins over its variable, and that over the default.

    A variable is handed to argparse as the default of its flag: argparse converts it, too. Exits
    with 2 if a setting makes no sense.
    """
    about = "Keeps each event exactly once, and loses none that it has acknowledged."
    parser = Parser("aggregator.py", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{SERVICE_NAME} {VERSION}")
    for each in fields(Settings):
        variable = each.metadata["variable"]
        default = each.default if each.default != "" else "none"
        parser.add_argument(
            "--" + each.name.replace("_", "-"),
            type=converter(each.default),
            default=environment.get(variable) or each.default,
            help=f"{each.metadata['meaning']} (default: {default}; environment: {variable})",
        )
    settings = Settings(**vars(parser.parse_args(arguments)))
    settings = replace(settings, log_level=settings.log_level.upper())
    if not 0 <= settings.port <= 65_535:
        parser.error(f"--port is 0 to 65535, not {settings.port}")
    if settings.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        parser.error(f"--log-level is DEBUG, INFO, WARNING or ERROR, not {settings.log_level!r}")
    if not 1 <= settings.max_body_bytes <= settings.max_in_flight_bytes <= MAX_INTEGER:
        parser.error("--max-body-bytes is 1 to --max-in-flight-bytes, so that one body fits")
    if not re.fullmatch("[!-~]*", settings.api_token):
        parser.error("--api-token is ASCII without spaces: a header has to carry it")
    return settings


def converter(default: Any) -> Callable[[str], Any]:
    """A function that makes a setting from text; an empty text gives the default."""

    def read(text: str) -> Any:
        return type(default)(text) if text else default

    read.__name__ = type(default).__name__  # for argparse's "invalid int value"
    return read


class LogHandler(logging.Handler):
    """Writes the log from a thread of its own.

    A stderr that nobody reads (a pager, Ctrl-S, a full disk) must hold nothing up. Lines wait in a
    queue with a bound; those beyond it are dropped and counted, and the count is written when the
    log moves again.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.dropped_lines = 0
        self._file = open(  # noqa: SIM115 - open until the process ends
            descriptor, "wb", buffering=0, closefd=False
        )
        self._waiting = bytearray()  # lines to be written
        self._is_writing = False
        self._has_changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep_writing, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Puts the lines of a record into the queue."""
        text = self.format(record).encode(errors="backslashreplace") + b"\n"
        with self._has_changed:
            if len(self._waiting) + len(text) > LOG_QUEUE_BYTES:
                self.dropped_lines += text.count(b"\n")
                return
            if not self._waiting:
                self._has_changed.notify_all()
            self._waiting += text

    def _keep_writing(self) -> None:
        """Runs in the thread: writes what waits, for ever.

        It lets some lines gather first: to wake up for each group of events would cost the event
        loop more than the lines themselves.
        """
        reported = 0  # of the dropped lines
        while True:
            with self._has_changed:
                self._has_changed.wait_for(lambda: self._waiting)
            time.sleep(LOG_SECONDS)
            with self._has_changed:
                text = bytes(self._waiting)
                self._waiting.clear()
                self._is_writing = True
            is_written = self._write(text)
            dropped = self.dropped_lines
            if is_written and dropped > reported:
                line = (
                    f"{dropped - reported} lines of the log were dropped: "
                    "it was not read, or not writable"
                )
                self._write(self.format(new_record(logging.WARNING, line)).encode() + b"\n")
                reported = dropped
            with self._has_changed:
                if not is_written:
                    self.dropped_lines += text.count(b"\n")
                self._is_writing = False
                self._has_changed.notify_all()

    def _write(self, text: bytes) -> bool:
        """Writes all of it; returns whether that worked."""
        try:
            while text:
                written = self._file.write(text)
                if written is None:  # another program has made it non-blocking, and it is full
                    time.sleep(0.05)
                text = text[written or 0 :]
        except OSError:
            return False
        return True

    def flush(self) -> None:
        """Waits until all is written, or for a short time; called at the end."""
        with self._has_changed:
            self._has_changed.wait_for(
                lambda: not self._waiting and not self._is_writing, LOG_FLUSH_SECONDS
            )


def new_record(level: int, text: str) -> logging.LogRecord:
    """A record of our log."""
    return log.makeRecord(log.name, level, __file__, 0, text, (), None)


def dropped_log_lines() -> int:
    """The lines that were dropped since the start."""
    handlers = logging.getLogger().handlers
    return sum(each.dropped_lines for each in handlers if isinstance(each, LogHandler))


class LinesFormatter(logging.Formatter):
    """Gives each line of a record its own time and level, so none can pass for another record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        head = f"{self.formatTime(record)} - {record.name} - {record.levelname} - "
        return head + super().format(record).replace("\n", "\n" + head)


def prepare_process(settings: Settings) -> None:
    """Prepares the log, the memory, the open files, and how the threads take turns."""
    prepare_log(settings.log_level)
    if os.name == "posix":
        return_memory()
        raise_open_files()
    sys.setswitchinterval(GIL_SECONDS)
    gc.freeze()  # the modules stay: there is no need to look for garbage in them
    gc.set_threshold(*GC_THRESHOLD)


def prepare_log(level: str) -> None:
    """The log goes to stderr, if there is one."""
    handler: logging.Handler = logging.NullHandler()
    if sys.stderr is not None:
        handler = LogHandler(sys.stderr.fileno())
        handler.setFormatter(LinesFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    # aiohttp logs a traceback for what is not HTTP: the client's mistake, and answered with 400.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def return_memory() -> None:
    """Makes glibc give large blocks back to the system when they are freed."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # another C library
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, MIB)


def raise_open_files() -> None:
    """Allows enough open files for some thousand connections."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class Complaints:
    """What asyncio complains about, without its flood when the open files run out."""

    def __init__(self, listen_again: Callable[[str, int], object]) -> None:
        self._listen_again = listen_again
        self._written_at = -math.inf  # when the line was written last

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio's exception handler."""
        error = context.get("exception")
        message = context.get("message", "")
        if not isinstance(error, OSError) or "accept" not in message.lower():
            loop.default_exception_handler(context)
            return
        if loop.time() - self._written_at > COMPLAINT_SECONDS:
            self._written_at = loop.time()
            log.error("New connections cannot be accepted: %s", error.strerror)
        if message == "Accept failed on a socket":  # Windows: and now that socket is closed
            self._listen_again(*context["socket"].getsockname()[:2])


async def serve(settings: Settings) -> int:
    """Serves until a signal comes, then finishes what was accepted; returns the exit status.

    Raises StoreError, OSError or UnicodeError where nobody can listen, RuntimeError without a
    thread, Unavailable or Refused where the first read fails.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    handle_signals(lambda: loop.call_soon_threadsafe(stop.set))
    app = create_app(settings)
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS
    )
    commits = app[COMMITS_KEY]
    tasks = set()  # asyncio itself does not keep them alive

    def listen_again_soon(host: str, port: int) -> None:
        """Has a lost socket replaced."""
        tasks.add(loop.create_task(listen_again(runner, commits, host, port)))

    try:
        await runner.setup()
        commits.crashed.add_done_callback(lambda _: stop.set())
        await site(runner, settings.host, settings.port).start()
        host, port = runner.addresses[0][:2]
        app[API_KEY].is_local = all(is_loopback(address[0]) for address in runner.addresses)
        loop.set_exception_handler(Complaints(listen_again_soon))
        introduce(settings, link(host, port), app[STORE_KEY].location, await app[API_KEY].totals())
        await stop.wait()
        notice("Stopping: what was accepted is stored")
    finally:
        await runner.cleanup()
    if commits.crashed.done():
        log.critical("Stopped, because %s. Start it again", commits.crashed.result())
        return 1
    notice("Stopped")
    return 0


async def listen_again(runner: web.AppRunner, commits: GroupCommit, host: str, port: int) -> None:
    """Listens where a socket was closed; without it, the process must not go on."""
    try:
        await site(runner, host, port).start()
    except OSError as why:
        commits.crash(f"nobody can listen on {host}:{port} any more: {why.strerror}")


def handle_signals(stop: Callable[[], object]) -> None:
    """The first signal calls `stop`. A second one ends the process at once.

    So does SIGALRM, where there is one, after STOP_SECONDS. Nothing that was acknowledged is lost.
    Without these handlers, Ctrl-C would raise KeyboardInterrupt in the middle of any line.
    """
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        if signals:
            os._exit(128 + number)
        signals.append(number)
        if hasattr(signal, "alarm"):
            signal.alarm(STOP_SECONDS)
        stop()

    # SIGBREAK is Windows's, for Ctrl-Break. SIGALRM comes STOP_SECONDS after the first signal.
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK", "SIGALRM"):
        number = getattr(signal, name, None)
        if number is not None and not is_ignored_hangup(number):
            signal.signal(number, handle)


def is_ignored_hangup(number: int) -> bool:
    """Whether it is SIGHUP (the terminal closes), and nohup has made the process ignore it."""
    is_hangup = number == getattr(signal, "SIGHUP", None)
    return is_hangup and signal.getsignal(number) is signal.SIG_IGN


def site(runner: web.AppRunner, host: str, port: int) -> web.BaseSite:
    """Where the service listens: host is a name, or an address with or without brackets."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        host = str(address)
    if host == "::" and socket.has_dualstack_ipv6():  # IPv4, too
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
        )
        return web.SockSite(runner, listener, backlog=BACKLOG)
    return web.TCPSite(runner, host, port, backlog=BACKLOG)


def notice(text: str) -> None:
    """Logs a line whatever the log level is."""
    log.handle(new_record(logging.INFO, text))


def introduce(settings: Settings, address: str, location: str, totals: Totals) -> None:
    """The first lines of the log: what runs, where its events are, and what to try."""
    token = "set" if settings.api_token else "not set, so whoever reaches the address may use it"
    notice(f"{SERVICE_NAME} {VERSION}")
    notice(f"Database: {location}, {totals.unique} events")
    notice(f"API token: {token}")
    notice(f"Running on {address} (Ctrl-C stops it)")
    notice(f"Try: open it in a browser, or python publisher.py --url {address}")


def link(host: str, port: int) -> str:
    """An address that is listened on, as a link that works on this machine."""
    if ipaddress.ip_address(host).is_unspecified or host == "127.0.0.1":
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def main() -> None:
    """`python aggregator.py`."""
    settings = read_settings(sys.argv[1:], os.environ)
    try:
        prepare_process(settings)
        status = asyncio.run(serve(settings))
    except (StoreError, Unavailable) as why:
        sys.exit(f"aggregator: {why}")
    except Refused as why:
        sys.exit(f"aggregator: {why.detail}")
    except RuntimeError as why:
        if "thread" not in str(why):
            raise
        sys.exit(f"aggregator: {why}; see ulimit -u, or the container's limit of processes")
    except (OSError, UnicodeError) as why:
        address = f"{settings.host}:{settings.port}"
        sys.exit(f"aggregator: cannot listen on {address}: {listen_error(why, settings.port)}")
    sys.exit(status)


def listen_error(why: OSError | UnicodeError, port: int) -> str:
    """Why nobody can listen on the port, and what to do."""
    if isinstance(why, UnicodeError):
        return "this is not the name of a host; try --host 127.0.0.1"
    if isinstance(why, socket.gaierror) or why.errno is None:
        return f"{why.strerror or why}; try --host 127.0.0.1"
    reason = os.strerror(why.errno)  # without the address, which asyncio adds
    if why.errno == errno.EADDRINUSE:
        return f"{reason}; try --port {port % 65_535 + 1}"
    if why.errno in (errno.EACCES, errno.EPERM):
        return f"{reason}; try --port 8080, as low ports need more rights"
    return f"{reason}; try --host 127.0.0.1"


if __name__ == "__main__":
    main()
