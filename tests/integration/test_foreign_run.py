"""hdm-evaluate on a run of somebody else's: nothing in its configuration is run, resolved, or written to."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from hdm_lightning.cli import evaluate
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.subject import find_run
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training.recorded import (
    LARGEST_BYTES,
    model_config_from,
    read_recorded,
    recorded_settings,
    train_settings_from,
)
from hdm_lightning.training.recorded_data import recorded_training_stream
from hdm_lightning.training.stages import plan_stages
from toy_run import MODEL, write_final

LOSS = ["--parts", "loss", "--loss-samples", "4", "--time-bins", "2", "--resamples", "10", "--samples", "4"]
SECRET = "AKIA-not-for-you"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_text_encoder, tiny_autoencoder, tiny_shards):
    """A run's folder with a final model, as downloaded, and its configuration."""
    folder = tmp_path_factory.mktemp("downloaded") / "run"
    config: XUTConfig = model_config_from(MODEL)
    torch.manual_seed(0)
    kept = {"training": {"samples": 8, "name": "toy"}, "context_length": 8}
    kept["sampling"] = {"height": 16, "width": 16, "steps": 2, "guidance_scale": 1.0}
    write_final(folder / "final", tiny_text_encoder, tiny_autoencoder, XUT(config).state_dict(), config=config, **kept)
    record = {
        "name": "toy",
        "run_dir": str(folder),
        "model": MODEL,
        "text_encoder": {"name": str(tiny_text_encoder), "max_batch": 8},
        "vae": {"name": str(tiny_autoencoder), "max_batch": 8},
        "data": {"train": str(tiny_shards), "workers": 0, "lanes": 4, "window": 4},
        "optimizer": {"name": "muon", "rule": "mup", "eps": 1e-8, "muon_momentum": 0.9, "muon_rounds": 5},
        "trainer": {"accelerator": "cpu", "nodes": 1, "compile": True, "threads": 1, "static_graph": False},
        "callbacks": {
            "ema": {"halflife_samples": [16], "ramp": 0.05, "sigma_rel": [0.1], "snapshot_every": 0},
            "checkpoints": {"keep": 5, "every_minutes": 20.0},
            "pictures": {"prompts": [], "steps": 3},
            "progress_bar": False,
            "extra": {},
        },
        "logger": {"every_steps": 20, "time_bins": 8},
        "schedule": {
            "stages": {
                "one": {
                    "resolution": 16,
                    "samples": 8,
                    "batch_size": 8,
                    "micro_batch_size": 4,
                    "learning_rate": 0.1,
                    "context_length": 8,
                }
            }
        },
    }  # as an earlier version wrote it
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    return folder


def test_a_record_of_an_earlier_version_is_read_by_the_keys_of_now(run):
    settings = recorded_settings(run / "config.yaml")
    assert settings.optimizer["_target_"] == "hdm_lightning.training.optimization.muon.MuonAdamW"
    assert settings.optimizer["momentum"] == 0.9 and "name" not in settings.optimizer
    assert (settings.hardware.compile, settings.hardware.threads) == (True, 1)
    assert settings.callback("weight_averages")["sigma_rel"] == [0.1]
    assert settings.callback("checkpoint")["keep"] == 5
    assert settings.callback("sample_images")["steps"] == 3
    assert settings.data["num_workers"] == 0


@pytest.fixture
def foreign(run, tmp_path):
    """Makes a copy of the run whose `data` group is another."""

    def make(**data):
        folder = tmp_path / "foreign"
        shutil.copytree(run, folder)
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        config["data"].update(data)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
        return folder

    return make


