"""model.py against the reference libraries, and what must hold whatever the weights are.

Goldens: tiny random networks in the published formats with the outputs of diffusers 0.42.1 and transformers 5.23.0 on
CPU in float32 (`instruct-pix2pix`, the two motion adapters, AnimateDiff's .ckpt, `other-sizes`: another shape of every
network and v-prediction; its linear projections, which diffusers ran, are stored as the 1x1 convolutions that they
are); `<network>.json`: names and shapes of the published files. Each tolerance is ten times the reference's own
distance between float32 and float64.
"""
import errno
import functools
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import DDIM, EPM, VAE, TextEncoder, Tokenizer, UNet, UserError, VideoEditor

GOLDENS = Path(__file__).parent / "goldens"
IP2P, OTHER = GOLDENS / "instruct-pix2pix", GOLDENS / "other-sizes"
ADAPTERS = [GOLDENS / f"animatediff-motion-adapter-{v}" for v in ("v1-5-2", "v1-5-3")]
CKPT = GOLDENS / "animatediff" / "mm_sd_v15_v2.ckpt"
WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.filterwarnings("error:::model$")           # ours, not what a library says of itself


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@functools.cache
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


@pytest.fixture
def copy(tmp_path):
    """copy(file, **more): a fresh copy of the miniature OTHER, with settings of one of its JSON files changed."""
    def make(file=None, **more):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(OTHER, folder, ignore=shutil.ignore_patterns("expected*", "motion"))
        if file:
            path = folder / file
            path.write_text(json.dumps((read(path) if path.is_file() else {}) | more))
        return folder
    return make


