"""What decides whether a release is promoted: figures against limits, and a paired test against the champion.

Shapes: U users that both releases were asked about.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.metrics import FloatArray, bootstrap_means

Verdict = Literal["pass", "hold", "undecided", "first"]


class ReleaseGates(BaseModel):
    """Limits; a figure beyond one holds the release."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_left_out: float = Field(default=0.01, ge=0, le=1)
    """Share of the catalog without a vector."""
    max_catalog_change: float = Field(default=0.3, ge=0)
    """Change of the number of available items since the champion, as a share of it."""
    max_text_change: float = Field(default=0.5, ge=0)
    """Change of the mean length of a rendered text in characters, as a share of it."""
    max_interactions_lost: float = Field(default=0.01, ge=0, le=1)
    """Share of the champion's interactions that are no longer there."""
    max_unknown_items: float = Field(default=0.1, ge=0, le=1)
    """Share of events whose item the catalog does not have, of all and of those that came since the champion."""
    max_late_events: float = Field(default=0.2, ge=0, le=1)
    """Share of the events that came since the champion which are more than a day older than its newest one."""
    max_metric_loss: float = Field(default=0.005, ge=0)
    """Non-inferiority margin of evaluate.metric: the lower end of the paired interval must lie above minus this."""
    max_slice_loss: float = Field(default=0.02, ge=0)
    """The same margin for each slice; the slices' p values are corrected together (Holm 1979)."""
    min_users: int = Field(default=200, gt=0)
    """Users below which the paired comparison decides nothing."""
    undecided: Literal["hold", "promote"] = "hold"
    """What happens with a release on which the comparison decides nothing."""
    min_index_recall: float = Field(default=0.9, ge=0, le=1)
    """Share of the exact neighbours that the index finds."""
    max_age_days: float | None = Field(default=None, gt=0)
    """Age of the newest event; None: only that it is not older than the champion's."""
    significance: float = Field(default=0.05, gt=0, lt=1)
    samples: int = Field(default=2000, gt=0)
    """Bootstrap resamples."""


@dataclass(frozen=True)
class Gate:
    """One line of the verdict table. value None: it was not measured; limit: how it reads, such as ``<= 0.3``."""

    name: str
    value: float | None
    limit: str
    verdict: Verdict
    note: str = ""

    def row(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def at_most(name: str, value: float | None, limit: float, note: str = "") -> Gate:
    """Pass up to the limit; a value that there is nothing to compare with passes as ``first``."""
    verdict: Verdict = "first" if value is None else "pass" if value <= limit else "hold"
    return Gate(name, None if value is None else round(value, 6), f"<= {limit:g}", verdict, note)


def at_least(name: str, value: float | None, limit: float, note: str = "") -> Gate:
    """Pass from the limit on."""
    verdict: Verdict = "first" if value is None else "pass" if value >= limit else "hold"
    return Gate(name, None if value is None else round(value, 6), f">= {limit:g}", verdict, note)


def change(now: float | None, then: float | None) -> float | None:
    """|now - then| / then; None where there is nothing to compare."""
    if now is None or then is None:
        return None
    return abs(now - then) / then if then else float(now > 0)


def non_inferior(name: str, candidate: FloatArray, champion: FloatArray, margin: float, config: ReleaseGates) -> Gate:
    """The paired primary metric of [U] users each: the lower 95 % end of candidate - champion against -margin."""
    limit = f"> {-margin:g}"
    if len(candidate) < config.min_users:
        note = f"{len(candidate)} users on which both can be asked, {config.min_users} are needed"
        return Gate(name, None, limit, "undecided", note)
    difference = candidate - champion
    means = bootstrap_means(difference[:, None], config.samples)[:, 0]
    low, high = np.quantile(means, [0.025, 0.975])
    note = f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}], {len(difference)} users"
    return Gate(name, round(float(low), 6), limit, "pass" if low > -margin else "hold", note)


def slices_not_worse(
    members: dict[str, tuple[FloatArray, FloatArray]], margin: float, config: ReleaseGates
) -> list[Gate]:
    """A gate for each slice that is worse by more than the margin, after Holm's correction; one that says how many
    were looked at. members: label -> (candidate, champion), [u] each."""
    tested = {}
    for label, (candidate, champion) in members.items():
        if len(candidate) >= config.min_users:
            difference = candidate - champion
            means = bootstrap_means(difference[:, None], config.samples)[:, 0]
            # how likely a loss of no more than the margin looks, if the slice were worse by less than it
            chance = (1 + int((means > -margin).sum())) / (1 + config.samples)
            tested[label] = (float(difference.mean()), chance)
    worse, ordered = [], sorted(tested.items(), key=lambda item: item[1][1])
    for place, (label, (mean, chance)) in enumerate(ordered):
        if chance > config.significance / (len(ordered) - place):
            break
        worse.append(Gate(f"slice {label}", round(mean, 6), f"> {-margin:g}", "hold", f"p {chance:.4f}, Holm"))
    note = f"{len(tested)} of {len(members)} slices have {config.min_users} users"
    return [*worse, Gate("slices", float(len(worse)), "<= 0", "hold" if worse else "pass", note)]


def held_by(gates: list[Gate], config: ReleaseGates) -> list[str]:
    """Names of the gates that hold the release."""
    holding = {"hold"} | ({"undecided"} if config.undecided == "hold" else set())
    return [gate.name for gate in gates if gate.verdict in holding]
