"""Whose turn it is among clients that wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ktd.turns import Turns

CLIENTS = st.sampled_from("abc")
Item = tuple[str, int, int]  # client, rank, number


def order(turns: Turns, waiting: list[Item], running: list[str]) -> list[Item]:
    return turns.order(waiting, running, client=lambda item: item[0], rank=lambda item: item[1])


def test_one_client_is_served_in_order_of_arrival() -> None:
    waiting = [("a", 0, n) for n in range(9)]
    assert order(Turns(), waiting, ["a", "a"]) == waiting


def test_whoever_has_fewest_is_next() -> None:
    waiting = [("a", 0, 1), ("a", 0, 2), ("b", 0, 3), ("b", 0, 4), ("c", 0, 5)]
    assert [number for *_, number in order(Turns(), waiting, ["a"])] == [3, 5, 1, 4, 2]


def test_whoever_was_just_served_is_last_among_equals() -> None:
    """As where one is served at a time: nobody has any running when the next is chosen."""
    turns = Turns()
    waiting = [("a", 0, 1), ("a", 0, 2), ("b", 0, 3), ("b", 0, 4)]
    served = []
    while waiting:
        served.append(order(turns, waiting, [])[0])
        waiting.remove(served[-1])
        turns.serve(served[-1][0])
    assert "".join(client for client, *_ in served) == "abab"


def test_it_forgets_the_oldest() -> None:
    turns = Turns()
    for number in range(5000):
        turns.serve(str(number))
    assert len(turns._served) == 1024
    assert order(turns, [("4999", 0, 1), ("0", 0, 2)], []) == [("0", 0, 2), ("4999", 0, 1)]


@given(
    st.lists(st.tuples(CLIENTS, st.integers(0, 2)), max_size=12),
    st.lists(CLIENTS, max_size=5),
    st.lists(CLIENTS, max_size=5),
)
def test_serving_the_first_leaves_the_order_of_the_rest(
    asked: list[tuple[str, int]], running: list[str], before: list[str]
) -> None:
    turns = Turns()
    for client in before:
        turns.serve(client)
    waiting = [(client, rank, number) for number, (client, rank) in enumerate(asked)]
    line = order(turns, waiting, running)
    assert sorted(line) == sorted(waiting)
    assert [rank for _, rank, _ in line] == sorted(rank for _, rank, _ in line)
    while line:
        turns.serve(line[0][0])
        running = [*running, line[0][0]]
        waiting.remove(line[0])
        assert order(turns, waiting, running) == line[1:]
        line = line[1:]
