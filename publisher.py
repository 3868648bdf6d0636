"""A load simulator for the event aggregator, and the proof, end to end, that it keeps its word.

It plays a crowd of publishers that deliver at least once: events go out in batches, many requests
at a time; some events go out again, in awkward places; and whatever was not acknowledged is sent
again, although it may have arrived. Then it reads its own events back and checks that each one is
stored exactly once and as it was sent, however often the service was killed in the meantime.

    order of numbers -- batches -- POST /publish -- 202: counts, latency -- report
                           |            '-- 503, no answer: pause, again      |
              number -- event                                                 |
                           |                                                  |
                        compare -- GET /events, page by page ------------- verdict

One idea keeps it small and quick: an event is a pure function of its number, and its number can
be read out of its id. So nothing has to be remembered of an event in order to check it later.

The verdict is OK only if all of this holds:

1. Each event is stored, once, with exactly the five fields that were sent.
2. Nothing is stored under the name of this run that it did not send.
3. The events come back in an order in which they can have been committed.
4. The counts in the answers are possible, and their sums are right.

    python publisher.py --events 5000 --duplicate-rate 0.2    # 4000 events, and 1000 of them again
    python publisher.py --rate 500                            # slow enough to watch on the page
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import heapq
import json
import math
import os
import random
import re
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, NoReturn, TextIO
from urllib.parse import urlsplit

import aiohttp

# --- Settings --------------------------------------------------------------------------------
# What a user may choose is a field of Settings: name, default, meaning, variable and rule stand
# together, and flags and --help are made from them. What has one right value is a constant, with
# its reason beside it.

REQUEST_SECONDS = 10.0  # for one try: a commit takes milliseconds, so beyond it the service hangs
BACKOFF_FIRST_SECONDS = 0.05  # a lost connection is often back at once
BACKOFF_MAX_SECONDS = 2.0  # so that a restarted service does not stand idle for long
RETRY_STATUSES = frozenset({429, 502, 503, 504})  # "later"; and a proxy's words for "nobody there"

PAGE_EVENTS = 1_000  # read back at a time: some 240 kB, and 20 ms of work; a power of ten
MAX_ANSWER_BYTES = 64 * 1024 * 1024  # an answer without an end must not fill the memory
MAX_EVENTS = 10_000_000  # in a run: it takes a gigabyte to plan and check so many

TERMINAL_SECONDS = 0.2  # between two pictures of the progress bar: smooth enough for an eye
LINES_SECONDS = 2.0  # between two lines where there is no terminal: they stay in some log
WATCH_SECONDS = 20.0  # long enough to open the page and to see the run on it

SEEDED_START = 1_761_301_800  # 2025-10-24T10:30:00Z; what has a seed must not depend on the clock

# Ctrl-C, `kill`, and Ctrl-Break on Windows. No system has to know all of them.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
]

SUMMARY = "A load simulator for the event aggregator, and the proof that it keeps its word."
EXIT_STATUS = (
    "Exit status: 0 the verdict holds; 1 it does not, or the run failed; 2 a setting makes no"
    " sense; 128 plus the number of the signal that ended it."
)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Makes a reader of whole numbers in this range; it raises ValueError with the rule."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise ValueError(f"must be a whole number, {least} to {most}")

    return read


def integer(text: str) -> int:
    """Reads any whole number."""
    with contextlib.suppress(ValueError):
        return int(text)
    raise ValueError("must be a whole number")


def share(text: str) -> float:
    """Reads a share that leaves at least something."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise ValueError("must be a number, 0 or more and below 1")


