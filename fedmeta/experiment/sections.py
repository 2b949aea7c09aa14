"""The schema: every section and key of an experiment with its type, range, default, unit and a line of help.

A key stands here only if something in the program obeys it. The help of a number ends with its unit in brackets.

Learners and models take the defaults of their keys from here. The other way round, with sections made of their classes,
whatever reads an experiment would import torch: 2.3 s of processor time, where `fedmeta --help` takes 0.7 s in all.
"""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from fedmeta.experiment.validation import (
    ClassPath,
    Code,
    Conflicts,
    Count,
    FunctionPath,
    Odd,
    OpenSection,
    Section,
    Share,
    Target,
    Texts,
    Widths,
)

ModelName = Literal["logistic", "mlp", "cnn", "conv4", "char_lstm"]
LearnerName = Literal[
    "local", "fedavg", "fedavg-ft", "fedprox", "reptile", "fomaml", "maml", "anil", "meta-sgd", "maml++", "per-fedavg",
    "imaml", "pfedme", "ditto", "fedrep", "fedper", "fedbabu", "scaffold", "protonet", "fedmeta-per", "apfl", "average",
]  # fmt: skip

Hessian = Literal["exact", "free", "first-order"]
Activation = Literal["relu", "tanh", "gelu", "elu"]
Norm = Literal["auto", "none", "layer", "group"]

MODELS: tuple[str, ...] = get_args(ModelName)
LEARNERS: tuple[str, ...] = get_args(LearnerName)

WEIGHED_BY_ROWS: frozenset[str] = frozenset({"fedavg", "fedavg-ft", "fedprox", "ditto", "fedrep", "fedper", "fedbabu"})
"""Learners whose papers weigh a site by its rows."""

UNTRACKED = "none"
"""The `tracking.uri` of a run that MLflow does not hear of."""


class Model(OpenSection):
    """The network. With an import path, all further scalar keys become arguments of that function."""

    name: ModelName | FunctionPath = Field(default="mlp", description="Kind of network, or a function that returns one")
    hidden: Widths = Field(
        default="64,64", description="Hidden layers of mlp, LSTM layers of char_lstm (units per layer)"
    )
    activation: Activation = Field(default="relu", description="Function between layers")
    norm: Norm = Field(
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
    freeze: Texts = Field(
        default=(),
        description='Names, or patterns such as "body.*", of parameters that travel and are never trained',
    )
    weights: str = Field(
        default="",
        description="Parameters to start from, a safetensors file at the run's start; empty = drawn by the seed",
    )
    start: str = Field(
        default="",
        description="Earlier run whose meta-state is taken as far as it fits: its folder, or its MLflow id",
    )
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="Precision of parameters and arithmetic"
    )


class Problem(OpenSection):
    """What sites solve. With an import path, all further keys, lists too, become arguments of that class."""

    takes_lists: ClassVar[bool] = True

    name: Literal["supervised"] | ClassPath = Field(
        default="supervised",
        description="Model on rows with labels (supervised), or a fedmeta.Problem, which may also be the source",
    )


