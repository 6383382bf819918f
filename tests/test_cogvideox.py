"""CogVideoX-5B-I2V: parity with outputs of diffusers 0.42.1 and transformers 5.23.0 on a random-weight miniature in the
published layout (goldens/CogVideoX-5b-I2V), full-size names and shapes, invariants of the samplers, bad inputs."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from teachers import (CogSchedule, CogTransformer, CogVAE, CogVideoX, T5Encoder, clip_fault, dynamic_guidance, fit_image, inside, rope_3d)
from model import UserError

GOLDENS = Path(__file__).parent / "goldens"
MANIFESTS = GOLDENS
MINI = GOLDENS / "CogVideoX-5b-I2V"
WANT = load_file(MINI / "expected.safetensors")
CASES = json.loads((MINI / "cases.json").read_text(encoding="utf-8"))
ATOL = {k: v["atol"] for k, v in json.loads((MINI / "tolerance.json").read_text()).items()}


@pytest.fixture(scope="module")
def cog(tmp_path_factory):
    return CogVideoX.from_pretrained(MINI, device="cpu", cache=tmp_path_factory.mktemp("text"))


@pytest.fixture
def copy(tmp_path):
    """A copy of the miniature to damage."""
    return Path(shutil.copytree(MINI, tmp_path / "hub", ignore=shutil.ignore_patterns("expected*")))


def close(name, got, want=None):
    torch.testing.assert_close(got, WANT[name] if want is None else want, rtol=0, atol=ATOL[name])


def pixels(name):
    """(F, H, W, 3) bytes -> (1, F, 3, H, W) in [-1, 1]."""
    return (WANT[name].float() / 127.5 - 1).permute(0, 3, 1, 2)[None]


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------------------------------------------- parity

def test_tokens_equal_the_published_tokenizer_on_every_string(cog):
    ids = cog.tokenizer(CASES["token_strings"], CASES["max_sequence_length"])
    assert torch.equal(ids, WANT["tokens.hf4"]) and torch.equal(ids, WANT["tokens.hf5"])


def test_normalisation_takes_the_longest_match_and_single_spaces(cog):
    plain = cog.tokenizer.normalize
    assert plain("  caf\u0065\u0301 \u00a0 \ufb01ne\n") == "▁café▁fine"
    assert plain("\u304b\u3099") == "▁が" and plain(" \t ") == ""


def test_t5_states(cog):
    close("t5.hidden_states", cog.network("text_encoder")(WANT["tokens.hf5"][[0, -2]]))


@pytest.mark.parametrize("case", ["transformer", "transformer2"])
def test_transformer_with_learned_and_computed_positions(cog, case):
    net, z = cog.network("transformer"), WANT[case + ".latents"]
    close(case + ".output", net(z, WANT[case + ".text"], WANT[case + ".timesteps"]))
    cos, sin = rope_3d(z.shape[1], z.shape[3] // 2, z.shape[4] // 2, net.config["attention_head_dim"])
    close(case + ".rope_cos", cos)
    close(case + ".rope_sin", sin)


def test_vae_encodes_in_the_published_chunks(cog):
    vae = cog.network("vae")
    mean, logvar = vae.encode(pixels("vae.frame_u8"))
    close("vae.frame.mean", mean.transpose(1, 2))
    close("vae.frame.logvar", logvar.transpose(1, 2))
    for name in ("vae.video9", "vae.video_long"):
        close(name + ".mean", vae.encode(pixels(name + "_u8"))[0].transpose(1, 2))


@pytest.mark.parametrize("n", [3, 4, 5])
def test_vae_decodes_in_the_published_chunks(cog, n):
    close(f"vae.latent{n}.decoded", cog.network("vae").decode(WANT[f"vae.latent{n}"].transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("steps", [4, 50])
def test_ddim_schedule_and_trajectory(cog, steps):
    schedule, z = CogSchedule(cog.scheduler, steps), WANT["sched.start"]
    close("sched.alphas_cumprod", schedule.abar.float())
    assert torch.equal(schedule.timesteps, WANT[f"sched.{steps}.timesteps"])
    for i, want in enumerate(WANT[f"sched.{steps}.trajectory"]):
        z = schedule.ddim(WANT["sched.v"][i], i, z)
        close(f"sched.{steps}.trajectory", z, want)


def test_end_to_end_trajectory_and_video(cog):
    e2e, image = CASES["e2e"], Image.fromarray(WANT["e2e.image_u8"].numpy())
    noise = WANT["e2e.image_noise"].transpose(1, 2)
    z_img = cog.encode_image(fit_image(image, e2e["height"], e2e["width"]), WANT["e2e.latents"].shape[1], noise)
    close("e2e.image_latents", z_img)
    ctx = cog.text_states([e2e["negative_prompt"], e2e["prompt"]])
    path = list(cog.denoise(WANT["e2e.latents"], z_img, ctx, e2e["steps"], e2e["guidance_scale"]))
    close("e2e.trajectory", torch.cat(path))
    close("e2e.final_latents", path[-1])
    video = cog.animate(image, e2e["prompt"], 0, e2e["num_frames"], e2e["steps"], e2e["guidance_scale"],
                        e2e["negative_prompt"], z_T=WANT["e2e.latents"], image_noise=noise)
    close("e2e.video", video / 2 + 0.5)


# ---------------------------------------------------------------------------------------------------- full size

@pytest.mark.parametrize("manifest, net", [("cogvideox_5b_i2v_transformer", CogTransformer), ("cogvideox_vae", CogVAE),
                                           ("t5_v1_1_xxl_encoder", T5Encoder)])
def test_full_size_names_and_shapes_equal_the_published_files(manifest, net):
    published = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    with torch.device("meta"):
        ours = net(published["config"]).state_dict()
    assert {k: list(v.shape) for k, v in ours.items()} == published["tensors"]


# ---------------------------------------------------------------------------------------------------- samplers

def sample(cog, sampler, steps, z, v_of, seed=0):
    """Run a sampler with the model v_of(z, abar)."""
    schedule, before, g = CogSchedule(cog.scheduler, steps), None, torch.Generator().manual_seed(seed)
    for i in range(steps):
        v, noise = v_of(z, schedule.levels(i)[0]), torch.randn(z.shape, generator=g, dtype=z.dtype)
        z, before = (schedule.ddim(v, i, z), None) if sampler == "ddim" else schedule.dpm(v, i, z, noise, before)
    return z


def test_the_last_timestep_has_no_signal(cog):
    for steps in (1, 7, 50):
        schedule = CogSchedule(cog.scheduler, steps)
        assert schedule.timesteps[0] == 999 and schedule.abar[999] == 0 and len(schedule.timesteps) == steps


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_true_v_leads_to_the_clean_latents(cog, sampler, steps):
    z0, z = torch.randn(2, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = sample(cog, sampler, steps, z, lambda z, a: (a.sqrt() * z - z0) / (1 - a).sqrt())
    torch.testing.assert_close(got, z0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_gaussian_data_keep_their_spread(cog, sampler):
    """For data N(0, s^2) the best v is known in closed form; both samplers must end near that spread."""
    s2, z = 0.25, torch.randn(40000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    clean = lambda z, a: a.sqrt() * s2 / (a * s2 + 1 - a) * z                       # E[z0 | z]
    got = sample(cog, sampler, 250, z, lambda z, a: (a.sqrt() * z - clean(z, a)) / (1 - a).sqrt())
    assert abs(got.std() - s2 ** 0.5) < 0.015 and abs(got.mean()) < 0.01


def test_dynamic_guidance_is_the_published_formula():
    assert dynamic_guidance(6.0, 0, 50) == 7.0                          # (50 - 0) / 50 = 1: the full scale
    assert abs(dynamic_guidance(6.0, 25, 50) - 1.0144458) < 1e-6        # half way: cos(pi / 32)


# ---------------------------------------------------------------------------------------------------- the teacher

def test_one_network_is_loaded_at_a_time_and_text_states_come_from_the_cache(cog):
    first = cog.text_states(["a red fox", "a dog"])
    cog.network("vae")
    again = cog.text_states(["a dog", "a red fox"])
    assert cog.loaded[0] == "vae" and torch.equal(first, again.flip(0)) and first.shape[1] == 226


def test_other_t5_weights_do_not_share_cached_states(cog, copy):
    shard = copy / "text_encoder" / "model-00002-of-00002.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(shard).items()}, shard)
    other = CogVideoX.from_pretrained(copy, device="cpu", cache=cog.cache)
    assert not torch.equal(other.text_states(["a red fox"]), cog.text_states(["a red fox"]))


@pytest.mark.parametrize("n_frames, given", [(1, 1), (8, 8), (9, 9), (13, 16)])
def test_frame_counts_follow_the_latents(cog, n_frames, given):
    video = cog.animate(torch.zeros(3, 40, 40), "a fox", n_frames=n_frames, steps=1)
    assert video.shape == (1, given, 3, 32, 48) and video.dtype == torch.float32 and video.abs().max() <= 1


def test_a_seed_repeats_and_another_differs(cog):
    make = lambda seed, sampler: cog.animate(torch.zeros(3, 32, 48), "a fox", seed, 1, 3, sampler=sampler)
    for sampler in ("ddim", "dpm"):
        assert torch.equal(make(3, sampler), make(3, sampler)) and not torch.equal(make(3, sampler), make(4, sampler))


def test_several_images_give_the_clips_that_each_gives_alone(cog):
    jobs = [(torch.zeros(3, 32, 48), "a fox", 3), (torch.ones(3, 40, 40), "a dog", 4)]
    both = [cog.decode(z) for z in cog.latents(jobs, n_frames=9, steps=2)]
    for video, job in zip(both, jobs, strict=True):
        torch.testing.assert_close(video, cog.animate(*job, n_frames=9, steps=2), atol=1e-5, rtol=0)


def test_bfloat16_stays_near_float32(cog, tmp_path):
    half = CogVideoX.from_pretrained(MINI, device="cpu", dtype="bfloat16", cache=tmp_path)
    make = lambda c: c.animate(torch.zeros(3, 32, 48), "a fox", n_frames=9, steps=2, guidance=1.0)
    assert (make(half) - make(cog)).abs().mean() < 0.1


def test_any_aspect_is_cropped_around_the_centre():
    ramp = torch.linspace(-1, 1, 90).expand(3, 40, 90)                  # wide: the sides go
    got = fit_image(ramp, 32, 48)
    assert got.shape == (3, 32, 48) and abs(got.mean()) < 1e-3 and got.max() < 0.7
    assert fit_image(Image.new("RGB", (20, 200), "white"), 32, 48).min() > 0.999
    assert torch.equal(fit_image(ramp, 40, 90), ramp)


@pytest.mark.parametrize("h, w", [(40, 40), (20, 200), (200, 21), (31, 48)])
def test_a_padded_image_is_whole_and_lies_where_inside_says(h, w):
    image = torch.linspace(0, 1, w).expand(3, h, w)
    got, (top, left, high, wide) = fit_image(image, 32, 48, pad=True), inside(h, w, 32, 48)
    assert got.shape == (3, 32, 48) and abs(high / wide - h / w) < 0.2 * h / w and (high == 32 or wide == 48)
    within = got[:, top:top + high, left:left + wide]
    assert (within > -0.1).all() and (got == -1).sum() == 3 * (32 * 48 - high * wide)
    assert within[:, :, 0].max() < 0.2 and within[:, :, -1].min() > 0.8            # both sides are there


def test_clip_fault_names_black_static_and_unlike_clips():
    image, g = torch.rand(3, 32, 48) - 0.5, torch.Generator().manual_seed(0)
    video = (image + 0.1 * torch.randn(9, 3, 32, 48, generator=g))[None].clamp(-1, 1)
    assert clip_fault(video, image) == ""
    assert clip_fault(video * 0 - 1, image) == "black"
    assert clip_fault(video[:, :1].expand(-1, 9, -1, -1, -1), image) == "static"
    assert clip_fault((video + 0.9).clamp(-1, 1), image) == "first frame unlike the image"


# ---------------------------------------------------------------------------------------------------- bad input

def fails(match, call):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_missing_or_cut_shard_is_named(copy):
    shard = copy / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    fails("00002-of-00002.safetensors: not a readable weight file", lambda: CogVideoX.from_pretrained(copy, "cpu"))
    shard.unlink()
    fails("00002-of-00002.safetensors: missing shard", lambda: CogVideoX.from_pretrained(copy, "cpu"))


def test_an_index_that_does_not_fit_its_shards_is_refused(copy):
    index = copy / "text_encoder" / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**where, "shared.weight": "model-00002-of-00002.safetensors"})
    fails("wrong index, it has shared.weight in model-00002", lambda: CogVideoX.from_pretrained(copy, "cpu"))
    edit_json(index, weight_map={k: v for k, v in where.items() if k != "shared.weight"})
    fails("wrong index, it has shared.weight in no shard", lambda: CogVideoX.from_pretrained(copy, "cpu"))
    index.write_text("{}")
    fails("wrong index, no weight_map", lambda: CogVideoX.from_pretrained(copy, "cpu"))
    index.unlink()
    fails("2 weight files and no index", lambda: CogVideoX.from_pretrained(copy, "cpu"))


@pytest.mark.parametrize("name, changes", [
    ("CogVideoX 1.5", dict(patch_size_t=2, ofs_embed_dim=512, use_learned_positional_embeddings=False)),
    ("CogVideoX-2B", dict(in_channels=16, use_rotary_positional_embeddings=False,
                          use_learned_positional_embeddings=False)),
    ("text-to-video", dict(in_channels=16, use_learned_positional_embeddings=False))])
def test_weights_of_a_sibling_are_named(copy, name, changes):
    edit_json(copy / "transformer" / "config.json", **changes)
    fails(name, lambda: CogVideoX.from_pretrained(copy, "cpu"))


def test_sibling_weights_under_our_config_are_named(copy):
    shard = copy / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    save_file({**tensors, "patch_embed.proj.weight": tensors["patch_embed.proj.weight"][:, :16].clone()}, shard)
    fails("2B or 5B", lambda: CogVideoX.from_pretrained(copy, "cpu"))
    save_file({**tensors, "patch_embed.proj.weight": tensors["patch_embed.proj.weight"].flatten(1)}, shard)
    fails("CogVideoX 1.5", lambda: CogVideoX.from_pretrained(copy, "cpu"))


def test_float16_t5_weights_are_upcast_and_said(copy, tmp_path, capsys):
    for shard in (copy / "text_encoder").glob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(shard).items()}, shard)
    half = CogVideoX.from_pretrained(copy, "cpu", cache=tmp_path / "text")
    assert "float16, in which T5 overflows; upcast to float32" in capsys.readouterr().err
    assert half.network("text_encoder").shared.weight.dtype == torch.float32
    fails("float16", lambda: CogVideoX.from_pretrained(MINI, "cpu", "float16"))


def test_a_damaged_tokenizer_is_named(copy):
    (copy / "tokenizer" / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1")
    fails("spiece.model: not a SentencePiece model", lambda: CogVideoX.from_pretrained(copy, "cpu"))


def test_a_long_caption_is_cut_with_a_warning(cog, capsys):
    ids = cog.tokenize(["snow " * 300])
    assert ids.shape == (1, 226) and ids[0, -1] == 1 and "cut to 226" in capsys.readouterr().err


@pytest.mark.parametrize("match, image, options", [
    ("image of 8x8 is too small", torch.zeros(3, 8, 8), {}),
    ("values from 0 to 255", torch.arange(256.).expand(3, 256, 256), {}),
    ("--frames 12: the clip would have 9", torch.zeros(3, 32, 48), dict(n_frames=12)),
    ("--frames 0", torch.zeros(3, 32, 48), dict(n_frames=0)),
    ("--steps 0", torch.zeros(3, 32, 48), dict(steps=0)),
    ("--sampler euler", torch.zeros(3, 32, 48), dict(sampler="euler"))])
def test_bad_arguments_are_named(cog, match, image, options):
    fails(match, lambda: cog.animate(image, "a fox", **options))


def test_weights_that_give_nan_stop_with_the_step(cog):
    z, ctx = torch.full((1, 3, 16, 4, 6), float("nan")), torch.zeros(2, 226, 32)
    fails("step 1 of 2", lambda: list(cog.denoise(z, torch.zeros_like(z), ctx, steps=2)))
