"""Queue and slots, with plain names for requests."""

import hypothesis
import hypothesis.strategies as st

from v4jax.engine.scheduler import Scheduler


def test_the_queue_goes_by_priority_then_by_arrival():
    scheduler = Scheduler(1)
    for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", -1)):
        scheduler.submit(name, priority)
    order = []
    while (admitted := scheduler.admit()) is not None:
        order.append(admitted[1])
        scheduler.start_decoding()
        scheduler.remove(admitted[1])
    assert order == ["c", "a", "b", "d"]


def test_one_request_at_a_time_reads_its_prompt():
    scheduler = Scheduler(2)
    scheduler.submit("a")
    scheduler.submit("b")
    assert scheduler.admit() == (0, "a")
    assert scheduler.admit() is None
    scheduler.start_decoding()
    assert scheduler.admit() == (1, "b")
    assert (scheduler.decoding, scheduler.busy, scheduler.waiting) == ({0: "a"}, 2, 0)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=100, deadline=None)
def test_a_slot_holds_one_request(data):
    slots = data.draw(st.integers(1, 3))
    scheduler, names, there = Scheduler(slots), iter(range(1000)), set()
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["submit", "admit", "read", "remove"]))
        if action == "submit":
            there.add(name := next(names))
            scheduler.submit(name, data.draw(st.integers(-1, 1)))
        elif action == "admit":
            scheduler.admit()
        elif action == "read" and scheduler.reading is not None:
            scheduler.start_decoding()
        elif action == "remove" and there:
            there.discard(name := data.draw(st.sampled_from(sorted(there))))
            scheduler.remove(name)
        taken = set(scheduler.decoding)
        if scheduler.reading is not None:
            assert scheduler.reading[0] not in taken
        assert scheduler.busy <= slots
        assert sorted(scheduler.jobs()) == sorted(there)
        assert len(there) == scheduler.busy + scheduler.waiting
