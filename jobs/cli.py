"""The command line: ``hllm COMMAND``. Progress on stderr, one JSON object as the last line of stdout."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from jobs.memory import keep_pages, uncollected
from pipeline.files import disk_broken, disk_full, not_allowed
from schemas.errors import ConfigError, NotFoundError, PipelineError
from schemas.secrets import keep_secrets, redact

# command -> (what it does, does it take --snapshot, does it take --split)
COMMANDS = {
    "prepare-data": ("check both tables, quarantine bad rows, order events", False, False),
    "import-checkpoint": ("both towers from a checkpoint of the paper's own code", False, False),
    "tune-items": ("stage I: tune the Item LLM together with a small user tower", False, False),
    "embed-items": ("embed new and changed items, publish a snapshot", False, False),
    "train-user": ("stage II: train the user tower on a snapshot", True, False),
    "train-ranker": ("train a ranker, late or early fusion, on clicks and what was shown", True, False),
    "evaluate-ranker": ("AUC and log loss of the ranker called --name", True, True),
    "rank": ("click probabilities of given items for a user", True, False),
    "build-index": ("FAISS index over a snapshot", True, False),
    "evaluate": ("full-catalog recall and NDCG of the run called --name", True, True),
    "compare-runs": ("one table of the newest evaluation of each name", False, True),
    "recommend": ("items for a user, or after a list of items", True, False),
    "snapshots": ("list snapshots, show one, or clean up what is past retention", True, False),
    "export-items": ("the vectors of a snapshot as a plain Parquet file of float32 lists", True, False),
    "refresh": ("one night: everything above for what changed, then promote or hold", False, False),
    "releases": ("list releases, show one, promote one, or roll back to the one before", False, False),
    "embed-users": ("the vector of every user, computed where the history or a tower is new", True, False),
    "export-users": ("the newest user vectors as a plain Parquet file of float32 lists", False, False),
    "forget-user": ("take a user out of everything in the store, and keep the user out", False, False),
    "paper-table": ("the paper's comparison on one data set, a resumable command", False, False),
    "demo": ("every step above on the data of the configuration", False, False),
    "bench": ("a measurement by name", False, False),
}
HELD, INTERRUPTED = 3, 130
NIGHT = ("prepare-data", "embed-items", "train-user", "build-index", "embed-users", "evaluate")
PROTOCOLS = ("leave-last-out", "temporal", "sampled")


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(prog="hllm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (summary, snapshot, split) in COMMANDS.items():
        sub = commands.add_parser(command, help=summary, description=summary)
        sub.add_argument("--config", metavar="TOML", help="a file, or the name of a shipped one (demo.toml)")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
        if command not in ("demo", "bench", "paper-table"):
            sub.add_argument("--name", help="run name: a user tower's or ranker's, popularity or item-knn")
        if snapshot:
            sub.add_argument("--snapshot", help="snapshot id; by default the newest that fits")
        if split:
            sub.add_argument("--split", choices=("valid", "test"), default="test")
        if split and command != "evaluate-ranker":
            sub.add_argument(
                "--negatives", type=int, metavar="N", help="for sampled: random items beside each target"
            )
        if command in ("tune-items", "train-user", "train-ranker", "evaluate", "evaluate-ranker", "compare-runs"):
            sub.add_argument("--protocol", choices=PROTOCOLS, help="in place of evaluate.protocol")
    snapshots = commands.choices["snapshots"]
    snapshots.add_argument("action", choices=("list", "show", "clean"))
    imported = commands.choices["import-checkpoint"]
    imported.add_argument("--weights", metavar="PATH", help="in place of checkpoint.weights")
    for export in ("export-items", "export-users"):
        commands.choices[export].add_argument("--out", required=True, metavar="PARQUET", help="file to write")
    commands.choices["embed-users"].add_argument(
        "--everyone", action="store_true", help="take no vector over from the table before"
    )
    releases = commands.choices["releases"]
    releases.add_argument("action", choices=("list", "show", "promote", "rollback"))
    releases.add_argument("--release", metavar="ID", help="by default the champion, for show")
    commands.choices["forget-user"].add_argument(
        "--user", help="an id as in the feed; without it, finish what was begun and look for what came since"
    )
    refresh = commands.choices["refresh"]
    refresh.add_argument("--dry-run", action="store_true", help="say what would be done")
    refresh.add_argument("--until", choices=NIGHT, help="end after this step; the next run goes on from there")
    embed = commands.choices["embed-items"]
    embed.add_argument("--plan", action="store_true", help="say what would be embedded, and embed nothing")
    embed.add_argument("--allow-full", action="store_true", help="embed most of the catalog again without a question")
    recommend = commands.choices["recommend"]
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="a user of the data set")
    who.add_argument("--items", help="item ids, oldest first, with commas between")
    recommend.add_argument("--k", type=int, default=10, help="how many items")
    recommend.add_argument("--blocklist", metavar="FILE", help="item ids that are not recommended, one a line")
    rank = commands.choices["rank"]
    rank.add_argument("--user", required=True, help="a user of the data set; an unknown one has no history")
    rank.add_argument("--items", required=True, help="the items to rank, ids with commas between")
    table = commands.choices["paper-table"]
    table.add_argument("--data", metavar="FOLDER", help="holds items.parquet and interactions.parquet")
    table.add_argument("--budget-minutes", type=float, default=60, help="for the grid of each trained row")
    table.add_argument("--only", metavar="ROW,ROW", help="some rows of the table")
    kinds = (
        *("seeds", "grid", "embed", "train", "cache", "ingest", "retrieve", "evaluate"),
        *("rank", "fortnight", "gpu", "scale"),
    )
    bench = commands.choices["bench"]
    bench.add_argument("bench", choices=kinds)
    bench.add_argument(
        "--data", metavar="FOLDER", help="for train, fortnight: holds items.parquet and interactions.parquet"
    )
    return parser


def _bench(name: str, config: str | None, sets: list[str], data: str | None) -> Callable[[], dict[str, Any]]:
    if name == "train":
        train = importlib.import_module("jobs.bench_train")
        return lambda: train.run(config or ("paper-table.toml" if data else "demo.toml"), sets, data)
    if name == "fortnight":
        fortnight = importlib.import_module("jobs.bench_fortnight")
        return lambda: fortnight.run(config or "fortnight.toml", sets, data)
    if data is not None:
        raise ConfigError(f"--data {data}: bench {name} takes its data from --config")
    benches = importlib.import_module("jobs.bench").BENCHES
    return lambda: benches[name](config or "demo.toml", sets)


def _require_sense(context: Any, options: dict[str, Any]) -> None:
    store, looks = context.store, options["command"] in ("snapshots", "releases", "forget-user")
    if looks and "://" not in store.url and not store.root.exists():
        raise NotFoundError(f"there is no store at {store.url}; prepare-data makes one")
    if options.get("negatives") is not None and context.config.evaluate.protocol != "sampled":
        raise ConfigError("--negatives is for --protocol sampled; every other ranks the whole catalog")


def _job(arguments: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """The work of the parsed command, nothing imported before it is needed."""
    options = vars(arguments)
    command, config, sets = options["command"], options["config"], [*options["sets"]]
    own: dict[str, Any]
    sets += [f"evaluate.{key}={options[key]}" for key in ("protocol", "negatives") if options.get(key) is not None]
    if options.get("weights") is not None:
        sets.append(f"checkpoint.weights={json.dumps(options['weights'])}")
    if command == "demo":
        return lambda: importlib.import_module("jobs.demo").run(config or "demo.toml", sets)
    if command == "paper-table":
        own = {"data": options["data"], "budget_minutes": options["budget_minutes"], "only": options["only"]}
        table = importlib.import_module("jobs.paper_table")
        return lambda: table.run(config or "paper-table.toml", sets, **own)
    if command == "bench":
        return _bench(options["bench"], config, sets, options["data"])
    module = importlib.import_module(f"jobs.{command.replace('-', '_')}")
    context = importlib.import_module("jobs.context").Context(
        importlib.import_module("jobs.config").load_config(config, options["name"], sets)
    )
    _require_sense(context, options)
    own = {key: options[key] for key in ("snapshot", "split") if key in options}
    own |= {
        key: options[key] for key in ("action", "out", "everyone", "release", "dry_run", "until") if key in options
    }
    if command == "forget-user":
        own = {"user": options["user"]}
    if command == "embed-items":
        own = {"plan_only": options["plan"], "allow_full": options["allow_full"]}
    if command in ("recommend", "rank"):
        items = (options["items"] or "").split(",")
        own |= {"user": options["user"], "items": [item.strip() for item in items]}
    if command == "recommend":
        own |= {"k": options["k"], "blocklist": options["blocklist"]}
    return lambda: module.run(context, **own)


def _quiet() -> None:
    """Keep libraries from writing between the progress bars. What fails still says so."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _stay_local() -> None:
    """A Ray session of this machine alone listens on the loopback address alone; Ray reads this when it is imported.

    Without it Ray listens on every address, and whoever reaches a port can run code (docs.ray.io, Security).
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _fail(message: str, kind: str) -> None:
    line = redact(" ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    print(json.dumps({"error": line, "kind": kind}))


class _OneLine:
    """A block whose known errors end in one line and a status; anything else keeps its traceback."""

    status = 0

    def __enter__(self) -> _OneLine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            return False
        if isinstance(error, KeyboardInterrupt):
            self.status = INTERRUPTED
            _fail("interrupted; what was finished is kept, run the command again to go on", "Interrupted")
            return True
        known = error if isinstance(error, PipelineError) else None
        known = known or disk_full(error) or disk_broken(error) or not_allowed(error)
        if known is None:
            return False
        self.status = 1
        _fail(str(known), known.kind)
        return True


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a known error, 2 usage (argparse), 3 held, 130 interrupted; else a traceback."""
    arguments = build_parser().parse_args(argv)
    _quiet()
    keep_secrets()
    _stay_local()
    keep_pages()
    with _OneLine() as outcome:
        with uncollected():
            job = _job(arguments)
        result = job()
        print(redact(json.dumps(result)), flush=True)
        outcome.status = HELD if result.get("held_by") else 0
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
