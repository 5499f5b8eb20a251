"""bench fortnight: 14 nightly refreshes over a data set replayed by time, faults on given nights, and what became of
each. Resumable: a fortnight that was interrupted goes on with the night that it was in.

After every refresh: does the champion open whole and answer, and if the night failed, is each of its files as before;
if a release was promoted, does it hold exactly the available items of the feed, and is the release before it whole.
After every night: were exactly the new and the changed texts embedded, each once.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import Config, find_toml, load_config, local_store
from jobs.context import inputs_hash
from jobs.fortnight_feed import NIGHTS, Replay, open_replay
from jobs.fortnight_night import Attempt, Ended, Serving, kept, refresh, roll_back, serving, stored_keys
from pipeline.files import exclusive, remove_folder, write_file
from pipeline.report import as_text, tables_page
from pipeline.store import Store
from schemas.errors import ConfigError, ReleaseError

STATE, REPORT = "fortnight.json", "fortnight.html"
METRIC = "the deciding metric"  # stands for evaluate.metric in PLAN
_GOOD = Attempt("promoted")
_NOBODY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
_PATIENCE = 2.0  # seconds between looks at a lock
_ALWAYS = ("refresh.train=always",)


@dataclass(frozen=True)
class Night:
    """What happens on a night, one refresh after another; rollback: an operator moves the alias back before it."""

    attempts: tuple[Attempt, ...] = (_GOOD,)
    rollback: bool = False

    @property
    def embeds(self) -> bool:
        """Whether the night gets as far as to publish a snapshot of its catalog."""
        return any(attempt.expect in ("promoted", "held") for attempt in self.attempts)


# nights that are not named are good ones
PLAN = {
    3: Night((Attempt("killed", fault="kill in embed-items", kill_at="embed-items"), _GOOD)),
    4: Night((Attempt("error", "Data", "empty feed", feed="empty feed"),)),
    6: Night(
        (Attempt("held", METRIC, "a training that wrecks the model", sets=(*_ALWAYS, "train.learning_rate=1.0")),)
    ),
    7: Night((Attempt("error", "DiskFull", "disk full in embed-items", child="disk-full:embed-items"), _GOOD)),
    8: Night(
        (
            Attempt("error", "Data", "item and time swapped", feed="swapped item and time"),
            Attempt("held", "unknown items", "user and item swapped", feed="swapped user and item"),
        )
    ),
    9: Night(
        (
            Attempt("held", "late events", "clock of the events goes back", feed="event clock back"),
            Attempt("promoted", fault="clock of the machine goes back", child="clock:3"),
        )
    ),
    10: Night((Attempt("error", "Tracking", "MLflow unreachable", environment=_NOBODY),)),
    11: Night(
        (
            Attempt("killed", fault="kill in train-user", kill_at="train-user", sets=_ALWAYS),
            Attempt("killed", fault="kill in evaluate", kill_at="evaluate", sets=_ALWAYS),
            Attempt("promoted", sets=_ALWAYS),
        )
    ),
    12: Night((Attempt("error", "Data", "file cut short", feed="corrupt file"),)),
    13: Night(rollback=True),
}


class Fortnight:
    """The nights of one store, and their rows so far."""

    def __init__(self, config: Config, toml: str, sets: list[str], replay: Replay, identity: str) -> None:
        self.root, self.config, self.replay = local_store(config), config, replay
        self.feed = self.root.with_name(f"{self.root.name}-feed")
        self._checkpoint = self.root.with_name(f"{self.root.name}-checkpoint")
        self._identity = identity
        own = [
            f'store="{self.root.resolve()}"',
            f'data.items="{(self.feed / "items.parquet").resolve()}"',
            f'data.interactions="{(self.feed / "interactions").resolve()}"',
        ]
        self._arguments = ["--config", toml, *(part for each in [*sets, *own] for part in ("--set", each))]
        self.rows = self._resume()

    @property
    def store(self) -> Store:
        """As it is now."""
        return Store(self.root)

    def _resume(self) -> list[dict[str, Any]]:
        """Rows of the finished nights; the store as it was after them. Raises ConfigError for a foreign store."""
        if self._checkpoint.exists():
            self._wait()
            shutil.rmtree(self.root, ignore_errors=True)
            shutil.copytree(self._checkpoint, self.root)
        state = self.root / STATE
        if not state.exists():
            if self.root.exists():
                raise ConfigError(f"store {self.root} is not of a fortnight; set store to a folder that is not there")
            self.root.mkdir(parents=True)
            self._save([])
            return []
        found = json.loads(state.read_text())
        if found["identity"] != self._identity:
            raise ConfigError(f"{state} is of other data or settings; set store to another folder, or remove it")
        rows: list[dict[str, Any]] = found["rows"]
        return rows

    def _wait(self) -> None:
        """Until the refresh of a fortnight that was killed has ended; it goes on by itself."""
        while self.root.exists():
            with exclusive(self.root / ".refresh.lock") as ours:
                if ours:
                    return
            print("waiting for the refresh of the fortnight before", file=sys.stderr, flush=True)
            time.sleep(_PATIENCE)

    def _save(self, rows: list[dict[str, Any]]) -> None:
        """The rows, and a copy of the store to go on from."""
        write_file(self.root / STATE, json.dumps({"identity": self._identity, "rows": rows}, indent=1).encode())
        aside = self._checkpoint.with_name(f"{self._checkpoint.name}-new")
        shutil.rmtree(aside, ignore_errors=True)
        if len(rows) < NIGHTS:
            shutil.copytree(self.root, aside)
        if self._checkpoint.exists():
            remove_folder(self._checkpoint)  # its name first: half of it must not be gone on from
        if len(rows) < NIGHTS:
            aside.rename(self._checkpoint)

    def run(self) -> None:
        """The nights that are left. Raises ReleaseError naming the first thing that is not as it must be."""
        for number in range(len(self.rows) + 1, NIGHTS + 1):
            row, problems = self._night(number, PLAN.get(number, Night()))
            for line in row["attempts"]:
                print(f"night {number}: {json.dumps(line)}", file=sys.stderr, flush=True)
            if problems:
                raise ReleaseError(f"night {number}: {'; '.join(problems)}; see {self.root}.err")
            self.rows.append(row)
            self._save(self.rows)
        shutil.rmtree(self.feed, ignore_errors=True)

    def _night(self, number: int, night: Night) -> tuple[dict[str, Any], list[str]]:
        catalog, window = self.replay.catalog(number), self.replay.window(number)
        before, problems, ended = serving(self.store, self.config.refresh.model), [], []
        if night.rollback:
            before, wrong = self._roll_back(before)
            problems += wrong
        for attempt in night.attempts:
            self.replay.write(self.feed, number, attempt.feed)
            ended.append(refresh(self.root, self._arguments, attempt))
            before, wrong = self._check(attempt, ended[-1], before, catalog.available)
            problems += wrong
        embedded, wrong = self._check_embedded(number, night, ended)
        problems += wrong
        row = {
            "night": number,
            "from": _day(window.first),
            "to": _day(window.last),
            "events": window.events,
            "users": window.users,
            **catalog.changes,
            "rollback": night.rollback,
            "attempts": [_attempt_row(a, e) for a, e in zip(night.attempts, ended, strict=True)],
            "embedded": embedded,
            "users_embedded": sum(each.result.get("users_embedded", 0) for each in ended),
            "metric": next((e.result["metrics"][self.config.evaluate.metric] for e in ended if _whole(e)), None),
            "champion": None if before is None else before.release,
            "seconds": round(sum(each.seconds for each in ended), 1),
        }
        return row, problems

    def _roll_back(self, before: Serving | None) -> tuple[Serving | None, list[str]]:
        """As an operator does, with the one command."""
        assert before is not None, "there is nothing to roll back"
        assert before.before is not None, "there is nothing to roll back to"
        wanted = kept(self.store, before.before)
        print(f"rollback: {roll_back(self._arguments)} s, the start of Python included", file=sys.stderr)
        now = serving(self.store, self.config.refresh.model)
        return now, [] if now == wanted else [f"after the rollback {now} serves, not {wanted}"]

    def _check(
        self, attempt: Attempt, ended: Ended, before: Serving | None, available: set[str]
    ) -> tuple[Serving | None, list[str]]:
        """What serves now, and what is wrong with that or with the attempt's end."""
        detail = self.config.evaluate.metric if attempt.detail == METRIC else attempt.detail
        what = attempt.fault or "good"
        problems = []
        if ended.outcome != attempt.expect:
            problems.append(f"{what}: {ended.outcome}, not {attempt.expect} ({ended.why or ended.result})")
        elif attempt.expect == "held" and detail not in ended.result["held_by"]:
            problems.append(f"{what}: held by {ended.why}, not by {detail}")
        elif attempt.expect == "error" and ended.result["kind"] != detail:
            problems.append(f"{what}: {ended.why}, not of kind {detail}")
        now = serving(self.store, self.config.refresh.model)
        if ended.outcome != "promoted":
            if now != before:
                problems.append(f"{what}: the champion was {before and before.release} and is not the same any more")
            return now, problems
        if now is None or now.release != ended.result["release"]:
            return now, [*problems, f"{what}: {ended.result['release']} does not serve"]
        if now.items != available:
            odd = sorted(now.items ^ available)[:3]
            problems.append(f"{what}: the index and the available items of the feed differ, as in {odd}")
        if before is not None and (now.before != before.release or kept(self.store, before.release) != before):
            problems.append(f"{what}: release {before.release} before it is not the same any more")
        return now, problems

    def _check_embedded(self, number: int, night: Night, ended: list[Ended]) -> tuple[int, list[str]]:
        """Texts embedded tonight, and what is wrong with that: the table holds the texts of all catalogs that got as
        far, each once."""
        template = self.config.template
        known: set[bytes] = set()
        for earlier in range(1, number):
            if PLAN.get(earlier, Night()).embeds:
                known |= self.replay.keys(earlier, template)
        wanted = known | self.replay.keys(number, template) if night.embeds else known
        rows, problems = stored_keys(self.store), []
        if len(rows) != len(wanted) or set(rows) != wanted:
            missing, more = len(wanted - set(rows)), len(rows) - len(wanted & set(rows))
            problems.append(f"embedded: {missing} texts have no vector, {more} vectors are not wanted or there twice")
        told = sum(each.result.get("embedded", 0) for each in ended)
        if all(_whole(each) for each in ended) and told != len(wanted) - len(known):
            problems.append(f"embedded: {told} by the refresh's own count, {len(wanted) - len(known)} are new")
        return len(rows) - len(known), problems


