"""Curation, and below it the world that the `tiny` model learns from.

Contents
  the shapes world     scenes drawn by code, with the exact target video of every edit: names and scenes,
                       canvases, shapes, rendering, effects and styles, captions and wordings, edits
  CogVideoX            the teacher that turns a frame into a clip: T5, transformer, causal 3-D VAE, samplers
  command line         python curate.py scene OUT: one scene and its true edit, as videos
"""
import argparse
import hashlib
import io
import math
import os
import re
import struct
import sys
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.io import wavfile
from scipy.ndimage import gaussian_filter, map_coordinates
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from tqdm import tqdm

from model import UserError, attention, hub_dir, load_weights, read_json, read_tensors, run, timestep_embedding
from sample import probe, write_video

# ----------------------------------------------------------------------------------------------------------
# The shapes world: procedurally drawn clips with captions, instructions and the true result of every edit.
# Lengths are in heights of the frame; x runs over [0, aspect], y downwards over [0, 1]; time is in seconds.
# ----------------------------------------------------------------------------------------------------------

TASKS = ("style", "object", "background", "multiple", "removal", "addition", "texture", "effect")

COLOURS = {"red": (.85, .12, .12), "orange": (.96, .55, .10), "yellow": (.97, .87, .15),
           "green": (.15, .65, .20), "cyan": (.10, .80, .85), "blue": (.13, .25, .85),
           "purple": (.52, .16, .70), "pink": (.97, .55, .75), "white": (.96, .96, .96),
           "black": (.06, .06, .06), "brown": (.48, .28, .12), "gray": (.50, .50, .50)}
KINDS = ("circle", "square", "triangle", "star", "heart", "ring", "diamond", "cross", "moon", "hexagon")
TEXTURES = {"plain": "", "striped": "stripes", "dotted": "dots", "checkered": "checks"}    # adjective -> noun
PLACES = {f"{row} {col}".replace("middle middle", "middle").strip(): (u, v)
          for row, v in (("top", .2), ("middle", .5), ("bottom", .8))
          for col, u in (("left", .2), ("middle", .5), ("right", .8))}

# Tones met in photographs; a natural background mixes two or three of them (chosen by eye, sRGB).
TONES = ((.53, .70, .88), (.25, .45, .72), (.35, .47, .20), (.16, .25, .13), (.50, .35, .22), (.85, .66, .54),
         (.45, .29, .21), (.80, .70, .52), (.50, .49, .47), (.25, .25, .27), (.90, .92, .95), (.60, .28, .20),
         (.10, .35, .45), (.45, .30, .42), (.90, .70, .35), (.06, .07, .12), (.92, .88, .80), (.70, .40, .12),
         (.20, .50, .48), (.75, .40, .45), (.62, .66, .70), (.72, .76, .45), (.32, .22, .14), (.97, .97, .97))

SKIES = {"a sunset sky": ((.35, .20, .50), (.98, .55, .20)), "a blue sky": ((.25, .50, .90), (.80, .92, 1.0)),
         "a night sky": ((.02, .02, .10), (.12, .16, .38)), "a pink sky": ((.62, .60, .90), (1.0, .75, .80))}
PAINT = ("plain", "gradient", "stripes", "checkerboard")    # known everywhere from a glimpse
OFTEN = ("plain",) * 3 + ("gradient",) * 2 + ("stripes", "checkerboard")


@dataclass(frozen=True)
class Shape:
    """One object. u is relative to the width, v to the height; `screen` objects ignore the camera."""
    kind: str
    colour: str                     # a key of COLOURS; "" for clutter, which no instruction names
    rgb: tuple                      # COLOURS[colour], slightly varied
    u: float
    v: float
    radius: float                   # of the height
    texture: str = "plain"
    angle: float = 0.0              # radians
    spin: float = 0.0               # radians per second
    motion: str = "still"           # still, line (bouncing at the borders), circle, sway
    speed: tuple = (0.0, 0.0)       # line: (u, v) per second; else: (amplitude in heights, radians / s)
    phase: float = 0.0
    shade: float = 0.0              # strength of the light's gradient over the object
    shadow: float = 0.0             # opacity of the soft shadow
    screen: bool = False


@dataclass(frozen=True)
class Background:
    kind: str                       # one of PAINT, or clouds, leaves, sand, grass, photo
    name: str                       # as captions and instructions say it
    rgb: tuple                      # one, two or three colours
    seed: int = 0                   # canvas and crop of the natural kinds
    period: float = 0.25            # stripes and squares, of the height
    angle: float = 0.0              # stripes
    contrast: float = 0.12          # natural kinds: standard deviation of the luminance
    chroma: float = 0.05            # and of the remaining colour axis
    scale: float = 0.4              # natural kinds: how much of a canvas fills the height
    blur: float = 0.0               # standard deviation, of the height
    light: tuple = (0.0, 0.0, 0.0)  # gradient to the right, gradient downwards, vignette
    horizon: float = -1.0           # photo: below it the third tone replaces the first; negative: nowhere
    calm: float = 1.0               # photo: contrast above the horizon relative to below, as a sky has
    rough: float = 0.3              # photo and leaves: share of 1/f noise beside the leaves


@dataclass(frozen=True)
class Camera:
    pan: tuple = (0.0, 0.0)         # amplitude in heights; zero offset at t = 0
    zoom: float = 0.0               # relative amplitude
    rate: float = 0.0               # radians per second
    phase: float = 0.0
    shake: float = 0.0              # amplitude in heights


