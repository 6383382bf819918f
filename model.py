"""InstructVEdit's video editor in plain PyTorch (arXiv 2503.17641), loading the published weights' own keys.

Contents, in reading order
    loading      UserError, aside, hub_dir, read_json, read_tensors, load_weights
    small pieces attention, embedding, timestep_embedding, frame_positions
    text         Tokenizer, CLIPEncoder, TextModel, TextEncoder          (CLIP ViT-L/14's text tower)
    pixels       VAE                                                     (AutoencoderKL)
    U-Net        ResnetBlock, Attention, EPM, Transformer, MotionModule (with SMA), UNet
    samplers     DDIM, DPMSolver
    editor       VideoEditor: text + VAE + U-Net + three-branch guidance

Shapes: video (B, F, 3, H, W) in [-1, 1]; latents z (B, F, c, h, w); N = B*F where frames are folded into the batch;
tokens (N, L, D) with L = h*w. Attribute names are the keys of the published files (diffusers layout), so weights need
no translation table.
"""
import errno
import gzip
import html
import json
import math
import os
import re
import sys
import time
import unicodedata
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent
SD15 = "timbrooks/instruct-pix2pix"                                # MIT code, CreativeML OpenRAIL-M weights
SD15_MOTION = "guoyww/animatediff-motion-adapter-v1-5-2"           # Apache-2.0
N_FRAMES = 16           # of a training clip, of a pass of `edit_stream`, of EPM's matrix


# ---------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """What a user or a file got wrong: one line that names the flag or file, what came and what would fit."""


def run(main):
    """Call a script's `main()`; what a user, a file, the memory or the disk gets wrong is one line on stderr, exit status 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):           # a console that lacks a letter gets its number
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:                                         # who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)                # what is left to print goes nowhere
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted; nothing half-written", 130)
    except UserError as error:
        fail(f"error: {error}")
    except (OSError, RuntimeError, SafetensorError, MemoryError) as error:
        where = getattr(error, "filename", None)
        if out_of_memory(error):
            fail("error: out of memory: lower --size, --batch or --frames, pass --checkpointing in training, or --device cpu")
        if disk_full(error):
            fail(f"error: {where or 'a file'} cannot be written: the disk is full; make room and run the same again")
        if not where:
            raise
        fail(f"error: {where}: {error.strerror}")


def fail(text, code=2):
    print(text, file=sys.stderr)
    sys.exit(code)


def out_of_memory(error):
    """As CUDA, the CPU and Python say it."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def disk_full(error):
    """A full disk has many names."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


@contextmanager
def reading(path, hint=""):
    """What goes wrong while a user's file is read becomes one line that names it; a missing key reads "lacks 'key'"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:                      # the one boundary between people's files and this program
        if out_of_memory(error) or disk_full(error):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
        what = (what or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path}: {what}" + (f"; {hint}" if hint else "")) from None


def need(ok, message):
    """What a file should hold, inside `reading`."""
    if not ok:
        raise ValueError(message)


@contextmanager
def aside(path):
    """For a file that is there whole or not at all: yields a hidden path beside `path`, which takes its place if nothing fails."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")       # two processes may write the same
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)                                # of a full disk


def write_text(path, text):
    """A text file that is there whole or not at all; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, data):
    write_text(path, json.dumps(data, indent=1, default=str))


def save_tensors(path, tensors, dtype=None):
    """{name: tensor} as safetensors, floating ones in `dtype`; the file is there whole or not at all."""
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in tensors.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        save_file(tensors, part)


def begin(folder, settings, force=False):
    """settings.json says what made a folder. Other settings than its own are refused, by name, unless `force`."""
    path, settings = Path(folder) / "settings.json", json.loads(json.dumps(settings, default=str))
    old = read_json(path) if path.is_file() else settings
    changed = [f"{k} {old.get(k)} (now {settings.get(k)})" for k in settings | old if old.get(k) != settings.get(k)]
    if changed and not force:
        raise UserError(f"{folder}: made with {', '.join(changed)}; pass the same, another folder, or --force to go on with the new")
    write_json(path, settings)


def fingerprint(*paths):
    """Eight digits that tell files, or all files in folders, from others: their names, sizes, first and last megabyte."""
    crc = 0
    for path in map(Path, paths):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            size = file.stat().st_size
            crc = zlib.crc32(f"{file.name} {size}".encode(), crc)
            with open(file, "rb") as f:
                crc = zlib.crc32(f.read(1 << 20), crc)
                f.seek(max(1 << 20, size - (1 << 20)))
                crc = zlib.crc32(f.read(), crc)
    return f"{crc:08x}"


def placement(device=None, dtype=None):
    """Where and in what a network runs: the best device there is; bfloat16 on CUDA, else float32. Returns torch's own."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device or best)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def hub_dir(source, patterns=None):
    """Local directory of `source`: a directory as it is, or a hub id, downloaded on first use (files in `patterns`)."""
    source = str(source)
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{source}: no such directory; pass a directory in hub layout or a hub id like {SD15}")
    from huggingface_hub import snapshot_download                  # slow to import, and a local model needs none of it
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as e:                                         # its HTTP library's errors come through, too
        if disk_full(e):
            raise
        raise UserError(f"{source}: not in the local cache and the hub cannot give it ({type(e).__name__}); "
                        f"go online once, or pass a directory with a local copy of that repository") from None


def repository(source, patterns=None):
    """The folders that make up an editor: its own, then its base's, and so on; the first that has a network gives it.

    source: what VideoEditor.from_pretrained takes. A trained run holds what was trained; its model_index.json names the
    base that gives the rest: {"instructvedit": {"base": ...}}, a path from ROOT or a hub id. patterns: the hub's files,
    by default those of an editor.
    """
    folders = []
    while source:
        source = {"tiny": ROOT / "assets/tiny", "sd15": SD15}.get(str(source), source)
        folder = hub_dir(source, patterns or VideoEditor.FILES)
        if folder in folders:
            raise UserError(f"{folders[-1] / 'model_index.json'}: names {source} as its base, whose base it is itself")
        folders.append(folder)
        source = base_of(folder)
    return folders


def base_of(folder):
    """The base that a folder's model_index.json names, a path from ROOT or a hub id; None where it names none."""
    index = Path(folder) / "model_index.json"
    with reading(index):
        base = read_json(index).get("instructvedit", {}).get("base") if index.is_file() else None
        need(base is None or isinstance(base, str), f"base {base}: needs a path or a hub id")
    return str(ROOT / base) if base and (ROOT / base).is_dir() else base


def portable(source):
    """A source as a run's model_index.json names its base: inside ROOT by its path from there, else whole; hub ids as they are."""
    path = Path(source)
    if not path.is_dir():
        return str(source)
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def part(folders, name):
    """The first of these folders that has a sub-folder `name`: that sub-folder. UserError where none has."""
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    raise UserError(f"{folders[0]}: has no {name}/, and names no base that has; is it an editor in hub layout, and was its training finished?")


def finished(run):
    """True where a trained run (a directory) is complete: these files are written last."""
    return any((Path(run) / name).is_file() for name in ("model_index.json", "config.json"))


def read_json(path, kind=dict):
    """A JSON file that holds a `kind`, dict or list; UserError where it is missing, not JSON, or holds something else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the directory is not a complete copy in hub layout") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(data, kind):
        raise UserError(f"{path}: holds {type(data).__name__}, where a JSON {'object' if kind is dict else 'list'} is needed")
    return data


def build(network, path, cfg=None):
    """network(cfg), by default the config at `path`; UserError where that lacks something, cannot be built or is not known here."""
    cfg = cfg or read_json(path)
    for key, known in PLAIN_SETTINGS.items():
        if key in cfg and cfg[key] not in (known, None):
            raise UserError(f"{path}: {key} {cfg[key]}; known is {known}")
    try:
        return network(cfg)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{path}: lacks a setting or has an unusable one ({type(e).__name__}: {e})") from None


# settings of published configs that change results: built in here as Stable Diffusion 1.5's files have them
PLAIN_SETTINGS = dict(act_fn="silu", flip_sin_to_cos=True, freq_shift=0, center_input_sample=False, downsample_padding=1,
                      mid_block_scale_factor=1, resnet_out_scale_factor=1.0, resnet_time_scale_shift="default", shift_factor=0,
                      only_cross_attention=False, dual_cross_attention=False, class_embed_type=None, addition_embed_type=None,
                      latents_mean=None, latents_std=None)


def read_tensors(path):
    """All tensors of a .safetensors file (memory-mapped, so nothing is copied yet) or of a weights-only pickle."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError) as e:
        raise UserError(f"{path}: not a readable weight file ({(str(e) or type(e).__name__).splitlines()[0][:120]})") from None
    except Exception as e:                      # pickle.UnpicklingError: the file asks for more than plain tensors
        raise UserError(f"{path}: refused, it holds more than plain tensors ({type(e).__name__})") from None
    for wrapper in ("state_dict", "model"):     # AnimateDiff and ViCLIP wrap their tensors once
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    return {k: v for k, v in state.items() if torch.is_tensor(v) and isinstance(k, str)}


