"""The two teachers: parity with the published implementations on random-weight miniatures in the published
layout (diffusers 0.42.1, transformers 5.23.0), full-size names and shapes, sampler, decoding, writer, LoRA,
judge, bad input."""
import json
import shutil
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import teachers as T
from model import UserError, to_tensor, to_video

GOLDENS = Path(__file__).parent / "goldens"
COG, LLAVA = GOLDENS / "CogVideoX-5b-I2V", GOLDENS / "llava-onevision-qwen2-0.5b-ov-hf"
HUBS = (("", COG), ("llava.", LLAVA))
WANT = {prefix + k: v for prefix, hub in HUBS for k, v in load_file(hub / "expected.safetensors").items()}
ATOL = {prefix + k: v["atol"] for prefix, hub in HUBS
        for k, v in json.loads((hub / "tolerance.json").read_text()).items()}
COG_CASES, CASES = (json.loads((hub / "cases.json").read_text(encoding="utf-8")) for hub in (COG, LLAVA))


@pytest.fixture(scope="module")
def cog():
    return T.CogVideoX.from_pretrained(COG, device="cpu")


@pytest.fixture(scope="module")
def net():
    return T.LlavaOneVision.from_pretrained(LLAVA, device="cpu")


def copy_of(hub, to):
    """A copy of a miniature to damage."""
    shutil.copytree(hub, to, ignore=shutil.ignore_patterns("expected*"), copy_function=shutil.copyfile)
    return to


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def close(name, got, want=None):
    torch.testing.assert_close(got, WANT[name] if want is None else want, rtol=0, atol=ATOL[name])


def fails(match, call, *args):
    with pytest.raises(UserError, match=match) as error:
        call(*args)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- CogVideoX: parity

def pixels(name):
    return to_video(WANT[name].numpy())


def test_tokens_equal_the_published_tokenizer_on_every_string(cog):
    ids = cog.tokenize(COG_CASES["token_strings"])
    assert torch.equal(ids, WANT["tokens.hf4"]) and torch.equal(ids, WANT["tokens.hf5"])


def test_t5_states(cog):
    close("t5.hidden_states", cog.network("text_encoder")(WANT["tokens.hf5"][[0, -2]]))


def test_transformer_and_its_rotary_positions(cog):
    network, z = cog.network("transformer"), WANT["transformer.latents"]
    close("transformer.output", network(z, WANT["transformer.text"], WANT["transformer.timesteps"]))
    for case, frames in (("transformer", 3), ("transformer2", 2)):
        for name, got in zip(("cos", "sin"), T.rope_3d(frames, 2, 3, network.config["attention_head_dim"])):
            close(f"{case}.rope_{name}", got)


def test_vae_works_in_the_published_chunks(cog):
    vae = cog.network("vae")
    mean, logvar = vae.encode(pixels("vae.frame_u8"))
    close("vae.frame.mean", mean.transpose(1, 2))
    close("vae.frame.logvar", logvar.transpose(1, 2))
    for name in ("vae.video9", "vae.video_long"):
        close(name + ".mean", vae.encode(pixels(name + "_u8"))[0].transpose(1, 2))
    for n in (3, 4, 5):
        z = WANT[f"vae.latent{n}"].transpose(1, 2)
        close(f"vae.latent{n}.decoded", torch.cat(list(vae.decode_chunks(z)), 1).transpose(1, 2))


@pytest.mark.parametrize("steps", [4, 50])
def test_sampler_follows_the_published_trajectory(cog, steps):
    close("sched.alphas_cumprod", cog.abar.float())
    path, z = T.cog_steps(cog.abar, steps), WANT["sched.start"]
    assert [t for t, _, _ in path] == WANT[f"sched.{steps}.timesteps"].tolist()
    for i, want in enumerate(WANT[f"sched.{steps}.trajectory"]):
        z = T.cog_step(WANT["sched.v"][i], z, *path[i][1:])
        close(f"sched.{steps}.trajectory", z, want)