@dataclass(frozen=True)
class Degrade:
    """What a real camera and file do to a clean picture."""
    noise: float = 0.0              # standard deviation, of full scale
    jpeg: int = 95                  # quality as Pillow counts it
    flicker: float = 0.0            # relative amplitude
    blur: float = 0.0               # standard deviation, of the height


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip, free of resolution. `post` holds (name in EFFECTS or STYLES, seed)
    pairs, applied in order to the degraded frames: the target of an effect is that effect of the source."""
    seed: int
    domain: str
    background: Background
    objects: tuple = ()
    clutter: tuple = ()
    camera: Camera = Camera()
    light: tuple = (-0.6, -0.8)     # where the light comes from, on screen
    degrade: Degrade | None = None
    post: tuple = ()


@dataclass(frozen=True)
class Edit:
    instruction: str
    task: str
    target: Scene
    source_caption: str
    target_caption: str
    deterministic: bool             # the target follows from source and instruction alone
    is_global: bool                 # every pixel may change


# ---- drawing scenes at random ----------------------------------------------------------------------------

def is_held_out(kind, colour):
    """The (kind, colour) pairs that training never shows, about 12 %, fixed by a hash."""
    return zlib.crc32(f"{colour} {kind}".encode()) % 8 == 3


def _far(a, b):
    return math.dist(a, b) > 0.3


def _pick_pair(rng, split, kinds, colours, avoid_rgb=()):
    """A (kind, colour) of those given that the split allows, its colour far from avoid_rgb if possible."""
    pairs = [(k, c) for k in kinds for c in colours if split == "held" or not is_held_out(k, c)]
    clear = [p for p in pairs if all(_far(COLOURS[p[1]], b) for b in avoid_rgb)]
    held = [p for p in clear if is_held_out(*p)]
    if held and rng.random() < 0.4:             # the held split asks for unseen pairs often, not always
        return rng.choice(held)
    return rng.choice(clear or pairs)


def _jitter(rng, rgb, by):
    return tuple(min(max(c + rng.uniform(-by, by), 0.0), 1.0) for c in rgb)


def _flat_background(rng, kind, exact=False, avoid=()):
    """A plain, gradient, striped or checkered background; `exact` (for edit targets): fixed by its name."""
    names = [c for c in COLOURS if c not in avoid]
    a, b = rng.sample(names, 2)
    while not _far(COLOURS[a], COLOURS[b]):
        a, b = rng.sample(names, 2)
    by = 0.0 if exact else 0.05
    rgb = _jitter(rng, COLOURS[a], by), _jitter(rng, COLOURS[b], by)
    if kind == "plain":
        return Background("plain", f"a {a} background", rgb[:1])
    if kind == "gradient":
        if rng.random() < 0.4:
            name = rng.choice(list(SKIES))
            return Background("gradient", name, tuple(_jitter(rng, c, by) for c in SKIES[name]))
        return Background("gradient", f"a gradient from {a} to {b}", rgb)
    period = 0.25 if exact else rng.uniform(0.16, 0.42)
    if kind == "checkerboard":
        return Background(kind, f"a {a} and {b} checkerboard", rgb, period=1.4 * period)
    angle = 0.0 if exact else rng.choice((0.0, math.pi / 2, math.pi / 4))
    return Background(kind, f"{a} and {b} stripes", rgb, period=period, angle=angle)


def _natural_background(rng, kind):
    """Clouds, leaves, sand, grass, or a photo-like mix, with its own crop of a canvas and its own colours."""
    seed = rng.getrandbits(31)
    if kind == "clouds":
        skies = (.30, .52, .85), (.45, .65, .90), (.35, .42, .60), (.55, .40, .55)
        top = _jitter(rng, rng.choice(skies), .08)
        white = _jitter(rng, (.93, .93, .95), .06)
        return Background(kind, "clouds", (top, white), seed, contrast=.03, scale=rng.uniform(.2, .5))
    if kind == "sand":
        tones = _jitter(rng, (.80, .69, .50), .06), _jitter(rng, (.66, .53, .36), .05)
        return Background(kind, "sand", tones, seed, contrast=rng.uniform(.04, .09), chroma=.01,
                          scale=rng.uniform(.5, .8))
    if kind == "grass":
        tones = _jitter(rng, (.30, .48, .15), .06), _jitter(rng, (.46, .60, .22), .06)
        return Background(kind, "grass", tones, seed, contrast=rng.uniform(.08, .14), chroma=.02,
                          scale=rng.uniform(.4, .6))
    if kind == "leaves":
        a, b = rng.choice((((.25, .42, .14), (.50, .60, .22)),      # green, autumn, shade
                           ((.55, .30, .10), (.82, .62, .20)),
                           ((.16, .30, .18), (.36, .46, .24))))
        return Background(kind, "leaves", (_jitter(rng, a, .06), _jitter(rng, b, .06)), seed,
                          contrast=rng.uniform(.08, .16), chroma=.04, scale=rng.uniform(.3, .6))
    # Photo-like: half of them muted, some colourful; dark and bright, sharp and blurred.
    tones = tuple(_jitter(rng, rng.choice(TONES), .08) for _ in range(3))
    if rng.random() < 0.35:                         # one family of tones, as in a close-up
        tones = tones[0], _jitter(rng, tones[0], .15), tones[2]
    elif rng.random() < 0.5:                        # muted: the second tone is pulled to the first
        tones = tones[0], tuple((2 * a + b) / 3 for a, b in zip(*tones[:2])), tones[2]
    return Background(
        "photo", "a natural scene", tones, seed, contrast=rng.uniform(.07, .24),
        chroma=rng.choice((.02, .04, .07, .14)), scale=rng.uniform(.12, .55),
        blur=rng.choice((0, 0, 0, .006, .012, .03)), calm=rng.choice((1, 1, .5, .15)),
        rough=rng.choice((.1, .3, .6, 1, 2.5)),
        light=(rng.uniform(-.5, .5), rng.uniform(-.6, .6), rng.choice((0, .2, .5, .8))),
        horizon=rng.uniform(.3, .75) if rng.random() < 0.45 else -1.0)


def draw_scene(seed, domain="synthetic", split="train"):
    """A random Scene, the same for the same arguments on every machine.

    domain "synthetic" is clean; "real" adds clutter, camera shake, flicker, sensor noise and JPEG blocks.
    split "held" has seeds of its own and also uses the (kind, colour) pairs that training never shows.
    """
    if domain not in ("synthetic", "real") or split not in ("train", "held"):
        raise ValueError(f"draw_scene: domain {domain!r} (synthetic, real), split {split!r} (train, held)")
    rng = Random(f"scene {split} {domain} {seed}")
    n_objects = 0 if rng.random() < 0.15 else rng.choice((1, 1, 2, 2, 2, 3, 3))
    # Scenes without objects teach the global edits, so they look like footage.
    if rng.random() < (0.28 if n_objects else 0.9):
        kind = rng.choice(("photo", "photo", "photo", "leaves", "clouds", "sand", "grass") if n_objects else
                          ("photo",) * 10 + ("leaves", "clouds", "sand", "grass"))
        background = _natural_background(rng, kind)
    else:
        background = _flat_background(rng, rng.choice(OFTEN))

    objects = []
    kinds, colours = list(KINDS), list(COLOURS)
    avoid = background.rgb[:2] if background.horizon < 0 else background.rgb
    for _ in range(n_objects):
        kind, colour = _pick_pair(rng, split, kinds, colours, avoid)
        kinds.remove(kind)
        colours.remove(colour)
        radius = rng.uniform(.11, .21 if n_objects < 3 else .16)
        u = v = 0.5
        for _ in range(12):                         # apart from the others at t = 0, where there is room
            u, v = rng.uniform(.17, .83), rng.uniform(.17, .83)
            if all(math.hypot(u - o.u, v - o.v) > radius + o.radius + .02 for o in objects):
                break
        else:
            continue
        motion = rng.choice(("still", "line", "line", "line", "circle", "sway"))
        heading, pace = rng.uniform(0, 2 * math.pi), rng.uniform(.05, .25)
        speed = ((pace * math.cos(heading), pace * math.sin(heading)) if motion == "line" else
                 (rng.uniform(.03, .12), rng.choice((-1, 1)) * rng.uniform(1, 4)))
        objects.append(Shape(
            kind, colour, _jitter(rng, COLOURS[colour], .05), u, v, radius,
            texture=rng.choice(("plain",) * 5 + ("striped", "dotted", "checkered")),
            angle=rng.uniform(-.4, .4), spin=rng.uniform(-1.5, 1.5) if rng.random() < .35 else 0.0,
            motion=motion, speed=speed, phase=rng.uniform(0, 2 * math.pi),
            shade=rng.uniform(.1, .35) if rng.random() < .5 else 0.0,
            shadow=rng.uniform(.25, .5) if rng.random() < .35 else 0.0))

    pan, turn = (rng.uniform(.01, .07), rng.uniform(0, 2 * math.pi)) if rng.random() < .5 else (0.0, 0.0)
    zoom = rng.uniform(.02, .1) if rng.random() < .3 else 0.0
    camera = Camera((pan * math.cos(turn), pan * math.sin(turn)), zoom, rng.uniform(.5, 1.5),
                    rng.uniform(0, 2 * math.pi))
    around = rng.uniform(math.pi, 2 * math.pi)      # light comes from above
    light = math.cos(around), math.sin(around)
    scene = Scene(seed, domain, background, tuple(objects), camera=camera, light=light)
    if domain == "synthetic":
        return scene
    clutter = tuple(
        Shape(rng.choice(("square", "circle", "triangle", "diamond")), "",
              _jitter(rng, rng.choice(TONES), .1), rng.uniform(-.05, 1.05), rng.uniform(-.05, 1.05),
              rng.uniform(.012, .04), angle=rng.uniform(0, 3))
        for _ in range(rng.randint(3, 12)))
    return replace(scene, clutter=clutter, camera=replace(camera, shake=rng.uniform(.002, .010)),
                   degrade=Degrade(rng.uniform(.005, .035), rng.randint(35, 85), rng.uniform(.01, .06),
                                   rng.choice((0, 0, .003, .006))))


# ---- canvases: natural-image statistics, made once per process -------------------------------------------

CANVAS, N_LEAVES, N_NOISE = 512, 40, 16


def _mips(x):
    """x (S, S, 3), unit variance -> [uint8 at S, S/2, ..., 16]: value = (byte - 128) / 36."""
    levels = []
    while True:
        levels.append(np.clip(np.rint(x * 36 + 128), 0, 255).astype(np.uint8))
        if len(x) == 16:
            return levels
        x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


@lru_cache(maxsize=None)
def _leaf_canvas(i):
    """Dead leaves (Lee, Mumford & Huang 2001): opaque discs and polygons with radii of density r^-p, each
    with a random value on three axes and shading on the first. A scene maps the axes to its colours."""
    rng = np.random.default_rng([1, i])
    n, r_min, power = CANVAS, rng.uniform(3, 9), rng.uniform(2.4, 3.4)
    count = int(min(3500, 900 * (9 / r_min) ** 1.5))
    r = r_min * (1 - rng.random(count) * (1 - (140 / r_min) ** (1 - power))) ** (1 / (1 - power))
    r[:60] = np.maximum(r[:60], 70)                 # cover the ground first
    x = np.zeros((n, n, 3), np.float32)
    for k in range(count):
        cy, cx, a = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(0, np.pi)
        y0, y1 = max(0, int(cy - r[k])), min(n, int(cy + r[k]) + 1)
        x0, x1 = max(0, int(cx - r[k])), min(n, int(cx + r[k]) + 1)
        dy, dx = (np.arange(y0, y1)[:, None] - cy) / r[k], (np.arange(x0, x1) - cx) / r[k]
        p, q = dx * np.cos(a) + dy * np.sin(a), dy * np.cos(a) - dx * np.sin(a)
        form, thin = rng.integers(3), rng.uniform(.35, 1)
        inside = (p * p + q * q / thin ** 2 < 1 if form == 0 else
                  np.maximum(abs(p), abs(q) / thin) < .72 if form == 1 else
                  (q < .5) & (abs(p) * 1.7 - q < .9))
        value = rng.standard_normal(3)
        shade = rng.uniform(-.6, .6) * p + rng.uniform(-.6, .6) * q
        patch = np.broadcast_to(value.astype(np.float32), inside.shape + (3,)).copy()
        patch[..., 0] += shade
        x[y0:y1, x0:x1][inside] = patch[inside]
    x = gaussian_filter(x, (.7, .7, 0))
    return _mips((x - x.mean((0, 1))) / x.std((0, 1)))


@lru_cache(maxsize=None)
def _noise_canvas(i):
    """Three channels of 1/f^p noise, p from 1 (rough) to 1.9 (soft)."""
    rng = np.random.default_rng([2, i])
    f = np.hypot(np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS)) + .5 / CANVAS
    spectrum = np.fft.rfft2(rng.standard_normal((3, CANVAS, CANVAS))) / f ** (1 + .9 * i / (N_NOISE - 1))
    x = np.fft.irfft2(spectrum).transpose(1, 2, 0)
    return _mips(((x - x.mean((0, 1))) / x.std((0, 1))).astype(np.float32))


def _sample(mips, ys, xs):
    """Bilinear values of a canvas at ys (H,), xs (W,) in canvas sides, mirrored outside -> (H, W, 3) float32.
    The mip level is the one whose pixels are just finer than the sampling step, against aliasing."""
    step = max(abs(ys[-1] - ys[0]) / max(len(ys) - 1, 1), abs(xs[-1] - xs[0]) / max(len(xs) - 1, 1)) * CANVAS
    level = mips[min(max(math.ceil(math.log2(max(step, 1)) - .5), 0), len(mips) - 1)]
    n = len(level)

    def taps(p):
        p = np.abs(np.mod(p + 1, 2) - 1) * n - .5   # mirror
        i = np.clip(np.floor(p).astype(int), 0, n - 2)
        return i, np.clip(p - i, 0, 1).astype(np.float32)

    (iy, fy), (ix, fx) = taps(ys), taps(xs)
    lo, hi = ix.min(), ix.max() + 2
    part = level[:, lo:hi]
    rows = part[iy] * (1 - fy)[:, None, None]
    rows += part[iy + 1] * fy[:, None, None]
    out = rows[:, ix - lo] * (1 - fx)[:, None]
    out += rows[:, ix + 1 - lo] * fx[:, None]
    out -= 128
    out *= 1 / 36
    return out


def _square_wave(phase, soft):
    """0 or 1 in turns, half a period each, with linear edges `soft` periods wide."""
    return np.clip((np.abs(np.mod(phase, 1) - .5) - .25) / max(soft, 1e-6) + .5, 0, 1)


def _draw_background(bg, ys, xs, aspect):
    """bg at world coordinates ys (H,), xs (W,) -> (H, W, 3) float32."""
    height, width = len(ys), len(xs)
    c = np.asarray(bg.rgb, np.float32)
    if bg.kind == "plain":
        return np.broadcast_to(c[0], (height, width, 3)).copy()
    if bg.kind == "gradient":
        m = np.clip(ys, 0, 1).astype(np.float32)[:, None, None]
        return np.broadcast_to(c[0] + m * (c[1] - c[0]), (height, width, 3)).copy()
    if bg.kind in ("stripes", "checkerboard"):
        soft = abs(ys[-1] - ys[0]) / max(height - 1, 1) / bg.period
        if bg.kind == "stripes":
            along = xs * math.cos(bg.angle) + ys[:, None] * math.sin(bg.angle)
            m = _square_wave(along / bg.period + .25, soft)
        else:
            a, b = _square_wave(xs / bg.period + .25, soft), _square_wave(ys / bg.period + .25, soft)
            m = a + b[:, None] - 2 * a * b[:, None]
        return c[0] + m[..., None].astype(np.float32) * (c[1] - c[0])

    rng = Random(bg.seed)
    flip = rng.choice((-1, 1))
    oy, ox = rng.uniform(.02, .98 - bg.scale), rng.uniform(.02, max(.04, .98 - bg.scale * 1.3))
    cy, cx = oy + ys * bg.scale, ox + xs[::flip] * bg.scale
    noise = _noise_canvas(rng.randrange(N_NOISE) if bg.kind == "photo" else
                          rng.randrange(9, N_NOISE) if bg.kind == "clouds" else rng.randrange(3))
    if bg.kind == "clouds":
        v = _sample(noise, cy, cx)
        m = np.clip(v[..., :1] * .4 + .45, 0, 1)
        m = m * m * (3 - 2 * m)
        out = c[0] + m * (c[1] - c[0]) + v[..., 1:2] * bg.contrast
    else:
        if bg.kind == "sand":
            v = _sample(noise, cy, cx)
        elif bg.kind == "grass":                    # blades: noise squeezed sideways
            v = _sample(noise, cy * .45, cx * 1.7)
        else:
            v = _sample(_leaf_canvas(rng.randrange(N_LEAVES)), cy, cx)
            v += bg.rough * _sample(noise, cy, cx)
            v /= math.sqrt(1 + bg.rough ** 2)
        # Linear from the three axes to RGB: luminance, from one tone to the other, a third colour.
        tint = np.array([rng.uniform(-1, 1) for _ in range(3)], np.float32)
        tint = (tint - tint.mean()) * bg.chroma / .5
        axes = np.stack([np.full(3, bg.contrast, np.float32), (c[1] - c[0]) * .35, tint])
        out = v @ axes
        if bg.horizon >= 0:                         # two halves of the picture around different tones
            m = 1 / (1 + np.exp(np.clip(-(ys - bg.horizon) * 18, -30, 30)))
            m = m.astype(np.float32)[:, None, None]
            out *= bg.calm + m * (1 - bg.calm)
            out += c[0] + m * (c[2] - c[0])
        else:
            out += (c[0] + c[1]) / 2
    if any(bg.light):
        gx, gy, vignette = bg.light
        dy, dx = (ys - .5)[:, None], (xs / aspect - .5)
        gain = (1 + gx * dx + gy * dy) * (1 - vignette * (dx * dx + dy * dy))
        out *= gain[..., None].astype(np.float32)
    if bg.blur:
        out = gaussian_filter(out, (bg.blur * height, bg.blur * height, 0), truncate=2.5, mode="nearest")
    return np.clip(out, 0, 1, out=out).astype(np.float32, copy=False)


# ---- shapes ----------------------------------------------------------------------------------------------

SDF_SIZE, SDF_REACH = 161, 1.4      # distance tables over [-1.4, 1.4]^2 in units of the radius


def _polygon_distance(points, x, y):
    """Signed distance (negative inside) of grid points to a closed polygon, points (n, 2)."""
    best, inside = np.full(x.shape, 9.0), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0)):
        ex, ey = bx - ax, by - ay
        s = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey + 1e-12), 0, 1)
        best = np.minimum(best, np.hypot(x - ax - s * ex, y - ay - s * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -best, best)


@lru_cache(maxsize=None)
def _sdf(kind):
    """The signed distance table of a kind, (SDF_SIZE, SDF_SIZE) float32, rows are y (down), unit radius."""
    axis = np.linspace(-SDF_REACH, SDF_REACH, SDF_SIZE)
    y, x = axis[:, None] + 0 * axis, axis + 0 * axis[:, None]
    disc = np.hypot(x, y)

    def corners(n, radii=(1.0,), turn=-math.pi / 2):
        a = turn + np.arange(n) * 2 * math.pi / n
        return np.stack([np.cos(a), np.sin(a)], 1) * np.resize(radii, n)[:, None]

    if kind == "circle":
        d = disc - .95
    elif kind == "ring":
        d = abs(disc - .72) - .24
    elif kind == "moon":                            # a disc with a bite
        d = np.maximum(disc - .98, .82 - np.hypot(x - .48, y + .1))
    elif kind == "square":
        d = _polygon_distance(np.array([(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]), x, y)
    elif kind == "triangle":
        d = _polygon_distance(corners(3, (1.1,)) + (0, .18), x, y)
    elif kind == "star":
        d = _polygon_distance(corners(10, (1.08, .46)), x, y)
    elif kind == "diamond":
        d = _polygon_distance(np.array([(0, -1.08), (.7, 0), (0, 1.08), (-.7, 0)]), x, y)
    elif kind == "hexagon":
        d = _polygon_distance(corners(6, (1.0,), 0.0), x, y)
    elif kind == "cross":
        a = .32
        d = np.minimum(np.maximum(abs(x) - a, abs(y) - 1), np.maximum(abs(y) - a, abs(x) - 1))
    else:
        s = np.linspace(0, 2 * math.pi, 60, endpoint=False)     # heart: the classic cosine curve
        up = (13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s)) / 16
        d = _polygon_distance(np.stack([np.sin(s) ** 3, -up - .12], 1), x, y)
    return d.astype(np.float32)


def _distance(kind, x, y, angle):
    """Signed distance in radii at offsets x (w,), y (h,) from the centre -> d, local x, y: (h, w) each."""
    ca, sa = math.cos(angle), math.sin(angle)
    lx, ly = ca * x + (sa * y)[:, None], -sa * x + (ca * y)[:, None]
    k = (SDF_SIZE - 1) / (2 * SDF_REACH)
    at = (ly + SDF_REACH) * k, (lx + SDF_REACH) * k
    return map_coordinates(_sdf(kind), at, order=1, mode="nearest"), lx, ly


def _bounce(p, lo=.12, hi=.88):
    span = hi - lo
    return lo + span - abs((p - lo) % (2 * span) - span)


def _position(s, t, aspect):
    """Centre of a shape at time t in world coordinates (x, y)."""
    u, v, dx, dy = s.u, s.v, 0.0, 0.0
    if s.motion == "line":
        u, v = _bounce(u + s.speed[0] * t), _bounce(v + s.speed[1] * t)
    elif s.motion != "still":
        swing, a = s.speed[0], s.speed[1] * t + s.phase
        dx = swing * (math.cos(a) - math.cos(s.phase))
        dy = swing * (math.sin(a) - math.sin(s.phase)) * (1 if s.motion == "circle" else 0.15)
    return u * aspect + dx, v + dy


def _view(camera, t):
    """Camera at time t: (pan x, pan y, zoom)."""
    wave = math.sin(camera.rate * t + camera.phase) - math.sin(camera.phase)
    sx = math.sin(31.0 * t + 1.3) + .7 * math.sin(53.0 * t + camera.phase) + .4 * math.sin(17.0 * t)
    sy = math.sin(37.0 * t + 2.1) + .7 * math.sin(47.0 * t - camera.phase) + .4 * math.sin(13.0 * t + .5)
    return (camera.pan[0] * wave + camera.shake * sx, camera.pan[1] * wave + camera.shake * sy,
            1 + camera.zoom * wave / 2)


def _texture_colour(rgb):
    """The second colour of stripes, dots and checks: white on dark colours, dark on light ones."""
    return (.96, .96, .96) if .299 * rgb[0] + .587 * rgb[1] + .114 * rgb[2] < .6 else (.12, .12, .14)


def _draw_shape(img, s, t, view, light, aspect):
    """Paint shape s over img (H, W, 3) in place, inside its bounding window only."""
    height, width = img.shape[:2]
    (cx, cy), r, zoom = _position(s, t, aspect), s.radius, view[2]
    if not s.screen:
        cx, cy = aspect / 2 + (cx - aspect / 2) * zoom - view[0], .5 + (cy - .5) * zoom - view[1]
        r *= zoom
    reach = r * 1.15 + 1 / height
    sx, sy = (-.22 * r * light[0], -.22 * r * light[1]) if s.shadow else (0.0, 0.0)
    soft = .16 if s.shadow else 0.0                 # the shadow's half width, in radii
    grow = soft * 1.5 * r
    y0 = max(0, int((cy + min(sy - grow, 0) - reach) * height))
    y1 = min(height, int((cy + max(sy + grow, 0) + reach) * height) + 2)
    x0 = max(0, int((cx + min(sx - grow, 0) - reach) * height))
    x1 = min(width, int((cx + max(sx + grow, 0) + reach) * height) + 2)
    if y0 >= y1 or x0 >= x1:
        return
    y = (((np.arange(y0, y1) + .5) / height - cy) / r).astype(np.float32)
    x = (((np.arange(x0, x1) + .5) / height - cx) / r).astype(np.float32)
    window = img[y0:y1, x0:x1]
    angle, px = s.angle + s.spin * t, 1 / (r * height)      # px: one pixel in radii
    if s.shadow:
        d = _distance(s.kind, x - sx / r, y - sy / r, angle)[0]
        window *= (1 - s.shadow * np.clip(.5 - d / (2 * soft), 0, 1))[..., None]
    d, lx, ly = _distance(s.kind, x, y, angle)
    colour = np.array(s.rgb, np.float32)
    if s.texture != "plain":
        if s.texture == "striped":
            m = _square_wave(lx / .5, px / .5)
        elif s.texture == "checkered":
            a, b = _square_wave(lx / .8, px / .8), _square_wave(ly / .8, px / .8)
            m = a + b - 2 * a * b
        else:
            m = np.clip((.19 - np.hypot(np.mod(lx, .55) - .275, np.mod(ly, .55) - .275)) / px + .5, 0, 1)
        colour = colour + m[..., None] * (np.array(_texture_colour(s.rgb), np.float32) - colour)
    if s.shade:
        colour = colour * (1 + s.shade * (light[0] * x + (light[1] * y)[:, None]))[..., None]
    window += np.clip(.5 - d / px, 0, 1)[..., None] * (colour - window)


# ---- rendering -------------------------------------------------------------------------------------------

def _degrade(img, how, seed, t):
    """Flicker, blur, sensor noise and JPEG blocks on one frame (H, W, 3). Noise and blocks live on the pixel
    grid, so they are finer in a larger picture, as with a real camera."""
    if how.blur:
        img = gaussian_filter(img, (how.blur * len(img), how.blur * len(img), 0), truncate=2.5)
    img = img * np.float32(1 + how.flicker * (math.sin(41.0 * t + seed % 7) + .6 * math.sin(23.0 * t)))
    rng = np.random.default_rng([seed % 2 ** 32, int(round(t * 1000)) % 2 ** 32])
    img = np.clip(img + rng.standard_normal(img.shape, np.float32) * np.float32(how.noise), 0, 1)
    file = io.BytesIO()
    Image.fromarray((img * 255 + .5).astype(np.uint8)).save(file, "JPEG", quality=how.jpeg)
    return np.asarray(Image.open(file), np.float32) / 255


def render(scene, n_frames=1, height=96, width=96, fps=8.0, t0=0.0):
    """Draw frames t0, t0 + 1/fps, ... of a scene -> float32 (n_frames, height, width, 3) in [0, 1].

    The same scene at another size is the same picture; another aspect sets the objects further apart.
    Equal times give equal frames, whatever clip they are part of."""
    times = t0 + np.arange(n_frames) / fps
    frames = np.empty((n_frames, height, width, 3), np.float32)
    aspect = width / height
    y, x = (np.arange(height) + .5) / height, (np.arange(width) + .5) / height
    for i, t in enumerate(times.tolist()):
        view = _view(scene.camera, t)
        img = _draw_background(scene.background, .5 + (y + view[1] - .5) / view[2],
                               aspect / 2 + (x + view[0] - aspect / 2) / view[2], aspect)
        for s in scene.clutter + scene.objects:
            _draw_shape(img, s, t, view, scene.light, aspect)
        if scene.degrade:
            img = _degrade(img, scene.degrade, scene.seed, t)
        frames[i] = img
    np.clip(frames, 0, 1, out=frames)
    for name, seed in scene.post:
        frames = (EFFECTS.get(name) or STYLES[name])(frames, times, seed)
    return frames


# ---- effects and styles: exact pixel operations on frames (F, H, W, 3) in [0, 1], for any footage --------

LUMA = np.array((.299, .587, .114), np.float32)         # ITU-R BT.601
# The sepia matrix in common use; rows are the new red, green, blue.
SEPIA = np.array(((.393, .769, .189), (.349, .686, .168), (.272, .534, .131)), np.float32)


def _luma(x):
    return (x @ LUMA)[..., None]


def _unit(x):
    return np.clip(x, 0, 1).astype(np.float32, copy=False)


def _rgb(*values):
    return np.array(values, np.float32)


def _blur(x, sigma):
    """Gaussian blur in space of (F, H, W, C), sigma in heights."""
    s = sigma * x.shape[1]
    return gaussian_filter(x, (0, s, s, 0), truncate=2.5, mode="nearest")


def _splat(shape, y, x, a):
    """Alpha (H, W, 1) of many soft dots: pixel indices y, x and opacities a, all of one shape."""
    height, width = shape
    ok = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    density = np.bincount((y * width + x)[ok], -np.log1p(-np.minimum(a, .995))[ok], height * width)
    return (1 - np.exp(-density)).reshape(height, width, 1).astype(np.float32)


def grayscale(x, times, seed):
    return np.repeat(_luma(x), 3, -1)


def sepia(x, times, seed):
    return _unit(x @ SEPIA.T)


def night(x, times, seed):
    return x * _rgb(.28, .34, .52)


def snow(x, times, seed):
    """White flakes of several depths fall over a paler, cooler picture."""
    _, height, width, _ = x.shape
    rng = np.random.default_rng([3, seed % 2 ** 32])
    n, span = 520, max(4.0, width / height)     # over a strip 4 heights wide: equally dense at any aspect
    px, py, depth, phase = rng.random(n) * span, rng.random(n), rng.random(n), rng.random(n) * 6.28
    r = .007 + .013 * depth ** 2                    # near flakes are larger, faster
    out = np.empty_like(x)
    for i, t in enumerate(times):
        fy = np.mod(py * 1.1 + (.12 + .3 * depth) * t, 1.1) - .05
        fx = np.mod(px + .03 * np.sin(1.5 * t + phase) + .04 * t, span)
        near = fx < width / height + .05
        cy, cx, rr = fy[near] * height - .5, fx[near] * height - .5, r[near] * height
        k = math.ceil(r.max() * height + 1)
        o = np.arange(-k, k + 1)
        gy, gx = np.rint(cy).astype(int)[:, None] + o, np.rint(cx).astype(int)[:, None] + o
        d = np.hypot((gy - cy[:, None])[:, :, None], (gx - cx[:, None])[:, None, :])
        rr, bright = rr[:, None, None], (.6 + .38 * depth[near])[:, None, None]
        a = np.clip((rr - d) / np.maximum(.7 * rr, 1) + .5, 0, 1) * bright      # soft discs
        gy, gx = np.broadcast_arrays(gy[:, :, None], gx[:, None, :])
        alpha = _splat((height, width), gy, gx, a)
        pale = x[i] + .3 * (_luma(x[i]) - x[i])
        pale = pale * .78 + _rgb(.19, .20, .22)
        out[i] = pale + alpha * (_rgb(.97, .98, 1) - pale)
    return _unit(out)


def rain(x, times, seed):
    """Slanted light streaks over a darker, cooler picture."""
    _, height, width, _ = x.shape
    rng = np.random.default_rng([4, seed % 2 ** 32])
    n, span, slant = 420, max(4.0, width / height), -.22
    px, py, depth = rng.random(n) * span, rng.random(n), rng.random(n)
    length = .06 + .10 * depth
    wide = np.maximum((.004 + .003 * depth) * height, .7)                       # half width in pixels
    out = np.empty_like(x)
    rows = np.arange(math.ceil(.16 * height) + 1)
    k = np.arange(-math.ceil(wide.max()), math.ceil(wide.max()) + 1)
    for i, t in enumerate(times):
        top = np.mod(py * 1.2 + (1.2 + .8 * depth) * t, 1.2) - .18
        left = np.mod(px + slant * (1.2 + .8 * depth) * t, span) - .1
        near = left < width / height + .1
        y = np.floor(top[near] * height).astype(int)[:, None] + rows            # (n, rows)
        cx = left[near][:, None] * height + slant * rows                        # each row's centre
        gx = np.rint(cx).astype(int)[..., None] + k                             # (n, rows, k)
        along = np.clip((rows / height) / length[near][:, None], 0, 1)          # brightest at the lower end
        a = np.clip(wide[near][:, None, None] - abs(gx - cx[..., None]) + .5, 0, 1)
        a = a * (along * (along < 1))[..., None]
        gy = np.broadcast_to(y[..., None], gx.shape)
        alpha = _splat((height, width), gy, gx, a * (.35 + .35 * depth[near])[:, None, None])
        wet = (x[i] + .25 * (_luma(x[i]) - x[i])) * _rgb(.66, .72, .80) + .02
        out[i] = wet + alpha * (_rgb(.86, .90, .96) - wet)
    return _unit(out)


def fog(x, times, seed):
    """Light gray over everything, thicker towards the top."""
    m = (.68 - .26 * (np.arange(x.shape[1], dtype=np.float32) + .5) / x.shape[1])[:, None, None]
    return x + m * (_rgb(.80, .82, .84) - x)


def sunset(x, times, seed):
    return _unit(x * _rgb(1.06, .78, .52) + _rgb(.08, .02, 0))


def winter(x, times, seed):
    return _unit((x + .4 * (_luma(x) - x)) * _rgb(.78, .92, 1.06) + _rgb(.05, .07, .10))


def invert(x, times, seed):
    return 1 - x


def brighter(x, times, seed):
    return 1 - (1 - x) ** np.float32(1.8)


def darker(x, times, seed):
    return x * np.float32(.5)


def vivid(x, times, seed):
    g = _luma(x)
    return _unit(g + 1.9 * (x - g))


def contrast(x, times, seed):
    return _unit((x - .5) * 1.7 + .5)


def faded(x, times, seed):
    return (x + .5 * (_luma(x) - x)) * .65 + np.float32(.22)


def blurry(x, times, seed):
    return _blur(x, .028)


def _area_matrix(n, cells):
    """(cells, n): each row averages one of `cells` equal parts of n pixels."""
    edge = np.arange(cells + 1) * n / cells
    lo, hi = np.maximum(edge[:-1, None], np.arange(n)), np.minimum(edge[1:, None], np.arange(1, n + 1))
    return (np.maximum(hi - lo, 0) * cells / n).astype(np.float32)


def pixel_art(x, times, seed):
    """24 rows of square blocks, each the mean of its pixels in eleven levels per channel."""
    _, height, width, _ = x.shape
    rows, cols = 24, max(1, round(24 * width / height))
    small = np.einsum("rh,fhwc->frwc", _area_matrix(height, rows), x, optimize=True)
    small = np.einsum("kw,frwc->frkc", _area_matrix(width, cols), small, optimize=True)
    small = np.rint(small * 10) / 10
    tall = small[:, np.arange(height) * rows // height]
    return tall[:, :, np.arange(width) * cols // width].astype(np.float32)


def _edges(x, sigma):
    """Gradient magnitude of (F, H, W, C) at scale sigma (in heights), in full scale per sigma."""
    b, s = _blur(x, sigma), sigma * x.shape[1]
    gy, gx = np.gradient(b, axis=(1, 2))
    return np.hypot(gy, gx) * s


def sketch(x, times, seed):
    """Dark strokes where the brightness changes, faint shading, white paper."""
    g = _luma(x)
    strokes, shading = 3.2 * np.maximum(_edges(g, .010) - .012, 0), .22 * (1 - _blur(g, .010)) ** 2
    return np.repeat(_unit(.97 - strokes - shading), 3, -1)


def poster(x, times, seed):
    """Smooth areas of five brightness levels with short ramps between them, strong colours, dark outlines."""
    b = _blur(x, .010)
    g = _luma(b)
    base = np.floor(g * 4)
    flat = (base + np.clip((g * 4 - base - .5) * 6 + .5, 0, 1)) / 4
    return _unit(flat + 1.5 * (b - g) - np.clip(3 * (_edges(g, .010) - .03), 0, .6))


def neon(x, times, seed):
    """Glowing edges on black, in the picture's own hues made pure."""
    b = _blur(x, .012)
    hue = b / (b.max(-1, keepdims=True) + .08)
    hue = np.clip(hue + 1.2 * (hue - hue.mean(-1, keepdims=True)) + .1, .05, 1)
    e = np.clip(4.5 * (_edges(x, .012).max(-1, keepdims=True) - .012), 0, 1)
    return _unit(np.maximum(e, .8 * _blur(e, .02)) * hue)


