import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmeta import learners, models
from fedmeta.errors import FedmetaError
from fedmeta.experiment import (
    LEARNERS,
    MODELS,
    SOURCES,
    Data,
    Evaluation,
    Experiment,
    Learner,
    Model,
    Runtime,
    Server,
    Tracking,
    describe,
    load_experiment,
    with_user_info,
    without_user_info,
)

# ---------------------------------------------------------------- round trips

texts = st.text(max_size=12)
words = st.text(min_size=1, max_size=12)
tricky = st.sampled_from(
    ['"', '"a"', "1", "1.5", "true", "True", "none", "[1]", "", " a ", "a # b", "x\ny = 1", "\x7f\\", "é"]
)
positive = st.floats(min_value=1e-300, max_value=1e300)
zero_up = st.floats(min_value=0, max_value=1e300)
counts = st.integers(min_value=1, max_value=10**12)
zero_counts = st.integers(min_value=0, max_value=10**12)
widths = st.lists(st.integers(1, 10**6), min_size=1, max_size=4).map(lambda each: ",".join(map(str, each)))
names = st.tuples() | st.lists(texts | tricky, max_size=4).map(tuple)
scalars = (
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | texts | tricky
)
further_keys = st.dictionaries(st.from_regex(r"my_[a-z]{1,5}", fullmatch=True), scalars, max_size=4)

experiments = st.builds(
    Experiment,
    data=st.builds(
        Data,
        source=st.sampled_from(SOURCES),
        path=words | tricky.filter(bool),
        label=words,
        columns=names,
        missing=names,
        binarise=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        new_sites=st.floats(0, 1, exclude_max=True) | counts | names,
        ways=st.none() | st.integers(2, 50),
        dirichlet=st.none() | positive,
        test=st.floats(0, 1, exclude_min=True, exclude_max=True),
        support=counts,
    ),
    model=st.builds(Model, name=st.sampled_from(MODELS), hidden=widths, channels=widths)
    | further_keys.map(lambda further: Model.model_validate({"name": "my.nets:make", **further})),
    learner=st.builds(Learner, name=st.sampled_from(LEARNERS), inner_steps=counts, inner_lr=positive)
    | further_keys.map(lambda further: Learner.model_validate({"name": "mine:Learner", **further})),
    server=st.builds(
        Server, lr=positive | st.just("auto"), wait_for=names | zero_counts, admit=st.booleans(), rounds=zero_counts
    ),
    evaluation=st.builds(Evaluation, steps=st.none() | zero_counts),
    tracking=st.builds(Tracking, uri=words, experiment=words, name=texts | tricky),
    runtime=st.builds(Runtime, seed=zero_counts, memory=zero_up),
)


@pytest.mark.slow
@settings(deadline=None)
@given(experiments)
def test_toml_round_trip(experiment: Experiment) -> None:
    assert Experiment.from_toml(experiment.to_toml()) == experiment


@pytest.mark.slow
@settings(deadline=None)
@given(experiments)
def test_params_round_trip_as_scalars_and_as_the_strings_of_mlflow(experiment: Experiment) -> None:
    params = experiment.params()
    assert all(isinstance(value, str | int | float | bool) for value in params.values())
    assert Experiment.from_params(params) == experiment
    assert Experiment.from_params({key: str(value) for key, value in params.items()}) == experiment


@pytest.mark.slow
@settings(deadline=None)
@given(experiments)
def test_every_param_is_an_override(experiment: Experiment) -> None:
    assert Experiment().with_overrides([f"{key}={value}" for key, value in experiment.params().items()]) == experiment


def refused(make: Callable[[], object]) -> str:
    """The message of the refusal, or nothing."""
    try:
        make()
    except FedmetaError as error:
        return str(error)
    return ""


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(alphabet='[]{}"=.,#\n\r\x0b\x85 \\a1server', max_size=60))
def test_any_text_is_an_experiment_or_one_line(text: str) -> None:
    message = refused(lambda: Experiment.from_toml(text))
    assert len(message.splitlines()) <= 1


@settings(deadline=None)
@given(st.sampled_from(describe()), st.recursive(scalars | st.dates(), lambda each: st.lists(each, max_size=3)))
def test_any_value_of_any_key_is_taken_or_refused_by_name(key: Any, value: object) -> None:
    shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    message = refused(lambda: Experiment().with_overrides([f"{key.section}.{key.key}={shown}"]))
    assert not message or (key.key in message and len(message.splitlines()) == 1)


