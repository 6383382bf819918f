"""Train every network of this repository: one straight loop, one file.

    python train.py --stage vae         the autoencoder of `tiny`, on scenes drawn by code
    python train.py --stage clip        tiny CLIP on frames and captions; its text tower then is the editor's text encoder
    python train.py --stage viclip      tiny ViCLIP on drawn clips, a scorer
    python train.py --stage image       the InstructPix2Pix-style image editor, on (source, instruction, target)
    python train.py --stage eval        held-out table of the trained or embedded image editor (also printed after training)
    python train.py --stage export      copy the finished networks into assets/tiny as float16
    python train.py                     all of them, in this order, skipping what is finished

Contents: flags, the world set (drawn once, shared by all stages), the loop, one loss per stage, evaluation, export.
A run lives in runs/<model>/<stage>/: model.safetensors (EMA), state.pt (to resume), meta.json, log.jsonl.
"""
import argparse
import hashlib
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BPETokenizer
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

import curate
from metrics import CLIP, ViCLIP
from model import ROOT, VAE, TextEncoder, Tokenizer, UNet, UserError, VideoEditor, noise_levels, read_json, run


# ---------------------------------------------------------------------------------------------------------------
# The world set: pairs of frames drawn once, shared by all stages
# ---------------------------------------------------------------------------------------------------------------

STEPS = {"vae": 1300, "clip": 1000, "viclip": 2000, "image": 1700}               # optimizer steps of each stage
SHARD = 500                                                        # pairs in a file
# how often each task is drawn: the local ones are harder to learn than the global ones, so they come more often
TASK_MIX = {"style": 1, "object": 2.4, "background": 1.3, "multiple": 1.2, "removal": 2, "addition": 1.6,
            "texture": 1.3, "effect": 1.4}


def draw_shard(path, index, size):
    """Render shard `index`: `path`.npy (SHARD, 2, H, W, 3) uint8 [source, target] and `path`.jsonl, one line a pair."""
    rng = Random(f"world shard {index}")
    wide = size * 7 // 32 * 8                                      # 16:9 in multiples of 8
    height, width = rng.choices([(size, size), (size, wide), (wide, size)], [80, 12, 8])[0]
    frames, lines = np.empty((SHARD, 2, height, width, 3), np.uint8), []
    for i in range(SHARD):
        frames[i], record = draw_pair(index * SHARD + i, "real" if i % 5 == 4 else "synthetic", rng, height, width)
        lines.append(record)
    save_shard(path, frames, lines)


def draw_pair(seed, domain, rng, height, width, n_frames=1):
    """One scene and one edit of it: frames (2, H, W, 3), or (2, F, H, W, 3) of a clip, uint8, and their record."""
    scene = curate.draw_scene(seed, domain)
    tasks = curate.possible_tasks(scene)
    edit = curate.propose_edit(scene, seed, rng.choices(tasks, [TASK_MIX[t] for t in tasks])[0])
    t0 = rng.uniform(0, 4)
    frames = np.stack([curate.render(s, n_frames, height, width, t0=t0) for s in (scene, edit.target)])
    record = dict(seed=seed, domain=domain, task=edit.task, instruction=edit.instruction,
                  source=edit.source_caption, target=edit.target_caption)
    frames = (frames * 255 + .5).astype(np.uint8)
    return frames[:, 0] if n_frames == 1 else frames, record