def watercolor(x, times, seed):
    """Soft pale washes with darker rims, on paper."""
    wash = _blur(x, .022)
    wash = wash + .35 * (wash - _luma(wash))
    rim = np.minimum(_edges(_luma(x), .016) * 1.2, .25)
    return _unit(.28 + .72 * wash - rim)


EFFECTS = {f.__name__: f for f in (grayscale, sepia, night, snow, rain, fog, sunset, winter, invert, brighter,
                                   darker, vivid, contrast, faded, blurry)}
STYLES = {"pixel art": pixel_art, "sketch": sketch, "cartoon": poster, "neon": neon, "watercolor": watercolor}
RANDOM_EFFECTS = ("snow", "rain")


# ---- captions and wordings -------------------------------------------------------------------------------

POST_CAPTION = {
    "grayscale": "in black and white", "sepia": "in sepia tones", "night": "at night", "snow": "in the snow",
    "rain": "in the rain", "fog": "in the fog", "sunset": "at sunset", "winter": "in winter",
    "invert": "in negative colors", "brighter": "in bright light", "darker": "in dark light",
    "vivid": "in vivid colors", "contrast": "with high contrast", "faded": "in faded colors",
    "blurry": "out of focus", "pixel art": "as pixel art", "sketch": "as a pencil sketch",
    "cartoon": "as a cartoon", "neon": "as a neon drawing", "watercolor": "as a watercolor painting"}

