"""README's "to change ... go to ...": every row, made on a copy of the tree and run.

Each change is a few lines at one place or two. Where a text that it changes is no longer there, the recipe
and the README need to be written anew.
"""
import json
import shutil
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
MOTION = GOLDENS / "animatediff-motion-adapter-v1-5-2"
FILES = "world", "model", "teachers", "sample", "metrics", "curate", "train"
FEW = "--candidates 1 --no-filter"


class Tools:
    """The scripts of the tree that imports find first: tools.curate and so on."""
    def __getattr__(self, name):
        return import_module(name)


@contextmanager
def changed(folder, *edits):
    """A copy of the seven files after edits: (file, text that is there once, what takes its place)."""
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "assets").symlink_to(ROOT / "assets")
    for name, old, new in edits:
        path = folder / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name}.py holds {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new), encoding="utf-8")
    kept = {name: sys.modules.pop(name) for name in FILES if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield Tools()
    finally:
        sys.path.remove(str(folder))
        for name in FILES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def do(script, command, **places):
    script.main(command.format(**places).split())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A miniature image editor with scorers of its own, 32 pixels, one step."""
    folder = tmp_path_factory.mktemp("hub") / "editor"
    shutil.copytree(GOLDENS / "instruct-pix2pix", folder)
    for name, source in (("clip", "clip-vit-large-patch14"), ("viclip", "ViCLIP")):
        (folder / name).symlink_to(GOLDENS / source)
    (folder / "model_index.json").write_text(json.dumps({"instructvedit": {"size": 32, "steps": 1}}))
    return folder


def images(tools, hub, to, n):
    """The rows of a small data set of drawn images."""
    do(tools.curate, "images --weights {hub} --to {to}/images --n {n} --steps 1 " + FEW, hub=hub, to=to, n=n)
    return tools.curate.read_rows(to / "images")


def curated(tools, hub, images, folder):
    """A data set of one clip, as round 0 trains on."""
    do(tools.curate, "clips --images {images} --to {to}/clips", images=images, to=folder)
    do(tools.curate, "videos --weights {hub} --motion {motion} --images {images} --clips {to}/clips "
       "--to {to}/round0 " + FEW, hub=hub, motion=MOTION, images=images, to=folder)
    return folder / "round0"


@pytest.fixture(scope="module")
def clips(hub, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    with changed(tmp_path_factory.mktemp("tree")) as tools:
        images(tools, hub, data, n=1)
        return curated(tools, hub, data / "images", data)


def train_round(tools, hub, clips, to):
    """Two steps of a round -> (its folder, the last line of its log)."""
    do(tools.train, "video --weights {hub} --motion {motion} --train-on {clips} --steps 2 --batch 1 "
       "--no-guided-loss --out {to}/run --data {to}/d --runs {to}/r",
       hub=hub, motion=MOTION, clips=clips, to=to)
    return to / "run", json.loads((to / "run" / "log.jsonl").read_text().splitlines()[-1])


def edit(tools, weights, n_frames=2, steps=1):
    ed = tools.model.VideoEditor.from_pretrained(weights, device="cpu")
    video = torch.linspace(-1, 1, n_frames * 3 * 32 * 32).reshape(1, n_frames, 3, 32, 32)
    return ed, ed.edit(video, "make it snow", steps)


def test_gamma_is_one_value_a_channel(hub, clips, tmp_path):
    with changed(tmp_path, ("model", "self.gamma = nn.Parameter(torch.zeros(()))",
                            "self.gamma = nn.Parameter(torch.zeros(channels, 1, 1))")) as tools:
        run, log = train_round(tools, hub, clips, tmp_path)
        assert all(isinstance(x, float) for x in log["gamma"].values())
        ed, video = edit(tools, run)
        gamma = ed.unet.down_blocks[0].motion_modules[0].gamma
        assert gamma.ndim == 3 and gamma.unique().numel() > 1 and torch.isfinite(video).all()


def test_epm_acts_at_the_up_blocks_only(hub, clips, tmp_path):
    sites = """        for block in self.blocks():
            for site in getattr(block, "attentions", []):"""
    with changed(tmp_path, ("model", sites, sites.replace("self.blocks()", "self.up_blocks"))) as tools:
        run, log = train_round(tools, hub, clips, tmp_path)
        assert log["epm"] and all(name.startswith("up_blocks") for name in log["epm"])
        ed, video = edit(tools, run)
        where = {name.split(".")[0] for name, m in ed.unet.named_modules() if isinstance(m, tools.model.EPM)}
        assert where == {"up_blocks"} and torch.isfinite(video).all()


BASHFORTH = '''class AdamsBashforth(DDIM):
    """DDIM with the mean slope of this step and the one before it."""
    before = None

    def step(self, eps, i, z, **how):
        slope = eps if self.before is None else (3 * eps - self.before) / 2
        self.before = eps
        return super().step(slope, i, z, **how)


def noise_levels(cfg):'''


def test_another_sampler_takes_ddims_place(hub, tmp_path):
    with changed(tmp_path, ("model", "def noise_levels(cfg):", BASHFORTH),
                 ("model", "        return DDIM(steps,", "        return AdamsBashforth(steps,")) as tools:
        ed, video = edit(tools, hub, steps=3)
        assert type(ed.scheduler_for(2)).__name__ == "AdamsBashforth"
    plain = edit(Tools(), hub, steps=3)[1]
    assert torch.isfinite(video).all() and (video - plain).abs().max() > 1e-3


def test_clips_have_32_frames(hub, clips, tmp_path):
    with changed(tmp_path, ("model", "N_FRAMES = 16 ", "N_FRAMES = 32 ")) as tools:
        data = curated(tools, hub, clips.parent / "images", tmp_path)
        file = next(data.glob("*/latents.safetensors"))
        assert len(load_file(file)["source"]) == 32 and tools.sample.WINDOW == 32
        run, log = train_round(tools, hub, data, tmp_path)
        assert np.shape(log["epm_matrix"]) == (32, 32)
        ed, video = edit(tools, run, n_frames=32)                   # one pass
        assert video.shape[1] == 32 and torch.isfinite(video).all()


WHAT_IS_TRAINED = "    for name, p in ed.unet.to(ed.device).named_parameters():\n"
LORA = '''    for name, m in list(ed.unet.named_modules()):
        if isinstance(m, torch.nn.Linear) and ".attn1." in name and "motion_modules" not in name:
            ed.unet.set_submodule(name, LoRA(m, rank=2))
'''


def test_a_round_trains_lora_on_the_unets_attention(hub, clips, tmp_path):
    with changed(tmp_path,
                 ("train", "(FIELDS, LLAVA,", "(FIELDS, LLAVA, LoRA, merge_lora,"),
                 ("train", WHAT_IS_TRAINED, LORA + WHAT_IS_TRAINED),
                 ("train", 'or ".epm." in name\n', 'or ".epm." in name or ".lora_" in name\n'),
                 ("train", "        config = ed.unet.config | dict(motion",
                  "        merge_lora(ed.unet)\n        config = ed.unet.config | dict(motion")) as tools:
        run, _ = train_round(tools, hub, clips, tmp_path)
        edit(tools, run)
    before, after = (load_file(x / "unet" / "diffusion_pytorch_model.safetensors") for x in (hub, run))
    moved = {name for name, x in before.items() if not torch.equal(x.float(), after[name].float())}
    assert moved and all(".attn1.to_" in name for name in moved)


THERMAL = '''def thermal(x, times, seed):
    g = _luma(x)
    return _unit(np.concatenate([g, g * g, 1 - g], -1))


def grayscale('''
ENTRY = '''EFFECTS = {
    "thermal": Effect(thermal, "in thermal colors", """
        make {it} thermal; show {it} in thermal colors
        / turn {it} thermal"""),
'''


def test_a_new_effect_is_one_function_and_one_entry(hub, tmp_path):
    with changed(tmp_path, ("world", "def grayscale(", THERMAL), ("world", "EFFECTS = {\n", ENTRY)) as tools:
        w = tools.world
        found = [(s, e) for s in map(w.draw_scene, range(400)) for e in [w.propose_edit(s, 1, "effect")]
                 if "thermal" in e.instruction.lower()]
        scene, asked = found[0]
        assert "thermal" in w.known_words() and asked.target_caption.endswith("in thermal colors")
        truth, source = (w.render(s, 1, 32, 32) for s in (asked.target, scene))
        np.testing.assert_allclose(truth, w.thermal(source, [0], 0), atol=1e-6)
        assert len(images(tools, hub, tmp_path, n=3)) == 3


GROW = '''def edit_size(scene, ask):
    at, s, name = ask.choose(scene)
    return Change(ask.say("grow", o=name), put(scene, at, replace(s, radius=1.3 * s.radius)), True, (s.kind,))


def edit_multiple('''
TASK = '''TASKS = {
    "size": Task(edit_size, 9, 9, wordings={"grow": "make {o} larger; enlarge {o} / let {o} be larger"}),
'''


def test_a_new_kind_of_edit_is_one_function_and_one_entry(hub, tmp_path):
    with changed(tmp_path, ("world", "def edit_multiple(", GROW), ("world", "TASKS = {\n", TASK)) as tools:
        assert any(row["task"] == "size" for row in images(tools, hub, tmp_path, n=6))
        pairs = [tools.world.draw_pair(k, "synthetic", Random(k), 16, 16)[1] for k in range(8)]
        assert any(record["task"] == "size" for record in pairs)    # as `tiny` is trained on


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Videos as nobody else keeps them: <name>/video.bin, listed in films.json."""
    from sample import write_video
    from world import draw_scene, render
    folder = tmp_path_factory.mktemp("films")
    for k in (3, 4):
        (folder / f"film{k}").mkdir()
        frames = torch.from_numpy(render(draw_scene(k), 20, 48, 48)).permute(0, 3, 1, 2)[None] * 2 - 1
        write_video(folder / f"film{k}" / "video.mp4", frames, 8)
        (folder / f"film{k}" / "video.mp4").rename(folder / f"film{k}" / "video.bin")
    (folder / "films.json").write_text(json.dumps(["film3", "film4"]))
    return folder


def test_another_layout_of_videos_is_read(films, tmp_path):
    start = 'or of a folder of folders of frames."""\n'
    reader = '''    if (where / "films.json").is_file():
        names = [f"{name}/video.bin" for name in read_json(where / "films.json", list)]
        return [(name, where / name) for name in names]
'''
    with changed(tmp_path, ("curate", start, start + reader)) as tools:
        do(tools.curate, "cut --from {films} --to {to}/cut", films=films, to=tmp_path)
        assert {row["origin"]["file"] for row in tools.curate.read_rows(tmp_path / "cut")} == {
            "film3/video.bin", "film4/video.bin"}


BRIGHTNESS = '''SCORES = {
    "brightness": Score("brightness", "-", 2, "mean of the edit, 0 to 1"),
'''


def test_a_new_score_filters_and_stands_in_tables(hub, tmp_path, capsys):
    with changed(tmp_path, ("metrics", "SCORES = {\n", BRIGHTNESS),
                 ("metrics", 'return {"flicker": flicker(edited, source),',
                  'return {"brightness": np.mean(edited) / 255, "flicker": flicker(edited, source),'),
                 ("metrics", "COLUMNS = (", 'COLUMNS = ("brightness", ')) as tools:
        images(tools, hub, tmp_path, n=1)
        do(tools.curate, "clips --images {to}/images --to {to}/clips", to=tmp_path)
        with pytest.raises(tools.model.UserError, match="brightness removed 1 of 1"):
            do(tools.curate, "videos --weights {hub} --motion {motion} --images {to}/images "
               "--clips {to}/clips --to {to}/round0 --candidates 1 --mode image --min brightness=1.1 "
               "clip_text=-inf viclip_out=-inf clip_frame=-inf", hub=hub, motion=MOTION, to=tmp_path)
        capsys.readouterr()
        tools.metrics.main_shapes(f"--weights {hub} --n 1 --frames 2 --steps 1 --clip none --viclip none "
                                  f"--no-image-control --out {tmp_path}/shapes".split())
        head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
        assert "brightness" in head
