"""How many images are made at once: what fits, what brings something, and that it is found once for a kind of GPU."""

import os
import threading

import pytest
import torch

from flashu.config import BATCH_SIZE
from flashu.errors import InputError, OutOfMemoryError
from jobs.settings.checks import check_batch_size
from jobs.worker.batch_size import (
    LARGEST,
    LONGEST_S,
    Knee,
    Trial,
    choose_batch_size,
    find_knee,
    fitting,
    remembered,
)

GB = 10**9


@pytest.mark.parametrize(
    ("one", "two", "available", "images"),
    [
        (10, 12, 20, 6),  # 10 for the first, 2 for each of five more
        (10, 12, 21.9, 6),
        (10, 12, 22, 7),
        (10, 12, 11, 1),
        (10, 12, 10, 1),
        (10, 12, 5, 1),  # too little even for one: that one will say so
        (10, 10, 12, LARGEST),  # a second image cost nothing
        (10, 9, 12, LARGEST),
        (1, 1.01, 1000, LARGEST),
    ],
)
def test_what_fits_follows_from_what_one_and_two_images_take(one, two, available, images):
    assert fitting(one * GB, two * GB, available * GB) == images


class Gpu:
    """Takes `overhead_s` for a batch and `image_s` for each image above `free` of them; has room for `room` images.

    `first_s` more for the first image, and for the first batch of several.
    """

    def __init__(self, overhead_s, image_s, room=1000, free=0, first_s=0.0):
        self.overhead_s, self.image_s, self.room, self.free = overhead_s, image_s, room, free
        self.first_s = {False: first_s, True: first_s}
        self.tried = []

    def __call__(self, images):
        self.tried.append(images)
        if images > self.room:
            raise OutOfMemoryError("out of memory")
        waited, self.first_s[images > 1] = self.first_s[images > 1], 0.0
        return Trial(waited + self.overhead_s + self.image_s * max(0, images - self.free), (10 + images) * GB)


def test_a_batch_grows_while_that_brings_images_per_second():
    assert find_knee(Gpu(1, 0.001), 1000 * GB).batch_size == LARGEST
    # 4 images take as long as one; from there on as much longer as there are more of them.
    saturated = Gpu(0.001, 0.5, free=0)
    assert find_knee(saturated, 1000 * GB).batch_size == 1
    assert saturated.tried == [1, 1, 2, 2], "it is found quickly"
    assert find_knee(Gpu(0.8, 0.2, free=4), 1000 * GB).batch_size == 4


def test_the_knee_is_the_smallest_batch_near_the_best_rate():
    seconds = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.95, 16: 4.0}
    knee = find_knee(lambda images: Trial(seconds[images], images * GB), 1000 * GB)
    assert knee.batch_size == 4  # 8 would bring 2.6%


def test_first_batches_which_compile_and_load_are_not_measured():
    assert find_knee(Gpu(0.001, 0.5, first_s=100), 1000 * GB).batch_size == 1
    assert find_knee(Gpu(0.8, 0.2, free=4, first_s=100), 1000 * GB).batch_size == 4


def test_memory_ends_it():
    assert find_knee(Gpu(1, 0.001), 22.5 * GB).batch_size == 12  # 10 GB and one for each image
    assert find_knee(Gpu(1, 0.001), 11 * GB).batch_size == 1
    assert find_knee(Gpu(1, 0.001, room=9), 1000 * GB).batch_size == 8  # more was taken than two had promised
    assert find_knee(Gpu(1, 0.001, room=1), 1000 * GB).batch_size == 1
    with pytest.raises(OutOfMemoryError):
        find_knee(Gpu(1, 0.001, room=0), 1000 * GB)


def test_no_batch_takes_so_long_that_its_worker_seems_dead():
    slow = Gpu(0.2 * LONGEST_S, 0.025 * LONGEST_S)
    find_knee(slow, 1000 * GB)
    assert max(slow.tried) == 16  # 8 take 0.4 of it, and twice that is allowed; 16 take 0.6


@pytest.mark.parametrize(
    ("gpu", "available", "ended"),
    [
        (Gpu(1, 0.001), 22.5 * GB, True),
        (Gpu(1, 0.001), 18 * GB, True),  # for 8, which were tried
        (Gpu(1, 0.001), 12 * GB, True),
        (Gpu(1, 0.001), 11 * GB, True),
        (Gpu(1, 0.001, room=9), 1000 * GB, True),
        (Gpu(1, 0.001, room=1), 1000 * GB, True),
        (Gpu(1, 0.001), 1000 * GB, False),  # the largest of all
        (Gpu(0.001, 0.5), 11 * GB, False),
        (Gpu(0.8, 0.2, free=4), 18 * GB, False),  # 8 brought nothing
        (Gpu(0.5 * LONGEST_S, 0.001), 12 * GB, False),  # more would take too long
    ],
)
def test_it_is_known_whether_memory_ended_it(gpu, available, ended):
    knee = find_knee(gpu, available)
    assert (knee.memory_ended_it, knee.available) == (ended, available)


