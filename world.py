"""The world that `tiny` learns from: scenes drawn by code, with the exact target video of every edit.

With `Pictures` the scenes are made of photographs and cut-out things, moved by code, so targets stay exact.

Needs numpy, scipy and pillow only and imports nothing of the project. Contents: names and scenes, pictures,
scenes at random, canvases, shapes, rendering, effects and styles (EFFECTS, STYLES), captions and
instructions, edits
(TASKS), the words that all of it can say, pairs and clips for training, curation and tests. `draw_scene` and
`propose_edit` describe, `render` draws.
"""
import io
import math
import re
import zlib
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageOps
from scipy.io import wavfile
from scipy.ndimage import gaussian_filter, map_coordinates

# ----------------------------------------------------------------------------------------------------------
# The shapes world: procedurally drawn clips with captions, instructions and the true result of every edit.
# Lengths are in heights of the frame; x runs over [0, aspect], y downwards over [0, 1]; time is in seconds.
# ----------------------------------------------------------------------------------------------------------

COLOURS = {"red": (.85, .12, .12), "orange": (.96, .55, .10), "yellow": (.97, .87, .15),
           "green": (.15, .65, .20), "cyan": (.10, .80, .85), "blue": (.13, .25, .85),
           "purple": (.52, .16, .70), "pink": (.97, .55, .75), "white": (.96, .96, .96),
           "black": (.06, .06, .06), "brown": (.48, .28, .12), "gray": (.50, .50, .50)}
KINDS = ("circle", "square", "triangle", "star", "heart", "ring", "diamond", "cross", "moon", "hexagon")
TEXTURES = {"plain": "", "striped": "stripes", "dotted": "dots", "checkered": "checks"}    # adjective -> noun
# By how many equal turns an outline or a pattern looks the same; 0: by any.
TURNS = {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "heart": 1, "diamond": 2, "cross": 4,
         "moon": 1, "hexagon": 6, "plain": 0, "striped": 2, "dotted": 4, "checkered": 4}
PLACES = {f"{row} {col}".replace("middle middle", "middle").strip(): (u, v)
          for row, v in (("top", .2), ("middle", .5), ("bottom", .8))
          for col, u in (("left", .2), ("middle", .5), ("right", .8))}

# Tones met in photographs; a natural background mixes two or three of them (chosen by eye, sRGB).
TONES = tuple(tuple(map(float, tone.split())) for tone in re.split(",", """
    .53 .70 .88,  .25 .45 .72,  .35 .47 .20,  .16 .25 .13,  .50 .35 .22,  .85 .66 .54,
    .45 .29 .21,  .80 .70 .52,  .50 .49 .47,  .25 .25 .27,  .90 .92 .95,  .60 .28 .20,
    .10 .35 .45,  .45 .30 .42,  .90 .70 .35,  .06 .07 .12,  .92 .88 .80,  .70 .40 .12,
    .20 .50 .48,  .75 .40 .45,  .62 .66 .70,  .72 .76 .45,  .32 .22 .14,  .97 .97 .97"""))

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
    picture: str = ""               # a cut-out's file instead of an outline; colour "": as it is
    flip: bool = False              # it is mirrored


@dataclass(frozen=True)
class Background:
    kind: str                       # one of PAINT, or clouds, leaves, sand, grass, photo, or photograph
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
    picture: str = ""               # photograph: its file


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
class Pictures:
    """What scenes may be made of, as `find_pictures` finds it: files of one split."""
    photos: dict                    # {word for the place, or "": (file, ...)}
    cutouts: dict                   # {kind: (file, ...)}


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
    pictures: Pictures | None = field(default=None, repr=False)         # that edits may bring in


@dataclass(frozen=True)
class Edit:
    instruction: str
    task: str
    target: Scene
    source_caption: str
    target_caption: str
    deterministic: bool             # the target follows from source and instruction alone
    is_global: bool                 # every pixel may change


# ---- pictures: photographs, and things cut out of theirs ---------------------------------------------------

def name_of(path):
    """The word for what a picture shows: fire-truck_2.png is a fire truck; of IMG_2041.jpg nobody knows."""
    words = re.sub(r"_\d{1,2}$", "", path.stem).lower().replace("-", " ")
    return words if re.fullmatch("[a-z]+( [a-z]+)*", words) else ""


def find_pictures(photos, cutouts, split="train"):
    """Pictures of a folder of photographs and one of cut-outs (PNG with alpha), named as `name_of` says.

    Held out: every eighth photograph, and of a kind with several cut-outs the last. Raises ValueError, which
    names the file: where one is no picture, under 64 px or (cut-outs) 16, or shows nothing or no kind.
    """
    def listed(folder, endings):
        files = sorted(x for x in Path(folder).iterdir() if x.suffix.lower() in endings)
        if not files:
            raise ValueError(f"{folder}: holds no pictures ({', '.join(endings)})")
        return files

    places, kinds = {}, {}
    for i, path in enumerate(listed(photos, (".jpg", ".jpeg", ".png", ".webp"))):
        check_picture(path, 64)
        if (i % 8 == 3) == (split == "held"):
            places.setdefault(name_of(path), []).append(str(path))
    for path in listed(cutouts, (".png", ".webp")):
        alpha = check_picture(path, 16)
        if not alpha[0] < 64 < alpha[1]:
            raise ValueError(f"{path}: needs a transparent ground and something on it")
        if not name_of(path):
            raise ValueError(f"{path}: its name says no kind; needs one, as in fire-truck_2.png")
        kinds.setdefault(name_of(path), []).append(str(path))
    if len(kinds) > 1000:
        raise ValueError(f"{cutouts}: {len(kinds)} kinds; the vocabulary takes 1,000")
    for kind, files in kinds.items():
        kinds[kind] = tuple(files[-1:] if split == "held" else files[:-1] or files)
    return Pictures({place: tuple(files) for place, files in places.items()}, kinds)


def check_picture(path, least):
    """(lowest, highest) alpha of a picture that can be read."""
    try:
        with Image.open(path) as picture:
            if min(picture.size) < least:
                raise ValueError(f"is {picture.width}x{picture.height}; needs {least} px")
            return picture.convert("RGBA").getchannel("A").getextrema()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {str(error).split(chr(10))[0]}") from None


