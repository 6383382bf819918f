"""Scores of an edit, computed as their sources compute them, and the networks behind them.

    python metrics.py edited.mp4 --source video.mp4 --instruction "make it snow" \\
                      --source-caption "a street" --target-caption "a street in the snow"

Contents: CLIP (also PickScore), DINOv2, ViCLIP; one function per score; scoring one clip.
Every network returns un-normalised projected features, so that a clip is encoded once and all its scores share the result.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.functional as F
from PIL import Image

from model import (ACTIVATIONS, CLIPEncoder, TextModel, Tokenizer, UserError, attention, hub_dir, load_weights,
                   read_json, read_tensors, run)


# ---------------------------------------------------------------------------------------------------------------
# Images in
# ---------------------------------------------------------------------------------------------------------------

def to_u8(images):
    """A video or image tensor in [-1, 1] (..., 3, H, W), one PIL image, or a list of PIL images or uint8 arrays (H, W, 3)
    -> list of uint8 arrays (H, W, 3)."""
    if torch.is_tensor(images):
        x = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return list(x.reshape(-1, *x.shape[-3:]).permute(0, 2, 3, 1).contiguous().numpy())
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]
    return [np.asarray(im.convert("RGB") if isinstance(im, Image.Image) else im) for im in images]


def resize_crop(image, resize, crop):
    """uint8 (H, W, 3) -> uint8 (crop, crop, 3): shortest side to `resize` (PIL bicubic, antialiased), then the centre.

    The long side is truncated, not rounded, and an odd margin leaves the extra pixel below and on the right, as in the
    published image processors.
    """
    height, width = image.shape[:2]
    if min(height, width) != resize:
        size = (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
        image = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))      # size is (width, height)
    top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
    return image[top:top + crop, left:left + crop]


class Preprocess:
    """`preprocessor_config.json` as a function: images (see `to_u8`) -> normalised pixel_values (N, 3, S, S) float32."""

    def __init__(self, cfg):
        side = lambda v: v if isinstance(v, int) else v.get("shortest_edge") or v["height"]     # 224 or {"height": 224, …}
        self.resize, self.crop = side(cfg["size"]), side(cfg["crop_size"])
        self.mean, self.std = torch.tensor(cfg["image_mean"]), torch.tensor(cfg["image_std"])

    def bytes(self, images):
        """Everything before the normalisation: (N, S, S, 3) uint8. Small enough to keep for a whole benchmark."""
        return np.stack([resize_crop(im, self.resize, self.crop) for im in to_u8(images)])

    def normalise(self, u8):
        """(N, S, S, 3) uint8 -> (N, 3, S, S) float32."""
        x = torch.from_numpy(np.ascontiguousarray(u8)).float() / 255
        return ((x - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()

    def __call__(self, images):
        return self.normalise(self.bytes(images))


# ---------------------------------------------------------------------------------------------------------------
# CLIP (Radford et al. 2021), transformers' names; PickScore (Kirstain et al. 2023) is CLIP-H, fine-tuned, with other numbers
# ---------------------------------------------------------------------------------------------------------------

class VisionEmbeddings(nn.Module):
    def __init__(self, width, image_size, patch_size):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, width)

    def forward(self, pixel_values):
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)               # (N, patches, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return x + self.position_embedding.weight


class VisionModel(nn.Module):
    """CLIP's image tower: pixel_values (N, 3, S, S) -> class token after the last norm (N, D)."""

    def __init__(self, cfg):
        super().__init__()
        width, eps = cfg["hidden_size"], cfg.get("layer_norm_eps", 1e-5)
        self.embeddings = VisionEmbeddings(width, cfg["image_size"], cfg["patch_size"])
        self.pre_layrnorm = nn.LayerNorm(width, eps)                                    # sic
        self.encoder = CLIPEncoder(width, cfg["num_hidden_layers"], cfg["num_attention_heads"],
                                   cfg["intermediate_size"], cfg["hidden_act"], eps)
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixel_values):
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Both towers of CLIP from a transformers-style config {projection_dim, text_config, vision_config}.

    encode_image: pixel_values (N, 3, S, S) -> (N, P); encode_text: ids (N, 77) -> (N, P); neither normalised, float32.
    `CLIP(config)` is randomly initialised and trains; `CLIP.from_pretrained` also brings `.tokenizer` and `.preprocess`.
    """

    def __init__(self, cfg):
        super().__init__()
        text, vision = cfg["text_config"], cfg["vision_config"]
        self.image_size = vision["image_size"]
        self.text_model, self.vision_model = TextModel(text), VisionModel(vision)
        self.text_projection = nn.Linear(text["hidden_size"], cfg["projection_dim"], bias=False)
        self.visual_projection = nn.Linear(vision["hidden_size"], cfg["projection_dim"], bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))               # log of the inverse temperature
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """OpenAI's initialisation: residual branches shrink with depth, so that the sum of all layers keeps its scale."""
        for tower, proj in ((self.text_model, self.text_projection), (self.vision_model, self.visual_projection)):
            layers, width = tower.encoder.layers, proj.in_features
            for layer in layers:
                for lin in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    nn.init.normal_(lin.weight, std=width ** -0.5)
                for lin in (layer.self_attn.out_proj, layer.mlp.fc2):
                    nn.init.normal_(lin.weight, std=(2 * width * len(layers)) ** -0.5)
                nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
                for name, bias in layer.named_parameters():
                    if name.endswith("bias"):
                        nn.init.zeros_(bias)
            nn.init.normal_(proj.weight, std=width ** -0.5)
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)
        emb = self.vision_model.embeddings
        nn.init.normal_(emb.class_embedding, std=len(emb.class_embedding) ** -0.5)
        nn.init.normal_(emb.position_embedding.weight, std=len(emb.class_embedding) ** -0.5)

    @classmethod
    def from_pretrained(cls, source):
        """source: a hub id (openai/clip-vit-large-patch14, yuvalkirstain/PickScore_v1, …) or a directory in that layout."""
        folder = hub_dir(source, ["*.json", "merges.txt", "model.safetensors"])
        with torch.device("meta"):
            net = cls(read_json(folder / "config.json"))
        load_weights(net, read_tensors(folder / "model.safetensors"), folder.name, drop=("position_ids",))
        net.tokenizer = Tokenizer(folder / "vocab.json", folder / "merges.txt")
        net.preprocess = Preprocess(read_json(folder / "preprocessor_config.json"))
        return net.eval()

    def encode_image(self, pixel_values):
        x = pixel_values.to(self.visual_projection.weight)                              # device and dtype of the weights
        return self.visual_projection(self.vision_model(x)).float()

    def encode_text(self, ids):
        ids = ids.to(self.text_projection.weight.device)
        x = self.text_model(ids)                                                        # (N, 77, D)
        # the end token has the largest id of the vocabulary, and argmax takes the first of several
        return self.text_projection(x[torch.arange(len(x), device=x.device), ids.argmax(-1)]).float()


