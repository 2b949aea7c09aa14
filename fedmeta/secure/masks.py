"""Keys that two sites agree on without the server (X25519, HKDF), what they encrypt, and the masks made of them."""

from __future__ import annotations

import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmeta.secure.ring import Ring

KEY_BYTES = 32
"""The length of a public key, a private one, and a seed."""

NONCE_BYTES = 12

_BLOCK = 16

_CHUNK = 1 << 16
"""So many bytes of a mask are made at once: what a processor's cache holds."""

_ZEROS = memoryview(bytes(_CHUNK))


def new_key() -> tuple[bytes, bytes]:
    """Returns a new private X25519 key and its public one, from the system's entropy."""
    key = X25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def public_of(private: bytes) -> bytes:
    """Returns the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, purpose: str, context: str) -> bytes:
    """Returns the 16 bytes that two sites derive from their keys, for one purpose in one round of one run.

    Raises:
        ValueError: The public key is none, or one that makes the outcome the same for all.
    """
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(hashes.SHA256(), _BLOCK, None, f"fedmeta {purpose} {context}".encode()).derive(shared)


def stretched(seed: bytes, context: str) -> bytes:
    """Returns the key of the mask that a site makes of its seed."""
    return HKDF(hashes.SHA256(), _BLOCK, None, f"fedmeta own {context}".encode()).derive(seed)


def add_mask(total: Ring, key: bytes, sign: int) -> None:
    """Adds the key stream of AES in counter mode to numbers in the ring, or subtracts it, in place.

    Args:
        total: The numbers.
        key: 16 bytes that serve for one mask alone.
        sign: 1 or -1.
    """
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK))).encryptor()
    combine = np.add if sign > 0 else np.subtract
    scratch = bytearray(_CHUNK + _BLOCK)
    for start in range(0, len(total), _CHUNK // 8):
        part = total[start : start + _CHUNK // 8]
        encryptor.update_into(_ZEROS[: part.nbytes], scratch)
        combine(part, np.frombuffer(scratch, dtype="<u8", count=len(part)), out=part)


def encrypt(key: bytes, plain: bytes, about: str) -> bytes:
    """Returns a text that only who has the key can read or change; `about` is bound to it and not hidden."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, about.encode())


def decrypt(key: bytes, text: bytes, about: str) -> bytes:
    """Returns what was encrypted.

    Raises:
        ValueError: It was changed, is about something else, or is of another key.
    """
    try:
        return AESGCM(key).decrypt(text[:NONCE_BYTES], text[NONCE_BYTES:], about.encode())
    except InvalidTag:
        raise ValueError("a share was changed on its way, or is of another round") from None
