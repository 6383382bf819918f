"""Train every network of this repository: one straight loop, one loss a stage, one file.

    python train.py               the networks of `tiny` from nothing: vae, clip, viclip, image
    python train.py --round 2     bring the model up to refinement round 2: all networks, curation, training
    python train.py STAGE ...     one stage, with flags of its own (python train.py STAGE --help):
        vae         the autoencoder of `tiny`, on scenes drawn by code
        clip        tiny CLIP on frames and captions; its text tower then is the editor's text encoder
        viclip      tiny ViCLIP on drawn clips, a scorer
        image       the InstructPix2Pix-style image editor, on (source, instruction, target)
        motion      motion modules on unedited clips: what AnimateDiff's weights are for `sd15`
        video       one round of the video editor, on curated triples: data/<model>/round<N>
        writer      LoRA for the language model that writes instructions, on image pairs
    python train.py table2|table3|table4     the paper's ablations, measured where the true edit is known
    python train.py plot|export --round N    a round's gamma and EPM as a picture; a run as one folder

Contents: settings, the drawn data, the loop, a section a stage, the rounds, tables, plot, export, commands.
A run lies in runs/<model>/<stage>: settings.json (what made it), log.jsonl, state.pt (to resume), and when it
is finished its networks in hub layout, model_index.json or config.json last. Under torchrun the stages
motion, video and writer share their batch among the processes.
"""
import json
import math
import os
import shlex
import shutil
import sys
import time
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image as Picture
from safetensors.torch import load_file
from tokenizers import Tokenizer as BPETokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import curate
import world
from metrics import CLIP, ViCLIP, drawn_scores, print_bare, table_head, table_row
from model import (EPM, N_FRAMES, ROOT, SD15_MOTION, VAE, MotionModule, ResnetBlock, Tokenizer, Transformer,
                   UNet, UserError, VideoEditor, aside, begin, find_tensors, fingerprint, finished, need,
                   noise_levels, part, portable, read_json, read_tensors, reading, repository, resize, run,
                   save_tensors, to_tensor, write_json, write_text)
from sample import Parser, add_flags, from_flags, known_device, option
from teachers import (FIELDS, LLAVA, WRITER_TASKS, LlavaOneVision, add_lora, guess_task, parse_answer,
                      save_lora, writer_loss)

TINY = ROOT / "assets" / "tiny"         # its config.json files give the sizes of what is trained from nothing

# ---- settings: a dataclass a stage; its fields are the flags and what a run's settings.json remembers ------

@dataclass
class Training:
    """What `fit` needs of every stage."""
    steps: int = option(1000, "of the optimizer", low=1)
    lr: float = option(1e-3, "peak learning rate", low=1e-12)
    batch: int = option(4, "pairs or clips in a micro-batch of one process", low=1)
    accumulate: int = option(1, "micro-batches in a step of one process", low=1)
    samples: int = option(120_000, "drawn pairs or clips to train on; of given ones the first so many", low=1)
    seed: int = option(0, "of initialisation, noise and the order of the data")
    lr_new: float = 0.0                 # of EPM; gamma's is ten times that
    optimizer: str = "adamw"
    warmup: int = 200                   # steps until the peak; 0: a tenth of all, 200 at most
    ema: float = 0.999


SIZES = range(32, 513, 32)


@dataclass
class Vae(Training):
    size: int = option(64, "short side of the frames, pixels", choices=SIZES)


@dataclass
class Clip(Training):
    pass


@dataclass
class Viclip(Training):
    clips: int = option(3000, "drawn pairs of clips; samples are of stills", low=1)


@dataclass
class Image(Training):
    size: int = option(64, "short side of the frames, pixels", choices=SIZES)
    weights: str = option("", "an editor to go on from, with a new schedule, or Stable Diffusion (default: "
                              "from nothing)")
    shares: tuple[float, ...] = option((), "how often each of --images-from is drawn from (default: alike)")
    cache: bool = option(True, "latents of given images lie on disk; else they are made when wanted")
    train_text: bool = option(True, "the text encoder learns along")
    no_text: str = option("source", "target where the instruction is dropped", choices=["source", "edit"])
    images_from: tuple[str, ...] = ()   # Task's
    optimizer: str = option("muon", "of inner matrices; the rest has AdamW", choices=["muon", "adamw"])
    t_bias: float = option(0.5, "time steps are T * u ** bias: 1 uniform, below 1 more noise", low=1e-6)
    region_weight: float = option(3.0, "extra loss weight of a frame's smaller part, changed or kept", low=0)


@dataclass
class Motion(Training):
    size: int = option(64, "side of the frames, pixels", choices=SIZES)
    weights: str = option("", "image editor to train in (default: runs/tiny/image)")
    same_noise: float = option(0.5, "share of clips whose frames have one noise", low=0, high=1)
    t_bias: float = option(0.5, "time steps are T * u ** bias: 1 uniform, below 1 more noise", low=1e-6)


@dataclass
class Round(Training):
    """A round of the video editor."""
    lr_new: float = option(3e-4, "peak learning rate of EPM; gamma's is ten times that", low=1e-12)
    weights: str = option("", "image editor to start from (default: runs/tiny/image, or sd15); video: or a "
                              "round, to go on from it")
    motion: str = option("", "motion adapter (default: runs/tiny/motion, or AnimateDiff's)")
    train_on: tuple[str, ...] = option((), "curated folders (default: the round's own)")
    trainable: str = option("temporal", "motion modules, or the whole U-Net; gamma and EPM always",
                            choices=["temporal", "all"])
    sma: bool = option(True, "gamma is trained, from 0; else it stays at 1")
    epm: bool = option(True, "editing-guided propagation")
    epm_sites: str = option("all", "EPM at which self-attention sites", choices=["all", "inner"])
    joint: bool = False                 # table 3's control: EPM stays at 0, a frame hears all alike
    same_noise: float = option(1.0, "share of clips whose frames have one noise", low=0, high=1)
    t_bias: float = option(0.5, "time steps are T * u ** bias: 1 uniform, below 1 more noise", low=1e-6)
    region_weight: float = option(3.0, "extra loss weight of a frame's smaller part, changed or kept", low=0)
    no_text: str = option("source", "target where the instruction is dropped", choices=["source", "edit"])
    guided_loss: bool = option(True, "the loss is that of the guided prediction, as sampling makes it")
    warmup: int = 0


@dataclass
class Writer(Training):
    pairs_from: str = option("", "image pairs, as curate.py images --from")
    llava: str = option(LLAVA, "hub id or directory of the language model")
    rank: int = option(16, "of LoRA's matrices", low=1)
    warmup: int = 0


@dataclass
class How:
    """What changes no result, or hardly, and is stored nowhere."""
    device: str = "cpu"
    rank: int = 0                       # of this process among
    n_ranks: int = 1                    # those that torchrun started, which share a step
    bf16: bool | None = option(None, "networks run in bfloat16, weights stay in float32 (default: on CUDA)")
    checkpointing: bool = option(False, "recompute activations in the backward pass: slower, less memory")
    save_minutes: float = option(5.0, "between checkpoints", low=0)
    force: bool = option(False, "go on although a run's settings changed; keep a finished one as it is")


@dataclass
class Task:
    """What a command is to do, and where."""
    model: str = option("tiny", "tiny: from nothing; sd15: from published weights, its defaults: ROUND",
                        choices=["tiny", "sd15"])
    data: Path | None = option(None, "where drawn, cached and curated clips lie (default: data/<model>)")
    runs: Path | None = option(None, "where runs go (default: runs/<model>)")
    round: int | None = option(None, "bring the model up to this one; video, plot, export: which one", low=0)
    out: Path | None = option(None, "image, video, writer: where the run goes; plot, export: where it lies")
    to: Path = option(TINY, "export: target folder")
    photos: Path | None = option(None, "a folder of photographs, for tiny to see; needs --cutouts")
    cutouts: Path | None = option(None, "things to put on them: PNG with alpha, named as fire-truck_2.png")
    images_from: tuple[str, ...] = option((), "round 0: source images, as curate.py images --from (tiny: "
                                              "shapes); image: pairs to train on, several are mixed")
    images: int = option(240, "round 0: how many of them", low=1)
    real_from: str = option("", "rounds 1, 2: real clips, as curate.py cut --from (tiny: shapes)")
    real_clips: int = option(120, "rounds 1, 2: how many of them; of a folder how many videos", low=1)
    mix: bool = option(False, "from round 2 on the synthetic triples of round 0 as well")
    curate_images: str = option("", "rounds: more flags of curate.py images, quoted, after =")
    curate_clips: str = option("", "of curate.py clips")
    curate_videos: str = option("", "of curate.py videos")
    curate_cut: str = option("", "of curate.py cut")
    curate_write: str = option("", "of curate.py write")
    curate_real: str = option("", "of curate.py real")
    n: int = option(24, "held-out edits per task, measured after training and in tables (0: none)", low=0)
    seeds: int = option(3, "tables: training seeds of every row", low=1)


