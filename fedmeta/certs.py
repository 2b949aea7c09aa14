"""Keys and certificates of a federation: its own authority, the server's certificate, and each site's keys.

    OUT/ca.crt, ca.key        the authority; its key is needed to add sites and should lie offline
    OUT/issued.csv            every certificate that was made: serial number, whose, until when
    OUT/server/               for the server: public/ca.crt, public/signing.pub, tls.crt, tls.key, revoked.pem,
                              signing/signing.key
    OUT/sites/NAME/           for that site alone: public/ca.crt, public/signing.pub, tls.crt, tls.key, egress.crt,
                              egress.key, node.key, node.pub

A site proves who it is twice. Its proxy shows `egress.crt` to the federation's gate, which takes certificates of the
authority that are not revoked. Its node signs with `node.key`, whose `node.pub` the server's operator registers
(Flower's authentication of SuperNodes: an elliptic-curve key of NIST P-384 in OpenSSH's format). `tls.crt` protects the
way between the site's own processes: it is valid for the host names `supernode` and `NAME-node` and opens nothing else.
What runs submitted code is given the folder `public` and no key. With `signing.key` the server signs what it hands to
new sites, who verify it by `public/signing.pub` (see `fedmeta.signing`).

`python -m fedmeta.certs FOLDER` prints how many days each certificate in a folder is still valid.
"""

from __future__ import annotations

import csv
import io
import ipaddress
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
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

WARN_DAYS = 30
"""With fewer days left, a certificate is reported as one to renew."""

SUPERLINK, GATE = "superlink", "gate"
"""What proxies call the server's two services when they check their certificate, whatever their address is."""

_ALWAYS = ("localhost", "127.0.0.1", SUPERLINK, GATE)
_SERVER = [ExtendedKeyUsageOID.SERVER_AUTH]
_BOTH = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
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


@dataclass(frozen=True)
class Validity:
    """How long a certificate file is valid.

    Attributes:
        path: The file.
        days: Whole days that are left; negative where it has expired.
    """

    path: Path
    days: int

    @property
    def text(self) -> str:
        """One line for people."""
        if self.days < 0:
            return f"{self.path}: WARNING: expired {-self.days} days ago: renew it (fedmeta certs --renew)"
        warning = "WARNING: " if self.days < WARN_DAYS else ""
        remedy = ": renew it (fedmeta certs --renew)" if warning else ""
        return f"{self.path}: {warning}{self.days} days left{remedy}"


def validities(folder: Path) -> list[Validity]:
    """Returns how long each certificate in a folder and the folders in it is valid, by path.

    Raises:
        FedmetaError: There is none, or one cannot be read.
    """
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.crt"))
    if not paths:
        raise FedmetaError(f"{folder}: there is no certificate (*.crt)")
    moment = datetime.now(UTC)
    return [Validity(path, (_read_certificate(path).not_valid_after_utc - moment).days) for path in paths]


def make_certs(
    out: Path, servers: Sequence[str], sites: Sequence[str], *, force: bool = False, renew: bool = False
) -> list[Path]:
    """Makes what a federation needs, or what is added to one: an authority that is there already is used again.

    Args:
        out: The folder; created, readable by its owner alone.
        servers: DNS names and IP addresses under which sites reach the server, beside localhost, `superlink` and
            `gate`; empty = make no server certificate.
        sites: The sites to make keys for.
        force: Whether files that are there are replaced (the authority is never).
        renew: Make new certificates for the server and the sites that are in the folder already, of the same names, or
            with `sites` for these alone; sites whose certificates were taken back are left out unless named. The keys
            by which nodes sign and the server signs stay as they are.

    Returns:
        The files written.

    Raises:
        FedmetaError: A name is not usable, a file is there already or cannot be written, or the authority is damaged.
    """
    if renew:
        return _renew(out, servers, sites)
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
        files |= _pair(authority, out / "server", "tls", names, _SERVER)
    keys, public = _signing_key(out / "server", make=bool(servers))
    for site in sites:
        folder = out / "sites" / site
        if taken := set(_hosts(site)) & set(servers):
            raise FedmetaError(f'--server "{min(taken)}" is a host name of site {site}: name one of them otherwise')
        files |= _site_pairs(authority, folder) | _node_keys(folder)
        files |= {folder / "public" / SIGNING: public} if public else {}
    existing = [path for path in files if path.exists() or path.is_symlink()]
    if servers:
        files |= keys | {out / "server" / "revoked.pem": _revocations(authority, _revoked(out))}
    if existing and not force:
        raise FedmetaError(f"{existing[0]} is there already: keep it, or replace it with --force")
    return _write(out, {**files, **_issued(out, files)})


def revoke(out: Path, sites: Sequence[str]) -> list[Path]:
    """Takes the certificates of sites back: the gate refuses them once it has the new `server/revoked.pem`.

    Args:
        out: The federation's folder.
        sites: The sites; every certificate that was ever made for them is taken back.

    Returns:
        The file written.

    Raises:
        FedmetaError: No certificate was made for a site, or the authority is damaged.
    """
    authority = _read_authority(out / "ca.crt", out / "ca.key")
    entries = _read_issued(out)
    serials = _revoked(out)
    for site in sites:
        own = {serial for serial, name in entries if name == f"sites/{site}"}
        if not own:
            raise FedmetaError(f'--revoke "{site}": {out / ISSUED} has no certificate of such a site')
        serials |= own
    return _write(out, {out / "server" / "revoked.pem": _revocations(authority, serials)})


