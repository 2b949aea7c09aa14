"""A run without a site is the run that never had it, and its certificate shows that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmeta import checkpoint, run, signing
from fedmeta.certs import make_certs
from fedmeta.data import load
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.unlearning import certificate, forget, verify, without_site
from fedmeta.unlearning.retrain import FILE, Forgotten
from fedmeta.unlearning.values import site_values

RNG = np.random.default_rng(3)
NAMES = ("ash", "beech", "cedar", "elm", "fir", "oak")
SMALL = (
    "server.rounds=3", "server.sites_per_round=3", "evaluation.every=0", "model.hidden=4", "data.support=6",
    "evaluation.local_baseline=none",
)  # fmt: skip


def npz(folder: Path, without: str = "") -> Path:
    """Writes six sites of three classes, of which "fir" alone has the last; without one of them where asked for."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(len(NAMES)), 20)
    x = rng.normal(size=(len(owners), 4)).astype(np.float32)
    y = np.array(["a", "b"])[(x[:, 0] + 0.3 * owners > 1).astype(int)]
    y[(owners == NAMES.index("fir")) & (np.arange(len(owners)) % 3 == 0)] = "c"
    kept = np.array([NAMES[owner] != without for owner in owners])
    path = folder / f"sites{without}.npz"
    np.savez(path, x=x[kept], y=y[kept], site=np.array(NAMES)[owners[kept]])
    return path


def small(folder: Path, *overrides: str) -> Experiment:
    own = ("data.source=npz", f"data.path={npz(folder)}", "tracking.uri=none", f"tracking.folder={folder / 'runs'}")
    return Experiment().with_overrides([*own, *SMALL, *overrides])


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Forgotten]:
    """A folder, a run's folder, and what forgetting the site with the rare class left."""
    folder = tmp_path_factory.mktemp("forgotten")
    first = run(small(folder, 'data.new_sites=["oak"]'))
    return folder, first.folder, forget("fir", str(first.folder), folder)


def digest(folder: Path) -> str:
    return checkpoint.newest(folder)[0].state_digest


def test_the_state_is_that_of_a_run_on_data_without_the_site(forgotten: tuple[Path, Path, Forgotten]) -> None:
    folder, _, done = forgotten
    experiment = Experiment.from_toml(done.certificate.experiment)
    data = experiment.data.model_copy(update={"path": str(npz(folder, "fir")), "without": ()})
    fresh = run(experiment.model_copy(update={"data": data}))
    assert digest(fresh.folder) == done.certificate.state == digest(done.result.folder)
    assert all(torch.equal(value, done.result.meta_state[key]) for key, value in fresh.meta_state.items())
    assert done.certificate.state != done.certificate.run_state


def test_the_certificate_has_who_took_part_by_the_runs_own_record(forgotten: tuple[Path, Path, Forgotten]) -> None:
    _, first, done = forgotten
    found = done.certificate
    state, _ = checkpoint.newest(first)
    assert dict(zip(state.names, state.took_part, strict=True))["fir"] == found.rounds_with_site > 0
    assert sum(state.took_part) == 3 * 3
    assert state.took_part[state.names.index("oak")] == 0
    assert set(found.took_part) == set(NAMES) - {"fir"}
    assert sum(found.took_part.values()) == 3 * 3
    assert (found.kind, found.repeatable, found.rounds) == ("training", True, 3)
    assert found.run_state == state.state_digest
    assert "fir" not in done.result.sites["site"].tolist()


def test_it_verifies_against_the_runs_and_by_training_again(forgotten: tuple[Path, Path, Forgotten]) -> None:
    _, first, done = forgotten
    found = verify(done.path, [first, done.result.folder], retrain=True)
    assert found.signature == signing.UNSIGNED
    assert len(found.checked) == 4
    assert not found.unchecked
    assert len(verify(done.path).unchecked) == 2