def save_shard(path, frames, lines):
    path.with_suffix(".jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    with open(path.with_suffix(".tmp"), "wb") as f:                # renamed last: a shard is there whole or not at all
        np.save(f, frames)
    os.replace(path.with_suffix(".tmp"), path.with_suffix(".npy"))


def world_set(folder, n_pairs, size, draw=draw_shard, per_file=SHARD):
    """Draw what is missing of the first n_pairs pairs, on all cores; returns [(frames memmap, [record])] by file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{size}px-{i:05d}" for i in range(-(-n_pairs // per_file))]
    todo = [(p, i) for i, p in enumerate(paths) if not p.with_suffix(".npy").is_file()]
    if todo:
        print(f"drawing {len(todo) * per_file} pairs into {folder}")
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for job in tqdm([pool.submit(draw, p, i, size) for p, i in todo], unit="file"):
                job.result()
    return [(np.load(p.with_suffix(".npy"), mmap_mode="r"),
             [json.loads(x) for x in p.with_suffix(".jsonl").read_text().splitlines()]) for p in paths]


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------

def write_json(path, data):
    """Write aside, then rename: a reader never sees half a file."""
    Path(f"{path}.tmp").write_text(json.dumps(data, indent=1))
    os.replace(f"{path}.tmp", path)


def save_tensors(path, tensors, dtype=None):
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in tensors.items()}
    save_file(tensors, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def fit(net, loss_fn, out, meta, steps, lr, per_step, ema=0.999, warmup=200, save_minutes=5, device="cpu", resume_any=False):
    """Train `net` with loss_fn(step, generator) -> loss until `steps`; resumes from `out` where a run was cut.

    AdamW, linear warm-up, cosine to 5 %, gradient norm clipped at 1, EMA. Everything random in a step comes from a
    generator seeded by the step, so a resumed run's next loss equals the uninterrupted one's. Writes into `out`
    model.safetensors (EMA), state.pt, meta.json and log.jsonl. Raises UserError for a NaN, with the step, and for a
    run that was begun with another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    net.to(device).train()
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    start = 0
    if (out / "state.pt").is_file():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        changed = [k for k in meta["args"] if state["args"].get(k) != meta["args"][k]]
        if changed and not resume_any:
            raise UserError(f"{out}: begun with " + ", ".join(f"--{k} {state['args'].get(k)}" for k in changed) + "; "
                            "pass the same, --force to go on with the new ones, or another --runs folder")
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        average, start = state["ema"], state["step"]

    def save(step):
        torch.save(dict(net=net.state_dict(), opt=opt.state_dict(), ema=average, step=step, args=meta["args"]),
                   out / "state.tmp")
        os.replace(out / "state.tmp", out / "state.pt")
        save_tensors(out / "model.safetensors", average)
        write_json(out / "meta.json", meta | {"step": step})

    last_save = last_log = time.time()
    losses, logged = [], start
    for step in range(start, steps):
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        generator = torch.Generator().manual_seed(step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_fn(step, generator)
        if not torch.isfinite(loss):
            raise UserError(f"{out.name}: loss is {loss.item()} at step {step}; lower --lr or resume from the last checkpoint")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in net.state_dict().items():
                average[k].lerp_(v, 1 - decay) if v.is_floating_point() else average[k].copy_(v)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            ms = (time.time() - last_log) * 1e3 / (step + 1 - logged)
            gb = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
            row = dict(step=step + 1, loss=float(np.mean(losses)), lr=opt.param_groups[0]["lr"], ms=ms)
            print(f"step {step + 1:05d}/{steps} | loss {row['loss']:.4f} | lr {row['lr']:.1e} | {ms:.0f} ms | "
                  f"{per_step * 1e3 / ms:.1f} images/s | {gb:.1f} GB", flush=True)
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            losses, last_log, logged = [], time.time(), step + 1
        if time.time() - last_save > 60 * save_minutes or step + 1 == steps:
            save(step + 1)
            last_save = time.time()
    net.load_state_dict(average)
    return net.eval()


def pick(shards, n, generator, axis=2):
    """A random batch: a shard (so one frame size; height and width at `axis`), and pairs of it, n at 1:1 aspect and
    fewer of a wider or taller frame, so that every batch holds about the same number of pixels."""
    frames, records = shards[int(torch.randint(len(shards), (1,), generator=generator))]
    short, long = sorted(frames.shape[axis:axis + 2])
    rows = torch.randint(len(records), (max(2, round(n * short / long)),), generator=generator).tolist()
    return frames, records, rows


def as_input(frames):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------
# Stage vae
# ---------------------------------------------------------------------------------------------------------------

TINY_VAE = dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=8, layers_per_block=1,
                block_out_channels=[24, 48, 96], norm_num_groups=4, act_fn="silu", sample_size=64,
                down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)


def stage_vae(args, shards, out):
    """Autoencoder: L1 + L2 on pixels and on their differences (edges), and a very small KL term (no adversary).

    On 64 crops of 32 pixels a step: many small pictures teach faster than few large ones at the same cost.
    """
    torch.manual_seed(args.seed)
    vae = VAE(TINY_VAE)

    def loss_fn(step, generator):
        frames, records = shards[int(torch.randint(len(shards), (1,), generator=generator))]
        rows = torch.randint(len(records), (64,), generator=generator).tolist()
        top, left = (8 * int(torch.randint((side - 32) // 8 + 1, (1,), generator=generator)) for side in frames.shape[2:4])
        x = np.stack([frames[i, k % 2, top:top + 32, left:left + 32] for k, i in enumerate(rows)])
        x = as_input(x).to(args.device)
        mean, logvar = vae.encode(x)
        d = vae.decode(mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)) - x
        edges = d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return d.abs().mean() + 2 * d.square().mean() + 0.5 * edges + 1e-4 * kl

    steps, lr = args.steps or STEPS["vae"], args.lr or 2e-3
    meta = dict(stage="vae", config=TINY_VAE, args=dict(steps=steps, seed=args.seed, pairs=args.pairs, lr=lr))
    fit(vae, loss_fn, out, meta, steps, lr, 64, ema=0.995, device=args.device, resume_any=args.force)
    # the factor that brings the latents to unit variance goes into the published place, the config
    with torch.no_grad():
        z = torch.cat([vae.encode(as_input(f[:16, 0]).to(args.device))[0].flatten() for f, _ in shards[:20]])
        x = torch.cat([as_input(f[16:24, 0]) for f, _ in shards[:20] if f.shape[2] == f.shape[3]])
        y = torch.cat([vae.decode(vae.encode(part.to(args.device))[0]).cpu() for part in x.split(16)])
    config = TINY_VAE | {"scaling_factor": round(1 / z.std().item(), 5)}
    error = (x - y.clamp(-1, 1)).square().mean(dim=(1, 2, 3)) / 4
    print(f"vae: {-10 * error.log10().mean():.2f} dB on {len(x)} training frames, latent scale {config['scaling_factor']}")
    return vae, config


# ---------------------------------------------------------------------------------------------------------------
# Stage clip
# ---------------------------------------------------------------------------------------------------------------

TINY_TEXT = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, hidden_act="quick_gelu",
                 max_position_embeddings=77, layer_norm_eps=1e-5, projection_dim=96)
TINY_VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, hidden_act="quick_gelu",
                   image_size=96, patch_size=12, layer_norm_eps=1e-5, projection_dim=96)
PREPROCESSOR = dict(crop_size=96, size=96, do_center_crop=True, do_normalize=True, do_resize=True, resample=3,
                    image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])