def test_an_image_and_a_caption_become_the_published_clip(cog):
    e2e, noise = COG_CASES["e2e"], WANT["e2e.image_noise"].transpose(1, 2)
    image = to_tensor(WANT["e2e.image_u8"].numpy())
    z_img = cog.encode_image(T.fit_image(image, e2e["height"], e2e["width"]), noise)
    assert not WANT["e2e.image_latents"][:, 1:].any()
    close("e2e.image_latents", z_img, WANT["e2e.image_latents"][:, :1])
    ctx = cog.text_states([e2e["negative_prompt"], e2e["prompt"]])
    path = list(cog.denoise(WANT["e2e.latents"], z_img, ctx, e2e["steps"]))
    close("e2e.trajectory", torch.cat(path))
    close("e2e.final_latents", path[-1])
    close("e2e.video", cog.decode(path[-1]) / 2 + 0.5)


@pytest.mark.parametrize("network, manifest", [
    (T.CogTransformer, "cogvideox_5b_i2v_transformer"), (T.CogVAE, "cogvideox_vae"),
    (T.T5Encoder, "t5_v1_1_xxl_encoder"),
    (T.LlavaOneVision, "llava_onevision_qwen2_0_5b"), (T.LlavaOneVision, "llava_onevision_qwen2_7b")])
def test_names_and_shapes_equal_the_published_files(network, manifest):
    published = json.loads((GOLDENS / f"{manifest}.json").read_text())
    with torch.device("meta"):
        ours = network(published["config"]).state_dict()
    assert {k: list(v.shape) for k, v in ours.items()} == published["tensors"]


# ------------------------------------------------------------------------------ CogVideoX: behaviour