# {it} the clip, {o} the object, {c} colour, {a} new object with article, {p} place, {b} background, {x}
# texture noun, {d} texture adjective. Training wordings / held-out ones, which use the same words.
_WORDINGS = """
grayscale: make {it} grayscale; make {it} black and white; turn {it} into black and white; convert {it} to
    grayscale; remove all color; desaturate {it}; make {it} monochrome; take the color out of {it}; change
    {it} to black and white; make {it} a black and white film; make {it} gray; show {it} without color; drop
    the colors / convert {it} to black and white; turn {it} into grayscale; take away all color
sepia: make {it} sepia; turn {it} sepia; apply a sepia filter; give {it} sepia tones; make {it} look like an
    old photo; add a sepia tone to {it}; convert {it} to sepia; make {it} vintage; make {it} look like a
    vintage film; give {it} an old brown tone; sepia / change {it} to sepia; add a sepia filter to {it};
    give {it} an old sepia look
night: make {it} night; make it night time; turn day into night; change {it} to night; make {it} look like
    night; set {it} at night; show {it} at night; let it be night; make it a dark night; make {it} happen at
    night; change the time to night; turn {it} into a night scene; night / turn {it} into night; change the
    time of day to night; make it look like night time
snow: make it snow; add snow; let it snow; add falling snow to {it}; put snow in {it}; make {it} snowy; add
    snow flakes; give {it} snow; cover {it} with falling snow; change the weather to snow; make it a snowy
    day; turn {it} into a snowy day; add a snow storm; make it snow hard; give {it} snowy weather; it should
    snow; make {it} look like it is snowing; snow / add snow to {it}; make snow fall; let snow flakes fall
    in {it}
rain: make it rain; add rain; let it rain; add falling rain to {it}; put rain in {it}; make {it} rainy; add
    rain drops; make rain fall in {it}; give {it} a rainy day; change the weather to rain; turn {it} into a
    rainy day; add a rain storm; add heavy rain; give {it} rainy weather; it should rain; make {it} look
    like it is raining; rain / add rain to {it}; make it a rainy day; let rain drops fall
fog: make it foggy; add fog; put fog in {it}; cover {it} with fog; add thick fog to {it}; make {it} misty;
    fill {it} with mist; let fog fall over {it}; change the weather to fog; make it a foggy day; give {it}
    foggy weather; add some mist; fog / add fog to {it}; fill {it} with fog; give {it} thick mist
sunset: make it sunset; make {it} warm; make {it} warmer; give {it} a warm light; make {it} look like
    sunset; set {it} at sunset; turn {it} into a sunset; add warm evening light; change {it} to golden hour
    / change the time of day to sunset; add a warm sunset light to {it}; show {it} at golden hour
winter: make {it} cold; make it winter; make {it} colder; give {it} a cold light; make {it} look like
    winter; turn {it} into winter; add cold blue light; set {it} in winter; make {it} cool / change {it} to
    winter; add a cold winter light to {it}; show {it} in winter
invert: invert the colors; invert {it}; make {it} a negative; turn {it} into a negative; show the negative
    of {it}; apply a negative filter; flip all colors to their opposite / convert {it} to a negative; invert
    all colors of {it}; change all colors to their opposite
brighter: make {it} brighter; make {it} bright; brighten {it}; add more light; turn up the light; increase
    the brightness; give {it} more light; make {it} lighter / increase the light in {it}; turn up the
    brightness; add more light to {it}
darker: make {it} darker; make {it} dark; darken {it}; turn down the light; reduce the brightness; lower the
    brightness of {it}; give {it} less light; make {it} dim / reduce the light in {it}; turn down the
    brightness; lower the light
vivid: make {it} vivid; make the colors vivid; make {it} more colorful; saturate {it}; increase the
    saturation; boost the colors of {it}; give {it} vivid colors; make the colors stronger; make the colors
    more vivid; make {it} more saturated / boost the saturation; give {it} stronger colors; turn up the
    colors
contrast: increase the contrast; make {it} high contrast; add more contrast; boost the contrast of {it};
    give {it} high contrast; turn up the contrast; make the contrast stronger / add more contrast to {it};
    give {it} more contrast; make {it} stronger in contrast
faded: make {it} faded; fade the colors; make {it} pale; make the colors pale; give {it} faded colors;
    reduce the saturation of {it}; wash out the colors; apply a faded filter / give {it} pale colors; fade
    {it}; wash out {it}
blurry: make {it} blurry; blur {it}; put {it} out of focus; add blur; make {it} soft and blurry; apply a
    blur filter; take {it} out of focus; give {it} a soft focus / add blur to {it}; make {it} out of focus;
    give {it} a soft blur
pixel art: make {it} pixel art; turn {it} into pixel art; make {it} look like an old video game; pixelate
    {it}; change the style to pixel art; draw {it} as pixel art; show {it} in big pixels; convert {it} to a
    pixel art style / convert {it} to pixel art; make {it} look like pixel art; draw {it} in big pixels
sketch: make {it} a pencil sketch; turn {it} into a pencil sketch; make {it} a sketch; change the style to a
    pencil drawing; draw {it} with a pencil; turn {it} into a pencil drawing; make {it} look like a sketch;
    convert {it} to a sketch / change the style to a pencil sketch; draw {it} as a sketch; make {it} look
    like a pencil drawing
cartoon: make {it} a cartoon; turn {it} into a cartoon; make {it} look like a poster; change the style to
    cartoon; draw {it} as a cartoon; turn {it} into a poster; make {it} a comic; convert {it} to a comic
    style / convert {it} to a cartoon style; make {it} look like a comic; change the style to a poster
neon: make {it} neon; turn {it} into neon lights; make {it} glow in neon; change the style to neon; draw
    {it} with neon light; give {it} glowing neon edges; make {it} a neon drawing; show {it} in neon style /
    turn {it} into a neon drawing; make {it} look like neon; draw {it} in glowing neon
watercolor: make {it} a watercolor; turn {it} into a watercolor painting; make {it} a painting; change the
    style to watercolor; paint {it} with watercolor; make {it} look like a watercolor painting; draw {it} as
    a soft painting; convert {it} to a painting / convert {it} to a watercolor; paint {it} as a watercolor
    painting; turn {it} into a soft painting
recolor: make {o} {c}; change {o} to {c}; turn {o} {c}; paint {o} {c}; change the color of {o} to {c}; color
    {o} {c}; make the color of {o} {c}; recolor {o} to {c}; give {o} a {c} color; can {o} be {c}?; {o}
    should be {c}; make {o} look {c}; dye {o} {c} / turn the color of {o} to {c}; paint {o} in a {c} color;
    let {o} be {c}
swap: turn {o} into {a}; replace {o} with {a}; change {o} into {a}; swap {o} for {a}; make {o} {a};
    transform {o} into {a}; put {a} in place of {o}; what if {o} were {a}?; {o} should be {a}; make {o} look
    like {a}; use {a} instead of {o} / change {o} to be {a}; swap {o} with {a}; let {o} be {a}
removal: remove {o}; delete {o}; erase {o}; get rid of {o}; take away {o}; take {o} out of {it}; remove {o}
    from {it}; make {o} disappear; cut out {o}; hide {o}; clear {o} away; {o} should not be there; drop {o};
    make {it} without {o} / get {o} out of {it}; delete {o} from {it}; let {o} disappear
addition: add {a} at the {p}; put {a} at the {p}; place {a} in the {p}; insert {a} at the {p}; draw {a} in
    the {p}; add {a} to the {p}; show {a} in the {p}; put {a} in the {p} of {it}; i want {a} at the {p} /
    place {a} at the {p}; insert {a} in the {p} of {it}; let {a} be at the {p}
texture: give {o} {x}; make {o} {d}; add {x} to {o}; put {x} on {o}; cover {o} with {x}; turn {o} {d}; paint
    {x} on {o}; change the texture of {o} to {x}; draw {x} on {o} / turn the texture of {o} to {x}; let {o}
    be {d}; change {o} to be {d}
untexture: make {o} plain; remove the pattern from {o}; take the texture off {o}; give {o} a plain color;
    make the texture of {o} plain; remove the {x} from {o}; erase the {x} on {o}; turn {o} plain / change
    {o} to plain; take the {x} off {o}; erase the pattern on {o}
background: change the background to {b}; replace the background with {b}; put {b} in the background; set
    the background to {b}; make the background {b}; swap the background for {b}; turn the background into
    {b}; use {b} as the background; what if the background were {b}? / swap the background with {b}; use {b}
    for the background; let the background be {b}
backdrop: make the background {c}; change the background to {c}; paint the background {c}; turn the
    background {c}; set the background to plain {c}; change the background color to {c}; replace the
    background with a {c} one; put {it} on a {c} background; color the background {c} / set the background
    color to {c}; let the background be {c}; paint a plain {c} background
"""
WORDINGS = {}           # edit -> (training wordings, held-out wordings)
for _line in re.sub(r"\s*\n    ", " ", _WORDINGS).strip().splitlines():
    _key, _both = _line.split(": ")
    WORDINGS[_key] = tuple(tuple(part.split("; ")) for part in _both.split(" / "))