@pytest.fixture
def listener():
    """A server on loopback; `paths` holds what was asked of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.paths.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths = []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def result(out):
    return json.loads((out / "evaluation.json").read_text())


def test_the_run_itself_is_evaluated_on_its_own_data(run, tmp_path):
    assert evaluate.main([str(run), *LOSS, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("pattern", ["http://127.0.0.1:9/0.tar", "{{pipe:touch {mark};,x}}/0.tar"])
@pytest.mark.parametrize("named", [[], ["final"], ["final/transformer/diffusion_pytorch_model.safetensors"]])
def test_a_command_in_its_configuration_never_runs(foreign, tiny_shards, tmp_path, capsys, pattern, named):
    mark, shards = tmp_path / "ran", str(tiny_shards)
    source = {"urls": pattern.format(mark=mark), "index": f"pipe:touch {mark}; cat {shards}/index.json"}
    folder = foreign(train=[source])
    model = str(folder.joinpath(*named))
    assert evaluate.main([model, *LOSS, "--out", str(tmp_path / "own")]) == 2
    said = capsys.readouterr().err
    assert "only folders and http(s) addresses are opened" in said and "--data" in said
    assert evaluate.main([model, *LOSS, "--data", shards, "--out", str(tmp_path / "given")]) == 0
    both = ["--data", shards, "--train-data", shards]
    assert evaluate.main([model, *LOSS, *both, "--out", str(tmp_path / "both")]) == 0
    assert not mark.exists()


@pytest.mark.parametrize(
    "address",
    [
        "pipe:touch MARK",
        "reference://::MARK",
        "simplecache::http://127.0.0.1:9/a.tar",
        "file:///etc",
        "s3://bucket/a.tar",
    ],
)
def test_addresses_that_are_no_plain_ones_are_refused_also_where_braces_hide_them(run, address):
    settings = train_settings_from(read_recorded(run / "config.yaml"))
    plan = plan_stages(settings.schedule, 1)[-1]
    hidden = "{" + address[0] + ",x}" + address[1:]
    for train in (address, [address], [{"urls": "/a", "index": address}], [{"urls": ["/a", address]}], hidden):
        settings.data["train"] = train
        with pytest.raises(UserError, match="only folders and http") as caught:
            recorded_training_stream(settings, plan, None)
        assert caught.value.where == "--train-data"


def test_secrets_stay_here(foreign, listener, tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    folder = foreign(train=listener.address + "/${oc.env:AWS_SECRET_ACCESS_KEY}/0.tar")
    for data in ([], ["--data", str(tiny_shards)]):
        assert evaluate.main([str(folder), *LOSS, *data, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        assert "${" in said.err and SECRET not in said.err + said.out
    assert listener.paths == []


def test_with_data_given_the_runs_training_set_is_not_opened_unasked(foreign, listener, tiny_shards, tmp_path, capsys):
    folder, out = foreign(train=f"{listener.address}/set/0.tar"), tmp_path / "out"
    few = ["--samples", "4", "--loss-samples", "4", "--time-bins", "2", "--resamples", "10", "--set-resamples", "4"]
    few += ["--aspect-prompts", "2", "--camera-prompts", "2", "--diversity-prompts", "2", "--diversity-seeds", "2"]
    assert evaluate.main([str(folder), *few, "--data", str(tiny_shards), "--out", str(out)]) == 0
    assert listener.paths == []
    left_out = {entry["part"]: entry["hint"] for entry in result(out)["left_out"]}
    assert left_out["copies"].startswith("--train-data")
    with_train = ["--data", str(tiny_shards), "--train-data", f"{listener.address}/mine/0.tar"]
    assert evaluate.main([str(folder), *LOSS, *with_train, "--out", str(out)]) == 2
    assert listener.paths and all(path.startswith("/mine/") for path in listener.paths)


def test_nothing_is_written_or_deleted_where_it_says(foreign, tiny_shards, tmp_path):
    """A recorded cache would make room among the shards of the folder that it names."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "mine.tar").write_bytes(bytes(1000))
    folder = foreign(cache_dir=str(precious), cache_gb=1e-7)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("run_dir: ", f"run_dir: {tmp_path}/elsewhere #"))
    settings = train_settings_from(read_recorded(config))
    stream = recorded_training_stream(settings, plan_stages(settings.schedule, 1)[-1], None)
    assert (stream.cache_dir, stream.quarantine) == (None, None)
    assert evaluate.main([str(folder), *LOSS, "--out", str(tmp_path / "out")]) == 0
    assert (precious / "mine.tar").exists() and not (tmp_path / "elsewhere").exists()


def test_a_configuration_in_a_shared_folder_above_is_not_looked_at(run, tmp_path):
    models = tmp_path / "shared" / "models"
    models.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "shared"):
        shutil.copy(run / "config.yaml", place)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    shutil.copy(run / "final" / weights, models / "model.safetensors")
    assert find_run(models / "model.safetensors") is None
    assert find_run(models) is None
    assert find_run(run).folder == find_run(run / "final" / weights).folder == run


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: ${oc.env:HOME}\n", r"contains \$"),
        ("a: {'${x}': 1}\n", r"contains \$"),
        ("a: [1, [b, '${a.0}']]\n", r"contains \$"),
        ("a: &x [1]\nb: *x\n", "contains an alias"),
        ("- 1\n", "not a mapping"),
        ("a: [\n", "cannot be read"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "cannot be read"),
        ("a: " + "x" * LARGEST_BYTES + "\n", "larger than"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    ],
)
def test_what_no_run_writes_is_refused(tmp_path, text, told):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        read_recorded(file)
    assert caught.value.where == str(file)