@pytest.mark.parametrize("steps", [1, 4, 50])
def test_sampling_starts_without_signal_and_the_true_v_leads_to_the_clean_latents(cog, steps):
    z0, z = torch.randn(2, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path = T.cog_steps(cog.abar, steps)
    assert len(path) == steps and path[0][:2] == (999, 0) and path[-1][2] == 1
    for _, a, a_next in path:
        z = T.cog_step((a.sqrt() * z - z0) / (1 - a).sqrt(), z, a, a_next)
    torch.testing.assert_close(z, z0)


def longer(hub):
    """The miniature with positions for the published 49 frames."""
    shard = hub / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    tensors, name = load_file(shard), "patch_embed.pos_embedding"
    extra = 13 * 2 * 3 + 226 - tensors[name].shape[1]
    save_file(tensors | {name: torch.cat([tensors[name], tensors[name][:, -extra:]], 1)}, shard)
    edit_json(hub / "transformer" / "config.json", sample_frames=49)
    return hub


def test_a_list_gives_the_clips_that_each_image_gives_alone_and_seeds_differ(cog):
    wide, tall = torch.linspace(-1, 1, 90).expand(3, 40, 90), torch.ones(3, 50, 40) / 2
    jobs = [(wide, "a fox", 3), (tall, "a dog", 4), (wide, "a fox", 5)]
    clips = list(cog.clips(jobs, steps=2))
    for clip, job in zip(clips, jobs, strict=True):
        assert clip.shape == (9, *job[0].shape) and clip.dtype == torch.float32 and clip.abs().max() <= 1
        torch.testing.assert_close(clip, cog.animate(*job, steps=2), atol=1e-5, rtol=0)
    assert (clips[0] - clips[2]).abs().mean() > 0.01


def test_a_list_opens_each_network_once_and_holds_one(cog, monkeypatch):
    opened, real = [], cog.open
    monkeypatch.setattr(cog, "open", lambda part, device: opened.append(part) or real(part, device))
    list(cog.clips([(torch.zeros(3, 32, 48), caption, 0) for caption in ("a fox", "a dog")], steps=1))
    assert opened == ["text_encoder", "vae", "transformer", "vae"] and cog.loaded[0] == "vae"


def test_the_published_length_is_49_frames(tmp_path):
    cog = T.CogVideoX.from_pretrained(longer(copy_of(COG, tmp_path / "hub")), device="cpu")
    assert cog.animate(torch.zeros(3, 32, 48), "a fox", steps=1).shape == (49, 3, 32, 48)


def test_bfloat16_stays_near_float32(cog):
    half = T.CogVideoX.from_pretrained(COG, device="cpu", dtype="bfloat16")
    image = torch.zeros(3, 32, 48)
    half.GUIDANCE = cog.GUIDANCE = 1.0
    apart = half.animate(image, "a fox", steps=2) - cog.animate(image, "a fox", steps=2)
    del cog.GUIDANCE
    assert apart.abs().mean() < 0.1


@pytest.mark.parametrize("h, w", [(40, 40), (20, 200), (200, 21), (31, 48)])
def test_an_image_is_whole_and_lies_where_inside_says(h, w):
    image = torch.linspace(0, 1, w).expand(3, h, w)
    got, (top, left, high, wide) = T.fit_image(image, 32, 48), T.inside(h, w, 32, 48)
    assert got.shape == (3, 32, 48) and abs(high / wide - h / w) < 0.2 * h / w and (high == 32 or wide == 48)
    within = got[:, top:top + high, left:left + wide]
    assert (within > -0.1).all() and (got == -1).sum() == 3 * (32 * 48 - high * wide)
    assert within[:, :, 0].max() < 0.2 and within[:, :, -1].min() > 0.8            # both sides are there


def test_clip_fault_names_black_static_and_unlike_clips():
    image, g = torch.rand(3, 32, 48) - 0.5, torch.Generator().manual_seed(0)
    video = (image + 0.1 * torch.randn(9, 3, 32, 48, generator=g)).clamp(-1, 1)
    assert T.clip_fault(video, image) == T.clip_fault(video[None], image) == ""
    assert T.clip_fault(video * 0 - 1, image) == "black"
    assert T.clip_fault(video[:1].expand(9, -1, -1, -1), image) == "static"
    assert T.clip_fault((video + 0.9).clamp(-1, 1), image) == "first frame unlike the image"


def test_a_small_image_and_weights_that_give_nan_stop_in_one_line(cog):
    fails("image of 8x7 is too small", next, cog.clips([(torch.zeros(3, 7, 8), "a fox", 0)]))
    z, ctx = torch.full((1, 3, 16, 4, 6), float("nan")), torch.zeros(2, 226, 32)
    fails("NaN or Inf at time step 999", next, cog.denoise(z, torch.zeros_like(z[:, :1]), ctx, 2))


def test_a_long_caption_is_cut_with_a_warning_and_a_lone_surrogate_is_read(cog, capsys):
    ids = cog.tokenize(["snow " * 300, "\ud800"])
    assert ids.shape == (2, 226) and ids[0, -1] == 1 and "cut to 226" in capsys.readouterr().err


# what a user's copy may lack is said before anything is computed

SHARD = "transformer/diffusion_pytorch_model-0000{}-of-00002.safetensors"
INDEX, SPIECE = "text_encoder/model.safetensors.index.json", "tokenizer/spiece.model"


def cut_short(path):
    return lambda hub: (hub / path).write_bytes((hub / path).read_bytes()[:5000])


def gone(path):
    return lambda hub: (hub / path).unlink()


def written(path, text):
    return lambda hub: (hub / path).write_text(text)


def changed(change):
    """The transformer's first shard with other tensors."""
    return lambda hub: save_file(change(load_file(hub / SHARD.format(1))), hub / SHARD.format(1))


def without_positions(tensors):
    return {k: v for k, v in tensors.items() if "pos_embedding" not in k}


def with_offset(tensors):
    return tensors | {"ofs_embedding.weight": torch.zeros(1)}


def without_image(tensors):
    name = "patch_embed.proj.weight"
    return tensors | {name: tensors[name][:, :16].clone()}


@pytest.mark.parametrize("match, damage", [
    ("00002-of-00002.safetensors: Error while deserializing header", cut_short(SHARD.format(2))),
    ("00002-of-00002.safetensors: No such file", gone(SHARD.format(2))),
    ("text_encoder.*index.json: lacks 'weight_map'", written(INDEX, "{}")),
    ("text_encoder: no weights", gone(INDEX)),
    ("config.json: lacks", written("vae/config.json", "{}")),
    ("vae.*config.json: No such file", gone("vae/config.json")),
    ("prediction_type epsilon; known is v_prediction",
     lambda hub: edit_json(hub / "scheduler" / "scheduler_config.json", prediction_type="epsilon")),
    ("spiece.model: .*download", written(SPIECE, "version https://git-lfs.github.com/spec/v1")),
    ("spiece.model: .*download", cut_short(SPIECE)),
    # siblings: 2B and text-to-video lack the position table or channels for the image, 1.5 has an offset
    ("transformer.*lacks 1 of .*pos_embedding", changed(without_positions)),
    ("transformer.*wrong shapes for 1 of .*proj.weight", changed(without_image)),
    ("transformer.*unknown 1 of .*ofs_embedding", changed(with_offset))])
def test_a_damaged_copy_is_named(tmp_path, match, damage):
    damage(copy_of(COG, tmp_path / "hub"))
    fails(match, T.CogVideoX.from_pretrained, tmp_path / "hub", "cpu")


def test_text_weights_stored_in_float16_are_upcast(tmp_path):
    for shard in (copy_of(COG, tmp_path / "hub") / "text_encoder").glob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(shard).items()}, shard)
    encoder = T.T5Encoder.from_pretrained(tmp_path / "hub", "cpu")
    assert encoder.shared.weight.dtype == torch.float32


