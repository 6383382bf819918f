"""The paper's two teachers, in plain PyTorch from their published weights: delete this file and only their steps break.

CogVideoX         CogVideoX-5B image-to-video (Yang et al. 2024): a frame and a caption become a clip; T5Encoder its text
LlavaOneVision    LLaVA-OneVision (Li et al. 2024): writes instructions for clips, judges edits; LoRA to fine-tune it
"""
import hashlib
import json
import math
import re
import struct
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer
from tokenizers import Tokenizer as FastTokenizer
from tqdm import tqdm

from model import (ACTIVATIONS, CLIPEncoder, UserError, aside, attention, find_tensors, hub_dir, load_weights, read_json, read_tensors,
                   stretch, timestep_embedding, to_u8)

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


def rotate_pairs(x, cos, sin):
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
            s[:, n:] = rotate_pairs(s[:, n:], *rope)
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
        where = read_json(index).get("weight_map")
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


def inside(h, w, height, width):
    """Where an image of h x w lies in a frame that shows all of it: (top, left, its height, its width)."""
    scale = min(height / h, width / w)
    size = min(height, round(h * scale)), min(width, round(w * scale))
    return (height - size[0]) // 2, (width - size[1]) // 2, *size


def fit_image(image, height, width, pad=False):
    """image (3, H, W) in [-1, 1], or PIL -> (3, height, width): scaled to cover, then cropped around the centre, so any
    aspect; pad: all of it, with black around. UserError where it would be enlarged over 4 times or a value is out of
    range."""
    if not torch.is_tensor(image):
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"image of shape {tuple(image.shape)}: needs (3, H, W)")
    h, w = image.shape[1:]
    if (4 * h < height and 4 * w < width) if pad else (4 * h < height or 4 * w < width):
        raise UserError(f"image of {w}x{h} is too small for a clip of {width}x{height}; needs at least "
                        f"{math.ceil(width / 4)}x{math.ceil(height / 4)}")
    image = image.float()
    if not (image.abs() <= 1.001).all():
        raise UserError(f"image with values from {image.min():.3g} to {image.max():.3g}: needs [-1, 1]")
    top, left, *size = inside(h, w, height, width)
    if not pad:
        scale = max(height / h, width / w)
        size = [max(height, round(h * scale)), max(width, round(w * scale))]
    if size != [h, w]:
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    if pad:
        return F.pad(image, (left, width - size[1] - left, top, height - size[0] - top), value=-1.0)
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
                with aside(file) as part:
                    save_file({"states": states}, part)
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

    def latents(self, jobs, n_frames=49, steps=50, guidance=6.0, negative="", sampler="ddim", z_T=None,
                image_noise=None):
        """Yield the clean latents (1, f, 16, h, w), on the CPU, of each (image, caption, seed): all captions go
        through T5, all images through the VAE, then one after another through the transformer, so that each
        network is loaded once. Arguments and errors as in `animate`; `decode` makes a clip of them."""
        h, w, c = (self.config["transformer"][k] for k in ("sample_height", "sample_width", "out_channels"))
        f = (n_frames - 1) // 4 + 1
        if not 1 <= n_frames <= 4 * f - 3 * (f % 2):
            raise UserError(f"--frames {n_frames}: the clip would have {max(0, 4 * f - 3 * (f % 2))}; pass "
                            "49 (as published), a multiple of 8, or one more than that")
        CogSchedule(self.scheduler, steps)                      # a bad step count shows before minutes of T5
        jobs = [(fit_image(image, 8 * h, 8 * w), caption, torch.Generator().manual_seed(seed))
                for image, caption, seed in jobs]
        unwanted, *ctx = self.text_states([negative, *(caption for _, caption, _ in jobs)])
        starts = []
        for image, _, g in jobs:
            drawn = [torch.randn(1, n, c, h, w, generator=g) for n in (1, f)]
            z_img = self.encode_image(image, f, drawn[0] if image_noise is None else image_noise)
            starts.append((drawn[1] if z_T is None else z_T, z_img, g))
        for (z, z_img, g), states in zip(starts, ctx):
            for z in self.denoise(z, z_img, torch.stack([unwanted, states]), steps, guidance, sampler, g):
                pass
            yield z.cpu()

    def animate(self, image, caption, seed=0, n_frames=49, steps=50, guidance=6.0, negative="",
                sampler="ddim", z_T=None, image_noise=None):
        """Make a clip that starts from an image: video (1, F, 3, 480, 720) float32 in [-1, 1], at 8 fps.

        image (3, H, W) in [-1, 1] or PIL, any aspect (see fit_image). seed: the same noise on every device.
        n_frames: 49 as published; other counts use computed positions, and f = (n_frames - 1) // 4 + 1
        latents give F = 4f - 3 frames, or 4f if f is even, so 48 gives 48. z_T (1, f, 16, h, w) and
        image_noise (1, 1, 16, h, w) replace the seed's draws. Raises UserError for a bad image or step count,
        and where F is below n_frames.
        """
        [z] = self.latents([(image, caption, seed)], n_frames, steps, guidance, negative, sampler, z_T, image_noise)
        return self.decode(z)


