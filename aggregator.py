"""An event aggregator: it keeps each event exactly once and loses none that it acknowledged.

Publishers on an unreliable network send an event again until somebody says that it arrived
(at-least-once delivery). So the same event comes many times, even at once, even after a crash. A
consumer has to make that harmless: it must be idempotent. This is one, in the order of the flow:

    POST /publish - room? - asyncio.Queue - the consumer takes all that waits, parses, validates
      202 - the counts of this request - future - COMMIT, fsync - one transaction, writer's thread
    GET /events, /stats - reader's thread with a read-only connection - pages, streamed

Four rules hold everywhere, and the rest follows from them:

    1. 202 means on disk. A request's future is resolved after COMMIT with synchronous=FULL.
    2. One writer. Only its thread changes the database, events and counters in one transaction.
    3. The database decides what is a duplicate: a UNIQUE constraint with ON CONFLICT DO NOTHING.
       Nobody asks first and inserts then, and no cache stands in front.
    4. A request stands or falls alone: all of it is stored or nothing, and no neighbour in the
       same group commit suffers for it.
"""

import argparse, asyncio, ctypes, hmac, json, logging, os, re, resource, signal, sqlite3, sys
import time, zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import compress, islice
from operator import add, itemgetter, not_
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from aiohttp import StreamReader, helpers, web

log = logging.getLogger("aggregator")


# --- Settings --------------------------------------------------------------------------------
# The constants are not settings: each has one right value for this design, its reason beside it.


