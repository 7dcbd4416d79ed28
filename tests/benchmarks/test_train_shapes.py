"""Training the embedded model, for a few steps: it resumes as if it had not stopped, and what it exports runs."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import train_shapes

from flashu import TextToImagePipeline


def train(part, out, *arguments, processes=1):
    common = ("--out", out, "--device", "cpu", "--batch-size", 8, "--statistics", 16, "--processes", processes)
    train_shapes.main([part, *map(str, (*common, *arguments))])


def state(out, part):
    return torch.load(out / part / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of the VAE, in two pieces and in one; and two of the model, by two processes."""
    pieces, whole = tmp_path_factory.mktemp("pieces"), tmp_path_factory.mktemp("whole")
    train("vae", pieces, "--steps", 1)
    train("vae", pieces, "--steps", 2)
    train("vae", whole, "--steps", 2)
    train("model", pieces, "--steps", 2, processes=2)
    return pieces, whole


def test_training_goes_on_as_if_it_had_not_stopped(trained):
    pieces, whole = (state(out, "vae") for out in trained)
    assert pieces["step"] == whole["step"] == 2
    for part in ("weights", "average"):
        for name, value in whole[part].items():
            assert torch.equal(value, pieces[part][name]), name


def test_every_matrix_moves_a_little_whichever_process_owns_it(trained):
    options = SimpleNamespace(seed=0, device=torch.device("cpu"))
    before, after = train_shapes.new_model(options).state_dict(), state(trained[0], "model")["weights"]
    moved = {name: (after[name] - before[name]).abs().max() for name in after if name.endswith("_proj.weight")}
    assert len(moved) > 70
    assert all(0 < change < 1e-3 for change in moved.values()), "two steps, at the start of the warm-up"


def test_joined_layers_learn_as_others_do_also_after_going_on(trained, tmp_path, monkeypatch):
    """As they are on CUDA, where a step was once seen to change nothing of them."""
    unjoined = train_shapes.new_model

    def weights_after(steps, name, new_model):
        monkeypatch.setattr(train_shapes, "new_model", new_model)
        train("model", tmp_path / name, "--steps", steps)
        return state(tmp_path / name, "model")["weights"]

    for name in ("joined", "apart"):
        shutil.copytree(trained[0] / "vae", tmp_path / name / "vae")
    first = weights_after(1, "joined", joined(unjoined))
    last = weights_after(2, "joined", joined(unjoined))
    apart = weights_after(2, "apart", unjoined)
    assert all(torch.equal(value, apart[name]) for name, value in last.items())
    stood_still = [name for name in first if torch.equal(first[name], last[name])]
    assert all("norm" in name for name in stood_still), "so early, what is near 1 moves by less than its rounding"


def joined(new_model):
    def new_joined_model(options):
        model = new_model(options)
        model.join()
        return model

    return new_joined_model


def test_batches_that_other_processes_draw_train_the_same(trained, tmp_path):
    train("vae", tmp_path, "--steps", 2, "--loaders", 2)
    drawn, here = (state(out, "vae")["weights"] for out in (tmp_path, trained[1]))
    assert all(torch.equal(value, drawn[name]) for name, value in here.items())


def test_another_number_of_processes_is_refused(trained, capsys):
    with pytest.raises(SystemExit, match="2"):
        train("model", trained[0], processes=1)
    assert "was trained by 2 processes; go on with --processes 2" in capsys.readouterr().err


def test_a_batch_that_processes_cannot_share_is_refused(trained, capsys):
    with pytest.raises(SystemExit, match="2"):
        train("vae", trained[0], "--batch-size", 7, processes=2)
    assert "--batch-size is 7; it must be a multiple of the 2 processes" in capsys.readouterr().err


def test_export_is_a_checkpoint_that_draws(trained, tmp_path):
    train("export", trained[0], "--to", tmp_path / "exported")
    picture = TextToImagePipeline.from_pretrained(tmp_path / "exported")("a red circle", num_inference_steps=3)[0]
    assert picture.size == (64, 64)


def test_losses_are_logged(trained):
    lines = [json.loads(line) for line in (trained[0] / "vae" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all({"seconds", "l1", "l2", "scale"} <= line.keys() for line in lines)
