"""Train every network of this repository: one straight loop, one loss a stage, one file.

    python train.py               the networks of `tiny` from nothing: vae, clip, viclip, image
    python train.py --round 2     bring the model up to refinement round 2: networks, motion modules, curation, training
    python train.py STAGE ...     one stage, with flags of its own (python train.py STAGE --help):
        vae         the autoencoder of `tiny`, on scenes drawn by code
        clip        tiny CLIP on frames and captions; its text tower then is the editor's text encoder
        viclip      tiny ViCLIP on drawn clips, a scorer
        image       the InstructPix2Pix-style image editor, on (source, instruction, target)
        motion      motion modules on unedited clips: what AnimateDiff's weights are for `sd15`
        video       one round of the video editor, on curated triples: data/<model>/round<N>
        writer      LoRA for the language model that writes instructions, on image pairs
    python train.py table2|table3|table4     the paper's ablations, measured where the true edit is known
    python train.py plot|export --round N    a round's gamma and EPM as a picture; a run as one folder in float16

Contents: settings, the drawn data, the loop, a section a stage, the rounds, tables, plot, export, commands.
A run lies in runs/<model>/<stage>: settings.json (what made it), log.jsonl, state.pt (to resume), and when it is
finished its networks in hub layout, model_index.json or config.json last. Under torchrun the stages motion, video
and writer share their batch among the processes.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
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
from PIL import ImageDraw
from safetensors.torch import load_file
from tokenizers import Tokenizer as BPETokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import curate
import world
from metrics import CLIP, ViCLIP, drawn_scores
from model import (EPM, N_FRAMES, ROOT, SD15_MOTION, VAE, MotionModule, ResnetBlock, Tokenizer, Transformer, UNet,
                   UserError, VideoEditor, aside, begin, fingerprint, finished, need, noise_levels, part, portable,
                   read_json, read_tensors, reading, repository, run, save_tensors, write_json, write_text)
from sample import Parser, add_flags, between, from_flags, known_device, option
from teachers import (FIELDS, LLAVA, WRITER_TASKS, LlavaOneVision, add_lora, guess_task, parse_answer, save_lora,
                      writer_loss)

TINY = ROOT / "assets" / "tiny"         # its config.json files give the sizes of the networks trained from nothing

# ---- settings: a dataclass a stage; its fields are the flags and what a run's settings.json remembers ----------

@dataclass
class Training:
    """What `fit` needs of every stage."""
    steps: int = option(1000, "of the optimizer", low=1)
    lr: float = option(1e-3, "peak learning rate", low=1e-12)
    batch: int = option(4, "pairs or clips in a micro-batch of one process", low=1)
    accumulate: int = option(1, "micro-batches in a step of one process", low=1)
    seed: int = option(0, "of initialisation, noise and the order of the data")
    lr_new: float = 0.0                 # of EPM; gamma's is ten times that
    optimizer: str = "adamw"
    warmup: int = 200                   # steps until the peak; 0: a tenth of all, 200 at most
    ema: float = 0.999


@dataclass
class Vae(Training):
    pairs: int = option(120_000, "drawn frames, source and target of an edit", low=1)
    size: int = option(64, "short side of the frames, pixels, a multiple of 32", low=32)


@dataclass
class Clip(Training):
    pairs: int = option(60_000, "drawn frames, source and target of an edit", low=1)


@dataclass
class Viclip(Training):
    pairs: int = option(60_000, "drawn frames, source and target of an edit", low=1)
    clips: int = option(3000, "drawn clips, source and target of an edit", low=1)


@dataclass
class Image(Training):
    pairs: int = option(120_000, "drawn frames, source and target of an edit", low=1)
    size: int = option(64, "short side of the frames, pixels, a multiple of 32", low=32)
    weights: str = option("", "an editor to go on from, with a new schedule (default: from nothing)")
    optimizer: str = option("muon", "for matrices inside the network; AdamW has the rest", choices=["muon", "adamw"])
    t_bias: float = option(0.5, "time steps are T * u ** bias: 1 uniform, below 1 more noise", low=1e-6)
    region_weight: float = option(3.0, "extra loss weight of the smaller part of a frame, changed or kept", low=0)


@dataclass
class Motion(Training):
    clips: int = option(2000, "drawn clips", low=1)
    size: int = option(64, "side of the frames, pixels, a multiple of 32", low=32)
    weights: str = option("", "image editor to train in (default: runs/<model>/image)")
    same_noise: float = option(0.5, "share of clips whose frames have one noise", low=0, high=1)
    t_bias: float = option(0.5, "time steps are T * u ** bias: 1 uniform, below 1 more noise", low=1e-6)


@dataclass
class Round(Training):
    """A round of the video editor."""
    lr_new: float = option(3e-4, "peak learning rate of EPM; gamma's is ten times that", low=1e-12)
    weights: str = option("", "image editor to start from (default: runs/tiny/image, or sd15); for stage video also "
                              "a round, to go on from it")
    motion: str = option("", "motion adapter (default: runs/tiny/motion, or AnimateDiff's)")
    train_on: tuple[str, ...] = option((), "curated folders (default: the round's own)")
    max_clips: int = option(-1, "train on the first so many clips (-1: all)", low=1)
    trainable: str = option("temporal", "motion modules, or the whole U-Net; gamma and EPM always",
                            choices=["temporal", "all"])
    sma: bool = option(True, "gamma is trained, from 0; else it stays at 1")
    epm: bool = option(True, "editing-guided propagation")
    epm_sites: str = option("all", "EPM at which self-attention sites", choices=["all", "inner"])
    epm_start: float = option(-2.0, "EPM's bias between frames before training")
    same_noise: float = option(1.0, "share of clips whose frames have one noise", low=0, high=1)
    t_bias: float = option(0.5, "time steps are T * u ** bias: 1 uniform, below 1 more noise", low=1e-6)
    region_weight: float = option(3.0, "extra loss weight of the smaller part of a frame, changed or kept", low=0)
    no_text: str = option("source", "target where the instruction is dropped", choices=["source", "edit"])
    guided_loss: bool = option(True, "the loss is that of the guided prediction, as sampling makes it")


@dataclass
class Writer(Training):
    pairs_from: str = option("", "image pairs, as curate.py images --from")
    pairs: int = option(120_000, "the first so many of them", low=1)
    llava: str = option(LLAVA, "hub id or directory of the language model")
    rank: int = option(16, "of LoRA's matrices", low=1)


@dataclass
class Rounds:
    """What the rounds' data is curated from."""
    images_from: str = option("shapes", "round 0: source images, as curate.py images --from")
    images: int = option(240, "round 0: how many of them", low=1)
    real_from: str = option("shapes", "rounds 1, 2: real clips, as curate.py cut --from")
    real_clips: int = option(120, "rounds 1, 2: how many of them; of a folder how many videos", low=1)
    mix: bool = option(False, "from round 2 on the synthetic triples of round 0 as well")


@dataclass
class Measure:
    """How editors are measured, on held-out scenes whose true edit is known."""
    n: int = option(24, "edits per task, after training and in tables (0: none)", low=0)
    seeds: int = option(3, "tables: training seeds of every row", low=1)
    sampling_steps: int | None = option(None, "of every edit (default: the checkpoint's own)", low=1)
    text_cfg: float | None = option(None, "text guidance (default: the checkpoint's own)")
    source_cfg: float | None = option(None, "source guidance (default: the checkpoint's own)")


@dataclass
class How:
    """What changes no result, or hardly, and is stored nowhere."""
    device: str = "cpu"
    bf16: bool | None = option(None, "networks run in bfloat16, weights stay in float32; default on CUDA only")
    checkpointing: bool = option(False, "recompute activations in the backward pass: slower, less memory")
    save_minutes: float = option(5.0, "between checkpoints", low=0)
    force: bool = option(False, "go on with a run although its settings changed; keep a finished one as it is")


