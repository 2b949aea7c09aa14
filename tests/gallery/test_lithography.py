"""Lithography: imaging against what is known, and the learned source on a clip that it has not seen."""

from pathlib import Path

import pytest
import torch

from experiments.gallery.lithography import contest
from experiments.gallery.lithography import lithography as litho
from fedmeta.errors import FedmetaError
from fedmeta.learners import build

CLIPS = Path(__file__).parents[3] / "shared/data/iccad2013"
needs_clips = pytest.mark.skipif(not CLIPS.exists(), reason=f"the contest's clips are not at {CLIPS}")


def weights(name):
    source = litho.shape_of(name).sigmoid()[litho.ORBIT]
    return source / source.sum()


def test_a_clear_mask_is_as_bright_as_the_source_and_a_dark_one_is_dark():
    side = litho.FIELD // litho.PIXEL
    for lens in litho.lenses(litho.PIXEL):
        assert torch.allclose(litho.aerial(torch.ones(side, side), weights("annular"), lens), torch.tensor(1.0))
        assert not litho.aerial(torch.zeros(side, side), weights("annular"), lens).any()


def test_a_grating_is_seen_only_where_two_of_its_orders_pass_the_lens():
    """Pitch 64 nm: an order's frequency is 2.23 NA / wavelength, beyond the reach even of the outermost points."""
    side = litho.FIELD // litho.PIXEL
    contrast = {}
    for pitch in (4, 8):
        lines = (torch.arange(side) % pitch < pitch // 2).float().expand(side, side)
        image = litho.aerial(lines, weights("annular"), litho.lenses(litho.PIXEL)[0])
        contrast[pitch] = float(image.max() - image.min())
    assert contrast[4] < 1e-5
    assert contrast[8] > 0.1


def test_images_are_the_sum_of_coherent_ones():
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(64, 64, generator=random)
    lens, whole = litho.lenses(litho.PIXEL)[1].to(torch.complex64), weights("quadrupole")
    alone = [(torch.fft.ifft2(torch.fft.fft2(mask) * one)).abs() ** 2 * w for one, w in zip(lens, whole, strict=True)]
    assert torch.allclose(litho.aerial(mask, whole, litho.lenses(litho.PIXEL)[1]), sum(alone), atol=1e-5)


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(FedmetaError, match=r"there is no M1_test\*\.glp"):
        litho.Lithography(str(tmp_path))


@needs_clips
def test_clips_are_the_contests():
    """Areas as OpenILT reports them: clip 1 has 215 344 nm^2, clip 4 has 82 560, clip 10 has 102 400."""
    problem = litho.Lithography(str(CLIPS))
    assert len(problem.sites()) == 10
    areas = {name: float(clip.sum()) * litho.PIXEL**2 for name, clip in problem.clips.items()}
    for name, area in (("clip-01", 215_344), ("clip-04", 82_560), ("clip-10", 102_400)):
        assert areas[name] == pytest.approx(area, rel=0.03)


@needs_clips
def test_the_source_stays_on_a_symmetric_simplex_and_the_mask_begins_at_the_target():
    problem = litho.Lithography(str(CLIPS))
    learner = build("maml", problem, inner_steps=2, inner_lr=200.0)
    state = {name: value + 0.3 for name, value in learner.init(0).items()}
    task = problem.task("clip-04", "train", 1, 0)
    gradient, _ = learner.meta_gradient(state, task)
    assert not gradient["theta.correction"].any()
    assert gradient["source"].abs().max() > 0
    own = problem.constrain(learner.adapt(state, task.support))
    assert float(own["source"].sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(own["source"], problem.constrain(learner.theta(state))["source"])


@needs_clips
@pytest.mark.slow
def test_the_contests_imaging_is_the_sum_over_its_kernels():
    """All 24 kernels on all 2 048 x 2 048 pixels, as defined, against the coarse grid."""
    imaging = contest.Contest(CLIPS)
    mask = contest.target(CLIPS, 4)
    spectrum = torch.fft.fftshift(torch.fft.fft2(mask, norm="forward"))
    for (kernels, weights), found in zip(imaging.lenses, imaging.images(mask), strict=True):
        whole = torch.zeros_like(mask)
        for kernel, weight in zip(kernels, weights, strict=True):
            passed = torch.zeros_like(spectrum)
            middle = slice(contest.SIDE // 2 - 17, contest.SIDE // 2 + 18)
            passed[middle, middle] = spectrum[middle, middle] * kernel
            whole += weight * torch.fft.ifft2(torch.fft.ifftshift(passed), norm="forward").abs().square()
        assert torch.allclose(found, whole, atol=1e-4 * float(whole.max()))


@needs_clips
@pytest.mark.slow
def test_simple_ilt_comes_near_the_published_row():
    """OpenILT's table, SimpleILT on M1_test1: L2 43 408, band 52 281. Its gradients are by a combined kernel."""
    before, after = contest.published(CLIPS)
    assert after[0] < before[0]
    assert after[0] == pytest.approx(43_408, rel=0.15)
    assert after[1] == pytest.approx(52_281, rel=0.07)
