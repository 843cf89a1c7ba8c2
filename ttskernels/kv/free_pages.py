"""Which pages of a pool are free, and which of them are handed out next."""

from __future__ import annotations


class FreeStack:
    """Those given back last first: they were written before, so the system has committed their memory. Then fresh ones."""

    def __init__(self, used: bytearray):
        self._returned: list[int] = []
        self._fresh, self._pages = 0, len(used)  # pages from `_fresh` on were never taken

    @property
    def count(self) -> int:
        return self._pages - self._fresh + len(self._returned)

    def take(self, n: int, after: int | None) -> list[int]:
        again = max(0, len(self._returned) - n)
        pages = self._returned[again:]
        del self._returned[again:]
        fresh = self._fresh + n - len(pages)
        pages.extend(range(self._fresh, fresh))
        self._fresh = fresh
        return pages

    def give(self, pages: list[int]) -> None:
        self._returned.extend(pages)


class FreeRuns:
    """Pages that follow each other, and the one that they shall go on `after`, where there are such: kernels on a GPU read
    them as boxes of rows."""

    def __init__(self, used: bytearray):
        self._used, self.count = used, len(used)
        self._next = 0  # where to look for a run: behind the last one, so that what was begun has room to go on

    def take(self, n: int, after: int | None) -> list[int]:
        self.count -= n
        pages: list[int] = []
        at = len(self._used) if after is None else after + 1
        while len(pages) < n:
            if at >= len(self._used) or self._used[at]:
                at = self._run(n - len(pages))
            self._used[at] = 1
            pages.append(at)
            at += 1
        return pages

    def _run(self, n: int) -> int:
        """The first page of `n` free ones in a row, else of half as many, and so on."""
        while True:
            for start in (self._next, 0):
                if (at := self._used.find(bytes(n), start)) >= 0:
                    self._next = at + n
                    return at
            n //= 2

    def give(self, pages: list[int]) -> None:
        self.count += len(pages)
