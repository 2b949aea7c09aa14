"""What a federation signed is read, and what was changed, is someone else's, or is not signed is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedmeta import checkpoint, signing
from fedmeta.adapt.initialization import FILE, MetaModel
from fedmeta.adapt.locate import find_start, read_start
from fedmeta.adapt.model import FILE as MODEL
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.serving import _load_pyfunc
from fedmeta.certs import make_certs
from fedmeta.errors import FedmetaError
from tests.adapt.finished import run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetaModel, Path]:
    result, found = run(tmp_path_factory.mktemp("finished"), None, "server.rounds=1")
    return found, result.folder


@pytest.fixture
def certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A federation whose server signs and whose sites verify."""
    make_certs(tmp_path / "certs", ["fl.example.org"], ["a"])
    monkeypatch.setenv(signing.SIGNING_KEY, str(tmp_path / "certs" / "server" / "signing" / "signing.key"))
    monkeypatch.setenv(signing.VERIFY_KEY, str(tmp_path / "certs" / "sites" / "a" / "public" / "signing.pub"))
    return tmp_path / "certs"


def written(folder: Path, start: MetaModel) -> tuple[Path, Path]:
    folder.mkdir()
    start.write(folder / FILE)
    model = SiteModel.of(start, start.learner.theta(start.state))
    model.write(folder / MODEL, start, {})
    return folder / FILE, folder / MODEL


def changed(path: Path, change: Any) -> None:
    """Writes a safetensors file again, with its texts and tensors changed."""
    with safe_open(path, framework="pt") as file:
        texts, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.offset_keys()}
    change(texts, tensors)
    save_file(tensors, path, texts)


def test_what_the_federation_signed_is_read(start: Any, certs: Path, tmp_path: Path) -> None:
    file, model = written(tmp_path / "handed", start[0])
    found = find_start(str(file), tmp_path, "none")
    assert (found.digest, found.signature) == (start[0].digest, signing.VERIFIED)
    SiteModel.read(model)
    _load_pyfunc(str(tmp_path / "handed"))


def weights(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("bias"))
    tensors[name] = tensors[name] + 1e-6


def scale(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("scale"))
    tensors[name] = tensors[name] * 2


def experiment(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    texts["experiment"] += "\n# a comment\n"


def added(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    texts["more"] = ""


def no_signature(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    del texts[signing.TEXT]


def another_signature(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    texts[signing.TEXT] = "A" * 86 + "=="


def no_base64(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    texts[signing.TEXT] = "é"


@pytest.mark.parametrize(
    "change", [weights, scale, experiment, added, no_signature, another_signature, no_base64], ids=lambda f: f.__name__
)
def test_what_was_changed_is_refused(change: Any, start: Any, certs: Path, tmp_path: Path) -> None:
    for file in written(tmp_path / "handed", start[0]):
        changed(file, change)
        words = "is not signed" if change is no_signature else "its signature is of no key"
        with pytest.raises(FedmetaError, match=words) as error:
            (read_start if file.name == FILE else SiteModel.read)(file)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(FedmetaError):
        _load_pyfunc(str(tmp_path / "handed"))


def test_what_someone_else_signed_is_refused_unless_their_key_is_given_too(
    start: Any, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certs(tmp_path / "others", ["fl.example.org"], [])
    monkeypatch.setenv(signing.SIGNING_KEY, str(tmp_path / "others" / "server" / "signing" / "signing.key"))
    file, _ = written(tmp_path / "handed", start[0])
    with pytest.raises(FedmetaError, match="its signature is of no key"):
        read_start(file)
    both = [path / "server" / "public" / "signing.pub" for path in (certs, tmp_path / "others")]
    (tmp_path / "both.pub").write_bytes(b"".join(path.read_bytes() for path in both))
    monkeypatch.setenv(signing.VERIFY_KEY, str(tmp_path / "both.pub"))
    assert read_start(file).signature == signing.VERIFIED


def test_a_checkpoint_is_no_signed_start(start: Any, certs: Path, tmp_path: Path) -> None:
    newest = checkpoint.newest(start[1])[1]
    for place in (str(newest), str(start[1])):
        with pytest.raises(FedmetaError, match=r"a checkpoint is not signed.*use the run's meta_model.safetensors"):
            find_start(place, tmp_path, "none")


def test_without_a_key_the_state_of_the_signature_is_shown(
    start: Any, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = written(tmp_path / "signed", start[0])
    monkeypatch.delenv(signing.VERIFY_KEY)
    assert read_start(file).signature == signing.UNCHECKED
    monkeypatch.delenv(signing.SIGNING_KEY)
    file, _ = written(tmp_path / "plain", start[0])
    assert read_start(file).signature == signing.UNSIGNED
    assert replace(start[0], signature="x").digest == start[0].digest


@pytest.mark.parametrize("name", ["ca.key", "ca.crt", "nothing", "sites/a/node.pub"])
def test_a_key_that_is_none_is_named(
    name: str, start: Any, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = written(tmp_path / "handed", start[0])
    monkeypatch.setenv(signing.VERIFY_KEY, str(certs / name))
    with pytest.raises(FedmetaError, match=f"{signing.VERIFY_KEY} = .*{name}"):
        read_start(file)
    monkeypatch.setenv(signing.SIGNING_KEY, str(certs / name))
    with pytest.raises(FedmetaError, match=f"{signing.SIGNING_KEY} = .*{name}"):
        start[0].write(tmp_path / "other.safetensors")