def amount(text: str) -> float:
    """Reads a number that is not negative; infinity and NaN are none."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise ValueError("must be a number, 0 or more")


def http_url(text: str) -> str:
    """Reads an address to which paths can be added; a user name or a query would get lost."""
    with contextlib.suppress(ValueError):  # a bad port, brackets that do not match, a long name
        parts = urlsplit(text)
        text.encode()  # fails for what is no text: bytes of another encoding
        has_host = bool((parts.hostname or "").encode("idna"))
        has_port = parts.port != 0  # reading it fails for 65536
        is_plain = not re.search(r"[\s?#@\\]", text)
        if parts.scheme in ("http", "https") and has_host and has_port and is_plain:
            return text.rstrip("/")
    raise ValueError("must be http://host:port or https://host:port")


def header_token(text: str) -> str | None:
    """Reads what can stand in a header; nothing means none."""
    if re.fullmatch("[!-~]*", text):
        return text or None
    raise ValueError("must be ASCII without spaces")


def setting(
    default: object, meaning: str, read: Callable[[str], object], variable: str = ""
) -> Any:
    """A field of Settings. `read` makes a value of a text, or raises ValueError with its rule."""
    return field(default=default, metadata={"meaning": meaning, "read": read, "variable": variable})


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set from outside: by a flag of the same name or, where there is one, a variable.

    The default address is no name: some systems look for `localhost` at ::1 first, and that costs
    a quarter of a second for each connection.
    """

    url: str = setting("http://127.0.0.1:8080", "where the service is", http_url, "AGGREGATOR_URL")
    events: int = setting(
        5000, "events to send in all", whole_number(1, MAX_EVENTS), "TOTAL_EVENTS"
    )
    duplicate_rate: float = setting(0.2, "share of them that are repeats", share, "DUPLICATE_RATE")
    batch_size: int = setting(50, "events in a request", whole_number(1, 10_000), "BATCH_SIZE")
    concurrency: int = setting(
        8, "requests in flight at once", whole_number(1, 1_000), "CONCURRENCY"
    )
    rate: float = setting(0.0, "events a second; 0: as fast as it can", amount)
    seed: int | None = setting(None, "a number, to send the same events each time", integer)
    wait: float = setting(30.0, "seconds without any success after which it gives up", amount)
    api_token: str | None = setting(
        None, "for a service that asks for one", header_token, "API_TOKEN"
    )


class RunFailed(Exception):
    """The run cannot go on. The message is the one line that the user gets to see."""


# --- Making the run --------------------------------------------------------------------------
# A run is planned before the clock starts, but only as numbers. Their events are written out
# batch by batch, while earlier requests are under way, by filling in a template: 3 microseconds
# an event, half of what making it for json.dumps would take. All at once would be 250 bytes each.

# Each topic with its payload: the number of the event goes in, and a figure of 0 to 255. Between
# them the payloads hold every kind of JSON value, so that whatever gets lost on the way shows.
TOPICS = (
    ("order.created", '{"order_id":"O-%d","items":%d,"currency":"EUR","gift":false}'),
    ("page.viewed", '{"path":"/products/%d","milliseconds":%d,"from_cache":true}'),
    ("payment.captured", '{"payment_id":"P-%d","amount":%d.95,"card":{"brand":"visa"}}'),
    ("stock.changed", '{"sku":"S-%d","change":-%d,"shelves":["A1",{"row":4,"bins":[]}]}'),
    ("user.registered", '{"user_id":%d,"age":%d,"name":"Zoë \\"Z\\" \\u0141uk","referrer":null}'),
)
NOISE_BYTES = 9  # random bytes for each event: all the digits of its id that are free