# 1e-5 is InsV2V's learning rate; the rest of sd15's is our guess until someone has the GPU hours: 2,000 steps
# are 3 to 6 passes over the paper's clips. `tiny` is trained from nothing and its empty instruction returns
# the source, see `stage_image`; IP2P's is an average of all edits, which its guidance scales count on.
ROUND = {"tiny": Round(steps=60, lr=2e-4),
         "sd15": Round(weights="sd15", motion=SD15_MOTION, steps=2000, lr=1e-5, lr_new=1e-4, batch=1,
                       accumulate=16, same_noise=0.5, t_bias=1.0, region_weight=0.0, no_text="edit",
                       guided_loss=False)}
# InstructPix2Pix's own schedule, but for its batch of 1,024 pairs
IMAGE = {"tiny": Image(steps=16_000, batch=32),
         "sd15": Image(steps=10_000, lr=1e-4, batch=16, accumulate=4, size=256, samples=10 ** 7,
                       optimizer="adamw", t_bias=1.0, region_weight=0.0, train_text=False, no_text="edit",
                       weights="stable-diffusion-v1-5/stable-diffusion-v1-5")}
WRITER = Writer(steps=2000, lr=1e-4)                               # ours; the paper names neither
# where the rounds' curation differs from curate.py by itself: five sampling steps edit as well as twenty for
# `tiny`, and of clips that differ in guidance alone there is nothing to choose
CURATE = {"tiny": dict(images=dict(candidates=6, steps=5), videos=dict(candidates=1),
                       real=dict(candidates=2, steps=5)),
          "sd15": dict(clips=dict(animate="cogvideox"), write=dict(writer="llava"))}
TASK = {"tiny": Task(), "sd15": Task(model="sd15", images=50_000, real_clips=8000)}     # as in the paper

# ---- the drawn data: files drawn once, shared by all stages ------------------------------------------------

KINDS = {"pairs": ("world shard", 0, 500),                    # name and first of its seeds, samples in a file
         "clips": ("clips", 50_000_000, 250), "motion": ("motion clips", 90_000_000, 100)}
DOMAINS = ["synthetic"] * 4 + ["real"]


@dataclass(frozen=True)
class Drawn:
    """Where drawn data lies, and what it is drawn from besides code. The folder is named by both: another
    version of the world draws anew."""
    folder: Path
    pictures: world.Pictures | None = None


def drawn_data(data, photos, cutouts):
    if bool(photos) != bool(cutouts):
        raise UserError("--photos and --cutouts: pass both")
    pictures = None
    if photos:
        with reading("--photos and --cutouts"):
            pictures = world.find_pictures(photos, cutouts)
    return Drawn(data / f"world-{fingerprint(ROOT / 'world.py', *filter(None, (photos, cutouts)))}", pictures)


def draw_file(path, kind, index, n, size, pictures=None):
    """File `index` of a kind: a .safetensors with x, uint8, and beside it a .json with a record a sample.

    pairs (n, 2, H, W, 3): source and target of an edit, some files wide or tall; clips (n, 2, 8, H, W, 3):
    the same in motion; motion (n, 16, H, W, 3): unedited.
    """
    name, first, _ = KINDS[kind]
    rng, shape, samples = Random(f"{name} {index}"), (size, size), []
    if kind == "pairs":
        wide = size * 7 // 32 * 8                                  # 16:9 in multiples of 8
        shape = rng.choices([(size, size), (size, wide), (wide, size)], [80, 12, 8])[0]
    for i in range(n):
        seed, domain = first + index * n + i, DOMAINS[i % 5]
        if kind == "motion":
            scene = world.training_scene(seed, domain, pictures)
            clip = world.render(scene, N_FRAMES, *shape, t0=rng.uniform(0, 4))
            samples.append(((clip * 255 + .5).astype(np.uint8), dict(seed=seed, domain=domain)))
        else:
            samples.append(world.draw_pair(seed, domain, rng, *shape, 8 if kind == "clips" else 1, pictures))
    frames, records = zip(*samples)
    write_json(path.with_suffix(".json"), records)
    x = torch.from_numpy(np.stack(frames))
    save_tensors(path, {"x": x})                                   # last: a file is there whole or not at all


def world_set(drawn, kind, n, size):
    """Draw what is missing of the first n samples, on all cores; returns [(uint8, mapped into memory,
    [record])] by file."""
    per_file = KINDS[kind][2]
    paths = [drawn.folder / f"{kind}-{size}px-{i:05d}.safetensors" for i in range(math.ceil(n / per_file))]
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(draw_file, path, kind, i, per_file, size, drawn.pictures)
                for i, path in enumerate(paths) if not path.is_file()]
        for job in tqdm(jobs, desc=f"drawing {kind}", unit="file", disable=not jobs):
            job.result()
    return [(read_tensors(path)["x"], read_json(path.with_suffix(".json"), list)) for path in paths]


def square(shards):
    return [shard for shard in shards if shard[0].shape[2] == shard[0].shape[3]]


def random_batch(shards, n, generator, axis=2, odds={}):
    """A random batch of one shard, so of one frame size (height and width at `axis`): n pairs at 1:1
    aspect and fewer of a wider or taller frame, so that every batch holds about the same number of pixels.
    odds: {task: how much more often than drawn}. Returns the pairs (N, 2, ...) and their [source captions,
    target captions, instructions]."""
    pairs, records = shards[int(torch.randint(len(shards), (1,), generator=generator))]
    short, long = sorted(pairs.shape[axis:axis + 2])
    weights = torch.tensor([float(odds.get(record["task"], 1)) for record in records])
    n = max(2, round(n * short / long))
    rows = torch.multinomial(weights, n, replacement=True, generator=generator).tolist()
    return pairs[rows], [[records[i][key] for i in rows] for key in ("source", "target", "instruction")]


def as_input(frames):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def latents_of(ed, shards, folder, domains=DOMAINS):
    """Frames of some domains encoded, once: [(float16 (n, 2 or 16, c, h, w), [record])] by file."""
    out = []
    for i, (frames, records) in enumerate(tqdm(shards, desc="latents", unit="file")):
        path = Path(f"{folder}-{fingerprint(part(ed.folders, 'vae'))}", f"{i:05d}.safetensors")
        rows = [k for k, record in enumerate(records) if record["domain"] in domains]
        if not path.is_file():
            z = ed.encode(as_input(frames[rows].flatten(0, 1))[None])[0]
            save_tensors(path, {"z": z.unflatten(0, (len(rows), -1))}, torch.float16)
        out.append((read_tensors(path)["z"], [records[k] for k in rows]))
    return out

# ---- the loop ----------------------------------------------------------------------------------------------

def join_processes(device):
    """Join the processes that torchrun started, if it did. Returns (rank, n_ranks)."""
    n_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if n_ranks > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))            # curation is long
    return int(os.environ.get("RANK", 0)), n_ranks


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def orthogonal(m, iterations=5):
    """m with its singular values near 1 (0.68 to 1.2), those of a hundredth of the largest and more:
    Newton-Schulz iterations, odd polynomial (3.4445, -4.775, 2.0315) of Jordan et al., "Muon", 2024. (out,
    in) float -> the same shape."""
    x = m / (m.norm() + 1e-7)
    if m.shape[0] > m.shape[1]:                                    # the Gram matrix of the shorter side
        return orthogonal(m.T, iterations).T
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with muon=True take a step of orthogonalised Nesterov momentum instead: a matrix
    moves along all of its directions alike, along those of rare gradients too. For weights of two or more
    dimensions; convolutions count as (out, in * kernel). Steps have AdamW's size, 0.2 in root mean square,
    so learning rate and weight decay mean the same ("Muon is scalable for LLM training", arXiv
    2502.16982)."""

    @torch.no_grad()
    def step(self, momentum=0.95):
        for group in self.param_groups:
            for p in group["params"] if group.get("muon") else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:                               # AdamW wants a step with every parameter it loads
                    state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))
                mean = state["momentum"]
                mean.lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(mean, momentum).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-0.2 * max(update.shape) ** 0.5 * group["lr"])
                p.grad = None                                      # so AdamW passes it by
        super().step()


def parameter_groups(trained, s):
    """{name: parameter} -> groups of one rate each, the first the log's. SMA's and EPM's are in no
    published file, so they start from nothing: gamma is one number a module and needs more than the rate
    at which EPM's matrices stay calm. Muon is for inner matrices: embeddings, first and last layers and
    vectors are AdamW's."""
    groups = {(s.lr, 0.01, False, 1e-8): []}                       # rate, weight decay, whether Muon's, eps
    for name, p in trained.items():
        inner = p.dim() > 1 and not any(word in name for word in ("embedding", "conv_in", "conv_out"))
        kind = s.lr, 0.01, inner and s.optimizer == "muon", 1e-8
        if name.endswith(".gamma") or ".epm." in name:             # a shut EPM's gradients are below 1e-8
            kind = (10 if name.endswith(".gamma") else 1) * s.lr_new, 0.0, False, 1e-12
        groups.setdefault(kind, []).append(p)
    return [dict(params=params, lr=lr, weight_decay=decay, muon=muon, eps=eps)
            for (lr, decay, muon, eps), params in groups.items()]


