"""The experiment as a value, and its three views: TOML text, `--set` overrides and MLflow's flat params."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import tomli_w
from pydantic import ValidationError

from fedmeta.errors import FedmetaError, meant, nearest
from fedmeta.experiment.data import MADE_SOURCES, Data
from fedmeta.experiment.sections import (
    UNTRACKED,
    WEIGHED_BY_ROWS,
    Evaluation,
    Learner,
    Model,
    Privacy,
    Problem,
    Runtime,
    Server,
    Stream,
    Tracking,
)
from fedmeta.experiment.tracking_uri import default_uri, keep_user_info, without_user_info
from fedmeta.experiment.validation import Scalar, Section, describe_type, from_text, on_one_line, report, to_param

if TYPE_CHECKING:
    from fedmeta.targets import TargetKind  # torch takes seconds to import

Table = dict[str, Any]

LARGEST = 1 << 20
"""The longest text that is read as an experiment (characters)."""

_DEEP = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){200}""")
"""A key of so many parts that the standard library, which keeps each part's path, would fill the memory."""


class Experiment(Section):
    """One run, described completely: the same experiment and data give the same result."""

    problem: Problem = Problem()
    data: Data = Data()
    model: Model = Model()
    learner: Learner = Learner()
    server: Server = Server()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    runtime: Runtime = Runtime()
    stream: Stream = Stream()
    privacy: Privacy = Privacy()

    @classmethod
    def from_toml(cls, text: str, origin: str = "experiment", overrides: Sequence[str] = ()) -> Self:
        """Returns the experiment that a TOML text describes; keys that it leaves out take their defaults.

        Args:
            text: TOML with the sections of this class.
            origin: what to call the text in messages, such as its file name.
            overrides: `section.key=value` texts that win over `text`, the last one over all.

        Raises:
            FedmetaError: not TOML, or a key or value that does not exist; names it and the nearest valid one.
        """
        return cls._checked(_parsed(text, origin), origin, overrides)

    @classmethod
    def from_params(cls, params: Mapping[str, object]) -> Self:
        """Returns the experiment whose `params()` these are, as scalars or as the strings that MLflow makes of them."""
        return cls._checked({}, "params", [f"{key}={value}" for key, value in params.items()])

    @classmethod
    def _checked(cls, table: Table, origin: str, overrides: Sequence[str]) -> Self:
        origins: dict[tuple[str, str], str] = {}
        if isinstance(table.setdefault("tracking", {}), dict):
            table["tracking"].setdefault("uri", default_uri())
        for override in overrides:
            section, key, value = _override(override)
            table.setdefault(section, {})
            if isinstance(table[section], dict):
                table[section][key] = value
                origins[section, key] = f"--set {on_one_line(override)}"
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise report(error, table, SECTIONS, origin, origins) from None

    def with_overrides(self, overrides: Sequence[str]) -> Self:
        """Returns this experiment with `section.key=value` texts applied, as `--set` would.

        Raises:
            FedmetaError: an override that names no key or an impossible value.
        """
        return self._checked(self.model_dump(exclude_unset=True), "experiment", overrides)

    def to_toml(self) -> str:
        """Returns the whole experiment, defaults included, as TOML from which `from_toml` makes an equal one.

        User and password of an MLflow store are left out here and in `params`: they come from the environment.
        """
        return tomli_w.dumps(self._table())

    def for_sites(self) -> str:
        """Returns what a site needs to know, as TOML: everything but [tracking] and the file of first weights.

        What that file holds comes with the meta-state.
        """
        table = self.without_weights()._table()
        return tomli_w.dumps({name: keys for name, keys in table.items() if name != "tracking"})

    def without_weights(self) -> Self:
        """Returns this experiment where a meta-state is at hand: without what its first one came from."""
        return self.model_copy(update={"model": self.model.model_copy(update={"weights": "", "start": ""})})

    def without_problem_path(self) -> Self:
        """Returns this experiment without the path of a problem's tables: a site that joins names its own file."""
        if not self.problem.extra.get("path"):
            return self
        return self.model_copy(update={"problem": self.problem.model_copy(update={"path": "", "site": ""})})

    def params(self) -> dict[str, Scalar]:
        """Returns the experiment flat, `section.key` to a scalar; lists as TOML text and None as "none"."""
        return {
            f"{section}.{key}": to_param(value, _annotation(section, key))
            for section, values in self._values().items()
            for key, value in values.items()
        }

    def _values(self) -> dict[str, Table]:
        values = self.model_dump()
        values["tracking"]["uri"] = without_user_info(self.tracking.uri)
        return values

    def _table(self) -> dict[str, Table]:
        """Returns what TOML can hold: no key that has no value."""
        return {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in self._values().items()
        }

    def identity(self, size: int = 8) -> str:
        """Returns a name of 2 * `size` characters for what differs from the defaults, whatever keys are added later."""
        usual = type(self)().params()
        own = {key: value for key, value in self.params().items() if key not in usual or value != usual[key]}
        return blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=size).hexdigest()

    def absolute(self) -> Self:
        """Returns this experiment with every path made absolute against the working directory, to be run elsewhere."""
        data, tracking = self.data, self.tracking
        named = data.source in MADE_SOURCES or (
            data.source == "huggingface" and not Path(data.path).expanduser().exists()
        )
        if data.path and not named:
            data = data.model_copy(update={"path": _absolute(data.path)})
        moved = {"folder": _absolute(tracking.folder), "uri": _absolute_uri(tracking.uri)}
        model = self.model
        if model.weights:
            model = model.model_copy(update={"weights": _absolute(model.weights)})
        if model.start and Path(model.start).is_dir():
            model = model.model_copy(update={"start": _absolute(model.start)})
        return self.model_copy(update={"data": data, "model": model, "tracking": tracking.model_copy(update=moved)})

    def with_user_info_kept(self) -> Self:
        """Returns this experiment without the user and password of its store, which move into the environment."""
        uri = keep_user_info(self.tracking.uri)
        if uri == self.tracking.uri:
            return self
        return self.model_copy(update={"tracking": self.tracking.model_copy(update={"uri": uri})})

    def for_source(self) -> Self:
        """Returns what decides which sites there are and what they hold: the rest is as it is by default."""
        own = ":" in self.problem.name or ":" in self.data.source
        return type(self)(data=self.data, problem=self.problem if own else Problem())

    @property
    def target_kind(self) -> "TargetKind":
        """What targets of a regression are standardized by: an own loss may need them as they are."""
        if self.data.target != "auto":
            return self.data.target
        return "none" if ":" in self.problem.name else "standardise"

    @property
    def on_rows(self) -> bool:
        """Whether the experiment's data are rows of a built-in source."""
        return ":" not in self.data.source and ":" not in self.problem.name

    @property
    def weighs_rows(self) -> bool:
        """Whether a site weighs its train rows in the mean: as set, or where that is left open as in FedAvg's paper.

        Left open, every site weighs 1 where one that is false could name its own weight (an aggregator other than the
        mean) and under privacy, where what one site adds is bounded.
        """
        server = self.server
        if server.weighting != "auto":
            return server.weighting == "examples"
        return self.learner.name in WEIGHED_BY_ROWS and server.aggregator == "mean" and not self.privacy.clip_norm

    @property
    def plain_cohorts(self) -> bool:
        """Whether a round is the mean over a cohort in which all sites count alike, as it is by default."""
        server = self.server
        weighed = server.variance_reduction != "none" or server.objective != "mean"
        return server.sampling not in ("optimal", "clustered") and not weighed

    @property
    def target(self) -> float | None:
        """The score at which the run ends (`server.until`); None where it has no target."""
        return float(self.server.until.removeprefix("score = ")) if self.server.until else None

    @property
    def steered(self) -> bool:
        """Whether sites are scored while the run trains, because something is decided by their scores."""
        return bool(self.evaluation.patience or self.server.until or self.learner.order == "auto")

    @property
    def splits_off(self) -> bool:
        """Whether training sites are split off as validation sites, to choose a meta-state or how far to adapt."""
        return bool(self.evaluation.patience or self.server.until or self.evaluation.schedule == "auto")

    @property
    def evaluation_steps(self) -> int:
        """Inner steps at evaluation: `evaluation.steps`, or `learner.inner_steps` where that is left out."""
        return self.learner.inner_steps if self.evaluation.steps is None else self.evaluation.steps


