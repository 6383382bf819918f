"""Curation: what a kill leaves, ranks, refusals, candidates and filter, every step, readers and their odd
files, pages."""
import io
import json
import math
import multiprocessing
import os
import shutil
from functools import lru_cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import curate as C
import metrics
import world
from model import UserError, VideoEditor, to_u8, to_video
from sample import read_video, write_video

GOLDENS = Path(__file__).parent / "goldens"
COG, LLAVA = GOLDENS / "CogVideoX-5b-I2V", GOLDENS / "llava-onevision-qwen2-0.5b-ov-hf"
# random networks pass no threshold
OPEN = ["--min", *(f"{name}=-inf" for name in C.THRESHOLDS["tiny"])]
SNOW = {"instruction": "make it snow", "source_caption": "a street", "target_caption": "a street in the snow"}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A repository of random networks that works at 32 pixels and brings its own scorers, as the embedded one
    does."""
    folder = tmp_path_factory.mktemp("hub")
    for part in (GOLDENS / "instruct-pix2pix").iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    (folder / "clip").symlink_to(GOLDENS / "clip-vit-large-patch14")
    (folder / "viclip").symlink_to(GOLDENS / "ViCLIP")
    (folder / "model_index.json").write_text(json.dumps({"instructvedit": {"size": 32}}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def load_editors_once():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(C.VideoEditor, "from_pretrained", lru_cache(VideoEditor.from_pretrained))
        yield


@pytest.fixture(scope="session")
def editor(hub):
    return VideoEditor.from_pretrained(hub, device="cpu")


def curate(*flags):
    C.main([str(flag) for flag in flags])


def images(hub, to, *more, n=3):
    curate("images", "--weights", hub, "--to", to, "--n", n, "--candidates", 3, "--steps", 2, "--batch", 2,
           *OPEN, *more)


def videos(hub, made, clips, to, *more):
    curate("videos", "--weights", hub, "--images", made, "--clips", clips, "--to", to, "--candidates", 1,
           "--limit", 1, *more)


@pytest.fixture(scope="session")
def made(hub, tmp_path_factory):
    """A finished data set of three images."""
    to = tmp_path_factory.mktemp("data") / "images"
    images(hub, to)
    return to


@pytest.fixture(scope="session")
def moved(made):
    curate("clips", "--images", made, "--to", made.parent / "clips")
    return made.parent / "clips"


def contents(folder):
    """{name: bytes} of a data set."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()
            and ".part" not in p.parts}


