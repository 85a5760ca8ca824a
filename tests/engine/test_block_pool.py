"""The bookkeeping of pages, and the names of their contents."""

from __future__ import annotations

import numpy as np
import pytest

from ktd.cache import BlockPool, LatentCache, page_key


def test_kept_pages_are_found_until_they_are_needed() -> None:
    pool = BlockPool(4)
    first = pool.allocate(2)
    for page, key in zip(first, (b"a", b"b"), strict=True):
        pool.name(page, key)
    pool.release(first)
    assert pool.free == 4
    assert pool.find([b"a", b"b", b"c"]) == first
    assert pool.find([b"c", b"a"]) == []
    pool.check_integrity([])
    others = pool.allocate(3)  # two empty ones, and the kept page that stands last in its text
    assert pool.find([b"a", b"b"]) == first[:1]
    pool.check_integrity([others])
    pool.allocate(1)
    assert pool.find([b"a"]) == []


def test_found_pages_do_not_count_as_fresh_ones() -> None:
    pool = BlockPool(3)
    pages = pool.allocate(2)
    pool.name(pages[0], b"a")
    pool.release(pages)
    shared = pool.find([b"a"])
    assert pool.can_allocate(2, shared)
    assert not pool.can_allocate(3, shared)
    pool.hold(shared)
    pool.hold(shared)
    pool.check_integrity([shared, shared])
    assert pool.free == 2
    pool.release(shared)
    assert pool.free == 2
    pool.release(shared)
    assert pool.free == 3


def test_the_same_contents_twice_are_named_once() -> None:
    pool = BlockPool(2)
    one, two = pool.allocate(2)
    pool.name(one, b"a")
    pool.name(two, b"a")
    pool.release([one])
    pool.release([two])
    assert pool.find([b"a"]) == [one]
    pool.check_integrity([])


@pytest.mark.parametrize("held", [[[0]], [[0, 1], [1]], []])
def test_integrity_check_sees_leaks_and_double_use(held: list[list[int]]) -> None:
    pool = BlockPool(3)
    pages = pool.allocate(2)
    assert sorted(pages) == [0, 1]
    with pytest.raises(RuntimeError, match="page holders"):
        pool.check_integrity(held)


def test_page_keys_depend_on_everything_before() -> None:
    first = page_key(b"", [1, 2, 3])
    assert first == page_key(b"", [1, 2, 3])
    keys = {first, page_key(b"", [1, 2, 4]), page_key(first, [1, 2, 3]), page_key(first, [1, 2])}
    assert len(keys) == 4


@pytest.mark.parametrize(("kind", "dtype", "one"), [("bf16", np.uint16, 0x3F80), ("f32", np.float32, 1.0)])
def test_a_layer_of_the_cache_is_a_view(kind: str, dtype: type, one: float) -> None:
    """For the CPU kernels, which take bfloat16 as its bits; from a cache line on."""
    cache = LatentCache(2, 3, 4, 5, kind)  # type: ignore[arg-type]
    (storage,) = cache.parts
    storage.fill(0)
    assert storage.ctypes.data % 64 == 0
    layer = cache.layer(1)
    assert layer.shape == (3, 4, 5)
    assert layer.dtype == dtype
    layer[2, 1, 0] = one
    assert storage[1, 2, 1, 0] == storage.sum() == one
