"""train.py: a cut run goes on exactly where it was, the rounds run as one command, and what goes wrong says so."""
import json
import math
import multiprocessing
import os
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import curate
import model
import train
import world
from model import EPM, ROOT, UNet, UserError, VideoEditor, read_json
from sample import write_video
from teachers import LlavaOneVision, writer_loss
from train import How, Round, Training

GOLDENS = Path(__file__).parent / "goldens"
IP2P, ADAPTER = GOLDENS / "instruct-pix2pix", GOLDENS / "animatediff-motion-adapter-v1-5-3"
LLAVA = GOLDENS / "llava-onevision-qwen2-0.5b-ov-hf"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(folder):
    return [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]


class Cut:
    """Breaks training off, like a kill, in its n-th step from now on."""
    def __init__(self, monkeypatch, n):
        self.left, self.real = n, torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", self)

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.real(*args)

# ---- the loop, on a linear layer -------------------------------------------------------------------------------

def small_fit(out, losses=None, nan_at=None, **settings):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)

    def loss_fn(number, generator):
        x = torch.randn(16, 4, generator=generator)
        loss = (net(x) - x[:, :3] * 2).square().mean() * (math.nan if number == nan_at else 1)
        if losses is not None:
            losses.append(loss.item())
        return loss
    s = Training(**dict(steps=8, lr=1e-2, warmup=2) | settings)
    assert not train.is_done(out, asdict(s), How())
    return train.fit(net, loss_fn, out, s, How(save_minutes=0)).state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_cut_run_continues_with_the_losses_weights_and_log_of_an_uninterrupted_one(tmp_path, monkeypatch, optimizer):
    whole, parts = [], []
    want = small_fit(tmp_path / "whole", whole, optimizer=optimizer)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        Cut(m, 6)
        small_fit(tmp_path / "cut", parts, optimizer=optimizer)
    (tmp_path / "cut" / "state.tmp").write_bytes(b"half a checkpoint")         # what a kill while saving leaves behind
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:                       # and lines that will come again
        f.write(json.dumps(dict(step=60, loss=1.0)) + "\n" + '{"step": 70, "lo')
    assert same(small_fit(tmp_path / "cut", parts, optimizer=optimizer), want) and parts[:5] + parts[6:] == whole
    assert [(r["step"], r["loss"]) for r in log(tmp_path / "cut")] == [(r["step"], r["loss"]) for r in log(tmp_path / "whole")]
    assert same(small_fit(tmp_path / "cut", optimizer=optimizer), want)        # cut between the last step and its network


def test_the_network_is_the_average_and_another_seed_draws_other_data(tmp_path):
    first, other = [], []
    average = small_fit(tmp_path / "a", first)
    assert not torch.equal(torch.load(tmp_path / "a" / "state.pt")["trained"]["weight"], average["weight"])
    small_fit(tmp_path / "b", other, seed=1)
    assert first[0] != other[0]                                                # from the same first weights


def test_nan_stops_with_the_step_before_it_reaches_weights_or_checkpoint(tmp_path):
    with pytest.raises(UserError, match="loss is nan .* at step 5; lower --lr"):
        small_fit(tmp_path / "a", nan_at=5)
    assert torch.load(tmp_path / "a" / "state.pt")["step"] == 5
    net = torch.nn.Linear(2, 1)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="norm (nan|inf) at step 2"):           # the root's slope at 0 is infinite
        train.fit(net, lambda step, g: (net.weight * (step != 2)).abs().sum().sqrt(), tmp_path / "b", Training(steps=4), How())
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        Cut(m, 4)
        small_fit(tmp_path)
    (tmp_path / "state.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as full:
        small_fit(tmp_path)
    assert model.disk_full(full.value) and torch.load(tmp_path / "state.pt")["step"] == 3


def test_a_damaged_checkpoint_is_named_and_left_as_it_is(tmp_path):
    small_fit(tmp_path)
    rng, whole = random.Random(0), (tmp_path / "state.pt").read_bytes()
    for k in range(40):
        broken = bytearray(whole[:rng.randrange(len(whole))] if k % 2 else whole)
        for _ in range(50 if k else 0):
            broken[rng.randrange(len(broken))] = rng.randrange(256) if len(broken) else 0
        (tmp_path / "state.pt").write_bytes(broken if k else b"")
        try:
            small_fit(tmp_path)
        except UserError as error:
            assert str(error).startswith(str(tmp_path / "state.pt")) and "\n" not in str(error)
            assert (tmp_path / "state.pt").read_bytes() == (broken if k else b"")
    torch.save({"step": 3}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="state.pt: lacks 'trained'; put a whole copy there"):
        small_fit(tmp_path)


def test_other_settings_are_refused_by_name_unless_forced_and_a_finished_run_is_kept(tmp_path, capsys):
    settings = dict(steps=8, lr=1)
    assert not train.is_done(tmp_path, settings, How(), clips=3)
    for now, match in ((settings | dict(lr=2), "lr 1 .now 2."), (settings, "clips 3 .now 4.")):
        with pytest.raises(UserError, match=match):
            train.is_done(tmp_path, now, How(), clips=4)
    with pytest.raises(UserError, match="processes 1 .now 2."):                # the batch would be another
        train.is_done(tmp_path, settings, How(n_ranks=2), clips=3)
    assert not train.is_done(tmp_path, settings | dict(lr=2), How(force=True), clips=3)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lr 2 .now 1."):
        train.is_done(tmp_path, settings, How())
    before = (tmp_path / "settings.json").read_text()
    assert train.is_done(tmp_path, settings, How(force=True)) and train.is_done(tmp_path, dict(lr=2, new=1), How(n_ranks=2))
    assert (tmp_path / "settings.json").read_text() == before and capsys.readouterr().out.count(": finished") == 2


def test_muon_equals_torch_muon_on_matrices_and_adamw_on_vectors_and_takes_a_convolution_for_a_matrix():
    torch.manual_seed(0)
    matrix, vector, conv = torch.randn(24, 40), torch.randn(24), torch.randn(16, 4, 3, 3)
    ours = [x.clone().requires_grad_(True) for x in (matrix, vector, conv)]
    matrices = [x.clone().requires_grad_(True) for x in (matrix, conv.flatten(1))]
    alone = vector.clone().requires_grad_(True)
    muon = train.Muon([dict(params=ours[::2], muon=True), dict(params=ours[1:2], muon=False)], lr=1e-2, weight_decay=0.1,
                      betas=(0.9, 0.99), fused=True)
    references = (torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW([alone], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), fused=True))
    for _ in range(4):
        for x, y in zip(ours, (matrices[0], alone, matrices[1])):
            y.grad = torch.randn_like(y)
            x.grad = y.grad.view_as(x).clone()
        muon.step()
        for optimizer in references:
            optimizer.step()
    assert torch.equal(ours[1], alone)
    for x, y, start in ((ours[0], matrices[0], matrix), (ours[2].flatten(1), matrices[1], conv.flatten(1))):
        moved, want = (x - start).detach(), (y - start).detach()               # torch iterates in bfloat16
        assert (moved - want).norm() < 0.02 * want.norm()
    for m in (lopsided := torch.randn(32, 48) * torch.logspace(0, -2, 32)[:, None], lopsided.T):
        values = torch.linalg.svdvals(train.orthogonal(m))                     # singular values over two orders
        assert values.min() > 0.6 and values.max() < 1.25


