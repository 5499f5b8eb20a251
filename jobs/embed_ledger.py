"""The ledger by which embed-items finds a text that kills workers.

An actor of its own: it imports neither torch nor transformers, so its process starts at once.
"""

from __future__ import annotations

from collections import Counter

from schemas.errors import EmbeddingError

MAX_DEATHS = 100
MAX_IDLE = 3  # deaths of one window before it came to a text
_TOKENISER = -1  # a stream of its own, whose rows are not computed yet


class Ledger:
    """Which batches each window is computing, one a stream, or tokenising. A window that begins again lost its
    worker over them, or before them.

    They are then halved until one text is left; a text that two workers died of, alone, is not tried again.
    Rows are places in the window.
    """

    def __init__(self) -> None:
        self.current: dict[int, dict[int, list[int]]] = {}
        self.alone: Counter[tuple[int, int]] = Counter()
        self.idle: Counter[int] = Counter()
        self.done = 0
        self.deaths = 0

    def begin(self, window: int) -> tuple[list[list[int]], list[int]]:
        """Groups to try first, each by itself, and rows not to try. Raises EmbeddingError after 100 deaths, or when
        a window lost three workers before its first text."""
        lost = self.current.get(window)
        batches = list((lost or {}).values())
        self.current[window] = {}
        if lost == {}:
            self.idle[window] += 1
        if self.idle[window] >= MAX_IDLE:
            raise EmbeddingError(
                f"{MAX_IDLE} workers died before their first text, while they loaded the item tower or read the "
                f"catalog; give them more memory, or lower embed.workers"
            )
        if batches:
            self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise EmbeddingError(
                    f"{MAX_DEATHS} workers died while embedding; give them more memory, or lower embed.token_budget"
                )
        if len(batches) == 1 and len(batches[0]) == 1:
            self.alone[window, batches[0][0]] += 1
        dead = [row for (of, row), count in self.alone.items() if of == window and count > 1]
        halves = [half for batch in batches for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :])]
        return [half for half in halves if half and half[0] not in dead], dead

    def tokenise(self, window: int, rows: list[int]) -> None:
        """The window is about to tokenise these rows; none: it is through with that."""
        streams = self.current.setdefault(window, {})
        streams.pop(_TOKENISER, None)
        if rows:
            streams[_TOKENISER] = rows

    def attempt(self, window: int, rows: list[int], stream: int) -> None:
        """The window is about to compute these rows; what it computed in this stream is done."""
        streams = self.current.setdefault(window, {})
        self.done += len(streams.get(stream, []))
        streams[stream] = rows

    def end(self, window: int) -> None:
        """The window is through."""
        self.done += sum(len(rows) for rows in self.current.pop(window, {}).values())

    def progress(self) -> int:
        """Texts computed so far, those of lost workers counted twice."""
        return self.done