def save_state(path, **state):
    """The checkpoint of before stays until this one is whole; one name for half ones, so that kills pile
    up none."""
    half = path.with_suffix(".tmp")
    with open(half, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())                             # else a power cut may leave the name and no contents
    os.replace(half, path)


def resume(path, trained, average, opt):
    """Load a checkpoint, if there is one, into parameters, their averages and optimizer. Returns (its
    step, its log)."""
    if not path.is_file():
        return 0, []
    with reading(path, "put a whole copy there, or delete it to begin anew"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)     # eight ranks share it
        for name, p in trained.items():
            p.data.copy_(state["trained"][name])
            average[name].copy_(state["average"][name])
        opt.load_state_dict(state["opt"])
        return state["step"], state["log"]


def fit(net, loss_fn, out, s, how, probe=dict):
    """Train what requires gradients in `net` with loss_fn(number, generator) -> loss, until s.steps. Returns
    it with the averaged weights (EMA).

    AdamW or Muon, linear warm-up, cosine to 5 %, gradient norm clipped at 1. A run that was cut resumes from
    its state.pt. `number` counts micro-batches over steps and processes and with the seed fixes all that is
    random in one: a resumed run's next loss equals the uninterrupted one's, and P processes do what one does
    that accumulates P. probe: () -> more fields for the log. Raises UserError for a NaN, with the step.
    """
    device = torch.device(how.device).type
    bf16 = device == "cuda" if how.bf16 is None else how.bf16
    net.to(how.device).train()
    if how.checkpointing:
        recompute(net)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()}
    opt = Muon(parameter_groups(trained, s), betas=(0.9, 0.99), fused=True)
    peaks = [group["lr"] for group in opt.param_groups]
    start, log = resume(out / "state.pt", trained, average, opt)

    warmup = s.warmup or min(200, s.steps // 10 + 1)
    every = min(50, max(5, s.steps // 12))                         # steps between lines of the log
    losses, last_log, last_save = [], time.time(), time.time()
    for step in range(start, s.steps):
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / s.steps)) / 2
        for group, peak in zip(opt.param_groups, peaks):
            group["lr"] = peak * min(1, (step + 1) / warmup) * cosine

        opt.zero_grad(set_to_none=True)
        mean = torch.zeros((), device=how.device)
        for micro in range(s.accumulate):
            number = (step * s.accumulate + micro) * how.n_ranks + how.rank
            generator = torch.Generator().manual_seed(s.seed * 1_000_003_000 + number)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = loss_fn(number, generator) / s.accumulate
            loss.backward()
            mean += loss.detach()
        if how.n_ranks > 1:                                        # the mean of all processes, one message
            shared = [mean, *(p.grad for p in trained.values() if p.grad is not None)]
            flat = parameters_to_vector(shared)
            dist.all_reduce(flat)
            vector_to_parameters(flat / how.n_ranks, shared)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        if not torch.isfinite(mean + norm):                  # of the means: every process stops, not just one
            raise UserError(f"{out.name}: loss is {mean.item()} and the gradient's norm {norm.item()} at "
                            f"step {step}; lower --lr, and go on from the last checkpoint with --force")
        opt.step()
        with torch.no_grad():
            for name, p in trained.items():
                average[name].lerp_(p, 1 - min(s.ema, (1 + step) / (10 + step)))

        losses.append(mean.item())
        last = step + 1 == s.steps
        if (step + 1) % every == 0 or last:
            ms = (time.time() - last_log) * 1e3 / len(losses)
            row = dict(step=step + 1, loss=float(np.mean(losses)), lr=opt.param_groups[0]["lr"], ms=ms)
            log.append(row | probe())
            if how.rank == 0:
                gb = torch.cuda.max_memory_allocated() / 1e9           # 0 without CUDA
                speed = s.batch * s.accumulate * how.n_ranks * 1e3 / ms
                print(f"step {step + 1:05d}/{s.steps} | loss {row['loss']:.4f} | lr {row['lr']:.1e} | "
                      f"{ms:.0f} ms | {speed:.1f} samples/s | {gb:.1f} GB", flush=True)
                write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            losses, last_log = [], time.time()
        if how.rank == 0 and (last or time.time() - last_save > 60 * how.save_minutes):
            save_state(out / "state.pt", trained=trained, average=average, opt=opt.state_dict(),
                       step=step + 1, log=log)
            last_save = time.time()
    net.load_state_dict(average, strict=False)
    return net.eval()


def recompute(net):
    """Gradient checkpointing: the large blocks keep their input only and run again in the backward pass."""
    for m in net.modules():
        if isinstance(m, (ResnetBlock, Transformer, MotionModule)):
            m.forward = partial(checkpoint, m.forward, use_reentrant=False)


def stored(out):
    """The settings that a run was begun with; {} where there is none."""
    return read_json(out / "settings.json") if (out / "settings.json").is_file() else {}


def is_done(out, settings, how, **more):
    """Begins a run, or goes on with it; True where it is finished. One of other settings is refused by
    name: --force keeps a finished one as it is and lets another go on. more: what only an unfinished one
    is compared by."""
    # paths as seen from the checkout, which may be moved
    settings = json.loads(json.dumps(settings, default=str).replace(f"{ROOT}/", ""))
    if not finished(out):
        begin(out, settings | more | dict(processes=how.n_ranks), how.force)
        return False
    if not how.force:                                              # what is new since then changes nothing
        begin(out, {name: settings.get(name, x) for name, x in stored(out).items()})
    print(f"{out}: finished")
    return True


def write_network(folder, config, tensors, name="diffusion_pytorch_model.safetensors"):
    save_tensors(folder / name, tensors)
    write_json(folder / "config.json", config)

# ---- stage vae ---------------------------------------------------------------------------------------------

def stage_vae(out, s, how, drawn):
    """Autoencoder: L1 + L2 on pixels and on their differences (edges), and a very small KL term (no
    adversary).

    On crops of 32 pixels: many small pictures teach faster than few large ones at the same cost.
    """
    shards = world_set(drawn, "pairs", s.samples, s.size)
    config = read_json(TINY / "vae" / "config.json")
    torch.manual_seed(s.seed)
    vae = VAE(config)

    def loss_fn(number, generator):
        def random(n):
            return int(torch.randint(n, (1,), generator=generator))
        frames, _ = shards[random(len(shards))]
        rows = torch.randint(len(frames), (s.batch,), generator=generator)
        top, left = (8 * random((side - 32) // 8 + 1) for side in frames.shape[2:4])
        x = frames[rows, torch.arange(s.batch) % 2, top:top + 32, left:left + 32]
        x = as_input(x).to(how.device)
        mean, logvar = vae.encode(x)
        d = vae.decode(mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)) - x
        edges = d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return d.abs().mean() + 2 * d.square().mean() + 0.5 * edges + 1e-4 * kl

    fit(vae, loss_fn, out, s, how)
    # the factor that brings the latents to unit variance goes into the published place, the config
    with torch.no_grad():
        z = torch.cat([vae.encode(as_input(f[:16, 0]).to(how.device))[0].flatten() for f, _ in shards[:20]])
    write_network(out, config | {"scaling_factor": round(1 / z.std().item(), 5)}, vae.state_dict())

# ---- stage clip --------------------------------------------------------------------------------------------

def train_tokenizer(folder, known):
    """CLIP's byte-pair format for the words of the shapes world: every known word becomes one token."""
    bpe = BPETokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level])
    letters = sorted(byte_level.alphabet())
    ends = [letter + "</w>" for letter in letters]      # their order breaks ties; not given, it is by chance
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, show_progress=False, special_tokens=ends,
                                  end_of_word_suffix="</w>", initial_alphabet=letters)
    bpe.train_from_iterator(known, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    words = [*letters, *ends, *("".join(pair) for pair in merges),
             "<|startoftext|>", "<|endoftext|>"]                # the end has the largest id: CLIP pools there
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(dict.fromkeys(words))})
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))


def copy_tokenizer(source, to):
    to.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, to / name)


