"""The teacher-forced share: which tokens are form, names and values, and how they are counted."""

from pathlib import Path

import pytest

from tests.support.servers import chat_nano
from v4jax.eval import probes, structure
from v4jax.eval.dice import Dice
from v4jax.eval.fit import NotPossible
from v4jax.eval.in_chat import Chats
from v4jax.eval.tool_use import single


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return Chats(Path(chat_nano(tmp_path_factory.mktemp("chat"))), "m")


class Target:
    """Predicts the tokens of some kinds."""

    def __init__(self, chats, *known):
        self.chats, self._known = chats, known

    def likeliest(self, tokens):
        script = single(Dice("tools", "single", 5, 0))
        before, answer = structure.call_tokens(self.chats, script)
        assert tokens == [*before, *answer]
        kinds = structure.kinds_of(self.chats, answer)
        return [False] * (len(before) - 1) + [kind in self._known for kind in kinds]


@pytest.mark.parametrize("seed", range(12))
def test_a_call_is_made_of_form_names_and_values(seed, chats):
    script = single(Dice("structure", seed))
    _, answer = structure.call_tokens(chats, script)
    kinds = structure.kinds_of(chats, answer)
    text = chats.text(answer)
    assert text.endswith("<｜end▁of▁sentence｜>") and kinds[-1] == structure.FORM
    assert f'<｜DSML｜invoke name="{script.steps[0].name}">' in text
    said = {kind: "" for kind in (structure.FORM, structure.NAMES, structure.VALUES)}
    for token, kind in zip(answer, kinds, strict=True):
        said[kind] += chats.text([token])
    form = said[structure.FORM].replace('string="true"', "").replace('string="false"', "")
    for name, value in script.steps[0].arguments.items():
        assert name in said[structure.NAMES]
        shown = value if isinstance(value, str) else str(value).lower()
        assert shown in said[structure.VALUES] and shown not in form
    assert script.steps[0].name in said[structure.NAMES]
    assert said[structure.FORM].count("｜DSML｜") == text.count("｜DSML｜")


@pytest.mark.parametrize(
    ("known", "shares"),
    [
        ((), (0, 0, 0)),
        (("form",), (1, 0, 0)),
        (("form", "names"), (1, 1, 0)),
        (("values",), (0, 0, 1)),
    ],
)
def test_shares_are_of_each_kind(known, shares, chats):
    (job,) = structure.jobs(5, 1)
    record = job.run(Target(chats, *known))
    assert (record["score"], record["names"], record["values"]) == shares
    assert record["form_tokens"] > 10


def test_only_models_that_chat_are_asked():
    assert not [job for job in probes.jobs(0, (600,), 1, "facts") if job.task == "tool_structure"]
    (job,) = [job for job in probes.jobs(0, (600,), 1, "chat") if job.task == "tool_structure"]
    with pytest.raises(NotPossible, match="needs a --checkpoint in this process that can chat"):
        job.run(object())
