"""model.py against the reference libraries, and what must hold whatever the weights are.

Goldens: tiny random networks in the published formats with the outputs of diffusers 0.42.1 and transformers 5.23.0 on
CPU in float32 (`instruct-pix2pix`, the two motion adapters, AnimateDiff's .ckpt, `other-sizes`: another shape of every
network, v-prediction; `dpm-solver`: DPMSolverMultistepScheduler's trajectories); `<network>.json`: names and shapes of
the published files. Each tolerance is ten times the reference's own distance between float32 and float64.
"""
import errno
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import EPM, VAE, DDIM, TextEncoder, UNet, UserError, VideoEditor

GOLDENS = Path(__file__).parent / "goldens"
IP2P, OTHER = GOLDENS / "instruct-pix2pix", GOLDENS / "other-sizes"
ADAPTERS = [GOLDENS / f"animatediff-motion-adapter-{v}" for v in ("v1-5-2", "v1-5-3")]
CKPT = GOLDENS / "animatediff" / "mm_sd_v15_v2.ckpt"
pytestmark = pytest.mark.filterwarnings("error:::model$")       # ours, not what a library says of itself


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def golden(folder):
    """(expected tensors, absolute tolerances) of one golden folder."""
    return load_file(folder / "expected.safetensors"), {k: v["atol"] for k, v in read(folder / "tolerance.json").items()}


def apart(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def load(folder=IP2P, **kw):
    return VideoEditor.from_pretrained(folder, device="cpu", **kw)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)                                            # not the 0 of `inputs` and `clip`


@pytest.fixture(scope="module")
def image_editor():
    return load()


@pytest.fixture(scope="module")
def video_editor():
    torch.manual_seed(1)                                            # EPM's start; made before any test is seeded
    return load(motion=ADAPTERS[0], epm=True)


