"""Generators: oracle and guesser, length, determinism, and no trick that finds the answer."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval.tokenizers import measures, of_bytes
from v4jax.errors import InputError
from v4jax.eval import aggregation, graphwalks, mrcr, needle, ruler
from v4jax.eval.dice import Dice
from v4jax.eval.distinct import Words
from v4jax.eval.sample import Prompt, Sample

ROOT = Path(__file__).resolve().parents[2]
TASKS = [
    needle.task("facts"),
    needle.task("plain"),
    *ruler.tasks(),
    *(mrcr.task(n) for n in mrcr.NEEDLES),
    *graphwalks.tasks(),
    *aggregation.tasks(),
]
IDS = [f"{i}-{task.name}" for i, task in enumerate(TASKS)]
tasks = pytest.mark.parametrize("task", TASKS, ids=IDS)
LENGTH = 6001  # no multiple of 4 or 128; MRCR's eight texts fit, counted in bytes
# Of all tasks at one length; another digest means other samples: raise suites.VERSION then.
DIGEST = "476bcfcf96677f2bbe320c9fec94819c5e9278baa315d3bd8e4dbc18d6d7a9b3"


def oracle(task, sample):
    """The answer that a perfect model gives."""
    if task.name.startswith("mrcr"):
        return "".join(sample.expected)
    if task.name.startswith(("walk", "parents")):
        return f"Thinking.\nFinal Answer: [{', '.join(sample.expected)}]"
    return " " + ", ".join(sample.expected)


@tasks
def test_an_oracle_is_right_and_a_guesser_at_chance(task):
    samples = [task.make(0, n, LENGTH, None, of_bytes) for n in range(8)]
    for sample in samples:
        assert task.score(sample, oracle(task, sample))["score"] == 1.0
        assert task.score(sample, "")["score"] == 0.0
    # The guess is another sample's answer: of the right form, and of nothing that was read.
    guesses = [
        task.score(sample, oracle(task, other))["score"]
        for other in samples
        for sample in samples
        if sample is not other
    ]
    assert sum(guesses) / len(guesses) <= task.chance + 0.05


@tasks
@pytest.mark.parametrize("name", ["nano", "bytes", "words"])
def test_the_length_is_within_one_step(task, name):
    """One step more would not fit: the largest step is that of a turn of a chat, or of a line."""
    measure = measures()[name]
    built = []

    def watched(prompt):
        built.append(measure(prompt))
        return built[-1]

    sample = task.make(0, 1, LENGTH, None, watched)
    size = measure(sample.prompt) + sample.budget
    assert size <= LENGTH
    # The search has seen the prompt of one step more, and that was too long.
    over = [n + sample.budget for n in built if n + sample.budget > LENGTH]
    assert min(over) - size <= next(n for kind, n in STEPS if task.name.startswith(kind))


# Bytes of one step of haystack, at most; tokens and words are fewer.
STEPS = [("mrcr", 1100), ("needle", 260), ("variables", 200), ("common", 60), ("frequent", 60)]
STEPS += [("", 420)]


@tasks
def test_the_same_seed_is_the_same_sample(task):
    first, again = (task.make(3, 2, LENGTH, None, of_bytes) for _ in range(2))
    assert first == again
    other = task.make(4, 2, LENGTH, None, of_bytes)
    assert other.prompt != first.prompt and other.expected != first.expected


def digest():
    found = hashlib.sha256()
    for task in TASKS:
        for depth in (None, 0.25):
            sample = task.make(7, 5, LENGTH, depth, of_bytes)
            said = [sample.prompt.messages, sample.prompt.prefix, sample.expected, sample.depth]
            found.update(json.dumps(said).encode())
    return found.hexdigest()


def test_the_bytes_are_those_of_every_python():
    assert digest() == DIGEST


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_bytes_are_the_same_on_another_python(version):
    """A bare interpreter will do: generators need nothing but the standard library."""
    python = shutil.which(f"python{version}")
    home = Path.home() / ".pyenv" / "versions"
    found = sorted(home.glob(f"{version}.*/bin/python{version}"))
    python = str(found[-1]) if found else python
    if python is None or python == sys.executable:
        pytest.skip(f"there is no Python {version}")
    code = (
        "import sys, types\n"
        "sys.modules['pytest'] = types.SimpleNamespace(mark=types.SimpleNamespace("
        "parametrize=lambda *a, **k: lambda f: f))\n"
        "from tests.eval.test_tasks import digest\nprint(digest())"
    )
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode and "No module" not in done.stderr and "version" in done.stderr:
        pytest.skip(done.stderr[:200])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == DIGEST


def test_a_length_that_is_too_short_is_said():
    for task in TASKS:
        with pytest.raises(InputError, match=r"expected a length of \d+ or more"):
            task.make(0, 0, 40, None, of_bytes)


def body(sample):
    return "\n".join(str(m["content"]) for m in sample.prompt.messages)


@pytest.mark.parametrize("name", [n.name for n in ruler.NEEDLES])
def test_needles_are_told_once_and_among_their_like(name):
    """Each value is in the text once; other bindings of the same form have other values."""
    (task,) = (task for task in ruler.tasks() if task.name == name)
    (kind,) = (each for each in ruler.NEEDLES if each.name == name)
    sample = task.make(0, 1, 12000, None, of_bytes)
    text = body(sample)
    assert len(sample.expected) == kind.values * kind.asked
    for value in sample.expected:
        assert text.count(value) == 1
    bound = re.findall(r"One of the magic \w+ for (\S+) is: (\S+)\.\n", text)
    others = len(bound) - len(sample.expected)
    if kind.haystack == "needles":
        assert others > 50
    else:
        assert others == (kind.keys - kind.asked) * kind.values
    assert len({value for _, value in bound}) == len(bound)
    keys = {key for key, _ in bound}
    assert all(a == b or f"for {a} is" not in f"for {b} is" for a in keys for b in keys)


def test_a_needle_is_told_once_at_its_depth():
    for style in ("facts", "plain"):
        for depth in (0.0, 0.25, 0.5, 1.0):
            sample = needle.task(style).make(0, 3, 8000, depth, of_bytes)
            text = body(sample)
            (value,) = sample.expected
            told = f"# remember: {sample.about['key']} = {value}" if style == "facts" else value
            assert text.count(told) == 1
            place = (text.index(told) - 100) / (len(text) - 400)
            assert abs(place - depth) < 0.08
            assert sample.shared <= text.index(told)


def test_needles_of_one_length_share_what_lies_before_the_shallower():
    make = needle.task("facts").make
    first, second = (make(0, n, 8000, depth, of_bytes) for n, depth in ((1, 0.3), (2, 0.6)))
    same = os.path.commonprefix([first.prompt.text, second.prompt.text])
    assert len(same) >= first.shared > 1500


def test_variables_are_a_chain_in_order():
    (task,) = (task for task in ruler.tasks() if task.name == "variables")
    for number in range(5):
        sample = task.make(0, number, 8000, None, of_bytes)
        text = body(sample)
        places = [text.index(f"VAR {name} = ") for name in sample.expected]
        assert places == sorted(places)
        # The first is defined by the value; each name is there once or twice: told and passed on.
        assert [text.count(name) for name in sample.expected] == [2, 2, 2, 2, 1]
        value = text.split(f"VAR {sample.expected[0]} = ")[1][:5]
        assert text.count(value) == 2  # the definition, and the question


def test_words_of_lists_are_as_frequent_as_said_and_contain_none_another():
    common = {task.name: task for task in ruler.tasks()}["common_words"]
    sample = common.make(0, 0, 30000, None, of_bytes)
    listed = body(sample).rsplit("more often.\n", 1)[1].split("\nQuestion")[0].split()[1::2]
    counts = {word: listed.count(word) for word in set(listed)}
    assert {word for word, n in counts.items() if n == 30} == set(sample.expected)
    assert {n for word, n in counts.items() if word not in sample.expected} == {3}
    assert {len(word) for word in counts} == {6}  # so none contains another
    small = common.make(0, 0, 3500, None, of_bytes)
    listed = body(small).rsplit("more often.\n", 1)[1].split("\nQuestion")[0].split()[1::2]
    assert sorted({listed.count(word) for word in listed}) == [1, 6]


def test_frequent_words_fall_with_the_square_of_their_rank():
    frequent = {task.name: task for task in ruler.tasks()}["frequent_words"]
    sample = frequent.make(0, 0, 8000, None, of_bytes)
    listed = body(sample).split("appears.\n\n")[1].split("\n\nQuestion")[0].split()
    counts = sorted((listed.count(word) for word in set(listed)), reverse=True)
    assert counts[0] == listed.count("...")
    assert [listed.count(word) for word in sample.expected] == counts[1:4]
    assert counts[3] > counts[4]
    assert [round(counts[0] / n) for n in counts[1:4]] == [4, 9, 16]


def test_documents_have_one_answer_each():
    task = {task.name: task for task in ruler.tasks()}["documents"]
    for number in range(6):
        sample = task.make(0, number, 8000, None, of_bytes)
        assert body(sample).count(sample.expected[-1]) == 1
        assert body(sample).count(" is a ") > 20


@pytest.mark.parametrize("needles", mrcr.NEEDLES)
def test_mrcr_repeats_a_request_so_many_times_with_other_texts(needles):
    sample = mrcr.task(needles).make(0, 1, 30000, None, of_bytes)
    said = sample.prompt.messages
    mark, truth = sample.expected
    asked = said[-1]["content"]
    assert mark in asked and body(sample).count(mark) == 1
    (place,) = (i for i, m in enumerate(said) if m["content"] == truth)
    request = said[place - 1]["content"]
    same = [i for i, m in enumerate(said) if m["content"] == request]
    assert len(same) == needles
    assert len({said[i + 1]["content"] for i in same}) == needles
    ordinal = mrcr._ORDINALS[same.index(place - 1)]
    assert f"the {ordinal} " in asked
    assert [m["role"] for m in said[:-1]] == ["user", "assistant"] * (len(said) // 2)
    assert any(
        request.split(" about ")[1] in m["content"] and m["content"] != request for m in said[::2]
    )


def test_graphs_give_what_a_walk_over_all_paths_gives():
    for task in graphwalks.tasks():
        for number in range(5):
            sample = task.make(0, number, 5000, None, of_bytes)
            text = body(sample)
            listed = text.rsplit("following edges:\n", 1)[1].split("\nQuestion")[0]
            edges = [tuple(line.split(" -> ")) for line in listed.split("\n")]
            assert len(set(edges)) == len(edges)
            node = text.rsplit("Question", 1)[1].split(" from " if "walk" in task.name else " of ")
            node = node[1][:8]
            if task.name == "parents":
                expected = {a for a, b in edges if b == node} - {node}
            else:
                expected = by_matrix(edges, node, int(task.name[-1]))
            assert expected == set(sample.expected)


def by_matrix(edges, node, distance):
    """Another way: which nodes some walk of so many steps reaches, and no shorter one."""
    reached = [{node}]
    for _ in range(distance):
        reached.append({b for a, b in edges if a in reached[-1]})
    return reached[-1].difference(*reached[:-1])


def test_aggregates_are_those_of_the_text():
    line = re.compile(
        r"(?P<b1>\w+) came to the market of (?P<p1>\w+) and paid (?P<c1>\d+) crowns"
        r"|At (?P<p2>\w+), \d+ pieces of \w+ went to (?P<b2>\w+) for (?P<c2>\d+) crowns"
        r"|For (?P<c3>\d+) crowns (?P<b3>\w+) took \d+ pieces of \w+ home from (?P<p3>\w+)\."
    )
    for task in aggregation.tasks():
        for number in range(4):
            sample = task.make(0, number, 6000, None, of_bytes)
            text = body(sample)
            place = re.search(r"at (\w+)[ ?]", text.rsplit("Question", 1)[1])[1]
            paid = {}
            count = 0
            for found in line.finditer(text):
                buyer, where, crowns = (
                    next(v for k, v in found.groupdict().items() if k[0] == kind and v)
                    for kind in "bpc"
                )
                if where == place:
                    count += 1
                    paid[buyer] = paid.get(buyer, 0) + int(crowns)
            truth = {"count": count, "sum": sum(paid.values()), "most": max(paid, key=paid.get)}
            assert sample.expected == [str(truth[task.name])]
            assert sorted(paid.values())[-1] not in sorted(paid.values())[:-1]


def test_draws_are_even_and_their_own():
    dice = Dice("a", 1)
    counts = [0] * 7
    for _ in range(7000):
        counts[dice.below(7)] += 1
    assert max(counts) < 1150 and min(counts) > 850
    assert Dice("a", 1).hex(32) == Dice("a", 1).hex(32) != Dice("a", 2).hex(32)
    assert sorted(Dice("b").shuffled(range(50))) == list(range(50))
    drawn = Words("x")
    assert len({drawn[i] for i in range(20000)}) == 20000


def test_the_prefix_ends_a_plain_prompt():
    prompt = Prompt(({"role": "user", "content": "a"}, {"role": "user", "content": "b"}), "c:")
    assert prompt.text == "a\nb\nc:"
    assert Sample(prompt, ["x"], 1).depth is None
