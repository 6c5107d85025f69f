"""The handshake: each end proves that it has the key before the other believes a word of it.

    dialer   -> HELLO      version, a nonce, who it is, whom it wants, the credential's name, which link it replaces
    acceptor -> CHALLENGE  version, a nonce, who it is
    dialer   -> PROOF      HMAC-SHA256(key, "dialer" + HELLO + CHALLENGE)
    acceptor -> VERDICT    status, the link's number, HMAC-SHA256(key, "acceptor" + HELLO + CHALLENGE + PROOF + these)

All of fixed size, and nothing is unpickled. The roles are part of what is signed, so that no proof can be sent back
to where it came from; so are both nonces and both names, so that none can be used again or elsewhere. The dialer proves
first: who does not have the key learns nothing that could be tried against keys at leisure.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from typing import TYPE_CHECKING, NamedTuple

from collective.errors import HandshakeError, OutOfResources

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from collective._links.carrier import Carrier
    from collective.types import Credential

VERSION = 1
SECONDS = 60.0
"""What either end gives the other for all of it, and a dialer several times. On a machine with far more to run than
processors each step may take seconds; how much strangers can hold meanwhile is bounded by their number (`endpoint`)."""

NAME = 128
"""Most bytes of a credential's name."""
IDENTITY = 64
"""Most bytes of an endpoint's id."""
NUMBER = 16
"""Bytes of a link's number."""
NO_LINK = bytes(NUMBER)

_MAGIC = b"gangline"
_NONCE = 32
_HELLO = struct.Struct(f"<8sH{_NONCE}s{IDENTITY}s{IDENTITY}s{NAME}s{NUMBER}s")
_CHALLENGE = struct.Struct(f"<8sHB{_NONCE}s{IDENTITY}s")
_VERDICT = struct.Struct(f"<B{NUMBER}s32s")

_GO_ON, _OTHER_VERSION, _OTHER_ENDPOINT, _EXHAUSTED = range(4)
ACCEPTED, EXISTS, _DENIED = range(3)


class Hello(NamedTuple):
    """Who dials, as proved."""

    endpoint: str
    credential: Credential
    replaces: bytes
    """Number of a link that the dialer knows to be dead though the acceptor holds on to it, or NO_LINK."""
    number: bytes
    """The new link's number."""


class Verdict(NamedTuple):
    """What the acceptor made of a dial: ACCEPTED, or EXISTS where that other link is to be used."""

    status: int
    number: bytes


def _pad(text: str, size: int, what: str) -> bytes:
    data = text.encode()
    if not data or len(data) > size or b"\0" in data:
        raise ValueError(f"{what} is {text!r}; it must have 1 to {size} bytes")
    return data


def _sign(key: bytes, role: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, role + b"".join(parts), "sha256")


async def dial(carrier: Carrier, *, own: str, wanted: str, credential: Credential, replaces: bytes) -> Verdict:
    """Prove to the endpoint `wanted` that we have the key, and have it prove the same.

    Raises:
        HandshakeError: it is another endpoint, has another key, or speaks another version.
        OutOfResources: the other end has no descriptors for another link. LinkBroken: the connection ended.
    """
    hello = _HELLO.pack(
        _MAGIC,
        VERSION,
        os.urandom(_NONCE),
        _pad(own, IDENTITY, "the endpoint's id"),
        _pad(wanted, IDENTITY, "the address's endpoint"),
        _pad(credential.name, NAME, "the credential's name"),
        replaces,
    )
    carrier.put(hello)
    challenge = await carrier.take(_CHALLENGE.size)
    magic, version, status, _, identity = _CHALLENGE.unpack(challenge)
    if magic != _MAGIC:
        raise HandshakeError(f"{carrier.where} is no endpoint of this library")
    if version != VERSION or status == _OTHER_VERSION:
        raise HandshakeError(f"{carrier.where} speaks version {version} of the protocol, this end {VERSION}")
    if status == _EXHAUSTED:
        raise OutOfResources("file descriptors", f"the process at the other end of {carrier.where}", "take a link")
    if identity.rstrip(b"\0") != wanted.encode() or status != _GO_ON:
        there = identity.rstrip(b"\0").decode("ascii", "replace")
        raise HandshakeError(f"{carrier.where} is endpoint {there!r}, not {wanted!r}")
    proof = _sign(credential.key, b"dialer", hello, challenge)
    carrier.put(proof)
    status, number, signature = _VERDICT.unpack(await carrier.take(_VERDICT.size))
    if status == _DENIED:
        raise HandshakeError(
            f"endpoint {wanted} ({carrier.where}) does not accept credential {credential.name!r}: "
            "it was not granted there, or with another key"
        )
    expected = _sign(credential.key, b"acceptor", hello, challenge, proof, bytes([status]), number)
    if not hmac.compare_digest(signature, expected):
        raise HandshakeError(f"endpoint {wanted} ({carrier.where}) does not have the key of {credential.name!r}")
    return Verdict(status, number)


async def accept(
    carrier: Carrier,
    *,
    own: str,
    find: Callable[[str], Credential | None],
    decide: Callable[[Hello], Awaitable[Verdict]],
) -> None:
    """Have a dialer prove itself, and answer with what `decide` says, which is asked only after that.

    `decide` may wait. From its return to the answer's sending nothing else runs.

    Raises:
        HandshakeError: it could not. LinkBroken: the connection ended.
    """
    magic = await carrier.take(len(_MAGIC))
    if magic != _MAGIC:
        raise HandshakeError(f"{carrier.where} does not speak this protocol")
    hello = magic + await carrier.take(_HELLO.size - len(_MAGIC))
    _, version, _, identity, wanted, name, replaces = _HELLO.unpack(hello)
    status = _GO_ON
    if version != VERSION:
        status = _OTHER_VERSION
    elif wanted.rstrip(b"\0") != own.encode():
        status = _OTHER_ENDPOINT
    elif carrier.last:
        status = _EXHAUSTED
    challenge = _CHALLENGE.pack(_MAGIC, VERSION, status, os.urandom(_NONCE), own.encode())
    carrier.put(challenge)
    if status != _GO_ON:
        raise HandshakeError(f"{carrier.where} wants another endpoint or version, or more than this end has")
    proof = await carrier.take(hashlib.sha256().digest_size)
    try:
        credential = find(name.rstrip(b"\0").decode())
        endpoint = identity.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        credential, endpoint = None, ""
    # An unknown name takes the same steps as a wrong key: which names exist is nobody's business.
    key = credential.key if credential is not None else secrets.token_bytes(32)
    genuine = hmac.compare_digest(proof, _sign(key, b"dialer", hello, challenge))
    if credential is None or not genuine or not endpoint:
        carrier.put(_VERDICT.pack(_DENIED, NO_LINK, bytes(32)))
        raise HandshakeError(f"{carrier.where} could not prove its credential")
    number = hashlib.sha256(hello + challenge).digest()[:NUMBER]
    verdict = await decide(Hello(endpoint, credential, replaces, number))
    signature = _sign(key, b"acceptor", hello, challenge, proof, bytes([verdict.status]), verdict.number)
    carrier.put(_VERDICT.pack(verdict.status, verdict.number, signature))