def test_every_kind_of_parameter_has_its_rate_and_its_optimizer():
    unet = UNet({k: v for k, v in read_json(train.TINY / "unet" / "config.json").items() if k not in VideoEditor.VIDEO})
    unet.add_motion({"motion_norm_num_groups": 8}, gamma=0.0)
    unet.add_epm()
    names = {p: name for name, p in unet.named_parameters()}
    groups = train.parameter_groups(dict(unet.named_parameters()), Training(lr=1e-3, lr_new=1e-2, optimizer="muon"))
    kinds = {(g["lr"], g["weight_decay"], g["muon"]): [names[p] for p in g["params"]] for g in groups}
    assert [g["lr"] for g in groups][0] == 1e-3 and set(kinds) == {(1e-3, .01, False), (1e-3, .01, True), (1e-2, 0, False), (1e-1, 0, False)}
    assert all(k.endswith(".gamma") for k in kinds[1e-1, 0, False]) and all(".epm." in k for k in kinds[1e-2, 0, False])
    inner = kinds[1e-3, .01, True]
    assert all(k.startswith(("down_blocks", "mid_block", "up_blocks")) and k.endswith("weight") and "norm" not in k for k in inner)
    assert any("attn2.to_k" in k for k in inner) and any("conv1" in k for k in inner)

# ---- the drawn data and the networks of `tiny` ------------------------------------------------------------------

def few(monkeypatch, n):
    monkeypatch.setattr(train, "KINDS", {kind: (*how[:2], n) for kind, how in train.KINDS.items()})


def flags(folder, *more):
    return ["--data", folder / "d", "--runs", folder / "r", "--device", "cpu", "--save-minutes", 0, "--n", 0, *more]


def call(*argv):
    train.main([str(x) for x in argv])


NETWORKS = {"vae": ["--size", 32, "--batch", 4], "clip": ["--batch", 4], "viclip": ["--batch", 1, "--clips", 2],
            "image": ["--size", 32, "--batch", 2], "motion": ["--size", 32, "--batch", 1]}


def smaller(folder, monkeypatch):
    """The sizes of what is trained from nothing: `tiny`'s own, fewer and narrower layers."""
    narrow = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=32)
    changes = {"vae": dict(block_out_channels=[8, 8, 16]), "unet": dict(block_out_channels=[16, 32], norm_num_groups=4, cross_attention_dim=32),
               "clip": dict(projection_dim=32), "viclip": dict(image_size=48, vision_width=32, vision_layers=1, text_layers=1)}
    for path in train.TINY.rglob("*.json"):
        data = read_json(path)
        if path.name == "config.json" and path.parent.name in changes:
            data |= changes[path.parent.name]
        if path.parent.name == "clip" and path.name == "config.json":
            data["text_config"] |= narrow
            data["vision_config"] |= narrow | dict(image_size=48)
        model.write_json(folder / path.relative_to(train.TINY), data)
    monkeypatch.setattr(train, "TINY", folder)