# 1e-5 is InsV2V's learning rate; the rest of sd15's is our guess until someone has the GPU hours: 2,000 steps are
# 3 to 6 passes over the paper's clips. `tiny` is trained from nothing and its empty instruction returns the source, see
# `stage_image`; IP2P's is an average of all edits, which its guidance scales count on.
ROUND = {"tiny": Round(steps=60, lr=2e-4, warmup=0),
         "sd15": Round(steps=2000, lr=1e-5, lr_new=1e-4, batch=1, accumulate=16, warmup=0, same_noise=0.0, t_bias=1.0,
                       region_weight=0.0, no_text="edit", guided_loss=False, epm_start=-10.0)}
# what the rounds' curation has other than curate.py by itself: five sampling steps edit as well as twenty for `tiny`,
# and of clips that differ in guidance alone there is nothing to choose
CURATE = {"tiny": dict(images=dict(candidates=6, steps=5), videos=dict(candidates=1),
                       real=dict(candidates=2, steps=5)), "sd15": {}}

# ---- the drawn data: files drawn once, shared by all stages ----------------------------------------------------

DOMAINS = ["synthetic"] * 4 + ["real"]


def draw_pairs(index, n, size):
    """n pairs of one file: [(uint8 (2, H, W, 3) [source, target], record)], some files with wide or tall frames."""
    rng = Random(f"world shard {index}")
    wide = size * 7 // 32 * 8                                      # 16:9 in multiples of 8
    shape = rng.choices([(size, size), (size, wide), (wide, size)], [80, 12, 8])[0]
    return [world.draw_pair(index * n + i, DOMAINS[i % 5], rng, *shape) for i in range(n)]


def draw_clips(index, n, size):
    """n pairs of clips (2, 8, H, W, 3), of seeds far from those of the others."""
    rng = Random(f"clips {index}")
    return [world.draw_pair(50_000_000 + index * n + i, DOMAINS[i % 5], rng, size, size, 8) for i in range(n)]


def draw_motion(index, n, size):
    """n unedited clips (16, H, W, 3)."""
    rng, out = Random(f"motion clips {index}"), []
    for i in range(n):
        record = dict(seed=90_000_000 + index * n + i, domain=DOMAINS[i % 5])
        clip = world.render(world.draw_scene(*record.values()), N_FRAMES, size, size, t0=rng.uniform(0, 4))
        out.append(((clip * 255 + .5).astype(np.uint8), record))
    return out


PER_FILE = {draw_pairs: 500, draw_clips: 250, draw_motion: 100}


def draw_file(path, draw, *which):
    frames, records = zip(*draw(*which))
    write_text(path.with_suffix(".jsonl"), "".join(json.dumps(record) + "\n" for record in records))
    save_array(path.with_suffix(".npy"), np.stack(frames))         # last: a file is there whole or not at all


def save_array(path, x):
    with aside(path) as half, open(half, "wb") as f:
        np.save(f, x)


def world_folder(data):
    """Named by the code that draws: another version of the world draws anew."""
    return data / f"world-{fingerprint(ROOT / 'world.py')}"


def world_set(data, draw, n, size):
    """Draw what is missing of the first n samples, on all cores; returns [(frames memmap, [record])] by file."""
    folder, per_file = world_folder(data), PER_FILE[draw]
    folder.mkdir(parents=True, exist_ok=True)
    kind = draw.__name__.removeprefix("draw_")
    paths = [folder / f"{kind}-{size}px-{i:05d}" for i in range(math.ceil(n / per_file))]
    todo = [(i, path) for i, path in enumerate(paths) if not path.with_suffix(".npy").is_file()]
    if todo:
        print(f"drawing {len(todo)} files of {per_file} {kind} into {folder}")
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for job in tqdm([pool.submit(draw_file, path, draw, i, per_file, size) for i, path in todo], unit="file"):
                job.result()
    return [(np.load(path.with_suffix(".npy"), mmap_mode="r"),
             [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]) for path in paths]


def square(shards):
    return [shard for shard in shards if shard[0].shape[2] == shard[0].shape[3]]


def random_batch(shards, n, generator, axis=2, odds=None):
    """A random batch: a shard (so one frame size; height and width at `axis`), and rows of it, n at 1:1 aspect and
    fewer of a wider or taller frame, so that every batch holds about the same number of pixels. odds: {task: how
    much more often than drawn}. Returns the shard's array, the rows and their records."""
    frames, records = shards[int(torch.randint(len(shards), (1,), generator=generator))]
    short, long = sorted(frames.shape[axis:axis + 2])
    weights = torch.tensor([odds[record["task"]] if odds else 1.0 for record in records])
    rows = torch.multinomial(weights, max(2, round(n * short / long)), replacement=True, generator=generator).tolist()
    return frames, rows, [records[i] for i in rows]


def texts_of(records):
    """Captions of the sources, of the targets, instructions."""
    return [[record[key] for record in records] for key in ("source", "target", "instruction")]


def as_input(frames):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_mark(folder):
    """Tells one VAE's latents from another's, in names of caches and in settings."""
    return fingerprint(*sorted(folder.glob("diffusion_pytorch_model*")))


@torch.no_grad()
def latents_of(shards, folder, encode):
    """encode(frames, records) -> array, of every shard, once, into `folder`: [latents memmap]."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.npy" for i in range(len(shards))]
    for path, shard in zip(paths, tqdm(shards, desc="latents", unit="file")):
        if not path.is_file():
            save_array(path, encode(*shard))
    return [np.load(path, mmap_mode="r") for path in paths]

# ---- the loop --------------------------------------------------------------------------------------------------

def join_processes(device):
    """Join the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=7))  # curation is long


def processes():
    """(rank, n_ranks) of this process; (0, 1) without a launcher."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def first_process_first(work):
    """Call work() in the first process, then in the others, which find its files there. Returns its result."""
    first = processes()[0] == 0
    out = work() if first else None
    wait_for_all()
    return out if first else work()


def mean_over_processes(tensors):
    """Replace tensors by their means over all processes: one message, once a step."""
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, mean in zip(tensors, (flat / dist.get_world_size()).split([x.numel() for x in tensors])):
        x.copy_(mean.view_as(x))


def orthogonal(m, iterations=5):
    """m with its singular values near 1 (0.68 to 1.2), those of a hundredth of the largest and more: Newton-Schulz
    iterations, odd polynomial (3.4445, -4.775, 2.0315) of Jordan et al., "Muon", 2024. (out, in) float -> the same
    shape."""
    x = m / (m.norm() + 1e-7)
    if m.shape[0] > m.shape[1]:                                    # the Gram matrix of the shorter side
        return orthogonal(m.T, iterations).T
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with muon=True take a step of orthogonalised Nesterov momentum instead: a matrix moves along
    all of its directions alike, along those of rare gradients too. For weights of two or more dimensions;
    convolutions count as (out, in * kernel). Steps have AdamW's size, 0.2 in root mean square, so learning rate and
    weight decay mean the same ("Muon is scalable for LLM training", arXiv 2502.16982)."""

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


def is_inner_matrix(name, p):
    """What Muon is for: not embeddings, first and last layers or vectors, which are AdamW's."""
    return p.dim() > 1 and not any(word in name for word in ("embedding", "conv_in", "conv_out"))


def is_new(name):
    """SMA's and EPM's parameters: in no published file, so they start from nothing, at a rate of their own."""
    return name.endswith(".gamma") or ".epm." in name


def parameter_groups(trained, s):
    """{name: parameter} -> groups with rate, weight decay and whether they are Muon's; the one whose rate the log
    shows comes first."""
    groups = {}
    for name, p in trained.items():
        kind = s.lr, 0.01, s.optimizer == "muon" and is_inner_matrix(name, p)
        if s.lr_new and is_new(name):                              # gamma is one number a module: it needs more than
            kind = s.lr_new * (10 if name.endswith(".gamma") else 1), 0.0, False    # the rate that keeps EPM calm
        groups.setdefault(kind, []).append(p)
    order = sorted(groups, key=lambda kind: (kind[1], kind[0], not kind[2]), reverse=True)
    return [dict(params=groups[kind], lr=kind[0], weight_decay=kind[1], muon=kind[2]) for kind in order]