def find_tensors(folder):
    """Tensors of a hub-layout sub-folder: one file, or shards with an index. Returns (tensors, file name)."""
    folder = Path(folder)
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{index}: has no weight_map; it should say which file holds which tensor")
            shards = sorted(set(shards.values()))
            return {k: v for s in shards for k, v in read_tensors(folder / s).items()}, index.name
        for suffix in (".safetensors", ".fp16.safetensors", ".bin"):
            if (folder / (stem + suffix)).is_file():
                return read_tensors(folder / (stem + suffix)), stem + suffix
    raise UserError(f"{folder}: no weight file; expected diffusion_pytorch_model.safetensors or model.safetensors")


def load_weights(module, tensors, what, rename=(), drop=(), absent=(), only="", device=None, dtype=None):
    """Put `tensors` into `module` (usually built on the meta device) by assignment: nothing is allocated twice.

    rename: (old, new) substring pairs applied to the file's keys. drop: substrings of keys the file may hold and we
    do not use. absent: substrings of our keys that the file need not hold. Anything else missing, unexpected or of
    another shape is a UserError naming the keys. Floating tensors go to `device` and `dtype`.
    """
    ours, renamed = {k: v for k, v in module.state_dict().items() if only in k}, {}
    for k, v in tensors.items():
        if any(d in k for d in drop):
            continue
        for old, new in rename:
            k = k.replace(old, new)
        renamed[k] = v
    missing = [k for k in ours if k not in renamed and not any(a in k for a in absent)]
    extra = [k for k in renamed if k not in ours]
    wrong = [f"{k} {tuple(renamed[k].shape)} instead of {tuple(v.shape)}" for k, v in ours.items()
             if k in renamed and renamed[k].shape != v.shape]
    whole = [f"{k} {renamed[k].dtype}" for k, v in ours.items() if k in renamed and v.is_floating_point() > renamed[k].is_floating_point()]
    for problem, keys in (("lacks", missing), ("has unknown", extra), ("has wrong shapes for", wrong), ("has whole numbers in", whole)):
        if keys:
            raise UserError(f"{what}: {problem} {len(keys)} of {len(ours)} tensors, first {', '.join(keys[:3])}; "
                            "is it the file of another model, or cut short?")
    cast = {k: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for k, v in renamed.items()}
    module.load_state_dict(cast, assign=True, strict=False)
    left = sorted({a for a in absent if any(a in k and k not in renamed for k in ours)})
    note = f"; not in the file, as expected: {', '.join(left)}" if left else ""
    print(f"{what}: {len(renamed)} tensors{note}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------
# Small pieces
# ---------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),          # OpenAI CLIP; CLIP-H and DINOv2 use the exact one
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def attention(q, k, v, heads, mask=None, causal=False, scale=None):
    """softmax(q k^T * scale) v per head, fused. q (N, Lq, C), k and v (N, Lk, C) -> (N, Lq, C); scale 1/sqrt(C/heads)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))           # (N, heads, L, C/heads)
    x = fused_attention(q, k, v, mask, causal, scale)
    return x.transpose(1, 2).flatten(2)


def fused_attention(q, k, v, mask=None, causal=False, scale=None):
    """PyTorch's fused attention, (N, heads, L, d); on a CPU in float32, where its bfloat16 kernel is many times slower."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype.itemsize == 2:
        q, k, v, mask = (x if x is None or x.dtype == torch.bool else x.float() for x in (q, k, v, mask))
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


class GroupNorm(nn.GroupNorm):
    """On a CPU in float32, whose bfloat16 kernel is three times slower."""
    def forward(self, x):
        if x.device.type != "cpu" or x.dtype.itemsize != 2:
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def slower_in_bfloat16():
    """How many times longer this CPU takes for a matrix product in bfloat16 than in float32: many without instructions for it."""
    seconds = {}
    for kind in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=kind)
        for _ in range(3):                                         # the last counts, the first ones warm up
            start = time.perf_counter()
            x @ x
            seconds[kind] = time.perf_counter() - start
    return seconds[torch.bfloat16] / seconds[torch.float32]


def warn_if_slow(dtype, device, flag):
    """One line where bfloat16 was asked for on a CPU that is many times slower in it."""
    if dtype != torch.bfloat16 or torch.device(device).type != "cpu":
        return
    ratio = slower_in_bfloat16()
    if ratio > 5:
        print(f"warning: {flag}: this CPU multiplies {ratio:.0f} times slower in bfloat16 than in float32; leave it out",
              file=sys.stderr)


