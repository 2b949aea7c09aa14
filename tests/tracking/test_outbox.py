"""The outbox: nothing is lost, nothing comes out of order, whatever fails and when."""

import threading
from typing import NamedTuple

import pytest
from fedmeta.tracking.outbox import Outbox, batches, deliver
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.tracking import outbox


class Number(NamedTuple):
    value: int


class Word(NamedTuple):
    value: int


ENTRIES = st.lists(st.builds(lambda kind, value: kind(value), st.sampled_from([Number, Word]), st.integers()))


@given(ENTRIES, st.integers(1, 4))
def test_batches_keep_the_order_and_are_of_one_type(entries, size):
    parts = list(batches(entries, size))
    assert [entry for part in parts for entry in part] == entries
    assert all(len(part) <= size and len({type(entry) for entry in part}) == 1 for part in parts)


@given(ENTRIES, st.lists(st.booleans(), max_size=30))
def test_what_fails_stays_in_order(entries, failures):
    sent, left = [], entries
    for _ in range(len(failures) + 1):

        def send(batch):
            if failures and failures.pop():
                raise ConnectionError("gone")
            sent.extend(batch)

        left, _ = deliver(left, send)
    for kind in (Number, Word):
        pending = [entry for entry in left if type(entry) is kind]
        assert [entry for entry in sent if type(entry) is kind] + pending == [e for e in entries if type(e) is kind]


def test_other_types_are_tried_after_a_failure():
    sent = []

    def send(batch):
        if type(batch[0]) is Number:
            raise ConnectionError("no numbers")
        sent.extend(batch)

    left, error = deliver([Number(1), Word(2), Number(3)], send)
    assert (left, sent) == ([Number(1), Number(3)], [Word(2)])
    assert isinstance(error, ConnectionError)


def test_everything_arrives_in_the_end():
    sent, failures = [], [True, False, True]
    said = []

    def send(batch):
        if failures and failures.pop():
            raise ConnectionError("gone for a moment")
        sent.extend(batch)

    box = Outbox(send, said.append)
    for value in range(3000):
        box.put([Number(value)])
    assert box.close() == []
    assert sent == [Number(value) for value in range(3000)]
    assert said, "a failure is told"


def test_a_full_batch_is_sent_before_its_time():
    arrived = threading.Event()
    box = Outbox(lambda batch: arrived.set(), lambda error: None)
    box.put(Number(value) for value in range(outbox.BATCH - 1))
    assert not arrived.is_set()
    box.put([Number(0)])
    assert arrived.wait(60)
    box.close()


def test_a_store_that_is_gone_is_told_once_and_given_up_in_the_end(monkeypatch):
    monkeypatch.setattr(outbox, "PATIENCE_S", 0.1)
    said = []

    def send(batch):
        raise ConnectionError("gone")

    box = Outbox(send, said.append)
    entries = [Number(value) for value in range(5)]
    box.put(entries[:2], now=True)
    box.put(entries[2:], now=True)
    assert box.close() == entries
    assert [str(error) for error in said] == ["gone"]


def test_putting_waits_for_no_delivery():
    release = threading.Event()
    box = Outbox(lambda batch: release.wait(60), lambda error: None)
    box.put([Number(1)], now=True)
    box.put([Number(2)], now=True)
    assert Number(2) in box.pending()
    release.set()
    assert box.close() == []


@pytest.mark.parametrize("count", [0, 1])
def test_closing_ends_the_thread(count):
    before = threading.active_count()
    box = Outbox(lambda batch: None, lambda error: None)
    box.put(Number(value) for value in range(count))
    assert box.close() == []
    assert threading.active_count() == before
