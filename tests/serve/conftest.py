"""One engine of nano for all tests of the server in a process."""

import pytest

import v4jax
from tests.support import servers
from tests.support.echo_engine import EchoEngine


@pytest.fixture(scope="session")
def echo():
    """An engine without a model, where HTTP alone is tested."""
    return EchoEngine()


@pytest.fixture(scope="session")
def chat_echo(chat_directory):
    return EchoEngine(chat_directory)


@pytest.fixture(scope="session")
def engine():
    """With nano's own tokenizer: for completions."""
    return servers.kept_engine(v4jax.Tokenizer("nano"))


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory):
    return servers.chat_nano(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def chat_engine(chat_directory):
    """With a tokenizer that can chat, over the same weights."""
    return servers.kept_engine(v4jax.Tokenizer(chat_directory))
