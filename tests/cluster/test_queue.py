"""The shard queue's rules one by one, on a clock that the tests turn; and all at once, with unreliable workers."""

import random
import sys
from dataclasses import dataclass, field

import pytest

from cluster.queue import WAIT, ShardQueue
from cluster.work import Lease

CRASH = "the worker died"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    def make(num_shards, committed=(), **options):
        return ShardQueue(num_shards, committed, clock=clock, **options)

    return make


def begin(queue, worker, items=()):
    """Lease a shard and start on it."""
    lease = queue.lease(worker)
    assert queue.start(lease.id)
    queue.running(lease.id, items)
    return lease


def commit(queue, lease):
    queue.processed(lease.id)
    return queue.may_commit(lease.id) and queue.committed(lease.id, lease.shard)


def crash(queue, worker):
    queue.worker_lost(worker, CRASH, blame=True)


# ------------------------------------------------------------------------------------------------------ giving out


def test_shards_are_given_out_in_order_and_each_once(make):
    queue = make(5)
    leases = [queue.lease(worker) for worker in ("a", "b", "a", "b", "c")]
    assert [lease.shard for lease in leases] == [0, 1, 2, 3, 4]
    assert len({lease.id for lease in leases}) == 5
    assert {lease.attempt for lease in leases} == {1}


def test_committed_shards_are_skipped(make):
    queue = make(5, committed=[0, 2, 4])
    assert queue.remaining == 2
    assert [queue.lease("a").shard, queue.lease("a").shard] == [1, 3]


def test_a_run_that_is_all_committed_has_nothing_to_give(make):
    assert make(2, committed=[0, 1]).lease("a") is None


def test_a_worker_may_hold_the_next_shard_while_it_runs_one(make):
    queue = make(2)
    first, held = begin(queue, "a"), queue.lease("a")
    assert (first.shard, held.shard) == (0, 1)
    assert commit(queue, first)
    assert queue.start(held.id)


def test_idle_workers_wait_while_others_work_and_leave_when_all_is_done(make):
    queue = make(1)
    lease = begin(queue, "a")
    assert queue.lease("b") is WAIT
    assert commit(queue, lease)
    assert queue.lease("b") is None


def test_after_a_stop_nothing_is_given_out_and_what_was_only_held_is_not_begun(make):
    queue = make(5)
    running, held = begin(queue, "a"), queue.lease("a")
    queue.stopped = True
    assert queue.lease("b") is None
    assert not queue.start(held.id)
    assert commit(queue, running)
    assert (queue.remaining, queue.in_flight) == (4, 0)


# ----------------------------------------------------------------------------------------------- lost and failed


def test_a_dead_workers_leases_go_back_before_anything_new(make):
    queue = make(4)
    begin(queue, "a")
    queue.lease("a")
    crash(queue, "a")
    assert queue.in_flight == 0
    assert [(lease.shard, lease.attempt) for lease in (queue.lease("b"), queue.lease("b"), queue.lease("b"))] == [
        (0, 2),
        (1, 1),
        (2, 1),
    ]


def test_items_in_flight_at_the_last_allowed_death_are_run_alone(make):
    queue = make(1, max_attempts=3)
    for death in range(3):
        assert begin(queue, f"w{death}", items=[10, 11]).alone == frozenset()
        crash(queue, f"w{death}")
    assert queue.lease("x").alone == {10, 11}


def test_an_item_that_kills_twice_when_alone_is_given_up_and_the_rest_is_kept(make):
    queue = make(1, max_attempts=1)
    begin(queue, "a", items=[10, 11])
    crash(queue, "a")
    for worker in ("b", "c"):
        lease = begin(queue, worker, items=[10])
        assert lease.alone == {10, 11}
        crash(queue, worker)
    lease = begin(queue, "d", items=[11])
    assert (lease.alone, lease.given_up) == ({11}, {10: CRASH})
    assert commit(queue, lease)
    assert (queue.remaining, queue.abandoned) == (0, {})


def test_a_shard_that_fails_without_an_item_to_blame_is_abandoned(make):
    queue = make(2, max_attempts=2)
    for _ in range(4):
        lease = queue.lease("a")
        assert lease.shard == 0
        queue.start(lease.id)
        queue.failed(lease.id, "cannot encode")
    assert queue.abandoned == {0: "cannot encode"}
    assert (queue.lease("a").shard, queue.remaining) == (1, 1)


