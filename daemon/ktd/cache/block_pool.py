"""Which pages of the cache are free, in use, or kept for a prompt that may come again. No tensors here."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Pages 0 … pages − 1 with reference counts.

    A page is in exactly one state:

        in use     ≥ 1 sequences hold it
        kept       no one holds it, but its contents have a key and may be found again
        empty      no one holds it and its contents mean nothing

    Kept pages count as free: they are given away, least recently used first, when no empty one is left.
    """

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._empty = list(range(pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._empty) + len(self._kept)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages whose contents have these keys, in order, up to the first that is not here. Changes
        nothing."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def can_allocate(self, count: int, shared: Sequence[int] = ()) -> bool:
        """Whether `count` fresh pages are there once the found pages `shared` are held too."""
        return count + sum(page in self._kept for page in shared) <= self.free

    def allocate(self, count: int) -> list[int]:
        """`count` fresh pages, each held once. Ask `can_allocate` first."""
        pages = []
        for _ in range(count):
            if self._empty:
                page = self._empty.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Holds found pages once more."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold on each page of a sequence, given from its first on.

        Its last pages are kept as the first to be given away: a prompt is found from its beginning.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._empty.append(page)

    def name(self, page: int, key: bytes) -> None:
        """Gives a full page in use its key. Where another page has that key already, this one stays
        unnamed."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Compares the counts with the pages that sequences hold. Raises RuntimeError saying what is
        wrong."""
        expected = Counter(page for pages in held for page in pages)
        counted = Counter({page: count for page, count in enumerate(self._holders) if count})
        if expected != counted:
            raise RuntimeError(f"page holders are {dict(counted)} where sequences hold {dict(expected)}")
        unused = sorted([*self._empty, *self._kept])
        if unused != sorted(set(range(self.total)) - set(expected)):
            raise RuntimeError(f"pages {unused} are free where {sorted(expected)} of {self.total} are in use")
        if {page: key for key, page in self._page_of.items()} != self._key_of:
            raise RuntimeError("page keys do not match their pages")
        if not set(self._kept) <= set(self._key_of) or set(self._empty) & set(self._key_of):
            raise RuntimeError("a kept page has no key, or an empty one has")