def contrastive_loss(a, b, scale, texts):
    """Symmetric contrastive loss between rows of a and b (N, P); rows of equal texts (N strings) are all
    correct."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    same = torch.tensor([[float(x == y) for y in texts] for x in texts], device=a.device)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def change(x):
    """Features (2N, P) of N sources, then of their targets -> the way of the normalised ones (N, P), as in
    the scores."""
    source, target = F.normalize(x, dim=-1).chunk(2)
    return target - source


def stage_clip(out, s, how, drawn):
    """CLIP on frames and captions, source and target of a pair in one batch (each is the other's hard
    negative), plus instructions on the direction from source to target, so that the text tower learns the
    words of edits too."""
    config, pixels = (read_json(TINY / "clip" / name) for name in ("config.json", "preprocessor_config.json"))
    shards = square(world_set(drawn, "pairs", s.samples, config["vision_config"]["image_size"]))
    train_tokenizer(out, world.known_words(drawn.pictures))
    tokenizer = Tokenizer(out / "vocab.json", out / "merges.txt")
    config["text_config"]["vocab_size"] = len(tokenizer.vocab)
    torch.manual_seed(s.seed)
    clip = CLIP(config)
    mean, std = (torch.tensor(pixels[k])[:, None, None].to(how.device) for k in ("image_mean", "image_std"))

    def encode_text(texts):
        ids = tokenizer(texts)
        length = int(ids.argmax(dim=1).max()) + 1           # text attention is causal: padding can be cut off
        return clip.encode_text(ids[:, :length].to(how.device))

    def loss_fn(number, generator):
        pairs, (before, after, orders) = random_batch(shards, s.batch, generator)
        x = as_input(pairs.transpose(0, 1).flatten(0, 1)).to(how.device)       # all sources, then all targets
        x = x + 0.02 * torch.randn(len(x), 1, 1, 1, generator=generator).to(x)
        image = clip.encode_image(((x + 1) / 2 - mean) / std)
        scale, moved = clip.logit_scale.exp().clamp(max=100), change(image)
        return (contrastive_loss(image, encode_text(before + after), scale, before + after) +
                0.5 * contrastive_loss(moved, encode_text(orders), scale.clamp(max=20), orders))

    fit(clip, loss_fn, out, s, how)
    write_json(out / "preprocessor_config.json", pixels)
    write_network(out, config, clip.state_dict(), "model.safetensors")

# ---- stage viclip ------------------------------------------------------------------------------------------

def stage_viclip(out, s, how, drawn):
    """ViCLIP on drawn clips with stage clip's loss: captions on clips, source and target of a pair in one
    batch, plus captions' difference and instructions on the direction from source to target, which is what
    ViCLIP_dir asks for.

    Every other step sees stills, which its temporal positions allow (a still takes their mean): they cost an
    eighth and show far more scenes, so there are three times as many in a batch.
    """
    copy_tokenizer(out.parent / "clip", out)
    tokenizer = Tokenizer(out / "vocab.json", out / "merges.txt", pad=0)
    config = read_json(TINY / "viclip" / "config.json") | {"vocab_size": len(tokenizer.vocab)}
    stills = square(world_set(drawn, "pairs", s.samples, config["image_size"]))
    clips = world_set(drawn, "clips", s.clips, config["image_size"])
    torch.manual_seed(s.seed)
    net = ViCLIP(config)
    torch.nn.init.constant_(net.temp, 0.07)                        # the published 0.01 is where training ends
    mean, std = (v[:, None, None].to(how.device) for v in (net.MEAN, net.STD))

    def loss_fn(number, generator):
        if number % 2 == 0:
            pairs, (before, after, orders) = random_batch(stills, 3 * s.batch, generator)
        else:
            pairs, (before, after, orders) = random_batch(clips, s.batch, generator, axis=3)
        x = pairs.transpose(0, 1).reshape(2 * len(pairs), -1, *pairs.shape[-3:])       # (2N, 1 or 8, H, W, 3)
        x = x.to(how.device).permute(0, 1, 4, 2, 3).float() / 255
        x = x + 0.01 * torch.randn(len(x), 1, 1, 1, 1, generator=generator).to(x)
        video = net.encode_video((x - mean) / std)
        texts = net.encode_text(tokenizer(before + after + orders, length=net.context))
        captions, asked = texts.split([len(x), len(orders)])
        scale = 1 / net.temp.clamp(min=0.01)
        moved, slow = change(video), scale.clamp(max=20)
        return (contrastive_loss(video, captions, scale, before + after) +
                0.5 * contrastive_loss(moved, asked, slow, orders) +
                0.5 * contrastive_loss(moved, change(captions), slow, list(zip(before, after))))

    fit(net, loss_fn, out, s, how)
    write_network(out, config, net.state_dict(), "model.safetensors")

# ---- stage image: InstructPix2Pix --------------------------------------------------------------------------

def region_weights(change, strength):
    """Loss weights (N, h, w), mean 1 in every frame: the smaller part of it, changed or kept, counts more.

    change (N, c, h, w): target - source in scaled latents; cells with a mean |change| from 0.5 on count as
    changed. A small object's edit is not lost in the frame, nor an object before a changed background.
    strength 0: all alike. Ours.
    """
    changed = (change.abs().mean(dim=1) / 0.5).clamp(max=1)
    share = changed.mean(dim=(1, 2), keepdim=True)
    weight = 1 + strength * (changed * (1 - share) + (1 - changed) * share)
    return weight / weight.mean(dim=(1, 2), keepdim=True)


def diffuse(z0, eps, abar, scheduler):
    """Scaled latents and noise of one shape -> the noisy latents, and what is predicted of them: epsilon
    or v, as the scheduler's config says. abar broadcasts."""
    z_t = abar.sqrt() * z0 + (1 - abar).sqrt() * eps
    v_prediction = scheduler.get("prediction_type", "epsilon") == "v_prediction"
    return z_t, abar.sqrt() * eps - (1 - abar).sqrt() * z0 if v_prediction else eps


def fresh_editor(out, seed):
    """An untrained image editor in hub layout, of the networks trained before: what stage image starts
    from."""
    of_training = shutil.ignore_patterns("settings.json", "state.*", "log.jsonl")
    for name in ("vae", "clip", "viclip"):
        shutil.copytree(out.parent / name, out / name, ignore=of_training, dirs_exist_ok=True)
    shutil.copytree(TINY / "scheduler", out / "scheduler", dirs_exist_ok=True)
    copy_tokenizer(out / "clip", out / "tokenizer")
    text = {name: x for name, x in read_tensors(out / "clip" / "model.safetensors").items()
            if name.startswith("text_model.")}
    config = read_json(out / "clip" / "config.json")["text_config"]
    write_network(out / "text_encoder", config, text, "model.safetensors")
    config = read_json(TINY / "unet" / "config.json")
    torch.manual_seed(seed)
    unet = UNet({k: v for k, v in config.items() if k not in VideoEditor.VIDEO})
    for name, p in unet.named_parameters():               # every residual branch and the output start at zero
        if name.endswith(("proj_out.weight", "conv_out.weight", "conv2.weight")):
            torch.nn.init.zeros_(p)
    write_network(out / "unet", unet.config, unet.state_dict())


def write_editor(out, config, unet, about):
    """A U-Net, and the page that says what else the editor is made of: the run is finished."""
    write_network(out / "unet", config, unet.state_dict())
    write_json(out / "model_index.json", {"_class_name": "VideoEditor", "instructvedit": about})


