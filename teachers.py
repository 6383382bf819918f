"""The paper's two teachers, from their published weights: delete this file and only their steps break.

Contents, in reading order
    CogVideoX-5B image-to-video (Yang et al. 2024): an image and a caption become a clip
        t5_tokenizer, T5Encoder    caption -> 226 states
        CogTransformer             [noisy latent, image latent], states -> v
        CogVAE                     causal 3-D autoencoder, 8x in space, 4x in time
        cog_levels, cog_step       noise levels with zero terminal SNR, DDIM steps
        CogVideoX                  clips([(image, caption, seed), ...]), one network in memory at a time
    LLaVA-OneVision (Li et al. 2024), with Qwen2 0.5B or 7B: sees clips and answers questions about them
        cut_tiles, SigLIP, Qwen2   what it sees, its eye, its decoder
        LlavaOneVision             generate(visuals, prompts) -> answers; probability_of_yes
        write_instructions         clip -> task, instruction, captions before and after
        add_lora ... writer_loss   fine-tuning the writer on image-editing triples
        judge_edit                 what the model thinks of an edit

Attribute names are the published keys; `cfg` is a published config.json as a dict, so other sizes load too.
"""
import hashlib
import json
import math
import re
import struct
import sys
from collections import Counter
from itertools import islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

from model import (CLIPEncoder, UserError, attention, build, check_sizes, embedding, find_tensors, hub_dir,
                   load_weights, need, placement, read_json, read_tensors, reading, resize, save_tensors,
                   stretch, timestep_embedding, to_u8)


def rotary(positions, width, theta):
    """Rotary positions (Su et al. 2021): positions (...) -> the angles (..., width / 2) of a head's pairs."""
    return positions[..., None] * (1 / theta ** (torch.arange(0, width, 2, device=positions.device) / width))


def rotate(x, cos, sin, dim):
    """Turn pairs of channels of x (..., d) by their angle, whose cos and sin are (..., d). A pair is two
    neighbours (dim -1, CogVideoX) or channels i and i + d / 2 (dim -2, Qwen2)."""
    a, b = x.float().unflatten(-1, (-1, 2) if dim == -1 else (2, -1)).unbind(dim)
    return (x * cos + torch.stack([-b, a], dim).flatten(-2) * sin).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------
# CogVideoX: text (T5 v1.1 XXL)
# ----------------------------------------------------------------------------------------------------------

COGVIDEOX = "zai-org/CogVideoX-5b-I2V"     # 21.6 GB: T5 9.5, transformer 11.3, VAE 0.9; the CogVideoX licence


def protobuf_fields(message):
    """Yield (field number, value) of a protobuf message; a value is an int (varint) or bytes (all else)."""
    data = iter(message)

    def varint():
        n = shift = 0
        for byte in data:
            n |= (byte & 127) << shift
            if byte < 128:
                return n
            shift += 7

    while key := varint():
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = 4 if key & 7 == 5 else varint()              # a float, or what says its length
            value = bytes(islice(data, size))
            need(len(value) == size, "cut short")
            yield key >> 3, value


def t5_tokenizer(folder, length=226):
    """T5's SentencePiece unigram model from the published `spiece.model`: text -> pieces, </s>, then <pad>.
    Special tokens written in a text (</s>, <pad>, <extra_id_3>) are cut out as such. UserError for a damaged
    file."""
    path = folder / "spiece.model"
    added = read_json(folder / "added_tokens.json")             # <extra_id_0> has the last id, counting down
    pieces, kinds = [], []
    with reading(path, "download the repository's tokenizer folder again"):
        for number, value in protobuf_fields(path.read_bytes()):
            if number == 1:                                     # a piece: 1 text, 2 score, 3 kind
                piece = dict(protobuf_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
                kinds.append(piece.get(3, 1))                   # 1 normal, 2 unknown, 3 control
            elif number == 3:                                   # the normalizer: 2 is its map of characters
                characters = dict(protobuf_fields(value))[2]
        need(2 in kinds, "not a SentencePiece model")
        tokenizer = Tokenizer(models.Unigram(pieces, kinds.index(2), byte_fallback=False))
        one_space = normalizers.Replace(Regex(" {2,}"), " ")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Precompiled(characters), normalizers.Strip(), one_space])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        special = [text for (text, _), kind in zip(pieces, kinds) if kind in (2, 3)]
        tokenizer.add_special_tokens(special + sorted(added, key=added.get))
        end = "</s>", tokenizer.token_to_id("</s>")
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[end])
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id("<pad>"))
        return tokenizer


class T5Block(nn.Module):
    """Pre-norm self-attention and gated feed-forward. No biases; no 1/sqrt(d) in the attention."""
    def __init__(self, cfg, first):
        super().__init__()
        width, hidden, eps = cfg["d_model"], cfg["d_ff"], cfg["layer_norm_epsilon"]
        self.heads = cfg["num_heads"]
        inner = self.heads * cfg["d_kv"]
        attn = nn.ModuleDict({name: nn.Linear(width, inner, bias=False) for name in "qkv"})
        attn["o"] = nn.Linear(inner, width, bias=False)
        if first:                                               # one table of position biases for all blocks
            attn["relative_attention_bias"] = embedding(cfg["relative_attention_num_buckets"], self.heads)
        dense = nn.ModuleDict({name: nn.Linear(width, hidden, bias=False) for name in ("wi_0", "wi_1")})
        dense["wo"] = nn.Linear(hidden, width, bias=False)
        self.layer = nn.ModuleList([
            nn.ModuleDict({"SelfAttention": attn, "layer_norm": nn.RMSNorm(width, eps)}),
            nn.ModuleDict({"DenseReluDense": dense, "layer_norm": nn.RMSNorm(width, eps)})])

    def forward(self, x, bias):
        attn, norm = self.layer[0].values()
        y = norm(x)
        x = x + attn["o"](attention(attn["q"](y), attn["k"](y), attn["v"](y), self.heads, bias, scale=1.0))
        dense, norm = self.layer[1].values()
        y = norm(x)
        return x + dense["wo"](F.gelu(dense["wi_0"](y), approximate="tanh") * dense["wi_1"](y))


class T5Encoder(nn.Module):
    """T5 v1.1 encoder (Raffel et al. 2020). ids (N, L) int64 -> states (N, L, d_model). Padding is attended,
    as CogVideoX was trained. float16 overflows: use bfloat16 or float32. cfg: transformers' T5Config keys."""
    def __init__(self, cfg):
        super().__init__()
        self.reach = cfg.get("relative_attention_max_distance", 128)
        need(self.reach > cfg["relative_attention_num_buckets"] // 4 > 0, "relative attention: no buckets")
        self.shared = embedding(cfg["vocab_size"], cfg["d_model"])
        self.encoder = nn.ModuleDict({
            "block": nn.ModuleList(T5Block(cfg, first=i == 0) for i in range(cfg["num_layers"])),
            "final_layer_norm": nn.RMSNorm(cfg["d_model"], cfg["layer_norm_epsilon"])})

    @classmethod
    def from_pretrained(cls, source=COGVIDEOX, device=None, dtype=None):
        """The text encoder alone; arguments as in CogVideoX.from_pretrained."""
        return CogVideoX.from_pretrained(source, device, dtype).network("text_encoder")

    def position_bias(self, length):
        """(1, heads, L, L). Buckets: exact below distance 8, log-spaced to 128; upper half for later keys."""
        table = self.encoder["block"][0].layer[0]["SelfAttention"]["relative_attention_bias"]
        half = table.num_embeddings // 2
        exact = half // 2
        at = torch.arange(length, device=table.weight.device)
        ahead = at[None] - at[:, None]                          # key minus query
        far = ahead.abs()
        log = (far.clamp(min=1) / exact).log() / math.log(self.reach / exact) * (half - exact)
        bucket = torch.where(far < exact, far, (exact + log.long()).clamp(max=half - 1))
        return table(bucket + half * (ahead > 0)).permute(2, 0, 1)[None]

    @torch.no_grad()
    def forward(self, ids):
        x, bias = self.shared(ids), self.position_bias(ids.shape[1])
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)


