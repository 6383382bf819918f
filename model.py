"""InstructVEdit's video editor in plain PyTorch (arXiv 2503.17641), loading the published weights' own keys.

Contents, in reading order
    errors       UserError, run, reading, need                      one line for whatever a user gets wrong
    files        aside, save_tensors, begin, fingerprint, repository, read_tensors, load_weights, open_network
    small pieces attention, embedding, timestep_embedding, frame_positions, to_tensor, to_rgb, resize
    text         Tokenizer, CLIPEncoder, TextModel, TextEncoder     CLIP ViT-L/14's text tower
    pixels       VAE                                                AutoencoderKL
    U-Net        ResnetBlock, EPM, Attention, Transformer, MotionModule (with SMA), UNet
    sampling     DDIM
    editor       VideoEditor: text, VAE, U-Net and three-branch guidance
    others' files open_tokenizer, read_original, load_motion, merge_lora_file

Shapes: video (B, F, 3, H, W) in [-1, 1]; latents z (B, F, c, h, w); N = B*F where frames are folded into the
batch; tokens (N, L, D) with L = h*w. Attribute names are the keys of the published files (diffusers layout),
so weights need no translation table.
"""
import errno
import functools
import gzip
import json
import math
import os
import pickle
import re
import sys
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
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

ROOT = Path(__file__).resolve().parent
SD15 = "timbrooks/instruct-pix2pix"                                # MIT code, CreativeML OpenRAIL-M weights
SD15_MOTION = "guoyww/animatediff-motion-adapter-v1-5-2"           # Apache-2.0
N_FRAMES = 16           # of a training clip, of a pass of `edit_stream`, of EPM's matrix


# ------------------------------------------------------------------------------------------------------------
# Errors: what a user, a file, the memory or the disk gets wrong
# ------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """What a user or a file got wrong: one line that names the flag or file, what came and what would fit."""


def run(main):
    """Call a script's `main()`; what a user, a file, memory or disk gets wrong is one line, exit status 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")          # a console that lacks a letter gets its number
    try:
        main()
    except BrokenPipeError:                                        # who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)               # what is left to print goes nowhere
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted; nothing half-written", 130)
    except UserError as error:
        fail(f"error: {error}")
    except (OSError, RuntimeError, SafetensorError, MemoryError) as error:
        where = getattr(error, "filename", None)
        if out_of_memory(error):
            fail("error: out of memory: lower --size, --batch or --frames, pass --checkpointing in training, "
                 "or --device cpu")
        if disk_full(error):
            fail(f"error: {where or 'a file'} cannot be written: the disk is full; make room and run the "
                 "same again")
        if not where:
            raise
        fail(f"error: {where}: {error.strerror}")


def fail(text, code=2):
    print(text, file=sys.stderr)
    sys.exit(code)


@functools.cache
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


def out_of_memory(error):
    """As CUDA, the CPU and Python say it."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def disk_full(error):
    """A full disk has many names."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


@contextmanager
def reading(path, hint=""):
    """What goes wrong while a user's file is read becomes one line naming it: lacks 'key', for example."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:                      # the one boundary between people's files and this program
        if out_of_memory(error) or disk_full(error):
            raise
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, KeyError):
            what = f"lacks {error}"
        raise UserError(f"{path}: {what.splitlines()[0][:160]}" + (f"; {hint}" if hint else "")) from None


def need(ok, message):
    """What a file should hold, inside `reading`."""
    if not ok:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all; networks found and loaded by their published names
# ------------------------------------------------------------------------------------------------------------

@contextmanager
def aside(path):
    """A file that is there whole or not at all: yields a hidden path, which takes its place at the end."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")      # two processes may write the same
    try:
        part.touch()
        mode = part.stat().st_mode                                 # as the umask says
        part.unlink()
        yield part
        part.chmod(mode)                                           # safetensors makes private files
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)                               # of a full disk


def write_text(path, text):
    """A text file that is there whole or not at all; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, data):
    write_text(path, json.dumps(data, indent=1, default=str))


def save_tensors(path, tensors, dtype=None):
    """{name: tensor} as safetensors, floating ones in `dtype`; the file is there whole or not at all."""
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
               for k, v in tensors.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        save_file(tensors, part)


def begin(folder, settings, force=False):
    """settings.json says what made a folder; others are refused, by name, unless `force`."""
    path = Path(folder) / "settings.json"
    new = json.loads(json.dumps(settings, default=str))
    old = read_json(path) if path.is_file() else new
    changed = [f"{k} {old.get(k)} (now {new.get(k)})" for k in new | old if old.get(k) != new.get(k)]
    if changed and not force:
        raise UserError(f"{folder}: made with {', '.join(changed)}; pass the same, another folder, or "
                        "--force to go on with the new")
    write_json(path, new)


def fingerprint(*paths):
    """Eight digits that tell files, or all files in folders, from others: names, first and last megabytes."""
    crc = 0
    for path in map(Path, paths):
        for file in [path, *sorted(path.rglob("*"))]:
            if file.is_file():
                with open(file, "rb") as f:
                    crc = zlib.crc32(file.name.encode() + f.read(1 << 20), crc)
                    f.seek(max(f.tell(), file.stat().st_size - (1 << 20)))
                    crc = zlib.crc32(f.read(), crc)
    return f"{crc:08x}"


def placement(device=None, dtype=None):
    """Where and in what a network runs: the best device there is; bfloat16 on CUDA, else float32."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device or best)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def hub_dir(source, patterns=None):
    """Local directory of `source`: a directory, or a hub id, fetched on first use (files in `patterns`)."""
    source = str(source)
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{source}: {'a file' if Path(source).exists() else 'no such directory'}; pass a "
                        f"directory in hub layout or a hub id like {SD15}")
    from huggingface_hub import snapshot_download         # slow to import, and a local model needs none of it
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:                                   # its HTTP library's errors come through, too
        if disk_full(error):
            raise
        raise UserError(f"{source}: not in the local cache and the hub cannot give it "
                        f"({type(error).__name__}); go online once, or pass a folder with a copy") from None


def repository(source, patterns=None):
    """The folders that make up an editor: its own, then its base's, and so on; see `part`.

    source: what VideoEditor.from_pretrained takes. A trained run holds what was trained; its model_index.json
    names the base that gives the rest: {"instructvedit": {"base": ...}}, a path from ROOT or a hub id.
    A file in the original layout (see `read_original`) takes configs and tokenizer from the folder it lies
    in, if that is in hub layout, else from InstructPix2Pix.
    patterns: the hub's files, by default those of an editor.
    """
    if not str(source):
        raise UserError('--weights "": needs a hub id or a directory')
    folders = []
    while source:
        source = {"tiny": ROOT / "assets/tiny", "sd15": SD15}.get(str(source), source)
        if Path(source).is_file():
            hint = "--weights takes a whole editor, one file in the original layout or a folder"
            with reading(source, hint):
                names = sorted(read_tensors(source))
                need(any(name.startswith("model.diffusion_model.") for name in names),
                     f"holds no model.diffusion_model.*, but {', '.join(names[:2])}")
            folders.append(Path(source))
            patterns = [name for name in VideoEditor.FILES if not name.endswith(".safetensors")]
            beside = Path(source).parent
            source = beside if (beside / "unet").is_dir() else SD15
            print(f"{folders[-1]}: with configs and tokenizer of {source}", file=sys.stderr)
        folder = hub_dir(source, patterns or VideoEditor.FILES)
        if folder in folders:
            raise UserError(f"{folders[-1]}/model_index.json: names {source} as its base, whose base it is")
        folders.append(folder)
        source = read_index(folder).get("base")
        if source and (ROOT / source).exists():
            source = ROOT / source
    return folders


def read_index(folder):
    """What model_index.json says to this project: a run's base, an editor's numbers, or nothing."""
    path = Path(folder) / "model_index.json"
    with reading(path):
        about = read_json(path).get("instructvedit", {}) if path.is_file() else {}
        need(isinstance(about.get("base", ""), str), "base: needs a path or a hub id")
        return about


def portable(source):
    """How a run names its base: paths inside ROOT by their path from there, others whole; hub ids."""
    path = Path(source).resolve()
    if not path.exists():
        return str(source)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def part(folders, name):
    """The sub-folder `name` of the first of these folders that has one."""
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    raise UserError(f"{folders[0]}: has no {name}/, and names no base that has; is it an editor in hub "
                    "layout, and was its training finished?")


def finished(run):
    """True where a trained run (a directory) is complete: these files are written last."""
    return any((Path(run) / name).is_file() for name in ("model_index.json", "config.json"))


def read_json(path, kind=dict):
    """A JSON file that holds a `kind`, dict or list; UserError where it is missing or holds another."""
    with reading(path):
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        need(isinstance(data, kind), f"holds a {type(data).__name__}, where a {kind.__name__} is needed")
    return data


# settings of published configs that change results: built in here as Stable Diffusion 1.5's files have them
PLAIN_SETTINGS = dict(
    act_fn="silu", flip_sin_to_cos=True, freq_shift=0, center_input_sample=False, downsample_padding=1,
    mid_block_scale_factor=1, resnet_out_scale_factor=1.0, resnet_time_scale_shift="default",
    only_cross_attention=False, dual_cross_attention=False, use_linear_projection=False,
    class_embed_type=None, addition_embed_type=None, shift_factor=0, latents_mean=None, latents_std=None)


def check_sizes(cfg):
    """Inside `reading`: no number of a network's config may ask for what takes hours, or make no sense."""
    for key, value in cfg.items():
        for x in value if isinstance(value, list) else [value]:
            if re.search("(^|_)eps", key):
                need(isinstance(x, int | float) and 0 <= x < 1, f"{key} {x}: needs a small number")
            if isinstance(x, dict):
                check_sizes(x)
            elif isinstance(x, int | float) and re.search("layers|head|group|channel|size|dim|max_|eps", key):
                need(0 <= x <= (200 if "layers" in key else 1e6), f"{key} {x}: no network has that many")
                need(type(x) is int or re.search("eps|scale|use_", key), f"{key} {x}: needs a whole number")