def inputs(batch=1, n_frames=4, size=(4, 6), seed=0, ctx=32):
    """z (B, F, 8, h, w), t (B,), ctx (B, 77, D), random."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, n_frames, 8, *size, generator=g), torch.randint(1000, (batch,), generator=g),
            torch.randn(batch, 77, ctx, generator=g))


def clip(n_frames=4, height=32, width=48, seed=0):
    return torch.rand(1, n_frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------

def test_token_ids_equal_openais_on_tricky_strings(image_editor):
    want, strings = golden(IP2P)[0]["tokens.openai"], read(IP2P / "cases.json")["token_strings"]
    for row, text in zip(want, strings):                            # OpenAI pads with 0, Stable Diffusion with the end
        length = int(row.nonzero().max()) + 1
        row = torch.cat([row[:length], row.new_full((77 - length,), image_editor.tokenizer.end)])
        assert torch.equal(image_editor.tokenize([text])[0], row), text


@pytest.mark.parametrize("text, clean", [
    ("â€œbrokenâ€\x9d cafÃ©", '"broken" café'), ("â\x80\x9cquoteâ\x80\x9d", '"quote"'),     # cp1252; latin-1
    ("FranÃƒÂ§ois", "françois"), ("Ð¼Ð¾Ñ€Ðµ ðŸ\x90±", "море 🐱"), ("Å\x93uvre", "œuvre"),  # twice; other scripts
    ("&lt;b&gt; &amp;amp; &EACUTE;t&eacute; &#39;x&#39;", "<b> & été 'x'"), ("ﬁne ŉ Ǆ", "fine 'n dž"),
    ("\x1b[31mred\x1b[0m\x07 sky\ufeff", "red sky"), ("Ｗｉｄｅ　ﾀ", "wide タ"), ("a\ud83d\udc31 \ud800", "a🐱 \ufffd"),
    ("\x93C1\x94 wait\x85", '"c1" wait…'), (" tab\t\n\u2003 wide ", "tab wide"), ("e\u0301", "é"), ("ʼs ‚low‛ „x‟", "'s 'low' \"x\""),
])
def test_text_is_cleaned_as_ftfy_does(text, clean):
    assert clean_text(text) == clean


@pytest.mark.parametrize("text", ["«\xa0café\xa0»", "voilà, ça — naïve…", "são paulo", "25°c ± 5", "größe “ß”", "l'œil", "привет",
                                  "日本語", "é²", "ñandú™", "½ ² ③", "x = <b>&nbsp</b>"])
def test_correct_text_is_left_alone(text):
    plain = text.replace("\xa0", " ").replace("“", '"').replace("”", '"').replace("&nbsp", " ")
    assert clean_text(text) == plain


def test_a_long_text_keeps_its_end_token(image_editor):
    ids = image_editor.tokenize(["a b c d e f g h " * 40])[0]
    assert ids[0] == image_editor.tokenizer.start and ids[-1] == image_editor.tokenizer.end
    assert (ids == image_editor.tokenizer.end).sum() == 1


def test_special_tokens_written_in_the_text_are_one_token(image_editor):
    tok = image_editor.tokenizer
    assert tok.encode("<|ENDOFTEXT|> <|startoftext|>") == [tok.end, tok.start]


def test_text_attention_is_causal(image_editor):
    ids = image_editor.tokenize(["make the sky purple"])
    other = ids.clone()
    other[0, 3:] = 7
    a, b = image_editor.text_encoder(ids), image_editor.text_encoder(other)
    assert apart(a[:, :3], b[:, :3]) < 1e-6 and apart(a[:, 3], b[:, 3]) > 1e-2


# ---------------------------------------------------------------------------------------------------------------
# Parity of the networks
# ---------------------------------------------------------------------------------------------------------------

def test_text_encoder_equals_transformers(image_editor):
    want, atol = golden(IP2P)
    got = image_editor.text_encoder(want["tokens.hf5"][[0, 1, 8, 15]])
    assert apart(got, want["text.last_hidden_state"]) <= atol["text.last_hidden_state"]


@pytest.mark.parametrize("case", ["unet", "unet_odd"])
def test_image_unet_equals_diffusers(image_editor, case):
    want, atol = golden(IP2P)
    got = image_editor.unet(want[case + ".sample"][:, None], want[case + ".timesteps"], want[case + ".text"])[:, 0]
    assert apart(got, want[case + ".eps"]) <= atol[case + ".eps"]


def test_vae_equals_diffusers(image_editor):
    want, atol = golden(IP2P)
    mean, logvar = image_editor.vae.encode(want["vae.image_u8"].permute(2, 0, 1)[None] / 127.5 - 1)
    assert apart(mean, want["vae.mean"]) <= atol["vae.mean"]
    assert apart(logvar, want["vae.logvar"]) <= atol["vae.logvar"]
    assert apart(image_editor.vae.decode(want["vae.latent"]), want["vae.decoded"]) <= atol["vae.decoded"]


@pytest.mark.parametrize("norm", ["per_frame", "over_frames"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=["v1-5-2", "v1-5-3"])
def test_motion_unet_equals_diffusers_with_either_norm(adapter, norm):
    want, atol = golden(adapter)
    ed = load(motion=adapter, norm_over_frames=norm == "over_frames")
    for n in (8, 16):
        z = want["sample16"].transpose(1, 2)[:, :n]
        got = ed.unet(z, want["timestep"], want["text"]).transpose(1, 2)
        assert apart(got, want[f"eps{n}.{norm}"]) <= atol[f"eps{n}.{norm}"]


@pytest.mark.parametrize("norm", ["per_frame", "over_frames"])
def test_original_ckpt_equals_animatediffs_module(norm):
    want, atol = golden(CKPT.parent)
    x = want["module.input"]                                        # (B, C, F, h, w)
    net = load(motion=CKPT, norm_over_frames=norm == "over_frames").unet.down_blocks[1].motion_modules[0]
    got = net(x.transpose(1, 2).flatten(0, 1), x.shape[2]).unflatten(0, (len(x), -1)).transpose(1, 2)
    assert apart(got, want["module." + norm]) <= atol["module." + norm]


def test_every_way_of_writing_the_ckpt_loads_the_same(tmp_path):
    z, t, ctx = inputs(n_frames=3)
    want = load(motion=ADAPTERS[0]).unet(z, t, ctx)
    state = torch.load(CKPT, weights_only=True)["state_dict"]
    for i, file in enumerate([state, {"module." + k: v for k, v in state.items()},
                              {"state_dict": state, "animatediff_config": {"motion_module_type": "Vanilla"}}]):
        torch.save(file, tmp_path / f"{i}.ckpt")
        assert apart(load(motion=tmp_path / f"{i}.ckpt").unet(z, t, ctx), want) < 2e-5


def test_a_whole_edit_equals_diffusers_pipeline(image_editor):
    want, atol = golden(IP2P)
    video, case, path = want["e2e.image_u8"].permute(2, 0, 1)[None, None] / 127.5 - 1, read(IP2P / "cases.json")["e2e"], []
    args = (case["prompt"], want["e2e.latents"][None], case["steps"], case["guidance_scale"], case["image_guidance_scale"])
    z = image_editor.sample(image_editor.encode(video), *args, mode="image", keep=path)
    assert apart(torch.cat(path[1:])[:, 0], want["e2e.trajectory"]) <= atol["e2e.trajectory"]
    assert apart((image_editor.decode(z)[0] + 1) / 2, want["e2e.image"]) <= atol["e2e.image"]


def test_other_sizes_heads_and_schedule_equal_diffusers():
    want, atol = golden(OTHER)
    ed = load(OTHER, motion=OTHER / "motion")
    args = want["sample"], want["timesteps"], want["text"]
    x = want["image_u8"].permute(2, 0, 1)[None] / 127.5 - 1
    image = ed.edit(x[None], "make it snow", steps=4, s_txt=7.5, s_src=1.5, z_T=want["latents"][None], mode="image")[0]
    assert torch.equal(ed.tokenize(["make it snow", ""]), want["ids"])
    for name, got in dict(text_states=ed.text_encoder(want["ids"]), image_prediction=ed.unet(*args, mode="image"),
                          video_prediction=ed.unet(*args), mean=ed.vae.encode(x)[0], decoded=ed.vae.decode(want["latents"]),
                          **{"e2e.image": (image + 1) / 2}).items():
        assert apart(got, want[name]) <= atol[name], name


# ---------------------------------------------------------------------------------------------------------------
# Names and shapes of the published files
# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, build", [("ip2p_unet", UNet), ("ip2p_vae", VAE), ("clip_text_l", TextEncoder)])
def test_full_size_names_and_shapes_equal_the_published_file(name, build):
    file = read(GOLDENS / f"{name}.json")
    with torch.device("meta"):
        ours = {k: list(v.shape) for k, v in build(file["config"]).state_dict().items()}
    theirs = {}
    for k, shape in file["tensors"].items():
        for old, new in VAE.LEGACY if name == "ip2p_vae" else ():
            k = k.replace(old, new)
        theirs[k] = shape
    theirs.pop("text_model.embeddings.position_ids", None)          # a stray buffer of the published file
    assert ours == theirs


@pytest.mark.parametrize("version", ["v1-5-2", "v1-5-3"])
def test_full_size_motion_names_and_shapes_equal_the_published_file(version):
    file = read(GOLDENS / f"motion_adapter_{version}.json")
    with torch.device("meta"):
        net = UNet(read(GOLDENS / "ip2p_unet.json")["config"])
        net.add_motion(file["config"])
    ours = {k: list(v.shape) for k, v in net.state_dict().items() if "motion_modules" in k and not k.endswith("gamma")}
    assert ours == {k: v for k, v in file["tensors"].items() if not k.endswith(".pe")}
    assert sum(k.endswith("gamma") for k in net.state_dict()) == (21 if version == "v1-5-2" else 20)


def test_shards_and_pickles_load_like_one_safetensors_file(image_editor, tmp_path):
    z, t, ctx = inputs(n_frames=1)
    want = image_editor.unet(z, t, ctx)
    for kind in ("shards", "bin"):
        shutil.copytree(IP2P, tmp_path / kind)
        file = tmp_path / kind / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        file.unlink()
        if kind == "bin":
            torch.save(tensors, file.with_suffix(".bin"))
        else:
            parts = {f"part-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
            for part, some in parts.items():
                save_file(some, file.parent / part)
            index = {"weight_map": {k: part for part, some in parts.items() for k in some}}
            file.with_name(file.name + ".index.json").write_text(json.dumps(index))
        assert apart(load(tmp_path / kind).unet(z, t, ctx), want) < 2e-5


def test_the_files_that_are_fetched_from_the_hub_are_all_that_is_read(image_editor, tmp_path):
    whole, fetched = tmp_path / "whole", tmp_path / "fetched"
    shutil.copytree(IP2P, whole)
    (whole / "model_index.json").write_text('{"instructvedit": {"steps": 3}}')
    (whole / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    for file in {file for pattern in VideoEditor.FILES for file in whole.glob(pattern)}:
        (fetched / file.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, fetched / file.relative_to(whole))
    ed = load(fetched)
    assert ed.steps == 3 and ed.tokenizer.pad == ed.tokenizer.vocab["!"] and ed.scheduler == image_editor.scheduler
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(x, name).state_dict() for x in (ed, image_editor))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not list(fetched.rglob("expected*"))


def test_an_index_that_names_no_files_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: has no weight_map"):
        model.find_tensors(tmp_path)


def test_a_trained_run_brings_its_own_motion_gamma_and_epm_and_its_base_the_rest(video_editor, tmp_path):
    state = {k: v + 0.1 if "gamma" in k or "epm" in k else v for k, v in video_editor.unet.state_dict().items()}
    unet, run = video_editor.unet, tmp_path / "round0"
    model.save_tensors(run / "unet" / "diffusion_pytorch_model.safetensors", state)
    model.write_json(run / "unet" / "config.json", unet.config | dict(motion=unet.motion_config, epm=unet.epm_config))
    assert not model.finished(run)
    model.write_json(run / "model_index.json", {"instructvedit": {"base": str(IP2P), "steps": 3}})
    ed = load(run)
    assert model.finished(run) and ed.folders == model.repository(run) == [run, IP2P] and ed.base == video_editor.base
    assert ed.default_mode == "video" and ed.steps == 3 and ed.fingerprint != video_editor.fingerprint
    assert all(torch.equal(v, state[k]) for k, v in ed.unet.state_dict().items())
    model.write_json(run / "model_index.json", {"instructvedit": {"base": str(run)}})
    with pytest.raises(UserError, match="model_index.json: names .* as its base, whose base it is itself"):
        load(run)


# ---------------------------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_ddim_equals_diffusers(spacing, steps):
    want, atol = golden(IP2P)
    ddim = DDIM(steps, spacing)
    assert torch.equal(ddim.timesteps, want[f"ddim.{spacing}.{steps}.timesteps"])
    torch.testing.assert_close(ddim.abar, want["ddim.alphas_cumprod"], rtol=1e-6, atol=0)     # rounded as the CPU does
    for eta in (0, 1):
        z, path, name = want["ddim.start"], [], f"ddim.{spacing}.{steps}.eta{eta}"
        for i in range(steps):
            z = ddim.step(want["ddim.eps"][i], i, z, eta=float(eta), noise=want["ddim.noise"][i])
            path.append(z)
        assert apart(torch.stack(path), want[name]) <= atol[name]


@pytest.mark.parametrize("sampler", [DDIM(7, set_alpha_to_one=True), DDIM(20, "trailing", set_alpha_to_one=True),
                                     DDIM(9, "linspace", set_alpha_to_one=True), DPMSolver(10)],
                         ids=["leading", "trailing", "linspace", "dpm"])
def test_sampling_with_the_true_noise_returns_the_clean_latent(sampler):
    z0, eps = torch.randn(2, 1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    a = sampler.abar[int(sampler.timesteps[0])]
    z = a.sqrt() * z0 + (1 - a).sqrt() * eps
    for i, t in enumerate(sampler.timesteps):
        a = sampler.abar[int(t)]
        z = sampler.step((z - a.sqrt() * z0) / (1 - a).sqrt(), i, z)
    assert apart(z, z0) < 1e-4


def test_v_prediction_gives_the_true_noise():
    z0, eps = torch.randn(2, 1, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    ddim = DDIM(10, cfg={"prediction_type": "v_prediction"})
    for i, t in enumerate(ddim.timesteps):
        a = ddim.abar[int(t)]
        z, v = a.sqrt() * z0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z0
        assert apart(ddim.to_eps(v, i, z), eps) < 1e-5


# ---------------------------------------------------------------------------------------------------------------
# SMA and EPM
# ---------------------------------------------------------------------------------------------------------------

def test_untrained_sma_is_the_image_editor_exactly(image_editor):
    z, t, ctx = inputs(batch=2)
    untrained = load(motion=ADAPTERS[0], gamma=0.0).unet
    assert torch.equal(untrained(z, t, ctx), image_editor.unet(z, t, ctx))
    untrained.set_gamma(0.5)                                        # and the motion modules do matter
    assert apart(untrained(z, t, ctx), image_editor.unet(z, t, ctx)) > 0.05


def test_frame_by_frame_modes_agree(image_editor, video_editor):
    z, t, ctx = inputs(batch=2)
    one_by_one = torch.stack([image_editor.unet(z[:, i:i + 1], t, ctx)[:, 0] for i in range(4)], dim=1)
    assert apart(image_editor.unet(z, t, ctx), one_by_one) < 2e-5
    assert apart(video_editor.unet(z, t, ctx, "image"), one_by_one) < 2e-5


def test_untrained_epm_keeps_999_permille_of_the_attention_in_the_own_frame():
    n, length = 16, 6
    bias = EPM(8)(torch.randn(n, 8, 2, 3), n).detach()
    assert torch.equal(bias[0], -10 * (1 - torch.eye(n)))
    frame = torch.eye(n).repeat_interleave(length, 0)[None]         # values that tell which frame they came from
    got = model.epm_attention(torch.zeros_like(frame), torch.zeros_like(frame), frame, 1, bias)
    assert (got * frame).sum(-1).min() > 0.999


def test_untrained_epm_leaves_the_unet_almost_unchanged():
    z, t, ctx = inputs(n_frames=16)
    with_epm, without = load(epm=True).unet(z, t, ctx), load().unet(z, t, ctx)
    assert 0 < (with_epm - without).norm() / without.norm() < 0.005


@pytest.mark.parametrize("heads", [1, 3])
def test_epm_attention_equals_explicit_bias_in_values_and_gradients(heads):
    b, n, length, width = 2, 5, 6, 12
    g = torch.Generator().manual_seed(0)
    def ours(q, k, v, bias):
        return model.epm_attention(q, k, v, heads, bias)
    def explicit(q, k, v, bias):
        mask = bias.repeat_interleave(length, 1).repeat_interleave(length, 2)[:, None]     # (B, 1, F*L, F*L)
        return model.attention(q, k, v, heads, mask=mask)
    leaves = [torch.randn(b, n * length, width, generator=g) for _ in range(3)] + [3 * torch.randn(b, n, n, generator=g)]
    weight, results = torch.randn(b, n * length, width, generator=g), []
    for f in (ours, explicit):
        args = [x.clone().requires_grad_() for x in leaves]
        y = f(*args)
        results.append([y.detach(), *torch.autograd.grad((y * weight).sum(), args)])
    for name, a, e in zip(("output", "dq", "dk", "dv", "dbias"), *results):
        assert apart(a, e) < 2e-5, name
    with torch.no_grad():                                          # inference on a CPU goes another way
        assert apart(ours(*leaves), explicit(*leaves)) < 2e-5


def test_epm_of_a_short_clip_reads_the_corner_of_the_matrix():
    net, x = EPM(8, frames=6), torch.randn(4, 8, 3, 3)
    torch.nn.init.normal_(net.fc2.weight)
    padded = torch.cat([x, x[-1:].expand(2, -1, -1, -1)])
    assert apart(net(x, 4), net(padded, 6)[:, :4, :4]) < 1e-5


def test_epm_memory_grows_with_frames_not_with_their_square():
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if torch.is_tensor(x):
                    largest[-1] = max(largest[-1], x.numel())
            return out

    net, size = model.Attention(16, 2), (8, 8)
    net.epm = EPM(16)
    for n in (4, 8, 16):
        x = torch.randn(n, 64, 16, requires_grad=True)
        largest.append(0)
        with Sizes():
            net.across_frames(x, n, "video", "beside", size).sum().backward()
    tokens = 16 * 64
    assert largest[2] < tokens ** 2 / 8 and largest[2] <= 2.2 * largest[1] <= 2.2 ** 2 * largest[0]


# ---------------------------------------------------------------------------------------------------------------
# The editor
# ---------------------------------------------------------------------------------------------------------------

def test_guidance_is_the_three_branch_formula(image_editor):
    (z, _, _), src = inputs(n_frames=2), torch.randn(1, 2, 4, 4, 6)
    z, ctx, t = z[:, :, :4], image_editor.encode_text(["make it snow", ""]), torch.tensor([500])

    def branch(source, k):
        return image_editor.unet(torch.cat([z, source], dim=2), t, ctx[k:k + 1], "image")
    none, image, both = branch(torch.zeros_like(src), 1), branch(src, 1), branch(src, 0)
    for s_txt, s_src in ((7.5, 1.5), (7.5, 1.0), (1.0, 1.0), (3.0, 3.0)):
        want = none + s_src * (image - none) + s_txt * (both - image)
        assert apart(image_editor.guided(z, src, 500, ctx, s_txt, s_src, "image"), want) < 1e-4


def test_source_guidance_one_runs_two_branches(image_editor):
    z, ctx, rows = torch.randn(1, 2, 4, 4, 6), image_editor.encode_text(["make it snow", ""]), []
    hook = image_editor.unet.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    for s_src in (1.5, 1.0):
        image_editor.guided(z, z, 500, ctx, 7.5, s_src, "image")
    hook.remove()
    assert rows == [3, 2]


@pytest.mark.parametrize("keys", ["beside", "instead"])
def test_ffg_of_equal_frames_gives_equal_frames(keys):
    ed = load()                                                     # no motion: its positions tell equal frames apart
    ed.unet.ffg_keys = keys
    z_src, z_T = ed.encode(clip(1)), torch.randn(1, 1, 4, 4, 6)
    z = ed.sample(z_src.expand(-1, 4, -1, -1, -1), "make it snow", z_T.expand(-1, 4, -1, -1, -1), steps=3, mode="ffg")
    assert apart(z, z[:, :1].expand_as(z)) < 1e-4
    if keys == "instead":                                           # every frame then is the anchor's own edit
        assert apart(z[:, :1], ed.sample(z_src, "make it snow", z_T, steps=3, mode="image")) < 1e-3


def test_the_ffg_anchor_follows_the_image_editor(image_editor, video_editor):
    z, t, ctx = inputs(n_frames=5)
    anchor = video_editor.unet(z, t, ctx, "ffg")[:, :1]
    assert apart(anchor, image_editor.unet(z[:, :1], t, ctx)) < 2e-5


def test_ffg_frames_depend_on_the_anchor(image_editor):
    z, t, ctx = inputs(n_frames=3)
    other = z.clone()
    other[:, 0] += 1
    a, b = image_editor.unet(z, t, ctx, "ffg"), image_editor.unet(other, t, ctx, "ffg")
    assert apart(a[:, 1:], b[:, 1:]) > 1e-3


@pytest.mark.parametrize("steps, corrected", [(1, 1), (3, 2), (4, 2)])
def test_noise_correction_leads_references_to_known_latents_and_moves_the_others_by_its_mean(image_editor, steps, corrected):
    z_src, z_T, z0 = torch.randn(3, 1, 4, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    path, ddim, ctx = [], image_editor.scheduler_for(steps), image_editor.encode_text(["make it snow", ""])
    image_editor.sample(z_src, "make it snow", z_T, steps, mode="image", z0_ref=z0[:, :2], keep=path)
    for i, t in enumerate(ddim.timesteps):
        eps, a = image_editor.guided(path[i], z_src, t, ctx, 7.5, 1.5, "image"), ddim.abar[t]
        if i < corrected:                                           # the first half of the steps
            true = (path[i][:, :2] - a.sqrt() * z0[:, :2]) / (1 - a).sqrt()
            others = eps[:, 2:] + (true - eps[:, :2]).mean(dim=1, keepdim=True)
            eps = torch.cat([true, others], dim=1)
        assert apart(path[i + 1], ddim.step(eps, i, path[i])) < 1e-4, i


def test_cells_that_an_edit_hardly_changed_become_the_sources(image_editor, monkeypatch):
    z_src = torch.randn(1, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    source, change = z_src * image_editor.vae.scaling_factor, torch.zeros(1, 2, 4, 3, 3)
    for cell, size in enumerate((0.05, 0.1, 0.15, 0.2, 0.3)):
        change[0, :, :, cell // 3, cell % 3] = size * torch.tensor([1, -1, 1, -1.])        # of the mean over channels
    assert image_editor.deadband == 0 and torch.equal(image_editor.settle(source + change, z_src), source + change)
    monkeypatch.setattr(image_editor, "deadband", 0.1)
    left = (image_editor.settle(source + change, z_src) - source).abs().mean(dim=2)[0, 0].flatten()
    torch.testing.assert_close(left[:5], torch.tensor([0, 0, 0.15 / 2, 0.2, 0.3]), atol=1e-6, rtol=0)


def test_what_an_edit_leaves_alone_comes_back_as_the_autoencoder_gives_it(image_editor, monkeypatch):
    video = torch.rand(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    coded = image_editor.decode(image_editor.encode(video) * image_editor.vae.scaling_factor)
    assert apart(image_editor.edit(video, "make it snow", steps=2, mode="image"), coded) > 1e-3
    monkeypatch.setattr(image_editor, "deadband", 1e3)
    assert torch.equal(image_editor.edit(video, "make it snow", steps=2, mode="image"), coded)


def test_a_frames_noise_does_not_depend_on_its_window(image_editor):
    whole, window = image_editor.noise(6, 4, 6, seed=3, mode="video"), image_editor.noise(3, 4, 6, seed=3, first=2, mode="video")
    assert torch.equal(whole[:, 2:5], window)
    still = image_editor.noise(3, 4, 6, seed=3, mode="image")
    assert torch.equal(still, still[:, :1].expand_as(still)) and not torch.equal(whole[:, :1], whole[:, 1:2])


def test_a_checkpoints_own_steps_guidance_and_size_are_the_defaults(image_editor, tmp_path):
    assert (image_editor.steps, image_editor.guidance, image_editor.size) == (20, (7.5, 1.5), 512)
    shutil.copytree(IP2P, tmp_path / "hub")
    (tmp_path / "hub" / "model_index.json").write_text('{"instructvedit": {"steps": 3, "guidance": [4, 1.2], "size": 32}}')
    ed, path, (z, z_T) = VideoEditor.from_pretrained(tmp_path / "hub", device="cpu"), [], torch.randn(2, 1, 1, 4, 4, 4)
    z0 = ed.sample(z, "make it snow", z_T, mode="image", keep=path)
    assert len(path) == 4 and torch.equal(z0, image_editor.sample(z, "make it snow", z_T, 3, 4, 1.2, "image"))


def test_the_source_latent_is_the_unscaled_posterior_mode(image_editor):
    video = clip(5)
    assert apart(image_editor.encode(video)[0], image_editor.vae.encode(video[0])[0]) < 4e-5
    z = torch.randn(1, 2, 4, 4, 6)
    assert apart(image_editor.decode(z)[0], image_editor.vae.decode(z[0] / 0.18215).clamp(-1, 1)) < 4e-5


@pytest.mark.parametrize("mode", ["image", "ffg", "video"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_an_edit_has_the_clips_shape_and_its_seed(video_editor, mode, sampler):
    video = clip(3)
    a, b, c = (video_editor.edit(video, "make it snow", steps=2, seed=s, mode=mode, sampler=sampler) for s in (0, 0, 1))
    assert a.shape == video.shape and a.abs().max() <= 1 and torch.equal(a, b) and not torch.equal(a, c)


def test_an_edit_in_bfloat16_is_near_that_in_float32(video_editor):
    low, video = load(motion=ADAPTERS[0], epm=True, dtype="bfloat16"), clip(3, 16, 24)
    assert {p.dtype for net in (low.unet, low.vae, low.text_encoder) for p in net.parameters()} == {torch.bfloat16}
    for mode in ("image", "ffg", "video"):
        a, b, other = (ed.edit(video, "make it snow", 2, 2, 1.5, seed, mode=mode)
                       for ed, seed in ((video_editor, 0), (low, 0), (video_editor, 1)))
        assert b.dtype == torch.float32 and (a - b).norm() < 0.2 * a.norm() < 0.4 * (a - other).norm(), mode


def test_float16_leaves_the_vae_in_float32(image_editor):
    ed, video = load(dtype="float16"), clip(1)
    assert {p.dtype for p in ed.vae.parameters()} == {torch.float32}
    assert {p.dtype for net in (ed.unet, ed.text_encoder) for p in net.parameters()} == {torch.float16}
    assert apart(ed.encode(video), image_editor.encode(video)) < 4e-5


# ---------------------------------------------------------------------------------------------------------------
# What a user can get wrong
# ---------------------------------------------------------------------------------------------------------------

def changed_copy(tmp_path, change):
    """The golden InstructPix2Pix folder with the U-Net's tensors passed through `change`."""
    shutil.copytree(IP2P, tmp_path / "copy")
    file = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    file.unlink()                                                   # not in place: other editors have it mapped
    save_file(change(tensors), file)
    return tmp_path / "copy"


