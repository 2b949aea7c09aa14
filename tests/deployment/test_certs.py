import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedmeta import certs
from fedmeta.certs import make_certs, revoke, validities
from fedmeta.cli.main import main
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
    pair = {"public/ca.crt", "public/signing.pub", "tls.crt", "tls.key"}
    own = {*pair, "egress.crt", "egress.key", "node.key", "node.pub"}
    sites = {f"sites/{site}/{name}" for site in ("hospital-a", "hospital-b") for name in own}
    server = {f"server/{name}" for name in {*pair, "signing/signing.key", "revoked.pem"}}
    assert found == {"ca.crt", "ca.key", "issued.csv"} | server | sites


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
    assert {path.relative_to(made).parts[:2] for path in written} == {("sites", "hospital-c"), ("issued.csv",)}
    signing = [made / place / "public" / "signing.pub" for place in ("server", "sites/hospital-a", "sites/hospital-c")]
    assert len({path.read_bytes() for path in signing}) == 1
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


def serials(path: Path) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl(path.read_bytes())}


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def test_renewal_replaces_certificates_and_keeps_names_and_keys_that_sign(made: Path) -> None:
    kept = ["ca.crt", "ca.key", "sites/hospital-a/node.key", "server/signing/signing.key", "server/public/signing.pub"]
    replaced = ["server/tls.crt", "server/tls.key", "sites/hospital-a/tls.crt", "sites/hospital-b/egress.crt"]
    before = {name: (made / name).read_bytes() for name in (*kept, *replaced)}
    make_certs(made, [], [], renew=True)
    after = {name: (made / name).read_bytes() for name in (*kept, *replaced)}
    assert [name for name in before if before[name] == after[name]] == kept
    for host in ("localhost", "127.0.0.1", "fl.example.org", "10.1.2.3", "superlink", "gate"):
        verify(made, made / "server" / "tls.crt", host)
    with pytest.raises(FedmetaError, match="--server is not given with --renew"):
        make_certs(made, ["other.example.org"], [], renew=True)
    with pytest.raises(FedmetaError, match=r"hospital-x holds no certificate to renew"):
        make_certs(made, [], ["hospital-x"], renew=True)


def test_every_certificate_of_a_revoked_site_is_taken_back_and_none_of_anothers(made: Path) -> None:
    old = {serial(made / "sites" / "hospital-a" / f"{name}.crt") for name in ("tls", "egress")}
    make_certs(made, [], ["hospital-a"], renew=True)
    new = {serial(made / "sites" / "hospital-a" / f"{name}.crt") for name in ("tls", "egress")}
    revoke(made, ["hospital-a"])
    assert serials(made / "server" / "revoked.pem") == old | new
    make_certs(made, [], [], renew=True)
    assert serial(made / "sites" / "hospital-a" / "egress.crt") in new, "a revoked site is not renewed with the others"
    assert serials(made / "server" / "revoked.pem") == old | new
    make_certs(made, [], ["hospital-a"], force=True)
    assert serial(made / "sites" / "hospital-a" / "egress.crt") not in old | new
    with pytest.raises(FedmetaError, match=r'--revoke "hospital-x".*no certificate of such a site'):
        revoke(made, ["hospital-x"])


def test_days_left_are_shown_and_few_are_a_warning(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    days = {found.path.relative_to(made).as_posix(): found.days for found in validities(made)}
    assert days["ca.crt"] in (3649, 3650)
    assert days["server/tls.crt"] in (824, 825)
    monkeypatch.setattr(certs, "CERTIFICATE_DAYS", 30)
    make_certs(made, [], ["hospital-a"], renew=True)
    monkeypatch.setattr("sys.argv", ["fedmeta", "certs", "--out", str(made)])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "hospital-b/tls.crt: 824 days left" in line]
    assert [line for line in shown if "hospital-a/egress.crt: WARNING: 29 days left: renew it" in line]
    monkeypatch.setattr(certs, "CERTIFICATE_DAYS", -1)
    monkeypatch.setattr(certs, "_CLOCKS", timedelta(days=9))
    make_certs(made, [], ["hospital-a"], renew=True)
    assert certs.main([str(made / "sites" / "hospital-a")]) == 0
    assert "WARNING: expired" in capsys.readouterr().out
    assert certs.main([str(made / "nothing")]) == 2
    assert "there is no certificate" in capsys.readouterr().err
