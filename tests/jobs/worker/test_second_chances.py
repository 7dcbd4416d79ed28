"""Second chances by themselves, with no model and no files: what is kept of an image is its item's number."""

import pytest

from cluster.work import Place, WorkerBrokenError
from flashu.errors import InputError, OutOfMemoryError
from jobs.worker.batches import ImageRequest
from jobs.worker.second_chances import SecondChances


class Device:
    """Makes batches of items as `fault(items)` lets it: what that returns is raised. Notes what it was given."""

    def __init__(self, fault=lambda items: None, batch_size=4, late=False):
        self.fault, self.late, self.given, self.ran, self.told = fault, late, [], [], []
        place = Place("worker-0", "node-0", 0.0, self.told.append)
        self.chances = SecondChances(self.begin, self.keep, batch_size, place)

    def begin(self, batch):
        items = [request.item for request in batch]
        self.given.append(items)
        if error := self.fault(items):
            raise error
        return Batch(not self.late)

    def keep(self, batch, pending):
        return [request.item for request in batch]

    def make(self, *batches, alone=()):
        requests = [[ImageRequest(item, {}, 0, 0, "", "", 5.0, 1) for item in batch] for batch in batches]
        outcome = self.chances.make(requests, alone, lambda items: self.ran.append(list(items)))
        return [image for _, image in outcome.made], outcome.failures


class Batch:
    def __init__(self, done):
        self.done = done

    def wait(self):
        self.done = True


def test_what_raises_for_a_reason_of_its_own_is_tried_alone_and_twice_and_told_with_its_traceback():
    device = Device(lambda items: ArithmeticError("odd") if 1 in items else None)
    assert device.make([0, 1, 2], [3]) == ([0, 2, 3], {1: "ArithmeticError: odd"})
    assert device.given == [[0, 1, 2], [0], [1], [1], [2], [3]]
    (told,) = device.told
    assert "ArithmeticError: odd" in told.text
    assert "worker-0" in told.text


def test_what_cannot_be_made_of_a_prompt_is_tried_once_and_told_in_a_line():
    device = Device(lambda items: InputError("no words") if items == [1] else None)
    assert device.make([0], [1], [2]) == ([0, 2], {1: "InputError: no words"})
    assert device.given == [[0], [1], [2]]
    assert device.told == []


def test_a_batch_that_does_not_fit_is_halved_and_later_ones_are_made_in_that_size():
    device = Device(lambda items: OutOfMemoryError("full") if len(items) > 2 else None)
    assert device.make([0, 1, 2, 3], [4, 5, 6]) == ([*range(7)], {})
    assert device.given == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6]]
    assert device.chances.batch_size == 2
    device.given.clear()
    device.make([7, 8, 9])
    assert device.given == [[7, 8], [9]]


def test_a_worker_without_room_for_one_image_is_broken_and_no_item_is_blamed():
    device = Device(lambda items: OutOfMemoryError("full"))
    with pytest.raises(WorkerBrokenError, match="full"):
        device.make([0, 1])
    assert device.told == []


def test_items_that_are_alone_have_no_batch_beside_them():
    device = Device(late=True)
    device.make([0, 1], [2], [3], alone={3})
    assert device.ran == [[0, 1], [0, 1, 2], [3]]
