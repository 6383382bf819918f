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