def widened(source, to, write=True):
    """Stable Diffusion as InstructPix2Pix starts from it, in folder `to`: its U-Net takes the source's
    latents besides, by weights of zero. `source` itself where that is an editor."""
    unet = part(repository(source), "unet")
    with reading(unet, "is it Stable Diffusion 1.5, or an editor of its kind?"):
        config, (tensors, _) = read_json(unet / "config.json"), find_tensors(unet)
        if config["in_channels"] != config["out_channels"]:
            return source
        first = tensors["conv_in.weight"]
        tensors["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], dim=1)
    if write:
        write_network(to / "unet", config | dict(in_channels=2 * config["in_channels"]), tensors)
        about = {"base": portable(source)}
        write_json(to / "model_index.json", {"_class_name": "VideoEditor", "instructvedit": about})
    return to


def drawn_pairs(ed, s, drawn):
    """take(generator) -> (latents of pairs (N, 2, c, h, w), unscaled, [instruction]) of the drawn world.

    The real domain is left out on purpose: closing that gap is what the refinement rounds are for.
    """
    shards = world_set(drawn, "pairs", s.samples, s.size)
    shards = latents_of(ed, shards, drawn.folder / f"pairs-{s.size}px", ["synthetic"])
    odds = {name: task.trained for name, task in world.TASKS.items()}

    def take(generator):
        pairs, (_, _, orders) = random_batch(shards, s.batch, generator, axis=3, odds=odds)
        return pairs.float(), orders
    return take


def encode_pair(ed, pair, size):
    """The middle squares of a pair's pictures: latents (2, c, h, w), unscaled."""
    squares = []
    for rgb in pair["load"]():
        with reading(f"pair {pair['id']}"):
            need(rgb is not None, "has no edited picture")
        side = min(rgb.shape[:2])
        top, left = ((n - side) // 2 for n in rgb.shape[:2])
        squares.append(resize(to_tensor(rgb[top:top + side, left:left + side]), size, size))
    return ed.encode(torch.stack(squares)[None])[0]


def encoded_pairs(ed, pairs, s, how, data):
    """Latents of image pairs, made once, 500 pairs a file, mapped into memory: [(float16 (2, c, h, w),
    instruction)]. Pictures that do not open are left out, and said."""
    folder, rows = data / f"pairs-{s.size}px-{fingerprint(part(ed.folders, 'vae'))}", []
    chunks = [pairs[i:i + 500] for i in range(0, len(pairs), 500)]
    paths = [folder / f"{curate.ident(*(pair['id'] for pair in some))}.safetensors" for some in chunks]
    for i, (path, some) in enumerate(tqdm(list(zip(paths, chunks)), desc="latents", unit="file")):
        if i % how.n_ranks == how.rank and not path.is_file():
            z, texts = [torch.zeros(0)], []
            for pair in some:
                try:
                    z.append(encode_pair(ed, pair, s.size))
                    texts.append(pair["instruction"])
                except UserError as error:
                    print(f"left out: {error}")
            write_json(path.with_suffix(".json"), texts)
            save_tensors(path, {"z": torch.stack(z[1:]) if texts else z[0]}, torch.float16)
    wait_for_all()
    for path in paths:
        rows += zip(read_tensors(path)["z"], read_json(path.with_suffix(".json"), list))
    return rows


def given_pairs(ed, s, how, data):
    """`drawn_pairs` of people's data sets, s.images_from, each as often as s.shares says."""
    sets = [list(islice(curate.read_pairs(where), s.samples)) for where in s.images_from]
    if s.cache:
        sets = [encoded_pairs(ed, pairs, s, how, data) for pairs in sets]
    for where, rows in zip(s.images_from, sets):
        print(f"{where}: {len(rows)} image pairs")
        if not rows:
            raise UserError(f"--images-from {where}: no image pairs")
    shares = torch.tensor(s.shares or [1.0] * len(sets))
    if len(shares) != len(sets) or not shares.min() >= 0 or not shares.sum() > 0:
        raise UserError(f"--shares {' '.join(map(str, s.shares))}: needs a number for each of {len(sets)} "
                        "--images-from")

    def row(rows, generator):                           # a pair that does not open gives way to another
        while True:
            pair = rows[int(torch.randint(len(rows), (1,), generator=generator))]
            try:
                return pair if s.cache else (encode_pair(ed, pair, s.size).cpu(), pair["instruction"])
            except UserError as error:
                print(f"left out: {error}")

    def take(generator):
        which = torch.multinomial(shares, s.batch, replacement=True, generator=generator).tolist()
        z, orders = zip(*[row(sets[k], generator) for k in which])
        return torch.stack(z).float(), list(orders)
    return take


def stage_image(out, s, how, drawn):
    """InstructPix2Pix on latents: 5 % text, 5 % source, 5 % both dropped; epsilon or v as the scheduler says.

    PAPER: step 1 trains it on UltraEdit's and InstructPix2Pix's pairs together (--images-from A B), from
    Stable Diffusion; `tiny` starts from nothing, on drawn pairs.

    PAPER: the text encoder is CLIP's, frozen. tiny CLIP has seen too little for that: its states hold more of
    a word's neighbours than of the word, so `tiny` trains it along, from stage clip's weights.

    PAPER: IP2P keeps the edited target where it drops the text, so its "no instruction" is an average of all
    edits. In `tiny` a dropped instruction asks for nothing and its target is the source: an empty
    instruction then returns the clip, and text guidance points from unchanged to edited. Errors count by
    `region_weights`.
    """
    if not s.weights:
        fresh_editor(out, s.seed)
    start = out
    if s.weights:
        start = widened(s.weights, out / "start", how.rank == 0)
        wait_for_all()
    ed = VideoEditor.from_pretrained(start, motion=False, device=how.device, dtype="float32")
    take = given_pairs(ed, s, how, drawn.folder.parent) if s.images_from else drawn_pairs(ed, s, drawn)
    unet = ed.unet.requires_grad_(True)
    if s.train_text:                                               # one optimizer, one average for both
        unet.text_encoder = ed.text_encoder.requires_grad_(True)
    abar, scale = noise_levels(ed.scheduler).to(how.device), ed.vae.scaling_factor

    def loss_fn(number, generator):
        pairs, orders = take(generator)
        z_src, z_tgt = pairs.unbind(1)
        drop = torch.rand(len(pairs), generator=generator)
        ctx = ed.encode_text(["" if x < 0.10 else order for x, order in zip(drop, orders)])
        drop = drop[:, None, None, None]
        target = torch.where((drop < 0.05) & (s.no_text == "source"), z_src, z_tgt)
        u = torch.rand(len(pairs), generator=generator) ** s.t_bias
        t = (len(abar) * u).long().clamp(max=len(abar) - 1).to(how.device)      # float32's u may round to 1
        eps = torch.randn(target.shape, generator=generator)
        weight = region_weights((target - z_src) * scale, s.region_weight)
        z_in = z_src * ~((drop >= 0.05) & (drop < 0.15))
        target, eps, z_in, weight = (x.to(how.device) for x in (target, eps, z_in, weight))
        z_t, wanted = diffuse(target * scale, eps, abar[t][:, None, None, None], ed.scheduler)
        predicted = unet(torch.cat([z_t, z_in], dim=1)[:, None], t, ctx)[:, 0].float()
        return ((predicted - wanted).square().mean(dim=1) * weight).mean()      # weight (N, h, w)

    fit(unet, loss_fn, out, s, how)
    about = dict(size=s.size)
    if how.rank > 0:
        return wait_for_all()
    if s.train_text:
        del unet.text_encoder
        config = read_json(part(ed.folders, "text_encoder") / "config.json")
        write_network(out / "text_encoder", config, ed.text_encoder.state_dict(), "model.safetensors")
    if not s.images_from:                                          # how `tiny` samples, and what it knows
        about = read_json(TINY / "model_index.json")["instructvedit"] | about
        about |= dict(words=world.known_words(drawn.pictures), examples=world.examples())
    write_editor(out, unet.config, unet, about | ({"base": portable(s.weights)} if s.weights else {}))
    wait_for_all()

# ---- stage motion, and what it shares with stage video -----------------------------------------------------

def row_of(number, n, seed):
    """Which of n clips training sample `number` is: each of them once an epoch, in a new order every time."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + number // n))
    return int(order[number % n])


def draw_noise(number, s, shape, train_steps=1000):
    """What is random about training sample `number`: u in [0, 1) to choose the dropouts, time step t, eps of
    `shape`.

    From a generator of the sample's own, so that a batch is the same however micro-batches and processes
    share it. s.same_noise: the share of clips whose frames all have one noise; in the rest each frame has its
    own, as in InsV2V and AnimateDiff. A video editor samples from what most of its clips had. PAPER: silent
    on noise over frames. `tiny`'s short rounds did not learn to bring frames of different noise together, so
    its clips have one.
    """
    g = torch.Generator().manual_seed((s.seed + 1) * 1_000_003_000 + number)
    u, v, same = torch.rand(3, generator=g).tolist()
    eps = torch.randn(shape, generator=g)
    t = torch.tensor(int(train_steps * v ** s.t_bias))
    return u, t, eps[:1].expand(shape) if same < s.same_noise else eps


def clip_loss(unet, samples, scheduler, device, guidance=None):
    """Mean error of the prediction over samples (z0, z_src, ctx, t, eps, weight), clips of 16 frames.

    z0, z_src, eps (F, c, h, w), z0 scaled and z_src not; ctx (77, D); t an integer tensor; weight (F, 1, h,
    w) or 1. Clips of one size run as one batch. guidance (s_txt, s_src, states of no text (77, D)): where a
    sample has source and text, the prediction is the guided one of sampling; its other two branches get no
    gradient.
    """
    abar = noise_levels(scheduler).to(device)
    total = 0
    for shape in dict.fromkeys(sample[0].shape for sample in samples):
        alike = [sample for sample in samples if sample[0].shape == shape]
        z0, z_src, ctx, t, eps, weight = (torch.stack(x).to(device) for x in zip(*alike))
        z_t, wanted = diffuse(z0, eps, abar[t][:, None, None, None, None], scheduler)      # (B, F, c, h, w)
        x, scale, others = torch.cat([z_t, z_src], dim=2), 1, 0
        if guidance:                                           # VideoEditor.guided, where there is everything
            s_txt, s_src, no_text = guidance
            no_text = no_text.to(device).expand_as(ctx)
            full = (z_src.flatten(1).any(dim=1) & (ctx != no_text).flatten(1).any(dim=1)).view(-1, 1, 1, 1, 1)
            scale = torch.where(full, s_txt, 1)
            with torch.no_grad():
                for share, y in ((s_src - s_txt, x), (1 - s_src, torch.cat([z_t, 0 * z_src], dim=2))):
                    others = others + (share * full * unet(y, t, no_text).float() if share else 0)
        predicted = scale * unet(x, t, ctx).float() + others
        total = total + ((predicted - wanted).square() * weight).mean(dim=(1, 2, 3, 4)).sum()
    return total / len(samples)


def stage_motion(out, s, how, drawn):
    """The motion prior: fresh motion modules in the frozen image editor, on unedited clips (as AnimateDiff
    was made).

    The editor's own dropouts are the conditions under which it makes unedited pictures: three clips in four
    without source and text, where the frames' likeness has to come from the motion modules; the rest with
    their source and no text, where the editor returns the source, so that the modules learn to leave alone
    what is certain already. gamma stays 1 here; each module's last layer starts at 0, so that training starts
    from the image editor.
    """
    weights = s.weights or out.parent / "image"
    ed = VideoEditor.from_pretrained(weights, motion=False, device=how.device, dtype="float32")
    if how.rank > 0:                                               # the first draws, the others find it there
        wait_for_all()
    shards = world_set(drawn, "motion", s.samples, s.size)
    shards = latents_of(ed, shards, drawn.folder / f"motion-{s.size}px")
    if how.rank == 0:
        wait_for_all()
    clips = [clip for z, _ in shards for clip in z][:s.samples]
    torch.manual_seed(s.seed)
    unet, still = ed.unet, ed.unet.config
    unet.add_motion(dict(                                       # like v1-5-3; the rest follows from the U-Net
        _class_name="MotionAdapter", motion_max_seq_length=32, use_motion_mid_block=False,
        block_out_channels=still["block_out_channels"], motion_layers_per_block=still["layers_per_block"],
        motion_norm_num_groups=still["norm_num_groups"],
        motion_num_attention_heads=still["attention_head_dim"]), gamma=1.0)
    for name, p in unet.named_parameters():
        p.requires_grad_("motion_modules" in name and not name.endswith(".gamma"))
        if "motion_modules" in name and ".proj_out." in name:
            torch.nn.init.zeros_(p)
    no_text, one = ed.encode_text([""])[0].cpu(), torch.ones(1, 1, 1, 1)
    train_steps = len(noise_levels(ed.scheduler))

    def sample(k):
        z = clips[row_of(k, len(clips), s.seed)].float()
        u, t, eps = draw_noise(k, s, z.shape, train_steps)
        return z * ed.vae.scaling_factor, z * (u < 0.25), no_text, t, eps, one

    gammas = [p for name, p in ed.unet.named_parameters() if name.endswith(".gamma")]

    def loss_fn(number, generator):
        for gamma in gammas:                            # SMA injects motion; below 0 it would take it away
            gamma.data.clamp_(min=GAMMA)
        samples = [sample(k) for k in range(number * s.batch, (number + 1) * s.batch)]
        return clip_loss(unet, samples, ed.scheduler, how.device)

    fit(unet, loss_fn, out, s, how)
    if how.rank == 0:
        write_network(out, unet.motion_config, {name: x for name, x in unet.state_dict().items()
                                                if "motion_modules" in name and not name.endswith(".gamma")})
    wait_for_all()                                                 # the others read it next

# ---- stage video: a round of the video editor on curated triples -------------------------------------------

def read_clips(folders, channels):
    """Kept triples of curated folders as [(latents file, instruction)]; says how many. Only headers are
    read here; a clip's latents are read when it is its turn."""
    clips = []
    for folder in map(Path, folders):
        kept = curate.read_rows(folder, kept=True)
        print(f"{folder}: {len(kept)} clips")
        for row in kept:
            path = folder / row["id"] / "latents.safetensors"
            z = read_tensors(path)
            with reading(path, f"training needs source and target ({N_FRAMES}, {channels}, h, w)"):
                a, b = tuple(z["source"].shape), tuple(z["target"].shape)
                need(a == b and len(a) == 4 and a[:2] == (N_FRAMES, channels), f"holds {a} and {b}")
            clips.append((path, row["instruction"]))
    return clips


GAMMA = 5e-4            # SMA's start: the image editor within 0.1 %; at 0 the motion modules get no gradient


def video_editor(s, how):
    """The video editor a round starts from, what is trained in it chosen: the image editor s.weights plus
    the motion adapter, gamma near 0 (it then is the image editor, nearly) and untrained EPM; or a round as it
    is, to go on from it."""
    before = stored(Path(s.weights))
    is_round = "sma" in before
    for flag in ("sma", "epm"):
        if is_round and before[flag] != getattr(s, flag):
            raise UserError(f"--{flag}, --no-{flag}: {s.weights} was trained with {flag} {before[flag]}")
    torch.manual_seed(s.seed)
    motion = None if is_round else s.motion
    ed = VideoEditor.from_pretrained(s.weights, motion=motion, device=how.device, dtype="float32")
    if not is_round:
        ed.unet.set_gamma(GAMMA if s.sma else 1.0)
        if s.epm:
            ed.unet.add_epm(s.epm_sites)
    for name, p in ed.unet.to(ed.device).named_parameters():
        own = "motion_modules" in name or ".epm." in name
        p.requires_grad_(s.sma if name.endswith(".gamma") else own or s.trainable == "all")
    for m in ed.unet.modules():
        if isinstance(m, EPM) and s.joint:
            apart = (1 - torch.eye(m.frames)).flatten()
            m.requires_grad_(False).fc2.bias.copy_(-EPM.START / EPM.GAIN * apart)
    return ed


def watch(unet):
    """probe() -> fields for the log: gamma of every motion module; EPM's mean bias of every site over the
    last batch, other frames less the own; and the mean over sites as a matrix, rows the frames that listen
    (Figure 5)."""
    sites = {name.removesuffix(".epm"): m for name, m in unet.named_modules() if isinstance(m, EPM)}
    own = torch.eye(N_FRAMES, dtype=torch.bool)

    def keep(m, x, bias):
        m.seen = bias.detach()
    for m in sites.values():
        m.register_forward_hook(keep)

    def probe():
        row = dict(gamma={name.removesuffix(".gamma"): round(p.mean().item(), 5)
                          for name, p in unet.named_parameters() if name.endswith(".gamma")})
        if sites:
            seen = {name: m.seen.float().mean(0).cpu() for name, m in sites.items()}
            row["epm"] = {name: (x[~own].mean() - x[own].mean()).item() for name, x in seen.items()}
            row["epm_matrix"] = torch.stack(list(seen.values())).mean(0).tolist()
        return row
    return probe


def editor_mark(source):
    """Tells an editor's weights from another's."""
    return fingerprint(part(repository(source), "unet"))


def stage_video(out, s, how, curation):
    """One round: the video editor on triples of 16 frames, three dropouts of 5 %, epsilon or v as the
    scheduler says.

    PAPER: the rounds' schedule and what is trained in them are not given. Default here: motion modules, gamma
    and EPM (--trainable all: everything). Dropped instructions follow the image editor the round starts from,
    see ROUND. Targets are samples made with guidance: a model that has learnt them is guided twice when it
    samples, and a little more in every round. --guided-loss compares the guided prediction instead, so that
    what it learns is what it makes.
    """
    clips = []
    if not finished(out):
        vae = read_json(part(repository(s.weights), "vae") / "config.json")
        clips = read_clips(s.train_on, vae["latent_channels"])[:s.samples]
    adapter = fingerprint(s.motion) if Path(s.motion).exists() else s.motion
    settings = asdict(s) | curation | dict(editor=editor_mark(s.weights), adapter=adapter)
    if is_done(out, settings, how, clips=len(clips)):
        return
    ed = video_editor(s, how)
    with torch.no_grad():
        states = {text: ed.encode_text([text])[0].half().cpu() for text in {"", *(text for _, text in clips)}}
    scale, train_steps = ed.vae.scaling_factor, len(noise_levels(ed.scheduler))
    guidance = (*ed.guidance, states[""].float()) if s.guided_loss else None

    def sample(k):
        path, text = clips[row_of(k, len(clips), s.seed)]
        z = load_file(path)
        z_src, z_tgt = z["source"].float(), z["target"].float()    # (F, c, h, w)
        u, t, eps = draw_noise(k, s, z_src.shape, train_steps)
        no_text, no_src = u < 0.10, 0.05 <= u < 0.15               # text alone, both, source alone: 5 % each
        z_tgt = z_src if u < 0.05 and s.no_text == "source" else z_tgt
        weight = region_weights((z_tgt - z_src) * scale, s.region_weight)[:, None]         # (F, 1, h, w)
        return z_tgt * scale, z_src * (not no_src), states["" if no_text else text].float(), t, eps, weight

    def loss_fn(number, generator):
        samples = [sample(k) for k in range(number * s.batch, (number + 1) * s.batch)]
        return clip_loss(ed.unet, samples, ed.scheduler, how.device, guidance)

    fit(ed.unet, loss_fn, out, s, how, watch(ed.unet))
    if how.rank == 0:
        config = ed.unet.config | dict(motion=ed.unet.motion_config, same_noise=s.same_noise > 0.5)
        if s.epm:
            config["epm"] = ed.unet.epm_config
        write_editor(out, config, ed.unet, dict(base=ed.base))
    wait_for_all()

# ---- the rounds --------------------------------------------------------------------------------------------

def curation_steps(task, s, n):
    """What a round's clips are curated by: [(curate.py's step, its folder, its settings)], one after the
    other.

    Round 0 (stage I): triples synthesised from images by the image editor and FFG-V2V. Rounds 1, 2, ...
    (stages II, III): real clips edited by the previous round's model.
    """
    data = str(task.data)
    images, clips, cut, written = f"{data}/images", f"{data}/clips", f"{data}/cut{n}", f"{data}/write{n}"
    if n == 0:
        editor = dict(weights=s.weights, images=images, clips=clips, motion=s.motion)
        return [step(task, "images", images, weights=s.weights, n=task.images,
                     source=(task.images_from or ["shapes"])[0]),
                step(task, "clips", clips, images=images), step(task, "videos", f"{data}/round0", **editor)]
    before = str(task.runs / f"round{n - 1}")
    scorers = [folder / "clip" for folder in repository(s.weights) if (folder / "clip").is_dir()]
    clip = dict(clip=str(scorers[0])) if scorers else {}
    return [step(task, "cut", cut, source=task.real_from or "shapes", n=task.real_clips),
            step(task, "write", written, clips=cut, **clip),
            step(task, "real", f"{data}/round{n}", weights=before, source=written, round=n)]


def step(task, name, to, **own):
    """A step with this model's settings, those in --curate-<name>, and what the round says."""
    settings = curate.STEPS[name][0](**CURATE[task.model].get(name, {}))
    flags = getattr(task, f"curate_{name}")
    parser = Parser(add_help=False)
    add_flags(parser, settings)
    try:
        settings = from_flags(settings, parser.parse_args(shlex.split(flags)))
    except (UserError, ValueError) as error:
        raise UserError(f"--curate-{name}={flags}: {error}") from None
    return name, Path(to), replace(settings, **own)


def curate_all(steps, how):
    """Under torchrun every process does its share of a step, then waits for the others."""
    dtype = {True: "bfloat16", False: "float32"}.get(how.bf16)
    for name, to, settings in steps:
        curate.STEPS[name][1](to, settings, curate.How(device=how.device, dtype=dtype, force=how.force))
        wait_for_all()


def round_folders(task, n):
    """What round n trains on, as in the paper's Table 4: 0 on the synthetic triples, 1 on those and its
    own, later ones on their own alone (Stage III with a dagger), with --mix on the synthetic ones as well."""
    return tuple(str(task.data / f"round{k}") for k in dict.fromkeys([0, n] if n < 2 or task.mix else [n]))


def refine(task, s, how):
    """--round N: every round up to N that is not finished: curate what it needs, then train on it. What is
    there is skipped or resumed. Finished rounds come first: flags that one was not made with are refused
    before any work.

    PAPER: silent on where a round's training starts; Table 4 counts each stage's clips as a whole set (9k +
    3.4k, 9k + 5k, 5k). So every round trains from the image editor: a model that goes on from the one that
    made its targets drifts a bit further in every round.
    """
    runs = [task.runs / f"round{n}" for n in range(task.round + 1)]
    for out in sorted(runs, key=finished, reverse=True):
        n = runs.index(out)
        steps = [] if s.train_on else curation_steps(task, s, n)
        curation = {f"{name} {k}": v for name, _, settings in steps for k, v in asdict(settings).items()}
        if not finished(out):
            networks(task, s, how)
            print(f"{out}: curating, then training")
            curate_all(steps, how)
        stage_video(out, replace(s, train_on=s.train_on or round_folders(task, n)), how, curation)

# ---- stage writer: LLaVA-OneVision learns to write instructions like those of image-editing data -----------

def writer_pairs(folder, most):
    """[(pair of curate.read_pairs, answer)] of the pairs whose texts the writer's own check accepts; says
    how many."""
    found, pairs = list(islice(curate.read_pairs(folder), most)), []
    for pair in found:
        task = pair["task"] if pair["task"] in WRITER_TASKS else guess_task(pair["instruction"])
        answer, _ = parse_answer(json.dumps({k: pair[k] for k in FIELDS} | {"task": task}), task)
        pairs += [(pair, answer)] if answer else []
    left = f"{len(found) - len(pairs)} without an instruction and two different captions of 2 to 60 words"
    if not pairs:
        raise UserError(f"--pairs-from {folder}: no image pairs; left out: {left}")
    print(f"{folder}: {len(pairs)} image pairs; left out: {left}")
    return pairs


def stage_writer(out, s, how):
    """LoRA on every matrix of the decoder: source image -> task, instruction, both captions (section 3.3).

    PAPER: says only that the model was fine-tuned on image-editing data. Here an image is shown as a clip of
    one frame: the form in which the writer then meets real clips, at 197 tokens instead of up to 7,290. `fit`
    sees the trained matrices alone, so that its checkpoints are small. Writes <out>/writer.safetensors for
    `curate.py write --lora`.
    """
    if not s.pairs_from:
        raise UserError("train.py writer: needs --pairs-from, a folder or file of image pairs")
    pairs = [] if finished(out) else writer_pairs(s.pairs_from, s.samples)
    if is_done(out, asdict(s), how, found=len(pairs)):
        return
    net = LlavaOneVision.from_pretrained(s.llava, device=how.device)
    torch.manual_seed(s.seed)
    # "." may not stand in a parameter's name
    lora = torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in add_lora(net, s.rank).items()})

    def sample(k):                                         # an image that does not open gives way to the next
        for at in range(k, k + len(pairs)):
            pair, answer = pairs[row_of(at, len(pairs), s.seed)]
            try:
                return pair["load"]()[0][None], answer
            except UserError as error:
                print(f"left out: {error}")
        raise UserError(f"--pairs-from {s.pairs_from}: none of {len(pairs)} images can be read")

    def loss_fn(number, generator):
        images, answers = zip(*[sample(k) for k in range(number * s.batch, (number + 1) * s.batch)])
        return writer_loss(net, list(images), list(answers))

    fit(lora, loss_fn, out, s, how)
    if how.rank == 0:
        save_lora(net, out / "writer.safetensors")
        write_json(out / "config.json", dict(llava=s.llava, rank=s.rank))
        print(f"{out / 'writer.safetensors'}: for --lora of curate.py write --writer llava --llava {s.llava}")
    wait_for_all()