@cache
def _photo(path):
    """A photograph, squeezed to a square: (its levels as of `_mips`, here plain rgb; width over height)."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        sides = [CANVAS >> k for k in range(6)]
        levels = [np.asarray(picture.resize((n, n), Image.Resampling.BOX)) for n in sides]
        return levels, picture.width / picture.height


@cache
def _cutout(path):
    """A cut-out's levels, each half the one before: float32 (h, w, 4), colours multiplied by alpha, with a
    clear border; and its mean luma where it is opaque."""
    with Image.open(path) as picture:
        x = np.array(picture.convert("RGBA"), np.float32) / 255
    x[..., :3] *= x[..., 3:]
    levels = []
    while min(x.shape[:2]) >= 4:
        levels.append(np.pad(x, ((1, 1), (1, 1), (0, 0))))
        x = x[:x.shape[0] // 2 * 2, :x.shape[1] // 2 * 2]
        x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
    whole = levels[0].sum((0, 1))
    return levels, float(whole[:3] @ LUMA / whole[3])


def _draw_cutout(s, x, y, angle, pixel):
    """Shape s at offsets x (w,), y (h,) from its centre, in its radii -> (h, w, 4) float32, premultiplied.
    pixel: a pixel of the frame, in radii."""
    levels, mean = _cutout(s.picture)
    h, w = (n - 2 for n in levels[0].shape[:2])
    level = levels[min(max(round(math.log2(max(pixel * max(h, w) / 2, 1))), 0), len(levels) - 1)]
    ca, sa = math.cos(angle), math.sin(angle)
    lx, ly = ca * x + (sa * y)[:, None], -sa * x + (ca * y)[:, None]
    if s.flip:
        lx = -lx
    rows, cols = (n - 2 for n in level.shape[:2])
    at = (ly * max(h, w) / h + 1) * rows / 2 + .5, (lx * max(h, w) / w + 1) * cols / 2 + .5
    out = np.stack([map_coordinates(level[..., c], at, order=1) for c in range(4)], axis=-1)
    if s.colour:                                    # its hue, with the thing's own shading
        shade = _luma(out[..., :3]) / np.maximum(out[..., 3:], 1e-3) / mean
        colour = np.array(s.rgb, np.float32)
        colour = colour * np.minimum(shade, 1) + (1 - colour) * np.clip((shade - 1) / 2, 0, .6)
        out[..., :3] = colour * out[..., 3:]
    else:
        out[..., :3] *= np.array(s.rgb, np.float32)                 # brighter or darker, as its place is
    return out


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

    def near(a, b, by_a=.06, by_b=.06):
        return _jitter(rng, a, by_a), _jitter(rng, b, by_b)

    if kind == "clouds":
        top = rng.choice(((.30, .52, .85), (.45, .65, .90), (.35, .42, .60), (.55, .40, .55)))
        return Background(kind, "clouds", near(top, (.93, .93, .95), .08), seed, contrast=.03,
                          scale=rng.uniform(.2, .5))
    if kind == "sand":
        return Background(kind, "sand", near((.80, .69, .50), (.66, .53, .36), .06, .05), seed,
                          contrast=rng.uniform(.04, .09), chroma=.01, scale=rng.uniform(.5, .8))
    if kind == "grass":
        return Background(kind, "grass", near((.30, .48, .15), (.46, .60, .22)), seed,
                          contrast=rng.uniform(.08, .14), chroma=.02, scale=rng.uniform(.4, .6))
    if kind == "leaves":
        tones = rng.choice((((.25, .42, .14), (.50, .60, .22)),     # green, autumn, shade
                            ((.55, .30, .10), (.82, .62, .20)),
                            ((.16, .30, .18), (.36, .46, .24))))
        return Background(kind, "leaves", near(*tones), seed, contrast=rng.uniform(.08, .16), chroma=.04,
                          scale=rng.uniform(.3, .6))
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


def _thing(rng, scene, split, taken, tinted):
    """A cut-out of a kind not taken: as bright as the scene wants, or with a chance `tinted` in a colour."""
    kind = rng.choice([kind for kind in scene.pictures.cutouts if kind not in taken])
    file = rng.choice(scene.pictures.cutouts[kind])
    gain = (float(np.dot(scene.background.rgb[0], LUMA)) / max(_cutout(file)[1], .02)) ** .25
    colour, rgb = "", (min(max(gain, .6), 1.15),) * 3
    if rng.random() < tinted and not set(kind.split()) & set(COLOURS):      # nobody says: a blue red flower
        colour = rng.choice([c for c in COLOURS if split == "held" or not is_held_out(kind, c)])
        rgb = COLOURS[colour]
    return Shape(kind, colour, rgb, rng.uniform(.2, .8), rng.uniform(.35, .8), rng.uniform(.16, .32),
                 angle=rng.uniform(-.12, .12), shadow=rng.uniform(.2, .4), picture=file,
                 flip=rng.random() < .5)


def _photograph(rng, pictures, place=None):
    """A crop of a photograph, of a place or of any."""
    files = [(name, file) for name, some in pictures.photos.items() for file in some if place in (None, name)]
    name, file = rng.choice(files)
    mean = _photo(file)[0][-1].mean((0, 1)) / 255
    return Background("photograph", article(name or "photograph"), (tuple(mean.tolist()),),
                      rng.getrandbits(31), scale=rng.uniform(.55, 1), picture=file)


def draw_picture_scene(seed, pictures, split="train"):
    """A random Scene of pictures: nought to three things, most of them cut out, before a photograph or, now
    and then, a drawn background; they drift, bounce, sway and turn a little."""
    rng = Random(f"pictures {split} {seed}")
    background = _photograph(rng, pictures)
    if rng.random() < .2:
        kind = rng.choice(OFTEN + ("clouds", "leaves", "sand", "grass", "photo"))
        background = _flat_background(rng, kind) if kind in PAINT else _natural_background(rng, kind)
    scene = Scene(seed, "synthetic", background, light=(rng.uniform(-.8, .8), -.8), pictures=pictures)
    objects, n = [], rng.choice((0, 1, 1, 1, 2, 2, 3))
    twins = n == 2 and rng.random() < .25           # two of a kind, told apart by their sides
    for i in range(n):
        taken = [s.kind for s in objects]
        if twins and objects:
            kind = objects[0].kind
            s = replace(objects[0], u=.75, v=rng.uniform(.35, .8), picture=rng.choice(pictures.cutouts[kind]))
        elif twins or rng.random() < .8:
            s = _thing(rng, scene, split, taken, .25)
        else:
            kinds = [k for k in KINDS if k not in taken]
            kind, colour = _pick_pair(rng, split, kinds, list(COLOURS), background.rgb)
            s = Shape(kind, colour, _jitter(rng, COLOURS[colour], .05), rng.uniform(.2, .8),
                      rng.uniform(.2, .8), rng.uniform(.11, .2), angle=rng.uniform(-.4, .4),
                      shadow=rng.uniform(0, .4))
        if twins and not objects:
            s = replace(s, u=.25)
        if any(math.hypot(s.u - o.u, s.v - o.v) < .8 * (s.radius + o.radius) for o in objects):
            continue
        motion = "sway" if twins else rng.choice(("still", "line", "line", "sway"))
        heading, pace = rng.uniform(0, 6.28), rng.uniform(.03, .2)
        speed = rng.uniform(.02, .08), rng.uniform(1, 4)
        if motion == "line":
            speed = pace * math.cos(heading), .4 * pace * math.sin(heading)
        objects.append(replace(s, motion=motion, speed=speed, phase=rng.uniform(0, 6.28),
                               spin=rng.uniform(-2, 2)))
    pan, turn = rng.uniform(0, .08), rng.uniform(0, 6.28)
    camera = Camera((pan * math.cos(turn), pan * math.sin(turn)), rng.choice((0, rng.uniform(.02, .15))),
                    rng.uniform(.3, 1.2), rng.uniform(0, 6.28))
    return replace(scene, objects=tuple(objects), camera=camera)


def draw_scene(seed, domain="synthetic", split="train"):
    """A random Scene, the same for the same arguments on every machine.

    domain "synthetic" is clean; "real" adds clutter, camera shake, flicker, sensor noise and JPEG blocks.
    split "held" has seeds of its own and also uses the (kind, colour) pairs that training never shows.
    """
    assert domain in ("synthetic", "real") and split in ("train", "held"), (domain, split)
    rng = Random(f"scene {split} {domain} {seed}")
    n_objects = 0 if rng.random() < 0.15 else rng.choice((1, 1, 2, 2, 2, 3, 3))
    # Scenes without objects teach the global edits, so they look like footage.
    if rng.random() < (0.28 if n_objects else 0.9):
        kind = rng.choice(("photo",) * (3 if n_objects else 10) + ("leaves", "clouds", "sand", "grass"))
        background = _natural_background(rng, kind)
    else:
        background = _flat_background(rng, rng.choice(OFTEN))

    def sometimes(chance, low, high):
        return rng.uniform(low, high) if rng.random() < chance else 0.0

    objects = []
    kinds, colours = list(KINDS), list(COLOURS)
    avoid = background.rgb[:2] if background.horizon < 0 else background.rgb
    for _ in range(n_objects):
        kind, colour = _pick_pair(rng, split, kinds, colours, avoid)
        kinds.remove(kind)
        colours.remove(colour)
        radius = rng.uniform(.11, .21 if n_objects < 3 else .16)
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
            angle=rng.uniform(-.4, .4), spin=sometimes(.35, -1.5, 1.5),
            motion=motion, speed=speed, phase=rng.uniform(0, 2 * math.pi),
            shade=sometimes(.5, .1, .35), shadow=sometimes(.35, .25, .5)))

    pan = sometimes(.5, .01, .07)
    turn = rng.uniform(0, 2 * math.pi) if pan else 0.0
    zoom = sometimes(.3, .02, .1)
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
    """x (S, S, 3), brought to unit variance -> [uint8 at S, S/2, ..., 16]: value = (byte - 128) / 36."""
    x = ((x - x.mean((0, 1))) / x.std((0, 1))).astype(np.float32)
    levels = []
    while True:
        levels.append(np.clip(np.rint(x * 36 + 128), 0, 255).astype(np.uint8))
        if len(x) == 16:
            return levels
        x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


@cache
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
        rows, cols = (slice(max(0, int(c - r[k])), int(c + r[k]) + 1) for c in (cy, cx))
        dy, dx = (np.arange(n)[rows, None] - cy) / r[k], (np.arange(n)[cols] - cx) / r[k]
        p, q = dx * np.cos(a) + dy * np.sin(a), dy * np.cos(a) - dx * np.sin(a)
        form, thin = rng.integers(3), rng.uniform(.35, 1)
        inside = (p * p + q * q / thin ** 2 < 1 if form == 0 else
                  np.maximum(abs(p), abs(q) / thin) < .72 if form == 1 else
                  (q < .5) & (abs(p) * 1.7 - q < .9))
        window = x[rows, cols]
        window[inside] = rng.standard_normal(3)
        shade = rng.uniform(-.6, .6) * p + rng.uniform(-.6, .6) * q
        window[inside, 0] += shade[inside]
    return _mips(gaussian_filter(x, (.7, .7, 0)))


@cache
def _noise_canvas(i):
    """Three channels of 1/f^p noise, p from 1 (rough) to 1.9 (soft)."""
    rng = np.random.default_rng([2, i])
    f = np.hypot(np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS)) + .5 / CANVAS
    spectrum = np.fft.rfft2(rng.standard_normal((3, CANVAS, CANVAS))) / f ** (1 + .9 * i / (N_NOISE - 1))
    return _mips(np.fft.irfft2(spectrum).transpose(1, 2, 0))


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


def _checks(x, y, soft):
    a, b = _square_wave(x, soft), _square_wave(y, soft)
    return a + b - 2 * a * b


def _draw_background(bg, ys, xs, aspect):
    """bg at world coordinates ys (H,), xs (W,) -> (H, W, 3) float32."""
    height, width = len(ys), len(xs)
    c = np.asarray(bg.rgb, np.float32)
    if bg.kind in PAINT:                            # m: how much of the second colour
        soft = abs(ys[-1] - ys[0]) / max(height - 1, 1) / bg.period
        m = np.clip(ys, 0, 1)[:, None]
        if bg.kind == "stripes":
            along = xs * math.cos(bg.angle) + ys[:, None] * math.sin(bg.angle)
            m = _square_wave(along / bg.period + .25, soft)
        elif bg.kind == "checkerboard":
            m = _checks(xs / bg.period + .25, ys[:, None] / bg.period + .25, soft)
        m = np.broadcast_to(m, (height, width))[..., None].astype(np.float32)
        return c[0] + m * (c[-1] - c[0])            # plain: there is one colour

    rng = Random(bg.seed)
    flip = rng.choice((-1, 1))
    if bg.kind == "photograph":
        levels, wide = _photo(bg.picture)
        oy, ox = rng.uniform(0, 1 - bg.scale), rng.uniform(0, max(0, 1 - bg.scale * aspect / wide))
        x = _sample(levels, oy + ys * bg.scale, ox + xs[::flip] * bg.scale / wide)
        return np.clip((x * 36 + 128) / 255, 0, 1)
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
    return np.clip(out, 0, 1, out=out)


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


@cache
def _sdf(kind):
    """The signed distance table of a kind, (SDF_SIZE, SDF_SIZE) float32, rows are y (down), unit radius."""
    axis = np.linspace(-SDF_REACH, SDF_REACH, SDF_SIZE)
    y, x = axis[:, None] + 0 * axis, axis + 0 * axis[:, None]
    disc = np.hypot(x, y)

    def corners(n, radii=(1.0,), turn=-math.pi / 2):
        a = turn + np.arange(n) * 2 * math.pi / n
        return np.stack([np.cos(a), np.sin(a)], 1) * np.resize(radii, n)[:, None]

    turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)      # the heart is the classic cosine curve
    up = (13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16
    outlines = {"square": np.array([(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]),
                "diamond": np.array([(0, -1.08), (.7, 0), (0, 1.08), (-.7, 0)]),
                "triangle": corners(3, (1.1,)) + (0, .18), "star": corners(10, (1.08, .46)),
                "hexagon": corners(6, turn=0.0), "heart": np.stack([np.sin(turn) ** 3, -up - .12], 1)}
    if kind in outlines:
        d = _polygon_distance(outlines[kind], x, y)
    elif kind == "circle":
        d = disc - .95
    elif kind == "ring":
        d = abs(disc - .72) - .24
    elif kind == "moon":                            # a disc with a bite
        d = np.maximum(disc - .98, .82 - np.hypot(x - .48, y + .1))
    else:                                           # cross
        d = np.minimum(np.maximum(abs(x) - .32, abs(y) - 1), np.maximum(abs(y) - .32, abs(x) - 1))
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


def _draw_shape(img, s, t, view, light, aspect):
    """Paint shape s over img (H, W, 3) in place, inside its bounding window only."""
    height, width = img.shape[:2]
    (cx, cy), r, zoom = _position(s, t, aspect), s.radius, view[2]
    if not s.screen:
        cx, cy = aspect / 2 + (cx - aspect / 2) * zoom - view[0], .5 + (cy - .5) * zoom - view[1]
        r *= zoom
    sx, sy, soft = 0.0, 0.0, 0.0                    # the shadow's offset; its half width, in radii
    if s.shadow:
        sx, sy, soft = -.22 * r * light[0], -.22 * r * light[1], .16
    reach, grow = r * 1.15 + 1 / height, soft * 1.5 * r

    def span(centre, shift):                        # pixels that the shape or its shadow may touch
        return slice(max(0, int((centre + min(shift - grow, 0) - reach) * height)),
                     max(0, int((centre + max(shift + grow, 0) + reach) * height) + 2))
    rows, cols = span(cy, sy), span(cx, sx)
    window = img[rows, cols]
    if not window.size:
        return
    y = (((np.arange(height)[rows] + .5) / height - cy) / r).astype(np.float32)
    x = (((np.arange(width)[cols] + .5) / height - cx) / r).astype(np.float32)
    angle, px = s.angle + s.spin * t, 1 / (r * height)      # px: one pixel in radii
    if s.picture:
        angle = s.angle + .1 * math.sin(s.spin * t)
        if s.shadow:
            dark = _draw_cutout(replace(s, colour=""), x - sx / r, y - sy / r, angle, max(px, .25))[..., 3:]
            window *= 1 - s.shadow * dark
        out = _draw_cutout(s, x, y, angle, px)
        window *= 1 - out[..., 3:]
        window += out[..., :3]
        return
    if s.shadow:
        d = _distance(s.kind, x - sx / r, y - sy / r, angle)[0]
        window *= (1 - s.shadow * np.clip(.5 - d / (2 * soft), 0, 1))[..., None]
    d, lx, ly = _distance(s.kind, x, y, angle)
    colour = np.array(s.rgb, np.float32)
    if s.texture != "plain":
        if s.texture == "striped":
            m = _square_wave(lx / .5, px / .5)
        elif s.texture == "checkered":
            m = _checks(lx / .8, ly / .8, px / .8)
        else:
            m = np.clip((.19 - np.hypot(np.mod(lx, .55) - .275, np.mod(ly, .55) - .275)) / px + .5, 0, 1)
        second = _rgb(.96, .96, .96) if np.dot(s.rgb, LUMA) < .6 else _rgb(.12, .12, .14)    # on light: dark
        colour = colour + m[..., None] * (second - colour)
    if s.shade:
        colour = colour * (1 + s.shade * (light[0] * x + (light[1] * y)[:, None]))[..., None]
    window += np.clip(.5 - d / px, 0, 1)[..., None] * (colour - window)


# ---- rendering -------------------------------------------------------------------------------------------

def _degrade(img, how, seed, t):
    """Flicker, blur, sensor noise and JPEG blocks on one frame (H, W, 3). Noise and blocks live on the pixel
    grid, so they are finer in a larger picture, as with a real camera."""
    if how.blur:
        sigma = how.blur * len(img)
        img = gaussian_filter(img, (sigma, sigma, 0), truncate=2.5)
    img = img * np.float32(1 + how.flicker * (math.sin(41.0 * t + seed % 7) + .6 * math.sin(23.0 * t)))
    rng = np.random.default_rng([seed % 2 ** 32, round(t * 1000) % 2 ** 32])
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
        frames = OPERATIONS[name](frames, times, seed)
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


def _fall(x, times, dots, fade, gain, lift, colour):
    """Soft dots of a colour over a picture that is faded, then scaled and lifted a channel.

    dots(t) -> (pixel indices y, x, opacities), which broadcast.
    """
    out = np.empty_like(x)
    _, height, width, _ = x.shape
    for i, t in enumerate(times):
        py, px, a = np.broadcast_arrays(*dots(t))
        ok = (py >= 0) & (py < height) & (px >= 0) & (px < width)
        density = np.bincount((py * width + px)[ok], -np.log1p(-np.minimum(a, .995))[ok], height * width)
        alpha = (1 - np.exp(-density)).reshape(height, width, 1).astype(np.float32)
        ground = (x[i] + fade * (_luma(x[i]) - x[i])) * gain + lift
        out[i] = ground + alpha * (colour - ground)
    return _unit(out)


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
    k = math.ceil(r.max() * height + 1)
    o = np.arange(-k, k + 1)

    def flakes(t):
        fy = np.mod(py * 1.1 + (.12 + .3 * depth) * t, 1.1) - .05
        fx = np.mod(px + .03 * np.sin(1.5 * t + phase) + .04 * t, span)
        values = np.stack([fy * height - .5, fx * height - .5, r * height, .6 + .38 * depth])
        cy, cx, rr, bright = values[:, fx < width / height + .05][..., None, None]
        gy, gx = np.rint(cy).astype(int) + o[:, None], np.rint(cx).astype(int) + o
        a = np.clip((rr - np.hypot(gy - cy, gx - cx)) / np.maximum(.7 * rr, 1) + .5, 0, 1)     # soft discs
        return gy, gx, a * bright
    return _fall(x, times, flakes, .3, .78, _rgb(.19, .20, .22), _rgb(.97, .98, 1))


def rain(x, times, seed):
    """Slanted light streaks over a darker, cooler picture."""
    _, height, width, _ = x.shape
    rng = np.random.default_rng([4, seed % 2 ** 32])
    n, span, slant = 420, max(4.0, width / height), -.22
    px, py, depth = rng.random(n) * span, rng.random(n), rng.random(n)
    half = np.maximum((.004 + .003 * depth) * height, .7)                   # half width in pixels
    rows = np.arange(math.ceil(.16 * height) + 1)[:, None]
    k = np.arange(-math.ceil(half.max()), math.ceil(half.max()) + 1)

    def streaks(t):
        fy = np.mod(py * 1.2 + (1.2 + .8 * depth) * t, 1.2) - .18
        fx = np.mod(px + slant * (1.2 + .8 * depth) * t, span) - .1
        values = np.stack([fy, fx, .06 + .10 * depth, half, .35 + .35 * depth])
        top, left, length, wide, bright = values[:, fx < width / height + .1][..., None, None]
        cx = left * height + slant * rows                                   # each row's centre
        gx = np.rint(cx).astype(int) + k
        along = np.clip(rows / height / length, 0, 1)                       # brightest at the lower end
        a = np.clip(wide - abs(gx - cx) + .5, 0, 1) * (along * (along < 1))
        return np.floor(top * height).astype(int) + rows, gx, a * bright
    return _fall(x, times, streaks, .25, _rgb(.66, .72, .80), .02, _rgb(.86, .90, .96))


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


@dataclass(frozen=True)
class Effect:
    """A global edit: an exact operation on any footage, and how people speak of it."""
    operation: object               # (frames (F, H, W, 3) in [0, 1], times (F,) in seconds, seed) -> frames
    caption: str                    # what it adds to a caption
    wordings: str                   # for training / held out, of the same words; {it}: the clip
    random: bool = False            # it depends on its seed, so nobody can know the exact target

    def __call__(self, frames, times, seed):
        return self.operation(frames, times, seed)


# A new effect is one function above and one entry here.
EFFECTS = {
    "grayscale": Effect(grayscale, "in black and white", """
        make {it} grayscale; make {it} black and white; turn {it} into black and white; convert {it} to
        grayscale; remove all color; desaturate {it}; make {it} monochrome; take the color out of {it};
        change {it} to black and white; make {it} a black and white film; make {it} gray; show {it} without
        color; drop the colors
        / convert {it} to black and white; turn {it} into grayscale; take away all color"""),
    "sepia": Effect(sepia, "in sepia tones", """
        make {it} sepia; turn {it} sepia; apply a sepia filter; give {it} sepia tones; make {it} look like
        an old photo; add a sepia tone to {it}; convert {it} to sepia; make {it} vintage; make {it} look
        like a vintage film; give {it} an old brown tone; sepia
        / change {it} to sepia; add a sepia filter to {it}; give {it} an old sepia look"""),
    "night": Effect(night, "at night", """
        make {it} night; make it night time; turn day into night; change {it} to night; make {it} look like
        night; set {it} at night; show {it} at night; let it be night; make it a dark night; make {it}
        happen at night; change the time to night; turn {it} into a night scene; night
        / turn {it} into night; change the time of day to night; make it look like night time"""),
    "snow": Effect(snow, "in the snow", """
        make it snow; add snow; let it snow; add falling snow to {it}; put snow in {it}; make {it} snowy;
        add snow flakes; give {it} snow; cover {it} with falling snow; change the weather to snow; make it a
        snowy day; turn {it} into a snowy day; add a snow storm; make it snow hard; give {it} snowy weather;
        it should snow; make {it} look like it is snowing; snow
        / add snow to {it}; make snow fall; let snow flakes fall in {it}""", random=True),
    "rain": Effect(rain, "in the rain", """
        make it rain; add rain; let it rain; add falling rain to {it}; put rain in {it}; make {it} rainy;
        add rain drops; make rain fall in {it}; give {it} a rainy day; change the weather to rain; turn {it}
        into a rainy day; add a rain storm; add heavy rain; give {it} rainy weather; it should rain; make
        {it} look like it is raining; rain
        / add rain to {it}; make it a rainy day; let rain drops fall""", random=True),
    "fog": Effect(fog, "in the fog", """
        make it foggy; add fog; put fog in {it}; cover {it} with fog; add thick fog to {it}; make {it}
        misty; fill {it} with mist; let fog fall over {it}; change the weather to fog; make it a foggy day;
        give {it} foggy weather; add some mist; fog
        / add fog to {it}; fill {it} with fog; give {it} thick mist"""),
    "sunset": Effect(sunset, "at sunset", """
        make it sunset; make {it} warm; make {it} warmer; give {it} a warm light; make {it} look like
        sunset; set {it} at sunset; turn {it} into a sunset; add warm evening light; change {it} to golden
        hour
        / change the time of day to sunset; add a warm sunset light to {it}; show {it} at golden hour"""),
    "winter": Effect(winter, "in winter", """
        make {it} cold; make it winter; make {it} colder; give {it} a cold light; make {it} look like
        winter; turn {it} into winter; add cold blue light; set {it} in winter; make {it} cool
        / change {it} to winter; add a cold winter light to {it}; show {it} in winter"""),
    "invert": Effect(invert, "in negative colors", """
        invert the colors; invert {it}; make {it} a negative; turn {it} into a negative; show the negative
        of {it}; apply a negative filter; flip all colors to their opposite
        / convert {it} to a negative; invert all colors of {it}; change all colors to their opposite"""),
    "brighter": Effect(brighter, "in bright light", """
        make {it} brighter; make {it} bright; brighten {it}; add more light; turn up the light; increase the
        brightness; give {it} more light; make {it} lighter
        / increase the light in {it}; turn up the brightness; add more light to {it}"""),
    "darker": Effect(darker, "in dark light", """
        make {it} darker; make {it} dark; darken {it}; turn down the light; reduce the brightness; lower the
        brightness of {it}; give {it} less light; make {it} dim
        / reduce the light in {it}; turn down the brightness; lower the light"""),
    "vivid": Effect(vivid, "in vivid colors", """
        make {it} vivid; make the colors vivid; make {it} more colorful; saturate {it}; increase the
        saturation; boost the colors of {it}; give {it} vivid colors; make the colors stronger; make the
        colors more vivid; make {it} more saturated
        / boost the saturation; give {it} stronger colors; turn up the colors"""),
    "contrast": Effect(contrast, "with high contrast", """
        increase the contrast; make {it} high contrast; add more contrast; boost the contrast of {it}; give
        {it} high contrast; turn up the contrast; make the contrast stronger
        / add more contrast to {it}; give {it} more contrast; make {it} stronger in contrast"""),
    "faded": Effect(faded, "in faded colors", """
        make {it} faded; fade the colors; make {it} pale; make the colors pale; give {it} faded colors;
        reduce the saturation of {it}; wash out the colors; apply a faded filter
        / give {it} pale colors; fade {it}; wash out {it}"""),
    "blurry": Effect(blurry, "out of focus", """
        make {it} blurry; blur {it}; put {it} out of focus; add blur; make {it} soft and blurry; apply a
        blur filter; take {it} out of focus; give {it} a soft focus
        / add blur to {it}; make {it} out of focus; give {it} a soft blur"""),
}
STYLES = {
    "pixel art": Effect(pixel_art, "as pixel art", """
        make {it} pixel art; turn {it} into pixel art; make {it} look like an old video game; pixelate {it};
        change the style to pixel art; draw {it} as pixel art; show {it} in big pixels; convert {it} to a
        pixel art style
        / convert {it} to pixel art; make {it} look like pixel art; draw {it} in big pixels"""),
    "sketch": Effect(sketch, "as a pencil sketch", """
        make {it} a pencil sketch; turn {it} into a pencil sketch; make {it} a sketch; change the style to a
        pencil drawing; draw {it} with a pencil; turn {it} into a pencil drawing; make {it} look like a
        sketch; convert {it} to a sketch
        / change the style to a pencil sketch; draw {it} as a sketch;
        make {it} look like a pencil drawing"""),
    "cartoon": Effect(poster, "as a cartoon", """
        make {it} a cartoon; turn {it} into a cartoon; make {it} look like a poster; change the style to
        cartoon; draw {it} as a cartoon; turn {it} into a poster; make {it} a comic; convert {it} to a comic
        style
        / convert {it} to a cartoon style; make {it} look like a comic; change the style to a poster"""),
    "neon": Effect(neon, "as a neon drawing", """
        make {it} neon; turn {it} into neon lights; make {it} glow in neon; change the style to neon; draw
        {it} with neon light; give {it} glowing neon edges; make {it} a neon drawing; show {it} in neon
        style
        / turn {it} into a neon drawing; make {it} look like neon; draw {it} in glowing neon"""),
    "watercolor": Effect(watercolor, "as a watercolor painting", """
        make {it} a watercolor; turn {it} into a watercolor painting; make {it} a painting; change the style
        to watercolor; paint {it} with watercolor; make {it} look like a watercolor painting; draw {it} as a
        soft painting; convert {it} to a painting
        / convert {it} to a watercolor; paint {it} as a watercolor painting; turn {it} into a
        soft painting"""),
}
OPERATIONS = EFFECTS | STYLES
RANDOM_EFFECTS = tuple(name for name, x in OPERATIONS.items() if x.random)


# ---- captions and instructions ---------------------------------------------------------------------------

IT = ("it",) * 6 + ("the video", "the clip", "the scene", "the picture", "this video", "this clip", "this",
                    "the whole video", "everything")
POLITE = ("please {}", "can you {}?", "could you {}?", "{} please", "i want you to {}")   # training only
JOINTS = (" and ", ", and ", ", ", " and then ", ", then ")


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(s):
    return " ".join(f"{s.texture} {s.colour} {s.kind}".removeprefix("plain ").split())


def backdrop(bg):
    """A background's name with the right article."""
    return re.sub(r"^a (?=[aeiou])", "an ", bg.name)