def build(network, path, cfg=None):
    """network(cfg), else of the config at `path`; UserError where that lacks something or is unknown."""
    with reading(path):
        cfg = cfg or read_json(path)
        for key, known in PLAIN_SETTINGS.items():
            need(cfg.get(key) in (known, None), f"{key} {cfg.get(key)}; known is {known}")
        check_sizes(cfg)
        return network(cfg)


def read_tensors(path):
    """All tensors of a .safetensors file (memory-mapped, nothing is copied) or of a weights-only pickle."""
    path = Path(path)
    with reading(path, "a weight file is needed, safetensors or a pickle of plain tensors"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:              # torch's own message tells how to run the code in it
            raise ValueError("refused, it holds more than plain tensors, or no tensors at all") from None
        for wrapper in ("state_dict", "model"):     # AnimateDiff and ViCLIP wrap their tensors once
            state = state.get(wrapper, state)
        return {k: v for k, v in state.items() if torch.is_tensor(v) and isinstance(k, str)}


def find_tensors(folder):
    """Tensors of a hub-layout sub-folder: one file, or shards with an index. Returns (tensors, file name)."""
    folder = Path(folder)
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in ("safetensors.index.json", "safetensors", "safetensors.index.fp16.json",
                       "fp16.safetensors", "bin.index.json", "bin"):
            file = folder / f"{stem}.{ending}"
            if file.is_file():
                with reading(file):
                    index = {"": file.name} if file.suffix != ".json" else read_json(file)["weight_map"]
                    shards = [read_tensors(folder / shard) for shard in sorted(set(index.values()))]
                return {k: v for shard in shards for k, v in shard.items()}, file.name
    raise UserError(f"{folder}: no weights; needs diffusion_pytorch_model.safetensors or model.safetensors")


def load_weights(module, tensors, what, rename=(), drop=(), absent=(), only="", device=None, dtype=None):
    """Put `tensors` into `module` (usually on the meta device) by assignment: nothing is allocated twice.

    rename: (old, new) substring pairs applied to the file's keys. drop: substrings of keys the file may hold
    and we do not use. absent: substrings of our keys that the file need not hold. Anything else missing,
    unexpected or of another shape is a UserError naming the keys. Floating tensors go to `device` and
    `dtype`.
    """
    ours = {k: v for k, v in module.state_dict().items() if only in k}
    theirs = {}
    for k, v in tensors.items():
        if not any(d in k for d in drop):
            for old, new in rename:
                k = k.replace(old, new)
            theirs[k] = v
    pairs = [(k, v, theirs[k]) for k, v in ours.items() if k in theirs]
    problems = {
        "lacks": [k for k in ours if k not in theirs and not any(a in k for a in absent)],
        "has unknown": [k for k in theirs if k not in ours],
        "has wrong shapes for": [f"{k} {tuple(v.shape)} instead of {tuple(own.shape)}"
                                 for k, own, v in pairs if own.shape != v.shape],
        "has whole numbers in": [f"{k} {v.dtype}" for k, own, v in pairs
                                 if own.is_floating_point() and not v.is_floating_point()]}
    for problem, keys in problems.items():
        if keys:
            raise UserError(f"{what}: {problem} {len(keys)} of {len(ours)} tensors, first "
                            f"{', '.join(keys[:3])}; is it the file of another model, or cut short?")
    cast = {k: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for k, v in theirs.items()}
    module.load_state_dict(cast, assign=True, strict=False)
    left = sorted({a for a in absent if any(a in k and k not in theirs for k in ours)})
    note = f"; not in the file, as expected: {', '.join(left)}" if left else ""
    print(f"{what}: {len(theirs)} tensors{note}", file=sys.stderr)


def open_network(network, folder, device, dtype, cfg=None, rename=(), drop=(), file=None):
    """network(cfg), else of the folder's config.json, with the weights beside it, ready for inference.

    file: an editor in one file, which gives the weights instead; see `read_original`.
    """
    with torch.device("meta"):
        net = build(network, folder / "config.json", cfg)
    tensors, name = find_tensors(folder) if file is None else (read_original(file, net), "")
    load_weights(net, tensors, file or folder / name, rename, drop, device=device, dtype=dtype)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Small pieces
# ------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),   # OpenAI CLIP; CLIP-H and DINOv2 use the exact one
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


MOST_ROWS = 2 ** 15


def attention(q, k, v, heads, mask=None, causal=False, scale=None):
    """softmax(q k^T * scale) v per head. q (N, Lq, C), k and v (N, Lk, C) -> (N, Lq, C); scale 1/sqrt(d)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))       # (N, heads, L, C/heads)
    x = fused_attention(q, k, v, mask, causal, scale)
    return x.transpose(1, 2).flatten(2)


def fused_attention(q, k, v, mask=None, causal=False, scale=None):
    """PyTorch's fused attention, (N, heads, L, d)."""
    how, dtype = dict(is_causal=causal, scale=scale), q.dtype
    if len(q) > MOST_ROWS and mask is None:        # a motion module's pixels: CUDA's grid ends at 65,535
        parts = zip(*(x.split(MOST_ROWS) for x in (q, k, v)))
        return torch.cat([fused_attention(*part, causal=causal, scale=scale) for part in parts])
    if q.device.type == "cpu" and dtype.itemsize == 2:          # a CPU's bfloat16 kernel is many times slower
        q, k, v, mask = (x if x is None or x.dtype == torch.bool else x.float() for x in (q, k, v, mask))
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k, v, mask, **how).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, **how)


