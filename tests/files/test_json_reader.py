"""The reader of small JSON files: what it takes, what it refuses and how it says so."""

import json
import os
import re
import socket

import pytest

from v4jax.errors import InputError
from v4jax.files.json_reader import MAX_DEPTH, Fields, parse_json, quote, read_fields, read_json
from v4jax.files.regular import check_regular_below, open_regular, read_regular

DEEP = 100_000


def refused(text, sentence, **options):
    with pytest.raises(InputError, match=sentence) as caught:
        parse_json(text, "a.json", **options)
    assert str(caught.value).startswith("a.json: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "é\u2028"]}, [], "x", 3, {}])
def test_it_gives_what_json_gives(value):
    assert parse_json(json.dumps(value), "a.json") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "a.json") == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode(), "a.json") == value


@pytest.mark.parametrize("brackets", ["[]", ("{", "}")])
def test_nesting_is_bounded_wherever_it_is(brackets):
    def nested(depth):
        if brackets == "[]":
            return "[" * depth + "]" * depth
        return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)

    parse_json(nested(MAX_DEPTH), "a.json")
    for depth in (MAX_DEPTH + 1, 900, DEEP):
        refused(nested(depth), "nested deeper than 64")
    refused('{"a": ' * DEEP, "nested deeper")
    refused('{"a": [' * DEEP, "nested deeper")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is beyond the range"),
        ("9" * 5000, "not valid JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', 'the key "c" is there twice'),
        ("{" + f'"{"k" * 1000}": 1, "{"k" * 1000}": 2' + "}", "there twice"),
        (b'{"a": "\xff"}', "not UTF-8 text .byte 7 is 0xff"),
        ('{"a": "b"}'.encode("utf-16"), "not UTF-8"),
        (r'{"a": ["\ud83d"]}', "half of a surrogate pair"),
        (r'{"\uDC00": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_refused(text, sentence):
    refused(text, sentence)


def test_a_whole_pair_is_a_character():
    assert parse_json(r'"\ud83e\udd8a"', "a.json") == "🦊"


def test_only_what_is_watched_must_be_there_once():
    watched = frozenset({"text"})
    assert parse_json('{"text": "a", "m": 1, "m": 2}', "a.json", watched)["m"] == 2
    refused('{"text": "a", "text": "b"}', "twice", watched=watched)
    assert parse_json(r'{"m": "\ud83d"}', "a.json", watched) == {"m": "\ud83d"}


def test_metrics_may_be_no_numbers():
    assert parse_json('{"loss": Infinity}', "a", nan=True) == {"loss": float("inf")}


GETTERS = [
    ("string", '"x"', "a string"),
    ("boolean", "true", "true or false"),
    ("integer", "7", "an integer"),
    ("number", "1.5", "a number"),
    ("array", "[1]", "a list"),
    ("object", '{"a": 1}', "an object"),
    ("integers", "[1, 2]", "a list of integers of 0 or more"),
    ("strings", '["a"]', "a list of strings"),
    ("objects", '[{"a": 1}]', "a list"),
]
VALUES = ['"x"', "true", "7", "1.5", "[1]", '{"a": 1}', "null", '["a"]', "[[]]", "9" * 400]


@pytest.mark.parametrize("name, good, expected", GETTERS)
def test_every_getter_takes_its_type_and_no_other(name, good, expected):
    fields = Fields(parse_json(f'{{"k": {good}, "none": null}}', "f"), "f")
    assert getattr(fields, name)("k") is not None
    assert getattr(fields, name)("none", "default") == "default"
    assert getattr(fields, name)("absent", None) is None
    with pytest.raises(InputError, match=f"f: has no absent; expected {expected}"):
        getattr(fields, name)("absent")
    for value in VALUES:
        fields = Fields(parse_json(f'{{"k": {value}}}', "f"), "f")
        try:
            getattr(fields, name)("k")
        except InputError as error:
            assert re.match(r"f: (k|k\[0\]) is .*; expected ", str(error)), error


def test_ranges_and_nested_names():
    fields = Fields({"a": {"b": [{"c": -1}]}}, "f")
    with pytest.raises(InputError, match=re.escape("f: a.b[0].c is -1; expected an integer of 0")):
        fields.object("a").objects("b")[0].integer("c", low=0)
    with pytest.raises(InputError, match="a is 9; expected an integer from 0 to 8"):
        Fields({"a": 9}, "f").integer("a", low=0, high=8)
    with pytest.raises(InputError, match="f: holds a list .1, 2.; expected an object"):
        Fields([1, 2], "f")
    assert Fields({"a": 3}, "f").number("a") == 3.0
    with pytest.raises(InputError, match="an integer of 33220 bits; expected a number"):
        Fields({"a": 10**10000}, "f").number("a")


def test_names_of_keys_stay_on_one_line():
    with pytest.raises(InputError, match=r'f: "a\\nb".c is 1; expected a string$'):
        Fields({"a\nb": {"c": 1}}, "f").object("a\nb").string("c")


def test_quotes_are_short_and_made_fast():
    assert quote({"a": [1, True, None, "é"]}) == '{"a": [1, true, null, "\\u00e9"]}'
    for value in ("x" * 10**7, [0] * 10**6, {str(i): [0] * 100 for i in range(10**4)}):
        assert len(quote(value)) == 200
    deep = []
    for _ in range(DEEP):
        deep = [deep]
    assert "..." in quote(deep)


def test_files(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_fields(tmp_path / "a.json").integer("a") == 1
    with pytest.raises(InputError, match=r"a.json: has 8 bytes; expected at most 7"):
        read_json(tmp_path / "a.json", max_bytes=7)
    with pytest.raises(InputError, match="b.json: no such file; do this"):
        read_json(tmp_path / "b.json", cure="do this")
    with pytest.raises(InputError, match="cannot name a file"):
        read_regular("a\0b")


def special_files(folder):
    """One of each kind of thing that is no file, and what it is called."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.open(".", os.O_RDONLY)
        os.chdir(folder)  # the name of a socket has room for 100 characters
        opened.bind("socket")
        os.fchdir(here)
        os.close(here)
    return {
        folder / "pipe": "is a pipe",
        folder / "folder": "is a directory",
        folder / "socket": "is a socket",
        "/dev/zero": "is a device",
    }


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_at_once(tmp_path):
    for path, sentence in special_files(tmp_path).items():
        with pytest.raises(InputError, match=f"{sentence}.*; expected a regular file"):
            open_regular(path)
    with pytest.raises(InputError, match="expected a regular file"):
        check_regular_below(tmp_path)