def inputs(batch=1, n_frames=4, size=(4, 6), seed=0, ctx=32):
    """z (B, F, 8, h, w), t (B,), ctx (B, 77, D), random."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, n_frames, 8, *size, generator=g), torch.randint(1000, (batch,), generator=g),
            torch.randn(batch, 77, ctx, generator=g))


def clip(n_frames=3, height=16, width=24, seed=0):
    return torch.rand(1, n_frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- text

def test_token_ids_equal_transformers_on_tricky_strings(image_editor):
    strings = read(IP2P / "cases.json")["token_strings"]
    assert torch.equal(image_editor.tokenize(strings), golden(IP2P)[0]["tokens.hf5"])


def test_a_long_text_keeps_its_end_token_marks_are_one_token_and_odd_bytes_do_no_harm(image_editor):
    tok = image_editor.tokenizer
    ids = tok(["a b c d e f g h " * 40])[0]
    assert ids[0] == tok.start and ids[-1] == tok.end and (ids == tok.end).sum() == 1
    assert tok.encode("<|endoftext|> <|startoftext|>") == [tok.end, tok.start]
    assert len(tok.encode("a b c d e f g h " * 40)) == 320 and tok(["snow \udc80"], 9).shape == (1, 9)


def test_the_padding_token_is_the_repositorys(copy, image_editor):
    plain = load(copy()).tokenize(["snow"])
    for pad in ("!", {"content": "!", "lstrip": False}):
        ed = load(copy("tokenizer/special_tokens_map.json", pad_token=pad))
        end = int((plain == ed.tokenizer.end).int().argmax())
        assert torch.equal(ed.tokenize(["snow"])[:, :end + 1], plain[:, :end + 1])
        assert (ed.tokenize(["snow"])[:, end + 1:] == ed.tokenizer.vocab["!"]).all()


def test_a_tokenizer_as_transformers_5_writes_it_gives_the_same_ids(copy, image_editor):
    strings, plain = read(IP2P / "cases.json")["token_strings"], golden(IP2P)[0]["tokens.hf5"]
    folder = copy() / "tokenizer"
    for pad in (None, "!", {"content": "!"}):
        for written in (lambda merge: merge, " ".join):            # a pair is a list today, and was one text
            shutil.rmtree(folder)
            folder.mkdir()
            fast = json.loads(image_editor.tokenizer.fast.to_str())
            fast["model"]["merges"] = [written(merge) for merge in fast["model"]["merges"]]
            model.write_json(folder / "tokenizer.json", fast)
            model.write_json(folder / "tokenizer_config.json", {"pad_token": pad})
            tok = model.open_tokenizer(folder)
            assert tok.pad == (tok.vocab["!"] if pad else tok.end)
            assert torch.equal(model.open_tokenizer(folder, tok.end)(strings), plain)
    model.write_json(folder / "tokenizer_config.json", {"pad_token": -1})
    assert f"{folder}: pad_token -1" in refused(model.open_tokenizer, folder)
    (folder / "tokenizer_config.json").unlink()
    bpe = fast["model"]
    for wrong in ({}, [], {"model": {"vocab": {}}}, {"model": bpe | {"vocab": -1}}, {"model": bpe | {"merges": [["a"]]}}):
        (folder / "tokenizer.json").write_text(json.dumps(wrong))
        assert str(folder) in refused(model.open_tokenizer, folder)


def test_text_attention_is_causal(image_editor):
    ids = image_editor.tokenize(["make the sky purple"])
    other = ids.clone()
    other[0, 3:] = 7
    a, b = image_editor.text_encoder(ids), image_editor.text_encoder(other)
    assert apart(a[:, :3], b[:, :3]) < 1e-6 and apart(a[:, 3], b[:, 3]) > 1e-2


# ---- parity of the networks

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


@pytest.mark.parametrize("wrap", [lambda state: {"module." + k: v for k, v in state.items()},
                                  lambda state: {"state_dict": state, "animatediff_config": {"motion_module_type": "Vanilla"}}])
def test_every_way_of_writing_the_ckpt_loads_the_same(video_editor, tmp_path, wrap):
    torch.save(wrap(torch.load(CKPT, weights_only=True)["state_dict"]), tmp_path / "a.ckpt")
    ours, theirs = load(motion=tmp_path / "a.ckpt").unet.state_dict(), video_editor.unet.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


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


# ---- files

@pytest.mark.parametrize("name, build", [("ip2p_unet", UNet), ("ip2p_vae", VAE), ("clip_text_l", TextEncoder),
                                         ("motion_adapter_v1-5-2", None), ("motion_adapter_v1-5-3", None)])
def test_full_size_names_and_shapes_equal_the_published_file(name, build):
    file = read(GOLDENS / f"{name}.json")
    with torch.device("meta"):
        net = build(file["config"]) if build else UNet(read(GOLDENS / "ip2p_unet.json")["config"])
        if not build:
            net.add_motion(file["config"])
    ours = {k: list(v.shape) for k, v in net.state_dict().items()}
    theirs = {}
    for k, shape in file["tensors"].items():
        for old, new in VAE.LEGACY if build is VAE else ():
            k = k.replace(old, new)
        theirs[k] = shape
    if not build:                                                   # positions are computed, gamma is ours
        assert sum(k.endswith("gamma") for k in ours) == (21 if "v1-5-2" in name else 20)
        ours = {k: v for k, v in ours.items() if "motion_modules" in k and not k.endswith("gamma")}
        theirs = {k: v for k, v in theirs.items() if not k.endswith(".pe")}
    theirs.pop("text_model.embeddings.position_ids", None)          # a stray buffer of the published file
    assert ours == theirs


@pytest.mark.parametrize("kind", [".safetensors.index.json", ".safetensors.index.fp16.json", ".bin"])
def test_shards_and_pickles_load_like_one_safetensors_file(copy, kind):
    folder = copy()
    want, file = load(folder).unet.state_dict(), folder / "unet" / WEIGHTS
    tensors = load_file(file)
    file.unlink()
    if kind == ".bin":
        torch.save(tensors, file.with_suffix(".bin"))
    else:
        parts = {f"part-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
        for part, some in parts.items():
            save_file(some, file.parent / part)
        model.write_json(file.parent / f"{file.stem}{kind}", {"weight_map": {k: part for part, some in parts.items() for k in some}})
    assert all(torch.equal(v, want[k]) for k, v in load(folder).unet.state_dict().items())


def test_the_files_that_are_fetched_from_the_hub_are_all_that_is_read(copy, tmp_path):
    whole, fetched = copy("model_index.json", instructvedit={"steps": 3}), tmp_path / "fetched"
    (whole / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    for file in {file for pattern in VideoEditor.FILES for file in whole.glob(pattern)}:
        (fetched / file.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, fetched / file.relative_to(whole))
    ed, want = load(fetched), load(whole)
    assert ed.steps == 3 and ed.tokenizer.pad == ed.tokenizer.vocab["!"] and ed.fingerprint == want.fingerprint
    assert ed.scheduler == want.scheduler


def test_a_trained_run_brings_what_was_trained_and_its_base_the_rest(tmp_path):
    first, run, later = load(OTHER, motion=OTHER / "motion", epm=True), tmp_path / "round0", tmp_path / "round1"
    state = {k: v + 0.1 if "gamma" in k or "epm" in k else v for k, v in first.unet.state_dict().items()}
    config = first.unet.config | dict(motion=first.unet.motion_config, epm=first.unet.epm_config, same_noise=True)
    model.save_tensors(run / "unet" / WEIGHTS, state)
    model.write_json(run / "unet" / "config.json", config)
    assert not model.finished(run)
    with pytest.raises(UserError, match="round0: has no vae/, and names no base that has"):
        load(run)
    model.write_json(run / "model_index.json", {"instructvedit": {"base": first.base, "steps": 3}})
    ed = load(run)
    assert model.finished(run) and ed.folders == model.repository(run) == [run, OTHER] and ed.base == first.base
    assert ed.default_mode == "video" and ed.same_noise and ed.steps == 3 and ed.fingerprint != first.fingerprint
    assert all(torch.equal(v, state[k]) for k, v in ed.unet.state_dict().items())

    model.write_json(later / "model_index.json", {"instructvedit": {"base": str(run)}})
    for name, folder in (("unet", run), ("text_encoder", OTHER)):       # trained along with the U-Net
        shutil.copytree(folder / name, later / name)
    ed = load(later, motion=False)                                      # the image editor in it
    assert ed.folders == [later, run, OTHER] and ed.base == str(later) and ed.steps == 3 and ed.default_mode == "ffg"
    model.write_json(run / "model_index.json", {"instructvedit": {"base": str(later)}})
    with pytest.raises(UserError, match="model_index.json: names .*, whose base it is"):
        load(later)


def original_names(folder):
    """Tensors of a hub-layout editor under the original layout's names, said the other way round, block by block."""
    def turned(key, pairs):
        for old, new in pairs:
            key = key.replace(old, new)
        return key
    unet, n = read(folder / "unet" / "config.json"), read(folder / "unet" / "config.json")["layers_per_block"] + 1
    levels, vae, state = len(unet["block_out_channels"]), len(read(folder / "vae" / "config.json")["block_out_channels"]), {}
    blocks = [("conv_in.", "input_blocks.0.0."), ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
              ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."), ("mid_block.resnets.0", "middle_block.0"),
              ("mid_block.attentions.0", "middle_block.1"), ("mid_block.resnets.1", "middle_block.2")]
    for level in range(levels):
        last = 2 if "CrossAttn" in unet["up_block_types"][level] else 1
        blocks += [(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(level + 1) * n}.0.op"),
                   (f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{level * n + n - 1}.{last}.conv")]
        for i in range(n):
            for kind, number in (("resnets", 0), ("attentions", 1)):
                blocks += [(f"down_blocks.{level}.{kind}.{i}.", f"input_blocks.{1 + level * n + i}.{number}."),
                           (f"up_blocks.{level}.{kind}.{i}.", f"output_blocks.{level * n + i}.{number}.")]
    resnet = [(".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), ("time_emb_proj", "emb_layers.1"), (".norm2.", ".out_layers.0."),
              (".conv2.", ".out_layers.3."), ("conv_shortcut", "skip_connection")]
    for k, v in load_file(folder / "unet" / WEIGHTS).items():
        state["model.diffusion_model." + turned(k, blocks + (resnet if "resnets" in k else []))] = v
    blocks = [(f"up_blocks.{i}.", f"up.{vae - 1 - i}.") for i in range(vae)] + [("down_blocks.", "down."), ("mid_block.resnets.0", "mid.block_1"),
              ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"), ("mid_block.attentions.0", "mid.attn_1")]
    parts = [(".resnets.", ".block."), ("samplers.0.", "sample."), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")]
    attention = [(".query.", ".q."), (".key.", ".k."), (".value.", ".v."), (".proj_attn.", ".proj_out."), ("to_out.0", "proj_out"), ("to_", "")]
    for k, v in load_file(folder / "vae" / WEIGHTS).items():
        v = v[:, :, None, None] if "attentions" in k and v.ndim == 2 else v
        state["first_stage_model." + turned(k, blocks + parts + (attention if "attentions" in k else []))] = v.contiguous()
    for k, v in load_file(folder / "text_encoder" / "model.safetensors").items():
        state["cond_stage_model.transformer." + k] = v
    return state | {"alphas_cumprod": torch.ones(3)}


@pytest.mark.parametrize("folder", [IP2P, OTHER])
def test_an_editor_in_one_file_of_the_original_layout_is_what_is_opened(folder, tmp_path, monkeypatch):
    state, want = original_names(folder), load(folder)
    assert {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "first_stage_model.decoder.up.0.block.0.norm1.weight",
            "model.diffusion_model.output_blocks.2.1.conv.weight" if folder == IP2P else "alphas_cumprod"} <= state.keys()
    hub = tmp_path / "hub"
    shutil.copytree(folder, hub, ignore=shutil.ignore_patterns("expected*", "motion"))
    for name in ("one.safetensors", "one.ckpt"):
        other = {k: v + 1 if k.endswith("bias") else v for k, v in state.items()}      # than those in the folder's own files
        if name == "one.ckpt":
            mean = {"model_ema." + k[6:].replace(".", ""): v for k, v in other.items() if k.startswith("model.")}
            torch.save({"state_dict": state | {k: v for k, v in other.items() if not k.startswith("model.")} | mean}, hub / name)
        else:
            save_file(other, hub / name)
        ed = load(hub / name)
        for net in ("unet", "vae", "text_encoder"):
            old, new = getattr(want, net).state_dict(), getattr(ed, net).state_dict()
            assert all(torch.equal(v, old[k] + 1 if k.endswith("bias") else old[k]) for k, v in new.items()), net
        assert ed.fingerprint != want.fingerprint and ed.base == str(hub / name)
    monkeypatch.chdir(tmp_path)
    model.write_json(tmp_path / "run" / "model_index.json", {"instructvedit": {"base": ed.base}})      # a run from it
    run = load("run")
    assert run.base == ed.base and all(torch.equal(v, new[k]) for k, v in run.text_encoder.state_dict().items())
    assert load("hub/one.ckpt").fingerprint == ed.fingerprint
    assert "one.ckpt: a file; pass a directory" in refused(model.hub_dir, "hub/one.ckpt")


def test_a_file_that_is_no_whole_editor_says_what_it_holds(copy):
    folder = copy()
    save_file({"lora_unet_down.alpha": torch.zeros(1)}, folder / "lora.safetensors")
    assert "lora.safetensors: holds no model.diffusion_model.*, but lora_unet_down.alpha; --weights takes" in refused(load, folder / "lora.safetensors")


def test_the_embedded_editor_is_found_from_anywhere_and_its_runs_name_it_shortly(tmp_path, monkeypatch):
    model.write_json(tmp_path / "model_index.json", {"instructvedit": {"base": "assets/tiny"}})
    monkeypatch.chdir(tmp_path)
    assert model.repository(tmp_path) == [tmp_path, model.ROOT / "assets/tiny"]
    assert model.repository("tiny") == [model.ROOT / "assets/tiny"]
    assert model.portable(model.ROOT / "assets" / "tiny") == "assets/tiny" and model.portable("tiny") == "tiny"
    assert model.portable(tmp_path) == str(tmp_path) and model.portable(model.SD15) == model.SD15


def test_a_fingerprint_tells_other_contents_and_names_apart(tmp_path):
    marks = set()
    for name, data in (("a", b"1" * 10), ("b", b"1" * 10), ("a", b"2" * 10), ("a", b"1" * (3 << 20)), ("a", b"1" * (3 << 20) + b"2")):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / name).write_bytes(data)
        marks.add(model.fingerprint(tmp_path / "x"))
    assert len(marks) == 5


def test_a_checkpoints_own_steps_guidance_and_size_are_the_defaults(copy, image_editor):
    assert (image_editor.steps, image_editor.guidance, image_editor.size) == (20, (7.5, 1.5), 512)
    ed, path = load(copy("model_index.json", instructvedit={"steps": 3, "guidance": [4, 1.2], "size": 32})), []
    z, z_T = torch.randn(2, 1, 1, 3, 4, 4)
    z0 = ed.sample(z, "make it snow", z_T, mode="image", keep=path)
    assert len(path) == 4 and ed.size == 32 and torch.equal(z0, ed.sample(z, "make it snow", z_T, 3, 4, 1.2, "image"))


# ---- sampling

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


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 300, 1000])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_with_the_true_prediction_leads_to_the_picture_whatever_the_steps(spacing, steps, prediction):
    z0, eps = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    ddim = DDIM(steps, spacing, set_alpha_to_one=True, cfg={"prediction_type": prediction})
    a = ddim.abar[ddim.timesteps[0]]
    z = a.sqrt() * z0 + (1 - a).sqrt() * eps
    for i, t in enumerate(ddim.timesteps):
        a = ddim.abar[t]
        out = eps if prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * z0
        assert apart(ddim.to_eps(out, i, z), eps) < 0.002
        z = ddim.step(eps, i, z)
    assert len(set(ddim.timesteps.tolist())) >= steps - 1 and apart(z, z0) < 2e-3


# ---- SMA and EPM

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


def test_untrained_epm_keeps_999_permille_of_the_attention_in_the_own_frame_and_the_unet_almost_as_it_is():
    n, length = 16, 6
    bias = EPM(8)(torch.randn(n, 8, 2, 3), n).detach()
    assert torch.equal(bias[0], -10 * (1 - torch.eye(n)))
    frame = torch.eye(n).repeat_interleave(length, 0)[None]         # values that tell which frame they came from
    got = model.epm_attention(torch.zeros_like(frame), torch.zeros_like(frame), frame, 1, bias)
    assert (got * frame).sum(-1).min() > 0.999
    z, t, ctx = inputs(n_frames=16)
    with_epm, without = load(epm=True).unet(z, t, ctx), load().unet(z, t, ctx)
    assert 0 < (with_epm - without).norm() / without.norm() < 0.005


def test_inner_epm_leaves_the_top_level_out():
    with torch.device("meta"):
        net = UNet(read(IP2P / "unet" / "config.json"))
        net.add_epm("inner")
    top, sites = net.config["block_out_channels"][0], [m for m in net.modules() if isinstance(m, EPM)]
    assert sites and all(site.conv1.in_channels > top for site in sites)


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
    with torch.no_grad():                                           # inference on a CPU goes another way
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
            net.across_frames(x, n, "video", size).sum().backward()
    tokens = 16 * 64
    assert largest[2] < tokens ** 2 / 8 and largest[2] <= 2.2 * largest[1] <= 2.2 ** 2 * largest[0]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_on_a_cpu_is_that_of_float32_rounded(causal):
    q, k, v = torch.randn(3, 2, 20, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = model.attention(q, k, v, 4, causal=causal)
    assert torch.equal(out, model.attention(q.float(), k.float(), v.float(), 4, causal=causal).bfloat16())


# ---- the editor

def test_guidance_is_the_three_branch_formula_for_one_clip_or_several_and_runs_no_branch_in_vain(image_editor):
    (z, _, _), src = inputs(batch=2, n_frames=2), torch.randn(1, 2, 4, 4, 6)
    z, ctx, t = z[:, :, :4], image_editor.encode_text(["make it snow", ""]), torch.tensor([500])
    ran = []
    hook = image_editor.unet.register_forward_pre_hook(lambda net, args: ran.append(len(args[0])))

    def formula(z, s_txt, s_src):
        def branch(source, k):
            return image_editor.unet(torch.cat([z, source], dim=2), t, ctx[k:k + 1], "image")
        none, image, both = branch(torch.zeros_like(src), 1), branch(src, 1), branch(src, 0)
        return none + s_src * (image - none) + s_txt * (both - image)
    for s_txt, s_src, branches in ((7.5, 1.5, 3), (7.5, 1.0, 2), (1.0, 1.0, 1), (3.0, 3.0, 2)):
        ran.clear()
        got = image_editor.guided(z[:1], src, 500, ctx, s_txt, s_src, "image")
        assert ran == [branches] and apart(got, formula(z[:1], s_txt, s_src)) < 1e-4
    got = image_editor.guided(z, src, 500, ctx, [2.0, 7.5], torch.tensor([1.0, 1.5]), "image")
    assert apart(got, torch.cat([formula(z[:1], 2.0, 1.0), formula(z[1:], 7.5, 1.5)])) < 1e-4
    hook.remove()


def test_ffg_of_equal_frames_gives_equal_frames(image_editor):      # no motion: its positions tell equal frames apart
    z_src, z_T = image_editor.encode(clip(1, 32, 48)), torch.randn(1, 1, 4, 4, 6)
    z = image_editor.sample(z_src.expand(-1, 4, -1, -1, -1), "make it snow", z_T.expand(-1, 4, -1, -1, -1), 3, mode="ffg")
    assert apart(z, z[:, :1].expand_as(z)) < 1e-4


def test_the_ffg_anchor_follows_the_image_editor_and_the_frames_the_anchor(image_editor, video_editor):
    z, t, ctx = inputs(n_frames=5)
    anchor = video_editor.unet(z, t, ctx, "ffg")[:, :1]
    assert apart(anchor, image_editor.unet(z[:, :1], t, ctx)) < 2e-5
    other = z.clone()
    other[:, 0] += 1
    a, b = image_editor.unet(z, t, ctx, "ffg"), image_editor.unet(other, t, ctx, "ffg")
    assert apart(a[:, 1:], b[:, 1:]) > 1e-3


@pytest.mark.parametrize("steps, corrected", [(1, 1), (4, 2)])
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

    video = clip(2, 16, 16)                                         # all dropped: as the autoencoder gives the source
    coded = image_editor.decode(image_editor.encode(video) * image_editor.vae.scaling_factor)
    monkeypatch.setattr(image_editor, "deadband", 1e3)
    assert torch.equal(image_editor.edit(video, "make it snow", steps=2, mode="image"), coded)


def test_a_frames_noise_does_not_depend_on_its_window(image_editor):
    whole, window = image_editor.noise(6, 4, 6, 3, mode="video"), image_editor.noise(3, 4, 6, 3, first=2, mode="video")
    assert torch.equal(whole[:, 2:5], window)
    still = image_editor.noise(3, 4, 6, 3, mode="image")
    assert torch.equal(still, still[:, :1].expand_as(still)) and not torch.equal(whole[:, :1], whole[:, 1:2])


def test_the_source_latent_is_the_unscaled_posterior_mode(image_editor):
    video = clip(5, 32, 48)
    assert apart(image_editor.encode(video)[0], image_editor.vae.encode(video[0])[0]) < 4e-5
    z = torch.randn(1, 2, 4, 4, 6)
    assert apart(image_editor.decode(z)[0], image_editor.vae.decode(z[0] / 0.18215).clamp(-1, 1)) < 4e-5


@pytest.mark.parametrize("mode", ["image", "ffg", "video"])
def test_an_edit_has_the_clips_shape_and_its_seed_and_is_nearly_the_same_in_bfloat16(video_editor, low, mode):
    video = clip()
    a, b, c = (video_editor.edit(video, "make it snow", 2, 2, 1.5, seed=s, mode=mode) for s in (0, 0, 1))
    assert a.shape == video.shape and a.abs().max() <= 1 and torch.equal(a, b) and not torch.equal(a, c)
    near = low.edit(video, "make it snow", 2, 2, 1.5, seed=0, mode=mode)
    assert near.dtype == torch.float32 and (a - near).norm() < 0.2 * a.norm() < 0.4 * (a - c).norm()


@pytest.fixture(scope="module")
def low(video_editor):
    torch.manual_seed(1)
    ed = load(motion=ADAPTERS[0], epm=True, dtype="bfloat16")
    assert {p.dtype for net in (ed.unet, ed.vae, ed.text_encoder) for p in net.parameters()} == {torch.bfloat16}
    return ed


def test_float16_leaves_the_vae_in_float32():
    ed = load(OTHER, dtype="float16")
    assert {p.dtype for p in ed.vae.parameters()} == {torch.float32}
    assert {p.dtype for net in (ed.unet, ed.text_encoder) for p in net.parameters()} == {torch.float16}


# ---- what a user can get wrong

def refused(call, *args, **kw):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*args, **kw)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folders_and_files_are_named(copy, tmp_path):
    assert "/no/such/place: no such directory" in refused(load, "/no/such/place")
    assert "has no unet/, and names no base" in refused(load, tmp_path)
    assert "hub cannot give it" in refused(load, "nobody/nothing")
    for file in ("unet/config.json", "tokenizer/merges.txt", f"vae/{WEIGHTS}", "scheduler/scheduler_config.json"):
        folder = copy()
        (folder / file).unlink()
        assert str(folder / Path(file).parent) in refused(load, folder)


@pytest.mark.parametrize("change, says", [
    (lambda state: {k: v for k, v in state.items() if not k.startswith("mid_block")}, r"lacks \d+ of \d+ tensors, first mid_block"),
    (lambda state: state | {"elsewhere.weight": torch.zeros(1)}, r"has unknown 1 of \d+ tensors, first elsewhere.weight"),
    (lambda state: state | {"conv_in.bias": torch.zeros(3)}, r"wrong shapes for 1 of .* conv_in.bias \(3,\) instead of \(4,\)"),
    (lambda state: {k: v.to(torch.int8) for k, v in state.items()}, "whole numbers in .* torch.int8")])
def test_weights_of_another_network_are_refused_by_name(copy, change, says):
    folder = copy()
    file = folder / "unet" / WEIGHTS
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    file.unlink()                                                   # not in place: other editors have it mapped
    save_file(change(tensors), file)
    with pytest.raises(UserError, match=f"unet/{WEIGHTS}: .*{says}"):
        load(folder)


class Nasty:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_with_code_is_refused_and_not_run_and_odd_files_are_one_line(tmp_path, capsys):
    torch.save({"state_dict": Nasty()}, tmp_path / "bad.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Nasty(), protocol=2))
    torch.save({"a": torch.ones(2), 0: torch.ones(1)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert model.read_tensors(tmp_path / "old.ckpt").keys() == {"a"}
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "old.ckpt").read_bytes()[:90])
    (tmp_path / "page.safetensors").write_bytes(b"<html>not found</html>")
    (tmp_path / "empty.ckpt").touch()
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name in ("bad.ckpt", "plain.ckpt", "half.ckpt", "page.safetensors", "empty.ckpt", "list.ckpt", "gone.ckpt"):
        assert f"{name}: " in refused(model.read_tensors, tmp_path / name)
    assert "this ran" not in capsys.readouterr().out


def test_motion_of_another_unet_or_of_none_is_refused():
    assert "motion/" + WEIGHTS in refused(load, motion=OTHER / "motion")
    assert "holds no motion modules; is it an AnimateDiff adapter?" in refused(load, OTHER, motion=IP2P / "vae")


def test_motion_modules_are_taken_out_of_a_whole_training_and_other_frame_positions_refused(video_editor, tmp_path):
    state = torch.load(CKPT, weights_only=True)["state_dict"]
    torch.save({"epoch": 3, "state_dict": {"module." + k: v for k, v in (state | load_file(IP2P / "unet" / WEIGHTS)).items()}},
               tmp_path / "whole.ckpt")
    ours, theirs = load(motion=tmp_path / "whole.ckpt").unet.state_dict(), video_editor.unet.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    adapter = load_file(ADAPTERS[0] / WEIGHTS)
    save_file({k: v.half() for k, v in adapter.items()}, tmp_path / "half.safetensors")
    load(motion=tmp_path / "half.safetensors")
    save_file({k: v[:, [0, *range(v.shape[1] - 1)]] if k.endswith(".pe") else v for k, v in adapter.items()}, tmp_path / "late.safetensors")
    assert "late.safetensors: its frame positions are not" in refused(load, motion=tmp_path / "late.safetensors")


LORA = {"kohya": ("lora_unet_", "_", ".lora_down.weight", ".lora_up.weight"), "peft": ("unet.", ".", ".lora_A.weight", ".lora_B.weight"),
        "trained by peft": ("base_model.model.", ".", ".lora_A.default.weight", ".lora_B.default.weight"),
        "diffusers": ("unet.", ".", ".lora.down.weight", ".lora.up.weight")}


@pytest.mark.parametrize("kind", [*LORA, "old diffusers"])
def test_a_lora_is_merged_whatever_its_names_and_others_are_refused(tmp_path, image_editor, kind):
    start, dot, a, b = LORA.get(kind, ("unet.", ".", "_lora.down.weight", "_lora.up.weight"))
    site, file, state = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.", tmp_path / "a.safetensors", {}
    names = [site + "to_q", site + "to_out.0"] + (["mid_block.resnets.0.conv1"] if kind == "kohya" else [])
    unet, want = load().unet, dict(image_editor.unet.state_dict())
    for name in names:
        weight, alpha = want[name + ".weight"], 4 if kind == "kohya" else 2
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *[1] * (weight.ndim - 2))
        said = name.replace("to_out.0", "to_out").replace("attn1.", "attn1.processor.") if kind == "old diffusers" else name
        said = start + said.replace(".", dot)
        state |= {said + a: down, said + b: up} | ({said + ".alpha": torch.tensor(4.0)} if kind == "kohya" else {})
        want[name + ".weight"] = weight + 0.5 * alpha / 2 * torch.einsum("or,r...->o...", up.flatten(1), down)
    save_file(state | {"lora_te_x.alpha": torch.ones(1)}, file)
    model.merge_lora_file(unet, file, 0.5)
    assert all(apart(v, want[k]) < 1e-5 for k, v in unet.state_dict().items())
    for other in ({"unet.x.lora_A.weight": torch.ones(2, 2)}, {start + "y.dora_scale": torch.ones(1)}, {k: v[:, :1] for k, v in state.items() if v.ndim}):
        save_file({k: v.contiguous() for k, v in other.items()}, tmp_path / "b.safetensors")
        assert "b.safetensors: " in refused(model.merge_lora_file, unet, tmp_path / "b.safetensors")


def test_configs_of_published_networks_are_plausible():
    for file in [*GOLDENS.glob("*/**/config.json"), *GOLDENS.glob("*.json")]:
        model.check_sizes(read(file).get("config", read(file)))


@pytest.mark.parametrize("file, key, value, says", [
    ("scheduler/scheduler_config.json", "prediction_type", "sample", "prediction_type sample; known is"),
    ("scheduler/scheduler_config.json", "beta_schedule", "squaredcos_cap_v2", "known is .'scaled_linear', 'linear'"),
    ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True, "rescale_betas_zero_snr True"),
    ("scheduler/scheduler_config.json", "trained_betas", [0.1], "trained_betas"),
    ("scheduler/scheduler_config.json", "timestep_spacing", "random", "timestep_spacing random"),
    ("unet/config.json", "flip_sin_to_cos", False, "unet/config.json: flip_sin_to_cos False; known is True"),
    ("unet/config.json", "use_linear_projection", True, "use_linear_projection True; known is False"),
    ("unet/config.json", "norm_num_groups", None, "unet/config.json: "), ("unet/config.json", "in_channels", 3, "wrong shapes"),
    ("unet/config.json", "attention_head_dim", 3, "3 heads cannot share"), ("vae/config.json", "shift_factor", 0.1, "shift_factor 0.1"),
    ("vae/config.json", "block_out_channels", 5, "vae/config.json: "),
    ("text_encoder/config.json", "hidden_act", "gelu_new", "text_encoder/config.json: hidden_act gelu_new; known are"),
    ("tokenizer/special_tokens_map.json", "pad_token", "<pad>", "lacks '<pad>'"),
    ("tokenizer/vocab.json", "<|endoftext|>", 5000000, "the tokenizer has tokens up to 5000000"),
    ("model_index.json", "instructvedit", {"guidance": 3}, "copy: "), ("model_index.json", "instructvedit", [], "model_index.json: "),
    ("model_index.json", "instructvedit", {"base": 5}, "model_index.json: base"),
    ("model_index.json", "instructvedit", {"size": -8}, "copy: size -8"), ("model_index.json", "instructvedit", {"deadband": float("nan")}, "copy: "),
    ("model_index.json", "instructvedit", {"steps": 5000}, "copy: steps 5000: needs 1 to 1000"),
    ("scheduler/scheduler_config.json", "beta_start", None, "config.json: "), ("scheduler/scheduler_config.json", "beta_end", 2, "config.json: noise"),
    ("scheduler/scheduler_config.json", "beta_start", -1, "config.json: "), ("scheduler/scheduler_config.json", "steps_offset", -1, "config.json: 1000 time"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10 ** 9, "config.json: 1000000000 time steps"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", "x", "scheduler_config.json: "),
    ("text_encoder/config.json", "num_hidden_layers", 10 ** 9, "text_encoder/config.json: num_hidden_layers 1000000000: no network"),
    ("unet/config.json", "layers_per_block", 10 ** 6, "unet/config.json: layers_per_block"), ("unet/config.json", "layers_per_block", [2], "unet/config.json: "),
    ("unet/config.json", "attention_head_dim", -1, "attention_head_dim -1"), ("unet/config.json", "cross_attention_dim", 1e30, "cross_attention_dim 1e.30"),
    ("unet/config.json", "norm_num_groups", -2, "norm_num_groups -2"), ("unet/config.json", "norm_eps", float("nan"), "norm_eps nan"),
    ("unet/config.json", "motion", {"motion_max_seq_length": None}, "unet/config.json: "), ("unet/config.json", "motion", [3], "unet/config.json: "),
    ("unet/config.json", "motion", {"motion_num_attention_heads": -8}, "motion_num_attention_heads -8"),
    ("unet/config.json", "epm", {"colour": 1}, "unet/config.json: .*colour"), ("unet/config.json", "epm", None, "unet/config.json: "),
    ("vae/config.json", "scaling_factor", 0, "copy: the VAE's scaling_factor is 0"), ("vae/config.json", "latent_channels", True, "vae/"),
    ("model_index.json", "instructvedit", {"base": "no/where"}, "no/where: not in the local cache")])
def test_a_setting_that_would_change_results_or_cannot_be_built_is_named(copy, file, key, value, says):
    folder = copy(file, **{key: value})
    with pytest.raises(UserError, match=says) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [400, 1000, 100_000])
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/special_tokens_map.json", "model_index.json"])
def test_json_nested_very_deep_is_one_line(copy, file, depth):
    folder = copy()
    plain = file in ("model_index.json", "scheduler/scheduler_config.json")
    if plain and depth == 400:                                      # what is unknown to us does no harm
        copy(file, a=json.loads("[" * depth + "]" * depth))
        load(folder)
        return
    if plain or depth > 400:
        (folder / file).write_text('{"a": ' * depth + "1" + "}" * depth)
    else:
        (folder / file).write_text('{"pad_token": ' + "[" * depth + "]" * depth + "}")
    said = refused(load, folder)
    assert str(folder) in said and len(said) < 500


def test_stable_diffusion_itself_is_no_editor(copy):
    cfg = read(OTHER / "unet" / "config.json")
    folder = copy("unet/config.json", in_channels=cfg["out_channels"])
    tensors = load_file(folder / "unet" / WEIGHTS)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :cfg["out_channels"]].contiguous()
    save_file(tensors, folder / "unet" / WEIGHTS)
    assert "is it InstructPix2Pix's kind?" in refused(load, folder)


