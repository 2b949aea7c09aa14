"""The queue: nothing is lost, nothing comes out of order, whatever fails and when."""

import threading
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.tracking import async_queue
from fedmeta.tracking.async_queue import AsyncQueue, batches, deliver


class Number(NamedTuple):
    value: int


class Word(NamedTuple):
    value: int


EVENTS = st.lists(st.builds(lambda kind, value: kind(value), st.sampled_from([Number, Word]), st.integers()))


@given(EVENTS, st.integers(1, 4))
def test_batches_keep_the_order_and_are_of_one_type(events, size):
    parts = list(batches(events, size))
    assert [event for part in parts for event in part] == events
    assert all(len(part) <= size and len({type(event) for event in part}) == 1 for part in parts)


@given(EVENTS, st.lists(st.booleans(), max_size=30))
def test_what_fails_stays_in_order(events, failures):
    sent, left = [], events
    for _ in range(len(failures) + 1):

        def send(batch):
            if failures and failures.pop():
                raise ConnectionError("gone")
            sent.extend(batch)

        left, _ = deliver(left, send)
    for kind in (Number, Word):
        pending = [event for event in left if type(event) is kind]
        assert [event for event in sent if type(event) is kind] + pending == [e for e in events if type(e) is kind]


def test_other_types_are_tried_after_a_failure():
    sent = []

    def send(batch):
        if type(batch[0]) is Number:
            raise ConnectionError("no numbers")
        sent.extend(batch)

    left, error = deliver([Number(1), Word(2), Number(3)], send)
    assert (left, sent) == ([Number(1), Number(3)], [Word(2)])
    assert isinstance(error, ConnectionError)


@pytest.mark.slow
def test_everything_arrives_in_the_end():
    sent, failures = [], [True, False, True]
    notices = []

    def send(batch):
        if failures and failures.pop():
            raise ConnectionError("gone for a moment")
        sent.extend(batch)

    queue = AsyncQueue(send, notices.append)
    for value in range(3000):
        queue.put([Number(value)])
    assert queue.close() == []
    assert sent == [Number(value) for value in range(3000)]
    assert notices, "a failure is reported"


def test_a_full_batch_is_sent_before_its_time():
    arrived = threading.Event()
    queue = AsyncQueue(lambda batch: arrived.set(), lambda error: None)
    queue.put(Number(value) for value in range(async_queue.BATCH - 1))
    assert not arrived.is_set()
    queue.put([Number(0)])
    assert arrived.wait(60)
    queue.close()


@pytest.mark.slow
def test_a_store_that_is_gone_is_reported_once_and_given_up_in_the_end(monkeypatch):
    monkeypatch.setattr(async_queue, "PATIENCE_S", 0.1)
    notices = []

    def send(batch):
        raise ConnectionError("gone")

    queue = AsyncQueue(send, notices.append)
    events = [Number(value) for value in range(5)]
    queue.put(events[:2], now=True)
    queue.put(events[2:], now=True)
    assert queue.close() == events
    assert [str(error) for error in notices] == ["gone"]


def test_putting_waits_for_no_delivery():
    release = threading.Event()
    queue = AsyncQueue(lambda batch: release.wait(60), lambda error: None)
    queue.put([Number(1)], now=True)
    queue.put([Number(2)], now=True)
    assert Number(2) in queue.pending()
    release.set()
    assert queue.close() == []


@pytest.mark.parametrize("count", [0, 1])
def test_closing_ends_the_thread(count):
    before = threading.active_count()
    queue = AsyncQueue(lambda batch: None, lambda error: None)
    queue.put(Number(value) for value in range(count))
    assert queue.close() == []
    assert threading.active_count() == before
