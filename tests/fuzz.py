"""Bad input for every command: is the answer one line that names the flag or file, and nothing half-written?

    python tests/fuzz.py --n 1000 --seed 0        about half a second a case
    python tests/fuzz.py --only 417 --seed 0      one case again, loudly
    python tests/fuzz.py --n 200 --what video     only targets with this in their name
    python tests/fuzz.py --kills 40               SIGKILLs over curation and training; results must be equal

Every case copies a small piece that works (a clip, miniature weights, a data set, a table of texts), damages
one file of it by chance or changes the flags, and runs a command on it in this process, on a copy of the
tree. A command may accept what came or refuse it: one line on stderr that begins with "error:" and names the
damaged file, a folder of it or a flag, exit status 2, and nothing new where the output goes. Everything else
is printed with its number, and the status is 1.
"""
import argparse
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "sample", "metrics", "curate", "train"
SECONDS = 60            # for one case

# name | piece of the base folder | command. {x} is the damaged copy of the piece, {base} the folder of whole
# pieces, {out} an empty folder; words of SHORT stand for flags.
TABLE = """
video sample     | clip.mp4 | sample {x} 'make it snow' EDITOR --frames 3 --steps 1 --out {out}/a.mp4
video gif        | clip.gif | sample {x} snow EDITOR --steps 1 --out {out}/a.mp4
video frames     | frames   | sample {x} snow EDITOR --frames 3 --steps 1 --out {out}/a.mp4
video metrics    | clip.mp4 | metrics {x} --source {base}/clip.mp4 --scorers tiny --viclip none
video cut        | videos   | curate cut --from {x} --to {out}/cut
video footage    | videos   | metrics footage {x} EDITOR --frames 2 --steps 1 --out {out}/r
video study      | videos   | metrics study {x} {base}/videos --out {out}/page.html
weights editor   | editor   | sample {base}/clip.mp4 snow --weights {x} --frames 2 --steps 1 --out {out}/a.mp4
weights run      | run      | sample {base}/clip.mp4 snow --weights {x} --frames 2 --steps 1 --out {out}/a.mp4
weights motion   | motion   | sample {base}/clip.mp4 snow EDITOR --motion {x} --frames 2 --steps 1
                              --out {out}/a.mp4
weights ckpt     | motion.ckpt | sample {base}/clip.mp4 snow EDITOR --motion {x} --frames 2 --steps 1
                              --out {out}/a.mp4
weights clip     | clip     | metrics {base}/clip.mp4 --target-caption snow --scorers tiny --viclip none
                              --clip {x}
weights viclip   | viclip   | metrics {base}/clip.mp4 --target-caption snow --scorers tiny --clip none
                              --viclip {x}
weights dino     | dino     | curate images EDITOR --dino {x} --to {out}/a FEW
weights judge    | llava    | metrics {base}/clip.mp4 --source {base}/clip.mp4 --instruction snow
                              --scorers tiny --clip none --viclip none --judge {x}
weights writer   | llava    | curate write --clips {base}/cut --writer llava --llava {x} --to {out}/w
                              --limit 1
weights teacher  | cogvideox | curate clips --images {base}/images --animate cogvideox --cogvideox {x}
                              --cogvideox-steps 1 --to {out}/c --limit 1
data jsonl       | pairs    | curate images EDITOR --from {x} --to {out}/a FEW
data ip2p        | ip2p     | curate images EDITOR --from {x} --to {out}/a FEW
data parquet     | parquet  | curate images EDITOR --from {x} --to {out}/a FEW
data insv2v      | insv2v   | curate pairs EDITOR --from {x} --to {out}/a --no-filter
data images      | images   | curate clips --images {x} --to {out}/c
data trajectory  | images   | curate videos EDITOR --motion none --images {x} --clips {base}/clips
                              --to {out}/v --candidates 1 --no-filter --limit 1
data clips       | clips    | curate videos EDITOR --motion none --images {base}/images --clips {x}
                              --to {out}/v --candidates 1 --no-filter --limit 1
data cut         | cut      | curate write --clips {x} --to {out}/w --writer {base}/texts.jsonl
data texts       | texts.jsonl | curate write --clips {base}/cut --to {out}/w --writer {x}
data written     | written  | curate real EDITOR --from {x} --to {out}/r --candidates 1 --steps 1
                              --no-filter --limit 1
data look        | round0   | curate look {x} --to {out}/look.html
data calibrate   | images   | curate calibrate {x} --to {out}/w.json
data ratings     | ratings.json | curate calibrate {base}/images --ratings {x} --to {out}/w.json
data weights     | score_weights.json | curate images EDITOR --score-weights {x} --to {out}/a FEW
data votes       | votes.json | metrics votes {x}
data captions    | captions.json | metrics study {base}/videos {base}/videos --captions {x}
                              --out {out}/page.html
data tgve        | tgve     | metrics tgve {x} EDITOR --limit 1 --steps 1 --scorers tiny --viclip none
                              --no-image-control --out {out}/r
data round       | round0   | train video TRAIN --train-on {x} --out {out}/r
data resumed     | run      | train video TRAIN --train-on {base}/round0 --out {x}
"""
SHORT = {"EDITOR": "--weights {base}/editor", "FEW": "--candidates 2 --steps 1 --n 1 --no-filter",
         "TRAIN": "--weights {base}/editor --motion {base}/motion --steps 1 --data {out}/d --runs {out}/u"}