def save_state(path, state):
    """The checkpoint of before stays until this one is whole; one name for half ones, so that kills pile up none."""
    half = path.with_suffix(".tmp")
    with open(half, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())                                       # else a power cut may leave the name and no contents
    os.replace(half, path)


def resume(path, net, opt, average):
    """Load a checkpoint, if there is one, into network, optimizer and averages. Returns its step, or 0."""
    if not path.is_file():
        return 0
    with reading(path, "put a whole copy there, or delete it to begin anew"):
        state = torch.load(path, map_location="cpu", weights_only=True)     # a resumed run needs no more memory
        net.load_state_dict(state["net"], strict=False)
        for name in average.keys() & state["ema"].keys():
            average[name].copy_(state["ema"][name])
        sizes, old = ([len(g["params"]) for g in groups] for groups in (opt.param_groups, state["opt"]["param_groups"]))
        if sizes == old:
            opt.load_state_dict(state["opt"])
        else:                                                      # --force
            print(f"{path}: other parameters or another optimizer now, which starts anew")
        return int(state["step"])


def read_log(path, until=math.inf):
    """Rows of a log.jsonl up to a step; a last line that a kill cut is left out."""
    if not path.is_file():
        return []
    with reading(path, "mend or remove it"):
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        return [row for row in rows if row["step"] <= until]


def fit(net, loss_fn, out, s, how, ranks=(0, 1), probe=dict):
    """Train what requires gradients in `net` with loss_fn(number, generator) -> loss, until s.steps. Returns it with
    the averaged weights (EMA).

    AdamW or Muon, linear warm-up, cosine to 5 %, gradient norm clipped at 1. A run that was cut resumes from its
    state.pt. `number` counts micro-batches over steps and processes and with the seed fixes all that is random in
    one: a resumed run's next loss equals the uninterrupted one's, and P processes do what one does that accumulates P.
    ranks: (rank, n_ranks) where the processes share a step. probe: () -> more fields for the log.
    Raises UserError for a NaN, with the step.
    """
    rank, n_ranks = ranks
    device = torch.device(how.device).type
    bf16 = device == "cuda" if how.bf16 is None else how.bf16
    out.mkdir(parents=True, exist_ok=True)
    net.to(how.device).train()
    if how.checkpointing:
        recompute(net)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    params = list(trained.values())
    opt = Muon(parameter_groups(trained, s), lr=s.lr, betas=(0.9, 0.99), fused=True)
    peaks = [group["lr"] for group in opt.param_groups]
    average = {name: p.detach().clone() for name, p in trained.items()}
    start = resume(out / "state.pt", net, opt, average)
    log = out / "log.jsonl"
    if rank == 0:                                                  # lines after the checkpoint will come again
        write_text(log, "".join(json.dumps(row) + "\n" for row in read_log(log, start)))

    warmup = s.warmup or min(200, s.steps // 10 + 1)
    every = min(50, max(5, s.steps // 12))                         # steps between lines of the log
    losses, logged = [], start
    last_save = last_log = time.time()
    for step in range(start, s.steps):
        for group, peak in zip(opt.param_groups, peaks):
            cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / s.steps)) / 2
            group["lr"] = peak * min(1, (step + 1) / warmup) * cosine

        opt.zero_grad(set_to_none=True)
        mean = torch.zeros((), device=how.device)
        for micro in range(s.accumulate):
            number = (step * s.accumulate + micro) * n_ranks + rank
            generator = torch.Generator().manual_seed(s.seed * 1_000_003_000 + number)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = loss_fn(number, generator) / s.accumulate
            loss.backward()
            mean += loss.detach()
        if n_ranks > 1:
            mean_over_processes([mean, *(p.grad for p in params if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if not torch.isfinite(mean + norm):                        # of the means: every process stops, not just one
            raise UserError(f"{out.name}: loss is {mean.item()} and the gradient's norm {norm.item()} at step {step}; "
                            "lower --lr, it then goes on from the last checkpoint with --force")
        opt.step()
        decay = min(s.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in trained.items():
                average[name].lerp_(p, 1 - decay)

        losses.append(mean.item())
        if rank > 0:
            continue
        last = step + 1 == s.steps
        if (step + 1) % every == 0 or last:
            ms = (time.time() - last_log) * 1e3 / (step + 1 - logged)
            a_second = s.batch * s.accumulate * n_ranks * 1e3 / ms
            gb = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
            row = dict(step=step + 1, loss=float(np.mean(losses)), lr=opt.param_groups[0]["lr"], ms=ms)
            print(f"step {step + 1:05d}/{s.steps} | loss {row['loss']:.4f} | lr {row['lr']:.1e} | {ms:.0f} ms | "
                  f"{a_second:.1f} samples/s | {gb:.1f} GB", flush=True)
            with open(log, "a") as f:
                f.write(json.dumps(row | probe()) + "\n")
            losses, logged, last_log = [], step + 1, time.time()
        if last or time.time() - last_save > 60 * how.save_minutes:
            state = {name: p.detach() for name, p in trained.items()}
            save_state(out / "state.pt", dict(net=state, opt=opt.state_dict(), ema=average, step=step + 1))
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


def as_begun(out, s):
    """A stage that needs a network takes it as it was begun; one that was not gets the defaults."""
    old = stored(out)
    return replace(s, **{f.name: old[f.name] for f in fields(s) if f.name in old})


def is_done(out, settings, how):
    """Begins a run, or goes on with it; True where it is finished. One of other settings is refused by name: --force
    keeps a finished one as it is and lets another go on."""
    if not finished(out):
        begin(out, settings, how.force)
        return False
    if not how.force:
        begin(out, stored(out) | settings)
    print(f"{out}: finished")
    return True


def write_network(folder, config, tensors, name="diffusion_pytorch_model.safetensors", dtype=None):
    save_tensors(folder / name, tensors, dtype)
    write_json(folder / "config.json", config)

# ---- stage vae -------------------------------------------------------------------------------------------------

def stage_vae(out, s, how, data):
    """Autoencoder: L1 + L2 on pixels and on their differences (edges), and a very small KL term (no adversary).

    On crops of 32 pixels: many small pictures teach faster than few large ones at the same cost.
    """
    if is_done(out, asdict(s) | dict(world=world_folder(data).name), how):
        return
    shards = world_set(data, draw_pairs, s.pairs, s.size)
    config = read_json(TINY / "vae" / "config.json")
    torch.manual_seed(s.seed)
    vae = VAE(config)

    def loss_fn(number, generator):
        frames, records = shards[int(torch.randint(len(shards), (1,), generator=generator))]
        rows = torch.randint(len(records), (s.batch,), generator=generator).tolist()
        top, left = (8 * int(torch.randint((side - 32) // 8 + 1, (1,), generator=generator))
                     for side in frames.shape[2:4])
        x = np.stack([frames[i, k % 2, top:top + 32, left:left + 32] for k, i in enumerate(rows)])
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

# ---- stage clip ------------------------------------------------------------------------------------------------

def train_tokenizer(folder):
    """CLIP's byte-pair format for the words of the shapes world: every known word becomes one token."""
    bpe = BPETokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(world.known_words(), trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, show_progress=False, end_of_word_suffix="</w>", initial_alphabet=letters))
    merges = json.loads(bpe.to_str())["model"]["merges"]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges),
             "<|startoftext|>", "<|endoftext|>"]                   # the end has the largest id: CLIP pools there
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(dict.fromkeys(words))})
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges))
    return Tokenizer(folder / "vocab.json", folder / "merges.txt")


def contrastive_loss(a, b, scale, texts):
    """Symmetric contrastive loss between rows of a and b (N, P); rows of equal texts (N strings) are all correct."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    same = torch.tensor([[float(x == y) for y in texts] for x in texts], device=a.device)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def change(x):
    """Features (2N, P) of N sources, then of their N targets -> the normalised ones' way (N, P), as scores take it."""
    source, target = F.normalize(x, dim=-1).chunk(2)
    return target - source


