"""The ledger by which embed-items finds a text that kills workers.

An actor of its own: it imports neither torch nor transformers, so its process starts at once.
"""

from __future__ import annotations

from collections import Counter

from schemas.errors import EmbeddingError

MAX_DEATHS = 100


class Ledger:
    """Which batch each window is computing. A window that begins again lost its worker over that batch.

    The batch is then halved until one text is left; a text that two workers died of, alone, is not tried again.
    Rows are places in the window.
    """

    def __init__(self) -> None:
        self.current: dict[int, list[int]] = {}
        self.alone: Counter[tuple[int, int]] = Counter()
        self.done = 0
        self.deaths = 0

    def begin(self, window: int) -> tuple[list[list[int]], list[int]]:
        """Groups to try first, each by itself, and rows not to try. Raises EmbeddingError after 100 deaths."""
        batch = self.current.pop(window, [])
        if batch:
            self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise EmbeddingError(
                    f"{MAX_DEATHS} workers died while embedding; give them more memory, or lower embed.token_budget"
                )
        if len(batch) == 1:
            self.alone[window, batch[0]] += 1
        dead = [row for (of, row), count in self.alone.items() if of == window and count > 1]
        middle = len(batch) // 2
        halves = [batch[:middle], batch[middle:]] if middle else [batch]
        return [half for half in halves if half and half[0] not in dead], dead

    def attempt(self, window: int, rows: list[int]) -> None:
        """The window is about to compute these rows."""
        self.done += len(self.current.get(window, []))
        self.current[window] = rows

    def end(self, window: int) -> None:
        """The window is through."""
        self.done += len(self.current.pop(window, []))

    def progress(self) -> int:
        """Texts computed so far, those of lost workers counted twice."""
        return self.done
