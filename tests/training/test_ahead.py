"""Work that is done before its turn, by an engine whose workers wait until the test lets them go on."""

import threading
import time

import pytest

from emomerge.errors import RunFailed
from emomerge.training import RunSpec
from emomerge.training.ahead import Ahead

A, B = [RunSpec("a", "sens", 0, 4)], [RunSpec("b", "sens", 0, 4)]


class Worker:
    def __init__(self, function, argument):
        self.function, self.argument, self.let_go = function, argument, threading.Event()
        self.name = getattr(argument, "specs", argument)
        self.name = self.name if isinstance(self.name, str) else self.name[0].name

    def done(self):
        return self.let_go.is_set()

    def result(self):
        return self.function(self.argument)

    def cancel(self):
        self.let_go.set()


class Engine:
    max_parallel = 1

    def __init__(self):
        self.workers = []

    def submit(self, function, argument):
        self.workers.append(Worker(function, argument))
        return self.workers[-1]

    @property
    def names(self):
        return [worker.name for worker in self.workers]


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def make(engine, context):
    made = []

    def make(at_once=1, train=lambda job: None):
        made.append(Ahead(engine, context, train, at_once, lambda spec, row: None))
        return made[-1]

    yield make
    for ahead in made:
        ahead.close()


def until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def let_go(engine, name):
    until(lambda: name in engine.names)
    engine.workers[engine.names.index(name)].let_go.set()


def nothing(argument):
    return None


def fails(argument):
    return RunFailed("no")


def test_groups_come_before_jobs_and_one_follows_the_other_by_itself(engine, make):
    ahead, told = make(), []
    ahead.add_jobs(nothing, {"first": "first", "second": "second"}, told.append)
    until(lambda: engine.names == ["first"])
    ahead.add([A])
    let_go(engine, "first")
    until(lambda: engine.names == ["first", "a"])
    let_go(engine, "a")
    until(lambda: engine.names == ["first", "a", "second"])
    assert told == [], "only by the thread that calls"
    ahead.add([A])
    assert told == ["first"]
    ahead.add_jobs(nothing, {"first": "first"}, told.append)
    let_go(engine, "second")
    ahead.settle()
    assert told == ["first", "second"] and engine.names == ["first", "a", "second"], "nothing is done twice"


def test_a_group_that_no_worker_has_begun_is_taken_back(engine, make):
    ahead = make()
    ahead.add([A, B])
    until(lambda: engine.names == ["a"])
    assert not ahead.finish(B, iter(()))
    pieces = []

    def meanwhile():
        for number in range(3):
            pieces.append(number)
            yield
        engine.workers[0].let_go.set()

    assert ahead.finish(A, meanwhile())
    assert pieces == [0, 1, 2] and engine.names == ["a"]


def test_several_workers_work_at_once(engine, make):
    ahead = make(at_once=2)
    ahead.add([A])
    ahead.add([B])
    ahead.add_jobs(nothing, {"job": "job"}, lambda name: None)
    until(lambda: sorted(engine.names) == ["a", "b"])
    let_go(engine, "b")
    until(lambda: "job" in engine.names)
    let_go(engine, "a")
    let_go(engine, "job")
    assert ahead.finish(A, iter(())) and ahead.finish(B, iter(()))


def test_a_worker_that_had_nothing_to_do_begins_again(engine, make):
    ahead = make()
    ahead.add([A])
    let_go(engine, "a")
    assert ahead.finish(A, iter(()))
    ahead.add([B])
    let_go(engine, "b")
    assert ahead.finish(B, iter(()))


def test_errors_of_groups_are_raised_and_those_of_jobs_are_left_to_others(engine, make):
    ahead, told = make(train=fails), []
    ahead.add_jobs(fails, {"job": "job"}, told.append)
    let_go(engine, "job")
    ahead.add([A])
    let_go(engine, "a")
    with pytest.raises(RunFailed, match="no"):
        ahead.finish(A, iter(()))
    assert told == ["job"]


def test_jobs_that_have_not_begun_are_dropped_and_workers_end_when_closed(engine, make):
    ahead, told = make(), []
    ahead.add_jobs(nothing, {"one": "one", "two": "two"}, told.append)
    until(lambda: engine.names == ["one"])
    thread = threading.Timer(0.1, engine.workers[0].let_go.set)
    thread.start()
    ahead.settle()
    assert told == ["one"] and engine.names == ["one"]
    ahead.add([A])
    until(lambda: engine.names == ["one", "a"])
    ahead.close()
    assert engine.workers[1].let_go.is_set()