def train_tokenizer(folder):
    """CLIP's byte-pair format for the words of the shapes world: every known word becomes one token."""
    bpe = BPETokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, show_progress=False, end_of_word_suffix="</w>",
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(curate.known_words(), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    for special in ("<|startoftext|>", "<|endoftext|>"):           # the end token has the largest id: CLIP pools there
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
    return Tokenizer(folder / "vocab.json", folder / "merges.txt")


def match(a, b, scale, same):
    """Symmetric contrastive loss between rows of a and b (N, P); same (N, N) marks pairs with equal texts, all correct."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    target = same.float() / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def stage_clip(args, shards, out):
    """CLIP on frames and captions, source and target of a pair in one batch (each is the other's hard negative), plus
    instructions on the direction from source to target, so that the text tower learns the words of edits too."""
    tokenizer = train_tokenizer(out / "tokenizer")
    torch.manual_seed(args.seed)
    config = dict(model_type="clip", projection_dim=96, text_config=TINY_TEXT | {"vocab_size": len(tokenizer.vocab)},
                  vision_config=TINY_VISION)
    clip = CLIP(config)
    mean, std = (torch.tensor(PREPROCESSOR[k])[:, None, None].to(args.device) for k in ("image_mean", "image_std"))
    square = [s for s in shards if s[0].shape[2] == s[0].shape[3]]

    def tokens(texts):
        ids = tokenizer(texts)
        length = int(ids.argmax(dim=1).max()) + 1                  # text attention is causal: padding can be cut off
        return ids[:, :length].to(args.device)

    def loss_fn(step, generator):
        frames, records, rows = pick(square, 48, generator)
        records = [records[i] for i in rows]
        captions = [r["source"] for r in records] + [r["target"] for r in records]
        orders = [r["instruction"] for r in records]
        x = as_input(np.concatenate([frames[rows, 0], frames[rows, 1]])).to(args.device)
        x = x + 0.02 * torch.randn(len(x), 1, 1, 1, generator=generator).to(x)
        image = clip.encode_image(((x + 1) / 2 - mean) / std)
        scale = clip.logit_scale.exp().clamp(max=100)

        def same(texts):
            ids = {t: i for i, t in enumerate(dict.fromkeys(texts))}
            k = torch.tensor([ids[t] for t in texts], device=args.device)
            return k[:, None] == k
        image_n = F.normalize(image, dim=-1)
        change = image_n[len(rows):] - image_n[:len(rows)]
        return (match(image, clip.encode_text(tokens(captions)), scale, same(captions)) +
                0.5 * match(change, clip.encode_text(tokens(orders)), scale.clamp(max=20), same(orders)))

    steps = args.steps or STEPS["clip"]
    meta = dict(stage="clip", config=config, args=dict(steps=steps, seed=args.seed, pairs=args.pairs, lr=args.lr or 1e-3))
    fit(clip, loss_fn, out, meta, steps, args.lr or 1e-3, 96, ema=0.995, device=args.device, resume_any=args.force)
    return clip, config, tokenizer


# ---------------------------------------------------------------------------------------------------------------
# Stage viclip
# ---------------------------------------------------------------------------------------------------------------

TINY_VICLIP = dict(image_size=96, patch_size=16, num_frames=8, vision_width=80, vision_layers=3, vision_heads=4,
                   text_width=48, text_layers=2, text_heads=4, context_length=32, embed_dim=64)
CLIPS = 250                                                        # pairs of clips in a file, 111 MB


def draw_clips(path, index, size, n_frames=8):
    """Render file `index` of clips: `path`.npy (CLIPS, 2, F, H, W, 3) uint8 [source, target] and `path`.jsonl."""
    rng = Random(f"clips {index}")
    frames, lines = np.empty((CLIPS, 2, n_frames, size, size, 3), np.uint8), []
    for i in range(CLIPS):                                         # seeds far from those of the world set
        frames[i], record = draw_pair(50_000_000 + index * CLIPS + i, "real" if i % 5 == 4 else "synthetic", rng,
                                      size, size, n_frames)
        lines.append(record)
    save_shard(path, frames, lines)


def stage_viclip(args, shards, out, base):
    """ViCLIP on drawn clips with stage clip's loss: captions on clips, source and target of a pair in one batch, plus
    captions' difference and instructions on the direction from source to target, which is what ViCLIP_dir asks for.

    Every other step sees stills of the world set, which its temporal positions allow (a still takes their mean): they
    cost an eighth and show far more scenes.
    """
    tokenizer = Tokenizer(base / "tokenizer" / "vocab.json", base / "tokenizer" / "merges.txt", pad=0)
    clips = world_set(args.data / "clips", args.clips_drawn, TINY_VICLIP["image_size"], draw_clips, CLIPS)
    square = [s for s in shards if s[0].shape[2] == s[0].shape[3]]
    torch.manual_seed(args.seed)
    config = TINY_VICLIP | {"vocab_size": len(tokenizer.vocab)}
    net = ViCLIP(config)
    torch.nn.init.constant_(net.temp, 0.07)                        # the published 0.01 is where training ends
    mean, std = (v[:, None, None].to(args.device) for v in (net.MEAN, net.STD))

    def loss_fn(step, generator):
        still = step % 2 == 0
        frames, records, rows = pick(square, 48, generator) if still else pick(clips, 16, generator, axis=3)
        records = [records[i] for i in rows]
        x = np.concatenate([frames[rows, 0], frames[rows, 1]])     # (2N, 96, 96, 3) or (2N, 8, 96, 96, 3)
        x = torch.from_numpy(x[:, None] if still else x).to(args.device).permute(0, 1, 4, 2, 3).float() / 255
        x = x + 0.01 * torch.randn(len(x), 1, 1, 1, 1, generator=generator).to(x)
        video = net.encode_video((x - mean) / std)
        before, after = [r["source"] for r in records], [r["target"] for r in records]
        orders = [r["instruction"] for r in records]
        texts = net.encode_text(tokenizer(before + after + orders, length=net.context))
        captions, orders_x = texts[:2 * len(rows)], texts[2 * len(rows):]
        scale = 1 / net.temp.clamp(min=0.01)

        def same(names):
            ids = {t: i for i, t in enumerate(dict.fromkeys(names))}
            k = torch.tensor([ids[t] for t in names], device=args.device)
            return k[:, None] == k

        def change(y):                                             # of normalised features, as in the score
            y = F.normalize(y, dim=-1)
            return y[len(rows):] - y[:len(rows)]
        moved, slow = change(video), scale.clamp(max=20)
        pairs = [f"{a} -> {b}" for a, b in zip(before, after)]
        return (match(video, captions, scale, same(before + after)) + 0.5 * match(moved, orders_x, slow, same(orders)) +
                0.5 * match(moved, change(captions), slow, same(pairs)))

    steps = args.steps or STEPS["viclip"]
    meta = dict(stage="viclip", config=config, args=dict(steps=steps, seed=args.seed, clips=args.clips_drawn, lr=args.lr or 1e-3))
    fit(net, loss_fn, out, meta, steps, args.lr or 1e-3, 32, ema=0.995, device=args.device, resume_any=args.force)
    return net, config


# ---------------------------------------------------------------------------------------------------------------
# Stage image: InstructPix2Pix
# ---------------------------------------------------------------------------------------------------------------

TINY_UNET = dict(_class_name="UNet2DConditionModel", in_channels=16, out_channels=8, block_out_channels=[80, 160],
                 layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=96, sample_size=16,
                 down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], mid_block_type="UNetMidBlock2DCrossAttn",
                 up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], norm_eps=1e-5, act_fn="silu", use_linear_projection=False)
TINY_GUIDANCE = [1.5, 1.0]                                         # text, source
TINY_SCHEDULER = dict(_class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                      num_train_timesteps=1000, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                      steps_offset=1, timestep_spacing="leading")


@torch.no_grad()
def cache_latents(vae, shards, folder, device):
    """Posterior modes of all frames, once: [(latents (n, 2, c, h, w) float16, [record])], synthetic pairs only.

    The real domain is left out on purpose: closing that gap is what the refinement rounds are for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i, (frames, records) in enumerate(tqdm(shards, desc="latents", unit="shard")):
        path = folder / f"{i:05d}.npy"
        keep = [k for k, r in enumerate(records) if r["domain"] == "synthetic"]
        if not path.is_file():
            x = frames[keep].reshape(-1, *frames.shape[2:])
            z = [vae.encode(as_input(part).to(device))[0].half().cpu() for part in np.array_split(x, len(x) // 16 + 1)]
            with open(path.with_suffix(".tmp"), "wb") as f:
                np.save(f, torch.cat(z).unflatten(0, (-1, 2)).numpy())
            os.replace(path.with_suffix(".tmp"), path)
        out.append((np.load(path), [records[k] for k in keep]))
    return out


def stage_image(args, shards, out, base):
    """InstructPix2Pix on cached latents: 5 % text, 5 % source, 5 % both dropped; epsilon or v as the scheduler says.

    PAPER: IP2P keeps the edited target where it drops the text, so its "no instruction" is an average of all edits.
    Here a dropped instruction asks for nothing and its target is the source: an empty instruction then returns the
    clip, and text guidance points from unchanged to edited. Errors count more where the true edit changes something.
    """
    vae = VAE(read_json(base / "vae" / "config.json"))
    vae.load_state_dict(load_file(base / "vae" / "diffusion_pytorch_model.safetensors"))
    text = TextEncoder(read_json(base / "text_encoder" / "config.json"))
    text.load_state_dict(load_file(base / "text_encoder" / "model.safetensors"))
    vae, text = (net.to(args.device).eval().requires_grad_(False) for net in (vae, text))
    tokenizer = Tokenizer(base / "tokenizer" / "vocab.json", base / "tokenizer" / "merges.txt")
    encoder = hashlib.sha1(vae.quant_conv.weight.cpu().numpy().tobytes()).hexdigest()[:8]      # another encoder, another cache
    shards = cache_latents(vae, shards, args.data / f"latents-{encoder}", args.device)
    torch.manual_seed(args.seed)
    unet = UNet(TINY_UNET)
    for name, p in unet.named_parameters():                        # every residual branch and the output start at zero
        if name.endswith(("proj_out.weight", "conv_out.weight", "conv2.weight")):
            torch.nn.init.zeros_(p)
    scheduler = read_json(base / "scheduler" / "scheduler_config.json")
    abar, v_prediction = noise_levels(scheduler).to(args.device), scheduler["prediction_type"] == "v_prediction"
    batch = args.batch or 32

    def loss_fn(step, generator):
        latents, records, rows = pick(shards, batch, generator, axis=3)
        z = torch.from_numpy(latents[rows]).to(args.device).float()
        z_src, z_tgt = z[:, 0], z[:, 1]
        drop = torch.rand(len(rows), generator=generator)
        no_text, no_src = (drop < 0.10).tolist(), ((drop >= 0.05) & (drop < 0.15)).to(args.device)
        only_text = (drop < 0.05).to(args.device)[:, None, None, None]
        ids = tokenizer(["" if gone else records[i]["instruction"] for i, gone in zip(rows, no_text)])
        target = torch.where(only_text, z_src, z_tgt)
        z0 = target * vae.scaling_factor
        t = (len(abar) * torch.rand(len(rows), generator=generator) ** args.t_bias).long().to(args.device)
        a = abar[t][:, None, None, None]
        eps = torch.randn(z0.shape, generator=generator).to(z0)
        z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps
        x = torch.cat([z_t, z_src * ~no_src[:, None, None, None]], dim=1)
        with torch.no_grad():
            ctx = text(ids.to(args.device))
        out = unet(x[:, None], t, ctx)[:, 0].float()
        error = (out - (a.sqrt() * eps - (1 - a).sqrt() * z0 if v_prediction else eps)).square().mean(dim=1)      # (N, h, w)
        changed = (target - z_src).abs().mean(dim=1) * vae.scaling_factor
        weight = 1 + args.region_weight * (changed / 0.5).clamp(max=1)
        return (error * weight / weight.mean(dim=(1, 2), keepdim=True)).mean()

    steps, lr = args.steps or STEPS["image"], args.lr or 1e-3
    meta = dict(stage="image", base=str(base.relative_to(ROOT)) if base.is_relative_to(ROOT) else str(base), unet=TINY_UNET,
                args=dict(steps=steps, seed=args.seed, pairs=args.pairs, lr=lr, batch=batch, t_bias=args.t_bias,
                          region_weight=args.region_weight))
    return fit(unet, loss_fn, out, meta, steps, lr, batch, device=args.device, resume_any=args.force)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation on held-out scenes, wordings and combinations
# ---------------------------------------------------------------------------------------------------------------

def psnr(a, b, where=None):
    """dB between frames (..., H, W, 3) in [0, 1], over the pixels `where` (..., H, W); infinite for equal frames."""
    error = np.square(a - b).mean(axis=-1)
    error = error[where] if where is not None else error
    return -10 * math.log10(max(error.mean(), 1e-10)) if error.size else float("nan")


def to_video(frames):
    """(F, H, W, 3) in [0, 1] -> video (1, F, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)[None].float() * 2 - 1


def to_frames(video):
    return ((video[0].permute(0, 2, 3, 1).cpu().numpy() + 1) / 2).clip(0, 1)


def evaluate(ed, n=24, seed=0, size=96, domain="synthetic", s_txt=None, s_src=None, steps=20, n_frames=1, mode="auto"):
    """Held-out table: per task the edit against the truth, inside and outside the region that the true edit changes.

    inside: where truth and source differ by more than 4 % (the whole frame for global edits). "bound" is the
    autoencoded truth, "closer" the share of edits nearer to the truth than the untouched source is. outside: the edit
    and the autoencoded source against the source. Edits whose truth is random (snow, hidden backgrounds) have rows of
    their own, marked ~. flicker (clips only): frame-to-frame change of the edit's error, relative to the truth's own
    change; lower is better. Returns the rows; prints a Markdown table. PSNR in dB, higher is better.
    """
    rows = {}
    for task in curate.TASKS:
        k = found = 0
        while found < n:
            k += 1
            scene = curate.draw_scene(seed * 100_000 + k, domain, "held")
            if task not in curate.possible_tasks(scene):
                continue
            found += 1
            edit = curate.propose_edit(scene, k, task, "held")
            source, truth = (np.round(curate.render(s, n_frames, size, size, t0=k % 4) * 255) / 255 for s in (scene, edit.target))
            source, truth = source.astype(np.float32), truth.astype(np.float32)
            edited = to_frames(ed.edit(to_video(source), edit.instruction, steps, s_txt, s_src, seed=k,
                                       mode="image" if n_frames == 1 else mode))
            coded = {name: to_frames(ed.decode(ed.encode(to_video(x)) * ed.vae.scaling_factor))
                     for name, x in (("truth", truth), ("source", source))}
            inside = np.abs(truth - source).max(axis=-1) > 0.04 if not edit.is_global else np.ones(source.shape[:3], bool)
            if not inside.any():
                continue
            row = (psnr(edited, truth, inside), psnr(source, truth, inside), psnr(coded["truth"], truth, inside),
                   psnr(edited, source, ~inside), psnr(coded["source"], source, ~inside),
                   np.abs(np.diff(edited - truth, axis=0)).mean() / (np.abs(np.diff(truth, axis=0)).mean() + 1e-3) if n_frames > 1 else np.nan)
            rows.setdefault(task + ("" if edit.deterministic else " ~"), []).append(row)
    print(f"held-out {domain} scenes, {size} px, {n_frames} frame(s), {steps} steps, seed {seed}; PSNR in dB")
    print("| task | n | inside: edit | source | bound | closer | outside: edit | coded | flicker |\n|" + "---|" * 9)
    for task, values in rows.items():
        v = np.array(values)
        out = [f"{np.nanmean(v[:, k]):.{1 + (k == 5)}f}" if np.isfinite(v[:, k]).any() else "-" for k in range(6)]
        closer = (v[:, 0] > v[:, 1]).mean()
        print(f"| {task} | {len(v)} | {out[0]} | {out[1]} | {out[2]} | {closer:.0%} | {out[3]} | {out[4]} | {out[5]} |", flush=True)
    return rows


def evaluate_clips(ed, folder, size=96, n_frames=8, s_txt=None, s_src=None, steps=20):
    """Real clips at tiny's resolution: global edits against the exact operation; an empty instruction against the source."""
    from sample import read_video
    print("| clip | grayscale | sepia | night | empty | autoencoder |\n|---|---|---|---|---|---|")
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".mp4", ".mov", ".webm", ".gif")):
        source = read_video(path, size=size, frames=n_frames)[0]
        frames = to_frames(source)
        truth = {f"make it {k}": curate.EFFECTS[k](frames, np.arange(len(frames)) / 10, 0) for k in ("grayscale", "sepia", "night")}
        out = [psnr(to_frames(ed.edit(source, text, steps, s_txt, s_src)), frame) for text, frame in (truth | {"": frames}).items()]
        out.append(psnr(to_frames(ed.decode(ed.encode(source) * ed.vae.scaling_factor)), frames))
        print(f"| {path.stem} | " + " | ".join(f"{x:.1f}" for x in out) + " |", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Putting networks into hub layout, and main
# ---------------------------------------------------------------------------------------------------------------

def write_network(folder, config, tensors, name="model.safetensors", dtype=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / name, tensors, dtype)
    write_json(folder / "config.json", config)


def export(runs, target):
    """runs/<model>/{base,image} -> a directory in hub layout, float16: what `--model tiny` loads."""
    import shutil
    run_meta = read_json(runs / "image" / "meta.json")
    for path in sorted((runs / "base").rglob("*")):
        to = target / path.relative_to(runs / "base")
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_tensors(to, load_file(path), torch.float16)
        elif path.is_file():
            shutil.copyfile(path, to)
    write_network(target / "unet", run_meta["unet"], load_file(runs / "image" / "model.safetensors"),
                  "diffusion_pytorch_model.safetensors", torch.float16)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--stage", default="all", choices=["all", *STEPS, "eval", "export"], help="what to train or do")
    p.add_argument("--data", type=Path, default=ROOT / "data" / "tiny", help="where the world set and cached latents lie")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "tiny", help="where checkpoints and logs go")
    p.add_argument("--force", action="store_true", help="resume a run although its settings changed")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    # training
    p.add_argument("--steps", type=int, help=f"optimizer steps; default {STEPS}")
    p.add_argument("--lr", type=float, help="peak learning rate; default 2e-3 vae, 1e-3 the others")
    p.add_argument("--batch", type=int, help="image stage: pairs a step at 1:1 aspect; default 32")
    p.add_argument("--pairs", type=int, default=30000, help="pairs of the world set")
    p.add_argument("--clips-drawn", type=int, default=3000, help="viclip stage: pairs of clips to draw")
    p.add_argument("--size", type=int, default=64, help="short side of the editor's frames in pixels, a multiple of 32")
    p.add_argument("--seed", type=int, default=0, help="initialisation; also of eval's scenes")
    p.add_argument("--t-bias", type=float, default=0.5, help="time steps are T*u^bias: 1 uniform, below 1 more noise")
    p.add_argument("--region-weight", type=float, default=5.0, help="extra loss weight where the true edit changes the latents")
    # evaluation
    p.add_argument("--weights", help="eval: what to load, as VideoEditor.from_pretrained; default the run, else tiny")
    p.add_argument("--n", type=int, default=24, help="eval: edits per task")
    p.add_argument("--frames", type=int, default=1, help="eval: frames a clip; 1 edits single frames")
    p.add_argument("--mode", default="auto", choices=["auto", "image", "ffg", "video"], help="eval: how clips are edited")
    p.add_argument("--ffg-keys", default="beside", choices=["beside", "instead"], help="eval: a frame's own keys in FFG-V2V")
    p.add_argument("--domain", default="synthetic", choices=["synthetic", "real"], help="eval: which scenes")
    p.add_argument("--clips", type=Path, help="eval: also a folder of real clips")
    p.add_argument("--text-cfg", type=float, help="eval: text guidance; default the checkpoint's")
    p.add_argument("--source-cfg", type=float, help="eval: source guidance; default the checkpoint's")
    p.add_argument("--to", type=Path, default=ROOT / "assets" / "tiny", help="export: target directory")
    args = p.parse_args(argv)
    for name, low in (("steps", 1), ("batch", 1), ("pairs", 1), ("clips_drawn", 1), ("n", 1), ("frames", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)}: needs {low} or more")
    if args.size % 32 or args.size < 32:
        raise UserError(f"--size {args.size}: needs a multiple of 32")
    return args


def wanted(stage, args):
    """True where a stage was asked for by name, or is part of "all" and has not run all its steps."""
    meta = args.runs / stage / "meta.json"
    return args.stage == stage or args.stage == "all" and not (
        meta.is_file() and read_json(meta)["step"] >= (args.steps or STEPS[stage]))


def main(argv=None):
    args = parse_args(argv)
    base = args.runs / "base"
    if args.stage in ("all", *STEPS):
        shards = world_set(args.data / "world", args.pairs, args.size)
        if args.stage not in ("vae", "image"):                     # the scorers look at more pixels than the editor makes
            large = world_set(args.data / "world", 2 * args.pairs, TINY_VISION["image_size"])
    if wanted("vae", args):
        vae, config = stage_vae(args, shards, args.runs / "vae")
        write_network(base / "vae", config, vae.state_dict(), "diffusion_pytorch_model.safetensors")
    if wanted("clip", args):
        clip, config, tokenizer = stage_clip(args, large, args.runs / "clip")
        write_network(base / "clip", config, clip.state_dict())
        write_network(base / "text_encoder", config["text_config"],
                      {k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")})
        write_json(base / "clip" / "preprocessor_config.json", PREPROCESSOR)
        for folder in (base / "clip", base / "tokenizer"):
            folder.mkdir(exist_ok=True)
            for name in ("vocab.json", "merges.txt"):
                (folder / name).write_bytes((args.runs / "clip" / "tokenizer" / name).read_bytes())
    if wanted("viclip", args):
        if not (base / "tokenizer").is_dir():
            raise UserError(f"--stage viclip needs {base / 'tokenizer'}; run --stage clip first")
        viclip, config = stage_viclip(args, large, args.runs / "viclip", base)
        write_network(base / "viclip", config, viclip.state_dict())
        for name in ("vocab.json", "merges.txt"):
            (base / "viclip" / name).write_bytes((base / "tokenizer" / name).read_bytes())
    if wanted("image", args):
        for part, stage in (("vae", "vae"), ("text_encoder", "clip")):
            if not (base / part / "config.json").is_file():
                raise UserError(f"--stage image needs {base / part}; run --stage {stage} first")
        (base / "scheduler").mkdir(exist_ok=True)
        write_json(base / "scheduler" / "scheduler_config.json", TINY_SCHEDULER)
        write_json(base / "model_index.json", {"_class_name": "VideoEditor", "instructvedit": dict(
            size=args.size, guidance=TINY_GUIDANCE, words=curate.known_words(), examples=curate.examples())})
        stage_image(args, shards, args.runs / "image", base)
    if args.stage in ("all", "image", "eval"):
        found = args.runs / "image" if (args.runs / "image" / "model.safetensors").is_file() else "tiny"
        ed = VideoEditor.from_pretrained(args.weights or found, device=args.device)
        ed.unet.ffg_keys = args.ffg_keys
        evaluate(ed, args.n, args.seed, ed.size, args.domain, args.text_cfg, args.source_cfg, n_frames=args.frames, mode=args.mode)
        if args.clips:
            evaluate_clips(ed, args.clips, ed.size, 8, args.text_cfg, args.source_cfg)
    if args.stage in ("all", "export"):
        export(args.runs, args.to)


if __name__ == "__main__":
    run(main)