def stage_clip(out, s, how, data):
    """CLIP on frames and captions, source and target of a pair in one batch (each is the other's hard negative), plus
    instructions on the direction from source to target, so that the text tower learns the words of edits too."""
    if is_done(out, asdict(s) | dict(world=world_folder(data).name), how):
        return
    config = read_json(TINY / "clip" / "config.json")
    preprocessor = read_json(TINY / "clip" / "preprocessor_config.json")
    shards = square(world_set(data, draw_pairs, s.pairs, config["vision_config"]["image_size"]))
    tokenizer = train_tokenizer(out)
    config["text_config"]["vocab_size"] = len(tokenizer.vocab)
    torch.manual_seed(s.seed)
    clip = CLIP(config)
    mean, std = (torch.tensor(preprocessor[k])[:, None, None].to(how.device) for k in ("image_mean", "image_std"))

    def encode_text(texts):
        ids = tokenizer(texts)
        length = int(ids.argmax(dim=1).max()) + 1                  # text attention is causal: padding can be cut off
        return clip.encode_text(ids[:, :length].to(how.device))

    def loss_fn(number, generator):
        frames, rows, records = random_batch(shards, s.batch, generator)
        before, after, orders = texts_of(records)
        x = as_input(np.concatenate([frames[rows, 0], frames[rows, 1]])).to(how.device)
        x = x + 0.02 * torch.randn(len(x), 1, 1, 1, generator=generator).to(x)
        image = clip.encode_image(((x + 1) / 2 - mean) / std)
        scale = clip.logit_scale.exp().clamp(max=100)
        return (contrastive_loss(image, encode_text(before + after), scale, before + after) +
                0.5 * contrastive_loss(change(image), encode_text(orders), scale.clamp(max=20), orders))

    fit(clip, loss_fn, out, s, how)
    write_json(out / "preprocessor_config.json", preprocessor)
    write_network(out, config, clip.state_dict(), "model.safetensors")


def needed(runs, stage):
    """The folder of a stage that must have run before. UserError where it has not."""
    if not finished(runs / stage):
        raise UserError(f"{runs / stage}: no finished network there; run `python train.py {stage}` first")
    return runs / stage

# ---- stage viclip ----------------------------------------------------------------------------------------------

def stage_viclip(out, s, how, data):
    """ViCLIP on drawn clips with stage clip's loss: captions on clips, source and target of a pair in one batch, plus
    captions' difference and instructions on the direction from source to target, which is what ViCLIP_dir asks for.

    Every other step sees stills, which its temporal positions allow (a still takes their mean): they cost an eighth
    and show far more scenes, so there are three times as many in a batch.
    """
    if is_done(out, asdict(s) | dict(world=world_folder(data).name), how):
        return
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(needed(out.parent, "clip") / name, out / name)
    tokenizer = Tokenizer(out / "vocab.json", out / "merges.txt", pad=0)
    config = read_json(TINY / "viclip" / "config.json") | {"vocab_size": len(tokenizer.vocab)}
    stills = square(world_set(data, draw_pairs, s.pairs, config["image_size"]))
    clips = world_set(data, draw_clips, s.clips, config["image_size"])
    torch.manual_seed(s.seed)
    net = ViCLIP(config)
    torch.nn.init.constant_(net.temp, 0.07)                        # the published 0.01 is where training ends
    mean, std = (v[:, None, None].to(how.device) for v in (net.MEAN, net.STD))

    def loss_fn(number, generator):
        if number % 2 == 0:
            frames, rows, records = random_batch(stills, 3 * s.batch, generator)
            frames = frames[:, :, None]                            # (N, 2, 1, H, W, 3)
        else:
            frames, rows, records = random_batch(clips, s.batch, generator, axis=3)
        before, after, orders = texts_of(records)
        x = torch.from_numpy(np.concatenate([frames[rows, 0], frames[rows, 1]])).to(how.device)
        x = x.permute(0, 1, 4, 2, 3).float() / 255                 # (2N, F, 3, H, W)
        x = x + 0.01 * torch.randn(len(x), 1, 1, 1, 1, generator=generator).to(x)
        video = net.encode_video((x - mean) / std)
        captions, asked = net.encode_text(tokenizer(before + after + orders, length=net.context)).split(
            [2 * len(rows), len(rows)])
        scale = 1 / net.temp.clamp(min=0.01)
        moved, slow = change(video), scale.clamp(max=20)
        ways = [f"{a} -> {b}" for a, b in zip(before, after)]
        return (contrastive_loss(video, captions, scale, before + after) +
                0.5 * contrastive_loss(moved, asked, slow, orders) +
                0.5 * contrastive_loss(moved, change(captions), slow, ways))

    fit(net, loss_fn, out, s, how)
    write_network(out, config, net.state_dict(), "model.safetensors")

# ---- stage image: InstructPix2Pix ------------------------------------------------------------------------------

def region_weights(change, strength):
    """Loss weights (N, h, w), mean 1 in every frame: the smaller part of it, changed or kept, counts more.

    change (N, c, h, w): target - source in scaled latents; cells with a mean |change| from 0.5 on count as changed. A
    small object's edit is not lost in the frame, nor an object before a changed background. strength 0: all alike.
    Ours.
    """
    changed = (change.abs().mean(dim=1) / 0.5).clamp(max=1)
    share = changed.mean(dim=(1, 2), keepdim=True)
    weight = 1 + strength * (changed * (1 - share) + (1 - changed) * share)
    return weight / weight.mean(dim=(1, 2), keepdim=True)


def fresh_editor(out, seed):
    """An untrained image editor in hub layout, of the networks trained before: what stage image starts from."""
    training = shutil.ignore_patterns("state.*", "settings.json", "log.jsonl", "*.txt")
    for name in ("vae", "clip", "viclip"):
        shutil.copytree(needed(out.parent, name), out / name, dirs_exist_ok=True, ignore=training)
    for name in ("clip", "viclip", "tokenizer"):
        (out / name).mkdir(exist_ok=True)
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(out.parent / "clip" / file, out / name / file)
    shutil.copytree(TINY / "scheduler", out / "scheduler", dirs_exist_ok=True)
    clip = {k: v for k, v in read_tensors(out / "clip" / "model.safetensors").items() if k.startswith("text_model.")}
    config = read_json(out / "clip" / "config.json")["text_config"]
    write_network(out / "text_encoder", config, clip, "model.safetensors")
    config = read_json(TINY / "unet" / "config.json")
    torch.manual_seed(seed)
    unet = UNet({k: v for k, v in config.items() if k not in VideoEditor.VIDEO})
    for name, p in unet.named_parameters():                        # every residual branch and the output start at zero
        if name.endswith(("proj_out.weight", "conv_out.weight", "conv2.weight")):
            torch.nn.init.zeros_(p)
    write_network(out / "unet", unet.config, unet.state_dict())