def test_what_is_left_out_takes_its_default() -> None:
    assert Experiment.from_toml("") == Experiment() == Experiment.from_toml("[privacy]\n[data]\n")
    assert Experiment().learner.name == "maml"


# ---------------------------------------------------------------- good values


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("data.new_sites=4", "data", "new_sites", 4),
        ("data.new_sites=0", "data", "new_sites", 0.0),
        ("data.new_sites = 0.25", "data", "new_sites", 0.25),
        ("data.label=1", "data", "label", "1"),
        ('data.label="1"', "data", "label", "1"),
        ("data.path=a=b.npz", "data", "path", "a=b.npz"),
        ('data.columns=["age", "sex"]', "data", "columns", ("age", "sex")),
        ("data.binarise=0", "data", "binarise", 0.0),
        ("model.name=cnn", "model", "name", "cnn"),
        ('model.name="cnn"', "model", "name", "cnn"),
        ("model.name=my.nets:make", "model", "name", "my.nets:make"),
        ("model.hidden=[8, 16]", "model", "hidden", "8,16"),
        ("model.hidden=8", "model", "hidden", "8"),
        ("model.hidden=8, 16", "model", "hidden", "8,16"),
        ("server.lr=auto", "server", "lr", "auto"),
        ("server.lr=1", "server", "lr", 1.0),
        ("server.wait_for=5", "server", "wait_for", 5),
        ('server.wait_for=["a"]', "server", "wait_for", ("a",)),
        ("server.admit=True", "server", "admit", True),
        ("evaluation.steps=none", "evaluation", "steps", None),
        ("evaluation.steps=0", "evaluation", "steps", 0),
    ],
)
def test_values_of_overrides(override: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(Experiment.from_toml("[evaluation]\nsteps = 3", overrides=[override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_a_list_of_widths_in_a_file() -> None:
    assert Experiment.from_toml("[model]\nhidden = [32, 16]").model.hidden == "32,16"


def test_further_keys_reach_the_users_own_code() -> None:
    experiment = Experiment.from_toml('[model]\nname = "nets:make"\ndepth = 3\nbias = false\nscale = 1.0\nkind = "a"')
    assert experiment.model.extra == {"depth": 3, "bias": False, "scale": 1.0, "kind": "a"}
    assert Experiment().learner.extra == {}


def test_evaluation_steps_follow_the_inner_loop_unless_set() -> None:
    assert Experiment().with_overrides(["learner.inner_steps=7"]).evaluation_steps == 7
    assert Experiment().with_overrides(["learner.inner_steps=7", "evaluation.steps=0"]).evaluation_steps == 0


def test_experiments_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Experiment().server.rounds = 3


# ---------------------------------------------------------------- files and overrides


def test_overrides_win_over_the_file_and_the_last_over_all(tmp_path: Path) -> None:
    file = tmp_path / "har.toml"
    file.write_text('\ufeff[server]\nrounds = 5\nlr = 0.5\n[data]\nsource = "npz"\n', encoding="utf-8")
    experiment = load_experiment(file, ["server.rounds=6", "data.path=x.npz", "server.rounds=7"])
    assert (experiment.server.rounds, experiment.server.lr, experiment.data.path) == (7, 0.5, "x.npz")


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    moved = Experiment(data=Data(source="npz", path="a.npz")).absolute()
    assert moved.data.path == str(tmp_path / "a.npz")
    assert moved.tracking.folder == str(tmp_path / "fedmeta-runs")
    assert moved.tracking.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert moved.absolute() == moved


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite:////tmp/a.db", "file:///tmp/a", "postgresql://h/d"])
def test_complete_addresses_stay(uri: str) -> None:
    assert Experiment(tracking=Tracking(uri=uri)).absolute().tracking.uri == uri


def test_names_of_hubs_and_empty_paths_are_no_files() -> None:
    assert Experiment().absolute().data.path == ""
    assert Experiment(data=Data(source="huggingface", path="ylecun/mnist")).absolute().data.path == "ylecun/mnist"


# ---------------------------------------------------------------- the address of the store


def test_the_environment_names_the_store_where_the_key_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    file = tmp_path / "e.toml"
    file.write_text("[server]\nrounds = 1\n")
    assert load_experiment(file).tracking.uri == "http://mlflow:5000"
    assert load_experiment(file, ["tracking.uri=none"]).tracking.uri == "none"
    assert Experiment().with_overrides(["server.rounds=1"]).tracking.uri == "http://mlflow:5000"
    assert Experiment.from_toml('[tracking]\nuri = "none"').tracking.uri == "none"
    assert {key.key: key.default for key in describe()}["uri"] == "sqlite:///mlflow.db"


@pytest.mark.parametrize(
    ("uri", "bare"),
    [
        ("http://ann:s3cret@mlflow:5000/x?a=1", "http://mlflow:5000/x?a=1"),
        ("https://s3cret@mlflow", "https://mlflow"),
        ("postgresql+psycopg2://ann:s3/cr@et@db:5432/runs", "postgresql+psycopg2://db:5432/runs"),
        ("postgresql://db/runs?user=ann&password=s3cret&sslmode=require", "postgresql://db/runs?sslmode=require"),
        ("mysql://db/runs?password=s3cret", "mysql://db/runs"),
        ("sqlite:////tmp/a:b@c/mlflow.db", "sqlite:////tmp/a:b@c/mlflow.db"),
        ("http://mlflow:5000/x@y", "http://mlflow:5000/x@y"),
        ("none", "none"),
    ],
)
def test_no_view_of_an_experiment_holds_a_user_or_a_password(uri: str, bare: str) -> None:
    experiment = Experiment(tracking=Tracking(uri=uri))
    assert without_user_info(uri) == experiment.params()["tracking.uri"] == bare
    assert Experiment.from_toml(experiment.to_toml()).tracking.uri == bare
    assert "s3c" not in experiment.to_toml()
    assert "tracking" not in experiment.for_sites()
    assert Experiment.from_toml(experiment.for_sites()).data == experiment.data


def test_user_and_password_of_a_file_move_into_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    file = tmp_path / "e.toml"
    file.write_text('[tracking]\nuri = "postgresql://ann:s%2Fcret@db/runs"\n')
    assert load_experiment(file).tracking.uri == "postgresql://db/runs"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("ann", "s/cret")
    assert with_user_info("postgresql://db/runs") == "postgresql://ann:s%2Fcret@db/runs"
    assert with_user_info("http://db/runs") == "http://db/runs"
    note = capsys.readouterr().err
    assert note.startswith("fedmeta: note: tracking.uri: its user and password are kept out of all files")
    assert "cret" not in note
    file.write_text('[tracking]\nuri = "http://bob:other@db"\n')
    assert load_experiment(file).tracking.uri == "http://db"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "ann"
    assert "are set and used" in capsys.readouterr().err


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[learner]\ninner_lr = -1", "[learner] inner_lr = -1: must be a number greater than 0"),
        ("[server]\nround = 5", 'unknown key [server] round = 5; did you mean "rounds"?'),
        ("[server]\nseed = 5", "unknown key [server] seed = 5; did you mean [runtime] seed?"),
        ("[runtime]\nzzz = 5", "unknown key [runtime] zzz = 5; its keys are seed, engine, "),
        ("[privacy]\nzzz = 5", "unknown key [privacy] zzz = 5; its keys are clip_norm, noise_multiplier, delta, "),
        ("[serverr]\nrounds = 5", 'unknown section [serverr]; did you mean "server"?'),
        ("[zzz]", "unknown section [zzz]; the sections are problem, data, model, learner, "),
        ("rounds = 5", "unknown key rounds = 5 outside of any section; did you mean [server] rounds?"),
        ("server = 5", "server = 5: must be a section, written [server]"),
        ("[[data]]\npath = 'a'", 'data = [{"path": "a"}]: must be a section, written [data]'),
        ('[server]\nrounds = "many"', '[server] rounds = "many": must be a whole number of at least 0'),
        ("[server]\nrounds = true", "[server] rounds = true: must be a whole number of at least 0"),
        ("[server]\nrounds = 1.0", "[server] rounds = 1.0: must be a whole number of at least 0"),
        ("[server]\nrounds = 2020-01-01", '[server] rounds = "2020-01-01": must be a whole number of at least 0'),
        ("[server]\nadmit = 1", "[server] admit = 1: must be true or false"),
        ("[server]\nlr = nan", '[server] lr = nan: must be a number greater than 0, or "auto"'),
        (
            '[server]\nlr = "atuo"',
            '[server] lr = "atuo": must be a number greater than 0, or "auto"; did you mean "auto"?',
        ),
        (
            "[server]\nwait_for = [1]",
            '[server] wait_for = [1]: must be a list of texts, such as ["a", "b"], or a whole number',
        ),
        ("[data]\nlabel = 1", "[data] label = 1: must be a text that is not empty"),
        ("[data]\nmissing = 'NA'", '[data] missing = "NA": must be a list of texts, such as ["a", "b"]'),
        (
            "[data]\nnew_sites = 1.0",
            "[data] new_sites = 1.0: must be a number of at least 0 and less than 1, or a whole",
        ),
        ("[data]\nnew_sites = -1", "[data] new_sites = -1: must be a number of at least 0 and less than 1, or a whole"),
        ("[data]\ntest = 1", "[data] test = 1: must be a number greater than 0 and less than 1"),
        ("[data]\nsource = 'npz'", '[data] path = "": must name the data where source = "npz"'),
        (
            "[data]\nsplit = 'block'",
            '[data] split = "block": must be one of "random", "blocks", "time", "characters"; did you mean "blocks"?',
        ),
        (
            "[model]\nhidden = '64,a'",
            '[model] hidden = "64,a": must be whole numbers of at least 1 with commas between',
        ),
        (
            "[model]\nhidden = [64, true]",
            "[model] hidden = [64, true]: must be whole numbers of at least 1 with commas",
        ),
        ("[model]\nname = 'a.b'", '[model] name = "a.b": must be one of "logistic", "mlp", '),
        ("[model]\ndepth = 3", "unknown key [model] depth = 3; its keys are name, hidden, "),
        ("[model]\nname = 'a:b'\ndepth = [3]", "[model] depth = [3]: must be true or false, a number or a text"),
        ("[model]\nname = 'a:b'\n'my-key' = 3", "unknown key [model] my-key = 3; "),
        (
            "[learner]\nname = 'mamll'",
            '[learner] name = "mamll": must be one of "local", "fedavg", "fedavg-ft", "fedprox", ',
        ),
        ("[learner]\nname = 'mamll'", '"package.module:Class"; did you mean "maml"?'),
        (
            "[learner]\nname = mlp",
            "not valid TOML: Invalid value (at line 2, column 8): name = mlp; texts stand in quotes",
        ),
        (
            "[learner\n",
            "not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 9): [learner",
        ),
        ("a = 1\na = 2\n", "not valid TOML: Cannot overwrite a value (at line 2, column 6): a = 2"),
        ("[model]\nkernel = 4", "[model] kernel = 4: must be an odd whole number of at least 1"),
        (
            "[server]\nrounds = 9223372036854775808",
            "[server] rounds = 9223372036854775808: must be a number that fits 64",
        ),
        (
            "[model]\nname = 'a:b'\nsize = -9223372036854775809",
            "size = -9223372036854775809: must be a number that fits",
        ),
        ("[model]\nname = 'a:b'\nsize = inf", "[model] size = inf: must be true or false, a number or a text"),
        (
            "[model]\nhidden = 0x1" + "0" * 9000,
            "[model] hidden = a value too large to show: must be a number that fits 64",
        ),
        (
            "[server]\nrounds" + ".a" * 2000 + " = 1",
            "not valid TOML: nested too deep",
        ),
        ("a = " + "[" * 9000, "not valid TOML: nested too deep"),
        ('[server]\n"a\\nb" = 1', 'unknown key [server] "a\\nb" = 1; its keys are '),
    ],
)
def test_bad_experiments_are_refused_in_one_line(text: str, line: str) -> None:
    with pytest.raises(FedmetaError) as error:
        Experiment.from_toml(text, "har.toml")
    assert str(error.value).startswith("har.toml: ")
    assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "server.rounds=many",
            '--set server.rounds=many: [server] rounds = "many": must be a whole number of at least 0',
        ),
        ("server.round=5", '--set server.round=5: unknown key [server] round = 5; did you mean "rounds"?'),
        ("sever.rounds=5", '--set sever.rounds=5: unknown section sever; did you mean "server"?'),
        ("rounds=5", "--set rounds=5: must be written section.key=value; did you mean server.rounds=5?"),
        ("server.rounds", "--set server.rounds: must be written section.key=value, such as server.rounds=50"),
        ("", "--set : must be written section.key=value, such as server.rounds=50"),
        ("a\nb", '--set "a\\nb": must be written section.key=value'),
    ],
)
def test_bad_overrides_are_named(override: str, line: str) -> None:
    with pytest.raises(FedmetaError, match=f"^{re.escape(line)}"):
        Experiment.from_toml("[server]\nrounds = 1", "har.toml", [override])


