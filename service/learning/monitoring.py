"""The monitors of all models at work: predictions and labels are read as they come, alarms go out, policies follow.

It runs in the process that learns, beside the event loop, one step at a time; nothing of it is on the way of a request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from service.drift import alarms as alarm_rows
from service.drift import nowcasting
from service.drift.alarms import PAGE, PENDING, Alarms
from service.drift.defaults import default_monitors
from service.drift.monitors import (
    CHANGED,
    FRESH,
    RESET,
    STEP_ROWS,
    Cohorts,
    Monitor,
    Step,
    detector_of,
    spec_of,
    subject_of,
)
from service.drift.nowcasting import HIDDEN, OfLabels, Told
from service.drift.nowcasts import Nowcast
from service.drift.states import RAW, REFIT, ROLL_BACK, SERVED, SUSPEND, TELL, Alarm, Cause, MonitorSpec, MonitorState
from service.errors import AlreadyExists, CalserveError, InvalidRequest, NotFound, Refused, shown
from service.inference.model import ServedModel
from service.inference.repository import Repository
from service.learning.looking_back import Window, cause_of, window_of
from service.learning.policies import Policies
from service.learning.whole import to_its_end
from service.store import monitors as store
from service.store.database import Connection
from service.store.following import next_look
from service.store.journal import Journal
from service.store.monitors import forget_monitor, read_monitors, write_monitor

log = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT, OWN, OFF = "default", "own", "off"
"""What a server monitors: the default set and callers' own monitors; these alone; nothing."""
LOOK_SECONDS = 1.0
FEW_ROWS, FEW_SECONDS = 200, 5.0
"""Fewer rows are not read before so long: each step of a monitor is a row of the store, for its replay."""
MOST_BUSY = 0.3
"""Of the time, while there is more to read: what is served comes first."""
REST_SECONDS = 60.0
"""How long a monitor that failed is left alone."""
EXPLAINED_AFTER = (0, 200, 400, 800, 1600)
"""Rows that a monitor reads after its alarm before the cause is told, and told again by more labels."""
MOST_MONITORS = 32
"""Of one model."""
MOST_ROWS = 10_000_000
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
BEGINS_ANEW = {"detector", "watched", "parameters", "baseline_rows"}
"""What of a spec cannot change without the monitor's beginning anew."""

Key = tuple[str, str]


@dataclass
class _Watched:
    """A monitor that is loaded.

    Attributes
    ----------
    state : as it was after its last step, for whoever asks meanwhile
    open : its alarms that nobody has acknowledged
    rests_until : it failed, and is left alone
    stepped : when it read last
    """

    monitor: Monitor
    state: MonitorState
    open: tuple[str, ...]
    rests_until: float = 0.0
    stepped: float = 0.0

    def look(self) -> None:
        self.state = self.monitor.state(self.open)


@dataclass
class _Unexplained:
    """An alarm whose cause was told `turn` times; at the first its monitor had read so many rows of this subject."""

    alarm: Alarm
    turn: int = 0
    rows: int = 0
    subject: str = ""


