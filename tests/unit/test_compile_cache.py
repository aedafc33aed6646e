"""What was compiled is kept in the run's folder where that is asked for."""

import os

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from hdm_lightning.training.hardware import keep_compiled


@pytest.mark.parametrize(("kind", "kept"), [("cuda", True), ("cpu", False)])
def test_the_compiler_keeps_its_files_in_the_folder_on_a_gpu_alone(monkeypatch, tmp_path, kind, kept):
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(elsewhere))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(elsewhere))
    keep_compiled(tmp_path / "compiled", kind)
    assert cache_dir() == str(tmp_path / "compiled" if kept else elsewhere)
    assert (str(tmp_path / "compiled") in os.environ["TRITON_CACHE_DIR"]) == kept == (tmp_path / "compiled").is_dir()
