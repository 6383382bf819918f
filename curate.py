"""Curation: the paper's data synthesis and refinement. One step is one command, one folder in and one folder out.

    stage I      python curate.py images --weights tiny --to data/try/images --n 20
                 python curate.py clips  --images data/try/images --to data/try/clips
                 python curate.py videos --weights tiny --images data/try/images --clips data/try/clips --to data/try/round0
    stages II,   python curate.py cut    --from shapes --n 20 --to data/try/cut
    III          python curate.py write  --clips data/try/cut --to data/try/written
                 python curate.py real   --weights runs/tiny/round0 --from data/try/written --to data/try/round1
    then         python curate.py look data/try/images               one HTML page of it
                 python curate.py calibrate data/try/images          weights of the filter's total

Contents
    settings     How, Images ... Real: their fields are the flags
    a data set   read_rows, write_source, run_step
    candidates   Filter, draw_candidates, choose, consensus_scores
    steps        images, clips, videos, pairs, cut, write, real
    sources      readers of image pairs, pairs of clips and real videos; shots
    judging      calibrate, look; command line

A data set is a folder: settings.json says what made it, and every source is a folder <id>/ with candidates.json, one row a
candidate, kept or not, beside
    images          source.png target.png trajectory.safetensors {"trajectory": (steps + 1, c, h, w)}
    clips           source.mp4
    videos, real    source.mp4 target.mp4 latents.safetensors {"source", "target": (F, c, h, w)}
It is renamed into place whole, so a source is done when its folder is there: a killed run goes on where it was, and under
torchrun each process takes every n-th source. Latents are float16, those of clips unscaled: of the source the posterior
mode, of the target what was sampled, which spares it a trip through the autoencoder. Training reads latents; the mp4
(H.264, crf 16) are for people. A source whose candidates were all dropped shows its best one, without latents.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path
from random import Random

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import metrics
from model import (N_FRAMES, ROOT, UserError, VideoEditor, begin, fingerprint, need, part, portable, read_json,
                   read_tensors, reading, resize, run, to_rgb, to_tensor, to_u8, to_video, write_json, write_text)
from sample import (IMAGES, VIDEOS, Defaults, Parser, add_flags, frame_files, from_flags, known_device, option, probe,
                    read_frames, read_image, write_video)
from teachers import (COGVIDEOX, FIELDS, LLAVA, WRITER_TASKS, CogVideoX, LlavaOneVision, T5Encoder,  # noqa: F401
                      check_mix, clip_fault, write_instructions)
from world import (COLOURS, KINDS, OPERATIONS, SKIES, TASKS, TONES, Background, Scene, Shape, article, caption,
                   draw_scene, drawn_clip, drawn_origin, drawn_scene, possible_tasks, propose_edit, quantise, render,
                   true_clip, tune)

FPS = 8.0               # of every clip; videos are resampled to this rate, folders of frames are taken as they are
LONGEST = 3             # ours: long side of a frame in short ones, at most (films: 2.4)
# Guidance is drawn around the checkpoint's own: for 7.5 and 1.5 this is the paper's 5.0-12.5 (text), 1.2-2.0 (source)
TEXT_RANGE, SOURCE_RANGE = (2 / 3, 5 / 3), (0.8, 4 / 3)
# By scorers. A candidate below a threshold is out; the paper's thresholds and weights are not published.
THRESHOLDS = {
    "published": {
        # UltraEdit's free-form run script; its SSIM check is commented out there, and left out here
        "clip_sim_source": 0.2, "clip_sim_target": 0.2, "clip_sim_dir": 0.22, "clip_sim_image": 0.75, "dinov2_sim": 0.4,
        # ours: CLIPText as 100 x the same 0.2, the others somewhat below the averages in the paper's Table 1
        "clip_text": 20, "clip_frame": 0.85, "viclip_out": 0.2, "pick_score": 19},
    "tiny": {
        # ours, images: what most successful candidates lie above (tests/RESULTS.md)
        "clip_sim_dir": 0.2, "clip_sim_target_gain": -0.03, "consensus": 0.8,
        # ours, clips: what 95 % of the true edits of drawn clips lie above, once through the autoencoder
        "clip_text": 43, "viclip_out": 0.45, "clip_frame": 0.9}}
# The total's scores: the paper's six of an image and five of a clip but the held-out one, and ours: <score>_gain over
# the untouched source's, of clips the share of area `changed`, and `consensus_scores`' two. Their weights, until
# `calibrate` has fitted others: published, all equal; tiny, of images fitted to the truth of drawn scenes, of clips the
# same with their own gains in the place of the images'.
IMAGE_WEIGHTS = {"published": dict.fromkeys(("clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image",
                                             "dinov2_sim", "ssim"), 1),
                 "tiny": {"clip_sim_target_gain": 0.5, "consensus": 1.2, "certainty": 0.6}}
IMAGE_SCORES = (*IMAGE_WEIGHTS["published"], "clip_sim_target_gain", "consensus", "certainty")
VIDEO_WEIGHTS = {"published": dict.fromkeys((*metrics.WEIGHTS, "clip_text_gain", "viclip_out_gain"), 1),
                 "tiny": {"clip_text_gain": 0.5, "viclip_out_gain": 0.5, "consensus": 1.2, "certainty": 0.6}}
VIDEO_SCORES = (*VIDEO_WEIGHTS["published"], "changed", "consensus", "certainty")
DINO = "facebook/dinov2-with-registers-large"                      # UltraEdit's; only for the published scorers
PAPER_YIELD = {"images": "50 K images, 25 K kept", "videos": "25 K images, 9 K clips kept",
               "real 1": "16 K clips, 3,402 kept", "real 2": "16 K clips, 5,048 kept"}


# ---- settings: a dataclass a step; its fields are the flags and what settings.json holds ------------------

@dataclass
class How:
    """What changes no result, or hardly, and is stored nowhere."""
    device: str | None = None           # --device, in `main`
    dtype: str | None = option(None, "of the editor (default: bfloat16 on CUDA, else float32)",
                               choices=["float32", "bfloat16", "float16"])
    batch: int = option(0, "candidates at a time, fewer where memory is short (0: 30 of an image, 4 of a clip)", low=1)
    limit: int = option(-1, "new sources in this run, of every process (-1: all); run again to go on", low=1)
    force: bool = option(False, "go on although the settings changed")


@dataclass
class Edited:
    """Of all steps that edit, score and filter."""
    weights: str = option("", "tiny, sd15, a directory in hub layout, a trained run")
    candidates: int = option(4, "edits of a source", low=1)
    seed: int = option(0, "of guidance and noise, and of drawn scenes")
    filter: bool = option(True, "keep what passes it; --no-filter: the first candidate of every source")
    min: tuple[str, ...] = option((), "more thresholds, NAME=VALUE; -inf: none")
    score_weights: str = option("", "weights of the total, a file of calibrate")
    scorers: str = option("auto", "embedded networks or the hub's; auto: those that lie with the editor, else the hub's "
                          "if there is a GPU", choices=["auto", "tiny", "published"])
    clip: str = option("", "hub id or directory of another CLIP, or none")
    pick: str = option("", "the same for PickScore")
    viclip: str = option("", "the same for ViCLIP")
    judge: str = option("", "a LLaVA-OneVision: filter by its three chances of yes, too, each 0.5 or more")


@dataclass
class Images(Edited):
    candidates: int = option(30, "edits of a source", low=1)
    source: str = option("shapes", "shapes, or image pairs: parquet, folders, .jsonl", name="from")
    n: int = option(-1, "sources (-1: all; of shapes: 20)", low=1)
    steps: int = option(20, "sampling steps, also of the clips made from them", low=1)
    dino: str = option("", "hub id or directory of DINOv2, or none")
    judge: str = ""                     # it judges clips


@dataclass
class Clips:
    images: str = option("", "data set of `images`")
    animate: str | None = option(None, "how an image becomes a clip (default: world for drawn scenes, camera for others)",
                                 choices=["world", "camera", "cogvideox"])
    cogvideox: str = option(COGVIDEOX, "hub id or directory of the teacher")
    cogvideox_steps: int = option(50, "its sampling steps", low=1)
    seed: int = option(0, "of its noise")


@dataclass
class Videos(Edited):
    images: str = option("", "data set of `images`")
    clips: str = option("", "data set of `clips`, made of those images")
    motion: str = option("", "motion modules: hub id, directory or .ckpt, or none (default: the weights' own)")
    mode: str = option("ffg", "image: frame by frame, without the trajectory", choices=["ffg", "image"])


@dataclass
class Pairs(Edited):
    source: str = option("", "clips in InsV2V's layout", name="from")


@dataclass
class Cut:
    source: str = option("shapes", "shapes, or a folder of videos or JPEGImages", name="from")
    n: int = option(-1, "videos, or drawn scenes (-1: all; of shapes: 20)", low=1)
    per_video: int = option(2, "clips of a video, at most", low=1)
    seed: int = option(0, "of drawn scenes")


@dataclass
class Write:
    clips: str = option("", "data set of `cut`")
    writer: str = option("tiny", "tiny: CLIP and the drawn world's words; llava; or a file of text or JSON lines")
    clip: str = option("tiny", "the writer tiny's CLIP: tiny, hub id or directory")
    llava: str = option(LLAVA, "hub id or directory of the writer llava")
    lora: str = option("", "what train.py writer made of it")
    task_mix: tuple[str, ...] = option((), f"how often llava is asked for which task, TASK=WEIGHT (default: "
                                       f"{', '.join(WRITER_TASKS)} equally)")
    seed: int = option(0, "of the writer tiny's edits")


@dataclass
class Real(Edited):
    source: str = option("", "data set of `write`", name="from")
    round: int = option(1, "which round it is for", low=1)
    steps: int = option(20, "sampling steps", low=1)


# ---- a data set on disk ----------------------------------------------------------------------------------

SOURCE = "id", "order", "task", "instruction", "source_caption", "target_caption", "origin"     # of every row
GIVE_UP = 20            # sources that cannot be read, and none that can: it is not they that are broken


def ident(*parts):
    """Twelve hex digits from what a source is made of: the same source has the same id in every run."""
    return hashlib.sha1(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def finite(x):
    """NaN and infinity, which JSON does not know, become None."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_sources(folder):
    """[rows of one source] of a data set."""
    rows = [read_json(path, list) for path in Path(folder).glob("*/candidates.json")]
    with reading(folder, "pass a data set of curate.py"):
        need(rows, "holds no <id>/candidates.json")
        return sorted(rows, key=lambda rows: rows[0]["order"])