def test_a_lost_node_is_nobodys_fault(make):
    queue = make(1, max_attempts=1)
    for number in range(20):
        lease = begin(queue, f"w{number}", items=[10])
        assert (lease.alone, lease.given_up) == (frozenset(), {})
        queue.worker_lost(f"w{number}", "the node is gone", blame=False)
    assert (queue.abandoned, queue.lease("x").attempt) == ({}, 21)


def test_a_shard_that_was_only_held_is_not_blamed_for_the_one_that_ran(make):
    queue = make(2, max_attempts=1)
    for number in range(8):
        running = begin(queue, f"w{number}", items=[number])
        assert running.shard == 0
        assert queue.lease(f"w{number}").shard == 1
        crash(queue, f"w{number}")
    assert queue.abandoned == {}
    assert [queue.lease("x").attempt for _ in range(2)] == [9, 1]


def test_reading_that_kills_every_worker_ends_in_an_abandoned_shard(make):
    queue = make(1, max_attempts=3)
    for number in range(6):
        assert queue.lease(f"w{number}").shard == 0
        crash(queue, f"w{number}")
    assert (queue.abandoned, queue.lease("x")) == ({0: CRASH}, None)


def test_a_failure_of_a_lease_that_was_taken_back_changes_nothing(make):
    queue = make(1, max_attempts=1)
    lease = begin(queue, "a")
    crash(queue, "a")
    queue.failed(lease.id, "late")
    assert queue.lease("b").attempt == 2
    assert queue.abandoned == {}


# --------------------------------------------------------------------------------------------------------- silence


def test_a_worker_that_says_nothing_for_too_long_is_silent(make, clock):
    queue = make(2, lease_timeout_s=10)
    lease = begin(queue, "a")
    clock.now = 9
    queue.running(lease.id, [1])
    clock.now = 19
    assert queue.silent() == []
    clock.now = 20
    (silence,) = queue.silent()
    assert (silence.worker, silence.shard, silence.seconds) == ("a", 0, 11)


def test_a_held_lease_is_not_silent_while_its_worker_is_busy(make, clock):
    queue = make(2, lease_timeout_s=10)
    running = begin(queue, "a")
    queue.lease("a")
    for clock.now in range(0, 100, 5):
        queue.running(running.id, [clock.now])
        assert queue.silent() == []
    assert commit(queue, running)
    clock.now += 11  # it never starts what it holds
    assert [silence.shard for silence in queue.silent()] == [1]


def test_results_that_wait_for_storage_are_not_silent_nor_are_those_queued_behind_them(make, clock):
    queue = make(3, lease_timeout_s=10)
    writing, behind = begin(queue, "a"), begin(queue, "a")
    queue.processed(writing.id)
    queue.processed(behind.id)
    queue.lease("a")
    for clock.now in range(0, 100, 5):
        queue.alive(writing.id)
        assert queue.silent() == []


def test_a_hung_lease_is_noticed_though_the_same_worker_writes_another(make, clock):
    queue = make(2, lease_timeout_s=10)
    writing, hung = begin(queue, "a"), begin(queue, "a")
    queue.processed(writing.id)
    clock.now = 11
    queue.alive(writing.id)
    assert [silence.shard for silence in queue.silent()] == [1]
    assert hung.shard == 1


# --------------------------------------------------------------------------------------- idle workers, slow shards


def test_an_idle_worker_takes_over_what_a_busy_one_only_holds(make):
    queue = make(2)
    begin(queue, "a")
    held = queue.lease("a")
    taken = queue.lease("b")
    assert taken.shard == held.shard == 1
    assert queue.start(taken.id)
    assert not queue.start(held.id)
    assert queue.run_again == 0
    assert queue.lease("c") is WAIT


def test_a_holder_that_starts_first_keeps_its_lease(make):
    queue = make(2)
    begin(queue, "a")
    held, taken = queue.lease("a"), queue.lease("b")
    assert queue.start(held.id)
    assert not queue.start(taken.id)