def caption(scene):
    """One sentence, at most about 30 words: objects, background, effects and styles."""
    *names, things = [article(describe(s)) for s in scene.objects] or [""]
    if names:
        things = f"{', '.join(names)} and {things}"
    behind = "gradient", "clouds", "leaves", "photo", "photograph"
    on = "in front of" if scene.background.kind in behind else "on"
    place = backdrop(scene.background)
    about = f"{things} {on} {place}" if things else place
    return " ".join([about] + [OPERATIONS[name].caption for name, _ in scene.post])


def finish(rng, text, split):
    """Politeness and British spelling, by chance."""
    if split == "train" and not text.endswith("?") and not text.startswith("i want") and rng.random() < .15:
        text = rng.choice(POLITE).format(text)
    if rng.random() < .4:
        text = text.replace("color", "colour").replace("gray", "grey")
    if rng.random() < .08:
        text = text[0].upper() + text[1:]
        return text if text.endswith("?") else text + "."
    return text


# ---- edits: a function a task ----------------------------------------------------------------------------

@dataclass
class Ask:
    """How an instruction is worded, by chance."""
    rng: Random
    split: str
    within: bool = False            # as a part of a longer instruction
    avoid: tuple = ()               # kinds of objects to leave alone, since another part speaks of them

    def say(self, key, **words):
        """One wording of WORDINGS[key] of the split; no question within a longer instruction."""
        options = [w for w in WORDINGS[key][self.split == "held"] if not (self.within and w.endswith("?"))]
        return self.rng.choice(options).format(it=self.rng.choice(IT), **words)

    def choose(self, scene):
        """The object that an edit is about: (index, Shape, a name that fits nothing else in the scene)."""
        rng = self.rng
        at = rng.choice([i for i, s in enumerate(scene.objects) if s.kind not in self.avoid])
        s = scene.objects[at]                       # kinds and colours are unique in a scene
        twins = [o for o in scene.objects if o.kind == s.kind]
        if len(twins) > 1:
            return at, s, f"the {s.kind} on the {'left' if s.u == min(o.u for o in twins) else 'right'}"
        if s.picture:
            names = (s.kind,) + ((f"{s.colour} {s.kind}",) if s.colour else ())
            return at, s, "the " + rng.choice(names)
        names = (s.kind,) + (f"{s.colour} {s.kind}",) * 2 + (f"{s.colour} {rng.choice(('shape', 'object'))}",)
        if len(scene.objects) == 1 and not self.within and rng.random() < .3:
            names = s.kind, "shape", "object"
        return at, s, "the " + rng.choice(names)