@functools.lru_cache(maxsize=1024)  # a thousand events in a row share a second
def iso_second(second: int) -> str:
    """Seconds since 1970 as an ISO 8601 date and time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that will be sent, as little as it takes to make it."""

    unique: int  # events, numbered from 0
    source: str  # marks the events of this run
    start: int  # the time of event 0, seconds since 1970; the others follow a millisecond apart
    key: int  # 48 random bits
    noise: bytes  # NOISE_BYTES for each number
    order: array[int]  # the numbers in the order of sending; a repeat is one that comes again

    def event_id(self, number: int) -> str:
        """A UUID, version 4 in form: random to look at, and yet its number can be read out of it.

        Its first 12 digits are noise, and its last 12 are those XOR number XOR key. XOR undoes
        itself, so the number is first XOR last XOR key. With the key ffffffffffff, event 5:

            noise    01 23 45 67 89 ab cd ef 01
            last     0123456789ab XOR 000000000005 XOR ffffffffffff = fedcba987651
            id       01234567-89ab-4cde-af01-fedcba987651
            number   0123456789ab XOR fedcba987651 XOR ffffffffffff = 000000000005
        """
        noise = self.noise[number * NOISE_BYTES : (number + 1) * NOISE_BYTES]
        digits = noise.hex()
        last = int.from_bytes(noise[:6], "big") ^ number ^ self.key
        return f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-a{digits[15:]}-{last:012x}"

    def number(self, event_id: str) -> int | None:
        """The number of the event that has this id; None if it is none of this run."""
        try:
            first = int(event_id[:8] + event_id[9:13], 16)
            last = int(event_id[24:], 16)
        except ValueError:
            return None
        number = first ^ last ^ self.key
        is_ours = 0 <= number < self.unique and self.event_id(number) == event_id
        return number if is_ours else None

    def event(self, number: int) -> str:
        """The event as JSON; the same text each time."""
        figure = self.noise[number * NOISE_BYTES]
        topic, payload = TOPICS[figure % len(TOPICS)]
        return (
            f'{{"topic":"{topic}","event_id":"{self.event_id(number)}",'
            f'"timestamp":"{iso_second(self.start + number // 1000)}.{number % 1000:03d}Z",'
            f'"source":"{self.source}","payload":{payload % (number, figure)}}}'
        )

    def body(self, numbers: Sequence[int]) -> bytes:
        """The body of the request that publishes these events."""
        return f'{{"events":[{",".join(map(self.event, numbers))}]}}'.encode()


def plan(settings: Settings) -> Run:
    """A run: a new one each time or, with a seed, always the same for the same settings."""
    repeats = min(round(settings.events * settings.duplicate_rate), settings.events - 1)
    unique = settings.events - repeats
    if settings.seed is None:
        rng = random.Random()
        start = int(time.time()) - unique // 1000  # the last one is of now
    else:  # with other numbers of events it is another run, so ids and source have to differ
        rng = random.Random(f"{settings.seed}/{unique}/{repeats}")
        start = SEEDED_START
    source = f"publisher-{rng.randbytes(6).hex()}"
    key = rng.getrandbits(48)
    noise = rng.randbytes(NOISE_BYTES * unique)

    # Event n has place n. Its repeat comes somewhat later, going round at the end: right after it
    # (the same batch, mostly), a batch or two on (another request that is in flight with the
    # first), or anywhere. Spread evenly, next to none of a long run would ever meet its original.
    reaches = (2, 2 * settings.batch_size, unique)
    originals = ((number, number) for number in range(unique))
    again = sorted(
        ((number + rng.random() * rng.choice(reaches)) % unique, number)
        for number in rng.choices(range(unique), k=repeats)
    )
    order = array("L", (number for _place, number in heapq.merge(originals, again)))
    return Run(unique, source, start, key, noise, order)


# --- Saying something ------------------------------------------------------------------------
# Progress goes to stderr, the report to stdout: `publisher.py > report.txt` still shows the bar.


