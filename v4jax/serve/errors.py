"""What a client is told when it does not get an answer: a status and one object."""

import logging
import traceback

from starlette.responses import JSONResponse, Response

# Status -> type of the error object: of OpenAI's APIs, and of Messages.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}


class Refused(Exception):
    """A request that gets no answer.

    Args:
      status: of the response. message: one sentence, without anything that the user wrote.
      param: the field that is wrong. code: a short name for programs.
      retry_after: seconds after which it is worth trying again.
      body: the whole object, in place of one made of these.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | float | None = None,
        body: dict | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self._body = retry_after, body

    def body(self, messages: bool = False) -> dict:
        """The error object of inference.md, 6.1, or of the Messages API."""
        if self._body is not None:
            return self._body
        openai, anthropic = _TYPES.get(self.status, _TYPES[400])
        if messages:
            return {"type": "error", "error": {"type": anthropic, "message": self.message}}
        about = {"message": self.message, "type": openai, "param": self.param, "code": self.code}
        return {"error": about}

    def response(self, messages: bool = False) -> Response:
        """The whole response."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
        if self.status in (408, 413, 415):
            headers["connection"] = "close"  # the rest of the body is not read
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(messages), self.status, headers)


def of_ours(error: BaseException) -> Refused:
    """What a client is told of a mistake of ours; the log has where it was, and no user's text.

    An exception's own message may quote what somebody wrote, so it is left out.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = " <- ".join(f"{each.filename}:{each.lineno}" for each in reversed(frames[-6:]))
    logging.getLogger("v4jax.serve").error("%s at %s", type(error).__name__, where)
    return Refused(500, "the server failed at this request; its log says where", code="internal")