@dataclass(frozen=True)
class Change:
    text: str                       # the instruction, before `finish`
    target: Scene
    known: bool                     # the target follows from source and instruction alone
    touched: tuple = ()             # kinds of objects that it speaks of
    is_global: bool = False         # every pixel may change


def edit_effect(scene, ask, table=EFFECTS):
    name = ask.rng.choice([n for n in table if n not in dict(scene.post)])
    target = replace(scene, post=scene.post + ((name, ask.rng.getrandbits(31)),))
    return Change(ask.say(name), target, not table[name].random, is_global=True)


def edit_background(scene, ask):
    """Another background; a painted one is exactly what its name says."""
    rng, bg = ask.rng, scene.background
    taken = {s.colour for s in scene.objects} | set(bg.name.split() if bg.kind == "plain" else ())
    places = [p for p in scene.pictures.photos if p and p not in bg.name] if scene.pictures else ()
    if places and rng.random() < .6:
        new = _photograph(rng, scene.pictures, rng.choice(places))
    elif rng.random() < .72:
        new = _flat_background(rng, rng.choice(OFTEN), exact=True, avoid=taken)
    else:
        kinds = [k for k in ("clouds", "leaves", "sand", "grass") if k != bg.kind]
        new = _natural_background(rng, rng.choice(kinds))
    if new.kind == "plain":
        text = ask.say("backdrop", c=new.name.split()[1])
    else:
        text = ask.say("background", b=backdrop(new))
    return Change(text, replace(scene, background=new, clutter=()), new.kind in PAINT)