def read_rows(folder, kept=False):
    """The candidates [dict] of a data set in the order of their sources; kept: only those. UserError for none."""
    rows = [row for rows in read_sources(folder) for row in rows]
    if not kept:
        return rows
    if not any(row["kept"] for row in rows):
        advice = f"see why with python curate.py look {folder}, then lower a threshold with --min NAME=VALUE and another --to"
        raise UserError(f"{folder}: none of its {len(rows)} candidates was kept: {', '.join(losses(rows))}; {advice}")
    return [row for row in rows if row["kept"]]


def losses(rows):
    counts = Counter(name for row in rows for name in row["below"])
    return [f"{name} removed {n} of {len(rows)} candidates" for name, n in counts.most_common()]


def write_source(folder, rows, files):
    """A source's folder, which appears when it is whole. files: {name: rgb (H, W, 3), video (1, F, 3, H, W) or tensors}."""
    new = folder.parent / ".part" / folder.name
    shutil.rmtree(new, ignore_errors=True)                          # a kill's
    new.mkdir(parents=True)
    for name, data in files.items():
        if name.endswith(".png"):
            Image.fromarray(data).save(new / name)
        elif name.endswith(".mp4"):
            write_video(new / name, data, FPS)
        else:
            save_file({key: z.half().contiguous().cpu() for key, z in data.items()}, new / name)
    write_json(new / "candidates.json", [finite(row) for row in rows])
    os.replace(new, folder)


def my_share(sources):
    """Every n-th, where torchrun started n processes."""
    return sources[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]


def run_step(to, settings, sources, load, work, how, group=1, whole=False):
    """Load, work on and write every source that has no folder yet. sources: dicts with SOURCE, and what `load` needs.

    load(source) gives what `work` needs. Where it raises UserError the source is said and left out; it has no folder, so the
    next run tries it again. work(source, loaded) -> (rows of its candidates, files), or with a group, work([(source,
    loaded)]) yields those. Groups are always cut at the same sources; whole: one that is not done is done again whole.
    """
    begin(to, settings, how.force)
    mine = my_share(sources)
    groups = [mine[k:k + group] for k in range(0, len(mine), group)]
    groups = [members for members in groups if not all((to / source["id"]).is_dir() for source in members)]
    print(f"{to}: {len(sources)} sources, {shutil.disk_usage(to).free / 1e9:.1f} GB free")
    done, unread = 0, {}
    try:
        for members in tqdm(groups, desc=to.name, smoothing=0.1):
            if how.limit != -1 and done >= how.limit:
                break
            loaded = []
            for source in members:
                try:
                    if whole or not (to / source["id"]).is_dir():
                        loaded.append((source, load(source)))
                except UserError as error:
                    unread[source["id"]] = error
                    print(f"left out: {error}")
            if len(unread) >= min(GIVE_UP, len(sources)) and not any(to.glob("*/candidates.json")):
                raise UserError(f"{to}: the first {len(unread)} sources cannot be read, the last: {[*unread.values()][-1]}; see "
                                "that the disk is there and run the same again")
            for (source, _), (rows, files) in zip(loaded, work(loaded) if group > 1 else [work(*x) for x in loaded]):
                if (to / source["id"]).is_dir():
                    continue
                about = {key: source[key] for key in SOURCE}
                defaults = {"seed": None, "guidance": None, "scores": {}, "total": None, "below": [], "why": ""}
                rows = [about | {"candidate": k} | defaults | row for k, row in enumerate(rows)]
                write_source(to / source["id"], rows, files)
                done += 1
                if done == 1:
                    check_room(to / source["id"], len(mine))
    except UserError:
        if not any(to.glob("*/candidates.json")):                   # nothing was made with these settings
            (to / "settings.json").unlink()
            with suppress(OSError):
                to.rmdir()
        raise
    rows = read_rows(to)
    print(f"{to}: {len({row['id'] for row in rows if row['kept']})} of {len({row['id'] for row in rows})} sources kept",
          *losses(rows), sep="\n  ")
    if all((to / source["id"]).is_dir() or source["id"] in unread for source in sources):
        read_rows(to, kept=True)                                    # says so where there is none


def check_room(folder, n):
    """Says before hours of work where n sources like this one would not fit on the disk."""
    most, free = n * sum(path.stat().st_size for path in folder.iterdir()), shutil.disk_usage(folder).free
    if most > free:
        print(f"{folder.parent}: {n} sources like the first take {most / 1e9:.1f} GB, {free / 1e9:.1f} are free; make room or "
              "pass --limit")


# ---- candidates: drawn, scored, filtered -----------------------------------------------------------------

@dataclass
class Filter:
    """Which candidate of a source is kept: of those above all thresholds the one with the best total. Without centre and
    spread, scores are normalised over the candidates of one source, as in the paper."""
    thresholds: dict                    # {score or "total": least}
    weights: dict                       # of the total, {score: weight}
    centre: dict | None = None          # with spread, what `calibrate` normalises each score by
    spread: dict | None = None
    tasks: dict = field(default_factory=dict)       # of calibrate --by-task: what each kind of edit adds to the total
    asked: tuple = ()                   # the scores that a flag names: they must be there
    on: bool = True


def named_values(flag, texts):
    """["NAME=VALUE", ...] -> {name: float}"""
    with reading(f"{flag} {' '.join(texts)}", "needs NAME=VALUE, with a number"):
        values = {name: float(value) for name, _, value in (text.partition("=") for text in texts)}
        need(not any(math.isnan(x) for x in values.values()), "is not a number")
        return values


def read_filter(s, thresholds, weights):
    """The Filter of a step's settings: these defaults, or --score-weights, the judge, --min."""
    keep = Filter(dict(thresholds), weights, on=s.filter)
    if s.score_weights:
        with reading(f"--score-weights {s.score_weights}", "pass what curate.py calibrate writes"):
            fitted = read_json(s.score_weights)
            keep.weights, keep.centre, keep.spread = (fitted[k] for k in ("weights", "centre", "spread"))
            keep.tasks = fitted.get("tasks", {})
            need(keep.weights and keep.weights.keys() == keep.centre.keys() == keep.spread.keys(),
                 "weights, centre and spread need the same scores")
            for x in (keep.weights, keep.centre, keep.spread, keep.tasks):
                need(all(math.isfinite(value) for value in x.values()), "has a score that is no number")
            keep.thresholds["total"] = float(fitted["min_total"])
            keep.asked = tuple(keep.weights)
    if s.judge:
        keep.thresholds |= dict.fromkeys(metrics.JUDGED, 0.5)       # ours: yes is likelier than no
    keep.thresholds |= named_values("--min", s.min)
    keep.thresholds = {name: least for name, least in keep.thresholds.items() if least > -math.inf}
    keep.asked += tuple(name for name in named_values("--min", s.min) if name in keep.thresholds and name != "total")
    if metrics.HELD_OUT in keep.asked:
        raise UserError(f"{metrics.HELD_OUT} is kept for judging: a filter by it would flatter its own results")
    return keep