def picture(seed=0, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def moving(n, seed, height=32, width=48):
    """n frames of a texture sliding by a pixel per frame."""
    blocks = np.random.default_rng(seed).integers(0, 255, (8, 40, 3), dtype=np.uint8)
    wide = np.kron(blocks, np.ones((4, 4, 1), np.uint8))
    return [wide[:height, i:i + width] for i in range(n)]


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- candidates and filter -------------------------------------------------------------------------------

def test_guidance_covers_the_papers_ranges_and_starts_with_the_checkpoints_own(editor):
    rows = C.draw_candidates(editor, "abc", 400, "images 0")
    s_txt, s_src = zip(*(row["guidance"] for row in rows))
    assert (s_txt[0], s_src[0]) == editor.guidance == (7.5, 1.5)
    assert 5 <= min(s_txt) < 5.2 and 12.3 < max(s_txt) <= 12.5
    assert 1.2 <= min(s_src) < 1.22 and 1.98 < max(s_src) <= 2
    seeds = [row["seed"] for row in rows]
    again = C.draw_candidates(editor, "abc", 5, "images 0")
    assert len(set(seeds)) == 400 and [row["seed"] for row in again] == seeds[:5]
    for name, stage in (("abd", "images 0"), ("abc", "images 1"), ("abc", "videos 0")):
        assert C.draw_candidates(editor, name, 1, stage)[0]["seed"] != seeds[0]
    first = {"seed": 5, "guidance": [2, 3]}
    rows = C.draw_candidates(editor, "abc", 2, "videos 0", first)
    assert rows[0] == first and rows[1]["seed"] == 5 and rows[1]["guidance"] != [2, 3]


def chosen(values, thresholds=None, weights=None, task="", **how):
    """[(below, kept)] of candidates with scores a and b."""
    rows = [{"scores": {"a": a, "b": b}} for a, b in values]
    C.choose(rows, C.Filter(thresholds or {}, weights or {"b": 1}, **how), SNOW | {"task": task})
    return [(row["below"], row["kept"]) for row in rows]


def test_thresholds_come_before_the_total_and_without_a_filter_the_first_is_kept():
    rows = (.9, .1), (.5, .5), (.6, .6), (math.nan, 1)
    assert chosen(rows, {"a": .4, "b": .2, "c": 1}) == [(["b"], False), ([], False), ([], True),
                                                        (["a"], False)]
    assert chosen(rows, {"total": 9}) == [(["total"], False)] * 4
    assert [kept for _, kept in chosen(rows, {"total": 9}, on=False)] == [True, False, False, False]
    with pytest.raises(UserError, match="dinov2: not among the scores of this run, which are a, b"):
        chosen(rows, asked=("dinov2", "a"))
    assert chosen(rows, asked=("dinov2",), on=False)[0][1]


def test_a_calibrated_total_counts_in_its_own_units_and_by_task():
    fitted = {"weights": {"a": 1}, "centre": {"a": .1, "b": 0}, "spread": {"a": .1, "b": 1},
              "tasks": {"style": -2.}}
    assert chosen([(.1, 0), (.3, 0)], {"total": 1.5}, **fitted) == [(["total"], False), ([], True)]
    assert chosen([(.1, 0), (.3, 0)], {"total": 1.5}, task="style", **fitted)[1] == (["total"], False)


def test_candidates_agree_where_their_changes_point_the_same_way():
    z_src, z = torch.randn(1, 1, 2, 4, 4), torch.zeros(3, 1, 2, 4, 4)
    # two paint the first channel, one the second
    z[:2, :, 0], z[2, :, 1] = 1, 1
    found = C.consensus_scores(z_src + z, z_src)
    np.testing.assert_allclose(found["consensus"], [.5 ** .5, .5 ** .5, 0], atol=1e-6)
    # squared: 0 and 1, 0 and 1, 1 and 1
    np.testing.assert_allclose(found["certainty"], [3.01, 3.01, 0], atol=.01)
    assert C.consensus_scores(z[:1], z_src) == {}


def test_the_true_edit_is_judged_a_success_and_the_untouched_source_is_not(editor):
    scene = world.draw_scene(60_000_000)
    edit = next(e for e in (world.propose_edit(scene, k) for k in range(99)) if e.deterministic
                and not e.is_global)
    source, truth = (world.quantise(world.render(s, 4, 32, 32, C.FPS, 0)) for s in (scene, edit.target))
    rows = [{"scores": {"ssim": 1.0}} for _ in range(2)]
    tools = SimpleNamespace(ed=editor, filter=C.Filter({}, {"ssim": 1}))
    mask, z_src = world.true_region(source, truth, False), editor.encode(to_video(source))
    C.judge(tools, SNOW | {"task": ""}, source, z_src, torch.zeros(2, 4, 4, 4, 4), rows, [truth, source],
            (truth, mask))
    assert rows[0]["truth"]["success"] == 1 and rows[0]["truth"]["gain"] > 10
    assert rows[1]["truth"] == {"gain": 0, "outside": 100, "success": 0}


# ---- the data set on disk --------------------------------------------------------------------------------

def test_every_candidate_has_a_row_and_every_kept_image_the_trajectory_of_its_edit(made, editor):
    rows = C.read_rows(made)
    assert [row["order"] for row in rows] == [[k // 3] for k in range(9)] and len(C.read_rows(made,
                                                                                              kept=True)) == 3
    for row in rows:
        assert row.keys() >= {*C.SOURCE, "candidate", "seed", "guidance", "scores", "total", "kept", "below"}
    row = next(row for row in rows if row["kept"])
    path = load_file(made / row["id"] / "trajectory.safetensors")["trajectory"]
    source, target = (np.array(Image.open(made / row["id"] / f"{name}.png")) for name in ("source", "target"))
    noise = editor.noise(1, 4, 4, row["seed"])
    _, want = editor.anchor(editor.encode(to_video(source[None])), row["instruction"], noise, 2,
                            *row["guidance"])
    torch.testing.assert_close(path.float(), torch.cat(want)[:, 0], atol=5e-3, rtol=5e-3)
    assert np.abs(to_u8(editor.decode(want[-1]))[0].astype(int) - target).max() <= 2


@pytest.mark.parametrize("where, call", [("os.replace", 2), ("curate.write_json", 2),
                                         ("curate.save_tensors", 3)])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(hub, made, tmp_path, monkeypatch, where, call):
    module, name = {"os": os, "curate": C}[where.split(".")[0]], where.split(".")[1]
    real, calls = getattr(module, name), []

    def kill(path, *rest):
        if ".part" in str(path) and Path(path).name in (*ids, "candidates.json", "trajectory.safetensors"):
            calls.append(path)
            if len(calls) == call:
                raise SystemExit(137)
        return real(path, *rest)

    ids = {row["id"] for row in C.read_rows(made)}
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(module, name, kill)
        images(hub, tmp_path / "x")
    assert 0 < len(list((tmp_path / "x").glob("*/candidates.json"))) < 3
    images(hub, tmp_path / "x", "--limit", 1)
    images(hub, tmp_path / "x")
    assert contents(tmp_path / "x") == contents(made)


def rank(k, hub, to):
    os.environ |= {"RANK": str(k), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    images(hub, to)


def test_two_ranks_at_once_make_the_same_data_set_as_one_process(hub, made, tmp_path):
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank, args=(k, hub, tmp_path / "x")) for k in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0] and contents(tmp_path / "x") == contents(made)


def test_other_settings_are_refused_by_name_until_told_and_more_sources_are_not(hub, made, tmp_path):
    shutil.copytree(made, tmp_path / "x")
    with pytest.raises(UserError, match="seed 0 .now 5."):
        images(hub, tmp_path / "x", "--seed", 5)
    images(hub, tmp_path / "x", "--seed", 5, "--force", "--limit", 1)
    assert len(C.read_rows(tmp_path / "x")) == 12


