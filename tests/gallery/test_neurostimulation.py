"""Neurostimulation: the simulated patients, the search, and the prior that sums and gradients find."""

import itertools

import numpy as np
import pytest
import torch

from experiments.gallery import measure
from experiments.gallery.neurostimulation import neurostimulation as stim
from fedmeta.learners import build

NAME = "problem.name=experiments.gallery.neurostimulation.neurostimulation:ByGradients"


@pytest.fixture(scope="module")
def run():
    return measure.run("neurostimulation")


def regrets(state, sites, steps=20, **settings):
    problem = stim.Neurostimulation(**settings)
    return measure.scores(build("fedavg-ft", problem, inner_steps=1), state, problem, sites, steps)


@pytest.mark.slow
def test_patients_have_seizures_of_their_own_that_settings_lower():
    found = stim.responses(60)
    assert found.shape == (60, 500)
    assert np.isfinite(found).all()
    assert found.max(1).mean() > 0.5
    assert len(set(found.argmax(1).tolist())) > 10, "the best settings differ"
    assert 0 < (found < stim.LIMIT).mean() < 0.2
    assert found[:, :50] == pytest.approx(0, abs=0.1), "no amplitude, no response"


@pytest.mark.slow
def test_the_sums_are_the_conditional_moments_of_the_weights():
    problem = stim.Neurostimulation()
    state, task = problem.init(0), problem.task("patient-03", "train", 1, 0)
    rows = problem.features[task.support["settings"]]
    covariance = state["factor"] @ state["factor"].T
    precision = torch.linalg.inv(covariance) + rows.T @ rows / stim.NOISE**2
    mean = torch.linalg.solve(precision, rows.T @ task.support["outcomes"] / stim.NOISE**2)
    sent = problem.payload([state], task)
    assert torch.allclose(sent["first"], mean, atol=1e-8)
    assert torch.allclose(sent["second"], torch.linalg.inv(precision) + torch.outer(mean, mean), atol=1e-8)


@pytest.mark.slow
def test_every_round_of_sums_raises_the_likelihood():
    problem = stim.Neurostimulation()
    tasks = [problem.task(site, "train", 1, 0) for site in problem.sites()[:20]]
    state, losses = problem.init(0), []
    for _ in range(6):
        losses.append(sum(float(problem.inner(state, task.support)) for task in tasks))
        sent = [problem.payload([state], task) for task in tasks]
        state = problem.outer_step(state, {key: sum(each[key] for each in sent) for key in sent[0]}, len(sent))
    assert all(after < before for before, after in itertools.pairwise(losses))


@pytest.mark.slow
def test_a_learned_prior_halves_the_regret_of_random_search_and_beats_the_best_fixed_setting(run):
    new = measure.new_sites(run)
    regret = regrets(run.meta_state, new)["regret"]
    random = []
    for site in new:
        data = stim.Neurostimulation().task(site, "test", 0, 0).support
        truth, draw = data["responses"][0].numpy(), np.random.default_rng(int(data["seed"]))
        for _ in range(20):
            settings = draw.integers(0, 500, 10)
            outcomes = truth[settings] + stim.NOISE * draw.normal(size=10)
            random.append(truth.max() - truth[settings[outcomes.argmax()]])
    truth = stim.responses(60)
    training = [int(site[-2:]) for site in measure.training_sites(run)]
    fixed = truth[training].mean(0).argmax()
    fixed_regret = np.mean([truth[int(site[-2:])].max() - truth[int(site[-2:])][fixed] for site in new])
    assert regret[:, 10].mean() <= 0.5 * np.mean(random)
    assert regret[:, 10].mean() < fixed_regret


@pytest.mark.slow
def test_with_the_limit_no_more_than_one_trial_in_twenty_does_harm(run):
    found = regrets(run.meta_state, measure.new_sites(run), limit=True)
    assert found["harmful_trials"][:, -1].mean() <= 0.05 * 20
    assert found["regret"][:, -1].mean() < found["regret"][:, 0].mean()


@pytest.mark.slow
def test_a_memory_finds_back_sooner_after_the_patient_changed(run):
    new = measure.new_sites(run)
    kept, forgets = (regrets(run.meta_state, new, 20, memory=memory, drift=15)["regret"] for memory in (0, 40))
    assert forgets[:, 20].mean() < kept[:, 20].mean()


@pytest.mark.slow
def test_gradients_find_a_prior_as_likely_as_sums_do(run):
    steps = ["server.rounds=60", "server.sites_per_round=10", "server.optimizer=adam", "server.lr=0.03"]
    state = measure.run("neurostimulation", NAME, *steps).meta_state
    problem = stim.Neurostimulation()
    tasks = [problem.task(site, "train", 1, 0) for site in measure.training_sites(run)]

    def likelihood(state):
        prior = {"mean": state["theta.mean"], "factor": state["factor"]}
        return np.mean([float(problem.inner(prior, task.support)) for task in tasks])

    start = build("fedavg-ft", problem, inner_steps=1).init(0)
    assert likelihood(state) < likelihood(start) - 0.8 * (likelihood(start) - likelihood(run.meta_state))
