"""A table on its way in: its configuration, its rows of quarantine, its counts, and what is put aside on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from pipeline.columns import Reason, nothing
from pipeline.filters import FilterConfig
from pipeline.forgotten import FILTER, ForgottenUsers
from pipeline.importers import Format, Kind
from pipeline.readers import ROW, Part, as_json
from schemas import tables
from schemas.errors import DataError

QUARANTINE = pl.DataFrame(tables.QUARANTINE.empty_table()).schema


class DataConfig(BaseModel):
    """Where the two tables are, how their columns are called, and what of them is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "my-data"
    format: Format = "table"
    """Whose files. ``table``: by ending .parquet, .csv, .tsv, .jsonl, .item and .inter (RecBole); text also .gz."""
    items: Path = Path("items.parquet")
    interactions: Path = Path("interactions.parquet")
    """A file, a folder of files, or a pattern such as ``logs/2024-*.csv.gz``."""
    item_columns: dict[str, str] = Field(default_factory=dict)
    """Our name = the file's name, for columns called otherwise there."""
    interaction_columns: dict[str, str] = Field(default_factory=dict)
    encoding: str = "utf-8"
    """Of text files, by Python's name for it."""
    download: Literal["movielens-100k"] | None = None
    """Fetch a public data set when ``items`` is not there."""
    unknown_items: Literal["drop", "error"] = "drop"
    """Interactions with an item that is not in the catalog: dropped and counted, or an error."""
    reject_share: float = Field(default=0.01, ge=0, le=1)
    """The run stops when more than this share of a table's rows is rejected."""
    filters: FilterConfig = FilterConfig()


@dataclass
class Intake:
    """One table on its way in: its rows of rejection and its counts."""

    kind: Kind
    config: DataConfig
    spool: Path
    forgotten: ForgottenUsers = field(default_factory=lambda: ForgottenUsers(()))
    rows_in: int = 0
    rejected: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    parts: int = 0

    def save(self, table: pl.DataFrame, name: str) -> None:
        """Put rows aside on the disk."""
        if not table.is_empty():
            self.parts += 1
            table.write_ipc(self.spool / f"{self.kind}-{name}-{self.parts:08}.arrow")

    def saved(self, name: str, schema: pl.Schema | None = None) -> pl.DataFrame:
        """All rows put aside under a name, mapped, not read. Raises DataError when their types contradict."""
        paths = sorted(self.spool.glob(f"{self.kind}-{name}-*.arrow"))
        found = [pl.DataFrame(pa.ipc.open_file(pa.memory_map(str(path))).read_all()) for path in paths]
        try:
            return pl.concat(found, how="diagonal_relaxed", rechunk=False) if found else pl.DataFrame(schema=schema)
        except pl.exceptions.PolarsError as error:
            raise DataError(f"the files of data.{self.kind} contradict each other in a type: {error}") from error

    def leave(self, name: str, rows: int) -> None:
        """Count rows that a filter takes out."""
        self.filtered[name] = self.filtered.get(name, 0) + rows

    def reject(self, path: Path, numbers: list[int], reasons: list[str], raws: list[str]) -> None:
        """Put rejected rows aside, but for those of forgotten users, which are counted with their events."""
        if self.kind == "interactions" and self.forgotten:
            kept = [place for place, raw in enumerate(raws) if not self.forgotten.in_row(raw)]
            self.leave(FILTER, len(raws) - len(kept))
            numbers = [numbers[place] for place in kept]
            reasons, raws = [reasons[place] for place in kept], [raws[place] for place in kept]
        self.rejected += len(numbers)
        data = [[str(path)] * len(numbers), numbers, reasons, raws]
        self.save(pl.DataFrame(data, schema=QUARANTINE, orient="col"), "rejected")

    def take(self, path: Path, part: Part) -> None:
        """Count a part and put what is no row aside."""
        self.rows_in += part.table.height + len(part.rejected) + sum(part.skipped.values())
        for name, rows in part.skipped.items():
            self.leave(name, rows)
        bad = part.rejected
        self.reject(path, [b.row for b in bad], [b.reason for b in bad], [b.raw for b in bad])

    def split(self, part: Part, clean: pl.DataFrame, reasons: list[Reason], path: Path) -> pl.DataFrame:
        """The rows of ``clean`` that no reason holds for; the others are put aside as they came, with the first."""
        # a Null column has one chunk, for which polars would copy all others
        given = [name for name, dtype in clean.schema.items() if dtype != pl.Null]
        wrong = clean[given].select(wrong=pl.any_horizontal(condition for condition, _ in reasons)).to_series()
        if not wrong.any():
            return clean
        first = pl.coalesce(pl.when(condition).then(pl.lit(why)) for condition, why in reasons)
        why = clean.select(first.alias(tables.REASON)).to_series()
        bad = part.given().filter(why.is_not_null())
        raws = [as_json(row) for row in bad.drop(ROW).rows(named=True)]
        self.reject(path, bad[ROW].to_list(), why.drop_nulls().to_list(), raws)
        return clean.filter(why.is_null())

    def check_share(self) -> None:
        """Raise DataError when too many rows were rejected, or there was none."""
        location = self.config.items if self.kind == "items" else self.config.interactions
        if not self.rows_in:
            raise DataError(f"{location}: holds no rows")
        if self.rejected <= self.config.reject_share * self.rows_in:
            return
        first = self.saved("rejected").sort(tables.FILE, tables.ROW).row(0, named=True)
        raise DataError(
            f"{first[tables.FILE]}: {self.rejected} of {self.rows_in} rows rejected, more than data.reject_share = "
            f"{self.config.reject_share}; first row {first[tables.ROW]}: {first[tables.REASON]}: "
            f"{first[tables.RAW][:120]}"
        )

    def check_sum(self, taken: int) -> None:
        """Every row that came in is out, quarantined or filtered."""
        assert self.rows_in == taken + self.rejected + sum(self.filtered.values()), f"{self.kind}: rows are lost"


def column_of(table: pl.DataFrame, name: str) -> pl.Series:
    """A column, or one of type Null when it is not there."""
    return table[name] if name in table.columns else nothing(name, table.height)


def require(table: pl.DataFrame, names: list[str], path: Path) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing and table.height:
        found = [name for name in table.columns if name != ROW]
        raise DataError(
            f"{path}: columns {missing} are missing; found {found}; map them under [data.item_columns] "
            f"or [data.interaction_columns]"
        )


def id_reason(column: pl.Series) -> Reason:
    """Where a cleaned id is none, as it is null or empty. column: as it came."""
    empty = (pl.col(column.name).is_null() | (pl.col(column.name) == "")).fill_null(True)
    return empty, f"{column.name} is no whole number" if column.dtype.is_float() else f"empty {column.name}"


def to_arrow(table: pl.DataFrame) -> pa.Table:
    """The Arrow form with plain string columns, as Parquet and every other reader expects."""
    arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest())
    plain = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}
    fields = [pa.field(name.name, plain.get(name.type, name.type)) for name in arrow.schema]
    return arrow.cast(pa.schema(fields))