def test_filters_that_keep_nothing_say_which_threshold_removed_how_many(hub, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError,
                       match="none of its 6 candidates was kept: ssim removed 6 of 6 .*lower a") as error:
        images(hub, tmp_path / "x", "ssim=2", n=2)
    assert "\n" not in str(error.value) and not list((tmp_path / "x").rglob("trajectory.safetensors"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    # has nothing to say before the others are done
    monkeypatch.setenv("RANK", "0")
    images(hub, tmp_path / "y", "ssim=2", n=2)
    assert "0 of 1 sources kept" in capsys.readouterr().out


def test_what_cannot_be_read_is_said_left_out_and_tried_again(hub, tmp_path, capsys):
    save(tmp_path / "good.png", picture())
    save(tmp_path / "wide.png", picture(0, 20, 100))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    jsonl(tmp_path / "a.jsonl", *(SNOW | {"source": name} for name in ("bad.png", "wide.png", "good.png")),
          SNOW | {"source": "good.png", "instruction": " "}, SNOW | {"source": "good.png"})
    for limit in ([], ["--limit", 1]):
        images(hub, tmp_path / "x", "--from", tmp_path, *limit, n=9)
        said = capsys.readouterr().out
        assert "left out: " in said and "bad.png" in said and "100x20: sides of over 3 to 1" in said
        assert "2 of 5 sources left out: there twice, or without an instruction" in said
        assert "1 of 1 sources kept" in said
    assert Image.open(next((tmp_path / "x").glob("*/source.png"))).size == (48, 32)        # 56x40, in eights
    save(tmp_path / "bad.png", picture(1))                          # it can be read again
    images(hub, tmp_path / "x", "--from", tmp_path, n=9)
    assert len(C.read_rows(tmp_path / "x")) == 6


def test_where_the_first_sources_cannot_be_read_it_is_the_disk(hub, tmp_path):
    jsonl(tmp_path / "a.jsonl", *(SNOW | {"source": f"{i}.png"} for i in range(30)))
    with pytest.raises(UserError,
                       match="the first 20 sources cannot be read, the last: .*19.png.*is the disk there"):
        images(hub, tmp_path / "x", "--from", tmp_path, n=30)
    with pytest.raises(UserError, match="none of 5 sources can be read"):
        images(hub, tmp_path / "y", "--from", tmp_path, n=5)


def test_a_full_disk_is_said_before_hours_of_work(hub, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(C.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    images(hub, tmp_path / "x", "--limit", 1)
    assert "0.0 GB free, perhaps too few" in capsys.readouterr().out


# ---- stage I ---------------------------------------------------------------------------------------------

def test_a_clip_continues_its_image_and_is_edited_under_its_trajectory(hub, made, moved, tmp_path, editor):
    assert [row["id"] for row in C.read_rows(moved, kept=True)] == [row["id"]
                                                                    for row in C.read_rows(made, kept=True)]
    videos(hub, made, moved, tmp_path / "x", "--candidates", 2, *OPEN)
    # the first candidate has the image's own seed and guidance
    rows = C.read_rows(tmp_path / "x")
    image = next(row for row in C.read_rows(made, kept=True) if row["id"] == rows[0]["id"])
    assert rows[0]["guidance"] == image["guidance"] != rows[1]["guidance"]
    assert rows[1]["seed"] == image["seed"]
    assert rows[0]["scores"].keys() >= {"viclip_out", "viclip_dir", "clip_frame", "clip_text",
                                        "clip_text_gain", "consensus"}
    assert rows[0]["origin"] == image["origin"] | {"image": image["id"]}
    [row] = [row for row in rows if row["kept"]]
    z = load_file(tmp_path / "x" / row["id"] / "latents.safetensors")
    source = editor.encode(to_video(world.drawn_clip(image["origin"], 16, 32)))
    torch.testing.assert_close(z["source"][None].float(), source, atol=2e-2, rtol=2e-2)
    path = list(load_file(made / row["id"] / "trajectory.safetensors")["trajectory"].float()[:, None, None])
    z0 = editor.sample(source, row["instruction"], path[0].expand(1, 16, -1, -1, -1), 2, *row["guidance"],
                       "ffg",
                       anchor=(source[:, :1], path))
    torch.testing.assert_close(z["target"][None].float() * editor.vae.scaling_factor, z0, atol=2e-2,
                               rtol=2e-2)
    assert read_video(tmp_path / "x" / row["id"] / "target.mp4")[0].shape == (1, 16, 3, 32, 32)


def test_per_frame_editing_without_a_filter_and_a_judge_that_filters(hub, made, moved, tmp_path):
    videos(hub, made, moved, tmp_path / "x", "--mode", "image", "--no-filter")
    [row] = C.read_rows(tmp_path / "x")
    assert row["kept"]
    with pytest.raises(UserError, match="mode"):
        videos(hub, made, moved, tmp_path / "x", "--no-filter")
    videos(hub, made, moved, tmp_path / "y", "--mode", "image", "--judge", LLAVA, *OPEN, "judge_clean=1.1",
           "judge_follows=-inf",
           "judge_preserves=-inf")
    [row] = C.read_rows(tmp_path / "y")
    assert not row["kept"] and row["below"] == ["judge_clean"] and all(0 < row["scores"][key] < 1
                                                                       for key in metrics.JUDGED)


def test_the_camera_moves_any_image_and_the_world_drawn_scenes_of_its_own_only(hub, made, tmp_path):
    image = np.broadcast_to(np.linspace(50, 200, 56, dtype=np.uint8)[None, :, None], (40, 56, 3))
    video = C.move("camera", {"id": "x"}, image)
    assert video.shape == (16, *image.shape) and np.array_equal(video[0], image)
    assert video.min() >= 48 and video.max() <= 202 and np.abs(video[-1].astype(int) - image).max() > 5
    curate("clips", "--images", made, "--to", tmp_path / "clips", "--animate", "camera", "--limit", 1)
    videos(hub, made, tmp_path / "clips", tmp_path / "x", "--no-filter", "--motion", "none")
    [row] = C.read_rows(tmp_path / "x")
    assert "truth" not in row                                       # the scene's true edit is not this clip's
    shutil.copytree(made, tmp_path / "images")
    for path in (tmp_path / "images").glob("*/source.png"):
        save(path, 255 - np.array(Image.open(path)))
    with pytest.raises(UserError,
                       match="the drawn world has changed since this image was made; curate"):
        curate("clips", "--images", tmp_path / "images", "--to", tmp_path / "y")
    for path in (tmp_path / "images").glob("*/candidates.json"):
        path.write_text(path.read_text().replace('"scene"', '"picture"'))
    with pytest.raises(UserError, match="--animate world: is no drawn scene"):
        curate("clips", "--images", tmp_path / "images", "--to", tmp_path / "z", "--animate", "world")


class Teacher:
    """CogVideoX with its jobs, but a pan over the image instead of 20 GB of weights; one clip begins with
    another picture."""
    def __init__(self, odd):
        self.odd, self.groups = odd, []

    def clips(self, jobs, steps):
        self.groups.append([seed for _, _, seed in jobs])
        for image, caption, seed in jobs:
            assert image.shape == (3, 32, 32) and caption and steps == 3
            image = -image if len(self.groups) == self.odd else image
            yield torch.stack([image.roll(k // 4, -1) * (1 if k < 32 else 0.5) for k in range(49)])


def test_cogvideox_makes_three_clips_of_an_image_that_are_edited_one_by_one(hub, made, tmp_path, editor,
                                                                            monkeypatch):
    def animate(*more, odd=0):
        teacher = Teacher(odd)
        monkeypatch.setattr(C.CogVideoX, "from_pretrained", lambda *args, **how: teacher)
        curate("clips", "--images", made, "--to", tmp_path / "clips", "--animate", "cogvideox",
               "--cogvideox-steps", 3, *more)
        return teacher.groups
    monkeypatch.setattr(C, "TEACHER_GROUP", 2)
    with pytest.raises(SystemExit), monkeypatch.context() as m:
        real, calls = os.replace, []

        def stop(old, new):                     # a kill between the two clips of the first group
            calls.append(new.parent == tmp_path / "clips" and ".part" in str(old))
            return exit(137) if calls[-1] and sum(calls) == 3 else real(old, new)
        m.setattr(C.os, "replace", stop)
        animate()
    assert len(list((tmp_path / "clips").glob("*/candidates.json"))) == 1
    assert list(map(len, animate(odd=2))) == [2, 1]                 # a group whole
    first, _, odd = C.read_rows(made, kept=True)
    rows = C.read_rows(tmp_path / "clips")
    assert [row["below"] for row in rows
            if row["origin"]["image"] == odd["id"]] == [["first frame unlike the image"]] * 3
    assert all(row["kept"] for row in rows[:6]) and len(rows) == 9
    videos(hub, made, tmp_path / "clips", tmp_path / "x", "--mode", "image", "--limit", 3, "--no-filter")
    rows = C.read_rows(tmp_path / "x")
    assert [row["origin"]["frames"] for row in rows] == [[0, 16], [16, 32], [32, 48]]
    assert [row["id"] for row in rows] == [first["id"], *(C.ident(first["id"], k) for k in (1, 2))]
    assert [row["order"] for row in rows] == [[0], [0, 1], [0, 2]]
    clip = read_video(tmp_path / "clips" / first["id"] / "source.mp4")[0][:, 32:]
    z = load_file(tmp_path / "x" / rows[2]["id"] / "latents.safetensors")
    torch.testing.assert_close(z["source"][None].float(), editor.encode(clip), atol=2e-2, rtol=2e-2)


def test_clips_of_the_real_teacher_that_do_not_start_with_the_image_are_dropped_and_say_so(made, tmp_path):
    # nonsense of random weights
    with pytest.raises(UserError, match="first frame unlike the image removed 1 of 1"):
        shutil.copytree(made, tmp_path / "images")
        for row in C.read_rows(made, kept=True)[1:]:
            shutil.rmtree(tmp_path / "images" / row["id"])
        curate("clips", "--images", tmp_path / "images", "--to", tmp_path / "x", "--animate", "cogvideox",
               "--cogvideox", COG,
               "--cogvideox-steps", 1)


def test_the_anchor_of_a_later_clip_is_the_images_edit_not_its_own_first_frame(editor):
    torch.manual_seed(1)
    z, z_T, path = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 2, 4, 4, 4), list(torch.randn(3, 1, 1, 4, 4, 4))
    own, image = (editor.sample(z[:, 1:], "make it snow", z_T, 2, 7.5, 1.5, "ffg",
                                anchor=(z[:, k:k + 1], path)) for k in (1, 0))
    assert (own - image).abs().max() > 1e-3


def test_insv2vs_clips_are_scored_and_kept_as_they_are(hub, tmp_path, capsys):
    (tmp_path / "in" / "0001" / "image").mkdir(parents=True)
    prompt = {"input": "a cat", "edit": "make it a dog", "output": "a dog"}
    (tmp_path / "in" / "0001" / "prompt.json").write_text(json.dumps(prompt))
    for seed in (7, 8, 9):
        for i in range(16 if seed != 8 else 9):                     # the second clip is too short
            for k in (0, 1):                                        # the third's target is wider
                x = picture(i + 50 * k, 32, 48 if seed + k == 10 else 32)
                save(tmp_path / "in" / "0001" / "image" / f"{seed}_{k}_{i:04d}.jpg", x)
    curate("pairs", "--weights", hub, "--from", tmp_path / "in", "--to", tmp_path / "x", *OPEN)
    [good] = C.read_rows(tmp_path / "x")
    assert good["kept"] and good["instruction"] == "make it a dog" and good["guidance"] is None
    said = capsys.readouterr().out
    assert "8_0_0009.jpg" in said
    assert "0001/image/9: clips of (16, 32, 32, 3) and (16, 32, 48, 3) in one pair" in said


# ---- stages II and III -----------------------------------------------------------------------------------

def test_cuts_are_found_without_the_help_of_colours_and_a_shot_with_motion_is_one():
    small = [world.quantise(world.render(world.draw_scene(seed, "real"), 12, 64, 64)).reshape(12, 32, 2, 32,
                                                                                              2,
                                                                                              3).mean((2, 4))
             for seed in range(2020, 2032)]
    gray = [x.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8) for x in small]
    assert all(C.find_shots(x) == [(0, 12)] for x in gray)
    found = [(0, 12) in C.find_shots(np.concatenate(pair)) for pair in zip(gray[::2], gray[1::2])]
    assert sum(found) >= 5, found


def test_no_clip_crosses_a_cut_and_static_black_and_short_shots_are_dropped(tmp_path):
    black, still = [np.zeros((32, 48, 3), np.uint8)] * 16, moving(1, 5) * 17
    for i, frame in enumerate(moving(20, 1) + moving(40, 2) + black + moving(9, 3) + still + moving(16, 4)):
        save(tmp_path / "in" / "JPEGImages" / "cat" / f"{5 * i:05d}.jpg", frame)
    curate("cut", "--from", tmp_path / "in", "--to", tmp_path / "x", "--per-video", 3)
    rows = C.read_rows(tmp_path / "x")
    kept = {row["origin"]["frames"][0] for row in rows if row["kept"]}
    assert kept == {0, 36, 102} and {row["origin"]["file"] for row in rows} == {"JPEGImages/cat"}
    assert sorted(name for row in rows for name in row["below"]) == ["beyond --per-video", "black", "short",
                                                                     "static"]


@pytest.mark.parametrize("layout", ["train/JPEGImages", "YouTube-VOS/train/JPEGImages", "."])
def test_frame_folders_of_all_four_sets_and_plain_videos_are_found(made, tmp_path, layout):
    for name in ("b", "a"):
        save(tmp_path / layout / name / "00000001.jpg", picture())
    assert [p.name for _, p in C.find_videos(tmp_path)] == ["a", "b"]
    if layout == ".":
        write_video(tmp_path / "c.mp4", to_video(np.stack(moving(3, 0))), 8)
        shutil.copytree(made, tmp_path / "ours")                    # what curate.py made is no source
        assert [p.name for _, p in C.find_videos(tmp_path)] == ["a", "b", "c.mp4"]


def test_frames_of_a_folder_come_in_the_order_of_their_numbers_and_in_one_size(tmp_path):
    for i in (1, 2, 10):
        save(tmp_path / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    (tmp_path / "._3.png").write_bytes(b"left by a file manager")
    assert [int(rgb[0, 0, 0]) for rgb in C.video_frames(tmp_path)] == [1, 2, 10]
    assert [int(rgb[0, 0, 0]) for rgb in C.video_frames(tmp_path, 1, 1)] == [2]
    save(tmp_path / "11.png", picture())
    with pytest.raises(UserError, match="11.png: 56x40"):
        list(C.video_frames(tmp_path))


def test_real_clips_are_cut_written_and_edited_and_a_broken_or_growing_video_is_told(hub, tmp_path, capsys):
    source = tmp_path / "in"
    for i, frame in enumerate(moving(36, 1)):
        save(source / "a" / f"{i:05d}.png", frame)
    (source / "b.mp4").write_bytes(b"no video")
    (tmp_path / "say.txt").write_text("make it snow\n\nmake it night\n")
    curate("cut", "--from", source, "--to", tmp_path / "cut")
    assert "b.mp4" in capsys.readouterr().out
    write = ["write", "--clips", tmp_path / "cut", "--to", tmp_path / "written", "--writer",
             tmp_path / "say.txt"]
    curate(*write)
    real = ["real", "--weights", hub, "--from", tmp_path / "written", "--to", tmp_path / "x", "--candidates",
            1, "--steps", 1, *OPEN]
    curate(*real, "--limit", 1)
    curate(*real)
    rows = C.read_rows(tmp_path / "x", kept=True)
    assert [row["origin"]["frames"] for row in rows] == [[0, 16], [16, 32]]
    assert {row["instruction"] for row in rows} <= {"make it snow", "make it night"}
    assert load_file(tmp_path / "x" / rows[0]["id"] / "latents.safetensors")["target"].shape == (16, 4, 4, 6)
    save(source / "a" / "00036.png", moving(1, 1)[0])               # it was still being copied
    curate("cut", "--from", source, "--to", tmp_path / "cut")
    assert len(C.read_rows(tmp_path / "cut", kept=True)) == 4
    curate(*write)
    shutil.rmtree(tmp_path / "x")
    curate(*real, "--limit", 1)
    assert "has changed since it was cut" in capsys.readouterr().out
    (tmp_path / "say.txt").write_text("make it rain\n")
    with pytest.raises(UserError, match="writer_file"):
        curate(*write)


def test_the_tiny_writer_says_what_the_drawn_world_could_say_and_effects_have_a_truth(hub, tmp_path):
    curate("cut", "--to", tmp_path / "cut", "--n", 6)
    curate("write", "--clips", tmp_path / "cut", "--to", tmp_path / "written", "--clip", hub / "clip")
    rows, known = C.read_rows(tmp_path / "written", kept=True), set(world.known_words())
    assert len({row["instruction"] for row in rows}) > 3
    assert all(set(world.words_of(row["instruction"])) <= known
               and row["target_caption"] != row["source_caption"] for row in rows)
    for row in rows:
        folder = tmp_path / "written" / row["id"]
        if "operation" in row:
            name, _ = row["operation"]
            assert row["task"] in ("effect", "style") and name in world.OPERATIONS
        elif len(list((tmp_path / "written").iterdir())) > 3:       # fewer to edit
            shutil.rmtree(folder)
    curate("real", "--weights", hub, "--from", tmp_path / "written", "--to", tmp_path / "x", "--candidates",
           1, "--steps", 1, *OPEN)
    rows = {row["id"]: row for row in C.read_rows(tmp_path / "x")}
    for row in C.read_rows(tmp_path / "written"):
        assert ("truth" in rows[row["id"]]) == ("operation" in row)
    assert any("truth" in row for row in rows.values())


class Parrot:
    """A language model with an answer for every clip, or nonsense; it remembers how many it was shown at
    once."""
    def __init__(self, sense=True):
        self.sense, self.groups = sense, []

    def generate(self, visuals, prompts, *rest):
        self.groups.append(len(visuals))
        answers = []
        for x, prompt in zip(visuals, prompts):
            word = C.ident(float(np.mean(x)))
            answers.append(json.dumps({"task": prompt.split('"')[1],
                                       "instruction": f"paint the {word} thing green",
                                       "source_caption": f"a {word} thing",
                                       "target_caption": f"a {word} thing in green"}))
        return answers if self.sense else ["hm"] * len(prompts)


def cut_frames(folder, n):
    for i, frame in enumerate(moving(n, 1)):
        save(folder / "in" / "a" / f"{i:05d}.png", frame)
    curate("cut", "--from", folder / "in", "--to", folder / "cut", "--per-video", 9)


def test_llava_is_asked_in_whole_groups_remembers_and_ends_the_same_after_a_kill(tmp_path, monkeypatch):
    cut_frames(tmp_path, 80)
    monkeypatch.setattr(C, "WRITE_GROUP", 3)

    def write(to, *more, kill=0, sense=True):
        net, replace, calls = Parrot(sense), os.replace, []

        def stop(old, new):
            calls.append(Path(new).parent == to and ".part" in str(old))
            return exit(137) if sum(calls) == kill and calls[-1] else replace(old, new)
        with monkeypatch.context() as m:
            m.setattr(C.LlavaOneVision, "from_pretrained", lambda *args, **how: net)
            m.setattr(C.os, "replace", stop)
            curate("write", "--clips", tmp_path / "cut", "--writer", "llava", "--llava", LLAVA, "--to", to,
                   *more)
        return net.groups

    assert write(tmp_path / "whole") == [3, 2]
    rows = C.read_rows(tmp_path / "whole", kept=True)
    assert len({row["instruction"] for row in rows}) == len(rows) == len({row["task"] for row in rows}) == 5
    with pytest.raises(SystemExit):
        # settings.json first; within the first group
        write(tmp_path / "x", kill=3)
    assert len(list((tmp_path / "x").glob("*/candidates.json"))) == 1
    assert [write(tmp_path / "x", "--limit", 1) for _ in range(3)] == [[3], [2], []]
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match="no instruction removed 5 of 5"):
        write(tmp_path / "y", sense=False)
    assert all(row["why"] for row in C.read_rows(tmp_path / "y"))
    with pytest.raises(UserError, match="task_mix"):
        write(tmp_path / "whole", "--task-mix", "style=1")


def test_llava_itself_writes_though_nonsense(tmp_path):
    cut_frames(tmp_path, 16)
    with pytest.raises(UserError, match="no instruction removed 1 of 1"):
        curate("write", "--clips", tmp_path / "cut", "--writer", "llava", "--llava", LLAVA, "--to",
               tmp_path / "x")


# ---- readers of image pairs ------------------------------------------------------------------------------

def ip2p(folder):
    for name in ("0000000", "0000001"):
        for seed in (11, 12):
            for k in (0, 1):
                save(folder / name / f"{seed}_{k}.jpg", picture(seed + k))
        (folder / name / "prompt.json").write_text(json.dumps({"input": "a", "edit": f"edit {name}",
                                                               "output": "b"}))
    (folder / "seeds.json").write_text(json.dumps([["0000000", ["11", "12"]], ["0000001", [12]]]))


def parquet(path, names=C.PARQUET[0], **columns):
    """Three pairs in the published columns, or others, two a group, uncompressed."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet
    png = io.BytesIO()
    Image.fromarray(picture(1)).save(png, "PNG")
    cell = {"bytes": png.getvalue(), "path": None} if names == C.PARQUET[1] else png.getvalue()
    table = dict(zip(names, ([cell] * 3, [cell] * 3, ["x", "y", "z"], ["s"] * 3, ["t"] * 3)))
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table | columns), path, row_group_size=2, compression="none",
                                use_dictionary=False)
    return pyarrow.parquet.ParquetFile(path).metadata.row_group(0)


def lines(folder):
    save(folder / "a.png", picture(1))
    folder.joinpath("a.jsonl").write_bytes("\ufeff{0}\r\n\r\n{0}\n \n{1}".format(
        json.dumps(SNOW | {"source": "a.png", "target": "a.png"}),
        json.dumps(SNOW | {"source": "a.png", "target": None})).encode())


LAYOUTS = {"folders": ip2p, "UltraEdit": lambda folder: parquet(folder / "a.parquet"),
           "InstructPix2Pix": lambda folder: parquet(folder / "a.parquet", C.PARQUET[1]), "lines": lines}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_of_every_layout_are_read_and_have_ids_of_their_own(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    pairs = list(C.read_pairs(tmp_path))
    # one is there twice
    assert len(pairs) == 3 and len({pair["id"] for pair in pairs}) == (2 if layout == "lines" else 3)
    assert [pair["instruction"] for pair in pairs] == {"folders": ["edit 0000000"] * 2 + ["edit 0000001"],
                                                       "lines": ["make it snow"] * 3}.get(layout,
                                                                                          ["x", "y", "z"])
    assert all(rgb is None or rgb.shape == (40, 56, 3) for pair in pairs for rgb in pair["load"]())
    json.dumps([{k: v for k, v in pair.items() if k != "load"} for pair in pairs])


def test_equal_parquet_files_in_two_folders_are_two_and_a_damaged_page_is_told(tmp_path):
    parquet(tmp_path / "a.parquet")
    plain = [pair["id"] for pair in C.read_pairs(tmp_path)]
    assert plain == [pair["id"] for pair in C.read_pairs(tmp_path / "a.parquet")]
    meta = parquet(tmp_path / "x" / "a.parquet")
    pairs = list(C.read_pairs(tmp_path))
    assert [pair["origin"]["file"] for pair in pairs] == ["a.parquet"] * 3 + ["x/a.parquet"] * 3
    assert [pair["id"] for pair in pairs[:3]] == plain and len({pair["id"] for pair in pairs}) == 6
    for column, match in ((0, "row 0 of group 0"), (2, "a.parquet: ")):
        at = meta.column(column).data_page_offset
        data = bytearray((tmp_path / "x" / "a.parquet").read_bytes())
        data[at:at + 12] = b"\xff" * 12
        (tmp_path / "x" / "a.parquet").write_bytes(data)
        with pytest.raises(UserError, match=match):
            list(C.read_pairs(tmp_path / "x"))[0]["load"]()
    for name, value in (("source_image", ["a", "b", "c"]), ("edited_image", [{"path": "a"}] * 3),
                        ("edit_prompt", [1, 2, 3])):
        parquet(tmp_path / "a.parquet", **{name: value})
        with pytest.raises(UserError, match="a.parquet"):
            list(C.read_pairs(tmp_path / "a.parquet"))[0]["load"]()


ODD = {"missing": ("", "images", "no image pairs there"),
       "two": ("a.jsonl {} b.jsonl {}", "images", "no image pairs there"),
       "empty": ("a.jsonl", "images", "none of its 0 sources has an instruction"),
       "cut": ('a.jsonl {"source":"a', "images", "a.jsonl, line 1: Unterminated"),
       "column": ('a.jsonl {"source":"a"}', "images",
                  "a.jsonl, line 1: needs source, instruction.*; has source"),
       "text": ('a.jsonl {"source":"a","task":3,"instruction":"b","source_caption":"c","target_caption":"d"}',
                "images",
                "a.jsonl, line 1: needs text in task"),
       "seeds": ('seeds.json {"a":1} 7/prompt.json {}', "images",
                 "seeds.json: holds a dict, where a list is needed"),
       "seed": ('seeds.json [["7",["x"]]] 7/prompt.json {}', "images",
                "seeds.json.*needs a folder, its seeds"),
       "prompt": ('7/prompt.json {"input":"a"} 7/3_0.jpg', "images",
                  "7/prompt.json: lacks 'edit'; needs input, edit and output"),
       "prompts": ('7/prompt.json {"input":"a","edit":5,"output":"b"} 7/3_0.jpg', "images",
                   "7/prompt.json: needs text in edit"),
       "videos": ("a.txt", "cut", "--from .*: no videos there"),
       "pairs": ("a.txt", "pairs", "--from .*: no clips there")}


@pytest.mark.parametrize("name", ODD)
def test_odd_sources_are_one_line_that_names_them(hub, tmp_path, name):
    words, command, match = ODD[name]
    files = words.split()
    for file, text in zip(files, files[1:] + [""]):
        if file.endswith((".json", ".jsonl", ".jpg", ".txt")) and not file.startswith(("{", "[")):
            (tmp_path / "in" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / file).write_text(text if text.startswith(("{", "[")) else "")
    with pytest.raises(UserError, match=match) as error:
        curate(command, *(["--weights", hub] if command != "cut" else []), "--from", tmp_path / "in", "--to",
               tmp_path / "x")
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    rng = Random(0)
    for layout in ("folders", "lines", "UltraEdit"):
        folder = tmp_path / layout
        folder.mkdir()
        LAYOUTS[layout](folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        for _ in range(60):
            path = rng.choice(files)
            data = path.read_bytes()
            odd = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(odd))
                odd[at:at + rng.randint(0, 5)] = rng.randbytes(rng.randint(0, 5)) or rng.choice((b"null",
                                                                                                 b'"', b"[",
                                                                                                 b"}",
                                                                                                 b"1e999"))
            path.write_bytes(odd[:rng.choice((len(odd), rng.randrange(len(odd))))])
            try:
                for pair in C.read_pairs(folder):
                    pair["load"]()
            except UserError as error:
                assert "\n" not in str(error), error
            path.write_bytes(data)


BAD = [("images --weights HUB --to T/x --candidates 0", "--candidates.*0: must be at least 1"),
       ("images --weights HUB --to T/x --min ssim", "--min ssim: could not convert.*needs NAME=VALUE"),
       ("images --weights HUB --to T/x --min ssim=nan", "--min ssim=nan: is not a number"),
       ("images --weights HUB --to T/x --n 1 --steps 1 --candidates 1 --min clip_sim_dri=0.2",
        "clip_sim_dri: not among the scores of"),
       ("images --weights HUB --to T/x --min viclip_dir=0.1", "viclip_dir is kept for judging"),
       ("images --weights HUB --to T/x --clip none", "the six scores need CLIP"),
       ("images --weights HUB", "--to"), ("images --weights HUB --to T/x --nope", "--nope"),
       ("images --weights HUB --to T/x --score-weights T/none", "none: No such file"),
       ("images --weights HUB --to T/x --score-weights T/w.json",
        "--score-weights .*w.json: lacks 'weights'"),
       ("images --weights HUB --to T/x --judge T", "--judge"),
       ("images --weights HUB --to T/list", "settings.json: holds a list, where a dict is needed"),
       ("images --weights HUB --to T/x --device abacus", "abacus: this machine has"),
       ("clips --to T/x --images T/none", "none: --images, --clips or --from: holds no <id>/candidates.json"),
       ("clips --to T/x --images MADE --animate cogvideox --cogvideox T/empty", "empty"),
       ("clips --to T/x --images MADE --cogvideox-steps 0", "--cogvideox-steps.*0: must be at least 1"),
       ("videos --weights HUB --to T/x --images MADE", "holds no <id>/candidates.json"),
       ("write --to T/x --clips MADE --writer T/none", "none: No such file"),
       ("write --to T/x --clips MADE --writer T/empty.txt",
        "empty.txt: has an empty instruction, or none; pass tiny, llava"),
       ("write --to T/x --clips MADE --writer llava --llava T/empty", "empty"),
       ("write --to T/x --clips MADE --writer llava --llava LLAVA --task-mix style",
        "--task-mix style: could not convert"),
       ("write --to T/x --clips MADE --writer llava --llava LLAVA --task-mix styling=1",
        "--task-mix .*styling"),
       ("real --weights HUB --to T/x --from T/empty", "empty: .*holds no <id>/candidates.json"),
       ("real --weights HUB --to T/x --round 0", "--round.*0"),
       ("look T/none", "holds no <id>/candidates.json"),
       ("calibrate MADE --ratings T/none", "none: No such file"),
       ("scene T/s --task multiple --seed 71", "--task multiple: does not fit scene 71")]


@pytest.mark.parametrize("command, match", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_that_names_it(hub, made, tmp_path, command, match):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "settings.json").write_text("[]")
    (tmp_path / "w.json").write_text("{}")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=match) as error:
        for name, path in (("HUB", hub), ("MADE", made), ("LLAVA", LLAVA), ("T/", f"{tmp_path}/")):
            command = command.replace(name, str(path))
        curate(*command.split())
    assert "\n" not in str(error.value)


# ---- calibrate, look, scene ------------------------------------------------------------------------------

def ranked(folder, n=40, change=lambda row: row):
    """A data set in which clip_sim_target tells good from bad, ssim says nothing, clip_sim_image misleads a
    little."""
    rng, every = np.random.default_rng(0), []
    for k in range(n):
        rows = []
        for c in range(3):
            gain = rng.normal()
            scores = {"clip_sim_dir": gain + rng.normal() * 3, "clip_sim_target": gain + rng.normal() * .3,
                      "clip_sim_image": -gain + rng.normal() * 2, "ssim": rng.normal()}
            rows.append(change({**SNOW, "id": C.ident(k), "order": [k], "candidate": c, "kept": c == 0,
                                "total": 0.0, "task": "style",
                                "below": [] if c == 0 else ["ssim"], "instruction": "</script><b>x",
                                "scores": scores, "seed": 1,
                                "guidance": [1, 2], "truth": {"gain": gain, "outside": 30,
                                                              "success": float(gain > .5)}}))
        (folder / C.ident(k)).mkdir(parents=True)
        (folder / C.ident(k) / "candidates.json").write_text(json.dumps(rows))
        every += rows
    return every


def table_of(text):
    return {line.split("|")[1].strip(): [float(x) for x in line.split("|")[2:4]]
            for line in text.splitlines()[3:] if line.startswith("|")}


def test_calibration_finds_the_score_that_tells_beats_equal_weights_and_then_filters(hub, tmp_path, capsys):
    rows = ranked(tmp_path / "x", change=lambda row: row | {"total": row["truth"]["gain"]})
    curate("calibrate", tmp_path / "x")
    said = capsys.readouterr().out
    table = table_of(said)
    assert table["fitted"][1] > .9 > table["equal"][1] and table["fitted"][0] > table["equal"][0] + .1
    good = np.array([row["truth"]["success"] for row in rows]).reshape(-1, 3)
    first, best = good[:, 0].mean(), good.max(axis=1).mean()        # the best gain is good where any is
    assert (f"first is good for {first:.0%} of the sources, the one with the best total for {best:.0%}, any for "
            f"{best:.0%}") in said
    file = tmp_path / "x" / "score_weights.json"
    fitted = json.loads(file.read_text())
    assert fitted["weights"]["clip_sim_target"] > 5 * max(fitted["weights"][k]
                                                          for k in ("ssim", "clip_sim_image"))
    assert sum(fitted["weights"].values()) == pytest.approx(1, abs=1e-3) and not fitted["tasks"]
    file.write_text(json.dumps(fitted | {"min_total": 1e9}))
    with pytest.raises(UserError, match="total removed 1 of 1"):
        images(hub, tmp_path / "y", "--score-weights", file, "--candidates", 1, n=1)
    for part, odd in (("weights", {"nothing": 1}), ("spread", dict.fromkeys(fitted["spread"], "x")),
                      ("min_total", None), ("centre", [])):
        file.write_text(json.dumps(fitted | {part: odd}))
        with pytest.raises(UserError,
                           match="--score-weights .*score_weights.json.*pass what curate.py cal"):
            images(hub, tmp_path / "z", "--score-weights", file, n=1)


def test_calibration_by_task_learns_which_edits_seldom_succeed(tmp_path, capsys):
    # every other source is of a task that always fails
    def change(row):
        return row | ({"task": "texture", "truth": row["truth"] | {"success": 0.0}}
                      if row["order"][0] % 2 else {})
    ranked(tmp_path / "x", change=change)
    curate("calibrate", tmp_path / "x", "--by-task", "--to", tmp_path / "w.json")
    table = table_of(capsys.readouterr().out)
    curate("calibrate", tmp_path / "x", "--to", tmp_path / "v.json")
    assert table["fitted"][1] > .95 > table_of(capsys.readouterr().out)["fitted"][1] + .05
    tasks = json.loads((tmp_path / "w.json").read_text())["tasks"]
    assert tasks.keys() == {"style", "texture"} and tasks["style"] - tasks["texture"] > 1


def test_calibration_of_clips_fits_how_much_an_edit_changes_and_never_the_held_out_score(tmp_path):
    assert all(metrics.HELD_OUT not in names for table in (C.IMAGE_WEIGHTS, C.VIDEO_WEIGHTS, C.THRESHOLDS)
               for names in table.values())
    ranked(tmp_path / "x", change=lambda row: row | {"scores": {
        "clip_text": row["scores"]["ssim"], **dict.fromkeys(("changed", "viclip_dir"),
                                                            row["truth"]["gain"])}})
    curate("calibrate", tmp_path / "x")
    weights = json.loads((tmp_path / "x" / "score_weights.json").read_text())["weights"]
    assert weights.keys() == {"clip_text", "changed"} and weights["changed"] > 5 * weights["clip_text"]


def test_ratings_of_the_study_page_calibrate_what_was_kept(tmp_path, capsys):
    rows = ranked(tmp_path / "x")
    answers = {f"{row['id']}/target": {"text": 1 + 4 * row["truth"]["success"],
                                       "quality": 2 + row["truth"]["success"]}
               for row in rows if row["kept"]}

    def rate(file):
        (tmp_path / "v.json").write_text(json.dumps(file))
        curate("calibrate", tmp_path / "x", "--ratings", tmp_path / "v.json")
    rate({"rating": True, "answers": answers})
    assert "40 candidates of 40 sources" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no ratings"):
        rate({"rating": False, "answers": {}})
    with pytest.raises(UserError, match="0 sources with a rating, 0 of 0 candidates good; needs 10"):
        rate({"rating": True, "answers": {}})
    for odd in ({"text": None}, {"text": "5"}, 5, None):
        with pytest.raises(UserError, match="--ratings .*v.json"):
            rate({"rating": True, "answers": answers | {next(iter(answers)): odd}})


def test_auc_is_the_chance_to_rank_a_good_one_higher():
    good = np.array([True, False, True, False])
    assert C.auc(np.array([3, 1, 2, 0.]), good) == 1 and C.auc(np.array([0, 1, 2, 3.]), good) == .25
    assert C.auc(np.zeros(4), good) == .5


def test_the_page_holds_every_source_and_no_text_can_end_its_script(made, moved, tmp_path):
    def page(folder, *more):
        curate("look", folder, "--to", tmp_path / "a.html", *more)
        text = (tmp_path / "a.html").read_text()
        assert text.count("</script>") == 1 and "http" not in text
        return json.loads(text.split("const data = ")[1].split(", $ = id =>")[0])
    ranked(tmp_path / "x", n=12)
    data = page(tmp_path / "x")
    assert len(data["items"]) == 12 and len(data["rows"]) == 36
    assert data["items"][0]["instruction"].startswith("</script>")
    assert len(page(tmp_path / "x", "--limit", 5)["items"]) == 5
    data = page(made)
    assert data["title"] == "images" and all(item["kept"] and item["n"] == 3 for item in data["items"])
    assert all(item["target"].startswith("data:image/png;base64,") for item in data["items"])
    assert all(item["source"].startswith("data:video/mp4;base64,") for item in page(moved)["items"])


def test_a_scene_is_drawn_with_its_true_edit_and_a_tune(tmp_path):
    curate("scene", tmp_path / "new" / "s", "--size", 48, "--seconds", 1, "--sound", "--seed", 68, "--task",
           "effect")
    source, fps = read_video(tmp_path / "new" / "s_source.mp4")[:2]
    assert source.shape[1] == 12 and sorted(p.name for p in (tmp_path / "new").iterdir()) == ["s_source.mp4",
                                                                                              "s_target.mp4"]
    assert (source - read_video(tmp_path / "new" / "s_target.mp4")[0]).abs().mean() > .02