def _whole(ended: Ended) -> bool:
    return ended.outcome in ("promoted", "held")


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _attempt_row(attempt: Attempt, ended: Ended) -> dict[str, Any]:
    return {
        "fault": attempt.fault,
        "outcome": ended.outcome,
        "why": ended.why,
        "trained": ended.trained,
        "release": ended.result.get("release"),
        "seconds": ended.seconds,
        "steps": ended.steps,
    }


STEPS = ("prepare-data", "embed-items", "train-user", "build-index", "embed-users", "evaluate", "gates", "clean")


def _nights_table(rows: list[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    header = ["night", "events", "users", "new", "edited", "back", "gone", "embedded", "what happened", metric]
    cells = []
    for row in rows:
        counts = [str(row[key]) for key in ("events", "users", "new", "edited")]
        counts += [str(row["reverted"] + row["returned"]), str(row["withdrawn"]), str(row["embedded"])]
        told = ["rolled back"] if row["rollback"] else []
        for each in row["attempts"]:
            first, *more = each["why"].split(", ")
            why = f" ({first}{f' and {len(more)} more' if more else ''})" if each["outcome"] == "held" else ""
            told.append(f"{each['fault'] + ': ' if each['fault'] else ''}{each['outcome']}{why}")
        value = "" if row["metric"] is None else f"{row['metric']:.4f}"
        cells.append([f"{row['night']}, to {row['to']}", *counts, "; ".join(told), value])
    return header, cells


def _cost_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for row in rows:
        for each in row["attempts"]:
            steps = [f"{each['steps'][name]:.1f}" if name in each["steps"] else "" for name in STEPS]
            told = each["fault"] or each["outcome"]
            cells.append([f"{row['night']}, {told}", f"{each['seconds']:.1f}", *steps, each["trained"] or ""])
    return ["night", "seconds in all", *STEPS, "trained because"], cells


def _errors_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    failed = [(row, each) for row in rows for each in row["attempts"] if each["why"]]
    return ["night", "what it said"], [[f"{row['night']}, {each['fault']}", each["why"]] for row, each in failed]


def run(config: str, sets: list[str], data: str | None) -> dict[str, Any]:
    """Print what became of each night, write it as a page into the store; return its rows.

    data: a folder with items.parquet and interactions.parquet. Raises ConfigError, and ReleaseError for the first
    night that is not as it must be.
    """
    if data is None:
        raise ConfigError("bench fortnight: name a folder with items.parquet and interactions.parquet by --data")
    settings, folder = load_config(config, None, sets), Path(data).resolve()
    if settings.tracking.uri is not None:
        raise ConfigError(
            f"bench fortnight tracks in its own store; leave tracking.uri ({settings.tracking.uri}) out"
        )
    share, users = settings.bench.first_share, settings.bench.replay_users
    replay = open_replay(folder, settings.template.fields[0], share, users)
    fortnight = Fortnight(
        settings, str(find_toml(config)), sets, replay, inputs_hash(settings, str(folder), repr(PLAN))
    )
    fortnight.run()
    rows, metric = fortnight.rows, settings.evaluate.metric
    nights, cost, errors = _nights_table(rows, metric), _cost_table(rows), _errors_table(rows)
    notes = [
        f"{folder.name}: the first night has the first {share:.0%} of the events, the others an equal share of the "
        f"rest each, cut between two times: by calendar days the last nights would have hardly a user.",
        "embedded: texts that got a vector tonight, checked against the texts of the catalogs; edited texts that "
        "were there before (back) cost nothing.",
    ]
    sections = [("Nights", *nights), ("Seconds", *cost), ("Refused", *errors)]
    write_file(fortnight.root / REPORT, tables_page(f"A fortnight of {folder.name}", notes, sections).encode())
    for _, header, cells in sections[:2]:
        print(f"\n{as_text(header, cells)}", file=sys.stderr, flush=True)
    attempts = [each for row in rows for each in row["attempts"]]
    good = [
        e["seconds"] for row in rows[1:] for e in row["attempts"] if not e["fault"] and e["outcome"] == "promoted"
    ]
    return {
        "name": "fortnight",
        "data": folder.name,
        "rows": rows,
        "ends": {
            kind: sum(e["outcome"] == kind for e in attempts) for kind in ("promoted", "held", "error", "killed")
        },
        "ratio": {"night_over_first": round(statistics.median(good) / rows[0]["seconds"], 3)},
        "report": str(fortnight.root / REPORT),
    }