def embedding(n, width):
    """nn.Embedding with its usual start values, which on the meta device would first import torch's compiler (0.5 s)."""
    weight = torch.empty(n, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


def timestep_embedding(t, dim):
    """Sinusoids of the time step, cosines first. t (N,) -> (N, dim) float32."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def frame_positions(n_frames, dim, device, dtype):
    """AnimateDiff's sinusoidal frame positions (1, F, dim): sine on even channels, cosine on odd, base 10000."""
    cos, sin = timestep_embedding(torch.arange(n_frames, device=device), dim).chunk(2, dim=-1)
    return torch.stack([sin, cos], dim=-1).flatten(1)[None].to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# Pixels: video (B, F, 3, H, W) in [-1, 1], frames (F, H, W, 3) uint8
# ---------------------------------------------------------------------------------------------------------------

def to_tensor(rgb):
    """rgb (H, W, 3) uint8 -> frame (3, H, W) in [-1, 1]."""
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 127.5 - 1


def to_rgb(frame):
    """frame (3, H, W) in [-1, 1] -> rgb (H, W, 3) uint8."""
    return ((frame.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def resize(frame, height, width):
    """frame (3, H, W) -> (3, height, width), antialiased where it shrinks."""
    if frame.shape[-2:] == (height, width):
        return frame
    return F.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def to_u8(images):
    """A tensor (..., 3, H, W) in [-1, 1], a PIL image or array, or a list -> list of (H, W, 3) uint8."""
    if torch.is_tensor(images):
        return [to_rgb(frame) for frame in images.reshape(-1, *images.shape[-3:])]
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]
    return [np.asarray(im.convert("RGB") if isinstance(im, Image.Image) else im) for im in images]


def stretch(frame, width, height):
    """(H, W, 3) uint8 -> (height, width, 3), PIL bicubic."""
    same = frame.shape[:2] == (height, width)
    return frame if same else np.asarray(Image.fromarray(frame).resize((width, height), Image.BICUBIC))


def to_video(frames):
    """(F, H, W, 3) uint8 -> video (1, F, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(x) for x in frames])[None]


# ---------------------------------------------------------------------------------------------------------------
# Text: CLIP's tokenizer and text tower
# ---------------------------------------------------------------------------------------------------------------

C1 = {b: bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(128, 160)}        # what browsers make of them
CP1252 = {chr(b): b for b in range(128, 256)} | {c: b for b, c in C1.items()}             # character -> byte
TAIL = "[%s]" % "".join(re.escape(c) for c, b in CP1252.items() if b < 192)               # UTF-8's continuation bytes
# UTF-8 read as cp1252 or latin-1; lead bytes of rare scripts and French e-acute before a guillemet are left alone
MOJIBAKE = re.compile(f"[Â-ÅÌÎ-Ñ×-Û]{TAIL}|È[˜™š›\x98-\x9b]|Æ[’\x92]|Ë[†œ\x86\x9c]|"
                      f"[à-ï](?!\xa0»){TAIL}{{2}}|[ð-ô]{TAIL}{{3}}")
PLAIN = C1 | {i: unicodedata.normalize("NFKC", chr(i)) for i in [0x3000, *range(0xFF01, 0xFFF0)]}      # full width
PLAIN |= {ord(c): "'" for c in "ʼ‘’‚‛\x82\x91\x92"} | {ord(c): '"' for c in "“”„‟\x84\x93\x94"}
PLAIN |= {ord(c[0]): c[1:] for c in ("ﬀff ﬁfi ﬂfl ﬃffi ﬄffl ﬅſt ﬆst ĲIJ ĳij ŉ'n ǄDŽ ǅDž ǆdž ǇLJ ǈLj ǉlj ǊNJ ǋNj ǌnj "
                                     "ǱDZ ǲDz ǳdz").split()}
PLAIN |= dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)])


def clean_text(text):
    """CLIP's text cleaning: repair broken UTF-8, ligatures, curly quotes, full-width letters, HTML entities; lower case.

    OpenAI's tokenizer calls ftfy here; this follows its steps, but knows only cp1252 and latin-1 as wrong encodings.
    """
    def entity(m):                                                 # &EACUTE; counts as well
        c = html.unescape(m[0])
        return c if c != m[0] else html.unescape(m[0].lower())

    def repair(m):
        return bytes(CP1252[c] for c in m[0]).decode("utf-8", "ignore") or m[0]

    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")            # lone surrogates
    markup, before = "<" in text, None
    while text != before:                                          # a repair can uncover the next one
        before = text
        text = text if markup else re.sub(r"&#?\w{1,24};", entity, text)
        # one odd pair of letters proves nothing, unless it starts like the usual ones or holds a control character
        found, broken = MOJIBAKE.findall(text), None
        while text != broken and (len("".join(found)) > 2 or found and re.match("[ÂÃ]|.[\x80-\x9f]", found[0])):
            text, broken = MOJIBAKE.sub(repair, text), text
            found = MOJIBAKE.findall(text)
        text = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", text).translate(PLAIN)                # terminal colours
        text = unicodedata.normalize("NFC", text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()


class Tokenizer:
    """CLIP's byte-pair tokenizer from vocab.json + merges.txt. tokenizer(texts, length=77) -> ids (N, length) int64.

    `pad`, an id or a token, fills up after the end token; by default the end token itself, as in Stable Diffusion 1.
    """
    SPLIT = (r"<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")

    def __init__(self, vocab, merges, pad=None):
        if not isinstance(vocab, dict):                            # two file names, as published
            if not Path(merges).is_file():
                raise UserError(f"{merges}: missing; the directory is not a complete copy in hub layout")
            files, vocab = f"{vocab} and {Path(merges).name}", read_json(vocab)
            lines = Path(merges).read_text(encoding="utf-8", errors="replace").split("\n")
            merges = [tuple(m.split()) for m in lines if m.strip() and not m.startswith("#version")]
            if len(vocab) > len(merges) + 514:                     # 256 letters, alone and at a word's end, and two marks
                raise UserError(f"{files}: {len(merges)} merges make fewer than the {len(vocab)} tokens; is one cut short?")
        else:
            files = "vocabulary"
        try:
            self.vocab, self.cache = vocab, {}
            self.start, self.end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
            self.bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>")
        except Exception as e:                                     # tokenizers raises nothing more special
            raise UserError(f"{files}: no vocabulary and merges of CLIP's kind ({e})") from None
        if isinstance(pad, str) and pad not in vocab:
            raise UserError(f"{files}: hold no token {pad!r}, which should fill up a text")
        self.pad = self.end if pad is None else vocab[pad] if isinstance(pad, str) else pad
        self.split = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    @classmethod
    def from_bpe_gz(cls, path, pad=0):
        """From OpenAI's own bpe_simple_vocab_16e6.txt.gz, whose vocabulary is implied by the order of its merges."""
        lines = gzip.open(path, "rt", encoding="utf-8").read().split("\n")[1:49152 - 256 - 2 + 1]
        merges = [tuple(m.split()) for m in lines if m]
        kept = [*range(33, 127), *range(161, 173), *range(174, 256)]           # bytes that print as themselves
        letters = [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]
        words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
        return cls({w: i for i, w in enumerate(words + ["<|startoftext|>", "<|endoftext|>"])}, merges, pad)

    def encode(self, text):
        """Token ids of one text, without start and end."""
        ids = []
        for piece, _ in self.split.pre_tokenize_str(clean_text(text)):
            if piece not in self.cache:
                special = piece in ("<|startoftext|>", "<|endoftext|>")
                self.cache[piece] = [self.vocab[piece]] if special else [t.id for t in self.bpe.tokenize(piece)]
            ids += self.cache[piece]
        return ids

    def __call__(self, texts, length=77):
        out = torch.full((len(texts), length), self.pad, dtype=torch.int64)
        for row, text in zip(out, texts):
            ids = [self.start, *self.encode(text)[:length - 2], self.end]      # a long text keeps its end token
            row[:len(ids)] = torch.tensor(ids)
        return out


class CLIPAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, causal):
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=causal))


class CLIPLayer(nn.Module):
    def __init__(self, width, heads, mlp, act, eps):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.self_attn = CLIPAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
        self.act = ACTIVATIONS[act]

    def forward(self, x, causal):
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPEncoder(nn.Module):
    """Pre-norm transformer of both CLIP towers. x (N, L, D) -> same; `causal` for text."""
    def __init__(self, width, n_layers, heads, mlp, act, eps):
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(width, heads, mlp, act, eps) for _ in range(n_layers))

    def forward(self, x, causal=False):
        for layer in self.layers:
            x = layer(x, causal)
        return x


class TextModel(nn.Module):
    """CLIP's text tower. ids (N, L) int64 -> states (N, L, D) after the final norm. cfg: transformers' config keys."""
    def __init__(self, cfg):
        super().__init__()
        d, eps = cfg["hidden_size"], cfg.get("layer_norm_eps", 1e-5)
        self.embeddings = nn.ModuleDict({"token_embedding": embedding(cfg["vocab_size"], d),
                                         "position_embedding": embedding(cfg["max_position_embeddings"], d)})
        self.encoder = CLIPEncoder(d, cfg["num_hidden_layers"], cfg["num_attention_heads"], cfg["intermediate_size"],
                                   cfg.get("hidden_act", "quick_gelu"), eps)
        self.final_layer_norm = nn.LayerNorm(d, eps=eps)

    def forward(self, ids):
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"].weight[:ids.shape[1]]
        return self.final_layer_norm(self.encoder(x, causal=True))      # no padding mask: SD attends to the padding


class TextEncoder(nn.Module):
    """The editor's text encoder: all 77 states of CLIP's text tower, padding included, as in Stable Diffusion."""
    def __init__(self, cfg):
        super().__init__()
        self.text_model = TextModel(cfg)

    def forward(self, ids):
        return self.text_model(ids)


# ---------------------------------------------------------------------------------------------------------------
# Pixels <-> latents: AutoencoderKL
# ---------------------------------------------------------------------------------------------------------------