SECTIONS: Mapping[str, type[Section]] = {name: type(field.default) for name, field in Experiment.model_fields.items()}


class Key(NamedTuple):
    """One key of an experiment, for help and documentation."""

    section: str
    key: str
    type: str
    """What a value must be, for people: type, range, choices."""
    default: object
    help: str
    """One line: the meaning and, for numbers, the unit in brackets."""


def describe() -> list[Key]:
    """Returns every key that an experiment may set, in the order of the schema."""
    return [
        Key(section, key, describe_type(field.annotation, field.metadata), field.default, field.description or "")
        for section, schema in SECTIONS.items()
        for key, field in schema.model_fields.items()
    ]


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Returns the experiment in a TOML file.

    Args:
        path: the file, UTF-8.
        overrides: `section.key=value` texts that win over the file, the last one over all.

    Raises:
        FedmetaError: no such file, not readable, not TOML, or a key or value that does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FedmetaError(f"{path}: no such file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise FedmetaError(f"{path}: is a folder; name a TOML file in it{_nearest_file(path / 'experiment')}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FedmetaError(f"{path}: not UTF-8 (line {line}); save it as UTF-8 text") from None
    except OSError as error:
        raise FedmetaError(f"{path}: cannot be read: {error.strerror}") from None
    return Experiment.from_toml(text, str(path), overrides).with_user_info_kept()


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    return nearest(path.name, sorted(each.name for each in path.parent.glob("*.toml")))


def _parsed(text: str, origin: str) -> Table:
    if len(text) > LARGEST:
        raise FedmetaError(f"{origin}: larger than {LARGEST >> 20} MiB, which no experiment is")
    if _DEEP.search(text):
        raise FedmetaError(f"{origin}: not valid TOML: nested too deep")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise FedmetaError(f"{origin}: not valid TOML: nested too deep") from None
    except ValueError as error:
        position = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        shown = f": {on_one_line(text.split(chr(10))[int(position[1]) - 1].strip()[:80])}" if position else ""
        hint = "; texts stand in quotes, booleans are true and false" if "Invalid value" in str(error) else ""
        raise FedmetaError(f"{origin}: not valid TOML: {error}{shown}{hint}") from None


def _override(text: str) -> tuple[str, str, object]:
    """Returns section, key and value of one `section.key=value`."""
    name, equals, value = text.partition("=")
    section, dot, key = (part.strip() for part in name.partition("."))
    origin = f"--set {on_one_line(text)}"
    if not (equals and dot and key):
        homes = [f"{home}.{name}" for home, schema in SECTIONS.items() if name.strip() in schema.model_fields]
        hint = meant(f"{homes[0]}={value}") if homes else ", such as server.rounds=50"
        raise FedmetaError(f"{origin}: must be written section.key=value{hint}")
    if section not in SECTIONS:
        hint = nearest(section, SECTIONS) or f"; the sections are {', '.join(SECTIONS)}"
        raise FedmetaError(f"{origin}: unknown section {section}{hint}")
    return section, key, from_text(value, _annotation(section, key))


def _annotation(section: str, key: str) -> Any:
    field = SECTIONS[section].model_fields.get(key)
    return field.annotation if field else Scalar


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise FedmetaError(f"{path}: there is no home folder of that name") from None


def _absolute_uri(uri: str) -> str:
    scheme, colon, rest = uri.partition(":///")
    if scheme == "sqlite" and colon and rest != ":memory:":
        return f"sqlite:///{_absolute(rest)}"
    return uri if ":" in uri or uri == UNTRACKED else _absolute(uri)
