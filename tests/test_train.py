"""train.py: a cut run goes on exactly where it was, and what goes wrong says so."""
import json
import math

import numpy as np
import pytest
import torch

import curate
import train
from model import UserError


def small_fit(out, steps=8, cut_at=None, args=None, losses=None, nan_at=None):
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
    meta = dict(stage="test", args=args or dict(steps=steps))
    return train.fit(net, loss_fn, out, meta, steps, 1e-2, 16, warmup=2, save_minutes=0)


def test_a_cut_run_continues_with_the_loss_and_weights_of_an_uninterrupted_one(tmp_path):
    whole, parts = [], []
    want = small_fit(tmp_path / "whole", losses=whole).state_dict()
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path / "cut", cut_at=5, losses=parts)
    (tmp_path / "cut" / "state.tmp").write_bytes(b"half a checkpoint")         # what a kill while saving leaves behind
    got = small_fit(tmp_path / "cut", losses=parts).state_dict()
    assert parts == whole
    assert all(torch.equal(got[k], want[k]) for k in want)


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


def test_every_known_word_is_one_token_and_the_end_token_is_last(tmp_path):
    tokenizer = train.train_tokenizer(tmp_path)
    assert all(len(tokenizer.encode(w)) == 1 for w in curate.known_words())
    assert tokenizer.end == max(tokenizer.vocab.values())
    assert len(tokenizer.encode("zxqv")) > 1                                  # an unknown word falls into pieces


def test_world_shards_are_the_same_whenever_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 6)
    for name in ("a", "b"):
        train.draw_shard(tmp_path / name, 3, 32)
    a, b = (np.load(tmp_path / f"{n}.npy") for n in "ab")
    assert np.array_equal(a, b) and a.shape[:2] == (6, 2)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_batches_hold_about_the_same_number_of_pixels_at_any_aspect():
    shards = {hw: [(np.zeros((500, 2, *hw, 3), np.uint8), [{}] * 500)] for hw in ((96, 96), (96, 168), (168, 96))}
    sizes = {hw: len(train.pick(s, 24, torch.Generator().manual_seed(0))[2]) * hw[0] * hw[1] for hw, s in shards.items()}
    assert max(sizes.values()) < 1.1 * min(sizes.values())


def test_contrastive_loss_takes_equal_texts_as_equally_right():
    a = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    a[1] = a[0]
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    assert train.match(a, a, 100.0, same) < train.match(a, a, 100.0, torch.eye(4, dtype=torch.bool)) + 1e-6
    assert train.match(a, a, 100.0, same) < math.log(2) + 0.05               # no better than a coin between the equal two


@pytest.mark.parametrize("flag, value", [("--steps", "0"), ("--size", "50"), ("--pairs", "0")])
def test_values_out_of_range_name_the_flag(flag, value):
    with pytest.raises(UserError, match=flag):
        train.parse_args([flag, value])


def test_stage_image_without_its_networks_says_which_stage_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 2)
    with pytest.raises(UserError, match="--stage vae first"):
        train.main(["--stage", "image", "--pairs", "2", "--size", "32", "--data", str(tmp_path / "d"), "--runs", str(tmp_path / "r")])
