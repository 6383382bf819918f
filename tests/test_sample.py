"""sample.py: reading and writing clips (made on the spot), windows, detail, and what the command refuses."""
import functools
import os
import random
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import sample
from model import ROOT, UserError, VideoEditor, resize, to_rgb, to_tensor
from sample import (carry_detail, choose_model, edit_pictures, edit_stream, main, plan, probe, read_frames, read_image, read_video,
                    select, video_writer, write_video)

HUB = str(Path(__file__).parent / "goldens" / "instruct-pix2pix")      # random weights, latents 8 times smaller
needs_any_name = pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="file names here lack most letters")


@functools.cache
def picture(i, height=48, width=64):
    """Frame i of the test clip (H, W, 3) uint8: red, a blue top left quarter, a green bar moving right."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:] = 200, 30, 30
    rgb[:height // 2, :width // 2] = 30, 30, 200
    rgb[:, 2 * i:2 * i + 4] = 30, 180, 30
    return rgb


def off(a, b):
    """Mean absolute difference in grey levels."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean()


def make_clip(path, n=20, codec="libx264", pix="yuv420p", height=48, width=64, tick=Fraction(1, 25), times=None,
              rotation=None, audio=None, options=None, pixel=1, gop=None, trc=1, space=1):
    """Write a small BT.709 video; times: ticks of the frames; audio: codec of a 440 Hz tone as long as the pictures; space:
    what the file says of its colours (2: nothing)."""
    with av.open(str(path), "w", options=options or {}) as out:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = out.add_stream(codec, rate=Fraction(25), options=quiet)
        stream.width, stream.height, stream.pix_fmt = width, height, pix
        stream.time_base = stream.codec_context.time_base = tick
        stream.codec_context.sample_aspect_ratio, stream.codec_context.gop_size = pixel, gop or 12
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 1
        stream.codec_context.color_trc = trc
        if rotation:
            stream.set_display_rotation(rotation)
        sound = out.add_stream(audio, rate=48000, layout="mono") if audio else None
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), "rgb24")
            frame = frame.reformat(format=pix, dst_colorspace="itu709", dst_color_range="MPEG")
            frame.pts, frame.time_base = times[i] if times else i, tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for k in range(0, n * 1920 if sound else 0, 960):
            tone = (0.3 * np.sin(np.arange(k, k + 960) * 2 * np.pi * 440 / 48000)).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, k, Fraction(1, 48000)
            out.mux(sound.encode(frame))
        if sound:
            out.mux(sound.encode(None))
    return path


def seconds(path):
    """Time stamps of all frames of a file, and the end of the last, in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        end = (frames[-1].pts + frames[-1].duration) * frames[-1].time_base
        return [float(f.pts * f.time_base) for f in frames], float(end)


def sound_packets(path):
    with av.open(str(path)) as container:
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(audio=0) if p.size]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """An editor is loaded once for all commands of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoEditor, "from_pretrained", functools.cache(VideoEditor.from_pretrained))
        yield


@pytest.fixture(scope="module")
def editor():
    return VideoEditor.from_pretrained(HUB, motion=None, device="cpu", dtype=None)


def command(*args):
    return main(["--weights", HUB, "--device", "cpu", "--steps", "1", "--size", "32", *map(str, args)])


def refused(call, *args):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- reading

@pytest.mark.parametrize("name, options", [
    ("a.mp4", {}), ("a.mov", dict(codec="prores_ks", pix="yuv422p10le")), ("a.avi", dict(codec="mpeg4")),
    ("a.webm", dict(codec="libvpx-vp9", tick=Fraction(1, 1000), times=list(range(0, 320, 40)))),
    ("a.mkv", dict(codec="libx265", pix="yuv420p10le")),
    ("a.gif", dict(codec="gif", pix="rgb8", tick=Fraction(1, 100), times=list(range(0, 32, 4))))])
def test_every_container_gives_the_same_frames(tmp_path, name, options):
    video, fps = read_video(make_clip(tmp_path / name, n=8, **options))
    assert video.shape == (1, 8, 3, 48, 64) and fps == 25
    error = (video - torch.stack([to_tensor(picture(i)) for i in range(8)])).abs().mean()
    assert error < (0.2 if name in ("a.gif", "a.avi") else 0.08)            # few colours; no tag says which matrix


def test_a_folder_of_frames_is_read_in_numerical_order(tmp_path):
    for i in range(11):
        Image.fromarray(picture(i)).save(tmp_path / f"frame{i}.png")
    clip = probe(tmp_path, rate=10)
    rgb = [x for _, x in read_frames(clip)]
    assert clip.rate == 10 and float(clip.seconds) == 1.1
    assert all((x == picture(i)).all() for i, x in enumerate(rgb)) and len(rgb) == 11
    Image.new("RGB", (32, 48)).save(tmp_path / "frame12.png")
    assert "frame12.png: 32x48, where frame0.png is 64x48" in refused(list, read_frames(probe(tmp_path)))


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_metadata_turns_the_frames_upright(tmp_path, degrees):
    clip = probe(make_clip(tmp_path / "a.mp4", n=2, rotation=degrees, pixel=Fraction(2)))
    upright = np.rot90(picture(0), degrees // 90)
    rgb = next(read_frames(clip))[1]
    assert (clip.height, clip.width) == rgb.shape[:2] == upright.shape[:2] and off(rgb, upright) < 6
    assert clip.pixel == (2 if degrees == 180 else Fraction(1, 2))


def test_pictures_lie_as_their_own_exif_says_mirrored_ones_too(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        lying = picture(9, 48, 48)
        Image.fromarray(lying).save(tmp_path / f"{orientation}.jpg", exif=exif, quality=95)
    for (_, rgb), file in zip(read_frames(probe(tmp_path)), sorted(tmp_path.iterdir())):
        assert off(rgb, ImageOps.exif_transpose(Image.open(file))) < 3 and off(next(read_frames(probe(file)))[1], rgb) == 0


def test_pictures_of_16_bits_are_not_clipped_and_broken_ones_are_named(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 100, 255]
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "f.tiff")
    assert "f.tiff: holds floating point" in refused(read_image, tmp_path / "f.tiff")
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert "pair 3: cannot identify" in refused(read_image, tmp_path / "b.png", "pair 3")


@pytest.mark.parametrize("fps, want", [(12, [0, 0, 1, 1, 2, 2]), (6, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4, 6, 8, 10])])
def test_resampling_a_folder_or_an_avi_loses_no_first_frame(tmp_path, fps, want):
    (tmp_path / "f").mkdir()
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / "f" / f"{i}.png")
    frames = [rgb for _, rgb in read_frames(probe(tmp_path / "f", rate=6), fps=Fraction(fps), count=6)]
    assert all((rgb == picture(i)).all() for rgb, i in zip(frames, want)) and len(frames) == 6
    avi = probe(make_clip(tmp_path / "a.avi", n=12, codec="mjpeg", pix="yuvj420p"))
    assert list(select(((t, t) for t in avi.times), avi, fps=Fraction(25, 2))) == list(enumerate(range(0, 12, 2)))