@pytest.mark.parametrize("damage", [lambda text: b"", lambda text: text[:len(text) // 2], lambda text: b"<html>\n" + text,
                                    lambda text: text + b"\xff\xfe q\n"])
def test_damaged_merges_are_refused(tmp_path, damage):
    shutil.copytree(IP2P / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "merges.txt"
    file.write_bytes(damage(file.read_bytes()))
    assert "merges.txt: " in refused(Tokenizer, tmp_path / "tokenizer" / "vocab.json", file)


def test_mutated_repositories_load_or_are_refused_in_one_line(copy):
    rng, values = random.Random(0), [None, -1, 0, 3, 1e9, "x", [], [1, 2], {}, True, float("nan")]
    names = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
             "model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", f"unet/{WEIGHTS}", "text_encoder/model.safetensors"]
    folder = copy("model_index.json", instructvedit={"size": 32, "steps": 2, "guidance": [4, 1.2], "deadband": 0.1, "words": ["a"]})
    kept, loaded = {name: (folder / name).read_bytes() for name in names}, 0
    for _ in range(24):
        name = rng.choice(names)
        data = bytearray(kept[name])
        if name.endswith(".json") and rng.random() < 0.7:
            data = json.loads(data)
            inner = data["instructvedit"] if name == "model_index.json" else data
            inner[rng.choice(list(inner))] = rng.choice(values)
            data = json.dumps(data).encode()
        elif rng.random() < 0.5:
            data = data[:rng.randrange(len(data))]
        else:
            for _ in range(4):
                data[rng.randrange(min(len(data), 3000))] = rng.randrange(256)
        (folder / name).unlink()                                    # not in place: an editor may have it mapped
        (folder / name).write_bytes(data)
        try:
            load(folder)
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error), error
        (folder / name).unlink()
        (folder / name).write_bytes(kept[name])
    assert 0 < loaded < 20