def embedding(n, width):
    """nn.Embedding as it starts, but on the meta device without first importing torch's compiler (0.5 s)."""
    weight = torch.empty(n, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


def timestep_embedding(t, dim):
    """Sinusoids of the time step, cosines first. t (N,) -> (N, dim) float32."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * steps / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def frame_positions(n_frames, dim, device, dtype):
    """AnimateDiff's frame positions (1, F, dim): sine on even channels, cosine on odd, base 10000."""
    cos, sin = timestep_embedding(torch.arange(n_frames, device=device), dim).chunk(2, dim=-1)
    return torch.stack([sin, cos], dim=-1).flatten(1)[None].to(dtype)


def to_tensor(rgb):
    """rgb (H, W, 3) uint8 -> frame (3, H, W) in [-1, 1]."""
    return torch.from_numpy(rgb).permute(2, 0, 1).float() / 127.5 - 1


def to_rgb(frame):
    """frame (3, H, W) in [-1, 1] -> rgb (H, W, 3) uint8."""
    levels = ((frame.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def resize(frame, height, width):
    """frame (3, H, W) -> (3, height, width), antialiased where it shrinks."""
    if frame.shape[-2:] == (height, width):
        return frame
    return F.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def to_u8(images):
    """A tensor (..., 3, H, W) in [-1, 1], a PIL image or array, or a list -> list of (H, W, 3) uint8."""
    if torch.is_tensor(images):
        return [to_rgb(frame) for frame in images.reshape(-1, *images.shape[-3:])]
    if isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3:
        images = [images]
    return [np.asarray(im.convert("RGB") if isinstance(im, Image.Image) else im) for im in images]


def stretch(frame, width, height):
    """(H, W, 3) uint8 -> (height, width, 3), PIL bicubic."""
    same = frame.shape[:2] == (height, width)
    return frame if same else np.asarray(Image.fromarray(frame).resize((width, height), Image.BICUBIC))


def to_video(frames):
    """(F, H, W, 3) uint8 -> video (1, F, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(x) for x in frames])[None]


# ------------------------------------------------------------------------------------------------------------
# Text: CLIP's tokenizer and text tower
# ------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """CLIP's byte-pair tokenizer from vocab.json + merges.txt. tokenizer(texts, length=77) -> ids.

    `pad`, an id or a token, fills up after the end token; by default the end token itself, as in Stable
    Diffusion 1. A text is read as transformers reads it: small letters, accents composed, one blank for all
    white space.
    """
    SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    MARKS = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, vocab, merges, pad=None):
        if not isinstance(vocab, dict):                            # two file names, as published
            with reading(merges, f"does it belong to {vocab}?"):
                vocab, merges = models.BPE.read_file(str(vocab), str(merges))
                # all tokens are merges but 256 letters, alone and at a word's end, and the two marks
                need(len(vocab) <= len(merges) + 514, f"{len(merges)} merges, for {len(vocab)} tokens")
        self.vocab, (self.start, self.end) = vocab, (vocab[mark] for mark in self.MARKS)
        self.pad = self.end if pad is None else vocab[pad] if isinstance(pad, str) else pad
        self.fast = FastTokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
        self.fast.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.fast.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        start, end = self.MARKS
        self.fast.post_processor = processors.TemplateProcessing(
            f"{start} $A {end}", special_tokens=[(start, self.start), (end, self.end)])
        self.fast.add_special_tokens(list(self.MARKS))

    @classmethod
    def from_bpe_gz(cls, path, pad=0):
        """From OpenAI's bpe_simple_vocab_16e6.txt.gz, whose merges in order imply the vocabulary."""
        with reading(path):
            lines = gzip.open(path, "rt", encoding="utf-8").read().split("\n")[1:49152 - 256 - 2 + 1]
            merges = [tuple(line.split()) for line in lines if line]
            letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
            words = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
            return cls({word: i for i, word in enumerate([*words, *cls.MARKS])}, merges, pad)

    def encode(self, text):
        """Token ids of one text, without start and end, however many."""
        self.fast.no_truncation()
        self.fast.no_padding()
        return self.fast.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def __call__(self, texts, length=77):
        self.fast.enable_truncation(length)                        # a long text keeps its end token
        self.fast.enable_padding(length=length, pad_id=self.pad)
        texts = [text.encode("utf-8", "replace").decode() for text in texts]       # a shell's odd bytes
        ids = [self.fast.encode(text) for text in texts]
        for text, whole in zip(texts, ids):
            if whole.overflowing:
                warn_once(f'"{text[:40]}..." has more than {length} tokens, its end is cut')
        ids = [whole.ids for whole in ids]
        return torch.tensor(ids, dtype=torch.int64).reshape(-1, length)


class CLIPAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        need(width % heads == 0, f"{heads} heads cannot share {width} channels")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, causal):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, causal=causal))


class CLIPLayer(nn.Module):
    def __init__(self, width, heads, mlp, act, eps):
        super().__init__()
        need(act in ACTIVATIONS, f"hidden_act {act}; known are {', '.join(ACTIVATIONS)}")
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
    """CLIP's text tower. ids (N, L) int64 -> states (N, L, D) after the last norm. cfg: transformers'."""
    def __init__(self, cfg):
        super().__init__()
        d, eps = cfg["hidden_size"], float(cfg.get("layer_norm_eps", 1e-5))
        self.embeddings = nn.ModuleDict({
            "token_embedding": embedding(cfg["vocab_size"], d),
            "position_embedding": embedding(cfg["max_position_embeddings"], d)})
        self.encoder = CLIPEncoder(d, cfg["num_hidden_layers"], cfg["num_attention_heads"],
                                   cfg["intermediate_size"], cfg.get("hidden_act", "quick_gelu"), eps)
        self.final_layer_norm = nn.LayerNorm(d, eps=eps)

    def forward(self, ids):
        x = self.embeddings["token_embedding"](ids)
        x = x + self.embeddings["position_embedding"].weight[:ids.shape[1]]
        return self.final_layer_norm(self.encoder(x, causal=True))     # no mask: SD attends to the padding


class TextEncoder(nn.Module):
    """The editor's text encoder: all 77 states of CLIP's text tower, padding included, as in SD."""
    def __init__(self, cfg):
        super().__init__()
        self.text_model = TextModel(cfg)

    def forward(self, ids):
        return self.text_model(ids)


# ------------------------------------------------------------------------------------------------------------
# Pixels <-> latents: AutoencoderKL
# ------------------------------------------------------------------------------------------------------------

