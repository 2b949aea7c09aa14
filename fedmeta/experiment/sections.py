"""The schema: every section and key of an experiment with its type, range, default, unit and a line of help.

A key stands here only if something in the program obeys it. The help of a number ends with its unit in brackets.
"""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from fedmeta.experiment.refusals import refuse, refuse_unknown
from fedmeta.experiment.values import Form, Scalar

SourceName = Literal["npz", "tables", "digits", "omniglot", "shakespeare", "huggingface", "synthetic"]
ModelName = Literal["logistic", "mlp", "cnn", "conv4", "char_lstm"]
LearnerName = Literal[
    "local", "fedavg", "fedavg-ft", "fedprox", "reptile", "fomaml", "maml", "anil", "meta-sgd", "maml++", "per-fedavg",
    "imaml", "pfedme", "ditto", "fedrep", "fedper",
]  # fmt: skip

SOURCES: tuple[str, ...] = get_args(SourceName)
MODELS: tuple[str, ...] = get_args(ModelName)
LEARNERS: tuple[str, ...] = get_args(LearnerName)

UNTRACKED = "none"
"""The `tracking.uri` of a run that MLflow does not hear of."""

MADE_SOURCES = ("digits", "synthetic")
"""Sources that read no file."""

_DOTTED = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"
FunctionPath = Annotated[str, Field(pattern=_DOTTED), Form('"package.module:function"')]
ClassPath = Annotated[str, Field(pattern=_DOTTED), Form('"package.module:Class"')]


def _widths(value: object) -> object:
    """Returns one width or a list of widths as the comma-separated text that it is stored as."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return ",".join(str(width) for width in value)
    return re.sub(r"[\[\]\s]", "", value) if isinstance(value, str) else value


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError("even")
    return number


Widths = Annotated[
    str,
    Field(pattern=r"^[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*$"),
    BeforeValidator(_widths),
    Form('whole numbers of at least 1 with commas between, such as "64,64"'),
]
Odd = Annotated[int, Field(ge=1), AfterValidator(_odd), Form("an odd whole number of at least 1")]
Texts = Annotated[tuple[str, ...], Strict(False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """One section: immutable, no silent conversion between types, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_fit_64_bits(cls, values: object) -> object:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise refuse(key, "must be a number that fits 64 bits")
        return values


class OpenSection(Section):
    """A section that passes further scalar keys on to code named by its import path, and otherwise refuses them."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    name: str = ""

    @property
    def extra(self) -> dict[str, Scalar]:
        """The further keys: arguments for the user's own function or class; empty for built-in names."""
        return dict(self.__pydantic_extra__)

    @model_validator(mode="after")
    def _extra_only_by_import_path(self) -> Self:
        for key in self.__pydantic_extra__:
            if ":" not in self.name or not key.isidentifier():
                raise refuse_unknown(key)
        return self


