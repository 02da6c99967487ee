"""Labels carried through a video: against the definition, pair by pair in float64; memory; masks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.evaluate.label_propagation import (
    _rows_at_once,
    most_likely,
    propagate_labels,
    propagate_video,
)

GRID = (5, 7)


def features_of(seed, frames, dim=6, grid=GRID):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(frames, grid[0] * grid[1], dim, generator=draws)


def labels_of(seed, frames, kinds=3, grid=GRID):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(frames, grid[0] * grid[1], kinds, generator=draws).softmax(-1)


def by_definition(features, context, labels, grid, radius, topk, temperature):
    """Every pair of positions by itself, in float64."""
    rows, columns = grid
    features, context, labels = (x.double().numpy() for x in (features, context, labels))
    result = np.zeros(labels.shape[1:])
    for i in range(rows * columns):
        pairs = []
        for frame in range(len(context)):
            for j in range(rows * columns):
                down, right = abs(i // columns - j // columns), abs(i % columns - j % columns)
                if radius and max(down, right) > radius:
                    continue
                a, b = features[i], context[frame, j]
                cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
                pairs.append((math.exp(cosine / temperature), frame, j))
        chosen = sorted(pairs, reverse=True)[:topk]
        total = sum(weight for weight, _, _ in chosen)
        for weight, frame, j in chosen:
            result[i] += weight / total * labels[frame, j]
    return result


@pytest.mark.parametrize("radius", [0, 1, 2, 12])
@pytest.mark.parametrize("topk", [1, 5, 200])
def test_labels_are_those_of_the_definition_however_many_rows_are_computed_at_once(radius, topk):
    features, context, labels = features_of(0, 1)[0], features_of(1, 3), labels_of(2, 3)
    expected = by_definition(features, context, labels, GRID, radius, topk, 0.1)
    for most_bytes in (1, 20_000, 1 << 30):
        found = propagate_labels(
            F.normalize(features, dim=1),
            F.normalize(context, dim=2),
            labels,
            GRID,
            radius=radius,
            topk=topk,
            temperature=0.1,
            most_bytes=most_bytes,
        )
        assert np.abs(found.numpy() - expected).max() < 2e-6
        torch.testing.assert_close(found.sum(1), torch.ones(35))


def test_similarities_never_take_more_than_was_asked_for_but_for_one_row():
    for grid, frames, reach in (((60, 104), 8, 12), ((30, 52), 8, 12), ((5, 7), 2, 7)):
        for most_bytes in (1, 1 << 20, 64 << 20):
            number = _rows_at_once(grid, frames, reach, most_bytes)

            def size(number, grid=grid, frames=frames, reach=reach):
                near = min(grid[0], number + 2 * reach)
                return 4 * number * grid[1] * frames * near * grid[1]

            assert number == 1 or size(number) <= most_bytes
            assert number == grid[0] or size(number + 1) > most_bytes


def test_a_frame_takes_labels_of_the_first_frame_and_of_the_last_few():
    features, first = features_of(3, 6), labels_of(4, 1)[0]
    options = {"radius": 2, "topk": 3, "temperature": 0.1}
    found = list(propagate_video(iter(features), first, GRID, n_last_frames=2, **options))
    labels = [first.double().numpy()]
    for t in range(1, 6):
        places = [0, *range(max(1, t - 2), t)]
        labels.append(
            by_definition(
                features[t],
                features[places],
                torch.from_numpy(np.stack([labels[k] for k in places])),
                GRID,
                **options,
            )
        )
    assert len(found) == 5
    for soft, expected in zip(found, labels[1:], strict=True):
        assert np.abs(soft.numpy() - expected).max() < 5e-6


def test_without_last_frames_all_labels_are_of_the_first_one():
    features, first = features_of(5, 4), labels_of(6, 1)[0]
    options = {"radius": 0, "topk": 4, "temperature": 0.2}
    found = list(propagate_video(iter(features), first, GRID, n_last_frames=0, **options))
    for t in range(1, 4):
        expected = by_definition(features[t], features[:1], first[None], GRID, **options)
        assert np.abs(found[t - 1].numpy() - expected).max() < 2e-6


def test_an_object_that_moves_is_followed():
    draws = torch.Generator().manual_seed(0)
    background = torch.randn(35, 16, generator=draws)  # each position its own, in all frames
    thing = torch.randn(16, generator=draws)
    features, places = [], [8, 9, 17, 18, 26]
    for place in places:
        frame = background.clone()
        frame[place] = thing
        features.append(frame)
    first = F.one_hot((torch.arange(35) == 8).long(), 2).float()
    found = propagate_video(
        iter(features), first, GRID, n_last_frames=2, radius=2, topk=1, temperature=0.1
    )
    for place, soft in zip(places[1:], found, strict=True):
        assert soft[place].argmax() == 1, place


def test_masks_are_those_of_the_stretched_maps():
    soft = torch.zeros(6, 3)
    soft[:, 0], soft[4, 0], soft[4, 1] = 1.0, 0.8, 0.2  # a small object, of which 0.2 is left
    mask = most_likely(soft, (2, 3), 4)
    assert mask.shape == (8, 12) and mask.dtype == torch.uint8
    assert mask[5, 5] == 1 and mask[0, 0] == mask[7, 11] == 0 and mask.max() == 1
    nothing = torch.zeros(6, 3)
    nothing[:, 0] = 1.0  # no object anywhere: maps that are the same everywhere
    assert (most_likely(nothing, (2, 3), 4) == 0).all()