def stage_image(out, s, how, data):
    """InstructPix2Pix on cached latents: 5 % text, 5 % source, 5 % both dropped; epsilon or v as the scheduler says.

    PAPER: the text encoder is CLIP's, frozen. tiny CLIP has seen too little for that: its states hold more of a word's
    neighbours than of the word, so here it is trained along, from stage clip's weights.

    PAPER: IP2P keeps the edited target where it drops the text, so its "no instruction" is an average of all edits.
    Here a dropped instruction asks for nothing and its target is the source: an empty instruction then returns the
    clip, and text guidance points from unchanged to edited. Errors count by `region_weights`.

    The real domain is left out on purpose: closing that gap is what the refinement rounds are for.
    """
    mark = vae_mark(part(repository(s.weights), "vae") if s.weights else needed(out.parent, "vae"))
    origin = dict(weights=s.weights and portable(s.weights), vae=mark, world=world_folder(data).name)
    if is_done(out, asdict(s) | origin, how):
        return
    if not s.weights:
        fresh_editor(out, s.seed)
    ed = VideoEditor.from_pretrained(s.weights or out, motion=False, device=how.device, dtype="float32")

    def encode(frames, records):                                   # -> (n, 2, c, h, w) float16
        x = frames[synthetic(records)].reshape(-1, *frames.shape[2:])
        z = [ed.vae.encode(as_input(some).to(how.device))[0] for some in np.array_split(x, len(x) // 16 + 1)]
        return torch.cat(z).unflatten(0, (-1, 2)).half().cpu().numpy()

    shards = world_set(data, draw_pairs, s.pairs, s.size)
    latents = latents_of(shards, world_folder(data) / f"pairs-{s.size}px-{mark}", encode)
    shards = [(z, [records[k] for k in synthetic(records)]) for z, (_, records) in zip(latents, shards)]
    unet = ed.unet.requires_grad_(True)
    unet.text_encoder = ed.text_encoder.requires_grad_(True)       # one optimizer, one average for both
    abar, scale = noise_levels(ed.scheduler).to(how.device), ed.vae.scaling_factor
    odds = {task: row.trained for task, row in world.TASKS.items()}

    def loss_fn(number, generator):
        latents, rows, records = random_batch(shards, s.batch, generator, axis=3, odds=odds)
        z_src, z_tgt = torch.from_numpy(latents[rows]).to(how.device).float().unbind(1)
        drop = torch.rand(len(rows), generator=generator)
        only_text, no_text, no_src = drop < 0.05, drop < 0.10, (drop >= 0.05) & (drop < 0.15)
        ctx = ed.encode_text(["" if empty else record["instruction"] for record, empty in zip(records, no_text)])
        target = torch.where(only_text.to(how.device)[:, None, None, None], z_src, z_tgt)
        u = torch.rand(len(rows), generator=generator) ** s.t_bias
        t = (len(abar) * u).long().clamp(max=len(abar) - 1).to(how.device)      # float32's u may round to 1
        eps = torch.randn(target.shape, generator=generator).to(target)
        z_t, wanted = diffuse(target * scale, eps, abar[t][:, None, None, None], ed.scheduler)
        x = torch.cat([z_t, z_src * ~no_src.to(how.device)[:, None, None, None]], dim=1)
        error = (unet(x[:, None], t, ctx)[:, 0].float() - wanted).square().mean(dim=1)     # (N, h, w)
        return (error * region_weights((target - z_src) * scale, s.region_weight)).mean()

    fit(unet, loss_fn, out, s, how)
    del unet.text_encoder
    config = read_json(part(ed.folders, "text_encoder") / "config.json")
    write_network(out / "text_encoder", config, ed.text_encoder.state_dict(), "model.safetensors")
    about = read_json(TINY / "model_index.json")["instructvedit"]  # how it samples
    about |= dict(size=s.size, words=world.known_words(), examples=world.examples())
    write_editor(out, unet.config, unet, about | (dict(base=ed.base) if s.weights else {}))


def synthetic(records):
    return [k for k, record in enumerate(records) if record["domain"] == "synthetic"]


def diffuse(z0, eps, abar, scheduler):
    """Scaled latents and noise of one shape -> the noisy latents, and what is predicted of them: epsilon or v, as the
    scheduler's config says. abar broadcasts."""
    z_t = abar.sqrt() * z0 + (1 - abar).sqrt() * eps
    v_prediction = scheduler.get("prediction_type", "epsilon") == "v_prediction"
    return z_t, abar.sqrt() * eps - (1 - abar).sqrt() * z0 if v_prediction else eps


def write_editor(out, config, unet, about):
    """A U-Net, and the page that says what else the editor is made of: the run is finished."""
    write_network(out / "unet", config, unet.state_dict())
    write_json(out / "model_index.json", {"_class_name": "VideoEditor", "instructvedit": about})

# ---- stage motion, and what it shares with stage video ---------------------------------------------------------

def row_of(number, n, seed):
    """Which of n clips training sample `number` is: each of them once an epoch, in a new order every time."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + number // n))
    return int(order[number % n])


def draw_noise(number, s, shape, train_steps=1000):
    """What is random about training sample `number`: u in [0, 1) to choose the dropouts, time step t, eps of `shape`.

    From a generator of the sample's own, so that a batch is the same however micro-batches and processes share it.
    s.same_noise: the share of clips whose frames all have one noise; in the rest each frame has its own, as in InsV2V
    and AnimateDiff. A video editor samples from what most of its clips had.
    PAPER: silent on noise over frames. `tiny`'s short rounds did not learn to bring frames of different noise
    together, so its clips have one.
    """
    g = torch.Generator().manual_seed((s.seed + 1) * 1_000_003_000 + number)
    u, v, same = torch.rand(3, generator=g).tolist()
    eps = torch.randn(shape, generator=g)
    t = torch.tensor(int(train_steps * v ** s.t_bias))
    return u, t, eps[:1].expand(shape) if same < s.same_noise else eps


def clip_loss(unet, samples, scheduler, device, guidance=None):
    """Mean error of the prediction over samples (z0, z_src, ctx, t, eps, weight), clips of 16 frames.

    z0, z_src, eps (F, c, h, w), z0 scaled and z_src not; ctx (77, D); t an integer tensor; weight (F, 1, h, w) or 1.
    Clips of one size run as one batch.
    guidance (s_txt, s_src, states of no text (77, D)): where a sample has source and text, the prediction is the
    guided one of sampling; its other two branches get no gradient.
    """
    abar = noise_levels(scheduler).to(device)
    total = 0
    for shape in dict.fromkeys(sample[0].shape for sample in samples):
        alike = [sample for sample in samples if sample[0].shape == shape]
        z0, z_src, ctx, t, eps, weight = (torch.stack(x).to(device) for x in zip(*alike))
        z_t, wanted = diffuse(z0, eps, abar[t][:, None, None, None, None], scheduler)      # (B, F, c, h, w)
        x, scale, others = torch.cat([z_t, z_src], dim=2), 1, 0
        if guidance:                                               # VideoEditor.guided, for the rows that have everything
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


def editor_of(source):
    """Which editor a run starts from, for its settings: the name, and a mark of its contents."""
    return dict(weights=portable(source), editor=fingerprint(part(repository(source), "unet")))


def stage_motion(out, s, how, data):
    """The motion prior: fresh motion modules in the frozen image editor, on unedited clips (as AnimateDiff was made).

    The editor's own dropouts are the conditions under which it makes unedited pictures: three clips in four without
    source and text, where the frames' likeness has to come from the motion modules; the rest with their source and
    no text, where the editor returns the source, so that the modules learn to leave alone what is certain already.
    gamma stays 1 here; each module's last layer starts at 0, so that training starts from the image editor.
    """
    weights, (rank, n_ranks) = s.weights or needed(out.parent, "image"), processes()
    origin = editor_of(weights) | dict(world=world_folder(data).name, processes=n_ranks)
    if is_done(out, asdict(s) | origin, how):
        return
    ed = VideoEditor.from_pretrained(weights, motion=False, device=how.device, dtype="float32")

    def latents():                                                 # [(n, F, c, h, w) float16]
        shards = world_set(data, draw_motion, s.clips, s.size)
        folder = world_folder(data) / f"motion-{s.size}px-{vae_mark(part(ed.folders, 'vae'))}"
        return latents_of(shards, folder, lambda frames, records: np.stack(
            [ed.encode(as_input(clip)[None])[0].half().cpu().numpy() for clip in frames]))

    clips = [clip for z in first_process_first(latents) for clip in z][:s.clips]
    torch.manual_seed(s.seed)
    unet, still = ed.unet, ed.unet.config                          # like v1-5-3; the rest follows from the U-Net
    unet.add_motion(dict(
        _class_name="MotionAdapter", motion_max_seq_length=32, use_motion_mid_block=False,
        block_out_channels=still["block_out_channels"], motion_layers_per_block=still["layers_per_block"],
        motion_norm_num_groups=still["norm_num_groups"], motion_num_attention_heads=still["attention_head_dim"]), gamma=1.0)
    for name, p in unet.named_parameters():
        p.requires_grad_("motion_modules" in name and not name.endswith(".gamma"))
        if "motion_modules" in name and ".proj_out." in name:
            torch.nn.init.zeros_(p)
    no_text, one = ed.encode_text([""])[0].cpu(), torch.ones(1, 1, 1, 1)
    train_steps = len(noise_levels(ed.scheduler))

    def loss_fn(number, generator):
        samples = []
        for k in range(number * s.batch, (number + 1) * s.batch):
            z = torch.from_numpy(clips[row_of(k, len(clips), s.seed)].astype(np.float32))
            u, t, eps = draw_noise(k, s, z.shape, train_steps)
            samples.append((z * ed.vae.scaling_factor, z * (u < 0.25), no_text, t, eps, one))
        return clip_loss(unet, samples, ed.scheduler, how.device)

    fit(unet, loss_fn, out, s, how, (rank, n_ranks))
    if rank == 0:
        write_network(out, unet.motion_config, {name: p for name, p in unet.state_dict().items()
                                                if "motion_modules" in name and not name.endswith(".gamma")})
    wait_for_all()                                                 # the others read it next

# ---- stage video: a round of the video editor on curated triples -----------------------------------------------

def read_clips(folders, channels, most=-1):
    """Kept triples of curated folders as [(latents file, instruction)]; says how many. Only headers are read here; a
    clip's latents are read when it is its turn. most: the first so many, -1 all."""
    clips = []
    for folder in map(Path, folders):
        rows = curate.read_rows(folder)
        kept = [row for row in rows if row["kept"]]
        print(f"{folder}: {len(kept)} clips of {len({row['id'] for row in rows})} sources and {len(rows)} candidates")
        if not kept:
            raise UserError(f"{folder}: the filter kept none of {len(rows)} candidates; see why with `python curate.py "
                            f"look {folder}`, then curate with lower thresholds, or more")
        for row in kept:
            path = folder / row["id"] / "latents.safetensors"
            z = read_tensors(path)
            with reading(path, f"training needs source and target ({N_FRAMES}, {channels}, h, w)"):
                a, b = z["source"].shape, z["target"].shape
                need(a == b and len(a) == 4 and a[:2] == (N_FRAMES, channels), f"holds {tuple(a)} and {tuple(b)}")
            clips.append((path, row["instruction"]))
    if most > len(clips):
        raise UserError(f"--max-clips {most}: there are only {len(clips)}")
    return clips if most == -1 else clips[:most]


def video_editor(s, how):
    """The video editor a round starts from, what is trained in it chosen: the image editor s.weights plus the motion
    adapter, gamma 0 (it then is the image editor, exactly) and untrained EPM; or a round as it is, to go on from it."""
    before = stored(Path(s.weights))
    is_round = "sma" in before
    for flag in ("sma", "epm"):
        if is_round and before[flag] != getattr(s, flag):
            raise UserError(f"--{flag}, --no-{flag}: {s.weights} was trained with {flag} {before[flag]}; pass the same")
    torch.manual_seed(s.seed)
    motion = None if is_round else s.motion
    ed = VideoEditor.from_pretrained(s.weights, motion=motion, device=how.device, dtype="float32")
    if not is_round:
        ed.unet.set_gamma(0.0 if s.sma else 1.0)
        if s.epm:
            ed.unet.add_epm(s.epm_sites, N_FRAMES, s.epm_start)
    for name, p in ed.unet.to(ed.device).named_parameters():
        p.requires_grad_(is_new(name) or "motion_modules" in name or s.trainable == "all")
        if name.endswith(".gamma") and not s.sma:
            p.requires_grad_(False)
    return ed


def watch(unet):
    """probe() -> fields for the log: gamma of every motion module; EPM's mean bias of every site over the last batch,
    [within a frame, between frames]; and the mean over sites as a matrix, rows the frames that listen (Figure 5)."""
    sites = {name.split(".transformer_blocks")[0]: m for name, m in unet.named_modules() if isinstance(m, EPM)}
    for m in sites.values():
        m.register_forward_hook(lambda m, x, bias: setattr(m, "seen", bias.detach().float().mean(0).cpu()))
    own = torch.eye(N_FRAMES, dtype=torch.bool)

    def probe():
        row = dict(gamma={name.removesuffix(".gamma"): round(p.mean().item(), 5)
                          for name, p in unet.named_parameters() if name.endswith(".gamma")})
        if sites:
            matrix = torch.stack([m.seen for m in sites.values()]).mean(0)
            row |= dict(epm={name: [round(m.seen[pair].mean().item(), 4) for pair in (own, ~own)]
                             for name, m in sites.items()},
                        epm_matrix=[[round(x, 2) for x in line] for line in matrix.tolist()])
        return row
    return probe


def round_settings(s, curation):
    """What a round's settings.json says, but for the number of its clips. curation: what made them."""
    adapter = fingerprint(s.motion) if Path(s.motion).exists() else s.motion
    return asdict(s) | editor_of(s.weights) | curation | dict(
        motion=portable(s.motion), adapter=adapter, train_on=[portable(x) for x in s.train_on], processes=processes()[1])


def stage_video(out, s, how, curation):
    """One round: the video editor on triples of 16 frames, three dropouts of 5 %, epsilon or v as the scheduler says.

    PAPER: the rounds' schedule and what is trained in them are not given. Default here: motion modules, gamma and EPM
    (--trainable all: everything). Dropped instructions follow the image editor the round starts from, see ROUND.
    Targets are samples made with guidance: a model that has learnt them is guided twice when it samples, and a little
    more in every round. --guided-loss compares the guided prediction instead, so that what it learns is what it makes.
    """
    settings = round_settings(s, curation)
    if not finished(out):
        vae = part(repository(s.weights), "vae")
        clips = read_clips(s.train_on, read_json(vae / "config.json")["latent_channels"], s.max_clips)
        settings |= dict(clips=len(clips))
    if is_done(out, settings, how):
        return
    ed = video_editor(s, how)
    with torch.no_grad():
        states = {text: ed.encode_text([text])[0].half().cpu() for text in {"", *(text for _, text in clips)}}
    scale, train_steps = ed.vae.scaling_factor, len(noise_levels(ed.scheduler))
    guidance = (*ed.guidance, states[""].float()) if s.guided_loss else None

    def loss_fn(number, generator):
        samples = []
        for k in range(number * s.batch, (number + 1) * s.batch):
            path, text = clips[row_of(k, len(clips), s.seed)]
            z = load_file(path)
            z_src, z_tgt = z["source"].float(), z["target"].float()                        # (F, c, h, w)
            u, t, eps = draw_noise(k, s, z_src.shape, train_steps)
            text, no_src = "" if u < 0.10 else text, 0.05 <= u < 0.15      # text alone, both, source alone: 5 % each
            z_tgt = z_src if u < 0.05 and s.no_text == "source" else z_tgt
            weight = region_weights((z_tgt - z_src) * scale, s.region_weight)[:, None]     # (F, 1, h, w)
            samples.append((z_tgt * scale, z_src * (not no_src), states[text].float(), t, eps, weight))
        return clip_loss(ed.unet, samples, ed.scheduler, how.device, guidance)

    fit(ed.unet, loss_fn, out, s, how, processes(), watch(ed.unet))
    if processes()[0] == 0:
        config = ed.unet.config | dict(motion=ed.unet.motion_config, same_noise=s.same_noise > 0.5)
        write_editor(out, config | (dict(epm=ed.unet.epm_config) if s.epm else {}), ed.unet, dict(base=ed.base))
    wait_for_all()

# ---- the rounds ------------------------------------------------------------------------------------------------

def curation_steps(args, s, n):
    """What a round's clips are curated by: [(curate.py's step, its folder, its settings)], one after the other.

    Round 0 (stage I): triples synthesised from images by the image editor and FFG-V2V. Rounds 1, 2, ... (stages II,
    III): real clips edited by the previous round's model.
    """
    data = args.data
    if n == 0:
        return [step(args, "images", data / "images", weights=s.weights, source=args.images_from, n=args.images),
                step(args, "clips", data / "clips", images=data / "images"),
                step(args, "videos", data / "round0", weights=s.weights, motion=s.motion, images=data / "images",
                     clips=data / "clips")]
    return [step(args, "cut", data / f"cut{n}", source=args.real_from, n=args.real_clips),
            step(args, "write", data / f"write{n}", clips=data / f"cut{n}"),
            step(args, "real", data / f"round{n}", weights=args.runs / f"round{n - 1}", source=data / f"write{n}")]


def step(args, name, to, **own):
    """Settings of curate.py's step `name`: this model's, --curate-<name>'s flags, then what the round says."""
    settings = replace(curate.STEPS[name][0](), **CURATE[args.model].get(name, {}))
    given = getattr(args, f"curate_{name}")
    parser = Parser(prog=f"--curate-{name}", add_help=False)
    add_flags(parser, settings)
    with reading(f"--curate-{name} {given}"):
        settings = from_flags(settings, parser.parse_args(shlex.split(given)))
    return name, to, replace(settings, **{k: str(v) if isinstance(v, Path) else v for k, v in own.items()})


def curate_steps(steps, how):
    """Under torchrun every process does its share of a step, then waits for the others."""
    dtype = {True: "bfloat16", False: "float32"}.get(how.bf16)
    for name, to, settings in steps:
        curate.STEPS[name][1](to, settings, curate.How(device=how.device, dtype=dtype, force=how.force))
        wait_for_all()


def round_folders(args, s, n):
    """What round n trains on, as in the paper's Table 4: 0 on the synthetic triples, 1 on those and its own, later ones
    on their own alone (Stage III with a dagger), with --mix on the synthetic ones as well."""
    rounds = dict.fromkeys([0, n] if n < 2 or args.mix else [n])
    return s.train_on or tuple(str(args.data / f"round{k}") for k in rounds)


def refine(args, s, how):
    """--round N: every round up to N that is not finished: curate what it needs, then train on it. What is there is
    skipped or resumed; flags that a finished round was not made with are refused before any work.

    PAPER: silent on where a round's training starts; Table 4 counts each stage's clips as a whole set (9k + 3.4k, 9k +
    5k, 5k). So every round trains from the image editor: a model that goes on from the one that made its targets
    drifts a bit further in every round.
    """
    rounds = []
    for n in range(args.round + 1):
        steps = [] if s.train_on else curation_steps(args, s, n)
        curation = {f"{name} {k}": portable(v) if k in ("weights", "source", "images", "clips", "motion") else v
                    for name, _, settings in steps for k, v in asdict(settings).items()}
        out, own = args.runs / f"round{n}", replace(s, train_on=round_folders(args, s, n))
        if not (finished(out) and is_done(out, round_settings(own, curation), how)):
            rounds.append((steps, out, own, curation))
    if args.model == "tiny" and rounds:
        networks(args, s, how)
    for steps, out, own, curation in rounds:
        print(f"{out}: curating, then training")
        curate_steps(steps, how)
        stage_video(out, own, how, curation)

# ---- stage writer: LLaVA-OneVision learns to write instructions like those of image-editing data ---------------

def writer_pairs(folder, most):
    """[(pair of curate.read_pairs, answer)] of the pairs whose texts the writer's own check accepts; says how many."""
    pairs, n = [], 0
    for n, pair in enumerate(islice(curate.read_pairs(folder), most), 1):
        task = pair["task"] if pair["task"] in WRITER_TASKS else guess_task(pair["instruction"])
        answer, _ = parse_answer(json.dumps({**{k: pair[k] for k in FIELDS}, "task": task}), task)
        pairs += [(pair, answer)] if answer else []
    print(f"{folder}: {len(pairs)} image pairs; left out: {n - len(pairs)} without an instruction and two different captions")
    if not pairs:
        raise UserError(f"--pairs-from {folder}: none of {n} pairs has an instruction and two different captions of 2 to "
                        "60 words")
    return pairs


def stage_writer(out, s, how):
    """LoRA on every matrix of the decoder: source image -> task, instruction, both captions (section 3.3).

    PAPER: says only that the model was fine-tuned on image-editing data. Here an image is shown as a clip of one frame:
    the form in which the writer then meets real clips, at 197 tokens instead of up to 7,290. `fit` sees the trained
    matrices alone, so that its checkpoints are small. Writes <out>/writer.safetensors for `curate.py write --lora`.
    """
    rank, n_ranks = processes()
    pairs = [] if finished(out) else writer_pairs(s.pairs_from, s.pairs)
    settings = asdict(s) | dict(llava=portable(s.llava), pairs_from=portable(s.pairs_from), processes=n_ranks)
    if is_done(out, settings | (dict(pairs=len(pairs)) if pairs else {}), how):
        return
    net = LlavaOneVision.from_pretrained(s.llava, device=how.device)
    torch.manual_seed(s.seed)
    # "." may not stand in a parameter's name
    lora = torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in add_lora(net, s.rank).items()})
    broken = set()

    def shown(k):                                                  # an image that does not open gives way to the next one
        for row in (row_of(at, len(pairs), s.seed) for at in range(k, k + len(pairs))):
            try:
                return pairs[row][0]["load"]()[0][None], pairs[row][1]
            except curate.Unusable as error:
                if row not in broken:
                    print(f"left out: {error}")
                broken.add(row)
        raise UserError(f"--pairs-from {s.pairs_from}: none of {len(pairs)} images can be read")

    def loss_fn(number, generator):
        images, answers = zip(*[shown(k) for k in range(number * s.batch, (number + 1) * s.batch)])
        return writer_loss(net, list(images), list(answers))

    fit(lora, loss_fn, out, s, how, (rank, n_ranks))
    if rank == 0:
        save_lora(net, out / "writer.safetensors")
        write_json(out / "config.json", dict(llava=settings["llava"], rank=s.rank))
        print(f"{out / 'writer.safetensors'}: pass it as --lora to curate.py write --writer llava --llava {s.llava}")
    wait_for_all()

