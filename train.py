"""Train every network of this repository: one straight loop, one file.

    python train.py --stage vae         the autoencoder of `tiny`, on scenes drawn by code
    python train.py --stage clip        tiny CLIP on frames and captions; its text tower then is the editor's text encoder
    python train.py --stage viclip      tiny ViCLIP on drawn clips, a scorer
    python train.py --stage image       the InstructPix2Pix-style image editor, on (source, instruction, target)
    python train.py --stage motion      motion modules on unedited clips: what AnimateDiff's weights are for `sd15`
    python train.py --stage video       one round of the video editor, on triples that lie in data/<model>/round<N>
    python train.py --stage writer      LoRA for the language model that writes instructions, on image pairs (--pairs-from)
    python train.py --stage eval        held-out table of a trained or embedded editor (also printed after training)
    python train.py --stage plot        gamma and EPM bias over a round's training as a PNG
    python train.py --stage table3      the ablation tables of the README: table2, table3, table4
    python train.py --stage export      copy the finished networks into assets/tiny as float16
    python train.py                     vae to image, then eval, skipping what is finished
    python train.py --round 2           bring the model up to refinement round 2: all of it, curation included

Contents: the world set (drawn once, shared by all stages), the loop, one loss per stage, the rounds, evaluation and
tables, export, flags. A run lives in runs/<model>/<stage>/: model.safetensors (EMA), state.pt (to resume), meta.json,
log.jsonl. Under torchrun the stages motion, video and writer share their batch among the processes.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BPETokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import curate
import world
from metrics import CODED, CLIP, ViCLIP, content_mark, psnr, read_lines, stamp, weights_mark, write_aside
from model import (EPM, ROOT, SD15_MOTION, VAE, MotionModule, ResnetBlock, TextEncoder, Tokenizer, Transformer, UNet,
                   UserError, VideoEditor, aside, finished, hub_dir, noise_levels, out_of_memory, read_json, read_tensors,
                   repository, run, to_u8, to_video, warn_if_slow)
from sample import Defaults, Parser, check_device
from teachers import (FIELDS, LLAVA, WRITER_TASKS, LlavaOneVision, add_lora, guess_task, parse_answer, save_lora, writer_loss)


# ---------------------------------------------------------------------------------------------------------------
# The world set: pairs of frames drawn once, shared by all stages
# ---------------------------------------------------------------------------------------------------------------

STEPS = {"vae": 2500, "clip": 1000, "viclip": 1500, "image": 16000, "motion": 600}         # of the optimizer; video: see VIDEO
LR = {"vae": 2e-3, "clip": 1e-3, "viclip": 1e-3, "image": 1e-3, "motion": 1e-3}
SHARD = 500                                                        # pairs in a file
# How often each task is drawn: the local ones are harder to learn than the global ones, so they come more often. Stage
# image draws again with EDITOR_ODDS; curation has odds of its own, curate.TASK_WEIGHTS.
TASK_MIX = {"style": 1, "object": 2.4, "background": 1.3, "multiple": 1.2, "removal": 2, "addition": 1.6,
            "texture": 1.3, "effect": 1.4}


def draw_shard(path, index, size):
    """Render shard `index`: `path`.npy (SHARD, 2, H, W, 3) uint8 [source, target] and `path`.jsonl, one line a pair."""
    rng = Random(f"world shard {index}")
    wide = size * 7 // 32 * 8                                      # 16:9 in multiples of 8
    height, width = rng.choices([(size, size), (size, wide), (wide, size)], [80, 12, 8])[0]
    save_pairs(path, index * SHARD, SHARD, rng, height, width)


def save_pairs(path, first, n, rng, *size):
    """n pairs, from seed `first` on, every fifth of the real domain; size: what `draw_pair` takes."""
    frames, lines = None, []
    for i in range(n):
        pair, line = draw_pair(first + i, "real" if i % 5 == 4 else "synthetic", rng, *size)
        frames = np.empty((n, *pair.shape), np.uint8) if frames is None else frames
        frames[i] = pair
        lines.append(line)
    save_shard(path, frames, lines)


def draw_pair(seed, domain, rng, height, width, n_frames=1):
    """One scene and one edit of it: frames (2, H, W, 3), or (2, F, H, W, 3) of a clip, uint8, and their record."""
    scene = world.draw_scene(seed, domain)
    tasks = world.possible_tasks(scene)
    edit = world.propose_edit(scene, seed, rng.choices(tasks, [TASK_MIX[t] for t in tasks])[0])
    t0 = rng.uniform(0, 4)
    frames = np.stack([world.render(s, n_frames, height, width, t0=t0) for s in (scene, edit.target)])
    record = dict(seed=seed, domain=domain, task=edit.task, instruction=edit.instruction,
                  source=edit.source_caption, target=edit.target_caption)
    frames = (frames * 255 + .5).astype(np.uint8)
    return frames[:, 0] if n_frames == 1 else frames, record


def world_probe(n=16):
    """What tells one version of the shapes world from another: [[record, mean colours of 4x4 parts]] of n small pairs."""
    out = []
    for i in range(n):
        frames, record = draw_pair(i, ("synthetic", "real")[i % 2], Random(f"probe {i}"), 32, 32)
        out.append([record, frames.reshape(2, 4, 8, 4, 8, 3).mean(axis=(2, 4)).round(2).tolist()])
    return out


def save_array(path, x):
    with open(path.with_suffix(".tmp"), "wb") as f:
        np.save(f, x)
    os.replace(path.with_suffix(".tmp"), path)


def save_shard(path, frames, lines):
    path.with_suffix(".jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    save_array(path.with_suffix(".npy"), frames)                   # last: a shard is there whole or not at all


def world_set(folder, n_pairs, size, draw=draw_shard, per_file=SHARD):
    """Draw what is missing of the first n_pairs pairs, on all cores; returns [(frames memmap, [record])] by file.

    UserError where `folder` was drawn by another version of the world (see `world_probe`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe, mark = world_probe(), folder / "world.json"
    if mark.is_file():
        changed = [now[0]["instruction"] for old, now in zip(read_json(mark, list), probe, strict=True)
                   if old[0] != now[0] or np.abs(np.subtract(old[1], now[1])).max() > 1]
        if changed:
            raise UserError(f"{folder}: drawn by another version of the shapes world ({len(changed)} of {len(probe)} probes differ, "
                            f"the first is now {changed[0]!r}); delete it to draw anew, or pass another --data")
    else:
        write_json(mark, probe)
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

def read_training_log(path):
    """[dict] of a log.jsonl; a last line that is not whole yet, or was cut, is left out."""
    rows = read_lines(path)[0] if path.is_file() else []
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UserError(f"{path}: has lines without a step; mend or remove it")
    return rows


def write_json(path, data):
    write_aside(Path(path), json.dumps(data, indent=1))


def save_tensors(path, tensors, dtype=None):
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in tensors.items()}
    save_file(tensors, f"{path}.tmp")                              # one name, so that kills do not pile up large files
    os.replace(f"{path}.tmp", path)


def join_processes(device):
    """Join the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=7))      # curation is long


def processes():
    """(rank, world) of this process; (0, 1) without a launcher."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_process_first(work):
    """Call work() in the first process, then in the others, which find its files there. Returns its result."""
    out = work() if processes()[0] == 0 else None
    if dist.is_initialized():
        dist.barrier()
    return out if processes()[0] == 0 else work()


def mean_over_processes(tensors):
    """Replace tensors by their means over all processes: one message, once a step."""
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, mean in zip(tensors, (flat / dist.get_world_size()).split([x.numel() for x in tensors])):
        x.copy_(mean.view_as(x))


def is_new(name):
    """SMA's and EPM's parameters: in no published file, so they start from nothing and learn at a rate of their own."""
    return name.endswith(".gamma") or ".epm." in name


def orthogonal(m, iterations=5):
    """m with its singular values near 1 (0.68 to 1.2), those of a hundredth of the largest and more: Newton-Schulz
    iterations, odd polynomial (3.4445, -4.775, 2.0315) of Jordan et al., "Muon", 2024. (out, in) float -> the same shape."""
    x = m / (m.norm() + 1e-7)
    if m.shape[0] > m.shape[1]:                                    # the Gram matrix of the shorter side
        return orthogonal(m.T, iterations).T
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with muon=True take a step of orthogonalised Nesterov momentum instead: a matrix moves along all
    of its directions alike, along those of rare gradients too. For weights of two or more dimensions; convolutions count
    as (out, in * kernel). Steps have AdamW's size, 0.2 in root mean square, so learning rate and weight decay mean the
    same ("Muon is scalable for LLM training", arXiv 2502.16982)."""

    @torch.no_grad()
    def step(self, momentum=0.95):
        for group in self.param_groups:
            for p in group["params"] if group.get("muon") else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:                                      # AdamW wants a step with every parameter it loads
                    state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))
                mean = state["momentum"]
                mean.lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(mean, momentum).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-0.2 * max(update.shape) ** 0.5 * group["lr"])
                p.grad = None                                      # so AdamW passes it by
        super().step()


def is_inner_matrix(key, p):
    """What Muon is for: not embeddings, first and last layers or vectors, which are AdamW's."""
    return p.dim() > 1 and not any(part in key for part in ("embedding", "conv_in", "conv_out"))


def differences(old, new):
    """["--flag old (now new)"] of the settings that both know and that differ; marks of files, which are no flags, count where
    both files are there."""
    marks = "vae", "editor", "adapter", "world"
    return [f"{'the ' if k in marks else '--'}{k.replace('_', '-')} {old[k]} (now {v})" for k, v in new.items()
            if k in old and old[k] != v and not (k in marks and None in (old[k], v))]


def network_mark(source, part="unet"):
    """Eight digits that tell an editor's weights, or with part "" a motion adapter's, from others in the same place. None
    where they are not on this machine under that name (a hub id)."""
    if not source:
        return None
    meta, root = repository(source)
    where = Path(source) if meta else Path(root) / part
    return content_mark(where) if where.is_file() else weights_mark(where) if where.is_dir() else None


def parameter_groups(trained, lr, lr_new, optimizer):
    """{name: parameter} -> groups for Muon: rates, weight decay and who is Muon's; the group whose rate the log shows is first."""
    def how(name, p):
        if lr_new and is_new(name):                                # gamma is one number a module: it needs more than the rate
            return (10 if name.endswith(".gamma") else 1) * lr_new, 0.0, False             # at which EPM's matrices stay calm
        return lr, 0.01, optimizer == "muon" and is_inner_matrix(name, p)
    hows = {name: how(name, p) for name, p in trained.items()}
    return [dict(params=[p for name, p in trained.items() if hows[name] == h], lr=h[0], weight_decay=h[1], muon=h[2])
            for h in sorted(set(hows.values()), key=lambda h: (h[1], h[0], not h[2]), reverse=True)]


def resume(out, net, opt, average, meta, force):
    """Load the checkpoint in `out`, if there is one, into network, optimizer and {trained name: EMA} -> its step, or 0.
    UserError for a damaged one, and where it was begun with other settings than meta's, unless `force`."""
    if not (out / "state.pt").is_file():
        return 0
    try:                                                           # on the CPU: a resumed run needs no more memory
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{out / 'state.pt'}: damaged ({str(error).splitlines()[0][:100] if str(error) else 'it ends too early'}); "
                        "put a whole copy there, or delete it to begin anew") from None
    changed = differences(state["args"], meta["args"])
    if changed and not force:
        raise UserError(f"{out}: begun with {', '.join(changed)}; "
                        "pass the same, --force to go on with the new ones, or another --runs folder")
    net.load_state_dict(state["net"])
    if [len(g["params"]) for g in state["opt"]["param_groups"]] == [len(g["params"]) for g in opt.param_groups]:
        opt.load_state_dict(state["opt"])
    else:                                                          # --force with another --trainable or --optimizer
        print(f"{out}: other parameters or another optimizer now, which starts anew")
    for name in average:
        average[name].copy_(state["ema"][name])
    return state["step"]


