"""Delete what a server has kept: of a key, of a request, or from before so many days.

Lines of the audit log and prefixes on disk go at once; a server that runs drops its prefixes in
memory within seconds.
"""

from absl import flags

from v4jax.errors import InputError

FLAGS = flags.FLAGS


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("audit", None, "Directory of the audit log")
    flags.DEFINE_string("prefix_cache", None, "Directory of the prefix cache")
    flags.DEFINE_string("key", None, "Id of a key: whatever it asked")
    flags.DEFINE_string("request", None, "Id of a request, and all prefixes of its key")
    flags.DEFINE_float("older_than_days", None, "What is older, and prefixes unused since")


def run() -> int:
    """Deletes; the exit status."""
    from v4jax.serve.forget import forget

    if FLAGS.audit is None and FLAGS.prefix_cache is None:
        raise InputError("expected --audit or --prefix_cache, or both: where to delete")
    done = forget(
        FLAGS.audit,
        FLAGS.prefix_cache,
        key=FLAGS.key,
        request=FLAGS.request,
        older_than_days=FLAGS.older_than_days,
    )
    print(f"deleted {done.lines} lines of the audit log and {done.files} files of prefixes")
    return 0