# ----------------------------------------------------------------------------------------------------------
# CogVideoX: transformer
# ----------------------------------------------------------------------------------------------------------

def rope_3d(frames, h, w, dim):
    """Rotary cos and sin (frames*h*w, dim) of a grid: the first quarter of a head turns with time, then 3/8
    each with row and column."""
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(h), torch.arange(w))    # (frames*h*w, 3)
    widths = dim // 4, dim // 8 * 3, dim // 8 * 3
    angle = torch.cat([rotary(at, width, 10000) for at, width in zip(grid.T, widths)], -1)
    angle = angle.repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


class CogNorm(nn.Module):
    """Adaptive LayerNorm: the time step gives shift, scale and gate, one set for video, one for text."""
    def __init__(self, temb, width, eps):
        super().__init__()
        self.linear = nn.Linear(temb, 6 * width)
        self.norm = nn.LayerNorm(width, eps)

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
        self.heads = cfg["num_attention_heads"]
        head, bias = cfg["attention_head_dim"], cfg["attention_bias"]
        self.norm1, self.norm2 = (CogNorm(cfg["time_embed_dim"], width, cfg["norm_eps"]) for _ in range(2))
        self.attn1 = nn.ModuleDict({f"norm_{s}": nn.LayerNorm(head, 1e-6) for s in "qk"} |
                                   {f"to_{s}": nn.Linear(width, width, bias) for s in "qkv"} |
                                   {"to_out": nn.ModuleList([nn.Linear(width, width)])})
        up = nn.ModuleDict({"proj": nn.Linear(width, 4 * width)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])})

    def forward(self, x, temb, n, rope):
        """x (B, n + L, D) with n text tokens; changed in place."""
        def add(y, gates):
            x[:, n:].addcmul_(gates[0], y[:, n:])
            x[:, :n].addcmul_(gates[1], y[:, :n])

        y, gates = self.norm1(x, temb, n)
        q, k, v = (self.attn1[f"to_{s}"](y).unflatten(-1, (self.heads, -1)) for s in "qkv")
        q, k = self.attn1["norm_q"](q), self.attn1["norm_k"](k)
        for s in (q, k):                                        # (B, n + L, heads, d); only video tokens turn
            s[:, n:] = rotate(s[:, n:], *rope, dim=-1)
        add(self.attn1["to_out"][0](attention(q.flatten(2), k.flatten(2), v.flatten(2), self.heads)), gates)
        y, gates = self.norm2(x, temb, n)
        up, _, down = self.ff["net"]
        add(down(F.gelu(up["proj"](y), approximate="tanh")), gates)
        return x