class Settings(NamedTuple):
    """What can be set from outside: --port or PORT, --db or DB_PATH, and so on."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free one; the log says which
    db: str = "data/dedup.db"
    log_level: str = "INFO"
    max_body_bytes: int = 4 << 20
    max_in_flight_bytes: int = 6 << 20  # a body costs several times its size on its way through
    api_token: str = ""  # empty: everybody may do everything


VERSION = "1.0.0"
MAX_NAME_CHARACTERS = 512  # of a topic, an event_id, a source: they are keys, and keys are short
MAX_INTEGER = 2**63 - 1  # SQLite's
MAX_GROUP_BYTES = 1 << 19  # in a commit: more make it longer, but hardly cheaper
BUSY_SECONDS = 2.0  # to wait for another process's lock before a group is refused
PAGE_EVENTS = 500  # read at a time, which takes about 2 ms
PAGE_BYTES = 1 << 18  # of payloads read at a time (as characters), or one payload if larger
FEED_PAGE_SECONDS = 0.002  # for each page of all live feeds together: publishing comes first
HEARTBEAT_SECONDS = 15.0  # of silence on a live feed: proxies hang up after 30 or 60
BODY_SECONDS = 30.0  # for a body to arrive
SLOW_SECONDS = 1.0  # after which a body on its way must yield where room is short
SHUTDOWN_SECONDS = 1.0  # for answers under way; aiohttp waits it twice, docker stop gives 10 s
OPEN_FILES = 10_000  # a connection is an open file, and the usual limit is 1,024


# --- Validation ------------------------------------------------------------------------------
# `take` is the only judge, and quick: good events must not pay for the bookkeeping of bad ones. If
# it says no, `explain` asks it again, field by field, and finds the words. What is stored is not
# the client's text but what Python understood of it: SQLite does not read all JSON alike.


class Refused(Exception):
    """A request that is answered with an error; made from status, detail and perhaps headers."""


def refuse_constant(name: str) -> None:
    """What json calls for three words that it knows and JSON does not."""
    raise ValueError("NaN and Infinity are not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# Controls could forge a line of the log, and so could the two separators that Unicode adds.
NAME = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,%d}" % MAX_NAME_CHARACTERS)
# datetime.fromisoformat alone also takes week dates, dates without a time, and a trailing NUL.
TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[T ](?:[01][0-9]|2[0-3]):[0-5][0-9]"
    r"(?::[0-5][0-9](?:[.,][0-9]+)?)?(?:Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?"
)
GOOD = dict(topic="t", event_id="1", timestamp="2025-10-24 10:30", source="s", payload={})
# ",[topic, event_id, timestamp, source, payload]" of each event, in JSON; topics; event_ids.
Rows = tuple[bytes, list[str], list[str]]


def validate(bodies: Sequence[bytes]) -> tuple[list[int], bytes, list[str], list[str]]:
    """How many events each body has, and the Rows of them all; raises Refused (422)."""
    events, counts = [], []
    try:
        for body in bodies:
            if not body:
                raise Refused(422, [entry(["body"], "missing", "Field required")])
            found, loc = DECODER.decode(body.decode()), ["body"]
            if type(found) is dict and "events" in found and "event_id" not in found:
                found, loc = found["events"], ["body", "events"]
            elif type(found) is not list:
                found, loc = [found], []  # the body is itself the event
            if type(found) is not list:
                raise Refused(422, [entry(loc, "list_type", "Input should be a valid list")])
            if not found:
                why = "List should have at least 1 item after validation, not 0"
                ctx = {"field_type": "List", "min_length": 1, "actual_length": 0}
                raise Refused(422, [entry(loc, "too_short", why, ctx)])
            events += found
            counts.append(len(found))
        if rows := take(events):
            return counts, *rows
        errors = [*islice(explain(events, loc), 100 if len(bodies) == 1 else 0)]  # or taken apart
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", getattr(error, "reason", str(error).partition(":")[0]))
        where = [getattr(error, name) for name in ("pos", "start") if hasattr(error, name)]
        errors = [entry(["body", *where], "json_invalid", "JSON decode error", {"error": why})]
    raise Refused(422, errors)


def take(events: list[Any]) -> Rows | None:
    """The events as Rows, or None if anything is wrong with any of them."""
    rows, name, moment = [], NAME.fullmatch, TIMESTAMP.fullmatch
    try:
        for topic, event_id, timestamp, source, payload in map(itemgetter(*GOOD), events):
            topic, event_id, source = topic.strip(), event_id.strip(), source.strip()
            if not (name(topic) and name(event_id) and name(source) and type(payload) is dict):
                return None
            date.fromisoformat(moment(timestamp)[1])
            rows.append((topic, event_id, timestamp, source, payload))
        text = "," + ENCODER.encode(rows)[1:-1]
        return text.encode(), [row[0] for row in rows], [row[1] for row in rows]
    except (KeyError, TypeError, AttributeError, ValueError):
        return None  # something is missing, of another type, or has no place in a calendar or JSON


def explain(events: list[Any], loc: list[Any]) -> Iterator[dict[str, Any]]:
    """All that is wrong with the events, in order."""
    for index, event in enumerate(events):
        here = [*loc, index] if loc else ["body"]
        if type(event) is not dict:
            why = "Input should be a valid dictionary or object to extract fields from"
            yield entry(here, "model_attributes_type", why)
        elif not take([event]):
            for field in GOOD:
                if field not in event:
                    yield entry([*here, field], "missing", "Field required")
                elif not take([GOOD | {field: event[field]}]):
                    yield entry([*here, field], *fault(field, event[field]))


def fault(field: str, value: Any) -> tuple[Any, ...]:
    """What is wrong with a field that `take` does not take: type, msg and perhaps ctx."""
    kind = {"timestamp": "datetime", "payload": "dict"}.get(field, "string")
    if type(value) is not type(GOOD[field]):
        return f"{kind}_type", f"Input should be a valid {kind}".replace("dict", "dictionary")
    if field == "timestamp":
        return "datetime_parsing", "Input should be a valid datetime, such as 2025-10-24T10:30:00Z"
    if field == "payload":
        text = json.dumps(value, ensure_ascii=False)
    elif not value:
        return "string_too_short", "String should have at least 1 character", {"min_length": 1}
    elif not (text := value.strip()):
        return "value_error", "Value error, Field cannot be empty or whitespace only"
    elif len(text) > MAX_NAME_CHARACTERS:
        return "string_too_long", "String should have at most 512 characters", {"max_length": 512}
    elif not NAME.fullmatch(text):
        return "value_error", "Value error, Field cannot contain control characters or line breaks"
    if re.search("[\ud800-\udfff]", text):
        why = "Input should be a valid string, unable to parse raw data as a unicode string"
        return "string_unicode", why
    return "finite_number", "Input should be a finite number"  # Python reads 1e400 as infinity


def entry(loc: list[Any], kind: str, msg: str, ctx: Any = None) -> dict[str, Any]:
    """An entry of a 422's detail, in pydantic's vocabulary, which clients of FastAPI know."""
    return {"type": kind, "loc": loc, "msg": msg, **({"ctx": ctx} if ctx else {})}


# --- Store -----------------------------------------------------------------------------------
# A group goes in with one statement, as one JSON text: sqlite3 lets go of Python's global lock at
# every step, and has to win it back from a busy event loop. `executemany` was measured at 1 ms a
# row, this at 13 microseconds (the convoy effect). For the same reason a query returns one row.

SCHEMA = """
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS topics (  -- with the counters, so /stats costs always the same
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
        received   INTEGER NOT NULL,           -- acknowledged events, duplicates included
        duplicates INTEGER NOT NULL DEFAULT 0  -- those that were dropped
    );
    CREATE TABLE IF NOT EXISTS events (  -- rows are only ever added
        seq INTEGER PRIMARY KEY,     -- the order of the commits: with gaps, none given twice
        topic_id INTEGER NOT NULL REFERENCES topics (id), event_id TEXT NOT NULL,
        timestamp TEXT NOT NULL, source TEXT NOT NULL, payload TEXT NOT NULL,
        UNIQUE (topic_id, event_id)  -- what random ids pay for; with names, a fifth larger
    );
    CREATE INDEX IF NOT EXISTS events_of_topic ON events (topic_id);  -- its entries end in the seq
    PRAGMA user_version = 1;
    COMMIT;
