"""The store's door on PostgreSQL: several aggregators, on several machines, keep one log of events.

`python aggregator.py --db postgresql://…` stores through this module and not into an SQLite file.
Behind the door everything is as before; these are the rules that are special here:

    1. The order of seq is the order of the commits. A sequence would be counted up before the
       commit: 11 could become visible before 10, and a reader that goes on after 11 never sees 10.
       So a group takes one advisory lock, then 1 + max(seq), and the commit lets the lock go. Of
       all processes one writes at a time.
    2. A group is one statement, one transaction, one round trip. The lock is never held while
       somebody waits for the network, whatever becomes of the process.
    3. The database decides what is a duplicate: a UNIQUE constraint, ON CONFLICT DO NOTHING.
    4. Events, counters and the news for other processes (NOTIFY) are one transaction.
    5. Nobody waits for ever. A statement has a time limit in the database. A watchdog here shuts
       the connection if no answer comes at all. After any error the connection is dropped, and
       the next call makes a new one; the names in the address are looked up anew.
       If the answer to a COMMIT is lost, the group counts as failed: the publisher sends it
       again, and if it was stored, the database finds duplicates.
    6. No host, user or password is in any error or log line. What libpq says names them, so its
       texts are never passed on: the reasons here are fixed texts, chosen by SQLSTATE.

Three connections, each for one thread: the writer, the reader and the listener. PostgreSQL never
parses an event's JSON; a group goes in as one text and a page comes out as one text.
"""

import contextlib
import math
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from aggregator import (
    ENCODER,
    FEED,
    JSON,
    LINE_BREAKS,
    LINES,
    PAGE_EVENTS,
    Batch,
    Outcome,
    Page,
    Row,
    Size,
    StoreError,
    TopicCounts,
    Totals,
    Unavailable,
    Unstorable,
)

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
    from psycopg.errors import Diagnostic
except ImportError:
    raise StoreError('PostgreSQL needs a driver: pip install "psycopg[binary]"') from None

# --- Settings --------------------------------------------------------------------------------