# ------------------------------------------------------------------------------------- LLaVA: parity

KINDS = ["single", "multi", "odd", "big", "video"]


def visual(kind):
    return WANT["llava.video.frames_u8" if kind == "video" else f"llava.{kind}.image_u8"].numpy()


def test_tokens_equal_the_published_tokenizer(net):
    for text, ids in zip(CASES["token_strings"], WANT["llava.tokens"].tolist()):
        assert net.tokenizer.encode(text).ids == [i for i in ids if i >= 0], text


# an earlier upload; the miniature's, like the converter's today, puts line breaks in other places
EACH = "{% for content in message['content'] | selectattr('type', 'equalto', '"
EARLIER = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}" +
           EACH + "image') %}{{ '<image>' }}{% endfor %}" + EACH + "video') %}{{ '<video>' }}{% endfor %}" +
           EACH + r"text') %}{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
           r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("kinds", [["image"], ["video"], ["video", "video"]])
def test_the_prompt_is_the_published_templates_up_to_white_space(kinds):
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": "What {is} it?"}]

    def render(template):
        said = [{"role": "user", "content": content}]
        return jinja2.Template(template).render(messages=said, add_generation_prompt=True)

    prompt = T.chat("What {is} it?", *kinds)
    assert prompt == render(json.loads((LLAVA / "chat_template.json").read_text())["chat_template"])
    assert "".join(prompt.split()) == "".join(render(EARLIER).split())


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_ids_equal_the_published_processor(net, kind):
    mark = "video" if kind == "video" else "image"
    prompt = T.chat(CASES["questions"][kind == "video"], mark)
    assert prompt == CASES["prompts"][kind]
    ids, place = net.tokenizer.encode(prompt).ids, net.cfg[f"{mark}_token_index"]
    at = ids.index(place)
    ids[at:at + 1] = [place] * len(net.look(visual(kind)))
    assert ids == WANT[f"llava.{kind}.input_ids"][0].tolist()


@pytest.mark.parametrize("kind", ["single", "multi", "odd"])
def test_tiles_equal_the_published_processor(net, kind):
    tiles, _ = T.cut_tiles(visual(kind), net.size, net.cfg["image_grid_pinpoints"])
    assert np.array_equal(tiles, WANT[f"llava.{kind}.tiles_u8"][0].movedim(1, -1).numpy())


@pytest.mark.parametrize("kind", ["single", "multi", "video"])
def test_tower_and_projector_equal_the_reference(net, kind):
    with torch.no_grad():
        projected, tower = net.see(WANT[f"llava.{kind}.tiles_u8"][0].movedim(1, -1).numpy())
    close(f"llava.{kind}.tower_features", tower)
    close(f"llava.{kind}.projected", projected)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_the_reference(net, kind):
    row = net.row(visual(kind), CASES["questions"][kind == "video"])
    with torch.no_grad():
        logits = net.language_model.lm_head(net.language_model(row[None]))
    close(f"llava.{kind}.logits_last4", logits[:, -4:])
    close(f"llava.{kind}.logits_first8", logits[:, :, :8])
    assert net.generate_ids([row], max_new_tokens=12) == [WANT[f"llava.{kind}.generated"].tolist()]


# ----------------------------------------------------------------------------------- LLaVA: decoding