def test_steps_and_frames_beyond_what_the_model_knows_are_named(image_editor, video_editor):
    assert "--steps 0: needs 1 to 1000" in refused(image_editor.edit, clip(1), "make it snow", steps=0, mode="image")
    assert "--steps 1001" in refused(DDIM, 1001)
    z, t, ctx = inputs(n_frames=33, size=(2, 2))
    motion = video_editor.unet.down_blocks[0].motion_modules[0]
    assert "the motion modules know 32 positions" in refused(motion, torch.zeros(33, 8, 2, 2), 33)
    assert "EPM knows 16" in refused(video_editor.unet, z[:, :17], t, ctx)


def test_what_only_code_can_get_wrong_is_asserted(image_editor):
    video, text = torch.zeros(1, 2, 3, 32, 32), "make it snow"
    z = image_editor.encode(video)
    anchor = image_editor.anchor(z[:, :1], text, z[:, :1], steps=2)
    for says, call in (("needs .1, F, 3, H, W.", lambda: image_editor.edit(video[0], text)),
                       ("needs .1, F, 3, H, W.", lambda: image_editor.edit(video.expand(2, -1, -1, -1, -1), text)),
                       ("44x32: width and height must be multiples of 8", lambda: image_editor.edit(clip(1, 32, 44), text)),
                       ("z_T", lambda: image_editor.edit(video, text, z_T=torch.zeros(2, 2, 4, 4, 4))),
                       ("mode both", lambda: image_editor.edit(video, text, mode="both")),
                       ("anchor of 2 steps: needs 3", lambda: image_editor.sample(z, text, z, 3, mode="ffg", anchor=anchor))):
        with pytest.raises(AssertionError, match=says):
            call()