@dataclass
class Tools:
    """What an editing step works with."""
    ed: VideoEditor
    scorers: metrics.Scorers
    filter: Filter
    settings: dict                      # of its data set


def open_tools(step, s, how, weights, motion=""):
    ed = VideoEditor.from_pretrained(s.weights, False if motion == "none" else motion or None, device=how.device,
                                     dtype=how.dtype)
    own = None
    if any((folder / "clip").is_dir() for folder in ed.folders):    # a judge trained with the editor, as `tiny` has
        own = {role: part(ed.folders, role) for role in ("clip", "viclip")}
    scorers = metrics.choose_scorers(s.scorers, own, ed.device, clip=s.clip, pick=s.pick, viclip=s.viclip, judge=s.judge)
    keep = read_filter(s, THRESHOLDS[scorers.family], weights[scorers.family])
    settings = {"step": step} | asdict(s) | {"editor": ed.fingerprint, "size": ed.size, "filter": asdict(keep),
                                             "scorers": {k: portable(x) for k, x in scorers.paths.items()}}
    return Tools(ed, scorers, keep, settings)


def draw_candidates(ed, source_id, n, seed, guidance=None):
    """Rows with the seed and guidance [text, source] of n candidates. The first has the checkpoint's own guidance, or this:
    without a filter it is what a plain edit would be."""
    rows = []
    for k in range(n):
        rng = Random(f"candidate {seed} {source_id} {k}")
        row = {"seed": rng.getrandbits(31)}
        row["guidance"] = [round(own * rng.uniform(*span), 3) for own, span in zip(ed.guidance, (TEXT_RANGE, SOURCE_RANGE))]
        rows.append(row)
    rows[0]["guidance"] = list(guidance or ed.guidance)
    return rows


def batches(rows, noise, n):
    """n candidates at a time: their noise (K, F, c, h, w), text scales and source scales."""
    for k in range(0, len(rows), n):
        s_txt, s_src = zip(*(row["guidance"] for row in rows[k:k + n]))
        yield torch.cat(noise[k:k + n]), s_txt, s_src


def totals(rows, keep, task=""):
    """Weighted total of the candidates of a source: (K,)."""
    total = metrics.total_score([row["scores"] for row in rows], keep.weights, keep.centre, keep.spread)
    return total + keep.tasks.get(task, 0.0)


def choose(rows, keep, source):
    """Fills in total, below, why and kept of the candidates of one source. Returns the index of the kept, or of the best.
    UserError for a threshold on a score that is not there."""
    lacks = [name for name in keep.asked if not any(name in row["scores"] for row in rows)]
    if lacks and keep.on and source["source_caption"] and source["target_caption"]:
        raise UserError(f"--min or --score-weights: {', '.join(lacks)}: not among the scores of this run, which are "
                        f"{', '.join(sorted(rows[0]['scores']))}; leave it out, or pass what it needs")
    for row, total in zip(rows, totals(rows, keep, source["task"])):
        scores = row["scores"] | {"total": float(total)}
        row["total"] = round(float(total), 4)
        row["below"] = [name for name, least in keep.thresholds.items()
                        if scores.get(name) is not None and not scores[name] >= least]         # NaN is below
        row["why"] = "; ".join(f"{name} {scores[name]:.3g} below {keep.thresholds[name]:g}" for name in row["below"])
        row["kept"] = False
    passed = [k for k, row in enumerate(rows) if not row["below"]]
    best = max(passed or range(len(rows)), key=lambda k: rows[k]["total"]) if keep.on else 0
    for k in passed:
        rows[k]["why"] = "another candidate is better"
    if passed or not keep.on:
        rows[best] |= {"kept": True, "why": "best" if keep.on else "not filtered"}
    return best


def consensus_scores(z0, z_src):
    """How far each of K candidates of a source does what the others do: {"consensus", "certainty": (K,)}; {} for one.

    z0: scaled latents (K, ...); z_src (1, ...): the source's, scaled. consensus: cosine between a candidate's change
    and the mean change of the others, -1 to 1. certainty: -10 log10 of its mean squared difference to them, in dB.
    Ours: an editor that has understood makes one edit from every noise, one that guesses makes many.
    """
    if len(z0) < 2:
        return {}
    z, change = z0.flatten(1).double(), (z0 - z_src).flatten(1).double()
    others = (change.sum(dim=0) - change) / (len(z) - 1)
    apart = torch.cdist(z, z).square().sum(dim=1) / (len(z) - 1) / z.shape[1]
    return {"consensus": F.cosine_similarity(change, others).tolist(),
            "certainty": (-10 * torch.log10(apart + 1e-4)).tolist()}


def add_scores(rows, scores):
    """scores: {name: (K,)} into the rows of K candidates."""
    for k, row in enumerate(rows):
        row.setdefault("scores", {}).update({name: round(float(x[k]), 5) for name, x in scores.items()})


def compare_with_truth(ed, rows, z_src, source, edits, truth):
    """Adds to each candidate's row how its edit compares with the true one, as metrics.SUCCESS says; the filter never
    sees it. source, edits' items: frames (F, H, W, 3) uint8; truth: (frames, mask (F, H, W) bool), or None."""
    if truth is None:
        return
    at = np.unique(np.linspace(0, len(source) - 1, 4).astype(int))  # four frames of a clip say it
    edits = {k: x[at] for k, x in enumerate(edits)}
    found = metrics.against_truth(ed, z_src[:, at], source[at], edits, *(x[at] for x in truth))
    for k, row in enumerate(rows):
        row["truth"] = {"gain": round(found[k]["truth_gain"], 3), "outside": round(found[k]["psnr_outside"], 3),
                        "success": found[k]["success"]}             # dB inside the true region, dB outside, 0 or 1


def finish_clip(tools, source, frames, z_src, z0, rows, truth=None):
    """Candidates z0 (K, F, c, h, w) of a clip (F, H, W, 3) uint8: decoded, scored, filtered -> (rows, files)."""
    ed = tools.ed
    videos = [ed.decode(z[None]).cpu() for z in z0]
    edits = [np.stack(to_u8(video)) for video in videos]
    clip = {"edits": dict(enumerate(edits)) | {"source": frames}, "source": frames,
            **{k: source[k] for k in ("instruction", "source_caption", "target_caption")}}
    [scores] = metrics.score_clips([clip], tools.scorers)
    untouched = scores.pop("source")
    for k, row in enumerate(rows):
        gains = {f"{name}_gain": scores[k][name] - untouched[name] for name in ("clip_text", "viclip_out", "pick_score")
                 if name in scores[k]}
        row["scores"] = {name: round(float(x), 5) for name, x in (scores[k] | gains).items()}
    add_scores(rows, consensus_scores(z0, z_src * ed.vae.scaling_factor))
    compare_with_truth(ed, rows, z_src, frames, edits, truth)
    best = choose(rows, tools.filter, source)
    files = {"source.mp4": to_video(frames), "target.mp4": videos[best]}
    if rows[best]["kept"]:
        files["latents.safetensors"] = {"source": z_src[0], "target": z0[best] / ed.vae.scaling_factor}
    return rows, files


# ---- stage I: images, clips, videos ----------------------------------------------------------------------

