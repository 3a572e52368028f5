"""The API keys that are accepted, and what each may do: from the command line and the key file."""

import hashlib
import hmac
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from config.errors import UsageError
from server.api.access.quotas import LIMITS, Quota, parse_quota

# In the middle of a word a # belongs to the key.
_REMARK = re.compile(r"(?:^|\s)#")
_GROUP = "cache_group="
_ADMIN = "admin"
# Permissions of a file with which the owner's group, or everybody, reads or writes it.
_OTHERS = 0o077

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What a request with this key may do; without keys there is one for all requests.

    `name` is shown in logs. `account` tells quotas, receipts and answers apart, and `cache_group` saved
    prefixes; neither is ever shown, since those of a key without a name are made from the key.
    """

    name: str = "local"
    account: str = ""
    cache_group: str = ""
    is_admin: bool = False
    quota: Quota = field(default_factory=Quota)


class KeyRing:
    """The keys that are accepted; with none, every key is.

    Quotas go by name: several keys of one name share one.
    """

    def __init__(
        self, keys: Iterable[tuple[str, str]] = (), quotas: Mapping[str, Quota] | None = None
    ) -> None:
        """`keys` are names and keys, none of them an admin's."""
        quotas = quotas or {}
        self._keys = {digest(key): _named(name, quotas.get(name, Quota())) for name, key in keys}

    @classmethod
    def of(cls, keys: Mapping[str, Key]) -> "KeyRing":
        """The ring of these keys."""
        ring = cls()
        ring._keys = {digest(key): described for key, described in keys.items()}
        return ring

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask."""
        return not self._keys

    def replace(self, other: "KeyRing") -> None:
        """Accept another ring's keys from now on, within its quotas."""
        self._keys = other._keys

    def find(self, key: str) -> Key | None:
        """What a key may do; None where it is not ours. Takes the same time whatever the key."""
        given = digest(key)
        found = [described for own, described in self._keys.items() if hmac.compare_digest(own, given)]
        return found[0] if found else None

    def name_of(self, key: str) -> str | None:
        """The name of a key; None where it is not ours."""
        found = Key() if self.is_open else self.find(key)
        return found.name if found else None


def read_keys(key: str | None, key_file: Path | None) -> KeyRing:
    """The key on the command line and those in a file, a key in each line:

    [NAME:] KEY [admin] [cache_group=NAME] [{requests,tokens}/{minute,day}=N ...]

    Raises UsageError where the file cannot be read, a line says nothing clear, or there is no key.
    """
    keys = {key: _named("default", Quota())} if key else {}
    quotas: dict[str, Quota] = {}
    lines = _lines(key_file) if key_file else ()
    for number, text in lines:
        try:
            own, described = _parse_line(text, f"line {number}")
            if own in keys:
                raise UsageError(f"this key is that of {keys[own].name!r} already")
        except UsageError as error:
            raise UsageError(f"--api-key-file {key_file}: line {number}: {error}") from error
        keys[own] = described
        if described.quota.limits:
            quotas[described.account] = described.quota
    if key_file and not lines:
        raise UsageError(f"--api-key-file {key_file} holds no key, so everybody would get in")
    return KeyRing.of(
        {own: replace(one, quota=quotas.get(one.account, one.quota)) for own, one in keys.items()}
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        if path.stat().st_mode & _OTHERS:
            log.warning("others may read or change --api-key-file %s: chmod 600 keeps it yours", path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows begin with a mark
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read --api-key-file {path}: {error}") from error
    texts = [(number, _REMARK.split(line, 1)[0].strip()) for number, line in enumerate(lines, 1)]
    return [(number, text) for number, text in texts if text]


def _parse_line(text: str, place: str) -> tuple[str, Key]:
    """The key of a line, and what it may do."""
    named, colon, rest = text.rpartition(":")
    name, (key, *words) = named.strip() if colon else "", rest.split() or [""]
    if not key or key.partition("=")[0] in (*LIMITS, _GROUP[:-1], _ADMIN):  # an empty key lets all in
        raise UsageError("there is a name but no key")
    if _GROUP in name:
        raise UsageError("the name of a cache_group has no colon")
    groups = [word.removeprefix(_GROUP) for word in words if word.startswith(_GROUP)]
    if groups and (len(groups) > 1 or not groups[0]):
        raise UsageError("cache_group=NAME is given once, with a name")
    limits = [word for word in words if word != _ADMIN and not word.startswith(_GROUP)]
    found = _named(name, parse_quota(limits)) if name else _unnamed(key, place, parse_quota(limits))
    group = groups[0] if groups else found.cache_group
    return key, replace(found, cache_group=group, is_admin=_ADMIN in words)


def _named(name: str, quota: Quota) -> Key:
    """A key whose name stays when the key itself is another one."""
    return Key(name, name, name, quota=quota)


def _unnamed(key: str, place: str, quota: Quota) -> Key:
    """A key that is called by its place in the file, which another one may have tomorrow."""
    account = f"key {digest(key).hex()}"
    return Key(place, account, account, quota=quota)


def digest(key: str) -> bytes:
    """Tells keys apart without keeping them; never shown."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def key_of(headers: Mapping[str, str]) -> str:
    """The bearer token, or what Anthropic's clients send instead."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
