"""POST /v1/chat/completions, /v1/responses and /v1/messages: `v4jax.chat` speaks with clients."""

import json
from typing import Any

from v4jax.chat.errors import ChatError
from v4jax.chat.recipe import ServerEvent
from v4jax.serve import sse
from v4jax.serve.body import unless_left
from v4jax.serve.call import Call, Streamed, checked_end
from v4jax.serve.detail import EVENT
from v4jax.serve.errors import Refused
from v4jax.serve.running import merged


async def chat(call: Call) -> Any:
    """Chat Completions; see `answered`."""
    return await _conversation(call, "chat")


async def responses(call: Call) -> Any:
    """Responses; see `answered`."""
    return await _conversation(call, "responses")


async def messages(call: Call) -> Any:
    """Messages; see `answered`."""
    return await _conversation(call, "messages")


async def _conversation(call, api):
    serving = call.serving
    if serving.chat is None:
        raise Refused(
            404, f"this model answers completions only: {serving.no_chat}", code="no_chat"
        )
    content = await call.body()
    try:
        conversation = await serving.in_pool(serving.chat.read, content, api, call.tenant)
    except ChatError as error:
        raise Refused(error.status, "refused", body=error.body) from None
    call.check_tokens([conversation.tokens], conversation.max_new_tokens)
    await call.submit([conversation.request(salt=call.tenant, request_id=call.id)])
    answer = conversation.answer(call.id)
    if conversation.stream:
        done = b""  # what ends a stream of this API is among the answer's own events
        return Streamed(_pieces(call, answer), done, api == "messages")
    return await unless_left(call.request.receive, _whole(call, answer))


async def _whole(call, answer):
    async for _ in _events(call, answer):
        pass
    return answer.whole()


async def _pieces(call, answer):
    async for found in _events(call, answer):
        yield sse.QUIET if found is None else found.encode()


async def _events(call, answer):
    """The answer's events as they come, and None where none comes for a while."""
    settings, stream = call.serving.settings, call.answerings[0].stream
    begun = False
    arriving = merged(call.answerings, settings.max_waiting_seconds, settings.keep_alive_seconds)
    async for _, event in arriving:
        if event is None:
            yield None
            continue
        call.saw(0, event)
        if not begun:
            begun = True
            for each in answer.begin(stream.so_far.cached_tokens):
                yield each
        if (told := call.detail(0)) is not None:
            yield ServerEvent(EVENT, json.dumps(told))
        for each in answer.push(event.tokens, event.logprobs):
            yield each
        if event.finish is not None:
            checked_end(event)
            for each in answer.finish(event.finish, event.error):
                yield each
        if answer.done:
            break
    await arriving.aclose()
    call.finish, call.cost.reasoning = answer.finish_reason, answer.reasoning_tokens
    call.cost.output, call.tools = answer.output_tokens, tuple(answer.tool_names)
    call.answer = [stream.so_far.text]
