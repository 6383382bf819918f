"""LLaVA-OneVision: parity with the published implementation on a small copy of the published repository;
decoding, the writer, LoRA, the judge."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import metrics
from teachers import (FIELDS, WRITER_TASKS, LlavaOneVision, add_lora, cut_tiles, even_frames, guess_task, judge_edit, merge_lora, near_duplicate, nucleus, parse_answer, read_chat_template, read_tokenizer, save_lora, write_instructions, writer_loss)
from teachers import words_of
from model import UserError
from sample import write_video

GOLDENS = MANIFESTS = Path(__file__).parent / "goldens"
HUB = GOLDENS / "llava-onevision-qwen2-0.5b-ov-hf"
GOLD, CASES = load_file(HUB / "expected.safetensors"), json.loads((HUB / "cases.json").read_text(encoding="utf-8"))
ATOL = {k: v["atol"] for k, v in json.loads((HUB / "tolerance.json").read_text()).items()}
KINDS = ["single", "multi", "odd", "big", "video"]


@pytest.fixture(scope="module")
def net():
    return LlavaOneVision.from_pretrained(HUB, device="cpu")


def visual(kind):
    return GOLD["video.frames_u8" if kind == "video" else f"{kind}.image_u8"].numpy()


def close(name, ours):
    assert ours.shape == GOLD[name].shape, name
    assert (ours - GOLD[name]).abs().max() <= ATOL[name], name


# --- parity

def test_tokens_equal_the_published_tokenizer_from_either_kind_of_file(net, tmp_path):
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        shutil.copy(HUB / name, tmp_path)
    for tokenizer in (net.tokenizer, read_tokenizer(tmp_path)):
        for text, ids in zip(CASES["token_strings"], GOLD["tokens"].tolist()):
            assert tokenizer.encode(text).ids == [i for i in ids if i >= 0], text


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_ids_equal_the_published_processor(net, kind):
    prompt = net.chat(CASES["questions"][kind == "video"], images=kind != "video", videos=kind == "video")
    assert prompt == CASES["prompts"][kind]
    assert torch.equal(net.input_ids(prompt, [len(net.look(visual(kind)))])[None], GOLD[f"{kind}.input_ids"])


@pytest.mark.parametrize("kind", ["single", "multi", "odd"])
def test_tiles_equal_the_published_processor(net, kind):
    tiles = cut_tiles(visual(kind), net.size, net.cfg["image_grid_pinpoints"])
    assert np.array_equal(tiles, GOLD[f"{kind}.tiles_u8"][0].movedim(1, -1).numpy())


@pytest.mark.parametrize("kind", ["single", "multi", "video"])
def test_tower_and_projector_equal_the_reference(net, kind):
    with torch.no_grad():
        projected, tower = net.see(GOLD[f"{kind}.tiles_u8"][0].movedim(1, -1).numpy())
    close(f"{kind}.tower_features", tower)
    close(f"{kind}.projected", projected)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_the_reference(net, kind):
    row = net.row(visual(kind), CASES["questions"][kind == "video"])
    with torch.no_grad():
        logits = net.language_model.lm_head(net.language_model(row[None]))
    close(f"{kind}.logits_last4", logits[:, -4:])
    close(f"{kind}.logits_first8", logits[:, :, :8])
    assert net.generate_ids([row], max_new_tokens=12) == [GOLD[f"{kind}.generated"].tolist()]


@pytest.mark.parametrize("size", ["0_5b", "7b"])
def test_names_and_shapes_equal_the_published_files(size):
    manifest = json.loads((MANIFESTS / f"llava_onevision_qwen2_{size}.json").read_text())
    with torch.device("meta"):
        net = LlavaOneVision(manifest["config"])
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == manifest["tensors"]


# --- decoding

def test_cached_decoding_equals_uncached(net):
    rows = [net.row(visual("single"), "What is it?")]
    said = net.generate_ids(rows, max_new_tokens=6)[0]
    for n, token in enumerate(said):
        before = torch.tensor(said[:n], dtype=torch.long)
        x = torch.cat([rows[0], net.language_model.model.embed_tokens(before)])
        assert int(net.prefill([x])[0].argmax()) == token


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_says_what_each_prompt_says_alone(net, temperature):
    shown = [visual(kind) for kind in ("single", "video", "odd", "video")]
    asked = ["What is it?", "Describe the motion, please.", "Hello", "Is it day?"]
    batch = net.generate(shown, asked, 9, temperature, 0.95, [3, 4, 5, 6])
    for i, answer in enumerate(batch):
        assert [answer] == net.generate(shown[i:i + 1], asked[i:i + 1], 9, temperature, 0.95, [3 + i])


def test_generation_stops_at_the_end_token(net):
    row = net.row(visual("single"), CASES["questions"][0])
    said = net.generate_ids([row], max_new_tokens=8)[0]
    net.end_ids, end = [said[4]], net.end_ids
    assert net.generate_ids([row], max_new_tokens=8)[0] == said[:said.index(said[4])]
    net.end_ids = end


def test_nucleus_draws_in_proportion_and_only_from_the_top():
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log().repeat(1000, 1)
    u = (torch.arange(1000) + 0.5) / 1000
    share = torch.bincount(nucleus(logits, 1.0, u), minlength=4) / 1000
    assert torch.allclose(share, torch.tensor([0.1, 0.5, 0.3, 0.1]), atol=2e-3)
    assert set(nucleus(logits, 0.7, u).tolist()) == {1, 2}


def test_an_image_may_come_as_pil_bytes_or_a_tensor(net):
    u8 = visual("single")
    tensor = torch.from_numpy(u8.copy()).permute(2, 0, 1) / 127.5 - 1
    a, b, c = net.look(u8), net.look(Image.fromarray(u8)), net.look(tensor)
    assert torch.equal(a, b) and torch.equal(a, c)


# --- bad input

def test_shards_with_an_untied_head_load_and_a_missing_one_is_named(net, tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(HUB, folder, ignore=shutil.ignore_patterns("model.safetensors", "expected.safetensors"))
    tensors = load_file(HUB / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].flip(0)
    shards = {f"model-{i}.safetensors": list(tensors)[i::2] for i in range(2)}
    for name, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, folder / name)
    index = {"weight_map": {k: name for name, keys in shards.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    untied, row = LlavaOneVision.from_pretrained(folder, device="cpu"), net.row(visual("video"), "Hello")
    assert torch.allclose(untied.prefill([row])[0], net.prefill([row])[0].flip(1), atol=1e-4)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="model-1.safetensors"):
        LlavaOneVision.from_pretrained(folder, device="cpu")


def test_another_model_and_a_wrong_index_are_named_in_one_line(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in HUB.iterdir():
        if path.is_file() and path.name not in ("config.json", "expected.safetensors"):
            (folder / path.name).symlink_to(path)
    config = json.loads((HUB / "config.json").read_text())
    for cfg in (config | {"model_type": "llava"}, {"hidden_size": 8}):
        (folder / "config.json").write_text(json.dumps(cfg))
        with pytest.raises(UserError, match="config.json: not LLaVA-OneVision's") as error:
            LlavaOneVision.from_pretrained(folder, device="cpu")
        assert "\n" not in str(error.value)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: has no weight_map"):
        LlavaOneVision.from_pretrained(folder, device="cpu")


def test_a_missing_head_that_is_not_tied_is_refused(tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(HUB, folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lm_head"):
        LlavaOneVision.from_pretrained(folder, device="cpu")


def test_a_prompt_that_names_a_placeholder_is_refused(net):
    with pytest.raises(UserError, match="places for 1"):
        net.row(visual("single"), "what does <image> mean?")


def test_a_short_clip_is_refused_with_both_numbers():
    with pytest.raises(UserError, match="4 frames, not the 8 asked"):
        even_frames(torch.zeros(4, 3, 8, 8), 8)


def test_white_space_of_the_chat_template_comes_from_the_file(tmp_path):
    text = ("{% for m in messages %}{{'<|im_start|>' + message['role'] + ' '}}{{ '<image>' }}{{ '<video>' }}"
            r"{{ '\n' + content['text'] }}{{'<|im_end|>'}}{% endfor %}{{ '<|im_start|>assistant\n' }}")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert read_chat_template(tmp_path) == dict(role=" ", image="<image>", video="<video>", text="\n",
                                                end="<|im_end|>", ask="<|im_start|>assistant\n")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "USER: <image>"}))
    with pytest.raises(UserError, match="chat_template.json: no 'role'"):
        read_chat_template(tmp_path)


# --- the writer

GOOD = dict(task="removal", instruction="Remove the red car", source_caption="A red car on a road",
            target_caption="An empty road")


def test_answers_are_checked_field_by_field():
    assert parse_answer("Sure:\n```json\n" + json.dumps(GOOD) + "\n```", "removal") == (GOOD, "")
    for change, why in ((dict(task="style"), "'removal' was asked"),
                        (dict(instruction="..."), "no text under 'instruction'"),
                        (dict(source_caption=3), "no text under 'source_caption'"),
                        (dict(instruction="go " * 31), "31 words"),
                        (dict(instruction="A red car on a road"), "is a caption"),
                        (dict(target_caption=GOOD["source_caption"] + "."), "captions are equal")):
        record, reason = parse_answer(json.dumps({**GOOD, **change}), "removal")
        assert record is None and why in reason
    for text in ("I cannot do that", '{"task": "removal", ', "[1]", ""):
        record, reason = parse_answer(text, "removal")
        assert record is None and "JSON" in reason


def test_near_duplicates_ignore_case_order_and_articles():
    accepted = {words_of(t): t for t in ("Turn the red car into a boat", "Make it snow")}
    assert near_duplicate("turn a RED car into the boat.", accepted) == "Turn the red car into a boat"
    assert near_duplicate("turn the blue car into a boat", accepted) is None


def speaker(line, asked=None):
    """A `say` for write_instructions whose n-th answer to a prompt is line(prompt, n)."""
    asked = [] if asked is None else asked

    def say(visuals, prompts, *how):
        asked.extend(prompts)
        return [line(p, len(asked) - len(prompts) + i) for i, p in enumerate(prompts)]
    return say


def answer(prompt, n):
    task = prompt.split('kind "')[1].split('"')[0]
    return json.dumps(dict(task=task, instruction=f"edit number {n}", source_caption="a street",
                           target_caption=f"street {n}"))


def clips(n, frames=8):
    return [(f"clip{i}", torch.zeros(frames, 3, 4, 4)) for i in range(n)]


def test_the_task_mix_is_kept_and_earlier_records_count():
    mix = dict(style=1, removal=2, texture=1)
    records = list(write_instructions(speaker(answer), clips(8), mix))
    assert all(r["kept"] and set(FIELDS) < set(r) for r in records)
    assert sorted(r["task"] for r in records) == ["removal"] * 4 + ["style"] * 2 + ["texture"] * 2
    earlier = [r for r in records if r["task"] == "removal"]
    more = list(write_instructions(speaker(lambda p, n: answer(p, n + 8)), clips(4), mix, done=earlier))
    assert sorted(r["task"] for r in more) == ["style"] * 2 + ["texture"] * 2


def test_invalid_answers_are_retried_with_the_reason_and_then_dropped_with_it():
    asked = []
    say = speaker(lambda p, n: "no <image>" if n < 2 else answer(p, n), asked)
    record, = write_instructions(say, clips(1))
    assert record["kept"] and record["tries"] == 3
    assert "refused (not JSON" in asked[1] and "<image>" not in asked[1]
    record, = write_instructions(speaker(lambda p, n: "no idea"), clips(1))
    assert not record["kept"] and record["why"].startswith("not JSON") and "instruction" not in record


def test_a_repeated_instruction_is_asked_again():
    asked = []
    say = speaker(lambda p, n: answer(p, max(n - 1, 0)), asked)
    records = list(write_instructions(say, clips(2), batch=1))
    assert [r["tries"] for r in records] == [1, 2] and "too close to 'edit number 0'" in asked[2]


def test_a_short_clip_is_dropped_and_the_rest_goes_on():
    records = list(write_instructions(speaker(answer), [*clips(1, frames=3), *clips(1)]))
    assert [r["kept"] for r in records] == [False, True] and "3 frames, not the 8" in records[0]["why"]


def test_an_unknown_task_in_the_mix_is_refused():
    with pytest.raises(UserError, match="task.mix"):
        next(write_instructions(speaker(answer), clips(1), dict(styling=1)))


def test_the_small_model_runs_through_the_writer_and_its_nonsense_is_dropped(net):
    shown = [("a", visual("video")), ("b", visual("video"))]
    run = lambda: list(write_instructions(net.generate, shown, frames=2, tries=1))
    records = run()
    assert [r["kept"] for r in records] == [False, False] and all("JSON" in r["why"] for r in records)
    assert records == run()


# --- LoRA

def test_fine_tuning_lowers_the_loss_and_the_merged_file_loads_again(tmp_path):
    net = LlavaOneVision.from_pretrained(HUB, device="cpu")
    torch.manual_seed(0)
    names, image = set(net.state_dict()), [visual("single")[:20, :20]]
    params = add_lora(net, rank=4)
    assert all(".lora_" in n for n in params)
    opt, losses = torch.optim.AdamW(params.values(), lr=1e-2), []
    for _ in range(8):
        loss = writer_loss(net, image, [GOOD])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    save_lora(net, tmp_path / "writer.safetensors")
    with torch.no_grad():
        before = writer_loss(net, image, [GOOD])
        merge_lora(net)
        again = LlavaOneVision.from_pretrained(HUB, device="cpu", lora=tmp_path / "writer.safetensors")
        assert torch.allclose(writer_loss(net, image, [GOOD]), before, atol=1e-4)
        assert torch.equal(writer_loss(again, image, [GOOD]), writer_loss(net, image, [GOOD]))
    assert set(net.state_dict()) == names and [p.name for p in tmp_path.iterdir()] == ["writer.safetensors"]


def test_a_lora_of_bf16_weights_trains_in_float32():
    net = LlavaOneVision.from_pretrained(HUB, device="cpu", dtype=torch.bfloat16)
    params = add_lora(net, rank=2)
    writer_loss(net, [visual("single")[:20, :20]], [GOOD]).backward()
    assert {p.dtype for p in params.values()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in params.values())
    assert any(p.grad.any() for p in params.values())


def test_untrained_lora_leaves_the_model_unchanged_and_a_batch_has_the_mean_loss_of_its_tokens():
    net = LlavaOneVision.from_pretrained(HUB, device="cpu")
    images, answers = [visual("single"), visual("video")], [GOOD, {**GOOD, "instruction": "Remove the red"}]
    with torch.no_grad():
        one, two = (writer_loss(net, [i], [a]) for i, a in zip(images, answers))
        add_lora(net)
        assert torch.equal(writer_loss(net, images[:1], answers[:1]), one)
        assert min(one, two) < writer_loss(net, images, answers) < max(one, two)


def test_lora_of_another_model_is_refused(net, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"language_model.model.layers.0.mlp.up_proj.lora_A": torch.zeros(4, 7)}, path)
    with pytest.raises(UserError, match="not LoRA weights of this model"):
        LlavaOneVision.from_pretrained(HUB, device="cpu", lora=path)


def test_tasks_are_guessed_from_plain_instructions():
    for text, task in (("remove the dog", "removal"), ("add a hat to the man", "addition"),
                       ("make it a watercolor", "style"), ("turn the cat into a fox", "object"),
                       ("make it winter", "background"), ("make the car wooden", "texture"),
                       ("turn the cat into a fox and make it winter", "multiple")):
        assert guess_task(text) == task and task in WRITER_TASKS


# --- the judge

def test_the_judge_gives_probabilities_that_depend_on_clips_and_instruction(net):
    a = torch.from_numpy(visual("video").copy()).permute(0, 3, 1, 2) / 127.5 - 1
    scores = judge_edit(net, a, a.flip(-1), "make it <image> snow", frames=3)
    assert set(scores) == {"follows", "preserves", "clean", "judge"}
    assert all(0 < p < 1 for p in scores.values())
    assert scores["judge"] ** 3 == pytest.approx(scores["follows"] * scores["preserves"] * scores["clean"])
    other = judge_edit(net, a, -a, "make it snow", frames=3)
    assert other["follows"] != pytest.approx(scores["follows"], abs=1e-6)
    question = "Does the second clip follow the first?"
    assert net.probability_of_yes((a, -a), [question, "And is it clean?"], 3)[0] == pytest.approx(
        net.probability_of_yes((a, -a), [question], 3)[0], abs=1e-5)


def test_scores_by_the_judge_are_those_of_the_clips_it_is_shown(net):
    a = visual("video")
    b = a[:, ::-1].copy()
    clip = {"edits": {"turned": b, "as it was": a}, "source": a, "instruction": "turn it upside down"}
    [row] = metrics.score_clips([clip], {"judge": HUB})
    for name, x in clip["edits"].items():
        want = judge_edit(net, a, x, clip["instruction"], len(a))
        want = [want[k] for k in ("follows", "preserves", "clean")]
        assert [row[name][key] for key in metrics.JUDGED] == pytest.approx(want)
    [row] = metrics.score_clips([clip | {"instruction": ""}], {"judge": HUB})
    assert "judge_clean" not in row["turned"]


def test_the_judge_has_its_lines_for_one_clip_and_its_columns_in_a_table(tmp_path, capsys):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, torch.rand(1, 4, 3, 32, 32) * 2 - 1, 8)
    none = ["--clip", "none", "--pick", "none", "--viclip", "none", "--device", "cpu", "--scorers", "published"]
    metrics.main_clip([str(tmp_path / "a.mp4"), "--source", str(tmp_path / "b.mp4"), "--instruction", "snow", *none,
                       "--judge", str(HUB)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("judge: ")]
    assert [line.split()[1] for line in lines] == ["follows", "keeps", "clean"]
    assert not any("left out" in line for line in lines)
    metrics.main_clip([str(tmp_path / "a.mp4"), *none, "--judge", str(HUB)])
    assert "left out: needs --source and --instruction" in capsys.readouterr().out
    metrics.main_shapes(["--weights", str(GOLDENS / "instruct-pix2pix"), "--n", "1", "--frames", "2", "--size", "16",
                         "--steps", "1", "--no-image-control", "--out", str(tmp_path / "out"), *none,
                         "--judge", str(HUB)])
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert "judge: follows ↑ | judge: keeps ↑ | judge: clean ↑" in head


@pytest.mark.parametrize("how", ["it started from that round", "that round made its data"])
def test_a_judge_that_chose_the_training_clips_is_refused_unless_told(tmp_path, capsys, how):
    before = str(tmp_path / "runs" / "round1")
    started = how == "it started from that round"
    for name, chosen_by in (("round1", {"judge": "x", "mark": metrics.judge_mark(HUB)}), ("round2", None)):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "dataset.json").write_text(json.dumps({"filtered_by": chosen_by} | (
            {"weights": before} if name == "round2" and not started else {"weights": "tiny"})))
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name, weights in (("round2", before if started else "tiny"), ("round1", None)):
        args = {"train_on": [str(tmp_path / "data" / name)], "weights": weights}
        (tmp_path / "runs" / name / "meta.json").write_text(json.dumps({"args": args}))
    run = tmp_path / "runs" / "round2"
    with pytest.raises(UserError, match="it chose the clips of .*round1.*--same-judge"):       # a round earlier
        metrics.check_judge(HUB, run, told=False)
    metrics.check_judge(HUB, run, told=True)
    assert "flatter" in capsys.readouterr().out
    shutil.copytree(HUB, tmp_path / "other", ignore=shutil.ignore_patterns("expected*"))       # the same, elsewhere
    with pytest.raises(UserError, match="--same-judge"):
        metrics.check_judge(tmp_path / "other", run, told=False)
    weights = load_file(HUB / "model.safetensors")
    (tmp_path / "other" / "model.safetensors").unlink()
    save_file({k: v * 1.01 for k, v in weights.items()}, tmp_path / "other" / "model.safetensors")
    metrics.check_judge(tmp_path / "other", run, told=False)                                   # another judge may
    shutil.rmtree(tmp_path / "data" / "round1")
    metrics.check_judge(HUB, run, told=False)
    assert "gone, so nobody knows" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such directory"):
        metrics.check_judge(tmp_path / "none", run, told=False)