class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice plus a residual; `temb` (N, T) is added between the two. x (N, C, h, w)."""
    def __init__(self, c_in, c_out, groups, eps, temb=None):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(groups, c_out, eps), nn.Conv2d(c_out, c_out, 3, padding=1)
        if temb:
            self.time_emb_proj = nn.Linear(temb, c_out)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, temb=None):
        y = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            y = y + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Resample(nn.Module):
    """One 3x3 conv after (up) or while (down) the size changes by two."""
    def __init__(self, channels, how):
        super().__init__()
        stride, pad = (1, 1) if how == "up" else (2, 1 if how == "down" else 0)
        self.how, self.conv = how, nn.Conv2d(channels, channels, 3, stride=stride, padding=pad)

    def forward(self, x, size=None):
        if self.how == "up":                                       # to the skip's size, so odd sizes come back
            x = F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest")
        if self.how == "down_vae":                                 # SD's VAE pads right and bottom only
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class VAEAttention(nn.Module):
    """Single-head self-attention over all positions, in the middle of the encoder and decoder. x (N, C, h, w)."""
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)                                  # (N, h*w, C)
        y = self.to_out[0](attention(self.to_q(y), self.to_k(y), self.to_v(y), 1))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


def vae_mid(channels, groups):
    return nn.ModuleDict({"attentions": nn.ModuleList([VAEAttention(channels, groups)]),
                          "resnets": nn.ModuleList(ResnetBlock(channels, channels, groups, 1e-6) for _ in range(2))})


class VAEHalf(nn.Module):
    """Encoder, or with `up` the decoder: conv, levels of resnets, an attention in the middle, conv."""
    def __init__(self, cfg, up):
        super().__init__()
        self.up, widths, groups, n = up, cfg["block_out_channels"], cfg["norm_num_groups"], cfg["layers_per_block"]
        c_in, c_out, levels = cfg["in_channels"], 2 * cfg["latent_channels"], nn.ModuleList()
        if up:
            widths, n, c_in, c_out = widths[::-1], n + 1, cfg["latent_channels"], cfg["out_channels"]
        c = widths[0]
        for i, width in enumerate(widths):
            block = nn.ModuleDict({"resnets": nn.ModuleList(
                ResnetBlock(c if j == 0 else width, width, groups, 1e-6) for j in range(n))})
            if i < len(widths) - 1:
                block["upsamplers" if up else "downsamplers"] = nn.ModuleList([Resample(width, "up" if up else "down_vae")])
            c = width
            levels.append(block)
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.add_module("up_blocks" if up else "down_blocks", levels)
        self.mid_block = vae_mid(widths[0] if up else widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def mid(self, x):
        x = self.mid_block["attentions"][0](self.mid_block["resnets"][0](x))
        return self.mid_block["resnets"][1](x)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid(x) if self.up else x
        for block in self.up_blocks if self.up else self.down_blocks:
            for layer in [y for part in block.values() for y in part]:          # resnets, then the resampler
                x = layer(x)
        x = x if self.up else self.mid(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL: x (N, 3, H, W) in [-1, 1] <-> latents (N, c, H/f, W/f), f = 2^(levels-1), c = latent_channels."""
    LEGACY = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))

    def __init__(self, cfg):
        super().__init__()
        self.config, c = cfg, cfg["latent_channels"]
        self.scaling_factor = cfg.get("scaling_factor", 0.18215)   # brings SD's latents to unit variance
        self.factor = 2 ** (len(cfg["block_out_channels"]) - 1)
        self.encoder, self.decoder = VAEHalf(cfg, up=False), VAEHalf(cfg, up=True)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)

    def encode(self, x):
        """x (N, 3, H, W) in [-1, 1] -> mean, logvar (N, c, h, w) of the posterior, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (N, c, h, w), unscaled -> x (N, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


# ---------------------------------------------------------------------------------------------------------------
# U-Net: Stable Diffusion 1.5's with 8 input channels (InstructPix2Pix), motion modules, SMA, EPM
# ---------------------------------------------------------------------------------------------------------------

class EPM(nn.Module):
    """Editing-guided propagation (paper 3.3.2, eqs. 6-8): which frame should listen to which.

    x (N, C, h, w) -> bias (B, F, F) for attention from frame i (row) to frame j (column): two 3x3 convs, global
    average pool to c channels a frame, frames joined, two-layer MLP. Starts at 0 on the diagonal and `start` elsewhere,
    last weight 0, so that each frame at first attends to itself. Fixed to `frames` frames: shorter clips are padded
    by repeating the last frame's features and read the top left corner of the matrix.
    """
    def __init__(self, channels, frames=N_FRAMES, c=32, hidden=128, start=-10.0):
        super().__init__()
        self.frames = frames
        self.conv1, self.conv2 = nn.Conv2d(channels, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(frames * c, hidden), nn.Linear(hidden, frames * frames)
        nn.init.zeros_(self.fc2.weight)
        with torch.no_grad():                                      # PAPER: 0 and -10 are the start values given in 3.3.2
            self.fc2.bias.copy_((start * (1 - torch.eye(frames))).flatten())

    def forward(self, x, n_frames):
        if n_frames > self.frames:
            raise UserError(f"--frames: the trained EPM knows {self.frames} frames, got {n_frames}; edit in windows")
        y = self.conv2(F.silu(self.conv1(x))).mean(dim=(2, 3)).unflatten(0, (-1, n_frames))          # (B, F, c)
        y = torch.cat([y, y[:, -1:].expand(-1, self.frames - n_frames, -1)], dim=1).flatten(1)
        bias = self.fc2(F.silu(self.fc1(y))).unflatten(1, (self.frames, self.frames))
        return bias[:, :n_frames, :n_frames]


def epm_attention(q, k, v, heads, bias):
    """Joint attention over all frames with a bias per frame pair, exactly, without ever building tokens x tokens.

    q, k, v (B, F*L, C), bias (B, F, F) -> (B, F*L, C). Each query gets the one-hot of its frame appended, each key
    its frame's column of the bias times sqrt(d): their product is the bias, and any fused attention computes it,
    gradients included. Padding to a multiple of 8 keeps the fused kernels available. (Paper eq. 7-8.)
    """
    b, n_frames, d = q.shape[0], bias.shape[1], q.shape[-1] // heads
    length = q.shape[1] // n_frames
    if q.device.type == "cpu" and not bias.requires_grad:
        # CUDA's kernels run 40 wide heads as 64 anyway, a CPU pays for every column. For one frame's queries the bias
        # is a row over the keys, (B, 1, 1, F*L), which the CPU's kernel broadcasts, though it has no gradient for it.
        rows = [attention(x, k, v, heads, mask=row.repeat_interleave(length, 1)[:, None, None])
                for x, row in zip(q.split(length, dim=1), bias.to(q.dtype).unbind(1))]
        return torch.cat(rows, dim=1)
    onehot = torch.eye(n_frames, dtype=q.dtype, device=q.device).repeat_interleave(length, 0)        # (F*L, F)
    column = (bias.transpose(1, 2) * math.sqrt(d)).to(q.dtype).repeat_interleave(length, 1)         # (B, F*L, F)
    q, k, v = (x.unflatten(-1, (heads, d)).transpose(1, 2) for x in (q, k, v))                       # (B, heads, F*L, d)
    q = torch.cat([q, onehot.expand(b, heads, -1, -1)], dim=-1)
    k = torch.cat([k, column[:, None].expand(-1, heads, -1, -1)], dim=-1)
    width = -(-(d + n_frames) // 8) * 8
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    x = fused_attention(q, k, v, scale=1 / math.sqrt(d))[..., :d]
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width, heads, ctx_width=None):
        super().__init__()
        self.heads, ctx_width = heads, ctx_width or width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(ctx_width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, ctx=None):
        """x (N, L, C) attends to ctx (N, Lc, D), or to itself."""
        ctx = x if ctx is None else ctx
        return self.to_out[0](attention(self.to_q(x), self.to_k(ctx), self.to_v(ctx), self.heads))

    def across_frames(self, x, n_frames, mode, ffg_keys, size):
        """Spatial self-attention site of the U-Net. x (N, L, C), N = B*F; size (h, w).

        video: with EPM all frames' tokens attend to each other under its bias; without, each frame to itself.
        ffg: the first of the F rows is the anchor (FFG-V2V's first-frame trajectory, paper eq. 2-3); every frame
        takes keys and values from it, "instead" of its own or "beside" them.
        """
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if mode == "ffg":
            k, v = (y.unflatten(0, (-1, n_frames)) for y in (k, v))
            k_a, v_a = (y[:, :1].expand_as(y) for y in (k, v))
            if ffg_keys == "beside":
                k_a, v_a = torch.cat([k, k_a], dim=2), torch.cat([v, v_a], dim=2)
            y = attention(q, k_a.flatten(0, 1), v_a.flatten(0, 1), self.heads)
        elif mode == "video" and hasattr(self, "epm"):
            bias = self.epm(x.transpose(1, 2).unflatten(2, size), n_frames)
            q, k, v = (y.unflatten(0, (-1, n_frames)).flatten(1, 2) for y in (q, k, v))              # (B, F*L, C)
            y = epm_attention(q, k, v, self.heads, bias).flatten(0, 1).unflatten(0, (len(x), -1))
        else:
            y = attention(q, k, v, self.heads)
        return self.to_out[0](y)


class GEGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


def feed_forward(width):
    return nn.ModuleDict({"net": nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))})


class TransformerBlock(nn.Module):
    """Self-attention (across frames, see Attention), cross-attention to the text, feed-forward; each residual."""
    def __init__(self, width, heads, ctx_width):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads, ctx_width)
        self.ff = feed_forward(width)

    def forward(self, x, ctx, n_frames, mode, ffg_keys, size):
        x = x + self.attn1.across_frames(self.norm1(x), n_frames, mode, ffg_keys, size)
        # all frames of a clip share one text, so its keys are computed once per clip: (B, F*L, C) against (B, 77, D)
        y = self.norm2(x).unflatten(0, (-1, n_frames)).flatten(1, 2)
        x = x + self.attn2(y, ctx).flatten(0, 1).unflatten(0, (len(x), -1))
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """A transformer block on the positions of a feature map. x (N, C, h, w), ctx (B, 77, D) -> x."""
    def __init__(self, channels, heads, ctx_width, groups, linear):
        super().__init__()
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.linear = linear                                       # SD 1.5: 1x1 convs; SD 2: linear layers
        self.proj_in, self.proj_out = (nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
                                       for _ in range(2))
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, ctx_width)])

    def forward(self, x, ctx, n_frames, mode, ffg_keys):
        y, size = self.norm(x), x.shape[2:]
        y = y if self.linear else self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)                                                   # (N, h*w, C)
        y = self.proj_in(y) if self.linear else y
        y = self.transformer_blocks[0](y, ctx, n_frames, mode, ffg_keys, size)
        y = self.proj_out(y) if self.linear else y
        y = y.transpose(1, 2).unflatten(2, size)
        return x + (y if self.linear else self.proj_out(y))


class MotionBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads)
        self.ff = feed_forward(width)

    def forward(self, x):                                          # (B*h*w, F, C)
        pos = frame_positions(x.shape[1], x.shape[2], x.device, x.dtype)
        x = x + self.attn1(self.norm1(x) + pos)
        x = x + self.attn2(self.norm2(x) + pos)                    # both are self-attention over time
        return x + self.ff["net"](self.norm3(x))


class MotionModule(nn.Module):
    """AnimateDiff's temporal layers under SMA (paper eq. 4-5): x + gamma * (motion(x) - x). x (N, C, h, w).

    gamma: one scalar a module. 0 at the start of training (the video model then is the image editor, exactly);
    1 where published motion weights are used as they are (FFG-V2V). Knows at most `max_frames` frames.
    """
    def __init__(self, channels, heads, groups, max_frames, over_frames):
        super().__init__()
        self.max_frames, self.over_frames = max_frames, over_frames
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([MotionBlock(channels, heads)])
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x, n_frames):
        if n_frames > self.max_frames:
            raise UserError(f"--frames {n_frames}: the motion modules know {self.max_frames} positions; "
                            f"pass {self.max_frames} or fewer, or edit in windows")
        size = x.shape[2:]
        if self.over_frames:                                       # diffusers: statistics over all frames together
            y = self.norm(x.unflatten(0, (-1, n_frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        else:                                                      # AnimateDiff: frame by frame, as it was trained
            y = self.norm(x)
        y = y.flatten(2).unflatten(0, (-1, n_frames)).permute(0, 3, 1, 2).flatten(0, 1)    # (B*h*w, F, C)
        y = self.proj_out(self.transformer_blocks[0](self.proj_in(y)))
        y = y.unflatten(0, (-1, size.numel())).permute(0, 2, 3, 1).flatten(0, 1)           # (N, C, h*w)
        return x + self.gamma * y.unflatten(2, size)


class Block(nn.Module):
    """One level of the U-Net. resnets and attentions alternate, a motion module after each pair, then the resampler."""
    def __init__(self, c_ins, width, temb, groups, eps, attend, resample):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, width, groups, eps, temb) for c in c_ins)
        if attend:
            self.attentions = nn.ModuleList(Transformer(width, **attend) for _ in c_ins)
        if resample:
            self.add_module(resample + "samplers", nn.ModuleList([Resample(width, resample)]))

    def layer(self, i, x, temb, ctx, n_frames, mode, ffg_keys):
        x = self.resnets[i](x, temb)
        if hasattr(self, "attentions"):
            x = self.attentions[i](x, ctx, n_frames, mode, ffg_keys)
        return self.motion(i, x, n_frames, mode)

    def motion(self, i, x, n_frames, mode):
        if not hasattr(self, "motion_modules") or mode == "image":
            return x
        if mode == "ffg":                                          # the anchor row follows the image editor: no motion
            x = x.unflatten(0, (-1, n_frames))
            moved = self.motion_modules[i](x[:, 1:].flatten(0, 1), n_frames - 1)
            return torch.cat([x[:, :1], moved.unflatten(0, (len(x), -1))], dim=1).flatten(0, 1)
        return self.motion_modules[i](x, n_frames)


class MidBlock(Block):
    """Resnet, attention, (motion,) resnet at the lowest resolution."""
    def __init__(self, width, temb, groups, eps, attend):
        super().__init__([width, width], width, temb, groups, eps, None, None)
        self.attentions = nn.ModuleList([Transformer(width, **attend)])

    def forward(self, x, temb, ctx, n_frames, mode, ffg_keys):
        x = self.attentions[0](self.resnets[0](x, temb), ctx, n_frames, mode, ffg_keys)
        return self.resnets[1](self.motion(0, x, n_frames, mode), temb)


class UNet(nn.Module):
    """The video U-Net. unet(z, t, ctx) -> prediction (B, F, c, h, w), epsilon or v as the scheduler config says.

    z (B, F, 2c, h, w) = [noisy latent, source latent]; t (B,) int64; ctx (B, 77, D) one text per clip.
    mode: "video" (motion modules and EPM where present), "ffg" (the first of the F rows is the anchor, see
    Attention), "image" (every frame by itself, no motion: the image editor). cfg: diffusers' UNet2DConditionModel
    keys; `attention_head_dim` there means the number of heads in SD 1.5.
    """
    def __init__(self, cfg):
        super().__init__()
        self.config, self.ffg_keys = cfg, "beside"
        widths, n, groups, eps = (cfg["block_out_channels"], cfg["layers_per_block"], cfg["norm_num_groups"],
                                  cfg.get("norm_eps", 1e-5))
        temb, heads = 4 * widths[0], cfg["attention_head_dim"]
        heads = heads if isinstance(heads, list) else [heads] * len(widths)
        attend = [dict(heads=h, ctx_width=cfg["cross_attention_dim"], groups=groups,
                       linear=cfg.get("use_linear_projection", False)) for h in heads]
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(widths[0], temb), "linear_2": nn.Linear(temb, temb)})
        self.conv_in = nn.Conv2d(cfg["in_channels"], widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, c, last = [widths[0]], widths[0], len(widths) - 1
        for i, (kind, width) in enumerate(zip(cfg["down_block_types"], widths)):
            self.down_blocks.append(Block([c] + [width] * (n - 1), width, temb, groups, eps,
                                          attend[i] if "CrossAttn" in kind else None, "down" if i < last else None))
            skips += [width] * (n + (i < last))
            c = width
        self.mid_block = MidBlock(c, temb, groups, eps, attend[-1])
        for i, (kind, width) in enumerate(zip(cfg["up_block_types"], widths[::-1])):
            c_ins = [(c if j == 0 else width) + skips.pop() for j in range(n + 1)]
            self.up_blocks.append(Block(c_ins, width, temb, groups, eps,
                                        attend[last - i] if "CrossAttn" in kind else None, "up" if i < last else None))
            c = width
        self.conv_norm_out = GroupNorm(groups, c, eps)
        self.conv_out = nn.Conv2d(c, cfg["out_channels"], 3, padding=1)

    def add_motion(self, cfg=None, gamma=0.0, norm_over_frames=False):
        """Insert motion modules (AnimateDiff's placement; cfg: MotionAdapter's keys). Fresh ones unless loaded after."""
        self.motion_config = cfg = cfg or {}
        heads = cfg.get("motion_num_attention_heads", 8)
        args = dict(heads=heads, groups=cfg.get("motion_norm_num_groups", 32),
                    max_frames=cfg.get("motion_max_seq_length", 32), over_frames=norm_over_frames)
        for block in [*self.down_blocks, *self.up_blocks]:
            width = block.resnets[0].conv1.out_channels
            block.motion_modules = nn.ModuleList(MotionModule(width, **args) for _ in block.resnets)
        if cfg.get("use_motion_mid_block", True):
            width = self.mid_block.resnets[0].conv1.out_channels
            self.mid_block.motion_modules = nn.ModuleList([MotionModule(width, **args)])
        self.set_gamma(gamma)

    def set_gamma(self, gamma):
        for m in self.modules():
            if isinstance(m, MotionModule):
                m.gamma = nn.Parameter(torch.full((), float(gamma), device="cpu"))

    def add_epm(self, sites="all", frames=N_FRAMES, start=-10.0):
        """Insert fresh EPM at every spatial self-attention site, or (sites="inner") at all but the top level's. start: its
        bias between frames before training."""
        self.epm_config = {"sites": sites, "frames": frames}
        top = self.config["block_out_channels"][0]
        for block in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            for site in getattr(block, "attentions", []):
                width = site.norm.num_channels
                if sites == "all" or width > top:
                    site.transformer_blocks[0].attn1.epm = EPM(width, frames, start=start)

    def forward(self, z, t, ctx, mode="video"):
        shape, n_frames = z.shape[:2], z.shape[1]
        if mode == "image":                                        # B clips of F frames become B*F clips of one
            t, ctx, n_frames = t.repeat_interleave(n_frames, 0), ctx.repeat_interleave(n_frames, 0), 1
        x = z.flatten(0, 1)                                                                # (N, 2c, h, w)
        temb = timestep_embedding(t, self.config["block_out_channels"][0]).to(x.dtype)
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))
        temb = temb.repeat_interleave(n_frames, 0)                                         # (N, T)
        args = (temb, ctx, n_frames, mode, self.ffg_keys)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, *args)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, *args)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], dim=1), *args)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[2:])
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, shape)


# ---------------------------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------------------------

class DDIM:
    """DDIM sampling schedule and step (Song et al. 2021, eq. 12), as the published scheduler configs parametrise it.

    steps: 1 to T. spacing "leading" (DDIM's default), "trailing" (starts at the last time step) or "linspace" (both ends).
    timesteps: int64, from noise to image. set_alpha_to_one: abar after the last step is 1 instead of abar[0].
    cfg: scheduler_config.json.
    """
    def __init__(self, steps, spacing="leading", steps_offset=1, set_alpha_to_one=False, cfg=None):
        cfg = cfg or {}
        self.T, self.prediction = cfg.get("num_train_timesteps", 1000), cfg.get("prediction_type", "epsilon")
        if not 1 <= steps <= self.T:
            raise UserError(f"--steps {steps}: needs 1 to {self.T}")
        self.abar, self.steps = noise_levels(cfg), steps
        if spacing == "leading":
            self.timesteps = torch.arange(steps).flip(0) * (self.T // steps) + steps_offset
            self.timesteps.clamp_(max=self.T - 1)
        elif spacing == "trailing":
            self.timesteps = (self.T - torch.arange(steps, dtype=torch.float64) * self.T / steps).round().long() - 1
        elif spacing == "linspace":
            self.timesteps = torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round().long()
        else:
            raise UserError(f"spacing {spacing}: needs leading, trailing or linspace")
        self.final = torch.tensor(1.0) if set_alpha_to_one else self.abar[0]

    def levels(self, i):
        """abar at step i and after it. diffusers goes T // steps down from any time step, which with steps that are not so
        far apart ("linspace") misses the next one; where they are, that is the same."""
        return self.abar[self.timesteps[i]], self.abar[self.timesteps[i + 1]] if i + 1 < self.steps else self.final

    def to_eps(self, out, i, z):
        """The U-Net's prediction as epsilon: itself, or from v = sqrt(abar) eps - sqrt(1 - abar) z0."""
        a = self.abar[int(self.timesteps[i])]
        return out if self.prediction == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * z

    def step(self, eps, i, z, eta=0.0, noise=None):
        """From step i's latents z to the next, given the predicted noise; eta 1 is DDPM's variance, with `noise`."""
        a, prev = self.levels(i)
        z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()                         # predicted clean latent
        std = eta * ((1 - prev) / (1 - a) * (1 - a / prev)).sqrt()
        z = prev.sqrt() * z0 + (1 - prev - std ** 2).clamp(min=0).sqrt() * eps
        return z + std * noise if eta > 0 else z


class DPMSolver:
    """Multistep DPM-Solver++ (2M, midpoint; Lu et al. 2022): second order, for 10 to 12 steps. Same use as DDIM."""
    def __init__(self, steps, cfg=None):
        cfg = cfg or {}
        self.T, self.prediction = cfg.get("num_train_timesteps", 1000), cfg.get("prediction_type", "epsilon")
        if not 1 <= steps < self.T:
            raise UserError(f"--steps {steps}: needs 1 to {self.T - 1}")
        self.abar, self.steps, self.before = noise_levels(cfg), steps, None
        self.timesteps = torch.linspace(0, self.T - 1, steps + 1, dtype=torch.float64).round().long().flip(0)[:-1]

    to_eps = DDIM.to_eps

    def step(self, eps, i, z):
        """One step; keeps the last clean prediction, so call it for i = 0, 1, ... in order."""
        a = self.abar[int(self.timesteps[i])].double()
        z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        if i == self.steps - 1:                                            # to zero noise: first order, exactly z0
            return z0.to(z.dtype)
        nxt = self.abar[int(self.timesteps[i + 1])].double()
        lam = lambda x: 0.5 * (x / (1 - x)).log()                          # log signal-to-noise ratio
        h = lam(nxt) - lam(a)
        slope = 0.0
        if i > 0:                                                          # difference to the previous prediction
            a_before = self.abar[int(self.timesteps[i - 1])].double()
            slope = 0.5 * (z0 - self.before) * h / (lam(a) - lam(a_before))
        self.before = z0
        return (((1 - nxt) / (1 - a)).sqrt() * z - nxt.sqrt() * torch.expm1(-h) * (z0 + slope)).to(z.dtype)


def noise_levels(cfg):
    """Cumulative alphas (T,) of a scheduler config: scaled_linear betas (Stable Diffusion) or linear."""
    start, end, n = cfg.get("beta_start", 0.00085), cfg.get("beta_end", 0.012), cfg.get("num_train_timesteps", 1000)
    if cfg.get("beta_schedule", "scaled_linear") == "linear":
        betas = torch.linspace(start, end, n)
    else:
        betas = torch.linspace(start ** 0.5, end ** 0.5, n) ** 2
    return torch.cumprod(1 - betas, 0)


# ---------------------------------------------------------------------------------------------------------------
# The editor
# ---------------------------------------------------------------------------------------------------------------

class VideoEditor:
    """Text encoder, VAE, U-Net and scheduler of one checkpoint; `edit` applies an instruction to a clip."""
    FILES = ["model_index.json"] + [f"{d}/{f}" for d in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
                                    for f in ("config.json", "*_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                                              "diffusion_pytorch_model.safetensors", "model.safetensors")]
    VIDEO = "motion", "epm", "same_noise"           # what a video editor's unet/config.json says besides
    SLICE = 4                                       # frames that the VAE takes at a time: bounds memory

    @classmethod
    def from_pretrained(cls, source, motion=None, gamma=1.0, epm=False, norm_over_frames=False, device=None, dtype=None):
        """Load an editor.

        source: "tiny" (embedded), "sd15" (InstructPix2Pix + AnimateDiff from the hub), a hub id, a directory in hub
        layout, or a trained run. motion: a hub id, directory or AnimateDiff
        .ckpt; gamma: SMA's scale for it; epm: add untrained EPM. A video editor brings its own motion, gamma and EPM;
        with a motion, or with False for none, it gives the image editor in it instead.
        norm_over_frames: diffusers' GroupNorm in motion modules instead of AnimateDiff's. device, dtype: default
        CUDA (bf16), MPS or CPU (fp32). Raises UserError for missing, partial or foreign weights.
        """
        self = cls()
        self.name, self.folders = str(source), repository(source)
        self.device, self.dtype = placement(device, dtype)
        if str(source) == "sd15" and motion is None:
            motion = SD15_MOTION
        place = dict(device=self.device, dtype=self.dtype)
        parts = {name: part(self.folders, name) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
        # a run's own base is what gives its text encoder: the runs between, which gave only the U-Net, may be deleted
        giver = self.folders.index(parts["text_encoder"].parent)
        self.base = portable(base_of(self.folders[giver - 1]) if giver else source)

        file = parts["unet"] / "config.json"
        config = read_json(file)
        video = {k: v for k, v in config.items() if k in cls.VIDEO and motion is None}
        config = {k: v for k, v in config.items() if k not in cls.VIDEO}       # the image editor's
        with torch.device("meta"):
            self.unet = build(UNet, file, config)
            if "motion" in video:
                self.unet.add_motion(video["motion"], norm_over_frames=norm_over_frames)
            if "epm" in video:
                self.unet.add_epm(**video["epm"])
            self.same_noise = video.get("same_noise", False)       # a video editor trained on one noise for all frames
            self.vae = build(VAE, parts["vae"] / "config.json")
            self.text_encoder = build(TextEncoder, parts["text_encoder"] / "config.json")
        tensors, file = find_tensors(parts["text_encoder"])
        load_weights(self.text_encoder, tensors, f"text encoder from {file}", drop=("position_ids",), **place)
        tensors, file = find_tensors(parts["vae"])
        vae_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype           # fp16 overflows in SD's VAE
        load_weights(self.vae, tensors, f"vae from {file}", rename=VAE.LEGACY, device=self.device, dtype=vae_dtype)
        tensors, file = find_tensors(parts["unet"])
        load_weights(self.unet, tensors, f"unet from {file}", drop=() if motion is None else ("motion_modules", ".epm."), **place)
        del tensors                                                # unmaps the file before the next one is read
        files = list(parts.values())
        if motion:
            files.append(load_motion(self.unet, motion, gamma, norm_over_frames, place))
        self.fingerprint = fingerprint(*files)
        if "epm" not in video and epm:
            self.unet.add_epm()
        self.unet.to(**place)
        self.vae.to(memory_format=torch.channels_last)             # 5 to 25 % faster on a CPU as well; the U-Net is not
        if self.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        for net in (self.unet, self.vae, self.text_encoder):
            net.eval().requires_grad_(False)

        special = parts["tokenizer"] / "special_tokens_map.json"   # Stable Diffusion 2 pads with "!", 1 with the end token
        pad = read_json(special).get("pad_token") if special.is_file() else None
        pad = pad.get("content") if isinstance(pad, dict) else pad
        self.tokenizer = Tokenizer(parts["tokenizer"] / "vocab.json", parts["tokenizer"] / "merges.txt", pad)
        embeddings = self.text_encoder.text_model.embeddings
        size, width = embeddings["token_embedding"].weight.shape
        if max(self.tokenizer.vocab.values()) >= size or width != self.unet.config["cross_attention_dim"]:
            raise UserError(f"{self.name}: the tokenizer has tokens up to {max(self.tokenizer.vocab.values())}, the text encoder {size} and "
                            f"states {width} wide, the U-Net wants {self.unet.config['cross_attention_dim']}; are they of one model?")
        self.scheduler = read_scheduler(parts["scheduler"] / "scheduler_config.json")
        c, channels = self.vae.config["latent_channels"], [config[f"{k}_channels"] for k in ("in", "out")]
        if channels != [2 * c, c]:
            raise UserError(f"{parts['unet']}: takes {channels[0]} channels and gives {channels[1]}; an editor of latents with {c} "
                            f"channels takes {2 * c}, noise and source, and gives {c}: is it InstructPix2Pix's kind?")
        # what a checkpoint may say about itself; published ones say nothing and get Stable Diffusion's usual values
        about = {}
        for folder in reversed(self.folders):                      # a run's own words come before its base's
            if (folder / "model_index.json").is_file():
                about |= read_json(folder / "model_index.json").get("instructvedit", {})
        self.size, self.guidance = about.get("size", 512), tuple(about.get("guidance", (7.5, 1.5)))
        self.steps, self.deadband = about.get("steps", 20), about.get("deadband", 0.0)     # of sampling; see `settle`
        self.words, self.examples = set(about.get("words", ())) or None, about.get("examples")
        self.multiple = self.vae.factor
        self.default_mode = "video" if "motion" in video else "ffg"
        return self

    # ---- pieces -----------------------------------------------------------------------------------------------

    def tokenize(self, texts):
        """List of N strings -> ids (N, 77) int64, cut to 77 with the end token kept."""
        return self.tokenizer(texts)

    def encode_text(self, texts):
        """List of N strings -> states (N, 77, D)."""
        return self.text_encoder(self.tokenize(texts).to(self.device))

    @torch.no_grad()
    def encode(self, video):
        """video (1, F, 3, H, W) in [-1, 1] -> source latents (1, F, c, h, w): the posterior's mode, unscaled."""
        if video.shape[-2] % self.multiple or video.shape[-1] % self.multiple:
            raise UserError(f"frames of {video.shape[-1]}x{video.shape[-2]}: width and height must be multiples of "
                            f"{self.multiple}")
        dtype = next(self.vae.parameters()).dtype
        z = [self.vae.encode(x.to(self.device, dtype))[0].float() for x in video[0].split(self.SLICE)]
        return torch.cat(z)[None]

    @torch.no_grad()
    def decode(self, z):
        """z (1, F, c, h, w), scaled -> video (1, F, 3, H, W) float32 in [-1, 1]."""
        dtype = next(self.vae.parameters()).dtype
        x = [self.vae.decode((y / self.vae.scaling_factor).to(self.device, dtype)).float() for y in z[0].split(self.SLICE)]
        return torch.cat(x)[None].clamp(-1, 1)

    def noise(self, n_frames, h, w, seed, first=0, mode="ffg"):
        """Starting noise (1, F, c, h, w) of frames first, first+1, ...: the same for a frame whatever its window.

        Frame-by-frame modes give every frame the same noise: without temporal layers nothing else ties frames together.
        A video editor gets what it was trained on.
        """
        def draw(index):
            g = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2 ** 63)
            return torch.randn(1, 1, self.vae.config["latent_channels"], h, w, generator=g)
        apart = mode == "video" and not self.same_noise
        frames = [draw(first + i if apart else 0) for i in range(n_frames)]
        return torch.cat(frames, dim=1).to(self.device)

    def scheduler_for(self, steps, sampler="ddim"):
        """DDIM with the checkpoint's own offset and end, or DPM-Solver++."""
        if sampler == "dpm":
            return DPMSolver(steps, self.scheduler)
        if sampler != "ddim":
            raise UserError(f"--sampler {sampler}: needs ddim or dpm")
        return DDIM(steps, self.scheduler.get("timestep_spacing", "leading"), self.scheduler.get("steps_offset", 1),
                    self.scheduler.get("set_alpha_to_one", False), self.scheduler)

    # ---- sampling ---------------------------------------------------------------------------------------------

    def guided(self, z, z_src, t, ctx, s_txt, s_src, mode):
        """Three-branch guidance: e(0,0) + s_src (e(V,0) - e(0,0)) + s_txt (e(V,T) - e(V,0)), in one batch.

        z (K, F, c, h, w); z_src (1 or K, F, c, h, w); ctx (2, 77, D) = [instruction, empty]; s_txt, s_src: a number, or
        one for each of the K clips. A branch whose weight is 0 is not run: with s_src = 1 two remain, with s_txt = 1
        besides just one.
        PAPER: "text 1.2-2.0, image 5.0-12.5" is printed with the names exchanged; we use text 5-12.5, source 1.2-2.
        """
        s_txt, s_src = (torch.as_tensor(s, dtype=torch.float32).reshape(-1, 1, 1, 1, 1) for s in (s_txt, s_src))
        z_src = z_src.expand_as(z)
        branches = [(s_txt, z_src, 0), (s_src - s_txt, z_src, 1), (1 - s_src, torch.zeros_like(z_src), 1)]
        branches = [b for b in branches if b[0].any()]
        x = torch.cat([torch.cat([z, src], dim=2) for _, src, _ in branches]).to(self.dtype)
        c = ctx[[k for _, _, k in branches for _ in z]]
        out = self.unet(x, torch.full((len(x),), int(t), device=x.device), c, mode).float()
        return sum(w.to(z.device) * y for (w, _, _), y in zip(branches, out.split(len(z))))

    def settle(self, z0, z_src):
        """Cells that an edit hardly changed become the source's again. z0, scaled, and z_src (..., c, h, w) -> like z0.

        A cell's change is the mean |z0 - source| of its channels, in scaled latents. Up to `deadband` it is dropped, from
        twice that on it stays, between them smoothly. Ours: sampling leaves some drift everywhere, also
        where nothing was to be edited. 0, as for published weights, changes nothing.
        """
        if not self.deadband:
            return z0
        source = z_src * self.vae.scaling_factor
        change = (z0 - source).abs().mean(dim=-3, keepdim=True)
        w = (change / self.deadband - 1).clamp(0, 1)
        return source + w * w * (3 - 2 * w) * (z0 - source)

    @torch.no_grad()
    def sample(self, z_src, instruction, z_T, steps=None, s_txt=None, s_src=None, mode="auto", sampler="ddim",
               anchor=None, z0_ref=None, on_step=None, keep=None):
        """Denoise z_T (K, F, c, h, w) into the edited latents z0 of that shape, scaled: K edits of one clip in one batch,
        each from its own noise, given source latents z_src (1, F, c, h, w) and an instruction.

        steps; s_txt, s_src, guidance scales, a number or K: by default the checkpoint's own. anchor: for mode "ffg", source
        latents (1, 1, c, h, w) and steps + 1 latents (1 or K, 1, c, h, w) of its edit, as `anchor` makes them of the
        first frame where not given. z0_ref (1, R, c, h, w): final latents of the first R frames, known from
        the previous window; they steer the others by InsV2V's noise correction over the first half of the steps.
        on_step(i) is called after each step; keep (a list) receives the latents of every step and the end.
        """
        mode = self.default_mode if mode == "auto" else mode
        steps, s_txt, s_src = (d if s is None else s for s, d in zip((steps, s_txt, s_src), (self.steps, *self.guidance)))
        scheduler = self.scheduler_for(steps, sampler)
        ctx = self.encode_text([instruction, ""])
        if mode == "ffg" and anchor is None:
            anchor = self.anchor(z_src[:, :1], instruction, z_T[:, :1], steps, s_txt, s_src, sampler)
        if anchor is not None and len(anchor[1]) != steps + 1:
            raise UserError(f"anchor of {len(anchor[1]) - 1} steps: needs {steps}, as many as are sampled")
        n_ref, z = 0 if z0_ref is None else z0_ref.shape[1], z_T
        for i, t in enumerate(scheduler.timesteps):
            if keep is not None:
                keep.append(z)
            if mode == "ffg":                                      # the anchor runs along, from its stored latents
                first, edited = anchor[0], anchor[1][i].to(z).expand(len(z), -1, -1, -1, -1)
                out = self.guided(torch.cat([edited, z], dim=1), torch.cat([first, z_src], dim=1), t, ctx, s_txt, s_src,
                                  mode)[:, 1:]
            else:
                out = self.guided(z, z_src, t, ctx, s_txt, s_src, mode)
            eps = scheduler.to_eps(out, i, z)
            if n_ref and i < steps / 2:                            # InsV2V's long-video sampling correction
                a = scheduler.abar[int(t)]
                delta = (z[:, :n_ref] - a.sqrt() * z0_ref) / (1 - a).sqrt() - eps[:, :n_ref]
                eps = eps + torch.cat([delta, delta.mean(dim=1, keepdim=True).expand_as(eps[:, n_ref:])], dim=1)
            z = scheduler.step(eps, i, z)
            if not torch.isfinite(z).all():
                raise UserError(f"sampling step {i + 1} of {steps} gave NaN or Inf; try --dtype float32 or a lower --text-cfg")
            if on_step:
                on_step(i)
        z = self.settle(z, z_src)
        if keep is not None:
            keep.append(z)
        return z

    def anchor(self, z_src, instruction, z_T, steps=None, s_txt=None, s_src=None, sampler="ddim"):
        """FFG-V2V's first-frame trajectory: z_src (1, 1, c, h, w), z_T (K, 1, c, h, w) -> (z_src, [latents of every step
        and the end])."""
        trajectory = []
        self.sample(z_src, instruction, z_T, steps, s_txt, s_src, "image", sampler, keep=trajectory)
        return z_src, trajectory

    def edit(self, video, instruction, steps=None, s_txt=None, s_src=None, seed=0, z_T=None, mode="auto", sampler="ddim"):
        """Edit a clip in one pass. video (1, F, 3, H, W) in [-1, 1] -> the same shape; H and W multiples of `multiple`.

        s_txt, s_src: guidance on the instruction and on the source; None takes the checkpoint's own (7.5 and 1.5 for
        published ones), and so for steps (20). z_T (1, F, c, h, w): the starting noise, else drawn from `seed`. mode:
        "image" (frame by frame), "ffg" (training-free, guided by the first frame), "video" (trained SMA + EPM), "auto".
        Clips longer than 16 frames belong into `sample.edit_stream`, which edits in windows.
        """
        if mode not in ("auto", "image", "ffg", "video"):
            raise UserError(f"mode {mode}: needs auto, image, ffg or video")
        mode = self.default_mode if mode == "auto" else mode
        if video.ndim != 5 or video.shape[0] != 1 or not video.shape[1] or video.shape[2] != 3 or not video.is_floating_point():
            raise UserError(f"video {tuple(video.shape)} {video.dtype}: needs (1, F, 3, H, W) in [-1, 1], one clip at a time")
        z_src = self.encode(video)
        if z_T is None:
            z_T = self.noise(z_src.shape[1], *z_src.shape[3:], seed, mode=mode)
        if z_T.shape != z_src.shape:
            raise UserError(f"z_T {tuple(z_T.shape)}: needs {tuple(z_src.shape)}, as the clip's latents")
        return self.decode(self.sample(z_src, instruction, z_T.to(self.device), steps, s_txt, s_src, mode, sampler))


def read_scheduler(path):
    """scheduler_config.json as a dict; UserError for a setting that changes results and is not known here."""
    cfg = read_json(path)
    for key, known in (("prediction_type", ("epsilon", "v_prediction")), ("beta_schedule", ("scaled_linear", "linear")),
                       ("rescale_betas_zero_snr", (False, None)), ("trained_betas", (None,)), ("clip_sample", (False, None)),
                       ("thresholding", (False, None))):
        if cfg.get(key, known[0]) not in known:
            raise UserError(f"{path}: {key} {cfg[key]}; known are {' and '.join(map(str, known))}")
    return cfg


def load_motion(unet, source, gamma, norm_over_frames, place):
    """Published motion modules into `unet`: a MotionAdapter repository, directory or file, or AnimateDiff's .ckpt."""
    path = Path(source)
    if path.is_file():
        tensors, file = read_tensors(path), path.name
        cfg = read_json(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    else:
        path = hub_dir(source, ["config.json", "diffusion_pytorch_model.safetensors"])
        (tensors, file), cfg = find_tensors(path), read_json(path / "config.json")
    if not any("motion_modules" in k for k in tensors):
        raise UserError(f"{source}: holds no motion modules; is it an AnimateDiff adapter?")
    # a bare .ckpt has no config: its position table and names tell the rest, the U-Net the number of heads and groups
    heads, pe = unet.config["attention_head_dim"], [v for k, v in tensors.items() if k.endswith(".pe")]
    heads = heads[0] if isinstance(heads, list) else heads
    cfg = {"motion_num_attention_heads": heads, "motion_norm_num_groups": unet.config["norm_num_groups"],
           "motion_max_seq_length": pe[0].shape[1] if pe else 32,
           "use_motion_mid_block": any(k.replace("module.", "").startswith("mid_block") for k in tensors)} | cfg
    with torch.device("meta"):
        unet.add_motion(cfg, gamma, norm_over_frames)
    rename = (("module.", ""), (".temporal_transformer", ""), (".attention_blocks.0", ".attn1"), (".norms.0", ".norm1"),
              (".attention_blocks.1", ".attn2"), (".norms.1", ".norm2"), (".ff_norm", ".norm3"))
    load_weights(unet, tensors, f"motion from {file}", rename=rename, drop=(".pe", "animatediff_config"),
                 absent=("gamma",), only="motion_modules", **place)
    return path if path.is_file() else path / file