class Monitoring:
    """The monitors of a server. Methods are for the event loop, but for `states` and `counts`.

    Attributes
    ----------
    listeners : told of each alarm with its first cause, in the event loop, and again at the next start while nobody
        has acknowledged it; none may wait
    alarm_counts : (model, monitor) -> alarms since the start
    """

    def __init__(
        self, journal: Journal, repository: Repository, policies: Policies, *, mode: str, wait_seconds: float
    ) -> None:
        self._journal, self._repository, self._policies = journal, repository, policies
        self._mode, self._wait_seconds = mode, wait_seconds
        self.alarms = Alarms(journal)
        self.listeners: list[Callable[[Alarm], None]] = []
        self.alarm_counts: Counter[Key] = Counter()
        self._specs: dict[Key, MonitorSpec | None] = {}  # None: one of the default set that was deleted
        self._watched: dict[Key, _Watched] = {}
        self._pending: dict[str, Alarm] = {}
        self._unexplained: dict[str, _Unexplained] = {}
        self._accuracies: dict[str, Nowcast] = {}
        self._busy = asyncio.Lock()
        self._changed = asyncio.Event()
        self._released = False
        self._is_read = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._mode != OFF:
            self._task = asyncio.create_task(self._run())

    def release(self) -> None:
        """End what watches: it would hold up the server's stop."""
        self._released = True
        self._tell_watchers()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def states(self) -> list[tuple[MonitorState, int]]:
        """Of every monitor, as it was after its last step; and the rows that it has passed since the start."""
        watched = [one for (_, name), one in list(self._watched.items()) if not name.startswith(HIDDEN)]
        return [(one.state, one.monitor.rows) for one in watched]

    def accuracies(self) -> list[tuple[str, Nowcast]]:
        """Of what each model serves now, without labels, as of the last look."""
        return list(self._accuracies.items())

    @to_its_end
    async def nowcasts(self, model: str) -> Told:
        """Of what a model serves."""
        async with self._ready():
            self._repository.get(model)
            rows, labels = (self._watched[model, kind].monitor.watching.detector for kind in nowcasting.KINDS)
            return await asyncio.to_thread(nowcasting.told, rows, labels, ringing=self._is_ringing(model))

    @to_its_end
    async def create(self, spec: MonitorSpec) -> MonitorState:
        async with self._ready():
            self._check(spec)
            if self._specs.get((spec.model, spec.name)) is not None:
                raise AlreadyExists(f"model {shown(spec.model)} has a monitor {shown(spec.name)}")
            if len(self._of(spec.model)) >= MOST_MONITORS:
                raise Refused(f"a model has {MOST_MONITORS} monitors at most; delete one first")
            return await self._begin(spec)

    @to_its_end
    async def get(self, model: str, name: str) -> MonitorState:
        async with self._ready():
            return self._find(model, name).state

    @to_its_end
    async def of_model(self, model: str) -> list[MonitorState]:
        async with self._ready():
            self._repository.get(model)
            return [watched.state for _, watched in self._of(model)]

    @to_its_end
    async def update(self, spec: MonitorSpec, fields: Iterable[str]) -> MonitorState:
        """Take these fields of the spec. Unless it is only policy and cool-down, the monitor begins anew."""
        async with self._ready():
            watched = self._find(spec.model, spec.name)
            before = watched.monitor.spec
            after = replace(before, **{name: getattr(spec, name) for name in fields})
            self._check(after)
            anew = any(getattr(before, name) != getattr(after, name) for name in BEGINS_ANEW)
            subject = self._subject(after)
            monitor = Monitor(self._journal, after, self._wait_seconds)
            monitor.rows = watched.monitor.rows

            def write(connection: Connection) -> None:
                _write_spec(connection, after)
                watched.monitor.turn(connection, FRESH if anew else CHANGED, subject if anew else "", after)

            await self._write(write)
            self._specs[spec.model, spec.name] = after
            return (await self._load(monitor)).state

    @to_its_end
    async def delete(self, model: str, name: str, by: str) -> None:
        """Forget a monitor; its alarm, if one is open, counts as acknowledged."""
        async with self._ready():
            watched = self._find(model, name)
            spec = watched.monitor.spec

            def write(connection: Connection) -> None:
                watched.monitor.reader.forget(connection)
                forget_monitor(connection, model, name)
                for alarm in watched.open:
                    alarm_rows.change(connection, model, alarm, acknowledged_by=by, acknowledged_ms=_now_ms())
                if spec.is_default:
                    write_monitor(connection, model, name, json.dumps({"model": model, "name": name, "deleted": True}))

            await self._write(write)
            del self._watched[model, name], self._specs[model, name]
            if spec.is_default:
                self._specs[model, name] = None
            self._tell_watchers()

    async def list_alarms(self, model: str, before: str = "", most: int = PAGE) -> list[Alarm]:
        """The last alarms of a model (empty: of all) before this one, newest first."""
        return await asyncio.to_thread(self.alarms.before, model, before, most)

    @to_its_end
    async def acknowledge(self, model: str, alarm: str, by: str, *, rebaseline: bool = False) -> Alarm:
        """Say that an alarm was seen: its monitor begins anew, with a new reference if asked to. Once is enough."""
        async with self._ready():
            seen = await asyncio.to_thread(self.alarms.get, model, alarm)
            if seen.acknowledged_ms:
                return seen
            watched = self._watched.get((model, seen.monitor))

            def write(connection: Connection) -> Alarm:
                if watched is not None:
                    watched.monitor.turn(connection, FRESH if rebaseline else RESET)
                return alarm_rows.change(connection, model, alarm, acknowledged_by=by, acknowledged_ms=_now_ms())

            seen = await self._write(write)
            if watched is not None:
                await self._load(watched.monitor)
            if alarm in self._pending:
                self._pending[alarm] = seen
            self._tell_watchers()
            return seen

    async def watch(self, model: str, after: str = "") -> AsyncIterator[Alarm]:
        """Each alarm as it comes, and again when anything about it changes; first those after this one, if it is named.

        What a reader has not taken yet waits in the store, however slow the reader is.
        """
        self._check_on()
        last, change = after, await asyncio.to_thread(self.alarms.last_change)
        while last:
            found, change = await asyncio.to_thread(self.alarms.after, model, last)
            for alarm in found:
                yield alarm
            last = found[-1].id if found else ""
        while not self._released:
            changed = self._changed
            found, change = await asyncio.to_thread(self.alarms.changed, model, change)
            for alarm in found:
                yield alarm
            if not found and not self._released:
                await changed.wait()

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except CalserveError as error:
                log.error("monitors see nothing now: %s", error.message)
            except Exception:
                log.exception("the monitors could not be looked after; it is tried again")
            await next_look(LOOK_SECONDS)

    async def look(self) -> None:
        """Read what has come since the last look, of every model that is served; carry out what alarms ask for."""
        async with self._ready():
            models = {model for model, _ in self._watched}
        for model in models:
            try:
                begun = time.monotonic()
                while await self._step(model):
                    await asyncio.sleep((time.monotonic() - begun) * (1 / MOST_BUSY - 1))
                    begun = time.monotonic()
            except CalserveError as error:
                log.error("the monitors of model %s see nothing now: %s", model, error.message)
        for untold in list(self._unexplained.values()):
            await self._explain(untold)
        for alarm in list(self._pending.values()):
            await self._act(alarm)

    async def _step(self, model: str) -> bool:
        """One step of each of a model's monitors, in one transaction; whether another is worth it at once."""
        async with self._ready():
            now = time.monotonic()
            watched = [w for (owner, _), w in self._watched.items() if owner == model and w.rests_until <= now]
            if not watched:
                return False
            active = self._repository.get(model).active.revision
            return await asyncio.to_thread(self._step_all, watched, active, asyncio.get_running_loop())

    def _step_all(self, watched: list[_Watched], active: str, loop: asyncio.AbstractEventLoop) -> bool:
        known: Cohorts = {}
        steps = [(one, step) for one in watched if (step := _try_step(one, known)) is not None]
        if not steps:
            return False
        try:
            alarms = self._journal.writer.write_now(partial(_write_steps, steps, active))
        except BaseException:
            for one, _ in steps:
                one.monitor.load()  # what was read and not written is read again
            raise
        for alarm in alarms:
            loop.call_soon_threadsafe(self._rang, alarm)
        for one, step in steps:
            one.monitor.written(step)
            one.stepped = time.monotonic()
            rang = (alarm.id for alarm in alarms if alarm.monitor == one.monitor.spec.name)
            one.open = tuple(dict.fromkeys([*one.open, *rang]))
            one.look()
        model = watched[0].monitor.spec.model
        rows, labels = (self._watched[model, kind].monitor.watching.detector for kind in nowcasting.KINDS)
        ringing = self._is_ringing(model)
        self._accuracies[model] = nowcasting.without_labels(rows, labels, ringing=ringing)
        if any(not alarm.repeats and self._is_of_labels(self._watched[model, alarm.monitor]) for alarm in alarms):
            self._begin_cohort(model)
        return any(sum(map(len, step.cohort.pairs)) >= STEP_ROWS for _, step in steps)

    def _begin_cohort(self, model: str) -> None:
        """Judge labels to come apart from those before the alarm."""
        monitor = self._watched[model, OfLabels.kind].monitor
        self._journal.writer.write_now(lambda connection: monitor.turn(connection, RESET))
        monitor.load()

    def _rang(self, alarm: Alarm) -> None:
        self._tell_watchers()
        if alarm.repeats:
            return
        log.warning(
            "model %s: monitor %s rang: %.3g reached %.3g, %d rows after the change is estimated to have come; %s",
            alarm.model, alarm.monitor, alarm.statistic, alarm.threshold, alarm.since_rows, alarm.id,
        )  # fmt: skip
        self.alarm_counts[alarm.model, alarm.monitor] += 1
        self._unexplained[alarm.id] = _Unexplained(alarm)
        if alarm.outcome.startswith(PENDING):
            self._pending[alarm.id] = alarm

    def _pass_on(self, alarm: Alarm) -> None:
        for listener in self.listeners:
            try:
                listener(alarm)
            except Exception:
                log.exception("an alarm could not be passed on")

    async def _act(self, alarm: Alarm) -> None:
        """Carry out what an alarm asks for, as far as that goes now, and write down what came of it."""
        outcome = await self._policies.carry_out(alarm, partial(self._window, alarm))
        if outcome != alarm.outcome:
            async with self._busy:
                alarm = await self._write(partial(_write_changes, alarm, {"outcome": outcome}))
            log.warning("%s of model %s, policy %s: %s", alarm.id, alarm.model, alarm.policy, outcome)
            self._tell_watchers()
        if outcome.startswith(PENDING):
            self._pending[alarm.id] = alarm
        else:
            self._pending.pop(alarm.id, None)

    async def _explain(self, asked: _Unexplained) -> None:
        """Say what is behind an alarm, by the labels that are there; say it again when there are more."""
        alarm = asked.alarm
        watched = self._watched.get((alarm.model, alarm.monitor))
        if watched is None:  # its model is not served, or it was deleted
            return
        monitor = watched.monitor
        if asked.turn == 0:
            asked.rows, asked.subject = monitor.rows, monitor.watching.subject
        if asked.turn == len(EXPLAINED_AFTER) or asked.subject != monitor.watching.subject:
            del self._unexplained[alarm.id]
            return
        if monitor.rows < asked.rows + EXPLAINED_AFTER[asked.turn]:
            return
        async with self._busy:
            found = await asyncio.to_thread(self._cause, monitor, alarm)
            if found is not None:
                alarm = await self._write(partial(_write_changes, alarm, {"cause": found}))
                self._tell_watchers()
        asked.turn += 1
        if asked.turn == 1:
            self._pass_on(alarm)

    def _cause(self, monitor: Monitor, alarm: Alarm) -> Cause | None:
        ringing = [one.monitor for _, one in self._of(alarm.model) if one.open]
        return cause_of(alarm, monitor, self._repository.get(alarm.model), ringing)

    def _window(self, alarm: Alarm) -> Window:
        watched, model = self._watched.get((alarm.model, alarm.monitor)), self._repository.get(alarm.model)
        if watched is None:
            raise NotFound(f"monitor {alarm.monitor} of model {shown(alarm.model)} is no more")
        return window_of(alarm, watched.monitor.reader, model)

    @asynccontextmanager
    async def _ready(self) -> AsyncIterator[None]:
        """Nobody else at work, and a loaded monitor for each that there is of a model that is served."""
        self._check_on()
        async with self._busy:
            if not self._is_read:
                for alarm in await asyncio.to_thread(self._read):
                    self._pass_on(alarm)
            models = self._served()
            for key in [key for key in self._watched if key[0] not in models]:
                del self._watched[key]
                self._accuracies.pop(key[0], None)
            for spec in [spec for model in models.values() for spec in self._unasked(model)]:
                if (spec.model, spec.name) not in self._specs:
                    await self._begin(spec)
            for key, found in list(self._specs.items()):
                if found is not None and key[0] in models:
                    await self._follow(found)
            yield

    def _check_on(self) -> None:
        if self._mode == OFF:
            raise Refused("this server has no monitors: it runs with --monitors off")

    def _read(self) -> list[Alarm]:
        """Go on where the store says; alarms that nobody has acknowledged, oldest first."""
        with self._journal.reading() as connection:
            rows = [json.loads(row) for row in read_monitors(connection)]
        for row in rows:
            self._specs[row["model"], row["name"]] = None if row.pop("deleted", False) else spec_of(row)
        self._pending = {alarm.id: alarm for alarm in self.alarms.pending()}
        self._is_read = True
        unseen = [alarm for alarm in self.alarms.before("", most=store.MOST_ALARMS) if not alarm.acknowledged_ms]
        self._unexplained = {alarm.id: _Unexplained(alarm) for alarm in unseen if alarm.cause is None}
        return [alarm for alarm in reversed(unseen) if alarm.cause is not None]

    def _unasked(self, model: ServedModel) -> list[MonitorSpec]:
        """What is read of a model whether or not anybody asks."""
        signals = model.input_signals.names if model.input_signals else ()
        of_default = default_monitors(model.name, signals) if self._mode == DEFAULT else []
        return [*nowcasting.specs(model.name), *of_default]

    def _served(self) -> dict[str, ServedModel]:
        """The newest version of each classifier."""
        found = {model.name for model in self._repository.models()}
        served = {name: self._repository.get(name) for name in found}
        return {name: model for name, model in served.items() if model.is_classifier}

    async def _follow(self, spec: MonitorSpec) -> None:
        """Load a monitor that is not; let it begin anew where another forecaster serves than it watches."""
        watched = self._watched.get((spec.model, spec.name))
        if watched is None:
            watched = await self._load(Monitor(self._journal, spec, self._wait_seconds))
        monitor, subject = watched.monitor, self._subject(spec)
        if monitor.watching.subject != subject:
            log.info("model %s: monitor %s begins anew, with what serves now", spec.model, spec.name)
            await self._write(lambda connection: monitor.turn(connection, FRESH, subject))
            await self._load(monitor)

    async def _begin(self, spec: MonitorSpec) -> MonitorState:
        monitor, subject = Monitor(self._journal, spec, self._wait_seconds), self._subject(spec)

        def write(connection: Connection) -> None:
            forget_monitor(connection, spec.model, spec.name)
            _write_spec(connection, spec)
            monitor.begin(connection, subject)

        await self._write(write)
        self._specs[spec.model, spec.name] = spec
        return (await self._load(monitor)).state

    async def _load(self, monitor: Monitor) -> _Watched:
        """Go on where the store says; anew, if the detector no longer knows its state."""
        spec = monitor.spec
        try:
            await asyncio.to_thread(monitor.load)
        except ValueError as error:
            log.warning("model %s: monitor %s begins anew: %s", spec.model, spec.name, error)
            await self._write(lambda connection: monitor.turn(connection, FRESH, self._subject(spec)))
            await asyncio.to_thread(monitor.load)
        is_open = await asyncio.to_thread(self.alarms.open_of, spec.model, spec.name)
        watched = self._watched[spec.model, spec.name] = _Watched(monitor, monitor.state(is_open), is_open)
        return watched

    def _of(self, model: str) -> list[tuple[str, _Watched]]:
        """A model's monitors by their names."""
        of_model = [(name, one) for (owner, name), one in self._watched.items() if owner == model]
        return sorted((name, one) for name, one in of_model if not name.startswith(HIDDEN))

    def _is_ringing(self, model: str) -> bool:
        """Whether an alarm by the labels of what is served is open."""
        return any(one.open and self._is_of_labels(one) for _, one in self._of(model))

    @staticmethod
    def _is_of_labels(one: _Watched) -> bool:
        """Whether a monitor holds labels against what is served."""
        return one.monitor.spec.watched == SERVED and one.monitor.watching.detector.labelled

    def _find(self, model: str, name: str) -> _Watched:
        self._repository.get(model)
        for own, watched in self._of(model):
            if own == name:
                return watched
        raise NotFound(f"model {shown(model)} has no monitor {shown(name)}")

    def _subject(self, spec: MonitorSpec) -> str:
        model = self._repository.get(spec.model)
        return subject_of(spec.watched, model.digest, model.active.revision)

    def _check(self, spec: MonitorSpec) -> None:
        """Refused or InvalidRequest unless there can be such a monitor."""
        if not self._repository.get(spec.model).is_classifier:
            raise Refused(f"model {shown(spec.model)} is no classifier: there is nothing to monitor")
        if not NAME.fullmatch(spec.name):
            raise InvalidRequest(
                f"a monitor's name is up to 63 of a-z, 0-9, - and _, a letter or number first, got {shown(spec.name)}"
            )
        for field, value, known in (
            ("watched", spec.watched, (RAW, SERVED)),
            ("policy", spec.policy, (TELL, SUSPEND, ROLL_BACK, REFIT)),
        ):
            if value not in known:
                raise InvalidRequest(f"{field} must be one of {', '.join(known)}, got {shown(value)}")
        for field, rows in (("cooldown_rows", spec.cooldown_rows), ("baseline_rows", spec.baseline_rows)):
            if not 0 <= rows <= MOST_ROWS:
                raise InvalidRequest(f"{field} must be in 0..{MOST_ROWS}, got {rows}")
        detector_of(spec)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        return await self._journal.writer.write(work)

    def _tell_watchers(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _try_step(one: _Watched, known: Cohorts) -> Step | None:
    """A monitor's step; one that fails keeps no other from its own, and is left alone for a while."""
    monitor = one.monitor
    is_due = time.monotonic() - one.stepped >= FEW_SECONDS
    try:
        return monitor.step(known, 1 if is_due else FEW_ROWS)
    except CalserveError:
        raise
    except Exception:
        log.exception("model %s: monitor %s failed; it is tried again later", monitor.spec.model, monitor.spec.name)
        one.rests_until = time.monotonic() + REST_SECONDS
        monitor.load()
        return None


def _write_steps(steps: Sequence[tuple[_Watched, Step]], active: str, connection: Connection) -> list[Alarm]:
    now = _now_ms()
    for one, step in steps:
        one.monitor.write(connection, step)
    return [
        alarm_rows.add(connection, one.monitor.spec, ring, active, now) for one, step in steps for ring in step.rings
    ]


def _write_spec(connection: Connection, spec: MonitorSpec) -> None:
    write_monitor(connection, spec.model, spec.name, json.dumps(asdict(spec), sort_keys=True))


def _write_changes(alarm: Alarm, changes: dict[str, Any], connection: Connection) -> Alarm:
    return alarm_rows.change(connection, alarm.model, alarm.id, **changes)


def _now_ms() -> int:
    return int(1000 * time.time())