# ---- measured where the truth is known: after training, and the paper's tables -----------------------------

def report(source, how, n, n_frames):
    """The closing table of a run: the bare frames of held-out drawn scenes against their true edit."""
    ed = VideoEditor.from_pretrained(source, device=how.device)
    if ed.words:
        return print_bare(ed, n, ["synthetic"], n_frames, {})
    print(f"{source}: score it on real clips with `python metrics.py tgve DIR --weights {source}`")


@dataclass
class Row:
    """Of a table: a round trained with every seed on some folders; or, without settings, an untrained
    editor."""
    name: str
    settings: Round | None
    folders: tuple = ()
    mode: str = "video"


def table_rows(command, task, s, how):
    """Equal steps in every row, and in table 2 equally many clips."""
    if command == "table2":                                        # other data of the same sources
        (_, images, image), _, (_, _, video) = curation_steps(task, s, 0)
        every, first = images.with_name("images-unfiltered"), dict(filter=False, candidates=1)
        rows = {"trajectory-guided, filtered": "round0", "trajectory-guided, unfiltered": "round0-unfiltered",
                "per frame, filtered": "round0-per-frame"}
        curate_all([("images", every, replace(image, **first)),
                    ("videos", task.data / "round0-unfiltered", replace(video, images=str(every), **first)),
                    ("videos", task.data / "round0-per-frame", replace(video, mode="image"))], how)
        least = min(len(curate.read_rows(task.data / folder, kept=True)) for folder in rows.values())
        return [Row(name, replace(s, samples=least), (folder,)) for name, folder in rows.items()]
    if command == "table3":
        joint = Row("SMA, joint attention", replace(s, joint=True), ("round0",))   # with no bias to learn
        return [Row(f"{'' if sma else 'no '}SMA, {'' if epm else 'no '}EPM", replace(s, sma=sma, epm=epm),
                    ("round0",)) for sma in (False, True) for epm in (False, True)] + [joint]
    return [Row("image editor, frame by frame", None, mode="image"),           # the paper's stages I to III
            Row("image editor, FFG-V2V", None, mode="ffg"),
            Row("round 0", s, ("round0",)), Row("round 1", s, ("round0", "round1")),
            Row("round 2, with synthetic data", s, ("round0", "round2")),
            Row("round 2, real only", s, ("round2",))]