def test_a_missing_directory_is_named():
    with pytest.raises(UserError, match="/no/such/place: no such directory"):
        load("/no/such/place")


def test_a_folder_without_its_config_is_named(tmp_path):
    with pytest.raises(UserError, match="has no unet/, and names no base that has"):
        load(tmp_path)


def test_a_partial_unet_file_is_refused(tmp_path):
    folder = changed_copy(tmp_path, lambda state: {k: v for k, v in state.items() if not k.startswith("mid_block")})
    with pytest.raises(UserError, match="unet from .*safetensors: lacks 46 of 686 tensors, first mid_block"):
        load(folder)


def test_a_cut_file_is_refused(tmp_path):
    shutil.copytree(IP2P, tmp_path / "copy")
    file = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a readable weight file"):
        load(tmp_path / "copy")


def test_a_foreign_file_is_refused(tmp_path):
    folder = changed_copy(tmp_path, lambda state: state | {"conv_elsewhere.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="has unknown 1 of 686 tensors, first conv_elsewhere.weight"):
        load(folder)


def test_another_models_sizes_are_refused(tmp_path):
    shutil.copytree(OTHER, tmp_path / "copy")
    cfg = read(tmp_path / "copy" / "unet" / "config.json")
    (tmp_path / "copy" / "unet" / "config.json").write_text(json.dumps(cfg | {"cross_attention_dim": 16}))
    with pytest.raises(UserError, match=r"has wrong shapes for .*attn2.to_k.weight \(8, 12\) instead of \(8, 16\)"):
        load(tmp_path / "copy")


def test_motion_of_another_unet_or_of_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="motion from"):
        load(motion=OTHER / "motion")
    with pytest.raises(UserError, match="holds no motion modules"):
        load(motion=IP2P / "vae")


class Nasty:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"state_dict": Nasty()}, tmp_path / "bad.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Nasty()))
    for file in ("bad.ckpt", "plain.ckpt"):
        with pytest.raises(UserError, match=f"{file}: (refused|not a readable)"):
            load(motion=tmp_path / file)
    assert "this ran" not in capsys.readouterr().out