def unused(names, field_name, scene, avoid=()):
    """Those of the names that no object of the scene has as its kind or colour."""
    return [x for x in names if x not in avoid and all(x != getattr(s, field_name) for s in scene.objects)]


def free_places(scene, radius=.13):
    return [p for p, (u, v) in PLACES.items()
            if all(math.hypot(u - s.u, v - s.v) > radius + s.radius for s in scene.objects)]


def edit_addition(scene, ask):
    """A new object at a named place, which the camera does not move."""
    if scene.pictures and ask.rng.random() < .85:
        place = ask.rng.choice(free_places(scene) or list(PLACES))
        new = _thing(ask.rng, scene, ask.split, [s.kind for s in scene.objects] + list(ask.avoid), .2)
        u, v = PLACES[place]
        new = replace(new, u=u, v=v, radius=ask.rng.uniform(.17, .24), angle=0.0, shadow=.3, screen=True)
        text = ask.say("addition", a=article(describe(new)), p=place)
        known = len(scene.pictures.cutouts[new.kind]) == 1
        return Change(text, replace(scene, objects=scene.objects + (new,)), known, (new.kind,))
    kinds, colours = unused(KINDS, "kind", scene, ask.avoid), unused(COLOURS, "colour", scene)
    kind, colour = _pick_pair(ask.rng, ask.split, kinds, colours, scene.background.rgb)
    place = ask.rng.choice(free_places(scene) or list(PLACES))
    new = Shape(kind, colour, COLOURS[colour], *PLACES[place], .13, screen=True)
    text = ask.say("addition", a=article(f"{colour} {kind}"), p=place)
    return Change(text, replace(scene, objects=scene.objects + (new,)), True, (kind,))


