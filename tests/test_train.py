"""train.py: a cut run goes on exactly where it was, and what goes wrong says so."""
import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import sample
import world
import teachers
import model
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import curate
import train
from teachers import LlavaOneVision, writer_loss
from model import EPM, ROOT, UNet, UserError, VideoEditor


def small_fit(out, steps=8, cut_at=None, args=None, losses=None, nan_at=None, seed=0, **options):
    """A linear layer on random data through the real loop, saved after every step; `cut_at` breaks off in mid-step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)

    def loss_fn(step, generator):
        if step == cut_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=generator)
        loss = (net(x) - x[:, :3] * 2).square().mean() * (math.nan if step == nan_at else 1)
        if losses is not None:
            losses.append(loss.item())
        return loss
    meta = dict(stage="test", args=dict(args or dict(steps=steps), seed=seed))
    return train.fit(net, loss_fn, out, meta, steps, 1e-2, 16, warmup=2, save_minutes=0, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_cut_run_continues_with_the_loss_and_weights_of_an_uninterrupted_one(tmp_path, optimizer):
    whole, parts = [], []
    want = small_fit(tmp_path / "whole", losses=whole, optimizer=optimizer).state_dict()
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path / "cut", cut_at=5, losses=parts, optimizer=optimizer)
    (tmp_path / "cut" / "state.tmp").write_bytes(b"half a checkpoint")         # what a kill while saving leaves behind
    got = small_fit(tmp_path / "cut", losses=parts, optimizer=optimizer).state_dict()
    assert parts == whole
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_run_that_goes_on_with_another_optimizer_says_that_it_starts_anew(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path, cut_at=5)
    small_fit(tmp_path, optimizer="muon")
    assert "another optimizer" in capsys.readouterr().out
    assert json.loads((tmp_path / "meta.json").read_text())["step"] == 8


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


def test_muon_moves_along_every_direction_of_a_matrix_alike_and_leaves_the_outer_layers_to_adamw():
    torch.manual_seed(0)
    lopsided = torch.randn(32, 48) * torch.logspace(0, -2, 32)[:, None]        # singular values over two orders
    for m in (lopsided, lopsided.T):
        values = torch.linalg.svdvals(train.orthogonal(m))
        assert values.min() > 0.6 and values.max() < 1.25
    kept = [k for k, p in UNet(train.TINY_UNET).named_parameters() if train.is_inner_matrix(k, p)]
    assert all(k.startswith(("down_blocks", "mid_block", "up_blocks")) and k.endswith("weight") and "norm" not in k for k in kept)
    assert any("attn2.to_k" in k for k in kept) and any("conv1" in k for k in kept)


def test_the_saved_weights_are_the_average_and_differ_from_the_raw_ones(tmp_path):
    small_fit(tmp_path)
    ema = train.load_file(tmp_path / "model.safetensors")
    raw = torch.load(tmp_path / "state.pt", weights_only=True)["net"]
    assert ema.keys() == raw.keys() and not torch.equal(ema["weight"], raw["weight"])
    assert json.loads((tmp_path / "meta.json").read_text())["step"] == 8


def test_nan_stops_with_the_step_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(UserError, match="step 5"):
        small_fit(tmp_path, nan_at=5)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 5


def test_other_settings_on_resume_are_refused_by_name(tmp_path):
    small_fit(tmp_path, args=dict(steps=8, lr=1))
    with pytest.raises(UserError, match="--lr 1"):
        small_fit(tmp_path, args=dict(steps=8, lr=2))


def test_another_seed_draws_other_data(tmp_path):
    first, again, other = [], [], []
    for name, losses, seed in (("a", first, 0), ("b", again, 0), ("c", other, 1)):
        small_fit(tmp_path / name, losses=losses, seed=seed)
    assert first == again and first[0] != other[0]                 # the same first weights, see small_fit


def test_every_known_word_is_one_token_and_the_end_token_is_last(tmp_path):
    tokenizer = train.train_tokenizer(tmp_path)
    assert all(len(tokenizer.encode(w)) == 1 for w in world.known_words())
    assert tokenizer.end == max(tokenizer.vocab.values())
    assert len(tokenizer.encode("zxqv")) > 1                                  # an unknown word falls into pieces


def test_world_shards_are_the_same_whenever_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 6)
    for name in ("a", "b"):
        train.draw_shard(tmp_path / name, 3, 32)
    a, b = (np.load(tmp_path / f"{n}.npy") for n in "ab")
    assert np.array_equal(a, b) and a.shape[:2] == (6, 2)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_latents_of_a_world_that_was_drawn_anew_are_not_the_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 4)
    command = ["--stage", "image", "--weights", "tiny", "--steps", "1", "--n", "1", "--sampling-steps", "1", "--pairs", "4", "--size",
               "32", "--batch", "2", "--data", str(tmp_path / "d"), "--device", "cpu"]
    sample.main([*command, "--runs", str(tmp_path / "a")])
    mark = tmp_path / "d" / "world" / "world.json"
    mark.write_text(mark.read_text() + "\n")                       # as another version of the world leaves it
    with pytest.raises(UserError, match="begun with the world"):
        sample.main([*command, "--runs", str(tmp_path / "a")])
    assert len(list((tmp_path / "d").glob("latents-*"))) == 2


def test_pairs_of_another_world_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 2)
    train.world_set(tmp_path, 2, 32, per_file=2)
    train.world_set(tmp_path, 2, 32, per_file=2)
    probe = json.loads((tmp_path / "world.json").read_text())
    for change in (lambda row: row[0].update(instruction="another wording"), lambda row: row[1][1][0].__setitem__(0, [0, 255, 0])):
        other = json.loads(json.dumps(probe))
        change(other[3])
        (tmp_path / "world.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="another version of the shapes world .1 of 16 probes"):
            train.world_set(tmp_path, 2, 32, per_file=2)


def test_batches_hold_about_the_same_number_of_pixels_at_any_aspect():
    shards = {hw: [(np.zeros((500, 2, *hw, 3), np.uint8), [{}] * 500)] for hw in ((96, 96), (96, 168), (168, 96))}
    sizes = {hw: len(train.random_batch(s, 24, torch.Generator().manual_seed(0))[2]) * hw[0] * hw[1] for hw, s in shards.items()}
    assert max(sizes.values()) < 1.1 * min(sizes.values())


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


def test_stage_image_without_its_networks_says_which_stage_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 2)
    with pytest.raises(UserError, match="--stage vae first"):
        sample.main(["--stage", "image", "--pairs", "2", "--size", "32", "--data", str(tmp_path / "d"), "--runs", str(tmp_path / "r")])


def test_stage_image_goes_on_from_an_editor_and_trains_its_text_encoder_along(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 4)
    runs, tiny = tmp_path / "r", ROOT / "assets" / "tiny"
    flags = ["--pairs", "8", "--size", "32", "--batch", "2", "--data", str(tmp_path / "d"), "--runs", str(runs), "--device", "cpu"]
    sample.main(["--stage", "image", "--weights", "tiny", "--steps", "3", "--n", "1", "--sampling-steps", "1", *flags])
    words = "text_model.embeddings.token_embedding.weight"
    before = load_file(tiny / "text_encoder" / "model.safetensors")[words].float()
    run = load_file(runs / "image" / "model.safetensors")["text_encoder." + words]
    assert 0 < (run - before).norm() < 0.1 * before.norm()
    clip = load_file(runs / "base" / "clip" / "model.safetensors")                          # the scorer stays as it is
    assert torch.equal(clip[words], load_file(tiny / "clip" / "model.safetensors")[words])

    sample.main(["--stage", "export", "--to", str(tmp_path / "tiny"), *flags])
    trained, exported = (VideoEditor.from_pretrained(x, device="cpu") for x in (runs / "image", tmp_path / "tiny"))
    states = [ed.encode_text(["make it snow"]) for ed in (trained, exported)]
    assert (states[0] - states[1]).norm() < 1e-2 * states[0].norm()                         # float16
    assert (states[0] - VideoEditor.from_pretrained("tiny", device="cpu").encode_text(["make it snow"])).abs().max() > 0

    monkeypatch.setattr(train, "MOTION_CLIPS", 1)                                           # and the rounds keep it
    sample.main(["--stage", "motion", "--motion-clips", "1", "--clip-batch", "1", "--steps", "1", *flags])
    curated(tmp_path / "round0", n=1, channels=8)
    sample.main(["--stage", "video", "--train-on", str(tmp_path / "round0"), "--clip-batch", "1", "--steps", "1", *flags])
    assert torch.equal(VideoEditor.from_pretrained(runs / "round0", device="cpu").encode_text(["make it snow"]), states[0])


# ---------------------------------------------------------------------------------------------------------------
# Stages motion and video, on the small random InstructPix2Pix of the goldens
# ---------------------------------------------------------------------------------------------------------------

GOLDENS = Path(__file__).parent / "goldens"
LLAVA = GOLDENS / "llava-onevision-qwen2-0.5b-ov-hf"
CLIP = GOLDENS / "clip-vit-large-patch14"
IP2P, ADAPTER = GOLDENS / "instruct-pix2pix", GOLDENS / "animatediff-motion-adapter-v1-5-3"


def finished_network(runs, stage="vae", **args):
    """What `wanted` looks at of a network that is trained: its meta.json and the last file of its stage in base."""
    last = runs / "base" / train.LAST_FILE.get(stage, "")
    last.parent.mkdir(parents=True, exist_ok=True)
    if stage in train.LAST_FILE:
        last.write_text("{}")
    (runs / stage).mkdir(parents=True)
    how = dict(steps=20, seed=0, pairs=120000, size=64, lr=1e-3) | args
    (runs / stage / "meta.json").write_text(json.dumps(dict(step=20, args=how)))


def test_a_finished_network_is_kept_whatever_its_steps_but_not_under_other_flags(tmp_path):
    finished_network(tmp_path)
    def wanted(*flags):
        return train.wanted("vae", train.parse_args(["--runs", str(tmp_path), *flags]))
    assert not wanted() and not wanted("--round", "1", "--steps", "7", "--lr", "1") and wanted("--stage", "vae")
    for given, match in ((["--size", "96"], "--size 64 .now 96."), (["--steps", "7"], "--steps 20 .now 7."),
                         (["--round", "1", "--size", "96"], "--size 64"), (["--seed", "1"], "--seed 0 .now 1.")):
        with pytest.raises(UserError, match=match):
            wanted(*given)
        assert not wanted(*given, "--force")


def test_image_editor_and_motion_modules_of_another_vae_are_not_taken_for_finished(tmp_path):
    finished_network(tmp_path, "image", vae=train.vae_mark(torch.ones(2)))
    (tmp_path / "base" / "vae").mkdir(parents=True)
    file = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    args = train.parse_args(["--runs", str(tmp_path), "--round", "0"])
    save_file({"quant_conv.weight": torch.ones(2)}, file)
    assert not train.wanted("image", args)
    save_file({"quant_conv.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="image: finished with the vae"):
        train.wanted("image", args)


def test_an_editor_to_go_on_from_does_not_take_the_place_of_other_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 2)
    file = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"quant_conv.weight": torch.ones(2)}, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="another network than that of --weights tiny"):
        sample.main(["--stage", "image", "--weights", "tiny", "--pairs", "2", "--size", "32", "--data", str(tmp_path / "d"),
                    "--runs", str(tmp_path), "--device", "cpu"])
    assert [p for p in (tmp_path / "base").rglob("*") if p.is_file()] == [file] and file.read_bytes() == before


def test_motion_modules_of_another_editor_are_not_taken_for_finished(tmp_path):
    finished_network(tmp_path, "motion", weights="tiny")
    assert not train.wanted("motion", train.parse_args(["--runs", str(tmp_path), "--round", "0", "--weights", "tiny"]))
    with pytest.raises(UserError, match="motion: finished with --weights tiny .now .*image"):
        train.wanted("motion", train.parse_args(["--runs", str(tmp_path), "--round", "0"]))


def test_the_schedule_given_with_a_round_is_the_rounds_alone():
    args = train.parse_args(["--round", "1", "--steps", "7", "--lr", "1", "--t-bias", "2", "--seed", "3"])
    first = train.before_rounds(args)
    assert (first.steps, first.lr, first.t_bias, first.seed, args.steps) == (None, None, 0.5, 3, 7)
    args = train.parse_args(["--stage", "motion", "--round", "1", "--steps", "7"])
    assert train.before_rounds(args).steps == 7


def curated(folder, n=3, n_frames=16, size=(4, 4), channels=4, kept=True):
    """A curated directory of random latents, as `curate.py videos` and `real` leave them."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(len(folder.name))
    with open(folder / "manifest.jsonl", "w") as f:
        for i in range(n):
            (folder / f"clip{i}").mkdir()
            source, target = torch.randn(2, n_frames, channels, *size, generator=g)
            save_file(dict(source=source.half(), target=target.half()), folder / f"clip{i}" / "latents.safetensors")
            for k in range(2):                                     # the candidates of a source, of which one is kept
                f.write(json.dumps(dict(id=f"clip{i}", order=i, candidate=k, of=2, instruction=f"make it {i}",
                                        kept=kept and k == 0)) + "\n")
    return folder


