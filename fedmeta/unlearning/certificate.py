"""The certificate of a forgotten site: which run was repeated without it, and what both of them left behind.

It is JSON, one object, and signed where the environment names the federation's key (`fedmeta.signing`). The signature
covers every entry but itself. Without a key its digest shows damage, and does not show who wrote it; then the proof is
to train again (`fedmeta verify FILE --retrain`), which needs the data of the sites that are left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedmeta import signing
from fedmeta.errors import FedmetaError
from fedmeta.files import read_json, write_atomic

FORMAT = "fedmeta forget 1"
DIGEST = "digest"
LARGEST = 1 << 26
"""The longest file that is read as a certificate (bytes): one names every site that is left."""


@dataclass(frozen=True)
class Certificate:
    """What is certified.

    Attributes:
        site: The site that was taken out.
        kind: What it was in the run: "training", "validation" or "new"; a new one has only been scored.
        rounds_with_site: In how many rounds of the run its reply was in the step; -1 where the run did not count.
        run: The run's MLflow id, or its own where it is not tracked.
        run_state: The digest of the run's last meta-state.
        experiment: The experiment that was trained without the site, as TOML.
        seed: Its `runtime.seed`.
        rounds: How many rounds it trained.
        retrained: The id of the run without the site.
        state: The digest of that run's last meta-state.
        took_part: In how many of its rounds each site's reply was in the step; the site is not among the names.
        threads: The threads of torch, which change last bits.
        repeatable: Whether training again gives the same bits; noise for privacy does not.
        versions: What computed it.
        made: When, in UTC.
    """

    site: str
    kind: str
    rounds_with_site: int
    run: str
    run_state: str
    experiment: str
    seed: int
    rounds: int
    retrained: str
    state: str
    took_part: Mapping[str, int]
    threads: int
    repeatable: bool
    versions: Mapping[str, str]
    made: str

    def to_json(self) -> str:
        """Returns the certificate, with a digest, and signed where the environment names a key.

        Raises:
            FedmetaError: The key cannot be read.
        """
        entries = {"format": FORMAT, **asdict(self)}
        entries[DIGEST] = _digest(entries)
        signature = signing.signed({"certificate": _canonical(entries)}, {}).get(signing.TEXT)
        return json.dumps(entries | ({signing.TEXT: signature} if signature else {}), indent=1, ensure_ascii=False)

    def write(self, path: Path) -> None:
        """Writes it to a file, atomically.

        Raises:
            FedmetaError: The disk does not take it.
        """
        try:
            write_atomic(path, self.to_json().encode() + b"\n")
        except OSError as error:
            raise FedmetaError(f"{path}: cannot be written: {error.strerror or error}") from error


def read(path: Path) -> tuple[Certificate, str]:
    """Returns a certificate and what is known of its signature, one of `signing`'s texts.

    Raises:
        FedmetaError: The file is none, was changed, or is not signed by a key that the environment asks for.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise FedmetaError(f"{path}: larger than {LARGEST >> 20} MiB, which no certificate is")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedmetaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    entries = read_json(text, dict[str, Any], f"{path}: a certificate")
    signature = entries.pop(signing.TEXT, None)
    if entries.get("format") != FORMAT:
        raise FedmetaError(f'{path}: not a certificate of a forgotten site: its format is not "{FORMAT}"')
    texts = {"certificate": _canonical(entries)}
    known = signing.check_signature(str(path), texts | ({signing.TEXT: str(signature)} if signature else {}), {})
    if entries.pop(DIGEST, "") != _digest(entries):
        raise FedmetaError(f"{path}: its digest differs from its content: it was changed; do not use it")
    del entries["format"]
    if set(entries) != {field.name for field in fields(Certificate)}:
        raise FedmetaError(f"{path}: has other entries than a certificate; get it from who made it")
    try:
        for name, kind in get_type_hints(Certificate).items():
            TypeAdapter(kind).validate_python(entries[name], strict=True)
    except ValidationError:
        raise FedmetaError(f"{path}: {name} is not what a certificate holds; get it from who made it") from None
    return Certificate(**entries), known


def _canonical(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def _digest(entries: Mapping[str, Any]) -> str:
    return blake2b(_canonical(entries).encode(), digest_size=32).hexdigest()