# ============================================================================================================
# The teacher that looks at video and says something: LLaVA-OneVision (Li et al. 2024), with Qwen2 0.5B or 7B.
# It writes instructions for real clips (stages II and III of the paper) and judges edits. In order: pictures
# in, networks, the model and its prompt, the writer, LoRA to fine-tune the writer, the judge.

LLAVA = "llava-hf/llava-onevision-qwen2-7b-ov-hf"       # 16.1 GB, Apache 2.0; the 0.5B sister has 1.8 GB
LLAVA_FILES = ["*.json", "*.jinja", "merges.txt", "*.safetensors"]

# ------------------------------------------------------------------------------------------------------------
# pictures in

def paste(image, height, width):
    """uint8 (H, W, 3) in the middle of a black canvas; an odd margin is wider below and on the right."""
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas[top:top + image.shape[0], left:left + image.shape[1]] = image
    return canvas


def best_resolution(height, width, pinpoints):
    """The [H, W] of `pinpoints` that keeps most pixels of an image fitted into it, then wastes least."""
    def merit(pin):
        scale = min(pin[1] / width, pin[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pin[0] * pin[1]
    return max(pinpoints, key=merit)


def cut_tiles(image, size, pinpoints):
    """uint8 (H, W, 3) -> uint8 (1 + n, size, size, 3): the whole image stretched to a square, then n tiles,
    row by row, of the image fitted into its best resolution with black around it."""
    height, width = image.shape[:2]
    high, wide = best_resolution(height, width, pinpoints)
    if wide / width < high / height:
        fit = wide, min(math.ceil(height * (wide / width)), high)       # (width, height), as PIL has it
    else:
        fit = min(math.ceil(width * (high / height)), wide), high
    canvas = paste(stretch(image, *fit), high, wide)
    tiles = canvas.reshape(high // size, size, wide // size, size, 3).swapaxes(1, 2)
    return np.concatenate([stretch(image, size, size)[None], tiles.reshape(-1, size, size, 3)])


def unpad(x, height, width):
    """Feature map (D, h, w) of a canvas -> the part that shows its image of `height` x `width` pixels."""
    h, w = x.shape[1:]
    if width / height > w / h:                                          # black above and below
        pad = (h - int(round(height * (w / width), 7))) // 2
        return x[:, pad:h - pad]
    pad = (w - int(round(width * (h / height), 7))) // 2
    return x[:, :, pad:w - pad]


def even_frames(clip, n):
    """n evenly spaced frames of a clip (F, ...), ends included. UserError if it has fewer."""
    if len(clip) < n:
        raise UserError(f"the clip has {len(clip)} frames, not the {n} asked for: take a longer one or fewer")
    return clip[np.linspace(0, len(clip) - 1, n).round().astype(int)]


# ------------------------------------------------------------------------------------------------------------
# networks, under their published names

class SigLIP(nn.Module):
    """SigLIP so400m without class token and head (Zhai et al. 2023): (N, 3, S, S) -> (N, patches, D)."""

    def __init__(self, cfg):
        super().__init__()
        width, patch, eps = cfg["hidden_size"], cfg["patch_size"], cfg.get("layer_norm_eps", 1e-6)
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, width, patch, patch),    # 384 = 27 * 14 + 6: the last 6 go unseen
            "position_embedding": nn.Embedding((cfg["image_size"] // patch) ** 2, width)})
        self.encoder = CLIPEncoder(width, cfg["num_hidden_layers"], cfg["num_attention_heads"],
                                   cfg["intermediate_size"], cfg.get("hidden_act", "gelu_pytorch_tanh"), eps)
        self.post_layernorm = nn.LayerNorm(width, eps)            # in the file; LLaVA takes what comes before

    def forward(self, x):
        x = self.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
        return self.encoder(x + self.embeddings.position_embedding.weight)


def rotary(positions, width, theta, dtype):
    """Positions (B or 1, L) -> cos, sin (B or 1, L, 1, width) of rotary positions (Su et al. 2021)."""
    freq = theta ** (-torch.arange(0, width, 2, device=positions.device).float() / width)
    angle = positions[:, :, None, None] * torch.cat([freq, freq])
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class QwenAttention(nn.Module):
    """Causal attention; a group of query heads shares one head of keys and values (Ainslie et al. 2023)."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
        width = cfg["hidden_size"]
        self.d = width // self.heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, self.kv * self.d), nn.Linear(width, self.kv * self.d)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, rope, cache=None, at=None, mask=None):
        """x (B, L, D). Without `at`, x is the whole prompt and fills the start of `cache` (2, B, n, kv*d), if
        there is one. With at (B,), x is one new token per row, L = 1, that takes this place in the cache."""
        B, L, _ = x.shape
        group = self.heads // self.kv
        q = rotate(self.q_proj(x).view(B, L, self.heads, self.d), *rope)
        k = rotate(self.k_proj(x).view(B, L, self.kv, self.d), *rope).flatten(2)
        v = self.v_proj(x)
        if at is None:
            if cache is not None:
                cache[0, :, :L], cache[1, :, :L] = k, v
            k, v = (y.view(B, L, self.kv, self.d).repeat_interleave(group, 2).flatten(2) for y in (k, v))
            return self.o_proj(attention(q.flatten(2), k, v, self.heads, causal=True))
        rows = torch.arange(B, device=x.device)
        cache[0, rows, at], cache[1, rows, at] = k[:, 0], v[:, 0]
        # a group's queries stand as `group` positions of its one key head: no copy of the cache is made
        q = q.view(B, self.kv, group, self.d).transpose(1, 2).flatten(2)
        y = attention(q, cache[0], cache[1], self.kv, mask=mask)
        return self.o_proj(y.view(B, group, self.kv, self.d).transpose(1, 2).reshape(B, 1, -1))


class QwenMLP(nn.Module):
    def __init__(self, width, hidden, act):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act = ACTIVATIONS[act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class QwenLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width, eps = cfg["hidden_size"], cfg.get("rms_norm_eps", 1e-6)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.self_attn = QwenAttention(cfg)
        self.mlp = QwenMLP(width, cfg["intermediate_size"], cfg.get("hidden_act", "silu"))

    def forward(self, x, rope, cache, at, mask):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, at, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The decoder (Yang et al. 2024) on embeddings: (B, L, D) -> states (B, L, D); `lm_head` makes logits."""

    def __init__(self, cfg):
        super().__init__()
        width, vocab = cfg["hidden_size"], cfg["vocab_size"]
        self.theta, self.d = cfg.get("rope_theta", 1e6), width // cfg["num_attention_heads"]
        self.limit = cfg.get("max_position_embeddings", 32768)
        self.kv_width = self.d * cfg["num_key_value_heads"]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(vocab, width),
            "layers": nn.ModuleList(QwenLayer(cfg) for _ in range(cfg["num_hidden_layers"])),
            "norm": nn.RMSNorm(width, cfg.get("rms_norm_eps", 1e-6))})
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def new_cache(self, batch, length):
        """Room for keys and values of `length` tokens per row: 57 KB a token for 7B in bf16."""
        # zeros: what lies behind a short row is masked, but a NaN there would come through as 0 * NaN
        return [self.lm_head.weight.new_zeros(2, batch, length, self.kv_width) for _ in self.model.layers]

    def forward(self, x, cache=None, at=None, filled=None):
        """Whole prompts (`at` None), padded on the right, where causal attention never looks; or one more
        token per row at position at (B,), with the first `filled` places of the cache, its own included."""
        positions = torch.arange(x.shape[1], device=x.device)[None] if at is None else at[:, None]
        rope, mask = rotary(positions, self.d, self.theta, x.dtype), None
        if at is not None and len(at) > 1:                              # a short row must not see its padding
            mask = (torch.arange(filled, device=x.device) <= at[:, None])[:, None, None]   # (B, 1, 1, filled)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, None if cache is None else cache[i][:, :, :filled], at, mask)
        return self.model.norm(x)


# ------------------------------------------------------------------------------------------------------------
# the model and its prompt

# Qwen2's pieces of text: contractions, words, single digits, runs of signs, white space
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def read_tokenizer(folder):
    """Qwen2's byte-level BPE from tokenizer.json, or from vocab.json, merges.txt and added_tokens.json."""
    if (folder / "tokenizer.json").exists():
        return BPETokenizer.from_file(str(folder / "tokenizer.json"))
    tok = BPETokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tok.normalizer, tok.decoder = normalizers.NFC(), decoders.ByteLevel()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    added = read_json(folder / "added_tokens.json")
    tok.add_special_tokens(sorted(added, key=added.get))                # they get the next ids, in this order
    wrong = [word for word, i in added.items() if tok.token_to_id(word) != i]
    if wrong:
        raise UserError(f"{folder}/added_tokens.json: {wrong[0]!r} does not follow on vocab.json; "
                        "take all files from one model")
    return tok


def read_chat_template(folder):
    """The literals of chat_template.json (or .jinja, as newer libraries save it), without a template engine: {role, image,
    video, text, end, ask}.

    Every published version puts the role, then images, videos and text, then the end; they differ in the
    white space between, so only that is taken from the file. UserError where a literal is not found.
    """
    at = next((folder / name for name in ("chat_template.json", "chat_template.jinja") if (folder / name).exists()),
              folder / "tokenizer_config.json")
    template = at.read_text(encoding="utf-8") if at.suffix == ".jinja" else str(read_json(at).get("chat_template", ""))
    quoted = lambda start: rf"'({start}[^']*)'"
    wanted = {"role": r"'<\|im_start\|>'\s*\+\s*message\['role'\]\s*\+\s*" + quoted(""),
              "image": quoted("<image>"), "video": quoted("<video>"), "end": quoted(r"<\|im_end\|>"),
              "ask": quoted(r"<\|im_start\|>assistant"),
              "text": quoted("") + r"\s*\+\s*content\['text'\]"}        # some versions put nothing before it
    found = {name: re.search(pattern, template) for name, pattern in wanted.items()}
    missing = [name for name, m in found.items() if m is None and name != "text"]
    if missing:
        raise UserError(f"{at}: no {missing[0]!r} part in the chat template; take the file of "
                        "llava-hf/llava-onevision-qwen2-7b-ov-hf")
    return {name: m.group(1).replace("\\n", "\n") if m else "" for name, m in found.items()}


def plain(text):
    """Others' text in which nothing reads as a special token: <video> becomes video, <|im_end|> |im_end|."""
    while (clean := re.sub(r"<(\|?\w+\|?)>", r"\1", text)) != text:
        text = clean
    return text


def is_clip(visual):
    return not isinstance(visual, Image.Image) and visual.ndim > 3


class LlavaOneVision(nn.Module):
    """LLaVA-OneVision from a config in the published form; `from_pretrained` also brings the tokenizer.

    A visual is an image (PIL, uint8 (H, W, 3), or a tensor (3, H, W) in [-1, 1]) or a clip (uint8
    (F, H, W, 3), or a tensor (F, 3, H, W) in [-1, 1]); 8 to 32 frames are usual.
    """

    def __init__(self, cfg):
        super().__init__()
        text, vision = cfg["text_config"], cfg["vision_config"]
        features = cfg.get("vision_feature_layer", -1), cfg.get("vision_feature_select_strategy", "full")
        if features != (-1, "full"):
            raise UserError(f"config.json: features {features} are not LLaVA-OneVision's (-1, 'full'); give "
                            f"{LLAVA} or a copy of it")
        self.cfg, self.size = cfg, vision["image_size"]
        self.grid = self.size // vision["patch_size"]                   # patches per side: 27
        self.vision_tower = nn.ModuleDict({"vision_model": SigLIP(vision)})
        width = text["hidden_size"]
        self.multi_modal_projector = nn.ModuleDict({"linear_1": nn.Linear(vision["hidden_size"], width),
                                                    "linear_2": nn.Linear(width, width)})
        self.image_newline = nn.Parameter(torch.zeros(width))
        self.language_model = Qwen2(text)
        self.mean, self.std = [0.5] * 3, [0.5] * 3                # SigLIP's; from_pretrained reads the file's

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=None, lora=None):
        """source: llava-hf/llava-onevision-qwen2-0.5b-ov-hf (2 GB), -7b-ov-hf (16 GB), or such a directory.

        lora: a file of `save_lora`, merged in. Default: CUDA in bf16 where there is one, else CPU in float32.
        Raises UserError for another model, a missing shard, a wrong index.
        """
        folder = Path(hub_dir(source, LLAVA_FILES))
        cfg = read_json(folder / "config.json")
        kind = cfg.get("model_type", "llava_onevision")
        if kind != "llava_onevision" or not {"text_config", "vision_config"} <= cfg.keys():
            raise UserError(f"{folder}/config.json: not LLaVA-OneVision's ({kind}); give {LLAVA} or a copy of it")
        tensors, file = find_tensors(folder)
        words, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
        if words in tensors:                                       # the file knows its padded vocabulary best
            cfg["text_config"]["vocab_size"] = len(tensors[words])
        tied = head not in tensors and any(c.get("tie_word_embeddings") for c in (cfg, cfg["text_config"]))
        with torch.device("meta"):
            net = cls(cfg)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        load_weights(net, tensors, f"{folder.name}/{file}", absent=(head,) if tied else (),
                     device=device, dtype=dtype)
        if tied:
            net.language_model.lm_head.weight = net.language_model.model.embed_tokens.weight
        pre = read_json(folder / "preprocessor_config.json")        # the video processor's file says the same
        net.mean, net.std = pre["image_mean"], pre["image_std"]
        net.tokenizer, net.chat_format = read_tokenizer(folder), read_chat_template(folder)
        end = read_json(folder / "generation_config.json")["eos_token_id"]
        net.end_ids = end if isinstance(end, list) else [end]
        if lora:
            load_lora(net, lora)
        return net.eval().requires_grad_(False)

    # what it sees

    def see(self, tiles):
        """uint8 (N, S, S, 3) -> projected features (N, patches, D), the tower's before (N, patches, Dv)."""
        device, dtype = self.image_newline.device, self.image_newline.dtype
        mean, std = (torch.tensor(v, device=device) for v in (self.mean, self.std))
        x = ((torch.tensor(tiles, device=device).float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)
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
            x, _ = self.see(np.stack([stretch(f, size, size) for f in frames]))
            x = x.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)                  # (F, D, 27, 27)
            x = F.interpolate(x, size=[-(-self.grid // 2)] * 2, mode="bilinear")
            return torch.cat([x.flatten(2).transpose(1, 2).flatten(0, 1), self.image_newline[None]])
        height, width = frames[0].shape[:2]
        high, wide = best_resolution(height, width, self.cfg["image_grid_pinpoints"])
        x, _ = self.see(cut_tiles(frames[0], size, self.cfg["image_grid_pinpoints"]))
        whole, x = x[0], x[1:].view(high // size, wide // size, self.grid, self.grid, -1)
        x = unpad(x.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2), height, width)      # (D, h, w), no black
        most = int(self.cfg.get("vision_aspect_ratio", "anyres_max_9").removeprefix("anyres_max_"))
        ratio = math.sqrt(x.shape[1] * x.shape[2] / (most * self.grid ** 2))
        if ratio > 1.1:
            small = [int(x.shape[1] // ratio), int(x.shape[2] // ratio)]
            x = F.interpolate(x[None], size=small, mode="bilinear")[0]
        x = torch.cat([x, self.image_newline[:, None, None].expand(-1, x.shape[1], 1)], 2)
        return torch.cat([whole, x.flatten(1).T])

    # what it is asked

    def chat(self, text, images=0, videos=0):
        """The prompt of one turn that shows so many images, then so many clips, up to the answer."""
        f = self.chat_format
        return "".join(["<|im_start|>user", f["role"], f["image"] * images, f["video"] * videos,
                        f["text"], text, f["end"], f["ask"]])

    def input_ids(self, prompt, sizes):
        """Prompt -> ids (L,), the i-th <image> or <video> sizes[i] times. UserError on another number."""
        found, ids, sizes = self.tokenizer.encode(prompt).ids, [], list(sizes)
        marks = self.cfg["image_token_index"], self.cfg["video_token_index"]
        places = sum(i in marks for i in found)
        if places != len(sizes):
            raise UserError(f"the prompt has {places} places for {len(sizes)} images and clips: "
                            "leave <image> and <video> out of the text")
        for i in found:
            ids += [i] * (sizes.pop(0) if i in marks else 1)
        return torch.tensor(ids, device=self.image_newline.device)

    def embed(self, prompt, seen):
        """Prompt and the features of what it shows [(n, D), ...] -> embeddings (L, D)."""
        ids = self.input_ids(prompt, [len(s) for s in seen])
        x = self.language_model.model.embed_tokens(ids)
        marks = (ids == self.cfg["image_token_index"]) | (ids == self.cfg["video_token_index"])
        x[marks] = torch.cat(seen)
        return x

    def row(self, visual, text):
        """A visual and the text that comes with it -> embeddings (L, D)."""
        clip = is_clip(visual)
        return self.embed(self.chat(text, images=not clip, videos=clip), [self.look(visual)])

    # what it says

    def prefill(self, rows, room=0):
        """Prompts [(L_i, D), ...] -> logits of the next token (B, V), lengths (B,), cache with `room`."""
        lengths = torch.tensor([len(r) for r in rows], device=rows[0].device)
        longest = int(lengths.max())
        if longest + room > self.language_model.limit:
            raise UserError(f"a prompt of {longest} tokens and {room} new ones pass the model's "
                            f"{self.language_model.limit}: show fewer frames")
        cache = self.language_model.new_cache(len(rows), longest + room) if room else None
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
        answers, ended, longest = [[] for _ in rows], [False] * len(rows), int(at.max())
        for n in range(max_new_tokens):
            if not logits.isfinite().all():
                raise UserError(f"the language model gave NaN or Inf at token {n}: use float32 or bfloat16")
            if temperature == 0:
                ids = logits.argmax(-1)
            else:
                u = torch.tensor([float(torch.rand((), generator=g)) for g in draws], device=logits.device)
                ids = nucleus(logits / temperature, top_p, u)
            for i, token in enumerate(ids.tolist()):
                ended[i] = ended[i] or token in self.end_ids
                answers[i] += [] if ended[i] else [token]
            if all(ended) or n + 1 == max_new_tokens:
                break
            x = self.language_model.model.embed_tokens(ids)[:, None]
            x = self.language_model(x, cache, at, filled=longest + n + 1)
            logits, at = self.language_model.lm_head(x[:, 0]).float(), at + 1
        return answers

    @torch.no_grad()
    def generate(self, visuals, prompts, max_new_tokens=128, temperature=0.0, top_p=1.0, seeds=None):
        """The answers to a list of prompts, each about its own visual: one batch, which says the same as one by one."""
        rows = [self.row(v, p) for v, p in zip(visuals, prompts, strict=True)]
        ids = self.generate_ids(rows, max_new_tokens, temperature, top_p, seeds)
        return [self.tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids]

    @torch.no_grad()
    def probability_of_yes(self, pair, questions, frames=8):
        """P(yes) / (P(yes) + P(no)) of each answer's first token, in [0, 1].

        pair: (source, edited) clips of at least `frames` frames, shown in one prompt in this order.
        """
        seen = [self.look(even_frames(clip, frames)) for clip in pair]                # once for all questions
        logits, _, _ = self.prefill([self.embed(self.chat(q, videos=2), seen) for q in questions])
        first = lambda words: sorted({self.tokenizer.encode(w).ids[0] for w in words})
        yes, no = (logits[:, first(w)].logsumexp(-1) for w in (("Yes", "yes", "YES"), ("No", "no", "NO")))
        return (yes - no).sigmoid().tolist()


def nucleus(logits, top_p, u):
    """logits (B, V), u (B,) uniform in [0, 1) -> ids (B,): the distribution of the likeliest tokens whose
    mass reaches top_p (Holtzman et al. 2020), inverted at u: the same draw on every device."""
    p, order = logits.softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                    # the token that crosses top_p stays in
    mass = p.cumsum(-1)
    at = (mass <= u[:, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[1] - 1)
    return order.gather(1, at)[:, 0]


# ------------------------------------------------------------------------------------------------------------
# the writer: a clip -> task, instruction, captions before and after

WRITER_TASKS = {                                                            # the seven of TGVE+ (Singer et al. 2024)
    "style": "turn everything into another visual style, such as a painting, a film look or an animation",
    "object": "replace one visible object, animal or person by something else of similar size and place",
    "background": "replace the background, the place, the weather or the season, and keep the subject",
    "multiple": "change two or three different things at once, such as the subject and the background",
    "removal": "remove one visible object, so that the scene behind it shows",
    "addition": "add one new object at a place that the instruction names",
    "texture": "change the material, the colour or the surface pattern of one visible object",
}
TEMPERATURE, TOP_P, SIMILAR = 0.7, 0.9, 0.8             # ours: of the writer's sampling; share of words that is too much alike
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
        record, _ = json.JSONDecoder().raw_decode(text[max(text.find("{"), 0):])    # text around it may stay
    except json.JSONDecodeError as e:
        return None, f"not JSON: {e.msg} in {text[:60]!r}"
    if not isinstance(record, dict):
        return None, f"not a JSON object: {text[:60]!r}"
    for field in FIELDS:
        if not isinstance(record.get(field), str) or not re.search(r"\w", record[field]):
            return None, f"no text under {field!r}"
    record = {field: " ".join(record[field].split()) for field in FIELDS}
    if record["task"] != task:
        return None, f"task {record['task']!r} where {task!r} was asked for"
    for field, most in zip(FIELDS[1:], (30, 60, 60)):                   # words; CLIP reads 77 tokens
        if not 2 <= len(record[field].split()) <= most:
            return None, f"{field} of {len(record[field].split())} words, 2 to {most} fit"
    instruction, source, target = (words_of(record[field]) for field in FIELDS[1:])
    if source == target:
        return None, "the two captions are equal"
    if instruction in (source, target):
        return None, "the instruction is a caption"
    return record, ""


def words_of(text):
    return frozenset(re.findall(r"\w+", text.lower())) - set("a an the it to of in into with and".split())


def near_duplicate(instruction, accepted):
    """The first of `accepted` {words_of(text): text} that shares more than SIMILAR of its words with the
    instruction (intersection over union), or None. 16 K instructions among themselves take a minute."""
    words = words_of(instruction)
    if words in accepted:
        return accepted[words]
    return next((text for w, text in accepted.items() if len(words & w) > SIMILAR * len(words | w)), None)


def check_mix(mix):
    """UserError unless {task: weight} names known tasks and wants one of them."""
    if set(mix) - set(WRITER_TASKS) or min(mix.values()) < 0 or max(mix.values()) <= 0:
        raise UserError(f"--task-mix {mix}: give weights of 0 or more, not all 0, to {', '.join(WRITER_TASKS)}")


def write_instructions(say, clips, mix=None, done=(), batch=4, tries=3, frames=8):
    """Clips, an iterable of (id, clip), -> one record per clip, in order: {id, kept, why, tries, task} and,
    if kept, {instruction, source_caption, target_caption}. Dropped: `tries` invalid or repeated answers.

    say(visuals, prompts, max_new_tokens, temperature, top_p, seeds) -> texts, as `generate`.
    mix {task: weight}: how much of each kind is wanted (default: equal parts); a clip gets the task furthest
    behind. done: records of an earlier run, which count for the mix and for near-duplicates. Seeds
    come from ids.
    """
    mix = mix or dict.fromkeys(WRITER_TASKS, 1.0)
    check_mix(mix)
    kept = [r for r in done if r["kept"]]
    count = Counter(r["task"] for r in kept)
    accepted = {words_of(r["instruction"]): r["instruction"] for r in kept}
    clips = iter(clips)
    while group := list(islice(clips, batch)):
        records, shown = [], []
        for key, clip in group:
            task = min((t for t in mix if mix[t] > 0), key=lambda t: count[t] / mix[t])
            count[task] += 1
            records.append({"id": key, "kept": False, "why": "", "tries": 0, "task": task})
            try:
                shown.append(even_frames(clip, frames))
            except UserError as e:                                      # this clip's fault, not the run's
                shown.append(None)
                records[-1]["why"] = str(e)
        for n in range(tries):
            todo = [(r, clip) for r, clip in zip(records, shown) if clip is not None and not r["kept"]]
            if not todo:
                break
            # a refused answer to the same prompt tends to come again, so the next prompt says what was wrong
            prompts = [writer_prompt(r["task"], r["why"]) for r, _ in todo]
            digests = [hashlib.sha256(f"{r['id']}/{n}".encode()).digest() for r, _ in todo]
            texts = say([clip for _, clip in todo], prompts, 256, TEMPERATURE, TOP_P,
                        [int.from_bytes(d[:7], "big") for d in digests])
            for (r, _), text in zip(todo, texts, strict=True):
                answer, r["why"] = parse_answer(text, r["task"])
                r["tries"] = n + 1
                twin = answer and near_duplicate(answer["instruction"], accepted)
                if twin:
                    r["why"] = f"too close to {twin!r}"
                elif answer:
                    r.update(answer, kept=True)
                    accepted[words_of(answer["instruction"])] = answer["instruction"]
        for r in records:
            count[r["task"]] -= not r["kept"]                           # a dropped clip leaves its place
            yield r


# ------------------------------------------------------------------------------------------------------------
# fine-tuning the writer on image-editing triples: LoRA (Hu et al. 2022)

class LoRA(nn.Module):
    """y = W x + b + 2 B A x, W frozen; A (r, in) random, B (out, r) zero: it starts as the layer it wraps."""

    def __init__(self, base, rank):
        super().__init__()
        self.base, where = base, {"device": base.weight.device}         # float32 over bf16 weights too
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features, **where) / base.in_features ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **where))

    def forward(self, x):
        return self.base(x) + 2 * F.linear(F.linear(x.to(self.lora_A), self.lora_A), self.lora_B).to(x)


def add_lora(model, rank=16):
    """Freezes the model and wraps every matrix of its decoder layers -> what to train, {name: parameter}."""
    model.requires_grad_(False)
    layers = model.language_model.model.layers
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            layers.set_submodule(name, LoRA(module, rank))
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
    with aside(path) as part:
        save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if ".lora_" in n}, part)


def load_lora(model, path):
    """Merges a file of `save_lora` into the model. UserError if it was trained on a model of another size."""
    tensors = read_tensors(path)
    ranks = {t.shape[0] for n, t in tensors.items() if n.endswith("lora_A")}
    trained = add_lora(model, ranks.pop()) if len(ranks) == 1 else {}
    if not trained or {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in tensors.items()}:
        raise UserError(f"{path}: not LoRA weights of this model; give the LLaVA that they were trained on")
    for name, p in trained.items():
        p.data.copy_(tensors[name])
    merge_lora(model)


def guess_task(instruction):
    """A task of WRITER_TASKS by an instruction's words, for data that names none: picks the prompt to train with."""
    text = instruction.lower()
    has = lambda words: re.search(rf"\b({words})\b", text)
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


# ------------------------------------------------------------------------------------------------------------
# the judge

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
    in [-1, 1] of at least `frames` frames; "judge", their geometric mean, is low if any of them is."""
    questions = [q.format(plain(instruction)) for q in JUDGE_QUESTIONS.values()]
    p = model.probability_of_yes((source, edited), questions, frames)
    return {**dict(zip(JUDGE_QUESTIONS, p)), "judge": math.prod(p) ** (1 / len(p))}