"""
# For each connection. SQLite copies a page before a statement changes it, to undo half of one.
PRAGMAS = """
    PRAGMA synchronous = FULL;          -- COMMIT waits until the log is on the disk
    PRAGMA fullfsync = ON;              -- macOS: on the disk, and not in its cache
    PRAGMA temp_store = MEMORY;         -- for those copies: in a file they were half of all writes
    PRAGMA cache_size = -16384;         -- KiB: the busy part of the index
    PRAGMA wal_autocheckpoint = 32000;  -- pages, 128 MB: what many groups changed is moved once
"""
# One INSERT into a view is one transaction: what its trigger does is done whole or not at all. The
# conflict target is named, or a clash of seq would pass for a duplicate. + avoids a slow index.
GROUP_COMMIT = """
    CREATE TEMP TABLE outcome AS SELECT 0 AS first, '[]' AS positions;
    CREATE TEMP VIEW arrivals AS SELECT NULL AS rows, NULL AS topics;
    CREATE TEMP TRIGGER group_commit INSTEAD OF INSERT ON arrivals BEGIN
        INSERT INTO topics (name, received, duplicates)  -- duplicates until they are stored
        SELECT key, value, value FROM json_each(NEW.topics) WHERE true
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
    SELECT ifnull(sum(received), 0), ifnull(sum(received - duplicates), 0),
           ifnull(sum(duplicates), 0), json_group_array(name)
    FROM (SELECT * FROM topics ORDER BY name)
"""
# How many events, the seq of the last, and their text. The recursion steps from event to event
# until the page has many small payloads or few large ones; a mere LIMIT could hold 500 of 4 MB.
PAGE = f"""
    WITH RECURSIVE page (number, seq, size, item) AS (
        SELECT 0, :after, 0, NULL UNION ALL
        SELECT number + 1, events.seq, size + length(payload), {{item}}
        FROM page JOIN events
          ON events.seq = (SELECT min(seq) FROM events WHERE {{topic}} seq > page.seq)
        WHERE number < :limit AND size < {PAGE_BYTES} AND events.seq <= :upto
    )
    SELECT max(number), max(seq), CAST(group_concat(item, '') AS BLOB) FROM page
"""
ONE_TOPIC = "topic_id = (SELECT id FROM topics WHERE name = :topic) AND"
# The payload is JSON already. To have SQLite read it again would cost memory, and time.
EVENT = """'{"topic":' || json_quote((SELECT name FROM topics WHERE id = topic_id))
    || ',"event_id":' || json_quote(event_id) || ',"timestamp":' || json_quote(timestamp)
    || ',"source":' || json_quote(source) || ',"payload":' || payload || '}'"""
FEED, LINES, ARRAY = "text/event-stream", "application/x-ndjson", "application/json"
FORMS = {  # the representations of GET /events, and an event in each
    FEED: f"'id: ' || events.seq || char(10) || 'data: ' || {EVENT} || char(10, 10)",
    LINES: f"{EVENT} || char(10)",
    ARRAY: f"',' || {EVENT}",
}


class Store:
    """The SQLite file, by two connections with a thread each: one writes, the other reads."""

    def __init__(self, path: str) -> None:
        """Opens the file, or makes it; raises OSError."""
        options = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False}
        self.writer, self._reader = ThreadPoolExecutor(1, "writer"), ThreadPoolExecutor(1, "reader")
        try:
            if sqlite3.sqlite_version_info < (3, 38):
                raise OSError(f"SQLite {sqlite3.sqlite_version} is older than 3.38")
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._write, self._read = (sqlite3.connect(path, **options) for _ in range(2))
            (tables,) = self._write.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            (version,) = self._write.execute("PRAGMA user_version").fetchone()
            if version != 1 and (version or tables):
                raise OSError("it belongs to a newer version of this service, or another program")
            if self._write.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise OSError("a write-ahead log cannot be kept there")
            self._write.executescript(PRAGMAS + SCHEMA + GROUP_COMMIT)  # it can be written, then
            self._read.executescript(PRAGMAS + "PRAGMA query_only = ON")
        except (OSError, sqlite3.Error) as why:
            raise OSError(f"cannot use the database {path}: {why}") from why

    def commit(self, text: bytes, topics: list[str]) -> tuple[bytearray, float]:
        """Stores a group, the first two of its Rows; then it is on disk, or raises sqlite3.Error.

        Returns a flag for each event (1 new, 0 a duplicate) and the seconds that it took.
        """
        started, is_new = time.perf_counter(), bytearray(len(topics))
        self._write.execute(COMMIT_GROUP, [b"[%b]" % text[1:], json.dumps(Counter(topics))])
        for position in json.loads(self._write.execute(NEW_POSITIONS).fetchone()[0]):
            is_new[position] = 1
        return is_new, time.perf_counter() - started

    async def read(self, query: str, **values: Any) -> tuple[Any, ...]:
        """The only row of a query, from the reader's thread."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._reader, lambda: self._read.execute(query, values).fetchone())

    def close(self) -> None:
        """Closes the file; the last connection to go moves the log into it and removes the log."""
        for thread, connection in (self._reader, self._read), (self.writer, self._write):
            thread.shutdown()
            connection.close()