def _renew(out: Path, servers: Sequence[str], sites: Sequence[str]) -> list[Path]:
    if servers:
        raise FedmetaError("--server is not given with --renew: the certificate keeps its names")
    authority = _read_authority(out / "ca.crt", out / "ca.key")
    files: dict[Path, bytes] = {}
    server = out / "server" / "tls.crt"
    if server.is_file() and not sites:
        names = _read_certificate(server).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        always = [_general_name(name) for name in _ALWAYS]
        files |= _pair(authority, out / "server", "tls", list(dict.fromkeys([*always, *names])), _SERVER)
        files |= {out / "server" / "revoked.pem": _revocations(authority, _revoked(out))}
    keys, public = _signing_key(out / "server", make=server.is_file())
    files |= keys
    for site in sites or _renewable(out):
        if not (out / "sites" / site / "tls.crt").is_file():
            raise FedmetaError(f'--site "{site}": {out / "sites" / site} holds no certificate to renew')
        files |= _site_pairs(authority, out / "sites" / site)
        files |= {out / "sites" / site / "public" / SIGNING: public} if public else {}
    if not files:
        raise FedmetaError(f"{out}: there is no certificate to renew")
    return _write(out, {**files, **_issued(out, files)})


def _renewable(out: Path) -> list[str]:
    """Returns the sites that have certificates which are not taken back."""
    revoked = _revoked(out)
    held = [file.parent for file in sorted((out / "sites").glob("*/tls.crt"))]
    return [folder.name for folder in held if _read_certificate(folder / "tls.crt").serial_number not in revoked]


def _hosts(site: str) -> tuple[str, ...]:
    return ("supernode", f"{site}-node", "egress", f"{site}-egress")


def _site_pairs(authority: Authority, folder: Path) -> dict[Path, bytes]:
    """Returns a site's two certificates: one for its node, and one by which its proxy is known on both sides."""
    node, named, egress, other = _hosts(folder.name)
    inside = [x509.DNSName(node), x509.DNSName(named)]
    # A node beside its proxy on one machine calls it by the loopback address.
    outside = [x509.DNSName(egress), x509.DNSName(other), *map(_general_name, _ALWAYS[:2])]
    return _pair(authority, folder, "tls", inside, _SERVER) | _pair(authority, folder, "egress", outside, _BOTH)


def _signing_key(folder: Path, make: bool) -> tuple[dict[Path, bytes], bytes]:
    """Returns the files of a new signing key where there is none, and the public key's content, empty without one."""
    path = folder / "signing" / "signing.key"
    if path.is_file():
        try:
            secret = load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FedmetaError(f"{path}: not a usable key ({error})") from None
        return {}, secret.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if not make:
        return {}, b""
    new = ed25519.Ed25519PrivateKey.generate()
    public = new.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    private = new.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return {path: private, folder / "public" / SIGNING: public}, public


SIGNING = "signing.pub"
"""The file with the public key by which the federation's starts are verified."""

ISSUED = "issued.csv"
"""The list of certificates that were made, in the federation's folder."""


def _issued(out: Path, files: Mapping[Path, bytes]) -> dict[Path, bytes]:
    """Returns the list of certificates with those among some files added."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    path = out / ISSUED
    if not path.is_file():
        rows.writerow(("serial", "whose", "until"))
    for file, content in files.items():
        if file.suffix == ".crt" and file.name != "ca.crt":
            made = x509.load_pem_x509_certificate(content)
            rows.writerow((f"{made.serial_number:x}", file.parent.relative_to(out), made.not_valid_after_utc.date()))
    return {path: (path.read_bytes() if path.is_file() else b"") + text.getvalue().encode()}


def _read_issued(out: Path) -> list[tuple[int, str]]:
    """Returns the serial numbers of all certificates that were made, each with whose it is."""
    path = out / ISSUED
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(int(row["serial"], 16), row["whose"]) for row in csv.DictReader(file)]
    except OSError as error:
        raise FedmetaError(f"{path}: {error.strerror}: it names the certificates that were made") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FedmetaError(f"{path}: not a list of certificates ({error})") from None


def _revoked(out: Path) -> set[int]:
    """Returns the serial numbers that are taken back already."""
    path = out / "server" / "revoked.pem"
    if not path.is_file():
        return set()
    try:
        return {entry.serial_number for entry in x509.load_pem_x509_crl(path.read_bytes())}
    except ValueError as error:
        raise FedmetaError(f"{path}: not a list of revoked certificates ({error})") from None


def _revocations(authority: Authority, serials: Iterable[int]) -> bytes:
    """Returns the list of revoked certificates as a file's content, valid as long as the authority."""
    moment = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(moment - _CLOCKS)
        .next_update(authority.certificate.not_valid_after_utc)
    )
    for serial in sorted(serials):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment - _CLOCKS).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise FedmetaError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise FedmetaError(f"{path}: not a certificate ({error})") from None


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


def _pair(
    authority: Authority,
    folder: Path,
    name: str,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
) -> dict[Path, bytes]:
    """Returns a folder's TLS files: the authority's certificate, an own one under some names, and its key."""
    secret = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
    days = min(CERTIFICATE_DAYS, (authority.certificate.not_valid_after_utc - datetime.now(UTC)).days)
    builder = _builder(subject, authority.certificate.subject, secret, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    certificate = builder.sign(authority.key, hashes.SHA384())
    return {
        folder / "public" / "ca.crt": authority.pem,
        folder / f"{name}.crt": certificate.public_bytes(Encoding.PEM),
        folder / f"{name}.key": _private(secret),
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


def main(arguments: Sequence[str]) -> int:
    """Prints how long the certificates in folders are valid; returns 2 where one cannot be read."""
    try:
        for folder in arguments:
            for found in validities(Path(folder)):
                print(f"fedmeta: {found.text}")
    except FedmetaError as error:
        print(f"fedmeta: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