TARGETS = {}
for line in re.sub(r"\n {6,}", " ", TABLE).strip().splitlines():
    name, piece, command = (cell.strip() for cell in line.split(" | "))
    TARGETS[name] = piece, re.sub(r"\b(EDITOR|FEW|TRAIN)\b", lambda found: SHORT[found[0]], command)
ODD = ["-1", "0", "nan", "inf", "1e400", "", "x", "1/0", "999999999999999999999", "2.5", "a b", "\u2603",
       "none", "tiny", "sd15", "{box}", "{box}/missing/file", "{base}/clip.mp4", "{base}/captions.json",
       "{base}/images", "clip_text=x"]
VALUES = [None, True, -1, 0, 3, 2 ** 40, 1e30, -0.5, float("nan"), "", "x", "\u2603", [], {}, [[]], [None],
          {"x": 1}, ["x"]]


# ---- whole pieces ----------------------------------------------------------------------------------------

def build(base, tree):
    """What works, once: clips, miniature weights, a small data set of every step, people's tables."""
    world, sample, curate, train = (import_module(name) for name in ("world", "sample", "curate", "train"))
    goldens, to_video = tree / "tests" / "goldens", import_module("model").to_video
    scene = world.draw_scene(3)
    frames = world.quantise(world.render(scene, 20, 64, 64))
    sample.write_video(base / "clip.mp4", to_video(frames[:3]), 8)
    Image.fromarray(frames[0]).save(base / "clip.gif", save_all=True, duration=80,
                                    append_images=[Image.fromarray(x) for x in frames[1:3]])
    for folder, n in (("frames", 3), ("videos/b", 20)):
        (base / folder).mkdir(parents=True)
        for k, x in enumerate(frames[:n]):
            Image.fromarray(x).save(base / folder / f"{k:05d}.png")
    sample.write_video(base / "videos" / "a.mp4", to_video(frames), 8)

    no_tests = shutil.ignore_patterns("expected*", "cases*", "tolerance*")
    shutil.copytree(goldens / "instruct-pix2pix", base / "editor", ignore=no_tests)
    (base / "editor" / "model_index.json").write_text(json.dumps({"instructvedit": {"size": 32, "steps": 1}}))
    for name, folder in (("clip", "clip-vit-large-patch14"), ("viclip", "ViCLIP"), ("dino", "dinov2-base"),
                         ("motion", "animatediff-motion-adapter-v1-5-2"), ("cogvideox", "CogVideoX-5b-I2V"),
                         ("llava", "llava-onevision-qwen2-0.5b-ov-hf")):
        shutil.copytree(goldens / folder, base / name, ignore=no_tests)
    for name in ("clip", "viclip"):
        shutil.copytree(base / name, base / "editor" / name)
    shutil.copy(goldens / "animatediff" / "mm_sd_v15_v2.ckpt", base / "motion.ckpt")

    def do(command):
        script, *argv = shlex.split(command.format(base=base))
        import_module(script).main(argv)
    do("curate images --weights {base}/editor --to {base}/images --n 12 --candidates 2 --steps 1 --no-filter")
    do("curate clips --images {base}/images --to {base}/clips --limit 2")
    do("curate videos --weights {base}/editor --motion {base}/motion --images {base}/images "
       "--clips {base}/clips --to {base}/round0 --candidates 1 --no-filter --limit 2")
    do("curate cut --from shapes --n 2 --to {base}/cut")
    (base / "texts.jsonl").write_text('{"instruction": "make it snow", "task": "effect"}\nmake it night\n')
    do("curate write --clips {base}/cut --to {base}/written --writer {base}/texts.jsonl")
    do("train video --weights {base}/editor --motion {base}/motion --train-on {base}/round0 --steps 1 "
       "--out {base}/run --data {base}/d --runs {base}/u")

    rows = []                                                      # `calibrate`: random edits never succeed
    for k, path in enumerate(sorted((base / "images").glob("*/candidates.json"))):
        truth = {"gain": k - 5, "outside": 30, "success": k % 2}
        rows += [row | {"truth": truth} for row in json.loads(path.read_text())]
        path.write_text(json.dumps(rows[-2:]))
    person = {"study": "s", "person": "p", "names": ["a", "b"]}
    ratings = {f"{row['id']}/target": {"text": 1 + k % 5} for k, row in enumerate(rows[::2])}
    votes = {f"c{k}": {"text": "ab"[k % 2], "quality": "a"} for k in range(4)}
    fitted = {"weights": {"consensus": 1.0}, "centre": {"consensus": 0.5}, "spread": {"consensus": 0.1},
              "tasks": {"style": 0.1}, "min_total": 0.1}
    for name, data in (("ratings", person | {"rating": True, "answers": ratings}), ("score_weights", fitted),
                       ("votes", person | {"rating": False, "answers": votes}), ("captions", {"a": "snow"})):
        (base / f"{name}.json").write_text(json.dumps(data))

    picture, other = (Image.fromarray(x) for x in (frames[0], frames[9]))
    for place in ("pairs", "ip2p/0000001", "insv2v/0000001/image", "parquet", "tgve/DAVIS_480p/480p_videos"):
        (base / place).mkdir(parents=True)
    picture.save(base / "pairs" / "a.png")
    line = {"source": "a.png", "instruction": "snow", "source_caption": "a circle", "target_caption": "snow"}
    (base / "pairs" / "list.jsonl").write_text(2 * (json.dumps(line) + "\n"))
    prompt = json.dumps({"edit": "make it snow", "input": "a circle", "output": "snow"})
    for folder in ("ip2p", "insv2v"):
        (base / folder / "0000001" / "prompt.json").write_text(prompt)
    (base / "ip2p" / "seeds.json").write_text('[["0000001", ["11"]]]')
    for k, x in enumerate((picture, other)):
        x.save(base / "ip2p" / "0000001" / f"11_{k}.jpg")
        for i in range(16):
            Image.fromarray(frames[i + 2 * k]).save(base / f"insv2v/0000001/image/7_{k}_{i:04d}.jpg")
    shutil.copy(base / "clip.mp4", base / "tgve" / "DAVIS_480p" / "480p_videos" / "fox.mp4")
    columns = ["Video name", "Our GT caption", "Style Change Caption", "Object Change Caption",
               "Background Change Caption", "Multiple Changes Caption"]
    (base / "tgve" / "LOVEU-TGVE-2023_Dataset.csv").write_text(
        ",".join(columns) + "\nDAVIS Videos:,,,,,\nfox,a fox,a drawn fox,a cat,a fox at sea,a drawn cat\n")
    (base / "tgve" / "prompts.json").write_text('{"fox": {"edit_style": "draw it", "edit_object": "a cat"}}')
    try:
        import pyarrow
        from pyarrow.parquet import write_table
    except ImportError:
        return
    blob = io.BytesIO()
    picture.save(blob, "PNG")
    cells = {"source_image": {"bytes": blob.getvalue()}, "edited_image": {"bytes": blob.getvalue()},
             "edit_prompt": "make it snow", "source_caption": "a circle", "target_caption": "snow"}
    table = pyarrow.table({name: [cell] * 2 for name, cell in cells.items()})
    write_table(table, base / "parquet" / "a.parquet")


