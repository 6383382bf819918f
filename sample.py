"""Edit a video by instruction: python sample.py video.mp4 "make it snow"

Contents:
  reading    Clip, probe, shown, plan, read_frames, read_video         any file PyAV opens, a folder of frames
  writing    mux_sound, video_writer, write_video                      H.264 in mp4, the source's sound copied
  editing    edit_stream                                               any length in windows, constant memory
  detail     carry_detail, edit_pictures                               the edit at the source's resolution
  flags      option, add_flags, between, editor_flags, choose_model    for the scripts above this one, too
  command    parse, output_paths, grid_sheet, edit_file, main

Videos are (1, F, 3, H, W) in [-1, 1], single frames (3, H, W) in [-1, 1], and rgb is (H, W, 3) uint8. Times
inside a clip are whole ticks of its time base, counted from its first frame.
"""
import argparse
import math
import os
import re
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from itertools import chain, islice, pairwise, product, repeat, takewhile, tee
from itertools import count as counting
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from model import (N_FRAMES, ROOT, UserError, VideoEditor, aside, merge_lora_file, need, reading, resize, run,
                   to_rgb, to_tensor)

WINDOW, REFERENCES = N_FRAMES, 4    # frames per pass, and how many of them the previous pass has finished
NAME_BYTES = 220            # of a file's name; 255 at most, less what is added: _compare.mp4, a number, .part
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp",
          ".ogv")
