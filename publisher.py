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

    python publisher.py --events 5000 --duplicate-rate 0.2    # 4000 events, and 1000 of them again
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
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp


# --- Settings --------------------------------------------------------------------------------
# What a user may choose is in Settings; names and defaults are at the end, in OPTIONS. What has
# one right value is a constant, with its reason beside it.

REQUEST_SECONDS = 10.0  # for one try: a commit takes milliseconds, so beyond it the service hangs
BACKOFF_FIRST_SECONDS = 0.05  # a lost connection is often back at once
BACKOFF_MAX_SECONDS = 2.0  # so that a restarted service does not stand idle for long
RETRY_STATUSES = frozenset({429, 502, 503, 504})  # "later"; and a proxy's words for "nobody there"

PAGE_EVENTS = 1_000  # read back at a time: some 240 kB, and 20 ms of work
MAX_EVENTS = 10_000_000  # in a run: planning so many takes half a gigabyte

TERMINAL_SECONDS = 0.2  # between two pictures of the progress bar: smooth enough for an eye
LINES_SECONDS = 2.0  # between two lines where there is no terminal: they stay in some log

SEEDED_START = 1_761_301_800  # 2025-10-24T10:30:00Z; what has a seed must not depend on the clock


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set from outside."""

    url: str
    events: int  # in all, repeats included
    duplicate_rate: float  # the share of repeats among them
    batch_size: int  # events
    concurrency: int  # requests
    rate: float  # events a second; 0: as fast as it can
    seed: int | None  # None: a new run each time
    wait: float  # seconds without any success after which it gives up
    api_token: str | None


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
        """A UUID, version 4 in form. Its last 12 digits are the first 12 XOR number XOR key."""
        noise = self.noise[number * NOISE_BYTES : (number + 1) * NOISE_BYTES]
        digits, last = noise.hex(), int.from_bytes(noise[:6], "big") ^ number ^ self.key
        return f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-a{digits[15:]}-{last:012x}"

    def number(self, event_id: str) -> int | None:
        """The number of the event that has this id; None if it is none of this run."""
        try:
            number = int(event_id[:8] + event_id[9:13], 16) ^ int(event_id[24:], 16) ^ self.key
        except ValueError:
            return None
        return number if 0 <= number < self.unique and self.event_id(number) == event_id else None

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
        rng, start = random.Random(), int(time.time()) - unique // 1000  # the last one is of now
    else:  # with other numbers of events it is another run, so ids and source have to differ
        rng, start = random.Random(f"{settings.seed}/{unique}/{repeats}"), SEEDED_START
    source, key = f"publisher-{rng.randbytes(6).hex()}", rng.getrandbits(48)
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


# --- Sending ---------------------------------------------------------------------------------
# The service deduplicates, so sending again what may have arrived does no harm, and the answer to
# every trouble is the same: pause, try again. The pause is random below a limit that doubles each
# time ("full jitter"): a crowd that was turned away together must not come back together. A
# refusal is different. The same request would be refused again, so it ends the run.


@dataclass(slots=True)
class Tally:
    """What happened so far. The first three are sums of what the service answered."""

    received: int = 0
    unique: int = 0
    duplicates: int = 0
    retries: Counter[str] = field(default_factory=Counter)  # why - how many times
    # In seconds, one for each batch: from its first try to its 202, with all tries and pauses
    # between. Counting only the tries that went well would hide exactly what hurts a publisher.
    latencies: array[float] = field(default_factory=lambda: array("d"))
    wall: float = 0.0  # seconds that sending took
    cpu: float = 0.0  # seconds of them that this process computed


def retry_after(value: str | None) -> float:
    """The seconds that a Retry-After header asks for, as a number or a date; 0 if it is neither."""
    try:
        if value is None or value.isdecimal():
            return float(value or 0)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def excerpt(answer: bytes) -> str:
    """The beginning of an answer, on one line."""
    return " ".join(answer[:500].decode(errors="replace").split())


class Service:
    """The aggregator, seen from outside: it answers, sooner or later, or RunFailed is raised."""

    def __init__(self, session: aiohttp.ClientSession, settings: Settings, tally: Tally) -> None:
        self.session, self.settings, self.tally = session, settings, tally
        self.served = -math.inf  # when a request last went well, on the monotonic clock

    async def ask(
        self, method: str, path: str, keys: Sequence[str], body: bytes | None = None
    ) -> list[Any]:
        """Sends one request until it goes well; returns the values of `keys` in the answer.

        Raises RunFailed if the service refuses it, answers something else than a JSON object
        with these keys, or has served nobody for --wait seconds.
        """
        url = self.settings.url.rstrip("/") + path
        began, backoff = time.monotonic(), BACKOFF_FIRST_SECONDS
        headers = {"Content-Type": "application/json"} if body else None
        while True:
            asked = 0.0
            try:
                async with self.session.request(
                    method, url, data=body, headers=headers, allow_redirects=False
                ) as response:
                    answer = await response.read()
                if response.status < 300:
                    self.served = time.monotonic()
                    return values(answer, keys)
                trouble = f"{response.status} {excerpt(answer)}"
                if response.status not in RETRY_STATUSES:
                    raise RunFailed(f"{method} {url} was refused: {trouble}")
                why, asked = str(response.status), retry_after(response.headers.get("Retry-After"))
            except TimeoutError:
                why, trouble = "time-out", f"no answer within {REQUEST_SECONDS:g} s"
            except (aiohttp.ClientError, OSError) as error:
                why, trouble = "connection", str(error) or type(error).__name__

            # One request may be out of luck while others get through; only when nobody does is
            # the service away. The last try falls on the end of that time, not before it.
            away = time.monotonic() - max(began, self.served)
            left = self.settings.wait - away
            if left <= 0 or asked > left:
                wish = f" (it asks for {asked:.0f} s more)" if asked else ""
                raise RunFailed(
                    f"gave up on {self.settings.url}, {away:.1f} s without success: {trouble}{wish}"
                )
            self.tally.retries[why] += 1
            await asyncio.sleep(min(asked + random.uniform(0, backoff), left))
            backoff = min(2 * backoff, BACKOFF_MAX_SECONDS)

    async def last_seq(self) -> int:
        """The highest sequence number that was given so far."""
        (last_seq,) = await self.ask("GET", "/events?after=latest&limit=1", ["last_seq"])
        return last_seq


def values(answer: bytes, keys: Sequence[str]) -> list[Any]:
    """The values of `keys` in a JSON object; raises RunFailed."""
    try:
        parsed = json.loads(answer)
        return [parsed[key] for key in keys]
    except (ValueError, KeyError, TypeError):
        raise RunFailed(f"not the answer of an event aggregator: {excerpt(answer)}") from None


async def publish(service: Service, run: Run) -> None:
    """Sends the whole run and returns when all of it is acknowledged; raises RunFailed."""
    settings, tally = service.settings, service.tally
    firsts = iter(range(0, len(run.order), settings.batch_size))  # shared: each batch goes out once
    started, cpu = time.monotonic(), time.process_time()

    async def worker() -> None:
        for first in firsts:
            body = run.body(run.order[first : first + settings.batch_size])
            if settings.rate:  # due times count from the start, so delays never add up
                await asyncio.sleep(started + first / settings.rate - time.monotonic())
            began = time.monotonic()
            received, unique, duplicates = await service.ask(
                "POST", "/publish", ("received", "unique_processed", "duplicate_dropped"), body
            )
            tally.latencies.append(time.monotonic() - began)
            tally.received += received
            tally.unique += unique
            tally.duplicates += duplicates

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(settings.concurrency):
                workers.create_task(worker())
    except ExceptionGroup as group:  # several may fail of the same cause: one of them says it
        raise group.exceptions[0] from None
    tally.wall, tally.cpu = time.monotonic() - started, time.process_time() - cpu


# --- Reading back ----------------------------------------------------------------------------
# The verdict rests on what the service gives back, not on what it counted: a batch that was
# stored, and its answer lost in a crash, counts as duplicates when it is sent again, and rightly.


@dataclass(slots=True)
class Findings:
    """What was found when reading back."""

    met: bytearray  # a flag for each number: its event is stored
    problems: Counter[str] = field(default_factory=Counter)  # what - how many times
    examples: dict[str, str] = field(default_factory=dict)  # what - the first one

    def add(self, problem: str, example: object) -> None:
        """Notes that something is not as it should be."""
        self.problems[problem] += 1
        self.examples.setdefault(problem, canonical(example)[:200])


def canonical(value: object) -> str:
    """The same text for the same JSON. Comparing in Python would take true for 1."""
    return json.dumps(value, sort_keys=True)


def check(event: Any, run: Run, findings: Findings) -> None:
    """Compares a stored event with what was sent."""
    fields = event if isinstance(event, dict) else {}
    number = run.number(str(fields.get("event_id")))
    if number is None:
        if fields.get("source") == run.source:  # all others are none of our business
            findings.add("foreign", event)
    elif findings.met[number]:
        findings.add("stored more than once", event)
    else:
        findings.met[number] = 1
        sent = json.loads(run.event(number))
        if canonical({name: fields.get(name) for name in sent}) != canonical(sent):
            findings.add("altered", event)


async def read_back(service: Service, run: Run, after: int, findings: Findings) -> None:
    """Reads all that was stored behind `after` and checks what is of this run; raises RunFailed."""
    end = await service.last_seq()  # others may go on publishing for ever: their events can wait
    while after < end:
        path = f"/events?after={after}&limit={PAGE_EVENTS}"
        page, last_seq = await service.ask("GET", path, ("events", "last_seq"))
        for event in page:
            check(event, run, findings)
        if last_seq <= after:
            break  # nothing came, and it would not come the next time
        after = last_seq
    for number, met in enumerate(findings.met):
        if not met:
            findings.add("missing", run.event_id(number))


# --- Report ----------------------------------------------------------------------------------
# Progress goes to stderr, the report to stdout: `publisher.py > report.txt` still shows the bar.


@contextlib.asynccontextmanager
async def progress(
    label: str, tally: Tally, done: Callable[[], int], total: int
) -> AsyncIterator[None]:
    """Shows how far things are while its block runs: a bar on a terminal, lines elsewhere."""
    terminal = sys.stderr.isatty()

    def show(end: str) -> None:
        bar = f"\r[{'#' * (30 * done() // total):.<30}] " if terminal else ""
        text = f"{bar}{label} {done()} of {total} events, {tally.retries.total()} retries"
        print(text, end=end, file=sys.stderr, flush=True)

    async def keep_showing() -> None:
        while True:
            await asyncio.sleep(TERMINAL_SECONDS if terminal else LINES_SECONDS)
            show(end="" if terminal else "\n")

    task = asyncio.create_task(keep_showing())
    try:
        yield
    finally:
        task.cancel()
        if terminal:
            show(end="\n")


def report(settings: Settings, run: Run, tally: Tally, findings: Findings) -> str:
    """The report, its verdict last."""
    wall, cpu = tally.wall, tally.cpu
    events, requests, repeats = len(run.order), len(tally.latencies), len(run.order) - run.unique
    ordered = sorted(tally.latencies)  # of which the nearest rank is taken
    p50, p95, p99 = (ordered[math.ceil(requests * p / 100) - 1] * 1000 for p in (50, 95, 99))
    reasons = ", ".join(f"{count} x {why}" for why, count in tally.retries.most_common())
    lines = [
        f"Planned     {events} events: {run.unique} unique, {repeats} repeats",
        f"Answered    {tally.received} events: {tally.unique} new, {tally.duplicates} duplicates",
        f"Throughput  {events / wall:.0f} events/s, {requests / wall:.0f} requests/s, {wall:.2f} s",
        f"Latency     p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms (from first try to 202)",
        f"Retries     {reasons or 'none'}",
        f"Publisher   {cpu:.2f} s of CPU, {cpu / wall:.0%} of the time",
        f"Read back   {findings.met.count(1)} events of {run.source}",
    ]
    if (tally.unique, tally.duplicates) != (run.unique, repeats):
        known = tally.retries or settings.seed is not None
        stored = "some were stored already, by a try whose answer got lost or a run with this seed"
        lines.append(f"Note        not as planned: {stored if known else 'the service miscounts'}")
    lines += [f"Example     {problem}: {event}" for problem, event in findings.examples.items()]
    if findings.problems:
        counts = ", ".join(f"{count} {problem}" for problem, count in findings.problems.items())
        lines.append(f"Verdict: FAILED - of {run.unique} unique events: {counts}")
    else:
        outcome = f"{run.unique} unique events stored exactly once, {repeats} duplicates dropped"
        lines.append(f"Verdict: OK - {outcome}")
    return "\n".join(lines)


# --- Command line ----------------------------------------------------------------------------
# Exit status: 0 the verdict holds, 1 it does not or the run failed, 2 a setting makes no sense,
# 128 and the signal's number where one ended it.


async def simulate(settings: Settings) -> int:
    """Waits for the service, sends, reads back, reports; returns the exit status."""
    signals: list[int] = []
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def stop(number: int, _frame: object) -> None:
        signals.append(number)
        loop.call_soon_threadsafe(task.cancel)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    tally = Tally()
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=settings.concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),  # there are none, and looking for them takes time
        headers={"Authorization": f"Bearer {settings.api_token}"} if settings.api_token else None,
        timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
    )
    try:
        async with session:
            service = Service(session, settings, tally)
            print(f"Waiting for {settings.url}, {settings.wait:g} s at most", file=sys.stderr)
            await service.last_seq()  # not GET /: that is 503 from a failed commit until one works
            tally.retries.clear()  # waiting for it to start was not a trouble of the run
            run = plan(settings)
            # What is stored already can't be of a new run. A seed may have been sent before.
            after = await service.last_seq() if settings.seed is None else 0
            async with progress("Sent", tally, lambda: tally.received, settings.events):
                await publish(service, run)
            findings = Findings(bytearray(run.unique))
            async with progress("Read", tally, lambda: findings.met.count(1), run.unique):
                await read_back(service, run, after, findings)
    except RunFailed as error:
        print(f"publisher: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        name = signal.Signals(signals[0]).name
        print(f"publisher: ended by {name}, {tally.received} events acknowledged", file=sys.stderr)
        return 128 + signals[0]
    print(report(settings, run, tally, findings))
    return 1 if findings.problems else 0


OPTIONS = (  # name, variable, type, default, meaning
    ("url", "AGGREGATOR_URL", str, "http://localhost:8080", "where the service is"),
    ("events", "TOTAL_EVENTS", int, 5000, "how many to send in all"),
    ("duplicate_rate", "DUPLICATE_RATE", float, 0.2, "the share of them that are repeats"),
    ("batch_size", "BATCH_SIZE", int, 50, "events in a request"),
    ("concurrency", "CONCURRENCY", int, 8, "requests in flight at once"),
    ("rate", None, float, 0.0, "events a second; 0: as fast as it can"),
    ("seed", None, int, None, "a number, to make the same run each time"),
    ("wait", None, float, 30.0, "seconds without any success after which it gives up"),
    ("api_token", "API_TOKEN", str, None, "for a service that asks for one"),
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with 2."""
        self.exit(2, f"publisher: {message}\n")


