"""Edit a video by instruction: python sample.py video.mp4 "make it snow"

Contents:
  reading    Clip, probe, decode, select, read_frames, read_video      any file PyAV opens, or a folder of frames
  writing    audio_packets, video_writer, write_video                  H.264 in mp4, the source's sound copied
  editing    edit_stream, seam_score                                   any length in windows, constant memory
  detail     carry_detail                                              the edit at the source's resolution
  command    choose_model, grid_sheet, edit_file, main

Videos are (1, F, 3, H, W) float in [-1, 1]; single frames (3, H, W) in [-1, 1], or rgb (H, W, 3) uint8 on their way in
and out. Times inside a clip are whole ticks of its time base, counted from its first frame.
"""
import argparse
import os
import re
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import UserError, VideoEditor, run

WINDOW, REFERENCES = 16, 4                      # frames per pass, and how many of them the previous pass has finished
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MP4_AUDIO = ("aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "libopus", "flac")     # copied as they are
SWS = "BICUBIC", "ACCURATE_RND", "FULL_CHR_H_INT", "FULL_CHR_H_INP"     # chroma interpolated, rounding exact
SWS = sum(int(av.video.reformatter.Interpolation[name]) for name in SWS)

# ---------------------------------------------------------------------------------------------------------------------
# reading

@dataclass
class Clip:
    """What `probe` finds in a file or folder, enough to plan the whole edit before a model is loaded."""
    path: Path
    files: list             # the one file, or the frames of a folder in order
    width: int              # upright, after the rotation that the metadata asks for
    height: int
    turns: int              # quarter turns counterclockwise that make a decoded frame upright
    pixel: Fraction         # width / height of one pixel (1 for nearly all files)
    rate: Fraction          # average frames per second
    tick: Fraction          # seconds per tick
    start: Fraction         # the first frame's time stamp in the file, seconds
    times: list             # ticks of every frame, ascending, first 0
    last: int               # ticks that the last frame is shown
    audio: bool
    missing: str            # "" or why the file's end cannot be read

    @property
    def seconds(self):
        return (self.times[-1] + self.last) * self.tick


@contextmanager
def open_media(path):
    """PyAV's input container for a path; UserError in one line for what cannot be opened."""
    try:
        container = av.open(f"file:{path}", metadata_errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except av.FFmpegError:
        raise UserError(f"{path}: not a video that can be read (or cut off before its index); "
                        "pass an mp4, mov, webm, mkv or gif file, or a folder of numbered frames") from None
    with container:
        yield container


def video_stream(container, path):
    """The stream to read; a song's cover picture and the text file that FFmpeg would draw do not count as video."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if container.format.name == "tty":
        raise UserError(f"{path}: a text file, not a video")
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "no streams"
        raise UserError(f"{path}: no video in it (only {kinds}); pass a file with pictures")
    if streams[0].codec_context is None:
        raise UserError(f"{path}: its video codec is unknown to this FFmpeg; convert it to H.264 first")
    streams[0].thread_type = "AUTO"
    return streams[0]


def probe(path, rate=24):
    """Clip of a file or a folder of frames, which play at `rate` frames per second. Reads packets, decodes one frame.

    Raises UserError for a path that is missing, empty, no video, or without frames.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith(".")),
                       key=lambda f: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", f.name)])
        if not files:
            raise UserError(f"{path}: no frames in this folder; it should hold numbered png or jpg files")
    if not files[0].is_file() or os.stat(files[0]).st_size == 0:
        raise UserError(f"{files[0]}: an empty file (0 bytes)")
    with open_media(files[0]) as container:
        stream = video_stream(container, files[0])
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise UserError(f"{files[0]}: its first frame cannot be decoded ({error.strerror})") from None
        if frame is None:
            raise UserError(f"{files[0]}: holds no frames")
        turns, (width, height) = round(frame.rotation / 90) % 4, (frame.width, frame.height)
        pixel = stream.sample_aspect_ratio or Fraction(1)
        if turns % 2:
            width, height, pixel = height, width, 1 / pixel
        if path.is_dir():
            return Clip(path, files, width, height, turns, pixel, Fraction(rate), 1 / Fraction(rate), Fraction(0),
                        list(range(len(files))), 1, False, "")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        tick, entries, size = stream.time_base, stream.index_entries, path.stat().st_size
        beyond = sum(entry.pos + entry.size > size for entry in entries)    # indexed, but past the end of the file
        audio = any(s.type == "audio" and s.codec_context is not None for s in container.streams)
    times, last, final = [], 0, 0.0
    with open_media(path) as container:
        index, length = video_stream(container, path).index, (container.duration or 0) / av.time_base
        for packet in container.demux():
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:
                if packet.size and packet.stream_index == index:            # raw streams carry no time stamps
                    times.append(round(len(times) / rate / tick))
                continue
            final = max(final, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == index and not packet.is_discard:
                times.append(stamp)
                last = packet.duration or 0 if stamp == max(times[-1], stamp) else last
        length += (container.start_time or 0) / av.time_base
    times = sorted(set(times)) or [frame.pts or 0]
    start, times = times[0] * tick, [t - times[0] for t in times]
    missing = ""
    if beyond or length - final > max(0.25, 1.5 / rate):                    # Matroska has no table: compare lengths
        missing = f"the file is cut short: it announces {length:.1f} s and ends at {final:.1f} s"
    return Clip(path, files, width, height, turns, pixel, rate, tick, start, times,
                last or max(1, round(1 / rate / tick)), audio, missing)


def decode(clip, since=Fraction(0)):
    """Yields (ticks, av.VideoFrame) in display order; skips to the key frame before `since` seconds where it can."""
    before = -1
    for i, file in enumerate(clip.files):
        with open_media(file) as container:
            stream = video_stream(container, file)
            if since > 1 and container.format.name.startswith(("mov", "matroska")):
                container.seek(int((clip.start + since) * av.time_base))
            frames = container.decode(stream)
            while True:
                try:
                    frame = next(frames, None)
                except av.FFmpegError as error:
                    raise UserError(f"{file}: damaged after {float((before + 1) * clip.tick):.2f} s "
                                    f"({error.strerror}); --end edits what comes before") from None
                if frame is None or (i > 0 and before == i):                # an image file gives one frame
                    break
                if clip.path.is_dir():
                    ticks = i
                elif frame.pts is None:                                     # raw streams
                    ticks = before + 1 if before < 0 else before + round(1 / clip.rate / clip.tick)
                else:
                    ticks = frame.pts - round(clip.start / clip.tick)
                before = max(ticks, before + 1)                             # broken files repeat time stamps
                yield before, frame


def select(frames, clip, start=0, end=None, fps=None, count=-1):
    """The frames asked for. frames: iterable of (ticks, x) in order; start, end in seconds of the clip, count in frames.

    Yields (ticks, x) with start <= time < end as they are; with fps, (k, x) where x is shown at start + k / fps.
    """
    end, k, held = min(end or clip.seconds, clip.seconds), 0, None
    for ticks, x in frames:
        t = ticks * clip.tick
        if fps:
            due = min(t - clip.tick, end)       # one tick of slack: webm rounds its times to milliseconds
            while held is not None and start + k / fps < due and k != count:
                yield k, held
                k += 1
            held = x
        elif start <= t < end and k != count:
            yield ticks, x
            k += 1
        if t >= end or k == count:
            return
    while fps and held is not None and start + k / fps < end and k != count:
        yield k, held
        k += 1


def plan(clip, start=0, end=None, fps=None, count=-1):
    """Output times of every frame that `select` will give (ticks), the time base, and the frames' durations (ticks).

    Raises UserError for a range without frames, or one that reaches into the missing end of a file cut short.
    """
    tick = 1 / fps if fps else clip.tick
    times = [t for t, _ in select(((t, t) for t in clip.times), clip, start, end, fps, count)]
    if not times:
        raise UserError(f"--start {float(start):g} --end {float(end or clip.seconds):g}: no frames there; "
                        f"{clip.path} lasts {float(clip.seconds):.2f} s")
    if clip.missing:
        good = sum(1 for _ in select(decode(clip, start), clip, start, end, fps, count))
        reaches_end = end is None or end >= clip.seconds
        if (reaches_end and good != count) or good < len(times):
            raise UserError(f"{clip.path}: {clip.missing}; {good} frames can be read" +
                            (f", pass --frames {good} to edit those" if good else ""))
    final = 1 if fps else next((t for t in clip.times if t > times[-1]), clip.times[-1] + clip.last) - times[-1]
    lengths = [b - a for a, b in zip(times, times[1:])] + [final]
    return times, tick, lengths


def read_frames(clip, start=0, end=None, fps=None, count=-1):
    """Yields (ticks, rgb): the frames that `select` chooses, upright, (H, W, 3) uint8. One frame in memory at a time."""
    for ticks, frame in select(decode(clip, start), clip, start, end, fps, count):
        width, height = (clip.height, clip.width) if clip.turns % 2 else (clip.width, clip.height)
        untagged_hd = frame.colorspace == 2 and height > 576 and frame.format.name.startswith("yuv")
        rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=SWS,
                               src_colorspace="itu709" if untagged_hd else None)
        yield ticks, np.ascontiguousarray(np.rot90(rgb, clip.turns))


def read_video(path, size=None, start=0, end=None, fps=None, frames=-1, multiple=8):
    """A short clip as a whole: (video (1, F, 3, H, W) in [-1, 1], frames per second as float).

    size: short side in pixels to resize to, height and width multiples of `multiple`; None keeps the file's own.
    start, end in seconds, fps resamples, frames limits their number (-1: all). Raises UserError for what cannot be read.
    """
    clip = probe(path, fps or 24)
    fps = Fraction(fps).limit_denominator(1001) if fps else None
    start, end = Fraction(start), Fraction(end) if end else None
    plan(clip, start, end, fps, frames)
    height, width = model_size(clip, size, multiple) if size else (clip.height, clip.width)
    video = [resize(to_tensor(rgb), height, width) for _, rgb in read_frames(clip, start, end, fps, frames)]
    return torch.stack(video)[None], float(fps or clip.rate)


def to_tensor(rgb):
    """rgb (H, W, 3) uint8 -> (3, H, W) float in [-1, 1]."""
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 127.5 - 1


def to_rgb(frame):
    """(3, H, W) in [-1, 1] -> rgb (H, W, 3) uint8."""
    return ((frame.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def resize(frame, height, width):
    """(3, H, W) -> (3, height, width), antialiased where it shrinks."""
    if frame.shape[-2:] == (height, width):
        return frame
    return F.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def model_size(clip, size, multiple):
    """(height, width) of the model's frame: short side near `size`, the picture's shape kept, multiples of `multiple`."""
    shape = clip.height, clip.width * clip.pixel                            # in square pixels
    height, width = (max(multiple, round(side * size / min(shape) / multiple) * multiple) for side in shape)
    if max(height, width) > 4096:
        raise UserError(f"--size {size}: frames of {width}x{height} are too large; pass a lower --size")
    return height, width

# ---------------------------------------------------------------------------------------------------------------------
# writing

def audio_packets(clip, out, begin=Fraction(0), end=None):
    """The clip's first sound track between begin and end (seconds; None: all of it), shifted to start at 0.

    A generator of (seconds, packet); its first item is (None, None), after the track has been added to `out`. Packets
    that mp4 can hold are copied bit for bit, others encoded to AAC. A cut falls on the nearest packet (about 20 ms).
    """
    with open_media(clip.path) as container:
        source = container.streams.audio[0]
        if source.codec_context.name in MP4_AUDIO:
            track = out.add_stream_from_template(source)
        else:
            rate = source.rate if source.rate in (16000, 22050, 24000, 32000, 44100, 48000) else 48000
            track = out.add_stream("aac", rate=rate, layout=source.layout.name)
        yield None, None
        shift, copied = clip.start + begin, source.codec_context.name in MP4_AUDIO
        for packet in container.demux(source):
            for x in [packet] if copied else packet.decode():
                if x.pts is None:
                    continue
                seconds = x.pts * x.time_base - shift
                middle = seconds + (x.duration or 0) * x.time_base / 2
                if (begin and middle < 0) or (end is not None and middle >= end - begin):
                    continue
                x.pts -= round(shift / x.time_base)
                if copied:
                    x.dts = x.pts if x.dts is None else x.dts - round(shift / x.time_base)
                    x.stream = track
                    yield seconds, x
                else:
                    yield from ((seconds, y) for y in track.encode(x))
        if not copied:
            yield from ((end or clip.seconds, y) for y in track.encode(None))


@contextmanager
def video_writer(path, width, height, rate, tick, pixel=1, audio=None):
    """H.264 in mp4: yields write(rgb (H, W, 3) uint8, ticks, length in ticks). The file appears when all is written.

    rate: average frames per second; tick: seconds per tick; audio: (clip, begin, end) whose sound is added. 4:2:0 needs
    even sizes, so an odd last row or column is shown twice. Raises UserError where nothing can be written.
    """
    path, lengths = Path(path), {}
    part = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        with av.open(f"file:{part}", "w", format="mp4", options={"movflags": "+faststart"}) as out:
            stream = out.add_stream("libx264", rate=Fraction(rate).limit_denominator(60000), options={"crf": "16"})
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            coder = stream.codec_context
            stream.time_base = coder.time_base = tick
            coder.sample_aspect_ratio = pixel
            coder.color_primaries = coder.color_trc = coder.colorspace = 1      # bt709
            coder.color_range = 1                                               # limited, as players expect
            sound = audio_packets(audio[0], out, *audio[1:]) if audio else iter(())
            next(sound, None)
            waiting = next(sound, None)

            def mux(packets):
                nonlocal waiting
                for packet in packets:
                    packet.duration = lengths.pop(packet.pts, packet.duration)
                    while waiting and waiting[0] <= packet.dts * packet.time_base:
                        out.mux(waiting[1])
                        waiting = next(sound, None)
                    out.mux(packet)

            def write(rgb, ticks, length):
                rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(
                    format="yuv420p", dst_colorspace="itu709", dst_color_range="MPEG", interpolation=SWS)
                frame.pts, frame.time_base, lengths[ticks] = ticks, tick, length
                mux(stream.encode(frame))

            yield write
            mux(stream.encode(None))
            while waiting:
                out.mux(waiting[1])
                waiting = next(sound, None)
        os.replace(part, path)
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def write_video(path, video, fps, audio=None):
    """Write video (1, F, 3, H, W) in [-1, 1] as H.264 mp4 at `fps`; audio: a Clip (from `probe`) whose sound is copied."""
    fps = Fraction(fps).limit_denominator(1001)
    height, width = video.shape[-2:]
    with video_writer(path, width, height, fps, 1 / fps, audio=(audio,) if audio else None) as write:
        for i, frame in enumerate(video[0]):
            write(to_rgb(frame), i, 1)

# ---------------------------------------------------------------------------------------------------------------------
# editing

def edit_stream(ed, frames, instruction, steps=20, s_txt=None, s_src=None, seed=0, mode="auto", sampler="ddim",
                on_step=None):
    """Edit a clip of any length: iterable of source frames (3, H, W) in [-1, 1] -> generator of edited ones.

    Windows of 16 frames: after the first, 4 of them are references, the last frames already edited, and 12 are new; at
    the end, references fill the places that no new frame takes. A clip of up to 16 frames is one pass, `ed.edit`.
    Source: InsV2V (Cheng et al. 2023), long video sampling.
    """
    mode = ed.default_mode if mode == "auto" else mode
    frames, done, anchor = iter(frames), 0, None
    known = deque(maxlen=WINDOW)                                            # (z_src, z0) of the last frames
    while True:
        room = WINDOW if done == 0 or mode == "image" else WINDOW - REFERENCES
        new = [frame for _, frame in zip(range(room), frames)]
        if not new:
            return
        n_ref = 0 if mode == "image" else min(done, WINDOW - len(new))
        z_src = ed.encode(torch.stack(new)[None])                           # (1, F_new, c, h, w)
        refs = [known[len(known) - n_ref + i] for i in range(n_ref)]
        both = torch.cat([z for z, _ in refs] + [z_src], dim=1)             # references come first
        z_T = ed.noise(both.shape[1], *both.shape[3:], seed, first=done - n_ref, mode=mode)
        if mode == "ffg" and anchor is None:
            anchor = ed.anchor(z_src[:, :1], instruction, z_T[:, :1], steps, s_txt, s_src, sampler)
        z0 = ed.sample(both, instruction, z_T, steps, s_txt, s_src, mode, sampler, anchor=anchor,
                       z0_ref=torch.cat([z for _, z in refs], dim=1) if refs else None, on_step=on_step)[:, n_ref:]
        known.extend(zip(z_src.split(1, dim=1), z0.split(1, dim=1)))
        done += len(new)
        yield from ed.decode(z0)[0]


def window_starts(n_frames, mode):
    """First new frame of every window of `edit_stream`: 0, 16, 28, 40, ..."""
    return [0] + list(range(WINDOW, n_frames, WINDOW if mode == "image" else WINDOW - REFERENCES))


def seam_score(edit_change, source_change, joins):
    """How much more the edit changes where two windows meet than elsewhere; 1 is no seam, lower is better, None: no join.

    edit_change, source_change: mean absolute change from frame i to i + 1, at index i (F - 1 values); joins: the first
    frames of the windows after the first. Each change is taken relative to the source's own, so motion cancels.
    """
    ratio = [e / max(s, 1 / 255) for e, s in zip(edit_change, source_change)]
    at = [r for i, r in enumerate(ratio) if i + 1 in joins]
    off = [r for i, r in enumerate(ratio) if i + 1 not in joins]
    return float(np.mean(at) / max(np.mean(off), 1e-6)) if at and off else None

# ---------------------------------------------------------------------------------------------------------------------
# detail

def carry_detail(source_low, edit_low, source_full, radius=2, ridge=0.003, tau=0.2):
    """Carry an edit up to the source's resolution: fit colours in small windows, apply the fit to the large source.

    source_low, edit_low (N, 3, h, w) and source_full (N, 3, H, W), all in [-1, 1] -> (N, 3, H, W). In each window of
    2 radius + 1 pixels, edit = A source + b, A a full 3x3 matrix (least squares, pulled by `ridge` towards the fit of
    the whole frame). Where the fit leaves more than about `tau` unexplained, the plainly resized edit shows.
    Source: guided upsampling, after He et al. 2010 (Guided Image Filtering, eq. 14-18 for colour guides).
    """
    s, e = source_low, edit_low

    def box(x):                                                             # mean over each window
        y = F.avg_pool2d(x.flatten(1, -3), 2 * radius + 1, 1, radius, count_include_pad=False)
        return y.view_as(x)

    def outer(x, y):
        return x[:, :, None] * y[:, None]                                   # (N, 3, 3, h, w)

    eye = torch.eye(3, device=s.device)
    weight = torch.ones_like(s[:, :1])                                      # the whole frame's fit, outliers put down
    for _ in range(5):
        total = weight.sum((2, 3), keepdim=True)
        ms, me = ((weight * x).sum((2, 3), keepdim=True) / total for x in (s, e))
        css = torch.einsum("nihw,njhw->nij", weight * (s - ms), s - ms) / total[..., 0] + 1e-3 * eye
        ces = torch.einsum("nihw,njhw->nij", weight * (e - me), s - ms) / total[..., 0] + 1e-3 * eye
        whole = torch.linalg.solve(css, ces, left=False)                    # (N, 3, 3)
        off = (e - me - torch.einsum("nij,njhw->nihw", whole, s - ms)).square().mean(1, keepdim=True)
        weight = 1 / (1 + off / tau ** 2) ** 2

    ms, me = box(s), box(e)
    css = box(outer(s, s)) - outer(ms, ms) + ridge * eye[..., None, None]
    ces = box(outer(e, s)) - outer(me, ms)
    trust = box(torch.exp(-off / tau ** 2))[:, None]                        # does this place follow the whole frame?
    ces_pulled = ces + ridge * trust * whole[..., None, None]
    rows = css.unbind(1)                                                    # inverse of a symmetric 3x3, closed form
    minors = torch.stack([torch.linalg.cross(rows[(i + 1) % 3], rows[(i + 2) % 3], dim=1) for i in range(3)], dim=1)
    inverse = minors / (rows[0] * minors[:, 0]).sum(1)[:, None, None]
    a = torch.einsum("nikhw,nkjhw->nijhw", ces_pulled, inverse)
    b = me - torch.einsum("nijhw,njhw->nihw", a, ms)
    left = box((e - torch.einsum("nijhw,njhw->nihw", box(a), s) - box(b)).square().mean(1, keepdim=True))
    fits = torch.exp(-left / tau ** 2)

    size = source_full.shape[-2:]
    a, b, fits = (F.interpolate(x.flatten(1, -3), size, mode="bilinear") for x in (box(a), box(b), fits))
    fit = torch.einsum("nijhw,njhw->nihw", a.view(len(s), 3, 3, *size), source_full) + b
    plain = F.interpolate(e, size, mode="bicubic", antialias=True)
    return plain.lerp(fit, fits).clamp(-1, 1)

# ---------------------------------------------------------------------------------------------------------------------
# command

def parse(argv=None):
    parser = argparse.ArgumentParser(description="Edit a video by instruction.")
    def fail(message):
        raise UserError(f"{message} (see --help)")
    parser.error = fail
    parser.add_argument("video", help="mp4, mov, webm, mkv, gif, ... or a folder of numbered frames")
    parser.add_argument("instruction", nargs="+", help='what to change, e.g. "make it snow"; several make several videos')
    # model
    parser.add_argument("--model", default="auto", choices=["auto", "tiny", "sd15"], help="which editor")
    parser.add_argument("--weights", help="directory in hub layout, trained run or its model.safetensors, instead of --model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default bfloat16 on CUDA, else float32")
    # clip
    parser.add_argument("--start", type=Fraction, default=0, metavar="S", help="seconds into the clip")
    parser.add_argument("--end", type=Fraction, default=-1, metavar="S", help="seconds into the clip (-1: to its end)")
    parser.add_argument("--fps", type=Fraction, default=-1, help="resample to this rate, e.g. 8 or 30000/1001 (-1: as it is)")
    parser.add_argument("--frames", type=int, default=-1, help="edit this many frames at most (-1: all)")
    parser.add_argument("--size", type=int, default=-1, help="short side of the model's frame, pixels (-1: the model's own)")
    # edit
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--text-cfg", type=float, help="how strongly to follow the instruction, 1 to 30")
    parser.add_argument("--source-cfg", type=float, help="how closely to keep to the source, 0 to 10 (1.2 to 2 is usual)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same file")
    parser.add_argument("--sampler", default="ddim", choices=["ddim", "dpm"], help="dpm is good with 10 to 12 steps")
    parser.add_argument("--mode", default="auto", choices=["auto", "image", "ffg", "video"],
                        help="frame by frame; guided by the first frame, no training needed; trained video layers")
    parser.add_argument("--no-detail", action="store_true", help="resize the edit plainly, without the source's detail")
    # output
    parser.add_argument("--out", help="mp4 to write, or a folder for several (default: beside the source)")
    parser.add_argument("--compare", action="store_true", help="also write source and edit side by side")
    parser.add_argument("--grid", action="store_true",
                        help="no video: a picture of the first frame's edit over both guidance scales, to choose them by")
    parser.add_argument("--verbose", action="store_true", help="also print the seam score")
    args = parser.parse_args(argv)
    ranges = {"start": (0, 1e6), "steps": (1, 1000), "text_cfg": (0, 30), "source_cfg": (0, 10), "seed": (0, 2 ** 32 - 1)}
    optional = {"end": (0, 1e6), "fps": (0.1, 240), "frames": (1, 10 ** 7), "size": (16, 2048)}         # -1: not given
    for name, (low, high) in (ranges | optional).items():
        value = getattr(args, name)
        if value is None or (name in optional and value == -1):
            continue
        if not low <= value <= high or value != value:
            raise UserError(f"--{name.replace('_', '-')} {float(value):g}: must lie between {low:g} and {high:g}")
    args.end, args.fps = (None if x == -1 else x for x in (args.end, args.fps))
    if args.end is not None and args.end <= args.start:
        raise UserError(f"--end {float(args.end):g}: must come after --start {float(args.start):g}")
    for text in args.instruction:
        if not text.strip():
            raise UserError('instruction "": is empty; say what to change, e.g. "make it snow"')
    device = torch.device(args.device).type if re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", args.device or "cpu") else None
    if device is None or (device == "mps" and not torch.backends.mps.is_available()) or \
            (device == "cuda" and (torch.device(args.device).index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device {args.device}: not on this machine; pass cpu" + ", cuda" * torch.cuda.is_available())
    return args


def choose_model(model, weights, device, root=Path(__file__).parent):
    """(source for VideoEditor.from_pretrained, why): what --weights or --model say, else the newest run that fits the
    device, else sd15 on a GPU, else tiny."""
    if weights:
        if not Path(weights).exists():
            raise UserError(f"--weights {weights}: no such file or directory; "
                            "pass a directory in hub layout, a trained run or its model.safetensors")
        return weights, "as --weights says"
    if model != "auto":
        return model, "as --model says"
    gpu = device != "cpu" and (torch.cuda.is_available() or torch.backends.mps.is_available())
    runs = [f for f in root.glob("runs/*/*/model.safetensors") if re.match(r"image|round", f.parent.name)]
    runs = [f for f in runs if gpu or f.parent.parent.name != "sd15"]
    if runs:
        newest = max(runs, key=lambda f: f.stat().st_mtime).parent
        return str(newest), "the newest trained run here; --model tiny or sd15 takes another"
    if gpu:
        return "sd15", "there is a GPU; --model tiny is the small one"
    return "tiny", "no GPU here; --model sd15 is the large one"


def output_paths(video, instructions, out, ending):
    """One path per instruction: video_make-it-snow.mp4 beside the source, or where --out says."""
    video, out = Path(video), Path(out) if out else None
    if out and out.suffix.lower() in (".mp4", ".png") and not out.is_dir():
        if len(instructions) > 1:
            raise UserError(f"--out {out}: one file for {len(instructions)} instructions; pass a folder")
        if out.suffix.lower() != Path(ending).suffix:
            raise UserError(f"--out {out}: this writes {Path(ending).suffix} files")
        paths = [out]
    else:
        if out and not out.is_dir():
            raise UserError(f"--out {out}: not an mp4 file name and not an existing folder")
        paths, stem = [], (video.resolve().name if video.is_dir() else video.stem)
        for text in instructions:
            slug = re.sub(r"\W+", "-", text.lower()).strip("-_")[:60].strip("-") or "edit"
            path = (out or video.resolve().parent if video.is_dir() else out or video.parent) / f"{stem}_{slug}{ending}"
            paths.append(path if path not in paths else path.with_stem(f"{path.stem}-{len(paths) + 1}"))
    for path in paths:
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written: {path.parent} is not a folder one can write to; see --out")
        if path.is_dir() or path.resolve() == video.resolve():
            raise UserError(f"--out {path}: is the source or a folder; pass another name")
    return paths


def check_words(ed, instruction):
    """Print a warning for an instruction that the model cannot take as it is."""
    words = instruction.split()
    if len(words) > 1 and torch.equal(ed.tokenize([instruction]), ed.tokenize([" ".join(words[:-1])])):
        print(f'warning: "{instruction[:40]}..." is longer than 77 tokens; its end is cut off', file=sys.stderr)
    new = sorted({w for w in re.findall(r"[^\W\d]+", instruction.lower()) if ed.words and w not in ed.words})
    if new:
        print(f'warning: {ed.name} was not trained on {", ".join(new)}; it knows, for example: '
              + "; ".join(ed.examples or []), file=sys.stderr)


def grid_sheet(ed, frame, instruction, s_txt, s_src, steps, seed, sampler, path):
    """Write a labelled PNG: the edit of one frame (3, H, W) over text guidance (rows) and source guidance (columns)."""
    texts = [round(s_txt * k, 2) for k in (0.5, 0.75, 1, 1.5)]
    sources = [round(max(s_src + d, 0), 2) for d in (-0.3, 0, 0.3, 0.6)]
    size, font = max(128, frame.shape[-1]), ImageFont.load_default(14)
    scale = size / frame.shape[-1]
    cell, margin = (size, round(frame.shape[-2] * scale)), 24
    sheet = Image.new("RGB", (110 + (cell[0] + 4) * len(sources), 2 * margin + (cell[1] + 4) * len(texts)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), f'"{instruction}"'[:sheet.width // 8], fill="black", font=font)
    for j, source in enumerate(sources):
        draw.text((112 + j * (cell[0] + 4), margin + 2), f"--source-cfg {source:g}", fill="black", font=font)
    for i, text in enumerate(tqdm(texts, desc="grid", unit="row")):
        draw.text((2, 2 * margin + i * (cell[1] + 4) + cell[1] // 2), f"--text-cfg\n{text:g}", fill="black", font=font)
        for j, source in enumerate(sources):
            video = ed.edit(frame[None, None], instruction, steps, text, source, seed, mode="image", sampler=sampler)
            picture = Image.fromarray(to_rgb(video[0, 0])).resize(cell, Image.Resampling.BICUBIC)
            sheet.paste(picture, (110 + j * (cell[0] + 4), 2 * margin + i * (cell[1] + 4)))
    part = path.with_name(f".{path.stem}.{os.getpid()}.part")
    sheet.save(part, format="PNG")
    os.replace(part, path)


def edit_file(ed, clip, span, size, instruction, path, compare, detail, options):
    """Edit one clip into one file (and its comparison), streaming. Returns (frames written, seam score or None).

    span: (start, end, fps, count) of the frames; size: (height, width) of the model's frame; options: steps, s_txt,
    s_src, seed, mode, sampler as `edit_stream` takes them.
    """
    times, tick, lengths = plan(clip, *span)
    start, end, fps, count = span
    first = times[0] if not fps and start else 0                            # a cut clip starts at 0
    begin = start if fps else first * clip.tick
    until = None if end is None and count == -1 else begin + (times[-1] - first + lengths[-1]) * tick
    audio = (clip, begin, until) if clip.audio else None
    mode = ed.default_mode if options["mode"] == "auto" else options["mode"]
    joins = window_starts(len(times), mode)[1:]
    waiting, change, before = deque(), ([], []), None

    def small_frames():
        for _, rgb in read_frames(clip, *span):
            waiting.append((rgb, resize(to_tensor(rgb), *size)))
            yield waiting[-1][1]

    rate = fps or clip.rate
    def writer(path, width):
        return video_writer(path, width, clip.height, rate, tick, clip.pixel, audio)

    bar = tqdm(total=(len(joins) + 1) * options["steps"], desc=instruction[:30], unit="step", dynamic_ncols=True)
    with bar, writer(path, clip.width) as write, (writer(compare, 2 * clip.width) if compare else nullcontext()) as pair:
        edited = edit_stream(ed, small_frames(), instruction, **options, on_step=lambda i: bar.update())
        for i, (ticks, length, edit) in enumerate(zip(times, lengths, edited)):
            rgb, small = waiting.popleft()
            if detail:
                full = carry_detail(small[None].to(edit), edit[None], to_tensor(rgb)[None].to(edit))[0]
            else:
                full = resize(edit, clip.height, clip.width)
            full = to_rgb(full)
            write(full, ticks - first, length)
            if compare:
                pair(np.concatenate([rgb, full], axis=1), ticks - first, length)
            now = edit.cpu(), small
            for c, a, b in zip(change, before or (), now):
                c.append(float((a - b).abs().mean()))
            before = now
    return i + 1, seam_score(*reversed(change[::-1]), joins)


def peak_memory(device):
    """The most memory held so far, for printing."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GB GPU memory"
    import resource                                                         # not on Windows, hence here
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20):.2f} GB"


def main(argv=None):
    args = parse(argv)
    began = time.time()
    clip = probe(args.video, args.fps or 24)
    span = args.start, args.end, args.fps, args.frames
    times, _, _ = plan(clip, *span)
    paths = output_paths(args.video, args.instruction, args.out, "_grid.png" if args.grid else ".mp4")
    source, why = choose_model(args.model, args.weights, args.device)
    print(f"model: {source} ({why})")
    ed = VideoEditor.from_pretrained(source, device=args.device, dtype=args.dtype)
    height, width = size = model_size(clip, ed.size if args.size == -1 else args.size, ed.multiple)
    s_txt, s_src = (d if s is None else s for s, d in zip((args.text_cfg, args.source_cfg), ed.guidance))
    print(f"{clip.path}: {len(times)} frames of {clip.width}x{clip.height}, edited at {width}x{height} on {ed.device}")
    options = dict(steps=args.steps, s_txt=s_txt, s_src=s_src, seed=args.seed, mode=args.mode, sampler=args.sampler)
    try:
        for instruction, path in zip(args.instruction, paths):
            check_words(ed, instruction)
            if args.grid:
                frame = resize(to_tensor(next(read_frames(clip, *span))[1]), height, width)
                grid_sheet(ed, frame, instruction, s_txt, s_src, args.steps, args.seed, args.sampler, path)
                print(f"{path}: choose a cell and pass its --text-cfg and --source-cfg")
                continue
            compare = path.with_stem(path.stem + "_compare") if args.compare else None
            n, seam = edit_file(ed, clip, span, size, instruction, path, compare, not args.no_detail, options)
            took, began = time.time() - began, time.time()
            print(f"{path}: {n} frames in {took:.1f} s, peak memory {peak_memory(ed.device)}"
                  + (f"; side by side: {compare}" if compare else ""))
            if args.verbose:
                print("seams: none, one window" if seam is None else f"seam score {seam:.2f} (1 is none)")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory with frames of {width}x{height}: lower --size (or pass --device cpu)") from None


if __name__ == "__main__":
    run(main)
