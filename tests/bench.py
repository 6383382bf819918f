"""Seconds and peak memory on this machine, as Markdown tables.

    python tests/bench.py                  an edit and its networks: tiny, and full size (sd15)
    python tests/bench.py --long           tiny on a 2,000-frame clip: is memory flat?
    python tests/bench.py --training       training steps of a round, candidates of curation
    python tests/bench.py --teachers       CogVideoX and LLaVA-OneVision: full size on a GPU, else miniatures
    python tests/bench.py --cost           operations and disk of the paper's schedule, counted, not timed

Weights are random: the speed is the same. Where diffusers or transformers is installed, its modules are timed
on the same weights in the same run, in turns, and the largest difference of the values is printed.
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
from contextlib import redirect_stdout
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import curate  # noqa: E402
import teachers  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402
from model import (N_FRAMES, VAE, TextEncoder, UNet, UserError, VideoEditor, frame_positions,  # noqa: E402
                   read_json, run, save_tensors, write_json)
from sample import edit_stream, known_device, video_writer  # noqa: E402

TINY, GOLDENS = ROOT / "assets" / "tiny", ROOT / "tests" / "goldens"
DIFFUSERS = importlib.util.find_spec("diffusers") is not None
TRANSFORMERS = importlib.util.find_spec("transformers") is not None
TIMES = "s", "min", "CPU s", "peak GB"
COLUMNS = "what", "a second", *TIMES, "compared with", *TIMES, "ratio", "CPU ratio"
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
WEIGHTS = "diffusion_pytorch_model.safetensors"


# ---- measuring -------------------------------------------------------------------------------------------

def peak(device, reset=False):
    """GB held at most since the last reset, weights too: what torch took of the GPU, else the process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():                                          # not Linux
        return float("nan")
    if reset:                                                      # 5: high-water mark = present size
        mark.write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(functions, runs, device, warm=True):
    """Call the functions in turns, `runs` times each, after one call to warm up. Returns for each a list of
    (wall seconds, CPU seconds, peak GB); CPU seconds add up all threads and hardly notice other programs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)                       # else the peak holds what earlier rows freed
    results = [[] for _ in functions]
    for k in range(-warm, runs):
        for f, out in zip(functions, results):
            peak(device, reset=True)
            wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            f()
            wait(device)
            if k >= 0:
                out.append((time.perf_counter() - wall, time.process_time() - cpu, peak(device)))
    return results


def row(what, ours, than="", theirs=None, per=1):
    """A table line: how many a second; median and best wall time, best CPU time, of one; peak; ratios of the
    best. per: how many a call makes."""
    def cells(values):
        wall, cpu, memory = zip(*values)
        times = statistics.median(wall), min(wall), min(cpu)
        return [f"{x / per:.3g}" for x in times] + [f"{max(memory):.2f}"]
    right = [""] * 7
    if theirs:
        best = [min(x[k] for x in ours) / max(min(x[k] for x in theirs), 1e-9) for k in (0, 1)]
        right = [than, *cells(theirs), *(f"{x:.2f}" for x in best)]
    rate = f"{per / min(wall for wall, *_ in ours):.3g}"
    print("| " + " | ".join([what, rate, *cells(ours), *right]) + " |", flush=True)


def beside(what, ours, name, theirs, runs, device, per=1):
    """A row of ours, beside the same of diffusers or transformers; theirs: None where it is missing."""
    if theirs is None:
        return row(what, *timed([ours], runs, device), per=per)
    a, b = ours(), theirs()
    if isinstance(a, list):
        apart = f"same tokens: {'yes' if a == b else 'no'}"
    else:
        apart = f"values within {(a.float() - b.float()).abs().max():.0e}"
    results = timed([ours, theirs], runs, device)
    row(what, results[0], f"{name}, {apart}", results[1], per)


# ---- weights ---------------------------------------------------------------------------------------------

def configs(model):
    """U-Net, VAE, text encoder and motion adapter, in diffusers' and transformers' keys."""
    if model == "sd15":
        files = "ip2p_unet", "ip2p_vae", "clip_text_l", "motion_adapter_v1-5-2"
        return [read_json(GOLDENS / f"{name}.json")["config"] for name in files]
    unet, vae, text = (read_json(TINY / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    motion = unet["motion"]
    return {k: v for k, v in unet.items() if k not in VideoEditor.VIDEO}, vae, text, motion


def randomise(network):
    """Values for a network on the meta device: uniform with variance 1 / (3 fan-in); norms 1, biases 0."""
    network.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim > 1:
                p.uniform_(-1, 1).mul_(p[0].numel() ** -0.5)
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    return network


def write_hub_folder(model, folder):
    """Random weights as folder/{unet,vae,text_encoder,tokenizer,scheduler,motion}."""
    unet, vae, text, motion = configs(model)
    with torch.device("meta"):
        networks = UNet(unet), VAE(vae), TextEncoder(text)
        networks[0].add_motion(motion)
    tensors = [randomise(network).state_dict() for network in networks]
    moving = {k: v for k, v in tensors[0].items() if "motion_modules" in k and "gamma" not in k}
    still = {k: v for k, v in tensors[0].items() if "motion_modules" not in k}
    for name, config, x, file in (("motion", motion, moving, WEIGHTS), ("unet", unet, still, WEIGHTS),
                                  ("vae", vae, tensors[1], WEIGHTS), ("text_encoder", text, tensors[2],
                                                                      "model.safetensors")):
        (folder / name).mkdir(parents=True)
        save_tensors(folder / name / file, x)
        write_json(folder / name / "config.json", config)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(TINY / name, folder / name)
    if model == "tiny":
        shutil.copy(TINY / "model_index.json", folder)


def twins(ed, motion):
    """diffusers' image U-Net, motion U-Net and VAE around the editor's weights, shared, not copied."""
    if not DIFFUSERS:
        return None, None, None
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNetMotionModel
    config, place = ed.unet.config, (ed.device, ed.dtype)

    def twin(cls, cfg, network):
        with torch.device("meta"):
            net = cls(**{k: v for k, v in cfg.items() if not k.startswith("_")})
        names, ours = net.state_dict(), network.state_dict()   # diffusers stores position tables, we do not
        net.load_state_dict({k: frame_positions(*v.shape[1:], *place) if k.endswith(".pe") else ours[k]
                             for k, v in names.items()}, assign=True)
        return net.eval().requires_grad_(False)
    same = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
            "cross_attention_dim")
    moving = {k: config[k] for k in same}
    for k in ("down_block_types", "up_block_types"):
        moving[k] = [x.replace("2D", "Motion") for x in config[k]]
    moving |= {"num_attention_heads": config["attention_head_dim"],
               "use_motion_mid_block": motion.get("use_motion_mid_block", False),
               "motion_num_attention_heads": motion["motion_num_attention_heads"]}
    return (twin(UNet2DConditionModel, config, ed.unet), twin(UNetMotionModel, moving, ed.unet),
            twin(AutoencoderKL, ed.vae.config, ed.vae))


# ---- an edit and its networks ----------------------------------------------------------------------------

@torch.inference_mode()
def bench_networks(ed, motion, n_frames, size, runs, device):
    """The VAE, and one U-Net forward without motion, with it, with EPM."""
    unet, h = ed.unet, size // ed.multiple
    z = torch.randn(1, n_frames, unet.config["in_channels"], h, h).to(device, ed.dtype)
    t, ctx = torch.tensor([500], device=device), ed.encode_text(["make it snow"])
    n, dtype = ed.SLICE, next(ed.vae.parameters()).dtype           # frames in a slice
    x = torch.rand(n, 3, size, size).to(device, dtype) * 2 - 1
    z0 = torch.randn(n, ed.vae.config["latent_channels"], h, h).to(device, dtype)
    image, video, vae = twins(ed, motion)

    def still():
        return image(z[0], t, ctx.expand(n_frames, -1, -1)).sample[None]

    def moving():
        return video(z.transpose(1, 2), t, ctx.repeat_interleave(n_frames, 0)).sample.transpose(1, 2)
    beside(f"U-Net, {n_frames} frames, without motion", lambda: unet(z, t, ctx, "image"),
           "diffusers UNet2DConditionModel", image and still, runs, device)
    beside(f"U-Net, {n_frames} frames, with motion", lambda: unet(z, t, ctx), "diffusers UNetMotionModel",
           video and moving, runs, device)
    beside("VAE encode, per frame", lambda: ed.vae.encode(x)[0], "diffusers AutoencoderKL",
           vae and (lambda: vae.encode(x).latent_dist.mean), runs, device, n)
    beside("VAE decode, per frame", lambda: ed.vae.decode(z0), "diffusers AutoencoderKL",
           vae and (lambda: vae.decode(z0).sample), runs, device, n)
    plain = timed([lambda: unet(z, t, ctx)], runs, device)[0]
    unet.add_epm()
    unet.to(device, ed.dtype)
    row(f"U-Net, {n_frames} frames, with motion and EPM", *timed([lambda: unet(z, t, ctx)], runs, device),
        "with motion, frames not joined", plain)


def bench_model(model, folder, size, n_frames, runs, steps, device):
    gb = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2 ** 30
    motion = read_json(folder / "motion" / "config.json")
    ed = VideoEditor.from_pretrained(folder, motion=folder / "motion", device=device)
    print(f"\n**{model}: {gb:.2f} GB of weights, {n_frames} frames of {size}x{size}**\n\n{HEAD}", flush=True)
    frames = torch.rand(n_frames, 3, size, size) * 2 - 1
    edit, = timed([lambda: list(edit_stream(ed, frames, "make it snow", steps))], 1, device, warm=False)
    row(f"a frame of an edit, {steps} steps, FFG", edit, per=n_frames)
    # diffusers' statistics over frames, so that both compute the same
    ed = VideoEditor.from_pretrained(folder, motion=folder / "motion", norm_over_frames=True, device=device)
    bench_networks(ed, motion, n_frames, size, runs, device)


def bench_long(device, size, steps, lengths=(200, 2000)):
    """Edit the beginning and the whole of a clip with sample.py, a process each: is memory the same?"""
    side = 2 * size
    print(f"\n**clip of {side}x{side} through sample.py, tiny at {size} px, {steps} steps**\n\n"
          "| frames | s | peak memory |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        video, out = f"{folder}/long.mp4", f"{folder}/out.mp4"
        frames = world.quantise(world.render(world.draw_scene(0), 48, side, side))
        with video_writer(Path(video), side, side, 25, Fraction(1, 25)) as write:
            for i in range(lengths[-1]):
                write(frames[min(i % 94, 94 - i % 94)], i, 1)      # there and back
        for n in lengths:
            command = [sys.executable, ROOT / "sample.py", video, "make it snow", "--frames", n, "--out", out,
                       "--weights", "tiny", "--steps", steps, "--size", size, "--device", device]
            began = time.time()
            done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"sample.py failed: {done.stderr.strip().splitlines()[-1:]}")
            memory = done.stdout.split("peak memory ")[1].splitlines()[0]
            print(f"| {n} | {time.time() - began:.1f} | {memory} |", flush=True)


# ---- --training: a step of a round, a candidate of curation ----------------------------------------------

def bench_curation(model, ed, size, n_frames, steps, device, folder):
    """Candidates sampled and decoded; of tiny also all of it: drawn, scored, judged by the truth, written."""
    c, h = ed.vae.config["latent_channels"], size // ed.multiple
    z_src, z_T = (torch.randn(k, n_frames, c, h, h).to(device) for k in (1, 4))

    def images():
        z0 = ed.sample(z_src[:, :1], "make it snow", z_T[:, :1], steps, mode="image")
        ed.decode(z0.transpose(0, 1))

    def clip():
        anchor = ed.anchor(z_src[:, :1], "make it snow", z_T[:1, :1], steps)
        ed.decode(ed.sample(z_src, "make it snow", z_T[:1], steps, mode="ffg", anchor=anchor))
    row(f"image candidate, {steps} steps, 4 in a batch", *timed([images], 1, device), per=4)
    row(f"clip candidate, {steps} steps, FFG", *timed([clip], 1, device, warm=model == "tiny"))
    if model != "tiny":
        return
    how, edited = curate.How(device=str(device)), {"weights": "tiny", "filter": False}
    a, b = folder / "images", folder / "clips"
    pictures = curate.Images(n=1, candidates=4, steps=steps, **edited)
    videos = curate.Videos(images=str(a), clips=str(b), candidates=1, **edited)
    with redirect_stdout(sys.stderr):
        first, = timed([lambda: curate.images(a, pictures, how)], 1, device, warm=False)
        curate.clips(b, curate.Clips(images=str(a)), how)
        second, = timed([lambda: curate.videos(folder / "videos", videos, how)], 1, device, warm=False)
    row(f"curate.py images, a candidate, {steps} steps, networks loaded", first, per=4)
    row(f"curate.py videos, a candidate, {steps} steps, networks loaded", second)


def bench_training(model, folder, size, n_frames, runs, steps, device):
    """A step of a round on one clip as `train.fit` has it: motion, gamma and EPM trained; optimizer and
    average counted; float32 weights, bfloat16 arithmetic on CUDA."""
    ed = VideoEditor.from_pretrained(folder, motion=folder / "motion", device=device)
    print(f"\n**{model}, {n_frames} frames of {size}x{size}: training and curation**\n\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as data:
        bench_curation(model, ed, size, n_frames, steps, device, Path(data))
    c, h = ed.vae.config["latent_channels"], size // ed.multiple
    unet = ed.unet
    unet.add_epm()
    unet.to(device, torch.float32)
    for name, p in unet.named_parameters():
        p.requires_grad_("motion_modules" in name or ".epm." in name)
    params = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)
    average = [p.detach().clone() for p in params]
    z0, z_src, eps = torch.randn(3, n_frames, c, h, h)
    text, no_text = ed.encode_text(["make it snow", ""]).float().cpu()
    sample = z0, z_src, text, torch.tensor(500), eps, torch.ones(1, 1, 1, 1)

    def step(guidance=None):
        def call():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                train.clip_loss(unet, [sample], ed.scheduler, device, guidance).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for mean, p in zip(average, params):
                    mean.lerp_(p, 1e-3)
        return call
    if model == "tiny" or device.type == "cuda":               # full-size activations are too much for a CPU
        guided, plain = timed([step((*ed.guidance, no_text)), step()], runs, device)
        row("training step, a clip", plain)
        row("training step, a clip, guided loss", guided, "plain loss", plain)
    train.recompute(unet)
    row("training step, a clip, checkpointing", *timed([step()], runs, device, warm=model == "tiny"))


# ---- --cost: the paper's schedule, counted ---------------------------------------------------------------

@torch.no_grad()
def operations(net, *inputs, **how):
    """Floating-point operations of a call, a multiplication and its addition counted as two; meta device."""
    with FlopCounterMode(display=False) as counter:
        net(*inputs, **how)
    return counter.get_total_flops()


def full_size():
    """The networks whose operations are counted, on the meta device."""
    unet, vae, _, motion = configs("sd15")
    with torch.device("meta"):
        net, coder = UNet(unet), VAE(vae)
        net.add_motion(motion)
        net.add_epm("all", N_FRAMES)
    return net, coder


def bench_cost(net, coder, size, tflops, steps=20, branches=3):
    """The paper's numbers (sections 3.2, 3.3, 4.1); what it does not give, candidates of a clip and training
    steps, as here by default."""
    c, h = coder.config["latent_channels"], size // 8

    def count(function, *shapes, **how):
        return operations(function, *(torch.empty(shape, device="meta") for shape in shapes), **how)

    def unet_call(n, mode):
        return count(net, (1, n, 2 * c, h, h), (1,), (1, 77, net.config["cross_attention_dim"]), mode=mode)
    image, ffg, video = unet_call(1, "image"), unet_call(N_FRAMES + 1, "ffg"), unet_call(N_FRAMES, "video")
    decoded, encoded = count(coder.decode, (1, c, h, h)), count(coder.encode, (1, 3, size, size))
    s = train.ROUND["sd15"]
    clips = s.steps * s.batch * s.accumulate
    picture = 6 * size ** 2 + 2 * c * h * h * (steps + 1)          # bytes: two PNG, a trajectory
    clip = N_FRAMES * (size ** 2 // 4 + 4 * c * h * h)             # two mp4, two sets of latents
    calls = steps * branches

    def edited(n, candidates, unet):                               # n frames, encoded, edited, decoded
        return n * encoded + candidates * (calls * unet + n * decoded)
    rows = [("50 K images, 30 candidates", 50e3 * edited(1, 30, image), 50e3 * picture),
            ("25 K clips by FFG-V2V, 4 candidates", 25e3 * edited(N_FRAMES, 4, ffg), 25e3 * clip),
            ("two rounds of 16 K real clips, 4 candidates", 32e3 * edited(N_FRAMES, 4, video), 32e3 * clip),
            (f"three trainings of {s.steps} steps of {clips // s.steps} clips", 3 * clips * 3 * video, 0)]
    print(f"\n**sd15, {size}x{size}: a U-Net call takes {image / 1e12:.2f} TFLOP for an image, "
          f"{video / 1e12:.1f} for a clip of {N_FRAMES} frames**\n\n"
          f"| stage | operations | hours at {tflops:g} TFLOP/s | disk, GB, at most |\n|---|---|---|---|")
    for what, flop, disk in rows:
        print(f"| {what} | {flop:.2g} | {flop / tflops / 3.6e15:.0f} | {disk / 1e9:.0f} |")


# ---- --teachers: CogVideoX and LLaVA-OneVision -----------------------------------------------------------

# Without a GPU: the published layers, fewer and narrower; clips of 17 frames of 128x192, frames of 84x84
MINI_COG = {"num_attention_heads": 8, "num_layers": 4, "text_embed_dim": 128, "sample_width": 24,
            "sample_height": 16, "sample_frames": 17}
MINI_COG_VAE = {"block_out_channels": [32, 64, 64, 128], "norm_num_groups": 8}
MINI_QWEN = {"hidden_size": 448, "intermediate_size": 2432, "num_attention_heads": 7,
             "num_key_value_heads": 1, "num_hidden_layers": 12, "vocab_size": 20000}
MINI_SIGLIP = {"hidden_size": 288, "image_size": 84, "intermediate_size": 1076, "num_attention_heads": 4,
               "num_hidden_layers": 6}
NEW_TOKENS = 128


def random_teacher(cls, config, device, dtype):
    with torch.device("meta"):
        net = cls(config)
    return randomise(net).to(device, dtype).eval().requires_grad_(False)


def same_weights(cls, config, ours):
    """diffusers' or transformers' network around our weights, shared, not copied."""
    place = next(ours.parameters())
    torch.set_default_dtype(place.dtype)
    with torch.device(place.device):                           # not meta: its tables of angles are computed
        if isinstance(config, dict):
            net = cls(**{k: v for k, v in config.items() if not k.startswith("_")})
        else:
            net = cls(config)
    torch.set_default_dtype(torch.float32)
    net.load_state_dict(ours.state_dict(), assign=True)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def bench_cogvideox(cog, vae, runs, device, dtype):
    frames, h, w = cog["sample_frames"], cog["sample_height"], cog["sample_width"]
    f, theirs = (frames - 1) // cog["temporal_compression_ratio"] + 1, None
    net = random_teacher(teachers.CogTransformer, cog, device, dtype)
    z = torch.randn(2, f, cog["in_channels"], h, w).to(device, dtype)
    ctx = torch.randn(2, cog["max_text_seq_length"], cog["text_embed_dim"]).to(device, dtype)
    t = torch.tensor([500, 500], device=device)
    if DIFFUSERS:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
        twin = same_weights(CogVideoXTransformer3DModel, cog, net)
        rope = [x.to(device) for x in teachers.rope_3d(f, h // 2, w // 2, cog["attention_head_dim"])]

        def theirs():
            return twin(z, ctx, t, image_rotary_emb=rope).sample
    beside(f"CogVideoX, {frames} frames of {8 * h}x{8 * w}, a guided step", lambda: net(z, ctx, t),
           "diffusers", theirs, runs, device)
    net = twin = theirs = None                                     # one network in memory at a time
    coder = random_teacher(teachers.CogVAE, vae, device, dtype)
    z0 = torch.randn(1, f, vae["latent_channels"], h, w).to(device, dtype)
    if DIFFUSERS:
        other = same_weights(AutoencoderKLCogVideoX, vae, coder)

        def theirs():
            return other.decode(z0.transpose(1, 2)).sample.transpose(1, 2)
    beside("CogVideoX, a decoded frame", lambda: torch.cat(list(coder.decode_chunks(z0)), dim=1), "diffusers",
           theirs, runs, device, frames)


@torch.inference_mode()
def bench_llava(config, runs, device, dtype):
    net = random_teacher(teachers.LlavaOneVision, config, device, dtype)
    net.end_ids = []                                               # never stops: all tokens count
    clip = np.random.default_rng(0).integers(0, 256, (8, net.size, net.size, 3), dtype=np.uint8)
    theirs = None
    row("LLaVA-OneVision, a frame of a clip of 8 seen", *timed([lambda: net.look(clip)], runs, device), per=8)
    rows = [net.language_model.model.embed_tokens(torch.randint(0, 1000, (1500,), device=device))]
    if TRANSFORMERS:
        from transformers import Qwen2Config, Qwen2ForCausalLM
        twin = same_weights(Qwen2ForCausalLM, Qwen2Config(**config["text_config"]), net.language_model)

        def theirs():
            made = twin.generate(inputs_embeds=rows[0][None], max_new_tokens=NEW_TOKENS, do_sample=False,
                                 min_new_tokens=NEW_TOKENS, pad_token_id=0)
            return made[0].tolist()
    beside("LLaVA-OneVision, a new token after 1,500", lambda: list(net.generate_ids(rows, NEW_TOKENS)[0]),
           "transformers", theirs, runs, device, NEW_TOKENS)


def bench_teachers(runs, device):
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    cog, vae, llava = (read_json(GOLDENS / f"{file}.json")["config"] for file in (
        "cogvideox_5b_i2v_transformer", "cogvideox_vae", "llava_onevision_qwen2_7b"))
    if not gpu:
        cog, vae = cog | MINI_COG, vae | MINI_COG_VAE
        llava |= {"text_config": llava["text_config"] | MINI_QWEN,
                  "vision_config": llava["vision_config"] | MINI_SIGLIP}
    print(f"\n**teachers, {'full size' if gpu else 'miniatures'}**\n\n{HEAD}", flush=True)
    bench_cogvideox(cog, vae, runs, device, dtype)
    bench_llava(llava, runs, device, dtype)


# ---- command line ----------------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="both", choices=["tiny", "sd15", "both"])
    p.add_argument("--size", type=int, help="frame side, pixels; default 64 tiny, 128 sd15 (512 on a GPU)")
    p.add_argument("--frames", type=int, default=N_FRAMES, help=f"frames of a clip, 1 to {N_FRAMES}")
    p.add_argument("--steps", type=int, help="of an edit; default 20, for --long and sd15 without a GPU 2")
    p.add_argument("--runs", type=int, default=3, help="timed calls of each, after one to warm up")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=known_device)
    p.add_argument("--long", action="store_true", help="instead: tiny on a 2,000-frame clip")
    p.add_argument("--training", action="store_true", help="instead: a training step, candidates of curation")
    p.add_argument("--teachers", action="store_true", help="instead: CogVideoX and LLaVA-OneVision")
    p.add_argument("--cost", action="store_true", help="instead: what the paper's schedule takes, counted")
    p.add_argument("--tflops", type=float, default=100, help="--cost: 1e12 operations a second; a guess")
    args = p.parse_args()
    if (args.size or 32) % 32 or not 1 <= args.frames <= N_FRAMES or min(args.runs, args.steps or 1) < 1:
        raise UserError(f"--size: a multiple of 32; --frames: 1 to {N_FRAMES}; --runs and --steps: 1 or more")
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else platform.machine()
    dtype = "bfloat16" if gpu else "float32"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads"
    print(f"{name}, {threads}, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, {dtype}; median and "
          f"best of {args.runs} calls. Peak GB counts weights, CPU s all threads"
          + ("" if DIFFUSERS else "; diffusers is not installed: nothing to compare with"))
    if args.long:
        return bench_long(device, args.size or 64, args.steps or 2)
    if args.teachers:
        return bench_teachers(args.runs, device)
    if args.cost:
        networks = full_size()
        for size in (args.size,) if args.size else (256, 512):
            bench_cost(*networks, size, args.tflops)
        return
    for model in ("tiny", "sd15") if args.model == "both" else (args.model,):
        size = args.size or (64 if model == "tiny" else 512 if gpu else 128)
        steps = args.steps or (20 if model == "tiny" or gpu else 2)
        bench = bench_training if args.training else bench_model
        with tempfile.TemporaryDirectory() as folder:
            print(f"\nwriting the weights of {model} ...", file=sys.stderr)
            write_hub_folder(model, Path(folder))
            bench(model, Path(folder), size, args.frames, args.runs, steps, device)


if __name__ == "__main__":
    run(main)