def test_every_network_of_tiny_trains_from_nothing_resumes_equal_and_is_then_left_alone(tmp_path, monkeypatch, capsys):
    few(monkeypatch, 2)
    smaller(tmp_path / "sizes", monkeypatch)
    for name, own in NETWORKS.items():
        command, out = [name, "--samples", 2, "--steps", 2, *own, *flags(tmp_path)], tmp_path / "r" / name
        call(*command)
        if name in ("vae", "clip", "image"):
            whole = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
            for last in ("config.json", "model_index.json", "state.pt", "settings.json"):
                (out / last).unlink(missing_ok=True)
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                Cut(m, 2)
                call(*command)
            assert not model.finished(out)
            with pytest.raises(UserError, match="samples 2 .now 3."):
                call(*command, "--samples", 3)
            call(*command)
            assert whole and all(path.read_bytes() == data for path, data in whole.items())
        call(*command)
        assert f"{name}: finished" in capsys.readouterr().out
    runs = tmp_path / "r"
    ed = VideoEditor.from_pretrained(runs / "image", motion=runs / "motion", device="cpu")
    assert ed.size == 32 and ed.guidance == (1.5, 1.5) and ed.words == set(world.known_words()) and ed.default_mode == "ffg"
    call("--n", 0, *flags(tmp_path))                                     # `python train.py`: all is there
    train.export(runs / "image", tmp_path / "tiny")
    ours, theirs = ({p.relative_to(x).as_posix() for p in x.rglob("*.*")} for x in (tmp_path / "tiny", ROOT / "assets" / "tiny"))
    assert ours == theirs and "base" not in read_json(tmp_path / "tiny" / "model_index.json")["instructvedit"]
    (runs / "vae" / WEIGHTS).write_bytes((runs / "clip" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="image: made with vae .* .now"):       # the editor of another VAE
        call("image", "--samples", 2, "--steps", 2, *NETWORKS["image"], *flags(tmp_path))


@pytest.fixture(scope="module")
def image_pairs(tmp_path_factory):
    """Two data sets of image pairs: a .jsonl, one of whose pictures is broken, and InstructPix2Pix's folders."""
    made, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = []
    for i in range(6):
        picture = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((80, 60))
        folder = made / "ip2p" / f"{i:07d}"
        folder.mkdir(parents=True)
        (folder / "prompt.json").write_text(json.dumps(dict(input="noise", edit="make it grey", output="grey noise")))
        for k, edited in enumerate((picture, picture.convert("L").convert("RGB"))):
            edited.save(made / f"{i}_{k}.png")
            edited.save(folder / f"11_{k}.jpg")
        rows.append(dict(source=f"{i}_0.png", target=f"{i}_1.png", instruction="make it grey", source_caption="noise",
                         target_caption="grey noise"))
    (made / "2_0.png").write_bytes(b"no picture")
    (made / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [made / "pairs.jsonl", made / "ip2p"]


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """Stable Diffusion in miniature: InstructPix2Pix without the source's channels."""
    folder = tmp_path_factory.mktemp("sd")
    shutil.copytree(IP2P, folder, dirs_exist_ok=True)
    tensors, config = load_file(folder / "unet" / WEIGHTS), read_json(folder / "unet" / "config.json")
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :4].contiguous()
    save_file(tensors, folder / "unet" / WEIGHTS)
    (folder / "unet" / "config.json").write_text(json.dumps(config | dict(in_channels=4)))
    return folder


def test_step_1_trains_an_editor_from_stable_diffusion_on_two_data_sets(tmp_path, monkeypatch, capsys, image_pairs, diffusion):
    how = ["image", "--model", "sd15", "--images-from", *image_pairs, "--weights", diffusion, "--size", 64, "--batch", 2,
           "--accumulate", 2, "--steps", 4, "--shares", 3, 1]
    call(*how, *flags(tmp_path), "--out", tmp_path / "whole")
    assert "pairs.jsonl: 5 image pairs" in capsys.readouterr().out
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        Cut(m, 3)
        call(*how, *flags(tmp_path), "--out", tmp_path / "cut")
    call(*how, *flags(tmp_path), "--out", tmp_path / "cut")
    a, b = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("whole", "cut"))
    assert same(a, b) and not (tmp_path / "whole" / "text_encoder").exists()
    assert a["conv_in.weight"].shape[1] == 8 and a["conv_in.weight"][:, 4:].abs().max() > 0
    start = VideoEditor.from_pretrained(tmp_path / "whole" / "start", motion=False, device="cpu")
    z, source = torch.randn(2, 1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first = start.unet(torch.cat([z, source], 2), torch.tensor([500]), start.encode_text(["grey"]), "image")
    assert torch.equal(first, start.unet(torch.cat([z, 0 * source], 2), torch.tensor([500]), start.encode_text(["grey"]), "image"))
    ed = VideoEditor.from_pretrained(tmp_path / "whole", motion=ADAPTER, device="cpu")
    assert ed.size == 64 and ed.default_mode == "ffg" and ed.words is None
    call(*how, *flags(tmp_path), "--out", tmp_path / "wanted", "--no-cache")      # the broken picture gives way
    assert "left out" in capsys.readouterr().out and model.finished(tmp_path / "wanted")


def test_step_1_with_other_shares_than_data_sets_is_refused(tmp_path, image_pairs):
    with pytest.raises(UserError, match="--shares 1.0"):
        call("image", "--model", "sd15", "--images-from", *image_pairs, "--shares", 1, "--weights", IP2P, "--size", 64,
             "--no-cache", *flags(tmp_path))


def test_a_stage_without_its_networks_says_which_one_to_run(tmp_path):
    for name, first in (("viclip", "clip"), ("image", "vae"), ("motion", "image")):
        with pytest.raises(UserError, match=f"run `python train.py {first}` first"):
            call(name, *flags(tmp_path))
    assert not (tmp_path / "d").exists() and not (tmp_path / "r").exists()


def test_another_world_is_drawn_anew_and_its_latents_are_not_the_old_ones(tmp_path, monkeypatch):
    few(monkeypatch, 2)
    command = ["image", "--weights", "tiny", "--steps", 1, "--samples", 2, "--size", 32, "--batch", 2, *flags(tmp_path)]
    call(*command)
    words = "text_model.embeddings.token_embedding.weight"                     # the text encoder is trained along
    before, after = (load_file(x / "text_encoder" / "model.safetensors")[words].float() for x in (train.TINY, tmp_path / "r" / "image"))
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    [folder] = (tmp_path / "d").glob("world-*")
    train.draw_file(tmp_path / "again.safetensors", "pairs", 0, 2, 32)
    for end in (".safetensors", ".json"):
        assert (folder / f"pairs-32px-00000{end}").read_bytes() == (tmp_path / f"again{end}").read_bytes()
    real = train.fingerprint
    monkeypatch.setattr(train, "fingerprint", lambda *paths: "0" * 8 if paths == (ROOT / "world.py",) else real(*paths))
    with pytest.raises(UserError, match="made with world world-.* .now world-00000000."):
        call(*command)


def test_every_known_word_is_one_token_the_end_token_is_last_and_merges_have_one_order(tmp_path):
    train.train_tokenizer(tmp_path, world.known_words())
    train.train_tokenizer(tmp_path / "again", world.known_words())                                  # as a resumed run does
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    tokenizer = model.Tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert all(len(tokenizer.encode(w)) == 1 for w in world.known_words())
    assert tokenizer.end == max(tokenizer.vocab.values()) and len(tokenizer.encode("zxqv")) > 1


def test_batches_hold_about_the_same_number_of_pixels_at_any_aspect():
    record = dict(task="style", source="a", target="b", instruction="c")
    sizes = []
    for hw in ((96, 96), (96, 168), (168, 96)):
        shards = [(torch.zeros(500, 2, *hw, 3, dtype=torch.uint8), [record] * 500)]
        pairs, texts = train.random_batch(shards, 24, torch.Generator().manual_seed(0), odds={"style": 2})
        sizes.append(len(pairs) * hw[0] * hw[1])
        assert [len(x) for x in texts] == [len(pairs)] * 3
    assert max(sizes) < 1.1 * min(sizes)


def test_the_smaller_part_of_a_frame_counts_more_whether_it_changed_or_was_kept():
    change = torch.zeros(3, 4, 8, 8)
    change[0, :, :2, :2], change[1], change[1, :, :2, :2], change[2] = 2, -2, 0, 2     # a patch; all but a patch; everything
    weights = train.region_weights(change, 3.0)
    assert weights.shape == (3, 8, 8) and torch.allclose(weights.mean((1, 2)), torch.ones(3))
    assert torch.allclose(weights[0], weights[1]) and weights[0, 0, 0] > 3 * weights[0, 7, 7]
    assert torch.equal(weights[2], torch.ones(8, 8)) and torch.equal(train.region_weights(change, 0.0), torch.ones(3, 8, 8))


def test_contrastive_loss_takes_equal_texts_as_equally_right():
    a = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    a[1] = a[0]
    equal, other = (train.contrastive_loss(a, a, 100.0, texts) for texts in ("aabc", "abcd"))
    assert equal < other + 1e-6 and equal < math.log(2) + 0.05               # no better than a coin between the equal two

# ---- stages motion and video, on the small random InstructPix2Pix of the goldens --------------------------------

SMALL = Round(steps=2, lr=2e-4, batch=2, guided_loss=False)


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """An image editor of random weights, half of IP2P's levels, and motion modules for it: SMALL starts from them."""
    folder = tmp_path_factory.mktemp("small")
    for part in IP2P.iterdir():
        if part.is_dir() and part.name != "unet":
            (folder / part.name).symlink_to(part)
    for name, scorer in (("clip", "clip-vit-large-patch14"), ("viclip", "ViCLIP")):
        (folder / name).symlink_to(GOLDENS / scorer)
    (folder / "model_index.json").write_text(json.dumps({"instructvedit": {"size": 32, "steps": 1}}))
    torch.manual_seed(0)
    cut = dict(block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=4, attention_head_dim=2)
    config = read_json(IP2P / "unet" / "config.json") | cut
    config |= dict(down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
    unet = UNet(config)
    train.write_network(folder / "unet", config, unet.state_dict())
    unet.add_motion(dict(motion_num_attention_heads=2, motion_norm_num_groups=4, use_motion_mid_block=False), gamma=1.0)
    train.write_network(folder / "motion", unet.motion_config, {k: v for k, v in unet.state_dict().items()
                                                                if "motion_modules" in k and not k.endswith(".gamma")})
    SMALL.weights, SMALL.motion = str(folder), str(folder / "motion")
    return folder


def curated(folder, n=3, n_frames=16, channels=4, kept=True):
    """A curated data set of random latents."""
    g = torch.Generator().manual_seed(len(folder.name))
    for i in range(n):
        z = torch.randn(2, n_frames, channels, 4, 4, generator=g).half()
        (folder / f"clip{i}").mkdir(parents=True)
        save_file(dict(source=z[0].clone(), target=z[1].clone()), folder / f"clip{i}" / "latents.safetensors")
        rows = [dict(id=f"clip{i}", order=[i], candidate=k, instruction=f"make it {i}", kept=kept and k == 0, below=["x"], scores={})
                for k in range(2)]
        (folder / f"clip{i}" / "candidates.json").write_text(json.dumps(rows))
    return folder


def video(out, how=How(save_minutes=0), **settings):
    s = replace(SMALL, train_on=(str(out.parent / "data"),), **settings)
    train.stage_video(out, s, how, {})
    return load_file(out / "unet" / WEIGHTS)


def start(**settings):
    return train.video_editor(replace(SMALL, **settings), How()).unet


def unet_inputs(n_frames=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, n_frames, 8, 4, 4, generator=g), torch.tensor([400]), torch.randn(1, 77, 32, generator=g)


def apart(a, b):
    """How far apart two runs' weights are, relative to their way: Adam makes much of rounding in the smallest gradients."""
    first = start().state_dict()
    far = [sum((x[k] - b[k]).square().sum() for k in b).sqrt().item() for x in (a, first)]
    return far[0] / far[1]


@torch.no_grad()
def test_a_round_starts_as_the_image_editor_and_epm_where_the_paper_says_or_as_joint_attention():
    image = VideoEditor.from_pretrained(SMALL.weights, device="cpu").unet(*unet_inputs())
    for how, allowed in ((dict(epm=False), 0.001), ({}, 0.005)):      # that leaves 0.1 % to the other frames
        assert (start(**how)(*unet_inputs()) - image).norm() <= allowed * image.norm()
    for joint, value in ((False, -10.0), (True, 0.0)):
        nets = [m for m in start(joint=joint).modules() if isinstance(m, EPM)]
        bias = [m(torch.randn(16, m.conv1.in_channels, 2, 2), 16)[0] for m in nets]
        assert bias and all(torch.allclose(b, value * (1 - torch.eye(16)), atol=1e-5) for b in bias)
        assert all(p.requires_grad != joint for m in nets for p in m.parameters())
    unet = start(sma=False, epm=False)                                         # the motion prior is there from the start
    assert not torch.allclose(unet(*unet_inputs()), unet(*unet_inputs(), mode="image"), atol=1e-3)
    gammas = [p for k, p in unet.named_parameters() if k.endswith(".gamma")]
    assert gammas and all(p.item() == 1 and not p.requires_grad for p in gammas)


def test_what_is_trained_changes_is_logged_and_loads_anywhere_and_the_next_round_can_go_on_from_it(tmp_path):
    curated(tmp_path / "data")
    before = start().state_dict()
    for trainable in ("temporal", "all"):
        after = video(tmp_path / trainable, trainable=trainable)
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert {k for k in before if k.endswith(".gamma")} <= moved
        assert {k.split(".epm.")[0] for k in before if ".epm." in k} == {k.split(".epm.")[0] for k in moved if ".epm." in k}
        spatial = {k for k in before if "motion_modules" not in k and ".epm." not in k}
        assert "down_blocks.0.motion_modules.0.proj_in.weight" in moved and bool(spatial & moved) == (trainable == "all")
    row = log(tmp_path / "all")[-1]
    assert set(row["gamma"]) == {k.removesuffix(".gamma") for k in after if k.endswith(".gamma")}
    assert all(-11 < bias < -9 for bias in row["epm"].values()) and np.array(row["epm_matrix"]).shape == (16, 16)
    assert len(row["epm"]) == sum(k.endswith("epm.fc2.bias") for k in after)
    ed = VideoEditor.from_pretrained(tmp_path / "all", device="cpu")
    assert ed.default_mode == "video" and same(ed.unet.state_dict(), after) and same(start(weights=str(tmp_path / "all")).state_dict(), after)
    with pytest.raises(UserError, match="--no-epm: .* was trained with epm True"):
        start(weights=str(tmp_path / "all"), epm=False)
    call("plot", "--out", tmp_path / "all")
    picture = Image.open(tmp_path / "all" / "training.png")
    assert picture.size == (900, 300) and len(picture.getcolors()) > 3
    for folder in (tmp_path / "data", small_log(tmp_path / "vae")):
        with pytest.raises(UserError, match="log.jsonl: .*pass --round"):
            train.plot(folder)


def small_log(folder):
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    return folder


def test_a_round_killed_in_mid_step_ends_with_the_same_weights_and_log(tmp_path, monkeypatch):
    curated(tmp_path / "data")
    want = video(tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        Cut(m, 2)
        video(tmp_path / "cut")
    for settings, match in ((dict(trainable="all"), "trainable temporal .now all."), (dict(samples=2), "samples .*clips 3 .now 2.")):
        with pytest.raises(UserError, match=match):
            video(tmp_path / "cut", **settings)
    assert same(video(tmp_path / "cut"), want)
    a, b = log(tmp_path / "cut"), log(tmp_path / "whole")
    assert [(r["step"], r["gamma"], r["epm"]) for r in a] == [(r["step"], r["gamma"], r["epm"]) for r in b]


def test_how_a_step_is_computed_changes_nothing(tmp_path):
    """Micro-batches, recomputed activations; bfloat16 a little."""
    curated(tmp_path / "data")
    a, b = video(tmp_path / "a"), video(tmp_path / "b", batch=1, accumulate=2)
    assert apart(a, b) < 0.05 and log(tmp_path / "a")[-1]["loss"] == pytest.approx(log(tmp_path / "b")[-1]["loss"], rel=1e-5)
    b = video(tmp_path / "c", How(checkpointing=True))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    half = video(tmp_path / "half", How(bf16=True))
    assert {v.dtype for v in half.values()} == {torch.float32}
    assert log(tmp_path / "half")[-1]["loss"] == pytest.approx(log(tmp_path / "a")[-1]["loss"], rel=0.02) and not same(half, a)


def as_rank(rank, port, command):
    """One of two processes, as torchrun starts them."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                       TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)                                                   # threads do not outlive a fork
    call(*command)


def test_two_processes_do_what_one_does_that_accumulates_two(tmp_path):
    curated(tmp_path / "data")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)         # holds its port
    command = ["video", "--weights", SMALL.weights, "--motion", SMALL.motion, "--train-on", tmp_path / "data", "--steps", 2, "--batch", 1, "--no-guided-loss",
               "--out", tmp_path / "two", *flags(tmp_path)]
    two = [multiprocessing.get_context("fork").Process(target=as_rank, args=(rank, store.port, command)) for rank in range(2)]
    for process in two:
        process.start()
    try:
        one = video(tmp_path / "one", batch=1, accumulate=2)
        for process in two:
            process.join()
            assert process.exitcode == 0
    finally:
        for process in two:
            process.kill()
    assert log(tmp_path / "two")[-1]["loss"] == pytest.approx(log(tmp_path / "one")[-1]["loss"], rel=1e-5)
    assert apart(load_file(tmp_path / "two" / "unet" / WEIGHTS), one) < 0.05


@pytest.mark.parametrize("guidance", [(1.5, 1.5), (7.5, 1.0), (1.0, 1.0)])
def test_the_guided_loss_is_that_of_the_guided_prediction_where_source_and_text_are_there(guidance):
    torch.manual_seed(0)
    ed = VideoEditor.from_pretrained("tiny", device="cpu", dtype="float32")
    text, no_text = ed.encode_text(["make it snow", ""]).detach()
    z0, z_src, eps = torch.randn(3, 3, ed.vae.config["latent_channels"], 4, 4)
    t, one = torch.tensor(600), torch.ones(1, 1, 1, 1)
    samples = [(z0, z_src * has_src, text if has_text else no_text, t, eps, one)
               for has_src, has_text in ((1, 1), (1, 0), (0, 1), (0, 0))]
    a = model.noise_levels(ed.scheduler)[600]
    z_t, v = a.sqrt() * z0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z0
    alone = []
    for k, sample in enumerate(samples):
        scales = guidance if k == 0 else (1.0, 1.0)                # a branch by itself, as it is
        with torch.no_grad():
            out = ed.guided(z_t[None], sample[1][None], t, torch.stack([sample[2], no_text]), *scales, "video")[0]
            alone.append(train.clip_loss(ed.unet, [sample], ed.scheduler, "cpu", (*guidance, no_text)).item())
        assert alone[k] == pytest.approx((out - v).square().mean().item(), rel=1e-5)
    together = train.clip_loss(ed.unet, samples, ed.scheduler, "cpu", (*guidance, no_text))
    assert together.item() == pytest.approx(np.mean(alone), rel=1e-5)
    ed.unet.conv_in.weight.requires_grad_(True)
    train.clip_loss(ed.unet, samples[:1], ed.scheduler, "cpu", (*guidance, no_text)).backward()
    assert ed.unet.conv_in.weight.grad.abs().max() > 0


def test_what_a_round_drops_and_what_its_target_then_is(tmp_path, monkeypatch):
    """5 % text alone, 5 % both, 5 % source alone; where a dropped text means no edit, its target is the source."""
    curated(tmp_path / "data", n=1)
    seen = []
    monkeypatch.setattr(train, "clip_loss", lambda unet, samples, *args: seen.extend(samples) or next(
        p for p in unet.parameters() if p.requires_grad).sum())
    video(tmp_path / "run", steps=30, epm=False, sma=False)
    z = load_file(tmp_path / "data" / "clip0" / "latents.safetensors")
    ed = VideoEditor.from_pretrained(SMALL.weights, device="cpu")
    source, target, scale = z["source"].float(), z["target"].float(), ed.vae.scaling_factor
    text, no_text = (ed.encode_text([words])[0].half().float() for words in ("make it 0", ""))
    counts = {}
    for k, (z0, z_src, ctx, *_) in enumerate(seen):
        u = train.draw_noise(k, SMALL, source.shape)[0]
        kind = "text" if u < 0.05 else "both" if u < 0.10 else "source" if u < 0.15 else "none"
        counts[kind] = counts.get(kind, 0) + 1
        assert torch.equal(z_src, source * (kind in ("text", "none")))
        assert torch.allclose(ctx, no_text if kind in ("text", "both") else text, atol=1e-3)
        assert torch.equal(z0, (source if kind == "text" else target) * scale)
    assert len(seen) == 60 and min(counts.get(kind, 0) for kind in ("text", "both", "source")) > 0, counts


def test_every_clip_comes_once_an_epoch_and_noise_is_shared_by_frames_as_asked():
    epochs = [[train.row_of(k, 7, 0) for k in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    s = Round(same_noise=0.5)
    eps = torch.stack([train.draw_noise(k, s, (16, 4, 4, 4))[2] for k in range(200)])
    shared = (eps == eps[:, :1]).flatten(1).all(dim=1)
    assert 70 < shared.sum() < 130 and (eps[~shared].diff(dim=1).abs() > 0).any(dim=(2, 3, 4)).all()


@pytest.mark.parametrize("kind, message", [
    ("missing", "candidates.json"), ("none", "none of its 6 candidates was kept"), ("gone", "latents.safetensors: .o such file"),
    ("short", r"holds \(12, 4, 4, 4\).*needs source and target \(16, 4, h, w\)"), ("channels", "holds .16, 8"),
    ("half", "latents.safetensors: "), ("line", "candidates.json: ")])
def test_data_that_does_not_fit_is_refused_in_one_line(tmp_path, kind, message):
    folder = tmp_path / "data"
    if kind != "missing":
        curated(folder, n_frames=12 if kind == "short" else 16, kept=kind != "none", channels=8 if kind == "channels" else 4)
    latents, rows = folder / "clip1" / "latents.safetensors", folder / "clip1" / "candidates.json"
    if kind == "gone":
        latents.unlink()
    if kind == "half":
        latents.write_bytes(latents.read_bytes()[:3000])
    if kind == "line":
        rows.write_text(rows.read_text()[:20])
    with pytest.raises(UserError, match=message) as e:
        video(tmp_path / "run")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_stage_motion_trains_the_modules_alone_in_any_editor(tmp_path, monkeypatch):
    few(monkeypatch, 1)
    call("motion", "--weights", IP2P, "--steps", 1, "--batch", 1, "--size", 32, "--samples", 1, *flags(tmp_path))
    with_motion = VideoEditor.from_pretrained(IP2P, motion=tmp_path / "r" / "motion", device="cpu").unet.state_dict()
    image = VideoEditor.from_pretrained(IP2P, device="cpu").unet.state_dict()
    assert all(torch.equal(v, with_motion[k]) for k, v in image.items())
    proj = [v for k, v in with_motion.items() if "motion_modules" in k and k.endswith("proj_out.weight")]
    assert proj and all(v.abs().max() > 0 for v in proj)
    tensors = load_file(tmp_path / "r" / "motion" / WEIGHTS)
    assert all("motion_modules" in k and not k.endswith(".gamma") for k in tensors)

# ---- export, the rounds, tables, writer, flags ------------------------------------------------------------------

def test_an_exported_round_edits_like_the_round_holds_the_image_editor_and_may_lie_over_its_base(tmp_path):
    curated(tmp_path / "data")
    video(tmp_path / "run")
    with pytest.raises(UserError, match="no finished run"):
        train.export(tmp_path / "data", tmp_path / "x")
    train.export(tmp_path / "run", tmp_path / "out")
    for source, motion in ((tmp_path / "out", None), (tmp_path / "out", False), (tmp_path / "run", False), (tmp_path / "out", SMALL.motion)):
        ed, like = (VideoEditor.from_pretrained(x, motion=m, device="cpu")
                    for x, m in ((source, motion), (tmp_path / "run" if motion is None else SMALL.weights, motion)))
        assert ed.default_mode == like.default_mode == ("video" if motion is None else "ffg") and ed.size == 32
        a, b = ed.unet(*unet_inputs()), like.unet(*unet_inputs())
        assert (a - b).norm() < 1e-2 * b.norm()                    # float16 files
    ed = VideoEditor.from_pretrained(tmp_path / "out", device="cpu")
    z = ed.noise(3, 4, 4, seed=1, mode="video")                    # tiny's default: trained on one noise for all frames
    assert torch.equal(z[:, 0], z[:, 2])
    files = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    train.export(tmp_path / "out", tmp_path / "out")
    assert files == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}


@pytest.mark.parametrize("n, mix, rounds", [(0, False, "0"), (1, False, "01"), (2, False, "2"), (2, True, "02"), (3, True, "03")])
def test_a_round_trains_on_what_the_papers_table_4_counts(n, mix, rounds):
    assert train.round_folders(train.Task(data=Path("d"), mix=mix), n) == tuple(f"d/round{k}" for k in rounds)


def test_the_rounds_curate_train_and_resume_as_one_command(tmp_path, capsys, monkeypatch):
    free = "--candidates 1 --no-filter"
    (tmp_path / "videos").mkdir()
    x = torch.rand(1, 1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = torch.cat([x.roll((k, 2 * k), (3, 4)) for k in range(40)], dim=1)
    write_video(tmp_path / "videos" / "a.mp4", torch.nn.functional.interpolate(clip[0], scale_factor=2)[None], 8)
    (tmp_path / "texts.txt").write_text("make it snow\n")
    command = ["--round", 1, "--weights", SMALL.weights, "--motion", SMALL.motion, "--steps", 2, "--batch", 1, "--images", 2, "--real-clips", 1,
               "--real-from", tmp_path / "videos", f"--curate-images={free} --steps 1", f"--curate-videos={free}",
               "--curate-cut=--per-video 1", f"--curate-write=--writer {tmp_path / 'texts.txt'}",
               f"--curate-real={free} --steps 1", *flags(tmp_path)[:-2]]
    with monkeypatch.context() as m:                               # ends between curation and training
        m.setattr(train, "stage_video", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call(*command)
    made = {p: p.read_bytes() for p in (tmp_path / "d").rglob("*.*") if p.is_file()}
    assert {p.parts[-3] for p in made if p.name == "candidates.json"} == {"images", "clips", "round0"}
    call(*command)
    assert all(p.read_bytes() == data for p, data in made.items())
    assert "score it on real clips" in capsys.readouterr().out     # this editor does not know the drawn world
    settings = [read_json(tmp_path / "r" / f"round{n}" / "settings.json") for n in (0, 1)]
    assert [s["clips"] for s in settings] == [2, 3] and all(s["weights"] == SMALL.weights for s in settings)     # each starts anew,
    assert settings[1]["real weights"] == str(tmp_path / "r" / "round0")       # its data come from the round before
    [row] = [row for row in curate.read_rows(tmp_path / "d" / "round1", kept=True)]
    assert row["instruction"] == "make it snow"
    states = [(tmp_path / "r" / f"round{n}" / "state.pt").stat().st_mtime_ns for n in (0, 1)]
    (tmp_path / "other").symlink_to(ADAPTER)
    for more, match in ((["--motion", tmp_path / "other"], "round0: made with motion .*adapter"), (["--lr", 1], "lr .* .now 1.0."),
                        (["--images", 3], "images n 2 .now 3."), (["--real-clips", 2], "cut n 1 .now 2."), (["--no-epm"], "epm True .now False."),
                        (["--curate-videos=--min clip_frame=0.5"], "videos filter"), (["--curate-real=--nope"], "--curate-real=--nope: .*--nope"),
                        (["--curate-images=--n 'x"], "--curate-images=--n 'x: No closing")):
        with pytest.raises(UserError, match=match):
            call(*command, *more, *(["--round", 2] if more[0] == "--lr" else []))
    call(*command, "--n", 0)
    call(*command, "--n", 0, "--lr", 1, "--force")
    out = capsys.readouterr().out
    assert out.count(": finished") >= 4 and "curating" not in out
    assert states == [(tmp_path / "r" / f"round{n}" / "state.pt").stat().st_mtime_ns for n in (0, 1)]


def test_the_networks_that_a_round_lacks_are_trained_first_with_their_own_settings(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "train_network", lambda name, s, how, task: asked.append((name, s.steps, getattr(s, "weights", ""))))
    monkeypatch.setattr(train, "curation_steps", lambda *args: [])
    monkeypatch.setattr(train, "stage_video", lambda out, s, how, curation: asked.append((out.name, s.steps, s.weights)))
    call("--round", 0, "--steps", 7, "--seed", 3, *flags(tmp_path))
    image = str(tmp_path / "r" / "image")
    assert asked == [("vae", 2500, ""), ("clip", 1000, ""), ("viclip", 1500, ""), ("image", 16000, ""), ("motion", 600, image), ("round0", 7, image)]
    asked.clear()
    call("--round", 0, "--weights", "tiny", *flags(tmp_path))
    assert [name for name, *_ in asked] == ["motion", "round0"] and asked[0][2] == "tiny"
    asked.clear()
    call("--round", 0, "--model", "sd15", "--images-from", "shapes", *flags(tmp_path))
    assert asked == [("round0", 2000, "sd15")]
    for argv, what in ((["--round", 0], "images-from"), (["--round", 1, "--images-from", "x"], "real-from"), (["table3"], "table3"),
                       (["image"], "images-from"), (["vae"], "is published")):
        with pytest.raises(UserError, match=what):
            call(*argv, "--model", "sd15", *flags(tmp_path))


def test_tables_train_and_measure_their_rows_once(tmp_path, capsys, monkeypatch):
    asked = []

    def scores(ed, n, domain, n_frames, mode="auto", **guidance):
        asked.append((mode, domain, n_frames))
        return [dict(id=f"{k}", task="style", success=float(k % 2), truth_gain=float(len(asked)), flicker=.5) for k in range(4)]
    monkeypatch.setattr(train, "drawn_scores", scores)
    for name in ("round0", "round1", "round2"):
        curated(tmp_path / "d" / name, n=1)
    for command, rows, untrained in (("table3", 5, 0), ("table4", 6, 2)):
        asked.clear()
        if command == "table4":                                    # the rows' trainings as such are those of table 3
            monkeypatch.setattr(train, "stage_video", lambda out, *how: (out / "unet").is_dir() or shutil.copytree(
                tmp_path / "r" / "table3" / "SMA-EPM-0", out, ignore=shutil.ignore_patterns("synthetic*", "real*")))
        argv = [command, "--weights", SMALL.weights, "--motion", SMALL.motion, "--steps", 1, "--batch", 1, "--seeds", 1,
                "--no-guided-loss", *flags(tmp_path)]
        call(*argv)
        assert len(asked) == 2 * rows and {x[2] for x in asked} == {16} and sum(x[0] != "video" for x in asked) == 2 * untrained
        out = capsys.readouterr().out
        lines = [line for line in out.splitlines() if line.startswith("| ") and "[95 %]" in line]
        assert len(lines) == 2 * rows and "− first row | 4 | +0.00 [+0.00, +0.00] | +0.0 [+0.0, +0.0]" in out
        call(*argv)
        assert len(asked) == 2 * rows and [x for x in capsys.readouterr().out.splitlines() if x in lines] == lines
    monkeypatch.undo()
    with pytest.raises(UserError, match="no-SMA-no-EPM-0: made with lr .* .now 0.1."):
        call("table3", *argv[1:], "--lr", 0.1)


def test_table_2_makes_other_data_of_the_same_sources_and_trains_on_equally_many_clips(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train, "curate_all", lambda steps, how: made.extend(steps))
    for name, n in (("round0", 3), ("round0-unfiltered", 2), ("round0-per-frame", 4)):
        curated(tmp_path / name, n=n)
    task = train.Task(data=tmp_path, runs=tmp_path, images=2, curate_images="--steps 2")
    rows = train.table_rows("table2", task, SMALL, How())
    assert [row.settings.samples for row in rows] == [2, 2, 2]
    assert [row.folders for row in rows] == [("round0",), ("round0-unfiltered",), ("round0-per-frame",)]
    found = [(name, to.name, s.filter, s.candidates, getattr(s, "mode", s.source if name == "images" else "")) for name, to, s in made
             if name in ("images", "videos")]
    assert ("images", "images-unfiltered", False, 1, "shapes") in found and ("videos", "round0-unfiltered", False, 1, "ffg") in found
    assert ("videos", "round0-per-frame", True, 1, "image") in found
    by_name = {to.name: s for _, to, s in made}
    assert by_name["images-unfiltered"].steps == 2 and by_name["round0-unfiltered"].images.endswith("images-unfiltered")


def pairs(folder, n=3):
    """A small folder of image-editing triples, and one line that no writer should learn."""
    folder.mkdir()
    lines = [dict(source=f"{i}.png", instruction=f"make it {place}", source_caption=f"view {i} of a wall",
                  target_caption=f"view {i} of a wall in {place}") for i, place in enumerate(("snow", "winter", "rain")[:n])]
    for i in range(n):
        Image.fromarray(np.full((20, 30, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    lines.append(lines[0] | {"target_caption": lines[0]["source_caption"]})
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_writer_learns_resumes_equal_and_its_file_is_read_back(tmp_path, capsys, monkeypatch):
    def writer(name, *more):
        call("writer", "--pairs-from", tmp_path / "pairs", "--llava", LLAVA, "--steps", 12, "--batch", 3, "--rank", 4, "--lr", 3e-2,
             *flags(tmp_path), "--out", tmp_path / name, *more)
        return load_file(tmp_path / name / "writer.safetensors")
    with pytest.raises(UserError, match="--pairs-from"):
        call("writer", *flags(tmp_path))
    pairs(tmp_path / "pairs")
    want = writer("whole")
    assert "3 image pairs; left out: 1 " in capsys.readouterr().out
    tuned = LlavaOneVision.from_pretrained(LLAVA, device="cpu", lora=tmp_path / "whole" / "writer.safetensors")
    todo = train.writer_pairs(tmp_path / "pairs", 10)
    shown, answers = [pair["load"]()[0][None] for pair, _ in todo], [answer for _, answer in todo]
    with torch.no_grad():
        before = writer_loss(LlavaOneVision.from_pretrained(LLAVA, device="cpu"), shown, answers)
        assert writer_loss(tuned, shown, answers) < before - 0.3
    assert answers[0]["task"] == "background" and (tmp_path / "whole" / "state.pt").stat().st_size < 1e6
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        Cut(m, 7)
        writer("cut")
    with pytest.raises(UserError, match="rank 4 .now 8."):
        writer("cut", "--rank", 8)
    assert same(writer("cut"), want)
    (tmp_path / "pairs" / "1.png").write_bytes(b"no picture")      # gives way to the next one
    writer("broken", "--steps", 1)
    assert capsys.readouterr().out.count("left out: ") >= 2
    lines = (tmp_path / "pairs" / "list.jsonl").read_text().splitlines()
    (tmp_path / "pairs" / "list.jsonl").write_text(lines[-1] + "\n")
    with pytest.raises(UserError, match="--pairs-from .*no image pairs"):
        writer("none")


def test_the_closing_table_is_of_bare_frames_of_held_out_scenes(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "print_bare", lambda ed, *which: asked.append((ed.name, *which)))
    train.report("tiny", How(), 5, 16)
    assert asked == [("tiny", 5, ["synthetic"], 16, {})]


RANGES = [("", "--round -1"), ("video", "--batch 0"), ("video", "--lr-new -1"), ("vae", "--lr 0"), ("image", "--t-bias 0"), ("image", "--optimizer sgd"),
          ("vae", "--steps 0"), ("vae", "--size 50"), ("clip", "--samples 0"), ("", "--images nan"), ("motion", "--same-noise 2"), ("table3", "--seeds 0"),
          ("", "--model huge"), ("", "--device tpu"), ("vae", "--rank 3"), ("writer", "--rank x")]


@pytest.mark.parametrize("command, given", RANGES)
def test_values_out_of_range_name_the_flag(command, given, tmp_path):
    with pytest.raises(UserError, match=given.split()[0]):
        call(*command.split(), *given.split(), *flags(tmp_path)[:4])
    assert not list(tmp_path.iterdir())


def test_random_command_lines_end_in_one_line(tmp_path):
    rng, words = random.Random(0), "--steps 1 --n 0 --round 0 --weights none --motion x/y/z --train-on nowhere --out data --lr 1e999 --epm --no-sma video " \
        "plot export writer table2 table3 motion vea --pairs-from nowhere --images-from nowhere --to '' --seed -1 --curate-cut=--x --bf16".split()
    for k in range(60):
        argv = [rng.choice(["video", "plot", "export", "writer", "table4", "--round", "motion"]), *rng.sample(words, rng.randrange(1, 8)), "--weights",
                str(tmp_path / "no"), *map(str, flags(tmp_path))]
        with pytest.raises(UserError) as error:
            train.main(argv)
        assert "\n" not in str(error.value)