class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice plus a residual; `temb` (N, T) is added between the two. x (N, C, h, w)."""
    def __init__(self, c_in, c_out, groups, eps, temb=None):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps), nn.Conv2d(c_out, c_out, 3, padding=1)
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
    """One 3x3 conv after (up) or while (down) the size changes by 2; `uneven` pads right and bottom."""
    def __init__(self, channels, up, uneven=False):
        super().__init__()
        self.up, self.uneven = up, uneven
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=0 if uneven else 1)

    def forward(self, x, size=None):
        if self.up:                                               # to the skip's size, so odd sizes come back
            x = F.interpolate(x, size, scale_factor=None if size else 2, mode="nearest")
        if self.uneven:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class VAEAttention(nn.Module):
    """Single-head self-attention over all positions, in the middle of both halves. x (N, C, h, w)."""
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)                                  # (N, h*w, C)
        y = self.to_out[0](attention(self.to_q(y), self.to_k(y), self.to_v(y), 1))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class VAEHalf(nn.Module):
    """Encoder (way "down") or decoder ("up"): levels of n resnets, an attention at the smallest size."""
    def __init__(self, way, c_in, widths, c_out, n, groups):
        super().__init__()
        self.way, up = way, way == "up"
        middle = widths[0] if up else widths[-1]
        levels = nn.ModuleList()
        for c, width in zip([widths[0], *widths], widths):         # channels before and after each level
            resnets = [ResnetBlock(before, width, groups, 1e-6) for before in [c] + [width] * (n - 1)]
            levels.append(nn.ModuleDict({"resnets": nn.ModuleList(resnets)}))
        for level, width in zip(levels[:-1], widths):              # SD's VAE pads unevenly on the way down
            level[f"{way}samplers"] = nn.ModuleList([Resample(width, up, uneven=not up)])
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.add_module(f"{way}_blocks", levels)
        self.mid_block = nn.ModuleDict({
            "attentions": nn.ModuleList([VAEAttention(middle, groups)]),
            "resnets": nn.ModuleList(ResnetBlock(middle, middle, groups, 1e-6) for _ in range(2))})
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def middle(self, x):
        x = self.mid_block["attentions"][0](self.mid_block["resnets"][0](x))
        return self.mid_block["resnets"][1](x)

    def forward(self, x):
        x = self.conv_in(x)
        if self.way == "up":
            x = self.middle(x)
        for level in self.get_submodule(f"{self.way}_blocks"):
            for layers in level.values():                          # resnets, then the resampler
                for layer in layers:
                    x = layer(x)
        if self.way == "down":
            x = self.middle(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL: x (N, 3, H, W) in [-1, 1] <-> latents (N, c, H/f, W/f), f = 2^(levels - 1)."""
    LEGACY = (                                                     # keys of older files
        (".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))

    def __init__(self, cfg):
        super().__init__()
        self.config, c = cfg, cfg["latent_channels"]
        widths, n, groups = cfg["block_out_channels"], cfg["layers_per_block"], cfg["norm_num_groups"]
        self.scaling_factor = float(cfg.get("scaling_factor", 0.18215))    # SD's latents to unit variance
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = VAEHalf("down", cfg["in_channels"], widths, 2 * c, n, groups)   # mean and log variance
        self.decoder = VAEHalf("up", c, widths[::-1], cfg["out_channels"], n + 1, groups)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)

    def encode(self, x):
        """x (N, 3, H, W) in [-1, 1] -> mean, logvar (N, c, h, w) of the posterior, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (N, c, h, w), unscaled -> x (N, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


# ------------------------------------------------------------------------------------------------------------
# U-Net: Stable Diffusion 1.5's with 8 input channels (InstructPix2Pix), motion modules, SMA, EPM
# ------------------------------------------------------------------------------------------------------------

class EPM(nn.Module):
    """Editing-guided propagation (paper 3.3.2, eqs. 6-8): which frame should listen to which.

    x (N, C, h, w) -> bias (B, F, F) for attention from frame i (row) to frame j (column): two 3x3 convs,
    global average pool to c channels a frame, frames joined, two-layer MLP. The bias is 0 on the diagonal and
    -10 elsewhere, plus 100 times what the MLP says, which starts at 0: each frame at first attends to itself.
    Fixed to `frames` frames: shorter clips are padded by repeating the last frame's features and read the
    matrix' top left corner.

    In its own precision under autocast: at -10 a step of bfloat16 is 1/16.

    PAPER: 0 and -10 are the MLP's own start there (3.3.2). At -10 a gradient is e^-10 as strong, and no rate
    at which the MLP stays calm opens it again; hence the constant beside it, and the gain.
    """
    START, GAIN = -10.0, 100.0

    def __init__(self, channels, frames=N_FRAMES, c=32, hidden=128):
        super().__init__()
        self.frames = frames
        self.conv1, self.conv2 = nn.Conv2d(channels, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(frames * c, hidden), nn.Linear(hidden, frames * frames)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x, n_frames):
        if n_frames > self.frames:
            raise UserError(f"--frames {n_frames}: the trained EPM knows {self.frames}; edit in windows")
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            y = self.conv2(F.silu(self.conv1(x.to(self.conv1.weight.dtype))))
            y = y.mean(dim=(2, 3)).unflatten(0, (-1, n_frames))                                    # (B, F, c)
            y = torch.cat([y, y[:, -1:].expand(-1, self.frames - n_frames, -1)], dim=1).flatten(1)
            said = self.fc2(F.silu(self.fc1(y))).unflatten(1, (self.frames, self.frames))
            apart = 1 - torch.eye(self.frames, dtype=said.dtype, device=said.device)
            bias = self.START * apart + self.GAIN * said
        return bias[:, :n_frames, :n_frames]


def epm_attention(q, k, v, heads, bias):
    """Joint attention over all frames with a bias per frame pair, exactly, without building tokens x tokens.

    q, k, v (B, F*L, C), bias (B, F, F) -> (B, F*L, C). Each query gets the one-hot of its frame appended,
    each key its frame's column of the bias times sqrt(d): their product is the bias, and any fused attention
    computes it, gradients included. Padding to a multiple of 8 keeps the fused kernels available. (Eq. 7-8.)
    """
    b, n_frames, d = q.shape[0], bias.shape[1], q.shape[-1] // heads
    length = q.shape[1] // n_frames
    if q.device.type == "cpu" and not bias.requires_grad:
        # CUDA's kernels run 40 wide heads as 64 anyway, a CPU pays for every column. For one frame's queries
        # the bias is a row over the keys, (B, 1, 1, F*L): a CPU's kernel broadcasts it, but has no gradient.
        rows = bias.to(q.dtype).repeat_interleave(length, 2)[:, None].split(1, dim=2)
        frames = q.split(length, dim=1)
        return torch.cat([attention(x, k, v, heads, mask=row) for x, row in zip(frames, rows)], dim=1)
    onehot = torch.eye(n_frames, dtype=q.dtype, device=q.device).repeat_interleave(length, 0)      # (F*L, F)
    column = (bias.transpose(1, 2) * math.sqrt(d)).to(q.dtype).repeat_interleave(length, 1)      # (B, F*L, F)
    q, k, v = (x.unflatten(-1, (heads, d)).transpose(1, 2) for x in (q, k, v))            # (B, heads, F*L, d)
    q = torch.cat([q, onehot.expand(b, heads, -1, -1)], dim=-1)
    k = torch.cat([k, column[:, None].expand(-1, heads, -1, -1)], dim=-1)
    width = math.ceil((d + n_frames) / 8) * 8
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    x = fused_attention(q, k, v, scale=1 / math.sqrt(d))[..., :d]
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width, heads, ctx_width=None):
        super().__init__()
        need(width % heads == 0, f"{heads} heads cannot share {width} channels")
        self.heads, ctx_width = heads, ctx_width or width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(ctx_width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, ctx=None):
        """x (N, L, C) attends to ctx (N, Lc, D), or to itself."""
        ctx = x if ctx is None else ctx
        return self.to_out[0](attention(self.to_q(x), self.to_k(ctx), self.to_v(ctx), self.heads))

    def across_frames(self, x, n_frames, mode, size):
        """Spatial self-attention site of the U-Net. x (N, L, C), N = B*F; size (h, w).

        video: with EPM all frames' tokens attend to each other under its bias; without, each frame to itself.
        ffg: the first of the F rows is the anchor (FFG-V2V's first-frame trajectory, paper eq. 2-3); every
        frame takes keys and values from it, beside its own.
        """
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if mode == "video" and hasattr(self, "epm"):
            bias = self.epm(x.transpose(1, 2).unflatten(2, size), n_frames)
            q, k, v = (y.unflatten(0, (-1, n_frames)).flatten(1, 2) for y in (q, k, v))          # (B, F*L, C)
            y = epm_attention(q, k, v, self.heads, bias).unflatten(1, (n_frames, -1)).flatten(0, 1)
            return self.to_out[0](y)
        if mode == "ffg":
            k, v = (y.unflatten(0, (-1, n_frames)) for y in (k, v))                             # (B, F, L, C)
            k, v = (torch.cat([y, y[:, :1].expand_as(y)], dim=2).flatten(0, 1) for y in (k, v))
        return self.to_out[0](attention(q, k, v, self.heads))


class GEGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention (across frames, see Attention), cross-attention to the text, feed-forward; residual."""
    def __init__(self, width, heads, ctx_width=None):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads, ctx_width)
        self.ff = nn.ModuleDict({
            "net": nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))})

    def forward(self, x, ctx, n_frames, mode, size):
        x = x + self.attn1.across_frames(self.norm1(x), n_frames, mode, size)
        # all frames of a clip share one text, whose keys are computed once: (B, F*L, C) against (B, 77, D)
        y = self.attn2(self.norm2(x).unflatten(0, (-1, n_frames)).flatten(1, 2), ctx)
        x = x + y.unflatten(1, (n_frames, -1)).flatten(0, 1)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """A transformer block on the positions of a feature map. x (N, C, h, w), ctx (B, 77, D) -> x."""
    def __init__(self, channels, heads, ctx_width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, ctx_width)])

    def forward(self, x, ctx, n_frames, mode):
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)                                # (N, h*w, C)
        y = self.transformer_blocks[0](y, ctx, n_frames, mode, x.shape[2:])
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class MotionBlock(TransformerBlock):
    """The same layers along time: both attentions are among the frames of one place. x (B*h*w, F, C)."""
    def forward(self, x):
        pos = frame_positions(x.shape[1], x.shape[2], x.device, x.dtype)
        x = x + self.attn1(self.norm1(x) + pos)
        x = x + self.attn2(self.norm2(x) + pos)
        return x + self.ff["net"](self.norm3(x))