def measured(out, row, domain, s, how, n):
    """`drawn_scores` of a row's run; what stands in `out` is not measured again."""
    source, motion = (out, None) if row.settings else (s.weights, s.motion if row.mode == "ffg" else False)
    file = out / f"{domain}-{n}-{editor_mark(source)}.json"
    if how.rank == 0 and not file.is_file():
        ed = VideoEditor.from_pretrained(source, motion=motion, device=how.device)
        write_json(file, drawn_scores(ed, n, domain, N_FRAMES, row.mode))
    wait_for_all()
    return read_json(file, list)


def table(command, task, s, how):
    """Train every row of a table with --seeds seeds and measure it on held-out clips of 16 frames, both
    domains.

    Every seed edits the same clips, so intervals are over clips, each with all of its seeds; differences to
    the first row are taken clip by clip.
    """
    columns, lines, first = ("success", "truth_gain", "flicker"), [], {}
    for row in table_rows(command, task, s, how):
        name = row.name.replace(",", "").replace(" ", "-")
        outs = [task.runs / command / f"{name}-{seed}" for seed in range(task.seeds if row.settings else 1)]
        for seed, out in enumerate(outs if row.settings else []):
            folders = tuple(str(task.data / folder) for folder in row.folders)
            stage_video(out, replace(row.settings, seed=seed, train_on=folders), how, {})
        for domain in ("synthetic", "real"):
            clips = [clip for out in outs for clip in measured(out, row, domain, s, how, task.n)]
            ids = [clip["id"] for clip in clips]
            base = first.setdefault(domain, clips)
            more = [{k: clip[k] - np.mean([x[k] for x in base if x["id"] == clip["id"]]) for k in columns}
                    for clip in clips]
            lines += [table_row(f"{row.name}, {domain} [95 %]", clips, columns, ids),
                      table_row("− first row", more, columns, ids, "+")]
    if how.rank == 0:
        print(table_head(f"{command}, clips of {N_FRAMES} frames", columns), *lines, sep="\n", flush=True)