# ---- measured: after training, and the paper's tables where the truth is known ---------------------------------

def report(source, how, m, n_frames):
    """The closing table of a run: held-out drawn scenes, its bare frames against the true edit."""
    ed = VideoEditor.from_pretrained(source, device=how.device)
    if not ed.words:                                               # published weights do not know the shapes world
        print(f"{source}: score it on real clips with `python metrics.py tgve DIR --weights {source}`")
        return
    rows = drawn_scores(ed, m.n, "synthetic", n_frames, **guidance(m))
    print(f"{source}: held-out drawn scenes, {n_frames} frame(s) of {ed.size} pixels\n"
          "| task | edits | success | gain inside, dB |\n|---|---|---|---|")
    for task in dict.fromkeys(row["task"] for row in rows):
        success, gain = np.array([[r["success"], r["truth_gain"]] for r in rows if r["task"] == task], float).T
        print(f"| {task} | {len(gain)} | {success.mean():.0%} | {gain.mean():+.1f} |")


def guidance(m):
    return dict(steps=m.sampling_steps, s_txt=m.text_cfg, s_src=m.source_cfg)


@dataclass
class Row:
    """Of a table: a round of its own settings, trained with every seed; or, without, the image editor as it is."""
    name: str
    settings: Round | None
    mode: str = "video"


