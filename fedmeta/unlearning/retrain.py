"""Forgetting by training again: a run repeated without a site is what no trace of the site can be in.

Every draw of a run depends on its seed, its rounds and the names of its sites, so that a run can be repeated to the
bit. What may change last bits, the engine and the memory that one cohort takes, is fixed to what the run chose.
Who is new, trains or only validates stays as it was: with fewer names a draw would come out another way, and sites
would change sides.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from fedmeta import checkpoint
from fedmeta.checkpoint import Checkpoint
from fedmeta.errors import FedmetaError, nearest
from fedmeta.evaluation import NEW, TRAINING, VALIDATION
from fedmeta.experiment import Experiment
from fedmeta.progress import ProgressCallback, ignore_progress
from fedmeta.runtime import Result, run
from fedmeta.trust import refuse_foreign_code
from fedmeta.unlearning.certificate import Certificate, read
from fedmeta.versions import versions

FILE = "forgotten.json"
"""The certificate in the folder of the run without the site."""


class Forgotten(NamedTuple):
    """What forgetting left.

    Attributes:
        result: The run without the site.
        certificate: The certificate.
        path: Its file.
    """

    result: Result
    certificate: Certificate
    path: Path


class Verified(NamedTuple):
    """What was verified of a certificate.

    Attributes:
        certificate: The certificate.
        signature: What is known of its signature.
        checked: What holds, a sentence each.
        unchecked: What was not looked at, a sentence each.
    """

    certificate: Certificate
    signature: str
    checked: list[str]
    unchecked: list[str]


def finished_run(name: str, root: Path, code: Collection[str] = ()) -> tuple[Experiment, Checkpoint, Path]:
    """Returns a finished run's experiment, last checkpoint and folder.

    Args:
        name: The run's folder, that folder's name, or its MLflow id.
        root: The folder of all runs.
        code: What the run may name of code that is not part of fedmeta.

    Raises:
        FedmetaError: There is no such run, it has not ended, or it asks for other code.
    """
    folder = Path(name) if Path(name).is_dir() else checkpoint.find(root, name, "")
    state, _ = checkpoint.newest(folder)
    if not state.finished:
        raise FedmetaError(
            f"{folder}: the run has not ended: end it first, fedmeta run FILE --resume {shlex.quote(folder.name)}"
        )
    experiment = Experiment.from_toml(state.experiment, str(folder))
    refuse_foreign_code(experiment, str(folder), code)
    return experiment, state, folder


def kind_of(state: Checkpoint, site: str) -> str:
    """Returns what a site was in a run: "new", "validation" or "training".

    Raises:
        FedmetaError: The run had no such site.
    """
    if site not in state.names:
        raise FedmetaError(f'the run had no site "{site}"{nearest(site, state.names)}')
    return NEW if site in state.new_sites else VALIDATION if site in state.validation_sites else TRAINING


def repeated(experiment: Experiment, state: Checkpoint) -> Experiment:
    """Returns a run's experiment with all that it chose by measurement fixed, so that it repeats to the bit."""
    runtime = experiment.runtime.model_copy(update={"engine": state.engine, "memory": state.budget / (1 << 30)})
    return experiment.model_copy(update={"runtime": runtime})


def without_site(experiment: Experiment, state: Checkpoint, *sites: str) -> Experiment:
    """Returns the experiment of a run without some of its sites; who is new stays as it was.

    Raises:
        FedmetaError: The run had no such site, no training site would be left, or its sites cannot be named.
    """
    training = set(state.names) - set(state.new_sites) - set(state.validation_sites)
    for site in sites:
        kind_of(state, site)
    if not training - set(sites):
        raise FedmetaError(f'without "{sites[-1]}" there is no site to train on: the run has nothing to repeat')
    left = {name for name in state.names if name not in sites}
    data, server = experiment.data, experiment.server
    update = {"without": tuple(sorted({*data.without, *sites}))}
    if experiment.evaluation.judge == "new_sites" and state.new_sites:
        update["new_sites"] = tuple(name for name in state.new_sites if name in left)
    if isinstance(server.wait_for, tuple):
        server = server.model_copy(update={"wait_for": tuple(name for name in server.wait_for if name in left)})
    elif server.wait_for > len(left):
        server = server.model_copy(update={"wait_for": len(left)})
    found = repeated(experiment, state)
    return found.model_copy(update={"data": data.model_copy(update=update), "server": server})