def test_an_error_in_the_file_names_the_file_although_there_are_overrides() -> None:
    with pytest.raises(FedmetaError, match=r"^har\.toml: \[server\] rounds = -1"):
        Experiment.from_toml("[server]\nrounds = -1", "har.toml", ["server.lr=0.1"])


def test_all_problems_of_a_file_are_listed_at_once() -> None:
    text = "[server]\nrounds = -1\nround = 3\n[zzz]\n[data]\nsource = 'npz'\nrotations = true\n"
    with pytest.raises(FedmetaError) as error:
        Experiment.from_toml(text, "har.toml", ["runtime.seed=-1"])
    assert str(error.value) == (
        'har.toml: 6 problems: (1) [data] path = "": must name the data where source = "npz" '
        "(2) [data] rotations = true: must be false without data.ways: turned images are classes of few-shot tasks "
        "(3) [server] rounds = -1: must be a whole number of at least 0 "
        '(4) unknown key [server] round = 3; did you mean "rounds"? '
        "(5) --set runtime.seed=-1: [runtime] seed = -1: must be a whole number of at least 0 "
        f"(6) unknown section [zzz]; the sections are {', '.join(Experiment.model_fields)}"
    )


def test_of_many_problems_the_first_are_listed() -> None:
    text = "[server]\n" + "\n".join(f"{'x' * 4_000}{number} = 1" for number in range(200))
    with pytest.raises(FedmetaError, match=r"^har.toml: more than 10 problems: \(1\) .* \(10\) .* \.\.\.$"):
        Experiment.from_toml(text, "har.toml")


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "heart.toml").write_bytes(b"[data]\npath = '\xff'\n")
    with pytest.raises(FedmetaError, match=r'haert\.toml: no such file; did you mean "heart\.toml"\?$'):
        load_experiment(tmp_path / "haert.toml")
    with pytest.raises(FedmetaError, match=r"x\.toml: no such file; there is no folder .*nowhere$"):
        load_experiment(tmp_path / "nowhere" / "x.toml")
    with pytest.raises(FedmetaError, match=r"is a folder; name a TOML file in it$"):
        load_experiment(tmp_path)
    with pytest.raises(FedmetaError, match=r"heart\.toml: not UTF-8 \(line 2\); save it as UTF-8 text$"):
        load_experiment(tmp_path / "heart.toml")
    with pytest.raises(FedmetaError, match="cannot be read"):
        load_experiment(tmp_path / ("x" * 300))


