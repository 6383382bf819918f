"""metrics.py against the reference libraries and against the definitions of the scores.

Goldens: tiny random networks in the published formats with the outputs of transformers 5.23.0 (CLIP, PickScore,
DINOv2), of transformers 4.57.1 (DINOv2 with registers), of ViCLIP's original class and of scikit-image (SSIM), on
a CPU in float32.
"""
import base64
import itertools
import json
import math
import os
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import metrics
import world
from metrics import CLIP, DINOv2, Scorers, ViCLIP
from model import UserError, VideoEditor
from sample import probe, read_frames, write_video

GOLDENS = Path(__file__).parent / "goldens"
CLIP_DIR, PICK_DIR = GOLDENS / "clip-vit-large-patch14", GOLDENS / "PickScore_v1"
DINO_DIR, VICLIP_DIR = GOLDENS / "dinov2-base", GOLDENS / "ViCLIP"
PATHS = {"clip": CLIP_DIR, "pick": PICK_DIR, "viclip": VICLIP_DIR}
pytestmark = pytest.mark.filterwarnings("error:::(metrics|model|sample)$",         # not another library's deprecations
                                        "error::RuntimeWarning:numpy")      # but means of nothing, 0 / 0


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def golden(folder):
    """(expected tensors, absolute tolerances, cases) of one golden folder."""
    tolerance, cases = (json.loads((folder / f).read_text(encoding="utf-8")) if (folder / f).exists() else {}
                        for f in ("tolerance.json", "cases.json"))
    return load_file(folder / "expected.safetensors"), {k: v["atol"] for k, v in tolerance.items()}, cases


def apart(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", [CLIP_DIR, PICK_DIR], ids=lambda p: p.name)
def test_clip_equals_transformers(folder):
    want, atol, cases = golden(folder)
    net = CLIP.from_pretrained(folder)
    images, texts = net.encode_image(want["pixel_values"]), net.encode_text(want["input_ids"])
    assert apart(images, want["image_features"]) <= atol["image_features"]
    assert apart(texts, want["text_features"]) <= atol["text_features"]
    logits = net.logit_scale.exp() * metrics.cosine(images[:, None], texts[None])
    assert apart(logits, want["logits_per_image"]) <= atol["logits_per_image"]
    assert torch.equal(net.tokenizer(cases["captions"]), want["input_ids"])


@pytest.mark.parametrize("folder", [CLIP_DIR, PICK_DIR], ids=lambda p: p.name)
def test_clip_preprocessing_equals_the_published_one_for_every_kind_of_image(folder):
    want, _, _ = golden(folder)
    net, arrays = CLIP.from_pretrained(folder), [want["image_u8"].numpy(), want["image2_u8"].numpy()]
    video = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)[None] / 127.5 - 1  # (1, 2, 3, H, W)
    for images in (arrays, [Image.fromarray(a) for a in arrays], video):
        assert apart(net.preprocess(images), want["pixel_values"]) <= 1e-6


def test_resizing_to_the_published_224_equals_pil_to_the_byte():
    want, _, _ = golden(CLIP_DIR)
    assert np.array_equal(metrics.resize_crop(want["image_u8"].numpy(), 224, 224), want["resized224_u8"].numpy())


@pytest.mark.parametrize("case", ["native", "56x98", "42x42"])
def test_dinov2_equals_transformers_at_every_size(case):
    want, atol, _ = golden(DINO_DIR)
    net = DINOv2.from_pretrained(DINO_DIR)
    tokens = net(want[f"{case}.pixel_values"])
    assert apart(tokens[:, 0], want[f"{case}.class_feature"]) <= atol[f"{case}.class_feature"]
    assert apart(tokens[:, 1:], want[f"{case}.patch_features"]) <= atol[f"{case}.patch_features"]
    assert torch.equal(net.encode_image(want[f"{case}.pixel_values"]), tokens[:, 0])


def test_dinov2_preprocessing_equals_the_published_one():
    want, _, _ = golden(DINO_DIR)
    net = DINOv2.from_pretrained(DINO_DIR)
    assert apart(net.preprocess([want["image_u8"].numpy()]), want["native.pixel_values"]) <= 1e-6


@pytest.mark.parametrize("case", ["70x70", "42x98"])
def test_dinov2_with_registers_equals_transformers(case):
    want, _, _ = golden(GOLDENS / "dinov2-with-registers")
    net = DINOv2.from_pretrained(GOLDENS / "dinov2-with-registers")
    assert apart(net(want[f"{case}.pixel_values"]), want[f"{case}.last_hidden_state"]) <= 2e-5


def test_viclip_equals_the_original_class():
    want, atol, cases = golden(VICLIP_DIR)
    net = ViCLIP.from_pretrained(VICLIP_DIR)
    video, text = net.encode_video(want["video"]), net.encode_text(want["tokens"])
    assert apart(video, want["video_features"]) <= atol["video_features"]
    assert apart(text, want["text_features"]) <= atol["text_features"]
    assert apart(net.encode_video(want["video"][:, :1]), want["single_frame_features"]) <= atol["single_frame_features"]
    assert apart(metrics.cosine(video, text)[None], want["cosine"]) <= atol["cosine"]
    assert torch.equal(net.tokenize(cases["texts"]), want["tokens"])
    plain = [not set(text) & set("ﬁ&“â") for text in cases["token_strings"]]         # OpenAI's also repairs the others
    assert torch.equal(net.tokenize(cases["token_strings"])[plain], want["tokens_tricky"][plain])


def test_viclip_sees_what_opencv_gave_it_to_one_grey_level():
    want, _, _ = golden(VICLIP_DIR)
    got = ViCLIP.from_pretrained(VICLIP_DIR).preprocess(list(want["frames_rgb_u8"].numpy()))
    assert apart(got * ViCLIP.STD[:, None, None], want["video"] * ViCLIP.STD[:, None, None]) <= 1.01 / 255


@pytest.mark.parametrize("name,make", [("clip_vit_l14", CLIP), ("pickscore_h", CLIP), ("dinov2_base", DINOv2),
                                       ("viclip_l", ViCLIP)])
def test_full_size_names_and_shapes_are_the_published_ones(name, make):
    published = json.loads((GOLDENS / f"{name}.json").read_text())
    with torch.device("meta"):
        net = make(published["config"])
    dropped = published.get("drop_on_load", [])
    shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
    assert shapes == {k: v for k, v in published["tensors"].items() if k not in dropped}


@pytest.mark.parametrize("make,folder,file", [(CLIP, CLIP_DIR, "model.safetensors"), (DINOv2, DINO_DIR, "model.safetensors"),
                                              (ViCLIP, VICLIP_DIR, "ViClip-InternVid-10M-FLT.pth")])
def test_a_missing_weight_file_is_named(make, folder, file, tmp_path):
    for f in folder.iterdir():
        if f.name != file:
            (tmp_path / f.name).write_bytes(f.read_bytes())
    with pytest.raises(UserError, match=tmp_path.name):
        make.from_pretrained(tmp_path)


