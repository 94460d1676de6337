"""Views: exact inverses, linearity, isometry, one action at all resolutions, composition, names and errors."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from eqldm.views import (
    ALIASES,
    D4,
    D4_NAMES,
    GROUPS,
    IDENTITY,
    NEGATE,
    Rescale,
    Transform,
    View,
    draw_rescale,
    draw_transform,
    parse_view,
    patch_permute,
    transform_each,
)


@st.composite
def grid_views(draw):
    cells = draw(st.integers(1, 4))
    turns = tuple(draw(st.lists(st.integers(0, 7), min_size=cells**2, max_size=cells**2)))
    return View("drawn", cells, tuple(draw(st.permutations(range(cells**2)))), turns, draw(st.sampled_from((1, -1))))


zoo = st.sampled_from([parse_view(name, 4) for name in ("skew", "skew:-1", "inner_circle", "square_hinge:2", "pixel_permute")])
simple = st.one_of(zoo, st.sampled_from((*D4, NEGATE)), st.builds(patch_permute, st.integers(2, 4), st.integers(0, 99)), grid_views())
views = st.one_of(simple, st.builds(lambda a, b: a @ b, simple, simple))


def noise(side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


@given(views, st.integers(1, 3))
def test_inverse_is_exact_both_ways(view, scale):
    x = noise(view.cells * scale)
    assert torch.equal(view.inverse(view(x)), x)
    assert torch.equal(view(view.inverse(x)), x)


@given(views)
def test_linear_and_a_signed_permutation(view):
    x, y = noise(view.cells * 2, 0), noise(view.cells * 2, 1)
    assert torch.equal(view(2 * x - 0.5 * y), 2 * view(x) - 0.5 * view(y))
    assert torch.equal(view(x).flatten(-2).sort().values, (view.sign * x).flatten(-2).sort().values)  # hence an isometry


@given(views, st.sampled_from((2, 4)))
def test_commutes_with_average_pooling(view, f):
    x = noise(view.cells * f)
    torch.testing.assert_close(view(F.avg_pool2d(x, f)), F.avg_pool2d(view(x), f))


@given(views, st.integers(1, 2), st.integers(2, 3))
def test_acts_the_same_at_each_resolution(view, scale, f):
    def up(x):
        return x.repeat_interleave(f, -2).repeat_interleave(f, -1)

    x = noise(view.cells * scale)
    assert torch.equal(view(up(x)), up(view(x)))


@given(simple, simple, simple)
def test_composition_applies_the_right_one_first_and_is_associative(a, b, c):
    x = noise((a @ b).cells * 2)
    assert torch.equal((a @ b)(x), a(b(x)))
    assert torch.equal((a @ b).inverse(x), b.inverse(a.inverse(x)))
    left, right = (a @ b) @ c, a @ (b @ c)
    assert (left.cells, left.source, left.turns, left.sign) == (right.cells, right.source, right.turns, right.sign)


@given(views, st.integers(1, 3))
def test_refined_view_is_the_same_map(view, factor):
    fine = view.refine(view.cells * factor)
    assert fine.cells == view.cells * factor
    x = noise(fine.cells * 2)
    assert torch.equal(fine(x), view(x))


@given(views)
def test_gradients_flow_through_the_inverse(view):
    x, w = noise(view.cells * 2, 0).requires_grad_(), noise(view.cells * 2, 1)
    (w * view(x)).sum().backward()
    assert torch.equal(x.grad, view.inverse(w))


def test_d4_is_a_group():
    x = noise(3)
    for a in D4:
        assert a.inverse in D4 and torch.equal(a.inverse(a(x)), x)
        for b in D4:
            (element,) = (a @ b).turns
            assert torch.equal(D4[element](x), a(b(x)))
        assert sorted((a @ b).turns[0] for b in D4) == list(range(8))
    for elements in GROUPS.values():
        assert {(D4[a] @ D4[b]).turns[0] for a in elements for b in elements} == set(elements)


@pytest.mark.parametrize(("name", "wanted"), [
    ("rotate_90", [[2, 4], [1, 3]]),  # counter-clockwise: the right column comes up
    ("rotate_180", [[4, 3], [2, 1]]),
    ("rotate_270", [[3, 1], [4, 2]]),
    ("mirror", [[2, 1], [4, 3]]),
    ("flip", [[3, 4], [1, 2]]),
    ("transpose", [[1, 3], [2, 4]]),
    ("anti_transpose", [[4, 2], [3, 1]]),
    ("negate", [[-1, -2], [-3, -4]]),
])  # fmt: skip
def test_names_mean_what_they_say(name, wanted):
    assert parse_view(name)(torch.tensor([[1, 2], [3, 4]])).tolist() == wanted


def test_cells_turn_in_place_and_move_apart():
    view = View("hinge", 2, (1, 0, 2, 3), (0, 0, 2, 0))
    x = torch.arange(16).view(4, 4)
    assert view(x).tolist() == [[2, 3, 0, 1], [6, 7, 4, 5], [13, 12, 10, 11], [9, 8, 14, 15]]


@pytest.mark.parametrize("text", [*D4_NAMES, "negate", "patch_permute:4", "patch_permute:4:7", "flip@rotate_90@patch_permute:2"])
def test_a_view_is_found_again_by_its_name(text):
    assert parse_view(text).name == text and parse_view(parse_view(text).name) == parse_view(text)


def test_aliases_parameters_and_seeds():
    assert {alias: parse_view(alias).name for alias in ALIASES} == ALIASES
    assert parse_view("patch_permute:3:5") == patch_permute(3, 5) != parse_view("patch_permute:3")
    assert parse_view("negate@rotate_90") == NEGATE @ D4[1]


@pytest.mark.parametrize(("text", "message"), [
    ("rotate90", "unknown view 'rotate90': did you mean rotate_90"),
    ("zzz", "known views: identity, .*rotate_cw, patch_permute"),
    ("", "unknown view ''"),
    ("flip@fli", "unknown view 'fli': did you mean flip"),
    ("flip:2", "view 'flip' takes no parameters, got 'flip:2'"),
    ("patch_permute:x", r"wanted patch_permute\[:N\[:SEED\]\], such as patch_permute:4"),
    ("patch_permute:-4", r"wanted patch_permute\[:N"),
    ("patch_permute:2:3:4", r"wanted patch_permute\[:N"),
    ("patch_permute:1", "at least 2 cells"),
    ("rescale:0.5", "not invertible and changes the noise's statistics"),
])  # fmt: skip
def test_bad_names_say_what_is_wanted(text, message):
    with pytest.raises(ValueError, match=message):
        parse_view(text)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=re.escape("view 'patch_permute:16' needs sides divisible by 16 (16, 32, 48...), got 8 x 8. Use a size")
    ):
        parse_view("patch_permute:16")(noise(8))
    with pytest.raises(ValueError, match=re.escape("it needs a square, got 4 x 6 (latents)")):
        D4[1].check(4, 6, " (latents)")
    wide = noise(6)[..., :4, :]
    assert torch.equal(D4[2].inverse(D4[2](wide)), wide)
    assert torch.equal(patch_permute(2).inverse(patch_permute(2)(wide)), wide)


@pytest.mark.parametrize(("arguments", "message"), [
    ((2, (0, 1, 2, 2), (0,) * 4), "each of the 4 cells once"),
    ((2, (0, 1, 2, 3), (0,)), "turns must be 4 numbers"),
    ((1, (0,), (8,)), "from 0 to 7"),
    ((1, (0,), (0,), 2), "sign must be 1 or -1"),
])  # fmt: skip
def test_a_view_that_is_no_permutation_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        View("bad", *arguments)


def test_rescale_wants_whole_sides():
    assert Rescale(0.5, 0.75)(noise(8)).shape == (2, 3, 4, 6)
    torch.testing.assert_close(Rescale(0.5, 0.5)(torch.ones(1, 1, 8, 8)), torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="wanted whole sides"):
        Rescale(0.5, 0.5)(noise(7))


@given(st.integers(2, 64), st.sampled_from((0.25, 0.5, 0.9)), st.booleans(), st.integers(0, 9))
def test_drawn_rescale_keeps_latent_and_picture_whole(side, smallest, anisotropic, seed):
    generator = torch.Generator().manual_seed(seed)
    if smallest * side > side - 1:
        with pytest.raises(ValueError, match="use larger pictures"):
            draw_rescale(generator, side, smallest)
        return
    drawn = draw_rescale(generator, side, smallest, anisotropic)
    for factor in (drawn.height, drawn.width):
        assert smallest <= factor < 1 and abs(factor * side - round(factor * side)) < 1e-9
    assert anisotropic or drawn.height == drawn.width
    latent, picture = drawn(torch.zeros(1, 1, side, side)), drawn(torch.zeros(1, 1, 2 * side, 2 * side))
    assert picture.shape[-2:] == (2 * latent.shape[-2], 2 * latent.shape[-1])


@pytest.mark.parametrize("group", GROUPS)
def test_transforms_are_drawn_by_the_generator_from_all_of_the_group(group):
    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return [draw_transform(generator, group, **options) for _ in range(100)]

    everything = {"permute_prob": 0.5, "permute_cells": (2, 3), "negate_prob": 0.5}
    assert draw(1, **everything) == draw(1, **everything) != draw(2, **everything)
    assert {t.view.cells for t in draw(1, **everything)} == {1, 2, 3}
    assert {t.view.sign for t in draw(1, **everything)} == {1, -1}
    assert {t.view.turns[0] for t in draw(1)} == set(GROUPS[group])
    patches, turned = (
        [draw_transform(torch.Generator().manual_seed(seed), group, **everything, **more).view for seed in range(60)]
        for more in ({}, {"patch_turn_prob": 1.0, "patch_turn_cells": (2, 3)})
    )
    assert [v.source for v in patches] == [v.source for v in turned]  # one draw more, after the others
    assert {element for v in turned for element in v.turns} == set(GROUPS[group])
    assert all(len(set(v.turns)) == 1 for v in patches)


def test_transform_each_equals_the_loop():
    x = noise(8)
    half = Rescale(0.5, 0.5)
    transforms = [Transform(D4[1], half), Transform(patch_permute(2), half)]
    torch.testing.assert_close(transform_each(transforms, x), torch.cat([t(x[i : i + 1]) for i, t in enumerate(transforms)]))
    assert torch.equal(transform_each([Transform(), Transform(D4[2])], x), torch.stack([x[0], D4[2](x[1])]))
    with pytest.raises(ValueError, match="share their rescaling"):
        transform_each([Transform(IDENTITY, half), Transform()], x)
