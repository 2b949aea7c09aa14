"""Signatures of what a federation leaves: starts for new sites, and the models that sites make of them.

`fedmeta certs` makes an Ed25519 key for the server, `server/signing/signing.key`, and gives every site its public part,
`public/signing.pub`. Where the environment variable FEDMETA_SIGNING_KEY names a private key, what is written is signed
with it; where FEDMETA_VERIFY_KEY names public keys, one or several in one file, only what one of them signed is read.
The signature covers every text and every tensor of the file. A digest, which anyone can compute, is none.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from torch import Tensor

from fedmeta.errors import FedmetaError

SIGNING_KEY, VERIFY_KEY = "FEDMETA_SIGNING_KEY", "FEDMETA_VERIFY_KEY"
TEXT = "signature"
"""The text of a safetensors file that holds its signature, in base64."""

VERIFIED, UNCHECKED, UNSIGNED = "verified", "signed; not checked, for no key was given", "not signed"
"""What is known of a file's signature."""

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----\n?", re.DOTALL)
_DOMAIN = b"fedmeta signature 1\n"


def signed(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns a file's texts with its signature, where the environment names a key.

    Raises:
        FedmetaError: The key cannot be read.
    """
    plain = {name: text for name, text in texts.items() if name != TEXT}
    path = os.environ.get(SIGNING_KEY, "")
    if not path:
        return plain
    try:
        key = load_pem_private_key(Path(path).read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedmetaError(f"{SIGNING_KEY} = {path}: not a usable key ({error})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise FedmetaError(f"{SIGNING_KEY} = {path}: not an Ed25519 key, as fedmeta certs makes it")
    return {**plain, TEXT: base64.b64encode(key.sign(_content(plain, tensors))).decode("ascii")}


def check_signature(origin: str, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Returns what is known of a file's signature; checks it where the environment names public keys.

    Raises:
        FedmetaError: Keys are named, and none of them signed this content; or they cannot be read.
    """
    text = texts.get(TEXT, "")
    keys = verify_keys()
    if not keys:
        return UNCHECKED if text else UNSIGNED
    if not text:
        raise FedmetaError(f"{origin}: is not signed, and {_named()} asks for a signature; get it from the federation")
    try:
        signature = base64.b64decode(text, validate=True)
    except ValueError:
        signature = b""
    content = _content({name: value for name, value in texts.items() if name != TEXT}, tensors)
    for key in keys:
        try:
            key.verify(signature, content)
            return VERIFIED
        except InvalidSignature:
            continue
    raise FedmetaError(
        f"{origin}: its signature is of no key in {_named()}: it was changed, or made by someone else; do not use it"
    )


def refuse_checkpoint(origin: str) -> None:
    """Refuses a run's checkpoint as a start where signatures are asked for: checkpoints have none.

    Raises:
        FedmetaError: Keys are named.
    """
    if verify_keys():
        raise FedmetaError(
            f"{origin}: a checkpoint is not signed, and {_named()} asks for a signature: "
            "use the run's meta_model.safetensors, or models:/NAME/VERSION"
        )


def verify_keys() -> list[Ed25519PublicKey]:
    """Returns the public keys that the environment names; none where it names none.

    Raises:
        FedmetaError: The file cannot be read, or holds no such key.
    """
    path = os.environ.get(VERIFY_KEY, "")
    if not path:
        return []
    try:
        keys = [load_pem_public_key(found) for found in _PEM.findall(Path(path).read_bytes())]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise FedmetaError(f"{_named()}: not a usable public key ({error})") from None
    own = [key for key in keys if isinstance(key, Ed25519PublicKey)]
    if not own or len(own) < len(keys):
        raise FedmetaError(f"{_named()}: must hold Ed25519 public keys alone, such as the federation's signing.pub")
    return own


def _named() -> str:
    return f"{VERIFY_KEY} = {os.environ.get(VERIFY_KEY, '')}"


def _content(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Returns what is signed: a digest over all texts and tensors, each with its length before it."""
    digest = blake2b()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "big") + part)

    for name, text in sorted(texts.items()):
        add(name.encode())
        add(text.encode())
    add(b"tensors")
    for name, tensor in sorted(tensors.items()):
        add(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        add(tensor.detach().cpu().contiguous().numpy().tobytes())
    return _DOMAIN + digest.digest()
