"""GET /v1/models and /tokenizer_info, POST /tokenize and /detokenize."""

from typing import Any

from v4jax.serve.call import Call
from v4jax.serve.errors import Refused
from v4jax.serve.fields import Fields, wrong


async def models(call: Call) -> Any:
    """The one model, with what a client may want to know of it."""
    return {"object": "list", "data": [_model(call.serving)]}


async def model(call: Call) -> Any:
    """The model by its name."""
    if call.request.path_params["name"] != call.serving.settings.name:
        raise Refused(
            404,
            f"there is no such model here; the one that is served is {call.serving.settings.name}",
            param="model",
            code="model_not_found",
        )
    return _model(call.serving)


async def tokenizer_info(call: Call) -> Any:
    """Special tokens, as lm-eval asks for them; there is no template but the model's own code."""
    names = call.serving.names
    return {
        "bos_token": names.bos,
        "eos_token": names.eos,
        "pad_token": names.eos,
        "chat_template": None,
    }


async def tokenize(call: Call) -> Any:
    """The ids of a text."""
    fields = Fields(await call.json())
    prompt = fields.text("prompt")
    special = fields.flag("add_special_tokens", True)
    _end(fields, call)
    if prompt is None:
        raise wrong("prompt", "a text")
    ids = await call.serving.in_pool(call.serving.names.encode, prompt, special)
    return {"tokens": ids, "count": len(ids), "max_model_len": call.serving.engine.max_length}


async def detokenize(call: Call) -> Any:
    """The text of ids, without special tokens."""
    fields = Fields(await call.json())
    tokens = fields.take("tokens")
    _end(fields, call)
    most = call.serving.engine.vocab_size
    if not isinstance(tokens, list) or not all(type(each) is int for each in tokens):
        raise wrong("tokens", "a list of token ids")
    if not all(0 <= each < most for each in tokens):
        raise wrong("tokens", f"token ids from 0 to {most - 1}")
    return {"prompt": await call.serving.in_pool(call.serving.tokenizer.decode, tokens)}


def _end(fields, call):
    served = call.serving.settings.name
    if fields.text("model", served) != served:
        raise Refused(404, "there is no such model here", param="model", code="model_not_found")
    fields.end()


def _model(serving):
    return {
        "id": serving.settings.name,
        "object": "model",
        "created": serving.created,
        "owned_by": "v4jax",
        "max_model_len": serving.engine.max_length,
        "profile": serving.settings.profile,
        "chat": serving.chat is not None,
    }
