"""Masking of secrets in everything that leaves the process: the saved configuration, messages, tracking."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, overload

MASK = "***"

# A word ends after 'token': micro_batch_tokens and tokenizer are not secrets.
_NAME = r"(?:token(?![a-z])|secret|password|api[_-]?key)"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"([\w-]*{_NAME}[\w-]*=)[^\s&\"',;]+", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}\b"
    r"|\bwandb_v\d+_[A-Za-z0-9_]{20,}\b"
    # A W&B key of the old kind. Next to a slash or an at sign it is a commit, as in the path of a hub snapshot.
    r"|(?<![0-9A-Za-z/@_.-])[0-9a-f]{40}(?![0-9A-Za-z/@_.-])"
)
# Not TOKENIZER, and not a path to a secret: masked paths would make a run's identity depend on the environment.
_ENVIRONMENT_NAME = re.compile(r"(?:KEY|TOKEN(?!IZ)|SECRET|PASSWORD)(?!.*_(?:PATH|FILE|DIR|FOLDER|HOME)$)")
_PLACE_NAME = re.compile(r"[-_](?:path|file|dir|folder|home)$", re.IGNORECASE)
_ENVIRONMENT_SHORTEST = 8  # shorter values ('false', '1') are settings and would mask ordinary words


@overload
def mask_secrets(value: str) -> str: ...
@overload
def mask_secrets(value: dict[str, Any]) -> dict[str, Any]: ...


def mask_secrets(value: str | dict[str, Any]) -> str | dict[str, Any]:
    """Return a copy with every secret replaced by ***; a value without secrets is returned equal.

    In a mapping, a string whose key is the name of a secret is masked completely. In any text, these are masked:
    tokens by their form, credentials in URLs, the value in NAME=value where NAME is that of a secret, and the values
    of secret environment variables.
    """
    environment = _environment_secrets()
    if isinstance(value, str):
        return _mask_text(value, environment)
    return {key: _mask_entry(key, item, environment) for key, item in value.items()}


def secret_option(words: Sequence[str]) -> str | None:
    """Return the name of a command's option, or of a variable that it sets, by which it has a secret; None for none."""
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        name, assigned, value = word.partition("=")
        if not assigned and word.startswith("-"):
            value = "" if after.startswith("-") else after
        if value and not value.isdigit() and _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            return name
    return None


def _environment_secrets() -> list[str]:
    """Return the secret values of the environment, longest first, because one may contain another."""
    values = {
        value
        for name, value in os.environ.items()
        if _ENVIRONMENT_NAME.search(name.upper()) and len(value) >= _ENVIRONMENT_SHORTEST
    }
    return sorted(values, key=len, reverse=True)


def _mask_entry(key: str, item: Any, environment: list[str]) -> Any:
    if isinstance(item, str):
        return MASK if item and _SECRET_NAME.search(key) else _mask_text(item, environment)
    if isinstance(item, dict):
        return {inner: _mask_entry(inner, value, environment) for inner, value in item.items()}
    if isinstance(item, list | tuple):
        return [_mask_entry("", value, environment) for value in item]
    return item


def _mask_text(text: str, environment: list[str]) -> str:
    for secret in environment:
        text = text.replace(secret, MASK)
    text = _URL_CREDENTIALS.sub(rf"\1{MASK}@", text)
    text = _ASSIGNMENT.sub(rf"\1{MASK}", text)
    return _TOKENS.sub(MASK, text)