def test_a_fresh_clip_begins_as_openais_and_passes_gradients_to_all_of_it():
    torch.manual_seed(0)
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
                max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                  patch_size=8, hidden_act="quick_gelu")
    net = CLIP(dict(projection_dim=16, text_config=text, vision_config=vision))
    layer = net.vision_model.encoder.layers[0]
    assert layer.self_attn.q_proj.weight.std() == pytest.approx(32 ** -0.5, rel=0.1) and not layer.mlp["fc1"].bias.any()
    assert layer.mlp["fc2"].weight.std() == pytest.approx(128 ** -0.5, rel=0.1)      # (2 * width * layers) ** -0.5
    with torch.enable_grad():
        a, b = net.encode_image(torch.randn(2, 3, 32, 32)), net.encode_text(torch.tensor([[1, 63], [2, 63]]).repeat(1, 38))
        F.cross_entropy(net.logit_scale.exp() * F.normalize(a) @ F.normalize(b).T, torch.arange(2)).backward()
    assert all(p.grad is not None for p in net.parameters())


# ------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------

def test_clip_frame_is_the_mean_over_ordered_pairs_as_tgves_script_writes_it():
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    pairs = [F.cosine_similarity(x[i], x[j], dim=0).item() for i in range(5) for j in range(5) if i != j]
    assert metrics.clip_frame(x) == pytest.approx(sum(pairs) / (5 * 4), abs=1e-6)
    assert metrics.clip_frame(x[:1].expand(4, -1)) == pytest.approx(1, abs=1e-6)
    assert math.isnan(metrics.clip_frame(x[:1]))


def test_clip_text_and_pick_score_are_mean_logits():
    want, atol, _ = golden(PICK_DIR)
    net = CLIP.from_pretrained(PICK_DIR)
    images = net.encode_image(want["pixel_values"])
    for i, text in enumerate(net.encode_text(want["input_ids"])):
        assert metrics.pick_score(images, text, net.logit_scale.item()) == \
            pytest.approx(want["pickscore"][i].mean().item(), abs=atol["pickscore"])
        cosines = want["logits_per_image"][:, i] / net.logit_scale.exp()
        assert metrics.clip_text(images, text) == pytest.approx(100 * cosines.mean().item(), abs=1e-3)


def test_viclip_dir_is_zero_for_an_untouched_clip_one_for_a_change_along_the_text_and_minus_one_against_it():
    torch.manual_seed(0)
    source, edited, before = torch.randn(3, 16)
    assert metrics.viclip_dir(source, source, edited, before) == 0
    assert metrics.viclip_dir(edited, source, edited, source) == pytest.approx(1, abs=1e-6)
    assert metrics.viclip_dir(edited, source, source, edited) == pytest.approx(-1, abs=1e-6)
    score = metrics.viclip_dir(edited, source, before, source)         # between normalised features
    assert metrics.viclip_dir(7 * edited, source, 0.1 * before, source) == pytest.approx(score, abs=1e-6) != 1


@pytest.mark.parametrize("case", range(4))
def test_ssim_equals_scikit_image(case):
    want = load_file(GOLDENS / "ssim.safetensors")
    first, second = want[f"{case}.first_u8"].numpy(), want[f"{case}.second_u8"].numpy()
    assert metrics.ssim(first, second) == pytest.approx(want[f"{case}.ssim"].item(), abs=1e-6)
    assert metrics.ssim(first / 255, second / 255) == pytest.approx(want[f"{case}.ssim"].item(), abs=1e-6)


def test_ssim_refuses_an_image_smaller_than_its_window():
    with pytest.raises(UserError, match="7x7"):
        metrics.ssim(np.zeros((6, 20, 3)), np.zeros((6, 20, 3)))


def test_image_scores_are_ultraedits_six():
    torch.manual_seed(0)
    clip, dino = CLIP.from_pretrained(CLIP_DIR), DINOv2.from_pretrained(DINO_DIR)
    source, *edits = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    got = metrics.image_scores(clip, dino, source, edits, "a red fox in the snow", "two cats")
    assert list(got) == ["clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image", "dinov2_sim", "ssim"]

    def features(image, size, mode, normalise):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, (size, size), mode=mode)
        mean, std = torch.tensor([.48145466, .4578275, .40821073]), torch.tensor([.26862954, .26130258, .27577711])
        return (x - mean[:, None, None]) / std[:, None, None] if normalise else x
    img = [F.normalize(clip.encode_image(features(im, 56, "bicubic", True))[0], dim=0) for im in (source, *edits)]
    src, tgt = F.normalize(clip.encode_text(clip.tokenizer(["a red fox in the snow", "two cats"])), dim=1)
    din = [F.normalize(dino.encode_image(features(im, 70, "nearest", False))[0], dim=0) for im in (source, *edits)]
    for i in (1, 2):
        want = [img[0] @ src, img[i] @ tgt, F.normalize(img[i] - img[0], dim=0) @ F.normalize(tgt - src, dim=0),
                img[0] @ img[i], din[0] @ din[i], metrics.ssim(source, edits[i - 1])]
        assert [got[k][i - 1] for k in got] == pytest.approx([float(w) for w in want], abs=1e-5)
    assert "dinov2_sim" not in metrics.image_scores(clip, None, source, edits, "a", "b")