class Learner(OpenSection):
    """The mathematics. With an import path, all further scalar keys become arguments of that class."""

    name: LearnerName | ClassPath = Field(default="maml", description="What sites compute and send")
    inner_steps: int = Field(
        default=5, ge=1, description="Length of adaptation: in training of what adapts, and at evaluation (steps)"
    )
    inner_lr: float = Field(default=0.1, gt=0, description="Learning rate of adaptation and of local epochs (per step)")
    order: Literal["exact", "first", "auto"] = Field(
        default="exact",
        description="Gradient of maml and anil: exact, its first-order approximation, or one by measurement",
    )
    first_order_rounds: int = Field(
        default=0, ge=0, description='Rounds in first order before the exact ones, with order = "exact" (rounds)'
    )
    local_epochs: int = Field(
        default=5,
        ge=1,
        description="Passes over a site's train rows in a round, of learners that send displacements (epochs)",
    )
    batch_size: int = Field(
        default=20,
        ge=0,
        description="Size of a local step, of these, pfedme and per-fedavg; 0 = a site's all (rows)",
    )
    global_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the unadapted model's query loss in the meta-objective (share of the loss)",
    )
    head: str = Field(
        default="",
        description="Layer that adapts (anil, fedbabu, protonet) or stays (fedrep, fedper, fedmeta-per); empty = last",
    )
    mu: float = Field(default=0.1, ge=0, description="Pull of local training to theta, of fedprox (weight of mu/2)")
    lam: float = Field(
        default=0.3, gt=0, description="Pull of a site's model to theta, of imaml, pfedme, ditto (weight of lambda/2)"
    )
    cg_steps: int = Field(default=5, ge=1, description="Conjugate-gradient iterations of imaml (iterations)")
    local_steps: int = Field(
        default=5, ge=1, description="Outer steps at a site in each round, of per-fedavg, pfedme (steps)"
    )
    local_lr: float = Field(
        default=0.3, gt=0, description="Learning rate of the local steps, and of fedmeta-per's head (per step)"
    )
    hessian: Hessian = Field(
        default="exact", description="The second-order term of per-fedavg; free = by finite difference"
    )
    mixture: float = Field(
        default=0.5, gt=0, le=1, description="What a site's own model counts at first, of apfl (share of the mixture)"
    )
    solve_steps: int = Field(
        default=200, ge=1, description="Length of a site's way to its own solution, of average (steps)"
    )
    body_steps: int = Field(default=1, ge=0, description="Passes of fedrep's body after those of its head (epochs)")
    annealing: float = Field(
        default=0.3, ge=0, le=1, description="When maml++ weighs the last inner step alone (share of the rounds)"
    )

    def conflicts(self) -> Conflicts:
        """Yields what `OpenSection` does, and rounds in first order where the order is another one than exact."""
        yield from super().conflicts()
        if self.first_order_rounds and self.order != "exact":
            yield "first_order_rounds", f'needs order = "exact" for the rounds after them, and not "{self.order}"'


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
    eps: float = Field(
        default=1e-4,
        gt=0,
        description="Adam's and adamw's floor of a gradient's size; less turns rounding into steps (its unit)",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Pull of the parameters towards 0 (per round, times lr)")
    aggregator: (
        Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "norm-bound"] | FunctionPath
    ) = Field(
        default="mean",
        description="How the sites' replies are combined; all built-in ones but mean bound what a few false ones do",
    )
    sampling: Literal["uniform", "optimal", "clustered"] | FunctionPath = Field(
        default="uniform",
        description="Who takes part: drawn alike, by norms, from groups that send alike, or by a function",
    )
    variance_reduction: Literal["none", "fedvarp"] = Field(
        default="none", description="What the server remembers: nothing, or the last update of each site (fedvarp)"
    )
    objective: Literal["mean", "worst", "cvar", "q"] = Field(
        default="mean",
        description="For whom theta steps: all sites alike, the worst one, the worst share, or leaning so",
    )
    worst_lr: float = Field(
        default=0.1, gt=0, description='How fast objective = "worst" moves to sites with a high loss (per unit of loss)'
    )
    cvar_share: float = Field(
        default=0.3, gt=0, le=1, description='The worst sites of a round that objective = "cvar" sees (share of them)'
    )
    q: float = Field(
        default=1.0, ge=0, description='How far objective = "q" leans to sites with a high loss (power of the loss)'
    )
    probe_every: int = Field(
        default=10, ge=1, description='Interval between probes of both gradients, with learner.order = "auto" (rounds)'
    )
    climb_below: float = Field(
        default=-1.0,
        ge=-1,
        le=1,
        description="Cosine of both gradients below which a run climbs to the exact; -1 = never by it (cosine)",
    )
    descend_above: float = Field(
        default=0.98, ge=-1, le=1, description="Cosine above which it comes down again; above climb_below (cosine)"
    )
    climb_patience: int = Field(
        default=2, ge=1, description="Scores without a better one after which it climbs to the exact gradient (scores)"
    )
    descend_probes: int = Field(
        default=3, ge=1, description="Probes in a row above descend_above after which it comes down (probes)"
    )
    byzantine: Annotated[float, Field(ge=0, lt=0.5)] | Annotated[int, Field(ge=1)] = Field(
        default=0.2,
        description="False replies in a round that the aggregator is to withstand (share of its sites, or a count)",
    )
    mixing: bool = Field(
        default=False,
        description="Whether each reply is first averaged with its nearest ones, for sites that differ; not with mean",
    )
    norm_bound: float = Field(
        default=1.0, gt=0, description="Longest reply that norm-bound leaves as it is (multiples of the median norm)"
    )
    norm_cap: float = Field(
        default=30.0,
        ge=0,
        description="Longest reply that the mean leaves as it is; 0 = any (multiples of the median norm so far)",
    )
    weighting: Literal["auto", "uniform", "examples"] = Field(
        default="auto",
        description="What a site weighs in the mean; auto = its train rows as in FedAvg's paper and its kin, else 1",
    )
    max_weight: float = Field(
        default=0.0, ge=0, description='Most that a site weighs with weighting = "examples"; 0 = any (its weight)'
    )
    wait_for: Texts | Annotated[int, Field(ge=0)] = Field(
        default=0, description="Who must be present to start: names, or a count; 0 = one node is enough (sites)"
    )
    admit: bool = Field(default=False, description="Whether sites that join after the start are trained on too")
    until: Target = Field(
        default="",
        description="Score of validation sites at which the run ends, such as {score = 0.9}; empty = after all rounds",
    )
    round_timeout: float = Field(default=600.0, gt=0, description="When missing replies are given up (seconds)")
    quorum: Annotated[float, Field(gt=0, le=1)] | Count = Field(
        default=1.0, description="Replies that close a round; 1.0 = all (share of the sites asked, or a count of sites)"
    )
    late: Literal["drop", "buffer"] = Field(
        default="drop", description="What becomes of replies after their round closed; buffer = in the next step"
    )
    staleness: int = Field(default=5, ge=1, description="Oldest late reply that is used, with late = buffer (steps)")
    deadline: float = Field(
        default=0.0,
        ge=0,
        description="How long a site is waited for; 0 = until round_timeout (multiples of its usual time)",
    )
    compression: Literal["none", "float16", "bfloat16", "int8", "int4", "top-k"] = Field(
        default="none", description="How sites' replies get smaller; top-k keeps what was not sent for the next one"
    )
    compression_keep: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="Entries of a reply, or of a change, that top-k sends, 8 bytes each (share of them)"
    )
    compression_down: Literal["none", "float16", "bfloat16", "int8", "int4", "top-k"] = Field(
        default="none",
        description="How what changed in the meta-state since a node's last round gets smaller on its way to sites",
    )
    min_sites: int = Field(default=1, ge=1, description="Usable replies without which a round is skipped (sites)")

    def conflicts(self) -> Conflicts:
        """Yields weights that an aggregator cannot trust, and mixing where no reply is seen alone."""
        if self.weighting == "examples" and self.aggregator != "mean":
            hint = f'must be "uniform" with aggregator = "{self.aggregator}": a false site would name its own weight'
            yield "weighting", hint
        if self.max_weight and self.weighting == "uniform":
            yield "max_weight", 'needs weighting = "examples": else each site weighs 1'
        if self.descend_above <= self.climb_below:
            yield "descend_above", f"must be above climb_below = {self.climb_below:g}: else a run climbs up and down"
        if self.aggregator != "mean":
            why = f'needs aggregator = "mean": "{self.aggregator}" knows no weights of single sites'
            if self.sampling in ("optimal", "clustered"):
                yield "sampling", why
            if self.variance_reduction != "none":
                yield "variance_reduction", why
            if self.objective != "mean":
                yield "objective", why
        if ":" in self.sampling and self.variance_reduction != "none":
            yield "variance_reduction", "needs a sampling of the program's: of an own one no chances are known"
        if self.variance_reduction != "none" and self.objective != "mean":
            yield "variance_reduction", 'needs objective = "mean": what is remembered has the weights of earlier rounds'
        if self.mixing and self.aggregator == "mean":
            yield "mixing", 'must be false with aggregator = "mean", which sees no single reply'


