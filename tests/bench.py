"""Seconds and peak memory of every stage on this machine, as Markdown tables.

    python tests/bench.py                      tiny and full-size random weights (sd15), at sizes for the device
    python tests/bench.py --model tiny --runs 5
    python tests/bench.py --long               tiny on a 2,000-frame clip: is memory flat?
    python tests/bench.py --training           training steps of stage video, candidates of curation: seconds, how many a second
    python tests/bench.py --teachers           CogVideoX and LLaVA-OneVision: full size on a GPU, else miniatures
    python tests/bench.py --cost               operations and disk of the paper's schedule, counted, not timed
    python tests/bench.py --detail             what carrying an edit up to the source's resolution gains

Where diffusers or transformers is installed, its modules are timed on the same weights in the same run, in turns.
`tiny` is assets/tiny, or random weights of the same sizes where it has not been trained: the speed is the same.
"""
import argparse
import ctypes
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model
import world
import teachers
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import curate
import metrics
import train
from model import (VAE, TextEncoder, Tokenizer, UNet, UserError, VideoEditor, attention, epm_attention, frame_positions,
                   read_json, run, slower_in_bfloat16)
from sample import carry_detail, check_device, edit_stream, video_writer
from model import resize

DIFFUSERS = importlib.util.find_spec("diffusers") is not None
TRANSFORMERS = importlib.util.find_spec("transformers") is not None
TRAINED = (ROOT / "assets" / "tiny" / "unet").is_dir()

# ---- measuring ----------------------------------------------------------------------------------------------

def peak(device, reset=False):
    """GB held at most since the last reset, weights included: what torch took of the GPU, else the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device) if reset else None
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():                                          # not Linux
        return float("nan")
    if reset:                                                      # 5: high-water mark = present size
        mark.write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20


def timed(functions, runs, device, warm=True):
    """Call the functions in turns, `runs` times each, after one call to warm up. Returns for each a list of
    (wall seconds, CPU seconds, peak GB); CPU seconds add up all threads and hardly notice other programs."""
    sync = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)                           # else the peak holds what earlier rows have freed
    results = [[] for _ in functions]
    for k in range(-warm, runs):
        for f, out in zip(functions, results):
            peak(device, reset=True)
            sync()
            wall, cpu = time.perf_counter(), time.process_time()
            f()
            sync()
            if k >= 0:
                out.append((time.perf_counter() - wall, time.process_time() - cpu, peak(device)))
    return results


def row(what, ours, than="", theirs=None, per=1, rate=False):
    """A table line: median and best wall time and best CPU time, divided by `per`; peak; ratios of the best. rate: before
    them how many that is a second, at the best."""
    def cells(values):
        wall, cpu, memory = zip(*values)
        times = statistics.median(wall), min(wall), min(cpu)
        return [f"{x / per:.3g}" for x in times] + [f"{max(memory):.2f}"]
    right = [""] * 7
    if theirs:
        best = [min(x[k] for x in ours) / max(min(x[k] for x in theirs), 1e-9) for k in (0, 1)]
        right = [than, *cells(theirs), *(f"{x:.2f}" for x in best)]
    left = [what, f"{per / min(wall for wall, *_ in ours):.3g}"] if rate else [what]
    print("| " + " | ".join([*left, *cells(ours), *right]) + " |", flush=True)

# ---- weights: a temporary directory in hub layout, random where there are none --------------------------------

def configs(model):
    """U-Net, VAE, text encoder and motion adapter, in diffusers' and transformers' keys."""
    if model == "sd15":
        files = ("ip2p_unet", "ip2p_vae", "clip_text_l", "motion_adapter_v1-5-2")
        return [read_json(ROOT / "tests" / "goldens" / f"{name}.json")["config"] for name in files]
    unet, n = train.TINY_UNET, len(train.TINY_VAE["block_out_channels"])
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n)
    motion = dict(block_out_channels=unet["block_out_channels"], motion_norm_num_groups=unet["norm_num_groups"],
                  motion_max_seq_length=32, motion_layers_per_block=unet["layers_per_block"],
                  motion_num_attention_heads=unet["attention_head_dim"], use_motion_mid_block=True)
    return unet, train.TINY_VAE | blocks, train.TINY_TEXT, motion


def randomise(network):
    """Values for a network built on the meta device: uniform with variance 1 / (3 fan-in); norms 1, biases 0."""
    network.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim > 1:
                p.uniform_(-1, 1).mul_(p[0].numel() ** -0.5)
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    return network.state_dict()


def write_hub_folder(model, folder):
    """Write folder/{unet,vae,text_encoder,tokenizer,scheduler,motion}; what assets/tiny holds is taken from it."""
    print(f"\nwriting the weights of {model} ...", file=sys.stderr)
    unet, vae, text, motion = configs(model)
    random = model != "tiny" or not TRAINED
    if random:
        text = {"vocab_size": len(train.train_tokenizer(folder / "tokenizer").vocab)} | text
    else:
        shutil.copytree(ROOT / "assets" / "tiny", folder, dirs_exist_ok=True)
        train.write_json(folder / "vae" / "config.json", vae | read_json(folder / "vae" / "config.json"))
        unet, text = (read_json(folder / part / "config.json") for part in ("unet", "text_encoder"))
    with torch.device("meta"):
        networks = UNet(unet), VAE(vae), TextEncoder(text)
        networks[0].add_motion(motion)
    tensors = [randomise(network) for network in networks]
    file = "diffusion_pytorch_model.safetensors"
    moving = {k: v for k, v in tensors[0].items() if "motion_modules" in k and "gamma" not in k}
    train.write_network(folder / "motion", motion, moving, file)
    if random:
        still = {k: v for k, v in tensors[0].items() if "motion_modules" not in k}
        train.write_network(folder / "unet", unet, still, file)
        train.write_network(folder / "vae", vae, tensors[1], file)
        train.write_network(folder / "text_encoder", text, tensors[2])
        (folder / "scheduler").mkdir()
        train.write_json(folder / "scheduler" / "scheduler_config.json", train.TINY_SCHEDULER)


def twins(ed, motion):
    """diffusers' image U-Net, motion U-Net and VAE around the editor's weights, shared, not copied."""
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNetMotionModel
    config, place = ed.unet.config, (ed.device, ed.dtype)

    def twin(cls, cfg, network):
        with torch.device("meta"):
            net = cls(**{k: v for k, v in cfg.items() if not k.startswith("_")})
        names, ours = net.state_dict(), network.state_dict()       # diffusers stores position tables, we do not
        tensors = {k: frame_positions(*v.shape[1:], *place) if k.endswith(".pe") else ours[k] for k, v in names.items()}
        net.load_state_dict(tensors, assign=True)
        return net.eval().requires_grad_(False)
    same = "in_channels out_channels block_out_channels layers_per_block norm_num_groups cross_attention_dim"
    moving = {k: config[k] for k in same.split()}
    moving |= {k: [x.replace("2D", "Motion") for x in config[k]] for k in ("down_block_types", "up_block_types")}
    moving |= dict(num_attention_heads=config["attention_head_dim"],
                   motion_num_attention_heads=motion["motion_num_attention_heads"])
    return (twin(UNet2DConditionModel, config, ed.unet), twin(UNetMotionModel, moving, ed.unet),
            twin(AutoencoderKL, ed.vae.config, ed.vae))

# ---- the timing tables ----------------------------------------------------------------------------------------

# Fresh processes: import, load everything, encode the instruction, one U-Net step on one frame; then print the time.
COLD_OURS = """
import sys; root, folder, device, h = sys.argv[1:]; sys.path.insert(0, root)
import torch
from model import VideoEditor
ed = VideoEditor.from_pretrained(folder, motion=folder + "/motion", device=device)
with torch.inference_mode():
    z = torch.zeros(1, 1, ed.unet.config["in_channels"], int(h), int(h)).to(ed.device, ed.dtype)
    x = ed.unet(z, torch.tensor([500]).to(ed.device), ed.encode_text(["make it snow"]))