def test_an_unknown_prediction_type_is_refused(tmp_path):
    shutil.copytree(OTHER, tmp_path / "copy")
    (tmp_path / "copy" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "sample"}')
    with pytest.raises(UserError, match="prediction_type sample; known are epsilon and v_prediction"):
        load(tmp_path / "copy")


def test_what_is_no_editor_is_refused_when_it_is_loaded(tmp_path):
    def changed(name, **more):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(OTHER, tmp_path / "copy")
        path = tmp_path / "copy" / name
        path.write_text(json.dumps(read(path) | more))
    changed("scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2")
    with pytest.raises(UserError, match="beta_schedule squaredcos_cap_v2; known are scaled_linear and linear"):
        load(tmp_path / "copy")
    changed("scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="rescale_betas_zero_snr True"):
        load(tmp_path / "copy")
    changed("scheduler/scheduler_config.json")
    (tmp_path / "copy" / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError, match="merges.txt: missing"):
        load(tmp_path / "copy")
    changed("unet/config.json")
    config = read(tmp_path / "copy" / "unet" / "config.json")
    c = config["out_channels"]
    changed("unet/config.json", in_channels=c)                      # Stable Diffusion itself
    tensors = load_file(tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :c].contiguous()},
              tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=f"takes {c} channels and gives {c}; .* is it InstructPix2Pix's kind"):
        load(tmp_path / "copy")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 300, 1000])
