"""Plots of a run: what they show, with few sites and with many, and that odd values do not stop them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from fedmeta.tracking import comparison_plots, plots
from tests.tracking.made_up_run import ACCURACY, RMSE, SNR, evaluation, history

BLUE, ORANGE, RED = (0, 0x72, 0xB2), (0xE6, 0x9F, 0), (0xD5, 0x5E, 0)


def has_colour(path, colour):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return bool((np.abs(pixels - colour).max(axis=2) < 12).any())


def texts(figure: Figure) -> str:
    axes = figure.axes[0]
    parts = [
        axes.get_title(loc="left"),
        axes.get_xlabel(),
        axes.get_ylabel(),
        *(text.get_text() for text in axes.texts),
    ]
    parts += [text.get_text() for text in figure.texts] + ([figure.get_suptitle()] if figure.get_suptitle() else [])
    return "\n".join(parts)


def legend(figure: Figure) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


@pytest.mark.quick("1-3-*")
@pytest.mark.parametrize(("new", "training", "score"), [(1, 3, SNR), (8, 32, RMSE), (200, 800, ACCURACY)])
def test_all_plots_are_drawn(tmp_path, new, training, score):
    rounds = [evaluation(new, training, r / 2, round_number=r, score=score) for r in range(3)]
    files = plots.save(pd.concat(rounds, ignore_index=True), score, tmp_path / "pictures")
    assert [file.stem for file in files] == ["sites", "gain_by_rows", "adaptation", "rounds", "heat_map"]
    for file in files:
        with Image.open(file) as image:
            assert image.width == 1400
            assert image.height < 3200
        assert has_colour(file, BLUE), f"{file.stem} does not show new sites"
        assert has_colour(file, ORANGE), f"{file.stem} does not show training sites"


def test_few_sites_are_named_best_on_top_and_new_ones_marked():
    sites = evaluation(8, 32)
    axes = plots.site_ranking(sites, ACCURACY).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == list(sites.sort_values(["personalized_accuracy", "site"])["site"])
    bold = {label.get_text() for label in axes.get_yticklabels() if label.get_fontweight() == "bold"}
    assert bold == set(sites.loc[sites["kind"] == "new", "site"])


def test_the_lowest_error_is_best():
    sites = evaluation(2, 5, score=RMSE)
    names = [label.get_text() for label in plots.site_ranking(sites, RMSE).axes[0].get_yticklabels()]
    assert names == list(sites.sort_values(["personalized_rmse", "site"], ascending=[False, True])["site"])


def test_many_sites_become_a_band_of_each_group_with_its_worst_decile():
    sites = evaluation(200, 800)
    figure = plots.site_ranking(sites, ACCURACY)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["200 new sites", "800 training sites"]
    new = sites.loc[sites["kind"] == "new", "personalized_accuracy"]
    assert f"worst 10 %: {new.nsmallest(20).mean():.3f}" in texts(figure)
    losing = (sites["gain"] < 0).sum()
    assert texts(figure).endswith(f"1000 sites before and after adapting; {losing} harmed")


def test_harmed_sites_stand_out(tmp_path):
    sites = evaluation(3, 3)
    better = sites.assign(global_accuracy=0.5, personalized_accuracy=0.6, gain=0.1)
    worse = better.assign(personalized_accuracy=[0.4, *[0.6] * 5], gain=[-0.1, *[0.1] * 5])
    lines = {}
    for name, frame in (("better", better), ("worse", worse)):
        collection = plots.site_ranking(frame, ACCURACY).axes[0].collections[0]
        lines[name] = {tuple(np.round(255 * colour[:3]).astype(int)) for colour in collection.get_colors()}
    assert RED in lines["worse"]
    assert RED not in lines["better"]


def test_adaptation_shows_the_mean_at_every_step():
    sites = evaluation(4, 6)
    line = plots.adaptation(sites, ACCURACY).axes[0].lines[0]
    expected = np.array(sites.loc[sites["kind"] == "new", "steps"].tolist()).mean(axis=0)
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_adaptation_has_an_axis_of_evaluations_where_a_step_takes_several():
    sites = evaluation(4, 6)
    assert not plots.adaptation(sites, ACCURACY).axes[0].child_axes
    (above,) = plots.adaptation(sites.assign(step_evaluations=32), ACCURACY).axes[0].child_axes
    assert above.get_xlabel() == "evaluations of the objective"
    above.apply_aspect()
    steps = np.array(plots.adaptation(sites, ACCURACY).axes[0].get_xlim())
    np.testing.assert_allclose(above._functions[0](steps), 32 * steps)


def test_rounds_show_the_worst_decile():
    run = history(4, 6, 20, 5)
    figure = plots.by_round(run, ACCURACY)
    assert legend(figure) == {"new sites", "training sites", "personalized", "its worst 10 %", "global"}
    lines = [line.get_ydata() for line in figure.axes[0].lines]
    worst = run[run["kind"] == "new"].groupby("round")["personalized_accuracy"].min()
    np.testing.assert_allclose(lines[1], worst)


@pytest.mark.slow
def test_a_run_without_defined_scores_is_drawn(tmp_path):
    sites = evaluation(1, 2).assign(global_accuracy=np.nan, personalized_accuracy=np.nan, gain=np.nan)
    assert "no site has a defined score" in texts(plots.site_ranking(sites, ACCURACY))
    assert len(plots.save(sites, ACCURACY, tmp_path)) == 5


def test_the_card_of_sites_is_wide_and_low_and_lists_only_what_is_drawn():
    sites = evaluation(3, 5)
    for gains, entry in ((sites["gain"].abs(), False), (-sites["gain"].abs(), True)):
        figure = plots.site_card(sites.assign(gain=gains), ACCURACY)
        assert tuple(figure.get_size_inches()) == plots.CARD
        assert ("harmed" in legend(figure)) == entry
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names == list(sites.sort_values(["personalized_accuracy", "site"], ascending=[False, False])["site"])
    many = plots.site_card(evaluation(30, 70), ACCURACY)
    assert tuple(many.get_size_inches()) == plots.CARD


def test_labels_name_the_score_with_its_unit():
    axes = plots.by_round(evaluation(2, 4, score=SNR), SNR).axes[0]
    assert axes.get_ylabel() == "snr (dB)"
    assert plots.gain_by_rows(evaluation(2, 4, score=SNR), SNR).axes[0].get_ylabel() == "gain in snr (dB)"
    assert plots.gain_by_rows(evaluation(2, 4, score=RMSE), RMSE).axes[0].get_ylabel() == "reduction of rmse"


@pytest.mark.slow
def test_the_problems_own_pictures_are_the_others(tmp_path):
    plots.save(evaluation(1, 2), ACCURACY, tmp_path)
    (tmp_path / "start.png").write_bytes(b"")
    assert [path.name for path in plots.own_pictures(tmp_path)] == ["start.png"]
    assert plots.own_pictures(tmp_path / "none") == []


@pytest.mark.slow
def test_names_are_shown_as_they_are(tmp_path, recwarn):
    names = ["$x^2$", "病院", "a\nb", "_hidden", "long " * 20, "{}%"]
    sites = evaluation(2, 4).assign(site=names)
    labels = {label.get_text() for label in plots.site_ranking(sites, ACCURACY).axes[0].get_yticklabels()}
    assert {"$x^2$", "病院", "a b", "_hidden", "{}%"} < labels
    assert all(len(label) <= 28 for label in labels)
    plots.save(sites, ACCURACY, tmp_path)
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.data())
def test_any_scores_are_drawn(data):
    count = data.draw(st.integers(1, 5))
    score = st.one_of(st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.floats(-1e6, 1e6))
    steps = [data.draw(st.lists(score, min_size=1, max_size=4)) for _ in range(count)]
    sites = evaluation(0, count).assign(
        kind=data.draw(st.lists(st.sampled_from(["new", "training", "validation"]), min_size=count, max_size=count)),
        rows=data.draw(st.lists(st.integers(0, 10**6), min_size=count, max_size=count)),
        global_accuracy=data.draw(st.lists(score, min_size=count, max_size=count)),
        personalized_accuracy=data.draw(st.lists(score, min_size=count, max_size=count)),
        steps=steps,
    )
    sites["gain"] = sites["personalized_accuracy"] - sites["global_accuracy"]
    for draw in plots.PLOTS.values():
        draw(sites, ACCURACY).draw_without_rendering()


def test_the_heat_map_has_a_row_per_site_and_a_column_per_evaluation():
    history = pd.concat([evaluation(3, 5, r / 2, round_number=r) for r in (0, 10, 20)], ignore_index=True)
    axes = plots.heat_map(history, ACCURACY).axes[0]
    (image,) = axes.images
    assert image.get_array().shape == (8, 3)
    last = history[history["round"] == 20].set_index("site")["personalized_accuracy"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == last.idxmax()
    np.testing.assert_allclose(image.get_array()[:, 2], last[names].to_numpy())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10", "20"]


def test_traffic_names_every_learner_once_though_points_fall_together():
    table = pd.DataFrame(
        {"learner": ["maml", "fedavg-ft", "meta-sgd", "local"], "bytes_up": [8e6, 8e6, 35e6, 0.0]}
        | {"personalized": [0.9, 0.9, 0.88, 0.6]}
    )
    axes = comparison_plots.traffic(table, ACCURACY).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["local", "maml, fedavg-ft", "meta-sgd"]
    assert axes.collections[0].get_offsets().shape == (4, 2)
