"""Scores of an edit, computed as their sources compute them, and the networks behind them.

    python metrics.py edited.mp4 --source video.mp4 --instruction "make it snow" \\
                      --source-caption "a street" --target-caption "a street in the snow"
    python metrics.py tgve DIR [--plus] [--outputs DIR]        the TGVE or TGVE+ benchmark as one table
    python metrics.py shapes [--sweep] [--agreement] [--bare]  the same on drawn clips with a known truth
    python metrics.py footage DIR                              the same on real clips, by exact effects
    python metrics.py study DIR_A DIR_B [DIR_SOURCE]           a user study as one HTML page
    python metrics.py votes *.json                             its answers as win rates

Contents
    images in    resize_crop, Preprocess
    networks     CLIP (PickScore is one, too), DINOv2, ViCLIP
    scores       clip_frame, clip_text, pick_score, viclip_out, viclip_dir, image_scores;
                 on pixels ssim, psnr, flicker, seam_score, preservation
    truth        truth_scores, succeeds, against_truth
    clips        SCORES, Scorers, score_clips, total_score
    one clip     load_frames, align, main_clip
    benchmarks   read_tgve, read_tgve_plus, make_edits, score_items, table, main_tgve
    known truth  drawn_item, drawn_scores, agreement_table, main_shapes, main_footage
    user study   main_study, main_votes

Networks return un-normalised projected features, so that a clip is encoded once for all its scores.
Between files and networks a clip is "frames", (F, H, W, 3) uint8.
"""
import argparse
import base64
import csv
import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter
from tqdm import tqdm

import world
from model import (ACTIVATIONS, ROOT, CLIPEncoder, TextModel, Tokenizer, UserError, VideoEditor, attention,
                   begin, build, find_tensors, fingerprint, hub_dir, load_weights, need, placement, read_json,
                   read_tensors, reading, run, stretch, to_u8, to_video, write_json, write_text)
from sample import (IMAGES, REFERENCES, VIDEOS, WINDOW, Parser, between, choose_model, edit_pictures,
                    editor_flags, known_device, model_size, plan, probe, read_frames, read_video, settings,
                    shown, video_writer)
from teachers import LLAVA, LlavaOneVision, judge_edit

# ------------------------------------------------------------------------------------------------------------
# Images in
# ------------------------------------------------------------------------------------------------------------

def resize_crop(image, resize, crop):
    """uint8 (H, W, 3) -> (crop, crop, 3): short side to `resize` (PIL bicubic, antialiased), then the centre.

    The long side is cut to whole pixels, not rounded, and an odd margin has its extra pixel below and on the
    right, as in the published image processors.
    """
    height, width = image.shape[:2]
    size = (resize, resize * height // width) if width <= height else (resize * width // height, resize)
    image = stretch(image, *size)
    top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
    return image[top:top + crop, left:left + crop]


class Preprocess:
    """preprocessor_config.json as a function: images (see `to_u8`) -> pixel_values (N, 3, S, S) float32."""

    def __init__(self, cfg):
        def side(value):                            # 224 or {"shortest_edge": 224} or {"height": 224, …}
            return value if isinstance(value, int) else value.get("shortest_edge") or value["height"]
        self.resize, self.crop = side(cfg["size"]), side(cfg["crop_size"])
        self.mean, self.std = torch.tensor(cfg["image_mean"]), torch.tensor(cfg["image_std"])

    def __call__(self, images):
        x = np.stack([resize_crop(im, self.resize, self.crop) for im in to_u8(images)])
        return normalise(x, self.mean, self.std)


def normalise(images, mean, std):
    """(N, H, W, 3) in [0, 255], mean and std (3,) of [0, 1] -> (N, 3, H, W) float32."""
    x = torch.as_tensor(images).float() / 255
    return ((x - mean) / std).permute(0, 3, 1, 2).contiguous()


def open_network(network, source, device=None, dtype=torch.float32):
    """(network with the weights of a hub id or a directory in transformers' layout, that directory)."""
    folder = hub_dir(source, ["*.json", "merges.txt", "model.safetensors"])
    with torch.device("meta"):
        net = build(network, folder / "config.json")
    tensors, file = find_tensors(folder)
    load_weights(net, tensors, f"{folder.name}/{file}", drop=("position_ids",), device=device, dtype=dtype)
    with reading(folder / "preprocessor_config.json"):
        net.preprocess = Preprocess(read_json(folder / "preprocessor_config.json"))
    return net.eval(), folder


# ------------------------------------------------------------------------------------------------------------
# CLIP (Radford et al. 2021), transformers' names; PickScore (Kirstain et al. 2023) is CLIP-H, fine-tuned
# ------------------------------------------------------------------------------------------------------------

class VisionEmbeddings(nn.Module):
    def __init__(self, width, image_size, patch_size):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, width)

    def forward(self, pixel_values):
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (N, patches, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return x + self.position_embedding.weight


class VisionModel(nn.Module):
    """CLIP's image tower: pixel_values (N, 3, S, S) -> class token after the last norm (N, D)."""

    def __init__(self, cfg):
        super().__init__()
        width, eps = cfg["hidden_size"], cfg.get("layer_norm_eps", 1e-5)
        self.embeddings = VisionEmbeddings(width, cfg["image_size"], cfg["patch_size"])
        self.pre_layrnorm = nn.LayerNorm(width, eps)                    # sic
        self.encoder = CLIPEncoder(width, cfg["num_hidden_layers"], cfg["num_attention_heads"],
                                   cfg["intermediate_size"], cfg["hidden_act"], eps)
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixel_values):
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Both towers of CLIP from a transformers-style config {projection_dim, text_config, vision_config}.

    encode_image: pixel_values (N, 3, S, S) -> (N, P); encode_text: ids (N, 77) -> (N, P); not normalised.
    `CLIP(config)` starts at random and trains; `from_pretrained` also brings `.tokenizer` and `.preprocess`.
    """

    def __init__(self, cfg):
        super().__init__()
        text, vision = cfg["text_config"], cfg["vision_config"]
        self.image_size = vision["image_size"]
        self.text_model, self.vision_model = TextModel(text), VisionModel(vision)
        self.text_projection = nn.Linear(text["hidden_size"], cfg["projection_dim"], bias=False)
        self.visual_projection = nn.Linear(vision["hidden_size"], cfg["projection_dim"], bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of 1/temperature
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """OpenAI's initialisation: residual branches shrink with depth, so that their sum keeps its scale."""
        for tower, proj in ((self.text_model, self.text_projection),
                            (self.vision_model, self.visual_projection)):
            width = proj.in_features
            branch = (2 * width * len(tower.encoder.layers)) ** -0.5
            std = {"out_proj": branch, "fc2": branch, "fc1": (2 * width) ** -0.5}
            for name, layer in tower.encoder.named_modules():           # q, k, v, out, fc1, fc2 of each layer
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=std.get(name.split(".")[-1], width ** -0.5))
                    nn.init.zeros_(layer.bias)
            nn.init.normal_(proj.weight, std=width ** -0.5)
        text, vision = self.text_model.embeddings, self.vision_model.embeddings
        nn.init.normal_(text.token_embedding.weight, std=0.02)
        nn.init.normal_(text.position_embedding.weight, std=0.01)
        nn.init.normal_(vision.class_embedding, std=len(vision.class_embedding) ** -0.5)
        nn.init.normal_(vision.position_embedding.weight, std=len(vision.class_embedding) ** -0.5)

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=torch.float32):
        """source: openai/clip-vit-large-patch14, yuvalkirstain/PickScore_v1, or a directory in that layout.

        Raises UserError for missing, partial or foreign files.
        """
        net, folder = open_network(cls, source, device, dtype)
        with reading(folder, "is it CLIP's or PickScore's?"):
            net.tokenizer = Tokenizer(folder / "vocab.json", folder / "merges.txt")
            need(net.preprocess.crop == net.image_size, f"crop_size is not {net.image_size}")
        return net

    def encode_image(self, pixel_values):
        x = pixel_values.to(self.visual_projection.weight)              # its device and dtype
        return self.visual_projection(self.vision_model(x)).float()

    def encode_text(self, ids):
        ids = ids.to(self.text_projection.weight.device)
        x = self.text_model(ids)                                        # (N, 77, D)
        # pooled at the end token: it has the largest id, and argmax takes the first of several
        return self.text_projection(x[torch.arange(len(x), device=x.device), ids.argmax(-1)]).float()


# ------------------------------------------------------------------------------------------------------------
# DINOv2 (Oquab et al. 2023), with and without registers (Darcet et al. 2023), transformers' names
# ------------------------------------------------------------------------------------------------------------

def resize_positions(table, grid, antialias):
    """The square position table (1, 1 + n*n, D) for another grid (h, w), bicubic in float32.

    antialias: in models with registers, as in both code bases; in others not, as in transformers'
    Dinov2Model. (There facebookresearch/dinov2 resizes by the factors (h + 0.1)/n, (w + 0.1)/n.) All agree on
    the table's own grid.
    """
    n = round((table.shape[1] - 1) ** 0.5)
    if tuple(grid) == (n, n):
        return table
    pos = table[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)  # (1, D, n, n)
    pos = F.interpolate(pos, size=tuple(grid), mode="bicubic", antialias=antialias)
    return torch.cat([table[:, :1], pos.flatten(2).transpose(1, 2).to(table)], 1)


class DINOEmbeddings(nn.Module):
    def __init__(self, width, image_size, patch_size, n_registers):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))           # in the file, not used here
        self.register_tokens = nn.Parameter(torch.zeros(1, n_registers, width)) if n_registers else None
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch_size, patch_size)})
        self.position_embeddings = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))

    def forward(self, pixel_values):
        x = self.patch_embeddings["projection"](pixel_values)           # (N, D, h, w)
        pos = resize_positions(self.position_embeddings, x.shape[-2:], self.register_tokens is not None)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + pos
        if self.register_tokens is not None:                            # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        return x