# ---- damage ----------------------------------------------------------------------------------------------

def damage(path, rng):
    """One file of a piece is damaged; returns it."""
    file = path if path.is_file() else rng.choice(sorted(f for f in path.rglob("*") if f.is_file()))
    own = KINDS.get(file.suffix, damage_bytes)
    rng.choice([own] * 5 + [damage_bytes, damage_file])(file, rng)
    return file


def damage_file(file, rng):
    """It is missing, empty, a folder, a link into nothing, something else."""
    what = rng.randrange(5)
    file.unlink()
    if what == 1:
        file.write_bytes(b"")
    elif what == 2:
        file.mkdir()
    elif what == 3:
        file.symlink_to("nowhere")
    elif what == 4:
        file.write_bytes(rng.choice([b"\x89PNG\r\n", b"PK\x03\x04", b"<html>", b"{}", b"[]", bytes(64)]))


def damage_bytes(file, rng):
    """It is cut, or some of its bytes are others."""
    data = bytearray(file.read_bytes() or b"x")
    what = rng.randrange(4)
    if what == 0:
        data = data[:rng.randrange(len(data))]
    elif what == 1:
        for _ in range(rng.choice((1, 4, 64))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif what == 2:
        at = rng.randrange(len(data))
        data[at:at + 200] = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    else:
        for at in range(min(len(data), 64)):                       # the head, where formats say what they are
            if rng.random() < .2:
                data[at] = rng.randrange(256)
    file.write_bytes(data)


def places(data, path=()):
    """Paths to everything inside a JSON value."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, x in items:
        yield (*path, key)
        yield from places(x, (*path, key))


def change(data, rng):
    """A JSON value with one thing in it missing, called something else, or of another value."""
    found = list(places(data))
    if not found or rng.random() < .08:
        return rng.choice(VALUES)
    *path, key = rng.choice(found)
    inner = data
    for step in path:
        inner = inner[step]
    what = rng.random()
    if what < .2:
        del inner[key]
    elif what < .3 and isinstance(inner, dict):
        inner[f"{key}_"] = inner.pop(key)
    else:
        inner[key] = rng.choice(VALUES)
    return data


def damage_json(file, rng):
    file.write_text(json.dumps(change(json.loads(file.read_text()), rng)))


def damage_lines(file, rng):
    lines = file.read_text().splitlines()
    at = rng.randrange(len(lines))
    if file.suffix == ".jsonl" and lines[at].startswith("{") and rng.random() < .7:
        lines[at] = json.dumps(change(json.loads(lines[at]), rng))
    else:
        cells = lines[at].split(",")
        cells[rng.randrange(len(cells))] = rng.choice(["", "x", "\u2603", '"', ",,,", "Videos:", "-1"])
        lines[at] = ",".join(cells)
    if rng.random() < .2:
        lines.pop(rng.randrange(len(lines)))
    file.write_text("\n".join(lines))


def damage_tensors(file, rng):
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    x = tensors.pop(key)
    what = rng.randrange(7)
    if what == 1:
        tensors[f"{key}_"] = x
    elif what == 2:
        tensors[key] = x[..., :max(1, x.shape[-1] // 2)].contiguous() if x.ndim else x
    elif what == 3:
        tensors[key] = x.to(rng.choice([torch.int8, torch.float64, torch.bool]))
    elif what == 4:
        tensors[key] = torch.full_like(x, float("nan")) if x.is_floating_point() else x
    elif what == 5:
        tensors |= {key: x, "more": torch.zeros(3)}
    elif what == 6:
        tensors[key] = x.flatten()
    save_file(tensors, file)


KINDS = {".json": damage_json, ".jsonl": damage_lines, ".csv": damage_lines, ".txt": damage_lines,
         ".safetensors": damage_tensors}


def odd_flags(argv, known, rng):
    """A command with a value that does not fit, a flag too many or one too few."""
    at = rng.randrange(len(argv))
    what = rng.random()
    if what < .45:
        flags = [k for k, x in enumerate(argv) if x.startswith("--") and k + 1 < len(argv)]
        at = rng.choice(flags) + 1 if flags else at
        if argv[at - 1] not in ("--out", "--to"):                   # they say where this test looks
            argv[at] = rng.choice(ODD)
    elif what < .8:
        argv += [rng.choice(known or ["--size"]), rng.choice(ODD)]
    elif what < .9:
        argv[at:at] = [rng.choice(["--unknown", "--", "-x", "extra", ""])]
    elif argv[at] not in ("--out", "--to") and argv[at - 1] not in ("--out", "--to"):
        argv.pop(at)
    return argv


# ---- a case ----------------------------------------------------------------------------------------------

def listing(folder):
    """Files below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def call(script, argv):
    """(exit status, stdout, stderr) of a command; a traceback has status 1, as in a process of its own."""
    run, module = import_module("model").run, import_module(script)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))

    def late(*_):
        raise TimeoutError(f"still running after {SECONDS} s")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    sys.argv = [f"{script}.py", *argv]
    status = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run(module.main)
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            status = 1
            traceback.print_exc()
    signal.alarm(0)
    return status, *(stream.buffer.getvalue().decode(errors="replace") for stream in (out, err))


