"""GraphWalks-style: a graph as a list of edges; nodes at a distance, or parents, of one node."""

import collections
import re

from v4jax.eval.dice import Dice
from v4jax.eval.fit import most_steps
from v4jax.eval.sample import Measure, Sample, Task, asked
from v4jax.eval.scores import set_f1

DISTANCES = (1, 2, 3)
MOST = 8  # nodes of an answer, so that it fits into the budget
BUDGET = 160
_FEWEST = 24  # edges
_LAST_LINE = re.compile(r"Final Answer:\s*\[(.*)\]\s*\Z")
_LISTS = re.compile(r"\[([^\[\]]*)\]")
_EXAMPLE = """Here is an example. The graph has the edges:
uvwx -> alke
abcd -> uvwx
abcd -> efgh
efgh -> uvwx
{question}
The answer ends with this line:
Final Answer: {answer}

"""


def tasks(scoring: str = "") -> list[Task]:
    """Nodes at distance 1 to 3, and parents.

    Args:
      scoring: "published" scores as the published code does, to compare with its figures.
    """
    score = _published if scoring == "published" else _score
    walks = [Task(f"walk_{d}", _maker(d), score, chance=0.1) for d in DISTANCES]
    return [*walks, Task("parents", _maker(0), score, chance=0.1)]


def _maker(distance):
    def make(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
        return _make(distance, seed, number, length, measure)

    return make


def _make(distance, seed, number, length, measure):
    names = ("graphwalks", distance, seed, length, number)
    name = f"walk_{distance}" if distance else "parents"
    shown = _EXAMPLE.format(
        question=_question(distance, "abcd" if distance else "uvwx"),
        answer={0: "[abcd, efgh]", 1: "[efgh, uvwx]", 2: "[alke]", 3: "[]"}[distance],
    )
    introduction = "You are given a directed graph as a list of edges, and a question about it.\n\n"

    def build(steps):
        edges, node, _ = _graph(names, _FEWEST + steps, distance)
        listed = "\n".join(f"{a} -> {b}" for a, b in edges)
        text = f"{introduction}{shown}The graph has the following edges:\n{listed}\n"
        form = "End your answer with a line of this form:\nFinal Answer: [node, node, node]"
        return asked(f"{text}{_question(distance, node)}\n{form}")

    steps = most_steps(build, measure, length, BUDGET, name)
    _, _, expected = _graph(names, _FEWEST + steps, distance)
    return Sample(build(steps), sorted(expected), BUDGET)


def _question(distance, node):
    if not distance:
        return (
            f"Question: which nodes are parents of {node}, that is, have an edge to it? Leave out "
            f"{node} itself."
        )
    return (
        f"Question: which nodes are at distance exactly {distance} from {node}, that is, are first "
        f"reached by a breadth-first search after {distance} step{'s' * (distance > 1)}?"
    )


def _graph(names, count, distance):
    """Edges, a node whose answer is neither empty nor long, and that answer."""
    found, again = None, ()
    while found is None:  # hardly any graph has no such node
        found = _drawn(Dice(*names, count, *again), count, distance)
        again = (len(again) + 1, *again)
    return found


def _drawn(dice, count, distance):
    nodes, seen = [], set()
    while len(nodes) < max(8, count * 2 // 3):
        name = dice.hex(8)
        if name not in seen:
            seen.add(name)
            nodes.append(name)
    edges = set()
    while len(edges) < count:
        edges.add((dice.choice(nodes), dice.choice(nodes)))
    edges = dice.shuffled(sorted(edges))
    for node in dice.shuffled(nodes):
        found = at_distance(edges, node, distance) if distance else parents(edges, node)
        if 1 <= len(found) <= MOST:
            return edges, node, found
    return None


def at_distance(edges, node: str, distance: int) -> set[str]:
    """Nodes whose shortest path from `node` has exactly so many edges."""
    following = collections.defaultdict(list)
    for a, b in edges:
        following[a].append(b)
    seen, border = {node}, {node}
    for _ in range(distance):
        border = {b for a in border for b in following[a]} - seen
        seen |= border
    return border


def parents(edges, node: str) -> set[str]:
    return {a for a, b in edges if b == node and a != node}


def final_list(answer: str) -> set[str] | None:
    """The names in the last line, if that is an answer's; None: it is not."""
    lines = answer.rstrip().splitlines()
    match = _LAST_LINE.search(lines[-1]) if lines else None
    return None if match is None else names_in(match[1])


def last_list(answer: str) -> set[str] | None:
    """The names of the last bracketed list anywhere."""
    found = _LISTS.findall(answer)
    return names_in(found[-1]) if found else None


def names_in(text: str) -> set[str]:
    """Names between commas, without blanks and quotes."""
    return {name for part in text.split(",") if (name := part.strip(" \t\r\n\"'`"))}


def _score(sample: Sample, answer: str) -> dict[str, float]:
    expected = set(sample.expected)
    strict, lenient = final_list(answer), last_list(answer)
    return {
        "score": 0.0 if strict is None else set_f1(strict, expected),
        "lenient": 0.0 if lenient is None else set_f1(lenient, expected),
    }


def _published(sample: Sample, answer: str) -> dict[str, float]:
    """As the published code: the first name keeps what is before the bracket, no overlap is 1."""
    lines = answer.rstrip().splitlines()
    if not lines or not _LAST_LINE.search(lines[-1]):
        return {"score": 0.0}
    found = {part.strip() for part in lines[-1].rstrip().rstrip("]").split(",") if part.strip()}
    expected = set(sample.expected)
    both = len(found & expected)
    return {"score": 2 * both / (len(found) + len(expected)) if both else 1.0}