STATEMENT_SECONDS = 10  # for a statement in the database, the wait for the lock included
SILENCE_SECONDS = 12.0  # without any answer, after which the watchdog shuts a connection
STOPPING_SECONDS = 3.0  # the same when the process is to stop
LISTEN_SECONDS = 1.0  # to wait for news before asking whether the database is still there
WATCH_SECONDS = 0.5  # between two looks of the watchdog
MAX_SEQ = 2**63 - 1  # of a bigint
MAX_NOTIFY_BYTES = 7999  # PostgreSQL's limit for the text of a NOTIFY
LOCK = 5_036_271_845_402_113  # any number, the same in every process
SCHEMA_VERSION = 1
# For what the address does not say itself. A network that goes silent is noticed in ten seconds.
ADDRESS_DEFAULTS: dict[str, Any] = {
    "fallback_application_name": "event-aggregator",
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
# Each statement is a transaction. Nothing is prepared: a plan has to know the topic's size.
ADDRESS_RULES: dict[str, Any] = {
    "client_encoding": "UTF8",
    "autocommit": True,
    "prepare_threshold": None,
}

# --- SQL -------------------------------------------------------------------------------------
# In a name, "C" sorts by code point as Python does. A payload is a text, not jsonb: jsonb changes
# numbers and the order of keys, and refuses \u0000. There is no foreign key: it would cost as much
# as the rest of the insert, and only commit_group writes here.

VERSION = "SELECT version()"
SERVER_SETTINGS = "SELECT current_setting('server_encoding'), current_setting('synchronous_commit')"
COUNT_TABLES = """
    SELECT num_nonnulls(to_regclass('aggregator'), to_regclass('topics'), to_regclass('events'))
"""
TABLES_VERSION = "SELECT to_jsonb(aggregator) ->> 'schema_version' FROM aggregator LIMIT 1"
# Without parameters: one round trip and one transaction. Who comes second finds all made.
MAKE_TABLES = f"""
    SELECT pg_advisory_xact_lock({LOCK});
    CREATE TABLE IF NOT EXISTS aggregator (  -- one row: the totals
        schema_version integer PRIMARY KEY,
        received bigint NOT NULL,  -- acknowledged events, duplicates included
        stored bigint NOT NULL
    ) WITH (fillfactor = 50);
    CREATE TABLE IF NOT EXISTS topics (
        id bigint PRIMARY KEY,
        name text COLLATE "C" NOT NULL UNIQUE,
        received bigint NOT NULL DEFAULT 0,
        stored bigint NOT NULL DEFAULT 0
    ) WITH (fillfactor = 50);  -- room for new versions of a row in its own page
    CREATE TABLE IF NOT EXISTS events (  -- rows are only ever added
        seq bigint PRIMARY KEY,  -- the order of the commits: with gaps, none given twice
        topic_id bigint NOT NULL,
        event_id text COLLATE "C" NOT NULL,
        timestamp text NOT NULL,
        source text NOT NULL,
        payload text NOT NULL,
        UNIQUE (event_id, topic_id)
    );
    CREATE INDEX IF NOT EXISTS events_of_topic ON events (topic_id, seq);
    INSERT INTO aggregator VALUES ({SCHEMA_VERSION}, 0, 0) ON CONFLICT DO NOTHING;
"""
# synchronous_commit is left as it is: a cluster may have set it to more than "on".
SESSION = f"""
    SET statement_timeout = '{STATEMENT_SECONDS}s';
    SET default_transaction_isolation = 'read committed';
    SET jit = off;
"""
# The lock is a statement of its own: in one statement with max(seq), the maximum would be read
# from a snapshot that is older than the lock. Arguments: a line for each event, its fields with
# tabs between; a line for each topic, the number of its events, a tab, its name. Returns the
# positions of the new events. A temporary function belongs to its connection: nothing to migrate.
COMMIT_GROUP_FUNCTION = f"""
    CREATE OR REPLACE FUNCTION pg_temp.commit_group(event_lines text, topic_lines text)
    RETURNS integer[] LANGUAGE plpgsql AS $$
    DECLARE
        last_seq bigint;
        new_positions integer[];
        news text;
    BEGIN
        PERFORM pg_advisory_xact_lock({LOCK});
        last_seq := (SELECT coalesce(max(seq), 0) FROM events);

        INSERT INTO topics (id, name)
        SELECT (SELECT coalesce(max(id), 0) FROM topics) + row_number() OVER (), arrived.name
        FROM (SELECT split_part(line, E'\\t', 2) AS name
              FROM unnest(string_to_array(topic_lines, E'\\n')) AS line) AS arrived
        WHERE NOT EXISTS (SELECT FROM topics WHERE topics.name = arrived.name);

        WITH inserted AS (
            INSERT INTO events (seq, topic_id, event_id, timestamp, source, payload)
            SELECT last_seq + line.number, topics.id, field[2], field[3], field[4], field[5]
            FROM unnest(string_to_array(event_lines, E'\\n')) WITH ORDINALITY AS line (text, number)
            CROSS JOIN LATERAL string_to_array(line.text, E'\\t') AS field
            JOIN topics ON topics.name = field[1]
            ORDER BY line.number
            ON CONFLICT (topic_id, event_id) DO NOTHING  -- a clash of seq must not pass for it
            RETURNING seq, topic_id
        ), new_of_topic AS (
            SELECT topic_id, count(*) AS events FROM inserted GROUP BY topic_id
        ), counts AS (
            SELECT topics.id, split_part(line, E'\\t', 1)::bigint AS received,
                   coalesce(new_of_topic.events, 0) AS stored
            FROM unnest(string_to_array(topic_lines, E'\\n')) AS line
            JOIN topics ON topics.name = split_part(line, E'\\t', 2)
            LEFT JOIN new_of_topic ON new_of_topic.topic_id = topics.id
        ), counted AS (
            UPDATE topics
            SET received = topics.received + counts.received, stored = topics.stored + counts.stored
            FROM counts WHERE topics.id = counts.id
            RETURNING topics.name, counts.stored AS new_events
        ), totalled AS (  -- for an empty group too: a probe that writes nothing proves nothing
            UPDATE aggregator
            SET received = received + (SELECT coalesce(sum(counts.received), 0) FROM counts),
                stored = stored + (SELECT count(*) FROM inserted)
        )
        SELECT (SELECT array_agg(seq - last_seq - 1) FROM inserted),
               (SELECT string_agg(name, E'\\n') FROM counted WHERE new_events > 0)
        INTO new_positions, news;

        IF octet_length(news) > {MAX_NOTIFY_BYTES} THEN
            news := '';  -- wakes the subscribers of every topic
        END IF;
        PERFORM pg_notify('aggregator', news) WHERE news IS NOT NULL;
        RETURN coalesce(new_positions, '{{}}');
    END $$;
"""
COMMIT_GROUP = "SELECT pg_temp.commit_group(%s::text, %s::text)"
LISTEN = "LISTEN aggregator"
STILL_THERE = "SELECT 1"

LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM events"
FIND = """
    SELECT seq FROM events
    WHERE topic_id = (SELECT id FROM topics WHERE name = %s::text) AND event_id = %s::text
"""
TOPICS = """
    SELECT name, received, stored, received - stored FROM topics
    WHERE name > %s::text ORDER BY name LIMIT %s
"""
TOTALS = "SELECT received, stored, received - stored FROM aggregator"
SIZE = """
    SELECT sum(pg_total_relation_size(name))::bigint
    FROM unnest('{aggregator,topics,events}'::regclass[]) AS name
"""
# A page of a topic must be a range of the index events_of_topic, however rare the topic is. The
# row comparison sees to it: with topic_id = … the planner may look for the topic along the primary
# key, through the events of all others. And the UNIQUE index begins with event_id, or the planner
# may read a whole topic along that one, to sort it.
OF_ALL = {
    "range": "seq > %(after)s::bigint AND seq <= %(upto)s::bigint",
    "oldest_first": "seq",
    "newest_first": "seq DESC",
}
TOPIC_ID = "(SELECT id FROM topics WHERE name = %(topic)s::text)"
OF_TOPIC = {
    "range": f"(topic_id, seq) > ({TOPIC_ID}, %(after)s::bigint)"
    f" AND (topic_id, seq) <= ({TOPIC_ID}, %(upto)s::bigint)",
    "oldest_first": "topic_id, seq",
    "newest_first": "topic_id DESC, seq DESC",
}
# The running sum needs only the sizes of the chosen payloads, and PostgreSQL knows those without
# reading them. A large payload is read where `bytes_before` lets its event into the page.
PAGE = """
    SELECT count(*), coalesce(max(seq), %(after)s), convert_to(coalesce({text}, ''), 'UTF8')
    FROM (
        SELECT *, sum(size) OVER (ORDER BY seq ROWS UNBOUNDED PRECEDING) - size AS bytes_before
        FROM (
            SELECT chosen.*, name AS topic,
                   octet_length(name) + octet_length(event_id) + octet_length(source)
                   + octet_length(payload) + 100 AS size  -- 100: timestamp and punctuation
            FROM (
                SELECT * FROM events WHERE {range} ORDER BY {oldest_first} LIMIT %(limit)s
            ) AS chosen JOIN topics ON topics.id = topic_id
        ) AS measured
    ) AS summed
    WHERE bytes_before < %(most_bytes)s
"""
# The payload is JSON already. The other fields become JSON strings.
EVENT = """'{"topic":', to_json(topic), ',"event_id":', to_json(event_id), ',"timestamp":',
    to_json(timestamp), ',"source":', to_json(source), ',"payload":', payload, '}'"""
TEXTS = {
    JSON: f"string_agg(concat({EVENT}), ',' ORDER BY seq)",
    LINES: f"string_agg(concat({EVENT}, E'\\n'), '' ORDER BY seq)",
    FEED: f"string_agg(concat('id: ', seq, E'\\ndata: ', {EVENT}, E'\\n\\n'), '' ORDER BY seq)",
}
# One less than the seq of the oldest of the newest; if there are none, where the log ends.
POSITION = """
    SELECT coalesce(min(seq) - 1, (SELECT coalesce(max(seq), 0) FROM events))
    FROM (SELECT seq FROM events WHERE {range} ORDER BY {newest_first} LIMIT %(tail)s) AS newest
"""

# --- Errors ----------------------------------------------------------------------------------

CONNECTION_LOST = "the connection to PostgreSQL is lost"
REASONS = {  # by SQLSTATE, or by its first two characters, which are its class
    "08": CONNECTION_LOST,
    "25": "PostgreSQL only reads here: it is a standby, or set to read-only",
    "3F": "the schema that the address names does not exist",
    "42": "the tables in PostgreSQL are missing or have changed",
    "42501": "the user needs CREATE on the schema, TEMP on the database and its own tables",
    "53": "PostgreSQL has no room: disk, memory or connections",
    "57": "PostgreSQL is stopping or starting",
    "57014": "PostgreSQL took too long",
    "58": "PostgreSQL has an input or output error",
}
# The class of bad data. Not 54, a limit exceeded: a full queue of NOTIFY is in it, and to refuse
# a good event for that would lose it.
CONTENT_CLASS = "22"
NO_CONNECTION = "no connection to PostgreSQL"
AT_THE_START = "Is it running, and is the address right? psql with the same address says more"
BAD_ADDRESS = "the address is not as PostgreSQL wants it: postgresql://user@host:port/database"
FOREIGN_TABLES = (
    "the tables aggregator, events or topics there belong to a newer version of this service "
    "or to another program: use another database or schema"
)


def reason_of(error: psycopg.Error) -> str:
    """Why it did not work, in words that may be told to anybody."""
    state = error.sqlstate
    if state is None:
        return CONNECTION_LOST
    return REASONS.get(state) or REASONS.get(state[:2]) or f"PostgreSQL reports error {state}"


def name_of(text: str) -> str:
    """A name to look for. NUL and lone surrogates cannot be sent, and no name has a control."""
    return re.sub("[\0\ud800-\udfff]", "\x01", text)


# --- A connection ----------------------------------------------------------------------------


class Session:
    """One connection for one thread: made when it is needed, dropped after any error."""

    def __init__(self, address: dict[str, Any], setup: str) -> None:
        self._address = address
        self._setup = setup
        self._connection: psycopg.Connection | None = None
        self._socket: socket.socket | None = None  # another handle of the same, for `shut`
        self._asked_at = math.inf  # when the database was asked what it has not answered yet
        self.patience_seconds = SILENCE_SECONDS
        self.description = "PostgreSQL"
        self.process_id = 0  # of the server's process for this connection
        self.is_stale = False  # set by another thread: the connection may be broken
        self.lacks_standby = False  # whether the last transaction may be missing there

    def ask(self, query: str, values: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """The rows of one statement, which is a transaction. Raises Unavailable, Unstorable."""
        self.connect()
        with self._answering() as connection:
            self.lacks_standby = False
            return connection.execute(query, values, binary=True).fetchall()

    def run(self, script: str) -> None:
        """Several statements, which are one transaction."""
        self.connect()
        with self._answering() as connection:
            connection.execute(script)

    def notifications(self, seconds: float) -> list[psycopg.Notify]:
        """What was notified, as soon as there is something; [] after so many seconds."""
        with self._answering() as connection:
            return list(connection.notifies(timeout=seconds, stop_after=1))

    def connect(self) -> bool:
        """Makes the connection if there is none; returns whether there was none."""
        if self.is_stale:
            self.drop()
        if self._connection is not None:
            return False
        try:
            self._connection = psycopg.connect(**self._address)
        except psycopg.Error:
            raise Unavailable(NO_CONNECTION) from None
        self._socket = socket.fromfd(self._connection.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        with self._answering() as connection:
            refuse_unfit_server(connection)
            connection.execute(self._setup)
            connection.add_notice_handler(self._notice)
            self.process_id = connection.info.backend_pid
            self.description = describe(connection.info)
        return True

    def _notice(self, notice: Diagnostic) -> None:
        """PostgreSQL calls it a success if an operator ends the wait for a standby."""
        if notice.source_function == "SyncRepWaitForLSN":
            self.lacks_standby = True

    @contextlib.contextmanager
    def _answering(self) -> Iterator[psycopg.Connection]:
        """The connection, under the eyes of the watchdog, and its errors as ours."""
        assert self._connection is not None
        self._asked_at = time.monotonic()
        try:
            yield self._connection
        except psycopg.Error as error:
            self.drop()
            state = error.sqlstate or ""
            kind = Unstorable if state.startswith(CONTENT_CLASS) else Unavailable
            raise kind(reason_of(error)) from None
        except Unavailable:
            self.drop()
            raise
        finally:
            self._asked_at = math.inf

    def shut_if_silent(self) -> None:
        """For the watchdog: ends a wait that has taken too long. Its thread sees an error."""
        if time.monotonic() > self._asked_at + self.patience_seconds:
            self.shut()

    def shut(self) -> None:
        """From any thread: whoever waits for an answer sees an error now."""
        opened = self._socket
        if opened is not None:
            with contextlib.suppress(OSError):  # it is closed already
                opened.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Closes the connection, if there is one; the next call makes a new one."""
        self.is_stale = False
        self.process_id = 0
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def refuse_unfit_server(connection: psycopg.Connection) -> None:
    """Raises Unavailable for a server with which the promises would not hold."""
    (version,) = connection.execute(VERSION).fetchone() or ("",)
    if "CockroachDB" in version:
        raise Unavailable("CockroachDB ignores advisory locks: readers would miss events")
    encoding, synchronous_commit = connection.execute(SERVER_SETTINGS).fetchone() or ("", "")
    if encoding != "UTF8":
        raise Unavailable("the database has another encoding than UTF8: make it with UTF8")
    if synchronous_commit in ("off", "local"):
        raise Unavailable(
            "synchronous_commit is off or local there: "
            "a 202 would not mean that an event is safe. Set it to on"
        )


def describe(server: psycopg.ConnectionInfo) -> str:
    """For the log: which PostgreSQL, which database. Its name may be the user's: then without."""
    version = f"PostgreSQL {server.parameter_status('server_version')}"
    return version if server.dbname == server.user else f"{version}, database {server.dbname}"


# --- The store -------------------------------------------------------------------------------


class PostgresStore:
    """The door; aggregator.py says what each method promises."""

    def __init__(self, address: str) -> None:
        """Connects and makes the tables if there are none; raises StoreError."""
        try:
            parts = ADDRESS_DEFAULTS | conninfo_to_dict(address) | ADDRESS_RULES
        except psycopg.Error:
            raise StoreError(BAD_ADDRESS) from None
        self._writer = Session(parts, SESSION + COMMIT_GROUP_FUNCTION)
        self._reader = Session(parts, SESSION)
        self._listener = Session(parts, SESSION + LISTEN)
        self._news_in_doubt = False  # the listener may have taken others' news for our own
        self._stopping = False
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()
        try:
            self._writer.connect()
            self._open_tables()
            self.location = self._writer.description
        except (Unavailable, Unstorable) as why:
            self.close()
            advice = f". {AT_THE_START}" if str(why) == NO_CONNECTION else ""
            raise StoreError(f"cannot use the database: {why}{advice}") from None

    def _open_tables(self) -> None:
        """Makes the tables where there are none; refuses those that are not ours."""
        [(found,)] = self._writer.ask(COUNT_TABLES)
        if found == 0:
            self._writer.run(MAKE_TABLES)
        elif found < 3:
            raise Unavailable(FOREIGN_TABLES)
        versions = self._writer.ask(TABLES_VERSION)
        if versions != [(str(SCHEMA_VERSION),)]:
            raise Unavailable(FOREIGN_TABLES)

    # --- on the event loop ---

    def encode(self, rows: Sequence[Row]) -> bytes:
        """A line for each event, its fields with tabs between; raises ValueError."""
        lines = [
            f"{topic}\t{event_id}\t{timestamp}\t{source}\t{ENCODER.encode(payload)}"
            for topic, event_id, timestamp, source, payload in rows
        ]
        text = "\n".join(lines)
        if not text.isascii():
            for character, escape in LINE_BREAKS.items():
                text = text.replace(character, escape)
        return text.encode()

    # --- the writer's thread ---

    def commit(self, batches: Sequence[Batch]) -> Outcome:
        """Stores a group; it is on disk when this returns. Raises Unavailable, Unstorable."""
        started = time.perf_counter()
        event_lines = b"\n".join(batch.text for batch in batches).decode()
        topics = Counter(topic for batch in batches for topic in batch.topics)
        topic_lines = "\n".join(f"{events}\t{topic}" for topic, events in topics.items())
        try:
            [(new_positions,)] = self._writer.ask(COMMIT_GROUP, [event_lines, topic_lines])
            if self._writer.lacks_standby:
                raise Unavailable("PostgreSQL committed, but perhaps not on its standby")
        except (Unavailable, Unstorable):
            self._news_in_doubt = True
            raise
        is_new = bytearray(topics.total())
        for position in new_positions:
            is_new[position] = 1
        return Outcome(is_new, time.perf_counter() - started)

    # --- the reader's thread ---

    def last_seq(self) -> int:
        """The seq of the newest event; 0 if there is none."""
        [(seq,)] = self._reader.ask(LAST_SEQ)
        return int(seq)

    def page(
        self, form: str, topic: str | None, after: int, upto: int, limit: int, most_bytes: int
    ) -> Page:
        """Events with after < seq <= upto as one text, at most PAGE_EVENTS."""
        values = {
            "topic": name_of(topic or ""),
            "after": after,
            "upto": upto,
            "limit": min(limit, PAGE_EVENTS),
            "most_bytes": most_bytes,
        }
        of_which = OF_ALL if topic is None else OF_TOPIC
        [row] = self._reader.ask(PAGE.format(text=TEXTS[form], **of_which), values)
        return Page(*row)

    def position(self, topic: str | None, tail: int) -> int:
        """The `after` behind which the newest `tail` events are."""
        values = {"topic": name_of(topic or ""), "after": 0, "upto": MAX_SEQ, "tail": tail}
        of_which = OF_ALL if topic is None else OF_TOPIC
        [(position,)] = self._reader.ask(POSITION.format(**of_which), values)
        return int(position)

    def find(self, topic: str, event_id: str) -> int | None:
        """The seq of the one event with this identity."""
        rows = self._reader.ask(FIND, [name_of(topic), name_of(event_id)])
        return rows[0][0] if rows else None

    def topics(self, after: str, limit: int) -> list[TopicCounts]:
        """The topics with names behind `after`, in the order of the names."""
        return [TopicCounts(*row) for row in self._reader.ask(TOPICS, [name_of(after), limit])]

    def totals(self) -> Totals:
        """The counters of all topics together."""
        [row] = self._reader.ask(TOTALS)
        return Totals(*row)

    def size(self) -> Size:
        """Of the tables with their indexes. PostgreSQL looks after its log by itself."""
        [(size,)] = self._reader.ask(SIZE)
        return Size(size, 0, 0)

    # --- the watcher's thread ---

    def changed(self) -> Collection[str] | None:
        """The topics for which other processes stored events; None: any topic may have some."""
        try:
            is_new_connection = self._listener.connect()
            if is_new_connection or self._news_in_doubt:
                self._news_in_doubt = False
                return None  # some news may not have been heard
            news = self._news_of_others()
            if not news:
                self._listener.ask(STILL_THERE)  # silence alone says nothing
        except Unavailable:
            if self._stopping:
                return ()
            self._writer.is_stale = True  # so that nobody else has to find out with a failure
            self._reader.is_stale = True
            raise
        if "" in news:
            return None
        return {topic for names in news for topic in names.split("\n")}

    def _news_of_others(self) -> list[str]:
        """What other processes notified, as soon as there is something; [] after a second."""
        end = time.monotonic() + LISTEN_SECONDS
        while (rest := end - time.monotonic()) > 0:
            heard = self._listener.notifications(rest)
            news = [each.payload for each in heard if each.pid != self._writer.process_id]
            if news:
                return news
        return []

    # --- any thread ---

    def wake(self) -> None:
        """Ends a wait in changed(), and shortens the waits for a server that is silent."""
        self._stopping = True
        self._writer.patience_seconds = STOPPING_SECONDS
        self._reader.patience_seconds = STOPPING_SECONDS
        self._listener.shut()

    def close(self) -> None:
        """Closes the connections."""
        self._closed.set()
        self._watchdog.join()
        for session in (self._writer, self._reader, self._listener):
            session.drop()

    def _watch(self) -> None:
        """The watchdog. A peer can be silent while its machine keeps the connection alive."""
        while not self._closed.wait(WATCH_SECONDS):
            for session in (self._writer, self._reader, self._listener):
                session.shut_if_silent()