def test_nan_in_sampling_names_the_step(image_editor):
    calls = []

    def spoil(net, args, out):
        calls.append(1)
        return out * float("nan") if len(calls) == 2 else out
    hook = image_editor.unet.register_forward_hook(spoil)
    said = refused(image_editor.edit, clip(1), "make it snow", steps=4, mode="image")
    hook.remove()
    assert "sampling step 2 of 4 gave NaN or Inf" in said


def test_nan_in_the_decoder_reaches_no_picture(copy):
    ed = load(copy())
    ed.vae.decoder.conv_out.weight = torch.nn.Parameter(torch.full_like(ed.vae.decoder.conv_out.weight, float("nan")))
    assert "copy: the VAE gave NaN or Inf" in refused(ed.edit, clip(1), "make it snow", steps=1, mode="image")


@pytest.mark.parametrize("error, says", [
    (UserError("--frames 40: too many"), "error: --frames 40: too many\n"),
    (OSError(errno.ENOSPC, "No space left on device", "out/log.jsonl"),
     "error: out/log.jsonl cannot be written: the disk is full; make room and run the same again\n"),
    (PermissionError(errno.EACCES, "Permission denied", "x.mp4"), "error: x.mp4: Permission denied\n"),
    (RuntimeError("CUDA out of memory. Tried to allocate"), "error: out of memory: lower --size"), (MemoryError(), "error: out of memory")])