def table_rows(command, args, s, how):
    """Rows of a table; equal steps in every row, and in table 2 equally many clips."""
    def on(*folders, **more):
        return replace(s, train_on=tuple(str(args.data / folder) for folder in folders), **more)

    if command == "table2":                                        # other data of the same sources, for the same model
        images, _, videos = curation_steps(args, s, 0)
        every, free = args.data / "images-unfiltered", dict(no_filter=True, candidates=1)     # the first try is kept
        curate_steps([("images", every, replace(images[2], **free)),
                      ("videos", args.data / "round0-unfiltered", replace(videos[2], images=str(every), **free)),
                      ("videos", args.data / "round0-per-frame", replace(videos[2], mode="image"))], how)
        folders = {"trajectory-guided, filtered": "round0", "trajectory-guided, unfiltered": "round0-unfiltered",
                   "per frame, filtered": "round0-per-frame"}
        least = min(len(curate.read_rows(args.data / folder, kept=True)) for folder in folders.values())
        return [Row(name, on(folder, max_clips=least)) for name, folder in folders.items()]
    if command == "table3":
        return [Row(f"{'SMA' if sma else 'no SMA'}, {'EPM' if epm else 'no EPM'}", on("round0", sma=sma, epm=epm))
                for sma in (False, True) for epm in (False, True)]
    return [Row("image editor, frame by frame", None, "image"), Row("image editor, FFG-V2V", None, "ffg"),
            Row("round 0", on("round0")), Row("round 1", on("round0", "round1")),         # the paper's stages I to III
            Row("round 2, with synthetic data", on("round0", "round2")), Row("round 2, real only", on("round2"))]