def images(to, s, how):
    """step 2: many edits of each image, scored; the best is kept with its trajectory

    Paper, section 3.2: 30 samples of 20 steps under various text and source guidance, six scores.
    """
    tools = open_tools("images", s, how, IMAGE_WEIGHTS)
    ed = tools.ed
    if "clip" not in tools.scorers:
        raise UserError("curate.py images: the six scores need CLIP; pass --clip DIR")
    clip = tools.scorers.open("clip")
    dino = s.dino or (DINO if tools.scorers.family == "published" else "none")          # the embedded scorers have none
    dino = None if dino == "none" else metrics.DINOv2.from_pretrained(dino, device=ed.device, dtype=ed.dtype)

    def work(source, image):                                        # (1, H, W, 3) uint8
        z_src = ed.encode(to_video(image))                          # (1, 1, c, h, w)
        rows = draw_candidates(ed, source["id"], s.candidates, f"images {s.seed}")
        noise = [ed.noise(1, *z_src.shape[3:], row["seed"], mode="image") for row in rows]
        edits, paths = [], []                                       # K images, K trajectories (steps + 1, c, h, w)
        for z_T, s_txt, s_src in batches(rows, noise, how.batch or 30):
            path = []
            z0 = ed.sample(z_src, source["instruction"], z_T, s.steps, s_txt, s_src, "image", keep=path)
            edits += to_u8(ed.decode(z0.transpose(0, 1)))
            paths += torch.stack(path)[:, :, 0].unbind(1)
        scores = metrics.image_scores(clip, dino, image[0], [*edits, image[0]],            # the last is untouched
                                      source["source_caption"], source["target_caption"])
        scores["clip_sim_target_gain"] = scores["clip_sim_target"] - scores["clip_sim_target"][-1]
        together = consensus_scores(torch.stack([path[-1] for path in paths]), z_src[0] * ed.vae.scaling_factor)
        add_scores(rows, scores | together)
        truth = true_clip(source["origin"], image) if "scene" in source["origin"] else None
        compare_with_truth(ed, rows, z_src, image, [x[None] for x in edits], truth)
        best = choose(rows, tools.filter, source)
        files = {"source.png": image[0], "target.png": edits[best]}
        if rows[best]["kept"]:
            files["trajectory.safetensors"] = {"trajectory": paths[best]}
        return rows, files

    sources = drawn_sources(s.n, "synthetic", s.seed) if s.source == "shapes" else first_of(read_pairs(s.source), s.n, s.source)
    run_step(to, tools.settings, sources, partial(pixels, size=ed.size, multiple=ed.multiple, n=1), work, how)


def by_world(origin, image):
    """A drawn scene (H, W, 3) uint8 moves on by itself: (F, H, W, 3), beginning with the image."""
    frames = drawn_clip(origin, N_FRAMES, len(image), FPS)
    if np.abs(frames[0].astype(int) - image).mean() > 2:
        raise UserError(f"the drawn scene {origin['scene']} is not how its clip begins: the world has changed since; curate the "
                        "images again")
    return frames


def by_camera(name, image):
    """The same for any image, without a network: a slow zoom and pan inside the picture, by the source's id. Bicubic."""
    rng, s = Random(name), torch.linspace(0, 1, N_FRAMES)
    zoom, x, y = rng.uniform(0.08, 0.2), rng.uniform(-1, 1), rng.uniform(-1, 1)
    theta = torch.zeros(N_FRAMES, 2, 3)                             # each frame's window: its width, its middle
    theta[:, 0, 0] = theta[:, 1, 1] = 1 - zoom * s
    theta[:, 0, 2], theta[:, 1, 2] = zoom * s * x, zoom * s * y
    still = to_tensor(image).expand(N_FRAMES, -1, -1, -1)
    grid = F.affine_grid(theta, still.shape, align_corners=False)
    frames = F.grid_sample(still, grid, "bicubic", "border", align_corners=False).clamp(-1, 1)
    return np.stack([image, *(to_rgb(frame) for frame in frames[1:])])


TEACHER_CLIPS = 3       # PAPER: 48 frames; of CogVideoX's 49 (8 a second) the last is left out: three clips of N_FRAMES
TEACHER_GROUP = 64      # images that go through one of its networks before the next one is loaded


def clips(to, s, how):
    """step 3: the kept images become clips, as they move on in the drawn world, by a camera, or by CogVideoX

    CogVideoX makes three clips of an image. Only the first starts with it; the edit of the image guides the attention
    of all three, and each is a source of its own for `videos`, filtered by itself.
    """
    sources = read_rows(s.images, kept=True)
    undrawn = [source["id"] for source in sources if "scene" not in source["origin"]]
    if s.animate == "world" and undrawn:
        raise UserError(f"--animate world: {len(undrawn)} of {len(sources)} images are no drawn scenes, the first "
                        f"{undrawn[0]}; pass camera or cogvideox")

    def load(source):
        return read_image(Path(s.images) / source["id"] / "source.png")

    def move(source, image):
        animate = s.animate or ("world" if "scene" in source["origin"] else "camera")
        frames = by_world(source["origin"], image) if animate == "world" else by_camera(source["id"], image)
        row = {"kept": True, "animate": animate, "origin": source["origin"] | {"image": source["id"]}}
        return [row], {"source.mp4": to_video(frames)}

    def ask_teacher(loaded):
        jobs = [(to_tensor(image), source["source_caption"], Random(f"cogvideox {s.seed} {source['id']}").getrandbits(31))
                for source, image in loaded]
        for (source, _), (image, *_), video in zip(loaded, jobs, teacher.clips(jobs, s.cogvideox_steps)):
            video = video[:TEACHER_CLIPS * N_FRAMES]                # (F, 3, H, W) in [-1, 1]
            rows = []
            for k, clip in enumerate(video.split(N_FRAMES)):
                fault = clip_fault(video, image) or clip_fault(clip, clip[0])
                span = {"image": source["id"], "frames": [k * N_FRAMES, (k + 1) * N_FRAMES]}
                rows.append({"id": ident(source["id"], k) if k else source["id"], "order": source["order"] + [k] * (k > 0),
                             "origin": source["origin"] | span, "animate": "cogvideox", "kept": not fault,
                             "below": [fault] if fault else [], "why": fault})
            yield rows, {"source.mp4": video[None]}

    settings = {"step": "clips"} | asdict(s)
    if s.animate != "cogvideox":
        return run_step(to, settings, sources, load, move, how)
    teacher = CogVideoX.from_pretrained(s.cogvideox, device=how.device)
    run_step(to, settings, sources, load, ask_teacher, how, TEACHER_GROUP)


def videos(to, s, how):
    """step 4: the clips, edited under the trajectory of their image's edit with several guidance settings (FFG-V2V)

    Paper, section 3.2. --mode image edits frame by frame without the trajectory, for Table 2's comparison.
    """
    tools = open_tools("videos", s, how, VIDEO_WEIGHTS, s.motion)
    ed, edited = tools.ed, {row["id"]: row for row in read_rows(s.images, kept=True)}
    sources = [row for row in read_rows(s.clips, kept=True) if row["origin"]["image"] in edited]
    if not sources:
        raise UserError(f"--clips {s.clips}: made of other images than those of --images {s.images}")

    def load(source):
        name = source["origin"]["image"]
        image = read_image(Path(s.images) / name / "source.png")
        path = Path(s.images) / name / "trajectory.safetensors"
        with reading(path):
            trajectory = read_tensors(path)["trajectory"].float()
        if source["animate"] == "cogvideox":
            start, _ = source["origin"]["frames"]
            return image, trajectory, np.stack([*video_frames(Path(s.clips) / name / "source.mp4", start, N_FRAMES)])
        return image, trajectory, None                              # exact pixels, which mp4 does not hold

    def work(source, loaded):
        image, trajectory, frames = loaded
        origin, row = source["origin"], edited[source["origin"]["image"]]
        if frames is None:
            frames = by_world(origin, image) if source["animate"] == "world" else by_camera(row["id"], image)
        z_src, z_first = ed.encode(to_video(frames)), ed.encode(to_video(image[None]))
        path = [z[None, None].to(z_src) for z in trajectory]        # steps + 1 of (1, 1, c, h, w)
        rows = [r | {"seed": row["seed"]} for r in
                draw_candidates(ed, source["id"], s.candidates, f"videos {s.seed}", row["guidance"])]
        noise = [path[0].expand_as(z_src)] * len(rows)              # every frame starts where the first one's edit did
        z0 = torch.cat([ed.sample(z_src, source["instruction"], z_T, len(path) - 1, s_txt, s_src, s.mode,
                                  anchor=(z_first, path)) for z_T, s_txt, s_src in batches(rows, noise, how.batch or 4)])
        truth = true_clip(origin, frames, FPS) if source["animate"] == "world" else None
        return finish_clip(tools, source, frames, z_src, z0, rows, truth)

    run_step(to, tools.settings, sources, load, work, how)


def pairs(to, s, how):
    """clips and their edits that others made, in InsV2V's layout: scored and filtered as they are"""
    tools = open_tools("pairs", s, how, VIDEO_WEIGHTS)
    ed = tools.ed

    def load(source):
        frames, edit = (prepare(clip, ed.size, ed.multiple) for clip in source["load"]())
        with reading(source["origin"]["file"]):
            need(frames.shape == edit.shape, "clips of {2}x{1} and {6}x{5} in one pair".format(*frames.shape, *edit.shape))
        return frames, edit

    def work(source, loaded):
        frames, edit = loaded
        z_src, z0 = ed.encode(to_video(frames)), ed.encode(to_video(edit)) * ed.vae.scaling_factor
        return finish_clip(tools, source, frames, z_src, z0, [{"seed": None, "guidance": None}])

    run_step(to, tools.settings, first_of(read_insv2v(Path(s.source)), -1, s.source), load, work, how)


# ---- stages II and III: cut, write, real -----------------------------------------------------------------