class CogTransformer(nn.Module):
    """transformer(z, ctx, t) -> v (B, F, c, h, w). z (B, F, 2c, h, w) = [noisy latent, image latent], ctx (B,
    T, 4096) T5 states, t (B,) int64. Text and patches form one sequence, text first. F, h and w are those of
    the learned positions: 13, 60, 90 as published. cfg: diffusers' config of the image-to-video 5B."""
    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        temb, eps, p = cfg["time_embed_dim"], cfg["norm_eps"], cfg["patch_size"]
        self.width = width = cfg["num_attention_heads"] * cfg["attention_head_dim"]
        frames = (cfg["sample_frames"] - 1) // cfg["temporal_compression_ratio"] + 1        # latent ones
        patches = frames * (cfg["sample_height"] // p) * (cfg["sample_width"] // p)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(cfg["in_channels"], width, p, p),
                                          "text_proj": nn.Linear(cfg["text_embed_dim"], width)})
        positions = torch.zeros(1, cfg["max_text_seq_length"] + patches, width)
        self.patch_embed.pos_embedding = nn.Parameter(positions)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(width, temb),
                                             "linear_2": nn.Linear(temb, temb)})
        self.transformer_blocks = nn.ModuleList(CogBlock(cfg, width) for _ in range(cfg["num_layers"]))
        self.norm_final = nn.LayerNorm(width, eps)
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(temb, 2 * width),
                                       "norm": nn.LayerNorm(width, eps)})
        self.proj_out = nn.Linear(width, cfg["out_channels"] * p * p)

    @torch.no_grad()
    def forward(self, z, ctx, t):
        B, frames, _, h, w = z.shape
        p, n = self.config["patch_size"], ctx.shape[1]
        patches = self.patch_embed["proj"](z.flatten(0, 1)).flatten(2).transpose(1, 2)     # (B*F, h*w/p^2, D)
        x = torch.cat([self.patch_embed["text_proj"](ctx), patches.reshape(B, -1, self.width)], 1)
        x.add_(self.patch_embed.pos_embedding)
        temb = self.time_embedding["linear_1"](timestep_embedding(t, self.width).to(z.dtype))
        temb = self.time_embedding["linear_2"](F.silu(temb))
        rope = rope_3d(frames, h // p, w // p, self.config["attention_head_dim"])
        rope = [r[:, None].to(z.device) for r in rope]                      # (F*h*w/p^2, 1, d)
        for block in self.transformer_blocks:
            x = block(x, temb, n, rope)
        shift, scale = self.norm_out["linear"](F.silu(temb))[:, None].chunk(2, -1)
        x = self.norm_out["norm"](self.norm_final(x[:, n:])) * (1 + scale) + shift
        x = self.proj_out(x).view(B * frames, h // p, w // p, -1).permute(0, 3, 1, 2)      # (B*F, c*p*p, ...)
        return F.pixel_shuffle(x, p).unflatten(0, (B, frames))


# ----------------------------------------------------------------------------------------------------------
# CogVideoX: causal 3-D VAE
# Inside: x (B, C, F, H, W). `past` holds each convolution's last two input frames between chunks of one clip.
# ----------------------------------------------------------------------------------------------------------

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
        n = x.shape[2]
        odd = n % 2 if n > 1 else 0                             # a clip's first frame has a latent of its own
        times = (n - odd) // (z.shape[2] - odd)
        latent = (torch.arange(n, device=x.device) + odd * (times - 1)) // times           # of each frame

        def at_x(conv):                         # repeating after the 1x1x1 convolution: the same, far cheaper
            return F.interpolate(conv["conv"](z)[:, :, latent], x.shape[2:])

        return self.norm_layer(x).mul_(at_x(self.conv_y)).add_(at_x(self.conv_b))


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
        self.down, self.time = down, time
        self.conv = nn.Conv2d(channels, channels, 3, 2 if down else 1, 0 if down else 1)

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

        def norm(c):
            return nn.GroupNorm(groups, c, cfg["norm_eps"]) if down else CogSpatialNorm(c, latent, groups)

        def resnets(c_in, c, n):
            return nn.ModuleList(CogResnet(c if j else c_in, c, norm) for j in range(n))

        self.mid_block = nn.ModuleDict({"resnets": resnets(widths[-1], widths[-1], 2)})
        widths = widths if down else widths[::-1]
        c = widths[0]
        self.conv_in = CogConv(cfg["in_channels"] if down else latent, c)
        stages = nn.ModuleList()
        for i, width in enumerate(widths):
            stage = nn.ModuleDict({"resnets": resnets(c, width, cfg["layers_per_block"] + (not down))})
            if i < len(widths) - 1:
                resample = CogResample(width, down, time=2 ** i < cfg["temporal_compression_ratio"])
                stage["downsamplers" if down else "upsamplers"] = nn.ModuleList([resample])
            stages.append(stage)
            c = width
        setattr(self, "down_blocks" if down else "up_blocks", stages)
        self.stages = [*stages, self.mid_block] if down else [self.mid_block, *stages]   # as they run
        self.down = down
        self.norm_out = nn.GroupNorm(groups, c, 1e-6) if down else norm(c)
        self.conv_out = CogConv(c, 2 * latent if down else cfg["out_channels"])

    def forward(self, x, past):
        z = [] if self.down else [x]
        x = self.conv_in(x, past)
        for stage in self.stages:
            for layer in (layer for part in stage.values() for layer in part):
                x = layer(x) if isinstance(layer, CogResample) else layer(x, past, *z)
        return self.conv_out(F.silu(self.norm_out(x, *z), inplace=True), past)


class CogVAE(nn.Module):
    """CogVideoX's autoencoder. A clip runs in chunks, the first taking the remainder; GroupNorm sees one
    chunk, so their sizes are part of the model: 8 frames to encode, 2 latents to decode."""
    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.encoder, self.decoder = CogHalf(cfg, down=True), CogHalf(cfg, down=False)

    @torch.no_grad()
    def run(self, half, x, size):
        """Yield a half's output (B, f, C, h, w) for each chunk of x: 17 frames by 8 are 9, 8; 15 are one."""
        n, past = x.shape[1], {}
        first = min(n, n % size + size)
        for chunk in x.split([first] + [size] * ((n - first) // size), 1):
            yield half(chunk.transpose(1, 2), past).transpose(1, 2)

    def encode(self, video):
        """video (B, F, 3, H, W) in [-1, 1], 8 | H and W -> mean, logvar (B, f, 16, H/8, W/8), unscaled."""
        mean, logvar = torch.cat(list(self.run(self.encoder, video, 8)), 1).chunk(2, 2)
        return mean, logvar.clamp(-30, 20)

    def decode_chunks(self, z):
        """Yield decoded slices (B, 9 or 8, 3, 8h, 8w) of latents z (B, f, 16, h, w), unscaled: in all 4f - 3
        frames where f is odd, else 4f."""
        return self.run(self.decoder, z, 2)


# ----------------------------------------------------------------------------------------------------------
# CogVideoX: sampler
# ----------------------------------------------------------------------------------------------------------

COG_SCHEDULE = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample": False,
                "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}


def cog_levels(cfg):
    """Cumulative alphas (T,) float64 of a scheduler_config.json, rescaled to zero terminal SNR (Lin et al.
    2023, algorithm 1): exactly 0 at the last, t = 999, so nothing below divides by them. ValueError for other
    models'."""
    for key, known in COG_SCHEDULE.items():
        need(cfg[key] == known, f"{key} {cfg[key]}; known is {known}")
    T, shift = cfg["num_train_timesteps"], cfg["snr_shift_scale"]
    start, end = cfg["beta_start"], cfg["beta_end"]
    betas = torch.linspace(start ** 0.5, end ** 0.5, T, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    root = (abar / (shift + (1 - shift) * abar)).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def cog_steps(abar, steps):
    """The path from noise to image: [(time step, its abar, abar of the next one)], 1 to T steps."""
    T = len(abar)
    assert 1 <= steps <= T, f"{steps} steps: needs 1 to {T}"
    t = torch.arange(T, 0, -T / steps, dtype=torch.float64).round().long()[:steps] - 1
    after = (t - T // steps).clamp(min=-1)
    abar = torch.cat([abar, abar.new_ones(1)])                  # the last one, where -1 points: no noise
    return list(zip(t.tolist(), abar[t], abar[after]))


def cog_step(v, z, a, a_next):
    """One deterministic DDIM step (Song et al. 2021, eq. 12, in z and z0 instead of epsilon and z0)."""
    z0 = a.sqrt() * z - (1 - a).sqrt() * v
    keep = ((1 - a_next) / (1 - a)).sqrt()
    return keep * z + (a_next.sqrt() - a.sqrt() * keep) * z0


# ----------------------------------------------------------------------------------------------------------
# CogVideoX: image + caption -> clip
# ----------------------------------------------------------------------------------------------------------

def inside(h, w, height, width):
    """Where an image of h x w lies in a frame that shows all of it: (top, left, its height, its width)."""
    scale = min(height / h, width / w)
    high, wide = round(h * scale), round(w * scale)
    return (height - high) // 2, (width - wide) // 2, high, wide


def fit_image(image, height, width):
    """image (3, H, W) in [-1, 1] -> (3, height, width): all of it, with black around. UserError where it
    would be enlarged over 4 times."""
    h, w = image.shape[1:]
    if 4 * h < height and 4 * w < width:
        raise UserError(f"image of {w}x{h} is too small for a clip of {width}x{height}; needs a width of "
                        f"{math.ceil(width / 4)} or a height of {math.ceil(height / 4)}")
    top, left, high, wide = inside(h, w, height, width)
    margins = left, width - wide - left, top, height - high - top
    return F.pad(resize(image.float(), high, wide), margins, value=-1.0)


def clip_fault(video, image):
    """Why a clip should not count: "black", "static", "first frame unlike the image"; "" where it is fine.
    video (F, 3, H, W) or (1, F, 3, H, W) and the image (3, H, W) that it should start with, in [-1, 1]."""
    video = video.flatten(0, -4)
    if (video.mean((1, 2, 3)) < -0.95).any():
        return "black"
    if (video[1:] - video[:-1]).abs().mean() < 0.002:                       # a quarter of one of 255 levels
        return "static"
    both = torch.stack([video[0], resize(image, *video.shape[-2:])])
    small = F.avg_pool2d(both, max(1, video.shape[-1] // 45))
    return "first frame unlike the image" if (small[0] - small[1]).abs().mean() > 0.3 else ""


class CogVideoX:
    """The image-to-video teacher: a folder of published weights, at most one of its networks in memory.

    Peak memory is the largest part's, computed for bf16 at 49 frames of 480x720: the transformer's 11.3 GB
    plus about 4 of activations (two guidance branches); T5 takes 9.7, a decoded slice of 9 frames about 8.
    """
    PARTS = dict(text_encoder=T5Encoder, transformer=CogTransformer, vae=CogVAE)
    GUIDANCE = 6.0                                              # of the published pipeline

    @classmethod
    def from_pretrained(cls, source=COGVIDEOX, device=None, dtype=None):
        """source: a hub id, or a directory in hub layout (tokenizer text_encoder transformer vae scheduler).

        All names and shapes are checked now, against the files' headers; weights are read when needed.
        device, dtype: by default CUDA in bf16, MPS or CPU in float32. UserError for a missing shard or
        another model.
        """
        self = cls()
        self.folder = hub_dir(source, [f"{part}/*" for part in (*cls.PARTS, "tokenizer", "scheduler")])
        self.device, self.dtype = placement(device, dtype)
        assert self.dtype != torch.float16, "T5 and the VAE overflow in float16; pass bfloat16 or float32"
        self.config = {part: read_json(self.folder / part / "config.json") for part in cls.PARTS}
        self.tokenizer = t5_tokenizer(self.folder / "tokenizer")
        path = self.folder / "scheduler" / "scheduler_config.json"
        with reading(path, "is it another model's?"):
            self.abar = cog_levels(read_json(path))
        self.loaded = None, None
        for part in cls.PARTS:
            self.open(part, "meta")
        return self

    def open(self, part, device):
        """"text_encoder", "transformer" or "vae" on a device. Files are memory-mapped: on "meta" nothing is
        read, elsewhere a weight is copied at most once."""
        folder = self.folder / part
        tensors, file = find_tensors(folder)
        with torch.device("meta"):
            net = build(self.PARTS[part], folder / "config.json", self.config[part])
        load_weights(net, tensors, str(folder / file), drop=("embed_tokens",), device=device,
                     dtype=self.dtype)                          # some files store T5's table twice
        return net.eval().requires_grad_(False)

    def network(self, part):
        """A part ready to run; the one loaded before is freed."""
        if self.loaded[0] != part:
            self.loaded = None, None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.loaded = part, self.open(part, self.device)
        return self.loaded[1]

    def tokenize(self, captions):
        """List of N strings -> ids (N, 226) int64; longer ones are cut, with a warning."""
        rows = self.tokenizer.encode_batch([to_unicode(caption) for caption in captions])
        for row, caption in zip(rows, captions):
            if row.overflowing:
                print(f"warning: caption cut to {len(row.ids)} tokens: {caption[:50]}", file=sys.stderr)
        return torch.tensor([row.ids for row in rows])

    def text_states(self, captions):
        """List of N captions -> T5 states (N, 226, D) on the CPU, 1.9 MB each in bf16."""
        encoder = self.network("text_encoder")
        return torch.cat([encoder(ids[None].to(self.device)).cpu() for ids in self.tokenize(captions)])

    def encode_image(self, image, noise):
        """image (3, H, W) in [-1, 1], noise (1, 1, 16, h, w) -> image latents (1, 1, 16, h, w) float32: a
        sample of the posterior (not its mode), scaled."""
        mean, logvar = self.network("vae").encode(image[None, None].to(self.device, self.dtype))
        z = mean.float().cpu() + (0.5 * logvar.float().cpu()).exp() * noise
        return z * self.config["vae"]["scaling_factor"]

    @torch.no_grad()
    def denoise(self, z, z_img, ctx, steps=50):
        """Yield the latents (1, f, 16, h, w) after each step, float32 on the device.

        z: starting noise; z_img (1, 1, 16, h, w): the image, zeros for the later frames; ctx (2, 226, D):
        states of [negative, caption]. UserError on NaN or Inf, with the time step.
        """
        net = self.network("transformer")
        ctx, z_img = (x.to(self.device, self.dtype) for x in (ctx, z_img))
        z_img = torch.cat([z_img, z_img.new_zeros(z[:, 1:].shape)], 1)
        z = z.to(self.device, torch.float32)
        for t, a, a_next in tqdm(cog_steps(self.abar, steps), "denoise", leave=False, disable=None):
            both = torch.cat([z.to(self.dtype), z_img], 2).expand(2, -1, -1, -1, -1)
            negative, positive = net(both, ctx, torch.full((2,), t, device=self.device)).float().split(1)
            z = cog_step(negative + self.GUIDANCE * (positive - negative), z, a, a_next)
            if not z.isfinite().all():
                raise UserError(f"{self.folder}: NaN or Inf at time step {t}; download the weights again")
            yield z

    def decode(self, z):
        """z (1, f, 16, h, w), scaled -> video (1, F, 3, 8h, 8w) float32 in [-1, 1], on the CPU, in slices."""
        z = (z / self.config["vae"]["scaling_factor"]).to(self.device, self.dtype)
        return torch.cat([x.float().cpu().clamp(-1, 1) for x in self.network("vae").decode_chunks(z)], 1)

    def clips(self, jobs, steps=50):
        """Make a clip of each job (image (3, H, W) in [-1, 1], caption, seed): yields, in their order, videos
        (F, 3, H, W) float32 in [-1, 1], 49 frames at 8 fps, that start from the image.

        The whole image goes into the model's 480x720, with black beside or above it; the clip is the part
        under the image, resized back to its size. Seeds give the same noise on every device. A list loads T5,
        the VAE, the transformer, the VAE, one after another; a job holds 11 MB. UserError for a small image.
        """
        cfg = self.config["transformer"]
        f = (cfg["sample_frames"] - 1) // cfg["temporal_compression_ratio"] + 1
        shape = cfg["out_channels"], cfg["sample_height"], cfg["sample_width"]
        height, width = 8 * shape[1], 8 * shape[2]
        images = [fit_image(image, height, width) for image, _, _ in jobs]
        unwanted, *states = self.text_states(["", *(caption for _, caption, _ in jobs)])
        latents = []
        for image, (_, _, seed) in zip(images, jobs):
            g = torch.Generator().manual_seed(seed)
            noise = torch.randn(1, 1, *shape, generator=g)
            latents.append((torch.randn(1, f, *shape, generator=g), self.encode_image(image, noise)))
        for k, (z, z_img) in enumerate(latents):
            for z in self.denoise(z, z_img, torch.stack([unwanted, states[k]]), steps):
                pass
            latents[k] = z.cpu()
        for z, (image, _, _) in zip(latents, jobs):
            top, left, high, wide = inside(*image.shape[1:], height, width)
            video = self.decode(z)[0, :, :, top:top + high, left:left + wide]
            yield torch.stack([resize(frame, *image.shape[1:]) for frame in video])

    def animate(self, image, caption, seed=0, steps=50):
        """One clip, as `clips` makes it: (F, 3, H, W) in [-1, 1]."""
        [video] = self.clips([(image, caption, seed)], steps)
        return video


# ----------------------------------------------------------------------------------------------------------
# LLaVA-OneVision: pictures in, uint8 (H, W, 3)
# ----------------------------------------------------------------------------------------------------------

LLAVA = "llava-hf/llava-onevision-qwen2-7b-ov-hf"       # 16.1 GB, Apache 2.0; the 0.5B sister has 1.8 GB
LLAVA_FILES = ["*.json", "*.safetensors"]


def best_resolution(height, width, pinpoints):
    """The [H, W] of `pinpoints` that keeps most pixels of an image fitted into it, then wastes least."""
    def merit(pin):
        scale = min(pin[1] / width, pin[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pin[0] * pin[1]

    return max(pinpoints, key=merit)


def cut_tiles(image, size, pinpoints):
    """uint8 (H, W, 3) -> uint8 (1 + n, size, size, 3): the whole image stretched to a square, then n tiles of
    the image fitted into its best resolution with black around it; and how many rows of tiles these are."""
    height, width = image.shape[:2]
    high, wide = best_resolution(height, width, pinpoints)
    scale = min(high / height, wide / width)
    h, w = min(math.ceil(height * scale), high), min(math.ceil(width * scale), wide)
    top, left = (high - h) // 2, (wide - w) // 2            # an odd margin is wider below and on the right
    canvas = np.zeros((high, wide, 3), np.uint8)
    canvas[top:top + h, left:left + w] = stretch(image, w, h)
    tiles = canvas.reshape(high // size, size, wide // size, size, 3).swapaxes(1, 2)
    return np.concatenate([stretch(image, size, size)[None], tiles.reshape(-1, size, size, 3)]), high // size


def unpad(x, height, width):
    """Feature map (D, h, w) of a canvas -> the part that shows its image of `height` x `width` pixels."""
    h, w = x.shape[1:]
    scale = min(h / height, w / width)
    top = (h - int(round(height * scale, 7))) // 2
    left = (w - int(round(width * scale, 7))) // 2
    return x[:, top:h - top, left:w - left]


def even_frames(clip, n):
    """n evenly spaced frames of a clip (F, ...), ends included; all of a shorter one."""
    return clip[np.linspace(0, len(clip) - 1, min(n, len(clip))).round().astype(int)]


# ----------------------------------------------------------------------------------------------------------
# LLaVA-OneVision: networks
# ----------------------------------------------------------------------------------------------------------

class SigLIP(nn.Module):
    """SigLIP so400m without class token and head (Zhai et al. 2023): (N, 3, S, S) -> (N, patches, D)."""
    def __init__(self, cfg):
        super().__init__()
        width, patch, eps = cfg["hidden_size"], cfg["patch_size"], cfg.get("layer_norm_eps", 1e-6)
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, width, patch, patch),    # 384 = 27 * 14 + 6: the last 6 go unseen
            "position_embedding": embedding((cfg["image_size"] // patch) ** 2, width)})
        self.encoder = CLIPEncoder(width, cfg["num_hidden_layers"], cfg["num_attention_heads"],
                                   cfg["intermediate_size"], "gelu_pytorch_tanh", eps)
        self.post_layernorm = nn.LayerNorm(width, eps)            # in the file; LLaVA takes what comes before

    def forward(self, x):
        x = self.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
        return self.encoder(x + self.embeddings.position_embedding.weight)


class QwenLayer(nn.Module):
    """Pre-norm causal attention and gated feed-forward. A group of query heads shares one head of keys and
    values (Ainslie et al. 2023)."""
    def __init__(self, cfg):
        super().__init__()
        width, hidden, eps = cfg["hidden_size"], cfg["intermediate_size"], cfg.get("rms_norm_eps", 1e-6)
        self.heads, self.kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
        kv_width = width // self.heads * self.kv
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(width, width), "k_proj": nn.Linear(width, kv_width),
            "v_proj": nn.Linear(width, kv_width), "o_proj": nn.Linear(width, width, bias=False)})
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(width, hidden, bias=False),
            "up_proj": nn.Linear(width, hidden, bias=False),
            "down_proj": nn.Linear(hidden, width, bias=False)})

    def forward(self, x, rope, cache=None, at=None, mask=None):
        y = self.input_layernorm(x)
        q, k, v = (self.self_attn[f"{s}_proj"](y) for s in "qkv")
        q = rotate(q.unflatten(-1, (self.heads, -1)), *rope, dim=-2).flatten(2)
        k = rotate(k.unflatten(-1, (self.kv, -1)), *rope, dim=-2).flatten(2)
        x = x + self.self_attn.o_proj(self.attend(q, k, v, cache, at, mask))
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))

    def attend(self, q, k, v, cache, at, mask):
        """q (B, L, D), k, v (B, L, kv*d): of whole prompts, which fill the start of `cache` (2, B, n, kv*d)
        if there is one; or, with at (B,), of one new token per row, which takes this place in the cache and
        sees what mask says."""
        group = self.heads // self.kv
        if at is None:
            if cache is not None:
                cache[:, :, :k.shape[1]] = torch.stack([k, v])
            k, v = (y.unflatten(-1, (self.kv, -1)).repeat_interleave(group, 2).flatten(2) for y in (k, v))
            return attention(q, k, v, self.heads, causal=True)
        cache[:, torch.arange(len(q), device=at.device), at] = torch.stack([k[:, 0], v[:, 0]])
        # a group's queries stand as `group` positions of its one key head: no copy of the cache is made
        q = q.view(len(q), self.kv, group, -1).transpose(1, 2).flatten(2)
        y = attention(q, *cache, self.kv, mask)
        return y.view(len(q), group, self.kv, -1).transpose(1, 2).flatten(1)[:, None]


class Qwen2(nn.Module):
    """The decoder (Yang et al. 2024) on embeddings: (B, L, D) -> states (B, L, D); `lm_head` makes logits."""
    def __init__(self, cfg):
        super().__init__()
        width, vocab = cfg["hidden_size"], cfg["vocab_size"]
        self.theta, self.d = cfg.get("rope_theta", 1e6), width // cfg["num_attention_heads"]
        self.kv_width = self.d * cfg["num_key_value_heads"]
        self.model = nn.ModuleDict({
            "embed_tokens": embedding(vocab, width),
            "layers": nn.ModuleList(QwenLayer(cfg) for _ in range(cfg["num_hidden_layers"])),
            "norm": nn.RMSNorm(width, cfg.get("rms_norm_eps", 1e-6))})
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def new_cache(self, batch, length):
        """Room for keys and values of `length` tokens per row: 57 KB a token for 7B in bf16."""
        # zeros: what lies behind a short row is masked, but a NaN there would come through as 0 * NaN
        return [self.lm_head.weight.new_zeros(2, batch, length, self.kv_width) for _ in self.model.layers]

    def forward(self, x, cache=None, at=None):
        """Whole prompts (`at` None), padded on the right, where causal attention never looks; or one more
        token per row at position at (B,), which sees the cache up to itself."""
        positions, mask = torch.arange(x.shape[1], device=x.device)[None], None
        if at is not None:
            positions = at[:, None]
            mask = torch.arange(cache[0].shape[2], device=x.device) <= positions
            mask = mask[:, None, None]                                  # (B, 1, 1, n)
        angle = rotary(positions, self.d, self.theta)[:, :, None]
        angle = torch.cat([angle, angle], -1)                           # (B or 1, L, 1, d)
        rope = angle.cos(), angle.sin()
        for layer, past in zip(self.model.layers, cache or [None] * len(self.model.layers)):
            x = layer(x, rope, past, at, mask)
        return self.model.norm(x)


# ----------------------------------------------------------------------------------------------------------
# LLaVA-OneVision: the model and its prompt
# ----------------------------------------------------------------------------------------------------------

# a turn that shows something, up to the answer; the published chat templates differ in white space only
CHAT = "<|im_start|>user\n{shown}{text}<|im_end|>\n<|im_start|>assistant\n"


def chat(text, *kinds):
    """The prompt of one turn that shows visuals of these kinds, "image" or "video"."""
    return CHAT.format(shown="".join(f"<{kind}>\n" for kind in kinds), text=text)


def to_unicode(text):
    """Without lone surrogates, which JSON may hold and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode()


def plain(text):
    """Others' text in which nothing reads as a special token: <video> becomes video, <|im_end|> |im_end|."""
    text = to_unicode(text)
    while (clean := re.sub(r"<(\|?\w+\|?)>", r"\1", text)) != text:
        text = clean
    return text


def is_clip(visual):
    return getattr(visual, "ndim", 3) > 3                               # a PIL image has none


class LlavaOneVision(nn.Module):
    """LLaVA-OneVision from a config in the published form; `from_pretrained` also brings the tokenizer.

    A visual is an image (PIL, uint8 (H, W, 3), or a tensor (3, H, W) in [-1, 1]) or a clip (uint8
    (F, H, W, 3), or a tensor (F, 3, H, W) in [-1, 1]); 8 to 32 frames are usual.
    """
    def __init__(self, cfg):
        super().__init__()
        text, vision = cfg["text_config"], cfg["vision_config"]
        self.cfg, self.size = cfg, vision["image_size"]
        self.grid = self.size // vision["patch_size"]                   # patches per side: 27
        self.vision_tower = nn.ModuleDict({"vision_model": SigLIP(vision)})
        width = text["hidden_size"]
        self.multi_modal_projector = nn.ModuleDict({"linear_1": nn.Linear(vision["hidden_size"], width),
                                                    "linear_2": nn.Linear(width, width)})
        self.image_newline = nn.Parameter(torch.zeros(width))
        self.language_model = Qwen2(text)
        self.mean = self.std = 0.5                                      # SigLIP's; from_pretrained reads them

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=None, lora=None):
        """source: llava-hf/llava-onevision-qwen2-0.5b-ov-hf (2 GB), -7b-ov-hf (16 GB), or such a directory.

        lora: a file of `save_lora`, merged in. device, dtype: default CUDA in bf16, MPS or CPU in float32.
        UserError for another model or a missing shard.
        """
        folder = hub_dir(source, LLAVA_FILES)
        cfg = read_json(folder / "config.json")
        tensors, file = find_tensors(folder)
        words, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
        with reading(folder / "config.json", f"give {LLAVA} or a copy of it"), torch.device("meta"):
            if words in tensors:                                   # the file knows its padded vocabulary best
                cfg["text_config"]["vocab_size"] = len(tensors[words])
            for high, wide in cfg["image_grid_pinpoints"]:
                need(high > 0 < wide, f"image_grid_pinpoints {high}x{wide}")
            check_sizes(cfg)
            net = cls(cfg)
        tied = head not in tensors and any(c.get("tie_word_embeddings") for c in (cfg, cfg["text_config"]))
        device, dtype = placement(device, dtype)
        load_weights(net, tensors, str(folder / file), absent=(head,) if tied else (),
                     device=device, dtype=dtype)
        if tied:
            net.language_model.lm_head.weight = net.language_model.model.embed_tokens.weight
        with reading(folder, "take all its .json files from one model"):
            net.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            images = read_json(folder / "preprocessor_config.json") # the video processor's says the same
            net.mean, net.std = (torch.tensor(images[k], device=device) for k in ("image_mean", "image_std"))
            end = read_json(folder / "generation_config.json")["eos_token_id"]
            net.end_ids = end if isinstance(end, list) else [end]
        if lora:
            load_lora(net, lora)
        return net.eval().requires_grad_(False)

    # what it sees

    def see(self, tiles):
        """uint8 (N, S, S, 3) -> projected features (N, patches, D), the tower's before (N, patches, Dv)."""
        x = torch.tensor(tiles, device=self.image_newline.device)
        x = ((x / 255 - self.mean) / self.std).permute(0, 3, 1, 2).to(self.image_newline.dtype)
        # 16 at a time bounds the memory of a 6x6 image or a long clip
        tower = torch.cat([self.vision_tower.vision_model(part) for part in x.split(16)])
        mlp = self.multi_modal_projector
        return mlp.linear_2(F.gelu(mlp.linear_1(tower))), tower         # exact GELU here, tanh in the tower

    @torch.no_grad()
    def look(self, visual):
        """One visual (see the class) -> its features in reading order (n, D).

        A clip: each frame a square, pooled 27 -> 14, one newline at the very end. An image: the whole, then
        the map of all its tiles with a newline after each row, shrunk to 9 tiles' worth.
        """
        frames, size = to_u8(visual), self.size
        if is_clip(visual):
            x, _ = self.see(np.stack([stretch(frame, size, size) for frame in frames]))
            x = x.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)                  # (F, D, 27, 27)
            x = F.interpolate(x, size=[(self.grid + 1) // 2] * 2, mode="bilinear")
            return torch.cat([x.flatten(2).transpose(1, 2).flatten(0, 1), self.image_newline[None]])
        tiles, rows = cut_tiles(frames[0], size, self.cfg["image_grid_pinpoints"])
        x, _ = self.see(tiles)
        whole, x = x[0], x[1:].unflatten(1, (self.grid, self.grid)).unflatten(0, (rows, -1))
        x = x.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2)                # (D, h, w), a map of all tiles
        x = unpad(x, *frames[0].shape[:2])
        most = int(self.cfg.get("vision_aspect_ratio", "anyres_max_9").removeprefix("anyres_max_"))
        ratio = math.sqrt(x.shape[1] * x.shape[2] / (most * self.grid ** 2))
        if ratio > 1.1:
            small = [int(x.shape[1] // ratio), int(x.shape[2] // ratio)]
            x = F.interpolate(x[None], size=small, mode="bilinear")[0]
        x = torch.cat([x, self.image_newline[:, None, None].expand(-1, x.shape[1], 1)], 2)
        return torch.cat([whole, x.flatten(1).T])

    # what it is asked

    def embed(self, prompt, seen):
        """Prompt and the features of what it shows [(n, D), ...], in the places of <image> and <video> ->
        embeddings (L, D)."""
        words = self.language_model.model.embed_tokens.weight
        marks = self.cfg["image_token_index"], self.cfg["video_token_index"]
        ids = self.tokenizer.encode(prompt).ids
        assert sum(i in marks for i in ids) == len(seen), "<image> or <video> in the text: use plain()"
        seen = iter(seen)
        return torch.cat([next(seen) if i in marks else words[i:i + 1] for i in ids])

    def row(self, visual, text):
        """A visual and the text that comes with it -> embeddings (L, D)."""
        return self.embed(chat(text, "video" if is_clip(visual) else "image"), [self.look(visual)])

    # what it says

    def prefill(self, rows, room=0):
        """Prompts [(L_i, D), ...] -> logits of the next token (B, V), lengths (B,), cache with `room`."""
        lengths = torch.tensor([len(r) for r in rows], device=rows[0].device)
        cache = self.language_model.new_cache(len(rows), int(lengths.max()) + room) if room else None
        x = self.language_model(nn.utils.rnn.pad_sequence(rows, batch_first=True), cache)
        x = x[torch.arange(len(rows), device=x.device), lengths - 1]
        return self.language_model.lm_head(x).float(), lengths, cache

    @torch.no_grad()
    def generate_ids(self, rows, max_new_tokens=128, temperature=0.0, top_p=1.0, seeds=None):
        """Prompts [(L_i, D), ...] -> new ids [[...], ...], each up to its end token, which is left out.

        temperature 0 takes the likeliest token; above 0, tokens are drawn from the likeliest that make up
        `top_p` of the probability, each row by its own seed: its answer does not depend on its company.
        """
        logits, at, cache = self.prefill(rows, room=max_new_tokens)
        draws = [torch.Generator().manual_seed(s) for s in (seeds or range(len(rows)))]
        answers = [[] for _ in rows]
        talking = range(len(rows))
        for n in range(max_new_tokens):
            if not logits.isfinite().all():
                raise UserError(f"NaN or Inf at token {n} of LLaVA's answer; download its weights again")
            if temperature == 0:
                ids = logits.argmax(-1)
            else:
                u = torch.stack([torch.rand((), generator=g) for g in draws])
                ids = nucleus(logits / temperature, top_p, u.to(logits.device))
            tokens = ids.tolist()
            talking = [i for i in talking if tokens[i] not in self.end_ids]
            for i in talking:
                answers[i].append(tokens[i])
            if not talking or n + 1 == max_new_tokens:
                break
            x = self.language_model.model.embed_tokens(ids)[:, None]
            logits = self.language_model.lm_head(self.language_model(x, cache, at)[:, 0]).float()
            at = at + 1
        return answers

    @torch.no_grad()
    def generate(self, visuals, prompts, max_new_tokens=128, temperature=0.0, top_p=1.0, seeds=None):
        """The answers to a list of prompts, each about its own visual: one batch, answered as one by one."""
        rows = [self.row(v, p) for v, p in zip(visuals, prompts, strict=True)]
        ids = self.generate_ids(rows, max_new_tokens, temperature, top_p, seeds)
        return [self.tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids]

    @torch.no_grad()
    def probability_of_yes(self, pair, questions, frames=8):
        """P(yes) / (P(yes) + P(no)) of each answer's first token, in [0, 1]. pair: (source, edited) clips, of
        which so many frames are shown in one prompt in this order."""
        seen = [self.look(even_frames(clip, frames)) for clip in pair]                # once for all questions
        logits, _, _ = self.prefill([self.embed(chat(q, "video", "video"), seen) for q in questions])

        def logit(*words):
            first = {self.tokenizer.encode(word).ids[0] for word in words}
            return logits[:, sorted(first)].logsumexp(-1)

        return (logit("Yes", "yes", "YES") - logit("No", "no", "NO")).sigmoid().tolist()


def nucleus(logits, top_p, u):
    """logits (B, V), u (B,) uniform in [0, 1) -> ids (B,): the distribution of the likeliest tokens whose
    mass reaches top_p (Holtzman et al. 2020), inverted at u: the same draw on every device."""
    p, order = logits.softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                    # the token that crosses top_p stays in
    mass = p.cumsum(-1)
    at = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[1] - 1)
    return order.gather(1, at)[:, 0]


# ----------------------------------------------------------------------------------------------------------
# The writer: a clip -> task, instruction, captions before and after
# ----------------------------------------------------------------------------------------------------------

WRITER_TASKS = {                        # the seven of TGVE+ (Singer et al. 2024)
    "style": "turn everything into another visual style, such as a painting, a film look or an animation",
    "object": "replace one visible object, animal or person by something else of similar size and place",
    "background": "replace the background, the place, the weather or the season, and keep the subject",
    "multiple": "change two or three different things at once, such as the subject and the background",
    "removal": "remove one visible object, so that the scene behind it shows",
    "addition": "add one new object at a place that the instruction names",
    "texture": "change the material, the colour or the surface pattern of one visible object",
}
TEMPERATURE, TOP_P = 0.7, 0.9           # of the writer's sampling; ours
SIMILAR = 0.8                           # share of words that makes two instructions too much alike; ours
FIELDS = ("task", "instruction", "source_caption", "target_caption")
WRITER_PROMPT = """You write instructions for a video editor. Look at what is shown and invent one edit of \
the kind "{task}": {what}. Name things that can really be seen. Write the instruction as a short command, \
describe what is shown in one sentence, and describe the edited result in one sentence that differs only \
by the edit.{more}
Answer with one JSON object and nothing else:
{{"task": "{task}", "instruction": "...", "source_caption": "...", "target_caption": "..."}}"""


def writer_prompt(task, refused=""):
    more = f" Your last answer was refused ({plain(refused)}): write another." if refused else ""
    return WRITER_PROMPT.format(task=task, what=WRITER_TASKS[task], more=more)


def parse_answer(text, task):
    """The model's text -> ({task, instruction, source_caption, target_caption}, "") or (None, reason)."""
    try:
        return check_answer(text, task), ""
    except ValueError as error:
        return None, str(error)


def check_answer(text, task):
    try:
        record, _ = json.JSONDecoder().raw_decode(text[max(text.find("{"), 0):])    # text around it may stay
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} in {text[:60]!r}") from None
    need(isinstance(record, dict), f"not a JSON object: {text[:60]!r}")
    for field in FIELDS:
        value = record.get(field)
        need(isinstance(value, str) and re.search(r"\w", value), f"no text under {field!r}")
    record = {field: " ".join(record[field].split()) for field in FIELDS}
    need(record["task"] == task, f"task {record['task']!r} where {task!r} was asked for")
    for field, most in zip(FIELDS[1:], (30, 60, 60)):                   # words; CLIP reads 77 tokens
        n = len(record[field].split())
        need(2 <= n <= most, f"{field} of {n} words, 2 to {most} fit")
    instruction, source, target = (words_of(record[field]) for field in FIELDS[1:])
    need(source != target, "the two captions are equal")
    need(instruction not in (source, target), "the instruction is a caption")
    return record


def words_of(text):
    return frozenset(re.findall(r"\w+", text.lower())) - set("a an the it to of in into with and".split())


def near_duplicate(instruction, accepted):
    """The first of `accepted` {words_of(text): text} that shares more than SIMILAR of its words with the
    instruction (intersection over union), or None."""
    words = words_of(instruction)
    if words in accepted:
        return accepted[words]
    return next((text for w, text in accepted.items() if len(words & w) > SIMILAR * len(words | w)), None)


def check_mix(mix):
    """UserError unless {task: weight} names known tasks and wants one of them."""
    if set(mix) - set(WRITER_TASKS) or min(mix.values()) < 0 or max(mix.values()) <= 0:
        raise UserError(f"--task-mix {mix}: give weights of 0 or more, not all 0, to "
                        f"{', '.join(WRITER_TASKS)}")


def write_instructions(say, clips, mix=None, done=(), batch=4, tries=3, frames=8):
    """Clips, an iterable of (id, clip), -> one record per clip, in order: {id, kept, why, tries, task} and,
    if kept, {instruction, source_caption, target_caption}. Not kept: a clip without frames or with `tries`
    invalid or repeated answers.

    say(visuals, prompts, max_new_tokens, temperature, top_p, seeds) -> texts, as `generate`.
    mix {task: weight}: how much of each kind is wanted (default: equal parts); a clip gets the task furthest
    behind. done: records of an earlier run, which count for the mix and for near-duplicates. Seeds come from
    ids, so an answer does not depend on its batch.
    """
    mix = mix or dict.fromkeys(WRITER_TASKS, 1.0)
    check_mix(mix)
    kept = [r for r in done if r["kept"]]
    count = Counter(r["task"] for r in kept)
    accepted = {words_of(r["instruction"]): r["instruction"] for r in kept}
    clips = iter(clips)
    while group := list(islice(clips, batch)):
        records = []
        for key, _ in group:
            task = min((t for t in mix if mix[t] > 0), key=lambda t: count[t] / mix[t])
            count[task] += 1
            records.append({"id": key, "kept": False, "why": "no frames", "tries": 0, "task": task})
        todo = [(r, even_frames(clip, frames)) for r, (_, clip) in zip(records, group) if len(clip)]
        for n in range(tries):
            # a refused answer to the same prompt tends to come again, so the next prompt says what was wrong
            prompts = [writer_prompt(r["task"], r["why"] if n else "") for r, _ in todo]
            digests = [hashlib.sha256(f"{r['id']}/{n}".encode()).digest() for r, _ in todo]
            seeds = [int.from_bytes(digest[:7], "big") for digest in digests]
            texts = say([clip for _, clip in todo], prompts, 256, TEMPERATURE, TOP_P, seeds) if todo else []
            for (r, _), text in zip(todo, texts, strict=True):
                r["tries"] = n + 1
                answer, r["why"] = parse_answer(text, r["task"])
                twin = answer and near_duplicate(answer["instruction"], accepted)
                if twin:
                    r["why"] = f"too close to {twin!r}"
                elif answer:
                    r.update(answer, kept=True)
                    accepted[words_of(answer["instruction"])] = answer["instruction"]
            todo = [(r, clip) for r, clip in todo if not r["kept"]]
        for r in records:
            count[r["task"]] -= not r["kept"]                           # a dropped clip leaves its place
            yield r


# ----------------------------------------------------------------------------------------------------------
# Fine-tuning the writer on image-editing triples: LoRA (Hu et al. 2022)
# ----------------------------------------------------------------------------------------------------------

class LoRA(nn.Module):
    """y = W x + b + 2 B A x, W frozen; A (r, in) random, B (out, r) zero: it starts as the layer it wraps."""
    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        down = torch.randn(rank, base.in_features, device=base.weight.device)   # float32 over bf16 weights
        self.lora_A = nn.Parameter(down / base.in_features ** 0.5)
        self.lora_B = nn.Parameter(down.new_zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + 2 * F.linear(F.linear(x.to(self.lora_A), self.lora_A), self.lora_B).to(x)


def add_lora(model, rank=16):
    """Freezes the model and wraps every matrix of its decoder layers -> what to train, {name: parameter}."""
    model.requires_grad_(False)
    layers = model.language_model.model.layers
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            layers.set_submodule(name, LoRA(module, rank))
    return lora_of(model)


def lora_of(model):
    """{name: parameter} of the trained matrices."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@torch.no_grad()
def merge_lora(model):
    """W + 2 B A becomes each layer's weight, summed in float32: published names and full speed again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            module.base.weight.copy_(module.base.weight.float() + 2 * module.lora_B @ module.lora_A)
            model.set_submodule(name, module.base)


def save_lora(model, path):
    """Writes the trained matrices alone."""
    save_tensors(path, lora_of(model))


def load_lora(model, path):
    """Merges a file of `save_lora` into the model. UserError if it was trained on a model of another size."""
    tensors = read_tensors(path)
    with reading(path, "give a file of train.py writer"):
        ranks = {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A")}
        need(len(ranks) == 1, "not LoRA weights")
    add_lora(model, ranks.pop())
    load_weights(model, tensors, str(path), only=".lora_", device=model.image_newline.device)
    merge_lora(model)


def guess_task(instruction):
    """A task of WRITER_TASKS by an instruction's words: data that names none is trained with its prompt."""
    text = instruction.lower()

    def has(words):
        return re.search(rf"\b({words})\b", text)

    if has("and") and len(re.findall(r"\b(make|turn|change|replace|add|remove|swap|put|give)\b", text)) > 1:
        return "multiple"
    for task, words in (
            ("removal", "remove|delete|erase|take away|get rid|without"),
            ("style", "style|painting|sketch|drawing|cartoon|anime|watercolou?r|pixel art|black and white"),
            ("background", "background|sky|snow|rain|winter|summer|autumn|night|sunset|beach|forest"),
            ("addition", "add|put|insert|place|give"),
            ("texture", "made of|colou?r|wooden|metal|gold|glass|marble|stone|striped|texture|material")):
        if has(words):
            return task
    return "object"


def writer_loss(model, visuals, answers):
    """Mean negative log-likelihood, in nats per token, of answers to the writer's prompt, both lists.

    answers: {instruction, source_caption, target_caption} and perhaps task. Gradients reach the decoder only.
    """
    rows, targets = [], []
    for visual, answer in zip(visuals, answers, strict=True):
        task = answer.get("task") or guess_task(answer["instruction"])
        prompt = model.row(visual, writer_prompt(task))
        text = json.dumps({"task": task, **{f: answer[f] for f in FIELDS[1:]}}, ensure_ascii=False)
        ids = model.tokenizer.encode(plain(text) + "<|im_end|>").ids
        targets.append(torch.tensor(ids, device=prompt.device))
        rows.append(torch.cat([prompt, model.language_model.model.embed_tokens(targets[-1])]))
    states = model.language_model(nn.utils.rnn.pad_sequence(rows, batch_first=True))
    # the state before a token predicts it; logits for the answers alone, at 152,000 a token
    states = torch.cat([s[len(r) - len(t) - 1:len(r) - 1] for s, r, t in zip(states, rows, targets)])
    return F.cross_entropy(model.language_model.lm_head(states).float(), torch.cat(targets))


# ----------------------------------------------------------------------------------------------------------
# The judge
# ----------------------------------------------------------------------------------------------------------

JUDGE_QUESTIONS = {
    "follows": 'The second clip was made from the first by the instruction "{}". Does the second clip follow '
               "the instruction? Answer yes or no.",
    "preserves": 'The second clip was made from the first by the instruction "{}". Apart from what the '
                 "instruction asks for, is everything else unchanged? Answer yes or no.",
    "clean": "The second clip is an edit of the first. Is the second clip free of artefacts and flicker? "
             "Answer yes or no.",
}


def judge_edit(model, source, edited, instruction, frames=8):
    """{follows, preserves, clean}: probabilities of yes in [0, 1], higher is better, about clips (F, 3, H, W)
    in [-1, 1], of which so many frames are shown; "judge", their geometric mean, is low if any of them is."""
    questions = [q.format(plain(instruction)) for q in JUDGE_QUESTIONS.values()]
    p = model.probability_of_yes((source, edited), questions, frames)
    return {**dict(zip(JUDGE_QUESTIONS, p)), "judge": math.prod(p) ** (1 / len(p))}