"""
COLD_THEIRS = """
import importlib.util, sys; root, folder, device, h = sys.argv[1:]
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
def load(cls, name):
    return cls.from_pretrained(folder + "/" + name, torch_dtype=dtype)
unet = UNetMotionModel.from_unet2d(load(UNet2DConditionModel, "unet"), load(MotionAdapter, "motion")).to(device, dtype)
vae, scheduler = load(AutoencoderKL, "vae").to(device), DDIMScheduler.from_pretrained(folder + "/scheduler")
ctx = torch.zeros(1, 77, unet.config.cross_attention_dim)          # transformers may be missing
with torch.inference_mode():
    if importlib.util.find_spec("transformers"):
        from transformers import CLIPTextModel, CLIPTokenizer
        ids = CLIPTokenizer.from_pretrained(folder + "/tokenizer")("make it snow", padding="max_length", max_length=77)
        ctx = load(CLIPTextModel, "text_encoder").to(device)(torch.tensor([ids.input_ids]).to(device)).last_hidden_state
    z = torch.zeros(1, unet.config.in_channels, 1, int(h), int(h)).to(device, dtype)
    x = unet(z, torch.tensor([500]).to(device), ctx.to(device, dtype)).sample
"""
COLD_END = """
import time; x.float().sum().item()                                # waits for the GPU
memory = open("/proc/self/status").read() if sys.platform == "linux" else "VmHWM: nan"
print("DONE", time.time(), time.process_time(), float(memory.split("VmHWM:")[1].split()[0]) / 2 ** 20)
"""


def finished(command):
    """Standard output of a Python program; UserError with its last words where it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"a timed program failed: {words[-1]}")
    return done.stdout


def cold_start(code, *args):
    """(wall seconds, CPU seconds, peak GB of main memory) from starting a process to the end of its first step."""
    began = time.time()
    end, cpu, memory = map(float, finished(["-c", code + COLD_END, *args]).split("DONE")[1].split())
    return end - began, cpu, memory