def fit(net, loss_fn, out, meta, steps, lr, per_step, ema=0.999, warmup=200, save_minutes=5, device="cpu",
        force=False, lr_new=None, accumulate=1, shared=False, probe=None, unit="images", bf16=None,
        optimizer="adamw"):
    """Train what requires gradients in `net` with loss_fn(number, generator) -> loss, until `steps`.

    AdamW or Muon, linear warm-up, cosine to 5 %, gradient norm clipped at 1, EMA. Into `out` go model.safetensors (EMA),
    state.pt, meta.json and log.jsonl; a run that was cut resumes from there.

    accumulate: micro-batches that make a step, on each of the processes where `shared`. `number` counts micro-batches over
    steps and processes; with meta's seed it fixes all that is random in one. So a resumed run's next loss equals the
    uninterrupted one's, and P processes do what one does that accumulates P.
    lr_new: learning rate of EPM; gamma's is ten times that; neither has weight decay.
    probe: () -> more fields for the log.
    bf16: networks run in bfloat16, weights and optimizer stay in float32; None: on CUDA.
    Raises UserError for a NaN, with the step, and for a run begun with another configuration.
    """
    rank, n_ranks = processes() if shared else (0, 1)
    out.mkdir(parents=True, exist_ok=True)
    bf16 = device == "cuda" if bf16 is None else bf16
    warn_if_slow(torch.bfloat16 if bf16 else torch.float32, device, "--bf16")
    meta = meta | dict(args=meta["args"] | dict(bf16=bf16))
    net.to(device).train()
    trained = {k: p for k, p in net.named_parameters() if p.requires_grad}
    # without matrices of its own Muon is AdamW
    opt = Muon(parameter_groups(trained, lr, lr_new, optimizer), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    peaks, params = [group["lr"] for group in opt.param_groups], list(trained.values())
    average = {k: v.detach().clone() if k in trained else v for k, v in net.state_dict().items()}
    start, log = resume(out, net, opt, {k: average[k] for k in trained}, meta, force), out / "log.jsonl"
    if rank == 0 and log.is_file():                                # lines after the checkpoint will come again
        write_aside(log, "".join(json.dumps(row) + "\n" for row in read_training_log(log) if row["step"] <= start))

    def save(step):
        if rank > 0:
            return
        try:
            with open(out / "state.tmp", "wb") as f:
                torch.save(dict(net=net.state_dict(), opt=opt.state_dict(), ema=average, step=step, args=meta["args"]), f)
                f.flush()
                os.fsync(f.fileno())                               # else a power cut may leave the new name and no contents
            os.replace(out / "state.tmp", out / "state.pt")
            save_tensors(out / "model.safetensors", average)
            write_json(out / "meta.json", meta | {"step": step})
        except (OSError, RuntimeError, SafetensorError) as e:      # a full disk has many names
            raise UserError(f"{out}: checkpoint of step {step} cannot be written ({str(e).splitlines()[0][:100]}); make room and "
                            "run the same again, it goes on from the last one that is there") from None

    last_save = last_log = time.time()
    losses, logged = [], start
    for step in range(start, steps):
        for group, peak in zip(opt.param_groups, peaks):
            group["lr"] = peak * min(1, (step + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        opt.zero_grad(set_to_none=True)
        mean = torch.zeros((), device=device)
        for micro in range(accumulate):
            number = (step * accumulate + micro) * n_ranks + rank
            generator = torch.Generator().manual_seed(meta["args"]["seed"] * 1_000_003_000 + number)
            try:
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    loss = loss_fn(number, generator) / accumulate
                loss.backward()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise UserError(f"{out.name}: out of memory at step {step}; lower --clip-batch (image, writer: --batch), or pass "
                                "--checkpointing (motion, video)") from None
            mean += loss.detach()
        if n_ranks > 1:
            mean_over_processes([mean, *(p.grad for p in params if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if not torch.isfinite(mean + norm):                        # of the means: every process stops, not just one
            raise UserError(f"{out.name}: loss is {mean.item()} and the gradient's norm {norm.item()} at step {step}; "
                            "lower --lr or resume from the last checkpoint")
        opt.step()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, p in trained.items():
                average[k].lerp_(p, 1 - decay)
        losses.append(mean.item())
        if rank == 0 and ((step + 1) % min(50, max(5, steps // 12)) == 0 or step + 1 == steps):
            ms = (time.time() - last_log) * 1e3 / (step + 1 - logged)
            gb = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
            row = dict(step=step + 1, loss=float(np.mean(losses)), lr=opt.param_groups[0]["lr"], ms=ms)
            print(f"step {step + 1:05d}/{steps} | loss {row['loss']:.4f} | lr {row['lr']:.1e} | {ms:.0f} ms | "
                  f"{per_step * accumulate * n_ranks * 1e3 / ms:.1f} {unit}/s | {gb:.1f} GB", flush=True)
            with open(log, "a") as f:
                f.write(json.dumps(row | (probe() if probe else {})) + "\n")
            losses, last_log, logged = [], time.time(), step + 1
        if time.time() - last_save > 60 * save_minutes or step + 1 == steps:
            save(step + 1)
            last_save = time.time()
    if start >= steps:                                             # cut between the last step and its files
        save(start)
    if n_ranks > 1:
        dist.barrier()                                             # whoever goes on reads the files of the first
    net.load_state_dict(average)
    return net.eval()


def random_batch(shards, n, generator, axis=2, odds=None):
    """A random batch: a shard (so one frame size; height and width at `axis`), and pairs of it, n at 1:1 aspect and
    fewer of a wider or taller frame, so that every batch holds about the same number of pixels. odds: {task: how much
    more often than drawn}."""
    frames, records = shards[int(torch.randint(len(shards), (1,), generator=generator))]
    short, long = sorted(frames.shape[axis:axis + 2])
    odds = torch.tensor([(odds or {}).get(record.get("task"), 1.0) for record in records])
    rows = torch.multinomial(odds, max(2, round(n * short / long)), replacement=True, generator=generator).tolist()
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

    steps, lr = args.steps or STEPS["vae"], args.lr or LR["vae"]
    meta = dict(stage="vae", config=TINY_VAE, args=dict(steps=steps, seed=args.seed, pairs=args.pairs, size=args.size, lr=lr))
    fit(vae, loss_fn, out, meta, steps, lr, 64, ema=0.995, device=args.device, bf16=args.bf16, force=args.force,
        save_minutes=args.save_minutes)
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
    bpe.train_from_iterator(world.known_words(), trainer)
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


def contrastive_loss(a, b, scale, texts):
    """Symmetric contrastive loss between rows of a and b (N, P); rows of equal texts (N strings) are all correct."""
    logits, ids = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T, {t: i for i, t in enumerate(dict.fromkeys(texts))}
    k = torch.tensor([ids[t] for t in texts], device=a.device)
    same = (k[:, None] == k).float()
    target = same / same.sum(dim=1, keepdim=True)
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
        frames, records, rows = random_batch(square, 48, generator)
        records = [records[i] for i in rows]
        captions = [r["source"] for r in records] + [r["target"] for r in records]
        orders = [r["instruction"] for r in records]
        x = as_input(np.concatenate([frames[rows, 0], frames[rows, 1]])).to(args.device)
        x = x + 0.02 * torch.randn(len(x), 1, 1, 1, generator=generator).to(x)
        image = clip.encode_image(((x + 1) / 2 - mean) / std)
        scale = clip.logit_scale.exp().clamp(max=100)

        image_n = F.normalize(image, dim=-1)
        change = image_n[len(rows):] - image_n[:len(rows)]
        return (contrastive_loss(image, clip.encode_text(tokens(captions)), scale, captions) +
                0.5 * contrastive_loss(change, clip.encode_text(tokens(orders)), scale.clamp(max=20), orders))

    steps, lr = args.steps or STEPS["clip"], args.lr or LR["clip"]
    meta = dict(stage="clip", config=config, args=dict(steps=steps, seed=args.seed, pairs=args.pairs, lr=lr))
    fit(clip, loss_fn, out, meta, steps, lr, 96, ema=0.995, device=args.device, bf16=args.bf16, force=args.force,
        save_minutes=args.save_minutes)
    return clip, config, tokenizer


# ---------------------------------------------------------------------------------------------------------------
# Stage viclip
# ---------------------------------------------------------------------------------------------------------------

TINY_VICLIP = dict(image_size=96, patch_size=16, num_frames=8, vision_width=80, vision_layers=3, vision_heads=4,
                   text_width=48, text_layers=2, text_heads=4, context_length=32, embed_dim=64)
CLIPS = 250                                                        # pairs of clips in a file, 111 MB


def draw_clips(path, index, size, n_frames=8):
    """Render file `index` of clips: `path`.npy (CLIPS, 2, F, H, W, 3) uint8 [source, target] and `path`.jsonl."""
    # seeds far from those of the world set
    save_pairs(path, 50_000_000 + index * CLIPS, CLIPS, Random(f"clips {index}"), size, size, n_frames)


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
        frames, records, rows = random_batch(square, 48, generator) if still else random_batch(clips, 16, generator, axis=3)
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

        def change(y):                                             # of normalised features, as in the score
            y = F.normalize(y, dim=-1)
            return y[len(rows):] - y[:len(rows)]
        moved, slow = change(video), scale.clamp(max=20)
        pairs = [f"{a} -> {b}" for a, b in zip(before, after)]
        return (contrastive_loss(video, captions, scale, before + after) + 0.5 * contrastive_loss(moved, orders_x, slow, orders) +
                0.5 * contrastive_loss(moved, change(captions), slow, pairs))

    steps, lr = args.steps or STEPS["viclip"], args.lr or LR["viclip"]
    meta = dict(stage="viclip", config=config, args=dict(steps=steps, seed=args.seed, clips_drawn=args.clips_drawn, lr=lr))
    fit(net, loss_fn, out, meta, steps, lr, 32, ema=0.995, device=args.device, bf16=args.bf16, force=args.force,
        save_minutes=args.save_minutes)
    return net, config


# ---------------------------------------------------------------------------------------------------------------
# Stage image: InstructPix2Pix
# ---------------------------------------------------------------------------------------------------------------

TINY_UNET = dict(_class_name="UNet2DConditionModel", in_channels=16, out_channels=8, block_out_channels=[80, 144],
                 layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=96, sample_size=16,
                 down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], mid_block_type="UNetMidBlock2DCrossAttn",
                 up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], norm_eps=1e-5, act_fn="silu", use_linear_projection=False)
EDITOR_ODDS = {"addition": 1.5, "object": 1.5, "texture": 2, "background": 1.7}        # shapes that no pixel shows; what is hard
TINY_GUIDANCE = [1.5, 1.5]                                         # text, source
TINY_STEPS = 5                                                     # of sampling; twenty do no better (README, Results)
TINY_DEADBAND = 0.07                                               # VideoEditor.settle; 0.05 to 0.1 do the same
TINY_SCHEDULER = dict(_class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                      num_train_timesteps=1000, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                      steps_offset=1, timestep_spacing="trailing")


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
            save_array(path, torch.cat(z).unflatten(0, (-1, 2)).numpy())
        out.append((np.load(path), [records[k] for k in keep]))
    return out


def vae_mark(weight):
    """Eight digits of quant_conv.weight that tell one VAE's latents from another's, in names of caches and in meta.json."""
    return hashlib.sha1(weight.float().cpu().numpy().tobytes()).hexdigest()[:8]


def region_weights(change, strength):
    """Loss weights (N, h, w), mean 1 in every frame: the smaller part of it, changed or kept, counts more.

    change (N, c, h, w): target - source in scaled latents; cells with a mean |change| from 0.5 on count as changed. A
    small object's edit is not lost in the frame, nor an object before a changed background. strength 0: all alike. Ours.
    """
    part = (change.abs().mean(dim=1) / 0.5).clamp(max=1)
    share = part.mean(dim=(1, 2), keepdim=True)
    weight = 1 + strength * (part * (1 - share) + (1 - part) * share)
    return weight / weight.mean(dim=(1, 2), keepdim=True)


def stage_image(args, shards, out, base, weights=None):
    """InstructPix2Pix on cached latents: 5 % text, 5 % source, 5 % both dropped; epsilon or v as the scheduler says.

    PAPER: the text encoder is CLIP's, frozen. tiny CLIP has seen too little for that: its states hold more of a word's
    neighbours than of the word, so here it is trained along, from stage clip's weights. weights: an editor to go on
    from, with a new schedule, instead of from nothing.

    PAPER: IP2P keeps the edited target where it drops the text, so its "no instruction" is an average of all edits.
    Here a dropped instruction asks for nothing and its target is the source: an empty instruction then returns the
    clip, and text guidance points from unchanged to edited. Errors count by `region_weights`.
    """
    vae = VAE(read_json(base / "vae" / "config.json"))
    vae.load_state_dict(load_file(base / "vae" / "diffusion_pytorch_model.safetensors"))
    vae.to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    tokenizer = Tokenizer(base / "tokenizer" / "vocab.json", base / "tokenizer" / "merges.txt")
    encoder, drawn_by = vae_mark(vae.quant_conv.weight), content_mark(args.data / "world" / "world.json")
    shards = cache_latents(vae, shards, args.data / f"latents-{args.size}px-{encoder}-{drawn_by}", args.device)
    torch.manual_seed(args.seed)
    if weights:                                                    # go on from another editor, with a new schedule
        ed = VideoEditor.from_pretrained(weights, motion=False, device=args.device, dtype="float32")
        unet, text = ed.unet.requires_grad_(True), ed.text_encoder.requires_grad_(True)
    else:
        unet, text = UNet(TINY_UNET), TextEncoder(read_json(base / "text_encoder" / "config.json"))
        for name, p in unet.named_parameters():                    # every residual branch and the output start at zero
            if name.endswith(("proj_out.weight", "conv_out.weight", "conv2.weight")):
                torch.nn.init.zeros_(p)
        text.load_state_dict(load_file(base / "text_encoder" / "model.safetensors"))
    unet.text_encoder = text                                       # one optimizer, one average, one file for both
    scheduler = read_json(base / "scheduler" / "scheduler_config.json")
    abar, v_prediction = noise_levels(scheduler).to(args.device), scheduler["prediction_type"] == "v_prediction"
    batch = args.batch or 32

    def loss_fn(step, generator):
        latents, records, rows = random_batch(shards, batch, generator, axis=3, odds=EDITOR_ODDS)
        z = torch.from_numpy(latents[rows]).to(args.device).float()
        z_src, z_tgt = z[:, 0], z[:, 1]
        drop = torch.rand(len(rows), generator=generator)
        no_text, no_src = (drop < 0.10).tolist(), ((drop >= 0.05) & (drop < 0.15)).to(args.device)
        only_text = (drop < 0.05).to(args.device)[:, None, None, None]
        ids = tokenizer(["" if gone else records[i]["instruction"] for i, gone in zip(rows, no_text)])
        target = torch.where(only_text, z_src, z_tgt)
        z0 = target * vae.scaling_factor
        u = torch.rand(len(rows), generator=generator) ** args.t_bias
        t = (len(abar) * u).long().clamp(max=len(abar) - 1).to(args.device)     # float32's u may round to 1
        a = abar[t][:, None, None, None]
        eps = torch.randn(z0.shape, generator=generator).to(z0)
        z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps
        x = torch.cat([z_t, z_src * ~no_src[:, None, None, None]], dim=1)
        out = unet(x[:, None], t, text(ids.to(args.device)))[:, 0].float()
        error = (out - (a.sqrt() * eps - (1 - a).sqrt() * z0 if v_prediction else eps)).square().mean(dim=1)      # (N, h, w)
        return (error * region_weights((target - z_src) * vae.scaling_factor, args.region_weight)).mean()

    steps, lr = args.steps or STEPS["image"], args.lr or LR["image"]
    meta = dict(stage="image", base=portable(base), unet=unet.config,
                args=dict(weights=weights and portable(weights), steps=steps, seed=args.seed, pairs=args.pairs,
                          size=args.size, lr=lr, batch=batch, t_bias=args.t_bias, region_weight=args.region_weight,
                          optimizer=args.optimizer, vae=encoder, world=drawn_by))
    fit(unet, loss_fn, out, meta, steps, lr, batch, device=args.device, bf16=args.bf16, force=args.force,
        save_minutes=args.save_minutes, optimizer=args.optimizer)


# ---------------------------------------------------------------------------------------------------------------
# Stage motion, and what it shares with stage video
# ---------------------------------------------------------------------------------------------------------------

FRAMES = curate.N_FRAMES                                           # 16, of a training clip: EPM's matrix is 16 x 16
# like v1-5-3; the rest of MotionAdapter's keys follows from the U-Net
TINY_MOTION = dict(_class_name="MotionAdapter", motion_max_seq_length=32, use_motion_mid_block=False)
MOTION_CLIPS = 100                                                 # clips in a file


def draw_motion_clips(path, index, size):
    """Render file `index` of unedited clips: `path`.npy (MOTION_CLIPS, F, H, W, 3) uint8 and `path`.jsonl."""
    rng = Random(f"motion clips {index}")
    frames, lines = np.empty((MOTION_CLIPS, FRAMES, size, size, 3), np.uint8), []
    for i in range(MOTION_CLIPS):                                  # seeds far from those of the other stages
        seed, domain = 90_000_000 + index * MOTION_CLIPS + i, "real" if i % 5 == 4 else "synthetic"
        clip = world.render(world.draw_scene(seed, domain), FRAMES, size, size, t0=rng.uniform(0, 4))
        frames[i] = (clip * 255 + .5).astype(np.uint8)
        lines.append(dict(seed=seed, domain=domain))
    save_shard(path, frames, lines)


@torch.no_grad()
def encode_motion_clips(ed, shards, folder):
    """Posterior modes of drawn clips, encoded once into `folder`: a list of (F, c, h, w) float16, read as needed."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i, (frames, _) in enumerate(tqdm(shards, desc="latents", unit="file")):
        path = folder / f"{i:05d}.npy"
        if not path.is_file():
            save_array(path, np.stack([ed.encode(as_input(clip)[None])[0].half().cpu().numpy() for clip in frames]))
        out.extend(np.load(path, mmap_mode="r"))
    return out


def row_of(number, n, seed):
    """Which of n clips training sample `number` is: each of them once an epoch, in a new order every time."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + number // n))
    return int(order[number % n])


def draw_noise(number, seed, shape, t_bias, same_noise, train_steps=1000):
    """What is random about training sample `number`: u in [0, 1) to choose the dropouts, time step t, eps of `shape`.

    From a generator of the sample's own, so that a batch is the same however micro-batches and processes share it.
    same_noise: the share of clips whose frames all have one noise; in the rest each frame has its own, as in InsV2V and
    AnimateDiff. A video editor samples from what most of its clips had.
    PAPER: silent on noise over frames. `tiny`'s short rounds did not learn to bring frames of different noise together
    (README, Results), so its clips have one.
    """
    g = torch.Generator().manual_seed((seed + 1) * 1_000_003_000 + number)
    u, v, same = torch.rand(3, generator=g).tolist()
    eps = torch.randn(shape, generator=g)
    return u, torch.tensor(int(train_steps * v ** t_bias)), eps[:1].expand(shape) if same < same_noise else eps


def clip_loss(unet, samples, scheduler, device, guidance=None):
    """Mean error of the prediction over samples (z0, z_src, ctx, t, eps, weight), clips of 16 frames.

    z0, z_src, eps (F, c, h, w), z0 scaled and z_src not; ctx (77, D); t an integer tensor; weight (F, 1, h, w) or 1.
    The target is epsilon or v, as the scheduler's config says. Clips of one size run as one batch.
    guidance (s_txt, s_src, states of no text (77, D)): where a sample has source and text, the prediction is the guided
    one of sampling; its other two branches get no gradient.
    """
    abar = noise_levels(scheduler).to(device)
    total = 0
    for shape in dict.fromkeys(sample[0].shape for sample in samples):
        alike = [sample for sample in samples if sample[0].shape == shape]
        z0, z_src, ctx, t, eps, weight = (torch.stack(x).to(device) for x in zip(*alike))
        a = abar[t][:, None, None, None, None]
        z_t = a.sqrt() * z0 + (1 - a).sqrt() * eps                                         # (B, F, c, h, w)
        v_prediction = scheduler.get("prediction_type", "epsilon") == "v_prediction"
        target = a.sqrt() * eps - (1 - a).sqrt() * z0 if v_prediction else eps
        x, scale, others = torch.cat([z_t, z_src], dim=2), 1, 0
        if guidance:                                               # VideoEditor.guided, for the rows that have everything
            s_txt, s_src, no_text = guidance
            no_text = no_text.to(device).expand_as(ctx)
            full = (z_src.flatten(1).any(dim=1) & (ctx != no_text).flatten(1).any(dim=1)).view(-1, 1, 1, 1, 1)
            scale = torch.where(full, s_txt, 1)
            with torch.no_grad():
                for share, y in ((s_src - s_txt, x), (1 - s_src, torch.cat([z_t, 0 * z_src], dim=2))):
                    others = others + (share * full * unet(y, t, no_text).float() if share else 0)
        out = scale * unet(x, t, ctx).float() + others
        total = total + ((out - target).square() * weight).mean(dim=(1, 2, 3, 4)).sum()
    return total / len(samples)


def portable(path):
    """A path inside the checkout as seen from there, so that a run can be moved along with it; others as they are."""
    path = Path(path)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def stage_motion(args, out, base):
    """The motion prior: fresh motion modules in the frozen image editor, on unedited clips (as AnimateDiff was made).

    The editor's own dropouts are the conditions under which it makes unedited pictures: three clips in four without
    source and text, where the frames' likeness has to come from the motion modules; the rest with their source and
    no text, where the editor returns the source, so that the modules learn to leave alone what is certain already.
    gamma stays 1 here; each module's last layer starts at 0, so that training starts from the image editor.
    """
    weights, name = args.weights or args.runs / "image", f"motion-{args.size}px"
    shards = first_process_first(lambda: world_set(args.data / name, args.motion_clips, args.size, draw_motion_clips,
                                                   MOTION_CLIPS))
    ed = VideoEditor.from_pretrained(weights, motion=False, device=args.device, dtype="float32")
    encoder = vae_mark(ed.vae.quant_conv.weight)
    drawn_by = content_mark(args.data / name / "world.json")
    clips = first_process_first(lambda: encode_motion_clips(ed, shards, args.data / f"{name}-{encoder}-{drawn_by}"))
    clips = clips[:args.motion_clips]
    torch.manual_seed(args.seed)
    ours = ed.unet.config
    ed.unet.add_motion(TINY_MOTION | dict(
        block_out_channels=ours["block_out_channels"], motion_layers_per_block=ours["layers_per_block"],
        motion_norm_num_groups=ours["norm_num_groups"], motion_num_attention_heads=ours["attention_head_dim"]), gamma=1.0)
    for name, p in ed.unet.named_parameters():
        p.requires_grad_("motion_modules" in name and not name.endswith(".gamma"))
        if "motion_modules" in name and ".proj_out." in name:
            torch.nn.init.zeros_(p)
    if args.checkpointing:
        recompute(ed.unet)
    no_text = ed.encode_text([""])[0].cpu()
    batch, same_noise = args.clip_batch, 0.5 if args.same_noise is None else args.same_noise
    train_steps = len(noise_levels(ed.scheduler))

    def loss_fn(number, generator):
        samples = []
        for k in range(number * batch, (number + 1) * batch):
            z = torch.from_numpy(clips[row_of(k, len(clips), args.seed)].astype(np.float32))
            u, t, eps = draw_noise(k, args.seed, z.shape, args.t_bias, same_noise, train_steps)
            samples.append((z * ed.vae.scaling_factor, z * (u < 0.25), no_text, t, eps, torch.ones(1, 1, 1, 1)))
        return clip_loss(ed.unet, samples, ed.scheduler, args.device)

    steps, lr = args.steps or STEPS["motion"], args.lr or LR["motion"]
    meta = dict(stage="motion", base=portable(ed.base), unet=ed.unet.config, motion=ed.unet.motion_config,
                args=dict(weights=portable(weights), steps=steps, lr=lr, motion_clips=args.motion_clips, size=args.size,
                          clip_batch=batch * args.accumulate * processes()[1], same_noise=same_noise,
                          t_bias=args.t_bias, seed=args.seed, vae=encoder, world=drawn_by, editor=network_mark(weights)))
    keep_own_text(ed)
    fit(ed.unet, loss_fn, out, meta, steps, lr, batch, device=args.device, bf16=args.bf16, force=args.force,
        accumulate=args.accumulate, save_minutes=args.save_minutes, shared=True, unit="clips")
    if processes()[0] == 0:
        write_network(base / "motion_adapter", ed.unet.motion_config, {
            k: v for k, v in ed.unet.state_dict().items() if "motion_modules" in k and not k.endswith(".gamma")},
            "diffusion_pytorch_model.safetensors")
    if dist.is_initialized():
        dist.barrier()                                             # the others read it next


def keep_own_text(ed):
    """A text encoder trained along with the image editor goes into the run's file, frozen: base has another one."""
    if ed.own_text:
        ed.unet.text_encoder = ed.text_encoder


def recompute(unet):
    """Gradient checkpointing: the large blocks keep their input only and run again in the backward pass."""
    for m in unet.modules():
        if isinstance(m, (ResnetBlock, Transformer, MotionModule)):
            m.forward = partial(checkpoint, m.forward, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------
# Stage video: a round of the video editor on curated triples
# ---------------------------------------------------------------------------------------------------------------

# Defaults that differ: `tiny` is trained from nothing and its empty instruction returns the source (see stage_image);
# IP2P's is an average of all edits, which its guidance scales count on. 1e-5 is InsV2V's learning rate; the rest of
# sd15's is our guess until someone has the GPU hours: 2,000 steps are 3 to 6 passes over the paper's clips.
VIDEO = {"tiny": dict(steps=60, lr=2e-4, lr_new=3e-4, same_noise=1.0, clip_batch=4, accumulate=1, t_bias=0.5, region_weight=3.0,
                      no_text="source", epm_start=-2.0, guided_loss=True),
         "sd15": dict(steps=2000, lr=1e-5, lr_new=1e-4, same_noise=0.0, clip_batch=1, accumulate=16, t_bias=1.0, region_weight=0.0,
                      no_text="edit", epm_start=-10.0, guided_loss=False)}
# Flags for curate.py in the rounds. tiny: five sampling steps edit as well as twenty (README, Results), and of clips that differ in
# guidance alone there is nothing to choose.
CURATE = {"tiny": dict(images="--candidates 6 --steps 5", videos="--candidates 1", real="--candidates 2 --steps 5"),
          "sd15": dict(images="", videos="", real="")}


def read_clips(folders, channels, most=-1):
    """Kept triples of curated directories as [(latents file, instruction, shape (F, c, h, w))]; says how many.

    Only headers are read here; a clip's latents are read when it is its turn and stay in the system's file cache.
    most: the first so many only, -1 all. Raises UserError where nothing was kept, a file lacks, or a clip does not
    have 16 frames and `channels`.
    """
    clips = []
    for folder in map(Path, folders):
        rows = curate.read_manifest(folder)
        kept = [row for row in rows if row["kept"]]
        print(f"{folder}: {len(kept)} clips of {len({row['id'] for row in rows})} sources and {len(rows)} candidates")
        cut = sum(curate.whole_sources(path)[1] for path in folder.glob("manifest*.jsonl"))
        if cut:
            print(f"{folder}: the manifest's last {cut} lines are cut and left out; the same curation again completes them")
        if not kept:
            raise UserError(f"{folder}: the filter kept none of {len(rows)} candidates; see why with `python curate.py look "
                            f"{folder}`, then curate with lower thresholds, or more")
        for row in kept:
            path = folder / row["id"] / "latents.safetensors"
            shapes = {k: tuple(v.shape) for k, v in read_tensors(path).items()}            # memory-mapped: reads the header
            if set(shapes) != {"source", "target"} or shapes["source"] != shapes["target"] or len(shapes["source"]) != 4:
                raise UserError(f"{path}: needs source and target (F, c, h, w) of one shape, has {shapes}")
            if shapes["source"][0] != FRAMES:
                raise UserError(f"{path}: a clip of {shapes['source'][0]} frames; training needs exactly {FRAMES}, so cut "
                                "longer clips into pieces and leave out shorter ones")
            if shapes["source"][1] != channels:
                raise UserError(f"{path}: {shapes['source'][1]} latent channels, the model has {channels}; curated with another VAE?")
            clips.append((path, row["instruction"], shapes["source"]))
    if most > len(clips):
        raise UserError(f"--max-clips {most}: there are only {len(clips)}")
    return clips if most == -1 else clips[:most]


def camera_move(x, number):
    """InsV2V's motion augmentation: one camera move over source and target. x (2, F, 3, H, W) -> the same shape.

    A pan over up to 20 % of the frame, or (probability 0.2) a zoom up to 1.25, which comes with a pan in seven cases of
    ten; both at constant speed. The window is smaller than the frame by the length of the pan and is scaled back up, so
    that nothing beyond the edge is made up.
    """
    rng = Random(number)
    zoom = rng.uniform(1, 1.25) if rng.random() < 0.2 else 1.0
    pan = rng.uniform(0, 0.2) if zoom == 1.0 or rng.random() < 0.7 else 0.0                # never neither of them
    angle, s = rng.uniform(0, 2 * math.pi), torch.linspace(0, 1, x.shape[1])
    width, shift = (1 - pan) / zoom ** s, pan * (2 * s - 1)                                # of half a frame
    window = (v.repeat(2) for v in (width, shift * math.cos(angle), shift * math.sin(angle)))
    return curate.through_window(x.flatten(0, 1), *window).unflatten(0, x.shape[:2])


def moved_copies(ed, clips, copies):
    """`copies` versions of every clip under a camera move, beside its latents as moved<k>.safetensors: [(file, ...)].

    Latents cannot be moved by parts of their grid, so clips are decoded, moved and encoded again, once.
    """
    out = []
    for path, instruction, shape in tqdm(clips, desc="camera moves", unit="clip", disable=not copies):
        for k in range(copies):
            moved = path.with_name(f"moved{k}.safetensors")
            if not moved.is_file():
                z = load_file(path)
                video = torch.cat([ed.decode(z[name][None].float().to(ed.device) * ed.vae.scaling_factor)
                                   for name in ("source", "target")])
                seed = int(hashlib.sha1(f"{path.parent.name} {k}".encode()).hexdigest()[:8], 16)
                video = camera_move(video, seed)
                save_tensors(moved, {name: ed.encode(x[None])[0] for name, x in zip(("source", "target"), video)},
                             torch.float16)
            out.append((moved, instruction, shape))
    return out


def video_model(args, weights):
    """The video editor a round starts from, with its trainable parameters chosen.

    The image editor `weights` plus the motion adapter, gamma 0 (it then is the image editor, exactly) and untrained
    EPM; a video run as it is, to go on from it. --no-sma: gamma fixed at 1, the motion prior as it comes.
    """
    meta = read_json(Path(weights) / "meta.json") if (Path(weights) / "meta.json").is_file() else {}
    for flag in ("sma", "epm"):
        now = getattr(args, flag)
        before = meta.get("args", {}).get(flag, now)
        if before != now:
            names = {True: f"--{flag}", False: f"--no-{flag}"}
            raise UserError(f"{names[now]}: {weights} was trained with {names[before]}; pass that, or other --weights")
    motion = None if "motion" in meta else starting_point(args)[1]
    if motion and not Path(motion).exists() and str(motion).count("/") != 1:
        raise UserError(f"{motion}: no motion adapter there; run --stage motion first, or pass --motion")
    torch.manual_seed(args.seed)
    ed = VideoEditor.from_pretrained(weights, motion=motion, device=args.device, dtype="float32")
    if "sma" not in meta.get("args", {}):                          # not a round: the image editor, or published weights
        ed.unet.set_gamma(0.0 if args.sma else 1.0)
        if args.epm:
            ed.unet.add_epm(args.epm_sites, FRAMES, args.epm_start)
    for name, p in ed.unet.named_parameters():
        p.requires_grad_(is_new(name) or "motion_modules" in name or args.trainable == "all")
        if name.endswith(".gamma") and not args.sma:
            p.requires_grad_(False)
    ed.unet.to(ed.device)
    if args.checkpointing:
        recompute(ed.unet)
    return ed


def watch(unet):
    """probe() -> fields for the log: gamma of every motion module; EPM's mean bias of every site over the last batch,
    [within a frame, between frames]; and the mean over sites as a matrix, rows the frames that listen (Figure 5)."""
    sites = {k.split(".transformer_blocks")[0]: m for k, m in unet.named_modules() if isinstance(m, EPM)}
    for m in sites.values():
        m.register_forward_hook(lambda m, x, bias: setattr(m, "seen", bias.detach().float().mean(0).cpu()))

    def probe():
        gammas = {k: p for k, p in unet.named_parameters() if k.endswith(".gamma")}
        row = dict(gamma={k.removesuffix(".gamma"): round(p.item(), 5) for k, p in gammas.items()})
        if sites:
            own = torch.eye(FRAMES, dtype=torch.bool)
            row["epm"] = {k: [round(m.seen[part].mean().item(), 4) for part in (own, ~own)] for k, m in sites.items()}
            matrix = torch.stack([m.seen for m in sites.values()]).mean(0)
            row["epm_matrix"] = [[round(v, 2) for v in line] for line in matrix.tolist()]
        return row
    return probe


def stage_video(args, out, weights, folders, curation=None):
    """One round: the video editor on triples of 16 frames, three dropouts of 5 %, epsilon or v as the scheduler says.
    curation: `curation_flags` that made the triples, for meta.json.

    PAPER: the rounds' schedule and what is trained in them are not given. Default here: motion modules, gamma and EPM
    (--trainable all: everything). Dropped instructions follow the image editor the round starts from, see VIDEO.
    Targets are samples made with guidance: a model that has learnt them is guided twice when it samples, and a little
    more in every round. --guided-loss compares the guided prediction instead, so that what it learns is what it makes.
    """
    ed = video_model(args, weights)
    clips = read_clips(folders, ed.vae.config["latent_channels"], args.max_clips)
    n_clips = len(clips)
    clips += first_process_first(lambda: moved_copies(ed, clips, args.camera_moves))
    texts = {t: i for i, t in enumerate(dict.fromkeys(["", *(instruction for _, instruction, _ in clips)]))}
    with torch.no_grad():
        states = torch.cat([ed.encode_text([t]).half().cpu() for t in texts])              # (texts, 77, D), once
    defaults, batch, scale = VIDEO[args.model], args.clip_batch, ed.vae.scaling_factor
    same_noise = defaults["same_noise"] if args.same_noise is None else args.same_noise
    train_steps = len(noise_levels(ed.scheduler))

    def loss_fn(number, generator):
        samples = []
        for k in range(number * batch, (number + 1) * batch):
            path, instruction, shape = clips[row_of(k, len(clips), args.seed)]
            z = load_file(path)
            z_src, z_tgt = z["source"].float(), z["target"].float()                        # (F, c, h, w)
            u, t, eps = draw_noise(k, args.seed, shape, args.t_bias, same_noise, train_steps)
            no_text, no_src = u < 0.10, 0.05 <= u < 0.15           # text alone, both, source alone: 5 % each
            z_tgt = z_src if u < 0.05 and args.no_text == "source" else z_tgt
            weight = region_weights((z_tgt - z_src) * scale, args.region_weight)[:, None]  # (F, 1, h, w)
            samples.append((z_tgt * scale, z_src * (not no_src), states[texts["" if no_text else instruction]].float(),
                            t, eps, weight))
        return clip_loss(ed.unet, samples, ed.scheduler, args.device,
                         (*ed.guidance, states[texts[""]].float()) if args.guided_loss else None)

    steps, lr, lr_new = args.steps or defaults["steps"], args.lr or defaults["lr"], args.lr_new or defaults["lr_new"]
    meta = dict(stage=out.name, base=portable(ed.base), unet=ed.unet.config, motion=ed.unet.motion_config, curation=curation or {})
    meta |= dict(same_noise=same_noise > 0.5, args=dict(
        **origin_of(args, weights), train_on=[portable(f) for f in folders], max_clips=n_clips, steps=steps, lr=lr,
        lr_new=lr_new, clip_batch=batch * args.accumulate * processes()[1], trainable=args.trainable, sma=args.sma,
        epm=args.epm, epm_sites=args.epm_sites, epm_start=args.epm_start, camera_moves=args.camera_moves,
        same_noise=same_noise, t_bias=args.t_bias, region_weight=args.region_weight, no_text=args.no_text,
        guided_loss=args.guided_loss, seed=args.seed))
    if args.epm:
        meta["epm"] = ed.unet.epm_config
    keep_own_text(ed)
    fit(ed.unet, loss_fn, out, meta, steps, lr, batch, warmup=min(200, steps // 10 + 1), device=args.device, bf16=args.bf16,
        force=args.force, lr_new=lr_new, accumulate=args.accumulate, save_minutes=args.save_minutes, shared=True,
        probe=watch(ed.unet), unit="clips")


def starting_point(args):
    """(image editor, motion adapter) that round 0 starts from."""
    if args.model == "sd15":
        return args.weights or "sd15", args.motion or SD15_MOTION
    return args.weights or args.runs / "image", args.motion or args.runs / "base" / "motion_adapter"


def origin_of(args, weights):
    """What a round starts from, for its meta.json: the editor and its motion modules, by name and by contents."""
    video = "motion" in (repository(weights)[0] or {})             # brings its own modules
    motion = None if video else starting_point(args)[1]
    return dict(weights=portable(weights), motion=motion and portable(motion), editor=network_mark(weights),
                adapter=network_mark(motion, ""))


@contextmanager
def said_as(flag, stage=""):
    """Errors of curate.py's flags name those of this script that they came from."""
    try:
        yield
    except UserError as error:
        names = {"--from ": f"{flag} ", "another --to": "another --data", "--force to": f"--curate-{stage}=--force to"}
        text = str(error)
        for theirs, ours in names.items():
            text = text.replace(theirs, ours)
        raise UserError(text) from None


def curate_command(args, stage, weights, to, *more):
    """curate.py's command line for `stage`."""
    dtype = {True: ["--dtype", "bfloat16"], False: ["--dtype", "float32"], None: []}[args.bf16]
    given = getattr(args, f"curate_{stage}")
    try:
        flags = [*dtype, *shlex.split(CURATE[args.model][stage]), *shlex.split(given), *map(str, more)]
    except ValueError as error:
        raise UserError(f"--curate-{stage} {given}: {str(error).lower()}") from None
    return [stage, "--weights", str(weights), "--to", str(to), "--device", args.device, *flags]


def curate_stage(args, stage, weights, to, *more):
    """curate.py's command `stage`; under torchrun every process does its share, then waits for the others."""
    with said_as("--real-from" if stage == "real" else "--images-from", stage):
        curate.main(curate_command(args, stage, weights, to, *more))
    if dist.is_initialized():
        dist.barrier()


def refine(args):
    """--round N: every round up to N that is not finished: curate what it needs, then train on it.

    Round 0 (stage I): triples synthesised from images by the image editor and FFG-V2V. Rounds 1, 2, ... (stages II,
    III): real clips edited by the previous round's model. Curation and training skip or resume what is there.

    PAPER: silent on where a round's training starts; Table 4 counts each stage's clips as a whole set (9k + 3.4k, 9k + 5k,
    5k). So every round trains from the image editor: a model that goes on from the one that made its targets drifts a
    bit further in every round.
    """
    image, motion = starting_point(args)
    for n in range(args.round + 1):
        out, to = args.runs / f"round{n}", args.data / f"round{n}"
        if finished(out):
            print(f"round {n}: finished, in {out}")
            continue
        print(f"round {n}: curating into {to}")
        if n == 0:
            images = args.data / "images"
            curate_stage(args, "images", image, images, "--from", args.images_from, "--n", args.images)
            check_count(images, "--images", args.images)
            curate_stage(args, "videos", image, to, "--images", images, "--motion", motion)
        else:
            curate_stage(args, "real", args.runs / f"round{n - 1}", to, "--round", n, "--from", args.real_from,
                         "--n", args.real_clips)
            check_count(to, "--real-clips", args.real_clips)
        stage_video(args, out, image, round_folders(args, n), curation_flags(args, n))


def check_count(folder, flag, n):
    """UserError where an earlier run has curated more than n sources: training would take them all."""
    found = {row["origin"]["file"] if "frames" in row["origin"] else row["id"] for row in curate.read_manifest(folder)}
    if len(found) > n:
        raise UserError(f"{flag} {n}: {folder} holds {len(found)} already; pass {flag} {len(found)} or more, or another --data")


def curation_flags(args, n):
    """What --round's flags say about the data of round n; in its meta.json under "curation"."""
    names = ("real_from", "real_clips", "curate_real") if n else ("images_from", "images", "curate_images", "curate_videos")
    return {} if args.train_on else {k: getattr(args, k) for k in names}


def changed_flags(args, out, weights, folders):
    """["--flag old (now new)"] where the finished run `out` was trained in another way than `args` say."""
    old = read_json(out / "meta.json")["args"]
    now = {k: getattr(args, k) for k in ("sma", "epm", "epm_sites", "epm_start", "trainable", "camera_moves", "t_bias",
                                         "region_weight", "no_text", "guided_loss", "seed")}
    now |= dict(train_on=[portable(folder) for folder in folders], **origin_of(args, weights))
    now |= {k: getattr(args, k) for k in ("lr", "lr_new", "same_noise") if getattr(args, k) is not None}
    now |= dict(steps=args.steps or VIDEO[args.model]["steps"])
    now |= {"max_clips": args.max_clips} if args.max_clips != -1 else {}
    return differences(old, now)


def check_rounds(args):
    """UserError, before hours of work, for flags that curate.py does not take, and where a round that --round would skip
    as finished was curated or trained in another way than the flags now say."""
    for stage, needs in (("images", []), ("videos", ["--images", "x"]), ("real", ["--round", 1])):
        command = curate_command(args, stage, "x", "x", *needs)
        try:
            curate.parse(command)
        except UserError as error:
            raise UserError(f"--curate-{stage}: {error}") from None
    if args.model == "tiny" and not args.motion:                   # refuses modules of other flags before networks train
        wanted("motion", args)
    for n in range(args.round + 1):
        out = args.runs / f"round{n}"
        if not args.force and finished(out):
            changed = changed_flags(args, out, starting_point(args)[0], round_folders(args, n))
            changed += differences(read_json(out / "meta.json").get("curation", {}), curation_flags(args, n))
            if changed:
                raise UserError(f"{out}: finished with {', '.join(changed)}; pass the same, --force to keep it as it is, or "
                                "another --runs folder")


def round_folders(args, n):
    """What round n trains on, as in the paper's Table 4: 0 on the synthetic triples, 1 on those and its own, later ones
    on their own alone (Stage III with a dagger), with --mix on the synthetic ones as well."""
    return args.train_on or [args.data / f"round{k}" for k in dict.fromkeys((*[0] * (n < 2 or args.mix), n))]


# ---------------------------------------------------------------------------------------------------------------
# Stage writer: LLaVA-OneVision learns to write instructions like those of image-editing data
# ---------------------------------------------------------------------------------------------------------------

WRITER_STEPS, WRITER_LR = 2000, 1e-4                               # ours; the paper names neither


def writer_pairs(folder, most):
    """[(pair of curate.read_pairs, answer)] of the pairs whose texts the writer's own check accepts; says how many."""
    pairs, refused = [], 0
    for pair in islice(curate.read_pairs(folder), most):
        task = pair["task"] if pair["task"] in WRITER_TASKS else guess_task(pair["instruction"])
        answer, _ = parse_answer(json.dumps({**{k: pair[k] for k in FIELDS}, "task": task}), task)
        pairs += [(pair, answer)] if answer else []
        refused += answer is None
    print(f"{folder}: {len(pairs)} image pairs; left out: {refused} without an instruction and two different captions")
    if not pairs:
        raise UserError(f"--pairs-from {folder}: none of {refused} pairs has an instruction and two different captions of "
                        "2 to 60 words")
    return pairs


def stage_writer(args, out):
    """LoRA on every matrix of the decoder: source image -> task, instruction, both captions (section 3.3).

    PAPER: says only that the model was fine-tuned on image-editing data. Here an image is shown as a clip of one frame:
    the form in which the writer then meets real clips, at 197 tokens instead of up to 7,290. fit() sees the trained
    matrices alone, so that its checkpoints are small. Writes <out>/writer.safetensors for `curate.py real --lora`.
    """
    if args.pairs_from is None:
        raise UserError("--stage writer needs --pairs-from: a folder or file of image pairs, as curate.py images --from")
    with said_as("--pairs-from"):
        pairs = writer_pairs(args.pairs_from, args.pairs)
    net = LlavaOneVision.from_pretrained(args.llava, device=args.device)
    torch.manual_seed(args.seed)
    # "." may not stand in a parameter's name
    lora = torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in add_lora(net, args.rank).items()})
    batch = args.batch or 4

    broken = set()

    def readable(k):                                               # an image that does not open gives way to the next one
        for row in (row_of(at, len(pairs), args.seed) for at in range(k, k + len(pairs))):
            try:
                return pairs[row][0]["load"]()[0][None], pairs[row][1]
            except curate.Unusable as error:
                if row not in broken:
                    print(f"left out: {error}")
                broken.add(row)
        raise UserError(f"--pairs-from {args.pairs_from}: none of {len(pairs)} images can be read")

    def loss_fn(number, generator):
        images, answers = zip(*[readable(k) for k in range(number * batch, (number + 1) * batch)])
        return writer_loss(net, list(images), list(answers))

    steps, lr = args.steps or WRITER_STEPS, args.lr or WRITER_LR
    meta = dict(stage="writer", args=dict(llava=portable(args.llava), pairs_from=portable(args.pairs_from), n=len(pairs),
                                          steps=steps, lr=lr, batch=batch * processes()[1], rank=args.rank, seed=args.seed))
    fit(lora, loss_fn, out, meta, steps, lr, batch, warmup=min(200, steps // 10 + 1), device=args.device, bf16=args.bf16,
        force=args.force, save_minutes=args.save_minutes, shared=True, unit="pairs")
    if processes()[0] == 0:
        save_lora(net, out / "writer.safetensors")
        print(f"{out / 'writer.safetensors'}: pass it as --lora to curate.py real --writer llava --llava {args.llava}")


# ---------------------------------------------------------------------------------------------------------------
# Evaluation on held-out scenes, wordings and combinations
# ---------------------------------------------------------------------------------------------------------------

def evaluate(ed, n=24, seed=0, size=64, domain="synthetic", s_txt=None, s_src=None, steps=None, n_frames=1, mode="auto",
             known=False):
    """Held-out table: per task the edit against the truth, inside and outside the region that the true edit changes.

    inside: where truth and source differ by more than 4 % (the whole frame for global edits). "bound" is the
    autoencoded truth, "closer" the share of edits nearer to the truth than the untouched source is. outside: the edit
    and the autoencoded source against the source. Edits whose truth is random (snow, hidden backgrounds) have rows of
    their own, marked ~. success: metrics.SUCCESS. flicker (clips only): frame-to-frame change of the edit's error,
    relative to the truth's own change; lower is better. PSNR in dB, higher is better. Prints a Markdown table; returns
    {task: [(inside edit, source, bound, outside edit, coded, success, flicker, closer)]}.
    """
    rows = {}
    for task in world.TASKS:
        k = found = 0
        while found < n:
            k += 1
            scene = world.draw_scene(seed * 100_000 + k, domain, "held")
            if task not in world.possible_tasks(scene):
                continue
            found += 1
            edit = world.propose_edit(scene, k, task, "held")
            if known and not edit.deterministic:
                continue
            source, truth = (world.quantise(world.render(s, n_frames, size, size, t0=k % 4)) for s in (scene, edit.target))
            inside = world.true_region(source, truth, edit.is_global)
            if not inside.any():
                continue
            video = to_video(source)
            edited = np.stack(to_u8(ed.edit(video, edit.instruction, steps, s_txt, s_src, seed=k,
                                            mode="image" if n_frames == 1 else mode)))
            scores = curate.against_truth(ed, ed.encode(video), source, {"edit": edited}, truth, inside)
            own, coded_source, coded_truth = (scores[name] for name in ("edit", *CODED))
            flicker = math.nan
            if n_frames > 1:
                error, motion = (np.abs(np.diff(x.astype(float) / 255, axis=0)).mean() for x in (edited.astype(int) - truth, truth))
                flicker = error / (motion + 1e-3)
            near, gain = own["psnr_truth"], own["truth_gain"]
            row = (near, near - gain, coded_truth["psnr_truth"], own["psnr_outside"], coded_source["psnr_outside"],
                   own["success"], flicker, gain > 0)
            rows.setdefault(task + ("" if edit.deterministic else " ~"), []).append(row)
    print(f"held-out {domain} scenes, {size} px, {n_frames} frame(s), {steps or ed.steps} steps, seed {seed}; PSNR in dB")
    print("| task | n | inside: edit | source | bound | closer | outside: edit | coded | success | flicker |\n|" + "---|" * 10)
    for task, values in rows.items():
        means = [np.nanmean(x) if np.isfinite(x).any() else math.nan for x in np.array(values, dtype=float).T]
        cells = (f"{means[k]:{how}}" for k, how in ((0, ".1f"), (1, ".1f"), (2, ".1f"), (7, ".0%"), (3, ".1f"), (4, ".1f"),
                                                    (5, ".0%"), (6, ".2f")))
        print(f"| {task} | {len(values)} | " + " | ".join("-" if "nan" in x else x for x in cells) + " |", flush=True)
    return rows


@torch.no_grad()
def words_heard(ed, n=60, seed=0, size=64):
    """How much of a word reaches the edit: {"kind", "colour", "place": 1 where it does whole, 0 where it goes unread}.

    Two instructions to add a shape differ in one word, so their true latents differ by d and the editor's predictions
    of the clean latents, from one and the same noise at the highest level, by p: the number is <p, d> / <d, d>, over n
    held-out scenes. It moves long before edits look right, and tells which words still need training. Prints a line.
    """
    scheduler = ed.scheduler_for(1000)
    t, a = scheduler.timesteps[0], scheduler.levels(0)[0]
    sums, k = {word: np.zeros(2) for word in ("kind", "colour", "place")}, 0
    while n:
        k += 1
        scene, rng = world.draw_scene(seed * 100_000 + k, "synthetic", "held"), Random(k)
        if "addition" not in world.possible_tasks(scene):
            continue
        n -= 1
        z_src = ed.encode(to_video(world.quantise(world.render(scene, 1, size, size))))
        noise = ed.noise(1, *z_src.shape[3:], seed=k)
        z_t = a.sqrt() * z_src * ed.vae.scaling_factor + (1 - a).sqrt() * noise

        def true_and_predicted(kind, colour, place):
            new = world.Shape(kind, colour, world.COLOURS[colour], *world.PLACES[place], .13, screen=True)
            target = world.quantise(world.render(replace(scene, objects=scene.objects + (new,)), 1, size, size))
            ctx = ed.encode_text([f"add a {colour} {kind} at the {place}", ""])
            eps = scheduler.to_eps(ed.guided(z_t, z_src, t, ctx, 1, 1, "image"), 0, z_t)       # no guidance
            return ed.encode(to_video(target)) * ed.vae.scaling_factor, (z_t - (1 - a).sqrt() * eps) / a.sqrt()
        ask = {"kind": rng.sample(sorted(set(world.KINDS) - {s.kind for s in scene.objects}), 2),
               "colour": rng.sample(sorted(set(world.COLOURS) - {s.colour for s in scene.objects}), 2),
               "place": rng.sample(sorted(world.PLACES), 2)}
        first = {word: pair[0] for word, pair in ask.items()}
        true, predicted = true_and_predicted(**first)
        for word, pair in ask.items():
            other_true, other = true_and_predicted(**first | {word: pair[1]})
            d, p = other_true - true, other - predicted
            sums[word] += float((p * d).sum()), float((d * d).sum())
    heard = {word: float(x / y) for word, (x, y) in sums.items()}
    print("heard of a word (1: all of it): " + ", ".join(f"{word} {x:.2f}" for word, x in heard.items()), flush=True)
    return heard


def evaluate_clips(ed, folder, size=64, n_frames=8, s_txt=None, s_src=None, steps=None, mode="auto"):
    """Real clips at tiny's resolution: global edits against the exact operation; an empty instruction against the source."""
    from sample import read_video
    print("| clip | grayscale | sepia | night | empty | autoencoder |\n|---|---|---|---|---|---|")
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in curate.VIDEOS):
        source = read_video(path, size=size, frames=n_frames)[0]
        frames = np.stack(to_u8(source)) / 255
        truth = {f"make it {k}": world.EFFECTS[k](frames, np.arange(len(frames)) / 10, 0) for k in ("grayscale", "sepia", "night")}
        out = [psnr(np.stack(to_u8(ed.edit(source, text, steps, s_txt, s_src, mode=mode))), frame)
               for text, frame in (truth | {"": frames}).items()]
        out.append(psnr(np.stack(to_u8(ed.decode(ed.encode(source) * ed.vae.scaling_factor))), frames))
        print(f"| {path.stem} | " + " | ".join(f"{x:.1f}" for x in out) + " |", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# The paper's tables where the truth is known, and Figures 4e and 5
# ---------------------------------------------------------------------------------------------------------------

TABLES = ("table2", "table3", "table4")


def success(rows):
    """(clips, 3) of evaluate's rows whose truth is known: success, gain in dB inside, flicker."""
    v = np.array([row for task, values in rows.items() if not task.endswith("~") for row in values])
    return np.stack([v[:, 5], v[:, 0] - v[:, 1], v[:, 6]], axis=1)


def table_rows(args):
    """[(name, training flags, folders, the cycle's own run or None)] of a table; equal steps in every row, and in table 2
    equally many clips. Training starts from the image editor; the own run is what seed 0 of the row would train again. A
    mode instead of flags: the image editor as it is, "image" frame by frame, "ffg" with the motion adapter at full strength."""
    data, (image, motion) = args.data, starting_point(args)
    rounds = [args.runs / f"round{k}" for k in range(3)]
    if args.stage == "table2":                                     # other data of the same sources, for the same model
        first = ["--no-filter", "--candidates", 1]                 # unfiltered, in both steps: the first try is kept
        every = data / "images-unfiltered"
        rows = [("trajectory-guided, filtered", "round0", None, None),
                ("trajectory-guided, unfiltered", "round0-unfiltered", every, first),
                ("per frame, filtered", "round0-per-frame", data / "images", ["--mode", "image"])]
        curate_stage(args, "images", image, every, "--from", args.images_from, "--n", args.images, *first)
        for _, folder, images, how in rows:
            if how:
                curate_stage(args, "videos", image, data / folder, "--images", images, "--motion", motion, *how)
        least = min(sum(row["kept"] for row in curate.read_manifest(data / folder)) for _, folder, *_ in rows)
        return [(name, dict(max_clips=least), [data / folder], None) for name, folder, *_ in rows]
    if args.stage == "table3":
        return [(f"{'SMA' if sma else 'no SMA'}, {'EPM' if epm else 'no EPM'}", dict(sma=sma, epm=epm),
                 [data / "round0"], rounds[0] if sma and epm else None) for sma in (False, True) for epm in (False, True)]
    return [("image editor, frame by frame", "image", None, None),             # table4: the paper's stages I to III
            ("image editor, FFG-V2V", "ffg", None, None),
            ("round 0", {}, [data / "round0"], rounds[0]),
            ("round 1", {}, [data / "round0", data / "round1"], rounds[1]),
            ("round 2, with synthetic data", {}, [data / "round0", data / "round2"], None),
            ("round 2, real only", {}, [data / "round2"], rounds[2])]


def table_line(name, domain, seeds, first):
    """One line: seeds [(clips, 3) of `success`], first (clips, 3): the first row's mean over its seeds."""
    v = np.mean(seeds, axis=0)
    gain, means = v - first, [x[:, 0].mean() for x in seeds]
    half, half_gain = (1.96 * x.std(axis=0) / math.sqrt(len(x)) for x in (v, gain))
    return (f"| {name} | {domain} | {len(v)} x {len(seeds)} | {v[:, 0].mean():.1%} ± {half[0]:.1%} | "
            f"{min(means):.1%} to {max(means):.1%} | {gain[:, 0].mean():+.1%} ± {half_gain[0]:.1%}, {(gain[:, 0] != 0).sum()} differ | "
            f"{v[:, 1].mean():+.1f} ± {half[1]:.1f} | {gain[:, 1].mean():+.2f} ± {half_gain[1]:.2f} | "
            f"{v[:, 2].mean():.2f} ± {half[2]:.2f} | {gain[:, 2].mean():+.2f} ± {half_gain[2]:.2f} |")


def tables(args):
    """Train every row of a table with --seeds seeds and measure it on held-out clips of 16 frames, both domains.

    Runs lie in runs/<model>/<table>/<row>-<seed>; what is trained or measured already is not done again. Every seed
    edits the same clips, so intervals are over clips, each the mean of its seeds; differences to the first row are
    taken clip by clip, with how many clips differ in success: where none does, ± 0 only says that, not that none would.
    The spread of the seeds' means stands beside them. Under torchrun the domains are shared.
    """
    steps, (weights, motion) = args.steps or VIDEO[args.model]["steps"], starting_point(args)
    lines, first, (rank, n_ranks) = [], {}, processes()
    for name, flags, folders, own in table_rows(args):
        results = {"synthetic": [], "real": []}
        untrained = isinstance(flags, str)
        for seed in range(1 if untrained else args.seeds):
            out = args.runs / args.stage / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
            if not untrained:
                row = argparse.Namespace(**vars(args) | {"steps": steps} | flags | {"seed": seed})
                if seed == 0 and own and finished(own) and not changed_flags(row, own, weights, folders):
                    out = own
                if not finished(out):
                    stage_video(row, out, weights, folders)
                elif not args.force and (changed := changed_flags(row, out, weights, folders)):
                    raise UserError(f"{out}: finished with {', '.join(changed)}; pass the same, --force to keep it as it is, "
                                    "or another --runs folder")
            files, guidance = {domain: out / f"eval-{domain}.json" for domain in results}, (args.text_cfg, args.source_cfg)
            for k, (domain, done) in enumerate(files.items()):
                trained, mode = (weights, flags) if untrained else (out, "video")
                if k % n_ranks != rank:
                    continue
                ed = VideoEditor.from_pretrained(trained, motion={"ffg": motion, "image": False, "video": None}[mode],
                                                 device=args.device)
                how = dict(n=args.n, guidance=list(guidance), sampling_steps=args.sampling_steps or ed.steps, size=ed.size, frames=FRAMES,
                           stamp=stamp(ed))
                if not (done.is_file() and read_json(done)["how"] == how):
                    rows = evaluate(ed, args.n, 0, ed.size, domain, *guidance, args.sampling_steps, FRAMES, mode, known=True)
                    out.mkdir(parents=True, exist_ok=True)
                    write_json(done, dict(how=how, clips=success(rows).tolist()))
            if dist.is_initialized():
                dist.barrier()
            for domain, done in files.items():
                results[domain].append(np.array(read_json(done)["clips"], dtype=float))
        lines += [table_line(name, domain, seeds, first.setdefault(domain, np.mean(seeds, axis=0)))
                  for domain, seeds in results.items()]
    if rank == 0:
        head = ("row", "domain", "clips x seeds", "success", "seeds' means", "to first row", "gain inside, dB", "to first row",
                "flicker", "to first row")
        print(f"{args.stage}: held-out clips of {FRAMES} frames; ± is half a 95 % interval over clips\n"
              f"| {' | '.join(head)} |\n|{'---|' * len(head)}", *lines, sep="\n", flush=True)


def plot(folder, to):
    """gamma of every motion module (Figure 4e) and EPM's mean bias of every site over a round's training, and what the
    mean bias gives as attention between frames, first and last (Figure 5): log.jsonl of the run `folder` -> a PNG at `to`.

    A bias only counts against the others of its row, so the curve is the other frames' less the own frame's, and the
    matrices are the rows' softmax: the share of attention where all frames look alike.
    """
    log = folder / "log.jsonl"
    rows = read_training_log(log)
    if not rows or "gamma" not in rows[0]:
        raise UserError(f"{log}: no log of a video run; pass --weights with the folder of one")
    panels = [("gamma of each motion module", {k: [r["gamma"][k] for r in rows] for k in rows[0]["gamma"]})]
    if "epm" in rows[0]:
        panels.append(("EPM's mean bias: other frames less the own",
                       {k: [r["epm"][k][1] - r["epm"][k][0] for r in rows] for k in rows[0]["epm"]}))
    width, height, left, top = 560, 400, 60, 30
    picture = Image.new("RGB", (width * (len(panels) + ("epm_matrix" in rows[0])), height), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, curves) in enumerate(panels):
        x0, x1, y0, y1 = i * width + left, (i + 1) * width - 20, top, height - 40
        low, high = min(map(min, curves.values())), max(map(max, curves.values()))
        low, high = low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3
        draw.text((x0, 8), title, "black")
        for k in range(5):
            y = y1 - (y1 - y0) * k / 4
            draw.line([x0, y, x1, y], "#dddddd")
            draw.text((x0 - 8, y), f"{low + (high - low) * k / 4:.2f}", "black", anchor="rm")
            step = rows[-1]["step"] * k / 4
            draw.text((x0 + (x1 - x0) * k / 4, y1 + 14), f"{step:.0f}", "black", anchor="mm")
        for k, (name, curve) in enumerate(sorted(curves.items())):
            colour = f"hsl({360 * k // len(curves)}, 70%, 40%)"
            points = [(x0 + (x1 - x0) * r["step"] / rows[-1]["step"], y1 - (y1 - y0) * (v - low) / (high - low))
                      for r, v in zip(rows, curve)]
            draw.line([(x0, points[0][1]), *points], colour, 2)
            if len(curves) <= 16:                                  # more names than that fit nowhere
                short = name.replace("_blocks", "").replace("motion_modules.", "").replace("attentions.", "")
                draw.text((x0 + 6, y0 + 4 + 12 * k), short, colour)
    if "epm_matrix" in rows[0]:
        for k, row in enumerate((rows[0], rows[-1])):              # black 0, white 1
            share = torch.tensor(row["epm_matrix"]).softmax(dim=1)
            m = Image.fromarray((255 * share).byte().numpy())
            x = len(panels) * width + 20 + 265 * k
            picture.paste(m.resize((240, 240), Image.Resampling.NEAREST).convert("RGB"), (x, 60))
            draw.text((x, 40), f"step {row['step']}: row listens to column", "black")
    with aside(to) as part:
        picture.save(part, "PNG")
    print(f"{to}: {len(rows)} points of {log}")


# ---------------------------------------------------------------------------------------------------------------
# Putting networks into hub layout, and main
# ---------------------------------------------------------------------------------------------------------------

def write_network(folder, config, tensors, name="model.safetensors", dtype=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / name, tensors, dtype)
    write_json(folder / "config.json", config)


def export(run, target):
    """The U-Net of a trained run, with the other networks of the repository that it started from -> a directory in hub layout,
    float16: what `--model tiny` loads. A video run's motion modules, gamma and EPM go into the one U-Net file;
    unet/config.json says so under "motion", "epm" and "same_noise".
    """
    import shutil
    if not finished(run):
        raise UserError(f"{run}: no finished run there to export; train it first")
    run_meta, unet = read_json(run / "meta.json"), load_file(run / "model.safetensors")
    base = hub_dir(repository(run)[1], VideoEditor.FILES)
    text = {k.removeprefix("text_encoder."): unet.pop(k) for k in list(unet) if k.startswith("text_encoder.")}
    for path in sorted(base.rglob("*")):
        to, part = target / path.relative_to(base), path.relative_to(base).parts[0]
        own_text = path.suffix == ".safetensors" and part == "text_encoder" and text
        # the run has its own U-Net, and its own motion modules, trained further
        if part == "unet" or part == "motion_adapter" and "motion" in run_meta:
            continue
        if to.exists() and to.samefile(path) and not own_text:     # exported onto itself
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_tensors(to, own_text or load_file(path), torch.float16)
        elif path.is_file():
            shutil.copyfile(path, to)
    trained_with = {k: run_meta[k] for k in ("motion", "epm", "same_noise") if k in run_meta}
    write_network(target / "unet", run_meta["unet"] | trained_with,
                  unet, "diffusion_pytorch_model.safetensors", torch.float16)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


def parse_args(argv=None):
    def defaults(name):
        return ", ".join(f"{how[name]:g} ({model})" for model, how in VIDEO.items())
    p = Parser(description=__doc__.split("\n\n")[0], formatter_class=Defaults)
    p.add_argument("--stage", default="all", choices=["all", *STEPS, "video", "writer", "eval", "plot", *TABLES, "export"],
                   help="what to train or do")
    p.add_argument("--round", type=int, help="bring the model up to this refinement round, curation included; with --stage "
                   "video, eval, plot, export: which round")
    p.add_argument("--model", default="tiny", choices=list(VIDEO), help="tiny: all from nothing; sd15: from published weights")
    p.add_argument("--data", type=Path, help="where drawn, cached and curated clips lie; default data/<model>")
    p.add_argument("--runs", type=Path, help="where checkpoints and logs go; default runs/<model>")
    p.add_argument("--force", action="store_true", help="resume a training run although its settings changed, or keep a "
                   "finished one as it is")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    # training
    p.add_argument("--steps", type=int, help="optimizer steps, with --round of the rounds alone; "
                   f"default {STEPS}, writer {WRITER_STEPS}, video {defaults('steps')}")
    p.add_argument("--lr", type=float, help=f"peak learning rate, likewise; default {LR}, writer {WRITER_LR:g}, "
                   f"video {defaults('lr')}")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="train in bfloat16 (weights stay in float32) and "
                   "curate in it; default on CUDA only. Faster on CPUs with AVX512-BF16 or AMX, slow on others")
    p.add_argument("--optimizer", default="muon", choices=["muon", "adamw"], help="image stage, for matrices inside the network; "
                   "the rest, and the other stages, have AdamW")
    p.add_argument("--batch", type=int, help="image stage: pairs a step at 1:1 aspect; default 32; writer: 4")
    p.add_argument("--pairs", type=int, default=120000, help="pairs of the world set; writer: at most")
    p.add_argument("--clips-drawn", type=int, default=3000, help="viclip stage: pairs of clips to draw")
    p.add_argument("--size", type=int, default=64, help="short side of the editor's frames in pixels, a multiple of 32")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, noise and the order of the data; also of eval's scenes")
    p.add_argument("--t-bias", type=float, help="time steps are T*u^bias: 1 uniform, below 1 more noise; default "
                   + defaults("t_bias"))
    p.add_argument("--region-weight", type=float, help="extra loss weight of the smaller part of a frame, changed or kept; default "
                   + defaults("region_weight"))
    # motion and video
    p.add_argument("--clip-batch", type=int, help="clips of 16 frames in a micro-batch of one process; default "
                   + defaults("clip_batch"))
    p.add_argument("--accumulate", type=int, help="motion, video: micro-batches a step; default " + defaults("accumulate"))
    p.add_argument("--checkpointing", action="store_true", help="motion, video: recompute activations in the backward pass: slower, less memory")
    p.add_argument("--save-minutes", type=float, default=5, help="minutes between checkpoints")
    p.add_argument("--same-noise", type=float, help="share of clips whose frames have one noise; default motion 0.5, "
                   "video 1 (tiny) or 0 (sd15)")
    p.add_argument("--motion-clips", type=int, default=2000, help="motion: unedited clips to draw")
    p.add_argument("--lr-new", type=float, help="video: peak learning rate of EPM; gamma's is ten times that; "
                   "default " + defaults("lr_new"))
    p.add_argument("--trainable", default="temporal", choices=["temporal", "all"], help="video: motion modules, or the whole "
                   "U-Net; gamma and EPM always")
    p.add_argument("--sma", action=argparse.BooleanOptionalAction, default=True, help="video: trained gamma from 0; else fixed at 1")
    p.add_argument("--epm", action=argparse.BooleanOptionalAction, default=True, help="video: editing-guided propagation")
    p.add_argument("--epm-sites", default="all", choices=["all", "inner"], help="video: EPM at which self-attention sites")
    p.add_argument("--epm-start", type=float, help="video: EPM's bias between frames before training; default tiny -2, sd15 -10")
    p.add_argument("--camera-moves", type=int, default=0, help="video: copies of every clip under a random pan or zoom")
    p.add_argument("--no-text", choices=["source", "edit"], help="video: target of a dropped instruction; default tiny source, sd15 edit")
    p.add_argument("--guided-loss", action=argparse.BooleanOptionalAction, help="video: the loss is that of the guided prediction, as "
                   "sampling makes it; default tiny yes, sd15 no")
    p.add_argument("--train-on", type=Path, nargs="+", help="video: curated directories; default the round's own")
    p.add_argument("--max-clips", type=int, default=-1, help="video: train on the first so many clips; -1 all")
    p.add_argument("--mix", action="store_true", help="video: from round 2 on the synthetic triples of "
                   "round 0 as well")
    p.add_argument("--out", type=Path, help="video, writer: where the run goes; eval, plot, export: where it lies; default "
                   "runs/<model>/round<N>, writer")
    p.add_argument("--seeds", type=int, default=3, help="tables: training seeds of every row")
    # writer
    p.add_argument("--pairs-from", type=Path, help="writer: image pairs, as `curate.py images --from`; the first --pairs of them")
    p.add_argument("--llava", default=LLAVA, help="writer: hub id or directory of the language model")
    p.add_argument("--rank", type=int, default=16, help="writer: of LoRA's matrices")
    # curation for --round
    p.add_argument("--motion", help="motion adapter; default sd15: AnimateDiff's, tiny: stage motion's")
    p.add_argument("--images-from", default="shapes", help="round 0: source images, as `curate.py images --from`")
    p.add_argument("--images", type=int, default=240, help="round 0 and table2: how many of them")
    p.add_argument("--real-from", default="shapes", help="rounds 1, 2: real clips, as `curate.py real --from`")
    p.add_argument("--real-clips", type=int, default=120, help="rounds 1, 2: how many of them; of a folder how many videos")
    for stage in ("images", "videos", "real"):
        p.add_argument(f"--curate-{stage}", default="", metavar="FLAGS", help=f"more flags for `curate.py {stage}`, quoted "
                       f"and after =, like --curate-real=\"--writer llava\"; tiny's own: {CURATE['tiny'][stage]}")
    # evaluation
    p.add_argument("--weights", help="what to evaluate or to start from, as VideoEditor.from_pretrained; default the run, else tiny "
                   "(image: from nothing)")
    p.add_argument("--n", type=int, default=24, help="eval, tables: edits per task")
    p.add_argument("--frames", type=int, default=1, help="eval: frames a clip; 1 edits single frames")
    p.add_argument("--sampling-steps", type=int, help="eval, tables: of every edit; default the checkpoint's own: 20, tiny 5")
    p.add_argument("--mode", default="auto", choices=["auto", "image", "ffg", "video"], help="eval: how clips are edited")
    p.add_argument("--ffg-keys", default="beside", choices=["beside", "instead"], help="eval: a frame's own keys in FFG-V2V")
    p.add_argument("--domain", default="synthetic", choices=["synthetic", "real"], help="eval: which scenes")
    p.add_argument("--clips", type=Path, help="eval: also a folder of real clips")
    p.add_argument("--text-cfg", type=float, help="eval, tables: text guidance; default the checkpoint's")
    p.add_argument("--source-cfg", type=float, help="eval, tables: source guidance; default the checkpoint's")
    p.add_argument("--to", type=Path, default=ROOT / "assets" / "tiny", help="export: target directory")
    args = p.parse_args(argv)
    args.given = {name for name, value in vars(args).items() if value != p.get_default(name)}
    for name, default in VIDEO[args.model].items():
        if name not in ("steps", "lr", "lr_new", "same_noise") and getattr(args, name) is None:
            setattr(args, name, default)
    args.data, args.runs = args.data or ROOT / "data" / args.model, args.runs or ROOT / "runs" / args.model
    for name, low in (("steps", 1), ("batch", 1), ("pairs", 1), ("clips_drawn", 1), ("n", 1), ("frames", 1), ("round", 0),
                      ("clip_batch", 1), ("accumulate", 1), ("motion_clips", 1), ("sampling_steps", 1), ("camera_moves", 0),
                      ("seeds", 1), ("images", 1), ("rank", 1), ("real_clips", 1), ("same_noise", 0), ("max_clips", -1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: needs {low} or more")
    for name in ("lr", "lr_new", "t_bias"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: needs more than 0")
    if args.max_clips == 0:
        raise UserError("--max-clips 0: needs 1 or more, or -1 for all")
    if args.weights and args.stage == "all" and args.round is None:
        raise UserError(f"--weights {args.weights}: without --round everything is trained from nothing; add --round N for rounds "
                        "from it, --stage image to go on from it, or --stage eval")
    if args.model != "tiny" and args.stage in ("vae", "clip", "viclip", "image", "motion"):
        raise UserError(f"--stage {args.stage} --model {args.model}: published weights take its place; it is for --model tiny")
    check_device(args.device)
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: training runs on cpu or cuda")
    if args.out and args.stage in ("all", *STEPS, *TABLES):
        raise UserError(f"--out {args.out}: --stage {args.stage} writes into --runs; --out is for video, writer, eval, plot, export")
    for name in ("data", "runs", "out", "to"):
        path = getattr(args, name)
        if path and any(p.exists() and not p.is_dir() for p in (path, *path.parents)):
            raise UserError(f"--{name} {path}: is, or lies below, a file; needs a directory")
    if args.clips and not args.clips.is_dir():
        raise UserError(f"--clips {args.clips}: no such folder")
    if args.size % 32 or args.size < 32:
        raise UserError(f"--size {args.size}: needs a multiple of 32")
    return args


# of what a stage puts into runs/<model>/base, the file that it writes last
LAST_FILE = {"vae": "vae/config.json", "clip": "tokenizer/merges.txt", "viclip": "viclip/merges.txt",
             "motion": "motion_adapter/config.json"}


def wanted(stage, args):
    """True where a stage was asked for by name, or is part of "all" and lacks steps or its networks in runs/<model>/base
    (a run cut between the two writes them when it is called again; its training is not repeated).

    UserError where it is finished, but flags that were given ask for another network (--force keeps it as it is). With
    --round most of them are the rounds': see `before_rounds`.
    """
    if args.stage != "all":
        return args.stage == stage
    run, last = args.runs / stage, args.runs / "base" / LAST_FILE.get(stage, "")
    if not (last.exists() and finished(run)):
        return True
    names = {"steps", "lr", "batch", "optimizer", "pairs", "clips_drawn", "seed", "t_bias", "region_weight"} & args.given
    new = {k: getattr(args, k) for k in ("size", *(sorted(names) if args.round is None else ()))}
    vae = args.runs / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    if stage == "motion":
        editor = starting_point(args)[0]
        new |= dict(weights=portable(editor), editor=network_mark(editor))
    if vae.is_file() and not args.weights:                         # else the editor brings its own
        new["vae"] = vae_mark(read_tensors(vae)["quant_conv.weight"])
    changed = differences(read_json(run / "meta.json")["args"], new)
    if changed and not args.force:
        raise UserError(f"{run}: finished with {', '.join(changed)}; pass the same, --force to keep it as it is, or another "
                        "--runs folder")
    return False


def before_rounds(args):
    """The flags for what --round trains first where it is missing, networks and motion modules: --steps, --lr and what
    else belongs to a round's training are the rounds' alone there; by themselves (--stage) they have them, too."""
    if args.stage != "all" or args.round is None:
        return args
    return argparse.Namespace(**vars(args) | dict(steps=None, lr=None, same_noise=None, t_bias=VIDEO["tiny"]["t_bias"],
                                                  region_weight=VIDEO["tiny"]["region_weight"]))


def networks(args):
    """The stages from vae to image, those that are wanted, and `base`: their networks in hub layout."""
    base = args.runs / "base"
    todo = [stage for stage in ("vae", "clip", "viclip", "image") if wanted(stage, args)]
    if todo:
        shards = world_set(args.data / "world", args.pairs, args.size)
    if "clip" in todo or "viclip" in todo:                         # the scorers look at more pixels than the editor makes
        large = world_set(args.data / "world", max(1, args.pairs // 2), TINY_VISION["image_size"])
    if "vae" in todo:
        vae, config = stage_vae(args, shards, args.runs / "vae")
        write_network(base / "vae", config, vae.state_dict(), "diffusion_pytorch_model.safetensors")
    if "clip" in todo:
        clip, config, tokenizer = stage_clip(args, large, args.runs / "clip")
        write_network(base / "clip", config, clip.state_dict())
        write_network(base / "text_encoder", config["text_config"],
                      {k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")})
        write_json(base / "clip" / "preprocessor_config.json", PREPROCESSOR)
        for folder in (base / "clip", base / "tokenizer"):
            folder.mkdir(exist_ok=True)
            for name in ("vocab.json", "merges.txt"):
                (folder / name).write_bytes((args.runs / "clip" / "tokenizer" / name).read_bytes())
    if "viclip" in todo:
        if not (base / "tokenizer").is_dir():
            raise UserError(f"--stage viclip needs {base / 'tokenizer'}; run --stage clip first")
        viclip, config = stage_viclip(args, large, args.runs / "viclip", base)
        write_network(base / "viclip", config, viclip.state_dict())
        for name in ("vocab.json", "merges.txt"):
            (base / "viclip" / name).write_bytes((base / "tokenizer" / name).read_bytes())
    if "image" in todo:
        weights = args.weights if args.stage == "image" else None  # without a stage: what to evaluate
        if weights:                                                # from another editor: its other networks as well
            root = hub_dir(repository(weights)[1], VideoEditor.FILES)
            copies = {base / p.relative_to(root): p for p in sorted(root.rglob("*"))
                      if p.is_file() and "unet" not in p.relative_to(root).parts}
            other = [to for to, path in copies.items()
                     if to.suffix == ".safetensors" and to.exists() and to.read_bytes() != path.read_bytes()]
            if other:
                raise UserError(f"{other[0]}: another network than that of --weights {weights}, which goes on with its own; pass "
                                "another --runs folder")
            for to, path in copies.items():
                to.parent.mkdir(parents=True, exist_ok=True)
                if not to.exists():
                    to.write_bytes(path.read_bytes())
        for part, stage in (("vae", "vae"), ("text_encoder", "clip")):
            if not (base / part / "config.json").is_file():
                raise UserError(f"--stage image needs {base / part}; run --stage {stage} first")
        (base / "scheduler").mkdir(exist_ok=True)
        write_json(base / "scheduler" / "scheduler_config.json", TINY_SCHEDULER)
        write_json(base / "model_index.json", {"_class_name": "VideoEditor", "instructvedit": dict(
            size=args.size, steps=TINY_STEPS, guidance=TINY_GUIDANCE, deadband=TINY_DEADBAND, words=world.known_words(),
            examples=world.examples())})
        stage_image(args, shards, args.runs / "image", base, weights)


def main(argv=None):
    args = parse_args(argv)
    join_processes(args.device)
    up_to_round, first = args.stage == "all" and args.round is not None, processes()[0] == 0
    run_of_round = args.out or args.runs / ("image" if args.round is None else f"round{args.round}")
    if up_to_round:
        check_rounds(args)
    if args.model == "tiny" and first and not (up_to_round and args.weights):              # minutes, so one process is enough
        networks(before_rounds(args))
    if dist.is_initialized():
        dist.barrier()
    if args.stage == "motion" or up_to_round and args.model == "tiny" and not args.motion and wanted("motion", args):
        stage_motion(before_rounds(args), args.runs / "motion", args.runs / "base")
    if up_to_round:
        refine(args)
    if args.stage == "video":
        n = args.round or 0
        stage_video(args, args.out or args.runs / f"round{n}", starting_point(args)[0], round_folders(args, n))
    if args.stage == "writer":
        stage_writer(args, args.out or args.runs / "writer")
    if args.stage in TABLES:
        tables(args)
    if args.stage == "plot" and first:
        folder = Path(args.weights or run_of_round)
        plot(folder, folder / "training.png")
    if args.stage in ("all", "image", "eval") and first:
        found = run_of_round if (run_of_round / "model.safetensors").is_file() else args.model
        if found == args.model and not args.weights and (args.out or args.round is not None):
            raise UserError(f"{run_of_round}: no finished run there to evaluate; pass --weights, or train it first")
        ed = VideoEditor.from_pretrained(found if up_to_round or args.stage == "image" else args.weights or found, device=args.device)
        ed.unet.ffg_keys = args.ffg_keys
        n_frames, mode = (FRAMES, "video") if up_to_round else (args.frames, args.mode)
        how = args.text_cfg, args.source_cfg, args.sampling_steps
        if ed.words or args.stage == "eval":
            evaluate(ed, args.n, args.seed, ed.size, args.domain, *how, n_frames, mode)
            words_heard(ed, 5 * args.n // 2, args.seed, ed.size)
        else:                                                      # published weights do not know the shapes world
            print(f"{run_of_round}: score it on real clips with `python metrics.py tgve DIR --weights {run_of_round}`")
        if args.clips:
            evaluate_clips(ed, args.clips, ed.size, 8, *how, mode)
    if args.stage == "export" and first:
        export(run_of_round, args.to)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