def test_a_true_noise_prediction_leads_to_the_picture_whatever_the_steps(spacing, steps):
    ddim, z0 = DDIM(steps, spacing), torch.zeros(1000)
    eps = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    z = (1 - ddim.abar[ddim.timesteps[0]]).sqrt() * eps
    for i in range(steps):
        z = ddim.step(eps, i, z)
    assert len(set(ddim.timesteps.tolist())) >= steps - 1 and (z - z0).std() < 0.045      # abar[0] leaves 0.029 of the noise


@pytest.mark.parametrize("file, key, value, message", [
    ("scheduler/scheduler_config.json", "thresholding", True, "thresholding True; known"),
    ("scheduler/scheduler_config.json", "trained_betas", [0.1], "trained_betas"),
    ("unet/config.json", "flip_sin_to_cos", False, "unet/config.json: flip_sin_to_cos False; known is True"),
    ("unet/config.json", "act_fn", "gelu", "act_fn gelu; known is silu"), ("vae/config.json", "shift_factor", 0.1, "shift_factor 0.1"),
    ("unet/config.json", "norm_num_groups", None, "unet/config.json: lacks a setting"),
    ("vae/config.json", "block_out_channels", 5, "vae/config.json: lacks a setting or has an unusable one"),
    ("text_encoder/config.json", "hidden_act", "gelu_new", "text_encoder/config.json: .*gelu_new"),
    ("text_encoder/config.json", None, [], "text_encoder/config.json: holds list"),
    ("tokenizer/special_tokens_map.json", "pad_token", "<pad>", "hold no token '<pad>'"),
    ("tokenizer/vocab.json", "<|endoftext|>", 5000000, "the tokenizer has tokens up to 5000000")])