@cache
def flags_of(script, command):
    """The flags of a command, as --help lists them, but those that say where the output goes."""
    text = call(script, [*command, "--help"])[1]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    return sorted(named - {"--help", "--out", "--to", "--data", "--runs"})


def case(number, seed, base, box, names):
    """Runs a case -> (its target's name, what happened, details). box: an empty folder. The first len(names)
    cases are the whole pieces, which a command has to accept."""
    rng = Random(f"{seed} {number}")
    name = names[number] if number < len(names) else rng.choice(names)
    piece, command = TARGETS[name]
    x, out = box / piece, box / "out"
    out.mkdir(parents=True)
    source = base / piece
    (shutil.copytree if source.is_dir() else shutil.copy)(source, x)
    script, *argv = shlex.split(command)
    words = [piece.split(".")[0]]
    if number < len(names):
        name = "whole pieces"
    elif rng.random() < .25:
        name = f"flags of {script}"
        named = tuple(argv[:1]) if script in ("curate", "train") or argv[0].isalpha() else ()
        argv = odd_flags(argv, flags_of(script, named), rng)
        words += [word for word in argv if word]
    else:
        file = damage(x, rng)
        words += [file.name, file.stem, file.parent.name]
    argv = [part.format(x=x, base=base, out=out, box=box) if "{" in part else part for part in argv]
    before = listing(out)
    status, said, told = call(script, argv)
    lines = [line for line in told.splitlines() if line.strip()]
    error = lines[-1] if lines else ""
    new = [path for path in listing(out) if path not in before]
    if any("/" in path and ".part" not in path and not path.endswith("settings.json") for path in new):
        new = []                                                   # items that were done before stay
    details = "\n    ".join([f"{script}.py {shlex.join(argv)}", *told.splitlines()[-25:], ""])
    if status == 0:
        return name, "accepted", details
    if name == "whole pieces" and "candidates was kept" not in error:      # random teachers: nothing useful
        return name, "REFUSED", details
    if status != 2 or "Traceback" in told:
        return name, "TRACEBACK", details
    if not error.startswith("error: ") or sum(line.startswith("error: ") for line in lines) != 1:
        return name, "NOT ONE LINE", details
    if not any(word in error for word in (*words, "--", str(box), str(base))):
        return name, "NAMES NOTHING", details
    if new:
        return name, "LEFT BEHIND", details + f"    new: {new}\n"
    return name, "refused", details