def say(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Writes to a standard stream. Nobody has to be there to read it: the run goes on."""
    if stream is None:  # it was closed when the process began
        return
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:  # its reader went away: what is left in the buffer must not fail at the exit
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.asynccontextmanager
async def progress(
    label: str, retries: Counter[str], done: Callable[[], int], total: int
) -> AsyncIterator[None]:
    """Shows how far things are while its block runs: a bar on a terminal, lines elsewhere."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()

    def show(end: str) -> None:
        bar = f"\r[{'#' * (30 * done() // total):.<30}] " if is_terminal else ""
        text = f"{bar}{label} {done()} of {total} events, {retries.total()} retries"
        say(text, sys.stderr, end)

    async def keep_showing() -> None:
        while True:
            await asyncio.sleep(TERMINAL_SECONDS if is_terminal else LINES_SECONDS)
            show(end="" if is_terminal else "\n")

    task = asyncio.create_task(keep_showing())
    try:
        yield
    finally:
        task.cancel()
        if is_terminal:
            show(end="\n")


# --- The service, seen from outside ----------------------------------------------------------
# The service deduplicates, so sending again what may have arrived does no harm, and the answer to
# every trouble is the same: pause, try again. The pause is random below a limit that doubles each
# time ("full jitter"): a crowd that was turned away together must not come back together. A
# refusal is different. The same request would be refused again, so it ends the run.


class Reply(NamedTuple):
    """An answer that is a JSON object, and how many tries it took."""

    document: dict[str, Any]
    tries: int

    def whole(self, key: str) -> int:
        """A number in it that counts something; raises RunFailed."""
        value = self.document.get(key)
        if type(value) is not int or not 0 <= value < 2**63:  # not isinstance: true is an int, too
            raise not_an_aggregator(f"{key} is {canonical(value)[:100]}")
        return value


class Counts(NamedTuple):
    """What a 202 says of its request."""

    received: int
    unique: int
    duplicates: int
    tries: int


class Page(NamedTuple):
    """Some stored events in their order, and the number of the last one."""

    events: list[Any]
    last_seq: int


class AnswerTooLarge(RunFailed):
    """An answer is larger than MAX_ANSWER_BYTES."""


def canonical(value: object) -> str:
    """The same text for the same JSON. Comparing in Python would take true for 1."""
    try:
        return json.dumps(value, sort_keys=True)
    except RecursionError:  # nothing that was sent is nested like that
        return "nested too deeply"


def not_an_aggregator(why: str) -> RunFailed:
    """The error for an answer that no event aggregator gives."""
    return RunFailed(f"not the answer of an event aggregator: {why}")


def one_line(text: str) -> str:
    """The text on one line, without what would steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def excerpt(answer: bytes) -> str:
    """The beginning of an answer."""
    return one_line(answer[:500].decode(errors="replace"))


def retry_after(value: str | None) -> float:
    """The seconds that a Retry-After header asks for, as a number or a date; 0 if it is neither."""
    try:
        if value is None or value.isdecimal():
            return float(value or 0)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


async def whole_body(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer; raises AnswerTooLarge."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise AnswerTooLarge(f"an answer is larger than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


class Service:
    """The aggregator: it answers, sooner or later, or RunFailed is raised.

    It is raised if the service refuses a request, answers what no aggregator answers, or has
    served nobody for --wait seconds.
    """

    def __init__(self, session: aiohttp.ClientSession, settings: Settings) -> None:
        self.session = session
        self.settings = settings
        self.retries: Counter[str] = Counter()  # why - how many times
        self._served = -math.inf  # when a request last went well
        self._is_waiting = False  # the user has been told that the service is not there yet

    async def publish(self, body: bytes) -> Counts:
        """Sends a batch and returns when it is acknowledged."""
        reply = await self._ask("POST", "/publish", body)
        return Counts(
            received=reply.whole("received"),
            unique=reply.whole("unique_processed"),
            duplicates=reply.whole("duplicate_dropped"),
            tries=reply.tries,
        )

    async def page(self, after: int, limit: int) -> Page:
        """The next events after a sequence number."""
        reply = await self._ask("GET", f"/events?after={after}&limit={limit}")
        events = reply.document.get("events")
        last_seq = reply.whole("last_seq")
        if not isinstance(events, list):
            raise not_an_aggregator("events is no list")
        if events and last_seq <= after:  # the next page would be this one
            raise not_an_aggregator(f"last_seq is {last_seq} in a page of what is after {after}")
        return Page(events, last_seq)

    async def last_seq(self) -> int:
        """The highest sequence number that was given so far."""
        reply = await self._ask("GET", "/events?after=latest&limit=1")
        return reply.whole("last_seq")

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """Sends one request until it goes well."""
        url = self.settings.url + path
        headers = {"Content-Type": "application/json"} if body else None
        began = time.perf_counter()
        backoff = BACKOFF_FIRST_SECONDS
        tries = 0
        while True:
            # 1. Try.
            tries += 1
            asked = 0.0  # seconds that the service wants to be left alone
            try:
                async with self.session.request(
                    method, url, data=body, headers=headers, allow_redirects=False
                ) as response:
                    answer = await whole_body(response)
                if response.status < 300:
                    self._served = time.perf_counter()
                    return Reply(json_object(answer), tries)
                trouble = f"{response.status} {excerpt(answer)}"
                if response.status not in RETRY_STATUSES:
                    raise RunFailed(f"{method} {url} was refused: {trouble}")
                why = str(response.status)
                asked = retry_after(response.headers.get("Retry-After"))
            except TimeoutError:
                why = "time-out"
                trouble = f"no answer within {REQUEST_SECONDS:g} s"
            except (aiohttp.ClientError, OSError) as error:
                why = "connection"
                reason = one_line(str(error)) or type(error).__name__
                trouble = f"{reason} (is aggregator.py running?)"

            # 2. Go on? One request may be out of luck while others get through; only when nobody
            # does is the service away. The last try falls on the end of that time, not before it.
            away = time.perf_counter() - max(began, self._served)
            left = self.settings.wait - away
            if left <= 0 or asked > left:
                wish = f" (it asks for {asked:.0f} s more)" if asked else ""
                raise RunFailed(
                    f"gave up on {self.settings.url}, {away:.1f} s without success: {trouble}{wish}"
                )
            if self._served == -math.inf and not self._is_waiting:
                self._is_waiting = True
                most = f"{self.settings.wait:g} s at most"
                say(f"Waiting for {self.settings.url}, {most}: {trouble}", sys.stderr)

            # 3. Pause.
            self.retries[why] += 1
            await asyncio.sleep(min(asked + random.uniform(0, backoff), left))
            backoff = min(2 * backoff, BACKOFF_MAX_SECONDS)


def json_object(answer: bytes) -> dict[str, Any]:
    """The JSON object that an answer is; raises RunFailed."""
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        raise not_an_aggregator(excerpt(answer)) from None
    if not isinstance(document, dict):
        raise not_an_aggregator(excerpt(answer))
    return document


# --- Sending ---------------------------------------------------------------------------------
# Each worker takes the next batch as soon as its last one is acknowledged.


@dataclass(slots=True)
class Tally:
    """What happened while sending."""

    # For each batch: when its first try began and when its 202 came. The time between holds all
    # tries and pauses. Counting only the tries that went well would hide what hurts a publisher.
    sent: array[float]
    answered: array[float]
    acknowledged: int = 0  # events
    received: int = 0  # this and the next two: sums of what the service answered
    unique: int = 0
    duplicates: int = 0
    in_doubt: int = 0  # events that an earlier try may have stored, as its answer was lost
    seconds: float = 0.0  # that sending took
    cpu_seconds: float = 0.0  # of them, how long this process computed


def new_tally(batches: int) -> Tally:
    """A Tally of a run that has not begun."""
    return Tally(sent=array("d", [0.0] * batches), answered=array("d", [0.0] * batches))


async def publish(
    service: Service, run: Run, settings: Settings, tally: Tally, findings: Findings
) -> None:
    """Sends the whole run and returns when all of it is acknowledged; raises RunFailed."""
    batches = iter(range(len(tally.sent)))  # shared by the workers: each batch goes out once
    started = time.perf_counter()
    cpu_started = time.process_time()

    async def send(batch: int) -> None:
        first = batch * settings.batch_size
        numbers = run.order[first : first + settings.batch_size]
        body = run.body(numbers)
        if settings.rate:  # due times count from the start, so delays never add up
            await asyncio.sleep(started + first / settings.rate - time.perf_counter())
        tally.sent[batch] = time.perf_counter()
        counts = await service.publish(body)
        tally.answered[batch] = time.perf_counter()
        tally.acknowledged += len(numbers)
        tally.received += counts.received
        tally.unique += counts.unique
        tally.duplicates += counts.duplicates
        distinct = len(set(numbers))
        if counts.tries > 1:
            tally.in_doubt += distinct
        check_counts(counts, len(numbers), distinct, findings)

    async def worker() -> None:
        for batch in batches:
            await send(batch)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(settings.concurrency):
                workers.create_task(worker())
    except ExceptionGroup as group:  # several may fail of the same cause: one of them says it
        raise group.exceptions[0] from None
    tally.seconds = time.perf_counter() - started
    tally.cpu_seconds = time.process_time() - cpu_started


# --- Judging ---------------------------------------------------------------------------------
# What is stored is judged by what the service gives back. What it counted is judged by what was
# sent. One difference between the two is right: a batch that was stored, and its answer lost in a
# crash, counts as duplicates when it is sent again.


@dataclass(slots=True)
class Findings:
    """What is not as it should be, and what was found."""

    found: bytearray  # a flag for each number: its event is stored
    problems: Counter[str] = field(default_factory=Counter)  # what - how many times
    examples: dict[str, str] = field(default_factory=dict)  # what - the first one

    def add(self, problem: str, example: object) -> None:
        """Notes a problem."""
        self.problems[problem] += 1
        if problem not in self.examples:
            self.examples[problem] = canonical(example)[:200]


def check_counts(counts: Counts, events: int, distinct: int, findings: Findings) -> None:
    """Judges the counts of one answer: can they be true of a request with these events?"""
    adds_up = counts.unique + counts.duplicates == counts.received == events
    if not adds_up or counts.unique > distinct:
        findings.add("answers with wrong counts", {"events sent": events} | counts._asdict())


def check_sums(tally: Tally, run: Run, is_new: bool, findings: Findings) -> None:
    """Judges the sum of all answers: each event is new once, and only once.

    Fewer are new if an earlier try stored some and its answer got lost. In a run that is not new,
    one with a seed, any number of them may be stored already, and nobody can tell.
    """
    stored_before = run.unique - tally.unique
    most = tally.in_doubt if is_new else run.unique
    if not 0 <= stored_before <= most:
        example = {"unique events sent": run.unique, "counted as new": tally.unique}
        findings.add("wrong sums of counts", example)


class CommitOrder:
    """Tells whether events come back in an order in which they can have been committed.

    A commit falls between the sending of a request and its answer. So two rules hold:

    1. An event whose request was answered comes before an event that was sent only after that.
    2. Events of one request keep its order, unless another request has the same event.
    """

    def __init__(self, run: Run, batch_size: int, tally: Tally) -> None:
        self._batch_size = batch_size
        self._answered = tally.answered
        # For each number its first place in the order of sending, and its last batch.
        self._first_place = array("L", bytes(array("L").itemsize * run.unique))
        self._last_batch = array("L", self._first_place)
        for place in range(len(run.order) - 1, -1, -1):
            self._first_place[run.order[place]] = place
        for place, number in enumerate(run.order):
            self._last_batch[number] = place // batch_size
        # When a batch, or one after it, was sent: no event that is new in it was sent before.
        self._sent = array("d", tally.sent)
        for batch in range(len(self._sent) - 2, -1, -1):
            self._sent[batch] = min(self._sent[batch : batch + 2])
        # What came back so far: the latest sending and, for each batch, the farthest place.
        self._latest_sent = -math.inf
        self._farthest_place = array("l", [-1]) * len(self._sent)

    def allows(self, number: int) -> bool:
        """Whether this event may come next. It is asked once for each event."""
        place = self._first_place[number]
        batch = place // self._batch_size
        is_allowed = self._answered[batch] >= self._latest_sent
        self._latest_sent = max(self._latest_sent, self._sent[batch])
        if self._last_batch[number] == batch:
            is_allowed = is_allowed and place > self._farthest_place[batch]
            self._farthest_place[batch] = max(place, self._farthest_place[batch])
        return is_allowed


def check_event(event: Any, run: Run, order: CommitOrder | None, findings: Findings) -> None:
    """Compares a stored event with what was sent."""
    values = event if isinstance(event, dict) else {}
    number = run.number(str(values.get("event_id")))
    if number is None:
        if values.get("source") == run.source:  # all others are none of our business
            findings.add("never sent", event)
        return
    if findings.found[number]:
        findings.add("stored more than once", event)
        return
    findings.found[number] = 1
    if canonical(event) != canonical(json.loads(run.event(number))):
        findings.add("altered", event)
    if order and not order.allows(number):
        findings.add("out of order", event)


async def read_back(
    service: Service, run: Run, after: int, order: CommitOrder | None, findings: Findings
) -> None:
    """Reads all that was stored behind `after` and judges what is of this run; raises RunFailed.

    Others may go on publishing for ever, so it reads to what is the last event now, and one page
    more: what a service keeps back when it is asked for its last event shows there.
    """
    end = await service.last_seq()
    limit = PAGE_EVENTS
    while True:
        try:
            page = await service.page(after, limit)
        except AnswerTooLarge:  # events of others may have megabytes each
            if limit == 1:
                raise
            limit //= 10
            continue
        for event in page.events:
            check_event(event, run, order, findings)
        if not page.events or after >= end:
            break
        after = page.last_seq
    for number, is_found in enumerate(findings.found):
        if not is_found:
            findings.add("missing", run.event_id(number))


# --- Report ----------------------------------------------------------------------------------


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The nearest rank: the smallest value that `percent` in a hundred do not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def report(
    run: Run, settings: Settings, tally: Tally, retries: Counter[str], findings: Findings
) -> str:
    """The report, its verdict last."""
    events = len(run.order)
    requests = len(tally.sent)
    repeats = events - run.unique
    seconds = tally.seconds
    milliseconds = sorted(
        1000 * (answered - sent) for sent, answered in zip(tally.sent, tally.answered)
    )
    p50 = percentile(milliseconds, 50)
    p95 = percentile(milliseconds, 95)
    p99 = percentile(milliseconds, 99)
    reasons = ", ".join(f"{count} x {why}" for why, count in retries.most_common())
    speed = requests / seconds
    busy = tally.cpu_seconds / seconds
    lines = [
        f"Planned     {events} events: {run.unique} unique, {repeats} repeats",
        f"Answered    {tally.received} events: {tally.unique} new, {tally.duplicates} duplicates",
        f"Throughput  {events / seconds:.0f} events/s, {speed:.0f} requests/s, {seconds:.2f} s",
        f"Latency     p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms (from first try to 202)",
        f"Retries     {reasons or 'none'}",
        f"Publisher   {tally.cpu_seconds:.2f} s of CPU, {busy:.0%} of the time",
        f"Read back   {findings.found.count(1)} events of {run.source}",
    ]
    stored_before = run.unique - tally.unique
    if stored_before > 0:
        why = "a try whose answer got lost"
        if settings.seed is not None:
            why += ", or another run with this seed: order and sums are not judged"
        lines.append(f"Note        {stored_before} events were stored before, by {why}")
    for problem, example in findings.examples.items():
        lines.append(f"Example     {problem}: {example}")
    if findings.problems:
        counts = ", ".join(f"{count} {problem}" for problem, count in findings.problems.items())
        lines.append(f"Verdict: FAILED - {counts} (of {run.unique} unique events)")
    else:
        outcome = f"{run.unique} unique events stored exactly once, {repeats} duplicates dropped"
        lines.append(f"Verdict: OK - {outcome}")
    return "\n".join(lines)


# --- Command line ----------------------------------------------------------------------------


async def prove(service: Service, settings: Settings, tally: Tally) -> int:
    """Waits for the service, sends, reads back, reports; returns the exit status."""
    position = await service.last_seq()  # not GET /: a failed commit makes that 503 for a while
    service.retries.clear()  # waiting for it to start was not a trouble of the run
    run = plan(settings)
    findings = Findings(found=bytearray(run.unique))
    pace = f"{settings.rate:g} events a second"
    if not settings.rate:
        slow = math.ceil(settings.events / WATCH_SECONDS)
        pace = f"as fast as it can (to watch it on the page there: --rate {slow})"
    say(f"Sending {settings.events} events to {settings.url}, {pace}", sys.stderr)
    async with progress("Sent", service.retries, lambda: tally.acknowledged, settings.events):
        await publish(service, run, settings, tally, findings)

    is_new = settings.seed is None  # what has a seed may have been sent before, and by others now
    check_sums(tally, run, is_new, findings)
    order = None
    if is_new or tally.unique == run.unique:  # nobody else can have stored a part of it
        order = CommitOrder(run, settings.batch_size, tally)
    async with progress("Read", service.retries, lambda: findings.found.count(1), run.unique):
        await read_back(service, run, position if is_new else 0, order, findings)
    say(report(run, settings, tally, service.retries, findings), sys.stdout)
    return 1 if findings.problems else 0


async def simulate(settings: Settings) -> int:
    """The whole run, until its end or a signal; returns the exit status."""
    signals: list[int] = []
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def stop(number: int, _frame: object) -> None:
        signals.append(number)
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is over anyway
            loop.call_soon_threadsafe(task.cancel)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)

    tally = new_tally(math.ceil(settings.events / settings.batch_size))
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=settings.concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),  # there are none, and looking for them takes time
        headers={"Authorization": f"Bearer {settings.api_token}"} if settings.api_token else None,
        timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
    )
    try:
        async with session:
            return await prove(Service(session, settings), settings, tally)
    except RunFailed as error:
        say(f"publisher: {error}", sys.stderr)
        return 1
    except asyncio.CancelledError:
        if not signals:
            raise
        name = signal.Signals(signals[0]).name
        say(f"publisher: ended by {name}, {tally.acknowledged} events acknowledged", sys.stderr)
        return 128 + signals[0]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with 2."""
        self.exit(2, f"publisher: {message}\n")


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """A flag wins over its variable, and that over the default; exits with 2 on nonsense."""
    parser = Parser(
        prog="publisher.py", description=SUMMARY, epilog=EXIT_STATUS, allow_abbrev=False
    )
    flags = {option.name: "--" + option.name.replace("_", "-") for option in fields(Settings)}
    for option in fields(Settings):
        variable = option.metadata["variable"]
        hints = [] if option.default is None else [f"default: {option.default}"]
        hints += [f"variable: {variable}"] if variable else []
        hint = f" ({', '.join(hints)})" if hints else ""
        parser.add_argument(flags[option.name], help=option.metadata["meaning"] + hint)
    given = vars(parser.parse_args(arguments))

    chosen: dict[str, Any] = {}
    for option in fields(Settings):
        variable = option.metadata["variable"]
        place = flags[option.name]
        text = given[option.name]
        if text is None and environment.get(variable):  # an empty variable counts as none
            place = variable
            text = environment[variable]
        if text is not None:
            try:
                chosen[option.name] = option.metadata["read"](text)
            except ValueError as error:
                parser.error(f"{place} {error}, not {text!a}")
    return Settings(**chosen)


if __name__ == "__main__":
    sys.exit(asyncio.run(simulate(read_settings(sys.argv[1:], os.environ))))