IT = ("it",) * 6 + ("the video", "the clip", "the scene", "the picture", "this video", "this clip", "this",
                    "the whole video", "everything")
POLITE = ("please {}", "can you {}?", "could you {}?", "{} please", "i want you to {}")   # training only
JOINTS = (" and ", ", and ", ", ", " and then ", ", then ")


def _article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _describe(s):
    return " ".join(w for w in ("" if s.texture == "plain" else s.texture, s.colour, s.kind) if w)


def caption(scene):
    """One sentence, at most about 30 words: objects, background, effects and styles."""
    names = [_article(_describe(s)) for s in scene.objects]
    things = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
    bg = scene.background
    on = "on" if bg.kind in ("plain", "stripes", "checkerboard", "sand", "grass") else "in front of"
    name = re.sub(r"^a (?=[aeiou])", "an ", bg.name)
    return " ".join([f"{things} {on} {name}" if things else name] + [POST_CAPTION[p] for p, _ in scene.post])


def _say(rng, key, split, within=False, **words):
    """One wording of WORDINGS[key] of the split; `within` a longer instruction, so no question."""
    options = [w for w in WORDINGS[key][split == "held"] if not (within and w.endswith("?"))]
    return rng.choice(options).format(it=rng.choice(IT), **words)


def _finish(rng, text, split):
    """Politeness and British spelling, by chance."""
    if split == "train" and not text.endswith("?") and not text.startswith("i want") and rng.random() < .15:
        text = rng.choice(POLITE).format(text)
    if rng.random() < .4:
        text = text.replace("color", "colour").replace("gray", "grey")
    return text[0].upper() + text[1:] + "." * (text[-1] != "?") if rng.random() < .08 else text


def _refer(rng, s, alone):
    """A name for s that fits nothing else in the scene: kinds and colours are unique in a scene."""
    names = (s.kind,) + (f"{s.colour} {s.kind}",) * 2 + (f"{s.colour} {rng.choice(('shape', 'object'))}",)
    return "the " + rng.choice((s.kind, "shape", "object") if alone and rng.random() < .3 else names)


# ---- edits -----------------------------------------------------------------------------------------------

def _free_places(scene, radius=.13):
    return [p for p, (u, v) in PLACES.items()
            if all(math.hypot(u - s.u, v - s.v) > radius + s.radius for s in scene.objects)]


def possible_tasks(scene):
    """The tasks that fit a scene: without objects only style, background and effect."""
    if not scene.objects:
        return "style", "background", "effect"
    free = len(scene.objects) < 3 and _free_places(scene)
    return tuple(t for t in TASKS if t != "addition" or free)


def _one_edit(scene, rng, task, split, within=False, avoid=()):
    """One simple edit -> (text, target, deterministic, kinds touched); kinds in `avoid` are left alone."""
    bg = scene.background
    if task in ("effect", "style"):
        name = rng.choice([n for n in (EFFECTS if task == "effect" else STYLES) if n not in dict(scene.post)])
        target = replace(scene, post=scene.post + ((name, rng.getrandbits(31)),))
        return _say(rng, name, split, within), target, name not in RANDOM_EFFECTS, ()
    if task == "background":
        taken = {s.colour for s in scene.objects} | ({bg.name.split()[1]} if bg.kind == "plain" else set())
        if rng.random() < .72:
            new = _flat_background(rng, rng.choice(OFTEN), exact=True, avoid=taken)
        else:
            kinds = [k for k in ("clouds", "leaves", "sand", "grass") if k != bg.kind]
            new = _natural_background(rng, rng.choice(kinds))
        text = (_say(rng, "backdrop", split, within, c=new.name.split()[1]) if new.kind == "plain" else
                _say(rng, "background", split, within, b=re.sub(r"^a (?=[aeiou])", "an ", new.name)))
        return text, replace(scene, background=new, clutter=()), new.kind in PAINT, ()

    if task == "addition":
        kinds = [k for k in KINDS if k not in avoid and all(k != s.kind for s in scene.objects)]
        colours = [c for c in COLOURS if all(c != s.colour for s in scene.objects)]
        kind, colour = _pick_pair(rng, split, kinds, colours, bg.rgb)
        place = rng.choice(_free_places(scene) or list(PLACES))
        new = Shape(kind, colour, COLOURS[colour], *PLACES[place], .13, screen=True)
        return (_say(rng, "addition", split, within, a=_article(f"{colour} {kind}"), p=place),
                replace(scene, objects=scene.objects + (new,)), True, (kind,))

    at = rng.choice([i for i, s in enumerate(scene.objects) if s.kind not in avoid])
    s = scene.objects[at]
    name = _refer(rng, s, alone=len(scene.objects) == 1 and not within)
    rest = scene.objects[:at] + scene.objects[at + 1:]
    # What lies behind an object can be told on painted backgrounds, unless a piece of clutter hides there.
    hides = any(math.hypot(c.u - s.u, c.v - s.v) < s.radius + c.radius for c in scene.clutter)
    behind_known = bg.kind in PAINT and not hides
    if task == "removal":
        text = _say(rng, "removal", split, within, o=name)
        return text, replace(scene, objects=rest), behind_known, (s.kind,)
    if task == "texture":
        texture = rng.choice([t for t in TEXTURES if t != s.texture])
        key, noun = "texture", TEXTURES[texture]
        if texture == "plain":
            key, noun = "untexture", TEXTURES[s.texture]
        text = _say(rng, key, split, within, o=name, x=noun, d=texture)
        new, known = replace(s, texture=texture), True
    else:
        how = rng.choice(("recolor", "recolor", "swap", "both"))
        kinds, colours = [s.kind], [s.colour]
        if how != "recolor":
            kinds = [k for k in KINDS if k not in avoid and all(k != o.kind for o in scene.objects)]
        if how != "swap":
            colours = [c for c in COLOURS if all(c != o.colour for o in scene.objects)]
        kind, colour = _pick_pair(rng, split, kinds, colours, bg.rgb if how != "swap" else ())
        new = replace(s, kind=kind, colour=colour, rgb=s.rgb if how == "swap" else COLOURS[colour])
        known = how == "recolor" or behind_known
        called = _article(kind if how == "swap" else f"{colour} {kind}")
        text = (_say(rng, "recolor", split, within, o=name, c=colour) if how == "recolor" else
                _say(rng, "swap", split, within, o=name, a=called))
    objects = scene.objects[:at] + (new,) + scene.objects[at + 1:]
    return text, replace(scene, objects=objects), known, (s.kind, new.kind)


TASK_WEIGHTS = {"style": 1.2, "object": 2, "background": 1.3, "multiple": 1, "removal": 1.3, "addition": 1.2,
                "texture": 1, "effect": 2}


def propose_edit(scene, seed, task=None, split="train"):
    """A random Edit of a scene, the same for the same arguments.

    task: one of TASKS, or None for any of possible_tasks(scene); one that does not fit raises ValueError.
    split "held" speaks in held-out wordings and may ask for (kind, colour) pairs that training never shows.
    """
    rng = Random(f"edit {split} {scene.domain} {scene.seed} {seed}")
    fits = possible_tasks(scene)
    if task is None:
        task = rng.choices(fits, [TASK_WEIGHTS[t] for t in fits])[0]
    if task not in fits:
        raise ValueError(f"task {task!r} does not fit this scene; one of {', '.join(fits)} does")
    if task == "multiple":
        first, second = rng.sample([t for t in fits if t != "multiple"], 2)
        if len(scene.objects) == 1 and not {first, second} & {"effect", "style", "background", "addition"}:
            second = rng.choice(("effect", "background"))   # one object cannot take two edits
        text, target, known, touched = _one_edit(scene, rng, first, split, within=True)
        if second == "addition" and not _free_places(target):
            second = "effect"
        also, target, known_too, _ = _one_edit(target, rng, second, split, within=True, avoid=touched)
        text, known, parts = text + rng.choice(JOINTS) + also, known and known_too, (first, second)
    else:
        text, target, known, _ = _one_edit(scene, rng, task, split)
        parts = (task,)
    return Edit(_finish(rng, text, split), task, target, caption(scene), caption(target), known,
                any(t in ("effect", "style") for t in parts))


def all_texts(n, seed, split="train"):
    """n captions and instructions, mixed, to train a tokenizer or a text encoder."""
    texts = []
    for i in range((n + 2) // 3):
        scene = draw_scene(seed * 1_000_003 + i, ("synthetic", "real")[i % 2], split)
        edit = propose_edit(scene, i, split=split)
        texts += [edit.instruction, edit.source_caption, edit.target_caption]
    return texts[:n]


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def known_words():
    """Sorted list of every word that training texts can contain."""
    nouns = [*COLOURS, *KINDS, *PLACES, *SKIES, *TEXTURES, *TEXTURES.values(), *POST_CAPTION.values()]
    # Words of captions and backgrounds, and the British spellings.
    fixed = ("a an the and on in front of background gradient from to stripes checkerboard clouds leaves "
             "sand grass natural scene shape object grey greyscale colour colours recolour watercolour "
             "colourful")
    templates = [w for train, _ in WORDINGS.values() for w in train] + [*IT, *POLITE, *JOINTS]
    return sorted(set(words_of(" ".join([*nouns, fixed] + [re.sub(r"\{\w*\}", " ", t) for t in templates]))))


def examples():
    """Instructions that show a person what the tiny model knows."""
    return ["make it snow", "make it grayscale", "make it night", "turn it into a pencil sketch",
            "make it pixel art", "make the circle blue", "turn the red circle into a green star",
            "change the background to blue and white stripes", "replace the background with a sunset sky",
            "remove the star", "add a yellow heart at the top left", "give the square dots",
            "remove the circle and make it sepia"]


# ------------------------------------------------------------------------------------------------------------
# The teacher CogVideoX-5B image-to-video (Yang et al. 2024): a frame and a caption become a clip
#     T5Tokenizer, T5Encoder     caption -> 226 states
#     CogTransformer             [noisy latent, image latent] + states -> v
#     CogVAE                     causal 3-D autoencoder, 8x in space, 4x in time
#     CogSchedule                zero-terminal-SNR noise levels; DDIM and DPM steps
#     CogVideoX                  loads them one after another; animate(image, caption, seed) -> clip
# Attribute names are the published keys; `cfg` is a published config.json as a dict, so other sizes load too.
# ------------------------------------------------------------------------------------------------------------

COGVIDEOX = "zai-org/CogVideoX-5b-I2V"     # 21.6 GB: T5 9.5, transformer 11.3, VAE 0.9; the CogVideoX licence


# ---------------------------------------------------------------------------- text: T5 v1.1 XXL

def protobuf_fields(buf):
    """Yield (field number, value) of one protobuf message; a value is an int (varint) or bytes (all else)."""
    at = 0

    def varint():
        nonlocal at
        n = shift = 0
        while True:
            byte, at = buf[at], at + 1
            n, shift = n | (byte & 127) << shift, shift + 7
            if byte < 128:
                return n
    while at < len(buf):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()        # wire types: 64 bit, 32 bit, length-delimited
            yield key >> 3, bytes(buf[at:at + size])
            at += size


class T5Tokenizer:
    """T5's SentencePiece unigram model from the published `spiece.model`, without the sentencepiece package.

    tokenizer(texts, length=226) -> ids (N, length) int64: pieces, </s>, then <pad>. Ids are sentencepiece's,
    except that special tokens written in a text (</s>, <pad>, <extra_id_3>) are cut out as such, as in the
    published pipeline. A text over `length` tokens is cut, with a warning. UserError for a damaged file.
    """
    def __init__(self, folder):
        path, pieces, self.trie, self.strings = Path(folder) / "spiece.model", [], [], b""
        try:
            for number, value in protobuf_fields(path.read_bytes()):
                if number == 1:                                 # a piece: 1 text, 2 score, 3 type (1: normal)
                    piece = {2: bytes(4), 3: 1, **dict(protobuf_fields(value))}
                    pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
                elif number == 3:                               # the normalizer: 2 is its character map
                    chars = dict(protobuf_fields(value)).get(2, bytes(4))
                    end = 4 + int.from_bytes(chars[:4], "little")           # a double-array trie, its strings
                    self.trie, self.strings = np.frombuffer(chars[4:end], "<u4").tolist(), chars[end:]
        except FileNotFoundError:
            raise UserError(f"{path}: missing; download the repository's tokenizer folder again") from None
        except (OSError, IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error):
            pieces = []                                         # no protobuf of pieces: said in the next line
        if not any(kind == 2 for _, _, kind in pieces):
            raise UserError(f"{path}: not a SentencePiece model; download the repository's tokenizer folder")
        # types 2 and 3: unknown and control pieces
        self.special = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (2, 3)}
        extra = Path(folder) / "added_tokens.json"              # <extra_id_0> has the last id, counting down
        self.special |= (read_json(extra) if extra.is_file() else
                         {f"<extra_id_{i}>": len(pieces) + 99 - i for i in range(100)})
        self.split = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        # a special piece must never match inside a word: NUL does not survive normalisation
        vocab = [(text if kind == 1 else "\0" + text, score) for text, score, kind in pieces]
        unknown = [kind for _, _, kind in pieces].index(2)
        self.unigram = FastTokenizer(models.Unigram(vocab, unknown, byte_fallback=False))

    def normalize(self, text):
        """SentencePiece's normalisation: longest match in the character map, spaces become one '▁'."""
        data, out, at = text.encode("utf-8", "replace"), b"", 0
        child = lambda i: i ^ self.trie[i] >> 10 << ((self.trie[i] & 512) >> 6)     # darts-clone's packing
        while at < len(data):
            node, end, found = child(0) if self.trie else 0, at, None
            for i in range(at, len(data) if self.trie else at):
                node ^= data[i]
                unit = self.trie[node]
                if unit & 0x800000FF != data[i]:
                    break
                node = child(node)
                if unit >> 8 & 1:                                           # a key ends here
                    end, found = i + 1, self.trie[node] & 0x7FFFFFFF
            if found is None:                                               # unmapped: keep a UTF-8 character
                end = next((i for i in range(at + 1, len(data)) if data[i] & 0xC0 != 0x80), len(data))
                out += data[at:end]
            else:
                out += self.strings[found:self.strings.index(0, found)]
            at = end
        return ("▁" + re.sub(" +", "▁", out.decode().strip(" "))).rstrip("▁")

    def __call__(self, texts, length=226):
        eos, rows = self.special["</s>"], torch.full((len(texts), length), self.special["<pad>"])
        for row, text in zip(rows, texts):
            ids = []
            for part in self.split.split(text):
                special = self.special.get(part)
                ids += self.unigram.encode(self.normalize(part)).ids if special is None else [special]
            if len(ids) >= length:
                print(f"warning: caption of {len(ids) + 1} tokens cut to {length}: {text[:50]}",
                      file=sys.stderr)
            ids = ids[:length - 1]
            ids += [eos] if ids[-1:] != [eos] else []                       # one </s>, not two
            row[:len(ids)] = torch.tensor(ids)
        return rows