# --- Group commit ----------------------------------------------------------------------------
# An fsync takes a disk a third of a millisecond to ten; one for each request would be the end of
# all speed. So the writer commits all that is ready as one group, while the consumer makes ready
# what arrives meanwhile. Groups grow with the load by themselves: there is no timer, and a lone
# request waits for nobody. PostgreSQL, MySQL and Kafka's brokers do the same.

AGAIN = {"Retry-After": "1"}  # with 503: nothing is stored, and to send the same again is safe
Request = tuple[bytes, asyncio.Future[bytearray]]  # a body; for each event, whether it was new


class GroupCommit:
    """Commits the requests of its queue in groups."""

    def __init__(self, store: Store) -> None:
        self._store, self.stopping = store, False
        self.queue: asyncio.Queue[Request] = asyncio.Queue()
        self.ready: deque[tuple[Any, ...]] = deque()  # some requests, and what validate returned
        self.news: Any = WeakValueDictionary()  # by topic (None: any), the future of a new event
        self.failure: str | None = None  # why the last commit failed, None if it did not
        self.seconds: Counter[float] = Counter()  # that commits took - how many commits
        self.events: Counter[int] = Counter()  # in a group - how many groups

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Runs the consumer; at the end, until the last request is committed."""
        self._loop, consumer = asyncio.get_running_loop(), asyncio.create_task(self._consume())
        yield
        await self.queue.join()
        consumer.cancel()
        self._store.close()

    async def _consume(self) -> None:
        """The consumer: makes ready all that waits, and wakes the writer, for ever."""
        while True:
            group, size = [await self.queue.get()], 0
            while not self.queue.empty() and (size := size + len(group[-1][0])) < MAX_GROUP_BYTES:
                group.append(self.queue.get_nowait())
            try:
                self.ready.append((group, *validate([body for body, _ in group])))
                self._loop.run_in_executor(self._store.writer, self._write)
            except Exception:  # to be found out by the writer: which of them are bad
                self._loop.run_in_executor(self._store.writer, self._commit, group)

    def _write(self) -> None:
        """The writer, in its thread: commits all that is ready by now."""
        while self.ready:
            group = self.ready.popleft()
            while self.ready and len(group[2]) < MAX_GROUP_BYTES:
                group = (*map(add, group, self.ready.popleft()),)
            self._commit(*group)

    def _commit(self, group: list[Request], *valid: Any) -> None:
        """Stores a group, and has the event loop answer it; halves a bad one, to the culprits."""
        try:
            if self.stopping and self.failure:  # the disk had its chance, and time is short
                raise sqlite3.OperationalError(self.failure)
            counts, *rows = valid or validate([body for body, _ in group])
            outcome = self._store.commit(*rows[:2])
        except Exception as why:
            if len(group) > 1 and (isinstance(why, Refused) or str(why) == "malformed JSON"):
                self._commit(group[: len(group) // 2])
                self._commit(group[len(group) // 2 :])
            else:
                self._loop.call_soon_threadsafe(self._refuse, group, why)
        else:
            self._loop.call_soon_threadsafe(self._answer, group, counts, rows, *outcome)

    def _answer(self, group: list[Request], counts: list[int], rows: Rows, *outcome: Any) -> None:
        """Tells each request which of its events are new; then the metrics, live feeds, log."""
        end, (is_new, took) = 0, outcome
        for (_, future), count in zip(group, counts):
            self.queue.task_done()
            if not future.done():  # done: nobody waits; its events are stored all the same
                future.set_result(is_new[end : end + count])
            end += count
        if self.failure:
            log.warning("Commits work again")
        self.failure = None
        self.seconds[round(took, 5)] += 1
        self.events[len(is_new)] += 1
        for topic in {None, *compress(rows[1], is_new)} if self.news and any(is_new) else ():
            if news := self.news.pop(topic, None):
                news.set_result(None)
        lines = [f" event: topic={topic}, event_id={id}" for topic, id in zip(*rows[1:])]
        if new := "\nProcessed new".join(compress(lines, is_new)):
            log.info("Processed new%s", new)  # one record of many lines, as each costs 6 µs
        if duplicates := "\nDropped duplicate".join(compress(lines, map(not_, is_new))):
            log.warning("Dropped duplicate%s", duplicates)

    def _refuse(self, group: list[Request], why: Exception) -> None:
        """Tells each request why it is not stored; and the log, once, if it is for the disk."""
        if str(why) == "malformed JSON":  # SQLite's parser gives up earlier than Python's may
            ctx = {"error": "nested too deeply"}
            why = Refused(422, [entry(["body"], "json_invalid", "JSON decode error", ctx)])
        elif not isinstance(why, Refused):
            # SQLite's messages name no paths. Those of other errors might, and stay in the log.
            reason = str(why) if isinstance(why, sqlite3.Error) else type(why).__name__
            if reason != self.failure:
                log.error("Commits fail: %s", why, exc_info=None if reason == str(why) else why)
            self.failure = reason
            why = Refused(503, f"The database cannot be written: {reason}", AGAIN)
        for _, future in group:
            self.queue.task_done()
            if not future.done():
                future.set_exception(Refused(*why.args))  # without a traceback, which holds bodies


# --- HTTP ------------------------------------------------------------------------------------
# Memory is bounded by bytes in flight: a body counts from before it is read until it is committed,
# and is refused where there is no room. aiohttp's own reading takes a truncated gzip for whole.

WINDOW_BITS = {"identity": 0, "gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's codes
DASHBOARD = os.path.join(os.path.dirname(__file__), "dashboard.html")
RECEIPT = (
    "HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    "Connection: %s\r\nDate: %s\r\n\r\n%s"
)


class Sent(NamedTuple):
    """All that aiohttp asks of a response, for one that is on its way already."""

    keep_alive: bool

    async def prepare(self, request: Any = None) -> None:
        """Nothing is left to do."""

    write_eof = prepare


class Api:
    """The handlers, with what they share."""

    def __init__(self, settings: Settings, store: Store, commits: GroupCommit) -> None:
        self._settings, self._store, self._commits = settings, store, commits
        self._bearer = settings.api_token and f"bearer {settings.api_token}".encode()
        self._started, self._in_flight_bytes = time.time(), 0
        self._arriving: dict[StreamReader, float] = {}  # bodies on their way, since when
        self._refusals: Counter[int] = Counter()  # by status, for GET /metrics
        self._feeds = self._idle = 0  # live feeds, and those that wait for news
        self._pages: dict[Any, asyncio.Future[Any]] = {}  # that are being read, by their place

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Lets in who may come in, and answers every error as {"detail": …}."""
        try:
            if self._bearer and (request.path != "/" or request.method not in ("GET", "HEAD")):
                scheme, _, token = request.headers.get("Authorization", "").partition(" ")
                given = f"{scheme.lower()} {token.strip()}".encode(errors="surrogateescape")
                if not hmac.compare_digest(given, self._bearer):  # the time it takes tells nothing
                    raise Refused(401, "Missing or wrong API token", {"WWW-Authenticate": "Bearer"})
            return await handler(request)
        except Refused as why:
            status, detail, *headers = why.with_traceback(None).args  # its frames hold a body
        except web.HTTPException as why:  # 404 and 405
            status, detail = why.status, why.reason
            headers = [{"Allow": why.headers["Allow"]}] if "Allow" in why.headers else []
        except sqlite3.Error as why:
            status, detail, *headers = 503, f"The database cannot be read: {why}", AGAIN
        except ConnectionError as why:  # the client has gone
            raise why.with_traceback(None)  # its frames hold a page
        except Exception:
            log.exception("A fault of this program")
            status, detail, *headers = 500, "Internal Server Error"
        if request.writer.output_size:  # the answer has begun: break it off rather than mend it
            raise ConnectionError
        self._refusals[status] += 1
        return web.json_response({"detail": detail}, status=status, headers=dict(*headers))

    async def publish(self, request: web.Request) -> Sent:
        """POST /publish: answers when the events of the request are on disk."""
        headers, most, commits = request.headers, self._settings.max_body_bytes, self._commits
        media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        bits = WINDOW_BITS.get((headers.get("Content-Encoding") or "identity").strip().lower())
        if media_type != "application/json" and (media_type or "Origin" in headers) or bits is None:
            raise Refused(415, "Send application/json", {"Accept-Encoding": "gzip, deflate"})
        size = most if (length := request.content_length) is None else length
        if size > most:
            raise Refused(413, f"The body is larger than {most} bytes")
        if commits.stopping:
            raise Refused(503, "The service is stopping", AGAIN)
        if self._in_flight_bytes + size > self._settings.max_in_flight_bytes:
            self._hurry(SLOW_SECONDS)  # who sends half a body and falls silent keeps nobody out
            raise Refused(503, "Too many bytes in flight", AGAIN)
        self._in_flight_bytes += size
        try:
            body = await self._read_body(request.content, bits)
            if len(body) > most:
                raise Refused(413, f"The body is larger than {most} bytes")
            if self._in_flight_bytes + len(body) - size > self._settings.max_in_flight_bytes:
                raise Refused(503, "Too many bytes in flight", AGAIN)  # now that it is unpacked
            self._in_flight_bytes += len(body) - size
            size, future = len(body), asyncio.get_running_loop().create_future()
            commits.queue.put_nowait((body, future))
            received, unique = len(is_new := await future), sum(is_new)
        finally:
            self._in_flight_bytes -= size
        text = f'{{"received": {received}, "unique_processed": {unique}, "duplicate_dropped": '
        text += f'{received - unique}, "message": "Received {received} event(s) for processing"}}'
        connection = "keep-alive" if request.keep_alive else "close"
        message = RECEIPT % (len(text), connection, helpers.rfc822_formatted_time(), text)
        await request.writer.write_eof(message.encode())  # a web.Response costs a sixth more
        return Sent(request.keep_alive)

    async def _read_body(self, content: StreamReader, bits: int) -> bytes:
        """The unpacked body, or the beginning of one too large; raises Refused (400, 408, 503)."""
        loop, most = asyncio.get_running_loop(), self._settings.max_body_bytes
        if content.is_eof():  # it came together with the headers
            body = content.read_nowait()
        else:
            body, late = bytearray(), Refused(408, "The body took too long")
            timer = loop.call_later(BODY_SECONDS, content.set_exception, late)
            self._arriving[content] = loop.time()
            try:
                while len(body) <= most and (chunk := await content.readany()):
                    body += chunk
            except (web.RequestPayloadError, ConnectionError):
                raise Refused(400, "The body breaks off") from None
            finally:
                timer.cancel()
                del self._arriving[content], late
        if not bits or len(body) > most:
            return bytes(body)
        inflate = zlib.decompressobj(bits)
        try:
            plain = inflate.decompress(body, most + 1)  # no more of a bomb
        except zlib.error:
            raise Refused(400, "The compressed body is broken") from None
        if len(plain) <= most and (not inflate.eof or inflate.unused_data):
            raise Refused(400, "The compressed body breaks off, or something follows it")
        return plain

    def _hurry(self, seconds: float) -> None:
        """Refuses the bodies that have been arriving for longer than that."""
        for content, since in self._arriving.items():
            if since <= asyncio.get_running_loop().time() - seconds:
                content.set_exception(Refused(503, "Too busy for a body this slow", AGAIN))

    async def stop(self, app: web.Application) -> None:
        """Refuses what comes from now on; what waits is stored, and has 2 s to be answered."""
        self._commits.stopping = True
        self._hurry(0)
        for topic in [*self._commits.news]:
            if news := self._commits.news.pop(topic, None):
                news.set_result(None)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /events: a snapshot; or a live feed, which goes on at its end. Rows are only added:
        "up to now" is a snapshot without a transaction, and a subscriber a place, not a buffer.
        """
        query, accept, pages = request.query, request.headers.get("Accept", ""), self._pages
        form = next((form for form in FORMS if form in accept), ARRAY)
        (upto,), loop = await self._store.read(LAST_SEQ), asyncio.get_running_loop()
        topic, limit = query.get("topic") or None, integer(query, "limit", 1, MAX_INTEGER)
        after = upto if query.get("after") == "latest" else integer(query, "after", 0, 0)
        if is_feed := form == FEED:
            after, upto = integer(request.headers, "Last-Event-ID", 0, after), MAX_INTEGER
        headers = {"Content-Type": form, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if is_feed:
            await response.write(b"retry: 1000\n\n")
        elif form == ARRAY:
            await response.write(b'{"topic": %b, "events": [' % json.dumps(topic).encode())
        page = PAGE.format(topic=ONE_TOPIC if topic else "", item=FORMS[form])
        self._feeds, total = self._feeds + is_feed, 0
        try:
            while total < limit and not (is_feed and self._commits.stopping):
                news = self._commits.news.setdefault(topic, loop.create_future())  # before reading
                place = page, news, after, upto, min(limit - total, PAGE_EVENTS)
                if place not in pages:  # or else somebody reads it just now
                    values = {"topic": topic, "after": after, "upto": upto, "limit": place[-1]}
                    pages[place] = asyncio.ensure_future(self._store.read(page, **values))
                    pages[place].add_done_callback(lambda _, place=place: pages.pop(place))
                number, after, text = await pages[place]
                if number:
                    await response.write(text if form != ARRAY or total else text[1:])
                    total += number
                    await asyncio.sleep(is_feed * FEED_PAGE_SECONDS * (self._feeds - self._idle))
                elif not is_feed:
                    break
                else:
                    self._idle += 1
                    told, _ = await asyncio.wait([news], timeout=HEARTBEAT_SECONDS)
                    self._idle -= 1
                    if not told:
                        await response.write(b": nothing new\n\n")
        finally:
            self._feeds -= is_feed
        if form == ARRAY:
            await response.write(b'], "count": %d, "last_seq": %d}' % (total, after))
        return response

    async def stats(self, request: web.Request) -> web.Response:
        """GET /stats: the counters, which live in the database and outlive the process."""
        *counts, topics = await self._store.read(TOTALS)
        stats = dict(zip(("received", "unique_processed", "duplicate_dropped"), counts))
        uptime = round(time.time() - self._started, 2)
        return web.json_response(stats | {"topics": json.loads(topics), "uptime_seconds": uptime})

    async def health(self, request: web.Request) -> web.StreamResponse:
        """GET /: whether events can be stored, as the last commit tells; for browsers, a page."""
        if "text/html" in request.headers.get("Accept", ""):
            headers = {"X-Frame-Options": "DENY", "Cache-Control": "no-cache", "Vary": "Accept"}
            return web.FileResponse(DASHBOARD, headers=headers)
        service = {"service": "Event Aggregator", "status": "running", "version": VERSION}
        if reason := self._commits.failure:
            service |= {"status": "failing", "reason": reason}
        return web.json_response(service, status=503 if reason else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus's text format 0.0.4."""
        received, unique, duplicate, _ = await self._store.read(TOTALS)
        outcomes = {'{outcome="unique"}': unique, '{outcome="duplicate"}': duplicate}
        refusals = {f'{{status="{code}"}}': n for code, n in sorted(self._refusals.items())}
        commits, db = self._commits, self._settings.db
        size = sum(map(os.path.getsize, filter(os.path.exists, (db, db + "-wal"))))
        times = histogram(commits.seconds, "0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1")
        sizes = histogram(commits.events, "1 2 5 10 20 50 100 200 500 1000 2000 5000")
        queued = commits.queue.qsize() + sum(len(group[0]) for group in [*commits.ready])
        text, build = "", f'{{version="{VERSION}",sqlite="{sqlite3.sqlite_version}"}}'
        for name, kind, what, value in (
            ("aggregator_events_received_total", "counter", "Events acknowledged.", received),
            ("aggregator_events_processed_total", "counter", "The same, by outcome.", outcomes),
            ("aggregator_requests_refused_total", "counter", "Refusals, by status.", refusals),
            ("aggregator_in_flight_bytes", "gauge", "Bodies held.", self._in_flight_bytes),
            ("aggregator_requests_queued", "gauge", "Requests that wait.", queued),
            ("aggregator_group_commit_seconds", "histogram", "Time of a commit.", times),
            ("aggregator_group_commit_events", "histogram", "Events in a commit.", sizes),
            ("aggregator_live_subscribers", "gauge", "Live feeds.", self._feeds),
            ("aggregator_database_bytes", "gauge", "Size of the database and its log.", size),
            ("aggregator_build_info", "gauge", "Versions, as labels.", {build: 1}),
            ("process_start_time_seconds", "gauge", "Start, Unix time.", self._started),
        ):
            text += f"# HELP {name} {what}\n# TYPE {name} {kind}\n"
            for suffix, number in (value if isinstance(value, dict) else {"": value}).items():
                text += f"{name}{suffix} {number}\n"
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(text=text, headers=headers)


