import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from src.data import augment as module
from src.data import photometry
from src.data.augment import JITTER, Augment, apply_draws, draw_parameters, plan_steps

MEAN, STD = [0.485, 0.456, 0.406], [0.228, 0.224, 0.225]
OFF = {
    "flip_prob": 0.0,
    "color_jitter": (0.0, 0.0, 0.0, 0.0),
    "grayscale_prob": 0.0,
    "blur_prob": 0.0,
    "solarize_prob": 0.0,
}
SWAV = {
    "flip_prob": 0.5,
    "color_jitter": (0.8, 0.8, 0.8, 0.2),
    "jitter_prob": 0.8,
    "grayscale_prob": 0.2,
    "blur_prob": 0.5,
    "blur_sigma": (0.1, 2.0),
    "solarize_prob": 0.0,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_batch(batch_size=3, counts=(2, 4), sizes=(24, 12), channels=3, seed=0):
    return [
        torch.randint(
            0, 256, (batch_size, n, channels, s, s), dtype=torch.uint8, generator=generator(seed)
        )
        for n, s in zip(counts, sizes, strict=True)
    ]


def statistics(channels):
    return MEAN[:channels] + [0.4] * (channels - 3), STD[:channels] + [0.2] * (channels - 3)


def draw_many(num=20_000, seed=0, **options):
    return draw_parameters(generator(seed), 1, num, **{**SWAV, **options})


# ============ what comes out ============


def test_crops_are_crop_major_float_and_in_the_order_of_the_batch():
    batch = random_batch()
    crops = Augment(MEAN, STD, **OFF)(batch, generator())
    assert [tuple(crop.shape) for crop in crops] == [(3, 3, 24, 24)] * 2 + [(3, 3, 12, 12)] * 4
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for number, crop in enumerate(crops):
        source = batch[0][:, number] if number < 2 else batch[1][:, number - 2]
        assert crop.dtype == torch.float32
        assert (crop - (source / 255 - mean) / std).abs().max() < 1e-5


def test_resolutions_have_draws_of_their_own():
    (images,) = random_batch(batch_size=8, counts=(1,), sizes=(16,))
    flipped = Augment(MEAN, STD, **{**OFF, "flip_prob": 0.5})
    first, second = flipped([images, images], generator())
    assert 0 < sum(map(torch.equal, first, second)) < 8
    blurred = Augment(MEAN, STD, **{**OFF, "blur_prob": [0.0, 1.0]})
    first, second = blurred([images, images], generator())
    assert first.std() > second.std()


def test_input_is_left_as_it_was():
    for counts in ((2, 4), (1, 1)):
        batch = random_batch(counts=counts)
        copies = [images.clone() for images in batch]
        Augment(MEAN, STD)(batch, generator())
        assert all(map(torch.equal, batch, copies))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_options_switched_off_leave_only_the_normalisation(channels):
    mean, std = statistics(channels)
    (images,) = random_batch(counts=(1,), sizes=(9,), channels=channels)
    (crop,) = Augment(mean, std, **OFF)([images], generator())
    for c in range(channels):
        expected = TF.normalize(images[:, 0, c : c + 1] / 255, [mean[c]], [std[c]])
        assert (crop[:, c : c + 1] - expected).abs().max() < 1e-5


def test_same_generator_seed_gives_the_same_crops():
    batch = random_batch()
    first, again, other = (Augment(MEAN, STD)(batch, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_result_does_not_depend_on_how_many_samples_are_worked_on_at_a_time(monkeypatch):
    batch = random_batch(batch_size=9)
    results = []
    for values in (1, 3000, 1 << 30):  # one by one; a few; all at once, as on a GPU
        monkeypatch.setattr(module, "CHUNK_VALUES", values)
        augment = Augment(MEAN, STD, solarize_prob=0.3)
        results.append(augment(batch, generator(3)))
    for result in results[1:]:
        for crop, expected in zip(result, results[0], strict=True):
            assert (crop - expected).abs().max() < 1e-4


def test_memory_format_of_the_loader_makes_no_difference():
    batch = random_batch()
    by_pixel = [x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for x in batch]
    plain, other = (Augment(MEAN, STD)(x, generator()) for x in (batch, by_pixel))
    assert all(map(torch.equal, plain, other))


def by_hand(image, draws, row):
    """torchvision's functions, one after the other, on one uint8 (3, S, S)."""
    x = image[None] / 255
    if draws.flip[row]:
        x = TF.hflip(x)
    for number in draws.order[row]:
        if number >= 0:
            x = getattr(TF, f"adjust_{JITTER[number]}")(x, float(draws.factors[row, number]))
    if draws.grayscale[row]:
        x = TF.rgb_to_grayscale(x, 3).contiguous()
    if draws.sigma[row] > 0:
        half = photometry.blur_kernels(draws.sigma[row : row + 1])
        photometry.blur(x, torch.from_numpy(half)[:, :, None, None])
    if draws.solarize[row]:
        x = TF.solarize(x, 0.5)
    return TF.normalize(x, MEAN, STD)[0]


def test_every_sample_gets_its_own_operations_in_its_own_order():
    (images,) = random_batch(batch_size=64, counts=(1,), sizes=(16,))
    draws = draw_parameters(generator(5), 1, 64, **{**SWAV, "solarize_prob": 0.3})
    assert len({tuple(order) for order in draws.order}) > 15
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    result = apply_draws(images[:, 0], draws, mean, std)
    for row in range(64):
        expected = by_hand(images[row, 0], draws, row)
        assert (result[row] - expected).abs().mean() < 0.01, draws[row : row + 1]


def test_one_channel_has_brightness_contrast_and_blur_alone():
    (gray,) = random_batch(counts=(1,), sizes=(16,), channels=1, batch_size=8)
    colour = gray.expand(-1, -1, 3, -1, -1)
    (one,) = Augment([0.5], [0.25])([gray], generator())
    (three,) = Augment([0.5] * 3, [0.25] * 3)([colour], generator())
    # On gray pixels saturation, hue and grayscale change nothing, so all channels agree with one.
    assert (three - one).abs().max() < 1e-4 and one.std() > 0.1


def test_other_channel_counts_have_no_colour_operations():
    draws = draw_many(50)
    radii = np.zeros(50, dtype=int)
    for channels in (1, 2, 5):
        names = {name for name, _, _ in plan_steps(draws, radii, channels)}
        assert names == {"flip", "brightness", "contrast"}
    names = {name for name, _, _ in plan_steps(draws, radii, 3)}
    assert names == {"flip", "grayscale", *JITTER}
    (images,) = random_batch(counts=(1,), sizes=(16,), channels=5, batch_size=20)
    (crop,) = Augment(*statistics(5))([images], generator())
    assert torch.isfinite(crop).all()


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_flat_and_tiny_images_stay_finite_and_in_range(value, size):
    images = torch.full((40, 1, 3, size, size), value, dtype=torch.uint8)
    (crop,) = Augment([0.0] * 3, [1.0] * 3, solarize_prob=0.5)([images], generator())
    assert torch.isfinite(crop).all() and crop.min() >= -1e-5 and crop.max() <= 1 + 1e-5
    spread = crop.amax(dim=(1, 2, 3)) - crop.amin(dim=(1, 2, 3))
    assert spread.max() < 1e-4  # gray and flat before, gray and flat after


# ============ what is drawn ============


def test_probabilities_are_those_asked_for():
    draws = draw_many(solarize_prob=0.1)
    for mask, probability in (
        (draws.flip, 0.5),
        ((draws.order >= 0).any(axis=1), 0.8),
        (draws.grayscale, 0.2),
        (draws.sigma > 0, 0.5),
        (draws.solarize, 0.1),
    ):
        assert abs(mask.mean() - probability) < 0.015
    for option in ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"):
        for probability in (0.0, 1.0):
            draws = draw_many(500, **{option: probability})
            mask = {
                "flip_prob": draws.flip,
                "jitter_prob": draws.order[:, 0] >= 0,
                "grayscale_prob": draws.grayscale,
                "blur_prob": draws.sigma > 0,
                "solarize_prob": draws.solarize,
            }[option]
            assert (mask == bool(probability)).all()


def test_factors_are_uniform_in_their_ranges():
    draws = draw_many()
    ranges = [(0.2, 1.8)] * 3 + [(-0.2, 0.2)]
    sigma = draws.sigma[draws.sigma > 0]
    columns = [*draws.factors.T, sigma]
    for column, (low, high) in zip(columns, [*ranges, (0.1, 2.0)], strict=True):
        unit = np.sort((column - low) / (high - low))
        assert unit[0] >= -1e-6 and unit[-1] <= 1 + 1e-6
        assert np.abs(unit - np.arange(len(unit)) / len(unit)).max() < 2.3 / len(unit) ** 0.5
    strong = draw_many(color_jitter=(1.5, 0.4, 0.0, 0.5)).factors
    assert strong[:, 0].min() < 0.01 and strong[:, 0].min() >= 0 and strong[:, 0].max() > 2.49
    assert strong[:, 1].min() >= 0.6 and strong[:, 1].max() <= 1.4
    assert np.abs(strong[:, 3]).max() <= 0.5


def test_orders_of_the_jitter_are_equally_likely():
    orders = draw_many(24_000, jitter_prob=1.0).order
    kinds, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(kinds) == 24 and (np.sort(kinds, axis=1) == np.arange(4)).all()
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square, 23 degrees: once in 30,000 tries


def test_draws_are_independent_of_each_other():
    draws = draw_many()
    columns = [draws.flip, draws.order[:, 0] >= 0, draws.grayscale, draws.sigma > 0, draws.sigma]
    columns += [*draws.factors.T, draws.order[:, 0]]
    columns = np.array([np.asarray(column, dtype=float) for column in columns])
    correlation = np.corrcoef(columns)
    related = {(3, 4), (1, 9)}  # sigma is 0 without blur; the order is -1 without jitter
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            assert (i, j) in related or abs(correlation[i, j]) < 0.035, (i, j)
        assert abs(np.corrcoef(columns[i][1:], columns[i][:-1])[0, 1]) < 0.035


def test_strength_zero_takes_one_operation_out_and_changes_no_other_draw():
    full, less = draw_many(1000), draw_many(1000, color_jitter=(0.8, 0.8, 0.0, 0.2), blur_prob=0.0)
    assert not (less.order == 2).any() and (full.order == 2).any()
    for whole, part in zip(full.order, less.order, strict=True):
        assert [k for k in whole if k not in (-1, 2)] == [k for k in part if k != -1]
    assert np.array_equal(full.flip, less.flip)
    assert np.array_equal(full.grayscale, less.grayscale)
    assert np.array_equal(full.factors[:, [0, 1, 3]], less.factors[:, [0, 1, 3]])
    assert not less.sigma.any()


def test_probabilities_may_differ_from_crop_to_crop():
    blur, solarize = [1.0, 0.1, 0.5], [0.0, 0.2, 0.0]
    draws = draw_parameters(
        generator(), 3, 4000, **{**SWAV, "blur_prob": blur, "solarize_prob": solarize}
    )
    blurred = (draws.sigma > 0).reshape(3, 4000).mean(axis=1)
    solarized = draws.solarize.reshape(3, 4000).mean(axis=1)
    assert np.abs(blurred - blur).max() < 0.03 and blurred[0] == 1
    assert np.abs(solarized - solarize).max() < 0.03
    batch = random_batch(counts=(2, 1))
    assert len(Augment(MEAN, STD, blur_prob=blur)(batch, generator())) == 3
    with pytest.raises(ValueError, match="blur_prob has 2 values, one a crop makes 3"):
        Augment(MEAN, STD, blur_prob=[1.0, 0.1])(batch, generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_prob": 1.1}, "flip_prob 1.1"),
        ({"blur_prob": [0.5, -0.1]}, "blur_prob"),
        ({"color_jitter": (0.8, 0.8, 0.8)}, "color_jitter"),
        ({"color_jitter": (0.8, 0.8, 0.8, 0.6)}, "hue at most 0.5"),
        ({"color_jitter": (-0.8, 0.8, 0.8, 0.1)}, "color_jitter"),
        ({"blur_sigma": (2.0, 0.1)}, "blur_sigma"),
    ],
)
def test_values_out_of_range_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Augment(MEAN, STD, **options)


def test_mean_and_std_must_fit_together():
    with pytest.raises(ValueError, match="mean"):
        Augment([0.5], [0.2, 0.2])
    with pytest.raises(ValueError, match="above 0"):
        Augment([0.5], [0.0])