def test_cached_decoding_equals_uncached(net):
    row, words = net.row(visual("single"), "What is it?"), net.language_model.model.embed_tokens
    [said] = net.generate_ids([row], max_new_tokens=6)
    for n, token in enumerate(said):
        before = words(torch.tensor(said[:n], dtype=torch.long))
        assert int(net.prefill([torch.cat([row, before])])[0].argmax()) == token


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_says_what_each_prompt_says_alone(net, temperature):
    shown = [visual(kind) for kind in ("single", "video", "odd", "video")]
    asked = ["What is it?", "Describe the motion, please.", "Hello", "Is it day?"]
    batch = net.generate(shown, asked, 9, temperature, 0.95, [3, 4, 5, 6])
    for i, answer in enumerate(batch):
        assert [answer] == net.generate(shown[i:i + 1], asked[i:i + 1], 9, temperature, 0.95, [3 + i])


def test_generation_stops_at_the_end_token(net, monkeypatch):
    row = net.row(visual("single"), CASES["questions"][0])
    [said] = net.generate_ids([row], max_new_tokens=8)
    monkeypatch.setattr(net, "end_ids", [said[4]])
    assert net.generate_ids([row], max_new_tokens=8) == [said[:said.index(said[4])]]


def test_nucleus_draws_in_proportion_and_only_from_the_top():
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log().repeat(1000, 1)
    u = (torch.arange(1000) + 0.5) / 1000
    share = torch.bincount(T.nucleus(logits, 1.0, u), minlength=4) / 1000
    assert torch.allclose(share, torch.tensor([0.1, 0.5, 0.3, 0.1]), atol=2e-3)
    assert set(T.nucleus(logits, 0.7, u).tolist()) == {1, 2}


def test_an_image_may_come_as_pil_bytes_or_a_tensor_and_a_clip_may_be_short(net):
    u8 = visual("single")
    a, b, c = net.look(u8), net.look(Image.fromarray(u8)), net.look(to_tensor(u8))
    assert torch.equal(a, b) and torch.equal(a, c)
    assert T.even_frames(np.arange(16), 4).tolist() == [0, 5, 10, 15]
    assert T.even_frames(np.arange(3), 8).tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------- LLaVA: bad input

def test_shards_with_an_untied_head_load(net, tmp_path):
    hub, tensors = copy_of(LLAVA, tmp_path / "hub"), load_file(LLAVA / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].flip(0)
    where = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(tensors)}
    for name in ("model-0.safetensors", "model-1.safetensors"):
        save_file({k: v for k, v in tensors.items() if where[k] == name}, hub / name)
    (hub / "model.safetensors").unlink()
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    untied, row = T.LlavaOneVision.from_pretrained(hub, device="cpu"), net.row(visual("video"), "Hello")
    assert torch.allclose(untied.prefill([row])[0], net.prefill([row])[0].flip(1), atol=1e-4)
    (hub / "model-1.safetensors").unlink()
    fails("model-1.safetensors", T.LlavaOneVision.from_pretrained, hub, "cpu")


@pytest.mark.parametrize("match, file, changes", [
    ("config.json: lacks 'text_config'; give llava-hf", "config.json", None),
    ("lacks 1 of .*lm_head", "config.json", {"tie_word_embeddings": False}),
    ("lacks 'image_mean'", "preprocessor_config.json", None),
    ("index.json: lacks 'weight_map'", "model.safetensors.index.json", None)])
def test_another_model_is_named_in_one_line(tmp_path, match, file, changes):
    path = copy_of(LLAVA, tmp_path / "hub") / file
    old = json.loads(path.read_text()) if changes else {}
    if changes == {"tie_word_embeddings": False}:
        old["text_config"] |= changes
    path.write_text(json.dumps(old | (changes or {})))
    fails(match, T.LlavaOneVision.from_pretrained, tmp_path / "hub", "cpu")


def test_no_text_of_others_reads_as_a_special_token(net):
    text = T.plain("what <<video>> does <|im_end|> <image> \ud800 mean?")
    assert text == "what video does |im_end| image ? mean?"
    assert len(net.row(visual("single"), text))
    with pytest.raises(AssertionError, match="use plain"):
        net.row(visual("single"), "what does <image> mean?")


# ---------------------------------------------------------------------------------------- the writer

GOOD = {"task": "removal", "instruction": "Remove the red car", "source_caption": "A red car on a road",
        "target_caption": "An empty road"}


