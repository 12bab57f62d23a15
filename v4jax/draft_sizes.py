"""The sizes of a DSpark draft."""

import dataclasses
from typing import Any

from v4jax.errors import InputError
from v4jax.quantities import check_whole


@dataclasses.dataclass(frozen=True)
class DSpark:
    """The sizes of a DSpark draft, whose stages are window blocks behind the layers.

    Attributes:
      block_size: tokens that it proposes per round.
      markov_rank: width of the table that makes a proposal depend on the one before.
      noise_token_id: what stands in for the tokens that are not yet known.
      target_layer_ids: the layers whose outputs it reads, ascending.
    """

    block_size: int = 5
    markov_rank: int = 256
    noise_token_id: int = 128799
    target_layer_ids: tuple[int, ...] = (40, 41, 42)

    def __post_init__(self):
        check_whole("dspark_block_size", self.block_size, 1)
        check_whole("dspark_markov_rank", self.markov_rank, 1)
        check_whole("dspark_noise_token_id", self.noise_token_id, 0)
        ids = self.target_layer_ids
        for layer in ids:
            check_whole("a layer of dspark_target_layer_ids", layer, 0)
        if not ids or list(ids) != sorted(set(ids)):
            raise InputError(
                f"dspark_target_layer_ids is {list(ids)}; expected ascending numbers of layers"
            )


def check_draft(config: Any) -> None:
    """Refuses a draft that does not fit the `ModelConfig` that has it."""
    draft = config.dspark
    if draft is None:
        return
    if not config.draft_layers:
        raise InputError(
            "dspark is set and draft_layers is 0; expected the number of its stages, or dspark None"
        )
    if draft.noise_token_id >= config.vocab_size:
        raise InputError(
            f"dspark_noise_token_id is {draft.noise_token_id}; expected a token id below "
            f"vocab_size {config.vocab_size}"
        )
    if draft.target_layer_ids[-1] >= len(config.layers):
        raise InputError(
            f"dspark_target_layer_ids is {list(draft.target_layer_ids)}; expected layers below "
            f"{len(config.layers)}, the model's"
        )