class MotionModule(nn.Module):
    """AnimateDiff's temporal layers under SMA (paper eq. 4-5): x + gamma * (motion(x) - x). x (N, C, h, w).

    gamma: one scalar a module. 0 at the start of training (the video model then is the image editor,
    exactly); 1 where published motion weights are used as they are (FFG-V2V). Knows `max_frames` at most.
    """
    over_frames = False                     # GroupNorm's statistics: a frame's own, as AnimateDiff trained it

    def __init__(self, channels, heads, groups, max_frames):
        super().__init__()
        self.max_frames = max_frames
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([MotionBlock(channels, heads)])
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x, n_frames):
        if n_frames > self.max_frames:
            raise UserError(f"--frames {n_frames}: the motion modules know {self.max_frames} positions; "
                            f"pass {self.max_frames} or fewer, or edit in windows")
        size = x.shape[2:]
        if self.over_frames:                                       # diffusers: over all frames together
            y = self.norm(x.unflatten(0, (-1, n_frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        else:
            y = self.norm(x)
        y = y.flatten(2).unflatten(0, (-1, n_frames)).permute(0, 3, 1, 2).flatten(0, 1)        # (B*h*w, F, C)
        y = self.proj_out(self.transformer_blocks[0](self.proj_in(y)))
        y = y.unflatten(0, (-1, size.numel())).permute(0, 2, 3, 1).flatten(0, 1)                 # (N, C, h*w)
        return x + self.gamma * y.unflatten(2, size)


class Block(nn.Module):
    """A level of the U-Net: resnets and attentions in turn, a motion module after each pair, a resampler."""
    def __init__(self, c_ins, width, attend, resample, groups, eps, temb):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, width, groups, eps, temb) for c in c_ins)
        if attend:
            self.attentions = nn.ModuleList(Transformer(width, **attend) for _ in c_ins)
        if resample:
            self.add_module(f"{resample}samplers", nn.ModuleList([Resample(width, up=resample == "up")]))

    def layer(self, i, x, temb, ctx, n_frames, mode):
        x = self.resnets[i](x, temb)
        if hasattr(self, "attentions"):
            x = self.attentions[i](x, ctx, n_frames, mode)
        return self.motion(i, x, n_frames, mode)

    def motion(self, i, x, n_frames, mode):
        if not hasattr(self, "motion_modules") or mode == "image":
            return x
        if mode == "ffg":                                          # the anchor row follows the image editor
            x = x.unflatten(0, (-1, n_frames))
            moved = self.motion_modules[i](x[:, 1:].flatten(0, 1), n_frames - 1)
            return torch.cat([x[:, :1], moved.unflatten(0, (len(x), -1))], dim=1).flatten(0, 1)
        return self.motion_modules[i](x, n_frames)


class MidBlock(Block):
    """Resnet, attention, (motion,) resnet at the lowest resolution."""
    def __init__(self, width, attend, **how):
        super().__init__([width, width], width, None, None, **how)
        self.attentions = nn.ModuleList([Transformer(width, **attend)])

    def forward(self, x, temb, ctx, n_frames, mode):
        return self.resnets[1](self.layer(0, x, temb, ctx, n_frames, mode), temb)


class UNet(nn.Module):
    """The video U-Net. unet(z, t, ctx) -> prediction (B, F, c, h, w), epsilon or v as the scheduler says.

    z (B, F, 2c, h, w) = [noisy latent, source latent]; t (B,) int64; ctx (B, 77, D) one text per clip. mode:
    "video" (motion modules and EPM where present), "ffg" (the first of the F rows is the anchor, see
    Attention), "image" (every frame by itself, no motion: the image editor). cfg: diffusers'
    UNet2DConditionModel keys, and of a video editor "motion" and "epm"; `attention_head_dim` there means the
    number of heads in SD 1.5.
    """
    def __init__(self, cfg):
        super().__init__()
        self.config, widths, n = cfg, cfg["block_out_channels"], cfg["layers_per_block"]
        last, temb, groups = len(widths) - 1, 4 * widths[0], cfg["norm_num_groups"]
        how = dict(groups=groups, eps=float(cfg.get("norm_eps", 1e-5)), temb=temb)
        heads = cfg["attention_head_dim"]
        heads = heads if isinstance(heads, list) else [heads] * len(widths)
        attend = [dict(heads=h, ctx_width=cfg["cross_attention_dim"], groups=groups) for h in heads]
        at_level = [a if "CrossAttn" in kind else None for a, kind in zip(attend, cfg["down_block_types"])]
        self.time_embedding = nn.ModuleDict({
            "linear_1": nn.Linear(widths[0], temb), "linear_2": nn.Linear(temb, temb)})
        self.conv_in = nn.Conv2d(cfg["in_channels"], widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        c, skips = widths[0], [widths[0]]                        # channels now, and those kept for the way up
        for i, width in enumerate(widths):
            c_ins = [c] + [width] * (n - 1)
            self.down_blocks.append(Block(c_ins, width, at_level[i], "down" if i < last else None, **how))
            skips += [width] * (n + (i < last))
            c = width
        self.mid_block = MidBlock(c, attend[-1], **how)
        for i, width in reversed(list(enumerate(widths))):         # the way up mirrors the way down
            c_ins = [before + skips.pop() for before in [c] + [width] * n]
            self.up_blocks.append(Block(c_ins, width, at_level[i], "up" if i > 0 else None, **how))
            c = width
        self.conv_norm_out = nn.GroupNorm(groups, c, how["eps"])
        self.conv_out = nn.Conv2d(c, cfg["out_channels"], 3, padding=1)
        if "motion" in cfg:
            self.add_motion(cfg["motion"])
        if "epm" in cfg:
            self.add_epm(**cfg["epm"])

    def blocks(self):
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def add_motion(self, cfg=None, gamma=0.0):
        """Insert fresh motion modules, placed as in AnimateDiff; cfg: MotionAdapter's keys."""
        self.motion_config = cfg = cfg or {}
        how = dict(heads=cfg.get("motion_num_attention_heads", 8),
                   groups=cfg.get("motion_norm_num_groups", 32),
                   max_frames=int(cfg.get("motion_max_seq_length", 32)))
        for block in self.blocks():
            n = len(block.resnets)
            if block is self.mid_block:
                n = 1 if cfg.get("use_motion_mid_block", True) else 0
            if n:
                width = block.resnets[0].conv1.out_channels
                block.motion_modules = nn.ModuleList(MotionModule(width, **how) for _ in range(n))
        self.set_gamma(gamma)

    def set_gamma(self, gamma):
        for m in self.modules():
            if isinstance(m, MotionModule):                       # published files have none: never on "meta"
                m.gamma = nn.Parameter(torch.full(m.gamma.shape, float(gamma), device="cpu"))

    def add_epm(self, sites="all", frames=N_FRAMES):
        """Insert fresh EPM at every spatial self-attention site, or (sites="inner") below the top level."""
        self.epm_config = {"sites": sites, "frames": frames}
        top = self.config["block_out_channels"][0]
        for block in self.blocks():
            for site in getattr(block, "attentions", []):
                width = site.norm.num_channels
                if sites == "all" or width > top:
                    site.transformer_blocks[0].attn1.epm = EPM(width, frames)

    def forward(self, z, t, ctx, mode="video"):
        shape, n_frames = z.shape[:2], z.shape[1]
        if mode == "image":                                      # B clips of F frames become B*F clips of one
            t, ctx, n_frames = t.repeat_interleave(n_frames, 0), ctx.repeat_interleave(n_frames, 0), 1
        x = z.flatten(0, 1)                                                                    # (N, 2c, h, w)
        temb = timestep_embedding(t, self.config["block_out_channels"][0]).to(x.dtype)
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))
        temb = temb.repeat_interleave(n_frames, 0)                                                 # (N, T)
        args = temb, ctx, n_frames, mode
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


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

class DDIM:
    """DDIM sampling schedule and step (Song et al. 2021, eq. 12), as the published scheduler configs put it.

    steps: 1 to T. spacing "leading" (DDIM's default), "trailing" (starts at the last time step) or "linspace"
    (both ends). timesteps: int64, from noise to image. set_alpha_to_one: abar after the last step is 1
    instead of abar[0]. cfg: scheduler_config.json.
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
            down = torch.arange(steps, dtype=torch.float64) * self.T / steps
            self.timesteps = (self.T - down).round().long() - 1
        else:
            assert spacing == "linspace", f"spacing {spacing}: needs leading, trailing or linspace"
            self.timesteps = torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round().long()
        end = torch.tensor(1.0) if set_alpha_to_one else self.abar[0]
        self.levels = torch.cat([self.abar[self.timesteps], end[None]])    # abar at each step, and at the end

    def to_eps(self, out, i, z):
        """The U-Net's prediction as epsilon: itself, or from v = sqrt(abar) eps - sqrt(1 - abar) z0."""
        a = self.levels[i]
        return out if self.prediction == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * z

    def step(self, eps, i, z, eta=0.0, noise=None):
        """From step i's latents z to the next, given the predicted noise; eta 1 adds DDPM's `noise`.

        The next step is the schedule's own. diffusers goes T // steps down from any time step: the same, but
        where steps are not that far apart ("linspace").
        """
        a, prev = self.levels[i], self.levels[i + 1]
        z0 = (z - (1 - a).sqrt() * eps) / a.sqrt()                         # predicted clean latent
        std = eta * ((1 - prev) / (1 - a) * (1 - a / prev)).sqrt()
        z = prev.sqrt() * z0 + (1 - prev - std ** 2).clamp(min=0).sqrt() * eps
        return z + std * noise if eta > 0 else z


