"""The ids of twenty conversations, in both profiles."""

import json
from pathlib import Path

import pytest

from tests.chat.conversations import CONVERSATIONS
from tests.support.chats import byte_ids, chat_directory
from v4jax.chat.format import PROFILES, ChatFormat

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    directory = chat_directory(tmp_path_factory.mktemp("chat"))
    return {
        profile: ChatFormat(directory, "m", profile, max_length=1 << 16) for profile in PROFILES
    }


@pytest.mark.parametrize(
    "name, profile, api, body", CONVERSATIONS, ids=[c[0] for c in CONVERSATIONS]
)
def test_ids(name, profile, api, body, formats):
    expected = []
    for run in GOLDEN[name]:
        expected += byte_ids(run) if isinstance(run, str) else [run]
    assert formats[profile].read(body, api).tokens == expected


def test_there_are_twenty():
    assert len(CONVERSATIONS) == 20 == len(GOLDEN)