def test_what_a_worker_is_about_to_start_is_left_to_it(make):
    queue = make(1)
    held = queue.lease("a")
    assert queue.lease("b") is WAIT
    assert queue.start(held.id)


def test_when_the_one_that_took_a_held_lease_over_dies_the_holder_runs_it(make):
    queue = make(2)
    begin(queue, "a")
    held, taken = queue.lease("a"), queue.lease("b")
    assert queue.start(taken.id)
    crash(queue, "b")
    assert queue.start(held.id)
    assert queue.lease("c") is WAIT


def test_a_busy_worker_takes_nothing_over(make):
    queue = make(3)
    begin(queue, "a")
    begin(queue, "b")
    queue.lease("a")
    assert queue.lease("b") is WAIT


def test_no_lease_is_shared_without_hedging(make, clock):
    queue = make(3, hedge=False)
    assert commit(queue, begin(queue, "b"))
    begin(queue, "a")
    queue.lease("a")
    clock.now = 1e6
    assert queue.lease("b") is WAIT


@pytest.fixture
def straggling(make, clock):
    """A queue whose last shard takes too long in the hands of `slow`."""
    queue = make(6)
    slow = begin(queue, "slow")
    for clock.now in (10, 20, 30, 40, 50):
        lease = begin(queue, "quick")
        clock.now += 10
        assert commit(queue, lease)
    return queue, slow


def test_only_a_straggler_is_given_out_a_second_time(make, clock):
    queue = make(2)
    lease = begin(queue, "quick")
    begin(queue, "slow")
    clock.now = 10
    assert commit(queue, lease)
    clock.now = 20
    assert queue.lease("quick") is WAIT
    clock.now = 20.1  # more than twice the median
    assert queue.lease("quick").shard == 1
    assert queue.lease("third") is WAIT


def test_of_two_leases_on_a_straggler_the_first_to_ask_commits(straggling):
    queue, slow = straggling
    second = begin(queue, "quick")
    assert (second.shard, queue.run_again) == (slow.shard, 1)
    assert queue.may_commit(second.id)
    assert not queue.may_commit(slow.id)
    assert queue.committed(second.id, second.shard)
    assert (queue.remaining, queue.in_flight) == (0, 0)


def test_if_the_one_that_may_commit_dies_the_shard_goes_to_another(straggling):
    queue, slow = straggling
    second = begin(queue, "quick")
    assert queue.may_commit(second.id)
    queue.worker_lost("quick", "the node is gone", blame=False)
    assert queue.may_commit(slow.id)
    assert queue.committed(slow.id, slow.shard)


def test_the_loser_of_two_leases_is_not_counted_as_a_commit(straggling):
    queue, slow = straggling
    second = begin(queue, "quick")
    assert commit(queue, slow)
    assert not queue.may_commit(second.id)
    assert not queue.committed(second.id, second.shard)


def test_a_commit_after_its_lease_was_taken_back_counts_once(make):
    queue = make(1)
    late = begin(queue, "a")
    assert queue.may_commit(late.id)
    queue.worker_lost("a", "no sign of life", blame=True)
    again = begin(queue, "b")
    assert queue.committed(late.id, late.shard)
    assert queue.remaining == 0
    assert not queue.may_commit(again.id)
    assert not queue.committed(again.id, again.shard)


def test_a_commit_of_an_abandoned_shard_takes_the_abandonment_back(make):
    queue = make(1, max_attempts=1)
    late = begin(queue, "a")
    assert queue.may_commit(late.id)
    crash(queue, "a")
    queue.failed(queue.lease("b").id, "cannot read")
    assert queue.abandoned
    assert queue.committed(late.id, late.shard)
    assert (queue.abandoned, queue.remaining) == ({}, 0)


# ------------------------------------------------------------------------------------------------------- the crowd


ITEMS = 6  # in each shard


@dataclass
class SimulatedWorker:
    name: str
    held: Lease | None = None
    lease: Lease | None = None
    batches: list = field(default_factory=list)
    writing: Lease | None = None
    hung: bool = False


