"""Secrets in the addresses of a text: left out of all that is shown or stored."""

from __future__ import annotations

import re

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
