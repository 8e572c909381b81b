"""``model.decoder = "tiny"``: some updates compare it with the VAE; a run that has gone back to the VAE stays there."""

import pytest
import torch
from _tiny import Z_DIM, tae_weights
from safetensors.torch import save_file

from lowmem_drf.commands.train import train_command
from lowmem_drf.models.tiny.network import Sizes
from lowmem_drf.training.checkpoint import checkpoint_folder, load_checkpoint
from lowmem_drf.training.metrics import read_metrics


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tae") / "tae.safetensors"
    save_file(tae_weights(Sizes(Z_DIM, (4, 4, 4, 4))), file)
    return file


def cosines(run):
    return {row["step"]: row["decoder_cosine"] for row in read_metrics(run) if "decoder_cosine" in row}


def test_a_run_is_checked_falls_back_and_stays_there(tiny_preset, tiny_run, tiny_file, tmp_path, capsys):
    """A random decoder's gradient is far off; with the bound at -1 it is used all the same."""
    run, quick = tmp_path / "run", ["log.sample_every=0", "log.eval_prompts=0", "log.watch_every=0"]
    tiny = ["model.decoder=tiny", f"model.decoder_file={tiny_file}", "model.decoder_check_every=2", *quick]
    train_command(str(tiny_preset), None, run, 2, None, False, [*tiny, "model.decoder_least_cosine=-1"], False)
    assert list(cosines(run)) == [1] and -0.9 < cosines(run)[1] < 0.9
    assert "tiny decoder (compared every 2 updates)" in capsys.readouterr().out
    saved, exact = (load_checkpoint(checkpoint_folder(one, step)) for one, step in ((run, 2), (tiny_run, 3)))
    assert saved.tiny_cosine is exact.tiny_cosine is None
    first, expected = read_metrics(run)[0], read_metrics(tiny_run)[0]
    assert (first["reward"], first["grad_norm"]) == (expected["reward"], expected["grad_norm"])  # by the VAE
    assert read_metrics(run)[1]["reward"] != read_metrics(tiny_run)[1]["reward"]

    train_command(None, None, run, 3, None, True, ["model.decoder_least_cosine=0.9"], False)
    assert list(cosines(run)) == [1, 3]
    said = capsys.readouterr().out
    assert f"update 3: the tiny decoder's gradient has a cosine of {cosines(run)[3]:.2f} with the VAE's" in said
    assert load_checkpoint(checkpoint_folder(run)).tiny_cosine == cosines(run)[3]
    train_command(None, None, run, 5, None, True, [], False)
    assert list(cosines(run)) == [1, 3]
    assert "below model.decoder_least_cosine = 0.9: from here on the VAE alone" in capsys.readouterr().out
    assert torch.isfinite(torch.tensor([row["reward"] for row in read_metrics(run)])).all()