def put(scene, at, *new):
    """The scene with `new`, one Shape or none, in place of object `at`."""
    return replace(scene, objects=scene.objects[:at] + new + scene.objects[at + 1:])


def known_behind(scene, s):
    """Painted backgrounds are known behind an object, unless a piece of clutter hides there."""
    hides = any(math.hypot(c.u - s.u, c.v - s.v) < s.radius + c.radius for c in scene.clutter)
    return scene.background.kind in PAINT and not hides


def same_turn(old, new):
    """True where `new`, turned as `old` is, can be drawn from what `old` shows.

    Nobody sees how far a plain disc is turned, so the direction of its new stripes is anybody's guess; of a
    square that spins one cannot tell which side was up. A little turn, without spin, shows on all but discs.
    """
    if old.picture or new.picture:
        return True
    shows, needs = (math.gcd(TURNS[s.kind], TURNS[s.texture]) for s in (old, new))
    if shows == 0:
        return needs == 0 or not (old.angle or old.spin)
    return not old.spin or needs % shows == 0


def edit_removal(scene, ask):
    at, s, name = ask.choose(scene)
    return Change(ask.say("removal", o=name), put(scene, at), known_behind(scene, s), (s.kind,))


def edit_texture(scene, ask):
    at, s, name = ask.choose(scene)
    texture = ask.rng.choice([t for t in TEXTURES if t != s.texture])
    new = replace(s, texture=texture)
    if texture == "plain":
        text = ask.say("untexture", o=name, x=TEXTURES[s.texture])
    else:
        text = ask.say("texture", o=name, x=TEXTURES[texture], d=texture)
    return Change(text, put(scene, at, new), same_turn(s, new), (s.kind,))


