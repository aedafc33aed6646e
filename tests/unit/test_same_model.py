"""Which names of a pretrained model mean the same folder, asked of this machine alone."""

import os

from hdm_lightning.encoders import pretrained as sources
from hdm_lightning.encoders.pretrained import same_model


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