MP4_AUDIO = ("aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "libopus", "flac")  # copied as they are
OPAQUE = "its transparency is dropped, mp4 holds none; lay it over a background first to choose what shows"
EXACT = (Interpolation.BICUBIC | Interpolation.ACCURATE_RND         # when colours are converted
         | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP)

# ---- reading -----------------------------------------------------------------------------------------------

@dataclass
class Clip:
    """What `probe` finds in a file or folder: enough to plan the whole edit before a model is loaded."""
    path: Path
    width: int                      # upright, after the rotation that the metadata asks for
    height: int
    rate: Fraction                  # average frames per second
    tick: Fraction                  # seconds per tick
    times: list                     # ticks of every frame, ascending from 0
    last: int                       # ticks that the last frame is shown
    pictures: list | None = None    # the files of a folder, in order
    start: Fraction = Fraction(0)   # the first frame's time stamp in the file, seconds
    stamped: bool = True      # packets say when each frame is shown; else frames come in the order of `times`
    turns: int = 0                  # quarter turns counterclockwise that make a decoded frame upright
    mirrored: bool = False          # and a flip after them
    pixel: Fraction = Fraction(1)   # width / height of one pixel
    audio: bool = False
    filters: tuple = ()             # FFmpeg's, for decoded frames: (name, arguments)
    notes: tuple = ()               # what of it an edit cannot keep
    missing: str = ""               # why the file's end cannot be read

    @property
    def seconds(self):
        return (self.times[-1] + self.last) * self.tick


@contextmanager
def open_video(path):
    """(PyAV container, its video stream). Raises UserError for what cannot be opened or shows nothing."""
    with reading(path, "is it a whole video? pass an mp4, mov, webm, mkv or gif file, or a folder of frames"):
        container = av.open(f"file:{path}", metadata_errors="replace")
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        kinds = ", ".join(sorted({s.type for s in container.streams} - {"video"})) or "nothing to show"
        need(streams and container.format.name != "tty", f"no video in it, only {kinds}")  # FFmpeg draws text
        need(streams[0].codec_context, "its video codec is not known to this FFmpeg")
    with container:
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def orientation(frame):
    """(quarter turns counterclockwise, mirrored) that make a decoded frame upright; see `upright`."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:                                           # side data of a kind that PyAV does not know
        matrix = None
    m = np.frombuffer(bytes(matrix), np.int32).astype(float) if matrix else np.ones(9)
    return round(frame.rotation / 90) % 4, bool(m[0] * m[4] - m[1] * m[3] < 0)


def upright(rgb, turns, mirrored):
    rgb = np.rot90(rgb, turns)
    return np.ascontiguousarray(np.flip(rgb, turns % 2) if mirrored else rgb)


def read_image(file, name=None, mode="RGB"):
    """rgb of a path or file object, upright as its EXIF says; UserError where it is missing or broken."""
    with reading(name or file), Image.open(file) as picture:
        one = picture.format == "MPO" or not getattr(picture, "is_animated", False)     # MPO: a phone's jpeg
        need(one, "holds several pictures; save them as a gif or as a folder of png files")
        picture = ImageOps.exif_transpose(picture)
        need(picture.mode != "F", "holds floating point, of any range; save it with 8 or 16 bits")
        if picture.mode.startswith("I"):                          # 16 bits, which Pillow's convert would clip
            picture = Image.fromarray(np.rint(np.asarray(picture).clip(0, 65535) / 257).astype(np.uint8))
        return np.array(picture.convert(mode))


def frame_files(folder):
    """The pictures of a folder in the order of their numbers: 2.png before 10.png."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGES and f.name[0] != "."]
    odd = next((f.name for f in files if not f.is_file()), "")
    with reading(folder):
        need(not odd, f"{odd} is not a file")                       # a pipe would be waited for
    return sorted(files, key=lambda f: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", f.name)])


def probe(path, rate=24):
    """Clip of a video, of a folder of frames, which play at `rate` per second, or of one picture.

    Raises UserError for a path that is missing, empty, no video, without frames, or with times that start
    anew.
    """
    path = Path(path)
    with reading(path):
        files = frame_files(path) if path.is_dir() else [path]
        need(files, "no frames in this folder; it should hold numbered png or jpg files")
        need(files[0].stat().st_size, "an empty file (0 bytes)")
    if files[0].suffix.lower() not in IMAGES:
        return probe_file(path)
    rate, rgba = Fraction(rate), read_image(files[0], mode="RGBA")
    height, width, _ = rgba.shape
    return Clip(path, width, height, rate, 1 / rate, times=list(range(len(files))), last=1, pictures=files,
                notes=(OPAQUE,) if rgba[..., 3].min() < 255 else ())


class Packet(NamedTuple):
    """What a packet of a video tells before it is decoded, in ticks."""
    stamp: int              # when it is shown, or else decoded
    duration: int
    decoded: int            # when
    exact: bool             # it says when it is shown
    empty: bool             # the picture before it is shown on


def decoded(packet):
    """The frames that come out of a decoder: none for an empty packet, as Theora has for a still moment."""
    return packet.decode() if packet.size or packet.dts is None else []


def read_packets(container, stream):
    """(the stream's first frame, its packets, seconds until the last stream ends, whether it broke off)."""
    frame, packets, end, cut = None, [], 0.0, False
    try:
        for packet in container.demux():
            ours = packet.stream_index == stream.index
            if ours and frame is None:
                frame = next(iter(decoded(packet)), None)
            stamp, duration = packet.dts if packet.pts is None else packet.pts, packet.duration or 0
            if stamp is not None:
                end = max(end, float((stamp + duration) * packet.time_base))
            if ours and not packet.is_discard and (packet.size or stamp is not None):
                packets.append(Packet(stamp, duration, packet.dts, packet.pts is not None, not packet.size))
    except av.FFmpegError:                                          # what came so far can be used
        cut = True
    return frame, packets, end, cut


def probe_file(path):
    """Clip of a video file: reads all its packets, decodes one frame."""
    with open_video(path) as (container, stream):
        frame, packets, end, cut = read_packets(container, stream)
        kind, codec, tick = container.format.name, stream.codec_context.name, stream.time_base
        pixel = stream.sample_aspect_ratio or Fraction(1)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        audio, alpha = bool(container.streams.audio), stream.metadata.get("alpha_mode") == "1"
        length, begin = ((t or 0) / av.time_base for t in (container.duration, container.start_time))
        if kind.startswith("matroska"):     # has no table of frames, but a length: from 0 or from its start
            slack = max(0.25, 1.5 / rate)
            cut = cut or (abs(length - end) > slack and length - (end - begin) > slack)
        else:
            length += begin
        cut = cut or any(entry.pos + entry.size > path.stat().st_size for entry in stream.index_entries)
    with reading(path):
        need(frame, "holds no frames that can be decoded")
        stamps = [packet.decoded for packet in packets if packet.decoded is not None]
        restart = next((a for a, b in pairwise(stamps) if (a - b) * tick > 1), None)
        need(restart is None, f"its time stamps start anew after {float((restart or 0) * tick):.1f} s, like "
             "those of joined files; write it anew first (ffmpeg -i IN -c copy OUT.mp4)")
    alpha = alpha or convert(path, frame, "rgba")[..., 3].min() < 255
    notes, filters = [OPAQUE] if alpha else [], []
    if frame.color_trc in (16, 18):                                 # PQ or HLG
        notes.append("is HDR, its colours will look flat; convert it to SDR")
    if frame.interlaced_frame:
        filters.append(("bwdif", "send_frame:auto:interlaced"))
    if codec in ("vp8", "vp9", "theora"):                   # do not say where; FFmpeg takes centre
        filters.append(("setparams", "chroma_location=left"))
    one = max(1, round(1 / rate / tick))
    timed = [packet for packet in packets if packet.stamp is not None]
    if not timed:                                                   # a bare stream
        timed = [Packet(k * one, one, None, False, False) for k in range(len(packets))]
    times = sorted({packet.stamp for packet in timed if not packet.empty})
    final = max(timed, key=lambda packet: packet.stamp)
    last = final.stamp + final.duration - times[-1]
    first, (turns, mirrored) = times[0], orientation(frame)
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    return Clip(
        path, width, height, rate, tick, [t - first for t in times], last=last or one,
        stamped=kind != "avi" and all(packet.exact for packet in packets),     # avi counts packets, not times
        start=first * tick, turns=turns, mirrored=mirrored, pixel=1 / pixel if turns % 2 else pixel,
        audio=audio, filters=tuple(filters), notes=tuple(notes),
        missing=f"cut short, it announces {length:.1f} s and ends at {end:.1f} s" if cut else "")


def decode(clip, since=0):
    """Yields (ticks, av.VideoFrame) of a video in order, if it can from the key frame before `since` s."""
    before = -1
    with open_video(clip.path) as (container, stream):
        sought = since > 1 and container.format.name.startswith(("mov", "matroska"))
        if sought:
            container.seek(int((clip.start + since) * av.time_base))
        try:
            frames = chain.from_iterable(map(decoded, container.demux(stream)))
            for k, frame in enumerate(through(clip.filters, frames, stream) if clip.filters else frames):
                if clip.stamped and frame.pts is not None:
                    ticks = frame.pts - round(clip.start / clip.tick)
                else:
                    ticks = clip.times[k] if k < len(clip.times) else before + 1
                if sought and k == 0 and ticks * clip.tick > since:     # some containers seek too far
                    break
                before = max(ticks, before + 1)                     # broken files repeat time stamps
                yield before, frame
        except av.FFmpegError as error:
            raise UserError(f"{clip.path}: damaged after {float((before + 1) * clip.tick):.2f} s "
                            f"({error.strerror}); pass --end to edit what comes before") from None
    if sought and before == -1:
        yield from decode(clip)


def through(filters, frames, stream):
    """Decoded frames through FFmpeg's filters."""
    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(template=stream), *(graph.add(name, how) for name, how in filters),
                     graph.add("buffersink")).configure()
    for frame in chain(frames, [None]):
        graph.vpush(frame)
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                out = graph.vpull()
                out.pts = out.pts and round(out.pts * out.time_base / stream.time_base)     # it halves ticks
                yield out


def shown(frames, tick, moments):
    """Yields what is on screen at each of `moments`, ascending seconds: the one meaning of that here.

    frames: (ticks, x) in order; the first is shown from the start, each until the next comes, the last on.
    """
    slack = min(tick, Fraction(1, 500))             # webm rounds its times to milliseconds, mov to 1/600 s
    moments, held = iter(moments), None
    moment = next(moments, None)
    for ticks, x in frames:
        while held and moment is not None and moment < ticks * tick - slack:
            yield held[0]
            moment = next(moments, None)
        if moment is None:
            return
        held = [x]
    while held and moment is not None:
        yield held[0]
        moment = next(moments, None)


def select(frames, clip, start=0, end=None, fps=None, count=-1):
    """The frames asked for, `count` at most. frames: iterable of (ticks, x) in order; start, end in seconds.

    Yields (ticks, x) with start <= time < end as they are; with fps, (k, x) where x is shown at start + k /
    fps.
    """
    end = min(end or clip.seconds, clip.seconds)
    if fps:
        moments = takewhile(lambda t: t < end, (start + k / fps for k in counting()))
        chosen = enumerate(shown(frames, clip.tick, moments))
    else:
        early = takewhile(lambda frame: frame[0] * clip.tick < end, frames)
        chosen = (frame for frame in early if frame[0] * clip.tick >= start)
    return chosen if count == -1 else islice(chosen, count)


def plan(clip, start=0, end=None, fps=None, count=-1):
    """(times, tick, lengths) of all frames that `select` will give: ticks, seconds per tick, ticks each.

    Raises UserError for a range without frames, or one that reaches into the missing end of a file cut short.
    """
    times = [t for t, _ in select(((t, t) for t in clip.times), clip, start, end, fps, count)]
    if not times:
        raise UserError(f"--start {float(start):g} --end {float(end or clip.seconds):g}: no frames there, "
                        f"{clip.path} lasts {float(clip.seconds):.2f} s")
    if clip.missing:
        good = sum(1 for _ in select(decode(clip, start), clip, start, end, fps, count))
        if good < len(times) or (good != count and (end is None or end > clip.seconds)):
            remedy = f", pass --frames {good} to edit those" if good else ""
            raise UserError(f"{clip.path}: {clip.missing}; {good} frames can be read{remedy}")
    if fps:
        return times, 1 / fps, [1] * len(times)
    after = next((t for t in clip.times if t > times[-1]), clip.times[-1] + clip.last)
    if end is not None:
        after = max(times[-1] + 1, min(after, math.ceil(end / clip.tick)))
    return times, clip.tick, [b - a for a, b in pairwise([*times, after])]


def read_frames(clip, start=0, end=None, fps=None, count=-1):
    """Yields (ticks, rgb) of the frames that `select` chooses, upright. One frame in memory at a time."""
    frames = zip(clip.times, clip.pictures) if clip.pictures else decode(clip, start)
    for ticks, frame in select(frames, clip, start, end, fps, count):
        yield ticks, folder_frame(clip, frame) if clip.pictures else video_frame(clip, frame)


def folder_frame(clip, file):
    rgb = read_image(file)
    height, width, _ = rgb.shape
    with reading(file, "frames of one clip need one size"):
        need((height, width) == (clip.height, clip.width),
             f"{width}x{height}, where {clip.pictures[0].name} is {clip.width}x{clip.height}")
    return rgb


def video_frame(clip, frame):
    width, height = (clip.height, clip.width) if clip.turns % 2 else (clip.width, clip.height)
    return upright(convert(clip.path, frame, "rgb24", width, height), clip.turns, clip.mirrored)


def convert(path, frame, mode, width=None, height=None):
    """A decoded frame as an array; mode: "rgb24" or "rgba"."""
    hd = frame.width >= 1280 or frame.height > 576                  # as mpv guesses where no tag says which
    matrix = "itu709" if hd and frame.colorspace == 2 and not frame.format.is_rgb else None
    hint = f"its colours (matrix {int(frame.colorspace)}) cannot be converted; write it anew as BT.709"
    with reading(path, hint):
        return frame.to_ndarray(format=mode, width=width, height=height, interpolation=EXACT,
                                src_colorspace=matrix)


def read_video(path, size=None, start=0, end=None, fps=None, frames=-1, multiple=8):
    """A short clip as a whole: (video (1, F, 3, H, W) in [-1, 1], frames per second as float).

    size: short side in pixels to resize to, both sides multiples of `multiple`; None keeps the file's own.
    start, end in seconds; fps resamples; frames limits their number (-1: all). Raises UserError for what
    cannot be read.
    """
    # 0.2 is not quite 1/5
    start, end, fps = (Fraction(x).limit_denominator(10 ** 6) if x else x for x in (start, end, fps))
    clip, span = probe(path, fps or 24), (start, end, fps, frames)
    plan(clip, *span)
    height, width = clip.height, clip.width
    if size:
        height, width = model_size(height, width * clip.pixel, size, multiple)
    video = [resize(to_tensor(rgb), height, width) for _, rgb in read_frames(clip, *span)]
    return torch.stack(video)[None], float(fps or clip.rate)


def model_size(height, width, size, multiple):
    """(height, width) of the model's frame: short side near `size`, multiples of `multiple`, the shape of a
    picture of `height` x `width` square pixels."""
    short, long = sorted((height, width))
    height, width = (max(1, round(side * size / short / multiple)) * multiple for side in (height, width))
    if max(height, width) > 4096:
        narrow = long > 128 * short
        remedy = "no side of a clip may be over 128 times the other" if narrow else "pass a lower --size"
        raise UserError(f"--size {size}: frames of {width}x{height} are too large; {remedy}")
    return height, width

# ---- writing -----------------------------------------------------------------------------------------------

def add_sound(out, source):
    """(track of `out` for the stream `source`, whether its packets are copied, else encoded to AAC)."""
    need(source.codec_context, "its codec is not known to this FFmpeg")
    name, rate, layout = source.codec_context.name, source.rate, source.layout.name
    need(rate and source.channels, "its rate and channels are not known")
    copied = name in MP4_AUDIO and (rate >= 16000 or not name.startswith("mp3"))   # slower mp3 is not for mp4
    if source.channels == 1:
        layout = "mono"
    elif source.channels == 2 or layout.endswith("channels"):       # nobody says which: the first two
        layout = "stereo"
    if copied:
        track = out.add_stream_from_template(source)
    else:
        track = out.add_stream("aac", rate=48000, layout=layout)
    track.disposition = source.disposition
    track.metadata.update(source.metadata)                          # its language
    return track, copied


def mux_sound(clip, out, begin=0, end=None):
    """Write the clip's sound between begin and end (seconds; None: all of it) to `out`, where it starts at 0.

    Generator of seconds: a packet is written when the next is asked for; the tracks are there after the
    first. Packets that mp4 can hold are copied bit for bit, others encoded to AAC; the default track comes
    first, as some players know no other. A cut falls on the nearest packet (about 20 ms). What cannot be
    used, or comes with a time that has passed, is left out and said: a picture is not lost for its sound.
    """
    with reading(clip.path), av.open(f"file:{clip.path}", metadata_errors="replace") as container:
        default, tracks, lost = av.stream.Disposition.default, {}, 0
        for source in sorted(container.streams.audio, key=lambda s: not s.disposition & default):
            try:
                tracks[source.index] = add_sound(out, source)
            except ValueError as error:                             # FFmpeg's "invalid" is one, too
                print(f"warning: {clip.path}: sound track {source.index} is left out: {error}",
                      file=sys.stderr)
        shift, before = clip.start + begin, {}
        ours = [container.streams[i] for i in tracks]
        for packet in container.demux(ours) if ours else ():
            track, copied = tracks[packet.stream.index]
            try:
                found = [packet] if copied else packet.decode()     # a packet, or the frames in it
            except av.FFmpegError:
                lost += 1
                continue
            for x in found:
                if x.pts is None:
                    continue
                if x.pts < before.get(track, x.pts - 1) + copied:   # short decoded frames share a time
                    lost += 1
                    continue
                before[track] = x.pts
                seconds = x.pts * x.time_base - shift
                middle = seconds + (x.duration or 0) * x.time_base / 2
                if (begin and middle < 0) or (end is not None and middle >= end - begin):
                    continue
                x.pts -= round(shift / x.time_base)
                if copied:
                    x.dts, x.stream = x.pts, track
                yield seconds
                try:
                    out.mux(x if copied else track.encode(x))
                except av.InvalidDataError:
                    lost += 1
        for track, copied in tracks.values():
            if not copied:
                out.mux(track.encode(None))
    if lost:
        print(f"warning: {clip.path}: {lost} unusable packets of its sound are left out", file=sys.stderr)


def to_yuv420(rgb):
    """rgb, height and width even -> av.VideoFrame, BT.709. A colour sample lies where players look for it if
    no tag says more: on every other pixel of a row, half way between two rows."""
    frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(
        format="yuv444p", dst_colorspace="itu709", dst_color_range="MPEG", interpolation=EXACT)
    yuv = frame.to_ndarray()                                        # (3, H, W)
    rows = yuv[1:, ::2].astype(np.uint16) + yuv[1:, 1::2]
    rows = np.pad(rows, ((0, 0), (0, 0), (1, 0)), mode="edge")
    colours = (rows[..., :-1:2] + 2 * rows[..., 1::2] + rows[..., 2::2] + 4) // 8
    planes = np.concatenate([yuv[0].ravel(), colours.ravel()]).astype(np.uint8)
    return av.VideoFrame.from_ndarray(planes.reshape(-1, rgb.shape[1]), "yuv420p")


@contextmanager
def video_writer(path, width, height, rate, tick, pixel=1, audio=None):
    """H.264 in mp4: yields write(rgb, ticks, length in ticks). The file appears when all is written.

    rate: average frames per second; tick: seconds per tick; audio: (clip, begin, end) whose sound is added.
    4:2:0 needs even sizes, so an odd last row or column is shown twice. Raises UserError where nothing can be
    written.
    """
    lengths, fast = {}, {"movflags": "+faststart"}
    try:
        with aside(path) as part, av.open(f"file:{part}", "w", format="mp4", options=fast) as out:
            stream = out.add_stream("libx264", rate=Fraction(rate).limit_denominator(60000),
                                    options={"crf": "16", "bf": "0"})       # mp4 then holds each duration
            stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            coder = stream.codec_context
            stream.time_base = coder.time_base = tick
            coder.sample_aspect_ratio = pixel
            coder.color_primaries = coder.color_trc = coder.colorspace = 1  # bt709
            coder.color_range = 1                                           # 16 to 235, as players expect
            sound = mux_sound(audio[0], out, *audio[1:]) if audio else iter(())
            heard = next(sound, math.inf)

            def mux(packets):
                nonlocal heard
                for packet in packets:
                    while heard <= packet.dts * tick:               # sound keeps pace with the pictures
                        heard = next(sound, math.inf)
                    packet.duration = lengths.pop(packet.pts)
                    out.mux(packet)

            def write(rgb, ticks, length):
                frame = to_yuv420(np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
                frame.pts, frame.time_base, lengths[ticks] = ticks, tick, length
                mux(stream.encode(frame))

            yield write
            mux(stream.encode(None))
            deque(sound, maxlen=0)                                          # what is left of it
    except (OSError, av.FFmpegError) as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def write_video(path, video, fps, audio=None):
    """Write video (1, F, 3, H, W) in [-1, 1] as H.264 mp4, with the sound of the Clip `audio`."""
    fps, (height, width) = Fraction(fps).limit_denominator(1001), video.shape[-2:]
    sound = (audio,) if audio and audio.audio else None
    with video_writer(path, width, height, fps, 1 / fps, audio=sound) as write:
        for i, frame in enumerate(video[0]):
            write(to_rgb(frame), i, 1)

# ---- editing -----------------------------------------------------------------------------------------------

def edit_stream(ed, frames, instruction, steps=None, seed=0, mode="auto", with_source=False, on_step=None,
                first=None, **scales):
    """Edit a clip of any length: iterable of source frames (3, H, W) in [-1, 1] -> generator of edited ones.

    Windows of 16 frames: after the first, 4 of them are references, the last frames already edited, and 12
    are new; at the end, references fill the places that no new frame takes. A clip of up to 16 frames is one
    pass, `ed.edit`. Where frames do not see each other there is nothing to refer to, and windows just follow
    one another. scales: s_txt, s_src. with_source: yield (edited, source as the autoencoder returns it), for
    `carry_detail`. Source: InsV2V (Cheng et al. 2023), long video sampling correction; only for mode "video"
    with noise of each frame's own. With "ffg" the first frame already ties windows together, or else the one
    noise does, and the correction, which copies mean errors in place, made joins visible and clips worse from
    window to window.

    first: the first frame as it was edited elsewhere, (3, H, W). The others follow its trajectory by FFG-V2V,
    and the correction with it as the one reference of every window: without that they follow hardly.
    """
    mode = "ffg" if first is not None else ed.default_mode if mode == "auto" else mode
    frames, done, anchor, together = iter(frames), 0, None, frames_interact(ed, mode)
    known, n_known = deque(maxlen=WINDOW), REFERENCES               # (z_src, z0) of the last frames
    if first is not None:
        z_src, z_first = (ed.encode(x[None, None]) for x in (next(frames), first))
        z_T = ed.noise(1, *z_src.shape[3:], seed, mode=mode)
        anchor, together = ed.follow(z_src, z_first, z_T, steps), True
        done, n_known, known = 1, 1, [(z_src, anchor[1][-1])]
        yield (first, ed.decode(z_src * ed.vae.scaling_factor)[0, 0]) if with_source else first
    while True:
        new = list(islice(frames, WINDOW - n_known if done and together else WINDOW))
        if not new:
            return
        n_ref = min(done, WINDOW - len(new), len(known)) if together else 0
        refs = list(known)[len(known) - n_ref:]
        z_new = ed.encode(torch.stack(new)[None])                   # (1, F_new, c, h, w)
        z_src = torch.cat([z for z, _ in refs] + [z_new], dim=1)    # references come first
        z_T = ed.noise(z_src.shape[1], *z_src.shape[3:], seed, first=done - n_ref, mode=mode)
        if mode == "ffg" and anchor is None:
            anchor = ed.anchor(z_src[:, :1], instruction, z_T[:, :1], steps, **scales)
        z0_ref = None
        if refs and (first is not None or mode == "video" and not ed.same_noise):
            z0_ref = torch.cat([z for _, z in refs], dim=1)
        z0 = ed.sample(z_src, instruction, z_T, steps, **scales, mode=mode, anchor=anchor, z0_ref=z0_ref,
                       on_step=on_step)[:, n_ref:]
        if first is None:
            known.extend(zip(z_new.split(1, dim=1), z0.split(1, dim=1)))
        done += len(new)
        edited = ed.decode(z0)[0]
        yield from zip(edited, ed.decode(z_new * ed.vae.scaling_factor)[0]) if with_source else edited


def frames_interact(ed, mode):
    """Does a frame's edit depend on its window's others? Not in "image", nor in "ffg" without motion."""
    mode = ed.default_mode if mode == "auto" else mode
    return mode == "video" or (mode == "ffg" and hasattr(ed.unet, "motion_config"))

# ---- detail ------------------------------------------------------------------------------------------------

def carry_detail(source_low, edit_low, source_full, radius=2, ridge=0.005, tau=0.08):
    """Carry an edit up to the source's resolution: fit colours in small windows, apply that to the source.

    source_low, edit_low (N, 3, h, w) and source_full (N, 3, H, W), all in [-1, 1] -> (N, 3, H, W). In each
    window of 2 radius + 1 pixels edit = A source + b by least squares, A 3x3, pulled by `ridge` towards the
    whole frame's fit where the place follows it. Where the fit leaves much unexplained, against `tau` or
    against what it does explain, the plainly resized edit shows. source_low is best taken through the
    autoencoder, whose errors then cancel. Source: guided upsampling, after He et al. 2010 (Guided Image
    Filtering), eq. 14-16.
    """
    s, e = source_low, edit_low
    eye = ridge * torch.eye(3, device=s.device)[..., None, None]

    def box(x):                                                     # mean over the window around each pixel
        x, shape = x.flatten(1, -3), x.shape
        return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False).view(shape)

    weight = torch.ones_like(s[:, :1])
    for _ in range(5):                                          # the whole frame's fit, outliers weighed down
        whole, shift = fit_colours(s, e, lambda x: frame_mean(x, weight), eye, eye)
        off = (e - map_colours(whole, s) - shift).square().mean(1, keepdim=True)
        weight = 1 / (1 + off / tau ** 2) ** 2

    a, b = fit_colours(s, e, box, eye, ridge * (whole * box(torch.exp(-off / tau ** 2))[:, None]))
    a, b = box(a), box(b)                                          # every pixel averages the windows it is in
    low = map_colours(a, s) + b
    left = box((e - low).square().mean(1, keepdim=True))
    explained = (box(low.square()) - box(low).square()).mean(1, keepdim=True).clamp(min=0) + 1e-4
    trust = explained / (explained + left) * torch.exp(-left / tau ** 2)

    size = source_full.shape[-2:]
    a, b, trust = (F.interpolate(x.flatten(1, -3), size, mode="bilinear") for x in (a, b, trust))
    full = map_colours(a.unflatten(1, (3, 3)), source_full) + b
    return F.interpolate(e, size, mode="bicubic").lerp(full, trust).clamp(-1, 1)


def fit_colours(s, e, mean, ridge, pull):
    """Least squares e = A s + b under a mean over pixels. s, e (N, 3, h, w) -> A (N, 3, 3, ..), b."""
    ms, me = mean(s), mean(e)
    css = mean(s[:, :, None] * s[:, None]) - ms[:, :, None] * ms[:, None] + ridge
    ces = mean(e[:, :, None] * s[:, None]) - me[:, :, None] * ms[:, None] + pull
    rows = css.unbind(1)                                           # inverse of a symmetric 3x3 in closed form
    minors = torch.stack([torch.linalg.cross(rows[i - 2], rows[i - 1], dim=1) for i in range(3)], dim=1)
    inverse = minors / (rows[0] * minors[:, 0]).sum(1)[:, None, None]
    a = sum(ces[:, :, j, None] * inverse[:, None, j] for j in range(3))
    return a, me - map_colours(a, ms)


def map_colours(a, x):
    """a (N, 3, 3, h, w) on colours x (N, 3, h, w)."""
    return sum(a[:, :, j] * x[:, j, None] for j in range(3))


def frame_mean(x, weight):
    """Mean over a frame's pixels. x (N, ..., h, w), weight (N, 1, h, w) -> (N, ..., 1, 1)."""
    w = weight.view(len(x), *[1] * (x.ndim - 3), *x.shape[-2:])
    return (w * x).sum((-2, -1), keepdim=True) / w.sum((-2, -1), keepdim=True)


def edit_pictures(ed, pictures, size, instruction, detail=True, first=None, **options):
    """Edit rgb frames (H, W, 3) uint8 of any size and number -> generator of (edited rgb of that size, the
    model's frame of it and of the source (3, h, w) in [-1, 1]). size: (h, w) of the model's frame; detail:
    carry the edit up to the source's resolution, else resize it; first: the first frame's edit, rgb of any
    size, delivered as it is; options as `edit_stream` takes them. What the commands deliver.
    """
    frames, sources = tee((rgb, resize(to_tensor(rgb), *size)) for rgb in pictures)        # holds one window
    given = None if first is None else resize(to_tensor(first), *size)
    edits = edit_stream(ed, (small for _, small in frames), instruction, with_source=detail, first=given,
                        **options)
    for i, (edit, (rgb, small)) in enumerate(zip(edits, sources)):
        edit, source_low = edit if detail else (edit, None)
        if i == 0 and first is not None:
            full = resize(to_tensor(first), *rgb.shape[:2])
        elif detail:
            full = carry_detail(source_low[None], edit[None], to_tensor(rgb)[None].to(edit.device))[0]
        else:
            full = resize(edit, *rgb.shape[:2])
        if not torch.isfinite(full).all():
            raise UserError(f"{ed.name}: the edit holds NaN or Inf; is a weight file damaged?")
        yield to_rgb(full), edit.cpu(), small

# ---- flags -------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Its errors are UserErrors: one line, like every other mistake."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def option(default, help, low=None, high=None, choices=None, name=None):
    """A field of a settings dataclass that is a flag as well, see `add_flags`. low, high: its range, in which
    the default itself need not lie (-1: off); name: the flag, where it is not the field's own."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, name=name))


def add_flags(parser, settings):
    """A flag for every `option` of a dataclass: bool gets --sma and --no-sma, a tuple several values."""
    for f in fields(settings):
        if not f.metadata:                                          # code sets it, no flag
            continue
        about, value = f.metadata, getattr(settings, f.name)
        kind = next(t for t in (*get_args(f.type), f.type) if t is not type(None))
        how = dict(type=between(about["low"], about["high"], kind, value), choices=about["choices"])
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif get_origin(f.type) is tuple:
            how = dict(type=kind, nargs="+")
        shown = "" if value in (None, "", ()) or value is False else f" (default: {value})"
        parser.add_argument("--" + (about["name"] or f.name).replace("_", "-"), dest=f.name,
                            default=argparse.SUPPRESS, help=about["help"] + shown, **how)


def from_flags(settings, args):
    """`settings` with what was given on the command line."""
    given = {f.name: getattr(args, f.name) for f in fields(settings) if f.metadata and hasattr(args, f.name)}
    return replace(settings, **given)


def between(low, high=None, kind=float, off=None):
    """The type of a flag whose value lies in a range, NaN outside; `off` is allowed besides."""
    def read(text):
        value = kind(text)
        if value == off:
            return value
        if low is not None and not value >= low:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g}")
        if high is not None and not value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be {high:g} at most")
        return value
    read.__name__ = kind.__name__                                   # argparse names it: invalid int value
    return read


def number(text):
    """Exact seconds or frames per second: "8", "29.97" or "30000/1001"."""
    try:
        value = Fraction(text)
    except ZeroDivisionError:
        raise ValueError(text) from None
    return value.limit_denominator(60000)           # more digits of 30000/1001 than a container's clock takes


def lora(text):
    """The type of --lora: (file, strength)."""
    file, colon, strength = text.rpartition(":")
    try:
        return (file, float(strength)) if colon else (text, 1.0)
    except ValueError:                                              # a name with a colon in it
        return text, 1.0


def known_device(name):
    """The type of --device: one that this machine has."""
    known = ["cpu"]
    if torch.backends.mps.is_available():
        known.append("mps")
    if torch.cuda.is_available():
        known += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name}: this machine has {', '.join(known)}")
    return name


def editor_flags(parser):
    """Which editor, and how it edits: the same here and in metrics.py. See `settings`."""
    add = parser.add_argument
    add("--model", default="auto", choices=["auto", "tiny", "sd15"], help="which editor")
    add("--weights", help="hub id, directory in hub layout, or a trained run")
    add("--size", type=between(32, 2048, int, -1), default=-1, help="short side of the model's frame, pixels "
        "(-1: the model's own)")
    add("--steps", type=between(1, 1000, int), help="sampling steps (default: the model's own: 20, tiny 5)")
    add("--text-cfg", type=between(0, 30), help="how strongly to follow the text (default: the model's)")
    add("--source-cfg", type=between(0, 10), help="how closely to keep to the source (default: the model's)")
    add("--seed", type=between(0, 2 ** 32 - 1, int), default=0, help="of the noise: same seed, same file")
    add("--no-detail", action="store_true", help="resize the edit plainly, without the source's detail")


def settings(args, ed):
    """(short side of the model's frame, {steps, s_txt, s_src, seed}): as flags say, else the editor's own."""
    asked, own = (args.steps, args.text_cfg, args.source_cfg), (ed.steps, *ed.guidance)
    steps, s_txt, s_src = (b if a is None else a for a, b in zip(asked, own))
    size = ed.size if args.size == -1 else args.size
    return size, dict(steps=steps, s_txt=s_txt, s_src=s_src, seed=args.seed)


def choose_model(model, weights, device, root=ROOT):
    """(source for VideoEditor.from_pretrained, why): what --weights or --model say, else the newest finished
    run that the device can carry, else sd15 on a GPU, else tiny."""
    if weights and model != "auto":
        raise UserError(f"--model {model} --weights {weights}: pass one of them")
    if weights:
        return weights, "as --weights says"
    if model != "auto":
        return model, "as --model says"
    gpu = device != "cpu" and (torch.cuda.is_available() or torch.backends.mps.is_available())
    runs = [f for f in root.glob("runs/*/*/model_index.json")       # written last
            if re.match("image|round", f.parent.name) and (gpu or f.parent.parent.name == "tiny")]
    if runs:
        newest = max(runs, key=lambda f: f.stat().st_mtime).parent
        return str(newest), "the newest trained run here; choose with --model tiny, --model sd15 or --weights"
    if gpu:
        return "sd15", "there is a GPU; --model tiny is the small one"
    return "tiny", "no GPU in use; --model sd15 is the large one"

# ---- command -----------------------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(description="Edit a video by instruction.")
    add = parser.add_argument
    add("video", help="mp4, mov, webm, mkv, gif, ... or a folder of numbered frames")
    add("instruction", nargs="+", help='what to change, e.g. "make it snow"; several make several videos')
    # model and edit
    editor_flags(parser)
    add("--motion", help="motion modules instead of the model's own: hub id, directory or AnimateDiff .ckpt")
    add("--device", type=known_device, help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--lora", type=lora, action="append", default=[], metavar="FILE[:STRENGTH]", help="a LoRA for "
        "the U-Net, merged on load, kohya's or peft's; several add up")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA, else float32")
    add("--mode", default="auto", choices=["auto", "image", "ffg", "video"], help="image: frame by frame; "
        "ffg: guided by the first frame, needs no training; video: trained video layers")
    # clip
    seconds = between(0, 1e6, number, -1)
    add("--start", type=seconds, default=0, metavar="S", help="seconds into the clip")
    add("--end", type=seconds, metavar="S", help="seconds into the clip (-1: to its end)")
    add("--fps", type=between(0.1, 240, number, -1), help="resample, e.g. to 8 or 30000/1001 (-1: as it is)")
    add("--frames", type=between(1, 10 ** 7, int, -1), default=-1, help="edit this many at most (-1: all)")
    # what may change
    add("--mask", metavar="FILE|DIR", help="picture or clip: only where it is white may the edit change "
        "a thing, elsewhere the source's pixels stay")
    add("--keep", metavar="FILE|DIR", help="picture or clip: where it is white the source's pixels stay")
    add("--first-frame", metavar="FILE", help="the first frame, edited with any tool; the clip follows it")
    # output
    add("--out", help="file to write, or an existing folder (default: beside the source)")
    add("--compare", action="store_true", help="also write source and edit side by side")
    add("--grid", action="store_true", help="a PNG of the first frame over both guidance scales, to choose")
    args = parser.parse_args(argv)
    args.end, args.fps = (None if x == -1 else x for x in (args.end, args.fps))
    if args.end is not None and args.end <= args.start:
        raise UserError(f"--end {float(args.end):g}: must come after --start {float(args.start):g}")
    if not all(text.strip() for text in args.instruction):
        raise UserError('instruction "": is empty; say what to change, e.g. "make it snow"')
    if args.grid and (args.compare or args.no_detail or args.mask or args.keep or args.mode != "auto"):
        raise UserError("--grid: edits one frame alone; leave out --compare, --mode, --no-detail and masks")
    if args.first_frame and (args.grid or args.mode not in ("auto", "ffg")):
        raise UserError("--first-frame: is followed in --mode ffg; leave out --grid and other modes")
    return args


def comparison(path):
    return path.with_stem(path.stem + "_compare")


def output_paths(clip, instructions, out, ending, compare=False):
    """One path per instruction: video_make-it-snow.mp4 beside the source, or where --out says."""
    source, out, paths = clip.path.resolve(), Path(out) if out else None, []
    if out and not out.is_dir():
        if len(instructions) > 1 or out.suffix.lower() != ending[-4:]:
            raise UserError(f"--out {out}: pass a folder or, for one instruction, a {ending[-4:]} file")
        paths = [out]
    else:
        folder = out or (source.parent if source.is_dir() else clip.path.parent)
        stem = source.name if source.is_dir() else source.stem
        for text in instructions:
            slug = re.sub(r"\W+", "-", text.lower())[:60].strip("-_") or "edit"
            while len(os.fsencode(f"{stem}_{slug}")) > NAME_BYTES:
                stem = stem[:-1]
            path = folder / f"{stem}_{slug}{ending}"
            paths.append(path if path not in paths else path.with_stem(f"{path.stem}-{len(paths) + 1}"))
    for path in [*paths, *map(comparison, paths if compare else ())]:
        if len(os.fsencode(path.stem)) > NAME_BYTES + 12:
            raise UserError(f"{path}: is too long a name; pass a shorter --out")
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_dir()
        if not writable or path.resolve() == source:
            raise UserError(f"{path}: cannot be written there (no folder, read-only, the source); see --out")
    return paths


def check_words(ed, instruction):
    """Print a warning for words that the model was not trained on."""
    words = set(re.findall(r"[^\W\d]+", instruction.lower()))
    if ed.words and words - ed.words:
        print(f"warning: {ed.name} was not trained on: {', '.join(sorted(words - ed.words))}; it knows, for "
              f"example: {'; '.join(ed.examples)}", file=sys.stderr)


def grid_sheet(ed, frame, instruction, path, options):
    """Write a labelled PNG: edits of one frame (3, H, W) over text (rows) and source guidance (columns)."""
    texts = [round(options["s_txt"] * k, 2) for k in (0.5, 0.75, 1, 1.5)]
    sources = [round(max(options["s_src"] + d, 0), 2) for d in (-0.3, 0, 0.3, 0.6)]
    width, top = max(256, frame.shape[-1]), 20                      # of a cell; room for its label
    height = round(frame.shape[-2] * width / frame.shape[-1])
    sheet = Image.new("RGB", (len(sources) * width, len(texts) * (height + top)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, (s_txt, s_src) in enumerate(tqdm(list(product(texts, sources)), desc="grid", unit="edit")):
        how = options | dict(s_txt=s_txt, s_src=s_src, mode="image")
        edit = Image.fromarray(to_rgb(ed.edit(frame[None, None], instruction, **how)[0, 0]))
        x, y = k % len(sources) * width, k // len(sources) * (height + top)
        draw.text((x + 4, y + 2), f"--text-cfg {s_txt:g} --source-cfg {s_src:g}", fill="black", font=font)
        sheet.paste(edit.resize((width, height), Image.Resampling.BICUBIC), (x, y + top))
    with aside(path) as part:
        sheet.save(part, format="PNG")


def may_change(clip, mask, keep, moments):
    """Yields (H, W, 1) in [0, 1]: how much the frames shown at `moments` (seconds) may change.

    mask, keep: paths or None, of pictures or clips that are white where the edit may show and where not; the
    pictures of a folder go with the clip's frames one by one. A border's ramp lies where change is allowed.
    """
    def white(path, times):
        film = probe(path)
        if film.pictures:
            film = replace(film, times=clip.times, tick=clip.tick)
        for rgb in shown(read_frames(film), film.tick, times):
            yield resize(to_tensor(rgb), clip.height, clip.width).mean(0, keepdim=True) > 0

    radius = max(1, min(clip.height, clip.width) // 100)
    moments, same = tee(moments)
    allowed = white(mask, moments) if mask else repeat(torch.ones(1, clip.height, clip.width, dtype=bool))
    kept = white(keep, same) if keep else repeat(torch.tensor(False))
    for a, k in zip(allowed, kept):
        free = (a & ~k).float()
        near = F.avg_pool2d(free, 2 * radius + 1, 1, radius, count_include_pad=False)
        yield (free * (2 * near - 1).clamp(min=0)).permute(1, 2, 0).numpy()


def blend(rgb, edit, share):
    """share (H, W, 1) in [0, 1] of the edit, the rest of the source's rgb; None: all of it."""
    return edit if share is None else np.rint(rgb + share * (edit.astype(np.float32) - rgb)).astype(np.uint8)


def edit_file(ed, clip, span, size, instruction, paths, masks, options):
    """Edit one clip into one file. Returns how many frames.

    span: (start, end, fps, count) of the frames; size: (height, width) of the model's frame; paths: of the
    edit and, or None, of source and edit side by side; masks: mask and keep of `may_change`; options: steps,
    s_txt, s_src, seed, mode, detail as `edit_pictures` takes them.
    """
    (start, end, fps, count), (path, compare) = span, paths
    times, tick, lengths = plan(clip, *span)
    zero = times[0] if start and not fps else 0                     # a cut clip starts at 0
    stop = times[-1] + lengths[-1]
    begin = start if fps else zero * tick
    until = None if end is None and count == -1 else begin + (stop - zero) * tick
    sound = (clip, begin, until) if clip.audio else None

    def writer(path, width):
        return video_writer(path, width, clip.height, fps or clip.rate, tick, clip.pixel, sound)

    new = WINDOW - REFERENCES if frames_interact(ed, options["mode"]) else WINDOW
    n_windows = 1 + math.ceil(max(0, len(times) - WINDOW) / new)
    small, sources = tee(read_frames(clip, *span))                  # holds one window
    shares = repeat(None)
    if any(masks):
        sources, timed = tee(sources)
        shares = may_change(clip, *masks, ((start if fps else 0) + ticks * tick for ticks, _ in timed))
    n, bar = 0, tqdm(total=n_windows * options["steps"], desc=instruction[:30], unit="step")
    both = writer(compare, 2 * clip.width) if compare else nullcontext()
    with bar, writer(path, clip.width) as write, both as write_both:
        edits = edit_pictures(ed, (rgb for _, rgb in small), size, instruction, **options,
                              on_step=lambda i: bar.update())
        frames = ((ticks, rgb, blend(rgb, edit, share))
                  for (edit, *_), (ticks, rgb), share in zip(edits, sources, shares))
        # a frame is shown until the next comes; the first from the start, even where that cannot be decoded
        for (ticks, rgb, edit), (later, *_) in pairwise(chain(frames, [(stop,)])):
            ticks, n = ticks if n else times[0], n + 1
            length = max(1, later - ticks)
            write(edit, ticks - zero, length)
            if compare:
                write_both(np.concatenate([rgb, edit], axis=1), ticks - zero, length)
        if not n:
            raise UserError(f"{clip.path}: none of {len(times)} frames there could be decoded")
    if n < len(times):
        print(f"warning: {clip.path}: {n} of {len(times)} frames could be decoded", file=sys.stderr)
    return n


def peak_memory(device):
    """The most memory held so far, for printing."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GB on the GPU"
    try:
        import resource
    except ModuleNotFoundError:
        return "unknown on Windows"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on a Mac, else KB
    return f"{used / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20):.2f} GB"


def main(argv=None):
    args, began = parse(argv), time.time()
    clip, span = probe(args.video, args.fps or 24), (args.start, args.end, args.fps, args.frames)
    n_frames = len(plan(clip, *span)[0])
    for note in clip.notes:
        print(f"warning: {clip.path}: {note}", file=sys.stderr)
    for path in filter(None, (args.mask, args.keep)):
        probe(path)                                                 # refuses it before the work begins
    first = args.first_frame and read_image(args.first_frame)
    if first is not None and abs(math.log(first.shape[0] / first.shape[1] * clip.width / clip.height)) > 0.05:
        raise UserError(f"--first-frame {args.first_frame}: is {first.shape[1]}x{first.shape[0]}, the clip's "
                        f"frames are {clip.width}x{clip.height}; it must have their shape")
    paths = output_paths(clip, args.instruction, args.out, "_grid.png" if args.grid else ".mp4", args.compare)
    source, why = choose_model(args.model, args.weights, args.device)
    print(f"model: {source} ({why})")
    ed = VideoEditor.from_pretrained(source, motion=args.motion, device=args.device, dtype=args.dtype)
    for file, strength in args.lora:
        merge_lora_file(ed.unet, file, strength)
    if args.mode == "video" and ed.default_mode != "video":
        raise UserError(f"--mode video: {source} has no trained video layers; use --mode ffg or image")
    short, options = settings(args, ed)
    height, width = size = model_size(clip.height, clip.width * clip.pixel, short, ed.multiple)
    print(f"{clip.path}: {n_frames} frames of {clip.width}x{clip.height}, edited at {width}x{height} "
          f"on {ed.device}")
    if n_frames > 100 * WINDOW:
        print(f"warning: that is {n_frames // WINDOW} passes of {options['steps']} steps at least, and takes "
              "as long as the bar says; --end, --frames or a lower --fps make it less", file=sys.stderr)
    for instruction, path in zip(args.instruction, paths):
        check_words(ed, instruction)
        if args.grid:
            _, rgb = next(read_frames(clip, *span))
            grid_sheet(ed, resize(to_tensor(rgb), height, width), instruction, path, options)
            print(f"{path}: choose a cell and pass its --text-cfg and --source-cfg")
            continue
        compare = comparison(path) if args.compare else None
        mode = "ffg" if args.first_frame else args.mode
        how = options | dict(mode=mode, detail=not args.no_detail, first=first)
        n = edit_file(ed, clip, span, size, instruction, (path, compare), (args.mask, args.keep), how)
        print(f"{path}: {n} frames in {time.time() - began:.1f} s, peak memory {peak_memory(ed.device)}"
              + (f"; side by side in {compare}" if compare else ""))
        began = time.time()


if __name__ == "__main__":
    run(main)