def cut(to, s, how):
    """stage II: real videos become clips of 16 frames, evenly spread, none across a cut, none static or black

    Paper, section 4.1: 8 K videos of YouTube-VOS, MOSE, LVOS and MeViS, 16 K clips. A clip's row says where its frames
    are; no pixels are copied.
    """
    def load(source):                                               # (F, 32, 32, 3) uint8, or a drawn scene's nothing
        if "scene" in source["origin"]:
            return None
        small = [Image.fromarray(rgb).resize((32, 32), Image.BOX) for rgb in video_frames(path_of(source["origin"]))]
        return np.stack([np.asarray(image) for image in small])

    def work(source, small):
        if small is None:
            return [{"kept": True}], {}
        name, size, found = source["origin"]["file"], size_of(path_of(source["origin"])), list(find_clips(small))
        good = [start for start, _, fault in found if not fault]
        if len(good) > s.per_video:
            good = [good[k] for k in np.linspace(0, len(good) - 1, s.per_video).round().astype(int)]
        rows = []
        for start, end, fault in found:
            fault = fault or ("" if start in good else "beyond --per-video")
            rows.append({"id": ident(name, size, start, N_FRAMES), "order": source["order"] + [start], "kept": not fault,
                         "below": [fault] if fault else [], "why": fault,
                         "origin": source["origin"] | {"frames": [start, end]}})
        return rows, {}

    sources = drawn_sources(s.n, "real", s.seed) if s.source == "shapes" else first_of(read_videos(Path(s.source)), s.n, s.source)
    run_step(to, {"step": "cut"} | asdict(s), sources, load, work, how)


WRITE_GROUP = 4         # clips that the language model sees at once


def write(to, s, how):
    """stage II: an instruction and captions for every clip, by LLaVA-OneVision as in the paper, by tiny CLIP, or of a file"""
    sources = read_rows(s.clips, kept=True)
    settings = {"step": "write"} | asdict(s)
    if s.writer == "llava":
        if mix := named_values("--task-mix", s.task_mix):
            check_mix(mix)
        settings |= {"lora_file": fingerprint(s.lora)} if s.lora else {}
        ask = by_llava(to, LlavaOneVision.from_pretrained(s.llava, device=how.device, lora=s.lora or None), mix, sources)
        # drawn at the size of SigLIP's eye
        run_step(to, settings, sources, partial(pixels, size=384), ask, how, WRITE_GROUP, whole=True)
    elif s.writer == "tiny":
        clip = metrics.CLIP.from_pretrained(ROOT / "assets/tiny/clip" if s.clip == "tiny" else s.clip, device=how.device,
                                            dtype=torch.float32)
        run_step(to, settings, sources, partial(pixels, size=clip.image_size, multiple=8), by_clip(clip, s.seed), how)
    else:
        texts = read_texts(s.writer)
        settings |= {"writer_file": fingerprint(s.writer)}
        run_step(to, settings, sources, lambda source: texts[int(source["id"], 16) % len(texts)],
                 lambda source, text: ([text | {"kept": True}], {}), how)


def by_clip(clip, seed):
    """A writer: CLIP names what it sees, zero-shot among the captions of the drawn world, and an edit of such a scene
    supplies the instruction and both captions. Of effects and styles the row names the exact operation."""
    pairs = [(k, c) for k in KINDS for c in COLOURS]
    grounds = [Background("plain", f"a {c} background", (COLOURS[c],)) for c in COLOURS]
    grounds += [Background("gradient", name, rgb) for name, rgb in SKIES.items()]
    natural = {"clouds": "clouds", "leaves": "leaves", "sand": "sand", "grass": "grass", "photo": "a natural scene"}
    grounds += [Background(kind, name, TONES[:3]) for kind, name in natural.items()]

    @torch.no_grad()
    def text(captions):
        parts = [captions[k:k + 64] for k in range(0, len(captions), 64)]
        return F.normalize(torch.cat([clip.encode_text(clip.tokenizer(part)) for part in parts]), dim=-1)

    def scene(objects, ground):
        return Scene(0, "real", ground, tuple(Shape(k, c, COLOURS[c], .5, .5, .15) for k, c in objects))

    names = text([article(f"{c} {k}") for k, c in pairs])

    @torch.no_grad()
    def work(source, frames):
        x = clip.encode_image(clip.preprocess(list(frames[::5])))   # four of the 16 frames
        x = F.normalize(F.normalize(x, dim=-1).mean(0), dim=-1)
        first = pairs[int((names @ x).argmax())]
        second = max((p for p in pairs if p[0] != first[0] and p[1] != first[1]),
                     key=lambda p: float(names[pairs.index(p)] @ x))
        guesses = [scene(objects, ground) for objects in ((), (first,), (first, second)) for ground in grounds]
        seen = guesses[int((text([caption(guess) for guess in guesses]) @ x).argmax())]
        edit = propose_edit(replace(seen, seed=int(source["id"][:8], 16)), seed)
        row = {key: getattr(edit, key) for key in FIELDS} | {"kept": True}
        if edit.task in ("effect", "style") and edit.deterministic:
            row["operation"] = edit.target.post[0]                  # its name and seed
        return [row], {}

    return work


def by_llava(to, net, mix, sources):
    """A writer: LLaVA-OneVision, asked about a group of clips at once. Earlier answers, of this process, count for the mix of
    tasks and for near-duplicates, see teachers.write_instructions."""
    mine = [source["id"] for source in my_share(sources)]
    answers = {row["id"]: row for path in to.glob("*/candidates.json") for row in read_json(path, list)}

    def work(loaded):
        group = [source["id"] for source, _ in loaded]
        before = [answers[name] for name in takewhile(lambda name: name not in group, mine) if name in answers]
        shown = [(source["id"], frames) for source, frames in loaded]
        for answer in write_instructions(net.generate, shown, mix or None, before, WRITE_GROUP):
            row = {key: answer[key] for key in (*FIELDS, "kept", "why") if key in answer}
            answers[answer["id"]] = row
            yield [row | {"below": [] if row["kept"] else ["no instruction"]}], {}

    return work


def read_texts(path):
    """A file's [{task, instruction, source_caption, target_caption}]: one instruction a line, which then is its own target
    caption, or JSON lines. Every clip takes one of them by its id."""
    rows = []
    for where, row in read_lines(Path(path)):
        with reading(f"--writer {where}", "pass tiny, llava, or a file of one instruction a line or of JSON lines"):
            texts = texts_of({"target_caption": row["instruction"]} | row, FIELDS)
            need(texts[1].strip(), "needs text in instruction")
            rows.append(dict(zip(FIELDS, texts)))
    with reading(f"--writer {path}"):
        need(rows, "is empty")
    return rows


def real(to, s, how):
    """stages II, III: the written clips, edited by the previous round's model (paper, sections 3.3 and 4.1)"""
    tools = open_tools("real", s, how, VIDEO_WEIGHTS)
    ed, mode = tools.ed, tools.ed.default_mode

    def work(source, frames):
        z_src = ed.encode(to_video(frames))
        rows = draw_candidates(ed, source["id"], s.candidates, f"real {s.seed}")
        noise = [ed.noise(N_FRAMES, *z_src.shape[3:], row["seed"], mode=mode) for row in rows]
        z0 = torch.cat([ed.sample(z_src, source["instruction"], z_T, s.steps, s_txt, s_src, mode)
                        for z_T, s_txt, s_src in batches(rows, noise, how.batch or 4)])
        truth = None
        if "operation" in source:                                   # has a truth on any footage
            name, seed = source["operation"]
            truth = OPERATIONS[name](frames.astype(np.float32) / 255, np.arange(N_FRAMES) / FPS, seed)
            truth = quantise(truth), np.ones(frames.shape[:3], bool)
        return finish_clip(tools, source, frames, z_src, z0, rows, truth)

    run_step(to, tools.settings, read_rows(s.source, kept=True), partial(pixels, size=ed.size, multiple=ed.multiple), work, how)


STEPS = {"images": (Images, images), "clips": (Clips, clips), "videos": (Videos, videos), "pairs": (Pairs, pairs),
         "cut": (Cut, cut), "write": (Write, write), "real": (Real, real)}


# ----------------------------------------------------------------------------------------------------------
# Sources: drawn scenes, image pairs, pairs of clips, real videos. Each is a dict of SOURCE, plain data, and, unless its
# origin tells where the pixels are, load() -> rgb (H, W, 3) uint8 or lists of it. order: its place.
# ----------------------------------------------------------------------------------------------------------

def make_source(source_id, order, texts, origin, task="", **load):
    """texts: instruction, source caption, target caption."""
    return dict(zip(SOURCE, (source_id, order, task, *texts, origin))) | load