def is_url(text: str) -> bool:
    """Whether requests can be sent there; a user name or a query would get lost on the way."""
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").encode("idna")
        http = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # a port that is none, brackets that do not match, a name too long
        return False
    return bool(http and host and not re.search(r"[\s?#@]", text))


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """A flag wins over its variable, and that over the default; exits with 2 on nonsense."""
    parser = Parser(prog="publisher.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, variable, kind, default, meaning in OPTIONS:
        hint = f"{meaning} (default: {default}{f', or {variable}' if variable else ''})"
        value = environment.get(variable or "") or default
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=value, help=hint)
    settings = Settings(**vars(parser.parse_args(arguments)))
    for good, rule in (
        (is_url(settings.url), "--url is http://host:port or https://host:port"),
        (1 <= settings.events <= MAX_EVENTS, f"--events is 1 to {MAX_EVENTS}"),
        (0 <= settings.duplicate_rate < 1, "--duplicate-rate is 0 or more, and below 1"),
        (1 <= settings.batch_size <= 10_000, "--batch-size is 1 to 10000"),
        (1 <= settings.concurrency <= 1_000, "--concurrency is 1 to 1000"),
        (0 <= settings.rate < math.inf, "--rate is 0 or more"),
        (0 <= settings.wait < math.inf, "--wait is 0 or more"),
        (re.fullmatch("[!-~]*", settings.api_token or ""), "--api-token is ASCII without spaces"),
    ):
        if not good:
            parser.error(rule)
    return settings


if __name__ == "__main__":
    sys.exit(asyncio.run(simulate(read_settings(sys.argv[1:], os.environ))))
