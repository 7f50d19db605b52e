"""Make the request for an address, with the secret that the environment has for its host.

The user stores the secret of a host in a variable with the host's name. A configuration cannot
choose the variable, so a configuration from somebody else cannot send a secret to another host.
"""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
import urllib.request

from fundamentallm.errors import DataError
from fundamentallm.redaction import REDACTED

PREFIX = "FUNDAMENTALLM_AUTHORIZATION_"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def variable_of(host: str) -> str:
    """Return the environment variable of a host, as ..._EXAMPLE_ORG for example.org."""
    return PREFIX + re.sub(r"[^A-Z0-9]", "_", host.upper())


def request_for(address: str) -> urllib.request.Request:
    """Return the request for an http or https address.

    The host's variable holds `user:password`, a bearer token, the whole value of the Authorization
    header (`Bearer ...`), or `?name=value`, which is added to the address. It is sent only over
    https or to this machine, and never to a host to which a server redirects.

    Raises:
        DataError: the address was stored without its secret, and the variable is not set.
        ValueError: it is not an address.
    """
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    login, _, bare = parts.netloc.rpartition("@")
    variable = variable_of(host)
    secret = ""
    if parts.scheme == "https" or host in _LOOPBACK:
        secret = os.environ.get(variable, "").strip()
    pairs = [pair for pair in parts.query.split("&") if pair]
    known = [pair for pair in pairs if pair.partition("=")[2] != REDACTED]
    if not secret and (login == REDACTED or known != pairs):
        raise DataError(
            "this address was stored without its secret",
            where=address,
            fix=f"set {variable} to user:password, to a token, or to ?name=value",
        )
    if secret.startswith("?"):
        known.append(secret[1:])
        secret = ""
    request = urllib.request.Request(  # noqa: S310 (the caller checked the scheme)
        urllib.parse.urlunsplit(parts._replace(netloc=bare, query="&".join(known)))
    )
    header = _header(secret or (urllib.parse.unquote(login) if login != REDACTED else ""))
    if header:
        request.add_unredirected_header("Authorization", header)
    return request


def _header(secret: str) -> str:
    """Return the value of the Authorization header; empty for no secret."""
    if not secret or " " in secret:
        return secret
    if ":" in secret:
        return "Basic " + base64.b64encode(secret.encode()).decode()
    return f"Bearer {secret}"
