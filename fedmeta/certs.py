"""Keys and certificates of a federation: its own authority, the server's certificate, and each site's keys.

    OUT/ca.crt, ca.key        the authority; its key is needed to add sites and should lie offline
    OUT/server/               for the server: public/ca.crt, tls.crt, tls.key
    OUT/sites/NAME/           for that site alone: public/ca.crt, tls.crt, tls.key, and node.key, node.pub

A site proves who it is with `node.key`, whose `node.pub` the server's operator registers (Flower's authentication of
SuperNodes: an elliptic-curve key of NIST P-384 in OpenSSH's format). A site's certificate protects the way between
its own two processes: it is valid for the host names `supernode` and `NAME-node` and opens nothing else. What runs
submitted code is given the folder `public` and no key.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmeta.errors import FedmetaError

AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 825
"""How long the authority and a certificate are valid; 825 days is the most that common clients accept of a server."""

_ALWAYS = ("localhost", "127.0.0.1")
_SITE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62})")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_CLOCKS = timedelta(minutes=5)

Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its certificate and the key that signs."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> bytes:
        """The certificate as a file's content."""
        return self.certificate.public_bytes(Encoding.PEM)


def make_certs(out: Path, servers: Sequence[str], sites: Sequence[str], *, force: bool = False) -> list[Path]:
    """Makes what a federation needs, or what is added to one: an authority that is there already is used again.

    Args:
        out: The folder; created, readable by its owner alone.
        servers: DNS names and IP addresses under which sites reach the server, beside localhost; empty = make no
            server certificate.
        sites: The sites to make keys for.
        force: Whether files that are there are replaced (the authority is never).

    Returns:
        The files written.

    Raises:
        FedmetaError: A name is not usable, a file is there already or cannot be written, or the authority is damaged.
    """
    if not servers and not sites:
        raise FedmetaError("nothing to make: name the server (--server) or at least one site (--site)")
    names = _server_names(servers)
    for site in sites:
        if not _SITE.fullmatch(site):
            raise FedmetaError(f'--site "{site}": use 1 to 63 letters, digits, ".", "_" or "-", the first no mark')
    if len(set(sites)) < len(sites):
        raise FedmetaError(f'--site "{next(site for site in sites if sites.count(site) > 1)}" is named twice')
    authority, files = _authority(out)
    if servers:
        files |= _pair(authority, out / "server", names)
    for site in sites:
        folder = out / "sites" / site
        hosts = ("supernode", f"{site}-node")
        if taken := set(hosts) & set(servers):
            raise FedmetaError(f'--server "{min(taken)}" is a host name of site {site}: name one of them otherwise')
        files |= _pair(authority, folder, [x509.DNSName(host) for host in hosts]) | _node_keys(folder)
    existing = [path for path in files if path.exists() or path.is_symlink()]
    if existing and not force:
        raise FedmetaError(f"{existing[0]} is there already: keep it, or replace it with --force")
    return _write(out, files)


def _server_names(servers: Sequence[str]) -> list[x509.GeneralName]:
    """Returns a certificate's names, localhost first, each once."""
    return [_general_name(name) for name in dict.fromkeys((*_ALWAYS, *servers))]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        labels = name.removeprefix("*.").split(".")
        if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
            raise FedmetaError(
                f'--server "{name}" is neither a host name nor an IP address; give it without scheme and port'
            ) from None
        return x509.DNSName(name)


def _authority(out: Path) -> tuple[Authority, dict[Path, bytes]]:
    """Returns the folder's authority, and the files to write where it is new."""
    certificate, key = out / "ca.crt", out / "ca.key"
    if certificate.exists() or key.exists():
        return _read_authority(certificate, key), {}
    secret = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmeta federation")])
    builder = _builder(name, name, secret, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(secret.public_key()), critical=False)
    authority = Authority(builder.sign(secret, hashes.SHA384()), secret)
    return authority, {certificate: authority.pem, key: _private(secret)}


def _read_authority(certificate: Path, key: Path) -> Authority:
    try:
        secret = load_pem_private_key(key.read_bytes(), None)
        authority = x509.load_pem_x509_certificate(certificate.read_bytes())
        if not isinstance(secret, ec.EllipticCurvePrivateKey):
            raise ValueError("not an elliptic-curve key")
        if authority.public_key() != secret.public_key():
            raise ValueError("certificate and key do not belong together")
        authority.verify_directly_issued_by(authority)
    except OSError as error:
        raise FedmetaError(f"{error.filename}: {error.strerror}: adding to a federation needs its authority") from error
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise FedmetaError(f"{key}, {certificate.name}: not a usable authority ({error})") from error
    if authority.not_valid_after_utc <= datetime.now(UTC):
        raise FedmetaError(f"{certificate}: the authority has expired: start a new folder")
    return Authority(authority, secret)


def _pair(authority: Authority, folder: Path, names: Sequence[x509.GeneralName]) -> dict[Path, bytes]:
    """Returns a folder's TLS files: the authority's certificate, an own one under some names, and its key."""
    secret = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
    days = min(CERTIFICATE_DAYS, (authority.certificate.not_valid_after_utc - datetime.now(UTC)).days)
    builder = _builder(subject, authority.certificate.subject, secret, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    certificate = builder.sign(authority.key, hashes.SHA384())
    return {
        folder / "public" / "ca.crt": authority.pem,
        folder / "tls.crt": certificate.public_bytes(Encoding.PEM),
        folder / "tls.key": _private(secret),
    }


def _node_keys(folder: Path) -> dict[Path, bytes]:
    secret = ec.generate_private_key(ec.SECP384R1())
    public = secret.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return {
        folder / "node.key": secret.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        folder / "node.pub": public + b" " + folder.name.encode() + b"\n",
    }


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    moment = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - _CLOCKS)
        .not_valid_after(moment + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(out: Path, files: Mapping[Path, bytes]) -> list[Path]:
    """Writes each file beside its place and moves it there, private ones for their owner alone."""
    try:
        for folder in _folders(out, files):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in files.items():
            part = path.with_name(f".{path.name}.part")
            part.unlink(missing_ok=True)
            mode = 0o600 if path.suffix == ".key" else 0o644
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
            part.replace(path)
    except OSError as error:
        raise FedmetaError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    return list(files)


def _folders(out: Path, files: Iterable[Path]) -> list[Path]:
    """Returns the folders to make, outer ones first."""
    found = {out} | {parent for path in files for parent in path.parents if parent.is_relative_to(out)}
    return sorted(found, key=lambda folder: len(folder.parts))
