"""Files that deploy a server: templates of this package with an operator's values in them.

python -m v4jax.serve.deploy slurm.sbatch checkpoint=/models/flash nodes=4 > serve.sbatch
"""

import string
import sys
from pathlib import Path

from v4jax.errors import InputError

FOLDER = Path(__file__).parent / "templates"
DEFAULTS = {
    "name": "v4jax",
    "image": "v4jax:latest",
    "checkpoint": "/models/flash",
    "served_name": "flash",
    "port": "8000",
    "mesh": "expert=8",
    "keys": "/etc/v4jax/keys/keys.json",
    "audit": "/var/lib/v4jax/audit",
    "slots": "16",
    "max_length": "131072",
    "drain_seconds": "120",
    "nodes": "2",
    "replicas": "1",
    "gpus": "8",
    "device": "nvidia.com/gpu",
    "devices": "8",
    "accelerator": "tpu-v5p-slice",
    "accelerator_extra": "cuda",
    "topology": "2x2x2",
}
_MORE_GRACE = 60  # seconds beyond drain_seconds, for prefixes to be written


def names() -> list[str]:
    """The templates."""
    return sorted(path.name for path in FOLDER.iterdir())


def render(template: str, **values: str) -> str:
    """A template's text with values in place of `DEFAULTS`.

    Raises:
      InputError: no such template, a value that there is not, or one of more than one line.
    """
    if template not in names():
        raise InputError(
            f"there is no template {template[:80]!r}; expected one of {', '.join(names())}"
        )
    if unknown := sorted(values.keys() - DEFAULTS.keys()):
        raise InputError(
            f"there is no value {unknown[0][:80]!r}; expected some of {', '.join(DEFAULTS)}"
        )
    for name, value in values.items():
        if not value or not value.isprintable() or set(value) & set("\"'`$\\"):
            raise InputError(f"{name} is {value[:80]!r}; expected one line without quotes or $")
    known = DEFAULTS | values
    if not known["drain_seconds"].isdigit():
        raise InputError(f"drain_seconds is {known['drain_seconds']!r}; expected whole seconds")
    known["grace_seconds"] = str(int(known["drain_seconds"]) + _MORE_GRACE)
    known["keys_directory"] = known["keys"].rpartition("/")[0]
    return string.Template((FOLDER / template).read_text()).substitute(known)


def main(arguments: list[str]) -> int:
    """Prints a template; the exit status."""
    template, *given = arguments or [""]
    try:
        values = dict(each.split("=", 1) for each in given if "=" in each)
        if len(values) < len(given):
            raise InputError("expected values as NAME=VALUE, each once")
        print(render(template, **values), end="")
    except InputError as error:
        print(f"v4jax.serve.deploy: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