class Evaluation(Section):
    """How sites are scored, before and after adaptation, on their test rows."""

    every: int = Field(default=10, ge=0, description="Interval between evaluations; 0 = only at the end (rounds)")
    metrics: Annotated[Texts, Code()] = Field(
        default=(),
        description="Metrics of every site: names or import paths; empty = accuracy and ece, or rmse, mae and r2",
    )
    score: Annotated[str, Code()] = Field(default="", description="Headline metric; empty = the first of the metrics")
    local_baseline: Literal["auto", "network", "none"] = Field(
        default="auto",
        description="What a site does alone; auto = the best of several methods by cross-validation on its support",
    )
    steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Length of adaptation at evaluation; none = learner.inner_steps (steps)"
    )
    judge: Literal["new_sites", "validation_sites"] = Field(
        default="new_sites",
        description="Who counts as new; validation_sites = training sites split off, and the new sites stay unseen",
    )
    schedule: Literal["fixed", "auto"] = Field(
        default="fixed",
        description="How far sites adapt at the end; auto = steps and rate chosen on validation sites, for all alike",
    )
    validation_sites: Share | Count = Field(
        default=0.2,
        description="Training sites split off to choose or to score by (share of them, or a count of sites)",
    )
    validate_every: int = Field(
        default=0, ge=0, description="Interval between scores that a run decides by; 0 = with every evaluation (rounds)"
    )
    gate: bool = Field(
        default=False, description="Whether a site chooses its steps, zero too, on its support rows by cross-validation"
    )
    tasks: int = Field(
        default=20, ge=1, description="Few-shot tasks that score a site, averaged, with data.ways (tasks)"
    )
    sites: int = Field(default=0, ge=0, description="Most that one evaluation visits, new sites first; 0 = all (sites)")
    patience: int = Field(
        default=0,
        ge=0,
        description="When a run ends with its best state, without a better validation score; 0 = never (evaluations)",
    )

    subgroups: Texts = Field(
        default=(),
        description='Columns that group test rows in final scores: a category, or "age: 40, 65" for bands of a number',
    )
    smallest_subgroup: int = Field(
        default=10, ge=1, description="Fewest of a subgroup that a site shows; smaller ones stay there (test rows)"
    )

    def conflicts(self) -> Conflicts:
        """Yields patience where no evaluation comes that it could count."""
        if self.patience and not self.validates_every:
            yield "patience", "needs validate_every or every above 0: it counts the scores that the run decides by"

    @property
    def validates_every(self) -> int:
        """Rounds between two scores that a run decides by."""
        return self.validate_every or self.every