def pixels(source, size, multiple=None, n=N_FRAMES):
    """The first n frames of a source, (F, H, W, 3) uint8. size: of drawn ones and, with multiple, of all, see `prepare`."""
    origin = source["origin"]
    if "scene" in origin:
        return drawn_clip(origin, n, size, FPS)
    if "load" in source:
        frames = source["load"]()[:n]
    else:
        path, start = path_of(origin), origin["frames"][0]
        with reading(path):
            need(source["id"] == ident(origin["file"], size_of(path), start, N_FRAMES), "has changed since it was cut")
            frames = list(video_frames(path, start, n))
    return prepare(frames, size, multiple) if multiple else np.stack(frames)


def prepare(frames, size, multiple):
    """Frames [(H, W, 3) uint8] of one size -> (F, h, w, 3) with this short side, both sides multiples of `multiple`."""
    sizes = {f"{rgb.shape[1]}x{rgb.shape[0]}" for rgb in frames}
    with reading("a clip" if len(frames) > 1 else "an image", "cut out a part"):
        need(len(sizes) == 1, f"frames of {' and '.join(sorted(sizes))}")
        sides = frames[0].shape[:2]
        need(max(sides) <= LONGEST * min(sides), f"{sizes.pop()}: one side is over {LONGEST} times the other")
    height, width = (max(1, round(side * size / min(sides) / multiple)) * multiple for side in sides)
    return np.stack([to_rgb(resize(to_tensor(rgb), height, width)) for rgb in frames])


def drawn_sources(n, domain, seed):
    """n scenes of the drawn world (-1: 20) with an edit each; their numbers are far from those of train.py's sets."""
    first, sources = (60 if domain == "synthetic" else 70) * 1_000_000 + 100_000 * seed, []
    for k in range(20 if n == -1 else n):
        origin = drawn_origin(first + k, domain)
        _, edit, _ = drawn_scene(origin)
        texts = edit.instruction, edit.source_caption, edit.target_caption
        sources.append(make_source(ident("shapes", origin), [k], texts, origin, edit.task))
    return sources


def first_of(sources, n, where):
    """The first n of a reader's sources (-1: all) that have an instruction: to the editor, none means no edit."""
    found = list(islice(sources, None if n == -1 else n))
    good = {source["id"]: source for source in found if source["instruction"] is None or source["instruction"].strip()}
    if not good:
        raise UserError(f"--from {where}: none of its {len(found)} sources has an instruction")
    if len(good) < len(found):
        print(f"{where}: {len(found) - len(good)} of {len(found)} sources left out: twice there, or without an instruction")
    return list(good.values())


def read_pairs(where):
    """Yields the image pairs of a data set; their load() gives (source, edited or None), rgb uint8.

    Known: UltraEdit's and InstructPix2Pix's parquet files (or a folder of them), InstructPix2Pix's own folders, and a
    folder with a .jsonl: {"source": file, "target": file or none, "instruction", "source_caption", "target_caption"}.
    """
    where = Path(where)
    files = [where] if where.is_file() else sorted([*where.rglob("*.parquet"), *where.glob("*.jsonl")])
    parquet = [path for path in files if path.suffix == ".parquet" and path.is_file()]
    lines = [path for path in files if path.suffix == ".jsonl"]
    if parquet:
        return read_parquet(parquet, where)
    if len(lines) == 1:
        return read_jsonl(lines[0])
    if any(where.glob("*/prompt.json")):
        return read_ip2p(where)
    raise UserError(f"--from {where}: no image pairs there; pass shapes, UltraEdit's or InstructPix2Pix's parquet files, "
                    "InstructPix2Pix's folders (<name>/prompt.json), or one .jsonl")


def texts_of(row, names):
    """[str] of these columns; what is missing or null is empty. Inside `reading`."""
    texts = [row.get(name) or "" for name in names]
    for name, text in zip(names, texts):
        need(isinstance(text, str), f"needs text in {name}")
    return texts


def read_files(files):
    return [file and read_image(file) for file in files]


PARQUET = (("source_image", "edited_image", "edit_prompt", "source_caption", "target_caption"),         # UltraEdit
           ("original_image", "edited_image", "edit_prompt", "original_prompt", "edited_prompt"))       # IP2P


