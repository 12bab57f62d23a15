"""What the lens may look into, and whose it is."""

import threading

import pytest

from v4jax.engine.request import Event, Result
from v4jax.errors import InputError
from v4jax.serve.detail import Detail
from v4jax.serve.look import Look, Unavailable
from v4jax.serve.seen import SeenRequests


def figures(tokens, position):
    if position >= len(tokens):
        raise InputError(f"position is {position}; expected at most {len(tokens) - 1}")
    top = [{"token": 7, "logprob": -0.5}]
    return {"token": tokens[position], "before": None, "next": {"top": top}}


@pytest.fixture
def requests():
    found = SeenRequests(most=3, most_tokens=100)
    found.add("a", "ann", [5, 6, 7, 8, 9], prompt_tokens=3, cached_tokens=2, drafted=(1,))
    return found


@pytest.fixture
def look(requests):
    return Look(figures, "t{}".format, requests)


def test_every_token_has_its_text_and_origin(look):
    told = look({"request": "a"}, "ann")
    assert (told["prompt_tokens"], told["cached_tokens"]) == (3, 2)
    origins = ["cache", "cache", "prefill", "decode", "draft"]
    assert [each["origin"] for each in told["tokens"]] == origins
    assert told["tokens"][4] == {"id": 9, "text": "t9", "origin": "draft"}


def test_figures_come_with_the_texts_they_name(look):
    assert look({"request": "a", "position": "1"}, "ann")["texts"] == {"6": "t6", "7": "t7"}


@pytest.mark.parametrize(
    ("request_id", "tenant"), [("b", "ann"), ("a", "bob"), ("a", ""), ("", "ann")]
)
def test_another_tenants_request_is_as_if_it_were_not_there(look, request_id, tenant):
    with pytest.raises(Unavailable) as refused:
        look({"request": request_id, "position": "0"}, tenant)
    assert refused.value.status == 404
    with pytest.raises(Unavailable) as none:
        look({"request": "never"}, tenant)
    assert none.value.message == refused.value.message


@pytest.mark.parametrize("position", ["", "-1", "5", "1.0", "x", "١", "9" * 40])
def test_a_position_that_is_none(look, position):
    with pytest.raises(Unavailable) as refused:
        look({"request": "a", "position": position}, "ann")
    assert refused.value.status == 400


def test_the_oldest_go_by_count_and_by_tokens(requests):
    for name in "bcd":
        requests.add(name, "ann", [1], 1)
    assert requests.get("a", "ann") is None and requests.get("b", "ann") is not None
    requests.add("long", "ann", [1] * 99, 99)
    assert requests.get("c", "ann") is None and requests.get("d", "ann") is not None
    requests.add("too long", "ann", [1] * 101, 101)
    assert requests.get("too long", "ann") is None and requests.get("long", "ann") is not None
    # One that is there already counts once.
    for _ in range(5):
        requests.add("long", "ann", [1] * 99, 99)
    assert requests.get("d", "ann") is not None


def test_what_is_deleted_is_gone(requests):
    requests.add("b", "bob", [1], 1)
    requests.add("c", "ann", [1], 1)
    assert requests.delete(request="a", tenant="bob") == 0
    assert requests.delete(request="c") == 1
    assert requests.delete(tenant="ann") == 1
    assert requests.get("a", "ann") is None and requests.get("b", "bob") is not None
    assert requests.delete(older_than=60.0) == 0
    assert requests.delete() == 1


def test_what_a_stream_tells_of_its_tokens():
    detail, so_far = Detail("r", 12), Result(12, cached_tokens=8)
    assert detail.told(so_far) is None
    detail.saw(Event((5,), "a"))
    told = {"request": "r", "prompt_tokens": 12, "cached_tokens": 8}
    assert detail.told(so_far) == told | {"first": 0, "count": 1, "drafted": []}
    detail.saw(Event((6, 7, 8), "b", drafted=(0, 1)))
    assert detail.told(so_far) == told | {"first": 1, "count": 3, "drafted": [0, 1]}
    detail.saw(Event((9, 4), "c", drafted=(0,)))
    assert detail.drafted == [1, 2, 4]
    detail.saw(Event((), "", finish="stop"))
    assert detail.told(so_far) is None


def test_one_look_at_a_time(requests):
    running, most = [], []

    def slow(tokens, position):
        running.append(position)
        most.append(len(running))
        threading.Event().wait(0.02)
        running.pop()
        return figures(tokens, position)

    look = Look(slow, str, requests)
    queries = [{"request": "a", "position": str(i)} for i in range(4)]
    threads = [threading.Thread(target=look, args=(query, "ann")) for query in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
