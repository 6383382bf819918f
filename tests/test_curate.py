"""The shapes world: determinism, exactness of targets, wordings."""
from dataclasses import replace

import numpy as np
import pytest

import curate as C


def scenes(n, **how):
    return [C.draw_scene(i, **how) for i in range(n)]


def psnr(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2) + 1e-12)


def shrink(x, k):
    """Mean over k x k blocks of (F, H, W, 3)."""
    f, h, w, c = x.shape
    return x.reshape(f, h // k, k, w // k, k, c).mean((2, 4))


def scene_with(kind="plain", domain="synthetic", n_objects=2):
    return next(s for s in scenes(400, domain=domain)
                if s.background.kind == kind and len(s.objects) == n_objects and not s.post)


# ---- scenes and rendering

@pytest.mark.parametrize("domain", ["synthetic", "real"])
def test_the_same_arguments_give_the_same_scene_edit_and_pixels(domain):
    for i in range(4):
        a, b = C.draw_scene(i, domain), C.draw_scene(i, domain)
        assert a == b and C.propose_edit(a, 7) == C.propose_edit(b, 7)
        edit = C.propose_edit(a, 7)
        np.testing.assert_array_equal(C.render(edit.target, 2), C.render(edit.target, 2))


def test_seed_domain_and_split_each_change_the_scene():
    a = C.draw_scene(5)
    for other in (C.draw_scene(6), C.draw_scene(5, "real"), C.draw_scene(5, split="held")):
        assert other.background != a.background


def test_frames_have_the_promised_shape_type_and_range():
    for s in scenes(8, domain="real"):
        x = C.render(s, 2, 48, 80)
        assert x.shape == (2, 48, 80, 3) and x.dtype == np.float32 and 0 <= x.min() and x.max() <= 1


def test_a_scene_at_three_times_the_size_is_the_same_picture():
    values = [psnr(shrink(C.render(s, 1, 288, 288), 3), C.render(s, 1, 96, 96)) for s in scenes(60)]
    assert min(values) > 26 and np.median(values) > 36, (min(values), np.median(values))


def test_frame_i_is_the_picture_at_its_own_time():
    s = scene_with("photo", "real")
    np.testing.assert_array_equal(C.render(s, 4, fps=8.0)[3:], C.render(s, 1, t0=3 / 8))


def test_circles_stay_round_at_any_aspect():
    s = replace(scene_with("plain"), camera=C.Camera(), background=C.Background("plain", "", ((0, 0, 0),)),
                objects=(C.Shape("circle", "white", (1, 1, 1), .5, .5, .2),))
    covered = C.render(s, 1, 64, 160)[0, :, :, 0] > .5
    assert abs(covered.any(1).sum() - covered.any(0).sum()) <= 1


def test_objects_of_a_scene_differ_in_kind_and_in_colour():
    for s in scenes(300) + scenes(300, split="held"):
        for field in ("kind", "colour"):
            names = [getattr(o, field) for o in s.objects]
            assert len(set(names)) == len(names)


def test_a_third_of_the_scenes_looks_natural_and_some_hold_no_object():
    drawn = scenes(1000)
    natural = np.mean([s.background.kind not in C.PAINT for s in drawn])
    empty = np.mean([not s.objects for s in drawn])
    assert .28 < natural < .45 and .11 < empty < .19, (natural, empty)


def test_only_the_real_domain_is_degraded():
    assert all(s.degrade is None and not s.clutter and not s.camera.shake for s in scenes(50))
    assert all(s.degrade and s.clutter and s.camera.shake for s in scenes(50, domain="real"))


# ---- edits

@pytest.mark.parametrize("task", C.TASKS)
def test_every_task_can_be_proposed_and_changes_the_picture(task):
    done = 0
    for s in scenes(30):
        if task in C.possible_tasks(s):
            edit = C.propose_edit(s, 1, task)
            assert edit.task == task and edit.target != s
            assert np.abs(C.render(edit.target) - C.render(s)).max() > .03, edit.instruction
            done += 1
    assert done >= 8


def test_without_a_task_all_tasks_turn_up():
    assert {C.propose_edit(s, 3).task for s in scenes(200)} == set(C.TASKS)


def test_a_task_that_does_not_fit_is_refused_by_name():
    empty = next(s for s in scenes(100) if not s.objects)
    with pytest.raises(ValueError, match="removal"):
        C.propose_edit(empty, 0, "removal")


def test_local_edits_change_pixels_only_near_the_object():
    for s in scenes(120):
        for task in ("removal", "texture", "object"):
            if task not in C.possible_tasks(s):
                continue
            edit = C.propose_edit(s, 2, task)
            touched = [o for o in s.objects if o not in edit.target.objects]
            assert len(touched) == 1
            o, t = touched[0], 0.5
            change = np.abs(C.render(edit.target, 1, t0=t) - C.render(s, 1, t0=t)).max((0, 3)) > 1e-4
            x, y = C._position(o, t, 1.0)
            px, py, zoom = C._view(s.camera, t)
            yy, xx = (np.indices((96, 96)) + .5) / 96
            away = np.hypot(xx - (.5 + (x - .5) * zoom - px), yy - (.5 + (y - .5) * zoom - py))
            assert not change[away > 1.75 * o.radius * zoom + .02].any(), edit.instruction


def test_an_added_object_stands_still_at_its_place():
    for s in scenes(60):
        if "addition" in C.possible_tasks(s):
            edit = C.propose_edit(s, 4, "addition")
            new = edit.target.objects[-1]
            place = next(p for p, uv in C.PLACES.items() if uv == (new.u, new.v))
            text = edit.instruction.lower().replace("grey", "gray")
            assert f"the {place}" in text and f"{new.colour} {new.kind}" in text
            assert edit.deterministic and new.screen and C._position(new, 9.0, 1.0) == (new.u, new.v)


def test_removal_is_deterministic_only_over_backgrounds_that_can_be_known():
    assert C.propose_edit(scene_with("stripes"), 0, "removal").deterministic
    assert not C.propose_edit(scene_with("photo"), 0, "removal").deterministic


def test_a_deterministic_background_does_not_depend_on_chance():
    seen = {}
    for s in scenes(400):
        edit = C.propose_edit(s, 5, "background")
        if edit.deterministic:
            bg = edit.target.background
            assert seen.setdefault(bg.name, bg) == bg
    assert len(seen) > 40


def test_a_reference_names_exactly_one_object():
    for s in scenes(300):
        if len(s.objects) > 1:
            text = C.words_of(C.propose_edit(s, 6, "removal").instruction.replace("grey", "gray"))
            fits = [o for o in s.objects if (o.kind in text or not set(C.KINDS) & set(text)) and
                    (o.colour in text or not set(C.COLOURS) & set(text))]
            assert len(fits) == 1, text


# ---- effects and styles

@pytest.mark.parametrize("domain", ["synthetic", "real"])
def test_the_target_of_an_effect_or_style_is_the_operation_on_the_source_frames(domain):
    names = set()
    for s in scenes(150, domain=domain):
        edit = C.propose_edit(s, 8, ("effect", "style")[s.seed % 2])
        (name, seed), = edit.target.post
        if name in names:
            continue
        names.add(name)
        operation = C.EFFECTS.get(name) or C.STYLES[name]
        x = C.render(s, 2, 64, 96, t0=.25)
        np.testing.assert_allclose(C.render(edit.target, 2, 64, 96, t0=.25),
                                   operation(x, .25 + np.arange(2) / 8, seed), atol=1e-6)
        assert edit.is_global and edit.deterministic == (name not in C.RANDOM_EFFECTS)
    assert names == set(C.EFFECTS) | set(C.STYLES)


def test_known_pixels_come_out_as_the_formulas_say():
    x = np.array((.2, .4, .8), np.float32).reshape(1, 1, 1, 3)
    t = np.zeros(1)
    np.testing.assert_allclose(C.grayscale(x, t, 0).ravel(), [.3858] * 3, atol=1e-6)
    np.testing.assert_allclose(C.sepia(x, t, 0).ravel(), [.5374, .4786, .3728], atol=1e-6)
    np.testing.assert_allclose(C.night(x, t, 0).ravel(), [.056, .136, .416], atol=1e-6)
    np.testing.assert_allclose(C.invert(x, t, 0).ravel(), [.8, .6, .2], atol=1e-6)


@pytest.mark.parametrize("name", list(C.EFFECTS) + list(C.STYLES))
def test_effects_keep_range_and_look_alike_at_two_sizes(name):
    operation, t = C.EFFECTS.get(name) or C.STYLES[name], np.array([.3])
    big = C.render(scene_with("plain"), 1, 288, 384)
    a, b = shrink(operation(big, t, 3), 3), operation(shrink(big, 3), t, 3)
    assert a.shape == b.shape and b.dtype == np.float32 and 0 <= b.min() and b.max() <= 1
    assert psnr(a, b) > (27 if name == "rain" else 36), psnr(a, b)     # streaks are at least a pixel


def test_pixel_art_is_24_rows_of_flat_square_blocks():
    x = C.pixel_art(C.render(scene_with("photo"), 1, 96, 96), np.zeros(1), 0)
    np.testing.assert_array_equal(np.repeat(np.repeat(x[:, ::4, ::4], 4, 1), 4, 2), x)


@pytest.mark.parametrize("name", C.RANDOM_EFFECTS)
def test_snow_and_rain_move_with_time_and_follow_their_seed(name):
    x = np.full((3, 96, 96, 3), .3, np.float32)
    a = C.EFFECTS[name](x, np.arange(3) / 8, 1)
    np.testing.assert_array_equal(a, C.EFFECTS[name](x, np.arange(3) / 8, 1))
    # A clip can be cut anywhere.
    np.testing.assert_array_equal(a[2:], C.EFFECTS[name](x[2:], np.array([.25]), 1))
    assert np.abs(a[0] - a[1]).max() > .2 and np.abs(a - C.EFFECTS[name](x, np.arange(3) / 8, 2)).max() > .2


# ---- captions and wordings

def test_held_out_pairs_never_enter_training_and_do_enter_the_held_split():
    def pairs(split):
        found = []
        for s in scenes(600, split=split):
            found += [s.objects, C.propose_edit(s, 1, split=split).target.objects]
            if s.objects:
                found += [C.propose_edit(s, 2, t, split).target.objects for t in ("object", "multiple")]
        return [C.is_held_out(o.kind, o.colour) for objects in found for o in objects]
    assert not any(pairs("train"))
    assert np.mean(pairs("held")) > .2
    assert .08 < np.mean([C.is_held_out(k, c) for k in C.KINDS for c in C.COLOURS]) < .2


def test_held_out_wordings_are_no_training_wordings_but_use_their_words():
    train_words = {w for train, _ in C.WORDINGS.values() for t in train for w in C.words_of(t)}
    for name, (train, held) in C.WORDINGS.items():
        assert len(train) >= 6 and len(held) >= 2 and not set(train) & set(held), name
        assert {w for t in held for w in C.words_of(t)} <= train_words, name
    said = {C.propose_edit(s, k).instruction.lower().strip(".") for s in scenes(700) for k in range(3)}
    held = {C.propose_edit(s, k, t, "held").instruction.lower().strip(".")
            for s in scenes(150, split="held") for k in range(3) for t in ("effect", "style")}
    assert not said & held


def test_every_effect_style_and_texture_has_wordings_and_a_caption():
    assert set(C.EFFECTS) | set(C.STYLES) <= set(C.WORDINGS)
    assert set(C.EFFECTS) | set(C.STYLES) == set(C.POST_CAPTION)
    for name in ("grayscale", "sepia", "night"):
        assert f"make {{it}} {name}" in C.WORDINGS[name][0]
    assert "make it snow" in C.WORDINGS["snow"][0]


@pytest.mark.parametrize("split", ["train", "held"])
def test_known_words_cover_every_text(split):
    known, texts = set(C.known_words()), C.all_texts(3000, 1, split)
    assert len(texts) == 3000 and not {w for t in texts for w in C.words_of(t)} - known
    assert all("{" not in t and len(t.split()) <= 32 for t in texts)


def test_the_examples_are_understood():
    assert {w for t in C.examples() for w in C.words_of(t)} <= set(C.known_words())