# ---- a round as a picture, a run as one folder -------------------------------------------------------------

def plot(run, size=300):
    """run/training.png from its log: gamma, modules down and steps to the right (Figure 4e); EPM's bias,
    sites down; what its mean gives as attention at the end, rows listen (Figure 5)."""
    with reading(run / "log.jsonl", "pass --round N, or --out with the folder of a round"):
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        panels = {"gamma": np.transpose([list(row["gamma"].values()) for row in rows])}
        if "epm" in rows[0]:
            panels["epm"] = np.transpose([list(row["epm"].values()) for row in rows])
            panels["attention"] = torch.tensor(rows[-1]["epm_matrix"]).softmax(dim=1).numpy()
    picture = Picture.new("L", (len(panels) * size, size))
    for i, (name, x) in enumerate(panels.items()):
        low, high = x.min(), x.max()
        grey = Picture.fromarray((255 * (x - low) / max(high - low, 1e-9)).astype(np.uint8))
        picture.paste(grey.resize((size, size), Picture.Resampling.NEAREST), (i * size, 0))
        print(f"{name}: black {low:.4f}, white {high:.4f}, after {rows[-1]['step']} steps")
    picture.save(run / "training.png")
    print(run / "training.png")


def export(source, to):
    """An editor as one folder in hub layout, float16, what it is made of from its own folder, its base's,
    and so on: what `--model tiny` loads."""
    if not finished(source):
        raise UserError(f"{source}: no finished run there to export; train it first")
    folders, about = repository(source), {}
    for folder in reversed(folders):                               # a run's own words come before its base's
        if (folder / "model_index.json").is_file():
            about |= read_json(folder / "model_index.json").get("instructvedit", {})
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "clip", "viclip"):
        for path in next((sorted((x / name).iterdir()) for x in folders if (x / name).is_dir()), []):
            if path.suffix == ".safetensors":
                save_tensors(to / name / path.name, read_tensors(path), torch.float16)
            else:
                (to / name).mkdir(parents=True, exist_ok=True)
                with aside(to / name / path.name) as half:
                    shutil.copyfile(path, half)
    about.pop("base", None)
    write_json(to / "model_index.json", {"_class_name": "VideoEditor", "instructvedit": about})
    print(f"{to}: {sum(path.stat().st_size for path in to.rglob('*') if path.is_file()) / 1e6:.1f} MB")

# ---- commands ----------------------------------------------------------------------------------------------

# the networks of `tiny`: how one is trained, its settings, what must be there before
NETWORKS = {"vae": (stage_vae, Vae(steps=2500, lr=2e-3, batch=64, ema=0.995), []),
            "clip": (stage_clip, Clip(batch=48, samples=60_000, ema=0.995), []),
            "viclip": (stage_viclip, Viclip(steps=1500, batch=16, samples=60_000, ema=0.995), ["clip"]),
            "image": (stage_image, IMAGE["tiny"], ["vae", "clip", "viclip"]),
            "motion": (stage_motion, Motion(steps=600, samples=2000), ["image"])}


def train_network(name, s, how, task):
    """One of NETWORKS, where it is not finished: on the data drawn by this world, from the networks that
    it needs. They take minutes, so one process is enough, but for motion modules."""
    (stage, _, needs), weights = NETWORKS[name], getattr(s, "weights", "")
    given, out = getattr(s, "images_from", ()), task.out or task.runs / name
    drawn = drawn_data(task.data, task.photos, task.cutouts)
    origin = {} if given else dict(world=drawn.folder.name)
    origin |= dict(editor=editor_mark(weights)) if weights else {}
    if name != "motion" and not given:
        if how.rank > 0:
            return
        how = replace(how, n_ranks=1)
    for other in needs if not weights else []:
        if not finished(task.runs / other):
            raise UserError(f"{task.runs / other}: not finished; run `python train.py {other}` first")
        origin[other] = fingerprint(*sorted((task.runs / other).rglob("*.safetensors")))
    if not is_done(out, asdict(s) | origin, how):
        stage(out, s, how, drawn)


def networks(task, s, how):
    """What a round, or an image editor without one, needs and is not there: with default settings. Whoever
    wants others trains it by its own command before."""
    for name, (_, own, _) in NETWORKS.items():
        wanted = s.weights == str(task.runs / "image")
        if name == "motion":
            wanted = task.round is not None and s.motion == str(task.runs / name)
            own = replace(own, weights=s.weights)
        if wanted and not finished(task.runs / name):
            train_network(name, own, how, task)
        wait_for_all()


def check_sd15(command, task, s):
    """Refuse what --model sd15 cannot do, before hours of work."""
    if command in ("vae", "clip", "viclip"):
        raise UserError(f"train.py {command} --model sd15: is published; only tiny's is trained here")
    if command.startswith("table"):
        raise UserError(f"train.py {command} --model sd15: its rows are measured on drawn clips, which sd15 "
                        "does not know; train them with `train.py video`, score them with `metrics.py tgve`")
    needed = ["images_from"] if command in ("", "image") else []
    if not command:
        needed = [] if s.train_on else ["images_from", "real_from"][:1 + task.round]
    for name in needed:
        if not getattr(task, name):
            raise UserError(f"--model sd15: pass --{name.replace('_', '-')}, as --help says")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    stages = {name: settings for name, (_, settings, _) in NETWORKS.items()} | {"writer": WRITER}
    others = "video", "table2", "table3", "table4", "plot", "export"
    command = argv[0] if argv and argv[0] in (*stages, *others) else ""
    p = Parser(prog=f"train.py {command}", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--device", type=known_device, default="cuda" if torch.cuda.is_available() else "cpu")
    for settings in (stages.get(command, ROUND["tiny"]), Task(), How()):
        add_flags(p, settings)
    args = p.parse_args(argv[1:] if command else argv)

    task = from_flags(TASK[getattr(args, "model", "tiny")], args)
    task.data, task.runs = task.data or ROOT / "data" / task.model, task.runs or ROOT / "runs" / task.model
    rank, n_ranks = join_processes(args.device)
    how = replace(from_flags(How(), args), device=args.device, rank=rank, n_ranks=n_ranks)
    stages["image"] = replace(IMAGE[task.model], images_from=task.images_from)
    s = stages.get(command, ROUND[task.model])          # n_ranks processes share a step
    s = from_flags(replace(s, accumulate=max(1, s.accumulate // n_ranks)), args)
    if task.model == "sd15" and (command or task.round is not None):
        check_sd15(command, task, s)
    if isinstance(s, Round):                                       # what round 0 starts from
        s.weights = s.weights or str(task.runs / "image")
        s.motion = s.motion or str(task.runs / "motion")
    is_round = task.round is not None or command == "video"
    name = f"round{task.round or 0}" if is_round else command if command in stages else "image"
    out = task.out or task.runs / name

    if command in NETWORKS:
        train_network(command, s, how, task)
    elif command == "writer":
        stage_writer(out, s, how)
    elif command == "video":
        stage_video(out, replace(s, train_on=s.train_on or round_folders(task, task.round or 0)), how, {})
    elif command == "plot":
        plot(out)
    elif command == "export":
        export(out, task.to)
    elif command:
        table(command, task, s, how)
    elif is_round:
        refine(task, s, how)
    else:
        networks(task, s, how)
    if task.n and command in ("", "image") and rank == 0:
        report(out, how, task.n, N_FRAMES if is_round else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