def noise_levels(cfg):
    """Cumulative alphas (T,) of a scheduler config: scaled_linear betas (Stable Diffusion) or linear."""
    start, end = cfg.get("beta_start", 0.00085), cfg.get("beta_end", 0.012)
    power = 1.0 if cfg.get("beta_schedule", "scaled_linear") == "linear" else 0.5
    betas = torch.linspace(start ** power, end ** power, cfg.get("num_train_timesteps", 1000)) ** (1 / power)
    return torch.cumprod(1 - betas, 0)


# what a scheduler may say of each setting that changes results; the first is what it means to say nothing
SCHEDULER = dict(prediction_type=("epsilon", "v_prediction"), beta_schedule=("scaled_linear", "linear"),
                 timestep_spacing=("leading", "trailing", "linspace"), rescale_betas_zero_snr=(False, None),
                 trained_betas=(None,), clip_sample=(False, None), thresholding=(False, None))


def read_scheduler(path):
    """scheduler_config.json as a dict; UserError for a setting that changes results and is not known here."""
    with reading(path):
        cfg = read_json(path)
        for key, known in SCHEDULER.items():
            need(cfg.get(key, known[0]) in known, f"{key} {cfg.get(key)}; known is {known}")
        n, offset = cfg.get("num_train_timesteps", 1000), cfg.get("steps_offset", 1)
        need(1 <= n <= 100_000 and 0 <= offset < n, f"{n} time steps, from {offset}")
        abar = noise_levels(cfg)
        need(0 < abar[-1] <= abar[0] < 1, f"noise levels from {abar[0]} to {abar[-1]}")
    return cfg


# ------------------------------------------------------------------------------------------------------------
# The editor
# ------------------------------------------------------------------------------------------------------------

