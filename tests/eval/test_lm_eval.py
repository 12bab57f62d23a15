"""lm-eval's requests through the engine, versus lm-eval's own transformers model."""

import json
import random
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.support.checkpoints import transformers_model
from v4jax.errors import InputError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra lm-eval has it")
# lm-eval's own modules warn while they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 96
LETTERS = [chr(i) for i in range(33, 127)]


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def write_letter_tokenizer(path):
    """Every id is a printable character, so that whatever the model makes is text."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", "<eos>")])
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    # All entries are chosen: among equal scores torch's top-k takes any.
    model = transformers_model(index_topk=LIMIT, bos_token_id=94, eos_token_id=95)
    model.save_pretrained(directory)
    write_letter_tokenizer(directory / "tokenizer.json")
    return directory


@pytest.fixture(scope="module")
def ours(directory):
    from v4jax.eval.lm_eval import V4Jax

    model = V4Jax(str(directory), max_length=LIMIT, batch_size=2, dtype="float32")
    yield model
    model.close()


@pytest.fixture(scope="module")
def theirs(directory):
    from lm_eval.models.huggingface import HFLM
    from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>"
    )
    # With a tokenizer.json that says nothing of it, theirs puts no beginning in front.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 94)]
    )
    # One row a call: their padded rows differ from rows without padding.
    return HFLM(
        pretrained=DeepseekV4ForCausalLM.from_pretrained(directory).float().eval(),
        tokenizer=tokenizer,
        max_length=LIMIT,
        add_bos_token=True,
        batch_size=1,
        device="cpu",
    )


def text(rng, low, high):
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    for (logprob, greedy), (their_logprob, their_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(their_logprob, abs=1e-4)
        assert greedy == bool(their_greedy)


def test_log_likelihoods_are_those_of_transformers(ours, theirs):
    rng = random.Random(0)
    pairs = [(text(rng, 1, 60), text(rng, 1, 20)) for _ in range(12)]
    pairs += [("", "alone"), ("twice", "same"), ("twice", "other")]
    requests = instances("loglikelihood", *pairs)
    equal(ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True))


def test_a_greedy_continuation_is_called_greedy(ours, theirs):
    (made,) = ours.generate_until(
        instances("generate_until", ("begin", {"until": [], "max_gen_toks": 3})), True
    )
    requests = instances("loglikelihood", ("begin", made), ("begin", made + "!"))
    found = ours.loglikelihood(requests, True)
    assert [greedy for _, greedy in found] == [True, False]
    equal(found, theirs.loglikelihood(requests, True))


def test_rolling_windows_score_each_token_once(ours, theirs, monkeypatch):
    # Theirs puts the beginning in front of the text and then once more in front of the window.
    monkeypatch.setattr(theirs, "tok_encode", lambda string, **_: ours.tok_encode(string))
    rng = random.Random(1)
    # Of the longest, windows differ: a prompt of ours has room for one token less than theirs.
    texts = [(text(rng, 1, 80),) for _ in range(4)]
    requests = instances("loglikelihood_rolling", *texts)
    found = ours.loglikelihood_rolling(requests, True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, True), abs=1e-4)
    (long,) = instances("loglikelihood_rolling", (text(rng, 300, 300),))
    (total,) = ours.loglikelihood_rolling([long], True)
    ids = ours.tok_encode(long.args[0])
    width, by_hand = LIMIT - 1, 0.0
    pieces = [ids[:width]]
    for begin in range(width, len(ids), width):
        pieces.append(ids[begin : begin + width])
    for i, piece in enumerate(pieces):
        end = sum(map(len, pieces[: i + 1]))
        before = [ours.prefix_token_id] if i == 0 else ids[end - width - 1 : end - len(piece)]
        by_hand += sum(ours._engine.score(before + piece)[-len(piece) :])
    assert total == pytest.approx(by_hand, abs=1e-4)


def test_answers_are_those_of_transformers_and_stop_at_texts(ours, theirs):
    rng = random.Random(2)
    given = {"until": [], "max_gen_toks": 8, "do_sample": False}
    requests = instances("generate_until", *((text(rng, 3, 40), dict(given)) for _ in range(4)))
    whole = ours.generate_until(requests, True)
    assert whole == theirs.generate_until(requests, True)
    stop = whole[0][3:5]
    stopped = instances("generate_until", (requests[0].args[0], given | {"until": [stop]}))
    assert ours.generate_until(stopped, True) == [whole[0][: whole[0].index(stop)]]


def test_a_context_that_is_too_long_loses_its_beginning(ours):
    rng = random.Random(3)
    context, continuation = text(rng, 200, 200), "end"
    ((long, _),) = ours.loglikelihood(instances("loglikelihood", (context, continuation)), True)
    ids = ours.tok_encode(context + continuation)
    kept = [ours.prefix_token_id, *ids[-(LIMIT - 1) :]]
    assert long == pytest.approx(sum(ours._engine.score(kept)[-3:]), abs=1e-4)


def test_what_cannot_be_done_is_said(ours):
    with pytest.raises(InputError, match="continuation .* has 120 tokens; expected fewer"):
        ours.loglikelihood(instances("loglikelihood", ("a", "b" * 120)), True)
    with pytest.raises(InputError, match="asks for num_beams"):
        given = {"until": [], "num_beams": 4}
        ours.generate_until(instances("generate_until", ("a", given)), True)


def test_lm_eval_s_command_runs_a_task(directory, tmp_path):
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "letters.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["x", "y"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "letters.yaml").write_text(json.dumps(task))
    lines = [json.dumps({"question": f"{i} is", "answer": i % 2}) for i in range(4)]
    (tmp_path / "letters.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "v4jax.eval.lm_eval", "--model", "v4jax"]
    command += ["--model_args", f"checkpoint={directory},max_length=64", "--tasks", "letters"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())["results"]["letters"]
    assert 0 <= found["acc,none"] <= 1
