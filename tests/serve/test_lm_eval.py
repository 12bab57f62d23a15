"""The real lm-eval against the server on loopback: its scores are the engine's."""

import random

import numpy as np
import pytest

import v4jax
from tests.support import servers
from v4jax.engine.request import Request
from v4jax.eval.lm_eval_tasks import generators

pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra serve-test has it")
# lm-eval's own modules warn while they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")
BOS = 0


@pytest.fixture(scope="module")
def address(engine):
    with servers.on_loopback(servers.serving(engine)) as address:
        yield address


@pytest.fixture(scope="module")
def tokenizer():
    return v4jax.Tokenizer("nano")


def client(address, **options):
    """lm-eval's model `local-completions`, with the server's tokenizer."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    options = {"max_retries": 1, "custom_prefix_token_id": BOS, "max_length": 300} | options
    return LocalCompletionsAPI(
        model="nano", base_url=f"{address}/v1/completions", tokenizer_backend="remote", **options
    )


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def text(rng, low, high):
    """A text of some words, code and characters of several bytes."""
    words = ["def f(x):", "return", "self", "\n    ", "naïve", "東京", "x == 3", "<|eos|>", "  "]
    return " ".join(rng.choices(words, k=rng.randint(low, high))).strip()


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"num_concurrent": 4}])
def test_log_likelihoods_are_the_engines(address, engine, tokenizer, options):
    rng = random.Random(len(options))
    pairs = [(text(rng, 1, 20), " " + text(rng, 1, 6)) for _ in range(8)]
    pairs += [("", "alone"), ("twice", " same"), ("twice", " same"), (text(rng, 90, 90), " end")]
    found = client(address, **options).loglikelihood(instances("loglikelihood", *pairs), True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        ids = whole if context else [BOS, *whole]
        count = len(ids) - (len(tokenizer.encode(context)) or 1)
        request = Request(ids[-299:], max_new_tokens=0, prompt_logprobs=1)
        scored = engine.submit(request).result().prompt_logprobs[-count:]
        assert logprob == pytest.approx(sum(each.logprob for each in scored), abs=1e-5)
        assert greedy == all(each.token == each.top[0][0] for each in scored)


def test_what_the_model_itself_would_say_is_greedy(address, engine, tokenizer):
    model = client(address)
    ids = tokenizer.encode("def area(self")
    said = engine.submit(Request(ids, max_new_tokens=4)).result()
    requests = instances("loglikelihood", ("def area(self", said.text))
    assert tokenizer.encode("def area(self" + said.text) == ids + said.tokens
    ((_, greedy),) = model.loglikelihood(requests, True)
    assert greedy


def test_rolling_windows(address, engine, tokenizer):
    """Each token counts once, the first one behind the beginning of the sequence."""
    model = client(address)
    short, long = "class A:\n    pass\n", text(random.Random(4), 120, 120)
    requests = instances("loglikelihood_rolling", (short,), (long,))
    found = model.loglikelihood_rolling(requests, True)
    assert found[0] == pytest.approx(sum(engine.score([BOS, *tokenizer.encode(short)])), abs=1e-5)
    ids, width = tokenizer.encode(long), model.max_length
    assert len(ids) > width
    total = sum(engine.score([BOS, *ids[: width - 1]]))
    for begin in range(width - 1, len(ids), width - 1):
        end = min(begin + width - 1, len(ids))
        window = ids[max(0, end - width) : end]
        total += sum(engine.score(window)[-(end - begin) :])
    assert found[1] == pytest.approx(total, abs=1e-4)


def test_answers_stop_at_texts(address, engine, tokenizer):
    given = {"until": [], "max_gen_toks": 12, "do_sample": False}
    contexts = ["def area(self", "class Node:"]
    expected = [
        engine.submit(
            Request(tokenizer.encode(each), max_new_tokens=12, stop_ids=(1,), stop=("<|eos|>",))
        )
        .result()
        .text
        for each in contexts
    ]
    requests = instances("generate_until", *((each, dict(given)) for each in contexts))
    assert client(address).generate_until(requests, True) == expected
    assert client(address, num_concurrent=2).generate_until(requests, True) == expected
    stop = expected[0][3:5]
    stopped = instances("generate_until", (contexts[0], given | {"until": [stop]}))
    (found,) = client(address).generate_until(stopped, True)
    assert found == expected[0][: expected[0].index(stop)]


def test_a_whole_task(address):
    """One of our own tasks, by its file, as the command runs it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = generators.__file__.rpartition("/")[0]
    manager = TaskManager(
        include_path=folder,
        include_defaults=False,
        metadata={"lengths": [512], "samples": 2, "seed": 0, "tokenizer": "nano"},
    )
    found = simple_evaluate(
        model=client(address, max_length=2048),
        tasks=["v4jax_single_1"],
        task_manager=manager,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    (score,) = [v for k, v in found["results"]["v4jax_single_1"].items() if k.startswith("score,")]
    assert 0 <= score <= 1 and found["n-samples"]["v4jax_single_1"]["effective"] == 2
    assert all(np.isfinite(len(each["resps"][0][0])) for each in found["samples"]["v4jax_single_1"])