def forget(
    site: str,
    name: str,
    root: Path,
    *,
    code: Collection[str] = (),
    runtime: str = "local",
    out: Path | None = None,
    report: ProgressCallback = ignore_progress,
    before: Callable[[Experiment], None] | None = None,
) -> Forgotten:
    """Trains a run again without a site, and certifies it.

    Args:
        site: The site's name.
        name: The run's folder, that folder's name, or its MLflow id.
        root: The folder of all runs.
        code: What the run may name of code that is not part of fedmeta.
        runtime: "local" or "ray".
        out: Where to write the certificate; None for the folder of the run without the site.
        report: Takes progress.
        before: Called with the experiment that is about to be run.

    Raises:
        FedmetaError: There is no such run or site, or the run without it fails.
    """
    experiment, state, _ = finished_run(name, root, code)
    kind = kind_of(state, site)
    changed = without_site(experiment, state, site)
    if before:
        before(changed)
    result = run(changed, runtime=runtime, report=report)
    found, _ = checkpoint.newest(result.folder)
    if site in found.names:
        raise FedmetaError(f'{result.folder}: the run without "{site}" names it: nothing is certified')
    counted = dict(zip(state.names, state.took_part, strict=False))
    certificate = Certificate(
        site=site,
        kind=kind,
        rounds_with_site=counted.get(site, -1),
        run=state.run_id,
        run_state=state.state_digest,
        experiment=changed.to_toml(),
        seed=changed.runtime.seed,
        rounds=found.round_number,
        retrained=found.run_id,
        state=found.state_digest,
        took_part=dict(zip(found.names, found.took_part, strict=True)),
        threads=torch.get_num_threads(),
        repeatable=not changed.privacy.noise_multiplier,
        versions=versions(),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = out or result.folder / FILE
    certificate.write(path)
    return Forgotten(result, certificate, path)


def verify(
    path: Path,
    runs: Sequence[Path] = (),
    *,
    retrain: bool = False,
    code: Collection[str] = (),
    report: ProgressCallback = ignore_progress,
) -> Verified:
    """Verifies a certificate: its signature, that its entries agree, the runs that are at hand, and by training again.

    Args:
        path: The certificate.
        runs: Folders of runs: each must be the run, or the one without the site, with the state that is certified.
        retrain: Whether the run without the site is trained once more, which needs the data of the sites left.
        code: What the experiment may name of code that is not part of fedmeta.
        report: Takes progress.

    Raises:
        FedmetaError: Something does not hold; the message names it.
    """
    found, signature = read(path)
    experiment = Experiment.from_toml(found.experiment, str(path))
    checked, unchecked = [], []
    if found.site not in experiment.data.without:
        raise FedmetaError(f'{path}: its experiment is not without "{found.site}"')
    if found.site in found.took_part:
        raise FedmetaError(f'{path}: "{found.site}" took part in the run without it')
    if experiment.runtime.seed != found.seed:
        raise FedmetaError(f"{path}: its seed is not that of its experiment")
    checked.append(f'"{found.site}" is not among the {len(found.took_part)} sites of the run without it')
    for folder in runs:
        state, _ = checkpoint.newest(folder)
        known = {found.run: found.run_state, found.retrained: found.state}
        if state.run_id not in known:
            raise FedmetaError(f"{folder}: neither the run of {path} nor the one without the site")
        if state.state_digest != known[state.run_id]:
            raise FedmetaError(f"{folder}: its meta-state is not the one that {path} certifies")
        if state.run_id == found.retrained and (state.experiment != found.experiment or found.site in state.names):
            raise FedmetaError(f"{folder}: its experiment or its sites are not those that {path} certifies")
        checked.append(f"{folder}: its meta-state is the certified one")
    if not runs:
        unchecked.append("no run was given: that the states are those of runs was not looked at")
    if not retrain:
        unchecked.append("the run without the site was not trained again (--retrain)")
        return Verified(found, signature, checked, unchecked)
    if not found.repeatable:
        raise FedmetaError(f"{path}: noise for privacy makes every run another one: training again cannot show it")
    refuse_foreign_code(experiment, str(path), code)
    again = run(experiment, report=report)
    if (digest := checkpoint.newest(again.folder)[0].state_digest) != found.state:
        threads = torch.get_num_threads()
        raise FedmetaError(
            f"{path}: training again ended in another meta-state ({digest[:12]}, certified {found.state[:12]}): the "
            f"data changed, the certificate is false, or last bits differ (certified with {found.threads} threads and "
            f"{', '.join(f'{name} {number}' for name, number in found.versions.items())}; here {threads} threads)"
        )
    checked.append(f"training again ended in the certified meta-state, bit for bit ({again.folder})")
    return Verified(found, signature, checked, unchecked)