def edit_object(scene, ask):
    """Another colour, another kind, or both."""
    at, s, name = ask.choose(scene)
    how = ask.rng.choice(("recolor", "recolor", "swap", "both"))
    if scene.pictures and how != "recolor" and ask.rng.random() < .85:
        taken = [o.kind for o in scene.objects] + list(ask.avoid)
        new = _thing(ask.rng, scene, ask.split, taken, how == "both")
        new = replace(s, kind=new.kind, colour=new.colour, rgb=new.rgb, picture=new.picture, texture="plain")
        text = ask.say("swap", o=name, a=article(describe(new)))
        known = known_behind(scene, s) and len(scene.pictures.cutouts[new.kind]) == 1
        return Change(text, put(scene, at, new), known, (s.kind, new.kind))
    if s.picture and how == "swap":                 # a shape needs a colour
        how = "both"
    kinds = [s.kind] if how == "recolor" else unused(KINDS, "kind", scene, ask.avoid)
    colours, behind = [s.colour], ()
    if how != "swap":
        colours, behind = unused(COLOURS, "colour", scene), scene.background.rgb
    kind, colour = _pick_pair(ask.rng, ask.split, kinds, colours, behind)
    new = replace(s, kind=kind, colour=colour, rgb=s.rgb if how == "swap" else COLOURS[colour])
    if kind != s.kind:
        new = replace(new, picture="")
    if how == "recolor":
        text, known = ask.say("recolor", o=name, c=colour), True
    else:
        text = ask.say("swap", o=name, a=article(kind if how == "swap" else f"{colour} {kind}"))
        known = known_behind(scene, s) and same_turn(s, new)
    return Change(text, put(scene, at, new), known, (s.kind, kind))


def edit_multiple(scene, ask):
    """Two edits in one instruction."""
    first, second = ask.rng.sample([t for t in possible_tasks(scene) if t != "multiple"], 2)
    needs = {TASKS[first].needs, TASKS[second].needs}
    if len({s.kind for s in scene.objects}) == 1 and needs <= {"object", "shape"}:
        second = ask.rng.choice(("effect", "background"))   # one object cannot take two edits
    a = TASKS[first].edit(scene, replace(ask, within=True))
    if second == "addition" and not free_places(a.target):
        second = "effect"
    b = TASKS[second].edit(a.target, replace(ask, within=True, avoid=a.touched))
    text = a.text + ask.rng.choice(JOINTS) + b.text
    return Change(text, b.target, a.known and b.known, a.touched + b.touched, a.is_global or b.is_global)


@dataclass(frozen=True)
class Task:
    """A kind of edit: how it is made, how often, in which words."""
    edit: object                    # (scene, ask) -> Change
    curated: float                  # odds among the tasks that fit a scene: in curation,
    drawn: float                    # in the pairs that `tiny` learns from, where local edits come more often,
    trained: float = 1              # and, of these, in the image editor's batches: what is hard
    needs: str = "object"           # in a scene: an object to change, a drawn "shape", "room" for more, or ""
    wordings: dict = field(default_factory=dict)        # key -> wordings as Effect has them


# A new kind of edit is one function above and one entry here. In wordings {it} is the clip, {o} the object,
# {c} a colour, {a} a new object with article, {p} a place, {b} a background, {x} and {d} a texture's names.
TASKS = {
    "style": Task(partial(edit_effect, table=STYLES), 1.2, 1, needs=""),
    "object": Task(edit_object, 2, 2.4, 1.5, wordings={
        "recolor": """
            make {o} {c}; change {o} to {c}; turn {o} {c}; paint {o} {c}; change the color of {o} to {c};
            color {o} {c}; make the color of {o} {c}; recolor {o} to {c}; give {o} a {c} color; can {o} be
            {c}?; {o} should be {c}; make {o} look {c}; dye {o} {c}
            / turn the color of {o} to {c}; paint {o} in a {c} color; let {o} be {c}""",
        "swap": """
            turn {o} into {a}; replace {o} with {a}; change {o} into {a}; swap {o} for {a}; make {o} {a};
            transform {o} into {a}; put {a} in place of {o}; what if {o} were {a}?; {o} should be {a}; make
            {o} look like {a}; use {a} instead of {o}
            / change {o} to be {a}; swap {o} with {a}; let {o} be {a}"""}),
    "background": Task(edit_background, 1.3, 1.3, 1.7, needs="", wordings={
        "background": """
            change the background to {b}; replace the background with {b}; put {b} in the background; set
            the background to {b}; make the background {b}; swap the background for {b}; turn the background
            into {b}; use {b} as the background; what if the background were {b}?
            / swap the background with {b}; use {b} for the background; let the background be {b}""",
        "backdrop": """
            make the background {c}; change the background to {c}; paint the background {c}; turn the
            background {c}; set the background to plain {c}; change the background color to {c}; replace the
            background with a {c} one; put {it} on a {c} background; color the background {c}
            / set the background color to {c}; let the background be {c}; paint a plain {c} background"""}),
    "multiple": Task(edit_multiple, 1, 1.2),
    "removal": Task(edit_removal, 1.3, 2, wordings={
        "removal": """
            remove {o}; delete {o}; erase {o}; get rid of {o}; take away {o}; take {o} out of {it}; remove
            {o} from {it}; make {o} disappear; cut out {o}; hide {o}; clear {o} away; {o} should not be
            there; drop {o}; make {it} without {o}
            / get {o} out of {it}; delete {o} from {it}; let {o} disappear"""}),
    "addition": Task(edit_addition, 1.2, 1.6, 1.5, needs="room", wordings={
        "addition": """
            add {a} at the {p}; put {a} at the {p}; place {a} in the {p}; insert {a} at the {p}; draw {a} in
            the {p}; add {a} to the {p}; show {a} in the {p}; put {a} in the {p} of {it}; i want {a} at the
            {p}
            / place {a} at the {p}; insert {a} in the {p} of {it}; let {a} be at the {p}"""}),
    "texture": Task(edit_texture, 1, 1.3, 2, needs="shape", wordings={
        "texture": """
            give {o} {x}; make {o} {d}; add {x} to {o}; put {x} on {o}; cover {o} with {x}; turn {o} {d};
            paint {x} on {o}; change the texture of {o} to {x}; draw {x} on {o}
            / turn the texture of {o} to {x}; let {o} be {d}; change {o} to be {d}""",
        "untexture": """
            make {o} plain; remove the pattern from {o}; take the texture off {o}; give {o} a plain color;
            make the texture of {o} plain; remove the {x} from {o}; erase the {x} on {o}; turn {o} plain
            / change {o} to plain; take the {x} off {o}; erase the pattern on {o}"""}),
    "effect": Task(edit_effect, 2, 1.4, needs="")}