def flags(tmp_path, *more):
    return ["--stage", "video", "--weights", str(IP2P), "--motion", str(ADAPTER), "--runs", str(tmp_path), "--device", "cpu",
            "--steps", "4", "--clip-batch", "2", "--save-minutes", "0", "--train-on", str(tmp_path / "data"), *more]


def train_video(tmp_path, name, *more):
    args = train.parse_args(flags(tmp_path, *more))
    train.stage_video(args, tmp_path / name, args.weights, args.train_on)
    return load_file(tmp_path / name / "model.safetensors")


def log(folder):
    return [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]


def unet_inputs(n_frames=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, n_frames, 8, 4, 4, generator=g), torch.tensor([400]), torch.randn(1, 77, 32, generator=g)


def apart(a, b, start):
    """How far apart the weights of two runs are, relative to their way from where they began. Rounding makes a little of it:
    Adam makes much of the smallest gradients."""
    far = [sum((x[k] - b[k]).square().sum() for k in b).sqrt().item() for x in (a, start)]
    return far[0] / far[1]


def untrained(tmp_path):
    return train.video_model(train.parse_args(flags(tmp_path)), IP2P).unet.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def test_a_video_model_starts_as_the_image_editor(tmp_path):
    image = VideoEditor.from_pretrained(IP2P, device="cpu").unet(*unet_inputs())
    for how, allowed in ((["--no-epm"], 0.0), (["--epm-start", "-10"], 0.005)):      # that leaves 0.1 % to the other frames
        unet = train.video_model(train.parse_args(flags(tmp_path, *how)), IP2P).unet
        video = unet(*unet_inputs())
        assert (video - image).norm() <= allowed * image.norm()