def test_a_setting_that_would_change_results_or_cannot_be_built_is_named(tmp_path, file, key, value, message):
    shutil.copytree(IP2P, tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps((read(path) if path.is_file() else {}) | {key: value} if key else value))
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_the_padding_token_is_the_repositorys(tmp_path, image_editor):
    shutil.copytree(IP2P, tmp_path / "copy")
    plain = image_editor.tokenize(["snow"])
    for pad in ("!", {"content": "!", "lstrip": False}):
        (tmp_path / "copy" / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
        ids = load(tmp_path / "copy").tokenize(["snow"])
        end = int((plain == image_editor.tokenizer.end).int().argmax())
        assert torch.equal(ids[:, :end + 1], plain[:, :end + 1]) and (ids[:, end + 1:] == image_editor.tokenizer.vocab["!"]).all()


@pytest.mark.parametrize("damage, message", [
    (lambda text: b"", "0 merges make fewer than"), (lambda text: text[:len(text) // 2], "is one cut short"),
    (lambda text: b"<html>\n" + text, "no vocabulary and merges of CLIP's kind"), (lambda text: text + b"\xff\xfe q\n", "no vocabulary")])
def test_damaged_merges_are_refused(tmp_path, damage, message):
    shutil.copytree(IP2P / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "merges.txt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        model.Tokenizer(tmp_path / "tokenizer" / "vocab.json", file)


def test_pickles_of_the_old_format_load_and_odd_ones_are_one_line(tmp_path):
    torch.save({"a": torch.ones(2), 0: torch.ones(1)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert model.read_tensors(tmp_path / "old.ckpt").keys() == {"a"}
    for name, data in (("empty", b""), ("page", b"<html>not found</html>"), ("half", (tmp_path / "old.ckpt").read_bytes()[:90])):
        (tmp_path / f"{name}.ckpt").write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.ckpt: (not a readable|refused)") as error:
            model.read_tensors(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(error.value)
    net = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="has whole numbers in 1 of 2 tensors, first weight torch.int8"):
        model.load_weights(net, {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)}, "x")


def test_clips_and_noise_of_another_shape_and_anchors_of_other_steps_are_refused(image_editor):
    video, text = torch.zeros(1, 2, 3, 32, 32), "make it snow"
    for odd in (video.expand(2, -1, -1, -1, -1), video[0], video[:, :0], video.byte(), video[:, :, :1]):
        with pytest.raises(UserError, match=r"video \(.* needs \(1, F, 3, H, W\)"):
            image_editor.edit(odd, text, steps=1)
    with pytest.raises(UserError, match="z_T .* as the clip's latents"):
        image_editor.edit(video, text, steps=1, z_T=torch.zeros(2, 2, 4, 4, 4))
    z = image_editor.encode(video)
    anchor = image_editor.anchor(z[:, :1], text, z[:, :1], steps=2)
    with pytest.raises(UserError, match="anchor of 2 steps: needs 3"):
        image_editor.sample(z, text, z, steps=3, mode="ffg", anchor=anchor)


@pytest.mark.parametrize("kw, message", [
    (dict(steps=0), "--steps 0: needs 1 to 1000"), (dict(steps=1001), "--steps 1001"), (dict(mode="both"), "mode both: needs"),
    (dict(sampler="dpm", steps=1000), "--steps 1000"), (dict(sampler="euler"), "--sampler euler: needs ddim or dpm"),
])
def test_a_setting_out_of_range_is_named(image_editor, kw, message):
    with pytest.raises(UserError, match=message):
        image_editor.edit(clip(1, 16, 16), "make it snow", **({"mode": "image"} | kw))


def test_frames_of_the_wrong_size_are_refused(image_editor):
    with pytest.raises(UserError, match="frames of 44x32: width and height must be multiples of 8"):
        image_editor.edit(clip(1, 32, 44), "make it snow")


def test_too_many_frames_for_motion_or_epm_are_refused(video_editor):
    z, t, ctx = inputs(n_frames=33, size=(2, 2))
    with pytest.raises(UserError, match="the motion modules know 32 positions"):
        load(motion=ADAPTERS[1]).unet(z, t, ctx)
    with pytest.raises(UserError, match="EPM knows 16 frames, got 17"):
        video_editor.unet(z[:, :17], t, ctx)


def test_nan_in_sampling_names_the_step():
    ed, calls = load(), []

    def spoil(net, args, out):
        calls.append(1)
        return out * float("nan") if len(calls) == 2 else out
    ed.unet.register_forward_hook(spoil)
    with pytest.raises(UserError, match="sampling step 2 of 4 gave NaN or Inf"):
        ed.edit(clip(1, 16, 16), "make it snow", steps=4, mode="image")


def test_a_scripts_user_error_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("--frames 40: too many")
    with pytest.raises(SystemExit) as stop:
        model.run(main)
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.err == "error: --frames 40: too many\n" and out.out == ""


def test_a_full_disk_is_one_line_and_status_2_and_other_faults_keep_their_traceback(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "out/log.jsonl")
    with pytest.raises(SystemExit) as stop:
        model.run(full)
    assert stop.value.code == 2 and capsys.readouterr().err == (
        "error: out/log.jsonl cannot be written: the disk is full; make room and run the same again\n")

    def broken():
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        model.run(broken)


def test_a_file_written_aside_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    for text in ("[1]", "[2]"):
        with pytest.raises(ZeroDivisionError), model.aside(file) as part:
            part.write_text("[")
            1 / 0
        with model.aside(file) as part:
            part.write_text(text)
        assert file.read_text() == text and list(tmp_path.iterdir()) == [file]
    assert model.read_json(file, list) == [2]
    with pytest.raises(UserError, match="a.json: holds list, where a JSON object is needed"):
        model.read_json(file)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_group_norm_in_bfloat16_are_those_of_float32_rounded(causal):
    q, k, v = torch.randn(3, 2, 20, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = model.attention(q, k, v, 4, causal=causal)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, model.attention(q.float(), k.float(), v.float(), 4, causal=causal).bfloat16())
    norm = model.GroupNorm(4, 20).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        exact = torch.nn.functional.group_norm(q.float(), 4, norm.weight.float(), norm.bias.float())
        assert torch.equal(norm(q), exact.bfloat16())