@torch.inference_mode()
def bench_networks(ed, motion, n_frames, size, runs, device):
    """One U-Net forward without motion, with it, with EPM, with FFG's two kinds of keys; then the VAE."""
    unet, h = ed.unet, size // ed.multiple
    z = torch.randn(1, n_frames, unet.config["in_channels"], h, h).to(device, ed.dtype)
    t, ctx = torch.tensor([500], device=device), ed.encode_text(["make it snow"])
    image, video, vae = twins(ed, motion) if DIFFUSERS else (None, None, None)

    def compare(what, ours, than, theirs, per=1):
        if not DIFFUSERS:
            return row(what, *timed([ours], runs, device), per=per)
        apart = (ours().float() - theirs().float()).abs().max()
        results = timed([ours, theirs], runs, device)
        row(what, results[0], f"diffusers {than}, values within {apart:.0e}", results[1], per)
    compare(f"U-Net, {n_frames} frames, without motion", lambda: unet(z, t, ctx, "image"), "UNet2DConditionModel",
            lambda: image(z[0], t, ctx.expand(n_frames, -1, -1)).sample[None])
    compare(f"U-Net, {n_frames} frames, with motion", lambda: unet(z, t, ctx), "UNetMotionModel",
            lambda: video(z.transpose(1, 2), t, ctx.repeat_interleave(n_frames, 0)).sample.transpose(1, 2))

    unet.add_epm()
    unet.to(device, ed.dtype)
    sites = [(m, m.epm) for m in unet.modules() if hasattr(m, "epm")]

    def forward(mode, keys="beside", epm=False):
        def call():
            unet.ffg_keys = keys
            for m, layer in sites:
                m._modules.update(epm=layer) if epm else m._modules.pop("epm", None)
            return unet(z, t, ctx, mode)
        return call
    epm, apart = timed([forward("video", epm=True), forward("video")], runs, device)
    row(f"U-Net, {n_frames} frames, with motion and EPM", epm, "with motion, frames not joined", apart)
    beside, instead = timed([forward("ffg"), forward("ffg", "instead")], runs, device)
    row(f"U-Net, {n_frames} frames, FFG, keys beside", beside, "keys instead", instead)

    n, dtype = ed.SLICE, next(ed.vae.parameters()).dtype           # frames in a slice
    x = torch.rand(n, 3, size, size).to(device, dtype) * 2 - 1
    z0 = torch.randn(n, ed.vae.config["latent_channels"], h, h).to(device, dtype)
    compare("VAE encode, per frame", lambda: ed.vae.encode(x)[0], "AutoencoderKL",
            lambda: vae.encode(x).latent_dist.mean, n)
    compare("VAE decode, per frame", lambda: ed.vae.decode(z0), "AutoencoderKL", lambda: vae.decode(z0).sample, n)


