"""Failures of a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class RequestFailure(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: what was wrong and what to change, for a person.
        kind: OpenAI's `type`; None makes it out of the status.
        param: the field of the request that is at fault.
        code: a short name of the failure, for a program.
        headers: to send with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.code = code
        self.headers = headers or {}

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        fields = {"type": self.kind, "param": self.param, "code": self.code}
        return {"error": {"message": self.message, **fields}}

    @classmethod
    def too_busy(cls, retry_after_s: int) -> RequestFailure:
        """All slots are taken and the queue is full."""
        return cls(
            429,
            "The server is busy and its queue is full; try again later.",
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(retry_after_s)},
        )

    @classmethod
    def shutting_down(cls) -> RequestFailure:
        """The server was told to stop."""
        headers = {"Retry-After": "10"}
        return cls(503, "The server is shutting down.", code="shutting_down", headers=headers)

    @classmethod
    def internal(cls, message: str) -> RequestFailure:
        """A failure that the request is not to blame for."""
        return cls(500, message, code="internal_error")

    @classmethod
    def broken(cls) -> RequestFailure:
        """The thread that runs the model is no more."""
        return cls.internal("The model's thread has failed, and the server ends.")