def _split(text):
    return tuple(tuple(part.split("; ")) for part in " ".join(text.split()).split(" / "))


# key -> (training wordings, held-out wordings)
WORDINGS = {name: _split(x.wordings) for name, x in OPERATIONS.items()}
WORDINGS |= {key: _split(text) for task in TASKS.values() for key, text in task.wordings.items()}


def possible_tasks(scene):
    """The tasks that fit a scene: without objects only style, background and effect."""
    room = 0 < len(scene.objects) < 3 and free_places(scene)
    there = {"": True, "object": scene.objects, "room": room or scene.pictures and len(scene.objects) < 3,
             "shape": scene.objects and not any(s.picture for s in scene.objects)}
    return tuple(name for name, task in TASKS.items() if there[task.needs])


def propose_edit(scene, seed, task=None, split="train"):
    """A random Edit of a scene, the same for the same arguments.

    task: one of possible_tasks(scene), or None for any of them.
    split "held" speaks in held-out wordings and may ask for (kind, colour) pairs that training never shows.
    """
    rng = Random(f"edit {split} {scene.domain} {scene.seed} {seed}")
    fits = possible_tasks(scene)
    if task is None:
        task = rng.choices(fits, [TASKS[t].curated for t in fits])[0]
    assert task in fits, f"task {task!r} does not fit this scene; one of {', '.join(fits)} does"
    change = TASKS[task].edit(scene, Ask(rng, split))
    return Edit(finish(rng, change.text, split), task, change.target, caption(scene), caption(change.target),
                change.known, change.is_global)


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def known_words(pictures=None):
    """Sorted list of every word that training texts can contain."""
    nouns = [*COLOURS, *KINDS, *PLACES, *SKIES, *TEXTURES, *TEXTURES.values()]
    nouns += [operation.caption for operation in OPERATIONS.values()]
    # Words of captions and backgrounds, and the British spellings.
    fixed = ("a an the and on in front of background gradient from to stripes checkerboard clouds leaves "
             "sand grass natural scene shape object grey greyscale colour colours recolour watercolour "
             "colourful")
    templates = [wording for training, _ in WORDINGS.values() for wording in training]
    if pictures:
        nouns += ["photograph left right", *pictures.photos, *pictures.cutouts]
    text = " ".join([*nouns, fixed, *templates, *IT, *POLITE, *JOINTS])
    return sorted(set(words_of(re.sub(r"\{\w*\}", " ", text))))


def examples():
    """Instructions that show a person what the tiny model knows."""
    return ["make it snow", "make it grayscale", "make it night", "turn it into a pencil sketch",
            "make it pixel art", "make the circle blue", "turn the red circle into a green star",
            "change the background to blue and white stripes", "replace the background with a sunset sky",
            "remove the star", "add a yellow heart at the top left", "give the square dots",
            "remove the circle and make it sepia"]


# ---- pairs and clips for training, curation and tests ----------------------------------------------------

def quantise(frames):
    """float (F, H, W, 3) in [0, 1] -> uint8."""
    return np.rint(frames * 255).astype(np.uint8)


def true_region(source, truth, is_global):
    """(F, H, W) bool: where the true edit changes the picture by more than 4 %; everywhere if global."""
    return np.abs(source.astype(int) - truth).max(-1) > (-1 if is_global else 10)


def training_scene(seed, domain, pictures=None):
    """A drawn scene; with pictures three of four clean ones are made of them."""
    if pictures and domain == "synthetic" and seed % 4:
        return draw_picture_scene(seed, pictures)
    return draw_scene(seed, domain)


def draw_pair(seed, domain, rng, height, width, n_frames=1, pictures=None):
    """A scene and an edit of it: uint8 (2, H, W, 3), or (2, F, H, W, 3) of a clip, and their record."""
    scene = training_scene(seed, domain, pictures)
    tasks = possible_tasks(scene)
    edit = propose_edit(scene, seed, rng.choices(tasks, [TASKS[t].drawn for t in tasks])[0])
    t0 = rng.uniform(0, 4)
    frames = np.stack([render(s, n_frames, height, width, t0=t0) for s in (scene, edit.target)])
    record = dict(seed=seed, domain=domain, task=edit.task, instruction=edit.instruction,
                  source=edit.source_caption, target=edit.target_caption)
    frames = (frames * 255 + .5).astype(np.uint8)
    return frames[:, 0] if n_frames == 1 else frames, record


def drawn_origin(number, domain):
    """What a data set stores of a drawn source: enough to draw it again."""
    return {"scene": number, "domain": domain, "t0": round(Random(f"t0 {number}").uniform(0, 4), 3)}


def drawn_scene(origin):
    """(Scene, Edit, time of its first frame in seconds) of a drawn source."""
    scene = draw_scene(origin["scene"], origin["domain"])
    return scene, propose_edit(scene, origin["scene"]), origin["t0"]


def drawn_clip(origin, n_frames, size, fps=8.0):
    """The frames of a drawn source, uint8 (F, size, size, 3)."""
    scene, _, t0 = drawn_scene(origin)
    return quantise(render(scene, n_frames, size, size, fps, t0))


def true_clip(origin, source, fps=8.0):
    """(true edit of source (F, H, W, 3) uint8, mask), or None where the edit leaves something to chance."""
    _, edit, t0 = drawn_scene(origin)
    if not edit.deterministic:
        return None
    truth = quantise(render(edit.target, len(source), *source.shape[1:3], fps, t0))
    return truth, true_region(source, truth, edit.is_global)


def tune(path, seconds, seed, rate=44100):
    """A small tune for a clip, as a wav file: plucked notes of a pentatonic scale, half a second each."""
    rng = Random(seed)
    sound = np.zeros(int(rate * (seconds + 1)), np.float32)
    for beat in range(int(seconds * 2)):
        t = np.arange(rate) / rate
        pitch = 220 * 2 ** (rng.choice((0, 2, 4, 7, 9, 12, 14, 16)) / 12)
        note = sum(np.sin(2 * np.pi * pitch * k * t) / k ** 2 for k in (1, 2, 3)) * np.exp(-5 * t)
        sound[beat * rate // 2:beat * rate // 2 + rate] += 0.25 * note
    wavfile.write(path, rate, (sound[:int(rate * seconds)] * 32767).clip(-32767, 32767).astype(np.int16))