def noisy_clip(n_frames=6, height=48, width=64):
    """A textured clip, uint8, with the same pattern drifting by one pixel per frame."""
    wide = np.random.default_rng(1).integers(60, 200, (height // 8, width // 8 + 4, 3)).astype(np.uint8)
    wide = np.asarray(Image.fromarray(wide).resize((width + n_frames, height), Image.BICUBIC))
    return np.stack([wide[:, i:i + width] for i in range(n_frames)])


def test_an_untouched_clip_is_perfectly_preserved():
    clip = noisy_clip()
    changed, psnr, ssim = metrics.preservation(clip, clip)
    assert changed == 0 and psnr == 100 and ssim == pytest.approx(1)


def test_a_local_edit_is_found_and_leaves_the_outside_preserved():
    source = noisy_clip()
    edited, true = source.copy(), np.zeros(source.shape[:3], bool)
    edited[:, 12:36, 16:40] = 255 - edited[:, 12:36, 16:40] // 2
    true[:, 12:36, 16:40] = True
    derived = metrics.changed_region(source, edited)
    assert (derived & true).sum() / (derived | true).sum() > 0.75
    changed, psnr, _ = metrics.preservation(source, edited, true)
    assert psnr == 100 and changed == pytest.approx(true.mean())
    spoiled = np.where(true[..., None], edited, np.clip(edited.astype(int) + 9, 0, 255)).astype(np.uint8)
    assert metrics.preservation(source, spoiled, true)[1] == pytest.approx(20 * math.log10(255 / 9), abs=0.05)


def test_an_edit_of_the_whole_frame_has_no_outside():
    source = noisy_clip()
    changed, psnr, ssim = metrics.preservation(source, np.minimum(source, 195) + 60)
    assert changed > 0.95 and math.isnan(psnr) and math.isnan(ssim)


def test_flicker_is_one_for_the_source_rises_with_brightness_jumps_and_falls_for_a_still():
    clip = noisy_clip()
    jumping = clip.astype(int) + 20 * (-1) ** np.arange(len(clip))[:, None, None, None]
    jumping, still = np.clip(jumping, 0, 255).astype(np.uint8), clip[:1].repeat(6, 0)
    assert metrics.flicker(clip, clip) == 1 and metrics.flicker(jumping, clip) > 2 and metrics.flicker(still, clip) < 0.5
    assert metrics.flicker(still, still) == 1 and math.isnan(metrics.flicker(clip[:2], clip[:2]))


def test_a_jump_where_windows_meet_is_a_seam():
    def clip(steps):                                                    # each frame differs from the last by its step
        grey = [100]
        for step in steps:
            grey.append(grey[-1] + (step if grey[-1] + step <= 255 else -step))
        return np.uint8(grey)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    source, even = clip([20] * 39), clip([40] * 39)
    jump = clip([120 if i in (16, 28) else 40 for i in range(1, 40)])
    assert metrics.seam_score(even, source) == pytest.approx(1) and metrics.seam_score(jump, source) == pytest.approx(3)
    assert math.isnan(metrics.seam_score(jump[:16], source[:16]))


# ------------------------------------------------------------------------------------------------------------
# Clips
# ------------------------------------------------------------------------------------------------------------

def test_controls_behave_as_they_must():
    source = noisy_clip(n_frames=10)
    captions = dict(source_caption="a red fox in the snow", target_caption="two cats")
    edits = {"untouched": source, "frozen": source[:1].repeat(10, 0)}
    [rows] = metrics.score_clips([dict(source=source, edits=edits, **captions)], Scorers(PATHS))
    untouched, frozen = rows["untouched"], rows["frozen"]
    assert set(untouched) == set(metrics.SCORES) and math.isnan(untouched["seam"])
    assert untouched["viclip_dir"] == 0 and untouched["psnr_outside"] == 100 and untouched["changed"] == 0
    assert untouched["clip_frame_gain"] == 0 and untouched["flicker"] == 1
    assert frozen["clip_frame"] == pytest.approx(1, abs=1e-6) and frozen["clip_frame_gain"] > 0
    assert frozen["flicker"] < 0.5 and frozen["changed"] > 0.2


def test_clips_and_edits_scored_together_score_as_they_do_alone_by_networks_opened_once():
    source, edit, other = noisy_clip(), 255 - noisy_clip(), noisy_clip() // 2
    captions, scorers = dict(source_caption="a fox", target_caption="two cats"), Scorers(PATHS, square=64)
    clips = [dict(source=source, edits={"a": edit, "b": other}, **captions), dict(edits={"a": other[:4]}, **captions)]
    together, networks = metrics.score_clips(clips, scorers), dict(scorers.networks)
    for clip, rows in zip(clips, together):
        for name, frames in clip["edits"].items():
            [alone] = metrics.score_clips([clip | {"edits": {name: frames}}], scorers)
            assert rows[name] == pytest.approx(alone[name], abs=1e-5, nan_ok=True)
    assert set(networks) == set(PATHS) and all(scorers.open(role) is networks[role] for role in PATHS)


def test_frames_are_stretched_to_480_before_the_crop_as_in_tgves_script():
    frame, clip = noisy_clip(n_frames=1, height=40, width=80), CLIP.from_pretrained(CLIP_DIR)
    want = clip.encode_image(clip.preprocess(Image.fromarray(frame[0]).resize((480, 480))))
    assert torch.equal(metrics.encode_clip(clip, frame, 480), want)
    assert apart(metrics.encode_clip(clip, frame), want) > 1e-3


def test_an_editors_own_scorers_are_taken_unless_the_flags_name_others():
    def chosen(kind="auto", **paths):
        scorers = metrics.choose_scorers(kind, {"clip": CLIP_DIR}, **paths)
        return scorers.paths, scorers.square, scorers.family
    assert chosen() == ({"clip": CLIP_DIR}, 0, "tiny")
    others = {"clip": "a/b", "pick": "c/d", "judge": "e/f"}
    assert chosen(**others, viclip=None) == (others, 0, "tiny") and chosen(clip="none")[0] == {}
    assert chosen("published") == (metrics.SCORERS["published"], 480, "published")
    assert "pick" in metrics.choose_scorers("published") and "pick" not in metrics.choose_scorers("tiny")


# ------------------------------------------------------------------------------------------------------------
# One clip
# ------------------------------------------------------------------------------------------------------------

NONE = ["--clip", "none", "--pick", "none", "--viclip", "none", "--device", "cpu"]


def numbered(n, height=16, width=24):
    return np.zeros((n, height, width, 3), np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None, None]


def firsts(frames):
    return [int(frame[0, 0, 0]) for frame in frames]


def test_clips_of_other_length_rate_and_size_are_aligned_and_it_is_said():
    source, edited = numbered(20), numbered(9, 8, 12)
    a, b, notes = metrics.align(source, edited, np.arange(20) / 20, np.arange(9) / 10)
    assert firsts(a) == [0, 2, 4, 6, 8, 10, 12, 14, 16] and a.shape == b.shape == (9, 16, 24, 3)
    assert len(notes) == 2 and notes[0].startswith("source has 20 frames, edit 9: ") and "12x8" in notes[1]
    a, b, notes = metrics.align(edited, source, np.arange(9) / 10, np.arange(20) / 20)                  # the other way round
    assert firsts(a) == [k // 2 for k in range(18)] and len(b) == 18
    a, b, notes = metrics.align(source, edited, None, np.arange(9) / 10)                                # a folder has no times
    assert firsts(a) == list(range(9)) and "the first 9 of both" in notes[0]
    assert metrics.align(source, source, np.arange(20) / 20, np.arange(20) / 8)[2] == []
    a, b, _ = metrics.align(source, edited, np.arange(20) / 20, np.arange(9) / 20, 0.27)                # a part, as it is
    assert firsts(a) == list(range(6, 15))
    a, b, _ = metrics.align(source, source[:1], np.arange(20) / 20, np.zeros(1))
    assert len(a) == len(b) == 1 and firsts(a) == [0]


def test_frames_at_uneven_times_meet_those_shown_then():
    uneven = np.array([0, .04, .08, .5, .54, 1.2, 1.24, 1.28])
    a, b, _ = metrics.align(numbered(8), numbered(4), uneven, np.arange(4) / 3)
    assert firsts(a) == [0, 2, 4, 4] and firsts(b) == [0, 1, 2, 3]             # 0, .33, .67, 1


@pytest.mark.parametrize("start, fps", [(0, 8), (0.5, 8), (1.03, 12.5), (0.77, 30000 / 1001)])
def test_an_edit_made_with_fps_meets_the_frames_it_was_made_of(tmp_path, start, fps):
    source = write_clip(tmp_path / "a.mp4", np.repeat(numbered(25, 32, 32) * 9, 2, axis=0), 25)
    clip = probe(source)
    made_of = [rgb for _, rgb in read_frames(clip, start, fps=Fraction(fps).limit_denominator(1001))]
    edit = write_clip(tmp_path / "b.mp4", np.stack(made_of), fps)
    (film, times), (edited, edited_times) = map(metrics.load_frames, (source, edit))
    a, b, _ = metrics.align(film, edited, times, edited_times, start, film.tick)
    assert len(a) >= len(made_of) - 1 and all(np.array_equal(x, y) for x, y in zip(a, made_of))


def test_an_edit_of_a_part_meets_that_part_and_an_odd_side_its_own_pixels(tmp_path, capsys):
    frames = np.repeat(noisy_clip(20)[:, :37, :51], 2, axis=0)
    source, edited = write_clip(tmp_path / "source.mp4", frames), write_clip(tmp_path / "edited.mp4", frames[13:30])
    kept = []
    for more in (["--start", "1.3"], []):
        metrics.main_clip([edited, "--source", source, *more, *NONE])
        out = capsys.readouterr().out
        kept.append(float(next(line for line in out.splitlines() if line.startswith("area changed")).split()[2]))
        assert "stretched" not in out
    assert kept[0] < .1 < .25 < kept[1]
    frames = ["--start", "1", "--source", str(tmp_path)]
    for flags, what in ((["--start", "1"], "--start 1: is a time of --source"), (["--start", "-1"], "--start: -1: must"), (frames, "no")):
        with pytest.raises(UserError, match=what):
            metrics.main_clip([edited, *flags])


def write_clip(path, frames, fps=10):
    write_video(path, torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 127.5 - 1, fps)
    return str(path)


def flags():
    return [x for role, path in PATHS.items() for x in (f"--{role}", str(path))]


def printed(capsys):
    """Name of a score -> its printed line; the names of those without."""
    lines = capsys.readouterr().out.splitlines()
    lacks = [line.split(": ")[1].split(", ") for line in lines if line.startswith("no score")]
    return {line[:15].strip(): line for line in lines if "better:" in line}, sum(lacks, [])


def test_the_command_prints_every_score_when_everything_is_given(tmp_path, capsys):
    source = write_clip(tmp_path / "source.mp4", noisy_clip(20))
    edited = write_clip(tmp_path / "edited.mp4", 255 - noisy_clip(20))
    metrics.main_clip([edited, "--source", source, "--instruction", "invert", "--source-caption", "a fox",
                       "--target-caption", "a dark fox", *flags()])
    lines, lacks = printed(capsys)
    assert list(lines) == [score.name for score in metrics.SCORES.values()] and not lacks
    assert all(f"better: {score.better}" in lines[score.name] for score in metrics.SCORES.values())


def test_missing_captions_source_and_frames_leave_out_just_their_scores(tmp_path, capsys):
    edited = write_clip(tmp_path / "edited.mp4", noisy_clip())
    metrics.main_clip([edited, "--target-caption", "a fox", *flags()])
    lines, lacks = printed(capsys)
    assert set(lines) == {"ViCLIP_out", "PickScore", "CLIPFrame", "CLIPText"}
    assert set(lacks) == {score.name for score in metrics.SCORES.values()} - set(lines)
    metrics.main_clip([edited, "--target-caption", " ", *flags()])
    assert list(printed(capsys)[0]) == ["CLIPFrame"]
    Image.fromarray(noisy_clip()[0]).save(tmp_path / "0001.png")
    metrics.main_clip([str(tmp_path / "0001.png"), "--target-caption", "a fox", *flags()])
    assert "CLIPFrame" in printed(capsys)[1]


@pytest.mark.parametrize("flag,value", [("--clip", "nowhere/at/all"), ("--source", "none.mp4"), ("--device", "tpu"),
                                        ("--scorers", "best")])
def test_a_wrong_flag_is_named(flag, value, tmp_path):
    with pytest.raises(UserError, match=f"{flag}.*{value}|^{value}"):
        metrics.main_clip([write_clip(tmp_path / "edited.mp4", noisy_clip()), flag, value])
    with pytest.raises(UserError, match="gone.mp4"):
        metrics.main_clip(["gone.mp4"])


# ------------------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------------------

CSV = """Video name,Our GT caption,Style Change Caption,Object Change Caption,Background Change Caption,Multiple Changes Caption
DAVIS Videos:
fox,"a fox, running","a fox, painted",a cat,a fox in snow,a cat in snow
,,,,,
Youtube Videos:,,,,,
boat,a boat,a boat at night,,a boat on sand,a car
"""
PROMPTS = {"fox": {f"edit_{task}": f"change {task}" for task in metrics.TGVE_COLUMNS.values()}}


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:05d}.jpg", quality=95)


@pytest.fixture
def tree(tmp_path):
    """A benchmark tree of one video with frames and one without its file, and three of the edits."""
    (tmp_path / "LOVEU-TGVE-2023_Dataset.csv").write_text(CSV, encoding="utf-8-sig")
    (tmp_path / "prompt_dict.json").write_text(json.dumps(PROMPTS))
    write_frames(tmp_path / "DAVIS_480p/480p_frames/fox", noisy_clip(6))
    for task in ("style", "object", "background"):
        write_frames(tmp_path / f"edits/DAVIS_480p/fox/{task}", 255 - noisy_clip(4 if task == "object" else 6))
    return tmp_path


def test_the_published_csv_is_read_with_its_section_rows(tree):
    items = metrics.read_tgve(tree)
    assert [i["id"] for i in items] == [f"{v}/{t}" for v in ("DAVIS_480p/fox", "youtube_480p/boat")
                                        for t in ("style", "object", "background", "multiple")]
    assert items[0]["source_caption"] == "a fox, running" and items[0]["target_caption"] == "a fox, painted"
    assert items[1]["instruction"] == "change object" and items[0]["path"].name == "fox"
    assert items[4]["path"] == tree / "youtube_480p/480p_videos/boat.mp4" and items[5]["target_caption"] == ""


def test_files_of_another_kind_are_named(tree):
    file = tree / "LOVEU-TGVE-2023_Dataset.csv"
    with pytest.raises(UserError, match="nothing/LOVEU-TGVE-2023_Dataset.csv: No such file"):
        metrics.read_tgve(tree / "nothing")
    for text, what in ((CSV.replace("Style Change", "Other"), "lacks 'Style Change Caption'"), ("", "lacks|is it TGVE"),
                       (CSV.replace("DAVIS Videos:", ""), "fox comes before any section row"), (CSV + "é", "utf-8")):
        file.write_bytes(text.encode("latin-1"))
        if text:
            with pytest.raises(UserError, match=f"Dataset.csv: .*{what}"):
                metrics.read_tgve(tree)
    file.write_text(CSV, encoding="utf-8")
    for odd in ({"fox": {"edit_style": 5}}, {"fox": 5}):
        (tree / "prompt_dict.json").write_text(json.dumps(odd))
        with pytest.raises(UserError, match="prompt_dict.json: .*needs {video:"):
            metrics.read_tgve(tree)


PLUS = {"video": "DAVIS_480p/480p_videos/fox.mp4", "task": "Object Removal", "instruction": "remove the fox",
        "input_caption": "a fox in a forest", "output_caption": "a forest"}


def test_tgve_plus_finds_its_columns_by_name_and_numbers_repeated_tasks(tree):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [PLUS, PLUS | {"instruction": "erase it"}, PLUS | {"task": "texture"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tree / "test.parquet")
    items = metrics.read_tgve_plus(tree)
    assert [i["id"].split("/")[-1] for i in items] == ["object_removal", "object_removal-2", "texture"]
    assert items[1]["instruction"] == "erase it" and items[1]["task"] == "object_removal"
    assert items[0]["source_caption"] == "a fox in a forest" and items[0]["target_caption"] == "a forest"
    assert items[0]["path"] == tree / "DAVIS_480p/480p_frames/fox"
    rows = [{k: v for k, v in PLUS.items() if k != "output_caption"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tree / "test.parquet")
    with pytest.raises(UserError, match="no column for the target; it has video, task"):
        metrics.read_tgve_plus(tree)


def test_tgve_plus_without_its_parquet_says_what_to_get(tree):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="is it facebook/tgve_plus's"):
        metrics.read_tgve_plus(tree)


def tgve(tree, capsys, *more):
    """(what the command printed, {first cell: {column: cell}} of its table) for the edits in the tree."""
    metrics.main_tgve([str(tree), "--outputs", str(tree / "edits"), "--out", str(tree / "out"), *flags(), *more])
    out = capsys.readouterr().out
    return out, table_cells(out)


def table_cells(text):
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0][1:], row[1:])) for row in rows}