def knee_of(batch_size, available=100 * GB, memory_ended_it=False):
    return Knee(batch_size, 11 * GB, 12 * GB, available, memory_ended_it)


def test_it_is_measured_once_for_a_kind_and_fits_into_less_memory_too(tmp_path):
    measured = []

    def measure():
        measured.append(1)
        return knee_of(32)

    assert remembered(tmp_path / "new", {"gpu": "A", "size": (64, 64)}, 100 * GB, measure) == knee_of(32)
    for available in (15 * GB, 1000 * GB):
        knee = remembered(tmp_path / "new", {"size": (64, 64), "gpu": "A"}, available, measure)
        assert (knee, len(measured)) == (knee_of(32), 1)
    assert (knee.within(1000 * GB), knee.within(15 * GB)) == (32, 5)
    remembered(tmp_path / "new", {"gpu": "B", "size": (64, 64)}, 100 * GB, measure)
    assert len(measured) == 2


def test_what_memory_ended_is_measured_anew_once_there_is_clearly_more(tmp_path):
    """Another process had most of the GPU, and is gone."""

    def found(available):
        gpu = Gpu(1, 0.001)
        knee = remembered(tmp_path, {"gpu": "A"}, available, lambda: find_knee(gpu, available))
        return knee.within(available), bool(gpu.tried)

    assert found(14 * GB) == (4, True)
    assert found(16 * GB) == (4, False)  # not worth it
    assert found(12 * GB) == (2, False)
    assert found(40 * GB) == (30, True)
    assert found(14 * GB) == (4, False)  # which is remembered though there is less again
    assert found(40 * GB) == (30, False)
    assert found(100 * GB) == (LARGEST, True)
    assert found(1000 * GB) == (LARGEST, False)  # memory did not end that


def test_workers_of_a_node_wait_for_the_first(tmp_path):
    measured, found = [], []

    def measure():
        measured.append(1)
        threading.Event().wait(0.3)
        return knee_of(4)

    def worker():
        found.append(remembered(tmp_path, {"gpu": "A"}, 100 * GB, measure))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(measured), found) == (1, [knee_of(4)] * 4)


def test_a_damaged_or_unwritable_cache_is_measured_anew(tmp_path):
    remembered(tmp_path, {"gpu": "A"}, GB, lambda: knee_of(4))
    (file,) = tmp_path.glob("*.json")
    older = '{"knee": {"batch_size": 3, "peak_of_one": 1, "peak_of_two": 2}}'  # of a version that did not say why
    for damage in ("{", "[]", '{"knee": {"batch_size": 3}}', older):
        file.write_text(damage)
        assert remembered(tmp_path, {"gpu": "A"}, GB, lambda: knee_of(8)).batch_size == 8
    (tmp_path / "file").write_text("")
    assert remembered(tmp_path / "file" / "below", {"gpu": "A"}, GB, lambda: knee_of(8)).batch_size == 8
    assert not [name for name in os.listdir(tmp_path) if name.endswith(str(os.getpid()))]


def test_without_cuda_nothing_is_tried():
    def generate(images):
        raise AssertionError("generated")

    assert choose_batch_size("auto", torch.device("cpu"), generate, {}) == BATCH_SIZE
    assert choose_batch_size(3, torch.device("cpu"), generate, {}) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_memory_of_one_more_image_is_measured(tmp_path):
    held = torch.cuda.mem_get_info()[1] // 20

    def generate(images):
        torch.empty(held * (1 + images), dtype=torch.uint8, device="cuda")
        torch.cuda._sleep(10**8)  # as long for many as for one

    found = choose_batch_size("auto", torch.device("cuda"), generate, {"model": "test"}, str(tmp_path))
    assert 10 <= found <= 18
    assert choose_batch_size("auto", torch.device("cuda"), None, {"model": "test"}, str(tmp_path)) == found


@pytest.mark.parametrize("value", [1, 64, 1000, "auto"])
def test_a_number_or_auto_is_a_batch_size(value):
    check_batch_size(value)


@pytest.mark.parametrize("value", ["many", "8", 0, -1, 2.5, True, None, [8]])
def test_anything_else_is_none(value):
    with pytest.raises(InputError, match=r"sampling.batch_size is .*; it must be a whole number, at least 1, or auto"):
        check_batch_size(value)