# ---------------------------------------------------------------------------------------------------------------
# DINOv2 (Oquab et al. 2023), with and without registers (Darcet et al. 2023), transformers' names
# ---------------------------------------------------------------------------------------------------------------

class DINOEmbeddings(nn.Module):
    def __init__(self, width, image_size, patch_size, n_registers):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))                           # in the file, unused at inference
        if n_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, n_registers, width))
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(3, width, patch_size, patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))

    def forward(self, pixel_values, rule):
        x = self.patch_embeddings.projection(pixel_values)                              # (N, D, h, w)
        pos = resize_positions(self.position_embeddings, x.shape[-2:], rule)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + pos
        if hasattr(self, "register_tokens"):                                            # registers have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        return x


def resize_positions(table, grid, rule):
    """The square position table (1, 1 + n*n, D) for another grid (h, w), bicubic in float32. Three published rules:

    "size"       to the size, no antialias: transformers' Dinov2Model
    "antialias"  to the size with antialias: the register models, in both code bases
    "scale"      by the factors (h + 0.1)/n, (w + 0.1)/n: facebookresearch/dinov2 without registers
    They agree at the table's own grid and differ by up to 0.3 in the features elsewhere.
    """
    n = round((table.shape[1] - 1) ** 0.5)
    if tuple(grid) == (n, n):
        return table
    pos = table[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)                 # (1, D, n, n)
    if rule == "scale":
        pos = F.interpolate(pos, scale_factor=tuple((side + 0.1) / n for side in grid), mode="bicubic")
    else:
        pos = F.interpolate(pos, size=tuple(grid), mode="bicubic", antialias=rule == "antialias")
    return torch.cat([table[:, :1], pos.flatten(2).transpose(1, 2).to(table)], 1)


