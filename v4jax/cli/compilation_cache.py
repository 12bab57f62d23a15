"""Where a command keeps compiled programs for the next one: --compilation_cache and its default.

JAX's own cache is the directory itself. Its folder `programs` holds those of `v4jax generate`,
which are found without tracing.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

from absl import flags

from v4jax.errors import InputError
from v4jax.files.store import is_private, remove_oldest
from v4jax.files.writing import writable_directory

FLAGS = flags.FLAGS
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
OFF = "off"
LIMIT = 1 << 30  # bytes of JAX's own entries
_ENTRY = re.compile(r".+-[0-9a-f]{64}-cache")  # how JAX names them


def define_flag(default: str = "v4jax/compiled in the user's cache directory") -> None:
    """Declares the flag of a command that compiles; `default` says where it keeps programs."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        f"Directory in which compiled programs are kept; {OFF}: nowhere "
        f"(default: {VARIABLE}, else {default})",
    )


def begin(default: bool = True) -> None:
    """Has JAX keep programs as the flag says, in this process and in its children.

    default: whether to keep them in the user's cache directory where nothing is said.

    Raises:
      InputError: the flag names a directory that cannot be written.
    """
    wanted = FLAGS.compilation_cache
    if wanted == "":
        raise InputError(f"--compilation_cache is ''; expected a directory, or {OFF}")
    if wanted == OFF:
        _set("jax_enable_compilation_cache", False)
    elif wanted is not None:
        _keep_in(writable_directory(wanted, "--compilation_cache").absolute())
    elif default and VARIABLE not in os.environ:
        _keep_in_default()


def programs() -> str | None:
    """The folder for programs that are found without tracing; None where none are kept."""
    import jax

    directory = jax.config.jax_compilation_cache_dir
    if not directory or not jax.config.jax_enable_compilation_cache or "://" in directory:
        return None
    return os.path.join(directory, "programs")


def default_directory() -> Path:
    """In the user's cache directory, as the XDG specification has it.

    Raises:
      OSError: the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise OSError("there is no home directory")
    return Path(base) / "v4jax" / "compiled"


def _keep_in_default():
    try:
        directory = default_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(directory.stat()):
            raise PermissionError(f"other users can write in {directory}")
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        reason = error.strerror or error
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"v4jax: compiled programs are not kept ({where}{reason}); --compilation_cache=DIR "
            f"keeps them elsewhere, --compilation_cache={OFF} nowhere",
            file=sys.stderr,
        )
    else:
        _keep_in(directory)


def _keep_in(directory):
    remove_oldest((path for path in directory.iterdir() if _ENTRY.fullmatch(path.name)), LIMIT)
    _set("jax_compilation_cache_dir", str(directory))
    _set("jax_enable_compilation_cache", True)
    # Every program: the small ones before and between the large take a second together.
    _set("jax_persistent_cache_min_compile_time_secs", 0.0)


def _set(name, value):
    """A setting of JAX, imported or not yet; children inherit it."""
    os.environ[name.upper()] = str(value)
    if "jax" in sys.modules:
        import jax

        jax.config.update(name, value)