def histogram(counts: Counter[float], bounds: str) -> dict[str, float]:
    """The samples of a Prometheus histogram, by what follows the metric's name."""
    samples = {}
    for bound in (*bounds.split(), "+Inf"):
        samples[f'_bucket{{le="{bound}"}}'] = sum(n for v, n in counts.items() if v <= float(bound))
    return samples | {"_sum": sum(v * n for v, n in counts.items()), "_count": counts.total()}


def integer(source: Mapping[str, str], name: str, least: int, default: int) -> int:
    """A query parameter, or a header; raises Refused (422)."""
    try:
        if (value := int(source.get(name, default))) >= least:
            return min(value, MAX_INTEGER)
        why = f"Input should be greater than or equal to {least}"
        fault = "greater_than_equal", why, {"ge": least}
    except ValueError:
        why = "Input should be a valid integer, unable to parse string as an integer"
        fault = "int_parsing", why
    raise Refused(422, [entry(["header" if name == "Last-Event-ID" else "query", name], *fault)])


# --- Application -----------------------------------------------------------------------------


def create_app(settings: Settings) -> web.Application:
    """The service as an aiohttp application; raises OSError."""
    commits = GroupCommit(store := Store(settings.db))
    api = Api(settings, store, commits)
    handler_args = {"auto_decompress": False, "keepalive_timeout": 30.0}  # s, to begin a request
    app = web.Application(middlewares=[api.answer_errors], handler_args=handler_args)
    app.router.add_post("/publish", api.publish)
    for handler in api.events, api.stats, api.metrics:
        app.router.add_get(f"/{handler.__name__}", handler)
    app.router.add_get("/", api.health)
    app.cleanup_ctx.append(commits.run)
    app.on_shutdown.append(api.stop)  # before aiohttp waits for the handlers
    return app