class Tracking(Section):
    """Where MLflow and the run's files are."""

    uri: str = Field(
        default="sqlite:///mlflow.db",
        min_length=1,
        description="MLflow store: sqlite:///FILE or http://HOST:PORT; none = do not track",
    )
    experiment: str = Field(default="fedmeta", min_length=1, description="MLflow experiment that the run belongs to")
    name: str = Field(default="", description="Name of the run; empty = made from learner and seed")
    parent: str = Field(default="", description="Run that this one is shown under, by its MLflow id; empty = none")
    model: str = Field(default="", description="Name that the run's model is registered under; empty = none")
    site_curves: int = Field(
        default=50, ge=0, description="How many get curves of their own by round, new first (sites)"
    )
    folder: str = Field(default="fedmeta-runs", min_length=1, description="Folder for checkpoints and results of runs")


class Runtime(Section):
    """The machine: what may change the speed, and the result only by the last bits of a float."""

    seed: int = Field(default=0, ge=0, description="Key of every random draw (no unit)")
    engine: Literal["auto", "loop", "vmap", "lowrank", "program"] = Field(
        default="auto", description="How a cohort's gradients are computed"
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where tensors live")
    check: Literal["auto", "straight-through", "off"] = Field(
        default="auto",
        description="Check of own code before a run; straight-through = derivatives may differ from finite differences",
    )
    threads: int = Field(default=0, ge=0, description="Processor use of torch; 0 = torch's own default (threads)")
    memory: float = Field(default=0.0, ge=0, description="Budget for one cohort; 0 = a share of what is free (GiB)")
    checkpoint_every: int = Field(
        default=10, ge=0, description="Interval between checkpoints; 0 = only at the end (rounds)"
    )
    delay: Annotated[float, Field(ge=0)] | FunctionPath = Field(
        default=0.0,
        description="Mean simulated delay of replies, in local runs, or a function; 0 = none (simulated seconds)",
    )
    nodes: int = Field(
        default=3, ge=1, description="Simulated Flower nodes that share the sites, with --runtime ray (nodes)"
    )


class Stream(Section):
    """A federation in time: after every evaluation.every rounds the next block of each site scores it, and joins."""

    block: int = Field(default=0, ge=0, description="Rows of a site that come at a time; 0 = all are there (rows)")
    first: int = Field(
        default=0, ge=0, description="What a site has before the first block scores it; 0 = as many as a block (rows)"
    )
    memory: Literal["all", "window", "discount", "alarm"] = Field(
        default="all",
        description="What a site trains and adapts on: all so far, the last, recent ones rather, or since its alarm",
    )
    window: int = Field(default=100, ge=1, description='What memory = "window" remembers (rows)')
    half_life: float = Field(
        default=100.0, gt=0, description='Age at which memory = "discount" draws a row half as often (rows)'
    )
    rate: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description='Chance of a false alarm, for a fixed model, with memory = "alarm" (probability per stretch)',
    )
    learn: int = Field(
        default=0, ge=0, description="Steps after which the meta-state stays as it is; 0 = never (blocks)"
    )
    hindsight: bool = Field(
        default=True, description="Whether the end replays all blocks by the last meta-state, for the regret"
    )

    @property
    def first_rows(self) -> int:
        """The rows that a site has before the first block scores it."""
        return self.first or self.block