class VideoEditor:
    """Text encoder, VAE, U-Net and scheduler of one checkpoint; `edit` applies an instruction to a clip."""
    PARTS = "unet", "vae", "text_encoder", "tokenizer", "scheduler"
    FILES = ["model_index.json"] + [f"{folder}/{file}" for folder in PARTS for file in (
        "config.json", "*_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
        "tokenizer.json", "*.index.json", "*-of-*.safetensors", "diffusion_pytorch_model.safetensors",
        "model.safetensors")]
    VIDEO = "motion", "epm", "same_noise"           # what a video editor's unet/config.json says besides
    SLICE = 4                                       # frames that the VAE takes at a time: bounds memory

    @classmethod
    def from_pretrained(cls, source, motion=None, gamma=1.0, epm=False, norm_over_frames=False, device=None,
                        dtype=None):
        """Load an editor.

        source: "tiny" (embedded), "sd15" (InstructPix2Pix + AnimateDiff from the hub), a hub id, a directory
        in hub layout, or a trained run. motion: a hub id, directory or AnimateDiff .ckpt; gamma: SMA's scale
        for it; epm: add untrained EPM. A video editor brings its own motion, gamma and EPM; with a motion, or
        with False for none, it gives the image editor in it instead. norm_over_frames: diffusers' GroupNorm
        in motion modules instead of AnimateDiff's. device, dtype: default CUDA (bf16), MPS or CPU (fp32).
        Raises UserError for missing, partial or foreign weights.
        """
        self = cls()
        self.name, self.folders = str(source), repository(source)
        self.device, self.dtype = placement(device, dtype)
        vae_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype  # fp16 overflows in SD's VAE
        if self.name == "sd15" and motion is None:
            motion = SD15_MOTION
        unet, vae, text, words, schedule = read_from = [part(self.folders, name) for name in cls.PARTS]
        with reading(source, "is it an editor in hub layout, all of one model?"):
            config, drop = read_json(unet / "config.json"), ()
            if motion is not None:                                 # the image editor in it
                config = {k: v for k, v in config.items() if k not in cls.VIDEO}
                drop = "motion_modules", ".epm."
            self.unet = open_network(UNet, unet, self.device, self.dtype, config, drop=drop,
                                     file=self.whole(unet))
            self.vae = open_network(VAE, vae, self.device, vae_dtype, rename=VAE.LEGACY, file=self.whole(vae))
            self.text_encoder = open_network(TextEncoder, text, self.device, self.dtype,
                                             drop=["position_ids"], file=self.whole(text))
            self.tokenizer = open_tokenizer(words)
            self.scheduler = read_scheduler(schedule / "scheduler_config.json")
            self.read_numbers()
            self.check_fit()
        if motion:
            read_from.append(load_motion(self.unet, motion, gamma, self.device, self.dtype))
        if epm and "epm" not in config:
            self.unet.add_epm()
        for module in self.unet.modules():
            if isinstance(module, MotionModule):
                module.over_frames = norm_over_frames
        self.unet.to(self.device, self.dtype).eval().requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)             # faster on a CPU as well; the U-Net is not
        if self.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.multiple = self.vae.factor
        self.default_mode = "video" if "motion" in config else "ffg"
        self.same_noise = config.get("same_noise", False)      # trained on one noise for all frames of a clip
        self.fingerprint = fingerprint(*read_from, *[f for f in self.folders if f.is_file()])
        # what is trained from here needs the folder that gave the text encoder; the runs before it gave only
        # a U-Net, and may be deleted
        giver = self.folders.index(self.whole(text) or text.parent)
        self.base = read_index(self.folders[giver - 1])["base"] if giver else portable(source)
        return self

    def whole(self, folder):
        """The editor in one file whose weights stand for those in `folder`, or None."""
        before = self.folders[:self.folders.index(folder.parent)]
        return next((file for file in before if file.is_file()), None)

    def read_numbers(self):
        """What a checkpoint says of itself, a run's own words before its base's; else SD's usual values."""
        about = {}
        for folder in reversed(self.folders):
            about |= read_index(folder)
        s_txt, s_src = about.get("guidance", (7.5, 1.5))
        self.size, self.steps = int(about.get("size", 512)), int(about.get("steps", 20))
        self.guidance = float(s_txt), float(s_src)
        self.deadband = float(about.get("deadband", 0))            # see `settle`
        need(8 <= self.size <= 8192, f"size {self.size}")
        need(all(map(math.isfinite, (*self.guidance, self.deadband))), "guidance and deadband: need numbers")
        n = self.scheduler_for(1).T
        need(1 <= self.steps <= n, f"steps {self.steps}: needs 1 to {n}")
        self.words = set(about.get("words", ())) or None
        self.examples = [str(text) for text in about.get("examples", ())]

    def check_fit(self):
        """What strict loading does not tell: whether the parts are those of one editor, and can be used."""
        n_words, width = self.text_encoder.text_model.embeddings["token_embedding"].weight.shape
        last, wanted = max(self.tokenizer.vocab.values()), self.unet.config["cross_attention_dim"]
        need(last < n_words, f"the tokenizer has tokens up to {last}, the text encoder {n_words}")
        need(width == wanted, f"the text encoder's states are {width} wide, the U-Net wants {wanted}")
        c = self.vae.config["latent_channels"]
        c_in, c_out = self.unet.config["in_channels"], self.unet.config["out_channels"]
        need((c_in, c_out) == (2 * c, c), f"the U-Net takes {c_in} channels and gives {c_out}; an editor "
             f"takes {2 * c}, noise and source, and gives {c}: is it InstructPix2Pix's kind?")
        need(0 < self.vae.scaling_factor < 1e6, f"the VAE's scaling_factor is {self.vae.scaling_factor}")
        n = len(self.text_encoder.text_model.embeddings["position_embedding"].weight)
        need(n >= 77, f"the text encoder has {n} positions, a text 77")

    # ---- pieces --------------------------------------------------------------------------------------------

    def tokenize(self, texts):
        """List of N strings -> ids (N, 77) int64, cut to 77 with the end token kept."""
        return self.tokenizer(texts)

    def encode_text(self, texts):
        """List of N strings -> states (N, 77, D)."""
        return self.text_encoder(self.tokenize(texts).to(self.device))

    @torch.no_grad()
    def encode(self, video):
        """video (1, F, 3, H, W) in [-1, 1] -> latents (1, F, c, h, w), unscaled: the posterior's mode."""
        height, width = video.shape[-2:]
        assert height % self.multiple == width % self.multiple == 0, (
            f"frames of {width}x{height}: width and height must be multiples of {self.multiple}")
        dtype = next(self.vae.parameters()).dtype
        z = [self.vae.encode(x.to(self.device, dtype))[0].float() for x in video[0].split(self.SLICE)]
        return torch.cat(z)[None]

    @torch.no_grad()
    def decode(self, z):
        """z (1, F, c, h, w), scaled -> video (1, F, 3, H, W) float32 in [-1, 1]."""
        dtype, z = next(self.vae.parameters()).dtype, z[0] / self.vae.scaling_factor
        x = torch.cat([self.vae.decode(y.to(self.device, dtype)).float() for y in z.split(self.SLICE)])
        if not torch.isfinite(x).all():
            raise UserError(f"{self.name}: the VAE gave NaN or Inf; is a weight file damaged?")
        return x[None].clamp(-1, 1)

    def noise(self, n_frames, h, w, seed, first=0, mode="ffg"):
        """Starting noise (1, F, c, h, w) of frames first, first+1, ...: a frame's own, whatever its window.

        Frame-by-frame modes give every frame the same noise: without temporal layers nothing else ties frames
        together. A video editor gets what it was trained on.
        """
        def draw(index):
            g = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2 ** 63)
            return torch.randn(1, 1, self.vae.config["latent_channels"], h, w, generator=g)
        apart = mode == "video" and not self.same_noise
        return torch.cat([draw(first + i if apart else 0) for i in range(n_frames)], dim=1).to(self.device)

    def scheduler_for(self, steps):
        """DDIM with the checkpoint's own spacing, offset and end."""
        cfg = self.scheduler
        return DDIM(steps, cfg.get("timestep_spacing", "leading"), cfg.get("steps_offset", 1),
                    cfg.get("set_alpha_to_one", False), cfg)

    # ---- sampling ------------------------------------------------------------------------------------------

    def guided(self, z, z_src, t, ctx, s_txt, s_src, mode):
        """Three-branch guidance: e(0,0) + s_src (e(V,0) - e(0,0)) + s_txt (e(V,T) - e(V,0)), in one batch.

        z (K, F, c, h, w); z_src (1 or K, F, c, h, w); ctx (2, 77, D) = [instruction, empty]; s_txt, s_src: a
        number, or one for each of the K clips. A branch whose weight is 0 is not run: with s_src = 1 two
        remain, with s_txt = 1 besides just one. PAPER: "text 1.2-2.0, image 5.0-12.5" is printed with the
        names exchanged; we use text 5-12.5, source 1.2-2.
        """
        s_txt, s_src = (torch.as_tensor(s, dtype=torch.float32, device=z.device).reshape(-1, 1, 1, 1, 1)
                        for s in (s_txt, s_src))
        source, instruction, empty = z_src.expand_as(z), ctx[:1], ctx[1:]
        branches = [(s_txt, source, instruction),                  # e(V,T): its weight, source and text
                    (s_src - s_txt, source, empty),                # e(V,0)
                    (1 - s_src, torch.zeros_like(source), empty)]  # e(0,0)
        weights, sources, texts = zip(*[branch for branch in branches if branch[0].any()])
        x = torch.cat([torch.cat([z, source], dim=2) for source in sources]).to(self.dtype)
        t = torch.full((len(x),), int(t), device=x.device)
        eps = self.unet(x, t, torch.cat(texts).repeat_interleave(len(z), 0), mode).float()
        return sum(weight * e for weight, e in zip(weights, eps.split(len(z))))

    def settle(self, z0, z_src):
        """Cells that an edit hardly changed become the source's again. z0, scaled, and z_src (..., c, h, w).

        A cell's change is the mean |z0 - source| of its channels, in scaled latents. Up to `deadband` it is
        dropped, from twice that on it stays, between them smoothly. Ours: sampling leaves some drift
        everywhere, also where nothing was to be edited. 0, as for published weights, changes nothing.
        """
        if not self.deadband:
            return z0
        source = z_src * self.vae.scaling_factor
        change = (z0 - source).abs().mean(dim=-3, keepdim=True)
        w = (change / self.deadband - 1).clamp(0, 1)
        return source + w * w * (3 - 2 * w) * (z0 - source)

    @torch.no_grad()
    def sample(self, z_src, instruction, z_T, steps=None, s_txt=None, s_src=None, mode="auto", anchor=None,
               z0_ref=None, on_step=None, keep=None):
        """Denoise z_T (K, F, c, h, w) into the edited latents z0 of that shape, scaled: K edits in one batch.

        z_src (1, F, c, h, w): latents of the one source clip; each edit starts from its own noise. steps;
        s_txt, s_src, guidance scales, a number or K: by default the checkpoint's own. anchor: for mode
        "ffg", source latents (1, 1, c, h, w) and steps + 1 latents (1 or K, 1, c, h, w) of its edit, as
        `anchor` makes them of the first frame where not given. z0_ref (1, R, c, h, w): final latents of the
        first R frames, known from the previous window or (mode "ffg") given; they steer the others by
        InsV2V's noise correction, over the first half of the steps, given ones over all. on_step(i) is called
        after each step; keep (a list) receives the latents of every step and the end.
        """
        mode = self.default_mode if mode == "auto" else mode
        own = self.steps, *self.guidance
        steps, s_txt, s_src = (b if a is None else a for a, b in zip((steps, s_txt, s_src), own))
        scheduler, ctx, z = self.scheduler_for(steps), self.encode_text([instruction, ""]), z_T
        n_ref = 0 if z0_ref is None else z0_ref.shape[1]
        if mode == "ffg":
            first, path = anchor or self.anchor(z_src[:, :1], instruction, z_T[:, :1], steps, s_txt, s_src)
            assert len(path) == steps + 1, f"anchor of {len(path) - 1} steps: needs {steps}"
        for i, t in enumerate(scheduler.timesteps):
            if keep is not None:
                keep.append(z)
            if mode == "ffg":                                 # the anchor runs along, from its stored latents
                x = torch.cat([path[i].to(z).expand(len(z), -1, -1, -1, -1), z], dim=1)
                x_src = torch.cat([first, z_src], dim=1)
                out = self.guided(x, x_src, t, ctx, s_txt, s_src, mode)[:, 1:]
            else:
                out = self.guided(z, z_src, t, ctx, s_txt, s_src, mode)
            eps = scheduler.to_eps(out, i, z)
            if n_ref and (mode == "ffg" or i < steps / 2):         # InsV2V's long-video sampling correction
                a = scheduler.levels[i]
                delta = (z[:, :n_ref] - a.sqrt() * z0_ref) / (1 - a).sqrt() - eps[:, :n_ref]
                others = delta.mean(dim=1, keepdim=True).expand_as(eps[:, n_ref:])
                eps = eps + torch.cat([delta, others], dim=1)
            z = scheduler.step(eps, i, z)
            if not torch.isfinite(z).all():
                raise UserError(f"sampling step {i + 1} of {steps} gave NaN or Inf; try --dtype float32 or a "
                                "lower --text-cfg")
            if on_step:
                on_step(i)
        z = self.settle(z, z_src)
        if keep is not None:
            keep.append(z)
        return z

    def anchor(self, z_src, instruction, z_T, steps=None, s_txt=None, s_src=None):
        """FFG-V2V's first-frame trajectory: (z_src, [latents (K, 1, c, h, w) of every step and the end]).

        z_src (1, 1, c, h, w), z_T (K, 1, c, h, w).
        """
        trajectory = []
        self.sample(z_src, instruction, z_T, steps, s_txt, s_src, "image", keep=trajectory)
        return z_src, trajectory

    def follow(self, z_src, z_edited, z_T, steps=None):
        """`anchor` of a first frame that was edited elsewhere: its unscaled latents (1, 1, c, h, w) under the
        noise of each step. DDIM inversion, the other way to such a trajectory, measured 0.5 dB worse."""
        z0, levels = z_edited * self.vae.scaling_factor, self.scheduler_for(steps or self.steps).levels
        return z_src, [a.sqrt() * z0 + (1 - a).sqrt() * z_T for a in levels[:-1]] + [z0]

    def edit(self, video, instruction, steps=None, s_txt=None, s_src=None, seed=0, z_T=None, mode="auto"):
        """Edit a clip in one pass. video (1, F, 3, H, W) in [-1, 1], H and W multiples of `multiple`.

        s_txt, s_src: guidance on the instruction and on the source; None takes the checkpoint's own (7.5 and
        1.5 for published ones), and so for steps (20). z_T (1, F, c, h, w): the starting noise, else drawn
        from `seed`. mode: "image" (frame by frame), "ffg" (training-free, guided by the first frame), "video"
        (trained SMA + EPM), "auto". Clips longer than 16 frames belong into `sample.edit_stream`, which edits
        in windows.
        """
        assert mode in ("auto", "image", "ffg", "video"), f"mode {mode}: needs auto, image, ffg or video"
        assert video.ndim == 5 and video.shape[0] == 1 and video.shape[2] == 3, (
            f"video {tuple(video.shape)}: needs (1, F, 3, H, W), one clip at a time")
        mode = self.default_mode if mode == "auto" else mode
        z_src = self.encode(video)
        if z_T is None:
            z_T = self.noise(z_src.shape[1], *z_src.shape[3:], seed, mode=mode)
        assert z_T.shape == z_src.shape, f"z_T {tuple(z_T.shape)}: needs {tuple(z_src.shape)}"
        return self.decode(self.sample(z_src, instruction, z_T.to(self.device), steps, s_txt, s_src, mode))


