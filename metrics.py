"""Scores of an edit, computed as their sources compute them, and the networks behind them.

    python metrics.py edited.mp4 --source video.mp4 --instruction "make it snow" \\
                      --source-caption "a street" --target-caption "a street in the snow"
    python metrics.py tgve DIR [--plus] [--outputs DIR]      the TGVE or TGVE+ benchmark as one table
    python metrics.py shapes [--sweep] [--agreement]         the same on drawn clips whose true edit is known
    python metrics.py study DIR_A DIR_B [DIR_SOURCE]         a user study as one HTML page
    python metrics.py votes *.json                           its answers as win rates

Contents
    images in    to_u8, stretch, resize_crop, Preprocess
    networks     CLIP (PickScore is one, too), DINOv2, ViCLIP
    scores       clip_frame, clip_text, pick_score, viclip_out, viclip_dir, image_scores;
                 on pixels ssim, psnr, flicker, preservation
    one clip     SCORES, JUDGED (--judge), HELD_OUT, align, score_clips, main_clip
    benchmarks   read_tgve, read_tgve_plus, edit_benchmark, score_benchmark, table, main_tgve
    shapes world world_items, agreement_table, sweep, main_shapes
    user study   main_study, main_votes
    teacher      LlavaOneVision: writes instructions for clips, judges edits; its LoRA fine-tuning

Networks return un-normalised projected features, so that a clip is encoded once for all its scores.
Between files and networks a clip is "frames", (F, H, W, 3) uint8.
"""
import base64
import csv
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, uniform_filter
from tqdm import tqdm

import world
from model import (ACTIVATIONS, ROOT, CLIPEncoder, TextModel, Tokenizer, UserError, VideoEditor, aside, attention,
                   find_tensors, hub_dir, load_weights, read_json, read_tensors, run, stretch, to_u8, to_video)
from sample import (Parser, check_device, check_ranges, choose_model, edit_pictures, editor_flags, model_size, open_video, plan,
                    probe, read_frames, seam_score, settings, video_writer, window_starts)