class T5Block(nn.Module):
    """Pre-norm self-attention and gated feed-forward. No biases; no 1/sqrt(d) in the attention."""
    def __init__(self, cfg, first):
        super().__init__()
        d, ff, self.heads = cfg["d_model"], cfg["d_ff"], cfg["num_heads"]
        inner = self.heads * cfg["d_kv"]
        linear = lambda *names, shape: {name: nn.Linear(*shape, bias=False) for name in names}
        attn = nn.ModuleDict(linear("q", "k", "v", shape=(d, inner)) | linear("o", shape=(inner, d)))
        if first:                                               # one table of position biases for all blocks
            attn["relative_attention_bias"] = nn.Embedding(cfg["relative_attention_num_buckets"], self.heads)
        dense = nn.ModuleDict(linear("wi_0", "wi_1", shape=(d, ff)) | linear("wo", shape=(ff, d)))
        norm = lambda: nn.RMSNorm(d, cfg["layer_norm_epsilon"])
        self.layer = nn.ModuleList(nn.ModuleDict({name: part, "layer_norm": norm()})
                                   for name, part in (("SelfAttention", attn), ("DenseReluDense", dense)))

    def forward(self, x, bias):
        (attn, norm), (ff, norm2) = (layer.values() for layer in self.layer)
        y = norm(x)
        x = x + attn["o"](attention(attn["q"](y), attn["k"](y), attn["v"](y), self.heads, bias, scale=1.0))
        y = norm2(x)
        return x + ff["wo"](F.gelu(ff["wi_0"](y), approximate="tanh") * ff["wi_1"](y))


class T5Encoder(nn.Module):
    """T5 v1.1 encoder (Raffel et al. 2020). ids (N, L) int64 -> states (N, L, d_model). Padding is attended,
    as CogVideoX was trained. float16 overflows: use bfloat16 or float32. cfg: transformers' T5Config keys."""
    def __init__(self, cfg):
        super().__init__()
        self.config, self.shared = cfg, nn.Embedding(cfg["vocab_size"], cfg["d_model"])
        blocks = nn.ModuleList(T5Block(cfg, first=i == 0) for i in range(cfg["num_layers"]))
        norm = nn.RMSNorm(cfg["d_model"], cfg["layer_norm_epsilon"])
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": norm})

    @classmethod
    def from_pretrained(cls, source=COGVIDEOX, device=None, dtype=None):
        """The text encoder alone; arguments as in CogVideoX.from_pretrained."""
        return CogVideoX.from_pretrained(source, device, dtype).network("text_encoder")

    def position_bias(self, length):
        """(1, heads, L, L). Buckets: exact below distance 8, log-spaced to 128; upper half for later keys."""
        table = self.encoder["block"][0].layer[0]["SelfAttention"]["relative_attention_bias"]
        half, reach = table.num_embeddings // 2, self.config.get("relative_attention_max_distance", 128)
        at = torch.arange(length, device=table.weight.device)
        ahead = at[None] - at[:, None]                          # key minus query
        far, exact = ahead.abs(), half // 2
        log = (far.clamp(min=1) / exact).log() / math.log(reach / exact) * (half - exact)
        bucket = torch.where(far < exact, far, (exact + log.long()).clamp(max=half - 1))
        return table(bucket + half * (ahead > 0)).permute(2, 0, 1)[None]

    @torch.no_grad()
    def forward(self, ids):
        x, bias = self.shared(ids), self.position_bias(ids.shape[1])
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)


# ---------------------------------------------------------------------------- transformer

