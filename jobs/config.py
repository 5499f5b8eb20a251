"""The whole configuration: composed here, each part defined beside the code that it configures.

Values come from the shipped defaults, a TOML file, the environment (HLLM__TRAIN__EPOCHS=3), the variant of
the run's name, and ``--set train.epochs=3``; later ones win.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from item_tower.embed import EmbedConfig
from item_tower.encoder import EncoderConfig
from item_tower.prompt import TemplateConfig
from pipeline.ann import IndexConfig
from pipeline.cleanup import RetentionConfig
from pipeline.clicks import RankingConfig
from pipeline.evaluate import EvaluateConfig
from pipeline.gates import GateConfig
from pipeline.intake import DataConfig
from pipeline.joint import JointConfig
from pipeline.official import CheckpointConfig
from pipeline.release_gates import ReleaseGates
from pipeline.scale import Rates, Sizes
from pipeline.tracking import TrackingConfig
from schemas.errors import ConfigError
from user_tower.model import UserTowerConfig
from user_tower.train import TrainConfig

SHIPPED = Path(__file__).parent / "configs"


class ItemTowerConfig(BaseModel):
    """Which item tower is in force."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: str = "tuned"
    """``tuned``: the newest of tune-items; ``imported``: the newest of import-checkpoint; ``base``: ``encoder.model``
    as it is; or the id of a tower."""


class BenchConfig(BaseModel):
    """Sizes of the benchmarks that make up their data: retrieve, evaluate, fortnight, scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vectors: int = Field(default=100_000, gt=0)
    """N; the goal is set at 1,000,000."""
    queries: int = Field(default=10_000, gt=0)
    exact: bool = True
    """``bench retrieve`` also sets exact search against FAISS and torch; bfloat16 is slow on CPUs without it."""
    users: int = Field(default=20_000, gt=0)
    """Of ``bench evaluate``; the goal is set at 200,711 users and 126,871 vectors."""
    first_share: float = Field(default=0.7, gt=0, lt=1)
    """Of the events, delivered on the first night of ``bench fortnight``."""
    replay_users: int | None = Field(default=None, gt=0)
    """Users of ``bench fortnight``, at random, with the items that they met; by default all."""
    scale: Sizes = Sizes()
    """What ``bench scale`` is asked about."""
    rates: Rates = Rates()
    """Rates that ``bench scale`` takes as given; the others it measures."""
    recbole: bool = True
    """``bench evaluate`` also runs RecBole's full-sort evaluation, in an environment that it installs."""


class UsersConfig(BaseModel):
    """How embed-users works."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(default=256, gt=0)
    """Histories that go through the tower at once."""
    window: int = Field(default=16_384, gt=0)
    """Users of one unit of work, and of one row group of the table."""
    ray_from: int = Field(default=20_000, gt=0)
    """Users to compute from which Ray is started; fewer are done in this process."""


class RefreshConfig(BaseModel):
    """The nightly refresh."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "hllm"
    """Name of the registered model; its alias ``champion`` is what consumers follow."""
    train: Literal["never", "always", "auto"] = "auto"
    """``auto``: when there is no user tower of tonight's item tower, when the newest is older than ``train_days``, or
    when the events grew by ``train_share`` since it was trained."""
    train_days: float = Field(default=7.0, gt=0)
    train_share: float = Field(default=0.05, gt=0)
    lock: bool = True
    """Leave when another refresh of the same local store is running. It only saves work."""
    log: str = "refresh.jsonl"
    """JSON lines of the steps; a path, or a name in the store's folder."""
    metrics_file: str = "refresh.prom"
    """Prometheus text file; a path (node_exporter's textfile folder), or a name in the store's folder."""
    gates: ReleaseGates = ReleaseGates()