# --- Command line ----------------------------------------------------------------------------


class LinesFormatter(logging.Formatter):
    """Gives each line of a record its own time and level, so none can pass for another record."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} - {record.name} - {record.levelname} - "
        return head + super().format(record).replace("\n", "\n" + head)


def main() -> None:
    """Serves until SIGTERM or SIGINT; exits with a line on stderr if it cannot."""
    parser = argparse.ArgumentParser("aggregator.py", argparse.SUPPRESS, __doc__.split("\n")[0])
    for name, default in Settings._field_defaults.items():
        flag, variable = "--" + name.replace("_", "-"), "DB_PATH" if name == "db" else name.upper()
        hint = f"or {variable} in the environment (default: {default or 'none'})"
        value = os.environ.get(variable) or default
        parser.add_argument(flag, type=type(default), default=value, help=hint)
    settings = Settings(**vars(parser.parse_args()))
    if not 1 <= settings.max_body_bytes <= settings.max_in_flight_bytes <= MAX_INTEGER:
        parser.error("--max-body-bytes is 1 to --max-in-flight-bytes, so that one body fits")
    if not re.fullmatch("[!-~]*", settings.api_token):
        parser.error("--api-token is printable ASCII without spaces: a header has to carry it")
    logging.raiseExceptions = False  # a full disk below the log must not end the service
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # it logs what is not HTTP
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: give large blocks back when freed
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, 1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < min(OPEN_FILES, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))
    sys.setswitchinterval(0.0001)  # seconds until the event loop yields to the writer, not 0.005

    async def leave(app: web.Application) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one ends it at once
            signal.signal(number, lambda number, frame: os._exit(128 + number))

    options = {"backlog": 1024, "access_log": None, "shutdown_timeout": SHUTDOWN_SECONDS}
    try:
        logging.basicConfig(level=settings.log_level)
        logging.root.handlers[0].setFormatter(LinesFormatter("%(message)s"))
        app = create_app(settings)
        app.on_shutdown.append(leave)
        web.run_app(app, host=settings.host, port=settings.port, print=log.info, **options)
    except (OSError, OverflowError, ValueError) as why:
        sys.exit(f"aggregator: cannot serve on {settings.host}:{settings.port}: {why}")


if __name__ == "__main__":
    main()
