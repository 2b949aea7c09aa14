"""The keys of [data]: where the sites and their rows come from."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from fedmeta.experiment.validation import Conflicts, Count, FunctionPath, Name, OpenSection, Share, Texts

SourceName = Literal["npz", "tables", "digits", "omniglot", "shakespeare", "huggingface", "synthetic"]

SOURCES: tuple[str, ...] = get_args(SourceName)

ROW_ORDER = "row order"
"""The `data.time` that states: rows are in time as they come."""

MADE_SOURCES = ("digits", "synthetic")
"""Sources that read no file."""


class Data(OpenSection):
    """Where the sites and their data come from. With an import path, further scalar keys become its arguments."""

    path_key: ClassVar[str] = "source"

    source: SourceName | FunctionPath = Field(
        default="digits",
        description="Kind of data set, or a function that returns a fedmeta.TaskSource or a population of rows",
    )
    path: str = Field(default="", description="File or folder of the data; relative to the working directory")
    label: Name | Texts = Field(
        default="label",
        description="Name of the label column, in tables and Hugging Face data sets; a list = several targets (tables)",
    )
    site_column: str = Field(
        default="", description="Column of tables that names each row's site; empty = a file is a site"
    )
    ignore: Texts = Field(default=(), description="Columns of tables that are left out, such as names and ids")
    categorical: Texts = Field(
        default=(), description="Columns of tables that hold categories although they are numbers; text is found"
    )
    category_rows: int = Field(
        default=5, ge=1, description='A category that fewer train rows of each site have counts as "other" (rows)'
    )
    dates: Literal["", "days"] = Field(
        default="", description="What becomes of columns of dates in tables; days = since 1970-01-01, empty = refused"
    )
    site_key: str = Field(
        default="site", min_length=1, description="Array (npz) or column (huggingface) that holds each row's site"
    )
    time: str = Field(
        default="",
        description='Column or array that orders sites\' rows; "row order" = as they come, empty = array time of npz',
    )
    task: Literal["auto", "classification", "regression"] = Field(
        default="auto",
        description="What the labels are; auto = regression where they are floats, 1.0 too, else classification",
    )
    columns: Texts = Field(
        default=(),
        description="All columns of tables without header, in order; in huggingface the features, empty = all others",
    )
    positive: str = Field(
        default="", description="Class that sensitivity, auroc and the like are about; empty = the second of two"
    )
    missing: Texts = Field(
        default=("", "?", ".", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null"),
        description="Texts that mean a missing value, in tables",
    )
    binarise: float | None = Field(
        default=None,
        description="Labels above this become class 1, others class 0; none = leave labels (the label's unit)",
    )
    standardise: Literal["auto", "features", "image", "none"] = Field(
        default="auto",
        description="What gets mean 0 and variance 1: each feature or the whole image; auto = by the data's shape",
    )
    target: Literal["auto", "standardise", "log", "none"] = Field(
        default="auto",
        description="How numbers as labels are scaled for learning; auto = standardise, with an own problem none",
    )
    new_sites: Share | Count | Texts = Field(
        default=0.2, description="Sites that never train, drawn or named (share of sites, count of sites, or names)"
    )
    without: Texts = Field(
        default=(), description="Sites that are left out, as if they had no data here; fedmeta forget sets it (names)"
    )
    test: float = Field(
        default=0.5, gt=0, lt=1, description="Part of each site's rows kept for testing (share of rows)"
    )
    split: Literal["random", "blocks", "time", "characters"] = Field(
        default="random",
        description="How test rows are chosen; blocks = last, time = latest, characters = Omniglot's sites mixed",
    )
    support: int = Field(
        default=20, ge=1, description="What a site adapts on, or all it has; with data.ways see data.shots (rows)"
    )
    query: int = Field(
        default=20,
        ge=1,
        description="Rows of a task that score the adapted model; with data.ways in total over all classes (rows)",
    )
    ways: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Size of few-shot tasks, with labels numbered per task; none = labels as they are (classes)",
    )
    shots: int = Field(default=1, ge=1, description="What a few-shot task adapts on (rows per class)")
    rotations: bool = Field(
        default=False, description="Whether images turned by 90, 180 and 270 degrees are classes of few-shot tasks too"
    )
    min_rows: int = Field(default=0, ge=0, description="Sites with fewer are left out; 0 = none is (rows)")
    stride: int = Field(
        default=10, ge=1, description="From one of shakespeare's windows of text to the next (characters)"
    )
    subset: str = Field(default="", description="Configuration of a Hugging Face data set; empty = its default")
    part: str = Field(
        default="train", min_length=1, description="Split of a Hugging Face data set that is dealt to sites"
    )
    dirichlet: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Deals a Hugging Face set to data.sites by label; none = by data.site_key (concentration)",
    )
    sites: int = Field(
        default=1000, ge=1, description="Size of the synthetic population, or of data.dirichlet's (sites)"
    )
    rows: int = Field(default=40, ge=1, description="Size of a synthetic site (rows)")
    features: Count | Texts = Field(
        default=20,
        description="Columns of tables that are features, empty = all others; or a synthetic row's width (features)",
    )
    classes: int = Field(default=5, ge=2, description="Labels in the synthetic population (classes)")
    heterogeneity: float = Field(
        default=1.0,
        ge=0,
        description="How far synthetic sites differ; 0 = all alike (standard deviations of the common weights)",
    )

    @property
    def label_names(self) -> tuple[str, ...]:
        """The label columns: one, or a column for each of several targets."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def chosen_features(self) -> tuple[str, ...]:
        """The columns of tables that are features; empty for all but the label."""
        return () if isinstance(self.features, int) else self.features

    @property
    def neighbors_alike(self) -> bool:
        """Whether rows that follow each other may resemble each other: splits then keep them together."""
        return self.split in ("blocks", "time")

    def conflicts(self) -> Conflicts:
        """Yields further keys of a built-in source, a path that is missing, and rotations without few-shot tasks."""
        yield from super().conflicts()
        if self.source not in MADE_SOURCES and ":" not in self.source and not self.path:
            yield "path", f'must name the data where source = "{self.source}"'
        if not self.label_names or "" in self.label_names or len(set(self.label_names)) < len(self.label_names):
            yield "label", "must name a column, or several different ones"
        if len(self.label_names) > 1 and (self.task == "classification" or self.binarise is not None):
            yield "label", "must be one column: several are targets of a regression"
        if len(self.label_names) > 1 and self.source == "huggingface":
            yield "label", 'must be one column where source = "huggingface"'
        if self.source == "synthetic" and not isinstance(self.features, int):
            yield "features", 'must be a number where source = "synthetic"'
        if both := set(self.chosen_features) & set(self.ignore):
            yield "ignore", f"must not name what features names: {', '.join(sorted(both)[:5])}"
        if self.split == "time" and self.ways is not None:
            yield "split", 'must not be "time" with data.ways: the tasks of few classes have no order in time'
        if self.time in (*self.label_names, self.site_column, *self.chosen_features, *self.categorical) and self.time:
            yield "time", "must name a column that is nothing else: neither label, site nor feature"
        if self.split == "characters" and self.source != "omniglot":
            yield "split", 'must be "random" or "blocks" where source is not "omniglot": no other has alphabets to mix'
        if self.rotations and self.ways is None:
            yield "rotations", "must be false without data.ways: turned images are classes of few-shot tasks"