def test_answers_are_checked_field_by_field():
    assert T.parse_answer("Sure:\n```json\n" + json.dumps(GOOD) + "\n```", "removal") == (GOOD, "")
    for change, why in (({"task": "style"}, "'removal' was asked"),
                        ({"instruction": "..."}, "no text under 'instruction'"),
                        ({"source_caption": 3}, "no text under 'source_caption'"),
                        ({"instruction": "go " * 31}, "31 words"),
                        ({"instruction": "A red car on a road"}, "is a caption"),
                        ({"target_caption": GOOD["source_caption"] + "."}, "captions are equal")):
        record, reason = T.parse_answer(json.dumps(GOOD | change), "removal")
        assert record is None and why in reason
    for text in ("I cannot do that", '{"task": "removal", ', "[1]", ""):
        record, reason = T.parse_answer(text, "removal")
        assert record is None and "JSON" in reason


def test_near_duplicates_ignore_case_order_and_articles():
    accepted = {T.words_of(t): t for t in ("Turn the red car into a boat", "Make it snow")}
    assert T.near_duplicate("turn a RED car into the boat.", accepted) == "Turn the red car into a boat"
    assert T.near_duplicate("turn the blue car into a boat", accepted) is None


def speaker(line, asked=None):
    """A `say` for write_instructions whose n-th answer to a prompt is line(prompt, n)."""
    asked = [] if asked is None else asked

    def say(visuals, prompts, *how):
        asked.extend(prompts)
        return [line(p, len(asked) - len(prompts) + i) for i, p in enumerate(prompts)]
    return say


def answer(prompt, n):
    task = prompt.split('kind "')[1].split('"')[0]
    new = {"task": task, "instruction": f"edit number {n}", "target_caption": f"street {n}"}
    return json.dumps(GOOD | new)


def clips(n, frames=8):
    return [(f"clip{i}", torch.zeros(frames, 3, 4, 4)) for i in range(n)]


def test_the_task_mix_is_kept_and_earlier_records_count():
    mix = {"style": 1, "removal": 2, "texture": 1}
    records = list(T.write_instructions(speaker(answer), clips(8), mix))
    assert all(r["kept"] and set(T.FIELDS) < set(r) for r in records)
    assert sorted(r["task"] for r in records) == ["removal"] * 4 + ["style"] * 2 + ["texture"] * 2
    earlier = [r for r in records if r["task"] == "removal"]
    more = list(T.write_instructions(speaker(lambda p, n: answer(p, n + 8)), clips(4), mix, done=earlier))
    assert sorted(r["task"] for r in more) == ["style"] * 2 + ["texture"] * 2
    for mix in ({"styling": 1}, {"style": 0}, {"style": -1, "object": 1}):
        fails("task.mix", next, T.write_instructions(speaker(answer), clips(1), mix))


def test_refused_answers_are_asked_again_with_the_reason_and_then_dropped_with_it():
    asked = []
    say = speaker(lambda p, n: "no <image>" if n < 2 else answer(p, n), asked)
    record, = T.write_instructions(say, clips(1))
    assert record["kept"] and record["tries"] == 3
    assert "refused (not JSON" in asked[1] and "<image>" not in asked[1]
    asked = []
    say = speaker(lambda p, n: answer(p, max(n - 1, 0)), asked)
    records = list(T.write_instructions(say, clips(2), batch=1))
    assert [r["tries"] for r in records] == [1, 2] and "too close to 'edit number 0'" in asked[2]
    records = list(T.write_instructions(speaker(lambda p, n: "no idea"), [*clips(1, frames=0), *clips(1)]))
    assert not any(r["kept"] or "instruction" in r for r in records)
    assert records[0]["why"] == "no frames" and records[1]["why"].startswith("not JSON")


def test_the_small_model_runs_through_the_writer_and_its_nonsense_is_dropped(net):
    shown = [("a", visual("video")), ("b", visual("video"))]
    records, again = (list(T.write_instructions(net.generate, shown, frames=2, tries=1)) for _ in range(2))
    assert [r["kept"] for r in records] == [False, False] and all("JSON" in r["why"] for r in records)
    assert records == again


# ---------------------------------------------------------------------------------------------- LoRA