class Config(BaseSettings):
    """Every setting of every command; unknown keys are refused."""

    model_config = SettingsConfigDict(env_prefix="HLLM__", env_nested_delimiter="__", extra="forbid", frozen=True)

    store: str = Field(default="store", min_length=1)
    """The folder in which everything that the commands make lies, or a bucket: ``s3://``, ``gs://``, ``az://``."""
    name: str = "tuned-cache"
    """Name of the user tower and of its row in the tables."""
    data: DataConfig = DataConfig()
    template: TemplateConfig = TemplateConfig()
    encoder: EncoderConfig = EncoderConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    embed: EmbedConfig = EmbedConfig()
    gates: GateConfig = GateConfig()
    tune: JointConfig = JointConfig()
    user_tower: UserTowerConfig = UserTowerConfig()
    train: TrainConfig = TrainConfig()
    ranker: RankingConfig = RankingConfig()
    index: IndexConfig = IndexConfig()
    retention: RetentionConfig = RetentionConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    users: UsersConfig = UsersConfig()
    refresh: RefreshConfig = RefreshConfig()
    bench: BenchConfig = BenchConfig()
    tracking: TrackingConfig = TrackingConfig()
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Run name -> settings that differ under it, as dotted keys."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line before environment before TOML."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def _nest(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {parent} was set to {values!r} before; set it or its parts, not both")
    values[leaf] = value


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _explain(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "configuration"
    variable = "__".join(["HLLM", *(str(part) for part in first["loc"])]).upper()
    given = {name.upper(): (name, value) for name, value in os.environ.items()}
    if given.get(variable, ("", None))[1] == first.get("input"):
        source = f"environment, {given[variable][0]}"
    return f"{source}: {where}: {first['msg']} (got {first.get('input')!r:.80})"


def find_toml(name: str) -> Path:
    """The file of that path, or the shipped one of that name. Raises ConfigError."""
    for path in (Path(name), SHIPPED / name, SHIPPED / f"{name}.toml"):
        if path.is_file():
            return path
    shipped = sorted(path.name for path in SHIPPED.glob("*.toml"))
    raise ConfigError(f"--config {name}: no such file; shipped are {shipped}")


def local_store(config: Config) -> Path:
    """The store's path, for a bench, which makes others beside it. Raises ConfigError for a bucket."""
    if "://" in config.store:
        raise ConfigError(f"store = {config.store!r}: a bench runs in a local folder; --set store=bench-store")
    return Path(config.store)


def data_table(folder: str | Path, name: str) -> Path:
    """One of the two tables, ``items`` or ``interactions``, in a folder given by ``--data``. Raises ConfigError."""
    path = Path(folder).resolve() / f"{name}.parquet"
    if not path.is_file():
        raise ConfigError(f"--data {folder}: there is no {name}.parquet; it holds items and interactions")
    return path


def data_sets(folder: str, store: str) -> list[str]:
    """What ``--data FOLDER`` sets: its two tables, and a store of its own. Raises ConfigError."""
    name = Path(folder).resolve().name
    named = [f'data.{table}="{data_table(folder, table)}"' for table in ("items", "interactions")]
    return [f'data.name="{name}"', f'store="{store}-{name}"', *named]  # one catalog a store


def load_config(toml: str | None, name: str | None, sets: list[str]) -> Config:
    """The configuration of one command. Raises ConfigError naming file, key and value."""
    path = find_toml(toml) if toml else None
    for variable in os.environ:  # those of no section reach no model that could refuse them
        prefix, _, key = variable.upper().partition("__")
        section = key.partition("__")[0].lower()
        if prefix == "HLLM" and section not in Config.model_fields:
            raise ConfigError(
                f"environment, {variable}: there is no {section!r}; there are {list(Config.model_fields)}"
            )

    class FileConfig(Config):
        model_config = SettingsConfigDict(toml_file=path)

    source = str(path or "environment")
    try:
        values: dict[str, Any] = {"name": name} if name else {}
        for dotted, value in FileConfig(**values).variants.get(name or "", {}).items():
            _nest(values, dotted, value)
        for assignment in sets:
            dotted, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"--set {assignment}: expected key=value, such as train.epochs=3")
            _nest(values, dotted.strip(), _parse(text.strip()))
        source = f"--set {sets}" if sets else f"{source}, variants"
        loaded = FileConfig(**values)
        # a Config, which other processes can unpickle
        return Config.model_construct(loaded.model_fields_set, **dict(loaded))
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from error
    except SettingsError as error:
        raise ConfigError(
            f"environment: {error}; set its parts, as in HLLM__TRAIN__EPOCHS=3, and a list as JSON, as in "
            f"HLLM__TEMPLATE__FIELDS='[\"title\"]'"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