def test_tgve_prints_one_table_with_controls_intervals_missing_clips_and_the_papers_rows(tree, capsys):
    out, rows = tgve(tree, capsys)
    untouched, frozen = (rows[name] for name in ("untouched source", "frozen first edit"))
    assert rows["edit [95 %]"]["n"] == "3" and "[" not in rows["edit [95 %]"]["CLIPText"]        # three edits of one video
    assert rows["object"]["n"] == "1" and "multiple" not in rows
    assert list(untouched)[-1] == "ViCLIP_dir (held out)" and untouched["ViCLIP_dir (held out)"] == "0.000"
    assert untouched["PSNR outside"] == "100.0" and frozen["CLIPFrame"] == "1.000"
    paper = rows["InstructVEdit, copied from the paper"]
    assert (paper["n"], paper["ViCLIP_out"], paper["ViCLIP_dir (held out)"]) == ("", "0.280", "0.237")
    assert "3 of 8 clips scored" in out and "left out: DAVIS_480p/fox/multiple: " in out
    assert "left out: youtube_480p/boat/style: " in out and "boat.mp4" in out
    assert "DAVIS_480p/fox/object: edit: source has 6 frames, edit 4: the first 4 of both are scored" in out
    scores = json.loads((tree / "out/scores/DAVIS_480p/fox/style.json").read_text())["scores"]
    assert set(scores) == {"edit", "untouched source", "frozen first edit"}
    assert (tree / "out/table.md").read_text() in out