KILLED = """
curate images --weights tiny --from shapes --n 3 --candidates 2 --steps 1 --no-filter --to {out}/made
train vae --size 32 --samples 2 --steps 60 --batch 8 --save-minutes 0 --data {out}/d --runs {out}/made --n 0
"""


def kills(n, seed):
    """n SIGKILLs at random moments, shared by the commands of KILLED: True where what each of them has made in
    the end equals an undisturbed run's, byte for byte (but for logs and checkpoints, which hold times)."""
    rng, good = Random(seed), True

    def made(out):
        return {x.relative_to(out): x.read_bytes() for x in sorted(out.rglob("made/**/*"))
                if x.is_file() and x.suffix not in (".jsonl", ".pt")}
    for line in KILLED.strip().splitlines():
        with tempfile.TemporaryDirectory() as folder:
            whole, broken = Path(folder, "whole"), Path(folder, "broken")

            def start(out):
                script, *words = shlex.split(line.format(out=out))
                return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *words, "--device", "cpu"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            began = time.time()
            assert start(whole).wait() == 0, line
            took, hit = time.time() - began, 0
            while hit < n // 2:
                process = start(broken)
                try:
                    process.wait(rng.uniform(0.2, 1) * took)
                    shutil.rmtree(broken)                           # it had finished: begin anew
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    hit += 1
            end = start(broken).wait()
            equal = made(whole) == made(broken)
            print(f"{line.split(' --')[0]}: {hit} kills, exit {end}, {len(made(whole))} files "
                  + ("equal" if equal else "DIFFER"), flush=True)
            good &= equal and end == 0
    return good


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--n", type=int, default=1000, help="cases")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="this case alone, and what it said")
    p.add_argument("--what", default="", help="targets with this in their name")
    p.add_argument("--kills", type=int, default=0, help="so many SIGKILLs instead")
    args = p.parse_args()
    if args.kills:
        sys.exit(not kills(args.kills, args.seed))
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))   # 2 ** 40 must not take the machine down
    torch.set_num_threads(1)
    names = [name for name in TARGETS if args.what in name]
    counts, began = Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        tree, base, home = (Path(folder) / name for name in ("tree", "base", "home"))
        ours = shutil.ignore_patterns(".*", "data", "runs", "results", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ours)                   # whose data/, runs/ and results/ may fill
        sys.path.insert(0, str(tree))
        base.mkdir()
        home.mkdir()
        os.chdir(home)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            build(base, tree)
        print(f"pieces built in {time.time() - began:.0f} s", flush=True)
        whole = listing(base)
        for number in range(args.n) if args.only is None else [args.only]:
            np.random.seed(0)
            box = Path(folder) / f"case{number}"
            name, what, details = case(number, args.seed, base, box, names)
            counts[name, what] += 1
            if what.isupper() or args.only is not None:
                print(f"{what}: --seed {args.seed} --only {number}, {name}\n    {details}", flush=True)
            shutil.rmtree(box, ignore_errors=True)
            assert listing(base) == whole, f"case {number} changed the whole pieces"
    print("| input | accepted | refused | trouble |\n|---|---|---|---|")
    for name in sorted({name for name, _ in counts}):
        row = {what: n for (who, what), n in counts.items() if who == name}
        fine = row.pop("accepted", 0), row.pop("refused", 0)
        print(f"| {name} | {fine[0]} | {fine[1]} | {', '.join(f'{n} {what}' for what, n in row.items())} |")
    trouble = sum(n for (_, what), n in counts.items() if what.isupper())
    print(f"{sum(counts.values())} cases in {time.time() - began:.0f} s, {trouble} in trouble")
    sys.exit(trouble > 0)


if __name__ == "__main__":
    main()