def read_parquet(files, where):
    """Pairs of parquet files, texts first; a picture is read when it is wanted, by row group."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{files[0]}: reading parquet needs pyarrow; pip install pyarrow") from None

    @lru_cache(1)
    def pictures(path, group, names):
        return ParquetFile(path).read_row_group(group, columns=list(names)).to_pylist()

    def load(path, group, i, names):
        with reading(f"{path}, row {i} of group {group}"):
            cells = [pictures(path, group, names)[i][name] for name in names]
            return read_files([io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell) for cell in cells])

    order = 0
    for path in files:
        with reading(path, "is it a whole parquet file?"):
            file = ParquetFile(path)
            has = file.schema_arrow.names
            names = next((names for names in PARQUET if set(names) <= set(has)), None)
            need(names, f"has columns {', '.join(has)}, needs {', '.join(PARQUET[0])} or {', '.join(PARQUET[1])}")
        name = path.name if path == where else path.relative_to(where).as_posix()
        for group in range(file.num_row_groups):
            with reading(f"{path}, group {group} of its rows"):
                texts = [texts_of(row, names[2:]) for row in
                         file.read_row_group(group, columns=list(names[2:])).to_pylist()]
            for i, row in enumerate(texts):
                yield make_source(ident(name, group, i, row), [order], row, {"file": name, "row": [group, i]},
                                  load=partial(load, path, group, i, names[:2]))
                order += 1


def read_lines(path):
    """Yields (where, dict) of people's JSON lines: a BOM, blank lines and no last newline are fine. A line that does not
    begin with { is an instruction."""
    with reading(path):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    for n, line in enumerate(lines, 1):
        if line.strip():
            with reading(f"{path}, line {n}"):
                yield f"{path}, line {n}", json.loads(line) if line.lstrip().startswith("{") else {"instruction": line.strip()}


def read_jsonl(path):
    for n, (where, row) in enumerate(read_lines(path)):
        with reading(where, "needs source, instruction, source_caption, target_caption"):
            for name in ("source", *FIELDS[1:]):
                need(name in row, f"lacks {name}")
            source, target, task, *texts = texts_of(row, ("source", "target", *FIELDS))
            need(source, "needs text in source")
        files = [path.parent / source, path.parent / target if target else None]
        yield make_source(ident("pair", row), [n], texts, {"file": source}, task, load=partial(read_files, files))


def read_prompt(path):
    """[instruction, source caption, target caption] of a prompt.json."""
    with reading(path, "needs input, edit and output, as in InstructPix2Pix's and InsV2V's data"):
        prompt = read_json(path)
        need(prompt.keys() >= {"edit", "input", "output"}, f"holds {', '.join(prompt)}")
        return texts_of(prompt, ("edit", "input", "output"))


def read_ip2p(where):
    """InstructPix2Pix's layout: seeds.json names what passed its filter; without it, every pair counts."""
    table = where / "seeds.json"
    if table.is_file():
        listed = read_json(table, list)
    else:
        folders = sorted(path.parent for path in where.glob("*/prompt.json"))
        listed = [[p.name, sorted(f.name[:-6] for f in p.glob("*_0.jpg"))] for p in folders]
    for n, entry in enumerate(listed):
        with reading(table, 'needs a folder and its seeds, like ["0000001", ["11", "12"]]'):
            name, seeds = entry
            seeds = [int(seed) for seed in seeds]
            texts = read_prompt(where / name / "prompt.json")
        for seed in seeds:
            files = [where / name / f"{seed}_{k}.jpg" for k in (0, 1)]
            yield make_source(ident(name, str(seed)), [n, seed], texts, {"file": f"{name}/{seed}_0.jpg"},
                              load=partial(read_files, files))


def read_insv2v(where):
    """InsV2V's synthetic clips, the first N_FRAMES frames; load() gives (source, edited), each a list of rgb."""
    found = sorted(where.glob("*/image/*_0_0000.jpg"))
    with reading(f"--from {where}"):
        need(found, "holds none of InsV2V's clips (<name>/prompt.json, <name>/image/<seed>_0_0000.jpg)")
    for n, path in enumerate(found):
        name, seed = path.parent.parent.name, path.name.split("_")[0]
        files = [[path.parent / f"{seed}_{k}_{i:04d}.jpg" for i in range(N_FRAMES)] for k in (0, 1)]
        yield make_source(ident(name, seed), [n], read_prompt(path.parent.parent / "prompt.json"),
                          {"file": f"{name}/image/{seed}", "frames": [0, N_FRAMES]},
                          load=lambda files=files: [read_files(clip) for clip in files])


# ---- real videos -----------------------------------------------------------------------------------------

def find_videos(where):
    """[(name, file or folder of frames)] of YouTube-VOS, MOSE, LVOS, MeViS (JPEGImages/<video>/*.jpg, below any
    split), of a folder of videos, or of a folder of folders of frames."""
    where = Path(where)
    roots = sorted(where.rglob("JPEGImages")) if where.name != "JPEGImages" else [where]
    folders = [p for root in roots or [where] for p in sorted(root.glob("*")) if p.is_dir()]
    found = [p for p in folders if any(f.suffix.lower() in IMAGES for f in p.iterdir())]
    if not roots:
        found += sorted(p for p in where.rglob("*") if p.suffix.lower() in VIDEOS)
    found = [p for p in found if not (p / "candidates.json").is_file() and not (p.parent / "candidates.json").is_file()]   # ours
    with reading(f"--from {where}", f"needs JPEGImages/<video>/*.jpg, or files like {', '.join(VIDEOS[:4])}"):
        need(found, "no videos there")
    return [(str(p.relative_to(where)), p) for p in found]


def read_videos(where):
    """Videos as sources of `cut`. Their size tells a whole one from a part that was still being copied."""
    for n, (name, path) in enumerate(find_videos(where)):
        origin = {"folder": str(where.resolve()), "file": name}
        yield make_source(ident("video", name, size_of(path)), [n], (None, "", ""), origin)


def path_of(origin):
    return Path(origin["folder"]) / origin["file"]


def size_of(path):
    """Bytes of a video file, number of frames in a folder."""
    with suppress(OSError):
        return len(frame_files(path)) if path.is_dir() else path.stat().st_size
    return 0


def video_frames(path, start=0, count=-1):
    """Frames (H, W, 3) uint8 from frame `start` on: of a file at FPS, of a folder as they are."""
    fps = Fraction(FPS)
    for _, rgb in read_frames(probe(path, fps), start=start / fps, fps=None if path.is_dir() else fps, count=count):
        yield rgb


def find_shots(small):
    """[(first, end)] of the shots of a video: small (F, h, w, 3) uint8, thumbnails of its frames.

    A cut is where the picture changes much more than around it; a little less will do where its colours do, too. Fades
    are not found.
    """
    x = small.astype(np.float32) / 255
    change = np.abs(np.diff(x, axis=0)).mean((1, 2, 3))             # (F - 1,)
    bins = (small // 64).astype(int) @ (16, 4, 1)                   # 64 colours
    counts = np.stack([np.bincount(b.ravel(), minlength=64) for b in bins]) / bins[0].size
    recoloured = np.abs(np.diff(counts, axis=0)).sum(1) / 2         # share of pixels with another colour
    cuts = [0]
    for i in range(len(change)):
        around = np.r_[change[max(0, i - 6):i], change[i + 1:i + 7]]
        factor = 2.5 if recoloured[i] > 0.25 else 3
        if change[i] > 0.08 and change[i] > factor * (np.median(around) if len(around) else 0):
            cuts.append(i + 1)
    return list(zip(cuts, cuts[1:] + [len(small)]))


def find_clips(small):
    """Yields (first, end, fault) of a video's clips of N_FRAMES, none across a cut. Faults: static (under 0.3 % mean change
    from frame to frame), black (under 5 % mean brightness), short (a shot that holds no clip)."""
    for first, end in find_shots(small):
        if end - first < N_FRAMES:
            yield first, end, "short"
        for start in range(first, end - N_FRAMES + 1, N_FRAMES):
            x = small[start:start + N_FRAMES].astype(np.float32) / 255
            static = np.abs(np.diff(x, axis=0)).mean() < 0.003
            yield start, start + N_FRAMES, "black" if x.mean() < 0.05 else "static" if static else ""


# ----------------------------------------------------------------------------------------------------------
# Judging a data set: how well its filter ranks, and a page to look at it
# ----------------------------------------------------------------------------------------------------------

def auc(x, good):
    """Chance that a good candidate ranks above a bad one; 0.5 is guessing. Ties count half."""
    ranks = scipy.stats.rankdata(x)
    n = good.sum()
    return float((ranks[good].sum() - n * (n + 1) / 2) / max(n * (len(x) - n), 1))


def fit_weights(x, good, tasks):
    """Logistic regression with weights >= 0 of the scores, free ones of the tasks, and a small ridge: x (N, K) normalised,
    good (N,) bool, tasks (N, T) 0 or 1 -> weights (K,) with sum 1 and offsets (T,) of the total, in units of it."""
    n, k, t = *x.shape, tasks.shape[1]
    both, ridge = np.c_[x, tasks], np.r_[np.full(k, 0.01), np.full(t, 0.003)]

    def loss(p):
        z = both @ p[1:] + p[0]
        slope = (scipy.special.expit(z) - good) / n
        value = (np.logaddexp(0, z) - good * z).mean() + ridge @ p[1:] ** 2
        return value, np.r_[slope.sum(), both.T @ slope + 2 * ridge * p[1:]]

    start = np.r_[0, np.full(k, 0.1), np.zeros(t)]
    bounds = [(None, None)] + [(0, None)] * k + [(None, None)] * t
    p = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x[1:]
    return p[:k] / (p[:k].sum() or 1), p[k:] / (p[:k].sum() or 1)


def load_rated(folder, ratings):
    """Candidates [row] with y, what people gave or the gain to the truth in dB, and good: a rating above the middle, or
    metrics.SUCCESS. ratings: files of the page of metrics.py study --rate; people see what was kept."""
    rows, given = read_rows(folder), {}
    for path in ratings:
        with reading(f"--ratings {path}", "pass what the page of metrics.py study --rate saved"):
            data = read_json(path)
            need(data["rating"], "holds no ratings")
            for name, answers in data["answers"].items():           # named after the folder of the clip
                if name.endswith("/target"):
                    given.setdefault(name.split("/")[0], []).append(np.mean(list(answers.values())))
    if ratings:
        means = {name: float(np.mean(x)) for name, x in given.items()}
        rows = [row | {"y": means[row["id"]], "good": means[row["id"]] > 3} for row in rows if row["kept"] and row["id"] in means]
    else:
        rows = [row | {"y": row["truth"]["gain"], "good": row["truth"]["success"] > 0} for row in rows if row.get("truth")]
    n, good = len({row["id"] for row in rows}), sum(row["good"] for row in rows)
    if n < 10 or good in (0, len(rows)):
        raise UserError(f"{folder}: {n} sources with a {'rating' if ratings else 'known truth'}, {good} of {len(rows)} candidates "
                        "good; needs 10 sources, good and bad ones")
    return rows


def columns_of(rows):
    """What is fitted: names of the scores that all rows have, scores (N, K), good (N,), names of tasks, tasks (N, T)."""
    known = IMAGE_SCORES if "clip_sim_dir" in rows[0]["scores"] else VIDEO_SCORES
    keys = [key for key in known if all(row["scores"].get(key) is not None for row in rows)]
    x = np.array([[row["scores"][key] for key in keys] for row in rows])
    names = sorted({row["task"] for row in rows})
    return keys, x, np.array([row["good"] for row in rows]), names, np.array([[row["task"] == name for name in names] for row in rows], float)


def cross_validate(rows):
    """Prints how well totals and scores rank: Spearman's correlation with y and AUC for good against bad over all candidates
    (which should go?), and Spearman within a source (which is best?). Fitted totals by five folds over sources."""
    keys, x, good, _, tasks = columns_of(rows)
    y, ids = np.array([row["y"] for row in rows]), np.array([row["id"] for row in rows])
    sources, place = np.unique(ids, return_inverse=True)            # ids are hashes: any order is a random one
    fitted = {name: np.zeros(len(rows)) for name in ("fitted", "fitted, by task", "equal")}
    for k in range(5):
        train = place % 5 != k
        z = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-6)
        for name, known in (("fitted", tasks[:, :0]), ("fitted, by task", tasks)):
            w, offsets = fit_weights(z[train], good[train], known[train])
            fitted[name][~train] = z[~train] @ w + known[~train] @ offsets
        fitted["equal"][~train] = z[~train].mean(1)
    print(f"{len(rows)} candidates of {len(sources)} sources, {good.mean():.0%} good; five folds")
    print("| total | Spearman | AUC | Spearman within a source |", "|---|---|---|---|", sep="\n")
    groups = [np.flatnonzero(place == k) for k in range(len(sources))]
    for name, total in (fitted | dict(zip(keys, x.T))).items():
        within = [metrics.spearman(total[g], y[g]) for g in groups]
        within = [rho for rho in within if math.isfinite(rho)] or [math.nan]        # one candidate, or all equal
        print(f"| {name} | {metrics.spearman(total, y):.2f} | {auc(total, good):.3f} | {np.mean(within):.2f} |")
    stored = np.array([row["total"] for row in rows])
    print(f"of a source's candidates the first is good for {np.mean([good[g[0]] for g in groups]):.0%} of the sources, the one "
          f"with the best total for {np.mean([good[g[stored[g].argmax()]] for g in groups]):.0%}, any for "
          f"{np.mean([good[g].any() for g in groups]):.0%}")


def fit_total(rows, by_task, to):
    """Fits the total to all rows and writes what --score-weights reads, with the total that best parts good from bad."""
    keys, x, good, names, tasks = columns_of(rows)
    if not by_task:
        tasks = tasks[:, :0]
    centre, spread = x.mean(0), np.maximum(x.std(0), 1e-6)
    w, offsets = fit_weights((x - centre) / spread, good, tasks)
    total = (x - centre) / spread @ w + tasks @ offsets             # the cut with the best balance (Youden's J)
    best = max(np.unique(total), key=lambda c: (total[good] >= c).mean() - (total[~good] >= c).mean())
    fitted = {"weights": dict(zip(keys, w)), "centre": dict(zip(keys, centre)), "spread": dict(zip(keys, spread))}
    fitted |= {"tasks": dict(zip(names, offsets))} if by_task else {}
    fitted = {name: {k: round(float(v), 5) for k, v in values.items()} for name, values in fitted.items()}
    write_json(to, fitted | {"min_total": round(float(best), 4), "n": len(rows)})
    kept = total >= best
    print(f"{to}: " + ", ".join(f"{k} {v:.2f}" for k, v in zip(keys, w)) +
          f"; a total of {best:.2f} or more keeps {kept.mean():.0%}, {good[kept].mean():.0%} of them good")


def look(folder, limit, to):
    """One self-contained page of a data set: pictures playing side by side, scores, why, yields, histograms."""
    sources, items = read_sources(folder), []
    n = len(sources) if limit == -1 else min(len(sources), limit)
    for rows in [sources[k] for k in np.unique(np.linspace(0, len(sources) - 1, n).astype(int))]:
        best = max(rows, key=lambda row: (row["kept"], not row["below"], row["total"] or -1e9))
        item = best | {"n": len(rows)}
        for file in (folder / rows[0]["id"]).iterdir():
            if file.suffix in (".png", ".mp4"):
                kind = "image/png" if file.suffix == ".png" else "video/mp4"
                item[file.stem] = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        items.append(item)
    rows = [row for rows in sources for row in rows]
    keys = list(dict.fromkeys(key for row in rows for key, x in row["scores"].items() if x is not None))
    data = {"title": folder.resolve().name, "items": items, "keys": keys, "total": len(sources), "yields": yields(folder),
            "plots": {key: histogram([(row["scores"][key], row["kept"]) for row in rows if row["scores"].get(key) is not None])
                      for key in keys}}
    page = (ROOT / "assets/look.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")                # no text of a data set can end the script
    write_text(to, page.replace("@DATA@", text))
    print(f"{to}: {len(items)} of {len(sources)} sources, {to.stat().st_size / 1e6:.1f} MB; open it in a browser")


def yields(folder):
    """[name, sources, candidates, sources with a candidate above all thresholds, kept, the paper's] of this data set and
    of those beside it."""
    table = []
    for path in sorted(folder.resolve().parent.glob("*/settings.json")):
        if not any(path.parent.glob("*/candidates.json")):          # a training run's, or a step has just begun
            continue
        rows, settings = read_rows(path.parent), read_json(path)
        ids = [{row["id"] for row in part} for part in (rows, [row for row in rows if not row["below"]],
                                                        [row for row in rows if row["kept"]])]
        step = f"{settings['step']} {settings.get('round', '')}".strip()
        table.append([path.parent.name, len(ids[0]), len(rows), len(ids[1]), len(ids[2]), PAPER_YIELD.get(step, "")])
    return table


def histogram(values, bins=24):
    """Of [(value, kept)]: {"low", "high": of all, "all", "kept": counts of all and of those kept}."""
    x, kept = (np.array(column) for column in zip(*values))
    counts, edges = np.histogram(x, bins)
    return {"low": float(edges[0]), "high": float(edges[-1]), "all": counts.tolist(),
            "kept": np.histogram(x[kept.astype(bool)], edges)[0].tolist()}


# ---- command line ----------------------------------------------------------------------------------------

def draw(args):
    """Draw one scene and one edit of it: OUT_source.mp4 (--sound: with a tune) and OUT_target.mp4, the true edit."""
    scene = draw_scene(args.seed, args.domain, args.split)
    tasks = possible_tasks(scene)
    if args.task and args.task not in tasks:
        raise UserError(f"--task {args.task}: does not fit scene {args.seed}; {', '.join(tasks)} do")
    edit = propose_edit(scene, args.seed, args.task, args.split)
    out, n = Path(args.out), round(args.seconds * args.fps)
    out.parent.mkdir(parents=True, exist_ok=True)
    height, width = args.size, round(args.size * args.aspect / 2) * 2
    for name, s in (("target", edit.target), ("source", scene)):
        path = out.with_name(f"{out.name}_{name}.mp4")
        frames = torch.from_numpy(render(s, n, height, width, args.fps)).permute(0, 3, 1, 2)[None] * 2 - 1
        write_video(path, frames, args.fps)
    if args.sound:
        wav = out.with_name(f"{out.name}_tune.wav")
        tune(wav, n / args.fps, args.seed)
        write_video(path, frames, args.fps, audio=replace(probe(path), path=wav, audio=True))
        wav.unlink()
    print(f"{out}_source.mp4: {edit.source_caption}\n{out}_target.mp4: {edit.instruction}")


def parse(argv=None):
    parser = Parser(description="Make and look at training data.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, formatter_class=Defaults)

    for name, (settings, step) in STEPS.items():
        p = command(name, step.__doc__.split("\n")[0])
        p.add_argument("--to", required=True, type=Path, help="folder of the data set")
        p.add_argument("--device", type=known_device, help="cuda, cuda:1, mps or cpu (default: the best there is)")
        add_flags(p, settings())
        add_flags(p, How())
    p = command("calibrate", "fit the total's weights to ratings or, in the drawn world, to the truth")
    p.add_argument("folder", type=Path, help="data set")
    p.add_argument("--ratings", nargs="+", default=(), metavar="JSON", help="answers of metrics.py study --rate")
    p.add_argument("--by-task", action="store_true", help="let the total know the task: a filter by it leaves out whole "
                   "kinds of edit that seldom succeed")
    p.add_argument("--to", type=Path, help="default: score_weights.json in the folder")
    p = command("look", "one HTML page of a data set")
    p.add_argument("folder", type=Path, help="data set")
    p.add_argument("--limit", type=int, default=200, help="sources on the page, evenly spaced (-1: all)")
    p.add_argument("--to", type=Path, help="default: look.html in the folder")
    p = command("scene", "one drawn scene and its true edit, as videos")
    p.add_argument("out", help="where to, without ending")
    p.add_argument("--seed", type=int, default=68, help="which scene")
    p.add_argument("--domain", default="synthetic", choices=["synthetic", "real"], help="clean, or like a hand-held camera")
    p.add_argument("--split", default="held", choices=["train", "held"], help="held: scenes and wordings that training never saw")
    p.add_argument("--task", choices=list(TASKS), help="kind of edit; default any that fits")
    p.add_argument("--size", type=int, default=360, help="height in pixels")
    p.add_argument("--aspect", type=float, default=16 / 9, help="width / height")
    p.add_argument("--seconds", type=float, default=4, help="length")
    p.add_argument("--fps", type=float, default=12, help="frames per second")
    p.add_argument("--sound", action="store_true", help="give the source a tune")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.command == "scene":
        return draw(args)
    if args.command == "look":
        return look(args.folder, args.limit, args.to or args.folder / "look.html")
    if args.command == "calibrate":
        rows = load_rated(args.folder, args.ratings)
        cross_validate(rows)
        return fit_total(rows, args.by_task, args.to or args.folder / "score_weights.json")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))         # one GPU for each process of torchrun
    settings, step = STEPS[args.command]
    s = from_flags(settings(), args)
    for name in ("weights", "images", "clips", "source"):
        if getattr(s, name, name) == "":
            raise UserError(f"curate.py {args.command}: needs --{'from' if name == 'source' else name}")
    step(args.to, s, replace(from_flags(How(), args), device=args.device))


if __name__ == "__main__":
    run(main)
