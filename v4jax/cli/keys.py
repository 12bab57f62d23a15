"""Make, list and revoke the keys of a server: v4jax keys create|list|revoke.

The key itself is shown once, on stdout, when it is made; the file holds its SHA-256.
"""

import json
import sys
import time

from absl import flags

from v4jax.errors import InputError
from v4jax.tables import table

FLAGS = flags.FLAGS
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent", "max_context")
_DAY = 86400.0


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("file", None, "The key file; made by create if it is not there")
    flags.DEFINE_string("name", None, "create: a name for people; revoke: of the keys to revoke")
    flags.DEFINE_string("id", None, "revoke: of the key to revoke")
    flags.DEFINE_list("models", [], "Names of the models that the key may ask (default: all)")
    flags.DEFINE_list(
        "endpoints",
        None,
        "Of chat, completions, responses, messages, models, tokenize (these by default), metrics "
        "and lens",
    )
    flags.DEFINE_integer("requests_per_minute", None, "Limit of the key")
    flags.DEFINE_integer("tokens_per_minute", None, "Limit of the key, of prompts and answers")
    flags.DEFINE_integer("concurrent", None, "Requests of the key at the same time, at most")
    flags.DEFINE_integer("max_context", None, "Tokens of one prompt with its answer, at most")
    flags.DEFINE_float("expires_days", None, "Days after which the key is refused")
    flags.DEFINE_enum("format", "text", ["text", "json"], "list: json: one object on stdout")


def run(what: str) -> int:
    """Makes, lists or revokes keys; the exit status."""
    actions = {"create": _create, "list": _list, "revoke": _revoke}
    if what not in actions:
        raise InputError(f"there is nothing like {what[:80]!r}; expected create, list or revoke")
    if not FLAGS.file:
        raise InputError("--file is missing; expected the key file's path")
    actions[what]()
    return 0


def _create():
    from v4jax.serve.keys import create

    if not FLAGS.name:
        raise InputError("--name is missing; expected a name that tells people whose key it is")
    options = {name: getattr(FLAGS, name) for name in _LIMITS}
    if FLAGS.endpoints is not None:
        options["endpoints"] = tuple(FLAGS.endpoints)
    if FLAGS.expires_days is not None:
        options["expires"] = time.time() + FLAGS.expires_days * _DAY
    secret, key = create(FLAGS.file, FLAGS.name, models=tuple(FLAGS.models), **options)
    print(secret)
    print(
        f"v4jax keys: {key.name} has the id {key.id}; the key above is not shown again",
        file=sys.stderr,
    )


def _list():
    from v4jax.serve.keys import read_keys

    keys = read_keys(FLAGS.file)
    shown = [{name: value for name, value in vars(key).items() if name != "sha256"} for key in keys]
    if FLAGS.format == "json":
        print(json.dumps({"keys": shown}))
        return
    rows = [
        [key.id, key.name, ",".join(key.models) or "all", ",".join(key.endpoints), _limits(key),
         _date(key.created), "never" if key.expires is None else _date(key.expires)]
        for key in keys
    ]  # fmt: skip
    print(table(["id", "name", "models", "endpoints", "limits", "made", "expires"], rows))


def _revoke():
    from v4jax.serve.keys import revoke

    if (FLAGS.id is None) == (FLAGS.name is None):
        raise InputError("expected one of --id and --name: which key to revoke")
    for key in revoke(FLAGS.file, FLAGS.id or FLAGS.name):
        print(f"{key.id} {key.name}: revoked")


def _limits(key):
    given = {name: getattr(key, name) for name in _LIMITS}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value) or "none"


def _date(seconds):
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