class Data(Section):
    """Where the sites and their rows come from, and how they are split."""

    source: SourceName = Field(default="digits", description="Kind of data set")
    path: str = Field(default="", description="File or folder of the data; relative to the working directory")
    label: str = Field(default="label", min_length=1, description="Name of the label column, in tables")
    site_key: str = Field(
        default="site", min_length=1, description="Name of the array or column that holds each row's site"
    )
    task: Literal["auto", "classification", "regression"] = Field(
        default="auto",
        description="What the labels are; auto = regression where they are fractions, else classification",
    )
    columns: Texts = Field(
        default=(),
        description="Column names, in order, of tables without a header line; empty = the first line has them",
    )
    missing: Texts = Field(
        default=("", "?", "NA", "NaN", "nan", "null"), description="Texts that mean a missing value, in tables"
    )
    binarise: float | None = Field(
        default=None,
        description="Labels above this become class 1, others class 0; none = leave labels (the label's unit)",
    )
    standardise: Literal["auto", "features", "image", "none"] = Field(
        default="auto",
        description="What gets mean 0 and variance 1: each feature or the whole image; auto = by the data's shape",
    )
    new_sites: Share | Count = Field(
        default=0.2, description="Sites that never take part in training (share of sites, or a count of sites)"
    )
    test: float = Field(
        default=0.5, gt=0, lt=1, description="Part of each site's rows kept for testing (share of rows)"
    )
    split: Literal["random", "blocks"] = Field(
        default="random", description="How test rows are chosen; blocks = a contiguous part in the site's own order"
    )
    support: int = Field(default=20, ge=1, description="What a site adapts on; one with fewer uses what it has (rows)")
    query: int = Field(default=20, ge=1, description="What judges the adapted model in training (rows)")
    min_rows: int = Field(default=0, ge=0, description="Sites with fewer are left out; 0 = none is (rows)")
    sites: int = Field(default=1000, ge=1, description="Size of the synthetic population (sites)")
    rows: int = Field(default=40, ge=1, description="Size of a synthetic site (rows)")
    features: int = Field(default=20, ge=1, description="Width of a synthetic row (features)")
    classes: int = Field(default=5, ge=2, description="Labels in the synthetic population (classes)")
    heterogeneity: float = Field(
        default=1.0,
        ge=0,
        description="How far synthetic sites differ; 0 = all alike (standard deviations of the common weights)",
    )

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if self.source not in MADE_SOURCES and not self.path:
            raise refuse("path", f'must name the data where source = "{self.source}"')
        return self


class Model(OpenSection):
    """The network. With an import path, all further scalar keys become arguments of that function."""

    name: ModelName | FunctionPath = Field(default="mlp", description="Kind of network, or a function that returns one")
    hidden: Widths = Field(
        default="64,64", description="Hidden layers of mlp, LSTM layers of char_lstm (units per layer)"
    )
    activation: Literal["relu", "tanh", "gelu", "elu"] = Field(default="relu", description="Function between layers")
    norm: Literal["auto", "none", "layer", "group"] = Field(
        default="auto", description="Normalisation between layers; auto = group for conv4, none for others"
    )
    channels: Widths = Field(default="32,64", description="Convolutions of cnn (channels per layer)")
    kernel: Odd = Field(default=5, description="Side of cnn's convolution kernels (pixels)")
    dense: int = Field(default=2048, ge=1, description="Width of cnn's dense layer (units)")
    filters: int = Field(default=64, ge=1, description="Width of each convolution of conv4 (channels)")
    embedding: int = Field(default=8, ge=1, description="Width of char_lstm's embedding of a symbol (units)")
    symbols: int = Field(
        default=0, ge=0, description="Alphabet of the rows of char_lstm; 0 = as many as classes (symbols)"
    )
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="Precision of parameters and arithmetic"
    )


class Learner(OpenSection):
    """The mathematics. With an import path, all further scalar keys become arguments of that class."""

    name: LearnerName | ClassPath = Field(default="maml", description="What sites compute and send")
    inner_steps: int = Field(default=5, ge=1, description="Length of the inner loop, at training (steps)")
    inner_lr: float = Field(default=0.1, gt=0, description="Learning rate of the inner loop (per step)")
    global_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the unadapted model's query loss in the meta-objective (share of the loss)",
    )
    head: str = Field(
        default="", description="Layer that adapts (anil) or stays at the site (fedrep, fedper); empty = the last one"
    )
    mu: float = Field(default=0.1, ge=0, description="Pull of local training to theta, of fedprox (weight of mu/2)")
    lam: float = Field(
        default=0.3, gt=0, description="Pull of a site's model to theta, of imaml, pfedme, ditto (weight of lambda/2)"
    )
    cg_steps: int = Field(default=5, ge=1, description="Conjugate-gradient iterations of imaml (iterations)")
    local_steps: int = Field(
        default=5, ge=1, description="Outer steps at a site in each round, of per-fedavg, pfedme (steps)"
    )
    local_lr: float = Field(default=0.3, gt=0, description="Learning rate of the local steps (per step)")
    hessian: Literal["exact", "free", "first-order"] = Field(
        default="exact", description="The second-order term of per-fedavg; free = by finite difference"
    )
    body_steps: int = Field(default=1, ge=0, description="Steps of fedrep's body after those of its head (steps)")
    annealing: float = Field(
        default=0.3, ge=0, le=1, description="When maml++ weighs the last inner step alone (share of the rounds)"
    )