from teachers import LLAVA, LLAVA_FILES, LlavaOneVision, judge_edit

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

    def bytes(self, images):
        """Everything before the normalisation: (N, S, S, 3) uint8."""
        return np.stack([resize_crop(im, self.resize, self.crop) for im in to_u8(images)])

    def normalise(self, u8):
        """(N, S, S, 3) uint8 -> (N, 3, S, S) float32."""
        return ((torch.from_numpy(u8).float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()

    def __call__(self, images):
        return self.normalise(self.bytes(images))


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
            layers, width = tower.encoder.layers, proj.in_features
            for layer in layers:
                attn, fc1, fc2 = layer.self_attn, layer.mlp["fc1"], layer.mlp["fc2"]
                inside, branch = width ** -0.5, (2 * width * len(layers)) ** -0.5
                for lin, std in ((attn.q_proj, inside), (attn.k_proj, inside), (attn.v_proj, inside),
                                 (attn.out_proj, branch), (fc1, (2 * width) ** -0.5), (fc2, branch)):
                    nn.init.normal_(lin.weight, std=std)
                    nn.init.zeros_(lin.bias)
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
        folder = hub_dir(source, ["*.json", "merges.txt", "model.safetensors"])
        with torch.device("meta"):
            net = cls(read_json(folder / "config.json"))
        tensors, file = find_tensors(folder)
        file = f"{folder.name}/{file}"
        load_weights(net, tensors, file, drop=("position_ids",), device=device, dtype=dtype)
        net.tokenizer = Tokenizer(folder / "vocab.json", folder / "merges.txt")
        net.preprocess = Preprocess(read_json(folder / "preprocessor_config.json"))
        return net.eval()

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

    antialias: in models with registers, as in both code bases; in others not, as in transformers' Dinov2Model. (There
    facebookresearch/dinov2 resizes by the factors (h + 0.1)/n, (w + 0.1)/n.) All agree on the table's own grid and
    differ by up to 0.3 in the features elsewhere.
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
        if cfg.get("use_swiglu_ffn"):
            raise UserError("DINOv2: use_swiglu_ffn (the giant model) is not known; use small, base or large")
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
        folder = hub_dir(source, ["*.json", "model.safetensors"])
        with torch.device("meta"):
            net = cls(read_json(folder / "config.json"))
        tensors, file = find_tensors(folder)
        load_weights(net, tensors, f"{folder.name}/{file}", device=device, dtype=dtype)
        net.preprocess = Preprocess(read_json(folder / "preprocessor_config.json"))
        return net.eval()

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

    def forward(self, x, causal):                                       # (N, L, D)
        q, k, v = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        x = x + self.attn.out_proj(attention(q, k, v, self.heads, causal=causal))
        return x + self.mlp["c_proj"](ACTIVATIONS["quick_gelu"](self.mlp["c_fc"](self.ln_2(x))))


class ViCLIPBlocks(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(ViCLIPBlock(width, heads) for _ in range(layers))

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


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
        self.transformer = ViCLIPBlocks(width, cfg["vision_layers"], cfg["vision_heads"])
        self.proj = nn.Parameter(init * torch.randn(width, cfg["embed_dim"]))

    def forward(self, video):
        x = self.conv1(video.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # (N, F, patches, D)
        when = self.temporal_positional_embedding                       # (1, F, D)
        when = when.mean(1, keepdim=True) if x.shape[1] == 1 else when  # a still has no place in time
        x = (x + self.positional_embedding[1:] + when[:, :, None]).flatten(1, 2)
        cls = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([cls, x], 1)))       # (N, 1 + F*patches, D)
        return self.ln_post(x[:, 0]) @ self.proj


class ViCLIPText(nn.Module):
    """ids (N, 32) -> (N, P)."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg["text_width"]
        self.token_embedding = nn.Embedding(cfg["vocab_size"], width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(cfg["context_length"], width))
        self.transformer = ViCLIPBlocks(width, cfg["text_layers"], cfg["text_heads"])
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, cfg["embed_dim"]))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids):
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, causal=True)
        x = self.ln_final(x)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]   # the end token's
        return x @ self.text_projection


class ViCLIP(nn.Module):
    """encode_video: (N, 8 or 1, 3, S, S) -> (N, P); encode_text: ids (N, 32) -> (N, P); not normalised.

    cfg: image_size, patch_size, num_frames, {vision,text}_{width,layers,heads}, context_length, vocab_size,
    embed_dim. All tokens are used; the published code drops 90 % by default, which is for training.
    """
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
        a model.safetensors of the same names, and the vocabulary beside it.

        Sizes come from the tensors; heads are 64 wide unless a config beside the file gives their number.
        """
        folder = hub_dir(source, cls.FILES)
        path = next((folder / name for name in cls.FILES[:2] if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"{source}: holds neither {cls.FILES[0]} nor {cls.FILES[1]}; "
                            "pass a copy of OpenGVLab/ViCLIP")
        tensors = read_tensors(path)
        if "vision_encoder.conv1.weight" not in tensors:
            raise UserError(f"{path}: holds no vision_encoder.conv1.weight; is it ViCLIP's file?")
        cfg = viclip_sizes(tensors)
        for name in ("config.json", "mini_sizes.json"):
            if (folder / name).is_file():
                cfg.update({k: v for k, v in read_json(folder / name).items() if k in cfg})
        with torch.device("meta"):
            net = cls(cfg)
        load_weights(net, tensors, f"{folder.name}/{path.name}", device=device, dtype=dtype)
        bpe = folder / "bpe_simple_vocab_16e6.txt.gz"                   # or, for `tiny`, CLIP's two files
        net.tokenizer = (Tokenizer.from_bpe_gz(bpe, pad=0) if bpe.is_file() else
                         Tokenizer(folder / "vocab.json", folder / "merges.txt", pad=0))
        return net.eval()

    def encode_video(self, video):
        if video.shape[1] not in (1, self.n_frames):
            raise UserError(f"ViCLIP: {video.shape[1]} frames; its positions fit {self.n_frames} or 1")
        return self.vision_encoder(video.to(self.text_encoder.text_projection)).float()

    def encode_text(self, ids):
        return self.text_encoder(ids.to(self.temp.device)).float()

    def tokenize(self, texts):
        return self.tokenizer(texts, length=self.context)

    def bytes(self, images):
        """Frames (see `to_u8`) -> the 8 that ViCLIP sees, (8, S, S, 3) uint8: stretched, not cropped."""
        return np.stack([bilinear_u8(frame, self.image_size) for frame in self.choose(to_u8(images))])

    def choose(self, frames):
        """Every (n // 8)-th of n frames, 8 of them; ours: a shorter clip is slowed down to 8."""
        n = self.n_frames
        if len(frames) < n:
            return [frames[i * len(frames) // n] for i in range(n)]
        return frames[::len(frames) // n][:n]

    def normalise(self, u8):
        """(8, S, S, 3) uint8 -> (1, 8, 3, S, S) float32."""
        x = (torch.from_numpy(u8).float() / 255 - self.MEAN) / self.STD
        return x.permute(0, 3, 1, 2)[None].contiguous()

    def preprocess(self, images):
        return self.normalise(self.bytes(images))


def viclip_sizes(t):
    """The config that fits ViCLIP's tensors."""
    vision, text = t["vision_encoder.conv1.weight"], t["text_encoder.token_embedding.weight"]
    grid = round((len(t["vision_encoder.positional_embedding"]) - 1) ** 0.5)

    def layers(tower):
        return 1 + max(int(k.split(".")[3]) for k in t if k.startswith(f"{tower}_encoder.transformer."))
    return dict(image_size=grid * vision.shape[-1], patch_size=vision.shape[-1],
                num_frames=t["vision_encoder.temporal_positional_embedding"].shape[1],
                vision_width=len(vision), vision_layers=layers("vision"),
                vision_heads=max(1, len(vision) // 64), text_heads=max(1, text.shape[1] // 64),
                text_width=text.shape[1], text_layers=layers("text"), vocab_size=len(text),
                context_length=len(t["text_encoder.positional_embedding"]),
                embed_dim=t["vision_encoder.proj"].shape[1])


def bilinear_u8(image, size):
    """uint8 (H, W, 3) -> (size, size, 3) as OpenCV's INTER_LINEAR does it, which is what fed ViCLIP.

    In its fixed point: weights of 11 bits, no antialias, the border repeated.
    """
    def taps(n):                                                        # first pixel, share of the next
        at = ((np.arange(size) + 0.5) * (n / size) - 0.5).astype(np.float32)
        return np.floor(at).astype(int), at - np.floor(at)

    def weights(share):
        return np.rint((1 - share) * 2048).astype(int), np.rint(share * 2048).astype(int)

    height, width = image.shape[:2]
    (x, fx), (y, fy) = taps(width), taps(height)
    a0, a1 = weights(np.where((x < 0) | (x >= width - 1), 0, fx))       # off the side: one pixel counts
    b0, b1 = weights(fy)                                                # off the top: it counts twice
    rows = image.astype(int)
    rows = rows[:, x.clip(0, width - 1)] * a0[:, None] + rows[:, (x + 1).clip(0, width - 1)] * a1[:, None]
    top, bottom = rows[y.clip(0, height - 1)] >> 4, rows[(y + 1).clip(0, height - 1)] >> 4
    out = (b0[:, None, None] * top >> 16) + (b1[:, None, None] * bottom >> 16)
    return ((out + 2) >> 2).clip(0, 255).astype(np.uint8)


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
    sizes = sorted({f"{im.shape[1]}x{im.shape[0]}" for im in images})
    if len(sizes) > 1:
        raise UserError(f"image scores: sizes differ, {', '.join(sizes)}; edits must have the source's size")
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

def unit(x):
    """Pixels as float64 in [0, 1]."""
    x = np.asarray(x)
    return x / 255.0 if x.dtype == np.uint8 else x.astype(np.float64)


def ssim(first, second, mask=None):
    """Structural similarity of (..., H, W, 3) twice, the mean over R, G, B and all full 7x7 windows, or those whose centre is
    in mask (..., H, W): -1 to 1, up, 1 for equal images; NaN for no windows.

    Wang et al. 2004, as scikit-image has it by default: flat window, sample covariance (48ths, not 49ths),
    constants 0.01^2 and 0.03^2.
    """
    a, b = unit(first), unit(second)
    if min(a.shape[-3:-1]) < 7:
        raise UserError(f"SSIM: {a.shape[-3]}x{a.shape[-2]} pixels; its window needs at least 7x7")

    def mean(x):                                                        # over the window, valid part
        x = uniform_filter(x, size=(1,) * (x.ndim - 3) + (7, 7, 1))
        return x[..., 3:-3, 3:-3, :]
    ma, mb = mean(a), mean(b)
    va, vb, cov = (49 / 48 * (mean(xy) - mx * my)
                   for xy, mx, my in ((a * a, ma, ma), (b * b, mb, mb), (a * b, ma, mb)))
    windows = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))  # (..., H-6, W-6, 3)
    windows = windows if mask is None else windows[mask[..., 3:-3, 3:-3]]
    return float(windows.mean()) if windows.size else math.nan


def psnr(first, second, mask=None):
    """Decibels, up; over the pixels where mask (..., H, W) is true; 100 stands for equal or no pixels."""
    error = (unit(first) - unit(second)) ** 2
    error = error if mask is None else error[mask]
    return float(-10 * np.log10(max(error.mean(), 1e-10))) if error.size else 100.0


def flicker(frames):
    """Mean distance of a frame from the mean of its two neighbours, in grey levels of 255; down.

    frames: uint8. Steady motion mostly cancels, flicker does not. Compare with the source's own; NaN for
    fewer than three frames.
    """
    x = [frame.astype(np.int16) for frame in frames]
    bends = [np.abs(2 * now - before - after).mean() / 2 for before, now, after in zip(x, x[1:], x[2:])]
    return float(np.mean(bends)) if bends else math.nan


def changed_region(source, edited):
    """(F, H, W) bool: where the edit changed the picture, by Otsu's threshold on the blurred difference.

    Less than 10 grey levels is no change, since compression makes that, and more than 40 always is one. An
    edit of the whole frame gives (nearly) the whole frame.
    """
    blur = 0.02 * min(source.shape[1:3])                                # pixels
    d = gaussian_filter(np.abs(unit(source) - unit(edited)).mean(-1), (0, blur, blur))
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


def truth_scores(source, edited, truth, mask):
    """Distance from the true edit, which only drawn clips have: PSNR and SSIM inside the true region, and how
    many dB the edit is closer to the truth than the untouched source is: there, and over the whole clip."""
    inside = psnr(edited, truth, mask)
    return {"psnr_truth": inside, "ssim_truth": ssim(edited, truth, mask),
            "truth_gain": inside - psnr(source, truth, mask),
            "whole_gain": psnr(edited, truth) - psnr(source, truth)}


# ------------------------------------------------------------------------------------------------------------
# One clip: every score there is an input for
# ------------------------------------------------------------------------------------------------------------

SCORES = {              # printed name, what is better, decimals, what it says, the command's flags it needs
    "viclip_out": ("ViCLIP_out", "up", 3, "edited clip against the target caption", "target-caption viclip"),
    "pick_score": ("PickScore", "up", 2, "human preference for each frame under the target caption",
                   "target-caption pick"),
    "clip_frame": ("CLIPFrame", "up", 3, "frames alike; a frozen frame has 1", "clip"),
    "clip_text": ("CLIPText", "up", 2, "frames against the target caption, x 100", "target-caption clip"),
    "clip_frame_gain": ("CLIPFrame gain", "0", 3, "CLIPFrame minus the source's own", "source clip"),
    "flicker": ("flicker", "1", 2, "flicker over the source's own; above 1 flickers, below smears", "source"),
    "seam": ("seam", "1", 2, "change where windows of 16 meet, over change elsewhere", "source"),
    "changed": ("area changed", "-", 2, "share of the clip that the edit changed", "source"),
    "psnr_outside": ("PSNR outside", "up", 1, "dB, source kept outside that area; 100 is equal", "source"),
    "ssim_outside": ("SSIM outside", "up", 3, "structure kept outside that area", "source"),
    "viclip_dir": ("ViCLIP_dir", "up", 3, "held out; change of clip against captions'; untouched has 0",
                   "source source-caption target-caption viclip"),
}
JUDGED = {                                              # as SCORES; only with --judge, see judge_edit
    "judge_follows": ("judge: follows", "up", 2, "chance of yes: it follows the instruction", "source instruction"),
    "judge_preserves": ("judge: keeps", "up", 2, "chance of yes: all else is unchanged", "source instruction"),
    "judge_clean": ("judge: clean", "up", 2, "chance of yes: no artefacts, no flicker", "source instruction"),
}
# The judge that curation never filters by. Both models have it, and doing nothing does not win it; but its
# network also gives ViCLIP_out, so it is not fully independent of the filter.
HELD_OUT = "viclip_dir"
# of the total in `agreement_table`: the paper's four but ViCLIP_dir, equal. The filter's are in curate.py, VIDEO_WEIGHTS
WEIGHTS = {"viclip_out": 1, "pick_score": 1, "clip_frame": 1, "clip_text": 1}
TRUTH = {                                               # as SCORES; only where the true edit is known
    "psnr_truth": ("PSNR to truth", "up", 1, "dB to the true edit inside its region"),
    "ssim_truth": ("SSIM to truth", "up", 3, "structure of the true edit inside its region"),
    "truth_gain": ("gain, dB", "up", 1, "PSNR to truth minus the untouched source's"),
    "whole_gain": ("gain, whole clip", "up", 1, "the same over the whole clip"),
    "success": ("success", "up", 2, "share of clips, see SUCCESS"),
}
SUCCESS = ("success: inside the region that the true edit changes, at least 1 dB closer to the truth than "
           "the source and the autoencoded source are; outside it, at most 1 dB further from the source than "
           "the autoencoder's own error, on source or truth")
SCORERS = {                                                             # role: hub id or directory
    "published": {"clip": "openai/clip-vit-large-patch14", "pick": "yuvalkirstain/PickScore_v1",
                  "viclip": "OpenGVLab/ViCLIP"},
    "tiny": {"clip": ROOT / "assets/tiny/clip", "viclip": ROOT / "assets/tiny/viclip"},
}


def load_frames(path, start=0):
    """A video file, from `start` seconds on, or a folder of numbered frames -> (frames (F, H, W, 3) uint8, times (F,) in
    seconds from the first of them; None of a folder)."""
    clip = probe(path)
    if clip.path.is_dir() and start:
        raise UserError(f"--start {start:g}: {path} is a folder of frames, which have no times")
    plan(clip, start)                                                   # refuses a file that is cut short
    ticks, frames = zip(*read_frames(clip, start))
    times = None if clip.path.is_dir() else np.array([float((t - ticks[0]) * clip.tick) for t in ticks])
    return np.stack(frames), times


def align(source, edited, source_times=None, edited_times=None):
    """Source and edit as clips of one length and size: (source, edited, notes on what was done).

    Clips of as many frames, and folders, whose frames have no times (None), are paired one to one. Else times in seconds
    tell: up to where the shorter clip ends, each frame of the clip that has fewer there meets the one shown at its time.
    """
    notes, n = [], min(len(source), len(edited))
    if len(source) != len(edited):
        found = f"source has {len(source)} frames, edit {len(edited)}"
        if source_times is None or edited_times is None:
            notes.append(f"{found}: the first {n} of both are scored")
        else:
            ends = [t[-1] + np.median(np.diff(t)) if len(t) > 1 else 0 for t in (source_times, edited_times)]
            times = [t[t <= max(0, min(ends) - 0.002)] for t in (source_times, edited_times)]
            shown = [np.searchsorted(t, min(times, key=len) + 0.002, "right") - 1 for t in times]       # 2 ms: as webm rounds
            source, edited, n = source[shown[0]], edited[shown[1]], len(shown[0])
            notes.append(f"{found}: {n} of each are scored, paired by their times")
    height, width = source.shape[1:3]
    if edited.shape[1:3] == (height + height % 2, width + width % 2):   # an odd last row or column, which mp4 shows twice
        edited = edited[:, :height, :width]
    if source.shape[1:3] != edited.shape[1:3]:
        old = f"{edited.shape[2]}x{edited.shape[1]}"
        notes.append(f"edit stretched from {old} to the source's {width}x{height}")
        edited = np.stack([stretch(frame, width, height) for frame in edited[:n]])
    return source[:n], edited[:n], notes


def pixel_scores(source, edited, mask=None, n_kept=8):
    """The scores that need no network; preservation on at most `n_kept` frames, evenly spaced."""
    at = np.unique(np.linspace(0, len(edited) - 1, n_kept).astype(int))
    changed, kept_psnr, kept_ssim = preservation(source[at], edited[at], None if mask is None else mask[at])

    def change(x):                                  # from frame to frame, in [0, 1]
        return [np.abs(b.astype(np.int16) - a).mean() / 255 for a, b in zip(x, x[1:])]
    seam = seam_score(change(edited), change(source), window_starts(len(edited), "video")[1:])
    return {"flicker": (flicker(edited) + 0.25) / (flicker(source) + 0.25),  # a quarter level: stills have 0
            "seam": math.nan if seam is None else seam,
            "changed": changed, "psnr_outside": kept_psnr, "ssim_outside": kept_ssim}


@torch.no_grad()
def score_clips(clips, scorers, device="cpu", square=480, opened=None):
    """Scores of many clips, several edits of each: a list of {edit's name: {key of SCORES: float}}, with the
    keys that the inputs allow.

    clips: dicts with `edits` {name: frames} and, where known, `source` (frames, aligned with them),
    `source_caption`, `target_caption`, `instruction`, `mask` (F, H, W) of the true edit, and `truth`, that
    edit. scorers: {"clip", "pick", "viclip", "judge"} -> hub id or directory. square: TGVE's script stretches
    every frame to 480x480 before the networks' own preprocessing; 0 leaves frames as they are. One network is
    in memory at a time; `opened`, a dict, keeps them for the next call (a large GPU).
    """
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    crops = [{} for _ in clips]                                         # CLIP and PickScore share them

    def pixels(clip):
        if clip.get("source") is None:
            return {name: {} for name in clip["edits"]}
        return {name: pixel_scores(clip["source"], x, clip.get("mask")) |
                (truth_scores(clip["source"], x, clip["truth"], clip["mask"]) if "truth" in clip else {})
                for name, x in clip["edits"].items()}

    with ThreadPoolExecutor() as pool:                                  # the next clips are resized meanwhile
        rows = list(pool.map(pixels, clips))
        for role, path in scorers.items():
            net = opened[role] if opened and role in opened else open_scorer(role, path, device, dtype)
            if opened is not None:
                opened[role] = net
            ready = pool.map(lambda clip, seen: as_seen(net, clip, seen, square), clips, crops)
            for clip, row, videos in zip(clips, rows, ready):
                for name, scores in network_scores(net, role, clip, videos).items():
                    row[name].update(scores)
            net = None                                                  # freed before the next one is loaded
    return rows


def open_scorer(role, path, device, dtype):
    try:
        network = {"viclip": ViCLIP, "judge": LlavaOneVision}.get(role, CLIP)
        return network.from_pretrained(path, device=device, dtype=dtype)
    except UserError as error:
        raise UserError(f"--{role} {path}: {error}" +
                        f"; or leave its scores out with --{role} none" * (role != "judge")) from None


def as_seen(net, clip, crops, square):
    """{edit's name, None for the source: uint8 as `net` sees it}, computed once for networks of one size."""
    if isinstance(net, LlavaOneVision):                                 # chooses frames and scales itself
        return clip["edits"]
    videos = clip["edits"] | ({None: clip["source"]} if clip.get("source") is not None else {})
    viclip = isinstance(net, ViCLIP)
    size = ("viclip", net.image_size) if viclip else (net.preprocess.resize, net.preprocess.crop)
    for frames in videos.values():
        if (id(frames), size) not in crops:                             # a control may be the source itself
            chosen = net.choose(frames) if viclip else frames
            chosen = [stretch(frame, square, square) for frame in chosen] if square else list(chosen)
            crops[id(frames), size] = net.bytes(chosen) if viclip else net.preprocess.bytes(chosen)
    return {name: crops[id(frames), size] for name, frames in videos.items()}


def network_scores(net, role, clip, videos):
    """{edit's name: scores} that one network gives to one clip; videos as from `as_seen`."""
    target, before = clip.get("target_caption"), clip.get("source_caption")
    if role == "judge":
        if clip.get("source") is None or not clip.get("instruction"):
            return {}
        said = {name: judge_edit(net, clip["source"], x, clip["instruction"], min(8, len(x)))
                for name, x in videos.items()}
        return {name: {key: p[key.removeprefix("judge_")] for key in JUDGED} for name, p in said.items()}
    unique = {id(u8): u8 for u8 in videos.values()}
    if role == "viclip":
        if not target:
            return {}
        text = net.encode_text(net.tokenize([target, before or ""]))
        batch = net.encode_video(torch.cat([net.normalise(u8) for u8 in unique.values()]))
        features = dict(zip(unique, batch))                             # (P,) each
    else:
        text = net.encode_text(net.tokenizer([target or ""]))
        features = {key: torch.cat([net.encode_image(net.preprocess.normalise(part))            # (F, P) each
                                    for part in np.array_split(u8, 1 + len(u8) // 64)])
                    for key, u8 in unique.items()}
    features = {name: features[id(u8)] for name, u8 in videos.items()}
    source, out = features.pop(None, None), {}
    for name, x in features.items():
        out[name] = {}
        if role == "clip":
            out[name]["clip_frame"] = clip_frame(x)
            if source is not None:
                out[name]["clip_frame_gain"] = clip_frame(x) - clip_frame(source)
            if target:
                out[name]["clip_text"] = clip_text(x, text[0])
        elif role == "pick" and target:
            out[name]["pick_score"] = pick_score(x, text[0], net.logit_scale.item())
        elif role == "viclip":
            out[name]["viclip_out"] = viclip_out(x, text[0])
            if source is not None and before:
                out[name]["viclip_dir"] = viclip_dir(x, source, *text)
    return out


def why_missing(key, clip, scorers):
    """Why a clip has no such score, in the words of the command line."""
    flags = ("source", "instruction", "source-caption", "target-caption")
    given = {flag for flag in flags if len(clip.get(flag.replace("-", "_"), ()))}
    lacks = [f"--{flag}" for flag in (SCORES | JUDGED)[key][4].split() if flag not in given | set(scorers)]
    if lacks:
        return "needs " + " and ".join(lacks)
    return {"clip_frame": "needs two frames", "clip_frame_gain": "needs two frames",
            "flicker": "needs three frames", "seam": "one window has none",
            "psnr_outside": "the edit changes the whole frame",
            "ssim_outside": "the edit changes the whole frame"}.get(key, "not a number")


def print_scores(row, clip, scorers):
    for key, (name, better, digits, meaning, _) in (SCORES | (JUDGED if "judge" in scorers else {})).items():
        value = row.get(key, math.nan)
        shown = f"{value:.{digits}f}" if math.isfinite(value) else "-"
        note = meaning if math.isfinite(value) else f"left out: {why_missing(key, clip, scorers)}"
        print(f"{name:<15}{shown:>8}   better: {better:<5}{note}")


def choose_scorers(args, own=None):
    """({role: hub id or directory}, square of `score_clips`, "published" or "tiny") as the flags ask for; prints which and why.

    own: {role: directory} of the scorers that lie with an editor, which --scorers auto then takes.
    """
    check_device(args.device)
    kind, why, ready = args.scorers, "as --scorers says", SCORERS
    if kind == "auto" and own:
        kind, why, ready = "tiny", "the editor's own", {"tiny": own}
    elif kind == "auto":
        kind = "published" if torch.cuda.is_available() else "tiny"
        why = "there is a GPU; --scorers tiny for the embedded ones" if kind == "published" else \
              "no GPU here; --scorers published for the paper's"
    scorers = {}
    for role in ("clip", "pick", "viclip"):
        path = getattr(args, role) or ready[kind].get(role, "none")
        if isinstance(path, Path) and not path.is_dir():
            print(f"{role}: none at {path}; its scores are left out")
        elif path != "none":
            scorers[role] = path
    if getattr(args, "judge", None):
        scorers["judge"] = args.judge
    print(f"scorers: {kind} ({why})")
    return scorers, 480 if kind == "published" else 0, kind


def scorer_flags(parser):
    parser.add_argument("--scorers", choices=["auto", "tiny", "published"], default="auto",
                        help="embedded networks or the hub's; auto: for curation those that lie with the editor, else the hub's "
                        "if there is a GPU")
    for role in ("clip", "pick", "viclip"):
        parser.add_argument(f"--{role}", metavar="DIR",
                            help=f"hub id or directory of another {role} network, or none")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, help="cuda, mps or cpu")


def judge_flags(parser):
    parser.add_argument("--judge", metavar="DIR",
                        help=f"three scores more, by a LLaVA-OneVision: directory or hub id like {LLAVA}")


def judge_mark(source):
    """Eight digits that tell one LLaVA from another, wherever it lies."""
    try:
        return weights_mark(hub_dir(source, LLAVA_FILES))
    except UserError as error:
        raise UserError(f"--judge {source}: {error}") from None


def weights_mark(folder):
    """Eight digits of the sizes and beginnings of a network's weight files."""
    crc = 0
    for path in sorted(p for p in Path(folder).iterdir() if p.match("*model*.safetensors") or p.suffix in (".bin", ".pth")):
        with open(path, "rb") as f:
            crc = zlib.crc32(f.read(1 << 20), zlib.crc32(str(path.stat().st_size).encode(), crc))
    return f"{crc:08x}"


def content_mark(path):
    """Eight digits of a file's bytes, or of those of all files in a folder."""
    path, crc = Path(path), 0
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        crc = zlib.crc32(file.name.encode(), crc) if path.is_dir() else crc
        with open(file, "rb") as f:
            while part := f.read(1 << 24):
                crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def check_judge(judge, weights, told):
    """UserError if `judge` filtered clips that `weights`, or a run before it, was trained on, unless told.

    A run's meta.json names its data sets and the run it started from; a data set's dataset.json names the model that made
    its edits, and under `filtered_by` which judge, if any, chose its clips. A note is printed where a data set is gone.
    """
    mark, todo, seen = judge_mark(judge), [Path(weights)], set()
    while todo:
        run_folder = todo.pop()
        run_folder = run_folder.parent if run_folder.suffix == ".safetensors" else run_folder
        if run_folder in seen or not (run_folder / "meta.json").is_file():
            continue
        seen.add(run_folder)
        args = read_json(run_folder / "meta.json").get("args", {})
        for folder in args.get("train_on", ()):
            path = ROOT / folder / "dataset.json"                       # an absolute path stays what it is
            if not path.is_file():
                print(f"{folder}: gone, so nobody knows whether --judge {judge} chose what {run_folder} learnt from")
                continue
            data = read_json(path)
            todo.append(ROOT / (data.get("weights") or ""))             # the model that made its edits
            if (data.get("filtered_by") or {}).get("mark") == mark:
                if not told:
                    raise UserError(f"--judge {judge}: it chose the clips of {folder} that {run_folder} was trained "
                                    "on, so it would praise its own choice; pass another, or --same-judge to report "
                                    "it nevertheless")
                print(f"judge: {judge} also chose the clips of {folder}; its scores flatter this model")
        todo.append(ROOT / (args.get("weights") or ""))


def main_clip(argv):
    parser = Parser(prog="metrics.py", description="Scores of one edited clip; `tgve|shapes|study|votes --help` for the rest.")
    parser.add_argument("edited", help="video file or folder of frames")
    parser.add_argument("--source", help="the clip it was made from")
    parser.add_argument("--start", type=float, default=0, help="seconds of the source at which the edit begins")
    parser.add_argument("--instruction", default="", help="what was asked for; --judge needs it")
    parser.add_argument("--source-caption", default="", help="what the source shows")
    parser.add_argument("--target-caption", default="", help="what the edit should show")
    scorer_flags(parser)
    judge_flags(parser)
    args = parser.parse_args(argv)
    check_ranges(parser, args)
    if args.start and not args.source:
        raise UserError(f"--start {args.start:g}: is a time of --source, which lacks")
    edited, times = load_frames(args.edited)
    notes = []
    clip = {key: getattr(args, key).strip() for key in ("instruction", "source_caption", "target_caption")}
    if args.source:
        source, source_times = load_frames(args.source, args.start)
        clip["source"], edited, notes = align(source, edited, source_times, times)
    clip["edits"] = {"edit": edited}
    scorers, square, _ = choose_scorers(args)
    [row] = score_clips([clip], scorers, args.device, square)
    what = f", {args.instruction!r}" if args.instruction else ""
    print(*notes, f"{args.edited}: {len(edited)} frames{what}", sep="\n")
    print_scores(row["edit"], clip, scorers)


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: TGVE (Wu et al. 2023) and TGVE+ (Singer et al. 2024)
# ------------------------------------------------------------------------------------------------------------

TGVE_COLUMNS = {"Style Change Caption": "style", "Object Change Caption": "object",
                "Background Change Caption": "background", "Multiple Changes Caption": "multiple"}
SETS = {"davis": "DAVIS_480p", "youtube": "youtube_480p", "videvo": "videvo_480p"}
COLUMNS = ("viclip_out", "pick_score", "clip_frame", "clip_text", "clip_frame_gain", "flicker",
           "psnr_outside", HELD_OUT)
IN_PAPER = ("viclip_out", "viclip_dir", "pick_score", "clip_frame", "clip_text")
PAPER = {                                                               # arXiv 2503.17641, Table 1
    "tgve": {"Tune-A-Video": (.243, .162, 20.36, .924, 27.12), "STDF": (.226, .110, 20.40, .933, 26.34),
             "Fairy": (.208, .164, 19.80, .933), "TokenFlow": (.257, .117, 20.58, .943, 25.41),
             "AnyV2V": (.230, .141, 19.70, .919, 24.03), "InsV2V": (.262, .208, 20.76, .911, 25.56),
             "EVE": (.262, .221, 20.76, .922), "InstructVEdit": (.280, .237, 20.92, .919, 27.69)},
    "tgve_plus": {"Tune-A-Video": (.242, .131, 20.47, .933, 25.59), "STDF": (.227, .093, 20.60, .933, 25.70),
                  "Fairy": (.197, .140, 19.81, .933), "TokenFlow": (.254, .085, 20.62, .944, 24.96),
                  "AnyV2V": (.227, .109, 19.80, .919, 23.52), "InsV2V": (.236, .174, 20.37, .925, 25.36),
                  "EVE": (.251, .198, 20.88, .926), "InstructVEdit": (.271, .183, 20.94, .917, 26.65)},
}


def benchmark_item(folder, subset, video, task, source_caption, target_caption, instruction):
    """One line of a benchmark: an id, which is also the folder of its edit, and where the source is."""
    places = [folder / subset / "480p_frames" / video, folder / subset / "480p_videos" / f"{video}.mp4"]
    path = next((str(p) for p in places if p.exists()), None)
    return dict(id=f"{subset}/{video}/{task}", task=task, path=path, source_caption=source_caption,
                target_caption=target_caption, instruction=instruction,
                problem=None if path else f"no source video at {places[1]}")


def read_tgve(folder, prompts=None):
    """LOVEU-TGVE-2023 as published: a CSV with section rows ("DAVIS Videos:") and blank ones, three folders.

    prompts: InsV2V's JSON {video: {"edit_style": instruction, …}}, by default the one in the folder; without
    it items have no instruction and can only be scored. Returns items of `benchmark_item`, four per video.
    """
    file = next(iter(sorted(folder.glob("*.csv"))), None)
    if file is None:
        raise UserError(f"{folder}: holds no CSV; expected LOVEU-TGVE-2023_Dataset.csv and its video folders")
    prompts = prompts or next(iter(sorted(folder.glob("*prompt*.json"))), None)
    prompts = read_json(prompts) if prompts else {}
    if not all(isinstance(x, dict) and all(isinstance(s, str) for s in x.values()) for x in prompts.values()):
        raise UserError(f"{folder}: its prompts need to be a JSON object, {{video: {{\"edit_style\": instruction, …}}}}")
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            header, *rows = [[cell.strip() for cell in row] for row in csv.reader(f)] or [[]]
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8; save it as \"CSV UTF-8\"") from None
    wanted = ["Video name", "Our GT caption", *TGVE_COLUMNS]
    lacks = [c for c in wanted if c not in header]
    if lacks:
        raise UserError(f"{file}: lacks the columns {', '.join(lacks)}; it has {', '.join(header)}")
    rows = [dict(zip(header, row)) for row in rows]
    items, subset, seen = [], None, set()
    for row in rows:
        name = row.get("Video name", "")
        if name.endswith("Videos:"):
            subset = SETS.get(name.split()[0].lower(), name.split()[0])
        elif name and subset is None:
            raise UserError(f"{file}: {name} comes before any section row such as 'DAVIS Videos:'")
        elif name:
            seen.add(name)
            for column, task in TGVE_COLUMNS.items():
                instruction = prompts.get(name, {}).get(f"edit_{task}", "")
                items.append(benchmark_item(folder, subset, name, task, row.get("Our GT caption", ""),
                                            row.get(column, ""), instruction))
                if not row.get(column):
                    items[-1]["problem"] = f"empty {column}"
    unknown = sorted(set(prompts) - seen)
    if unknown:
        print(f"prompts for videos that {file.name} does not have: {', '.join(unknown)}")
    return items


def read_tgve_plus(folder):
    """TGVE+ (facebook/tgve_plus): one parquet beside TGVE's video folders, its columns found by name."""
    file = next(iter(sorted(folder.rglob("*.parquet"))), None)
    if file is None:
        raise UserError(f"{folder}: holds no parquet; put facebook/tgve_plus's beside TGVE's video folders")
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{file}: reading parquet needs pyarrow; pip install pyarrow")
    import pyarrow.parquet
    rows = pyarrow.parquet.read_table(file).to_pylist()
    names, column = list(rows[0]) if rows else [], {}
    spellings = {"instruction": ("instruction", "edit_prompt"), "task": ("task", "type"),
                 "video": ("video", "path", "file"),
                 "source": ("input_caption", "source_caption", "original_caption", "original_prompt", "input"),
                 "target": ("output_caption", "target_caption", "edited_caption", "edited_prompt", "output")}
    for key, words in spellings.items():
        column[key] = next((n for w in words for n in names if w in n.lower().replace(" ", "_")), None)
        if column[key] is None:
            raise UserError(f"{file}: no column for the {key}; it has {', '.join(names)}")
    items, count = [], {}
    for row in rows:
        path, task = Path(row[column["video"]]), re.sub(r"\W+", "_", str(row[column["task"]]).lower())
        key = path.parts[0], path.stem, task
        count[key] = count.get(key, 0) + 1                           # a task may come several times per video
        task_id = task if count[key] == 1 else f"{task}-{count[key]}"
        item = benchmark_item(folder, path.parts[0], path.stem, task_id, row[column["source"]] or "",
                              row[column["target"]] or "", row[column["instruction"]] or "")
        items.append(item | {"task": task})
    return items


def thin(frames, n=32):
    """At most n frames, every (len // n)-th, as InsV2V does on TGVE."""
    return frames[::max(1, len(frames) // n)][:n]


def edit_benchmark(items, folder, edit, how, ending=".jpg"):
    """Write edit(item), rgb frames, of every item as <folder>/<id>/00000.jpg, …, the submission layout.

    Folders appear whole, and those that are there already are kept: a run continues where it stopped. <folder>/made.jsonl
    says what made each: an edit made in another way (`how`), of another source or by another instruction is refused."""
    log = folder / "made.jsonl"
    made = {row["id"]: row for row in read_log(log)}
    wanted = {i["id"]: {"id": i["id"], "instruction": i["instruction"], "source": i["mark"], "settings": how} for i in items
              if not i["problem"]}
    there = {name for name in wanted if (folder / name).is_dir()}
    other = [name for name in there if made.get(name) != wanted[name]]
    if other:
        raise UserError(f"{folder / other[0]}: was made with other settings or from another clip, {made.get(other[0])}, now "
                        f"{wanted[other[0]]}; pass another --out")
    todo = [i for i in items if i["id"] in wanted.keys() - there]
    for item in tqdm(todo, desc=folder.name, unit="clip", disable=not todo):
        if not item["instruction"]:
            item["problem"] = "no instruction for it in the prompts"
            continue
        target = folder / item["id"]
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for i, rgb in enumerate(edit(item)):
                Image.fromarray(rgb).save(part / f"{i:05d}{ending}", quality=95)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if not isinstance(error, UserError):
                raise
            item["problem"] = str(error)                                # a source that cannot be read
            continue
        append_line(log, wanted[item["id"]])
        os.replace(part, target)


def run_editor(ed, item, source, size, options):
    """The edit of source (F, H, W, 3) uint8 as rgb frames of its size, as `sample.py` delivers it; short side `size`
    inside the model."""
    small = model_size(*source.shape[1:3], size, ed.multiple)
    options = options | {"seed": options["seed"] + item.get("number", 0)}
    for rgb, *_ in edit_pictures(ed, source, small, item["instruction"], **options):
        yield rgb


def stamp(ed):
    """Eight digits that change with weights, schedule, guidance, deadband and kind of noise: old edits are not taken for a new model's."""
    crc = 0
    for net in (ed.unet, ed.vae, ed.text_encoder):
        for x in net.state_dict().values():
            crc = zlib.crc32(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{zlib.crc32(repr((sorted(ed.scheduler.items()), ed.guidance, ed.deadband, ed.same_noise)).encode(), crc):08x}"


def read_lines(path):
    """JSON lines of a file -> (dicts, lines cut by a crash: 0 or 1). UserError for a broken line inside."""
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")       # a whole line ends in \n
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {n}: is not JSON; remove that line, its source is then done again") from None
    return rows, int(bool(rest))


def read_log(path):
    """[dict] of a file of JSON lines, none where it is not there; a line that a crash cut is taken out of it."""
    rows, cut = read_lines(path) if path.exists() else ([], 0)
    if cut:
        write_aside(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def append_line(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


def read_item(item, folders, read):
    """(What `score_clips` takes of an item and its edits in `folders`: as many frames of each, and of the controls; notes on how
    they were aligned). UserError for what is not there or cannot be read. read: see `score_benchmark`."""
    clip, edits, notes = read(item), {}, []
    length = clip.pop("length", None)
    for name, folder in folders.items():
        place = folder / item["id"]
        if not place.is_dir():
            raise UserError(f"no edit at {place}")
        edited = load_frames(place)[0]
        edited = thin(edited) if len(edited) == length else edited          # of all of the source's frames
        _, edits[name], found = align(clip["source"], edited)
        notes += found
    n = min(len(clip["source"]), *map(len, edits.values()))
    clip, edits = ({k: x[:n] for k, x in frames.items()} for frames in (clip, edits))
    source, first = clip["source"], next(iter(edits.values()))[:1]
    edits |= {"untouched source": source, "frozen first edit": np.broadcast_to(first, source.shape)}
    return item | clip | {"edits": edits}, list(dict.fromkeys(notes))


def score_benchmark(items, folders, scorers, square, device, log, read, chunk=16):
    """Scores of every item's edits, of its untouched source and of its first edited frame, frozen.

    folders: {row's name: folder in the submission layout}, the first the one that matters. read(item) -> what
    `score_clips` takes, `source` and perhaps `truth` and `mask`, and `length`, the source's frames before it was thinned.
    Every finished chunk of clips is appended to `log` at once, with a mark of all that the scores depend on: scorers, texts,
    source and edits. Returns {id: {row: scores}}; what cannot be read gets a "problem".
    """
    opened = {} if torch.device(device).type == "cuda" else None
    rows = [*folders, "untouched source", "frozen first edit"]
    names = {role: (str(where), weights_mark(where) if Path(where).is_dir() else "") for role, where in scorers.items()}

    def mark(item):
        edits = {name: content_mark(folder / item["id"]) for name, folder in folders.items() if (folder / item["id"]).is_dir()}
        what = names, square, item["mark"], [item[k] for k in ("instruction", "source_caption", "target_caption")], edits
        return f"{zlib.crc32(json.dumps(what, sort_keys=True).encode()):08x}"
    known, marks, done, todo = {(r["id"], r["mark"]): r for r in read_log(log) if "mark" in r}, {}, {}, []
    for item in (i for i in items if not i["problem"]):
        marks[item["id"]] = mark(item)
        row = known.get((item["id"], marks[item["id"]]))
        if row and not set(rows) - set(row["scores"]):
            done[item["id"]], item["notes"] = row["scores"], row["notes"]
        else:
            todo.append(item)
    for at in tqdm(range(0, len(todo), chunk), unit="chunk", disable=not todo):
        there, clips = [], []
        for item in todo[at:at + chunk]:
            try:
                clip, item["notes"] = read_item(item, folders, read)
            except UserError as error:
                item["problem"] = str(error)
                continue
            there.append(item)
            clips.append(clip)
        for item, result in zip(there, score_clips(clips, scorers, device, square, opened)):
            add_success(result)
            done[item["id"]] = {row: {k: v for k, v in scores.items() if math.isfinite(v)} for row, scores in result.items()}
            append_line(log, {"id": item["id"], "mark": marks[item["id"]], "notes": item["notes"], "scores": done[item["id"]]})
    return done


CODED = ("autoencoded source", "autoencoded truth")                     # what a perfect editor loses


def succeeds(gain, outside, coded):
    """Success as SUCCESS says it: 1.0 or 0.0. gain: dB nearer to the truth inside the true region than the source is;
    outside: PSNR to the source, NaN where there is no outside; coded: [(gain, outside)] of what a perfect editor loses,
    source and truth through the autoencoder, the source first.

    Without the margin, doing nothing would often succeed: the autoencoder's blur alone brings clips closer.
    """
    floor = max([0, *(g for g, _ in coded[:1] if not math.isnan(g))])
    spoiled = outside < min((o for _, o in coded), default=math.nan) - 1
    return float(gain >= floor + 1 and not spoiled)


def add_success(result):
    """Into {row: scores} of one clip: success, where the truth is known."""
    coded = [(result[row].get("truth_gain", math.nan), result[row]["psnr_outside"]) for row in CODED if row in result]
    for scores in result.values():
        if "truth_gain" in scores:
            scores["success"] = succeeds(scores["truth_gain"], scores["psnr_outside"], coded)


def interval(values, groups=None):
    """95 % bootstrap interval of a mean (scipy, percentile, 2,000 resamples, fixed seed). groups: a name for each value; those
    of one name, such as edits of one video, are not independent and are drawn together."""
    _, place = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)

    def mean(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)
    found = scipy.stats.bootstrap((sums, counts), mean, n_resamples=2000, method="percentile", paired=True, vectorized=True,
                                  rng=np.random.default_rng(0))
    return found.confidence_interval


def mean_cell(x, digits, intervals, sign="", groups=None):
    shown = [x.mean()] if len(x) else []
    shown += interval(x, groups) if intervals and len(x if groups is None else set(groups)) > 1 else []
    shown = [f"{value:{sign}.{digits}f}" for value in shown]
    return (shown[0] if shown else "-") + (f" [{shown[1]}, {shown[2]}]" if len(shown) > 1 else "")


def table_head(name, columns):
    return f"| {name} | n | {' | '.join(map(column_name, columns))} |\n" + "|---" * (len(columns) + 2) + "|"


def column_name(key):
    name, better = (SCORES | TRUTH | JUDGED)[key][:2]
    return name + (" (held out)" if key == HELD_OUT else "") + {"up": " ↑", "down": " ↓"}.get(better, "")


def table_row(name, rows, columns, intervals=False, sign="", groups=None):
    """One Markdown row of means over clips; where some clips lack a score, it says over how many. groups: see `interval`."""
    cells = []
    for key in columns:
        has = [i for i, r in enumerate(rows) if math.isfinite(r.get(key, math.nan))]
        x = np.array([rows[i][key] for i in has])
        cell = mean_cell(x, (SCORES | TRUTH | JUDGED)[key][2], intervals, sign, groups and [groups[i] for i in has])
        cells.append(cell + (f" (n={len(x)})" if 0 < len(x) < len(rows) else ""))
    return f"| {name} | {len(rows)} | {' | '.join(cells)} |"


def table(items, done, folders, title, columns, paper=()):
    """The benchmark as Markdown lines: this run, its tasks, the controls, the gains on them, the paper's."""
    by_row = {row: {i["id"]: done[i["id"]][row] for i in items if row in done.get(i["id"], ())}
              for row in (*folders, "untouched source", "frozen first edit")}
    main, *controls = by_row
    ours = by_row[main]
    lines = [table_head(title, columns)]

    def video_of(names):                                                # several edits of it are not independent
        return [name.rsplit("/", 1)[0] for name in names]
    lines.append(table_row("this run [95 %]", list(ours.values()), columns, intervals=True, groups=video_of(ours)))
    for by in ("task", "domain"):
        for value in dict.fromkeys(i[by] for i in items if by in i):
            part = [ours[i["id"]] for i in items if i.get(by) == value and i["id"] in ours]
            lines.append(table_row(value, part, columns))
    for name in controls:
        lines.append(table_row(f"control: {name}", list(by_row[name].values()), columns))
    for name in controls:                                               # paired: clip by clip
        both = [k for k in ours if k in by_row[name]]
        gains = [{key: ours[k].get(key, math.nan) - by_row[name][k].get(key, math.nan) for key in columns} for k in both]
        lines.append(table_row(f"this run − {name} [95 %]", gains, columns, intervals=True, sign="+", groups=video_of(both)))
    for name, values in dict(paper).items():
        row = table_row(f"copied from the paper: {name}", [dict(zip(IN_PAPER, values))], columns)
        lines.append(row.replace("| 1 |", "| |", 1))
    missing = [f"{i['id']}: {i['problem']}" for i in items if i["problem"]]
    lines += ["", f"{len(ours)} of {len(items)} clips scored."] + [f"missing: {m}" for m in missing]
    lines += [f"note: {i['id']}: {note}" for i in items for note in i.get("notes", [])]
    return lines


def benchmark_flags(parser):
    editor_flags(parser)
    parser.add_argument("--no-image-control", action="store_true", help="leave out the frame-by-frame editor and, of drawn "
                        "clips, the edit without detail")
    parser.add_argument("--out", type=Path, help="folder of edits, scores and table (default: results/…)")
    judge_flags(parser)
    parser.add_argument("--same-judge", action="store_true",
                        help="report --judge although it chose what the model was trained on")
    scorer_flags(parser)


def open_editor(args):
    """(editor, its frame's short side, options of `edit_pictures`, one line about it, a name for its folder, and that name
    without the place from which the editor was loaded: what an edit depends on)."""
    source, why = choose_model(args.model, args.weights, args.device)
    print(f"model: {source} ({why})")
    if args.judge:
        check_judge(args.judge, source, args.same_judge)
    ed = VideoEditor.from_pretrained(source, device=args.device)
    (size, options), mark = settings(args, ed), stamp(ed)
    steps, s_txt, s_src = (options[k] for k in ("steps", "s_txt", "s_src"))
    title = f"{source} {mark}, text {s_txt:g}, source {s_src:g}, {steps} steps, seed {args.seed}, {size} px"
    title += ", without detail" * args.no_detail
    how = f"{mark}_t{s_txt:g}_s{s_src:g}_n{steps}_seed{args.seed}_{size}px" + "_detail" * (not args.no_detail)
    return ed, size, options | {"detail": not args.no_detail}, title, f"{Path(source).name}-{how}", how


def score_and_report(items, folders, scorers, square, device, out, title, read, report):
    """Score, print the lines that report(done) gives, and write them beside every clip's scores."""
    head = {"title": title, "scorers": {k: str(v) for k, v in scorers.items()}, "square": square}
    done = score_benchmark(items, folders, scorers, square, device, out / "scores.jsonl", read)
    lines = report(done) + [f"scorers: {', '.join(f'{k} {v}' for k, v in head['scorers'].items())}"]
    write_aside(out / "table.md", "\n".join(lines) + "\n")
    clips = [item | {"scores": done.get(item["id"], {})} for item in items]
    write_aside(out / "scores.json", json.dumps(head | {"clips": clips}, indent=1))
    print(*lines, f"table and every clip's scores: {out}", sep="\n")
    if not done:
        raise UserError(f"none of {len(items)} clips could be scored; {items[0]['problem'] if items else 'there is none'}")


def main_tgve(argv):
    parser = Parser(prog="metrics.py tgve", description="Run and score TGVE or TGVE+; prints one Markdown table.")
    parser.add_argument("dir", type=Path,
                        help="LOVEU-TGVE-2023 as published: CSV, video folders, InsV2V's prompt JSON")
    parser.add_argument("--plus", action="store_true", help="TGVE+: DIR also holds facebook/tgve_plus")
    parser.add_argument("--prompts", type=Path, help="InsV2V's prompt JSON (default: *prompt*.json in DIR)")
    parser.add_argument("--outputs", type=Path,
                        help="score these edits, <set>/<video>/<task>/00000.jpg, and edit nothing")
    parser.add_argument("--limit", type=int, default=-1, help="only the first N clips (-1: all)")
    benchmark_flags(parser)
    args = parser.parse_args(argv)
    check_ranges(parser, args, size=(8, 2048))
    if args.limit == 0 or args.limit < -1:
        raise UserError(f"--limit {args.limit}: must be at least 1, or -1 for all clips")

    name = "tgve_plus" if args.plus else "tgve"
    items = read_tgve_plus(args.dir) if args.plus else read_tgve(args.dir, args.prompts)
    items = items if args.limit == -1 else items[:args.limit]
    marks = {path: content_mark(path) for path in {item["path"] for item in items} if path}
    items = [item | {"mark": marks.get(item["path"], "")} for item in items]
    scorers, square, _ = choose_scorers(args)
    columns = (*COLUMNS[:-1], *JUDGED, HELD_OUT) if args.judge else COLUMNS
    if args.outputs:
        if not args.outputs.is_dir():
            raise UserError(f"--outputs {args.outputs}: no such directory")
        place = args.outputs.resolve()
        label = f"{place.name}-{zlib.crc32(str(place).encode()):08x}"
        out, title = args.out or ROOT / "results" / name / label, str(args.outputs)
        folders = {"edit": args.outputs}
    else:
        ed, size, options, title, label, how = open_editor(args)
        out = args.out or ROOT / "results" / name / label
        folders = {"edit": out / "edit"}
        if not args.no_image_control:
            folders["image editor, frame by frame"] = out / "image"
        for folder, mode in zip(folders.values(), ("auto", "image")):
            edit_benchmark(items, folder, lambda item: run_editor(ed, item, read_source(item)["source"], size,
                                                                  options | {"mode": mode}), f"{how}, {mode}")
        del ed                                      # its memory is the scorers' now
    score_and_report(items, folders, scorers, square, args.device, out, title, read_source,
                     lambda done: table(items, done, folders, title, columns, PAPER[name]))


def read_source(item):
    frames = load_frames(item["path"])[0]
    return {"source": thin(frames), "length": len(frames)}


def write_aside(path, text):
    """A text file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# The same protocol in the shapes world, where the true edit is known
# ------------------------------------------------------------------------------------------------------------

WORLD_COLUMNS = (*COLUMNS[:-1], "ssim_outside", "psnr_truth", "ssim_truth", "truth_gain", "success", *JUDGED,
                 HELD_OUT)


def world_items(n, which, domains):
    """n held-out clips of the shapes world, tasks and domains in turn; more of them begin with the same ones.

    Scenes, wordings and combinations are of the world's "held" split, with seeds that no other script uses.
    `known`: the result follows from source and instruction alone, so there is one true edit.
    """
    items, number = [], 7_000_000 + 100_000 * which
    while len(items) < n:
        number += 1
        turn, at = divmod(len(items), len(world.TASKS))
        task, domain = world.TASKS[at], domains[(at + turn) % len(domains)]
        scene = world.draw_scene(number, domain, "held")
        if task in world.possible_tasks(scene):
            edit = world.propose_edit(scene, number, task, "held")
            items.append(dict(id=f"{domain}/{number}/{task}", task=task, domain=domain, number=number,
                              source_caption=edit.source_caption, target_caption=edit.target_caption,
                              instruction=edit.instruction, known=edit.deterministic, problem=None))
    return items


def world_clip(item, n_frames, size):
    """An item's source and true edit, (F, S, S, 3) uint8, and the true region (F, S, S) bool: where the edit
    changes the picture by more than 4 %, or everywhere for a global one."""
    scene = world.draw_scene(item["number"], item["domain"], "held")
    edit = world.propose_edit(scene, item["number"], item["task"], "held")
    source, truth = (world.quantise(world.render(s, n_frames, size, size)) for s in (scene, edit.target))
    return source, truth, world.true_region(source, truth, edit.is_global)


def through_autoencoder(ed, frames):
    return to_u8(ed.decode(ed.encode(to_video(frames)) * ed.vae.scaling_factor))


def total_score(rows, weights=WEIGHTS, centre=None, spread=None):
    """The filter's total of N candidates: (N,) weighted mean of the scores that all of them have, less `centre` and
    divided by `spread` ({score: value}, from `curate.py calibrate`); without those, by their own mean and deviation."""
    keys = [key for key in weights if all(row.get(key) is not None for row in rows)]
    x = np.array([[row[key] for key in keys] for row in rows], float).reshape(len(rows), -1)       # (N, K)
    w = np.array([weights[key] for key in keys], float)
    centre, spread = (x.mean(0), x.std(0)) if centre is None else (np.array([d[k] for k in keys]) for d in (centre, spread))
    return ((x - centre) / np.maximum(spread, 1e-6)) @ w / max(w.sum(), 1e-9)


def agreement_table(items, done, candidates):
    """Markdown lines: Spearman's correlation of every score and of the total with the PSNR gain to the truth.

    Within a clip: over its candidates, then the mean over clips (which candidate is best?); pooled: over all
    candidates of all clips (which should go?). Scores with an ideal of 0 or 1 count by the distance from it.
    """
    known = [i["id"] for i in items if "truth_gain" in done.get(i["id"], {}).get(candidates[0], {})]
    if not known or len(candidates) < 3:
        return ["agreement: needs clips with a known truth and at least 3 candidates of each"]

    def values(key):                                                    # (clips, candidates)
        return np.array([[done[k][c].get(key, math.nan) for c in candidates] for k in known])
    scores = {}
    for key, (name, better, *_) in SCORES.items():
        if better in ("0", "1"):
            scores[f"{name} (distance from {better})"] = -abs(values(key) - int(better))
        elif better == "up":
            scores[name + " (held out)" * (key == HELD_OUT)] = values(key)
    rows = [done[k][c] for k in known for c in candidates]
    scores["weighted total"] = total_score(rows).reshape(len(known), -1)
    lines = ["| score | clips | inside, within a clip [95 %] | inside, pooled | whole, within a clip [95 %] "
             "| whole, pooled |", "|---|---|---|---|---|---|"]
    for name, x in scores.items():
        full = np.isfinite(x).all(1) & (np.ptp(x, axis=1) > 1e-9)       # clips that this score tells apart
        cells = [str(full.sum())]
        for gain in ("truth_gain", "whole_gain"):                       # inside the true region, overall
            y = values(gain)
            each = np.array([spearman(a, b) for a, b in zip(x[full], y[full])])
            each = each[np.isfinite(each)]
            cells.append(mean_cell(each, 2, True))
            cells.append(f"{spearman(x[full].ravel(), y[full].ravel()):.2f}")
        if full.any():
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, f"{len(candidates)} candidates of each clip; preservation is outside the true region"]


def spearman(x, y):
    """Rank correlation; NaN where one side is empty or constant."""
    varied = all(len(a) and np.ptp(a) > 1e-9 for a in (x, y))
    return float(scipy.stats.spearmanr(x, y).statistic) if varied else math.nan


def sweep(items, done, grid, columns, path):
    """Fidelity against preservation for every guidance: Markdown lines, and the same as a scatter in a PNG.

    grid: {(text, source): rows of `done`, one per seed}.
    """
    lines = [table_head("text, source", columns)]
    panels = {key: {} for key in ("truth_gain", HELD_OUT) if key in columns}
    for (s_txt, s_src), candidates in grid.items():
        rows = [done[i["id"]][c] for i in items for c in candidates if c in done.get(i["id"], {})]
        lines.append(table_row(f"{s_txt:g}, {s_src:g}", rows, columns))
        for key, series in panels.items():
            means = [np.mean([r[k] for r in rows if k in r] or [math.nan]) for k in ("psnr_outside", key)]
            series.setdefault(s_src, []).append((s_txt, *means))
    sheet = np.concatenate([np.asarray(scatter(series, column_name("psnr_outside"), column_name(key)))
                            for key, series in panels.items()], 1)
    with aside(path) as part:
        Image.fromarray(sheet).save(part, "PNG")
    return lines


def scatter(series, x_name, y_name, width=640, height=480, margin=64):
    """A picture of {source guidance: [(text guidance, x, y)]}: a coloured line each, points labelled."""
    picture, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(picture)
    points = np.array([(x, y) for line in series.values() for _, x, y in line if math.isfinite(x + y)])
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(2), np.ones(2))
    pad = np.maximum(0.08 * (high - low), 1e-3)
    low, high = low - pad, high + pad

    def place(x, y):
        share = (np.array([x, y]) - low) / (high - low)
        across, up = share * (width - 1.5 * margin, height - 1.5 * margin)
        return margin + across, height - margin - up
    for i in range(5):                                                  # axes: five ticks each
        x, y = low + (high - low) * i / 4
        at_x, at_y = place(x, low[1]), place(low[0], y)
        draw.line([at_x, (at_x[0], margin / 2)], "#ddd")
        draw.line([at_y, (width - margin / 2, at_y[1])], "#ddd")
        draw.text((at_x[0], at_x[1] + 4), f"{x:.3g}", "black", font, anchor="mt")
        draw.text((at_y[0] - 4, at_y[1]), f"{y:.3g}", "black", font, anchor="rm")
    draw.text((width / 2, height - 22), x_name.replace("↑", "(up)"), "black", font, anchor="mt")
    draw.text((margin, 6), y_name.replace("↑", "(up)"), "black", font)
    for i, (s_src, line) in enumerate(series.items()):
        colour = ("#0066cc", "#cc3300", "#228833", "#aa3377", "#777700", "#000000")[i % 6]
        spots = [(s_txt, *place(x, y)) for s_txt, x, y in line if math.isfinite(x + y)]
        draw.line([(x, y) for _, x, y in spots], colour, 2)
        for s_txt, x, y in spots:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
            draw.text((x + 6, y - 6), f"{s_txt:g}", colour, font, anchor="lb")
        draw.text((width - margin / 2, 6 + 18 * i), f"source {s_src:g}", colour, font, anchor="rt")
    return picture


def main_shapes(argv):
    parser = Parser(prog="metrics.py shapes",
                    description="Regression test for quality: held-out drawn clips whose true edit is known.")
    parser.add_argument("--n", type=int, help="clips (default: 200; with --sweep or --agreement 24)")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--domain", default="both", choices=["both", "synthetic", "real"], help="of scenes")
    parser.add_argument("--clips", type=int, default=0, help="which clips: another number draws others")
    parser.add_argument("--sweep", action="store_true", help="guidance grid: fidelity against preservation")
    parser.add_argument("--agreement", action="store_true",
                        help="the grid with two seeds: which scores agree with the truth?")
    parser.add_argument("--grid-text", type=float, nargs="+", help="text guidance of the grid")
    parser.add_argument("--grid-source", type=float, nargs="+", help="source guidance of the grid")
    benchmark_flags(parser)
    args = parser.parse_args(argv)
    check_ranges(parser, args, size=(8, 2048), clips=(0, 1e6), n=(1, 1e5))
    for flag, high, values in (("--grid-text", 30, args.grid_text), ("--grid-source", 10, args.grid_source)):
        if not all(0 <= x <= high for x in values or ()):
            raise UserError(f"{flag} {' '.join(f'{x:g}' for x in values)}: all must lie between 0 and {high}")
    in_grid = args.sweep or args.agreement
    n = args.n if args.n is not None else 24 if in_grid else 200
    scorers, square, _ = choose_scorers(args)
    ed, size, options, title, label, how = open_editor(args)
    if size % ed.multiple:
        raise UserError(f"--size {size}: drawn clips need a multiple of {ed.multiple}")
    items = world_items(n, args.clips, ["synthetic", "real"] if args.domain == "both" else [args.domain])
    title += f", {args.frames} frames, clips {args.clips}"
    out = args.out or ROOT / f"results/shapes/{label}_f{args.frames}_clips{args.clips}{'_grid' * in_grid}"

    def clip(item):
        return world_clip(item, args.frames, size)
    items = [item | {"mark": f"{zlib.crc32(b''.join(x.tobytes() for x in clip(item)[:2])):08x}"} for item in items]

    cfg, detail = (options["s_txt"], options["s_src"]), options["detail"]
    if in_grid:
        texts = args.grid_text or [round(cfg[0] * f, 2) for f in (2 / 3, 1, 1.5, 2.5)]
        sources = args.grid_source or [round(cfg[1] * f, 2) for f in (0.8, 1, 1.3)]
        seeds = range(args.seed, args.seed + 1 + args.agreement)
        runs = [(f"t{t:g}_s{s:g}_seed{k}", t, s, k, "auto", detail) for s in sources for t in texts for k in seeds]
    else:
        runs = [("edit", *cfg, args.seed, "auto", detail), ("image editor, frame by frame", *cfg, args.seed, "image", detail),
                ("without detail", *cfg, args.seed, "auto", False)]
        runs = runs[:1 if args.no_image_control else 2 + detail]
    folders, grid = {}, {}                          # {row: folder}, {(text, source): its rows}
    for row, s_txt, s_src, seed, mode, detailed in runs:
        folders[row] = out / row.replace(",", "").replace(" ", "_")
        grid.setdefault((s_txt, s_src), []).append(row)
        changed = options | dict(s_txt=s_txt, s_src=s_src, seed=1_000_003 * seed, mode=mode, detail=detailed)
        edit_benchmark(items, folders[row],
                       lambda item: run_editor(ed, item, clip(item)[0], size, changed), f"{how}, {row}, {mode}", ".png")
    for k, row in enumerate(CODED):                 # source, truth
        folders[row] = out / row.replace(" ", "_")
        edit_benchmark(items, folders[row], lambda item: through_autoencoder(ed, clip(item)[k]), f"{how}, {row}", ".png")
    del ed                                          # its memory is the scorers' now

    def read(item):
        source, truth, mask = clip(item)
        return {"source": source, "mask": mask} | ({"truth": truth} if item["known"] else {})

    def report(done):
        seen = {key for rows in done.values() for scores in rows.values() for key in scores}
        columns = [key for key in WORLD_COLUMNS if key in seen]
        lines = [f"{title}; guidance varied", ""] if in_grid else table(items, done, folders, title, columns)
        if args.sweep:
            picture = out / "sweep.png"
            lines += [*sweep(items, done, grid, columns, picture), f"scatter: {picture}", ""]
        if args.agreement:
            lines += ["Spearman's correlation with the gain in PSNR to the truth", "",
                      *agreement_table(items, done, sum(grid.values(), []))]
        return lines + ["", SUCCESS, "truth: of edits whose result follows from source and instruction alone"]
    score_and_report(items, folders, scorers, square, args.device, out, title, read, report)


# ------------------------------------------------------------------------------------------------------------
# User study, as in the paper: two edits side by side, three questions
# ------------------------------------------------------------------------------------------------------------

QUESTIONS = {"text": "Which video follows the caption better?",
             "structure": "Which keeps the source's structure better?", "quality": "Which looks better?"}


def find_clips(folder):
    """{name: video file or folder of frames} of everything below a folder: edited/cat.mp4 -> "cat"."""
    found = [p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    videos = {str(p.relative_to(folder).with_suffix("")): p for p in found
              if p.suffix.lower() in (".mp4", ".webm", ".mov", ".mkv", ".gif") or p.name in ("source.png", "target.png")}
    frames = {str(p.parent.relative_to(folder)): p.parent for p in found
              if p.suffix.lower() in (".jpg", ".jpeg", ".png") and p.parent != folder and p.name not in ("source.png", "target.png")}
    return frames | videos


def plays_in_browsers(path):
    with open_video(path) as (_, stream):
        return stream.codec_context.name in ("h264", "vp8", "vp9", "av1", "libdav1d", "libvpx-vp9")


def data_url(path, fps=8):
    """A clip as a data: URL that browsers play; frames, other containers and other codecs are written as mp4 first."""
    if path.suffix.lower() in (".mp4", ".webm") and plays_in_browsers(path):
        blob, kind = path.read_bytes(), path.suffix[1:].lower()
    else:
        with tempfile.TemporaryDirectory() as folder:
            clip = probe(path, fps)
            _, tick, lengths = plan(clip)
            with video_writer(Path(folder) / "clip.mp4", clip.width, clip.height, clip.rate, tick, clip.pixel) as write:
                for (ticks, rgb), length in zip(read_frames(clip), lengths):
                    write(rgb, ticks, length)
            blob, kind = (Path(folder) / "clip.mp4").read_bytes(), "mp4"
    return f"data:video/{kind};base64,{base64.b64encode(blob).decode()}"


def main_study(argv):
    parser = Parser(prog="metrics.py study", description="One HTML page that asks which of two edits is better, or how good one is.")
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR",
                        help="edits A, edits B [sources]; with --rate: edits [sources]; paired by name")
    parser.add_argument("--captions", type=Path,
                        help="JSON {clip's name: caption} (default: captions.json in the first DIR)")
    parser.add_argument("--rate", action="store_true", help="1 to 5 for one edit, to calibrate the filter")
    parser.add_argument("--out", type=Path, default=Path("study.html"), help="page to write")
    args = parser.parse_args(argv)
    n_edits = 1 if args.rate else 2
    if not n_edits <= len(args.dirs) <= n_edits + 1:
        raise UserError(f"study: {len(args.dirs)} folders; it takes {n_edits} of edits, then one of sources")
    for folder in args.dirs:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such directory")
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; name the page")
    clips, said = [find_clips(folder) for folder in args.dirs], {}
    if args.rate and len(clips) == 1 and any(args.dirs[0].glob("manifest*.jsonl")):         # a data set of curate.py
        import curate
        rows = {f"{row['id']}/target": row for row in curate.read_manifest(args.dirs[0]) if row["kept"]}
        clips = [{name: clips[0][name.replace("target", key)] for name in rows} for key in ("target", "source")]
        said = {name: row["instruction"] for name, row in rows.items()}
    names = sorted(set.intersection(*map(set, clips[:n_edits])))
    if not names:
        raise UserError(f"{args.dirs[0]}, {args.dirs[n_edits - 1]}: no clips of the same name in both")
    alone = sorted(set.union(*map(set, clips[:n_edits])) - set(names))
    if alone:
        print(f"left out, in one folder only: {', '.join(alone)}")
    file = args.captions or args.dirs[0] / "captions.json"
    captions = read_json(file) if args.captions or file.is_file() else said
    items = []
    for name in names:
        paths = {key: found.get(name) or found.get(str(Path(name).parent))      # one source for several tasks
                 for key, found in zip(("a", "source") if args.rate else ("a", "b", "source"), clips)}
        rates = [float(probe(path).rate) for path in paths.values() if path and not path.is_dir()]
        item = {"name": name, "caption": str(captions.get(name, ""))}
        items.append(item | {key: data_url(path, rates[0] if rates else 8) for key, path in paths.items() if path})
    labels = [folder.resolve().name for folder in args.dirs[:n_edits]]
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:8]
    data = {"id": f"{'-'.join(labels)}-{digest}", "rating": args.rate,
            "names": [str(folder) for folder in args.dirs[:n_edits]], "questions": QUESTIONS, "items": items}
    if args.rate:
        data["questions"] = {"text": "How well does it follow the caption? (1 not at all, 5 fully)",
                             "structure": "How well does it keep the source?",
                             "quality": "How good does it look?"}
    text = json.dumps(data).replace("<", "\\u003c")                    # no name or caption can end the script
    page = (ROOT / "assets/study.html").read_text(encoding="utf-8")
    write_aside(args.out, page.replace("@DATA@", text))
    print(f"{args.out}: {len(items)} clips, {args.out.stat().st_size / 2 ** 20:.1f} MB; open it in a browser")


def main_votes(argv):
    parser = Parser(prog="metrics.py votes", description="Win rates from the JSON files that the study's page saves.")
    parser.add_argument("files", nargs="+", type=Path)
    files = {path: read_json(path) for path in parser.parse_args(argv).files}
    for path, file in files.items():
        if not {"study", "rating", "names", "answers"} <= set(file):
            raise UserError(f"{path}: holds no answers of a study; pass what the page's button saved")
        if file["rating"]:
            raise UserError(f"{path}: holds ratings, not votes; curate.py calibrate reads them")
        answers = file["answers"].values() if isinstance(file["answers"], dict) else [None]
        whole = isinstance(file["study"], str) and isinstance(file["names"], list) and len(file["names"]) == 2
        if not whole or not all(isinstance(x, dict) and all(v in ("a", "b") for v in x.values()) for x in answers):
            raise UserError(f"{path}: needs a study, two names and answers a or b, as the page's button saves them")
    studies = {file["study"] for file in files.values()}
    if len(studies) > 1:
        raise UserError(f"votes: files of several studies, {', '.join(sorted(studies))}; pass those of one")
    people = {file.get("person", str(path)): file for path, file in files.items()}      # the last file of each
    a, b = next(iter(people.values()))["names"]
    print(f"{a} against {b}: {len(people)} {'person' if len(people) == 1 else 'people'}")
    print("| question | n | wins, % | 95 % |", "|---|---|---|---|", sep="\n")
    rates = []
    for question in QUESTIONS:
        votes = [vote[question] for file in people.values() for vote in file["answers"].values() if question in vote]
        if votes:
            test = scipy.stats.binomtest(votes.count("a"), len(votes))
            low, high = test.proportion_ci(method="exact")
            rates.append(test.statistic)
            print(f"| {question} | {len(votes)} | {100 * test.statistic:.1f} | {100 * low:.1f} to {100 * high:.1f} |")
    if not rates:
        raise UserError("votes: no answers in these files")
    print(f"| average | | {100 * np.mean(rates):.1f} | |")



# ============================================================================================================
def main():
    commands = {"tgve": main_tgve, "shapes": main_shapes, "study": main_study, "votes": main_votes}
    name, *rest = sys.argv[1:] or ["--help"]
    commands[name](rest) if name in commands else main_clip([name, *rest])


if __name__ == "__main__":
    run(main)
