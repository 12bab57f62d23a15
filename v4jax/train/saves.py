"""Checkpoints of a run: parameters, optimiser, position in the data, step and config, as one.

DIR/checkpoints/STEP is written under another name and renamed once it is complete (Orbax), so that
whatever ends the process leaves the checkpoints before it as they were.
"""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from v4jax.errors import InputError
from v4jax.files.json_reader import Fields
from v4jax.train.step import TrainState
from v4jax.train.tree_paths import by_path

FOLDER = "checkpoints"


def _without_orbax_notes(record: logging.LogRecord) -> bool:
    """Orbax tells through absl's logger, as do others, what a training has no use for."""
    return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


class Checkpoints:
    """The checkpoints of a directory; `close` waits for the last save."""

    def __init__(self, workdir: Path, keep: int):
        import orbax.checkpoint as ocp  # seconds, which mistakes in a config need not wait for

        logging.getLogger("absl").addFilter(_without_orbax_notes)
        self._ocp, self._folder, self._good = ocp, workdir.absolute() / FOLDER, None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        with self._sentence("cannot be opened"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._good = self._manager.latest_step()

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, run: dict[str, Any]) -> None:
        """Begins to write a checkpoint; returns when `state` may change."""
        args = self._ocp.args
        with jax.transfer_guard("allow"), self._sentence(f"of step {step} could not be saved"):
            self._manager.wait_until_finished()
            self._good = self._manager.latest_step()
            # A donated buffer of a CPU would change while it is written: Orbax takes a view of it.
            arrays = by_path(state, ".")  # names that are also names of files
            if jax.default_backend() == "cpu":
                copy = np.array if jax.process_count() == 1 else jnp.copy
                arrays = {name: copy(leaf) for name, leaf in arrays.items()}
            self._manager.save(
                step,
                args=args.Composite(state=args.StandardSave(arrays), run=args.JsonSave(run)),
                force=True,
            )

    def wait(self) -> None:
        """Until what was begun is on disk."""
        with self._sentence("could not be saved"):
            self._manager.wait_until_finished()
        self._good = self._manager.latest_step()

    def run_of(self, step: int) -> dict[str, Any]:
        """What `save` got as `run`."""
        args = self._ocp.args
        with self._sentence(f"of step {step} cannot be read"):
            run = self._manager.restore(step, args=args.Composite(run=args.JsonRestore())).run
        where = str(self._folder / str(step) / "run")
        fields = Fields(run, where)
        fields.object("config"), fields.string("data")
        return run

    def scales_of(self, step: int) -> Any:
        """Shapes of the `TrainState.scales` of a step; None where it has none."""
        # A manager knows no metadata of what it has neither saved nor restored.
        folder = self._folder / str(step) / "state"
        readable = self._sentence(f"of step {step} cannot be read")
        with readable, self._ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(folder).item_metadata.tree
        shapes = {
            name.removeprefix("scales."): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in saved.items()
            if name.startswith("scales.")
        }
        return traverse_util.unflatten_dict(shapes, sep=".") or None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, laid out as `like` (shapes, types, shardings), on any mesh."""
        args = self._ocp.args
        wanted = by_path(like, ".")
        with jax.transfer_guard("allow"), self._sentence(f"of step {step} cannot be read"):
            restore = args.StandardRestore(wanted)
            found = self._manager.restore(step, args=args.Composite(state=restore)).state
        leaves = [found[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _sentence(self, what):
        """Orbax and TensorStore raise whatever a full disk or damage leads to."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            good = f"the one of step {self._good} is good" if self._good is not None else "none is"
            raise InputError(
                f"{self._folder}: the checkpoint {what} ({type(error).__name__}: {reason}); {good}"
                ", so free space or mend the disk, and run the same command again"
            ) from error