class Crowd:
    """Workers as in `cluster.worker`, but a step at a time, which die, hang and fail at random until all is done."""

    def __init__(self, seed, num_shards=40, num_workers=5):
        self.random = random.Random(seed)
        self.clock = Clock()
        self.queue = ShardQueue(num_shards, lease_timeout_s=20, clock=self.clock)
        self.killer = self.random.randrange(num_shards * ITEMS)
        self.reports = []
        self.given_up = {}
        self.made = 0
        self.workers = [self.hire() for _ in range(num_workers)]

    def hire(self):
        self.made += 1
        return SimulatedWorker(f"w{self.made}")

    def run(self):
        while self.queue.remaining:
            self.clock.now += 0.2
            for position in range(len(self.workers)):
                if self.step(self.workers[position]):
                    self.workers[position] = self.hire()
            for silence in self.queue.silent():
                crash(self.queue, silence.worker)
                names = [worker.name for worker in self.workers]
                self.workers[names.index(silence.worker)] = self.hire()
            living = {worker.name for worker in self.workers}
            assert {holding.worker for holding in self.queue._holdings.values()} <= living
            assert self.clock.now < 5000, "the run does not end"

    def step(self, worker):
        """One thing that a worker does. Whether it died of it."""
        chance = self.random.random()
        if worker.hung:
            return False
        if chance < 0.004:
            self.queue.worker_lost(worker.name, "the node is gone", blame=False)
            return True
        if chance < 0.005:
            worker.hung = True
            return False
        action = self.random.choice([self.prefetch, self.process, self.process, self.write])
        return bool(action(worker))

    def prefetch(self, worker):
        alone = (worker.lease or worker.writing) and (worker.lease or worker.writing).attempt > 1
        if worker.held is None and not alone:
            lease = self.queue.lease(worker.name)
            if isinstance(lease, Lease):
                if self.random.random() < 0.02:
                    self.queue.failed(lease.id, "cannot read")
                else:
                    worker.held = lease

    def process(self, worker):
        if worker.lease is None:
            if worker.held and not (worker.held.attempt > 1 and worker.writing):
                lease, worker.held = worker.held, None
                if self.queue.start(lease.id):
                    worker.lease, worker.batches = lease, batches(lease)
        elif worker.batches:
            items = worker.batches.pop(0)
            self.queue.running(worker.lease.id, items)
            if self.killer in items:
                crash(self.queue, worker.name)
                return True
        elif worker.writing is None:
            worker.writing, worker.lease = worker.lease, None
            self.queue.processed(worker.writing.id)
        return False

    def write(self, worker):
        if lease := worker.writing:
            worker.writing = None
            if self.random.random() < 0.02:
                self.queue.failed(lease.id, "cannot encode")
            elif self.queue.may_commit(lease.id) and self.queue.committed(lease.id, lease.shard):
                self.reports.append(lease.shard)
                self.given_up.update(lease.given_up)


def batches(lease):
    items = [item for item in range(lease.shard * ITEMS, (lease.shard + 1) * ITEMS) if item not in lease.given_up]
    together = [item for item in items if item not in lease.alone]
    return [together[start : start + 4] for start in range(0, len(together), 4)] + [
        [item] for item in items if item in lease.alone
    ]


@pytest.mark.parametrize("seeds", [range(start, start + 50) for start in (0, 50, 100, 150)], ids=lambda seeds: seeds[0])
def test_a_crowd_that_dies_hangs_and_fails_commits_every_shard_once_and_gives_up_the_killer_alone(seeds):
    for seed in seeds:
        crowd = Crowd(seed)
        crowd.run()
        assert sorted(crowd.reports) == list(range(40)), seed
        assert crowd.given_up.keys() == {crowd.killer}, seed
        assert crowd.queue.abandoned == {}, seed
        assert crowd.queue.in_flight == 0, seed


def test_memory_does_not_grow_with_finished_shards(make):
    queue = make(100_000)

    def size():
        return sum(sys.getsizeof(value) for name, value in vars(queue).items() if name != "_finished")

    def work(shards):
        for number in range(shards):
            lease = begin(queue, "a", items=[1, 2])
            if number % 10 == 0:  # some in trouble, which is over when they are done
                queue.failed(lease.id, "cannot encode")
                lease = begin(queue, "a")
            assert commit(queue, lease)

    work(1_000)
    before = size()
    work(20_000)
    assert size() <= before + 2_000  # a deque keeps a block more or less
    assert sys.getsizeof(queue._finished) < 110_000