def test_what_scores_depend_on_is_scored_anew_and_what_is_there_is_kept(tree, capsys):
    first, path = tgve(tree, capsys)[1], tree / "out/scores/DAVIS_480p/fox"
    times = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert tgve(tree, capsys)[1] == first and times == {file: file.stat().st_mtime_ns for file in path.iterdir()}
    (path / "style.json").unlink()                                      # a run that was killed before it
    assert tgve(tree, capsys)[1] == first
    assert list(tgve(tree, capsys, "--pick", "none")[1]["style"]) != list(first["style"])        # other scorers
    Image.new("RGB", (64, 48)).save(tree / "edits/DAVIS_480p/fox/style/00003.jpg")               # another edit
    assert tgve(tree, capsys)[1]["style"] != first["style"]
    write_frames(tree / "edits/DAVIS_480p/fox/multiple", noisy_clip(6) // 2)                     # one that was not there
    assert "4 of 8 clips scored" in tgve(tree, capsys)[0]
    (tree / "LOVEU-TGVE-2023_Dataset.csv").write_text(CSV.replace("a cat,", "a dog,"), encoding="utf-8-sig")
    with pytest.raises(UserError, match="out: made with texts"):        # other captions
        tgve(tree, capsys)


def test_edits_of_all_frames_are_thinned_to_32_like_their_source(tree, capsys):
    assert metrics.thin(list(range(80))) == list(range(0, 64, 2)) and metrics.thin(list(range(20))) == list(range(20))
    long = np.repeat(noisy_clip(16), 4, axis=0) // 2 + np.arange(64, dtype=np.uint8)[:, None, None, None]
    for folder in ("DAVIS_480p/480p_frames/fox", "edits/DAVIS_480p/fox/style"):
        shutil.rmtree(tree / folder)
        write_frames(tree / folder, long)
    out, rows = tgve(tree, capsys, "--limit", "1")
    assert rows["style"]["PSNR outside"] == "100.0" and "source has" not in out


def test_the_editor_fills_the_submission_layout_and_continues_where_it_stopped(tree, capsys, monkeypatch):
    out, argv = tree / "out", [str(tree), "--weights", str(GOLDENS / "instruct-pix2pix"), "--limit", "2", "--size", "32",
                               "--steps", "2", "--device", "cpu", *flags()]
    argv += ["--out", str(out)]
    metrics.main_tgve(argv)
    first = table_cells(capsys.readouterr().out)
    assert first["image editor, frame by frame"]["n"] == "2"
    folder = out / "edit/DAVIS_480p/fox"
    assert sorted(p.name for p in folder.iterdir()) == ["object", "style"]                       # and nothing half-written
    assert [p.name for p in sorted((folder / "style").iterdir())] == [f"{i:05d}.jpg" for i in range(6)]
    assert np.asarray(Image.open(folder / "style/00000.jpg")).shape == (48, 64, 3)
    kept, again = folder / "style/00003.jpg", (folder / "object/00003.jpg").read_bytes()
    Image.new("RGB", (64, 48)).save(kept)
    black = kept.read_bytes()
    shutil.rmtree(folder / "object")
    write_frames(folder / ".object.part", noisy_clip(9))                # of a run that was killed
    metrics.main_tgve(argv)
    second = table_cells(capsys.readouterr().out)
    assert kept.read_bytes() == black and (folder / "object/00003.jpg").read_bytes() == again
    assert len(list((folder / "object").iterdir())) == 6 and second["object"] == first["object"]
    assert second["style"] != first["style"]                            # as it is now
    for other, what in ((["--seed", "1"], "seed 0 .now 1."), (["--no-detail"], "detail True .now False.")):
        with pytest.raises(UserError, match=what):
            metrics.main_tgve([*argv, *other])
    shutil.rmtree(out)
    monkeypatch.setattr(metrics, "edit_pictures", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        metrics.main_tgve(argv)
    assert not [p for p in out.rglob("*.jpg")] and not (folder / "style").exists()


@pytest.mark.parametrize("argv", [["--limit", "0"], ["--steps", "0"], ["--outputs", "nowhere"], ["--size", "0"], ["--seed", "-1"],
                                  ["--text-cfg", "nan"], ["--device", "cpu:"]])
def test_a_benchmark_flag_out_of_range_is_named(tree, argv):
    with pytest.raises(UserError, match=f"{argv[0]}.*{argv[1]}"):
        metrics.main_tgve([str(tree), *argv])


@pytest.mark.parametrize("argv", [["--clips", "-100"], ["--frames", "0"], ["--n", "0"], ["--grid-text", "nan"],
                                  ["--grid-source", "-1"], ["--size", "36"]])
def test_a_flag_of_shapes_out_of_range_is_named(argv, tmp_path):
    with pytest.raises(UserError, match=f"{argv[0]}.*{argv[1]}"):
        metrics.main_shapes(shapes_argv(tmp_path, *argv))


def test_an_interval_covers_the_mean_and_shrinks_with_n():
    x = np.random.default_rng(0).normal(3, 1, 400)
    low, high = metrics.interval(x, range(400))
    assert low < x.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    few = metrics.interval(x[:16], range(16))
    assert few[1] - few[0] > 2 * (high - low)
    one, four = (metrics.interval(np.repeat(x[:100], 4), groups) for groups in (range(400), np.repeat(range(100), 4)))
    assert four[1] - four[0] == pytest.approx(2 * (one[1] - one[0]), rel=0.2)                     # four copies say no more than one


# ------------------------------------------------------------------------------------------------------------
# Where the truth is known
# ------------------------------------------------------------------------------------------------------------

def test_benchmark_clips_are_the_same_every_time_and_cover_every_task_in_both_domains():
    def ids(n, which):
        return [item["id"] for item in metrics.drawn_items(n, which, ["synthetic", "real"])]
    items = metrics.drawn_items(16, 0, ["synthetic", "real"])
    assert ids(16, 0) == [item["id"] for item in items] and ids(5, 0) == ids(16, 0)[:5] and not set(ids(16, 0)) & set(ids(16, 1))
    assert {(i["task"], i["domain"]) for i in items} == set(itertools.product(world.TASKS, ["synthetic", "real"]))
    for a, b in zip(metrics.draw(items[0], 2, 32).values(), metrics.draw(items[0], 2, 32).values()):
        assert np.array_equal(a, b)


def test_the_true_region_holds_every_visible_change_and_all_of_a_global_edit():
    for item in metrics.drawn_items(8, 0, ["synthetic"]):
        source, truth, mask = metrics.draw(item, 2, 32).values()
        assert mask.any() and np.abs(source.astype(int) - truth)[~mask].max(initial=0) <= 10
        assert item["task"] not in ("style", "effect") or mask.all()


def test_the_truth_is_closest_to_itself_and_the_untouched_source_gains_nothing():
    source, truth, mask = metrics.draw(metrics.drawn_items(2, 0, ["synthetic"])[1], 2, 32).values()
    best, none = (metrics.truth_scores(source, x, truth, mask) for x in (truth, source))
    assert best["psnr_truth"] == 100 and best["ssim_truth"] == pytest.approx(1)
    assert none["truth_gain"] == none["whole_gain"] == 0
    halfway = metrics.truth_scores(source, source / 510 + truth / 510, truth, mask)
    assert halfway["truth_gain"] == pytest.approx(20 * math.log10(2), abs=1e-6) and none["psnr_truth"] < 99


def test_success_needs_a_clear_gain_and_what_the_autoencoder_leaves_outside():
    def judge(gain, outside):
        rows = {"edit": {"truth_gain": gain, "psnr_outside": outside},
                "autoencoded source": {"truth_gain": 0.4, "psnr_outside": 25.0},
                "autoencoded truth": {"truth_gain": 9.0, "psnr_outside": 24.5}}
        metrics.add_success(rows)
        assert rows["autoencoded source"]["success"] == 0 and rows["autoencoded truth"]["success"] == 1
        return rows["edit"]["success"]
    assert judge(1.5, 23.6) == 1 and judge(5, math.nan) == 1
    assert judge(1.3, 23.6) == 0 and judge(5, 23.4) == 0


def test_the_judge_is_last_in_every_table_and_not_in_the_filters_total():
    assert metrics.COLUMNS[-1] == list(metrics.SCORES)[-1] == metrics.HELD_OUT
    rows = [{key: float(i == j) for j, key in enumerate(metrics.SCORES)} for i in range(6)]
    assert metrics.HELD_OUT not in metrics.WEIGHTS
    other = [row | {metrics.HELD_OUT: 7.0 * i} for i, row in enumerate(rows)]
    assert np.allclose(metrics.total_score(rows), metrics.total_score(other))


def test_a_total_is_the_weighted_mean_of_what_all_have_from_a_centre_in_spreads():
    rows = [{"a": 1.0, "b": 10.0, "c": 1.0}, {"a": 3.0, "b": 30.0}]
    assert metrics.total_score(rows, {"a": 1, "b": 3, "c": 9}).tolist() == [-1, 1]
    assert metrics.total_score(rows, {"a": 1, "b": 3}, {"a": 1, "b": 0}, {"a": 2, "b": 10}).tolist() == [0.75, 2.5]
    assert metrics.total_score(rows, {"c": 1}).tolist() == [0, 0]


def test_agreement_is_one_for_a_score_that_follows_the_truth_and_minus_one_against_it():
    rng, done = np.random.default_rng(0), {}
    for shift, name in enumerate("ab"):
        gains = rng.normal(size=6)
        done[name] = {f"c{k}": {"truth_gain": g, "whole_gain": -g, "clip_text": 3 * g + 100 * shift, "flicker": 1 + abs(g - 9)}
                            for k, g in enumerate(gains)}
    for k in range(6):
        done["a"][f"c{k}"]["psnr_outside"] = 20.0 + k
    done["random truth"] = {f"c{k}": {"clip_text": 1.0, "flicker": 1.0} for k in range(6)}
    lines = metrics.agreement_table(done, [f"c{k}" for k in range(6)])
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    assert cells["CLIPText"][:2] == ["2", "1.00 [1.00, 1.00]"] and cells["CLIPText"][3] == "-1.00 [-1.00, -1.00]"
    assert cells["flicker (distance from 1)"][1] == "1.00 [1.00, 1.00]"  # nearest to 1 where the gain is highest
    assert float(cells["CLIPText"][2]) < 1 and cells["weighted total"][1] == cells["CLIPText"][1]
    assert cells["PSNR outside"][0] == "1" and "ViCLIP_out" not in cells  # one clip has it; none has that
    assert "at least 3" in metrics.agreement_table(done, ["c0", "c1"])[0]


def shapes_argv(tmp_path, *more):
    return ["--weights", str(GOLDENS / "instruct-pix2pix"), "--n", "3", "--frames", "2", "--size", "32", "--steps", "1", "--device",
            "cpu", "--domain", "synthetic", "--out", str(tmp_path / "out"), "--pick", "none", *flags()[:2], *flags()[4:], *more]


def test_the_shapes_benchmark_prints_its_controls_as_they_must_be_and_resumes(tmp_path, capsys):
    metrics.main_shapes(shapes_argv(tmp_path))
    first, out = capsys.readouterr().out, tmp_path / "out"
    cells = table_cells(first)
    untouched, frozen = cells["untouched source"], cells["frozen first edit"]
    assert untouched["ViCLIP_dir (held out)"] == "0.000" and untouched["gain, dB"].startswith("0.0")
    assert untouched["PSNR outside"].startswith("100.0") and untouched["success"].startswith("0.00")
    assert frozen["CLIPFrame"] == "1.000" and "PickScore" not in untouched
    assert {"style", "object", "background", "synthetic", "autoencoded truth", "edit − untouched source [95 %]",
            "image editor, frame by frame", "without detail"} <= set(cells)
    frames = [{str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
              for folder in (out / "edit", out / "without detail")]
    assert len(frames[0]) == 6 and frames[0].keys() == frames[1].keys() and all(frames[0][k] != frames[1][k] for k in frames[0])
    assert metrics.SUCCESS in first and "3 of 3 clips scored" in first and not list(out.rglob(".*"))
    next((out / "scores").rglob("*.json")).unlink()                     # not there yet, as after a kill
    shutil.rmtree(next((out / "edit/synthetic").iterdir()))
    metrics.main_shapes(shapes_argv(tmp_path))
    assert table_cells(capsys.readouterr().out) == cells


def test_the_bare_frames_are_measured_as_train_measures_them(capsys, tmp_path):
    ed = VideoEditor.from_pretrained(GOLDENS / "instruct-pix2pix", device="cpu")
    ed.size = 32
    rows = metrics.drawn_scores(ed, 1, "synthetic", 3, steps=1, s_txt=2.0, s_src=1.5)
    assert {row["task"] for row in rows} <= set(world.TASKS) and len(rows) > 4
    row = next(row for row in rows if row["task"] == "removal")
    item = metrics.drawn_item(int(row["id"].split("/")[1]), "removal", "synthetic", int(row["id"].split("/")[1]) % 4)
    clip = metrics.draw(item, 3, 32)
    edited = ed.edit(torch.from_numpy(clip["source"]).permute(0, 3, 1, 2)[None].float() / 127.5 - 1, item["instruction"], 1, 2.0, 1.5,
                     seed=item["number"])
    edited = np.stack(metrics.to_u8(edited))
    assert row["truth_gain"] == metrics.truth_scores(clip["source"], edited, clip["truth"], clip["mask"])["truth_gain"]
    assert row["flicker"] == metrics.flicker(edited, clip["source"]) and row["success"] in (0, 1)
    metrics.main_shapes(shapes_argv(tmp_path, "--bare", "--n", "1"))
    cells = table_cells(capsys.readouterr().out)
    assert list(cells["style"]) == ["n", "success", "gain, dB", "PSNR to truth", "PSNR outside", "flicker"] and "synthetic [95 %]" in cells
    assert not (tmp_path / "out").exists()


def test_a_sweep_prints_a_row_for_every_guidance_and_seed_and_what_agrees_with_the_truth(tmp_path, capsys):
    metrics.main_shapes(shapes_argv(tmp_path, "--n", "2", "--sweep", "--agreement", "--grid-text", "3", "9", "--grid-source", "1"))
    out = capsys.readouterr().out
    cells = table_cells(out)
    assert {"3, 1, 0 [95 %]", "3, 1, 1", "9, 1, 0", "9, 1, 1"} < set(cells) and cells["3, 1, 1"]["n"] == "2"
    assert cells["9, 1, 0"] != cells["9, 1, 1"] and "4 candidates of each clip" in out and "| weighted total |" in out


def test_footage_is_measured_against_the_exact_effect_and_without_an_instruction_against_the_source(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips/cat.mp4", noisy_clip(4, 32, 48))
    metrics.main_footage([str(tmp_path / "clips"), "--weights", str(GOLDENS / "instruct-pix2pix"), "--size", "32", "--steps", "1",
                          "--frames", "3", "--no-image-control", "--out", str(tmp_path / "out"), *NONE])
    cells = table_cells(capsys.readouterr().out)
    assert {"nothing", "grayscale", "sepia", "night", "autoencoded source"} <= set(cells)
    assert cells["nothing"]["PSNR to truth"] == "-" and float(cells["nothing"]["PSNR outside"]) < 100
    assert cells["sepia"]["PSNR outside"] == "-" and float(cells["sepia"]["PSNR to truth"]) > 0
    scores = json.loads((tmp_path / "out/scores/cat/grayscale.json").read_text())["scores"]
    assert scores["untouched source"]["truth_gain"] == 0 and set(metrics.CODED) < set(scores)
    assert (tmp_path / "out/edit/cat/night/00002.png").is_file()


def test_a_judge_that_chose_the_training_clips_is_named_under_the_table(tmp_path):
    ed = VideoEditor.from_pretrained(GOLDENS / "instruct-pix2pix", device="cpu")
    assert metrics.filtered_by(ed) == []
    for name, judge in (("round1", "llava"), ("round2", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps({"judge": judge}))
    (tmp_path / "settings.json").write_text(json.dumps({"train_on": [str(tmp_path / x) for x in ("round1", "round2", "gone")]}))
    ed.folders = [tmp_path, *ed.folders]
    [line] = metrics.filtered_by(ed)
    assert "llava" in line and "round1" in line


# ------------------------------------------------------------------------------------------------------------
# User study
# ------------------------------------------------------------------------------------------------------------

EVIL = "</script><script>document.title = 'broken'</script> & <b>cat</b>"


@pytest.fixture
def study(tmp_path):
    for folder, value in (("a", 60), ("b", 120), ("source", 200)):
        (tmp_path / folder).mkdir()
        for name in ("cat", "dog", "owl"):
            write_clip(tmp_path / folder / f"{name}.mp4", np.full((4, 32, 32, 3), value, np.uint8))
    (tmp_path / "a" / "captions.json").write_text(json.dumps({"cat": EVIL, "dog": EVIL, "owl": EVIL}))
    page = tmp_path / "study.html"
    metrics.main_study([str(tmp_path / f) for f in ("a", "b", "source")] + ["--out", str(page)])
    return page


def study_data(page):
    text = page.read_text().split('type="application/json">')[1].split("</script>")[0]
    return json.loads(text)


def test_the_study_page_carries_every_clip_and_escapes_captions(study):
    data = study_data(study)
    assert [i["name"] for i in data["items"]] == ["cat", "dog", "owl"] and data["items"][0]["caption"] == EVIL
    assert all(i[k].startswith("data:video/mp4;base64,") for i in data["items"] for k in ("a", "b", "source"))
    assert EVIL not in study.read_text() and "http" not in study.read_text()


def test_study_pairs_by_name_and_says_what_it_leaves_out(study, capsys):
    (study.parent / "b" / "owl.mp4").unlink()
    metrics.main_study([str(study.parent / "a"), str(study.parent / "b"), "--out", str(study)])
    assert "in one folder only: owl" in capsys.readouterr().out and len(study_data(study)["items"]) == 2
    with pytest.raises(UserError, match="no clips of the same name"):
        (study.parent / "empty").mkdir()
        metrics.main_study([str(study.parent / "a"), str(study.parent / "empty"), "--out", str(study)])


def test_a_data_set_is_rated_by_what_it_kept(tmp_path):
    for name, kept in (("aa", [False, True]), ("bb", [False])):
        (tmp_path / "data" / name).mkdir(parents=True)
        for film in ("source", "target"):
            write_clip(tmp_path / "data" / name / f"{film}.mp4", noisy_clip(3))
        rows = [{"id": name, "kept": k, "instruction": f"change {i}"} for i, k in enumerate(kept)]
        (tmp_path / "data" / name / "candidates.json").write_text(json.dumps(rows))
    metrics.main_study([str(tmp_path / "data"), "--rate", "--out", str(tmp_path / "page.html")])
    data = study_data(tmp_path / "page.html")
    assert [(i["name"], i["caption"]) for i in data["items"]] == [("aa/target", "change 1")] and data["rating"]
    assert {"a", "source"} <= set(data["items"][0]) and data["questions"] == metrics.RATINGS


def test_a_study_of_too_many_folders_is_refused(study):
    for argv in ([study.parent / "a"], [study.parent] * 4, ["--rate", study.parent, study.parent, study.parent]):
        with pytest.raises(UserError, match="study: . folders; it takes"):
            metrics.main_study(list(map(str, argv)))


def test_a_film_is_written_so_that_browsers_play_it_frame_by_frame_at_its_times(tmp_path):
    times = [0, 40, 80, 500, 540, 1200, 1240]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 32, 32, "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for t in times:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), t % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "b.mp4").write_bytes(base64.b64decode(metrics.data_url(tmp_path / "a.mkv", 8).split(",")[1]))
    np.testing.assert_allclose(metrics.load_frames(tmp_path / "b.mp4")[1], np.array(times) / 1000, atol=.002)
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize("odd,what", [({"answers": []}, "attribute"), ({"answers": {"x": {"text": 3}}}, "answers other than a and b"),
                                      ({"names": ["a"]}, "unpack"), ({"study": [1]}, "unhashable"), ({"rating": True}, "holds ratings"),
                                      (None, "lacks 'rating'"), ([1], "holds a list")])
def test_votes_of_another_kind_are_refused_in_a_line_that_names_the_file(tmp_path, odd, what):
    votes = {"study": "s", "rating": False, "names": ["x", "y"], "answers": {"clip": {"text": "a"}}}
    (tmp_path / "v.json").write_text(json.dumps(votes | odd if isinstance(odd, dict) else odd or {}))
    with pytest.raises(UserError, match=f"v.json: .*{what}"):
        metrics.main_votes([str(tmp_path / "v.json")])


def test_votes_are_win_rates_with_exact_binomial_intervals(tmp_path, capsys):
    files = []
    for person in range(2):
        answers = {f"clip{i}": {"text": "a" if i < 8 else "b", "structure": "b", "quality": "a"} for i in range(10)}
        files.append(tmp_path / f"{person}.json")
        files[-1].write_text(json.dumps({"study": "s", "rating": False, "names": ["ours", "theirs"], "answers": answers}))
    metrics.main_votes([str(f) for f in files])
    out = capsys.readouterr().out
    assert "| text | 20 | 80.0 | 56.3 to 94.3 |" in out  # Clopper-Pearson, 16 of 20
    assert "| structure | 20 | 0.0 | 0.0 to 16.8 |" in out and "| average | | 60.0 | |" in out
    person = json.loads(files[0].read_text()) | {"person": "p7"}
    for f in files:
        f.write_text(json.dumps(person))                                # saved twice
    metrics.main_votes([str(f) for f in files])
    assert "1 people" in (out := capsys.readouterr().out) and "| text | 10 | 80.0 |" in out
    files[1].write_text(json.dumps({"study": "other", "rating": False, "names": ["x", "y"], "answers": {}}))
    with pytest.raises(UserError, match="several studies, other, s"):
        metrics.main_votes([str(f) for f in files])


class Browser:
    """A headless chromium, driven through its debugging pipe."""

    def __init__(self, profile):
        theirs_in, self.write = os.pipe()
        self.read, theirs_out = os.pipe()
        command = (f"exec chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage "
                   f"--remote-debugging-pipe --user-data-dir={profile} about:blank 3<&{theirs_in} 4>&{theirs_out}")
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(theirs_in, theirs_out),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.session, self.buffer, self.count, self.loads = None, b"", 0, 0

    def open(self, page):
        """Shows a page of films; skips the test where this build cannot play them."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        if not self.js("""document.createElement("video").canPlayType('video/mp4; codecs="avc1.42E01E"')"""):
            pytest.skip("this chromium was built without H.264: it plays none of the films")
        self.send("Page.enable")
        self.load("Page.navigate", url=page.as_uri())

    def message(self):
        while b"\0" not in self.buffer:
            self.buffer += os.read(self.read, 1 << 16) or pytest.fail("chromium ended")
        text, self.buffer = self.buffer.split(b"\0", 1)
        self.loads += b"Page.loadEventFired" in text
        return json.loads(text)

    def send(self, method, **params):
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps({"id": self.count, "method": method, "params": params} | session).encode() + b"\0")
        while (reply := self.message()).get("id") != self.count:
            pass
        return reply.get("result", {})

    def load(self, method, **params):
        """Navigates or reloads, then waits until the page's script has run and its films can play."""
        self.js("window.stale = true")
        self.send(method, **params)
        while True:  # the blank page loads, too
            loads = self.loads
            ready = self.send("Runtime.evaluate", expression="!window.stale && playing !== null", returnByValue=True)
            if ready.get("result", {}).get("value") is True:
                break
            while self.loads == loads:
                self.message()
        self.js("""Promise.all([...document.querySelectorAll("video")].map(v => new Promise((done, fail) => {
            const look = () => v.error ? fail(Error("film: " + v.error.message)) : v.readyState > 1 && done();
            v.onloadeddata = v.onerror = look;
            look();
        })))""")

    def js(self, expression):
        reply = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def press(self, *keys):
        for key in keys:
            text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed (apt install chromium)")
def test_in_a_browser_the_study_is_answered_by_keyboard_kept_over_a_reload_and_exported(study, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(study)
        assert browser.js("$('caption').textContent") == EVIL and browser.js("document.title") != "broken"
        assert browser.js("[...document.querySelectorAll('video')].map(v => v.videoWidth)") == [32, 32, 32]
        name, left = browser.js("current().name"), browser.js("state.flip[state.order[0]] ? 'b' : 'a'")
        browser.js("window.film = document.querySelector('video')")
        browser.press("1", "2", "1")
        assert browser.js("film.isConnected")  # an answer restarts nothing
        browser.press("Enter")
        right = "ab".replace(left, "")
        want = {name: {"text": left, "structure": right, "quality": left}}
        assert browser.js("state.answers") == want and browser.js("state.at") == 1
        order = browser.js("state.order")
        stored = json.dumps(browser.js("[key, localStorage.getItem(key)]"))
        browser.send("Page.addScriptToEvaluateOnNewDocument",       # chromium may hand it on only a moment later
                     source=f"localStorage.setItem(...{stored})")
        browser.load("Page.reload")
        assert browser.js("state.answers") == want and browser.js("state.at") == 1 and browser.js("state.order") == order
        assert browser.js("$('left').textContent") == "2 of 3, 1 answered"
        browser.press("Backspace")
        assert browser.js("state.at") == 0 and browser.js("document.querySelectorAll('input:checked').length") == 3
        browser.js("URL.createObjectURL = blob => (window.saved = blob.text(), 'data:,')")
        browser.js("$('export').click()")
        saved = json.loads(browser.js("saved"))
        assert saved["answers"] == want and saved["rating"] is False and len(saved["names"]) == 2
        (tmp_path / "votes.json").write_text(json.dumps(saved))
        metrics.main_votes([str(tmp_path / "votes.json")])
    finally:
        browser.process.kill()
        browser.process.wait()


def test_a_caption_that_is_cut_is_said_once(tmp_path, capsys):
    clip, caption = write_clip(tmp_path / "a.mp4", noisy_clip(9)), " ".join(["a red circle"] * 40)
    for _ in range(2):
        metrics.main_clip([clip, "--source", clip, "--target-caption", caption, "--source-caption", "a", *flags(), "--device", "cpu"])
    said = [line for line in capsys.readouterr().err.splitlines() if "its end is cut" in line]
    assert len(said) == len(set(said)) >= 1 and all("a red circle" in line for line in said)