def test_epm_starts_where_the_model_or_the_flag_says(tmp_path):
    for more, start in (([], -2), (["--model", "sd15"], -10), (["--epm-start", "-4"], -4)):
        unet = train.video_model(train.parse_args(flags(tmp_path, *more)), IP2P).unet
        bias = [m.fc2.bias.view(16, 16) for m in unet.modules() if isinstance(m, EPM)]
        assert bias and all(torch.equal(b, start * (1 - torch.eye(16))) for b in bias)


@torch.no_grad()
def test_without_sma_the_motion_prior_is_there_from_the_start_and_gamma_is_not_trained(tmp_path):
    unet = train.video_model(train.parse_args(flags(tmp_path, "--no-sma", "--no-epm")), IP2P).unet
    assert not torch.allclose(unet(*unet_inputs()), unet(*unet_inputs(), mode="image"), atol=1e-3)
    gammas = [p for k, p in unet.named_parameters() if k.endswith(".gamma")]
    assert gammas and all(p.item() == 1 and not p.requires_grad for p in gammas)


@pytest.mark.parametrize("trainable", ["temporal", "all"])
def test_what_is_trainable_changes_and_nothing_else(tmp_path, trainable):
    curated(tmp_path / "data")
    before = train.video_model(train.parse_args(flags(tmp_path)), IP2P).unet.state_dict()
    after = train_video(tmp_path, "run", "--trainable", trainable)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k for k in before if k.endswith(".gamma")} <= moved
    assert {k.split(".epm.")[0] for k in before if ".epm." in k} == {k.split(".epm.")[0] for k in moved if ".epm." in k}
    spatial = {k for k in before if "motion_modules" not in k and ".epm." not in k}
    assert "down_blocks.0.motion_modules.0.proj_in.weight" in moved
    assert bool(spatial & moved) == (trainable == "all")