def test_what_a_script_meets_is_one_line_and_status_2(capsys, error, says):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        model.run(main)
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.err.startswith(says) and out.err.count("\n") == 1 and out.out == ""


def test_other_faults_keep_their_traceback():
    def broken():
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        model.run(broken)


def test_a_file_written_aside_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    for data in ([1], [2]):
        with pytest.raises(ZeroDivisionError), model.aside(file) as part:
            part.write_text("[")
            1 / 0
        model.write_json(file, data)
        assert model.read_json(file, list) == data and list(tmp_path.iterdir()) == [file]
    assert "a.json: holds a list, where a dict is needed" in refused(model.read_json, file)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_what_is_written_follows_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        model.write_json(tmp_path / "a.json", {})
        model.save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~umask}


def test_settings_of_a_folder_are_kept_and_others_refused_by_name(tmp_path):
    model.begin(tmp_path / "x", {"steps": 5, "path": Path("a")})
    model.begin(tmp_path / "x", {"steps": 5, "path": "a"})
    assert "made with steps 5 (now 6); pass the same" in refused(model.begin, tmp_path / "x", {"steps": 6, "path": "a"})
    model.begin(tmp_path / "x", {"steps": 6}, force=True)
    assert read(tmp_path / "x" / "settings.json") == {"steps": 6}


def test_more_rows_than_a_cuda_grid_holds_are_split_and_give_the_same(monkeypatch):
    q, k, v = torch.randn(3, 7, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    whole, sizes = model.fused_attention(q, k, v), []
    plain = model.F.scaled_dot_product_attention
    monkeypatch.setattr(model, "MOST_ROWS", 3)
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", lambda q, *a, **b: sizes.append(len(q)) or plain(q, *a, **b))
    torch.testing.assert_close(model.fused_attention(q, k, v), whole)
    assert sizes == [3, 3, 1]