# ---------------------------------------------------------------- the schema describes itself


def test_names_are_exactly_those_that_exist() -> None:
    assert set(LEARNERS) == set(learners.LEARNERS)
    assert set(MODELS) == set(models.MODELS)


def test_every_setting_of_every_learner_is_a_key() -> None:
    settings_of_all = {key for kind in learners.LEARNERS.values() for key in learners.settings_of(kind)}
    keys = {key.key for key in describe() if key.section == "learner"}
    assert settings_of_all == keys - {"name", "order", "first_order_rounds"}


def test_every_key_has_a_default_that_it_accepts_and_help_with_a_unit() -> None:
    keys = describe()
    assert len(keys) == len(Experiment().params()) == len({(key.section, key.key) for key in keys})
    for key in keys:
        assert re.fullmatch(r"[A-Z][^\n]{5,110}[\w)]", key.help), key
        if "number" in key.type and not key.type.startswith("whole numbers"):
            assert key.help.endswith(")"), f"{key} has no unit"


def test_a_further_key_of_own_code_may_be_a_list() -> None:
    """As a file or as --set; it keeps its numbers' types, and comes back from TOML and from MLflow's params."""
    text = '[problem]\nname = "a.b:C"\nfeatures = ["age", "bmi"]\ncuts = [1, 2.5]\n'
    found = Experiment.from_toml(text)
    assert found.problem.extra == {"features": ("age", "bmi"), "cuts": (1, 2.5)}
    assert [type(each) for each in found.problem.extra["cuts"]] == [int, float]
    assert Experiment.from_toml('[problem]\nname = "a.b:C"\n', overrides=["problem.cuts=[1, 2.5]"]).problem.extra == {
        "cuts": (1, 2.5)
    }
    assert Experiment.from_toml(found.to_toml()) == found
    assert Experiment.from_params({key: str(value) for key, value in found.params().items()}) == found
    assert hash(found) == hash(Experiment.from_toml(text))
    with pytest.raises(FedmetaError, match="nested"):
        Experiment.from_toml('[problem]\nname = "a.b:C"\nnested = {a = 1}\n')
