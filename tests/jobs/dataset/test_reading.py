"""Files read side by side: taken in order, not too far ahead, and what cannot be read raised where its turn is."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.dataset.reading import AHEAD, in_order, read_each


def test_what_is_read_first_waits_for_its_turn():
    turn = threading.Event()

    def read(number):
        if number == 0:
            assert turn.wait(10)
        if number == 9:
            turn.set()
        return -number

    assert list(read_each(read, range(100), threads=10)) == [-number for number in range(100)]


def test_no_more_is_read_ahead_than_is_held():
    asked = []

    def numbers():
        for number in range(10 * AHEAD):
            asked.append(number)
            yield number

    taken = read_each(lambda number: number, numbers())
    assert next(taken) == 0
    assert len(asked) == AHEAD
    taken.close()
    assert len(asked) == AHEAD


def test_what_cannot_be_read_is_raised_after_what_comes_before_it_and_the_rest_is_left():
    read, taken = [], []

    def one(number):
        read.append(number)
        if number == 3:
            raise ValueError("damaged")
        return number

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="damaged"):
        taken.extend(in_order(pool, one, range(1000), 50))
    assert taken == [0, 1, 2]
    assert len(read) < 100