class DINOLayer(nn.Module):
    def __init__(self, width, heads, mlp, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width)})})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
        self.layer_scale1 = nn.ParameterDict({"lambda1": nn.Parameter(torch.ones(width))})
        self.layer_scale2 = nn.ParameterDict({"lambda1": nn.Parameter(torch.ones(width))})

    def forward(self, x):                                               # (N, L, D)
        y, qkv = self.norm1(x), self.attention["attention"]
        y = attention(qkv["query"](y), qkv["key"](y), qkv["value"](y), self.heads)
        x = x + self.layer_scale1["lambda1"] * self.attention["output"]["dense"](y)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + self.layer_scale2["lambda1"] * y


class DINOv2(nn.Module):
    """encode_image: pixel_values (N, 3, H, W), sides divisible by the patch size -> class feature (N, D)."""

    def __init__(self, cfg):
        super().__init__()
        width, registers, eps = cfg["hidden_size"], cfg.get("num_register_tokens", 0), cfg["layer_norm_eps"]
        self.image_size = cfg["image_size"]
        self.embeddings = DINOEmbeddings(width, self.image_size, cfg["patch_size"], registers)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(
            DINOLayer(width, cfg["num_attention_heads"], width * cfg["mlp_ratio"], eps)
            for _ in range(cfg["num_hidden_layers"]))})
        self.layernorm = nn.LayerNorm(width, eps)

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=torch.float32):
        """source: facebook/dinov2-base, facebook/dinov2-with-registers-large, or a directory like that."""
        return open_network(cls, source, device, dtype)[0]

    def forward(self, pixel_values):
        """All tokens after the last norm: (N, 1 + registers + patches, D)."""
        x = self.embeddings(pixel_values.to(self.layernorm.weight))
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.layernorm(x).float()

    def encode_image(self, pixel_values):
        return self(pixel_values)[:, 0]


# ------------------------------------------------------------------------------------------------------------
# ViCLIP (Wang et al. 2023, InternVid): OpenAI's names for CLIP, the frames joined into one sequence
# ------------------------------------------------------------------------------------------------------------

class ViCLIPBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()                                         # nn.MultiheadAttention's keys
        self.attn.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, causal=False):                                 # (N, L, D)
        q, k, v = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        x = x + self.attn.out_proj(attention(q, k, v, self.heads, causal=causal))
        return x + self.mlp["c_proj"](ACTIVATIONS["quick_gelu"](self.mlp["c_fc"](self.ln_2(x))))


def viclip_blocks(width, layers, heads):
    return nn.ModuleDict({"resblocks": nn.ModuleList(ViCLIPBlock(width, heads) for _ in range(layers))})