def forged(path: Path, out: Path, change: Callable[[dict[str, Any]], Any], *, digest: bool = True) -> Path:
    """Writes a certificate with some entries changed, and with the digest of what it then holds."""
    entries = json.loads(path.read_text())
    change(entries)
    if digest:
        del entries["digest"]
        entries["digest"] = certificate._digest({k: v for k, v in entries.items() if k != signing.TEXT})
    out.write_text(json.dumps(entries))
    return out


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], bool, str]] = {
    "an entry": (lambda entries: entries.update(seed=5), False, "its digest differs"),
    "another state": (lambda entries: entries.update(state="0" * 64), True, "not the one that"),
    "another site": (lambda entries: entries.update(site="ash"), True, 'not without "ash"'),
    "the site in the record": (lambda entries: entries["took_part"].update(fir=1), True, '"fir" took part'),
    "another seed": (lambda entries: entries.update(seed=5), True, "its seed is not"),
    "an entry more": (lambda entries: entries.update(more=1), True, "has other entries"),
    "a text for a number": (lambda entries: entries.update(rounds="3"), True, "rounds is not what"),
    "another format": (lambda entries: entries.update(format="x"), True, "not a certificate"),
}


@pytest.mark.parametrize(("change", "digest", "message"), CHANGES.values(), ids=CHANGES)
def test_a_tampered_certificate_is_refused(
    forgotten: tuple[Path, Path, Forgotten], tmp_path: Path, change: Any, digest: bool, message: str
) -> None:
    _, _, done = forgotten
    path = forged(done.path, tmp_path / FILE, change, digest=digest)
    with pytest.raises(FedmetaError, match=message):
        verify(path, [done.result.folder])