def bench_epm(config, n_frames, h, runs, device, dtype):
    """epm_attention against plain attention over the same joint tokens, at every level that has attention."""
    for i, (kind, width) in enumerate(zip(config["down_block_types"], config["block_out_channels"])):
        if "CrossAttn" not in kind:
            continue
        heads, length = config["attention_head_dim"], (-(-h // 2 ** i)) ** 2
        q, k, v = (torch.randn(1, n_frames * length, width, device=device, dtype=dtype) for _ in range(3))
        bias = torch.randn(1, n_frames, n_frames, device=device)
        times = max(1, 20_000_000 // (n_frames * length) ** 2)     # small ones repeat, to be measurable

        def repeat(f, *more, training):
            leaves = [x.clone().requires_grad_(training) for x in (q, k, v, *more)]
            for _ in range(times):
                y = f(*leaves[:3], heads, *leaves[3:])
                y.sum().backward() if training else None
        for name, training in (("EPM", False), ("EPM with gradients", True)):
            epm, plain = timed([lambda: repeat(epm_attention, bias, training=training),
                                lambda: repeat(attention, training=training)], runs, device)
            row(f"{name}, {n_frames}x{length} tokens, {heads} heads of {width // heads}", epm,
                "plain joint attention", plain, times)


def bench_model(model, size, n_frames, runs, steps, device):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_hub_folder(model, folder)
        gb = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2 ** 30
        h = size >> len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1
        print(f"\n**{model}: {gb:.2f} GB of weights, {n_frames} frames of {size}x{size}, latents {h}x{h}**\n\n"
              "| what | s | min | CPU s | peak GB | compared with | s | min | CPU s | peak GB | ratio | CPU ratio |\n|"
              + "---|" * 12, flush=True)
        codes = (COLD_OURS, COLD_THEIRS) if DIFFUSERS else (COLD_OURS,)
        cold = list(zip(*[[cold_start(code, ROOT, folder, device, h) for code in codes] for _ in range(runs)]))
        row("cold start to first step, files cached", cold[0], "diffusers", *cold[1:])
        # norm_over_frames: diffusers' statistics, so that both compute the same
        ed = VideoEditor.from_pretrained(folder, motion=folder / "motion", norm_over_frames=True, device=device)
        bench_networks(ed, read_json(folder / "motion" / "config.json"), n_frames, size, runs, device)
        bench_epm(ed.unet.config, n_frames, h, runs, device, ed.dtype)
        ed = None                                                  # edits have the default statistics and keys, no EPM
        ed = VideoEditor.from_pretrained(folder, motion=folder / "motion", device=device)
        for n in (n_frames, 32) if model == "tiny" else (n_frames,):
            frames = torch.rand(n, 3, size, size) * 2 - 1
            edit = [lambda: list(edit_stream(ed, frames, "make it snow", steps))]
            row(f"edit a {n}-frame clip, {steps} steps, FFG, once", *timed(edit, 1, device, warm=False))

# ---- scorers ------------------------------------------------------------------------------------------------

def random_scorer(role, model, device, dtype):
    """(network, its config) of tiny's or the published sizes, with random weights and the goldens' small vocabulary."""
    goldens = ROOT / "tests" / "goldens"
    words = [goldens / "clip-vit-large-patch14" / name for name in ("vocab.json", "merges.txt")]
    tokenizer = Tokenizer(*words, pad=0 if role == "viclip" else None)
    if model == "sd15":
        name = {"clip": "clip_vit_l14", "pick": "pickscore_h", "viclip": "viclip_l"}[role]
        config, side = read_json(goldens / f"{name}.json")["config"], 224
    else:
        vocab, side = {"vocab_size": len(tokenizer.vocab)}, 96
        config = (train.TINY_VICLIP | vocab if role == "viclip" else
                  dict(projection_dim=96, text_config=train.TINY_TEXT | vocab, vision_config=train.TINY_VISION))
    with torch.device("meta"):
        net = (metrics.ViCLIP if role == "viclip" else metrics.CLIP)(config)
    randomise(net)
    net.tokenizer = tokenizer
    if role != "viclip":
        net.preprocess = metrics.Preprocess(train.PREPROCESSOR | {"size": side, "crop_size": side})
    return net.to(device, dtype).eval(), config


def bench_scores(model, runs, device, n_frames=8):
    """Clips per second: preprocessing, both towers and the scores of one clip of 8 frames, its source and its captions,
    networks loaded already; transformers' CLIP on the same frames and weights, if it is installed."""
    dtype, side = torch.bfloat16 if device.type == "cuda" else torch.float32, 480 if model == "sd15" else 96
    source, edited = np.random.default_rng(0).integers(0, 256, (2, n_frames, side, side, 3), dtype=np.uint8)
    clip = dict(source=source, edits={"edit": edited}, source_caption="a red fox", target_caption="a red fox in the snow")

    print(f"\n**scorers of {model}, {n_frames} frames of {side}x{side}, source and edit**\n\n"
          "| scorer | clips/s | transformers: clips/s | ratio |\n|---|---|---|---|", flush=True)

    def line(name, functions):
        """Best of `runs`, of ours and of transformers'."""
        rates = [1 / min(wall for wall, *_ in out) for out in timed(functions, runs, device)]
        cells = [f"{rate:.3g}" for rate in rates] + ([f"{rates[0] / rates[1]:.2f}"] if len(rates) > 1 else ["", ""])
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    line("on pixels", [lambda: metrics.pixel_scores(source, edited)])
    for role in ("clip", "viclip") + ("pick",) * (model == "sd15"):
        net, config = random_scorer(role, model, device, dtype)
        work = [torch.no_grad()(lambda: metrics.network_scores(net, role, clip, metrics.as_seen(net, clip, {}, 0)))]
        if role == "clip" and TRANSFORMERS:
            work.append(transformers_clip(net, config, clip))
        line(role, work)
        del net, work                                        # one network in memory at a time


def transformers_clip(net, config, clip):
    """The same frames and caption through transformers' CLIP and processor settings, with our weights: a function."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    end = net.tokenizer([""]).max().item()
    config = config | {"text_config": config["text_config"] | {"eos_token_id": end}}
    theirs = CLIPModel(CLIPConfig(**config)).to(net.logit_scale.device, net.logit_scale.dtype).eval()
    theirs.load_state_dict(net.state_dict(), strict=False)         # position_ids are theirs alone
    side = net.preprocess.crop
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)

    @torch.no_grad()
    def work():
        for frames in (clip["source"], clip["edits"]["edit"]):
            theirs.get_image_features(processor(list(frames), return_tensors="pt")["pixel_values"].to(net.logit_scale))
        theirs.get_text_features(net.tokenizer([clip["target_caption"]]).to(net.logit_scale.device))
    return work


# ---- --training: one step of stage video, one candidate of curation ----------------------------------------------

def bench_training(model, size, n_frames, runs, steps, device):
    """A step of stage video on one clip as `train.fit` has it (float32 weights, bfloat16 arithmetic on CUDA; motion, gamma and
    EPM trained; optimizer and EMA counted), and curation's candidates: sampling and decoding, of one image in a batch, of
    one clip with FFG-V2V; for tiny also with the scores, the source's among them, and the filter. Nothing is written."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_hub_folder(model, folder)
        ed = VideoEditor.from_pretrained(folder, motion=folder / "motion", device=device)
        in_half = model == "tiny" and device.type == "cpu" and slower_in_bfloat16() < 5        # else it takes very long
        if in_half:
            half = VideoEditor.from_pretrained(folder, motion=folder / "motion", device=device, dtype="bfloat16")
    h, c, affordable = size // ed.multiple, ed.vae.config["latent_channels"], model == "tiny" or device.type == "cuda"
    line = partial(row, rate=True)
    print(f"\n**{model}, {n_frames} frames of {size}x{size}: training and curation; a second: candidates, clips**\n\n"
          "| what | a second | s | min | CPU s | peak GB | compared with | s | min | CPU s | peak GB | ratio | CPU ratio |\n|"
          + "---|" * 13, flush=True)
    z_src, z_T = torch.randn(1, n_frames, c, h, h).to(device), torch.randn(4, n_frames, c, h, h).to(device)

    def images():
        z0 = ed.sample(z_src[:, :1], "make it snow", z_T[:, :1], steps, mode="image")
        return ed.decode(z0.transpose(0, 1))

    def latents(ed=ed, steps=steps):
        anchor = ed.anchor(z_src[:, :1], "make it snow", z_T[:1, :1], steps)
        return ed.sample(z_src, "make it snow", z_T[:1], steps, mode="ffg", anchor=anchor)

    def clip(ed=ed, steps=steps):
        ed.decode(latents(ed, steps))
    line(f"image candidate, {steps} steps, 4 in a batch, not scored", *timed([images], 1, device), per=4)
    line(f"clip candidate, {steps} steps, FFG, not scored", *timed([clip], 1, device, warm=affordable))
    if model == "tiny":
        nets = {role: random_scorer(role, model, device, ed.dtype)[0] for role in ("clip", "viclip")}
        source = np.random.default_rng(0).integers(0, 256, (n_frames, size, size, 3), dtype=np.uint8)
        item = dict(task="", instruction="make it snow", source_caption="a red fox", target_caption="a red fox in the snow")
        st = SimpleNamespace(ed=ed, scorers=nets, opened=nets, square=0, limits=curate.THRESHOLDS["tiny"],
                             fitted={"weights": curate.VIDEO_WEIGHTS["tiny"]}, args=SimpleNamespace(device=device, no_filter=False))

        @torch.no_grad()
        def scored_images():
            edits = model.to_u8(images())
            metrics.image_scores(nets["clip"], None, source[0], [*edits, source[0]], item["source_caption"], item["target_caption"])
        line(f"image candidate, {steps} steps, 4 in a batch, scored", *timed([scored_images], 1, device), per=4)
        line(f"clip candidate, {steps} steps, FFG, scored", *timed([lambda: curate.finish_clip(
            st, item, source, z_src, latents(), [0], *([s] for s in ed.guidance))], 1, device))
    if in_half:
        clip(half, 1)                                              # warms up in one step
        own, other = timed([lambda: clip(half), clip], 1, device, warm=False)
        line(f"clip candidate, {steps} steps, FFG, bfloat16", own, "float32", other)

    unet = ed.unet
    unet.add_epm()
    unet.to(device, torch.float32)
    for name, p in unet.named_parameters():
        p.requires_grad_(train.is_new(name) or "motion_modules" in name)
    params = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)
    average = [p.detach().clone() for p in params]
    sample = (z_src[0], z_src[0], ed.encode_text(["make it snow"])[0].float(), torch.tensor(500, device=device),
              z_T[0], torch.ones(1, 1, 1, 1))
    sites = [(m, m.epm) for m in unet.modules() if hasattr(m, "epm")]

    no_text = ed.encode_text([""])[0].float()

    def step(epm, bf16=device.type == "cuda", guidance=None):
        def call():
            for m, layer in sites:
                m._modules.update(epm=layer) if epm else m._modules.pop("epm", None)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                train.clip_loss(unet, [sample], ed.scheduler, device, guidance).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for mean, p in zip(average, params):
                    mean.lerp_(p, 1e-3)
        return call
    if affordable:                                                 # full-size activations do not fit a CPU's memory
        line("training step, a clip, EPM", *timed([step(True)], runs, device))
        line("training step, a clip, no EPM", *timed([step(False)], runs, device))
        own, other = timed([step(True, guidance=(*ed.guidance, no_text)), step(True)], runs, device)
        line("training step, a clip, EPM, guided loss", own, "plain loss", other)
    if in_half:
        own, other = timed([step(True, bf16=True), step(True)], runs, device)
        line("training step, a clip, EPM, bfloat16", own, "float32", other)
    train.recompute(unet)
    line("training step, a clip, EPM, checkpointing", *timed([step(True)], runs, device, warm=model == "tiny"))
    line("training step, a clip, no EPM, checkpointing", *timed([step(False)], runs, device, warm=model == "tiny"))


# ---- --cost: the paper's schedule, counted ---------------------------------------------------------------------------

@torch.no_grad()
def operations(net, *inputs):
    """Floating-point operations of a call, a multiplication and its addition counted as two; on the meta device."""
    with FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops()


def bench_cost(size, tflops, n_frames=16, steps=20, branches=3):
    """The paper's numbers (sections 3.2, 3.3, 4.1), this repository's defaults where it gives none: candidates of a clip
    and training steps."""
    unet, vae, _, motion = configs("sd15")
    with torch.device("meta"):
        net, coder = UNet(unet), VAE(vae)
        net.add_motion(motion)
        net.add_epm("all", n_frames)
        c, h = vae["latent_channels"], size // 8

        def unet_call(n, mode):
            return operations(net, torch.empty(1, n, unet["in_channels"], h, h), torch.zeros(1), torch.empty(1, 77, 768), mode)
        image, ffg, video = unet_call(1, "image"), unet_call(n_frames + 1, "ffg"), unet_call(n_frames, "video")
        decoded = operations(coder.decode, torch.empty(1, c, h, h))
        encoded = operations(coder.encode, torch.empty(1, 3, size, size))
    defaults = train.VIDEO["sd15"]
    clips = defaults["steps"] * defaults["clip_batch"] * defaults["accumulate"]
    picture = 6 * size ** 2 + 2 * c * h * h * (steps + 1)
    clip = n_frames * (size ** 2 // 4 + 4 * c * h * h)
    sample = steps * branches
    print(f"\n**sd15, {size}x{size}: a U-Net call takes {image / 1e12:.2f} TFLOP for an image, {video / 1e12:.1f} for a clip of "
          f"{n_frames} frames**\n\n| stage | operations | hours at {tflops:g} TFLOP/s | disk, GB, at most |\n|---|---|---|---|")
    for what, flop, disk in (
            ("50 K images, 30 candidates", 50e3 * (encoded + 30 * (sample * image + decoded)), 50e3 * picture),
            ("25 K clips by FFG-V2V, 4 candidates", 25e3 * (n_frames * encoded + 4 * (sample * ffg + n_frames * decoded)), 25e3 * clip),
            ("two rounds of 16 K real clips, 4 candidates", 32e3 * (n_frames * encoded + 4 * (sample * video + n_frames * decoded)),
             32e3 * clip),
            (f"three trainings of {defaults['steps']} steps of {clips // defaults['steps']} clips", 3 * clips * 3 * video, 0)):
        print(f"| {what} | {flop:.2g} | {flop / tflops / 3.6e15:.0f} | {disk / 1e9:.0f} |")


# ---- --teachers: CogVideoX and LLaVA-OneVision ---------------------------------------------------------------------

# Without a GPU: the published layers, fewer and narrower; clips of 17 frames of 128x192, frames of 84x84
MINI_COG = dict(num_attention_heads=8, num_layers=4, text_embed_dim=128, sample_width=24, sample_height=16, sample_frames=17)
MINI_COG_VAE = dict(block_out_channels=[32, 64, 64, 128], norm_num_groups=8)
MINI_QWEN = dict(hidden_size=448, intermediate_size=2432, num_attention_heads=7, num_key_value_heads=1,
                 num_hidden_layers=12, vocab_size=20000)
MINI_SIGLIP = dict(hidden_size=288, image_size=84, intermediate_size=1076, num_attention_heads=4, num_hidden_layers=6)
NEW_TOKENS = 128


def random_teacher(cls, config, device, dtype):
    with torch.device("meta"):
        net = cls(config)
    randomise(net)
    return net.to(device, dtype).eval().requires_grad_(False)


@torch.inference_mode()
def bench_teachers(runs, device):
    """A denoising step and a decoded frame of CogVideoX, a new token of LLaVA-OneVision, with random weights: of full
    size on a GPU, miniatures without one; diffusers and transformers on the same weights where they are installed."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    cog, vae, llava = (read_json(ROOT / "tests" / "goldens" / f"{file}.json")["config"] for file in (
        "cogvideox_5b_i2v_transformer", "cogvideox_vae", "llava_onevision_qwen2_7b"))
    if not gpu:
        cog, vae = cog | MINI_COG, vae | MINI_COG_VAE
        llava = llava | dict(text_config=llava["text_config"] | MINI_QWEN, vision_config=llava["vision_config"] | MINI_SIGLIP)
    frames, h, w = cog["sample_frames"], cog["sample_height"], cog["sample_width"]
    print(f"\n**teachers, {'full size' if gpu else 'miniatures'}: CogVideoX {frames} frames of {8 * h}x{8 * w}; LLaVA-OneVision, "
          f"a clip of 8 frames, {NEW_TOKENS} new tokens**\n\n| what | s | min | CPU s | peak GB | compared with | s | min | "
          "CPU s | peak GB | ratio | CPU ratio |\n|" + "---|" * 12, flush=True)

    net = random_teacher(teachers.CogTransformer, cog, device, dtype)
    f = (frames - 1) // cog["temporal_compression_ratio"] + 1
    z, ctx = torch.randn(2, f, cog["in_channels"], h, w), torch.randn(2, cog["max_text_seq_length"], cog["text_embed_dim"])
    z, ctx, t = z.to(device, dtype), ctx.to(device, dtype), torch.tensor([500, 500], device=device)
    work = [lambda: net(z, ctx, t)]
    if DIFFUSERS:
        from diffusers import CogVideoXTransformer3DModel
        twin = same_weights(CogVideoXTransformer3DModel, cog, net)
        rope = [x.to(device) for x in teachers.rope_3d(f, h // 2, w // 2, cog["attention_head_dim"])]
        work.append(lambda: twin(z, ctx, t, image_rotary_emb=rope).sample)
    compare_teachers("CogVideoX, a denoising step, both guidance branches", work, runs, device)
    net = twin = work = None                                       # one network in memory at a time

    net = random_teacher(teachers.CogVAE, vae, device, dtype)
    z0 = torch.randn(1, f, vae["latent_channels"], h, w).to(device, dtype)
    work = [lambda: torch.cat(list(net.decode_chunks(z0)), dim=1)]
    if DIFFUSERS:
        from diffusers import AutoencoderKLCogVideoX
        twin = same_weights(AutoencoderKLCogVideoX, vae, net)
        work.append(lambda: twin.decode(z0.transpose(1, 2)).sample.transpose(1, 2))
    compare_teachers("CogVideoX, a decoded frame", work, runs, device, frames)
    net = twin = work = None

    net = random_teacher(teachers.LlavaOneVision, llava, device, dtype)
    net.end_ids = []                                               # never stops: all tokens count
    clip = np.random.default_rng(0).integers(0, 256, (8, net.size, net.size, 3), dtype=np.uint8)
    compare_teachers("LLaVA-OneVision, a frame of the clip seen", [lambda: net.look(clip)], runs, device, 8)
    rows = [net.language_model.model.embed_tokens(torch.randint(0, 1000, (1500,), device=device))]
    work = [lambda: net.generate_ids(rows, NEW_TOKENS)]
    if TRANSFORMERS:
        from transformers import Qwen2Config, Qwen2ForCausalLM
        twin = same_weights(Qwen2ForCausalLM, Qwen2Config(**llava["text_config"]), net.language_model)
        work.append(lambda: twin.generate(inputs_embeds=rows[0][None], max_new_tokens=NEW_TOKENS, do_sample=False,
                                          min_new_tokens=NEW_TOKENS, pad_token_id=0)[0].tolist())
    compare_teachers("LLaVA-OneVision, a new token after 1,500, cached", work, runs, device, NEW_TOKENS)


def same_weights(cls, config, ours):
    """diffusers' or transformers' network around our weights, shared, not copied."""
    place = next(ours.parameters())
    torch.set_default_dtype(place.dtype)
    with torch.device(place.device):                               # not meta: its tables of angles are computed here
        net = cls(**{k: v for k, v in config.items() if not k.startswith("_")}) if isinstance(config, dict) else cls(config)
    torch.set_default_dtype(torch.float32)
    net.load_state_dict(ours.state_dict(), assign=True)
    return net.eval().requires_grad_(False)


def compare_teachers(what, work, runs, device, per=1):
    results, apart = timed(work, runs, device), ""
    if len(work) > 1:
        ours, theirs = (f() for f in work)
        apart = (f"same tokens: {'yes' if ours[0] == theirs else 'no'}" if isinstance(theirs, list) else
                 f"values within {(ours.float() - theirs.float()).abs().max():.0e}")
    row(what, results[0], apart and f"{'transformers' if isinstance(theirs, list) else 'diffusers'}, {apart}",
        results[1] if apart else None, per)


# ---- --long and --detail --------------------------------------------------------------------------------------

def bench_long(device, size, steps, lengths=(200, 2000)):
    """Edit the beginning and the whole of a synthetic clip with sample.py, a process each: is memory the same?"""
    side = 2 * size
    print(f"\n**clip of {side}x{side} through sample.py, tiny at {size} px, {steps} steps**\n\n"
          "| frames | s | peak memory |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_hub_folder("tiny", folder)
        frames = (world.render(world.draw_scene(0), 48, side, side) * 255).round().astype(np.uint8)
        with video_writer(folder / "long.mp4", side, side, 25, Fraction(1, 25)) as write:
            for i in range(lengths[-1]):
                write(frames[min(i % 94, 94 - i % 94)], i, 1)      # there and back
        flags = ["--weights", folder, "--steps", steps, "--size", size, "--out", folder / "out.mp4", "--device", device]
        for n in lengths:
            began = time.time()
            said = finished([ROOT / "sample.py", folder / "long.mp4", "make it snow", "--frames", n, *flags])
            memory = said.split("peak memory ")[1].splitlines()[0]
            print(f"| {n} | {time.time() - began:.1f} | {memory} |", flush=True)


def detail_edits(kind, n, seed, domain):
    """n (scene, target scene, instruction): an effect by name, recolour, removal, addition or background."""
    found, k, task = [], 0, "object" if kind == "recolour" else kind
    while len(found) < n:
        k += 1
        scene = world.draw_scene(seed * 100_000 + k, domain, "held")
        if kind in world.EFFECTS:
            found.append((scene, replace(scene, post=scene.post + ((kind, 0),)), f"make it {kind}"))
        elif task in world.possible_tasks(scene):
            edit = world.propose_edit(scene, k, task, "held")
            same_kinds = [s.kind for s in edit.target.objects] == [s.kind for s in scene.objects]
            if edit.deterministic and (kind != "recolour" or same_kinds):
                found.append((scene, edit.target, edit.instruction))
    return found


def bench_detail(device, n, seed, domain, size, steps, full=384):
    """PSNR and SSIM to the truth drawn at `full` px of an edit known at `size` px, plainly resized or carried up.

    First of the truth itself, made small as sample.py makes the source small; then, once trained, of tiny's edits.
    """
    ed = VideoEditor.from_pretrained("tiny", device=device) if TRAINED else None
    for who in ("the truth", "tiny's edits") if ed else ("the truth",):
        print(f"\n**{who} at {size} px carried up to {full}; {domain} scenes, n = {n} a row, seed {seed}**\n\n"
              "| edit | PSNR resized | carried | SSIM resized | carried |\n|---|---|---|---|---|", flush=True)
        for kind in ("grayscale", "sepia", "night", "recolour", "removal", "addition", "background"):
            values = []
            for i, (scene, target, instruction) in enumerate(detail_edits(kind, n, seed, domain)):
                drawn = [torch.from_numpy(world.render(s, 1, full, full)[0]) for s in (scene, target)]
                large, exact = (x.permute(2, 0, 1).contiguous() * 2 - 1 for x in drawn)
                small, edit = resize(large, size, size), resize(exact, size, size)
                if who != "the truth":                             # with the source as the autoencoder sees it
                    edit, small = next(edit_stream(ed, [small], instruction, steps, seed=i, mode="image",
                                                   with_source=True))
                carried = carry_detail(small[None], edit[None], large[None].to(edit))[0]
                pair = [(x.permute(1, 2, 0).cpu().numpy() + 1) / 2 for x in (resize(edit, full, full), carried)]
                values.append([f(x, drawn[1].numpy()) for f in (metrics.psnr, metrics.ssim) for x in pair])
            v = np.mean(values, axis=0)
            print(f"| {kind} | {v[0]:.2f} | {v[1]:.2f} | {v[2]:.4f} | {v[3]:.4f} |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="both", choices=["tiny", "sd15", "both"], help="sd15 has random weights")
    p.add_argument("--size", type=int, help="frame side in pixels; default 64 tiny, 128 sd15 (512 on a GPU)")
    p.add_argument("--frames", type=int, default=16, help="frames of a clip, 1 to 16")
    p.add_argument("--steps", type=int, help="of a whole edit; default 20, for --long and sd15 without a GPU 2")
    p.add_argument("--runs", type=int, default=3, help="timed calls of each, after one to warm up")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    p.add_argument("--long", action="store_true", help="instead: tiny on a 2,000-frame clip")
    p.add_argument("--training", action="store_true", help="instead: a training step, and candidates of curation")
    p.add_argument("--teachers", action="store_true", help="instead: CogVideoX and LLaVA-OneVision")
    p.add_argument("--cost", action="store_true", help="instead: what the paper's schedule takes, counted")
    p.add_argument("--tflops", type=float, default=100, help="--cost: operations a second of the GPU, in 1e12; the default "
                   "is a guess for a large one")
    p.add_argument("--detail", action="store_true", help="instead: edits carried to the source's resolution")
    p.add_argument("--n", type=int, default=24, help="--detail: scenes per kind of edit")
    p.add_argument("--seed", type=int, default=0, help="--detail: which scenes")
    p.add_argument("--domain", default="synthetic", choices=["synthetic", "real"], help="--detail: kind of scenes")
    args = p.parse_args()
    if (args.size or 32) % 32 or not 1 <= args.frames <= 16 or min(args.runs, args.n, args.steps or 1) < 1:
        raise UserError("--size needs a multiple of 32, --frames 1 to 16, --runs, --n and --steps 1 or more")
    check_device(args.device)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    print(f"{torch.cuda.get_device_name(device) if gpu else platform.machine()}, {torch.get_num_threads()} of "
          f"{os.cpu_count()} CPU threads, load {os.getloadavg()[0]:.1f} at the start, torch {torch.__version__}, "
          f"{'bfloat16' if gpu else 'float32'}; median and best of {args.runs} calls"
          + ("" if DIFFUSERS else "; diffusers is not installed: nothing to compare with"))
    if args.long:
        return bench_long(device, args.size or 64, args.steps or 2)
    if args.teachers:
        return bench_teachers(args.runs, device)
    if args.cost:
        for size in (args.size,) if args.size else (256, 512):
            bench_cost(size, args.tflops)
        return
    if args.detail:
        return bench_detail(device, args.n, args.seed, args.domain, args.size or 64, args.steps or 20)
    for model in ("tiny", "sd15") if args.model == "both" else (args.model,):
        size = args.size or (64 if model == "tiny" else 512 if gpu else 128)
        steps = args.steps or (20 if model == "tiny" or gpu else 2)
        if args.training:
            bench_training(model, size, args.frames, args.runs, steps, device)
            continue
        bench_model(model, size, args.frames, args.runs, steps, device)
        bench_scores(model, args.runs, device)
    if args.training:
        return
    print("""
Peak GB counts the weights too (ours and diffusers' share them). CPU s adds up all threads. EPM with gradients or on a
GPU appends 16 columns to queries and keys, padded to a multiple of 8: an unpadded width would lose CUDA's fused
kernels, and they run heads of 40 as 64 wide anyway, so there the bias is free. A CPU pays for every column: without
gradients it adds the bias as a row over the keys for each frame of queries instead.""")


if __name__ == "__main__":
    run(main)