@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), 60])
def test_resampling_to_its_own_rate_changes_nothing_where_times_and_start_are_rounded(tmp_path, rate):
    times = [83 + round(1000 * i / rate) for i in range(20)]
    clip = probe(make_clip(tmp_path / "a.mkv", n=20, tick=Fraction(1, 1000), times=times))
    assert [t for _, t in select(((t, t) for t in clip.times), clip, fps=Fraction(rate))][:19] == clip.times[:19]


def test_resampling_shows_the_frame_that_is_on_screen(tmp_path):
    clip = probe(make_clip(tmp_path / "a.mkv", n=24, tick=Fraction(1, 24)))             # milliseconds inside
    frames = [(t, i) for i, t in enumerate(clip.times)]
    assert [i for _, i in select(frames, clip, fps=Fraction(8))] == list(range(0, 24, 3))
    assert [i for _, i in select(frames, clip, fps=Fraction(48))] == [i // 2 for i in range(48)]
    assert [k for k, _ in select(frames, clip, Fraction(1, 2), None, Fraction(8), 3)] == [0, 1, 2]


def test_streams_without_time_stamps_keep_all_their_frames(tmp_path):
    for name in ("a.h264", "a.avi"):                                                    # with B-frames
        clip = probe(make_clip(tmp_path / name, n=20))
        rgb = [x for _, x in read_frames(clip)]
        assert len(clip.times) == len(rgb) == 20 and clip.seconds == pytest.approx(0.8, abs=0.05)
        assert all(off(x, picture(i)) < 8 for i, x in enumerate(rgb))


def test_a_stream_that_begins_between_key_frames_stays_in_time_with_its_sound(tmp_path, capsys):
    whole = make_clip(tmp_path / "a.ts", n=60, audio="aac", gop=25).read_bytes()
    (tmp_path / "b.ts").write_bytes(whole[len(whole) // 4 // 188 * 188:])               # packets of 188 bytes
    clip = probe(tmp_path / "b.ts")
    read = [float(t * clip.tick) for t, _ in read_frames(clip)]
    assert read[0] > 0.2 and len(read) < len(clip.times)
    command(tmp_path / "b.ts", "make it snow", "--mode", "image")
    got, end = seconds(tmp_path / "b_make-it-snow.mp4")
    assert got == pytest.approx([0, *read[1:]], abs=1e-3) and end == pytest.approx(float(clip.seconds), abs=1e-3)
    assert f"{len(read)} of {len(clip.times)} frames could be decoded" in capsys.readouterr().err
    (tmp_path / "c.ts").write_bytes(whole + whole)
    assert "time stamps start anew after" in refused(probe, tmp_path / "c.ts")


def test_start_end_and_frames_choose_by_time(tmp_path):
    path = make_clip(tmp_path / "a.mp4", n=25)
    clip = probe(path)
    times, tick, lengths = plan(clip, Fraction("0.2"), Fraction("0.6"))
    assert [float(t * tick) for t in times] == pytest.approx([0.2 + 0.04 * i for i in range(10)])
    assert [t for t, _ in read_frames(clip, Fraction("0.2"), Fraction("0.6"))] == times
    assert len(plan(clip, Fraction("0.2"), None, None, 3)[0]) == 3 and len(set(lengths)) == 1
    whole, fps = read_video(path)
    part, same = read_video(path, start=0.25, end=0.75)
    assert torch.equal(part, whole[:, 7:19]) and fps == same == 25
    for number, at in ((-1, slice(6, 19, 2)), (3, slice(6, 11, 2))):
        few, rate = read_video(path, size=24, start=0.25, end=0.75, fps=12.5, frames=number)
        assert torch.equal(few[0], torch.stack([resize(x, 24, 32) for x in whole[0, at]])) and rate == 12.5


def test_a_frame_shown_long_ends_where_the_cut_does(tmp_path):
    clip = probe(make_clip(tmp_path / "a.mp4", n=4, tick=Fraction(1, 10), times=[0, 1, 2, 30]))
    cut, whole = ([x * clip.tick * 10 for x in plan(clip, 0, end)[2]] for end in (Fraction(1), None))
    assert cut == [1, 1, 8] and whole[:3] == [1, 1, 28]


@pytest.mark.parametrize("height", [576, 578])
def test_colours_that_no_tag_explains_are_bt709_in_hd_only(tmp_path, height):
    error = off(next(read_frames(probe(make_clip(tmp_path / "a.mkv", n=1, height=height, space=2))))[1], picture(0, height))
    assert error < 5 if height > 576 else error > 9                 # the picture was written as BT.709


# ---- writing

def test_written_video_is_tagged_h264_that_starts_fast(tmp_path):
    video = torch.stack([to_tensor(picture(i)) for i in range(5)])[None]
    write_video(tmp_path / "o.mp4", video, 12.5)
    with av.open(str(tmp_path / "o.mp4")) as container:
        coder, rate = container.streams.video[0].codec_context, container.streams.video[0].average_rate
        assert (coder.name, coder.pix_fmt, rate) == ("h264", "yuv420p", Fraction(25, 2))
        assert (coder.colorspace, coder.color_primaries, coder.color_trc, coder.color_range) == (1, 1, 1, 1)
    data = (tmp_path / "o.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    back, fps = read_video(tmp_path / "o.mp4")
    assert fps == 12.5 and (back - video).abs().mean() < 0.04


def test_odd_sizes_gain_one_repeated_line_and_a_failed_write_leaves_nothing(tmp_path):
    clip = probe(make_clip(tmp_path / "a.mkv", n=2, codec="ffv1", pix="yuv444p", height=47, width=65))
    assert (clip.height, clip.width) == (47, 65)
    with video_writer(tmp_path / "o.mp4", 65, 47, 25, Fraction(1, 25)) as write:
        for i, (_, rgb) in enumerate(read_frames(clip)):
            write(rgb, i, 1)
    assert read_video(tmp_path / "o.mp4")[0].shape[-2:] == (48, 66)
    before = set(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        with video_writer(tmp_path / "p.mp4", 64, 48, 25, Fraction(1, 25)) as write:
            write(picture(0), 0, 1)
            1 / 0
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name, audio, kept", [("a.mp4", "aac", True), ("a.webm", "libopus", True), ("a.mov", "pcm_s16le", False)])
def test_sound_is_copied_where_mp4_holds_it_else_encoded(tmp_path, name, audio, kept):
    webm = dict(codec="libvpx-vp9", tick=Fraction(1, 1000), times=list(range(0, 800, 40))) if "webm" in name else {}
    path = make_clip(tmp_path / name, audio=audio, **webm)
    command(path, "make it snow", "--mode", "image")
    copy = sound_packets(tmp_path / "a_make-it-snow.mp4")
    assert abs(copy[-1][0] - 0.8) < 0.06 and (not kept or [x for _, x in copy] == [x for _, x in sound_packets(path)])


def test_sound_is_cut_with_the_pictures(tmp_path):
    path = make_clip(tmp_path / "a.mp4", n=50, audio="aac")
    command(path, "make it snow", "--start", "0.5", "--end", "1.5", "--fps", "5", "--mode", "image")
    times, end = seconds(tmp_path / "a_make-it-snow.mp4")
    sound, source = sound_packets(tmp_path / "a_make-it-snow.mp4"), sound_packets(path)
    assert np.allclose(times, np.arange(5) / 5) and abs(end - 1) < 1e-3
    assert abs(sound[0][0]) < 0.03 and abs(sound[-1][0] - 1) < 0.04
    index = [data for _, data in source].index(sound[0][1])
    assert abs(source[index][0] - sound[0][0] - 0.5) < 1e-3         # in step with the pictures


def test_a_picture_is_not_lost_for_its_sound(tmp_path, capsys):
    data = bytearray(make_clip(tmp_path / "a.mkv", n=8, audio="mp2").read_bytes())
    packets = [packet for _, packet in sound_packets(tmp_path / "a.mkv")]
    at = data.find(packets[len(packets) // 2])
    data[at:at + 4] = b"\0\0\0\0"                                   # no header where one should be
    (tmp_path / "c.mkv").write_bytes(data)
    command(tmp_path / "c.mkv", "make it snow", "--out", tmp_path / "d.mp4")
    assert len(seconds(tmp_path / "d.mp4")[0]) == 8 and "unusable packets of its sound" in capsys.readouterr().err


def test_variable_frame_rate_wide_pixels_and_hdr(tmp_path, capsys):
    times = [0, 40, 100, 140, 300, 360, 400, 500]
    path = make_clip(tmp_path / "a.mp4", n=8, tick=Fraction(1, 1000), times=times, pixel=Fraction(2))
    clip = probe(path)
    assert sample.model_size(clip.height, clip.width * clip.pixel, 48, 8) == (48, 128)
    command(path, "make it snow", "--mode", "image")
    assert np.allclose(seconds(tmp_path / "a_make-it-snow.mp4")[0], np.array(times) / 1000)
    assert seconds(tmp_path / "a_make-it-snow.mp4")[1] == pytest.approx(seconds(path)[1])
    assert probe(tmp_path / "a_make-it-snow.mp4").pixel == 2 and "HDR" not in capsys.readouterr().err
    command(make_clip(tmp_path / "b.mkv", n=1, codec="libx265", pix="yuv420p10le", trc=18), "make it snow")
    assert "is HDR" in capsys.readouterr().err


# ---- windows

@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("mode", ["ffg", "image"])
def test_a_clip_of_one_window_equals_one_pass(editor, n, mode):
    video = torch.rand(1, n, 3, 16, 24, generator=torch.Generator().manual_seed(n)) * 2 - 1
    one = editor.edit(video, "make it snow", steps=2, seed=3, mode=mode)
    windows = torch.stack(list(edit_stream(editor, video[0], "make it snow", 2, seed=3, mode=mode)))[None]
    assert torch.equal(one, windows)


@pytest.mark.parametrize("n, sizes", [(1, [(1, 0)]), (16, [(16, 0)]), (17, [(1, 15)]), (32, [(12, 4), (4, 12)]),
                                      (33, [(12, 4), (5, 11)]), (40, [(12, 4), (12, 4)])])
def test_windows_cover_any_length_once(editor, monkeypatch, n, sizes):
    seen, past, sampler = [], [], editor.sample

    def watch(z_src, text, z_T, *args, z0_ref=None, **more):
        n_ref = 0 if z0_ref is None else z0_ref.shape[1]
        for now, before in zip((z_src, z_T, z0_ref), map(torch.cat, zip(*past))):    # references: the last frames before
            assert not n_ref or torch.equal(now[0, :n_ref], before[-n_ref:])
        seen.append((z_src.shape[1] - n_ref, n_ref))
        z0 = sampler(z_src, text, z_T, *args, z0_ref=z0_ref, **more)
        past.append([x[0, n_ref:] for x in (z_src, z_T, z0)])
        return z0

    monkeypatch.setattr(editor, "sample", watch)                    # looks on, changes nothing
    video = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) * 2 - 1
    out = list(edit_stream(editor, video, "make it snow", 1, mode="video"))
    assert len(out) == n and seen[n > 16:] == sizes and sum(new for new, _ in seen) == n


def test_windows_of_frames_that_do_not_interact_leave_no_trace(editor):
    video = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    edited = [list(edit_stream(editor, video[:n], "make it snow", 2, mode="ffg")) for n in (16, 20)]
    assert torch.equal(torch.stack(edited[0]), torch.stack(edited[1][:16])) and len(edited[1]) == 20
    one_pass = editor.edit(video[None], "make it snow", 2, mode="ffg")[0]       # 20 rows instead of 16 + 4
    assert torch.allclose(torch.stack(edited[1]), one_pass, atol=1e-4)


@pytest.mark.parametrize("n", [1, 5, 33])
def test_a_given_first_frame_is_delivered_and_every_window_follows_it(editor, monkeypatch, n):
    seen, sampler = [], editor.sample

    def watch(z_src, text, z_T, *args, anchor, z0_ref, **more):
        seen.append((z_src.shape[1], z0_ref.shape[1]))
        assert torch.equal(anchor[0], z_src[:, :1]) and torch.equal(anchor[1][-1], z0_ref) and len(anchor[1]) == 3
        return sampler(z_src, text, z_T, *args, anchor=anchor, z0_ref=z0_ref, **more)

    monkeypatch.setattr(editor, "sample", watch)                    # looks on, changes nothing
    rgbs = np.random.default_rng(n).integers(0, 256, (n, 16, 24, 3), np.uint8)
    first = 255 - rgbs[0]
    edits = [rgb for rgb, *_ in edit_pictures(editor, rgbs, (8, 16), "invert it", steps=2, mode="ffg", first=first)]
    assert len(edits) == n and np.abs(edits[0].astype(int) - (255 - rgbs[0])).max() <= 1
    assert seen == {1: [], 5: [(5, 1)], 33: [(16, 1), (16, 1), (3, 1)]}[n]


def test_a_first_frame_of_another_shape_or_mode_is_refused(tmp_path):
    path = make_clip(tmp_path / "a.mp4", n=2)
    Image.new("RGB", (64, 64)).save(tmp_path / "first.png")
    for more in ([], ["--mode", "image"], ["--grid"]):
        with pytest.raises(UserError, match="--first-frame"):
            command(path, "make it snow", "--first-frame", tmp_path / "first.png", *more)


def test_with_one_noise_for_all_frames_a_still_clip_stays_still_from_window_to_window(editor, monkeypatch):
    video = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1).expand(20, -1, -1, -1)
    for one_noise in (True, False):
        monkeypatch.setattr(editor, "same_noise", one_noise)
        edited = torch.stack(list(edit_stream(editor, video, "make it snow", 2, mode="video")))
        assert torch.allclose(edited, edited[:1].expand_as(edited), atol=1e-4) == one_noise


def test_a_long_clip_is_read_only_as_far_as_it_is_edited(editor):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield np.zeros((16, 16, 3), np.uint8)
    stream = edit_pictures(editor, endless(), (8, 8), "make it snow", steps=1, mode="image")
    for _ in range(20):
        next(stream)
    assert len(taken) == 32


# ---- detail

def scene(seed=0, size=240):
    """A textured picture (1, 3, size, size) in [-1, 1] with detail down to single pixels."""
    g = torch.Generator().manual_seed(seed)
    layers = [F.interpolate(torch.rand(1, 3, n, n, generator=g), size, mode="bilinear") for n in (5, 20, 80, 240)]
    return sum(layers) / 2 - 1


def small(x):
    return F.interpolate(x, 48, mode="bicubic", antialias=True)


def psnr(x, y):
    return float(-10 * torch.log10(((x - y) / 2).square().mean()))


def test_a_global_colour_edit_keeps_every_pixel_of_detail_and_no_edit_the_source():
    source = scene()
    matrix = torch.tensor([[0.4, 0.3, 0.1], [0.1, 0.5, 0.2], [0.2, 0.1, 0.3]])
    truth = torch.einsum("ij,njhw->nihw", matrix, source) + 0.1
    plain = F.interpolate(small(truth), 240, mode="bicubic")
    assert psnr(carry_detail(small(source), small(truth), source), truth) > 40 > psnr(plain, truth) + 10
    assert psnr(carry_detail(small(source), small(source), source), source) > 50


def test_a_replaced_object_does_not_show_the_old_texture():
    source = scene()
    truth = source.clone()
    truth[..., 60:180, 60:180] = scene(seed=1)[..., 60:180, 60:180]
    carried, inside = carry_detail(small(source), small(truth), source), (..., slice(80, 160), slice(80, 160))
    plain = F.interpolate(small(truth), 240, mode="bicubic")
    assert psnr(carried[inside], plain[inside]) > psnr(source[inside], plain[inside]) + 8
    assert psnr(carried[inside], truth[inside]) > psnr(plain[inside], truth[inside]) - 1
    assert psnr(carried[..., :40], truth[..., :40]) > 40            # and the rest stays the source


def test_delivered_frames_have_the_sources_size_and_where_nothing_changed_its_pixels(editor, monkeypatch):
    rgbs = [rgb for _, rgb in read_frames(probe(ROOT / "assets/demo.mp4"), count=2)]
    options = dict(size=(64, 112), instruction="make it snow", steps=1, mode="image")
    low = list(edit_stream(editor, [resize(to_tensor(rgb), 64, 112) for rgb in rgbs], "make it snow", 1, mode="image"))
    for rgb, (out, edit, given) in zip(rgbs, edit_pictures(editor, rgbs, **options)):
        assert out.shape == rgb.shape and torch.equal(edit, low.pop(0)) and torch.equal(given, resize(to_tensor(rgb), 64, 112))
    assert not low
    monkeypatch.setattr(editor, "deadband", 1e3)                    # every cell the source's, as the autoencoder gives it
    sharp, plain = ([rgb for rgb, *_ in edit_pictures(editor, rgbs, detail=detail, **options)] for detail in (True, False))
    error = [max(off(a, b) for a, b in zip(rgbs, out)) for out in (sharp, plain)]
    assert error[0] < 0.1 and error[1] > 10                         # of 255; this autoencoder's weights are random


# ---- flags

@dataclass
class Some:
    steps: int = sample.option(5, "of something", low=1)
    rate: float | None = sample.option(None, "in Hz", low=0, high=1)
    scales: tuple[float, float] = sample.option((1.0, 2.0), "two")
    sma: bool = sample.option(True, "on")
    only_code: int = 3
    kind: str = sample.option("a", "which", choices=["a", "b"], name="sort")


def test_flags_come_from_a_dataclass_and_go_back_into_one():
    parser = sample.Parser()
    sample.add_flags(parser, Some())
    assert sample.from_flags(Some(), parser.parse_args([])) == Some()
    args = parser.parse_args("--steps 7 --rate 0.5 --scales 3 4 --no-sma --sort b".split())
    assert sample.from_flags(Some(), args) == Some(7, 0.5, [3, 4], False, 3, "b")
    for flags, says in (("--steps 0", "--steps: 0: must be at least 1"), ("--rate 2", "--rate: 2: must be 1 at most"),
                        ("--rate nan", "at least 0"), ("--sort c", "--sort"), ("--steps x", "invalid int value")):
        assert says in refused(parser.parse_args, flags.split())
    assert "of something (default: 5)" in parser.format_help()


@pytest.mark.parametrize("flags, says", [
    (["--steps", "0"], "--steps: 0: must be at least 1"), (["--steps", "x"], "--steps"), (["--frames", "0"], "--frames: 0"),
    (["--size", "7"], "--size: 7: must be at least 32"), (["--text-cfg", "nan"], "--text-cfg: nan"), (["--fps", "0"], "--fps: 0"),
    (["--source-cfg", "99"], "--source-cfg: 99: must be 10 at most"), (["--fps", "1/0"], "--fps"), (["--seed", "-3"], "--seed: -3"),
    (["--start", "9"], "--start 9 .*lasts 0.12 s"), (["--start", "1", "--end", "0.5"], "--end 0.5: must come after --start 1"),
    (["--start", "1e400"], "--start"), (["--fps", "1e400"], "--fps"), (["--device", "cpu:²"], "--device: cpu:²: this machine has cpu"),
    (["--device", "tpu"], "--device: tpu"), (["--grid", "--compare"], "--grid: "), (["--mode", "video"], "--mode video: .* no trained"),
    (["--model", "tiny"], "--model tiny --weights .*pass one"), (["--weights", "nowhere"], "nowhere: no such directory"),
    (["--out", "nowhere/x.mp4"], "cannot be written"), (["--out", "x.avi"], "--out x.avi"), (["--sampler", "ddim"], "--sampler")])
def test_flags_out_of_range_are_refused_in_one_line(tmp_path, flags, says):
    path = make_clip(tmp_path / "a.mp4", n=3)
    with pytest.raises(UserError, match=says) as error:
        main([str(path), "make it snow", "--weights", HUB, *flags])
    assert "\n" not in str(error.value) and [f.name for f in tmp_path.iterdir()] == ["a.mp4"]


def test_auto_takes_the_newest_trained_run_that_fits_else_tiny(tmp_path):
    for run in ("tiny/image", "tiny/round0", "tiny/vae", "sd15/round0"):
        (tmp_path / "runs" / run / "unet").mkdir(parents=True)
    assert choose_model("auto", None, "cpu", tmp_path)[0] == "tiny"     # none is finished
    for run in tmp_path.glob("runs/*/*"):
        (run / "model_index.json").write_text("{}")
    for newest in ("round0", "image"):
        for run in tmp_path.glob("runs/*/*"):                       # one for a GPU, or of another stage, may be newer still
            age = 0 if run.match(f"tiny/{newest}") else 60 if run.parent.name == "tiny" and run.name != "vae" else -60
            os.utime(run / "model_index.json", (1e9 - age, 1e9 - age))
        assert choose_model("auto", None, "cpu", tmp_path)[0] == str(tmp_path / "runs" / "tiny" / newest)
    assert choose_model("sd15", None, "cpu", tmp_path)[0] == "sd15"
    assert choose_model("auto", "tiny", "cpu", tmp_path)[0] == "tiny"


# ---- the command

def test_same_seed_gives_the_same_file_and_another_does_not(tmp_path):
    path, files = make_clip(tmp_path / "a.mp4", n=2), []
    for name, seed in (("x.mp4", 1), ("y.mp4", 1), ("z.mp4", 2)):
        command(path, "make it snow", "--seed", seed, "--out", tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]


def test_several_instructions_and_comparison_in_one_call(tmp_path):
    path = make_clip(tmp_path / "a.mp4", n=18)
    command(path, "make it snow", "Add rain!", "--compare", "--mode", "ffg")
    names = {"a.mp4"} | {f"a_{slug}{more}.mp4" for slug in ("make-it-snow", "add-rain") for more in ("", "_compare")}
    assert {f.name for f in tmp_path.iterdir()} == names
    pair, _ = read_video(tmp_path / "a_add-rain_compare.mp4")
    assert pair.shape == (1, 18, 3, 48, 128) and (pair[..., :64] - read_video(path)[0]).abs().mean() < 0.05


@pytest.mark.parametrize("flags, options, others", [
    (["--text-cfg", 9, "--source-cfg", 1.2], dict(s_txt=9, s_src=1.2), dict(s_txt=1.2, s_src=9)),
    (["--no-detail"], dict(detail=False), {})])
def test_a_flag_gives_the_frames_that_the_same_setting_gives_from_python(tmp_path, editor, flags, options, others):
    clip = probe(make_clip(tmp_path / "a.mp4", n=2))
    command(clip.path, "make it snow", *flags)
    got = read_video(tmp_path / "a_make-it-snow.mp4")[0]

    def apart(**options):
        edits = edit_pictures(editor, [rgb for _, rgb in read_frames(clip)], (32, 40), "make it snow", steps=1, **options)
        write_video(tmp_path / "want.mp4", torch.stack([to_tensor(rgb) for rgb, *_ in edits])[None], 25)
        return (got - read_video(tmp_path / "want.mp4")[0]).abs().mean()
    assert apart(**options) < 0.005 < 0.02 < apart(**others)


def test_grid_writes_one_picture_whose_rows_are_text_guidance_and_columns_source_guidance(tmp_path, editor):
    clip = probe(make_clip(tmp_path / "a.mp4", n=2))
    command(clip.path, "make it snow", "--grid", "--steps", "2")
    sheet = Image.open(tmp_path / "a_make-it-snow_grid.png")
    width, height, top = 256, round(32 * 256 / 40), 20
    assert sheet.size == (4 * width, 4 * (height + top))
    frame = resize(to_tensor(next(read_frames(clip))[1]), 32, 40)[None, None]

    def cell(row, column):
        x, y = column * width, row * (height + top) + top
        return sheet.crop((x, y, x + width, y + height))
    for row, column, s_txt, s_src in ((0, 3, 3.75, 2.1), (3, 0, 11.25, 1.2)):           # around 7.5 and 1.5
        edit = Image.fromarray(to_rgb(editor.edit(frame, "make it snow", 2, s_txt, s_src, mode="image")[0, 0]))
        want = edit.resize((width, height), Image.Resampling.BICUBIC)
        assert off(cell(row, column), want) < 0.5 < 2 < off(cell(column, row), want)


def test_a_still_picture_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    command(tmp_path / "a.png", "make it snow")
    assert len(seconds(tmp_path / "a_make-it-snow.mp4")[0]) == 1


def test_a_cut_off_file_says_how_much_is_left(tmp_path):
    whole = make_clip(tmp_path / "w.mp4", n=60, audio="aac", options={"movflags": "+faststart"}).read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[:len(whole) * 6 // 10])
    said = refused(command, tmp_path / "a.mp4", "make it snow")
    assert "a.mp4: cut short" in said
    good = int(said.split("--frames ")[1].split()[0])
    command(tmp_path / "a.mp4", "make it snow", "--frames", good, "--mode", "image")
    assert 5 < good < 60 and len(seconds(tmp_path / "a_make-it-snow.mp4")[0]) == good
    (tmp_path / "b.mp4").write_bytes(make_clip(tmp_path / "v.mp4").read_bytes()[:-200])         # its index is last
    assert "b.mp4: Invalid data found when processing input; is it a whole video?" in refused(probe, tmp_path / "b.mp4")


def test_inputs_that_hold_no_pictures_are_named(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "text.txt").write_text("hello\n" * 99)
    (tmp_path / "folder").mkdir()
    with av.open(str(tmp_path / "song.wav"), "w") as out:
        tone = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        out.mux(tone.encode(frame))
    for name, says in (("missing.mp4", "No such file"), ("empty.mp4", "empty file"), ("noise.mp4", "is it a whole video?"),
                       ("text.txt", "no video"), ("folder", "no frames in this folder"), ("song.wav", "only audio")):
        said = refused(command, tmp_path / name, "make it snow")
        assert name in said and says in said


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.png"])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, name):
    path, rng = tmp_path / name, random.Random(name)
    if name == "a.png":
        Image.fromarray(picture(0)).save(path)
    else:
        make_clip(path, n=6, codec="mpeg4" if name == "a.avi" else "libx264", audio=None if name == "a.avi" else "aac")
    whole, refusals = path.read_bytes(), 0
    for k in range(12):
        data = bytearray(whole[:rng.randrange(len(whole))] if k % 2 else whole)
        for _ in range(0 if k % 2 else 8):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            clip = probe(path)
            plan(clip)
            list(read_frames(clip))
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refusals


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    source = make_clip(tmp_path / "z_compare.mp4", n=2)
    before = source.read_bytes()
    assert "z_compare.mp4: cannot be written there" in refused(command, source, "snow", "--out", tmp_path / "z.mp4", "--compare")
    for out in (tmp_path / ("x" * 240 + ".mp4"), source / "x.mp4"):
        assert any(says in refused(command, source, "snow", "--out", out) for says in ("too long a name", "cannot be written"))
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


@needs_any_name
def test_a_name_too_long_for_the_disk_is_cut(tmp_path):
    clip, words = probe(make_clip(tmp_path / ("é" * 110 + ".mp4"), n=2)), ["make " + "it " * 40 + text for text in ("snow", "rain")]
    first, second = sample.output_paths(clip, words, None, ".mp4", compare=True)
    assert first != second and all(len(str(p.name).encode()) < 235 and p.parent == tmp_path for p in (first, second))
    with video_writer(sample.comparison(second), 16, 16, 8, Fraction(1, 8)) as write:
        write(np.zeros((16, 16, 3), np.uint8), 0, 1)


def test_instructions_are_refused_if_empty_and_warned_of_if_long_or_unknown(tmp_path, editor, monkeypatch, capsys):
    assert "is empty" in refused(command, make_clip(tmp_path / "a.mp4", n=1), "  ")
    for text, long in (("make it snow " * 170, True), ("make it " + "x" * 900, True), ("make it snow", False)):
        editor.tokenize([text])
        assert ("more than 77 tokens" in capsys.readouterr().err) == long
    monkeypatch.setattr(editor, "words", {"make", "it", "red"})
    monkeypatch.setattr(editor, "examples", ["make it red"])
    command(tmp_path / "a.mp4", "Make it snow, with 3 suns")
    assert "was not trained on: snow, suns, with; it knows, for example: make it red" in capsys.readouterr().err
    command(tmp_path / "a.mp4", "make it RED!")
    assert "not trained on" not in capsys.readouterr().err


# ---- what people's files hold: one test a kind

def test_an_empty_packet_shows_the_picture_before_it_on(tmp_path):
    command(ROOT / "tests/goldens/still.ogv", "make it snow", "--out", tmp_path / "a.mp4")      # 4 pictures in 15 packets
    times, end = seconds(tmp_path / "a.mp4")
    assert len(times) == len(probe(ROOT / "tests/goldens/still.ogv").times) < 15 and end == pytest.approx(0.6)
    late = probe(make_clip(tmp_path / "b.avi", n=3, codec="mpeg4", times=[0, 1, 5]))           # avi fills a gap with them
    assert [len(list(read_frames(late))), late.times] == [3, [0, 1, 5]]


@pytest.mark.parametrize("relative", [False, True])
def test_a_part_of_a_recording_may_start_at_any_time(tmp_path, relative):
    path = make_clip(tmp_path / "a.mkv", n=50, times=list(range(100, 150)), options={"avoid_negative_ts": "disabled"})
    data = bytearray(path.read_bytes())
    if relative:                                                    # the length as mkvmerge writes it
        at = data.index(b"\x44\x89\x88") + 3
        data[at:at + 8] = np.array(2000, ">f8").tobytes()
        path.write_bytes(data)
    clip = probe(path)
    assert clip.start == 4 and not clip.missing and len(clip.times) == 50
    path.write_bytes(data[:len(data) * 6 // 10])
    assert "cut short" in probe(path).missing


@pytest.mark.parametrize("codec, pix", [("libx264", "yuv420p"), ("libvpx-vp9", "yuv420p"), ("ffv1", "yuv444p")])
def test_colours_stay_where_they_are(tmp_path, codec, pix):
    wave = (128 + 60 * np.sin(np.arange(64) * np.pi / 8)).astype(np.uint8)
    rgb = np.stack([np.tile(wave, (64, 1)), np.full((64, 64), 128, np.uint8), 255 - np.tile(wave, (64, 1))], axis=-1)

    def phase(path):
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0)).to_ndarray()
        u = frame[64:80].reshape(32, 32).mean(0) if frame.shape == (96, 64) else frame[1].mean(0)[::2]
        return np.angle(np.exp(-2j * np.pi * np.arange(32) / 8) @ (u - u.mean())) * 8 / np.pi        # in pixels
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        frame = sample.to_yuv420(rgb) if pix == "yuv420p" else av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(
            format=pix, dst_colorspace="itu709", dst_color_range="MPEG")
        out.mux([*stream.encode(frame), *stream.encode(None)])
    rgb = next(read_frames(probe(tmp_path / "a.mkv")))[1]
    with video_writer(tmp_path / "b.mp4", 64, 64, 25, Fraction(1, 25)) as write:
        write(rgb, 0, 1)
    assert abs(phase(tmp_path / "a.mkv") - phase(tmp_path / "b.mp4")) < 0.1


def make_sounds(path, default, *codecs):
    """A clip of ten frames with a sound track per codec, the one numbered `default` marked as such."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        tracks = [out.add_stream(codec, rate=48000, layout="mono") for codec in codecs]
        for k, track in enumerate(tracks):
            track.disposition = av.stream.Disposition.default if k == default else 0
            track.metadata["language"] = ("eng", "fra")[k]
        for i in range(10):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24")))
        out.mux(video.encode(None))
        for k in range(0, 19200, 960):
            for number, track in enumerate(tracks):
                tone = 0.3 * np.sin(np.arange(k, k + 960) * 2 * np.pi * 440 * (number + 1) / 48000)
                frame = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], "fltp", "mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, k, Fraction(1, 48000)
                out.mux(track.encode(frame))
        for track in tracks:
            out.mux(track.encode(None))
    return path


def test_all_sound_tracks_stay_and_the_default_one_comes_first(tmp_path):
    command(make_sounds(tmp_path / "a.mp4", 1, "aac", "ac3"), "make it snow", "--out", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as out:
        found = [(s.codec_context.name, s.metadata["language"], int(s.disposition)) for s in out.streams.audio]
        assert found == [("ac3", "fra", 1), ("aac", "eng", 0)]
        heard = [p.stream.index for p in out.demux(audio=(0, 1)) if p.size]
        assert min(heard.count(1), heard.count(2)) > 5


def test_sound_that_says_nothing_of_itself_is_left_out_and_named(tmp_path, capsys):
    whole = make_clip(tmp_path / "a.ts", n=30, audio="aac").read_bytes()
    packets = [bytearray(whole[k:k + 188]) for k in range(0, len(whole), 188)]
    for packet in packets:
        if packet[1] & 0x1f == 1 and packet[2] == 1:                # of the sound: damaged beyond its headers
            packet[30:] = bytes(158)
    (tmp_path / "b.ts").write_bytes(b"".join(packets))
    command(tmp_path / "b.ts", "make it snow", "--out", tmp_path / "c.mp4")
    said = capsys.readouterr().err
    assert "b.ts: " in said and "left out" in said and len(seconds(tmp_path / "c.mp4")[0]) == 30


@pytest.mark.parametrize("space", [8, 10])
def test_colours_that_cannot_be_converted_are_the_sources_fault(tmp_path, space):
    said = refused(command, make_clip(tmp_path / "a.mkv", n=1, space=space), "make it snow")
    assert said.startswith(f"{tmp_path / 'a.mkv'}: ") and f"matrix {space}" in said


def test_transparency_is_dropped_aloud(tmp_path, capsys):
    for alpha, name in ((0, "a.png"), (255, "b.png")):
        Image.fromarray(np.dstack([picture(0), np.full((48, 64), alpha, np.uint8)])).save(tmp_path / name)
        command(tmp_path / name, "make it snow")
        assert ("transparency is dropped" in capsys.readouterr().err) == (alpha == 0)
    assert probe(make_clip(tmp_path / "a.mov", n=1, codec="qtrle", pix="argb")).notes == ()


def test_interlaced_frames_lose_their_combs(tmp_path):
    with av.open(str(tmp_path / "a.mpg"), "w") as out:
        stream = out.add_stream("mpeg2video", rate=25, options={"flags": "+ilme+ildct", "field_order": "tt", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(6):
            rgb = picture(4 * i).copy()
            rgb[1::2] = picture(4 * i + 2)[1::2]                    # half a frame later
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, "rgb24")))
        out.mux(stream.encode(None))
    clip = probe(tmp_path / "a.mpg")
    frames = [rgb.astype(int) for _, rgb in read_frames(clip)]
    combs = [np.abs(2 * x[1:-1] - x[:-2] - x[2:])[2:18, :, 1].mean() for x in frames]
    raw = [np.abs(2 * x[1:-1] - x[:-2] - x[2:])[2:18, :, 1].mean() for _, x in read_frames(sample.replace(clip, filters=()))]
    assert clip.filters and len(frames) == len(raw) == 6 and np.mean(combs) < np.mean(raw) / 2


def test_folders_that_hold_odd_things_are_read_or_named(tmp_path):
    for name in ("1²2.png", "1.png", "10.png"):
        Image.fromarray(picture(0)).save(tmp_path / name)
    assert [f.name for f in probe(tmp_path).pictures] == ["1.png", "1²2.png", "10.png"]
    os.mkfifo(tmp_path / "3.png")
    assert f"{tmp_path}: 3.png is not a file" in refused(probe, tmp_path)
    pictures = [Image.fromarray(picture(i)) for i in range(3)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
    assert "a.webp: holds several pictures; save them as a gif" in refused(probe, tmp_path / "a.webp")


def test_a_long_clip_says_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "edit_file", lambda *_: 0)
    command(make_clip(tmp_path / "a.mkv", n=2, tick=Fraction(1, 1000), times=[0, 7200000]), "make it snow", "--fps", "8")
    assert "3600 passes of 1 steps" in capsys.readouterr().err


def test_nothing_that_is_not_a_number_reaches_a_file(tmp_path, editor):
    path, bias = make_clip(tmp_path / "a.mp4", n=2), editor.vae.decoder.conv_out.bias
    before = bias.clone()
    bias[0] = float("nan")
    try:
        assert "NaN" in refused(command, path, "make it snow") and list(tmp_path.iterdir()) == [path]
    finally:
        bias.copy_(before)


def test_only_what_the_mask_shows_changes(tmp_path, editor):
    clip, mask = probe(make_clip(tmp_path / "a.mp4", n=4)), np.zeros((48, 64), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    film = [np.where(i < 2, mask, 0).astype(np.uint8)[..., None].repeat(3, 2) for i in range(4)]
    write_video(tmp_path / "m.mp4", torch.stack([to_tensor(x) for x in film])[None], 25)
    sources = [rgb for _, rgb in read_frames(clip)]
    for flags, free in ((["--mask", tmp_path / "m.png"], [mask > 0] * 4), (["--keep", tmp_path / "m.png"], [mask == 0] * 4),
                        (["--mask", tmp_path / "m.mp4", "--start", "0.04"], [mask > 0, mask < 0, mask < 0])):
        written = []
        with pytest.MonkeyPatch.context() as patch:                 # what is handed to the encoder
            real = sample.to_yuv420
            patch.setattr(sample, "to_yuv420", lambda rgb: written.append(rgb) or real(rgb))
            command(clip.path, "make it snow", "--out", tmp_path / "o.mp4", *flags)
        for source, edit, may in zip(sources[-len(written):], written, free):
            assert (edit[~may] == source[~may]).all() and (off(edit[may], source[may]) > 5 if may.any() else True)
        assert len(written) == len(free)
    assert "m.txt" in refused(command, clip.path, "make it snow", "--mask", tmp_path / "m.txt")


def test_lora_takes_a_file_and_a_strength():
    assert [sample.lora(x) for x in ("a.safetensors", "a.safetensors:0.5", "C:a")] == [
        ("a.safetensors", 1.0), ("a.safetensors", 0.5), ("C:a", 1.0)]
