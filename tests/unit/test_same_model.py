"""Which names of a pretrained model mean the same folder, asked of this machine alone."""

import os

import pytest

from hdm_lightning.encoders import pretrained as sources
from hdm_lightning.encoders.pretrained import same_model
from hdm_lightning.errors import UserError


def test_paths_links_and_packages(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "linked").symlink_to(package / "model")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [str(package / "model"), "some_package/model", "some_package/../linked", "package:some_package/model"]
    assert all(same_model(first, second) for first in names for second in names)
    for other in ("other", "missing", "package:missing/model", "package:some_package/missing", ""):
        assert not any(same_model(name, other) or same_model(other, name) for name in names)
    assert same_model("owner/gone", "owner/gone")


def test_a_hub_name_is_looked_up_without_the_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "abc"
    (snapshot / "vae").mkdir(parents=True)
    asked = []

    def look_up(repo_id, **options):
        asked.append(options["local_files_only"])
        if repo_id != "owner/name":
            raise OSError("not in the cache")
        return os.fspath(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", look_up)
    assert same_model("owner/name", str(snapshot)) and same_model(str(snapshot / "vae"), "owner/name/vae")
    assert not same_model("owner/name", str(snapshot / "vae")) and not same_model("owner/other", str(snapshot))
    assert asked and all(asked) and "owner/other" not in sources._unreachable


def test_a_model_that_could_not_be_had_is_found_once_it_is_there(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    asked, here, now = [], [], [0.0]

    def look_up(repo_id, **options):
        asked.append(options["local_files_only"])
        if not here:
            raise OSError("401" if not options["local_files_only"] else "not in the cache")
        return os.fspath(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", look_up)
    monkeypatch.setattr(sources, "_unreachable", {})
    monkeypatch.setattr(sources.time, "monotonic", lambda: now[0])

    def found():
        return sources.locate_model("owner/name", where="x", required=["config.json"])

    for _ in range(2):  # the second looks into the cache alone, and says the same
        with pytest.raises(UserError, match="OSError: 401"):
            found()
    assert asked == [True, False, True]
    now[0] = 61.0
    with pytest.raises(UserError, match="OSError: 401"):
        found()
    assert asked[3:] == [True, False]
    here.append("downloaded in another terminal")
    assert found() == tmp_path