class Privacy(Section):
    """Differential privacy of whole sites: what the sequence of meta-states reveals of any one site is bounded."""

    clip_norm: float = Field(
        default=0.0, ge=0, description="Length to which a site shortens a longer meta-gradient; 0 = not (its norm)"
    )
    noise_multiplier: float = Field(default=0.0, ge=0, description="Noise on a round's sum; 0 = none (clip_norm)")
    delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Chance that epsilon does not hold; below 1 / training sites (probability)",
    )
    epsilon: float = Field(
        default=0.0, ge=0, description="Budget: the round that would go beyond it is not begun; 0 = any (epsilon)"
    )
    secure_aggregation: bool = Field(
        default=False, description="Whether the server learns sums over sites alone; noise is then added at the sites"
    )
    survivors: float = Field(
        default=0.5, gt=0, le=1, description="Sites of a round that must be left for its secure sum (share of them)"
    )
    colluding: int = Field(
        default=0, ge=0, description="Sites that may share their noise with the server; others add more for it (sites)"
    )
    quantum: float = Field(
        default=2.0**-32, gt=0, description="Step to which numbers are rounded in secure sums (unit of the gradient)"
    )

    def conflicts(self) -> Conflicts:
        """Yields noise without a bound, and a budget without noise."""
        if self.noise_multiplier and not self.clip_norm:
            yield "noise_multiplier", "needs clip_norm above 0: noise hides what has a bound"
        if self.colluding and not (self.secure_aggregation and self.noise_multiplier):
            yield "colluding", "needs secure_aggregation and noise_multiplier above 0: the server adds noise otherwise"
        if self.epsilon and not self.noise_multiplier:
            yield "epsilon", "needs noise_multiplier above 0: without noise nothing is private"
