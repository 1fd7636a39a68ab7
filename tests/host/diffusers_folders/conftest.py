"""Folders that the host looks in, and one of diffusers in them."""

import folder_paths
import pytest
from folders import VARIANTS, lively


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Empty folders for models and output."""
    paths = {name: ([str(tmp_path / name)], set()) for name in ("diffusers", "diffusion_models")}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


@pytest.fixture
def dev(models):
    """A Flux.1 dev in three files."""
    kind, config, _ = VARIANTS["dev"]
    folder = models / "diffusers" / "dev" / "transformer"
    lively(kind, **config).save_pretrained(folder, max_shard_size="12MB")
    assert len(list(folder.glob("*-of-00003.safetensors"))) == 3
    return folder
