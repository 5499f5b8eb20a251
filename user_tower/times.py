"""Times of events as the towers read them.

Shapes: B histories, T positions, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TIME_BUCKETS = 34
_DAY = 86_400_000
_FIRST_YEAR, _YEARS = 1995, 64


def time_buckets(milliseconds: Tensor) -> Tensor:
    """int64 of the same shape: 0 up to one second, else 1 + log2 of the seconds, at most 33 (some 270 years)."""
    seconds = (milliseconds.abs() // 1000).clamp(min=1)
    return torch.where(seconds > 1, 1 + seconds.double().log2().long(), 0).clamp(max=TIME_BUCKETS - 1)


def calendar(milliseconds: Tensor) -> Tensor:
    """int64 [..., 5]: year since 1995 (0 to 63), month, day of the month, weekday, hour, each from 0, UTC."""
    days = torch.div(milliseconds, _DAY, rounding_mode="floor")
    hour = torch.div(milliseconds - days * _DAY, 3_600_000, rounding_mode="floor")
    # the calendar in eras of 400 years from 1 March of year 0, so that the leap day is the last one of a year
    shifted = days + 719_468
    era = torch.div(shifted, 146_097, rounding_mode="floor")
    of_era = shifted - era * 146_097
    year_of_era = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month_from_march = (5 * of_year + 2) // 153
    day = of_year - (153 * month_from_march + 2) // 5
    month = (month_from_march + 2) % 12
    year = year_of_era + era * 400 + (month <= 1)
    return torch.stack([(year - _FIRST_YEAR).clamp(0, _YEARS - 1), month, day, (days + 3) % 7, hour], dim=-1)


class TimeFeatures(nn.Module):
    """The time of an event as a vector: its calendar parts (paper, table 12) and the time since the event before.

    All start at zero, so that a part that training never met, such as a year that has just begun, says nothing.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        sizes = (_YEARS, 12, 31, 7, 24, TIME_BUCKETS)
        parts = [nn.Embedding(size, hidden) for size in sizes]
        for part in parts:
            nn.init.zeros_(part.weight)
        self.parts = nn.ModuleList(parts)

    def forward(self, times_BT: Tensor) -> Tensor:
        """times_BT: int64, milliseconds since 1970. Returns [B, T, H]."""
        before_BT = torch.cat([times_BT[:, :1], times_BT[:, :-1]], dim=1)
        numbers = torch.cat([calendar(times_BT), time_buckets(times_BT - before_BT)[..., None]], dim=-1)
        return torch.stack([part(numbers[..., n]) for n, part in enumerate(self.parts)]).sum(0)
