"""Personal parameters on the site's own disk: they survive rounds, restarts and resumes, and never travel.

One file per site and round, `FOLDER/RUN/SITE/round-NNNNNN.safetensors`, written atomically. A round reads the newest
file of an earlier round, so that a run that resumes from a checkpoint finds what its sites had kept by then: the two
newest files stay, and the newest one that each of the run's checkpoints covers. Files of later rounds are of a course
that the run took before it went back to a checkpoint, and go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from flwr.app import Context
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import remove_parts, write_atomic
from fedmeta.messages import RoundRequest

KEPT = 2


class StorageError(FedmetaError):
    """A site's disk does not take what stays with the site."""


@dataclass(frozen=True)
class LocalStateStore:
    """Where a node keeps the personal parts of the sites that it was asked to work on.

    Attributes:
        folder: `state` in the node's config, or the run's folder in simulation; then the run's name.
        names: The sites.
        round_number: The round.
        saved_rounds: The rounds of the run's checkpoints.
    """

    folder: Path
    names: tuple[str, ...]
    round_number: int
    saved_rounds: tuple[int, ...]

    @classmethod
    def of(cls, context: Context, experiment: Experiment, request: RoundRequest) -> LocalStateStore:
        """Returns the store that a request is about.

        Raises:
            StorageError: A deployed node names no folder: an experiment's paths are not for a site's disk.
        """
        state = context.node_config.get("state")
        if not state and "partition-id" not in context.node_config:
            raise StorageError("node config: state is missing: this run keeps something at the site")
        if state:
            folder = Path(str(state)) / request.run
        else:
            folder = Path(str(context.run_config.get("folder", experiment.tracking.folder))) / request.run / "personal"
        return cls(folder, request.names, request.round_number, request.saved_rounds)

    def read(self, after_round: bool = False) -> list[dict[str, Tensor] | None]:
        """Returns what each site kept before the round, or with `after_round` in it too; None where nothing."""
        return [read(self.folder, name, self.round_number + after_round) for name in self.names]

    def write(self, personal: Mapping[str, Tensor]) -> None:
        """Keeps the sites' personal parts of the round, stacked [sites, ...]."""
        for place, name in enumerate(self.names):
            own = {key: value[place] for key, value in personal.items()}
            write(self.folder, name, self.round_number, own, self.saved_rounds)


def read(folder: Path, site: str, before: int) -> dict[str, Tensor] | None:
    """Returns what a site kept in its last round before round `before`; None where it has kept nothing.

    A file that cannot be read counts as none: the site then begins again, as a site that lost its disk would.
    """
    rounds = [number for number in _rounds(folder / _slug(site)) if number < before]
    if not rounds:
        return None
    try:
        return load(_file(folder, site, max(rounds)).read_bytes())
    except (OSError, SafetensorError):
        return None


def write(
    folder: Path, site: str, round_number: int, personal: dict[str, Tensor], saved_rounds: tuple[int, ...] = ()
) -> None:
    """Keeps a site's personal part of a round, and removes what no resume can ask for any more.

    Args:
        folder: The store's folder.
        site: The site's name.
        round_number: The round in which it was trained.
        personal: The personal part.
        saved_rounds: The rounds of the run's checkpoints, from each of which it may continue.

    Raises:
        StorageError: The folder or the disk does not take it.
    """
    path = _file(folder, site, round_number)
    try:
        write_atomic(path, save({name: value.detach().cpu().contiguous().clone() for name, value in personal.items()}))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    remove_parts(path.parent)
    rounds = _rounds(path.parent)
    past = [number for number in rounds if number <= round_number]
    covered = (max((number for number in past if number <= saved), default=0) for saved in saved_rounds)
    keep = {*past[-KEPT:], *covered}
    for number in rounds:
        if number not in keep:
            _file(folder, site, number).unlink(missing_ok=True)


def _rounds(folder: Path) -> list[int]:
    numbers = [path.stem.removeprefix("round-") for path in folder.glob("round-*.safetensors")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _file(folder: Path, site: str, round_number: int) -> Path:
    return folder / _slug(site) / f"round-{round_number:06d}.safetensors"


def _slug(site: str) -> str:
    """Returns a folder's name for a site's: readable, and different for different sites."""
    plain = re.sub(r"[^\w.-]", "_", site).strip(".")[:80]
    return f"{plain}-{blake2b(site.encode(), digest_size=4).hexdigest()}"
