"""What a chat request is refused with: a status and a body in the form of its API."""

from typing import Any

_KINDS = {404: "not_found_error"}  # of Messages; the others say it in the code


class ChatError(Exception):
    """A request that cannot be answered.

    Attributes:
      status: of HTTP, 400 to 499. body: the JSON object to answer with.
    """

    def __init__(self, status: int, body: dict[str, Any]):
        super().__init__(body["error"]["message"])
        self.status, self.body = status, body


def refusal(
    api: str, message: str, param: str | None = None, status: int = 400, code: str | None = None
) -> ChatError:
    """A `ChatError` in the form of an API, one of `recipe.APIS`.

    Args:
      param: the key of the body that is at fault.
    """
    kind = _KINDS.get(status, "invalid_request_error") if api == "messages" else None
    return ChatError(status, error_body(api, message, param, kind or "invalid_request_error", code))


def error_body(
    api: str,
    message: str,
    param: str | None = None,
    kind: str = "invalid_request_error",
    code: str | None = None,
) -> dict[str, Any]:
    """The body of an error; those of Messages have a form of their own."""
    if api == "messages":
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": kind, "param": param, "code": code or kind}}
