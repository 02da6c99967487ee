"""R-MAC: its regions, the descriptor by the definition in float64, any number of processes."""

import numpy as np
import pytest
import torch

from src.cluster.pca import fit_whitening
from src.evaluate import rmac
from tests.gloo import run_ranks


def test_the_regions_of_a_square_and_of_a_longer_map():
    assert rmac.regions(6, 6, 1) == [(0, 0, 6)]
    square = rmac.regions(6, 6, 2)
    assert square[1:] == [(0, 0, 4), (0, 2, 4), (2, 0, 4), (2, 2, 4)]
    # 8 x 6: with one region more, neighbours overlap by 1 - 2/6, with more by even more.
    assert rmac.regions(8, 6, 2) == [
        *((0, 0, 6), (2, 0, 6)),
        *((top, left, 4) for top in (0, 2, 4) for left in (0, 2)),
    ]


@pytest.mark.parametrize(
    "height, width", [(32, 24), (24, 32), (32, 32), (64, 12), (7, 100), (1, 1)]
)
@pytest.mark.parametrize("levels", [1, 3])
def test_regions_lie_in_the_map_and_cover_it_and_are_turned_with_it(height, width, levels):
    found = rmac.regions(height, width, levels)
    assert len(found) <= rmac.most_regions(levels)
    covered = torch.zeros(height, width)
    for top, left, side in found:
        assert side >= 1 and top >= 0 and left >= 0
        assert top + side <= height and left + side <= width
        covered[top : top + side, left : left + side] = 1
    turned = {(left, top, side) for top, left, side in found}
    assert turned == set(rmac.regions(width, height, levels))
    if max(height, width) <= 5 * min(height, width):  # of longer maps six more are not enough
        assert covered.all()


def test_the_longer_side_has_as_many_more_regions_as_make_them_overlap_by_two_fifths():
    for longer in range(25, 120, 5):
        widths = {left for _, left, _ in rmac.regions(24, longer, 1)}
        overlaps = [1 - (longer - 24) / m / 24 for m in range(1, 7)]
        assert len(widths) == 2 + int(np.argmin(np.abs(np.array(overlaps) - 0.4)))


def maps_of(count, dim=6, height=8, width=6):
    draws = torch.Generator().manual_seed(0)
    return torch.rand(count, dim, height, width, generator=draws)


def test_the_descriptor_is_that_of_the_definition():
    maps = maps_of(5)
    maxima = rmac.padded_maxima(maps, 2)
    assert maxima.shape == (5, rmac.most_regions(2), 6)
    whitening = rmac.learn_whitening(maxima, 4, torch.device("cpu"))
    found = rmac.descriptors(maps, 2, whitening)

    vectors = np.array(
        [
            [x[:, t : t + s, a : a + s].max((1, 2)) for t, a, s in rmac.regions(8, 6, 2)]
            for x in maps.double().numpy()
        ]
    )  # (5, R, 6)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    rows = vectors.reshape(-1, 6)
    values, directions = np.linalg.eigh(np.cov(rows.T, bias=True))
    directions = directions[:, ::-1][:, :4] / np.sqrt(values[::-1][:4])
    whitened = (vectors - rows.mean(0)) @ directions
    whitened /= np.linalg.norm(whitened, axis=2, keepdims=True)
    expected = whitened.sum(1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # Up to the signs of the directions, so that cosines are compared.
    np.testing.assert_allclose((found @ found.T).numpy(), expected @ expected.T, atol=1e-4)


def test_regions_without_an_activation_neither_teach_nor_add_anything():
    maps = maps_of(4, height=4, width=4)
    dark = maps.clone()
    dark[0, :, :, :] = 0
    dark[0, :, 0, 0] = torch.arange(1.0, 7)  # in the first corner alone
    maxima = rmac.padded_maxima(dark, 3)
    rows = maxima[maxima.ne(0).any(2)]
    whitening = rmac.learn_whitening(maxima, 3, torch.device("cpu"))
    torch.testing.assert_close(whitening.components, fit_whitening(rows, 3).components)
    found = rmac.descriptors(dark, 3, whitening)
    one_region = rmac.descriptors(dark[:1, :, :1, :1], 1, whitening)
    torch.testing.assert_close(found[:1], one_region)
    blank = rmac.descriptors(torch.zeros_like(maps), 3, whitening)
    assert (blank == 0).all()  # and no NaN


def learn_on_rank(rank, world_size):
    maxima = rmac.padded_maxima(maps_of(7), 3)
    own = maxima[7 * rank // world_size : 7 * (rank + 1) // world_size]
    whitening = rmac.learn_whitening(own, 4, torch.device("cpu"))
    return whitening.components.numpy()


def test_two_processes_learn_the_whitening_of_one():
    (one,) = run_ranks(learn_on_rank, 1)
    for found in run_ranks(learn_on_rank, 2):
        np.testing.assert_array_equal(found, one)