def test_a_signed_certificate_verifies_and_a_tampered_one_does_not(
    forgotten: tuple[Path, Path, Forgotten], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certs(tmp_path / "certs", ["fl.example.org"], ["a"])
    monkeypatch.setenv(signing.VERIFY_KEY, str(tmp_path / "certs" / "sites" / "a" / "public" / "signing.pub"))
    found = forgotten[2].certificate
    with pytest.raises(FedmetaError, match="is not signed"):
        verify(forgotten[2].path)
    monkeypatch.setenv(signing.SIGNING_KEY, str(tmp_path / "certs" / "server" / "signing" / "signing.key"))
    found.write(tmp_path / FILE)
    assert verify(tmp_path / FILE).signature == signing.VERIFIED
    path = forged(tmp_path / FILE, tmp_path / "forged.json", lambda entries: entries.update(made="never"))
    with pytest.raises(FedmetaError, match="of no key"):
        verify(path)


def test_what_cannot_be_forgotten_is_refused(forgotten: tuple[Path, Path, Forgotten], tmp_path: Path) -> None:
    _, first, _ = forgotten
    state, _ = checkpoint.newest(first)
    experiment = Experiment.from_toml(state.experiment)
    with pytest.raises(FedmetaError, match=r'no site "fire".*fir'):
        without_site(experiment, state, "fire")
    with pytest.raises(FedmetaError, match="no site to train on"):
        without_site(experiment, state, *(name for name in NAMES if name != "oak"))
    with pytest.raises(FedmetaError, match="no checkpoint"):
        forget("fir", "nowhere", tmp_path)
    assert without_site(experiment, state, "oak").data.new_sites == ()
    with pytest.raises(FedmetaError, match="names every site"):
        load(experiment.data.model_copy(update={"without": NAMES}))
    notes = load(experiment.data.model_copy(update={"without": ("yew",)})).notes  # type: ignore[attr-defined]
    assert notes == ('data.without: there is no site "yew" to leave out',)


@pytest.mark.parametrize("one_file", [False, True], ids=["a file each", "one file"])
def test_tables_are_read_as_if_the_sites_file_were_gone(tmp_path: Path, one_file: bool) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    lines = {}
    for name in ("a", "b", "c"):
        rows = [f"{RNG.normal():.3f},{'red' if name == 'b' else 'blue'},{number % 2}" for number in range(8)]
        lines[name] = rows if name != "b" else [*rows, "broken,red,1"]
    for name, rows in lines.items():
        (folder / f"{name}.csv").write_text("\n".join(["x,color,label", *rows]) + "\n")
    data = Experiment().data.model_copy(update={"source": "tables", "path": str(folder), "without": ("b",)})
    if one_file:
        text = "\n".join(["x,color,label,place", *(f"{row},{n}" for n in "ac" for row in lines[n]), "1,red,0,b"])
        (tmp_path / "one.csv").write_text(text + "\n")
        data = data.model_copy(update={"path": str(tmp_path / "one.csv"), "site_column": "place"})
    found = load(data)
    (folder / "b.csv").unlink()
    fresh = load(data.model_copy(update={"path": str(folder), "without": (), "site_column": ""}))
    assert (found.names, found.categories) == (("a", "c"), (("color", ("blue",)),))  # type: ignore[attr-defined]
    assert found.digest == fresh.digest


@pytest.mark.slow
def test_values_rank_a_site_with_rows_above_one_with_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    owners = np.repeat(np.arange(4), 60)
    x = rng.normal(size=(240, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    y[owners == 1] = 1 - y[owners == 1]  # every label wrong
    np.savez(tmp_path / "sites.npz", x=x, y=y, site=owners)
    own = ("data.source=npz", f"data.path={tmp_path / 'sites.npz'}", 'data.new_sites=["site-3"]', "learner.name=fedavg")
    settings = ("tracking.uri=none", f"tracking.folder={tmp_path / 'runs'}", "model.name=logistic", "server.rounds=4")
    first = run(Experiment().with_overrides([*own, *settings, "evaluation.every=0", "evaluation.local_baseline=none"]))
    found = site_values(str(first.folder), tmp_path, pairs=2, workers=1)
    assert found.names == ("site-0", "site-1", "site-2")
    assert found.runs <= 2**3
    for group in ("new_sites", "training_sites"):
        assert np.allclose(found.shapley[group].sum(), found.everyone[group] - found.start[group])
        assert found.half_width[group].shape == (3,)
    assert found.shapley["new_sites"].argmin() == 1
    assert found.shapley["new_sites"][1] < 0
    assert first.summary["new_sites"]["personalized"]["mean"] == pytest.approx(found.everyone["new_sites"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heart", "har", "digits"])
def test_real_data_are_forgotten_to_the_bit(tmp_path: Path, shared_data: Path, kind: str) -> None:
    path = _digits(tmp_path) if kind == "digits" else shared_data / kind / f"{kind}.npz"
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    own = ("data.source=npz", f"data.path={path}", "tracking.uri=none", f"tracking.folder={tmp_path / 'runs'}")
    settings = ("server.rounds=5", "server.sites_per_round=0", "model.hidden=16", "evaluation.every=0")
    first = run(Experiment().with_overrides([*own, *settings, "data.new_sites=1", "evaluation.local_baseline=none"]))
    state, _ = checkpoint.newest(first.folder)
    site = next(name for name in state.names if name not in state.new_sites)
    done = forget(site, str(first.folder), tmp_path)
    names = load(Experiment.from_toml(state.experiment).data).names
    ids = np.unique(arrays["site"])
    listed = arrays.get("site_names")
    number = list(names).index(site) if listed is None else [str(name) for name in listed].index(site)
    kept = arrays["site"] != (ids[number] if listed is None else number)
    rows = {name: value[kept] if name in ("x", "y", "site", "time") else value for name, value in arrays.items()}
    np.savez(tmp_path / "without.npz", **rows)
    experiment = Experiment.from_toml(done.certificate.experiment)
    data = experiment.data.model_copy(update={"path": str(tmp_path / "without.npz"), "without": ()})
    fresh = run(experiment.model_copy(update={"data": data}))
    assert digest(fresh.folder) == done.certificate.state
    assert verify(done.path, [first.folder, done.result.folder], retrain=True).unchecked == []


def _digits(folder: Path) -> Path:
    """Writes the digits' sites as a file, so that one of them can be taken out of it."""
    found: Any = load(Experiment().data)
    owners = np.concatenate([np.full(len(found.sites.of(site)), site) for site in range(len(found.names))])
    np.savez(
        folder / "digits.npz",
        x=np.asarray(found.x)[found.sites.rows],
        y=found.y[found.sites.rows],
        site=owners,
        site_names=np.array(found.names),
    )
    return folder / "digits.npz"
