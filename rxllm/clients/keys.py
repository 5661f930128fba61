"""Where a key comes from, and that no answer and no error shows it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rxllm.errors import CallError, ConfigError, DecodeError, check_text
from rxllm.messages import Secret
from rxllm.providers.faults import parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Censor", "key_of"]

SHORTEST_KEY = 8  # characters; a shorter one is no secret but what a server without keys is given: "none", "any"
BODY = 4  # where the body is in the arguments of a CallError
CARRIED = ("limits", "refusal", "sent", "transient", "usage")  # what an error may have beside its arguments


def key_of(given: str | Secret | None, env: str) -> Secret:
    """Return the key that was given, else that of the environment variable `env`.

    Raises:
        ConfigError: there is none, or it is no key.
    """
    if isinstance(given, Secret):
        return given
    if given is not None:
        return Secret(given)
    check_text("api_key_env", env)
    found = os.environ.get(env)
    if not found:
        msg = f"no key: set the environment variable {env}, or give api_key (any text for a server that wants none)"
        raise ConfigError(msg)
    try:
        return Secret(found)
    except ConfigError as error:
        reason = str(error)
    msg = f"the environment variable {env}: {reason}"
    raise ConfigError(msg)


class Censor:
    """Keeps a key out of what is kept: some servers tell which key they do not know, others echo what they get."""

    __slots__ = ("_needles", "_secrets")

    def __init__(self, *keys: Secret | None) -> None:
        self._secrets = tuple(key for key in keys if key is not None and len(key.reveal()) >= SHORTEST_KEY)
        self._needles = tuple(key.reveal().encode() for key in self._secrets)

    def answer(self, body: bytes) -> bytes:
        """Return the body of an answer without the key in it."""
        for needle in self._needles:
            if needle in body:
                body = body.replace(needle, b"***")
        return body

    def text(self, text: str) -> str:
        """Return `text` without the key in it."""
        for secret in self._secrets:
            text = secret.scrub(text)
        return text

    def error(
        self,
        error: CallError,
        answer: bytes,
        headers: Mapping[str, str],
        decode: Callable[[bytes], object],
    ) -> CallError:
        """Return the error of an answer without the key in it.

        Args:
            error: what `decode` has raised.
            answer: what it was decoded from; an error keeps but parts of it, perhaps half a key.
            headers: of the answer.
            decode: raises the error of another answer.
        """
        if not (self._shows(answer, headers) or self._is_in(error)):
            return error
        clean = self._scrubbed(answer, decode) or DecodeError("the answer cannot be understood", error.status)
        for name in CARRIED:
            if name in vars(error):
                setattr(clean, name, vars(error)[name])
        return clean

    def _scrubbed(self, answer: bytes, decode: Callable[[bytes], object]) -> CallError | None:
        text = self.text(answer.decode(errors="replace"))
        try:
            decode(text.encode())
        except CallError as error:
            parts: list[Any] = [self.text(part) if isinstance(part, str) else part for part in error.args]
            if self._in(str(parsed(text.encode()))):  # in a spelling of JSON's: the body keeps it, so it goes
                parts[BODY] = None
            return type(error)(*parts)
        return None

    def _in(self, text: str) -> bool:
        return any(secret.reveal() in text for secret in self._secrets)

    def _shows(self, answer: bytes, headers: Mapping[str, str]) -> bool:
        """Say whether an answer has the key in it."""
        return any(secret.reveal().encode() in answer for secret in self._secrets) or any(
            map(self._in, headers.values())
        )

    def _is_in(self, error: CallError) -> bool:
        """Say whether an error has the key in it although the answer has not: JSON writes "/" or "&" in many ways."""
        return any(self._in(part) for part in error.args if isinstance(part, str))
