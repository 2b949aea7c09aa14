import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedmeta.certs import make_certs
from fedmeta.errors import FedmetaError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_certs(tmp_path / "certs", ["fl.example.org", "10.1.2.3"], ["hospital-a", "hospital-b"])
    return tmp_path / "certs"


def verify(out: Path, certificate: Path, host: str) -> None:
    store = Store([x509.load_pem_x509_certificate((out / "ca.crt").read_bytes())])
    try:
        subject: x509.DNSName | x509.IPAddress = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    verifier = PolicyBuilder().store(store).build_server_verifier(subject)
    verifier.verify(x509.load_pem_x509_certificate(certificate.read_bytes()), [])


def test_makes_each_file_once(made: Path) -> None:
    found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    pair = {"public/ca.crt", "tls.crt", "tls.key"}
    sites = {
        f"sites/{site}/{name}" for site in ("hospital-a", "hospital-b") for name in {*pair, "node.key", "node.pub"}
    }
    assert found == {"ca.crt", "ca.key"} | {f"server/{name}" for name in pair} | sites


def test_only_the_owner_reads_private_keys_and_enters_folders(made: Path) -> None:
    for path in (made, *made.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600 if path.suffix == ".key" else 0o644), path


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "fl.example.org", "10.1.2.3"])
def test_the_server_is_trusted_under_each_of_its_names(made: Path, host: str) -> None:
    verify(made, made / "server" / "tls.crt", host)


def test_nobody_is_trusted_under_a_name_that_is_not_theirs(made: Path) -> None:
    with pytest.raises(VerificationError):
        verify(made, made / "server" / "tls.crt", "other.example.org")
    for host in ("fl.example.org", "localhost", "127.0.0.1"):
        with pytest.raises(VerificationError):
            verify(made, made / "sites" / "hospital-a" / "tls.crt", host)
    verify(made, made / "sites" / "hospital-a" / "tls.crt", "supernode")


def test_another_federations_authority_does_not_vouch(made: Path, tmp_path: Path) -> None:
    make_certs(tmp_path / "others", ["fl.example.org"], [])
    with pytest.raises(VerificationError):
        verify(tmp_path / "others", made / "server" / "tls.crt", "fl.example.org")


def test_validity_is_bounded_and_within_the_authoritys(made: Path) -> None:
    authority = x509.load_pem_x509_certificate((made / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((made / "server" / "tls.crt").read_bytes())
    now = datetime.now(UTC)
    assert authority.not_valid_before_utc <= now <= now + timedelta(days=3600) < authority.not_valid_after_utc
    assert now + timedelta(days=800) < server.not_valid_after_utc < now + timedelta(days=826)


def test_node_keys_are_of_the_curve_and_format_that_flower_reads(made: Path) -> None:
    keys = set()
    for site in ("hospital-a", "hospital-b"):
        folder = made / "sites" / site
        private = load_ssh_private_key((folder / "node.key").read_bytes(), None)
        public = load_ssh_public_key((folder / "node.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        assert private.public_key() == public
        keys.add((folder / "node.pub").read_text())
    assert len(keys) == 2


def test_nothing_is_overwritten_and_nothing_half_written(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with pytest.raises(FedmetaError, match=r"sites/hospital-b/public/ca.crt is there already.*--force"):
        make_certs(made, [], ["hospital-c", "hospital-b"])
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_force_replaces_what_is_named_and_keeps_the_authority(made: Path) -> None:
    authority = (made / "ca.key").read_bytes()
    old = {site: (made / "sites" / site / "node.key").read_bytes() for site in ("hospital-a", "hospital-b")}
    make_certs(made, [], ["hospital-a"], force=True)
    assert (made / "ca.key").read_bytes() == authority
    assert (made / "sites" / "hospital-a" / "node.key").read_bytes() != old["hospital-a"]
    assert (made / "sites" / "hospital-b" / "node.key").read_bytes() == old["hospital-b"]


def test_a_site_is_added_later_under_the_same_authority(made: Path) -> None:
    written = make_certs(made, [], ["hospital-c"])
    assert {path.relative_to(made).parts[:2] for path in written} == {("sites", "hospital-c")}
    verify(made, made / "sites" / "hospital-c" / "tls.crt", "supernode")


@pytest.mark.parametrize(
    ("servers", "sites", "words"),
    [
        ([], [], "nothing to make"),
        (["https://fl.example.org"], [], "without scheme and port"),
        (["fl.example.org:8000"], [], "without scheme and port"),
        (["10.1.2.300"], [], "neither a host name nor an IP address"),
        (["-fl.example.org"], [], "neither a host name"),
        (["münchen.example.org"], [], "neither a host name"),
        ([""], [], "neither a host name"),
        ([], ["../escape"], r'--site "\.\./escape"'),
        ([], ["a/b"], "--site"),
        ([], [""], "--site"),
        ([], [".hidden"], "--site"),
        ([], ["a", "a"], "named twice"),
        (["a-node"], ["a"], "is a host name of site a"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(
    tmp_path: Path, servers: list[str], sites: list[str], words: str
) -> None:
    with pytest.raises(FedmetaError, match=words):
        make_certs(tmp_path / "certs", servers, sites)
    assert not (tmp_path / "certs").exists()


def test_a_damaged_or_half_authority_is_refused(made: Path, tmp_path: Path) -> None:
    make_certs(tmp_path / "others", ["fl.example.org"], [])
    good = (made / "ca.key").read_bytes()
    (made / "ca.key").write_bytes((tmp_path / "others" / "ca.key").read_bytes())
    with pytest.raises(FedmetaError, match="do not belong together"):
        make_certs(made, [], ["hospital-c"])
    (made / "ca.key").write_bytes(good[:40])
    with pytest.raises(FedmetaError, match="not a usable authority"):
        make_certs(made, [], ["hospital-c"])
    (made / "ca.key").unlink()
    with pytest.raises(FedmetaError, match="needs its authority"):
        make_certs(made, [], ["hospital-c"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedmetaError, match=r"cannot write .*file"):
        make_certs(tmp_path / "file" / "certs", ["fl.example.org"], [])