class DINOLayer(nn.Module):
    def __init__(self, width, heads, mlp, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width)})})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
        self.layer_scale1, self.layer_scale2 = nn.Module(), nn.Module()
        self.layer_scale1.lambda1 = nn.Parameter(torch.ones(width))
        self.layer_scale2.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x):                                                               # (N, L, D)
        y, qkv = self.norm1(x), self.attention["attention"]
        y = attention(qkv["query"](y), qkv["key"](y), qkv["value"](y), self.heads)
        x = x + self.layer_scale1.lambda1 * self.attention["output"]["dense"](y)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + self.layer_scale2.lambda1 * y


class DINOv2(nn.Module):
    """encode_image: pixel_values (N, 3, H, W), sides divisible by the patch size -> class feature (N, D), not normalised.

    `rule`: how positions are interpolated, see `resize_positions`; None picks what transformers does for the model.
    """

    def __init__(self, cfg, rule=None):
        super().__init__()
        if cfg.get("use_swiglu_ffn"):
            raise UserError("DINOv2: use_swiglu_ffn (the giant model) is not supported; use small, base or large")
        width, eps, self.n_registers = cfg["hidden_size"], cfg["layer_norm_eps"], cfg.get("num_register_tokens", 0)
        self.image_size, self.patch_size = cfg["image_size"], cfg["patch_size"]
        self.rule = rule or ("antialias" if self.n_registers else "size")
        self.embeddings = DINOEmbeddings(width, self.image_size, self.patch_size, self.n_registers)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            DINOLayer(width, cfg["num_attention_heads"], width * cfg["mlp_ratio"], eps)
            for _ in range(cfg["num_hidden_layers"]))
        self.layernorm = nn.LayerNorm(width, eps)

    @classmethod
    def from_pretrained(cls, source, rule=None):
        """source: facebook/dinov2-base, facebook/dinov2-with-registers-large, …, or a directory in that layout."""
        folder = hub_dir(source, ["*.json", "model.safetensors"])
        with torch.device("meta"):
            net = cls(read_json(folder / "config.json"), rule)
        load_weights(net, read_tensors(folder / "model.safetensors"), folder.name)
        net.preprocess = Preprocess(read_json(folder / "preprocessor_config.json"))
        return net.eval()

    def forward(self, pixel_values):
        """All tokens after the last norm (N, 1 + registers + patches, D)."""
        x = self.embeddings(pixel_values.to(self.layernorm.weight), self.rule)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x).float()

    def encode_image(self, pixel_values):
        return self(pixel_values)[:, 0]


# ---------------------------------------------------------------------------------------------------------------
# ViCLIP (Wang et al. 2023, InternVid): OpenAI's CLIP names, frames joined into one sequence
# ---------------------------------------------------------------------------------------------------------------

class ViCLIPBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Module()                                                         # nn.MultiheadAttention's packing
        self.attn.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, causal=False):                                                 # (N, L, D)
        q, k, v = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, -1)
        x = x + self.attn.out_proj(attention(q, k, v, self.heads, causal=causal))
        return x + self.mlp["c_proj"](ACTIVATIONS["quick_gelu"](self.mlp["c_fc"](self.ln_2(x))))


class ViCLIPTower(nn.Module):
    """What both towers share: blocks under `transformer.resblocks`."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ViCLIPBlock(width, heads) for _ in range(layers))


class ViCLIPVision(ViCLIPTower):
    def __init__(self, cfg):
        width = cfg["vision_width"]
        super().__init__(width, cfg["vision_layers"], cfg["vision_heads"])
        patch, init = cfg["patch_size"], width ** -0.5
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(init * torch.randn(width))
        self.positional_embedding = nn.Parameter(init * torch.randn((cfg["image_size"] // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, cfg["num_frames"], width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.proj = nn.Parameter(init * torch.randn(width, cfg["embed_dim"]))

    def forward(self, video):                                                           # (N, F, 3, S, S)
        x = self.conv1(video.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)            # (N, F, patches, D)
        when = self.temporal_positional_embedding                                       # (1, 8, D)
        when = when.mean(1, keepdim=True) if x.shape[1] == 1 else when                  # one frame: no place in time
        x = (x + self.positional_embedding[1:] + when[:, :, None]).flatten(1, 2)
        cls = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([cls, x], 1))                                         # (N, 1 + F*patches, D)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class ViCLIPText(ViCLIPTower):
    def __init__(self, cfg):
        width = cfg["text_width"]
        super().__init__(width, cfg["text_layers"], cfg["text_heads"])
        self.token_embedding = nn.Embedding(cfg["vocab_size"], width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(cfg["context_length"], width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, cfg["embed_dim"]))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids):                                                             # (N, 32)
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        x = self.ln_final(x)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)] # at the end token, the largest id
        return x @ self.text_projection


class ViCLIP(nn.Module):
    """encode_video: (N, 8 or 1, 3, S, S) normalised -> (N, P); encode_text: ids (N, 32) -> (N, P); not normalised.

    cfg: image_size, patch_size, num_frames, {vision,text}_{width,layers,heads}, context_length, vocab_size, embed_dim.
    All tokens are used: the published code drops 90 % of them unless told otherwise, which is for training only.
    """

    def __init__(self, cfg):
        super().__init__()
        self.image_size, self.n_frames, self.context = cfg["image_size"], cfg["num_frames"], cfg["context_length"]
        self.temp = nn.Parameter(torch.tensor(1 / 100.0))                               # training temperature, not in scores
        self.vision_encoder, self.text_encoder = ViCLIPVision(cfg), ViCLIPText(cfg)

    @classmethod
    def from_pretrained(cls, source):
        """source: OpenGVLab/ViCLIP (gated: accept its terms and log in), or a directory with the .pth or a model.safetensors,
        and the vocabulary. Sizes come from the tensors; head counts are width/64 unless a JSON beside the file gives them."""
        names = ["ViClip-InternVid-10M-FLT.pth", "model.safetensors", "bpe_simple_vocab_16e6.txt.gz", "*.json"]
        folder = hub_dir(source, names)
        path = next((folder / n for n in names[:2] if (folder / n).is_file()), None)
        if path is None:
            raise UserError(f"{source}: holds neither {names[0]} nor {names[1]}; pass a directory with ViCLIP's weights")
        tensors = read_tensors(path)
        cfg = viclip_sizes(tensors)
        for name in ("config.json", "mini_sizes.json"):
            if (folder / name).is_file():
                cfg.update({k: v for k, v in read_json(folder / name).items() if k in cfg})
        with torch.device("meta"):
            net = cls(cfg)
        load_weights(net, tensors, path.name)
        net.tokenizer = Tokenizer.from_bpe_gz(folder / "bpe_simple_vocab_16e6.txt.gz", pad=0)
        return net.eval()

    def encode_video(self, video):
        if video.shape[1] not in (1, self.n_frames):
            raise UserError(f"ViCLIP: {video.shape[1]} frames; its temporal positions fit {self.n_frames} (or 1)")
        return self.vision_encoder(video.to(self.text_encoder.text_projection)).float()

    def encode_text(self, ids):
        return self.text_encoder(ids.to(self.temp.device)).float()

    def tokenize(self, texts):
        return self.tokenizer(texts, length=self.context)

    def bytes(self, images):
        """Frames (see `to_u8`) -> the 8 that ViCLIP sees, (8, S, S, 3) uint8: every (n // 8)-th, stretched without crop."""
        frames = to_u8(images)
        if len(frames) < self.n_frames:                                                 # ours: short clips hold their frames
            frames = [frames[i * len(frames) // self.n_frames] for i in range(self.n_frames)]
        frames = frames[::len(frames) // self.n_frames][:self.n_frames]
        return np.stack([bilinear_u8(f, self.image_size) for f in frames])

    def normalise(self, u8):
        """(8, S, S, 3) uint8 -> (1, 8, 3, S, S); ImageNet's statistics, not CLIP's."""
        x = (torch.from_numpy(u8).float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        return x.permute(0, 3, 1, 2)[None].contiguous()

    def preprocess(self, images):
        return self.normalise(self.bytes(images))


def viclip_sizes(t):
    """The config that fits ViCLIP's tensors; CLIP's towers have heads of width 64."""
    vision, text = t["vision_encoder.conv1.weight"], t["text_encoder.token_embedding.weight"]
    grid = round((len(t["vision_encoder.positional_embedding"]) - 1) ** 0.5)
    layers = lambda tower: 1 + max(int(k.split(".")[3]) for k in t if k.startswith(f"{tower}_encoder.transformer."))
    return dict(image_size=grid * vision.shape[-1], patch_size=vision.shape[-1], vision_width=len(vision),
                num_frames=t["vision_encoder.temporal_positional_embedding"].shape[1], vision_layers=layers("vision"),
                vision_heads=max(1, len(vision) // 64), vocab_size=len(text), text_width=text.shape[1],
                text_layers=layers("text"), text_heads=max(1, text.shape[1] // 64),
                context_length=len(t["text_encoder.positional_embedding"]),
                embed_dim=t["vision_encoder.proj"].shape[1])


def bilinear_u8(image, size):
    """uint8 (H, W, 3) -> (size, size, 3) as OpenCV's INTER_LINEAR does it, in its fixed point: ViCLIP was fed by that.

    Weights of 11 bits; no antialias; the border repeats.
    """
    def taps(n):
        at = ((np.arange(size) + 0.5) * (n / size) - 0.5).astype(np.float32)
        left = np.floor(at).astype(int)
        return left, at - left

    def fixed(frac):                                                                    # the weights of both taps
        return np.rint((1 - frac) * 2048).astype(int), np.rint(frac * 2048).astype(int)

    height, width = image.shape[:2]
    x, fx = taps(width)
    y, fy = taps(height)
    a0, a1 = fixed(np.where((x < 0) | (x >= width - 1), 0, fx))                         # columns lose the weight outside,
    b0, b1 = fixed(fy)                                                                  # rows spend it on the same row twice
    rows = image.astype(int)
    rows = rows[:, x.clip(0, width - 1)] * a0[:, None] + rows[:, (x + 1).clip(0, width - 1)] * a1[:, None]
    top, bottom = rows[y.clip(0, height - 1)] >> 4, rows[(y + 1).clip(0, height - 1)] >> 4
    out = (b0[:, None, None] * top >> 16) + (b1[:, None, None] * bottom >> 16)
    return ((out + 2) >> 2).clip(0, 255).astype(np.uint8)