def open_tokenizer(folder, pad=None):
    """CLIP's Tokenizer of vocab.json and merges.txt, or of tokenizer.json, all that transformers 5 writes.

    pad: an id or a token; by default the repository's own: "!" in Stable Diffusion 2, the end token in 1.
    """
    folder = Path(folder)
    with reading(folder, "is it CLIP's tokenizer?"):
        for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
            if pad is None and path.is_file():
                pad = read_json(path).get("pad_token")
                pad = pad.get("content") if isinstance(pad, dict) else pad
                need(pad is None or isinstance(pad, str), f"pad_token {pad}: needs a token")
        vocab, merges, path = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
        if path.is_file() and not (vocab.is_file() and merges.is_file()):
            bpe = read_json(path)["model"]                         # older files join a pair by a blank
            vocab = dict(bpe["vocab"])
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]]
        return Tokenizer(vocab, merges, pad)


# names in the original Stable Diffusion's files -> ours; those of numbered blocks are worked out
ORIGINAL_UNET = (
    (r"time_embed\.0", "time_embedding.linear_1"), (r"time_embed\.2", "time_embedding.linear_2"),
    (r"input_blocks\.0\.0", "conv_in"), (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"),
    (r"middle_block\.1", "mid_block.attentions.0"), (r"middle_block\.0", "mid_block.resnets.0"),
    (r"middle_block\.2", "mid_block.resnets.1"), (r"in_layers\.0", "norm1"), (r"in_layers\.2", "conv1"),
    (r"emb_layers\.1", "time_emb_proj"), (r"out_layers\.0", "norm2"), (r"out_layers\.3", "conv2"),
    ("skip_connection", "conv_shortcut"))
ORIGINAL_VAE = (
    (r"mid\.block_1", "mid_block.resnets.0"), (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"), (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"\.([qkv])\.", r".to_\1."), ("proj_out", "to_out.0"), ("norm_out", "conv_norm_out"),
    ("nin_shortcut", "conv_shortcut"), (r"\.(down|up)sample\.", r".\1samplers.0."))


def read_original(file, net):
    """{our name: tensor} for a UNet, VAE or TextEncoder, from an editor in one file of the original layout.

    Of the U-Net the running mean of its training, where the file has it, as InstructPix2Pix's own code takes.
    """
    def unet_block(m):                      # each level: n resnets and a resampler down, n + 1 resnets up
        way = "down" if m[1] == "in" else "up"
        level, i = divmod(int(m[2]) - (way == "down"), net.config["layers_per_block"] + 1)
        kind = "resnets" if m[3] == "0" else "attentions"
        return f"{way}_blocks.{level}." + (f"{way}samplers.0.conv" if m[4] else f"{kind}.{i}")

    def vae_block(m):                       # the way up is numbered from its end
        i = int(m[2]) if m[1] == "down" else len(net.config["block_out_channels"]) - 1 - int(m[2])
        return f"{m[1]}_blocks.{i}." + m[3].replace("block", "resnets")

    start, rules = "cond_stage_model.transformer.", ()
    if isinstance(net, UNet):
        start = "model.diffusion_model."
        rules = (*ORIGINAL_UNET, (r"^(in|out)put_blocks\.(\d+)\.(\d)(\.op|\.conv(?=\.))?", unet_block))
    if isinstance(net, VAE):
        start = "first_stage_model."
        rules = ((r"(down|up)\.(\d+)\.(block|downsample|upsample)", vae_block), *ORIGINAL_VAE)
    tensors, found = read_tensors(file), {}
    for k, v in tensors.items():
        if k.startswith(start):
            v = tensors.get("model_ema." + k.removeprefix("model.").replace(".", ""), v)
            k = k.removeprefix(start)
            for old, new in rules:
                k = re.sub(old, new, k)
            # the VAE's attention was of 1x1 convolutions
            found[k] = v[..., 0, 0] if isinstance(net, VAE) and "attentions" in k and v.ndim == 4 else v
    with reading(file, "--weights takes a whole editor, in Stable Diffusion's original layout or a folder"):
        need(found, f"holds no {start}*, but {', '.join(sorted(tensors)[:2])}")
    return found


def load_motion(unet, source, gamma, device, dtype):
    """Published motion modules into `unet`; returns the weight file.

    source: a MotionAdapter repository, directory or file, or AnimateDiff's .ckpt, also of a whole training.
    """
    file = Path(source)
    if file.is_file():
        tensors = read_tensors(file)
    else:
        folder = hub_dir(source, ["config.json", "diffusion_pytorch_model.safetensors"])
        tensors, name = find_tensors(folder)
        file = folder / name
    with reading(file, "is it an AnimateDiff adapter?"):
        tensors = {k: v for k, v in tensors.items() if "motion_modules" in k}
        need(tensors, "holds no motion modules")
        # a .ckpt has no config: its tensors tell the rest, the U-Net how many heads and groups
        heads, config = unet.config["attention_head_dim"], file.with_name("config.json")
        tables = [v for k, v in tensors.items() if k.endswith(".pe")]              # (1, F, C)
        for table in tables:
            plain = frame_positions(*table.shape[1:], "cpu", torch.float32)
            need((table - plain).abs().max() < 0.01, "its frame positions are not the plain sinusoid")
        cfg = {"motion_num_attention_heads": heads[0] if isinstance(heads, list) else heads,
               "motion_norm_num_groups": unet.config["norm_num_groups"],
               "motion_max_seq_length": tables[0].shape[1] if tables else 32,
               "use_motion_mid_block": any("mid_block" in k for k in tensors)}
        cfg |= read_json(config) if config.is_file() else {}
        check_sizes(cfg)
        with torch.device("meta"):
            unet.add_motion(cfg, gamma)
    rename = [("module.", ""), (".temporal_transformer", ""), (".ff_norm", ".norm3"),
              (".attention_blocks.0", ".attn1"), (".norms.0", ".norm1"),
              (".attention_blocks.1", ".attn2"), (".norms.1", ".norm2")]
    load_weights(unet, tensors, file, rename=rename, drop=[".pe"], absent=["gamma"],
                 only="motion_modules", device=device, dtype=dtype)
    return file


def merge_lora_file(unet, path, strength=1.0):
    """Add a LoRA, in kohya's, peft's or diffusers' names, to the weights: W + strength alpha / rank up down.

    Parts for the text encoder are left out, with a note; what is unknown otherwise is a UserError.
    """
    def short(name):                                  # kohya has "_" for ".", older files no 0 after to_out
        return name.replace(".", "_").removesuffix("_0")

    layers = {short(name): m for name, m in unet.named_modules() if hasattr(m, "weight")}
    pattern = (r"(lora_unet_|unet\.|base_model\.model\.)?(.+)([._]lora)(_A|_down|\.down)"
               r"((?:\.default)?\.weight)")
    tensors = read_tensors(path)
    left = {k for k in tensors if not k.startswith(("lora_te", "text_encoder"))}
    note = f"; not used, {len(tensors) - len(left)} of the text encoder" if len(left) < len(tensors) else ""
    with reading(path, "is it a LoRA of Stable Diffusion 1.5's U-Net?"):
        for m in filter(None, (re.fullmatch(pattern, k) for k in sorted(left))):
            start, name, middle, half, end = m.groups(default="")
            up = start + name + middle + half.replace("A", "B").replace("down", "up") + end
            down, alpha = tensors[m[0]].float(), start + name + ".alpha"
            layer = layers[short(name.replace(".processor", ""))]
            scale = strength * float(tensors.get(alpha, len(down))) / len(down)
            delta = scale * tensors[up].float().flatten(1) @ down.flatten(1)        # 3x3 convolutions as well
            weight = layer.weight + delta.view_as(layer.weight).to(layer.weight)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            left -= {m[0], up, alpha}
        need(not left, f"has unknown {len(left)} tensors, first {', '.join(sorted(left)[:2])}")
    print(f"{path}: merged with strength {strength:g}{note}", file=sys.stderr)