class ViCLIPVision(nn.Module):
    """Normalised clips (N, F, 3, S, S) -> (N, P)."""

    def __init__(self, cfg):
        super().__init__()
        width, patch, init = cfg["vision_width"], cfg["patch_size"], cfg["vision_width"] ** -0.5
        n_patches = (cfg["image_size"] // patch) ** 2
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(init * torch.randn(width))
        self.positional_embedding = nn.Parameter(init * torch.randn(1 + n_patches, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, cfg["num_frames"], width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = viclip_blocks(width, cfg["vision_layers"], cfg["vision_heads"])
        self.proj = nn.Parameter(init * torch.randn(width, cfg["embed_dim"]))

    def forward(self, video):
        x = self.conv1(video.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # (N, F, patches, D)
        when = self.temporal_positional_embedding                       # (1, F, D)
        when = when.mean(1, keepdim=True) if x.shape[1] == 1 else when  # a still has no place in time
        x = (x + self.positional_embedding[1:] + when[:, :, None]).flatten(1, 2)
        cls = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([cls, x], 1))                         # (N, 1 + F*patches, D)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class ViCLIPText(nn.Module):
    """ids (N, 32) -> (N, P)."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg["text_width"]
        self.token_embedding = nn.Embedding(cfg["vocab_size"], width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(cfg["context_length"], width))
        self.transformer = viclip_blocks(width, cfg["text_layers"], cfg["text_heads"])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, cfg["embed_dim"]))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer["resblocks"]:
            x = block(x, causal=True)
        x = self.ln_final(x)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]   # the end token's
        return x @ self.text_projection


class ViCLIP(nn.Module):
    """encode_video: (N, 8 or 1, 3, S, S) -> (N, P); encode_text: ids (N, 32) -> (N, P); not normalised.

    cfg: as SIZES. All tokens are used; the published code drops 90 % by default, which is for training.
    """
    SIZES = dict(image_size=224, patch_size=14, num_frames=8, context_length=32, vocab_size=49408,
                 vision_width=1024, vision_layers=24, vision_heads=16,
                 text_width=768, text_layers=12, text_heads=12, embed_dim=768)
    MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])        # ImageNet's
    FILES = ["ViClip-InternVid-10M-FLT.pth", "model.safetensors", "bpe_simple_vocab_16e6.txt.gz", "*.json"]

    def __init__(self, cfg):
        super().__init__()
        self.image_size, self.n_frames = cfg["image_size"], cfg["num_frames"]
        self.context = cfg["context_length"]
        self.temp = nn.Parameter(torch.tensor(0.01))                    # for training, not in scores
        self.vision_encoder, self.text_encoder = ViCLIPVision(cfg), ViCLIPText(cfg)

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=torch.float32):
        """source: OpenGVLab/ViCLIP (gated: accept its terms and log in) or a directory with its .pth, or with
        a model.safetensors of the same names, and the vocabulary beside it; other sizes are in its
        config.json."""
        folder = hub_dir(source, cls.FILES)
        path = folder / cls.FILES[0]
        path = path if path.is_file() else folder / "model.safetensors"
        cfg = cls.SIZES
        for file in (folder / "config.json", folder / "mini_sizes.json"):
            if file.is_file():
                cfg = cfg | {key: x for key, x in read_json(file).items() if key in cfg}
        with torch.device("meta"):
            net = build(cls, folder / "config.json", cfg)
        load_weights(net, read_tensors(path), f"{folder.name}/{path.name}", device=device, dtype=dtype)
        bpe = folder / "bpe_simple_vocab_16e6.txt.gz"                   # or, for `tiny`, CLIP's two files
        with reading(folder, "does its vocabulary belong to it?"):
            net.tokenizer = (Tokenizer.from_bpe_gz(bpe, pad=0) if bpe.is_file() else
                             Tokenizer(folder / "vocab.json", folder / "merges.txt", pad=0))
        return net.eval()

    def encode_video(self, video):
        assert video.shape[1] in (1, self.n_frames), f"{video.shape[1]} frames; fit {self.n_frames} or 1"
        return self.vision_encoder(video.to(self.text_encoder.text_projection)).float()

    def encode_text(self, ids):
        return self.text_encoder(ids.to(self.temp.device)).float()

    def tokenize(self, texts):
        return self.tokenizer(texts, length=self.context)

    def choose(self, frames):
        """Every (n // 8)-th of n frames, 8 of them; ours: a shorter clip is slowed down to 8."""
        n = self.n_frames
        if len(frames) < n:
            return [frames[i * len(frames) // n] for i in range(n)]
        return frames[::len(frames) // n][:n]

    def preprocess(self, images):
        """Frames (see `to_u8`) -> the 8 that ViCLIP sees, (1, 8, 3, S, S): stretched, not cropped.

        Bilinear without antialias, in whole grey levels: OpenCV's, which fed ViCLIP, to one level.
        """
        x = torch.from_numpy(np.stack(self.choose(to_u8(images)))).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear").round()
        return normalise(x.permute(0, 2, 3, 1), self.MEAN, self.STD)[None]


# ------------------------------------------------------------------------------------------------------------
# Scores on features: image features (F, P), one per frame; text and video features (P,); none normalised
# ------------------------------------------------------------------------------------------------------------

def cosine(a, b):
    return F.cosine_similarity(a, b, dim=-1)


def clip_frame(images):
    """CLIPFrame: mean cosine over all ordered pairs of different frames. 0 to 1, up; rewards doing nothing;
    NaN for one frame. Wu et al. 2023 (TGVE), run_eval.py."""
    x, n = F.normalize(images, dim=-1), len(images)
    return float(((x @ x.T).sum() - (x * x).sum()) / (n * (n - 1))) if n > 1 else math.nan


def clip_text(images, target, scale=100.0):
    """CLIPText: mean over frames of scale * cosine to the target caption (not the instruction). 15 to 35, up.
    TGVE's script; the scale is exp(logit_scale) = 100 of the published CLIP."""
    return float(scale * cosine(images, target).mean())


def pick_score(images, target, logit_scale):
    """PickScore: mean over frames of exp(logit_scale) * cosine, all by PickScore's own network. Near 20, up.
    Kirstain et al. 2023."""
    return float(math.exp(logit_scale) * cosine(images, target).mean())


def viclip_out(edited, target):
    """ViCLIP_out: cosine of the edited clip and the target caption. 0.2 to 0.3, up. Singer et al. 2024."""
    return float(cosine(edited, target))


def viclip_dir(edited, source, target, source_text):
    """ViCLIP_dir: cosine of the change in video and the change in text. -1 to 1, up; 0 for an untouched clip.

    PAPER: neither it nor EVE says whether features are normalised before the subtraction; InstructPix2Pix's
    directional CLIP, which it follows, normalises first, and so do we.
    """
    video, text = ((edited, source), (target, source_text))
    video, text = (F.normalize(b, dim=-1) - F.normalize(a, dim=-1) for b, a in (video, text))
    return float(cosine(video, text))


@torch.no_grad()
def image_scores(clip, dino, source, edited, source_caption, target_caption):
    """UltraEdit's six scores (Zhao et al. 2024) of N edits of one image: dict of (N,) float64 arrays, all up.

    source: one image, edited: a list of N of the same size (see `to_u8`); dino: None leaves its score out.
    CLIP gets a stretch to its square by tensor bicubic without antialias; DINOv2 (theirs: ViT-L with
    registers) one by nearest pixels, not normalised: as in the released code, not as they were trained.
    """
    images = to_u8(source) + to_u8(edited)                              # the source first
    assert len({im.shape for im in images}) == 1, "edits need the source's size"
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255  # (1 + N, 3, H, W)
    mean, std = clip.preprocess.mean[:, None, None], clip.preprocess.std[:, None, None]
    square = (F.interpolate(x, size=(clip.image_size, clip.image_size), mode="bicubic") - mean) / std
    img = F.normalize(clip.encode_image(square), dim=-1)
    src, tgt = F.normalize(clip.encode_text(clip.tokenizer([source_caption, target_caption])), dim=-1)
    scores = {"clip_sim_source": cosine(img[:1], src).expand(len(img) - 1),
              "clip_sim_target": cosine(img[1:], tgt),
              "clip_sim_dir": cosine(img[1:] - img[:1], tgt - src),
              "clip_sim_image": cosine(img[1:], img[:1])}
    if dino is not None:
        d = dino.encode_image(F.interpolate(x, size=(dino.image_size, dino.image_size), mode="nearest"))
        scores["dinov2_sim"] = cosine(d[1:], d[:1])
    scores = {k: v.double().cpu().numpy() for k, v in scores.items()}
    return scores | {"ssim": np.array([ssim(images[0], im) for im in images[1:]])}


# ------------------------------------------------------------------------------------------------------------
# Scores on pixels: frames (F, H, W, 3) uint8, or float in [0, 1]
# ------------------------------------------------------------------------------------------------------------

def strips(first, second, mask=None, overlap=0, rows=256):
    """Two clips (F, H, W, 3) and, or None, a mask (F, H, W) part by part: `rows` of a frame and `overlap`
    more. A 4K clip in float64 does not fit into memory."""
    for i, (a, b) in enumerate(zip(first, second)):
        for top in range(0, len(a) - overlap, rows):
            part = slice(top, top + rows + overlap)
            yield a[part], b[part], None if mask is None else mask[i][part]


def unit(x):
    """Pixels as float64 in [0, 1]."""
    x = np.asarray(x)
    return x / 255.0 if x.dtype == np.uint8 else x.astype(np.float64)


def ssim(first, second, mask=None):
    """Structural similarity of (..., H, W, 3) twice, the mean over R, G, B and all full 7x7 windows, or those
    whose centre is in mask (..., H, W): -1 to 1, up, 1 for equal images; NaN for no windows.

    Wang et al. 2004, as scikit-image has it by default: flat window, sample covariance (48ths, not 49ths),
    constants 0.01^2 and 0.03^2.
    """
    if min(first.shape[-3:-1]) < 7:
        raise UserError(f"SSIM: {first.shape[-3]}x{first.shape[-2]} pixels; its window needs at least 7x7")

    def mean(x):                                                        # over the window, valid part
        return uniform_filter(x, size=(7, 7, 1))[3:-3, 3:-3]
    total, count = 0.0, 0
    for a, b, inside in strips(*as_clips(first, second, mask), overlap=6):
        a, b = unit(a), unit(b)
        ma, mb = mean(a), mean(b)
        va, vb, cov = (49 / 48 * (mean(xy) - mx * my)
                       for xy, mx, my in ((a * a, ma, ma), (b * b, mb, mb), (a * b, ma, mb)))
        alike = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
        windows = alike / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))       # (h - 6, W - 6, 3)
        windows = windows if inside is None else windows[inside[3:-3, 3:-3]]
        total, count = total + windows.sum(), count + windows.size
    return float(total / count) if count else math.nan


def psnr(first, second, mask=None):
    """Decibels, up; over the pixels where mask (..., H, W) is true; 100 stands for equal or no pixels."""
    total, count = 0.0, 0
    for a, b, inside in strips(*as_clips(first, second, mask)):
        error = (unit(a) - unit(b)) ** 2
        error = error if inside is None else error[inside]
        total, count = total + error.sum(), count + error.size
    return float(-10 * np.log10(max(total / count, 1e-10))) if count else 100.0


def as_clips(*frames):
    """Single frames (H, W, ...) as clips of one; None stays."""
    single = len(frames[0].shape) == 3
    return [x if x is None or not single else x[None] for x in frames]


def flicker(edited, source):
    """Flicker over the source's own: 1 is as steady, above flickers, below smears; NaN for fewer than three
    frames.

    A clip's flicker is the mean distance of a frame from the mean of its two neighbours, in grey levels:
    steady motion mostly cancels. A quarter of a level is added to both, since stills have none.
    """
    def bend(frames):
        bends, x = [], deque(maxlen=3)                                  # a frame and those beside it
        for frame in frames:
            x.append(frame.astype(np.int16))
            if len(x) == 3:
                bends.append(np.abs(2 * x[1] - x[0] - x[2]).mean() / 2)
        return float(np.mean(bends)) if bends else math.nan
    return (bend(edited) + 0.25) / (bend(source) + 0.25)


def seam_score(edited, source):
    """How much more the edit changes where two windows of `edit_stream` meet (16, 28, 40, ...) than
    elsewhere: 1 is no seam; NaN for one window. Changes count relative to the source's own, so that motion
    cancels."""
    def changes(frames):                                                # (F - 1,), in [0, 1]
        return np.array([np.abs(b.astype(np.int16) - a).mean() / 255 for a, b in itertools.pairwise(frames)])
    if len(edited) <= WINDOW:
        return math.nan
    ratio = changes(edited) / np.maximum(changes(source), 1 / 255)
    joins = np.arange(WINDOW, len(edited), WINDOW - REFERENCES) - 1
    return float(ratio[joins].mean() / max(np.delete(ratio, joins).mean(), 1e-6))


def changed_region(source, edited):
    """(F, H, W) bool: where the edit changed the picture, by Otsu's threshold on the blurred difference.

    Less than 10 grey levels is no change, since compression makes that, and more than 40 always is one. An
    edit of the whole frame gives (nearly) the whole frame.
    """
    blur = 0.02 * min(source.shape[1:3])                                # pixels
    parts = [np.abs(unit(a) - unit(b)).mean(-1) for a, b, _ in strips(source, edited)]
    d = np.concatenate(parts).reshape(source.shape[:3])
    for frame in d:
        gaussian_filter(frame, blur, output=frame)
    count, edges = np.histogram(d, bins=128)
    centre = (edges[:-1] + edges[1:]) / 2
    below, total = count.cumsum()[:-1], count.sum()
    lower = (count * centre).cumsum()[:-1] / np.maximum(below, 1)
    upper = ((count * centre).sum() - lower * below) / np.maximum(total - below, 1)
    split = edges[1:-1][np.argmax(below * (total - below) * (upper - lower) ** 2)]  # most variance between
    return d > np.clip(split, 10 / 255, 40 / 255)


def preservation(source, edited, mask=None):
    """How well all outside the edit is kept: (share of area changed, PSNR outside in dB, SSIM outside).

    mask (F, H, W) bool: the true region of the edit; None derives it from the clips, which flatters a little.
    With less than 5 % of the clip outside a derived mask, or 1 % outside a true one, both are NaN: an edit of
    the whole frame has nothing to preserve.
    """
    limit, mask = (0.95, changed_region(source, edited)) if mask is None else (0.99, mask)
    if mask.mean() > limit:
        return float(mask.mean()), math.nan, math.nan
    return float(mask.mean()), psnr(source, edited, ~mask), ssim(source, edited, ~mask)


# ------------------------------------------------------------------------------------------------------------
# Where the true edit is known
# ------------------------------------------------------------------------------------------------------------

SUCCESS = ("success: inside the region that the true edit changes, at least 1 dB closer to the truth than "
           "the source and the autoencoded source are; outside it, at most 1 dB further from the source than "
           "the autoencoder's own error, on source or truth. The truth is known where the result follows "
           "from source and instruction alone")
CODED = ("autoencoded source", "autoencoded truth")                     # what a perfect editor loses


def truth_scores(source, edited, truth, mask):
    """Distance from the true edit: PSNR and SSIM inside its region, and how many dB the edit is closer to the
    truth than the untouched source is: there, and over the whole clip."""
    inside = psnr(edited, truth, mask)
    return {"psnr_truth": inside, "ssim_truth": ssim(edited, truth, mask),
            "truth_gain": inside - psnr(source, truth, mask),
            "whole_gain": psnr(edited, truth) - psnr(source, truth)}


def succeeds(gain, outside, coded):
    """Success as SUCCESS says it: 1.0 or 0.0. gain: dB nearer to the truth inside the true region than the
    source is; outside: PSNR to the source, NaN where there is no outside; coded: [(gain, outside)] of what a
    perfect editor loses, source and truth through the autoencoder, the source first.

    Without the margin, doing nothing would often succeed: the autoencoder's blur alone brings clips closer.
    """
    floor = max([0, *(g for g, _ in coded[:1] if not math.isnan(g))])
    spoiled = outside < min((o for _, o in coded), default=math.nan) - 1
    return float(gain >= floor + 1 and not spoiled)


def add_success(rows):
    """Into {name: scores} of one clip's edits: success, where the truth is known."""
    known = {name: (scores["truth_gain"], scores["psnr_outside"]) for name, scores in rows.items()
             if "truth_gain" in scores}
    for name, (gain, outside) in known.items():
        rows[name]["success"] = succeeds(gain, outside, [known[k] for k in CODED if k in known])


def against_truth(ed, z_src, source, edits, truth, mask):
    """{name: truth_scores, psnr_outside and success} of edits {name: frames}, and of CODED.

    All frames (F, H, W, 3) uint8; z_src: the source's latents; mask (F, H, W) bool: the true region.
    """
    coded = [ed.decode(z * ed.vae.scaling_factor) for z in (z_src, ed.encode(to_video(truth)))]
    edits = edits | {name: np.stack(to_u8(x)) for name, x in zip(CODED, coded)}
    rows = {name: {"psnr_outside": preservation(source, x, mask)[1]} | truth_scores(source, x, truth, mask)
            for name, x in edits.items()}
    add_success(rows)
    return rows


# ------------------------------------------------------------------------------------------------------------
# Clips: every score there is an input for
# ------------------------------------------------------------------------------------------------------------

@dataclass
class Score:
    name: str           # as tables print it
    better: str         # up, 0 or 1 (the nearer), - (neither)
    digits: int
    says: str


SCORES = {
    "viclip_out": Score("ViCLIP_out", "up", 3, "edited clip against the target caption"),
    "pick_score": Score("PickScore", "up", 2, "human preference for each frame under the target caption"),
    "clip_frame": Score("CLIPFrame", "up", 3, "frames alike; a frozen frame has 1"),
    "clip_text": Score("CLIPText", "up", 2, "frames against the target caption, x 100"),
    "clip_frame_gain": Score("CLIPFrame gain", "0", 3, "CLIPFrame minus the source's own"),
    "flicker": Score("flicker", "1", 2, "flicker over the source's own; above 1 flickers, below smears"),
    "seam": Score("seam", "1", 2, "change where windows of 16 meet, over change elsewhere"),
    "changed": Score("area changed", "-", 2, "share of the clip that the edit changed"),
    "psnr_outside": Score("PSNR outside", "up", 1, "dB, source kept outside that area; 100 is equal"),
    "ssim_outside": Score("SSIM outside", "up", 3, "structure kept outside that area"),
    "viclip_dir": Score("ViCLIP_dir", "up", 3, "held out; change of clip against captions'; untouched has 0"),
}
JUDGED = {                                              # only with --judge, see judge_edit
    "judge_follows": Score("judge: follows", "up", 2, "chance of yes: it follows the instruction"),
    "judge_preserves": Score("judge: keeps", "up", 2, "chance of yes: all else is unchanged"),
    "judge_clean": Score("judge: clean", "up", 2, "chance of yes: no artefacts, no flicker"),
}
TRUTH = {                                               # only where the true edit is known
    "psnr_truth": Score("PSNR to truth", "up", 1, "dB to the true edit inside its region"),
    "ssim_truth": Score("SSIM to truth", "up", 3, "structure of the true edit inside its region"),
    "truth_gain": Score("gain, dB", "up", 1, "PSNR to truth minus the untouched source's"),
    "whole_gain": Score("gain, whole clip", "up", 1, "the same over the whole clip"),
    "success": Score("success", "up", 2, "share of clips, see SUCCESS"),
}
ALL_SCORES = SCORES | JUDGED | TRUTH
# The judge that curation never filters by. Both models have it, and doing nothing does not win it; but its
# network also gives ViCLIP_out, so it is not fully independent of the filter.
HELD_OUT = "viclip_dir"
# of the total in `agreement_table`: the paper's four but ViCLIP_dir, equal. The filter's are in curate.py
WEIGHTS = {"viclip_out": 1, "pick_score": 1, "clip_frame": 1, "clip_text": 1}
SCORERS = {                                                             # role: hub id or directory
    "published": {"clip": "openai/clip-vit-large-patch14", "pick": "yuvalkirstain/PickScore_v1",
                  "viclip": "OpenGVLab/ViCLIP"},
    "tiny": {"clip": ROOT / "assets/tiny/clip", "viclip": ROOT / "assets/tiny/viclip"},
}
NETWORKS = {"clip": CLIP, "pick": CLIP, "viclip": ViCLIP, "judge": LlavaOneVision}


@dataclass
class Scorers:
    """The networks behind the scores; each is opened when first asked for, and kept."""
    paths: dict                 # {a key of NETWORKS: hub id or directory}
    family: str = "published"   # or tiny
    square: int = 0             # TGVE's script stretches frames to 480x480 before the networks see them
    device: str = None
    networks: dict = field(default_factory=dict)

    def __contains__(self, role):
        return role in self.paths

    def open(self, role):
        if role not in self.networks:
            device, dtype = placement(self.device)
            try:
                net = NETWORKS[role].from_pretrained(self.paths[role], device=device, dtype=dtype)
            except UserError as error:
                raise UserError(f"--{role}: {error}; or leave its scores out, --{role} none") from None
            self.networks[role] = net
        return self.networks[role]


def scorer_flags(parser):
    parser.add_argument("--scorers", choices=["auto", "tiny", "published"], default="auto",
                        help="embedded networks or the hub's; auto: for curation those that lie with the "
                        "editor, else the hub's if there is a GPU")
    for role in ("clip", "pick", "viclip"):
        parser.add_argument(f"--{role}", metavar="DIR",
                            help=f"hub id or directory of another {role} network, or none")
    parser.add_argument("--judge", metavar="DIR",
                        help=f"three scores more, by a LLaVA-OneVision: directory or hub id like {LLAVA}")


def choose_scorers(kind="auto", own=None, device=None, **paths):
    """Scorers of a family, auto, tiny or published; prints which and why.

    own: {role: directory} of those that lie with an editor, which auto then takes. paths: {role: hub id or
    directory} instead of the family's; None keeps the family's, "none" leaves that role out.
    """
    why = "as --scorers says"
    if kind == "auto":
        why = "the editor's own" if own else "by whether there is a GPU; choose with --scorers"
        kind = "tiny" if own or not torch.cuda.is_available() else "published"
    else:
        own = None
    print(f"scorers: {kind} ({why})")
    paths = (own or SCORERS[kind]) | {role: path for role, path in paths.items() if path}
    paths = {role: path for role, path in paths.items() if path != "none"}
    return Scorers(paths, kind, 480 if kind == "published" else 0, device)


@torch.no_grad()
def score_clips(clips, scorers):
    """Scores of clips, several edits of each: a list of {edit's name: {key of SCORES: float}}, with the keys
    that the inputs allow.

    clips: dicts with `edits` {name: frames} and, where known, `source` (frames, aligned with them),
    `source_caption`, `target_caption`, `instruction`, `mask` (F, H, W) of the true edit and `truth`, that
    edit, which counts if it is `known` to be the only one.
    """
    results = []
    for clip in clips:
        source, rows = clip.get("source"), {}
        for name, x in clip["edits"].items():
            rows[name] = {} if source is None else pixel_scores(source, x, clip.get("mask"))
            if clip.get("known"):
                rows[name] |= truth_scores(source, x, clip["truth"], clip["mask"])
        for role in scorers.paths:
            for name, scores in network_scores(scorers.open(role), role, clip, scorers.square).items():
                rows[name] |= scores
        add_success(rows)
        results.append(rows)
    return results


def pixel_scores(source, edited, mask=None, n_kept=8):
    """The scores that need no network; preservation on at most `n_kept` frames, evenly spaced."""
    at = np.unique(np.linspace(0, len(edited) - 1, n_kept).astype(int))
    changed, kept_psnr, kept_ssim = preservation(source[at], edited[at], None if mask is None else mask[at])
    return {"flicker": flicker(edited, source),
            "seam": seam_score(edited, source),
            "changed": changed, "psnr_outside": kept_psnr, "ssim_outside": kept_ssim}


def network_scores(net, role, clip, square=0):
    """{edit's name: scores} that one network gives the edits of a clip, whose source is encoded once."""
    source, before, target = (clip.get(key) for key in ("source", "source_caption", "target_caption"))
    rows = {name: {} for name in clip["edits"]}
    if role == "judge":
        if source is not None and clip.get("instruction"):
            for name, x in clip["edits"].items():
                chances = judge_edit(net, source, x, clip["instruction"], min(8, len(x)))
                rows[name] = {key: chances[key.removeprefix("judge_")] for key in JUDGED}
        return rows
    if not target and role != "clip":
        return rows
    if role == "viclip":
        texts = net.encode_text(net.tokenize([target, before or ""]))
    else:
        texts = net.encode_text(net.tokenizer([target or ""]))
    untouched = None if source is None else encode_clip(net, source, square)
    for name, frames in clip["edits"].items():
        x, row = untouched if frames is source else encode_clip(net, frames, square), rows[name]
        if role == "pick":
            row["pick_score"] = pick_score(x, texts[0], net.logit_scale.item())
        elif role == "viclip":
            row["viclip_out"] = viclip_out(x, texts[0])
            if source is not None and before:
                row["viclip_dir"] = viclip_dir(x, untouched, *texts)
        else:
            row["clip_frame"] = clip_frame(x)
            if source is not None:
                row["clip_frame_gain"] = row["clip_frame"] - clip_frame(untouched)
            if target:
                row["clip_text"] = clip_text(x, texts[0])
    return rows


def encode_clip(net, frames, square=0):
    """Features of frames, by ViCLIP (P,), by CLIP (F, P). square: stretch frames to this side before, 0: do
    not."""
    def squared(some):
        return (stretch(frame, square, square) if square else frame for frame in some)
    if isinstance(net, ViCLIP):
        return net.encode_video(net.preprocess(list(squared(net.choose(frames)))))[0]
    pixels, features = (net.preprocess([frame]) for frame in squared(frames)), []
    while some := list(itertools.islice(pixels, 64)):       # one frame of full size at a time
        features.append(net.encode_image(torch.cat(some)))
    return torch.cat(features)


def total_score(rows, weights=WEIGHTS, centre=None, spread=None):
    """The filter's total of N candidates: (N,) weighted mean of the scores that all of them have, less
    `centre` and divided by `spread` ({score: value}, from `curate.py calibrate`); without those, by their own
    mean and deviation."""
    keys = [key for key in weights if all(row.get(key) is not None for row in rows)]

    def values(*rows):                                                  # (N, K)
        return np.array([[row[key] for key in keys] for row in rows], float).reshape(len(rows), -1)
    x, w = values(*rows), values(weights)[0]
    centre, spread = (x.mean(0), x.std(0)) if centre is None else values(centre, spread)
    return ((x - centre) / np.maximum(spread, 1e-6)) @ w / max(w.sum(), 1e-9)


# ------------------------------------------------------------------------------------------------------------
# One clip
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Film:
    """Frames of a file or folder that are decoded anew whenever they are looked at, so that a clip of any
    length fits: to those who ask for len, shape, frames in turn, one [i] or some [indices] an array."""
    read: object                # () -> generator of all frames, (H, W, 3) uint8
    order: np.ndarray           # which of them, ascending
    size: tuple                 # (H, W)
    tick: float = 1             # of its times, in seconds

    @property
    def shape(self):
        return len(self.order), *self.size, 3

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        frames, order = enumerate(self.read()), iter(self.order.tolist())
        wanted = next(order, None)
        for k, frame in frames:
            while k == wanted:
                yield frame
                wanted = next(order, None)
            if wanted is None:
                return

    def __array__(self, dtype=None, copy=None):
        return np.stack(list(self)).astype(dtype or np.uint8)

    def __getitem__(self, key):
        order = self.order[key]
        film = replace(self, order=np.atleast_1d(order))
        return film if np.ndim(order) else next(iter(film))


def load_frames(path):
    """A video file or a folder of numbered frames -> (Film, times (F,) in seconds; None of a folder)."""
    clip = probe(path)
    plan(clip)                                                          # refuses a file that is cut short
    n = sum(1 for _ in read_frames(clip))                               # that can be decoded
    film = Film(lambda: (rgb for _, rgb in read_frames(clip)), np.arange(n), (clip.height, clip.width),
                float(clip.tick))
    return film, None if clip.path.is_dir() else np.array([float(t * clip.tick) for t in clip.times[:n]])


def align(source, edited, source_times=None, edited_times=None, start=0, tick=1):
    """Source and edit as clips of one length and size: (source, edited, notes on what was done).

    The edit begins `start` seconds into the source. Frames are paired one to one where their times in seconds
    agree, or there are none (None, of folders), or as many as from `start` on; else every frame of the edit
    meets what `shown` gives for its time, as --fps of sample.py made it, until the source ends. tick: the
    source's, in seconds.
    """
    notes, (height, width) = [], source.shape[1:3]
    if start and source_times is None:
        raise UserError(f"--start {start:g}: the source is a folder of frames, which have no times")
    first = np.searchsorted(source_times, start - 1e-6) if start else 0
    found = f"source has {len(source) - first} frames, edit {len(edited)}"
    n, paired = min(len(source) - first, len(edited)), "the first"
    rest, times = (None if t is None else t - t[0] for t in (
        source_times if source_times is None else source_times[first:], edited_times))
    if len(source) - first == len(edited) or rest is None or times is None or (
            n == len(edited) and np.allclose(rest[:n], times, atol=0.002)):
        source, edited = source[first:first + n], edited[:n]
    else:
        end = source_times[-1] + np.median(np.diff(source_times)) if len(source) > 1 else math.inf
        moments = start + times[start + times < end - 0.002]
        at = list(shown(zip(source_times / float(tick), itertools.count()), float(tick), moments))
        source, edited, paired = source[at], edited[:len(at)], "those shown at the same times,"
    if found != f"source has {len(source)} frames, edit {len(source)}":
        notes.append(f"{found}: {paired} {len(source)} of both are scored")
    if edited.shape[1:3] == (height + height % 2, width + width % 2):   # mp4 shows an odd last row twice
        edited = mapped(edited, lambda frame: frame[:height, :width], source.shape[1:3])
    if edited.shape[1:3] != (height, width):
        old = f"{edited.shape[2]}x{edited.shape[1]}"
        notes.append(f"edit stretched from {old} to the source's {width}x{height}")
        edited = mapped(edited, lambda frame: stretch(frame, width, height), source.shape[1:3])
    return source, edited, notes


def mapped(frames, change, size):
    """Frames, each of them changed to a `size`."""
    return Film(lambda: map(change, frames), np.arange(len(frames)), size)


def main_clip(argv):
    parser = Parser(prog="metrics.py", description="Scores of one edited clip; for the rest see "
                    "`metrics.py tgve|shapes|footage|study|votes --help`.")
    add = parser.add_argument
    add("edited", help="video file or folder of frames")
    add("--source", help="the clip it was made from")
    add("--start", type=between(0, 1e6), default=0, help="seconds of the source at which the edit begins")
    add("--instruction", default="", help="what was asked for; --judge needs it")
    add("--source-caption", default="", help="what the source shows")
    add("--target-caption", default="", help="what the edit should show")
    add("--device", type=known_device, help="cuda, mps or cpu (default: the best there is)")
    scorer_flags(parser)
    args = parser.parse_args(argv)
    if args.start and not args.source:
        raise UserError(f"--start {args.start:g}: is a time of --source, which lacks")
    edited, times = load_frames(args.edited)
    clip = {key: getattr(args, key).strip() for key in ("instruction", "source_caption", "target_caption")}
    notes = []
    if args.source:
        source, source_times = load_frames(args.source)
        clip["source"], edited, notes = align(source, edited, source_times, times, args.start,
                                               source.tick)
    [rows] = score_clips([clip | {"edits": {"edit": edited}}], scorers_of(args))
    found = {key: x for key, x in rows["edit"].items() if math.isfinite(x)}
    print(*notes, f"{args.edited}: {len(edited)} frames", sep="\n")
    for key, score in ALL_SCORES.items():
        if key in found:
            print(f"{score.name:<15}{found[key]:>8.{score.digits}f}   better: {score.better:<5}{score.says}")
    lacks = [score.name for key, score in SCORES.items() if key not in found]
    print(f"no score, for lack of inputs, networks or frames: {', '.join(lacks)}" if lacks else "")


def scorers_of(args):
    return choose_scorers(args.scorers, None, args.device, **{role: getattr(args, role) for role in NETWORKS})


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: TGVE (Wu et al. 2023) and TGVE+ (Singer et al. 2024)
# ------------------------------------------------------------------------------------------------------------

TGVE_COLUMNS = {"Style Change Caption": "style", "Object Change Caption": "object",
                "Background Change Caption": "background", "Multiple Changes Caption": "multiple"}
SETS = {"davis": "DAVIS_480p", "youtube": "youtube_480p", "videvo": "videvo_480p"}


def benchmark_item(folder, subset, video, task, source_caption, target_caption, instruction):
    """One line of a benchmark: an id, which is also the folder of its edit, and where the source is."""
    path = folder / subset / "480p_frames" / video
    path = path if path.is_dir() else folder / subset / "480p_videos" / f"{video}.mp4"
    return dict(id=f"{subset}/{video}/{task}", task=task, path=path, source_caption=source_caption,
                target_caption=target_caption, instruction=instruction)


def read_tgve(folder, prompts=None):
    """LOVEU-TGVE-2023 as published: a CSV with section rows ("DAVIS Videos:") and blank ones, three folders.

    prompts: InsV2V's JSON {video: {"edit_style": instruction, …}}, by default the one in the folder; without
    it items have no instruction and can only be scored. Returns items of `benchmark_item`, four per video.
    """
    file = min(folder.glob("*.csv"), default=folder / "LOVEU-TGVE-2023_Dataset.csv")
    prompts = prompts or min(folder.glob("*prompt*.json"), default=None)
    asked, items, subset = read_json(prompts) if prompts else {}, [], None
    with reading(file, "is it TGVE's CSV, as UTF-8?"), open(file, encoding="utf-8-sig", newline="") as f:
        for row in csv.DictReader(f, restval=""):
            name = row["Video name"].strip()
            if name.endswith("Videos:"):
                subset = SETS.get(name.split()[0].lower(), name.split()[0])
            elif name:
                need(subset, f"{name} comes before any section row such as 'DAVIS Videos:'")
                for column, task in TGVE_COLUMNS.items():
                    with reading(prompts, 'needs {video: {"edit_style": instruction, ...}}'):
                        instruction = asked.get(name, {}).get(f"edit_{task}", "").strip()
                    items.append(benchmark_item(folder, subset, name, task, row["Our GT caption"].strip(),
                                                row[column].strip(), instruction))
    return items


PLUS_COLUMNS = {            # what a column of TGVE+'s parquet may be called
    "instruction": ("instruction", "edit_prompt"), "task": ("task", "type"),
    "video": ("video", "path", "file"),
    "source": ("input_caption", "source_caption", "original_caption", "original_prompt", "input"),
    "target": ("output_caption", "target_caption", "edited_caption", "edited_prompt", "output")}


def read_tgve_plus(folder):
    """TGVE+ (facebook/tgve_plus): one parquet beside TGVE's video folders, its columns found by name."""
    file = min(folder.rglob("*.parquet"), default=folder / "facebook/tgve_plus's parquet")
    items, names, count = [], {}, Counter()
    with reading(file, "is it facebook/tgve_plus's? reading it takes pyarrow (pip install pyarrow)"):
        import pyarrow.parquet
        rows = pyarrow.parquet.read_table(file).to_pylist()
        for key, words in PLUS_COLUMNS.items():
            found = [name for word in words for name in rows[0] if word in name.lower().replace(" ", "_")]
            need(found, f"no column for the {key}; it has {', '.join(rows[0])}")
            names[key] = found[0]
        for row in rows:
            row = {key: row[name] or "" for key, name in names.items()}
            path, task = Path(row["video"]), re.sub(r"\W+", "_", row["task"].lower())
            count[path, task] += 1                                      # may come several times a video
            n = count[path, task]
            item = benchmark_item(folder, path.parts[0], path.stem, task if n == 1 else f"{task}-{n}",
                                  row["source"], row["target"], row["instruction"])
            items.append(item | {"task": task})
    return items


def thin(frames, n=32):
    """At most n frames, every (len // n)-th, as InsV2V does on TGVE."""
    return frames[::max(1, len(frames) // n)][:n]


def read_source(item):
    frames = load_frames(item["path"])[0]
    return {"source": thin(frames), "length": len(frames)}


def readable(items, read):
    """Yields every item with what read(item) gives; says which cannot be read."""
    for item in items:
        try:
            yield item | read(item)
        except UserError as error:
            tqdm.write(f"left out: {item['id']}: {error}", sys.stdout)


def edit_and_score(items, read, ed, rows, scorers, out, made_by, edits_at=None):
    """Every item's edit in every row as <out>/<row>/<id>/00000.jpg, …, the submission layout, and its scores
    in <out>/scores/<id>.json. Folders appear whole, and edits that are there are kept; scores are taken anew
    where scorers or edits are others.

    read(item) -> {"source": frames, where it is known "truth" and "mask"}; rows: {name: options of
    `edit_pictures`}, the first the one that matters; made_by: the settings that edits depend on. edits_at: a
    folder of edits, so that none is made. Returns {id: {row: scores}} and says what it leaves out.
    """
    done, networks = {}, [path for path in scorers.paths.values() if Path(path).is_dir()]
    for role in scorers.paths:
        scorers.open(role)
    for clip in readable(tqdm(items, desc=out.name, unit="clip"), read):
        begin(out, made_by)
        file = out / f"scores/{clip['id']}.json"
        places = {row: (edits_at or out / row) / clip["id"] for row in rows}
        try:
            for row, place in places.items():
                if ed and not place.is_dir():
                    write_frames(place, edit_clip(ed, rows[row], clip), ".png" if "truth" in clip else ".jpg")
            edits = {row: load_frames(place)[0] for row, place in places.items()}
            made_of = f"{scorers.paths} {fingerprint(*networks, *places.values())}"
            known = read_json(file) if file.is_file() else {}
            if known.get("made_of") != made_of:
                known = {"made_of": made_of, "scores": score_edits(ed, clip, edits, scorers)}
                write_json(file, known)
            done[clip["id"]] = known["scores"]
        except UserError as error:
            tqdm.write(f"left out: {clip['id']}: {error}", sys.stdout)
    print(f"{len(done)} of {len(items)} clips scored")
    if not done:
        raise UserError(f"{out}: no clip could be scored")
    return done


def edit_clip(ed, options, clip):
    """Generator of the edited frames of a clip, as `sample.py` delivers them."""
    small = model_size(*clip["source"].shape[1:3], ed.size, ed.multiple)
    options = options | {"seed": options["seed"] + clip.get("number", 0)}
    for rgb, *_ in edit_pictures(ed, clip["source"], small, clip["instruction"], **options):
        yield rgb


def write_frames(folder, frames, ending):
    """A folder of pictures that is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for i, rgb in enumerate(frames):
        Image.fromarray(rgb).save(part / f"{i:05d}{ending}", quality=95)
    part.rename(folder)


def score_edits(ed, clip, edits, scorers):
    """{row: scores} of edits {row: frames}, of CODED where the truth is there, and of two controls, all of
    one length."""
    for row, edited in edits.items():
        if len(edited) == clip.get("length"):                           # of all of the source's frames
            edited = thin(edited)
        _, edits[row], notes = align(clip["source"], edited)
        for note in notes:
            tqdm.write(f"{clip['id']}: {row}: {note}", sys.stdout)
    n, first = min(map(len, edits.values())), next(iter(edits.values()))[:1]
    clip |= {key: clip[key][:n] for key in ("source", "truth", "mask") if key in clip}
    if "truth" in clip:
        for row, frames in zip(CODED, (clip["source"], clip["truth"])):
            coded = ed.decode(ed.encode(to_video(frames)) * ed.vae.scaling_factor)
            edits[row] = np.stack(to_u8(coded))
    edits = {row: x[:n] for row, x in edits.items()}
    edits |= {"untouched source": clip["source"], "frozen first edit": first[np.zeros(n, int)]}
    [rows] = score_clips([clip | {"edits": edits}], scorers)
    return {row: {key: x for key, x in scores.items() if math.isfinite(x)} for row, scores in rows.items()}


# the columns of all benchmarks; those in which no clip has a score are left out
COLUMNS = ("viclip_out", "pick_score", "clip_frame", "clip_text", "clip_frame_gain", "flicker",
           "psnr_outside", "ssim_outside", "psnr_truth", "ssim_truth", "truth_gain", "success",
           *JUDGED, HELD_OUT)
IN_PAPER = ("viclip_out", "viclip_dir", "pick_score", "clip_frame", "clip_text")
PAPER = {                   # arXiv 2503.17641, Table 1; some rows lack the last score
    "tgve": """Tune-A-Video  .243 .162 20.36 .924 27.12
               STDF          .226 .110 20.40 .933 26.34
               Fairy         .208 .164 19.80 .933
               TokenFlow     .257 .117 20.58 .943 25.41
               AnyV2V        .230 .141 19.70 .919 24.03
               InsV2V        .262 .208 20.76 .911 25.56
               EVE           .262 .221 20.76 .922
               InstructVEdit .280 .237 20.92 .919 27.69""",
    "tgve_plus": """Tune-A-Video  .242 .131 20.47 .933 25.59
                    STDF          .227 .093 20.60 .933 25.70
                    Fairy         .197 .140 19.81 .933
                    TokenFlow     .254 .085 20.62 .944 24.96
                    AnyV2V        .227 .109 19.80 .919 23.52
                    InsV2V        .236 .174 20.37 .925 25.36
                    EVE           .251 .198 20.88 .926
                    InstructVEdit .271 .183 20.94 .917 26.65"""}


def interval(values, groups):
    """95 % bootstrap interval of a mean (scipy, percentile, 2,000 resamples, fixed seed). groups: a name for
    each value; those of one name, such as edits of one video, are not independent and are drawn together."""
    _, place = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)

    def mean(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)
    found = scipy.stats.bootstrap((sums, counts), mean, n_resamples=2000, method="percentile", paired=True,
                                  vectorized=True, rng=np.random.default_rng(0))
    return found.confidence_interval


def cell(values, digits, groups=None, sign=""):
    """A mean and, where there are groups for it, its `interval`."""
    if not len(values):
        return "-"
    shown = f"{np.mean(values):{sign}.{digits}f}"
    if groups is None or len(set(groups)) < 2:
        return shown
    low, high = interval(values, groups)
    return f"{shown} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def table_head(name, columns):
    names = [ALL_SCORES[key].name + " (held out)" * (key == HELD_OUT) for key in columns]
    return f"| {name} | n | {' | '.join(names)} |\n{'|---' * (len(columns) + 2)}|"


def table_row(name, rows, columns, groups=None, sign=""):
    """One Markdown row of means over clips [{score: value}], which says over how many where some lack a
    score. groups: a name for each clip, for an `interval`."""
    cells = []
    for key in columns:
        has = [i for i, row in enumerate(rows) if math.isfinite(row.get(key, math.nan))]
        shown = cell([rows[i][key] for i in has], ALL_SCORES[key].digits,
                     groups and [groups[i] for i in has], sign)
        cells.append(f"{shown} (n={len(has)})" if 0 < len(has) < len(rows) else shown)
    return f"| {name} | {len(rows)} | {' | '.join(cells)} |"


def rows_by(key, clips, columns):
    """A row of each task, or each domain, of the clips [{score: value, key: ...}]."""
    return [table_row(value, [clip for clip in clips if clip.get(key) == value], columns)
            for value in dict.fromkeys(clip[key] for clip in clips if key in clip)]


def table(items, done, title, paper=""):
    """A benchmark as Markdown lines: its first row by task and domain, the other rows, the gains on them, the
    paper's. done: {id: {row: scores}}; paper: lines of a name and the scores IN_PAPER."""
    found = {key for clip in done.values() for scores in clip.values() for key in scores}
    columns, items = [key for key in COLUMNS if key in found], [item for item in items if item["id"] in done]
    videos = [item["id"].rsplit("/", 1)[0] for item in items]           # edits of one are not independent
    (main, ours), *others = [(row, [clip[row] for clip in done.values()]) for row in done[items[0]["id"]]]
    clips = [item | scores for item, scores in zip(items, ours)]
    lines = [table_head(title, columns), table_row(f"{main} [95 %]", ours, columns, videos),
             *rows_by("task", clips, columns), *rows_by("domain", clips, columns)]
    lines += [table_row(row, scores, columns) for row, scores in others]
    for row, scores in others:                                          # paired: clip by clip
        gains = [{key: a[key] - b[key] for key in a.keys() & b.keys()} for a, b in zip(ours, scores)]
        lines.append(table_row(f"{main} − {row} [95 %]", gains, columns, videos, "+"))
    for line in paper.splitlines():
        name, *numbers = line.split()
        row = table_row(name, [dict(zip(IN_PAPER, map(float, numbers)))], columns)
        lines.append(row.replace(" | 1 |", ", copied from the paper | |", 1))
    return lines


def report(lines, ed, scorers, out):
    """Print a benchmark's lines, and write them beside its scores."""
    about = scorers.paths | read_json(out / "settings.json")
    lines += [*(filtered_by(ed) if ed else ()), *(f"{key}: {value}" for key, value in about.items())]
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print(*lines, f"table and every clip's scores: {out}", sep="\n")


def folder(text):
    """The type of a flag that names a folder."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return Path(text)


def benchmark_flags(parser):
    editor_flags(parser)
    scorer_flags(parser)
    add = parser.add_argument
    add("--no-image-control", action="store_true", help="leave out the controls: the image editor frame by "
        "frame and, of drawn clips, the edit without detail")
    add("--out", type=Path, help="folder of edits, scores and table (default: results/…)")
    add("--device", type=known_device, help="cuda, mps or cpu (default: the best there is)")


def open_editor(args):
    """(editor, {name: options of `edit_pictures`} of a table's rows, settings that edits depend on) as the
    flags say."""
    source, why = choose_model(args.model, args.weights, args.device)
    print(f"model: {source} ({why})")
    ed = VideoEditor.from_pretrained(source, device=args.device)
    ed.size, options = settings(args, ed)
    options |= {"mode": "auto", "detail": not args.no_detail}
    rows = {"edit": options}
    if not args.no_image_control:
        rows["image editor, frame by frame"] = options | {"mode": "image"}
    return ed, rows, {"editor": ed.fingerprint, "size": ed.size} | options


def results(what, name, made_by):
    """Where the results of a benchmark go, by the settings that they depend on."""
    digits = zlib.crc32(json.dumps(made_by, sort_keys=True).encode())
    return ROOT / f"results/{what}/{Path(name).name}-{digits:08x}"


def filtered_by(ed):
    """A line for every judge that chose what an editor was trained on, as the settings.json of its data sets
    say."""
    lines, path = [], ed.folders[0] / "settings.json"
    folders = read_json(path).get("train_on", ()) if path.is_file() else ()
    for path in (ROOT / folder / "settings.json" for folder in folders):
        judge = read_json(path).get("judge") if path.is_file() else None
        if judge:
            lines.append(f"judge: {judge} chose the clips of {path.parent}, so it flatters this model")
    return lines


def main_tgve(argv):
    parser = Parser(prog="metrics.py tgve", description="Run and score TGVE or TGVE+; prints one table.")
    add = parser.add_argument
    add("dir", type=folder, help="LOVEU-TGVE-2023 as published: CSV, video folders, InsV2V's prompt JSON")
    add("--plus", action="store_true", help="TGVE+: DIR also holds facebook/tgve_plus")
    add("--prompts", type=Path, help="InsV2V's prompt JSON (default: *prompt*.json in DIR)")
    add("--outputs", type=folder, help="score these edits, <set>/<video>/<task>/00000.jpg, and edit nothing")
    add("--limit", type=between(1, None, int, -1), default=-1, help="only the first N clips (-1: all)")
    benchmark_flags(parser)
    args = parser.parse_args(argv)
    what = "tgve_plus" if args.plus else "tgve"
    items = read_tgve_plus(args.dir) if args.plus else read_tgve(args.dir, args.prompts)
    made_by = {"texts": zlib.crc32(json.dumps([item | {"path": ""} for item in items]).encode())}
    items, scorers = items[:args.limit if args.limit > 0 else None], scorers_of(args)
    if args.outputs:
        name, ed, rows = args.outputs.name, None, {"edit": {}}
        made_by["outputs"] = str(args.outputs.resolve())
    else:
        ed, rows, editor = open_editor(args)
        name, made_by = ed.name, made_by | editor
        items = [item for item in items if item["instruction"]]
        print(f"{len(items)} clips have an instruction in the prompts")
    out = args.out or results(what, name, made_by)
    done = edit_and_score(items, read_source, ed, rows, scorers, out, made_by, args.outputs)
    report([*table(items, done, out.name, PAPER[what]), ""], ed, scorers, out)


# ------------------------------------------------------------------------------------------------------------
# The same protocol where the true edit is known: drawn clips, and exact effects on real ones
# ------------------------------------------------------------------------------------------------------------

def drawn_item(number, task, domain, t0=0):
    """A held-out scene of the drawn world and an edit of it; None where the task does not fit the scene.

    Scenes, wordings and combinations are of the world's "held" split. t0: seconds into the scene at which the
    clip begins. `known`: the result follows from source and instruction alone, so there is one true edit.
    """
    scene = world.draw_scene(number, domain, "held")
    if task not in world.possible_tasks(scene):
        return None
    edit = world.propose_edit(scene, number, task, "held")
    return vars(edit) | dict(id=f"{domain}/{number}/{task}", domain=domain, number=number, t0=t0, scene=scene,
                             known=edit.deterministic)


def drawn_items(n, which, domains):
    """n held-out clips, tasks and domains in turn; more of them begin with the same ones. Their seeds no
    other script uses."""
    items, tasks, numbers = [], list(world.TASKS), itertools.count(7_000_001 + 100_000 * which)
    for turn, at in (divmod(k, len(tasks)) for k in range(n)):
        domain = domains[(at + turn) % len(domains)]
        items.append(next(filter(None, (drawn_item(number, tasks[at], domain) for number in numbers))))
    return items


def draw(item, n_frames, size):
    """An item's source and true edit, (F, S, S, 3) uint8, and the true region (F, S, S) bool."""
    source, truth = (world.quantise(world.render(scene, n_frames, size, size, t0=item["t0"]))
                     for scene in (item["scene"], item["target"]))
    return {"source": source, "truth": truth, "mask": world.true_region(source, truth, item["is_global"])}


@torch.no_grad()
def drawn_scores(ed, n, domain, n_frames, mode="auto", **guidance):
    """[{"id", "task", "domain", scores against the truth, "flicker"}] of the editor's own frames, nothing
    else done to them.

    Of n held-out drawn clips a task, those whose truth is known. guidance: as `VideoEditor.edit` takes it.
    """
    rows, mode = [], "image" if n_frames == 1 else mode
    for task in world.TASKS:
        fitting = filter(None, (drawn_item(k, task, domain, k % 4) for k in itertools.count(1)))
        for item in itertools.islice(fitting, n):
            source, truth, mask = draw(item, n_frames, ed.size).values()
            if item["known"] and mask.any():
                video = to_video(source)
                edited = ed.edit(video, item["instruction"], seed=item["number"], mode=mode, **guidance)
                edited = np.stack(to_u8(edited))
                scores = against_truth(ed, ed.encode(video), source, {"edit": edited}, truth, mask)["edit"]
                rows.append({key: item[key] for key in ("id", "task", "domain")} | scores |
                            {"flicker": flicker(edited, source)})
    return rows


def agreement_table(done, candidates):
    """Markdown lines: Spearman's correlation of every score and of the total with the PSNR gain to the truth.

    Within a clip: over its candidates, then the mean over clips (which candidate is best?); pooled: over all
    candidates of all clips (which should go?). Scores with an ideal of 0 or 1 count by the distance from it.
    """
    known = [rows for rows in done.values() if "truth_gain" in rows[candidates[0]]]
    if not known or len(candidates) < 3:
        return ["agreement: needs clips with a known truth and at least 3 candidates of each"]

    def scores_of(key):                                                 # (clips, candidates)
        return np.array([[rows[c].get(key, math.nan) for c in candidates] for rows in known])
    columns = {}
    for key, score in SCORES.items():
        if score.better in ("0", "1"):
            columns[f"{score.name} (distance from {score.better})"] = -abs(scores_of(key) - int(score.better))
        elif score.better == "up":
            columns[score.name] = scores_of(key)
    total = total_score([rows[c] for rows in known for c in candidates])
    columns["weighted total"] = total.reshape(len(known), -1)
    lines = ["| score | clips | inside, within a clip [95 %] | inside, pooled | whole, within a clip [95 %] "
             "| whole, pooled |", "|---|---|---|---|---|---|"]
    for name, x in columns.items():
        full = np.isfinite(x).all(1) & (np.ptp(x, axis=1) > 1e-9)       # clips that this score tells apart
        cells = [str(full.sum())]
        for gain in ("truth_gain", "whole_gain"):                       # inside the true region, overall
            y = scores_of(gain)
            each = [spearman(a, b) for a, b in zip(x[full], y[full])]
            each = [r for r in each if math.isfinite(r)]
            cells += [cell(each, 2, range(len(each))), f"{spearman(x[full].ravel(), y[full].ravel()):.2f}"]
        if full.any():
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, f"{len(candidates)} candidates of each clip; preservation is outside the true region"]


def spearman(x, y):
    """Rank correlation; NaN where one side is empty or constant."""
    varied = all(len(a) and np.ptp(a) > 1e-9 for a in (x, y))
    return float(scipy.stats.spearmanr(x, y).statistic) if varied else math.nan


def main_shapes(argv):
    parser = Parser(prog="metrics.py shapes",
                    description="Regression test for quality: held-out drawn clips whose true edit is known.")
    add = parser.add_argument
    add("--n", type=between(1, 10 ** 5, int),
        help="clips (default: 200; with --sweep, --agreement or, of each task, --bare: 24)")
    add("--frames", type=between(1, 10 ** 4, int), default=8, help="frames of a clip")
    add("--domain", default="both", choices=["both", "synthetic", "real"], help="of scenes")
    add("--clips", type=between(0, 10 ** 6, int), default=0, help="which clips: another number draws others")
    add("--sweep", action="store_true", help="guidance grid: fidelity against preservation")
    add("--agreement", action="store_true", help="grid with two seeds: which scores agree with the truth?")
    add("--grid-text", type=between(0, 30), nargs="+", help="text guidance of the grid")
    add("--grid-source", type=between(0, 10), nargs="+", help="source guidance of the grid")
    add("--bare", action="store_true", help="the model's own frames against the truth, as train.py has it")
    benchmark_flags(parser)
    args = parser.parse_args(argv)
    grid = args.sweep or args.agreement
    domains = ["synthetic", "real"] if args.domain == "both" else [args.domain]
    n = args.n or (24 if grid or args.bare else 200)
    ed, rows, made_by = open_editor(args)
    options = rows["edit"]
    if ed.size % ed.multiple:
        raise UserError(f"--size {ed.size}: drawn clips need a multiple of {ed.multiple}")
    if args.bare:
        guidance = {key: options[key] for key in ("steps", "s_txt", "s_src")}
        return print_bare(ed, n, domains, args.frames, guidance)
    made_by |= {"world": fingerprint(world.__file__), "frames": args.frames}
    if grid:
        rows = guidance_grid(options, args.grid_text, args.grid_source, seeds=1 + args.agreement)
    elif options["detail"] and not args.no_image_control:
        rows["without detail"] = options | {"detail": False}
    items, scorers = drawn_items(n, args.clips, domains), scorers_of(args)
    out = args.out or results("sweep" if grid else "shapes", ed.name, made_by)
    for how in rows.values():
        how["seed"] *= 1_000_003                                        # to which a clip's number is added
    read = partial(draw, n_frames=args.frames, size=ed.size)
    done = edit_and_score(items, read, ed, rows, scorers, out, made_by)
    lines = [*table(items, done, out.name), "", SUCCESS]
    if args.agreement:
        lines += ["", "Spearman's correlation with the gain in PSNR to the truth", "",
                  *agreement_table(done, list(rows))]
    report(lines, ed, scorers, out)


def print_bare(ed, n, domains, n_frames, guidance):
    """`drawn_scores` as Markdown, by domain and task."""
    columns = ("success", "truth_gain", "psnr_truth", "psnr_outside", "flicker")
    print(table_head("held out, the model's own frames", columns))
    for domain in domains:
        clips = drawn_scores(ed, n, domain, n_frames, **guidance)
        print(table_row(f"{domain} [95 %]", clips, columns, range(len(clips))),
              *rows_by("task", clips, columns), sep="\n")


def guidance_grid(options, texts, sources, seeds):
    """{"text, source, seed": options} of every guidance, by default around the editor's own."""
    texts = texts or [round(options["s_txt"] * f, 2) for f in (2 / 3, 1, 1.5, 2.5)]
    sources = sources or [round(options["s_src"] * f, 2) for f in (0.8, 1, 1.3)]
    seeds = range(options["seed"], options["seed"] + seeds)
    return {f"{s_txt:g}, {s_src:g}, {seed}": options | {"s_txt": s_txt, "s_src": s_src, "seed": seed}
            for s_src, s_txt, seed in itertools.product(sources, texts, seeds)}


def main_footage(argv):
    parser = Parser(prog="metrics.py footage", description="Real clips: grayscale, sepia and night against "
                    "the exact operation, and no instruction at all against the source.")
    parser.add_argument("dir", type=folder, help="videos, or folders of frames")
    parser.add_argument("--frames", type=between(1, 10 ** 4, int), default=8, help="frames of a clip")
    benchmark_flags(parser)
    args = parser.parse_args(argv)
    ed, rows, made_by = open_editor(args)
    scorers, clips = scorers_of(args), find_clips(args.dir)
    items = [dict(id=f"{name}/{task or 'nothing'}", task=task or "nothing", path=path, known=bool(task),
                  instruction=f"make it {task}" if task else "")
             for name, path in clips.items() for task in ("", "grayscale", "sepia", "night")]

    def read(item):                                                     # as `draw`
        source = read_video(item["path"], ed.size, frames=args.frames, multiple=ed.multiple)[0]
        source = truth = np.stack(to_u8(source))
        if item["known"]:                                               # else all is outside the edit
            truth = world.quantise(world.EFFECTS[item["task"]](source / 255, np.arange(len(source)) / 10, 0))
        return {"source": source, "truth": truth, "mask": np.full(source.shape[:3], item["known"])}
    made_by |= {"clips": fingerprint(*clips.values()), "frames": args.frames}
    out = args.out or results("footage", ed.name, made_by)
    done = edit_and_score(items, read, ed, rows, scorers, out, made_by)
    report([*table(items, done, out.name), "", SUCCESS], ed, scorers, out)


# ------------------------------------------------------------------------------------------------------------
# User study, as in the paper: two edits side by side, three questions
# ------------------------------------------------------------------------------------------------------------

QUESTIONS = {"text": "Which video follows the caption better?",
             "structure": "Which keeps the source's structure better?", "quality": "Which looks better?"}
RATINGS = {"text": "How well does it follow the caption? (1 not at all, 5 fully)",
           "structure": "How well does it keep the source?", "quality": "How good does it look?"}


def find_clips(where):
    """{name: video file or folder of frames} of everything below a folder: edited/cat.mp4 -> "cat"."""
    found = {}
    for path in sorted(where.rglob("*.*")):
        place = path.relative_to(where)
        if any(part.startswith(".") for part in place.parts):
            continue
        if path.suffix.lower() in VIDEOS or path.name in ("source.png", "target.png"):      # of a data set
            found[str(place.with_suffix(""))] = path
        elif path.suffix.lower() in IMAGES and path.parent != where:
            found.setdefault(str(place.parent), path.parent)
    return found


def data_url(path, fps):
    """A clip as a data: URL of a film that all browsers play, H.264 in mp4."""
    with tempfile.TemporaryDirectory() as place:
        clip, film = probe(path, fps), Path(place) / "clip.mp4"
        _, tick, lengths = plan(clip)
        with video_writer(film, clip.width, clip.height, clip.rate, tick, clip.pixel) as write:
            for (ticks, rgb), length in zip(read_frames(clip), lengths):
                write(rgb, ticks, length)
        return f"data:video/mp4;base64,{base64.b64encode(film.read_bytes()).decode()}"


def main_study(argv):
    parser = Parser(prog="metrics.py study",
                    description="One HTML page that asks which of two edits is better, or how good one is.")
    add = parser.add_argument
    add("dirs", nargs="+", type=folder, metavar="DIR",
        help="edits A, edits B [sources]; with --rate: edits [sources]; paired by name")
    add("--captions", type=Path, help="JSON {clip's name: caption} (default: captions.json in the first DIR)")
    add("--rate", action="store_true", help="1 to 5 for one edit, to calibrate the filter")
    add("--out", type=Path, default=Path("study.html"), help="page to write")
    args = parser.parse_args(argv)
    keys = ["a", "source"] if args.rate else ["a", "b", "source"]
    n = len(keys) - 1
    if not n <= len(args.dirs) <= n + 1:
        raise UserError(f"study: {len(args.dirs)} folders; it takes {n} of edits, then one of sources")
    clips, captions = [find_clips(where) for where in args.dirs], {}
    rows = [row for path in args.dirs[0].glob("*/candidates.json") for row in read_json(path, list)]
    if args.rate and rows:
        with reading(args.dirs[0], "is it a data set of curate.py?"):
            captions = {f"{row['id']}/target": row["instruction"] for row in rows if row["kept"]}
            clips = [{name: clips[0][name.replace("target", key)] for name in captions}
                     for key in ("target", "source")]
    file = args.captions or args.dirs[0] / "captions.json"
    if args.captions or file.is_file():
        captions = read_json(file)
    names, alone = set(clips[0]) & set(clips[n - 1]), set(clips[0]) ^ set(clips[n - 1])
    if alone:
        print(f"left out, in one folder only: {', '.join(sorted(alone))}")
    if not names:
        raise UserError(f"study: no clips of the same name in {args.dirs[0]} and {args.dirs[n - 1]}")
    items = []
    for name in sorted(names):                                          # one source may serve several tasks
        paths = {key: found.get(name, found.get(str(Path(name).parent))) for key, found in zip(keys, clips)}
        paths = {key: path for key, path in paths.items() if path}
        rate = next((probe(path).rate for path in paths.values() if path.is_file()), 8)     # of frames, too
        films = {key: data_url(path, rate) for key, path in paths.items()}
        items.append({"name": name, "caption": str(captions.get(name, ""))} | films)
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:8]
    data = {"id": "-".join([*(where.resolve().name for where in args.dirs[:n]), digest]), "rating": args.rate,
            "names": list(map(str, args.dirs[:n])), "questions": RATINGS if args.rate else QUESTIONS,
            "items": items}
    text = json.dumps(data).replace("<", "\\u003c")                    # no name or caption can end the script
    page = (ROOT / "assets/study.html").read_text(encoding="utf-8")
    write_text(args.out, page.replace("@DATA@", text))
    print(f"{args.out}: {len(items)} clips, {args.out.stat().st_size / 2 ** 20:.1f} MB; open it in a browser")


def main_votes(argv):
    parser = Parser(prog="metrics.py votes", description="Win rates from the files of the study's page.")
    parser.add_argument("files", nargs="+", type=Path)
    people, studies = {}, set()
    for path in parser.parse_args(argv).files:
        file = read_json(path)
        with reading(path, "pass what the study's page saved"):
            need(not file["rating"], "holds ratings, which curate.py calibrate reads")
            (a, b), answers = file["names"], [dict(vote) for vote in file["answers"].values()]
            need(all(set(vote.values()) <= {"a", "b"} for vote in answers), "has answers other than a and b")
            people[file.get("person", path)] = answers                  # the last file of each
            studies.add(file["study"])
    if len(studies) > 1:
        raise UserError(f"votes: files of several studies, {', '.join(sorted(studies))}; pass those of one")
    print(f"{a} against {b}: {len(people)} people\n| question | n | wins, % | 95 % |\n|---|---|---|---|")
    rates = []
    for question in QUESTIONS:
        given = [vote[question] for answers in people.values() for vote in answers if question in vote]
        if given:
            test = scipy.stats.binomtest(given.count("a"), len(given))
            low, high = test.proportion_ci(method="exact")
            rates.append(100 * test.statistic)
            print(f"| {question} | {len(given)} | {rates[-1]:.1f} | {100 * low:.1f} to {100 * high:.1f} |")
    if not rates:
        raise UserError("votes: no answers in these files")
    print(f"| average | | {np.mean(rates):.1f} | |")


# ============================================================================================================

def main():
    commands = {"tgve": main_tgve, "shapes": main_shapes, "footage": main_footage, "study": main_study,
                "votes": main_votes}
    name, *rest = sys.argv[1:] or ["--help"]
    if name in commands:
        commands[name](rest)
    else:
        main_clip([name, *rest])


if __name__ == "__main__":
    run(main)