def rope_3d(frames, h, w, dim):
    """Rotary cos and sin (frames*h*w, dim) of a grid. A pair of channels shares an angle; the first quarter
    of a head turns with time, then 3/8 each with row and column (theta 10000)."""
    angles = []
    for axis, n in enumerate((dim // 4, dim // 8 * 3, dim // 8 * 3)):
        freqs = (1 / 10000 ** (torch.arange(0, n, 2, dtype=torch.float32) / n)).repeat_interleave(2)
        at = torch.arange((frames, h, w)[axis]).view([-1 if a == axis else 1 for a in range(4)])
        angles.append((at * freqs).expand(frames, h, w, n))
    angle = torch.cat(angles, -1).flatten(0, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair of channels of x (B, L, heads, d) by its position's angle; cos, sin (L, d)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def sincos_3d(frames, h, w, dim, space, time):
    """Computed position table (frames*h*w, dim): a quarter time, then column, row; sin before cos in each.
    Positions are divided by `space` and `time`."""
    def sincos(n, scale, width):
        at = torch.arange(n, dtype=torch.float64)[:, None] / scale
        angle = at / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width // 2))
        return torch.cat([angle.sin(), angle.cos()], 1)
    t, side = sincos(frames, time, dim // 4)[:, None, None], dim * 3 // 8
    parts = [x.expand(frames, h, w, -1) for x in (t, sincos(w, space, side), sincos(h, space, side)[:, None])]
    return torch.cat(parts, -1).flatten(0, 2)


class CogNorm(nn.Module):
    """Adaptive LayerNorm: the time step gives shift, scale and gate, one set for video, one for text."""
    def __init__(self, temb, width, eps):
        super().__init__()
        self.linear, self.norm = nn.Linear(temb, 6 * width), nn.LayerNorm(width, eps)

    def forward(self, x, temb, n):
        """x (B, L, D), its first n tokens text -> normed x, gates (video (B, 1, D), text (B, 1, D))."""
        shift, scale, gate, t_shift, t_scale, t_gate = self.linear(F.silu(temb))[:, None].chunk(6, -1)
        y = self.norm(x)                                        # in place from here on: inference only
        y[:, :n].mul_(1 + t_scale).add_(t_shift)
        y[:, n:].mul_(1 + scale).add_(shift)
        return y, (gate, t_gate)


class CogBlock(nn.Module):
    """Joint attention over text and video, then a feed-forward, each behind an adaptive norm and gates."""
    def __init__(self, cfg, width):
        super().__init__()
        self.heads, head, bias = cfg["num_attention_heads"], cfg["attention_head_dim"], cfg["attention_bias"]
        self.norm1, self.norm2 = (CogNorm(cfg["time_embed_dim"], width, cfg["norm_eps"]) for _ in range(2))
        self.attn1 = nn.ModuleDict({f"norm_{s}": nn.LayerNorm(head, 1e-6) for s in "qk"} |
                                   {f"to_{s}": nn.Linear(width, width, bias) for s in "qkv"} |
                                   {"to_out": nn.ModuleList([nn.Linear(width, width)])})
        inner = nn.ModuleDict({"proj": nn.Linear(width, 4 * width)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([inner, nn.Identity(), nn.Linear(4 * width, width)])})

    def forward(self, x, temb, n, rope):
        """x (B, n + L, D) with n text tokens; changed in place."""
        def add(y, gates):
            x[:, n:].addcmul_(gates[0], y[:, n:])
            x[:, :n].addcmul_(gates[1], y[:, :n])
        y, gates = self.norm1(x, temb, n)
        q, k, v = (self.attn1[f"to_{s}"](y).unflatten(-1, (self.heads, -1)) for s in "qkv")
        q, k = self.attn1["norm_q"](q), self.attn1["norm_k"](k)
        for s in (q, k):                                        # (B, n + L, heads, d); only video tokens turn
            s[:, n:] = rotate(s[:, n:], *rope)
        add(self.attn1["to_out"][0](attention(q.flatten(2), k.flatten(2), v.flatten(2), self.heads)), gates)
        y, gates = self.norm2(x, temb, n)
        up, _, down = self.ff["net"]
        add(down(F.gelu(up["proj"](y), approximate="tanh")), gates)
        return x


class CogTransformer(nn.Module):
    """transformer(z, ctx, t) -> v (B, F, c, h, w). z (B, F, 2c, h, w) = [noisy latent, image latent], ctx (B,
    T, 4096) T5 states, t (B,) int64. Text and patches form one sequence, text first. cfg: diffusers' config
    of the image-to-video 5B. Raises UserError for h, w other than the learned positions' 60x90."""
    def __init__(self, cfg):
        super().__init__()
        self.config, p, temb, eps = cfg, cfg["patch_size"], cfg["time_embed_dim"], cfg["norm_eps"]
        self.width = width = cfg["num_attention_heads"] * cfg["attention_head_dim"]
        frames = (cfg["sample_frames"] - 1) // cfg["temporal_compression_ratio"] + 1
        patches = frames * (cfg["sample_height"] // p) * (cfg["sample_width"] // p)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(cfg["in_channels"], width, p, p),
                                          "text_proj": nn.Linear(cfg["text_embed_dim"], width)})
        length = cfg["max_text_seq_length"] + patches
        self.patch_embed.pos_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(width, temb),
                                             "linear_2": nn.Linear(temb, temb)})
        self.transformer_blocks = nn.ModuleList(CogBlock(cfg, width) for _ in range(cfg["num_layers"]))
        self.norm_final = nn.LayerNorm(width, eps)
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(temb, 2 * width),
                                       "norm": nn.LayerNorm(width, eps)})
        self.proj_out = nn.Linear(width, cfg["out_channels"] * p * p)

    def embed(self, z, ctx):
        """Text states and patches with their positions: (B, T + F*h*w/p^2, D)."""
        cfg, p, (B, frames, _, h, w) = self.config, self.config["patch_size"], z.shape
        if (h, w) != (cfg["sample_height"], cfg["sample_width"]):
            raise UserError(f"latents of {h}x{w}: the learned positions are for {cfg['sample_height']}x"
                            f"{cfg['sample_width']}, that is images of 8 times that")
        patches = self.patch_embed["proj"](z.flatten(0, 1)).flatten(2).transpose(1, 2)     # (B*F, h*w/p^2, D)
        x = torch.cat([self.patch_embed["text_proj"](ctx), patches.reshape(B, -1, self.width)], 1)
        if (frames - 1) * cfg["temporal_compression_ratio"] + 1 == cfg["sample_frames"]:
            return x.add_(self.patch_embed.pos_embedding)
        # another length: like the published pipeline, fall back on computed positions, with none for the text
        space, time = cfg["spatial_interpolation_scale"], cfg["temporal_interpolation_scale"]
        x[:, ctx.shape[1]:] += sincos_3d(frames, h // p, w // p, self.width, space, time).to(x)
        return x

    @torch.no_grad()
    def forward(self, z, ctx, t):
        p, n, (B, frames, _, h, w) = self.config["patch_size"], ctx.shape[1], z.shape
        temb = self.time_embedding["linear_1"](timestep_embedding(t, self.width).to(z.dtype))
        temb, x = self.time_embedding["linear_2"](F.silu(temb)), self.embed(z, ctx)
        rope = [r.to(z.device) for r in rope_3d(frames, h // p, w // p, self.config["attention_head_dim"])]
        for block in self.transformer_blocks:
            x = block(x, temb, n, rope)
        shift, scale = self.norm_out["linear"](F.silu(temb))[:, None].chunk(2, -1)
        x = self.norm_out["norm"](self.norm_final(x[:, n:])) * (1 + scale) + shift
        x = self.proj_out(x).view(B, frames, h // p, w // p, -1, p, p)      # channels before a patch's pixels
        return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, frames, -1, h, w)


# ---------------------------------------------------------------------------- causal 3-D VAE
# Inside: x (B, C, F, H, W). `past` holds each convolution's last two input frames between chunks of one clip.

class CogConv(nn.Module):
    """3-D convolution that sees no later frame; the two before a chunk are in `past`, or repeat its first."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, padding=(0, 1, 1))

    def forward(self, x, past):
        x = torch.cat([past[self] if self in past else x[:, :, :1].expand(-1, -1, 2, -1, -1), x], 2)
        past[self] = x[:, :, -2:].clone()                       # a copy, so that the chunk can be freed
        return self.conv(x)


class CogSpatialNorm(nn.Module):
    """GroupNorm whose gain and bias are read from the latent (Zheng et al. 2022, MoVQ)."""
    def __init__(self, channels, latent, groups):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, 1e-6)
        self.conv_y, self.conv_b = (nn.ModuleDict({"conv": nn.Conv3d(latent, channels, 1)}) for _ in range(2))

    def forward(self, x, z):
        odd = x.shape[2] % 2 if x.shape[2] > 1 else 0           # a clip's first frame has a latent of its own
        times = (x.shape[2] - odd) // (z.shape[2] - odd)

        def at_x(y):                            # repeating after the 1x1x1 convolution: the same, far cheaper
            y = torch.cat([y[:, :, :odd], y[:, :, odd:].repeat_interleave(times, 2)], 2)
            return F.interpolate(y, x.shape[2:])
        return self.norm_layer(x).mul_(at_x(self.conv_y["conv"](z))).add_(at_x(self.conv_b["conv"](z)))


class CogResnet(nn.Module):
    """Two causal convolutions and a shortcut; in the decoder the norms also read the latent z."""
    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), CogConv(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), CogConv(c_out, c_out)
        self.conv_shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, past, *z):
        y = self.conv1(F.silu(self.norm1(x, *z), inplace=True), past)
        y = self.conv2(F.silu(self.norm2(y, *z), inplace=True), past)
        return self.conv_shortcut(x).add_(y)


class CogResample(nn.Module):
    """Halve (down) or double the frames' sides, and time too where `time`; the convolution is per frame."""
    def __init__(self, channels, down, time):
        super().__init__()
        self.down, self.time, stride, pad = down, time, *((2, 0) if down else (1, 1))
        self.conv = nn.Conv2d(channels, channels, 3, stride, pad)

    def forward(self, x):
        if self.time and x.shape[2] > 1:
            odd = x.shape[2] % 2                                # an odd chunk's first frame stays single
            rest = x[:, :, odd:]
            rest = rest.unflatten(2, (-1, 2)).mean(3) if self.down else rest.repeat_interleave(2, 2)
            x = torch.cat([x[:, :, :odd], rest], 2)
        y = x.transpose(1, 2).flatten(0, 1)                     # (B*F, C, H, W)
        y = F.pad(y, (0, 1, 0, 1)) if self.down else F.interpolate(y, scale_factor=2.0)
        return self.conv(y).unflatten(0, (len(x), -1)).transpose(1, 2)


class CogHalf(nn.Module):
    """Encoder (down) or decoder: conv_in, [resnets, resampler] per width, two resnets as middle, conv_out."""
    def __init__(self, cfg, down):
        super().__init__()
        widths, groups, latent = cfg["block_out_channels"], cfg["norm_num_groups"], cfg["latent_channels"]
        norm = lambda c: (nn.GroupNorm(groups, c, cfg["norm_eps"]) if down else
                          CogSpatialNorm(c, latent, groups))
        resnets = lambda c_in, c, n: nn.ModuleList(CogResnet(c if j else c_in, c, norm) for j in range(n))
        self.mid_block = nn.ModuleDict({"resnets": resnets(widths[-1], widths[-1], 2)})
        widths = widths if down else widths[::-1]
        self.down, stages, c = down, nn.ModuleList(), widths[0]
        self.conv_in = CogConv(cfg["in_channels"] if down else latent, c)
        for i, width in enumerate(widths):
            stage = nn.ModuleDict({"resnets": resnets(c, width, cfg["layers_per_block"] + (not down))})
            if i < len(widths) - 1:
                resample = CogResample(width, down, time=2 ** i < cfg["temporal_compression_ratio"])
                stage["downsamplers" if down else "upsamplers"] = nn.ModuleList([resample])
            stages.append(stage)
            c = width
        setattr(self, "down_blocks" if down else "up_blocks", stages)
        self.norm_out = nn.GroupNorm(groups, c, 1e-6) if down else norm(c)
        self.conv_out = CogConv(c, 2 * latent if down else cfg["out_channels"])

    def forward(self, x, past):
        z, x = [] if self.down else [x], self.conv_in(x, past)
        for stage in [*self.down_blocks, self.mid_block] if self.down else [self.mid_block, *self.up_blocks]:
            for layer in (layer for part in stage.values() for layer in part):
                x = layer(x) if isinstance(layer, CogResample) else layer(x, past, *z)
        return self.conv_out(F.silu(self.norm_out(x, *z), inplace=True), past)


class CogVAE(nn.Module):
    """CogVideoX's autoencoder. A clip runs in chunks, the first taking the remainder; GroupNorm sees one
    chunk, so their sizes are part of the model: 8 frames to encode, 2 latents to decode."""
    def __init__(self, cfg):
        super().__init__()
        self.config, self.encoder, self.decoder = cfg, CogHalf(cfg, down=True), CogHalf(cfg, down=False)

    @staticmethod
    def chunks(x, size):
        """Split x (B, F, ...) in time: 17 frames with size 8 are [9, 8], fewer than 16 are one chunk."""
        first = x.shape[1] % size + size
        return [x[:, :first], *x[:, first:].split(size, 1)] if x.shape[1] > first else [x]

    @torch.no_grad()
    def encode(self, video):
        """video (B, F, 3, H, W) in [-1, 1], 8 | H and W -> mean, logvar (B, f, 16, H/8, W/8), unscaled."""
        past = {}
        out = [self.encoder(x.transpose(1, 2), past).transpose(1, 2) for x in self.chunks(video, 8)]
        mean, logvar = torch.cat(out, 1).chunk(2, 2)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def decode_chunks(self, z):
        """Yield decoded slices (B, 9 or 8, 3, H, W) of latents z (B, f, 16, h, w), unscaled."""
        past = {}
        for x in self.chunks(z, 2):
            yield self.decoder(x.transpose(1, 2), past).transpose(1, 2)

    def decode(self, z):
        """z (B, f, 16, h, w), unscaled -> video (B, F, 3, 8h, 8w); F = 4f - 3, or 4f where f is even."""
        return torch.cat(list(self.decode_chunks(z)), 1)


# ---------------------------------------------------------------------------- sampler

class CogSchedule:
    """Noise levels and steps for v-prediction with zero terminal SNR (Lin et al. 2023, algorithm 1): abar is
    exactly 0 at t = 999, so nothing below divides by it. cfg: scheduler_config.json; steps: 1 to 1000."""
    FIXED = dict(beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
                 timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)

    def __init__(self, cfg, steps):
        wrong = [f"{k} {cfg[k]} instead of {v}" for k, v in self.FIXED.items() if cfg.get(k, v) != v]
        if wrong:
            raise UserError(f"scheduler_config.json: {wrong[0]}; is it another model's?")
        T, shift = cfg.get("num_train_timesteps", 1000), cfg.get("snr_shift_scale", 1.0)
        if not 1 <= steps <= T:
            raise UserError(f"--steps {steps}: needs 1 to {T}")
        start, end = cfg.get("beta_start", 0.00085), cfg.get("beta_end", 0.012)
        abar = torch.cumprod(1 - torch.linspace(start ** 0.5, end ** 0.5, T, dtype=torch.float64) ** 2, 0)
        root = (abar / (shift + (1 - shift) * abar)).sqrt()
        self.abar, self.stride = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2, T // steps
        self.timesteps = torch.from_numpy(np.round(np.arange(T, 0, -T / steps)).astype(np.int64) - 1)[:steps]

    def levels(self, i):
        """abar at step i and after it, float64."""
        t = int(self.timesteps[i])
        return self.abar[t], self.abar[t - self.stride] if t >= self.stride else torch.ones_like(self.abar[t])

    def ddim(self, v, i, z):
        """One deterministic step (Song et al. 2021, eq. 12, in z and z0 instead of epsilon and z0)."""
        a, nxt = self.levels(i)
        z0, keep = a.sqrt() * z - (1 - a).sqrt() * v, ((1 - nxt) / (1 - a)).sqrt()
        return keep * z + (nxt.sqrt() - a.sqrt() * keep) * z0

    def dpm(self, v, i, z, noise, before=None):
        """One SDE-DPM-Solver++(2M) step (Lu et al. 2022). before: the previous step's z0. Returns z, z0."""
        a, nxt = self.levels(i)
        z0 = x = a.sqrt() * z - (1 - a).sqrt() * v
        lam = lambda y: 0.5 * (y / (1 - y)).log()               # half the log SNR; infinite at both ends
        h = lam(nxt) - lam(a)
        if before is not None and nxt < 1:                      # second order: extrapolate z0 along lam
            slope = 0.5 * h / (lam(a) - lam(self.abar[self.timesteps[i - 1]]))
            x = (1 + slope) * z0 - slope * before
        keep = ((1 - nxt) / (1 - a)).sqrt() * (-h).exp()
        gain = -torch.expm1(-2 * h)
        return keep * z + nxt.sqrt() * gain * x + ((1 - nxt) * gain).sqrt() * noise, z0


def dynamic_guidance(guidance, t, steps):
    """Guidance of the authors' demo at time step t. Their code mixes the step count with the raw t of 0..999,
    so it is no smooth function of progress; kept as published."""
    return 1 + guidance * (1 - math.cos(math.pi * ((steps - t) / steps) ** 5)) / 2


# ---------------------------------------------------------------------------- weights and images

def read_headers(folder):
    """(weight files, {tensor: (file name, shape, dtype)}) of a published sub-folder, from headers alone.
    UserError, naming the file, for a missing or unreadable shard and an index that does not fit them."""
    index = next(folder.glob("*.safetensors.index.json"), None)
    files, found, where = sorted(p.name for p in folder.glob("*.safetensors")), {}, {}
    if index:
        where = read_json(index)
        where = where.get("weight_map") if isinstance(where, dict) else None
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise UserError(f"{index}: wrong index, no weight_map from tensors to files; download it again")
        files = sorted(set(where.values()))
    elif len(files) != 1:
        raise UserError(f"{folder}: {len(files)} weight files and no index; needs one .safetensors file, or "
                        "shards and their .safetensors.index.json")
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as f:
                for k in f.keys():
                    found[k] = name, tuple(f.get_slice(k).get_shape()), f.get_slice(k).get_dtype()
        except FileNotFoundError:
            raise UserError(f"{folder / name}: missing shard, 1 of {len(files)}; download it again") from None
        except (SafetensorError, OSError) as e:
            raise UserError(f"{folder / name}: not a readable weight file ({e}); download it again") from None
    for k in sorted({**found, **where}) if index else ():
        listed, has = where.get(k, "no shard"), found.get(k, ["no shard"])[0]
        if listed != has:
            raise UserError(f"{index}: wrong index, it has {k} in {listed}, not in {has}; download it again")
    return [folder / name for name in files], found


def check_variant(cfg, tensors, where):
    """UserError that names the sibling if `where` holds another CogVideoX than the image-to-video 5B."""
    patch, found = tensors.get("patch_embed.proj.weight", ((), ()))[1], None          # (D, in_channels, p, p)
    ofs = cfg.get("ofs_embed_dim") or any("ofs_embed" in k for k in tensors)
    if cfg.get("patch_size_t") or len(patch) == 2 or ofs:
        found = "CogVideoX 1.5 (patches in time, offset embedding)"
    elif not cfg.get("use_rotary_positional_embeddings"):
        found = "CogVideoX-2B (no rotary positions)"
    elif cfg.get("in_channels") == cfg.get("out_channels") or patch[1:2] == (cfg.get("out_channels"),):
        found = "a text-to-video CogVideoX, 2B or 5B (no channels for the image)"
    elif not cfg.get("use_learned_positional_embeddings") or "patch_embed.pos_embedding" not in tensors:
        found = "a CogVideoX without the learned position table"
    if found:
        raise UserError(f"{where}: these are the weights of {found}; pass {COGVIDEOX} or a copy of it")


def fit_image(image, height, width):
    """image (3, H, W) in [-1, 1], or PIL -> (3, height, width): scaled to cover, then cropped around the
    centre, so any aspect. UserError where it would be enlarged over 4 times or a value is out of range."""
    if not torch.is_tensor(image):
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"image of shape {tuple(image.shape)}: needs (3, H, W)")
    h, w = image.shape[1:]
    if 4 * h < height or 4 * w < width:
        raise UserError(f"image of {w}x{h} is too small for a clip of {width}x{height}; needs at least "
                        f"{math.ceil(width / 4)}x{math.ceil(height / 4)}")
    image = image.float()
    if not (image.abs() <= 1.001).all():
        raise UserError(f"image with values from {image.min():.3g} to {image.max():.3g}: needs [-1, 1]")
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    if size != (h, w):
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top:top + height, left:left + width]


def clip_fault(video, image):
    """Why a clip should not count: "black", "static", "first frame unlike the image"; "" where it is fine.
    video (1, F, 3, H, W) in [-1, 1], image as given to `animate`."""
    frames, first = video[0].float().cpu(), fit_image(image, *video.shape[-2:]).cpu()
    if (frames.mean((1, 2, 3)) < -0.95).any():
        return "black"
    if (frames[1:] - frames[:-1]).abs().mean() < 0.002:                     # a quarter of one of 255 levels
        return "static"
    small = F.avg_pool2d(torch.stack([frames[0], first]), max(1, video.shape[-1] // 45))
    return "first frame unlike the image" if (small[0] - small[1]).abs().mean() > 0.3 else ""


# ---------------------------------------------------------------------------- image + caption -> clip

class CogVideoX:
    """The image-to-video teacher: a folder of published weights, at most one of its networks in memory.

    Peak memory is the largest part's, computed for bf16 at 49 frames of 480x720: the transformer's 11.3 GB
    plus about 4 of activations (two guidance branches); T5 takes 9.7, a decoded slice of 9 frames about 8.
    """
    PARTS = dict(text_encoder=T5Encoder, transformer=CogTransformer, vae=CogVAE)

    @classmethod
    def from_pretrained(cls, source=COGVIDEOX, device=None, dtype=None, cache="data/cogvideox/text"):
        """source: a hub id, or a directory in hub layout (tokenizer text_encoder transformer vae scheduler).

        Checks every config, index and header now; weights load when needed. device, dtype: default CUDA
        (bf16), MPS or CPU (fp32). cache: folder for T5 states, 1.9 MB per caption in bf16. Raises UserError
        for a missing shard, a wrong index, another CogVideoX, float16.
        """
        self = cls()
        self.folder = hub_dir(source, [f"{part}/*" for part in (*cls.PARTS, "tokenizer", "scheduler")])
        self.cache, self.loaded = Path(cache), (None, None)
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.device = torch.device(device or best)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if self.dtype == torch.float16:
            raise UserError("dtype float16: T5 and the VAE overflow in it; pass bfloat16 or float32")
        self.config = {part: read_json(self.folder / part / "config.json") for part in cls.PARTS}
        self.scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        self.tokenizer = T5Tokenizer(self.folder / "tokenizer")
        headers = {part: read_headers(self.folder / part) for part in cls.PARTS}
        self.files = {part: files for part, (files, _) in headers.items()}
        check_variant(self.config["transformer"], headers["transformer"][1], self.folder / "transformer")
        if any(kind == "F16" for _, _, kind in headers["text_encoder"][1].values()):
            print(f"warning: {self.folder}/text_encoder: stored in float16, in which T5 overflows; upcast to "
                  f"{str(self.dtype)[6:]}", file=sys.stderr)
        return self

    def network(self, part):
        """"text_encoder", "transformer" or "vae", ready to run; the one loaded before is freed."""
        if self.loaded[0] != part:
            self.loaded = (None, None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                with torch.device("meta"):
                    net = self.PARTS[part](self.config[part])
            except KeyError as e:
                raise UserError(f"{self.folder / part}/config.json: lacks {e}; download it again") from None
            tensors = {k: v for file in self.files[part] for k, v in read_tensors(file).items()}
            load_weights(net, tensors, str(self.folder / part), drop=("embed_tokens",), device=self.device,
                         dtype=self.dtype)                      # some files store T5's table twice
            self.loaded = (part, net.eval().requires_grad_(False))
        return self.loaded[1]

    def tokenize(self, captions):
        """List of N strings -> ids (N, 226) int64."""
        return self.tokenizer(captions, self.config["transformer"]["max_text_seq_length"])

    def text_states(self, captions):
        """List of N captions -> T5 states (N, 226, D) on the CPU. Call it once with all captions of a run: T5
        loads only for those not in the cache, whose names hash caption, dtype, tokenizer and T5's weights."""
        seal, rows = hashlib.sha256(str(self.dtype).encode()), []
        for path in (self.folder / "tokenizer" / "spiece.model", *self.files["text_encoder"]):
            with open(path, "rb") as f:                         # size and both ends tell two versions apart
                seal.update(str(size := path.stat().st_size).encode() + f.read(1 << 20))
                f.seek(max(0, size - (1 << 20)))
                seal.update(f.read())
        for caption in captions:
            name = hashlib.sha256(seal.digest() + caption.encode("utf-8", "replace")).hexdigest()[:32]
            file = self.cache / f"{name}.safetensors"
            if not file.is_file():
                states = self.network("text_encoder")(self.tokenize([caption]).to(self.device))[0].cpu()
                if not states.isfinite().all():
                    raise UserError(f"{self.folder}/text_encoder: NaN or Inf in {self.dtype}; pass float32")
                self.cache.mkdir(parents=True, exist_ok=True)
                aside = file.with_suffix(f".{os.getpid()}.tmp")
                save_file({"states": states}, str(aside))
                os.replace(aside, file)
            rows.append(read_tensors(file)["states"])
        return torch.stack(rows)

    def encode_image(self, image, n_latents, noise):
        """image (3, H, W) in [-1, 1], noise (1, 1, 16, h, w) -> image latents (1, n_latents, 16, h, w)
        float32: a sample of the posterior (not its mode), scaled, then zeros for the frames to come."""
        mean, logvar = self.network("vae").encode(image[None, None].to(self.device, self.dtype))
        z = mean.float().cpu() + (0.5 * logvar.float().cpu()).exp() * noise
        return F.pad(z * self.config["vae"]["scaling_factor"], (0, 0, 0, 0, 0, 0, 0, n_latents - 1))

    @torch.no_grad()
    def denoise(self, z, z_img, ctx, steps=50, guidance=6.0, sampler="ddim", generator=None):
        """Yield the latents (1, f, 16, h, w) after each step, float32 on the device.

        z: starting noise; z_img: image latents; ctx (2, 226, D): states of [negative, caption]. sampler:
        "ddim", the published pipeline's, or "dpm", the authors' demo's: second order, stochastic (noise from
        `generator`, on the CPU), dynamic guidance. Raises UserError on NaN or Inf, with the step.
        """
        if sampler not in ("ddim", "dpm"):
            raise UserError(f"--sampler {sampler}: needs ddim or dpm")
        schedule, net, before = CogSchedule(self.scheduler, steps), self.network("transformer"), None
        ctx = (ctx if guidance > 1 else ctx[1:]).to(self.device, self.dtype)
        z, z_img = z.to(self.device, torch.float32), z_img.to(self.device, self.dtype)
        for i, t in enumerate(tqdm(schedule.timesteps.tolist(), "denoise", leave=False, disable=None)):
            both = torch.cat([z.to(self.dtype), z_img], 2).expand(len(ctx), -1, -1, -1, -1)
            v = net(both, ctx, torch.full((len(ctx),), t, device=self.device)).float()
            scale = guidance if sampler == "ddim" else dynamic_guidance(guidance, t, steps)
            v = v[:1] + scale * (v[1:] - v[:1]) if guidance > 1 else v
            if sampler == "ddim":
                z = schedule.ddim(v, i, z)
            else:
                z, before = schedule.dpm(v, i, z, torch.randn(z.shape, generator=generator).to(z), before)
            if not z.isfinite().all():
                raise UserError(f"sampling gave NaN or Inf at step {i + 1} of {steps}; try float32")
            yield z

    def decode(self, z):
        """z (1, f, 16, h, w), scaled -> video (1, F, 3, 8h, 8w) float32 in [-1, 1], on the CPU, in slices."""
        z = (z / self.config["vae"]["scaling_factor"]).to(self.device, self.dtype)
        return torch.cat([x.float().cpu().clamp(-1, 1) for x in self.network("vae").decode_chunks(z)], 1)

    def animate(self, image, caption, seed=0, n_frames=49, steps=50, guidance=6.0, negative="",
                sampler="ddim", z_T=None, image_noise=None):
        """Make a clip that starts from an image: video (1, F, 3, 480, 720) float32 in [-1, 1], at 8 fps.

        image (3, H, W) in [-1, 1] or PIL, any aspect (see fit_image). seed: the same noise on every device.
        n_frames: 49 as published; other counts use computed positions, and f = (n_frames - 1) // 4 + 1
        latents give F = 4f - 3 frames, or 4f if f is even, so 48 gives 48. z_T (1, f, 16, h, w) and
        image_noise (1, 1, 16, h, w) replace the seed's draws. Raises UserError for a bad image or step count,
        and where F is below n_frames.
        """
        h, w, c = (self.config["transformer"][k] for k in ("sample_height", "sample_width", "out_channels"))
        f = (n_frames - 1) // 4 + 1
        if not 1 <= n_frames <= 4 * f - 3 * (f % 2):
            raise UserError(f"--frames {n_frames}: the clip would have {max(0, 4 * f - 3 * (f % 2))}; pass "
                            "49 (as published), a multiple of 8, or one more than that")
        CogSchedule(self.scheduler, steps)                      # a bad step count shows before minutes of T5
        image, g = fit_image(image, 8 * h, 8 * w), torch.Generator().manual_seed(seed)
        drawn = [torch.randn(1, n, c, h, w, generator=g) for n in (1, f)]
        ctx = self.text_states([negative, caption])
        z_img = self.encode_image(image, f, drawn[0] if image_noise is None else image_noise)
        for z in self.denoise(drawn[1] if z_T is None else z_T, z_img, ctx, steps, guidance, sampler, g):
            pass
        return self.decode(z)


# ----------------------------------------------------------------------------------------------------------
# Command line: python curate.py scene OUT [--seed 68 --task effect ...]
# ----------------------------------------------------------------------------------------------------------

def tune(path, seconds, seed, rate=44100):
    """A small tune for a clip, as a wav file: plucked notes of a pentatonic scale, half a second each."""
    rng, sound = Random(seed), np.zeros(int(rate * (seconds + 1)), np.float32)
    for beat in range(int(seconds * 2)):
        t = np.arange(rate) / rate
        pitch = 220 * 2 ** (rng.choice((0, 2, 4, 7, 9, 12, 14, 16)) / 12)
        note = sum(np.sin(2 * np.pi * pitch * k * t) / k ** 2 for k in (1, 2, 3)) * np.exp(-5 * t)
        sound[beat * rate // 2:beat * rate // 2 + rate] += 0.25 * note
    wavfile.write(path, rate, (sound[:int(rate * seconds)] * 32767).clip(-32767, 32767).astype(np.int16))


def command_scene(args):
    """Draw one scene and one edit of it: OUT_source.mp4 (--sound: with a tune) and OUT_target.mp4, the true edit."""
    scene = draw_scene(args.seed, args.domain, args.split)
    tasks = possible_tasks(scene)
    if args.task and args.task not in tasks:
        raise UserError(f"--task {args.task}: does not fit scene {args.seed}; {', '.join(tasks)} do")
    edit = propose_edit(scene, args.seed, args.task, args.split)
    out, n = Path(args.out), round(args.seconds * args.fps)
    out.parent.mkdir(parents=True, exist_ok=True)
    height, width = args.size, round(args.size * args.aspect / 2) * 2
    for name, s in (("target", edit.target), ("source", scene)):
        path = out.with_name(f"{out.name}_{name}.mp4")
        frames = torch.from_numpy(render(s, n, height, width, args.fps)).permute(0, 3, 1, 2)[None] * 2 - 1
        write_video(path, frames, args.fps)
    if args.sound:
        wav = out.with_name(f"{out.name}_tune.wav")
        tune(wav, n / args.fps, args.seed)
        write_video(path, frames, args.fps, audio=replace(probe(path), path=wav, audio=True))
        wav.unlink()
    print(f"{out}_source.mp4: {edit.source_caption}\n{out}_target.mp4: {edit.instruction}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw scenes of the shapes world.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = p.add_subparsers(dest="command", required=True).add_parser("scene", help="one scene and its true edit, as videos")
    p.add_argument("out", help="where to, without ending")
    p.add_argument("--seed", type=int, default=68, help="which scene")
    p.add_argument("--domain", default="synthetic", choices=["synthetic", "real"], help="clean, or like a hand-held camera")
    p.add_argument("--split", default="held", choices=["train", "held"], help="held: scenes and wordings that training never saw")
    p.add_argument("--task", choices=TASKS, help="kind of edit; default any that fits")
    p.add_argument("--size", type=int, default=360, help="height in pixels")
    p.add_argument("--aspect", type=float, default=16 / 9, help="width / height")
    p.add_argument("--seconds", type=float, default=4, help="length")
    p.add_argument("--fps", type=float, default=12, help="frames per second")
    p.add_argument("--sound", action="store_true", help="give the source a tune")
    command_scene(p.parse_args((argv or sys.argv[1:])[1:]))


if __name__ == "__main__":
    run(main)
