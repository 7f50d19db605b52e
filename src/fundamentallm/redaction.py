"""Secrets in addresses and settings: left out of all that is shown or stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"
"""Stands where a secret stood."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
_PARAMETER = re.compile(
    r"([?&][^=&#\s]*(?:token|key|secret|pass|pwd|sig|auth|cred|session)[^=&#\s]*=)[^&#\s'\"]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return a text with `***` for the login of each address and the values of secret parameters.

    A login is what stands before an @, as `user:password@`; a parameter is secret by its name, as
    `?token=...` and the signature of a storage service are.
    """

    def without_secrets(found: re.Match[str]) -> str:
        return _PARAMETER.sub(rf"\1{REDACTED}", _LOGIN.sub(f"{REDACTED}@", found[0]))

    return _ADDRESS.sub(without_secrets, text) if "://" in text else text


_SECRET_KEY = re.compile(
    r"(^|[_.-])(token|api_?key|key|secret|password|passwd|pwd|credentials?)$", re.IGNORECASE
)


def redacted_settings(value: Any) -> Any:
    """Return nested settings with `***` for texts under a secret name, and redacted texts.

    A name is secret by its last word: `api_key`, `password`, `hf_token`; not `max_tokens`.
    """
    if isinstance(value, Mapping):
        return {
            key: REDACTED
            if isinstance(below, str) and below and _SECRET_KEY.search(str(key))
            else redacted_settings(below)
            for key, below in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted_settings(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