class Server(Section):
    """Who takes part in a round, and how the meta-state steps."""

    rounds: int = Field(default=100, ge=0, description="Length of training; 0 = evaluate only (rounds)")
    sites_per_round: int = Field(
        default=16, ge=0, description="Size of a cohort; 0, or more than there are = all (sites)"
    )
    optimizer: Literal["auto", "sgd", "momentum", "adam", "adamw"] = Field(
        default="auto",
        description="How theta steps; auto = sgd for learners that send displacements, adam for gradients",
    )
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="Learning rate of the optimizer; auto = 1 for displacements, 0.003 for gradients (per round)",
    )
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="Decay of the momentum optimizer's memory (share per round)"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Pull of the parameters towards 0 (per round, times lr)")
    aggregator: Literal["mean"] = Field(default="mean", description="How the sites' replies are combined")
    weighting: Literal["uniform", "examples"] = Field(
        default="uniform", description="What a site's reply weighs in the mean"
    )
    wait_for: Texts | Annotated[int, Field(ge=0)] = Field(
        default=0, description="Who must be present to start: names, or a count; 0 = one node is enough (sites)"
    )
    admit: bool = Field(default=False, description="Whether sites that join after the start are trained on too")
    round_timeout: float = Field(default=600.0, gt=0, description="When missing replies are given up (seconds)")
    min_sites: int = Field(default=1, ge=1, description="Usable replies without which a round is skipped (sites)")


class Evaluation(Section):
    """How sites are judged, before and after adaptation, on their test rows."""

    every: int = Field(default=10, ge=0, description="Interval between evaluations; 0 = only at the end (rounds)")
    steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Length of adaptation at evaluation; none = learner.inner_steps (steps)"
    )
    schedule: Literal["fixed"] = Field(
        default="fixed", description="How far sites adapt; fixed = all take the same steps"
    )
    sites: int = Field(default=0, ge=0, description="Most that one evaluation visits, new sites first; 0 = all (sites)")


class Tracking(Section):
    """Where MLflow and the run's files are."""

    uri: str = Field(
        default="sqlite:///mlflow.db",
        min_length=1,
        description="MLflow store: sqlite:///FILE or http://HOST:PORT; none = do not track",
    )
    experiment: str = Field(default="fedmeta", min_length=1, description="MLflow experiment that the run belongs to")
    name: str = Field(default="", description="Name of the run; empty = made from learner and seed")
    site_curves: int = Field(
        default=50, ge=0, description="How many get curves of their own by round, new first (sites)"
    )
    folder: str = Field(default="fedmeta-runs", min_length=1, description="Folder for checkpoints and results of runs")


class Runtime(Section):
    """The machine: what may change the speed, and the result only by the last bits of a float."""

    seed: int = Field(default=0, ge=0, description="Key of every random draw (no unit)")
    engine: Literal["auto", "loop", "vmap", "span"] = Field(
        default="auto", description="How a cohort's gradients are computed"
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where tensors live")
    threads: int = Field(default=0, ge=0, description="Processor use of torch; 0 = torch's own default (threads)")
    memory: float = Field(default=0.0, ge=0, description="Budget for one cohort; 0 = a share of what is free (GiB)")
    checkpoint_every: int = Field(
        default=0, ge=0, description="Interval between checkpoints; 0 = only at the end (rounds)"
    )
    nodes: int = Field(
        default=3, ge=1, description="Simulated Flower nodes that share the sites, with --runtime ray (nodes)"
    )


class Privacy(Section):
    """Differential privacy. The section may be present; it has no keys yet."""