def measured(folder, source, motion, mode, how, m):
    """{domain: (clips, 3) success, gain inside in dB, flicker} of an editor, kept in `folder`; ranks share the domains."""
    rank, n_ranks = processes()
    files = {domain: folder / f"scores-{domain}.json" for domain in ("synthetic", "real")}
    for k, (domain, file) in enumerate(files.items()):
        if k % n_ranks == rank:
            ed = VideoEditor.from_pretrained(source, motion=motion, device=how.device)
            made = dict(editor=ed.fingerprint, n=m.n, **guidance(m))
            if not (file.is_file() and read_json(file)["made"] == made):
                rows = drawn_scores(ed, m.n, domain, N_FRAMES, mode, **guidance(m))
                write_json(file, dict(made=made, clips=[[r["success"], r["truth_gain"], r["flicker"]] for r in rows]))
    wait_for_all()
    return {domain: np.array(read_json(file)["clips"], float) for domain, file in files.items()}


def table_line(name, domain, seeds, first):
    """One line: seeds [(clips, 3) of `measured`], first (clips, 3): the first row's mean over its seeds."""
    v = np.mean(seeds, axis=0)
    gain, means = v - first, [x[:, 0].mean() for x in seeds]
    half, half_gain = (1.96 * x.std(axis=0) / math.sqrt(len(x)) for x in (v, gain))
    return (f"| {name} | {domain} | {len(v)} x {len(seeds)} | {v[:, 0].mean():.1%} ± {half[0]:.1%} | "
            f"{min(means):.1%} to {max(means):.1%} | {gain[:, 0].mean():+.1%} ± {half_gain[0]:.1%}, "
            f"{(gain[:, 0] != 0).sum()} differ | {v[:, 1].mean():+.1f} ± {half[1]:.1f} | "
            f"{gain[:, 1].mean():+.2f} ± {half_gain[1]:.2f} | {v[:, 2].mean():.2f} ± {half[2]:.2f} | "
            f"{gain[:, 2].mean():+.2f} ± {half_gain[2]:.2f} |")


def table(command, args, s, how, m):
    """Train every row of a table with --seeds seeds and measure it on held-out clips of 16 frames, both domains.

    Runs lie in runs/<model>/<table>/<row>-<seed>; what is trained or measured already is not done again. Every seed
    edits the same clips, so intervals are over clips, each the mean of its seeds; differences to the first row are
    taken clip by clip, with how many clips differ in success: where none does, ± 0 only says that, not that none would.
    """
    lines, first = [], {}
    for row in table_rows(command, args, s, how):
        results = []
        for seed in range(m.seeds if row.settings else 1):
            out = args.runs / command / f"{row.name.replace(',', '').replace(' ', '-')}-{seed}"
            source, motion = out, None
            if row.settings:
                stage_video(out, replace(row.settings, seed=seed), how, {})
            else:
                source, motion = s.weights, s.motion if row.mode == "ffg" else False
            results.append(measured(out, source, motion, row.mode, how, m))
        for domain in results[0]:
            seeds = [result[domain] for result in results]
            lines.append(table_line(row.name, domain, seeds, first.setdefault(domain, np.mean(seeds, axis=0))))
    if processes()[0] == 0:
        print(f"{command}: held-out clips of {N_FRAMES} frames; ± is half a 95 % interval over clips\n| row | domain | "
              "clips x seeds | success | seeds' means | to first row | gain inside, dB | to first row | flicker | to "
              "first row |\n" + "|---" * 10 + "|", *lines, sep="\n", flush=True)

# ---- a round as a picture, a run as one folder -----------------------------------------------------------------

def plot(run, size=300):
    """run/training.png from its log: gamma of every motion module over steps (Figure 4e), EPM's mean bias of every
    site, other frames less the own, and what the mean bias gives as attention, last (Figure 5; rows listen, white 1)."""
    rows = read_log(run / "log.jsonl")
    if not rows or "gamma" not in rows[0]:
        raise UserError(f"{run / 'log.jsonl'}: no log of a video run; pass --weights with the folder of one")
    panels = {"gamma": {k: [r["gamma"][k] for r in rows] for k in rows[0]["gamma"]}}
    if "epm" in rows[0]:
        panels["EPM: bias"] = {k: [r["epm"][k][1] - r["epm"][k][0] for r in rows] for k in rows[0]["epm"]}
    picture = Picture.new("RGB", (3 * size, size + 20), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, curves) in enumerate(panels.items()):
        low, high = min(map(min, curves.values())), max(map(max, curves.values()))
        draw.text((i * size + 5, 4), f"{title}, {low:.3f} to {high:.3f}, {rows[-1]['step']} steps", "black")
        for k, curve in enumerate(curves.values()):
            points = [((i + r["step"] / rows[-1]["step"]) * size, 20 + size * (high - y) / (high - low + 1e-9))
                      for r, y in zip(rows, curve)]
            draw.line([(i * size, points[0][1]), *points], f"hsl({360 * k // len(curves)}, 70%, 40%)", 2)
    if "epm" in rows[0]:
        share = torch.tensor(rows[-1]["epm_matrix"]).softmax(dim=1)
        matrix = Picture.fromarray((255 * share).byte().numpy())
        picture.paste(matrix.resize((size, size), Picture.Resampling.NEAREST), (2 * size, 20))
    with aside(run / "training.png") as half:
        picture.save(half, "PNG")
    print(f"{run / 'training.png'}: {len(rows)} points")


def export(run, to):
    """An editor as one folder in hub layout, float16, what it is made of from its own folder, its base's, and so on:
    what `--model tiny` loads."""
    if not finished(run):
        raise UserError(f"{run}: no finished run there to export; train it first")
    folders, about = repository(run), {}
    for folder in reversed(folders):                               # a run's own words come before its base's
        about |= read_json(folder / "model_index.json").get("instructvedit", {})
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "clip", "viclip"):
        if not any((folder / name).is_dir() for folder in folders):
            continue                                               # scorers: not everybody's
        for path in sorted(part(folders, name).iterdir()):
            if path.suffix == ".safetensors":
                save_tensors(to / name / path.name, read_tensors(path), torch.float16)
            elif not (to / name / path.name).exists() or not path.samefile(to / name / path.name):
                (to / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to / name / path.name)
    about.pop("base", None)
    write_json(to / "model_index.json", {"_class_name": "VideoEditor", "instructvedit": about})
    print(f"{to}: {sum(path.stat().st_size for path in to.rglob('*') if path.is_file()) / 1e6:.1f} MB")

# ---- commands --------------------------------------------------------------------------------------------------

# the networks of `tiny`, in the order in which they need each other
NETWORKS = {"vae": (stage_vae, Vae(steps=2500, lr=2e-3, batch=64, ema=0.995)),
            "clip": (stage_clip, Clip(batch=48, ema=0.995)),
            "viclip": (stage_viclip, Viclip(steps=1500, batch=16, ema=0.995)),
            "image": (stage_image, Image(steps=16_000, batch=32)),
            "motion": (stage_motion, Motion(steps=600))}
WRITER = Writer(steps=2000, lr=1e-4, warmup=0)                     # ours; the paper names neither


def networks(args, s, how):
    """The networks of `tiny` that a model up to a round, or without one, needs and that are not there yet."""
    needs = ["vae", "clip", "viclip", "image"] if Path(s.weights) == args.runs / "image" else []
    needs += ["motion"] if args.round is not None and Path(s.motion) == args.runs / "motion" else []
    for name in needs:
        stage, settings = NETWORKS[name]
        if name == "motion":
            settings = replace(settings, weights=s.weights)
            stage(args.runs / name, as_begun(args.runs / name, settings), how, args.data)
        elif processes()[0] == 0:                                  # minutes, so one process is enough
            stage(args.runs / name, as_begun(args.runs / name, settings), how, args.data)
        wait_for_all()
