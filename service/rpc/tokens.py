"""Bearer tokens, as a file that holds their hashes and never the tokens themselves:

[[token]]
name = "ci"
sha256 = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
roles = ["infer", "label"]
models = ["magika", "resnet-*"]    # globs; absent: every model
not_before = 2026-11-25T00:00:00Z  # absent: from the beginning
expires = 2027-02-23T00:00:00Z     # absent: never
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from service.errors import Refused, shown
from service.store.files import signature, write_whole

log = logging.getLogger(__name__)

PREFIX = "calserve_"
"""Of every token made here, so that scanners for leaked secrets know one when they see it."""
SECRET_BYTES = 32
MOST_DAYS = 36500
EVERY_MODEL = ("*",)
PRIVATE = 0o600
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEADING = "# Bearer tokens of calserve: hashes, never the tokens. Made by `calserve token`; read again on change.\n"


class Role(StrEnum):
    """What a token may be for. No role includes another."""

    INFER = "infer"
    LABEL = "label"
    FIT = "fit"
    OPERATE = "operate"


@dataclass(frozen=True)
class Token:
    """What the file says of one token; on a call, what its caller may do."""

    name: str
    sha256: str
    roles: frozenset[Role]
    models: tuple[str, ...] = EVERY_MODEL
    not_before: datetime | None = None
    expires: datetime | None = None

    def may_use(self, model: str) -> bool:
        return self._globs is None or self._globs.match(model) is not None

    @cached_property
    def span(self) -> tuple[float, float]:
        """From when until when it is valid, in seconds since the epoch."""
        return (
            self.not_before.timestamp() if self.not_before else float("-inf"),
            self.expires.timestamp() if self.expires else float("inf"),
        )

    @cached_property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)

    @cached_property
    def _globs(self) -> re.Pattern[str] | None:
        """One pattern for all globs, None for every model."""
        if "*" in self.models:
            return None
        return re.compile("|".join(map(fnmatch.translate, self.models)))


class TokenFile:
    """The tokens of a file as it is now. A file that has become unreadable or wrong leaves the tokens of before."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, signature(path)
        self._by_digest = _by_digest(path)

    def find(self, token: str) -> Token | None:
        digest = hashlib.sha256(token.encode()).digest()
        found = self._by_digest.get(digest)
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None

    @property
    def names(self) -> set[str]:
        return {token.name for token in self._by_digest.values()}

    def refresh(self, *, force: bool = False) -> None:
        """Read the file again if it has changed."""
        now = signature(self._path)
        if now == self._seen and not force:
            return
        self._seen = now
        try:
            self._by_digest = _by_digest(self._path)
        except Refused as error:
            log.error("%s; the tokens known before go on being valid", error.message)
        else:
            log.info("token file read again: %d tokens", len(self._by_digest))


def read(path: Path) -> list[Token]:
    """The tokens of a file. Refused, naming the entry and never its hash, if anything in it is not as it should be."""
    try:
        if path.stat().st_mode & stat.S_IWOTH:
            raise Refused(f"token file {path}: everybody may write it, and so give themselves any role; chmod it")
        text = path.read_text()
        if not text:
            raise Refused(f"token file {path} is empty, as a file is while it is being written")
        entries = tomllib.loads(text)
    except OSError as error:
        raise Refused(f"token file {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise Refused(f"token file {path} is not TOML") from None
    listed = entries.pop("token", [])
    if entries or not isinstance(listed, list):
        raise Refused(f"token file {path}: only [[token]] entries are wanted, got also {', '.join(entries) or 'token'}")
    try:
        tokens = [_token(number, entry) for number, entry in enumerate(listed, 1)]
        for what in ("name", "sha256"):
            _check_distinct(tokens, what)
    except ValueError as error:
        raise Refused(f"token file {path}: {error}") from None
    return tokens


def add(path: Path, name: str, roles: Iterable[str], models: Iterable[str], days: float | None) -> str:
    """Make a token, write its hash into the file, return the token: it is shown now or never."""
    tokens = read(path) if path.exists() and path.stat().st_size else []
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    now = datetime.now(UTC).replace(microsecond=0)
    entry: dict[str, Any] = {
        "name": name,
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "roles": list(roles),
        "models": list(models),
    }
    if days is not None:
        if not 0 < days <= MOST_DAYS:
            raise Refused(f"days must be in 0..{MOST_DAYS}, got {days:g}")
        entry["expires"] = now + timedelta(days=days)
    try:
        tokens.append(_token(len(tokens) + 1, entry))
        _check_distinct(tokens, "name")
    except ValueError as error:
        raise Refused(str(error)) from None
    _write(path, tokens)
    return secret


def revoke(path: Path, name: str) -> None:
    """Take a token out of the file."""
    tokens = read(path)
    left = [token for token in tokens if token.name != name]
    if len(left) == len(tokens):
        raise Refused(f"no token {shown(name)}; there are: {', '.join(token.name for token in tokens) or 'none'}")
    _write(path, left)


def _by_digest(path: Path) -> dict[bytes, Token]:
    return {token.digest: token for token in read(path)}


def _token(number: int, entry: Any) -> Token:
    """One checked entry; ValueError says which and what."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"entry {number} is not a table")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"entry {number}: name must be 1 to 64 letters, digits, '.', '_' or '-', got {shown(name)}")
    unknown = entry.keys() - Token.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"token {name!r}: unknown key {', '.join(sorted(unknown))}")
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"token {name!r}: sha256 must be 64 hexadecimal digits in lower case")
    times = {key: _time(name, key, entry[key]) for key in ("not_before", "expires") if key in entry}
    return Token(name, digest, _roles(name, entry.get("roles")), _models(name, entry.get("models", ["*"])), **times)


def _roles(name: str, words: Any) -> frozenset[Role]:
    if not isinstance(words, list) or not words or any(word not in list(Role) for word in words):
        raise ValueError(f"token {name!r}: roles must be a list of some of {', '.join(Role)}; got {shown(words)}")
    return frozenset(map(Role, words))


def _models(name: str, globs: Any) -> tuple[str, ...]:
    if not isinstance(globs, list) or not globs or not all(isinstance(glob, str) and glob for glob in globs):
        raise ValueError(f"token {name!r}: models must be a list of globs, got {shown(globs)}")
    return tuple(globs)


def _time(name: str, key: str, value: Any) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError(f"token {name!r}: {key} must be a time with its zone, as 2027-02-23T00:00:00Z")
    return value


def _check_distinct(tokens: list[Token], what: str) -> None:
    times_seen = Counter(getattr(token, what) for token in tokens)
    for token in tokens:
        if times_seen[getattr(token, what)] > 1:
            raise ValueError(f"token {token.name!r} has the {what} of another entry")


def _write(path: Path, tokens: list[Token]) -> None:
    """The whole file, private if it is new, else with the owner and mode it had: the server must be able to read it."""
    before = path.stat() if path.exists() else None
    write_whole(path, "\n".join([_HEADING, *map(_entry, tokens)]).encode(), mode=PRIVATE)
    if before is not None:
        with suppress(PermissionError):
            os.chown(path, before.st_uid, before.st_gid)
        path.chmod(stat.S_IMODE(before.st_mode))


def _entry(token: Token) -> str:
    lines = {
        "name": json.dumps(token.name),
        "sha256": json.dumps(token.sha256),
        "roles": json.dumps(sorted(token.roles)),
        "models": json.dumps(token.models),
        "not_before": token.not_before and token.not_before.isoformat(),
        "expires": token.expires and token.expires.isoformat(),
    }
    return "\n".join(["[[token]]", *(f"{key} = {value}" for key, value in lines.items() if value), ""])