def test_fine_tuning_lowers_the_loss_and_the_merged_file_loads_again(tmp_path):
    net = T.LlavaOneVision.from_pretrained(LLAVA, device="cpu")
    torch.manual_seed(0)
    names, image = set(net.state_dict()), [visual("single")[:20, :20]]
    params = T.add_lora(net, rank=4)
    opt, losses = torch.optim.AdamW(params.values(), lr=1e-2), []
    for _ in range(8):
        loss = T.writer_loss(net, image, [GOOD])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    path = tmp_path / "writer.safetensors"
    T.save_lora(net, path)
    assert set(load_file(path)) == set(params) and list(tmp_path.iterdir()) == [path]
    with torch.no_grad():
        before = T.writer_loss(net, image, [GOOD])
        T.merge_lora(net)
        again = T.LlavaOneVision.from_pretrained(LLAVA, device="cpu", lora=path)
        assert torch.allclose(T.writer_loss(net, image, [GOOD]), before, atol=1e-4)
        assert torch.equal(T.writer_loss(again, image, [GOOD]), T.writer_loss(net, image, [GOOD]))
    assert set(net.state_dict()) == set(again.state_dict()) == names


def test_a_lora_of_bf16_weights_trains_and_loads_in_float32(tmp_path):
    net = T.LlavaOneVision.from_pretrained(LLAVA, device="cpu", dtype=torch.bfloat16)
    params = T.add_lora(net, rank=2)
    T.writer_loss(net, [visual("single")[:20, :20]], [GOOD]).backward()
    assert {p.dtype for p in params.values()} == {torch.float32}
    grads = [p.grad for p in params.values()]
    assert all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)
    path = tmp_path / "writer.safetensors"
    T.save_lora(net, path)
    again = T.LlavaOneVision.from_pretrained(LLAVA, "cpu", torch.bfloat16, lora=path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_untrained_lora_leaves_the_model_unchanged_and_a_batch_has_the_mean_loss_of_its_tokens():
    net = T.LlavaOneVision.from_pretrained(LLAVA, device="cpu")
    images, answers = [visual("single"), visual("video")], [GOOD, GOOD | {"instruction": "Remove the red"}]
    with torch.no_grad():
        one, two = (T.writer_loss(net, [i], [a]) for i, a in zip(images, answers))
        T.add_lora(net)
        assert torch.equal(T.writer_loss(net, images[:1], answers[:1]), one)
        assert min(one, two) < T.writer_loss(net, images, answers) < max(one, two)


@pytest.mark.parametrize("match, name", [
    ("not LoRA weights", "x"),
    ("lacks .*is it the file of another model", "language_model.model.layers.0.mlp.up_proj.lora_A")])
def test_lora_of_another_model_is_refused(tmp_path, match, name):
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(4, 7)}, path)
    fails("other.safetensors: " + match, T.LlavaOneVision.from_pretrained, LLAVA, "cpu", None, path)


def test_tasks_are_guessed_from_plain_instructions():
    for text, task in (("remove the dog", "removal"), ("add a hat to the man", "addition"),
                       ("make it a watercolor", "style"), ("turn the cat into a fox", "object"),
                       ("make it winter", "background"), ("make the car wooden", "texture"),
                       ("turn the cat into a fox and make it winter", "multiple")):
        assert T.guess_task(text) == task and task in T.WRITER_TASKS


# ----------------------------------------------------------------------------------------- the judge

def test_the_judge_gives_probabilities_that_depend_on_clips_and_instruction(net):
    a = to_video(visual("video"))[0]
    scores = T.judge_edit(net, a, a.flip(-1), "make it <image> snow", frames=3)
    assert set(scores) == {"follows", "preserves", "clean", "judge"}
    assert all(0 < p < 1 for p in scores.values())
    assert scores["judge"] ** 3 == pytest.approx(scores["follows"] * scores["preserves"] * scores["clean"])
    for edited, instruction in ((-a, "make it <image> snow"), (a.flip(-1), "rain")):
        other = T.judge_edit(net, a, edited, instruction, frames=3)
        assert other["follows"] != pytest.approx(scores["follows"], abs=1e-6)
    question = "Does the second clip follow the first?"
    assert net.probability_of_yes((a, -a), [question, "And is it clean?"], 3)[0] == pytest.approx(
        net.probability_of_yes((a, -a), [question], 3)[0], abs=1e-5)