def test_a_round_killed_in_mid_step_ends_with_the_same_weights_and_log(tmp_path, monkeypatch):
    curated(tmp_path / "data")
    want = train_video(tmp_path, "whole")
    clip_norm, calls = torch.nn.utils.clip_grad_norm_, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip_norm(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", cut)
    with pytest.raises(KeyboardInterrupt):
        train_video(tmp_path, "cut")
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 2
    assert same(train_video(tmp_path, "cut"), want)
    a, b = log(tmp_path / "cut"), log(tmp_path / "whole")
    assert [(r["step"], r["gamma"], r["epm"]) for r in a] == [(r["step"], r["gamma"], r["epm"]) for r in b]


def test_log_lines_after_the_checkpoint_are_not_kept_twice(tmp_path):
    small_fit(tmp_path, args=dict(lr=1))
    rows = log(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write(json.dumps(dict(step=60, loss=1.0)) + "\n" + '{"step": 70, "lo')           # and one line that a kill cut
    small_fit(tmp_path, steps=100, args=dict(lr=1))
    assert [r["step"] for r in log(tmp_path)] == [5, 8, *range(16, 100, 8), 100] and log(tmp_path)[:2] == rows


def test_a_full_disk_says_so_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    small_fit(tmp_path, args=dict(lr=1))

    def full(*args):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(UserError, match="step 9 cannot be written .*No space left"):
            small_fit(tmp_path, steps=12, args=dict(lr=1))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 8


def test_a_damaged_checkpoint_or_log_is_named_and_left_as_it_is(tmp_path):
    small_fit(tmp_path)
    state, log = (tmp_path / "state.pt").read_bytes(), (tmp_path / "log.jsonl").read_text()
    for name, whole, broken in (("state.pt", state, state[:len(state) // 2]), ("state.pt", state, b""),
                                ("log.jsonl", log.encode(), b"{broken\n" + log.encode())):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(UserError, match=name):
            small_fit(tmp_path)
        assert (tmp_path / name).read_bytes() == broken
        (tmp_path / name).write_bytes(whole)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    net = torch.nn.Linear(2, 1)
    with pytest.raises(UserError, match="norm (nan|inf) at step 2"):           # the root's slope at 0 is infinite
        train.fit(net, lambda step, g: (net.weight * (step != 2)).abs().sum().sqrt(), tmp_path, dict(args=dict(seed=0)), 4, 1e-3, 1)
    assert all(p.isfinite().all() for p in net.parameters())


def test_accumulating_two_batches_of_one_is_one_batch_of_two(tmp_path):
    curated(tmp_path / "data")
    a = train_video(tmp_path, "a", "--clip-batch", "2")
    b = train_video(tmp_path, "b", "--clip-batch", "1", "--accumulate", "2")
    assert apart(a, b, untrained(tmp_path)) < 0.05
    assert log(tmp_path / "a")[-1]["loss"] == pytest.approx(log(tmp_path / "b")[-1]["loss"], rel=1e-5)


def test_two_processes_have_the_loss_of_one_with_twice_the_batch(tmp_path):
    curated(tmp_path / "data")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)         # holds its port
    port = str(store.port)
    # whoever is done goes on to read the files of the first
    code = "import sys, train; sample.main(sys.argv[1:]); assert model.finished(train.parse_args(sys.argv[1:]).out)"
    command = [sys.executable, "-c", code, *flags(tmp_path, "--clip-batch", "1", "--out", str(tmp_path / "two"))]
    two = [subprocess.Popen(command, stderr=open(tmp_path / f"{rank}.log", "w"), cwd=ROOT, env=os.environ | dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
        TORCHELASTIC_USE_AGENT_STORE="True")) for rank in range(2)]
    try:
        one = train_video(tmp_path, "one", "--clip-batch", "2")
        for rank, process in enumerate(two):
            assert process.wait() == 0, (tmp_path / f"{rank}.log").read_text()[-2000:]
    finally:
        for process in two:
            process.kill()
    assert log(tmp_path / "two")[-1]["loss"] == pytest.approx(log(tmp_path / "one")[-1]["loss"], rel=1e-5)
    got = load_file(tmp_path / "two" / "model.safetensors")
    assert apart(got, one, untrained(tmp_path)) < 0.05


def test_a_round_loads_anywhere_and_the_next_one_continues_from_it(tmp_path):
    curated(tmp_path / "data")
    weights = train_video(tmp_path, "round0")
    for source in (tmp_path / "round0", tmp_path / "round0" / "model.safetensors"):
        ed = VideoEditor.from_pretrained(source, device="cpu")
        assert ed.default_mode == "video" and same(ed.unet.state_dict(), weights)
    unet = train.video_model(train.parse_args(flags(tmp_path)), tmp_path / "round0").unet
    assert same(unet.state_dict(), weights)
    with pytest.raises(UserError, match="--no-epm: .* was trained with --epm"):
        train.video_model(train.parse_args(flags(tmp_path, "--no-epm")), tmp_path / "round0")


def test_recomputing_activations_leaves_loss_and_weights_as_they_are(tmp_path):
    curated(tmp_path / "data")
    a, b = train_video(tmp_path, "a"), train_video(tmp_path, "b", "--checkpointing")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6


@pytest.mark.parametrize("guidance", [(1.5, 1.5), (7.5, 1.5), (2.0, 1.0), (1.0, 1.0)])
def test_the_guided_loss_is_that_of_the_guided_prediction_where_source_and_text_are_there(guidance):
    torch.manual_seed(0)
    ed = VideoEditor.from_pretrained("tiny", device="cpu", dtype="float32", epm=True)
    text, no_text = ed.encode_text(["make it snow", ""]).detach()
    z0, z_src, eps = torch.randn(3, 16, ed.vae.config["latent_channels"], 8, 8)
    t, one = torch.tensor(600), torch.ones(1, 1, 1, 1)
    samples = [(z0, z_src * has_src, text if has_text else no_text, t, eps, one)
               for has_src, has_text in ((1, 1), (1, 0), (0, 1), (0, 0))]
    a = model.noise_levels(ed.scheduler)[600]
    z_t, v = a.sqrt() * z0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z0
    for k, sample in enumerate(samples):
        scales = guidance if k == 0 else (1.0, 1.0)                # a branch by itself, as it is
        with torch.no_grad():
            out = ed.guided(z_t[None], sample[1][None], t, torch.stack([sample[2], no_text]), *scales, "video")[0]
            got = train.clip_loss(ed.unet, [sample], ed.scheduler, "cpu", (*guidance, no_text))
        assert got.item() == pytest.approx((out - v).square().mean().item(), rel=1e-5)
    together = train.clip_loss(ed.unet, samples, ed.scheduler, "cpu", (*guidance, no_text))
    alone = [train.clip_loss(ed.unet, [sample], ed.scheduler, "cpu", (*guidance, no_text)) for sample in samples]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)
    ed.unet.conv_in.weight.requires_grad_(True)
    train.clip_loss(ed.unet, samples[:1], ed.scheduler, "cpu", (*guidance, no_text)).backward()
    assert ed.unet.conv_in.weight.grad.abs().max() > 0


def test_bf16_keeps_weights_in_float32_has_about_the_same_loss_and_is_named_on_resume(tmp_path):
    curated(tmp_path / "data")
    weights = train_video(tmp_path, "half", "--bf16")
    train_video(tmp_path, "full")
    assert {v.dtype for v in weights.values()} == {torch.float32}
    half, full = (log(tmp_path / name)[-1]["loss"] for name in ("half", "full"))
    assert half == pytest.approx(full, rel=0.02) and half != full
    with pytest.raises(UserError, match="--bf16 True .now False."):
        train_video(tmp_path, "half")


def test_changed_settings_and_changed_data_are_refused_by_name(tmp_path):
    curated(tmp_path / "data")
    train_video(tmp_path, "run")
    with pytest.raises(UserError, match="--trainable temporal .now all."):
        train_video(tmp_path, "run", "--trainable", "all")
    curated(tmp_path / "more")
    with pytest.raises(UserError, match="--train-on.*--max-clips 3 .now 6."):
        train_video(tmp_path, "run", "--train-on", str(tmp_path / "data"), str(tmp_path / "more"))


@pytest.mark.parametrize("kind, message", [
    ("missing", "holds no manifest.jsonl"), ("short", "12 frames; training needs exactly 16"),
    ("long", "20 frames; training needs exactly 16"), ("none", "kept none of 6 candidates"),
    ("channels", "8 latent channels, the model has 4"), ("gone", "latents.safetensors: no such file"),
    ("half", "latents.safetensors: not a readable weight file"), ("line", "manifest.jsonl, line 2: is not JSON")])
def test_data_that_does_not_fit_is_refused_in_one_line(tmp_path, kind, message):
    folder = tmp_path / "data"
    if kind != "missing":
        curated(folder, n_frames={"short": 12, "long": 20}.get(kind, 16), kept=kind != "none", channels=8 if kind == "channels" else 4)
    latents = folder / "clip1" / "latents.safetensors"
    if kind == "gone":
        latents.unlink()
    if kind == "half":
        latents.write_bytes(latents.read_bytes()[:3000])
    if kind == "line":
        lines = (folder / "manifest.jsonl").read_text().splitlines()
        (folder / "manifest.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=message) as e:
        train.read_clips([folder], 4)
    assert "\n" not in str(e.value)


def test_only_a_last_line_cut_by_a_kill_is_left_out_and_said_so(tmp_path, capsys):
    folder = curated(tmp_path / "data")
    text = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_text(text[:-20])
    assert len(train.read_clips([folder], 4)) == 2
    assert "last 2 lines are cut" in capsys.readouterr().out       # both candidates of the source that is not complete


def test_every_clip_comes_once_an_epoch_in_changing_order():
    epochs = [[train.row_of(k, 7, 0) for k in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_noise_is_drawn_per_frame_or_shared_by_all_of_them_as_asked():
    eps = torch.stack([train.draw_noise(k, 0, (16, 4, 4, 4), 1.0, 0.5)[2] for k in range(200)])
    shared = (eps == eps[:, :1]).flatten(1).all(dim=1)
    assert 70 < shared.sum() < 130
    assert (eps[~shared].diff(dim=1).abs() > 0).any(dim=(2, 3, 4)).all()


def test_a_camera_move_is_the_same_for_source_and_target_and_always_moves():
    x = 2 * torch.rand(1, 1, 3, 24, 32, generator=torch.Generator().manual_seed(0)).expand(2, 16, -1, -1, -1) - 1
    for number in range(20):
        source, target = train.camera_move(x, number)
        assert torch.equal(source, target) and source.shape == x.shape[1:]
        assert (source[0] - source[-1]).abs().mean() > 1e-3
        assert source.abs().max() <= 1                             # bicubic overshoots, but not out of range


def test_camera_moves_add_clips_that_are_made_once(tmp_path):
    folder = curated(tmp_path / "data", n=1)
    ed = VideoEditor.from_pretrained(IP2P, device="cpu")
    clips = train.read_clips([folder], 4)
    moved = train.moved_copies(ed, clips, 2)
    made = [load_file(path) for path, *_ in moved]
    assert len(moved) == 2 and all(z["source"].shape == clips[0][2] and z["source"].dtype == torch.float16 for z in made)
    assert not torch.equal(made[0]["source"], made[1]["source"])
    times = [path.stat().st_mtime_ns for path, *_ in moved]
    assert [path.stat().st_mtime_ns for path, *_ in train.moved_copies(ed, clips, 2)] == times


def test_stage_motion_trains_the_modules_alone_and_writes_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MOTION_CLIPS", 2)
    args = train.parse_args(["--stage", "motion", "--weights", str(IP2P), "--runs", str(tmp_path), "--data", str(tmp_path / "d"),
                             "--steps", "3", "--clip-batch", "1", "--size", "32", "--motion-clips", "2", "--device", "cpu"])
    train.stage_motion(args, tmp_path / "motion", tmp_path / "base")
    run, image = load_file(tmp_path / "motion" / "model.safetensors"), VideoEditor.from_pretrained(IP2P, device="cpu").unet
    assert all(torch.equal(v, run[k]) for k, v in image.state_dict().items())
    proj = [v for k, v in run.items() if "motion_modules" in k and k.endswith("proj_out.weight")]
    assert proj and all(v.abs().max() > 0 for v in proj)
    adapter = VideoEditor.from_pretrained(IP2P, motion=tmp_path / "base" / "motion_adapter", device="cpu").unet
    assert same(adapter.state_dict(), run)                         # gamma 1 in both


def test_motion_modules_keep_the_text_encoder_of_the_editor_they_were_trained_in(tmp_path, monkeypatch):
    editor = VideoEditor.from_pretrained(IP2P, device="cpu", dtype="float32")
    editor.unet.text_encoder = editor.text_encoder
    with torch.no_grad():
        editor.text_encoder.text_model.final_layer_norm.bias.add_(1)
    (tmp_path / "image").mkdir()
    save_file({k: v.contiguous() for k, v in editor.unet.state_dict().items()}, tmp_path / "image" / "model.safetensors")
    (tmp_path / "image" / "meta.json").write_text(json.dumps(dict(base=str(IP2P), unet=editor.unet.config, step=1, args=dict(steps=1))))
    monkeypatch.setattr(train, "MOTION_CLIPS", 2)
    args = train.parse_args(["--stage", "motion", "--runs", str(tmp_path), "--data", str(tmp_path / "d"), "--steps", "1",
                             "--clip-batch", "1", "--size", "32", "--motion-clips", "2", "--device", "cpu"])
    train.stage_motion(args, tmp_path / "motion", tmp_path / "base")
    a, b = (VideoEditor.from_pretrained(tmp_path / x, device="cpu").encode_text(["make it snow"]) for x in ("image", "motion"))
    assert torch.equal(a, b) and not torch.equal(a, VideoEditor.from_pretrained(IP2P, device="cpu").encode_text(["make it snow"]))


def test_gamma_and_epm_are_logged_for_every_module_and_drawn(tmp_path):
    curated(tmp_path / "data")
    weights = train_video(tmp_path, "round0")
    row = log(tmp_path / "round0")[-1]
    assert set(row["gamma"]) == {k.removesuffix(".gamma") for k in weights if k.endswith(".gamma")}
    assert all(-0.5 < own < 0.5 and -2.5 < other < -1.5 for own, other in row["epm"].values())
    assert len(row["epm"]) == sum(k.endswith("epm.fc2.bias") for k in weights)
    sample.main(["--stage", "plot", "--round", "0", "--runs", str(tmp_path)])
    picture = Image.open(tmp_path / "round0" / "training.png")
    assert picture.width > 1000 and len(picture.getcolors(100_000)) > 10
    with pytest.raises(UserError, match="no log of a video run"):
        train.plot(tmp_path, tmp_path / "x.png")


def test_a_finished_round_is_neither_curated_nor_trained_again(tmp_path):
    curated(tmp_path / "data")
    train_video(tmp_path, "round0")
    before = (tmp_path / "round0" / "state.pt").stat().st_mtime_ns
    train.refine(train.parse_args(flags(tmp_path, "--round", "0", "--data", str(tmp_path / "d"))))
    assert (tmp_path / "round0" / "state.pt").stat().st_mtime_ns == before and not (tmp_path / "d").exists()


def test_flags_that_contradict_a_finished_round_are_refused_by_name_before_any_work(tmp_path, capsys):
    curated(tmp_path / "data")
    train_video(tmp_path, "round0")
    command = flags(tmp_path, "--round", "0", "--data", str(tmp_path / "d"))
    command[1] = "all"
    for more, match in ((["--no-epm"], "--epm True .now False."), (["--lr", "1"], "--lr .* .now 1.0."), (["--seed", "3"], "--seed")):
        with pytest.raises(UserError, match=match):
            sample.main([*command, *more])
    assert not (tmp_path / "d").exists() and "curating" not in capsys.readouterr().out
    train.refine(train.parse_args([*command, "--no-epm", "--force"]))
    assert f"round 0: finished, in {tmp_path / 'round0'}" in capsys.readouterr().out


def test_other_data_than_a_finished_rounds_is_refused_and_flags_of_curation_are_read_before_any_work(tmp_path):
    curated(tmp_path / "data" / "round0")
    command = flags(tmp_path, "--round", "0", "--data", str(tmp_path / "data"))
    command[1] = "all"
    del command[command.index("--train-on"):command.index("--train-on") + 2]
    args = train.parse_args(command)
    train.stage_video(args, tmp_path / "round0", args.weights, train.round_folders(args, 0), train.curation_flags(args, 0))
    train.check_rounds(args)
    for more, match in ((["--images", "5"], "--images 240 .now 5."), (["--curate-videos=--min clip_frame=0.5"], "--curate-videos  .now"),
                        (["--curate-real=--nope"], "--nope"), (["--curate-images=--n 'x"], "--curate-images --n 'x: no closing")):
        with pytest.raises(UserError, match=match):
            train.check_rounds(train.parse_args([*command, *more]))
    train.check_rounds(train.parse_args([*command, "--real-clips", "5"]))          # round 0 has no real clips


@pytest.mark.parametrize("n, mix, rounds", [(0, [], "0"), (1, [], "01"), (2, [], "2"), (2, ["--mix"], "02"), (3, ["--mix"], "03")])
def test_a_round_trains_on_what_the_papers_table_4_counts(n, mix, rounds):
    folders = train.round_folders(train.parse_args(["--data", "d", *mix]), n)
    assert [str(folder) for folder in folders] == [f"d/round{k}" for k in rounds]


def test_an_exported_video_run_edits_like_the_run(tmp_path):
    curated(tmp_path / "data")
    train_video(tmp_path, "round0")
    train.export(tmp_path / "round0", tmp_path / "hub")
    ed, run = (VideoEditor.from_pretrained(tmp_path / name, device="cpu") for name in ("hub", "round0"))
    assert ed.default_mode == "video"
    a, b = ed.unet(*unet_inputs()), run.unet(*unet_inputs())
    assert (a - b).norm() < 1e-2 * b.norm()                        # float16 files
    assert not torch.equal(a, ed.unet(*unet_inputs(), mode="image"))
    for editor in (ed, run):                                       # tiny's default: trained on one noise for all frames
        z = editor.noise(3, 4, 4, seed=1, mode="video")
        assert torch.equal(z[:, 0], z[:, 2])
        editor.same_noise = False
        assert not torch.equal(z[:, 2], editor.noise(3, 4, 4, seed=1, mode="video")[:, 2])


def test_a_run_from_an_embedded_video_editor_exports_what_it_has_and_not_what_that_had(tmp_path):
    curated(tmp_path / "data")
    train_video(tmp_path, "round0")
    train.export(tmp_path / "round0", tmp_path / "hub")
    train_video(tmp_path, "plain", "--weights", str(tmp_path / "hub"), "--motion", str(ADAPTER), "--no-epm")
    train.export(tmp_path / "plain", tmp_path / "hub2")
    ed, run = (VideoEditor.from_pretrained(tmp_path / name, device="cpu") for name in ("hub2", "plain"))
    assert ed.default_mode == "video" and not any("epm" in k for k in ed.unet.state_dict())
    a, b = ed.unet(*unet_inputs()), run.unet(*unet_inputs())
    assert (a - b).norm() < 1e-2 * b.norm()                        # float16 files


def test_a_run_that_is_not_finished_is_not_exported(tmp_path):
    curated(tmp_path / "data")
    train_video(tmp_path, "round0")
    meta = json.loads((tmp_path / "round0" / "meta.json").read_text())
    (tmp_path / "round0" / "meta.json").write_text(json.dumps(meta | {"step": 1}))
    with pytest.raises(UserError, match="no finished run"):
        train.export(tmp_path / "round0", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_an_exported_video_run_holds_the_image_editor_from_which_rounds_start(tmp_path):
    curated(tmp_path / "data")
    train_video(tmp_path, "round0")
    hub = tmp_path / "hub"
    train.export(tmp_path / "round0", hub)
    files = {p.name: p.read_bytes() for p in hub.rglob("*") if p.is_file()}
    meta = json.loads((tmp_path / "round0" / "meta.json").read_text())
    (tmp_path / "round0" / "meta.json").write_text(json.dumps(meta | {"base": str(hub)}))
    train.export(tmp_path / "round0", hub)                         # onto what it started from
    assert files == {p.name: p.read_bytes() for p in hub.rglob("*") if p.is_file()}
    for source, motion in ((hub, False), (tmp_path / "round0", False), (hub, ADAPTER)):
        ed, image = (VideoEditor.from_pretrained(x, motion=m, device="cpu") for x, m in ((source, motion), (IP2P, motion)))
        assert ed.default_mode == "ffg" and ed.unet.state_dict().keys() == image.unet.state_dict().keys()
        a, b = ed.unet(*unet_inputs()), image.unet(*unet_inputs())
        assert (a - b).norm() < 1e-2 * b.norm()                    # float16 files
    unet, image = (train.video_model(train.parse_args(flags(tmp_path)), x).unet.state_dict() for x in (hub, IP2P))
    assert all((p - image[k]).norm() <= 1e-2 * image[k].norm() for k, p in unet.items())


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


def train_writer(tmp_path, name, *more):
    sample.main(["--stage", "writer", "--pairs-from", str(tmp_path / "pairs"), "--llava", str(LLAVA), "--steps", "12",
                "--batch", "3", "--rank", "4", "--lr", "3e-2", "--device", "cpu", "--save-minutes", "0", "--runs", str(tmp_path),
                "--out", str(tmp_path / name), *more])


def test_fine_tuning_the_writer_lowers_its_loss_and_its_file_is_read_back(tmp_path, capsys):
    pairs(tmp_path / "pairs")
    train_writer(tmp_path, "writer")
    assert "3 image pairs; left out: 1 " in capsys.readouterr().out
    tuned = LlavaOneVision.from_pretrained(LLAVA, device="cpu", lora=tmp_path / "writer" / "writer.safetensors")
    todo = train.writer_pairs(tmp_path / "pairs", 10)
    shown, answers = [pair["load"]()[0][None] for pair, _ in todo], [answer for _, answer in todo]
    with torch.no_grad():
        before = writer_loss(LlavaOneVision.from_pretrained(LLAVA, device="cpu"), shown, answers)
        after = writer_loss(tuned, shown, answers)
    assert after < before - 0.3, (before, after)
    assert answers[0]["task"] == "background" and (tmp_path / "writer" / "state.pt").stat().st_size < 1e6
    with pytest.raises(UserError, match="--rank 4 .now 8."):
        train_writer(tmp_path, "writer", "--rank", "8")


def test_a_writer_killed_in_mid_training_ends_with_the_same_matrices(tmp_path, monkeypatch):
    pairs(tmp_path / "pairs")
    train_writer(tmp_path, "whole")
    real, asked = teachers.writer_loss, []

    def loss(*args):
        asked.append(1)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "writer_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        train_writer(tmp_path, "cut")
    train_writer(tmp_path, "cut")
    assert len(asked) == 13                                        # six steps, the kill, and the six that were left
    assert same(load_file(tmp_path / "whole" / "writer.safetensors"), load_file(tmp_path / "cut" / "writer.safetensors"))


def test_a_writer_without_usable_pairs_says_so(tmp_path):
    with pytest.raises(UserError, match="--stage writer needs --pairs-from"):
        sample.main(["--stage", "writer", "--device", "cpu", "--runs", str(tmp_path)])
    pairs(tmp_path / "pairs", 1)
    lines = (tmp_path / "pairs" / "list.jsonl").read_text().splitlines()
    (tmp_path / "pairs" / "list.jsonl").write_text(lines[-1] + "\n")
    with pytest.raises(UserError, match="--pairs-from .*none of 1 pairs"):
        train_writer(tmp_path, "writer")


def small_hub(folder):
    """Networks of random weights that work at 32 pixels in one sampling step and bring their own scorers."""
    folder.mkdir()
    for name, part in [(p.name, p) for p in IP2P.iterdir() if p.is_dir()] + [("clip", CLIP), ("viclip", GOLDENS / "ViCLIP")]:
        (folder / name).symlink_to(part)
    (folder / "model_index.json").write_text(json.dumps({"instructvedit": {"size": 32, "steps": 1}}))
    return folder


def test_the_rounds_curate_train_and_resume_as_one_command(tmp_path, capsys):
    hub, few = small_hub(tmp_path / "hub"), "--candidates 1 --no-filter"
    command = ["--round", "1", "--weights", str(hub), "--motion", str(ADAPTER), "--runs", str(tmp_path / "r"), "--data",
               str(tmp_path / "d"), "--device", "cpu", "--steps", "2", "--clip-batch", "1", "--images", "2", "--real-clips", "2",
               f"--curate-images={few} --steps 1", f"--curate-videos={few}", f"--curate-real={few} --steps 1"]
    with pytest.raises(UserError, match="--max-clips 99: there are only 2"):               # ends between curation and training
        sample.main([*command, "--max-clips", "99"])
    before = (tmp_path / "d" / "round0" / "manifest.jsonl").read_bytes()
    with pytest.raises(UserError, match="--images 1: .*images holds 2 already"):
        sample.main([*command, "--images", "1"])
    sample.main(command)
    assert (tmp_path / "d" / "round0" / "manifest.jsonl").read_bytes() == before
    assert "score it on real clips" in capsys.readouterr().out     # this editor does not know the shapes world
    metas = [json.loads((tmp_path / "r" / f"round{n}" / "meta.json").read_text()) for n in (0, 1)]
    assert [meta["args"]["max_clips"] for meta in metas] == [2, 4]                         # round 1: both domains
    assert all(meta["args"]["weights"] == str(hub) for meta in metas)                      # training starts anew,
    made_by = json.loads((tmp_path / "d" / "round1" / "dataset.json").read_text())
    assert made_by["weights"] == str(tmp_path / "r" / "round0") and made_by["round"] == 1  # data come from the round before
    sample.main(command)
    out = capsys.readouterr().out
    assert out.count("finished, in") == 2 and "curating" not in out
    (tmp_path / "other").symlink_to(GOLDENS / "animatediff-motion-adapter-v1-5-2")
    with pytest.raises(UserError, match="round0: finished with --motion .*, the adapter "):
        sample.main([*command, "--motion", str(tmp_path / "other")])


def test_a_table_trains_and_measures_its_rows_once(tmp_path, capsys):
    hub = small_hub(tmp_path / "hub")
    curated(tmp_path / "data" / "round0", n=1)
    command = ["--stage", "table3", "--weights", str(hub), "--motion", str(ADAPTER), "--runs", str(tmp_path / "r"), "--data",
               str(tmp_path / "data"), "--steps", "1", "--clip-batch", "1", "--seeds", "1", "--n", "1", "--device", "cpu"]
    sample.main(command)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(("| SMA", "| no SMA"))]
    assert len(lines) == 8 and all("+0.0% ± 0.0%, 0 differ" in line for line in lines[:2])  # the first row, to itself
    assert out.count("held-out synthetic scenes, 32 px, 16 frame(s)") == 4
    sample.main(command)
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line in lines] == lines and "held-out synthetic" not in again


def test_an_editor_that_returns_its_source_scores_as_the_autoencoder_does():
    ed = VideoEditor.from_pretrained("tiny", device="cpu")
    ed.deadband = 1e3                                              # every change is too small
    rows = train.evaluate(ed, n=2, size=32, steps=1)
    for task, values in rows.items():
        for edit, source, bound, outside, coded, success, _, _ in values:
            assert success == 0 and edit < source + 3
            assert outside == pytest.approx(coded, abs=1e-3) or math.isnan(coded), task


def test_what_a_round_drops_and_what_its_target_then_is(tmp_path, monkeypatch):
    """5 % text alone, 5 % both, 5 % source alone; where a dropped text means no edit, its target is the source."""
    curated(tmp_path / "data", n=1)
    loss, seen = train.clip_loss, []
    monkeypatch.setattr(train, "clip_loss", lambda unet, samples, *args: seen.extend(samples) or loss(unet, samples, *args))
    train_video(tmp_path, "run", "--steps", "30", "--no-guided-loss")
    z = load_file(tmp_path / "data" / "clip0" / "latents.safetensors")
    ed = VideoEditor.from_pretrained(IP2P, device="cpu")
    source, target, scale = z["source"].float(), z["target"].float(), ed.vae.scaling_factor
    text, no_text = (ed.encode_text([words])[0].half().float() for words in ("make it 0", ""))
    counts = {}
    for k, (z0, z_src, ctx, *_) in enumerate(seen):
        u = train.draw_noise(k, 0, source.shape, 0.5, 1.0)[0]
        kind = "text" if u < 0.05 else "both" if u < 0.10 else "source" if u < 0.15 else "none"
        counts[kind] = counts.get(kind, 0) + 1
        assert torch.equal(z_src, source * (kind in ("text", "none")))
        assert torch.allclose(ctx, no_text if kind in ("text", "both") else text, atol=1e-3)
        assert torch.equal(z0, (source if kind == "text" else target) * scale)
    assert len(seen) == 60 and min(counts.get(kind, 0) for kind in ("text", "both", "source")) > 0, counts


def test_new_parameters_have_rates_of_their_own_and_no_weight_decay(tmp_path):
    net = torch.nn.Module()
    net.block = torch.nn.ModuleDict({"ff": torch.nn.Linear(3, 1), "epm": torch.nn.Linear(3, 1)})
    net.block.gamma = torch.nn.Parameter(torch.zeros(()))
    for p in net.parameters():
        torch.nn.init.ones_(p)
    train.fit(net, lambda step, g: sum(5 * p.sum() for p in net.parameters()), tmp_path, dict(args=dict(seed=0)), 1, 1e-3, 1,
              warmup=1, lr_new=1e-2)
    moved = torch.load(tmp_path / "state.pt", weights_only=True)["net"]                    # Adam's first step is the rate
    assert [1 - moved[f"block.{k}"].max().item() for k in ("ff.weight", "epm.weight", "gamma")] == pytest.approx(
        [1e-3 * 1.01, 1e-2, 1e-1], rel=1e-3)


def test_a_tables_success_counts_clips_with_a_known_truth():
    row = (20, 15, 30, 30, 30, 1, .5, True)
    clips = train.success({"object": [row, (16, 15, 30, 20, 30, 0, .7, True)], "background ~": [row]})
    assert clips.tolist() == [[1, 5, .5], [0, 1, .7]]


def test_a_table_counts_clips_once_and_compares_them_with_the_first_row():
    seeds = [np.array([[float(k == seed), 2.0, 0.5] for k in range(4)]) for seed in range(2)]
    better = [np.array([[1.0, 3.0, 0.5]] * 4)] * 2
    first = np.mean(seeds, axis=0)
    assert train.table_line("none", "real", seeds, first) == (
        "| none | real | 4 x 2 | 25.0% ± 24.5% | 25.0% to 25.0% | +0.0% ± 0.0%, 0 differ | +2.0 ± 0.0 | +0.00 ± 0.00 | "
        "0.50 ± 0.00 | +0.00 ± 0.00 |")
    assert train.table_line("both", "real", better, first).startswith(
        "| both | real | 4 x 2 | 100.0% ± 0.0% | 100.0% to 100.0% | +75.0% ± 24.5%, 4 differ | +3.0 ± 0.0 | +1.00 ± 0.00 |")


def test_a_table_does_not_take_runs_of_other_settings_for_its_own(tmp_path, capsys):
    curated(tmp_path / "data" / "round0")
    command = ["--stage", "table3", "--weights", str(IP2P), "--motion", str(ADAPTER), "--runs", str(tmp_path), "--data",
               str(tmp_path / "data"), "--steps", "2", "--clip-batch", "1", "--seeds", "1", "--device", "cpu"]
    args = train.parse_args(command)
    for name, flags_of_row, folders, own in train.table_rows(args):
        run = tmp_path / "table3" / f"{name.replace(',', '').replace(' ', '-')}-0"
        train.stage_video(argparse.Namespace(**vars(args) | flags_of_row), run, IP2P, folders)
        assert train.changed_flags(argparse.Namespace(**vars(args) | flags_of_row), run, IP2P, folders) == []
    with pytest.raises(UserError, match="no-SMA-no-EPM-0: finished with --lr 0.0002 .now 0.1."):
        train.tables(train.parse_args([*command, "--lr", "0.1"]))
    with pytest.raises(UserError, match="finished with --weights"):
        train.tables(train.parse_args([*command, "--weights", str(tmp_path)]))


def test_table_2_makes_other_data_of_the_same_sources_and_trains_on_equally_many_clips(tmp_path):
    curated(tmp_path / "round0", n=3)
    args = train.parse_args(["--stage", "table2", "--data", str(tmp_path), "--weights", "tiny", "--motion", "none",
                             "--images", "2", "--curate-images=--candidates 2 --steps 2",
                             "--curate-videos=--candidates 2 --no-filter"])
    train.curate_stage(args, "images", "tiny", tmp_path / "images", "--n", 2, "--no-filter")
    rows = train.table_rows(args)
    assert [flags["max_clips"] for _, flags, *_ in rows] == [2, 2, 2]
    folders = [folder for _, _, [folder], _ in rows]
    assert [folder.name for folder in folders] == ["round0", "round0-unfiltered", "round0-per-frame"]
    unfiltered, per_frame = (curate.read_manifest(folder) for folder in folders[1:])
    assert [row["candidate"] for row in unfiltered] == [0, 0] and [row["candidate"] for row in per_frame] == [0, 1, 0, 1]
    assert {row["id"] for row in unfiltered} == {row["id"] for row in per_frame}
    assert [json.loads((folder / "dataset.json").read_text())["mode"] for folder in folders[1:]] == ["ffg", "image"]


RANGES = [("--round", "-1"), ("--clip-batch", "0"), ("--lr-new", "-1"), ("--lr", "0"), ("--t-bias", "0"), ("--max-clips", "0"),
          ("--max-clips", "-2"), ("--weights", "tiny"), ("--steps", "0"), ("--size", "50"), ("--pairs", "0")]


@pytest.mark.parametrize("flag", ["--runs", "--data", "--out", "--to"])
def test_a_file_where_a_directory_is_needed_is_refused_at_once(flag, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{flag} .*file"):
            train.parse_args([flag, str(path), *(["--stage", "eval"] if flag == "--out" else [])])


@pytest.mark.parametrize("flag, value", RANGES)
def test_values_out_of_range_name_the_flag(flag, value):
    with pytest.raises(UserError, match=flag):
        train.parse_args([flag, value])


def test_tiny_hears_colours_and_places_and_an_editor_that_reads_nothing_hears_nothing():
    ed = VideoEditor.from_pretrained("tiny", device="cpu")
    assert min(train.words_heard(ed, n=4).values()) > 0.05
    for name, p in ed.unet.named_parameters():
        if "attn2.to_out.0" in name:                               # nothing of the text gets through
            p.zero_()
    assert train.words_heard(ed, n=1) == {"kind": 0, "colour": 0, "place": 0}
